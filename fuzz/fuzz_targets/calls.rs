//! Any sequence of calls of the C interface: `cargo fuzz run calls`, which needs a nightly
//! toolchain, or RUSTC_BOOTSTRAP=1. See tests/common/calls.rs.

#![no_main]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/calls.rs"]
mod sequences;

use libfuzzer_sys::fuzz_target;
use prism::capi::prism_model;
use prism::model::Weights;
use std::sync::OnceLock;

struct Handle(*mut prism_model);
// SAFETY: a handle is a number.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

static MODEL: OnceLock<Handle> = OnceLock::new();

fuzz_target!(|bytes: &[u8]| {
    let model = MODEL.get_or_init(|| Handle(sequences::model(&Weights::hashed(common::tiny(), "tiny"))));
    sequences::run(bytes, model.0, true);
});
