//! prism in other programs: the C header, and the installed library.

#[path = "../common/mod.rs"]
mod common;

mod header;
mod installed;
