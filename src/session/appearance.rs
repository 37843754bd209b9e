//! What an object looks like, in closed form: voxels whose values are like the object's rather than
//! like its surroundings' are added to an answer, and the others removed.
//!
//! A network that learned from other scans knows shapes and places better than the brightness of
//! this object on this scan. The answer itself tells that: its voxels' values, each weighted by its
//! probability, make one histogram, those of the rest of the box and a margin around it another.
//! The logarithm of their ratio, slightly smoothed, is evidence in addition to the network's logit.
//! Where the two histograms overlap it is about zero.
//!
//! In a given box two more things are known of most objects: they fill it as an ellipsoid would,
//! and they take up less of it than their surroundings do.
//!
//! It is for an answer that rests on the network alone. Once the user has corrected it, the
//! histograms hold nothing that the answer does not know: computed again after every click, they
//! would undo what the clicks said.

use super::ANSWER;
use crate::memory;
use crate::volume::include;

/// Classes of a histogram of values.
const CLASSES: usize = 64;
/// The part of the values around an object that are below the lowest class, and above the highest.
const TAIL: f64 = 0.005;
/// Weights of neighbouring classes, with that of the class itself in the middle.
const NEIGHBOURS: [f32; 5] = [1.0, 2.0, 3.0, 2.0, 1.0];
/// Added to the share of each class, so that rare values count little.
const LEAST_SHARE: f32 = 1e-4;
/// The fewest voxels that each histogram must hold.
const LEAST_VOXELS: f32 = 8.0;
/// The largest evidence of a value, as a logit.
const MOST: f32 = 3.0;
/// The weight of the evidence relative to the network's logit.
const WEIGHT: f32 = 1.5;
/// How many times the histograms are computed, each time of the answer that the last ones led to.
const ROUNDS: usize = 2;
/// How far around a box the surroundings reach, as a part of its longest side: voxels further off
/// are other tissue, compared with which an object's neighbours look like the object.
const MARGIN: f32 = 0.1;
/// How far the surroundings reach around an object whose box was not given, as a part of its
/// longest side.
const WIDE_MARGIN: f32 = 0.3;
/// Standard deviation of the smoothing, as a part of the box's longest side, and its maximum in
/// voxels.
const SMOOTHING: f32 = 0.022;
const MOST_SMOOTHING: f32 = 2.0;
/// Standard deviation, in voxels, below which nothing is smoothed.
const LEAST_SMOOTHING: f32 = 0.3;
/// Subtracted from every logit in a box: more of a box is outside the object than inside, the more
/// so the looser the box.
const DOUBT: f32 = 0.8;
/// How far from a box's middle objects reach: the ellipsoid that fits the box, slightly smaller.
/// [`ROUNDNESS`] is the most that this adds to a logit, or subtracts.
const ELLIPSOID: f32 = 0.9;
const ROUNDNESS: f32 = 1.0;
/// How far an object may grow whose box was not given, as a part of its longest side.
const GROWTH: f32 = 0.1;

/// A block of the patch: its first voxel along each axis, and the one after its last.
#[derive(Clone, Copy)]
struct Block {
    low: [usize; 3],
    high: [usize; 3],
}

impl Block {
    fn size(&self) -> [usize; 3] {
        [0, 1, 2].map(|d| self.high[d] - self.low[d])
    }

    fn voxels(&self) -> usize {
        self.size().iter().product()
    }

    fn longest(&self) -> f32 {
        self.size().into_iter().max().unwrap_or(0) as f32
    }

    /// The block with `by` voxels around it, as far as they are within another.
    fn grown(&self, by: usize, within: &Block) -> Block {
        let low = [0, 1, 2].map(|d| self.low[d].saturating_sub(by).max(within.low[d]));
        Block { low, high: [0, 1, 2].map(|d| (self.high[d] + by).min(within.high[d]).max(low[d])) }
    }

    /// The index in the block of the first voxel of a row along k that starts at `p`.
    fn row(&self, p: [usize; 3]) -> usize {
        let [_, nj, nk] = self.size();
        ((p[0] - self.low[0]) * nj + p[1] - self.low[1]) * nk + p[2] - self.low[2]
    }

    /// The first voxels of its rows along k.
    fn rows(self) -> impl Iterator<Item = [usize; 3]> {
        let ([i, j, _], first) = ([0, 1, 2].map(|d| self.low[d]..self.high[d]), self.low[2]);
        i.flat_map(move |i| j.clone().map(move |j| [i, j, first]))
    }
}

