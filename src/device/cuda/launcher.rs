//! Launches, and the interface to the devices that run them.

use super::CudaError;
use super::source::Kernel;
use super::tune::Choice;
use std::ffi::c_void;
use std::sync::Arc;
#[cfg(feature = "emulator")]
use std::sync::atomic::AtomicU64;

/// The geometry of a kernel's launch, and the least work that it has to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Launch {
    /// Blocks along x, y and z.
    pub grid: [usize; 3],
    /// Threads of a block, along x.
    pub threads: usize,
    /// Bytes of shared memory of a block.
    pub shared: usize,
    /// The least work that the launch has to do.
    pub cost: KernelCost,
}

/// The work that no implementation of a kernel can avoid, from which its least time follows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KernelCost {
    /// Floating-point operations, a multiply-add counting as two.
    pub flops: f64,
    /// Bytes of device memory: each input read once, each output written once.
    pub bytes: f64,
}

impl Launch {
    /// A launch of one thread per value, in blocks of 256.
    pub fn per_element(count: usize) -> Launch {
        Launch {
            grid: [count.div_ceil(256), 1, 1],
            threads: 256,
            shared: 0,
            cost: KernelCost::default(),
        }
    }

    /// A launch of one thread per 16 bytes of values, or per value.
    ///
    /// Elements have `bytes` bytes, 2 or 4. A thread has 16 bytes of values if both `count`, the
    /// number of values, and `period`, the number of values after which a shorter operand repeats,
    /// are divisible by their number. The kernels that are launched this way decide in the same
    /// way.
    pub fn per_vector(bytes: usize, count: usize, period: usize) -> Launch {
        let lanes = 16 / bytes;
        let whole = count.is_multiple_of(lanes) && period.is_multiple_of(lanes);
        Launch::per_element(if whole { count / lanes } else { count })
    }

    /// This launch for each of several maps: their number is that of blocks along y, of which a
    /// launch has 65,535 at most.
    pub fn for_each(self, maps: usize) -> Launch {
        Launch { grid: [self.grid[0], maps, 1], ..self }
    }

    /// This launch with its work set: floating-point operations, and bytes to read and to write.
    pub fn with_cost(self, flops: usize, bytes: usize) -> Launch {
        Launch { cost: KernelCost { flops: flops as f64, bytes: bytes as f64 }, ..self }
    }
}

/// The most that a launch may ask a device for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Blocks along x, y and z.
    pub(super) grid: [usize; 3],
    /// Threads of a block.
    pub(super) threads: usize,
    /// Bytes of shared memory of a block.
    pub(super) shared: usize,
}

impl Limits {
    pub(super) fn check(&self, kernel: &str, launch: Launch) -> Result<(), CudaError> {
        let fail = |text: String| Err(CudaError::Launch(format!("kernel {kernel}: {text}")));
        let Launch { grid, threads, shared, .. } = launch;
        if grid.iter().zip(self.grid).any(|(blocks, most)| *blocks > most) {
            return fail(format!("{grid:?} blocks; the device takes at most {:?}", self.grid));
        }
        if threads == 0 || threads > self.threads {
            return fail(format!(
                "{threads} threads per block; the device takes at most {}",
                self.threads
            ));
        }
        if shared > self.shared {
            return fail(format!(
                "{shared} bytes of shared memory per block; the device has {}",
                self.shared
            ));
        }
        Ok(())
    }
}

/// A launch as [`Cuda::launches`](super::Cuda::launches) saw it.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelRecord {
    /// The name of the kernel, or `copy`.
    pub kernel: String,
    /// The launch's geometry and work.
    pub launch: Launch,
    /// The time that the device took, if it was timed; copies are not.
    pub seconds: Option<f64>,
    /// The choice between variants that it belongs to, if they are tried.
    pub choice: Option<Arc<Choice>>,
}

