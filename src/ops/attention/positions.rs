//! The terms that the image encoder's positions add to attention's scores: products of queries and
//! tables, and the padded positions' weight.

use super::flash::{lay_rows, run_microkernels};
use crate::device::Isa;
use crate::device::simd::{self, multiversion};
use crate::microkernel::pack::pack_weights;
use crate::microkernel::strip::{self, Kernels, MicrokernelArgs};
use std::ops::Range;

multiversion! {
    /// `out[i][j] = a_i · table_j` for rows of `dim` values.
    pub(super) fn dots(a: &[f32], table: &[f32], dim: usize, out: &mut [f32]) {
        let across = table.len() / dim;
        for (a, out) in a.chunks_exact(dim).zip(out.chunks_exact_mut(across)) {
            for (t, out) in table.chunks_exact(dim).zip(out) {
                let mut lanes = [0.0f32; 8];
                let whole = dim / 8 * 8;
                for (a, t) in a[..whole].chunks_exact(8).zip(t[..whole].chunks_exact(8)) {
                    for i in 0..8 {
                        lanes[i] += a[i] * t[i];
                    }
                }
                let rest: f32 = a[whole..].iter().zip(&t[whole..]).map(|(a, t)| a * t).sum();
                *out = rest + lanes.iter().sum::<f32>();
            }
        }
    }
}

multiversion! {
    /// `B[kd, kw] + C[kh, kw]`, rows of `stride`, for every key `(kd, kh, kw)` of a window, zero
    /// after the last: the part that the queries of one `(d, h)` share.
    pub(super) fn shared_positions(
        b: &[f32],
        c: &[f32],
        stride: usize,
        extent: [usize; 3],
        out: &mut [f32],
    ) {
        let keys = extent[0] * extent[1] * extent[2];
        for (row, out) in out[..keys].chunks_exact_mut(extent[2]).enumerate() {
            let b = &b[row / extent[1] * stride..][..extent[2]];
            let c = &c[row % extent[1] * stride..][..extent[2]];
            for i in 0..extent[2] {
                out[i] = b[i] + c[i];
            }
        }
        out[keys..].fill(0.0);
    }
}

multiversion! {
    /// Repeats the first `line` values of each row of `a`, `stride` apart, until rows of `period`
    /// are full.
    pub(super) fn repeat(a: &[f32], stride: usize, line: usize, period: usize, out: &mut [f32]) {
        for (a, out) in a.chunks_exact(stride).zip(out.chunks_exact_mut(period)) {
            let a = &a[..line];
            for out in out.chunks_mut(line) {
                // For a few floats, this is no call.
                for (out, a) in out.iter_mut().zip(a) {
                    *out = *a;
                }
            }
        }
    }
}

multiversion! {
    /// `ln Σ exp(A + pad)` over the first `edge` of each row of `a`, `stride` apart, plus the row's
    /// score.
    pub(super) fn padded_scores(
        a: &[f32],
        stride: usize,
        edge: usize,
        pad: &[f32],
        out: &mut [f32],
    ) {
        for (a, out) in a.chunks_exact(stride).zip(out) {
            let mut lanes = [f32::NEG_INFINITY; 16];
            for (a, p) in a[..edge].chunks(16).zip(pad[..edge].chunks(16)) {
                for i in 0..a.len() {
                    lanes[i] = lanes[i].max(a[i] + p[i]);
                }
            }
            let mut row_max = lanes[0];
            for lane in lanes {
                row_max = row_max.max(lane);
            }
            let mut sums = [0.0f64; 16];
            for (a, p) in a[..edge].chunks(16).zip(pad[..edge].chunks(16)) {
                let mut away = [f32::NEG_INFINITY; 16];
                for i in 0..a.len() {
                    away[i] = a[i] + p[i] - row_max;
                }
                for i in 0..16 {
                    sums[i] += simd::exp::<FUSED>(away[i]) as f64;
                }
            }
            let mut sum = 0.0;
            for lane in sums {
                sum += lane;
            }
            *out += row_max + sum.ln() as f32;
        }
    }
}

