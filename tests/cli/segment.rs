//! `prism segment`.

use crate::common::{here, shared};
use crate::program::{metrics, prism, segment};
use crate::{Place, code, example, odd, text};
use prism::model::{Config, Weights};
use prism::volume::Volume;
use std::io::Read;
use std::path::Path;

#[test]
fn segment_writes_mask_probability_preview_and_json() {
    let place = Place::new();
    let image = here("examples/data/lung1_image.nii.gz");
    let (probability, preview) = (place.at("p.nii.gz"), place.at("p.png"));
    let prompts = "--point 80,80,14 --point 60,70,14,- --box 69,68,13,93,94,16";
    let run = place.segment(&image).with(prompts).with("--json");
    let out = run.file("--probability", &probability).file("--preview", &preview).output();
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
    code(&place.segment(&image).with(prompts).with("--threads 1").output(), 0);
    assert!(first == std::fs::read(place.at("mask.nii.gz")).unwrap());
}

/// If a budget was set, the network sees nothing of the scan before all of it has been read.
#[test]
fn what_is_seen_while_the_scan_is_read_changes_nothing() {
    let place = Place::new();
    let packed = here("examples/data/lung1_image.nii.gz");
    let mut bytes = vec![];
    let file = std::fs::File::open(&packed).unwrap();
    flate2::read::MultiGzDecoder::new(file).read_to_end(&mut bytes).unwrap();
    // Values that are not whole numbers: multiplied by 0.9.
    let (plain, short) = (place.at("plain.nii"), place.at("short.nii.gz"));
    bytes[112..116].copy_from_slice(&0.9f32.to_le_bytes());
    std::fs::write(&plain, &bytes).unwrap();
    for (image, prompts) in [
        (&packed, "--box 69,68,13,93,94,16 --modality ct"),
        (&packed, "--box 69,68,0,93,94,4 --point 80,80,2"),
        (&plain, "--point 80,80,14"),
    ] {
        let run = |more: &str| {
            let map = place.at("p.nii");
            let run = place.segment(image).with(prompts).with(more);
            code(&run.file("--probability", &map).output(), 0);
            [place.at("mask.nii.gz"), map].map(|path| std::fs::read(path).unwrap())
        };
        assert!(run("") == run("--memory 4G"), "{prompts}");
    }
    for name in ["mask.nii.gz", "p.nii"] {
        std::fs::remove_file(place.at(name)).unwrap();
    }
    let whole = std::fs::read(&packed).unwrap();
    std::fs::write(&short, &whole[..whole.len() - 100]).unwrap();
    let failed = |more: &str| {
        let run = place.segment(&short).with("--box 69,68,13,93,94,16");
        code(&run.with(more).output(), 1)
    };
    let said = failed("");
    assert!(said.contains("short.nii.gz: truncated or corrupt gzip"), "{said}");
    assert_eq!(said, failed("--memory 4G"));
    assert_eq!(place.names(), ["plain.nii", "short.nii.gz"]);
}

#[test]
fn quiet_leaves_results_and_warnings() {
    let place = Place::new();
    let image = odd("m00_base.nii.gz");
    let run = || place.segment(&image).with("--box 0,0,0,64,48,24");
    let loud = run().output();
    code(&loud, 0);
    assert!(text(&loud.stdout).contains(" voxels, "), "{}", text(&loud.stdout));
    let out = run().with("--quiet").output();
    let error = code(&out, 0);
    assert!(
        out.stdout.is_empty() && error.contains("warning: the object does not fit 32 voxels"),
        "{error}"
    );
    assert!(error.lines().all(|l| l.starts_with("warning: ")), "{error}");
    // JSON was asked for; nothing else is on standard output.
    let out = run().with("--quiet --json").output();
    assert!(code(&out, 0).is_empty());
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(json["warnings"][0].as_str().unwrap().contains("does not fit 32 voxels"));
    let out = prism("-q synth --count 1").file("-o", place.at("scans")).output();
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
        let run = place.segment(&image).file("--space", space);
        code(&run.file("--point", point).output(), 0);
        masks.push(std::fs::read(place.at("mask.nii.gz")).unwrap());
    }
    assert!(masks[0] == masks[1] && masks[0] == masks[2]);
}

