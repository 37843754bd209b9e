//! Float buffers that return to a pool when dropped.
//!
//! A 128³ feature map of 32 channels is 268 MB: getting it fresh from the system costs tens of thousands of page faults, so
//! maps are recycled. A recycled buffer holds old values; in debug builds it is filled with NaN, so that an op that leaves
//! a voxel unwritten shows.

use std::alloc::{Layout, handle_alloc_error};
use std::sync::{Arc, Mutex, Weak};

/// Buffers from this size on are pages of their own, zero when first touched and by whoever touches them; large pages are asked for.
const LARGE: usize = 4 << 20;
/// Only buffers of at least this many bytes are worth keeping.
const KEEP: usize = 64 << 10;

/// A cache line of floats: what small buffers are made of, for its alignment.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line {
    _floats: [f32; 16],
}

enum Memory {
    Small(Vec<Line>),
    Large(memmap2::MmapMut),
}

impl Memory {
    /// Zeros for at least `len` floats.
    fn new(len: usize) -> Memory {
        let bytes = len * 4;
        if bytes < LARGE {
            return Memory::Small(vec![Line { _floats: [0.0; 16] }; len.div_ceil(16)]);
        }
        let Ok(map) = memmap2::MmapOptions::new().len(bytes).map_anon() else {
            handle_alloc_error(Layout::array::<f32>(len).unwrap_or(Layout::new::<f32>()));
        };
        // Advice only: a refusal changes nothing but speed.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Memory::Large(map)
    }

    /// Floats that fit.
    fn capacity(&self) -> usize {
        match self {
            Memory::Small(lines) => lines.len() * 16,
            Memory::Large(map) => map.len() / 4,
        }
    }
}

/// `len` floats, aligned to 64 bytes.
pub struct Buffer {
    /// Present until drop.
    memory: Option<Memory>,
    ptr: *mut f32,
    len: usize,
    home: Weak<Pool>,
}

// The buffer owns its memory alone; sharing follows the usual borrow rules through Deref.
unsafe impl Send for Buffer {}
unsafe impl Sync for Buffer {}

/// Buffers waiting to be used again.
#[derive(Default)]
pub struct Pool {
    free: Mutex<Vec<Memory>>,
}

impl Pool {
    /// A buffer of `len` floats whose contents are unspecified.
    pub fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let fits = |m: &Memory| m.capacity() >= len && m.capacity() <= len + len / 4 + 1024;
        let found = {
            let mut free = self.free.lock().unwrap_or_else(|e| e.into_inner());
            let best = (0..free.len()).filter(|&i| fits(&free[i])).min_by_key(|&i| free[i].capacity());
            best.map(|i| free.swap_remove(i))
        };
        let mut memory = found.unwrap_or_else(|| Memory::new(len));
        let ptr = match &mut memory {
            Memory::Small(lines) => lines.as_mut_ptr().cast(),
            Memory::Large(map) => map.as_mut_ptr().cast(),
        };
        let mut buffer = Buffer { memory: Some(memory), ptr, len, home: Arc::downgrade(self) };
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
        if let (Some(memory), Some(home)) = (self.memory.take(), self.home.upgrade())
            && memory.capacity() * 4 >= KEEP
        {
            home.free.lock().unwrap_or_else(|e| e.into_inner()).push(memory);
        }
    }
}

impl std::ops::Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // `ptr` is the start of `memory`, initialised, with room for `len` floats, and stays put when the buffer moves.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // As above, and `&mut self` makes it unique.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}
