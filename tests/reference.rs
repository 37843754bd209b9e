//! The reference cases, on every instruction set that this machine has; and that the judge can say
//! no.

mod common;

use common::{here, shared};
use prism::device::{Cpu, DType, Device, Isa, Level};
use prism::verify::{CaseReport, Kind, run};
use std::path::Path;

fn judge(device: &Device, folder: &Path, only: &[Kind]) -> (bool, Vec<CaseReport>) {
    judge_moving(device, folder, only, false)
}

fn judge_moving(
    device: &Device,
    folder: &Path,
    only: &[Kind],
    move_undecided: bool,
) -> (bool, Vec<CaseReport>) {
    let mut reports = vec![];
    let passed = run(device, folder, only, move_undecided, |r| reports.push(r.clone())).unwrap();
    (passed, reports)
}

fn must_pass(device: &Device, folder: &Path, only: &[Kind], at_least: usize) {
    all_passed(judge(device, folder, only), at_least)
}

fn all_passed((passed, reports): (bool, Vec<CaseReport>), at_least: usize) {
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
        must_pass(&device, &here("tests/reference"), &[Kind::Op, Kind::Gradient], 37);
        // A session's next steps hang on voxels that float32 cannot decide, each order of summation
        // its own way.
        all_passed(judge_moving(&device, &here("tests/reference"), &[Kind::Session], true), 1);
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
            Kind::Preprocess,
            Kind::Checkpoint,
            Kind::Gradient,
            Kind::Metrics,
            Kind::Thinning,
        ];
        must_pass(&device, &folder, &all, 62);
        // Two masks there have voxels that float32 cannot decide; AVX-512 happens to take the
        // reference's side, others need not.
        all_passed(
            judge_moving(&device, &folder, &[Kind::Session], Isa::best().level() < Level::Avx512),
            4,
        );
    }
}

/// Copies a case with one byte of one tensor's data changed.
fn damaged(case: &str, tensor: &str, change: impl Fn(&mut [u8])) -> tempfile::TempDir {
    let mut bytes = std::fs::read(here("tests/reference").join(case)).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let offsets = json[tensor]["data_offsets"].as_array().unwrap();
    let at = |i: usize| 8 + header + offsets[i].as_u64().unwrap() as usize;
    let range = at(0)..at(1);
    change(&mut bytes[range]);
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
        for move_undecided in [false, true] {
            let mut worst = None;
            let passed =
                run(&device, folder.path(), &[], move_undecided, |r| worst = r.worst().cloned())
                    .unwrap();
            assert!(!passed, "{tensor}: {worst:?}");
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
