//! CUDA devices: their memory, transfers, launches of kernels, and recordings of these.
//!
//! [`Cuda`] is what ops see. What it is asked to do is done in the order of the calls, in one
//! stream per device, and calls return before it is done unless they say that they wait. Behind it
//! is a `Launcher`: the driver of a GPU, or the emulator, which runs the same kernels on host
//! threads. Nothing else in the crate calls either.
//!
//! Methods fail with [`CudaError::Launch`] if they are given memory of another device, or if the
//! driver refuses. A GPU may report a failure of earlier work in any later call.

mod args;
mod cache;
mod chain;
mod code;
mod driver;
#[cfg(feature = "emulator")]
mod emulator;
mod error;
mod group;
mod idle;
mod launcher;
mod memory;
pub mod nvrtc;
mod pinned;
mod record;
pub mod source;
mod staging;
mod stream;
mod switch;
mod tune;
mod weight_cache;

pub use super::dtype::{DType, Precision};
pub(crate) use args::Pointer;
pub use error::CudaError;
pub use launcher::{KernelCost, KernelRecord, Launch};
pub use memory::Memory;
pub(crate) use record::Layouts;
pub use record::{Arena, Fork, Graph, Placed};
pub(crate) use source::{Family, TypedKernel, kernels};
pub use tune::Choice;
pub(crate) use tune::Chosen;
pub(crate) use weight_cache::DeviceCache;

use super::Cpu;
use args::Arguments;
use launcher::{Launcher, Limits};
use source::Kernel;
use std::ffi::c_void;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tune::Tuned;

struct Inner {
    launcher: Box<dyn Launcher>,
    limits: Limits,
    cpu: Cpu,
    precision: Precision,
    tuned: Tuned,
    id: u64,
    uploads: AtomicU64,
    downloads: AtomicU64,
    /// Bytes copied to the device and back.
    carried: [AtomicU64; 2],
    /// Bytes allocated, and the most at any time.
    held: [AtomicU64; 2],
    /// Whether launches multiply by `wgmma` ([`Cuda::uses_wgmma`]).
    wgmma: AtomicBool,
    /// The number of the copy from the device, from now on, that is to fail, for tests; 0 for none.
    #[cfg(feature = "emulator")]
    failing: AtomicU64,
    /// The most bytes that may be allocated, for tests; [`u64::MAX`] for no limit.
    #[cfg(feature = "emulator")]
    most: AtomicU64,
    /// Held by a thread that records, so that no work of another thread in the device's stream gets
    /// into the recording.
    stream: Mutex<()>,
}

/// A CUDA device, with the [`Precision`] in which it keeps and multiplies maps.
///
/// Clones share the device and may be used from any thread. While a thread records
/// ([`Cuda::record`]) or times work, other threads' work waits.
#[derive(Clone)]
pub struct Cuda(Arc<Inner>);

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.describe())
    }
}

static NEXT: AtomicU64 = AtomicU64::new(1);

impl Cuda {
    fn new(
        launcher: Box<dyn Launcher>,
        cpu: Cpu,
        precision: impl Into<Precision>,
        tuned: Tuned,
    ) -> Cuda {
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let (uploads, downloads) = (AtomicU64::new(0), AtomicU64::new(0));
        Cuda(Arc::new(Inner {
            limits: launcher.limits(),
            wgmma: AtomicBool::new(launcher.has_wgmma() && launcher.wants_wgmma()),
            launcher,
            cpu,
            precision: precision.into(),
            tuned,
            id,
            uploads,
            downloads,
            carried: Default::default(),
            held: Default::default(),
            #[cfg(feature = "emulator")]
            failing: AtomicU64::new(0),
            #[cfg(feature = "emulator")]
            most: AtomicU64::new(u64::MAX),
            stream: Mutex::new(()),
        }))
    }

    /// Opens GPU number `index`, with `cpu` for the host's part of the work.
    ///
    /// # Errors
    /// [`CudaError::Unavailable`] if there is no driver or no such GPU.
    pub fn driver(
        index: usize,
        cpu: Cpu,
        precision: impl Into<Precision>,
    ) -> Result<Cuda, CudaError> {
        let driver = driver::Driver::new(index)?;
        let tuned = Tuned::of(&driver.identity())?;
        Ok(Cuda::new(Box::new(driver), cpu, precision, tuned))
    }

