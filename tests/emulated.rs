//! The CUDA path without a GPU: the kernels on host threads, every access checked. The same tests
//! run on a GPU with PRISM_TEST_DEVICE=cuda.
#![cfg(feature = "emulator")]

mod common;

use common::{
    apart, convolved, dense_by_all, device_name, here, judge_dense, judge_rolling, judge_rounding,
    judge_stage, judge_tokens, stage, tiny,
};
use prism::autograd::{ParamGrads, Tape};
use prism::bench::{TrainingStep, try_variants};
use prism::device::cuda::KernelRecord;
use prism::device::{Cpu, Cuda, DType, Device, Precision};
use prism::model::{Config, Encoder, Model, Observer, PatchPrompts, Weights, prompt_maps};
use prism::ops::attention::VitWeights;
use prism::ops::conv3d::{self, ConvInput};
use prism::ops::decoder_stage;
use prism::ops::linear;
use prism::ops::loss::{self, KERNEL, Target, Terms};
use prism::ops::norm;
use prism::ops::optimizer::{AdamW, AdamWConfig, follow, global_norm, upload_parameters};
use prism::ops::{pointwise, resample, strided};
use prism::prompt::Prompts;
use prism::session::{Options, Scan, Session, SessionError};
use prism::tensor::{OpError, Param, Tensor};
use prism::train::step::{LossWeights, Share, run_item};
use prism::verify::{Kind, run};
use prism::volume::Volume;
use prism::volume::intensity::Normalization;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

fn open(precision: impl Into<Precision>) -> Device {
    Device::open_as(&device_name(), 0, precision).unwrap()
}

/// float32 as it is multiplied by default, in one pass and in plain arithmetic; 16 bits.
const PRECISIONS: [Precision; 5] =
    [Precision::F32, Precision::Tf32, Precision::Ieee, Precision::F16, Precision::Bf16];

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

/// In plain arithmetic, as most of the backward pass is, however float32 is multiplied.
#[test]
fn the_network_passes_in_float32() {
    the_network_must_pass(Precision::Ieee);
}

#[test]
fn sessions_pass_in_float32_on_tensor_cores() {
    must_pass(Precision::F32, "tests/reference/model", &[Kind::Session], 2);
}

#[test]
fn sessions_pass_in_tf32() {
    must_pass(Precision::Tf32, "tests/reference/model", &[Kind::Session], 2);
}

#[test]
fn the_network_passes_in_float16() {
    the_network_must_pass(Precision::F16);
}

#[test]
fn the_network_passes_in_bfloat16() {
    the_network_must_pass(Precision::Bf16);
}

/// The result of a session.
#[derive(Debug, PartialEq)]
struct Given {
    /// The first interaction's candidates.
    masks: Vec<f32>,
    /// The last interaction's answer and scores.
    logits: Vec<f32>,
    scores: Vec<f32>,
    /// The copies that the last interaction made to the device and back.
    transfers: [u64; 2],
}

/// Encodes noise and answers prompts twice.
fn session(device: &Device, config: Config) -> Given {
    let s = config.patch;
    let model = Model::new(device, &Weights::hashed(config, "emulated")).unwrap();
    let noise = |seed: usize| {
        (0..s * s * s)
            .map(move |i| ((i * 2654435761 + seed) % 1000) as f32 / 500.0 - 1.0)
            .collect::<Vec<f32>>()
    };
    let features = model.encode(&Tensor::new([s; 3], noise(0)), &mut Observer::none()).unwrap();
    let mut history = vec![];
    let mut dense = Tensor::new([s; 3], vec![0.0; s * s * s]);
    let mut given = Given { masks: vec![], logits: vec![], scores: vec![], transfers: [0; 2] };
    for (step, voxel) in [[9, 9, 9], [20, 11, 7]].into_iter().enumerate() {
        let positive = step == 0;
        history.push((voxel, positive));
        let prompts = PatchPrompts {
            points: vec![(voxel, positive)],
            bounds: Some([4.0, 4.0, 4.0, 25.0, 25.0, 25.0]),
        };
        let before = transfers(device);
        let maps = prompt_maps(device, s, &history);
        let answer =
            model.interact(&features, &prompts, &dense, &maps, &mut Observer::none()).unwrap();
        given.scores = answer.candidates.scores.data().to_vec();
        given.logits = answer.logits.value().data().to_vec();
        let after = transfers(device);
        given.transfers = [after[0] - before[0], after[1] - before[1]];
        if step == 0 {
            given.masks = answer.candidates.selected_logits().unwrap().to_vec();
        }
        dense = answer.logits.value().reshape([s; 3]);
    }
    given
}

/// The tiny network's session on the device of the tests, computed once for all of them.
fn expected(precision: Precision) -> &'static Given {
    static GIVEN: [OnceLock<Given>; 5] = [const { OnceLock::new() }; 5];
    let at = PRECISIONS.iter().position(|p| *p == precision).unwrap();
    GIVEN[at].get_or_init(|| session(&open(precision), tiny()))
}

fn transfers(device: &Device) -> [u64; 2] {
    match device {
        Device::Cuda(cuda) => cuda.transfers().into(),
        Device::Cpu(_) => [0; 2],
    }
}

#[test]
fn the_order_of_threads_changes_no_bit() {
    if device_name() != "emulated" {
        common::skipped("only the emulator runs threads in an order of one's choosing");
        return;
    }
    for precision in [Precision::F32, Precision::Tf32, Precision::F16] {
        let expected = expected(precision);
        assert!(expected.logits.iter().all(|v| v.is_finite()));
        for seed in [1, 7] {
            let device = Device::open_as(&format!("emulated:{seed}"), 0, precision).unwrap();
            assert_eq!(session(&device, tiny()), *expected, "{precision}, seed {seed}");
        }
    }
}

#[test]
fn the_same_network_as_on_the_cpu() {
    let on_cpu = session(&Device::open("cpu", 0).unwrap(), tiny()).masks;
    for (precision, bound) in [
        (Precision::F32, 1e-4),
        (Precision::Ieee, 1e-4),
        (Precision::Tf32, 2e-2),
        (Precision::F16, 2e-2),
        (Precision::Bf16, 1e-1),
    ] {
        let masks = &expected(precision).masks;
        let apart = apart(masks, &on_cpu);
        assert!(apart < bound, "{precision}: {apart}");
    }
}

