//! The memory budget: allocations that are counted, and that can be refused.
//!
//! A program sets the budget with [`set_limit`], and calls those functions of the library that
//! return no `Result` within [`caught`].
//!
//! Every size that comes from a file, a flag, a caller or a configuration is first counted against
//! a budget ([`limit`]), then requested from the system in a way that it may refuse. A refusal is
//! an error for the caller ([`Refused`]), never the end of the process: a scan is not read, a model
//! not loaded, an interaction not done, and everything that existed before still does.
//!
//! Deep inside an op a refusal unwinds, as cancelling would, without a message from the panic hook,
//! to where the work began ([`caught`]): sessions, models, files, each call from C. So a program
//! built with `panic = "abort"` ends where it is refused memory.
//!
//! What is small whatever the input (names, messages, lists of handles) is allocated as everywhere
//! in Rust.
//!
//! Sizes that come from outside are multiplied only by [`extent`], so that no product wraps.

use crate::sync::locked;
use std::alloc::{GlobalAlloc, Layout, System};
use std::any::Any;
use std::cell::Cell;
use std::collections::HashMap;
use std::fs::File;
use std::hash::Hash;
use std::io::{self, Read, Write};
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

/// Why memory was refused: what it was for, how much it would take, and how much is left.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("out of memory: {what} would take {}, {}", bytes(*.wanted), self.reason())]
pub struct Refused {
    what: &'static str,
    wanted: u64,
    /// What is left of the budget, and the budget; none if the system refused.
    left: Option<[u64; 2]>,
}

impl Refused {
    /// Whether the budget refused it, and would not have with so many bytes more.
    pub(crate) fn fits_with(&self, more: u64) -> bool {
        self.left.is_some_and(|[left, _]| self.wanted <= left.saturating_add(more))
    }

    /// How many bytes more it would take.
    fn lacking(&self) -> u64 {
        self.left.map_or(u64::MAX, |[left, _]| self.wanted.saturating_sub(left))
    }

    fn reason(&self) -> String {
        match self.left {
            Some([left, limit]) => format!("{} of {} are left", bytes(left), bytes(limit)),
            None => "which the system refused".into(),
        }
    }
}

/// A number of bytes, as text for people.
pub(crate) fn bytes(n: u64) -> String {
    match n {
        0..1_000_000 => format!("{:.1} kB", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.1} GB", n as f64 / 1e9),
    }
}

/// The budget that was set; 0 for what the machine has.
static LIMIT: AtomicU64 = AtomicU64::new(0);
/// Bytes that are charged to it.
static USED: AtomicU64 = AtomicU64::new(0);

/// Sets how many bytes this process may use for scans, weights, features and answers; 0 for what
/// the machine has, the default.
///
/// It holds for the whole process, from now on: what is in use already stays, and counts.
pub fn set_limit(bytes: u64) {
    LIMIT.store(bytes, Ordering::Relaxed);
}

/// Whether [`set_limit`] set a budget.
pub(crate) fn is_set() -> bool {
    LIMIT.load(Ordering::Relaxed) != 0
}

/// How many bytes this process may use: what [`set_limit`] set, otherwise what the machine, or the
/// control group that the process runs in, has.
pub fn limit() -> u64 {
    match LIMIT.load(Ordering::Relaxed) {
        0 => machine(),
        set => set,
    }
}

/// How many bytes of the budget are in use: the sum of all [`Charge`]s that exist.
pub fn used() -> u64 {
    USED.load(Ordering::Relaxed)
}

/// The memory of the machine, or of the control group that the process runs in.
fn machine() -> u64 {
    static MACHINE: OnceLock<u64> = OnceLock::new();
    *MACHINE.get_or_init(|| {
        // Miri does not support all the system calls that are needed here.
        if cfg!(miri) {
            return u64::MAX;
        }
        let mut system = sysinfo::System::new();
        system.refresh_memory();
        match system.total_memory() {
            // If that is unknown, only the system's own refusals remain.
            0 => u64::MAX,
            bytes => bytes.min(system.cgroup_limits().map_or(u64::MAX, |group| group.total_memory)),
        }
    })
}

