//! Label images, and data sets of scans with their labels.

use crate::common::tiny;
use crate::program::{ONE_STEP, eval, metrics, train};
use crate::{base, case, count, nrrd, object};
use prism::data::cases::list;
use prism::model::{Weights, weights::Precision};
use prism::volume::labels::{Labels, TargetLabel, grid_of};
use prism::volume::{Affine, Modality, Volume};
use std::path::Path;
use std::time::{Duration, Instant};

#[test]
fn labels_are_not_read_as_scans() {
    let (grid, object) = (base().grid, object());
    let read = |name: &str| Labels::read(&case(name), &grid).unwrap();
    let any = |labels: &Labels| labels.mask(&TargetLabel::Any).unwrap();
    let named = |name: &str| TargetLabel::Name(name.into());
    // NaN means nothing.
    let nan = read("mask-with-nan/nan.nii.gz");
    assert!(any(&nan) == object && nan.warnings[0].contains("hold no number"));
    assert_eq!(count(&any(&read("mask-with-nan/nans.nii.gz"))), 7);
    // One of several labels is picked, with a message that there are several.
    let several = read("mask-of-several-labels/organ_tumour.nii.gz");
    assert!(
        several.mask(&TargetLabel::Value(2)).unwrap() == object
            && count(&any(&several)) > count(&object)
    );
    assert!(several.several("--mask-label").unwrap().contains("1 (13563 voxels), 2 (837 voxels)"));
    assert!(
        several.mask(&named("tumour")).unwrap_err().to_string().contains("names no structures")
    );
    // A segment is cropped to its extent, and stays in its place.
    let cropped = read("cropped.seg.nrrd");
    assert!(any(&cropped) == object && cropped.mask(&named("tumour")).unwrap() == object);
    // Segments that overlap are in layers, and have names.
    let layers = read("two_layers.seg.nrrd");
    assert!(
        layers.mask(&named("tumour")).unwrap() == object
            && layers.mask(&named("shifted")).unwrap() != object
    );
    for target in [TargetLabel::Any, named("liver"), TargetLabel::Value(1)] {
        assert!(
            layers.mask(&target).unwrap_err().to_string().contains("'tumour', 'shifted'"),
            "{target}"
        );
    }
    assert_eq!(count(&any(&read("mask-empty-with-a-point/empty.nii.gz"))), 0);
    // Several volumes without names are not a label image, and --volume is not for labels.
    let error = Labels::read(&case("nrrd-4d-of-itk/sitk4d.nrrd"), &grid).err().unwrap().to_string();
    assert!(error.contains("a label image holds one") && !error.contains("--volume"), "{error}");
    // A label with a copy of the scan's sform, by which the scan itself is not placed.
    let scan = Volume::read(&case("sform_without_scale.nii.gz"), None).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("label.nrrd");
    let mut values = vec![0u8; scan.grid.voxels()];
    values[100] = 1;
    nrrd(
        &path,
        scan.grid.size,
        &Affine([[-1.0, 0.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]),
        &values,
    );
    let copied = Labels::beside(&path, &scan).map(|l| (l.counts(), l.warnings));
    let (counts, warnings) = copied.unwrap_or_else(|e| panic!("{e}"));
    assert!(
        counts[&1] == 1 && warnings[0].contains("aligned with the scan's sform"),
        "{warnings:?}"
    );
}

/// Writes a segmentation of bytes with layers as `sizes` and `directions` say; one segment per
/// named layer.
fn layered(path: &Path, sizes: &str, directions: &str, named: &[usize], voxels: &[u8]) {
    let dimension = sizes.split(' ').count();
    let segments: String =
        named.iter().map(|n| format!("Segment{n}_Name:=s{n}\nSegment{n}_Layer:={n}\n")).collect();
    let head = format!(
        "NRRD0004\ntype: uchar\ndimension: {dimension}\nspace: RAS\nsizes: {sizes}\nspace directions: {directions}\nspace origin: (0,0,0)\nencoding: raw\n{segments}\n"
    );
    std::fs::write(path, [head.as_bytes(), voxels].concat()).unwrap();
}

#[test]
fn layers_in_front_of_voxels_and_behind_them_are_taken_apart_however_many() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layers.seg.nrrd");
    let read = || Labels::read(&path, &grid_of(&path).unwrap().unwrap()).unwrap();
    let mask =
        |labels: &Labels, n: usize| labels.mask(&TargetLabel::Name(format!("s{n}"))).unwrap();
    // Two before, three after: layer n has voxel n of three.
    let mut voxels = vec![];
    for (behind, v, front) in (0..18).map(|at| (at / 6, at / 2 % 3, at % 2)) {
        voxels.push(u8::from((2 * behind + front) % 3 == v));
    }
    let directions = "none (1,0,0) (0,1,0) (0,0,1) none";
    layered(&path, "2 3 1 1 3", directions, &[0, 1, 2, 3, 4, 5], &voxels);
    let labels = read();
    for n in 0..6 {
        assert_eq!(mask(&labels, n), [0, 1, 2].map(|v| u8::from(n % 3 == v)), "layer {n}");
    }
    // So many that it would take too long to go through all of them for each.
    const MANY: usize = 100_000;
    let mut voxels = vec![0; MANY];
    voxels[MANY - 2] = 1;
    let directions = "(1,0,0) (0,1,0) (0,0,1) none";
    layered(&path, "1 1 1 100000", directions, &[MANY - 2, MANY - 1], &voxels);
    // Once more if this thread may have been paused meanwhile.
    let is_quick = |_| {
        let start = Instant::now();
        let labels = read();
        assert_eq!([mask(&labels, MANY - 2), mask(&labels, MANY - 1)], [[1u8], [0]]);
        start.elapsed() < Duration::from_secs(20)
    };
    assert!((0..5).any(is_quick), "each layer takes as long as all of them");
}

