//! Label images beside a scan: `cargo fuzz run labels fuzz/corpus/labels fuzz/seeds/labels`. See
//! tests/common/bodies.rs.

#![no_main]

#[path = "../../tests/common/bodies.rs"]
mod bodies;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    bodies::labels(bytes);
});
