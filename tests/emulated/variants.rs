//! Variants of kernels: whichever is chosen, results are right. Tables of what was chosen.

use crate::common::{self, apart, device_name, tiny};
use crate::{
    at_length, cuda_of, expected, learn, open, replayed_equals_its_ops, session, whole, with_wgmma,
};
use prism::bench::{TrainingStep, try_variants};
use prism::device::cuda::KernelRecord;
use prism::device::{Cpu, Cuda, DType, Device, Precision};
use prism::model::{Model, PatchPrompts, Weights};
use prism::ops::loss::{KERNEL, Target};
use prism::ops::norm;
use prism::tensor::Tensor;
use std::cell::RefCell;
use std::collections::BTreeSet;

/// Whatever is chosen, a result is that of the plain formula: of blocks that share channels or k,
/// that compute one phase or all, that have few rows or many.
#[test]
fn every_variant_of_a_problem_is_right() {
    for precision in [Precision::F32, Precision::Tf32, Precision::F16, Precision::Bf16] {
        let device = open(precision);
        for (text, fewest) in [
            ("conv3d:n1ic64oc8d4k3s1p1", 2),
            ("upcat:ic16uc4sc4oc8d4", 2),
            ("upcat:ic64uc4sc4oc8d2", 2),
            ("linear:m40k520n72", 8),
            ("linear:m3k264n8", 4),
        ] {
            let tried = try_variants(cuda_of(&device), &text.parse().unwrap(), None).unwrap();
            assert!(tried.errors.len() >= fewest, "{precision}, {text}: {:?}", tried.errors);
            assert!(
                tried.is_right(),
                "{precision}, {text}: {:?}, at most {}",
                tried.errors,
                tried.tolerance
            );
        }
    }
    // Where wgmma was asked for, that and mma.sync.
    if let Some(device) = with_wgmma(&device_name(), DType::F16) {
        for (text, variants) in [("conv3d:n1ic32oc32d4k3s1p1", 2), ("linear:m40k520n72", 16)] {
            let tried = try_variants(cuda_of(&device), &text.parse().unwrap(), None).unwrap();
            let errors = &tried.errors;
            assert!(errors.len() == variants && tried.is_right(), "{text}: {errors:?}");
        }
    }
}

/// Whatever is chosen, the network learns the same, and a recording has the bits of its ops.
#[test]
fn a_network_works_with_any_variants() {
    let (loss, gradients) = learn(&Device::open("cpu", 0).unwrap(), 1.0);
    let gradients: Vec<f32> = gradients.iter().map(|g| *g as f32).collect();
    for (precision, scale, bound, variants) in
        [(Precision::F32, 1.0, 1e-4, &[1][..]), (Precision::F16, 65536.0, 2e-2, &[1, 2, 3][..])]
    {
        // All of its ops do so in the other tests.
        if precision == Precision::F32 && !at_length() {
            continue;
        }
        let device = open(precision);
        let cuda = cuda_of(&device);
        for &nth in variants {
            let (l, g) = cuda.with_variant(nth, || learn(&device, scale));
            let g: Vec<f32> = g.iter().map(|g| *g as f32).collect();
            let apart = apart(&g, &gradients);
            assert!(
                (l / loss - 1.0).abs() < bound && apart < 5.0 * bound,
                "{precision}, variant {nth}: loss {l}, expected {loss}; gradients {apart} apart"
            );
        }
        cuda.with_variant(1, || replayed_equals_its_ops(tiny(), &device));
    }
}

/// Sums over so many rows that tiles may be larger or smaller.
#[test]
fn sums_over_rows_are_the_same_in_any_tiles() {
    let x = whole(&[70_000, 32], 3);
    let want = norm::totals_onto(&Device::open("cpu", 0).unwrap(), &x, None).unwrap();
    for dtype in [DType::F32, DType::F16] {
        let device = open(dtype);
        let cuda = cuda_of(&device);
        let run = || norm::totals_onto(&device, &x, None);
        let seen = cuda.with_variant(1, || cuda.launches(false, run)).unwrap().0;
        assert_eq!(seen[0].choice.as_ref().expect("a choice").variants.len(), 3);
        for nth in 0..3 {
            let got = cuda.with_variant(nth, run).unwrap();
            assert_eq!(got.data(), want.data(), "{dtype}, variant {nth}");
        }
    }
}

