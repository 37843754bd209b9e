//! What the CPU bodies share about their outputs: where they are written, how they are divided into
//! units, and their sums.

use crate::device::{DisjointWriter, ReadOnly};

/// Floats of a map that is too large to stay in a cache until its reader runs.
pub(super) const STREAM: usize = 16 << 20;

/// Where rows of output are written, and where their initial values come from.
pub(crate) struct Target<'a> {
    /// The output map.
    pub out: &'a DisjointWriter<'a, f32>,
    /// An initial map of the same layout in place of the bias.
    pub init: Option<ReadOnly<'a, f32>>,
    /// Channels of the output map.
    pub channels: usize,
    /// Floats from one voxel of a row to the next.
    pub voxel: usize,
    /// Whether outputs bypass the caches: only if voxels are aligned to registers and nothing
    /// starts from them again.
    pub stream: bool,
}

/// Adds sums, values' and then squares', to as many of `[channel][value, square]` as there are.
pub(super) fn add_sums(sums: &[f64], to: &mut [f64]) {
    let squares = &sums[sums.len() / 2..];
    for ((to, value), square) in to.chunks_exact_mut(2).zip(sums).zip(squares) {
        to[0] += value;
        to[1] += square;
    }
}

/// The number of groups that the output blocks are divided into, so that a small map still keeps
/// every thread busy.
pub(crate) fn groups(tiles: usize, oc_blocks: usize) -> usize {
    // Fixed, independent of the thread count, so that the units, and with them the sums, are the
    // same everywhere.
    (32usize.div_ceil(tiles)).min(oc_blocks).max(1)
}
