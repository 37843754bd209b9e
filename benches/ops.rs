//! Criterion benches of the ops, at the base model's sizes: `cargo bench --bench ops`.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use prism::device::Device;
use prism::ops::attention::{VitWeights, vit_attention};
use prism::ops::conv3d::{Input, PackedConv, conv3d};
use prism::ops::decoder_stage::{DecoderStage, decoder_stage};
use prism::ops::linear::{Activation, linear};
use prism::ops::norm;
use prism::tensor::{Param, Tensor};
use std::hint::black_box;

/// Uniform numbers in [-1, 1).
fn noise(shape: &[usize]) -> Tensor {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    Tensor::new(shape, (0..shape.iter().product()).map(|_| next()).collect())
}

fn convolutions(c: &mut Criterion) {
    let device = Device::open("cpu", 0).unwrap();
    let mut group = c.benchmark_group("conv3d, floating-point operations");
    for (s, ci, co) in [(128, 1, 32), (128, 32, 32), (64, 32, 32), (32, 64, 64), (16, 128, 128), (8, 384, 384)] {
        let x = noise(&[1, s, s, s, ci]);
        let conv = PackedConv::new(device.cpu(), &noise(&[co, ci, 3, 3, 3]), 0..ci, Some(&noise(&[co]))).unwrap();
        group.throughput(Throughput::Elements((s * s * s * ci * co * 54) as u64));
        group
            .bench_function(format!("{s}^3 {ci}->{co}"), |b| b.iter(|| black_box(conv3d(&device, Input::plain(&x), &conv, true).unwrap())));
    }
    group.finish();
    let mut group = c.benchmark_group("decoder stage, floating-point operations");
    for (s, ci, up, skip, co) in [(64, 32, 32, 32, 32), (32, 64, 32, 32, 32), (16, 128, 64, 64, 64), (8, 384, 192, 128, 128)] {
        let (deconv, conv) = (noise(&[ci, up, 2, 2, 2]), noise(&[co, skip + up, 3, 3, 3]));
        let stage = DecoderStage::new(&device, &deconv, &noise(&[up]), &conv, &noise(&[co])).unwrap();
        let (x, map) = (noise(&[1, s, s, s, ci]), noise(&[1, 2 * s, 2 * s, 2 * s, co]));
        group.throughput(Throughput::Elements((s * s * s * 64 * ci * co * 2) as u64));
        group.bench_function(format!("{s}^3 {ci}->{co}"), |b| {
            b.iter(|| black_box(decoder_stage(&device, &stage, Input::plain(&x), &map).unwrap()))
        });
    }
    group.finish();
}

fn transformer(c: &mut Criterion) {
    let device = Device::open("cpu", 0).unwrap();
    let mut group = c.benchmark_group("linear, floating-point operations");
    for (m, k, n) in [(512, 768, 2304), (512, 768, 3072), (512, 3072, 768), (10, 384, 2048)] {
        let (x, w, b) = (noise(&[m, k]), noise(&[n, k]), noise(&[n]));
        group.throughput(Throughput::Elements((m * k * n * 2) as u64));
        group.bench_function(format!("{m}x{k}x{n}"), |bench| {
            bench.iter(|| black_box(linear(&device, &x, &w, Some(&b), Activation::None, None).unwrap()))
        });
    }
    group.finish();
    let mut group = c.benchmark_group("attention and norm, per call");
    let x = noise(&[1, 8, 8, 8, 768]);
    for window in [14, 0] {
        let rows = if window == 0 { 15 } else { 27 };
        let param = |shape: &[usize]| Param::new(noise(shape), 0);
        let w = VitWeights {
            qkv: (param(&[2304, 768]), param(&[2304])),
            proj: (param(&[768, 768]), param(&[768])),
            rel_pos: [param(&[rows, 64]), param(&[rows, 64]), param(&[rows, 64])],
            heads: 12,
            window,
        };
        group.bench_function(format!("vit attention, window {window}"), |b| {
            b.iter(|| black_box(vit_attention(&device, &w, &x, None).unwrap()))
        });
    }
    let x = noise(&[512, 768]);
    let w = noise(&[768]);
    group.bench_function("layer norm 512x768", |b| b.iter(|| black_box(norm::layer_norm(&device, &x, &w, &w, 1e-6, false).unwrap())));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = convolutions, transformer
}
criterion_main!(benches);
