//! Devices: where memory is and where ops run.
//!
//! A [`Device`] owns the threads and the memory that ops run on. The CPU is always there; the
//! instruction set it uses is chosen once, at run time, because one binary serves machines that
//! differ. CUDA devices are found at run time too. Devices are handles: clones share threads and
//! memory, and may be used from any thread.

mod buffer;
pub mod cpu;
pub mod cuda;
mod disjoint;
mod dtype;
mod isa;
pub mod profile;
pub(crate) mod simd;

pub use buffer::Buffer;
pub use cpu::Cpu;
pub use cuda::{Cuda, CudaError};
pub(crate) use disjoint::{DisjointWriter, ReadOnly};
pub use dtype::{DType, Precision};
pub use isa::{Isa, Level};
pub(crate) use isa::{enable, levels};

/// The number of threads that can run at once on this machine, or in the share of it that this
/// process may use; 1 if that is unknown.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// A place that executes ops.
#[derive(Clone, Debug)]
pub enum Device {
    /// Host threads.
    Cpu(Cpu),
    /// A GPU, or its emulator.
    Cuda(Cuda),
}

impl From<Cuda> for Device {
    fn from(cuda: Cuda) -> Device {
        Device::Cuda(cuda)
    }
}

/// Why a device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The name is not one this build knows.
    #[error("unknown device '{0}': this build has {KNOWN}")]
    Unknown(String),
    /// A CUDA device does not open.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The CPU cannot multiply in this precision; the text is the end of the message.
    #[error("the CPU computes in f32 or, with AVX512-BF16, in bf16; not in {0}{1}")]
    Precision(Precision, &'static str),
    /// There is no such instruction set, or this processor does not have it. The name comes from a
    /// caller or from the environment variable `PRISM_ISA`.
    #[error(
        "instruction set '{asked}': {problem} (PRISM_ISA must be one of {known}; best on this processor: {best})",
        known = Isa::names()
    )]
    Isa {
        /// The name asked for.
        asked: String,
        /// What is wrong with the name.
        problem: &'static str,
        /// The best instruction set of this processor.
        best: Isa,
    },
    /// The operating system refused the threads.
    #[error("cannot start {threads} threads: {source}")]
    Threads {
        /// The number of threads asked for.
        threads: usize,
        /// The thread pool's own error.
        source: rayon::ThreadPoolBuildError,
    },
}

/// The names of devices.
#[cfg(feature = "emulator")]
const KNOWN: &str = "'cpu', 'cuda' or 'cuda:N', and 'emulated' or 'emulated:SEED'";
/// The names of devices.
#[cfg(not(feature = "emulator"))]
const KNOWN: &str = "'cpu' and 'cuda' or 'cuda:N'";

impl Device {
    /// Opens the device called `name` with `threads` host threads (0: one per available core), in
    /// float32. More threads than [`processors`] are never made.
    ///
    /// - `cpu`: the CPU, with its best instruction set or the one that `PRISM_ISA` names.
    /// - `cuda` or `cuda:N`: GPU number N, 0 by default.
    /// - `emulated` or `emulated:SEED`, with the feature `emulator`: the CUDA kernels on host
    ///   threads, every memory access checked, the threads of a block in an order that the seed
    ///   decides.
    ///
    /// ```
    /// use prism::Device;
    ///
    /// let device = Device::open("cpu", 2)?;
    /// println!("{}", device.describe()); // such as "cpu, 2 threads, avx512"
    /// # Ok::<(), prism::DeviceError>(())
    /// ```
    ///
    /// # Errors
    /// There is no such device, it cannot be opened, or `PRISM_ISA` names an instruction set that
    /// the processor lacks.
    pub fn open(name: &str, threads: usize) -> Result<Device, DeviceError> {
        Device::open_as(name, threads, Precision::F32)
    }

