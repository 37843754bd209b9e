//! The convolution on the CPU: direct, over tiles in scratch memory, strips in registers.

use super::kernel::{self, Kernels, Strip, split};
use super::place::Place;
use super::tile::Tiling;
use super::winograd::{self, Kind};
use crate::device::cuda::PerDevice;
use crate::device::profile::Work;
use crate::device::simd;
use crate::device::{Buffer, Cpu, DisjointWriter, ReadOnly};
use crate::ops::norm::Sums;
use crate::tensor::{OpError, Tensor};
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::OnceLock;

/// Floats of a map that no cache holds until its reader comes.
pub(super) const STREAM: usize = 16 << 20;
/// Weights of one block of output channels that a strip streams through: small enough to stay in the second-level cache.
const WEIGHT_BUDGET: usize = 64 << 10;

/// Weights and bias, laid out for the kernels of one instruction set as those first need them.
pub struct PackedConv {
    /// `[out, in, 3, 3, 3]`, and which of its inputs come first; none of weights that were laid out at once.
    given: Option<(Tensor, usize)>,
    /// For the strips: `[out block][in block][tap][in channel][out channel]`.
    direct: OnceLock<Buffer>,
    bias: Vec<f32>,
    shape: [usize; 5],
    inputs: usize,
    pub(crate) x: usize,
    pub(crate) out_block: usize,
    pub(crate) taps: usize,
    /// The same transformed for narrow and for broad cells, and those in pairs, laid out when first needed.
    winograd: [OnceLock<winograd::Weights>; 4],
    /// The same in pairs of input channels, laid out when first needed.
    pairs: OnceLock<Buffer>,
    /// The same for CUDA devices.
    pub(crate) on_cuda: PerDevice<super::cuda::Packed>,
}

/// Weights before they are laid out, in memory.
pub(crate) struct Raw<'a> {
    conv: &'a PackedConv,
    given: Option<Tensor>,
}

impl Raw<'_> {
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

    fn conv(&self, cpu: &Cpu, bias: Option<&Tensor>, shape: [usize; 5], given: Option<(Tensor, usize)>) -> PackedConv {
        let x = kernel::in_block(self.inputs);
        let out_block = kernel::kernels(cpu.isa(), x, self.outputs).out_block;
        let mut padded = vec![0.0; self.outputs.next_multiple_of(out_block)];
        if let Some(bias) = bias {
            padded[..self.outputs].copy_from_slice(bias.data());
        }
        PackedConv {
            given,
            direct: OnceLock::new(),
            bias: padded,
            shape,
            inputs: self.inputs,
            x,
            out_block,
            taps: self.taps,
            winograd: Default::default(),
            pairs: OnceLock::new(),
            on_cuda: PerDevice::default(),
        }
    }
}

impl PackedConv {
    /// Of `weight` `[out, in, 3, 3, 3]`, of whose inputs only `inputs` are used, and `bias` `[out]`.
    pub fn new(cpu: &Cpu, weight: &Tensor, inputs: Range<usize>, bias: Option<&Tensor>) -> Result<PackedConv, OpError> {
        let shape = weight.map5("conv3d", "weight")?;
        if shape[2..] != [3, 3, 3] || inputs.end > shape[1] || inputs.is_empty() || shape[0] == 0 {
            let expected = format!("[out, in, 3, 3, 3] with inputs {inputs:?}");
            return Err(weight.misfit("conv3d", "weight", expected));
        }
        if let Some(bias) = bias {
            bias.expect("conv3d", "bias", &shape[..1])?;
            // Copied back here, where a failure can be told.
            bias.try_data()?;
        }
        let packer = Packer { outputs: shape[0], inputs: inputs.len(), taps: 27 };
        Ok(packer.conv(cpu, bias, shape, Some((weight.clone(), inputs.start))))
    }

