//! Dense layers on the CPU, and the matrix product that attention and load-time compositions use.

use super::Activation;
use crate::device::profile::OpCost;
use crate::device::simd::{self, Access, multiversion};
use crate::device::{Buffer, Cpu, DisjointWriter};
use crate::microkernel::pack::{Layout, pack_bf16_pairs, pack_weights};
use crate::microkernel::strip::{self, Kernels, MicrokernelArgs};
use crate::ops::norm::layer_norm_rows;
use crate::tensor::Tensor;
use gemm_common::Parallelism;
use std::ops::Range;

/// A matrix in memory: element `(r, c)` at `data[r * row + c * column]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<T = f32> {
    pub data: *const T,
    pub row: usize,
    pub column: usize,
}

/// A product of gemm's crates, `dst = alpha dst + beta lhs rhs`: the sizes `m`, `n` and `k`; `dst`
/// with the steps from column to column and from row to row, and whether it is read; `lhs` and
/// `rhs` with their steps; `alpha` and `beta`; whether each is conjugated; threads.
type Gemm<T> = unsafe fn(
    usize,
    usize,
    usize,
    *mut T,
    isize,
    isize,
    bool,
    *const T,
    isize,
    isize,
    *const T,
    isize,
    isize,
    T,
    T,
    bool,
    bool,
    bool,
    Parallelism,
);

/// The number types that are multiplied, each by a crate of its own: the crate gemm itself would
/// also compile the complex types.
pub(crate) trait Float: Copy + From<f32> + 'static {
    /// The product for this machine's instruction set.
    fn gemm() -> Gemm<Self>;
}

impl Float for f32 {
    fn gemm() -> Gemm<f32> {
        gemm_f32::gemm::f32::get_gemm_fn()
    }
}

impl Float for f64 {
    fn gemm() -> Gemm<f64> {
        gemm_f64::gemm::f64::get_gemm_fn()
    }
}

/// `out[m][n] (+)= a[m][k] b[k][n]` on this thread; `out` has rows of `stride`.
///
/// # Safety
/// The pointers span the matrices, and `out` overlaps neither input.
pub(crate) unsafe fn matmul<T: Float>(
    [m, n, k]: [usize; 3],
    out: *mut T,
    stride: usize,
    add: bool,
    a: Matrix<T>,
    b: Matrix<T>,
) {
    let alpha = T::from(if add { 1.0 } else { 0.0 });
    let beta = T::from(1.0);
    // The kernels want the smaller step of the result from row to row: if rows of `out` lie further
    // apart than columns, out' = b' a' is computed.
    let (a, b) =
        ((a.data, a.row as isize, a.column as isize), (b.data, b.row as isize, b.column as isize));
    let transposed = stride > 1;
    let ([m, n], [column, row], lhs, rhs) = match transposed {
        true => ([n, m], [stride as isize, 1], (b.0, b.1, b.2), (a.0, a.1, a.2)),
        false => ([m, n], [1, stride as isize], (a.0, a.2, a.1), (b.0, b.2, b.1)),
    };
    // SAFETY: passed on from the caller; no step is negative.
    unsafe {
        T::gemm()(
            m,
            n,
            k,
            out,
            column,
            row,
            add,
            lhs.0,
            lhs.1,
            lhs.2,
            rhs.0,
            rhs.1,
            rhs.2,
            alpha,
            beta,
            false,
            false,
            false,
            Parallelism::None,
        )
    }
}

/// What is done after a strip's sums, `[row][out of the block]`.
struct Finish<'a> {
    /// The bias of each sum.
    bias: &'a [f32],
    activation: Activation,
    /// Columns of the block.
    columns: usize,
    /// The destination of their first row, the floats from one row to the next, and what is added.
    out: &'a DisjointWriter<'a, f32>,
    at: usize,
    stride: usize,
    residual: Option<&'a [f32]>,
}

