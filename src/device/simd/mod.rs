//! A small vector trait, one implementation per instruction set, and the few functions of a real
//! number that kernels need.
//!
//! Two ways to use it: write a kernel over [`Simd`] where registers matter (the convolutions), or
//! write plain loops inside `multiversion!` and let the compiler vectorise them for each
//! instruction set (everything else).

mod hints;
mod math;
mod portable;
mod transpose;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use hints::{Access, fence, opaque, prefetch};
pub use math::{dot, exp, gelu, gelu_slope, ln_1p, mul_add, pair, sigmoid, sum};
pub use portable::Portable;
pub use transpose::transpose16;
#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512, Avx512Bf16};

use math::{EXP, EXP_RANGE, LN_2, ROUND};

/// One register of floats.
///
/// # Safety
/// Of every method: the processor has the instruction set that the type stands for.
///
/// Of those that take addresses: [`Simd::splat`] reads one float, [`Simd::load`] as many as there
/// are [`Simd::LANES`]; [`Simd::store`] writes as many, and so does [`Simd::stream`], at an address
/// aligned to the register's size; [`Simd::store_factors`] writes [`Simd::FACTORS`];
/// [`Simd::add_sums`] adds to a float64 a lane at either address. Addresses are aligned to their
/// floats, and nothing else touches what is written meanwhile.
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
    /// Stores past the caches, to an address aligned to the register's size; [`fence`] makes it
    /// visible to other threads.
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

/// Defines a function whose body is compiled once per instruction set and chosen by an
/// [`Isa`](super::Isa) given first.
///
/// The body is ordinary safe Rust; `for` loops in it vectorise for the instruction set at hand.
/// Closures handed to iterator methods (`for_each`, `fold`) do not: those methods may stay out of
/// line, compiled for the baseline. `FUSED` in it tells whether the instruction set multiplies and
/// adds at once, for the functions that take it.
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
                    // SAFETY: the Isa was made by asking the processor for these lists.
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

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "x86_64")]
    use crate::device::{Isa, Level, features};

    /// # Safety
    /// The processor has the instruction set of `S`.
    #[inline(always)]
    unsafe fn registers_agree<S: Values, const FUSED: bool>() {
        for i in -500..500 {
            let x: [f32; 16] = std::array::from_fn(|lane| i as f32 * 0.2 + lane as f32 * 0.01);
            let mut got = [0.0f32; 16];
            // SAFETY: a register has at most sixteen floats; the rest is guaranteed by the caller.
            unsafe { S::store(got.as_mut_ptr(), S::exp(S::load(x.as_ptr()))) };
            got.iter()
                .zip(x)
                .take(S::LANES)
                .for_each(|(got, x)| assert_eq!(*got, exp::<FUSED>(x), "exp({x})"));
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
}
