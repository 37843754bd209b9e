//! Masks and maps as files on a scan's own grid. The ending of a name decides the format,
//! case-insensitively.

#[cfg(feature = "dicom")]
use super::dicom;
use super::nrrd::{self, Structure};
use super::pack::{self, BLOCK, Body};
use super::{
    Description, Element, Grid, VOXELS, Volume, VolumeError, metaimage, nifti_io, to_file_order,
};
use crate::memory;
use crate::output::Pending;
use std::io::Write;
use std::path::{Path, PathBuf};

pub(super) mod segments;

/// The formats that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Nifti,
    NiftiPacked,
    Nrrd,
    /// An NRRD that 3D Slicer opens as a segmentation.
    Segmentation,
    MetaImage,
    /// A header, and its voxels in a file beside it.
    MetaImageApart,
    /// A segmentation that refers to the slices of a DICOM series.
    Dicom,
}

/// Endings of names; if two match, the first counts.
const ENDINGS: [(&str, Format); 7] = [
    (".nii.gz", Format::NiftiPacked),
    (".nii", Format::Nifti),
    (".seg.nrrd", Format::Segmentation),
    (".nrrd", Format::Nrrd),
    (".mha", Format::MetaImage),
    (".mhd", Format::MetaImageApart),
    (".dcm", Format::Dicom),
];

/// The ending of an output image's name and its format, for checks and writers alike.
fn ending(path: &Path) -> Option<(&'static str, Format)> {
    let name = path.file_name().map(|n| n.to_string_lossy().to_lowercase())?;
    // A file called only `.nii` is hidden and has no ending.
    ENDINGS.into_iter().find(|(e, _)| name.ends_with(e)).filter(|(e, _)| name.len() > e.len())
}

/// The ending of the file that holds the voxels for a header: they are packed by zlib.
const APART: &str = ".zraw";

/// The path of the file with the voxels of an output image called `path`, if they are not in the
/// same file: that of a `.mhd` is a `.zraw` beside it.
pub fn data_file(path: &Path) -> Option<PathBuf> {
    let apart = matches!(ending(path), Some((_, Format::MetaImageApart)));
    apart.then(|| path.with_extension(&APART[1..]))
}

/// Checks that an output image of such elements can be called `path`, before any work is done.
///
/// The file system is asked only whether a separate header (`.mhd`) would be a link; whether a file
/// can be put there is for [`output::check`](crate::output::check).
///
/// # Errors
/// The name has none of the [endings](crate::volume#formats) that are written, or one of a format
/// that does not hold such elements.
pub fn check_output(path: &Path, element: Element) -> Result<(), VolumeError> {
    named(path, element).map(|_| ())
}

fn named(path: &Path, element: Element) -> Result<(&'static str, Format), VolumeError> {
    let fail = |e: &str| Err(VolumeError::new(path, e));
    match ending(path) {
        None => fail(
            "an output image must be named NAME.nii.gz or NAME.nii (NIfTI), NAME.nrrd or NAME.seg.nrrd, NAME.mha or NAME.mhd (MetaImage), or, for a DICOM series, NAME.dcm",
        ),
        Some((_, Format::MetaImageApart))
            if !data_file(path).is_some_and(|data| metaimage::can_be_named(&data)) =>
        {
            fail(
                "its header cannot name the file of its voxels: expected a name without %, without blanks at its ends, and not starting with LIST; or use NAME.mha, which holds both",
            )
        }
        // A reader that follows the link from elsewhere looks for the voxels beside the link's
        // target.
        Some((_, Format::MetaImageApart)) if path.is_symlink() => fail(
            "is a link, and its voxels would not be beside its target: use NAME.mha, which holds both",
        ),
        Some((_, Format::Segmentation)) if !matches!(element, Element::Uint8 | Element::Uint16) => {
            fail(
                "a segmentation (.seg.nrrd) holds a mask: a map of probabilities must be named NAME.nii.gz, NAME.nii, NAME.nrrd, NAME.mha or NAME.mhd",
            )
        }
        Some((_, Format::Dicom)) if !cfg!(feature = "dicom") => fail(
            "this build lacks the feature dicom and cannot write a DICOM segmentation (.dcm): use NAME.nii.gz, NAME.seg.nrrd or NAME.mha",
        ),
        Some((_, Format::Dicom)) if element == Element::Int16 => {
            fail("a DICOM segmentation (.dcm) holds a mask or probabilities, not a scan")
        }
        Some(named) => Ok(named),
    }
}

