//! The launcher's first body: a GPU through the CUDA driver.
//!
//! The driver and NVRTC are loaded when first needed, after checking that they are present, so that
//! a machine without them gets an error and nothing panics. Memory comes from the device's own
//! stream-ordered pool, which keeps what is freed; modules are compiled for the device's
//! architecture when one of their kernels is first launched.

use super::cache;
use super::chain::{Chain, Next};
use super::code::{Code, Function, launch_early, parameters};
use super::error::{failed, text};
use super::group::{self, Group};
use super::idle::Idle;
use super::nvrtc;
use super::pinned::{Pinned, Staging};
use super::source::Kernel;
use super::staging;
use super::stream::{Context, Event, Stream};
use super::switch::{is_asked_for, is_on};
use super::{CudaError, Launch, Launcher, Limits};
use crate::memory;
use crate::sync::locked;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

/// The lowest compute capability that kernels are written for.
const LEAST: (i32, i32) = (8, 0);
/// The architecture and driver version from which on a recorded launch may begin before the
/// previous one has finished: every kernel itself waits for the previous one, and says when the
/// next may begin (`await_turn` in `kernels/lib/base.cuh`), if it is compiled for that.
const OVERLAPPING: (i32, i32) = (90, 12040);
/// Environment variables that switch off early launches, branches of recorded work, the token
/// path's own launches, and memory that is lent again, so that the gain of each can be measured and
/// a fault traced to it.
const OVERLAP: &str = "PRISM_CUDA_OVERLAP";
const BRANCHES: &str = "PRISM_CUDA_BRANCHES";
const TOKENS: &str = "PRISM_CUDA_TOKENS";
const IDLE: &str = "PRISM_CUDA_IDLE";
/// The environment variable that switches on products by `wgmma`, which have not run on a GPU yet,
/// and the architecture that has them: newer ones do not.
const WGMMA: &str = "PRISM_CUDA_WGMMA";
const WITH_WGMMA: &str = "sm_90a";
/// The environment variable that switches recorded training steps on.
const TRAIN_GRAPHS: &str = "PRISM_CUDA_TRAIN_GRAPHS";
/// Shared memory that a block gets without asking for it.
const PLAIN_SHARED: usize = 48 << 10;

/// Fields are in the order in which they are released, the context last.
pub struct Driver {
    group: Mutex<Option<Group>>,
    staging: Mutex<Staging>,
    /// Where copies from the device arrive on the host.
    arrival: Mutex<Pinned>,
    stream: Stream,
    branch: Branch,
    /// Whether recorded work may have branches.
    branches: bool,
    /// Whether the token path has launches of its own.
    tokens: bool,
    /// Whether products by `wgmma` were asked for.
    wgmma: bool,
    /// Whether training steps are recorded.
    trains_recorded: bool,
    chain: Chain,
    name: String,
    capability: (i32, i32),
    /// The architecture that kernels are compiled for.
    arch: String,
    limits: Limits,
    code: Mutex<Code>,
    /// Whether small pieces of memory are kept for reuse, and those that are not in use.
    keeps: bool,
    idle: Mutex<Idle>,
    graphs: Mutex<(u64, HashMap<u64, Graph>)>,
    /// Another process of the group is lost.
    left: AtomicBool,
    context: Context,
}

/// The branch of recorded work beside the main line.
struct Branch {
    /// A branch holds the longer chain of small launches, so its blocks go first.
    stream: Stream,
    forked: Event,
    ended: Event,
}

impl Branch {
    fn new() -> Result<Branch, DriverError> {
        let (forked, ended) = (Event::new()?, Event::new()?);
        Ok(Branch { stream: Stream::urgent()?, forked, ended })
    }
}

/// Recorded work, ready to be launched.
#[derive(Clone, Copy)]
struct Graph(sys::CUgraphExec);

// SAFETY: the driver's handles may be used from any thread whose current context is theirs; every
// method sets it.
unsafe impl Send for Driver {}
// SAFETY: as above, by several threads at once: the driver locks its own, and what changes here is
// behind locks.
unsafe impl Sync for Driver {}
// SAFETY: a handle of the context that `Driver` sets before it uses it.
unsafe impl Send for Graph {}

/// The driver's version, as 12040 for 12.4; 0 if it does not tell.
fn driver_version() -> i32 {
    let mut version = 0;
    // SAFETY: writes one number.
    let _ = unsafe { sys::cuDriverGetVersion(&mut version) };
    version
}