    /// The emulator: the same kernels on host threads, every memory access checked.
    ///
    /// The seed decides the order in which the threads of a block run; 0 is the order of their
    /// numbers.
    #[cfg(feature = "emulator")]
    pub fn emulated(cpu: Cpu, precision: impl Into<Precision>, seed: u64) -> Cuda {
        let emulator = emulator::Emulator::new(cpu.clone(), seed);
        Cuda::new(Box::new(emulator), cpu, precision, Tuned::none())
    }

    /// The emulator with the table of variants of a folder, and the value of `PRISM_TUNE`: for
    /// tests of tables, which the emulator otherwise does not have.
    #[cfg(feature = "emulator")]
    #[doc(hidden)]
    pub fn emulated_with_table(
        cpu: Cpu,
        precision: impl Into<Precision>,
        folder: &std::path::Path,
        switch: Option<&str>,
    ) -> Result<Cuda, CudaError> {
        let tuned = Tuned::load(Some(folder), "the emulator", switch)?;
        let emulator = emulator::Emulator::new(cpu.clone(), 0);
        Ok(Cuda::new(Box::new(emulator), cpu, precision, tuned))
    }

    /// The emulator, with the kernels of a shared library in place of its own if the library has
    /// them: for tests of what the emulator notices.
    ///
    /// # Safety
    /// The file is a build of `kernels/host/emulator.cpp` with kernels.
    #[cfg(feature = "emulator")]
    #[doc(hidden)]
    pub unsafe fn emulated_over(
        cpu: Cpu,
        precision: impl Into<Precision>,
        seed: u64,
        library: &std::path::Path,
    ) -> Result<Cuda, CudaError> {
        // SAFETY: as promised by the caller.
        let emulator = unsafe { emulator::Emulator::new(cpu.clone(), seed).with_library(library)? };
        Ok(Cuda::new(Box::new(emulator), cpu, precision, Tuned::none()))
    }

    /// Lets copy number `nth` from the device fail, counted from the next as 1; 0 for none. For
    /// tests of how that is handled.
    #[cfg(feature = "emulator")]
    #[doc(hidden)]
    pub fn fail_download(&self, nth: u64) {
        self.0.failing.store(nth, Ordering::Relaxed);
    }

    /// Lets the device have so many bytes of memory, [`u64::MAX`] for as many as it has: what goes
    /// beyond is refused, as on a GPU that is full. For tests of how that is handled.
    #[cfg(feature = "emulator")]
    #[doc(hidden)]
    pub fn limit_memory(&self, bytes: u64) {
        self.0.most.store(bytes, Ordering::Relaxed);
    }

    /// Lets the emulator be lost after so many more launches, [`u64::MAX`] for never: from then on
    /// whatever it is asked for fails, as on a GPU whose context an error has ended. Returns how
    /// many were left until now. For tests of how that is handled.
    #[cfg(feature = "emulator")]
    #[doc(hidden)]
    pub fn lose_after(&self, launches: u64) -> u64 {
        self.0.launcher.lose_after(launches)
    }

    /// Has the emulator join groups, though it adds up nothing in them. Returns the count of how
    /// often it is told to leave one. For tests of how the loss of another process is handled.
    #[cfg(feature = "emulator")]
    #[doc(hidden)]
    pub fn pretend_groups(&self) -> Arc<AtomicU64> {
        self.0.launcher.pretend_groups()
    }

    /// Switches products by `wgmma` on, if the device has it, or off; returns whether they are on.
    /// For tests, which compare both ways: `PRISM_CUDA_WGMMA` decides at first.
    #[cfg(feature = "emulator")]
    #[doc(hidden)]
    pub fn use_wgmma(&self, on: bool) -> bool {
        let on = on && self.0.launcher.has_wgmma();
        self.0.wgmma.store(on, Ordering::Relaxed);
        on
    }

    /// The CPU that does the host's part of the work.
    pub fn cpu(&self) -> &Cpu {
        &self.0.cpu
    }

    /// The type in which maps are kept.
    pub fn precision(&self) -> DType {
        self.0.precision.maps()
    }

    /// The precision in which maps are multiplied.
    pub fn products(&self) -> Precision {
        self.0.precision
    }

    /// A number that no other device of this process has.
    pub(crate) fn id(&self) -> u64 {
        self.0.id
    }

