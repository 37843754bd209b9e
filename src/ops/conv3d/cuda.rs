//! The convolution on CUDA devices, and what a decoder stage shares with it. See
//! `kernels/lib/conv.cuh`.

use super::weights::{Kernel, Packed};
use super::{ConvInput, ConvOutput, PackedConv, Prologue, rolling};
use crate::device::cuda::kernels::Conv3d16Args as Args;
use crate::device::cuda::{CudaError, Family, Launch, Memory, Pointer, TypedKernel, kernels};
use crate::device::{Cuda, DType, Precision};
use crate::ops::norm::Sums;
use crate::ops::reduce::weight_total;
use crate::tensor::{OpError, Tensor, upload};
use std::fmt;
use std::sync::Arc;

/// Output voxels of a block along each axis, and its output channels.
const TILE: [usize; 3] = [4, 8, 8];
const OUT: usize = 32;
/// Bytes of a block's staged result with the bins of its sums, if it does not write from its
/// registers: `TILE * STAGE` and `8 * OUT * 2` floats.
const STAGED: usize = (256 * (OUT + 8) + 8 * OUT * 2) * 4;
/// The number of blocks that keep a GPU busy: if a map has fewer, several share a tile's input
/// channels.
const BLOCKS: usize = 320;
/// More blocks than that are not tried, nor other numbers of blocks that share a tile.
const MOST_BLOCKS: usize = 4 * BLOCKS;
const SPLITS_OF_K: [usize; 9] = [1, 2, 3, 4, 6, 8, 12, 16, 24];
/// Outputs of a block of `conv3d_lay_out`.
const LAID_OUT: usize = 16;
/// Voxels of a block of `conv3d_splitk_reduce`.
const REDUCED: usize = 64;

/// The op that a convolution's kernels are used for.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Op {
    /// The convolution, and the gradient of its input.
    Conv3d,
    /// A decoder stage: 8 phases from the coarse grid, on top of the skip map.
    Stage,
    /// The gradient of a stage's coarse input, which gathers all phases into one voxel.
    StageGradient,
}

/// How blocks share an op's work.
#[derive(Clone, Copy, PartialEq)]
enum Share {
    /// That many blocks have a tile, or a phase of it, each with a part of its input channels.
    SplitK(usize),
    /// A block of a stage computes all phases.
    AllPhases,
    /// A block goes over planes of a column, and multiplies by `wgmma`.
    RollingPlanes,
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Share::SplitK(blocks) => write!(f, "k in {blocks}"),
            Share::AllPhases => f.write_str("all phases"),
            Share::RollingPlanes => f.write_str("rolling planes"),
        }
    }
}

impl Op {
    /// The name of the choice between variants.
    fn choice(self) -> &'static str {
        match self {
            Op::Conv3d => "conv3d",
            Op::Stage => "decoder_stage",
            Op::StageGradient => "decoder_stage_gradient",
        }
    }
}

impl Kernel {
    fn of(channels: usize, taps: usize, precision: Precision) -> Kernel {
        let on_matrices = precision != Precision::Ieee;
        let is_float = precision.maps() == DType::F32;
        match channels % 8 {
            1 if on_matrices && channels == 1 && taps == 27 => Kernel::MmaOneChannel,
            // 16 floats take as many bytes as 32 elements of 16 bits.
            0 | 4 if on_matrices && is_float => Kernel::Mma(16),
            0 if on_matrices && channels <= 16 => Kernel::Mma(16),
            0 if on_matrices => Kernel::Mma(32),
            0 | 4 => Kernel::Simt,
            _ => Kernel::SimtAnyChannels,
        }
    }

    /// Whether products are taken on tensor cores.
    fn on_matrices(self) -> bool {
        matches!(self, Kernel::Mma(_) | Kernel::MmaOneChannel)
    }

    fn chunk(self) -> usize {
        match self {
            Kernel::Mma(chunk) => chunk,
            Kernel::MmaOneChannel => 32,
            Kernel::Simt => 16,
            Kernel::SimtAnyChannels => 1,
        }
    }

