//! What a user's data and time are safe from: signals, settings without bounds, folders without
//! end, files given twice.
#![cfg(unix)]

mod common;

use common::{here, tiny};
use prism::data::cases::list;
use prism::device::Device;
use prism::model::{Config, Model, Observer, Weights, weights::Precision};
use prism::prompt::{Prompts, RawBox, RawPoint, Space};
use prism::session::{Options, Scan, Session};
use prism::tensor::Tensor;
use prism::train::state::State;
use prism::volume::intensity::Normalization;
use std::io::Write;
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
    assert!(
        Command::new("kill")
            .args(["-s", name, &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
}

/// What makes a training one short step.
#[rustfmt::skip]
const SMALL: [&str; 10] =
    ["--epochs", "1", "--steps", "1", "--batch", "1", "--iterations", "1", "--validation-cases", "0"];

/// A training of the tiny network that takes long.
fn training(folder: &Path, model: &Path) -> Child {
    let (run, model) = (folder.join("run"), model.to_str().unwrap());
    let settings = [
        "--epochs",
        "1000",
        "--steps",
        "100",
        "--batch",
        "1",
        "--iterations",
        "1",
        "--validation-cases",
        "0",
        "--threads",
        "1",
    ];
    let args =
        [&["train", "--init", model, "--out", run.to_str().unwrap()], &settings[..]].concat();
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
            assert!(
                !other.status.success() && text(&other).contains("another training is writing"),
                "{}",
                text(&other)
            );
        }
        signal(&child, name);
        let out = child.wait_with_output().unwrap();
        assert!(
            out.status.success() && text(&out).contains("--resume goes on"),
            "{name}: {}",
            text(&out)
        );
        assert!(folder.path().join("run/last.state.safetensors").exists(), "{name}");
    }
}

#[test]
fn an_evaluation_that_is_told_to_end_goes_on_and_a_folder_has_one_evaluation() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let model = model(folder.path());
    let [image, label] =
        ["image", "label"].map(|n| here(&format!("examples/data/lung1_{n}.nii.gz")));
    let rows: String =
        (0..8).map(|n| format!("{},{},case {n}\n", image.display(), label.display())).collect();
    std::fs::write(at("data.csv"), format!("image,label,name\n{rows}")).unwrap();
    let eval = |out: &str| {
        let settings = ["--protocol", "plain-b-1", "--iterations", "20", "--threads", "1"];
        let mut command =
            prism(&["eval", "-m", model.to_str().unwrap(), "-d", &at("data.csv"), "-o", &at(out)]);
        command.args(settings).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let lines = || {
        std::fs::read(at("out/cases.jsonl"))
            .map_or(0, |b| b.iter().filter(|b| **b == b'\n').count())
    };
    for (n, name) in ["TERM", "HUP", "INT"].into_iter().enumerate() {
        let before = lines();
        let mut child = eval("out").spawn().unwrap();
        if n == 0 {
            until(&mut child, || lines() > 0);
            let other = eval("out").output().unwrap();
            assert!(
                !other.status.success() && text(&other).contains("another evaluation is writing"),
                "{}",
                text(&other)
            );
        }
        // The first line has the settings.
        until(&mut child, || lines() > before.max(1));
        signal(&child, name);
        let ended = child.wait_with_output().unwrap();
        let said = text(&ended);
        assert_eq!(ended.status.code(), Some(130), "{name}: {said}");
        assert!(
            said.contains(&format!("stopped: {} of 8 cases done", lines() - 1)),
            "{name}: {said}"
        );
        assert!(
            said.contains("the same command goes on from there")
                && !Path::new(&at("out/cases.csv")).exists(),
            "{name}: {said}"
        );
    }
    let done = lines() - 1;
    let ended = eval("out").output().unwrap();
    assert!(
        ended.status.success() && text(&ended).contains(&format!("taken over: {done} of 8 cases")),
        "{}",
        text(&ended)
    );
    assert!(eval("whole").output().unwrap().status.success());
    for name in ["cases.csv", "results.json", "results.md", "iterations.svg"] {
        let [a, b] =
            ["out", "whole"].map(|out| std::fs::read(Path::new(&at(out)).join(name)).unwrap());
        assert!(a == b, "{name}");
    }
}

