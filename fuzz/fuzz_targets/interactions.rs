//! What is said to prism's own interface: `cargo fuzz run interactions fuzz/corpus/interactions
//! fuzz/seeds/interactions`. See tests/common/sent.rs.

#![no_main]

#[path = "../../tests/common/sent.rs"]
mod sent;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    sent::interactions(bytes);
});