#[test]
fn a_label_of_other_axes_is_the_same_label() {
    let (grid, object) = (base().grid, object());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("label.nrrd");
    for (axes, flips) in [
        ([2, 0, 1], [false; 3]),
        ([0, 1, 2], [true, false, true]),
        ([1, 2, 0], [true, true, false]),
    ] {
        let size = axes.map(|a| grid.size[a]);
        let mut affine = Affine([[0.0; 4]; 3]);
        for r in 0..3 {
            affine.0[r][3] = grid.affine.0[r][3];
            for a in 0..3 {
                let (step, last) = (grid.affine.0[r][axes[a]], size[a] as f64 - 1.0);
                affine.0[r][a] = if flips[a] { -step } else { step };
                affine.0[r][3] += if flips[a] { step * last } else { 0.0 };
            }
        }
        let mut values = vec![];
        for k in 0..size[2] {
            for j in 0..size[1] {
                for i in 0..size[0] {
                    let mut at = [0; 3];
                    for (a, v) in [i, j, k].into_iter().enumerate() {
                        at[axes[a]] = if flips[a] { size[a] - 1 - v } else { v };
                    }
                    values.push(object[(at[0] * grid.size[1] + at[1]) * grid.size[2] + at[2]]);
                }
            }
        }
        nrrd(&path, size, &affine, &values);
        assert!(
            Labels::read(&path, &grid).unwrap().mask(&TargetLabel::Any).unwrap() == object,
            "{axes:?} {flips:?}"
        );
        let out = metrics(&case("base/label.nii.gz"), &path).with("--json").output();
        let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(json["dice"], 1.0);
        // Half a voxel off is another place.
        affine.0[0][3] += 0.5 * grid.spacing()[0];
        nrrd(&path, size, &affine, &values);
        assert!(
            Labels::read(&path, &grid)
                .err()
                .unwrap()
                .to_string()
                .contains("resample it onto the scan")
        );
    }
}

