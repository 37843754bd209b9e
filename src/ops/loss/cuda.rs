//! Losses on CUDA devices. See `kernels/loss.cu`.

use super::{At, Emphasis, MaskSums, Read, SMOOTH, Target, Terms};
use crate::device::cuda::{Launch, Memory, Pointer, kernels};
use crate::device::{Cuda, DType, Device};
use crate::ops::pointwise::positive;
use crate::tensor::{OpError, Tensor};
use std::sync::Arc;

/// Voxels of a tile, and the sums of one.
const TILE: usize = 4096;
const SUMS: usize = 5;

/// Brings a label's values, zeros and ones, to the device, where they stay with it: as a bit of
/// each, if they fill whole bytes. If not, the first op that reads them copies them as they are.
pub fn upload_label(cuda: &Cuda, label: &Tensor) -> Result<(), OpError> {
    if !label.len().is_multiple_of(8) {
        return Ok(());
    }
    // On the host, where the values are.
    let bits = positive(&Device::Cpu(cuda.cpu().clone()), label)?;
    label.kept_on(cuda, DType::F32, || {
        let (there, bytes) = (cuda.upload(&bits)?, bits.len());
        let out = cuda.allocate(label.len(), DType::F32)?;
        cuda.launch(
            kernels::UNPACK_BITS,
            Launch::per_element(bytes).with_cost(0, 33 * bytes),
            kernels::UnpackBitsArgs {
                bits: (&there).into(),
                y: (&out).into(),
                bytes: bytes.into(),
            },
        )?;
        Ok(out)
    })?;
    Ok(())
}

/// Average pooling of contiguous maps of floats, zeros beyond the border counted.
fn pool(
    cuda: &Cuda,
    x: &Arc<Memory>,
    count: usize,
    size: [usize; 3],
    kernel: [usize; 3],
) -> Result<Arc<Memory>, OpError> {
    let strides = [size[1] * size[2], size[2], 1];
    let axes: Vec<usize> = (0..3).filter(|&axis| kernel[axis] > 1).collect();
    let scale = 1.0 / kernel.iter().product::<usize>() as f32;
    let mut from = x.clone();
    for &axis in if axes.is_empty() { &[2][..] } else { &axes } {
        let out = cuda.allocate(count, DType::F32)?;
        cuda.launch(
            kernels::LOSS_WINDOW,
            Launch::per_element(count).with_cost(kernel[axis] * count, 8 * count),
            kernels::LossWindowArgs {
                x: (&from).into(),
                y: (&out).into(),
                count: count.into(),
                extent: size[axis].into(),
                stride: strides[axis].into(),
                reach: (kernel[axis] / 2).into(),
                scale: if Some(&axis) == axes.last() { scale } else { 1.0 },
            },
        )?;
        from = out;
    }
    Ok(from)
}

pub fn boundary_map(
    cuda: &Cuda,
    m: &Tensor,
    size: [usize; 3],
    kernel: [usize; 3],
) -> Result<Tensor, OpError> {
    let (values, count) = (m.to_device(cuda, DType::F32)?, m.len());
    let pooled = pool(cuda, &values, count, size, kernel)?;
    let out = cuda.allocate(count, DType::F32)?;
    cuda.launch(
        kernels::LOSS_BOUNDARY,
        Launch::per_element(count).with_cost(count, 12 * count),
        kernels::LossBoundaryArgs {
            x: (&values).into(),
            pooled: (&pooled).into(),
            y: (&out).into(),
            count: count.into(),
        },
    )?;
    Ok(Tensor::from_device(m.shape(), out, DType::F32))
}

