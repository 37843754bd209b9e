//! Simulated scribbles, as a person draws them: on axial slices, along the middle of a region,
//! across it, or along its outline (Wong et al., ScribblePrompt, 2024, in the paper's setting).
//!
//! All random numbers are drawn in the order of the slices, and how many there are depends on
//! nothing that is smoothed. So slices are drawn in parallel, each with its own numbers, and the
//! scribbles are the same on any number of threads.

use super::thinning::thin;
use super::{marked_rows, normal_of};
use crate::memory;
use rand::{Rng, RngExt};
use rayon::prelude::*;

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

/// Voxels of the slices that are drawn at the same time: their random numbers take 24 bytes each.
const TOGETHER: usize = 1 << 19;

/// Neighbours that are smoothed at the same time, in registers.
const LANES: usize = 16;

/// A slice that has voxels of the region: everything is drawn within their bounding rectangle, with
/// a margin of one voxel, so that clearing a border clears only the slice's own.
struct Plane {
    /// The slice's index along k.
    slice: usize,
    /// The first row and column of the region's voxels, i and j.
    low: [usize; 2],
    /// The size of the rectangle with its margin.
    rows: usize,
    columns: usize,
}

/// A scribble on a slice: its stages as masks of the slice's rectangle.
struct Stroke<'p> {
    plane: &'p Plane,
    drawn: Vec<u8>,
    broken: Vec<u8>,
    warped: Vec<u8>,
}

/// Draws scribbles over every axial slice (along k) of `region` `[i][j][k]`, and returns all their
/// stages.
pub fn draw(rng: &mut impl Rng, region: &[u8], size: [usize; 3], kind: Kind) -> Vec<Stages> {
    let [ni, nj, _] = size;
    strokes(rng, region, size, kind, |stroke| {
        let whole = |part: &[u8]| {
            let mut slice = memory::zeroed::<u8>(PLANE, ni * nj);
            stroke.plane.marked(part).for_each(|[i, j]| slice[i * nj + j] = 1);
            slice
        };
        Stages {
            slice: stroke.plane.slice,
            drawn: whole(&stroke.drawn),
            broken: whole(&stroke.broken),
            warped: whole(&stroke.warped),
        }
    })
}

/// The voxels of the scribbles that [`draw()`] draws, a list for each slice, as indices in
/// `[i][j][k]` order.
pub(super) fn voxels(
    rng: &mut impl Rng,
    region: &[u8],
    size: [usize; 3],
    kind: Kind,
) -> Vec<Vec<usize>> {
    let [_, nj, nk] = size;
    strokes(rng, region, size, kind, |Stroke { plane, warped, .. }| {
        let at = plane.marked(&warped).map(|[i, j]| (i * nj + j) * nk + plane.slice);
        memory::counted(PLANE, at)
    })
}

