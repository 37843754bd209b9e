//! Resampling of maps inside the network, by the rules of PyTorch's `interpolate` without aligned
//! corners.
//!
//! Volumes of arbitrary spacing are resampled elsewhere, by [`crate::volume::resample`], and by a
//! different rule.

pub(crate) mod cuda;
pub mod grad;

use crate::device::Device;
use crate::device::cuda::kernels;
use crate::device::profile::OpCost;
use crate::tensor::{OpError, Tensor};

/// Halves every spatial axis, trilinear: `[n, d, h, w, c]` to `[n, d/2, h/2, w/2, c]`, with even d,
/// h and w. At this scale trilinear interpolation is the mean of 2×2×2 voxels.
pub fn downsample2_trilinear(device: &Device, x: &Tensor) -> Result<Tensor, OpError> {
    const OP: &str = "trilinear_half";
    let [n, d, h, w, c] = x.map5(OP, "x")?;
    if d % 2 + h % 2 + w % 2 != 0 || x.is_empty() {
        return Err(x.shape_error(OP, "x", "even spatial axes"));
    }
    let (d, h, w) = (d / 2, h / 2, w / 2);
    if let Device::Cuda(cuda) = device {
        return cuda::run(cuda, kernels::HALVE, x, [n, d, h, w, c]);
    }
    let _op = device.cpu().op("downsample2_trilinear", || OpCost {
        problem: format!("{:?}", x.shape()),
        flops: x.len() as f64,
        floats: x.len() * 9 / 8,
    });
    let mut out = device.cpu().alloc(n * d * h * w * c);
    device.cpu().chunks_mut(&mut out, w * c, |line, out| {
        let (item, i, j) = (line / h / d, line / h % d, line % h);
        let row = |p: usize, q: usize| {
            &x.data()[((item * 2 * d + 2 * i + p) * 2 * h + 2 * j + q) * 2 * w * c..][..2 * w * c]
        };
        let rows = [row(0, 0), row(0, 1), row(1, 0), row(1, 1)];
        for (k, out) in out.chunks_exact_mut(c).enumerate() {
            for (q, out) in out.iter_mut().enumerate() {
                *out = rows.iter().map(|r| r[2 * k * c + q] + r[(2 * k + 1) * c + q]).sum::<f32>()
                    * 0.125;
            }
        }
    });
    Ok(Tensor::from_buffer([n, d, h, w, c], out))
}

/// The two coarse positions between which fine position `o` lies, and the first one's weight.
fn between(o: usize, edge: usize) -> (usize, usize, f32) {
    let near = o / 2;
    if o.is_multiple_of(2) {
        (near.saturating_sub(1), near, 0.25)
    } else {
        (near, (near + 1).min(edge - 1), 0.75)
    }
}

/// Doubles every spatial axis, trilinear: `[n, d, h, w, c]` to `[n, 2d, 2h, 2w, c]`.
pub fn upsample2_trilinear(device: &Device, x: &Tensor) -> Result<Tensor, OpError> {
    const OP: &str = "trilinear_double";
    let [n, d, h, w, c] = x.map5(OP, "x")?;
    if x.is_empty() {
        return Err(x.shape_error(OP, "x", "no empty axis"));
    }
    if let Device::Cuda(cuda) = device {
        return cuda::run(cuda, kernels::DOUBLE, x, [n, 2 * d, 2 * h, 2 * w, c]);
    }
    let _op = device.cpu().op("upsample2_trilinear", || OpCost {
        problem: format!("{:?}", x.shape()),
        flops: (32 * x.len()) as f64,
        floats: x.len() * 9,
    });
    let mut out = device.cpu().alloc(x.len() * 8);
    device.cpu().chunks_mut(&mut out, 2 * w * c, |line, out| {
        let (item, i, j) = (line / (4 * h * d), line / (2 * h) % (2 * d), line % (2 * h));
        let ((i0, i1, a), (j0, j1, b)) = (between(i, d), between(j, h));
        let row = |i: usize, j: usize| &x.data()[((item * d + i) * h + j) * w * c..][..w * c];
        let rows = [row(i0, j0), row(i0, j1), row(i1, j0), row(i1, j1)];
        let weights = [a * b, a * (1.0 - b), (1.0 - a) * b, (1.0 - a) * (1.0 - b)];
        let mut mixed = vec![0.0f32; w * c];
        for (row, weight) in rows.iter().zip(weights) {
            mixed.iter_mut().zip(*row).for_each(|(m, v)| *m += weight * v);
        }
        for (k, out) in out.chunks_exact_mut(c).enumerate() {
            let (k0, k1, e) = between(k, w);
            for (q, out) in out.iter_mut().enumerate() {
                *out = e * mixed[k0 * c + q] + (1.0 - e) * mixed[k1 * c + q];
            }
        }
    });
    Ok(Tensor::from_buffer([n, 2 * d, 2 * h, 2 * w, c], out))
}

/// Quarters every spatial axis, nearest neighbour: `[n, d, h, w, c]` to `[n, d/4, h/4, w/4, c]`,
/// with d, h and w divisible by 4. It takes the first of every four voxels along each.
pub fn downsample4_nearest(device: &Device, x: &Tensor) -> Result<Tensor, OpError> {
    const OP: &str = "nearest_quarter";
    let [n, d, h, w, c] = x.map5(OP, "x")?;
    if d % 4 + h % 4 + w % 4 != 0 || x.is_empty() {
        return Err(x.shape_error(OP, "x", "spatial axes that 4 divides"));
    }
    let (d, h, w) = (d / 4, h / 4, w / 4);
    if let Device::Cuda(cuda) = device {
        return cuda::run(cuda, kernels::QUARTER, x, [n, d, h, w, c]);
    }
    let _op = device.cpu().op("downsample4_nearest", || OpCost {
        problem: format!("{:?}", x.shape()),
        flops: 0.0,
        floats: x.len() / 32,
    });
    let mut out = device.cpu().alloc(n * d * h * w * c);
    for (voxel, out) in out.chunks_exact_mut(c).enumerate() {
        let (item, i, j, k) = (voxel / (d * h * w), voxel / (h * w) % d, voxel / w % h, voxel % w);
        let from = (((item * 4 * d + 4 * i) * 4 * h + 4 * j) * 4 * w + 4 * k) * c;
        out.copy_from_slice(&x.data()[from..][..c]);
    }
    Ok(Tensor::from_buffer([n, d, h, w, c], out))
}
