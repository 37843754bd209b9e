//! The losses of a mask and the boundary map, with their gradients.
//!
//! One pass gives every term of a mask's loss, and the gradient of their weighted sum where it is wanted: Dice with squared denominators
//! and binary cross entropy (Li et al. 2024, as MONAI forms them), the boundary loss, and the plain Dice that a score is trained to predict. Values run in
//! float32, sums in float64 in a fixed order.

use crate::device::cpu::Shared;
use crate::device::simd::{self, multiversion};
use crate::device::{Buffer, Device};
use crate::tensor::{OpError, Tensor};

const OP: &str = "mask_loss";
/// Values of a unit of work.
const RUN: usize = 1 << 13;
/// Values summed in float32 before they join a float64 sum.
const SHORT: usize = 256;

/// Added to numerators and denominators of Dice.
pub const SMOOTH: f64 = 1e-5;
/// The paper's window of the boundary map, along d, h, w: in the axial plane.
pub const KERNEL: [usize; 3] = [5, 5, 1];

/// What a mask is compared with: a label of one item, its boundary map, its volume.
pub struct Target {
    label: Vec<f32>,
    boundary: Buffer,
    total: f64,
    size: [usize; 3],
    kernel: [usize; 3],
}

impl Target {
    /// `label` `[d, h, w]` of zeros and ones; `kernel` of the boundary map, odd.
    pub fn new(device: &Device, label: Vec<f32>, size: [usize; 3], kernel: [usize; 3]) -> Result<Target, OpError> {
        if label.len() != size.iter().product::<usize>() || label.is_empty() {
            return Err(OpError::Argument { op: OP, message: format!("a label of {} voxels, expected {size:?}", label.len()) });
        }
        check_kernel(kernel)?;
        let mut boundary = pool(device, &label, size, kernel);
        boundary.iter_mut().zip(&label).for_each(|(b, g)| *b = (g - *b).abs());
        let total = label.iter().map(|g| *g as f64).sum();
        Ok(Target { label, boundary, total, size, kernel })
    }

    /// The label.
    pub fn label(&self) -> &[f32] {
        &self.label
    }
}

/// How much each term of a mask's loss counts.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Of `Dice + cross entropy`.
    pub region: f64,
    /// Of the boundary loss.
    pub boundary: f64,
}

/// The terms of a mask's loss, not weighted.
#[derive(Clone, Copy, Debug)]
pub struct MaskLoss {
    /// `1 - Dice` with squared denominators.
    pub dice_squared: f64,
    /// Binary cross entropy, mean over voxels.
    pub cross_entropy: f64,
    /// Mean squared difference of the boundary maps of the probabilities and of the label.
    pub boundary: f64,
    /// Dice with plain denominators.
    pub dice: f64,
}

impl MaskLoss {
    /// The weighted sum.
    pub fn total(&self, terms: Terms) -> f64 {
        terms.region * (self.dice_squared + self.cross_entropy) + terms.boundary * self.boundary
    }
}

multiversion! {
    /// Probabilities of a run, and its sums: p g, p², p, cross entropy.
    fn forward_run(x: &[f32], g: &[f32], p: &mut [f32], sums: &mut [f64]) {
        for ((x, g), p) in x.chunks(SHORT).zip(g.chunks(SHORT)).zip(p.chunks_mut(SHORT)) {
            let n = x.len();
            let (g, p) = (&g[..n], &mut p[..n]);
            let mut entropy = [0.0f32; SHORT];
            for i in 0..n {
                let e = simd::exp(-x[i].abs());
                p[i] = (if x[i] >= 0.0 { 1.0 } else { e }) / (1.0 + e);
                entropy[i] = x[i].max(0.0) - x[i] * g[i] + simd::ln_1p(e);
            }
            sums[0] += simd::dot(p, g) as f64;
            sums[1] += simd::dot(p, p) as f64;
            sums[2] += simd::sum(p) as f64;
            sums[3] += simd::sum(&entropy[..n]) as f64;
        }
    }
}

