//! The program as its users meet it: results, messages, exit codes, files that are whole or absent.

mod common;

use common::{here, shared, tiny};
use prism::model::{Config, Weights, weights::Precision};
use prism::volume::Volume;
use prism::volume::labels::Labels;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    /// A folder with a tiny model in it.
    fn new() -> Place {
        let place = Place { folder: tempfile::tempdir().unwrap() };
        Weights::hashed(tiny(), "cli")
            .save(&place.at("model.safetensors"), Precision::F32)
            .unwrap();
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Names in the folder, sorted, beside the model.
    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|n| n != "model.safetensors");
        names.sort();
        names
    }

    /// Runs `prism segment` with the tiny model on `image`, writing `mask.nii.gz` here.
    fn segment(&self, image: &Path, more: &[&str]) -> Output {
        let (model, mask) = (self.at("model.safetensors"), self.at("mask.nii.gz"));
        let mut args = vec![
            "segment",
            "-m",
            model.to_str().unwrap(),
            "-i",
            image.to_str().unwrap(),
            "-o",
            mask.to_str().unwrap(),
        ];
        args.extend(more);
        prism(&args)
    }
}

fn prism(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_prism")).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Asserts the exit code, and that nothing panicked whatever it was.
#[track_caller]
fn code(out: &Output, want: i32) -> String {
    let error = text(&out.stderr);
    assert_eq!(out.status.code(), Some(want), "{error}");
    assert!(!error.contains("panicked"), "{error}");
    error
}

fn odd(name: &str) -> PathBuf {
    here("tests/data/odd").join(name)
}

#[test]
fn segment_writes_mask_probability_preview_and_json() {
    let place = Place::new();
    let image = here("examples/data/lung1_image.nii.gz");
    let (probability, preview) = (place.at("p.nii.gz"), place.at("p.png"));
    let out = place.segment(
        &image,
        &[
            "--point",
            "80,80,14",
            "--point",
            "60,70,14,-",
            "--box",
            "69,68,13,93,94,16",
            "--json",
            "--probability",
            probability.to_str().unwrap(),
            "--preview",
            preview.to_str().unwrap(),
        ],
    );
    code(&out, 0);
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let scan = Volume::read(&image, None).unwrap();
    let mask = Volume::read(&place.at("mask.nii.gz"), None).unwrap();
    assert_eq!(mask.grid, scan.grid);
    let voxels = mask.values().iter().filter(|v| **v == 1.0).count();
    assert!(mask.values().iter().all(|v| *v == 0.0 || *v == 1.0));
    assert_eq!(json["voxels"].as_u64().unwrap() as usize, voxels);
    let ml = voxels as f64 * scan.grid.voxel_ml();
    assert!((json["volume_ml"].as_f64().unwrap() - ml).abs() < 1e-6);
    assert_eq!(json["iterations"][0]["scores"].as_array().unwrap().len(), 3);
    for stage in ["read", "load", "encode", "decode", "refine", "paste"] {
        assert!(json["seconds"][stage].as_f64().unwrap() >= 0.0, "{stage}");
    }
    // The mask is where the probability exceeds one half.
    let p = Volume::read(&probability, None).unwrap();
    assert_eq!(p.grid, scan.grid);
    assert!(p.values().iter().zip(&mask.values()).all(|(p, m)| (*p > 0.5) == (*m == 1.0)));
    let png = std::fs::read(&preview).unwrap();
    assert_eq!(&png[..8], b"\x89PNG\r\n\x1a\n");
    // Three panels of 400 pixels with margins beside them, and rows of text above and below.
    assert_eq!(
        [16, 20].map(|at| u32::from_be_bytes(png[at..at + 4].try_into().unwrap())),
        [1360, 568]
    );
    assert_eq!(place.names(), ["mask.nii.gz", "p.nii.gz", "p.png"]);
    // The same call gives the same bytes.
    let first = std::fs::read(place.at("mask.nii.gz")).unwrap();
    let again = [
        "--point",
        "80,80,14",
        "--point",
        "60,70,14,-",
        "--box",
        "69,68,13,93,94,16",
        "--threads",
        "1",
    ];
    code(&place.segment(&image, &again), 0);
    assert!(first == std::fs::read(place.at("mask.nii.gz")).unwrap());
}

#[test]
fn quiet_leaves_results_and_warnings() {
    let place = Place::new();
    let image = odd("m00_base.nii.gz");
    let bounds = ["--box", "0,0,0,64,48,24"];
    let loud = place.segment(&image, &bounds);
    code(&loud, 0);
    assert!(text(&loud.stdout).contains(" voxels, "), "{}", text(&loud.stdout));
    let out = place.segment(&image, &[&bounds[..], &["--quiet"]].concat());
    let error = code(&out, 0);
    assert!(
        out.stdout.is_empty() && error.contains("warning: the object does not fit 32 voxels"),
        "{error}"
    );
    assert!(error.lines().all(|l| l.starts_with("warning: ")), "{error}");
    // JSON was asked for; nothing is on standard output beside it.
    let out = place.segment(&image, &[&bounds[..], &["--quiet", "--json"]].concat());
    assert!(code(&out, 0).is_empty());
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(json["warnings"][0].as_str().unwrap().contains("does not fit 32 voxels"));
    let folder = place.at("scans").display().to_string();
    let out = prism(&["-q", "synth", "-o", &folder, "--count", "1"]);
    assert!(code(&out, 0).is_empty() && out.stdout.is_empty());
}

#[test]
fn points_mean_the_same_in_every_space() {
    let place = Place::new();
    let image = here("examples/data/lung1_image.nii.gz");
    let grid = Volume::read(&image, None).unwrap().grid;
    let [x, y, z] = grid.affine.apply([80.0, 80.0, 14.0]);
    let mut masks = vec![];
    for (space, point) in [
        ("ijk", "80,80,14".to_string()),
        ("ras", format!("{x},{y},{z},+")),
        ("lps", format!("{},{},{z}", -x, -y)),
    ] {
        code(&place.segment(&image, &["--space", space, "--point", &point]), 0);
        masks.push(std::fs::read(place.at("mask.nii.gz")).unwrap());
    }
    assert!(masks[0] == masks[1] && masks[0] == masks[2]);
}

#[test]
fn prompts_files_and_label_images_are_prompts() {
    let place = Place::new();
    let image = odd("m00_base.nii.gz");
    let label = odd("m00_base_label.nii.gz");
    code(&place.segment(&image, &["--scribble", label.to_str().unwrap()]), 0);
    code(&place.segment(&image, &["--mask", label.to_str().unwrap()]), 0);
    std::fs::copy(&label, place.at("label.nii.gz")).unwrap();
    std::fs::write(
        place.at("p.json"),
        r#"[{"box": [20, 15, 8, 44, 33, 14], "points": [{"position": [30, 20, 10]}]},
            {"points": [{"position": [25, 20, 10], "positive": false}]}, {"scribble": "label.nii.gz"}]"#,
    )
    .unwrap();
    let out = place.segment(&image, &["--prompts", place.at("p.json").to_str().unwrap(), "--json"]);
    code(&out, 0);
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(json["iterations"].as_array().unwrap().len(), 3);
    // A box larger than the patch of 32 mm is seen coarser, and that is said.
    let out = place.segment(&image, &["--box", "0,0,0,64,48,24", "--json"]);
    code(&out, 0);
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(json["patch"]["coarsened"], true);
    assert!(json["warnings"][0].as_str().unwrap().contains("does not fit 32 voxels of 1 mm"));
    // A label image of another grid is refused, naming both.
    let error = code(
        &place.segment(&image, &["--scribble", odd("m26_label_shifted.nii.gz").to_str().unwrap()]),
        1,
    );
    assert!(
        error.contains(
            "m26_label_shifted.nii.gz: its size is [63, 48, 24], the image's is [64, 48, 24]"
        ),
        "{error}"
    );
}

