//! Gradients of the norms.

use super::ChannelNorm;
use crate::device::simd::{self, multiversion};
use crate::device::{Device, DisjointWriter};
use crate::memory;
use crate::microkernel::item_norm::ItemNorm;
use crate::ops::reduce::{check_so_far, onto};
use crate::tensor::{GRADIENT, OpError, Tensor};

/// Voxels of a unit of work.
const ROWS: usize = 1024;
/// Voxels summed in float32 before they are added to a float64 sum.
const RUN: usize = 32;

/// What the gradient of one item's norm needs besides [`ItemNorm`].
struct ItemGrad {
    norm: ItemNorm,
    deviation: Vec<f32>,
    offset: Vec<f32>,
}

impl ItemGrad {
    fn new(norm: &ChannelNorm, n: usize, c: usize) -> ItemGrad {
        let part = &norm.deviation.data()[n * c * 2..][..c * 2];
        let column = |i: usize| part.iter().skip(i).step_by(2).copied().collect();
        ItemGrad { norm: norm.item(n, c), deviation: column(0), offset: column(1) }
    }
}

multiversion! {
    /// Adds `Σ dz` and `Σ dz x̂` per channel to `sums` `[2][c]`, `dz` being the gradient before the
    /// activation.
    fn reduce(x: &[f32], dy: &[f32], g: &ItemGrad, sums: &mut [f64]) {
        let c = g.deviation.len();
        let (mean, scale, shift) = (&g.norm.mean[..c], &g.norm.scale[..c], &g.norm.shift[..c]);
        let (deviation, offset) = (&g.deviation[..c], &g.offset[..c]);
        let (mut some, mut other) = (vec![0.0f32; c], vec![0.0f32; c]);
        for (x, dy) in x.chunks(RUN * c).zip(dy.chunks(RUN * c)) {
            some.fill(0.0);
            other.fill(0.0);
            let (some, other) = (&mut some[..c], &mut other[..c]);
            for (x, dy) in x.chunks_exact(c).zip(dy.chunks_exact(c)) {
                for i in 0..c {
                    let z = (x[i] - mean[i]) * scale[i] + shift[i];
                    let dz = if z >= 0.0 { dy[i] } else { dy[i] * g.norm.slope };
                    some[i] += dz;
                    other[i] += dz * ((x[i] - mean[i]) * deviation[i] + offset[i]);
                }
            }
            let (first, second) = sums.split_at_mut(c);
            for i in 0..c {
                first[i] += some[i] as f64;
                second[i] += other[i] as f64;
            }
        }
    }
}

multiversion! {
    /// `dx = scale (dz - mean(dz) - x̂ mean(dz x̂))`, over `dy`.
    fn spread(x: &[f32], dy: &mut [f32], g: &ItemGrad, means: &[f32]) {
        let c = g.deviation.len();
        let (mean, scale, shift) = (&g.norm.mean[..c], &g.norm.scale[..c], &g.norm.shift[..c]);
        let (deviation, offset) = (&g.deviation[..c], &g.offset[..c]);
        let (first, second) = (&means[..c], &means[c..][..c]);
        for (x, dy) in x.chunks_exact(c).zip(dy.chunks_exact_mut(c)) {
            for i in 0..c {
                let z = (x[i] - mean[i]) * scale[i] + shift[i];
                let dz = if z >= 0.0 { dy[i] } else { dy[i] * g.norm.slope };
                let standard = (x[i] - mean[i]) * deviation[i] + offset[i];
                dy[i] = scale[i] * (dz - first[i] - standard * second[i]);
            }
        }
    }
}

/// The gradients of an instance norm with its leaky ReLU: of the map `x` `[n, ..., c]`, of the
/// weight and of the bias `[c]`, from that of the activated map, `dy`.
pub fn instance_norm(
    device: &Device,
    x: &Tensor,
    norm: &ChannelNorm,
    dy: Tensor,
) -> Result<(Tensor, Tensor, Tensor), OpError> {
    const OP: &str = "instance_norm gradient";
    let (n, c) = (x.shape().first().copied().unwrap_or(0), x.channels());
    norm.check(OP, n, c)?;
    dy.expect_shape(OP, "dy", x.shape())?;
    let cpu = match device {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(cuda) => return super::cuda::instance_norm_gradient(cuda, x, norm, &dy),
    };
    let rows = x.rows() / n;
    let mut dx = match dy.into_buffer() {
        Ok(buffer) => buffer,
        Err(dy) => {
            let mut copy = cpu.alloc(dy.len());
            copy.copy_from_slice(dy.data());
            copy
        }
    };
    let (mut weight, mut bias) = (vec![0.0f64; c], vec![0.0f64; c]);
    for item in 0..n {
        let g = ItemGrad::new(norm, item, c);
        let part = item * rows * c..(item + 1) * rows * c;
        let (x, dx) = (&x.data()[part.clone()], &mut dx[part]);
        let mut partial = cpu.zeros_f64(rows.div_ceil(ROWS) * 2 * c);
        let from = &*dx;
        cpu.chunks_mut(&mut partial, 2 * c, |unit, sums| {
            let at = unit * ROWS * c..((unit + 1) * ROWS).min(rows) * c;
            reduce(cpu.isa(), &x[at.clone()], &from[at], &g, sums);
        });
        let mut sums = vec![0.0f64; 2 * c];
        for part in partial.chunks_exact(2 * c) {
            sums.iter_mut().zip(part).for_each(|(s, p)| *s += p);
        }
        bias.iter_mut().zip(&sums[..c]).for_each(|(b, s)| *b += s);
        weight.iter_mut().zip(&sums[c..]).for_each(|(w, s)| *w += s);
        let means: Vec<f32> = sums.iter().map(|s| (s / rows as f64) as f32).collect();
        cpu.chunks_mut(dx, ROWS * c, |unit, dx| {
            spread(cpu.isa(), &x[unit * ROWS * c..][..dx.len()], dx, &g, &means)
        });
    }
    let narrow = |v: Vec<f64>| v.into_iter().map(|v| v as f32).collect::<Vec<f32>>().into();
    Ok((Tensor::from_buffer(x.shape(), dx), narrow(weight), narrow(bias)))
}