#[test]
fn prompts_files_and_label_images_are_prompts() {
    let place = Place::new();
    let image = odd("m00_base.nii.gz");
    let label = odd("m00_base_label.nii.gz");
    for prompt in ["--scribble", "--mask"] {
        code(&place.segment(&image).file(prompt, &label).output(), 0);
    }
    std::fs::copy(&label, place.at("label.nii.gz")).unwrap();
    std::fs::write(
        place.at("p.json"),
        r#"[{"box": [20, 15, 8, 44, 33, 14], "points": [{"position": [30, 20, 10]}]},
            {"points": [{"position": [25, 20, 10], "positive": false}]}, {"scribble": "label.nii.gz"}]"#,
    )
    .unwrap();
    let run = place.segment(&image).with("--json");
    let out = run.file("--prompts", place.at("p.json")).output();
    code(&out, 0);
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(json["iterations"].as_array().unwrap().len(), 3);
    // A box larger than the patch of 32 mm is seen more coarsely, with a message.
    let out = place.segment(&image).with("--box 0,0,0,64,48,24 --json").output();
    code(&out, 0);
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(json["patch"]["coarsened"], true);
    assert!(json["warnings"][0].as_str().unwrap().contains("does not fit 32 voxels of 1 mm"));
    // A label image of another grid is refused, naming both.
    let other = odd("m26_label_shifted.nii.gz");
    let error = code(&place.segment(&image).file("--scribble", other).output(), 1);
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
    let point = "--point 30,20,10";
    for (wrong, words) in [
        ("", "no prompt: give --point"),
        ("--point 1,2", "expected i,j,k"),
        ("--box 1,2,3,4,5", "expected i0,j0,k0,i1,j1,k1"),
        ("--point 30,20,10 --space mni", "possible values: ijk, ras, lps"),
        ("--point 30,20,10 --clip 5,1 --mean 0 --sd 1", "LO below HI"),
        ("--point 30,20,10 --clip 0,1", "--mean"),
        ("--point 30,20,10 --spacing 0", "--spacing"),
        ("--point 30,20,10 --preview p.jpg", "must be a .png file"),
        ("--point 30,20,10 --prompts p.json", "cannot be used with"),
    ] {
        let error = code(&place.segment(&image).with(wrong).output(), 2);
        assert!(error.contains(words), "{wrong}: {error}");
    }
    for (failing, words) in [
        (
            "--point 64,0,0",
            "point at voxel [64, 0, 0] lies outside the scan of [64, 48, 24] voxels",
        ),
        ("--point -1,0,0", "point at voxel [-1, 0, 0] lies outside"),
        ("--box 64,0,0,65,1,1", "lies outside the scan of [64, 48, 24] voxels"),
        ("--box 5,5,5,5,9,9", "is empty along i"),
        ("--point 1.5,2,3", "whole numbers"),
        ("--prompts absent.json", "absent.json"),
        ("--point 30,20,10 --device abacus", "unknown device 'abacus'"),
        ("--point 30,20,10 --volume 3", "volume 3 was requested"),
    ] {
        let error = code(&place.segment(&image).with(failing).output(), 1);
        assert!(error.contains(words), "{failing}: {error}");
    }
    let model = place.at("model.safetensors");
    let out = segment(&model, &model, Path::new("/absent/m.nii.gz")).with("--point 1,1,1").output();
    assert!(code(&out, 1).contains("/absent/m.nii.gz: its folder /absent does not exist"));
    assert!(place.names().is_empty(), "{:?}", place.names());
    // The scan itself is not overwritten.
    let scan = place.at("scan.nii.gz");
    std::fs::copy(&image, &scan).unwrap();
    let out = segment(&model, &scan, &scan).with("--point 1,1,1").output();
    assert!(code(&out, 2).contains("would overwrite it"));
    std::fs::remove_file(&scan).unwrap();
    // An output that existed before stays as it was.
    std::fs::write(place.at("mask.nii.gz"), "precious").unwrap();
    code(&place.segment(&odd("m01_trunc_gz.nii.gz")).with(point).output(), 1);
    let run = place.segment(&image).with(point);
    code(&run.file("--preview", place.at("absent/p.png")).output(), 1);
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
        let out = prism("info").arg(&path).output();
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
        let segmented = place.segment(&path).with("--point 1,1,0 --percentiles").output();
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
        let run = place.segment(&path).with("--space ras --percentiles --json");
        let out = run.file("--point", format!("{x},{y},{z}")).output();
        code(&out, 0);
        let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        volumes.push(json["voxels"].as_u64().unwrap());
    }
    assert!(volumes.len() == 16 && volumes.iter().all(|v| *v == volumes[0]), "{volumes:?}");
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
    let ([image, label], mask) = (example(), place.at("mask.nii.gz"));
    let bounds = "--box 69,68,13,93,94,16 --point 80,80,14";
    let out = segment(&path, &image, &mask).with("--json").with(bounds).output();
    code(&out, 0);
    // The tutorial says the same of the same scan and prompts.
    let (json, tutorial) = (
        serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap(),
        std::fs::read_to_string(here("docs/embedding.md")).unwrap(),
    );
    for (name, words) in
        [("packed_weights", "MB of packed weights"), ("encoded_scan", "MB per encoded patch")]
    {
        let figure = format!("{:.0} {words}", json["bytes"][name].as_f64().unwrap() / 1e6);
        assert!(tutorial.contains(&figure), "docs/embedding.md does not say '{figure}'");
    }
    // Without --model it is the variable's, otherwise the built-in one, which gives the same
    // answer; a message says which one it is.
    let without = |variable: &str| {
        let other = place.at("other.nii.gz");
        let mut run = prism("segment").file("-i", &image).file("-o", &other).with(bounds);
        run.0.env("PRISM_MODEL", variable).current_dir(place.folder.path());
        let said = code(&run.output(), 0);
        (said, std::fs::read(other).unwrap() == std::fs::read(&mask).unwrap())
    };
    let (said, same) = without("");
    assert!(said.contains("model: the small model built into the program") && same, "{said}");
    let (said, same) = without("model.safetensors");
    assert!(said.contains("model: model.safetensors") && !same, "{said}");
    let out = metrics(&label, &mask).with("--json").output();
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(report["dice"].as_f64().unwrap() > 0.6, "{report:#}");
}
