//! The choice among several guesses at what a click points at.
//!
//! A click gives a position and no size. So the network is asked from several distances, and each
//! time again with a patch that fits what it saw: what that shows is a guess. A right guess is sure
//! of its voxels, is what was seen at first, is found from further off too, and has the click in
//! its middle. The weight of each of these was learned from lesions of every size
//! (`models/README.md`); lengths in millimetres do not count, or the largest lesions of those would
//! have taught that lesions are large.

use super::ANSWER;
use crate::memory;
use crate::volume::patch::Patch;
use crate::volume::resample::{Interpolation, sample};

/// Steps around a guess whose voxels show how sure it is.
const AROUND: usize = 2;
/// The weight of agreement with the guess from further off, relative to how sure a guess is, from 0
/// to 1.
const FROM_AFAR: f32 = 0.175;
/// The weight of agreement with what was seen at first, relative to how sure a guess is, from 0 to
/// 1.
const AT_FIRST: f32 = 0.3;
/// Subtracted for a click that is one radius from the middle.
const OFF_MIDDLE: f32 = 0.37;
/// The Dice coefficient to expect of the chosen guess: the first number, plus the second times its
/// value.
const EXPECTED: [f32; 2] = [0.048, 0.653];
/// Every how many voxels along each axis guesses are compared.
const EVERY: usize = 2;

/// What a look showed of an object.
pub struct Guess<'a> {
    /// The patch of the look.
    pub patch: &'a Patch,
    /// The network's answer, `[i][j][k]` on the patch.
    pub logits: &'a [f32],
}

impl Guess<'_> {
    /// How sure a guess is: the mean distance of probabilities from one half, scaled to 0 to 1,
    /// over the object and two voxels around it. 0 if there is no object.
    pub fn sureness(&self) -> f32 {
        let mut near: Vec<u8> =
            memory::collected(ANSWER, self.logits.iter().map(|l| u8::from(*l > 0.0)));
        (0..AROUND).for_each(|_| spread(&mut near, self.patch.grid.size[0]));
        let all = self.logits.iter().zip(&near).filter(|(_, near)| **near != 0);
        let (sum, n) = all.fold((0.0f64, 0usize), |(sum, n), (logit, _)| {
            (sum + f64::from((logit / 2.0).tanh().abs()), n + 1)
        });
        (sum / n.max(1) as f64) as f32
    }

    /// The distance of a position, in voxels of the scan, from the object's centre of mass, in
    /// radii of the ball with the object's volume. 0 if there is no object.
    pub fn off_middle(&self, place: [f64; 3]) -> f32 {
        let edge = self.patch.grid.size[0];
        let (mut sum, mut n) = ([0usize; 3], 0usize);
        for at in (0..self.logits.len()).filter(|at| self.logits[*at] > 0.0) {
            let p = [at / (edge * edge), at / edge % edge, at % edge];
            (0..3).for_each(|d| sum[d] += p[d]);
            n += 1;
        }
        if n == 0 {
            return 0.0;
        }
        let place = self.patch.from_image.apply(place);
        let off = (0..3).map(|d| (sum[d] as f64 / n as f64 - place[d]).powi(2)).sum::<f64>();
        let radius = (0.75 * n as f64 / std::f64::consts::PI).cbrt();
        (off.sqrt() / radius) as f32
    }

    /// The Dice coefficient of this object and another guess's, on this one's patch.
    pub fn agreement(&self, other: &Guess) -> f32 {
        let size = self.patch.grid.size;
        let there = other.patch.grid.affine.inverse().after(&self.patch.grid.affine);
        let (mut both, mut all) = (0usize, 0usize);
        for i in (0..size[0]).step_by(EVERY) {
            for j in (0..size[1]).step_by(EVERY) {
                for k in (0..size[2]).step_by(EVERY) {
                    let here = self.logits[(i * size[1] + j) * size[2] + k] > 0.0;
                    let at = there.apply([i, j, k].map(|v| v as f64));
                    let value =
                        sample(other.logits, other.patch.grid.size, at, Interpolation::Linear);
                    let there = value.is_some_and(|v| v > 0.0);
                    both += usize::from(here && there);
                    all += usize::from(here) + usize::from(there);
                }
            }
        }
        2.0 * both as f32 / all.max(1) as f32
    }
}

/// Sets all neighbours of what is set, in a cube of `edge` voxels a side.
fn spread(set: &mut [u8], edge: usize) {
    let from: Vec<u8> = memory::copied(ANSWER, set);
    for (axis, stride) in [edge * edge, edge, 1].into_iter().enumerate() {
        // Within blocks that the axis runs through, all neighbours are in the same block.
        let block = stride * edge;
        debug_assert_eq!(block, edge.pow(3 - axis as u32));
        for (to, from) in set.chunks_exact_mut(block).zip(from.chunks_exact(block)) {
            to[stride..].iter_mut().zip(from).for_each(|(t, f)| *t |= f);
            to[..block - stride].iter_mut().zip(&from[stride..]).for_each(|(t, f)| *t |= f);
        }
    }
}

