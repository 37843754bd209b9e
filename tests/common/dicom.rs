//! Series of DICOM, written by the crate `dicom-object`, with which the reader has no code in
//! common.
#![allow(dead_code)]

use dicom_core::{DataElement, PrimitiveValue, VR};
use dicom_dictionary_std::{tags, uids};
use dicom_object::mem::InMemElement;
use dicom_object::{FileMetaTableBuilder, InMemDicomObject, Tag};
use std::path::{Path, PathBuf};

/// Explicit VR, big endian: retired from the standard, and still in archives.
pub const EXPLICIT_VR_BIG_ENDIAN: &str = "1.2.840.10008.1.2.2";

pub const COLUMNS: usize = 4;
pub const ROWS: usize = 3;
pub const SLICES: usize = 4;

/// The stored value of a voxel.
pub fn value(i: usize, j: usize, k: usize) -> u16 {
    (300 * k + 10 * j + i) as u16
}

/// A slice's values as a file stores them.
pub fn slice(k: usize) -> Vec<u16> {
    (0..ROWS * COLUMNS).map(|at| value(at % COLUMNS, at / COLUMNS, k)).collect()
}

pub fn text(tag: Tag, vr: VR, value: &str) -> InMemElement {
    DataElement::new(tag, vr, PrimitiveValue::from(value))
}

pub fn short(tag: Tag, value: u16) -> InMemElement {
    DataElement::new(tag, VR::US, PrimitiveValue::from(value))
}

pub fn words(values: Vec<u16>) -> InMemElement {
    DataElement::new(tags::PIXEL_DATA, VR::OW, PrimitiveValue::U16(values.into()))
}

pub fn items(tag: Tag, items: Vec<InMemDicomObject>) -> InMemElement {
    DataElement::new(tag, VR::SQ, dicom_core::value::DataSetSequence::from(items))
}

pub fn numbers(values: &[f64]) -> String {
    values.iter().map(|v| v.to_string()).collect::<Vec<_>>().join("\\")
}

/// What all files of a series have in common.
#[derive(Clone)]
pub struct Series {
    pub uid: &'static str,
    pub number: &'static str,
    pub description: &'static str,
    pub modality: &'static str,
    pub class: &'static str,
    pub syntax: &'static str,
    pub photometric: &'static str,
    pub orientation: [f64; 6],
    pub bits: u16,
}

impl Series {
    pub fn new(modality: &'static str) -> Series {
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
    pub fn bare(&self, instance: usize) -> InMemDicomObject {
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
    pub fn file(&self, instance: usize, position: [f64; 3]) -> InMemDicomObject {
        let mut file = self.bare(instance);
        file.put(text(tags::IMAGE_POSITION_PATIENT, VR::DS, &numbers(&position)));
        file.put(text(tags::IMAGE_ORIENTATION_PATIENT, VR::DS, &numbers(&self.orientation)));
        file.put(text(tags::PIXEL_SPACING, VR::DS, "0.5\\0.75"));
        file
    }

    pub fn write(&self, file: InMemDicomObject, path: &Path) {
        let meta = FileMetaTableBuilder::new().transfer_syntax(self.syntax);
        file.with_meta(meta).unwrap().write_to_file(path).unwrap();
    }

    /// A series, slice `k` of which is at `place(k)`, changed by `change`.
    pub fn folder(
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

pub fn at(folder: &Path, k: usize) -> PathBuf {
    folder.join(format!("IM{k:04}"))
}

pub fn straight(k: usize) -> [f64; 3] {
    [10.0, 20.0, 2.5 * k as f64 - 100.0]
}

/// A zip archive of files, stored.
pub fn zipped(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let (mut out, mut directory): (Vec<u8>, Vec<u8>) = (vec![], vec![]);
    for (name, bytes) in files {
        let mut crc = flate2::Crc::new();
        crc.update(bytes);
        let mut fields: Vec<u8> = vec![20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0];
        fields.extend(crc.sum().to_le_bytes());
        fields.extend((bytes.len() as u32).to_le_bytes());
        fields.extend((bytes.len() as u32).to_le_bytes());
        fields.extend((name.len() as u16).to_le_bytes());
        fields.extend([0, 0]);
        let offset = out.len() as u32;
        out.extend([&b"PK\x03\x04"[..], &fields[..], name.as_bytes(), &bytes[..]].concat());
        directory.extend([&b"PK\x01\x02\x14\x00"[..], &fields[..], &[0; 10][..]].concat());
        directory.extend(offset.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let (start, count) = (out.len() as u32, files.len() as u16);
    out.extend(&directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend(count.to_le_bytes());
    out.extend(count.to_le_bytes());
    out.extend((directory.len() as u32).to_le_bytes());
    out.extend(start.to_le_bytes());
    out.extend([0, 0]);
    out
}

/// Adds the patient and study of the scan.
pub fn identified(file: &mut InMemDicomObject) {
    for (tag, vr, value) in [
        (tags::SPECIFIC_CHARACTER_SET, VR::CS, "ISO_IR 100"),
        (tags::STUDY_DATE, VR::DA, "20240305"),
        (tags::STUDY_TIME, VR::TM, "093000"),
        (tags::ACCESSION_NUMBER, VR::SH, "A7"),
        (tags::MANUFACTURER, VR::LO, "Scanners Ltd"),
        (tags::MANUFACTURER_MODEL_NAME, VR::LO, "Ring 3"),
        (tags::PATIENT_NAME, VR::PN, "Sample^Anna"),
        (tags::PATIENT_ID, VR::LO, "P-17"),
        (tags::PATIENT_BIRTH_DATE, VR::DA, "19600102"),
        (tags::PATIENT_SEX, VR::CS, "F"),
        (tags::STUDY_INSTANCE_UID, VR::UI, "1.2.3.1"),
        (tags::STUDY_ID, VR::SH, "S1"),
        (tags::FRAME_OF_REFERENCE_UID, VR::UI, "1.2.3.2"),
    ] {
        file.put(text(tag, vr, value));
    }
}
