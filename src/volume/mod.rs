//! Scans and masks: file formats, geometry, resampling, intensities, patches.
//!
//! [`Volume::read`] reads a scan, [`labels::Labels::read`] a label image that belongs to one, and
//! [`write_mask`] writes a mask on a scan's grid. An image need not come from a file:
//! [`Volume::new`] takes values, and [`View`] an array in the caller's memory.
//!
//! ```
//! use prism::volume::{Affine, Description, Grid, Volume};
//!
//! let grid = Grid { size: [4, 3, 2], affine: Affine::from_spacing([0.7, 0.7, 2.5]) };
//! let values = (0..24).map(|v| v as f32).collect(); // `[i][j][k]`, k fastest
//! let volume = Volume::new(grid, values, Description::of_new(&grid, "float32"))?;
//! assert_eq!(volume.at([1, 0, 0]), 6.0);
//! assert_eq!(volume.grid.affine.apply([1.0, 0.0, 0.0]), [0.7, 0.0, 0.0]);
//! # Ok::<(), String>(())
//! ```
//!
//! # Coordinates
//!
//! World coordinates are millimetres in RAS: x from left to right, y from back to front, z from
//! feet to head. Voxel indices are `[i, j, k]` from 0, i fastest in files. Masks, maps and values
//! that functions take or return have k fastest, `[i][j][k]`; an [`Array`] keeps the order of its
//! file.
//!
//! # Formats
//!
//! | format | read | written | endings |
//! |---|---|---|---|
//! | NIfTI-1 | yes | yes | `.nii.gz`, `.nii` (`.hdr` with `.img` only read) |
//! | NIfTI-2 | yes | no | as NIfTI-1 |
//! | NRRD | yes | yes | `.nrrd` (`.nhdr` only read); `.seg.nrrd`: 3D Slicer's segmentations |
//! | MetaImage | yes | yes | `.mha`; `.mhd` with its voxels in files beside it |
//! | DICOM series | with the feature `dicom` | no | a folder, a zip archive, or one of its files |
//! | DICOM segmentation | as labels | with a scan read from DICOM | `.dcm` |
//! | DICOM structure set | as labels | no | |
//!
//! Files are recognised by their content when they are read. The ending of a name, in upper or
//! lower case, decides the format that is written.

mod array;
pub mod begun;
mod detached;
#[cfg(feature = "dicom")]
pub mod dicom;
pub mod distance;
mod error;
mod geometry;
pub mod intensity;
pub mod labels;
pub mod metaimage;
mod nifti_io;
mod nrrd;
mod pack;
mod palette;
pub mod patch;
pub mod resample;
mod write;

pub use error::VolumeError;
pub(crate) use geometry::include;
pub use geometry::{Affine, Grid, Orientation};
pub use intensity::Modality;
pub use nifti_io::Description;
pub use palette::{PALETTE, default_colour};
pub use write::segments::{LabelValues, LabelledObject, labels_file, numbered, write_labels};
pub use write::{
    check_output, check_output_on, data_file, gzipped, mask_file, plain_nrrd, scan_file,
    write_mask, write_mask_on, write_probability, write_scan, write_some_probability,
};

pub use array::{Array, ArrayError, Element, View, span};

#[cfg(feature = "dicom")]
use crate::input::Packed;
use crate::input::{Input, Kind, no_image, recognise};
use crate::memory;
use begun::Begun;
use rayon::prelude::*;
use std::path::Path;
use std::sync::Arc;

/// A scalar image, wherever its values are: a [`Volume`], a [`View`] of the caller's array, or a
/// [`Part`](begun::Part) of a scan that is being read.
pub trait Voxels: Sync {
    /// The size of the image, and its place in the world.
    fn grid(&self) -> &Grid;
    /// Whether its values are whole numbers.
    fn is_whole(&self) -> bool;
    /// The modality of the image, if it is known.
    fn modality(&self) -> Option<Modality> {
        None
    }
    /// The values as they are stored, of which at least one is finite.
    fn array(&self) -> &Array;
    /// The first voxel of the array: not `[0, 0, 0]` if it is a part of the image.
    #[inline(always)]
    fn first(&self) -> [usize; 3] {
        [0; 3]
    }
    /// The value at voxel `[i, j, k]` of the image, a finite number ([`Array::value`]).
    ///
    /// # Panics
    /// For a voxel outside the array.
    fn value(&self, voxel: [usize; 3]) -> f32 {
        let first = self.first();
        self.array().value(std::array::from_fn(|a| voxel[a].wrapping_sub(first[a])))
    }
}

