//! Metrics against DeepMind's surface-distance, and the evaluation protocol.

use crate::common;

use common::{here, shared, tiny, tiny_model};
use prism::data::cases::{Case, TargetLabel};
use prism::eval::kept::{FILE, Kept, KeptError, Record, Settings, Source};
use prism::eval::metrics::{Metrics, Surfaces, dice};
use prism::eval::protocol::{NAMES, Place, Plan, Protocol, Way, run, sides};
use prism::eval::report::{Results, csv, file_names, json, markdown};
use prism::eval::result::{CaseResult, Steered};
use prism::model::{Config, Weights, weights::Precision};
use prism::volume::labels::Labels;
use prism::volume::{Affine, Grid, Volume, write_mask};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

fn close(what: &str, got: f64, want: &Value) {
    let want = want.as_str().map_or_else(|| want.as_f64().unwrap(), |s| s.parse().unwrap());
    let same = got == want
        || (got.is_nan() && want.is_nan())
        || (got - want).abs() <= 1e-9 * want.abs().max(1e-3);
    assert!(same, "{what}: {got}, expected {want}");
}

/// Compares everything that a case of `expected.json` records for two masks.
fn compare(name: &str, case: &Value, truth: &[u8], prediction: &[u8], grid: &Grid) {
    let surfaces = Surfaces::of(truth, prediction, grid);
    for (key, want) in case.as_object().unwrap() {
        let what = format!("{name} {key}");
        let near = |i: usize, t: f64| {
            let list = if i == 0 { &surfaces.to_prediction } else { &surfaces.to_truth };
            list.iter().filter(|d| d.0 <= t).map(|d| d.1).sum::<f64>()
                / list.iter().map(|d| d.1).sum::<f64>()
        };
        match key.as_str() {
            "dice" => close(&what, dice(truth, prediction), want),
            "hd95" => close(&what, surfaces.hausdorff(95.0), want),
            "hd100" => close(&what, surfaces.hausdorff(100.0), want),
            "asd_gt_to_pred" => close(&what, surfaces.average()[0], want),
            "asd_pred_to_gt" => close(&what, surfaces.average()[1], want),
            "area_gt_mm2" => close(&what, surfaces.areas()[0], want),
            "area_pred_mm2" => close(&what, surfaces.areas()[1], want),
            "n_gt" => assert_eq!(
                truth.iter().filter(|v| **v != 0).count() as u64,
                want.as_u64().unwrap(),
                "{what}"
            ),
            "overlap_1mm" => (0..2).for_each(|i| close(&what, near(i, 1.0), &want[i])),
            "overlap_2mm" => (0..2).for_each(|i| close(&what, near(i, 2.0), &want[i])),
            k if k.starts_with("nsd_") => {
                close(&what, surfaces.nsd(k[4..5].parse().unwrap()), want)
            }
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
        let read = |i: usize| {
            Labels::read(&path(i), &truth.grid).unwrap().mask(&TargetLabel::Any).unwrap()
        };
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
    let cube =
        |edge: usize| -> Vec<u8> { (0..1_000_000).map(|v| u8::from(v / 10_000 < edge)).collect() };
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
        let go = |place, seed| {
            run(&model, &image, &label, "lung", &protocol, Plan { place, iterations: 3, seed })
                .unwrap()
        };
        let steers = matches!(protocol.way, Way::Steer { .. });
        for place in if steers { vec![Place::Scan] } else { vec![Place::Scan, Place::Patch] } {
            let (a, b) = (go(place, 1), go(place, 1));
            assert_eq!(a.dice, b.dice, "{name}");
            assert!(a.dice.len() == 3 && a.windows == 1 && a.mask == b.mask);
            assert_eq!(a.steered.is_some(), steers);
            // Even an untrained network is steered.
            for s in a.steered.iter() {
                assert!(
                    s.obeyed == s.said
                        && s.held == s.said
                        && s.nsd_2.len() == 3
                        && s.seconds.len() == 3,
                    "{name}: {s:?}"
                );
            }
        }
    }
    assert!(
        matches!(Protocol::named("basic", Some(100)).unwrap().way, Way::Paper(user) if user.points == [100, 100])
    );
    assert!(Protocol::named("deluxe", None).is_none());
}

#[test]
fn an_object_larger_than_a_patch_is_seen_through_overlapping_windows() {
    let (image, label) = example();
    let model = tiny_model(Config { spacing: 0.3, ..tiny() }, 2);
    let protocol = Protocol::named("basic", None).unwrap();
    let result = run(
        &model,
        &image,
        &label,
        "lung",
        &protocol,
        Plan { place: Place::Patch, iterations: 2, seed: 0 },
    )
    .unwrap();
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
    let case = |name: &str| {
        run(
            &model,
            &image,
            &label,
            name,
            &protocol,
            Plan { place: Place::Scan, iterations: 2, seed: 0 },
        )
        .unwrap()
    };
    let results = [Results { protocol: "plain-b-1".into(), cases: vec![case("a"), case("b")] }];
    let table = markdown(&results, "about");
    assert!(
        table.contains("| plain-b-1 | 2 |") && table.contains(" ± ") && table.contains("| a | "),
        "{table}"
    );
    let rows = csv(&results).unwrap();
    assert!(
        rows.starts_with("protocol,case,ml,windows,nsd_first,nsd,hausdorff_95,dice_1,dice_2\n")
            && rows.lines().count() == 3,
        "{rows}"
    );
    let report = json(&results, serde_json::json!({}));
    let mean = (results[0].cases[0].dice[1] + results[0].cases[1].dice[1]) / 2.0;
    assert!((report["results"][0]["dice"][1]["mean"].as_f64().unwrap() - mean).abs() < 1e-12);
}

/// The tiny network and a list of cases, each a copy of the example scan.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new(cases: &[&str]) -> Bench {
        let bench = Bench(tempfile::tempdir().unwrap());
        bench.model("eval");
        let mut list = "image,label,name\n".to_string();
        for (n, name) in cases.iter().enumerate() {
            for kind in ["image", "label"] {
                std::fs::copy(
                    here(&format!("examples/data/lung1_{kind}.nii.gz")),
                    bench.at(&format!("{n}_{kind}.nii.gz")),
                )
                .unwrap();
            }
            list += &format!("{n}_image.nii.gz,{n}_label.nii.gz,{name}\n");
        }
        std::fs::write(bench.at("data.csv"), list).unwrap();
        bench
    }

    fn model(&self, salt: &str) {
        Weights::hashed(tiny(), salt).save(&self.at("m.safetensors"), Precision::F32).unwrap();
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs `prism eval`. Its exit code is `want`; returns its standard error.
    #[track_caller]
    fn eval(&self, out: &str, want: i32, more: &[&str]) -> String {
        let [model, data, out] = ["m.safetensors", "data.csv", out].map(|n| self.at(n));
        let mut command = Command::new(env!("CARGO_BIN_EXE_prism"));
        command
            .arg("eval")
            .arg("-m")
            .arg(model)
            .arg("-d")
            .arg(data)
            .arg("-o")
            .arg(&out)
            .args(["--threads", "2"])
            .args(more);
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(
            output.status.code() == Some(want) && !said.contains("panicked"),
            "{:?}: {said}",
            output.status
        );
        if want == 0 {
            assert_eq!(
                String::from_utf8(output.stdout).unwrap(),
                std::fs::read_to_string(out.join("results.md")).unwrap()
            );
        }
        said
    }

    /// The reports of a finished evaluation.
    fn reports(&self, out: &str) -> Vec<Vec<u8>> {
        ["cases.csv", "results.json", "results.md", "iterations.svg"]
            .map(|n| std::fs::read(self.at(out).join(n)).unwrap())
            .to_vec()
    }

    /// The file of results in their order.
    fn kept(&self, out: &str) -> Vec<u8> {
        std::fs::read(self.at(out).join(FILE)).unwrap()
    }
}

