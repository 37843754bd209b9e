//! Settings of training runs and configurations of networks: `cargo fuzz run settings
//! fuzz/corpus/settings fuzz/seeds/settings`. See tests/common/bodies.rs.

#![no_main]

#[path = "../../tests/common/bodies.rs"]
mod bodies;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    bodies::settings(bytes);
});
