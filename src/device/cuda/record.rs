//! Work recorded once and repeated: the work of a session at every click, with its memory planned.
//!
//! A recording runs a function twice without computing anything: first to see which memory it
//! allocates and frees, in order, then, with every allocation at its planned place in an [`Arena`],
//! to record its launches and copies as one graph. What the function lays out permanently (weights,
//! [`DeviceCache`](super::DeviceCache)) is made in the first run, outside the plan. The function
//! must allocate the same memory in the same order every time, and cannot read results.
//!
//! Between a [`Fork`] and its join, recorded work has two branches, neither of which waits for the
//! other. So that they can run at the same time, no memory that one allocates overlaps memory that
//! the other uses in between.
//!
//! Training changes the weights from which things were laid out: [`Layouts`] remember by which
//! calls, and those are made again, into the same memory, so that recordings stay valid.

use super::source::Kernel;
use super::{Cuda, CudaError, KernelRecord, Launch, Launcher, Memory, tune};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard};

/// Planned addresses are multiples of this.
const ALIGN: usize = 256;

/// For [`Cuda::record_into`]: memory of the first run's result, and the memory that gets its
/// values.
pub type Placed = (Arc<Memory>, Arc<Memory>);

/// Device memory in which recordings place what they allocate; recordings may share one.
///
/// What one replay left there is overwritten by the next replay of any recording with the same
/// arena.
#[derive(Default)]
pub struct Arena(Option<Arc<Memory>>);

impl Arena {
    /// The size in bytes; 0 before the first recording.
    pub fn bytes(&self) -> usize {
        self.0.as_ref().map_or(0, |m| m.bytes())
    }
}

/// Recorded work, to be done again: a CUDA graph. It keeps its arena's memory alive.
pub struct Graph {
    cuda: Cuda,
    id: u64,
    _arena: Option<Arc<Memory>>,
}

impl Graph {
    /// Does the recorded work again, after everything launched before; does not wait for it.
    ///
    /// # Errors
    /// The launch fails, or this thread is recording.
    pub fn replay(&self) -> Result<(), CudaError> {
        if is_recording(self.cuda.id()) {
            return Err(CudaError::Launch(
                "recorded work cannot replay other recorded work".into(),
            ));
        }
        let _stream = self.cuda.lock_stream();
        self.cuda.0.launcher.replay(self.id)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.cuda.0.launcher.forget(self.id);
    }
}

/// A branch: the number of its fork, and which of the two branches it is.
type Branch = (usize, Line);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Line {
    Main,
    Beside,
}

/// An allocation's size, and its lifetime in events: from its allocation to the event that freed
/// it, or for ever.
#[derive(Clone, Copy, Debug, PartialEq)]
struct LiveRange {
    bytes: usize,
    from: usize,
    to: usize,
    /// The branch in which it was allocated.
    branch: Option<Branch>,
}

impl LiveRange {
    /// Whether both may be in use at the same time. Of two branches, either may be ahead.
    fn meets(&self, other: &LiveRange) -> bool {
        let beside = match (self.branch, other.branch) {
            (Some((fork, line)), Some((other, across))) => fork == other && line != across,
            _ => false,
        };
        beside || self.from < other.to && other.from < self.to
    }
}

/// The branches of the work that is traced.
#[derive(Default)]
struct Branches {
    forks: usize,
    at: Option<Branch>,
    /// Allocations that were freed in a branch in which they were not made: the other branch may
    /// still use them, so they live until the join.
    until_join: Vec<usize>,
}

/// What a first run tells about memory.
#[derive(Default)]
struct Trace {
    lives: Vec<LiveRange>,
    /// The lifetimes, by address, of allocations that have not been freed yet.
    live: HashMap<u64, usize>,
    events: usize,
    branches: Branches,
}

impl Trace {
    fn allocated(&mut self, address: u64, bytes: usize) {
        self.live.insert(address, self.lives.len());
        let branch = self.branches.at;
        self.lives.push(LiveRange { bytes, from: self.events, to: usize::MAX, branch });
        self.events += 1;
    }

    fn freed(&mut self, address: u64) {
        let Some(index) = self.live.remove(&address) else { return };
        self.lives[index].to = self.events;
        self.events += 1;
        if self.branches.at.is_some() && self.branches.at != self.lives[index].branch {
            self.branches.until_join.push(index);
        }
    }

