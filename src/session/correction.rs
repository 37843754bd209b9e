//! Making clicks hold, in closed form: the surface of a mask is moved smoothly, so that it runs on
//! the right side of every click.
//!
//! A click inside an excess part, or inside a missed part, is about halfway between the present
//! surface and the correct one. So the mask's signed distance `phi` (in voxels, positive inside)
//! should change from `phi(c)` to `-phi(c)` there, stay as it is at clicks that hold already, and
//! change smoothly in between: the mean of a Gaussian process through these values, whose length is
//! between the click's depth and the object's size, and which varies less between two voxels the
//! more alike their values on the scan are (a bilateral kernel: a missed part looks more like the
//! clicked voxel than the voxels beyond it do). Voxels where the sign changes change sides; beside
//! them logits become the distance to the surface, and all others stay as they are.

use super::appearance::smooth;
use super::{ANSWER, CLICKS};
use crate::memory;
use crate::volume::distance::squared_distance;

/// A voxel `[i, j, k]` of the patch, and whether it is on the object.
pub type Click = ([i32; 3], bool);

/// The largest magnitude of the logits that a correction writes.
const MOST_LOGIT: f32 = 8.0;
/// The smallest: a voxel that was put on one side stays there when float32 rounds.
const LEAST_LOGIT: f32 = 0.25;
/// Voxels by which a surface must have been moved for logits beside it to become its distance.
const LEAST_MOVED: f32 = 0.25;
/// How many times the length is halved before voxels that are still on the wrong side are set one
/// by one.
const PASSES: usize = 4;
/// The most clicks that one pass solves for, separately for those that disagree and those that
/// hold; of more, the ones farthest apart.
const MOST_ANCHORS: usize = 48;

/// The shortest process of a first pass, in voxels.
const LEAST_LENGTH: f32 = 1.5;
/// The furthest from a click that the surface is looked for, and the longest process, in voxels:
/// the neighbourhood of a correction stays small on patches of any size.
const FURTHEST: f32 = 12.0;

/// The number of voxels that disagree at once from which on they are a stroke.
const STROKE: usize = 4;

/// Standard deviation, in voxels, of the filter applied before values are compared, so that noise
/// does not count.
const BLUR: f32 = 0.8;
/// The distance of values that look alike, in standard deviations of those around the clicks.
const ALIKE: f32 = 1.5;
/// The least value of that deviation, in standard deviations of the network's input: below it there
/// is only noise.
const LEAST_CONTRAST: f32 = 0.05;

/// The parameters of the correction. The default is for an object of known size.
#[derive(Clone, Copy, Debug)]
pub struct Steering {
    /// Length of the process, as a multiple of the geometric mean of the distance from the click to
    /// the surface and the object's diameter: an error that is shallow is wide, and one that is
    /// deep is not as wide as it is deep. For a click on excess, and for one on a missed part.
    pub length: [f32; 2],
    /// The greatest length of the process for a click on excess, and for one on a missed part, in
    /// diameters of the object.
    pub most_length: [f32; 2],
    /// How far from a click the surface is looked for, in diameters of the object.
    pub most_depth: f32,
    /// How far beyond a click on excess the surface goes, and beyond one on a missed part, as a
    /// part of its distance to the click.
    pub beyond: [f32; 2],
    /// How far beyond a stroke's voxels the surface goes, as a part of its distance to them.
    pub beyond_strokes: f32,
    /// How far from a click the network may change the answer: as a multiple of the distance from
    /// the click to the surface, to which [`Steering::reach_by_size`] is added.
    pub reach_by_depth: f32,
    /// How far from a click the network may change the answer, in addition to
    /// [`Steering::reach_by_depth`]: in diameters of the object.
    pub reach_by_size: f32,
    /// The weight of the network's answer where it may change the answer (0 to 1), relative to the
    /// corrected one that it was given.
    pub trust: f32,
    /// The weight of the network's answer after a stroke, which moves the surface less.
    pub trust_strokes: f32,
}

impl Default for Steering {
    fn default() -> Steering {
        Steering {
            length: [0.75, 1.125],
            most_length: [0.2, 0.3],
            most_depth: 0.5,
            beyond: [1.0, 1.2],
            beyond_strokes: 0.1,
            reach_by_depth: 2.0,
            reach_by_size: 0.3,
            trust: 0.3,
            trust_strokes: 0.6,
        }
    }
}

