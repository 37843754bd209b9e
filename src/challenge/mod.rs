//! Challenges of interactive segmentation: reads their input files, and writes their output files
//! as their containers do.
//!
//! [`cvpr`] is the CVPR 2025 challenge (a NumPy archive with boxes and clicks for each class),
//! [`autopet`] is autoPET V (MetaImage files and a list of clicks). Below them are the formats:
//! [`npz`] and [`npy`] for NumPy's files, [`pickle`] for the objects in them; MetaImage is
//! [`crate::volume::metaimage`]. Nothing in a file is executed, and no size that a file states is
//! believed before it was compared with the actual data.

pub mod autopet;
pub mod cvpr;
pub mod npy;
pub mod npz;
pub mod pickle;

use std::path::PathBuf;

/// The result of a case.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The file that was written.
    pub output: PathBuf,
    /// The number of objects asked for.
    pub objects: usize,
    /// The number of voxels on any of them.
    pub voxels: usize,
    /// What kind of scan it was taken to be, and how it was normalised.
    pub scan: String,
    /// What was odd about the case and how it was interpreted.
    pub warnings: Vec<String>,
}
