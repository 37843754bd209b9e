//! Any sequence of calls of the C interface, made from bytes: what a fuzzer, or a test with random
//! bytes, runs. Whatever the sequence, every call must return, with anything but `PRISM_INTERNAL`,
//! and touch no memory but what it was given; also where a session is freed while another thread
//! works with it, where the process forks, and where memory is refused, by a budget or by the
//! system.

use prism::capi::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::{CString, c_void};
use std::ptr::{null, null_mut, without_provenance_mut};
use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicUsize, Ordering};
use std::time::Duration;

/// Calls of one sequence, at most.
const MOST: usize = 40;
/// Forks of one sequence, at most.
const MOST_FORKS: usize = 1;
/// Largest edge of a wrapped array.
const EDGE: usize = 12;

/// What a sequence came to.
#[derive(Default)]
pub struct Tally {
    /// Calls that returned each status.
    pub statuses: [usize; 14],
    /// Interactions that gave an answer.
    pub answers: usize,
    /// Sessions that were freed during another thread's call with them.
    pub freed_at_work: usize,
    /// Forks in which a call was made.
    pub forks: usize,
    /// Allocations that [`Refusing`] refused.
    pub unallocated: usize,
}

/// The smallest allocation, in bytes, that may be refused: smaller ones, among them the packed
/// blocks of a matrix product, are requested in a way that ends the process.
const LARGE: usize = 1 << 20;
/// How many large allocations succeed before one is refused; below 0 all do.
static GIVEN: AtomicIsize = AtomicIsize::new(-1);
/// Allocations that were refused since a sequence last counted them.
static REFUSED: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, which refuses a large allocation as [`GIVEN`] says.
struct Refusing;

impl Refusing {
    fn refuses(&self, bytes: usize) -> bool {
        let refuses = bytes >= LARGE
            && GIVEN.load(Ordering::Relaxed) >= 0
            && GIVEN.fetch_sub(1, Ordering::Relaxed) == 0;
        if refuses {
            REFUSED.fetch_add(1, Ordering::Relaxed);
        }
        refuses
    }
}

