//! Errors about files of voxels.

use crate::memory::Refused;
use std::path::{Path, PathBuf};

/// Why a file of voxels cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {message}")]
pub struct VolumeError {
    /// The file, by the name under which it was given.
    pub path: PathBuf,
    /// What was found and what was expected.
    pub message: String,
    /// Whether the reason is lack of memory.
    pub(crate) refused: bool,
}

impl VolumeError {
    /// An error about `path`.
    pub fn new(path: &Path, message: impl Into<String>) -> VolumeError {
        VolumeError { path: path.into(), message: message.into(), refused: false }
    }

    /// The file asks for more memory than there is.
    pub(crate) fn refused(path: &Path, error: Refused) -> VolumeError {
        VolumeError { refused: true, ..VolumeError::new(path, error.to_string()) }
    }
}