/// Makes an answer `logits` `[i][j][k]` on a patch of `edge` voxels a side follow what the object
/// looks like in `values`, the network's input. The box `on_scan` is the part of the patch within
/// the scan: what a patch shows beyond it does not count as surroundings. With a given box, the
/// voxels in it may change; otherwise those near the object. Boxes are in voxels of the patch,
/// their ends exclusive. Nothing changes if there is no object, no surroundings, or no contrast.
pub fn recognise(
    logits: &mut [f32],
    values: &[f32],
    edge: usize,
    on_scan: [usize; 6],
    bounds: Option<[usize; 6]>,
) {
    let on_scan = block(on_scan, edge);
    let Some(object) = within(logits, edge, &on_scan, bounds) else { return };
    let side = object.longest();
    let sigma = (SMOOTHING * side).min(MOST_SMOOTHING);
    let halo = reach(sigma);
    let near = object.grown(halo, &on_scan);
    let margin = if bounds.is_some() { MARGIN } else { WIDE_MARGIN };
    let around = object.grown(((margin * side).ceil() as usize).max(halo), &on_scan);
    let Some(classes) = classes(values, edge, &around) else { return };
    let [_, _, length] = object.size();
    // The evidence besides the values.
    let mut known: Vec<f32> = memory::list(ANSWER, object.voxels());
    for p in object.rows() {
        let row = (p[0] * edge + p[1]) * edge + p[2];
        let each = logits[row..row + length].iter().enumerate().map(|(k, logit)| match bounds {
            Some(_) => logit + roundness(&object, [p[0], p[1], p[2] + k]) - DOUBT,
            None => *logit,
        });
        known.extend(each);
    }
    let mut total: Vec<f32> = memory::copied(ANSWER, &known);
    for _ in 0..ROUNDS {
        let Some(says) = ratios(&classes, &around, &object, &total) else { return };
        let mut ratio: Vec<f32> = memory::list(ANSWER, near.voxels());
        let [_, _, long] = near.size();
        for p in near.rows() {
            let row = around.row(p);
            ratio.extend(classes[row..row + long].iter().map(|at| {
                let (c, part) = split(*at);
                says[c] + part * (says[c + 1] - says[c])
            }));
        }
        smooth(&mut ratio, near.size(), sigma);
        for p in object.rows() {
            let (at, from) = (object.row(p), near.row(p));
            let each = known[at..at + length].iter().zip(&ratio[from..from + length]);
            total[at..at + length].iter_mut().zip(each).for_each(|(t, (l, r))| *t = l + WEIGHT * r);
        }
    }
    for p in object.rows() {
        let (row, at) = ((p[0] * edge + p[1]) * edge + p[2], object.row(p));
        logits[row..row + length].copy_from_slice(&total[at..at + length]);
    }
}

/// A box on a patch of `edge` voxels a side.
fn block(b: [usize; 6], edge: usize) -> Block {
    Block {
        low: [0, 1, 2].map(|d| b[d].min(edge)),
        high: [3, 4, 5].map(|d| b[d].clamp(b[d - 3].min(edge), edge)),
    }
}

/// The block in which an answer may change: the box, or the surroundings of the object; none if
/// that is empty.
fn within(
    logits: &[f32],
    edge: usize,
    on_scan: &Block,
    bounds: Option<[usize; 6]>,
) -> Option<Block> {
    let object = match bounds {
        Some(b) => block(b, edge).grown(0, on_scan),
        None => {
            let mut seen = None;
            for at in (0..logits.len()).filter(|at| logits[*at] > 0.0) {
                include(&mut seen, [at / (edge * edge), at / edge % edge, at % edge]);
            }
            let seen = block(seen?, edge);
            seen.grown((GROWTH * seen.longest()).ceil() as usize, on_scan)
        }
    };
    (object.voxels() > 0).then_some(object)
}

/// The evidence of the shape of most objects for a voxel in their box.
fn roundness(object: &Block, p: [usize; 3]) -> f32 {
    let apart = |d: usize| {
        let half = (object.high[d] - object.low[d]) as f32 / 2.0;
        (p[d] as f32 + 0.5 - object.low[d] as f32) / half - 1.0
    };
    let far = (0..3).map(|d| apart(d).powi(2)).sum::<f32>().sqrt();
    ROUNDNESS * (2.0 * (ELLIPSOID - far)).clamp(-1.0, 1.0)
}

