//! The fused operations that the network is written in, and their gradients.
//!
//! An op is a function of a [`Device`](crate::Device) and [tensors](crate::tensor::Tensor); its
//! gradient, if it has one, is in a module `grad` beside it. Most programs use them by
//! [`autograd::Tape`](crate::autograd::Tape), or only by a whole [`Model`](crate::Model).
//!
//! # Shapes
//!
//! Feature maps are channels last, `[n, d, h, w, c]`: items, depth, height, width, channels. `in`
//! and `out` are numbers of channels, `t` and `m` of rows (tokens), and `...` stands for any number
//! of axes. Weights keep the layout of PyTorch checkpoints, `[out, in, ...]`; where kernels need
//! another one, it is made once and kept. In gradients, `dy` is the gradient of a loss with respect
//! to the op's output, and has its shape. The gradient of an input has as many values as the input,
//! in the same order; that of a parameter may be a list instead of having its shape.
//!
//! # Precision
//!
//! Inputs may be on the host or on a device, in any type: they are copied and converted as needed.
//! Results are where the op ran: on a CUDA device in its [precision](crate::Device::precision), or
//! on the host in float32, where the few ops run that have no kernel for a CUDA device. Results do
//! not depend on the number of threads.
//!
//! # Errors
//!
//! Ops return [`OpError::Shape`](crate::tensor::OpError::Shape) or
//! [`OpError::Argument`](crate::tensor::OpError::Argument) for arguments that do not fit, and
//! [`OpError::Cuda`](crate::tensor::OpError::Cuda) if the device fails. Host memory that is refused
//! unwinds to [`tensor::caught`](crate::tensor::caught).
//!
//! ```
//! use prism::Device;
//! use prism::ops::linear::{Activation, linear};
//! use prism::tensor::Tensor;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::open("cpu", 1)?;
//! let x = Tensor::new([1, 2], vec![1.0, -3.0]);
//! let weight = Tensor::new([2, 2], vec![1.0, 0.0, 1.0, 1.0]);
//! let y = linear(&device, &x, &weight, None, Activation::Relu, None)?;
//! assert_eq!(y.data(), [1.0, 0.0]);
//! # Ok(())
//! # }
//! ```

// An op's folder holds its contract (shapes, formula, checks) in `mod.rs`, its CPU body and its
// CUDA body (whose kernels are in `kernels/`) beside it. The loops that several ops share are one
// layer below, in `microkernel`.

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
