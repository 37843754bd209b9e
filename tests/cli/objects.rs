//! Several objects in one run of `prism segment`, its report of them, and what the program writes
//! about its own commands.

use crate::common;

use common::{here, tiny};
use prism::model::{Weights, weights::Precision};
use prism::volume::labels::{Labels, TargetLabel};
use prism::volume::{Volume, write_mask};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::{Command, Output};

/// A folder with a tiny model, and a scan of 64 x 48 x 24 voxels elsewhere.
struct Place {
    folder: tempfile::TempDir,
    image: Volume,
}

fn scan() -> PathBuf {
    here("tests/data/odd/m00_base.nii.gz")
}

fn prism(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_prism")).args(args).output().unwrap()
}

/// Asserts the exit code, and returns what went to standard error.
#[track_caller]
fn code(out: &Output, want: i32) -> String {
    let error = String::from_utf8(out.stderr.clone()).unwrap();
    assert_eq!(out.status.code(), Some(want), "{error}");
    assert!(!error.contains("panicked"), "{error}");
    error
}

fn text(out: &Output) -> String {
    String::from_utf8(out.stdout.clone()).unwrap()
}

impl Place {
    fn new() -> Place {
        let image = Volume::read(&scan(), None).unwrap();
        let place = Place { folder: tempfile::tempdir().unwrap(), image };
        let model = place.folder.path().join("model.safetensors");
        Weights::hashed(tiny(), "objects").save(&model, Precision::F32).unwrap();
        place
    }