    /// Continues in a branch beside the main line; false if it is in one already.
    fn fork(&mut self) -> bool {
        let free = self.branches.at.is_none();
        if free {
            self.branches.forks += 1;
            self.branches.at = Some((self.branches.forks, Line::Beside));
        }
        free
    }

    fn back(&mut self) {
        self.branches.at = self.branches.at.map(|(fork, _)| (fork, Line::Main));
    }

    fn join(&mut self) {
        self.branches.at = None;
        for index in std::mem::take(&mut self.branches.until_join) {
            self.lives[index].to = self.events;
        }
        self.events += 1;
    }
}

/// The stage of a thread's recording.
enum Stage {
    /// Allocations are recorded; nothing runs.
    Tracing(Trace),
    /// Nothing runs, and every read gives zero.
    DryRun,
    /// Allocations are served from the plan; work is recorded.
    Capturing {
        arena: Option<Arc<Memory>>,
        places: Vec<(usize, usize)>,
        /// Allocations placed outside the arena, by number.
        elsewhere: HashMap<usize, Arc<Memory>>,
        next: usize,
        given_back: Vec<u64>,
        /// Whether it is in a branch.
        forked: bool,
        /// What was recorded before the last [`Cuda::cut`].
        parts: Vec<Graph>,
    },
}

/// A call by which something was laid out.
enum Call {
    Launch { kernel: &'static Kernel, launch: Launch, arguments: Vec<u64> },
    Copy { from: u64, to: u64, bytes: usize },
    Clear { address: u64, bytes: usize },
}

/// The calls by which things were laid out permanently, in their order. What they read may change;
/// [`Cuda::lay_out_again`] makes them once more, into the same memory.
#[derive(Default)]
pub(crate) struct Layouts {
    calls: Vec<Call>,
    /// All memory that the calls read and write, temporary memory too.
    held: Vec<Arc<Memory>>,
    /// All calls as one recording, and how many they were then.
    again: Option<(Graph, usize)>,
    /// Whether something was laid out from values that were copied to the host: that cannot be
    /// repeated.
    from_host: bool,
}

impl Layouts {
    /// Whether everything can be laid out again on the device.
    pub(crate) fn can_repeat(&self) -> bool {
        !self.from_host
    }
}

/// What a thread is doing with a device.
#[derive(Default)]
struct Here {
    device: u64,
    /// Whether this thread holds its stream.
    holds_stream: bool,
    stage: Option<Stage>,
    /// The launches that are to be remembered, and whether they are timed; none if they are not.
    seen: Option<(Vec<KernelRecord>, bool)>,
    /// Where to note what is laid out, if that is wanted, and whether it is being laid out now.
    layouts: Option<Layouts>,
    lays_out: bool,
}

thread_local! {
    /// One entry for each device that this thread is doing something with: its state with one says
    /// nothing of another.
    static HERE: RefCell<Vec<Here>> = const { RefCell::new(Vec::new()) };
}

/// This thread's state with a device. `f` must not drop memory, because that would borrow the state
/// again.
fn here<R>(device: u64, f: impl FnOnce(&mut Here) -> R) -> R {
    HERE.with_borrow_mut(|all| {
        let at = all.iter().position(|here| here.device == device).unwrap_or_else(|| {
            all.push(Here { device, ..Here::default() });
            all.len() - 1
        });
        let result = f(&mut all[at]);
        let Here { holds_stream, stage, seen, layouts, .. } = &all[at];
        if !holds_stream && stage.is_none() && seen.is_none() && layouts.is_none() {
            all.swap_remove(at);
        }
        result
    })
}

/// A thread's hold of a device's stream. A thread that has it does not wait for it again. A thread
/// that works on one device within a recording on another holds two streams; two threads that do so
/// crosswise would deadlock.
pub(super) struct StreamGuard<'a> {
    device: u64,
    guard: Option<MutexGuard<'a, ()>>,
}

impl<'a> StreamGuard<'a> {
    pub(super) fn take(device: u64, stream: &'a Mutex<()>) -> StreamGuard<'a> {
        let has = here(device, |here| std::mem::replace(&mut here.holds_stream, true));
        StreamGuard {
            device,
            guard: (!has).then(|| stream.lock().unwrap_or_else(|e| e.into_inner())),
        }
    }
}

impl Drop for StreamGuard<'_> {
    fn drop(&mut self) {
        if self.guard.is_some() {
            here(self.device, |here| here.holds_stream = false);
        }
    }
}

