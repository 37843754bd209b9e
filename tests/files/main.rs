//! Files as users have them, and damaged ones: in whatever form a scan or a label is stored, it is
//! the same scan and the same label, or an error that names what it is.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/program.rs"]
mod program;

mod dicom;
mod hostile;
mod images;
mod labels;
mod mutated;
mod outputs;
mod prompts;
mod volumes;

use common::here;
use prism::volume::labels::{Labels, TargetLabel};
use prism::volume::{Affine, Volume};
use program::Run;
use std::path::{Path, PathBuf};

fn case(name: &str) -> PathBuf {
    here("tests/data/cases").join(name)
}

fn base() -> Volume {
    Volume::read(&case("base/scan.nii.gz"), None).unwrap()
}

fn object() -> Vec<u8> {
    Labels::read(&case("base/label.nii.gz"), &base().grid).unwrap().mask(&TargetLabel::Any).unwrap()
}

fn count(mask: &[u8]) -> usize {
    mask.iter().filter(|v| **v != 0).count()
}

fn small_model() -> PathBuf {
    here("models/small.safetensors")
}

/// Runs `prism segment` with the small model; returns its standard error, and the mask.
fn segment(image: &Path, folder: &Path, more: &[&str]) -> (String, Vec<u8>) {
    let mask = folder.join("mask.nii.gz");
    let mut run = program::segment(&small_model(), image, &mask);
    run.0.args(more);
    let out = run.output();
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.success(), "{run:?}: {said}");
    (said, Volume::read(&mask, None).unwrap().values().iter().map(|v| *v as u8).collect())
}

/// Runs `prism` to a failure; returns its message.
#[track_caller]
fn refused(mut run: Run) -> String {
    let out = run.output();
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(!out.status.success() && !said.contains("panicked"), "{run:?}: {said}");
    said
}

const BOX: &str = "8,7,3,34,35,8";

/// Writes an image of bytes, or of 16-bit numbers, as NRRD.
fn nrrd(path: &Path, size: [usize; 3], affine: &Affine, values: &[u8]) {
    let kind = if values.len() == size.iter().product::<usize>() { "uchar" } else { "short" };
    let vector = |a: usize| format!("({},{},{})", affine.0[0][a], affine.0[1][a], affine.0[2][a]);
    let header = format!(
        "NRRD0004\ntype: {kind}\nendian: little\ndimension: 3\nspace: RAS\nsizes: {} {} {}\nspace directions: {} {} {}\nspace origin: {}\nencoding: raw\n\n",
        size[0],
        size[1],
        size[2],
        vector(0),
        vector(1),
        vector(2),
        vector(3)
    );
    std::fs::write(path, [header.as_bytes(), values].concat()).unwrap();
}
