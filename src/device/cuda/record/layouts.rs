//! What is laid out permanently, outside recordings, and notes of how, so that it can be laid out
//! again.

use super::graph::Graph;
use super::{Recording, Stage, here};
use crate::device::cuda::source::Kernel;
use crate::device::cuda::{Cuda, CudaError, Launch, Memory};
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

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

/// Runs `f` as if nothing were recorded: for results that stay. An error if launches are being
/// recorded, because they would include those of `f`.
pub(in crate::device::cuda) fn outside_capture<R, E: From<CudaError>>(
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
pub(in crate::device::cuda) fn note_launch(
    device: u64,
    kernel: &'static Kernel,
    launch: Launch,
    arguments: &[u64],
) {
    notes(device, |all| {
        all.calls.push(Call::Launch { kernel, launch, arguments: arguments.to_vec() });
    });
}

/// Notes a copy on the device by which something is laid out.
pub(in crate::device::cuda) fn note_copy(device: u64, from: u64, to: u64, bytes: usize) {
    notes(device, |all| all.calls.push(Call::Copy { from, to, bytes }));
}

/// Notes a clearing by which something is laid out.
pub(in crate::device::cuda) fn note_clear(device: u64, address: u64, bytes: usize) {
    notes(device, |all| all.calls.push(Call::Clear { address, bytes }));
}

/// Notes memory that was allocated while something is laid out.
pub(in crate::device::cuda) fn note_memory(device: u64, memory: &Arc<Memory>) {
    notes(device, |all| all.held.push(memory.clone()));
}

/// Notes that values were copied to the host while something is laid out.
pub(in crate::device::cuda) fn note_download(device: u64) {
    notes(device, |all| all.from_host = true);
}

impl Cuda {
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
