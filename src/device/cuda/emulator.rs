//! The launcher's second body: the kernels on host threads, every access checked. For tests; see
//! `kernels/host`.

use super::launcher::no_groups;
use super::staging::Turns;
use super::{CudaError, Launch, Launcher, Limits, source};
use crate::device::Cpu;
use crate::sync::locked;
use std::alloc::{Layout, alloc, dealloc};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::{CString, c_char, c_uchar, c_uint, c_void};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

#[repr(C)]
struct Kernel {
    _opaque: [u8; 0],
}

/// `prism_emulator_find`.
type Find = unsafe extern "C" fn(name: *const c_char) -> *const Kernel;
/// `prism_emulator_arguments`.
type Arguments = unsafe extern "C" fn(kernel: *const Kernel, sizes: *mut *const c_uchar) -> i32;
/// `prism_emulator_run`.
type Run = unsafe extern "C" fn(
    kernel: *const Kernel,
    grid: *const c_uint,
    threads: c_uint,
    shared: c_uint,
    arguments: *const *mut c_void,
    from: u64,
    to: u64,
    allocations: *const [u64; 2],
    allocation_count: usize,
    seed: u64,
    message: *mut c_char,
    length: usize,
) -> bool;

// SAFETY: declared as `kernels/host/emulator.cpp` defines them, the first as `build.rs` does.
unsafe extern "C" {
    fn prism_emulator_keep();
    fn prism_emulator_find(name: *const c_char) -> *const Kernel;
    fn prism_emulator_arguments(kernel: *const Kernel, sizes: *mut *const c_uchar) -> i32;
    fn prism_emulator_run(
        kernel: *const Kernel,
        grid: *const c_uint,
        threads: c_uint,
        shared: c_uint,
        arguments: *const *mut c_void,
        from: u64,
        to: u64,
        allocations: *const [u64; 2],
        allocation_count: usize,
        seed: u64,
        message: *mut c_char,
        length: usize,
    ) -> bool;
}

/// The kernels and the emulator that runs them: those of this build, or those of a shared library.
struct Library {
    find: Find,
    arguments: Arguments,
    run: Run,
    /// The library in which a kernel is looked for first.
    over: Option<Box<Library>>,
    _loaded: Option<libloading::Library>,
}

impl Library {
    fn own() -> Library {
        // SAFETY: does nothing; the call keeps the kernels from being dropped by the linker.
        unsafe { prism_emulator_keep() };
        Library {
            find: prism_emulator_find,
            arguments: prism_emulator_arguments,
            run: prism_emulator_run,
            over: None,
            _loaded: None,
        }
    }

    /// Loads a shared library of kernels.
    ///
    /// # Safety
    /// The file is a build of `kernels/host/emulator.cpp` with kernels.
    unsafe fn load(path: &Path) -> Result<Library, libloading::Error> {
        // SAFETY: guaranteed by the caller: loading it runs nothing but what such a build runs, and
        // the names are of functions of these types.
        unsafe {
            let loaded = libloading::Library::new(path)?;
            let find = *loaded.get::<Find>(b"prism_emulator_find")?;
            let arguments = *loaded.get::<Arguments>(b"prism_emulator_arguments")?;
            let run = *loaded.get::<Run>(b"prism_emulator_run")?;
            Ok(Library { find, arguments, run, over: None, _loaded: Some(loaded) })
        }
    }

    /// The library that has a kernel, and the kernel.
    fn find(&self, name: &std::ffi::CStr) -> Option<(&Library, *const Kernel)> {
        if let Some(found) = self.over.as_ref().and_then(|over| over.find(name)) {
            return Some(found);
        }
        // SAFETY: a C string; the answer is a constant of the program or null.
        let kernel = unsafe { (self.find)(name.as_ptr()) };
        (!kernel.is_null()).then_some((self, kernel))
    }
}

/// The limits of GPUs of capability 9.0; `kernels/host/emulator.cpp` has room for as much.
const LIMITS: Limits =
    Limits { grid: [i32::MAX as usize, 65535, 65535], threads: 1024, shared: 227 << 10 };

