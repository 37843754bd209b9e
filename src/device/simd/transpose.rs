//! Transposing rows into columns.

use super::{Values, dispatch};
use crate::device::Isa;

/// Writes the columns of `from`, 16 rows of 16 values `stride` apart, as rows of `to`, `to_stride`
/// apart.
pub fn transpose16(isa: Isa, from: &[f32], stride: usize, to: &mut [f32], to_stride: usize) {
    let (from, to) = (&from[..15 * stride + 16], &mut to[..15 * to_stride + 16]);
    let (from, to) = (from.as_ptr(), to.as_mut_ptr());
    dispatch! { isa, S: Values, {
        /// # Safety
        /// As [`Values::transpose16`], of the processor too.
        unsafe fn compiled(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
            // SAFETY: guaranteed by the caller.
            unsafe { S::transpose16(from, stride, to, to_stride) }
        }
    } =>
    // SAFETY: the Isa was made by asking the processor; both sides were just cut to 16 rows.
    unsafe { compiled(from, stride, to, to_stride) } }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_rows_become_columns() {
        let from: Vec<f32> = (0..16 * 20).map(|v| v as f32).collect();
        for isa in Isa::available() {
            let mut to = vec![-1.0; 16 * 17];
            transpose16(isa, &from, 20, &mut to, 17);
            for (at, v) in to.iter().enumerate() {
                let (c, r) = (at / 17, at % 17);
                let expected = if r < 16 { (r * 20 + c) as f32 } else { -1.0 };
                assert_eq!(*v, expected, "{isa}, column {c}, row {r}");
            }
        }
    }
}