impl Voxels for Volume {
    fn grid(&self) -> &Grid {
        &self.grid
    }
    fn is_whole(&self) -> bool {
        self.description.whole
    }
    fn array(&self) -> &Array {
        &self.array
    }
    fn modality(&self) -> Option<Modality> {
        self.description.modality
    }
}

/// A scan: a scalar image on its file's grid. Its values stay as the file stores them.
///
/// It does not change, and any number of threads may use it. Copies share the values.
#[derive(Clone, Debug)]
pub struct Volume {
    /// The size of the image, and its place in the world.
    pub grid: Grid,
    array: Arc<Array>,
    /// What the file states besides the voxels; outputs inherit it.
    pub description: Description,
    /// What was odd about the file and how it was interpreted, as sentences for people.
    pub warnings: Vec<String>,
}

impl Volume {
    /// Reads a scan from a file: NIfTI-1 or -2 (.nii, .nii.gz, .hdr/.img), NRRD (.nrrd, .nhdr) or
    /// MetaImage (.mha, .mhd), recognised by content. `volume` picks one (from 0) of a file with
    /// several, that is with more than three axes; None is for a file with one. Each axis may have
    /// up to 65536 voxels.
    ///
    /// With the feature `dicom` also the only DICOM series of a folder, of its subfolders, or of a
    /// zip archive. For a file with one slice its series is read, as far as it is in the same
    /// folder; a warning says so.
    ///
    /// # Errors
    /// The file cannot be read, has another format (the error names it, and how to convert it), or
    /// is damaged; an axis is too long; it holds several volumes and none was picked, or not the
    /// one that was; no voxel is a finite number; memory is refused.
    pub fn read(path: &Path, volume: Option<usize>) -> Result<Volume, VolumeError> {
        Volume::read_series(path, None, volume)
    }

    /// Reads one of several DICOM series: by its number (for a part of it, as `3.2`), its UID or a
    /// part of its description. Without one, as [`Volume::read`].
    ///
    /// # Errors
    /// As [`Volume::read`]; there is no such series, or more than one (the message lists them), or
    /// the file is not DICOM.
    pub fn read_series(
        path: &Path,
        series: Option<&str>,
        volume: Option<usize>,
    ) -> Result<Volume, VolumeError> {
        Volume::read_watched(path, series, volume, &mut |_| {})
    }

    /// Reads as [`Volume::read_series`] does, and calls `watch` with the part of a NIfTI file's
    /// voxels that is available, each time that some more slices were read and others remain. It is
    /// not called for a file of another format, nor for one that fits the first piece.
    ///
    /// # Errors
    /// As [`Volume::read_series`], whatever was shown before.
    pub fn read_watched(
        path: &Path,
        series: Option<&str>,
        volume: Option<usize>,
        watch: &mut dyn FnMut(&Begun),
    ) -> Result<Volume, VolumeError> {
        let read = read(path, series, Which::One(volume), watch)?;
        read.image().map_err(|e| VolumeError::new(path, e))
    }

    /// Reads a NIfTI, NRRD or MetaImage file from memory. It must contain its voxels itself: no
    /// other file is opened, whatever its header names.
    ///
    /// # Errors
    /// As [`Volume::read`]; only the message says what is wrong.
    pub fn of_file(bytes: Vec<u8>, volume: Option<usize>) -> Result<Volume, VolumeError> {
        let path = Path::new(UNNAMED);
        contents_of(bytes, Which::One(volume))?.image().map_err(|e| VolumeError::new(path, e))
    }

    /// A scan from the bytes of its elements in a file's order: i fastest, the lowest byte of each
    /// element first.
    ///
    /// # Errors
    /// The number of elements is not that of the voxels, or is 0; an axis has more than 65536
    /// voxels; no value is finite; the affine cannot be inverted.
    pub fn of_elements(
        grid: Grid,
        element: Element,
        mut bytes: Vec<u8>,
        description: Description,
    ) -> Result<Volume, String> {
        if bytes.is_empty() || element.bytes_of(grid.size, 1)? != bytes.len() {
            return Err(format!(
                "{} bytes for {:?} voxels of {}",
                bytes.len(),
                grid.size,
                element.name()
            ));
        }
        if !grid.affine.is_regular() {
            return Err(format!("the affine {:?} cannot be inverted", grid.affine.0));
        }
        element.to_native(&mut bytes, false);
        let array = Array::of_bytes(bytes, element, grid.size, None);
        Volume::of_array(array, grid, description, vec![])
    }