/// What `finish` makes of the scribble on each slice, in the order of the slices.
fn strokes<T: Send>(
    rng: &mut impl Rng,
    region: &[u8],
    size: [usize; 3],
    kind: Kind,
    finish: impl Fn(Stroke<'_>) -> T + Sync + Send,
) -> Vec<T> {
    let hand = Hand {
        gaps: rng.random_range(4.0..16.0),
        smoothing: rng.random_range(4.0..16.0),
        magnitude: rng.random_range(1.0..6.0),
    };
    let planes = planes(region, size);
    let mut all = memory::list(PLANE, planes.len());
    let mut left = &planes[..];
    while !left.is_empty() {
        let mut voxels = 0;
        let fits = |plane: &&Plane| {
            voxels += plane.voxels();
            voxels <= TOGETHER
        };
        let count = left.iter().take_while(fits).count().max(1);
        let (now, later) = left.split_at(count);
        left = later;
        let mut masks = memory::list(PLANE, count);
        let mask = |plane: &Plane| plane.masks(region, size, kind);
        now.par_iter().with_max_len(1).map(mask).collect_into_vec(&mut masks);
        // One slice after the other: they share the generator.
        let mut begun = memory::list(PLANE, count);
        begun.extend(
            now.iter().zip(masks).filter_map(|(plane, masks)| Begun::of(rng, plane, masks, kind)),
        );
        let mut done = memory::list(PLANE, begun.len());
        let finished = |begun: Begun| finish(begun.stroke(&hand));
        begun.into_par_iter().with_max_len(1).map(finished).collect_into_vec(&mut done);
        all.append(&mut done);
    }
    all
}

/// The slices that have voxels of the region.
fn planes(region: &[u8], size: [usize; 3]) -> Vec<Plane> {
    let mut bounds = memory::filled::<Option<[[usize; 2]; 2]>>(PLANE, None, size[2]);
    for (i, j, row) in marked_rows(region, size) {
        for (bounds, _) in bounds.iter_mut().zip(row).filter(|(_, v)| **v != 0) {
            let [low, high] = bounds.get_or_insert([[i, j]; 2]);
            *low = [low[0].min(i), low[1].min(j)];
            *high = [high[0].max(i), high[1].max(j)];
        }
    }
    let plane = |(slice, bounds): (usize, &Option<[[usize; 2]; 2]>)| {
        let [low, high] = (*bounds)?;
        Some(Plane { slice, low, rows: high[0] - low[0] + 3, columns: high[1] - low[1] + 3 })
    };
    memory::counted(PLANE, bounds.iter().enumerate().filter_map(plane))
}

impl Plane {
    fn voxels(&self) -> usize {
        self.rows * self.columns
    }

    /// The places on the slice, i and j, of what is set in a mask of the rectangle; nothing is in
    /// its margin.
    fn marked(&self, part: &[u8]) -> impl Iterator<Item = [usize; 2]> + Clone {
        let set = part.iter().enumerate().filter(|(_, v)| **v != 0);
        let [i, j] = self.low;
        set.map(move |(p, _)| [i + p / self.columns - 1, j + p % self.columns - 1])
    }

    /// The rows of a mask of the rectangle without those of the margin, each behind its i.
    fn rows_of<'m>(&self, mask: &'m mut [u8]) -> impl Iterator<Item = (usize, &'m mut [u8])> {
        let rows = mask.chunks_exact_mut(self.columns).skip(1).take(self.rows - 2);
        (self.low[0]..).zip(rows)
    }

    /// The region's mask in the rectangle, and its centreline if that is what is to be drawn,
    /// otherwise nothing.
    fn masks(&self, region: &[u8], size: [usize; 3], kind: Kind) -> [Vec<u8>; 2] {
        let [ni, nj, nk] = size;
        let mut mask = memory::zeroed::<u8>(PLANE, self.voxels());
        for (i, row) in self.rows_of(&mut mask) {
            let from = region[(i * nj + self.low[1]) * nk + self.slice..].iter().step_by(nk);
            let to = row[1..self.columns - 1].iter_mut();
            to.zip(from).for_each(|(to, v)| *to = u8::from(*v != 0));
        }
        if kind != Kind::Centreline {
            return [mask, vec![]];
        }
        let mut line = memory::copied(PLANE, &mask);
        for (i, row) in self.rows_of(&mut line) {
            if i == 0 || i + 1 == ni {
                row.fill(0);
            }
            if self.low[1] == 0 {
                row[1] = 0;
            }
            if self.low[1] + self.columns - 2 == nj {
                row[self.columns - 2] = 0;
            }
        }
        thin(&mut line, self.rows, self.columns);
        [mask, line]
    }
}

/// What a scribble on a slice follows.
enum Line {
    Drawn(Vec<u8>),
    /// What [`contour`] draws later: it is never empty.
    Outline {
        sigma: f32,
        part: f32,
    },
}

/// A scribble on a slice of which everything random is drawn.
struct Begun<'p> {
    plane: &'p Plane,
    mask: Vec<u8>,
    line: Line,
    /// Pairs of random numbers for three planes of noise: of the gaps, and of the displacements
    /// along i and along j.
    noise: Vec<[f32; 2]>,
}

impl<'p> Begun<'p> {
    /// None if nothing is drawn on the slice.
    fn of(
        rng: &mut impl Rng,
        plane: &'p Plane,
        [mask, centreline]: [Vec<u8>; 2],
        kind: Kind,
    ) -> Option<Begun<'p>> {
        let line = match kind {
            Kind::Centreline => Line::Drawn(centreline),
            Kind::Line => Line::Drawn(lines(rng, &mask, plane)),
            Kind::Contour => Line::Outline {
                sigma: rng.random_range(1.0..4.0),
                part: rng.random_range(0.3..0.9),
            },
        };
        if let Line::Drawn(drawn) = &line
            && drawn.iter().all(|v| *v == 0)
        {
            return None;
        }
        let pairs = (0..3 * plane.voxels()).map(|_| [rng.random(), rng.random()]);
        let noise = memory::collected(PLANE, pairs);
        Some(Begun { plane, mask, line, noise })
    }

    /// The scribble. Values are smoothed only where they are asked for.
    fn stroke(self, hand: &Hand) -> Stroke<'p> {
        let Begun { plane, mask, line, noise } = self;
        let (count, rows, columns) = (plane.voxels(), plane.rows, plane.columns);
        let noise = |n: usize| noise[n * count..][..count].iter().map(|pair| normal_of(*pair));
        let drawn = match line {
            Line::Drawn(drawn) => drawn,
            Line::Outline { sigma, part } => contour(&mask, plane, sigma, part),
        };
        let gaps = smooth(noise(0), plane, hand.gaps, Some(&drawn));
        let broken: Vec<u8> = memory::collected(
            PLANE,
            drawn.iter().zip(&gaps).map(|(d, n)| u8::from(*d != 0 && *n > 0.0)),
        );
        let broken =
            if broken.iter().any(|v| *v != 0) { broken } else { memory::copied(PLANE, &drawn) };

        let shifts = [1, 2].map(|n| {
            let field = smooth(noise(n), plane, hand.smoothing, None);
            let largest = field.iter().fold(0.0f32, |a, v| a.max(v.abs())).max(f32::MIN_POSITIVE);
            (field, largest)
        });
        let shift = |axis: usize, p: usize| {
            let (field, largest) = &shifts[axis];
            field[p] / largest * hand.magnitude
        };
        let from = |p: usize| -> Option<usize> {
            let i = (p / columns) as f32 + shift(0, p);
            let j = (p % columns) as f32 + shift(1, p);
            let (i, j) = (i.round(), j.round());
            (i >= 0.0 && j >= 0.0 && i < rows as f32 && j < columns as f32)
                .then(|| i as usize * columns + j as usize)
        };
        let warped: Vec<u8> = memory::collected(
            PLANE,
            (0..count).map(|p| u8::from(mask[p] != 0 && from(p).is_some_and(|q| broken[q] != 0))),
        );
        let warped =
            if warped.iter().any(|v| *v != 0) { warped } else { memory::copied(PLANE, &broken) };
        Stroke { plane, drawn, broken, warped }
    }
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

