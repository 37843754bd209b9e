//! Slices that other programs packed as JPEG 2000 and JPEG-LS (`tests/data/dicom`).

use super::{SLICES, Series, assert_voxels, at, plain, read, refused, short, straight, zipped};
use crate::common;
use dicom_core::{DataElement, VR};
use dicom_dictionary_std::tags;
use flate2::{Compression, write::DeflateEncoder};
use prism::volume::Element;
use prism::volume::dicom::{Sent, filed, of_bytes};
use std::io::Write;

const JPEG_LS: &str = "1.2.840.10008.1.2.4.80";
const JPEG_LS_LOSSY: &str = "1.2.840.10008.1.2.4.81";
const JPEG_2000: &str = "1.2.840.10008.1.2.4.90";

/// A file of `tests/data/dicom`, which other programs have written.
fn foreign(name: &str) -> Vec<u8> {
    std::fs::read(common::here("tests/data/dicom").join(name)).unwrap()
}

/// A folder with a slice of `[columns, rows]` values that is packed in two fragments. Its values
/// are signed if `signed` is 1.
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

/// The position of the data set of a file, after the elements that describe its encoding.
fn data_set(file: &[u8]) -> usize {
    144 + u32::from_le_bytes(file[140..144].try_into().unwrap()) as usize
}

/// A file with its data set deflated.
fn deflated(file: &[u8]) -> Vec<u8> {
    let mut packed = DeflateEncoder::new(vec![], Compression::best());
    packed.write_all(&file[data_set(file)..]).unwrap();
    let syntax = b"\x02\0\x10\0UI\x16\x001.2.840.10008.1.2.1.99";
    [&file[..132], &syntax[..], &packed.finish().unwrap()[..]].concat()
}

/// The files of a series of CT.
fn slices() -> Vec<Vec<u8>> {
    let folder = Series::new("CT").folder(SLICES, straight, |_, _| {});
    (0..SLICES).map(|k| std::fs::read(at(folder.path(), k)).unwrap()).collect()
}

#[test]
fn what_an_archive_holds_deflated_is_limited_all_together() {
    let files = slices();
    let names = ["1.dcm", "2.dcm", "3.dcm", "4.dcm"];
    let packed: Vec<_> = names.into_iter().zip(files.iter().map(|f| deflated(f))).collect();
    assert_eq!(packed.len(), SLICES);
    let study = zipped(&packed);
    let inflated: usize = files.iter().map(|file| file.len() - data_set(file)).sum();
    let most = (inflated + packed.iter().map(|(_, file)| file.len()).sum::<usize>()) as u64;
    match of_bytes(&study, None, most).unwrap() {
        Sent::Scan(image) => assert_voxels(&image, plain),
        _ => panic!("no scan"),
    }
    let error = of_bytes(&study, None, most - 1).err().unwrap().to_string();
    assert!(error.contains("deflated data set is larger"), "{error}");
}

#[test]
fn what_a_folder_holds_deflated_is_limited_file_by_file() {
    let (folder, files) = (tempfile::tempdir().unwrap(), slices());
    let inflated = files.iter().map(|file| file.len() - data_set(file));
    let most = inflated.max().unwrap() as u64;
    for (k, file) in files.iter().enumerate() {
        std::fs::write(at(folder.path(), k), deflated(file)).unwrap();
    }
    let mut large = files[0].clone();
    large.resize(large.len() + 100_000, 0);
    std::fs::write(folder.path().join("bomb"), deflated(&large)).unwrap();
    let (all, warnings) = filed(folder.path(), most).unwrap();
    assert!(all.len() == 1 && all[0].series.size[2] == SLICES);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    // A program that examines a folder for others is not told its files' names.
    let odd = &warnings[0];
    assert!(odd.said.contains("is larger") && odd.key.contains("bomb"), "{odd:?}");
    assert!(odd.said.contains(&format!(" of {}", SLICES + 1)), "{odd:?}");
    assert!(!odd.said.contains("bomb"), "{odd:?}");
    // When they are read, they count together.
    let Ok(Sent::Scan(image)) = all[0].read(most * SLICES as u64) else { panic!("is read") };
    assert_voxels(&image, plain);
}

#[test]
fn a_damaged_file_is_left_out_of_an_archive_that_is_as_large_as_may_be() {
    let slices = slices();
    let names = ["1.dcm", "2.dcm", "3.dcm", "4.dcm"];
    let files: Vec<_> = names.into_iter().zip(slices.iter().cloned()).collect();
    let sum = |files: &[(&str, Vec<u8>)]| files.iter().map(|(_, file)| file.len()).sum::<usize>();
    // Cut within its tags, plain and deflated: the inflated part is all that was left.
    let cut = slices[0][..data_set(&slices[0]) + 20].to_vec();
    for (damaged, inflated) in [(cut.clone(), 0), (deflated(&cut), 20)] {
        let files = [&[("0.dcm", damaged)][..], &files[..]].concat();
        let most = (sum(&files) + inflated) as u64;
        let Sent::Scan(image) = of_bytes(&zipped(&files), None, most).unwrap() else {
            panic!("no scan");
        };
        assert_voxels(&image, plain);
        let said = image.warnings.join("\n");
        assert!(said.contains("ignored") && said.contains("0.dcm: truncated"), "{said}");
    }
    // One byte less is an error for all: as the archive states it, or as a file inflates.
    let files = [&[("0.dcm", cut.clone())][..], &files[..]].concat();
    let most = sum(&files) as u64;
    let Ok(Sent::TooLarge(unpacked)) = of_bytes(&zipped(&files), None, most - 1) else {
        panic!("more is taken than may be");
    };
    assert_eq!(unpacked, most);
    let files = [&[("0.dcm", deflated(&cut))][..], &files[1..]].concat();
    let error = of_bytes(&zipped(&files), None, sum(&files) as u64 + 19).err().unwrap();
    assert!(error.to_string().contains("deflated data set is larger"), "{error}");
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
    // If only the file says that values are signed, the highest bit is the sign.
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
        // A truncated codestream, or one of another size, is not a slice.
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
    // With losses and a sign: as OpenJPEG decodes it, except for its rounding.
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
    // Nearly lossless: ten steps of five rows, of values that were changed by two at most.
    let bytes = foreign("near-jpeg-ls.dcm");
    let start = bytes.windows(2).position(|w| w == [0xff, 0xd8]).unwrap();
    let end = bytes.windows(2).rposition(|w| w == [0xff, 0xd9]).unwrap() + 2;
    let near = of_fragment(JPEG_LS_LOSSY, [10, 50], [16, 0], &bytes[start..end]);
    let steps = [65535.0, 32765.0, 16385.0, 4095.0, 1025.0, 255.0, 65.0, 15.0, 5.0, 0.0];
    assert_voxels(&read(near.path()), |[_, j, _]| steps[j / 5]);
}
