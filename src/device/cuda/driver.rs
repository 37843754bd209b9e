//! The launcher's first body: a GPU through the CUDA driver.
//!
//! The driver and NVRTC are loaded when first asked for, after their presence was probed, so that a
//! machine without them gets an error and nothing panics. Memory comes from the device's own
//! stream-ordered pool, which keeps what is freed; modules are compiled for the device's
//! architecture when one of their kernels is first launched.

use super::chain::{Chain, Next};
use super::group::{self, Group};
use super::idle::Idle;
use super::nvrtc;
use super::source::Kernel;
use super::staging::{self, Turns};
use super::{CudaError, Launch, Launcher, Limits};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

/// Compute capability from which on kernels are written for.
const LEAST: (i32, i32) = (8, 0);
/// Compute capability, and driver's version, from which on a recorded launch may begin before the
/// one in front of it is over: every kernel waits for that one itself, and says when it may be
/// followed so (`await_turn` in `kernels/lib/base.cuh`).
const OVERLAPPING: ((i32, i32), i32) = ((9, 0), 12040);
/// Environment variables that switch off the early launches and the branches of what is recorded,
/// and the token path's own launches: so that it can be told what each gives, and whether it is to
/// blame for something.
const OVERLAP: &str = "PRISM_CUDA_OVERLAP";
const BRANCHES: &str = "PRISM_CUDA_BRANCHES";
const TOKENS: &str = "PRISM_CUDA_TOKENS";
const IDLE: &str = "PRISM_CUDA_IDLE";
/// More parameters than any kernel has.
const MOST_PARAMETERS: usize = 64;
/// Shared memory that a block gets without asking.
const PLAIN_SHARED: usize = 48 << 10;

/// The device's primary context.
struct Context {
    device: sys::CUdevice,
    handle: sys::CUcontext,
}

