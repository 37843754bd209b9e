//! Dense layers and attention of a few tokens, fused with the ops before and after them.
//!
//! On a CUDA device a launch of so little work takes longer than the work; here each is one launch.
//! The functions return none if `device` has no such launch, as the CPU, or not for these sizes:
//! then the separate ops give the same result, but for rounding.

mod cuda;

use super::attention::ValidKeys;
use super::linear::Activation;
use crate::device::Device;
use crate::tensor::{OpError, Tensor};

/// The smallest number of tokens that recordings are made for; the others are this number doubled
/// repeatedly.
pub(crate) const LEAST_TOKENS: usize = 16;

/// A number of tokens, rounded up to one that recordings are made for. What depends on the number
/// of tokens depends on this, so that unrecorded work gives the same bits.
pub(crate) fn bucket(tokens: usize) -> usize {
    tokens.next_power_of_two().max(LEAST_TOKENS)
}

/// The input of [`linears`]: rows of tokens, with a layer norm to apply, and something to add for
/// some layers.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// The rows, `[t, c]`.
    pub x: &'a Tensor,
    /// The weight `[c]`, bias `[c]` and epsilon of a layer norm to apply to them.
    pub norm: Option<(&'a Tensor, &'a Tensor, f32)>,
    /// What is added after the norm for layers that are [`added`](Layer::added), `[t, c]`.
    pub add: Option<&'a Tensor>,
}

/// A dense layer of [`linears`].
#[derive(Clone, Copy)]
pub struct Layer<'a> {
    /// The weight, `[n, c]`.
    pub weight: &'a Tensor,
    /// The bias, `[n]`.
    pub bias: &'a Tensor,
    /// Whether [`Rows::add`] is added to its input.
    pub added: bool,
}

/// Several dense layers of the same rows, with the same number `n` of outputs:
/// `activation(input wᵀ + b) + residual` of each, `[t, n]`.
///
/// The input is the rows after their norm, plus [`Rows::add`] for some layers. Also returned are
/// the rows after their norm, without the addition.
pub fn linears(
    device: &Device,
    rows: Rows,
    layers: &[Layer],
    activation: Activation,
    residual: Option<&Tensor>,
) -> Result<Option<(Vec<Tensor>, Tensor)>, OpError> {
    match device {
        Device::Cpu(_) => Ok(None),
        Device::Cuda(cuda) => cuda::linears(cuda, rows, layers, activation, residual),
    }
}

/// Attention as of [`attend_heads`](super::attention::attend_heads), and the dense layer after it
/// with its residual: `attended wᵀ + b + residual`.
///
/// `q` is `[t, width]`, `k` and `v` `[m, width]`, `weight` `[c, width]`, `bias` `[c]`. Gives
/// `[t, c]`.
pub fn attention(
    device: &Device,
    heads: usize,
    [q, k, v]: [&Tensor; 3],
    valid: ValidKeys,
    (weight, bias): (&Tensor, &Tensor),
    residual: Option<&Tensor>,
) -> Result<Option<Tensor>, OpError> {
    match device {
        Device::Cpu(_) => Ok(None),
        Device::Cuda(cuda) => {
            cuda::attention(cuda, heads, [q, k, v], valid, (weight, bias), residual)
        }
    }
}

/// Several dense layers of one row each: `activation(row wᵀ + b)`, `[1, n]`, of a row `[1, c]`, a
/// weight `[n, c]` and a bias `[n]`.
pub fn row_linears(
    device: &Device,
    layers: &[(&Tensor, &Tensor, &Tensor)],
    activation: Activation,
) -> Result<Option<Vec<Tensor>>, OpError> {
    match device {
        Device::Cpu(_) => Ok(None),
        Device::Cuda(cuda) => cuda::row_linears(cuda, layers, activation),
    }
}
