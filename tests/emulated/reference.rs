//! The reference cases in every precision: ops with their gradients, sessions, the loss of a batch.

use crate::common::here;
use crate::{PRECISIONS, at_length, open};
use prism::device::Precision;
use prism::verify::{Kind, run};

fn must_pass(precision: Precision, folder: &str, only: &[Kind], at_least: usize) {
    let mut reports = vec![];
    let passed = run(&open(precision), &here(folder), only, |r| reports.push(r.clone())).unwrap();
    let failed: Vec<_> =
        reports.iter().filter(|r| !r.passed()).map(|r| (&r.case, r.worst(), &r.failure)).collect();
    let count = reports.len();
    assert!(passed && count >= at_least, "{precision}: {count} cases, {failed:#?}");
}

#[test]
fn ops_and_their_gradients_pass_in_every_precision() {
    for precision in PRECISIONS {
        must_pass(precision, "tests/reference/ops", &[], 45);
    }
}

/// Sessions at 32^3, and the training loss of a batch with every parameter's gradient.
fn the_network_must_pass(precision: Precision) {
    must_pass(precision, "tests/reference/model", &[Kind::Session, Kind::Gradient], 3);
}

/// In plain arithmetic, as most of the backward pass is, however float32 is multiplied. All ops do
/// so in every precision, and the tiny network is that of the CPU, which passes; in the other
/// precisions it learns as there.
#[test]
fn the_network_passes_in_float32() {
    if !at_length() {
        return;
    }
    the_network_must_pass(Precision::Ieee);
}

/// All ops do so in every precision, and the tiny network is that of the CPU.
#[test]
fn sessions_pass_in_float32_on_tensor_cores() {
    if !at_length() {
        return;
    }
    must_pass(Precision::F32, "tests/reference/model", &[Kind::Session], 2);
}

/// All ops do so in every precision, and the tiny network is that of the CPU.
#[test]
fn sessions_pass_in_tf32() {
    if !at_length() {
        return;
    }
    must_pass(Precision::Tf32, "tests/reference/model", &[Kind::Session], 2);
}

/// All ops do so in every precision, and the tiny network is that of the CPU and learns as there.
#[test]
fn the_network_passes_in_float16() {
    if !at_length() {
        return;
    }
    the_network_must_pass(Precision::F16);
}

/// All ops do so in every precision, and the tiny network is that of the CPU and learns as there.
#[test]
fn the_network_passes_in_bfloat16() {
    if !at_length() {
        return;
    }
    the_network_must_pass(Precision::Bf16);
}
