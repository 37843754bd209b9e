//! What several test files share.
#![allow(dead_code)]

use prism::device::{DType, Device};
use prism::model::{Config, Intensity, Model, Weights};
use prism::ops::conv3d::ConvInput;
use prism::ops::decoder_stage::{DecoderStage, decoder_stage, skip_map};
use prism::ops::norm;
use prism::ops::optimizer::bring;
use prism::tensor::{OpError, Tensor};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A folder or file of the repository. An executable that was carried to another machine is told
/// where that is.
pub fn here(path: &str) -> PathBuf {
    let root =
        std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&root).join(path)
}

/// Says that the test at hand, or a part of it, is not run here: on standard error, past what hides
/// the output of tests that pass, and as a line of `tmp/skipped-tests.txt` in cargo's target
/// folder, from which `.ci/run` lists at its end what was skipped.
pub fn skipped(why: &str) {
    let thread = std::thread::current();
    let line =
        format!("{}: {}: {why}\n", env!("CARGO_CRATE_NAME"), thread.name().unwrap_or("a thread"));
    let _ = std::io::stderr().write_all(format!("skipped: {line}").as_bytes());
    // An executable that was carried to another machine has no such folder.
    let Some(folder) = option_env!("CARGO_TARGET_TMPDIR") else { return };
    let list = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(Path::new(folder).join("skipped-tests.txt"));
    let _ = list.and_then(|mut list| list.write_all(line.as_bytes()));
}

/// A folder beside the repository that only some machines have; says so where it is missing.
pub fn shared(path: &str) -> Option<PathBuf> {
    let at = here("../shared").join(path);
    if !at.exists() {
        skipped(&format!("{} is not on this machine", at.display()));
    }
    at.exists().then_some(at)
}

/// Whole numbers from -2 to 2, scattered: sums of their products are exact in whatever order.
fn scattered(shape: &[usize], seed: u32) -> Tensor {
    let count: usize = shape.iter().product();
    let value = |i: usize| {
        let mut x = (i as u32).wrapping_add(seed << 24);
        x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
        x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
        ((x ^ (x >> 16)) % 5) as f32 - 2.0
    };
    Tensor::new(shape, (0..count).map(value).collect())
}

/// A decoder stage from `coarse` channels, of `n` items of two tiles each, and the norm behind it.
/// On a CUDA device its weights are composed and laid out there.
pub fn stage(device: &Device, n: usize, coarse: usize) -> Result<Tensor, OpError> {
    let mut given = [
        scattered(&[coarse, 4, 2, 2, 2], 1),
        scattered(&[4], 2),
        scattered(&[8, 4, 3, 3, 3], 3),
        scattered(&[8], 4),
    ];
    bring(device, &mut given.iter_mut().collect::<Vec<_>>())?;
    let [deconv, deconv_bias, conv, conv_bias] = &given;
    let stage = DecoderStage::new(device, deconv, deconv_bias, conv, conv_bias)?;
    let fine = skip_map(device, &stage, None, [n, 10, 4, 16])?;
    let x = ConvInput::shared(&scattered(&[n, 5, 2, 8, coarse], 5));
    let made = decoder_stage(device, &stage, &x, &fine)?;
    let sums = made.sums.expect("a stage always has its sums");
    let (weight, bias) = (Tensor::from(vec![1.0; 8]), Tensor::from(vec![0.5; 8]));
    norm::apply(device, &made.map, &sums.instance_norm(&weight, &bias, 1e-5, 0.01)?, None)
}

/// What is wrong with a decoder stage on a CUDA device, beside the CPU.
pub fn judge_stage(device: &Device, n: usize, coarse: usize) -> Result<(), String> {
    let made = stage(device, n, coarse).map_err(|e| e.to_string())?;
    let expected = stage(&Device::open("cpu", 1).unwrap(), n, coarse).unwrap();
    // Values of some 600 at the most, whole, exact in f16, with a deviation of some 120; behind the
    // norm up to 5, rounded once more. In bfloat16 they are rounded both times, by eight bits.
    let bound = if device.precision() == DType::F16 { 5e-3 } else { 5e-2 };
    let near = |(got, want): &(&f32, &f32)| (*got - *want).abs() <= bound;
    match made.data().iter().zip(expected.data()).enumerate().find(|(_, pair)| !near(pair)) {
        Some((at, (got, want))) => Err(format!("value {at} is {got}, expected {want}")),
        None => Ok(()),
    }
}

/// A network small enough for a debug build: every part is there, nothing is wide.
pub fn tiny() -> Config {
    Config {
        patch: 32,
        channels: [8, 8, 16, 16, 48],
        vit_width: 48,
        vit_depth: 4,
        vit_heads: 4,
        vit_mlp: 96,
        window: 3,
        global_blocks: vec![3],
        taps: [1, 2, 3],
        prompt_mlp: 64,
        score_hidden: 24,
        refine_width: 8,
        intensity: Some(Intensity {
            clip: [-1000.0, 400.0],
            mean: -300.0,
            sd: 350.0,
            hounsfield: false,
        }),
        ..Config::base()
    }
}

/// The tiny network with hashed weights.
pub fn tiny_model(config: Config, threads: usize) -> Arc<Model> {
    let device = Device::Cpu(prism::device::Cpu::new(threads).unwrap());
    Arc::new(Model::new(&device, &Weights::hashed(config, "tiny")).unwrap())
}

/// The CUDA device that tests run on: the emulator, or what PRISM_TEST_DEVICE names.
pub fn device_name() -> String {
    std::env::var("PRISM_TEST_DEVICE").unwrap_or_else(|_| "emulated".into())
}
