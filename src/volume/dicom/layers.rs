//! Structures on a scan's grid: mapping millimetres to its voxels, and label values in as many
//! layers as structures overlap.

use super::source::Source;
use crate::memory;
use crate::volume::{Affine, Grid, Segment};

/// How messages name the memory that labels take.
const LABELS: &str = "its labels";

/// What a file marks on a scan's grid.
pub(in crate::volume) struct Marked {
    /// Values `[i][j][k]`, at least one layer.
    pub(in crate::volume) layers: Vec<Vec<u32>>,
    pub(in crate::volume) segments: Vec<Segment>,
    /// The errors of structures, by their values: those are in no layer.
    pub(in crate::volume) faults: Vec<(u32, String)>,
    pub(in crate::volume) warnings: Vec<String>,
}

impl Marked {
    /// Nothing marked, on a grid of this size.
    pub(super) fn new(size: [usize; 3]) -> Marked {
        let layers = vec![memory::zeroed(LABELS, size.iter().product())];
        Marked { layers, segments: vec![], faults: vec![], warnings: vec![] }
    }

    /// Adds a structure. `each` calls its argument with every voxel of the structure, each time it
    /// is called.
    pub(super) fn add(&mut self, name: String, value: u32, each: impl Fn(&mut dyn FnMut(usize))) {
        let is_free = |layer: &Vec<u32>| {
            let mut free = true;
            each(&mut |at| free &= layer[at] == 0);
            free
        };
        let layer = self.layers.iter().position(is_free).unwrap_or(self.layers.len());
        if layer == self.layers.len() {
            let one = self.layers[0].len();
            // One may fit if all of them do not.
            memory::check::<u32>(LABELS, one.saturating_mul(layer + 1))
                .unwrap_or_else(|e| memory::refuse(e));
            self.layers.push(memory::zeroed(LABELS, one));
        }
        let values = &mut self.layers[layer];
        each(&mut |at| values[at] = value);
        self.segments.push(Segment { name, layer, value });
    }

    /// Adds a structure that cannot be placed.
    pub(super) fn miss(&mut self, name: String, value: u32, fault: String) {
        self.warnings.push(format!("'{name}' was ignored: {fault}"));
        self.faults.push((value, fault));
        self.segments.push(Segment { name, layer: 0, value });
    }
}

/// The mapping of millimetres to a scan's voxels.
pub(super) struct Place {
    pub(super) grid: Grid,
    to_voxel: Affine,
    /// The positions of a DICOM series' slices along k: about 0, 1, 2, ..., and exactly that if
    /// they are evenly spaced.
    slices: Option<Vec<f64>>,
}

impl Place {
    pub(super) fn new(grid: &Grid, source: Option<&Source>) -> Place {
        let mut place = Place { grid: *grid, to_voxel: grid.affine.inverse(), slices: None };
        if let Some(source) = source.filter(|s| s.size() == grid.size) {
            let along = source.positions().map(|p| place.voxel(p)[2]);
            let along = memory::collected(LABELS, along);
            place.slices = Some(along).filter(|a| a.is_sorted() && a.len() == grid.size[2]);
        }
        place
    }

    /// The voxel, with fractions, at a position in mm of LPS.
    pub(super) fn voxel(&self, [x, y, z]: [f64; 3]) -> [f64; 3] {
        self.to_voxel.apply([-x, -y, z])
    }

    /// The number of voxels of a step of mm in LPS, along each axis.
    pub(super) fn step(&self, [x, y, z]: [f64; 3]) -> [f64; 3] {
        self.to_voxel.0.map(|r| z * r[2] - x * r[0] - y * r[1])
    }

    /// The voxel along an axis that is nearest to a position, and its distance, in voxels. It may
    /// be outside the scan.
    pub(super) fn nearest(&self, axis: usize, at: f64) -> (i64, f64) {
        let Some(slices) = self.slices.as_ref().filter(|_| axis == 2) else {
            return (at.round() as i64, (at - at.round()).abs());
        };
        // Beyond the outer slices further ones would follow in the affine's steps; a position half
        // a step beyond one is still nearest to it, whichever way numbers were rounded.
        let steps = |off: f64| {
            let whole = (off - 0.5 - 1e-6).ceil().max(0.0);
            (whole as i64, (off - whole).abs())
        };
        match (slices.first(), slices.last()) {
            (Some(first), _) if at < *first => {
                let (n, away) = steps(first - at);
                return (-n, away);
            }
            (_, Some(last)) if at > *last => {
                let (n, away) = steps(at - last);
                return (n.saturating_add(slices.len() as i64 - 1), away);
            }
            _ => {}
        }
        let next = slices.partition_point(|s| *s < at);
        let near = |n: usize| slices.get(n).map(|s| (n as i64, (at - s).abs()));
        let both = [next.checked_sub(1).and_then(near), near(next)];
        let nearest = both.into_iter().flatten().min_by(|a, b| a.1.total_cmp(&b.1));
        nearest.unwrap_or((0, f64::INFINITY))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_that_overlap_lie_in_layers() {
        let mut marked = Marked::new([4, 1, 1]);
        let of = |voxels: &'static [usize]| {
            move |f: &mut dyn FnMut(usize)| voxels.iter().for_each(|at| f(*at))
        };
        marked.add("a".into(), 1, of(&[0, 1]));
        marked.add("b".into(), 2, of(&[1, 2]));
        marked.add("c".into(), 3, of(&[2, 3]));
        marked.miss("d".into(), 4, "why".into());
        assert_eq!(marked.layers, [[1, 1, 3, 3], [0, 2, 2, 0]]);
        let layers: Vec<usize> = marked.segments.iter().map(|s| s.layer).collect();
        assert_eq!((layers, marked.warnings.len()), (vec![0, 1, 0, 0], 1));
    }

    #[test]
    fn slices_that_are_unevenly_spaced_are_found_where_they_lie() {
        let affine = Affine([[-1.0, 0.0, 0.0, 5.0], [0.0, -2.0, 0.0, 6.0], [0.0, 0.0, 4.0, 7.0]]);
        let grid = Grid { size: [4, 4, 4], affine };
        let mut place = Place::new(&grid, None);
        assert_eq!(place.voxel([-5.0 + 2.0, -6.0 + 4.0, 7.0 + 4.0]), [2.0, 2.0, 1.0]);
        assert_eq!(place.step([1.0, 1.0, 1.0]), [1.0, 0.5, 0.25]);
        assert_eq!(place.nearest(2, 1.75), (2, 0.25));
        assert_eq!(place.nearest(0, -2.0), (-2, 0.0));
        place.slices = Some(vec![0.0, 0.75, 2.25, 3.0]);
        assert_eq!(place.nearest(2, 1.25), (1, 0.5));
        assert_eq!((place.nearest(2, 1.75), place.nearest(2, 9.0)), ((2, 0.5), (9, 0.0)));
        assert_eq!((place.nearest(2, -2.25), place.nearest(2, 3.5)), ((-2, 0.25), (3, 0.5)));
        assert_eq!((place.nearest(2, -0.25), place.nearest(2, 3.75)), ((0, 0.25), (4, 0.25)));
        assert_eq!(place.nearest(0, 1.25), (1, 0.25));
    }
}
