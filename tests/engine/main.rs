//! What is computed: ops and their gradients, the network beside its reference, sessions and what
//! they promise, data, metrics. In this process: nothing here changes what holds for all of it.

#[path = "../common/mod.rs"]
mod common;

mod cpu;
mod data;
mod eval;
mod gradients;
mod reference;
mod session;
mod steering;