/// Checks that an output image on a known scan can be called `path`, as [`check_output`] does: a
/// DICOM segmentation refers to the slices of a DICOM series.
///
/// # Errors
/// As [`check_output`]; or the scan was not read from DICOM, or from files that do not state what a
/// segmentation must name.
pub fn check_output_on(
    path: &Path,
    element: Element,
    description: &Description,
) -> Result<(), VolumeError> {
    let (_, format) = named(path, element)?;
    if format == Format::Dicom { is_of_dicom(path, description) } else { Ok(()) }
}

/// An error unless a DICOM segmentation of a scan can be written.
fn is_of_dicom(path: &Path, description: &Description) -> Result<(), VolumeError> {
    #[cfg(feature = "dicom")]
    if let Some(source) = &description.source {
        return source.check().map_err(|e| {
            VolumeError::new(
                path,
                format!("cannot be written for this scan: {e}; use NAME.nii.gz, NAME.seg.nrrd or NAME.mha"),
            )
        });
    }
    Err(VolumeError::new(
        path,
        format!(
            "a DICOM segmentation (.dcm) refers to the slices of a DICOM series, and the scan is {}: give the folder of its series as the scan, or name the output NAME.nii.gz, NAME.seg.nrrd or NAME.mha",
            description.format
        ),
    ))
}

/// Writes a scan as int16 on its own grid: values are rounded, and clipped to the range of int16.
///
/// The file appears when the result is [committed](Pending::commit).
///
/// # Errors
/// As [`write_mask`].
pub fn write_scan(path: &Path, image: &Volume) -> Result<Pending, VolumeError> {
    let rounded = |v: f32| v.round().clamp(i16::MIN as f32, i16::MAX as f32) as i16;
    let values = image.array().collected("a file's voxels", rounded);
    write(path, &image.grid, &image.description, Element::Int16, &values)
}

/// The bytes of the file of a scan, in the format of `name`'s ending: int16 if its values are whole
/// numbers that fit, otherwise float32.
///
/// # Errors
/// The name is not one that a scan can have; memory is refused.
pub fn scan_file(name: &Path, image: &Volume) -> Result<Vec<u8>, VolumeError> {
    let (grid, description) = (&image.grid, &image.description);
    let [low, high] = image.range();
    if description.whole && low >= f32::from(i16::MIN) && high <= f32::from(i16::MAX) {
        let values = image.array().collected("a file's voxels", |v: f32| v.round() as i16);
        return File::of(name, grid, description, Element::Int16, &values, &[])?.bytes(name);
    }
    File::of(name, grid, description, Element::Float32, &image.values(), &[])?.bytes(name)
}

/// Writes a binary mask `[i][j][k]` of zeros and ones as uint8 on `image`'s grid.
///
/// The ending of `path` decides the [format](crate::volume#formats). A NIfTI file has the affine,
/// codes and units of the image's own. The file appears, whole, when the result is
/// [committed](Pending::commit).
///
/// # Errors
/// The name has an ending that is not written, or one that does not go with this image
/// ([`check_output_on`]); there are not as many values as voxels; an axis is too long for the
/// format; memory is refused; the file cannot be written.
pub fn write_mask(path: &Path, image: &Volume, mask: &[u8]) -> Result<Pending, VolumeError> {
    write_mask_on(path, &image.grid, &image.description, mask)
}

/// Writes a mask as [`write_mask`] does, on the grid of an image that is not a [`Volume`].
///
/// # Errors
/// As [`write_mask`].
pub fn write_mask_on(
    path: &Path,
    grid: &Grid,
    description: &Description,
    mask: &[u8],
) -> Result<Pending, VolumeError> {
    of_mask(path, grid, description, mask)?.write(path)
}