/// Remembers a launch if launches are to be remembered; returns whether it is to be timed.
pub(super) fn record_launch(device: u64, kernel: &str, launch: Launch) -> bool {
    here(device, |here| match &mut here.seen {
        Some((list, timed)) => {
            let choice = tune::open(device);
            list.push(KernelRecord { kernel: kernel.into(), launch, seconds: None, choice });
            *timed && kernel != "copy"
        }
        None => false,
    })
}

/// Records how long the last launch took.
pub(super) fn record_time(device: u64, seconds: f64) {
    here(device, |here| {
        if let Some(last) = here.seen.as_mut().and_then(|(list, _)| list.last_mut()) {
            last.seconds = Some(seconds);
        }
    });
}

/// Whether this thread is recording.
pub(super) fn is_recording(device: u64) -> bool {
    here(device, |here| here.stage.is_some())
}

/// Whether this thread's work is to be skipped.
pub(super) fn runs_nothing(device: u64) -> bool {
    here(device, |here| matches!(here.stage, Some(Stage::Tracing(_) | Stage::DryRun)))
}

/// Whether copies from and to the host are to be skipped too.
pub(super) fn is_dry_run(device: u64) -> bool {
    here(device, |here| matches!(here.stage, Some(Stage::DryRun)))
}

/// Runs `f` as if nothing were recorded: for results that stay. An error if launches are being
/// recorded, because they would include those of `f`.
pub(super) fn outside_capture<R, E: From<CudaError>>(
    device: u64,
    f: impl FnOnce() -> Result<R, E>,
) -> Result<R, E> {
    /// Restores the stage, after a panic too. Memory is kept with the notes of what was laid out
    /// only if calls were noted: a copy of host values is not made again.
    struct Back {
        device: u64,
        stage: Option<Stage>,
        lays_out: bool,
        calls: usize,
        held: usize,
    }
    impl Drop for Back {
        fn drop(&mut self) {
            let stage = self.stage.take();
            drop(here(self.device, |here| {
                here.lays_out = self.lays_out;
                let idle = here.layouts.as_mut().filter(|all| all.calls.len() == self.calls);
                let unused = idle.map(|all| all.held.split_off(self.held.min(all.held.len())));
                (std::mem::replace(&mut here.stage, stage), unused)
            }));
        }
    }
    if here(device, |here| matches!(here.stage, Some(Stage::Capturing { .. }))) {
        return Err(CudaError::Launch(
            "recorded work keeps memory that its first run did not".into(),
        )
        .into());
    }
    let _back = here(device, |here| {
        let noted = here.layouts.as_ref().map(|all| (all.calls.len(), all.held.len()));
        let (calls, held) = noted.unwrap_or_default();
        let lays_out = std::mem::replace(&mut here.lays_out, noted.is_some());
        Back { device, stage: here.stage.take(), lays_out, calls, held }
    });
    f()
}

/// This thread's notes of what is laid out, if something is being laid out.
fn notes<R>(device: u64, note: impl FnOnce(&mut Layouts) -> R) -> Option<R> {
    here(device, |here| if here.lays_out { here.layouts.as_mut().map(note) } else { None })
}

/// Notes a launch by which something is laid out.
pub(super) fn note_launch(device: u64, kernel: &'static Kernel, launch: Launch, arguments: &[u64]) {
    notes(device, |all| {
        all.calls.push(Call::Launch { kernel, launch, arguments: arguments.to_vec() });
    });
}

/// Notes a copy on the device by which something is laid out.
pub(super) fn note_copy(device: u64, from: u64, to: u64, bytes: usize) {
    notes(device, |all| all.calls.push(Call::Copy { from, to, bytes }));
}

/// Notes a clearing by which something is laid out.
pub(super) fn note_clear(device: u64, address: u64, bytes: usize) {
    notes(device, |all| all.calls.push(Call::Clear { address, bytes }));
}

/// Notes memory that was allocated while something is laid out.
pub(super) fn note_memory(device: u64, memory: &Arc<Memory>) {
    notes(device, |all| all.held.push(memory.clone()));
}

/// Notes that values were copied to the host while something is laid out.
pub(super) fn note_download(device: u64) {
    notes(device, |all| all.from_host = true);
}

/// An address, and the memory that it is part of.
pub(super) type Place = (u64, Option<Arc<Memory>>);