multiversion! {
    /// From pooled probabilities `m` to the gradient with respect to `p - pool(p)`, in place, times `scale`; returns the summed squares.
    fn boundary_run(p: &[f32], target: &[f32], scale: f32, m: &mut [f32]) -> f64 {
        let mut total = 0.0;
        for ((p, target), m) in p.chunks(SHORT).zip(target.chunks(SHORT)).zip(m.chunks_mut(SHORT)) {
            let n = p.len();
            let (target, m) = (&target[..n], &mut m[..n]);
            let mut squares = [0.0f32; SHORT];
            for i in 0..n {
                let difference = p[i] - m[i];
                let off = difference.abs() - target[i];
                squares[i] = off * off;
                let sign = if difference > 0.0 { 1.0 } else if difference < 0.0 { -1.0 } else { 0.0 };
                m[i] = scale * off * sign;
            }
            total += simd::sum(&squares[..n]) as f64;
        }
        total
    }
}

multiversion! {
    /// The gradient of the logits: `(a g + b p + u - v) p (1 - p) + c (p - g)`, where `u - v` comes from the boundary.
    fn gradient_run(p: &[f32], g: &[f32], factors: [f32; 3], boundary: Option<(&[f32], &[f32])>, out: &mut [f32]) {
        let ([a, b, c], n) = (factors, out.len());
        let (p, g) = (&p[..n], &g[..n]);
        match boundary {
            Some((u, v)) => {
                let (u, v) = (&u[..n], &v[..n]);
                for i in 0..n {
                    out[i] = (a * g[i] + b * p[i] + u[i] - v[i]) * p[i] * (1.0 - p[i]) + c * (p[i] - g[i]);
                }
            }
            None => {
                for i in 0..n {
                    out[i] = (a * g[i] + b * p[i]) * p[i] * (1.0 - p[i]) + c * (p[i] - g[i]);
                }
            }
        }
    }
}

/// Every term of the loss of `logits` (as many as the target has voxels), and the gradient of their weighted sum into `gradient` where given.
pub fn mask_loss(
    device: &Device,
    logits: &[f32],
    target: &Target,
    terms: Terms,
    gradient: Option<&mut [f32]>,
) -> Result<MaskLoss, OpError> {
    let n = target.label.len();
    if logits.len() != n || gradient.as_ref().is_some_and(|g| g.len() != n) {
        return Err(OpError::Argument { op: OP, message: format!("{} logits for a target of {:?}", logits.len(), target.size) });
    }
    let cpu = device.cpu();
    let mut p = cpu.take(n);
    let mut partial = vec![0.0f64; n.div_ceil(RUN) * 4];
    let to = Shared::new(&mut p);
    cpu.chunks_mut(&mut partial, 4, |unit, sums| {
        let at = unit * RUN..((unit + 1) * RUN).min(n);
        // SAFETY: units own disjoint runs.
        let p = unsafe { to.slice(at.start, at.len()) };
        forward_run(cpu.isa(), &logits[at.clone()], &target.label[at], p, sums);
    });
    let sum = |i: usize| partial.iter().skip(i).step_by(4).sum::<f64>();
    let (both, squares, total, entropy) = (sum(0), sum(1), sum(2), sum(3));
    let dice = |total: f64| (2.0 * both + SMOOTH) / (total + SMOOTH);
    // The label is zeros and ones: its squares sum to its volume.
    let squared = squares + target.total;

    let scale = (2.0 * terms.boundary / n as f64) as f32;
    let mut slopes = pool(device, &p, target.size, target.kernel);
    let mut partial = vec![0.0f64; n.div_ceil(RUN)];
    let to = Shared::new(&mut slopes);
    cpu.chunks_mut(&mut partial, 1, |unit, sum| {
        let at = unit * RUN..((unit + 1) * RUN).min(n);
        // SAFETY: as above.
        let m = unsafe { to.slice(at.start, at.len()) };
        sum[0] = boundary_run(cpu.isa(), &p[at.clone()], &target.boundary[at], scale, m);
    });
    let loss = MaskLoss {
        dice_squared: 1.0 - dice(squared),
        cross_entropy: entropy / n as f64,
        boundary: partial.iter().sum::<f64>() / n as f64,
        dice: dice(total + target.total),
    };
    if let Some(out) = gradient {
        let pooled = (terms.boundary != 0.0).then(|| pool(device, &slopes, target.size, target.kernel));
        let factors = [
            -2.0 * terms.region / (squared + SMOOTH),
            2.0 * terms.region * (2.0 * both + SMOOTH) / (squared + SMOOTH).powi(2),
            terms.region / n as f64,
        ];
        let factors = factors.map(|f| f as f32);
        cpu.chunks_mut(out, RUN, |unit, out| {
            let at = unit * RUN..unit * RUN + out.len();
            let boundary = pooled.as_ref().map(|v| (&slopes[at.clone()], &v[at.clone()]));
            gradient_run(cpu.isa(), &p[at.clone()], &target.label[at], factors, boundary, out);
        });
    }
    Ok(loss)
}

