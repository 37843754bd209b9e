//! Dense layers on the CPU, and the matrix product that attention and load-time compositions use.

use super::Activation;
use crate::device::cpu::Shared;
use crate::device::simd::{self, multiversion};
use crate::device::{Buffer, Cpu};
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

multiversion! {
    /// Bias and activation of `sums` `[rows][out_block]`.
    fn finish(sums: &mut [f32], bias: &[f32], activation: Activation) {
        let n = bias.len();
        for row in sums.chunks_exact_mut(n) {
            for i in 0..n {
                row[i] += bias[i];
            }
        }
        match activation {
            Activation::None => {}
            Activation::Gelu => {
                for v in sums {
                    *v = simd::gelu(*v);
                }
            }
            Activation::Relu => {
                for v in sums {
                    *v = v.max(0.0);
                }
            }
        }
    }
}

/// Rows of a unit of work: enough to pay for laying a block of weights out.
const ROWS: usize = 512;

multiversion! {
    /// Lays rows of `k` values out in blocks of `x` columns, `[block][row][x]` with blocks `stride` apart, zeros behind the last column.
    fn pack_rows(from: &[f32], k: usize, x: usize, stride: usize, to: &mut [f32]) {
        for (r, row) in from.chunks_exact(k).enumerate() {
            for (b, part) in row.chunks(x).enumerate() {
                let to = &mut to[b * stride + r * x..][..x];
                to[..part.len()].copy_from_slice(part);
                to[part.len()..].fill(0.0);
            }
        }
    }
}

multiversion! {
    /// Lays `from` `[outputs][k]` out for the strips, `[column][out_block]`, zeros behind the last output and column.
    fn pack_weights(from: &[f32], k: usize, out_block: usize, to: &mut [f32]) {
        let outputs = from.len() / k;
        if outputs < out_block {
            to.fill(0.0);
        }
        to[k * out_block..].fill(0.0);
        // Square tiles, gathered into a line at a time, so that neither side leaves the first-level cache.
        for o0 in (0..outputs).step_by(16) {
            for c0 in (0..k).step_by(16) {
                if o0 + 16 <= outputs && c0 + 16 <= k {
                    let mut tile = [[0.0f32; 16]; 16];
                    for o in 0..16 {
                        let row: &[f32; 16] = from[(o0 + o) * k + c0..][..16].try_into().expect("16 columns");
                        for c in 0..16 {
                            tile[c][o] = row[c];
                        }
                    }
                    for c in 0..16 {
                        to[(c0 + c) * out_block + o0..][..16].copy_from_slice(&tile[c]);
                    }
                } else {
                    for o in o0..(o0 + 16).min(outputs) {
                        for c in c0..(c0 + 16).min(k) {
                            to[c * out_block + o] = from[o * k + c];
                        }
                    }
                }
            }
        }
    }
}

/// A dense layer is a convolution with one tap, and runs on the same strips: they keep their rate at these sizes, where a general
/// matrix product reached two thirds of it, and sum in short chains, which halves the rounding error of the image encoder.
pub fn linear(cpu: &Cpu, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, activation: Activation, residual: Option<&Tensor>) -> Buffer {
    let (m, k, n) = (x.rows(), x.channels(), weight.shape()[0]);
    let wide = kernel::in_block(k);
    let Kernels { strips, out_block } = kernel::kernels(cpu.isa(), wide, n);
    let blocks = k.div_ceil(wide);
    let mut packed = cpu.take(blocks * wide * m);
    let columns = Shared::new(&mut packed);
    let tile = 32;
    cpu.for_each(m.div_ceil(tile), |unit| {
        let r0 = unit * tile;
        let rows = &x.data()[r0 * k..(r0 + tile).min(m) * k];
        // SAFETY: each unit writes its own rows; their addresses interleave only between blocks.
        let to = unsafe { columns.slice(r0 * wide, ((blocks - 1) * m + rows.len() / k) * wide) };
        pack_rows(cpu.isa(), rows, k, wide, m * wide, to);
    });

    let mut out = cpu.take(m * n);
    let to = Shared::new(&mut out);
    let across = n.div_ceil(out_block);
    cpu.for_each(m.div_ceil(ROWS) * across, |unit| {
        let (r0, c0) = (unit / across * ROWS, unit % across * out_block);
        let (rows, valid) = (ROWS.min(m - r0), out_block.min(n - c0));
        let mut weights = cpu.take(blocks * wide * out_block);
        pack_weights(cpu.isa(), &weight.data()[c0 * k..(c0 + valid) * k], k, out_block, &mut weights);
        let mut padded = vec![0.0f32; 2 * out_block];
        let (zeros, padded_bias) = padded.split_at_mut(out_block);
        if let Some(bias) = bias {
            padded_bias[..valid].copy_from_slice(&bias.data()[c0..][..valid]);
        }
        let mut sums = vec![0.0f32; strips.len() * out_block];
        let mut r = r0;
        for (count, size) in kernel::split(rows, strips.len()) {
            for _ in 0..count {
                // SAFETY: `packed` spans the rows, `weights` the block, `sums` the longest strip.
                unsafe {
                    strips[size - 1](&Strip {
                        x: packed.as_ptr().add(r * wide),
                        blocks,
                        block_stride: m * wide,
                        taps: &0,
                        tap_count: 1,
                        weights: weights.as_ptr(),
                        init: zeros.as_ptr(),
                        init_stride: 0,
                        out: sums.as_mut_ptr(),
                        out_stride: out_block,
                    });
                }
                finish(cpu.isa(), &mut sums[..size * out_block], padded_bias, activation);
                for sums in sums.chunks_exact(out_block).take(size) {
                    // SAFETY: units cover disjoint parts of `out`.
                    let row = unsafe { to.slice(r * n + c0, valid) };
                    match residual {
                        Some(t) => {
                            let residual = &t.data()[r * n + c0..][..valid];
                            row.iter_mut().zip(sums.iter().zip(residual)).for_each(|(o, (s, t))| *o = s + t);
                        }
                        None => row.copy_from_slice(&sums[..valid]),
                    }
                    r += 1;
                }
            }
        }
    });
    out
}