/// The number of values of a shape: the product of its axes, 1 without any.
///
/// None if that product overflows, where an axis of length 0 counts as 1: axes are multiplied to
/// strides too, and an access by a stride that wrapped could be out of bounds.
///
/// ```
/// use prism::memory::extent;
///
/// assert_eq!(extent(&[2, 3, 4]), Some(24));
/// assert_eq!(extent(&[0, 5]), Some(0));
/// assert_eq!(extent(&[2, usize::MAX]), None);
/// ```
pub fn extent(shape: &[usize]) -> Option<usize> {
    // An axis of 0 does not excuse others whose product wraps, because they are strides.
    let count = shape.iter().try_fold(1usize, |n, s| n.checked_mul((*s).max(1)))?;
    Some(if shape.contains(&0) { 0 } else { count })
}

/// Bytes of `count` values.
fn size<T>(count: usize) -> u64 {
    (count as u64).saturating_mul(size_of::<T>() as u64)
}

/// From this size on, if no budget was set, the machine is asked how much is free: other programs
/// use memory too.
const LARGE: u64 = 256 << 20;

/// The functions that give back memory that is kept for later use and is not in use now.
static SPARE: Mutex<Vec<fn()>> = Mutex::new(vec![]);

/// Registers `give_back` to be called when a request does not fit; the request is then checked
/// again. The thread that asks for memory may hold locks: `give_back` must wait for none of them.
pub(crate) fn when_short(give_back: fn()) {
    let mut spare = locked(&SPARE);
    if !spare.iter().any(|other| std::ptr::fn_addr_eq(*other, give_back)) {
        spare.push(give_back);
    }
}

/// Gives up what would have to be made again.
static REMADE: OnceLock<fn(u64) -> bool> = OnceLock::new();

/// Registers `give_up` to be called with the bytes that a request lacks when all else is given
/// back, until the request fits, or nothing was given up, for which it returns false. What holds
/// for locks in [`when_short`] holds here.
pub(crate) fn before_refusal(give_up: fn(u64) -> bool) {
    let _ = REMADE.set(give_up);
}