    /// The kernel of an op.
    fn typed(
        self,
        op: Op,
        all_phases: bool,
        precision: Precision,
    ) -> Result<TypedKernel<Args<'static>>, CudaError> {
        let family = self.family(op, all_phases);
        match self.on_matrices() {
            true => family.multiplying(precision),
            false => family.of(precision.maps()),
        }
    }

    /// The kernels of an op. All have the same parameters.
    fn family(self, op: Op, all_phases: bool) -> Family<Args<'static>> {
        let [conv3d, stage, gradient] = match self {
            Kernel::Mma(16) => {
                let stage = match all_phases {
                    true => kernels::DECODER_STAGE_16,
                    false => kernels::DECODER_STAGE_PHASE_16,
                };
                [kernels::CONV3D_16, stage, kernels::DECODER_STAGE_GRADIENT_16]
            }
            Kernel::Mma(_) => {
                let stage = match all_phases {
                    true => kernels::DECODER_STAGE_32,
                    false => kernels::DECODER_STAGE_PHASE_32,
                };
                [kernels::CONV3D_32, stage, kernels::DECODER_STAGE_GRADIENT_32]
            }
            // It has laid-out weights only if there are 27 taps, which no stage has.
            Kernel::MmaOneChannel => [kernels::CONV3D_SINGLE; 3],
            Kernel::Simt => [
                kernels::CONV3D_PLAIN,
                kernels::DECODER_STAGE_PLAIN,
                kernels::DECODER_STAGE_GRADIENT_PLAIN,
            ],
            Kernel::SimtAnyChannels => [
                kernels::CONV3D_FEW,
                kernels::DECODER_STAGE_FEW,
                kernels::DECODER_STAGE_GRADIENT_FEW,
            ],
        };
        match op {
            Op::Conv3d => conv3d,
            Op::Stage => stage,
            Op::StageGradient => gradient,
        }
    }

    /// Whether a block of a stage may compute all phases of its tile: on tensor cores, if it loads
    /// all of its input channels, of that number of chunks, at once. Weights are laid out the same
    /// either way.
    fn may_make_all_phases(self, op: Op, chunks: usize) -> bool {
        op == Op::Stage && matches!(self, Kernel::Mma(_)) && chunks == 1
    }

    /// How blocks share an op's work by the rule of thumb, given their number for a phase and the
    /// number of chunks of channels: they make all phases if there are enough of them to keep a GPU
    /// busy.
    fn share(self, op: Op, blocks: usize, chunks: usize) -> Share {
        if self.may_make_all_phases(op, chunks) && blocks * 2 > BLOCKS {
            return Share::AllPhases;
        }
        Share::SplitK(self.split_k(if op == Op::Stage { 8 * blocks } else { blocks }, chunks))
    }

    /// The other ways to share it.
    fn other_shares(self, op: Op, blocks: usize, chunks: usize) -> Vec<Share> {
        if self.may_make_all_phases(op, chunks) {
            return vec![Share::AllPhases, Share::SplitK(1)];
        }
        if !matches!(self, Kernel::Mma(_)) {
            return vec![];
        }
        let blocks = if op == Op::Stage { 8 * blocks } else { blocks };
        let sensible = |n: &usize| *n == 1 || *n <= chunks && blocks * n <= MOST_BLOCKS;
        SPLITS_OF_K.into_iter().filter(sensible).map(Share::SplitK).collect()
    }

    fn threads(self) -> usize {
        if matches!(self, Kernel::Mma(_)) { 128 } else { 256 }
    }

    /// The number of blocks that share a tile, given the `blocks` there would be otherwise and the
    /// number of chunks of channels.
    fn split_k(self, blocks: usize, chunks: usize) -> usize {
        if !matches!(self, Kernel::Mma(_)) || blocks * 2 > BLOCKS {
            return 1;
        }
        let wanted = (BLOCKS / blocks).min(chunks);
        chunks.div_ceil(chunks / wanted)
    }

    /// Bytes of shared memory of a block: the halo tile, `reach` voxels wider than the tile, which
    /// the staged result later replaces.
    fn shared(self, reach: usize, dtype: DType) -> usize {
        let voxels: usize = TILE.iter().map(|t| t + reach).product();
        let halo = match self {
            Kernel::Mma(chunk) => voxels * (chunk * dtype.bytes() + 16),
            Kernel::MmaOneChannel => voxels * dtype.bytes(),
            Kernel::Simt => voxels * 17 * 4,
            Kernel::SimtAnyChannels => voxels * 4,
        };
        if matches!(self, Kernel::Mma(_)) { halo } else { halo.max(STAGED) }
    }
}

impl Packed {
    /// Lays out convolutions (one, or the phases of a stage) that have the same shape.
    ///
    /// Weights whose home is the device are laid out there, others on the host.
    pub fn new(cuda: &Cuda, convs: &[&PackedConv], dtype: DType) -> Result<Arc<Packed>, OpError> {
        let (first, outputs) = (convs[0], convs[0].out_channels());
        let kernel = Kernel::of(first.in_channels(), first.taps, cuda.products());
        let bias = match first.bias_on(cuda) {
            Some(bias) => bias.to_device(cuda, DType::F32)?,
            None if first.has_bias() => {
                first.fetch()?;
                cuda.upload(first.biases())?
            }
            None => {
                let zeros = cuda.allocate(outputs, DType::F32)?;
                cuda.clear(&zeros)?;
                zeros
            }
        };
        let weights = match Packed::laid_out_there(cuda, convs, kernel, dtype)? {
            Some(weights) => weights,
            None => Packed::laid_out_here(cuda, convs, kernel, dtype)?,
        };
        Ok(Arc::new(Packed { kernel, weights, bias, outputs }))
    }