/// The planned place of an allocation; none if there is no plan yet.
pub(super) fn place(device: u64, bytes: usize) -> Option<Result<Place, CudaError>> {
    here(device, |here| match &mut here.stage {
        Some(Stage::Capturing { arena, places, elsewhere, next, .. }) => {
            let planned = places.get(*next).filter(|(_, size)| *size == bytes);
            let own = elsewhere.get(&*next);
            *next += 1;
            Some(match (planned, own) {
                (Some(_), Some(memory)) => Ok((memory.address, Some(memory.clone()))),
                (Some((offset, _)), None) => {
                    Ok((arena.as_ref().map_or(0, |a| a.address) + *offset as u64, arena.clone()))
                }
                (None, _) => Err(CudaError::Launch(format!(
                    "recorded work asked for {bytes} bytes that were not planned"
                ))),
            })
        }
        _ => None,
    })
}

/// Records an allocation.
pub(super) fn allocated(device: u64, address: u64, bytes: usize) {
    here(device, |here| {
        if let Some(Stage::Tracing(trace)) = &mut here.stage {
            trace.allocated(address, bytes);
        }
    });
}

/// Records that memory was given back; returns whether it may be freed now.
pub(super) fn freed(device: u64, address: u64) -> bool {
    here(device, |here| match &mut here.stage {
        Some(Stage::Tracing(trace)) => {
            trace.freed(address);
            true
        }
        Some(Stage::Capturing { given_back, .. }) => {
            given_back.push(address);
            false
        }
        Some(Stage::DryRun) | None => true,
    })
}

/// Places for allocations, the largest first, each as low as those that may be in use at the same
/// time allow; and the end of the highest.
fn plan(lives: &[LiveRange]) -> (Vec<(usize, usize)>, usize) {
    let mut order: Vec<usize> = (0..lives.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(lives[i].bytes));
    let mut places = vec![(0, 0); lives.len()];
    let mut placed: Vec<usize> = vec![];
    let mut total = 0;
    for i in order {
        let life = lives[i];
        let mut taken: Vec<(usize, usize)> = placed
            .iter()
            .filter(|&&j| lives[j].meets(&life))
            .map(|&j| (places[j].0, places[j].0 + lives[j].bytes.max(1)))
            .collect();
        taken.sort_unstable();
        let mut at = 0usize;
        for (from, to) in taken {
            if at + life.bytes.max(1) <= from {
                break;
            }
            at = at.max(to.next_multiple_of(ALIGN));
        }
        places[i] = (at, life.bytes);
        placed.push(i);
        total = total.max(at + life.bytes.max(1));
    }
    (places, total)
}

/// A thread's recording on a device. When dropped it ends, however its function ended, also by a
/// panic.
struct Recording<'a> {
    cuda: &'a Cuda,
    /// Whether the device records its launches.
    captures: bool,
}

impl<'a> Recording<'a> {
    fn begin(cuda: &'a Cuda, stage: Stage) -> Result<Recording<'a>, CudaError> {
        if here(cuda.id(), |here| here.stage.is_some() || here.seen.is_some()) {
            return Err(CudaError::Launch("recorded work cannot be recorded again".into()));
        }
        let recording = Recording { cuda, captures: false };
        recording.go_on(Some(stage));
        Ok(recording)
    }

    /// Goes to the next stage; returns the one before.
    fn go_on(&self, next: Option<Stage>) -> Option<Stage> {
        here(self.cuda.id(), |here| std::mem::replace(&mut here.stage, next))
    }

    /// Lets the device record its launches.
    fn capture(&mut self, stage: Stage) -> Result<(), CudaError> {
        self.cuda.0.launcher.begin_recording()?;
        self.captures = true;
        self.go_on(Some(stage));
        Ok(())
    }

    /// Ends the device's recording, and frees what was given back meanwhile: freeing it earlier
    /// would have been recorded too. Returns also what was recorded before the last cut.
    fn end<T>(&mut self, end: impl FnOnce(&dyn Launcher) -> T) -> (T, Vec<Graph>) {
        let launcher = &*self.cuda.0.launcher;
        self.captures = false;
        let stage = self.go_on(None);
        let (ended, mut before) = (end(launcher), vec![]);
        if let Some(Stage::Capturing { given_back, parts, .. }) = stage {
            given_back.into_iter().for_each(|address| launcher.free(address));
            before = parts;
        }
        (ended, before)
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if self.captures {
            self.end(|launcher| launcher.abandon_recording());
        }
        drop(here(self.cuda.id(), |here| (here.stage.take(), here.seen.take())));
    }
}

/// Two branches of work that is being recorded. From the fork on, work goes into a branch beside
/// the main line, after everything that was recorded before; after [`Fork::back`] it goes into the
/// main line, which does not wait for the branch until [`Fork::join`]. When dropped, it is joined.
///
/// A branch reads what was made before the fork and what it made itself; neither branch writes what
/// both read.
pub struct Fork {
    cuda: Cuda,
    /// Whether the device records; otherwise memory is traced.
    captures: bool,
    open: bool,
}

impl Fork {
    /// Continues with the main line: what is recorded from here on runs beside the branch.
    pub fn back(&self) -> Result<(), CudaError> {
        self.trace(Trace::back);
        if self.captures { self.cuda.0.launcher.leave_branch() } else { Ok(()) }
    }

