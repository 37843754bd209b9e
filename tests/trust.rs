//! What a user's data and time are safe from: signals, settings without bounds, folders without end, files given twice.
#![cfg(unix)]

mod common;

use common::{here, tiny};
use prism::data::cases::list;
use prism::model::{Weights, weights::Precision};
use prism::tensor::Tensor;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn model(folder: &Path) -> PathBuf {
    let path = folder.join("m.safetensors");
    Weights::hashed(tiny(), "trust").save(&path, Precision::F32).unwrap();
    path
}

fn prism(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prism"));
    command.args(args);
    command
}

fn text(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// Waits for something to become true while a process runs.
#[track_caller]
fn until(child: &mut Child, what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before");
        assert!(start.elapsed() < Duration::from_secs(120), "it did not come to be");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args(["-s", name, &child.id().to_string()]).status().unwrap().success());
}

/// A training of the tiny network that takes long.
fn training(folder: &Path, model: &Path) -> Child {
    let (run, model) = (folder.join("run"), model.to_str().unwrap());
    let settings = ["--epochs", "1000", "--steps", "100", "--batch", "1", "--iterations", "1", "--validation-cases", "0", "--threads", "1"];
    let args = [&["train", "--init", model, "--out", run.to_str().unwrap()], &settings[..]].concat();
    prism(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn a_training_that_is_told_to_end_saves_and_a_folder_has_one_training() {
    for (n, name) in ["TERM", "HUP", "INT"].into_iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path());
        let mut child = training(folder.path(), &model);
        let lock = folder.path().join("run/run.lock");
        until(&mut child, || lock.exists());
        std::thread::sleep(Duration::from_millis(300));
        if n == 0 {
            let other = training(folder.path(), &model).wait_with_output().unwrap();
            assert!(!other.status.success() && text(&other).contains("another training is writing"), "{}", text(&other));
        }
        signal(&child, name);
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success() && text(&out).contains("--resume goes on"), "{name}: {}", text(&out));
        assert!(folder.path().join("run/last.state.safetensors").exists(), "{name}");
    }
}

#[test]
fn an_evaluation_that_is_told_to_end_goes_on_and_a_folder_has_one_evaluation() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let model = model(folder.path());
    let [image, label] = ["image", "label"].map(|n| here(&format!("examples/data/lung1_{n}.nii.gz")));
    let rows: String = (0..8).map(|n| format!("{},{},case {n}\n", image.display(), label.display())).collect();
    std::fs::write(at("data.csv"), format!("image,label,name\n{rows}")).unwrap();
    let eval = |out: &str| {
        let settings = ["--protocol", "plain-b-1", "--iterations", "20", "--threads", "1"];
        let mut command = prism(&["eval", "-m", model.to_str().unwrap(), "-d", &at("data.csv"), "-o", &at(out)]);
        command.args(settings).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let lines = || std::fs::read(at("out/cases.jsonl")).map_or(0, |b| b.iter().filter(|b| **b == b'\n').count());
    for (n, name) in ["TERM", "HUP", "INT"].into_iter().enumerate() {
        let before = lines();
        let mut child = eval("out").spawn().unwrap();
        if n == 0 {
            until(&mut child, || lines() > 0);
            let other = eval("out").output().unwrap();
            assert!(!other.status.success() && text(&other).contains("another evaluation is writing"), "{}", text(&other));
        }
        // The first line has the settings.
        until(&mut child, || lines() > before.max(1));
        signal(&child, name);
        let ended = child.wait_with_output().unwrap();
        let said = text(&ended);
        assert_eq!(ended.status.code(), Some(130), "{name}: {said}");
        assert!(said.contains(&format!("stopped: {} of 8 cases done", lines() - 1)), "{name}: {said}");
        assert!(said.contains("the same command goes on from there") && !Path::new(&at("out/cases.csv")).exists(), "{name}: {said}");
    }
    let done = lines() - 1;
    let ended = eval("out").output().unwrap();
    assert!(ended.status.success() && text(&ended).contains(&format!("taken over: {done} of 8 cases")), "{}", text(&ended));
    assert!(eval("whole").output().unwrap().status.success());
    for name in ["cases.csv", "results.json", "results.md", "iterations.png"] {
        let [a, b] = ["out", "whole"].map(|out| std::fs::read(Path::new(&at(out)).join(name)).unwrap());
        assert!(a == b, "{name}");
    }
}