/// Bytes on either side of a buffer that belong to no buffer.
const GUARD: usize = 256;

pub struct Emulator {
    library: Library,
    cpu: Cpu,
    seed: u64,
    branches: bool,
    /// The sizes of buffers in bytes, by address.
    buffers: Mutex<BTreeMap<u64, usize>>,
    recorded: Mutex<Recorded>,
    uploads: Mutex<Uploads>,
    /// The launches until the device is lost ([`Launcher::lose_after`]); [`u64::MAX`] is no end.
    left: AtomicU64,
    /// How often the emulator was told to leave its group, if it has groups
    /// ([`Launcher::pretend_groups`]).
    groups: OnceLock<Arc<AtomicU64>>,
}

/// The places that copies to the device started from. On a GPU such a copy may wait behind any
/// amount of other work: here it has finished only when the host next waits for the device.
#[derive(Default)]
struct Uploads {
    turns: Turns,
    taken: BTreeSet<usize>,
    waits: u64,
}

impl Uploads {
    fn begin(&mut self, bytes: usize) {
        let free = self.turns.next(bytes).is_some_and(|place| self.taken.insert(place));
        self.waits += u64::from(!free);
    }
}

/// Work that is being recorded, and what was recorded, by number.
#[derive(Default)]
struct Recorded {
    current: Option<Vec<Step>>,
    graphs: BTreeMap<u64, Arc<Vec<Step>>>,
    next: u64,
}

/// A recorded call.
enum Step {
    Launch { kernel: &'static source::Kernel, launch: Launch, arguments: Vec<u64> },
    Copy { from: u64, to: u64, bytes: usize },
    Clear { address: u64, bytes: usize },
    Fork,
    LeaveBranch,
    Join,
}

/// Recorded steps in the order in which they run. Neither of two branches waits for the other: for
/// seed 0 the one beside the main line is first, otherwise the seed decides from step to step.
fn in_order(steps: Vec<Step>, seed: u64) -> Vec<Step> {
    let (mut order, mut branches) = (vec![], [VecDeque::new(), VecDeque::new()]);
    let (mut branch, mut random) = (None, seed);
    for step in steps {
        match step {
            Step::Fork => branch = Some(1),
            Step::LeaveBranch => branch = Some(0),
            Step::Join => {
                branch = None;
                while branches.iter().any(|steps| !steps.is_empty()) {
                    // Knuth's generator; its highest bit is its best.
                    random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
                    let turn = if seed == 0 { 1 } else { (random >> 63) as usize };
                    let next = branches[turn].pop_front();
                    order.extend(next.or_else(|| branches[1 - turn].pop_front()));
                }
            }
            step => match branch {
                Some(branch) => branches[branch].push_back(step),
                None => order.push(step),
            },
        }
    }
    order
}

/// The state that the blocks of a launch share: pointers that live as long as it.
struct Job<'a> {
    run: Run,
    kernel: *const Kernel,
    arguments: &'a [*mut c_void],
}
// SAFETY: the kernel is a constant, and blocks only read the arguments.
unsafe impl Sync for Job<'_> {}

impl Job<'_> {
    fn parts(&self) -> (Run, *const Kernel, *const *mut c_void) {
        (self.run, self.kernel, self.arguments.as_ptr())
    }
}

/// The memory of a buffer with its guards; none if that is more than can be addressed.
fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes.checked_add(2 * GUARD)?, GUARD).ok()
}

impl Emulator {
    pub fn new(cpu: Cpu, seed: u64) -> Emulator {
        Emulator {
            library: Library::own(),
            cpu,
            seed,
            branches: true,
            buffers: Mutex::default(),
            recorded: Mutex::default(),
            uploads: Mutex::default(),
            left: AtomicU64::new(u64::MAX),
            groups: OnceLock::new(),
        }
    }