    /// `weight(output, input, tap)` as the strips want it.
    fn lay_out(&self, cpu: &Cpu, weight: impl Fn(usize, usize, usize) -> f32 + Sync) -> Buffer {
        let (x, out_block, taps) = (self.x, self.out_block, self.taps);
        let per_block = self.inputs.div_ceil(x) * taps * x * out_block;
        let mut weights = cpu.take_lasting(self.out_blocks() * per_block);
        cpu.chunks_mut(&mut weights, per_block, |ob, block| {
            for (at, v) in block.iter_mut().enumerate() {
                let (o, rest) = (ob * out_block + at % out_block, at / out_block);
                let (c, rest) = (rest % x, rest / x);
                let (tap, ib) = (rest % taps, rest / taps);
                let is_there = o < self.out_channels() && ib * x + c < self.inputs;
                *v = if is_there { weight(o, ib * x + c, tap) } else { 0.0 };
            }
        });
        weights
    }

    /// The weights as the strips want them.
    fn direct(&self, cpu: &Cpu) -> &Buffer {
        self.direct.get_or_init(|| {
            let raw = self.raw(cpu);
            self.lay_out(cpu, |o, i, tap| raw.weight(o, i, tap))
        })
    }

    /// The weights as they were given, read for as long as the result lives where they stay in a file.
    pub(crate) fn raw(&self, cpu: &Cpu) -> Raw<'_> {
        let given = self.given.as_ref().map(|(given, _)| given.at_hand(cpu).unwrap_or_else(|e| resume_unwind(Box::new(e))));
        Raw { conv: self, given }
    }

    /// Copies weights that lie on a device back, where that was not done yet. Those who lay them out elsewhere than on the calling thread see to it before: it takes the
    /// device's turn, which the calling thread may have, and may fail.
    pub(crate) fn fetch(&self) -> Result<(), OpError> {
        match &self.given {
            Some((given, _)) if given.device_type().is_some() => Ok(given.try_data().map(drop)?),
            _ => Ok(()),
        }
    }

    /// Input channels it reduces over.
    pub fn in_channels(&self) -> usize {
        self.inputs
    }

    /// Output channels.
    pub fn out_channels(&self) -> usize {
        self.shape[0]
    }

    /// The shape of the weights it was packed from.
    pub fn weight_shape(&self) -> &[usize] {
        &self.shape
    }

    /// An error unless the weights are laid out for `cpu`'s instruction set.
    pub(crate) fn check_layout(&self, op: &'static str, cpu: &Cpu) -> Result<(), OpError> {
        let needed = kernel::kernels(cpu.isa(), self.x, self.shape[0]).out_block;
        if self.out_block == needed {
            return Ok(());
        }
        let message =
            format!("its weights are laid out in blocks of {}, {} needs {needed}: pack them for this device", self.out_block, cpu.isa());
        Err(OpError::Argument { op, message })
    }

    /// The weight from input `i` to output `o` at `tap`.
    pub(crate) fn weight(&self, o: usize, i: usize, tap: usize) -> f32 {
        self.weight_of(self.given.as_ref().map(|g| &g.0), o, i, tap)
    }

    fn weight_of(&self, given: Option<&Tensor>, o: usize, i: usize, tap: usize) -> f32 {
        match (given, &self.given) {
            (Some(given), Some((_, first))) => given.data()[(o * self.shape[1] + first + i) * self.taps + tap],
            _ => self.weights(o / self.out_block, i / self.x)[(tap * self.x + i % self.x) * self.out_block + o % self.out_block],
        }
    }

    /// The weights transformed for [`winograd`].
    pub(crate) fn transformed(&self, cpu: &Cpu, kind: Kind) -> &winograd::Weights {
        let at = usize::from(kind == Kind::Broad) + 2 * usize::from(cpu.pairs(self.inputs));
        self.winograd[at].get_or_init(|| winograd::Weights::new(cpu, self, kind))
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        4 * [&self.direct, &self.pairs].into_iter().filter_map(OnceLock::get).map(|b| b.len()).sum::<usize>()
            + self.winograd.iter().filter_map(OnceLock::get).map(winograd::Weights::bytes).sum::<usize>()
    }

    /// Weights of output block `ob` from input block `ib` on.
    ///
    /// # Panics
    /// Before they are laid out, which [`PackedConv::tiling`] sees to.
    fn weights(&self, ob: usize, ib: usize) -> &[f32] {
        let in_blocks = self.inputs.div_ceil(self.x);
        &self.direct.get().expect("laid out")[(ob * in_blocks + ib) * self.taps * self.x * self.out_block..]
    }

    /// How a map of this size is cut into tiles for this layer on `cpu`, and the strips that run over them.
    pub(crate) fn tiling(&self, cpu: &Cpu, size: [usize; 3]) -> (Tiling, Kernels) {
        let direct = self.direct(cpu);
        if !cpu.pairs(self.x) {
            return (Tiling::new(size, self.inputs, self.x), kernel::kernels(cpu.isa(), self.x, self.shape[0]));
        }
        self.pairs.get_or_init(|| cpu.lasting(&join_pairs(cpu, direct, self.out_block)));
        (Tiling::in_pairs(size, self.inputs, self.x), kernel::pair_kernels(self.x / 2, self.shape[0]))
    }

    /// [`PackedConv::weights`] as a tiling of this layer's wants them.
    fn weights_for(&self, tiling: &Tiling, ob: usize, ib: usize) -> &[f32] {
        match self.pairs.get() {
            Some(pairs) if tiling.pairs => {
                let in_blocks = self.inputs.div_ceil(self.x);
                &pairs[(ob * in_blocks + ib) * self.taps * tiling.x * self.out_block..]
            }
            _ => self.weights(ob, ib),
        }
    }

    /// The bias `[out]`, zeros where there is none.
    pub(crate) fn biases(&self) -> &[f32] {
        &self.bias[..self.shape[0]]
    }

    /// Blocks of output channels.
    pub(crate) fn out_blocks(&self) -> usize {
        self.bias.len() / self.out_block
    }

    /// The bias of output block `ob`.
    pub(crate) fn bias(&self, ob: usize) -> &[f32] {
        &self.bias[ob * self.out_block..][..self.out_block]
    }

    /// Input blocks to reduce over before moving on, so that their weights stay in cache.
    pub(crate) fn group(&self) -> usize {
        (WEIGHT_BUDGET / (self.taps * self.x * self.out_block)).max(1)
    }
}

