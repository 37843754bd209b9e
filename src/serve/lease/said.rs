//! The prompts of a client as those of a session: points, boxes, scribbles and outlines.

use super::{Outcome, State};
use crate::memory;
use crate::prompt::{Area, Prompts};
use crate::serve::failure::Failure;
use crate::serve::turns::Turn;
use crate::serve::wire::Array;
use crate::volume::reorder;

/// Points along an axis into which a box off the object is converted.
const LATTICE: usize = 10;
/// The most voxels of a scribble.
const MOST_PAINTED: usize = 200_000;
/// How messages name the memory that they take.
const PAINTED: &str = "a scribble";

impl State {
    /// A point, which counts for the voxel that it means, if any.
    pub fn point(
        &mut self,
        at: [f64; 3],
        positive: bool,
        run: bool,
        turn: &Turn,
    ) -> Result<Outcome, Failure> {
        let prompts = self.pointed(at, positive)?;
        self.say(prompts, run, turn)
    }

    /// The prompts of a point.
    pub fn pointed(&mut self, at: [f64; 3], positive: bool) -> Result<Prompts, Failure> {
        let mut prompts = Prompts::default();
        if let Some(voxel) = self.image()?.opened.voxel([at[2], at[1], at[0]]) {
            prompts.points.push((voxel, positive));
        }
        Ok(prompts)
    }

    /// A box, its ends exclusive, cut off at the image's faces; one entirely beyond them is
    /// ignored.
    pub fn bounds(
        &mut self,
        bounds: [[f64; 2]; 3],
        positive: bool,
        run: bool,
        turn: &Turn,
    ) -> Result<Outcome, Failure> {
        if bounds.iter().any(|[low, high]| low == high) {
            return Err(Failure::bad(format!(
                "Given bounding box size is zero in at least one dimension: {bounds:?}"
            )));
        }
        let size = self.image()?.size();
        let beyond = |a: usize| {
            let [low, high] = bounds[2 - a];
            low.max(high) <= 0.0 || low.min(high) >= size[a] as f64
        };
        if (0..3).any(beyond) {
            return self.say(Prompts::default(), run, turn);
        }
        let side = |a: usize| {
            let [low, high] = bounds[2 - a].map(f64::round_ties_even);
            let (low, high) = (low.min(high), low.max(high));
            let low = low.clamp(0.0, size[a] as f64 - 1.0) as usize;
            (low, (high.clamp(0.0, size[a] as f64) as usize).max(low + 1))
        };
        let [(i0, i1), (j0, j1), (k0, k1)] = [side(0), side(1), side(2)];
        let mut prompts = Prompts::default();
        match positive {
            true => prompts.bounds = Some([i0, j0, k0, i1, j1, k1]),
            // There is no box off the object: its voxels are not on the object.
            false => {
                let along = |low: usize, high: usize| {
                    let count = (high - low).min(LATTICE);
                    (0..count).map(move |n| low + (2 * n + 1) * (high - low) / (2 * count))
                };
                for (i, j) in along(i0, i1).flat_map(|i| along(j0, j1).map(move |j| (i, j))) {
                    prompts.points.extend(along(k0, k1).map(|k| ([i, j, k], false)));
                }
            }
        }
        self.say(prompts, run, turn)
    }

    /// Voxels that were painted, all of them on the object or off it.
    pub fn scribble(
        &mut self,
        mask: &Array,
        place: Option<[[f64; 2]; 3]>,
        positive: bool,
        run: bool,
        turn: &Turn,
    ) -> Result<Outcome, Failure> {
        let prompts = self.painted(mask, place, positive)?;
        self.say(prompts, run, turn)
    }

    /// The prompts of voxels that were painted.
    pub fn painted(
        &mut self,
        mask: &Array,
        place: Option<[[f64; 2]; 3]>,
        positive: bool,
    ) -> Result<Prompts, Failure> {
        let area = self.area(mask, place)?;
        let painted = area.marked.iter().filter(|m| **m != 0).count();
        if painted > MOST_PAINTED {
            return Err(Failure::bad(format!(
                "a scribble of {painted} voxels: at most {MOST_PAINTED} are accepted"
            )));
        }
        let points = memory::room(PAINTED, painted)?;
        let mut prompts = Prompts { points, ..Prompts::default() };
        let [_, nj, nk] = area.size;
        for (at, _) in area.marked.iter().enumerate().filter(|(_, m)| **m != 0) {
            let within = [at / nk / nj, at / nk % nj, at % nk];
            let voxel = std::array::from_fn(|a| area.low[a] + within[a]);
            prompts.points.push((voxel, positive));
        }
        Ok(prompts)
    }

    /// An area that was outlined.
    pub fn lasso(
        &mut self,
        mask: &Array,
        place: Option<[[f64; 2]; 3]>,
        positive: bool,
        run: bool,
        turn: &Turn,
    ) -> Result<Outcome, Failure> {
        let prompts = self.outlined(mask, place, positive)?;
        self.say(prompts, run, turn)
    }

    /// The prompts of an area that was outlined.
    pub fn outlined(
        &mut self,
        mask: &Array,
        place: Option<[[f64; 2]; 3]>,
        positive: bool,
    ) -> Result<Prompts, Failure> {
        let area = self.area(mask, place)?;
        let mut prompts = Prompts::default();
        if area.marked.iter().any(|m| *m != 0) {
            prompts.add_area(&area, positive).map_err(|e| Failure::from(e).into_bad())?;
        }
        Ok(prompts)
    }

    /// A painted crop of the image, or all of it.
    fn area(&mut self, mask: &Array, place: Option<[[f64; 2]; 3]>) -> Result<Area, Failure> {
        let size = self.image()?.size();
        let whole = [2, 1, 0].map(|a| [0.0, size[a] as f64]);
        let place = place.unwrap_or(whole);
        if place.iter().any(|[low, high]| low >= high) {
            return Err(Failure::bad("each dimension of interaction_bbox must have positive size"));
        }
        let inside = |a: usize| {
            let [low, high] = place[2 - a];
            low >= 0.0 && high <= size[a] as f64 && low.fract() == 0.0 && high.fract() == 0.0
        };
        if !(0..3).all(inside) {
            return Err(Failure::bad(format!(
                "interaction_bbox {place:?} exceeds original image bounds {:?}",
                [size[2], size[1], size[0]]
            )));
        }
        let low = [0, 1, 2].map(|a| place[2 - a][0] as usize);
        let extent = [0, 1, 2].map(|a| place[2 - a][1] as usize - low[a]);
        let expected = [extent[2], extent[1], extent[0]];
        if mask.shape != expected {
            return Err(Failure::bad(format!(
                "image shape {:?} must match interaction_bbox size {expected:?}",
                mask.shape
            )));
        }
        Ok(Area { low, size: extent, marked: reorder(&mask.marks(), extent) })
    }
}
