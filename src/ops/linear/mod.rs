//! Dense layers: `y = act(x wᵀ + b) + residual`.

mod cpu;
mod cuda;
pub mod grad;

use crate::device::Device;
use crate::tensor::{OpError, Tensor};

pub(crate) use cpu::{Matrix, matmul, pack_weights};

/// What follows the sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    None,
    /// The exact-erf GELU.
    Gelu,
    /// `max(x, 0)`.
    Relu,
}

/// `x` `[..., in]`, `weight` `[out, in]` (further axes of length 1 are allowed: a 1×1×1 convolution), `bias` `[out]`, `residual` `[..., out]`.
pub fn linear(
    device: &Device,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    residual: Option<&Tensor>,
) -> Result<Tensor, OpError> {
    let (out, inputs) = (weight.shape().first().copied().unwrap_or(0), x.channels());
    if weight.shape().len() < 2 || weight.len() != out * inputs || weight.is_empty() || x.is_empty() {
        return Err(weight.misfit("linear", "weight", format!("[out, {inputs}], for x {:?}", x.shape())));
    }
    if let Some(bias) = bias {
        bias.expect("linear", "bias", &[out])?;
    }
    let mut shape = x.shape().to_vec();
    *shape.last_mut().expect("x has an axis: it has channels") = out;
    if let Some(residual) = residual
        && residual.len() != x.rows() * out
    {
        return Err(residual.misfit("linear", "residual", format!("{shape:?}")));
    }
    match device {
        Device::Cpu(cpu) => Ok(Tensor::from_buffer(shape, cpu::linear(cpu, x, weight, bias, activation, residual))),
        Device::Cuda(cuda) => cuda::linear(cuda, shape, x, weight, bias, activation, residual),
    }
}
