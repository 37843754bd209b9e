//! Times encode and interaction of the base network with hashed weights and prints JSON;
//! `benches/peer/compare.py` runs it and the peer.
//!
//! `cargo bench --bench session -- IMAGE SIZE REPEATS THREADS POINTS [DEVICE PRECISION]`: IMAGE
//! holds SIZE³ little-endian floats, POINTS is `i,j,k;i,j,k;…`.

use prism::bench::peak_memory;
use prism::device::{Device, Precision};
use prism::model::{Config, Model, Observer, PatchPrompts, Weights, prompt_maps, weights};
use prism::tensor::Tensor;
use std::hash::{DefaultHasher, Hasher};
use std::time::Instant;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [image, size, repeats, threads, points, rest @ ..] = &args[..] else {
        println!(
            "arguments: IMAGE SIZE REPEATS THREADS POINTS [DEVICE PRECISION] (see the file's head); nothing was timed"
        );
        return;
    };
    let name = rest.first().map_or("cpu", String::as_str);
    let precision = match rest.get(1).map(String::as_str) {
        Some("f16") => Precision::F16,
        Some("bf16") => Precision::Bf16,
        Some("tf32") => Precision::Tf32,
        Some("ieee") => Precision::Ieee,
        _ => Precision::F32,
    };
    let number = |s: &str| s.parse::<usize>().expect("a number");
    let (s, repeats) = (number(size), number(repeats));
    let bytes = std::fs::read(image).expect("the image file");
    let image = Tensor::new(
        [s; 3],
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    );
    let point = |p: &str| {
        let v: Vec<i32> = p.split(',').map(|v| v.parse().expect("i,j,k")).collect();
        ([v[0], v[1], v[2]], true)
    };
    let points: Vec<([i32; 3], bool)> = points.split(';').map(point).collect();
    let device =
        Device::open_as(name, number(threads), precision).unwrap_or_else(|e| panic!("{e}"));
    // Read from a file, like any model.
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("model.safetensors");
    Weights::hashed(Config { patch: s, ..Config::base() }, "public")
        .save(&file, weights::Precision::F32)
        .expect("the weights");
    let model =
        Model::new(&device, &Weights::open(&file).expect("the weights")).expect("the model");
    model.warm_up().expect("warm-up");
    let history = prompt_maps(&device, s, &points);
    let prompts = PatchPrompts { points, bounds: None };
    let mut dense = Tensor::new([s; 3], vec![0.0; s * s * s]);
    let (mut encode, mut interact) = (vec![], vec![]);
    let (mut sum, mut bits) = (0.0, DefaultHasher::new());
    for _ in 0..repeats {
        let start = Instant::now();
        let features = model.encode(&image, &mut Observer::none()).expect("encode");
        if let Device::Cuda(cuda) = &device {
            cuda.synchronize().expect("encode");
        }
        encode.push(start.elapsed().as_secs_f64());
        for _ in 0..2 {
            let start = Instant::now();
            let answer = model
                .interact(&features, &prompts, &dense, &history, &mut Observer::none())
                .expect("interact");
            interact.push(start.elapsed().as_secs_f64());
            dense = answer.logits.value().reshape([s; 3]);
        }
        sum = dense.data().iter().map(|v| *v as f64).sum();
        dense.data().iter().for_each(|v| bits.write_u32(v.to_bits()));
        dense = Tensor::new([s; 3], vec![0.0; s * s * s]);
    }
    let held = match &device {
        Device::Cuda(cuda) => Some(cuda.held()[1]),
        Device::Cpu(_) => None,
    };
    println!(
        "{}",
        serde_json::json!({ "encode": encode, "interact": interact, "peak_bytes": peak_memory(), "sum": sum, "bits": format!("{:016x}", bits.finish()), "device": device.describe(), "device_bytes": held })
    );
}