// SAFETY: all memory is the system allocator's, requested and given back unchanged, or NULL, which
// means a refusal.
unsafe impl GlobalAlloc for Refusing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if self.refuses(layout.size()) {
            return null_mut();
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if self.refuses(layout.size()) {
            return null_mut();
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if self.refuses(size) {
            return null_mut();
        }
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise; all memory came from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Refusing = Refusing;

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn below(&mut self, n: usize) -> usize {
        self.byte() as usize % n.max(1)
    }

    /// Mostly what is sensible, at times anything.
    fn odd<T>(&mut self, usual: T, strange: &[T]) -> T
    where
        T: Copy,
    {
        match self.byte() {
            b if b < 244 => usual,
            b => strange[b as usize % strange.len()],
        }
    }
}

/// Handles of all kinds, freed ones among them.
struct Held(Vec<*mut c_void>);

impl Held {
    /// One that may be of any kind, or none at all.
    fn pick<T>(&self, bytes: &mut Bytes, usual: *mut T) -> *mut T {
        match bytes.byte() {
            b if b < 236 => usual,
            b if b < 248 && !self.0.is_empty() => self.0[b as usize % self.0.len()].cast(),
            b => [
                null_mut(),
                without_provenance_mut(b as usize),
                without_provenance_mut(usize::MAX - b as usize),
            ][b as usize % 3],
        }
    }
}

/// # Safety
/// `user` is the counter of the sequence, which outlives the call.
unsafe extern "C" fn progress(
    user: *mut c_void,
    _done: f64,
    _stage: *const std::ffi::c_char,
) -> i32 {
    // SAFETY: the sequence's own counter, alive as long as it.
    unsafe {
        let left = user.cast::<i32>();
        *left -= 1;
        (*left != 0).into()
    }
}

/// The values of a wrapped array: noise.
fn noise() -> Vec<i16> {
    (0..EDGE * EDGE * EDGE).map(|v| (v * 7919 % 400) as i16 - 200).collect()
}

/// An array of all of [`noise`].
fn array_of(voxels: &[i16]) -> prism_array {
    prism_array {
        struct_size: size_of::<prism_array>(),
        data: voxels.as_ptr().cast(),
        element: prism_element::PRISM_INT16 as i32,
        size: [EDGE; 3],
        strides: [0; 3],
        affine: null(),
        spacing: null(),
    }
}

/// Prompts of one click.
fn click(point: &[f64; 3]) -> prism_prompts {
    // SAFETY: all fields are numbers or pointers, and zeros are values of these.
    let nothing: prism_prompts = unsafe { std::mem::zeroed() };
    prism_prompts {
        struct_size: size_of::<prism_prompts>(),
        points: point.as_ptr(),
        point_count: 1,
        ..nothing
    }
}

/// Opens a session and frees it, with its volume, while another thread works with it; the voxels go
/// at once. Returns the status of the other thread's call, or of what failed before it, and whether
/// that call was under way when the freeing began.
fn free_at_work(bytes: &mut Bytes, model: *mut prism_model) -> (prism_status, bool) {
    let voxels = noise();
    let (mut volume, mut session) = (null_mut(), null_mut());
    // SAFETY: the array is as large as it says, until both are freed.
    unsafe {
        let made = prism_volume_wrap(&array_of(&voxels), &mut volume);
        if made != prism_status::PRISM_OK {
            return (made, false);
        }
        let made = prism_session_open(model, volume, null(), &mut session);
        if made != prism_status::PRISM_OK {
            assert!(prism_volume_free(volume) == prism_status::PRISM_OK, "{}", message());
            return (made, false);
        }
    }
    let (wait, how) = (u64::from(bytes.byte()), bytes.byte());
    // A handle is a number.
    let number = session.addr();
    let working = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let worker = scope.spawn(move || {
            let session: *mut prism_session = without_provenance_mut(number);
            let point = [6.0; 3];
            let prompts = click(&point);
            working.store(true, Ordering::SeqCst);
            // SAFETY: the prompts hold what they say; the handle may be freed.
            let status = unsafe {
                match how & 1 {
                    0 => prism_session_encode(session, &prompts),
                    _ => prism_session_interact(session, &prompts, null_mut()),
                }
            };
            working.store(false, Ordering::SeqCst);
            status
        });
        // Before the other thread's call, in the middle of it, or after it.
        std::thread::sleep(Duration::from_micros(64 * wait));
        if how & 2 != 0 {
            assert!(prism_session_cancel(session) == prism_status::PRISM_OK, "{}", message());
        }
        let at_work = working.load(Ordering::SeqCst);
        let volume_first = how & 4 != 0;
        if volume_first {
            assert!(prism_volume_free(volume) == prism_status::PRISM_OK, "{}", message());
        }
        assert!(prism_session_free(session) == prism_status::PRISM_OK, "{}", message());
        if !volume_first {
            assert!(prism_volume_free(volume) == prism_status::PRISM_OK, "{}", message());
        }
        drop(voxels);
        (worker.join().unwrap(), at_work)
    })
}

