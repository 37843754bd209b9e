//! Scans.

use super::handles::{self, Object};
use super::log::say;
use super::status::{
    Failure, VersionedStruct, call, prism_status, read_struct, store, str_of, write_struct,
};
use crate::input::{Files, noting};
use crate::memory::Charge;
use crate::session::Image;
use crate::volume::intensity::Normalization;
use crate::volume::patch::{Beyond, Patch};
use crate::volume::{Affine, Description, Element, Grid, View, Volume, Voxels};
use std::ffi::{c_char, c_void};
use std::path::Path;
use std::sync::Arc;

/// A scan: voxels and where they lie. Made by prism_volume_read or prism_volume_wrap. Any number of
/// sessions and threads may use it at once.
pub struct prism_volume;

pub(super) enum Scan {
    Read {
        volume: Box<Volume>,
        /// What it was read from.
        files: Files,
        _charge: Charge,
    },
    Wrapped(Box<View>),
}

impl Object for Scan {
    const NAME: &'static str = "a volume";
}

impl Scan {
    pub fn grid(&self) -> &Grid {
        match self {
            Scan::Read { volume, .. } => &volume.grid,
            Scan::Wrapped(view) => view.grid(),
        }
    }

    /// The description that a mask file on its grid inherits.
    pub fn description(&self) -> Description {
        match self {
            Scan::Read { volume, .. } => volume.description.clone(),
            Scan::Wrapped(view) => Description::of_new(view.grid(), view.array().element().name()),
        }
    }

    /// Whether a file is one that it was read from, by whatever name.
    pub fn was_read_from(&self, path: &Path) -> bool {
        matches!(self, Scan::Read { files, .. } if files.hold(path))
    }

    fn range(&self) -> [f32; 2] {
        match self {
            Scan::Read { volume, .. } => volume.range(),
            Scan::Wrapped(view) => view.array().range().unwrap_or_default(),
        }
    }
}

impl Image for Scan {
    fn place(&self) -> &Grid {
        self.grid()
    }
    fn cut(&self, patch: &Patch, normalization: &Normalization, beyond: Beyond) -> Vec<f32> {
        match self {
            Scan::Read { volume, .. } => volume.cut(patch, normalization, beyond),
            Scan::Wrapped(view) => view.as_ref().cut(patch, normalization, beyond),
        }
    }
}

/// Types of an array's elements, in the machine's byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum prism_element {
    PRISM_INT8 = 0,
    PRISM_UINT8 = 1,
    PRISM_INT16 = 2,
    PRISM_UINT16 = 3,
    PRISM_INT32 = 4,
    PRISM_UINT32 = 5,
    PRISM_INT64 = 6,
    PRISM_UINT64 = 7,
    PRISM_FLOAT32 = 8,
    PRISM_FLOAT64 = 9,
}

/// An array of voxels in the caller's memory, and its geometry. Voxel (i, j, k) is at data + i *
/// strides[0] + j * strides[1] + k * strides[2].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct prism_array {
    /// sizeof(prism_array).
    pub struct_size: usize,
    /// Voxel (0, 0, 0).
    pub data: *const c_void,
    /// A prism_element.
    pub element: i32,
    /// Voxels along i, j and k: 1 to 65536 each.
    pub size: [usize; 3],
    /// Bytes from a voxel to the next along i, j and k, of any sign; all 0: contiguous, i fastest,
    /// as in a NIfTI file.
    pub strides: [isize; 3],
    /// NULL, or 16 numbers: the row-major matrix that maps (i, j, k, 1) to millimetres in RAS (x to
    /// the right, y to the front, z to the head). Without it the axes run along x, y and z.
    pub affine: *const f64,
    /// NULL, or the distances between voxels along i, j and k in mm, used without an affine;
    /// without either, 1 mm.
    pub spacing: *const f64,
}

impl VersionedStruct for prism_array {
    const NAME: &'static str = "prism_array";
}

/// Facts about a volume.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct prism_volume_info {
    /// sizeof(prism_volume_info), set by the caller.
    pub struct_size: usize,
    /// Voxels along i, j and k.
    pub size: [usize; 3],
    /// Distances in mm between voxels along i, j and k.
    pub spacing: [f64; 3],
    /// Row-major matrix that maps (i, j, k, 1) to millimetres in RAS.
    pub affine: [f64; 16],
    /// The lowest and the highest value.
    pub range: [f32; 2],
}

impl VersionedStruct for prism_volume_info {
    const NAME: &'static str = "prism_volume_info";
}

