//! Cases, training, evaluation.

use crate::common::tiny;
use crate::program::{eval, metrics, prism, simulate};
use crate::{Place, code, example, odd, text};
use prism::output::lock;
use prism::train::run::begin;
use prism::train::settings::Given;
use prism::volume::Volume;
use prism::volume::labels::Labels;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

/// A port at which nothing listens. Another program may take it before it is used: then
/// another one is tried.
fn free_port() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string()
}

/// Ends a process that would wait for one that has found its port taken.
fn stop(mut process: Child) {
    process.kill().unwrap();
    process.wait().unwrap();
}

/// The folders of two processes, with the network of a run in them.
fn folders_of_two(place: &Place) -> [PathBuf; 2] {
    ["zero", "one"].map(|name| {
        let folder = place.at(name);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("network.json"), serde_json::to_string(&tiny()).unwrap())
            .unwrap();
        folder
    })
}

/// What the two processes of a run print that end with an error, each in its own folder.
fn both(folders: [&Path; 2], more: [&str; 2]) -> [String; 2] {
    loop {
        let port = free_port();
        let [first, other] = [0, 1].map(|rank| {
            let run = prism("train --epochs 1 --steps 1 --batch 2 --iterations 1 --threads 1");
            let run = run.with("--validation-cases 0 --model network.json --out run");
            let mut run = run.with(more[rank]);
            run.0.current_dir(folders[rank]);
            for name in ["PRISM_PORT", "PRISM_TOKEN", "TORCHELASTIC_USE_AGENT_STORE"] {
                run.0.env_remove(name);
            }
            run.0.envs([
                ("RANK", ["0", "1"][rank]),
                ("WORLD_SIZE", "2"),
                ("LOCAL_RANK", "0"),
                ("MASTER_ADDR", "127.0.0.1"),
                ("MASTER_PORT", port.as_str()),
            ]);
            run.start()
        });
        match first.wait_with_output().unwrap() {
            said if text(&said.stderr).contains("cannot listen") => stop(other),
            said => return [said, other.wait_with_output().unwrap()].map(|said| code(&said, 1)),
        }
    }
}

#[test]
fn metrics_of_two_files() {
    let [_, label] = example();
    let out = metrics(&label, &label).with("--json").output();
    code(&out, 0);
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(
        (
            report["dice"].as_f64(),
            report["nsd_mm"]["1"].as_f64(),
            report["hausdorff_95_mm"].as_f64()
        ),
        (Some(1.0), Some(1.0), Some(0.0))
    );
    let out = metrics(&label, &label).output();
    code(&out, 0);
    assert!(text(&out.stdout).starts_with("Dice                   1.0000\n"));
    let error = code(&metrics(&label, &odd("m00_base_label.nii.gz")).output(), 1);
    assert!(error.contains("m00_base_label") && error.contains("size"), "{error}");
    code(&metrics(&label, &label).with("--tolerance -1").output(), 2);
}

#[test]
fn simulated_prompts_can_be_looked_at() {
    let place = Place::new();
    let [image, label] = example();
    let run = || simulate(&image, &label, &place.at("sim"));
    code(&run().with("--box-growth 3").output(), 0);
    let read = |name: &str| {
        let grid = Volume::read(&image, None).unwrap().grid;
        Labels::read(&place.at("sim").join(format!("{name}.nii.gz")), &grid).unwrap().joined()
    };
    let truth = read("missed");
    assert!(read("excess").iter().all(|v| *v == 0));
    assert_eq!(read("points").iter().filter(|v| **v == 1).count(), 20);
    for name in [
        "centreline_drawn",
        "centreline_broken",
        "centreline_warped",
        "line_warped",
        "contour_warped",
    ] {
        let drawn = read(name);
        assert!(
            drawn.contains(&1) && drawn.iter().zip(&truth).all(|(d, t)| *d == 0 || *t == 1),
            "{name}"
        );
    }
    assert!(place.at("sim/stages.png").exists());
    // If an answer is right there is nothing to report.
    let out = run().file("--mask", &label).output();
    code(&out, 0);
    assert!(
        text(&out.stdout)
            .starts_with("missed 0 voxels, 0 in excess\npoints: 0 positive, 0 negative\n")
    );
}

