//! What goes wrong on a CUDA device.

use cudarc::driver::result::DriverError;

/// What went wrong on a CUDA device.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CudaError {
    /// This machine or this build cannot run CUDA at all.
    #[error("no CUDA device: {0}")]
    Unavailable(String),
    /// An allocation was refused.
    #[error("out of device memory: asked for {asked} bytes, {free} of {total} are free")]
    Memory {
        /// Bytes asked for.
        asked: usize,
        /// Bytes free.
        free: usize,
        /// Bytes of the device.
        total: usize,
    },
    /// A kernel could not be compiled.
    #[error("kernels/{file} does not compile for {arch}: {log}")]
    Compile {
        /// The kernel file.
        file: String,
        /// The architecture, as `sm_90a`.
        arch: String,
        /// What the compiler said.
        log: String,
    },
    /// A launch or copy failed.
    #[error("{0}")]
    Launch(String),
}

/// Makes the error for something that the driver refused: what it was, and the driver's text.
pub(super) fn failed(what: &str) -> impl Fn(DriverError) -> CudaError + '_ {
    move |e| CudaError::Launch(format!("{what}: {}", text(&e)))
}

/// The driver's text of an error, or its name.
pub(super) fn text(e: &DriverError) -> String {
    e.error_string().map_or_else(|_| format!("{:?}", e.0), |s| s.to_string_lossy().into_owned())
}