/// Makes a call in a fork of this process: it must return PRISM_FORKED, and not hang. False if the
/// system makes no fork.
#[cfg(unix)]
fn fork_calls(which: u8, session: *mut prism_session, prediction: *mut prism_prediction) -> bool {
    // SAFETY: the child does only what is allowed without the other threads of the process, and one
    // call, of which the library promises the same. It ends without handlers of an exit.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            // A limit on this process's time does not end the child.
            libc::signal(libc::SIGALRM, libc::SIG_DFL);
            libc::alarm(300);
            let (point, mut needed) = ([6.0; 3], 0);
            let told = match which % 6 {
                0 => prism_session_interact(session, &click(&point), null_mut()),
                1 => prism_session_undo(session),
                2 => prism_session_free(session),
                3 => prism_prediction_get_mask(prediction, 0, null_mut(), 0, null(), &mut needed),
                4 => prism_volume_free(null_mut()),
                _ => prism_engine_open(c"cpu".as_ptr(), null(), &mut null_mut()),
            };
            libc::_exit((told != prism_status::PRISM_FORKED).into());
        }
        if child < 0 {
            return false;
        }
        let mut status = 0;
        while libc::waitpid(child, &mut status, 0) < 0 {
            // A signal to this process came first.
            let error = std::io::Error::last_os_error();
            assert!(error.kind() == std::io::ErrorKind::Interrupted, "{error}");
        }
        let told = libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0;
        assert!(told, "call {} of a fork ended with {status:#x}", which % 6);
        true
    }
}

#[cfg(not(unix))]
fn fork_calls(_: u8, _: *mut prism_session, _: *mut prism_prediction) -> bool {
    false
}