#[test]
fn a_signal_leaves_no_temporary_file() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    // Large enough that writing its probabilities takes a while.
    let scan = folder.path().join("scan.nrrd");
    let header =
        "NRRD0004\ntype: uchar\ndimension: 3\nspace: RAS\nsizes: 256 256 256\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nencoding: raw\n\n";
    let voxels: Vec<u8> = (0..1 << 24).map(|v: u32| (v.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(&scan, [header.as_bytes(), &voxels].concat()).unwrap();
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let names = || std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>();
    let (mask, probability) = (out.join("m.nii.gz"), out.join("p.nii.gz"));
    let args = ["segment", "-m", model.to_str().unwrap(), "-i", scan.to_str().unwrap(), "--point", "128,128,128", "-o"];
    for name in ["TERM", "INT", "HUP"] {
        let outputs = [mask.to_str().unwrap(), "--probability", probability.to_str().unwrap()];
        let mut child = prism(&[&args[..], &outputs].concat()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        until(&mut child, || names().iter().any(|n| n.starts_with(".prism-")));
        signal(&child, name);
        let ended = child.wait_with_output().unwrap();
        // Where the signal came too late the files are whole; never is anything left beside them.
        assert!(!names().iter().any(|n| n.starts_with(".prism-")), "{name}: {:?}", names());
        assert!(ended.status.code() == Some(130) || mask.exists(), "{name}: {}", text(&ended));
    }
}

#[test]
fn settings_have_bounds_in_files_and_on_resume() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let (model, out) = (model.to_str().unwrap(), folder.path().join("run"));
    let run = |more: &[&str]| prism(&[&["train", "--init", model, "--out", out.to_str().unwrap()], more].concat()).output().unwrap();
    for (flag, value) in [
        ("--validation-iterations", "9223372036854775808"),
        ("--box-growth", "18446744073709551615"),
        ("--batch", "100000000"),
        ("--iterations", "100000000"),
        ("--points-max", "99999999"),
        ("--epochs", "0"),
        ("--sparing", "7"),
    ] {
        let said = run(&[flag, value]);
        let name = flag.trim_start_matches('-').replace('-', "_");
        assert!(said.status.code() == Some(2) && text(&said).contains(&format!("{name} is {value}")), "{flag}: {}", text(&said));
    }
    let small = ["--epochs", "1", "--steps", "1", "--batch", "1", "--iterations", "1", "--validation-cases", "0"];
    assert!(run(&small).status.success());
    // A state whose settings somebody has changed.
    let state = out.join("last.state.safetensors");
    let bytes = std::fs::read(&state).unwrap();
    let (from, to) = (br#"\"sparing\":0.0"#, br#"\"sparing\":7.0"#);
    let at = bytes.windows(from.len()).position(|w| w == from).expect("the state tells its settings");
    let changed = [&bytes[..at], to, &bytes[at + from.len()..]].concat();
    std::fs::write(&state, changed).unwrap();
    let said = run(&["--resume"]);
    assert!(!said.status.success() && text(&said).contains("sparing is 7"), "{}", text(&said));
}

#[test]
fn folders_that_lead_back_to_themselves_end() {
    let folder = tempfile::tempdir().unwrap();
    let case = folder.path().join("loop/c1");
    std::fs::create_dir_all(&case).unwrap();
    for name in ["image", "label"] {
        std::fs::copy(here("examples/data").join(format!("lung1_{name}.nii.gz")), case.join(format!("{name}.nii.gz"))).unwrap();
    }
    for name in ["a", "b"] {
        symlink("../loop", folder.path().join("loop").join(name)).unwrap();
    }
    let cases = list(&folder.path().join("loop"), None).unwrap();
    assert_eq!(cases.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["c1"]);
}

#[test]
fn an_output_is_no_input_and_no_other_output_however_it_is_spelled() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let model = model(folder.path());
    std::fs::create_dir(at("d")).unwrap();
    for name in ["mask.nii.gz", "others.nii.gz"] {
        std::fs::copy(here("examples/data/lung1_label.nii.gz"), at(name)).unwrap();
    }
    symlink(at("mask.nii.gz"), at("link.nii.gz")).unwrap();
    let image = here("examples/data/lung1_image.nii.gz");
    let start = ["segment", "-m", model.to_str().unwrap(), "-i", image.to_str().unwrap()];
    std::fs::write(at("p.json"), r#"[{"points": [{"position": [80, 80, 14]}]}, {"mask": "mask.nii.gz", "others": "others.nii.gz"}]"#)
        .unwrap();
    let before = std::fs::read(at("mask.nii.gz")).unwrap();
    let point = ["--point", "80,80,14"];
    for (more, words) in [
        ([&["--prompts", &at("p.json"), "-o", &at("mask.nii.gz")][..], &[]].concat(), "is an input"),
        ([&["--prompts", &at("p.json"), "-o", &at("d/../others.nii.gz")][..], &[]].concat(), "is an input"),
        ([&["--mask", &at("mask.nii.gz"), "-o", &at("link.nii.gz")][..], &point].concat(), "is an input"),
        ([&["-o", &at("x.nii"), "--probability", &at("d/../x.nii")][..], &point].concat(), "the same file"),
        ([&["-o", &at("x.nii"), "--clip", "0,9", "--mean", "nan", "--sd", "1"][..], &point].concat(), "--mean must be a number"),
        ([&["-o", &at("x.nii"), "--clip", "0,9", "--mean", "1", "--sd", "inf"][..], &point].concat(), "--sd one above 0"),
    ] {
        let said = prism(&[&start[..], &more].concat()).output().unwrap();
        assert!(said.status.code() == Some(2) && text(&said).contains(words), "{more:?}: {}", text(&said));
    }
    assert!(std::fs::read(at("mask.nii.gz")).unwrap() == before && !Path::new(&at("x.nii")).exists());
}

#[test]
fn a_shape_whose_product_wraps_is_no_shape() {
    for shape in [vec![usize::MAX, 2], vec![1 << 32, 1 << 32], vec![1 << 33, 1 << 31, 0], vec![3, 12_297_829_382_473_034_411]] {
        let values = vec![0.0; shape.iter().fold(1usize, |n, s| n.wrapping_mul(*s)).min(8)];
        assert!(std::panic::catch_unwind(|| Tensor::new(shape.clone(), values)).is_err(), "{shape:?}");
    }
    assert_eq!(Tensor::new([0, 5], vec![]).len(), 0);
}
