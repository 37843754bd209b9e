//! PyTorch's checkpoints: `cargo fuzz run checkpoints fuzz/corpus/checkpoints
//! fuzz/seeds/checkpoints`. See tests/common/bodies.rs.

#![no_main]

#[path = "../../tests/common/bodies.rs"]
mod bodies;

use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: {
        // What the reader of pickles panics at is an error of the library's: only what gets past it
        // ends the process, behind this hook.
        std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    },
    |bytes: &[u8]| {
        bodies::checkpoints(bytes);
    }
);