multiversion! {
    /// For each kw, the logarithm of the summed `exp(B + C)`, rows of `stride`, over the padded
    /// positions of a window; minus infinity if there are none.
    pub(super) fn padded_log_weight(
        b: &[f32],
        c: &[f32],
        stride: usize,
        edge: usize,
        extent: [usize; 3],
        out: &mut [f32],
    ) {
        // Sixteen columns at a time.
        for first in (0..edge).step_by(16) {
            let n = (edge - first).min(16);
            let mut column_max = [[f32::NEG_INFINITY; 16]; 2];
            let [mut inside, mut outside] = [[[0.0f64; 16]; 2]; 2];
            for (of, t) in [b, c].into_iter().enumerate() {
                let max = &mut column_max[of];
                for p in 0..edge {
                    let row = &t[p * stride + first..][..n];
                    for i in 0..n {
                        max[i] = max[i].max(row[i]);
                    }
                }
                for p in 0..edge {
                    let mut away = [f32::NEG_INFINITY; 16];
                    away[..n].copy_from_slice(&t[p * stride + first..][..n]);
                    let sums = if p < extent[of] { &mut inside[of] } else { &mut outside[of] };
                    for i in 0..16 {
                        sums[i] += simd::exp::<FUSED>(away[i] - max[i]) as f64;
                    }
                }
            }
            for i in 0..n {
                let (b_in, b_out) = (inside[0][i], outside[0][i]);
                let (c_in, c_out) = (inside[1][i], outside[1][i]);
                let padded = if first + i < extent[2] {
                    b_out * (c_in + c_out) + b_in * c_out
                } else {
                    (b_in + b_out) * (c_in + c_out)
                };
                out[first + i] = column_max[0][i] + column_max[1][i] + padded.ln() as f32;
            }
        }
    }
}

/// Products of queries and the tables of relative positions, on the convolutions' strips.
pub(super) struct Terms {
    isa: Isa,
    dim: usize,
    kernels: Kernels,
    /// Channels of a block.
    ic_block: usize,
    /// Columns, and their number in whole blocks.
    edge: usize,
    pub wide: usize,
}

impl Terms {
    pub fn new(isa: Isa, dim: usize, edge: usize) -> Terms {
        let ic_block = strip::ic_block(dim).max(8);
        let kernels = strip::kernels(isa, ic_block, 16);
        Terms { isa, dim, kernels, ic_block, edge, wide: edge.next_multiple_of(kernels.oc_block) }
    }

    /// Channels, in whole blocks.
    fn deep(&self) -> usize {
        self.dim.next_multiple_of(self.ic_block)
    }

    /// Floats of a table.
    pub fn size(&self) -> usize {
        self.deep() * self.wide
    }

    /// Lays out a table whose rows will be the columns.
    pub fn lay_out(&self, rows: &[f32], to: &mut [f32]) {
        let block = self.kernels.oc_block;
        for (b, to) in to.chunks_exact_mut(self.deep() * block).enumerate() {
            let rows = &rows[b * block * self.dim..((b + 1) * block).min(self.edge) * self.dim];
            pack_weights(self.isa, rows, self.dim, self.dim, block, to);
        }
    }

    /// Floats of `rows` queries, laid out.
    pub fn laid(&self, rows: usize) -> usize {
        rows * self.deep()
    }

    /// Lays out `rows` queries.
    pub fn lay_rows<'q>(&self, rows: usize, row: impl Fn(usize) -> &'q [f32], to: &mut [f32]) {
        lay_rows(rows, self.ic_block, row, to);
    }

    /// Multiplies some of the queries by a table, to rows of a stride.
    ///
    /// # Safety
    /// `out` spans the rows, and nothing else touches them. `q` is as many queries as
    /// [`Terms::lay_rows`] lays out, `which` are some of them, and the table is one of
    /// [`Terms::lay_out`].
    pub unsafe fn products(
        &self,
        q: &[f32],
        rows: usize,
        which: Range<usize>,
        table: &[f32],
        out: *mut f32,
        stride: usize,
    ) {
        let (block, zeros) = (self.kernels.oc_block, [0.0f32; 64]);
        for c in (0..self.wide).step_by(block) {
            // SAFETY: the strips stay within the queries, the table and the caller's rows.
            unsafe {
                run_microkernels(self.kernels, which.len(), |r| MicrokernelArgs {
                    x: q.as_ptr().add((which.start + r) * self.ic_block),
                    blocks: self.deep() / self.ic_block,
                    block_stride: rows * self.ic_block,
                    weights: table[c * self.deep()..].as_ptr(),
                    init: zeros.as_ptr(),
                    init_stride: 0,
                    out: out.add(r * stride + c),
                    out_stride: stride,
                    ..MicrokernelArgs::DENSE
                });
            }
        }
    }
}
