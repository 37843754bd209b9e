//! Prompts that are drawn on a slice: a line across the object, an outline around it. Both become
//! points and, if there is none yet, a box.

use super::{Dense, PromptError, Prompts, RawBox, RawOutline, Space, finite, to_voxel};
use crate::memory::{self, Refused};
use crate::volume::{Grid, include};
use std::collections::VecDeque;

/// The part of a line that is assumed to be on the object: its ends are roughly on the border.
const WITHIN: f64 = 0.8;
/// The part of an outline, about its middle, whose voxels are assumed to be on the object.
const SHRUNK: f64 = 0.9;
/// The name of the points of a line or an area in refusals of memory.
const POINTS: &str = "points of a drawn prompt";
const MASK: &str = "a mask for the prompts";
/// The width of a lesion across its longest diameter, as a part of that diameter: the usual ratio
/// of RECIST's two diameters.
const ASPECT: f64 = 0.75;

/// Room in a list for `more` further values.
pub(super) fn room<T>(list: &mut Vec<T>, more: usize) -> Result<(), PromptError> {
    memory::caught(|| memory::reserve(POINTS, list, more)).map_err(PromptError::Memory)
}

impl Prompts {
    /// Adds a line from one border of the object to the other, such as the longest diameter that
    /// RECIST asks for.
    ///
    /// `line` holds its two ends, in voxels (fractions are allowed) or in mm. The middle four
    /// fifths of the line count as on the object. [`Prompts::drawn`] grows to a box that contains
    /// the line and is at least three quarters of its length wide across it.
    ///
    /// # Errors
    /// A coordinate is not a number, an end is outside the scan, or both ends are the same; memory
    /// is refused. Nothing was added.
    pub fn add_line(
        &mut self,
        image: &Grid,
        line: RawBox,
        space: Space,
    ) -> Result<(), PromptError> {
        let RawBox(b) = line;
        finite("line", &b)?;
        let ends = [[b[0], b[1], b[2]], [b[3], b[4], b[5]]].map(|p| to_voxel(image, p, space));
        for end in &ends {
            on_scan(image, *end, "the line's end", space)?;
        }
        let step = image.spacing();
        let length =
            (0..3).map(|a| ((ends[1][a] - ends[0][a]) * step[a]).powi(2)).sum::<f64>().sqrt();
        if length == 0.0 {
            return Err(PromptError::Unfit(format!(
                "the line from {:?} to itself has no length",
                [b[0], b[1], b[2]]
            )));
        }
        let at = |t: f64| -> [f64; 3] {
            std::array::from_fn(|a| ends[0][a] + t * (ends[1][a] - ends[0][a]))
        };
        let most = (0..3).map(|a| (ends[1][a] - ends[0][a]).abs()).fold(0.0, f64::max);
        let count = (2.0 * most).ceil().max(2.0) as usize;
        room(&mut self.points, count + 1)?;
        for n in 0..=count {
            let t = 0.5 + WITHIN * (n as f64 / count as f64 - 0.5);
            let voxel = at(t).map(|v| v.round() as usize);
            // Along a line, positions that fall into the same voxel are consecutive.
            if self.points.last() != Some(&(voxel, true)) {
                self.points.push((voxel, true));
            }
        }
        let middle = at(0.5);
        let face = |f: usize| -> usize {
            let a = f % 3;
            let along = (ends[1][a] - ends[0][a]).abs() / 2.0;
            let half = along.max(ASPECT * length / 2.0 / step[a]);
            let face = if f < 3 { middle[a] - half } else { middle[a] + half };
            face.round().clamp(0.0, image.size[a] as f64 - 1.0) as usize + usize::from(f >= 3)
        };
        self.draw(std::array::from_fn(face));
        Ok(())
    }

