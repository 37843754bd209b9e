//! Writing NIfTI-1 files, with the input's header as reference: the fields are the `nifti` crate's, and so are the bytes; packed files are packed sparsely, side by side.

use super::Description;
use super::header::{parse, sizes};
use crate::input::{Input, Packed};
use crate::memory;
use crate::output::Pending;
use crate::volume::{Grid, Modality, Volume, VolumeError, pack, to_file_order};
use nifti::NiftiHeader;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
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

fn write<T: nifti::DataElement + bytemuck::Pod + PartialEq + Send + Sync>(
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
    if grid.voxels() != values.len() {
        return Err(fail(format!("{} values do not fit an image of {size:?}", values.len())));
    }
    let header = NiftiHeader {
        dim: std::array::from_fn(|a| if a == 0 { 3 } else { size.get(a - 1).map_or(1, |s| *s as u16) }),
        sizeof_hdr: 348,
        datatype: T::DATA_TYPE as i16,
        bitpix: 8 * size_of::<T>() as i16,
        vox_offset: 352.0,
        scl_slope: 1.0,
        scl_inter: 0.0,
        magic: *b"n+1\0",
        ..description.header.clone()
    };
    let (head, body) = (bytes_of(&header), to_file_order(values, size));
    let ending = ending(path).unwrap_or_default();
    let pending = Pending::new(path, ending).map_err(|e| fail(e.to_string()))?;
    let put = |body: &[u8]| -> std::io::Result<()> {
        let mut file = File::create(pending.path())?;
        match ending {
            ".nii.gz" => pack::gzip(&mut file, &head, body),
            _ => file.write_all(&head).and_then(|()| file.write_all(body)),
        }
    };
    put(bytemuck::cast_slice(&body)).map_err(|e| fail(format!("cannot write: {e}")))?;
    is_whole(pending.path(), size, size_of_val(values)).map_err(|e| fail(format!("what was written is not whole: {e}")))?;
    Ok(pending)
}

/// The bytes of a single file in front of its voxels: a header, little-endian, and a word that nothing follows it.
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
    // What an image says of itself takes exactly so many bytes.
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

    /// The same image by the crate's own writer: the same bytes, unpacked.
    #[test]
    fn files_are_those_that_the_nifti_crate_writes() {
        use ndarray::Array3;
        use nifti::writer::WriterOptions;
        let folder = tempfile::tempdir().unwrap();
        let grid = Grid { size: [5, 4, 3], affine: Affine([[0.5, 0.1, 0.0, -7.0], [0.0, -2.0, 0.0, 9.0], [0.0, 0.0, 3.0, 1.5]]) };
        let mut description = Description::of_new(&grid, "float32");
        description.header.descrip = b"what it says of itself".to_vec();
        description.header.intent_name = *b"sixteen letters.";
        description.header.dim = [4, 9, 9, 9, 9, 9, 9, 9];
        (description.header.cal_max, description.header.slice_end, description.header.quatern_c) = (1.5, 7, 0.25);
        let values: Vec<f32> = (0..60).map(|v| if v % 7 == 0 { 0.0 } else { v as f32 / 8.0 }).collect();
        let theirs = folder.path().join("theirs.nii");
        let array = Array3::from_shape_vec(grid.size, values.clone()).unwrap();
        WriterOptions::new(&theirs).reference_header(&description.header).write_nifti(&array).unwrap();
        let theirs = std::fs::read(theirs).unwrap();
        for name in ["ours.nii", "ours.nii.gz"] {
            let path = folder.path().join(name);
            write(&path, &grid, &description, &values).unwrap().commit().unwrap();
            let mut ours = vec![];
            Input::open(&path).unwrap().read_to_end(&mut ours).unwrap();
            assert!(ours == theirs, "{name}");
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
