//! Aligned float buffers that return to a pool when dropped.
//!
//! A 128³ feature map of 32 channels is 268 MB: getting it fresh from the system costs tens of thousands of page faults, so
//! maps are recycled. A recycled buffer holds old values; in debug builds it is filled with NaN, so that an op that leaves
//! a voxel unwritten shows.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::sync::{Arc, Mutex, Weak};

const ALIGN: usize = 64;
/// Buffers from this size on are aligned for, and ask for, large pages.
const LARGE: usize = 4 << 20;
const LARGE_ALIGN: usize = 2 << 20;
/// Only buffers of at least this many bytes are worth keeping.
const KEEP: usize = 64 << 10;

/// `len` floats, aligned to 64 bytes.
pub struct Buffer {
    ptr: *mut f32,
    len: usize,
    capacity: usize,
    home: Weak<Pool>,
}

// The buffer owns its memory alone; sharing follows the usual borrow rules through Deref.
unsafe impl Send for Buffer {}
unsafe impl Sync for Buffer {}

/// Buffers waiting to be used again.
#[derive(Default)]
pub struct Pool {
    free: Mutex<Vec<Raw>>,
}

struct Raw {
    ptr: *mut f32,
    capacity: usize,
}
unsafe impl Send for Raw {}

fn layout(capacity: usize) -> Layout {
    let bytes = capacity * 4;
    let align = if bytes >= LARGE { LARGE_ALIGN } else { ALIGN };
    Layout::from_size_align(bytes.max(ALIGN), align).expect("a buffer's size fits the address space")
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Made by `Pool::take` with this very layout.
        unsafe { dealloc(self.ptr.cast(), layout(self.capacity)) }
    }
}

impl Pool {
    /// A buffer of `len` floats whose contents are unspecified.
    pub fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let fits = |r: &Raw| r.capacity >= len && r.capacity <= len + len / 4 + 1024;
        let found = {
            let mut free = self.free.lock().unwrap_or_else(|e| e.into_inner());
            let best = (0..free.len()).filter(|&i| fits(&free[i])).min_by_key(|&i| free[i].capacity);
            best.map(|i| free.swap_remove(i))
        };
        let raw = found.unwrap_or_else(|| {
            let layout = layout(len);
            // The layout's size is never zero.
            let ptr = unsafe { alloc(layout) }.cast::<f32>();
            if ptr.is_null() {
                handle_alloc_error(layout);
            }
            #[cfg(target_os = "linux")]
            if layout.size() >= LARGE {
                // Advice only: a refusal changes nothing but speed.
                unsafe { libc::madvise(ptr.cast(), layout.size(), libc::MADV_HUGEPAGE) };
            }
            // Initialised once, so that handing it out as floats is sound.
            unsafe { ptr.write_bytes(0, len) };
            Raw { ptr, capacity: len }
        });
        let mut buffer = Buffer { ptr: raw.ptr, len, capacity: raw.capacity, home: Arc::downgrade(self) };
        std::mem::forget(raw);
        if cfg!(debug_assertions) {
            buffer.fill(f32::NAN);
        }
        buffer
    }

    /// Gives all waiting buffers back to the system.
    pub fn trim(&self) {
        self.free.lock().unwrap_or_else(|e| e.into_inner()).clear();
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let raw = Raw { ptr: self.ptr, capacity: self.capacity };
        if self.capacity * 4 >= KEEP
            && let Some(home) = self.home.upgrade()
        {
            home.free.lock().unwrap_or_else(|e| e.into_inner()).push(raw);
        }
    }
}

impl std::ops::Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // `ptr` is valid for `len` floats for as long as self lives.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // As above, and `&mut self` makes it unique.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}
