//! 3×3×3 convolution, stride 1, zero padding 1.
//!
//! `y[n, p, o] = b[o] + Σ_{t, c} w[o, c, t] x[n, p + t, c]`, with the operations before it in the
//! network applied while its input is loaded ([`Prologue`]), and what the next op needs computed
//! while its output is stored ([`Epilogue`]).
//!
//! Maps have one type, [`ConvInput`], here and in the ops that load theirs as a convolution does
//! (decoder stages, gradients, pooling); the result is a [`ConvOutput`]. Other types are views
//! within a body: `tile::TileSource` is what tiles are loaded from, `OutputPlacement` in `place.rs`
//! decides whose memory the output takes.

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
pub(crate) use weights::{Packed, Packer, RawWeights};

use super::norm::{ChannelNorm, Sums};
use crate::device::{Cpu, Device};
use crate::tensor::{OpError, Tensor};

/// A map as its producer left it, with the operations that its reader applies to each value on
/// load.
///
/// Tensors are handles, and an op that takes a `ConvInput` by value takes the map's. If that is the
/// last one ([`ConvInput::owned`]), the output may take the map's memory, as it does on the CPU if
/// there is room; a map that something else holds ([`ConvInput::shared`]) stays as it is. The
/// values of the output are the same either way.
#[derive(Clone)]
pub struct ConvInput {
    /// `[n, d, h, w, c]`.
    pub map: Tensor,
    /// The operations on its values on load.
    pub prologue: Prologue,
}

/// The operations on a map's values as they are loaded, in the order of the fields.
#[derive(Clone, Default)]
pub struct Prologue {
    /// An instance norm and leaky ReLU to apply.
    pub norm: Option<ChannelNorm>,
    /// A map to add, of the same shape.
    pub add: Option<Tensor>,
    /// Whether to take the maximum over 2×2×2 voxels.
    pub max_pool: bool,
}

/// What to compute about a convolution's output as it is stored.
#[derive(Clone, Copy)]
pub struct Epilogue<'a> {
    /// Whether to compute the sums that a following instance norm needs.
    pub sums: bool,
    /// The weight `[out]` of that norm, if its reader pools: asks for the map of the voxel of each
    /// 2×2×2 that will be the largest after norm and leaky ReLU. That is the largest value before
    /// them, or the smallest if the weight is negative.
    pub pool: Option<&'a Tensor>,
}

impl Epilogue<'_> {
    /// Nothing is computed.
    pub const NONE: Epilogue<'static> = Epilogue { sums: false, pool: None };
    /// Only the sums are computed.
    pub const SUMS: Epilogue<'static> = Epilogue { sums: true, pool: None };
}

/// A convolution's map and the results of its [`Epilogue`]; `M` is a tensor, or on a tape a value
/// with its place there.
pub struct ConvOutput<M = Tensor> {
    /// `[n, d, h, w, out]`.
    pub map: M,
    /// The map's sums per item and channel, if they were asked for.
    pub sums: Option<Sums>,
    /// The pooled map `[n, d / 2, h / 2, w / 2, out]`, if it was asked for and the convolution ran
    /// in a way that computes it: by minimal filtering on the CPU. Otherwise the reader pools.
    pub pooled: Option<Tensor>,
}

impl Prologue {
    /// The leaky ReLU's negative slope; 1 if there is none.
    pub(crate) fn slope(&self) -> f32 {
        self.norm.as_ref().map_or(1.0, ChannelNorm::slope)
    }
}

impl ConvInput {
    /// A map that has other owners, and that stays as it is.
    pub fn shared(map: &Tensor) -> ConvInput {
        ConvInput::owned(map.clone())
    }

    /// A map that is given away, together with its memory unless there is another handle of it.
    pub fn owned(map: Tensor) -> ConvInput {
        ConvInput { map, prologue: Prologue::default() }
    }

    /// This input, normalised and activated on load.
    pub fn normed(mut self, norm: &ChannelNorm) -> ConvInput {
        self.prologue.norm = Some(norm.clone());
        self
    }

    /// This input with a map added after norm and activation, if one is given.
    pub fn plus(mut self, add: Option<&Tensor>) -> ConvInput {
        self.prologue.add = add.cloned();
        self
    }

    /// This input pooled after that: the maximum of each 2×2×2 voxels.
    pub fn max_pooled(mut self) -> ConvInput {
        self.prologue.max_pool = true;
        self
    }

    /// The map to load in its place, of `extent`, if it is to be pooled.
    pub(crate) fn pooled(&self, cpu: &Cpu, extent: [usize; 5]) -> Option<ConvInput> {
        self.prologue.max_pool.then(|| ConvInput::owned(pooled(cpu, self, extent)))
    }

    /// The shape `[n, d, h, w, c]` as the next op sees it, after checking that the parts fit.
    pub(crate) fn extent(&self, op: &'static str) -> Result<[usize; 5], OpError> {
        let [n, mut d, mut h, mut w, c] = self.map.map5(op, "x")?;
        if let Some(norm) = &self.prologue.norm {
            norm.check(op, n, c)?;
        }
        if let Some(add) = &self.prologue.add {
            add.expect_shape(op, "the map added to x", self.map.shape())?;
        }
        if self.prologue.max_pool {
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

/// Convolves `x` `[n, d, h, w, in]` to `[n, d, h, w, out]`. The epilogue's pooled map is computed
/// only on the CPU, and not by every body.
pub fn conv3d(
    device: &Device,
    x: ConvInput,
    conv: &PackedConv,
    epilogue: Epilogue,
) -> Result<ConvOutput, OpError> {
    let extent = x.extent("conv3d")?;
    if extent[4] != conv.in_channels() {
        let expected =
            format!("[n, d, h, w, {}], for weights {:?}", conv.in_channels(), conv.weight_shape());
        return Err(x.map.shape_error("conv3d", "x", expected));
    }
    if let Some(weight) = epilogue.pool {
        weight.expect_shape("conv3d", "norm weight", &[conv.out_channels()])?;
    }
    match device {
        Device::Cpu(cpu) => {
            conv.check_layout("conv3d", cpu)?;
            conv.fetch()?;
            let x = x.pooled(cpu, extent).unwrap_or(x);
            Ok(cpu::conv3d(cpu, x, extent, conv, epilogue))
        }
        Device::Cuda(cuda) => cuda::conv3d(cuda, &x, extent, conv, epilogue.sums),
    }
}