impl Steering {
    /// The parameters by whether a box, a mask or more than a few clicks say how large the object
    /// is.
    pub fn of(bounded: bool) -> Steering {
        if bounded { Steering::default() } else { Steering::unbounded() }
    }

    /// The parameters if nothing says how large the object is: the answer is usually too small, and
    /// a click beyond it means much more than the voxels around the click.
    fn unbounded() -> Steering {
        let bounded = Steering::default();
        Steering {
            length: [bounded.length[0], 0.75],
            most_length: [bounded.most_length[0], 0.6],
            beyond: [bounded.beyond[0], 2.0],
            ..bounded
        }
    }

    /// The weight of the network's answer when `wrong` voxels disagree: that after a stroke if they
    /// are more than four.
    pub fn trust(&self, wrong: usize) -> f32 {
        if wrong > STROKE { self.trust_strokes } else { self.trust }
    }
}

/// The diameter, in voxels, of a ball with as many voxels as `logits` has positive ones, and at
/// least 6.
pub fn diameter(logits: &[f32]) -> f32 {
    let voxels = logits.iter().filter(|v| **v > 0.0).count();
    (1.24 * (voxels as f32).cbrt()).max(6.0)
}

/// The clicks that `logits` `[i][j][k]` of `size` voxels does not obey.
pub fn disagreeing(logits: &[f32], size: [usize; 3], clicks: &[Click]) -> Vec<Click> {
    memory::counted(CLICKS, clicks.iter().copied().filter(|c| !holds(logits, size, c)))
}

/// Whether `logits` obeys a click.
fn holds(logits: &[f32], size: [usize; 3], (p, positive): &Click) -> bool {
    (logits[place(*p, size)] > 0.0) == *positive
}

fn place([i, j, k]: [i32; 3], [_, nj, nk]: [usize; 3]) -> usize {
    (i as usize * nj + j as usize) * nk + k as usize
}

fn apart(a: [i32; 3], b: [i32; 3]) -> f32 {
    squared(a, b).sqrt()
}

fn squared(a: [i32; 3], b: [i32; 3]) -> f32 {
    (0..3).map(|d| ((a[d] - b[d]) as f32).powi(2)).sum()
}

/// A part of the patch, with the signed distance to the mask's surface.
struct Neighbourhood {
    low: [usize; 3],
    size: [usize; 3],
    phi: Vec<f32>,
    /// The values of its voxels, in units of [`ALIKE`]; empty if they are unknown.
    values: Vec<f32>,
}

impl Neighbourhood {
    /// The part within `margin` voxels of the clicks.
    fn around(logits: &[f32], size: [usize; 3], clicks: &[Click], margin: usize) -> Neighbourhood {
        let of = |d: usize, f: fn(i32, i32) -> i32| {
            clicks.iter().map(|c| c.0[d]).reduce(f).unwrap_or(0) as usize
        };
        let low: [usize; 3] = std::array::from_fn(|d| of(d, i32::min).saturating_sub(margin));
        let extent: [usize; 3] =
            std::array::from_fn(|d| (of(d, i32::max) + margin + 1).min(size[d]) - low[d]);
        let mut inside = memory::list(ANSWER, extent.iter().product());
        for (i, j) in (0..extent[0]).flat_map(|i| (0..extent[1]).map(move |j| (i, j))) {
            let row = ((low[0] + i) * size[1] + low[1] + j) * size[2] + low[2];
            inside.extend(logits[row..row + extent[2]].iter().map(|v| u8::from(*v > 0.0)));
        }
        let outside: Vec<u8> = memory::collected(ANSWER, inside.iter().map(|v: &u8| 1 - v));
        let (to_inside, to_outside) = (
            squared_distance(&inside, extent, [1.0; 3]),
            squared_distance(&outside, extent, [1.0; 3]),
        );
        // The surface is halfway between two voxels; if none is in sight it counts as that far
        // away.
        let far = margin as f32;
        let phi = to_outside.iter().zip(&to_inside).map(|(o, i)| {
            if *o > 0.0 { (o.sqrt() - 0.5).min(far) } else { -(i.sqrt() - 0.5).min(far) }
        });
        let phi = memory::collected(ANSWER, phi);
        Neighbourhood { low, size: extent, phi, values: vec![] }
    }

