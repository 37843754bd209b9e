//! NIfTI-1 and NIfTI-2 files.
//!
//! Files are read here and not by another crate, because a damaged or hostile file must give an
//! error and never a panic, a zero-filled image or an allocation of its own choosing. Written files
//! have the header of the `nifti` crate.

mod header;
mod write;

pub(super) use write::{describe, head, is_whole};

use super::begun::Begun;
#[cfg(feature = "dicom")]
use super::dicom::Source;
use super::{
    Affine, Array, Contents, Grid, Modality, VOXELS, VOXELS_ELSEWHERE, VolumeError, Which, open,
};
use crate::input::{Input, Packed};
use crate::memory;
use header::{element_of, element_problem, is_scaled, parse, place, reference, scale, sizes};
use nifti::NiftiHeader;
use std::io::Read;
use std::path::{Path, PathBuf};
#[cfg(feature = "dicom")]
use std::sync::Arc;

/// What a file states besides its voxels and their grid. Outputs on the same grid inherit it.
#[derive(Clone, Debug)]
pub struct Description {
    /// Format of the file, for example `NIfTI-1`.
    pub format: &'static str,
    /// The stored element type, for example `int16`.
    pub element: &'static str,
    /// The source of the affine: `sform`, `qform`, `pixdim` or `space directions`.
    pub affine_from: &'static str,
    /// The number of volumes in the file.
    pub volumes: usize,
    /// Whether values are whole numbers: an integer type without a scale.
    pub whole: bool,
    /// Another affine that the header states, which was not used.
    pub(super) passed_over: Option<Affine>,
    /// The modality of the scan, if it is known; files of these formats do not state it.
    pub modality: Option<Modality>,
    /// The slices that a scan was read from, for segmentations that refer to them.
    #[cfg(feature = "dicom")]
    pub(super) source: Option<Arc<Source>>,
    /// A NIfTI-1 header with the input's geometry, codes and units.
    pub(super) header: NiftiHeader,
}

/// The most bytes after the voxels that are read to reach a gzip checksum; more are ignored.
pub(super) const TAIL: u64 = 16 << 20;

/// Bytes of voxels that are read before the watcher is called; as many slices as fit, at least one.
const PIECE: usize = 1 << 20;

/// The file to open for an image: the header of a pair, which may be named by either of its files.
pub(super) fn header_of(path: &Path) -> PathBuf {
    with_extension(path, "img", "hdr").filter(|p| p.exists()).unwrap_or_else(|| path.to_path_buf())
}