#[test]
fn a_signal_leaves_no_temporary_file() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    // Large enough that writing its probabilities takes a while.
    let scan = folder.path().join("scan.nrrd");
    let header = "NRRD0004\ntype: uchar\ndimension: 3\nspace: RAS\nsizes: 256 256 256\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nencoding: raw\n\n";
    let voxels: Vec<u8> =
        (0..1 << 24).map(|v: u32| (v.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(&scan, [header.as_bytes(), &voxels].concat()).unwrap();
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let names = || {
        std::fs::read_dir(&out)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect::<Vec<_>>()
    };
    let (mask, probability) = (out.join("m.nii.gz"), out.join("p.nii.gz"));
    let args = [
        "segment",
        "-m",
        model.to_str().unwrap(),
        "-i",
        scan.to_str().unwrap(),
        "--point",
        "128,128,128",
        "-o",
    ];
    for name in ["TERM", "INT", "HUP"] {
        let outputs = [mask.to_str().unwrap(), "--probability", probability.to_str().unwrap()];
        let mut child = prism(&[&args[..], &outputs].concat())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
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
    let run = |more: &[&str]| {
        prism(&[&["train", "--init", model, "--out", out.to_str().unwrap()], more].concat())
            .output()
            .unwrap()
    };
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
        assert!(
            said.status.code() == Some(2) && text(&said).contains(&format!("{name} is {value}")),
            "{flag}: {}",
            text(&said)
        );
    }
    assert!(run(&SMALL).status.success());
    // A state whose settings somebody has changed.
    let state = out.join("last.state.safetensors");
    let bytes = std::fs::read(&state).unwrap();
    let (from, to) = (br#"\"sparing\":0.0"#, br#"\"sparing\":7.0"#);
    let at =
        bytes.windows(from.len()).position(|w| w == from).expect("the state tells its settings");
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
        std::fs::copy(
            here("examples/data").join(format!("lung1_{name}.nii.gz")),
            case.join(format!("{name}.nii.gz")),
        )
        .unwrap();
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
        (
            [&["--prompts", &at("p.json"), "-o", &at("mask.nii.gz")][..], &[]].concat(),
            "is an input",
        ),
        (
            [&["--prompts", &at("p.json"), "-o", &at("d/../others.nii.gz")][..], &[]].concat(),
            "is an input",
        ),
        (
            [&["--mask", &at("mask.nii.gz"), "-o", &at("link.nii.gz")][..], &point].concat(),
            "is an input",
        ),
        (
            [&["-o", &at("x.nii"), "--probability", &at("d/../x.nii")][..], &point].concat(),
            "the same file",
        ),
        (
            [&["-o", &at("x.nii"), "--clip", "0,9", "--mean", "nan", "--sd", "1"][..], &point]
                .concat(),
            "--mean must be a number",
        ),
        (
            [&["-o", &at("x.nii"), "--clip", "0,9", "--mean", "1", "--sd", "inf"][..], &point]
                .concat(),
            "--sd one above 0",
        ),
    ] {
        let said = prism(&[&start[..], &more].concat()).output().unwrap();
        assert!(
            said.status.code() == Some(2) && text(&said).contains(words),
            "{more:?}: {}",
            text(&said)
        );
    }
    assert!(
        std::fs::read(at("mask.nii.gz")).unwrap() == before && !Path::new(&at("x.nii")).exists()
    );
}

#[test]
fn a_shape_whose_product_wraps_is_no_shape() {
    for shape in [
        vec![usize::MAX, 2],
        vec![1 << 32, 1 << 32],
        vec![1 << 33, 1 << 31, 0],
        vec![3, 12_297_829_382_473_034_411],
    ] {
        let values = vec![0.0; shape.iter().fold(1usize, |n, s| n.wrapping_mul(*s)).min(8)];
        assert!(
            std::panic::catch_unwind(|| Tensor::new(shape.clone(), values)).is_err(),
            "{shape:?}"
        );
    }
    assert_eq!(Tensor::new([0, 5], vec![]).len(), 0);
}

/// Every bit of a file that was written with a hash counts.
#[track_caller]
fn every_bit_counts(file: &Path, reads: impl Fn(&Path) -> Result<(), String>) {
    reads(file).unwrap();
    let bytes = std::fs::read(file).unwrap();
    let changed = file.with_file_name("changed.safetensors");
    // Through the header, where names, shapes, settings and the hash itself stand, and the values
    // behind it.
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mark = bytes.windows(8).position(|w| w == b"hash\\\":\\").expect("it carries a hash");
    let places = (mark..mark + 80)
        .chain((0..60).map(|n| n * header / 60))
        .chain((0..60).map(|n| header + n * (bytes.len() - header) / 60))
        .chain([bytes.len() - 1]);
    for (n, at) in places.enumerate() {
        let mut other = bytes.clone();
        other[at] ^= 1 << (n % 8);
        std::fs::write(&changed, &other).unwrap();
        // Blanks between the parts of a header, and what pads it, are nobody's.
        let is_blank =
            at < header && (bytes[at].is_ascii_whitespace() && other[at].is_ascii_whitespace());
        // A digit of the hash in capitals is the same digit.
        let is_digit =
            (mark + 9..mark + 73).contains(&at) && bytes[at].eq_ignore_ascii_case(&other[at]);
        assert!(
            is_blank || is_digit || reads(&changed).is_err(),
            "bit {} of byte {at} of {}",
            n % 8,
            bytes.len()
        );
    }
    std::fs::write(&changed, &bytes[..bytes.len() - 5]).unwrap();
    assert!(reads(&changed).is_err(), "cut short");
}

#[test]
fn models_and_states_know_when_they_are_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    every_bit_counts(&model, |path| Weights::open(path).map(|_| ()).map_err(|e| e.to_string()));
    every_bit_counts(&model, |path| {
        Weights::from_bytes(&std::fs::read(path).unwrap()).map(|_| ()).map_err(|e| e.to_string())
    });
    let out = folder.path().join("run");
    let train = ["train", "--init", model.to_str().unwrap(), "--out", out.to_str().unwrap()];
    assert!(prism(&[&train[..], &SMALL].concat()).status().unwrap().success());
    every_bit_counts(&out.join("last.state.safetensors"), |path| State::open(path).map(|_| ()));

    let said = prism(&["verify", model.to_str().unwrap()]).output().unwrap();
    assert!(said.status.success() && text(&said).contains("as it was written"), "{}", text(&said));
    let mut bytes = std::fs::read(&model).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&model, bytes).unwrap();
    let anew = folder.path().join("anew");
    let train = ["train", "--init", model.to_str().unwrap(), "--out", anew.to_str().unwrap()];
    for args in [vec!["verify", model.to_str().unwrap()], [&train[..], &SMALL].concat()] {
        let said = prism(&args).output().unwrap();
        assert!(
            !said.status.success() && text(&said).contains("damaged"),
            "{args:?}: {}",
            text(&said)
        );
    }
}