    /// The neighbourhood with the patch's `values`.
    fn seen(mut self, values: &[f32], size: [usize; 3]) -> Neighbourhood {
        let [low, extent] = [self.low, self.size];
        let mut near: Vec<f32> = memory::list(ANSWER, extent.iter().product());
        for (i, j) in (0..extent[0]).flat_map(|i| (0..extent[1]).map(move |j| (i, j))) {
            let row = ((low[0] + i) * size[1] + low[1] + j) * size[2] + low[2];
            near.extend(&values[row..row + extent[2]]);
        }
        smooth(&mut near, extent, BLUR);
        let n = near.len().max(1) as f64;
        let mean = near.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
        let variance = near.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
        // If nearly all values are equal, they do not distinguish anything.
        let scale = 1.0 / (ALIKE * (variance.sqrt() as f32).max(LEAST_CONTRAST));
        near.iter_mut().for_each(|v| *v *= scale);
        self.values = near;
        self
    }

    fn holds(&self, p: [i32; 3]) -> bool {
        (0..3).all(|d| p[d] as usize >= self.low[d] && (p[d] as usize) < self.low[d] + self.size[d])
    }

    fn place(&self, p: [i32; 3]) -> usize {
        let [i, j, k]: [usize; 3] = std::array::from_fn(|d| p[d] as usize - self.low[d]);
        (i * self.size[1] + j) * self.size[2] + k
    }

    fn at(&self, p: [i32; 3]) -> f32 {
        self.phi[self.place(p)]
    }

    /// The squared difference of the values at two positions, in units of [`ALIKE`].
    fn unlike(&self, a: usize, b: usize) -> f32 {
        if self.values.is_empty() { 0.0 } else { (self.values[a] - self.values[b]).powi(2) }
    }
}

/// At most [`MOST_ANCHORS`] of the clicks, each as far from those before it as possible.
fn spread(clicks: &[Click]) -> Vec<Click> {
    if clicks.len() <= MOST_ANCHORS {
        return clicks.to_vec();
    }
    let mut chosen = vec![clicks[0]];
    let mut distance: Vec<f32> =
        memory::collected(CLICKS, clicks.iter().map(|c| apart(c.0, clicks[0].0)));
    while chosen.len() < MOST_ANCHORS {
        let farthest =
            (0..clicks.len()).max_by(|a, b| distance[*a].total_cmp(&distance[*b])).unwrap_or(0);
        let next = clicks[farthest];
        chosen.push(next);
        distance.iter_mut().zip(clicks).for_each(|(d, c)| *d = d.min(apart(c.0, next.0)));
    }
    chosen
}

