//! Checking an installation: runs every reference case found in a folder and compares the results
//! with the reference's.
//!
//! Reference cases are files with inputs and expected results. The authors' network and the
//! libraries that it uses, PyTorch among them, computed these, most of them in float64; with many,
//! a file also has the error that PyTorch itself makes in float32.
//!
//! The rule is self-calibrating: a result passes if its relative L2 error is at most the larger of
//! a fixed bound and four times PyTorch's own error in float32 in that place. If a device computes
//! in 16 bits, the bound is the larger of 2e-2 and four times PyTorch's error in 16 bits. Of a
//! network's gradients 1 % may exceed it, and their median is held to 1.5 times PyTorch's. A
//! refined mask passes if 1 - Dice is at most the larger of 0.005 and four times PyTorch's. TF32 is
//! held to the same bounds as f16: it has as many bits of mantissa.
//!
//! What float32 cannot determine is not judged: a voxel of a mask whose logit is within PyTorch's
//! error of 0 is put on the reference's side before the answer that is refined from the mask is
//! compared. This may apply to two voxels, or 1 of 100,000; more are a failure.
//!
//! ```no_run
//! use prism::{Device, verify};
//! use std::path::Path;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::open("cpu", 0)?;
//! let all_passed = verify::run(&device, Path::new("tests/reference"), &[], |case| {
//!     println!("{}: {}", case.case, if case.passed() { "passed" } else { "failed" });
//! })?;
//! # Ok(())
//! # }
//! ```

mod archive;
mod checkpoint;
mod gradient;
mod half;
mod metrics;
mod ops;
mod preprocess;
mod session;

pub use archive::{Archive, Entry};

use crate::device::{DType, Device};
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Why a reference case could not be read or run; the message names the file.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {message}")]
pub struct VerifyError {
    path: PathBuf,
    message: String,
}

impl VerifyError {
    fn new(path: &Path, message: String) -> VerifyError {
        VerifyError { path: path.into(), message }
    }
}

/// What a file holds, by its metadata or name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// One op with inputs and outputs.
    Op,
    /// A whole session of the network.
    Session,
    /// Orientation, resampling, crop and intensity.
    Preprocess,
    /// A PyTorch checkpoint.
    Checkpoint,
    /// The training loss and every parameter's gradient.
    Gradient,
    /// Overlap and surface distances of two masks.
    Metrics,
    /// The centreline of a plane region.
    Thinning,
}

/// The comparison of one quantity of a case with its reference.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// The name of the quantity.
    pub quantity: String,
    /// The error: for most quantities the relative L2 error, for masks the fraction of differing
    /// voxels or 1 - Dice, as the quantity's name says.
    pub error: f64,
    /// The largest error that passes.
    pub tolerance: f64,
    /// A note about this comparison, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Whether the error is relative to float64's result, so that the arithmetic's precision bounds
    /// it.
    #[serde(skip)]
    relative: bool,
}

impl Check {
    /// Whether the error is within the tolerance (NaN never is).
    pub fn passed(&self) -> bool {
        self.error <= self.tolerance
    }

    /// Compares values by their relative L2 error. The tolerance is the larger of `bound` and four
    /// times `peer`, PyTorch's own error. If there are not as many values, the error is NaN.
    pub fn relative(
        quantity: impl Into<String>,
        got: impl Iterator<Item = f64>,
        want: &[f64],
        bound: f64,
        peer: f64,
    ) -> Check {
        let (mut difference, mut norm, mut count) = (0.0, 0.0, 0);
        for (g, w) in got.zip(want) {
            difference += (g - w).powi(2);
            norm += w * w;
            count += 1;
        }
        let error = if count != want.len() {
            f64::NAN
        } else if norm > 0.0 {
            (difference / norm).sqrt()
        } else {
            difference.sqrt()
        };
        Check { relative: true, ..Check::within(quantity, error, bound.max(4.0 * peer)) }
    }

    /// A check of an error that was computed elsewhere.
    pub fn within(quantity: impl Into<String>, error: f64, tolerance: f64) -> Check {
        Check { quantity: quantity.into(), error, tolerance, note: None, relative: false }
    }

    /// A check that passes if `equal` is set: with an error of 0, otherwise 1, and a tolerance of
    /// 0.
    pub fn exact(quantity: impl Into<String>, equal: bool) -> Check {
        Check::within(quantity, if equal { 0.0 } else { 1.0 }, 0.0)
    }
}

/// The result of one reference case.
#[derive(Clone, Debug, Serialize)]
pub struct CaseReport {
    /// The path of the file, relative to the folder.
    pub case: String,
    /// What the file holds; none for a kind that this version does not know.
    pub kind: Option<Kind>,
    /// All comparisons; none if the case could not be run.
    pub checks: Vec<Check>,
    /// Why the case could not be run, if so.
    pub failure: Option<String>,
    /// How long it took, in seconds.
    pub seconds: f64,
}

