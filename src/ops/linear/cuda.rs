//! Dense layers on CUDA devices. See `kernels/linear.cu`.

use super::Activation;
use crate::device::cuda::{Arg, Launch};
use crate::device::{Cuda, DType};
use crate::ops::conv3d::cuda::weight_total;
use crate::tensor::{OpError, Tensor};

/// Rows and columns of a block, and its rows where there are few.
const EDGE: usize = 64;
const FEW: usize = 16;
/// Values of k of a step on tensor cores, and how many a block takes at the least.
const DEPTH: usize = 64;
const STEPS: usize = 12;
/// Blocks that keep a GPU busy.
const BLOCKS: usize = 320;

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
    let blocks_of = |rows: usize| m.div_ceil(rows) * n.div_ceil(EDGE);
    let (name, rows) = match dtype {
        DType::F32 => ("linear", EDGE),
        _ if !k.is_multiple_of(8) => ("linear_odd", EDGE),
        _ if blocks_of(EDGE) * 10 > BLOCKS => ("linear", EDGE),
        _ => ("linear_few", FEW),
    };
    // Blocks that share a product's k, where there are not enough of them.
    let plain = dtype == DType::F32 || name == "linear_odd";
    let splits = match plain {
        true => 1,
        false => (BLOCKS / blocks_of(rows)).min(k.div_ceil(DEPTH) / STEPS).max(1),
    };
    // The plain kernel's two tiles, or three stages of two tiles with padded rows.
    let (threads, shared) = if plain { (256, 2 * 16 * (EDGE + 4) * 4) } else { (128, 3 * (rows + EDGE) * (DEPTH + 8) * 2) };
    let shares = (splits > 1).then(|| cuda.allocate(splits * m * n, DType::F32)).transpose()?;
    let act = match activation {
        Activation::None => 0,
        Activation::Gelu => 1,
        Activation::Relu => 2,
    };
    let memory = [(&x).into(), (&weight).into(), Arg::maybe(&bias), Arg::maybe(&residual), (&out).into()];
    let numbers = [Arg::int(m), Arg::int(n), Arg::int(k), Arg::Int(act)];
    let launch = Launch { grid: [m.div_ceil(rows), n.div_ceil(EDGE), splits], threads, shared, ..Launch::each(0) }
        .doing(2 * m * n * k, (m * k + n * k + m * n * (1 + usize::from(residual.is_some()))) * dtype.bytes());
    let given = if plain { vec![] } else { vec![Arg::maybe(&shares)] };
    cuda.launch(&format!("{name}_{dtype}"), launch, &[&memory[..], &numbers, &given].concat())?;
    if let Some(shares) = shares {
        let memory = [(&shares).into(), Arg::maybe(&bias), Arg::maybe(&residual), (&out).into()];
        let numbers = [Arg::long(m * n), Arg::int(n), Arg::Int(act), Arg::int(splits)];
        let launch = Launch::each(m * n).doing(0, m * n * (4 * splits + dtype.bytes()));
        cuda.launch(&format!("linear_join_{dtype}"), launch, &[&memory[..], &numbers].concat())?;
    }
    Ok(Tensor::from_device(shape, out, dtype))
}

/// The gradient of the input: a dense layer with the weight turned.
pub fn input_gradient(cuda: &Cuda, weight: &Tensor, dy: &Tensor) -> Result<Tensor, OpError> {
    let (dtype, n) = (cuda.precision(), dy.channels());
    let k = weight.len() / n;
    let (values, turned) = (weight.on(cuda, dtype)?, cuda.allocate(weight.len(), dtype)?);
    let launch = Launch::each(weight.len()).doing(0, 2 * weight.len() * dtype.bytes());
    cuda.launch(&format!("linear_turn_{dtype}"), launch, &[(&values).into(), (&turned).into(), Arg::int(n), Arg::int(k)])?;
    let mut shape = dy.shape().to_vec();
    shape.pop();
    shape.push(k);
    linear(cuda, shape, dy, &Tensor::from_device([k, n], turned, dtype), None, Activation::None, None)
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
    let (x, dy) = (x.on(cuda, dtype)?, dy.on(cuda, dtype)?);
    let (threads, shared) = if dtype == DType::F32 { (256, 2 * 16 * (EDGE + 4) * 4) } else { (128, 2 * 32 * (EDGE + 8) * 2) };
    let launch = Launch { grid: [across, down, runs], threads, shared, ..Launch::each(0) }
        .doing(2 * m * n * k, (m * k + m * n) * dtype.bytes() + n * k * 4);
    let arguments = [&[(&x).into(), (&dy).into(), (&partial).into()], &[m, n, k, run].map(Arg::int)[..]].concat();
    cuda.launch(&format!("weight_gradient_dense_{dtype}"), launch, &arguments)?;
    Ok(weight_total(cuda, &partial, runs, [1, 1, k, n])?.reshape([n, k]))
}