impl Driver {
    pub fn new(index: usize) -> Result<Driver, CudaError> {
        let none = |text: String| CudaError::Unavailable(text);
        // SAFETY: loads a library, as any call of it would.
        if !unsafe { sys::is_culib_present() } {
            return Err(none(
                "the NVIDIA driver (libcuda.so) was not found; use --device cpu".into(),
            ));
        }
        nvrtc::version()?;
        result::init()
            .map_err(|e| none(format!("the NVIDIA driver failed to start: {}", text(&e))))?;
        let count = result::device::get_count().map_err(|e| none(text(&e)))?;
        if index >= count as usize {
            return Err(none(format!(
                "there is no GPU {index}: the driver has {count}, numbered from 0"
            )));
        }
        let device = result::device::get(index as i32).map_err(|e| none(text(&e)))?;
        let name = result::device::get_name(device).map_err(|e| none(text(&e)))?;
        // SAFETY: the device exists: the driver just named it.
        let attribute =
            |a| unsafe { result::device::get_attribute(device, a) }.map_err(|e| none(text(&e)));
        use sys::CUdevice_attribute_enum as A;
        let capability = (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let most = |a| attribute(a).map(|v| usize::try_from(v).unwrap_or(0));
        let limits = Limits {
            grid: [
                most(A::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X)?,
                most(A::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y)?,
                most(A::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z)?,
            ],
            threads: most(A::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
            shared: most(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        };
        if capability < LEAST {
            let (major, minor) = capability;
            return Err(none(format!(
                "{name} has compute capability {major}.{minor}, 8.0 (Ampere) or newer is needed"
            )));
        }
        let nvrtc::Target { arch, number } = nvrtc::target(capability)?;
        let fail = |e: DriverError| none(text(&e));
        // SAFETY: the device exists; released when dropped.
        let handle = unsafe { result::primary_ctx::retain(device) }.map_err(fail)?;
        let context = Context { device, handle };
        context.enter().map_err(fail)?;
        let (stream, staging) = (Stream::new().map_err(fail)?, Staging::new().map_err(fail)?);
        let branch = Branch::new().map_err(fail)?;
        let able = number >= OVERLAPPING.0 && driver_version() >= OVERLAPPING.1;
        let (overlaps, branches, tokens) = (is_on(OVERLAP)?, is_on(BRANCHES)?, is_on(TOKENS)?);
        let (keeps, wgmma) = (is_on(IDLE)?, is_asked_for(WGMMA)?);
        let trains_recorded = is_asked_for(TRAIN_GRAPHS)?;
        let chain = Chain::new(able && overlaps);
        // SAFETY: the device exists; one number to read from.
        unsafe {
            // Freed memory stays in the pool.
            let pool = result::device::get_default_mem_pool(device).map_err(fail)?;
            let mut keep = u64::MAX;
            let threshold = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            let _ =
                sys::cuMemPoolSetAttribute(pool, threshold, std::ptr::from_mut(&mut keep).cast());
        }
        let (staging, arrival) = (Mutex::new(staging), Mutex::new(Pinned::none()));
        let (code, graphs, group) = (Mutex::default(), Mutex::default(), Mutex::new(None));
        let idle = Mutex::default();
        Ok(Driver {
            group,
            staging,
            arrival,
            stream,
            branch,
            branches,
            tokens,
            wgmma,
            trains_recorded,
            chain,
            name,
            capability,
            arch,
            limits,
            code,
            keeps,
            idle,
            graphs,
            left: AtomicBool::new(false),
            context,
        })
    }

    /// What tables of variants are kept by: what their timings depend on, besides the kernels.
    pub fn identity(&self) -> String {
        use sys::CUdevice_attribute_enum as A;
        // SAFETY: the device exists.
        let multiprocessors = unsafe {
            let which = A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
            result::device::get_attribute(self.context.device, which)
        };
        let (nvrtc, count) = (nvrtc::version().unwrap_or_default(), multiprocessors.unwrap_or(0));
        format!(
            "{}, {}, {count} multiprocessors, driver {}, NVRTC {}.{}",
            self.name,
            self.arch,
            driver_version(),
            nvrtc.0,
            nvrtc.1
        )
    }

    fn enter(&self) -> Result<(), CudaError> {
        self.context.enter().map_err(failed("the device's context"))
    }

    /// The stream for the next launch, copy on the device or clearing, and whether it may begin
    /// early.
    fn line(&self, next: Next) -> (&Stream, bool) {
        let (branched, early) = self.chain.next(next);
        (if branched { &self.branch.stream } else { &self.stream }, early)
    }

    /// At least `bytes` bytes of pinned memory for a copy from the device to arrive in; none for
    /// copies that are too large or empty.
    fn arrival(&self, bytes: usize) -> Result<Option<MutexGuard<'_, Pinned>>, CudaError> {
        if bytes == 0 || bytes > staging::MOST_BYTES {
            return Ok(None);
        }
        let mut pinned = locked(&self.arrival);
        // SAFETY: callers have entered the context; the previous user of this memory waited for its
        // copy.
        unsafe { pinned.reserve(bytes) }?;
        Ok(Some(pinned))
    }

    fn graphs(&self) -> MutexGuard<'_, (u64, HashMap<u64, Graph>)> {
        locked(&self.graphs)
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        locked(&self.idle)
    }

    /// Gives idle memory back to the driver; whether there was any.
    fn give_up_idle(&self) -> bool {
        let all = self.idle().give_up();
        for address in &all {
            // SAFETY: came from `allocate`, and is not in use. A failure here is that of an earlier
            // launch, which the next call reports.
            let _ = unsafe { result::free_async(*address, self.stream.0) };
        }
        !all.is_empty()
    }

    /// A kernel's function, allowed to use `shared` bytes of shared memory; an error unless it was
    /// built with the parameters that its source declares.
    fn function(
        &self,
        kernel: &'static Kernel,
        shared: usize,
    ) -> Result<sys::CUfunction, CudaError> {
        let Code { modules, functions } = &mut *locked(&self.code);
        let function = match functions.entry(kernel.name) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let code = self.load(modules, kernel)?;
                place.insert(Function { code, allowed: PLAIN_SHARED })
            }
        };
        if shared > function.allowed {
            let most =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of this context; within the device's limits, which are `i32`.
            unsafe { result::function::set_function_attribute(function.code, most, shared as i32) }
                .map_err(failed(kernel.name))?;
            function.allowed = shared;
        }
        Ok(function.code)
    }

    /// Loads the function of a kernel that was not asked for before.
    fn load(
        &self,
        modules: &mut HashMap<&'static str, sys::CUmodule>,
        kernel: &'static Kernel,
    ) -> Result<sys::CUfunction, CudaError> {
        let (file, name) = (kernel.file, CString::new(kernel.name).unwrap_or_default());
        // SAFETY: machine code of this architecture; modules are never unloaded.
        unsafe {
            let module = match modules.get(file) {
                Some(module) => *module,
                None => {
                    let code = nvrtc::code_of(file, &self.arch)?;
                    let module =
                        result::module::load_data(code.as_ptr().cast()).map_err(failed(file))?;
                    modules.insert(file, module);
                    module
                }
            };
            let function =
                result::module::get_function(module, name).map_err(failed(kernel.name))?;
            if let Some(built) = parameters(function) {
                kernel.check_built(&built)?;
            }
            Ok(function)
        }
    }
}