    /// Adds a closed outline around the object on one slice of any axis.
    ///
    /// The voxels well within it count as on the object, and [`Prompts::drawn`] grows to its box,
    /// which is one slice thick: an outline says nothing of the object's depth.
    ///
    /// # Errors
    /// A coordinate is not a number, a corner is outside the scan, there are fewer than three
    /// corners, they are not all on one slice, or no voxel is within them; memory is refused.
    /// Nothing was added.
    pub fn add_lasso(
        &mut self,
        image: &Grid,
        outline: &RawOutline,
        space: Space,
    ) -> Result<(), PromptError> {
        let mut corners: Vec<[f64; 3]> = vec![];
        room(&mut corners, outline.0.len())?;
        corners.extend(outline.0.iter().map(|p| to_voxel(image, *p, space)));
        if corners.len() < 3 {
            return Err(PromptError::Unfit(format!(
                "an outline of {} corners: expected at least three",
                corners.len()
            )));
        }
        outline.0.iter().try_for_each(|p| finite("the outline's corner", p))?;
        for corner in &corners {
            on_scan(image, *corner, "the outline's corner", space)?;
        }
        let flat = |a: usize| corners.iter().all(|c| c[a].round() == corners[0][a].round());
        let Some(axis) = (0..3).rev().find(|a| flat(*a)) else {
            return Err(PromptError::Unfit(
                "the outline is not on a single slice: one of its three indices must be the same at every corner".into(),
            ));
        };
        let (u, v) = ([1, 0, 0][axis], [2, 2, 1][axis]);
        let slice = corners[0][axis].round() as usize;
        let mut bounds: Option<[usize; 6]> = None;
        let span = |a: usize| {
            let along = || corners.iter().map(|c| c[a]);
            along().fold(f64::INFINITY, f64::min).max(0.0) as usize
                ..=along().fold(0.0, f64::max) as usize
        };
        // People draw around things: voxels right at the outline may be either.
        let middle =
            [u, v].map(|a| corners.iter().map(|c| c[a]).sum::<f64>() / corners.len() as f64);
        let across = span(v);
        let before = self.points.len();
        let drawn = memory::caught(|| {
            for p in span(u) {
                memory::reserve(POINTS, &mut self.points, across.clone().count());
                for q in across.clone() {
                    let outwards = |x: usize, m: f64| m + (x as f64 - m) / SHRUNK;
                    if !encloses(&corners, [u, v], [p as f64, q as f64]) {
                        continue;
                    }
                    let shrunk = [outwards(p, middle[0]), outwards(q, middle[1])];
                    let mut voxel = [slice; 3];
                    (voxel[u], voxel[v]) = (p, q);
                    include(&mut bounds, voxel);
                    if encloses(&corners, [u, v], shrunk) {
                        self.points.push((voxel, true));
                    }
                }
            }
        });
        // What is refused leaves no part of it behind.
        drawn.inspect_err(|_| self.points.truncate(before))?;
        let bounds = bounds
            .ok_or_else(|| PromptError::Unfit("the outline contains no voxel centre".into()))?;
        self.draw(bounds);
        Ok(())
    }

    /// Adds an area that was painted on the object (`positive`) or beside it, filled or as an
    /// outline.
    ///
    /// The voxels well within it count as on the object, or off it; of a large area only some of
    /// them, evenly chosen. [`Prompts::drawn`] grows to the box of an area on the object. The area
    /// must be on the scan.
    ///
    /// # Errors
    /// Nothing is marked, or there are not as many marks as voxels; memory is refused.
    pub fn add_area(&mut self, area: &Area, positive: bool) -> Result<(), PromptError> {
        if memory::extent(&area.size) != Some(area.marked.len()) {
            return Err(PromptError::Unfit(format!(
                "an area of {:?} voxels has {} marks",
                area.size,
                area.marked.len()
            )));
        }
        let filled = area.filled();
        let marked = || {
            let all = filled.iter().enumerate().filter(|(_, v)| **v != 0);
            all.map(move |(at, _)| area.voxel(at))
        };
        let count = marked().count();
        let Some(first) = marked().next() else {
            return Err(PromptError::Unfit("the drawn area contains no voxel".into()));
        };
        let mut bounds: [usize; 6] = std::array::from_fn(|f| first[f % 3] + f / 3);
        let mut middle = [0.0; 3];
        for v in marked() {
            for a in 0..3 {
                bounds[a] = bounds[a].min(v[a]);
                bounds[a + 3] = bounds[a + 3].max(v[a] + 1);
                middle[a] += v[a] as f64 / count as f64;
            }
        }
        // People draw around things: voxels right at the outline may be either.
        let within = |v: &[usize; 3]| {
            let outwards: [f64; 3] =
                std::array::from_fn(|a| middle[a] + (v[a] as f64 - middle[a]) / SHRUNK);
            area.holds(&filled, outwards.map(f64::round))
        };
        let deep = marked().filter(within).count();
        let all = if deep > 0 { deep } else { count };
        let every = all.div_ceil(MOST_DRAWN).max(1);
        room(&mut self.points, all.div_ceil(every))?;
        let taken = marked().filter(|v| deep == 0 || within(v)).step_by(every);
        self.points.extend(taken.map(|v| (area.on_scan(v), positive)));
        if positive {
            let low = area.on_scan([bounds[0], bounds[1], bounds[2]]);
            let high = area.on_scan([bounds[3], bounds[4], bounds[5]]);
            self.draw([low[0], low[1], low[2], high[0], high[1], high[2]]);
        }
        Ok(())
    }