/// Writes probabilities `[i][j][k]` as float32 on `image`'s grid; in DICOM in 255 steps.
///
/// The file appears when the result is [committed](Pending::commit).
///
/// # Errors
/// As [`write_mask`].
pub fn write_probability(
    path: &Path,
    image: &Volume,
    values: &[f32],
) -> Result<Pending, VolumeError> {
    #[cfg(feature = "dicom")]
    if named(path, Element::Float32)?.1 == Format::Dicom {
        let levels = values.iter().map(|p| dicom::level(*p));
        return write_levels(path, image, &memory::collected(LEVELS, levels));
    }
    write(path, &image.grid, &image.description, Element::Float32, values)
}

/// Writes the file of [`write_probability`] for probabilities that are 0 at most voxels: `each`
/// calls its argument with the others. Empty parts take neither memory nor time.
///
/// # Errors
/// As [`write_mask`].
///
/// # Panics
/// For a voxel outside the image.
pub fn write_some_probability(
    path: &Path,
    image: &Volume,
    each: impl FnOnce(&mut dyn FnMut([usize; 3], f32)),
) -> Result<Pending, VolumeError> {
    let grid = &image.grid;
    #[cfg(feature = "dicom")]
    if named(path, Element::Float32)?.1 == Format::Dicom {
        let [_, nj, nk] = grid.size;
        let mut levels = memory::zeroed(LEVELS, grid.voxels());
        each(&mut |[i, j, k], p| levels[(i * nj + j) * nk + k] = dicom::level(p));
        return write_levels(path, image, &levels);
    }
    File::of_some(path, grid, &image.description, Element::Float32, each)?.write(path)
}

/// How messages name the memory of a DICOM segmentation's levels.
#[cfg(feature = "dicom")]
const LEVELS: &str = "the levels of probabilities";

#[cfg(feature = "dicom")]
fn write_levels(path: &Path, image: &Volume, levels: &[u8]) -> Result<Pending, VolumeError> {
    let object = Structure::object().marked(dicom::SegmentVoxels::Levels(levels));
    let (grid, kind) = (&image.grid, dicom::Kind::Fractional);
    File::of_dicom(path, grid, &image.description, kind, &[object])?.write(path)
}

/// The bytes of the file that [`write_mask_on`] writes under such a name.
///
/// # Errors
/// As [`write_mask`], except for those of the disk.
pub fn mask_file(
    name: &Path,
    grid: &Grid,
    description: &Description,
    mask: &[u8],
) -> Result<Vec<u8>, VolumeError> {
    of_mask(name, grid, description, mask)?.bytes(name)
}

/// The file of a mask.
fn of_mask<'a>(
    path: &Path,
    grid: &'a Grid,
    description: &Description,
    mask: &[u8],
) -> Result<File<'a, u8>, VolumeError> {
    #[cfg(feature = "dicom")]
    if named(path, Element::Uint8)?.1 == Format::Dicom {
        let object = Structure::object().marked(dicom::SegmentVoxels::Levels(mask));
        return File::of_dicom(path, grid, description, dicom::Kind::Binary, &[object]);
    }
    File::of(path, grid, description, Element::Uint8, mask, &[Structure::object()])
}

/// The bytes of an NRRD file of a mask whose voxels are not packed, for readers that cannot unpack.
///
/// # Errors
/// There are not as many values as voxels; memory is refused.
pub fn plain_nrrd(
    grid: &Grid,
    description: &Description,
    mask: &[u8],
) -> Result<Vec<u8>, VolumeError> {
    let name = Path::new("mask.nrrd");
    let file = File::of(name, grid, description, Element::Uint8, mask, &[])?;
    let head = nrrd::head(grid, Element::Uint8, &[], "raw");
    let mut bytes = InMemory(vec![]);
    let written = bytes.write_all(&head).and_then(|()| bytes.write_all(file.body()));
    written.map_err(|e| VolumeError::new(name, format!("cannot write: {e}")))?;
    Ok(bytes.0)
}

/// The bytes of a gzip file of `bytes`; quick if they are mostly 0.
///
/// # Errors
/// Memory is refused.
pub fn gzipped(bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut packed = InMemory(vec![]);
    pack::gzip(&mut packed, &[], Body::of(bytes))?;
    Ok(packed.0)
}