    /// Lays out weights whose home is the device; none if they are not, or are not contiguous.
    fn laid_out_there(
        cuda: &Cuda,
        convs: &[&PackedConv],
        kernel: Kernel,
        dtype: DType,
    ) -> Result<Option<Arc<Memory>>, OpError> {
        let all: Option<Vec<_>> = convs.iter().map(|conv| conv.given_on(cuda)).collect();
        let Some(all) = all else { return Ok(None) };
        let (conv, given) = (convs[0], all[0]);
        let from = given.values.to_device(cuda, DType::F32)?;
        let phase = all.get(1).map_or(0, |next| next.start.saturating_sub(given.start));
        for (p, other) in all.iter().enumerate() {
            let same = Arc::ptr_eq(&from, &other.values.to_device(cuda, DType::F32)?)
                && (other.row, other.mirrored) == (given.row, given.mirrored);
            if !same || other.start != given.start + p * phase {
                return Ok(None);
            }
        }
        let single = kernel == Kernel::MmaOneChannel;
        let (dtype, lay_out) = match (kernel.on_matrices(), dtype) {
            (true, DType::F32) => (DType::F32, kernels::CONV3D_LAY_OUT_TF32),
            (true, dtype) => (dtype, kernels::CONV3D_LAY_OUT.of(dtype)?),
            (false, _) => (DType::F32, kernels::CONV3D_LAY_OUT_F32),
        };
        let (ins, outs, taps) = (conv.in_channels(), conv.out_channels(), conv.taps);
        let (chunk, wide) = (kernel.chunk(), outs.next_multiple_of(OUT));
        // The taps of a single channel are laid out as channels.
        let (channels, chunks, steps) =
            if single { (1, 1, chunk) } else { (chunk, ins.div_ceil(chunk), taps * chunk) };
        let to = cuda.allocate(convs.len() * chunks * steps * wide, dtype)?;
        let (lines, run) = if given.mirrored { (channels, LAID_OUT) } else { (LAID_OUT, channels) };
        let launch = Launch {
            grid: [wide / LAID_OUT, chunks, convs.len()],
            shared: lines * ((run * taps) | 1) * 4,
            ..Launch::per_element(0)
        }
        .with_cost(0, convs.len() * ins * outs * taps * 4 + to.bytes());
        cuda.launch(
            lay_out,
            launch,
            kernels::Conv3dLayOutArgs {
                from: from.at(given.start * 4),
                to: (&to).into(),
                phase: phase.into(),
                row: given.row.into(),
                ins: ins.into(),
                outs: outs.into(),
                taps: taps.into(),
                chunk: chunk.into(),
                mirrored: given.mirrored.into(),
                single: single.into(),
            },
        )?;
        Ok(Some(to))
    }

    /// Lays out weights on the host: the reference for the device's own layout.
    fn laid_out_here(
        cuda: &Cuda,
        convs: &[&PackedConv],
        kernel: Kernel,
        dtype: DType,
    ) -> Result<Arc<Memory>, OpError> {
        let (first, outputs) = (convs[0], convs[0].out_channels());
        convs.iter().try_for_each(|conv| conv.fetch())?;
        let (inputs, taps) = if kernel == Kernel::MmaOneChannel {
            (first.taps, 1)
        } else {
            (first.in_channels(), first.taps)
        };
        let (chunk, wide) = (kernel.chunk(), outputs.next_multiple_of(OUT));
        let chunks = inputs.div_ceil(chunk);
        let per_chunk = taps * chunk * wide;
        // Elements of a register, of the 16 bytes that a lane reads, and of a fragment along the
        // inputs.
        let each = 4 / dtype.bytes();
        let (piece, along) = (4 * each, 8 * each);
        // Taps along an axis.
        let edge = if taps == 27 { 3 } else { taps.ilog2() as usize / 3 + 1 };
        let raw: Vec<_> = convs.iter().map(|conv| conv.raw(cuda.cpu())).collect();
        let mut values = cuda.cpu().zeros(convs.len() * chunks * per_chunk);
        cuda.cpu().chunks_mut(&mut values, per_chunk, |unit, to| {
            let (phase, group) = (unit / chunks, unit % chunks);
            for (at, v) in to.iter_mut().enumerate() {
                let (i, o, tap) = match kernel {
                    // [tap along d][along w][chunk / along][along h][outs /
                    // 16][lane][tile][register][element]
                    Kernel::Mma(_) | Kernel::MmaOneChannel => {
                        let (element, lane) = (at % piece, at / piece % 32);
                        let block = at / piece / 32;
                        let (pair, step) = (block % (wide / 16), block / (wide / 16));
                        let (tile, register, low) =
                            (element / each / 2, element / each % 2, element % each);
                        let depth = chunk / along;
                        let (h, deep, side) =
                            (step % edge, step / edge % depth, step / edge / depth);
                        let (d, w) = (side / edge, side % edge);
                        (
                            deep * along + register * along / 2 + lane % 4 * each + low,
                            pair * 16 + tile * 8 + lane / 4,
                            (d * edge + h) * edge + w,
                        )
                    }
                    // [tap][chunk][outs]
                    Kernel::Simt | Kernel::SimtAnyChannels => {
                        (at / wide % chunk, at % wide, at / wide / chunk)
                    }
                };
                let i = group * chunk + i;
                if i < inputs && o < outputs {
                    *v = if kernel == Kernel::MmaOneChannel {
                        raw[phase].weight(o, 0, i)
                    } else {
                        raw[phase].weight(o, i, tap)
                    };
                }
            }
        });
        Ok(upload(cuda, &values, if kernel.on_matrices() { dtype } else { DType::F32 })?)
    }