    /// Adds prompts that were given after these: points are added, and a later box, mask or mask of
    /// other objects replaces an earlier one.
    ///
    /// # Errors
    /// Memory is refused: nothing was added.
    pub fn join(&mut self, later: &Prompts) -> Result<(), Refused> {
        let (dense, others) = memory::caught(|| {
            memory::reserve(POINTS, &mut self.points, later.points.len());
            let dense = later.dense.as_ref().map(|dense| match dense {
                Dense::Mask(mask) => Dense::Mask(memory::copied(MASK, mask)),
                Dense::Logits(logits) => Dense::Logits(memory::copied(MASK, logits)),
            });
            (dense, later.others.as_ref().map(|others| memory::copied(MASK, others)))
        })?;
        self.points.extend_from_slice(&later.points);
        self.bounds = later.bounds.or(self.bounds);
        self.clipped |= later.clipped;
        if let Some(drawn) = later.drawn {
            self.draw(drawn);
        }
        self.dense = dense.or(self.dense.take());
        self.others = others.or(self.others.take());
        Ok(())
    }

    /// Widens the box of the drawings.
    fn draw(&mut self, b: [usize; 6]) {
        let d = self.drawn.get_or_insert(b);
        *d = std::array::from_fn(|f| if f < 3 { d[f].min(b[f]) } else { d[f].max(b[f]) });
    }
}

/// The most voxels of an area that a drawing becomes: of a larger area, every n-th is taken.
const MOST_DRAWN: usize = 10_000;

/// How messages name the memory that this takes.
const AREA: &str = "a drawn area";

/// A block of a scan with voxels marked in it.
pub struct Area {
    /// The block's first voxel.
    pub low: [usize; 3],
    /// Voxels of the block along i, j and k.
    pub size: [usize; 3],
    /// Not 0 for marked voxels, `[i][j][k]`.
    pub marked: Vec<u8>,
}

impl Area {
    /// The voxel of the block at an index of its list.
    fn voxel(&self, at: usize) -> [usize; 3] {
        let [_, nj, nk] = self.size;
        [at / nk / nj, at / nk % nj, at % nk]
    }

    fn on_scan(&self, v: [usize; 3]) -> [usize; 3] {
        std::array::from_fn(|a| self.low[a] + v[a])
    }

    fn holds(&self, marked: &[u8], v: [f64; 3]) -> bool {
        let inside = (0..3).all(|a| v[a] >= 0.0 && v[a] < self.size[a] as f64);
        inside && {
            let [i, j, k] = v.map(|c| c as usize);
            marked[(i * self.size[1] + j) * self.size[2] + k] != 0
        }
    }

