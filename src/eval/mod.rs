//! Evaluation: metrics, and the paper's protocol with simulated users.

pub mod kept;
pub mod metrics;
pub mod protocol;
pub mod region;
pub mod report;
pub mod result;
pub mod steer;
pub mod surface;