    /// An emulator whose recorded work has no branches.
    #[cfg(test)]
    pub fn without_branches(self) -> Emulator {
        Emulator { branches: false, ..self }
    }

    /// This emulator with the kernels of a shared library in front of its own.
    ///
    /// # Safety
    /// The file is a build of `kernels/host/emulator.cpp` with kernels.
    pub unsafe fn with_library(self, path: &Path) -> Result<Emulator, CudaError> {
        let failed = |e| CudaError::Unavailable(format!("{}: {e}", path.display()));
        // SAFETY: as promised by the caller.
        let over = unsafe { Library::load(path) }.map_err(failed)?;
        Ok(Emulator { library: Library { over: Some(Box::new(over)), ..self.library }, ..self })
    }

    fn buffers(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, usize>> {
        locked(&self.buffers)
    }

    fn recorded(&self) -> std::sync::MutexGuard<'_, Recorded> {
        locked(&self.recorded)
    }

    fn uploads(&self) -> std::sync::MutexGuard<'_, Uploads> {
        locked(&self.uploads)
    }

    /// The host waits for everything that was launched.
    fn wait(&self) {
        self.uploads().taken.clear();
    }

    /// Records a call if work is being recorded; returns whether it was.
    fn note(&self, step: impl FnOnce() -> Step) -> bool {
        self.recorded().current.as_mut().map(|steps| steps.push(step())).is_some()
    }

    /// The library that has a kernel, and the kernel there; an error unless it was built with the
    /// parameters that its source declares.
    fn kernel(&self, kernel: &source::Kernel) -> Result<(&Library, *const Kernel), CudaError> {
        let name = CString::new(kernel.name).unwrap_or_default();
        let missing =
            || CudaError::Launch(format!("the emulator was built without kernel {}", kernel.name));
        let (library, found) = self.library.find(&name).ok_or_else(missing)?;
        let mut parameters = std::ptr::null();
        // SAFETY: the kernel's own table of that many sizes.
        let parameters = unsafe {
            let count = (library.arguments)(found, &mut parameters);
            std::slice::from_raw_parts(parameters, count as usize)
        };
        kernel.check_built(parameters)?;
        Ok((library, found))
    }

    /// An error if the device is lost. Launches, as many as are given, bring that nearer.
    fn alive(&self, launches: u64) -> Result<(), CudaError> {
        let less = |left| match left {
            0 => None,
            u64::MAX => Some(left),
            _ => Some(left - launches),
        };
        match self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less) {
            Ok(_) => Ok(()),
            Err(_) => Err(CudaError::Launch("the device is lost: made to be".into())),
        }
    }

    /// An error if the device is lost, or while work is being recorded: on a GPU, any other request
    /// to the stream would be recorded too, or break the recording.
    fn idle(&self, what: &str) -> Result<(), CudaError> {
        self.alive(0)?;
        match self.recorded().current {
            Some(_) => Err(CudaError::Launch(format!("{what} while work is being recorded"))),
            None => Ok(()),
        }
    }

    /// An error unless `address..address + bytes` lies in a buffer.
    fn check(&self, address: u64, bytes: usize) -> Result<(), CudaError> {
        let inside = |(start, size): (&u64, &usize)| {
            address.checked_add(bytes as u64).is_some_and(|end| end <= start + *size as u64)
        };
        match self.buffers().range(..=address).next_back() {
            Some(buffer) if inside(buffer) => Ok(()),
            _ => Err(CudaError::Launch(format!(
                "a copy of {bytes} bytes at {address:#x}, where no buffer is"
            ))),
        }
    }
}

