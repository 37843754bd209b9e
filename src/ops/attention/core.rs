//! Softmax attention of one head over a block of queries; scores live in scratch memory only as long as the block.

use crate::device::Cpu;
use crate::device::simd::{self, multiversion};
use crate::ops::linear::{Matrix, matmul};

/// Queries of a block.
pub(super) const BLOCK: usize = 64;

/// Rows of one head in a matrix whose rows hold all heads.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub data: *const f32,
    pub stride: usize,
}

multiversion! {
    /// Turns scores `[rows][keys]` into unnormalised weights; writes each row's sum, the extra key's weight included, to `sums`,
    /// and the extra key's weight over `extra`.
    fn softmax_rows(scores: &mut [f32], keys: usize, sums: &mut [f32], extra: Option<&mut [f32]>) {
        let mut extra = extra;
        for (r, row) in scores.chunks_exact_mut(keys).enumerate() {
            let mut lanes = [f32::NEG_INFINITY; 16];
            let (whole, rest) = row.split_at(keys / 16 * 16);
            for v in whole.chunks_exact(16) {
                for i in 0..16 {
                    lanes[i] = lanes[i].max(v[i]);
                }
            }
            let mut top = rest.iter().chain(&lanes).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            if let Some(extra) = &extra {
                top = top.max(extra[r]);
            }
            let mut lanes = [0.0f32; 16];
            let (whole, rest) = row.split_at_mut(keys / 16 * 16);
            for v in whole.chunks_exact_mut(16) {
                for i in 0..16 {
                    v[i] = simd::exp(v[i] - top);
                    lanes[i] += v[i];
                }
            }
            let mut sum = 0.0;
            for v in rest {
                *v = simd::exp(*v - top);
                sum += *v;
            }
            if let Some(extra) = &mut extra {
                extra[r] = simd::exp(extra[r] - top);
                sum += extra[r];
            }
            sums[r] = sum + lanes.iter().sum::<f32>();
        }
    }
}

/// Softmax of each row of `data` `[rows][keys]`, in place.
pub(crate) fn softmax(cpu: &Cpu, data: &mut [f32], keys: usize) {
    cpu.chunks_mut(data, keys, |_, row| {
        let mut sum = [0.0];
        softmax_rows(cpu.isa(), row, keys, &mut sum, None);
        row.iter_mut().for_each(|v| *v /= sum[0]);
    });
}

/// `out = softmax(scale q kᵀ + bias) v` for `rows` queries of one head of `dim` channels. `bias` adds to the scores `[rows][keys]`
/// writes the logarithmic weight of an extra key, if there is one, for each query, and returns that key's value.
///
/// # Safety
/// `q`, `k`, `v` and `out` span their rows; nobody else touches `out`'s.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn attend<'a>(
    cpu: &Cpu,
    [rows, keys, dim]: [usize; 3],
    scale: f32,
    q: Rows,
    k: Rows,
    v: Rows,
    (out, out_stride): (*mut f32, usize),
    bias: impl FnOnce(&mut [f32], &mut [f32]) -> Option<&'a [f32]>,
) {
    let mut scores = cpu.take(rows * keys);
    let (mut sums, mut extra) = (vec![0.0; rows], vec![0.0; rows]);
    // SAFETY: the caller's rows.
    unsafe {
        let (a, b) = (Matrix { data: q.data, row: q.stride, column: 1 }, Matrix { data: k.data, row: 1, column: k.stride });
        matmul([rows, keys, dim], scores.as_mut_ptr(), keys, false, a, b);
    }
    scores.iter_mut().for_each(|s| *s *= scale);
    let value = bias(&mut scores, &mut extra);
    let weights = value.is_some().then_some(&mut extra[..]);
    softmax_rows(cpu.isa(), &mut scores, keys, &mut sums, weights);
    // SAFETY: the caller's rows.
    unsafe {
        let (a, b) = (Matrix { data: scores.as_ptr(), row: keys, column: 1 }, Matrix { data: v.data, row: v.stride, column: 1 });
        matmul([rows, dim, keys], out, out_stride, false, a, b);
        for r in 0..rows {
            let row = std::slice::from_raw_parts_mut(out.add(r * out_stride), dim);
            if let Some(value) = value {
                row.iter_mut().zip(value).for_each(|(o, v)| *o += extra[r] * v);
            }
            let inverse = 1.0 / sums[r];
            row.iter_mut().for_each(|o| *o *= inverse);
        }
    }
}