    /// A line that describes the device for people.
    pub fn describe(&self) -> String {
        format!("{}, {}", self.0.launcher.describe(), self.0.precision)
    }

    /// Whether this is the emulator, whose times are not those of any GPU.
    pub fn is_emulated(&self) -> bool {
        self.0.launcher.is_emulated()
    }

    /// Bytes of device memory that this device and its clones have allocated: now, and the most at
    /// any time.
    pub fn held(&self) -> [u64; 2] {
        self.0.held.each_ref().map(|v| v.load(Ordering::Relaxed))
    }

    /// The size of the device's own memory in bytes; none for the emulator, or if it is unknown.
    pub fn total_memory(&self) -> Option<u64> {
        self.0.launcher.total_memory()
    }

    /// Bytes of the device's memory that are free; none for the emulator, unless its memory is
    /// limited, or if that is unknown.
    ///
    /// What was freed stays with the device for later use, and is not among them.
    pub fn free_memory(&self) -> Option<u64> {
        #[cfg(feature = "emulator")]
        {
            let most = self.0.most.load(Ordering::Relaxed);
            if most != u64::MAX {
                return Some(most.saturating_sub(self.held()[1]));
            }
        }
        self.0.launcher.free_memory()
    }

    /// Facts about the device as pairs of name and value, for people.
    pub fn details(&self) -> Vec<(&'static str, String)> {
        let products = match self.products() {
            Precision::F32 => "f32, each of three of tf32",
            Precision::Tf32 => "tf32",
            Precision::Ieee => "f32, in plain arithmetic",
            Precision::F16 => "f16",
            Precision::Bf16 => "bf16",
        };
        let own = vec![
            ("maps", self.precision().to_string()),
            ("products", products.to_string()),
            ("variants", self.chooses_by()),
        ];
        [self.0.launcher.details(), own].concat()
    }

    /// Whether the device can join a group of the GPUs of several processes, which adds up arrays
    /// by NCCL.
    ///
    /// The emulator cannot. A GPU can if the library is present; with `needed` the answer is true
    /// even without it, so that the calls that follow report that it is missing.
    pub fn has_groups(&self, needed: bool) -> bool {
        self.0.launcher.has_groups(needed)
    }

    /// The identifier of a new group of GPUs (NCCL's, 128 bytes): one process makes it and sends it
    /// to the others.
    ///
    /// # Errors
    /// This is the emulator, or NCCL is not there.
    pub fn group_id(&self) -> Result<Vec<u8>, CudaError> {
        self.0.launcher.group_id()
    }

    /// Joins the group `id` as number `rank`, from 0, of `world` processes; waits for all others,
    /// for at most five minutes.
    ///
    /// # Errors
    /// This is the emulator, NCCL is not there or fails, or the others do not come.
    pub fn join_group(&self, id: &[u8], rank: usize, world: usize) -> Result<(), CudaError> {
        self.0.launcher.join_group(id, rank, world)
    }

    /// Begins to add up arrays of float32 over the group, in place, after everything launched so
    /// far and in parallel with later launches.
    ///
    /// All processes must call this with arrays of the same lengths in the same order. The arrays
    /// must be kept and not used until [`Cuda::finish_group_sums`].
    ///
    /// # Errors
    /// The device is in no group, another process of it is lost, or NCCL fails.
    pub fn sum_over_group(&self, arrays: &[Arc<Memory>]) -> Result<(), CudaError> {
        arrays.iter().try_for_each(|memory| self.check_own(memory))?;
        let arrays: Vec<(u64, usize)> = arrays.iter().map(|m| (m.address, m.bytes / 4)).collect();
        let _stream = self.lock_stream();
        self.0.launcher.sum_over_group(&arrays)
    }

    /// Lets what is launched next wait for the sums that were begun; does not wait itself.
    ///
    /// # Errors
    /// This is the emulator, or the driver fails.
    pub fn finish_group_sums(&self) -> Result<(), CudaError> {
        let _stream = self.lock_stream();
        self.0.launcher.finish_group_sums()
    }

    /// Leaves the group at once, from any thread: for when another of its processes is lost. Sums
    /// that wait for that process end with unspecified values, and joining and sums are errors from
    /// here on.
    pub fn leave_group(&self) {
        self.0.launcher.leave_group();
    }