impl Launcher for Emulator {
    fn is_emulated(&self) -> bool {
        true
    }
    fn has_wgmma(&self) -> bool {
        true
    }
    fn lose_after(&self, launches: u64) -> u64 {
        self.left.swap(launches, Ordering::Relaxed)
    }
    fn pretend_groups(&self) -> Arc<AtomicU64> {
        self.groups.get_or_init(Arc::default).clone()
    }
    fn has_groups(&self, _needed: bool) -> bool {
        self.groups.get().is_some()
    }
    fn group_id(&self) -> Result<Vec<u8>, CudaError> {
        self.groups.get().map(|_| vec![0; 128]).ok_or_else(no_groups)
    }
    fn join_group(&self, _id: &[u8], _rank: usize, _world: usize) -> Result<(), CudaError> {
        self.groups.get().map(|_| ()).ok_or_else(no_groups)
    }
    fn leave_group(&self) {
        if let Some(left) = self.groups.get() {
            left.fetch_add(1, Ordering::Relaxed);
        }
    }
    fn allocate(&self, bytes: usize) -> Result<u64, CudaError> {
        self.idle("an allocation")?;
        let refused = CudaError::Memory { asked: bytes, free: 0, total: 0 };
        let Some(layout) = layout(bytes) else { return Err(refused) };
        // SAFETY: the layout is not empty: it has the guards.
        let memory = unsafe { alloc(layout) };
        if memory.is_null() {
            return Err(refused);
        }
        // NaN in every float type, so that memory that was never written is noticed.
        // SAFETY: that many bytes were just allocated.
        unsafe { memory.write_bytes(0xff, bytes + 2 * GUARD) };
        let address = memory as u64 + GUARD as u64;
        self.buffers().insert(address, bytes);
        Ok(address)
    }

    fn free(&self, address: u64) {
        if let Some(layout) = self.buffers().remove(&address).and_then(layout) {
            // SAFETY: allocated above with the same layout, and forgotten now.
            unsafe { dealloc((address - GUARD as u64) as *mut u8, layout) };
        }
    }

    fn upload(
        &self,
        address: u64,
        bytes: usize,
        write: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), CudaError> {
        self.idle("a copy to the device")?;
        self.check(address, bytes)?;
        self.uploads().begin(bytes);
        // SAFETY: just checked, and nothing runs meanwhile.
        write(unsafe { std::slice::from_raw_parts_mut(address as *mut u8, bytes) });
        Ok(())
    }

    fn waits(&self) -> u64 {
        self.uploads().waits
    }

