//! A small vector trait, one implementation per instruction set, and the few functions of a real number that kernels need.
//!
//! Two ways to use it: write a kernel over [`Simd`] where registers matter (the convolutions), or write plain loops inside
//! `multiversion!` and let the compiler vectorise them for each instruction set (everything else).

use super::Isa;
#[cfg(target_arch = "x86_64")]
use super::{Level, features};

/// One register of floats.
///
/// # Safety
/// Of every method: the processor has the instruction set that the type stands for.
///
/// Of those that take addresses: [`Simd::splat`] reads one float, [`Simd::load`] as many as there
/// are [`Simd::LANES`]; [`Simd::store`] writes as many, and so does [`Simd::stream`], at an address
/// aligned to the register's size; [`Simd::store_factors`] writes [`Simd::FACTORS`];
/// [`Simd::add_sums`] adds to a float64 a lane at either address. Addresses are aligned to their
/// floats, and nobody else touches what is written meanwhile.
#[allow(missing_docs, clippy::missing_safety_doc)]
pub trait Simd: Copy {
    type V: Copy;
    /// The same registers, value by value.
    type Whole: Values<V = Self::V>;
    const LANES: usize;
    unsafe fn zero() -> Self::V;
    unsafe fn splat(p: *const f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// `a * b + c`
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c` of values that are no factors.
    #[inline(always)]
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: as the trait says, the processor has the instructions.
        unsafe { Self::fma(a, b, c) }
    }
    /// Stores past the caches, to an address aligned to the register's size; [`fence`] makes it visible to other threads.
    #[inline(always)]
    unsafe fn stream(p: *mut f32, v: Self::V) {
        // SAFETY: as the trait says, the address takes a register.
        unsafe { Self::store(p, v) }
    }
    /// Sums in float64 of a register's values and of their squares.
    type Sums: Copy;
    unsafe fn no_sums() -> Self::Sums;
    unsafe fn count(sums: Self::Sums, v: Self::V) -> Self::Sums;
    /// Adds the sums of values to `to`, those of squares to `squares`.
    unsafe fn add_sums(sums: Self::Sums, to: *mut f64, squares: *mut f64);
    /// Floats that a register's values take as factors of [`Simd::fma`].
    const FACTORS: usize = Self::LANES;
    /// Stores values as factors.
    #[inline(always)]
    unsafe fn store_factors(p: *mut f32, v: Self::V) {
        // SAFETY: as the trait says, the address takes the factors: here a register.
        unsafe { Self::store(p, v) }
    }
}

/// What maps go through value by value: only where a register holds plain floats.
///
/// # Safety
/// Of every method, as of those of [`Simd`]: the processor has the instruction set.
#[allow(missing_docs, clippy::missing_safety_doc)]
pub trait Values: Simd {
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// The larger of each; `b` where either is no number.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller of each; `b` where either is no number.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// `a`, times `slope` where it is negative.
    unsafe fn leaky(a: Self::V, slope: Self::V) -> Self::V;
    /// The sum of a register's values.
    unsafe fn total(v: Self::V) -> f32;
    /// Two to the power of each integer `n`, which comes as `n` + 1.5 · 2²³.
    unsafe fn power_of_two(n: Self::V) -> Self::V;
    /// [`exp`] of each.
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V {
        // SAFETY: as the trait says, the processor has the instructions; `all` has a float to read.
        unsafe {
            let all = |v: f32| Self::splat(&v);
            // The numbers stand first, so that what is none stays so.
            let x = Self::min(all(EXP_RANGE[1]), Self::max(all(EXP_RANGE[0]), x));
            let shifted = Self::mul_add(x, all(std::f32::consts::LOG2_E), all(ROUND));
            let n = Self::sub(shifted, all(ROUND));
            let r = Self::mul_add(n, all(-LN_2[1]), Self::mul_add(n, all(-LN_2[0]), x));
            let mut p = all(EXP[5]);
            for c in EXP[..5].iter().rev() {
                p = Self::mul_add(p, r, all(*c));
            }
            let e = Self::add(Self::mul_add(p, Self::mul(r, r), r), all(1.0));
            Self::mul(e, Self::power_of_two(shifted))
        }
    }
}

/// Four floats in whatever the target guarantees.
#[derive(Clone, Copy)]
pub struct Portable;

impl Simd for Portable {
    type V = [f32; 4];
    type Whole = Portable;
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn zero() -> [f32; 4] {
        [0.0; 4]
    }
    #[inline(always)]
    unsafe fn splat(p: *const f32) -> [f32; 4] {
        // SAFETY: as the trait says, there is a float at the address.
        unsafe { [*p; 4] }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; 4] {
        // SAFETY: as the trait says, there are four floats at the address.
        unsafe { p.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: [f32; 4]) {
        // SAFETY: as the trait says, the address takes four floats.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] - b[i])
    }
    type Sums = [[f64; 4]; 2];
    #[inline(always)]
    unsafe fn no_sums() -> [[f64; 4]; 2] {
        [[0.0; 4]; 2]
    }
    #[inline(always)]
    unsafe fn count(s: [[f64; 4]; 2], v: [f32; 4]) -> [[f64; 4]; 2] {
        let v = v.map(f64::from);
        [std::array::from_fn(|i| s[0][i] + v[i]), std::array::from_fn(|i| s[1][i] + v[i] * v[i])]
    }
    #[inline(always)]
    unsafe fn add_sums(s: [[f64; 4]; 2], to: *mut f64, squares: *mut f64) {
        for (i, (sum, square)) in s[0].into_iter().zip(s[1]).enumerate() {
            // SAFETY: as the trait says, there are four of each.
            unsafe {
                *to.add(i) += sum;
                *squares.add(i) += square;
            }
        }
    }
}

impl Values for Portable {
    #[inline(always)]
    unsafe fn total(v: [f32; 4]) -> f32 {
        (v[0] + v[2]) + (v[1] + v[3])
    }
    #[inline(always)]
    unsafe fn max(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn leaky(a: [f32; 4], slope: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| if a[i] >= 0.0 { a[i] } else { a[i] * slope[i] })
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn min(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn power_of_two(n: [f32; 4]) -> [f32; 4] {
        n.map(power_of_two)
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512, Avx512Bf16};

#[cfg(target_arch = "x86_64")]
mod x86;

/// Defines a function whose body is compiled once per instruction set and chosen by an [`Isa`](super::Isa) given first.
///
/// The body is ordinary safe Rust; `for` loops in it vectorise for the instruction set at hand. Closures handed to iterator methods
/// (`for_each`, `fold`) do not: those methods may stay out of line, compiled for the baseline. `FUSED` in it tells whether the instruction set multiplies and adds at
/// once, for the functions below that take it.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::device::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<const FUSED: bool>($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                $crate::device::features! { enable avx512_loops;
                    #[allow(clippy::too_many_arguments)]
                    fn avx512($($arg: $ty),*) $(-> $ret)? { body::<true>($($arg),*) }
                }
                $crate::device::features! { enable avx2;
                    #[allow(clippy::too_many_arguments)]
                    fn avx2($($arg: $ty),*) $(-> $ret)? { body::<true>($($arg),*) }
                }
                match isa.level() {
                    // SAFETY: whoever made the Isa asked the processor for these lists.
                    $crate::device::Level::Avx512 => unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::device::Level::Avx2 => unsafe { avx2($($arg),*) },
                    $crate::device::Level::Portable => body::<false>($($arg),*),
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            {
                let _ = isa;
                body::<false>($($arg),*)
            }
        }
    };
}
pub(crate) use multiversion;

/// Asks for the cache line of a value before it is needed.
#[inline(always)]
pub fn prefetch(value: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction, which changes nothing but caches and does not fault.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(value.cast());
    }
    let _ = value;
}

/// The same value, of which the compiler knows nothing.
#[inline(always)]
pub fn opaque(value: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    let value = {
        let mut value = value;
        // SAFETY: no instruction at all.
        unsafe { std::arch::asm!("/* {0} */", inout(reg) value, options(pure, nomem, nostack, preserves_flags)) };
        value
    };
    value
}

/// Asks for the cache line of a value before it is written.
#[inline(always)]
pub fn prefetch_to_write(value: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above; processors without the instruction take it for none.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_ET0 }>(value.cast());
    }
    let _ = value;
}

/// Makes what [`Simd::stream`] stored visible to whoever learns of it from here on.
#[inline(always)]
pub fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Writes the columns of `from`, 16 rows of 16 values `stride` apart, as rows of `to`, `to_stride` apart.
pub fn transpose16(isa: Isa, from: &[f32], stride: usize, to: &mut [f32], to_stride: usize) {
    let (from, to) = (&from[..15 * stride + 16], &mut to[..15 * to_stride + 16]);
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Avx512 {
        // SAFETY: whoever made the Isa asked the processor; both sides were just cut to 16 rows.
        return unsafe { transpose16_avx512(from.as_ptr(), stride, to.as_mut_ptr(), to_stride) };
    }
    let _ = isa;
    for (c, to) in to.chunks_mut(to_stride).enumerate() {
        to.iter_mut().take(16).enumerate().for_each(|(r, v)| *v = from[r * stride + c]);
    }
}

#[cfg(target_arch = "x86_64")]
features! { enable avx512;
    /// Pairs of rows interleave by floats, then by pairs of floats, which leaves quarters transposed; two passes put quarters in their places.
    ///
    /// # Safety
    /// The processor has what this is compiled for. There are 16 rows of 16 floats, so far apart,
    /// on either side, and nobody else touches those of `to`.
    unsafe fn transpose16_avx512(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        use std::arch::x86_64::*;
        // SAFETY: the caller's word: row `r` of 16 is there.
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
                // SAFETY: the caller's word: `4 * q + c` is one of 16 rows.
                unsafe { _mm512_storeu_ps(to.add((4 * q + c) * to_stride), column) };
            }
        }
    }
}

/// Two floats, rounded to bfloat16 (nearest, ties to even), in one float's place, the first in the lower half.
#[inline(always)]
pub fn pair(a: f32, b: f32) -> f32 {
    let round = |v: f32| {
        let bits = v.to_bits();
        bits.wrapping_add(0x7fff + (bits >> 16 & 1))
    };
    f32::from_bits(round(a) >> 16 | round(b) & 0xffff_0000)
}

/// `a * b + c`, rounded once where the instruction set does that.
#[inline(always)]
pub fn mul_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// A polynomial, its coefficients from the constant on.
#[inline(always)]
fn polynomial<const FUSED: bool, const N: usize>(coefficients: [f32; N], x: f32) -> f32 {
    let mut value = coefficients[N - 1];
    for n in (0..N - 1).rev() {
        value = mul_add::<FUSED>(value, x, coefficients[n]);
    }
    value
}

/// 1.5 * 2^23: adding it rounds to an integer.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts, so that an exponent's product with the first is exact (Cody and Waite).
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
/// What [`exp`] is of: beyond it a power of two would not fit a float's exponent.
const EXP_RANGE: [f32; 2] = [-87.336_54, 88.0];
/// Taylor's coefficients from the second power to the seventh: the remainder at |r| <= 0.347 is below 2^-26.
const EXP: [f32; 6] = [0.5, 1.0 / 6.0, 1.0 / 24.0, 1.0 / 120.0, 1.0 / 720.0, 1.0 / 5040.0];

/// `2^n` for an integer `n` in -126..=127 that comes as `n` + [`ROUND`], in whose last bits it stands.
#[inline(always)]
fn power_of_two(n: f32) -> f32 {
    f32::from_bits((n.to_bits() << 23).wrapping_add(127 << 23))
}

/// `e^x` to about 2 units in the last place; that of -87.3 below it, of 88 above it.
#[inline(always)]
pub fn exp<const FUSED: bool>(x: f32) -> f32 {
    // e^x = 2^n * e^r with n = round(x / ln 2).
    let x = x.clamp(EXP_RANGE[0], EXP_RANGE[1]);
    let shifted = mul_add::<FUSED>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = mul_add::<FUSED>(n, -LN_2[1], mul_add::<FUSED>(n, -LN_2[0], x));
    let p = polynomial::<FUSED, 6>(EXP, r);
    let e = mul_add::<FUSED>(p, r * r, r) + 1.0;
    e * power_of_two(shifted)
}

/// `1 - erf(z)` for `z >= 0`, absolute error below 1e-7, written as `exp(-z q(z))` so that the tail keeps its sign and scale.
///
/// `q` is a least-squares polynomial of degree 12 on [0, 6], fitted to the values of the function; beyond 6 the result is
/// that of 6, 2e-17.
#[inline(always)]
pub fn erfc<const FUSED: bool>(z: f32) -> f32 {
    const Q: [f32; 13] = [
        1.128_380_3,
        0.636_606,
        0.102_823_94,
        -0.019_204_663,
        -0.000_198_449_14,
        0.001_822_954_2,
        -0.000_803_720_73,
        0.000_213_415_67,
        -3.883_263_3e-5,
        4.881_37e-6,
        -4.064_393e-7,
        2.019_139_3e-8,
        -4.530_731_3e-10,
    ];
    let z = z.min(6.0);
    exp::<FUSED>(-z * polynomial::<FUSED, 13>(Q, z))
}

/// `ln(1 + e)` for `e` in 0 to 1, by the series of `2 artanh(e / (2 + e))`.
#[inline(always)]
pub fn ln_1p<const FUSED: bool>(e: f32) -> f32 {
    let s = e / (2.0 + e);
    2.0 * s * polynomial::<FUSED, 7>([1.0, 1.0 / 3.0, 0.2, 1.0 / 7.0, 1.0 / 9.0, 1.0 / 11.0, 1.0 / 13.0], s * s)
}

/// The sum of some values, in sixteen running sums that vectorise.
#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (whole, rest) = x.split_at(x.len() / 16 * 16);
    for v in whole.chunks_exact(16) {
        for i in 0..16 {
            lanes[i] += v[i];
        }
    }
    let mut total = 0.0;
    for v in rest {
        total += *v;
    }
    for v in lanes {
        total += v;
    }
    total
}

/// The dot product of two slices of one length.
#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let whole = x.len() / 16 * 16;
    for (v, w) in x[..whole].chunks_exact(16).zip(y[..whole].chunks_exact(16)) {
        for i in 0..16 {
            lanes[i] += v[i] * w[i];
        }
    }
    let mut total = 0.0;
    for (v, w) in x[whole..].iter().zip(&y[whole..]) {
        total += v * w;
    }
    for v in lanes {
        total += v;
    }
    total
}

/// The exact-erf GELU, `x Φ(x)`.
#[inline(always)]
pub fn gelu<const FUSED: bool>(x: f32) -> f32 {
    let tail = 0.5 * erfc::<FUSED>(x.abs() * std::f32::consts::FRAC_1_SQRT_2);
    x * if x > 0.0 { 1.0 - tail } else { tail }
}

/// The derivative of the exact-erf GELU, `Φ(x) + x φ(x)`.
#[inline(always)]
pub fn gelu_slope<const FUSED: bool>(x: f32) -> f32 {
    let tail = 0.5 * erfc::<FUSED>(x.abs() * std::f32::consts::FRAC_1_SQRT_2);
    let density = 0.398_942_3 * exp::<FUSED>(-0.5 * x * x);
    (if x > 0.0 { 1.0 - tail } else { tail }) + x * density
}

/// The logistic function.
#[inline(always)]
pub fn sigmoid<const FUSED: bool>(x: f32) -> f32 {
    // On the negative side e^x / (1 + e^x) keeps full relative accuracy.
    let e = exp::<FUSED>(-x.abs());
    (if x >= 0.0 { 1.0 } else { e }) / (1.0 + e)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn functions_agree<const FUSED: bool>() {
        let (exp, sigmoid, gelu) = (exp::<FUSED>, sigmoid::<FUSED>, gelu::<FUSED>);
        for i in -4000..4000 {
            let x = i as f32 * 0.02;
            let e = (x as f64).exp();
            if x > -87.0 {
                assert!((exp(x) as f64 / e - 1.0).abs() < 3e-7, "exp({x}) = {} not {e}", exp(x));
            }
            let s = 1.0 / (1.0 + (-x as f64).exp());
            if x > -80.0 {
                assert!((sigmoid(x) as f64 / s - 1.0).abs() < 5e-7, "sigmoid({x}) = {}", sigmoid(x));
            }
        }
        for (x, least) in [(87.9f32, 87.9f64), (200.0, 88.0), (f32::INFINITY, 88.0)] {
            assert!((exp(x) as f64 / least.exp() - 1.0).abs() < 1e-5, "exp({x}) = {}", exp(x));
        }
        assert_eq!(exp(f32::NEG_INFINITY), exp(-1000.0));
        assert!(exp(-1000.0) < 2e-38 && exp(1000.0).is_finite());
        // Φ at 1, 2, 3 from tables.
        for (x, phi) in [(1.0f32, 0.841_344_746_068_543f64), (2.0, 0.977_249_868_051_821), (3.0, 0.998_650_101_968_37)] {
            assert!((gelu(x) as f64 - x as f64 * phi).abs() < 3e-7);
            assert!((gelu(-x) as f64 + x as f64 * (1.0 - phi)).abs() < 3e-7);
        }
    }

    #[test]
    fn functions_agree_with_float64() {
        functions_agree::<false>();
        functions_agree::<true>();
    }

    /// # Safety
    /// The processor has the instruction set of `S`.
    #[inline(always)]
    unsafe fn registers_agree<S: Values, const FUSED: bool>() {
        for i in -500..500 {
            let x: [f32; 16] = std::array::from_fn(|lane| i as f32 * 0.2 + lane as f32 * 0.01);
            let mut got = [0.0f32; 16];
            // SAFETY: a register has at most sixteen floats; the rest is the caller's word.
            unsafe { S::store(got.as_mut_ptr(), S::exp(S::load(x.as_ptr()))) };
            got.iter().zip(x).take(S::LANES).for_each(|(got, x)| assert_eq!(*got, exp::<FUSED>(x), "exp({x})"));
        }
        let mut got = [0.0f32; 16];
        // SAFETY: as above.
        unsafe { S::store(got.as_mut_ptr(), S::exp(S::splat(&f32::NAN))) };
        assert!(got[..S::LANES].iter().all(|v| v.is_nan()));
    }

    #[test]
    fn registers_agree_with_single_floats() {
        // SAFETY: every machine has it.
        unsafe { registers_agree::<Portable, false>() };
        #[cfg(target_arch = "x86_64")]
        {
            features! { enable avx2;
                /// # Safety
                /// The processor has what this is compiled for.
                unsafe fn avx2() {
                    // SAFETY: it has AVX2 and FMA, as this asks for.
                    unsafe { registers_agree::<Avx2, true>() }
                }
            }
            features! { enable avx512;
                /// # Safety
                /// The processor has what this is compiled for.
                unsafe fn avx512() {
                    // SAFETY: it has AVX-512, as this asks for.
                    unsafe { registers_agree::<Avx512, true>() }
                }
            }
            for isa in Isa::available() {
                // SAFETY: the machine has it.
                unsafe {
                    match isa.level() {
                        Level::Portable => {}
                        Level::Avx2 => avx2(),
                        Level::Avx512 => avx512(),
                    }
                }
            }
        }
    }

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