#[test]
fn wrong_use_is_exit_code_2_and_failure_1() {
    let place = Place::new();
    let image = odd("m00_base.nii.gz");
    let point = ["--point", "30,20,10"];
    for (args, words) in [
        (vec![], "a prompt is needed"),
        (vec!["--point", "1,2"], "expected i,j,k"),
        (vec!["--box", "1,2,3,4,5"], "expected i0,j0,k0,i1,j1,k1"),
        (vec!["--point", "30,20,10", "--space", "mni"], "possible values: ijk, ras, lps"),
        (vec!["--point", "30,20,10", "--clip", "5,1", "--mean", "0", "--sd", "1"], "LO below HI"),
        (vec!["--point", "30,20,10", "--clip", "0,1"], "--mean"),
        (vec!["--point", "30,20,10", "--spacing", "0"], "--spacing"),
        (vec!["--point", "30,20,10", "--preview", "p.jpg"], "must be named .png"),
        (vec!["--point", "30,20,10", "--prompts", "p.json"], "cannot be used with"),
    ] {
        let error = code(&place.segment(&image, &args), 2);
        assert!(error.contains(words), "{args:?}: {error}");
    }
    for (args, words) in [
        (
            vec!["--point", "64,0,0"],
            "point at voxel [64, 0, 0] lies outside the scan of [64, 48, 24] voxels",
        ),
        (vec!["--point", "-1,0,0"], "point at voxel [-1, 0, 0] lies outside"),
        (vec!["--box", "64,0,0,65,1,1"], "lies outside the scan of [64, 48, 24] voxels"),
        (vec!["--box", "5,5,5,5,9,9"], "is empty along i"),
        (vec!["--point", "1.5,2,3"], "whole numbers"),
        (vec!["--prompts", "absent.json"], "absent.json"),
        (vec!["--point", "30,20,10", "--device", "abacus"], "unknown device 'abacus'"),
        (vec!["--point", "30,20,10", "--volume", "3"], "volume 3 was asked for"),
    ] {
        let error = code(&place.segment(&image, &args), 1);
        assert!(error.contains(words), "{args:?}: {error}");
    }
    let model = place.at("model.safetensors");
    let args = [
        "segment",
        "-m",
        model.to_str().unwrap(),
        "-i",
        model.to_str().unwrap(),
        "-o",
        "/absent/m.nii.gz",
        "--point",
        "1,1,1",
    ];
    assert!(code(&prism(&args), 1).contains("/absent/m.nii.gz: its folder /absent does not exist"));
    assert!(place.names().is_empty(), "{:?}", place.names());
    // The scan itself is not written over.
    let scan = place.at("scan.nii.gz");
    std::fs::copy(&image, &scan).unwrap();
    let args = [
        "segment",
        "-m",
        model.to_str().unwrap(),
        "-i",
        scan.to_str().unwrap(),
        "-o",
        scan.to_str().unwrap(),
        "--point",
        "1,1,1",
    ];
    assert!(code(&prism(&args), 2).contains("would overwrite it"));
    std::fs::remove_file(&scan).unwrap();
    // An output that was there stays as it was.
    std::fs::write(place.at("mask.nii.gz"), "precious").unwrap();
    code(&place.segment(&odd("m01_trunc_gz.nii.gz"), &point), 1);
    let folder = place.at("absent").join("p.png");
    code(
        &place.segment(&image, &[&point[..], &["--preview", folder.to_str().unwrap()]].concat()),
        1,
    );
    assert_eq!(std::fs::read(place.at("mask.nii.gz")).unwrap(), b"precious");
    assert_eq!(place.names(), ["mask.nii.gz"]);
}

