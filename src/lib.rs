//! Interactive segmentation of tumours in 3D scans: click, box, scribble, correct, done.
//!
//! prism runs the PRISM network ([Li et al., MICCAI 2024](https://arxiv.org/abs/2404.15028)) on an
//! engine of its own, on the CPU or on an NVIDIA GPU. A [`Session`] turns a user's prompts for one
//! object into a mask on the scan's own grid. Whatever the network answers, the mask
//! [obeys every click](session#the-contract). prism is research software, not a medical device.
//!
//! The package is called `prism-seg`, the library in it `prism`. This program segments a tumour
//! from a click, and corrects the mask with another:
//!
//! ```no_run
//! use prism::{Device, Model, Options, Prompts, RawPoint, Scan, Session, Space, Volume, Weights};
//! use prism::{session::normalization, volume::write_mask};
//! use std::{path::Path, sync::Arc};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::open("cpu", 0)?; // or "cuda"; 0: a thread per processor
//! let weights = Weights::open(Path::new("model.safetensors"))?;
//! let model = Arc::new(Model::new(&device, &weights)?);
//!
//! let image = Arc::new(Volume::read(Path::new("scan.nii.gz"), None)?);
//! // How the scan's values become the network's input: it depends on the model and the modality.
//! let normalization = normalization(&*image, model.config().intensity);
//! let scan = Arc::new(Scan::new(&model, image.clone(), normalization, Options::default()));
//! let mut session = Session::new(&scan);
//!
//! // Voxel (120, 90, 30) is on the tumour.
//! let mut first = Prompts::default();
//! let click = RawPoint { position: [120.0, 90.0, 30.0], positive: true };
//! first.add_point(&image.grid, click, Space::Ijk)?;
//! session.interact(&first)?;
//!
//! // Look at `session.mask()`. The tumour does not reach to voxel (131, 95, 30).
//! let mut correction = Prompts::default();
//! let click = RawPoint { position: [131.0, 95.0, 30.0], positive: false };
//! correction.add_point(&image.grid, click, Space::Ijk)?;
//! session.interact(&correction)?;
//!
//! let mask = session.mask(); // a byte per voxel of the scan: 1 on the tumour
//! write_mask(Path::new("mask.nii.gz"), &image, &mask)?.commit()?;
//! # Ok(())
//! # }
//! ```
//!
//! Models are files that `prism train` and `prism convert` write ([`model::weights`]). The
//! project's repository contains a small one, `models/small.safetensors`.
//!
//! Only the names at the crate's root are stable: the contents of a module may change with any
//! version.
//!
//! # Modules
//!
//! | module | contents |
//! |---|---|
//! | [`session`] | one object on a scan: interactions, corrections, undo |
//! | [`prompt`] | clicks, boxes, scribbles, outlines and masks; simulated users |
//! | [`volume`] | scans and masks: file formats, geometry, resampling, intensities |
//! | [`model`] | the network: configuration, model files, checkpoints, inference |
//! | [`memory`] | the memory budget |
//! | `capi` | the C interface, on targets of 64 bits |
//! | [`device`], [`tensor`] | CPU threads and CUDA devices; dense tensors on them |
//! | [`ops`], [`autograd`] | the network's fused operations, and their gradients |
//! | [`data`], [`train`], [`eval`] | datasets, training, metrics and evaluation protocols |
//! | [`mod@bench`], [`verify`] | benchmarks; checks against the reference network's outputs |
//! | [`challenge`] | input and output files of segmentation challenges |
//! | [`input`], [`output`], [`checksum`], [`chart`] | reading and writing files safely |
//! | `cli`, `serve`, `preview`, `picture` | the program, its server, its pictures |
//!
//! # Conventions
//!
//! A voxel is `[i, j, k]`, counted from 0 along the axes of the scan's file. Arrays of voxels have
//! k fastest, written `[i][j][k]`: on a grid of `[ni, nj, nk]` voxels the index of `[i, j, k]` is
//! `(i * nj + j) * nk + k`. A box `[i0, j0, k0, i1, j1, k1]` ends before i1, j1 and k1. Lengths are
//! in millimetres, and world coordinates in RAS, unless [`Space`] says otherwise.
//!
//! # Threads
//!
//! A [`Device`] owns the threads that compute, and everything that runs on it shares them. A
//! `Device`, [`Model`], [`Volume`] or [`Scan`] may be used by any number of threads at once. A
//! [`Session`] is changed by one thread at a time, and may move between threads. The same input,
//! device and build give the same bits, whatever the number of threads.
//!
//! # Errors and memory
//!
//! Errors name the file, argument or voxel, and what was expected. A session that returns an error
//! is as it was before the call.
//!
//! Memory for scans, weights and answers is counted against a budget ([`memory::set_limit`]), and
//! may be refused. Most functions that return a `Result` return the refusal as an error. From
//! others, such as [`Session::mask`], it unwinds as a panic does, but without a message;
//! [`memory::caught`] turns that into an error. It needs `panic = "unwind"`, the default.
//!
//! # Features
//!
//! | feature | by default | contents |
//! |---|---|---|
//! | `cli` | yes | the program: the modules `cli`, `picture` and `preview` |
//! | `serve` | yes | its server, with `cli`: the module `serve` |
//! | `dicom` | yes | [`Volume::read`] reads DICOM series too: the module `volume::dicom` |
//! | `model` | no | the small model built into the program, with `cli` |
//! | `emulator` | no | the CUDA kernels on host threads, for tests: Linux and a C++ compiler |
//!
//! A program that uses only the library depends on it with `default-features = false`, and adds
//! `dicom` if it reads DICOM.

#![warn(missing_docs)]

pub mod autograd;
pub mod bench;
#[cfg(target_pointer_width = "64")]
pub mod capi;
pub mod challenge;
pub mod chart;
pub mod checksum;
#[cfg(feature = "cli")]
pub mod cli;
pub mod data;
pub mod device;
pub mod eval;
pub mod input;
pub mod memory;
pub(crate) mod message;
pub(crate) mod microkernel;
pub mod model;
pub mod ops;
pub mod output;
#[cfg(feature = "cli")]
pub mod picture;
#[cfg(feature = "cli")]
pub mod preview;
pub mod prompt;
#[cfg(feature = "serve")]
pub mod serve;
pub mod session;
pub(crate) mod sync;
pub mod tensor;
pub mod train;
pub mod verify;
pub mod volume;

pub use device::{Device, DeviceError};
pub use model::{Model, Weights, WeightsError};
pub use prompt::{PromptError, Prompts, RawPoint, Space};
pub use session::{Options, Prediction, Scan, Session, SessionError};
pub use tensor::OpError;
pub use volume::intensity::Normalization;
pub use volume::{Volume, VolumeError};
