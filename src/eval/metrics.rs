//! Agreement of a mask with another: overlap (Dice) and surface distances (NSD, Hausdorff).
//!
//! Masks are `[i][j][k]`, 1 on the object and 0 off it, one byte per voxel of a grid.
//!
//! ```
//! use prism::eval::metrics::Metrics;
//! use prism::volume::{Affine, Grid};
//!
//! let grid = Grid { size: [4, 4, 4], affine: Affine::from_spacing([1.0, 1.0, 2.5]) };
//! let (mut truth, mut prediction) = (vec![0; 64], vec![0; 64]);
//! truth[21] = 1; // voxel [1, 1, 1]
//! truth[22] = 1; // voxel [1, 1, 2]
//! prediction[21] = 1;
//! let metrics = Metrics::of(&truth, &prediction, &grid);
//! assert!((metrics.dice - 2.0 / 3.0).abs() < 1e-12);
//! assert_eq!(metrics.nsd, 1.0); // all of both surfaces is within 5 mm of the other
//! ```

use super::surface::{Distances, distances};
use crate::volume::Grid;
use serde::{Deserialize, Deserializer, Serialize};

/// The tolerance of the surface Dice in mm, as in the paper.
pub const TOLERANCE: f64 = 5.0;

#[doc(inline)]
pub use crate::train::interactive::dice;

/// The distances between the surfaces of two masks, from which surface metrics are computed.
pub struct Surfaces {
    /// From the truth's surface to the prediction's.
    pub to_prediction: Distances,
    /// From the prediction's surface to the truth's.
    pub to_truth: Distances,
}

fn area(list: &Distances) -> f64 {
    list.iter().map(|d| d.1).sum()
}

impl Surfaces {
    /// Measures two masks on a grid. They have one value per voxel, zeros and ones.
    pub fn of(truth: &[u8], prediction: &[u8], grid: &Grid) -> Surfaces {
        let [to_prediction, to_truth] = distances(truth, prediction, grid);
        Surfaces { to_prediction, to_truth }
    }

    /// The values if a mask is empty: (surface Dice, distances). Two empty masks agree; an empty
    /// one is infinitely far from another.
    fn of_nothing(&self) -> Option<(f64, f64)> {
        match self.areas().map(|a| a == 0.0) {
            [true, true] => Some((1.0, 0.0)),
            [false, false] => None,
            _ => Some((0.0, f64::INFINITY)),
        }
    }

    /// The normalised surface Dice (Nikolov et al. 2021): the part of both surfaces' area that is
    /// within `tolerance` mm of the other, 0 to 1. 1 if both masks are empty, 0 if one is.
    pub fn nsd(&self, tolerance: f64) -> f64 {
        if let Some((nsd, _)) = self.of_nothing() {
            return nsd;
        }
        let near =
            |list: &Distances| list.iter().filter(|d| d.0 <= tolerance).map(|d| d.1).sum::<f64>();
        (near(&self.to_prediction) + near(&self.to_truth))
            / (area(&self.to_prediction) + area(&self.to_truth))
    }

    /// The distance in mm within which `percent` of each surface's area is, the larger of the two:
    /// 95 for the robust Hausdorff distance. 0 if both masks are empty, infinite if one is.
    pub fn hausdorff(&self, percent: f64) -> f64 {
        if let Some((_, distance)) = self.of_nothing() {
            return distance;
        }
        let one = |list: &Distances| {
            let (total, mut sum) = (area(list), 0.0);
            let reach = list.iter().find(|d| {
                sum += d.1;
                sum / total >= percent / 100.0
            });
            reach.or(list.last()).map_or(f64::INFINITY, |d| d.0)
        };
        one(&self.to_prediction).max(one(&self.to_truth))
    }

    /// Mean distances in mm, weighted by area: from truth to prediction, and back. 0 if both masks
    /// are empty, infinite if one is.
    pub fn average(&self) -> [f64; 2] {
        if let Some((_, distance)) = self.of_nothing() {
            return [distance; 2];
        }
        [&self.to_prediction, &self.to_truth]
            .map(|list| list.iter().map(|d| d.0 * d.1).sum::<f64>() / area(list))
    }

    /// Surface areas in mm²: the truth's, the prediction's.
    pub fn areas(&self) -> [f64; 2] {
        [area(&self.to_prediction), area(&self.to_truth)]
    }
}

