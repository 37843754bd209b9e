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

mod fork;
mod graph;
mod layouts;
mod plan;

pub use fork::Fork;
pub use graph::{Arena, Graph, Placed};
pub(crate) use layouts::Layouts;
pub(super) use layouts::{
    note_clear, note_copy, note_download, note_launch, note_memory, outside_capture,
};

use super::{Cuda, CudaError, KernelRecord, Launch, Launcher, Memory, tune};
use crate::sync::locked;
use plan::Trace;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

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
        StreamGuard { device, guard: (!has).then(|| locked(stream)) }
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

impl Cuda {
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
}
