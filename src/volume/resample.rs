//! Resampling between grids.
//!
//! A volume at another spacing keeps its centre and has `floor(size * spacing / new spacing)`
//! voxels along each axis, so that it never reaches beyond the scan. Positions up to half a voxel
//! outside the outermost centres take the outermost values.

use super::Grid;
use crate::memory;
use rayon::prelude::*;

/// The grid of a volume at another spacing in mm, about the same centre. `grid` is
/// [canonical](Grid::canonical). An axis of one voxel keeps one.
pub fn respaced(grid: &Grid, spacing: f64) -> Grid {
    let old = grid.spacing();
    let mut size = [1usize; 3];
    let mut affine = grid.affine;
    for a in 0..3 {
        // An axis of one voxel stays one: there is nothing to interpolate along it.
        if grid.size[a] > 1 {
            size[a] = ((grid.size[a] as f64 * old[a] / spacing).floor() as usize).max(1);
        }
        (0..3).for_each(|r| affine.0[r][a] *= spacing / old[a]);
    }
    let centre = grid.affine.apply(grid.size.map(|s| (s as f64 - 1.0) / 2.0));
    let new = affine.apply(size.map(|s| (s as f64 - 1.0) / 2.0));
    (0..3).for_each(|r| affine.0[r][3] += centre[r] - new[r]);
    Grid { size, affine }
}

/// How a value between voxels is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interpolation {
    /// From the eight neighbours.
    Linear,
    /// From the eight neighbours, truncated to an integer, as the released pipeline does with
    /// integer scans.
    LinearWhole,
    /// The nearest voxel's.
    Nearest,
}

/// The interpolation of a scan whose values are `whole` numbers or not.
pub fn linear(whole: bool) -> Interpolation {
    if whole { Interpolation::LinearWhole } else { Interpolation::Linear }
}

/// The integer that an interpolated value of an integer scan becomes: the released pipeline
/// resamples scans in their own element type, which truncates.
fn to_integer(v: f64) -> f64 {
    // A value that is whole except for rounding errors stays unchanged.
    (v + 1e-9f64.copysign(v)).trunc()
}

/// The value of `data` `[i][j][k]` of `size` voxels at a fractional index; none more than half a
/// voxel outside.
pub fn sample(data: &[f32], size: [usize; 3], at: [f64; 3], how: Interpolation) -> Option<f64> {
    sample_of(|[i, j, k]| data[(i * size[1] + j) * size[2] + k], size, at, how)
}

/// The value at a fractional index, as [`sample`] computes it, of voxels that `value` gives.
#[inline(always)]
pub fn sample_of(
    value: impl Fn([usize; 3]) -> f32,
    size: [usize; 3],
    at: [f64; 3],
    how: Interpolation,
) -> Option<f64> {
    // The conversion to the world and back costs a few units in the last place.
    const SLACK: f64 = 1e-6;
    let mut low = [0usize; 3];
    let mut high = [0usize; 3];
    let mut part = [0.0f64; 3];
    for a in 0..3 {
        let last = size[a] as f64 - 1.0;
        if !(at[a] >= -0.5 - SLACK && at[a] <= last + 0.5 + SLACK) {
            return None;
        }
        let p = at[a].clamp(0.0, last);
        low[a] = p as usize;
        high[a] = (low[a] + 1).min(size[a] - 1);
        part[a] = p - low[a] as f64;
    }
    let value = |i: usize, j: usize, k: usize| value([i, j, k]) as f64;
    if how == Interpolation::Nearest {
        let near = |a: usize| if part[a] >= 0.5 { high[a] } else { low[a] };
        return Some(value(near(0), near(1), near(2)));
    }
    let along_k = |i: usize, j: usize| {
        value(i, j, low[2]) + part[2] * (value(i, j, high[2]) - value(i, j, low[2]))
    };
    let along_j = |i: usize| {
        let (a, b) = (along_k(i, low[1]), along_k(i, high[1]));
        a + part[1] * (b - a)
    };
    let (a, b) = (along_j(low[0]), along_j(high[0]));
    let value = a + part[0] * (b - a);
    Some(if how == Interpolation::LinearWhole { to_integer(value) } else { value })
}

/// Samples `data` on grid `from` at every voxel of grid `to`; `outside` where `from` does not
/// reach.
///
/// A sample halfway between two voxels of different labels has no nearest one: rounding decides. So
/// that it decides as in the released pipeline, positions are computed as ITK computes them: the
/// ends of each line along i through world coordinates, and between them by interpolation.
pub fn resample(
    data: &[f32],
    from: &Grid,
    to: &Grid,
    how: Interpolation,
    outside: f32,
) -> Vec<f32> {
    let to_index = from.affine.inverse();
    let place = |v: [f64; 3]| -> [f64; 3] {
        let world = to.affine.apply(v);
        let offset: [f64; 3] = std::array::from_fn(|r| world[r] - from.affine.0[r][3]);
        to_index.0.map(|r| r[0] * offset[0] + r[1] * offset[1] + r[2] * offset[2])
    };
    let [ni, nj, nk] = to.size;
    // Since all of them fit, those of a plane can be counted.
    let mut out = memory::filled("a resampled scan", outside, to.voxels());
    let line = |at: usize| [0.0, ni as f64].map(|i| place([i, (at / nk) as f64, (at % nk) as f64]));
    let lines: Vec<[[f64; 3]; 2]> = memory::collected("a resampled scan", (0..nj * nk).map(line));
    out.par_chunks_mut(nj * nk).enumerate().for_each(|(i, plane)| {
        let way = i as f64 / ni as f64;
        for ([start, end], v) in lines.iter().zip(plane) {
            let at = std::array::from_fn(|a| start[a] + way * (end[a] - start[a]));
            *v = sample(data, from.size, at, how).map_or(outside, |v| v as f32);
        }
    });
    out
}
