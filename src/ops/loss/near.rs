//! What an additional cross entropy near clicks is made of.

use crate::memory;
use crate::tensor::{OpError, Tensor, extent};
use std::ops::Range;

/// What messages call the memory of the weights of voxels.
const WEIGHTS: &str = "the weights of voxels near clicks";
/// The most voxels along an axis: floats tell them apart.
const MOST_EDGE: usize = 1 << 24;

/// An additional cross entropy near clicks: where they are, how the weights of voxels fall off
/// around them, and the weight of the weighted mean in the loss.
///
/// A voxel's weight is 1 at a click, falls off as a Gaussian, and is 0 beyond three standard
/// deviations; where several clicks are near, the nearest counts. These are a few numbers: what
/// each voxel weighs a device computes itself.
#[derive(Clone, Debug)]
pub struct Emphasis {
    /// The voxel of each click, `[i, j, k]`, then a voxel's weight by its squared distance from the
    /// nearest click: those beyond the last weigh nothing. A device keeps its copy with them.
    pub(super) numbers: Tensor,
    /// The number of clicks.
    pub(super) clicks: usize,
    pub(super) size: [usize; 3],
    /// The weight of the weighted mean.
    pub(super) share: f64,
    /// The sum of all weights.
    pub(super) total: f64,
}

impl Emphasis {
    /// The cross entropy near `clicks`, voxels `[i, j, k]` of a label of `size` `[d, h, w]` voxels,
    /// whose mean has the weight `share` in the loss.
    ///
    /// The weights of voxels have a standard deviation of `deviation` voxels, from 0.1 to 100.
    ///
    /// If memory for the weights around the clicks is refused, this unwinds to [`memory::caught`].
    ///
    /// # Errors
    /// A click is not in the volume, the deviation is not in its range, or the volume has 2^24
    /// voxels or more along an axis.
    pub fn new(
        clicks: &[[i32; 3]],
        size: [usize; 3],
        deviation: f32,
        share: f64,
    ) -> Result<Emphasis, OpError> {
        let refused = |message: String| Err(OpError::Argument { op: "emphasis", message });
        if !(0.1..=100.0).contains(&deviation) {
            return refused(format!("a deviation of {deviation} voxels, expected 0.1 to 100"));
        }
        if extent(&size).is_none() || size.iter().any(|edge| *edge >= MOST_EDGE) {
            return refused(format!("a volume of {size:?} voxels is too large"));
        }
        let inside =
            |p: &[i32; 3]| p.iter().zip(size).all(|(at, edge)| (0..edge as i32).contains(at));
        if let Some(p) = clicks.iter().find(|p| !inside(p)) {
            return refused(format!("a click at {p:?} of a volume of {size:?} voxels"));
        }
        let radius = 3.0 * deviation;
        let furthest = (radius * radius) as usize;
        let mut numbers = memory::list(WEIGHTS, 3 * clicks.len() + furthest + 1);
        numbers.extend(clicks.iter().flatten().map(|at| *at as f32));
        let weight = |squared: usize| (-0.5 * squared as f32 / deviation.powi(2)).exp();
        numbers.extend((0..=furthest).map(weight));
        let (numbers, clicks) = (Tensor::from(numbers), clicks.len());
        let mut emphasis = Emphasis { numbers, clicks, size, share, total: 0.0 };
        emphasis.total = emphasis.sum();
        Ok(emphasis)
    }

    /// The sum of the weights of all voxels, in their order: of the box of those that are not 0.
    fn sum(&self) -> f64 {
        let clicks = &self.numbers.data()[..3 * self.clicks];
        let around = |axis: usize| {
            let along = clicks.iter().skip(axis).step_by(3).map(|at| *at as usize);
            let (low, high) = along.fold((usize::MAX, 0), |(l, h), at| (l.min(at), h.max(at)));
            low.saturating_sub(self.reach())..(high + self.reach() + 1).min(self.size[axis])
        };
        match clicks {
            [] => 0.0,
            _ => self.within([0, 1, 2].map(around)).iter().map(|w| *w as f64).sum(),
        }
    }

    /// The number of distances that have a weight.
    pub(super) fn distances(&self) -> usize {
        self.numbers.len() - 3 * self.clicks
    }

