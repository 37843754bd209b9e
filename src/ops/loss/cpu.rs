//! Losses on the CPU. Values run in float32, sums in float64 in a fixed order.

use super::{SMOOTH, Target, Terms};
use crate::device::simd::{self, multiversion};
use crate::device::{Buffer, Cpu, DisjointWriter};

/// Values of a unit of work.
const RUN: usize = 1 << 13;
/// Values summed in float32 before they are added to a float64 sum.
const SHORT: usize = 256;

multiversion! {
    /// Probabilities of a run, and its sums: p g, p², p, cross entropy.
    fn forward_run(x: &[f32], g: &[f32], p: &mut [f32], sums: &mut [f64]) {
        for ((x, g), p) in x.chunks(SHORT).zip(g.chunks(SHORT)).zip(p.chunks_mut(SHORT)) {
            let n = x.len();
            let (g, p) = (&g[..n], &mut p[..n]);
            let mut entropy = [0.0f32; SHORT];
            for i in 0..n {
                let e = simd::exp::<FUSED>(-x[i].abs());
                p[i] = (if x[i] >= 0.0 { 1.0 } else { e }) / (1.0 + e);
                entropy[i] = x[i].max(0.0) - x[i] * g[i] + simd::ln_1p::<FUSED>(e);
            }
            sums[0] += simd::dot(p, g) as f64;
            sums[1] += simd::dot(p, p) as f64;
            sums[2] += simd::sum(p) as f64;
            sums[3] += simd::sum(&entropy[..n]) as f64;
        }
    }
}

multiversion! {
    /// From pooled probabilities `m` to the gradient with respect to `p - pool(p)`, in place, times
    /// `scale`; returns the summed squares.
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
                let sign = if difference > 0.0 {
                    1.0
                } else if difference < 0.0 {
                    -1.0
                } else {
                    0.0
                };
                m[i] = scale * off * sign;
            }
            total += simd::sum(&squares[..n]) as f64;
        }
        total
    }
}

multiversion! {
    /// The gradient of the logits: `(a g + b p + u - v) p (1 - p) + c (p - g)`, where `u - v` comes
    /// from the boundary.
    fn gradient_run(
        p: &[f32],
        g: &[f32],
        factors: [f32; 3],
        boundary: Option<(&[f32], &[f32])>,
        out: &mut [f32],
    ) {
        let ([a, b, c], n) = (factors, out.len());
        let (p, g) = (&p[..n], &g[..n]);
        match boundary {
            Some((u, v)) => {
                let (u, v) = (&u[..n], &v[..n]);
                for i in 0..n {
                    out[i] = (a * g[i] + b * p[i] + u[i] - v[i]) * p[i] * (1.0 - p[i])
                        + c * (p[i] - g[i]);
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

/// A mask's sums, and the gradient of its loss times `factor` in `gradient` if given.
pub fn mask_loss(
    cpu: &Cpu,
    logits: &[f32],
    target: &Target,
    terms: Terms,
    factor: f32,
    gradient: Option<&mut [f32]>,
) -> [f64; 5] {
    let (n, label, boundary) = (logits.len(), target.label.data(), target.boundary.data());
    let mut p = cpu.alloc(n);
    let mut partial = cpu.zeros_f64(n.div_ceil(RUN) * 4);
    let to = DisjointWriter::new(&mut p);
    cpu.chunks_mut(&mut partial, 4, |unit, sums| {
        let at = unit * RUN..((unit + 1) * RUN).min(n);
        // SAFETY: units own disjoint runs.
        let p = unsafe { to.slice(at.start, at.len()) };
        forward_run(cpu.isa(), &logits[at.clone()], &label[at], p, sums);
    });
    let sum = |i: usize| partial.iter().skip(i).step_by(4).sum::<f64>();
    let (both, squares, total, entropy) = (sum(0), sum(1), sum(2), sum(3));
    let scale = (2.0 * terms.boundary / n as f64) as f32 * factor;
    let mut slopes = pool(cpu, &p, target.size, target.kernel);
    let mut partial = cpu.zeros_f64(n.div_ceil(RUN));
    let to = DisjointWriter::new(&mut slopes);
    cpu.chunks_mut(&mut partial, 1, |unit, sum| {
        let at = unit * RUN..((unit + 1) * RUN).min(n);
        // SAFETY: as above.
        let m = unsafe { to.slice(at.start, at.len()) };
        sum[0] = boundary_run(cpu.isa(), &p[at.clone()], &boundary[at], scale, m);
    });
    let sums = [both, squares, total, entropy, partial.iter().sum()];
    if let Some(out) = gradient {
        let pooled =
            (terms.boundary != 0.0).then(|| pool(cpu, &slopes, target.size, target.kernel));
        // The label is zeros and ones: its squares sum to its volume.
        let squared = squares + target.volume;
        let factors = [
            -2.0 * terms.region / (squared + SMOOTH),
            2.0 * terms.region * (2.0 * both + SMOOTH) / (squared + SMOOTH).powi(2),
            terms.region / n as f64,
        ];
        let factors = factors.map(|f| f as f32 * factor);
        cpu.chunks_mut(out, RUN, |unit, out| {
            let at = unit * RUN..unit * RUN + out.len();
            let boundary = pooled.as_ref().map(|v| (&slopes[at.clone()], &v[at.clone()]));
            gradient_run(cpu.isa(), &p[at.clone()], &label[at], factors, boundary, out);
        });
    }
    sums
}

/// The mean over a window around each voxel, zeros beyond the border counted: one sum along each of
/// the three axes. It is its own transpose.
pub fn pool(cpu: &Cpu, m: &[f32], size: [usize; 3], kernel: [usize; 3]) -> Buffer {
    let [d, h, w] = size;
    let scale = 1.0 / kernel.iter().product::<usize>() as f32;
    let near = |at: usize, edge: usize, kernel: usize| {
        at.saturating_sub(kernel / 2)..(at + kernel / 2 + 1).min(edge)
    };
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
                row.iter_mut()
                    .enumerate()
                    .for_each(|(k, v)| *v = line[near(k, w, kernel[2])].iter().sum());
            }
            row.iter_mut().for_each(|v| *v *= scale);
        }
    });
    out
}

/// The weighted cross entropy of a mask, whose gradient times `factor` is added to `gradient`.
pub fn emphasis(
    logits: &[f32],
    target: &Target,
    weights: &[f32],
    [share, factor]: [f32; 2],
    gradient: &mut [f32],
) -> f64 {
    let mut sum = 0.0;
    let voxels = logits.iter().zip(gradient).zip(weights).zip(target.label());
    for (((x, g), w), y) in voxels.filter(|((_, w), _)| **w > 0.0) {
        let p = 1.0 / (1.0 + (-x).exp());
        // log(1 + exp(-|x|)) + max(x, 0) - x y
        sum += (w * share) as f64 * ((-x.abs()).exp().ln_1p() + x.max(0.0) - x * y) as f64;
        *g += w * share * factor * (p - y);
    }
    sum
}