/// Moves the surface of a mask, given by its logits `[i][j][k]`, so that every click is on its
/// side: smoothly if possible, voxel by voxel where clicks of both kinds are side by side.
/// `diameter` is the object's, in voxels; `values`, the network's input on the patch, show what
/// looks alike, if given. If all clicks hold, nothing changes.
pub fn correct(
    logits: &mut [f32],
    size: [usize; 3],
    clicks: &[Click],
    diameter: f32,
    how: &Steering,
    values: Option<&[f32]>,
) {
    for pass in 0..PASSES {
        let wrong = disagreeing(logits, size, clicks);
        if wrong.is_empty() {
            return;
        }
        let most = (how.most_depth * diameter).clamp(2.0, FURTHEST);
        let mut near = Neighbourhood::around(logits, size, &wrong, (3.0 * most).ceil() as usize);
        if let Some(values) = values {
            near = near.seen(values, size);
        }
        let anchors = spread(&wrong);
        let depth = |c: &Click| near.at(c.0).abs().min(most);
        let lengths = anchors.iter().map(|c| {
            let longest = (how.most_length[usize::from(c.1)] * diameter).min(FURTHEST);
            (how.length[usize::from(c.1)] * (depth(c) * diameter).sqrt()).min(longest)
        });
        let mut length = lengths.fold(LEAST_LENGTH, f32::max);
        let is_stroke = wrong.len() > STROKE;
        if !is_stroke {
            // The surface runs between a click and one of the other kind, whether that holds
            // already or not. Clicks of strokes are too close to one another to limit each other.
            let between = anchors.iter().flat_map(|a| {
                clicks.iter().filter(move |c| c.1 != a.1).map(move |c| apart(a.0, c.0))
            });
            let nearest = between.fold(f32::INFINITY, f32::min);
            length = length.min((0.5 * nearest).max(LEAST_LENGTH));
        }
        length = (length * 0.5f32.powi(pass as i32)).max(0.5);
        let mut changes: Vec<(Click, f32)> = anchors
            .iter()
            .map(|c| {
                // A click is the deepest place of an error; a stroke runs through shallow places
                // too, and says where the surface is not, not where it is.
                let beyond = match is_stroke {
                    true => how.beyond_strokes,
                    false => how.beyond[usize::from(c.1)],
                };
                let goal = (beyond * depth(c)).max(1.0);
                (*c, if c.1 { goal } else { -goal } - near.at(c.0))
            })
            .collect();
        let so_far: &[f32] = logits;
        let held = clicks.iter().copied().filter(|c| near.holds(c.0) && holds(so_far, size, c));
        let mut held: Vec<Click> = memory::counted(CLICKS, held);
        held.retain(|h| anchors.iter().any(|c| apart(c.0, h.0) < 3.0 * length));
        changes.extend(spread(&held).into_iter().map(|c| (c, 0.0)));
        let weights = solve(&changes, length, &near);
        // Along a stroke the surface is not known that precisely: there the network's logits stay.
        apply(logits, size, &near, (&changes, &weights), length, !is_stroke);
    }
    for (p, positive) in disagreeing(logits, size, clicks) {
        logits[place(p, size)] = if positive { LEAST_LOGIT } else { -LEAST_LOGIT };
    }
}

/// The Gaussian process's weights: its covariance among the clicks, solved for their changes by
/// Cholesky decomposition.
fn solve(changes: &[(Click, f32)], length: f32, near: &Neighbourhood) -> Vec<f64> {
    let n = changes.len();
    let places: Vec<usize> = changes.iter().map(|c| near.place(c.0.0)).collect();
    // A thousandth on the diagonal keeps the system solvable when clicks share a voxel.
    let covariance = |a: usize, b: usize| {
        let d = f64::from(squared(changes[a].0.0, changes[b].0.0)) / f64::from(length).powi(2);
        let d = d + f64::from(near.unlike(places[a], places[b]));
        (-0.5 * d).exp() + if a == b { 1e-3 } else { 0.0 }
    };
    let mut l: Vec<f64> = memory::zeroed(CLICKS, n * n);
    for a in 0..n {
        for b in 0..=a {
            let sum: f64 =
                covariance(a, b) - (0..b).map(|c| l[a * n + c] * l[b * n + c]).sum::<f64>();
            l[a * n + b] = if a == b { sum.max(1e-9).sqrt() } else { sum / l[b * n + b] };
        }
    }
    let mut x: Vec<f64> = changes.iter().map(|c| c.1 as f64).collect();
    for a in 0..n {
        let sum: f64 = (0..a).map(|b| l[a * n + b] * x[b]).sum();
        x[a] = (x[a] - sum) / l[a * n + a];
    }
    for a in (0..n).rev() {
        let sum: f64 = (a + 1..n).map(|b| l[b * n + a] * x[b]).sum();
        x[a] = (x[a] - sum) / l[a * n + a];
    }
    x
}