/// The launches of a session's programs with the tiny network, computing nothing.
fn programs(cuda: &Cuda) -> Vec<KernelRecord> {
    let device = Device::Cuda(cuda.clone());
    let model = Model::new(&device, &Weights::hashed(tiny(), "emulated")).unwrap();
    model.launches(12, false).unwrap().expect("a CUDA device").concat()
}

/// The tests above try every choice that there is in a session and in training, but for the sums,
/// whose variants are alike at this size.
#[test]
fn every_choice_is_met() {
    let device = open(DType::F16);
    let (cuda, s) = (cuda_of(&device), tiny().patch);
    let step = RefCell::new(TrainingStep::new(&device, tiny(), 1, false));
    let image = Tensor::new([s; 3], vec![0.5; s * s * s]);
    let label = (0..s * s * s).map(|i| f32::from(u8::from(i % s < 20))).collect();
    let target = Target::new(&device, label, [s; 3], KERNEL).unwrap();
    let prompts = PatchPrompts { points: vec![([15, 16, 9], true)], bounds: None };
    let train = || step.borrow_mut().run(&image, &target, &prompts).map(drop);
    let seen = cuda.with_variant(0, || {
        let step = cuda.launches(false, train).unwrap().0;
        [programs(cuda), step].concat()
    });
    let choices = seen.iter().filter_map(|launch| launch.choice.as_ref());
    let names: BTreeSet<&str> = choices.filter_map(|c| c.key.split(' ').next()).collect();
    let known = [
        "conv3d",
        "decoder_stage",
        "decoder_stage_gradient",
        "linear",
        "linear_back",
        "token_attention",
        "token_linear",
        "weight_gradient",
        "weight_gradient_dense",
    ];
    assert_eq!(names.into_iter().collect::<Vec<_>>(), known);
}

/// A table is read when a device is opened, and not before; the same table gives the same bits; one
/// that is switched off, forgotten or damaged gives those of the rule.
#[test]
fn a_table_decides_what_runs() {
    if device_name() != "emulated" {
        common::skipped("a GPU has one table for all of its tests");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let open = |switch: Option<&str>| {
        let cpu = Cpu::new(0).unwrap();
        Cuda::emulated_with_table(cpu, Precision::F16, folder.path(), switch).unwrap()
    };
    let shapes = |launches: Vec<KernelRecord>| -> Vec<_> {
        launches.into_iter().map(|launch| (launch.kernel, launch.launch)).collect()
    };
    let rule = shapes(programs(&open(None)));
    let first = open(None);
    let tried = first.with_variant(1, || programs(&first));
    let chosen: Vec<(String, Option<String>)> = tried
        .iter()
        .filter_map(|launch| launch.choice.as_ref())
        .map(|choice| (choice.key.clone(), Some(choice.variants[choice.taken].clone())))
        .collect();
    let tried = shapes(tried);
    assert!(chosen.len() > 10 && tried != rule);
    let path = first.keep_variants(&chosen).unwrap();
    assert!(shapes(programs(&first)) == rule, "an open device changed its choices");
    assert!(shapes(programs(&open(None))) == tried, "the table was not followed");
    assert!(shapes(programs(&open(Some("0")))) == rule, "PRISM_TUNE=0 was not followed");

    let run = |switch| session(&Device::Cuda(open(switch)), tiny());
    let (by_table, by_rule) = (run(None), run(Some("0")));
    assert_eq!(run(None), by_table);
    assert_eq!(by_rule, *expected(Precision::F16));
    assert_ne!(by_table.logits, by_rule.logits);
    let apart = apart(&by_table.masks, &by_rule.masks);
    assert!(apart < 2e-2, "{apart}");

    let intact = std::fs::read(&path).unwrap();
    let mut damaged = intact.clone();
    damaged[intact.len() / 2] ^= 1;
    std::fs::write(&path, damaged).unwrap();
    let ignores = open(None);
    assert!(ignores.warning().expect("a warning").contains("damaged"));
    assert!(shapes(programs(&ignores)) == rule, "a damaged table was followed");
    std::fs::write(&path, intact).unwrap();
    let forgotten: Vec<_> = chosen.into_iter().map(|(key, _)| (key, None)).collect();
    first.keep_variants(&forgotten).unwrap();
    assert!(open(None).warning().is_none() && shapes(programs(&open(None))) == rule);
}
