//! The placement of voxels: affines, orientations, grids.

use crate::memory;

/// Grows a box `[i0, j0, k0, i1, j1, k1]`, ends exclusive, to include a voxel; none is empty.
pub(crate) fn include(bounds: &mut Option<[usize; 6]>, [i, j, k]: [usize; 3]) {
    let b = bounds.get_or_insert([i, j, k, i + 1, j + 1, k + 1]);
    *b = [b[0].min(i), b[1].min(j), b[2].min(k), b[3].max(i + 1), b[4].max(j + 1), b[5].max(k + 1)];
}

/// An affine map, usually from voxel indices to world millimetres (RAS): the first three rows of a
/// 4×4 matrix, as in NIfTI.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Affine(pub [[f64; 4]; 3]);

impl Affine {
    /// The affine of voxels `spacing` mm apart along axes parallel to the world's, the first
    /// voxel's centre at the origin.
    pub fn from_spacing(spacing: [f64; 3]) -> Affine {
        let mut rows = [[0.0; 4]; 3];
        (0..3).for_each(|a| rows[a][a] = spacing[a]);
        Affine(rows)
    }

    /// The image of a position: the world position in mm of the centre of a (fractional) voxel.
    pub fn apply(&self, v: [f64; 3]) -> [f64; 3] {
        self.0.map(|r| r[0] * v[0] + r[1] * v[1] + r[2] * v[2] + r[3])
    }

    /// Column `axis`: one step of a voxel index, in mm.
    pub fn column(&self, axis: usize) -> [f64; 3] {
        self.0.map(|r| r[axis])
    }

    /// The length of each column: the voxel spacing in mm.
    pub fn spacing(&self) -> [f64; 3] {
        [0, 1, 2].map(|a| self.column(a).iter().map(|v| v * v).sum::<f64>().sqrt())
    }

    /// The determinant of the 3×3 part, negative for a left-handed system.
    pub fn determinant(&self) -> f64 {
        let m = &self.0;
        let minor = |a: usize, b: usize| m[1][a] * m[2][b] - m[1][b] * m[2][a];
        m[0][0] * minor(1, 2) - m[0][1] * minor(0, 2) + m[0][2] * minor(0, 1)
    }

    /// Whether it can be inverted: it is finite, and its columns span space.
    pub fn is_regular(&self) -> bool {
        let volume: f64 = self.spacing().iter().product();
        let finite = self.0.iter().flatten().all(|v| v.is_finite());
        finite && volume > 0.0 && self.determinant().abs() > 1e-6 * volume
    }

    /// The inverse, from world to voxel index. It is meaningless unless the affine
    /// [is regular](Affine::is_regular).
    pub fn inverse(&self) -> Affine {
        let m = &self.0;
        let d = self.determinant();
        let mut out = [[0.0; 4]; 3];
        for (r, row) in out.iter_mut().enumerate() {
            for (c, v) in row.iter_mut().take(3).enumerate() {
                let (a, b) = ((c + 1) % 3, (c + 2) % 3);
                let (e, f) = ((r + 1) % 3, (r + 2) % 3);
                *v = (m[a][e] * m[b][f] - m[a][f] * m[b][e]) / d;
            }
            row[3] = -(0..3).map(|c| row[c] * m[c][3]).sum::<f64>();
        }
        Affine(out)
    }

    /// `self` after `first`: the map `v -> self(first(v))`.
    pub fn after(&self, first: &Affine) -> Affine {
        let mut out = [[0.0; 4]; 3];
        for (r, row) in out.iter_mut().enumerate() {
            for (c, v) in row.iter_mut().enumerate() {
                *v = (0..3).map(|k| self.0[r][k] * first.0[k][c]).sum::<f64>()
                    + if c == 3 { self.0[r][3] } else { 0.0 };
            }
        }
        Affine(out)
    }

    /// The largest distance in mm between the positions that two affines give a voxel of a grid of
    /// `size` voxels.
    pub fn distance(&self, other: &Affine, size: [usize; 3]) -> f64 {
        let corner = |c: usize| -> [f64; 3] {
            std::array::from_fn(|a| if c >> a & 1 == 1 { size[a] as f64 - 1.0 } else { 0.0 })
        };
        let apart = |c: usize| {
            let (p, q) = (self.apply(corner(c)), other.apply(corner(c)));
            (0..3).map(|a| (p[a] - q[a]).powi(2)).sum::<f64>().sqrt()
        };
        (0..8).map(apart).fold(0.0, f64::max)
    }
}

/// The directions of a grid's axes: for each world axis (R, A, S), the voxel axis that follows it
/// most closely, and whether it runs backwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Orientation {
    /// Voxel axis for each world axis.
    pub axes: [usize; 3],
    /// Whether the voxel axis runs against the world axis.
    pub flipped: [bool; 3],
}

impl Orientation {
    /// The assignment of voxel axes to world axes that follows the affine most closely.
    pub fn of(affine: &Affine) -> Orientation {
        const PERMUTATIONS: [[usize; 3]; 6] =
            [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
        let spacing = affine.spacing();
        let cosine = |world: usize, axis: usize| {
            affine.0[world][axis] / spacing[axis].max(f64::MIN_POSITIVE)
        };
        let fit = |p: &[usize; 3]| (0..3).map(|world| cosine(world, p[world]).abs()).sum::<f64>();
        // The first of equals wins, so that ties do not depend on how the sum is rounded.
        let axes = PERMUTATIONS
            .into_iter()
            .reduce(|a, b| if fit(&b) > fit(&a) + 1e-9 { b } else { a })
            .unwrap_or([0, 1, 2]);
        Orientation { axes, flipped: [0, 1, 2].map(|world| cosine(world, axes[world]) < 0.0) }
    }

    /// The letters of the directions in which the voxel axes i, j, k run, for example `LPS`.
    pub fn letters(&self) -> String {
        let name = |axis: usize| {
            let world = (0..3).find(|&w| self.axes[w] == axis).unwrap_or(0);
            [['R', 'L'], ['A', 'P'], ['S', 'I']][world][usize::from(self.flipped[world])]
        };
        [0, 1, 2].map(name).iter().collect()
    }
}

/// A grid of voxels in the world: its size and its affine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// Voxels along i, j, k.
    pub size: [usize; 3],
    /// From voxel index to world, RAS mm.
    pub affine: Affine,
}

impl Grid {
    /// The distances in mm between voxels along i, j and k.
    pub fn spacing(&self) -> [f64; 3] {
        self.affine.spacing()
    }

    /// The number of voxels; `usize::MAX` if their number does not fit.
    pub fn voxels(&self) -> usize {
        memory::extent(&self.size).unwrap_or(usize::MAX)
    }

    /// The volume of a voxel in millilitres.
    pub fn voxel_ml(&self) -> f64 {
        self.affine.determinant().abs() / 1000.0
    }

    /// The grid of the same voxels with axes permuted and flipped, so that they follow RAS as
    /// closely as possible.
    pub fn canonical(&self) -> Grid {
        let o = Orientation::of(&self.affine);
        let mut affine = [[0.0; 4]; 3];
        for (r, row) in affine.iter_mut().enumerate() {
            row[3] = self.affine.0[r][3];
            for world in 0..3 {
                let (axis, step) = (o.axes[world], self.affine.0[r][o.axes[world]]);
                row[world] = if o.flipped[world] { -step } else { step };
                if o.flipped[world] {
                    row[3] += step * (self.size[axis] as f64 - 1.0);
                }
            }
        }
        Grid { size: o.axes.map(|a| self.size[a]), affine: Affine(affine) }
    }
}
