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
//!
//! On the CPU, layers of many channels are computed by minimal filtering (Winograd's algorithms;
//! Lavin and Gray 2016), others directly; on CUDA devices all are computed directly.
//!
//! ```
//! use prism::Device;
//! use prism::ops::conv3d::{ConvInput, Epilogue, PackedConv, conv3d};
//! use prism::tensor::Tensor;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::open("cpu", 1)?;
//! let x = Tensor::new([1, 4, 4, 4, 1], vec![1.0; 64]);
//! let weight = Tensor::new([2, 1, 3, 3, 3], vec![0.5; 54]);
//! let conv = PackedConv::new(device.cpu(), &weight, 0..1, None)?;
//! let y = conv3d(&device, ConvInput::shared(&x), &conv, Epilogue::NONE)?.map;
//! assert_eq!(y.shape(), [1, 4, 4, 4, 2]);
//! # Ok(())
//! # }
//! ```

mod cpu;
pub(crate) mod cuda;
pub mod grad;
pub(crate) mod place;
mod pool;
mod rolling;
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
/// An op that takes a `ConvInput` by value takes over its handle of the map. If that is the last
/// one ([`ConvInput::owned`]), the output may use the map's memory, as it does on the CPU if there
/// is room; a map that has other handles ([`ConvInput::shared`]) stays as it is. The values of the
/// output are the same either way.
#[derive(Clone)]
pub struct ConvInput {
    /// The map, `[n, d, h, w, c]`.
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
    /// Whether to take the maximum over 2×2×2 voxels, stride 2: then d, h and w are even.
    pub max_pool: bool,
}

/// What to compute about a convolution's output as it is stored.
#[derive(Clone, Copy)]
pub struct Epilogue<'a> {
    /// Whether to compute the sums that a following instance norm needs.
    pub sums: bool,
    /// The weight `[out]` of that norm, if its reader pools: then the pooled map is computed too,
    /// before the norm. It has of each 2×2×2 voxels the value that will be the largest after norm
    /// and leaky ReLU: the largest, or in channels with a negative weight the smallest.
    pub pool: Option<&'a Tensor>,
}

impl Epilogue<'_> {
    /// Computes nothing.
    pub const NONE: Epilogue<'static> = Epilogue { sums: false, pool: None };
    /// Computes only the sums.
    pub const SUMS: Epilogue<'static> = Epilogue { sums: true, pool: None };
}

/// A convolution's map and the results of its [`Epilogue`].
///
/// `M` is a [`Tensor`], or on a [tape](crate::autograd::Tape) a [`Var`](crate::autograd::Var).
pub struct ConvOutput<M = Tensor> {
    /// The map, `[n, d, h, w, out]`.
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
    /// The input that is a map as it is; other handles of it remain, so it is not overwritten.
    pub fn shared(map: &Tensor) -> ConvInput {
        ConvInput::owned(map.clone())
    }

    /// The input that is a map as it is, given away: the output may use its memory, unless there is
    /// another handle of it.
    pub fn owned(map: Tensor) -> ConvInput {
        ConvInput { map, prologue: Prologue::default() }
    }

    /// This input, with an instance norm and leaky ReLU applied on load.
    pub fn normed(mut self, norm: &ChannelNorm) -> ConvInput {
        self.prologue.norm = Some(norm.clone());
        self
    }

    /// This input with a map added after norm and activation, if one is given.
    pub fn plus(mut self, add: Option<&Tensor>) -> ConvInput {
        self.prologue.add = add.cloned();
        self
    }

    /// This input, with the maximum of each 2×2×2 voxels taken after norm and addition.
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

/// Convolves `x` `[n, d, h, w, in]`, after its prologue, to `[n, d, h, w, out]`.
///
/// The pooled map of the epilogue may be left out: see [`ConvOutput::pooled`].
///
/// # Errors
/// [`OpError::Shape`] if `x`, its prologue or the epilogue's weight do not fit;
/// [`OpError::Argument`] if the weights were packed for another instruction set; the device fails.
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
