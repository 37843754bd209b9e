//! The reference cases, on every instruction set of this machine; and that the judge can reject.

use crate::common;

use common::{here, shared};
use prism::device::{Cpu, DType, Device, Isa};
use prism::model::{Config, Model, Observer, PatchPrompts, PromptMaps, Weights, prompt_maps};
use prism::tensor::Tensor;
use prism::verify::{Archive, CaseReport, Kind, run};
use std::path::Path;

fn judge(device: &Device, folder: &Path, only: &[Kind]) -> (bool, Vec<CaseReport>) {
    let mut reports = vec![];
    let passed = run(device, folder, only, |r| reports.push(r.clone())).unwrap();
    (passed, reports)
}

fn must_pass(device: &Device, folder: &Path, only: &[Kind], at_least: usize) {
    let (passed, reports) = judge(device, folder, only);
    let failed: Vec<_> =
        reports.iter().filter(|r| !r.passed()).map(|r| (&r.case, r.worst(), &r.failure)).collect();
    assert!(passed, "{failed:#?}");
    assert!(reports.len() >= at_least, "only {} cases ran", reports.len());
}

#[test]
fn repository_cases_pass_on_the_best_instruction_set() {
    must_pass(&Device::open("cpu", 0).unwrap(), &here("tests/reference"), &[], 58);
}

#[test]
fn lesser_instruction_sets_pass_too() {
    for isa in Isa::available().filter(|isa| *isa < Isa::best()) {
        let device = Device::Cpu(Cpu::with_isa(0, isa).unwrap());
        let all = [Kind::Op, Kind::Gradient, Kind::Session];
        must_pass(&device, &here("tests/reference"), &all, 39);
    }
}

#[test]
fn repository_cases_pass_in_bfloat16() {
    match Device::open_as("cpu", 0, DType::Bf16) {
        Ok(device) => must_pass(&device, &here("tests/reference"), &[], 58),
        Err(e) => common::skipped(&e.to_string()),
    }
}

#[test]
fn shared_cases_pass() {
    if let Some(folder) = shared("reference") {
        let device = Device::open("cpu", 0).unwrap();
        let all = [
            Kind::Op,
            Kind::Session,
            Kind::Preprocess,
            Kind::Checkpoint,
            Kind::Gradient,
            Kind::Metrics,
            Kind::Thinning,
        ];
        must_pass(&device, &folder, &all, 66);
    }
}

/// Copies a case with one tensor's data changed.
fn damaged(case: &str, tensor: &str, change: impl FnMut(&mut [u8])) -> tempfile::TempDir {
    altered(case, &[tensor], change)
}

/// Copies a case with the data of some of its tensors changed.
fn altered(case: &str, tensors: &[&str], mut change: impl FnMut(&mut [u8])) -> tempfile::TempDir {
    let mut bytes = std::fs::read(here("tests/reference").join(case)).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    for tensor in tensors {
        let offsets = json[tensor]["data_offsets"].as_array().unwrap();
        let at = |i: usize| 8 + header + offsets[i].as_u64().unwrap() as usize;
        change(&mut bytes[at(0)..at(1)]);
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(Path::new(case).file_name().unwrap()), bytes).unwrap();
    folder
}

#[test]
fn a_wrong_result_fails() {
    let device = Device::open("cpu", 0).unwrap();
    // The exponent's lowest bit of one expected value.
    let folder = damaged("ops/conv3d_k3.safetensors", "out.0", |b| b[2] ^= 0x80);
    let (passed, reports) = judge(&device, folder.path(), &[]);
    assert!(!passed && reports[0].worst().unwrap().error > 1e-5);
    // So are a wrong gradient of an op and of the network, a wrong skeleton.
    for (case, tensor) in [
        ("ops/upcat_conv.safetensors", "grad_in.deconv_weight"),
        ("model/gradient_32.safetensors", "grad.mask_decoder.refine.first_conv.weight.value"),
        ("misc/thinning.safetensors", "skeleton.2"),
    ] {
        let folder = damaged(case, tensor, |b| {
            let n = b.len();
            b.copy_within(..n / 3, n / 2);
        });
        assert!(!judge(&device, folder.path(), &[]).0, "{tensor}");
    }
    // A wrong decoder stage, a wrong refined answer and a wrong mask are not excused as undecided
    // voxels.
    for tensor in ["iter1.u1.value", "iter1.refined.value", "iter1.mask_bits"] {
        let folder = damaged("model/session_32.safetensors", tensor, |b| {
            let n = b.len();
            b.copy_within(..n / 4, n / 2);
        });
        let (passed, reports) = judge(&device, folder.path(), &[]);
        assert!(!passed, "{tensor}: {:?}", reports[0].worst());
    }
}

