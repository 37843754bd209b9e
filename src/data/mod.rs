//! The cases of training and evaluation: synthetic scans, folders of scans, and the patches cut
//! from them.

pub mod cache;
pub mod cases;
pub mod coarse;
pub mod noise;
pub mod sample;
pub mod source;
pub mod synth;
