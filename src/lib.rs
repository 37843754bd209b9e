//! prism segments tumours in 3D scans interactively: click, box, scribble, correct, done.
//!
//! It runs the PRISM network (Li et al., MICCAI 2024) on an engine of its own. A program uses it
//! from the top down:
//!
//! ```no_run
//! use prism::{Device, Model, Normalization, Options, Prompts, RawPoint};
//! use prism::{Scan, Session, Space, Volume, Weights};
//! use std::{path::Path, sync::Arc};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::open("cpu", 0)?;
//! let weights = Weights::open(Path::new("model.safetensors"))?;
//! let model = Arc::new(Model::new(&device, &weights)?);
//! let image = Arc::new(Volume::read(Path::new("scan.nii.gz"), None)?);
//!
//! let normalization = Normalization::of_percentiles(&*image);
//! let scan = Arc::new(Scan::new(&model, image.clone(), normalization, Options::default()));
//! let mut session = Session::new(&scan);
//!
//! let mut prompts = Prompts::default();
//! let point = RawPoint { position: [120.0, 90.0, 30.0], positive: true };
//! prompts.add_point(&image.grid, point, Space::Ijk)?;
//! session.interact(&prompts)?;
//! let mask = session.mask(); // on the scan's own grid
//! // Look at it, click where it is wrong, and so on: the click holds, and what it says nothing of
//! // stays.
//! let mut correction = Prompts::default();
//! let point = RawPoint { position: [131.0, 95.0, 30.0], positive: false };
//! correction.add_point(&image.grid, point, Space::Ijk)?;
//! session.interact(&correction)?;
//! # Ok(())
//! # }
//! ```
//!
//! These names are at the root, with their errors; everything else is in its module. Only the
//! root's names are stable: the other contents of a module may change with any version.
//!
//! [`session`] says what a session promises. [`volume`] reads scans and writes masks, [`prompt`]
//! takes the user's prompts, [`model`] is the network. Below that, [`ops`] holds the fused
//! operations, [`autograd`] their gradients, [`tensor`] and [`device`] what they run on. [`train`],
//! [`eval`] and [`data`] train and evaluate networks, [`verify`] checks an installation against the
//! reference network's outputs, [`mod@bench`] measures, [`challenge`] answers challenges' files,
//! and `capi` is the same for programs in C (on targets of 64 bits). `tests/house.rs` lists, and
//! checks, which module builds on which.
//!
//! # Features
//!
//! | feature | by default | |
//! |---|---|---|
//! | `cli` | yes | the program: the modules `cli`, `picture` and `preview` |
//! | `serve` | yes | its server, with `cli`: the module `serve` |
//! | `dicom` | yes | [`Volume::read`] reads DICOM series too: the module `volume::dicom` |
//! | `model` | no | the small model built into the program, with `cli` |
//! | `emulator` | no | the CUDA kernels on host threads, for tests: Linux and a C++ compiler |

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