/// Rows of `block` values joined in pairs: row `n` of the result is rows `2 n` and `2 n + 1` in bfloat16.
pub(super) fn join_pairs(cpu: &Cpu, values: &[f32], block: usize) -> Buffer {
    let mut pairs = cpu.take(values.len() / 2);
    cpu.chunks_mut(&mut pairs, block, |row, to| {
        let (first, second) = values[2 * row * block..][..2 * block].split_at(block);
        to.iter_mut().zip(first.iter().zip(second)).for_each(|(to, (a, b))| *to = simd::pair(*a, *b));
    });
    pairs
}

/// Where rows of output lie, and where their initial values come from.
pub(crate) struct Target<'a> {
    /// The output map.
    pub out: &'a DisjointWriter<'a, f32>,
    /// A map of the same layout to start from instead of the bias.
    pub init: Option<ReadOnly<'a, f32>>,
    /// Channels of the output map.
    pub channels: usize,
    /// Floats from a voxel to the next of a row.
    pub voxel: usize,
    /// Whether outputs go past the caches: to voxels aligned to registers, that nobody starts from again.
    pub stream: bool,
}

/// A tile in scratch and the strips that run over it.
pub(crate) struct Rows<'a> {
    pub tiling: &'a Tiling,
    pub kernels: Kernels,
    pub conv: &'a PackedConv,
    pub scratch: &'a [f32],
    pub taps: &'a [isize],
}