/// Gives memory that is kept for later use back to the system: for a process that may be idle for
/// a long time.
#[cfg(feature = "serve")]
pub(crate) fn give_back() {
    give_back_spare();
    // The C library keeps most of the freed memory, in one heap for every few threads.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it takes a number of bytes and may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Gives what is held for later use and used by nothing back, except what would have to be made
/// again.
pub(crate) fn give_back_spare() {
    // The list is not locked while one of them runs.
    let at = |n: usize| locked(&SPARE).get(n).copied();
    (0..).map_while(at).for_each(|give_back| give_back());
}

/// An error unless `count` values of a type would fit.
pub(crate) fn check<T>(what: &'static str, count: usize) -> Result<(), Refused> {
    let mut fit = fits::<T>(what, count);
    // For what is larger than all of the budget, nothing is given back.
    if fit.is_ok() || size::<T>(count) > limit() {
        return fit;
    }
    give_back_spare();
    fit = fits::<T>(what, count);
    if let Some(give_up) = REMADE.get() {
        while let Err(refused) = &fit
            && give_up(refused.lacking())
        {
            fit = fits::<T>(what, count);
        }
    }
    fit
}

fn fits<T>(what: &'static str, count: usize) -> Result<(), Refused> {
    let wanted = size::<T>(count);
    // More than any address reaches is refused whatever the budget, so that sizes in bytes can be
    // counted after this.
    if wanted > isize::MAX as u64 {
        return Err(refused::<T>(what, count));
    }
    let limit = limit();
    let left = if wanted >= LARGE { left() } else { limit.saturating_sub(used()) };
    if wanted <= left { Ok(()) } else { Err(Refused { what, wanted, left: Some([left, limit]) }) }
}

/// How many bytes are left: of the budget, and, if none was set, of what the machine and the
/// control group have free at present.
pub(crate) fn left() -> u64 {
    let left = limit().saturating_sub(used());
    // Miri does not support all the system calls that are needed here.
    if is_set() || cfg!(miri) {
        return left;
    }
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    if system.total_memory() == 0 {
        return left;
    }
    // The memory that a group's processes hold; its file caches are given up for them.
    let group = system
        .cgroup_limits()
        .map_or(u64::MAX, |group| group.total_memory.saturating_sub(group.rss));
    left.min(system.available_memory()).min(group)
}

/// A number of bytes counted against the budget, given back when dropped.
///
/// It allocates nothing itself: it goes with memory that is allocated elsewhere.
#[derive(Debug, Default)]
pub struct Charge(u64);

impl Charge {
    /// Counts `count` values of type `T` against the budget; `what` names them in the error.
    ///
    /// # Errors
    /// Less than that is left.
    pub fn of<T>(what: &'static str, count: usize) -> Result<Charge, Refused> {
        let (wanted, limit) = (size::<T>(count), limit());
        let within = |used: u64| used.checked_add(wanted).filter(|sum| *sum <= limit);
        loop {
            check::<T>(what, count)?;
            // Other threads may have taken what was left meanwhile.
            if USED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok() {
                return Ok(Charge(wanted));
            }
        }
    }

    /// Counts `count` more values of type `T`.
    ///
    /// # Errors
    /// Less than that is left: the charge is unchanged.
    pub fn grow<T>(&mut self, what: &'static str, count: usize) -> Result<(), Refused> {
        let mut more = Charge::of::<T>(what, count)?;
        self.0 += std::mem::take(&mut more.0);
        Ok(())
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        USED.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// Values that are charged for as long as they are held.
pub(crate) struct Charged<T> {
    values: Vec<T>,
    _charge: Charge,
}

impl<T> Charged<T> {
    /// Charges values; unwinds to [`caught`] if that is refused.
    pub(crate) fn new(what: &'static str, values: Vec<T>) -> Charged<T> {
        let charge = Charge::of::<T>(what, values.capacity()).unwrap_or_else(|e| refuse(e));
        Charged { values, _charge: charge }
    }
}

impl<T> Default for Charged<T> {
    fn default() -> Charged<T> {
        Charged { values: vec![], _charge: Charge::default() }
    }
}

impl<T> Deref for Charged<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.values
    }
}

thread_local! {
    /// Whether the code that asks for memory on this thread at present can handle a refusal.
    static REFUSABLE: Cell<bool> = const { Cell::new(false) };
}

/// Asks for memory in a way that can be refused: [`LastWords`] does not end the process then.
pub(crate) fn refusable<T>(ask: impl FnOnce() -> T) -> T {
    // Restored even if the request panics, as decompressors do.
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            REFUSABLE.set(self.0);
        }
    }
    let _before = Before(REFUSABLE.replace(true));
    ask()
}

/// What is to be done before the process ends for lack of memory.
static LAST: OnceLock<fn()> = OnceLock::new();

/// Registers `last` to be called before [`LastWords`] ends the process. It may be called in the
/// middle of anything that the thread was doing.
pub(crate) fn before_last_words(last: fn()) {
    let _ = LAST.set(last);
}

/// The system's allocator, for a program that should end in order when memory runs out rather than
/// abort.
///
/// Small allocations, and those of other crates, are not requested in a way that can be refused: if
/// the system refuses one, nothing can go on, so temporary files are removed, a message is written
/// to standard error, and the process ends with status 1.
///
/// The library never installs it; the program `prism` does.
pub struct LastWords;