#[test]
fn products_of_float32_are_rounded_as_was_asked_for() {
    for precision in [Precision::F32, Precision::Tf32, Precision::Ieee] {
        judge_rounding(&open(precision)).unwrap_or_else(|e| panic!("{precision}: {e}"));
    }
}

/// One item's training pass: its loss and all gradients.
fn learn(device: &Device, scale: f32) -> (f64, Vec<f64>) {
    let (config, s) = (tiny(), tiny().patch);
    let count = config.tensors().len();
    let mut weights = Weights::hashed(config, "learn");
    // As in training: on a GPU they are composed and laid out there.
    upload_parameters(device, &mut weights.tensors_mut()).unwrap();
    let model = Model::new(device, &weights).unwrap();
    let image = Tensor::new(
        [s; 3],
        (0..s * s * s).map(|i| ((i * 7919) % 997) as f32 / 500.0 - 1.0).collect::<Vec<_>>(),
    );
    let label = (0..s * s * s)
        .map(|i| f32::from(u8::from(i / s / s > 10 && i / s % s > 14 && i % s < 20)))
        .collect();
    let target = Target::new(device, label, [s; 3], KERNEL).unwrap();
    let share =
        Share { weights: LossWeights::default(), iterations: 1, batch: 1, recompute: false, scale };
    let mut grads = ParamGrads::new(count);
    let prompt = |_: usize, _: Option<&Tensor>| {
        Some(PatchPrompts { points: vec![([15, 16, 9], true), ([2, 2, 2], false)], bounds: None })
    };
    let outcome = run_item(device, &model, &image, &target, share, &mut grads, prompt).unwrap();
    (
        outcome.loss,
        (0..count)
            .filter_map(|id| grads.get(id))
            .flatten()
            .map(|v| *v as f64 / scale as f64)
            .collect(),
    )
}

#[test]
fn a_training_pass_loses_and_learns_as_on_the_cpu() {
    let (loss, gradients) = learn(&Device::open("cpu", 0).unwrap(), 1.0);
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    for (dtype, scale, bound) in [
        (Precision::F32, 1.0, 1e-4),
        (Precision::Tf32, 1.0, 2e-2),
        (Precision::F16, 65536.0, 2e-2),
        (Precision::Bf16, 1.0, 6e-2),
    ] {
        let (l, g) = learn(&open(dtype), scale);
        assert_eq!(g.len(), gradients.len());
        let apart = norm(&mut g.iter().zip(&gradients).map(|(a, b)| a - b))
            / norm(&mut gradients.iter().copied());
        eprintln!("{dtype}: loss {l}, on the CPU {loss}; gradients {apart} apart");
        assert!(
            (l / loss - 1.0).abs() < bound && apart < 5.0 * bound,
            "{dtype}: loss {l}, on the CPU {loss}; gradients {apart} apart"
        );
    }
}

fn cuda_of(device: &Device) -> &Cuda {
    match device {
        Device::Cuda(cuda) => cuda,
        Device::Cpu(_) => panic!("{} is no CUDA device", device_name()),
    }
}

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

/// With its weights on the device, a training step uploads what is new, and downloads a few
/// numbers: the losses, and the gradients' norm, both after all of its work. No weight, no gradient
/// and no map is copied, and nothing else is waited for: no copy to the device either.
#[test]
fn a_training_step_keeps_weights_gradients_and_maps_on_the_device() {
    let Device::Cuda(cuda) = open(DType::F16) else { panic!("no CUDA device") };
    let (device, config, s) = (Device::Cuda(cuda.clone()), tiny(), tiny().patch);
    let lengths: Vec<usize> =
        config.tensors().iter().map(|(_, shape)| shape.iter().product()).collect();
    let iterations = 2;
    let mut step = TrainingStep::new(&device, config, iterations, false);
    let image = Tensor::new(
        [s; 3],
        (0..s * s * s).map(|i| ((i * 7919) % 997) as f32 / 500.0 - 1.0).collect::<Vec<_>>(),
    );
    let label = (0..s * s * s).map(|i| f32::from(u8::from(i / s / s > 10 && i % s < 20))).collect();
    let target = Target::new(&device, label, [s; 3], KERNEL).unwrap();
    let prompts =
        PatchPrompts { points: vec![([15, 16, 9], true), ([2, 2, 2], false)], bounds: None };
    let mut crossed = || {
        let before = (transfers(&device), cuda.carried(), cuda.waits());
        let outcome = step.run(&image, &target, &prompts).unwrap();
        assert!(outcome.loss.is_finite() && outcome.iterations.len() == iterations);
        let (times, bytes) = (transfers(&device), cuda.carried());
        let crossed = [0, 1].map(|way| (times[way] - before.0[way], bytes[way] - before.1[way]));
        (crossed, cuda.waits() - before.2)
    };
    // The first uploads all weights.
    crossed();
    let ([up, down], waits) = crossed();
    assert_eq!(waits, 0, "copies to the device waited");
    assert_eq!(crossed(), ([up, down], 0), "steps differ");
    assert_eq!(down.0, 1, "copies back");
    assert!(down.1 < 1024, "{} bytes came back", down.1);
    // For the norm and for the optimiser one table each of the addresses of tensors and the run of
    // each block; the position code of the token grid; in each iteration tokens, marks and two
    // tables.
    assert!(up.0 <= 3 + 4 * iterations as u64, "{} copies to the device", up.0);
    let tables: usize = lengths.iter().map(|n| 2 * (40 + 8 * n.div_ceil(1 << 14))).sum();
    assert!(up.1 < tables as u64 + (16 << 10), "{} bytes went up, {tables} of tables", up.1);
}

