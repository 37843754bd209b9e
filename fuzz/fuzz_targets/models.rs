//! Model files, from a path and from memory, and the networks that they hold: `cargo fuzz run
//! models fuzz/corpus/models fuzz/seeds/models`. See tests/common/bodies.rs.

#![no_main]

#[path = "../../tests/common/bodies.rs"]
mod bodies;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    bodies::models(bytes);
});
