//! DICOM, as the page sends it: the files of a study in an archive.

use super::upload;
use crate::common::here;
use crate::http::{Reply, ask, get, object_on, started};
use crate::writer::{COLUMNS, ROWS, SLICES, Series, at, identified, straight, value, zipped};
#[cfg(unix)]
use prism::serve::Keep;
use prism::serve::Settings;
use prism::volume::labels::{Labels, TargetLabel};
use prism::volume::{Volume, mask_file};
use serde_json::json;
use std::net::SocketAddr;
use std::path::Path;

/// The files of a series, with names that lead out of any folder.
fn files(series: &Series) -> Vec<(String, Vec<u8>)> {
    let folder = series.folder(SLICES, straight, |_, file| identified(file));
    let read = |k: usize| std::fs::read(at(folder.path(), k)).unwrap();
    let name = |k: usize| format!("../../../../tmp/prism-outside/{}/{k}", series.uid);
    (0..SLICES).map(|k| (name(k), read(k))).collect()
}

fn archive(all: &[Series]) -> Vec<u8> {
    let files: Vec<_> = all.iter().flat_map(files).collect();
    let named: Vec<_> = files.iter().map(|(n, bytes)| (n.as_str(), bytes.clone())).collect();
    zipped(&named)
}

fn send(at: SocketAddr, query: &str, bytes: &[u8]) -> Reply {
    ask(at, "POST", &format!("/v1/scans?{query}"), &[], bytes)
}

/// A series beside the first one.
fn other() -> Series {
    Series { uid: "1.2.9", number: "7", description: "Bone", ..Series::new("CT") }
}

#[test]
fn a_series_is_a_scan_as_any_other() {
    let server = started(Settings::default());
    let there = server.address;
    let told = send(there, "name=study.zip", &archive(&[Series::new("CT")])).json(201);
    assert_eq!(told["shape"], json!([COLUMNS, ROWS, SLICES]));
    assert_eq!((&told["format"], &told["modality"]), (&json!("DICOM"), &json!("ct")));
    let scan = told["scan"].as_str().unwrap();
    // A viewer gets the same voxels at the same places.
    for format in ["nii", "nii.gz"] {
        let image = get(there, &format!("/v1/scans/{scan}/image?format={format}"));
        assert_eq!(image.status, 200, "{}", image.text());
        let image = Volume::of_file(image.body, None).unwrap();
        for (n, row) in image.grid.affine.0.iter().enumerate() {
            for (m, number) in row.iter().enumerate() {
                let there = told["affine"][n][m].as_f64().unwrap();
                assert!((number - there).abs() < 1e-4, "{told}");
            }
        }
        for [i, j, k] in [[0, 0, 0], [3, 1, 2], [1, 2, 3]] {
            assert_eq!(image.at([i, j, k]), f32::from(value(i, j, k)));
        }
    }
    assert_eq!(get(there, &format!("/v1/scans/{scan}/image?format=mha")).status, 415);
    // A mask goes back into DICOM, with the names of objects.
    let about = json!({ "name": "Herd links" });
    let object = object_on(there, scan, &about);
    let folder = tempfile::tempdir().unwrap();
    let study = folder.path().join("study.zip");
    std::fs::write(&study, archive(&[Series::new("CT")])).unwrap();
    let volume = Volume::read(&study, None).unwrap();
    let mask: Vec<u8> = (0..COLUMNS * ROWS * SLICES).map(|at| u8::from(at % 5 == 2)).collect();
    let (grid, description) = (&volume.grid, &volume.description);
    let file = mask_file(Path::new("m.nii"), grid, description, &mask).unwrap();
    let given = ask(there, "PUT", &format!("/v1/objects/{object}/mask"), &[], &file);
    assert_eq!(given.status, 200, "{}", given.text());
    for path in [format!("objects/{object}/mask"), format!("scans/{scan}/labels")] {
        let file = get(there, &format!("/v1/{path}?format=dcm"));
        assert_eq!(file.status, 200, "{}", file.text());
        let written = folder.path().join("mask.dcm");
        std::fs::write(&written, &file.body).unwrap();
        let labels = Labels::beside(&written, &volume).unwrap();
        assert!(labels.mask(&TargetLabel::Any).unwrap() == mask, "{path}");
        let named = file.body.windows(10).any(|w| w == b"Herd links");
        assert_eq!(named, path.ends_with("labels"), "{path}");
    }
    // There is none for another scan.
    let (plain, _) = upload(there);
    let object = object_on(there, &plain, &json!({}));
    let refused = get(there, &format!("/v1/objects/{object}/mask?format=dcm"));
    assert!(refused.error(422, "error").contains("DICOM series"), "{}", refused.text());
    // One file is a series of one slice.
    let (_, slice) = files(&Series::new("CT")).remove(0);
    let told = send(there, "name=slice.dcm", &slice).json(201);
    assert_eq!(told["shape"], json!([COLUMNS, ROWS, 1]));
    assert!(!Path::new("/tmp/prism-outside").exists());
}

