//! Gradients of dense layers.

use super::{Activation, Matrix, matmul};
use crate::device::simd::{self, multiversion};
use crate::device::{Device, DisjointWriter};
use crate::ops::pointwise::cuda::Slope;
use crate::ops::reduce::{added, check_so_far, onto};
use crate::ops::{norm, pointwise};
use crate::tensor::{OpError, Tensor};

const OP: &str = "linear gradient";
/// Values of a unit of work.
const RUN: usize = 1 << 14;

/// `out[m][n] = a[m][k] b[k][n]` on all threads, each computing a block of rows. `a` and `b` are
/// values and the distances in floats between their rows and between their columns.
///
/// # Safety
/// The values span the matrices.
unsafe fn parallel(
    device: &Device,
    [m, n, k]: [usize; 3],
    a: (&[f32], [usize; 2]),
    b: (&[f32], [usize; 2]),
) -> Tensor {
    let cpu = device.cpu();
    let mut out = cpu.alloc(m * n);
    let rows = m.div_ceil(8).max(16);
    let from = |(data, [row, column]): (&[f32], [usize; 2]), first: usize| Matrix {
        data: data[first * row..].as_ptr(),
        row,
        column,
    };
    cpu.chunks_mut(&mut out, rows * n, |unit, out| {
        // SAFETY: the caller's matrices have these sizes; each unit writes its own rows.
        unsafe {
            matmul(
                [out.len() / n, n, k],
                out.as_mut_ptr(),
                n,
                false,
                from(a, unit * rows),
                from(b, 0),
            )
        };
    });
    Tensor::from_buffer([m, n], out)
}

/// The gradient of the bias `[out]` of a dense layer or a convolution from `dy` `[..., out]`: sums
/// over all axes but the last.
pub fn bias(device: &Device, dy: &Tensor) -> Result<Tensor, OpError> {
    norm::totals(device, dy)
}

/// Adds the gradient that [`bias`] computes to the gradient so far, if there is one, and returns
/// the sum, which may use its memory.
pub fn bias_onto(device: &Device, dy: &Tensor, so_far: Option<Tensor>) -> Result<Tensor, OpError> {
    norm::totals_onto(device, dy, so_far)
}

/// The gradient of the input `[..., in]` from `dy` `[..., out]` and `weight` `[out, in]`.
pub fn input(device: &Device, weight: &Tensor, dy: &Tensor) -> Result<Tensor, OpError> {
    input_onto(device, weight, dy, None)
}

/// The sum of the gradient so far, of as many values, if there is one, and the gradient that
/// [`input`] computes.
pub fn input_onto(
    device: &Device,
    weight: &Tensor,
    dy: &Tensor,
    so_far: Option<&Tensor>,
) -> Result<Tensor, OpError> {
    let (m, n) = (dy.rows(), dy.channels());
    if weight.shape().first() != Some(&n) || dy.is_empty() {
        return Err(dy.shape_error(
            OP,
            "dy",
            format!("[.., out], for weight {:?}", weight.shape()),
        ));
    }
    let k = weight.len() / n;
    check_so_far(OP, so_far, m * k)?;
    let cpu = match device {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(cuda) => return super::cuda::input_gradient(cuda, weight, dy, so_far),
    };
    let mut shape = dy.shape().to_vec();
    *shape.last_mut().expect("it has channels") = k;
    // SAFETY: dy is `[m, n]`, the weight `[n, k]`.
    let dx = unsafe { parallel(device, [m, k, n], (dy.data(), [n, 1]), (weight.data(), [k, 1])) };
    Ok(onto(cpu, so_far, dx)?.reshape(shape))
}

/// The gradient of the weight `[out, in]` from `x` `[..., in]` and `dy` `[..., out]`.
pub fn weight(device: &Device, x: &Tensor, dy: &Tensor) -> Result<Tensor, OpError> {
    weight_onto(device, x, dy, None)
}

/// Adds the gradient that [`weight`] computes to the gradient so far, if there is one, and returns
/// the sum, which may use its memory.
pub fn weight_onto(
    device: &Device,
    x: &Tensor,
    dy: &Tensor,
    so_far: Option<Tensor>,
) -> Result<Tensor, OpError> {
    let (m, n, k) = (dy.rows(), dy.channels(), x.channels());
    if x.rows() != m || dy.is_empty() || x.is_empty() {
        return Err(dy.shape_error(OP, "dy", format!("as many rows as x {:?}", x.shape())));
    }
    if let Device::Cuda(cuda) = device {
        return super::cuda::weight_gradient(cuda, x, dy, so_far);
    }
    // SAFETY: dy is `[m, n]` and read across, x `[m, k]`.
    let part = unsafe { parallel(device, [n, k, m], (dy.data(), [1, n]), (x.data(), [k, 1])) };
    Ok(added(device.cpu(), so_far, part))
}

multiversion! {
    fn gelu_slope_run(x: &[f32], dy: &[f32], out: &mut [f32]) {
        let n = out.len();
        let (x, dy) = (&x[..n], &dy[..n]);
        for i in 0..n {
            out[i] = dy[i] * simd::gelu_slope::<FUSED>(x[i]);
        }
    }
}

multiversion! {
    fn relu_slope_run(y: &[f32], dy: &[f32], out: &mut [f32]) {
        let n = out.len();
        let (y, dy) = (&y[..n], &dy[..n]);
        for i in 0..n {
            out[i] = if y[i] > 0.0 { dy[i] } else { 0.0 };
        }
    }
}

/// The gradient of an activation's input, from that of its output, `dy`.
///
/// `x` is the activation's input; for a ReLU its output serves as well.
pub fn activation(
    device: &Device,
    activation: Activation,
    x: &Tensor,
    dy: &Tensor,
) -> Result<Tensor, OpError> {
    if x.len() != dy.len() {
        return Err(dy.shape_error(OP, "dy", format!("{:?}", x.shape())));
    }
    let which = match activation {
        Activation::None => return Ok(dy.clone()),
        Activation::Gelu => Slope::Gelu,
        Activation::Relu => Slope::Relu,
    };
    let cpu = match device {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(cuda) => return pointwise::cuda::slope(cuda, x, dy, which),
    };
    let f = if activation == Activation::Gelu { gelu_slope_run } else { relu_slope_run };
    let mut out = cpu.alloc(dy.len());
    let to = DisjointWriter::new(&mut out);
    cpu.for_each(dy.len().div_ceil(RUN), |unit| {
        let at = unit * RUN..((unit + 1) * RUN).min(dy.len());
        // SAFETY: units own disjoint runs.
        let out = unsafe { to.slice(at.start, at.len()) };
        f(cpu.isa(), &x.data()[at.clone()], &dy.data()[at], out);
    });
    Ok(Tensor::from_buffer(dy.shape(), out))
}
