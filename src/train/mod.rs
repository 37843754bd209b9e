//! Training: the iterative, confidence and corrective learning of the paper (Li et al. 2024).
//!
//! A run is described by [`settings`], begun by [`run::begin`] or read from a file by
//! [`state::State::open`], and carried out by [`run::run`], alone or by several processes
//! ([`peers`]). A program of its own can train item by item: [`step::run_item`] computes the
//! gradients of one, and [`AdamW`](crate::ops::optimizer::AdamW) uses them.
//!
//! Functions that are meant for a command return their errors as text for people.

pub mod clicker;
pub mod curves;
pub mod exchange;
mod greeting;
pub mod interactive;
mod link;
pub mod peers;
pub mod run;
pub mod settings;
pub mod state;
pub mod step;