/// A case in which the reference put one voxel of the first mask on the other side; the refiner's
/// result for that mask is recorded in it. Float32 determines that voxel's side.
#[test]
fn a_voxel_that_float32_can_decide_fails_on_the_wrong_side() {
    const CASE: &str = "model/session_32.safetensors";
    let device = Device::open("cpu", 0).unwrap();
    let archive = Archive::open(&here("tests/reference").join(CASE)).unwrap();
    let config = Config { patch: 32, ..Config::base() };
    let model = Model::new(&device, &Weights::hashed(config, archive.text("salt").unwrap()));
    let (model, size) = (model.unwrap(), 32usize);
    let scaled = |name: &str, scale: &str| {
        let scale = archive.number(scale).unwrap() as f32;
        let values = &archive.get(name).unwrap().values;
        Tensor::new([size; 3], values.iter().map(|v| *v as f32 * scale).collect())
    };
    let features =
        model.encode(&scaled("in.image_i8", "image_scale"), &mut Observer::none()).unwrap();
    let places = archive.get("in.points.0").unwrap().integers();
    let labels = archive.get("in.labels.0").unwrap().integers();
    let points = places
        .chunks_exact(3)
        .zip(&labels)
        .map(|(p, label)| ([p[0] as i32, p[1] as i32, p[2] as i32], *label == 1));
    let corners = &archive.get("in.box").unwrap().values;
    let bounds = std::array::from_fn(|i| corners[i] as f32);
    let prompts = PatchPrompts { points: points.collect(), bounds: Some(bounds) };
    let maps = prompt_maps(&device, size, &prompts.points).on(&device).unwrap();
    let dense = scaled("in.dense_i8.0", "dense_scale");
    let answer = model
        .interact(
            &features,
            &prompts,
            &dense,
            &PromptMaps::Maps(maps.clone()),
            &mut Observer::none(),
        )
        .unwrap();
    let mask = answer.candidates.selected_logits().unwrap();
    let rms = (mask.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / mask.len() as f64).sqrt();
    let error = archive.get("iter0.masks.peer_f32").unwrap().values[0] * rms;
    // The voxel nearest to 0 among those whose side float32 clearly determines.
    let clear = (0..mask.len()).filter(|i| f64::from(mask[*i].abs()) > 20.0 * error);
    let voxel = clear.min_by(|a, b| mask[*a].abs().total_cmp(&mask[*b].abs())).unwrap();
    for (flipped, passes) in [(false, true), (true, false)] {
        let mut m = mask.to_vec();
        if flipped {
            m[voxel] = -m[voxel];
        }
        let mut error_map = vec![];
        let mut see = |stage: &str, value: &Tensor| {
            if stage == "error_map" {
                error_map = value.data().to_vec();
            }
        };
        let refined = model.refine(&features, &m, &maps, &mut Observer::new(&mut see)).unwrap();
        let refined = refined.data().to_vec();
        let mut expected = vec![];
        for (stage, values) in [("refined", &refined), ("error_map", &error_map)] {
            let index = archive.get(&format!("iter0.{stage}.index")).unwrap().integers();
            let sampled = index.iter().map(|i| f64::from(values[*i as usize]));
            expected.push(sampled.flat_map(f64::to_le_bytes).collect::<Vec<u8>>());
            let norm = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            expected.push(norm.to_le_bytes().to_vec());
        }
        let bits = |eight: &[f32]| eight.iter().fold(0u8, |b, v| b << 1 | u8::from(*v > 0.0));
        expected.push(refined.chunks(8).map(bits).collect());
        let tensors = [
            "iter0.refined.value",
            "iter0.refined.l2",
            "iter0.error_map.value",
            "iter0.error_map.l2",
            "iter0.mask_bits",
        ];
        let mut expected = expected.into_iter();
        let folder =
            altered(CASE, &tensors, |bytes| bytes.copy_from_slice(&expected.next().unwrap()));
        let (passed, reports) = judge(&device, folder.path(), &[]);
        assert_eq!(passed, passes, "flipped: {flipped}, {:?}", reports[0].worst());
        if flipped {
            let failed = reports[0].checks.iter().filter(|c| !c.passed());
            let hang_on_it = ["iter0.refined", "iter0.error_map", "iter0.mask_bits"];
            let others: Vec<_> =
                failed.filter(|c| !hang_on_it.iter().any(|q| c.quantity.starts_with(q))).collect();
            assert!(others.is_empty(), "{others:?}");
        }
    }
}

#[test]
fn what_is_not_known_fails() {
    let device = Device::open("cpu", 0).unwrap();
    let folder = tempfile::tempdir().unwrap();
    assert!(!judge(&device, folder.path(), &[]).0, "no case is no pass");
    std::fs::write(folder.path().join("case.bin"), b"?").unwrap();
    let (passed, reports) = judge(&device, folder.path(), &[]);
    assert!(!passed && reports[0].failure.as_deref().unwrap().contains("unknown kind"));
}
