//! Rearranging maps for the strided convolutions on CUDA devices. See `kernels/resample.cu` and
//! `kernels/norm.cu`.

use crate::device::cuda::{Launch, Memory, kernels};
use crate::device::{Cuda, DType};
use crate::tensor::{OpError, Tensor};
use std::sync::Arc;

/// Patches of edge `e` as rows: `x` `[n, d e, h e, w e, c]` to `[n, d, h, w, c e³]`.
pub fn unfold(
    cuda: &Cuda,
    x: &Tensor,
    [n, d, h, w, c]: [usize; 5],
    e: usize,
) -> Result<Tensor, OpError> {
    let dtype = cuda.precision();
    let (out, values) = (cuda.allocate(x.len(), dtype)?, x.to_device(cuda, dtype)?);
    // Of a single channel, a patch's rows are values side by side.
    let (each, row) = (d * h * w * c * e.pow(3), if c == 1 { e } else { 1 });
    cuda.launch(
        kernels::UNFOLD.of(dtype)?,
        Launch::per_vector(dtype.bytes(), each, row)
            .for_each(n)
            .with_cost(0, 2 * x.len() * dtype.bytes()),
        kernels::UnfoldArgs {
            x: (&values).into(),
            y: (&out).into(),
            count: each.into(),
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
    let each = d * h * w * c;
    cuda.launch(
        kernels::FOLD.of(dtype)?,
        Launch::per_element(each).for_each(n).with_cost(0, 2 * rows.len() * dtype.bytes()),
        kernels::FoldArgs {
            rows: (&values).into(),
            x: (&out).into(),
            count: each.into(),
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
    let each = 8 * d * h * w * c;
    cuda.launch(
        kernels::NORM_SPLIT_PHASES.of(dtype)?,
        Launch::per_vector(dtype.bytes(), each, c)
            .for_each(n)
            .with_cost(0, 2 * x.len() * dtype.bytes()),
        kernels::NormSplitPhasesArgs {
            fine: (&values).into(),
            rows: (&out).into(),
            count: each.into(),
            d: d.into(),
            h: h.into(),
            w: w.into(),
            c: c.into(),
        },
    )?;
    Ok(Tensor::from_device([n * d * h * w, 8 * c], out, dtype))
}

/// Weights `[a][b][c]`, in float32, as `[c][b][a]`.
pub fn reverse_axes(
    cuda: &Cuda,
    x: &Tensor,
    [a, b, c]: [usize; 3],
) -> Result<Arc<Memory>, OpError> {
    let (out, values) = (cuda.allocate(x.len(), DType::F32)?, x.to_device(cuda, DType::F32)?);
    let launch = Launch {
        grid: [(b * c).div_ceil(32), a.div_ceil(32), 1],
        shared: 32 * 33 * 4,
        ..Launch::per_element(0)
    }
    .with_cost(0, 8 * x.len());
    cuda.launch(
        kernels::REVERSE_AXES,
        launch,
        kernels::ReverseAxesArgs {
            x: (&values).into(),
            y: (&out).into(),
            a: a.into(),
            b: b.into(),
            c: c.into(),
        },
    )?;
    Ok(out)
}

/// A list of floats, repeated `times` times.
pub fn repeat(cuda: &Cuda, x: &Tensor, times: usize) -> Result<Arc<Memory>, OpError> {
    let count = times * x.len();
    let (out, values) = (cuda.allocate(count, DType::F32)?, x.to_device(cuda, DType::F32)?);
    cuda.launch(
        kernels::REPEAT,
        Launch::per_element(count).with_cost(0, 8 * count),
        kernels::RepeatArgs {
            x: (&values).into(),
            y: (&out).into(),
            count: count.into(),
            period: x.len().into(),
        },
    )?;
    Ok(out)
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::super::{PackedTranspose, conv_transpose3d, grad};
    use super::*;
    use crate::device::{Cpu, Device};

    /// Weights whose home is the device are laid out there, and nothing of them, or of their
    /// gradient, is copied to the host.
    #[test]
    fn transposed_convolutions_are_laid_out_on_the_device_as_on_the_host() {
        let noise = |shape: &[usize], seed: usize| {
            let count: usize = shape.iter().product();
            Tensor::new(
                shape,
                (0..count).map(|i| ((i * 7919 + seed * 131) % 997) as f32 / 997.0 - 0.5).collect(),
            )
        };
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let cuda = Cuda::emulated(Cpu::new(4).unwrap(), dtype, 0);
            let device = Device::Cuda(cuda.clone());
            let on = |t: &Tensor, dtype: DType| {
                Tensor::from_device(t.shape(), t.to_device(&cuda, dtype).unwrap(), dtype)
            };
            for [inputs, out] in [[40, 6], [8, 35]] {
                let (weight, bias) = (noise(&[inputs, out, 2, 2, 2], 1), noise(&[out], 2));
                let x = on(&noise(&[1, 2, 3, 2, inputs], 3), dtype);
                let dy = on(&noise(&[1, 4, 6, 4, out], 4), dtype);
                let results = |weight: &Tensor, bias: &Tensor| {
                    let packed = PackedTranspose::new(weight, bias).unwrap();
                    let y = conv_transpose3d(&device, &x, &packed, None).unwrap();
                    let (dx, dw, db) = grad::conv_transpose3d(&device, &x, &packed, &dy).unwrap();
                    [y, dx, dw, db]
                };
                let there = [on(&weight, DType::F32), on(&bias, DType::F32)];
                let before = cuda.transfers();
                let found = results(&there[0], &there[1]);
                assert_eq!(cuda.transfers(), before, "it took the way over the host");
                for (found, expected) in found.iter().zip(&results(&weight, &bias)) {
                    assert_eq!(
                        found.try_data().unwrap(),
                        expected.try_data().unwrap(),
                        "{dtype}, {inputs} to {out}"
                    );
                }
            }
        }
    }
}
