//! What calls return, the message of an error, and the boundary that no panic crosses.

use crate::device::cuda::CudaError;
use crate::device::{DeviceError, processors};
use crate::memory::{self, Refused};
use crate::message;
use crate::model::WeightsError;
use crate::prompt::PromptError;
use crate::session::SessionError;
use crate::tensor::OpError;
use crate::volume::{ArrayError, VolumeError};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// The result of a call. If it is not PRISM_OK, prism_last_error has a message, and outputs are
/// unchanged unless a function says otherwise.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum prism_status {
    /// Done.
    PRISM_OK = 0,
    /// An argument is invalid: NULL where a value is required, a size or position out of range, an
    /// unknown constant, a path that is not UTF-8.
    PRISM_INVALID_ARGUMENT = 1,
    /// A handle was freed, is of another kind, or is invalid.
    PRISM_INVALID_HANDLE = 2,
    /// A file cannot be read or written, or has invalid content.
    PRISM_FILE = 3,
    /// The device is not available, does not support the request, or failed.
    PRISM_DEVICE = 4,
    /// The buffer is smaller than the result. The size that is needed was stored; the buffer is
    /// unchanged.
    PRISM_BUFFER_TOO_SMALL = 5,
    /// Another thread, or the caller of a callback, is using this session; or a callback would have
    /// to wait for another call, to free or to replace what it uses.
    PRISM_BUSY = 6,
    /// A progress callback returned 0, or prism_session_cancel was called.
    PRISM_CANCELLED = 7,
    /// There is nothing to undo, redo or read yet.
    PRISM_NOTHING = 8,
    /// The prompts cannot be used with this volume: there are none, one lies outside, or a position
    /// or logit is NaN or infinite.
    PRISM_PROMPT = 9,
    /// A bug in the library. The handle can still be used; please report the message.
    PRISM_INTERNAL = 10,
    /// The budget or the system refuses the memory that the call would take. Everything that
    /// existed before still does.
    PRISM_OUT_OF_MEMORY = 11,
    /// This process is a fork of one that used the library, whose threads do not exist here.
    /// Nothing was done.
    PRISM_FORKED = 12,
    /// The network's result is not finite: its weights do not fit the scan's values, or the
    /// precision that it runs in. The session is as it was.
    PRISM_NOT_FINITE = 13,
}

use prism_status::*;

/// A call's failure.
pub(super) struct Failure {
    pub status: prism_status,
    pub message: String,
}

impl Failure {
    pub fn new(status: prism_status, message: impl Into<String>) -> Failure {
        Failure { status, message: message.into() }
    }

    pub fn argument(message: impl Into<String>) -> Failure {
        Failure::new(PRISM_INVALID_ARGUMENT, message)
    }

    pub fn null(what: &str) -> Failure {
        Failure::argument(format!("{what} is NULL"))
    }
}

macro_rules! failures {
    ($($error:ty => $status:ident),* $(,)?) => {
        $(impl From<$error> for Failure {
            fn from(e: $error) -> Failure {
                Failure::new($status, e.to_string())
            }
        })*
    };
}
failures! {
    DeviceError => PRISM_DEVICE,
    CudaError => PRISM_DEVICE,
    Refused => PRISM_OUT_OF_MEMORY,
    ArrayError => PRISM_INVALID_ARGUMENT,
}

impl From<PromptError> for Failure {
    fn from(e: PromptError) -> Failure {
        match e {
            PromptError::Unfit(message) => Failure::new(PRISM_PROMPT, message),
            PromptError::Memory(e) => e.into(),
        }
    }
}

impl From<WeightsError> for Failure {
    fn from(e: WeightsError) -> Failure {
        let is_memory = match &e {
            WeightsError::Memory { .. } => true,
            WeightsError::Io { source, .. } => source.kind() == std::io::ErrorKind::OutOfMemory,
            _ => false,
        };
        let status = if is_memory { PRISM_OUT_OF_MEMORY } else { PRISM_FILE };
        Failure::new(status, e.to_string())
    }
}

impl From<VolumeError> for Failure {
    fn from(e: VolumeError) -> Failure {
        Failure::new(if e.refused { PRISM_OUT_OF_MEMORY } else { PRISM_FILE }, e.to_string())
    }
}

impl From<OpError> for Failure {
    fn from(e: OpError) -> Failure {
        let status = match &e {
            OpError::Cancelled => PRISM_CANCELLED,
            OpError::Cuda(_) => PRISM_DEVICE,
            OpError::Memory(_) => PRISM_OUT_OF_MEMORY,
            OpError::File(_) => PRISM_FILE,
            OpError::Shape { .. } | OpError::Argument { .. } => PRISM_INTERNAL,
        };
        Failure::new(status, e.to_string())
    }
}

impl From<SessionError> for Failure {
    fn from(e: SessionError) -> Failure {
        match e {
            SessionError::Op(e) => e.into(),
            SessionError::Memory(e) => e.into(),
            SessionError::NotFinite { .. } => Failure::new(PRISM_NOT_FINITE, e.to_string()),
            e => Failure::new(PRISM_PROMPT, e.to_string()),
        }
    }
}

