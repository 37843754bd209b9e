//! Scans: files, geometry, resampling, intensity, patches. Knows nothing of tensors on devices.
//!
//! World coordinates are millimetres in RAS (x from left to right, y from back to front, z from feet to head). Voxel indices are
//! 0-based, `[i, j, k]`, i fastest in files; arrays here keep k fastest, as the network's maps do.

pub mod distance;
mod element;
mod error;
mod geometry;
pub mod intensity;
mod nifti_io;
mod nrrd;
pub mod patch;
pub mod resample;
mod view;

pub use error::VolumeError;
pub use geometry::{Affine, Grid, Orientation};
pub use nifti_io::{Description, check_output, write_mask, write_mask_on, write_probability, write_scan};

pub use view::{ArrayError, Element, View, span};

use std::path::Path;

/// A scalar image, wherever its values lie.
pub trait Voxels: Sync {
    /// Size and place.
    fn grid(&self) -> &Grid;
    /// Whether its values are whole numbers.
    fn is_whole(&self) -> bool;
    /// The value at voxel `[i, j, k]`, a finite number.
    fn value(&self, voxel: [usize; 3]) -> f32;
    /// The lowest and the highest value.
    fn range(&self) -> [f32; 2];
    /// Whether any value is below `limit`.
    fn reaches_below(&self, limit: f32) -> bool {
        self.range()[0] < limit
    }
    /// Calls `f` with every value.
    fn each(&self, mut f: impl FnMut(f32))
    where
        Self: Sized,
    {
        let [ni, nj, nk] = self.grid().size;
        for i in 0..ni {
            for j in 0..nj {
                (0..nk).for_each(|k| f(self.value([i, j, k])));
            }
        }
    }
}

impl Voxels for Volume {
    fn grid(&self) -> &Grid {
        &self.grid
    }
    fn is_whole(&self) -> bool {
        self.description.whole
    }
    fn value(&self, voxel: [usize; 3]) -> f32 {
        self.at(voxel)
    }
    fn range(&self) -> [f32; 2] {
        self.data.iter().fold([f32::INFINITY, f32::NEG_INFINITY], |[low, high], v| [low.min(*v), high.max(*v)])
    }
    fn reaches_below(&self, limit: f32) -> bool {
        self.data.iter().any(|v| *v < limit)
    }
    fn each(&self, f: impl FnMut(f32)) {
        self.data.iter().copied().for_each(f);
    }
}

/// A scalar image on its file's grid.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Size and place.
    pub grid: Grid,
    /// `[i][j][k]`, k fastest.
    pub data: Vec<f32>,
    /// What the file says beside the voxels; outputs inherit it.
    pub description: Description,
    /// What was odd about the file and how it was understood.
    pub warnings: Vec<String>,
}

impl Volume {
    /// Reads a NIfTI-1 or -2 file (.nii, .nii.gz, .hdr/.img) or an NRRD file (.nrrd, .nhdr), told apart by content. `volume` picks one of several
    /// (from 0) in a file with more than three axes.
    pub fn read(path: &Path, volume: Option<usize>) -> Result<Volume, VolumeError> {
        if nrrd::is_nrrd(path)? { nrrd::read(path, volume) } else { nifti_io::read(path, volume) }
    }

    /// The value at a voxel.
    pub fn at(&self, [i, j, k]: [usize; 3]) -> f32 {
        self.data[(i * self.grid.size[1] + j) * self.grid.size[2] + k]
    }

    /// Reads a label image that belongs to `image`: same size and place. Values are rounded to the nearest integer; negative ones are an error.
    pub fn read_labels(path: &Path, image: &Grid) -> Result<Vec<u32>, VolumeError> {
        let labels = Volume::read(path, None)?;
        if labels.grid.size != image.size {
            let message = format!("its size is {:?}, the image's is {:?}", labels.grid.size, image.size);
            return Err(VolumeError::new(path, message));
        }
        let apart = labels.grid.affine.distance(&image.affine, image.size);
        // Headers round: half a thousandth of a voxel is the same place, a tenth is not.
        let tolerance = 0.1 * image.spacing().into_iter().fold(f64::INFINITY, f64::min);
        if apart > tolerance {
            let message = format!("its voxels lie up to {apart:.2} mm from the image's (their affines differ)");
            return Err(VolumeError::new(path, message));
        }
        let round = |v: &f32| {
            let r = v.round();
            (0.0..=u32::MAX as f32).contains(&r).then_some(r as u32)
        };
        let values: Option<Vec<u32>> = labels.data.iter().map(round).collect();
        values.ok_or_else(|| VolumeError::new(path, "a label image holds integers from 0 on; this one has negative values"))
    }
}

/// Replaces values that are not finite, with a warning: NaN and -inf by the smallest finite value, +inf by the largest. An error when no value is finite.
fn make_finite(path: &Path, data: &mut [f32], warnings: &mut Vec<String>) -> Result<(), VolumeError> {
    let finite = || data.iter().copied().filter(|v| v.is_finite());
    let count = data.len() - finite().count();
    if count == 0 {
        return Ok(());
    }
    let (Some(low), Some(high)) = (finite().reduce(f32::min), finite().reduce(f32::max)) else {
        return Err(VolumeError::new(path, "no voxel is a finite number"));
    };
    for v in data.iter_mut().filter(|v| !v.is_finite()) {
        *v = if *v == f32::INFINITY { high } else { low };
    }
    warnings.push(format!("{count} voxels are not finite numbers: NaN and -inf were read as the smallest value, +inf as the largest"));
    Ok(())
}

/// From a file's order (i fastest) to ours (k fastest).
pub(crate) fn reorder<T: Copy>(data: &[T], [ni, nj, nk]: [usize; 3]) -> Vec<T> {
    let mut out = Vec::with_capacity(data.len());
    for i in 0..ni {
        for j in 0..nj {
            out.extend((0..nk).map(|k| data[(k * nj + j) * ni + i]));
        }
    }
    out
}
