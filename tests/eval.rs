//! Metrics against DeepMind's surface-distance, and the evaluation protocol.

mod common;

use common::{here, shared, tiny, tiny_model};
use prism::data::cases::TargetLabel;
use prism::eval::metrics::{Surfaces, dice};
use prism::eval::protocol::{NAMES, Place, Plan, Protocol, Way, run, sides};
use prism::eval::report::{Results, csv, json, markdown};
use prism::model::Config;
use prism::volume::labels::Labels;
use prism::volume::{Affine, Grid, Volume};
use serde_json::Value;
use std::path::PathBuf;
use std::sync::Arc;

fn close(what: &str, got: f64, want: &Value) {
    let want = want.as_str().map_or_else(|| want.as_f64().unwrap(), |s| s.parse().unwrap());
    let same = got == want || (got.is_nan() && want.is_nan()) || (got - want).abs() <= 1e-9 * want.abs().max(1e-3);
    assert!(same, "{what}: {got}, expected {want}");
}

/// Compares everything that a case of `expected.json` says of two masks.
fn compare(name: &str, case: &Value, truth: &[u8], prediction: &[u8], grid: &Grid) {
    let surfaces = Surfaces::of(truth, prediction, grid);
    for (key, want) in case.as_object().unwrap() {
        let what = format!("{name} {key}");
        let near = |i: usize, t: f64| {
            let list = if i == 0 { &surfaces.to_prediction } else { &surfaces.to_truth };
            list.iter().filter(|d| d.0 <= t).map(|d| d.1).sum::<f64>() / list.iter().map(|d| d.1).sum::<f64>()
        };
        match key.as_str() {
            "dice" => close(&what, dice(truth, prediction), want),
            "hd95" => close(&what, surfaces.hausdorff(95.0), want),
            "hd100" => close(&what, surfaces.hausdorff(100.0), want),
            "asd_gt_to_pred" => close(&what, surfaces.average()[0], want),
            "asd_pred_to_gt" => close(&what, surfaces.average()[1], want),
            "area_gt_mm2" => close(&what, surfaces.areas()[0], want),
            "area_pred_mm2" => close(&what, surfaces.areas()[1], want),
            "n_gt" => assert_eq!(truth.iter().filter(|v| **v != 0).count() as u64, want.as_u64().unwrap(), "{what}"),
            "overlap_1mm" => (0..2).for_each(|i| close(&what, near(i, 1.0), &want[i])),
            "overlap_2mm" => (0..2).for_each(|i| close(&what, near(i, 2.0), &want[i])),
            k if k.starts_with("nsd_") => close(&what, surfaces.nsd(k[4..5].parse().unwrap()), want),
            _ => {}
        }
    }
}

#[test]
fn surface_distances_of_experts_outlines() {
    let Some(folder) = shared("data") else { return };
    let text = std::fs::read_to_string(folder.join("nsd/expected.json")).unwrap();
    let cases: Value = serde_json::from_str(&text).unwrap();
    let mut compared = 0;
    for (name, case) in cases.as_object().unwrap() {
        let Some(files) = case["files"].as_array() else { continue };
        let path = |i: usize| -> PathBuf {
            let file = files[i].as_str().unwrap();
            match file.split_once("lidc_0314_crop/") {
                Some((_, label)) => folder.join("lidc_0314_crop").join(label),
                None => folder.join("nsd").join(file),
            }
        };
        let truth = Volume::read(&path(0), None).unwrap();
        let read = |i: usize| Labels::read(&path(i), &truth.grid).unwrap().mask(&TargetLabel::Any).unwrap();
        compare(name, case, &read(0), &read(1), &truth.grid);
        compared += 1;
    }
    assert!(compared >= 14, "{compared}");
}

#[test]
fn surface_distances_of_toys() {
    // The two cases that surface-distance's own tests print.
    let grid = |size, spacing| Grid { size, affine: Affine::from_spacing(spacing) };
    let (size, mut a, mut b) = ([128; 3], vec![0u8; 128 * 128 * 128], vec![0u8; 128 * 128 * 128]);
    a[(50 * 128 + 60) * 128 + 70] = 1;
    b[(50 * 128 + 60) * 128 + 72] = 1;
    let case = serde_json::json!({"dice": 0.0, "asd_gt_to_pred": 1.5, "asd_pred_to_gt": 1.5, "hd95": 2.0, "hd100": 2.0, "area_gt_mm2": 7.0, "nsd_1mm": 0.5, "nsd_2mm": 1.0});
    compare("two voxels", &case, &a, &b, &grid(size, [3.0, 2.0, 1.0]));
    let cube = |edge: usize| -> Vec<u8> { (0..1_000_000).map(|v| u8::from(v / 10_000 < edge)).collect() };
    let case = serde_json::json!({
        "dice": 0.9900990099009901, "asd_gt_to_pred": 0.32244707267666795, "asd_pred_to_gt": 0.3393962930605405, "hd95": 2.0,
        "area_gt_mm2": 59575.66877731504, "area_pred_mm2": 60373.325631564534, "nsd_1mm": 0.8361450084979621, "nsd_2mm": 1.0,
    });
    compare("cubes", &case, &cube(50), &cube(51), &grid([100; 3], [2.0, 1.0, 1.0]));
    // Empty masks: nothing to measure, or everything wrong.
    let (none, one) = (vec![0u8; 64], (0..64).map(|v| u8::from(v == 21)).collect::<Vec<_>>());
    let small = grid([4; 3], [1.0; 3]);
    let wrong = Surfaces::of(&one, &none, &small);
    assert!(wrong.nsd(5.0) == 0.0 && wrong.hausdorff(95.0).is_infinite());
    assert!(Surfaces::of(&none, &none, &small).nsd(5.0) == 1.0 && dice(&none, &none) == 1.0);
}