    /// Whether rolling planes can do the work, and were asked for: by the rule of thumb they then
    /// do it.
    fn rolls(&self, cuda: &Cuda, op: Op, x: &ConvInput, channels: usize) -> bool {
        let fits =
            self.kernel == Kernel::Mma(32) && [channels, self.outputs] == [rolling::CHANNELS; 2];
        cuda.uses_wgmma() && op == Op::Conv3d && fits && !x.prologue.max_pool
    }

    /// Runs the op's kernel over loaded map `extent` `[n, d, h, w, c]`; `start` is an initial map
    /// in place of the bias. A stage has 8 phases and a result of twice the size.
    pub fn run(
        &self,
        cuda: &Cuda,
        op: Op,
        x: &ConvInput,
        extent: [usize; 5],
        start: Option<&Tensor>,
        sums: bool,
    ) -> Result<ConvOutput, OpError> {
        let (dtype, [n, d, h, w, c]) = (cuda.precision(), extent);
        let gathers = op == Op::StageGradient;
        let (phases, taps) =
            if start.is_some() { (8, 8) } else { (1, if gathers { 8 } else { 27 }) };
        let up = if phases == 8 { 2 } else { 1 };
        let shape = [n, up * d, up * h, up * w, self.outputs];
        let tiles: usize =
            [d, h, w].iter().zip(TILE).map(|(edge, tile)| edge.div_ceil(tile)).product();
        // Phases that have blocks of their own.
        let blocks = tiles * self.outputs.div_ceil(OUT) * n;
        let chunks = c.div_ceil(self.kernel.chunk()) * if gathers { 8 } else { 1 };
        let (share, _launches) = cuda.choose(
            op.choice(),
            format_args!("n{n}c{c}o{}d{d}h{h}w{w}p{}", self.outputs, u8::from(x.prologue.max_pool)),
            match self.rolls(cuda, op, x, c) {
                true => Share::RollingPlanes,
                false => self.kernel.share(op, blocks, chunks),
            },
            || self.kernel.other_shares(op, blocks, chunks),
        );
        let (all_phases, split_k) = match share {
            Share::SplitK(blocks) => (false, blocks),
            Share::AllPhases => (true, 1),
            Share::RollingPlanes => {
                return rolling::run(cuda, &self.weights, &self.bias, x, extent, sums);
            }
        };
        let out = cuda.allocate(shape.iter().product(), dtype)?;
        let apart = if all_phases { 1 } else { phases };
        // Sums for the norm that follows come from the blocks, or from those that reduce the
        // workspace.
        let fine = up.pow(3) * d * h * w;
        let parts = if split_k > 1 { fine.div_ceil(REDUCED) } else { tiles * apart };
        let partial =
            sums.then(|| cuda.allocate_bytes(n * parts * self.outputs * 16)).transpose()?;
        let splitk_workspace = (split_k > 1)
            .then(|| cuda.allocate(split_k * n * fine * self.outputs, DType::F32))
            .transpose()?;
        let map = x.map.to_device(cuda, dtype)?;
        let [norm, add] = x.prologue.on_device(cuda, dtype)?;
        let from = start.map(|s| s.to_device(cuda, dtype)).transpose()?;
        let bias = if start.is_some() { Pointer::none() } else { (&self.bias).into() };
        let voxels = n * d * h * w * phases;
        let flops = 2 * voxels * taps * c * self.outputs * if gathers { 8 } else { 1 };
        let loaded = x.map.len() * (1 + usize::from(x.prologue.add.is_some()));
        let bytes = (loaded + voxels * self.outputs * (1 + usize::from(start.is_some())))
            * dtype.bytes()
            + self.weights.bytes();
        let grid = [tiles, self.outputs.div_ceil(OUT), n * apart * split_k];
        let reach = if taps == 27 || all_phases { 2 } else { 1 };
        let (threads, shared) = (self.kernel.threads(), self.kernel.shared(reach, dtype));
        cuda.launch(
            self.kernel.typed(op, all_phases, cuda.products())?,
            Launch { grid, threads, shared, ..Launch::per_element(0) }.with_cost(flops, bytes),
            Args {
                x: (&map).into(),
                norm: (&norm).into(),
                add: (&add).into(),
                weights: (&self.weights).into(),
                bias,
                start: (&from).into(),
                out: (&out).into(),
                partial: (&partial).into(),
                d: d.into(),
                h: h.into(),
                w: w.into(),
                c: c.into(),
                outs: self.outputs.into(),
                phases: phases.into(),
                pool: x.prologue.max_pool.into(),
                slope: x.prologue.slope(),
                split_k: split_k.into(),
                splitk_workspace: (&splitk_workspace).into(),
            },
        )?;
        if let Some(splitk_workspace) = splitk_workspace {
            let grid = [fine.div_ceil(REDUCED), self.outputs.div_ceil(OUT), n];
            let count = n * fine * self.outputs;
            let launch = Launch { grid, shared: 8 * OUT * 2 * 4, ..Launch::per_element(0) }
                .with_cost(0, count * (4 * split_k + dtype.bytes()));
            cuda.launch(
                kernels::CONV3D_SPLITK_REDUCE.of(dtype)?,
                launch,
                kernels::Conv3dSplitkReduceArgs {
                    splitk_workspace: (&splitk_workspace).into(),
                    bias,
                    start: (&from).into(),
                    out: (&out).into(),
                    partial: (&partial).into(),
                    voxels: fine.into(),
                    outs: self.outputs.into(),
                    split_k: split_k.into(),
                },
            )?;
        }
        let count = (d * h * w * phases) as f64;
        let sums = partial.map(|partial| Sums::on_device(partial, parts, n * self.outputs, count));
        Ok(ConvOutput { map: Tensor::from_device(shape, out, dtype), sums, pooled: None })
    }
}

