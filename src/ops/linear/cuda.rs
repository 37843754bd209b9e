//! Dense layers on CUDA devices. See `kernels/linear.cu`.

use super::Activation;
use crate::device::cuda::{Arg, Launch};
use crate::device::{Cuda, DType};
use crate::tensor::{OpError, Tensor};

/// Rows and columns of a block.
const EDGE: usize = 64;

pub fn linear(
    cuda: &Cuda,
    shape: Vec<usize>,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    residual: Option<&Tensor>,
) -> Result<Tensor, OpError> {
    let (dtype, m, n, k) = (cuda.precision(), x.rows(), weight.shape()[0], x.channels());
    let out = cuda.allocate(m * n, dtype)?;
    let (x, weight) = (x.on(cuda, dtype)?, weight.on(cuda, dtype)?);
    let bias = bias.map(|b| b.on(cuda, DType::F32)).transpose()?;
    let residual = residual.map(|r| r.on(cuda, dtype)).transpose()?;
    // The plain kernel's two tiles, or three stages of two tiles with padded rows.
    let (threads, shared) = if dtype == DType::F32 { (256, 2 * 16 * (EDGE + 4) * 4) } else { (128, 3 * 2 * EDGE * 40 * 2) };
    let act = match activation {
        Activation::None => 0,
        Activation::Gelu => 1,
        Activation::Relu => 2,
    };
    let memory = [(&x).into(), (&weight).into(), Arg::maybe(&bias), Arg::maybe(&residual), (&out).into()];
    let numbers = [Arg::int(m), Arg::int(n), Arg::int(k), Arg::Int(act)];
    let launch = Launch { grid: [m.div_ceil(EDGE), n.div_ceil(EDGE), 1], threads, shared, ..Launch::each(0) }
        .doing(2 * m * n * k, (m * k + n * k + m * n * (1 + usize::from(residual.is_some()))) * dtype.bytes());
    cuda.launch(&format!("linear_{dtype}"), launch, &[&memory[..], &numbers].concat())?;
    Ok(Tensor::from_device(shape, out, dtype))
}
