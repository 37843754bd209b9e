//! The cases of training and evaluation: synthetic scans, folders of scans, and the patches cut
//! from them.
//!
//! [`cases::list`] finds the cases of a dataset on disk, [`synth::generate`] makes synthetic ones,
//! and [`source::Pools`] draws samples for training from both.

pub mod cache;
pub mod cases;
pub mod coarse;
pub mod noise;
pub mod sample;
pub mod source;
pub mod synth;
