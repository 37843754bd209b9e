//! Several objects in one label image: which voxels belong to each, and a description of each.

use crate::session::field::Field;
use crate::volume::{Grid, LabelValues, include};
use std::collections::BTreeMap;

/// A label image being built: object n has the value n, and the later one wins.
pub struct Painted {
    grid: Grid,
    labels: LabelValues,
    objects: usize,
    /// The number of voxels that an object took from an earlier one, by the numbers of both, the
    /// earlier first.
    taken: BTreeMap<[u16; 2], usize>,
}

/// The part of a label image that belongs to an object.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Part {
    /// The number of voxels.
    pub voxels: usize,
    /// The box around the voxels, `[i0, j0, k0, i1, j1, k1]`, ends exclusive.
    pub bounds: Option<[usize; 6]>,
}

impl Painted {
    /// An empty label image, with room for this many objects.
    pub fn new(grid: &Grid, objects: usize) -> Painted {
        let labels = LabelValues::nothing(grid.voxels(), objects);
        Painted { grid: *grid, labels, objects, taken: BTreeMap::new() }
    }

    /// Assigns an object's voxels to object `number`, from 1.
    pub fn add(&mut self, field: &Field, number: u16) {
        field.each(|at, logit| {
            if logit > 0.0 {
                let before = self.labels.replace(at, number);
                if before > 0 {
                    *self.taken.entry([before, number]).or_default() += 1;
                }
            }
        });
    }

    /// The label image.
    pub fn labels(&self) -> &LabelValues {
        &self.labels
    }

    /// The number of voxels that an object took from an earlier one, by the numbers of both, the
    /// earlier first.
    pub fn taken(&self) -> &BTreeMap<[u16; 2], usize> {
        &self.taken
    }

    /// The final part of each object.
    pub fn parts(&self) -> Vec<Part> {
        let [_, nj, nk] = self.grid.size;
        let mut parts = vec![Part::default(); self.objects];
        self.labels.each(|at, object| {
            let part = &mut parts[object as usize - 1];
            part.voxels += 1;
            include(&mut part.bounds, [at / nk / nj, at / nk % nj, at % nk]);
        });
        parts
    }
}

impl Part {
    /// The edges of its box along i, j and k in mm.
    pub fn extent(&self, spacing: [f64; 3]) -> Option<[f64; 3]> {
        self.bounds.map(|b| [0, 1, 2].map(|a| (b[a + 3] - b[a]) as f64 * spacing[a]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::Affine;

    #[test]
    fn the_later_object_wins_and_what_it_took_is_counted() {
        let grid = Grid { size: [20, 20, 20], affine: Affine::from_spacing([1.0, 2.0, 0.5]) };
        let field = |low: usize, high: usize| {
            let mut field = Field::new(grid.size, true);
            field.edit(&[low..high, 2..4, 17..20], |_, _| 1.0);
            field
        };
        let mut painted = Painted::new(&grid, 4);
        for (number, field) in [field(1, 9), field(7, 12), field(8, 9)].iter().enumerate() {
            painted.add(field, number as u16 + 1);
        }
        let taken: Vec<_> = painted.taken().iter().map(|(pair, n)| (*pair, *n)).collect();
        assert_eq!(taken, [([1, 2], 12), ([2, 3], 6)]);
        let parts = painted.parts();
        assert_eq!(parts.iter().map(|p| p.voxels).collect::<Vec<_>>(), [36, 24, 6, 0]);
        assert_eq!(parts[0].bounds, Some([1, 2, 17, 7, 4, 20]));
        assert_eq!(parts[1].extent(grid.spacing()), Some([5.0, 4.0, 1.5]));
        assert_eq!(parts[3].extent(grid.spacing()), None);
    }
}
