//! The convolution of 32 to 32 channels by `wgmma`: see `kernels/conv3d_wgmma.cu`.

use super::{ConvInput, ConvOutput};
use crate::device::Cuda;
use crate::device::cuda::{Launch, Memory, kernels};
use crate::ops::norm::Sums;
use crate::tensor::{OpError, Tensor};
use std::sync::Arc;

/// Channels in and out.
pub(super) const CHANNELS: usize = 32;
/// Output voxels of a block along h and along w.
const EDGE: usize = 16;
/// Threads of a block: two warpgroups that multiply and one that loads.
const THREADS: usize = 384;
/// Bytes of shared memory of a block: five planes of the input with their borders, each four groups
/// of 8 channels with 32 bytes behind a group; the weights of nine taps, four groups of 8 channels
/// by 160 columns; sums of eight warps; two barriers per plane.
const SHARED: usize = 5 * 4 * ((EDGE + 2) * (EDGE + 2) * 16 + 32)
    + 9 * 4 * (5 * CHANNELS) * 16
    + 8 * CHANNELS * 2 * 8
    + 2 * 5 * 8;
/// Blocks that run at a time: one per multiprocessor, of which most GPUs with `wgmma` have as many.
const BLOCKS: usize = 132;
/// The fewest planes that a block computes, if there are as many, and those that the rest of its
/// work takes as long as: the planes on either side, and laying out the weights.
const PLANES: usize = 8;
const MORE: usize = 3;

/// The number of blocks that share a column of `d` planes, of `columns` columns: the one with which
/// the last block ends first, the smallest of several. None of them has nothing to do.
fn parts(columns: usize, d: usize) -> usize {
    let time = |parts: usize| (columns * parts).div_ceil(BLOCKS) * (d.div_ceil(parts) + MORE);
    let best = (1..=d / PLANES).min_by_key(|parts| time(*parts)).unwrap_or(1);
    d.div_ceil(d.div_ceil(best))
}

/// Convolves a map of [`CHANNELS`] channels that is not pooled on load; `weights` are laid out for
/// tensor cores in one chunk, as every other kernel reads them.
pub(super) fn run(
    cuda: &Cuda,
    weights: &Arc<Memory>,
    bias: &Arc<Memory>,
    x: &ConvInput,
    extent: [usize; 5],
    sums: bool,
) -> Result<ConvOutput, OpError> {
    let (dtype, [n, d, h, w, _]) = (cuda.precision(), extent);
    let (shape, voxels) = ([n, d, h, w, CHANNELS], n * d * h * w);
    let columns = h.div_ceil(EDGE) * w.div_ceil(EDGE);
    let parts = parts(n * columns, d);
    let tiles = columns * parts;
    let out = cuda.allocate(voxels * CHANNELS, dtype)?;
    let partial = sums.then(|| cuda.allocate_bytes(n * tiles * CHANNELS * 16)).transpose()?;
    let map = x.map.to_device(cuda, dtype)?;
    let [norm, add] = x.prologue.on_device(cuda, dtype)?;
    let maps = 2 + usize::from(add.is_some());
    let launch =
        Launch { grid: [tiles, n, 1], threads: THREADS, shared: SHARED, ..Launch::per_element(0) }
            .with_cost(
                2 * voxels * 27 * CHANNELS * CHANNELS,
                maps * voxels * CHANNELS * dtype.bytes() + weights.bytes(),
            );
    cuda.launch(
        kernels::CONV3D_ROLLING.of(dtype)?,
        launch,
        kernels::Conv3dRollingArgs {
            x: (&map).into(),
            norm: (&norm).into(),
            add: (&add).into(),
            weights: weights.into(),
            bias: bias.into(),
            out: (&out).into(),
            partial: (&partial).into(),
            d: d.into(),
            h: h.into(),
            w: w.into(),
            parts: parts.into(),
            slope: x.prologue.slope(),
        },
    )?;
    let count = (d * h * w) as f64;
    let sums = partial.map(|partial| Sums::on_device(partial, tiles, n * CHANNELS, count));
    Ok(ConvOutput { map: Tensor::from_device(shape, out, dtype), sums, pooled: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_cut_so_that_all_multiprocessors_have_work() {
        for (columns, d, expected) in
            [(64, 128, 2), (16, 64, 8), (4, 32, 4), (1, 7, 1), (1, 1, 1), (1, 17, 2), (200, 64, 3)]
        {
            assert_eq!(parts(columns, d), expected, "{columns} columns of {d}");
        }
        // No part is empty.
        for d in 1..100 {
            let parts = parts(3, d);
            assert!((parts - 1) * d.div_ceil(parts) < d, "{d} planes in {parts} parts");
        }
    }

    #[test]
    fn a_block_fits_on_a_multiprocessor() {
        assert_eq!(SHARED, 200_656);
    }
}