thread_local! {
    /// The message of this thread's last call that failed.
    static LAST: RefCell<CString> = RefCell::default();
    /// The number of calls that this thread is within, more than one in a callback; and where it
    /// panicked there.
    static INSIDE: Cell<usize> = const { Cell::new(0) };
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Text for C, as [`message::shown`]: nothing after a NUL could be read.
pub(super) fn text(text: &str) -> CString {
    CString::new(message::shown(text).as_bytes()).unwrap_or_default()
}

fn remember(failure: Failure) -> prism_status {
    LAST.with_borrow_mut(|last| *last = text(&failure.message));
    failure.status
}

/// Makes sure that volumes are read and resampled by no more threads than there are processors,
/// whatever the variables say from which the number of these threads is taken.
fn bound_threads() {
    let most = processors();
    let asked = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok();
    let names = ["RAYON_NUM_THREADS", "RAYON_RS_NUM_CPUS"];
    if names.into_iter().filter_map(asked).any(|threads| threads > most) {
        // An error means that they already run, in a program in Rust that uses them too.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(most).build_global();
    }
}

/// Prepares the first call. Panics within calls are recorded, not printed; all others go where they
/// went before.
fn begin() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        bound_threads();
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            match INSIDE.get() > 0 || is_of_the_library(std::thread::current().name()) {
                true => PANIC.with_borrow_mut(|panic| *panic = info.to_string()),
                false => before(info),
            }
        }));
    });
}

/// Whether a thread is one that the library works with: the call that it works for reports its
/// panics.
fn is_of_the_library(name: Option<&str>) -> bool {
    name.is_some_and(|n| n.starts_with("prism-"))
}

/// Whether this call comes from a callback of another.
pub(super) fn is_nested() -> bool {
    INSIDE.get() > 1
}

/// The process that uses the library.
static PROCESS: AtomicU32 = AtomicU32::new(0);

/// An error in a fork of the process that made the first call: threads do not survive a fork, and
/// locks stay as they were.
fn check_process() -> Result<(), Failure> {
    let this = std::process::id();
    match PROCESS.compare_exchange(0, this, Ordering::Relaxed, Ordering::Relaxed) {
        Err(first) if first != this => Err(Failure::new(
            PRISM_FORKED,
            format!(
                "process {this} is a fork of {first}, which uses the library, and has none of its threads: fork before the first call, or start a new program"
            ),
        )),
        _ => Ok(()),
    }
}

/// The body of every call.
pub(super) fn call(body: impl FnOnce() -> Result<(), Failure>) -> prism_status {
    if let Err(failure) = check_process() {
        return remember(failure);
    }
    begin();
    let outer = INSIDE.replace(INSIDE.get() + 1);
    if outer == 0 {
        PANIC.take();
    }
    let result = catch_unwind(AssertUnwindSafe(body));
    INSIDE.set(outer);
    match result {
        Ok(Ok(())) => PRISM_OK,
        Ok(Err(failure)) => remember(failure),
        Err(payload) => remember(
            match memory::of_panic(payload)
                .map(OpError::from)
                .or_else(|payload| payload.downcast().map(|e| *e))
            {
                Ok(refused) => {
                    PANIC.take();
                    refused.into()
                }
                Err(payload) => Failure::new(
                    PRISM_INTERNAL,
                    format!("internal error: {}", what_panicked(&*payload)),
                ),
            },
        ),
    }
}

/// The message of a panic, with its location if it was on this thread.
fn what_panicked(payload: &(dyn Any + Send)) -> String {
    let here = PANIC.take();
    if !here.is_empty() {
        return here;
    }
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without a message")
        .to_string()
}

/// The message of the last failed call on this thread, naming the file, argument or voxel and what
/// was expected; "" if none failed. It is valid until the next failed call on this thread; do not
/// free it.
#[unsafe(no_mangle)]
pub extern "C" fn prism_last_error() -> *const c_char {
    LAST.with_borrow(|last| last.as_ptr())
}

/// The name of a status, for example "PRISM_BUSY"; "unknown status" for any other number. The text
/// is owned by the library and stays valid.
#[unsafe(no_mangle)]
pub extern "C" fn prism_status_name(status: i32) -> *const c_char {
    const NAMES: [&CStr; 14] = [
        c"PRISM_OK",
        c"PRISM_INVALID_ARGUMENT",
        c"PRISM_INVALID_HANDLE",
        c"PRISM_FILE",
        c"PRISM_DEVICE",
        c"PRISM_BUFFER_TOO_SMALL",
        c"PRISM_BUSY",
        c"PRISM_CANCELLED",
        c"PRISM_NOTHING",
        c"PRISM_PROMPT",
        c"PRISM_INTERNAL",
        c"PRISM_OUT_OF_MEMORY",
        c"PRISM_FORKED",
        c"PRISM_NOT_FINITE",
    ];
    usize::try_from(status).ok().and_then(|s| NAMES.get(s)).unwrap_or(&c"unknown status").as_ptr()
}

