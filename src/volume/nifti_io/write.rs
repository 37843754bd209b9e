//! The headers of NIfTI-1 files that are written, based on the input's: the fields are the `nifti`
//! crate's, and so are the bytes.

use super::Description;
use super::header::{code_of, parse, sizes};
use crate::input::{Input, Packed};
use crate::volume::{Element, Grid, Modality};
use nifti::NiftiHeader;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// A description for an image that did not come from NIfTI: an sform with scanner coordinates in
/// mm.
pub fn describe(
    grid: &Grid,
    format: &'static str,
    element: &'static str,
    volumes: usize,
) -> Description {
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
        #[cfg(feature = "dicom")]
        source: None,
        header,
    }
}

impl Description {
    /// The description of an image that was computed, not read: NIfTI-1, in scanner coordinates.
    /// `element` is the name of its element type, such as `int16` ([`Element::name`]).
    pub fn of_new(grid: &Grid, element: &'static str) -> Description {
        Description { affine_from: "sform", ..describe(grid, "NIfTI-1", element, 1) }
    }

    /// The description of a scan with its modality, if that is known.
    pub fn made_by(self, modality: Option<Modality>) -> Description {
        Description { modality, ..self }
    }
}

/// The part of a file before its voxels: a description's header for voxels of some type.
///
/// # Errors
/// An axis is longer than the format can express.
pub fn head(
    size: [usize; 3],
    description: &Description,
    element: Element,
) -> Result<Vec<u8>, String> {
    if size.iter().any(|&s| s > i16::MAX as usize) {
        return Err(format!(
            "{size:?} voxels do not fit a NIfTI-1 file (at most 32767 along an axis)"
        ));
    }
    Ok(bytes_of(&NiftiHeader {
        dim: std::array::from_fn(
            |a| if a == 0 { 3 } else { size.get(a - 1).map_or(1, |s| *s as u16) },
        ),
        sizeof_hdr: 348,
        datatype: code_of(element),
        bitpix: 8 * element.size() as i16,
        vox_offset: 352.0,
        scl_slope: 1.0,
        scl_inter: 0.0,
        magic: *b"n+1\0",
        ..description.header.clone()
    }))
}

/// The bytes of a single file before its voxels: a header, little-endian, and a word that says that
/// no extension follows.
fn bytes_of(h: &NiftiHeader) -> Vec<u8> {
    let mut out = Vec::with_capacity(352);
    let mut put = |bytes: &[u8]| out.extend_from_slice(bytes);
    let floats = |list: &[f32]| list.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let shorts = |list: &[i16]| list.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    put(&h.sizeof_hdr.to_le_bytes());
    put(&h.data_type);
    put(&h.db_name);
    put(&h.extents.to_le_bytes());
    put(&h.session_error.to_le_bytes());
    put(&[h.regular, h.dim_info]);
    put(&shorts(&h.dim.map(|d| d as i16)));
    put(&floats(&[h.intent_p1, h.intent_p2, h.intent_p3]));
    put(&shorts(&[h.intent_code, h.datatype, h.bitpix, h.slice_start]));
    put(&floats(&h.pixdim));
    put(&floats(&[h.vox_offset, h.scl_slope, h.scl_inter]));
    put(&h.slice_end.to_le_bytes());
    put(&[h.slice_code, h.xyzt_units]);
    put(&floats(&[h.cal_max, h.cal_min, h.slice_duration, h.toffset]));
    put(&h.glmax.to_le_bytes());
    put(&h.glmin.to_le_bytes());
    // An image's description takes exactly this many bytes.
    put(&std::array::from_fn::<u8, 80, _>(|at| h.descrip.get(at).copied().unwrap_or(0)));
    put(&h.aux_file);
    put(&shorts(&[h.qform_code, h.sform_code]));
    put(&floats(&[h.quatern_b, h.quatern_c, h.quatern_d, h.quatern_x, h.quatern_y, h.quatern_z]));
    [h.srow_x, h.srow_y, h.srow_z].iter().for_each(|row| put(&floats(row)));
    put(&h.intent_name);
    put(&h.magic);
    put(&[0; 4]);
    out
}

/// Reads back a file that was just written: checks its header and its length, which for a
/// compressed file is in its last bytes.
pub fn is_whole(path: &Path, size: [usize; 3], bytes: usize) -> Result<(), String> {
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
        false => Err(format!(
            "it holds {there:?} voxels in {length} bytes, expected {size:?} in {expected}"
        )),
    }
}
