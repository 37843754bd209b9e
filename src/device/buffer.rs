//! Float buffers allocated from an arena that outlives them.
//!
//! A 128³ feature map of 32 channels is 268 MB: getting it fresh from the system costs tens of
//! thousands of page faults, so memory is kept. It comes from the system in chunks; a buffer is a
//! range of a chunk, and ranges that are given back are merged with their neighbours. The buffers
//! that a network's ops allocate and free in turn thus settle in the chunks of the first run, and
//! later runs ask the system for nothing. A range holds old values; in debug builds a buffer is
//! filled with NaN, so that an op that leaves a voxel unwritten is noticed.
//!
//! Results that stay (encoded scans, answers) would fragment the chunks: they are copied to memory
//! of their own ([`Workspace::alloc_persistent`]).

use crate::memory::{self, Charge};
use crate::sync::{if_free, locked};
use std::sync::{Arc, Mutex, Weak};

/// Chunks of at least this size are separate pages, zero when first touched and placed by the
/// thread that touches them; large pages are asked for.
const LARGE: usize = 4 << 20;
/// The smallest chunk, in bytes, that small buffers share.
const CHUNK: usize = 8 << 20;
/// Floats of a cache line: ranges begin and end at lines, for their alignment.
const LINE: usize = 16;

/// A cache line of floats: what small chunks are made of.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line {
    _floats: [f32; LINE],
}

enum Memory {
    Small(Vec<Line>),
    Large(memmap2::MmapMut),
}

/// Memory from the system. The holder of a range has exclusive use of those floats.
struct Chunk {
    _memory: Memory,
    start: *mut f32,
    /// Floats, whole lines.
    len: usize,
    _charge: Charge,
}

// SAFETY: it owns its memory, which `start` is an address in.
unsafe impl Send for Chunk {}
// SAFETY: nothing reads or writes through a chunk alone: ranges are disjoint, and each belongs to
// one buffer.
unsafe impl Sync for Chunk {}

impl Chunk {
    /// Zeros for at least `len` floats. Unwinds if memory is refused.
    fn new(len: usize) -> Arc<Chunk> {
        let what = "working memory of the network";
        let charge = Charge::of::<f32>(what, len).unwrap_or_else(|e| memory::refuse(e));
        // That many bytes were just counted.
        let bytes = len * 4;
        let mut memory = if bytes < LARGE {
            let count = len.div_ceil(LINE);
            let mut lines = Vec::new();
            memory::refusable(|| lines.try_reserve_exact(count))
                .unwrap_or_else(|_| memory::refuse(memory::refused::<f32>(what, len)));
            lines.resize(count, Line { _floats: [0.0; LINE] });
            Memory::Small(lines)
        } else {
            let map = memmap2::MmapOptions::new().len(bytes).map_anon();
            let map = map.unwrap_or_else(|_| memory::refuse(memory::refused::<f32>(what, len)));
            // Advice only: a refusal changes nothing but speed.
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::HugePage);
            Memory::Large(map)
        };
        let (start, len) = match &mut memory {
            Memory::Small(lines) => (lines.as_mut_ptr().cast(), lines.len() * LINE),
            Memory::Large(map) => (map.as_mut_ptr().cast(), map.len() / 4 / LINE * LINE),
        };
        Arc::new(Chunk { _memory: memory, start, len, _charge: charge })
    }
}

/// Floats in the host's memory, from the workspace of a [`Cpu`](super::Cpu), to which the memory
/// returns when the buffer is dropped.
///
/// It dereferences to a slice, which begins at a multiple of 64 bytes unless an op moved it.
pub struct Buffer {
    chunk: Arc<Chunk>,
    /// The range of the chunk, in floats.
    range: [usize; 2],
    /// Whether the chunk is this buffer's alone.
    persistent: bool,
    ptr: *mut f32,
    len: usize,
    home: Weak<Workspace>,
}

// SAFETY: the buffer owns its range alone, and keeps the chunk.
unsafe impl Send for Buffer {}
// SAFETY: sharing follows the usual borrow rules through Deref; code that uses `base` is
// responsible for what it does there.
unsafe impl Sync for Buffer {}

/// The arena, and chunks kept for results that stay.
#[derive(Default)]
pub struct Workspace {
    arena: Mutex<Vec<Shared>>,
    persistent: Mutex<Vec<Arc<Chunk>>>,
}

/// A chunk and its free ranges, in order.
struct Shared {
    chunk: Arc<Chunk>,
    free: Vec<[usize; 2]>,
}

impl Shared {
    /// Gives a range back.
    fn free(&mut self, range: [usize; 2]) {
        let at = self.free.partition_point(|r| r[0] < range[0]);
        self.free.insert(at, range);
        // First the range behind it, then the one in front of it.
        for first in [at, at.wrapping_sub(1)] {
            if first
                .checked_add(1)
                .and_then(|second| self.free.get(second))
                .is_some_and(|second| self.free[first][1] == second[0])
            {
                self.free[first][1] = self.free.remove(first + 1)[1];
            }
        }
    }
}