/// A caller's text.
///
/// # Safety
/// NULL, or ends with a NUL.
pub(super) unsafe fn str_of<'a>(pointer: *const c_char, what: &str) -> Result<&'a str, Failure> {
    if pointer.is_null() {
        return Err(Failure::null(what));
    }
    // SAFETY: guaranteed by the caller.
    let bytes = unsafe { CStr::from_ptr(pointer) };
    bytes
        .to_str()
        .map_err(|_| Failure::argument(format!("{what} is not UTF-8: {}", bytes.to_string_lossy())))
}

/// Stores a result.
///
/// # Safety
/// NULL, or a place for a T.
pub(super) unsafe fn store<T>(place: *mut T, what: &str, value: T) -> Result<(), Failure> {
    if place.is_null() {
        return Err(Failure::null(what));
    }
    // SAFETY: guaranteed by the caller.
    unsafe { place.write_unaligned(value) };
    Ok(())
}

/// A structure that carries its size in its first field, so that later versions can grow. All its
/// bytes may be 0.
pub(super) trait VersionedStruct: Copy {
    const NAME: &'static str;
    /// The size before fields were added; those are 0 for a program that does not know them.
    const LEAST: usize = size_of::<Self>();
}

/// The number of bytes of such a structure that both sides know.
fn known<T: VersionedStruct>(size: usize) -> Result<usize, Failure> {
    if size >= T::LEAST {
        return Ok(size.min(size_of::<T>()));
    }
    let known = size_of::<T>();
    Err(Failure::argument(format!(
        "struct_size of {} is {size}, expected {known}: set it to sizeof({})",
        T::NAME,
        T::NAME
    )))
}

/// Reads such a structure.
///
/// # Safety
/// NULL, or as many bytes as its first field says.
pub(super) unsafe fn read_struct<T: VersionedStruct>(place: *const T) -> Result<T, Failure> {
    if place.is_null() {
        return Err(Failure::null(T::NAME));
    }
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: guaranteed by the caller; the size comes first, and zeros are values of all fields.
    unsafe {
        let bytes = known::<T>(place.cast::<usize>().read_unaligned())?;
        value.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(place.cast::<u8>(), bytes);
        Ok(value.assume_init())
    }
}

/// Fills such a structure in; its size stays as the caller has set it.
///
/// # Safety
/// As [`read_struct`], to write.
pub(super) unsafe fn write_struct<T: VersionedStruct>(
    place: *mut T,
    mut value: T,
) -> Result<(), Failure> {
    if place.is_null() {
        return Err(Failure::null(T::NAME));
    }
    // SAFETY: guaranteed by the caller; the size comes first in both.
    unsafe {
        let size = place.cast::<usize>().read_unaligned();
        let bytes = known::<T>(size)?;
        (&raw mut value).cast::<usize>().write(size);
        place.cast::<u8>().copy_from_nonoverlapping((&raw const value).cast::<u8>(), bytes);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Cpu;

    fn last() -> String {
        // SAFETY: the library's text, until this thread's next call that fails.
        unsafe { CStr::from_ptr(prism_last_error()) }.to_string_lossy().into_owned()
    }

    #[test]
    fn a_panic_on_a_thread_of_the_pool_is_told_by_the_call_that_it_worked_for() {
        let cpu = Cpu::new(2).unwrap();
        let on_the_pool = |work: fn(usize)| {
            call(|| {
                cpu.for_each(16, |unit| {
                    if unit == 11 {
                        assert!(is_of_the_library(std::thread::current().name()));
                        work(unit);
                    }
                });
                Ok(())
            })
        };
        assert_eq!(on_the_pool(|unit| panic!("unit {unit} has a fault")), PRISM_INTERNAL);
        assert_eq!(last(), "internal error: unit 11 has a fault");
        assert_eq!(on_the_pool(|_| panic!("a fault")), PRISM_INTERNAL);
        assert_eq!(last(), "internal error: a fault");
        // One on the caller's own thread comes with its location, and without what panicked before.
        assert_eq!(call(|| panic!("at home")), PRISM_INTERNAL);
        let said = last();
        assert!(said.contains("status.rs:") && said.ends_with("at home"), "{said}");
        // Memory that is refused to a thread is no fault.
        let refused = |_: usize| drop(memory::zeroed::<u8>("a test", usize::MAX / 2));
        assert_eq!(on_the_pool(refused), PRISM_OUT_OF_MEMORY);
        assert!(last().starts_with("out of memory: a test"), "{}", last());
        // Work goes on, on the same threads.
        assert_eq!(on_the_pool(|_| {}), PRISM_OK);
    }

    #[test]
    fn memory_that_is_refused_to_prompts_is_told_apart() {
        let refused = memory::refused::<u8>("a test", 1);
        let failure = Failure::from(PromptError::from(refused));
        assert_eq!(failure.status, PRISM_OUT_OF_MEMORY);
        assert!(failure.message.starts_with("out of memory: "), "{}", failure.message);
        assert_eq!(Failure::from(PromptError::Unfit("odd".into())).status, PRISM_PROMPT);
    }
}