/// Adds the bias to a strip's `sums` and applies the activation, in place.
#[inline(always)]
fn activate<const FUSED: bool>(sums: &mut [f32], how: &Finish) {
    for (v, bias) in sums.iter_mut().zip(how.bias) {
        *v += *bias;
    }
    match how.activation {
        Activation::None => {}
        Activation::Gelu => {
            for v in sums.iter_mut() {
                *v = simd::gelu::<FUSED>(*v);
            }
        }
        Activation::Relu => {
            for v in sums.iter_mut() {
                *v = v.max(0.0);
            }
        }
    }
}

multiversion! {
    /// Applies bias, activation and residual to a strip's `sums`, and writes them to their places.
    fn finish(sums: &mut [f32], block: usize, how: &Finish) {
        activate::<FUSED>(sums, how);
        for (r, sums) in sums.chunks_exact(block).enumerate() {
            let (at, sums) = (how.at + r * how.stride, &sums[..how.columns]);
            // SAFETY: strips and blocks cover disjoint parts of the output.
            let out = unsafe { how.out.slice(at, how.columns) };
            if let Some(residual) = how.residual {
                for (out, (v, residual)) in out.iter_mut().zip(sums.iter().zip(&residual[at..])) {
                    *out = v + residual;
                }
            // With a length known at compile time, this is no call.
            } else if let (Ok(sums), Ok(out)) =
                (<&[f32; 32]>::try_from(sums), <&mut [f32; 32]>::try_from(&mut *out))
            {
                *out = *sums;
            } else {
                out.copy_from_slice(sums);
            }
        }
    }
}

multiversion! {
    /// [`finish`] for pairs, without a residual.
    fn finish_bf16_pairs(sums: &mut [f32], block: usize, how: &Finish) {
        activate::<FUSED>(sums, how);
        for (r, row) in sums.chunks_exact(block).enumerate() {
            // SAFETY: strips and blocks cover disjoint parts of the output.
            let out = unsafe { how.out.slice(how.at + r * how.stride, how.columns / 2) };
            for (q, out) in out.iter_mut().enumerate() {
                *out = simd::pair(row[2 * q], row[2 * q + 1]);
            }
        }
    }
}

/// The most weights that are kept in the strips' layout: for layers that a few tokens go through,
/// laying them out took longer than the products. Larger layers have many rows, compared with which
/// it takes little time, and keeping all of theirs would take much memory.
const LASTING: usize = crate::tensor::stored::LARGE;
/// The most outputs of a block.
const MOST_OUT: usize = 32;
/// Strips of a unit of work.
const STRIPS: usize = 32;
/// Strips whose outputs are passed on together.
const FEW: usize = 8;
/// Input blocks of one pass over the rows, whose weights stay in the second-level cache; sums wait
/// in memory between passes. A multiple of the number of runs that strips combine, so that sums do
/// not depend on it.
const PASS: usize = 25;

/// A dense layer.
#[derive(Clone, Copy)]
pub(crate) struct Layer<'a> {
    pub weight: &'a Tensor,
    pub bias: Option<&'a Tensor>,
    pub activation: Activation,
}

/// A dense layer is a convolution with one tap, and runs on the same strips: they keep their rate
/// at these sizes, where a general matrix product reached two thirds of it, and sum in short
/// chains, which halves the rounding error of the image encoder.
pub(super) struct Product<'a> {
    cpu: &'a Cpu,
    layer: Layer<'a>,
    kernels: Kernels,
    rows: Layout,
}

