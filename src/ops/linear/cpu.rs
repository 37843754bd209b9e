//! Dense layers on the CPU, and the matrix product that attention and load-time compositions use.

use super::Activation;
use crate::device::cpu::Shared;
use crate::device::profile::Work;
use crate::device::simd::{self, multiversion};
use crate::device::{Buffer, Cpu, Isa};
use crate::ops::conv3d::kernel::{self, Kernels, Strip};
use crate::tensor::Tensor;

/// A matrix in memory: element `(r, c)` at `data[r * row + c * column]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<T = f32> {
    pub data: *const T,
    pub row: usize,
    pub column: usize,
}

/// What the crate multiplies.
pub(crate) trait Float: Copy + From<f32> + 'static {}
impl Float for f32 {}
impl Float for f64 {}

/// `out[m][n] (+)= a[m][k] b[k][n]` on this thread; `out` has rows of `stride`.
///
/// # Safety
/// The pointers span the matrices, and `out` overlaps neither input.
pub(crate) unsafe fn matmul<T: Float>([m, n, k]: [usize; 3], out: *mut T, stride: usize, add: bool, a: Matrix<T>, b: Matrix<T>) {
    // SAFETY: passed on from the caller.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            stride as isize,
            add,
            a.data,
            a.column as isize,
            a.row as isize,
            b.data,
            b.column as isize,
            b.row as isize,
            T::from(if add { 1.0 } else { 0.0 }),
            T::from(1.0),
            false,
            false,
            false,
            gemm::Parallelism::None,
        )
    }
}

/// Where a unit's results go: rows of `n`, from column `c0` on.
#[derive(Clone, Copy)]
struct Columns<'a> {
    out: Shared,
    residual: Option<&'a [f32]>,
    n: usize,
    c0: usize,
}

multiversion! {
    /// Bias, activation and residual of `sums`, rows from `row0` on of as many columns as there are biases, `stride` apart, to their places.
    fn finish(sums: &mut [f32], stride: usize, bias: &[f32], activation: Activation, row0: usize, columns: Columns) {
        let n = bias.len();
        for (r, row) in sums.chunks_exact_mut(stride).enumerate() {
            let at = (row0 + r) * columns.n + columns.c0;
            // SAFETY: units cover disjoint parts of the output.
            let out = unsafe { columns.out.slice(at, n) };
            let row = &mut row[..n];
            for i in 0..n {
                row[i] += bias[i];
            }
            match activation {
                Activation::None => {}
                Activation::Gelu => {
                    for v in &mut *row {
                        *v = simd::gelu::<FUSED>(*v);
                    }
                }
                Activation::Relu => {
                    for v in &mut *row {
                        *v = v.max(0.0);
                    }
                }
            }
            match columns.residual {
                Some(residual) => {
                    let residual = &residual[at..at + n];
                    for i in 0..n {
                        out[i] = row[i] + residual[i];
                    }
                }
                None => {
                    for (out, v) in out.iter_mut().zip(&*row) {
                        *out = *v;
                    }
                }
            }
        }
    }
}

/// Weights that are kept as the strips want them, at most: of layers that a few tokens go through, laying them out took longer than the products. Larger layers have many
/// rows, beside which it is little, and all of theirs together would be felt in memory.
const LASTING: usize = 1 << 20;
/// Strips of a unit of work.
const STRIPS: usize = 32;
/// Input blocks of one pass over the rows, whose weights stay in the second-level cache; sums wait in memory between passes. A multiple of the strips' own joins, so that
/// sums do not depend on it.
const PASS: usize = 25;

