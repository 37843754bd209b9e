//! prism in other programs: what the C header says, and the library as it is installed.

#[path = "../common/mod.rs"]
mod common;

mod header;
mod installed;