    /// Makes everything that follows wait for both branches.
    pub fn join(mut self) -> Result<(), CudaError> {
        self.close()
    }

    fn close(&mut self) -> Result<(), CudaError> {
        if !std::mem::replace(&mut self.open, false) {
            return Ok(());
        }
        self.trace(Trace::join);
        here(self.cuda.id(), |here| {
            if let Some(Stage::Capturing { forked, .. }) = &mut here.stage {
                *forked = false;
            }
        });
        if self.captures { self.cuda.0.launcher.join() } else { Ok(()) }
    }

    /// Records a step, if memory is traced.
    fn trace(&self, step: impl FnOnce(&mut Trace)) {
        here(self.cuda.id(), |here| {
            if let Some(Stage::Tracing(trace)) = &mut here.stage {
                step(trace);
            }
        });
    }
}

impl Drop for Fork {
    fn drop(&mut self) {
        // On the way out after a failure that has already been reported.
        let _ = self.close();
    }
}

impl Cuda {
    /// Forks recorded work into two branches, which run in parallel when it is replayed.
    ///
    /// None if this thread records no work on the device, or if `PRISM_CUDA_BRANCHES=off` switches
    /// branches off: then one part is done after the other.
    ///
    /// # Errors
    /// The work is in a branch already.
    pub fn fork(&self) -> Result<Option<Fork>, CudaError> {
        if !self.0.launcher.has_branches() {
            return Ok(None);
        }
        let begun = here(self.id(), |here| match &mut here.stage {
            Some(Stage::Tracing(trace)) => Some((trace.fork(), false)),
            Some(Stage::Capturing { forked, .. }) => Some((!std::mem::replace(forked, true), true)),
            Some(Stage::DryRun) | None => None,
        });
        let Some((free, captures)) = begun else { return Ok(None) };
        if !free {
            return Err(CudaError::Launch("a branch of recorded work cannot branch".into()));
        }
        if captures {
            self.0.launcher.fork()?;
        }
        Ok(Some(Fork { cuda: self.clone(), captures, open: true }))
    }

    /// Lists the launches of `f`; also returns what `f` returned.
    ///
    /// With `timed`, each launch is done and timed by itself. Without, nothing is computed: every
    /// read gives zero, and the contents of the memory that `f` returns are unspecified.
    ///
    /// Before that, `f` is called once without computing anything, so that what it lays out
    /// permanently, such as weights, is not among the launches.
    ///
    /// # Errors
    /// Those of `f`; this thread is recording already.
    pub fn launches<R, E: From<CudaError>>(
        &self,
        timed: bool,
        f: impl Fn() -> Result<R, E>,
    ) -> Result<(Vec<KernelRecord>, R), E> {
        let _stream = self.lock_stream();
        let recording = Recording::begin(self, Stage::DryRun)?;
        drop(f()?);
        recording.go_on((!timed).then_some(Stage::DryRun));
        here(self.id(), |here| here.seen = Some((vec![], timed)));
        let made = f()?;
        let seen = here(self.id(), |here| here.seen.take());
        drop(recording);
        Ok((seen.map(|(list, _)| list).unwrap_or_default(), made))
    }

