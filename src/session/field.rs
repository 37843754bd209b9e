//! An answer on the scan's own grid: one logit per voxel, in tiles, of which only those exist that
//! hold something.
//!
//! Copies share their tiles, so that an undo history costs only what changed, and reading touches
//! only the object and not the whole scan.

use super::ANSWER;
use crate::memory::{self, Charge, Refused};
use crate::volume::include;
use crate::volume::resample::{Interpolation, sample_of};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Voxels along a tile's edge.
const EDGE: usize = 16;
/// A tile that holds nothing above this (a probability of 0.0025) need not exist.
const NEGLIGIBLE: f32 = -6.0;

/// The number of voxels of a tile.
pub(super) const TILE: usize = EDGE * EDGE * EDGE;
pub(super) type Logits = [f32; TILE];

/// Logits of a tile, charged to the memory budget for as long as a field holds them.
#[derive(Debug)]
pub(super) struct Tile {
    logits: Logits,
    _charge: Charge,
}

impl Tile {
    /// Unwinds to [`memory::caught`] if the budget refuses it.
    pub(super) fn new(logits: Logits) -> Arc<Tile> {
        Arc::new(Tile::charged(logits))
    }

    fn charged(logits: Logits) -> Tile {
        let charge = Charge::of::<Logits>(ANSWER, 1).unwrap_or_else(|e| memory::refuse(e));
        Tile { logits, _charge: charge }
    }
}

impl Clone for Tile {
    fn clone(&self) -> Tile {
        Tile::charged(self.logits)
    }
}

impl std::ops::Deref for Tile {
    type Target = Logits;
    fn deref(&self) -> &Logits {
        &self.logits
    }
}

/// Logits on a grid, positive on the object, and minus infinity where no value was ever set.
///
/// Copies share their tiles of 16³ voxels until one of them changes. Tiles are counted against the
/// memory budget: where one is refused, methods that return no `Result` unwind to
/// [`memory::caught`].
#[derive(Clone, Debug)]
pub struct Field {
    size: [usize; 3],
    tiles: BTreeMap<[u32; 3], Arc<Tile>>,
    sparse: bool,
}

/// A block of voxels, by its ranges along i, j, k.
pub type Block = [Range<usize>; 3];

impl Field {
    /// An empty field over `size` voxels. If it is `sparse`, tiles of negligible values are left
    /// out; otherwise every value that was written is kept.
    pub fn new(size: [usize; 3], sparse: bool) -> Field {
        Field { size, tiles: BTreeMap::new(), sparse }
    }

    /// Voxels of the grid along i, j and k.
    pub fn size(&self) -> [usize; 3] {
        self.size
    }

    fn inside([i, j, k]: [usize; 3]) -> usize {
        ((i % EDGE) * EDGE + j % EDGE) * EDGE + k % EDGE
    }

    fn key(voxel: [usize; 3]) -> [u32; 3] {
        voxel.map(|v| (v / EDGE) as u32)
    }

    /// The logit of a voxel; minus infinity if it was never set.
    pub fn get(&self, voxel: [usize; 3]) -> f32 {
        self.tiles
            .get(&Field::key(voxel))
            .map_or(f32::NEG_INFINITY, |tile| tile[Field::inside(voxel)])
    }

    /// Sets the logit of a voxel, which must be on the grid.
    pub fn set(&mut self, voxel: [usize; 3], value: f32) {
        let tile = self
            .tiles
            .entry(Field::key(voxel))
            .or_insert_with(|| Tile::new([f32::NEG_INFINITY; TILE]));
        Arc::make_mut(tile).logits[Field::inside(voxel)] = value;
    }

    /// Replaces every voxel of a block by the result of `change(voxel, value)`, tiles in parallel.
    /// Tiles in which nothing changes stay shared.
    pub fn edit(&mut self, block: &Block, change: impl Fn([usize; 3], f32) -> f32 + Sync) {
        if block.iter().any(Range::is_empty) {
            return;
        }
        let tiles = |a: usize| block[a].start / EDGE..(block[a].end - 1) / EDGE + 1;
        let rows = tiles(0).flat_map(|a| tiles(1).map(move |b| (a, b)));
        let all = rows.flat_map(|(a, b)| tiles(2).map(move |c| [a, b, c]));
        let all: Vec<[usize; 3]> = memory::counted(ANSWER, all);
        let mut edited = memory::list(ANSWER, all.len());
        let each = all.into_par_iter().map(|tile| self.edited(tile, block, &change));
        each.collect_into_vec(&mut edited);
        for (key, tile) in edited.into_iter().flatten() {
            match tile {
                Some(tile) => self.tiles.insert(key, tile),
                None => self.tiles.remove(&key),
            };
        }
    }