impl LastWords {
    fn given(&self, at: *mut u8, bytes: usize) -> *mut u8 {
        if at.is_null() && !REFUSABLE.try_with(Cell::get).unwrap_or(true) {
            // Nothing below allocates except for unusually long names of files.
            REFUSABLE.set(true);
            if let Some(last) = LAST.get() {
                last();
            }
            let _ = writeln!(
                io::stderr(),
                "error: out of memory: the system refused {bytes} more bytes"
            );
            std::process::exit(1);
        }
        at
    }
}

// SAFETY: all memory is the system allocator's, requested and given back unchanged; the additional
// work does not unwind.
unsafe impl GlobalAlloc for LastWords {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        self.given(unsafe { System.alloc(layout) }, layout.size())
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        self.given(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        self.given(unsafe { System.realloc(at, layout, size) }, size)
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise; all memory came from this allocator.
        unsafe { System.dealloc(at, layout) }
    }
}

/// An error that says that the system refused `count` values of a type.
pub(crate) fn refused<T>(what: &'static str, count: usize) -> Refused {
    Refused { what, wanted: size::<T>(count), left: None }
}

/// An empty list with room for `count` values; `what` names them in the error.
///
/// The budget is only checked: where the list is to count against it, a [`Charge`] is kept with it.
///
/// # Errors
/// Less than that is left of the budget, or the system refuses.
pub fn room<T>(what: &'static str, count: usize) -> Result<Vec<T>, Refused> {
    check::<T>(what, count)?;
    let mut list = Vec::new();
    refusable(|| list.try_reserve_exact(count)).map_err(|_| refused::<T>(what, count))?;
    Ok(list)
}

/// An error unless there is room for allocations that are made without asking: packed matrices of a
/// product, tables of a decompressor, lists and messages.
pub(crate) fn headroom() -> Result<(), Refused> {
    room::<u8>("temporary memory", 8 << 20).map(drop)
}

/// Unwinds to [`caught`].
pub(crate) fn refuse(error: Refused) -> ! {
    resume_unwind(Box::new(error))
}

/// [`room`]; unwinds to [`caught`] if that is refused.
pub(crate) fn list<T>(what: &'static str, count: usize) -> Vec<T> {
    room(what, count).unwrap_or_else(|e| refuse(e))
}

/// `count` times a value; unwinds to [`caught`] if that is refused.
pub(crate) fn filled<T: Copy>(what: &'static str, value: T, count: usize) -> Vec<T> {
    let mut all = list(what, count);
    all.resize(count, value);
    all
}

/// `count` zeros, whose pages cost nothing until they are written; as [`filled`].
pub(crate) fn zeroed<T: bytemuck::Zeroable>(what: &'static str, count: usize) -> Vec<T> {
    if let Err(e) = check::<T>(what, count) {
        refuse(e);
    }
    refusable(|| bytemuck::allocation::try_zeroed_vec(count))
        .unwrap_or_else(|()| refuse(refused::<T>(what, count)))
}

/// The values of an iterator that knows how many it has; as [`filled`].
pub(crate) fn collected<T>(what: &'static str, values: impl ExactSizeIterator<Item = T>) -> Vec<T> {
    let mut all = list(what, values.len());
    all.extend(values);
    all
}

/// The values of an iterator that is gone through twice, first to count them; as [`filled`].
pub(crate) fn counted<T>(what: &'static str, values: impl Iterator<Item = T> + Clone) -> Vec<T> {
    let mut all = list(what, values.clone().count());
    all.extend(values);
    all
}

/// A copy; as [`filled`].
pub(crate) fn copied<T: Copy>(what: &'static str, values: &[T]) -> Vec<T> {
    let mut all = list(what, values.len());
    all.extend_from_slice(values);
    all
}

/// An empty map with room for `count` keys; as [`filled`].
pub(crate) fn map<K: Eq + Hash, V>(what: &'static str, count: usize) -> HashMap<K, V> {
    // A table is at most seven eighths full, and doubles: two places a key, or a little more.
    if let Err(e) = check::<(K, V, u8)>(what, count.saturating_mul(2)) {
        refuse(e);
    }
    let mut map = HashMap::new();
    if refusable(|| map.try_reserve(count)).is_err() {
        refuse(refused::<(K, V, u8)>(what, count));
    }
    map
}

