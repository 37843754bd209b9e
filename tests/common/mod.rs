//! What several test files share.
#![allow(dead_code)]

use prism::device::Device;
use prism::model::{Config, Intensity, Model, Weights};
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
