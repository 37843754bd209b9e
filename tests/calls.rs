//! Sequences of calls of the C interface from random bytes. The fuzz target `fuzz/fuzz_targets/calls.rs` runs the same from bytes that a fuzzer chooses.

mod common;
#[path = "common/calls.rs"]
mod sequences;

use common::tiny;
use prism::model::Weights;
use prism::prompt::simulate::generator;
use rand::RngExt;

#[test]
fn no_sequence_of_calls_is_an_internal_error() {
    let model = sequences::model(&Weights::hashed(tiny(), "tiny"));
    let (mut statuses, mut answers) = ([0; 11], 0);
    for seed in 0..300 {
        let mut rng = generator(seed, &[]);
        let bytes: Vec<u8> = (0..600).map(|_| rng.random()).collect();
        let tally = sequences::run(&bytes, model);
        statuses.iter_mut().zip(tally.statuses).for_each(|(sum, n)| *sum += n);
        answers += tally.answers;
    }
    // Sequences that all failed at once would prove nothing.
    let [ok, argument, handle, file, _, small, _, cancelled, nothing, prompt, internal] = statuses;
    assert_eq!(internal, 0);
    for (what, count) in [
        ("ok", ok),
        ("argument", argument),
        ("handle", handle),
        ("small", small),
        ("nothing", nothing),
        ("prompt", prompt),
        ("answers", answers),
    ] {
        assert!(count > 10, "only {count} {what}: {statuses:?}");
    }
    assert!(cancelled + file > 0, "{statuses:?}");
}