fn example() -> (Arc<Volume>, Vec<u8>) {
    let image = Volume::read(&here("examples/data/lung1_image.nii.gz"), None).unwrap();
    let labels = Labels::read(&here("examples/data/lung1_label.nii.gz"), &image.grid).unwrap();
    (Arc::new(image), labels.mask(&TargetLabel::Any).unwrap())
}

#[test]
fn every_protocol_runs_and_the_same_seed_gives_the_same_numbers() {
    let (image, label) = example();
    let model = tiny_model(Config { fit: Some(2.0), ..tiny() }, 2);
    for name in NAMES {
        let protocol = Protocol::named(name, None).unwrap();
        let go = |place, seed| run(&model, &image, &label, "lung", &protocol, Plan { place, iterations: 3, seed }).unwrap();
        let steers = matches!(protocol.way, Way::Steer { .. });
        for place in if steers { vec![Place::Scan] } else { vec![Place::Scan, Place::Patch] } {
            let (a, b) = (go(place, 1), go(place, 1));
            assert_eq!(a.dice, b.dice, "{name}");
            assert!(a.dice.len() == 3 && a.windows == 1 && a.mask == b.mask);
            assert_eq!(a.steered.is_some(), steers);
            // Even a network that knows nothing is steered.
            for s in a.steered.iter() {
                assert!(s.obeyed == s.said && s.held == s.said && s.nsd_2.len() == 3 && s.seconds.len() == 3, "{name}: {s:?}");
            }
        }
    }
    assert!(matches!(Protocol::named("basic", Some(100)).unwrap().way, Way::Paper(user) if user.points == [100, 100]));
    assert!(Protocol::named("deluxe", None).is_none());
}

#[test]
fn an_object_larger_than_a_patch_is_seen_through_overlapping_windows() {
    let (image, label) = example();
    let model = tiny_model(Config { spacing: 0.3, ..tiny() }, 2);
    let protocol = Protocol::named("basic", None).unwrap();
    let result = run(&model, &image, &label, "lung", &protocol, Plan { place: Place::Patch, iterations: 2, seed: 0 }).unwrap();
    assert!(result.windows > 1, "{} windows", result.windows);
    assert!(result.mask.len() > 32 * 32 * 32 && result.dice.len() == 2);
}

#[test]
fn sides_are_the_patients() {
    // Two objects along i; the affine runs from right to left, as scanners store scans.
    let label: Vec<u8> = (0..1000).map(|v| u8::from([2, 7].contains(&(v / 100)))).collect();
    let affine = Affine([[-1.0, 0.0, 0.0, 9.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]);
    let parts = sides(&label, &Grid { size: [10; 3], affine });
    assert_eq!(parts.iter().map(|p| p.0).collect::<Vec<_>>(), ["left", "right"]);
    assert_eq!(parts[0].1.iter().position(|v| *v == 1), Some(700));
    assert_eq!(parts[1].1.iter().position(|v| *v == 1), Some(200));
    assert_eq!(sides(&vec![0; 1000], &Grid { size: [10; 3], affine }).len(), 0);
}

#[test]
fn reports_say_what_was_measured() {
    let (image, label) = example();
    let model = tiny_model(Config { fit: Some(2.0), ..tiny() }, 2);
    let protocol = Protocol::named("plain-b-1", None).unwrap();
    let case = |name: &str| run(&model, &image, &label, name, &protocol, Plan { place: Place::Scan, iterations: 2, seed: 0 }).unwrap();
    let results = [Results { protocol: "plain-b-1".into(), cases: vec![case("a"), case("b")] }];
    let table = markdown(&results, "about");
    assert!(table.contains("| plain-b-1 | 2 |") && table.contains(" ± ") && table.contains("| a | "), "{table}");
    let rows = csv(&results).unwrap();
    assert!(rows.starts_with("protocol,case,ml,windows,nsd_first,nsd,hausdorff_95,dice_1,dice_2\n") && rows.lines().count() == 3, "{rows}");
    let report = json(&results, serde_json::json!({}));
    let mean = (results[0].cases[0].dice[1] + results[0].cases[1].dice[1]) / 2.0;
    assert!((report["results"][0]["dice"][1]["mean"].as_f64().unwrap() - mean).abs() < 1e-12);
}
