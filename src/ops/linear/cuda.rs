//! Dense layers on CUDA devices. See `kernels/linear.cu`.

use super::Activation;
use crate::device::cuda::{Arg, Family, Launch, kernels};
use crate::device::{Cuda, DType};
use crate::ops::reduce::weight_total;
use crate::tensor::{OpError, Tensor};

/// Rows and columns of a block; its rows may be fewer.
const EDGE: usize = 64;
/// Blocks that keep a GPU busy.
const BLOCKS: usize = 320;

/// A kernel and what its block does: see `kernels/linear.cu`.
struct Kernel {
    family: Family,
    rows: usize,
    threads: usize,
    /// Bytes of shared memory.
    shared: usize,
    /// The least of k that a block takes.
    least: usize,
}

/// On tensor cores: three buffers of 64 elements of each row.
const fn matrix(family: Family, rows: usize) -> Kernel {
    Kernel { family, rows, threads: 128, shared: 3 * (rows + EDGE) * (64 + 8) * 2, least: 768 }
}

const MANY: Kernel = matrix(kernels::LINEAR, EDGE);
const FEW: Kernel = matrix(kernels::LINEAR_FEW, 16);
/// Two tiles in float.
const PLAIN: Kernel = Kernel {
    family: kernels::LINEAR,
    rows: EDGE,
    threads: 256,
    shared: 2 * 16 * (EDGE + 4) * 4,
    least: usize::MAX,
};

impl Kernel {
    /// The kernel for a product of `[m, k]` and `[n, k]`, and how many blocks share its k.
    fn of(m: usize, n: usize, k: usize, dtype: DType) -> (Kernel, usize) {
        if dtype == DType::F32 {
            return (PLAIN, 1);
        }
        if !k.is_multiple_of(8) {
            return (Kernel { family: kernels::LINEAR_ODD, ..PLAIN }, 1);
        }
        let blocks = |kernel: &Kernel| m.div_ceil(kernel.rows) * n.div_ceil(EDGE);
        let kernel = if blocks(&MANY) * 10 > BLOCKS { MANY } else { FEW };
        let split_k = (BLOCKS / blocks(&kernel)).min(k / kernel.least).max(1);
        (kernel, split_k)
    }
}

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
    let (x, weight) = (x.to_device(cuda, dtype)?, weight.to_device(cuda, dtype)?);
    let bias = bias.map(|b| b.to_device(cuda, DType::F32)).transpose()?;
    let residual = residual.map(|r| r.to_device(cuda, dtype)).transpose()?;
    let (kernel, split_k) = Kernel::of(m, n, k, dtype);
    let splitk_workspace =
        (split_k > 1).then(|| cuda.allocate(split_k * m * n, DType::F32)).transpose()?;
    let act = match activation {
        Activation::None => 0,
        Activation::Gelu => 1,
        Activation::Relu => 2,
    };
    let memory =
        [(&x).into(), (&weight).into(), Arg::maybe(&bias), Arg::maybe(&residual), (&out).into()];
    let numbers = [Arg::int(m), Arg::int(n), Arg::int(k), Arg::Int(act)];
    let Kernel { family, rows, threads, shared, .. } = kernel;
    let launch = Launch {
        grid: [m.div_ceil(rows), n.div_ceil(EDGE), split_k],
        threads,
        shared,
        ..Launch::per_element(0)
    }
    .with_cost(
        2 * m * n * k,
        (m * k + n * k + m * n * (1 + usize::from(residual.is_some()))) * dtype.bytes(),
    );
    let given =
        if kernel.least == usize::MAX { vec![] } else { vec![Arg::maybe(&splitk_workspace)] };
    cuda.launch(family.of(dtype)?, launch, &[&memory[..], &numbers, &given].concat())?;
    if let Some(splitk_workspace) = splitk_workspace {
        let memory =
            [(&splitk_workspace).into(), Arg::maybe(&bias), Arg::maybe(&residual), (&out).into()];
        let numbers = [Arg::long(m * n), Arg::int(n), Arg::Int(act), Arg::int(split_k)];
        let vec4 = if n.is_multiple_of(4) { 4 } else { 1 };
        let launch =
            Launch::per_element(m * n / vec4).with_cost(0, m * n * (4 * split_k + dtype.bytes()));
        let family = if vec4 > 1 {
            kernels::LINEAR_SPLITK_REDUCE_VEC4
        } else {
            kernels::LINEAR_SPLITK_REDUCE
        };
        cuda.launch(family.of(dtype)?, launch, &[&memory[..], &numbers].concat())?;
    }
    Ok(Tensor::from_device(shape, out, dtype))
}

/// The gradient of the input: a dense layer with the weight transposed.
pub fn input_gradient(cuda: &Cuda, weight: &Tensor, dy: &Tensor) -> Result<Tensor, OpError> {
    let (dtype, n) = (cuda.precision(), dy.channels());
    let k = weight.len() / n;
    let (values, transposed) =
        (weight.to_device(cuda, dtype)?, cuda.allocate(weight.len(), dtype)?);
    let launch = Launch::per_element(weight.len()).with_cost(0, 2 * weight.len() * dtype.bytes());
    cuda.launch(
        kernels::LINEAR_TRANSPOSE.of(dtype)?,
        launch,
        &[(&values).into(), (&transposed).into(), Arg::int(n), Arg::int(k)],
    )?;
    let mut shape = dy.shape().to_vec();
    shape.pop();
    shape.push(k);
    linear(
        cuda,
        shape,
        dy,
        &Tensor::from_device([k, n], transposed, dtype),
        None,
        Activation::None,
        None,
    )
}

/// Most runs of rows that a weight gradient is split into.
const RUNS: usize = 64;

/// The gradient of the weight `[out, in]`, in float32.
pub fn weight_gradient(cuda: &Cuda, x: &Tensor, dy: &Tensor) -> Result<Tensor, OpError> {
    let (dtype, m, n, k) = (cuda.precision(), dy.rows(), dy.channels(), x.channels());
    let (across, down) = (n.div_ceil(EDGE), k.div_ceil(EDGE));
    let runs = (512 / (across * down)).clamp(1, RUNS).min(m.div_ceil(EDGE));
    let run = m.div_ceil(runs).next_multiple_of(32);
    let runs = m.div_ceil(run);
    let partial = cuda.allocate(runs * n * k, DType::F32)?;
    let (x, dy) = (x.to_device(cuda, dtype)?, dy.to_device(cuda, dtype)?);
    let (threads, shared) = if dtype == DType::F32 {
        (256, 2 * 16 * (EDGE + 4) * 4)
    } else {
        (128, 2 * 32 * (EDGE + 8) * 2)
    };
    let launch = Launch { grid: [across, down, runs], threads, shared, ..Launch::per_element(0) }
        .with_cost(2 * m * n * k, (m * k + m * n) * dtype.bytes() + n * k * 4);
    let arguments =
        [&[(&x).into(), (&dy).into(), (&partial).into()], &[m, n, k, run].map(Arg::int)[..]]
            .concat();
    cuda.launch(kernels::WEIGHT_GRADIENT_DENSE.of(dtype)?, launch, &arguments)?;
    Ok(weight_total(cuda, &partial, runs, [1, 1, k, n])?.reshape([n, k]))
}
