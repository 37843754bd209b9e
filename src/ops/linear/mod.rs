//! Dense layers: `y = act(x wᵀ + b) + residual`.

mod cpu;
mod cuda;
pub mod grad;

use super::norm::layer_norm;
use crate::device::Device;
use crate::tensor::{OpError, Tensor};

pub(crate) use cpu::{Layer, Matrix, linear_to, matmul};

/// What follows the sum of products and bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    None,
    /// The exact-erf GELU.
    Gelu,
    /// `max(x, 0)`.
    Relu,
}

/// A dense layer, `act(x wᵀ + b) + residual`: `x` `[..., in]`, `weight` `[out, in]` (further axes
/// of length 1 are allowed: a 1×1×1 convolution), `bias` `[out]`, `residual` `[..., out]`. Gives
/// `[..., out]`.
pub fn linear(
    device: &Device,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    residual: Option<&Tensor>,
) -> Result<Tensor, OpError> {
    let (out, inputs) = (weight.shape().first().copied().unwrap_or(0), x.channels());
    if weight.shape().len() < 2 || weight.len() != out * inputs || weight.is_empty() || x.is_empty()
    {
        return Err(weight.shape_error(
            "linear",
            "weight",
            format!("[out, {inputs}], for x {:?}", x.shape()),
        ));
    }
    if let Some(bias) = bias {
        bias.expect_shape("linear", "bias", &[out])?;
    }
    let mut shape = x.shape().to_vec();
    *shape.last_mut().expect("x has an axis: it has channels") = out;
    if let Some(residual) = residual
        && residual.len() != x.rows() * out
    {
        return Err(residual.shape_error("linear", "residual", format!("{shape:?}")));
    }
    match device {
        Device::Cpu(cpu) => {
            let weight = &weight.at_hand(cpu)?;
            Ok(Tensor::from_buffer(
                shape,
                cpu::linear(cpu, x, Layer { weight, bias, activation }, residual),
            ))
        }
        Device::Cuda(cuda) => cuda::linear(cuda, shape, x, weight, bias, activation, residual),
    }
}

/// A transformer's two layers: `gelu(norm(x) w₁ᵀ + b₁) w₂ᵀ + b₂ + x`, with a layer norm's weight,
/// bias and epsilon. `x` `[..., c]`, `first` `[hidden, c]` and `[hidden]`, `second` `[c, hidden]`
/// and `[c]`.
pub fn mlp(
    device: &Device,
    x: &Tensor,
    norm: (&Tensor, &Tensor, f32),
    first: (&Tensor, &Tensor),
    second: (&Tensor, &Tensor),
) -> Result<Tensor, OpError> {
    if let Device::Cpu(cpu) = device
        && x.rows() > 0
    {
        const OP: &str = "mlp";
        let (c, hidden) = (x.channels(), first.1.len());
        for (what, t, shape) in [
            ("norm's weight", norm.0, &[c][..]),
            ("norm's bias", norm.1, &[c]),
            ("first weight", first.0, &[hidden, c]),
            ("first bias", first.1, &[hidden]),
            ("second weight", second.0, &[c, hidden]),
            ("second bias", second.1, &[c]),
        ] {
            t.expect_shape(OP, what, shape)?;
        }
        let layers = [(first, Activation::Gelu), (second, Activation::None)]
            .map(|((weight, bias), activation)| Layer { weight, bias: Some(bias), activation });
        if cpu::can_fuse_mlp(cpu, layers) {
            let weights = [first.0.at_hand(cpu)?, second.0.at_hand(cpu)?];
            let layers = [
                Layer { weight: &weights[0], ..layers[0] },
                Layer { weight: &weights[1], ..layers[1] },
            ];
            return Ok(Tensor::from_buffer(x.shape(), cpu::mlp(cpu, x, norm, layers, x)));
        }
    }
    let normed = layer_norm(device, x, norm.0, norm.1, norm.2, false)?;
    let hidden = linear(device, &normed, first.0, Some(first.1), Activation::Gelu, None)?;
    linear(device, &hidden, second.0, Some(second.1), Activation::None, Some(x))
}
