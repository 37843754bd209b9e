//! What is computed: ops and their gradients, the network compared with its reference, sessions and
//! their promises, data, metrics. All in this process: no test here changes process-wide state.

#[path = "../common/mod.rs"]
mod common;

mod cpu;
mod data;
mod eval;
mod gradients;
mod reference;
mod session;
mod steering;