fn lines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|b| **b == b'\n').count()
}

#[test]
fn an_evaluation_goes_on_to_the_reports_of_one_that_was_not_stopped() {
    let bench = Bench::new(&["a", "b", "c"]);
    let args = ["--protocol", "plain-b-1,ultra", "--iterations", "2"];
    let said = bench.eval("whole", 0, &args);
    assert!(!said.contains("reused"), "{said}");
    let whole = bench.reports("whole");
    // A case that cannot be read counts as not done.
    let scan = std::fs::read(bench.at("1_image.nii.gz")).unwrap();
    std::fs::write(bench.at("1_image.nii.gz"), b"torn").unwrap();
    let said = bench.eval("out", 0, &args);
    assert!(said.contains("skipped b") && said.contains("1 of 3 cases were skipped"), "{said}");
    assert!(lines(&bench.kept("out")) == 5 && bench.reports("out") != whole);
    std::fs::write(bench.at("1_image.nii.gz"), scan).unwrap();
    let said = bench.eval("out", 0, &args);
    assert!(said.contains("reused: 4 of 6 results (3 cases, 2 protocols)"), "{said}");
    assert!(bench.reports("out") == whole);
    // What a power cut may leave: half a line.
    let kept = bench.kept("out");
    std::fs::write(bench.at("out").join(FILE), &kept[..kept.len() - 10]).unwrap();
    std::fs::remove_file(bench.at("out/results.json")).unwrap();
    let said = bench.eval("out", 0, &args);
    assert!(
        said.contains("damaged lines: 1;") && said.contains("reused: 5 of 6 results"),
        "{said}"
    );
    assert!(bench.reports("out") == whole && bench.kept("out") == kept);
    // Nothing is left to do.
    std::fs::remove_file(bench.at("out/results.md")).unwrap();
    let said = bench.eval("out", 0, &args);
    assert!(said.contains("reused: 6 of 6 results"), "{said}");
    assert!(bench.reports("out") == whole && bench.kept("out") == kept);
    // Times are those of the run that took them.
    let args = ["--protocol", "click", "--iterations", "2", "--cases", "a,c"];
    bench.eval("timed", 0, &args);
    let timed = bench.reports("timed");
    let said = bench.eval("timed", 0, &args);
    assert!(said.contains("reused: 2 of 2 cases") && bench.reports("timed") == timed, "{said}");
}