pub fn conv3d(
    cuda: &Cuda,
    x: &ConvInput,
    extent: [usize; 5],
    conv: &PackedConv,
    sums: bool,
) -> Result<ConvOutput, OpError> {
    let packed = conv
        .on_cuda
        .get(cuda, cuda.precision(), || Packed::new(cuda, &[conv], cuda.precision()))?;
    packed.run(cuda, Op::Conv3d, x, extent, None, sums)
}

/// Input channels of a block of a weight gradient in plain arithmetic.
const IN: usize = 16;
/// The most blocks that share weights: their sums are added up in order.
const SPLITS: usize = 256;
/// On tensor cores, the number of blocks that keep a GPU busy: two rounds of one block per
/// multiprocessor. If two blocks run side by side on one, there are twice as many.
const WEIGHT_BLOCKS: usize = 256;
/// The fewest planes that such a block goes over.
const PLANES: usize = 4;

/// How many blocks share weights.
#[derive(Clone, Copy, PartialEq)]
struct Splits(usize);

impl fmt::Display for Splits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} parts", self.0)
    }
}

/// How the blocks of a weight gradient are laid out: the number that share weights, the number side
/// by side over channels, threads, bytes of shared memory.
struct WeightBlocks {
    splits: Splits,
    across: usize,
    threads: usize,
    shared: usize,
}

impl WeightBlocks {
    /// In plain arithmetic: tiles of the convolution, and the input's halo, in float. About
    /// `wanted` blocks.
    fn plain(
        [n, d, h, w, c]: [usize; 5],
        outs: usize,
        phases: usize,
        wanted: usize,
    ) -> WeightBlocks {
        let tiles: usize =
            [d, h, w].iter().zip(TILE).map(|(edge, tile)| edge.div_ceil(tile)).product();
        let across = c.div_ceil(IN) * outs.div_ceil(OUT);
        let reach = if phases == 8 { 1 } else { 2 };
        let voxels: usize = TILE.iter().map(|t| t + reach).product();
        WeightBlocks {
            splits: Splits((wanted / (across * phases)).clamp(1, SPLITS).min(n * tiles)),
            across,
            threads: 256,
            shared: (voxels * (IN + 1) + 256 * (OUT + 1)) * 4,
        }
    }

    /// On tensor cores: columns of 8 x 8 voxels, cut along d if there are few, the same number of
    /// pieces for each block. The kernel itself works out how columns are cut for this number of
    /// blocks. About `wanted` blocks, if one is on a multiprocessor at a time.
    fn matrix(
        [n, d, h, w, c]: [usize; 5],
        outs: usize,
        phases: usize,
        adds: bool,
        wanted: usize,
    ) -> WeightBlocks {
        let (edge, beside) = if phases == 8 { (2, 2) } else { (3, 1) };
        let across = c.div_ceil(OUT) * outs.div_ceil(OUT);
        let wanted = (wanted * beside / (across * phases)).max(1);
        let columns = n * h.div_ceil(8) * w.div_ceil(8);
        let parts = (wanted / columns).clamp(1, (d / PLANES).max(1));
        let runs = columns * d.div_ceil(d.div_ceil(parts));
        // Four buffers of a plane of the input, of the map that is added to it, and of the
        // gradient.
        let voxels = 64 * (1 + usize::from(adds)) + (8 + edge - 1) * (8 + edge - 1);
        WeightBlocks {
            splits: Splits(runs.div_ceil(runs.div_ceil(wanted))),
            across,
            threads: 128 * edge,
            shared: 4 * voxels * (OUT + 8) * 2,
        }
    }
}