#[test]
fn numbers_that_are_none_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let with = |name: &str, at: usize, value: f32| {
        let weights = Weights::hashed(tiny(), "trust");
        let list = tiny().tensors().into_iter().map(|(n, shape)| {
            let mut values = weights.get(&n).data().to_vec();
            if n == name {
                values[at] = value;
            }
            (n, Tensor::new(shape, values))
        });
        Weights::from_tensors(tiny(), list.collect()).unwrap()
    };
    let (bias, head) = (
        "mask_decoder.refine.conv_correction.bias",
        "mask_decoder.iou_prediction_head.layers.2.weight",
    );
    for (name, at, value) in
        [(bias, 0, f32::NAN), (head, 7, f32::INFINITY), (head, 0, f32::NEG_INFINITY)]
    {
        for precision in [Precision::F32, Precision::F16] {
            with(name, at, value).save(&path, precision).unwrap();
            let said = Weights::open(&path).err().expect("no number").to_string();
            assert!(said.ends_with(&format!("value {at} of {name} is no finite number")), "{said}");
        }
    }
    // Numbers that the network makes none of.
    let model = std::sync::Arc::new(
        Model::new(&Device::open("cpu", 1).unwrap(), &with(bias, 0, 3e38)).unwrap(),
    );
    let image = std::sync::Arc::new(
        prism::volume::Volume::read(&here("tests/data/odd/m00_base.nii.gz"), None).unwrap(),
    );
    let normalization = Normalization { clip: [-1000.0, 400.0], mean: 0.0, sd: 1e-36 };
    for released in [false, true] {
        let options = Options { released, ..Options::default() };
        let mut session = Session::new(&std::sync::Arc::new(Scan::new(
            &model,
            image.clone(),
            normalization,
            options,
        )));
        let prompts = Prompts {
            points: vec![([3, 3, 3], true)],
            bounds: Some([2, 2, 2, 8, 8, 8]),
            ..Prompts::default()
        };
        let said = session.interact(&prompts).err().expect("no number").to_string();
        assert!(said.contains("is not finite") && session.prediction().is_none(), "{said}");
    }
    let mut prompts = Prompts::default();
    for position in [[f64::NAN, 1.0, 1.0], [1.0, f64::INFINITY, 1.0]] {
        for space in [Space::Ras, Space::Lps, Space::Ijk] {
            let said = prompts
                .add_point(&image.grid, RawPoint { position, positive: true }, space)
                .unwrap_err()
                .to_string();
            assert!(said.contains("expected numbers"), "{said}");
        }
    }
    let said = prompts
        .set_box(&image.grid, RawBox([1.0, 1.0, 1.0, f64::NAN, 5.0, 5.0]), Space::Lps)
        .unwrap_err()
        .to_string();
    assert!(said.contains("expected numbers") && prompts.is_empty(), "{said}");
}