#[test]
fn results_of_other_settings_are_never_mixed() {
    let bench = Bench::new(&["a", "b"]);
    let usual = ["--protocol", "plain-b-1", "--iterations", "1"];
    bench.eval("out", 0, &usual);
    let kept = bench.kept("out");
    for (args, words) in [
        (vec!["--protocol", "plain-b-1", "--iterations", "2"], "iterations (1 then, 2 now)"),
        (
            vec!["--protocol", "plain", "--iterations", "1"],
            r#"protocol (["plain-b-1"] then, ["plain"] now)"#,
        ),
        ([&usual[..], &["--seed", "3"]].concat(), "seed (0 then, 3 now)"),
        ([&usual[..], &["--points", "4"]].concat(), "points (none then, 4 now)"),
        ([&usual[..], &["--on", "patch"]].concat(), "on (scan then, patch now)"),
        (
            [&usual[..], &["--target", "1", "--sides"]].concat(),
            "sides (false then, true now), target (any then, 1 now)",
        ),
        ([&usual[..], &["--cases", "b"]].concat(), "cases (2 then, 1 now; without a)"),
    ] {
        let said = bench.eval("out", 2, &args);
        assert!(said.contains(words) && said.contains("--fresh"), "{args:?}: {said}");
    }
    bench.model("another");
    let said = bench.eval("out", 2, &usual);
    assert!(said.contains("model (its file has changed)") && bench.kept("out") == kept, "{said}");
    let said = bench.eval("out", 0, &[&usual[..], &["--fresh"]].concat());
    assert!(!said.contains("reused") && lines(&bench.kept("out")) == 3, "{said}");
    // A file of that name with other contents.
    std::fs::write(bench.at("out").join(FILE), "a poem\n").unwrap();
    let said = bench.eval("out", 1, &usual);
    assert!(
        said.contains("no settings of an evaluation") && bench.kept("out") == b"a poem\n",
        "{said}"
    );
}

#[test]
fn a_case_whose_label_has_changed_is_computed_again() {
    let bench = Bench::new(&["a", "b"]);
    let args = ["--protocol", "plain-b-1", "--iterations", "2"];
    bench.eval("out", 0, &args);
    let before = bench.reports("out");
    let (image, mut mask) = example();
    let marked: Vec<usize> = (0..mask.len()).filter(|v| mask[*v] != 0).collect();
    marked[marked.len() / 2..].iter().for_each(|v| mask[*v] = 0);
    write_mask(&bench.at("1_label.nii.gz"), &image, &mask).unwrap().commit().unwrap();
    let said = bench.eval("out", 0, &args);
    assert!(
        said.contains("their files have changed: b\n") && said.contains("reused: 1 of 2 cases"),
        "{said}"
    );
    bench.eval("anew", 0, &args);
    assert!(bench.reports("out") != before && bench.reports("out") == bench.reports("anew"));
    // The later line counts.
    let said = bench.eval("out", 0, &args);
    assert!(said.contains("reused: 2 of 2 cases") && lines(&bench.kept("out")) == 4, "{said}");
}

