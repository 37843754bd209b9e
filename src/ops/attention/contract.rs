//! The inputs and results of attention: weights, attended values, their windows, gradients.

use crate::device::cuda::Memory;
use crate::memory;
use crate::ops::linear::Matrix;
use crate::tensor::{Param, Tensor};
use std::sync::Arc;

/// The parameters of an attention layer of the two-way transformer: four projections, each a weight
/// `[out, in]` and a bias `[out]`.
#[derive(Clone)]
pub struct TwoWayWeights {
    /// Query projection.
    pub q: (Param, Param),
    /// Key projection.
    pub k: (Param, Param),
    /// Value projection.
    pub v: (Param, Param),
    /// Output projection.
    pub out: (Param, Param),
    /// The number of heads, which divides the projected width.
    pub heads: usize,
}

/// The number of valid keys, if it is known only in the memory of a CUDA device, as an `int`: later
/// keys are padding. None if all keys are valid.
///
/// Other devices refuse it: they have no padding.
pub type ValidKeys<'a> = Option<&'a Arc<Memory>>;

/// The parameters of an attention layer of the image encoder, whose width is `dim`.
#[derive(Clone)]
pub struct VitWeights {
    /// The projection to queries, keys and values: weight `[3 * dim, dim]` and bias `[3 * dim]`.
    /// The first `dim` outputs are q, then come k and v; each is divided into heads.
    pub qkv: (Param, Param),
    /// The output projection: weight `[dim, dim]` and bias `[dim]`.
    pub proj: (Param, Param),
    /// The tables of relative positions along d, h and w, each `[2 * window - 1, dim / heads]`;
    /// with a `window` of 0 the grid's edge takes its place.
    pub rel_pos: [Param; 3],
    /// The number of heads, which divides `dim`.
    pub heads: usize,
    /// The edge of a window in tokens; 0 attends over the whole grid.
    pub window: usize,
}

/// The image encoder's attention between its projections, with what its gradient needs.
///
/// Rows are tokens. On a CUDA device they are in the order of the grid `[n, s, s, s]`; on the CPU
/// window by window.
pub struct Attended {
    /// Projected queries, keys and values, `[n * s³, 3 * dim]`.
    pub qkv: Tensor,
    /// The attended values, all heads side by side, `[n * s³, dim]`.
    pub heads: Tensor,
    pub(super) windows: Windows,
    /// Whether rows are in the grid's order.
    pub(super) gridded: bool,
    /// What the gradient needs from the forward pass, on a CUDA device in 16 bits.
    pub(super) kept: Option<Kept>,
}

/// What the gradient on tensor cores needs from the forward pass, in float32.
pub(super) struct Kept {
    /// `[n * s³, heads]`: the base-2 logarithm of the sum of a query's weights, from which the
    /// weights are computed again.
    pub(super) log_sums: Arc<Memory>,
    /// `[n * s³, dim]`: [`Attended::heads`] before it was rounded.
    pub(super) values: Arc<Memory>,
}

impl Attended {
    /// Reorders rows `[n * s³, c]` from the order of this attention's rows to the grid's.
    pub fn to_grid(&self, rows: Tensor) -> Tensor {
        if self.gridded || self.windows.order.is_empty() {
            rows
        } else {
            self.windows.scatter(&rows)
        }
    }

    /// Reorders rows `[n * s³, c]` from the grid's order to that of this attention's rows.
    pub fn from_grid(&self, rows: &Tensor) -> Tensor {
        if self.gridded {
            rows.clone()
        } else {
            self.windows.gather(rows).unwrap_or_else(|| rows.clone())
        }
    }
}

/// What messages call the memory of rows in another order.
const WINDOWS: &str = "rows of windows";

/// The grid's tokens in window order.
pub struct Windows {
    pub edge: usize,
    /// Grids, and the tokens of each along an axis.
    pub items: usize,
    pub s: usize,
    /// First row and extent inside the grid of each window.
    pub list: Vec<(usize, [usize; 3])>,
    /// The grid row of each window-ordered row; empty when the order is the grid's own.
    order: Vec<usize>,
}

impl Windows {
    /// The windows in which rows in the grid's own order are taken; the whole grid counts as one
    /// window.
    pub fn new(n: usize, s: usize, edge: usize) -> Windows {
        let across = s.div_ceil(edge);
        let (mut list, mut order) = (vec![], vec![]);
        for item in 0..n {
            for cell in 0..across.pow(3) {
                let start = [cell / across / across, cell / across % across, cell % across]
                    .map(|c| c * edge);
                let extent = start.map(|c| edge.min(s - c));
                list.push((order.len(), extent));
                for i in 0..extent[0] {
                    for j in 0..extent[1] {
                        for k in 0..extent[2] {
                            order.push(
                                ((item * s + start[0] + i) * s + start[1] + j) * s + start[2] + k,
                            );
                        }
                    }
                }
            }
        }
        if across == 1 {
            order.clear();
        }
        Windows { edge, items: n, s, list, order }
    }

    /// Rows in window order; none if that is the grid's order.
    pub fn gather(&self, x: &Tensor) -> Option<Tensor> {
        let c = x.channels();
        (!self.order.is_empty()).then(|| {
            let mut rows: Vec<f32> = memory::list(WINDOWS, x.len());
            self.order.iter().for_each(|&r| rows.extend_from_slice(&x.data()[r * c..][..c]));
            Tensor::new(x.shape(), rows)
        })
    }

    fn scatter(&self, x: &Tensor) -> Tensor {
        let c = x.channels();
        let mut out: Vec<f32> = memory::zeroed(WINDOWS, x.len());
        for (from, &to) in x.data().chunks_exact(c).zip(&self.order) {
            out[to * c..][..c].copy_from_slice(from);
        }
        Tensor::new(x.shape(), out)
    }
}

/// Gradients of what the image encoder's attention was computed from.
pub struct VitGrads {
    /// Gradient of the projected rows `[rows, 3 * dim]`, in the order of [`Attended::qkv`].
    pub qkv: Tensor,
    /// Gradient of the projection's bias `[3 * dim]` through the padded tokens alone; the part
    /// through the other tokens is the sum of the rows of `qkv`.
    pub padding: Tensor,
    /// Gradients of the position tables `[2 * window - 1, head dim]` along d, h and w.
    pub rel_pos: [Tensor; 3],
}

/// Columns of one head in a row-major matrix.
#[derive(Clone, Copy)]
pub(super) struct Head {
    pub stride: usize,
    pub dim: usize,
}

impl Head {
    /// Rows of `t` from `row` on, channels from `c0`.
    pub fn of(self, t: &[f32], row: usize, c0: usize) -> Matrix {
        Matrix { data: t[row * self.stride + c0..].as_ptr(), row: self.stride, column: 1 }
    }

    /// Rows of `t` from `row` on, channels from `c0`, transposed.
    pub fn transposed(self, t: &[f32], row: usize, c0: usize) -> Matrix {
        Matrix { data: t[row * self.stride + c0..].as_ptr(), row: 1, column: self.stride }
    }
}
