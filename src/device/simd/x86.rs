//! The vector trait on x86-64.

use super::{Simd, Tile, Values};
use std::arch::x86_64::*;

/// Eight floats.
#[derive(Clone, Copy)]
pub struct Avx2;

impl Simd for Avx2 {
    type V = __m256;
    type Whole = Avx2;
    const LANES: usize = 8;
    const WIDE: Tile = Tile { registers: 2, strip: 6, cells: 6 };
    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: as the trait says, the processor has AVX2 and FMA.
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(p: *const f32) -> __m256 {
        // SAFETY: as the trait says, there is AVX2, and a float at the address.
        unsafe { _mm256_set1_ps(*p) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        // SAFETY: as the trait says, there is AVX2, and eight floats at the address.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m256) {
        // SAFETY: as the trait says, there is AVX2, and room for eight floats.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: as the trait says, the processor has AVX2 and FMA.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as the trait says, the processor has AVX2 and FMA.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as the trait says, the processor has AVX2 and FMA.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn stream(p: *mut f32, v: __m256) {
        // SAFETY: as the trait says, there is AVX2, and aligned room for eight floats.
        unsafe { _mm256_stream_ps(p, v) }
    }
    type Sums = [__m256d; 4];
    #[inline(always)]
    unsafe fn no_sums() -> [__m256d; 4] {
        // SAFETY: as the trait says, the processor has AVX2 and FMA.
        unsafe { [_mm256_setzero_pd(); 4] }
    }
    #[inline(always)]
    unsafe fn count(s: [__m256d; 4], v: __m256) -> [__m256d; 4] {
        // SAFETY: as the trait says, the processor has AVX2 and FMA.
        unsafe {
            let halves = [
                _mm256_cvtps_pd(_mm256_castps256_ps128(v)),
                _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(v)),
            ];
            [
                _mm256_add_pd(s[0], halves[0]),
                _mm256_add_pd(s[1], halves[1]),
                _mm256_fmadd_pd(halves[0], halves[0], s[2]),
                _mm256_fmadd_pd(halves[1], halves[1], s[3]),
            ]
        }
    }
    #[inline(always)]
    unsafe fn add_sums(s: [__m256d; 4], to: *mut f64, squares: *mut f64) {
        // SAFETY: as the trait says, there is AVX2, and eight float64 at either address.
        unsafe {
            for (at, half) in [to, to.add(4), squares, squares.add(4)].into_iter().zip(s) {
                _mm256_storeu_pd(at, _mm256_add_pd(_mm256_loadu_pd(at), half));
            }
        }
    }
}

impl Values for Avx2 {
    #[inline(always)]
    unsafe fn total(v: __m256) -> f32 {
        // SAFETY: as the trait says, the processor has AVX2 and FMA.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as the trait says, the processor has AVX2 and FMA.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn leaky(a: __m256, slope: __m256) -> __m256 {
        // By the sign of `a`.
        // SAFETY: as the trait says, the processor has AVX2 and FMA.
        unsafe { _mm256_blendv_ps(a, _mm256_mul_ps(a, slope), a) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as the trait says, the processor has AVX2 and FMA.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as the trait says, the processor has AVX2 and FMA.
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn power_of_two(n: __m256) -> __m256 {
        // SAFETY: as the trait says, the processor has AVX2 and FMA.
        unsafe {
            let bits = _mm256_slli_epi32::<23>(_mm256_castps_si256(n));
            _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(127 << 23)))
        }
    }
}