#[test]
fn odd_files_never_panic() {
    let place = Place::new();
    let mut folders = vec![here("tests/data/odd")];
    folders.extend(shared("data/odd"));
    let mut seen = 0;
    for path in
        folders.iter().flat_map(|f| std::fs::read_dir(f).unwrap()).map(|e| e.unwrap().path())
    {
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.ends_with(".json") || name.ends_with(".md") {
            continue;
        }
        let out = prism(&["info", path.to_str().unwrap()]);
        let error = text(&out.stderr);
        assert!(!error.contains("panicked"), "{name}: {error}");
        match out.status.code() {
            Some(0) => assert!(text(&out.stdout).contains("spacing"), "{name}"),
            Some(1) => assert!(
                error.starts_with("error: ")
                    && error.contains(name.trim_end_matches(".img").trim_end_matches(".hdr")),
                "{name}: {error}"
            ),
            other => panic!("{name}: exit code {other:?}"),
        }
        let segmented = place.segment(&path, &["--point", "1,1,0", "--percentiles"]);
        assert!(
            !text(&segmented.stderr).contains("panicked"),
            "{name}: {}",
            text(&segmented.stderr)
        );
        assert_eq!(segmented.status.code() == Some(0), place.at("mask.nii.gz").exists(), "{name}");
        let _ = std::fs::remove_file(place.at("mask.nii.gz"));
        assert!(place.names().is_empty(), "{name} left {:?}", place.names());
        seen += 1;
    }
    assert!(seen >= 20);
}

/// One anatomy in 16 axis orders: the same place in the world gives the same mask in the world.
#[test]
fn shared_orientations_segment_alike() {
    let Some(folder) = shared("data/orient") else { return };
    let place = Place::new();
    let mut volumes = vec![];
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let grid = Volume::read(&path, None).unwrap().grid.canonical();
        let [x, y, z] = grid.affine.apply([30.0, 40.0, 33.0]);
        let point = format!("{x},{y},{z}");
        let out =
            place.segment(&path, &["--space", "ras", "--point", &point, "--percentiles", "--json"]);
        code(&out, 0);
        let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        volumes.push(json["voxels"].as_u64().unwrap());
    }
    assert!(volumes.len() == 16 && volumes.iter().all(|v| *v == volumes[0]), "{volumes:?}");
}