/// The guess to believe among several at what a `place` in voxels of the scan points at, and the
/// Dice coefficient to expect of it; none if there are no guesses. They are ordered from the
/// closest to the furthest, each with what was seen of it at first.
pub fn most_believable(guesses: &[(Guess, Guess)], place: [f64; 3]) -> Option<(usize, f32)> {
    let worth = |at: usize| {
        let (first, guess) = &guesses[at];
        let afar = guesses.get(at + 1).map_or(0.0, |(_, further)| further.agreement(guess));
        guess.sureness() + FROM_AFAR * afar + AT_FIRST * guess.agreement(first)
            - OFF_MIDDLE * guess.off_middle(place)
    };
    let worth: Vec<f32> = (0..guesses.len()).map(worth).collect();
    let best = (0..guesses.len()).max_by(|a, b| worth[*a].total_cmp(&worth[*b]))?;
    Some((best, (EXPECTED[0] + EXPECTED[1] * worth[best]).clamp(0.0, 1.0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::patch::Extent;
    use crate::volume::{Affine, Grid};

    const EDGE: usize = 32;
    const MIDDLE: [f64; 3] = [50.0; 3];

    fn patch(spacing: f64) -> Patch {
        let grid = Grid { size: [100; 3], affine: Affine::from_spacing([1.0; 3]) };
        let place = Extent { low: [49.5; 3], high: [50.5; 3] };
        Patch::place(&grid, EDGE, spacing, &place)
    }

    /// A ball of `radius` mm around `centre` in voxels of 1 mm, as sure as `logit`.
    fn ball(patch: &Patch, centre: [f64; 3], radius: f64, logit: f32) -> Vec<f32> {
        let middle = patch.from_image.apply(centre);
        let value = |at: usize| {
            let p = [at / (EDGE * EDGE), at / EDGE % EDGE, at % EDGE];
            let off = (0..3).map(|d| (p[d] as f64 - middle[d]).powi(2)).sum::<f64>().sqrt();
            if off * patch.spacing <= radius { logit } else { -logit }
        };
        (0..EDGE.pow(3)).map(value).collect()
    }

    #[test]
    fn what_is_alike_agrees_whatever_its_patch() {
        let (near, far) = (patch(1.0), patch(2.0));
        let (a, b) = (ball(&near, MIDDLE, 10.0, 4.0), ball(&far, MIDDLE, 10.0, 4.0));
        let (a, b) = (Guess { patch: &near, logits: &a }, Guess { patch: &far, logits: &b });
        assert!(a.agreement(&a) == 1.0 && b.agreement(&b) == 1.0);
        assert!(a.agreement(&b) > 0.85 && b.agreement(&a) > 0.85);
        let c = ball(&far, [50.0, 50.0, 80.0], 10.0, 4.0);
        assert_eq!(a.agreement(&Guess { patch: &far, logits: &c }), 0.0);
        let nothing = vec![-1.0; EDGE.pow(3)];
        let nothing = Guess { patch: &near, logits: &nothing };
        assert_eq!(
            [nothing.agreement(&a), nothing.sureness(), nothing.off_middle(MIDDLE)],
            [0.0, 0.0, 0.0]
        );
    }

    #[test]
    fn sureness_looks_at_an_object_and_two_voxels_around_it() {
        let patch = patch(1.0);
        let mut logits = ball(&patch, MIDDLE, 6.0, 4.0);
        let sure = Guess { patch: &patch, logits: &logits }.sureness();
        assert!((sure - 2f32.tanh()).abs() < 1e-6);
        // Doubt far from the object does not count, doubt beside it does.
        logits[0] = -0.001;
        assert_eq!(Guess { patch: &patch, logits: &logits }.sureness(), sure);
        let [i, j, k] = patch.voxel([50.0, 50.0, 58.0]).unwrap().map(|v| v as usize);
        logits[(i * EDGE + j) * EDGE + k] = -0.001;
        assert!(Guess { patch: &patch, logits: &logits }.sureness() < sure);
    }

    #[test]
    fn nothing_spreads_around_an_edge() {
        let mut set = vec![0; 27];
        (set[2], set[26]) = (1, 1);
        spread(&mut set, 3);
        let on: Vec<usize> = (0..27).filter(|at| set[*at] != 0).collect();
        assert_eq!(on, [1, 2, 5, 11, 17, 23, 25, 26]);
    }

    #[test]
    fn the_middle_is_told_in_radii() {
        let patch = patch(1.0);
        let logits = ball(&patch, MIDDLE, 8.0, 4.0);
        let guess = Guess { patch: &patch, logits: &logits };
        assert!(guess.off_middle(MIDDLE) < 0.01);
        assert!((guess.off_middle([50.0, 54.0, 50.0]) - 0.5).abs() < 0.02);
    }

    #[test]
    fn what_is_sure_seen_twice_and_around_the_click_is_believed() {
        let (near, far) = (patch(1.0), patch(2.0));
        let right = ball(&near, MIDDLE, 10.0, 4.0);
        let found = ball(&far, MIDDLE, 10.0, 4.0);
        let unsure = ball(&near, MIDDLE, 10.0, 1.0);
        let aside = ball(&near, [50.0, 57.0, 50.0], 10.0, 4.0);
        let small = ball(&near, MIDDLE, 4.0, 4.0);
        // The same at first and then; from further off, a little less.
        let pair = |first, then| {
            (Guess { patch: &near, logits: first }, Guess { patch: &near, logits: then })
        };
        let pick = |all: &[(Guess, Guess)]| most_believable(all, MIDDLE).map(|(at, _)| at);
        assert_eq!(pick(&[]), None);
        // More is expected of a surer guess.
        let expected = |logits| most_believable(&[pair(logits, logits)], MIDDLE).unwrap().1;
        assert!(expected(&right) > expected(&unsure) + 0.1 && expected(&right) < 1.0);
        assert_eq!(pick(&[pair(&unsure, &unsure), pair(&right, &right)]), Some(1));
        assert_eq!(pick(&[pair(&right, &right), pair(&aside, &aside)]), Some(0));
        assert_eq!(pick(&[pair(&small, &right), pair(&right, &right)]), Some(1));
        // Found again from further off: the first is believed, otherwise the last of equals.
        let far = || Guess { patch: &far, logits: &found };
        assert_eq!(pick(&[pair(&right, &right), (far(), far())]), Some(0));
    }
}