impl<'a> Product<'a> {
    pub fn new(cpu: &'a Cpu, m: usize, layer: Layer<'a>) -> Product<'a> {
        let n = layer.weight.shape()[0];
        let k = layer.weight.len() / n;
        let channels = strip::ic_block(k);
        let ic_block = if cpu.bf16_pairs(channels) { channels / 2 } else { channels };
        let kernels = strip::kernels(cpu.products(channels), ic_block, n);
        Product {
            cpu,
            layer,
            kernels,
            rows: Layout::new(cpu, m, k, kernels.microkernels.len().min(strip::DENSE)),
        }
    }

    /// Outputs.
    fn outputs(&self) -> usize {
        self.layer.weight.shape()[0]
    }

    /// The layer's work, with a residual of as many rows or without.
    fn work(&self, residual: bool) -> OpCost {
        let (Layout { m, k, .. }, n) = (self.rows, self.outputs());
        let floats = m * k + n * k + m * n * (1 + usize::from(residual));
        OpCost { problem: format!("{m} rows, {k} to {n}"), flops: (2 * m * k * n) as f64, floats }
    }

    /// The rows that `load(rows, to)` loads, in the strips of their [`Layout`].
    fn packed_rows(&self, load: impl Fn(Range<usize>, &mut [f32]) + Sync + Send) -> Buffer {
        let rows = self.rows;
        let mut packed = self.cpu.alloc(rows.len());
        let to = DisjointWriter::new(&mut packed);
        self.cpu.for_each(rows.count, |strip| {
            let of = rows.rows(strip);
            // SAFETY: each unit writes its own rows.
            load(of.clone(), unsafe { to.slice(rows.at(of.start), rows.at(of.len())) });
        });
        packed
    }

    /// Lays the weights of a block of outputs out, `[column][oc_block]`.
    fn lay_out(&self, block: usize, to: &mut [f32]) {
        let (cpu, rows, oc_block) = (self.cpu, self.rows, self.kernels.oc_block);
        let from = &self.layer.weight.data()[block * oc_block * rows.k..]
            [..oc_block.min(self.outputs() - block * oc_block) * rows.k];
        if rows.bf16_pairs() {
            let mut single = cpu.alloc(rows.blocks * rows.channels * oc_block);
            pack_weights(cpu.isa(), from, rows.k, rows.k, oc_block, &mut single);
            pack_bf16_pairs(cpu.isa(), oc_block, &single, to);
        } else {
            pack_weights(cpu.isa(), from, rows.k, rows.k, oc_block, to);
        }
    }

    /// Multiplies rows laid out; `place(rows, column)` says where in `out` the first of a strip's
    /// outputs from a column on goes, and how far apart its rows are there. Outputs are stored in
    /// pairs of bfloat16 if `paired`.
    fn run(
        &self,
        packed: &[f32],
        residual: Option<&[f32]>,
        out: &DisjointWriter<f32>,
        paired: bool,
        place: impl Fn(Range<usize>, usize) -> [usize; 2] + Sync + Send,
    ) {
        let Product { cpu, layer, kernels, rows, .. } = *self;
        let (Layout { blocks, wide, .. }, Kernels { oc_block, .. }, n) =
            (rows, kernels, self.outputs());
        let (across, block) = (n.div_ceil(oc_block), blocks * wide * oc_block);
        let kept = if layer.weight.len() > LASTING { None } else { self.kept() };
        // If weights are laid out here, the unit that multiplies by them does it, once for all
        // rows.
        let runs = rows.count.div_ceil(STRIPS);
        let units = if kept.is_some() { runs } else { 1 };
        cpu.for_each(units * across, |unit| {
            let c0 = unit % across * oc_block;
            let columns = oc_block.min(n - c0);
            let mut own = cpu.alloc(if kept.is_some() { 0 } else { block });
            let weights = match kept {
                Some(all) => &all[unit % across * block..][..block],
                None => {
                    self.lay_out(unit % across, &mut own);
                    &own[..]
                }
            };
            let bias = self.bias(c0, columns);
            for run in (unit / across * runs.div_ceil(units)..).take(runs.div_ceil(units)) {
                let run = run * STRIPS..((run + 1) * STRIPS).min(rows.count);
                let start = rows.rows(run.start).start;
                let mut sums = cpu.alloc((rows.rows(run.end).start - start) * oc_block);
                for first in (0..blocks).step_by(PASS) {
                    for strip in run.clone() {
                        let of = rows.rows(strip);
                        let sums =
                            &mut sums[(of.start - start) * oc_block..][..of.len() * oc_block];
                        let [at, stride] = place(of.clone(), c0);
                        let is_last = first + PASS >= blocks;
                        if is_last {
                            // Otherwise writing would wait for the cache lines.
                            for r in 0..of.len() {
                                (0..columns).step_by(16).for_each(|c| {
                                    simd::prefetch(
                                        out.wrapping_at(at + r * stride + c),
                                        Access::Write,
                                    )
                                });
                            }
                        }
                        self.strip(
                            &packed[rows.at(of.start)..rows.at(of.end)],
                            weights,
                            first,
                            sums,
                        );
                        if is_last {
                            let how = Finish {
                                bias: &bias,
                                activation: layer.activation,
                                columns,
                                out,
                                at,
                                stride,
                                residual,
                            };
                            let finish = if paired { finish_bf16_pairs } else { finish };
                            finish(cpu.isa(), sums, oc_block, &how);
                        }
                    }
                }
            }
        });
    }

    /// Weights that are kept in the strips' layout; none if they are already kept in another.
    fn kept(&self) -> Option<&[f32]> {
        let (cpu, oc_block) = (self.cpu, self.kernels.oc_block);
        let block = self.rows.blocks * self.rows.wide * oc_block;
        let all = self.layer.weight.packed((cpu.isa(), self.rows.bf16_pairs()), || {
            let mut all = cpu.alloc_persistent(self.outputs().div_ceil(oc_block) * block);
            cpu.chunks_mut(&mut all, block, |at, to| self.lay_out(at, to));
            all
        });
        all.map(|all| &all[..])
    }

    /// The bias of a block of outputs, once for each row of a strip.
    fn bias(&self, c0: usize, columns: usize) -> [f32; MOST_OUT * strip::DENSE] {
        let mut bias = [0.0f32; MOST_OUT * strip::DENSE];
        if let Some(given) = self.layer.bias {
            let rows = bias.chunks_exact_mut(self.kernels.oc_block);
            rows.for_each(|row| row[..columns].copy_from_slice(&given.data()[c0..][..columns]));
        }
        bias
    }

    /// Adds the products of a strip's rows, laid out, with the weights of a block of outputs to its
    /// sums: one pass from input block `first` on. The first pass overwrites the sums.
    fn strip(&self, packed: &[f32], weights: &[f32], first: usize, sums: &mut [f32]) {
        let (Layout { blocks, wide, .. }, Kernels { microkernels, oc_block }) =
            (self.rows, self.kernels);
        let (size, zeros) = (sums.len() / oc_block, [0.0f32; MOST_OUT]);
        assert!(packed.len() == size * blocks * wide && weights.len() == blocks * wide * oc_block);
        // SAFETY: `packed` spans the rows, `weights` the block, `sums` the strip.
        unsafe {
            microkernels[size - 1](&MicrokernelArgs {
                x: packed.as_ptr().add(first * size * wide),
                blocks: PASS.min(blocks - first),
                block_stride: size * wide,
                weights: weights.as_ptr().add(first * wide * oc_block),
                init: if first == 0 { zeros.as_ptr() } else { sums.as_ptr() },
                init_stride: if first == 0 { 0 } else { oc_block },
                out: sums.as_mut_ptr(),
                out_stride: oc_block,
                ..MicrokernelArgs::DENSE
            });
        }
    }

    /// The layer for rows laid out, plus `residual`.
    fn to_rows(&self, packed: &[f32], residual: Option<&Tensor>) -> Buffer {
        let n = self.outputs();
        let mut out = self.cpu.alloc(self.rows.m * n);
        self.run(
            packed,
            residual.map(Tensor::data),
            &DisjointWriter::new(&mut out),
            false,
            |rows, column| [rows.start * n + column, n],
        );
        out
    }
}

