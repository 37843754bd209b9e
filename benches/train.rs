//! Times a training step with hashed weights and prints JSON; `benches/peer/compare_train.py` runs
//! it and the peer.
//!
//! `cargo bench --bench train -- IMAGE LABEL MODEL ITERATIONS REPEATS THREADS POINTS RECOMPUTE
//! [DEVICE PRECISION]`: IMAGE and LABEL hold little-endian floats, MODEL is small or base, POINTS
//! is `i,j,k;i,j,k;…`, RECOMPUTE true or false. Steps that only lower the loss scale of f16 are not
//! among those that are timed.

use prism::bench::{TrainingStep, peak_memory};
use prism::device::{Device, Precision};
use prism::model::{Config, PatchPrompts};
use prism::ops::loss::{KERNEL, Target};
use prism::tensor::Tensor;
use std::time::Instant;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [image, label, model, iterations, repeats, threads, points, recompute, rest @ ..] =
        &args[..]
    else {
        println!(
            "arguments: IMAGE LABEL MODEL ITERATIONS REPEATS THREADS POINTS RECOMPUTE [DEVICE PRECISION] (see the file's head); nothing was timed"
        );
        return;
    };
    let number = |s: &str| s.parse::<usize>().expect("a number");
    let precision = match rest.get(1).map(String::as_str) {
        Some("f16") => Precision::F16,
        Some("bf16") => Precision::Bf16,
        Some("tf32") => Precision::Tf32,
        Some("ieee") => Precision::Ieee,
        _ => Precision::F32,
    };
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
    let device =
        Device::open_as(rest.first().map_or("cpu", String::as_str), number(threads), precision)
            .unwrap_or_else(|e| panic!("{e}"));
    let image = Tensor::new([s; 3], floats(image));
    let target = Target::new(&device, floats(label), [s; 3], KERNEL).expect("the label");
    let prompts = PatchPrompts { points, bounds: None };
    let mut training = TrainingStep::new(&device, config, number(iterations), recompute == "true");
    let (mut step, mut losses, mut norms, mut lowered) = (vec![], vec![], vec![], 0);
    while step.len() < number(repeats) {
        let start = Instant::now();
        let (outcome, norm) = training.run(&image, &target, &prompts).expect("a step");
        if let Device::Cuda(cuda) = &device {
            cuda.synchronize().expect("the device's work");
        }
        // It has changed no weights; without a loss scale it never will.
        if !norm.is_finite() {
            assert!(lowered < 16, "the gradients' norm is {norm}");
            lowered += 1;
            continue;
        }
        step.push(start.elapsed().as_secs_f64());
        losses.push(outcome.loss);
        norms.push(norm);
    }
    let device_bytes = match &device {
        Device::Cuda(cuda) => Some(cuda.held()[1]),
        Device::Cpu(_) => None,
    };
    println!(
        "{}",
        serde_json::json!({ "step": step, "loss": losses, "norm": norms, "lowered": lowered, "peak_bytes": peak_memory(), "device_bytes": device_bytes, "recorded": training.recorded(), "device": device.describe() })
    );
}