impl Rows<'_> {
    /// Computes output block `ob` of all rows of a tile. `row_at(i, j)` is the offset of a row's first voxel in the output map; `sums` `[channel][value, square]` of the block
    /// grow by what is written, unless they are empty.
    ///
    /// # Safety
    /// Every row lies within the target, and no other unit touches it or this block of its channels meanwhile.
    /// Scratch holds a tile as [`Tiling::load`] leaves it, and the taps stay within its halo;
    /// strips, tiling and weights belong together, as [`PackedConv::tiling`] has them.
    pub unsafe fn run(&self, ob: usize, rows: [usize; 2], target: &Target, row_at: impl Fn(usize, usize) -> usize, sums: &mut [f64]) {
        let (t, conv) = (self.tiling, self.conv);
        let mut spare = vec![0.0f32; self.kernels.strips.len() * conv.out_block];
        let mut counted = vec![0.0f64; 2 * conv.out_block];
        for ib in (0..t.blocks).step_by(conv.group()) {
            for (i, j) in (0..rows[0]).flat_map(|i| (0..rows[1]).map(move |j| (i, j))) {
                let mut x = ib * t.block_stride() + (i + 1) * t.plane_stride() + (j + 1) * t.row_stride() + t.x;
                let mut at = row_at(i, j) + ob * conv.out_block;
                for (count, size) in split(t.tile[2], self.kernels.strips.len()) {
                    for _ in 0..count {
                        // SAFETY: passed on from the caller; scratch spans the tile and its halo.
                        unsafe { self.strip(ob, ib, x, at, size, target, &mut spare, &mut counted) };
                        (x, at) = (x + size * t.x, at + size * target.voxel);
                    }
                }
            }
        }
        add_sums(&counted, sums);
        if target.stream {
            simd::fence();
        }
    }

    /// One strip: `size` voxels from scratch offset `x` to target offset `at`, over the group of input blocks from `ib` on.
    ///
    /// # Safety
    /// As [`Rows::run`].
    #[allow(clippy::too_many_arguments)]
    unsafe fn strip(
        &self,
        ob: usize,
        ib: usize,
        x: usize,
        at: usize,
        size: usize,
        target: &Target,
        spare: &mut [f32],
        counted: &mut [f64],
    ) {
        let (t, conv) = (self.tiling, self.conv);
        let valid = conv.out_block.min(target.channels - ob * conv.out_block);
        // SAFETY: the caller vouches for scratch and target; `spare` holds the longest strip,
        // `counted` the block's sums.
        unsafe {
            let out = target.out.at(at);
            let (mut init, mut init_stride) = match target.init {
                _ if ib > 0 => (out.cast_const(), target.voxel),
                Some(init) => (init.at(at), target.voxel),
                None => (conv.bias(ob).as_ptr(), 0),
            };
            let (mut to, mut to_stride) = (out, target.voxel);
            // A last block wider than what is left of the channels goes through spare memory.
            let whole = valid == conv.out_block;
            if !whole {
                if init_stride != 0 {
                    for (v, spare) in spare.chunks_exact_mut(conv.out_block).enumerate().take(size) {
                        spare[..valid].copy_from_slice(std::slice::from_raw_parts(init.add(v * init_stride), valid));
                    }
                    (init, init_stride) = (spare.as_ptr(), conv.out_block);
                }
                (to, to_stride) = (spare.as_mut_ptr(), conv.out_block);
            }
            (self.kernels.strips[size - 1])(&Strip {
                x: self.scratch.as_ptr().add(x),
                blocks: conv.group().min(t.blocks - ib),
                block_stride: t.block_stride(),
                taps: self.taps.as_ptr(),
                tap_count: self.taps.len(),
                weights: conv.weights_for(t, ob, ib).as_ptr(),
                init,
                init_stride,
                out: to,
                out_stride: to_stride,
                // Values are whole behind the last blocks of inputs.
                sums: if ib + conv.group() >= t.blocks { counted.as_mut_ptr() } else { std::ptr::null_mut() },
                stream: target.stream && whole,
            });
            if !whole {
                for (v, spare) in spare.chunks_exact(conv.out_block).enumerate().take(size) {
                    std::slice::from_raw_parts_mut(out.add(v * target.voxel), valid).copy_from_slice(&spare[..valid]);
                }
            }
        }
    }
}