/// What both types of sixteen floats have in common: everything except [`Simd::fma`].
macro_rules! sixteen_floats {
    () => {
        type V = __m512;
        type Whole = Avx512;
        const LANES: usize = 16;
        const WIDE: Tile = Tile { registers: 2, strip: 13, cells: 4 };
        // With two registers, half of the work would be thrown away.
        const NARROW: Tile = Tile { registers: 1, strip: 16, cells: 8 };
        #[inline(always)]
        unsafe fn zero() -> __m512 {
            // SAFETY: as the trait says, the processor has AVX-512.
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn splat(p: *const f32) -> __m512 {
            // SAFETY: as the trait says, there is AVX-512, and a float at the address.
            unsafe { _mm512_set1_ps(*p) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m512 {
            // SAFETY: as the trait says, there is AVX-512, and sixteen floats at the address.
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m512) {
            // SAFETY: as the trait says, there is AVX-512, and room for sixteen floats.
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            // SAFETY: as the trait says, the processor has AVX-512.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m512, b: __m512) -> __m512 {
            // SAFETY: as the trait says, the processor has AVX-512.
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn stream(p: *mut f32, v: __m512) {
            // SAFETY: as the trait says, there is AVX-512, and aligned room for sixteen floats.
            unsafe { _mm512_stream_ps(p, v) }
        }
        type Sums = [__m512d; 4];
        #[inline(always)]
        unsafe fn no_sums() -> [__m512d; 4] {
            // SAFETY: as the trait says, the processor has AVX-512.
            unsafe { [_mm512_setzero_pd(); 4] }
        }
        #[inline(always)]
        unsafe fn count(s: [__m512d; 4], v: __m512) -> [__m512d; 4] {
            // SAFETY: as the trait says, the processor has AVX-512.
            unsafe {
                let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)));
                let halves = [_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(upper)];
                [
                    _mm512_add_pd(s[0], halves[0]),
                    _mm512_add_pd(s[1], halves[1]),
                    _mm512_fmadd_pd(halves[0], halves[0], s[2]),
                    _mm512_fmadd_pd(halves[1], halves[1], s[3]),
                ]
            }
        }
        #[inline(always)]
        unsafe fn add_sums(s: [__m512d; 4], to: *mut f64, squares: *mut f64) {
            // SAFETY: as the trait says, there is AVX-512, and sixteen float64 at either address.
            unsafe {
                for (at, half) in [to, to.add(8), squares, squares.add(8)].into_iter().zip(s) {
                    _mm512_storeu_pd(at, _mm512_add_pd(_mm512_loadu_pd(at), half));
                }
            }
        }
    };
}

/// Sixteen sums of products of pairs: each float of a factor holds two bfloat16, the first in the
/// lower half.
#[derive(Clone, Copy)]
pub struct Avx512Bf16;

impl Simd for Avx512Bf16 {
    sixteen_floats!();
    /// `a₀ b₀ + a₁ b₁ + c`
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as the trait says, the processor has AVX512-BF16; all bits are values.
        unsafe {
            _mm512_dpbf16_ps(
                c,
                std::mem::transmute::<__m512, __m512bh>(a),
                std::mem::transmute::<__m512, __m512bh>(b),
            )
        }
    }
    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as the trait says, the processor has AVX-512.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    const FACTORS: usize = 8;
    #[inline(always)]
    unsafe fn store_factors(p: *mut f32, v: __m512) {
        // SAFETY: as the trait says, there is AVX512-BF16, and room for eight floats; bits are
        // copied.
        unsafe {
            _mm256_storeu_si256(
                p.cast(),
                std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v)),
            )
        }
    }
}

/// Sixteen floats.
#[derive(Clone, Copy)]
pub struct Avx512;

impl Simd for Avx512 {
    sixteen_floats!();
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as the trait says, the processor has AVX-512.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
}

impl Values for Avx512 {
    #[inline(always)]
    unsafe fn total(v: __m512) -> f32 {
        // SAFETY: as the trait says, the processor has AVX-512.
        unsafe { _mm512_reduce_add_ps(v) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as the trait says, the processor has AVX-512.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn leaky(a: __m512, slope: __m512) -> __m512 {
        // SAFETY: as the trait says, the processor has AVX-512.
        unsafe {
            _mm512_mask_mul_ps(
                a,
                _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, _mm512_setzero_ps()),
                a,
                slope,
            )
        }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as the trait says, the processor has AVX-512.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as the trait says, the processor has AVX-512.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn power_of_two(n: __m512) -> __m512 {
        // SAFETY: as the trait says, the processor has AVX-512.
        unsafe {
            let bits = _mm512_slli_epi32::<23>(_mm512_castps_si512(n));
            _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(127 << 23)))
        }
    }
    /// Pairs of rows interleave by floats, then by pairs of floats, which leaves quarters
    /// transposed; two passes put quarters in their places.
    #[inline(always)]
    unsafe fn transpose16(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: as the trait says, there is AVX-512, and 16 rows of 16 floats on either side.
        unsafe {
            let [mut rows, mut floats, mut quads] = [[_mm512_setzero_ps(); 16]; 3];
            for (r, row) in rows.iter_mut().enumerate() {
                *row = _mm512_loadu_ps(from.add(r * stride));
            }
            for i in (0..16).step_by(2) {
                floats[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
                floats[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
            }
            // Entry 4 g + c: in each quarter q, column 4 q + c of rows 4 g to 4 g + 3.
            for g in (0..16).step_by(4) {
                for half in 0..2 {
                    let a = _mm512_castps_pd(floats[g + half]);
                    let b = _mm512_castps_pd(floats[g + 2 + half]);
                    quads[g + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                    quads[g + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
                }
            }
            for c in 0..4 {
                let [a, b, d, e] = [quads[c], quads[4 + c], quads[8 + c], quads[12 + c]];
                let even = _mm512_shuffle_f32x4::<0x88>(a, b);
                let odd = _mm512_shuffle_f32x4::<0xdd>(a, b);
                let even2 = _mm512_shuffle_f32x4::<0x88>(d, e);
                let odd2 = _mm512_shuffle_f32x4::<0xdd>(d, e);
                let columns = [
                    _mm512_shuffle_f32x4::<0x88>(even, even2),
                    _mm512_shuffle_f32x4::<0x88>(odd, odd2),
                    _mm512_shuffle_f32x4::<0xdd>(even, even2),
                    _mm512_shuffle_f32x4::<0xdd>(odd, odd2),
                ];
                for (q, column) in columns.iter().enumerate() {
                    _mm512_storeu_ps(to.add((4 * q + c) * to_stride), *column);
                }
            }
        }
    }
}