#[test]
fn processes_of_a_run_need_the_same_token() {
    let place = Place::new();
    let at = |n: &str| place.at(n).display().to_string();
    std::fs::write(place.at("network.json"), serde_json::to_string(&tiny()).unwrap()).unwrap();
    std::fs::write(place.at("token"), "one\n").unwrap();
    let start = |port: &str, rank: &str, host: &str, token: Option<&str>, more: &[&str]| {
        let run = prism("train --epochs 1 --steps 1 --batch 2 --iterations 1 --threads 1");
        let run = run.with("--validation-cases 1 --validation-iterations 1");
        let mut run = run.file("--model", at("network.json")).file("--out", at("run"));
        let command = run.0.args(more);
        for name in ["PRISM_PORT", "PRISM_TOKEN", "TORCHELASTIC_USE_AGENT_STORE"] {
            command.env_remove(name);
        }
        command.envs([
            ("RANK", rank),
            ("WORLD_SIZE", "2"),
            ("LOCAL_RANK", "0"),
            ("MASTER_ADDR", host),
            ("MASTER_PORT", port),
        ]);
        command.envs(token.map(|token| ("PRISM_TOKEN", token)));
        run.start()
    };
    let end = |process: Child, want: i32| code(&process.wait_with_output().unwrap(), want);
    let (port, first, error) = loop {
        let port = free_port();
        let mut first = start(&port, "0", "127.0.0.1", Some("one"), &[]);
        let mut other = start(&port, "1", "127.0.0.1", Some("another"), &[]);
        while [&mut first, &mut other].into_iter().all(|p| p.try_wait().unwrap().is_none()) {
            std::thread::sleep(Duration::from_millis(10));
        }
        if first.try_wait().unwrap().is_none() {
            break (port, first, end(other, 1));
        }
        let error = end(first, 1);
        assert!(error.contains("cannot listen"), "{error}");
        stop(other);
    };
    assert!(error.contains("process 0 has another token"), "{error}");
    // A file takes precedence over the variable.
    let with_file = ["--token-file", &at("token")];
    end(start(&port, "1", "127.0.0.1", Some("another"), &with_file), 0);
    let said = end(first, 0);
    assert!(
        said.contains(
            "is not a process of this training run: it claims to be process 1 but has another token"
        ),
        "{said}"
    );
    assert!(place.at("run/last.safetensors").exists());
    // If others than this machine's programs can call, a token is needed.
    let error = end(start("0", "0", "0.0.0.0", None, &[]), 2);
    assert!(error.contains("PRISM_TOKEN or --token-file"), "{error}");
}

/// What fails in one process of a run before its first step ends the others at once, with its
/// reason.
#[test]
fn processes_hear_why_another_did_not_begin() {
    let place = Place::new();
    let [zero, one] = &folders_of_two(&place);
    std::fs::create_dir(one.join("run")).unwrap();
    std::fs::create_dir(zero.join("run")).unwrap();
    let _held = lock(&zero.join("run"), "run.lock").unwrap().unwrap();
    for more in ["", "--resume"] {
        let [first, other] = both([zero, one], [more; 2]);
        let why = "another training is writing to";
        assert!(first.contains(why) && !first.contains("process 0"), "{first}");
        assert!(
            other.contains("process 0 of this training run ended") && other.contains(why),
            "{other}"
        );
    }
    let [first, other] = both([zero, one], ["", "--device abacus"]);
    let why = "unknown device 'abacus'";
    assert!(
        first.contains("process 1 of this training run ended") && first.contains(why),
        "{first}"
    );
    assert!(other.contains(why), "{other}");
}

#[test]
fn a_training_that_one_process_cannot_begin_leaves_no_folder() {
    let place = Place::new();
    let [zero, one] = &folders_of_two(&place);
    std::fs::remove_file(one.join("network.json")).unwrap();
    let [first, other] = both([zero, one], [""; 2]);
    assert!(first.contains("process 1 of this training run ended"), "{first}");
    assert!(other.contains("--model network.json"), "{other}");
    assert!(!zero.join("run").exists() && !one.join("run").exists());
}

/// Processes that resume a run meet whatever other settings they are given, which the run does not
/// take; and one without memory for the state says so to the others.
#[test]
fn processes_hear_that_another_has_no_memory_for_the_state() {
    let place = Place::new();
    let [zero, one] = &folders_of_two(&place);
    let state = zero.join("run/last.state.safetensors");
    std::fs::create_dir(zero.join("run")).unwrap();
    std::fs::create_dir(one.join("run")).unwrap();
    let model = zero.join("network.json").display().to_string();
    let given = Given { model: Some(model), batch: Some(2), ..Given::default() };
    begin(given.settings()).unwrap().save(&state).unwrap();
    // A gigabyte that takes no room on the disk.
    let long = std::fs::File::create(one.join("run/last.state.safetensors")).unwrap();
    long.set_len(1 << 30).unwrap();
    let more = ["--resume", "--resume --memory 100M --data elsewhere"];
    let [first, other] = both([zero, one], more);
    let why = "out of memory: the state of a training";
    assert!(
        first.contains("process 1 of this training run ended") && first.contains(why),
        "{first}"
    );
    assert!(other.contains(why), "{other}");
}

#[test]
fn a_training_whose_data_is_not_there_leaves_no_folder() {
    let place = Place::new();
    let run = prism("train --threads 1").file("--data", place.at("none.csv"));
    let error = code(&run.file("--out", place.at("typo/run")).output(), 1);
    assert!(error.contains("none.csv") && !place.at("typo").exists(), "{error}");
}

