//! Prompts files and prompts on the command line: `cargo fuzz run prompts fuzz/corpus/prompts
//! fuzz/seeds/prompts`. See tests/common/bodies.rs.

#![no_main]

#[path = "../../tests/common/bodies.rs"]
mod bodies;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    bodies::prompts(bytes);
});
