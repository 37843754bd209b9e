//! Resampling on CUDA devices. See `kernels/resample.cu`.

use crate::device::Cuda;
use crate::device::cuda::kernels::HalveArgs as Args;
use crate::device::cuda::{Family, Launch};
use crate::tensor::{OpError, Tensor};

/// Runs a kernel that makes a map of that shape from `x`: one of those that have the parameters of
/// the first.
pub fn run(
    cuda: &Cuda,
    family: Family<Args>,
    x: &Tensor,
    shape: [usize; 5],
) -> Result<Tensor, OpError> {
    let ([n, d, h, w, c], dtype) = (shape, cuda.precision());
    let (each, count) = (d * h * w * c, n * d * h * w * c);
    let (out, values) = (cuda.allocate(count, dtype)?, x.to_device(cuda, dtype)?);
    cuda.launch(
        family.of(dtype)?,
        Launch::per_element(each)
            .for_each(n)
            .with_cost(8 * count, (x.len() + count) * dtype.bytes()),
        Args {
            x: (&values).into(),
            y: (&out).into(),
            count: each.into(),
            d: d.into(),
            h: h.into(),
            w: w.into(),
            c: c.into(),
        },
    )?;
    Ok(Tensor::from_device(shape, out, dtype))
}
