//! The C interface: the functions, types and constants that `include/prism.h` declares.
//!
//! It is for programs in C and other languages; a program in Rust uses [`Session`](crate::Session)
//! and the other names at the crate's root. `docs/embedding.md` is the tutorial, and `examples/c`
//! contains a program.
//!
//! The header is made from these files by cbindgen (`PRISM_UPDATE_HEADER=1 cargo test --test
//! embedding header::`), with their doc comments, which therefore contain everything that a caller
//! must know. Handles are numbers in a table, never addresses: a handle that was freed, or is of
//! another kind, is an error. No panic crosses into C.

// Names and descriptions are those of the header, where brackets are C's.
#![allow(non_camel_case_types, rustdoc::broken_intra_doc_links)]

mod engine;
mod handles;
mod log;
mod prediction;
mod prompts;
mod session;
mod status;
mod volume;

pub use engine::*;
pub use log::*;
pub use prediction::*;
pub use prompts::*;
pub use session::*;
pub use status::*;
pub use volume::*;

use std::ffi::{CStr, c_char};

/// The version of this interface. It grows by one whenever a program that was compiled against an
/// older header could misbehave; functions and constants that are only added leave it as it is.
pub const PRISM_ABI_VERSION: u32 = 1;

/// The interface version of the library that was loaded: compare it with PRISM_ABI_VERSION.
#[unsafe(no_mangle)]
pub extern "C" fn prism_abi_version() -> u32 {
    PRISM_ABI_VERSION
}

/// The version of the program, for example "0.1.0". The text is the library's and stays.
#[unsafe(no_mangle)]
pub extern "C" fn prism_version() -> *const c_char {
    const VERSION: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => c"",
        };
    VERSION.as_ptr()
}
