//! Simulated scribbles, as a person draws them: on axial slices, along the middle of a region,
//! across it, or along its outline (Wong et al., ScribblePrompt, 2024, in the paper's setting).

use super::thinning::thin;
use crate::memory;
use rand::{Rng, RngExt};

/// What a scribble follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The region's centreline.
    Centreline,
    /// Straight lines between voxels of the region.
    Line,
    /// An outline inside the region.
    Contour,
}

/// How a scribble on a slice was made, each stage a mask of the slice `[i][j]`.
#[derive(Clone, Debug)]
pub struct Stages {
    /// The slice's index along k.
    pub slice: usize,
    /// The centreline, lines or outline of the region.
    pub drawn: Vec<u8>,
    /// The drawn lines, with gaps.
    pub broken: Vec<u8>,
    /// The lines with gaps, warped, and cut to the region.
    pub warped: Vec<u8>,
}

/// Random numbers that one scribble shares over its slices.
struct Hand {
    /// Standard deviation of the noise that breaks lines, in voxels.
    gaps: f32,
    /// Standard deviation of the smoothing of the displacement, in voxels.
    smoothing: f32,
    /// Largest displacement, in voxels.
    magnitude: f32,
}

/// A part of a slice: everything is drawn within the region's bounding rectangle.
struct Plane {
    rows: usize,
    columns: usize,
}

/// Draws scribbles over every axial slice (along k) of `region` `[i][j][k]`, and returns all their
/// stages.
pub fn draw(rng: &mut impl Rng, region: &[u8], size: [usize; 3], kind: Kind) -> Vec<Stages> {
    let hand = Hand {
        gaps: rng.random_range(4.0..16.0),
        smoothing: rng.random_range(4.0..16.0),
        magnitude: rng.random_range(1.0..6.0),
    };
    (0..size[2]).filter_map(|k| slice(rng, region, size, kind, k, &hand)).collect()
}

fn slice(
    rng: &mut impl Rng,
    region: &[u8],
    [ni, nj, nk]: [usize; 3],
    kind: Kind,
    k: usize,
    hand: &Hand,
) -> Option<Stages> {
    let at = |i: usize, j: usize| region[(i * nj + j) * nk + k] != 0;
    let (mut low, mut high) = ([usize::MAX; 2], [0; 2]);
    for (i, j) in (0..ni).flat_map(|i| (0..nj).map(move |j| (i, j))) {
        if at(i, j) {
            low = [low[0].min(i), low[1].min(j)];
            high = [high[0].max(i), high[1].max(j)];
        }
    }
    if low[0] == usize::MAX {
        return None;
    }
    // One voxel of margin, so that clearing a border clears only the slice's own.
    let start = low.map(|v| v as isize - 1);
    let plane = Plane { rows: high[0] - low[0] + 3, columns: high[1] - low[1] + 3 };
    let place = |p: usize| {
        (start[0] + (p / plane.columns) as isize, start[1] + (p % plane.columns) as isize)
    };
    let on_slice_border =
        |(i, j): (isize, isize)| i <= 0 || j <= 0 || i >= ni as isize - 1 || j >= nj as isize - 1;
    let inside = |(i, j): (isize, isize)| {
        i >= 0 && j >= 0 && i < ni as isize && j < nj as isize && at(i as usize, j as usize)
    };
    let count = plane.rows * plane.columns;
    let mask: Vec<u8> = (0..count).map(|p| u8::from(inside(place(p)))).collect();

    let drawn = match kind {
        Kind::Centreline => {
            let mut drawn: Vec<u8> =
                (0..count).map(|p| u8::from(mask[p] != 0 && !on_slice_border(place(p)))).collect();
            thin(&mut drawn, plane.rows, plane.columns);
            drawn
        }
        Kind::Line => lines(rng, &mask, &plane),
        Kind::Contour => contour(rng, &mask, &plane),
    };
    if drawn.iter().all(|v| *v == 0) {
        return None;
    }
    let noise = smooth_noise(rng, &plane, hand.gaps);
    let broken: Vec<u8> =
        drawn.iter().zip(&noise).map(|(d, n)| u8::from(*d != 0 && *n > 0.0)).collect();
    let broken = if broken.iter().any(|v| *v != 0) { broken } else { drawn.clone() };

    let shifts = [0, 1].map(|_| {
        let field = smooth_noise(rng, &plane, hand.smoothing);
        let largest = field.iter().fold(0.0f32, |a, v| a.max(v.abs())).max(f32::MIN_POSITIVE);
        field.into_iter().map(|v| v / largest * hand.magnitude).collect::<Vec<_>>()
    });
    let from = |p: usize| -> Option<usize> {
        let i = (p / plane.columns) as f32 + shifts[0][p];
        let j = (p % plane.columns) as f32 + shifts[1][p];
        let (i, j) = (i.round(), j.round());
        (i >= 0.0 && j >= 0.0 && i < plane.rows as f32 && j < plane.columns as f32)
            .then(|| i as usize * plane.columns + j as usize)
    };
    let warped: Vec<u8> = (0..count)
        .map(|p| u8::from(mask[p] != 0 && from(p).is_some_and(|q| broken[q] != 0)))
        .collect();
    let warped = if warped.iter().any(|v| *v != 0) { warped } else { broken.clone() };

    let whole = |part: Vec<u8>| {
        let mut slice = memory::zeroed::<u8>("a scribble's slices", ni * nj);
        for p in (0..count).filter(|&p| part[p] != 0) {
            let (i, j) = place(p);
            slice[i as usize * nj + j as usize] = 1;
        }
        slice
    };
    Some(Stages { slice: k, drawn: whole(drawn), broken: whole(broken), warped: whole(warped) })
}

