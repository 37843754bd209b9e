//! Training: the iterative, confidence and corrective learning of the paper.

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
