//! The structure of the sources ([`floors`]), and rules for their text ([`text`]).
//!
//! The files under `src` are read as text, without comments, strings and code that is compiled only
//! for tests. Every path in them counts, in a `use` or elsewhere, that begins at `crate`, `self`,
//! `super`, a module of the same folder, or a name that a `use` of the same module brought in. What
//! a module re-exports is followed to the file that defines it.

mod files;
mod floors;
mod imports;
mod pieces;
mod text;