/// The metrics that tables report: Dice, surface Dice and Hausdorff distance.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Dice coefficient of the voxels, 0 to 1; 1 if both masks are empty.
    pub dice: f64,
    /// Normalised surface Dice at a tolerance of 5 mm ([`Surfaces::nsd`]), 0 to 1.
    pub nsd: f64,
    /// Robust Hausdorff distance at 95 % ([`Surfaces::hausdorff`]), in mm; infinite if one of the
    /// masks is empty.
    #[serde(deserialize_with = "or_infinite")]
    pub hausdorff_95: f64,
}

/// JSON has no infinity; it is null there.
fn or_infinite<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::INFINITY))
}

impl Metrics {
    /// Compares a prediction with the truth: two masks on a grid, one value per voxel, zeros and
    /// ones.
    pub fn of(truth: &[u8], prediction: &[u8], grid: &Grid) -> Metrics {
        let surfaces = Surfaces::of(truth, prediction, grid);
        Metrics {
            dice: dice(truth, prediction),
            nsd: surfaces.nsd(TOLERANCE),
            hausdorff_95: surfaces.hausdorff(95.0),
        }
    }
}

/// The mean of some values, and half the width of its 95 % confidence interval by Student's t
/// distribution; None for fewer than two values. The mean of no values is NaN.
pub fn mean_interval(values: &[f64]) -> (f64, Option<f64>) {
    let n = values.len();
    let mean = values.iter().sum::<f64>() / n as f64;
    if n < 2 {
        return (mean, None);
    }
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1) as f64;
    (mean, Some(student_975(n - 1) * (variance / n as f64).sqrt()))
}

/// The 97.5 % quantile of Student's t with `freedom` degrees of freedom: where the distribution
/// function, integrated numerically, reaches it.
fn student_975(freedom: usize) -> f64 {
    let v = freedom as f64;
    // With t = √v tan θ the density becomes cos^(v-1) θ on a finite interval.
    let integral = |end: f64| {
        let (steps, h) = (2000, end / 2000.0);
        let f = |i: usize| (i as f64 * h).cos().powf(v - 1.0);
        let sum: f64 = (1..steps).map(|i| f(i) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
        (f(0) + sum + f(steps)) * h / 3.0
    };
    let whole = integral(std::f64::consts::FRAC_PI_2);
    let (mut low, mut high) = (0.0, std::f64::consts::FRAC_PI_2);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if integral(middle) < 0.95 * whole { low = middle } else { high = middle }
    }
    v.sqrt() * low.tan()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::Affine;

    #[test]
    fn empty_masks_have_numbers_that_agree() {
        let grid = Grid { size: [4, 4, 4], affine: Affine::from_spacing([1.0; 3]) };
        let (empty, mut one) = (vec![0u8; 64], vec![0u8; 64]);
        one[21] = 1;
        let s = Surfaces::of(&empty, &empty, &grid);
        assert_eq!(
            (dice(&empty, &empty), s.nsd(5.0), s.hausdorff(95.0), s.average(), s.areas()),
            (1.0, 1.0, 0.0, [0.0; 2], [0.0; 2])
        );
        for s in [Surfaces::of(&empty, &one, &grid), Surfaces::of(&one, &empty, &grid)] {
            assert_eq!(
                (s.nsd(5.0), s.hausdorff(95.0), s.average()),
                (0.0, f64::INFINITY, [f64::INFINITY; 2])
            );
        }
        assert_eq!(dice(&empty, &one), 0.0);
    }

    #[test]
    fn student_quantiles_are_those_of_tables() {
        for (freedom, t) in [
            (1, 12.706_2),
            (2, 4.302_65),
            (5, 2.570_58),
            (10, 2.228_14),
            (30, 2.042_27),
            (200, 1.971_9),
        ] {
            assert!(
                (student_975(freedom) - t).abs() < 2e-4 * t,
                "{freedom}: {}",
                student_975(freedom)
            );
        }
        let (mean, half) = mean_interval(&[1.0, 2.0, 3.0]);
        assert!(
            (mean - 2.0).abs() < 1e-12 && (half.unwrap() - 4.302_65 / 3f64.sqrt()).abs() < 1e-3
        );
        assert_eq!(mean_interval(&[0.5]), (0.5, None));
    }
}