/// The outline of the part where the mask, blurred by `sigma`, exceeds a part of its largest value:
/// the voxel that has that value is inside, and the first voxel inside is on the outline.
fn contour(mask: &[u8], plane: &Plane, sigma: f32, part: f32) -> Vec<u8> {
    let blurred = smooth(mask.iter().map(|v| f32::from(*v)), plane, sigma, Some(mask));
    let top =
        blurred.iter().zip(mask).filter(|(_, m)| **m != 0).fold(0.0f32, |a, (b, _)| a.max(*b));
    let level = top * part;
    let inner: Vec<bool> =
        memory::collected(PLANE, blurred.iter().zip(mask).map(|(b, m)| *m != 0 && *b >= level));
    let c = plane.columns;
    // The mask has a margin of one voxel, so neighbours exist.
    let on_edge = |p: usize| inner[p] && ![p - c, p + c, p - 1, p + 1].iter().all(|&q| inner[q]);
    memory::collected(PLANE, (0..mask.len()).map(|p| u8::from(on_edge(p))))
}

/// A Gaussian filter of standard deviation `sigma` voxels, cut off at three of them, zero beyond
/// the border. Where `wanted` is 0, values are unspecified.
///
/// The sum of a value is formed from its first neighbour to its last, along the rows and then along
/// the columns, whatever is computed beside it.
fn smooth(
    mut values: impl Iterator<Item = f32>,
    plane: &Plane,
    sigma: f32,
    wanted: Option<&[u8]>,
) -> Vec<f32> {
    let reach = (3.0 * sigma).ceil() as usize;
    let weight = |d: usize| (-0.5 * (d as f32 / sigma).powi(2)).exp();
    let weights: Vec<f32> = (0..=2 * reach).map(|q| weight(q.abs_diff(reach))).collect();
    let (rows, columns) = (plane.rows, plane.columns);
    let blocks = columns.div_ceil(LANES);
    // A row between zeros, which add nothing to a sum. The results are kept as strips of columns.
    let mut row = memory::zeroed::<f32>(PLANE, blocks * LANES + 2 * reach);
    let mut along = memory::zeroed::<f32>(PLANE, blocks * LANES * rows);
    for i in 0..rows {
        row[reach..][..columns].iter_mut().zip(&mut values).for_each(|(to, v)| *to = v);
        for (j, strip) in (0..columns).step_by(LANES).zip(along.chunks_exact_mut(LANES * rows)) {
            // Weights that meet nothing but those zeros are left out.
            let first = reach.saturating_sub(j + LANES - 1);
            let end = (columns + reach - j).min(weights.len());
            let sums = weighted(&weights[first..end], &row[j + first..], 1);
            strip[i * LANES..][..LANES].copy_from_slice(&sums);
        }
    }
    let mut out = memory::zeroed::<f32>(PLANE, rows * columns);
    for (j, strip) in (0..columns).step_by(LANES).zip(along.chunks_exact(LANES * rows)) {
        let width = LANES.min(columns - j);
        for i in 0..rows {
            let here = i * columns + j..i * columns + j + width;
            if wanted.is_some_and(|wanted| wanted[here.clone()].iter().all(|v| *v == 0)) {
                continue;
            }
            let (first, end) = (i.saturating_sub(reach), (i + reach + 1).min(rows));
            let weights = &weights[reach + first - i..reach + end - i];
            let sums = weighted(weights, &strip[first * LANES..], LANES);
            out[here].copy_from_slice(&sums[..width]);
        }
    }
    out
}

/// The sums of [`LANES`] neighbours, each of one value per weight, `step` behind the one before, in
/// that order.
fn weighted(weights: &[f32], values: &[f32], step: usize) -> [f32; LANES] {
    let mut sums = [0.0; LANES];
    for (n, weight) in weights.iter().enumerate() {
        let values = &values[n * step..][..LANES];
        sums.iter_mut().zip(values).for_each(|(sum, v)| *sum += weight * v);
    }
    sums
}