    /// A scan from values `[i][j][k]`, k fastest. [`Description::of_new`] describes it for outputs.
    ///
    /// # Errors
    /// No value is finite; there are none, or not as many as voxels; an axis has more than 65536
    /// voxels.
    pub fn new(grid: Grid, values: Vec<f32>, description: Description) -> Result<Volume, String> {
        if values.is_empty() || memory::extent(&grid.size) != Some(values.len()) {
            return Err(format!("{} values for {:?} voxels", values.len(), grid.size));
        }
        Element::Float32.bytes_of(grid.size, 1)?;
        Volume::of_array(Array::of_values(grid.size, values), grid, description, vec![])
    }

    fn of_array(
        array: Array,
        grid: Grid,
        description: Description,
        mut warnings: Vec<String>,
    ) -> Result<Volume, String> {
        array.range().ok_or("no voxel is a finite number")?;
        if array.odd() > 0 {
            let count = array.odd();
            warnings
                .push(format!("{count} voxels are not finite numbers: NaN and -inf were read as the smallest value, +inf as the largest"));
        }
        Ok(Volume { grid, array: Arc::new(array), description, warnings })
    }

    /// The grid of the image or label image in a file, however many volumes it has.
    ///
    /// # Errors
    /// As [`Volume::read`].
    pub fn grid_of(path: &Path) -> Result<Grid, VolumeError> {
        labels::grid_of(path)?.ok_or_else(|| {
            VolumeError::new(path, "is a DICOM structure set, which has contours and no voxels")
        })
    }

    /// The value at voxel `[i, j, k]`, a finite number ([`Array::value`]).
    ///
    /// # Panics
    /// For a voxel outside.
    pub fn at(&self, voxel: [usize; 3]) -> f32 {
        self.array.value(voxel)
    }

    /// The values as they are stored.
    pub fn array(&self) -> &Array {
        &self.array
    }

    /// The lowest and the highest finite value.
    pub fn range(&self) -> [f32; 2] {
        self.array.range().unwrap_or_default()
    }

    /// All values `[i][j][k]`, k fastest: a copy of four bytes per voxel. Unwinds to
    /// [`memory::caught`] if memory for it is refused.
    pub fn values(&self) -> Vec<f32> {
        self.array.values()
    }
}

/// The request to a file with several volumes.
#[derive(Clone, Copy)]
enum Which {
    /// One volume, by its number if there are several.
    One(Option<usize>),
    /// All layers of a segmentation; one volume of any other file.
    Layers,
}

impl Which {
    /// The one volume of a file that holds `count`.
    fn pick(self, count: usize, size: [usize; 3]) -> Result<usize, String> {
        match (self, count) {
            (Which::One(Some(v)), n) if v >= n => {
                Err(format!("volume {v} was requested, the file has {n} (0 to {})", n - 1))
            }
            (Which::One(Some(v)), _) => Ok(v),
            (_, 1) => Ok(0),
            (Which::One(None), n) => Err(format!(
                "it holds {n} volumes of {size:?}; select one with --volume 0 to {}",
                n - 1
            )),
            (Which::Layers, n) => Err(format!(
                "it holds {n} volumes of {size:?}: a label image holds one, or names the structures in its layers"
            )),
        }
    }
}

/// A structure that a segmentation names.
#[derive(Clone, Debug, PartialEq)]
struct Segment {
    name: String,
    /// The index of the volume that it is in.
    layer: usize,
    /// The structure's value there.
    value: u32,
}

/// The contents of a file, as they are stored: values may be anything.
struct Contents {
    grid: Grid,
    /// The requested volumes.
    volumes: Vec<Array>,
    /// The meaning of its values, as the file states it.
    segments: Vec<Segment>,
    description: Description,
    warnings: Vec<String>,
}

impl Contents {
    /// The one volume that was requested.
    fn image(mut self) -> Result<Volume, String> {
        let array = self.volumes.pop().ok_or("holds no volume")?;
        Volume::of_array(array, self.grid, self.description, self.warnings)
    }
}

/// Whether a file is DICOM, is not packed, and can be opened again.
#[cfg(feature = "dicom")]
fn is_dicom(path: &Path) -> Result<bool, VolumeError> {
    if !path.is_file() {
        return Ok(false);
    }
    let input = open(&nifti_io::header_of(path))?;
    Ok(input.packed == Packed::Plain && recognise(input.head()) == Some(Kind::Dicom))
}

/// Opens a file; an error names it.
fn open(path: &Path) -> Result<Input, VolumeError> {
    Input::open(path).map_err(|e| VolumeError::new(path, e.to_string()))
}

/// Reads a file of any format.
fn contents(path: &Path, which: Which) -> Result<Contents, VolumeError> {
    read(path, None, which, &mut |_| {})
}