impl Launcher for Driver {
    fn total_memory(&self) -> Option<u64> {
        self.enter().ok()?;
        result::mem_get_info().ok().map(|(_, total)| total as u64)
    }

    fn free_memory(&self) -> Option<u64> {
        self.enter().ok()?;
        result::mem_get_info().ok().map(|(free, _)| free as u64)
    }

    fn allocate(&self, bytes: usize) -> Result<u64, CudaError> {
        if self.keeps
            && let Some(address) = self.idle().lend(bytes)
        {
            return Ok(address);
        }
        self.enter()?;
        let short = |e: &DriverError| e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        let whole = if self.keeps { Idle::whole(bytes) } else { bytes.max(1) };
        // SAFETY: freed in the same stream by `free`.
        let ask = || unsafe { result::malloc_async(self.stream.0, whole) };
        let asked = match ask() {
            Err(e) if short(&e) && self.give_up_idle() => ask(),
            asked => asked,
        };
        let address = asked.map_err(|e| match short(&e) {
            true => {
                let (free, total) = result::mem_get_info().unwrap_or_default();
                CudaError::Memory { asked: bytes, free, total }
            }
            false => CudaError::Launch(format!("an allocation of {bytes} bytes: {}", text(&e))),
        })?;
        if self.keeps {
            self.idle().note(address, bytes);
        }
        Ok(address)
    }