/// One to three straight lines between voxels of the mask, cut to it.
fn lines(rng: &mut impl Rng, mask: &[u8], plane: &Plane) -> Vec<u8> {
    let voxels: Vec<usize> = (0..mask.len()).filter(|&p| mask[p] != 0).collect();
    let mut out = vec![0u8; mask.len()];
    for _ in 0..rng.random_range(1..=3) {
        let [a, b] = [0, 1].map(|_| voxels[rng.random_range(0..voxels.len())]);
        let place = |p: usize| [(p / plane.columns) as f32, (p % plane.columns) as f32];
        let (a, b) = (place(a), place(b));
        let steps = (a[0] - b[0]).abs().max((a[1] - b[1]).abs()).ceil().max(1.0);
        for s in 0..=steps as usize {
            let way = s as f32 / steps;
            let [i, j] = [0, 1].map(|axis| (a[axis] + way * (b[axis] - a[axis])).round() as usize);
            out[i * plane.columns + j] = mask[i * plane.columns + j];
        }
    }
    out
}

/// The outline of the part where the blurred mask exceeds a random fraction of its largest value.
fn contour(rng: &mut impl Rng, mask: &[u8], plane: &Plane) -> Vec<u8> {
    let sigma = rng.random_range(1.0..4.0);
    let blurred = smooth(mask.iter().map(|v| *v as f32).collect(), plane, sigma);
    let top =
        blurred.iter().zip(mask).filter(|(_, m)| **m != 0).fold(0.0f32, |a, (b, _)| a.max(*b));
    let level = top * rng.random_range(0.3..0.9);
    let inner: Vec<bool> = blurred.iter().zip(mask).map(|(b, m)| *m != 0 && *b >= level).collect();
    let c = plane.columns;
    // The mask has a margin of one voxel, so neighbours exist.
    (0..mask.len())
        .map(|p| u8::from(inner[p] && ![p - c, p + c, p - 1, p + 1].iter().all(|&q| inner[q])))
        .collect()
}

/// Standard normal noise, smoothed.
fn smooth_noise(rng: &mut impl Rng, plane: &Plane, sigma: f32) -> Vec<f32> {
    let noise = (0..plane.rows * plane.columns).map(|_| super::normal(rng)).collect();
    smooth(noise, plane, sigma)
}

/// A Gaussian filter of standard deviation `sigma` voxels, cut off at three of them, zero beyond
/// the border.
fn smooth(values: Vec<f32>, plane: &Plane, sigma: f32) -> Vec<f32> {
    let reach = (3.0 * sigma).ceil() as usize;
    let weights: Vec<f32> =
        (0..=reach).map(|d| (-0.5 * (d as f32 / sigma).powi(2)).exp()).collect();
    let (rows, columns) = (plane.rows, plane.columns);
    let mut along = vec![0.0f32; values.len()];
    for (from, to) in values.chunks_exact(columns).zip(along.chunks_exact_mut(columns)) {
        for (j, v) in to.iter_mut().enumerate() {
            *v = (j.saturating_sub(reach)..(j + reach + 1).min(columns))
                .map(|q| weights[q.abs_diff(j)] * from[q])
                .sum();
        }
    }
    let mut out = vec![0.0f32; values.len()];
    for (i, to) in out.chunks_exact_mut(columns).enumerate() {
        for q in i.saturating_sub(reach)..(i + reach + 1).min(rows) {
            let weight = weights[q.abs_diff(i)];
            to.iter_mut().zip(&along[q * columns..]).for_each(|(o, v)| *o += weight * v);
        }
    }
    out
}
