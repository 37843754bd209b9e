//! Errors about files of voxels.

use std::path::{Path, PathBuf};

/// What is wrong with a file, or with what was asked of it.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {message}")]
pub struct VolumeError {
    /// The file.
    pub path: PathBuf,
    /// What was found and what was expected.
    pub message: String,
}

impl VolumeError {
    /// An error about `path`.
    pub fn new(path: &Path, message: impl Into<String>) -> VolumeError {
        VolumeError { path: path.into(), message: message.into() }
    }
}