#[test]
fn convert_names_what_does_not_fit_and_refuses_what_could_run() {
    let place = Place::new();
    let reference = here("tests/reference/misc");
    let convert_with = |file: &str, more: &[&str]| {
        let files =
            [reference.join(file), place.at("m.safetensors")].map(|p| p.display().to_string());
        code(&prism(&[&["convert", &files[0], &files[1]][..], more].concat()), 1)
    };
    let convert = |file: &str| convert_with(file, &[]);
    // A few lines that say what was expected and how much differs.
    let error = convert("checkpoint_zip.pth.tar");
    assert!(
        error.lines().count() <= 6
            && error.contains("do not fit the network base")
            && error.contains("tensors\n"),
        "{error}"
    );
    let missing = " missing: image_encoder.patch_embed.proj.weight; image_encoder.patch_embed.proj.bias; image_encoder.pos_embed; ...";
    assert!(error.contains(missing), "{error}");
    assert!(
        error.contains(
            " 8 unexpected: mask_decoder.bfloat; mask_decoder.count; mask_decoder.double; ..."
        ),
        "{error}"
    );
    assert!(error.contains(" 2 mis-shaped: image_encoder.neck.0.weight is [3, 6], expected [384, 768, 1, 1, 1]; image_encoder"), "{error}");
    // All of them are to be had.
    let error = convert_with("checkpoint_zip.pth.tar", &["--verbose"]);
    assert!(error.contains("missing: prompt_encoder.iou_token.weight"), "{error}");
    assert!(error.contains("unexpected: mask_decoder.scalar"), "{error}");
    assert!(
        error.contains("mis-shaped: image_encoder.neck.1.bias is [12], expected [384]"),
        "{error}"
    );
    assert!(convert("checkpoint_malicious.pth").contains("refused: it names '"));
    assert!(
        convert("checkpoint_not_a_checkpoint.pth").contains("not a readable PyTorch checkpoint")
    );
    assert!(convert("checkpoint_truncated.pth.tar").contains("checkpoint_truncated.pth.tar"));
    assert!(convert("absent.pth").contains("absent.pth"));
    assert!(place.names().is_empty());
}

#[test]
fn models_and_images_introduce_themselves() {
    let place = Place::new();
    let out = prism(&["info", place.at("model.safetensors").to_str().unwrap()]);
    code(&out, 0);
    assert!(
        text(&out.stdout).contains("32 x 32 x 32 voxels at 1 mm")
            && text(&out.stdout).contains("clip -1000 to 400")
    );
    // Half precision, and a configuration from a file.
    std::fs::write(
        place.at("c.json"),
        serde_json::to_string(&Config { patch: 48, ..tiny() }).unwrap(),
    )
    .unwrap();
    let (config, model) = (place.at("c.json"), place.at("h.safetensors"));
    let args = [
        "weights",
        "--salt",
        "s",
        "--config",
        config.to_str().unwrap(),
        "--dtype",
        "bf16",
        "-o",
        model.to_str().unwrap(),
    ];
    code(&prism(&args), 0);
    let out = prism(&["info", model.to_str().unwrap()]);
    assert!(text(&out.stdout).contains("48 x 48 x 48") && text(&out.stdout).contains("(bf16)"));
    let out = prism(&["info", odd("m18_lefthanded_qform.nii.gz").to_str().unwrap()]);
    assert!(
        text(&out.stdout).contains("left-handed")
            && text(&out.stdout).contains("affine from qform")
    );
    // A damaged model, and one that says nothing of its network.
    let bytes = std::fs::read(&model).unwrap();
    std::fs::write(&model, &bytes[..bytes.len() - 9]).unwrap();
    assert!(
        code(&prism(&["info", model.to_str().unwrap()]), 1)
            .contains("not a readable safetensors file")
    );
    let bare = here("tests/reference/misc/checkpoint_expected.safetensors");
    assert!(
        code(&prism(&["info", bare.to_str().unwrap()]), 1).contains("no network configuration")
    );
}

