//! Micro-kernels: the innermost loops that several ops share, one layer below the ops.
//!
//! A micro-kernel keeps a tile of results in registers over a whole reduction, or goes once along a
//! row of values. It is compiled for each instruction set, takes addresses and strides or slices of
//! floats, and knows nothing of tensors, tiles of a map or an op's checks: the ops above choose
//! one, lay its operands out and are responsible for what it reads and writes.
//!
//! Innermost loops count registers. The standard library does not mark `zip`, `copy_within`, and
//! `map` and `from_fn` of arrays to be inlined: where a crate's parts are optimised by themselves,
//! as in tests, each is a call, between which no register stays.

pub(crate) mod gelu;
pub(crate) mod item_norm;
pub(crate) mod load_row;
pub(crate) mod outer_product;
pub(crate) mod pack;
pub(crate) mod strip;