/// A file that is about to be written.
struct File<'a, T> {
    ending: &'static str,
    format: Format,
    grid: &'a Grid,
    element: Element,
    head: Vec<u8>,
    /// The voxels in a file's order, their lowest byte first.
    body: Vec<T>,
    /// Whether anything was put into a block of the body; nothing is known of blocks beyond the
    /// list.
    held: Vec<bool>,
}

impl<'a, T: bytemuck::Pod + Send + Sync> File<'a, T> {
    fn of(
        path: &Path,
        grid: &'a Grid,
        description: &Description,
        element: Element,
        values: &[T],
        structures: &[Structure],
    ) -> Result<File<'a, T>, VolumeError> {
        if grid.voxels() != values.len() {
            let text = format!("{} values do not fit an image of {:?}", values.len(), grid.size);
            return Err(VolumeError::new(path, text));
        }
        let mut file = Self::of_nothing(path, grid, description, element, structures)?;
        file.body = to_file_order(values, grid.size);
        element.to_native(bytemuck::cast_slice_mut(&mut file.body), false);
        Ok(file)
    }

    /// A file of values that are 0 except where `each` gives another.
    fn of_some(
        path: &Path,
        grid: &'a Grid,
        description: &Description,
        element: Element,
        each: impl FnOnce(&mut dyn FnMut([usize; 3], T)),
    ) -> Result<File<'a, T>, VolumeError> {
        let object = Structure::object();
        let mut file = Self::of_nothing(path, grid, description, element, &[object])?;
        let ([ni, nj, _], block) = (grid.size, BLOCK / size_of::<T>());
        let mut body = memory::zeroed(VOXELS, grid.voxels());
        let mut held = memory::filled(VOXELS, false, grid.voxels().div_ceil(block));
        each(&mut |[i, j, k], value| {
            let at = (k * nj + j) * ni + i;
            body[at] = value;
            held[at / block] = true;
        });
        element.to_native(bytemuck::cast_slice_mut(&mut body), false);
        (file.body, file.held) = (body, held);
        Ok(file)
    }

    /// A file that has no voxels yet.
    fn of_nothing(
        path: &Path,
        grid: &'a Grid,
        description: &Description,
        element: Element,
        structures: &[Structure],
    ) -> Result<File<'a, T>, VolumeError> {
        let fail = |e: String| VolumeError::new(path, e);
        let (ending, format) = named(path, element)?;
        let head = match format {
            Format::Nifti | Format::NiftiPacked => {
                nifti_io::head(grid.size, description, element).map_err(fail)?
            }
            Format::Nrrd => nrrd::head(grid, element, &[], "gzip"),
            Format::Segmentation => {
                let head = nrrd::head(grid, element, structures, "gzip");
                if head.len() > nrrd::HEADER_LIMIT {
                    return Err(fail(format!(
                        "the names of {} objects make the header too long for readers: use \
                         another format, such as NAME.nii.gz, which holds only the values",
                        structures.len()
                    )));
                }
                head
            }
            Format::MetaImage | Format::MetaImageApart => vec![],
            Format::Dicom => {
                return Err(fail("a DICOM segmentation holds a mask or probabilities".into()));
            }
        };
        Ok(File { ending, format, grid, element, head, body: vec![], held: vec![] })
    }

    fn body(&self) -> &[u8] {
        bytemuck::cast_slice(&self.body)
    }

    /// The part after the head, before packing.
    fn unpacked(&self) -> Body<'_> {
        Body::held(self.body(), &self.held)
    }

    /// The bytes that the file would hold.
    fn bytes(&self, name: &Path) -> Result<Vec<u8>, VolumeError> {
        let mut bytes = InMemory(vec![]);
        self.put(&mut bytes).map_err(|e| VolumeError::new(name, format!("cannot write: {e}")))?;
        Ok(bytes.0)
    }

    /// Writes it beside `path`, where it appears when the result is committed.
    fn write(&self, path: &Path) -> Result<Pending, VolumeError> {
        let fail = |e: String| VolumeError::new(path, e);
        let pending = match data_file(path) {
            Some(data) => self.write_apart(path, &data)?,
            None => pending(path, self.ending, |to| self.put(to))?,
        };
        if let Format::Nifti | Format::NiftiPacked = self.format {
            nifti_io::is_whole(pending.path(), self.grid.size, self.body().len())
                .map_err(|e| fail(format!("the written file is incomplete: {e}")))?;
        }
        Ok(pending)
    }

    /// A header at `path`, and its voxels in the file `data`.
    fn write_apart(&self, path: &Path, data: &Path) -> Result<Pending, VolumeError> {
        let fail = |e: std::io::Error| VolumeError::new(path, format!("cannot write: {e}"));
        let name = data.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let packed = pack::Zlib::of(self.unpacked()).map_err(fail)?;
        let head = metaimage::head(self.grid, None, self.element, packed.len(), name);
        let head = head.map_err(fail)?;
        let voxels = pending(data, APART, |to| packed.write(to))?;
        Ok(pending(path, self.ending, |to| to.write_all(head.as_bytes()))?.naming(voxels))
    }

    fn put(&self, to: &mut impl Write) -> std::io::Result<()> {
        match self.format {
            Format::NiftiPacked => pack::gzip(to, &self.head, self.unpacked()),
            Format::Nifti | Format::Dicom => {
                to.write_all(&self.head).and_then(|()| to.write_all(self.body()))
            }
            // Its header is not packed.
            Format::Nrrd | Format::Segmentation => {
                to.write_all(&self.head).and_then(|()| pack::gzip(to, &[], self.unpacked()))
            }
            Format::MetaImage => metaimage::put(to, self.grid, None, self.element, self.unpacked()),
            Format::MetaImageApart => Err(std::io::Error::other(
                "its voxels would be in a separate file: expected NAME.mha, which holds both",
            )),
        }
    }
}

