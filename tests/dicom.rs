//! DICOM series: whatever the order and the slant of their slices, voxels and affine are what the
//! files say; what cannot be one volume is an error, what is odd a warning. The files are written
//! by the crate `dicom-object`, with which the reader shares nothing.
#![cfg(feature = "dicom")]

mod common;

use dicom_core::{DataElement, PrimitiveValue, VR};
use dicom_dictionary_std::{tags, uids};
use dicom_object::mem::InMemElement;
use dicom_object::{FileMetaTableBuilder, InMemDicomObject, Tag};
use prism::model::{Weights, weights::Precision};
use prism::volume::dicom::list;
use prism::volume::labels::{Labels, TargetLabel};
use prism::volume::{Affine, Element, Modality, Volume, write_mask, write_probability};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

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

#[test]
fn slices_are_placed_by_their_positions_in_either_order_of_files() {
    let series = Series::new("CT");
    let up = read(series.folder(SLICES, straight, |_, _| ()).path());
    assert_eq!(up.grid.size, [COLUMNS, ROWS, SLICES]);
    assert_voxels(&up, plain);
    assert_affine(&up, STRAIGHT);
    assert_eq!(up.description.modality, Some(Modality::Ct));
    assert_eq!((up.array().element(), up.warnings.len()), (Element::Uint16, 0));
    // The first file lies on top: the same place, its values now the last.
    let down = read(series.folder(SLICES, |k| straight(SLICES - 1 - k), |_, _| ()).path());
    assert_voxels(&down, |[i, j, k]| value(i, j, SLICES - 1 - k).into());
    assert_affine(&down, STRAIGHT);
}

#[test]
fn oblique_slices_lie_where_they_say() {
    let (s, c) = 0.3f64.sin_cos();
    let series = Series { orientation: [c, s, 0.0, 0.0, 0.0, -1.0], ..Series::new("MR") };
    // Rows along x turned by 0.3, columns downwards: the normal is their cross product.
    let normal = [-s, c, 0.0];
    let folder = series.folder(SLICES, |k| normal.map(|n| 3.0 * n * k as f64), |_, _| ());
    let volume = read(folder.path());
    assert_voxels(&volume, plain);
    let rows =
        [[-0.75 * c, 0.0, 3.0 * s, 0.0], [-0.75 * s, 0.0, -3.0 * c, 0.0], [0.0, -0.5, 0.0, 0.0]];
    assert_affine(&volume, rows);
    assert_eq!((volume.warnings.len(), volume.description.modality), (0, Some(Modality::Mr)));
}

#[test]
fn a_tilted_gantry_is_a_sheared_affine_and_a_warning() {
    let tilted = |k: usize| [0.0, 0.5 * k as f64, 2.0 * k as f64];
    let volume = read(Series::new("CT").folder(SLICES, tilted, |_, _| ()).path());
    assert_voxels(&volume, plain);
    assert_affine(&volume, [[-0.75, 0.0, 0.0, 0.0], [0.0, -0.5, -0.5, 0.0], [0.0, 0.0, 2.0, 0.0]]);
    assert!(volume.warnings[0].contains("14.0 degrees"), "{:?}", volume.warnings);
}

#[test]
fn copies_are_left_out_gaps_are_errors_and_uneven_steps_warnings() {
    let series = Series::new("CT");
    let folder = series.folder(SLICES, straight, |_, _| ());
    std::fs::copy(at(folder.path(), 1), folder.path().join("copy.dcm")).unwrap();
    let volume = read(folder.path());
    assert_voxels(&volume, plain);
    assert!(volume.warnings[0].contains("1 files are there twice"), "{:?}", volume.warnings);

    let folder = series.folder(6, |k| straight(if k < 3 { k } else { k + 1 }), |_, _| ());
    let error = refused(folder.path());
    assert!(error.starts_with(at(folder.path(), 3).to_str().unwrap()), "{error}");
    assert!(error.contains("a slice is missing: it lies 5 mm behind"), "{error}");

    let uneven = |k: usize| [0.0, 0.0, [0.0, 2.0, 4.3, 6.0][k]];
    let volume = read(series.folder(SLICES, uneven, |_, _| ()).path());
    assert_voxels(&volume, plain);
    assert!(volume.warnings[0].contains("unevenly spaced, 1.7 mm to 2.3 mm"));
}

#[test]
fn whole_scales_keep_integers_and_others_do_not() {
    let rescaled = |slope: &'static str, intercept: &'static str| {
        move |_: usize, file: &mut InMemDicomObject| {
            file.put(text(tags::RESCALE_SLOPE, VR::DS, slope));
            file.put(text(tags::RESCALE_INTERCEPT, VR::DS, intercept));
        }
    };
    let series = Series::new("CT");
    let volume = read(series.folder(SLICES, straight, rescaled("1", "-1024")).path());
    assert_voxels(&volume, |v| plain(v) - 1024.0);
    assert!(volume.description.whole);
    let volume = read(series.folder(SLICES, straight, rescaled("0.5", "3")).path());
    assert_voxels(&volume, |v| 0.5 * plain(v) + 3.0);
    assert!(!volume.description.whole);
    // A scale for each slice.
    let folder = series.folder(SLICES, straight, |k, file| {
        file.put(text(tags::RESCALE_SLOPE, VR::DS, &(k + 1).to_string()));
        file.put(text(tags::RESCALE_INTERCEPT, VR::DS, "-2"));
    });
    let volume = read(folder.path());
    assert_voxels(&volume, |v| (v[2] + 1) as f32 * plain(v) - 2.0);
    assert_eq!(volume.array().element(), Element::Float32);
}

#[test]
fn bits_that_are_not_stored_do_not_count_and_signs_do() {
    let series = Series::new("CT");
    let folder = series.folder(SLICES, straight, |k, file| {
        file.put(short(tags::PIXEL_REPRESENTATION, 1));
        file.put(words(slice(k).iter().map(|v| (0xf000 | (v ^ 0x0fff)) & !0x8000).collect()));
    });
    let volume = read(folder.path());
    // The complement of a number of twelve bits is the number below its negative.
    assert_voxels(&volume, |v| -plain(v) - 1.0);
    assert_eq!(volume.array().element(), Element::Int16);
}

#[test]
fn inverted_pictures_are_mirrored_where_values_have_no_unit() {
    let mr = Series { photometric: "MONOCHROME1", ..Series::new("MR") };
    let volume = read(mr.folder(SLICES, straight, |_, _| ()).path());
    assert_voxels(&volume, |v| 4095.0 - plain(v));
    assert!(volume.warnings[0].contains("mirrored"), "{:?}", volume.warnings);
    let ct = Series { photometric: "MONOCHROME1", ..Series::new("CT") };
    let volume = read(ct.folder(SLICES, straight, |_, _| ()).path());
    assert_voxels(&volume, plain);
    assert!(volume.warnings[0].contains("changes no value"), "{:?}", volume.warnings);
}

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

