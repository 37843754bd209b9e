//! Simulated users: points, boxes and scribbles, drawn at random from a label and the previous
//! answer, for training and evaluation.
//!
//! Everything is drawn from one seeded generator ([`generator`]); the same seed gives the same
//! prompts. Labels and answers are masks `[i][j][k]` of zeros and ones, k fastest, of `size`
//! voxels; they may be patches.

pub mod click;
mod errors;
pub mod scribble;
#[cfg(test)]
mod tests;
pub mod thinning;

use crate::memory;
use crate::volume::include;
pub use errors::{Bits, Errors};
use errors::{ERRORS, Ranks};
use rand::seq::index::{IndexVecIntoIter, sample};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
pub use scribble::Kind;
use serde::{Deserialize, Serialize};

/// A random generator for one place in a seeded process, for example a case and an iteration: the
/// same seed and path give the same numbers, on every machine.
pub fn generator(seed: u64, path: &[u64]) -> ChaCha8Rng {
    let mix = |h: u64, v: u64| {
        let mut z = (h ^ v).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    };
    ChaCha8Rng::seed_from_u64(path.iter().fold(mix(0, seed), |h, v| mix(h.rotate_left(17), *v)))
}

/// A random number of the standard normal distribution (Box and Muller).
pub fn normal(rng: &mut impl Rng) -> f32 {
    normal_of([rng.random(), rng.random()])
}

/// The standard normal number that two random numbers from 0 to 1 give.
fn normal_of([u, v]: [f32; 2]) -> f32 {
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f32::consts::TAU * v).cos()
}

/// A simulated user: how many points, boxes and scribbles it gives.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// The fewest and the most points of an iteration.
    pub points: [usize; 2],
    /// Probability of a box.
    pub boxed: f64,
    /// The most voxels by which each side of the box grows, at random.
    pub box_growth: usize,
    /// Voxels by which every side of the box moves out (in, if negative).
    pub box_shift: i32,
    /// Probability of scribbles in an iteration.
    pub scribbles: f64,
    /// The most voxels of an iteration's scribbles: half of them at most on missed voxels, half on
    /// excess ones.
    pub scribble_limit: usize,
    /// Whether scribbles are of every [`Kind`], chosen at random, rather than centrelines alone.
    pub all_kinds: bool,
}

impl User {
    /// The paper's training user: 1 to 50 points, a box grown by up to 10 voxels, scribbles of at
    /// most 500 voxels.
    pub fn training() -> User {
        User {
            points: [1, 50],
            boxed: 0.5,
            box_growth: 10,
            box_shift: 0,
            scribbles: 0.5,
            scribble_limit: 500,
            all_kinds: true,
        }
    }

    /// A user who gives `n` points per iteration, and nothing else.
    pub fn of_points(n: usize) -> User {
        User {
            points: [n, n],
            boxed: 0.0,
            box_growth: 0,
            box_shift: 0,
            scribbles: 0.0,
            scribble_limit: 10_000,
            all_kinds: false,
        }
    }
}

/// The name of the voxels of scribbles in refusals of memory.
const LINES: &str = "the voxels of scribbles";

/// The voxel with flat index `at`.
pub(crate) fn voxel(at: usize, [_, nj, nk]: [usize; 3]) -> [i32; 3] {
    [at / (nj * nk), at / nk % nj, at % nk].map(|v| v as i32)
}

/// Draws `n` points without replacement, every wrong voxel with the same probability: each a voxel,
/// true where the answer missed it, false where it is in excess. All wrong voxels, if there are no
/// more than `n`.
pub fn points(
    rng: &mut impl Rng,
    errors: &Errors,
    size: [usize; 3],
    n: usize,
) -> Vec<([i32; 3], bool)> {
    let wrong = Ranks::of(errors.either());
    let drawn = drawn_of(rng, wrong.count(), n);
    let point = |i: usize| {
        let at = wrong.nth(i);
        (voxel(at, size), errors.is_missed(at))
    };
    memory::collected(ERRORS, drawn.map(point))
}

/// At most `n` of the numbers below `count`, drawn at random.
fn drawn_of(rng: &mut impl Rng, count: usize, n: usize) -> IndexVecIntoIter {
    // Drawing lists all of them at most, of four bytes each, by another crate.
    if let Err(e) = memory::check::<u64>("what is drawn from", count) {
        memory::refuse(e);
    }
    sample(rng, count, n.min(count)).into_iter()
}