/// Steps by replay learn what the same steps learn op by op, to the last bit, while the number of
/// points changes.
#[test]
fn replayed_programs_of_training_equal_their_ops() {
    let (device, config, s) = (open(DType::F16), tiny(), tiny().patch);
    let image = Tensor::new(
        [s; 3],
        (0..s * s * s).map(|i| ((i * 7919) % 997) as f32 / 500.0 - 1.0).collect::<Vec<_>>(),
    );
    let label = (0..s * s * s).map(|i| f32::from(u8::from(i / s / s > 10 && i % s < 20))).collect();
    let target = Target::new(&device, label, [s; 3], KERNEL).unwrap();
    let step = || TrainingStep::new(&device, config.clone(), 2, true);
    let (mut plain, mut replayed) = (step(), step().replayed());
    for (at, count) in [1, 2, 1, 1, 2, 2].into_iter().enumerate() {
        let points = (0..count).map(|i| ([15, 16, 9 + i], i == 0)).collect();
        let prompts = PatchPrompts { points, bounds: None };
        let [expected, outcome] = [&mut plain, &mut replayed]
            .map(|step| step.run(&image, &target, &prompts).expect("a step"));
        assert_eq!(outcome.loss.to_bits(), expected.loss.to_bits(), "step {at}");
        assert_eq!(outcome.iterations, expected.iterations, "step {at}");
    }
    // The first and the second iteration, and the first one's answer, for both numbers of tokens;
    // some again, in more memory.
    let [encoder, taped, answers] = replayed.recorded();
    assert!(encoder == 1 && taped >= 4 && answers >= 2, "{encoder}, {taped}, {answers}");
    assert_eq!(plain.recorded(), [0; 3]);
}

/// Gradients that overflowed change nothing, and the host does not have to know it to take the
/// step.
#[test]
fn a_step_of_gradients_that_are_no_numbers_changes_nothing() {
    let config = AdamWConfig { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.1, max_norm: 1.0 };
    for device in [open(DType::F32), Device::open("cpu", 0).unwrap()] {
        let (mut value, mut average) = (whole(&[40], 1), [whole(&[40], 2)]);
        let mut adamw = AdamW::new(config, &[40]);
        let mut step = |seed: usize, gradient: f32| {
            let mut g = whole(&[40], seed).data().to_vec();
            g[7] += gradient;
            let g = Tensor::from(g);
            let norm = global_norm(&device, &[Some(&g)]).unwrap();
            let mut list = [&mut value];
            adamw.step(&device, 0.1, &mut list, &[Some(&g)], &norm, 2.0).unwrap();
            follow(&device, &mut average, &[&*list[0]], 0.5, &norm).unwrap();
            if !norm.read().unwrap().is_finite() {
                adamw.take_back();
            }
            let values = [value.data().to_vec(), average[0].data().to_vec()];
            (values, adamw.steps())
        };
        let first = step(3, 0.0);
        assert_eq!(first.1, 1);
        for broken in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(step(4, broken), first);
        }
        let second = step(5, 0.0);
        assert!(second.1 == 2 && second.0[0] != first.0[0] && second.0[1] != first.0[1]);
    }
}

/// Losses of masks, of their scores and near clicks, and the gradients of all.
#[test]
fn losses_are_as_on_the_cpu() {
    let (s, masks) = ([6, 20, 40], 3);
    let voxels: usize = s.iter().product();
    let noise = |len: usize, seed: usize| -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + seed * 131) % 997) as f32 / 166.0 - 3.0).collect()
    };
    let label: Vec<f32> = noise(voxels, 1).iter().map(|v| f32::from(u8::from(*v > 1.0))).collect();
    let weights: Vec<f32> = noise(voxels, 2).iter().map(|v| v.max(0.0)).collect();
    let run = |device: &Device| {
        let target = Target::new(device, label.clone(), s, KERNEL).unwrap();
        // Numbers that are exact in 16 bits.
        let on = |shape: &[usize], seed: usize| {
            let count: usize = shape.iter().product();
            let values = noise(count, seed).iter().map(|v| (v * 16.0).round() / 16.0).collect();
            Tensor::new(shape, values)
        };
        let (x, scores) = (on(&[masks, voxels], 3), on(&[masks, 1], 4));
        let terms = Terms { region: 0.5, boundary: 5.0 };
        let (sums, dx) = loss::mask_sums_gradient(device, &x, &target, terms, 64.0).unwrap();
        let ds = loss::score_gradient(device, &sums, &scores, &target, 2.0, 64.0).unwrap();
        let (near, both) =
            loss::emphasis(device, &x, &target, &(weights.clone(), 0.7), 64.0, dx.clone()).unwrap();
        let none = (vec![0.0; voxels], 0.7);
        let (nothing, same) = loss::emphasis(device, &x, &target, &none, 64.0, dx.clone()).unwrap();
        assert_eq!(same.data(), dx.data());
        let read = loss::read(device, &[&sums, &near, &nothing], &[&scores], &[]).unwrap();
        let (all, values) = (read.sums, read.scores);
        assert_eq!((&all[0], &values[0][..]), (&sums.read().unwrap(), scores.data()));
        assert_eq!(all[2], [[0.0; 5]; 3]);
        let lost: Vec<f32> = all[0]
            .iter()
            .map(|sums| target.loss(*sums).total(terms) as f32)
            .chain(all[1].iter().map(|sums| sums[0] as f32))
            .collect();
        [lost, ds.data().to_vec(), dx.data().to_vec(), both.data().to_vec()]
    };
    let expected = run(&Device::open("cpu", 0).unwrap());
    for (dtype, bound) in [(DType::F32, 1e-5), (DType::F16, 2e-3), (DType::Bf16, 2e-2)] {
        for (at, (got, want)) in run(&open(dtype)).iter().zip(&expected).enumerate() {
            assert_eq!(got.len(), want.len());
            let apart = apart(got, want);
            assert!(apart < bound, "{dtype}, {at}: {apart}");
        }
    }
}

/// The gradients of the input and of every parameter, through windows that are partly beyond the
/// grid: several of them, in several items; one, of the released network's shape; with lines of
/// more than 8 tokens and lines of one; with heads of an odd number of channels, and of a number
/// for which a fragment is half full.
#[test]
fn attention_in_windows_goes_back_as_on_the_cpu() {
    for (n, s, edge, heads, width) in
        [(2, 5, 3, 2, 12), (1, 8, 14, 1, 32), (1, 10, 9, 2, 16), (1, 4, 3, 2, 14), (1, 4, 3, 1, 24)]
    {
        windows_go_back_as_on_the_cpu(n, s, edge, heads, width);
    }
}