fn check_kernel(kernel: [usize; 3]) -> Result<(), OpError> {
    if kernel.iter().all(|k| k % 2 == 1) {
        return Ok(());
    }
    let message = format!("kernel {kernel:?} must be odd along each axis");
    Err(OpError::Argument { op: "boundary_map", message })
}

/// Mean over a window around each voxel, zeros beyond the border counted: three sums along one axis each. Its own transpose.
fn pool(device: &Device, m: &[f32], size: [usize; 3], kernel: [usize; 3]) -> Buffer {
    let (cpu, [d, h, w]) = (device.cpu(), size);
    let scale = 1.0 / kernel.iter().product::<usize>() as f32;
    let near = |at: usize, edge: usize, kernel: usize| at.saturating_sub(kernel / 2)..(at + kernel / 2 + 1).min(edge);
    let mut planes = cpu.zeros(m.len());
    cpu.chunks_mut(&mut planes, h * w, |i, out| {
        for from in near(i, d, kernel[0]) {
            out.iter_mut().zip(&m[from * h * w..]).for_each(|(o, v)| *o += v);
        }
    });
    let mut out = cpu.zeros(m.len());
    cpu.chunks_mut(&mut out, h * w, |i, out| {
        let plane = &planes[i * h * w..][..h * w];
        for (j, row) in out.chunks_exact_mut(w).enumerate() {
            for from in near(j, h, kernel[1]) {
                row.iter_mut().zip(&plane[from * w..]).for_each(|(o, v)| *o += v);
            }
            if kernel[2] > 1 {
                let line = row.to_vec();
                row.iter_mut().enumerate().for_each(|(k, v)| *v = line[near(k, w, kernel[2])].iter().sum());
            }
            row.iter_mut().for_each(|v| *v *= scale);
        }
    });
    out
}

/// `|m - avgpool(m)|` of each channel map of `m` `[n, c, d, h, w]`: odd kernel, stride 1, zero padding counted in the mean.
pub fn boundary_map(device: &Device, m: &Tensor, kernel: [usize; 3]) -> Result<Tensor, OpError> {
    let [.., d, h, w] = m.map5("boundary_map", "m")?;
    check_kernel(kernel)?;
    let mut out = Vec::with_capacity(m.len());
    for map in m.data().chunks_exact((d * h * w).max(1)) {
        let pooled = pool(device, map, [d, h, w], kernel);
        out.extend(map.iter().zip(pooled.iter()).map(|(v, p)| (v - p).abs()));
    }
    Ok(Tensor::new(m.shape(), out))
}

/// The gradient of [`boundary_map`]: with `u = dy sign(m - avgpool(m))`, `u - avgpool(u)`. Zero where `m` equals its average.
pub fn boundary_map_gradient(device: &Device, m: &Tensor, kernel: [usize; 3], dy: &Tensor) -> Result<Tensor, OpError> {
    let [.., d, h, w] = m.map5("boundary_map", "m")?;
    check_kernel(kernel)?;
    dy.expect("boundary_map gradient", "dy", m.shape())?;
    let mut out = Vec::with_capacity(m.len());
    let voxels = (d * h * w).max(1);
    for (map, dy) in m.data().chunks_exact(voxels).zip(dy.data().chunks_exact(voxels)) {
        let pooled = pool(device, map, [d, h, w], kernel);
        let sign = |v: f32| {
            if v > 0.0 {
                1.0
            } else if v < 0.0 {
                -1.0
            } else {
                0.0
            }
        };
        let u: Vec<f32> = map.iter().zip(pooled.iter()).zip(dy).map(|((v, p), g)| g * sign(v - p)).collect();
        let back = pool(device, &u, [d, h, w], kernel);
        out.extend(u.iter().zip(back.iter()).map(|(u, b)| u - b));
    }
    Ok(Tensor::new(m.shape(), out))
}