/// Room in a list for so many values more; as [`filled`].
pub(crate) fn reserve<T>(what: &'static str, list: &mut Vec<T>, more: usize) {
    let count = list.len().saturating_add(more);
    if let Err(e) = check::<T>(what, count) {
        refuse(e);
    }
    if refusable(|| list.try_reserve(more)).is_err() {
        refuse(refused::<T>(what, count));
    }
}

/// Appends a value to a list whose length is not known before; as [`filled`] if that is refused.
pub(crate) fn push<T>(what: &'static str, list: &mut Vec<T>, value: T) {
    if list.len() == list.capacity() {
        reserve(what, list, list.len().max(1));
    }
    list.push(value);
}

/// Reads to the end; as [`filled`] if that is more than there is room for.
pub(crate) fn read(
    what: &'static str,
    mut reader: impl Read,
    into: &mut Vec<u8>,
) -> io::Result<()> {
    const FIRST: usize = 64 << 10;
    const MOST: usize = 16 << 20;
    loop {
        // Room for the whole piece: a list that is full is not grown by the reading itself, which
        // then asks for memory in a way that ends the process.
        let piece = into.len().clamp(FIRST, MOST);
        reserve(what, into, piece);
        match refusable(|| reader.by_ref().take(piece as u64).read_to_end(into)) {
            Ok(read) if read == piece => {}
            Ok(_) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::OutOfMemory => {
                refuse(refused::<u8>(what, into.len() + piece))
            }
            Err(e) => return Err(e),
        }
    }
}

