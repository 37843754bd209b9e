//! After a warm-up, encoding a scan and answering a click request no memory from the system: their
//! working memory is kept and reused. Only the masks that the caller gets are new, and bookkeeping
//! (shapes, lists of tokens) of less than a page or two each.

use prism::device::{Cpu, Device};
use prism::model::{Config, Model, Observer, PatchPrompts, Weights, prompt_maps};
use prism::tensor::Tensor;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Allocations from this size on count.
const LARGE: usize = 8 << 10;
static WATCHING: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);
/// Bytes of a mask that the caller gets.
static EXPECTED: AtomicUsize = AtomicUsize::new(0);

struct Watching;

fn note(size: usize) {
    if WATCHING.load(Ordering::Relaxed) && size >= LARGE && size != EXPECTED.load(Ordering::Relaxed)
    {
        COUNT.fetch_add(1, Ordering::Relaxed);
        LARGEST.fetch_max(size, Ordering::Relaxed);
        if std::env::var_os("PRISM_TEST_TRACE").is_some() {
            WATCHING.store(false, Ordering::Relaxed);
            eprintln!("{size} bytes at\n{}", std::backtrace::Backtrace::force_capture());
            WATCHING.store(true, Ordering::Relaxed);
        }
    }
}

// SAFETY: all memory comes from the system's allocator, which is given the same arguments.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller passes a layout of nonzero size.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller gives back memory from `alloc` with this layout, which is the
        // system's.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller passes a layout of nonzero size.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: the memory is the system's, with this layout, and the caller passes a size that a
        // layout may have.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

#[test]
fn encode_and_click_ask_for_no_memory_after_a_warm_up() {
    let cpu = Cpu::new(2).unwrap();
    let device = Device::Cpu(cpu.clone());
    let config = Config { patch: 64, ..Config::small() };
    let s = config.patch;
    let model = Model::new(&device, &Weights::hashed(config, "public")).unwrap();
    model.warm_up().unwrap();
    let image = Tensor::new([s; 3], (0..s * s * s).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect());
    let prompts = |seed: i32| {
        let points =
            (0..60).map(|n| ([(n * 7 + seed) % 64, n, (n * 13) % 64], n % 3 != 0)).collect();
        PatchPrompts { points, bounds: None }
    };
    // Once by hand: there are more tokens than in the warm-up.
    let run = |seed: i32| {
        let features = model.encode(&image, &mut Observer::none()).unwrap();
        let mut dense = Tensor::from_buffer([s; 3], cpu.zeros(s * s * s));
        for click in 0..2 {
            let prompts = prompts(seed + click);
            let history = prompt_maps(&device, s, &prompts.points);
            let answer = model
                .interact(&features, &prompts, &dense, &history, &mut Observer::none())
                .unwrap();
            dense = answer.logits.value().reshape([s; 3]);
        }
    };
    run(0);
    EXPECTED.store(s * s * s / 8, Ordering::Relaxed);
    // How many bytes the arena grew by meanwhile.
    let watched = || {
        let held = cpu.held_bytes();
        COUNT.store(0, Ordering::Relaxed);
        WATCHING.store(true, Ordering::Relaxed);
        (1..4).for_each(run);
        WATCHING.store(false, Ordering::Relaxed);
        cpu.held_bytes().saturating_sub(held)
    };
    // Once more if a thread that was paused in all of the warm-up does the first of its work now.
    let grown: Vec<usize> = (0..8)
        .map(|_| watched())
        .take_while(|grown| *grown > 0 || COUNT.load(Ordering::Relaxed) > 0)
        .collect();
    let (count, largest) = (COUNT.load(Ordering::Relaxed), LARGEST.load(Ordering::Relaxed));
    assert!(
        grown.len() < 8,
        "{count} allocations of {LARGE} bytes or more, the largest {largest} (PRISM_TEST_TRACE=1 shows where); the arena grew by {grown:?} bytes after the warm-up"
    );
}
