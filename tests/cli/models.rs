//! Model files, and commands that make them.

use crate::common::{here, tiny};
use crate::program::prism;
use crate::{Place, code, odd, text};
use prism::model::weights::Precision;
use prism::model::{Config, Weights};
use std::path::Path;

#[test]
fn convert_names_what_does_not_fit_and_refuses_what_could_run() {
    let place = Place::new();
    let reference = here("tests/reference/misc");
    let convert_with = |file: &str, more: &str| {
        let run = prism("convert").arg(reference.join(file)).arg(place.at("m.safetensors"));
        code(&run.with(more).output(), 1)
    };
    let convert = |file: &str| convert_with(file, "");
    // Three lines that say what was expected and how much differs.
    let error = convert("checkpoint_zip.pth.tar");
    assert!(
        error.lines().count() == 3
            && error.contains("do not fit the network base")
            && error.contains(" tensors expected. "),
        "{error}"
    );
    let missing = " missing: image_encoder.patch_embed.proj.weight; image_encoder.patch_embed.proj.bias; image_encoder.pos_embed; and ";
    assert!(error.contains(missing), "{error}");
    assert!(
        error.contains(
            " 8 unexpected: mask_decoder.bfloat; mask_decoder.count; mask_decoder.double; and 5 more. 2 mis-shaped: "
        ),
        "{error}"
    );
    assert!(error.contains(" 2 mis-shaped: image_encoder.neck.0.weight is [3, 6], expected [384, 768, 1, 1, 1]; image_encoder"), "{error}");
    // All of them can be listed.
    let error = convert_with("checkpoint_zip.pth.tar", "--verbose");
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

/// By its hash or by `cmp` a file is recognised as the same model.
#[test]
fn a_model_is_the_same_bytes_each_time() {
    let place = Place::new();
    let (first, again) = (place.at("first.safetensors"), place.at("again.safetensors"));
    let weights = Weights::hashed(tiny(), "same");
    weights.save(&first, Precision::F32).unwrap();
    let expected = std::fs::read(&first).unwrap();
    // What a map orders differs from map to map: once could be chance.
    for _ in 0..8 {
        weights.save(&again, Precision::F32).unwrap();
        assert!(std::fs::read(&again).unwrap() == expected);
    }
    // Read and written again, and by another process.
    Weights::open(&first).unwrap().save(&again, Precision::F32).unwrap();
    assert!(std::fs::read(&again).unwrap() == expected);
    code(&prism("convert").arg(&first).arg(&again).output(), 0);
    assert!(std::fs::read(&again).unwrap() == expected);
}

#[test]
fn models_and_images_introduce_themselves() {
    let place = Place::new();
    let info = |file: &Path| prism("info").arg(file).output();
    let out = info(&place.at("model.safetensors"));
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
    let run = prism("weights --salt s --dtype bf16").file("--network", &config);
    code(&run.file("-o", &model).output(), 0);
    let out = info(&model);
    assert!(text(&out.stdout).contains("48 x 48 x 48") && text(&out.stdout).contains("(bf16)"));
    let out = info(&odd("m18_lefthanded_qform.nii.gz"));
    assert!(
        text(&out.stdout).contains("left-handed")
            && text(&out.stdout).contains("affine from qform")
    );
    // A damaged model, and one that says nothing of its network.
    let bytes = std::fs::read(&model).unwrap();
    std::fs::write(&model, &bytes[..bytes.len() - 9]).unwrap();
    assert!(code(&info(&model), 1).contains("not a readable safetensors file"));
    let bare = here("tests/reference/misc/checkpoint_expected.safetensors");
    assert!(code(&info(&bare), 1).contains("no network configuration"));
}

#[test]
fn verify_prints_a_line_a_case_and_says_no() {
    let folder = tempfile::tempdir().unwrap();
    for case in ["linear", "gelu"] {
        let name = format!("{case}.safetensors");
        std::fs::copy(here("tests/reference/ops").join(&name), folder.path().join(&name)).unwrap();
    }
    let report = folder.path().join("report.json");
    let verify = |more: &str| prism("verify").arg(folder.path()).with(more);
    let out = verify("--only op").file("--save", &report).output();
    code(&out, 0);
    let lines = text(&out.stdout);
    assert!(
        lines.lines().count() == 3
            && lines.starts_with("ok   gelu.safetensors")
            && lines.contains("2 passed, 0 failed")
    );
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert_eq!(json["cases"][1]["checks"][0]["quantity"], "out.0");
    // The report itself is a file of unknown kind.
    let out = verify("").output();
    code(&out, 1);
    assert!(text(&out.stdout).contains("FAIL report.json"));
    code(&prism("verify /nowhere").output(), 1);
    code(&verify("--only poems").output(), 2);
}

#[test]
fn verify_of_a_model_takes_no_flags_of_cases() {
    let place = Place::new();
    let verify = || prism("verify").arg(place.at("model.safetensors"));
    code(&verify().output(), 0);
    for (flag, value) in [
        ("--save", "report.json"),
        ("--only", "op"),
        ("--device", "cpu"),
        ("--precision", "f32"),
        ("--threads", "1"),
    ] {
        let error = code(&verify().arg(flag).arg(value).output(), 2);
        assert!(error.contains(&format!("{flag} needs a folder")), "{error}");
    }
    assert_eq!(place.names(), [""; 0]);
}

#[test]
fn a_checkpoint_becomes_the_model_it_was() {
    let place = Place::new();
    let (checkpoint, config) =
        (here("tests/data/checkpoint.pth.tar"), here("tests/data/checkpoint.json"));
    let model = place.at("m.safetensors");
    let convert = |from: &Path, to: &Path| prism("convert").arg(from).arg(to);
    let converted = |more: &str| {
        let run = convert(&checkpoint, &model).file("--network", &config);
        run.with(more).output()
    };
    code(&converted("--preset liver"), 0);
    let got = Weights::open(&model).unwrap();
    assert_eq!(got.config.intensity, prism::model::Intensity::preset("liver"));
    let want = Weights::hashed(got.config.clone(), "checkpoint");
    for (name, _) in got.config.tensors() {
        assert_eq!(got.get(&name).data(), want.get(&name).data(), "{name}");
    }
    // In half precision, to its last place.
    code(&converted("--dtype f16"), 0);
    let half = Weights::open(&model).unwrap();
    let name = "mask_decoder.refine.conv1.conv_0.conv.weight";
    for (h, w) in half.get(name).data().iter().zip(want.get(name).data()) {
        approx::assert_relative_eq!(*h, *w, max_relative = 1.0 / 1024.0, epsilon = 1e-7);
    }
    // A model file is written again in another precision, with its own configuration.
    let again = place.at("again.safetensors");
    code(&convert(&model, &again).with("--dtype bf16").output(), 0);
    assert_eq!(Weights::open(&again).unwrap().config, half.config);
    // For another network the message names what does not fit, and nothing is written.
    std::fs::remove_file(&model).unwrap();
    let error = code(&convert(&checkpoint, &model).output(), 1);
    assert!(
        error.contains("missing: image_encoder.blocks.3.norm1.weight") && !model.exists(),
        "{error}"
    );
}

/// What is chosen between is judged in the emulator too; times choose on a GPU alone.
#[cfg(target_os = "linux")]
#[test]
fn variants_are_judged_anywhere_and_chosen_on_a_gpu() {
    let place = Place::new();
    let tune = |more: &str| {
        code(&prism("tune").file("-m", place.at("model.safetensors")).with(more).output(), 2)
    };
    assert!(tune("").contains("tune needs a GPU: --device cuda"));
    assert!(tune("--device emulated").contains("the emulator has no meaningful times"));
    let error = code(&prism("bench --variants linear:m3k264n8").output(), 2);
    assert!(error.contains("needs a CUDA device"), "{error}");
    let error = code(&prism("bench --variants").output(), 2);
    assert!(error.contains("--variants need problems"), "{error}");
    let run = prism("bench --variants linear:m3k264n8 lnorm:m4c8 --device emulated");
    let out = run.with("--precision f16").file("--save", place.at("variants.json")).output();
    code(&out, 0);
    let said = text(&out.stdout);
    let judged = |problem: &str| said.lines().find(|line| line.starts_with(problem)).unwrap();
    assert!(judged("linear:m3k264n8 ").contains("4 judged, error at most"), "{said}");
    assert!(judged("lnorm:m4c8 ").contains("1 judged, error at most"), "{said}");
    let saved = std::fs::read_to_string(place.at("variants.json")).unwrap();
    let saved: serde_json::Value = serde_json::from_str(&saved).unwrap();
    assert_eq!(saved["problems"][0]["errors"].as_array().unwrap().len(), 4);
}
