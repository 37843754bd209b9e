//! Times encode and interaction of the base network with hashed weights and prints JSON; `benches/peer/compare.py` runs it beside the peer.
//!
//! `cargo bench --bench session -- IMAGE SIZE REPEATS THREADS POINTS`: IMAGE holds SIZE³ little-endian floats, POINTS is `i,j,k;i,j,k;…`.

use prism::device::Device;
use prism::model::{Config, Model, Observer, PatchPrompts, Weights};
use prism::tensor::Tensor;
use std::time::Instant;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [image, size, repeats, threads, points] = &args[..] else {
        println!("arguments: IMAGE SIZE REPEATS THREADS POINTS (see the file's head); nothing was timed");
        return;
    };
    let number = |s: &str| s.parse::<usize>().expect("a number");
    let (s, repeats) = (number(size), number(repeats));
    let bytes = std::fs::read(image).expect("the image file");
    let image = Tensor::new([s; 3], bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect());
    let point = |p: &str| {
        let v: Vec<i32> = p.split(',').map(|v| v.parse().expect("i,j,k")).collect();
        ([v[0], v[1], v[2]], true)
    };
    let points: Vec<([i32; 3], bool)> = points.split(';').map(point).collect();
    let device = Device::open("cpu", number(threads)).expect("the CPU");
    let model = Model::new(&device, &Weights::hashed(Config { patch: s, ..Config::base() }, "public")).expect("the model");
    let mut history = vec![0.0f32; s * s * s * 2];
    for (p, _) in &points {
        history[((p[0] as usize * s + p[1] as usize) * s + p[2] as usize) * 2] = 1.0;
    }
    let history = Tensor::new([1, s, s, s, 2], history);
    let prompts = PatchPrompts { points, bounds: None };
    let mut dense = Tensor::new([s; 3], vec![0.0; s * s * s]);
    let (mut encode, mut interact) = (vec![], vec![]);
    let mut sum = 0.0;
    for _ in 0..repeats {
        let start = Instant::now();
        let features = model.encode(&image, &mut Observer::none()).expect("encode");
        encode.push(start.elapsed().as_secs_f64());
        for _ in 0..2 {
            let start = Instant::now();
            let answer = model.interact(&features, &prompts, &dense, &history, &mut Observer::none()).expect("interact");
            interact.push(start.elapsed().as_secs_f64());
            dense = answer.logits.value().reshape([s; 3]);
        }
        sum = dense.data().iter().map(|v| *v as f64).sum();
        dense = Tensor::new([s; 3], vec![0.0; s * s * s]);
    }
    println!(
        "{}",
        serde_json::json!({ "encode": encode, "interact": interact, "peak_bytes": peak(), "sum": sum, "device": device.describe() })
    );
}

/// The most memory the process ever held.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()? * 1024)
}
