//! Challenges of interactive segmentation: their own input files, answered the way their containers
//! are run.
//!
//! [`cvpr`] is the CVPR 2025 challenge (a NumPy archive with boxes and clicks a class), [`autopet`]
//! is autoPET V (MetaImage files and a list of clicks). Below them lie the formats: [`npz`] and
//! [`npy`] for NumPy's files, [`pickle`] for the objects in them; MetaImage is
//! [`crate::volume::metaimage`]. Nothing in a file is run, and no size that a file states is
//! believed before it was compared with what is there.

pub mod autopet;
pub mod cvpr;
pub mod npy;
pub mod npz;
pub mod pickle;

use std::path::PathBuf;

/// What came of a case.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The file that was written.
    pub output: PathBuf,
    /// Objects that were asked for.
    pub objects: usize,
    /// Voxels that lie on any of them.
    pub voxels: usize,
    /// What the scan was taken for, and how it was normalised.
    pub scan: String,
    /// What was odd about the case and how it was understood.
    pub warnings: Vec<String>,
}