#[test]
fn frames_of_an_enhanced_file_are_slices() {
    for syntax in
        [uids::EXPLICIT_VR_LITTLE_ENDIAN, uids::IMPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN]
    {
        let series = Series { class: uids::ENHANCED_CT_IMAGE_STORAGE, syntax, ..Series::new("CT") };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("enhanced.dcm");
        series.write(enhanced(&series), &path);
        for named in [path.as_path(), folder.path()] {
            let volume = read(named);
            assert_voxels(&volume, |v| 2.0 * plain(v) - 1000.0);
            assert_affine(&volume, STRAIGHT);
            assert!(volume.description.whole && volume.warnings.is_empty());
        }
        let mut file = enhanced(&series);
        file.put(text(tags::NUMBER_OF_FRAMES, VR::IS, "7"));
        series.write(file, &path);
        let error = refused(&path);
        assert!(error.contains("has 4 items, expected one for each of its 7 frames"), "{error}");
    }
}

/// A grey JPEG of 16 bits, lossless, each value told by the one before it (ISO 10918-1, annex H).
fn lossless(values: &[u16]) -> Vec<u8> {
    let mut out = vec![0xff, 0xd8, 0xff, 0xc3, 0, 11, 16, 0, ROWS as u8, 0, COLUMNS as u8];
    out.extend([1, 1, 0x11, 0]);
    // Seventeen categories of five bits each.
    out.extend([0xff, 0xc4, 0, 36, 0, 0, 0, 0, 0, 17]);
    out.extend([0; 11]);
    out.extend(0..17u8);
    out.extend([0xff, 0xda, 0, 8, 1, 1, 0, 1, 0, 0]);
    let mut bits: Vec<u8> = vec![];
    let mut put = |v: u32, n: u32| bits.extend((0..n).rev().map(|at| (v >> at & 1) as u8));
    for (at, v) in values.iter().enumerate() {
        let before = match (at % COLUMNS, at / COLUMNS) {
            (0, 0) => 1 << 15,
            (0, _) => values[at - COLUMNS],
            _ => values[at - 1],
        };
        let difference = i32::from(v.wrapping_sub(before) as i16);
        let category = 32 - difference.unsigned_abs().leading_zeros();
        put(category, 5);
        let low = if difference < 0 { difference - 1 } else { difference };
        if category < 16 {
            put(low as u32 & ((1 << category) - 1), category);
        }
    }
    for byte in bits.chunks(8) {
        let whole = (0..8).fold(0, |b, at| b << 1 | byte.get(at).copied().unwrap_or(1));
        out.push(whole);
        if whole == 0xff {
            out.push(0);
        }
    }
    out.extend([0xff, 0xd9]);
    if out.len() % 2 == 1 {
        out.push(0);
    }
    out
}

/// A slice packed by run lengths, in which nothing is repeated.
fn run_lengths(values: &[u16]) -> Vec<u8> {
    let mut out = vec![0u8; 64];
    let segment = (1 + values.len() as u32).next_multiple_of(2);
    for (at, number) in [2, 64, 64 + segment].into_iter().enumerate() {
        out[4 * at..4 * at + 4].copy_from_slice(&u32::to_le_bytes(number));
    }
    for shift in [8, 0] {
        let start = out.len();
        out.push(values.len() as u8 - 1);
        out.extend(values.iter().map(|v| (v >> shift) as u8));
        out.resize(start + segment as usize, 128);
    }
    out
}

#[test]
fn packed_slices_are_unpacked() {
    let pack = |of: fn(&[u16]) -> Vec<u8>| {
        move |k: usize, file: &mut InMemDicomObject| {
            let fragments: Vec<Vec<u8>> = vec![of(&slice(k))];
            let value = dicom_core::value::PixelFragmentSequence::new_fragments(fragments);
            file.put(DataElement::new(tags::PIXEL_DATA, VR::OB, value));
        }
    };
    for (syntax, of) in [
        (uids::RLE_LOSSLESS, run_lengths as fn(&[u16]) -> Vec<u8>),
        (uids::JPEG_LOSSLESS_SV1, lossless as fn(&[u16]) -> Vec<u8>),
    ] {
        let series = Series { syntax, bits: 16, ..Series::new("CT") };
        let folder = series.folder(SLICES, straight, pack(of));
        let volume = read(folder.path());
        assert_voxels(&volume, plain);
        assert_affine(&volume, STRAIGHT);
    }
    let series = Series { syntax: "1.2.840.10008.1.2.4.201", ..Series::new("CT") };
    let error = refused(series.folder(1, straight, pack(run_lengths)).path());
    let words = ["packed by high-throughput JPEG 2000", "gdcmconv"];
    assert!(words.iter().all(|w| error.contains(w)), "{error}");
}

const JPEG_LS: &str = "1.2.840.10008.1.2.4.80";
const JPEG_LS_LOSSY: &str = "1.2.840.10008.1.2.4.81";
const JPEG_2000: &str = "1.2.840.10008.1.2.4.90";

/// A file of `tests/data/dicom`, which other programs have written.
fn foreign(name: &str) -> Vec<u8> {
    std::fs::read(common::here("tests/data/dicom").join(name)).unwrap()
}

/// A folder with a slice of `[columns, rows]` values that is packed in two fragments. Its values
/// have a sign where `signed` is 1.
fn of_fragment(
    syntax: &'static str,
    [columns, rows]: [u16; 2],
    [bits, signed]: [u16; 2],
    packed: &[u8],
) -> tempfile::TempDir {
    let series = Series { syntax, bits, ..Series::new("CT") };
    series.folder(1, straight, |_, file| {
        file.put(short(tags::ROWS, rows));
        file.put(short(tags::COLUMNS, columns));
        file.put(short(tags::PIXEL_REPRESENTATION, signed));
        let mut padded = packed.to_vec();
        padded.resize(packed.len().next_multiple_of(2), 0);
        // A fragment has an even length.
        let (first, second) = padded.split_at(padded.len() / 4 * 2);
        let value = dicom_core::value::PixelFragmentSequence::new_fragments(vec![
            first.to_vec(),
            second.to_vec(),
        ]);
        file.put(DataElement::new(tags::PIXEL_DATA, VR::OB, value));
    })
}

#[test]
fn noise_that_is_packed_as_jpeg_2000_or_jpeg_ls_comes_back_exactly() {
    let size = [37, 33];
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) as u16
    };
    let noise: Vec<u16> = (0..37 * 33).map(|_| next()).collect();
    let whole: fn(u16) -> f32 = |v| f32::from(v);
    let with_sign: fn(u16) -> f32 = |v| f32::from(v as i16);
    let of_12_bits: fn(u16) -> f32 = |v| f32::from(v >> 4);
    // Where the file alone says that there is a sign, the highest bit is it.
    for (syntax, name, kind, of) in [
        (JPEG_2000, "noise-u16.j2k", [16, 0], whole),
        (JPEG_2000, "noise-i16.j2k", [16, 1], with_sign),
        (JPEG_2000, "noise-u16.j2k", [16, 1], with_sign),
        (JPEG_LS, "noise-u16.jls", [16, 0], whole),
        (JPEG_LS, "noise-u16.jls", [16, 1], with_sign),
        (JPEG_LS, "noise-u12.jls", [12, 0], of_12_bits),
    ] {
        let packed = foreign(name);
        let volume = read(of_fragment(syntax, size, kind, &packed).path());
        for (at, v) in noise.iter().enumerate() {
            assert_eq!(volume.at([at % 37, at / 37, 0]), of(*v), "{name} {kind:?}, value {at}");
        }
        let kinds = [Element::Uint16, Element::Int16];
        assert_eq!(volume.array().element(), kinds[usize::from(kind[1])]);
        // What is cut short, or of another size, is no slice.
        for end in (packed.len() / 2..packed.len() - 2).step_by(packed.len() / 9) {
            let error = refused(of_fragment(syntax, size, kind, &packed[..end]).path());
            assert!(error.contains("JPEG"), "{name} cut at {end}: {error}");
        }
        let error = refused(of_fragment(syntax, [33, 37], kind, &packed).path());
        assert!(error.contains("JPEG"), "{name}: {error}");
    }
}

