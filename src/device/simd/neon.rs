//! The vector trait on AArch64.

use super::{Simd, Tile, Values};
use std::arch::aarch64::*;

/// Four floats.
#[derive(Clone, Copy)]
pub struct Neon;

impl Simd for Neon {
    type V = float32x4_t;
    type Whole = Neon;
    const LANES: usize = 4;
    // Blocks of four: loading a value serves four products.
    const WIDE: Tile = Tile { registers: 4, strip: 6, cells: 2 };
    #[inline(always)]
    unsafe fn zero() -> float32x4_t {
        // SAFETY: as the trait says, the processor has NEON.
        unsafe { vdupq_n_f32(0.0) }
    }
    #[inline(always)]
    unsafe fn splat(p: *const f32) -> float32x4_t {
        // SAFETY: as the trait says, there is NEON, and a float at the address.
        unsafe { vdupq_n_f32(*p) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> float32x4_t {
        // SAFETY: as the trait says, there is NEON, and four floats at the address.
        unsafe { vld1q_f32(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: float32x4_t) {
        // SAFETY: as the trait says, there is NEON, and room for four floats.
        unsafe { vst1q_f32(p, v) }
    }
    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: as the trait says, the processor has NEON. Its intrinsic takes the sum first.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: as the trait says, the processor has NEON.
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: as the trait says, the processor has NEON.
        unsafe { vsubq_f32(a, b) }
    }
    type Sums = [float64x2_t; 4];
    #[inline(always)]
    unsafe fn no_sums() -> [float64x2_t; 4] {
        // SAFETY: as the trait says, the processor has NEON.
        unsafe { [vdupq_n_f64(0.0); 4] }
    }
    #[inline(always)]
    unsafe fn count(s: [float64x2_t; 4], v: float32x4_t) -> [float64x2_t; 4] {
        // SAFETY: as the trait says, the processor has NEON.
        unsafe {
            let halves = [vcvt_f64_f32(vget_low_f32(v)), vcvt_high_f64_f32(v)];
            [
                vaddq_f64(s[0], halves[0]),
                vaddq_f64(s[1], halves[1]),
                vfmaq_f64(s[2], halves[0], halves[0]),
                vfmaq_f64(s[3], halves[1], halves[1]),
            ]
        }
    }
    #[inline(always)]
    unsafe fn add_sums(s: [float64x2_t; 4], to: *mut f64, squares: *mut f64) {
        // SAFETY: as the trait says, there is NEON, and four float64 at either address.
        unsafe {
            for (at, half) in [to, to.add(2), squares, squares.add(2)].into_iter().zip(s) {
                vst1q_f64(at, vaddq_f64(vld1q_f64(at), half));
            }
        }
    }
}

impl Values for Neon {
    #[inline(always)]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: as the trait says, the processor has NEON.
        unsafe { vmulq_f32(a, b) }
    }
    // NEON's own maximum and minimum are NaN if either value is NaN.
    #[inline(always)]
    unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: as the trait says, the processor has NEON.
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: as the trait says, the processor has NEON.
        unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
    }
    #[inline(always)]
    unsafe fn leaky(a: float32x4_t, slope: float32x4_t) -> float32x4_t {
        // SAFETY: as the trait says, the processor has NEON.
        unsafe { vbslq_f32(vcltzq_f32(a), vmulq_f32(a, slope), a) }
    }
    #[inline(always)]
    unsafe fn total(v: float32x4_t) -> f32 {
        // SAFETY: as the trait says, the processor has NEON.
        unsafe {
            let two = vadd_f32(vget_low_f32(v), vget_high_f32(v));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        }
    }
    #[inline(always)]
    unsafe fn power_of_two(n: float32x4_t) -> float32x4_t {
        // SAFETY: as the trait says, the processor has NEON.
        unsafe {
            let bits = vshlq_n_s32::<23>(vreinterpretq_s32_f32(n));
            vreinterpretq_f32_s32(vaddq_s32(bits, vdupq_n_s32(127 << 23)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Portable;
    use super::*;

    /// Value by value operations on registers `a` and `b`, in registers of `S`.
    ///
    /// # Safety
    /// The processor has the instruction set of `S`, which has four lanes.
    unsafe fn results<S: Values>(a: &[f32; 4], b: &[f32; 4]) -> [[u32; 4]; 8] {
        // SAFETY: guaranteed by the caller; each address is of four floats.
        unsafe {
            let (x, y) = (S::load(a.as_ptr()), S::load(b.as_ptr()));
            let values = [
                S::zero(),
                S::splat(&a[2]),
                S::add(x, y),
                S::sub(x, y),
                S::mul(x, y),
                S::max(x, y),
                S::min(x, y),
                S::leaky(x, S::splat(&0.01)),
            ];
            values.map(|v| {
                let mut out = [0.0f32; 4];
                S::store(out.as_mut_ptr(), v);
                // All values that are NaN are treated as equal.
                out.map(|v| if v.is_nan() { u32::MAX } else { v.to_bits() })
            })
        }
    }

    #[test]
    fn neon_does_what_single_floats_do() {
        let a = [1.5, -0.0, f32::NAN, -3.25];
        for b in [[2.0, 0.0, 1.0, -3.0], [-1.5, f32::NAN, f32::INFINITY, -3.25]] {
            for (a, b) in [(a, b), (b, a)] {
                // SAFETY: every AArch64 that Rust compiles for has NEON.
                let (neon, plain) =
                    unsafe { (results::<Neon>(&a, &b), results::<Portable>(&a, &b)) };
                assert_eq!(neon, plain, "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn neon_sums_and_rounds_once() {
        let v = [1.0f32 + f32::EPSILON, 2.0, -3.0, 0.5];
        // SAFETY: every AArch64 that Rust compiles for has NEON; all addresses are of four values.
        unsafe {
            let x = Neon::load(v.as_ptr());
            assert_eq!(Neon::total(x), (v[0] + v[2]) + (v[1] + v[3]));
            let mut fused = [0.0f32; 4];
            let minus = Neon::splat(&-1.0);
            Neon::store(fused.as_mut_ptr(), Neon::fma(x, x, minus));
            assert_eq!(fused, v.map(|v| v.mul_add(v, -1.0)));
            let (mut sums, mut squares) = ([1.0f64; 4], [2.0f64; 4]);
            let counted = Neon::count(Neon::count(Neon::no_sums(), x), x);
            Neon::add_sums(counted, sums.as_mut_ptr(), squares.as_mut_ptr());
            let wide = v.map(f64::from);
            assert_eq!(sums, wide.map(|v| 1.0 + (v + v)));
            assert_eq!(squares, wide.map(|v| 2.0 + v.mul_add(v, v * v)));
            let mut powers = [0.0f32; 4];
            let n = [-126.0f32, 0.0, 1.0, 127.0].map(|n| n + super::super::math::ROUND);
            Neon::store(powers.as_mut_ptr(), Neon::power_of_two(Neon::load(n.as_ptr())));
            assert_eq!(powers, [f32::MIN_POSITIVE, 1.0, 2.0, 2.0f32.powi(127)]);
        }
    }
}
