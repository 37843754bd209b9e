//! Softmax of whole rows, and rows of one head.

use crate::device::Cpu;
use crate::device::simd::{self, multiversion};

/// Rows of one head in a matrix whose rows hold all heads.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub data: *const f32,
    pub stride: usize,
}

multiversion! {
    /// Turns scores `[rows][keys]` into unnormalised weights; writes each row's sum, the extra
    /// key's weight included, to `sums`, and the extra key's weight over `extra`.
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
            let mut row_max = rest.iter().chain(&lanes).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            if let Some(extra) = &extra {
                row_max = row_max.max(extra[r]);
            }
            let mut lanes = [0.0f32; 16];
            let (whole, rest) = row.split_at_mut(keys / 16 * 16);
            for v in whole.chunks_exact_mut(16) {
                for i in 0..16 {
                    v[i] = simd::exp::<FUSED>(v[i] - row_max);
                    lanes[i] += v[i];
                }
            }
            let mut sum = 0.0;
            for v in rest {
                *v = simd::exp::<FUSED>(*v - row_max);
                sum += *v;
            }
            if let Some(extra) = &mut extra {
                extra[r] = simd::exp::<FUSED>(extra[r] - row_max);
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