#[test]
fn masks_of_cases_whose_names_are_alike_are_files_of_their_own() {
    let bench = Bench::new(&["a b", "a_b"]);
    let masks = bench.at("masks");
    let args = ["--protocol", "plain-b-1", "--iterations", "1", "--masks", masks.to_str().unwrap()];
    let names = || {
        let entries = std::fs::read_dir(&masks).unwrap();
        let mut names: Vec<String> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    // Results without masks are no reason not to write masks.
    bench.eval("out", 0, &args[..4]);
    bench.eval("out", 0, &args);
    let written = names();
    assert!(
        written.len() == 2
            && written[0].starts_with("a_b-")
            && written[1] == "a_b_plain-b-1.nii.gz",
        "{written:?}"
    );
    let said = bench.eval("out", 0, &args);
    assert!(said.contains("reused: 2 of 2 cases"), "{said}");
    std::fs::remove_file(masks.join(&written[0])).unwrap();
    let said = bench.eval("out", 0, &args);
    assert!(
        said.contains("masks are missing: a b\n") && said.contains("reused: 1 of 2 cases"),
        "{said}"
    );
    assert_eq!(names(), written);

    let files = |cases: &[&str]| file_names(cases.iter().copied());
    assert_eq!(
        files(&["a", "b c", "d, e"]).unwrap().into_values().collect::<Vec<_>>(),
        ["a", "b_c", "d__e"]
    );
    let alike = files(&["x y", "x,y", "x/y", "x_y", "X_y"]).unwrap();
    let mut distinct: Vec<String> = alike.values().map(|f| f.to_lowercase()).collect();
    distinct.sort();
    distinct.dedup();
    assert!(
        distinct.len() == 5
            && alike["x_y"] == "x_y"
            && alike.values().all(|f| !f.contains(['/', ' ', ','])),
        "{alike:?}"
    );
    let error = files(&["x y", "x_y", alike["x y"].as_str()]).unwrap_err();
    assert!(error.contains("'x y'") && error.contains(&format!("'{}'", alike["x y"])), "{error}");
}

#[test]
fn numbers_that_are_kept_are_those_that_were_measured() {
    let folder = tempfile::tempdir().unwrap();
    let [image, label] =
        ["image", "label"].map(|n| here(&format!("examples/data/lung1_{n}.nii.gz")));
    let case = Case { name: "a".into(), image, label, volume: None, modality: None };
    let settings = Settings::from([("seed".to_string(), Value::from(u64::MAX))]);
    let dice: Vec<f64> = (0..5000).map(|n| (f64::from(n) + 0.1).sqrt() / 77.0).collect();
    let metrics = Metrics { dice: 0.1 + 0.2, nsd: 1.0 / 3.0, hausdorff_95: f64::INFINITY };
    // A network whose weights are NaN has scores that are NaN.
    let steered = Steered {
        scores: vec![[f64::NAN, 0.7]],
        expected_off: vec![f64::NAN],
        seconds: dice.clone(),
        ..Default::default()
    };
    let result = CaseResult {
        case: "a".into(),
        ml: 1e-7 / 3.0,
        dice: dice.clone(),
        first: metrics,
        last: metrics,
        windows: 3,
        steered: Some(steered),
        mask: vec![],
    };
    let record = Record {
        case: "a".into(),
        protocol: "click".into(),
        source: Source::of(&case),
        scan: "treated as CT".into(),
        masks: None,
        results: vec![result],
    };
    let open = || Kept::open(folder.path(), &settings, false).unwrap();
    open().add(record.clone()).unwrap();
    let kept = open();
    let got = kept.get("a", "click").unwrap();
    assert!(
        got.source == Source::of(&case) && kept.get("a", "basic").is_none() && kept.dropped() == 0
    );
    let (got, want) = (&got.results[0], &record.results[0]);
    assert_eq!((got.first, got.last, got.ml), (metrics, metrics, want.ml));
    let bits = |values: &[f64]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(
        (bits(&got.dice), bits(&got.steered.as_ref().unwrap().seconds)),
        (bits(&dice), bits(&dice))
    );
    let reports = |case: &CaseResult| {
        let results = [Results { protocol: "click".into(), cases: vec![case.clone()] }];
        (
            csv(&results).unwrap(),
            markdown(&results, "about"),
            json(&results, Value::Null).to_string(),
        )
    };
    assert_eq!(reports(got), reports(want));
    // A damaged line inside is dropped; other settings are an error that names them.
    let path = folder.path().join(FILE);
    let text = std::fs::read_to_string(&path).unwrap();
    let (head, line) = text.split_once('\n').unwrap();
    std::fs::write(&path, format!("{head}\n\u{0}\u{0}\n{line}")).unwrap();
    let kept = open();
    assert!(kept.dropped() == 1 && kept.get("a", "click").is_some());
    let other = Kept::open(folder.path(), &Settings::new(), false);
    assert!(
        matches!(other, Err(KeptError::Settings { differences, .. }) if differences == [format!("seed ({} then, none now)", u64::MAX)])
    );
}