pub fn linear(cpu: &Cpu, x: &Tensor, layer: Layer, residual: Option<&Tensor>) -> Buffer {
    let product = Product::new(cpu, x.rows(), layer);
    let _op = cpu.op("linear", || product.work(residual.is_some()));
    let k = product.rows.k;
    let packed = product.packed_rows(|rows, to| {
        product.rows.pack(cpu, &x.data()[rows.start * k..rows.end * k], to)
    });
    product.to_rows(&packed, residual)
}

/// The layer, some rows at a time, `[row][output]`: `take` receives them while they are in a cache.
pub fn linear_to(
    cpu: &Cpu,
    x: &Tensor,
    layer: Layer,
    take: impl Fn(Range<usize>, &mut [f32]) + Sync + Send,
) {
    let product = Product::new(cpu, x.rows(), layer);
    let (rows, oc_block, n) = (product.rows, product.kernels.oc_block, product.outputs());
    let mut own = None;
    let weights = product.kept().unwrap_or_else(|| {
        let own = own.insert(cpu.alloc(n.div_ceil(oc_block) * rows.blocks * rows.wide * oc_block));
        cpu.chunks_mut(own, rows.blocks * rows.wide * oc_block, |at, to| product.lay_out(at, to));
        own
    });
    cpu.for_each(rows.count.div_ceil(FEW), |unit| {
        let strips = unit * FEW..((unit + 1) * FEW).min(rows.count);
        let all = rows.rows(strips.start).start..rows.rows(strips.end - 1).end;
        let mut packed = cpu.alloc(rows.at(all.len()));
        let mut out = cpu.alloc(all.len() * n);
        for of in strips.clone().map(|strip| rows.rows(strip)) {
            let to = &mut packed[rows.at(of.start - all.start)..rows.at(of.end - all.start)];
            rows.pack(cpu, &x.data()[of.start * rows.k..of.end * rows.k], to);
        }
        let to = DisjointWriter::new(&mut out);
        for (block, weights) in weights.chunks_exact(rows.blocks * rows.wide * oc_block).enumerate()
        {
            let c0 = block * oc_block;
            let columns = oc_block.min(n - c0);
            let bias = product.bias(c0, columns);
            for of in strips.clone().map(|strip| rows.rows(strip)) {
                let mut sums = [0.0f32; MOST_OUT * strip::DENSE];
                let sums = &mut sums[..of.len() * oc_block];
                for first in (0..rows.blocks).step_by(PASS) {
                    product.strip(
                        &packed[rows.at(of.start - all.start)..rows.at(of.end - all.start)],
                        weights,
                        first,
                        sums,
                    );
                }
                let at = (of.start - all.start) * n + c0;
                let how = Finish {
                    bias: &bias,
                    activation: layer.activation,
                    columns,
                    out: &to,
                    at,
                    stride: n,
                    residual: None,
                };
                finish(cpu.isa(), sums, oc_block, &how);
            }
        }
        take(all, &mut out);
    });
}

