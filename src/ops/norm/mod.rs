//! Normalisation: instance norm (Ulyanov et al. 2016) as a per-channel scale and shift that the
//! next op applies on load, and layer norm over channels (Ba et al. 2016).

mod cpu;
pub(crate) mod cuda;
pub mod grad;

use crate::device::Device;
use crate::device::cuda::Memory;
use crate::microkernel::item_norm::ItemNorm;
use crate::ops::reduce::added;
use crate::tensor::{OpError, Tensor};
pub(crate) use cpu::add_row;
use std::sync::Arc;

/// Sums of a map's values and of their squares per item and channel, in float64: what an instance
/// norm is made of. They are kept where they were computed.
#[derive(Clone)]
pub struct Sums {
    source: Source,
    /// `[n * c]`.
    channels: usize,
    /// Voxels that were summed.
    count: f64,
}

#[derive(Clone)]
enum Source {
    /// `[n * c][value, square]`.
    Host(Vec<[f64; 2]>),
    /// `[n][tiles][c][value, square]`, not added up yet.
    Device { partial: Arc<Memory>, tiles: usize },
}

impl Sums {
    /// Adds up per-tile partial sums `[n][tiles][c][2]` in tile order, whichever kernel computed
    /// them.
    pub(crate) fn reduce(partial: &[f64], n: usize, c: usize, count: f64) -> Sums {
        let mut values = vec![[0.0; 2]; n * c];
        let per_item = partial.len() / n;
        for (item, part) in partial.chunks_exact(per_item).enumerate() {
            for tile in part.chunks_exact(c * 2) {
                for (v, t) in values[item * c..].iter_mut().zip(tile.chunks_exact(2)) {
                    v[0] += t[0];
                    v[1] += t[1];
                }
            }
        }
        Sums { source: Source::Host(values), channels: n * c, count }
    }

    /// Partial sums `[n][tiles][c][2]` in device memory.
    pub(crate) fn on_device(
        partial: Arc<Memory>,
        tiles: usize,
        channels: usize,
        count: f64,
    ) -> Sums {
        Sums { source: Source::Device { partial, tiles }, channels, count }
    }

    /// The instance norm of the map, as its reader applies it:
    /// `(x - mean) / sqrt(var + eps) * weight + bias`, then a leaky ReLU of negative slope `slope`,
    /// 1 for none.
    ///
    /// `weight` and `bias` are `[c]`; `var` is the variance without Bessel's correction.
    ///
    /// # Errors
    /// The number of channels does not fit, or the device fails.
    pub fn instance_norm(
        &self,
        weight: &Tensor,
        bias: &Tensor,
        eps: f64,
        slope: f32,
    ) -> Result<ChannelNorm, OpError> {
        let c = weight.len();
        if c == 0 || !self.channels.is_multiple_of(c) {
            return Err(weight.shape_error(
                "instance_norm",
                "weight",
                format!("[c] with n * c = {}", self.channels),
            ));
        }
        bias.expect_shape("instance_norm", "bias", weight.shape())?;
        let values = match &self.source {
            Source::Host(values) => values,
            Source::Device { partial, tiles } => {
                return cuda::coefficients(partial, *tiles, self, weight, bias, eps, slope);
            }
        };
        let (mut channels, mut deviations) = (vec![], vec![]);
        for (i, [sum, squares]) in values.iter().enumerate() {
            let mean = sum / self.count;
            let variance = (squares / self.count - mean * mean).max(0.0);
            let deviation = 1.0 / (variance + eps).sqrt();
            let scale = weight.data()[i % c] as f64 * deviation;
            // What rounding the mean leaves out is added to the shift.
            let near = mean as f32;
            let shift = bias.data()[i % c] as f64 - (mean - near as f64) * scale;
            channels.extend([near, scale as f32, shift as f32]);
            deviations.extend([deviation as f32, ((near as f64 - mean) * deviation) as f32]);
        }
        let (channels, deviation) = (
            Tensor::new([self.channels, 3], channels),
            Tensor::new([self.channels, 2], deviations),
        );
        Ok(ChannelNorm { channels, deviation, slope })
    }
}

/// An instance norm with its leaky ReLU, to be applied by the op that reads the map:
/// `(x - mean) * scale + shift` with coefficients per item and channel, then the leaky ReLU.
///
/// The mean is subtracted first because a convolution's channels can be far from zero:
/// `x * scale + shift` would cancel.
#[derive(Clone, Debug)]
pub struct ChannelNorm {
    /// `[n * c, 3]`: mean, scale, shift.
    channels: Tensor,
    /// `[n * c, 2]`: inverse standard deviation, and what rounding the mean adds to the
    /// standardised value, which the gradient needs.
    deviation: Tensor,
    slope: f32,
}