/// The gradient of the weights of a convolution (1 phase: `[out, in, 3, 3, 3]`) or of a decoder
/// stage (8: `[8, out, in, 2, 2, 2]`, composed), added to the gradient so far. `extent` is that of
/// the loaded input.
pub(crate) fn weight_gradient(
    cuda: &Cuda,
    x: &ConvInput,
    extent: [usize; 5],
    dy: &Tensor,
    phases: usize,
    so_far: Option<Tensor>,
) -> Result<Tensor, OpError> {
    let (dtype, [n, d, h, w, c], outs) = (cuda.precision(), extent, dy.channels());
    let taps = if phases == 8 { 8 } else { 27 };
    // With `part` / `of` of the number of blocks that the rule of thumb wants.
    let blocks = |part: usize, of: usize| match dtype {
        DType::F32 => WeightBlocks::plain(extent, outs, phases, SPLITS * 4 * part / of),
        _ => {
            let adds = x.prologue.add.is_some();
            WeightBlocks::matrix(extent, outs, phases, adds, WEIGHT_BLOCKS * part / of)
        }
    };
    let WeightBlocks { splits, across, threads, shared } = blocks(1, 1);
    let (Splits(splits), _launches) = cuda.choose(
        "weight_gradient",
        format_args!("n{n}c{c}o{outs}d{d}h{h}w{w}p{phases}"),
        splits,
        || [(1, 4), (1, 2), (2, 1)].map(|(part, of)| blocks(part, of).splits).into(),
    );
    let each = phases * taps * c * outs;
    let partial = cuda.allocate(splits * each, DType::F32)?;
    let (map, gradient) = (x.map.to_device(cuda, dtype)?, dy.to_device(cuda, dtype)?);
    let [norm, add] = x.prologue.on_device(cuda, dtype)?;
    let vector = if dtype == DType::F32 { 4 } else { 8 };
    let whole = c.is_multiple_of(vector) && outs.is_multiple_of(vector);
    // On tensor cores a map is pooled by a separate kernel, or by the kernel that takes any map.
    let pools = x.prologue.max_pool && dtype != DType::F32;
    let family = match (whole, taps, pools) {
        (true, 27, false) => kernels::WEIGHT_GRADIENT_27,
        (true, 27, true) => kernels::WEIGHT_GRADIENT_POOLED_27,
        (true, _, false) => kernels::WEIGHT_GRADIENT_8,
        (false, 27, _) => kernels::WEIGHT_GRADIENT_FEW_27,
        _ => kernels::WEIGHT_GRADIENT_FEW_8,
    };
    let flops = 2 * n * d * h * w * phases * taps * c * outs;
    let bytes = (x.map.len() * (1 + usize::from(x.prologue.add.is_some())) + dy.len())
        * dtype.bytes()
        + each * 4;
    let launch =
        Launch { grid: [splits, across, phases], threads, shared, ..Launch::per_element(0) }
            .with_cost(flops, bytes);
    cuda.launch(
        family.of(dtype)?,
        launch,
        kernels::WeightGradient27Args {
            x: (&map).into(),
            norm: (&norm).into(),
            add: (&add).into(),
            dy: (&gradient).into(),
            partial: (&partial).into(),
            items: n.into(),
            d: d.into(),
            h: h.into(),
            w: w.into(),
            c: c.into(),
            outs: outs.into(),
            phases: phases.into(),
            pool: x.prologue.max_pool.into(),
            slope: x.prologue.slope(),
        },
    )?;
    weight_total(cuda, &partial, splits, [phases, taps, c, outs], so_far)
}

impl Prologue {
    /// On a device, where they are: the coefficients of the norm, and the map to add.
    pub(super) fn on_device(
        &self,
        cuda: &Cuda,
        dtype: DType,
    ) -> Result<[Option<Arc<Memory>>; 2], CudaError> {
        let norm = self.norm.as_ref().map(|norm| norm.coefficients().to_device(cuda, DType::F32));
        let add = self.add.as_ref().map(|add| add.to_device(cuda, dtype));
        Ok([norm.transpose()?, add.transpose()?])
    }
}