/// Reads `path`, of which `reader` is the open header or the single file; `watch` is called with
/// the voxels available so far, piece by piece.
pub(super) fn read(
    path: &Path,
    mut reader: Input,
    which: Which,
    watch: &mut dyn FnMut(&Begun),
) -> Result<Contents, VolumeError> {
    // The path of a file that came alone is not its place.
    let header_path = if reader.is_alone() { path.to_path_buf() } else { header_of(path) };
    let unreadable = |path: &Path, e: std::io::Error| VolumeError::new(path, e.to_string());
    let mut bytes = Vec::new();
    reader.by_ref().take(348).read_to_end(&mut bytes).map_err(|e| unreadable(&header_path, e))?;
    if bytes.len() < 348 {
        return Err(VolumeError::new(
            &header_path,
            format!("shorter than a NIfTI header: {} bytes, expected 348", bytes.len()),
        ));
    }
    if [540i32.to_le_bytes(), 540i32.to_be_bytes()].iter().any(|s| bytes[..4] == *s) {
        let rest = reader.by_ref().take(540 - 348).read_to_end(&mut bytes);
        rest.map_err(|e| unreadable(&header_path, e))?;
    }
    let h = parse(&header_path, &bytes)?;
    let fail = |message: String| Err(VolumeError::new(path, message));
    let Some(element) = element_of(h.datatype) else { return fail(element_problem(h.datatype)) };
    let name = element.name();
    let (size, volumes) = sizes(path, &h)?;
    let pick = which.pick(volumes, size).map_err(|e| VolumeError::new(path, e))?;

    let mut at = bytes.len() as u64;
    let mut data_path = path.to_path_buf();
    if h.pair && reader.is_alone() {
        return fail(VOXELS_ELSEWHERE.into());
    }
    if h.pair {
        let img = [("hdr", "img"), ("HDR", "IMG")]
            .into_iter()
            .find_map(|(a, b)| with_extension(&header_path, a, b));
        data_path = img.unwrap_or_else(|| header_path.with_extension("img"));
        if !data_path.exists() {
            let message =
                format!("a header without voxels: {} is missing beside it", data_path.display());
            return Err(VolumeError::new(&header_path, message));
        }
        reader = open(&data_path)?;
        at = 0;
    }
    let least = if h.pair { 0.0 } else { if h.version == 1 { 352.0 } else { 544.0 } };
    // Some writers leave 0 in a single file; anything else before the header's end would read the
    // header as voxels.
    let offset = if h.vox_offset == 0.0 { least } else { h.vox_offset };
    if !(offset >= least && offset <= 1e15 && offset.fract() == 0.0) {
        return fail(format!(
            "vox_offset is {}, expected a whole number of bytes, {least} or more",
            h.vox_offset
        ));
    }
    let bytes_of = |volumes| element.bytes_of(size, volumes).map_err(|e| VolumeError::new(path, e));
    let (total, one) = (bytes_of(volumes)?, bytes_of(1)?);
    let needed = offset as u64 + total as u64;
    let holds = reader.most();
    if needed > holds {
        let data_path = data_path.display();
        return fail(format!(
            "shorter than its header says: {needed} bytes are needed, {data_path} can hold at most {holds}"
        ));
    }
    let skip = offset as u64 - at + (pick * one) as u64;
    let short = |e: std::io::Error| unreadable(&data_path, e);
    let skipped =
        std::io::copy(&mut reader.by_ref().take(skip), &mut std::io::sink()).map_err(short)?;
    let mut said = vec![];
    let scale = scale(&h, &mut said);
    let (affine, affine_from, passed_over) = place(&h, &mut said);
    let grid = Grid { size, affine };
    let whole = element.is_whole() && !is_scaled(&h);
    let mut raw = memory::list(VOXELS, one);
    let slice = one / size[2];
    let piece = slice * (PIECE / slice).max(1);
    while skipped == skip && raw.len() < one {
        let more = piece.min(one - raw.len());
        let read = reader.by_ref().take(more as u64).read_to_end(&mut raw).map_err(short)?;
        if read < more {
            break;
        }
        if raw.len() < one && affine.is_regular() {
            watch(&Begun { grid, element, scale, whole, big: h.big, read: &raw });
        }
    }
    if skipped < skip || raw.len() < one {
        let message = format!("voxels are missing: found {} of {one} bytes", raw.len());
        return Err(VolumeError::new(&data_path, message));
    }
    let mut warnings = vec![];
    if reader.packed != Packed::Plain {
        // Read on to the end, so that a wrong checksum is noticed.
        let rest = (total - (pick + 1) * one) as u64;
        let tail = std::io::copy(&mut reader.by_ref().take(rest + TAIL), &mut std::io::sink())
            .map_err(short)?;
        if tail == rest + TAIL {
            warnings
                .push(format!("more than {} MiB follow the voxels and were not read", TAIL >> 20));
        }
        warnings.extend(reader.warning().map(str::to_string));
    }

    element.to_native(&mut raw, h.big);
    let array = Array::of_bytes(raw, element, size, scale);
    warnings.extend(said);
    // In NIfTI-2 there may be numbers whose products are not finite.
    if !affine.is_regular() {
        return fail(format!(
            "its {affine_from} has a voxel spacing of {:?} mm, which does not span three dimensions",
            affine.spacing()
        ));
    }
    let description = Description {
        format: if h.version == 1 { "NIfTI-1" } else { "NIfTI-2" },
        element: name,
        affine_from,
        volumes,
        whole,
        passed_over,
        modality: None,
        #[cfg(feature = "dicom")]
        source: None,
        header: reference(&h, size),
    };
    Ok(Contents { grid, volumes: vec![array], segments: vec![], description, warnings })
}

/// `path` with its extension `from` replaced, `.gz` kept; none if it has another extension.
fn with_extension(path: &Path, from: &str, to: &str) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let (stem, gz) = name.strip_suffix(".gz").map_or((name, ""), |s| (s, ".gz"));
    let stem = stem.strip_suffix(from).filter(|s| s.ends_with('.'))?;
    Some(path.with_file_name(format!("{stem}{to}{gz}")))
}