    /// Opens a device as [`Device::open`] does, in a given precision.
    ///
    /// A CUDA device keeps and multiplies maps in it. On the CPU, maps are always float32, and only
    /// their products are taken in it.
    ///
    /// # Errors
    /// Those of [`Device::open`]; the CPU has no [`Precision::F16`] and no [`Precision::Tf32`], and
    /// [`Precision::Bf16`] only with AVX512-BF16.
    pub fn open_as(
        name: &str,
        threads: usize,
        precision: impl Into<Precision>,
    ) -> Result<Device, DeviceError> {
        let precision: Precision = precision.into();
        let unknown = || DeviceError::Unknown(name.to_string());
        let (kind, number) = name.split_once(':').unwrap_or((name, "0"));
        let number: u64 = number.parse().map_err(|_| unknown())?;
        let threads = threads.min(processors());
        match kind {
            "cpu" if name == "cpu" => match precision {
                Precision::F32 | Precision::Ieee => Ok(Device::Cpu(Cpu::new(threads)?)),
                Precision::Bf16 => match Cpu::new(threads)?.in_bf16() {
                    Some(cpu) => Ok(Device::Cpu(cpu)),
                    None => Err(DeviceError::Precision(
                        precision,
                        ": this processor, or the instruction set named by PRISM_ISA, does not support it",
                    )),
                },
                other => Err(DeviceError::Precision(other, "")),
            },
            "cuda" => {
                Ok(Device::Cuda(Cuda::driver(number as usize, Cpu::new(threads)?, precision)?))
            }
            #[cfg(feature = "emulator")]
            "emulated" => Ok(Device::Cuda(Cuda::emulated(Cpu::new(threads)?, precision, number))),
            _ => Err(unknown()),
        }
    }

    /// The CPU, or the host's side of a CUDA device.
    pub fn cpu(&self) -> &Cpu {
        match self {
            Device::Cpu(cpu) => cpu,
            Device::Cuda(cuda) => cuda.cpu(),
        }
    }

    /// Whether this is the emulator of CUDA, whose times are not those of any GPU.
    pub fn is_emulated(&self) -> bool {
        matches!(self, Device::Cuda(cuda) if cuda.is_emulated())
    }

    /// The precision in which maps are multiplied; [`Device::precision`] is the type in which they
    /// are kept.
    pub fn products(&self) -> Precision {
        match self {
            Device::Cpu(cpu) => cpu.precision().into(),
            Device::Cuda(cuda) => cuda.products(),
        }
    }

    /// Whether maps are kept (on a CUDA device) or products taken (on the CPU) in 16 bits.
    pub fn is_half(&self) -> bool {
        self.precision() != DType::F32
    }

    /// This device as training uses it: a CPU with products in float32, a CUDA device as it is.
    pub fn for_training(&self) -> Device {
        match self {
            Device::Cpu(cpu) => Device::Cpu(cpu.clone().in_f32()),
            Device::Cuda(_) => self.clone(),
        }
    }

    /// The type in which a CUDA device keeps maps, or in which the CPU takes products.
    pub fn precision(&self) -> DType {
        match self {
            Device::Cpu(cpu) => cpu.precision(),
            Device::Cuda(cuda) => cuda.precision(),
        }
    }

    /// Facts about the device as pairs of name and value, for people; the names differ between
    /// kinds of devices.
    pub fn details(&self) -> Vec<(&'static str, String)> {
        match self {
            Device::Cpu(cpu) => vec![
                ("threads", cpu.threads().to_string()),
                ("instructions", format!("{} (this processor's best: {})", cpu.isa(), Isa::best())),
                ("maps", DType::F32.to_string()),
                ("products", cpu.precision().to_string()),
            ],
            Device::Cuda(cuda) => cuda.details(),
        }
    }

    /// A line that describes the device for people, for example `cpu, 2 threads, avx512`.
    pub fn describe(&self) -> String {
        match self {
            Device::Cpu(cpu) => {
                let products = if cpu.precision() == DType::F32 { "" } else { ", bf16" };
                format!("cpu, {} threads, {}{products}", cpu.threads(), cpu.isa())
            }
            Device::Cuda(cuda) => cuda.describe(),
        }
    }
}