    fn free(&self, address: u64) {
        if !self.idle().keep(address) && self.enter().is_ok() {
            // SAFETY: came from `allocate`, and nothing later uses it. A failure here is that of an
            // earlier launch, which the next call reports.
            let _ = unsafe { result::free_async(address, self.stream.0) };
        }
    }

    fn upload(
        &self,
        address: u64,
        bytes: usize,
        write: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), CudaError> {
        self.enter()?;
        let what = "a copy to the device";
        let mut staging = locked(&self.staging);
        // SAFETY: the context was entered.
        let Some((place, over)) = unsafe { staging.place(bytes) }? else {
            let mut values = memory::zeroed::<u64>(what, bytes.div_ceil(8));
            let values = &mut bytemuck::cast_slice_mut(&mut values)[..bytes];
            write(values);
            // SAFETY: `Cuda` checked that its memory there has that many bytes; from pageable
            // memory the driver copies before it returns.
            return unsafe { result::memcpy_htod_async(address, values, self.stream.0) }
                .map_err(failed(what));
        };
        // SAFETY: `Cuda` checked that its memory there has that many bytes; the place has as many,
        // and no earlier copy still reads it.
        unsafe {
            let from = std::slice::from_raw_parts_mut(place, bytes);
            write(from);
            result::memcpy_htod_async(address, from, self.stream.0).map_err(failed(what))?;
            over.record(&self.stream).map_err(failed(what))
        }
    }

    fn waits(&self) -> u64 {
        locked(&self.staging).waits
    }

    fn download(&self, address: u64, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.enter()?;
        let what = "a copy from the device";
        let pinned = self.arrival(bytes.len())?;
        // SAFETY: `Cuda` checked that its memory there has that many bytes, and waits here for
        // them; as many are pinned.
        unsafe {
            let to = match &pinned {
                Some(pinned) => std::slice::from_raw_parts_mut(pinned.at.cast::<u8>(), bytes.len()),
                None => &mut *bytes,
            };
            result::memcpy_dtoh_async(to, address, self.stream.0).map_err(failed(what))?;
            self.stream.synchronize().map_err(failed("the device's work"))?;
            if let Some(pinned) = pinned {
                std::ptr::copy_nonoverlapping(
                    pinned.at.cast::<u8>(),
                    bytes.as_mut_ptr(),
                    bytes.len(),
                );
            }
        }
        Ok(())
    }

    fn download_read(
        &self,
        address: u64,
        bytes: usize,
        read: &mut dyn FnMut(&[u8]),
    ) -> Result<(), CudaError> {
        self.enter()?;
        let what = "a copy from the device";
        let Some(pinned) = self.arrival(bytes)? else {
            let mut values = memory::zeroed::<u8>(what, bytes);
            self.download(address, &mut values)?;
            read(&values);
            return Ok(());
        };
        // SAFETY: `Cuda` checked that its memory there has that many bytes, and waits here for
        // them; as many are pinned, and initialised by then.
        unsafe {
            let to = std::slice::from_raw_parts_mut(pinned.at.cast::<u8>(), bytes);
            result::memcpy_dtoh_async(to, address, self.stream.0).map_err(failed(what))?;
            self.stream.synchronize().map_err(failed("the device's work"))?;
            read(to);
        }
        Ok(())
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), CudaError> {
        self.enter()?;
        let (line, _) = self.line(Next::Other);
        // SAFETY: `Cuda` checked that both ranges lie in memory of this device.
        unsafe { result::memcpy_dtod_async(to, from, bytes, line.0) }
            .map_err(failed("a copy on the device"))
    }

    fn clear(&self, address: u64, bytes: usize) -> Result<(), CudaError> {
        self.enter()?;
        let (line, _) = self.line(Next::Other);
        // SAFETY: `Cuda` gives address and size of one memory of this device.
        unsafe { result::memset_d8_async(address, 0, bytes, line.0) }
            .map_err(failed("clearing memory"))
    }