/// The position among the classes of the value of every voxel in a block, from 0 to the last; none
/// if all values are equal. A value between the middles of two classes counts partly as either, so
/// that values that differ only by rounding lead to answers that differ as little.
fn classes(values: &[f32], edge: usize, around: &Block) -> Option<Vec<f32>> {
    let [_, _, length] = around.size();
    let mut all: Vec<f32> = memory::list(ANSWER, around.voxels());
    for [i, j, k] in around.rows() {
        let row = (i * edge + j) * edge + k;
        all.extend_from_slice(&values[row..row + length]);
    }
    let mut sorted: Vec<f32> = memory::copied(ANSWER, &all);
    let tail = (TAIL * sorted.len() as f64) as usize;
    let last = sorted.len() - 1 - tail;
    let mut low = *sorted.select_nth_unstable_by(tail, f32::total_cmp).1;
    let mut high = *sorted.select_nth_unstable_by(last, f32::total_cmp).1;
    if low == high {
        // If all but a few are equal, those few determine the range.
        low = sorted.iter().copied().fold(low, f32::min);
        high = sorted.iter().copied().fold(high, f32::max);
    }
    let scale = CLASSES as f32 / (high - low);
    if !(scale.is_finite() && scale > 0.0) {
        return None;
    }
    // NaN counts as the lowest value.
    let place = |v: &f32| ((v - low) * scale - 0.5).max(0.0).min((CLASSES - 1) as f32);
    Some(memory::collected(ANSWER, all.iter().map(place)))
}

/// The class below a position among them, and the weight of the one above.
fn split(at: f32) -> (usize, f32) {
    let below = (at as usize).min(CLASSES - 2);
    (below, at - below as f32)
}

/// The evidence of each class for a voxel, as a logit, when the logits in the box are `total` and
/// nothing around it belongs to the object; none if either side has too few voxels.
fn ratios(
    classes: &[f32],
    around: &Block,
    object: &Block,
    total: &[f32],
) -> Option<[f32; CLASSES]> {
    let (mut on, mut off) = ([0.0f64; CLASSES], [0.0f64; CLASSES]);
    let add = |to: &mut [f64; CLASSES], at: f32, weight: f64| {
        let (c, part) = split(at);
        to[c] += weight * f64::from(1.0 - part);
        to[c + 1] += weight * f64::from(part);
    };
    classes.iter().for_each(|at| add(&mut off, *at, 1.0));
    let [_, _, length] = object.size();
    for p in object.rows() {
        let (at, row) = (object.row(p), around.row(p));
        for (logit, class) in total[at..at + length].iter().zip(&classes[row..row + length]) {
            let weight = f64::from(1.0 / (1.0 + (-logit).exp()));
            add(&mut on, *class, weight);
            add(&mut off, *class, -weight);
        }
    }
    let [on, off] = [shares(&on)?, shares(&off)?];
    Some(std::array::from_fn(|c| (on[c] / off[c]).ln().clamp(-MOST, MOST)))
}

/// A histogram's shares, with those of neighbouring classes mixed in; none if it holds too little.
fn shares(counts: &[f64; CLASSES]) -> Option<[f32; CLASSES]> {
    let sum: f64 = counts.iter().sum();
    if sum < f64::from(LEAST_VOXELS) {
        return None;
    }
    // One voxel more in every class, so that a few voxels count little.
    let all = sum + CLASSES as f64;
    let whole: f32 = NEIGHBOURS.iter().sum();
    Some(std::array::from_fn(|c| {
        let mixed: f32 = (c.saturating_sub(2)..(c + 3).min(CLASSES))
            .map(|n| NEIGHBOURS[n + 2 - c] * ((counts[n] + 1.0) / all) as f32)
            .sum();
        mixed / whole + LEAST_SHARE
    }))
}

/// The number of voxels to either side that a smoothing uses.
fn reach(sigma: f32) -> usize {
    if sigma < LEAST_SMOOTHING { 0 } else { (3.0 * sigma).ceil() as usize }
}