/// Runs the calls that `bytes` stand for, on a model; some under a `budget` that is soon used up,
/// or with a large allocation refused, if nothing else in the process needs it.
pub fn run(bytes: &[u8], model: *mut prism_model, budget: bool) -> Tally {
    let mut bytes = Bytes(bytes);
    let mut tally = Tally::default();
    let mut held = Held(vec![model.cast()]);
    let (mut volume, mut session, mut prediction): (
        *mut prism_volume,
        *mut prism_session,
        *mut prism_prediction,
    ) = (null_mut(), null_mut(), null_mut());
    let voxels = noise();
    // Stages until a callback cancels, where the library can still reach it.
    let counter = std::cell::Cell::new(0i32);
    let mut buffer = vec![0u8; EDGE * EDGE * EDGE * 8];

    // A session to work on, so that most sequences get somewhere.
    // SAFETY: the array is as large as it says.
    unsafe {
        assert!(
            prism_volume_wrap(&array_of(&voxels), &mut volume) == prism_status::PRISM_OK,
            "{}",
            message()
        );
        assert!(
            prism_session_open(model, volume, null(), &mut session) == prism_status::PRISM_OK,
            "{}",
            message()
        );
    }
    held.0.extend([volume.cast(), session.cast()]);

    for _ in 0..MOST {
        if bytes.0.is_empty() {
            break;
        }
        let call = bytes.below(18);
        match bytes.byte() {
            151..=229 if budget => {
                prism::memory::set_limit(prism::memory::used() + ((bytes.byte() as u64) << 15))
            }
            230.. if budget => GIVEN.store((bytes.byte() % 16).into(), Ordering::Relaxed),
            _ => {}
        }
        // SAFETY: pointers are NULL or lead to what the structures say; handles may be anything.
        let status = unsafe {
            match call {
                0 => {
                    let edge = |b: &mut Bytes| {
                        b.odd(
                            2 + b.0.first().map_or(0, |v| *v as usize % (EDGE - 1)),
                            &[0, 1, usize::MAX, 1 << 40],
                        )
                    };
                    let size = [edge(&mut bytes), edge(&mut bytes), edge(&mut bytes)];
                    // Within the array, unless the library is to refuse it unread.
                    let sound = size.iter().all(|s| (1..=EDGE).contains(s));
                    let strides = match (sound, bytes.below(3)) {
                        (true, 0) => [2 * (EDGE * EDGE) as isize, 2 * EDGE as isize, 2],
                        (true, 1) => [2, 2, 2],
                        _ => [0; 3],
                    };
                    let affine: [f64; 16] = std::array::from_fn(|i| {
                        if i % 5 == 0 { bytes.odd(1.0, &[-2.0, 0.0, f64::NAN, 1e300]) } else { 0.0 }
                    });
                    let spacing = [1.0, bytes.odd(1.0, &[f64::NAN, 0.0, -1.0, 1e-300]), 2.0];
                    let array = prism_array {
                        struct_size: bytes.odd(size_of::<prism_array>(), &[0, 8, usize::MAX]),
                        data: if bytes.byte() > 250 { null() } else { voxels.as_ptr().cast() },
                        element: bytes.odd(2, &[-1, 0, 1, 2, 3, 11]),
                        size,
                        strides,
                        affine: if bytes.byte() > 127 { affine.as_ptr() } else { null() },
                        spacing: if bytes.byte() > 200 { spacing.as_ptr() } else { null() },
                    };
                    let status = prism_volume_wrap(&array, &mut volume);
                    held.0.push(volume.cast());
                    status
                }
                1 => {
                    let options = prism_session_options {
                        struct_size: size_of::<prism_session_options>(),
                        spacing: bytes.odd(0.0, &[1.0, -1.0, f64::NAN, 1e9, 1e-9]),
                        intensity: bytes.below(7) as i32,
                        clip: [-100.0, bytes.odd(100.0, &[f32::NAN, -100.0])],
                        mean: bytes.odd(0.0, &[f32::NAN, f32::INFINITY]),
                        sd: bytes.odd(50.0, &[0.0, -1.0, f32::INFINITY, f32::NAN]),
                        reserved: 0,
                        released: bytes.odd(0, &[1, 1, 2, -1]),
                        memory: bytes.odd(0, &[1, usize::MAX]),
                        undo_steps: bytes.odd(0, &[1, 2]),
                        undo_bytes: bytes.odd(0, &[1]),
                    };
                    let options = if bytes.byte() > 127 { &raw const options } else { null() };
                    let status = prism_session_open(
                        held.pick(&mut bytes, model),
                        held.pick(&mut bytes, volume),
                        options,
                        &mut session,
                    );
                    held.0.push(session.cast());
                    status
                }
                2..=5 => {
                    let coordinate = |b: &mut Bytes| {
                        b.odd(
                            b.0.first().map_or(0.0, |v| (v % 12) as f64),
                            &[-1.0, 0.5, f64::NAN, 1e30, 200.0],
                        )
                    };
                    let points: Vec<f64> =
                        (0..3 * (1 + bytes.below(3))).map(|_| coordinate(&mut bytes)).collect();
                    let bounds: [f64; 6] =
                        std::array::from_fn(
                            |a| if a < 3 { 0.0 } else { coordinate(&mut bytes) + 1.0 },
                        );
                    let scribble = [1, 1, 1, 2, bytes.odd(1, &[-5, i32::MAX, i32::MIN]), 1];
                    let labels = [1, 0, bytes.odd(1, &[2, 255])];
                    let mut dense = vec![
                        bytes.odd(0.5f32, &[f32::NAN, f32::INFINITY, -3.0]);
                        EDGE * EDGE * EDGE
                    ];
                    dense[EDGE] = bytes.odd(-1.0, &[f32::NAN, f32::NEG_INFINITY, 1e38]);
                    let kind = bytes.odd(0, &[1, 2, 3, -1]);
                    let line: [f64; 6] = std::array::from_fn(|_| coordinate(&mut bytes));
                    let lasso: [f64; 12] =
                        std::array::from_fn(
                            |a| if a % 3 == 2 { 1.0 } else { coordinate(&mut bytes) },
                        );
                    let others: Vec<u8> =
                        (0..EDGE * EDGE * EDGE).map(|v| u8::from(v % 31 == 0)).collect();
                    let prompts = prism_prompts {
                        struct_size: bytes.odd(size_of::<prism_prompts>(), &[0, 1]),
                        space: bytes.odd(0, &[1, 2, 3, -7]),
                        points: points.as_ptr(),
                        point_labels: if bytes.byte() > 127 { labels.as_ptr() } else { null() },
                        point_count: bytes.odd(points.len() / 3, &[0, 0, 0]),
                        bounds: if bytes.byte() > 127 { bounds.as_ptr() } else { null() },
                        scribble: scribble.as_ptr(),
                        scribble_labels: if bytes.byte() > 127 { labels.as_ptr() } else { null() },
                        scribble_count: bytes.below(3),
                        dense: if bytes.byte() > 250 { null() } else { dense.as_ptr().cast() },
                        dense_kind: kind,
                        dense_strides: [0; 3],
                        lines: if bytes.byte() > 200 { line.as_ptr() } else { null() },
                        line_count: bytes.odd(0, &[1, 1, usize::MAX]),
                        lasso: if bytes.byte() > 200 { lasso.as_ptr() } else { null() },
                        lasso_count: bytes.odd(0, &[1, 3, 4, usize::MAX]),
                        others: if bytes.byte() > 220 { others.as_ptr() } else { null() },
                        others_strides: [0; 3],
                    };
                    let session = held.pick(&mut bytes, session);
                    match call {
                        2 => prism_session_encode(session, &prompts),
                        _ => {
                            let status = prism_session_interact(session, &prompts, &mut prediction);
                            held.0.push(prediction.cast());
                            tally.answers += usize::from(status == prism_status::PRISM_OK);
                            status
                        }
                    }
                }
                6 => prism_session_undo(held.pick(&mut bytes, session)),
                7 => prism_session_redo(held.pick(&mut bytes, session)),
                8 => match bytes.below(4) {
                    0 => prism_session_reset(held.pick(&mut bytes, session)),
                    1 => prism_session_cancel(held.pick(&mut bytes, session)),
                    2 => prism_session_get_prediction(
                        held.pick(&mut bytes, session),
                        &mut prediction,
                    ),
                    _ => {
                        let status =
                            prism_session_fork(held.pick(&mut bytes, session), &mut session);
                        held.0.push(session.cast());
                        status
                    }
                },
                9 => {
                    let until = bytes.below(12) as i32 - 1;
                    counter.set(until);
                    let progress: prism_progress_callback =
                        if until < 0 { None } else { Some(progress) };
                    prism_session_set_progress(
                        held.pick(&mut bytes, session),
                        progress,
                        counter.as_ptr().cast(),
                    )
                }
                10 | 11 => {
                    let capacity = [buffer.len(), buffer.len(), 1][bytes.below(3)];
                    let strides = [1, bytes.odd(12, &[0, -1, isize::MAX]), 144];
                    let strides = if bytes.byte() > 127 { strides.as_ptr() } else { null() };
                    let (grid, mut needed) = (bytes.odd(0, &[1, 2, -1]), 0);
                    let place = if bytes.byte() > 200 { null_mut() } else { buffer.as_mut_ptr() };
                    let prediction = held.pick(&mut bytes, prediction);
                    match call {
                        10 => prism_prediction_get_mask(
                            prediction,
                            grid,
                            place,
                            capacity,
                            strides,
                            &mut needed,
                        ),
                        _ => prism_prediction_get_logits(
                            prediction,
                            grid,
                            place.cast(),
                            capacity,
                            strides,
                            &mut needed,
                        ),
                    }
                }
                12 => {
                    let mut info = prism_prediction_info {
                        struct_size: bytes.odd(size_of::<prism_prediction_info>(), &[0]),
                        ..std::mem::zeroed()
                    };
                    prism_prediction_get_info(held.pick(&mut bytes, prediction), &mut info)
                }
                13 => {
                    let mut scores = [0.0; 4];
                    let candidate = bytes.below(6);
                    let prediction = held.pick(&mut bytes, prediction);
                    prism_prediction_get_candidate(
                        prediction,
                        candidate,
                        buffer.as_mut_ptr(),
                        buffer.len(),
                        null(),
                        null_mut(),
                    );
                    prism_prediction_get_scores(
                        prediction,
                        scores.as_mut_ptr(),
                        bytes.odd(4, &[0, 1]),
                        null_mut(),
                    )
                }
                14 => {
                    let text = CString::new([bytes.byte() | 1, bytes.byte() | 1]).unwrap();
                    let mut none = null_mut();
                    prism_model_load(held.pick(&mut bytes, model).cast(), text.as_ptr(), &mut none)
                }
                15 => match bytes.below(3) {
                    0 => prism_volume_free(held.pick(&mut bytes, volume)),
                    1 => prism_session_free(held.pick(&mut bytes, session)),
                    _ => prism_prediction_free(held.pick(&mut bytes, prediction)),
                },
                16 => match bytes.below(4) {
                    0 => {
                        let mut info = prism_model_info {
                            struct_size: bytes.odd(size_of::<prism_model_info>(), &[0]),
                            ..std::mem::zeroed()
                        };
                        prism_model_get_info(held.pick(&mut bytes, model), &mut info)
                    }
                    1 => {
                        let mut info = prism_volume_info {
                            struct_size: bytes.odd(size_of::<prism_volume_info>(), &[0]),
                            ..std::mem::zeroed()
                        };
                        prism_volume_get_info(held.pick(&mut bytes, volume), &mut info)
                    }
                    2 => {
                        let mut info = prism_patch_info {
                            struct_size: bytes.odd(size_of::<prism_patch_info>(), &[0]),
                            ..std::mem::zeroed()
                        };
                        prism_session_get_patch(held.pick(&mut bytes, session), &mut info)
                    }
                    _ => {
                        let (mut undo, mut redo) = (0, 0);
                        let session = held.pick(&mut bytes, session);
                        prism_session_get_depth(session, &mut undo, &mut redo)
                    }
                },
                // Threads and forks take long.
                _ => match bytes.below(4) {
                    0 => {
                        let (status, at_work) = free_at_work(&mut bytes, model);
                        tally.freed_at_work += usize::from(at_work);
                        status
                    }
                    1 if tally.forks < MOST_FORKS => {
                        let forked = fork_calls(bytes.byte(), session, prediction);
                        tally.forks += usize::from(forked);
                        prism_session_cancel(session)
                    }
                    _ => prism_session_cancel(held.pick(&mut bytes, session)),
                },
            }
        };
        if budget {
            prism::memory::set_limit(0);
            GIVEN.store(-1, Ordering::Relaxed);
        }
        assert!(status != prism_status::PRISM_INTERNAL, "call {call}: {}", message());
        tally.statuses[status as usize] += 1;
    }
    // Everything but the model goes; what is of another kind, or went before, is refused.
    for handle in held.0.into_iter().chain([volume.cast(), session.cast(), prediction.cast()]) {
        prism_prediction_free(handle.cast());
        prism_session_free(handle.cast());
        prism_volume_free(handle.cast());
    }
    tally.unallocated = REFUSED.swap(0, Ordering::Relaxed);
    tally
}

/// The last message.
pub fn message() -> String {
    // SAFETY: the library's text.
    unsafe { std::ffi::CStr::from_ptr(prism_last_error()) }.to_string_lossy().into_owned()
}

/// A model of hashed weights, loaded from memory on an engine of one thread, both for as long as
/// the process lives.
pub fn model(weights: &prism::model::Weights) -> *mut prism_model {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    weights.save(&path, prism::model::weights::Precision::F32).unwrap();
    let file = std::fs::read(path).unwrap();
    let options = prism_engine_options {
        struct_size: size_of::<prism_engine_options>(),
        threads: 1,
        precision: 0,
        memory: 0,
    };
    let (mut engine, mut model) = (null_mut(), null_mut());
    // SAFETY: everything is what it says.
    unsafe {
        assert!(
            prism_engine_open(c"cpu".as_ptr(), &options, &mut engine) == prism_status::PRISM_OK,
            "{}",
            message()
        );
        let status = prism_model_load_memory(engine, file.as_ptr().cast(), file.len(), &mut model);
        assert!(status == prism_status::PRISM_OK, "{}", message());
    }
    model
}
