//! The cube of voxels that the network sees, and the mapping from it back to the scan.

use super::array::typed;
use super::intensity::Normalization;
use super::resample::{Interpolation, linear, respaced, sample, sample_of};
use super::{Affine, Grid, Voxels};
use crate::memory;
use rayon::prelude::*;
use std::ops::Range;

/// A block of the scan, by its faces in fractional voxel indices of the scan: a voxel reaches from
/// its index - 0.5 to its index + 0.5.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Extent {
    /// Lower faces along i, j, k.
    pub low: [f64; 3],
    /// Upper faces.
    pub high: [f64; 3],
}

impl Extent {
    /// The extent of a box of voxels `[i0, j0, k0, i1, j1, k1]`, ends exclusive.
    pub fn of_box(b: [usize; 6]) -> Extent {
        let face = |v: usize| v as f64 - 0.5;
        Extent {
            low: [face(b[0]), face(b[1]), face(b[2])],
            high: [face(b[3]), face(b[4]), face(b[5])],
        }
    }
}

/// What a patch shows beyond the scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beyond {
    /// The normalised value of 0, as the released pipeline pads.
    Zero,
    /// The scan's values at its border, continued.
    Edge,
}

/// A patch: the cube of voxels that the network sees, in canonical (RAS) orientation and at a
/// spacing of its own.
#[derive(Clone, Debug)]
pub struct Patch {
    /// The cube's grid: `edge` voxels along each axis.
    pub grid: Grid,
    /// Voxel spacing in mm, the same along all axes.
    pub spacing: f64,
    /// Whether the spacing had to be coarser than requested to show the extent.
    pub coarsened: bool,
    /// From a voxel index of the scan to one of the patch.
    pub from_image: Affine,
    /// The resampled scan that the patch is cut from.
    pub scan: Grid,
}

impl Patch {
    /// Places a patch of `edge` voxels a side on `image`, centred on `extent`; at `spacing` mm, or
    /// coarser if the extent would not fit.
    pub fn place(image: &Grid, edge: usize, spacing: f64, extent: &Extent) -> Patch {
        Patch::place_every(1, image, edge, spacing, extent)
    }

    /// Places a patch as [`Patch::place`] does, with its centre at the nearest of every `step`-th
    /// voxel of the resampled scan: extents near each other have the very same patch. The centre is
    /// off by at most half a step along each axis, in voxels of the patch.
    pub(crate) fn place_every(
        step: usize,
        image: &Grid,
        edge: usize,
        spacing: f64,
        extent: &Extent,
    ) -> Patch {
        let canonical = image.canonical();
        let to_canonical = canonical.affine.inverse().after(&image.affine);
        // Axes only swap and flip between the two, so opposite corners stay opposite corners.
        let (a, b) = (to_canonical.apply(extent.low), to_canonical.apply(extent.high));
        let (low, high): ([f64; 3], [f64; 3]) =
            (std::array::from_fn(|d| a[d].min(b[d])), std::array::from_fn(|d| a[d].max(b[d])));
        let apart = canonical.spacing();
        let longest = (0..3).map(|d| (high[d] - low[d]) * apart[d]).fold(0.0, f64::max);
        let fitting = longest / edge as f64;
        // A rounding error must not coarsen a box that fits exactly; a coarser patch leaves a voxel
        // of margin on each side.
        let coarsened = fitting > spacing * (1.0 + 1e-6);
        let spacing = if coarsened { longest / (edge as f64 - 2.0) } else { spacing };

        let scan = respaced(&canonical, spacing);
        let to_scan = scan.affine.inverse().after(&canonical.affine);
        let (low, high) = (to_scan.apply(low), to_scan.apply(high));
        let mut affine = scan.affine;
        // Half a voxel lower if the centre is between voxels: the middle of an even cube is an edge
        // between voxels.
        let step = step as f64;
        let first: [f64; 3] = std::array::from_fn(|d| {
            let centre = (low[d] + high[d] + step) / 2.0 + 1e-6;
            (centre / step).floor() * step - (edge / 2) as f64
        });
        let origin = scan.affine.apply(first);
        (0..3).for_each(|r| affine.0[r][3] = origin[r]);
        let grid = Grid { size: [edge; 3], affine };
        let from_image = affine.inverse().after(&image.affine);
        Patch { grid, spacing, coarsened, from_image, scan }
    }

