//! prism segments tumours in 3D scans interactively: click, box, scribble, correct, done.

#![warn(missing_docs)]

pub mod device;
pub mod model;
pub mod ops;
pub mod tensor;
pub mod verify;
pub mod volume;

