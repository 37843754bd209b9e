//! Dense layers: `y = act(x wᵀ + b) + residual`.

mod cpu;
mod cuda;
pub mod grad;

use super::norm::layer_norm;
use crate::device::Device;
use crate::tensor::{OpError, Tensor};

pub(crate) use cpu::{Layer, Matrix, linear_to, matmul};

/// The function that a dense layer applies to its sums of products and bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// The identity.
    None,
    /// GELU by the error function, `x Φ(x)`, without the tanh approximation (Hendrycks and Gimpel
    /// 2016).
    Gelu,
    /// ReLU, `max(x, 0)`.
    Relu,
}

/// A dense layer: `activation(x wᵀ + b) + residual`.
///
/// `x` is `[..., in]`, `weight` `[out, in]` (further axes of length 1 are allowed, as a 1×1×1
/// convolution has), `bias` `[out]`, `residual` `[..., out]`. Gives `[..., out]`.
///
/// # Errors
/// Shapes do not fit or are empty, or a weight in a file cannot be read.
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

/// The MLP of a transformer block with its norm and residual:
/// `gelu(norm(x) w₁ᵀ + b₁) w₂ᵀ + b₂ + x`.
///
/// `x` is `[..., c]`; `norm` is a layer norm's weight `[c]`, bias `[c]` and epsilon; `first` is a
/// weight `[hidden, c]` and a bias `[hidden]`, `second` `[c, hidden]` and `[c]`. Gives `[..., c]`.
///
/// # Errors
/// As [`linear`].
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
