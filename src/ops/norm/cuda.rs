//! Norms on CUDA devices.

use super::{ChannelNorm, Sums};
use crate::device::cuda::{Launch, Memory, kernels};
use crate::device::{Cuda, DType};
use crate::ops::reduce::{Columns, adders, column_sums};
use crate::tensor::{OpError, Tensor};
use std::sync::Arc;

/// Rows of a tile of sums.
const ROWS: usize = 256;

/// The number of values of rows of `c` that one instruction loads: one if rows are not a multiple
/// of more.
fn lanes(dtype: DType, c: usize) -> usize {
    let lanes = 16 / dtype.bytes();
    if c.is_multiple_of(lanes) { lanes } else { 1 }
}

/// The most values of a row of a layer norm that a thread keeps.
const KEPT: usize = 32;

pub fn sums(cuda: &Cuda, x: &Tensor) -> Result<Sums, OpError> {
    let (n, c, dtype) = (x.shape()[0], x.channels(), cuda.precision());
    let rows = x.rows() / n;
    let tiles = rows.div_ceil(ROWS);
    let partial = cuda.allocate_bytes(n * tiles * c * 16)?;
    let values = x.to_device(cuda, dtype)?;
    let launch = Launch { grid: [tiles, n, 1], ..Launch::per_element(0) }
        .with_cost(3 * x.len(), x.len() * dtype.bytes());
    cuda.launch(
        kernels::NORM_SUMS.of(dtype)?,
        launch,
        kernels::NormSumsArgs {
            x: (&values).into(),
            partial: (&partial).into(),
            rows: rows.into(),
            c: c.into(),
        },
    )?;
    Ok(Sums::on_device(partial, tiles, n * c, rows as f64))
}

/// Computes the norm from partial sums `[n][tiles][c][2]`.
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
    let (norm, deviation) =
        (cuda.allocate(channels * 3, DType::F32)?, cuda.allocate(channels * 2, DType::F32)?);
    let (weights, biases) =
        (weight.to_device(cuda, DType::F32)?, bias.to_device(cuda, DType::F32)?);
    let launch = Launch {
        grid: [channels, 1, 1],
        threads: adders(tiles),
        shared: 16 * 16,
        ..Launch::per_element(0)
    }
    .with_cost(0, channels * tiles * 16);
    cuda.launch(
        kernels::NORM_COEFFICIENTS,
        launch,
        kernels::NormCoefficientsArgs {
            partial: partial.into(),
            weight: (&weights).into(),
            bias: (&biases).into(),
            norm: (&norm).into(),
            deviations: (&deviation).into(),
            tiles: tiles.into(),
            c: weight.len().into(),
            count: sums.count,
            eps,
        },
    )?;
    let tensor =
        |memory, columns: usize| Tensor::from_device([channels, columns], memory, DType::F32);
    Ok(ChannelNorm { channels: tensor(norm, 3), deviation: tensor(deviation, 2), slope })
}

pub fn apply(
    cuda: &Cuda,
    x: &Tensor,
    norm: &ChannelNorm,
    add: Option<&Tensor>,
) -> Result<Tensor, OpError> {
    let dtype = cuda.precision();
    let out = cuda.allocate(x.len(), dtype)?;
    let (values, channels) =
        (x.to_device(cuda, dtype)?, norm.channels.to_device(cuda, DType::F32)?);
    let add = add.map(|a| a.to_device(cuda, dtype)).transpose()?;
    let (n, wide) = (x.shape()[0], lanes(dtype, x.channels()));
    let each = x.len() / n;
    let family = if wide > 1 { kernels::NORM_APPLY_WIDE } else { kernels::NORM_APPLY };
    cuda.launch(
        family.of(dtype)?,
        Launch::per_element(each / wide)
            .for_each(n)
            .with_cost(4 * x.len(), (2 + usize::from(add.is_some())) * x.len() * dtype.bytes()),
        kernels::NormApplyArgs {
            x: (&values).into(),
            norm: (&channels).into(),
            add: (&add).into(),
            y: (&out).into(),
            count: each.into(),
            c: x.channels().into(),
            slope: norm.slope,
        },
    )?;
    Ok(Tensor::from_device(x.shape(), out, dtype))
}