fn windows_go_back_as_on_the_cpu(n: usize, s: usize, edge: usize, heads: usize, width: usize) {
    let noise = |shape: &[usize], seed: usize| {
        let count: usize = shape.iter().product();
        Tensor::new(
            shape,
            (0..count).map(|i| ((i * 7919 + seed * 131) % 997) as f32 / 997.0 - 0.5).collect(),
        )
    };
    let param = |id: usize, shape: &[usize]| Param::new(noise(shape, id), id);
    let weights = || VitWeights {
        qkv: (param(0, &[3 * width, width]), param(1, &[3 * width])),
        proj: (param(2, &[width, width]), param(3, &[width])),
        rel_pos: [4, 5, 6].map(|id| param(id, &[2 * edge - 1, width / heads])),
        heads,
        window: edge,
    };
    let gradients = |device: &Device| -> Vec<Vec<f32>> {
        let (weights, mut grads) = (weights(), ParamGrads::new(7));
        let tape = Tape::on(device);
        let x = tape.leaf(noise(&[n, s, s, s, width], 9));
        let y = tape.vit_attention(&weights, &x, None).unwrap();
        let mut leaves = tape.backward(vec![(&y, noise(y.shape(), 10))], &mut grads).unwrap();
        let dx = leaves.take(&x).unwrap().data().to_vec();
        (0..7).map(|id| grads.get(id).unwrap().to_vec()).chain([dx]).collect()
    };
    let expected = gradients(&Device::open("cpu", 0).unwrap());
    for (dtype, bound) in [
        (Precision::F32, 1e-5),
        (Precision::Tf32, 1e-2),
        (Precision::Ieee, 1e-5),
        (Precision::F16, 1e-2),
        (Precision::Bf16, 8e-2),
    ] {
        for (id, (got, want)) in gradients(&open(dtype)).iter().zip(&expected).enumerate() {
            let apart = apart(got, want);
            assert!(apart < bound, "{dtype}, {s} in windows of {edge}, gradient {id}: {apart}");
        }
    }
}

/// Small whole numbers, whose sums of products are exact in any order.
fn whole(shape: &[usize], seed: usize) -> Tensor {
    let count: usize = shape.iter().product();
    Tensor::new(shape, (0..count).map(|i| ((i * 7919 + seed * 131) % 9) as f32 - 4.0).collect())
}

/// Several maps at once, and patches whose rows are moved by 16 bytes or value by value.
#[test]
fn maps_are_resampled_and_cut_into_patches_as_on_the_cpu() {
    type Op = fn(&Device, &Tensor) -> Result<Tensor, OpError>;
    let ops: [Op; 7] = [
        resample::downsample2_trilinear,
        resample::upsample2_trilinear,
        resample::downsample4_nearest,
        resample::grad::downsample2_trilinear,
        resample::grad::upsample2_trilinear,
        resample::grad::downsample4_nearest,
        pointwise::max_pool3d,
    ];
    let cpu = Device::open("cpu", 1).unwrap();
    let x = whole(&[3, 8, 4, 12, 5], 1);
    for (at, op) in ops.into_iter().enumerate() {
        let [made, expected] = [open(DType::F32), cpu.clone()].map(|on| op(&on, &x).unwrap());
        assert_eq!((made.shape(), made.data()), (expected.shape(), expected.data()), "op {at}");
    }
    for (e, c) in [(16, 1), (8, 1), (4, 1), (4, 2)] {
        let x = whole(&[2, e, 2 * e, 3 * e, c], 2);
        let (weight, bias) = (whole(&[3, c, e, e, e], 3), whole(&[3], 4));
        let expected = strided::patch_conv(&cpu, &x, &weight, Some(&bias)).unwrap();
        // Each sum is exact in float32, and rounded once in 16 bits.
        for (dtype, bound) in [(DType::F32, 0.0), (DType::F16, 1e-3)] {
            let made = strided::patch_conv(&open(dtype), &x, &weight, Some(&bias)).unwrap();
            assert_eq!(made.shape(), expected.shape());
            let apart = apart(made.data(), expected.data());
            assert!(apart <= bound, "{dtype}, patches of {c} x {e}: {apart}");
        }
    }
}

/// The backward pass through a stage's composition, for sizes that fill no block and for several
/// blocks.
#[test]
fn a_composition_goes_back_as_on_the_cpu() {
    for [out, coarse, up, skip] in [[5, 70, 18, 3], [66, 7, 3, 0], [4, 6, 65, 1]] {
        let (deconv, conv) =
            (whole(&[coarse, up, 2, 2, 2], 1), whole(&[out, skip + up, 3, 3, 3], 2));
        let composed = whole(&[8, out, coarse, 8], 3);
        let gradients = |device: &Device| {
            decoder_stage::grad::weights(device, &composed, &deconv, &conv)
                .unwrap()
                .map(|g| (g.shape().to_vec(), g.data().to_vec()))
        };
        assert_eq!(gradients(&open(DType::F32)), gradients(&Device::open("cpu", 0).unwrap()));
    }
}

/// A block computes all phases of its tile if there are many tiles, otherwise one: both give the
/// stage.
#[test]
fn a_stage_of_few_and_of_many_blocks_is_as_on_the_cpu() {
    for (precision, name) in [
        (Precision::F32, "tf32x3"),
        (Precision::Tf32, "tf32"),
        (Precision::F16, "f16"),
        (Precision::Bf16, "bf16"),
    ] {
        let Device::Cuda(cuda) = open(precision) else { panic!("no CUDA device") };
        let device = Device::Cuda(cuda.clone());
        // With 16 channels and with 32.
        for (coarse, chunk) in [(16, 16), (24, 32)] {
            for (items, kernel) in [(1, "decoder_stage_phase"), (81, "decoder_stage")] {
                let launches = cuda.launches(false, || stage(&device, items, coarse)).unwrap().0;
                // With floats a block has 16 channels at a time, and computes all phases of no
                // more.
                let kernel = match (precision.maps(), coarse) {
                    (DType::F32, 24) => format!("decoder_stage_phase_16_{name}"),
                    _ => format!("{kernel}_{chunk}_{name}"),
                };
                assert!(launches.iter().any(|launch| launch.kernel == kernel), "no {kernel}");
                judge_stage(&device, items, coarse).unwrap_or_else(|e| panic!("{kernel}: {e}"));
            }
        }
    }
}

/// A device that multiplies by `wgmma` where it can; none if it cannot, or is a GPU for which that
/// was not asked for: should it fail there, no other test shall fail with it.
fn with_wgmma(name: &str, dtype: DType) -> Option<Device> {
    let asked = std::env::var("PRISM_CUDA_WGMMA").is_ok_and(|v| v == "on");
    if !asked && !name.starts_with("emulated") {
        return None;
    }
    let device = Device::open_as(name, 0, dtype).unwrap();
    let Device::Cuda(cuda) = &device else { panic!("{name} is no CUDA device") };
    cuda.use_wgmma(true).then_some(device)
}

