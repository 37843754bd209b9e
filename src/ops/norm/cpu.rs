//! Norms on the CPU.

use super::{ChannelNorm, Sums};
use crate::device::profile::OpCost;
use crate::device::simd::{self, Values, dispatch, multiversion};
use crate::device::{Cpu, Isa};
use crate::microkernel::gelu::gelu_run;
use crate::microkernel::item_norm::ItemNorm;
use crate::tensor::Tensor;

/// Rows of one unit of work.
const ROWS: usize = 512;

pub fn sums(cpu: &Cpu, x: &Tensor) -> Sums {
    let (n, c) = (x.shape()[0], x.channels());
    let rows = x.rows() / n;
    let tiles = rows.div_ceil(ROWS);
    let mut partial = cpu.zeros_f64(n * tiles * c * 2);
    cpu.chunks_mut(&mut partial, c * 2, |unit, to| {
        let (item, tile) = (unit / tiles, unit % tiles);
        let count = ROWS.min(rows - tile * ROWS);
        let part = &x.data()[(item * rows + tile * ROWS) * c..][..count * c];
        add_row(cpu.isa(), part, c, c, to);
    });
    Sums::reduce(&partial, n, c, rows as f64)
}

multiversion! {
    /// Adds a row's values, `count` channels every `stride` floats, to `sums`
    /// `[count][value, square]`.
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
    let _op = cpu.op("norm", || OpCost {
        problem: format!("{:?}", x.shape()),
        flops: (4 * x.len()) as f64,
        floats: x.len() * (2 + usize::from(add.is_some())),
    });
    let mut out = cpu.alloc(x.len());
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

/// Layer norm of each row, in place, for channels that fill whole registers. Two passes, because
/// the mean must be subtracted before the variance is summed.
///
/// # Safety
/// The processor has the instruction set of `S`.
#[inline(always)]
unsafe fn layer_norm_in<S: Values>(data: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    let c = weight.len();
    assert!(c.is_multiple_of(S::LANES) && bias.len() == c);
    for row in data.chunks_exact_mut(c) {
        let row = row.as_mut_ptr();
        // SAFETY: the caller guarantees the instruction set; rows, weight and bias have `c` values.
        unsafe {
            let registers = (0..c).step_by(S::LANES);
            let mut sum = S::zero();
            for i in registers.clone() {
                sum = S::add(sum, S::load(row.add(i)));
            }
            let mean = S::splat(&(S::total(sum) / c as f32));
            let mut squares = S::zero();
            for i in registers.clone() {
                let v = S::sub(S::load(row.add(i)), mean);
                squares = S::mul_add(v, v, squares);
            }
            let scale = S::splat(&(1.0 / (S::total(squares) / c as f32 + eps).sqrt()));
            for i in registers {
                let v = S::mul(S::sub(S::load(row.add(i)), mean), scale);
                S::store(
                    row.add(i),
                    S::mul_add(v, S::load(weight.as_ptr().add(i)), S::load(bias.as_ptr().add(i))),
                );
            }
        }
    }
}

/// [`layer_norm_in`] the registers of an instruction set.
fn layer_norm_whole(isa: Isa, data: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    dispatch! { isa, S: Values, {
        /// # Safety
        /// The processor has the instruction set of `S`.
        unsafe fn compiled(data: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
            // SAFETY: guaranteed by the caller.
            unsafe { layer_norm_in::<S>(data, weight, bias, eps) }
        }
    } =>
    // SAFETY: the Isa was made by asking the processor.
    unsafe { compiled(data, weight, bias, eps) } }
}

/// Layer norm for any number of channels.
fn layer_norm_plainly(data: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    let c = weight.len();
    for row in data.chunks_exact_mut(c) {
        let mean = simd::sum(row) / c as f32;
        row.iter_mut().for_each(|v| *v -= mean);
        let scale = 1.0 / (simd::dot(row, row) / c as f32 + eps).sqrt();
        row.iter_mut().zip(weight.iter().zip(bias)).for_each(|(v, (w, b))| *v = *v * scale * w + b);
    }
}

/// Layer norm of each row of `data` `[rows][c]`, in place.
pub(crate) fn layer_norm_rows(
    isa: Isa,
    data: &mut [f32],
    weight: &[f32],
    bias: &[f32],
    eps: f32,
    gelu: bool,
) {
    // The instruction set whose registers the channels fill.
    let whole =
        [isa, Isa::PORTABLE].into_iter().find(|isa| weight.len().is_multiple_of(simd::lanes(*isa)));
    // So that GELU finds them in the first-level cache.
    for data in data.chunks_mut(weight.len() * (2048 / weight.len()).max(1)) {
        match whole {
            Some(isa) => layer_norm_whole(isa, data, weight, bias, eps),
            None => layer_norm_plainly(data, weight, bias, eps),
        }
        if gelu {
            gelu_run(isa, data);
        }
    }
}

pub fn layer_norm(
    cpu: &Cpu,
    x: &Tensor,
    weight: &[f32],
    bias: &[f32],
    eps: f32,
    gelu: bool,
) -> Tensor {
    let c = x.channels();
    let _op = cpu.op("layer norm", || OpCost {
        problem: format!("{} rows of {c}", x.rows()),
        flops: (8 * x.len()) as f64,
        floats: 2 * x.len(),
    });
    let rows = x.rows().div_ceil(cpu.threads() * 4).clamp(1, 64);
    let mut out = cpu.alloc(x.len());
    cpu.chunks_mut(&mut out, rows * c, |unit, out| {
        out.copy_from_slice(&x.data()[unit * rows * c..][..out.len()]);
        layer_norm_rows(cpu.isa(), out, weight, bias, eps, gelu);
    });
    Tensor::from_buffer(x.shape(), out)
}
