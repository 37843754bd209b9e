//! The fused operations that the network is written in.
//!
//! An op's folder holds its contract (shapes, formula, checks) in `mod.rs`, its CPU body and its
//! CUDA body (whose kernels are in `kernels/`) beside it. Feature maps are channels last,
//! `[n, d, h, w, c]`; weights keep the layout of PyTorch checkpoints and are packed once, when a
//! model is loaded. The loops that several ops share are one layer below, in `microkernel`.

pub mod attention;
pub mod conv3d;
pub mod decoder_stage;
pub mod linear;
pub mod loss;
pub mod norm;
pub mod optimizer;
pub mod pointwise;
pub mod position;
pub(crate) mod reduce;
pub mod refiner_input;
pub mod resample;
pub mod rows;
pub mod strided;
pub mod tokens;
