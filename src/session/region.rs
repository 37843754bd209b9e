//! Where the network looks: the patch that shows what prompts point at, and the next one when the
//! object continues beyond it.

use super::correction::Click;
use super::scan::{Scan, fitted_spacing, working_spacing};
use super::{ANSWER, Note};
use crate::memory;
use crate::model::Config;
use crate::prompt::Prompts;
use crate::volume::Grid;
use crate::volume::patch::{Extent, Patch};

/// Lengths of the patches, in mm, with which a first point is looked at; for a scan shorter than
/// the second they are scaled so that the last is four times the scan's length.
const LENGTHS: [f64; 6] = [14.0, 28.0, 56.0, 112.0, 224.0, 448.0];
/// The distance in mm up to which points are treated as one, if the scan is at least twice that
/// size.
const BESIDE: f64 = 14.0;
/// Positions along an edge of such a patch at which its centre may be. Points near each other are
/// looked at with the very same patches: what was encoded for one of them serves all. The point is
/// off the centre by a 16th of the edge along each axis at most. An exception is the widest patch
/// if it shows all of the scan: it is always at the same place.
const LATTICE: usize = 8;
/// The fewest voxels of the scan, along its finest axis, that a patch shows.
const LEAST_VOXELS: f64 = 8.0;
/// The largest difference between values that look alike, in standard deviations of the network's
/// input: 42 HU for the small model.
const ALIKE: f32 = 0.35;
/// The number of voxels of a patch that a box, or the whole scan, must measure for the network to
/// see anything.
const LEAST_SEEN: f64 = 4.0;
/// The number of voxels between a click and the patch's faces below which another patch shows it
/// better.
const MARGIN: i32 = 4;

/// The box that a user means who draws one a slice thick: as deep as the mean of its sides.
pub fn understood_box(b: [usize; 6], grid: &Grid) -> [usize; 6] {
    let step = grid.spacing();
    let side = |a: usize| (b[a + 3] - b[a]) as f64 * step[a];
    let mut out = b;
    for a in 0..3 {
        let others = (side((a + 1) % 3) + side((a + 2) % 3)) / 2.0;
        if b[a + 3] - b[a] > 1 || side(a) > 0.6 * others || grid.size[a] == 1 {
            continue;
        }
        let more = ((others - side(a)) / 2.0 / step[a]).round() as usize;
        (out[a], out[a + 3]) = (b[a].saturating_sub(more), (b[a + 3] + more).min(grid.size[a]));
    }
    out
}

/// The notes about where prompts are, independent of the network.
pub fn notes(scan: &Scan, prompts: &Prompts) -> Vec<Note> {
    let mut notes = vec![];
    if prompts.clipped {
        notes.push(Note::ClippedBox);
    }
    if let Some(spacing) = scan.options().spacing {
        let shown = prompts.bounds.map_or_else(|| whole(scan.grid()), Extent::of_box);
        if longest(&shown, scan.grid()) < LEAST_SEEN * spacing {
            notes.push(Note::HardlySeen);
        }
    }
    notes
}

/// The smallest extent that holds both.
pub fn union(a: &Extent, b: &Extent) -> Extent {
    Extent {
        low: std::array::from_fn(|d| a.low[d].min(b.low[d])),
        high: std::array::from_fn(|d| a.high[d].max(b.high[d])),
    }
}

/// All of the scan.
pub fn whole(grid: &Grid) -> Extent {
    Extent { low: [-0.5; 3], high: grid.size.map(|s| s as f64 - 0.5) }
}

/// One voxel's extent.
pub fn of_voxel(v: [usize; 3]) -> Extent {
    Extent { low: v.map(|c| c as f64 - 0.5), high: v.map(|c| c as f64 + 0.5) }
}

/// The longest side in mm.
pub fn longest(extent: &Extent, grid: &Grid) -> f64 {
    let step = grid.spacing();
    (0..3).map(|a| (extent.high[a] - extent.low[a]) * step[a]).fold(0.0, f64::max)
}