/// A file; as [`filled`] if that is more than there is room for.
pub(crate) fn read_file(what: &'static str, path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut bytes = list(what, usize::try_from(size).unwrap_or(usize::MAX));
    // It may have grown meanwhile: that is damage, which its reader reports.
    file.take(size).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The refusal that a panic carries, if it does.
pub(crate) fn of_panic(payload: Box<dyn Any + Send>) -> Result<Refused, Box<dyn Any + Send>> {
    // The decompressors panic with these words if they are refused their tables: flate2's, and
    // bzip2's, whose code for that is -3.
    match payload.downcast_ref::<String>() {
        Some(text) if text.contains("MemError") || text.contains("left: -3") => {
            Ok(refused::<u8>("a compressed file's tables", 1 << 18))
        }
        _ => payload.downcast::<Refused>().map(|e| *e),
    }
}

/// Runs work, and returns as an error that memory was refused somewhere inside it. Other panics
/// continue.
///
/// # Errors
/// Memory was refused; or so little is left that the work was not begun.
pub fn caught<T>(work: impl FnOnce() -> T) -> Result<T, Refused> {
    headroom()?;
    catch_unwind(AssertUnwindSafe(work))
        .map_err(|payload| of_panic(payload).unwrap_or_else(|other| resume_unwind(other)))
}

/// The smallest size that may be given without a unit. In a smaller one the unit was probably
/// forgotten: nothing that takes a size can work with so little.
const LEAST_BARE: f64 = 1e6;

/// Reads a size as people write it, and returns it in bytes.
///
/// It is a number followed by K, M, G or T (powers of 1000) or Ki, Mi, Gi or Ti (of 1024), with or
/// without a B, in either case. A number alone is bytes; one below a million is refused, because
/// its unit was probably forgotten.
///
/// # Errors
/// It is not such a size; the message says what was expected.
///
/// ```
/// use prism::memory::size_of_text;
///
/// assert_eq!(size_of_text("8GB"), Ok(8_000_000_000));
/// assert_eq!(size_of_text("1.5 Gi"), Ok(1_610_612_736));
/// assert!(size_of_text("8").is_err());
/// ```
pub fn size_of_text(text: &str) -> Result<u64, String> {
    let fail = || {
        format!(
            "'{text}' is not a size: expected bytes, or a number followed by K, M, G or T, such as 8G"
        )
    };
    let at = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let digits = text[..at].trim();
    let number: f64 = digits.parse().map_err(|_| fail())?;
    let unit = text[at..].to_ascii_lowercase();
    if unit.is_empty() && (1.0..LEAST_BARE).contains(&number) {
        let likely = if number < 1e3 { "G" } else { "M" };
        return Err(format!(
            "'{text}' has no unit and would be {digits} bytes: expected a unit, such as {digits}{likely} or {digits}{likely}i"
        ));
    }
    let (unit, base) = match unit.strip_suffix('b').unwrap_or(&unit) {
        unit if unit.ends_with('i') => (&unit[..unit.len() - 1], 1024f64),
        unit => (unit, 1000.0),
    };
    let power = ["", "k", "m", "g", "t"].iter().position(|u| *u == unit).ok_or_else(fail)?;
    let bytes = number * base.powi(power as i32);
    if (1.0..1e18).contains(&bytes) { Ok(bytes as u64) } else { Err(fail()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("1B", 1),
            ("1000000", 1_000_000),
            ("8589934592", 8_589_934_592),
            ("500M", 500_000_000),
            ("8GB", 8_000_000_000),
            ("1.5 Gi", 1_610_612_736),
            ("2kib", 2048),
        ] {
            assert_eq!(size_of_text(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1G", "1X", "1GG", "nan", "1e30", "0"] {
            assert!(size_of_text(text).is_err(), "{text}");
        }
        for (text, expected) in [
            ("8", "such as 8G or 8Gi"),
            (" 1.5 ", "such as 1.5G or 1.5Gi"),
            ("16000", "such as 16000M or 16000Mi"),
            ("999999", "such as 999999M"),
        ] {
            let error = size_of_text(text).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn extents_that_cannot_be_counted_have_no_product() {
        assert_eq!(extent(&[]), Some(1));
        assert_eq!(extent(&[2, 3, 4]), Some(24));
        assert_eq!(extent(&[0, 5]), Some(0));
        assert_eq!(extent(&[usize::MAX]), Some(usize::MAX));
        // To 0, to 1, and beside an axis of 0.
        for shape in
            [[1 << 32, 1 << 32, 1], [3, 12_297_829_382_473_034_411, 1], [0, 1 << 33, 1 << 31]]
        {
            assert_eq!(extent(&shape), None, "{shape:?}");
        }
    }

    #[test]
    fn what_is_refused_unwinds_to_whoever_asked() {
        let absurd = usize::MAX / 16;
        let error = caught(|| filled("a test", 0u64, absurd)).unwrap_err();
        assert!(error.to_string().starts_with("out of memory: a test would take "), "{error}");
        assert!(caught(|| zeroed::<f32>("a test", absurd)).is_err());
        assert!(Charge::of::<u64>("a test", absurd).is_err());
        assert!(caught(|| reserve("a test", &mut vec![1u64], absurd)).is_err());
        // A list whose length is not known before grows as it is filled.
        assert_eq!(
            caught(|| (0..5u8).fold(vec![], |mut list, v| {
                push("a test", &mut list, v);
                list
            })),
            Ok(vec![0, 1, 2, 3, 4])
        );
        assert!(caught(|| map::<u64, u64>("a test", absurd)).is_err());
        assert!(caught(|| map::<u64, u64>("a test", 1000)).is_ok_and(|map| map.capacity() >= 1000));
        // From a thread of a pool, too.
        let deep = || rayon::join(|| zeroed::<u8>("a test", usize::MAX / 2), || 1).1;
        assert!(caught(deep).is_err());
        assert_eq!(caught(|| collected("a test", 0..3u8)), Ok(vec![0, 1, 2]));
    }
}