/// The convolution of rolling planes is the one of tiles: bit for bit where sums are exact in any
/// order, and otherwise but for the rounding of elements. Extents are below a tile, odd, of several
/// tiles, and so long that a column is cut, or that a plane's place in the ring is filled often.
#[test]
fn rolling_planes_are_convolved_as_tiles_are() {
    // What a rounding may change of a value of 1, twice.
    for (dtype, bound) in [(DType::F16, 2e-3), (DType::Bf16, 1.6e-2)] {
        let Some(planes) = with_wgmma(&device_name(), dtype) else {
            common::skipped("this GPU has no wgmma, or PRISM_CUDA_WGMMA is not on");
            return;
        };
        judge_rolling(&planes).unwrap_or_else(|e| panic!("{dtype}: {e}"));
        let tiles = open(dtype);
        let (Device::Cuda(cuda), Device::Cuda(without)) = (&planes, &tiles) else {
            panic!("no CUDA devices")
        };
        without.use_wgmma(false);
        for (extent, added) in [
            ([1, 4, 16, 16], false),
            ([2, 5, 3, 7], true),
            ([1, 1, 1, 1], false),
            ([1, 21, 9, 18], true),
            ([1, 2, 33, 17], false),
            ([1, 15, 8, 16], true),
        ] {
            let of = |device: &Device, normed| convolved(device, extent, normed, added).unwrap();
            let what = format!("{dtype}, {extent:?}");
            let launched = |cuda: &Cuda, device: &Device| -> Vec<String> {
                let launches = cuda.launches(false, || convolved(device, extent, false, added));
                launches.unwrap().0.into_iter().map(|launch| launch.kernel).collect()
            };
            let there = |launches: &[String], name: &str| {
                launches.iter().any(|kernel| *kernel == format!("{name}_{dtype}"))
            };
            assert!(there(&launched(cuda, &planes), "conv3d_rolling"), "{what}");
            assert!(there(&launched(without, &tiles), "conv3d_32"), "{what}");
            for (got, want) in of(&planes, false).iter().zip(&of(&tiles, false)) {
                assert!(got.data() == want.data(), "{what}");
            }
            for (got, want) in of(&planes, true).iter().zip(&of(&tiles, true)) {
                let far = |(got, want): &(&f32, &f32)| {
                    let apart = (*got - *want).abs();
                    apart.is_nan() || apart > bound * (1.0 + want.abs())
                };
                let far = got.data().iter().zip(want.data()).find(far);
                assert!(far.is_none(), "{what}, normed: {far:?}");
            }
        }
    }
}

/// Nor does the order change a bit of rolling planes, in which warps wait for each other's phases.
#[test]
fn the_order_of_threads_changes_no_bit_of_rolling_planes() {
    if device_name() != "emulated" {
        common::skipped("only the emulator runs threads in an order of one's choosing");
        return;
    }
    let of = |name: &str| {
        let device = with_wgmma(name, DType::F16).unwrap();
        convolved(&device, [1, 15, 9, 18], true, true).unwrap().map(|map| map.data().to_vec())
    };
    let expected = of("emulated");
    for seed in [1, 7] {
        assert!(of(&format!("emulated:{seed}")) == expected, "seed {seed}");
    }
}

/// Dense layers by `wgmma` have the bits of those by `mma.sync` where sums are exact in any order,
/// in any order of threads: of one row and of several blocks, of few columns and of such as are no
/// whole pieces, of k that ends within a step, and shared by blocks.
#[test]
fn warpgroups_compute_dense_layers_as_warps_do() {
    for dtype in [DType::F16, DType::Bf16] {
        let Some(device) = with_wgmma(&device_name(), dtype) else {
            common::skipped("this GPU has no wgmma, or PRISM_CUDA_WGMMA is not on");
            return;
        };
        judge_dense(&device).unwrap_or_else(|e| panic!("{dtype}: {e}"));
        let shuffled = (device_name() == "emulated")
            .then(|| with_wgmma("emulated:7", dtype).expect("the emulator has wgmma"));
        for device in [Some(device), shuffled].iter().flatten() {
            for (shape, added, variants) in [
                ([1, 97, 520], true, 8),
                ([33, 100, 264], true, 4),
                ([129, 8, 72], false, 2),
                ([200, 193, 8], false, 2),
            ] {
                let made = dense_by_all(cuda_of(device), shape, added).unwrap();
                let what = format!("{dtype}, {shape:?}");
                let (first, want) = &made[0];
                assert!(!first.contains("wgmma"), "{what}: {first}");
                let by_wgmma = made.iter().filter(|(name, _)| name.contains("by wgmma")).count();
                assert_eq!(by_wgmma, variants, "{what}");
                for (name, got) in &made {
                    assert!(got.data() == want.data(), "{what}, {name}");
                }
            }
        }
    }
}

/// Where `wgmma` was asked for, layers of many rows go by it. Few rows, rows that are no multiple
/// of 16 bytes, gradients and float32 do not.
#[test]
fn dense_layers_go_by_wgmma_where_the_rule_says_so() {
    let Some(device) = with_wgmma(&device_name(), DType::F16) else {
        common::skipped("this GPU has no wgmma, or PRISM_CUDA_WGMMA is not on");
        return;
    };
    let linears = |launches: Vec<KernelRecord>| -> Vec<String> {
        let names = launches.into_iter().map(|launch| launch.kernel);
        names.filter(|name| name.starts_with("linear")).collect()
    };
    let kernels = |device: &Device, m: usize, n: usize, k: usize| {
        let run = || common::dense(device, [m, n, k], false);
        linears(cuda_of(device).launches(false, run).unwrap().0)
    };
    for (m, n, k, expected) in [
        (512, 2304, 8, "linear_wgmma_tall_f16"),
        (512, 768, 8, "linear_wgmma_f16"),
        (64, 768, 8, "linear_few_f16"),
        (512, 768, 9, "linear_odd_f16"),
    ] {
        assert_eq!(kernels(&device, m, n, k), [expected], "{m}, {n}, {k}");
    }
    let (w, dy) = (whole(&[768, 768], 1), whole(&[512, 768], 2));
    let back = || linear::grad::input(&device, &w, &dy);
    let back = cuda_of(&device).launches(false, back).unwrap().0;
    assert_eq!(linears(back), ["linear_back_f16"]);
    if let Some(device) = with_wgmma(&device_name(), DType::F32) {
        assert_eq!(kernels(&device, 512, 768, 8), ["linear_tf32x3"]);
    }
    cuda_of(&device).use_wgmma(false);
    assert_eq!(kernels(&device, 512, 768, 8), ["linear_f16"]);
}