    /// The marks, with the voxels that an outline on a single slice encloses.
    fn filled(&self) -> Vec<u8> {
        let mut marked: Vec<u8> =
            memory::collected(AREA, self.marked.iter().map(|m| u8::from(*m != 0)));
        let Some((axis, slice)) = self.flat() else { return marked };
        let strides = [self.size[1] * self.size[2], self.size[2], 1];
        let (u, v) = [(1, 2), (0, 2), (0, 1)][axis];
        let (nu, nv) = (self.size[u], self.size[v]);
        let place = |p: usize, q: usize| p * strides[u] + q * strides[v] + slice * strides[axis];
        // Voxels that can be reached from the faces of the block without crossing a mark are
        // outside.
        const OUTSIDE: u8 = 2;
        let mut next: VecDeque<(usize, usize)> = VecDeque::new();
        // A voxel is marked when it is reached, so it waits only once; in the order in which they
        // are reached, no more voxels wait than a front has.
        let mut reach = |next: &mut VecDeque<(usize, usize)>, p: usize, q: usize| {
            let here = &mut marked[place(p, q)];
            if *here == 0 {
                *here = OUTSIDE;
                next.push_back((p, q));
            }
        };
        for p in 0..nu {
            reach(&mut next, p, 0);
            reach(&mut next, p, nv - 1);
        }
        for q in 0..nv {
            reach(&mut next, 0, q);
            reach(&mut next, nu - 1, q);
        }
        while let Some((p, q)) = next.pop_front() {
            if p > 0 {
                reach(&mut next, p - 1, q);
            }
            if p + 1 < nu {
                reach(&mut next, p + 1, q);
            }
            if q > 0 {
                reach(&mut next, p, q - 1);
            }
            if q + 1 < nv {
                reach(&mut next, p, q + 1);
            }
        }
        for (p, q) in (0..nu).flat_map(|p| (0..nv).map(move |q| (p, q))) {
            let here = &mut marked[place(p, q)];
            *here = u8::from(*here != OUTSIDE);
        }
        marked
    }

    /// The axis across the single slice that contains all marks, if there is one, and the index of
    /// that slice in the block.
    fn flat(&self) -> Option<(usize, usize)> {
        let mut span: Option<([usize; 3], [usize; 3])> = None;
        for (at, _) in self.marked.iter().enumerate().filter(|(_, m)| **m != 0) {
            let v = self.voxel(at);
            let (low, high) = span.get_or_insert((v, v));
            for a in 0..3 {
                (low[a], high[a]) = (low[a].min(v[a]), high[a].max(v[a]));
            }
        }
        let (low, high) = span?;
        (0..3).rev().find(|a| low[*a] == high[*a]).map(|axis| (axis, low[axis]))
    }
}

fn on_scan(image: &Grid, at: [f64; 3], what: &str, space: Space) -> Result<(), PromptError> {
    let inside = |a: usize| {
        at[a].is_finite() && at[a].round() >= 0.0 && at[a].round() < image.size[a] as f64
    };
    if (0..3).all(inside) {
        return Ok(());
    }
    let voxel = at.map(|v| v.round() as i64);
    let from = if space == Space::Ijk { "" } else { " (from millimetres)" };
    Err(PromptError::Unfit(format!(
        "{what} at voxel {voxel:?}{from} lies outside the scan of {:?} voxels",
        image.size
    )))
}

