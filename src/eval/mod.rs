//! Evaluation: metrics, and the paper's protocol with simulated users.

pub mod metrics;
pub mod surface;
