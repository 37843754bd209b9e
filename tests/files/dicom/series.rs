//! Series: whatever the order and the slant of their slices, voxels and affine are those that the
//! files state; files that cannot be one volume are an error, odd ones a warning.

use super::{
    COLUMNS, EXPLICIT_VR_BIG_ENDIAN, ROWS, SLICES, STRAIGHT, Series, assert_affine, assert_voxels,
    at, enhanced, items, plain, read, refused, short, slice, straight, text, value, words, zipped,
};
use dicom_core::{DataElement, VR};
use dicom_dictionary_std::{tags, uids};
use dicom_object::InMemDicomObject;
use dicom_object::mem::InMemElement;
use prism::volume::dicom::{Sent, filed, list};
use prism::volume::{Element, Modality, Volume};
use std::process::Command;

#[test]
fn slices_are_placed_by_their_positions_in_either_order_of_files() {
    let series = Series::new("CT");
    let up = read(series.folder(SLICES, straight, |_, _| ()).path());
    assert_eq!(up.grid.size, [COLUMNS, ROWS, SLICES]);
    assert_voxels(&up, plain);
    assert_affine(&up, STRAIGHT);
    assert_eq!(up.description.modality, Some(Modality::Ct));
    assert_eq!((up.array().element(), up.warnings.len()), (Element::Uint16, 0));
    // The first file is on top: the same place, its values now the last.
    let down = read(series.folder(SLICES, |k| straight(SLICES - 1 - k), |_, _| ()).path());
    assert_voxels(&down, |[i, j, k]| value(i, j, SLICES - 1 - k).into());
    assert_affine(&down, STRAIGHT);
}