/// Reads a scan: NIfTI-1 or -2 (.nii, .nii.gz, .hdr/.img), NRRD (.nrrd, .nhdr) or MetaImage (.mha,
/// .mhd), of any orientation; in a library built with the feature dicom also the only DICOM series
/// of a folder or zip archive, or that of one file. `which` selects one of several volumes, from 0;
/// -1 if there is only one. Warnings about the file go to the log. On success the caller owns
/// `*volume` and releases it with prism_volume_free.
///
/// # Safety
/// `path` ends with a NUL; `volume` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_volume_read(
    path: *const c_char,
    which: i32,
    volume: *mut *mut prism_volume,
) -> prism_status {
    call(|| {
        // SAFETY: guaranteed by the caller.
        let path = unsafe { str_of(path, "path")? };
        if volume.is_null() {
            return Err(Failure::null("volume"));
        }
        let which = match which {
            -1 => None,
            n => Some(usize::try_from(n).map_err(|_| {
                Failure::argument(format!("which is {n}, expected -1 or a number, 0 or more"))
            })?),
        };
        let (scan, files) = noting(|| Volume::read(Path::new(path), which));
        let scan = scan?;
        scan.warnings.iter().for_each(|w| say(&format!("{path}: {w}")));
        let charge = Charge::of::<u8>("a scan", scan.array().bytes())?;
        let read = Scan::Read { volume: Box::new(scan), files, _charge: charge };
        // SAFETY: as above.
        unsafe { store(volume, "volume", handles::make(Arc::new(read))?) }
    })
}

pub(super) fn element_of(element: i32) -> Result<Element, Failure> {
    let found = usize::try_from(element).ok().and_then(|e| Element::ALL.get(e).copied());
    found.ok_or_else(|| {
        Failure::argument(format!("element is {element}, expected a prism_element, 0 to 9"))
    })
}

/// Three numbers, or `usual` if there are none.
///
/// # Safety
/// NULL, or N numbers.
unsafe fn numbers<const N: usize>(from: *const f64, usual: [f64; N]) -> [f64; N] {
    if from.is_null() {
        usual
    } else {
        // SAFETY: guaranteed by the caller.
        std::array::from_fn(|i| unsafe { from.add(i).read_unaligned() })
    }
}

/// Wraps an array of the caller's as a scan. Nothing is copied: the array must stay valid and
/// unchanged until this volume and all sessions opened on it are freed; when the last of these
/// calls returns, nothing reads it any more, whatever other threads were doing. Predictions do not
/// need it. NaN and -inf are read as the lowest value, +inf as the highest, with a message in the
/// log; an array without any finite value is refused. On success the caller owns `*volume` and
/// releases it with prism_volume_free, which leaves the array alone.
///
/// # Safety
/// `array` is a structure of the size that it says; all its voxels can be read for that long;
/// `volume` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_volume_wrap(
    array: *const prism_array,
    volume: *mut *mut prism_volume,
) -> prism_status {
    call(|| {
        // SAFETY: guaranteed by the caller.
        let a = unsafe { read_struct(array)? };
        if volume.is_null() {
            return Err(Failure::null("volume"));
        }
        let element = element_of(a.element)?;
        let strides = if a.strides == [0; 3] { View::dense(element, a.size) } else { a.strides };
        // SAFETY: guaranteed by the caller.
        let affine = unsafe {
            if a.affine.is_null() {
                Affine::from_spacing(numbers(a.spacing, [1.0; 3]))
            } else {
                let m: [f64; 16] = numbers(a.affine, [0.0; 16]);
                if m[12..] != [0.0, 0.0, 0.0, 1.0] {
                    return Err(Failure::argument(format!(
                        "the affine's last row is {:?}, expected 0 0 0 1",
                        &m[12..]
                    )));
                }
                Affine(std::array::from_fn(|r| std::array::from_fn(|c| m[4 * r + c])))
            }
        };
        // SAFETY: guaranteed by the caller.
        let view = unsafe { View::new(a.data.cast(), element, a.size, strides, affine)? };
        let odd = view.array().odd();
        if odd > 0 {
            say(&format!(
                "{odd} voxels of an array are not finite numbers: NaN and -inf are read as the smallest value, +inf as the largest"
            ));
        }
        // SAFETY: as above.
        unsafe { store(volume, "volume", handles::make(Arc::new(Scan::Wrapped(Box::new(view))))?) }
    })
}

/// An affine as 16 numbers.
pub(super) fn matrix(affine: &Affine) -> [f64; 16] {
    std::array::from_fn(|at| if at < 12 { affine.0[at / 4][at % 4] } else { f64::from(at == 15) })
}

/// Fills `*info` in; set its struct_size first.
///
/// # Safety
/// `info` is a structure of the size that it says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_volume_get_info(
    volume: *const prism_volume,
    info: *mut prism_volume_info,
) -> prism_status {
    call(|| {
        let scan = handles::get::<Scan, _>(volume)?;
        let grid = scan.grid();
        let value = prism_volume_info {
            struct_size: 0,
            size: grid.size,
            spacing: grid.spacing(),
            affine: matrix(&grid.affine),
            range: scan.range(),
        };
        // SAFETY: guaranteed by the caller.
        unsafe { write_struct(info, value) }
    })
}

/// Frees a volume. Sessions opened on it stay valid, and keep reading a wrapped array. If another
/// thread is inside a call on the volume itself, this waits for it; inside a callback it returns
/// PRISM_BUSY and the volume stays. NULL is allowed.
#[unsafe(no_mangle)]
pub extern "C" fn prism_volume_free(volume: *mut prism_volume) -> prism_status {
    call(|| handles::free::<Scan, _>(volume))
}