multiversion! {
    /// Lays rows of `k` values out in blocks of `x` columns, `[block][row][x]` with blocks `stride` apart, zeros behind the last column.
    fn pack_rows(from: &[f32], k: usize, x: usize, stride: usize, to: &mut [f32]) {
        for (r, row) in from.chunks_exact(k).enumerate() {
            for (b, part) in row.chunks(x).enumerate() {
                let to = &mut to[b * stride + r * x..][..x];
                // Of a known length: no call.
                if let (Ok(part), Ok(to)) = (<&[f32; 32]>::try_from(part), <&mut [f32; 32]>::try_from(&mut *to)) {
                    *to = *part;
                } else {
                    to[..part.len()].copy_from_slice(part);
                    to[part.len()..].fill(0.0);
                }
            }
        }
    }
}

multiversion! {
    /// The same in pairs of columns, `x` pairs a block.
    fn pack_row_pairs(from: &[f32], k: usize, x: usize, stride: usize, to: &mut [f32]) {
        for (r, row) in from.chunks_exact(k).enumerate() {
            for (b, part) in row.chunks(2 * x).enumerate() {
                let mut value = [0.0f32; 32];
                value[..part.len()].copy_from_slice(part);
                let to = &mut to[b * stride + r * x..][..x];
                for (q, to) in to.iter_mut().enumerate() {
                    *to = simd::pair(value[2 * q], value[2 * q + 1]);
                }
            }
        }
    }
}

multiversion! {
    /// Joins rows of `block` values in pairs: row `n` of the result is rows `2 n` and `2 n + 1`.
    fn join_pairs(block: usize, values: &[f32], to: &mut [f32]) {
        for (row, to) in to.chunks_exact_mut(block).enumerate() {
            for (i, to) in to.iter_mut().enumerate() {
                *to = simd::pair(values[2 * row * block + i], values[(2 * row + 1) * block + i]);
            }
        }
    }
}

/// Lays the first `columns` of the rows of `from`, one an output and `stride` apart, out for the strips, `[column][out_block]`, zeros behind the last output and column.
pub(crate) fn pack_weights(isa: Isa, from: &[f32], stride: usize, columns: usize, out_block: usize, to: &mut [f32]) {
    let outputs = from.len().div_ceil(stride);
    if outputs < out_block {
        to.fill(0.0);
    }
    to[columns * out_block..].fill(0.0);
    // Square tiles, so that neither side leaves the first-level cache.
    for o0 in (0..outputs).step_by(16) {
        for c0 in (0..columns).step_by(16) {
            if o0 + 16 <= outputs && c0 + 16 <= columns {
                simd::transpose16(isa, &from[o0 * stride + c0..], stride, &mut to[c0 * out_block + o0..], out_block);
                continue;
            }
            for o in o0..(o0 + 16).min(outputs) {
                for c in c0..(c0 + 16).min(columns) {
                    to[c * out_block + o] = from[o * stride + c];
                }
            }
        }
    }
}