/// Reads a file of any format, and if it has several series the requested one; watched as
/// [`Volume::read_watched`] says.
fn read(
    path: &Path,
    series: Option<&str>,
    which: Which,
    watch: &mut dyn FnMut(&Begun),
) -> Result<Contents, VolumeError> {
    within_memory(path, || {
        // Labels are not series of slices.
        #[cfg(feature = "dicom")]
        if matches!(which, Which::One(_)) && path.is_dir() {
            return dicom::contents(path, series, which);
        }
        let input = open(&nifti_io::header_of(path))?;
        // A file that can be opened again, and is not packed.
        #[cfg(feature = "dicom")]
        if matches!(which, Which::One(_))
            && input.packed == Packed::Plain
            && path.is_file()
            && dicom::is_sent(input.head())
        {
            return dicom::contents(path, series, which);
        }
        if let Some(series) = series {
            return Err(VolumeError::new(path, no_series(input.head(), series)));
        }
        read_as_it_is(path, input, which, watch)
    })
}

/// The message if a series is requested and there are none.
fn no_series(head: &[u8], series: &str) -> String {
    if recognise(head) == Some(Kind::Dicom) {
        return no_image(head);
    }
    let kind = recognise(head).map_or("not recognised", Kind::name);
    format!("is {kind}, which has no series: '{series}' was requested, expected DICOM")
}

/// How errors name a file that came as bytes.
const UNNAMED: &str = "the file";

/// The message for a header that came without the files it names.
const VOXELS_ELSEWHERE: &str = "its voxels are in a separate file: expected one file with both";

/// Reads a file of any format from memory.
fn contents_of(bytes: Vec<u8>, which: Which) -> Result<Contents, VolumeError> {
    let path = Path::new(UNNAMED);
    within_memory(path, || {
        let input = Input::of_bytes(bytes).map_err(|e| VolumeError::new(path, e.to_string()))?;
        read_as_it_is(path, input, which, &mut |_| {})
    })
}

/// Reads an open file according to its format.
fn read_as_it_is(
    path: &Path,
    input: Input,
    which: Which,
    watch: &mut dyn FnMut(&Begun),
) -> Result<Contents, VolumeError> {
    match recognise(input.head()) {
        Some(Kind::Nifti) => nifti_io::read(path, input, which, watch),
        Some(Kind::Nrrd) => nrrd::read(path, input, which),
        Some(Kind::MetaImage) => metaimage::contents(path, input, which),
        _ => Err(VolumeError::new(path, no_image(input.head()))),
    }
}

/// Runs work on a file in which memory may be refused.
fn within_memory<T>(
    path: &Path,
    work: impl FnOnce() -> Result<T, VolumeError>,
) -> Result<T, VolumeError> {
    memory::caught(work).unwrap_or_else(|e| Err(VolumeError::refused(path, e)))
}

/// How messages name the memory that a scan takes.
const VOXELS: &str = "its voxels";

/// From a file's order (i fastest) to this crate's (k fastest).
pub(crate) fn reorder<T: Copy + bytemuck::Zeroable + bytemuck::NoUninit + Send + Sync>(
    data: &[T],
    [ni, nj, nk]: [usize; 3],
) -> Vec<T> {
    let mut out = memory::zeroed::<T>(VOXELS, data.len());
    // As many planes at once as there are values in a cache line or two.
    const PLANES: usize = 32;
    out.par_chunks_mut((PLANES * nj * nk).max(1)).enumerate().for_each(|(block, out)| {
        let planes = out.len() / (nj * nk);
        for (j, k) in (0..nj).flat_map(|j| (0..nk).map(move |k| (j, k))) {
            let row = &data[(k * nj + j) * ni + block * PLANES..][..planes];
            // Empty parts of masks are not touched.
            if !pack::is_nothing(bytemuck::cast_slice(row)) {
                row.iter().enumerate().for_each(|(p, v)| out[(p * nj + j) * nk + k] = *v);
            }
        }
    });
    out
}

/// The reverse: from the order of arrays here to a file's.
pub(crate) fn to_file_order<T: Copy + bytemuck::Zeroable + bytemuck::NoUninit + Send + Sync>(
    data: &[T],
    [ni, nj, nk]: [usize; 3],
) -> Vec<T> {
    // A file's order is the order here with the axes named from the other end.
    reorder(data, [nk, nj, ni])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_orders_of_files_and_arrays_are_each_others_inverse() {
        let size = [2, 3, 4];
        let file: Vec<u8> = (0..24).collect();
        let ours = reorder(&file, size);
        // Voxel [1, 2, 3] is the last in either order, [1, 0, 0] the second of a file.
        assert_eq!((ours[23], ours[12], ours[1]), (23, 1, 6));
        assert_eq!(to_file_order(&ours, size), file);
    }
}
