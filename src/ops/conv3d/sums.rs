//! What the bodies on the CPU share about their outputs: where these go, how they are dealt out,
//! what is summed of them.

use crate::device::{DisjointWriter, ReadOnly};

/// Floats of a map that no cache holds until its reader comes.
pub(super) const STREAM: usize = 16 << 20;

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
    /// Whether outputs go past the caches: to voxels aligned to registers, that nothing starts from
    /// again.
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

/// How many groups the output blocks are dealt out in, so that a small map still keeps every thread
/// busy.
pub(crate) fn groups(tiles: usize, oc_blocks: usize) -> usize {
    // Fixed, not by thread count, so that the units, and with them the sums, are the same
    // everywhere.
    (32usize.div_ceil(tiles)).min(oc_blocks).max(1)
}