#[test]
fn a_model_file_that_others_change_is_an_error_and_one_that_is_replaced_is_none() {
    // Wide enough for matrices that stay in the file.
    let config = Config { vit_width: 264, ..tiny() };
    let folder = tempfile::tempdir().unwrap();
    let (path, other) = (folder.path().join("m.safetensors"), folder.path().join("n.safetensors"));
    let save = |salt: &str, to: &Path| {
        Weights::hashed(config.clone(), salt).save(to, Precision::F32).unwrap()
    };
    save("other", &other);
    let device = Device::open("cpu", 2).unwrap();
    let s = config.patch;
    let image = Tensor::new([s; 3], (0..s * s * s).map(|v| (v % 17) as f32 / 17.0).collect());
    let encode = |model: &Model| {
        model.encode(&image, &mut Observer::none()).map(|f| f.vars()[0].value().data().to_vec())
    };
    let open = || {
        save("one", &path);
        Model::new(&device, &Weights::open(&path).unwrap()).unwrap()
    };
    let expected = encode(&open()).unwrap();
    assert_eq!(
        encode(&Model::new(&device, &Weights::hashed(config.clone(), "one")).unwrap()).unwrap(),
        expected
    );

    // Replaced, as prism and others write files: the model goes on with what it was loaded from.
    let model = open();
    std::fs::rename(&other, &path).unwrap();
    assert_eq!(encode(&model).unwrap(), expected);
    // Overwritten in its place, before and after it was used.
    for used in [false, true] {
        let model = open();
        if used {
            assert_eq!(encode(&model).unwrap(), expected);
        }
        save("other", &other);
        std::fs::copy(&other, &path).unwrap();
        let said = encode(&model).unwrap_err().to_string();
        assert!(said.contains("m.safetensors") && said.contains("has changed"), "{said}");
        save("one", &other);
        // What it was comes back.
        std::fs::copy(&other, &path).unwrap();
        assert_eq!(encode(&model).unwrap(), expected);
    }
    let model = open();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
    let said = encode(&model).unwrap_err().to_string();
    assert!(said.contains("shorter than it was"), "{said}");
}