#[test]
fn slices_that_other_programs_packed_as_jpeg_2000_or_jpeg_ls_are_read() {
    let alone = |name: &str| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(name), foreign(name)).unwrap();
        read(folder.path())
    };
    let plain = alone("mr.dcm");
    assert_eq!((plain.grid.size, plain.range()), ([64, 64, 1], [127.0, 2145.0]));
    for name in ["mr-jpeg-2000.dcm", "mr-jpeg-ls.dcm"] {
        let volume = alone(name);
        assert!(volume.grid == plain.grid && volume.values() == plain.values(), "{name}");
        assert_eq!(volume.array().element(), Element::Int16);
    }
    // With losses and a sign: as OpenJPEG decodes it, but for how it rounds.
    let ct = alone("ct-jpeg-2000-lossy.dcm");
    let row = [649.0, 644.0, 640.0, 635.0, 631.0, 627.0, 623.0, 642.0, 661.0, 680.0];
    for (n, stored) in row.into_iter().enumerate() {
        let got = ct.at([250 + n, 100, 0]);
        assert!((got - (stored - 1024.0)).abs() <= 1.0, "{n}: {got}");
    }
    let [low, high] = ct.range();
    assert!((low + 3995.0).abs() <= 2.0 && (high - 1812.0).abs() <= 2.0, "{low} to {high}");
    let mean = ct.values().iter().map(|v| f64::from(*v)).sum::<f64>() / (512.0 * 512.0);
    assert!((mean + 1032.323).abs() < 0.05, "{mean}");
    // Nearly without: ten steps of five rows, of values that were moved by two at most.
    let bytes = foreign("near-jpeg-ls.dcm");
    let start = bytes.windows(2).position(|w| w == [0xff, 0xd8]).unwrap();
    let end = bytes.windows(2).rposition(|w| w == [0xff, 0xd9]).unwrap() + 2;
    let near = of_fragment(JPEG_LS_LOSSY, [10, 50], [16, 0], &bytes[start..end]);
    let steps = [65535.0, 32765.0, 16385.0, 4095.0, 1025.0, 255.0, 65.0, 15.0, 5.0, 0.0];
    assert_voxels(&read(near.path()), |[_, j, _]| steps[j / 5]);
}

#[test]
fn every_way_of_writing_tags_gives_the_same_voxels() {
    for syntax in [uids::IMPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN] {
        let series = Series { syntax, ..Series::new("CT") };
        let volume = read(series.folder(SLICES, straight, |_, _| ()).path());
        assert_voxels(&volume, plain);
        assert_affine(&volume, STRAIGHT);
    }
}

#[test]
fn of_several_series_one_is_picked_and_all_are_listed() {
    let first = Series::new("CT");
    let folder = first.folder(SLICES, straight, |_, _| ());
    let second = Series { uid: "1.2.9", number: "5", description: "Lung", ..first.clone() };
    let below = folder.path().join("below");
    std::fs::create_dir(&below).unwrap();
    for k in 0..3 {
        let mut file = second.file(k, straight(k));
        file.put(words(slice(k)));
        second.write(file, &at(&below, k));
    }
    std::fs::write(folder.path().join("notes.txt"), "no image").unwrap();
    let error = refused(folder.path());
    for words in ["2 series", "--series", "1.2.3.4", "'Lung'", "4 x 3 x 3", "0.750 x 0.500 x 2.500"]
    {
        assert!(error.contains(words), "{words}: {error}");
    }
    for (asked, slices) in [("5", 3), ("1.2.9", 3), ("LUNG", 3), ("soft", 4), ("1.2.3.4", 4)] {
        let volume = Volume::read_series(folder.path(), Some(asked), None).unwrap();
        assert_eq!(volume.grid.size[2], slices, "{asked}");
    }
    let error = Volume::read_series(folder.path(), Some("7"), None).unwrap_err().to_string();
    assert!(error.contains("no series '7'") && error.contains("Thorax soft"), "{error}");

    // One file stands for its series.
    let volume = read(&at(folder.path(), 2));
    assert_voxels(&volume, plain);
    assert!(volume.warnings[0].contains("its 4 slices"), "{:?}", volume.warnings);

    let (series, warnings) = list(folder.path()).unwrap();
    let told: Vec<_> = series.iter().map(|s| (s.number.as_str(), s.size[2])).collect();
    assert_eq!((told, warnings.len()), (vec![("2", 4), ("5", 3)], 0));
    let out = Command::new(env!("CARGO_BIN_EXE_prism")).arg("info").arg(folder.path()).output();
    let out = String::from_utf8(out.unwrap().stdout).unwrap();
    assert!(out.contains("'Thorax soft'") && out.contains("'Lung'"), "{out}");
}

#[test]
fn localizers_beside_a_scan_are_left_out_and_parts_are_told_apart() {
    let series = Series::new("CT");
    let folder = series.folder(SLICES, straight, |_, _| ());
    // A slice of another orientation in the same series.
    let turned = Series { orientation: [0.0, 1.0, 0.0, 0.0, 0.0, -1.0], ..series.clone() };
    let mut file = turned.file(9, [0.0; 3]);
    file.put(words(slice(0)));
    turned.write(file, &at(folder.path(), 9));
    let volume = read(folder.path());
    assert_voxels(&volume, plain);
    assert!(volume.warnings[0].contains("1 other parts"), "{:?}", volume.warnings);
    let one = Volume::read_series(folder.path(), Some("2.2"), None).unwrap();
    assert_eq!(one.grid.size, [COLUMNS, ROWS, 1]);
    // A scout view in a series of its own.
    let scout = Series { uid: "1.2.8", number: "1", ..turned };
    let mut file = scout.file(0, [0.0; 3]);
    file.put(text(tags::IMAGE_TYPE, VR::CS, "ORIGINAL\\PRIMARY\\LOCALIZER"));
    file.put(words(slice(0)));
    scout.write(file, &at(folder.path(), 10));
    assert_voxels(&read(folder.path()), plain);
    // And a page of a report, which lies nowhere.
    let page = Series { uid: "1.2.7", number: "99", ..series.clone() };
    let mut file = page.bare(0);
    file.put(words(slice(0)));
    page.write(file, &at(folder.path(), 11));
    let volume = read(folder.path());
    assert_voxels(&volume, plain);
    assert!(volume.warnings.iter().any(|w| w.starts_with("2 series beside")));
}

