//! Label images of several objects: one value per object and, in a segmentation, its name and
//! colour.

use super::{File, ending};
#[cfg(feature = "dicom")]
use super::{Format, dicom};
use crate::memory;
use crate::output::Pending;
use crate::volume::nrrd::Structure;
use crate::volume::palette::{default_colour, parts_of_one};
use crate::volume::{Element, Volume, VolumeError};
use std::path::{Path, PathBuf};

/// How messages name the memory of a label image.
const LABELS: &str = "a label image";

/// An object of a label image.
#[derive(Clone, Debug, PartialEq)]
pub struct LabelledObject {
    /// The object's name, on one line.
    pub name: String,
    /// The red, green and blue that were chosen for it.
    pub colour: Option<[u8; 3]>,
}

/// The values of a label image `[i][j][k]`: 0 for nothing, from 1 on the number of an object.
#[derive(Clone, Debug, PartialEq)]
pub enum LabelValues {
    /// One byte per voxel: for up to 255 objects.
    Bytes(Vec<u8>),
    /// Two bytes per voxel: for up to 65,535.
    Words(Vec<u16>),
}

impl LabelValues {
    /// A label image of zeros, with elements large enough for the numbers of `objects` objects.
    pub fn nothing(voxels: usize, objects: usize) -> LabelValues {
        match objects <= u8::MAX as usize {
            true => LabelValues::Bytes(memory::zeroed(LABELS, voxels)),
            false => LabelValues::Words(memory::zeroed(LABELS, voxels)),
        }
    }

    /// Sets the object of a voxel, by its index in `[i][j][k]` order, and returns the one that it
    /// belonged to before; 0 for none.
    pub fn replace(&mut self, at: usize, object: u16) -> u16 {
        match self {
            LabelValues::Bytes(values) => std::mem::replace(&mut values[at], object as u8).into(),
            LabelValues::Words(values) => std::mem::replace(&mut values[at], object),
        }
    }

    /// Calls `visit(index, object)` for every voxel that belongs to an object.
    pub fn each(&self, mut visit: impl FnMut(usize, u16)) {
        let mut of = |at: usize, object: u16| {
            if object > 0 {
                visit(at, object);
            }
        };
        match self {
            LabelValues::Bytes(list) => {
                list.iter().enumerate().for_each(|(at, v)| of(at, u16::from(*v)))
            }
            LabelValues::Words(list) => list.iter().enumerate().for_each(|(at, v)| of(at, *v)),
        }
    }
}

/// Writes a label image of several objects on `image`'s grid.
///
/// The voxels of object n have the value n; its name and colour, at n - 1 in `objects`, are in the
/// file if it is a `.seg.nrrd` or `.dcm`. It appears when the result is committed.
///
/// # Errors
/// As [`write_mask`](crate::volume::write_mask); or a name holds control characters.
pub fn write_labels(
    path: &Path,
    image: &Volume,
    labels: &LabelValues,
    objects: &[LabelledObject],
) -> Result<Pending, VolumeError> {
    let structures = structures(path, objects)?;
    #[cfg(feature = "dicom")]
    if let Some(file) = of_dicom(path, image, labels, &structures)? {
        return file.write(path);
    }
    let (grid, description) = (&image.grid, &image.description);
    match labels {
        LabelValues::Bytes(v) => {
            File::of(path, grid, description, Element::Uint8, v, &structures)?.write(path)
        }
        LabelValues::Words(v) => {
            File::of(path, grid, description, Element::Uint16, v, &structures)?.write(path)
        }
    }
}

/// The bytes of the file that [`write_labels`] writes under such a name.
///
/// # Errors
/// As [`write_labels`], except for those of the disk.
pub fn labels_file(
    name: &Path,
    image: &Volume,
    labels: &LabelValues,
    objects: &[LabelledObject],
) -> Result<Vec<u8>, VolumeError> {
    let structures = structures(name, objects)?;
    #[cfg(feature = "dicom")]
    if let Some(file) = of_dicom(name, image, labels, &structures)? {
        return file.bytes(name);
    }
    let (grid, description) = (&image.grid, &image.description);
    match labels {
        LabelValues::Bytes(v) => {
            File::of(name, grid, description, Element::Uint8, v, &structures)?.bytes(name)
        }
        LabelValues::Words(v) => {
            File::of(name, grid, description, Element::Uint16, v, &structures)?.bytes(name)
        }
    }
}

fn structures<'a>(
    path: &Path,
    objects: &'a [LabelledObject],
) -> Result<Vec<Structure<'a>>, VolumeError> {
    if let Some(object) = objects.iter().find(|o| o.name.chars().any(char::is_control)) {
        let text = format!("an object is called {:?}: expected one line", object.name);
        return Err(VolumeError::new(path, text));
    }
    let structure = |(at, object): (usize, &'a LabelledObject)| Structure {
        id: format!("object{}", at + 1),
        name: &object.name,
        value: at + 1,
        colour: parts_of_one(object.colour.unwrap_or_else(|| default_colour(at))),
        chosen: object.colour.is_some(),
    };
    Ok(objects.iter().enumerate().map(structure).collect())
}

