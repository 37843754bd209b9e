//! Recordings as graphs, and the memory in which they place what they allocate.

use super::plan::{Trace, plan};
use super::{Recording, Stage, here, is_recording};
use crate::device::cuda::{Cuda, CudaError, Memory};
use std::collections::HashMap;
use std::sync::Arc;

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
    pub(super) cuda: Cuda,
    pub(super) id: u64,
    pub(super) _arena: Option<Arc<Memory>>,
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

impl Cuda {
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
}