impl CaseReport {
    /// Whether the case ran, compared something, and all of it passed.
    pub fn passed(&self) -> bool {
        self.failure.is_none() && !self.checks.is_empty() && self.checks.iter().all(Check::passed)
    }

    /// The check whose error is nearest to its tolerance, or furthest beyond it; none without
    /// checks.
    pub fn worst(&self) -> Option<&Check> {
        let strain = |c: &Check| match (c.error, c.tolerance) {
            (e, _) if e.is_nan() => f64::INFINITY,
            (0.0, _) => 0.0,
            (e, t) => e / t,
        };
        self.checks.iter().max_by(|a, b| strain(a).total_cmp(&strain(b)))
    }
}

/// A file, and its kind or the name of an unknown kind.
type Found = (PathBuf, Result<Kind, String>);

/// Every case below `folder`, sorted by path.
fn cases(folder: &Path) -> Result<Vec<Found>, VerifyError> {
    let mut files = BTreeSet::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(at) = folders.pop() {
        let entries = std::fs::read_dir(&at).map_err(|e| VerifyError::new(&at, e.to_string()))?;
        for entry in entries {
            let path = entry.map_err(|e| VerifyError::new(&at, e.to_string()))?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.insert(path);
            }
        }
    }
    let mut cases = vec![];
    for path in files {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let companion = name == checkpoint::EXPECTED
            || name.ends_with(".nii.gz")
            || name.ends_with(".md")
            || name.starts_with('.');
        if companion {
            continue;
        }
        let kind = if name.starts_with("checkpoint_") {
            Ok(Kind::Checkpoint)
        } else if name.ends_with(".safetensors") {
            let archive = Archive::open(&path)?;
            match (archive.maybe_text("op"), archive.maybe_text("kind")) {
                (Some(_), _) => Ok(Kind::Op),
                (None, Some("session")) => Ok(Kind::Session),
                (None, Some("preprocess")) => Ok(Kind::Preprocess),
                (None, Some("gradient")) => Ok(Kind::Gradient),
                (None, Some("metrics")) => Ok(Kind::Metrics),
                (None, Some("thinning")) => Ok(Kind::Thinning),
                (None, other) => Err(other.unwrap_or("no kind").to_string()),
            }
        } else {
            Err("a file of no known form".to_string())
        };
        cases.push((path, kind));
    }
    Ok(cases)
}

/// Runs every reference case in `folder` and its subfolders, in the order of their paths, and calls
/// `report` after each. Returns whether there was at least one case and all passed.
///
/// Only cases whose kind is in `only` are run; if it is empty all are, and a file of an unknown
/// kind is a failure.
///
/// # Errors
/// The folder, or a safetensors file in it, cannot be read. A case that cannot be run is reported
/// instead: see [`CaseReport::failure`].
pub fn run(
    device: &Device,
    folder: &Path,
    only: &[Kind],
    mut report: impl FnMut(&CaseReport),
) -> Result<bool, VerifyError> {
    let (mut any, mut all) = (false, true);
    let mut models = session::Models::default();
    for (path, kind) in cases(folder)? {
        if !only.is_empty() && !kind.as_ref().is_ok_and(|k| only.contains(k)) {
            continue;
        }
        let start = std::time::Instant::now();
        let outcome = match &kind {
            Ok(Kind::Op) => ops::run(device, &path),
            Ok(Kind::Session) => session::run(device, &path, &mut models),
            Ok(Kind::Preprocess) => preprocess::run(&path),
            Ok(Kind::Checkpoint) => checkpoint::run(&path),
            Ok(Kind::Gradient) => gradient::run(&device.for_training(), &path, &mut models),
            Ok(Kind::Metrics) => metrics::run(&path),
            Ok(Kind::Thinning) => metrics::thinning(&path),
            Err(name) => Err(VerifyError::new(&path, format!("unknown kind '{name}'"))),
        };
        let (checks, failure) = match outcome {
            Ok(mut checks) => {
                if device.products().rounds() {
                    // TF32 has as many bits of mantissa as f16.
                    let dtype = match device.precision() {
                        DType::F32 => DType::F16,
                        dtype => dtype,
                    };
                    half::widen(&path, dtype, &mut checks);
                }
                (checks, None)
            }
            Err(e) => (vec![], Some(e.message)),
        };
        let case = path.strip_prefix(folder).unwrap_or(&path).display().to_string();
        let done = CaseReport {
            case,
            kind: kind.ok(),
            checks,
            failure,
            seconds: start.elapsed().as_secs_f64(),
        };
        (any, all) = (true, all && done.passed());
        report(&done);
    }
    Ok(any && all)
}
