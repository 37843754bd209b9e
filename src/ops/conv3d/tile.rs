//! Loading a tile of the input into scratch memory that stays in the second-level cache.
//!
//! The tile holds `(ti + 2) × (tj + 2)` rows of `tk + 2` voxels, zero in the padding, in blocks of
//! input channels: `[block][row][voxel][channel of the block]`. The direct kernels take whole rows,
//! which divide best into strips. Norm, activation and addition happen here, once per value and
//! tile.

use super::{ConvInput, Prologue};
use crate::device::simd::{self, Access};
use crate::device::{Isa, ReadOnly};
use crate::microkernel::load_row::{ScratchRow, scatter_bf16_pairs, scatter_row};
use crate::ops::norm::ChannelNorm;

/// Scratch floats that a tile may take: half a megabyte, so that it and a block of weights share
/// the cache.
const BUDGET: usize = 160 << 10;

/// How many rows ahead of the one being loaded are prefetched.
const AHEAD: usize = 4;

/// The fewest voxels in a row of an even tile: shorter rows are read in too small pieces.
const SHORTEST: usize = 16;

/// The view of an already pooled [`ConvInput`] from which tiles are loaded row by row. Parts of its
/// map that no later tile reads may be overwritten.
pub struct TileSource<'a> {
    map: ReadOnly<'a, f32>,
    add: Option<&'a [f32]>,
    norm: Option<&'a ChannelNorm>,
}

impl<'a> TileSource<'a> {
    /// A view of an input that stays as it is.
    pub fn new(x: &'a ConvInput) -> TileSource<'a> {
        TileSource::of(ReadOnly::new(x.map.data()), &x.prologue)
    }

    /// A view of a map in memory that the output may take.
    pub fn of(map: ReadOnly<'a, f32>, prologue: &'a Prologue) -> TileSource<'a> {
        let Prologue { norm, add, max_pool } = prologue;
        debug_assert!(!max_pool);
        TileSource { map, add: add.as_ref().map(|add| add.data()), norm: norm.as_ref() }
    }

    /// Prefetches values.
    fn prefetch(&self, start: usize, len: usize) {
        for at in (start..start + len).step_by(16) {
            simd::prefetch(self.map.wrapping_at(at), Access::Read);
            if let Some(add) = self.add {
                simd::prefetch(add.as_ptr().wrapping_add(at), Access::Read);
            }
        }
    }

    /// # Safety
    /// The values are within the map, and nothing writes to them meanwhile.
    unsafe fn row(&self, start: usize, len: usize) -> (&[f32], Option<&'a [f32]>) {
        // SAFETY: guaranteed by the caller.
        (unsafe { self.map.slice(start, len) }, self.add.map(|a| &a[start..][..len]))
    }
}

/// How a map is cut into tiles.
#[derive(Clone, Copy, Debug)]
pub struct Tiling {
    /// Voxels of a tile along d, h and w.
    pub tile: [usize; 3],
    /// Tiles along d, h and w.
    pub count: [usize; 3],
    /// Floats of an input block: its channels, or its pairs of channels.
    pub ic_block: usize,
    /// Whether a float holds two channels in bfloat16.
    pub bf16_pairs: bool,
    /// Blocks of input channels.
    pub blocks: usize,
}

impl Tiling {
    /// Cuts `[d, h, w]` with `channels` in blocks of `ic_block`, along d and h.
    pub fn new(size: [usize; 3], channels: usize, ic_block: usize) -> Tiling {
        Tiling::in_rows(size, channels, ic_block, false)
    }

    /// Cuts `[d, h, w]` along d and h, with `channels` in blocks of `ic_block`, two in a float.
    pub fn in_bf16_pairs(size: [usize; 3], channels: usize, ic_block: usize) -> Tiling {
        Tiling::in_rows(size, channels, ic_block, true)
    }

    /// Cuts a map of whole cells along all three axes, into tiles of whole cells at most `deepest`
    /// deep that load the fewest voxels more than once.
    pub fn in_cells(
        [d, h, w]: [usize; 3],
        cell: [usize; 3],
        channels: usize,
        ic_block: usize,
        deepest: usize,
    ) -> Tiling {
        let floats = channels.next_multiple_of(ic_block);
        let loaded = |(tile, side): (&usize, usize)| side + 2 * side.div_ceil(*tile);
        let cost = |tile: &[usize; 3]| tile.iter().zip([d, h, w]).map(loaded).product::<usize>();
        let sides = |side: usize, cell: usize| {
            (1..=side / cell).map(move |parts| side.div_ceil(parts).next_multiple_of(cell))
        };
        let fit = sides(w, cell[2]).filter(|k| *k >= SHORTEST.min(w)).flat_map(|k| {
            let fits = move |i: usize, j: usize| (i + 2) * (j + 2) * (k + 2) * floats <= BUDGET;
            sides(d, cell[0])
                .filter(|i| *i <= deepest)
                .filter_map(move |i| sides(h, cell[1]).find(|j| fits(i, *j)).map(|j| [i, j, k]))
        });
        let tile = fit.min_by_key(cost).unwrap_or([cell[0], cell[1], w]);
        Tiling::of(tile, [d, h, w], channels, ic_block, false)
    }

    fn of(
        tile: [usize; 3],
        size: [usize; 3],
        channels: usize,
        ic_block: usize,
        bf16_pairs: bool,
    ) -> Tiling {
        let count = std::array::from_fn(|axis| size[axis].div_ceil(tile[axis]));
        Tiling {
            tile,
            count,
            ic_block: if bf16_pairs { ic_block / 2 } else { ic_block },
            bf16_pairs,
            blocks: channels.div_ceil(ic_block),
        }
    }