#[test]
fn of_several_series_one_is_asked_for() {
    let server = started(Settings::default());
    let there = server.address;
    let study = archive(&[Series::new("CT"), other()]);
    let list = send(there, "name=study.zip", &study).json(409);
    assert!(list["error"].as_str().unwrap().contains("?series="), "{list}");
    let told = |n: usize, what: &str| list["series"][n][what].clone();
    assert_eq!([told(0, "series"), told(1, "series")], [json!("1.2.3.4"), json!("1.2.9")]);
    assert_eq!((told(1, "number"), told(1, "description")), (json!("7"), json!("Bone")));
    assert_eq!(told(0, "shape"), json!([COLUMNS, ROWS, SLICES]));
    assert!(list["series"].as_array().map(Vec::len) == Some(2));
    for asked in ["1.2.9", "7", "bone"] {
        let told = send(there, &format!("name=study.zip&series={asked}"), &study).json(201);
        assert_eq!(told["format"], "DICOM");
    }
    let refused = send(there, "name=study.zip&series=Leber", &study);
    assert!(refused.error(422, "error").contains("no series 'Leber'"));
    // Only what was requested was read.
    assert!(get(there, "/metrics").text().contains("prism_scans 3\n"));
    let plain = std::fs::read(here("examples/data/lung1_image.nii.gz")).unwrap();
    assert!(send(there, "series=7", &plain).error(422, "error").contains("not DICOM"));
}

#[test]
fn archives_that_are_none_or_too_large_are_refused() {
    let server = started(Settings::default());
    let there = server.address;
    let study = archive(&[Series::new("CT")]);
    for bytes in [
        zipped(&[("a.txt", b"no image".to_vec())]),
        study[..study.len() / 2].to_vec(),
        b"PK\x03\x04".to_vec(),
        zipped(&[]),
    ] {
        let refused = send(there, "name=study.zip", &bytes);
        assert_eq!(refused.status, 422, "{}", refused.text());
    }
    // An archive that states a size larger than any scan: nothing of it is unpacked.
    let files: Vec<_> = (0..32).map(|n| (n.to_string(), vec![7; 100])).collect();
    let files: Vec<_> = files.iter().map(|(n, bytes)| (n.as_str(), bytes.clone())).collect();
    let mut bomb = zipped(&files);
    let entries: Vec<usize> =
        (0..bomb.len() - 4).filter(|at| bomb[*at..].starts_with(b"PK\x01\x02")).collect();
    assert_eq!(entries.len(), 32);
    for at in entries {
        bomb[at + 24..at + 28].copy_from_slice(&0xFFFF_FF00u32.to_le_bytes());
    }
    let refused = send(there, "name=study.zip", &bomb);
    assert!(refused.error(413, "error").contains("when decompressed"), "{}", refused.text());
    // Names determine what may be sent.
    assert_eq!(send(there, "name=study.rar", &study).status, 415);
    assert!(get(there, "/metrics").text().contains("prism_scans 0\n"));
}

#[cfg(unix)]
#[test]
fn a_series_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let keeping = || Settings { keep: Some(Keep::at(&state)), ..Settings::default() };
    let study = archive(&[Series::new("CT"), other()]);
    // Before it is known which series is selected there is nothing to be kept.
    let keep = Keep { bytes: study.len() as u64 / 2, ..Keep::at(&state) };
    let mut server = started(Settings { keep: Some(keep), ..Settings::default() });
    assert_eq!(send(server.address, "name=study.zip", &study).status, 409);
    assert_eq!(send(server.address, "name=study.zip&series=7", &study).status, 507);
    assert_eq!(std::fs::read_dir(&state).unwrap().count(), 1);
    server.end();
    let mut server = started(keeping());
    assert_eq!(send(server.address, "name=study.zip", &study).status, 409);
    let told = send(server.address, "name=study.zip&series=7", &study).json(201);
    let path = format!("/v1/scans/{}", told["scan"].as_str().unwrap());
    let image = get(server.address, &format!("{path}/image?format=nii")).body;
    server.end();
    let mut server = started(keeping());
    assert!(server.warnings.is_empty(), "{:?}", server.warnings);
    let mut there = get(server.address, &path).json(200);
    assert_eq!(there["objects"].take(), json!([]));
    assert_eq!(there["format"], "DICOM");
    assert!(get(server.address, &format!("{path}/image?format=nii")).body == image);
    server.end();
}