#[cfg(feature = "dicom")]
impl<'a> File<'a, u8> {
    /// A DICOM segmentation.
    fn of_dicom(
        path: &Path,
        grid: &'a Grid,
        description: &Description,
        kind: dicom::Kind,
        segments: &[dicom::Segment],
    ) -> Result<File<'a, u8>, VolumeError> {
        let fail = |e: String| VolumeError::new(path, e);
        is_of_dicom(path, description)?;
        let source = description.source.as_deref().filter(|s| s.size() == grid.size);
        let source = source
            .ok_or_else(|| fail("the scan's slices are not those it was read from".into()))?;
        let (head, body) = dicom::encoded(source, kind, segments).map_err(fail)?;
        let (ending, format, element) = (".dcm", Format::Dicom, Element::Uint8);
        Ok(File { ending, format, grid, element, head, body, held: vec![] })
    }
}

/// A file's bytes in memory that may be refused.
struct InMemory(Vec<u8>);

impl Write for InMemory {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let short = |_| std::io::Error::from(std::io::ErrorKind::OutOfMemory);
        memory::check::<u8>("a file's bytes", bytes.len()).map_err(std::io::Error::other)?;
        memory::refusable(|| self.0.try_reserve(bytes.len())).map_err(short)?;
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn write<T: bytemuck::Pod + Send + Sync>(
    path: &Path,
    grid: &Grid,
    description: &Description,
    element: Element,
    values: &[T],
) -> Result<Pending, VolumeError> {
    File::of(path, grid, description, element, values, &[Structure::object()])?.write(path)
}

/// A file that `put` writes beside `path`, where it appears when the result is committed.
fn pending(
    path: &Path,
    ending: &str,
    put: impl FnOnce(&mut Counted) -> std::io::Result<()>,
) -> Result<Pending, VolumeError> {
    let fail = |e: String| VolumeError::new(path, e);
    let pending = Pending::new(path, ending).map_err(|e| fail(e.to_string()))?;
    let written = pending.open().and_then(|open| {
        let mut open = Counted { file: open, bytes: 0 };
        put(&mut open).map(|()| open.bytes)
    });
    let written = written.map_err(|e| fail(format!("cannot write: {e}")))?;
    // The written file is checked before it takes its place.
    let there = std::fs::metadata(pending.path()).map_err(|e| fail(e.to_string()))?.len();
    if there == written {
        Ok(pending)
    } else {
        Err(fail(format!("the written file is incomplete: found {there} of {written} bytes")))
    }
}

/// A file, and the number of bytes written to it.
struct Counted {
    file: std::fs::File,
    bytes: u64,
}

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Input;
    use crate::volume::labels::{Labels, TargetLabel};
    use crate::volume::{Affine, nifti_io::is_whole};
    use std::io::Read;

