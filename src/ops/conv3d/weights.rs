//! A convolution's weights: as they were given, and in the layout of each body, made when first
//! needed.

use super::tile::Tiling;
use crate::device::cuda::{DeviceCache, Memory};
use crate::device::profile::OpCost;
use crate::device::{Buffer, Cpu, Cuda, DType};
use crate::microkernel::pack::packed_bf16_pairs;
use crate::microkernel::strip::{self, Kernels};
use crate::tensor::{OpError, Tensor};
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::{Arc, OnceLock};

/// Weights of one block of output channels that a strip streams through: small enough to stay in
/// the second-level cache.
const WEIGHT_BUDGET: usize = 64 << 10;

/// A convolution's weights and bias, in the layouts that kernels need.
///
/// Layouts are made when a kernel first needs them, and kept. On the CPU they are for the
/// instruction set of the [`Cpu`] that the weights were packed with.
pub struct PackedConv {
    /// None for weights that were laid out at once.
    given: Option<RawWeights>,
    /// For the strips: `[out block][in block][tap][in channel][out channel]`.
    direct: OnceLock<Buffer>,
    given_bias: Option<Tensor>,
    /// The bias, padded with zeros to the end of the last block.
    bias: OnceLock<Vec<f32>>,
    shape: [usize; 5],
    inputs: usize,
    pub(crate) ic_block: usize,
    pub(crate) oc_block: usize,
    pub(crate) taps: usize,
    /// The weights transformed for narrow and for broad cells, and those in pairs, laid out when
    /// first needed.
    pub(super) winograd: [OnceLock<Transformed>; 4],
    /// The weights of the strips in pairs of input channels, laid out when first needed.
    bf16_pairs: OnceLock<Buffer>,
    /// Weights and bias laid out for CUDA devices.
    pub(crate) on_cuda: DeviceCache<Packed>,
}

/// Weights as they were given: `[row][input][tap]`.
#[derive(Clone)]
pub(crate) struct RawWeights {
    pub values: Tensor,
    /// Where the first weight is.
    pub start: usize,
    /// Inputs of a row.
    pub row: usize,
    /// Whether rows are inputs instead of outputs, and the taps in reverse order: the weights that
    /// turn an output's gradient into the input's.
    pub mirrored: bool,
}

impl RawWeights {
    /// The position of the weight from input `i` to output `o` at one of `taps`.
    fn at(&self, taps: usize, o: usize, i: usize, tap: usize) -> usize {
        let (line, place, tap) = if self.mirrored { (i, o, taps - 1 - tap) } else { (o, i, tap) };
        self.start + (line * self.row + place) * taps + tap
    }

    /// These weights in the form that turns an output's gradient into the input's.
    pub fn mirror(&self) -> RawWeights {
        RawWeights { mirrored: !self.mirrored, ..self.clone() }
    }
}

/// Weights before they are laid out, in memory.
pub(crate) struct RawOnHost<'a> {
    conv: &'a PackedConv,
    given: Option<Tensor>,
}

impl RawOnHost<'_> {
    /// The weight from input `i` to output `o` at `tap`.
    pub fn weight(&self, o: usize, i: usize, tap: usize) -> f32 {
        self.conv.weight_of(self.given.as_ref(), o, i, tap)
    }
}

/// What [`PackedConv::pack`] fills, given a way to read a weight.
pub(crate) struct Packer {
    /// Output channels.
    pub outputs: usize,
    /// Input channels.
    pub inputs: usize,
    /// Taps of the reduction.
    pub taps: usize,
}

impl Packer {
    /// Lays out `weight(output, input, tap)`; `shape` is what error messages show.
    pub fn pack(
        &self,
        cpu: &Cpu,
        bias: Option<&Tensor>,
        shape: [usize; 5],
        weight: impl Fn(usize, usize, usize) -> f32 + Sync,
    ) -> PackedConv {
        let conv = self.conv(cpu, bias, shape, None);
        let _ = conv.direct.set(conv.lay_out(cpu, weight));
        conv
    }