/// The bounding box of a label, `[i0, j0, k0, i1, j1, k1]`, ends exclusive; none if it is empty.
pub fn bounding_box(label: &[u8], size: [usize; 3]) -> Option<[i32; 6]> {
    let mut bounds = None;
    for (i, j, row) in marked_rows(label, size) {
        let ends = [row.iter().position(|v| *v != 0), row.iter().rposition(|v| *v != 0)];
        ends.into_iter().flatten().for_each(|k| include(&mut bounds, [i, j, k]));
    }
    bounds.map(|b| b.map(|v| v as i32))
}

/// The rows of a mask along k that are not empty, each behind its i and j.
fn marked_rows(
    mask: &[u8],
    [_, nj, nk]: [usize; 3],
) -> impl Iterator<Item = (usize, usize, &[u8])> {
    let rows = mask.chunks_exact(nk.max(1)).enumerate();
    // Most rows are empty: they are seen to be without a branch for every voxel.
    let marked = rows.filter(|(_, row)| row.iter().fold(0u8, |any, v| any | v) != 0);
    marked.map(move |(at, row)| (at / nj, at % nj, row))
}

/// A label's box as a user gives it: each side moved out at random by up to `growth` voxels, and by
/// `shift` more (inwards, if negative), at least one voxel long and within the volume. None if the
/// label is empty.
pub fn drawn_box(
    rng: &mut impl Rng,
    label: &[u8],
    size: [usize; 3],
    growth: usize,
    shift: i32,
) -> Option<[i32; 6]> {
    let tight = bounding_box(label, size)?;
    // Beyond any volume it makes no difference how far a side goes.
    let growth = i32::try_from(growth).unwrap_or(i32::MAX);
    let mut out = tight;
    for (side, face) in out.iter_mut().enumerate() {
        let grown: i32 = rng.random_range(0..=growth);
        let by = grown.saturating_add(shift);
        *face = if side < 3 { face.saturating_sub(by) } else { face.saturating_add(by) };
    }
    for axis in 0..3 {
        if out[axis] >= out[axis + 3] {
            // Eroded away: the middle voxel stays.
            let middle = (tight[axis] + tight[axis + 3] - 1) / 2;
            (out[axis], out[axis + 3]) = (middle, middle + 1);
        }
        out[axis] = out[axis].clamp(0, size[axis] as i32 - 1);
        out[axis + 3] = out[axis + 3].clamp(out[axis] + 1, size[axis] as i32);
    }
    Some(out)
}

/// The voxels of scribbles of one kind over a region, as indices in `[i][j][k]` order: at most
/// `limit`, drawn at random if there are more.
pub fn scribbles(
    rng: &mut impl Rng,
    region: &[u8],
    size: [usize; 3],
    kind: Kind,
    limit: usize,
) -> Vec<usize> {
    let mut voxels = vec![];
    for mut on_slice in scribble::voxels(rng, region, size, kind) {
        memory::reserve(LINES, &mut voxels, on_slice.len());
        voxels.append(&mut on_slice);
    }
    if voxels.len() > limit {
        let drawn = drawn_of(rng, voxels.len(), limit);
        voxels = memory::collected(LINES, drawn.map(|i| voxels[i]));
    }
    voxels
}

impl User {
    /// The box `[i0, j0, k0, i1, j1, k1]`, ends exclusive, that this user gives; none if it gives
    /// none or the label is empty.
    pub fn bounds(&self, rng: &mut impl Rng, label: &[u8], size: [usize; 3]) -> Option<[i32; 6]> {
        let given = rng.random_bool(self.boxed.clamp(0.0, 1.0));
        let bounds = drawn_box(rng, label, size, self.box_growth, self.box_shift);
        bounds.filter(|_| given)
    }

    /// The prompts of one iteration, points and the voxels of scribbles: true on the object; empty
    /// if there is nothing to correct.
    pub fn correct(
        &self,
        rng: &mut impl Rng,
        errors: &Errors,
        size: [usize; 3],
    ) -> Vec<([i32; 3], bool)> {
        let n = rng.random_range(self.points[0]..=self.points[1].max(self.points[0]));
        let mut given = points(rng, errors, size, n);
        if rng.random_bool(self.scribbles.clamp(0.0, 1.0)) {
            let kinds = [Kind::Centreline, Kind::Line, Kind::Contour];
            let kind =
                if self.all_kinds { kinds[rng.random_range(0..3)] } else { Kind::Centreline };
            for positive in [true, false] {
                let region = if positive { errors.missed() } else { errors.excess() };
                let drawn = scribbles(rng, &region, size, kind, self.scribble_limit / 2);
                given.extend(drawn.into_iter().map(|at| (voxel(at, size), positive)));
            }
            let mut seen = std::collections::HashSet::new();
            given.retain(|p| seen.insert(*p));
        }
        given
    }
}
