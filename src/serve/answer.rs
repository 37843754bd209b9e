//! What changed from one answer to the next, and where an answer is unsure.

use crate::session::Prediction;
use crate::session::field::Field;
use crate::volume::{Grid, include};
use std::collections::HashMap;
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;

/// How messages name the memory that this takes.
const CHANGE: &str = "the changes of a mask";
/// Probabilities of voxels about which the network is unsure.
const UNSURE: RangeInclusive<f32> = 0.25..=0.75;

/// An answer, or none yet.
pub type Shown = Option<Arc<Prediction>>;

/// The smallest block of a scan that holds every voxel that changed sides, or that is unsure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// `[i0, j0, k0, i1, j1, k1]`, ends exclusive.
    pub region: [usize; 6],
    /// The number of those voxels.
    pub voxels: usize,
}

/// The change from one answer to another on a grid; none if nothing changed.
pub fn change(grid: &Grid, before: &Shown, after: &Shown) -> Option<Change> {
    let empty = Field::new(grid.size, true);
    let [before, after] = [before, after].map(|s| s.as_ref().map_or(&empty, |p| &p.field));
    let (region, voxels) = before.changed(after)?;
    Some(Change { region, voxels })
}

/// Where an answer is unsure, with its voxels there, packed as [`Change::bits`] are; none if it is
/// sure everywhere. Voxels in `said` count as sure.
pub fn unsure(shown: &Shown, said: &HashMap<[usize; 3], ()>) -> Option<(Change, Vec<u8>)> {
    let prediction = shown.as_ref()?;
    let (mut region, mut voxels) = (None, 0);
    let is_unsure = |voxel: [usize; 3], p: f32| UNSURE.contains(&p) && !said.contains_key(&voxel);
    prediction.each_probability(|voxel, probability| {
        if is_unsure(voxel, probability) {
            include(&mut region, voxel);
            voxels += 1;
        }
    });
    let change = Change { region: region?, voxels };
    let mut bits = change.no_bits();
    prediction.each_probability(|voxel, probability| {
        if is_unsure(voxel, probability) {
            let at = change.place(voxel);
            bits[at / 8] |= 1 << (at % 8);
        }
    });
    Some((change, bits))
}

/// An answer on the whole grid: one byte per voxel, i fastest.
pub fn whole(grid: &Grid, shown: &Shown) -> Vec<u8> {
    let [ni, nj, nk] = grid.size;
    Change { region: [0, 0, 0, ni, nj, nk], voxels: 0 }.marks(shown)
}

impl Change {
    /// Voxels along each axis.
    pub fn size(&self) -> [usize; 3] {
        std::array::from_fn(|a| self.region[a + 3] - self.region[a])
    }

    /// The region's ranges.
    pub fn block(&self) -> [Range<usize>; 3] {
        std::array::from_fn(|a| self.region[a]..self.region[a + 3])
    }

    /// The region along x, y and z, each range half open.
    pub fn ranges(&self) -> [[usize; 2]; 3] {
        std::array::from_fn(|a| [self.region[a], self.region[a + 3]])
    }

    /// The index of a voxel in the region, i fastest.
    fn place(&self, [i, j, k]: [usize; 3]) -> usize {
        let [ni, nj, _] = self.size();
        let [i0, j0, k0, ..] = self.region;
        ((k - k0) * nj + j - j0) * ni + i - i0
    }

    /// Calls `visit` with the index of every voxel of an answer in the region.
    fn each(&self, shown: &Shown, mut visit: impl FnMut(usize)) {
        if let Some(prediction) = shown {
            prediction.field.inside_of(&self.block(), |voxel| visit(self.place(voxel)));
        }
    }

    /// One bit per voxel, none of them set.
    fn no_bits(&self) -> Vec<u8> {
        let voxels: usize = self.size().iter().product();
        crate::memory::zeroed::<u8>(CHANGE, voxels.div_ceil(8))
    }

    /// The answer in the region, one byte per voxel, i fastest.
    pub fn marks(&self, shown: &Shown) -> Vec<u8> {
        let mut marks = crate::memory::zeroed::<u8>(CHANGE, self.size().iter().product());
        self.each(shown, |at| marks[at] = 1);
        marks
    }

    /// The answer in the region, one bit per voxel, the first in the lowest bit of the first byte.
    pub fn bits(&self, shown: &Shown) -> Vec<u8> {
        let mut bits = self.no_bits();
        self.each(shown, |at| bits[at / 8] |= 1 << (at % 8));
        bits
    }
}
