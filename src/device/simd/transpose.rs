//! Turning rows into columns.

use crate::device::Isa;
#[cfg(target_arch = "x86_64")]
use crate::device::{Level, features};

/// Writes the columns of `from`, 16 rows of 16 values `stride` apart, as rows of `to`, `to_stride`
/// apart.
pub fn transpose16(isa: Isa, from: &[f32], stride: usize, to: &mut [f32], to_stride: usize) {
    let (from, to) = (&from[..15 * stride + 16], &mut to[..15 * to_stride + 16]);
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Avx512 {
        // SAFETY: the Isa was made by asking the processor; both sides were just cut to 16 rows.
        return unsafe { transpose16_avx512(from.as_ptr(), stride, to.as_mut_ptr(), to_stride) };
    }
    let _ = isa;
    for (c, to) in to.chunks_mut(to_stride).enumerate() {
        to.iter_mut().take(16).enumerate().for_each(|(r, v)| *v = from[r * stride + c]);
    }
}

#[cfg(target_arch = "x86_64")]
features! { enable avx512;
    /// Pairs of rows interleave by floats, then by pairs of floats, which leaves quarters
    /// transposed; two passes put quarters in their places.
    ///
    /// # Safety
    /// The processor has what this is compiled for. There are 16 rows of 16 floats, so far apart,
    /// on either side, and nothing else touches those of `to`.
    unsafe fn transpose16_avx512(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        use std::arch::x86_64::*;
        // SAFETY: guaranteed by the caller: row `r` of 16 is there.
        let row: [__m512; 16] = std::array::from_fn(|r| unsafe { _mm512_loadu_ps(from.add(r * stride)) });
        let floats: [__m512; 16] = std::array::from_fn(|i| {
            let (a, b) = (row[i & !1], row[i | 1]);
            if i & 1 == 0 { _mm512_unpacklo_ps(a, b) } else { _mm512_unpackhi_ps(a, b) }
        });
        // Entry 4 g + c: in each quarter q, column 4 q + c of rows 4 g to 4 g + 3.
        let quads: [__m512; 16] = std::array::from_fn(|i| {
            let (a, b) = (_mm512_castps_pd(floats[i & !3 | i >> 1 & 1]), _mm512_castps_pd(floats[i & !3 | 2 | i >> 1 & 1]));
            _mm512_castpd_ps(if i & 1 == 0 { _mm512_unpacklo_pd(a, b) } else { _mm512_unpackhi_pd(a, b) })
        });
        for c in 0..4 {
            let [a, b, d, e] = [quads[c], quads[4 + c], quads[8 + c], quads[12 + c]];
            let (even, odd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
            let (even2, odd2) = (_mm512_shuffle_f32x4::<0x88>(d, e), _mm512_shuffle_f32x4::<0xdd>(d, e));
            let columns = [
                _mm512_shuffle_f32x4::<0x88>(even, even2),
                _mm512_shuffle_f32x4::<0x88>(odd, odd2),
                _mm512_shuffle_f32x4::<0xdd>(even, even2),
                _mm512_shuffle_f32x4::<0xdd>(odd, odd2),
            ];
            for (q, column) in columns.into_iter().enumerate() {
                // SAFETY: guaranteed by the caller: `4 * q + c` is one of 16 rows.
                unsafe { _mm512_storeu_ps(to.add((4 * q + c) * to_stride), column) };
            }
        }
    }
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
