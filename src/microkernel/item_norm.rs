//! The norm of one item, arranged for loops over channels.

use crate::device::simd;

/// The norm of one item, one slice per coefficient, as loops over channels use it.
pub(crate) struct ItemNorm {
    pub(crate) mean: Vec<f32>,
    pub(crate) scale: Vec<f32>,
    pub(crate) shift: Vec<f32>,
    pub(crate) slope: f32,
}

impl ItemNorm {
    pub(crate) fn channels(&self) -> usize {
        self.mean.len()
    }

    /// Writes the norm of `x`, channels from `c0` on, to `out`.
    #[inline(always)]
    pub(crate) fn run<const FUSED: bool>(&self, x: &[f32], c0: usize, out: &mut [f32]) {
        let n = out.len();
        let (x, mean, scale, shift) =
            (&x[..n], &self.mean[c0..][..n], &self.scale[c0..][..n], &self.shift[c0..][..n]);
        for i in 0..n {
            let y = simd::mul_add::<FUSED>(x[i] - mean[i], scale[i], shift[i]);
            out[i] = if y >= 0.0 { y } else { y * self.slope };
        }
    }
}