/// The gradients of a stage's biases, from maps whose edges have all kinds of voxel or few of them.
#[test]
fn biases_of_a_stage_go_back_as_on_the_cpu() {
    for ([d, h, w], out, up, skip) in [([4, 6, 4], 5, 3, 4), ([2, 2, 6], 20, 9, 0)] {
        let (g, conv, bias) =
            (whole(&[2, d, h, w, out], 1), whole(&[out, skip + up, 3, 3, 3], 2), whole(&[up], 3));
        let part = (skip > 0).then(|| whole(&[out, skip, 3, 3, 3], 4));
        let gradients = |device: &Device| {
            decoder_stage::grad::biases(device, &g, &conv, &bias, part.as_ref())
                .unwrap()
                .map(|g| (g.shape().to_vec(), g.data().to_vec()))
        };
        assert_eq!(gradients(&open(DType::F32)), gradients(&Device::open("cpu", 0).unwrap()));
    }
}

/// Sums over rows, in one tile and in many, for columns that fill groups and columns that do not.
#[test]
fn sums_over_rows_are_as_on_the_cpu() {
    let cpu = Device::open("cpu", 0).unwrap();
    for [rows, c] in
        [[1, 1], [7, 3], [512, 4], [513, 5], [700, 32], [2100, 33], [30, 768], [5000, 1]]
    {
        let x = whole(&[rows, c], rows);
        for so_far in [None, Some(whole(&[c], 3))] {
            let run = |device: &Device| norm::totals_onto(device, &x, so_far.clone()).unwrap();
            let want = run(&cpu);
            for dtype in [DType::F32, DType::F16] {
                let got = run(&open(dtype));
                assert_eq!(got.data(), want.data(), "{dtype}, {rows} rows of {c}");
            }
        }
    }
}

/// Dense layers' gradients: of inputs by weights in their stored order, also if blocks share the
/// product, or transposed; of weights by one run of rows, a few and many.
#[test]
fn dense_layers_go_back_as_on_the_cpu() {
    let cpu = Device::open("cpu", 0).unwrap();
    for [m, n, k] in [
        [5, 8, 8],
        [70, 72, 136],
        [3, 1600, 40],
        [100, 33, 7],
        [9, 24, 20],
        [1300, 40, 16],
        [130, 136, 70],
    ] {
        let (x, w, dy) = (whole(&[m, k], 1), whole(&[n, k], 2), whole(&[m, n], 3));
        let run = |device: &Device| {
            let so_far = Some(whole(&[n, k], 4));
            [
                linear::grad::input(device, &w, &dy),
                linear::grad::weight(device, &x, &dy),
                linear::grad::weight_onto(device, &x, &dy, so_far),
            ]
            .map(|gradient| gradient.unwrap().data().to_vec())
        };
        let [want_x, want_w, want_sum] = run(&cpu);
        for (dtype, rounding) in [
            (Precision::F32, 0.0),
            (Precision::Tf32, 0.0),
            (Precision::Ieee, 0.0),
            (Precision::F16, 1.0 / 1024.0),
            (Precision::Bf16, 1.0 / 128.0),
        ] {
            let [got_x, got_w, got_sum] = run(&open(dtype));
            assert_eq!(got_w, want_w, "{dtype}, [{m}, {n}, {k}]");
            assert_eq!(got_sum, want_sum, "{dtype}, [{m}, {n}, {k}]");
            assert_eq!(got_x.len(), want_x.len());
            let near = |(got, want): (&f32, &f32)| (got - want).abs() <= rounding * want.abs();
            assert!(got_x.iter().zip(&want_x).all(near), "{dtype}, [{m}, {n}, {k}]");
        }
    }
}

/// The gradient of a convolution's weights, from few parts and from as many as warps share.
#[test]
fn weights_of_a_convolution_go_back_as_on_the_cpu() {
    let cpu = Device::open("cpu", 0).unwrap();
    for ([d, h, w], c, outs) in [([4, 8, 9], 5, 40), ([8, 24, 24], 3, 5)] {
        let (x, dy) = (whole(&[1, d, h, w, c], 1), whole(&[1, d, h, w, outs], 2));
        let run = |device: &Device| {
            let (x, so_far) = (ConvInput::shared(&x), Some(whole(&[outs, c, 3, 3, 3], 3)));
            [None, so_far].map(|so_far| {
                let gradient = conv3d::grad::weight_onto(device, &x, &dy, so_far);
                gradient.unwrap().data().to_vec()
            })
        };
        let want = run(&cpu);
        for dtype in [DType::F32, DType::F16] {
            assert_eq!(run(&open(dtype)), want, "{dtype}, {c} to {outs} channels");
        }
    }
}

/// Gradients of norms and of the mask heads, over several tiles of rows, in one item and in two.
#[test]
fn norms_and_mask_logits_go_back_as_on_the_cpu() {
    // Numbers that are exact in 16 bits.
    let noise = |shape: &[usize], seed: usize| {
        let count: usize = shape.iter().product();
        Tensor::new(
            shape,
            (0..count)
                .map(|i| ((i * 7919 + seed * 131) % 997) as f32 / 256.0 - 1.9453125)
                .collect(),
        )
    };
    for (n, d, c) in [(1, 6, 12), (2, 7, 8), (1, 7, 5)] {
        let run = |device: &Device| -> Vec<Vec<f32>> {
            let shape = [n, d, 10, 9, c];
            let (x, add, dy) = (noise(&shape, 1), noise(&shape, 2), noise(&shape, 3));
            let (weight, bias) = (noise(&[c], 4), noise(&[c], 5));
            let sums = norm::sums(device, &x).unwrap();
            let instance = sums.instance_norm(&weight, &bias, 1e-5, 0.1).unwrap();
            let of_instance = norm::grad::instance_norm(device, &x, &instance, dy.clone());
            let of_layer = norm::grad::layer_norm(device, &x, &weight, &bias, 1e-5, true, &dy);
            let mut all = vec![of_instance.unwrap(), of_layer.unwrap()];
            if n == 1 {
                let (weights, dy) = (noise(&[3, c], 6), noise(&[3, d, 10, 9], 7));
                let add = Some(&add);
                all.push(
                    pointwise::grad::mask_logits(device, &x, &instance, add, &weights, &dy)
                        .unwrap(),
                );
            }
            all.into_iter().flat_map(|(a, b, c)| [a, b, c]).map(|t| t.data().to_vec()).collect()
        };
        let expected = run(&Device::open("cpu", 0).unwrap());
        for (dtype, bound) in [(DType::F32, 5e-5), (DType::F16, 2e-3)] {
            let found = run(&open(dtype));
            assert_eq!(found.len(), expected.len());
            for (at, (got, want)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(got.len(), want.len());
                let apart = apart(got, want);
                assert!(apart < bound, "{dtype}, {n} items of {c} channels, {at}: {apart}");
            }
        }
    }
}

