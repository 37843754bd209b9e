//! DICOM: scans, and segmentations of them. The files are written by the crate `dicom-object`, with
//! which the reader shares nothing.
#![cfg(feature = "dicom")]

mod labels;
mod packed;
mod series;

use dicom_core::{DataElement, PrimitiveValue, VR};
use dicom_dictionary_std::{tags, uids};
use dicom_object::mem::InMemElement;
use dicom_object::{FileMetaTableBuilder, InMemDicomObject, Tag};
use prism::volume::{Affine, Volume};
use std::path::{Path, PathBuf};

/// Explicit VR, big endian: retired from the standard, and still in archives.
const EXPLICIT_VR_BIG_ENDIAN: &str = "1.2.840.10008.1.2.2";

const COLUMNS: usize = 4;
const ROWS: usize = 3;
const SLICES: usize = 4;

/// The stored value of a voxel.
fn value(i: usize, j: usize, k: usize) -> u16 {
    (300 * k + 10 * j + i) as u16
}

/// A slice's values as a file has them.
fn slice(k: usize) -> Vec<u16> {
    (0..ROWS * COLUMNS).map(|at| value(at % COLUMNS, at / COLUMNS, k)).collect()
}

fn text(tag: Tag, vr: VR, value: &str) -> InMemElement {
    DataElement::new(tag, vr, PrimitiveValue::from(value))
}

fn short(tag: Tag, value: u16) -> InMemElement {
    DataElement::new(tag, VR::US, PrimitiveValue::from(value))
}

fn words(values: Vec<u16>) -> InMemElement {
    DataElement::new(tags::PIXEL_DATA, VR::OW, PrimitiveValue::U16(values.into()))
}

fn items(tag: Tag, items: Vec<InMemDicomObject>) -> InMemElement {
    DataElement::new(tag, VR::SQ, dicom_core::value::DataSetSequence::from(items))
}

fn numbers(values: &[f64]) -> String {
    values.iter().map(|v| v.to_string()).collect::<Vec<_>>().join("\\")
}

/// What the files of a series say alike.
#[derive(Clone)]
struct Series {
    uid: &'static str,
    number: &'static str,
    description: &'static str,
    modality: &'static str,
    class: &'static str,
    syntax: &'static str,
    photometric: &'static str,
    orientation: [f64; 6],
    bits: u16,
}

impl Series {
    fn new(modality: &'static str) -> Series {
        Series {
            uid: "1.2.3.4",
            number: "2",
            description: "Thorax soft",
            modality,
            class: uids::CT_IMAGE_STORAGE,
            syntax: uids::EXPLICIT_VR_LITTLE_ENDIAN,
            photometric: "MONOCHROME2",
            orientation: [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
            bits: 12,
        }
    }

    /// A file without voxels, place and scale.
    fn bare(&self, instance: usize) -> InMemDicomObject {
        let mut file = InMemDicomObject::new_empty();
        file.put(text(tags::SOP_CLASS_UID, VR::UI, self.class));
        let uid = format!("{}.{}", self.uid, instance + 1);
        file.put(text(tags::SOP_INSTANCE_UID, VR::UI, &uid));
        file.put(text(tags::SERIES_INSTANCE_UID, VR::UI, self.uid));
        file.put(text(tags::SERIES_NUMBER, VR::IS, self.number));
        file.put(text(tags::SERIES_DESCRIPTION, VR::LO, self.description));
        file.put(text(tags::INSTANCE_NUMBER, VR::IS, &(instance + 1).to_string()));
        file.put(text(tags::MODALITY, VR::CS, self.modality));
        file.put(text(tags::PHOTOMETRIC_INTERPRETATION, VR::CS, self.photometric));
        file.put(short(tags::SAMPLES_PER_PIXEL, 1));
        file.put(short(tags::ROWS, ROWS as u16));
        file.put(short(tags::COLUMNS, COLUMNS as u16));
        file.put(short(tags::BITS_ALLOCATED, 16));
        file.put(short(tags::BITS_STORED, self.bits));
        file.put(short(tags::HIGH_BIT, self.bits - 1));
        file.put(short(tags::PIXEL_REPRESENTATION, 0));
        file
    }

    /// A file with one slice.
    fn file(&self, instance: usize, position: [f64; 3]) -> InMemDicomObject {
        let mut file = self.bare(instance);
        file.put(text(tags::IMAGE_POSITION_PATIENT, VR::DS, &numbers(&position)));
        file.put(text(tags::IMAGE_ORIENTATION_PATIENT, VR::DS, &numbers(&self.orientation)));
        file.put(text(tags::PIXEL_SPACING, VR::DS, "0.5\\0.75"));
        file
    }

    fn write(&self, file: InMemDicomObject, path: &Path) {
        let meta = FileMetaTableBuilder::new().transfer_syntax(self.syntax);
        file.with_meta(meta).unwrap().write_to_file(path).unwrap();
    }

    /// A series, slice `k` of which lies at `place(k)`, changed by `change`.
    fn folder(
        &self,
        slices: usize,
        place: impl Fn(usize) -> [f64; 3],
        change: impl Fn(usize, &mut InMemDicomObject),
    ) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for k in 0..slices {
            let mut file = self.file(k, place(k));
            file.put(words(slice(k)));
            change(k, &mut file);
            self.write(file, &at(folder.path(), k));
        }
        folder
    }
}

