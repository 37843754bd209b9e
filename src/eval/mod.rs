//! Evaluation: metrics, and protocols with simulated users, whose results are kept and reported.
//!
//! [`metrics`] compares two masks. [`protocol::run`] lets a simulated user segment a case, [`kept`]
//! stores results as they are computed, and [`report`] makes tables of them.

pub mod kept;
pub mod metrics;
pub mod protocol;
pub mod region;
pub mod report;
pub mod result;
pub mod steer;
pub mod surface;
