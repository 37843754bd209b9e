//! The inputs and results of attention: weights, attended values, their windows, gradients.

use crate::device::cuda::Memory;
use crate::memory;
use crate::ops::linear::Matrix;
use crate::tensor::{Param, Tensor};
use std::sync::Arc;

/// The four projections of an attention layer; weights `[out, in]`, biases `[out]`.
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
    /// Heads that the projected width divides into.
    pub heads: usize,
}

/// The number of valid keys, if only a CUDA device knows it: an `int` in its memory. The rows after
/// them are padding.
pub type ValidKeys<'a> = Option<&'a Arc<Memory>>;

/// Weights of one attention layer of the image encoder, whose width is `dim`.
#[derive(Clone)]
pub struct VitWeights {
    /// `[3 * dim, dim]`, q then k then v, heads inside.
    pub qkv: (Param, Param),
    /// `[dim, dim]`.
    pub proj: (Param, Param),
    /// `[2 * window - 1, head dim]` along d, h and w.
    pub rel_pos: [Param; 3],
    /// Heads.
    pub heads: usize,
    /// Window edge; 0 attends over the whole grid.
    pub window: usize,
}

/// The attention between its projections. Rows are in window order, or on a CUDA device in the
/// grid's.
pub struct Attended {
    /// `[n * s³, 3 * dim]`.
    pub qkv: Tensor,
    /// `[n * s³, dim]`.
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
    /// Brings rows `[n * s³, c]` from its order to the grid's.
    pub fn to_grid(&self, rows: Tensor) -> Tensor {
        if self.gridded || self.windows.order.is_empty() {
            rows
        } else {
            self.windows.scatter(&rows)
        }
    }

    /// Brings rows `[n * s³, c]` from the grid's order to its own.
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

/// Gradients of the inputs of the image encoder's attention, from that of the attended values.
pub struct VitGrads {
    /// Gradient of the projected rows `[rows, 3 * dim]`, in the order of [`Attended::qkv`].
    pub qkv: Tensor,
    /// Gradient of the projection's bias `[3 * dim]`, through the padded tokens alone.
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