    #[test]
    fn names_decide_formats_in_any_capitals() {
        for (name, expected) in [
            ("a.nii", ".nii"),
            ("a.NII", ".nii"),
            ("a.b.nii.GZ", ".nii.gz"),
            ("a.seg.NRRD", ".seg.nrrd"),
            ("seg.nrrd", ".nrrd"),
            ("a.Mha", ".mha"),
            ("a.b.MHD", ".mhd"),
            ("a.DCM", ".dcm"),
        ] {
            assert_eq!(ending(Path::new(name)).map(|e| e.0), Some(expected), "{name}");
        }
        for name in
            ["a", "a.nii.bz2", ".nii", ".NII.GZ", "nii", "a.gz", "", ".mha", ".mhd", ".seg.nrrd"]
        {
            assert_eq!(ending(Path::new(name)), None, "{name}");
        }
    }

    /// An oblique grid, and a mask on it that shows which axis is which.
    fn oblique() -> (Grid, Vec<u8>) {
        let affine =
            Affine([[0.5, 0.1, 0.0, -7.25], [0.05, -2.0, 0.0, 9.0], [0.0, 0.25, 3.0, 1.5]]);
        (
            Grid { size: [5, 4, 3], affine },
            (0..60).map(|at| u8::from(at % 7 == 0 || at < 5)).collect(),
        )
    }

