//! Adding up partial sums on CUDA devices. See `kernels/norm.cu` and `kernels/weight_gradient.cu`.

use crate::device::cuda::{Launch, Memory, kernels};
use crate::device::{Cuda, DType};
use crate::tensor::{OpError, Tensor};
use std::sync::Arc;

/// Threads of a block that adds up so many tiles.
pub fn adders(tiles: usize) -> usize {
    tiles.next_multiple_of(32).clamp(32, 512)
}

/// Adds up partial sums `[items][tiles][c][2]`, times `scale`: two lists `[items * c]` in float32.
pub fn totals(
    cuda: &Cuda,
    partial: &Arc<Memory>,
    [items, tiles, c]: [usize; 3],
    scale: f64,
) -> Result<[Tensor; 2], OpError> {
    let [a, b] = [cuda.allocate(items * c, DType::F32)?, cuda.allocate(items * c, DType::F32)?];
    let launch = Launch {
        grid: [items * c, 1, 1],
        threads: adders(tiles),
        shared: 16 * 16,
        ..Launch::per_element(0)
    }
    .with_cost(0, items * tiles * c * 16);
    cuda.launch(
        kernels::NORM_TOTALS,
        launch,
        kernels::NormTotalsArgs {
            partial: partial.into(),
            a: (&a).into(),
            b: (&b).into(),
            tiles: tiles.into(),
            c: c.into(),
            scale,
        },
    )?;
    Ok([a, b].map(|m| Tensor::from_device([items * c], m, DType::F32)))
}

/// Adds up `parts` partial sums `[part][phase][tap][c][outs]` to `[phase][outs][c][tap]`.
pub fn weight_total(
    cuda: &Cuda,
    partial: &Arc<Memory>,
    parts: usize,
    [phases, taps, c, outs]: [usize; 4],
) -> Result<Tensor, OpError> {
    let each = phases * taps * c * outs;
    let total = cuda.allocate(each, DType::F32)?;
    cuda.launch(
        kernels::WEIGHT_GRADIENT_TOTAL,
        Launch::per_element(each).with_cost(parts * each, (parts + 1) * each * 4),
        kernels::WeightGradientTotalArgs {
            partial: partial.into(),
            y: (&total).into(),
            parts: parts.into(),
            phases: phases.into(),
            taps: taps.into(),
            c: c.into(),
            outs: outs.into(),
        },
    )?;
    Ok(Tensor::from_device([each], total, DType::F32))
}