    /// Checks that there is memory for the tiles of a sparse field with the values of
    /// `value(voxel)`, before any of them is made.
    ///
    /// # Errors
    /// There is not enough.
    pub fn has_room(
        size: [usize; 3],
        value: impl Fn([usize; 3]) -> f32 + Sync,
    ) -> Result<(), Refused> {
        let [ni, nj, nk] = size;
        let [rows, across, along] = size.map(|n| n.div_ceil(EDGE));
        // The number of tiles that hold something among those with the same index along i.
        let held = |row: usize| {
            let mut holds = memory::filled(ANSWER, false, across * along);
            for (i, j) in
                (row * EDGE..ni.min((row + 1) * EDGE)).flat_map(|i| (0..nj).map(move |j| (i, j)))
            {
                for k in 0..nk {
                    holds[j / EDGE * along + k / EDGE] |= value([i, j, k]) > NEGLIGIBLE;
                }
            }
            holds.iter().filter(|h| **h).count()
        };
        memory::check::<Logits>(ANSWER, (0..rows).into_par_iter().map(held).sum())
    }

    /// A tile after a change, or nothing in its place if it became negligible; none if nothing
    /// changes.
    fn edited(
        &self,
        tile: [usize; 3],
        block: &Block,
        change: &(impl Fn([usize; 3], f32) -> f32 + Sync),
    ) -> Option<([u32; 3], Option<Arc<Tile>>)> {
        let key = tile.map(|t| t as u32);
        let mut new = self.tiles.get(&key).map_or([f32::NEG_INFINITY; TILE], |t| t.logits);
        let range =
            |a: usize| block[a].start.max(tile[a] * EDGE)..block[a].end.min((tile[a] + 1) * EDGE);
        let mut changed = false;
        for (i, j) in range(0).flat_map(|i| range(1).map(move |j| (i, j))) {
            for k in range(2) {
                let value = &mut new[Field::inside([i, j, k])];
                let next = change([i, j, k], *value);
                changed |= next.to_bits() != value.to_bits();
                *value = next;
            }
        }
        let negligible = self.sparse && new.iter().all(|v| *v <= NEGLIGIBLE);
        changed.then(|| (key, (!negligible).then(|| Tile::new(new))))
    }

    /// Calls `visit(index in [i][j][k] order, logit)` for every voxel of every existing tile.
    pub fn each(&self, mut visit: impl FnMut(usize, f32)) {
        let [_, nj, nk] = self.size;
        self.each_voxel(|[i, j, k], logit| visit((i * nj + j) * nk + k, logit));
    }

    /// Calls `visit(voxel, logit)` for every voxel of every existing tile.
    pub fn each_voxel(&self, mut visit: impl FnMut([usize; 3], f32)) {
        let [ni, nj, nk] = self.size;
        for (key, tile) in &self.tiles {
            let low = key.map(|k| k as usize * EDGE);
            for i in low[0]..(low[0] + EDGE).min(ni) {
                for j in low[1]..(low[1] + EDGE).min(nj) {
                    for k in low[2]..(low[2] + EDGE).min(nk) {
                        visit([i, j, k], tile[Field::inside([i, j, k])]);
                    }
                }
            }
        }
    }

    /// A dense array `[i][j][k]` of the result of `value` for each logit, and of `outside` where no
    /// tile exists.
    pub fn dense<T: Copy>(&self, outside: T, value: impl Fn(f32) -> T) -> Vec<T> {
        let mut out = memory::filled(ANSWER, outside, self.size.iter().product());
        self.each(|at, logit| out[at] = value(logit));
        out
    }

    /// Bytes of the tiles that it does not share with `other`; of all its tiles without one.
    pub fn bytes_beyond(&self, other: Option<&Field>) -> usize {
        let shared = |key: &[u32; 3], tile: &Arc<Tile>| {
            other.and_then(|o| o.tiles.get(key)).is_some_and(|o| Arc::ptr_eq(o, tile))
        };
        self.tiles.iter().filter(|(key, tile)| !shared(key, tile)).count() * size_of::<Logits>()
    }