/// The sums of each mask, and the gradient if it is wanted.
pub fn mask_losses(
    cuda: &Cuda,
    logits: &Tensor,
    target: &Target,
    wanted: Option<(Terms, f32)>,
) -> Result<(Arc<Memory>, Option<Tensor>), OpError> {
    let (dtype, voxels) = (cuda.precision(), target.label.len());
    let (masks, count, tiles) = (logits.len() / voxels, logits.len(), voxels.div_ceil(TILE));
    let (x, label, boundary) = (
        logits.to_device(cuda, dtype)?,
        target.label.to_device(cuda, DType::F32)?,
        target.boundary.to_device(cuda, DType::F32)?,
    );
    let p = cuda.allocate(count, DType::F32)?;
    let partial = cuda.allocate_bytes(masks * tiles * SUMS * 8)?;
    cuda.launch(
        kernels::LOSS_PROBABILITIES.of(dtype)?,
        tiled(tiles, masks, 4).with_cost(20 * count, count * (dtype.bytes() + 8)),
        kernels::LossProbabilitiesArgs {
            x: (&x).into(),
            label: (&label).into(),
            p: (&p).into(),
            partial: (&partial).into(),
            voxels: voxels.into(),
        },
    )?;
    let (terms, factor) = wanted.unwrap_or((Terms { region: 0.0, boundary: 0.0 }, 1.0));
    let slopes = pool(cuda, &p, count, target.size, target.kernel)?;
    // The pooled probabilities become the slopes.
    cuda.launch(
        kernels::LOSS_SLOPES,
        tiled(tiles, masks, 1).with_cost(5 * count, 16 * count),
        kernels::LossSlopesArgs {
            p: (&p).into(),
            target: (&boundary).into(),
            pooled: (&slopes).into(),
            partial: (&partial).into(),
            voxels: voxels.into(),
            scale: (2.0 * terms.boundary / voxels as f64) as f32,
        },
    )?;
    let sums = totals(cuda, &partial, masks, tiles)?;
    let mut gradient = None;
    if wanted.is_some() {
        let pooled = (terms.boundary != 0.0)
            .then(|| pool(cuda, &slopes, count, target.size, target.kernel))
            .transpose()?;
        let out = cuda.allocate(count, dtype)?;
        let launch = Launch { grid: [voxels.div_ceil(256), masks, 1], ..Launch::per_element(0) };
        let launch = launch.with_cost(10 * count, count * (16 + dtype.bytes()));
        cuda.launch(
            kernels::LOSS_GRADIENT.of(dtype)?,
            launch,
            kernels::LossGradientArgs {
                p: (&p).into(),
                label: (&label).into(),
                slopes: if pooled.is_some() { (&slopes).into() } else { Pointer::none() },
                pooled: (&pooled).into(),
                sums: (&sums).into(),
                dx: (&out).into(),
                voxels: voxels.into(),
                volume: target.volume,
                region: terms.region,
                smooth: SMOOTH,
                scale: factor,
            },
        )?;
        gradient = Some(Tensor::from_device(logits.shape(), out, dtype));
    }
    Ok((sums, gradient))
}

/// Blocks that add up tiles of masks, with shared memory for `columns` columns.
fn tiled(tiles: usize, masks: usize, columns: usize) -> Launch {
    Launch { grid: [tiles, masks, 1], shared: columns * 256 * 8, ..Launch::per_element(0) }
}

/// Adds up the tiles of each mask.
fn totals(
    cuda: &Cuda,
    partial: &Arc<Memory>,
    masks: usize,
    tiles: usize,
) -> Result<Arc<Memory>, OpError> {
    let sums = cuda.allocate_bytes(masks * SUMS * 8)?;
    let launch = Launch { grid: [masks, 1, 1], shared: SUMS * 256 * 8, ..Launch::per_element(0) };
    cuda.launch(
        kernels::LOSS_TOTALS,
        launch.with_cost(masks * tiles * SUMS, masks * tiles * SUMS * 8),
        kernels::LossTotalsArgs {
            partial: partial.into(),
            sums: (&sums).into(),
            tiles: tiles.into(),
        },
    )?;
    Ok(sums)
}

/// [`super::score_gradient`] on a device.
pub fn score_gradient(
    cuda: &Cuda,
    sums: &Arc<Memory>,
    scores: &Tensor,
    target: &Target,
    factor: f64,
    scale: f32,
) -> Result<Tensor, OpError> {
    let (dtype, masks) = (cuda.precision(), scores.len());
    let (out, values) = (cuda.allocate(masks, dtype)?, scores.to_device(cuda, dtype)?);
    let launch = Launch { grid: [masks.div_ceil(32), 1, 1], threads: 32, ..Launch::per_element(0) };
    cuda.launch(
        kernels::LOSS_SCORES.of(dtype)?,
        launch.with_cost(10 * masks, masks * (SUMS * 8 + 2 * dtype.bytes())),
        kernels::LossScoresArgs {
            sums: sums.into(),
            scores: (&values).into(),
            dx: (&out).into(),
            masks: masks.into(),
            volume: target.volume,
            smooth: SMOOTH,
            factor,
            scale,
        },
    )?;
    Ok(Tensor::from_device(scores.shape(), out, dtype))
}