    fn at(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// A mask of a block of voxels, as a file too: given as a prompt it is the answer.
    fn block(&self, name: &str, low: [usize; 3], high: [usize; 3]) -> Vec<u8> {
        let [_, nj, nk] = self.image.grid.size;
        let inside = |at: usize| {
            let v = [at / nk / nj, at / nk % nj, at % nk];
            (0..3).all(|a| (low[a]..high[a]).contains(&v[a]))
        };
        let mask: Vec<u8> = (0..self.image.grid.voxels()).map(|at| u8::from(inside(at))).collect();
        let path = self.folder.path().join(name);
        write_mask(&path, &self.image, &mask).unwrap().commit().unwrap();
        mask
    }

    /// Two blocks that share 5 x 5 x 4 voxels, and the prompts that give them.
    fn overlapping(&self) -> ([Vec<u8>; 2], Value) {
        let tumour = self.block("a.nii.gz", [10, 10, 4], [30, 20, 12]);
        let node = self.block("b.nii.gz", [25, 15, 6], [40, 30, 10]);
        let objects = json!({ "objects": [
            { "name": "tumour", "colour": [255, 0, 51], "iterations": [{ "mask": "a.nii.gz" }] },
            { "name": "node", "iterations": [{ "mask": "b.nii.gz" }] },
        ] });
        ([tumour, node], objects)
    }

    /// Runs `prism segment` on the scan with a prompts file.
    fn segment(&self, prompts: &Value, output: &str, more: &[&str]) -> Output {
        let file = self.at("prompts.json");
        std::fs::write(&file, prompts.to_string()).unwrap();
        let (model, output) = (self.at("model.safetensors"), self.at(output));
        let image = scan().display().to_string();
        let args = ["segment", "-m", &model, "-i", &image, "-o", &output, "--prompts", &file];
        prism(&[&args[..], more].concat())
    }

    /// Runs `prism segment` on the scan with `--json`, which must succeed.
    #[track_caller]
    fn report(&self, prompts: &Value, output: &str, more: &[&str]) -> (Value, String) {
        let out = self.segment(prompts, output, &[more, &["--json"]].concat());
        let error = code(&out, 0);
        (serde_json::from_slice(&out.stdout).unwrap(), error)
    }

    /// The values of a label image here.
    fn labels(&self, name: &str) -> Labels {
        Labels::beside(&self.folder.path().join(name), &self.image).unwrap()
    }
}

#[test]
fn objects_become_one_label_image_and_the_later_one_wins() {
    let place = Place::new();
    let ([tumour, node], prompts) = place.overlapping();
    let values: Vec<u32> =
        tumour.iter().zip(&node).map(|(t, n)| if *n > 0 { 2 } else { u32::from(*t) }).collect();
    for name in ["o.seg.nrrd", "o.nii.gz", "o.nii", "o.nrrd", "o.mha"] {
        let out = place.segment(&prompts, name, &[]);
        let error = code(&out, 0);
        let overlap = "warning: 'node' takes 100 voxels from 'tumour'";
        assert!(error.contains(overlap), "{error}");
        assert!(place.labels(name).joined() == values, "{name}");
        let file = Volume::read(&place.folder.path().join(name), None).unwrap();
        assert_eq!(file.description.element, "uint8", "{name}");
        let said = text(&out);
        for words in ["2 objects, 2400 voxels", "\n1 tumour: 1500 voxels", "\n2 node: 900 voxels"] {
            assert!(said.contains(words), "{said}");
        }
    }
    // 3D Slicer's names and colours.
    let labels = place.labels("o.seg.nrrd");
    for (name, value) in [("tumour", 1), ("node", 2)] {
        let mask = labels.mask(&TargetLabel::Name(name.into())).unwrap();
        assert!(mask.iter().zip(&values).all(|(m, v)| (*m == 1) == (*v == value)), "{name}");
    }
    let bytes = std::fs::read(place.at("o.seg.nrrd")).unwrap();
    let header = String::from_utf8_lossy(&bytes);
    for line in [
        "Segment0_Color:=1 0 0.2\nSegment0_ColorAutoGenerated:=0\n",
        "Segment0_LabelValue:=1\nSegment0_Layer:=0\nSegment0_Name:=tumour\n",
        "Segment1_LabelValue:=2\nSegment1_Layer:=0\nSegment1_Name:=node\n",
    ] {
        assert!(header.contains(line), "{line}");
    }
}

#[test]
fn the_report_holds_the_numbers_of_the_file() {
    let place = Place::new();
    let ([..], prompts) = place.overlapping();
    let (json, error) = place.report(&prompts, "o.nii.gz", &[]);
    assert!(error.contains("'node' takes 100 voxels"), "{error}");
    let counts = place.labels("o.nii.gz").counts();
    let (step, ml) = (place.image.grid.spacing(), place.image.grid.voxel_ml());
    let objects = json["objects"].as_array().unwrap();
    assert_eq!(objects.len(), 2);
    for (at, (name, size)) in [("tumour", [20, 10, 8]), ("node", [15, 15, 4])].iter().enumerate() {
        let (object, label) = (&objects[at], at as u32 + 1);
        assert_eq!((&object["name"], &object["label"]), (&json!(name), &json!(label)));
        assert_eq!(object["voxels"], json!(counts[&label]));
        let volume = object["volume_ml"].as_f64().unwrap();
        assert!((volume - counts[&label] as f64 * ml).abs() < 1e-9, "{volume}");
        for a in 0..3 {
            let extent = object["extent_mm"][a].as_f64().unwrap();
            assert!((extent - size[a] as f64 * step[a]).abs() < 1e-6, "{name}: {extent}");
        }
        assert!(object["seconds"].as_f64().unwrap() >= 0.0 && object["notes"].is_array());
        assert!(object.get("score").is_some());
        assert_eq!(object["iterations"].as_array().unwrap().len(), 1);
    }
    assert_eq!(objects[0]["colour"], json!([255, 0, 51]));
    assert_eq!(
        json["overlaps"],
        json!([{ "object": "node", "takes_from": "tumour", "voxels": 100 }])
    );
    assert_eq!(json["voxels"], json!(counts.values().sum::<usize>()));
    assert_eq!(json["scan"]["shape"], json!(place.image.grid.size));
    assert!((json["scan"]["spacing_mm"][2].as_f64().unwrap() - step[2]).abs() < 1e-9);
    assert!(json["model"].as_str().unwrap().ends_with("model.safetensors"));
    assert_eq!(json["outputs"]["mask"], json!(place.at("o.nii.gz")));
    assert_eq!(json["outputs"]["probability"], json!([]));
    let warnings = json["warnings"].as_array().unwrap();
    assert!(warnings.iter().all(|w| error.contains(w.as_str().unwrap())), "{error}");
    // If only results were asked for, warnings are only in the report.
    let (quiet, error) = place.report(&prompts, "o.nii.gz", &["--quiet"]);
    assert!(error.is_empty() && quiet["warnings"] == json["warnings"], "{error}");
    // A list of iterations is one object, reported as one.
    let (one, _) = place.report(&json!([{ "mask": "a.nii.gz" }]), "o.nii.gz", &[]);
    assert_eq!((&one["voxels"], &one["objects"][0]["name"]), (&json!(1600), &json!("object")));
    assert!(one["iterations"] == one["objects"][0]["iterations"] && one["overlaps"] == json!([]));
    assert_eq!(one["patch"], one["objects"][0]["patch"]);
}

#[test]
fn objects_answer_as_they_do_alone_and_share_what_was_encoded() {
    let place = Place::new();
    let said = json!([{ "box": [20, 15, 8, 44, 33, 14] },
                      { "points": [{ "position": [30, 20, 10], "positive": false }] }]);
    let (alone, _) = place.report(&said, "alone.nii.gz", &[]);
    let twice = json!({ "objects": [{ "name": "once", "iterations": [said[0]] },
                                    { "name": "again", "iterations": said }] });
    let (both, _) = place.report(&twice, "both.nii.gz", &["--probability", &place.at("p.nii.gz")]);
    assert_eq!(both["bytes"]["encoded_scan"], alone["bytes"]["encoded_scan"]);
    assert_eq!(both["objects"][1]["voxels"], alone["voxels"]);
    let own = place.labels("alone.nii.gz").joined();
    let shared = place.labels("both.nii.gz").joined();
    assert!(own.iter().zip(&shared).all(|(one, both)| (*one == 1) == (*both == 2)));
    // An object's probability is its own, whichever object gets the voxels in the end.
    let files = [place.at("p-1.nii.gz"), place.at("p-2.nii.gz")];
    assert_eq!(both["outputs"]["probability"], json!(files));
    let second = Volume::read(files[1].as_ref(), None).unwrap().values();
    assert!(second.iter().zip(&own).all(|(p, one)| (*p > 0.5) == (*one == 1)));
    assert!(!place.folder.path().join("p.nii.gz").exists());
}

/// Input from a pipe can be read only once.
#[cfg(unix)]
#[test]
fn prompts_may_come_from_a_pipe() {
    use std::io::Write;
    use std::process::Stdio;
    let place = Place::new();
    let mask = place.block("a.nii.gz", [10, 10, 4], [30, 20, 12]);
    let (model, output) = (place.at("model.safetensors"), place.at("o.nii.gz"));
    let image = scan().display().to_string();
    let args = ["segment", "-m", &model, "-i", &image, "-o", &output, "--prompts", "/dev/stdin"];
    let mut run = Command::new(env!("CARGO_BIN_EXE_prism"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let prompts = json!([{ "mask": place.at("a.nii.gz") }]);
    // Dropped, and so closed, at once.
    run.stdin.take().unwrap().write_all(prompts.to_string().as_bytes()).unwrap();
    code(&run.wait_with_output().unwrap(), 0);
    let values = place.labels("o.nii.gz").joined();
    assert!(values.iter().zip(&mask).all(|(v, m)| *v == u32::from(*m)));
}

#[test]
fn pictures_and_probabilities_are_a_file_an_object() {
    let place = Place::new();
    let ([tumour, node], mut prompts) = place.overlapping();
    let (probability, preview) = (place.at("p.nrrd"), place.at("p.png"));
    let more = ["--probability", probability.as_str(), "--preview", preview.as_str()];
    code(&place.segment(&prompts, "o.nii.gz", &more), 0);
    for (number, mask) in [(1, &tumour), (2, &node)] {
        let p = Volume::read(place.at(&format!("p-{number}.nrrd")).as_ref(), None).unwrap();
        assert!(p.values().iter().zip(mask).all(|(p, m)| (*p > 0.5) == (*m == 1)), "{number}");
        let png = std::fs::read(place.at(&format!("p-{number}.png"))).unwrap();
        assert_eq!(&png[..8], b"\x89PNG\r\n\x1a\n");
    }
    // A single object has the file that was named, and its name in the label image.
    prompts["objects"].as_array_mut().unwrap().truncate(1);
    code(&place.segment(&prompts, "o.seg.nrrd", &more), 0);
    assert!(place.folder.path().join("p.nrrd").exists());
    let mask = place.labels("o.seg.nrrd").mask(&TargetLabel::Name("tumour".into())).unwrap();
    assert!(mask == tumour);
}

#[test]
fn what_does_not_go_together_is_said_before_anything_is_written() {
    let place = Place::new();
    let (_, prompts) = place.overlapping();
    place.block("p-2.nii.gz", [1, 1, 1], [3, 3, 3]);
    let object = |name: &str, iterations: Value| json!({ "name": name, "iterations": iterations });
    let objects = |list: &[Value]| json!({ "objects": list });
    let click = |i: usize| json!([{ "points": [{ "position": [i, 20, 10] }] }]);
    let clash = objects(&[object("node", click(30)), object("node ", click(20))]);
    let reads_output =
        objects(&[object("a", click(30)), object("b", json!([{ "mask": "p-2.nii.gz" }]))]);
    let probability = place.at("p.nii.gz");
    let probability = ["--probability", probability.as_str()];
    let none: &[&str] = &[];
    for (prompts, more, want, words) in [
        (&clash, none, 1, "two objects are called 'node'"),
        (&objects(&[]), none, 1, "holds 0 objects"),
        (&objects(&[object("a", json!([]))]), none, 1, "no iteration of 'a'"),
        (&objects(&[object("a", click(64))]), none, 1, "'a': iteration 1: point at voxel [64"),
        (&objects(&[object("a", json!([{}]))]), none, 1, "'a': iteration 1 is empty"),
        (&prompts, &["--released"][..], 2, "--released handles a single object"),
        (&reads_output, &probability[..], 2, "p-2.nii.gz is an input"),
    ] {
        let out = place.segment(prompts, "o.nii.gz", more);
        let error = code(&out, want);
        assert!(error.contains(words), "{words}: {error}");
        assert!(out.stdout.is_empty() && !place.folder.path().join("o.nii.gz").exists());
    }
}

#[test]
fn more_objects_than_a_byte_tells_apart_take_two() {
    let place = Place::new();
    let mask = place.block("a.nii.gz", [10, 10, 4], [14, 13, 6]);
    let object =
        |n: usize| json!({ "name": format!("lesion {n}"), "iterations": [{ "mask": "a.nii.gz" }] });
    let prompts = json!({ "objects": (1..=256).map(object).collect::<Vec<_>>() });
    for name in ["o.seg.nrrd", "o.nii.gz"] {
        let (json, _) = place.report(&prompts, name, &["--quiet"]);
        let read = Volume::read(&place.folder.path().join(name), None).unwrap();
        assert_eq!(read.description.element, "uint16", "{name}");
        let values = place.labels(name).joined();
        assert!(values.iter().zip(&mask).all(|(v, m)| *v == 256 * u32::from(*m)), "{name}");
        assert_eq!(json["objects"][255]["voxels"], json!(24));
        assert_eq!(json["objects"][254]["extent_mm"], Value::Null);
        let takes = json!({ "object": "lesion 256", "takes_from": "lesion 255", "voxels": 24 });
        assert_eq!(json["overlaps"][254], takes);
    }
}

/// The commands that `prism -h` lists.
fn commands() -> Vec<String> {
    let help = text(&prism(&["-h"]));
    let list = help.lines().skip_while(|l| !l.starts_with("Commands:")).skip(1);
    let name = |l: &str| l.strip_prefix("  ")?.split(' ').next().map(str::to_string);
    let list = list.take_while(|l| !l.is_empty()).filter_map(name);
    list.filter(|name| !name.is_empty()).collect()
}

#[test]
fn completions_name_every_command() {
    let commands = commands();
    for known in ["segment", "verify", "completions", "man", "help"] {
        assert!(commands.iter().any(|c| c == known), "{known}: {commands:?}");
    }
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let out = prism(&["completions", shell]);
        assert!(code(&out, 0).is_empty(), "{shell}");
        let script = text(&out);
        for name in &commands {
            assert!(script.contains(name.as_str()), "{shell}: {name}");
        }
        assert!(script.contains("probability"), "{shell}");
    }
    assert!(code(&prism(&["completions", "abacus"]), 2).contains("possible values: bash"));
}

#[test]
fn every_command_has_a_manual_page() {
    let folder = tempfile::tempdir().unwrap();
    let man = folder.path().join("share/man1");
    let out = prism(&["man", man.to_str().unwrap()]);
    code(&out, 0);
    let entries = std::fs::read_dir(&man).unwrap();
    let mut found: Vec<String> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    found.sort();
    let mut expected: Vec<String> = commands()
        .iter()
        .filter(|name| *name != "help")
        .map(|name| format!("prism-{name}.1"))
        .collect();
    expected.push("prism.1".into());
    expected.sort();
    assert_eq!(found, expected);
    assert!(text(&out).contains(&format!("{} pages", expected.len())));
    for name in &found {
        let page = std::fs::read_to_string(man.join(name)).unwrap();
        assert!(page.contains(".TH ") && page.contains(".SH NAME"), "{name}: {page}");
    }
    let segment = std::fs::read_to_string(man.join("prism-segment.1")).unwrap();
    assert!(segment.contains("probability") && segment.contains("memory"), "{segment}");
    let own = prism(&["man"]);
    code(&own, 0);
    assert_eq!(text(&own), std::fs::read_to_string(man.join("prism.1")).unwrap());
}
