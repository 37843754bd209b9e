//! Branches of recorded work.

use super::plan::Trace;
use super::{Stage, here};
use crate::device::cuda::{Cuda, CudaError};

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
}
