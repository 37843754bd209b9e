//! Dense layers and attention of the few rows of tokens, fused with the ops before and after them.
//! On a CUDA device a launch of so little work takes longer than the work: here each is one launch.
//! The functions return none if a device has no such launch, or not for these sizes: then the
//! separate ops give the same result.

mod cuda;

use super::attention::ValidKeys;
use super::linear::Activation;
use crate::device::Device;
use crate::tensor::{OpError, Tensor};

/// The input rows of dense layers: `x` `[t, c]`, after a layer norm if its weight, bias and epsilon
/// are given, and for the layers that want it the sum with `add` `[t, c]`.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// The rows themselves.
    pub x: &'a Tensor,
    /// The norm's weight, bias and epsilon.
    pub norm: Option<(&'a Tensor, &'a Tensor, f32)>,
    /// What is added for some layers.
    pub add: Option<&'a Tensor>,
}

/// A dense layer, `weight` `[n, c]` and `bias` `[n]`, and whether it takes the sum.
#[derive(Clone, Copy)]
pub struct Layer<'a> {
    /// `[n, c]`.
    pub weight: &'a Tensor,
    /// `[n]`.
    pub bias: &'a Tensor,
    /// Whether its input is the sum.
    pub added: bool,
}

/// Layers of the same rows and with the same number of outputs: `act(rows wᵀ + b) + residual` of
/// each, and the rows before the sum.
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

/// Softmax attention of projected `q` `[t, width]` to keys `k` `[m, width]` with values `v`
/// `[m, width]`, each head in its own channels, and the dense layer after it with its residual.
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

/// Dense layers of one row each: `act(row wᵀ + b)`, of `row` `[1, c]`, weight `[n, c]` and bias
/// `[n]`.
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
