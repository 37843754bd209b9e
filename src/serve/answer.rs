//! What changed from one answer to the next.

use crate::session::Prediction;
use crate::session::field::Field;
use crate::volume::Grid;
use std::ops::Range;
use std::sync::Arc;

/// What messages call the memory that this takes.
const CHANGE: &str = "what changed of an answer";

/// An answer, or none yet.
pub type Shown = Option<Arc<Prediction>>;

/// The smallest block of a scan that holds every voxel that changed sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// `[i0, j0, k0, i1, j1, k1]`, ends exclusive.
    pub region: [usize; 6],
    /// How many voxels changed.
    pub voxels: usize,
}

/// What changed from one answer to another on a grid; none where nothing did.
pub fn change(grid: &Grid, before: &Shown, after: &Shown) -> Option<Change> {
    let empty = Field::new(grid.size, true);
    let [before, after] = [before, after].map(|s| s.as_ref().map_or(&empty, |p| &p.field));
    let (region, voxels) = before.changed(after)?;
    Some(Change { region, voxels })
}

/// An answer on all of a grid: a byte a voxel, i fastest.
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

    /// Calls `visit` with the place of every voxel of an answer in the region, i fastest.
    fn each(&self, shown: &Shown, mut visit: impl FnMut(usize)) {
        let [ni, nj, _] = self.size();
        let [i0, j0, k0, ..] = self.region;
        if let Some(prediction) = shown {
            prediction.field.inside_of(&self.block(), |[i, j, k]| {
                visit(((k - k0) * nj + j - j0) * ni + i - i0)
            });
        }
    }

    /// The answer in the region, a byte a voxel, i fastest.
    pub fn marks(&self, shown: &Shown) -> Vec<u8> {
        let mut marks = crate::memory::zeroed::<u8>(CHANGE, self.size().iter().product());
        self.each(shown, |at| marks[at] = 1);
        marks
    }

    /// The answer in the region, a bit a voxel, the first in the lowest bit of the first byte.
    pub fn bits(&self, shown: &Shown) -> Vec<u8> {
        let voxels: usize = self.size().iter().product();
        let mut bits = crate::memory::zeroed::<u8>(CHANGE, voxels.div_ceil(8));
        self.each(shown, |at| bits[at / 8] |= 1 << (at % 8));
        bits
    }
}