/// A Gaussian filter of standard deviation `sigma` voxels; beyond the block its outermost values
/// continue.
pub(super) fn smooth(values: &mut [f32], [ni, nj, nk]: [usize; 3], sigma: f32) {
    let reach = reach(sigma);
    if reach == 0 {
        return;
    }
    let weight = |t: usize| (-0.5 * ((t as f32 - reach as f32) / sigma).powi(2)).exp();
    let all: f32 = (0..=2 * reach).map(weight).sum();
    let weights: Vec<f32> = (0..=2 * reach).map(|t| weight(t) / all).collect();
    let mut from: Vec<f32> = memory::copied(ANSWER, values);
    let mut padded: Vec<f32> = memory::zeroed(ANSWER, nk + 2 * reach);
    for axis in 0..3 {
        from.copy_from_slice(values);
        let rows = (0..ni).flat_map(|i| (0..nj).map(move |j| (i, j)));
        for ((i, j), to) in rows.zip(values.chunks_exact_mut(nk)) {
            let row = |i: usize, j: usize| &from[(i * nj + j) * nk..][..nk];
            let moved = |at: usize, t: usize, n: usize| (at + t).saturating_sub(reach).min(n - 1);
            if axis == 2 {
                let row = row(i, j);
                padded[..reach].fill(row[0]);
                padded[reach..reach + nk].copy_from_slice(row);
                padded[reach + nk..].fill(row[nk - 1]);
            }
            to.fill(0.0);
            for (t, w) in weights.iter().enumerate() {
                let from = match axis {
                    0 => row(moved(i, t, ni), j),
                    1 => row(i, moved(j, t, nj)),
                    _ => &padded[t..t + nk],
                };
                to.iter_mut().zip(from).for_each(|(o, v)| *o += w * v);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EDGE: usize = 40;
    /// The box of the ball of [`scene`].
    const BOX: [usize; 6] = [8, 8, 8, 32, 32, 32];
    /// All of the patch.
    const ALL: [usize; 6] = [0, 0, 0, EDGE, EDGE, EDGE];

    fn far(at: usize) -> f32 {
        let p = [at / (EDGE * EDGE), at / EDGE % EDGE, at % EDGE];
        p.iter().map(|v| (*v as f32 - 19.5).powi(2)).sum::<f32>().sqrt()
    }

    /// A ball of radius 12, `contrast` standard deviations brighter than what is around it, and an
    /// answer that has the middle of it.
    fn scene(contrast: f32, radius: f32) -> (Vec<f32>, Vec<f32>) {
        // Noise with a variance of 1: a sum of twelve numbers from 0 to 1.
        let number = |n: usize| (n.wrapping_mul(2_654_435_761) >> 7 & 0xffff) as f32 / 65_536.0;
        let noise = |at: usize| (0..12).map(|n| number(12 * at + n)).sum::<f32>() - 6.0;
        let bright = |at: usize| if far(at) < 12.0 { contrast } else { 0.0 };
        let values = (0..EDGE.pow(3)).map(|at| noise(at) + bright(at)).collect();
        let logits = (0..EDGE.pow(3)).map(|at| (radius - far(at)).clamp(-4.0, 4.0)).collect();
        (values, logits)
    }

    /// The Dice of an answer with the ball.
    fn dice(logits: &[f32]) -> f32 {
        let (mut both, mut sum) = (0, 0);
        for (at, logit) in logits.iter().enumerate() {
            let (answer, ball) = (*logit > 0.0, far(at) < 12.0);
            both += usize::from(answer && ball);
            sum += usize::from(answer) + usize::from(ball);
        }
        2.0 * both as f32 / sum as f32
    }

    #[test]
    fn an_answer_fills_what_looks_like_it() {
        let (values, before) = scene(3.0, 9.0);
        assert!(dice(&before) < 0.65);
        let mut after = before.clone();
        recognise(&mut after, &values, EDGE, ALL, Some(BOX));
        assert!(dice(&after) > 0.85, "{}", dice(&after));
        // Beyond the box nothing changes.
        for (at, (a, b)) in after.iter().zip(&before).enumerate() {
            let p = [at / (EDGE * EDGE), at / EDGE % EDGE, at % EDGE];
            let inside = (0..3).all(|d| p[d] >= BOX[d] && p[d] < BOX[d + 3]);
            assert!(inside || a.to_bits() == b.to_bits());
        }
        // Without a box it grows towards the object, by a part of its size.
        let mut guessed = before.clone();
        recognise(&mut guessed, &values, EDGE, ALL, None);
        assert!(dice(&guessed) > dice(&before) + 0.1, "{}", dice(&guessed));
    }

    #[test]
    fn an_answer_in_a_loose_box_keeps_to_what_looks_like_it() {
        let (values, before) = scene(3.0, 12.0);
        let mut after = before.clone();
        recognise(&mut after, &values, EDGE, ALL, Some([4, 5, 6, 35, 34, 35]));
        assert!(dice(&after) > 0.95, "{}", dice(&after));
        // One that is too large shrinks.
        let (values, mut large) = scene(3.0, 14.0);
        let too_large = dice(&large);
        recognise(&mut large, &values, EDGE, ALL, Some([4, 4, 4, 36, 36, 36]));
        assert!(dice(&large) > too_large + 0.03, "{too_large}, {}", dice(&large));
    }

    #[test]
    fn values_that_tell_nothing_change_little() {
        let (values, before) = scene(0.0, 12.0);
        let mut after = before.clone();
        recognise(&mut after, &values, EDGE, ALL, Some(BOX));
        // Off by one voxel at most: by what is subtracted in a box, and by the ellipsoid.
        assert!(dice(&after) > 0.87, "{}", dice(&after));
    }

    #[test]
    fn nothing_changes_where_there_is_nothing_to_see() {
        let (values, logits) = scene(3.0, 9.0);
        let unchanged = |values: &[f32], logits: &[f32], bounds| {
            let mut after = logits.to_vec();
            recognise(&mut after, values, EDGE, ALL, bounds);
            after.iter().zip(logits).all(|(a, b)| a.to_bits() == b.to_bits())
        };
        // One value everywhere, no finite value, no object, no surroundings.
        assert!(unchanged(&vec![0.5; values.len()], &logits, Some(BOX)));
        assert!(unchanged(&vec![f32::NAN; values.len()], &logits, Some(BOX)));
        assert!(unchanged(&values, &vec![-20.0; logits.len()], Some(BOX)));
        assert!(unchanged(&values, &vec![-20.0; logits.len()], None));
        assert!(unchanged(&values, &vec![20.0; logits.len()], None));
        // A box without voxels, and one outside this patch.
        assert!(unchanged(&values, &logits, Some([9, 9, 9, 9, 20, 20])));
        assert!(unchanged(&values, &logits, Some([50, 9, 9, 60, 20, 20])));
        assert!(!unchanged(&values, &logits, Some(BOX)));
        // A single voxel, and a box at the patch's corner, do not panic.
        let mut any = logits.clone();
        recognise(&mut any, &values, EDGE, ALL, Some([5, 5, 5, 6, 6, 6]));
        recognise(&mut any, &values, EDGE, ALL, Some([0, 0, 30, 3, 40, 40]));
        assert!(any.iter().all(|v| v.is_finite()));
    }

    #[test]
    fn a_few_values_among_many_that_are_alike_tell() {
        // A small ball in a large box, and nothing else.
        let values: Vec<f32> =
            (0..EDGE.pow(3)).map(|at| f32::from(u8::from(far(at) < 4.0))).collect();
        let before: Vec<f32> = (0..EDGE.pow(3)).map(|at| (6.0 - far(at)).min(4.0)).collect();
        let mut after = before.clone();
        recognise(&mut after, &values, EDGE, ALL, Some([4, 4, 4, 36, 36, 36]));
        assert!((0..EDGE.pow(3)).all(|at| (after[at] > 0.0) <= (before[at] > 0.0)));
        assert!((0..EDGE.pow(3)).all(|at| far(at) >= 4.0 || after[at] > 0.0));
        let count = |logits: &[f32]| logits.iter().filter(|v| **v > 0.0).count();
        assert!(count(&after) + 100 < count(&before), "{}", count(&after));
    }

    #[test]
    fn what_lies_beyond_the_scan_is_no_surroundings() {
        // A slice of the scene, as shown by a patch that extends beyond the scan.
        let (values, logits) = scene(2.0, 9.0);
        let slice = |v: &[f32]| -> Vec<f32> {
            (0..EDGE.pow(3)).map(|at| v[at / EDGE * EDGE + EDGE / 2]).collect()
        };
        let (values, logits) = (slice(&values), slice(&logits));
        let (at, mut alone, mut among) = (EDGE / 2, logits.clone(), logits);
        let bounds = Some([8, 8, at, 32, 32, at + 1]);
        recognise(&mut alone, &values, EDGE, [0, 0, at, EDGE, EDGE, at + 1], bounds);
        recognise(&mut among, &values, EDGE, ALL, bounds);
        let dice = |logits: &[f32]| {
            let (mut both, mut sum) = (0, 0);
            for row in 0..EDGE * EDGE {
                let (answer, disc) = (logits[row * EDGE + at] > 0.0, far(row * EDGE + at) < 12.0);
                both += usize::from(answer && disc);
                sum += usize::from(answer) + usize::from(disc);
            }
            2.0 * both as f32 / sum as f32
        };
        assert!(dice(&alone) > dice(&among) + 0.02, "{}, {}", dice(&alone), dice(&among));
    }

    #[test]
    fn rounding_changes_an_answer_by_as_little() {
        let (values, before) = scene(3.0, 9.0);
        let rounded: Vec<f32> = values.iter().map(|v| v * (1.0 + 3e-7)).collect();
        for bounds in [Some(BOX), None] {
            let [mut one, mut other] = [before.clone(), before.clone()];
            recognise(&mut one, &values, EDGE, ALL, bounds);
            recognise(&mut other, &rounded, EDGE, ALL, bounds);
            let furthest = one.iter().zip(&other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(furthest < 1e-3, "{furthest}");
        }
    }
}
