//! Writing NIfTI-1 files through the `nifti` crate, with the input's header as reference.

use super::Description;
use super::header::{parse, sizes};
use crate::input::{Input, Packed};
use crate::memory;
use crate::output::Pending;
use crate::volume::{Grid, Modality, Volume, VolumeError};
use ndarray::Array3;
use nifti::writer::WriterOptions;
use nifti::{NiftiError, NiftiHeader};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
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
    Description {
        format,
        element,
        affine_from: "space directions",
        volumes,
        whole: !element.starts_with("float"),
        passed_over: None,
        modality: None,
        header,
    }
}

impl Description {
    /// For an image that was computed, not read: its voxels' element type, its place in scanner coordinates.
    pub fn of_new(grid: &Grid, element: &'static str) -> Description {
        Description { affine_from: "sform", ..describe(grid, "NIfTI-1", element, 1) }
    }

    /// The same of a scan that was made so.
    pub fn made_by(self, modality: Option<Modality>) -> Description {
        Description { modality, ..self }
    }
}

/// Writes a scan of whole numbers as int16 on its own grid.
pub fn write_scan(path: &Path, image: &Volume) -> Result<Pending, VolumeError> {
    let values = image.values();
    let values: Vec<i16> =
        memory::collected("a file's voxels", values.iter().map(|v| v.round().clamp(i16::MIN as f32, i16::MAX as f32) as i16));
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

/// The ending of an output image's name, in whatever capitals, as the writer knows it: what decides its format, for checks and writers alike.
fn ending(path: &Path) -> Option<&'static str> {
    let name = path.file_name().map(|n| n.to_string_lossy().to_lowercase())?;
    // A file called nothing but `.nii` is hidden and has no ending.
    [".nii.gz", ".nii"].into_iter().find(|e| name.ends_with(e) && name.len() > e.len())
}

/// An error unless `path` has a name that an output image can have.
pub fn check_output(path: &Path) -> Result<(), VolumeError> {
    ending(path).map(|_| ()).ok_or_else(|| VolumeError::new(path, "an output image must be named NAME.nii or NAME.nii.gz"))
}

fn write<T: nifti::DataElement + bytemuck::Pod>(
    path: &Path,
    grid: &Grid,
    description: &Description,
    values: &[T],
) -> Result<Pending, VolumeError> {
    let fail = |e: String| VolumeError::new(path, e);
    check_output(path)?;
    let size = grid.size;
    if size.iter().any(|&s| s > i16::MAX as usize) {
        return Err(fail(format!("{size:?} voxels do not fit a NIfTI-1 file (at most 32767 along an axis)")));
    }
    // The crate expects the array's logical order [i, j, k] and stores i fastest.
    let array = Array3::from_shape_vec(size, memory::copied("a file's voxels", values)).map_err(|e| fail(e.to_string()))?;
    let pending = Pending::new(path, ending(path).unwrap_or_default()).map_err(|e| fail(e.to_string()))?;
    let written = WriterOptions::new(pending.path()).reference_header(&description.header).write_nifti(&array);
    written.map_err(|e| match e {
        NiftiError::Io(e) => fail(format!("cannot write: {e}")),
        other => fail(format!("cannot write: {other}")),
    })?;
    is_whole(pending.path(), size, size_of_val(values)).map_err(|e| fail(format!("what was written is not whole: {e}")))?;
    Ok(pending)
}

/// Reads a file that was just written back: its header, and how long it is, which of a compressed one its last bytes tell.
fn is_whole(path: &Path, size: [usize; 3], bytes: usize) -> Result<(), String> {
    let fail = |e: std::io::Error| e.to_string();
    let mut input = Input::open(path).map_err(fail)?;
    let mut head = [0u8; 348];
    input.read_exact(&mut head).map_err(fail)?;
    let header = parse(path, &head).map_err(|e| e.message)?;
    let (there, _) = sizes(path, &header).map_err(|e| e.message)?;
    let mut file = File::open(path).map_err(fail)?;
    let mut length = file.metadata().map_err(fail)?.len();
    let mut expected = 352 + bytes as u64;
    if input.packed == Packed::Gzip {
        let mut last = [0u8; 4];
        file.seek(SeekFrom::End(-4)).and_then(|_| file.read_exact(&mut last)).map_err(fail)?;
        (length, expected) = (u32::from_le_bytes(last) as u64, expected & 0xffff_ffff);
    }
    match there == size && length == expected {
        true => Ok(()),
        false => Err(format!("it holds {there:?} voxels in {length} bytes, expected {size:?} in {expected}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::Affine;

    #[test]
    fn names_decide_formats_in_any_capitals() {
        for (name, expected) in
            [("a.nii", Some(".nii")), ("a.NII", Some(".nii")), ("a.b.nii.GZ", Some(".nii.gz")), ("A.Nii.gz", Some(".nii.gz"))]
        {
            assert_eq!(ending(Path::new(name)), expected, "{name}");
        }
        for name in ["a", "a.nii.bz2", ".nii", ".NII.GZ", "nii", "a.gz", ""] {
            assert_eq!(ending(Path::new(name)), None, "{name}");
        }
    }

    #[test]
    fn a_file_that_is_cut_short_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let grid = Grid { size: [5, 4, 3], affine: Affine::from_spacing([1.0, 2.0, 3.0]) };
        for name in ["a.nii", "a.nii.gz"] {
            let path = folder.path().join(name);
            let values: Vec<u8> = (0..60).collect();
            write(&path, &grid, &Description::of_new(&grid, "uint8"), &values).unwrap().commit().unwrap();
            assert!(is_whole(&path, grid.size, 60).is_ok());
            assert!(is_whole(&path, grid.size, 61).is_err() && is_whole(&path, [5, 3, 4], 60).is_err());
            let whole = std::fs::read(&path).unwrap();
            for cut in [0, 1, 20, whole.len() - 1] {
                std::fs::write(&path, &whole[..cut]).unwrap();
                assert!(is_whole(&path, grid.size, 60).is_err(), "{name} cut at {cut}");
            }
        }
    }
}
