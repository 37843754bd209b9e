//! Arrays of nnInteractive's protocol: `cargo fuzz run arrays fuzz/corpus/arrays
//! fuzz/seeds/arrays`. See tests/common/sent.rs.

#![no_main]

#[path = "../../tests/common/sent.rs"]
mod sent;

use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: {
        // What the decoder of zstd panics at is the sender's fault, and caught: only what gets past
        // that ends the process, behind this hook.
        std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    },
    |bytes: &[u8]| {
        sent::arrays(bytes);
    }
);