/// Layer norm over the last axis; without a norm, only GELU or nothing. With `fold`, `x` holds the
/// 8 phases of each voxel of the coarse grid `[n, d, h, w]` one after the other, and the result is
/// the fine map `[n, 2d, 2h, 2w, c]`.
pub fn layer_norm(
    cuda: &Cuda,
    x: &Tensor,
    norm: Option<(&Tensor, &Tensor, f32)>,
    gelu: bool,
    fold: Option<[usize; 4]>,
) -> Result<Tensor, OpError> {
    let dtype = cuda.precision();
    let (shape, [d, h, w]) = match fold {
        Some([n, d, h, w]) => {
            (vec![n, 2 * d, 2 * h, 2 * w, x.len() / (n * d * h * w * 8)], [d, h, w])
        }
        None => (x.shape().to_vec(), [0; 3]),
    };
    let c = shape.last().copied().unwrap_or(1);
    let rows = x.len() / c;
    let (out, values) = (cuda.allocate(x.len(), dtype)?, x.to_device(cuda, dtype)?);
    let weight = norm.map(|n| n.0.to_device(cuda, DType::F32)).transpose()?;
    let bias = norm.map(|n| n.1.to_device(cuda, DType::F32)).transpose()?;
    // Threads of a warp that share a row.
    let wide = lanes(dtype, c);
    let group = (c / wide).next_power_of_two().min(32);
    if c > group * KEPT {
        let message =
            format!("rows of {c} values; on a CUDA device they have at most {}", 32 * KEPT);
        return Err(OpError::Argument { op: "layer_norm", message });
    }
    let launch = Launch {
        grid: [(rows * group).div_ceil(128), 1, 1],
        threads: 128,
        ..Launch::per_element(0)
    }
    .with_cost(8 * x.len(), 2 * x.len() * dtype.bytes());
    let family = if wide > 1 { kernels::LAYER_NORM_WIDE } else { kernels::LAYER_NORM };
    cuda.launch(
        family.of(dtype)?,
        launch,
        kernels::LayerNormArgs {
            x: (&values).into(),
            weight: (&weight).into(),
            bias: (&bias).into(),
            y: (&out).into(),
            rows: rows.into(),
            c: c.into(),
            eps: norm.map_or(0.0, |n| n.2),
            gelu_behind: gelu.into(),
            d: d.into(),
            h: h.into(),
            w: w.into(),
            group: group.into(),
        },
    )?;
    Ok(Tensor::from_device(shape, out, dtype))
}

/// Sums over all but the last axis, added to the sums so far.
pub fn totals_of(cuda: &Cuda, x: &Tensor, so_far: Option<Tensor>) -> Result<Tensor, OpError> {
    let (c, dtype) = (x.channels(), cuda.precision());
    column_sums(cuda, &x.to_device(cuda, dtype)?, dtype, [1, x.len() / c, c], so_far)
}