#[test]
fn sizes_are_held_against_a_budget() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let model = model(folder.path());
    // 200 MB of zeros in 200 kB.
    let mut header =
        std::fs::read(here("tests/data/odd/m02_trunc_voxels.nii")).unwrap()[..352].to_vec();
    header[40..56].copy_from_slice(bytemuck::cast_slice(&[3i16, 1000, 1000, 200, 1, 1, 1, 1]));
    header[70..74].copy_from_slice(bytemuck::cast_slice(&[2i16, 8]));
    let mut gz = flate2::write::GzEncoder::new(
        std::fs::File::create(at("bomb.nii.gz")).unwrap(),
        flate2::Compression::fast(),
    );
    gz.write_all(&header).unwrap();
    (0..200).for_each(|_| gz.write_all(&[0; 1_000_000]).unwrap());
    gz.finish().unwrap();
    let out = at("mask.nii.gz");
    let (bomb, folder_out) = (at("bomb.nii.gz"), at("prompts"));
    let model = model.to_str().unwrap();
    let scan = here("tests/data/odd/m00_base.nii.gz");
    let scan = scan.to_str().unwrap();
    for (args, part) in [
        (
            vec!["info", &bomb, "--memory", "100M"],
            "bomb.nii.gz: out of memory: its voxels would take",
        ),
        (
            vec!["metrics", "--truth", &bomb, "--prediction", &bomb, "--memory", "100M"],
            "bomb.nii.gz: out of memory: ",
        ),
        (
            vec!["simulate", "-i", &bomb, "-l", &bomb, "-o", &folder_out, "--memory", "100M"],
            "bomb.nii.gz: out of memory: ",
        ),
        (
            vec![
                "segment", "-m", model, "-i", &bomb, "--point", "5,5,5", "-o", &out, "--memory",
                "180MB",
            ],
            "out of memory",
        ),
        (
            vec![
                "segment", "-m", model, "-i", scan, "--point", "5,5,5", "-o", &out, "--memory",
                "1M",
            ],
            "out of memory",
        ),
        (
            vec![
                "segment", "-m", model, "-i", scan, "--point", "5,5,5", "-o", &out, "--memory",
                "12M",
            ],
            "out of memory: working memory of the network",
        ),
    ] {
        let said = prism(&args).output().unwrap();
        assert!(
            said.status.code() == Some(1) && text(&said).contains(part),
            "{args:?}: {}",
            text(&said)
        );
        assert!(!Path::new(&out).exists());
    }
    let said = prism(&["info", &bomb, "--memory", "much"]).output().unwrap();
    assert!(said.status.code() == Some(2) && text(&said).contains("such as 8G"), "{}", text(&said));
    assert!(
        prism(&[
            "segment", "-m", model, "-i", scan, "--point", "5,5,5", "-o", &out, "--memory", "1G"
        ])
        .status()
        .unwrap()
        .success()
    );
    // Networks that nobody could run are no networks; those that this machine cannot are refused
    // when they are laid out.
    for (change, part) in [
        (Config { window: 65_536, ..tiny() }, "window is 65536, expected 1 to 32"),
        (Config { prompt_heads: (1 << 63) + 1, ..tiny() }, "prompt_heads is 9223372036854775809"),
        (Config { vit_heads: 1 << 20, ..tiny() }, "vit_heads is 1048576"),
    ] {
        let said = change.check().unwrap_err().to_string();
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn pickles_that_hold_more_than_a_model_needs_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bomb.pth");
    let mut zip = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
    for n in 0..3 {
        let stored = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored);
        zip.start_file(format!("x{n}.pkl"), stored).unwrap();
        // A program that pushes None for a long time.
        zip.write_all(b"\x80\x02").unwrap();
        (0..30).for_each(|_| zip.write_all(&[b'N'; 1 << 20]).unwrap());
        zip.write_all(b".").unwrap();
    }
    zip.finish().unwrap();
    let said = prism::model::checkpoint::read(&path).err().expect("a bomb").to_string();
    assert!(said.contains("pickles are longer than 64 MiB"), "{said}");
}

