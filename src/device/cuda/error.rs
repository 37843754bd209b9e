//! What goes wrong on a CUDA device.

use cudarc::driver::result::DriverError;

/// Why something failed on a CUDA device.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CudaError {
    /// There is no such device, or a library that it needs (the driver, NVRTC, NCCL) is not there.
    #[error("no CUDA device: {0}")]
    Unavailable(String),
    /// An allocation was refused because there is not enough device memory.
    #[error("out of device memory: {asked} bytes were requested, {free} of {total} are free")]
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
        /// The GPU architecture, such as `sm_90a`.
        arch: String,
        /// The compiler's messages.
        log: String,
    },
    /// A launch, a copy or another call failed, or was refused because of its arguments.
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
