//! What a user's data and time are protected from: signals, settings without bounds, folders
//! without end, files given twice.
#![cfg(unix)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/program.rs"]
mod program;

mod files;
mod memory;
mod numbers;
mod runs;

use common::tiny;
use prism::model::{Weights, weights::Precision};
use std::path::{Path, PathBuf};
use std::process::Output;

fn model(folder: &Path) -> PathBuf {
    let path = folder.join("m.safetensors");
    Weights::hashed(tiny(), "trust").save(&path, Precision::F32).unwrap();
    path
}

fn text(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}