/// Gives the chunks of an arena that are not in use back to the system.
fn trim(arena: &mut Vec<Shared>) {
    arena.retain(|s| s.free != [[0, s.chunk.len]]);
}

/// All arenas, so that memory they hold and do not use can be taken back.
static WORKSPACES: Mutex<Vec<Weak<Workspace>>> = Mutex::new(vec![]);

/// Gives chunks of an arena that are not in use back to the system, unless it is locked. A refusal
/// of memory unwinds through an allocation, but changes nothing before: the arena is whole.
fn trim_if_free(workspace: &Workspace) {
    if let Some(mut arena) = if_free(&workspace.arena) {
        trim(&mut arena);
    }
    if let Some(mut waiting) = if_free(&workspace.persistent) {
        waiting.clear();
    }
}

/// Gives chunks that are not in use back to the system, from every arena in which no allocation is
/// in progress.
fn trim_all() {
    let workspaces: Vec<Arc<Workspace>> =
        locked(&WORKSPACES).iter().filter_map(Weak::upgrade).collect();
    workspaces.iter().for_each(|workspace| trim_if_free(workspace));
}

/// `len` floats in whole lines; if that cannot be counted, more than memory has.
fn whole_lines(len: usize) -> usize {
    len.checked_next_multiple_of(LINE).unwrap_or(usize::MAX / LINE * LINE).max(LINE)
}

impl Workspace {
    /// An arena that gives back what it does not use if memory is short.
    pub fn new() -> Arc<Workspace> {
        memory::when_short(trim_all);
        let workspace = Arc::new(Workspace::default());
        let mut all = locked(&WORKSPACES);
        all.retain(|p| p.strong_count() > 0);
        all.push(Arc::downgrade(&workspace));
        workspace
    }

    /// A buffer of `len` floats whose contents are unspecified, with room after it for `headroom`
    /// more.
    pub fn alloc(self: &Arc<Self>, len: usize, headroom: usize) -> Buffer {
        let need = whole_lines(len.saturating_add(headroom));
        let mut arena = locked(&self.arena);
        // The smallest range that fits.
        let ranges = arena.iter().enumerate().flat_map(|(c, s)| {
            s.free.iter().enumerate().map(move |(r, range)| (range[1] - range[0], c, r))
        });
        let best = ranges.filter(|(size, ..)| *size >= need).min();
        let (c, r) = match best {
            Some((_, c, r)) => (c, r),
            None => {
                // If it does not fit, chunks that are not in use are given back for it: not while
                // they are locked.
                drop(arena);
                let chunk = Chunk::new(need.max(CHUNK / 4));
                arena = locked(&self.arena);
                let free = vec![[0, chunk.len]];
                arena.push(Shared { chunk, free });
                (arena.len() - 1, 0)
            }
        };
        let shared = &mut arena[c];
        let start = shared.free[r][0];
        shared.free[r][0] += need;
        if shared.free[r][0] == shared.free[r][1] {
            shared.free.remove(r);
        }
        let chunk = shared.chunk.clone();
        drop(arena);
        self.buffer(chunk, [start, start + need], len, false)
    }

    /// A buffer of `len` floats in memory of its own.
    pub fn alloc_persistent(self: &Arc<Self>, len: usize) -> Buffer {
        let need = whole_lines(len);
        let mut waiting = locked(&self.persistent);
        let found =
            waiting.iter().position(|chunk| chunk.len >= need && chunk.len <= need + need / 8);
        let found = found.map(|at| waiting.swap_remove(at));
        // If a new one does not fit, those that wait are given back for it: not while they are
        // locked.
        drop(waiting);
        let chunk = found.unwrap_or_else(|| Chunk::new(need));
        let range = [0, chunk.len];
        self.buffer(chunk, range, len, true)
    }

    fn buffer(
        self: &Arc<Self>,
        chunk: Arc<Chunk>,
        range: [usize; 2],
        len: usize,
        persistent: bool,
    ) -> Buffer {
        // SAFETY: the range lies within the chunk.
        let ptr = unsafe { chunk.start.add(range[0]) };
        let mut buffer = Buffer { chunk, range, persistent, ptr, len, home: Arc::downgrade(self) };
        if cfg!(debug_assertions) {
            buffer.fill(f32::NAN);
        }
        buffer
    }

    /// Bytes of the system's memory that the arena holds, buffers in use included.
    pub fn bytes(&self) -> usize {
        let (arena, waiting) = (locked(&self.arena), locked(&self.persistent));
        4 * (arena.iter().map(|s| s.chunk.len).sum::<usize>()
            + waiting.iter().map(|c| c.len).sum::<usize>())
    }

    /// Bytes of the buffers of the arena that are in use.
    pub fn bytes_in_use(&self) -> usize {
        let of = |s: &Shared| s.chunk.len - s.free.iter().map(|r| r[1] - r[0]).sum::<usize>();
        4 * locked(&self.arena).iter().map(of).sum::<usize>()
    }

    /// Gives all chunks that are not in use back to the system.
    pub fn trim(&self) {
        trim(&mut locked(&self.arena));
        locked(&self.persistent).clear();
    }
}