/// Two layers of the norm of `x`, plus `residual`: the first writes its rows in the layout in which
/// the second reads them.
pub fn mlp(
    cpu: &Cpu,
    x: &Tensor,
    norm: (&Tensor, &Tensor, f32),
    [first, second]: [Layer; 2],
    residual: &Tensor,
) -> Buffer {
    let [first, second] = [first, second].map(|layer| Product::new(cpu, x.rows(), layer));
    let (weight, bias, eps) = norm;
    let k = first.rows.k;
    let hidden = {
        let _op = cpu.op("linear", || first.work(false));
        let packed = first.packed_rows(|rows, to| {
            let from = &x.data()[rows.start * k..rows.end * k];
            let mut normed = cpu.alloc(from.len());
            normed.copy_from_slice(from);
            layer_norm_rows(cpu.isa(), &mut normed, weight.data(), bias.data(), eps, false);
            first.rows.pack(cpu, &normed, to);
        });
        let to = second.rows;
        let mut hidden = cpu.alloc(to.len());
        first.run(
            &packed,
            None,
            &DisjointWriter::new(&mut hidden),
            to.bf16_pairs(),
            |rows, column| {
                let block = column / to.channels * rows.len() * to.wide;
                [
                    to.at(rows.start) + block + column % to.channels / (to.channels / to.wide),
                    to.wide,
                ]
            },
        );
        hidden
    };
    let _op = cpu.op("linear", || second.work(true));
    second.to_rows(&hidden, Some(residual))
}

/// Whether [`mlp`] can pass rows from one layer to the other: their columns fill whole blocks.
pub fn can_fuse_mlp(cpu: &Cpu, [first, second]: [Layer; 2]) -> bool {
    let [first, second] = [first, second].map(|layer| Product::new(cpu, 1, layer));
    let channels = second.rows.channels;
    second.rows.k % channels == 0
        && channels % first.kernels.oc_block == 0
        && first.outputs() == second.rows.k
}