    /// The number of voxels on the object: those with a positive logit.
    pub fn voxels(&self) -> usize {
        let mut count = 0;
        self.each(|_, logit| count += usize::from(logit > 0.0));
        count
    }

    /// The box of the object, `[i0, j0, k0, i1, j1, k1]`, ends exclusive; none if there is no
    /// object.
    pub fn bounds(&self) -> Option<[usize; 6]> {
        let [_, nj, nk] = self.size;
        let mut bounds: Option<[usize; 6]> = None;
        self.each(|at, logit| {
            if logit > 0.0 {
                include(&mut bounds, [at / nk / nj, at / nk % nj, at % nk]);
            }
        });
        bounds
    }

    /// A reader of values between voxels, with logits limited to plus and minus `most`. Making one
    /// takes time; each value then is quick.
    pub fn reader(&self, most: f32) -> Reader<'_> {
        let tiles = self.size.map(|s| s.div_ceil(EDGE));
        let mut index = memory::filled(ANSWER, None, tiles.iter().product());
        for (key, tile) in &self.tiles {
            let [a, b, c] = key.map(|k| k as usize);
            index[(a * tiles[1] + b) * tiles[2] + c] = Some(&tile.logits);
        }
        Reader { size: self.size, tiles, index, most }
    }

    /// The number of voxels that are on the object in one of two fields of the same size and not in
    /// the other.
    pub fn difference(&self, other: &Field) -> usize {
        let mut count = 0;
        let nothing = [f32::NEG_INFINITY; TILE];
        let keys: std::collections::BTreeSet<_> =
            self.tiles.keys().chain(other.tiles.keys()).collect();
        for key in keys {
            let (a, b) = (self.tiles.get(key), other.tiles.get(key));
            if let (Some(a), Some(b)) = (a, b)
                && Arc::ptr_eq(a, b)
            {
                continue;
            }
            let (a, b) = (a.map_or(&nothing, |t| t), b.map_or(&nothing, |t| t));
            count += a.iter().zip(b.iter()).filter(|(a, b)| (**a > 0.0) != (**b > 0.0)).count();
        }
        count
    }

    /// The box `[i0, j0, k0, i1, j1, k1]`, ends exclusive, of the voxels that are on the object in
    /// one of two fields of the same size and not in the other, and their number; none if the
    /// fields agree.
    pub fn changed(&self, other: &Field) -> Option<([usize; 6], usize)> {
        let nothing = [f32::NEG_INFINITY; TILE];
        let keys: std::collections::BTreeSet<_> =
            self.tiles.keys().chain(other.tiles.keys()).collect();
        let (mut found, mut count): (Option<[usize; 6]>, usize) = (None, 0);
        for key in keys {
            let (a, b) = (self.tiles.get(key), other.tiles.get(key));
            if let (Some(a), Some(b)) = (a, b)
                && Arc::ptr_eq(a, b)
            {
                continue;
            }
            let (a, b) = (a.map_or(&nothing, |t| t), b.map_or(&nothing, |t| t));
            for (at, (a, b)) in a.iter().zip(b.iter()).enumerate() {
                if (*a > 0.0) == (*b > 0.0) {
                    continue;
                }
                count += 1;
                let within = [at / EDGE / EDGE, at / EDGE % EDGE, at % EDGE];
                let v: [usize; 3] = std::array::from_fn(|d| key[d] as usize * EDGE + within[d]);
                include(&mut found, v);
            }
        }
        found.map(|found| (found, count))
    }

    /// Calls `visit(voxel)` for every voxel of a block that is on the object.
    pub fn inside_of(&self, block: &Block, mut visit: impl FnMut([usize; 3])) {
        for (key, tile) in &self.tiles {
            let range = |a: usize| {
                let low = key[a] as usize * EDGE;
                block[a].start.max(low)..block[a].end.min(low + EDGE).min(self.size[a])
            };
            for (i, j) in range(0).flat_map(|i| range(1).map(move |j| (i, j))) {
                for k in range(2) {
                    if tile[Field::inside([i, j, k])] > 0.0 {
                        visit([i, j, k]);
                    }
                }
            }
        }
    }

    /// Whether tiles of negligible values are left out.
    #[cfg(feature = "serve")]
    pub(super) fn is_sparse(&self) -> bool {
        self.sparse
    }

    /// Calls `visit(index, tile)` for every tile that differs from that of a field before; the tile
    /// is none if it is gone.
    #[cfg(feature = "serve")]
    pub(super) fn differing(&self, old: &Field, mut visit: impl FnMut([u32; 3], Option<&Logits>)) {
        let same = |a: &Arc<Tile>, b: &Arc<Tile>| {
            Arc::ptr_eq(a, b) || a.iter().zip(b.iter()).all(|(a, b)| a.to_bits() == b.to_bits())
        };
        for (key, tile) in &self.tiles {
            if !old.tiles.get(key).is_some_and(|other| same(tile, other)) {
                visit(*key, Some(&tile.logits));
            }
        }
        for key in old.tiles.keys().filter(|key| !self.tiles.contains_key(*key)) {
            visit(*key, None);
        }
    }

    /// Puts a tile, or none, at an index; false if that is outside the grid.
    #[cfg(feature = "serve")]
    pub(super) fn put(&mut self, key: [u32; 3], tile: Option<Arc<Tile>>) -> bool {
        let lies = (0..3).all(|a| (key[a] as usize) < self.size[a].div_ceil(EDGE));
        if lies {
            match tile {
                Some(tile) => self.tiles.insert(key, tile),
                None => self.tiles.remove(&key),
            };
        }
        lies
    }

    /// Bytes that its tiles hold, those shared with copies included.
    pub fn bytes(&self) -> usize {
        self.tiles.len() * size_of::<Logits>()
    }
}