    /// Weights that are laid out where and when they are needed. A bias whose home is a device
    /// stays there until then, too.
    pub fn conv(
        &self,
        cpu: &Cpu,
        bias: Option<&Tensor>,
        shape: [usize; 5],
        given: Option<RawWeights>,
    ) -> PackedConv {
        let ic_block = strip::ic_block(self.inputs);
        let oc_block = strip::kernels(cpu.isa(), ic_block, self.outputs).oc_block;
        let conv = PackedConv {
            given,
            direct: OnceLock::new(),
            given_bias: bias.cloned(),
            bias: OnceLock::new(),
            shape,
            inputs: self.inputs,
            ic_block,
            oc_block,
            taps: self.taps,
            winograd: Default::default(),
            bf16_pairs: OnceLock::new(),
            on_cuda: DeviceCache::default(),
        };
        if bias.is_none_or(|bias| bias.device_type().is_none()) {
            conv.padded();
        }
        conv
    }
}

impl PackedConv {
    /// Packs `weight` `[out, in, 3, 3, 3]` and `bias` `[out]`, zeros if there is none. The
    /// convolution has only the input channels in `inputs`, a part of `0..in`.
    ///
    /// # Errors
    /// The shapes or `inputs` do not fit, or a bias in a file cannot be read.
    pub fn new(
        cpu: &Cpu,
        weight: &Tensor,
        inputs: Range<usize>,
        bias: Option<&Tensor>,
    ) -> Result<PackedConv, OpError> {
        let shape = weight.map5("conv3d", "weight")?;
        if shape[2..] != [3, 3, 3] || inputs.end > shape[1] || inputs.is_empty() || shape[0] == 0 {
            let expected = format!("[out, in, 3, 3, 3] with inputs {inputs:?}");
            return Err(weight.shape_error("conv3d", "weight", expected));
        }
        if let Some(bias) = bias {
            bias.expect_shape("conv3d", "bias", &shape[..1])?;
            // Read here, where a failure can be reported.
            if bias.device_type().is_none() {
                bias.try_data()?;
            }
        }
        let packer = Packer { outputs: shape[0], inputs: inputs.len(), taps: 27 };
        let given = RawWeights {
            values: weight.clone(),
            start: inputs.start * 27,
            row: shape[1],
            mirrored: false,
        };
        Ok(packer.conv(cpu, bias, shape, Some(given)))
    }

    /// Lays out `weight(output, input, tap)` for the strips.
    fn lay_out(&self, cpu: &Cpu, weight: impl Fn(usize, usize, usize) -> f32 + Sync) -> Buffer {
        let (ic_block, oc_block, taps) = (self.ic_block, self.oc_block, self.taps);
        let per_block = self.inputs.div_ceil(ic_block) * taps * ic_block * oc_block;
        let mut weights = cpu.alloc_persistent(self.oc_blocks() * per_block);
        cpu.chunks_mut(&mut weights, per_block, |ob, block| {
            for (at, v) in block.iter_mut().enumerate() {
                let (o, rest) = (ob * oc_block + at % oc_block, at / oc_block);
                let (c, rest) = (rest % ic_block, rest / ic_block);
                let (tap, ib) = (rest % taps, rest / taps);
                let is_there = o < self.out_channels() && ib * ic_block + c < self.inputs;
                *v = if is_there { weight(o, ib * ic_block + c, tap) } else { 0.0 };
            }
        });
        weights
    }

    /// The weights in the layout of the strips.
    fn direct(&self, cpu: &Cpu) -> &Buffer {
        self.direct.get_or_init(|| {
            let raw = self.raw(cpu);
            self.lay_out(cpu, |o, i, tap| raw.weight(o, i, tap))
        })
    }

