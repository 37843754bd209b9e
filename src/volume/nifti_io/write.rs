//! Writing NIfTI-1 files through the `nifti` crate, with the input's header as reference.

use super::Description;
use crate::output::Pending;
use crate::volume::{Grid, Volume, VolumeError};
use ndarray::Array3;
use nifti::NiftiHeader;
use nifti::writer::WriterOptions;
use std::path::Path;

/// A description for an image that did not come from NIfTI: an sform with scanner coordinates in mm.
pub fn describe(grid: &Grid, format: &'static str, element: &'static str, volumes: usize) -> Description {
    let spacing = grid.spacing();
    let row = |r: usize| grid.affine.0[r].map(|v| v as f32);
    let mut pixdim = [1.0f32; 8];
    (0..3).for_each(|a| pixdim[a + 1] = spacing[a] as f32);
    let header = NiftiHeader {
        pixdim,
        xyzt_units: 2,
        qform_code: 0,
        sform_code: 1,
        srow_x: row(0),
        srow_y: row(1),
        srow_z: row(2),
        ..Default::default()
    };
    Description { format, element, affine_from: "space directions", volumes, whole: !element.starts_with("float"), header }
}

impl Description {
    /// For an image that was computed, not read: its voxels' element type, its place in scanner coordinates.
    pub fn of_new(grid: &Grid, element: &'static str) -> Description {
        Description { affine_from: "sform", ..describe(grid, "NIfTI-1", element, 1) }
    }
}

/// Writes a scan of whole numbers as int16 on its own grid.
pub fn write_scan(path: &Path, image: &Volume) -> Result<Pending, VolumeError> {
    let values: Vec<i16> = image.data.iter().map(|v| v.round().clamp(i16::MIN as f32, i16::MAX as f32) as i16).collect();
    write(path, &image.grid, &image.description, &values)
}

/// Writes a binary mask `[i][j][k]` as uint8 on `image`'s grid, with its affine, codes and units. It appears when the result is committed.
pub fn write_mask(path: &Path, image: &Volume, mask: &[u8]) -> Result<Pending, VolumeError> {
    write_mask_on(path, &image.grid, &image.description, mask)
}

/// The same on the grid of an image that is no [`Volume`].
pub fn write_mask_on(path: &Path, grid: &Grid, description: &Description, mask: &[u8]) -> Result<Pending, VolumeError> {
    write(path, grid, description, mask)
}

/// The same for probabilities, as float32.
pub fn write_probability(path: &Path, image: &Volume, values: &[f32]) -> Result<Pending, VolumeError> {
    write(path, &image.grid, &image.description, values)
}

/// An error unless `path` has a name that an output image can have.
pub fn check_output(path: &Path) -> Result<(), VolumeError> {
    let name = path.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
    if name.ends_with(".nii") || name.ends_with(".nii.gz") {
        Ok(())
    } else {
        Err(VolumeError::new(path, "an output image must be named .nii or .nii.gz"))
    }
}

fn write<T: nifti::DataElement + bytemuck::Pod>(
    path: &Path,
    grid: &Grid,
    description: &Description,
    values: &[T],
) -> Result<Pending, VolumeError> {
    check_output(path)?;
    let size = grid.size;
    if size.iter().any(|&s| s > i16::MAX as usize) {
        return Err(VolumeError::new(path, format!("{size:?} voxels do not fit a NIfTI-1 file (at most 32767 along an axis)")));
    }
    let fail = |e: String| VolumeError::new(path, e);
    // The crate expects the array's logical order [i, j, k] and stores i fastest.
    let array = Array3::from_shape_vec(size, values.to_vec()).map_err(|e| fail(e.to_string()))?;
    let pending = Pending::new(path).map_err(|e| fail(e.to_string()))?;
    let written = WriterOptions::new(pending.path()).reference_header(&description.header).write_nifti(&array);
    written.map_err(|e| fail(format!("cannot write: {e}")))?;
    Ok(pending)
}