#[test]
fn mosaics_are_refused_with_a_way_out() {
    let folder = Series::new("MR").folder(1, straight, |_, file| {
        file.put(text(tags::IMAGE_TYPE, VR::CS, "ORIGINAL\\PRIMARY\\M\\MOSAIC"));
    });
    let error = refused(folder.path());
    assert!(error.contains("says MOSAIC") && error.contains("dcm2niix"), "{error}");
}

#[test]
fn several_volumes_in_a_series_are_picked_by_number() {
    let series = Series::new("MR");
    // The second lies five centimetres beside the first.
    let place = |k: usize| {
        let [x, y, z] = straight(k % 2);
        [if k < 2 { x } else { x + 50.0 }, y, z]
    };
    let folder = series.folder(SLICES, place, |_, _| ());
    let error = refused(folder.path());
    assert!(error.contains("2 volumes") && error.contains("--volume 0 to 1"), "{error}");
    let second = Volume::read(folder.path(), Some(1)).unwrap();
    assert_voxels(&second, |[i, j, k]| value(i, j, k + 2).into());
    let mut beside = STRAIGHT;
    beside[0][3] -= 50.0;
    assert_affine(&second, beside);
    assert_affine(&Volume::read(folder.path(), Some(0)).unwrap(), STRAIGHT);
    // Steps are looked at in each: here one of the second.
    let shifted = |k: usize| if k == 4 { [10.0, 25.0, -97.5] } else { straight(k % 3) };
    let folder = series.folder(6, shifted, |_, _| ());
    assert_affine(&Volume::read(folder.path(), Some(0)).unwrap(), STRAIGHT);
    let error = Volume::read(folder.path(), Some(1)).unwrap_err().to_string();
    assert!(error.contains("IM0004") && error.contains("do not lie in a row"), "{error}");
}