    /// The image resampled to the patch's grid, `[i][j][k]`, and normalised: the network's input.
    /// Interpolation is trilinear; values of a scan of whole numbers are truncated to whole numbers
    /// before they are normalised.
    pub fn extract(
        &self,
        image: &impl Voxels,
        normalization: &Normalization,
        beyond: Beyond,
    ) -> Vec<f32> {
        let outside = normalization.apply(0.0);
        // A voxel belongs to the patch's content where the resampled scan covers it, to the padding
        // elsewhere.
        let to_scan = self.scan.affine.inverse().after(&self.grid.affine);
        let grid = image.grid();
        let to_image = grid.affine.inverse().after(&self.grid.affine);
        let how = linear(image.is_whole());
        let inside =
            |p: [f64; 3]| (0..3).all(|d| p[d] > -0.5 && p[d] < self.scan.size[d] as f64 - 0.5);
        let place = |voxel: [usize; 3]| -> Option<[f64; 3]> {
            let voxel = voxel.map(|v| v as f64);
            let at = to_image.apply(voxel);
            match beyond {
                Beyond::Edge => {
                    Some(std::array::from_fn(|d| at[d].clamp(0.0, grid.size[d] as f64 - 1.0)))
                }
                Beyond::Zero => inside(to_scan.apply(voxel)).then_some(at),
            }
        };
        let mut out = memory::filled("a patch", outside, self.grid.voxels());
        // The axis along which the scan's voxels are closest, and the patch's axis that follows it
        // most closely.
        let array = image.array();
        let along = to_image.0[array.tightest()];
        let first = (1..3).all(|d| along[0].abs() >= along[d].abs());
        typed!(array.element(), T => self.fill(&mut out, first, place, |at| {
            let read = |v: [usize; 3]| {
                let v = std::array::from_fn(|a| v[a].wrapping_sub(image.first()[a]));
                // SAFETY: `place` panics for a voxel outside the array, and `T` is the elements'
                // type.
                unsafe { array.read::<T>(array.place(v)) }
            };
            let value = sample_of(|v| array.understood(read(v) as f32), grid.size, at, how);
            value.map_or(outside, |v| normalization.apply(v as f32))
        }));
        out
    }

    /// Fills a cube with the results of `value` at the positions that `place` gives for its voxels;
    /// `first` if neighbours along the first axis are to be computed one after the other.
    fn fill(
        &self,
        out: &mut [f32],
        first: bool,
        place: impl Fn([usize; 3]) -> Option<[f64; 3]> + Sync,
        value: impl Fn([f64; 3]) -> f32 + Sync,
    ) {
        const PLANES: usize = 16;
        let [_, nj, nk] = self.grid.size;
        out.par_chunks_mut(PLANES * nj * nk).enumerate().for_each(|(block, out)| {
            let planes = out.len() / (nj * nk);
            let mut one = |p: usize, j: usize, k: usize| {
                if let Some(at) = place([block * PLANES + p, j, k]) {
                    out[(p * nj + j) * nk + k] = value(at);
                }
            };
            let plane = (0..nj).flat_map(|j| (0..nk).map(move |k| (j, k)));
            match first {
                true => plane.for_each(|(j, k)| (0..planes).for_each(|p| one(p, j, k))),
                false => (0..planes).for_each(|p| plane.clone().for_each(|(j, k)| one(p, j, k))),
            }
        });
    }

    /// The patch voxel that contains the centre of an image voxel (or any fractional index of the
    /// image); none outside the patch.
    pub fn voxel(&self, index: [f64; 3]) -> Option<[i32; 3]> {
        let p = self.from_image.apply(index).map(|v| (v + 1e-9).round());
        let inside = (0..3).all(|d| p[d] >= 0.0 && p[d] < self.grid.size[d] as f64);
        inside.then(|| p.map(|v| v as i32))
    }

