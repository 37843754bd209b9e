//! Sequences of calls of the C interface from random bytes. The fuzz target
//! `fuzz/fuzz_targets/calls.rs` runs the same from bytes that a fuzzer chooses. Also what a budget,
//! which applies to the whole process, refuses.

mod common;
#[path = "common/calls.rs"]
mod sequences;

use common::tiny;
use prism::capi::*;
use prism::model::Weights;
use prism::prompt::simulate::generator;
use prism::prompt::{Dense, Prompts};
use rand::RngExt;
use std::sync::Mutex;

/// The budget is the process's: a test that changes it, or needs it, runs alone.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn no_sequence_of_calls_is_an_internal_error() {
    let _alone = ALONE.lock().unwrap();
    let model = sequences::model(&Weights::hashed(tiny(), "tiny"));
    let (mut statuses, mut answers, mut freed, mut forks) = ([0; 14], 0, 0, 0);
    let mut unallocated = 0;
    for seed in 0..300 {
        let mut rng = generator(seed, &[]);
        let bytes: Vec<u8> = (0..600).map(|_| rng.random()).collect();
        let tally = sequences::run(&bytes, model, true);
        statuses.iter_mut().zip(tally.statuses).for_each(|(sum, n)| *sum += n);
        answers += tally.answers;
        freed += tally.freed_at_work;
        forks += tally.forks;
        unallocated += tally.unallocated;
    }
    // Sequences that all failed at once would prove nothing.
    let [
        ok,
        argument,
        handle,
        file,
        _,
        small,
        _,
        cancelled,
        nothing,
        prompt,
        internal,
        refused,
        forked,
        _,
    ] = statuses;
    // Only the forks get PRISM_FORKED.
    assert_eq!((internal, forked), (0, 0));
    for (what, count) in [
        ("ok", ok),
        ("argument", argument),
        ("handle", handle),
        ("small", small),
        ("nothing", nothing),
        ("prompt", prompt),
        ("refused", refused),
        ("answers", answers),
    ] {
        assert!(count > 10, "only {count} {what}: {statuses:?}");
    }
    assert!(cancelled + file > 0, "{statuses:?}");
    // How many hangs on the machine.
    assert!(freed > 0, "no session was freed at work");
    assert!(unallocated > 0, "the allocator refused nothing: {statuses:?}");
    assert!(forks > 10 || cfg!(not(unix)), "only {forks} forks");
}

/// The bytes that are held once nothing gives any back: threads of objects that were freed at work
/// end a little later.
fn held() -> u64 {
    for _ in 0..600 {
        let before = prism::memory::used();
        std::thread::sleep(std::time::Duration::from_millis(200));
        if prism::memory::used() == before {
            return before;
        }
    }
    panic!("what is held changes all the time");
}

#[test]
fn prompts_that_are_joined_are_all_there_or_none_of_them() {
    let _alone = ALONE.lock().unwrap();
    let (mask, held) = (vec![1u8; 32 << 20], held());
    let small = Prompts { points: vec![([1, 2, 3], true)], ..Prompts::default() };
    for large in [
        Prompts { dense: Some(Dense::Mask(mask.clone())), ..small.clone() },
        Prompts { dense: Some(Dense::Logits(vec![0.5; 8 << 20])), ..small.clone() },
        Prompts { others: Some(mask), ..small.clone() },
        Prompts { points: vec![([1, 2, 3], true); 1 << 20], ..small.clone() },
    ] {
        let mut said = Prompts::default();
        said.join(&small).unwrap();
        prism::memory::set_limit(held + (16 << 20));
        let refused = said.join(&large);
        prism::memory::set_limit(0);
        assert!(refused.is_err_and(|e| e.to_string().starts_with("out of memory: ")));
        assert_eq!(said, small);
        said.join(&large).unwrap();
        assert!(said.points.len() > large.points.len());
        assert!(said.dense == large.dense && said.others == large.others);
    }
}

/// Any number may be a handle. Those that sequences guess are of the first objects that the process
/// made: none of them may belong to another thread.
fn use_up_guesses() {
    let voxel = [0u8; 1];
    let array = prism_array {
        struct_size: size_of::<prism_array>(),
        data: voxel.as_ptr().cast(),
        element: prism_element::PRISM_UINT8 as i32,
        size: [1; 3],
        strides: [0; 3],
        affine: std::ptr::null(),
        spacing: std::ptr::null(),
    };
    let made: Vec<*mut prism_volume> = (0..256)
        .map(|_| {
            let mut volume = std::ptr::null_mut();
            // SAFETY: the array holds the voxel that it describes.
            let status = unsafe { prism_volume_wrap(&array, &mut volume) };
            assert!(status == prism_status::PRISM_OK, "{}", sequences::message());
            volume
        })
        .collect();
    made.into_iter()
        .for_each(|volume| assert!(prism_volume_free(volume) == prism_status::PRISM_OK));
}

/// The answers of some sequences of a thread. A handle is a number.
fn answers(model: usize, thread: u64) -> usize {
    let one = |round: u64| {
        let mut rng = generator(round, &[thread]);
        let bytes: Vec<u8> = (0..600).map(|_| rng.random()).collect();
        sequences::run(&bytes, std::ptr::without_provenance_mut(model), false).answers
    };
    (0..25).map(one).sum()
}

/// Under ThreadSanitizer (scripts/sanitize) this looks for races in the table of handles, in
/// sessions that share a model, and among the engine's threads.
#[test]
fn sequences_on_several_threads_share_a_model() {
    let _alone = ALONE.lock().unwrap();
    use_up_guesses();
    let model = sequences::model(&Weights::hashed(tiny(), "tiny")).addr();
    let answers: usize = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (1..5).map(|thread| scope.spawn(move || answers(model, thread))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert!(answers > 10, "only {answers} answers");
}
