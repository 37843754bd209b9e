//! Gradients of the strided convolutions: these, too, are dense layers on rearranged values.

use super::{PackedTranspose, unfold};
use crate::device::{DType, Device, DisjointWriter};
use crate::ops::linear;
use crate::tensor::{OpError, Tensor};

/// The gradient of [`patch_conv`](super::patch_conv)'s input, whose shape is `x`
/// `[n, d, h, w, in]`, from the `weight` and `dy` `[n, d / e, h / e, w / e, out]`.
pub fn patch_input(
    device: &Device,
    weight: &Tensor,
    x: &[usize],
    dy: &Tensor,
) -> Result<Tensor, OpError> {
    const OP: &str = "patch_conv gradient";
    let [out, c, e, ..] = weight.map5(OP, "weight")?;
    let rows = linear::grad::input(device, &weight.reshape([out, c * e * e * e]), dy)?;
    let &[n, d, h, w, _] = x else { return Err(dy.shape_error(OP, "dy", "that of a map")) };
    let [cd, ch, cw] = [d / e, h / e, w / e];
    dy.expect_shape(OP, "dy", &[n, cd, ch, cw, out])?;
    if let Device::Cuda(cuda) = device {
        return super::cuda::fold(cuda, &rows, [n, d, h, w, c], e);
    }
    let patch = c * e * e * e;
    let mut dx = device.cpu().alloc(n * d * h * w * c);
    let to = DisjointWriter::new(&mut dx);
    device.cpu().for_each(n * cd * ch, |line| {
        let (item, i, j) = (line / ch / cd, line / ch % cd, line % ch);
        for (td, th) in (0..e).flat_map(|td| (0..e).map(move |th| (td, th))) {
            let at = ((item * d + i * e + td) * h + j * e + th) * w * c;
            // SAFETY: each coarse line owns its fine rows.
            let row = unsafe { to.slice(at, w * c) };
            for (q, v) in row.iter_mut().enumerate() {
                let (k, channel) = (q / c, q % c);
                *v = rows.data()
                    [(line * cw + k / e) * patch + ((channel * e + td) * e + th) * e + k % e];
            }
        }
    });
    Ok(Tensor::from_buffer(x, dx))
}

/// The gradient of [`patch_conv`](super::patch_conv)'s weight from its input `x`
/// `[n, d, h, w, in]`, the kernel's edge `e` and `dy` `[n, d / e, h / e, w / e, out]`. Gives
/// `[out, in e³]`, the values in the weight's order.
pub fn patch_weight(device: &Device, x: &Tensor, e: usize, dy: &Tensor) -> Result<Tensor, OpError> {
    linear::grad::weight(device, &unfold(device, x, e)?, dy)
}

/// The gradients of [`conv_transpose3d`](super::conv_transpose3d) without a norm: of `x`, of the
/// weight, with the values in the order of `[in, out, 2, 2, 2]`, and of the bias `[out]`.
pub fn conv_transpose3d(
    device: &Device,
    x: &Tensor,
    packed: &PackedTranspose,
    dy: &Tensor,
) -> Result<(Tensor, Tensor, Tensor), OpError> {
    const OP: &str = "conv_transpose3d gradient";
    let [n, d, h, w, c] = x.map5(OP, "x")?;
    let out = packed.bias.len();
    dy.expect_shape(OP, "dy", &[n, 2 * d, 2 * h, 2 * w, out])?;
    // [coarse voxel][phase][out]
    let on_cpu = || {
        let mut rows = device.cpu().alloc(dy.len());
        device.cpu().chunks_mut(&mut rows, 8 * out, |voxel, row| {
            let (item, i, j, k) =
                (voxel / (d * h * w), voxel / (h * w) % d, voxel / w % h, voxel % w);
            for (phase, to) in row.chunks_exact_mut(out).enumerate() {
                let at =
                    ((item * 2 * d + 2 * i + phase / 4) * 2 * h + 2 * j + phase / 2 % 2) * 2 * w
                        + 2 * k
                        + phase % 2;
                to.copy_from_slice(&dy.data()[at * out..][..out]);
            }
        });
        Tensor::from_buffer([n * d * h * w, 8 * out], rows)
    };
    let rows = match device {
        Device::Cpu(_) => on_cpu(),
        Device::Cuda(cuda) => super::cuda::split_phases(cuda, dy, [n, d, h, w])?,
    };
    let dx = linear::grad::input(device, &packed.matrix, &rows)?.reshape(x.shape());
    let matrix = linear::grad::weight(device, x, &rows)?;
    let bias = linear::grad::bias(device, dy)?;
    if let Device::Cuda(cuda) = device {
        let weight = super::cuda::reverse_axes(cuda, &matrix, [8, out, c])?;
        return Ok((dx, Tensor::from_device([c, out, 2, 2, 2], weight, DType::F32), bias));
    }
    let values = matrix.try_data()?;
    let from = |at: usize| values[(at % 8 * out + at / 8 % out) * c + at / (8 * out)];
    let weight: Vec<f32> = (0..c * out * 8).map(from).collect();
    Ok((dx, weight.into(), bias))
}