multiversion! {
    /// Layer norm's gradient for rows of `x`; adds to `sums` `[2][c]` (weight, bias).
    fn layer_norm_rows(
        x: &[f32],
        dy: &[f32],
        weight: &[f32],
        bias: &[f32],
        eps: f32,
        gelu: bool,
        dx: &mut [f32],
        sums: &mut [f32],
    ) {
        let c = weight.len();
        let bias = &bias[..c];
        let (mut standard, mut slope) = (vec![0.0f32; c], vec![0.0f32; c]);
        let (dw, db) = sums.split_at_mut(c);
        let (dw, db) = (&mut dw[..c], &mut db[..c]);
        for ((x, dy), dx) in x.chunks_exact(c).zip(dy.chunks_exact(c)).zip(dx.chunks_exact_mut(c)) {
            let (standard, slope) = (&mut standard[..c], &mut slope[..c]);
            let mean = simd::sum(x) / c as f32;
            for i in 0..c {
                standard[i] = x[i] - mean;
            }
            let variance = simd::dot(standard, standard) / c as f32;
            let deviation = 1.0 / (variance + eps).sqrt();
            slope.copy_from_slice(&dy[..c]);
            for v in standard.iter_mut() {
                *v *= deviation;
            }
            if gelu {
                for i in 0..c {
                    slope[i] *= simd::gelu_slope::<FUSED>(standard[i] * weight[i] + bias[i]);
                }
            }
            for i in 0..c {
                dw[i] += slope[i] * standard[i];
                db[i] += slope[i];
                slope[i] *= weight[i];
            }
            let first = simd::sum(slope) / c as f32;
            let second = simd::dot(slope, standard) / c as f32;
            for i in 0..c {
                dx[i] = deviation * (slope[i] - first - standard[i] * second);
            }
        }
    }
}

/// The gradients of [`layer_norm`](super::layer_norm): of `x`, weight and bias.
pub fn layer_norm(
    device: &Device,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f32,
    gelu: bool,
    dy: &Tensor,
) -> Result<(Tensor, Tensor, Tensor), OpError> {
    layer_norm_onto(device, x, (weight, bias, eps), gelu, dy, None)
}

/// The gradients that [`layer_norm`] computes, that of `x` as a sum with its gradient so far, of as
/// many values, if there is one.
pub fn layer_norm_onto(
    device: &Device,
    x: &Tensor,
    (weight, bias, eps): (&Tensor, &Tensor, f32),
    gelu: bool,
    dy: &Tensor,
    so_far: Option<&Tensor>,
) -> Result<(Tensor, Tensor, Tensor), OpError> {
    const OP: &str = "layer_norm gradient";
    let (c, rows) = (x.channels(), x.rows());
    weight.expect_shape(OP, "weight", &[c])?;
    bias.expect_shape(OP, "bias", &[c])?;
    if dy.len() != x.len() || x.is_empty() {
        return Err(dy.shape_error(OP, "dy", format!("{:?}", x.shape())));
    }
    check_so_far(OP, so_far, x.len())?;
    let cpu = match device {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(cuda) => {
            let norm = (weight, bias, eps);
            return super::cuda::layer_norm_gradient(cuda, x, norm, gelu, dy, so_far);
        }
    };
    let each = rows.div_ceil(64).max(16);
    let units = rows.div_ceil(each);
    let mut dx = cpu.alloc(x.len());
    let mut partial: Vec<f32> = memory::zeroed(GRADIENT, units * 2 * c);
    let to = DisjointWriter::new(&mut dx);
    cpu.chunks_mut(&mut partial, 2 * c, |unit, sums| {
        let at = unit * each * c..((unit + 1) * each).min(rows) * c;
        // SAFETY: units own disjoint rows.
        let dx = unsafe { to.slice(at.start, at.len()) };
        layer_norm_rows(
            cpu.isa(),
            &x.data()[at.clone()],
            &dy.data()[at],
            weight.data(),
            bias.data(),
            eps,
            gelu,
            dx,
            sums,
        );
    });
    let sum =
        |i: usize| partial.iter().skip(i).step_by(2 * c).map(|v| *v as f64).sum::<f64>() as f32;
    let column = |first: usize| (0..c).map(|i| sum(first + i)).collect::<Vec<f32>>().into();
    let dx = onto(cpu, so_far, Tensor::from_buffer(x.shape(), dx))?;
    Ok((dx, column(0), column(c)))
}