/// Element-wise kernels use vectors if the size allows it, and single values otherwise.
#[test]
fn values_are_taken_in_vectors_or_one_by_one() {
    let cpu = Device::open("cpu", 0).unwrap();
    for (count, period) in [(64, 64), (64, 8), (64, 4), (63, 63), (60, 12), (2056, 2056)] {
        let (a, b) = (whole(&[count / period, period], 1), whole(&[period], 2));
        let same = whole(&[count / period, period], 3);
        let run = |device: &Device| {
            [
                pointwise::add(device, &a, &b).unwrap(),
                pointwise::multiply_add(device, &a, &same, &a).unwrap(),
                pointwise::grad::times(device, &a, &same).unwrap(),
                pointwise::grad::sigmoid(device, &a, &same).unwrap(),
            ]
            .map(|t| t.data().to_vec())
        };
        let want = run(&cpu);
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            assert_eq!(run(&open(dtype)), want, "{dtype}, {count} and {period}");
        }
    }
}

/// A mask comes from the device as bits, and is what the values say.
#[test]
fn masks_of_what_is_positive_are_as_on_the_cpu() {
    let cpu = Device::open("cpu", 2).unwrap();
    for (dtype, count) in [(DType::F32, 40_000), (DType::F16, 8), (DType::Bf16, 13)] {
        let x = whole(&[count], 1);
        let mask = pointwise::positive(&open(dtype), &x).unwrap();
        assert_eq!(mask, pointwise::positive(&cpu, &x).unwrap());
        assert!(mask.iter().zip(x.data()).all(|(m, v)| (*m == 1) == (*v > 0.0)));
    }
}

/// Rows of parameters that are on the device are assembled, and their gradients distributed, as on
/// the host.
#[test]
fn rows_of_parameters_are_put_together_on_the_device_as_on_the_host() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let Device::Cuda(cuda) = open(dtype) else { panic!("no CUDA device") };
        let device = Device::Cuda(cuda.clone());
        let (c, base) = (40, whole(&[6, 40], 1));
        let shapes = [[1, c], [3, c], [1, c]];
        let run = |resident: bool| {
            let param = |(id, shape): (usize, &[usize; 2])| {
                let here = whole(shape, id + 2);
                let value = match resident {
                    true => {
                        let memory = here.to_device(&cuda, DType::F32).unwrap();
                        Tensor::from_device(*shape, memory, DType::F32)
                    }
                    false => here,
                };
                Param::new(value, id)
            };
            let params: Vec<Param> = shapes.iter().enumerate().map(param).collect();
            let rows = [(0, 0), (1, 2), (2, 0), (1, 0), (2, 0), (2, 0)];
            let (mut grads, tape) = (ParamGrads::new(3), Tape::on(&device));
            let list = rows.map(|(p, row)| (&params[p], row)).to_vec();
            let before = cuda.transfers().1;
            let y = tape.embed(base.clone(), list).unwrap();
            let value = y.value().clone();
            let dy = whole(&[6, c], 9).to_device(&cuda, dtype).unwrap();
            let dy = Tensor::from_device([6, c], dy, dtype);
            tape.backward(vec![(&y, dy)], &mut grads).unwrap();
            assert!(!resident || cuda.transfers().1 == before, "rows came to the host");
            let gradients = (0..3).map(|id| grads.get(id).unwrap().to_vec());
            (value.data().to_vec(), gradients.collect::<Vec<_>>())
        };
        assert_eq!(run(true), run(false), "{dtype}");
        let params = [Param::new(
            Tensor::from_device(
                [1, c],
                whole(&[1, c], 2).to_device(&cuda, DType::F32).unwrap(),
                DType::F32,
            ),
            0,
        )];
        let beyond = Tape::off(&device).embed(whole(&[1, c], 1), vec![(&params[0], 1)]);
        assert!(beyond.is_err(), "a row that is not there");
    }
}

#[test]
fn the_token_path_is_as_on_the_cpu() {
    for precision in PRECISIONS {
        judge_tokens(&open(precision)).unwrap_or_else(|e| panic!("{precision}: {e}"));
    }
}

/// Everything between two complete reads of a result is one launch. For two layers: projections of
/// tokens and of the image, the layers of the MLP, attention with the layer after it, which in
/// float32 are two; each layer of the small networks after them at once.
#[test]
fn the_token_path_is_few_launches() {
    for (dtype, linears, attentions) in [(DType::F32, 21, 0), (DType::F16, 14, 7)] {
        let model = Model::new(&open(dtype), &Weights::hashed(tiny(), "launches")).unwrap();
        let [_, interact] = model.launches(12, false).unwrap().expect("a CUDA device");
        let count = |begin: &str| interact.iter().filter(|l| l.kernel.starts_with(begin)).count();
        assert_eq!(count("token_linear"), linears, "{dtype}");
        assert_eq!(count("token_attention"), attentions, "{dtype}");
        assert_eq!(count("two_way_attention"), linears - 14, "{dtype}");
        assert_eq!(count("row_linear"), 3, "{dtype}");
        // Two of the dense prompt, one after the last attention.
        assert_eq!(count("layer_norm"), 3, "{dtype}");
        assert_eq!(count("add"), 1, "{dtype}: the dense prompt's");
    }
}

#[test]
fn an_interaction_moves_prompts_up_and_the_answer_down() {
    // Up: all prompts in one copy. Down: choice, scores and masks; and the logits, because the test
    // asks for them.
    assert_eq!(expected(Precision::F16).transfers, [1, 2]);
}

