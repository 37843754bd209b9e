//! Norms on CUDA devices.

use super::{ChannelNorm, Sums};
use crate::device::cuda::{Arg, Launch, Memory};
use crate::device::{Cuda, DType};
use crate::tensor::{OpError, Tensor};
use std::sync::Arc;

/// Rows of a tile of sums.
const ROWS: usize = 256;

pub fn sums(cuda: &Cuda, x: &Tensor) -> Result<Sums, OpError> {
    let (n, c, dtype) = (x.shape()[0], x.channels(), cuda.precision());
    let rows = x.rows() / n;
    let tiles = rows.div_ceil(ROWS);
    let partial = cuda.allocate_bytes(n * tiles * c * 16)?;
    let values = x.on(cuda, dtype)?;
    let launch = Launch { grid: [tiles, n, 1], ..Launch::each(0) }.doing(3 * x.len(), x.len() * dtype.bytes());
    cuda.launch(&format!("norm_sums_{dtype}"), launch, &[(&values).into(), (&partial).into(), Arg::int(rows), Arg::int(c)])?;
    Ok(Sums::on_device(partial, tiles, n * c, rows as f64))
}

/// From partial sums `[n][tiles][c][2]` to the norm.
pub fn coefficients(
    partial: &Arc<Memory>,
    tiles: usize,
    sums: &Sums,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    slope: f32,
) -> Result<ChannelNorm, OpError> {
    let (cuda, channels) = (partial.cuda(), sums.channels);
    let (norm, deviation) = (cuda.allocate(channels * 3, DType::F32)?, cuda.allocate(channels * 2, DType::F32)?);
    let (weights, biases) = (weight.on(cuda, DType::F32)?, bias.on(cuda, DType::F32)?);
    let launch = Launch { grid: [channels, 1, 1], threads: 128, shared: 128 * 16, ..Launch::each(0) }.doing(0, channels * tiles * 16);
    let memory = [partial, &weights, &biases, &norm, &deviation].map(Arg::from);
    let rest = [Arg::int(tiles), Arg::int(weight.len()), Arg::Double(sums.count), Arg::Double(eps)];
    cuda.launch("norm_coefficients", launch, &[&memory[..], &rest].concat())?;
    let tensor = |memory, columns: usize| Tensor::from_device([channels, columns], memory, DType::F32);
    Ok(ChannelNorm { channels: tensor(norm, 3), deviation: tensor(deviation, 2), slope })
}

pub fn apply(cuda: &Cuda, x: &Tensor, norm: &ChannelNorm, add: Option<&Tensor>) -> Result<Tensor, OpError> {
    let dtype = cuda.precision();
    let out = cuda.allocate(x.len(), dtype)?;
    let (values, channels) = (x.on(cuda, dtype)?, norm.channels.on(cuda, DType::F32)?);
    let add = add.map(|a| a.on(cuda, dtype)).transpose()?;
    let per_item = x.len() / x.shape()[0];
    let memory = [(&values).into(), (&channels).into(), Arg::maybe(&add), (&out).into()];
    let rest = [Arg::long(x.len()), Arg::long(per_item), Arg::int(x.channels()), Arg::Float(norm.slope)];
    cuda.launch(
        &format!("norm_apply_{dtype}"),
        Launch::each(x.len()).doing(4 * x.len(), (2 + usize::from(add.is_some())) * x.len() * dtype.bytes()),
        &[memory, rest].concat(),
    )?;
    Ok(Tensor::from_device(x.shape(), out, dtype))
}

/// Layer norm over the last axis; without a norm, only GELU or nothing. With `fold`, `x` holds the 8 phases of each voxel of the coarse grid `[n, d, h, w]` one
/// behind the other, and the result is the fine map `[n, 2d, 2h, 2w, c]`.
pub fn layer_norm(
    cuda: &Cuda,
    x: &Tensor,
    norm: Option<(&Tensor, &Tensor, f32)>,
    gelu: bool,
    fold: Option<[usize; 4]>,
) -> Result<Tensor, OpError> {
    let dtype = cuda.precision();
    let (shape, [d, h, w]) = match fold {
        Some([n, d, h, w]) => (vec![n, 2 * d, 2 * h, 2 * w, x.len() / (n * d * h * w * 8)], [d, h, w]),
        None => (x.shape().to_vec(), [0; 3]),
    };
    let c = shape.last().copied().unwrap_or(1);
    let rows = x.len() / c;
    let (out, values) = (cuda.allocate(x.len(), dtype)?, x.on(cuda, dtype)?);
    let weight = norm.map(|n| n.0.on(cuda, DType::F32)).transpose()?;
    let bias = norm.map(|n| n.1.on(cuda, DType::F32)).transpose()?;
    let memory = [(&values).into(), Arg::maybe(&weight), Arg::maybe(&bias), (&out).into()];
    let numbers = [Arg::long(rows), Arg::int(c), Arg::Float(norm.map_or(0.0, |n| n.2)), Arg::Int(gelu.into())];
    let launch = Launch { grid: [rows.div_ceil(8), 1, 1], ..Launch::each(0) }.doing(8 * x.len(), 2 * x.len() * dtype.bytes());
    let grid = [d, h, w].map(Arg::int);
    cuda.launch(&format!("layer_norm_{dtype}"), launch, &[&memory[..], &numbers, &grid].concat())?;
    Ok(Tensor::from_device(shape, out, dtype))
}