#[test]
fn threads_beyond_the_processors_help_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (model(folder.path()), folder.path().join("mask.nii.gz"));
    let scan = here("tests/data/odd/m00_base.nii.gz");
    let args = [
        "segment",
        "-m",
        model.to_str().unwrap(),
        "-i",
        scan.to_str().unwrap(),
        "--point",
        "5,5,5",
        "-o",
        out.to_str().unwrap(),
    ];
    let said = prism(&[&args[..], &["--threads", "100000"]].concat())
        .env("RAYON_NUM_THREADS", "100000")
        .output()
        .unwrap();
    let most = prism::device::processors();
    assert!(
        said.status.success()
            && text(&said).contains(&format!("100000 threads were asked for: {most} are used")),
        "{}",
        text(&said)
    );
}

#[test]
fn no_command_writes_over_what_it_has_read() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let model = model(folder.path());
    let model = model.to_str().unwrap();
    for name in ["out", "lab", "s"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    let (scan, label) =
        (here("examples/data/lung1_image.nii.gz"), here("examples/data/lung1_label.nii.gz"));
    for name in ["lab/k_basic.nii.gz", "s/box.nii.gz"] {
        std::fs::copy(&label, at(name)).unwrap();
    }
    let list = |label: &str| format!("image,label,name\n{},{label},k\n", scan.display());
    std::fs::write(at("out/cases.csv"), list(label.to_str().unwrap())).unwrap();
    std::fs::write(at("lab.csv"), list(&at("lab/k_basic.nii.gz"))).unwrap();
    // Voxels beside their header.
    std::fs::write(at("v.nii"), vec![7u8; 20 * 20 * 20]).unwrap();
    let header = "NRRD0004\ntype: uchar\ndimension: 3\nspace: RAS\nsizes: 20 20 20\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nencoding: raw\ndata file: v.nii\n";
    std::fs::write(at("h.nhdr"), header).unwrap();
    let quick = [
        "--epochs",
        "1",
        "--steps",
        "1",
        "--batch",
        "1",
        "--iterations",
        "1",
        "--validation-cases",
        "0",
    ];
    std::fs::create_dir(at("run")).unwrap();
    std::fs::copy(model, at("run/last.safetensors")).unwrap();
    for (kept, args) in [
        (
            "v.nii",
            vec![
                "segment",
                "-m",
                model,
                "-i",
                &at("h.nhdr"),
                "--point",
                "5,5,5",
                "-o",
                &at("v.nii"),
            ],
        ),
        (
            "out/cases.csv",
            vec![
                "eval",
                "-m",
                model,
                "-d",
                &at("out/cases.csv"),
                "-o",
                &at("out"),
                "--iterations",
                "1",
            ],
        ),
        (
            "lab/k_basic.nii.gz",
            vec![
                "eval",
                "-m",
                model,
                "-d",
                &at("lab.csv"),
                "-o",
                &at("o"),
                "--masks",
                &at("lab"),
                "--iterations",
                "1",
                "--protocol",
                "basic",
            ],
        ),
        (
            "s/box.nii.gz",
            vec![
                "simulate",
                "-i",
                scan.to_str().unwrap(),
                "-l",
                &at("s/box.nii.gz"),
                "-o",
                &at("s"),
            ],
        ),
        (
            "run/last.safetensors",
            [&["train", "--init", &at("run/last.safetensors"), "--out", &at("run")][..], &quick]
                .concat(),
        ),
    ] {
        let before = std::fs::read(at(kept)).unwrap();
        let said = prism(&args).output().unwrap();
        assert!(
            !said.status.success() && text(&said).contains("is an input"),
            "{args:?}: {}",
            text(&said)
        );
        assert!(std::fs::read(at(kept)).unwrap() == before, "{kept}");
    }
}

