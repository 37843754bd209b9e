//! Gradients of the resamplings, which are linear: each is multiplication with the transposed
//! matrix.

use super::between;
use crate::device::Device;
use crate::device::cuda::kernels;
use crate::tensor::{OpError, Tensor};

/// The gradient of [`downsample2_trilinear`](super::downsample2_trilinear)'s input: an eighth to
/// each of the eight voxels under one.
pub fn downsample2_trilinear(device: &Device, dy: &Tensor) -> Result<Tensor, OpError> {
    let [n, d, h, w, c] = dy.map5("trilinear_half gradient", "dy")?;
    if let Device::Cuda(cuda) = device {
        return super::cuda::run(cuda, kernels::HALVE_GRADIENT, dy, [n, 2 * d, 2 * h, 2 * w, c]);
    }
    let mut dx = device.cpu().alloc(dy.len() * 8);
    device.cpu().chunks_mut(&mut dx, 2 * w * c, |line, dx| {
        let (item, i, j) = (line / (4 * d * h), line / (2 * h) % (2 * d), line % (2 * h));
        let from = &dy.data()[((item * d + i / 2) * h + j / 2) * w * c..][..w * c];
        for (k, dx) in dx.chunks_exact_mut(c).enumerate() {
            dx.iter_mut().zip(&from[k / 2 * c..]).for_each(|(x, y)| *x = y * 0.125);
        }
    });
    Ok(Tensor::from_buffer([n, 2 * d, 2 * h, 2 * w, c], dx))
}

/// The fine positions that read coarse position `i` of an axis, with their weights.
fn readers(i: usize, edge: usize) -> Vec<(usize, f32)> {
    let fine = (2 * i).saturating_sub(1)..(2 * i + 3).min(2 * edge);
    fine.filter_map(|o| {
        let (a, b, weight) = between(o, edge);
        let total = if a == i { weight } else { 0.0 } + if b == i { 1.0 - weight } else { 0.0 };
        (total != 0.0).then_some((o, total))
    })
    .collect()
}

/// The gradient of [`upsample2_trilinear`](super::upsample2_trilinear)'s input.
pub fn upsample2_trilinear(device: &Device, dy: &Tensor) -> Result<Tensor, OpError> {
    let [n, fd, fh, fw, c] = dy.map5("trilinear_double gradient", "dy")?;
    let (d, h, w) = (fd / 2, fh / 2, fw / 2);
    if let Device::Cuda(cuda) = device {
        return super::cuda::run(cuda, kernels::DOUBLE_GRADIENT, dy, [n, d, h, w, c]);
    }
    let mut dx = device.cpu().zeros(n * d * h * w * c);
    let along_k: Vec<_> = (0..w).map(|k| readers(k, w)).collect();
    device.cpu().chunks_mut(&mut dx, w * c, |line, dx| {
        let (item, i, j) = (line / h / d, line / h % d, line % h);
        let mut mixed = vec![0.0f32; fw * c];
        for (oi, a) in readers(i, d) {
            for (oj, b) in readers(j, h) {
                let row = &dy.data()[((item * fd + oi) * fh + oj) * fw * c..][..fw * c];
                mixed.iter_mut().zip(row).for_each(|(m, v)| *m += a * b * v);
            }
        }
        for (dx, readers) in dx.chunks_exact_mut(c).zip(&along_k) {
            for (ok, weight) in readers {
                dx.iter_mut().zip(&mixed[ok * c..]).for_each(|(x, m)| *x += weight * m);
            }
        }
    });
    Ok(Tensor::from_buffer([n, d, h, w, c], dx))
}

/// The gradient of [`downsample4_nearest`](super::downsample4_nearest)'s input: back to every
/// fourth voxel, zero elsewhere.
pub fn downsample4_nearest(device: &Device, dy: &Tensor) -> Result<Tensor, OpError> {
    let [n, d, h, w, c] = dy.map5("nearest_quarter gradient", "dy")?;
    if let Device::Cuda(cuda) = device {
        return super::cuda::run(cuda, kernels::QUARTER_GRADIENT, dy, [n, 4 * d, 4 * h, 4 * w, c]);
    }
    let mut dx = device.cpu().zeros(dy.len() * 64);
    for (voxel, from) in dy.data().chunks_exact(c.max(1)).enumerate() {
        let (item, i, j, k) = (voxel / (d * h * w), voxel / (h * w) % d, voxel / w % h, voxel % w);
        let at = (((item * 4 * d + 4 * i) * 4 * h + 4 * j) * 4 * w + 4 * k) * c;
        dx[at..][..c].copy_from_slice(from);
    }
    Ok(Tensor::from_buffer([n, 4 * d, 4 * h, 4 * w, c], dx))
}
