//! Parts that several places of the network share: convolution with norm, channel LayerNorm, small dense stacks.

use super::weights::Weights;
use crate::device::Device;
use crate::ops::conv3d::{Input, PackedConv, conv3d};
use crate::ops::linear::{Activation, linear};
use crate::ops::norm::{ChannelNorm, Sums, layer_norm};
use crate::tensor::{OpError, Tensor};

/// Negative slope of the network's leaky ReLUs.
const SLOPE: f32 = 0.1;
/// Added to the variance by instance norms, and by layer norms of the two-way transformer.
pub const EPS: f64 = 1e-5;
/// Added to the variance by the layer norms of the image encoder and of the dense prompt.
pub const ENCODER_EPS: f32 = 1e-6;

/// A map before its norm, with the norm its reader applies.
pub struct Normed {
    /// `[n, d, h, w, c]`.
    pub map: Tensor,
    /// Instance norm and leaky ReLU.
    pub norm: ChannelNorm,
}

impl Normed {
    /// As an op's input.
    pub fn input(&self) -> Input<'_> {
        Input::normed(&self.map, &self.norm)
    }

    /// The map itself, written out.
    pub fn value(&self, device: &Device) -> Result<Tensor, OpError> {
        crate::ops::norm::apply(device, &self.map, &self.norm, None)
    }
}

/// Instance norm's weight and bias.
pub struct InstanceNorm(Tensor, Tensor);

impl InstanceNorm {
    pub fn load(w: &Weights, at: &str) -> InstanceNorm {
        InstanceNorm(w.get(&format!("{at}.weight")), w.get(&format!("{at}.bias")))
    }

    /// Attaches the norm over `sums` to a map.
    pub fn over(&self, map: Tensor, sums: &Sums) -> Result<Normed, OpError> {
        let norm = sums.instance_norm(&self.0, &self.1, EPS, SLOPE)?;
        Ok(Normed { map, norm })
    }
}

/// 3×3×3 convolution, instance norm, leaky ReLU.
pub struct ConvNorm {
    conv: PackedConv,
    norm: InstanceNorm,
}

impl ConvNorm {
    /// Loads `{at}.conv` and `{at}.adn.N`.
    pub fn load(device: &Device, w: &Weights, at: &str) -> Result<ConvNorm, OpError> {
        let weight = w.get(&format!("{at}.conv.weight"));
        let bias = w.get(&format!("{at}.conv.bias"));
        let inputs = weight.shape()[1];
        let conv = PackedConv::new(device.cpu(), &weight, 0..inputs, Some(&bias))?;
        Ok(ConvNorm { conv, norm: InstanceNorm::load(w, &format!("{at}.adn.N")) })
    }

    pub fn run(&self, device: &Device, x: Input) -> Result<Normed, OpError> {
        let (map, sums) = conv3d(device, x, &self.conv, true)?;
        self.norm.over(map, &sums.expect("sums were asked for"))
    }

    pub fn bytes(&self) -> usize {
        self.conv.bytes()
    }
}

/// A layer norm's weight and bias.
pub struct LayerNorm {
    pub weight: Tensor,
    pub bias: Tensor,
    pub eps: f32,
}

impl LayerNorm {
    pub fn load(w: &Weights, at: &str, eps: f32) -> LayerNorm {
        LayerNorm { weight: w.get(&format!("{at}.weight")), bias: w.get(&format!("{at}.bias")), eps }
    }

    pub fn run(&self, device: &Device, x: &Tensor) -> Result<Tensor, OpError> {
        layer_norm(device, x, &self.weight, &self.bias, self.eps, false)
    }

    /// The norm, then GELU.
    pub fn gelu(&self, device: &Device, x: &Tensor) -> Result<Tensor, OpError> {
        layer_norm(device, x, &self.weight, &self.bias, self.eps, true)
    }
}

/// A dense layer's weight and bias.
pub struct Linear(pub Tensor, pub Tensor);

impl Linear {
    pub fn load(w: &Weights, at: &str) -> Linear {
        Linear(w.get(&format!("{at}.weight")), w.get(&format!("{at}.bias")))
    }

    pub fn run(&self, device: &Device, x: &Tensor, act: Activation, residual: Option<&Tensor>) -> Result<Tensor, OpError> {
        linear(device, x, &self.0, Some(&self.1), act, residual)
    }
}

/// Dense layers with ReLU between them.
pub struct Mlp(Vec<Linear>);

impl Mlp {
    /// Loads `{at}.layers.0` to `.2`.
    pub fn load(w: &Weights, at: &str) -> Mlp {
        Mlp((0..3).map(|i| Linear::load(w, &format!("{at}.layers.{i}"))).collect())
    }

    pub fn run(&self, device: &Device, x: &Tensor) -> Result<Tensor, OpError> {
        let last = self.0.len() - 1;
        self.0.iter().enumerate().try_fold(x.clone(), |x, (i, layer)| {
            let act = if i == last { Activation::None } else { Activation::Relu };
            layer.run(device, &x, act, None)
        })
    }
}

/// Receives the network's intermediate results by name, for verification and debugging; costs nothing when absent.
pub struct Observer<'a>(Option<Seen<'a>>);

/// What an observer calls.
type Seen<'a> = &'a mut dyn FnMut(&str, &Tensor);

impl<'a> Observer<'a> {
    /// Nobody watches.
    pub fn none() -> Observer<'a> {
        Observer(None)
    }

    /// Calls `f(name, tensor)` for every stage; maps are channels last.
    pub fn new(f: &'a mut dyn FnMut(&str, &Tensor)) -> Observer<'a> {
        Observer(Some(f))
    }

    pub(super) fn see(&mut self, name: &str, value: impl FnOnce() -> Result<Tensor, OpError>) -> Result<(), OpError> {
        if let Some(f) = &mut self.0 {
            f(name, &value()?);
        }
        Ok(())
    }
}
