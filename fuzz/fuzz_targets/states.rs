//! States of training runs: `cargo fuzz run states fuzz/corpus/states fuzz/seeds/states`. See
//! tests/common/bodies.rs.

#![no_main]

#[path = "../../tests/common/bodies.rs"]
mod bodies;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    bodies::states(bytes);
});