    /// Waits until everything launched has finished.
    ///
    /// # Errors
    /// Earlier work failed, or this thread is recording.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        if record::is_dry_run(self.0.id) {
            return Ok(());
        }
        if record::is_recording(self.0.id) {
            return Err(CudaError::Launch("recorded work cannot wait for the device".into()));
        }
        let _stream = self.lock_stream();
        self.0.launcher.synchronize()
    }

    /// The time in seconds that the device works on what `work` launches, by its own clock. Other
    /// threads wait meanwhile.
    ///
    /// # Errors
    /// Those of `work`; this thread is recording.
    pub fn seconds(
        &self,
        mut work: impl FnMut() -> Result<(), CudaError>,
    ) -> Result<f64, CudaError> {
        if record::is_recording(self.0.id) {
            return Err(CudaError::Launch("recorded work cannot be timed".into()));
        }
        let _stream = self.lock_stream();
        self.0.launcher.seconds(&mut work)
    }

    /// Whether layers and attention of few rows are fused with the ops around them:
    /// `PRISM_CUDA_TOKENS` switches that off.
    pub(crate) fn fuses_tokens(&self) -> bool {
        self.0.launcher.fuses_tokens()
    }

    /// Whether convolutions and dense layers multiply by `wgmma` where they can: only where
    /// `PRISM_CUDA_WGMMA` asks for it, and only on GPUs of compute capability 9.0.
    pub(crate) fn uses_wgmma(&self) -> bool {
        self.0.wgmma.load(Ordering::Relaxed)
    }

    /// Whether training steps are recorded and replayed: `PRISM_CUDA_TRAIN_GRAPHS` switches that
    /// on.
    pub(crate) fn records_training(&self) -> bool {
        self.0.launcher.records_training()
    }

    /// The number of copies from the host to the device, and of copies back.
    pub fn transfers(&self) -> (u64, u64) {
        (self.0.uploads.load(Ordering::Relaxed), self.0.downloads.load(Ordering::Relaxed))
    }

    /// The number of copies to the device that had to wait for work launched before: because the
    /// pinned memory that they start from was in use, or because they were too large for it.
    pub fn waits(&self) -> u64 {
        self.0.launcher.waits()
    }

    /// The number of bytes copied from the host to the device, and of bytes copied back.
    pub fn carried(&self) -> [u64; 2] {
        self.0.carried.each_ref().map(|bytes| bytes.load(Ordering::Relaxed))
    }

    /// Allocates memory for `count` elements, contents unspecified.
    ///
    /// # Errors
    /// [`CudaError::Memory`] if there is not enough.
    pub fn allocate(&self, count: usize, dtype: DType) -> Result<Arc<Memory>, CudaError> {
        let bytes = count.checked_mul(dtype.bytes());
        self.allocate_bytes(bytes.ok_or_else(|| {
            CudaError::Launch(format!("memory for {count} values: more than can be addressed"))
        })?)
    }

    /// Acquires the device's stream for this thread.
    fn lock_stream(&self) -> record::StreamGuard<'_> {
        record::StreamGuard::take(self.0.id, &self.0.stream)
    }

    /// Allocates `bytes` bytes of memory, contents unspecified.
    ///
    /// # Errors
    /// [`CudaError::Memory`] if there is not enough.
    pub fn allocate_bytes(&self, bytes: usize) -> Result<Arc<Memory>, CudaError> {
        if let Some(place) = record::place(self.0.id, bytes) {
            let (address, arena) = place?;
            return Ok(Arc::new(Memory { cuda: self.clone(), address, bytes, arena }));
        }
        #[cfg(feature = "emulator")]
        {
            let (most, [held, _]) = (self.0.most.load(Ordering::Relaxed), self.held());
            let free = most.saturating_sub(held);
            if bytes as u64 > free {
                let [free, total] = [free, most].map(|bytes| bytes as usize);
                return Err(CudaError::Memory { asked: bytes, free, total });
            }
        }
        let stream = self.lock_stream();
        let address = self.0.launcher.allocate(bytes)?;
        drop(stream);
        let now = self.0.held[0].fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        self.0.held[1].fetch_max(now, Ordering::Relaxed);
        record::allocated(self.0.id, address, bytes);
        let memory = Arc::new(Memory { cuda: self.clone(), address, bytes, arena: None });
        record::note_memory(self.0.id, &memory);
        Ok(memory)
    }

    /// An error unless memory is this device's.
    fn check_own(&self, memory: &Memory) -> Result<(), CudaError> {
        match memory.cuda.id() == self.0.id {
            true => Ok(()),
            false => Err(CudaError::Launch(format!(
                "{} has no part in memory of {}",
                self.describe(),
                memory.cuda.describe()
            ))),
        }
    }

    /// Sets all bytes of `memory` to zero.
    pub fn clear(&self, memory: &Memory) -> Result<(), CudaError> {
        self.check_own(memory)?;
        record::note_clear(self.0.id, memory.address, memory.bytes);
        if record::runs_nothing(self.0.id) {
            return Ok(());
        }
        let _stream = self.lock_stream();
        self.0.launcher.clear(memory.address, memory.bytes)
    }

    /// Allocates memory with a copy of host values. `values` may change once this has returned.
    ///
    /// # Errors
    /// [`CudaError::Memory`] if there is not enough; this thread is recording.
    pub fn upload<T: bytemuck::NoUninit>(&self, values: &[T]) -> Result<Arc<Memory>, CudaError> {
        let memory = self.allocate_bytes(size_of_val(values))?;
        self.upload_to(&memory, values)?;
        Ok(memory)
    }

    /// Copies host values to the beginning of `memory`. `values` may change once this has returned.
    ///
    /// # Errors
    /// They are larger than the memory; this thread is recording.
    pub fn upload_to<T: bytemuck::NoUninit>(
        &self,
        memory: &Memory,
        values: &[T],
    ) -> Result<(), CudaError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        self.upload_written(memory, bytes.len(), |to| to.copy_from_slice(bytes))
    }

    /// Copies `bytes` bytes to the beginning of `memory`: `write` writes them to the host memory
    /// that the copy starts from, whose address is aligned for values of any type.
    ///
    /// # Errors
    /// They are more than the memory has; this thread is recording.
    pub fn upload_written(
        &self,
        memory: &Memory,
        bytes: usize,
        mut write: impl FnMut(&mut [u8]),
    ) -> Result<(), CudaError> {
        self.check_own(memory)?;
        if bytes > memory.bytes {
            return Err(CudaError::Launch(format!(
                "{bytes} bytes for a buffer of {}",
                memory.bytes
            )));
        }
        if record::is_dry_run(self.0.id) {
            return Ok(());
        }
        if record::is_recording(self.0.id) {
            return Err(CudaError::Launch(format!(
                "recorded work cannot copy {bytes} bytes from the host"
            )));
        }
        let _stream = self.lock_stream();
        self.0.uploads.fetch_add(1, Ordering::Relaxed);
        self.0.carried[0].fetch_add(bytes as u64, Ordering::Relaxed);
        self.0.launcher.upload(memory.address, bytes, &mut write)
    }

    /// Waits for everything launched, and copies the beginning of `memory` to `values`.
    ///
    /// # Errors
    /// Earlier work failed, the memory is smaller than `values`, or this thread is recording.
    pub fn download<T: bytemuck::Pod>(
        &self,
        memory: &Memory,
        values: &mut [T],
    ) -> Result<(), CudaError> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        if !self.may_download(memory, bytes.len())? {
            bytes.fill(0);
            return Ok(());
        }
        let _stream = self.lock_stream();
        self.count_download(bytes.len())?;
        self.0.launcher.download(memory.address, bytes)
    }

    /// Waits for everything launched, copies the first `bytes` bytes of `memory` back, and returns
    /// what `read` makes of them in the host memory where they arrive.
    ///
    /// # Errors
    /// Earlier work failed, the memory is smaller, or this thread is recording.
    pub fn download_read<R>(
        &self,
        memory: &Memory,
        bytes: usize,
        read: impl FnOnce(&[u8]) -> R,
    ) -> Result<R, CudaError> {
        if !self.may_download(memory, bytes)? {
            return Ok(read(&vec![0; bytes]));
        }
        let _stream = self.lock_stream();
        self.count_download(bytes)?;
        let (mut read, mut result) = (Some(read), None);
        self.0.launcher.download_read(memory.address, bytes, &mut |values| {
            result = read.take().map(|read| read(values));
        })?;
        result.ok_or_else(|| CudaError::Launch("an unread copy from the device".into()))
    }

    /// Whether `bytes` bytes of `memory` can be copied back; false in a dry run, where reads give
    /// zero.
    fn may_download(&self, memory: &Memory, bytes: usize) -> Result<bool, CudaError> {
        self.check_own(memory)?;
        if bytes > memory.bytes {
            return Err(CudaError::Launch(format!(
                "{bytes} bytes asked of a buffer of {}",
                memory.bytes
            )));
        }
        record::note_download(self.0.id);
        if record::is_dry_run(self.0.id) {
            return Ok(false);
        }
        if record::is_recording(self.0.id) {
            return Err(CudaError::Launch(format!(
                "recorded work cannot copy {bytes} bytes to the host"
            )));
        }
        Ok(true)
    }

    /// Counts a copy to the host; an error if it is to fail. The stream is held.
    fn count_download(&self, bytes: usize) -> Result<(), CudaError> {
        #[cfg(feature = "emulator")]
        {
            let left = self.0.failing.load(Ordering::Relaxed);
            self.0.failing.store(left.saturating_sub(1), Ordering::Relaxed);
            if left == 1 {
                return Err(CudaError::Launch("a copy from the device: made to fail".into()));
            }
        }
        self.0.downloads.fetch_add(1, Ordering::Relaxed);
        self.0.carried[1].fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Copies `bytes` bytes within the device; offsets are in bytes.
    ///
    /// # Errors
    /// The bytes reach beyond the end of either memory.
    pub fn copy(
        &self,
        from: &Memory,
        from_offset: usize,
        to: &Memory,
        to_offset: usize,
        bytes: usize,
    ) -> Result<(), CudaError> {
        self.check_own(from)?;
        self.check_own(to)?;
        let beyond = |memory: &Memory, offset: usize| {
            offset.checked_add(bytes).is_none_or(|end| end > memory.bytes)
        };
        if beyond(from, from_offset) || beyond(to, to_offset) {
            return Err(CudaError::Launch(format!(
                "a copy of {bytes} bytes goes beyond a buffer of {} or {}",
                from.bytes, to.bytes
            )));
        }
        record::record_launch(
            self.0.id,
            "copy",
            Launch::per_element(bytes).with_cost(0, 2 * bytes),
        );
        let (from, to) = (from.address + from_offset as u64, to.address + to_offset as u64);
        record::note_copy(self.0.id, from, to, bytes);
        if record::runs_nothing(self.0.id) {
            return Ok(());
        }
        let _stream = self.lock_stream();
        self.0.launcher.copy(from, to, bytes)
    }

    /// Launches a kernel with values for its parameters: [`kernels`] has both. For this crate's ops
    /// alone: what a kernel does with its arguments is its own and the op's responsibility; the
    /// emulator checks that no access goes beyond memory.
    pub(crate) fn launch<A: Arguments>(
        &self,
        kernel: TypedKernel<A>,
        launch: Launch,
        arguments: A,
    ) -> Result<(), CudaError> {
        self.launch_bits(kernel.kernel, launch, arguments.bits(self.0.id))
    }

    /// Launches any kernel; `arguments` are its parameters.
    fn launch_bits(
        &self,
        kernel: &'static Kernel,
        launch: Launch,
        arguments: Vec<(&'static str, Result<u64, String>)>,
    ) -> Result<(), CudaError> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        self.0.limits.check(kernel.name, launch)?;
        let refused = |parameter: &str, why: String| {
            CudaError::Launch(format!("kernel {}, parameter {parameter}: {why}", kernel.name))
        };
        let mut slots = arguments
            .into_iter()
            .map(|(parameter, bits)| bits.map_err(|why| refused(parameter, why)))
            .collect::<Result<Vec<u64>, CudaError>>()?;
        kernel.check_threads(launch.threads)?;
        record::note_launch(self.0.id, kernel, launch, &slots);
        let timed = record::record_launch(self.0.id, kernel.name, launch);
        if record::runs_nothing(self.0.id) {
            return self.0.launcher.prepare(kernel);
        }
        let _stream = self.lock_stream();
        let mut pointers: Vec<*mut c_void> =
            slots.iter_mut().map(|s| std::ptr::from_mut(s).cast()).collect();
        if timed {
            let mut run = || self.0.launcher.launch(kernel, launch, &mut pointers);
            let seconds = self.0.launcher.seconds(&mut run)?;
            record::record_time(self.0.id, seconds);
            return Ok(());
        }
        self.0.launcher.launch(kernel, launch, &mut pointers)
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests;