    /// Records what `f` launches on this device as a graph, without doing it. Returns the graph and
    /// what `f` returned: tensors that have their values after a replay.
    ///
    /// `f` is called twice: first to see which memory it allocates and frees, then, with that
    /// memory planned in `arena`, to record. It must do the same both times, and cannot copy from
    /// or to the host or wait for the device. What it lays out permanently, such as weights, is
    /// made in the first run, outside the arena. Work on other devices is done, not recorded.
    ///
    /// The arena grows if it must; recordings made before keep the old memory.
    ///
    /// # Errors
    /// Those of `f`; it does what cannot be recorded; the arena does not fit into the device's
    /// memory; this thread is recording already.
    pub fn record<R, E: From<CudaError>>(
        &self,
        arena: &mut Arena,
        f: impl Fn() -> Result<R, E>,
    ) -> Result<(Graph, R), E> {
        self.record_into(arena, f, |_| Ok(vec![]))
    }

    /// Records as [`Cuda::record`] does, but places parts of the result in given memory instead of
    /// the arena.
    ///
    /// `place` is given the first run's result and returns pairs: memory of that result, and memory
    /// of the same size that gets its values in a replay.
    ///
    /// # Errors
    /// Those of [`Cuda::record`] and of `place`; a pair's first memory was not allocated by `f`, or
    /// its sizes differ.
    pub fn record_into<R, E: From<CudaError>>(
        &self,
        arena: &mut Arena,
        f: impl Fn() -> Result<R, E>,
        place: impl FnOnce(&R) -> Result<Vec<Placed>, E>,
    ) -> Result<(Graph, R), E> {
        let (mut graphs, made) = self.record_parts(arena, f, place)?;
        match (graphs.pop(), graphs.is_empty()) {
            (Some(graph), true) => Ok((graph, made)),
            _ => Err(CudaError::Launch("recorded work was cut into several parts".into()).into()),
        }
    }

    /// Ends the graph that is being recorded, and begins another one with what follows: between the
    /// replays of the two other work can be done, which reads what the first one left and writes
    /// what the second one reads. Does nothing if this thread records nothing.
    ///
    /// # Errors
    /// The work is in a branch.
    pub fn cut(&self) -> Result<(), CudaError> {
        let captures = here(self.id(), |here| match &here.stage {
            Some(Stage::Capturing { forked, arena, .. }) => Some((*forked, arena.clone())),
            _ => None,
        });
        let Some((forked, arena)) = captures else { return Ok(()) };
        if forked {
            return Err(CudaError::Launch("a branch of recorded work cannot be cut".into()));
        }
        let launcher = &self.0.launcher;
        let id = launcher.end_recording()?;
        let mut part = Some(Graph { cuda: self.clone(), id, _arena: arena });
        launcher.begin_recording()?;
        here(self.id(), |here| {
            if let Some(Stage::Capturing { parts, .. }) = &mut here.stage {
                parts.extend(part.take());
            }
        });
        Ok(())
    }

    /// Records as [`Cuda::record_into`] does work that [`Cuda::cut`] divides: a graph for each
    /// part. All parts share one plan of memory.
    pub fn record_parts<R, E: From<CudaError>>(
        &self,
        arena: &mut Arena,
        f: impl Fn() -> Result<R, E>,
        place: impl FnOnce(&R) -> Result<Vec<Placed>, E>,
    ) -> Result<(Vec<Graph>, R), E> {
        let _stream = self.lock_stream();
        let mut recording = Recording::begin(self, Stage::Tracing(Trace::default()))?;
        let kept = f()?;
        let Trace { mut lives, live, .. } = match recording.go_on(None) {
            Some(Stage::Tracing(trace)) => trace,
            _ => Trace::default(),
        };
        let mut elsewhere = HashMap::new();
        for (made, to) in place(&kept)? {
            match live.get(&made.address) {
                Some(index) if made.bytes == to.bytes && lives[*index].bytes == to.bytes => {
                    elsewhere.insert(*index, to);
                }
                _ => {
                    let text = "recorded work must move memory that it did not allocate";
                    return Err(CudaError::Launch(text.into()).into());
                }
            }
        }
        drop(kept);
        // They take no place in the arena.
        elsewhere.keys().for_each(|index| lives[*index].bytes = 0);
        let (mut places, total) = plan(&lives);
        elsewhere.iter().for_each(|(index, memory)| places[*index].1 = memory.bytes);
        if arena.bytes() < total {
            arena.0 = None;
            arena.0 = Some(self.allocate_bytes(total)?);
        }
        let memory = arena.0.clone();
        recording.capture(Stage::Capturing {
            arena: memory.clone(),
            places,
            elsewhere,
            next: 0,
            given_back: vec![],
            forked: false,
            parts: vec![],
        })?;
        let made = f()?;
        let (id, mut graphs) = recording.end(|launcher| launcher.end_recording());
        graphs.push(Graph { cuda: self.clone(), id: id?, _arena: memory });
        Ok((graphs, made))
    }

