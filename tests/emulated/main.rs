//! The CUDA path without a GPU: the kernels on host threads, every access checked. The same tests
//! run on a GPU with PRISM_TEST_DEVICE=cuda.
#![cfg(feature = "emulator")]

#[path = "../common/mod.rs"]
mod common;

mod gradients;
mod network;
mod ops;
mod recorded;
mod reference;
mod training;
mod variants;
mod wgmma;

use common::{device_name, tiny};
use prism::autograd::ParamGrads;
use prism::device::{Cuda, DType, Device, Precision};
use prism::model::{Config, Model, Observer, PatchPrompts, Weights, prompt_maps};
use prism::ops::loss::{KERNEL, Target};
use prism::ops::optimizer::upload_parameters;
use prism::tensor::Tensor;
use prism::train::step::{LossWeights, Rerun, Share, run_item};
use std::sync::OnceLock;

fn open(precision: impl Into<Precision>) -> Device {
    Device::open_as(&device_name(), 0, precision).unwrap()
}

/// float32 as it is multiplied by default, in one pass and in plain arithmetic; 16 bits.
const PRECISIONS: [Precision; 5] =
    [Precision::F32, Precision::Tf32, Precision::Ieee, Precision::F16, Precision::Bf16];

/// Whether a test is to run in which a whole network shows again what other tests show of its parts
/// or in other precisions: on a GPU, where that takes no time, and where `PRISM_TEST_EMULATED=all`
/// asks for it, as a job beside `.ci/run` does. Reports if not.
fn at_length() -> bool {
    let asked = std::env::var("PRISM_TEST_EMULATED").is_ok_and(|v| v == "all");
    let runs = asked || device_name() != "emulated";
    if !runs {
        common::skipped("on the emulator it takes PRISM_TEST_EMULATED=all");
    }
    runs
}

fn cuda_of(device: &Device) -> &Cuda {
    match device {
        Device::Cuda(cuda) => cuda,
        Device::Cpu(_) => panic!("{} is no CUDA device", device_name()),
    }
}

fn transfers(device: &Device) -> [u64; 2] {
    match device {
        Device::Cuda(cuda) => cuda.transfers().into(),
        Device::Cpu(_) => [0; 2],
    }
}

/// A device that multiplies by `wgmma` where it can; none if it cannot, or is a GPU for which that
/// was not asked for: should it fail there, no other test shall fail with it.
fn with_wgmma(name: &str, dtype: DType) -> Option<Device> {
    let asked = std::env::var("PRISM_CUDA_WGMMA").is_ok_and(|v| v == "on" || v == "1");
    if !asked && !name.starts_with("emulated") {
        return None;
    }
    let device = Device::open_as(name, 0, dtype).unwrap();
    let Device::Cuda(cuda) = &device else { panic!("{name} is no CUDA device") };
    cuda.use_wgmma(true).then_some(device)
}

/// Small whole numbers, whose sums of products are exact in any order.
fn whole(shape: &[usize], seed: usize) -> Tensor {
    let count: usize = shape.iter().product();
    Tensor::new(shape, (0..count).map(|i| ((i * 7919 + seed * 131) % 9) as f32 - 4.0).collect())
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
    let (weights, recompute) = (LossWeights::default(), Rerun::Never);
    let share = Share { weights, iterations: 1, batch: 1, recompute, scale };
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
    let (mut dense, high) = (Tensor::new([s; 3], vec![0.5; s * s * s]), s as f32);
    for (turn, count) in [(0, 1), (1, 20), (0, 3)] {
        let points: Vec<_> = (0..count)
            .map(|i| ([i * 5 % s, i * 11 % s, i * 3 % s].map(|v| v as i32), i % 3 > 0))
            .collect();
        let history = prompt_maps(device, s, &points);
        let prompts = PatchPrompts {
            points,
            bounds: (count > 1).then_some([2.0, 3.0, 4.0, high - 4.0, high - 3.0, high - 2.0]),
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
