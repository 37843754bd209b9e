//! Rearranging maps for the strided convolutions on CUDA devices. See `kernels/resample.cu` and
//! `kernels/norm.cu`.

use crate::device::Cuda;
use crate::device::cuda::{Launch, kernels};
use crate::tensor::{OpError, Tensor};

/// Patches of edge `e` as rows: `x` `[n, d e, h e, w e, c]` to `[n, d, h, w, c e³]`.
pub fn unfold(
    cuda: &Cuda,
    x: &Tensor,
    [n, d, h, w, c]: [usize; 5],
    e: usize,
) -> Result<Tensor, OpError> {
    let dtype = cuda.precision();
    let (out, values) = (cuda.allocate(x.len(), dtype)?, x.to_device(cuda, dtype)?);
    cuda.launch(
        kernels::UNFOLD.of(dtype)?,
        Launch::per_element(x.len()).with_cost(0, 2 * x.len() * dtype.bytes()),
        kernels::UnfoldArgs {
            x: (&values).into(),
            y: (&out).into(),
            count: x.len().into(),
            d: d.into(),
            h: h.into(),
            w: w.into(),
            c: c.into(),
            e: e.into(),
        },
    )?;
    Ok(Tensor::from_device([n, d, h, w, c * e * e * e], out, dtype))
}

/// Rows `[n, d / e, h / e, w / e, c e³]` back to a map `[n, d, h, w, c]`.
pub fn fold(
    cuda: &Cuda,
    rows: &Tensor,
    [n, d, h, w, c]: [usize; 5],
    e: usize,
) -> Result<Tensor, OpError> {
    let dtype = cuda.precision();
    let (out, values) = (cuda.allocate(rows.len(), dtype)?, rows.to_device(cuda, dtype)?);
    cuda.launch(
        kernels::FOLD.of(dtype)?,
        Launch::per_element(rows.len()).with_cost(0, 2 * rows.len() * dtype.bytes()),
        kernels::FoldArgs {
            rows: (&values).into(),
            x: (&out).into(),
            count: rows.len().into(),
            d: d.into(),
            h: h.into(),
            w: w.into(),
            c: c.into(),
            e: e.into(),
        },
    )?;
    Ok(Tensor::from_device([n, d, h, w, c], out, dtype))
}

/// A fine map `[n, 2d, 2h, 2w, c]` as rows `[n d h w, 8 c]`, the 8 phases of a coarse voxel side by
/// side.
pub fn split_phases(cuda: &Cuda, x: &Tensor, [n, d, h, w]: [usize; 4]) -> Result<Tensor, OpError> {
    let (c, dtype) = (x.channels(), cuda.precision());
    let (out, values) = (cuda.allocate(x.len(), dtype)?, x.to_device(cuda, dtype)?);
    cuda.launch(
        kernels::NORM_SPLIT_PHASES.of(dtype)?,
        Launch::per_element(x.len()).with_cost(0, 2 * x.len() * dtype.bytes()),
        kernels::NormSplitPhasesArgs {
            fine: (&values).into(),
            rows: (&out).into(),
            count: x.len().into(),
            d: d.into(),
            h: h.into(),
            w: w.into(),
            c: c.into(),
        },
    )?;
    Ok(Tensor::from_device([n * d * h * w, 8 * c], out, dtype))
}