    /// Runs `f`, and notes in `layouts` how it lays out what stays.
    pub(crate) fn noting<R>(&self, layouts: &mut Layouts, f: impl FnOnce() -> R) -> R {
        /// Gives the notes back, after a panic too.
        struct Back<'a>(u64, &'a mut Layouts);
        impl Drop for Back<'_> {
            fn drop(&mut self) {
                if let Some(noted) = here(self.0, |here| here.layouts.take()) {
                    *self.1 = noted;
                }
            }
        }
        let own = std::mem::take(layouts);
        let _outer = here(self.id(), |here| here.layouts.replace(own));
        let _back = Back(self.id(), layouts);
        f()
    }

    /// Runs `f`, all of whose results stay: it lays them out.
    pub(crate) fn laying_out<R, E: From<CudaError>>(
        &self,
        f: impl FnOnce() -> Result<R, E>,
    ) -> Result<R, E> {
        outside_capture(self.id(), f)
    }

    /// Lays out again, in the same memory, everything that was noted.
    pub(crate) fn lay_out_again(&self, layouts: &mut Layouts) -> Result<(), CudaError> {
        let count = layouts.calls.len();
        if count == 0 {
            return Ok(());
        }
        if layouts.again.as_ref().is_none_or(|(_, recorded)| *recorded != count) {
            layouts.again = None;
            let _stream = self.lock_stream();
            let mut recording = Recording::begin(self, Stage::DryRun)?;
            recording.capture(Stage::Capturing {
                arena: None,
                places: vec![],
                elsewhere: HashMap::new(),
                next: 0,
                given_back: vec![],
                forked: false,
                parts: vec![],
            })?;
            let launcher = &self.0.launcher;
            for call in &layouts.calls {
                match call {
                    Call::Launch { kernel, launch, arguments } => {
                        let mut slots = arguments.clone();
                        let mut pointers: Vec<*mut c_void> =
                            slots.iter_mut().map(|s| std::ptr::from_mut(s).cast()).collect();
                        launcher.launch(kernel, *launch, &mut pointers)?;
                    }
                    Call::Copy { from, to, bytes } => launcher.copy(*from, *to, *bytes)?,
                    Call::Clear { address, bytes } => launcher.clear(*address, *bytes)?,
                }
            }
            let (id, _) = recording.end(|launcher| launcher.end_recording());
            let graph = Graph { cuda: self.clone(), id: id?, _arena: None };
            layouts.again = Some((graph, count));
        }
        layouts.again.as_ref().map_or(Ok(()), |(graph, _)| graph.replay())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_that_meet_lie_apart() {
        let life = |bytes, from, to| LiveRange { bytes, from, to, branch: None };
        let lives = [life(100, 0, 2), life(300, 1, 4), life(100, 3, usize::MAX), life(0, 5, 6)];
        let (places, total) = plan(&lives);
        assert_eq!(places, [(512, 100), (0, 300), (512, 100), (0, 0)]);
        assert_eq!(total, 612);
    }

    #[test]
    fn branches_lie_apart_from_fork_to_join() {
        let mut trace = Trace::default();
        let mut address = 0;
        let mut take = |trace: &mut Trace| {
            address += 1;
            trace.allocated(address, 256);
            address
        };
        let (before, shared) = (take(&mut trace), take(&mut trace));
        trace.freed(before);
        assert!(trace.fork() && !trace.fork(), "a branch branches");
        let side = take(&mut trace);
        trace.freed(side);
        // Its own branch may use the place again.
        let next = take(&mut trace);
        trace.back();
        // The other branch may still read it.
        trace.freed(shared);
        let main = take(&mut trace);
        trace.freed(main);
        trace.join();
        trace.freed(next);
        take(&mut trace);
        let offsets: Vec<usize> = plan(&trace.lives).0.iter().map(|place| place.0).collect();
        let [before, shared, side, next, main, after] = offsets[..] else { panic!("six lives") };
        assert_eq!((before, shared, side, next), (0, 256, 0, 0));
        assert!(![shared, side, next].contains(&main), "{offsets:?}");
        assert_eq!(after, 0);
    }
}