/// The interface to a CUDA device. Everything happens in the order of the calls, except in the
/// branches of recorded work. [`Launcher::download`] waits for all of it, [`Launcher::upload`] only
/// if it has to ([`Launcher::waits`]).
pub(super) trait Launcher: Send + Sync {
    /// Whether it runs on host threads, where times mean nothing.
    fn is_emulated(&self) -> bool {
        false
    }
    /// Bytes of the device's own memory, if it has some and they are known.
    fn total_memory(&self) -> Option<u64> {
        None
    }
    /// Bytes of it that are free, without those that were freed and are kept for later use.
    fn free_memory(&self) -> Option<u64> {
        None
    }
    fn allocate(&self, bytes: usize) -> Result<u64, CudaError>;
    fn free(&self, address: u64);
    /// Copies `bytes` bytes to the device, after `write` has written them to the memory that the
    /// copy starts from.
    fn upload(
        &self,
        address: u64,
        bytes: usize,
        write: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), CudaError>;
    /// How often a copy to the device had to wait for work launched before an earlier copy: see
    /// [`super::staging`].
    fn waits(&self) -> u64;
    fn download(&self, address: u64, bytes: &mut [u8]) -> Result<(), CudaError>;
    /// Copies `bytes` bytes from the device; `read` reads them in the memory where the copy
    /// arrives.
    fn download_read(
        &self,
        address: u64,
        bytes: usize,
        read: &mut dyn FnMut(&[u8]),
    ) -> Result<(), CudaError> {
        let mut values = vec![0; bytes];
        self.download(address, &mut values)?;
        read(&values);
        Ok(())
    }
    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), CudaError>;
    fn clear(&self, address: u64, bytes: usize) -> Result<(), CudaError>;
    /// Launches a kernel; each of `arguments` points to the eight bytes of a parameter.
    fn launch(
        &self,
        kernel: &'static Kernel,
        launch: Launch,
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError>;
    fn synchronize(&self) -> Result<(), CudaError>;
    fn describe(&self) -> String;
    fn limits(&self) -> Limits;
    /// Facts about the device, by name.
    fn details(&self) -> Vec<(&'static str, String)>;
    /// The time in seconds that the device works on what `work` launches.
    fn seconds(&self, work: &mut dyn FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError>;
    /// Makes a kernel ready to be launched; an error unless it was built with the parameters that
    /// its source declares, as far as that is known.
    fn prepare(&self, kernel: &'static Kernel) -> Result<(), CudaError>;
    /// From here on launches, copies and clearings are recorded instead of done; anything else
    /// fails.
    fn begin_recording(&self) -> Result<(), CudaError>;
    /// Whether recorded work may have branches.
    fn has_branches(&self) -> bool {
        true
    }
    /// Whether the token path's ops have launches of their own
    /// ([`Cuda::fuses_tokens`](super::Cuda::fuses_tokens)).
    fn fuses_tokens(&self) -> bool {
        true
    }
    /// Whether it has the instruction `wgmma`.
    fn has_wgmma(&self) -> bool {
        false
    }
    /// Whether `wgmma` was asked for.
    fn wants_wgmma(&self) -> bool {
        false
    }
    /// Loses the device after that many launches ([`Cuda::lose_after`](super::Cuda::lose_after)). A
    /// GPU takes no notice.
    #[cfg(feature = "emulator")]
    fn lose_after(&self, _launches: u64) -> u64 {
        u64::MAX
    }
    /// Has the emulator join groups ([`Cuda::pretend_groups`](super::Cuda::pretend_groups)). A GPU
    /// takes no notice.
    #[cfg(feature = "emulator")]
    fn pretend_groups(&self) -> Arc<AtomicU64> {
        Arc::default()
    }
    /// Whether a training's work is recorded
    /// ([`Cuda::records_training`](super::Cuda::records_training)).
    fn records_training(&self) -> bool {
        false
    }
    /// What is recorded from here on goes into a branch, after what was recorded before.
    fn fork(&self) -> Result<(), CudaError>;
    /// What is recorded from here on belongs to the main line again, in parallel with the branch.
    fn leave_branch(&self) -> Result<(), CudaError>;
    /// What is recorded from here on waits for the branch too.
    fn join(&self) -> Result<(), CudaError>;
    /// Ends a recording; returns its number.
    fn end_recording(&self) -> Result<u64, CudaError>;
    /// Ends a recording and discards it.
    fn abandon_recording(&self);
    fn replay(&self, graph: u64) -> Result<(), CudaError>;
    fn forget(&self, graph: u64);
    /// Whether the device can join a group of GPUs ([`Cuda::has_groups`](super::Cuda::has_groups)).
    fn has_groups(&self, _needed: bool) -> bool {
        false
    }
    fn group_id(&self) -> Result<Vec<u8>, CudaError> {
        Err(no_groups())
    }
    fn join_group(&self, _id: &[u8], _rank: usize, _world: usize) -> Result<(), CudaError> {
        Err(no_groups())
    }
    fn sum_over_group(&self, _arrays: &[(u64, usize)]) -> Result<(), CudaError> {
        Err(no_groups())
    }
    fn finish_group_sums(&self) -> Result<(), CudaError> {
        Err(no_groups())
    }
    fn leave_group(&self) {}
}

pub(super) fn no_groups() -> CudaError {
    CudaError::Unavailable("only GPUs form groups".into())
}