/// Whether a polygon contains a position, by how often a ray crosses it.
fn encloses(corners: &[[f64; 3]], [u, v]: [usize; 2], [p, q]: [f64; 2]) -> bool {
    let mut inside = false;
    for (a, b) in corners.iter().zip(corners.iter().cycle().skip(1)) {
        if (a[v] > q) != (b[v] > q) && p < (b[u] - a[u]) * (q - a[v]) / (b[v] - a[v]) + a[u] {
            inside = !inside;
        }
    }
    inside
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::Affine;

    fn grid() -> Grid {
        Grid { size: [40, 40, 10], affine: Affine::from_spacing([1.0, 1.0, 5.0]) }
    }

    #[test]
    fn a_line_marks_its_middle_and_bounds_the_object() {
        let mut prompts = Prompts::default();
        prompts.add_line(&grid(), RawBox([10.0, 20.0, 4.0, 30.0, 20.0, 4.0]), Space::Ijk).unwrap();
        let on: Vec<usize> = prompts.points.iter().map(|(p, _)| p[0]).collect();
        assert_eq!((on.iter().min(), on.iter().max()), (Some(&12), Some(&28)));
        assert!(prompts.points.iter().all(|(p, positive)| *positive && p[1..] == [20, 4]));
        // 20 mm along i, 15 mm across: three slices of 5 mm.
        assert_eq!((prompts.bounds, prompts.drawn), (None, Some([10, 13, 3, 31, 29, 7])));
        assert!(prompts.add_line(&grid(), RawBox([1.0; 6]), Space::Ijk).is_err());
        assert!(
            prompts
                .add_line(&grid(), RawBox([10.0, 20.0, 4.0, 50.0, 20.0, 4.0]), Space::Ijk)
                .is_err()
        );
    }

    #[test]
    fn a_painted_area_is_an_outline_or_filled() {
        let square = |at: usize, filled: bool| {
            let [i, j, k] = [at / 300, at / 10 % 30, at % 10];
            let inside = (3..27).contains(&i) && (3..27).contains(&j) && k == 4;
            u8::from(inside && (filled || [3, 26].contains(&i) || [3, 26].contains(&j)))
        };
        let area = |filled: bool| Area {
            low: [20, 10, 0],
            size: [30, 30, 10],
            marked: (0..9000).map(|at| square(at, filled)).collect(),
        };
        let mut painted = Prompts::default();
        painted.add_area(&area(true), true).unwrap();
        assert_eq!(painted.drawn, Some([23, 13, 4, 47, 37, 5]));
        // The outermost voxels may be either.
        assert!(painted.points.iter().all(|(p, on)| *on && p[2] == 4 && p[0] > 23 && p[0] < 46));
        assert_eq!(painted.points.len(), 22 * 22);
        let mut outlined = Prompts::default();
        outlined.add_area(&area(false), true).unwrap();
        assert_eq!(outlined, painted);
        let mut off = Prompts::default();
        off.add_area(&area(true), false).unwrap();
        assert!(off.drawn.is_none() && off.points.iter().all(|(_, on)| !on));
        let mut both = painted.clone();
        both.join(&Prompts { bounds: Some([0, 0, 0, 1, 1, 1]), ..off.clone() }).unwrap();
        assert_eq!(
            (both.points.len(), both.bounds, both.drawn),
            (968, Some([0, 0, 0, 1, 1, 1]), painted.drawn)
        );
        // An outline with a gap encloses nothing.
        let mut open = area(false);
        let gap = (3 * 30 + 10) * 10 + 4;
        assert_ne!(std::mem::replace(&mut open.marked[gap], 0), 0);
        let marks = |area: &Area| area.marked.iter().filter(|m| **m != 0).count();
        let filled = |area: &Area| area.filled().iter().filter(|m| **m == 1).count();
        assert_eq!((filled(&open), filled(&area(false))), (marks(&open), 24 * 24));
        let empty = Area { low: [0; 3], size: [2; 3], marked: vec![0; 8] };
        assert!(off.add_area(&empty, true).is_err());
        assert!(off.add_area(&Area { size: [3; 3], ..empty }, true).is_err());
    }

    #[test]
    fn an_outline_is_filled_on_its_slice() {
        let mut prompts = Prompts::default();
        let square =
            RawOutline(vec![[5.0, 7.0, 3.0], [5.0, 7.0, 8.0], [5.0, 12.0, 8.0], [5.0, 12.0, 3.0]]);
        prompts.add_lasso(&grid(), &square, Space::Ijk).unwrap();
        assert!((16..=25).contains(&prompts.points.len()), "{}", prompts.points.len());
        assert!(prompts.points.iter().all(|(p, positive)| *positive && p[0] == 5));
        let b = prompts.drawn.unwrap();
        assert_eq!((b[0], b[3], b[4] - b[1], b[5] - b[2]), (5, 6, 5, 5));
        let tilted = RawOutline(vec![[5.0, 7.0, 3.0], [6.0, 8.0, 8.0], [7.0, 12.0, 9.0]]);
        assert!(
            prompts
                .add_lasso(&grid(), &tilted, Space::Ijk)
                .unwrap_err()
                .to_string()
                .contains("not on a single slice")
        );
    }
}