impl Context {
    /// Makes it the calling thread's.
    fn enter(&self) -> Result<(), DriverError> {
        // SAFETY: it is there as long as this.
        unsafe { result::ctx::set_current(self.handle) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, and nothing of it is left.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// A stream of the context that is current.
pub(super) struct Stream(sys::CUstream);

impl Stream {
    pub(super) fn new() -> Result<Stream, DriverError> {
        result::stream::create(result::stream::StreamKind::NonBlocking).map(Stream)
    }

    /// One whose blocks go before those of others.
    fn urgent() -> Result<Stream, DriverError> {
        let (_, first) = result::stream::get_priority_range()?;
        let kind = result::stream::StreamKind::NonBlocking;
        result::stream::create_with_priority(kind, first).map(Stream)
    }

    pub(super) fn handle(&self) -> sys::CUstream {
        self.0
    }

    /// Waits for its work.
    pub(super) fn synchronize(&self) -> Result<(), DriverError> {
        // SAFETY: the stream is this one's own.
        unsafe { result::stream::synchronize(self.0) }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: its last use; the driver ends its work first.
        let _ = unsafe { result::stream::destroy(self.0) };
    }
}

/// An event of the context that is current.
pub(super) struct Event(sys::CUevent);

impl Event {
    /// To wait for.
    pub(super) fn new() -> Result<Event, DriverError> {
        result::event::create(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING).map(Event)
    }

    /// That tells when it was.
    fn timed() -> Result<Event, DriverError> {
        result::event::create(sys::CUevent_flags_enum::CU_EVENT_DEFAULT).map(Event)
    }

    /// Is over once a stream's work so far is.
    pub(super) fn record(&self, stream: &Stream) -> Result<(), DriverError> {
        // SAFETY: the event is this one's own, the stream is there.
        unsafe { result::event::record(self.0, stream.0) }
    }

    /// Lets what a stream does next wait for it.
    pub(super) fn hold(&self, stream: &Stream) -> Result<(), DriverError> {
        // SAFETY: as above.
        unsafe {
            result::stream::wait_event(
                stream.0,
                self.0,
                sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT,
            )
        }
    }

    /// Whether it is over; one that was never recorded is.
    fn is_over(&self) -> Result<bool, DriverError> {
        // SAFETY: the event is this one's own.
        match unsafe { result::event::query(self.0) } {
            Ok(()) => Ok(true),
            Err(e) if matches!(e.0, sys::CUresult::CUDA_ERROR_NOT_READY) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Waits until it is over.
    fn wait(&self) -> Result<(), DriverError> {
        // SAFETY: the event is this one's own.
        unsafe { result::event::synchronize(self.0) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: its last use.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

/// In the order in which its parts are given back, the context last.
pub struct Driver {
    group: Mutex<Option<Group>>,
    staging: Mutex<Staging>,
    /// Where copies from the device arrive.
    arrival: Mutex<Pinned>,
    stream: Stream,
    branch: Branch,
    /// Whether recorded work may have branches.
    branches: bool,
    /// Whether the token path has launches of its own.
    tokens: bool,
    chain: Chain,
    name: String,
    capability: (i32, i32),
    limits: Limits,
    code: Mutex<Code>,
    /// Whether small pieces of memory are kept to be lent again, and those that nobody has.
    keeps: bool,
    idle: Mutex<Idle>,
    graphs: Mutex<(u64, HashMap<u64, Graph>)>,
    /// Another process of the group is lost.
    left: AtomicBool,
    context: Context,
}

/// The branch of recorded work that is beside the main line.
struct Branch {
    /// A branch is made of what is the longer chain of small launches, so its blocks go first.
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

/// Host memory that the device reads and writes directly. Copies go through it in both directions,
/// so that none waits for the operating system.
struct Pinned {
    at: *mut c_void,
    bytes: usize,
}

impl Pinned {
    fn none() -> Pinned {
        Pinned { at: std::ptr::null_mut(), bytes: 0 }
    }

    /// Sees to it that there are so many bytes.
    ///
    /// # Safety
    /// The context is current, and no copy uses what is there.
    unsafe fn reserve(&mut self, bytes: usize) -> Result<(), CudaError> {
        if self.bytes >= bytes.max(1) {
            return Ok(());
        }
        let more = bytes.next_power_of_two().max(staging::SMALL_BYTES);
        // SAFETY: guaranteed by the caller; what came from the driver is freed once.
        unsafe {
            if !self.at.is_null() {
                let _ = result::free_host(self.at);
                (self.at, self.bytes) = (std::ptr::null_mut(), 0);
            }
            self.at = result::malloc_host(more, 0).map_err(failed("pinned memory"))?;
        }
        self.bytes = more;
        Ok(())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if !self.at.is_null() {
            // SAFETY: it came from the driver, and no copy uses it any more: the stream's work is
            // over.
            let _ = unsafe { result::free_host(self.at) };
        }
    }
}

/// Where copies to the device start from.
struct Staging {
    turns: Turns,
    /// All small places one behind the other: memory is pinned once, for that takes long.
    small: Pinned,
    large: [Pinned; staging::LARGE],
    /// Of each place, that the last copy from it is over.
    over: Vec<Event>,
    /// How often a copy waited.
    waits: u64,
}

impl Staging {
    fn new() -> Result<Staging, DriverError> {
        let (turns, small) = (Turns::default(), Pinned::none());
        let large = std::array::from_fn(|_| Pinned::none());
        let over = (0..staging::PLACES).map(|_| Event::new()).collect::<Result<_, _>>()?;
        Ok(Staging { turns, small, large, over, waits: 0 })
    }

    /// A place of so many bytes that no copy uses, and the event to record behind the next; none
    /// for what is too large.
    ///
    /// # Safety
    /// The context is current.
    unsafe fn place(&mut self, bytes: usize) -> Result<Option<(*mut u8, &Event)>, CudaError> {
        let Some(place) = self.turns.next(bytes) else {
            // What is copied from other memory is copied before the driver returns.
            self.waits += 1;
            return Ok(None);
        };
        let (over, what) = (&self.over[place], failed("the device's work"));
        if !over.is_over().map_err(&what)? {
            self.waits += 1;
            over.wait().map_err(&what)?;
        }
        // SAFETY: the small places are made once; the last copy from a large one is over. A small
        // place lies within them all.
        let at = unsafe {
            match place.checked_sub(staging::SMALL) {
                None => {
                    self.small.reserve(staging::SMALL * staging::SMALL_BYTES)?;
                    self.small.at.cast::<u8>().add(place * staging::SMALL_BYTES)
                }
                Some(large) => {
                    self.large[large].reserve(bytes)?;
                    self.large[large].at.cast()
                }
            }
        };
        Ok(Some((at, over)))
    }
}

/// Recorded work, ready to be launched.
#[derive(Clone, Copy)]
struct Graph(sys::CUgraphExec);

/// Bytes of each parameter of a function; none where the driver does not tell.
///
/// # Safety
/// A function of a module that stays loaded.
unsafe fn parameters(function: sys::CUfunction) -> Option<Vec<u8>> {
    // Drivers tell from CUDA 12.4 on; to call what an older one lacks would panic.
    // SAFETY: the driver is loaded; whatever stands under the name is not called here.
    let tells =
        unsafe { sys::culib().get::<unsafe extern "C" fn()>("cuFuncGetParamInfo".as_bytes()) }
            .is_ok();
    let most = if tells { MOST_PARAMETERS } else { 0 };
    let mut sizes: Vec<u8> = vec![];
    for at in 0..most {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: guaranteed by the caller; two numbers to write to.
        let asked = unsafe { sys::cuFuncGetParamInfo(function, at, &mut offset, &mut size) };
        match u8::try_from(size) {
            Ok(size) if asked.result().is_ok() => sizes.push(size),
            // There is no such parameter.
            _ => break,
        }
    }
    // Every kernel has parameters.
    (!sizes.is_empty()).then_some(sizes)
}

/// A launch that may begin before the one in front of it in its stream is over.
///
/// # Safety
/// The function waits for that one before it touches memory, and `arguments` are its parameters.
unsafe fn launch_early(
    function: sys::CUfunction,
    grid: [u32; 3],
    launch: Launch,
    stream: &Stream,
    arguments: &mut [*mut c_void],
) -> Result<(), DriverError> {
    let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
    value.programmaticStreamSerializationAllowed = 1;
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value,
    };
    let config = sys::CUlaunchConfig {
        gridDimX: grid[0],
        gridDimY: grid[1],
        gridDimZ: grid[2],
        blockDimX: launch.threads as u32,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.shared as u32,
        hStream: stream.0,
        attrs: &mut attribute,
        numAttrs: 1,
    };
    // SAFETY: guaranteed by the caller; the configuration lives until the call is over.
    unsafe {
        sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), std::ptr::null_mut())
    }
    .result()
}

/// Machine code on the device: a module a file of kernels, and the functions asked for so far.
#[derive(Default)]
struct Code {
    modules: HashMap<&'static str, sys::CUmodule>,
    functions: HashMap<&'static str, Function>,
}

/// A kernel's code, and how much shared memory it was allowed so far beyond what every kernel may
/// have.
#[derive(Clone, Copy)]
struct Function {
    code: sys::CUfunction,
    allowed: usize,
}

// SAFETY: the driver's handles may be used from any thread whose current context is theirs; every
// method sets it.
unsafe impl Send for Driver {}
// SAFETY: as above, by several threads at once: the driver locks its own, and what changes here is
// behind locks.
unsafe impl Sync for Driver {}
// SAFETY: handles of the context that `Driver` sets before it uses them; they are never unloaded.
unsafe impl Send for Code {}
// SAFETY: a handle of the context that `Driver` sets before it uses it.
unsafe impl Send for Graph {}
// SAFETY: it owns its memory, which any thread may free.
unsafe impl Send for Pinned {}
// SAFETY: its memory is as above, its events are handles of the context that `Driver` sets.
unsafe impl Send for Staging {}

/// The driver's version, as 12040 for 12.4; 0 where it does not tell.
fn driver_version() -> i32 {
    let mut version = 0;
    // SAFETY: writes one number.
    let _ = unsafe { sys::cuDriverGetVersion(&mut version) };
    version
}

/// Whether an environment variable leaves on what it names.
fn is_on(name: &str) -> Result<bool, CudaError> {
    switch(name, std::env::var(name).ok().as_deref())
}

/// Whether an environment variable of this value leaves on what it names.
fn switch(name: &str, value: Option<&str>) -> Result<bool, CudaError> {
    match value {
        None | Some("" | "on") => Ok(true),
        Some("off") => Ok(false),
        Some(other) => {
            Err(CudaError::Unavailable(format!("{name} is '{other}', expected on or off")))
        }
    }
}

fn failed(what: &str) -> impl Fn(DriverError) -> CudaError + '_ {
    move |e| CudaError::Launch(format!("{what}: {}", text(&e)))
}

fn text(e: &DriverError) -> String {
    e.error_string().map_or_else(|_| format!("{:?}", e.0), |s| s.to_string_lossy().into_owned())
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
            .map_err(|e| none(format!("the NVIDIA driver does not start: {}", text(&e))))?;
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
        let fail = |e: DriverError| none(text(&e));
        // SAFETY: the device exists; released when dropped.
        let handle = unsafe { result::primary_ctx::retain(device) }.map_err(fail)?;
        let context = Context { device, handle };
        context.enter().map_err(fail)?;
        let (stream, staging) = (Stream::new().map_err(fail)?, Staging::new().map_err(fail)?);
        let branch = Branch::new().map_err(fail)?;
        let able = capability >= OVERLAPPING.0 && driver_version() >= OVERLAPPING.1;
        let (overlaps, branches, tokens) = (is_on(OVERLAP)?, is_on(BRANCHES)?, is_on(TOKENS)?);
        let keeps = is_on(IDLE)?;
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
            chain,
            name,
            capability,
            limits,
            code,
            keeps,
            idle,
            graphs,
            left: AtomicBool::new(false),
            context,
        })
    }

    fn enter(&self) -> Result<(), CudaError> {
        self.context.enter().map_err(failed("the device's context"))
    }

    /// Where the launch, the copy on the device or the clearing that comes next goes, and whether
    /// it may begin early.
    fn line(&self, next: Next) -> (&Stream, bool) {
        let (branched, early) = self.chain.next(next);
        (if branched { &self.branch.stream } else { &self.stream }, early)
    }

    /// The name of its machine code. Of the newer architectures only those with instructions of
    /// their own need the suffix.
    fn arch(&self) -> String {
        let (major, minor) = self.capability;
        if self.capability == (9, 0) { "sm_90a".into() } else { format!("sm_{major}{minor}") }
    }

    /// At least so many bytes of pinned memory for a copy from the device to arrive in; none for
    /// copies that are too large or empty.
    fn arrival(&self, bytes: usize) -> Result<Option<MutexGuard<'_, Pinned>>, CudaError> {
        if bytes == 0 || bytes > staging::MOST_BYTES {
            return Ok(None);
        }
        let mut pinned = self.arrival.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: callers have entered the context; whoever had this waited for the copy.
        unsafe { pinned.reserve(bytes) }?;
        Ok(Some(pinned))
    }

    fn graphs(&self) -> MutexGuard<'_, (u64, HashMap<u64, Graph>)> {
        self.graphs.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Gives idle memory back to the driver; whether there was any.
    fn give_up_idle(&self) -> bool {
        let all = self.idle().give_up();
        for address in &all {
            // SAFETY: came from `allocate`, and nobody has it. A failure here was one of an earlier
            // launch, which the next call reports.
            let _ = unsafe { result::free_async(*address, self.stream.0) };
        }
        !all.is_empty()
    }

    /// A kernel's function, allowed so much shared memory; an error unless it was built with the
    /// parameters that its source declares.
    fn function(
        &self,
        kernel: &'static Kernel,
        shared: usize,
    ) -> Result<sys::CUfunction, CudaError> {
        let Code { modules, functions } = &mut *self.code.lock().unwrap_or_else(|e| e.into_inner());
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

    /// The function of a kernel that was not asked for before.
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
                    let code = nvrtc::code_of(file, &self.arch())?;
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
            // SAFETY: came from `allocate`, and nothing later uses it. A failure here was one of an
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
        let mut staging = self.staging.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: the context was entered.
        let Some((place, over)) = unsafe { staging.place(bytes) }? else {
            let mut values = vec![0u64; bytes.div_ceil(8)];
            let values = &mut bytemuck::cast_slice_mut(&mut values)[..bytes];
            write(values);
            // SAFETY: `Cuda` checked that its memory there has so many bytes; from pageable memory
            // the driver copies before it returns.
            return unsafe { result::memcpy_htod_async(address, values, self.stream.0) }
                .map_err(failed(what));
        };
        // SAFETY: `Cuda` checked that its memory there has so many bytes; so many has the place,
        // which no earlier copy reads any more.
        unsafe {
            let from = std::slice::from_raw_parts_mut(place, bytes);
            write(from);
            result::memcpy_htod_async(address, from, self.stream.0).map_err(failed(what))?;
            over.record(&self.stream).map_err(failed(what))
        }
    }

    fn waits(&self) -> u64 {
        self.staging.lock().unwrap_or_else(|e| e.into_inner()).waits
    }

    fn download(&self, address: u64, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.enter()?;
        let what = "a copy from the device";
        let pinned = self.arrival(bytes.len())?;
        // SAFETY: `Cuda` checked that its memory there has so many bytes, and waits here for them;
        // so many are pinned.
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
            let mut values = vec![0; bytes];
            self.download(address, &mut values)?;
            read(&values);
            return Ok(());
        };
        // SAFETY: `Cuda` checked that its memory there has so many bytes, and waits here for them;
        // so many are pinned, and initialised by then.
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
                format!(
                    "{}.{}, compiled for {}",
                    self.capability.0,
                    self.capability.1,
                    self.arch()
                ),
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
                let branches = if self.branches { "in branches" } else { "one behind the other" };
                format!("{early}, {branches}")
            }),
            ("driver", format!("CUDA {}.{}", version / 1000, version % 1000 / 10)),
            ("NVRTC", nvrtc),
            (
                "compiled kernels",
                nvrtc::cache_folder()
                    .map_or_else(|| "not kept".into(), |f| f.display().to_string()),
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
        // SAFETY: the stream is this one's own; the graph is dropped once it was made executable,
        // and what was made of it where it is not kept.
        let exec = unsafe {
            let graph =
                result::stream::end_capture(self.stream.0).map_err(failed("a recording"))?;
            let mut exec = std::ptr::null_mut();
            // So that a branch goes first when replayed, too.
            let flag =
                sys::CUgraphInstantiate_flags_enum::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY;
            let made = sys::cuGraphInstantiateWithFlags(&mut exec, graph, flag.0.into())
                .result()
                .map_err(failed("a recording"));
            let _ = sys::cuGraphDestroy(graph);
            made?;
            // So that its first launch takes no longer than others.
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
        // SAFETY: the stream is this one's own, and nobody has the graph. One that broke gives
        // none, but is over too.
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
        let mut group = self.group.lock().unwrap_or_else(|e| e.into_inner());
        if self.left.load(Ordering::SeqCst) {
            joined.abort();
        }
        *group = Some(joined);
        Ok(())
    }

    fn sum_over_group(&self, arrays: &[(u64, usize)]) -> Result<(), CudaError> {
        self.enter()?;
        match &mut *self.group.lock().unwrap_or_else(|e| e.into_inner()) {
            Some(group) => group.sum(&self.stream, arrays, &self.left),
            None => Err(CudaError::Launch("sums over a group that was not joined".into())),
        }
    }

    fn finish_group_sums(&self) -> Result<(), CudaError> {
        self.enter()?;
        self.group
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .as_ref()
            .map_or(Ok(()), |group| group.finish(&self.stream))
    }

    fn leave_group(&self) {
        // Who has the lock waits for the others at the most as long as this is not set.
        self.left.store(true, Ordering::SeqCst);
        if self.enter().is_ok()
            && let Some(group) = &mut *self.group.lock().unwrap_or_else(|e| e.into_inner())
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
    /// Its parts are given back behind this, while the context is current. All memory is gone: it
    /// holds this device.
    fn drop(&mut self) {
        if self.enter().is_ok() {
            self.give_up_idle();
            let _ = self.stream.synchronize();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_are_on_or_off() {
        let values = [None, Some(""), Some("on"), Some("off")];
        assert_eq!(values.map(|value| switch(OVERLAP, value).unwrap()), [true, true, true, false]);
        let failure = switch(BRANCHES, Some("0")).unwrap_err().to_string();
        assert!(failure.ends_with("PRISM_CUDA_BRANCHES is '0', expected on or off"), "{failure}");
    }
}
