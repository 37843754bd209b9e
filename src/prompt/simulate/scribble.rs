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

/// The name of the slice of a scribble in refusals of memory.
const PLANE: &str = "a scribble's slice";

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
    let mut all = memory::list(PLANE, size[2]);
    all.extend((0..size[2]).filter_map(|k| slice(rng, region, size, kind, k, &hand)));
    all
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
    let mask: Vec<u8> = memory::collected(PLANE, (0..count).map(|p| u8::from(inside(place(p)))));

    let drawn = match kind {
        Kind::Centreline => {
            let mut drawn: Vec<u8> = memory::collected(
                PLANE,
                (0..count).map(|p| u8::from(mask[p] != 0 && !on_slice_border(place(p)))),
            );
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
    let broken: Vec<u8> = memory::collected(
        PLANE,
        drawn.iter().zip(&noise).map(|(d, n)| u8::from(*d != 0 && *n > 0.0)),
    );
    let broken =
        if broken.iter().any(|v| *v != 0) { broken } else { memory::copied(PLANE, &drawn) };

    let shifts = [0, 1].map(|_| {
        let mut field = smooth_noise(rng, &plane, hand.smoothing);
        let largest = field.iter().fold(0.0f32, |a, v| a.max(v.abs())).max(f32::MIN_POSITIVE);
        field.iter_mut().for_each(|v| *v = *v / largest * hand.magnitude);
        field
    });
    let from = |p: usize| -> Option<usize> {
        let i = (p / plane.columns) as f32 + shifts[0][p];
        let j = (p % plane.columns) as f32 + shifts[1][p];
        let (i, j) = (i.round(), j.round());
        (i >= 0.0 && j >= 0.0 && i < plane.rows as f32 && j < plane.columns as f32)
            .then(|| i as usize * plane.columns + j as usize)
    };
    let warped: Vec<u8> = memory::collected(
        PLANE,
        (0..count).map(|p| u8::from(mask[p] != 0 && from(p).is_some_and(|q| broken[q] != 0))),
    );
    let warped =
        if warped.iter().any(|v| *v != 0) { warped } else { memory::copied(PLANE, &broken) };

    let whole = |part: Vec<u8>| {
        let mut slice = memory::zeroed::<u8>(PLANE, ni * nj);
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
    let voxels: Vec<usize> = memory::counted(PLANE, (0..mask.len()).filter(|&p| mask[p] != 0));
    let mut out = memory::zeroed::<u8>(PLANE, mask.len());
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
    let marked = memory::collected(PLANE, mask.iter().map(|v| *v as f32));
    let blurred = smooth(marked, plane, sigma);
    let top =
        blurred.iter().zip(mask).filter(|(_, m)| **m != 0).fold(0.0f32, |a, (b, _)| a.max(*b));
    let level = top * rng.random_range(0.3..0.9);
    let inner: Vec<bool> =
        memory::collected(PLANE, blurred.iter().zip(mask).map(|(b, m)| *m != 0 && *b >= level));
    let c = plane.columns;
    // The mask has a margin of one voxel, so neighbours exist.
    let on_edge = |p: usize| inner[p] && ![p - c, p + c, p - 1, p + 1].iter().all(|&q| inner[q]);
    memory::collected(PLANE, (0..mask.len()).map(|p| u8::from(on_edge(p))))
}

/// Standard normal noise, smoothed.
fn smooth_noise(rng: &mut impl Rng, plane: &Plane, sigma: f32) -> Vec<f32> {
    let voxels = 0..plane.rows * plane.columns;
    let noise = memory::collected(PLANE, voxels.map(|_| super::normal(rng)));
    smooth(noise, plane, sigma)
}

/// A Gaussian filter of standard deviation `sigma` voxels, cut off at three of them, zero beyond
/// the border.
fn smooth(values: Vec<f32>, plane: &Plane, sigma: f32) -> Vec<f32> {
    let reach = (3.0 * sigma).ceil() as usize;
    let weights: Vec<f32> =
        (0..=reach).map(|d| (-0.5 * (d as f32 / sigma).powi(2)).exp()).collect();
    let (rows, columns) = (plane.rows, plane.columns);
    let mut along = memory::zeroed::<f32>(PLANE, values.len());
    for (from, to) in values.chunks_exact(columns).zip(along.chunks_exact_mut(columns)) {
        for (j, v) in to.iter_mut().enumerate() {
            *v = (j.saturating_sub(reach)..(j + reach + 1).min(columns))
                .map(|q| weights[q.abs_diff(j)] * from[q])
                .sum();
        }
    }
    let mut out = memory::zeroed::<f32>(PLANE, values.len());
    for (i, to) in out.chunks_exact_mut(columns).enumerate() {
        for q in i.saturating_sub(reach)..(i + reach + 1).min(rows) {
            let weight = weights[q.abs_diff(i)];
            to.iter_mut().zip(&along[q * columns..]).for_each(|(o, v)| *o += weight * v);
        }
    }
    out
}