/// Programs that are recorded and replayed give the same bits as the same work done op by op, for
/// any number of tokens, and where scans take turns. The whole network does so in both precisions,
/// and so every op of each. Of the networks that lack a part, whose programs are other ones, two do
/// on the emulator in 16 bits alone; on a GPU, where that takes no time, all in both.
#[test]
fn replayed_programs_equal_their_ops() {
    use Precision::{F16, F32};
    for precision in [F32, F16] {
        replayed_equals_its_ops(tiny(), &open(precision));
    }
    for (config, emulated) in [
        (Config { corrective: false, ..tiny() }, &[F16][..]),
        (Config { confidence: false, ..tiny() }, &[F32, F16][..]),
        (Config { encoder: Encoder::Vit, ..tiny() }, &[F32, F16][..]),
        (Config { encoder: Encoder::Cnn, ..tiny() }, &[F16][..]),
    ] {
        for precision in [F32, F16] {
            if emulated.contains(&precision) || device_name() != "emulated" {
                replayed_equals_its_ops(config.clone(), &open(precision));
            }
        }
    }
}

/// Replayed programs equal their ops at the size at which launches, and branches, do overlap.
#[test]
fn replayed_programs_of_the_base_network_equal_their_ops() {
    if device_name() == "emulated" {
        common::skipped("the base network takes a GPU");
        return;
    }
    for precision in [Precision::F32, Precision::F16] {
        replayed_equals_its_ops(Config::base(), &open(precision));
    }
}

fn replayed_equals_its_ops(config: Config, device: &Device) {
    let s = config.patch;
    let model = Model::new(device, &Weights::hashed(config, "replay")).unwrap();
    model.warm_up().unwrap();
    assert!(model.planned_bytes() > 0);
    let image = |seed: usize| {
        Tensor::new(
            [s; 3],
            (0..s * s * s)
                .map(|i| ((i * 48271 + seed) % 997) as f32 / 500.0 - 1.0)
                .collect::<Vec<_>>(),
        )
    };
    let mut ignore = |_: &str, _: &Tensor| {};
    let scans = [1, 2].map(|seed| model.encode(&image(seed), &mut Observer::none()).unwrap());
    let plain =
        [1, 2].map(|seed| model.encode(&image(seed), &mut Observer::new(&mut ignore)).unwrap());
    let mut dense = Tensor::new([s; 3], vec![0.5; s * s * s]);
    for (turn, count) in [(0, 1), (1, 20), (0, 3)] {
        let points: Vec<_> =
            (0..count).map(|i| ([i * 5 % 32, i * 11 % 32, i * 3 % 32], i % 3 > 0)).collect();
        let history = prompt_maps(device, s, &points);
        let prompts = PatchPrompts {
            points,
            bounds: (count > 1).then_some([2.0, 3.0, 4.0, 28.0, 29.0, 30.0]),
        };
        let a = model
            .interact(&scans[turn], &prompts, &dense, &history, &mut Observer::none())
            .unwrap();
        let b = model
            .interact(&plain[turn], &prompts, &dense, &history, &mut Observer::new(&mut ignore))
            .unwrap();
        assert!(a.logits.value().data() == b.logits.value().data(), "{count} points");
        assert!(a.candidates.masks.data() == b.candidates.masks.data(), "{count} points");
        let answer = a.logits.value().clone();
        let (a, b) = (a.summary().unwrap(), b.summary().unwrap());
        assert_eq!(
            (a.selected, &a.scores, &a.bits),
            (b.selected, &b.scores, &b.bits),
            "{count} points"
        );
        dense = answer.reshape([s; 3]);
    }
}

/// If a copy from the device fails, the interaction that asked for it fails, and changes nothing:
/// there is no answer of zeros, and no other session is affected.
#[test]
fn a_failed_read_is_an_error_of_its_session_alone() {
    let device = open(DType::F16);
    let Device::Cuda(cuda) = &device else { panic!("{} is no CUDA device", device_name()) };
    let model = Arc::new(Model::new(&device, &Weights::hashed(tiny(), "failing")).unwrap());
    let image = Arc::new(Volume::read(&here("tests/data/odd/m17_oblique.nii.gz"), None).unwrap());
    let prompts = Prompts { bounds: Some([22, 16, 10, 40, 32, 14]), ..Default::default() };
    for released in [true, false] {
        let normalization = Normalization { clip: [-1000.0, 400.0], mean: -300.0, sd: 350.0 };
        let options = Options { spacing: Some(1.0), released, ..Default::default() };
        let scan = Arc::new(Scan::new(&model, image.clone(), normalization, options));
        let answer = |session: &mut Session| -> Result<Vec<u32>, SessionError> {
            Ok(session.interact(&prompts)?.probability().iter().map(|v| v.to_bits()).collect())
        };
        // A session that steers looks often: there it is enough that it fails.
        let expected = released.then(|| answer(&mut Session::new(&scan)).unwrap());
        let mut failing = Session::new(&scan);
        // Of an interaction's reads, the report's and then the logits'.
        for nth in [1, 2] {
            cuda.fail_download(nth);
            let failure = answer(&mut failing).unwrap_err();
            assert!(
                matches!(failure, SessionError::Op(OpError::Cuda(_))),
                "released {released}, read {nth}: {failure}"
            );
            assert!(failure.to_string().contains("made to fail"), "{failure}");
            assert!(failing.prediction().is_none() && failing.depth() == (0, 0));
        }
        if let Some(expected) = expected {
            assert!(
                answer(&mut Session::new(&scan)).unwrap() == expected,
                "another session's answer is another"
            );
            assert!(answer(&mut failing).unwrap() == expected, "the answer afterwards is another");
        }
    }
}

#[test]
fn a_machine_without_a_driver_says_so() {
    if let Err(e) = Device::open("cuda", 0) {
        let said = e.to_string();
        assert!(said.starts_with("no CUDA device: ") && said.len() > 30, "{said}");
    }
    let unknown = Device::open("cuda:x", 0).unwrap_err().to_string();
    assert!(unknown.contains("unknown device 'cuda:x'") && unknown.contains("'cpu'"), "{unknown}");
    assert_eq!(
        Device::open_as("cpu", 0, DType::F16).unwrap_err().to_string(),
        "the CPU computes in f32 or, with AVX512-BF16, in bf16; not in f16"
    );
}