#[test]
fn data_sets_of_nnunet_and_of_several_channels_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let nnunet = case("nnunet-v2-dataset");
    let cases = list(&nnunet, None).unwrap();
    assert_eq!(cases.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["case_001", "case_002"]);
    assert!(
        cases[0].image.ends_with("imagesTr/case_001_0000.nii.gz")
            && cases[0].label.ends_with("labelsTr/case_001.nii.gz")
    );
    // Train and judge, through the commands; a run's model is judged on what it was trained for.
    let (model, run) = (at("m.safetensors"), at("run"));
    Weights::hashed(tiny(), "cases").save(&model, Precision::F32).unwrap();
    let trained = train(&model, &run).file("--data", &nnunet).with(ONE_STEP);
    let trained = trained.with("--target 1 --channel 0").output();
    assert!(trained.status.success(), "{}", String::from_utf8_lossy(&trained.stderr));
    let last = run.join("last.safetensors");
    let judged = eval(&last, &nnunet, &at("out")).with("--protocol plain --iterations 1").output();
    let said = String::from_utf8(judged.stderr).unwrap();
    assert!(
        judged.status.success()
            && said.contains("--target 1 is used")
            && said.contains("was trained on 1 of these 2 cases"),
        "{said}"
    );
    // Two channels: one has to be picked.
    for name in ["imagesTr", "labelsTr"] {
        std::fs::create_dir_all(at("two").join(name)).unwrap();
    }
    let copy = |from: &str, to: &str| std::fs::copy(nnunet.join(from), at("two").join(to)).unwrap();
    copy("labelsTr/case_001.nii.gz", "labelsTr/case_001.nii.gz");
    for channel in ["0000", "0001"] {
        copy("imagesTr/case_001_0000.nii.gz", &format!("imagesTr/case_001_{channel}.nii.gz"));
    }
    assert!(
        list(&at("two"), None)
            .unwrap_err()
            .to_string()
            .contains("channels 0, 1: select one with --channel")
    );
    assert!(list(&at("two"), Some(1)).unwrap()[0].image.ends_with("case_001_0001.nii.gz"));
    assert!(list(&at("two"), Some(2)).unwrap_err().to_string().contains("no channel 2"));
    // One file of several volumes, as the decathlon has them, and their description in its JSON.
    std::fs::create_dir_all(at("msd")).unwrap();
    std::fs::copy(case("nrrd-4d-of-itk/sitk4d.nrrd"), at("msd/a.nrrd")).unwrap();
    std::fs::copy(case("base/label.nii.gz"), at("msd/a_label.nii.gz")).unwrap();
    for odd in [
        r#"{"modality": "CT", "training""#,
        r#"{"modality": {"0": "CT"}, "channel_names": {"1": "T1w"}, "training""#,
    ] {
        std::fs::write(
            at("msd/dataset.json"),
            format!(r#"{odd}: [{{"image": "a.nrrd", "label": "a_label.nii.gz"}}]}}"#),
        )
        .unwrap();
        assert_eq!(
            list(&at("msd"), Some(1)).unwrap()[0].modality,
            odd.contains("T1w").then_some(Modality::Mr)
        );
    }
    std::fs::copy(at("msd/a.nrrd"), at("two/imagesTr/CASE_002_0000.NRRD")).unwrap();
    std::fs::copy(case("base/label.nii.gz"), at("two/labelsTr/CASE_002.Nii.GZ")).unwrap();
    assert_eq!(list(&at("two"), Some(0)).unwrap()[0].name, "CASE_002");
    let json = r#"{"modality": {"0": "CT", "1": "T1w"}, "training": [{"image": "a.nrrd", "label": "a_label.nii.gz"}]}"#;
    std::fs::write(at("msd/dataset.json"), json).unwrap();
    let error =
        list(&at("msd"), None).unwrap()[0].read(&TargetLabel::Any).err().unwrap().to_string();
    assert!(error.contains("select one with --channel 0 to 1"), "{error}");
    let cases = list(&at("msd"), Some(1)).unwrap();
    let loaded = cases[0].read(&TargetLabel::Any).unwrap();
    assert!(
        loaded.image.values() == base().values()
            && loaded.image.description.modality == Some(Modality::Mr)
    );
}