    /// An extent of the image as a box of patch voxels `[i0, j0, k0, i1, j1, k1]`, ends exclusive,
    /// at least one voxel each way.
    pub fn bounds(&self, extent: &Extent) -> [f32; 6] {
        let (a, b) = (self.from_image.apply(extent.low), self.from_image.apply(extent.high));
        let edge = |d: usize| self.grid.size[d] as f64;
        let low: [f64; 3] = std::array::from_fn(|d| {
            (a[d].min(b[d]) + 0.5 + 1e-6).floor().clamp(0.0, edge(d) - 1.0)
        });
        let high: [f64; 3] = std::array::from_fn(|d| {
            (a[d].max(b[d]) + 0.5 - 1e-6).ceil().clamp(low[d] + 1.0, edge(d))
        });
        [low[0], low[1], low[2], high[0], high[1], high[2]].map(|v| v as f32)
    }

    /// The block of image voxels that the patch may reach, by its ranges along i, j, k.
    pub fn block(&self, image: &Grid) -> [Range<usize>; 3] {
        let end = self.grid.size[0] as f64 - 0.5;
        self.block_of(image, [-0.5; 3], [end; 3])
    }

    /// The block of image voxels whose values [`Patch::extract`] reads if it continues the scan
    /// beyond its border. It is never empty.
    pub fn needed(&self, image: &Grid) -> [Range<usize>; 3] {
        // Computed as that method computes its positions, none of which is beyond those of the
        // corners, because rounding preserves order. So this holds however far away the origin is.
        let to_image = image.affine.inverse().after(&self.grid.affine);
        let corners: [[f64; 3]; 8] = std::array::from_fn(|c| {
            let face =
                |d: usize| if c >> d & 1 == 1 { self.grid.size[d] as f64 - 1.0 } else { 0.0 };
            to_image.apply([0, 1, 2].map(face))
        });
        std::array::from_fn(|a| {
            let on_scan = |v: f64| v.clamp(0.0, image.size[a] as f64 - 1.0) as usize;
            let low = on_scan(corners.iter().map(|c| c[a]).fold(f64::INFINITY, f64::min));
            let high = on_scan(corners.iter().map(|c| c[a]).fold(f64::NEG_INFINITY, f64::max));
            // Between a voxel and the next one.
            low..(high.max(low) + 2).min(image.size[a])
        })
    }

    /// The block of image voxels that may be between two corners of the patch, in fractional
    /// indices of its voxels.
    pub fn block_of(&self, image: &Grid, low: [f64; 3], high: [f64; 3]) -> [Range<usize>; 3] {
        let to_image = self.from_image.inverse();
        let corner = |c: usize| {
            to_image.apply([0, 1, 2].map(|d| if c >> d & 1 == 1 { high[d] } else { low[d] }))
        };
        let corners: Vec<[f64; 3]> = (0..8).map(corner).collect();
        [0, 1, 2].map(|d| {
            let low = corners.iter().map(|c| c[d]).fold(f64::INFINITY, f64::min).floor().max(0.0)
                as usize;
            let high =
                corners.iter().map(|c| c[d]).fold(f64::NEG_INFINITY, f64::max).ceil().max(-1.0)
                    + 1.0;
            low..(high as usize).min(image.size[d])
        })
    }

    /// The patch's value at an image voxel, by trilinear interpolation; none if the patch does not
    /// reach it.
    pub fn value(&self, values: &[f32], voxel: [usize; 3]) -> Option<f32> {
        let at = self.from_image.apply(voxel.map(|v| v as f64));
        sample(values, self.grid.size, at, Interpolation::Linear).map(|v| v as f32)
    }

    /// Resamples patch values to the image's own grid by trilinear interpolation: calls
    /// `visit(voxel, value)` for every image voxel (its index in `[i][j][k]` order) that the patch
    /// reaches.
    pub fn paste(&self, values: &[f32], image: &Grid, mut visit: impl FnMut(usize, f32)) {
        let [range_i, range_j, range_k] = self.block(image);
        for i in range_i {
            for j in range_j.clone() {
                for k in range_k.clone() {
                    if let Some(v) = self.value(values, [i, j, k]) {
                        visit((i * image.size[1] + j) * image.size[2] + k, v);
                    }
                }
            }
        }
    }
}