#[test]
fn verify_prints_a_line_a_case_and_says_no() {
    let folder = tempfile::tempdir().unwrap();
    for case in ["linear", "gelu"] {
        let name = format!("{case}.safetensors");
        std::fs::copy(here("tests/reference/ops").join(&name), folder.path().join(&name)).unwrap();
    }
    let report = folder.path().join("report.json");
    let out = prism(&[
        "verify",
        folder.path().to_str().unwrap(),
        "--only",
        "op",
        "--save",
        report.to_str().unwrap(),
    ]);
    code(&out, 0);
    let lines = text(&out.stdout);
    assert!(
        lines.lines().count() == 3
            && lines.starts_with("ok   gelu.safetensors")
            && lines.contains("2 passed, 0 failed")
    );
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert_eq!(json["cases"][1]["checks"][0]["quantity"], "out.0");
    // The report itself is a file of no known kind.
    let out = prism(&["verify", folder.path().to_str().unwrap()]);
    code(&out, 1);
    assert!(text(&out.stdout).contains("FAIL report.json"));
    code(&prism(&["verify", "/nowhere"]), 1);
    code(&prism(&["verify", folder.path().to_str().unwrap(), "--only", "poems"]), 2);
}

#[test]
fn a_checkpoint_becomes_the_model_it_was() {
    let place = Place::new();
    let (checkpoint, config) =
        (here("tests/data/checkpoint.pth.tar"), here("tests/data/checkpoint.json"));
    let model = place.at("m.safetensors");
    let args = |more: &'static [&'static str]| {
        let mut args = vec![
            "convert",
            checkpoint.to_str().unwrap(),
            model.to_str().unwrap(),
            "--config",
            config.to_str().unwrap(),
        ];
        args.extend(more);
        prism(&args)
    };
    code(&args(&["--preset", "liver"]), 0);
    let got = Weights::open(&model).unwrap();
    assert_eq!(got.config.intensity, prism::model::Intensity::preset("liver"));
    let want = Weights::hashed(got.config.clone(), "checkpoint");
    for (name, _) in got.config.tensors() {
        assert_eq!(got.get(&name).data(), want.get(&name).data(), "{name}");
    }
    // In half precision, to its last place.
    code(&args(&["--dtype", "f16"]), 0);
    let half = Weights::open(&model).unwrap();
    let name = "mask_decoder.refine.conv1.conv_0.conv.weight";
    for (h, w) in half.get(name).data().iter().zip(want.get(name).data()) {
        approx::assert_relative_eq!(*h, *w, max_relative = 1.0 / 1024.0, epsilon = 1e-7);
    }
    // A model file is written again in another precision, with its own configuration.
    let again = place.at("again.safetensors");
    code(
        &prism(&["convert", model.to_str().unwrap(), again.to_str().unwrap(), "--dtype", "bf16"]),
        0,
    );
    assert_eq!(Weights::open(&again).unwrap().config, half.config);
    // For another network it is named what does not fit, and nothing is written.
    std::fs::remove_file(&model).unwrap();
    let error =
        code(&prism(&["convert", checkpoint.to_str().unwrap(), model.to_str().unwrap()]), 1);
    assert!(
        error.contains("missing: image_encoder.blocks.3.norm1.weight") && !model.exists(),
        "{error}"
    );
}

/// The example scan's files.
fn example() -> [String; 2] {
    ["image", "label"]
        .map(|n| here(&format!("examples/data/lung1_{n}.nii.gz")).display().to_string())
}

#[test]
fn metrics_of_two_files() {
    let [_, label] = example();
    let out = prism(&["metrics", "--truth", &label, "--prediction", &label, "--json"]);
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
    let out = prism(&["metrics", "--truth", &label, "--prediction", &label]);
    code(&out, 0);
    assert!(text(&out.stdout).starts_with("Dice                   1.0000\n"));
    let other = here("tests/data/odd/m00_base_label.nii.gz").display().to_string();
    let error = code(&prism(&["metrics", "--truth", &label, "--prediction", &other]), 1);
    assert!(error.contains("m00_base_label") && error.contains("size"), "{error}");
    code(&prism(&["metrics", "--truth", &label, "--prediction", &label, "--tolerance", "-1"]), 2);
}