/// Reads a field between its voxels, by trilinear interpolation. Made by [`Field::reader`].
pub struct Reader<'a> {
    size: [usize; 3],
    tiles: [usize; 3],
    index: Vec<Option<&'a Logits>>,
    most: f32,
}

impl Reader<'_> {
    /// The value at a fractional index `[i, j, k]`, with logits limited to plus and minus the
    /// reader's `most`; minus `most` outside the grid.
    pub fn sample(&self, at: [f64; 3]) -> f32 {
        let value = |[i, j, k]: [usize; 3]| {
            let tile =
                self.index[((i / EDGE) * self.tiles[1] + j / EDGE) * self.tiles[2] + k / EDGE];
            tile.map_or(-self.most, |t| t[Field::inside([i, j, k])].clamp(-self.most, self.most))
        };
        sample_of(value, self.size, at, Interpolation::Linear).map_or(-self.most, |v| v as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_the_rest_is_shared() {
        let mut field = Field::new([40, 17, 33], true);
        field.edit(&[3..20, 2..5, 10..30], |[i, j, k], _| (i + j + k) as f32);
        assert_eq!((field.get([19, 4, 29]), field.get([20, 4, 29])), (52.0, f32::NEG_INFINITY));
        assert_eq!((field.voxels(), field.bounds()), (17 * 3 * 20, Some([3, 2, 10, 20, 5, 30])));
        let mut other = field.clone();
        other.set([3, 2, 10], -1.0);
        assert_eq!(
            (field.difference(&other), other.get([3, 2, 10]), field.get([3, 2, 10])),
            (1, -1.0, 15.0)
        );
        assert_eq!(field.changed(&other), Some(([3, 2, 10, 4, 3, 11], 1)));
        assert_eq!(field.changed(&field.clone()), None);
        let mut seen = vec![];
        field.inside_of(&[18..40, 4..17, 28..33], |v| seen.push(v));
        assert_eq!(seen, [[18, 4, 28], [18, 4, 29], [19, 4, 28], [19, 4, 29]]);
        // Negligible values take no memory.
        other.edit(&[0..40, 0..17, 0..33], |_, _| -7.0);
        assert_eq!((other.bytes(), other.bounds()), (0, None));
        let dense = field.dense(0u8, |v| u8::from(v > 0.0));
        assert_eq!(dense.iter().map(|v| *v as usize).sum::<usize>(), field.voxels());
        assert_eq!(field.reader(8.0).sample([3.0, 2.0, 10.0]), 8.0);
        assert_eq!(field.reader(8.0).sample([-3.0, 2.0, 10.0]), -8.0);
    }
}
