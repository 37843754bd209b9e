//! Where memory and work live.
//!
//! A [`Device`] owns the threads and the buffers that ops run on. The CPU is always there; the instruction set it uses is
//! chosen once, at run time, because one binary serves machines that differ.

mod buffer;
pub mod cpu;
pub mod simd;

pub use buffer::Buffer;
pub use cpu::{Cpu, Isa};

/// A place that executes ops.
#[derive(Clone, Debug)]
pub enum Device {
    /// Host threads.
    Cpu(Cpu),
}

/// Why a device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The name is not one this build knows.
    #[error("unknown device '{0}': this build has 'cpu'")]
    Unknown(String),
    /// An environment variable or argument asks for instructions this processor lacks.
    #[error("PRISM_ISA={asked}: {problem} (one of avx512, avx2, portable; best here: {best})")]
    Isa {
        /// The value found.
        asked: String,
        /// What is wrong with it.
        problem: &'static str,
        /// The best instruction set of this processor.
        best: Isa,
    },
    /// The operating system refused the threads.
    #[error("cannot start {threads} threads: {source}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// The thread pool's own error.
        source: rayon::ThreadPoolBuildError,
    },
}

impl Device {
    /// Opens the device called `name` with `threads` host threads (0: one per available core).
    pub fn open(name: &str, threads: usize) -> Result<Device, DeviceError> {
        match name {
            "cpu" => Ok(Device::Cpu(Cpu::new(threads)?)),
            other => Err(DeviceError::Unknown(other.to_string())),
        }
    }

    /// The CPU behind this device.
    pub fn cpu(&self) -> &Cpu {
        match self {
            Device::Cpu(cpu) => cpu,
        }
    }

    /// A line that tells a person what this is, for example `cpu, 2 threads, avx512`.
    pub fn describe(&self) -> String {
        match self {
            Device::Cpu(cpu) => format!("cpu, {} threads, {}", cpu.threads(), cpu.isa()),
        }
    }
}