    fn in_rows(
        [d, h, w]: [usize; 3],
        channels: usize,
        ic_block: usize,
        bf16_pairs: bool,
    ) -> Tiling {
        let row = (w + 2) * ic_block * channels.div_ceil(ic_block) / if bf16_pairs { 2 } else { 1 };
        let fits = |ti: usize, tj: usize| (ti + 2) * (tj + 2) * row <= BUDGET;
        let mut tile = [1, 1];
        // Enlarge the sides in turn; the halo is smallest when they are equal.
        loop {
            let grow_h = (tile[0], (tile[1] + 1).min(h));
            let grow_d = ((tile[0] + 1).min(d), tile[1]);
            let next = [grow_h, grow_d].into_iter().filter(|&(a, b)| [a, b] != tile && fits(a, b));
            match next.min_by_key(|&(a, b)| a.max(b)) {
                Some((a, b)) => tile = [a, b],
                None => break,
            }
        }
        // Make the tiles equal, so that the last is not a sliver.
        let count = [d.div_ceil(tile[0]), h.div_ceil(tile[1])];
        let tile = [d.div_ceil(count[0]), h.div_ceil(count[1]), w];
        Tiling::of(tile, [d, h, w], channels, ic_block, bf16_pairs)
    }

    /// Tiles of one item.
    pub fn tiles(&self) -> usize {
        self.count.iter().product()
    }

    /// Floats from one row of scratch to the next.
    pub fn row_stride(&self) -> usize {
        (self.tile[2] + 2) * self.ic_block
    }

    /// Floats from one d-plane of scratch to the next.
    pub fn plane_stride(&self) -> usize {
        (self.tile[1] + 2) * self.row_stride()
    }

    /// Floats from one input block of scratch to the next.
    pub fn block_stride(&self) -> usize {
        (self.tile[0] + 2) * self.plane_stride()
    }

    /// Offsets of the 27 taps of a 3×3×3 neighbourhood.
    pub fn taps27(&self) -> Vec<isize> {
        let step = |axis: usize, stride: usize| (axis as isize - 1) * stride as isize;
        (0..27)
            .map(|t| {
                step(t / 9, self.plane_stride())
                    + step(t / 3 % 3, self.row_stride())
                    + step(t % 3, self.ic_block)
            })
            .collect()
    }

    /// Floats of scratch.
    pub fn scratch(&self) -> usize {
        self.blocks * self.block_stride()
    }

    /// The first voxel and the number of voxels of tile `t`, along d, h and w.
    pub fn part(&self, t: usize, size: [usize; 3]) -> ([usize; 3], [usize; 3]) {
        let [_, down, across] = self.count;
        let at = [t / across / down, t / across % down, t % across];
        let first = std::array::from_fn(|axis| at[axis] * self.tile[axis]);
        (first, std::array::from_fn(|axis| self.tile[axis].min(size[axis] - first[axis])))
    }

    /// [`Tiling::part`] of a tiling in whole rows: the first row and the number of rows, along d
    /// and h.
    pub fn rows(&self, t: usize, d: usize, h: usize) -> ([usize; 2], [usize; 2]) {
        let ([i, j, _], [ni, nj, _]) = self.part(t, [d, h, self.tile[2]]);
        ([i, j], [ni, nj])
    }

    /// Fills `scratch` with the rows around tile `t` of item `n`.
    ///
    /// # Safety
    /// Nothing writes meanwhile to the rows of the input that belong to the tile and its halo.
    pub unsafe fn load(
        &self,
        isa: Isa,
        x: &TileSource,
        extent: [usize; 5],
        n: usize,
        t: usize,
        scratch: &mut [f32],
    ) {
        let [_, d, h, w, c] = extent;
        let ([i0, j0, k0], [ni, nj, nk]) = self.part(t, [d, h, w]);
        // The voxels of a row and its halo that exist, and whether there is padding before and
        // after them.
        let voxels = k0.saturating_sub(1)..(k0 + nk + 1).min(w);
        let padding = [usize::from(k0 == 0), usize::from(k0 + nk == w)];
        let norm = x.norm.map(|norm| norm.item(n, c));
        // The beginning and length of the input row that a row of scratch is loaded from.
        let start = |i: usize, j: usize| (((n * d + i) * h + j) * w + voxels.start) * c;
        let len = voxels.len() * c;
        for pi in 0..ni + 2 {
            for pj in 0..nj + 2 {
                // The processor's prefetcher cannot predict where the next rows begin.
                let (behind, ahead) = ((pj + AHEAD) / (nj + 2), (pj + AHEAD) % (nj + 2));
                let (i, j) = ((i0 + pi + behind).wrapping_sub(1), (j0 + ahead).wrapping_sub(1));
                if i < d && j < h {
                    x.prefetch(start(i, j), len);
                }
                let at = pi * self.plane_stride() + pj * self.row_stride();
                let (i, j) = ((i0 + pi).wrapping_sub(1), (j0 + pj).wrapping_sub(1));
                if i >= d || j >= h {
                    for b in 0..self.blocks {
                        scratch[b * self.block_stride() + at..][..self.row_stride()].fill(0.0);
                    }
                    continue;
                }
                // SAFETY: the row lies within the map; the rest is guaranteed by the caller.
                let (row, add) = unsafe { x.row(start(i, j), len) };
                let place = ScratchRow {
                    at,
                    block_stride: self.block_stride(),
                    ic_block: self.ic_block,
                    padding,
                };
                let scatter_row = if self.bf16_pairs { scatter_bf16_pairs } else { scatter_row };
                scatter_row(isa, row, add, norm.as_ref(), c, place, scratch);
            }
        }
    }
}
