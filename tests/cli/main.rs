//! The program as its users see it: results, messages, exit codes, files that are complete or
//! absent.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/program.rs"]
mod program;

mod documents;
mod models;
mod objects;
mod segment;
mod training;

use common::{here, tiny};
use prism::model::{Weights, weights::Precision};
use program::Run;
use std::path::{Path, PathBuf};
use std::process::Output;

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    /// A folder with a tiny model in it.
    fn new() -> Place {
        let place = Place { folder: tempfile::tempdir().unwrap() };
        Weights::hashed(tiny(), "cli")
            .save(&place.at("model.safetensors"), Precision::F32)
            .unwrap();
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Names in the folder, sorted, without the model.
    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|n| n != "model.safetensors");
        names.sort();
        names
    }

    /// `prism segment` with the tiny model on `image`, which writes `mask.nii.gz` here.
    fn segment(&self, image: &Path) -> Run {
        program::segment(&self.at("model.safetensors"), image, &self.at("mask.nii.gz"))
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Asserts the exit code, and that nothing panicked in any case.
#[track_caller]
fn code(out: &Output, want: i32) -> String {
    let error = text(&out.stderr);
    assert_eq!(out.status.code(), Some(want), "{error}");
    assert!(!error.contains("panicked"), "{error}");
    error
}

fn odd(name: &str) -> PathBuf {
    here("tests/data/odd").join(name)
}

/// The example scan's files.
fn example() -> [PathBuf; 2] {
    ["image", "label"].map(|n| here(&format!("examples/data/lung1_{n}.nii.gz")))
}