/// Adds sums, values' and then squares', to as many of `[channel][value, square]` as there are.
pub(super) fn add_sums(sums: &[f64], to: &mut [f64]) {
    let squares = &sums[sums.len() / 2..];
    for ((to, value), square) in to.chunks_exact_mut(2).zip(sums).zip(squares) {
        to[0] += value;
        to[1] += square;
    }
}

/// How many groups the output blocks are dealt out in, so that a small map still keeps every thread busy.
pub(crate) fn groups(tiles: usize, out_blocks: usize) -> usize {
    // Fixed, not by thread count, so that the units, and with them the sums, are the same everywhere.
    (32usize.div_ceil(tiles)).min(out_blocks).max(1)
}

/// A convolution's size, with so many multiply-adds for each pair of channels and voxel.
pub(super) fn work([n, d, h, w, c]: [usize; 5], conv: &PackedConv, products: f64) -> Work {
    let (voxels, outputs) = (n * d * h * w, conv.out_channels());
    let floats = voxels * (c + outputs) + 27 * c * outputs;
    Work { problem: format!("{c} to {outputs} channels, {d}x{h}x{w}"), flops: (2 * voxels * c * outputs) as f64 * products, floats }
}

/// The convolution, its sums if they are wanted, and its output pooled if `signs` are given and it runs by minimal filtering.
pub fn conv3d(
    cpu: &Cpu,
    x: super::place::Work,
    extent: [usize; 5],
    conv: &PackedConv,
    want_sums: bool,
    signs: Option<&[f32]>,
) -> (Tensor, Option<Sums>, Option<Tensor>) {
    let [n, d, h, w, _] = extent;
    if let Some(kind) = winograd::kind(cpu, conv, [d, h, w]) {
        return winograd::conv3d(cpu, x, extent, conv, kind, want_sums, signs);
    }
    let _op = cpu.op("conv3d direct", || work(extent, conv, 27.0));
    let (tiling, kernels) = conv.tiling(cpu, [d, h, w]);
    let taps = tiling.taps27();
    let outputs = conv.out_channels();
    let place = Place::new(cpu, x, extent, &tiling, outputs);
    let groups = groups(n * tiling.tiles(), conv.out_blocks());
    let per_group = conv.out_blocks().div_ceil(groups);
    let mut partial = cpu.wide_zeros(if want_sums { n * tiling.tiles() * outputs * 2 } else { 0 });
    let stream = n * d * h * w * outputs > STREAM && outputs.is_multiple_of(conv.out_block) && tiling.blocks <= conv.group();
    let (source, out) = (place.source(), place.out());
    let target = Target { out: &out, init: None, channels: outputs, voxel: outputs, stream };
    let sums_at = DisjointWriter::new(&mut partial);
    place.each(cpu, n, &tiling, groups, |unit| {
        let (tile, group) = (unit / groups, unit % groups);
        let (item, t) = (tile / tiling.tiles(), tile % tiling.tiles());
        let mut scratch = cpu.take(tiling.scratch());
        // SAFETY: by the order of `Place::each` nobody writes to what a tile has yet to read.
        unsafe { tiling.load(cpu.isa(), source, extent, item, t, &mut scratch) };
        let ([i0, j0], rows) = tiling.rows(t, d, h);
        let row_at = |i: usize, j: usize| (((item * d + i0 + i) * h + j0 + j) * w) * outputs;
        let run = Rows { tiling: &tiling, kernels, conv, scratch: &scratch, taps: &taps };
        for ob in group * per_group..((group + 1) * per_group).min(conv.out_blocks()) {
            let c0 = ob * conv.out_block;
            let valid = conv.out_block.min(outputs - c0);
            let sums = if want_sums { (tile * outputs + c0) * 2..(tile * outputs + c0 + valid) * 2 } else { 0..0 };
            // SAFETY: tiles cover disjoint rows, groups disjoint channels; taps stay in the halo.
            unsafe { run.run(ob, rows, &target, row_at, sums_at.slice(sums.start, sums.len())) };
        }
    });
    let sums = want_sums.then(|| Sums::reduce(&partial, n, outputs, (d * h * w) as f64));
    (Tensor::from_buffer([n, d, h, w, outputs], place.finish()), sums, None)
}