/// What determines how a place of a scan is looked at; none of its voxels have to be available.
#[derive(Clone, Copy)]
pub struct Sight<'a> {
    pub config: &'a Config,
    pub grid: &'a Grid,
    /// The requested spacing.
    pub spacing: Option<f64>,
}

impl<'a> Sight<'a> {
    pub fn of(scan: &'a Scan) -> Sight<'a> {
        let spacing = scan.options().spacing;
        Sight { config: scan.model().config(), grid: scan.grid(), spacing }
    }

    /// Millimetres between the scan's voxels along its finest axis.
    fn finest(&self) -> f64 {
        self.grid.spacing().into_iter().fold(f64::INFINITY, f64::min)
    }

    /// The patch that shows an extent: fitted to it if the model fits objects, though no closer
    /// than a few voxels of the scan, otherwise at its own spacing.
    pub fn fitted(&self, extent: &Extent) -> Patch {
        let Sight { config, grid, .. } = *self;
        let spacing = self.spacing.unwrap_or_else(|| match config.fit {
            Some(_) => working_spacing(config, grid, Some(extent))
                .max(LEAST_VOXELS * self.finest() / config.patch as f64),
            None => config.spacing as f64,
        });
        Patch::place(grid, config.patch, spacing, extent)
    }

    /// The lengths of first looks, in mm.
    fn lengths(&self) -> [f64; 6] {
        // Scans of small things are small themselves.
        let whole = longest(&whole(self.grid), self.grid);
        let scale = if whole < LENGTHS[1] { whole / LENGTHS[3] } else { 1.0 };
        LENGTHS.map(|l| l * scale)
    }

    /// The widest patch of first looks, if it shows all of the scan: the same wherever one points.
    pub fn all(&self) -> Option<Patch> {
        let Sight { config, grid, .. } = *self;
        if config.fit.is_none() || self.spacing.is_some() {
            return None;
        }
        let (all, edge) = (whole(grid), config.patch as f64);
        // Its centre is at a voxel, and the scan's length is rounded to its voxels.
        let [.., widest] = self.lengths().map(|l| l / edge);
        let shows = longest(&all, grid) <= (edge - 2.0) * widest;
        shows.then(|| Patch::place(grid, config.patch, widest, &all))
    }

    /// The patches to try around prompts that give a position and no size, from the closest look to
    /// the widest, on a [lattice](LATTICE); the widest is the same for the whole scan if it shows
    /// all of it. A single, centred one if there is nothing to choose.
    pub fn probes(&self, extent: &Extent) -> Vec<Patch> {
        let Sight { config, grid, .. } = *self;
        if config.fit.is_none() || self.spacing.is_some() {
            let spacing = self.spacing.unwrap_or(config.spacing as f64);
            return vec![Patch::place(grid, config.patch, spacing, extent)];
        }
        let least = (1.3 * longest(extent, grid)).max(LEAST_VOXELS * self.finest());
        let wide: Vec<f64> = self.lengths().into_iter().filter(|l| *l >= least).collect();
        // A single patch shows the answer, and is fitted to it.
        if wide.len() < 2 {
            return vec![self.fitted(extent)];
        }
        // What is shown is shorter than the patch by more than the lattice moves it.
        let step = (config.patch / LATTICE).max(1);
        let edge = config.patch;
        let place = |l: f64| Patch::place_every(step, grid, edge, l / edge as f64, extent);
        let mut patches: Vec<Patch> = wide.into_iter().map(place).collect();
        if let (Some(last), Some(all)) = (patches.last_mut(), self.all()) {
            *last = all;
        }
        patches
    }
}

/// [`Sight::fitted`] for a scan.
pub fn fitted(scan: &Scan, extent: &Extent) -> Patch {
    Sight::of(scan).fitted(extent)
}

/// [`Sight::probes`] for a scan.
pub fn probes(scan: &Scan, extent: &Extent) -> Vec<Patch> {
    Sight::of(scan).probes(extent)
}

/// Whether points are so close that they are treated as one, like those of a stroke.
pub fn beside(a: [usize; 3], b: [usize; 3], grid: &Grid) -> bool {
    let whole = longest(&whole(grid), grid);
    let near = if whole < 2.0 * BESIDE { whole / 8.0 } else { BESIDE };
    distance(&of_voxel(a), b, grid) <= near
}

/// Whether a patch shows a voxel and its surroundings: there are some voxels between it and every
/// face beyond which the scan continues.
pub fn shows(patch: &Patch, voxel: [usize; 3], grid: &Grid) -> bool {
    let Some(at) = patch.voxel(voxel.map(|v| v as f64)) else { return false };
    let open = open_faces(patch, grid);
    let edge = patch.grid.size[0] as i32;
    (0..3).all(|d| (at[d] >= MARGIN || !open[d][0]) && (at[d] < edge - MARGIN || !open[d][1]))
}

/// For each axis of the patch, whether the scan continues beyond its low and its high face.
pub fn open_faces(patch: &Patch, grid: &Grid) -> [[bool; 2]; 3] {
    let to_image = patch.from_image.inverse();
    let edge = patch.grid.size[0] as f64;
    let middle = (edge - 1.0) / 2.0;
    let inside = |p: [f64; 3]| (0..3).all(|a| p[a] >= -0.5 && p[a] <= grid.size[a] as f64 - 0.5);
    // A face's middle may be off the scan when one of its corners is not.
    let places = [0.0, middle, edge - 1.0];
    std::array::from_fn(|d| {
        [-1.0, edge].map(|beyond| {
            places.iter().any(|u| {
                places.iter().any(|v| {
                    let mut p = [0.0; 3];
                    (p[d], p[(d + 1) % 3], p[(d + 2) % 3]) = (beyond, *u, *v);
                    inside(to_image.apply(p))
                })
            })
        })
    })
}

/// Voxels of an answer on the patch that are on a face beyond which the scan continues and that has
/// not been looked at: their positions, in fractional voxels of the scan, just beyond that face.
pub fn beyond(answer: &[f32], patch: &Patch, grid: &Grid, looked: &[Patch]) -> Vec<[f64; 3]> {
    let edge = patch.grid.size[0];
    let to_image = patch.from_image.inverse();
    let mut places = vec![];
    for d in 0..3 {
        for (layer, outside) in [(0, -1.0), (edge - 1, edge as f64)] {
            for (u, v) in (0..edge).flat_map(|u| (0..edge).map(move |v| (u, v))) {
                let mut p = [0usize; 3];
                (p[d], p[(d + 1) % 3], p[(d + 2) % 3]) = (layer, u, v);
                if answer[(p[0] * edge + p[1]) * edge + p[2]] <= 0.0 {
                    continue;
                }
                let mut q = p.map(|c| c as f64);
                q[d] = outside;
                let at = to_image.apply(q);
                let on_scan = (0..3).all(|a| at[a] >= 0.0 && at[a] <= grid.size[a] as f64 - 1.0);
                if on_scan && looked.iter().all(|other| other.voxel(at).is_none()) {
                    memory::reserve(ANSWER, &mut places, 1);
                    places.push(at);
                }
            }
        }
    }
    places
}

/// The patch to look at next when an object continues `beyond` the present one: for models that fit
/// objects a coarser one that shows all of it, otherwise one further on.
pub fn next(scan: &Scan, patch: &Patch, object: &Extent, beyond: &[[f64; 3]]) -> Patch {
    let config = scan.model().config();
    let (grid, edge) = (scan.grid(), config.patch);
    match config.fit {
        Some(fit) if scan.options().spacing.is_none() => {
            let spacing = fitted_spacing(object, grid, edge, fit as f64).max(1.5 * patch.spacing);
            Patch::place(grid, edge, spacing, object)
        }
        _ => {
            let n = beyond.len().max(1) as f64;
            let centre: [f64; 3] =
                std::array::from_fn(|a| beyond.iter().map(|p| p[a]).sum::<f64>() / n);
            // Positions beyond opposite faces have their middle in the patch: then the first of
            // them is used.
            let centre = if patch.voxel(centre).is_some() { beyond[0] } else { centre };
            Patch::place(grid, edge, patch.spacing, &Extent { low: centre, high: centre })
        }
    }
}

/// Whether the straight line from a voxel to another leads through values that look like both:
/// nearly all of it within [`ALIKE`] of them, as the network sees the scan.
pub fn joined(scan: &Scan, a: [usize; 3], b: [usize; 3]) -> bool {
    let patch = fitted(scan, &union(&of_voxel(a), &of_voxel(b)));
    let (values, edge) = (scan.input(&patch), patch.grid.size[0] as i32);
    let [from, to] = [a, b].map(|v| patch.from_image.apply(v.map(|c| c as f64)));
    // The mean of a voxel and those around it, so that noise does not count.
    let around = |t: f64| {
        let p: [i32; 3] = std::array::from_fn(|d| (from[d] + t * (to[d] - from[d])).round() as i32);
        let (mut sum, mut n) = (0.0f32, 0.0f32);
        for at in 0..27 {
            let q = [p[0] + at / 9 - 1, p[1] + at / 3 % 3 - 1, p[2] + at % 3 - 1];
            if q.iter().all(|c| (0..edge).contains(c)) {
                sum += values[((q[0] * edge + q[1]) * edge + q[2]) as usize];
                n += 1.0;
            }
        }
        sum / n.max(1.0)
    };
    let (first, last) = (around(0.0), around(1.0));
    let steps = 2 * edge;
    let alike = (0..=steps).filter(|s| {
        let t = *s as f64 / steps as f64;
        (around(t) - (first + t as f32 * (last - first))).abs() <= ALIKE
    });
    (first - last).abs() <= ALIKE && alike.count() as f64 >= 0.95 * (steps + 1) as f64
}

/// The largest distance along an axis of the scan, in mm, from an extent to a voxel outside it; 0
/// within.
pub fn distance(extent: &Extent, voxel: [usize; 3], grid: &Grid) -> f64 {
    let step = grid.spacing();
    let off = |a: usize| {
        (extent.low[a] - voxel[a] as f64).max(voxel[a] as f64 - extent.high[a]) * step[a]
    };
    (0..3).map(off).fold(0.0, f64::max)
}

/// The largest distance along an axis of the patch, in mm, from its middle to a voxel.
pub fn centre_distance(patch: &Patch, voxel: [usize; 3]) -> f64 {
    let p = patch.from_image.apply(voxel.map(|v| v as f64));
    let middle = (patch.grid.size[0] as f64 - 1.0) / 2.0;
    p.iter().map(|v| (v - middle).abs() * patch.spacing).fold(0.0, f64::max)
}

/// The corners, in voxels of the patch with one to spare, of the values that `counts` accepts; none
/// if there are none.
pub fn reach(values: &[f32], edge: usize, counts: impl Fn(f32) -> bool) -> Option<[[f64; 3]; 2]> {
    let (mut low, mut high) = ([usize::MAX; 3], [0; 3]);
    for at in (0..values.len()).filter(|v| counts(values[*v])) {
        let p = [at / (edge * edge), at / edge % edge, at % edge];
        (low, high) =
            (std::array::from_fn(|d| low[d].min(p[d])), std::array::from_fn(|d| high[d].max(p[d])));
    }
    let last = edge as f64 - 0.5;
    (low[0] != usize::MAX).then(|| {
        [low.map(|v| (v as f64 - 1.0).max(-0.5)), high.map(|v| (v as f64 + 1.0).min(last))]
    })
}

/// The extent on the scan of what an answer on a patch contains; none if that is empty.
pub fn shown(logits: &[f32], patch: &Patch, grid: &Grid) -> Option<Extent> {
    let [low, high] = reach(logits, patch.grid.size[0], |v| v > 0.0)?;
    let block = patch.block_of(grid, low, high);
    Some(Extent {
        low: [0, 1, 2].map(|a| block[a].start as f64 - 0.5),
        high: [0, 1, 2].map(|a| block[a].end as f64 - 0.5),
    })
}

/// A voxel well within the object that a patch shows: the positive one nearest to the mean of all.
pub fn deepest(logits: &[f32], edge: usize) -> Option<Click> {
    let place = |at: usize| [at / (edge * edge), at / edge % edge, at % edge].map(|v| v as f32);
    let on = || (0..logits.len()).filter(|v| logits[*v] > 0.0);
    let n = on().count() as f32;
    let middle: [f32; 3] =
        std::array::from_fn(|d| on().map(|v| place(v)[d]).sum::<f32>() / n.max(1.0));
    let off = |at: usize| (0..3).map(|d| (place(at)[d] - middle[d]).powi(2)).sum::<f32>();
    let nearest = on().min_by(|a, b| off(*a).total_cmp(&off(*b)))?;
    Some((place(nearest).map(|v| v as i32), true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::Affine;

    #[test]
    fn a_box_of_one_slice_gets_the_depth_of_its_sides() {
        let grid = Grid { size: [100, 100, 40], affine: Affine::from_spacing([1.0, 1.0, 5.0]) };
        assert_eq!(understood_box([10, 10, 20, 40, 30, 21], &grid), [10, 10, 18, 40, 30, 23]);
        assert_eq!(understood_box([10, 10, 20, 14, 14, 21], &grid), [10, 10, 20, 14, 14, 21]);
        assert_eq!(understood_box([10, 50, 10, 11, 70, 14], &grid), [0, 50, 10, 21, 70, 14]);
    }

    #[test]
    fn a_first_look_is_as_near_as_the_scans_voxels_allow() {
        let config = Config { fit: Some(1.75), ..Config::tiny() };
        let lengths = |step: [f64; 3], size: [usize; 3]| -> Vec<usize> {
            let grid = Grid { size, affine: Affine::from_spacing(step) };
            let sight = Sight { config: &config, grid: &grid, spacing: None };
            let patches = sight.probes(&of_voxel(size.map(|s| s / 2)));
            patches.iter().map(|p| (p.spacing * config.patch as f64).round() as usize).collect()
        };
        // Thick slices do not count, voxels of 4 mm along all axes do.
        assert_eq!(lengths([0.7, 0.7, 5.0], [300, 300, 60]), [14, 28, 56, 112, 224, 448]);
        assert_eq!(lengths([4.0; 3], [128; 3]), [56, 112, 224, 448]);
        // A scan of 20 mm, and one of so few voxels that it is shown at the closest possible look.
        assert_eq!(lengths([0.5; 3], [40; 3]), [5, 10, 20, 40, 80]);
        assert_eq!(lengths([1.0; 3], [3; 3]), [8]);
    }

    #[test]
    fn what_shows_all_of_a_scan_shows_each_of_its_voxels() {
        let config = Config { fit: Some(1.75), patch: 64, ..Config::tiny() };
        let of = |size: usize, step: f64| {
            let grid = Grid { size: [size, 9, 5], affine: Affine::from_spacing([step, 2.0, 7.0]) };
            let all = Sight { config: &config, grid: &grid, spacing: None }.all()?;
            for corner in 0..8usize {
                let side = |a: usize| (corner >> a & 1) * (grid.size[a] - 1);
                let voxel = [0, 1, 2].map(side);
                assert!(shows(&all, voxel, &grid), "{size} of {step}: {voxel:?}");
            }
            Some(all.spacing)
        };
        for size in 490..=512 {
            of(size, 0.85);
        }
        assert_eq!(of(510, 0.85), Some(7.0));
        // No patch does if a scan is too long, or nearly so.
        assert_eq!([of(512, 0.87), of(512, 0.98), of(149, 3.0)], [None; 3]);
        let grid = Grid { size: [9; 3], affine: Affine::from_spacing([1.0; 3]) };
        let sight = |spacing| Sight { config: &config, grid: &grid, spacing };
        assert!(sight(None).all().is_some() && sight(Some(2.0)).all().is_none());
    }

    #[test]
    fn points_are_beside_each_other_by_millimetres_or_by_a_small_scans_length() {
        let grid = Grid { size: [300, 300, 60], affine: Affine::from_spacing([0.7, 0.7, 5.0]) };
        let at = [150, 150, 30];
        assert!(beside(at, at, &grid) && beside(at, [150, 150, 33], &grid));
        assert!(beside(at, [130, 170, 28], &grid) && !beside(at, [150, 171, 30], &grid));
        assert!(!beside(at, [150, 150, 34], &grid));
        let grid = Grid { size: [40; 3], affine: Affine::from_spacing([0.5; 3]) };
        assert!(beside([20; 3], [25, 20, 15], &grid) && !beside([20; 3], [26, 20, 20], &grid));
    }

    #[test]
    fn points_near_each_other_are_looked_at_with_the_same_patches() {
        let rows = [[-0.8, 0.0, 0.0, 100.0], [0.0, 0.9, 0.0, -3.0], [0.0, 0.0, 4.0, 7.0]];
        let grid = Grid { size: [300, 280, 60], affine: Affine(rows) };
        let config = Config { fit: Some(1.75), ..Config::tiny() };
        let sight = Sight { config: &config, grid: &grid, spacing: None };
        let (edge, step) = (config.patch as f64, (config.patch / LATTICE) as f64);
        for voxel in [[150, 140, 30], [3, 279, 0], [77, 12, 59]] {
            let patches = sight.probes(&of_voxel(voxel));
            assert_eq!(patches.len(), LENGTHS.len());
            // All of the scan, wherever one points.
            let (widest, patches) = patches.split_last().unwrap();
            assert!(widest.grid == sight.all().unwrap().grid, "{voxel:?}");
            for (n, patch) in patches.iter().enumerate() {
                let at = patch.from_image.apply(voxel.map(|v| v as f64));
                let is_near = |c: &f64| (c - edge / 2.0).abs() <= step / 2.0 + 1e-5;
                assert!(at.iter().all(is_near), "{voxel:?}, {n}: {at:?}");
                assert!(shows(patch, voxel, &grid), "{voxel:?}, {n}");
                // The probe of a point a number of steps away from the first.
                let to_image = patch.from_image.inverse();
                let probe = |off: [f64; 3]| {
                    let point = to_image.apply(off.map(|o| edge / 2.0 + o * step));
                    sight.probes(&Extent { low: point, high: point })[n].grid
                };
                for corner in 0..8 {
                    let side = |a: usize| if corner >> a & 1 == 1 { 0.49 } else { -0.49 };
                    let off = [0, 1, 2].map(side);
                    assert!(probe(off) == patch.grid, "{voxel:?}, {n}: {off:?}");
                }
                for (a, o) in (0..3).flat_map(|a| [(a, 1.01), (a, -1.01)]) {
                    let off = [0, 1, 2].map(|d| if d == a { o } else { 0.0 });
                    assert!(probe(off) != patch.grid, "{voxel:?}, {n}: {off:?}");
                }
            }
        }
        // An extent as long as a patch shows at most is inside it wherever it is.
        for low in (100..130).map(|v| v as f64) {
            let extent = Extent { low: [low, low, 20.0], high: [low + 53.5, low + 47.5, 30.5] };
            let patches = sight.probes(&extent);
            assert_eq!(patches.len(), LENGTHS.len() - 2);
            for (patch, face) in patches.iter().flat_map(|p| [(p, extent.low), (p, extent.high)]) {
                let at = patch.from_image.apply(face);
                assert!(at.iter().all(|c| (-0.5..=edge - 0.5).contains(c)), "{low}: {at:?}");
            }
            // If there is nothing to choose it is fitted.
            let extent = Extent { low: [low, low, -0.5], high: [low + 120.0, low + 40.0, 59.5] };
            let fitted = sight.fitted(&extent).grid;
            let patches = sight.probes(&extent);
            assert!(patches.len() == 1 && patches[0].grid == fitted, "{low}");
        }
    }
}
