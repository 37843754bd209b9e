//! Gradients of the ops on single values and voxels.

use crate::device::simd::multiversion;
use crate::device::{Device, DisjointWriter};
use crate::memory;
use crate::microkernel::item_norm::ItemNorm;
use crate::ops::norm::ChannelNorm;
use crate::tensor::{GRADIENT, OpError, Tensor};

/// Voxels of a unit of work.
const RUN: usize = 4096;

/// An error unless `b` has as many values as `a`.
fn as_many(op: &'static str, a: &Tensor, b: &Tensor) -> Result<(), OpError> {
    if a.len() == b.len() {
        Ok(())
    } else {
        Err(b.shape_error(op, "the second map", format!("{:?}", a.shape())))
    }
}

/// The gradient of the logistic function's argument, from the function's value `y` and the gradient
/// `dy` of that value.
pub fn sigmoid(device: &Device, y: &Tensor, dy: &Tensor) -> Result<Tensor, OpError> {
    as_many("sigmoid gradient", y, dy)?;
    if let Device::Cuda(cuda) = device {
        return super::cuda::slope(cuda, y, dy, super::cuda::Slope::Sigmoid);
    }
    let mut dx = device.cpu().alloc(y.len());
    dx.iter_mut()
        .zip(y.data().iter().zip(dy.data()))
        .for_each(|(x, (y, g))| *x = g * y * (1.0 - y));
    Ok(Tensor::from_buffer(y.shape(), dx))
}

/// The gradient of a softmax's argument over the last axis, from its value `y` and the gradient
/// `dy` of that value.
pub fn softmax(device: &Device, y: &Tensor, dy: &Tensor) -> Result<Tensor, OpError> {
    let c = y.channels();
    let mut dx = device.cpu().alloc(y.len());
    for ((x, y), g) in dx
        .chunks_exact_mut(c)
        .zip(y.try_data()?.chunks_exact(c))
        .zip(dy.try_data()?.chunks_exact(c))
    {
        let mean: f64 = y.iter().zip(g).map(|(y, g)| (y * g) as f64).sum();
        x.iter_mut().zip(y.iter().zip(g)).for_each(|(x, (y, g))| *x = y * (g - mean as f32));
    }
    Ok(Tensor::from_buffer(y.shape(), dx))
}

multiversion! {
    /// The gradient of the activated values of a run of voxels, and what it adds to `sums`
    /// `[m][c]`, the weights' gradient, and `[m]`, the bias's.
    fn mask_logits_run(
        x: &[f32],
        add: Option<&[f32]>,
        norm: &ItemNorm,
        c: usize,
        weights: &[f32],
        dy: &[&[f32]],
        dx: &mut [f32],
        sums: &mut [f32],
    ) {
        let mut value = vec![0.0f32; c];
        let m = dy.len();
        for (v, x) in x.chunks_exact(c).enumerate() {
            norm.run::<FUSED>(x, 0, &mut value);
            if let Some(add) = add {
                let add = &add[v * c..][..c];
                for q in 0..c {
                    value[q] += add[q];
                }
            }
            let value = &value[..c];
            let dx = &mut dx[v * c..][..c];
            dx.fill(0.0);
            for j in 0..m {
                let g = dy[j][v];
                let (w, sum) = (&weights[j * c..][..c], &mut sums[j * c..][..c]);
                for q in 0..c {
                    dx[q] += g * w[q];
                    sum[q] += g * value[q];
                }
            }
        }
        for j in 0..m {
            let mut total = 0.0;
            for g in dy[j] {
                total += *g;
            }
            sums[m * c + j] += total;
        }
    }
}

/// Gradients of [`mask_logits`](super::mask_logits): of the map as it was loaded, after norm and
/// addition, of the weights `[m, c]` and of the bias `[m]`.
pub fn mask_logits(
    device: &Device,
    x: &Tensor,
    norm: &ChannelNorm,
    add: Option<&Tensor>,
    weights: &Tensor,
    dy: &Tensor,
) -> Result<(Tensor, Tensor, Tensor), OpError> {
    const OP: &str = "mask_logits gradient";
    let (c, voxels) = (x.channels(), x.rows());
    if x.is_empty() {
        return Err(x.shape_error(OP, "x", "[1, d, h, w, c], no empty axis"));
    }
    norm.check(OP, 1, c)?;
    if let Some(add) = add {
        add.expect_shape(OP, "the map added to x", x.shape())?;
    }
    let m = weights.len() / c;
    weights.expect_shape(OP, "weights", &[m, c])?;
    if dy.len() != m * voxels {
        return Err(dy.shape_error(OP, "dy", format!("{m} maps of {voxels} voxels")));
    }
    let cpu = match device {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(cuda) => {
            return super::cuda::mask_logits_gradient(cuda, x, norm, add, weights, dy);
        }
    };
    let item = norm.item(0, c);
    let mut dx = cpu.alloc(x.len());
    let to = DisjointWriter::new(&mut dx);
    let each = m * c + m;
    let mut partial: Vec<f32> = memory::zeroed(GRADIENT, voxels.div_ceil(RUN) * each);
    cpu.chunks_mut(&mut partial, each, |unit, sums| {
        let at = unit * RUN..((unit + 1) * RUN).min(voxels);
        let dy: Vec<&[f32]> = dy.data().chunks_exact(voxels).map(|g| &g[at.clone()]).collect();
        let part = at.start * c..at.end * c;
        // SAFETY: units own disjoint voxels.
        let dx = unsafe { to.slice(part.start, part.len()) };
        let add = add.map(|a| &a.data()[part.clone()]);
        mask_logits_run(cpu.isa(), &x.data()[part], add, &item, c, weights.data(), &dy, dx, sums);
    });
    let total =
        |i: usize| partial.iter().skip(i).step_by(each).map(|v| *v as f64).sum::<f64>() as f32;
    let list = |range: std::ops::Range<usize>| range.map(total).collect::<Vec<f32>>().into();
    Ok((Tensor::from_buffer(x.shape(), dx), list(0..m * c), list(m * c..each)))
}

/// The product of two tensors value by value, in the shape of `a`: the gradient of one factor from
/// the other and that of the product.
pub fn times(device: &Device, a: &Tensor, b: &Tensor) -> Result<Tensor, OpError> {
    as_many("times", a, b)?;
    if let Device::Cuda(cuda) = device {
        return super::cuda::times(cuda, a, b);
    }
    let products = a.data().iter().zip(b.data()).map(|(a, b)| a * b);
    Ok(Tensor::new(a.shape(), memory::collected(GRADIENT, products)))
}