    /// The weights as they were given; if they stay in a file, they are read, and kept as long as
    /// the result lives.
    pub(crate) fn raw(&self, cpu: &Cpu) -> RawOnHost<'_> {
        let given = self
            .given
            .as_ref()
            .map(|given| given.values.at_hand(cpu).unwrap_or_else(|e| resume_unwind(Box::new(e))));
        RawOnHost { conv: self, given }
    }

    /// The weights as they were given, if their home is this device.
    pub(crate) fn given_on(&self, cuda: &Cuda) -> Option<&RawWeights> {
        self.given.as_ref().filter(|given| given.values.is_f32_on(cuda))
    }

    /// The weights as they were given, if their home is some device.
    pub(crate) fn given_on_device(&self) -> Option<&RawWeights> {
        self.given.as_ref().filter(|given| given.values.device_type() == Some(DType::F32))
    }

    /// The bias as it was given, if its home is this device.
    pub(crate) fn bias_on(&self, cuda: &Cuda) -> Option<&Tensor> {
        self.given_bias.as_ref().filter(|bias| bias.is_f32_on(cuda))
    }

    /// Whether there is a bias.
    pub(crate) fn has_bias(&self) -> bool {
        self.given_bias.is_some()
    }

    /// Copies weights and bias that are on a device back, if that has not been done yet. Code that
    /// lays them out on other threads than the calling one must call this first: it takes the
    /// device's stream, which the calling thread may hold, and may fail.
    pub(crate) fn fetch(&self) -> Result<(), OpError> {
        let given = self.given.as_ref().map(|given| &given.values);
        for values in given.into_iter().chain(&self.given_bias) {
            if values.device_type().is_some() {
                values.try_data()?;
            }
        }
        Ok(())
    }

    /// The number of input channels.
    pub fn in_channels(&self) -> usize {
        self.inputs
    }

    /// The number of output channels.
    pub fn out_channels(&self) -> usize {
        self.shape[0]
    }

    /// The shape of the weights that it was packed from, all their input channels included.
    pub fn weight_shape(&self) -> &[usize] {
        &self.shape
    }

    /// An error unless the weights are laid out for `cpu`'s instruction set.
    pub(crate) fn check_layout(&self, op: &'static str, cpu: &Cpu) -> Result<(), OpError> {
        let needed = strip::kernels(cpu.isa(), self.ic_block, self.shape[0]).oc_block;
        if self.oc_block == needed {
            return Ok(());
        }
        let message = format!(
            "its weights are laid out in blocks of {}, {} needs {needed}: pack them for this device",
            self.oc_block,
            cpu.isa()
        );
        Err(OpError::Argument { op, message })
    }

    /// The weight from input `i` to output `o` at `tap`.
    pub(crate) fn weight(&self, o: usize, i: usize, tap: usize) -> f32 {
        self.weight_of(self.given.as_ref().map(|g| &g.values), o, i, tap)
    }

    fn weight_of(&self, given: Option<&Tensor>, o: usize, i: usize, tap: usize) -> f32 {
        match (given, &self.given) {
            (Some(values), Some(given)) => values.data()[given.at(self.taps, o, i, tap)],
            _ => self.weights(o / self.oc_block, i / self.ic_block)
                [(tap * self.ic_block + i % self.ic_block) * self.oc_block + o % self.oc_block],
        }
    }

    /// Bytes of the layouts for the CPU that have been made so far.
    pub fn bytes(&self) -> usize {
        4 * [&self.direct, &self.bf16_pairs]
            .into_iter()
            .filter_map(OnceLock::get)
            .map(|b| b.len())
            .sum::<usize>()
            + self.winograd.iter().filter_map(OnceLock::get).map(Transformed::bytes).sum::<usize>()
    }

    /// Weights of output block `ob` from input block `ib` on.
    ///
    /// # Panics
    /// If they have not been laid out, which [`PackedConv::tiling`] does.
    fn weights(&self, ob: usize, ib: usize) -> &[f32] {
        let ic_blocks = self.inputs.div_ceil(self.ic_block);
        &self.direct.get().expect("laid out")
            [(ob * ic_blocks + ib) * self.taps * self.ic_block * self.oc_block..]
    }

    /// How a map of this size is cut into tiles for this layer on `cpu`, and the strips that run
    /// over them.
    pub(crate) fn tiling(&self, cpu: &Cpu, size: [usize; 3]) -> (Tiling, Kernels) {
        let direct = self.direct(cpu);
        if !cpu.bf16_pairs(self.ic_block) {
            return (
                Tiling::new(size, self.inputs, self.ic_block),
                strip::kernels(cpu.isa(), self.ic_block, self.shape[0]),
            );
        }
        self.bf16_pairs
            .get_or_init(|| cpu.persistent_copy(&packed_bf16_pairs(cpu, direct, self.oc_block)));
        (
            Tiling::in_bf16_pairs(size, self.inputs, self.ic_block),
            strip::kernels(cpu.products(self.ic_block), self.ic_block / 2, self.shape[0]),
        )
    }

    /// [`PackedConv::weights`] in the form that a tiling of this layer uses.
    pub(super) fn weights_for(&self, tiling: &Tiling, ob: usize, ib: usize) -> &[f32] {
        match self.bf16_pairs.get() {
            Some(bf16_pairs) if tiling.bf16_pairs => {
                let ic_blocks = self.inputs.div_ceil(self.ic_block);
                &bf16_pairs[(ob * ic_blocks + ib) * self.taps * tiling.ic_block * self.oc_block..]
            }
            _ => self.weights(ob, ib),
        }
    }

    /// The bias `[out]`, zeros if there is none.
    pub(crate) fn biases(&self) -> &[f32] {
        &self.padded()[..self.shape[0]]
    }

    fn padded(&self) -> &[f32] {
        self.bias.get_or_init(|| {
            let mut padded = vec![0.0; self.oc_blocks() * self.oc_block];
            if let Some(bias) = &self.given_bias {
                padded[..self.shape[0]].copy_from_slice(bias.data());
            }
            padded
        })
    }

    /// Blocks of output channels.
    pub(crate) fn oc_blocks(&self) -> usize {
        self.shape[0].div_ceil(self.oc_block)
    }

    /// The bias of output block `ob`.
    pub(crate) fn bias(&self, ob: usize) -> &[f32] {
        &self.padded()[ob * self.oc_block..][..self.oc_block]
    }

    /// Input blocks to reduce over before moving on, so that their weights stay in cache.
    pub(crate) fn group(&self) -> usize {
        (WEIGHT_BUDGET / (self.taps * self.ic_block * self.oc_block)).max(1)
    }
}

