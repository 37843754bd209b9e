//! Host memory through which copies go, to the device and from it.

use super::CudaError;
use super::error::failed;
use super::staging::{self, Turns};
use super::stream::Event;
use cudarc::driver::result::{self, DriverError};
use std::ffi::c_void;

/// Host memory that the device reads and writes directly. Copies in both directions go through it,
/// so that none waits for the operating system.
pub(super) struct Pinned {
    pub(super) at: *mut c_void,
    bytes: usize,
}

impl Pinned {
    pub(super) fn none() -> Pinned {
        Pinned { at: std::ptr::null_mut(), bytes: 0 }
    }

    /// Makes sure that there are at least `bytes` bytes.
    ///
    /// # Safety
    /// The context is current, and no copy uses this memory.
    pub(super) unsafe fn reserve(&mut self, bytes: usize) -> Result<(), CudaError> {
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
            // SAFETY: it came from the driver, and no copy uses it any more: the stream's work has
            // finished.
            let _ = unsafe { result::free_host(self.at) };
        }
    }
}

/// Where copies to the device start from.
pub(super) struct Staging {
    turns: Turns,
    /// All small places, one after the other: they are pinned in one allocation, because pinning
    /// takes long.
    small: Pinned,
    large: [Pinned; staging::LARGE],
    /// For each place, the event that its last copy has finished.
    over: Vec<Event>,
    /// How often a copy waited.
    pub(super) waits: u64,
}

impl Staging {
    pub(super) fn new() -> Result<Staging, DriverError> {
        let (turns, small) = (Turns::default(), Pinned::none());
        let large = std::array::from_fn(|_| Pinned::none());
        let over = (0..staging::PLACES).map(|_| Event::new()).collect::<Result<_, _>>()?;
        Ok(Staging { turns, small, large, over, waits: 0 })
    }

    /// A place of `bytes` bytes that no copy uses, and the event to record after the next copy;
    /// none if that is too large.
    ///
    /// # Safety
    /// The context is current.
    pub(super) unsafe fn place(
        &mut self,
        bytes: usize,
    ) -> Result<Option<(*mut u8, &Event)>, CudaError> {
        let Some(place) = self.turns.next(bytes) else {
            // From other memory, the driver copies before it returns.
            self.waits += 1;
            return Ok(None);
        };
        let (over, what) = (&self.over[place], failed("the device's work"));
        if !over.is_over().map_err(&what)? {
            self.waits += 1;
            over.wait().map_err(&what)?;
        }
        // SAFETY: the small places are made once; the last copy from a large one has finished. A
        // small place is inside them all.
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

// SAFETY: it owns its memory, which any thread may free.
unsafe impl Send for Pinned {}
// SAFETY: its memory is as above, its events are handles of the context that `Driver` sets.
unsafe impl Send for Staging {}