/// A dense layer is a convolution with one tap, and runs on the same strips: they keep their rate at these sizes, where a general
/// matrix product reached two thirds of it, and sum in short chains, which halves the rounding error of the image encoder.
pub fn linear(cpu: &Cpu, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, activation: Activation, residual: Option<&Tensor>) -> Buffer {
    let (m, k, n) = (x.rows(), x.channels(), weight.shape()[0]);
    let _op = cpu.op("linear", || {
        let floats = m * k + n * k + m * n * (1 + usize::from(residual.is_some()));
        Work { problem: format!("{m} rows, {k} to {n}"), flops: (2 * m * k * n) as f64, floats }
    });
    let channels = kernel::in_block(k);
    let pairs = cpu.pairs(channels);
    let wide = if pairs { channels / 2 } else { channels };
    let Kernels { strips, out_block } = if pairs { kernel::pair_kernels(wide, n) } else { kernel::kernels(cpu.isa(), wide, n) };
    let blocks = k.div_ceil(channels);
    // The rows of a strip lie together, so that it reads its part from one end to the other.
    let [(longer, size), (shorter, _)] = kernel::split(m, strips.len().min(kernel::DENSE));
    let count = longer + shorter;
    let start = |strip: usize| strip * size - strip.saturating_sub(longer);
    let mut packed = cpu.take(blocks * wide * m);
    let columns = Shared::new(&mut packed);
    cpu.for_each(count, |strip| {
        let [r0, end] = [start(strip), start(strip + 1)];
        // SAFETY: each unit writes its own rows.
        let to = unsafe { columns.slice(r0 * blocks * wide, (end - r0) * blocks * wide) };
        let pack_rows = if pairs { pack_row_pairs } else { pack_rows };
        pack_rows(cpu.isa(), &x.data()[r0 * k..end * k], k, wide, (end - r0) * wide, to);
    });

    // A block of outputs' weights, `[column][out_block]`.
    let across = n.div_ceil(out_block);
    let block = blocks * wide * out_block;
    let lay_out = |at: usize, to: &mut [f32]| {
        let (c0, valid) = (at * out_block, out_block.min(n - at * out_block));
        let from = &weight.data()[c0 * k..(c0 + valid) * k];
        if pairs {
            let mut single = cpu.take(blocks * channels * out_block);
            pack_weights(cpu.isa(), from, k, k, out_block, &mut single);
            join_pairs(cpu.isa(), out_block, &single, to);
        } else {
            pack_weights(cpu.isa(), from, k, k, out_block, to);
        }
    };
    let kept = if weight.len() > LASTING {
        None
    } else {
        weight.laid_out((cpu.isa(), pairs), || {
            let mut all = cpu.take_lasting(across * block);
            cpu.chunks_mut(&mut all, block, lay_out);
            all
        })
    };

    let mut out = cpu.take(m * n);
    let to = Shared::new(&mut out);
    // Where weights are laid out here, by whoever multiplies by them, once for all rows.
    let runs = count.div_ceil(STRIPS);
    let units = if kept.is_some() { runs } else { 1 };
    cpu.for_each(units * across, |unit| {
        let c0 = unit % across * out_block;
        let valid = out_block.min(n - c0);
        let mut own = cpu.take(if kept.is_some() { 0 } else { block });
        let weights = match kept {
            Some(all) => &all[unit % across * block..][..block],
            None => {
                lay_out(unit % across, &mut own);
                &own[..]
            }
        };
        let mut padded = vec![0.0f32; 2 * out_block];
        let (zeros, padded_bias) = padded.split_at_mut(out_block);
        if let Some(bias) = bias {
            padded_bias[..valid].copy_from_slice(&bias.data()[c0..][..valid]);
        }
        for run in (unit / across * runs.div_ceil(units)..).take(runs.div_ceil(units)) {
            let run = run * STRIPS..((run + 1) * STRIPS).min(count);
            let rows = start(run.start)..start(run.end);
            let mut sums = cpu.take(rows.len() * out_block);
            for first in (0..blocks).step_by(PASS) {
                for strip in run.clone() {
                    let (r0, size) = (start(strip), start(strip + 1) - start(strip));
                    // SAFETY: `packed` spans the rows, `weights` the block, `sums` the rows of this unit.
                    unsafe {
                        let sums = sums.as_mut_ptr().add((r0 - rows.start) * out_block);
                        strips[size - 1](&Strip {
                            x: packed.as_ptr().add((r0 * blocks + first * size) * wide),
                            blocks: PASS.min(blocks - first),
                            block_stride: size * wide,
                            weights: weights.as_ptr().add(first * wide * out_block),
                            init: if first == 0 { zeros.as_ptr() } else { sums },
                            init_stride: if first == 0 { 0 } else { out_block },
                            out: sums,
                            out_stride: out_block,
                            ..Strip::DENSE
                        });
                    }
                }
            }
            let columns = Columns { out: to, residual: residual.map(|t| t.data()), n, c0 };
            finish(cpu.isa(), &mut sums, out_block, &padded_bias[..valid], activation, rows.start, columns);
        }
    });
    out
}
