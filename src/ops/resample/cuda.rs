//! Resampling on CUDA devices. See `kernels/resample.cu`.

use crate::device::Cuda;
use crate::device::cuda::{Arg, Family, Launch, kernels};
use crate::tensor::{OpError, Tensor};

/// Runs a kernel that makes a map of that shape from `x`.
pub fn run(cuda: &Cuda, family: Family, x: &Tensor, shape: [usize; 5]) -> Result<Tensor, OpError> {
    let ([_, d, h, w, c], dtype) = (shape, cuda.precision());
    let count = shape.iter().product();
    let (out, values) = (cuda.allocate(count, dtype)?, x.on(cuda, dtype)?);
    let arguments = [(&values).into(), (&out).into(), Arg::long(count), Arg::int(d), Arg::int(h), Arg::int(w), Arg::int(c)];
    cuda.launch(family.of(dtype)?, Launch::each(count).doing(8 * count, (x.len() + count) * dtype.bytes()), &arguments)?;
    Ok(Tensor::from_device(shape, out, dtype))
}

/// Patches of edge `e` as rows: `x` `[n, d e, h e, w e, c]` to `[n, d, h, w, c e³]`.
pub fn unfold(cuda: &Cuda, x: &Tensor, [n, d, h, w, c]: [usize; 5], e: usize) -> Result<Tensor, OpError> {
    let dtype = cuda.precision();
    let (out, values) = (cuda.allocate(x.len(), dtype)?, x.on(cuda, dtype)?);
    let memory = [(&values).into(), (&out).into(), Arg::long(x.len())];
    let arguments = [&memory[..], &[d, h, w, c, e].map(Arg::int)].concat();
    cuda.launch(kernels::UNFOLD.of(dtype)?, Launch::each(x.len()).doing(0, 2 * x.len() * dtype.bytes()), &arguments)?;
    Ok(Tensor::from_device([n, d, h, w, c * e * e * e], out, dtype))
}

/// Rows `[n, d / e, h / e, w / e, c e³]` back to a map `[n, d, h, w, c]`.
pub fn fold(cuda: &Cuda, rows: &Tensor, [n, d, h, w, c]: [usize; 5], e: usize) -> Result<Tensor, OpError> {
    let dtype = cuda.precision();
    let (out, values) = (cuda.allocate(rows.len(), dtype)?, rows.on(cuda, dtype)?);
    let memory = [(&values).into(), (&out).into(), Arg::long(rows.len())];
    let arguments = [&memory[..], &[d, h, w, c, e].map(Arg::int)].concat();
    cuda.launch(kernels::FOLD.of(dtype)?, Launch::each(rows.len()).doing(0, 2 * rows.len() * dtype.bytes()), &arguments)?;
    Ok(Tensor::from_device([n, d, h, w, c], out, dtype))
}