#[test]
fn metrics_say_what_was_compared() {
    let (label, several, empty) = (
        case("base/label.nii.gz"),
        case("mask-of-several-labels/organ_tumour.nii.gz"),
        case("mask-empty-with-a-point/empty.nii.gz"),
    );
    let run = |truth: &Path, prediction: &Path, more: &str| {
        let out = metrics(truth, prediction).with("--json").with(more).output();
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(out.status.success(), "{said}");
        (serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap(), said)
    };
    // A mask of 1 against label 2 of the truth.
    let (json, said) = run(&several, &label, "--target 2");
    assert!(
        json["dice"] == 1.0 && said.contains("its only label, 1, is compared with label 2"),
        "{said}"
    );
    let (json, said) = run(&several, &several, "--target 2 --prediction-target 1");
    assert!(json["dice"] == 0.0 && said.is_empty(), "{said}");
    let (json, said) = run(&several, &several, "--target 5");
    assert!(
        json["dice"] == 1.0 && said.matches("no voxel has label 5: it holds [1, 2]").count() == 2,
        "{said}"
    );
    let (_, said) = run(&several, &several, "");
    assert!(said.contains("--target selects one"), "{said}");
    let (json, said) = run(&empty, &empty, "");
    assert!(
        json["dice"] == 1.0 && json["nsd_mm"]["5"] == 1.0 && json["hausdorff_95_mm"] == 0.0,
        "{json}"
    );
    assert!(said.contains("no voxel is marked"), "{said}");
    let (json, _) = run(&label, &empty, "");
    assert!(
        json["dice"] == 0.0 && json["nsd_mm"]["5"] == 0.0 && json["hausdorff_95_mm"].is_null(),
        "{json}"
    );
    let (json, said) = run(&label, &case("mask-with-nan/nan.nii.gz"), "");
    assert!(json["dice"] == 1.0 && said.contains("hold no number"), "{said}");
    let (json, said) = run(&case("cropped.seg.nrrd"), &label, "--target tumour");
    assert!(
        json["dice"] == 1.0 && said.contains("its only label, 1, is compared with label tumour"),
        "{said}"
    );
    let (json, _) = run(&label, &case("two_layers.seg.nrrd"), "--prediction-target tumour");
    assert_eq!(json["dice"], 1.0);
    // A file is read once: input from a pipe cannot be read again.
    #[cfg(unix)]
    {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe.seg.nrrd");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let to = pipe.clone();
        let bytes = std::fs::read(case("two_layers.seg.nrrd")).unwrap();
        let writer = std::thread::spawn(move || std::fs::write(to, bytes));
        let (json, _) = run(&label, &pipe, "--prediction-target tumour");
        assert_eq!(json["dice"], 1.0);
        writer.join().unwrap().unwrap();
    }
}

#[test]
fn layers_are_taken_apart_whether_their_axis_stands_first_or_last() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layers.seg.nrrd");
    let size = [40usize, 30, 20];
    let voxels: usize = size.iter().product();
    // A value that identifies voxel and layer.
    let value = |voxel: usize, layer: usize| ((7 * voxel + 1000 * layer) % 60_000) as u16;
    let space = "(1,0,0) (0,1,0) (0,0,1)";
    let pairs: String = (0..3)
        .map(|n| {
            let picked = value(100, n);
            format!(
                "Segment{n}_Name:=s{n}\nSegment{n}_Layer:={n}\nSegment{n}_LabelValue:={picked}\n"
            )
        })
        .collect();
    for (sizes, directions, first) in [
        ("3 40 30 20", format!("none {space}"), true),
        ("40 30 20 3", format!("{space} none"), false),
    ] {
        let header = format!(
            "NRRD0004\ntype: ushort\ndimension: 4\nspace: LPS\nsizes: {sizes}\n\
             space directions: {directions}\nendian: little\nencoding: raw\n{pairs}\n"
        );
        let values: Vec<u8> = (0..3 * voxels)
            .map(|at| if first { value(at / 3, at % 3) } else { value(at % voxels, at / voxels) })
            .flat_map(u16::to_le_bytes)
            .collect();
        std::fs::write(&path, [header.as_bytes(), &values].concat()).unwrap();
        let place = |[i, j, k]: [usize; 3]| i + size[0] * (j + size[1] * k);
        let scan = Volume::read(&path, Some(0)).unwrap();
        let labels = Labels::read(&path, &scan.grid).unwrap();
        for n in 0..3 {
            let layer = Volume::read(&path, Some(n)).unwrap();
            let mask = labels.mask(&TargetLabel::Name(format!("s{n}"))).unwrap();
            for (at, marked) in mask.iter().enumerate() {
                let voxel = [at / size[2] / size[1], at / size[2] % size[1], at % size[2]];
                let expected = value(place(voxel), n);
                assert_eq!(layer.at(voxel), f32::from(expected), "layer {n}, {voxel:?}, {sizes}");
                assert_eq!(*marked == 1, expected == value(100, n), "layer {n}, {voxel:?}");
            }
        }
    }
}