#[test]
fn networks_and_trainings_that_do_not_fit_are_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (model, out, new) = (model(folder.path()), at("run"), at("new.safetensors"));
    let train = [
        "train",
        "--init",
        model.to_str().unwrap(),
        "--out",
        &out,
        "--epochs",
        "1",
        "--steps",
        "1",
        "--batch",
        "2",
    ];
    for args in [
        [
            &train[..],
            &["--iterations", "1", "--validation-cases", "0", "--threads", "2", "--memory", "24M"],
        ]
        .concat(),
        vec!["weights", "--salt", "a", "-o", &new, "--memory", "100M"],
    ] {
        let said = prism(&args).output().unwrap();
        assert!(
            said.status.code() == Some(1) && text(&said).contains("error: out of memory"),
            "{args:?}: {}",
            text(&said)
        );
        assert!(!Path::new(&new).exists());
    }
}

#[test]
fn a_released_session_that_fails_stays_where_it_was() {
    let model = common::tiny_model(tiny(), 1);
    let image = std::sync::Arc::new(
        prism::volume::Volume::read(&here("tests/data/odd/m17_oblique.nii.gz"), None).unwrap(),
    );
    let normalization = Normalization { clip: [-1000.0, 400.0], mean: 0.0, sd: 350.0 };
    let options = Options { released: true, spacing: Some(0.5), ..Options::default() };
    let scan = std::sync::Arc::new(Scan::new(&model, image, normalization, options));
    let click = |voxel: [usize; 3]| Prompts { points: vec![(voxel, true)], ..Prompts::default() };
    let mut session = Session::new(&scan);
    // Stopped at the last stage of the interaction.
    let (mut stages, all) = (0, model.steps().iter().sum::<usize>());
    let mut step = |_: &str| {
        stages += 1;
        stages < all
    };
    assert!(session.interact_observed(&click([3, 3, 3]), &mut Observer::steps(&mut step)).is_err());
    assert!(session.patch().is_none() && session.prediction().is_none());
    session.interact(&click([60, 44, 20])).unwrap();
}

/// A case of the CVPR 2025 challenge: a bright block in the dark, and a mask of it from the step
/// before.
fn challenge(folder: &Path) {
    use prism::challenge::{npy::of_bytes, npz};
    let size = [16usize, 40, 40];
    let inside = |v: usize| {
        [v / 1600, v / 40 % 40, v % 40]
            .iter()
            .zip([5..10, 12..25, 10..24])
            .all(|(c, range)| range.contains(c))
    };
    let of = |value: u8| {
        (0..size.iter().product()).map(|v| if inside(v) { value } else { 0 }).collect::<Vec<u8>>()
    };
    let spacing = [1.0f64, 1.0, 2.0].iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut numbers =
        b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }"
            .to_vec();
    numbers.resize(10 + 0x46, b' ');
    numbers.extend(spacing);
    let arrays = [
        ("imgs", of_bytes(&size, &of(200))),
        ("prev_pred", of_bytes(&size, &of(1))),
        ("spacing", numbers),
    ];
    std::fs::create_dir(folder).unwrap();
    npz::write(&folder.join("case.npz"), &arrays, true).unwrap().commit().unwrap();
}

