//! What the kinds share: inputs of noise, and randomly chosen places of a result, so that the
//! oracle, one loop per formula, stays quick.

use super::Judge;
use crate::prompt::simulate::generator;
use crate::tensor::Tensor;
use rand::RngExt;
use rayon::prelude::*;

/// Uniform numbers in [-1, 1).
pub(super) fn noise(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = generator(seed, &[0x6e_6f_69_73_65]);
    Tensor::new(
        shape,
        (0..shape.iter().product::<usize>()).map(|_| rng.random_range(-1.0f32..1.0)).collect(),
    )
}

/// Uniform numbers around 0, scaled so that sums of `terms` products stay near 1.
pub(super) fn weights(shape: &[usize], terms: usize, seed: u64) -> Tensor {
    let scale = (3.0 / terms as f32).sqrt();
    let values = noise(shape, seed);
    Tensor::new(shape, values.data().iter().map(|v| v * scale).collect())
}

/// `count` random numbers below `below`; all of them if there are no more.
pub(super) fn places(below: usize, count: usize) -> Vec<usize> {
    if below <= count {
        return (0..below).collect();
    }
    let mut rng = generator(9, &[below as u64]);
    (0..count).map(|_| rng.random_range(0..below)).collect()
}

/// Judges `count` places of a result of `len` values, given the expected value of each.
pub(super) fn sampled(
    len: usize,
    count: usize,
    want: impl Fn(usize) -> f64 + Sync + 'static,
) -> Judge {
    Box::new(move |out: &Tensor| {
        let got = out.try_data()?;
        Ok(places(len, count).into_par_iter().map(|at| (got[at] as f64, want(at))).collect())
    })
}

/// The values in float64.
pub(super) fn wide(t: &Tensor) -> Vec<f64> {
    t.data().iter().map(|v| *v as f64).collect()
}

/// The sum of products.
pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Sums `term` over the taps of a 3×3×3 neighbourhood that are within a cube of edge `d`.
pub(super) fn taps(
    d: usize,
    [i, j, k]: [usize; 3],
    mut term: impl FnMut(usize, [usize; 3]) -> f64,
) -> f64 {
    let mut sum = 0.0;
    for t in 0..27 {
        let place = [i + t / 9, j + t / 3 % 3, k + t % 3];
        if place.iter().all(|p| (1..=d).contains(p)) {
            sum += term(t, place.map(|p| p - 1));
        }
    }
    sum
}

/// Item, voxel and channel of a value of a map `[n, d, d, d, c]`.
pub(super) fn split(at: usize, d: usize, c: usize) -> (usize, [usize; 3], usize) {
    let voxel = at / c;
    (voxel / (d * d * d), [voxel / (d * d) % d, voxel / d % d, voxel % d], at % c)
}