    fn prepare(&self, kernel: &'static Kernel) -> Result<(), CudaError> {
        self.enter()?;
        self.function(kernel, 0).map(|_| ())
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        use sys::CUdevice_attribute_enum as A;
        let attribute = |a| {
            // SAFETY: the device exists.
            unsafe { result::device::get_attribute(self.context.device, a) }
                .map_or_else(|_| "unknown".into(), |v| v.to_string())
        };
        let memory =
            match self.enter().and_then(|()| result::mem_get_info().map_err(failed("memory"))) {
                Ok((free, total)) => {
                    format!("{:.1} of {:.1} GB free", free as f64 / 1e9, total as f64 / 1e9)
                }
                Err(e) => e.to_string(),
            };
        let version = driver_version();
        let nvrtc = nvrtc::version()
            .map_or_else(|e| e.to_string(), |(major, minor)| format!("{major}.{minor}"));
        vec![
            ("name", self.name.clone()),
            (
                "compute capability",
                format!("{}.{}, compiled for {}", self.capability.0, self.capability.1, self.arch),
            ),
            ("memory", memory),
            ("multiprocessors", attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)),
            ("clock", format!("{} kHz", attribute(A::CU_DEVICE_ATTRIBUTE_CLOCK_RATE))),
            (
                "shared memory of a block",
                format!(
                    "{} bytes",
                    attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
                ),
            ),
            ("recorded launches", {
                let early = if self.chain.overlaps { "may begin early" } else { "wait" };
                let branches = if self.branches { "in branches" } else { "one after another" };
                format!("{early}, {branches}")
            }),
            ("16-bit products", {
                let rolls = self.has_wgmma() && self.wgmma;
                let how = if rolls { "by wgmma where it fits" } else { "by mma.sync" };
                how.into()
            }),
            ("driver", format!("CUDA {}.{}", version / 1000, version % 1000 / 10)),
            ("NVRTC", nvrtc),
            (
                "compiled kernels",
                cache::folder().map_or_else(|| "not kept".into(), |f| f.display().to_string()),
            ),
        ]
    }

    fn seconds(&self, work: &mut dyn FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
        self.enter()?;
        let what = failed("timing");
        let (start, end) = (Event::timed().map_err(&what)?, Event::timed().map_err(&what)?);
        start.record(&self.stream).map_err(&what)?;
        let done = work();
        end.record(&self.stream).map_err(&what)?;
        end.wait().map_err(&what)?;
        done?;
        // SAFETY: both events are over.
        let milliseconds = unsafe { result::event::elapsed(start.0, end.0) }.map_err(&what)?;
        Ok(milliseconds as f64 * 1e-3)
    }

    fn begin_recording(&self) -> Result<(), CudaError> {
        self.enter()?;
        // Other threads wait for the stream, so nothing else gets into the recording.
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is this one's own.
        unsafe { result::stream::begin_capture(self.stream.0, mode) }
            .map_err(failed("the beginning of a recording"))?;
        self.chain.record(true);
        Ok(())
    }

    fn has_branches(&self) -> bool {
        self.branches
    }

    fn fuses_tokens(&self) -> bool {
        self.tokens
    }

    fn has_wgmma(&self) -> bool {
        self.arch == WITH_WGMMA
    }

    fn wants_wgmma(&self) -> bool {
        self.wgmma
    }

    fn records_training(&self) -> bool {
        self.trains_recorded
    }

    fn fork(&self) -> Result<(), CudaError> {
        self.enter()?;
        let Branch { stream, forked, .. } = &self.branch;
        let what = failed("a branch of a recording");
        forked.record(&self.stream).map_err(&what)?;
        forked.hold(stream).map_err(&what)?;
        self.chain.go_to(true);
        Ok(())
    }

    fn leave_branch(&self) -> Result<(), CudaError> {
        self.chain.go_to(false);
        Ok(())
    }

    fn join(&self) -> Result<(), CudaError> {
        self.leave_branch()?;
        self.enter()?;
        let what = failed("the end of a branch of a recording");
        self.branch.ended.record(&self.branch.stream).map_err(&what)?;
        self.branch.ended.hold(&self.stream).map_err(&what)
    }

    fn end_recording(&self) -> Result<u64, CudaError> {
        self.chain.record(false);
        self.enter()?;
        // SAFETY: the stream is this one's own; the graph is dropped once it has been made
        // executable, and the executable if it is not kept.
        let exec = unsafe {
            let graph =
                result::stream::end_capture(self.stream.0).map_err(failed("a recording"))?;
            let mut exec = std::ptr::null_mut();
            // So that a branch also goes first when it is replayed.
            let flag =
                sys::CUgraphInstantiate_flags_enum::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY;
            let made = sys::cuGraphInstantiateWithFlags(&mut exec, graph, flag.0.into())
                .result()
                .map_err(failed("a recording"));
            let _ = sys::cuGraphDestroy(graph);
            made?;
            // So that its first launch takes no longer than later ones.
            if let Err(e) = sys::cuGraphUpload(exec, self.stream.0).result() {
                let _ = sys::cuGraphExecDestroy(exec);
                return Err(failed("a recording")(e));
            }
            exec
        };
        let mut graphs = self.graphs();
        graphs.0 += 1;
        let id = graphs.0;
        graphs.1.insert(id, Graph(exec));
        Ok(id)
    }

    fn abandon_recording(&self) {
        self.chain.record(false);
        if self.enter().is_err() {
            return;
        }
        // SAFETY: the stream is this one's own, and nothing else has the graph. A capture that
        // failed gives none, but has ended too.
        unsafe {
            if let Ok(graph) = result::stream::end_capture(self.stream.0)
                && !graph.is_null()
            {
                let _ = sys::cuGraphDestroy(graph);
            }
        }
    }

    fn replay(&self, graph: u64) -> Result<(), CudaError> {
        self.enter()?;
        let found = self.graphs().1.get(&graph).copied();
        let Graph(exec) =
            found.ok_or_else(|| CudaError::Launch(format!("no recorded work {graph}")))?;
        // SAFETY: recorded on this device, not yet forgotten.
        unsafe { sys::cuGraphLaunch(exec, self.stream.0) }.result().map_err(failed("recorded work"))
    }

    fn forget(&self, graph: u64) {
        if let (Some(Graph(exec)), Ok(())) = (self.graphs().1.remove(&graph), self.enter()) {
            // SAFETY: its last use; the driver waits for a launch that still runs.
            let _ = unsafe { sys::cuGraphExecDestroy(exec) };
        }
    }

    fn has_groups(&self, needed: bool) -> bool {
        needed || group::is_present()
    }

    fn group_id(&self) -> Result<Vec<u8>, CudaError> {
        self.enter()?;
        group::new_id()
    }

    fn join_group(&self, id: &[u8], rank: usize, world: usize) -> Result<(), CudaError> {
        self.enter()?;
        let mut joined = Group::join(id, rank, world, &self.left)?;
        let mut group = locked(&self.group);
        if self.left.load(Ordering::SeqCst) {
            joined.abort();
        }
        *group = Some(joined);
        Ok(())
    }

    fn sum_over_group(&self, arrays: &[(u64, usize)]) -> Result<(), CudaError> {
        self.enter()?;
        match &mut *locked(&self.group) {
            Some(group) => group.sum(&self.stream, arrays, &self.left),
            None => Err(CudaError::Launch("sums over a group that was not joined".into())),
        }
    }

    fn finish_group_sums(&self) -> Result<(), CudaError> {
        self.enter()?;
        locked(&self.group).as_ref().map_or(Ok(()), |group| group.finish(&self.stream))
    }

    fn leave_group(&self) {
        // The thread that holds the lock waits for the other processes only as long as this is not
        // set.
        self.left.store(true, Ordering::SeqCst);
        if self.enter().is_ok()
            && let Some(group) = &mut *locked(&self.group)
        {
            group.abort();
        }
    }

    fn launch(
        &self,
        kernel: &'static Kernel,
        launch: Launch,
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        self.enter()?;
        let what = failed(kernel.name);
        let function = self.function(kernel, launch.shared)?;
        // Within the device's limits, which are `i32`.
        let grid = launch.grid.map(|g| g as u32);
        // SAFETY: the arguments are the kernel's parameters, as its source declares them: by their
        // type, and those of the code were checked when it was loaded.
        unsafe {
            let (line, early) = self.line(Next::Launch);
            if early {
                return launch_early(function, grid, launch, line, arguments).map_err(&what);
            }
            let (grid, block) = ((grid[0], grid[1], grid[2]), (launch.threads as u32, 1, 1));
            result::launch_kernel(function, grid, block, launch.shared as u32, line.0, arguments)
                .map_err(&what)
        }
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        self.enter()?;
        self.stream.synchronize().map_err(failed("the device's work"))
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn describe(&self) -> String {
        let (major, minor) = self.capability;
        // SAFETY: the device exists.
        let total = unsafe { result::device::total_mem(self.context.device) }.unwrap_or(0);
        format!("cuda, {} ({major}.{minor}), {:.1} GB", self.name, total as f64 / 1e9)
    }
}

impl Drop for Driver {
    /// Gives idle memory back and waits for the device. The fields are released after this, while
    /// the context is current. All memory has been freed by now, because memory holds this device.
    fn drop(&mut self) {
        if self.enter().is_ok() {
            self.give_up_idle();
            let _ = self.stream.synchronize();
        }
    }
}