/// Adds the process to the signed distance, and writes the logits of voxels whose side changes;
/// with `beside`, also of those next to the surface.
fn apply(
    logits: &mut [f32],
    size: [usize; 3],
    near: &Neighbourhood,
    (changes, weights): (&[(Click, f32)], &[f64]),
    length: f32,
    beside: bool,
) {
    let reach = (3.0 * length).ceil() as i32;
    let mut moved: Vec<f32> = memory::zeroed(ANSWER, near.phi.len());
    for ((click, _), weight) in changes.iter().zip(weights) {
        let (c, own) = (click.0, near.place(click.0));
        let range = |d: usize| {
            let low = (c[d] - reach).max(near.low[d] as i32);
            low..(c[d] + reach + 1).min((near.low[d] + near.size[d]) as i32)
        };
        for i in range(0) {
            for j in range(1) {
                let row = ((i as usize - near.low[0]) * near.size[1] + j as usize - near.low[1])
                    * near.size[2];
                for k in range(2) {
                    let at = row + k as usize - near.low[2];
                    let d = squared([i, j, k], c) / (length * length) + near.unlike(own, at);
                    moved[at] += *weight as f32 * (-0.5 * d).exp();
                }
            }
        }
    }
    // Clicks of both kinds side by side have weights that are far larger than the changes: nothing
    // moves further than the largest change asked for.
    let least = changes.iter().map(|c| c.1).fold(0.0, f32::min);
    let most = changes.iter().map(|c| c.1).fold(0.0, f32::max);
    for (at, change) in moved.iter().enumerate().filter(|(_, m)| **m != 0.0) {
        let phi = near.phi[at] + change.clamp(least, most);
        let [i, j, k] = [
            at / (near.size[1] * near.size[2]),
            at / near.size[2] % near.size[1],
            at % near.size[2],
        ];
        let logit = &mut logits
            [((near.low[0] + i) * size[1] + near.low[1] + j) * size[2] + near.low[2] + k];
        if (phi > 0.0) != (*logit > 0.0) {
            *logit = phi.abs().clamp(LEAST_LOGIT, MOST_LOGIT).copysign(if phi > 0.0 {
                1.0
            } else {
                -1.0
            });
        } else if beside && change.abs() > LEAST_MOVED {
            // On both sides of the surface logits are the distance to it, so that the surface stays
            // where it is between voxels too, where a finer grid reads them.
            *logit = logit.abs().min(phi.abs().max(LEAST_LOGIT)).copysign(*logit);
        }
    }
}