#[test]
fn simulated_prompts_can_be_looked_at() {
    let place = Place::new();
    let [image, label] = example();
    let out = place.at("sim").display().to_string();
    code(&prism(&["simulate", "-i", &image, "-l", &label, "-o", &out, "--box-growth", "3"]), 0);
    let read = |name: &str| {
        let grid = Volume::read(Path::new(&image), None).unwrap().grid;
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
    // An answer that is right leaves nothing to say.
    let out = prism(&["simulate", "-i", &image, "-l", &label, "-p", &label, "-o", &out]);
    code(&out, 0);
    assert!(
        text(&out.stdout)
            .starts_with("missed 0 voxels, 0 too much\npoints: 0 positive, 0 negative\n")
    );
}

#[test]
fn processes_of_a_run_need_the_same_token() {
    let place = Place::new();
    let at = |n: &str| place.at(n).display().to_string();
    std::fs::write(place.at("network.json"), serde_json::to_string(&tiny()).unwrap()).unwrap();
    std::fs::write(place.at("token"), "one\n").unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
        .to_string();
    let start = |rank: &str, host: &str, token: Option<&str>, more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_prism"));
        command.args([
            "train",
            "--model",
            &at("network.json"),
            "--out",
            &at("run"),
            "--threads",
            "1",
            "--epochs",
            "1",
            "--steps",
            "1",
        ]);
        command
            .args([
                "--batch",
                "2",
                "--iterations",
                "1",
                "--validation-cases",
                "1",
                "--validation-iterations",
                "1",
            ])
            .args(more);
        for name in ["PRISM_PORT", "PRISM_TOKEN", "TORCHELASTIC_USE_AGENT_STORE"] {
            command.env_remove(name);
        }
        command.envs([
            ("RANK", rank),
            ("WORLD_SIZE", "2"),
            ("LOCAL_RANK", "0"),
            ("MASTER_ADDR", host),
            ("MASTER_PORT", port.as_str()),
        ]);
        command.envs(token.map(|token| ("PRISM_TOKEN", token)));
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let end = |process: Child, want: i32| code(&process.wait_with_output().unwrap(), want);
    let first = start("0", "127.0.0.1", Some("one"), &[]);
    let error = end(start("1", "127.0.0.1", Some("another"), &[]), 1);
    assert!(error.contains("process 0 has another token"), "{error}");
    // A file wins over the variable.
    end(start("1", "127.0.0.1", Some("another"), &["--token-file", &at("token")]), 0);
    let said = end(first, 0);
    assert!(said.contains("is not a process of this training run: it says that it is process 1 and has another token"), "{said}");
    assert!(place.at("run/last.safetensors").exists());
    // Where others than this machine's can call, a token is needed.
    let error = end(start("0", "0.0.0.0", None, &[]), 2);
    assert!(error.contains("PRISM_TOKEN or --token-file"), "{error}");
}

#[test]
fn a_file_of_settings_may_say_where_to_train_and_flags_win() {
    let place = Place::new();
    let at = |n: &str| place.at(n).display().to_string();
    std::fs::write(place.at("network.json"), serde_json::to_string(&tiny()).unwrap()).unwrap();
    let train = |lines: &str, more: &[&str]| {
        let files = format!("model = {:?}\nout = {:?}\n", at("network.json"), at("run"));
        let small = "epochs = 1\nsteps = 1\nbatch = 1\niterations = 1\nvalidation_cases = 1\nvalidation_iterations = 1\n";
        std::fs::write(place.at("run.toml"), format!("{files}{small}{lines}")).unwrap();
        prism(&[&["train", "-c", &at("run.toml")][..], more].concat())
    };
    assert!(code(&train("device = \"abacus\"\n", &[]), 1).contains("unknown device 'abacus'"));
    assert!(
        code(&train("precision = \"f64\"\n", &[]), 2)
            .contains("precision is 'f64', expected f32, f16 or bf16")
    );
    let elsewhere = "device = \"abacus\"\nprecision = \"f16\"\nthreads = 1\n";
    code(&train(elsewhere, &["--device", "cpu", "--precision", "f32"]), 0);
    // They are not kept with the run, which goes on wherever it is told to.
    let kept = std::fs::read_to_string(place.at("run/settings.toml")).unwrap();
    assert!(!["device", "precision", "threads"].iter().any(|name| kept.contains(name)), "{kept}");
    code(&train("device = \"cpu\"\nthreads = 2\n", &["--resume", "--epochs", "2"]), 0);
}

#[test]
fn synthesise_train_and_evaluate() {
    let place = Place::new();
    let at = |n: &str| place.at(n).display().to_string();
    code(&prism(&["synth", "-o", &at("data"), "--count", "3", "--seed", "5"]), 0);
    code(&prism(&["synth", "-o", &at("data")]), 2);
    std::fs::write(place.at("network.json"), serde_json::to_string(&tiny()).unwrap()).unwrap();
    let toml = format!(
        "model = {:?}\ndata = {:?}\nout = {:?}\nepochs = 1\nsteps = 2\nbatch = 1\niterations = 2\nvalidation_iterations = 2\n",
        at("network.json"),
        at("data"),
        at("run")
    );
    std::fs::write(place.at("run.toml"), toml).unwrap();
    let out = prism(&["train", "-c", &at("run.toml"), "--lr", "1e-3"]);
    code(&out, 0);
    assert_eq!(text(&out.stdout), format!("{}: finished\n", at("run")));
    let log = std::fs::read_to_string(place.at("run/log.jsonl")).unwrap();
    assert!(log.lines().count() == 3 && log.contains("\"lr\":0.001"), "{log}");
    // How the cases were split is kept, in the form that --split reads.
    let cases = prism::data::cases::list(&place.at("data"), None).unwrap();
    let split = prism::data::cases::Split::read(&place.at("run/split.json"), &cases).unwrap();
    assert_eq!((split.train.len() + split.test.len(), split.validation.len()), (2, 1));
    // A run is not overwritten; it goes on with more epochs.
    let error = code(&prism(&["train", "-c", &at("run.toml")]), 2);
    assert!(error.contains("--resume"), "{error}");
    code(&prism(&["train", "-c", &at("run.toml"), "--resume", "--epochs", "2"]), 0);
    assert_eq!(std::fs::read_to_string(place.at("run/log.jsonl")).unwrap().lines().count(), 6);
    std::fs::write(place.at("bad.toml"), "learning_rate = 1").unwrap();
    let error = code(&prism(&["train", "-c", &at("bad.toml")]), 2);
    assert!(error.contains("bad.toml") && error.contains("learning_rate"), "{error}");

    let model = at("run/last.safetensors");
    let eval = |more: &[&str]| {
        let mut args = vec!["eval", "-m", &model, "--iterations", "2"];
        args.extend(more);
        prism(&args)
    };
    let (data, result) = (at("data"), at("result"));
    let out = eval(&[
        "-d",
        &data,
        "-o",
        &result,
        "--protocol",
        "plain-b-1,ultra",
        "--masks",
        &at("masks"),
        "--cases",
        "synth_0001,synth_0002",
    ]);
    code(&out, 0);
    assert!(text(&out.stdout).contains("| plain-b-1 | 2 |"), "{}", text(&out.stdout));
    for file in ["cases.jsonl", "cases.csv", "results.json", "results.md", "iterations.svg"] {
        assert!(place.at("result").join(file).exists(), "{file}");
    }
    // The mask it leaves has the Dice it reports.
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(place.at("result/results.json")).unwrap()).unwrap();
    let want = report["results"][1]["cases"][0]["dice"][1].as_f64().unwrap();
    let truth = place.at("data/labelsTr/synth_0001.nii.gz").display().to_string();
    let out = prism(&[
        "metrics",
        "--truth",
        &truth,
        "--prediction",
        &at("masks/synth_0001_ultra.nii.gz"),
        "--json",
    ]);
    let got: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(got["dice"].as_f64(), Some(want));
    // What is asked for must exist; an unreadable case is named and counted.
    let error = code(&eval(&["-d", &data, "-o", &result, "--cases", "nobody"]), 2);
    assert!(error.contains("nobody") && error.contains("synth_0002"), "{error}");
    std::fs::write(place.at("data/imagesTr/synth_0000.nii.gz"), b"torn").unwrap();
    let error = code(&eval(&["-d", &data, "-o", &at("patch"), "--on", "patch"]), 0);
    assert!(
        error.contains("skipped synth_0000") && error.contains("1 of 3 cases were skipped"),
        "{error}"
    );
}