/// The file of a DICOM segmentation, if the name stands for one: one segment per object.
#[cfg(feature = "dicom")]
fn of_dicom<'a>(
    path: &Path,
    image: &'a Volume,
    labels: &LabelValues,
    structures: &[Structure],
) -> Result<Option<File<'a, u8>>, VolumeError> {
    if !matches!(ending(path), Some((_, Format::Dicom))) {
        return Ok(None);
    }
    let marks = |value: usize| match labels {
        LabelValues::Bytes(v) => dicom::SegmentVoxels::Bytes(v, value as u8),
        LabelValues::Words(v) => dicom::SegmentVoxels::Words(v, value as u16),
    };
    let segments: Vec<_> = structures.iter().map(|s| s.marked(marks(s.value))).collect();
    let (grid, description) = (&image.grid, &image.description);
    File::of_dicom(path, grid, description, dicom::Kind::Binary, &segments).map(Some)
}

/// The name of the file of object `number`, if each has its own: `p.nii.gz` becomes `p-2.nii.gz`.
pub fn numbered(path: &Path, number: usize) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let known = ending(path).map(|(ending, _)| ending.len());
    let length = known.or_else(|| Some(name.len() - name.rfind('.')?)).unwrap_or(0);
    let at = name.len().checked_sub(length).filter(|at| name.is_char_boundary(*at));
    let (stem, ending) = name.split_at(at.unwrap_or(name.len()));
    path.with_file_name(format!("{stem}-{number}{ending}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::labels::{Labels, TargetLabel};
    use crate::volume::{Affine, Description, Grid};

    /// A grid whose axes can be distinguished.
    fn scan() -> Volume {
        let affine =
            Affine([[0.5, 0.1, 0.0, -7.25], [0.05, -2.0, 0.0, 9.0], [0.0, 0.25, 3.0, 1.5]]);
        let grid = Grid { size: [5, 4, 3], affine };
        let values = (0..60).map(|v| v as f32).collect();
        Volume::new(grid, values, Description::of_new(&grid, "float32")).unwrap()
    }

    /// `count` objects of one voxel each, the last at the last voxel.
    fn objects(count: usize) -> (LabelValues, Vec<LabelledObject>) {
        let mut labels = LabelValues::nothing(60, count);
        let voxel = |n: usize| if n == count { 59 } else { n % 59 };
        for n in (1..=count).rev() {
            labels.replace(voxel(n), n as u16);
        }
        let object = |n: usize| LabelledObject {
            name: format!("lesion {n}: äußere"),
            colour: (n == 2).then_some([0, 128, 255]),
        };
        (labels, (1..=count).map(object).collect())
    }

    #[test]
    fn every_format_holds_a_value_an_object_and_a_segmentation_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let image = scan();
        for (count, element) in [(3, "uint8"), (255, "uint8"), (300, "uint16")] {
            let (labels, named) = objects(count);
            let mut expected = [0u32; 60];
            labels.each(|at, object| expected[at] = object.into());
            assert_eq!(expected[59] as usize, count);
            for name in ["a.nii", "a.nii.gz", "a.nrrd", "a.seg.nrrd", "a.mha"] {
                let path = folder.path().join(name);
                write_labels(&path, &image, &labels, &named).unwrap().commit().unwrap();
                let bytes = labels_file(Path::new(name), &image, &labels, &named).unwrap();
                assert!(bytes == std::fs::read(&path).unwrap(), "{name}, {count} objects");
                assert_eq!(Volume::read(&path, None).unwrap().description.element, element);
                let read = Labels::beside(&path, &image).unwrap();
                assert!(read.joined() == expected, "{name}, {count} objects");
                if name != "a.seg.nrrd" {
                    continue;
                }
                for (n, object) in named.iter().enumerate() {
                    let mask = read.mask(&TargetLabel::Name(object.name.clone())).unwrap();
                    let own = |at: usize| u8::from(expected[at] as usize == n + 1);
                    assert!((0..60).all(|at| mask[at] == own(at)), "{}", object.name);
                }
                let bytes = std::fs::read(&path).unwrap();
                let header = String::from_utf8_lossy(&bytes).into_owned();
                for line in [
                    "Segment1_Color:=0 0.5019607843137255 1\nSegment1_ColorAutoGenerated:=0\n",
                    "Segment1_ID:=object2\nSegment1_LabelValue:=2\nSegment1_Layer:=0\n",
                    "Segment2_ColorAutoGenerated:=1\n",
                ] {
                    assert!(header.contains(line), "{line}");
                }
            }
        }
        let (labels, mut named) = objects(2);
        named[1].name = "two\nlines".into();
        let path = folder.path().join("b.seg.nrrd");
        let error = write_labels(&path, &image, &labels, &named).err().unwrap().to_string();
        assert!(error.contains("two\\nlines") && !path.exists(), "{error}");
    }

    #[test]
    fn a_voxel_tells_whose_it_was() {
        let mut labels = LabelValues::nothing(2, 256);
        assert_eq!((labels.replace(1, 256), labels.replace(1, 3)), (0, 256));
        assert_eq!(labels, LabelValues::Words(vec![0, 3]));
        assert_eq!(LabelValues::nothing(1, 255), LabelValues::Bytes(vec![0]));
    }

    #[test]
    fn files_of_one_object_each_are_numbered_in_front_of_their_ending() {
        for (name, expected) in [
            ("/a/p.nii.gz", "/a/p-2.nii.gz"),
            ("p.NII.GZ", "p-2.NII.GZ"),
            ("p.v1.mha", "p.v1-2.mha"),
            ("p.q.png", "p.q-2.png"),
            ("p", "p-2"),
        ] {
            assert_eq!(numbered(Path::new(name), 2), Path::new(expected));
        }
    }
}