impl ChannelNorm {
    /// `[n * c, 3]`: mean, scale, shift.
    pub(crate) fn coefficients(&self) -> &Tensor {
        &self.channels
    }

    /// The leaky ReLU's negative slope; 1 for none.
    pub(crate) fn slope(&self) -> f32 {
        self.slope
    }

    /// The coefficients of item `n` of `c` channels.
    pub(crate) fn item(&self, n: usize, c: usize) -> ItemNorm {
        let part = &self.channels.data()[n * c * 3..][..c * 3];
        let column = |i: usize| part.iter().skip(i).step_by(3).copied().collect();
        ItemNorm { mean: column(0), scale: column(1), shift: column(2), slope: self.slope }
    }

    /// An error unless it belongs to `n` items of `c` channels.
    pub(crate) fn check(&self, op: &'static str, n: usize, c: usize) -> Result<(), OpError> {
        let (got, expected) =
            (vec![self.channels.rows()], format!("[{n} * {c}], for x [{n}, .., {c}]"));
        if self.channels.rows() == n * c {
            Ok(())
        } else {
            Err(OpError::Shape { op, what: "the norm of x", got, expected })
        }
    }
}

/// The [`Sums`] of a map `[n, ..., c]`, for maps whose convolution did not compute them.
pub fn sums(device: &Device, x: &Tensor) -> Result<Sums, OpError> {
    if x.is_empty() || x.shape().len() < 2 {
        return Err(x.shape_error("instance_norm", "x", "[n, ..., c], no empty axis"));
    }
    match device {
        Device::Cpu(cpu) => Ok(cpu::sums(cpu, x)),
        Device::Cuda(cuda) => cuda::sums(cuda, x),
    }
}

/// The sums of `x` `[..., c]` over all axes but the last, `[c]`.
pub fn totals(device: &Device, x: &Tensor) -> Result<Tensor, OpError> {
    totals_onto(device, x, None)
}

/// Adds the sums that [`totals`] computes to the sums so far, if there are any, and returns the
/// result, which may use their memory.
pub fn totals_onto(device: &Device, x: &Tensor, so_far: Option<Tensor>) -> Result<Tensor, OpError> {
    let c = x.channels();
    if let Device::Cuda(cuda) = device {
        return cuda::totals_of(cuda, x, so_far);
    }
    let rows = x.reshape([1, x.len().checked_div(c).unwrap_or(0), c]);
    match cpu::sums(device.cpu(), &rows).source {
        Source::Host(values) => {
            let sums: Vec<f32> = values.iter().map(|v| v[0] as f32).collect();
            Ok(added(device.cpu(), so_far, sums.into()))
        }
        Source::Device { .. } => unreachable!("the CPU's sums lie on the host"),
    }
}

/// The map `x` `[n, ..., c]` with its norm and leaky ReLU applied, plus `add`, of the same shape,
/// if given.
///
/// Ops that read a map as a [`ConvInput`](super::conv3d::ConvInput) apply its norm themselves.
pub fn apply(
    device: &Device,
    x: &Tensor,
    norm: &ChannelNorm,
    add: Option<&Tensor>,
) -> Result<Tensor, OpError> {
    let (n, c) = (x.shape().first().copied().unwrap_or(0), x.channels());
    norm.check("channel_norm", n, c)?;
    if let Some(add) = add {
        add.expect_shape("channel_norm", "the map added to x", x.shape())?;
    }
    match device {
        Device::Cpu(cpu) => Ok(cpu::apply(cpu, x, norm, add)),
        Device::Cuda(cuda) => cuda::apply(cuda, x, norm, add),
    }
}

/// Layer norm over the last axis: `(x - mean) / sqrt(var + eps) * weight + bias`, then GELU if
/// `gelu` is set.
///
/// `x` is `[..., c]`, `weight` and `bias` `[c]`. On a map, whose channels are last, it normalises
/// the channels of each voxel.
pub fn layer_norm(
    device: &Device,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f32,
    gelu: bool,
) -> Result<Tensor, OpError> {
    let c = x.channels();
    if x.is_empty() {
        return Err(x.shape_error("layer_norm", "x", "[..., c], no empty axis"));
    }
    for (what, t) in [("weight", weight), ("bias", bias)] {
        t.expect_shape("layer_norm", what, &[c])?;
    }
    match device {
        Device::Cpu(cpu) => Ok(cpu::layer_norm(cpu, x, weight.data(), bias.data(), eps, gelu)),
        Device::Cuda(cuda) => cuda::layer_norm(cuda, x, Some((weight, bias, eps)), gelu, None),
    }
}

pub(crate) use cpu::layer_norm_rows;