/// A zip archive of files, stored.
fn zipped(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
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

#[test]
fn a_zip_archive_is_read_as_a_folder_is() {
    let folder = Series::new("CT").folder(SLICES, straight, |_, _| ());
    let names: Vec<String> = (0..SLICES).map(|k| format!("study/{k}")).collect();
    let read_one = |k: usize| std::fs::read(at(folder.path(), k)).unwrap();
    let files: Vec<(&str, Vec<u8>)> =
        names.iter().enumerate().map(|(k, name)| (name.as_str(), read_one(k))).collect();
    let path = folder.path().join("study.zip");
    std::fs::write(&path, zipped(&files)).unwrap();
    let volume = read(&path);
    assert_voxels(&volume, plain);
    assert_affine(&volume, STRAIGHT);
    std::fs::write(&path, zipped(&[("a.txt", b"no image".to_vec())])).unwrap();
    assert!(refused(&path).contains("a ZIP archive"));
}

/// A PET file's tags of the tracer: half of it decayed in the hour before the scan.
fn traced(file: &mut InMemDicomObject, weight: Option<&str>) {
    let mut tracer = InMemDicomObject::new_empty();
    tracer.put(text(tags::RADIOPHARMACEUTICAL_START_TIME, VR::TM, "090000"));
    tracer.put(text(tags::RADIONUCLIDE_TOTAL_DOSE, VR::DS, "400000000"));
    tracer.put(text(tags::RADIONUCLIDE_HALF_LIFE, VR::DS, "3600"));
    file.put(items(tags::RADIOPHARMACEUTICAL_INFORMATION_SEQUENCE, vec![tracer]));
    file.put(text(tags::UNITS, VR::CS, "BQML"));
    file.put(text(tags::DECAY_CORRECTION, VR::CS, "START"));
    file.put(text(tags::CORRECTED_IMAGE, VR::CS, "ATTN\\DECY"));
    for (date, time, at) in [
        (tags::SERIES_DATE, tags::SERIES_TIME, "100000"),
        (tags::ACQUISITION_DATE, tags::ACQUISITION_TIME, "100500"),
    ] {
        file.put(text(date, VR::DA, "20240305"));
        file.put(text(time, VR::TM, at));
    }
    if let Some(weight) = weight {
        file.put(text(tags::PATIENT_WEIGHT, VR::DS, weight));
    }
    file.put(text(tags::RESCALE_SLOPE, VR::DS, "10"));
    file.put(text(tags::RESCALE_INTERCEPT, VR::DS, "0"));
}

#[test]
fn activities_become_uptakes_where_the_tags_allow() {
    let class = uids::POSITRON_EMISSION_TOMOGRAPHY_IMAGE_STORAGE;
    let series = Series { class, ..Series::new("PT") };
    let volume = read(series.folder(SLICES, straight, |_, f| traced(f, Some("80"))).path());
    // Grams by what is left of the dose.
    assert_voxels(&volume, |v| (f64::from(plain(v)) * (10.0 * (80_000.0 / 2e8))) as f32);
    assert_eq!((volume.description.modality, volume.warnings.len()), (Some(Modality::Pet), 0));
    let volume = read(series.folder(SLICES, straight, |_, f| traced(f, None)).path());
    assert_voxels(&volume, |v| 10.0 * plain(v));
    assert!(volume.warnings[0].contains("no SUV: its PatientWeight (0010,1030) is missing"));
}

#[test]
fn errors_name_the_file_the_tag_and_what_was_expected() {
    let series = Series::new("CT");
    let cases: [(InMemElement, &str); 6] = [
        (text(tags::IMAGE_ORIENTATION_PATIENT, VR::DS, "1\\0\\0\\1\\0\\0"), "right angles"),
        (text(tags::PIXEL_SPACING, VR::DS, "0\\1"), "PixelSpacing (0028,0030)"),
        (text(tags::IMAGE_POSITION_PATIENT, VR::DS, "1\\2"), "has 2 numbers, expected 3"),
        (text(tags::RESCALE_SLOPE, VR::DS, "0"), "RescaleSlope (0028,1053) is 0"),
        (short(tags::SAMPLES_PER_PIXEL, 3), "in colour"),
        (short(tags::BITS_ALLOCATED, 12), "BitsAllocated (0028,0100) is 12, expected 8, 16 or 32"),
    ];
    for (element, words) in cases {
        let folder = series.folder(SLICES, straight, |k, file| {
            if k == 2 {
                file.put(element.clone());
            }
        });
        let error = refused(folder.path());
        let named = error.starts_with(at(folder.path(), 2).to_str().unwrap());
        assert!(named && error.contains(words), "{error}");
    }
    let folder = series.folder(SLICES, straight, |k, file| {
        if k == 1 {
            file.put(words(vec![0; 5]));
        }
    });
    let error = refused(folder.path());
    assert!(error.contains("IM0001") && error.contains("has 10 bytes"), "{error}");
}

#[test]
fn damaged_files_are_errors_wherever_they_end_and_whatever_is_changed() {
    for syntax in [uids::EXPLICIT_VR_LITTLE_ENDIAN, uids::IMPLICIT_VR_LITTLE_ENDIAN] {
        let series = Series { class: uids::ENHANCED_CT_IMAGE_STORAGE, syntax, ..Series::new("CT") };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("enhanced.dcm");
        series.write(enhanced(&series), &path);
        let whole = std::fs::read(&path).unwrap();
        for end in 0..whole.len() {
            std::fs::write(&path, &whole[..end]).unwrap();
            assert!(Volume::read(&path, None).is_err(), "{end} of {} bytes", whole.len());
        }
        for at in 0..whole.len() {
            for change in [0x00, 0x7f, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = change;
                std::fs::write(&path, &bytes).unwrap();
                // Whatever it is now: no panic.
                let _ = Volume::read(&path, None);
            }
        }
    }
}

/// Whose scan it is.
fn identified(file: &mut InMemDicomObject) {
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

/// A mask on [`Series::folder`]'s voxels that no flip and no swap leaves as it is; slices 0 and 3
/// are empty.
fn mask() -> Vec<u8> {
    let mut mask = vec![0; COLUMNS * ROWS * SLICES];
    for [i, j, k] in [[0, 0, 1], [1, 0, 1], [3, 2, 1], [2, 1, 2], [2, 2, 2], [3, 1, 2]] {
        mask[(i * ROWS + j) * SLICES + k] = 1;
    }
    mask
}

/// Scans of every kind that a segmentation may be of.
fn scans() -> Vec<(&'static str, tempfile::TempDir)> {
    let ct = Series::new("CT");
    let (s, c) = 0.3f64.sin_cos();
    let turned = Series { orientation: [c, s, 0.0, 0.0, 0.0, -1.0], ..Series::new("MR") };
    let named = |_: usize, file: &mut InMemDicomObject| identified(file);
    let uneven = |k: usize| [0.0, 0.0, [0.0, 2.0, 4.3, 6.0][k]];
    let frames =
        Series { class: uids::ENHANCED_CT_IMAGE_STORAGE, uid: "1.2.5", ..Series::new("CT") };
    let folder = tempfile::tempdir().unwrap();
    let mut file = enhanced(&frames);
    identified(&mut file);
    frames.write(file, &folder.path().join("enhanced.dcm"));
    vec![
        ("upwards", ct.folder(SLICES, straight, named)),
        ("downwards", ct.folder(SLICES, |k| straight(SLICES - 1 - k), named)),
        ("oblique", turned.folder(SLICES, |k| [-s, c, 0.0].map(|n| 3.0 * n * k as f64), named)),
        ("tilted", ct.folder(SLICES, |k| [0.0, 0.5 * k as f64, 2.0 * k as f64], named)),
        ("uneven", ct.folder(SLICES, uneven, named)),
        ("frames", folder),
    ]
}

/// The object of a file on a scan.
fn object(path: &Path, scan: &Volume) -> Vec<u8> {
    let labels = Labels::beside(path, scan).unwrap_or_else(|e| panic!("{e}"));
    labels.mask(&TargetLabel::Any).unwrap_or_else(|e| panic!("{e}"))
}

fn open(path: &Path) -> InMemDicomObject {
    dicom_object::open_file(path).unwrap().into_inner()
}

/// A value as text.
fn said(object: &InMemDicomObject, tag: Tag) -> String {
    let text = object.element(tag).unwrap_or_else(|e| panic!("{e}")).to_str().unwrap();
    text.trim_end_matches(['\0', ' ']).to_string()
}

fn inner(object: &InMemDicomObject, tag: Tag) -> Vec<InMemDicomObject> {
    object.element(tag).unwrap_or_else(|e| panic!("{e}")).items().unwrap().to_vec()
}

#[test]
fn a_mask_goes_into_a_segmentation_and_comes_back() {
    for (name, folder) in scans() {
        let scan = read(folder.path());
        let path = folder.path().join("mask.dcm");
        write_mask(&path, &scan, &mask()).unwrap().commit().unwrap();
        assert!(object(&path, &scan) == mask(), "{name}");
        // Beside the scan it is no scan.
        assert_eq!(read(folder.path()).grid, scan.grid, "{name}");
        // By its number or name, and on the grid alone where slices are even.
        let labels = Labels::beside(&path, &scan).unwrap();
        assert!(labels.is_named() && labels.warnings.is_empty(), "{name}: {:?}", labels.warnings);
        for target in ["1", "object"] {
            assert!(labels.mask(&target.parse().unwrap()).unwrap() == mask(), "{name}");
        }
        if name != "uneven" {
            let labels = Labels::read(&path, &scan.grid).unwrap();
            assert!(labels.mask(&TargetLabel::Any).unwrap() == mask(), "{name}");
            // Its own grid is that of the slices it has.
            let grid = Volume::grid_of(&path).unwrap();
            assert_eq!(grid.size, [COLUMNS, ROWS, 2], "{name}");
            let first = scan.grid.affine.apply([0.0, 0.0, 1.0]);
            let apart = (0..3).map(|r| (grid.affine.0[r][3] - first[r]).abs()).fold(0.0, f64::max);
            assert!(apart < 1e-9, "{name}: {apart}");
        }
        // Probabilities: those above a half are the object.
        let odd = |(n, m): (usize, &u8)| 0.5 * f32::from(*m) + 0.0625 * (n % 8) as f32;
        let odds: Vec<f32> = mask().iter().enumerate().map(odd).collect();
        let expected: Vec<u8> = odds.iter().map(|p| u8::from(*p > 0.5)).collect();
        write_probability(&path, &scan, &odds).unwrap().commit().unwrap();
        let labels = Labels::beside(&path, &scan).unwrap();
        assert!(labels.mask(&TargetLabel::Any).unwrap() == expected, "{name}");
        assert!(labels.warnings[0].contains("above a half"), "{:?}", labels.warnings);
        // An empty mask has all slices.
        write_mask(&path, &scan, &[0; COLUMNS * ROWS * SLICES]).unwrap().commit().unwrap();
        assert_eq!(said(&open(&path), tags::NUMBER_OF_FRAMES), SLICES.to_string(), "{name}");
        assert!(object(&path, &scan).iter().all(|v| *v == 0), "{name}");
    }
}

#[test]
fn frames_of_a_segmentation_refer_to_the_slices_that_they_lie_on() {
    for (name, folder) in scans() {
        let scan = read(folder.path());
        let path = folder.path().join("mask.dcm");
        write_mask(&path, &scan, &mask()).unwrap().commit().unwrap();
        let file = open(&path);
        for (tag, value) in [
            (tags::SOP_CLASS_UID, uids::SEGMENTATION_STORAGE),
            (tags::MODALITY, "SEG"),
            (tags::SEGMENTATION_TYPE, "BINARY"),
            (tags::NUMBER_OF_FRAMES, "2"),
            (tags::PATIENT_NAME, "Sample^Anna"),
            (tags::PATIENT_ID, "P-17"),
            (tags::PATIENT_BIRTH_DATE, "19600102"),
            (tags::STUDY_INSTANCE_UID, "1.2.3.1"),
            (tags::STUDY_DATE, "20240305"),
            (tags::FRAME_OF_REFERENCE_UID, "1.2.3.2"),
            (tags::SPECIFIC_CHARACTER_SET, "ISO_IR 100"),
            (tags::SERIES_NUMBER, "1002"),
            (tags::MANUFACTURER, "prism"),
        ] {
            assert_eq!(said(&file, tag), value, "{name}");
        }
        let maker = &inner(&file, tags::CONTRIBUTING_EQUIPMENT_SEQUENCE)[0];
        assert_eq!(said(maker, tags::MANUFACTURER_MODEL_NAME), "Ring 3");
        let segments = inner(&file, tags::SEGMENT_SEQUENCE);
        assert_eq!((segments.len(), said(&segments[0], tags::SEGMENT_LABEL)), (1, "object".into()));
        // Every file of the series is named, and of the series itself nothing else.
        let series = inner(&file, tags::REFERENCED_SERIES_SEQUENCE);
        let instances = inner(&series[0], tags::REFERENCED_INSTANCE_SEQUENCE);
        let is_enhanced = name == "frames";
        assert_eq!(instances.len(), if is_enhanced { 1 } else { SLICES }, "{name}");
        let new = said(&file, tags::SERIES_INSTANCE_UID);
        assert!(new.starts_with("2.25.") && new != said(&file, tags::SOP_INSTANCE_UID));
        let frames = inner(&file, tags::PER_FRAME_FUNCTIONAL_GROUPS_SEQUENCE);
        for (n, frame) in frames.iter().enumerate() {
            // Slices 1 and 2 of the scan.
            let k = n + 1;
            let image = &inner(frame, tags::DERIVATION_IMAGE_SEQUENCE)[0];
            let image = &inner(image, tags::SOURCE_IMAGE_SEQUENCE)[0];
            let uid = said(image, tags::REFERENCED_SOP_INSTANCE_UID);
            let expected = match name {
                // The last frame of the file is the lowest slice.
                "frames" => ("1.2.5.1".to_string(), Some((SLICES - k).to_string())),
                // The first file is the highest slice.
                "downwards" => (format!("1.2.3.4.{}", SLICES - k), None),
                _ => (format!("1.2.3.4.{}", k + 1), None),
            };
            let number = image.get(tags::REFERENCED_FRAME_NUMBER);
            let number = number.map(|e| e.to_str().unwrap().trim().to_string());
            assert_eq!((uid, number), expected, "{name}");
            // It lies where that slice does.
            let place = &inner(frame, tags::PLANE_POSITION_SEQUENCE)[0];
            let place = place.element(tags::IMAGE_POSITION_PATIENT).unwrap();
            let [x, y, z]: [f64; 3] = place.to_multi_float64().unwrap().try_into().unwrap();
            let expected = match name {
                "uneven" => [0.0, 0.0, [0.0, 2.0, 4.3, 6.0][k]],
                _ => scan.grid.affine.apply([0.0, 0.0, k as f64]),
            };
            let off = [-x - expected[0], -y - expected[1], z - expected[2]];
            assert!(off.iter().all(|v| v.abs() < 1e-9), "{name}: {off:?}");
            let content = &inner(frame, tags::FRAME_CONTENT_SEQUENCE)[0];
            let index = content.element(tags::DIMENSION_INDEX_VALUES).unwrap();
            assert_eq!(index.to_multi_int::<usize>().unwrap(), [1, n + 1], "{name}");
        }
        // Bits follow each other, row by row, from frame to frame.
        let bytes = file.element(tags::PIXEL_DATA).unwrap().to_bytes().unwrap().to_vec();
        let bit = |n: usize| bytes[n / 8] >> (n % 8) & 1;
        assert_eq!(bytes.len(), 4);
        for n in 0..2 * ROWS * COLUMNS {
            let (k, j, i) = (1 + n / (ROWS * COLUMNS), n / COLUMNS % ROWS, n % COLUMNS);
            assert_eq!(bit(n), mask()[(i * ROWS + j) * SLICES + k], "{name}: {:?}", [i, j, k]);
        }
    }
}

/// A program that is not here; whether it must be.
fn is_missing(what: &str) {
    let required = std::env::var_os("PRISM_TEST_TOOLS").is_some_and(|v| v == "required");
    assert!(!required, "{what} is not on this machine");
    common::skipped(&format!("{what} is not on this machine: it does not judge segmentations"));
}

#[test]
fn other_readers_see_the_same_mask() {
    let python = |args: &[&str]| Command::new("python3").args(args).output();
    let has = |out: std::io::Result<Output>| out.is_ok_and(|out| out.status.success());
    if !has(python(&["-c", "import numpy, pydicom"])) {
        return is_missing("pydicom");
    }
    let mut args = vec![common::here("tests/judges/dicom_seg.py")];
    let beside = tempfile::tempdir().unwrap();
    // An image of theirs has upright axes and even steps.
    let scans: Vec<_> =
        scans().into_iter().filter(|(name, _)| !["uneven", "tilted"].contains(name)).collect();
    for (name, folder) in &scans {
        let scan = read(folder.path());
        let at = |what: &str| beside.path().join(format!("{name}-{what}"));
        let odd = |(n, m): (usize, &u8)| f32::from(*m) * (0.5 + 0.0625 * (n % 8) as f32);
        let odds: Vec<f32> = mask().iter().enumerate().map(odd).collect();
        let empty = vec![0; mask().len()];
        for ending in ["dcm", "nii"] {
            let at = |what: &str| at(&format!("{what}.{ending}"));
            let pending = [
                write_mask(&at("mask"), &scan, &mask()),
                write_mask(&at("empty"), &scan, &empty),
                write_probability(&at("odds"), &scan, &odds),
            ];
            pending.into_iter().for_each(|p| p.unwrap().commit().unwrap());
        }
        for what in ["mask", "empty", "odds"] {
            args.extend([at(&format!("{what}.dcm")), folder.path().into()]);
            args.push(at(&format!("{what}.nii")));
        }
    }
    let args: Vec<&str> = args.iter().map(|a| a.to_str().unwrap()).collect();
    let out = python(&args).unwrap();
    let told = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{told}{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(told.matches("ok: pydicom").count(), 3 * scans.len(), "{told}");
    told.lines().filter_map(|l| l.strip_prefix("missing: ")).for_each(is_missing);
}

#[test]
fn what_cannot_be_a_segmentation_is_told_with_a_way_out() {
    let series = Series::new("CT");
    let folder = series.folder(SLICES, straight, |_, file| identified(file));
    let scan = read(folder.path());
    let path = folder.path().join("mask.dcm");
    let refused = |scan: &Volume| write_mask(&path, scan, &mask()).err().unwrap().to_string();
    // The same scan from another format.
    let nifti = folder.path().join("scan.nii");
    prism::volume::write_scan(&nifti, &scan).unwrap().commit().unwrap();
    let other = read(&nifti);
    let error = refused(&other);
    assert!(error.contains("the scan is NIfTI-1") && error.contains("NAME.nii.gz"), "{error}");
    // And the program says so before it computes anything.
    let model = folder.path().join("model.safetensors");
    Weights::hashed(common::tiny(), "dicom").save(&model, Precision::F32).unwrap();
    let run = |image: &Path, more: &[&str]| {
        let mut args = vec!["segment", "-m", model.to_str().unwrap(), "--point", "1,1,1"];
        args.extend(["-i", image.to_str().unwrap(), "-o", path.to_str().unwrap()]);
        args.extend(more);
        Command::new(env!("CARGO_BIN_EXE_prism")).args(args).output().unwrap()
    };
    let out = run(&nifti, &[]);
    let error = String::from_utf8_lossy(&out.stderr).to_string();
    assert!(out.status.code() == Some(1) && error.contains("the scan is NIfTI-1"), "{error}");
    assert!(!path.exists());
    let scan_as = prism::volume::write_scan(&path, &scan).err().unwrap().to_string();
    assert!(scan_as.contains("a mask or probabilities"), "{scan_as}");
    // Files that do not say whose they are.
    let bare = series.folder(SLICES, straight, |_, _| ());
    let error = refused(&read(bare.path()));
    assert!(error.contains("StudyInstanceUID (0020,000d) is missing"), "{error}");

    // Of two objects each has a file of its own: that of the second is a slice of the scan.
    let slices = series.folder(SLICES, straight, |_, file| identified(file));
    std::fs::rename(at(slices.path(), 1), slices.path().join("p-2.dcm")).unwrap();
    let prompts = folder.path().join("prompts.json");
    let click = r#"[{"points": [{"position": [1, 1, 1]}]}]"#;
    let object = |name: &str| format!(r#"{{"name": "{name}", "iterations": {click}}}"#);
    let both = format!(r#"{{"objects": [{}, {}]}}"#, object("a"), object("b"));
    std::fs::write(&prompts, both).unwrap();
    let mut args: Vec<PathBuf> = vec!["segment".into(), "-m".into(), model.clone()];
    args.extend([PathBuf::from("-i"), slices.path().into()]);
    args.extend(["-o".into(), folder.path().join("both.nii.gz")]);
    args.extend(["--prompts".into(), prompts, "--probability".into()]);
    args.push(slices.path().join("p.dcm"));
    let out = Command::new(env!("CARGO_BIN_EXE_prism")).args(&args).output().unwrap();
    let error = String::from_utf8_lossy(&out.stderr).to_string();
    assert!(out.status.code() == Some(1) && error.contains("p-2.dcm: is an input"), "{error}");
    // A slice that has the name without a number is not written to.
    std::fs::rename(slices.path().join("p-2.dcm"), slices.path().join("p.dcm")).unwrap();
    let out = Command::new(env!("CARGO_BIN_EXE_prism")).args(&args).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(slices.path().join("p-1.dcm").exists() && slices.path().join("p-2.dcm").exists());

    // What the program writes is read by it.
    let odds = folder.path().join("odds.dcm");
    let out = run(folder.path(), &["--probability", odds.to_str().unwrap(), "--modality", "ct"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let args = ["metrics", "--json", "--truth", path.to_str().unwrap(), "--prediction"];
    let out = Command::new(env!("CARGO_BIN_EXE_prism")).args(args).arg(&odds).output().unwrap();
    let told: serde_json::Value = serde_json::from_slice(&out.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stderr)));
    assert_eq!(told["dice"], 1.0, "{told}");
}

#[test]
fn segments_are_picked_by_number_or_name_and_those_outside_are_told() {
    let series = Series::new("CT");
    let folder = series.folder(SLICES, straight, |_, file| identified(file));
    let scan = read(folder.path());
    let path = folder.path().join("mask.dcm");
    write_mask(&path, &scan, &mask()).unwrap().commit().unwrap();
    // A second segment on the last frame, and a third that has none.
    let mut file = dicom_object::open_file(&path).unwrap();
    let mut segments = inner(&file, tags::SEGMENT_SEQUENCE);
    for (number, label) in [(2, "node"), (5, "node")] {
        let mut segment = segments[0].clone();
        segment.put(short(tags::SEGMENT_NUMBER, number));
        segment.put(text(tags::SEGMENT_LABEL, VR::LO, label));
        segments.push(segment);
    }
    file.put(items(tags::SEGMENT_SEQUENCE, segments));
    let mut frames = inner(&file, tags::PER_FRAME_FUNCTIONAL_GROUPS_SEQUENCE);
    let mut number = InMemDicomObject::new_empty();
    number.put(short(tags::REFERENCED_SEGMENT_NUMBER, 2));
    frames[1].put(items(tags::SEGMENT_IDENTIFICATION_SEQUENCE, vec![number]));
    file.put(items(tags::PER_FRAME_FUNCTIONAL_GROUPS_SEQUENCE, frames.clone()));
    file.write_to_file(&path).unwrap();
    let labels = Labels::beside(&path, &scan).unwrap();
    let slices = |picked: &str| -> Result<Vec<usize>, String> {
        let mask = labels.mask(&picked.parse().unwrap()).map_err(|e| e.to_string())?;
        let marked = mask.iter().enumerate().filter(|(_, v)| **v > 0).map(|(n, _)| n % SLICES);
        Ok(marked.collect())
    };
    assert_eq!(slices("object").unwrap(), [1, 1, 1]);
    assert_eq!((slices("2").unwrap(), slices("5").unwrap()), (vec![2, 2, 2], vec![]));
    assert!(slices("any").unwrap_err().contains("3 structures, pick one"));
    assert!(slices("node").unwrap_err().contains("by its value, of [2, 5]"));
    assert!(slices("lung").unwrap_err().contains("no structure is called 'lung'"));
    // Frames that fall between voxels, and beyond the scan.
    let place = |frames: &mut [InMemDicomObject], x: &str| {
        let mut position = InMemDicomObject::new_empty();
        position.put(text(tags::IMAGE_POSITION_PATIENT, VR::DS, x));
        frames[1].put(items(tags::PLANE_POSITION_SEQUENCE, vec![position]));
    };
    place(&mut frames, "10.3\\20\\-95");
    file.put(items(tags::PER_FRAME_FUNCTIONAL_GROUPS_SEQUENCE, frames.clone()));
    file.write_to_file(&path).unwrap();
    let error = Labels::beside(&path, &scan).err().unwrap().to_string();
    assert!(error.contains("frame 1 does not fit the scan: it lies 0.40 voxels"), "{error}");
    // A column beside it, and three slices above it.
    for (x, lost) in [("10.75\\20\\-95", 1), ("10\\20\\-85", 3)] {
        place(&mut frames, x);
        file.put(items(tags::PER_FRAME_FUNCTIONAL_GROUPS_SEQUENCE, frames.clone()));
        file.write_to_file(&path).unwrap();
        let labels = Labels::beside(&path, &scan).unwrap();
        assert!(labels.warnings[0].contains("'node' was left out"), "{:?}", labels.warnings);
        let first = labels.mask(&TargetLabel::Value(1)).unwrap();
        assert_eq!(first.iter().filter(|v| **v > 0).count(), 3);
        let error = labels.mask(&TargetLabel::Value(2)).unwrap_err().to_string();
        assert!(error.contains(&format!("{lost} of its marked voxels lie outside")), "{error}");
    }
}

/// A closed contour on slice `k` of [`straight`] slices, its corners `[i, j]` in voxels.
fn contour(corners: &[[f64; 2]], k: f64) -> InMemDicomObject {
    let place = |[i, j]: &[f64; 2]| [10.0 + 0.75 * i, 20.0 + 0.5 * j, 2.5 * k - 100.0];
    let points: Vec<f64> = corners.iter().flat_map(place).collect();
    let mut item = InMemDicomObject::new_empty();
    item.put(text(tags::CONTOUR_GEOMETRIC_TYPE, VR::CS, "CLOSED_PLANAR"));
    item.put(text(tags::NUMBER_OF_CONTOUR_POINTS, VR::IS, &corners.len().to_string()));
    item.put(text(tags::CONTOUR_DATA, VR::DS, &numbers(&points)));
    item
}

/// A box of voxels as a contour, its ends exclusive.
fn boxed([i0, i1]: [f64; 2], [j0, j1]: [f64; 2], k: f64) -> InMemDicomObject {
    let corners = [[i0, j0], [i1, j0], [i1, j1], [i0, j1]];
    contour(&corners.map(|c| c.map(|v| v - 0.5)), k)
}

/// A structure set of regions: their numbers, names and contours.
fn structures(regions: Vec<(u32, &str, Vec<InMemDicomObject>)>, path: &Path) {
    let mut file = InMemDicomObject::new_empty();
    identified(&mut file);
    file.put(text(tags::SOP_CLASS_UID, VR::UI, uids::RT_STRUCTURE_SET_STORAGE));
    file.put(text(tags::SOP_INSTANCE_UID, VR::UI, "1.2.6.1"));
    file.put(text(tags::MODALITY, VR::CS, "RTSTRUCT"));
    let (mut named, mut outlined) = (vec![], vec![]);
    for (number, name, contours) in regions {
        let mut item = InMemDicomObject::new_empty();
        item.put(text(tags::ROI_NUMBER, VR::IS, &number.to_string()));
        item.put(text(tags::ROI_NAME, VR::LO, name));
        named.push(item);
        let mut item = InMemDicomObject::new_empty();
        item.put(items(tags::CONTOUR_SEQUENCE, contours));
        item.put(text(tags::REFERENCED_ROI_NUMBER, VR::IS, &number.to_string()));
        outlined.push(item);
    }
    file.put(items(tags::STRUCTURE_SET_ROI_SEQUENCE, named));
    file.put(items(tags::ROI_CONTOUR_SEQUENCE, outlined));
    let meta = FileMetaTableBuilder::new().transfer_syntax(uids::IMPLICIT_VR_LITTLE_ENDIAN);
    file.with_meta(meta).unwrap().write_to_file(path).unwrap();
}

#[test]
fn contours_of_a_structure_set_are_filled_on_the_slices_that_they_lie_on() {
    let folder = Series::new("CT").folder(SLICES, straight, |_, file| identified(file));
    let scan = read(folder.path());
    let path = folder.path().join("structures.dcm");
    let hole = vec![boxed([0.0, 4.0], [0.0, 3.0], 1.0), boxed([1.0, 3.0], [1.0, 2.0], 1.0)];
    // One without a point outlines nothing.
    let mut two = vec![boxed([1.0, 3.0], [0.0, 2.0], 1.3), boxed([2.0, 4.0], [1.0, 3.0], 2.0)];
    two.push(contour(&[], 2.0));
    let far = vec![boxed([0.0, 4.0], [0.0, 3.0], 4.0)];
    let regions = vec![(1, "GTV", hole), (7, "node", two), (8, "couch", far), (0, "none", vec![])];
    structures(regions, &path);
    let labels = Labels::beside(&path, &scan).unwrap();
    let voxels = |picked: &str| -> Vec<[usize; 3]> {
        let mask = labels.mask(&picked.parse().unwrap()).unwrap_or_else(|e| panic!("{e}"));
        let at = |n: usize| [n / SLICES / ROWS, n / SLICES % ROWS, n % SLICES];
        (0..mask.len()).filter(|n| mask[*n] == 1).map(at).collect()
    };
    let ring: Vec<[usize; 3]> = (0..COLUMNS)
        .flat_map(|i| (0..ROWS).map(move |j| [i, j, 1]))
        .filter(|v| ![[1, 1, 1], [2, 1, 1]].contains(v))
        .collect();
    assert_eq!((voxels("GTV"), voxels("1")), (ring.clone(), ring));
    let mut expected = vec![[1, 0, 1], [1, 1, 1], [2, 0, 1], [2, 1, 1]];
    expected.extend([[2, 1, 2], [2, 2, 2], [3, 1, 2], [3, 2, 2]]);
    expected.sort();
    assert_eq!((voxels("7"), voxels("node")), (expected.clone(), expected));
    assert!(voxels("none").is_empty());
    let error = labels.mask(&TargetLabel::Name("couch".into())).unwrap_err().to_string();
    assert!(error.contains("lies at slice 4.00, more than half a slice"), "{error}");
    let notes = labels.warnings.join("\n");
    for words in ["'couch' was left out", "'node': its contours lie up to 0.30 slices"] {
        assert!(notes.contains(words), "{words}: {notes}");
    }
    let error = labels.mask(&TargetLabel::Any).unwrap_err().to_string();
    assert!(error.contains("4 structures, pick one: 'GTV', 'node', 'couch', 'none'"), "{error}");
    // It has no voxels of its own, and lies on those of what it is compared with.
    assert!(Volume::grid_of(&path).unwrap_err().to_string().contains("contours and no voxels"));
    let mask = folder.path().join("mask.nii");
    let one = labels.mask(&TargetLabel::Value(1)).unwrap();
    write_mask(&mask, &scan, &one).unwrap().commit().unwrap();
    let args = ["metrics", "--json", "--target", "GTV", "--truth", path.to_str().unwrap()];
    let out = Command::new(env!("CARGO_BIN_EXE_prism"))
        .args(args)
        .args(["--prediction-target", "any", "--prediction", mask.to_str().unwrap()])
        .output()
        .unwrap();
    let told: serde_json::Value = serde_json::from_slice(&out.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stderr)));
    assert_eq!(told["dice"], 1.0, "{told}");
    // Of another frame of reference: a warning.
    let mut file = dicom_object::open_file(&path).unwrap();
    file.put(text(tags::FRAME_OF_REFERENCE_UID, VR::UI, "1.2.99"));
    file.write_to_file(&path).unwrap();
    let labels = Labels::beside(&path, &scan).unwrap();
    assert!(labels.warnings.iter().any(|w| w.contains("FrameOfReferenceUID")));
    // What marks nothing is named.
    let error = Labels::beside(&at(folder.path(), 0), &scan).err().unwrap().to_string();
    assert!(error.contains("marks no voxels") && error.contains("RTSTRUCT"), "{error}");
}

#[test]
fn damaged_segmentations_and_structure_sets_are_errors_or_marks_and_never_more() {
    let folder = Series::new("CT").folder(SLICES, straight, |_, file| identified(file));
    let scan = read(folder.path());
    let path = folder.path().join("marks.dcm");
    write_mask(&path, &scan, &mask()).unwrap().commit().unwrap();
    let segmentation = std::fs::read(&path).unwrap();
    structures(vec![(1, "GTV", vec![boxed([0.0, 2.0], [0.0, 2.0], 1.0)])], &path);
    let contours = std::fs::read(&path).unwrap();
    for whole in [segmentation, contours] {
        for end in (0..whole.len()).step_by(5) {
            std::fs::write(&path, &whole[..end]).unwrap();
            if let Ok(labels) = Labels::beside(&path, &scan) {
                let _ = labels.mask(&TargetLabel::Any);
            }
        }
        for at in (0..whole.len()).step_by(11) {
            for change in [0x00, 0x31, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = change;
                std::fs::write(&path, &bytes).unwrap();
                if let Ok(labels) = Labels::beside(&path, &scan) {
                    let _ = labels.mask(&TargetLabel::Any);
                }
            }
        }
    }
}