#[test]
fn the_model_that_comes_along_finds_the_example_nodule() {
    let path = here("models/small.safetensors");
    assert!(std::fs::metadata(&path).unwrap().len() <= 16_000_000);
    let config = Weights::open(&path).unwrap().config;
    assert!(config.calibration.is_some());
    assert_eq!(
        config,
        Config { click_radius: 1.5, calibration: config.calibration, ..Config::small() }
    );
    let place = Place::new();
    let ([image, label], mask) = (example(), place.at("mask.nii.gz").display().to_string());
    let model = path.display().to_string();
    let bounds = ["--box", "69,68,13,93,94,16", "--point", "80,80,14"];
    let out = prism(
        &[&["segment", "-m", &model, "-i", &image, "-o", &mask, "--json"][..], &bounds[..]]
            .concat(),
    );
    code(&out, 0);
    // The tutorial says so of the same scan and prompts.
    let (json, tutorial) = (
        serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap(),
        std::fs::read_to_string(here("docs/embedding.md")).unwrap(),
    );
    for (name, words) in
        [("packed_weights", "MB of weights laid out anew"), ("encoded_scan", "MB an encoded patch")]
    {
        let figure = format!("{:.0} {words}", json["bytes"][name].as_f64().unwrap() / 1e6);
        assert!(tutorial.contains(&figure), "docs/embedding.md does not say '{figure}'");
    }
    // Without --model it is the variable's, else the one built in, which answers alike; which one
    // it is, is said.
    let without = |variable: &str| {
        let other = place.at("other.nii.gz");
        let mut command = Command::new(env!("CARGO_BIN_EXE_prism"));
        command
            .args(["segment", "-i", &image, "-o", other.to_str().unwrap()])
            .args(bounds)
            .env("PRISM_MODEL", variable);
        let said = code(&command.current_dir(place.folder.path()).output().unwrap(), 0);
        (said, std::fs::read(other).unwrap() == std::fs::read(&mask).unwrap())
    };
    let (said, same) = without("");
    assert!(said.contains("model: the small model built into the program") && same, "{said}");
    let (said, same) = without("model.safetensors");
    assert!(said.contains("model: model.safetensors") && !same, "{said}");
    let out = prism(&["metrics", "--truth", &label, "--prediction", &mask, "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(report["dice"].as_f64().unwrap() > 0.6, "{report:#}");
}

/// Lines of code blocks, and what stands between backquotes.
fn code_of(document: &str) -> Vec<&str> {
    let (mut fenced, mut all) = (false, vec![]);
    for line in document.lines() {
        match (line.starts_with("```"), fenced) {
            (true, _) => fenced = !fenced,
            (false, true) => all.push(line),
            (false, false) => all.extend(line.split('`').skip(1).step_by(2)),
        }
    }
    all
}

#[test]
fn commands_in_the_documents_have_flags_that_the_program_knows() {
    let mut documents = ["README.md", "SECURITY.md", "models/README.md"].map(here).to_vec();
    let entries = std::fs::read_dir(here("docs")).unwrap().map(|e| e.unwrap().path());
    documents.extend(entries.filter(|p| p.extension().is_some_and(|e| e == "md")));
    let mut helps: BTreeMap<String, String> = BTreeMap::new();
    let mut checked = 0;
    for document in documents {
        let said = std::fs::read_to_string(&document).unwrap();
        for line in code_of(&said) {
            let ends = |w: &&str| w.starts_with('#') || [";", "|", "&&"].contains(w);
            let words: Vec<&str> = line.split_whitespace().take_while(|w| !ends(w)).collect();
            // `cargo run -- COMMAND` is one too. What is no command has no help.
            let Some(at) = words
                .iter()
                .position(|w| ["prism", "--"].contains(w))
                .filter(|at| at + 1 < words.len())
            else {
                continue;
            };
            let help = helps
                .entry(words[at + 1].to_string())
                .or_insert_with_key(|command| text(&prism(&[command.as_str(), "--help"]).stdout));
            let flags = words[at + 2..]
                .iter()
                .map(|w| w.trim_matches(['[', ']']).split('=').next().unwrap_or_default());
            for flag in flags.filter(|f| {
                f.trim_start_matches('-').starts_with(char::is_alphabetic) && f.starts_with('-')
            }) {
                let is_known = help.is_empty()
                    || [' ', ',', '\n'].iter().any(|end| help.contains(&format!("{flag}{end}")));
                assert!(
                    is_known,
                    "{}: '{line}': prism {} has no {flag}",
                    document.display(),
                    words[at + 1]
                );
                checked += usize::from(!help.is_empty());
            }
        }
    }
    assert!(checked > 40, "{checked} flags were found");
}

/// A cargo that builds nothing and names the program that these tests were built with stands in for
/// one that was told to build elsewhere.
#[cfg(unix)]
#[test]
fn scripts_take_the_program_from_where_cargo_says_that_it_lies() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place { folder: tempfile::tempdir().unwrap() };
    let made = serde_json::json!({ "reason": "compiler-artifact", "filenames": [env!("CARGO_BIN_EXE_prism")] });
    std::fs::write(place.at("cargo"), format!("#!/bin/sh\necho '{made}'\n")).unwrap();
    std::fs::set_permissions(place.at("cargo"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", place.folder.path().display(), std::env::var("PATH").unwrap());
    let script = |name: &str, args: &[&str]| {
        Command::new(here(name)).args(args).env("PATH", &path).output().unwrap()
    };
    let out = script("scripts/demo", &[place.at("demo").to_str().unwrap()]);
    let said = code(&out, 0);
    assert!(said.contains("1 of 3") && said.contains(env!("CARGO_BIN_EXE_prism")), "{said}");
    assert!(
        text(&out.stdout).contains("\nDice ")
            && place.at("demo/mask.nii.gz").exists()
            && place.at("demo/preview.png").exists()
    );
    // What cargo did not make is said to be missing.
    let said = code(&script("scripts/built", &["libother.so", "build"]), 1);
    assert!(said.contains("made no libother.so"), "{said}");
}
