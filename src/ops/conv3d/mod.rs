//! 3×3×3 convolution, stride 1, zero padding 1.
//!
//! `y[n, p, o] = b[o] + Σ_{t, c} w[o, c, t] x[n, p + t, c]`, with whatever stands in front of it in
//! the network applied while its input is loaded ([`Input`]) and the sums that an instance norm
//! behind it needs taken while its output is stored.

mod cpu;
pub(crate) mod cuda;
pub mod grad;
pub(crate) mod place;
mod pool;
mod sums;
pub(crate) mod tile;
mod weights;
pub(crate) mod winograd;

pub(crate) use cpu::Rows;
pub(crate) use pool::pooled;
pub(crate) use sums::{Target, groups};
pub use weights::PackedConv;
pub(crate) use weights::{Packed, Packer};

use self::place::OpInput;
use super::norm::{ChannelNorm, Sums};
use crate::device::{Cpu, Device};
use crate::tensor::{OpError, Tensor};

/// A map as its producer left it, and what the reader does to each value on the way in.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// `[n, d, h, w, c]`.
    pub map: &'a Tensor,
    /// An instance norm and leaky ReLU to apply.
    pub norm: Option<&'a ChannelNorm>,
    /// A map to add after that, of the same shape.
    pub add: Option<&'a Tensor>,
    /// Whether to take the maximum over 2×2×2 voxels after that.
    pub pool: bool,
}

/// The same of a map that its reader may overwrite, if nothing else holds it.
pub struct OwnedInput<'a> {
    /// `[n, d, h, w, c]`.
    pub map: Tensor,
    /// An instance norm and leaky ReLU to apply.
    pub norm: Option<&'a ChannelNorm>,
    /// A map to add after that, of the same shape.
    pub add: Option<&'a Tensor>,
}

impl OwnedInput<'_> {
    /// As an input that stays as it is.
    pub fn input(&self) -> Input<'_> {
        Input { norm: self.norm, add: self.add, ..Input::plain(&self.map) }
    }
}

impl<'a> Input<'a> {
    /// The map as it is.
    pub fn plain(map: &'a Tensor) -> Input<'a> {
        Input { map, norm: None, add: None, pool: false }
    }

    /// The map, normalised and activated on load.
    pub fn normed(map: &'a Tensor, norm: &'a ChannelNorm) -> Input<'a> {
        Input { norm: Some(norm), ..Input::plain(map) }
    }

    /// The map to read in its place, of `extent`, where it is to be pooled.
    pub(crate) fn pooled(&self, cpu: &Cpu, extent: [usize; 5]) -> Option<Tensor> {
        self.pool.then(|| pooled(cpu, self, extent))
    }

    /// `[n, d, h, w, c]` as the op behind sees it, after checking that the parts fit.
    pub(crate) fn extent(&self, op: &'static str) -> Result<[usize; 5], OpError> {
        let [n, mut d, mut h, mut w, c] = self.map.map5(op, "x")?;
        if let Some(norm) = self.norm {
            norm.check(op, n, c)?;
        }
        if let Some(add) = self.add {
            add.expect_shape(op, "the map added to x", self.map.shape())?;
        }
        if self.pool {
            if d % 2 + h % 2 + w % 2 != 0 {
                return Err(self.map.shape_error(op, "x", "even spatial axes, to be pooled by 2"));
            }
            (d, h, w) = (d / 2, h / 2, w / 2);
        }
        if n * d * h * w * c == 0 {
            return Err(self.map.shape_error(op, "x", "no empty axis"));
        }
        Ok([n, d, h, w, c])
    }
}

/// Convolves `x` `[n, d, h, w, in]` to `[n, d, h, w, out]`; with `sums`, also the per-channel sums
/// of the result.
pub fn conv3d(
    device: &Device,
    x: Input,
    conv: &PackedConv,
    sums: bool,
) -> Result<(Tensor, Option<Sums>), OpError> {
    let extent = x.extent("conv3d")?;
    if extent[4] != conv.in_channels() {
        let expected =
            format!("[n, d, h, w, {}], for weights {:?}", conv.in_channels(), conv.weight_shape());
        return Err(x.map.shape_error("conv3d", "x", expected));
    }
    match device {
        Device::Cpu(cpu) => {
            conv.check_layout("conv3d", cpu)?;
            let pooled = x.pooled(cpu, extent);
            let x = pooled.as_ref().map_or(x, Input::plain);
            let (map, sums, _) = cpu::conv3d(cpu, OpInput::Borrowed(x), extent, conv, sums, None);
            Ok((map, sums))
        }
        Device::Cuda(cuda) => cuda::conv3d(cuda, x, extent, conv, sums),
    }
}

/// The same of a map that is not needed any more: on the CPU the result may take its memory. With
/// `pool`, the weight of an instance norm behind it, there may be a third map: of each 2×2×2 voxels
/// the value that norm and leaky ReLU will make the largest, which is the smallest where the weight
/// is negative.
pub fn conv3d_inplace(
    device: &Device,
    x: OwnedInput,
    conv: &PackedConv,
    sums: bool,
    pool: Option<&Tensor>,
) -> Result<(Tensor, Option<Sums>, Option<Tensor>), OpError> {
    let extent = x.input().extent("conv3d")?;
    if let Some(weight) = pool {
        weight.expect_shape("conv3d", "norm weight", &[conv.out_channels()])?;
    }
    let alone = |(map, sums)| (map, sums, None);
    match device {
        Device::Cpu(cpu) if extent[4] == conv.in_channels() => {
            conv.check_layout("conv3d", cpu)?;
            let signs: Option<Vec<f32>> =
                pool.map(|weight| weight.data().iter().map(|w| 1f32.copysign(*w)).collect());
            match x.map.into_buffer() {
                Ok(buffer) => Ok(cpu::conv3d(
                    cpu,
                    OpInput::Owned(buffer, x.norm, x.add),
                    extent,
                    conv,
                    sums,
                    signs.as_deref(),
                )),
                Err(map) => conv3d(device, OwnedInput { map, ..x }.input(), conv, sums).map(alone),
            }
        }
        _ => conv3d(device, x.input(), conv, sums).map(alone),
    }
}