/// [`grad::instance_norm`](super::grad::instance_norm) on a device.
pub fn instance_norm_gradient(
    cuda: &Cuda,
    x: &Tensor,
    norm: &ChannelNorm,
    dy: &Tensor,
) -> Result<(Tensor, Tensor, Tensor), OpError> {
    let (n, c, dtype) = (x.shape()[0], x.channels(), cuda.precision());
    let rows = x.rows() / n;
    let (values, gradient) = (x.to_device(cuda, dtype)?, dy.to_device(cuda, dtype)?);
    let (channels, deviations) =
        (norm.channels.to_device(cuda, DType::F32)?, norm.deviation.to_device(cuda, DType::F32)?);
    let columns = Columns::new(cuda, n, [rows, c], [2, 0]);
    let [first, second] = columns.sums(cuda, c, |partial, [first, second]| {
        Ok(cuda.launch(
            kernels::NORM_GRADIENT_SUMS.of(dtype)?,
            columns.launch().with_cost(8 * x.len(), 2 * x.len() * dtype.bytes()),
            kernels::NormGradientSumsArgs {
                x: (&values).into(),
                dy: (&gradient).into(),
                norm: (&channels).into(),
                deviations: (&deviations).into(),
                partial: partial.into(),
                first: first.into(),
                second: second.into(),
                rows: rows.into(),
                c: c.into(),
                run: columns.run.into(),
                lanes: columns.lanes.into(),
                slope: norm.slope,
            },
        )?)
    })?;
    let out = cuda.allocate(x.len(), dtype)?;
    let [of_bias, of_weight] =
        [first.to_device(cuda, DType::F32)?, second.to_device(cuda, DType::F32)?];
    let (each, wide) = (x.len() / n, lanes(dtype, c));
    let family =
        if wide > 1 { kernels::NORM_GRADIENT_APPLY_WIDE } else { kernels::NORM_GRADIENT_APPLY };
    cuda.launch(
        family.of(dtype)?,
        Launch::per_element(each / wide)
            .for_each(n)
            .with_cost(10 * x.len(), 3 * x.len() * dtype.bytes()),
        kernels::NormGradientApplyArgs {
            x: (&values).into(),
            dy: (&gradient).into(),
            norm: (&channels).into(),
            deviations: (&deviations).into(),
            first: (&of_bias).into(),
            second: (&of_weight).into(),
            dx: (&out).into(),
            count: each.into(),
            c: c.into(),
            share: (1.0 / rows as f64) as f32,
            slope: norm.slope,
        },
    )?;
    // The sums of an item are the gradients, if it is the only one.
    let [bias, weight] = if n == 1 {
        [first, second]
    } else {
        [
            column_sums(cuda, &of_bias, DType::F32, [1, n, c], None)?,
            column_sums(cuda, &of_weight, DType::F32, [1, n, c], None)?,
        ]
    };
    Ok((Tensor::from_device(x.shape(), out, dtype), weight, bias))
}

/// [`grad::layer_norm_onto`](super::grad::layer_norm_onto) on a device.
pub fn layer_norm_gradient(
    cuda: &Cuda,
    x: &Tensor,
    (weight, bias, eps): (&Tensor, &Tensor, f32),
    gelu: bool,
    dy: &Tensor,
    so_far: Option<&Tensor>,
) -> Result<(Tensor, Tensor, Tensor), OpError> {
    let (c, rows, dtype) = (x.channels(), x.rows(), cuda.precision());
    let (values, gradient) = (x.to_device(cuda, dtype)?, dy.to_device(cuda, dtype)?);
    let (weights, biases) =
        (weight.to_device(cuda, DType::F32)?, bias.to_device(cuda, DType::F32)?);
    let so_far = so_far.map(|sum| sum.to_device(cuda, dtype)).transpose()?;
    let (out, stats) = (cuda.allocate(x.len(), dtype)?, cuda.allocate(rows * 2, DType::F32)?);
    // Threads of a warp that share a row.
    let wide = lanes(dtype, c);
    let group = (c / wide).next_power_of_two().min(32);
    let launch = Launch::per_element(rows * group)
        .with_cost(16 * x.len(), (3 + usize::from(so_far.is_some())) * x.len() * dtype.bytes());
    cuda.launch(
        kernels::LAYER_NORM_GRADIENT.of(dtype)?,
        launch,
        kernels::LayerNormGradientArgs {
            x: (&values).into(),
            dy: (&gradient).into(),
            weight: (&weights).into(),
            bias: (&biases).into(),
            so_far: (&so_far).into(),
            dx: (&out).into(),
            rows_are: (&stats).into(),
            rows: rows.into(),
            c: c.into(),
            eps,
            gelu_behind: gelu.into(),
            group: group.into(),
        },
    )?;
    let columns = Columns::new(cuda, 1, [rows, c], [2, 0]);
    let [bias, weight] = columns.sums(cuda, c, |partial, [first, second]| {
        Ok(cuda.launch(
            kernels::LAYER_NORM_SUMS.of(dtype)?,
            columns.launch().with_cost(10 * x.len(), 2 * x.len() * dtype.bytes()),
            kernels::LayerNormSumsArgs {
                x: (&values).into(),
                dy: (&gradient).into(),
                weight: (&weights).into(),
                bias: (&biases).into(),
                rows_are: (&stats).into(),
                partial: partial.into(),
                first: first.into(),
                second: second.into(),
                rows: rows.into(),
                c: c.into(),
                run: columns.run.into(),
                lanes: columns.lanes.into(),
                gelu_behind: gelu.into(),
            },
        )?)
    })?;
    Ok((Tensor::from_device(x.shape(), out, dtype), weight, bias))
}