#[test]
fn a_file_of_settings_may_say_where_to_train_and_flags_win() {
    let place = Place::new();
    let at = |n: &str| place.at(n).display().to_string();
    std::fs::write(place.at("network.json"), serde_json::to_string(&tiny()).unwrap()).unwrap();
    let train = |lines: &str, more: &str| {
        let files = format!("model = {:?}\nout = {:?}\n", at("network.json"), at("run"));
        let small = "epochs = 1\nsteps = 1\nbatch = 1\niterations = 1\nvalidation_cases = 1\nvalidation_iterations = 1\n";
        std::fs::write(place.at("run.toml"), format!("{files}{small}{lines}")).unwrap();
        prism("train").file("-c", at("run.toml")).with(more).output()
    };
    assert!(code(&train("device = \"abacus\"\n", ""), 1).contains("unknown device 'abacus'"));
    assert!(
        code(&train("precision = \"f64\"\n", ""), 2)
            .contains("precision is 'f64', expected f32, tf32, ieee, f16 or bf16")
    );
    let elsewhere = "device = \"abacus\"\nprecision = \"f16\"\nthreads = 1\n";
    code(&train(elsewhere, "--device cpu --precision f32"), 0);
    // They are not kept with the run, which continues on any device.
    let kept = std::fs::read_to_string(place.at("run/settings.toml")).unwrap();
    assert!(!["device", "precision", "threads"].iter().any(|name| kept.contains(name)), "{kept}");
    code(&train("device = \"cpu\"\nthreads = 2\n", "--resume --epochs 2"), 0);
}

#[test]
fn synthesise_train_and_evaluate() {
    let place = Place::new();
    let at = |n: &str| place.at(n);
    let synth = || prism("synth").file("-o", at("data"));
    code(&synth().with("--count 3 --seed 5").output(), 0);
    code(&synth().output(), 2);
    std::fs::write(place.at("network.json"), serde_json::to_string(&tiny()).unwrap()).unwrap();
    let toml = format!(
        "model = {:?}\ndata = {:?}\nout = {:?}\nepochs = 1\nsteps = 2\nbatch = 1\niterations = 2\nvalidation_iterations = 2\n",
        at("network.json"),
        at("data"),
        at("run")
    );
    std::fs::write(place.at("run.toml"), toml).unwrap();
    let train = |settings: &str| prism("train").file("-c", at(settings));
    let out = train("run.toml").with("--lr 1e-3").output();
    let told = code(&out, 0);
    assert!(told.contains("recompute: o"), "{told}");
    assert_eq!(text(&out.stdout), format!("{}: finished\n", at("run").display()));
    let log = std::fs::read_to_string(place.at("run/log.jsonl")).unwrap();
    assert!(log.lines().count() == 4 && log.contains("\"lr\":0.001"), "{log}");
    // Whether iterations are computed again was left to the run, which says it once.
    assert_eq!(log.lines().filter(|l| l.contains("\"recompute\":")).count(), 1, "{log}");
    // The split of the cases is kept, in the form that --split reads.
    let cases = prism::data::cases::list(&place.at("data"), None).unwrap();
    let split = prism::data::cases::Split::read(&place.at("run/split.json"), &cases).unwrap();
    assert_eq!((split.train.len() + split.test.len(), split.validation.len()), (2, 1));
    // A run is not overwritten; it can be continued with more epochs.
    let error = code(&train("run.toml").output(), 2);
    assert!(error.contains("--resume"), "{error}");
    code(&train("run.toml").with("--resume --epochs 2").output(), 0);
    assert_eq!(std::fs::read_to_string(place.at("run/log.jsonl")).unwrap().lines().count(), 8);
    std::fs::write(place.at("bad.toml"), "learning_rate = 1").unwrap();
    let error = code(&train("bad.toml").output(), 2);
    assert!(error.contains("bad.toml") && error.contains("learning_rate"), "{error}");

    let model = at("run/last.safetensors");
    let eval = |to: &str| eval(&model, &at("data"), &at(to)).with("--iterations 2");
    let run = eval("result").with("--protocol plain-b-1,ultra --cases synth_0001,synth_0002");
    let out = run.file("--masks", at("masks")).output();
    code(&out, 0);
    assert!(text(&out.stdout).contains("| plain-b-1 | 2 |"), "{}", text(&out.stdout));
    for file in ["cases.jsonl", "cases.csv", "results.json", "results.md", "iterations.svg"] {
        assert!(place.at("result").join(file).exists(), "{file}");
    }
    // The mask that it writes has the Dice that it reports.
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(place.at("result/results.json")).unwrap()).unwrap();
    let want = report["results"][1]["cases"][0]["dice"][1].as_f64().unwrap();
    let truth = at("data/labelsTr/synth_0001.nii.gz");
    let out = metrics(&truth, &at("masks/synth_0001_ultra.nii.gz")).with("--json").output();
    let got: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(got["dice"].as_f64(), Some(want));
    // Requested cases must exist; an unreadable case is named and counted.
    let error = code(&eval("result").with("--cases nobody").output(), 2);
    assert!(error.contains("nobody") && error.contains("synth_0002"), "{error}");
    std::fs::write(place.at("data/imagesTr/synth_0000.nii.gz"), b"torn").unwrap();
    let error = code(&eval("patch").with("--on patch").output(), 0);
    assert!(
        error.contains("skipped synth_0000") && error.contains("1 of 3 cases were skipped"),
        "{error}"
    );
}
