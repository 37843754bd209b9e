//! Queries of addresses, and forms of one line: `cargo fuzz run queries fuzz/corpus/queries
//! fuzz/seeds/queries`. See tests/common/sent.rs.

#![no_main]

#[path = "../../tests/common/sent.rs"]
mod sent;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    sent::queries(bytes);
});
