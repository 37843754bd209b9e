//! Forms of several parts, and what ITK-SNAP and MONAI Label's clients send in them: `cargo fuzz
//! run forms fuzz/corpus/forms fuzz/seeds/forms`. See tests/common/sent.rs.

#![no_main]

#[path = "../../tests/common/sent.rs"]
mod sent;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    sent::forms(bytes);
});