/// Every command, with less address space than it needs and then more and more: it does its work,
/// or says that memory was short, and leaves nothing behind.
#[cfg(target_os = "linux")]
#[test]
fn no_command_aborts_where_the_system_refuses_memory() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let model = model(folder.path()).to_str().unwrap().to_string();
    let [scan, label] = ["lung1_image", "lung1_label"]
        .map(|n| here(&format!("examples/data/{n}.nii.gz")).to_str().unwrap().to_string());
    std::fs::write(at("all.csv"), format!("image,label\n{scan},{label}\n")).unwrap();
    challenge(&folder.path().join("cases"));
    let (list, cases, out, mask) = (at("all.csv"), at("cases"), at("out"), at("mask.nii.gz"));
    let training = [
        "--epochs",
        "1",
        "--steps",
        "1",
        "--batch",
        "2",
        "--iterations",
        "1",
        "--validation-cases",
        "0",
    ];
    let commands: Vec<Vec<&str>> = vec![
        vec!["metrics", "--truth", &label, "--prediction", &label],
        vec!["simulate", "-i", &scan, "-l", &label, "-o", &out],
        vec!["synth", "-o", &out, "--count", "1"],
        vec!["challenge", "-m", &model, "-i", &cases, "-o", &out],
        vec![
            "eval",
            "-m",
            &model,
            "-d",
            &list,
            "-o",
            &out,
            "--protocol",
            "plain",
            "--iterations",
            "2",
        ],
        vec![
            "eval",
            "-m",
            &model,
            "-d",
            &list,
            "-o",
            &out,
            "--protocol",
            "click",
            "--iterations",
            "2",
        ],
        [&["train", "--init", &model, "--data", "synth:1", "--out", &out], &training[..]].concat(),
        vec!["segment", "-m", &model, "-i", &scan, "--point", "80,80,14", "-o", &mask],
    ];
    let limited = |limit: usize, args: &[&str]| {
        let mut command = Command::new("sh");
        command
            .args([
                "-c",
                &format!("ulimit -v {limit}; exec \"$@\""),
                "sh",
                env!("CARGO_BIN_EXE_prism"),
            ])
            .args(args);
        command.env("RUST_BACKTRACE", "0").output().unwrap()
    };
    // The least with which the program itself can be loaded.
    let least = (16_000..)
        .step_by(1_000)
        .find(|limit| limited(*limit, &["--version"]).status.success())
        .unwrap();
    for args in commands {
        let (mut limit, mut refused, mut done) = (least, 0, 0);
        while done < 2 {
            let _ = std::fs::remove_dir_all(&out);
            let said = limited(limit, &args);
            let words = text(&said);
            match said.status.code() {
                Some(0) => done += 1,
                // A thread is memory too.
                Some(1)
                    if words.contains("error: ")
                        && (words.contains("out of memory") || words.contains("thread")) =>
                {
                    (refused, done) = (refused + 1, 0)
                }
                // The system's own library cannot go on without a few words for a thread.
                None if words.contains("Fatal glibc error") && words.contains("out of memory") => {
                    done = 0
                }
                code => panic!("{args:?} with {limit} kB: {code:?}, {words}"),
            }
            for place in [folder.path(), Path::new(&out)] {
                let names = std::fs::read_dir(place)
                    .into_iter()
                    .flatten()
                    .map(|e| e.unwrap().file_name().into_string().unwrap());
                assert_eq!(
                    names.filter(|n| n.starts_with(".prism-tmp-")).collect::<Vec<_>>(),
                    [""; 0],
                    "{args:?} with {limit} kB"
                );
            }
            limit += limit / 4;
        }
        assert!(refused > 0, "{args:?} was never refused anything");
    }
}

/// What a command makes itself is held against the budget too.
#[test]
fn commands_keep_to_their_budget() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    challenge(&folder.path().join("cases"));
    let (model, cases, out) = (model(folder.path()), at("cases"), at("out"));
    for args in [
        vec!["synth", "-o", &out, "--count", "1", "--memory", "1M"],
        vec![
            "challenge",
            "-m",
            model.to_str().unwrap(),
            "-i",
            &cases,
            "-o",
            &out,
            "--memory",
            "4M",
        ],
    ] {
        let said = prism(&args).output().unwrap();
        assert!(said.status.code() == Some(1), "{args:?}: {}", text(&said));
        assert!(text(&said).contains("out of memory: "), "{args:?}: {}", text(&said));
    }
}
