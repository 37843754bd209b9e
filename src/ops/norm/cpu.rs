//! Norms on the CPU.

use super::{ChannelNorm, ItemNorm, Sums};
use crate::device::Cpu;
use crate::device::profile::Work;
use crate::device::simd::{self, multiversion};
use crate::tensor::Tensor;

/// Rows of one unit of work.
const ROWS: usize = 512;

pub fn sums(cpu: &Cpu, x: &Tensor) -> Sums {
    let (n, c) = (x.shape()[0], x.channels());
    let rows = x.rows() / n;
    let tiles = rows.div_ceil(ROWS);
    let mut partial = cpu.wide_zeros(n * tiles * c * 2);
    cpu.chunks_mut(&mut partial, c * 2, |unit, to| {
        let (item, tile) = (unit / tiles, unit % tiles);
        let count = ROWS.min(rows - tile * ROWS);
        let part = &x.data()[(item * rows + tile * ROWS) * c..][..count * c];
        add_row(cpu.isa(), part, c, c, to);
    });
    Sums::reduce(&partial, n, c, rows as f64)
}

multiversion! {
    /// Adds a row's values, every `stride` floats `count` channels, to `sums` `[count][value, square]`.
    pub(crate) fn add_row(row: &[f32], count: usize, stride: usize, sums: &mut [f64]) {
        for c0 in (0..count).step_by(16) {
            let n = (count - c0).min(16);
            let (mut s, mut q) = ([0.0f64; 16], [0.0f64; 16]);
            if n == 16 {
                for v in row[c0..].chunks(stride) {
                    let v: &[f32; 16] = v[..16].try_into().expect("a slice of 16");
                    for (i, v) in v.iter().enumerate() {
                        let v = *v as f64;
                        s[i] += v;
                        q[i] += v * v;
                    }
                }
            } else {
                for v in row[c0..].chunks(stride) {
                    for (i, v) in v[..n].iter().enumerate() {
                        s[i] += *v as f64;
                        q[i] += *v as f64 * *v as f64;
                    }
                }
            }
            for i in 0..n {
                sums[(c0 + i) * 2] += s[i];
                sums[(c0 + i) * 2 + 1] += q[i];
            }
        }
    }
}

multiversion! {
    fn apply_rows(x: &[f32], add: Option<&[f32]>, norm: &ItemNorm, c: usize, out: &mut [f32]) {
        for (k, (out, x)) in out.chunks_exact_mut(c).zip(x.chunks_exact(c)).enumerate() {
            norm.run::<FUSED>(x, 0, out);
            if let Some(add) = add {
                let add = &add[k * c..][..c];
                for q in 0..c {
                    out[q] += add[q];
                }
            }
        }
    }
}

pub fn apply(cpu: &Cpu, x: &Tensor, norm: &ChannelNorm, add: Option<&Tensor>) -> Tensor {
    let (n, c) = (x.shape()[0], x.channels());
    let rows = x.rows() / n.max(1);
    let _op = cpu.op("norm", || Work {
        problem: format!("{:?}", x.shape()),
        flops: (4 * x.len()) as f64,
        floats: x.len() * (2 + usize::from(add.is_some())),
    });
    let mut out = cpu.take(x.len());
    for item in 0..n {
        let norm = norm.item(item, c);
        let part = item * rows * c..(item + 1) * rows * c;
        let (from, add) = (&x.data()[part.clone()], add.map(|a| &a.data()[part.clone()]));
        cpu.chunks_mut(&mut out[part], ROWS * c, |unit, out| {
            let at = unit * ROWS * c;
            let add = add.map(|a| &a[at..][..out.len()]);
            apply_rows(cpu.isa(), &from[at..][..out.len()], add, &norm, c, out);
        });
    }
    Tensor::from_buffer(x.shape(), out)
}

#[inline(always)]
fn layer_norm_row<const FUSED: bool>(row: &mut [f32], weight: &[f32], bias: &[f32], eps: f32, gelu: bool) {
    let c = row.len();
    // Two passes in sixteen running sums: exact enough in float32, and it vectorises.
    let mut lanes = [0.0f32; 16];
    let (whole, rest) = row.split_at(c / 16 * 16);
    for v in whole.chunks_exact(16) {
        for i in 0..16 {
            lanes[i] += v[i];
        }
    }
    let mean = (lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()) / c as f32;
    let mut lanes = [0.0f32; 16];
    for v in whole.chunks_exact(16) {
        for i in 0..16 {
            lanes[i] = simd::mul_add::<FUSED>(v[i] - mean, v[i] - mean, lanes[i]);
        }
    }
    let variance = (lanes.iter().sum::<f32>() + rest.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>()) / c as f32;
    let scale = 1.0 / (variance + eps).sqrt();
    for i in 0..c {
        row[i] = simd::mul_add::<FUSED>((row[i] - mean) * scale, weight[i], bias[i]);
    }
    if gelu {
        for v in row.iter_mut() {
            *v = simd::gelu::<FUSED>(*v);
        }
    }
}

/// Rows of a length that the compiler knows.
#[inline(always)]
fn layer_norm_all<const FUSED: bool, const C: usize>(data: &mut [f32], weight: &[f32], bias: &[f32], eps: f32, gelu: bool) {
    for row in data.as_chunks_mut::<C>().0 {
        layer_norm_row::<FUSED>(row, &weight[..C], &bias[..C], eps, gelu);
    }
}

multiversion! {
    /// Layer norm of each row of `data` `[rows][c]`, in place.
    pub(crate) fn layer_norm_rows(data: &mut [f32], weight: &[f32], bias: &[f32], eps: f32, gelu: bool) {
        match weight.len() {
            32 => layer_norm_all::<FUSED, 32>(data, weight, bias, eps, gelu),
            64 => layer_norm_all::<FUSED, 64>(data, weight, bias, eps, gelu),
            128 => layer_norm_all::<FUSED, 128>(data, weight, bias, eps, gelu),
            c => {
                for row in data.chunks_exact_mut(c) {
                    layer_norm_row::<FUSED>(row, &weight[..c], &bias[..c], eps, gelu);
                }
            }
        }
    }
}

pub fn layer_norm(cpu: &Cpu, x: &Tensor, weight: &[f32], bias: &[f32], eps: f32, gelu: bool) -> Tensor {
    let c = x.channels();
    let _op =
        cpu.op("layer norm", || Work { problem: format!("{} rows of {c}", x.rows()), flops: (8 * x.len()) as f64, floats: 2 * x.len() });
    let rows = x.rows().div_ceil(cpu.threads() * 4).clamp(1, 64);
    let mut out = cpu.take(x.len());
    cpu.chunks_mut(&mut out, rows * c, |unit, out| {
        out.copy_from_slice(&x.data()[unit * rows * c..][..out.len()]);
        layer_norm_rows(cpu.isa(), out, weight, bias, eps, gelu);
    });
    Tensor::from_buffer(x.shape(), out)
}