#[test]
fn oblique_slices_lie_where_they_say() {
    let (s, c) = 0.3f64.sin_cos();
    let series = Series { orientation: [c, s, 0.0, 0.0, 0.0, -1.0], ..Series::new("MR") };
    // Rows along x rotated by 0.3, columns downwards: the normal is their cross product.
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
    assert!(volume.warnings[0].contains("1 files have duplicates"), "{:?}", volume.warnings);

    let folder = series.folder(6, |k| straight(if k < 3 { k } else { k + 1 }), |_, _| ());
    let error = refused(folder.path());
    assert!(error.starts_with(at(folder.path(), 3).to_str().unwrap()), "{error}");
    assert!(
        error.contains("a slice is missing: this slice is 5 mm from the previous one"),
        "{error}"
    );

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
    assert!(volume.warnings[0].contains("inverted"), "{:?}", volume.warnings);
    let ct = Series { photometric: "MONOCHROME1", ..Series::new("CT") };
    let volume = read(ct.folder(SLICES, straight, |_, _| ()).path());
    assert_voxels(&volume, plain);
    assert!(volume.warnings[0].contains("values are unchanged"), "{:?}", volume.warnings);
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

/// A grey JPEG of 16 bits, lossless, each value predicted from the one before it (ISO 10918-1,
/// annex H).
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
    let words = ["compressed with high-throughput JPEG 2000", "gdcmconv"];
    assert!(words.iter().all(|w| error.contains(w)), "{error}");
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
fn series_of_a_folder_are_filed_and_read_one_by_one() {
    let folder = tempfile::tempdir().unwrap();
    let (all, warnings) = filed(folder.path(), 1 << 20).unwrap();
    assert!(all.is_empty() && warnings.is_empty());
    // Two series, the slices of one of them in several folders.
    for series in [Series::new("CT"), Series { uid: "1.2.9", number: "5", ..Series::new("MR") }] {
        for k in 0..SLICES {
            let below = folder.path().join(["a", "a/b c"][k % 2]);
            std::fs::create_dir_all(&below).unwrap();
            let mut file = series.file(k, straight(k));
            file.put(words(slice(k)));
            file.put(text(tags::STUDY_INSTANCE_UID, VR::UI, "1.2.3.1"));
            series.write(file, &below.join(format!("{}-{k}", series.uid)));
        }
    }
    std::fs::write(folder.path().join("notes.txt"), "no image").unwrap();
    let (all, warnings) = filed(folder.path(), 1 << 20).unwrap();
    let told: Vec<_> = all.iter().map(|f| (f.series.uid.as_str(), f.series.size[2])).collect();
    assert_eq!((told, warnings.len()), (vec![("1.2.3.4", 4), ("1.2.9", 4)], 0));
    assert!(all.iter().all(|f| f.series.study == "1.2.3.1"));
    for filed in &all {
        let Ok(Sent::Scan(volume)) = filed.read(1 << 20) else { panic!("is read") };
        assert_voxels(&volume, plain);
        assert_affine(&volume, STRAIGHT);
        // Two bytes a voxel.
        let bytes = (2 * COLUMNS * ROWS * SLICES) as u64;
        assert!(matches!(filed.read(bytes), Ok(Sent::Scan(_))));
        assert!(matches!(filed.read(bytes - 1), Ok(Sent::TooLarge(n)) if n == bytes));
        assert!(!filed.has_changed() && !filed.is_rewritten() && !filed.is_tied);
    }
    // A missing file is reported, without its path. Times of files may be as coarse as this.
    std::thread::sleep(std::time::Duration::from_millis(50));
    std::fs::remove_file(folder.path().join("a/1.2.9-0")).unwrap();
    let error = all[1].read(1 << 20).err().unwrap();
    assert!(error.message.starts_with("a file of it cannot be read"), "{error}");
    assert!(!error.to_string().contains(folder.path().to_str().unwrap()), "{error}");
    assert!(all[1].is_rewritten());
    // The file beside the other is gone, too.
    assert!(all[0].has_changed() && !all[0].is_rewritten());
    assert!(all[0].read(1 << 20).is_ok());
    let (again, _) = filed(folder.path(), 1 << 20).unwrap();
    assert!(again[0].is_same(&all[0]) && !again[1].is_same(&all[1]));
    std::fs::remove_dir_all(folder.path().join("a")).unwrap();
    assert!(all[0].has_changed() && all[0].is_rewritten());
}

#[test]
fn a_series_is_not_read_of_other_files_than_the_look_found() {
    let series = Series::new("CT");
    let folder = series.folder(SLICES, straight, |_, _| ());
    let first = at(folder.path(), 0);
    let whole = std::fs::read(&first).unwrap();
    let filed = || filed(folder.path(), 1 << 20).unwrap().0.remove(0);
    let looked = filed();
    assert!(looked.read(1 << 20).is_ok());
    // One that is empty while it is being rewritten; one that belongs to another series.
    let other = Series { uid: "1.2.9", number: "5", ..series.clone() };
    let mut file = other.file(0, straight(0));
    file.put(words(slice(0)));
    other.write(file, &folder.path().join("other"));
    let of_other = std::fs::read(folder.path().join("other")).unwrap();
    for bytes in [&b""[..], &of_other[..]] {
        std::fs::write(&first, bytes).unwrap();
        let error = looked.read(1 << 20).err().unwrap();
        assert!(error.message.starts_with("its files have changed"), "{error}");
        assert!(looked.has_changed() && looked.is_rewritten());
    }
    // One that was empty when the folder was examined, and is filled without notice.
    std::fs::write(&first, b"").unwrap();
    let shorter = filed();
    assert_eq!(shorter.series.size[2], SLICES - 1);
    assert!(!shorter.has_changed());
    std::fs::write(&first, &whole).unwrap();
    assert!(shorter.has_changed() && !shorter.is_rewritten());
    assert_eq!(filed().series.size[2], SLICES);
    // If all of them belong to another series now, nothing else is read in their place.
    (0..SLICES).for_each(|k| std::fs::write(at(folder.path(), k), &of_other).unwrap());
    let error = looked.read(1 << 20).err().unwrap();
    assert!(error.message.starts_with("its files have changed"), "{error}");
}

#[test]
fn of_a_series_with_two_parts_alike_none_is_meant() {
    let series = Series::new("CT");
    let folder = series.folder(2, straight, |_, _| ());
    let turned = Series { orientation: [0.0, 1.0, 0.0, 0.0, 0.0, -1.0], ..series };
    for k in 0..2 {
        let mut file = turned.file(8 + k, [k as f64, 0.0, 0.0]);
        file.put(words(slice(k)));
        turned.write(file, &at(folder.path(), 8 + k));
    }
    let (all, _) = filed(folder.path(), 1 << 20).unwrap();
    assert!(all.len() == 1 && all[0].is_tied);
    let error = all[0].read(1 << 20).err().unwrap();
    assert!(error.message.contains("pick one"), "{error}");
}

/// The targets of links may be outside a folder that is served.
#[cfg(unix)]
#[test]
fn links_are_not_followed_out_of_a_folder_that_is_filed() {
    let beyond = Series::new("CT").folder(SLICES, straight, |_, _| ());
    let folder = tempfile::tempdir().unwrap();
    for k in 0..SLICES {
        std::os::unix::fs::symlink(at(beyond.path(), k), at(folder.path(), k)).unwrap();
    }
    std::os::unix::fs::symlink(beyond.path(), folder.path().join("all")).unwrap();
    assert!(filed(folder.path(), 1 << 20).unwrap().0.is_empty());
    // For a folder that is named by its path, links in it are followed.
    assert_voxels(&read(folder.path()), plain);
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
    // And a page of a report, which has no position.
    let page = Series { uid: "1.2.7", number: "99", ..series.clone() };
    let mut file = page.bare(0);
    file.put(words(slice(0)));
    page.write(file, &at(folder.path(), 11));
    let volume = read(folder.path());
    assert_voxels(&volume, plain);
    assert!(volume.warnings.iter().any(|w| w.starts_with("2 other series")));
}

#[test]
fn mosaics_are_refused_with_a_way_out() {
    let folder = Series::new("MR").folder(1, straight, |_, file| {
        file.put(text(tags::IMAGE_TYPE, VR::CS, "ORIGINAL\\PRIMARY\\M\\MOSAIC"));
    });
    let error = refused(folder.path());
    assert!(error.contains("is MOSAIC") && error.contains("dcm2niix"), "{error}");
}

#[test]
fn several_volumes_in_a_series_are_picked_by_number() {
    let series = Series::new("MR");
    // The second is five centimetres beside the first.
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
    // Steps are checked in each: here one of the second.
    let shifted = |k: usize| if k == 4 { [10.0, 25.0, -97.5] } else { straight(k % 3) };
    let folder = series.folder(6, shifted, |_, _| ());
    assert_affine(&Volume::read(folder.path(), Some(0)).unwrap(), STRAIGHT);
    let error = Volume::read(folder.path(), Some(1)).unwrap_err().to_string();
    assert!(
        error.contains("IM0004") && error.contains("are not evenly spaced along a line"),
        "{error}"
    );
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
    // Grams divided by what is left of the dose.
    assert_voxels(&volume, |v| (f64::from(plain(v)) * (10.0 * (80_000.0 / 2e8))) as f32);
    assert_eq!((volume.description.modality, volume.warnings.len()), (Some(Modality::Pet), 0));
    let volume = read(series.folder(SLICES, straight, |_, f| traced(f, None)).path());
    assert_voxels(&volume, |v| 10.0 * plain(v));
    assert!(
        volume.warnings[0]
            .contains("not converted to SUV: its PatientWeight (0010,1030) is missing")
    );
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
                // Whatever it is now, it does not panic.
                let _ = Volume::read(&path, None);
            }
        }
    }
}