/// The weights `[i][j][k]`, 0 to 1, with which an answer may change when `wrong` clicks disagree
/// with it: 1 near them, and 0 far from all of them ([`Steering::reach_by_depth`],
/// [`Steering::reach_by_size`]). `diameter` is the object's, in voxels.
pub fn locality(
    logits: &[f32],
    size: [usize; 3],
    wrong: &[Click],
    diameter: f32,
    how: &Steering,
) -> Vec<f32> {
    let mut weights: Vec<f32> = memory::zeroed(ANSWER, logits.len());
    let most = (how.most_depth * diameter).clamp(2.0, FURTHEST);
    let near = Neighbourhood::around(logits, size, wrong, (3.0 * most).ceil() as usize);
    for click in spread(wrong) {
        let reach = how.reach_by_depth * near.at(click.0).abs() + how.reach_by_size * diameter;
        let c = click.0;
        let range = |d: usize| {
            let by = (1.5 * reach).ceil() as i32;
            (c[d] - by).max(0)..(c[d].saturating_add(by + 1)).min(size[d] as i32)
        };
        for i in range(0) {
            for j in range(1) {
                for k in range(2) {
                    let t = ((1.5 * reach - apart([i, j, k], c)) / (0.5 * reach)).clamp(0.0, 1.0);
                    let w = &mut weights[place([i, j, k], size)];
                    *w = w.max(t * t * (3.0 - 2.0 * t));
                }
            }
        }
    }
    weights
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The logits of a ball of 10 voxels radius in the middle of 40.
    fn ball() -> Vec<f32> {
        let inside = |at: usize| {
            let p = [at / 1600, at / 40 % 40, at % 40];
            p.iter().map(|v| (*v as f32 - 20.0).powi(2)).sum::<f32>() < 100.0
        };
        (0..64_000).map(|at| if inside(at) { 4.0 } else { -4.0 }).collect()
    }

    #[test]
    fn without_a_box_a_click_beyond_means_more() {
        let (size, logits) = ([40usize; 3], ball());
        let added = |how: &Steering| {
            let mut after = logits.clone();
            correct(&mut after, size, &[([20, 20, 35], true)], diameter(&logits), how, None);
            after.iter().zip(&logits).filter(|(a, b)| **a > 0.0 && **b <= 0.0).count()
        };
        let [bounded, unbounded] = [true, false].map(|b| added(&Steering::of(b)));
        assert!(bounded > 300 && unbounded > 2 * bounded, "{bounded}, {unbounded}");
    }

    #[test]
    fn a_correction_keeps_to_what_looks_like_its_click() {
        let (size, logits) = ([40usize; 3], ball());
        // Voxels beyond k = 30 look different on one side of j = 20; on a scan of one value
        // everything looks alike.
        let other = |at: usize| at % 40 > 30 && at / 40 % 40 >= 20;
        let values: Vec<f32> = (0..64_000).map(|at| f32::from(u8::from(other(at)))).collect();
        let added = |values: Option<&[f32]>| {
            let (mut after, how) = (logits.clone(), Steering::default());
            let click = [([20, 16, 33], true)];
            correct(&mut after, size, &click, diameter(&logits), &how, values);
            assert!(disagreeing(&after, size, &click).is_empty());
            let new = (0..64_000).filter(|at| after[*at] > 0.0 && logits[*at] <= 0.0);
            let (others, alike): (Vec<usize>, Vec<usize>) = new.partition(|at| other(*at));
            [others.len(), alike.len()]
        };
        let [all, seen] = [added(None), added(Some(&values))];
        assert_eq!(added(Some(&[7.0; 64_000])), all);
        assert!(all[0] > 40 && seen[0] < all[0] / 4, "{all:?}, {seen:?}");
        assert!(seen[1] > all[1] * 3 / 4, "{all:?}, {seen:?}");
    }

    #[test]
    fn a_finer_grid_loses_nothing_of_a_correction() {
        let (size, before) = ([40usize; 3], ball());
        let mut after = before.clone();
        correct(
            &mut after,
            size,
            &[([20, 20, 33], true)],
            diameter(&before),
            &Steering::default(),
            None,
        );
        let on = |logits: &[f32]| logits.iter().filter(|v| **v > 0.0).count() as f32;
        // Eight positions per voxel, by interpolation.
        let finer = |logits: &[f32]| {
            let at = |[i, j, k]: [usize; 3]| logits[(i * 40 + j) * 40 + k];
            let mut count = 0;
            for n in 0..78 * 78 * 78usize {
                let p = [n / (78 * 78), n / 78 % 78, n % 78];
                let mut sum = 0.0;
                for corner in 0..8 {
                    let step = [corner & 1, corner >> 1 & 1, corner >> 2 & 1];
                    sum += at([0, 1, 2].map(|d| p[d] / 2 + p[d] % 2 * step[d]));
                }
                count += usize::from(sum > 0.0);
            }
            count as f32 / 8.0
        };
        let [coarse, fine] = [on(&after) - on(&before), finer(&after) - finer(&before)];
        assert!(fine > 0.95 * coarse, "{coarse} voxels, {fine} as a finer grid reads them");
    }

    #[test]
    fn a_click_beside_one_that_says_otherwise_moves_little() {
        let (size, logits) = ([40usize; 3], ball());
        let corrected = |clicks: &[Click]| {
            let mut after = logits.clone();
            correct(&mut after, size, clicks, diameter(&logits), &Steering::default(), None);
            assert!(disagreeing(&after, size, clicks).is_empty());
            let changed = |sign: f32| {
                let each = logits.iter().zip(&after);
                each.filter(|(b, a)| *b * sign > 0.0 && *a * sign <= 0.0).count()
            };
            [changed(1.0), changed(-1.0)]
        };
        // Three voxels deep, alone and four voxels from a click that holds.
        let [alone, added] = corrected(&[([20, 20, 27], false)]);
        assert!(alone > 400 && added == 0, "{alone}, {added}");
        let [beside, added] = corrected(&[([20, 24, 27], true), ([20, 20, 27], false)]);
        assert!(beside < alone / 2 && added == 0, "{beside} of {alone}, {added}");
        // Nor do two that both disagree, six voxels apart.
        let [removed, added] = corrected(&[([20, 20, 33], true), ([20, 20, 27], false)]);
        let most = alone * 2 / 3;
        assert!(removed < most && added < most, "{removed} and {added} of {alone}");
    }
}