/// The gradient of a map before pooling, see [`grad::unpool`](super::grad::unpool).
pub(crate) fn unpool(cuda: &Cuda, x: &ConvInput, g: &Tensor) -> Result<Tensor, OpError> {
    let ([n, d, h, w, c], dtype) = (g.map5("unpool", "g")?, cuda.precision());
    let out = cuda.allocate(x.map.len(), dtype)?;
    let (map, gradient) = (x.map.to_device(cuda, dtype)?, g.to_device(cuda, dtype)?);
    let [norm, add] = x.prologue.on_device(cuda, dtype)?;
    let each = d * h * w * c;
    let launch = Launch::per_element(each)
        .for_each(n)
        .with_cost(8 * g.len(), (2 * x.map.len() + g.len()) * dtype.bytes());
    cuda.launch(
        kernels::UNPOOL.of(dtype)?,
        launch,
        kernels::UnpoolArgs {
            x: (&map).into(),
            norm: (&norm).into(),
            add: (&add).into(),
            dy: (&gradient).into(),
            dx: (&out).into(),
            count: each.into(),
            d: d.into(),
            h: h.into(),
            w: w.into(),
            c: c.into(),
            slope: x.prologue.slope(),
        },
    )?;
    Ok(Tensor::from_device(x.map.shape(), out, dtype))
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::device::Cpu;
    use crate::device::cuda::Arena;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    /// Weights whose home is the device are laid out there, bit by bit as on the host: for every
    /// kernel, for a part of the inputs, and mirrored.
    #[test]
    fn weights_are_laid_out_on_the_device_as_on_the_host() {
        let noise = |shape: &[usize]| {
            let count: usize = shape.iter().product();
            Tensor::new(shape, (0..count).map(|i| (i * 7919 % 2039) as f32 / 997.0 - 1.0).collect())
        };
        for precision in [Precision::F32, Precision::Ieee, Precision::F16, Precision::Bf16] {
            let cuda = Cuda::emulated(Cpu::new(4).unwrap(), precision, 0);
            let dtype = cuda.precision();
            let resident = |t: &Tensor| {
                let memory = t.to_device(&cuda, DType::F32).unwrap();
                Tensor::from_device(t.shape(), memory, DType::F32)
            };
            for (outs, inputs, used) in [
                (35, 45, 2..42),
                (16, 17, 1..17),
                (32, 64, 0..64),
                (5, 9, 3..6),
                (20, 24, 4..24),
                (33, 2, 1..2),
                (1, 40, 0..8),
            ] {
                let (weight, bias) = (noise(&[outs, inputs, 3, 3, 3]), noise(&[outs]));
                let [here, there] =
                    [(weight.clone(), bias.clone()), (resident(&weight), resident(&bias))].map(
                        |(w, b)| {
                            let conv =
                                PackedConv::new(cuda.cpu(), &w, used.clone(), Some(&b)).unwrap();
                            let mirrored = super::super::grad::mirrored(cuda.cpu(), &conv);
                            [conv, mirrored]
                        },
                    );
                for (here, there) in here.iter().zip(&there) {
                    let before = cuda.transfers();
                    let there = Packed::new(&cuda, &[there], dtype).unwrap();
                    assert_eq!(cuda.transfers(), before, "it took the way over the host");
                    let here = Packed::new(&cuda, &[here], dtype).unwrap();
                    let bytes = |memory: &Arc<Memory>| {
                        let mut bytes = vec![0u8; memory.bytes()];
                        cuda.download(memory, &mut bytes).unwrap();
                        bytes
                    };
                    assert!(
                        bytes(&here.weights) == bytes(&there.weights)
                            && bytes(&here.bias) == bytes(&there.bias),
                        "{precision}, {outs} of {used:?}"
                    );
                }
            }
        }
    }

    /// Small numbers, whose products and sums are exact in float and in 16 bits.
    fn small(shape: &[usize], seed: usize) -> Tensor {
        let count: usize = shape.iter().product();
        let at = |i: usize| ((i + seed) * 7919 % 2039 % 9) as f32 - 4.0;
        Tensor::new(shape, (0..count).map(at).collect())
    }

    /// The gradient of the weights of a convolution (1 phase) or a stage (8), by its formula.
    fn plain_gradient(
        x: &Tensor,
        dy: &Tensor,
        [n, d, h, w, c]: [usize; 5],
        phases: usize,
    ) -> Vec<f32> {
        let (outs, up) = (dy.channels(), if phases == 8 { 2 } else { 1 });
        let (taps, edge) = if phases == 8 { (8, 2) } else { (27, 3) };
        let mut sums = vec![0.0; phases * outs * c * taps];
        let bits = |v: usize| [v >> 2, v >> 1 & 1, v & 1];
        for (at, sum) in sums.iter_mut().enumerate() {
            let (tap, i, o) = (at % taps, at / taps % c, at / taps / c % outs);
            let phase = bits(at / taps / c / outs);
            let tap = [tap / edge / edge, tap / edge % edge, tap % edge];
            for v in 0..n * d * h * w {
                let (item, v) = (v / (d * h * w), [v / (h * w) % d, v / w % h, v % w]);
                let from: [usize; 3] =
                    std::array::from_fn(|a| (v[a] + tap[a] + phase[a]).wrapping_sub(1));
                if from.iter().zip([d, h, w]).any(|(at, edge)| *at >= edge) {
                    continue;
                }
                let x_at = ((item * d + from[0]) * h + from[1]) * w + from[2];
                let to: [usize; 3] = std::array::from_fn(|a| up * v[a] + phase[a]);
                let dy_at = ((item * up * d + to[0]) * up * h + to[1]) * up * w + to[2];
                *sum += x.data()[x_at * c + i] * dy.data()[dy_at * outs + o];
            }
        }
        sums
    }

    /// For every form of a convolution's input, and for maps of one column and of several, which
    /// one block goes through or several share.
    #[test]
    fn gradients_of_weights_on_tensor_cores_are_those_of_the_formula() {
        let devices =
            [DType::F16, DType::Bf16].map(|dtype| Cuda::emulated(Cpu::new(4).unwrap(), dtype, 3));
        for (extent, outs, phases, pooled, added) in [
            ([1, 19, 8, 8, 8], 16, 1, false, true),
            ([2, 3, 9, 10, 40], 24, 1, false, true),
            ([1, 2, 8, 17, 40], 40, 1, false, false),
            ([1, 4, 3, 9, 24], 8, 1, true, true),
            ([1, 3, 9, 5, 5], 7, 1, true, false),
            ([2, 1, 1, 1, 1], 32, 1, false, false),
            ([1, 11, 8, 5, 16], 40, 8, false, false),
            ([2, 3, 9, 10, 6], 5, 8, false, false),
            ([1, 2, 3, 3, 8], 8, 8, true, false),
        ] {
            let [n, d, h, w, c] = extent;
            let (fine, up) = (1 + usize::from(pooled), if phases == 8 { 2 } else { 1 });
            let map = [n, fine * d, fine * h, fine * w, c];
            let (x, add) = (small(&map, 1), small(&map, 40));
            let dy = small(&[n, up * d, up * h, up * w, outs], 77);
            let mut input = ConvInput::shared(&x).plus(added.then_some(&add));
            // The input as the convolution loads it.
            let mut loaded = x.data().to_vec();
            if added {
                loaded.iter_mut().zip(add.data()).for_each(|(v, a)| *v += a);
            }
            if pooled {
                input = input.max_pooled();
                let (h, w) = (2 * h, 2 * w);
                let largest = |at: usize| {
                    let (i, v) = (at % c, at / c);
                    let (plane, j, k) = (v / (h * w / 4), v / (w / 2) % (h / 2), v % (w / 2));
                    let value = |q: usize| {
                        let row = (2 * plane + (q >> 2)) * h + 2 * j + (q >> 1 & 1);
                        loaded[(row * w + 2 * k + (q & 1)) * c + i]
                    };
                    (0..8).map(value).fold(f32::NEG_INFINITY, f32::max)
                };
                loaded = (0..n * d * h * w / 4 * c).map(largest).collect();
            }
            let loaded = Tensor::new([n, d, h, w, c], loaded);
            let once = plain_gradient(&loaded, &dy, extent, phases);
            // Added to the gradient so far: twice the sum.
            let twice: Vec<f32> = once.iter().map(|v| 2.0 * v).collect();
            for cuda in &devices {
                let what = format!("{}, {extent:?}, {outs}", cuda.precision());
                let of = |so_far| weight_gradient(cuda, &input, extent, &dy, phases, so_far);
                let got = of(None).unwrap();
                assert!(got.try_data().unwrap()[..] == once[..], "{what}");
                assert!(of(Some(got)).unwrap().try_data().unwrap()[..] == twice[..], "{what}, on");
            }
        }
    }

    /// Large maps keep a GPU busy without more sums than needed; small ones are not cut up.
    #[test]
    fn blocks_of_a_weight_gradient_have_the_same_share() {
        let splits =
            |e, outs, phases| WeightBlocks::matrix(e, outs, phases, false, WEIGHT_BLOCKS).splits.0;
        assert_eq!(splits([1, 128, 128, 128, 32], 32, 1), 256);
        assert_eq!(splits([1, 64, 64, 64, 64], 64, 1), 64);
        assert_eq!(splits([1, 16, 16, 16, 32], 32, 1), 16);
        assert_eq!(splits([1, 8, 8, 8, 384], 384, 1), 1);
        assert_eq!(splits([1, 64, 64, 64, 64], 32, 8), 32);
    }

    /// After a training step, weights are on the device, where they are laid out by the thread that
    /// records, which holds the device's stream, and before its work is recorded.
    #[test]
    fn weights_that_lie_on_the_device_are_laid_out_within_a_recording() {
        let (done, finished) = channel();
        std::thread::spawn(move || {
            let cuda = Cuda::emulated(Cpu::new(4).unwrap(), DType::F32, 0);
            let noise = |shape: &[usize]| {
                let count: usize = shape.iter().product();
                Tensor::new(
                    shape,
                    (0..count).map(|i| (i * 7919 % 997) as f32 / 997.0 - 0.5).collect(),
                )
            };
            let (extent, x, weight) =
                ([1, 2, 2, 2, 32], noise(&[1, 2, 2, 2, 32]), noise(&[32, 32, 3, 3, 3]));
            let resident = Tensor::from_device(
                weight.shape(),
                weight.to_device(&cuda, DType::F32).unwrap(),
                DType::F32,
            );
            let [there, here] =
                [&resident, &weight].map(|w| PackedConv::new(cuda.cpu(), w, 0..32, None).unwrap());
            let run = |conv: &PackedConv| {
                conv3d(&cuda, &ConvInput::shared(&x), extent, conv, false).map(|y| y.map)
            };
            let (graph, recorded) = cuda.record(&mut Arena::default(), || run(&there)).unwrap();
            graph.replay().unwrap();
            let values = |y: &Tensor| y.try_data().unwrap().to_vec();
            done.send((values(&recorded), values(&run(&here).unwrap()))).unwrap();
        });
        let (recorded, expected) =
            finished.recv_timeout(Duration::from_secs(60)).expect("the recording ends");
        assert_eq!(recorded, expected);
    }
}
