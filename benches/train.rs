//! Times a training step with hashed weights and prints JSON; `benches/peer/compare_train.py` runs it beside the peer.
//!
//! `cargo bench --bench train -- IMAGE LABEL MODEL ITERATIONS REPEATS THREADS POINTS RECOMPUTE`: IMAGE and LABEL hold little-endian floats, MODEL is small or
//! base, POINTS is `i,j,k;i,j,k;…`, RECOMPUTE true or false.

use prism::autograd::ParamGrads;
use prism::device::Device;
use prism::model::{Config, Model, PatchPrompts, Weights};
use prism::ops::loss::{KERNEL, Target};
use prism::ops::optimizer::{AdamW, AdamWConfig};
use prism::tensor::Tensor;
use prism::train::step::{LossWeights, Share, run_item};
use std::time::Instant;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [image, label, model, iterations, repeats, threads, points, recompute] = &args[..] else {
        println!("arguments: IMAGE LABEL MODEL ITERATIONS REPEATS THREADS POINTS RECOMPUTE (see the file's head); nothing was timed");
        return;
    };
    let number = |s: &str| s.parse::<usize>().expect("a number");
    let config = Config::preset(model).expect("small or base");
    let s = config.patch;
    let floats = |path: &str| -> Vec<f32> {
        let bytes = std::fs::read(path).expect("a file of floats");
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    };
    let point = |p: &str| {
        let v: Vec<i32> = p.split(',').map(|v| v.parse().expect("i,j,k")).collect();
        ([v[0], v[1], v[2]], true)
    };
    let points: Vec<([i32; 3], bool)> = points.split(';').map(point).collect();
    let device = Device::open("cpu", number(threads)).expect("the CPU");
    let image = Tensor::new([s; 3], floats(image));
    let target = Target::new(&device, floats(label), [s; 3], KERNEL).expect("the label");
    let mut weights = Weights::hashed(config.clone(), "public");
    let lengths: Vec<usize> = config.tensors().iter().map(|(_, s)| s.iter().product()).collect();
    let settings = AdamWConfig { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01, max_norm: 1.0 };
    let mut optimizer = AdamW::new(settings, &lengths);
    let share =
        Share { weights: LossWeights::default(), iterations: number(iterations), batch: 1, recompute: recompute == "true", scale: 1.0 };
    let (mut step, mut losses) = (vec![], vec![]);
    for _ in 0..number(repeats) {
        let start = Instant::now();
        let mut grads = ParamGrads::new(lengths.len());
        let model = Model::new(&device, &weights).expect("the model");
        let prompt = |_: usize, _: Option<&[f32]>| Some(PatchPrompts { points: points.clone(), bounds: None });
        let outcome = run_item(&device, &model, &image, &target, share, &mut grads, prompt).expect("a step");
        drop(model);
        let gradients: Vec<Option<&[f32]>> = (0..lengths.len()).map(|id| grads.get(id)).collect();
        optimizer.step(&device, 1e-4, &mut weights.values_mut(), &gradients, 1.0).expect("an update");
        step.push(start.elapsed().as_secs_f64());
        losses.push(outcome.loss);
    }
    println!("{}", serde_json::json!({ "step": step, "loss": losses, "peak_bytes": peak(), "device": device.describe() }));
}

/// The most memory the process ever held.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()? * 1024)
}