    #[test]
    fn what_is_not_packed_is_read_back_as_well() {
        let (grid, mask) = oblique();
        let description = Description::of_new(&grid, "uint8");
        let plain = plain_nrrd(&grid, &description, &mask).unwrap();
        let head = plain.windows(2).position(|w| w == b"\n\n").unwrap() + 2;
        assert!(plain[head..] == to_file_order(&mask, grid.size));
        let read = Volume::of_file(plain, None).unwrap();
        assert!(read.grid.affine.distance(&grid.affine, grid.size) < 1e-5);
        assert!(read.values().iter().map(|v| *v as u8).eq(mask.iter().copied()));
        assert!(plain_nrrd(&grid, &description, &mask[1..]).is_err());
        let (mut bytes, packed) = (vec![], gzipped(&mask).unwrap());
        flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut bytes).unwrap();
        assert!(bytes == mask);
    }

    #[test]
    fn every_format_is_read_back_where_it_lies() {
        let folder = tempfile::tempdir().unwrap();
        let (grid, mask) = oblique();
        let image = Volume::new(
            grid,
            (0..60).map(|v| v as f32).collect(),
            Description::of_new(&grid, "float32"),
        )
        .unwrap();
        let map: Vec<f32> =
            mask.iter().enumerate().map(|(at, m)| *m as f32 / (1.0 + at as f32)).collect();
        for name in ["a.nii", "a.nii.gz", "a.nrrd", "a.seg.nrrd", "a.mha"] {
            let path = folder.path().join(name);
            write_mask(&path, &image, &mask).unwrap().commit().unwrap();
            // The same bytes without a file, and from them the same image.
            let bytes = mask_file(Path::new(name), &grid, &image.description, &mask).unwrap();
            assert!(bytes == std::fs::read(&path).unwrap(), "{name}");
            let again = Volume::of_file(bytes.clone(), None).unwrap();
            assert!(again.grid.affine.distance(&grid.affine, grid.size) < 1e-5, "{name}");
            let labels = Labels::of_file(bytes, &image).unwrap().joined();
            assert!(labels.iter().map(|v| *v as u8).eq(mask.iter().copied()), "{name}");
            let read = Volume::read(&path, None).unwrap();
            assert!(
                read.grid.size == grid.size
                    && read.grid.affine.distance(&grid.affine, grid.size) < 1e-5,
                "{name}: {:?}",
                read.grid
            );
            assert!(read.values().iter().map(|v| *v as u8).eq(mask.iter().copied()), "{name}");
            assert!(
                read.warnings.is_empty() && read.description.element == "uint8",
                "{name}: {:?}",
                read.warnings
            );
            let labels = Labels::beside(&path, &image).unwrap();
            assert_eq!(labels.is_named(), name.contains(".seg."));
            let target = if labels.is_named() {
                TargetLabel::Name("object".into())
            } else {
                TargetLabel::Any
            };
            assert!(labels.mask(&target).unwrap() == mask, "{name}");
            let written = write_probability(&path, &image, &map);
            match name.contains(".seg.") {
                true => assert!(written.err().unwrap().to_string().contains("NAME.nrrd")),
                false => {
                    written.unwrap().commit().unwrap();
                    assert!(Volume::read(&path, None).unwrap().values() == map, "{name}");
                }
            }
            assert!(write_mask(&path, &image, &mask[1..]).is_err());
        }
    }

    #[test]
    fn a_header_and_its_voxels_in_a_file_of_their_own_appear_together() {
        let folder = tempfile::tempdir().unwrap();
        let (grid, mask) = oblique();
        let values = (0..60).map(|v| v as f32).collect();
        let image = Volume::new(grid, values, Description::of_new(&grid, "float32")).unwrap();
        let at = |name: &str| folder.path().join(name);
        let (header, data) = (at("a b.c.MHD"), at("a b.c.zraw"));
        assert_eq!((data_file(&header), data_file(&at("a.mha"))), (Some(data.clone()), None));
        let pending = write_mask(&header, &image, &mask).unwrap();
        assert!(!header.exists() && !data.exists());
        pending.commit().unwrap();
        let text = std::fs::read_to_string(&header).unwrap();
        let length = std::fs::metadata(&data).unwrap().len();
        for line in [
            "ElementDataFile = a b.c.zraw\n".to_string(),
            format!("CompressedDataSize = {length}\n"),
        ] {
            assert!(text.contains(&line), "{text}");
        }
        let read = Volume::read(&header, None).unwrap();
        assert!(read.grid.affine.distance(&grid.affine, grid.size) < 1e-5);
        assert!(read.values().iter().map(|v| *v as u8).eq(mask.iter().copied()));
        assert!(read.warnings.is_empty() && read.description.element == "uint8");
        // In a single file they are the same bytes.
        let whole = mask_file(Path::new("a.mha"), &grid, &image.description, &mask).unwrap();
        let voxels = std::fs::read(&data).unwrap();
        assert!(whole.ends_with(&voxels));
        let error = mask_file(&header, &grid, &image.description, &mask).unwrap_err().to_string();
        assert!(error.contains("NAME.mha"), "{error}");
        // An uncommitted result changes neither file, and leaves no other.
        drop(write_probability(&header, &image, &[0.5; 60]).unwrap());
        assert!(std::fs::read(&data).unwrap() == voxels);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
        write_probability(&header, &image, &[0.5; 60]).unwrap().commit().unwrap();
        assert!(Volume::read(&header, None).unwrap().values() == [0.5; 60]);
        // The file of the voxels cannot be put in its place: then there is no header either.
        std::fs::create_dir(at("b.zraw")).unwrap();
        let error = write_mask(&at("b.mhd"), &image, &mask).err().unwrap().to_string();
        assert!(error.contains("b.zraw") && !at("b.mhd").exists(), "{error}");
        // The header cannot: the voxels, which were written first, are removed again.
        let pending = write_mask(&at("c.mhd"), &image, &mask).unwrap();
        std::fs::create_dir(at("c.mhd")).unwrap();
        assert!(pending.commit().is_err() && !at("c.zraw").exists());
        for name in ["100%.mhd", "LIST.mhd", " a.mhd", "a\n.mhd"] {
            let error = check_output(&at(name), Element::Uint8).unwrap_err().to_string();
            assert!(error.contains("cannot name the file"), "{error}");
        }
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(&header, at("l.mhd")).unwrap();
            let error = write_mask(&at("l.mhd"), &image, &mask).err().unwrap().to_string();
            assert!(error.contains("is a link") && !at("l.zraw").exists(), "{error}");
        }
    }

    #[test]
    fn a_map_that_is_told_where_it_is_not_0_is_the_same_file() {
        let folder = tempfile::tempdir().unwrap();
        // Blocks of a file end within its rows; most hold nothing, and the last is a short one.
        let grid = Grid { size: [130, 100, 70], affine: Affine::from_spacing([1.0, 0.5, 2.0]) };
        let [ni, nj, nk] = grid.size;
        let inside = |[i, j, k]: [usize; 3]| {
            (i < 5 && j > 90 && (38..44).contains(&k)) || [i, j, k] == [ni - 1, nj - 1, nk - 1]
        };
        let value = |[i, j, k]: [usize; 3]| if i == 3 { 0.0 } else { 1.0 / (1 + i + j + k) as f32 };
        let voxels: Vec<[usize; 3]> = (0..ni)
            .flat_map(|i| (0..nj).flat_map(move |j| (0..nk).map(move |k| [i, j, k])))
            .collect();
        let dense: Vec<f32> =
            voxels.iter().map(|v| if inside(*v) { value(*v) } else { 0.0 }).collect();
        assert!(4 * dense.len() > 3 * BLOCK && !(4 * dense.len()).is_multiple_of(BLOCK));
        let flat = (0..grid.voxels()).map(|v| v as f32).collect();
        let image = Volume::new(grid, flat, Description::of_new(&grid, "float32")).unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.mhd"] {
            let data = data_file(&at(name)).unwrap_or_else(|| at(name));
            write_probability(&at(name), &image, &dense).unwrap().commit().unwrap();
            let [header, expected] = [&at(name), &data].map(|path| std::fs::read(path).unwrap());
            let some = write_some_probability(&at(name), &image, |put| {
                voxels.iter().filter(|v| inside(**v)).for_each(|v| put(*v, value(*v)));
            });
            some.unwrap().commit().unwrap();
            assert!(std::fs::read(at(name)).unwrap() == header, "{name}");
            assert!(std::fs::read(&data).unwrap() == expected, "{name}");
            assert!(Volume::read(&at(name), None).unwrap().values() == dense, "{name}");
        }
        let none = write_some_probability(&at("b.seg.nrrd"), &image, |_| ());
        assert!(none.err().unwrap().to_string().contains("NAME.nrrd"));
    }

    /// The nifti crate's own writer makes the same bytes of an image, unpacked.
    #[test]
    fn files_are_those_that_the_nifti_crate_writes() {
        use ndarray::Array3;
        use nifti::writer::WriterOptions;
        let folder = tempfile::tempdir().unwrap();
        let (grid, _) = oblique();
        let mut description = Description::of_new(&grid, "float32");
        description.header.descrip = b"what it says of itself".to_vec();
        description.header.intent_name = *b"sixteen letters.";
        description.header.dim = [4, 9, 9, 9, 9, 9, 9, 9];
        (description.header.cal_max, description.header.slice_end, description.header.quatern_c) =
            (1.5, 7, 0.25);
        let values: Vec<f32> =
            (0..60).map(|v| if v % 7 == 0 { 0.0 } else { v as f32 / 8.0 }).collect();
        let theirs = folder.path().join("theirs.nii");
        let array = Array3::from_shape_vec(grid.size, values.clone()).unwrap();
        WriterOptions::new(&theirs)
            .reference_header(&description.header)
            .write_nifti(&array)
            .unwrap();
        let theirs = std::fs::read(theirs).unwrap();
        for name in ["ours.nii", "ours.nii.gz"] {
            let path = folder.path().join(name);
            write(&path, &grid, &description, Element::Float32, &values).unwrap().commit().unwrap();
            let mut ours = vec![];
            Input::open(&path).unwrap().read_to_end(&mut ours).unwrap();
            assert!(ours == theirs, "{name}");
        }
    }

    #[test]
    fn a_file_that_is_cut_short_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let (grid, values) = oblique();
        for name in ["a.nii", "a.nii.gz"] {
            let path = folder.path().join(name);
            write_mask_on(&path, &grid, &Description::of_new(&grid, "uint8"), &values)
                .unwrap()
                .commit()
                .unwrap();
            assert!(is_whole(&path, grid.size, 60).is_ok());
            assert!(
                is_whole(&path, grid.size, 61).is_err() && is_whole(&path, [5, 3, 4], 60).is_err()
            );
            let whole = std::fs::read(&path).unwrap();
            for cut in [0, 1, 20, whole.len() - 1] {
                std::fs::write(&path, &whole[..cut]).unwrap();
                assert!(is_whole(&path, grid.size, 60).is_err(), "{name} cut at {cut}");
            }
        }
    }
}
