//! The convolution on CUDA devices, and what a decoder stage shares with it. See
//! `kernels/lib/conv.cuh`.

mod grad;
mod kernel;
mod layout;

pub(crate) use grad::{unpool, weight_gradient};

use super::weights::{Kernel, Packed};
use super::{ConvInput, ConvOutput, PackedConv, Prologue, rolling};
use crate::device::cuda::kernels::Conv3d16Args as Args;
use crate::device::cuda::{CudaError, Launch, Memory, Pointer, kernels};
use crate::device::{Cuda, DType};
use crate::ops::norm::Sums;
use crate::tensor::{OpError, Tensor};
use kernel::Share;
use std::sync::Arc;

/// Output voxels of a block along each axis, and its output channels.
const TILE: [usize; 3] = [4, 8, 8];
const OUT: usize = 32;
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

impl Packed {
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
