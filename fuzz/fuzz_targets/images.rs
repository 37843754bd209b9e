//! Scans in files of every format: `cargo fuzz run images fuzz/corpus/images fuzz/seeds/images`.
//! See tests/common/bodies.rs.

#![no_main]

#[path = "../../tests/common/bodies.rs"]
mod bodies;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    bodies::images(bytes);
});