fn at(folder: &Path, k: usize) -> PathBuf {
    folder.join(format!("IM{k:04}"))
}

fn straight(k: usize) -> [f64; 3] {
    [10.0, 20.0, 2.5 * k as f64 - 100.0]
}

fn read(path: &Path) -> Volume {
    Volume::read(path, None).unwrap_or_else(|e| panic!("{e}"))
}

fn refused(path: &Path) -> String {
    Volume::read(path, None).unwrap_err().to_string()
}

/// Whether every voxel is what `of` says.
fn assert_voxels(volume: &Volume, of: impl Fn([usize; 3]) -> f32) {
    let [ni, nj, nk] = volume.grid.size;
    for at in (0..ni * nj * nk).map(|n| [n / (nj * nk), n / nk % nj, n % nk]) {
        assert_eq!(volume.at(at), of(at), "{at:?}");
    }
}

fn assert_affine(volume: &Volume, expected: [[f64; 4]; 3]) {
    let apart = volume.grid.affine.distance(&Affine(expected), volume.grid.size);
    assert!(apart < 1e-9, "{:?}", volume.grid.affine);
}

fn plain([i, j, k]: [usize; 3]) -> f32 {
    value(i, j, k).into()
}

const STRAIGHT: [[f64; 4]; 3] =
    [[-0.75, 0.0, 0.0, -10.0], [0.0, -0.5, 0.0, -20.0], [0.0, 0.0, 2.5, -100.0]];

/// The frames of an enhanced file, the last first.
fn enhanced(series: &Series) -> InMemDicomObject {
    let mut file = series.bare(0);
    let mut measures = InMemDicomObject::new_empty();
    measures.put(text(tags::PIXEL_SPACING, VR::DS, "0.5\\0.75"));
    measures.put(text(tags::SLICE_THICKNESS, VR::DS, "2.5"));
    let mut turned = InMemDicomObject::new_empty();
    turned.put(text(tags::IMAGE_ORIENTATION_PATIENT, VR::DS, &numbers(&series.orientation)));
    let mut shared = InMemDicomObject::new_empty();
    shared.put(items(tags::PIXEL_MEASURES_SEQUENCE, vec![measures]));
    shared.put(items(tags::PLANE_ORIENTATION_SEQUENCE, vec![turned]));
    file.put(items(tags::SHARED_FUNCTIONAL_GROUPS_SEQUENCE, vec![shared]));
    let mut frames = vec![];
    let mut voxels = vec![];
    for k in (0..SLICES).rev() {
        let mut place = InMemDicomObject::new_empty();
        place.put(text(tags::IMAGE_POSITION_PATIENT, VR::DS, &numbers(&straight(k))));
        let mut scale = InMemDicomObject::new_empty();
        scale.put(text(tags::RESCALE_SLOPE, VR::DS, "2"));
        scale.put(text(tags::RESCALE_INTERCEPT, VR::DS, "-1000"));
        let mut frame = InMemDicomObject::new_empty();
        frame.put(items(tags::PLANE_POSITION_SEQUENCE, vec![place]));
        frame.put(items(tags::PIXEL_VALUE_TRANSFORMATION_SEQUENCE, vec![scale]));
        frames.push(frame);
        voxels.extend(slice(k));
    }
    file.put(items(tags::PER_FRAME_FUNCTIONAL_GROUPS_SEQUENCE, frames));
    file.put(text(tags::NUMBER_OF_FRAMES, VR::IS, &SLICES.to_string()));
    file.put(words(voxels));
    file
}