/// Weights transformed for [`winograd`](super::winograd), `[point of h and w][out block][point of
/// d][in, or pair of them][out of the block]`.
pub(crate) struct Transformed {
    pub(super) values: Buffer,
}

impl Transformed {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.values.len() * 4
    }
}

/// Weights and bias in the order in which a CUDA kernel reads them.
pub(crate) struct Packed {
    pub(super) kernel: Kernel,
    pub(super) weights: Arc<Memory>,
    pub(super) bias: Arc<Memory>,
    pub(super) outputs: usize,
}

/// The CUDA kernels that exist, for maps of different element types and channels.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Kernel {
    /// Tensor cores, with chunks of this many channels: 16 of float32, 16 or 32 of 16 bits.
    Mma(usize),
    /// Tensor cores, one channel: its 27 taps take the place of the channels.
    MmaOneChannel,
    /// Float arithmetic, chunks of 16 channels.
    Simt,
    /// Float arithmetic, channel by channel: for any number of channels.
    SimtAnyChannels,
}

/// The work of a convolution of this size, with `taps` multiply-adds for each pair of channels and
/// voxel.
pub(super) fn work([n, d, h, w, c]: [usize; 5], conv: &PackedConv, products: f64) -> OpCost {
    let (voxels, outputs) = (n * d * h * w, conv.out_channels());
    let floats = voxels * (c + outputs) + 27 * c * outputs;
    OpCost {
        problem: format!("{c} to {outputs} channels, {d}x{h}x{w}"),
        flops: (2 * voxels * c * outputs) as f64 * products,
        floats,
    }
}
