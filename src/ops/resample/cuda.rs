//! Resampling on CUDA devices. See `kernels/resample.cu`.

use crate::device::Cuda;
use crate::device::cuda::{Arg, Family, Launch};
use crate::tensor::{OpError, Tensor};

/// Runs a kernel that makes a map of that shape from `x`.
pub fn run(cuda: &Cuda, family: Family, x: &Tensor, shape: [usize; 5]) -> Result<Tensor, OpError> {
    let ([_, d, h, w, c], dtype) = (shape, cuda.precision());
    let count = shape.iter().product();
    let (out, values) = (cuda.allocate(count, dtype)?, x.to_device(cuda, dtype)?);
    let arguments = [
        (&values).into(),
        (&out).into(),
        Arg::long(count),
        Arg::int(d),
        Arg::int(h),
        Arg::int(w),
        Arg::int(c),
    ];
    cuda.launch(
        family.of(dtype)?,
        Launch::per_element(count).with_cost(8 * count, (x.len() + count) * dtype.bytes()),
        &arguments,
    )?;
    Ok(Tensor::from_device(shape, out, dtype))
}
