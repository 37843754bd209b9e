//! The environment of work on a GPU: the context, streams, and events in them.

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

/// The device's primary context.
pub(super) struct Context {
    pub(super) device: sys::CUdevice,
    pub(super) handle: sys::CUcontext,
}

impl Context {
    /// Makes it the calling thread's.
    pub(super) fn enter(&self) -> Result<(), DriverError> {
        // SAFETY: it exists as long as this does.
        unsafe { result::ctx::set_current(self.handle) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, and nothing that uses it is left.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// A stream of the context that is current.
pub(super) struct Stream(pub(super) sys::CUstream);

impl Stream {
    pub(super) fn new() -> Result<Stream, DriverError> {
        result::stream::create(result::stream::StreamKind::NonBlocking).map(Stream)
    }

    /// A stream whose blocks go before those of others.
    pub(super) fn urgent() -> Result<Stream, DriverError> {
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
pub(super) struct Event(pub(super) sys::CUevent);

impl Event {
    /// An event to wait for.
    pub(super) fn new() -> Result<Event, DriverError> {
        result::event::create(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING).map(Event)
    }

    /// An event that tells its time.
    pub(super) fn timed() -> Result<Event, DriverError> {
        result::event::create(sys::CUevent_flags_enum::CU_EVENT_DEFAULT).map(Event)
    }

    /// Makes the event complete once a stream's work so far has finished.
    pub(super) fn record(&self, stream: &Stream) -> Result<(), DriverError> {
        // SAFETY: the event is this one's own, the stream is there.
        unsafe { result::event::record(self.0, stream.0) }
    }

    /// Makes what a stream does next wait for it.
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

    /// Whether it is complete; one that was never recorded is.
    pub(super) fn is_over(&self) -> Result<bool, DriverError> {
        // SAFETY: the event is this one's own.
        match unsafe { result::event::query(self.0) } {
            Ok(()) => Ok(true),
            Err(e) if matches!(e.0, sys::CUresult::CUDA_ERROR_NOT_READY) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Waits until it is complete.
    pub(super) fn wait(&self) -> Result<(), DriverError> {
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
