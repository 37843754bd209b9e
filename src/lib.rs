//! prism segments tumours in 3D scans interactively: click, box, scribble, correct, done.
//!
//! It runs the PRISM network (Li et al., MICCAI 2024) on an engine of its own. A program uses it from the top down:
//!
//! ```no_run
//! use prism::device::Device;
//! use prism::model::{Model, Weights};
//! use prism::prompt::{Prompts, RawPoint, Space};
//! use prism::session::{EncodedScan, Session};
//! use prism::volume::{Volume, intensity::Normalization};
//! use std::{path::Path, sync::Arc};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::open("cpu", 0)?;
//! let weights = Weights::open(Path::new("model.safetensors"))?;
//! let model = Arc::new(Model::new(&device, &weights)?);
//! let scan = Volume::read(Path::new("scan.nii.gz"), None)?;
//!
//! let mut prompts = Prompts::default();
//! prompts.add_point(&scan.grid, RawPoint { position: [120.0, 90.0, 30.0], positive: true }, Space::Ijk)?;
//! let around = prompts.extent(&scan.grid).ok_or("no prompt")?;
//! let normalization = Normalization::of_percentiles(&scan);
//! let encoded = Arc::new(EncodedScan::new(&model, &scan, &normalization, 1.0, &around)?);
//!
//! let mut session = Session::new(&encoded);
//! session.interact(&prompts)?;
//! let mask = session.mask(); // on the scan's own grid
//! # Ok(())
//! # }
//! ```
//!
//! Below that, [`ops`] holds the fused operations, [`tensor`] and [`device`] what they run on, and [`verify`] judges an installation against
//! the reference network's outputs. [`mod@bench`] measures, and `capi` is the same for programs in C.

#![warn(missing_docs)]

pub mod autograd;
pub mod bench;
#[cfg(target_pointer_width = "64")]
pub mod capi;
pub mod challenge;
pub mod cli;
pub mod data;
pub mod device;
pub mod eval;
pub mod model;
pub mod ops;
pub mod output;
pub mod picture;
pub mod prompt;
pub mod session;
pub mod tensor;
pub mod train;
pub mod verify;
pub mod volume;
