//! Training: the iterative, confidence and corrective learning of the paper.

pub mod step;
