//! The kernels of a convolution and a decoder stage: which of them takes a map, and how blocks
//! share the work.

use super::{OUT, Op, TILE};
use crate::device::cuda::kernels::Conv3d16Args as Args;
use crate::device::cuda::{CudaError, Family, TypedKernel, kernels};
use crate::device::{DType, Precision};
use crate::ops::conv3d::weights::Kernel;
use std::fmt;

/// Bytes of a block's staged result with the bins of its sums, if it does not write from its
/// registers: `TILE * STAGE` and `8 * OUT * 2` floats.
const STAGED: usize = (256 * (OUT + 8) + 8 * OUT * 2) * 4;
/// The number of blocks that keep a GPU busy: if a map has fewer, several share a tile's input
/// channels.
const BLOCKS: usize = 320;
/// More blocks than that are not tried, nor other numbers of blocks that share a tile.
const MOST_BLOCKS: usize = 4 * BLOCKS;
const SPLITS_OF_K: [usize; 9] = [1, 2, 3, 4, 6, 8, 12, 16, 24];

/// How blocks share an op's work.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Share {
    /// So many blocks share a tile, or a phase of it, each with a part of its input channels.
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

impl Kernel {
    pub(super) fn of(channels: usize, taps: usize, precision: Precision) -> Kernel {
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
    pub(super) fn on_matrices(self) -> bool {
        matches!(self, Kernel::Mma(_) | Kernel::MmaOneChannel)
    }

    pub(super) fn chunk(self) -> usize {
        match self {
            Kernel::Mma(chunk) => chunk,
            Kernel::MmaOneChannel => 32,
            Kernel::Simt => 16,
            Kernel::SimtAnyChannels => 1,
        }
    }

    /// The kernel of an op.
    pub(super) fn typed(
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
    pub(super) fn share(self, op: Op, blocks: usize, chunks: usize) -> Share {
        if self.may_make_all_phases(op, chunks) && blocks * 2 > BLOCKS {
            return Share::AllPhases;
        }
        Share::SplitK(self.split_k(if op == Op::Stage { 8 * blocks } else { blocks }, chunks))
    }

    /// The other ways to share it.
    pub(super) fn other_shares(self, op: Op, blocks: usize, chunks: usize) -> Vec<Share> {
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

    pub(super) fn threads(self) -> usize {
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
    pub(super) fn shared(self, reach: usize, dtype: DType) -> usize {
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
