//! Segmentations, written and read, and structure sets.

use super::{
    COLUMNS, ROWS, SLICES, Series, at, enhanced, identified, items, numbers, read, short, straight,
    text,
};
use crate::common;
use dicom_core::VR;
use dicom_dictionary_std::{tags, uids};
use dicom_object::{FileMetaTableBuilder, InMemDicomObject, Tag};
use prism::model::{Weights, weights::Precision};
use prism::volume::labels::{Labels, TargetLabel};
use prism::volume::{Volume, write_mask, write_probability};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A mask on [`Series::folder`]'s voxels that every flip and swap changes; slices 0 and 3 are
/// empty.
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
        // Beside the scan it is not a scan.
        assert_eq!(read(folder.path()).grid, scan.grid, "{name}");
        // By its number or name, and on the grid alone if slices are even.
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
            // It is where that slice is.
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

/// Reports a program that is not available; or fails if it must be.
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
    // An image of theirs has perpendicular axes and even steps.
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
    // Files that do not say which patient they belong to.
    let bare = series.folder(SLICES, straight, |_, _| ());
    let error = refused(&read(bare.path()));
    assert!(error.contains("StudyInstanceUID (0020,000d) is missing"), "{error}");

    // Each of two objects has a file of its own: that of the second would be a slice of the scan.
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
    // A slice that has the name without a number is not overwritten.
    std::fs::rename(slices.path().join("p-2.dcm"), slices.path().join("p.dcm")).unwrap();
    let out = Command::new(env!("CARGO_BIN_EXE_prism")).args(&args).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(slices.path().join("p-1.dcm").exists() && slices.path().join("p-2.dcm").exists());

    // The program can read what it writes.
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
    assert!(slices("any").unwrap_err().contains("3 structures, select one"));
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
        assert!(labels.warnings[0].contains("'node' was ignored"), "{:?}", labels.warnings);
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
    for words in ["'couch' was ignored", "'node': its contours lie up to 0.30 slices"] {
        assert!(notes.contains(words), "{words}: {notes}");
    }
    let error = labels.mask(&TargetLabel::Any).unwrap_err().to_string();
    assert!(error.contains("4 structures, select one: 'GTV', 'node', 'couch', 'none'"), "{error}");
    // It has no voxels of its own, and is placed on those of the mask that it is compared with.
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
    // With another frame of reference: a warning.
    let mut file = dicom_object::open_file(&path).unwrap();
    file.put(text(tags::FRAME_OF_REFERENCE_UID, VR::UI, "1.2.99"));
    file.write_to_file(&path).unwrap();
    let labels = Labels::beside(&path, &scan).unwrap();
    assert!(labels.warnings.iter().any(|w| w.contains("FrameOfReferenceUID")));
    // A structure that marks nothing is named.
    let error = Labels::beside(&at(folder.path(), 0), &scan).err().unwrap().to_string();
    assert!(error.contains("without marked voxels") && error.contains("RTSTRUCT"), "{error}");
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