/// [`super::emphasis`] on a device; sizes were checked.
pub fn emphasis(
    cuda: &Cuda,
    logits: &Tensor,
    target: &Target,
    emphasis: &Emphasis,
    [share, factor]: [f32; 2],
    gradient: &Tensor,
) -> Result<(Arc<Memory>, Tensor), OpError> {
    let (dtype, voxels, count) = (cuda.precision(), target.label.len(), logits.len());
    let (masks, tiles, [_, h, w]) = (count / voxels, voxels.div_ceil(TILE), target.size);
    let (x, label, near, given) = (
        logits.to_device(cuda, dtype)?,
        target.label.to_device(cuda, DType::F32)?,
        emphasis.numbers.to_device(cuda, DType::F32)?,
        gradient.to_device(cuda, dtype)?,
    );
    let (out, partial) =
        (cuda.allocate(count, dtype)?, cuda.allocate_bytes(masks * tiles * SUMS * 8)?);
    cuda.launch(
        kernels::LOSS_EMPHASIS.of(dtype)?,
        // Logits and label are read near clicks alone.
        tiled(tiles, masks, 1).with_cost(count, 2 * count * dtype.bytes()),
        kernels::LossEmphasisArgs {
            x: (&x).into(),
            label: (&label).into(),
            near: (&near).into(),
            gradient: (&given).into(),
            y: (&out).into(),
            partial: (&partial).into(),
            voxels: voxels.into(),
            clicks: emphasis.clicks.into(),
            distances: emphasis.distances().into(),
            h: h.into(),
            w: w.into(),
            share,
            factor,
        },
    )?;
    let sums = totals(cuda, &partial, masks, tiles)?;
    Ok((sums, Tensor::from_device(logits.shape(), out, dtype)))
}

/// [`super::read`] on a device: values are collected there and copied back at once.
pub fn read(
    cuda: &Cuda,
    sums: &[&MaskSums],
    scores: &[&Tensor],
    numbers: &[&Arc<Memory>],
) -> Result<Read, OpError> {
    let scores: Vec<Arc<Memory>> =
        scores.iter().map(|s| s.to_device(cuda, DType::F32)).collect::<Result<_, _>>()?;
    let there = sums.iter().filter_map(|sums| match &sums.0 {
        At::There(_, memory) => Some(memory),
        At::Here(_) => None,
    });
    let parts: Vec<&Arc<Memory>> = there.chain(&scores).chain(numbers.iter().copied()).collect();
    let bytes: usize = parts.iter().map(|part| part.bytes()).sum();
    let mut values = vec![0u8; bytes];
    if bytes > 0 {
        let (all, mut at) = (cuda.allocate_bytes(bytes)?, 0);
        for part in parts {
            cuda.copy(part, 0, &all, at, part.bytes())?;
            at += part.bytes();
        }
        cuda.download(&all, &mut values)?;
    }
    let mut rest = &values[..];
    let mut next = |bytes: usize| {
        let (first, behind) = rest.split_at(bytes);
        rest = behind;
        first
    };
    let sums = sums.iter().map(|sums| match &sums.0 {
        At::Here(sums) => sums.clone(),
        At::There(_, memory) => {
            next(memory.bytes()).chunks_exact(SUMS * 8).map(bytemuck::pod_read_unaligned).collect()
        }
    });
    let sums = sums.collect();
    let scores: Vec<Vec<f32>> = scores
        .iter()
        .map(|s| next(s.bytes()).chunks_exact(4).map(bytemuck::pod_read_unaligned).collect())
        .collect();
    let numbers = numbers.iter().map(|m| bytemuck::pod_read_unaligned(&next(m.bytes())[..8]));
    Ok(Read { sums, scores, numbers: numbers.collect() })
}