impl Buffer {
    /// The floats of its range before it and after it.
    pub(crate) fn headroom(&self) -> [usize; 2] {
        // SAFETY: both lie in the chunk.
        let front = unsafe { self.ptr.offset_from(self.chunk.start.add(self.range[0])) } as usize;
        [front, self.range[1] - self.range[0] - front - self.len]
    }

    /// The address of its first float, valid for its whole range, including the room before and
    /// after it. The buffer's own slices do not invalidate it: through it, parts are read while
    /// others are written.
    pub(crate) fn base(&self) -> *mut f32 {
        self.ptr
    }

    /// Whether no other buffer can be in its chunk.
    pub(crate) fn is_alone(&self) -> bool {
        self.range == [0, self.chunk.len]
    }

    /// Moves the buffer `by` floats within its range; the values stay where they are.
    ///
    /// # Panics
    /// If there is no room for that.
    pub(crate) fn shift_base(&mut self, by: isize) {
        let [front, behind] = self.headroom();
        assert!(
            if by < 0 { by.unsigned_abs() <= front } else { by as usize <= behind },
            "a buffer slides within its memory"
        );
        // SAFETY: just checked.
        self.ptr = unsafe { self.ptr.offset(by) };
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(home) = self.home.upgrade() else { return };
        if self.persistent {
            return locked(&home.persistent).push(self.chunk.clone());
        }
        let mut arena = locked(&home.arena);
        if let Some(shared) = arena.iter_mut().find(|s| Arc::ptr_eq(&s.chunk, &self.chunk)) {
            shared.free(self.range);
        }
    }
}

impl std::ops::Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: the range is initialised, has room for `len` floats from `ptr` on, and stays put
        // when the buffer moves.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and `&mut self` makes it unique.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_disjoint_join_again_and_are_used_again() {
        let workspace = Arc::new(Workspace::default());
        let mut state = 1u64;
        let mut next = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        let mut held: Vec<(Buffer, f32)> = vec![];
        for step in 0..4000 {
            if next(2) == 0 || held.is_empty() {
                let mut buffer = workspace.alloc(next(200_000) as usize, next(1000) as usize);
                buffer.fill(step as f32);
                held.push((buffer, step as f32));
            } else {
                let (buffer, value) = held.swap_remove(next(held.len() as u64) as usize);
                assert!(buffer.iter().all(|v| *v == value), "a buffer's values were overwritten");
                assert_eq!(buffer.as_ptr() as usize % 64, 0);
            }
        }
        held.clear();
        for shared in workspace.arena.lock().unwrap().iter() {
            assert_eq!(shared.free, [[0, shared.chunk.len]], "free ranges did not join");
        }
        assert_eq!(workspace.bytes_in_use(), 0);
        let one = workspace.alloc(100, 0);
        assert_eq!(workspace.bytes_in_use(), 4 * 112);
        drop(one);
        let bytes = workspace.bytes();
        drop([workspace.alloc(100, 0), workspace.alloc(1 << 18, 0)]);
        assert_eq!(workspace.bytes(), bytes);
        workspace.trim();
        assert_eq!(workspace.bytes(), 0);
    }

    #[test]
    fn what_stays_has_memory_of_its_own_that_is_taken_again() {
        let workspace = Arc::new(Workspace::default());
        let (mut one, other) = (workspace.alloc_persistent(100), workspace.alloc_persistent(100));
        assert!(one.is_alone() && other.is_alone() && one.base() != other.base());
        one.fill(1.0);
        // The room after the values is written through its address, and then belongs to them.
        assert_eq!(one.headroom(), [0, 12]);
        let behind = one.base().wrapping_add(100);
        // SAFETY: it is in the range of the buffer, to which nothing else has an address.
        unsafe { behind.write(2.0) };
        one.shift_base(1);
        assert_eq!((one[0], one[99]), (1.0, 2.0));
        let place = other.base();
        drop(other);
        assert_eq!(workspace.alloc_persistent(104).base(), place);
    }

    #[test]
    fn what_waits_is_given_back_after_a_refusal_too() {
        let workspace = Arc::new(Workspace::default());
        drop((workspace.alloc(100, 0), workspace.alloc_persistent(100)));
        assert!(workspace.bytes() > 0);
        std::thread::scope(|s| {
            let refused = s.spawn(|| {
                let _held = (locked(&workspace.arena), locked(&workspace.persistent));
                std::panic::resume_unwind(Box::new("refused"));
            });
            assert!(refused.join().is_err());
        });
        assert!(workspace.arena.is_poisoned() && workspace.persistent.is_poisoned());
        trim_if_free(&workspace);
        assert_eq!(workspace.bytes(), 0);
    }

    #[test]
    fn a_buffer_slides_within_its_room() {
        let workspace = Arc::new(Workspace::default());
        let mut buffer = workspace.alloc(100, 28);
        assert_eq!(buffer.headroom(), [0, 28]);
        buffer.shift_base(20);
        buffer.fill(1.0);
        assert_eq!(buffer.headroom(), [20, 8]);
        buffer.shift_base(-20);
        assert_eq!(buffer[20..], [1.0; 80]);
    }
}