    /// How far from a click, along an axis, voxels have a weight.
    fn reach(&self) -> usize {
        (self.distances() - 1).isqrt()
    }

    /// The weight of each voxel, in row-major order.
    pub(super) fn weights(&self) -> Vec<f32> {
        self.within(self.size.map(|edge| 0..edge))
    }

    /// The weights of the voxels of a box.
    fn within(&self, [d, h, w]: [Range<usize>; 3]) -> Vec<f32> {
        let (clicks, by_distance) = self.numbers.data().split_at(3 * self.clicks);
        let near = |at: usize, span: &Range<usize>| {
            at.saturating_sub(self.reach()).max(span.start)..(at + self.reach() + 1).min(span.end)
        };
        let mut weights: Vec<f32> = memory::zeroed(WEIGHTS, d.len() * h.len() * w.len());
        for click in clicks.chunks_exact(3) {
            let [a, b, c] = [0, 1, 2].map(|axis| click[axis] as usize);
            for i in near(a, &d) {
                for j in near(b, &h) {
                    let row = ((i - d.start) * h.len() + j - h.start) * w.len();
                    for k in near(c, &w) {
                        let squared = [i.abs_diff(a), j.abs_diff(b), k.abs_diff(c)]
                            .map(|apart| apart * apart)
                            .iter()
                            .sum::<usize>();
                        if let Some(weight) = by_distance.get(squared) {
                            let own = &mut weights[row + k - w.start];
                            // Weights fall off: the nearest click's is the largest.
                            *own = own.max(*weight);
                        }
                    }
                }
            }
        }
        weights
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Weights are a Gaussian of the distance from the nearest click, to the last bit of its
    /// formula, also where clicks overlap and at the volume's borders.
    #[test]
    fn weights_are_a_gaussian_around_the_nearest_click() {
        let size = [12, 23, 17];
        let clicks = [[0, 0, 0], [0, 2, 1], [11, 22, 16], [5, 12, 0], [5, 12, 0]];
        for deviation in [0.3f32, 0.5, 1.7, 3.0] {
            let emphasis = Emphasis::new(&clicks, size, deviation, 0.5).unwrap();
            let weights = emphasis.weights();
            let (mut total, mut there) = (0.0, 0);
            for (at, weight) in weights.iter().enumerate() {
                let p = [at / 17 / 23, at / 17 % 23, at % 17].map(|v| v as f32);
                let squared = |c: &[i32; 3]| {
                    c.iter().zip(p).map(|(c, p)| (p - *c as f32).powi(2)).sum::<f32>()
                };
                let least = clicks.iter().map(squared).fold(f32::INFINITY, f32::min);
                let radius = 3.0 * deviation;
                let expected = if least <= radius * radius {
                    (-0.5 * least / deviation.powi(2)).exp()
                } else {
                    0.0
                };
                assert_eq!(weight.to_bits(), expected.to_bits(), "{deviation}, {p:?}");
                total += expected as f64;
                there += usize::from(expected > 0.0);
            }
            assert!(there >= 4 && there < weights.len(), "{there} voxels have weights");
            assert_eq!(emphasis.total.to_bits(), total.to_bits());
        }
        let none = Emphasis::new(&[], size, 3.0, 0.5).unwrap();
        assert_eq!(none.total, 0.0);
        assert!(none.weights().iter().all(|w| *w == 0.0));
    }

    #[test]
    fn clicks_outside_and_deviations_without_a_meaning_are_refused() {
        let size = [4, 5, 6];
        for click in [[-1, 0, 0], [4, 0, 0], [0, 5, 0], [0, 0, 6], [i32::MIN; 3], [i32::MAX; 3]] {
            let error = Emphasis::new(&[[1, 1, 1], click], size, 3.0, 0.5).unwrap_err();
            assert!(error.to_string().contains("a click at"), "{error}");
        }
        for deviation in [0.0, -1.0, 1e9, f32::NAN, f32::INFINITY] {
            let error = Emphasis::new(&[[1, 1, 1]], size, deviation, 0.5).unwrap_err();
            assert!(error.to_string().contains("a deviation of"), "{error}");
        }
        for size in [[1, 1, MOST_EDGE], [usize::MAX; 3]] {
            assert!(Emphasis::new(&[], size, 3.0, 0.5).is_err(), "{size:?}");
        }
    }
}