    fn download(&self, address: u64, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.idle("a copy from the device")?;
        self.check(address, bytes.len())?;
        self.wait();
        // SAFETY: just checked.
        unsafe {
            std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), bytes.len())
        };
        Ok(())
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), CudaError> {
        if self.note(|| Step::Copy { from, to, bytes }) {
            return Ok(());
        }
        self.alive(0)?;
        self.check(from, bytes)?;
        self.check(to, bytes)?;
        // SAFETY: just checked.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    fn clear(&self, address: u64, bytes: usize) -> Result<(), CudaError> {
        if self.note(|| Step::Clear { address, bytes }) {
            return Ok(());
        }
        self.alive(0)?;
        self.check(address, bytes)?;
        // SAFETY: just checked.
        unsafe { (address as *mut u8).write_bytes(0, bytes) };
        Ok(())
    }

    fn launch(
        &self,
        kernel: &'static source::Kernel,
        launch: Launch,
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        let (library, found) = self.kernel(kernel)?;
        // SAFETY: each argument points to eight bytes, of `Cuda::launch` or of a replay.
        let values = || arguments.iter().map(|a| unsafe { *a.cast::<u64>() }).collect();
        if self.note(|| Step::Launch { kernel, launch, arguments: values() }) {
            return Ok(());
        }
        self.alive(1)?;
        let grid = launch.grid.map(|g| g as c_uint);
        let allocations: Vec<[u64; 2]> =
            self.buffers().iter().map(|(start, bytes)| [*start, *bytes as u64]).collect();
        let blocks: u64 = launch.grid.iter().map(|g| *g as u64).product();
        let per_unit = blocks.div_ceil(4 * self.cpu.threads() as u64).max(1);
        let job = Job { run: library.run, kernel: found, arguments };
        let failure: Mutex<Option<(u64, String)>> = Mutex::new(None);
        self.cpu.for_each(blocks.div_ceil(per_unit) as usize, |unit| {
            let from = unit as u64 * per_unit;
            let to = (from + per_unit).min(blocks);
            let mut message = [0u8; 512];
            let (run, kernel, arguments) = job.parts();
            // SAFETY: the arguments are the kernel's parameters, and the emulator checks every
            // access of the kernel against `allocations`.
            let good = unsafe {
                run(
                    kernel,
                    grid.as_ptr(),
                    launch.threads as c_uint,
                    launch.shared as c_uint,
                    arguments,
                    from,
                    to,
                    allocations.as_ptr(),
                    allocations.len(),
                    self.seed,
                    message.as_mut_ptr().cast(),
                    message.len(),
                )
            };
            if !good {
                let text = message.split(|b| *b == 0).next().unwrap_or_default();
                let text = String::from_utf8_lossy(text).into_owned();
                let mut failure = locked(&failure);
                if failure.as_ref().is_none_or(|(at, _)| from < *at) {
                    *failure = Some((from, text));
                }
            }
        });
        let failure = locked(&failure).take();
        failure.map_or(Ok(()), |(_, text)| Err(CudaError::Launch(text)))
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        vec![
            ("name", "the emulator: the CUDA kernels on host threads, for tests".into()),
            ("host threads", self.cpu.threads().to_string()),
        ]
    }

    fn seconds(&self, work: &mut dyn FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
        self.idle("timing")?;
        let start = std::time::Instant::now();
        work()?;
        self.wait();
        Ok(start.elapsed().as_secs_f64())
    }

    fn prepare(&self, kernel: &'static source::Kernel) -> Result<(), CudaError> {
        self.kernel(kernel).map(drop)
    }

    fn begin_recording(&self) -> Result<(), CudaError> {
        self.idle("another recording")?;
        self.recorded().current = Some(vec![]);
        Ok(())
    }

    fn has_branches(&self) -> bool {
        self.branches
    }

    fn fork(&self) -> Result<(), CudaError> {
        self.note(|| Step::Fork);
        Ok(())
    }

    fn leave_branch(&self) -> Result<(), CudaError> {
        self.note(|| Step::LeaveBranch);
        Ok(())
    }

    fn join(&self) -> Result<(), CudaError> {
        self.note(|| Step::Join);
        Ok(())
    }

    fn end_recording(&self) -> Result<u64, CudaError> {
        let mut recorded = self.recorded();
        let steps = in_order(recorded.current.take().unwrap_or_default(), self.seed);
        recorded.next += 1;
        let id = recorded.next;
        recorded.graphs.insert(id, Arc::new(steps));
        Ok(id)
    }

    fn abandon_recording(&self) {
        self.recorded().current = None;
    }

    fn replay(&self, graph: u64) -> Result<(), CudaError> {
        self.idle("a replay")?;
        let steps = self.recorded().graphs.get(&graph).cloned();
        for step in
            steps.ok_or_else(|| CudaError::Launch(format!("no recorded work {graph}")))?.iter()
        {
            match step {
                Step::Copy { from, to, bytes } => self.copy(*from, *to, *bytes)?,
                Step::Clear { address, bytes } => self.clear(*address, *bytes)?,
                // Put in order when the recording ended.
                Step::Fork | Step::LeaveBranch | Step::Join => {}
                Step::Launch { kernel, launch, arguments } => {
                    let mut values = arguments.clone();
                    let mut pointers: Vec<*mut c_void> =
                        values.iter_mut().map(|v| std::ptr::from_mut(v).cast()).collect();
                    self.launch(kernel, *launch, &mut pointers)?;
                }
            }
        }
        Ok(())
    }

    fn forget(&self, graph: u64) {
        self.recorded().graphs.remove(&graph);
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        self.idle("waiting")?;
        self.wait();
        Ok(())
    }

    fn limits(&self) -> Limits {
        LIMITS
    }

    fn describe(&self) -> String {
        format!("emulated, {} threads", self.cpu.threads())
    }
}
