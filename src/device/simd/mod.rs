//! A small vector trait, one implementation per instruction set, and the few functions of a real
//! number that kernels need.
//!
//! Two ways to use it: write a kernel over [`Simd`] where registers matter (the convolutions), or
//! write plain loops inside `multiversion!` and let the compiler vectorise them for each
//! instruction set (everything else). Both go through `dispatch!`.

mod dispatch;
mod hints;
mod math;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod transpose;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use dispatch::{dispatch, multiversion, table};
pub use hints::{Access, fence, opaque, prefetch};
pub use math::{dot, exp, gelu, gelu_slope, ln_1p, mul_add, pair, sigmoid, sum};
#[cfg(target_arch = "aarch64")]
pub use neon::Neon;
pub use portable::Portable;
pub use transpose::transpose16;
#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512, Avx512Bf16};

use super::Isa;
use math::{EXP, EXP_RANGE, LN_2, ROUND};

/// How many registers the micro-kernels for a register type use.
#[derive(Clone, Copy)]
pub struct Tile {
    /// Registers of output channels in a block.
    pub registers: usize,
    /// The most voxels of a strip, or input channels of an outer product: a block of sums for each,
    /// one block of weights and a value fill the registers.
    pub strip: usize,
    /// The most cells of a product of a Winograd convolution. Each has three blocks: the sums of a
    /// run, and the totals of two outputs along d.
    pub cells: usize,
}

/// One register of floats.
///
/// # Safety
/// Of every method: the processor has the instruction set that the type stands for.
///
/// Of those that take addresses: [`Simd::splat`] reads one float, [`Simd::load`] reads
/// [`Simd::LANES`] floats; [`Simd::store`] writes as many, and so does [`Simd::stream`], at an
/// address aligned to the register's size; [`Simd::store_factors`] writes [`Simd::FACTORS`];
/// [`Simd::add_sums`] adds one float64 per lane at either address. Addresses are aligned to their
/// floats, and nothing else touches what is written meanwhile.
#[allow(missing_docs, clippy::missing_safety_doc)]
pub trait Simd: Copy {
    type V: Copy;
    /// These registers for operations value by value.
    type Whole: Values<V = Self::V>;
    const LANES: usize;
    /// Whether `a * b + c` is rounded once.
    const FUSED: bool = true;
    /// The tile of layers whose outputs fill more than one register, and that of layers with one.
    const WIDE: Tile;
    const NARROW: Tile = Self::WIDE;
    unsafe fn zero() -> Self::V;
    unsafe fn splat(p: *const f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// `a * b + c`
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c` for values that are not factors.
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
    /// Floats that a register's values take up as factors of [`Simd::fma`].
    const FACTORS: usize = Self::LANES;
    /// Stores values as factors.
    #[inline(always)]
    unsafe fn store_factors(p: *mut f32, v: Self::V) {
        // SAFETY: as the trait says, there is room at the address for the factors: here a register.
        unsafe { Self::store(p, v) }
    }
}

/// Operations on maps value by value: only if a register holds plain floats.
///
/// # Safety
/// Of every method, as of those of [`Simd`]: the processor has the instruction set.
/// [`Values::transpose16`] reads its rows and writes as many, which nothing else touches meanwhile.
#[allow(missing_docs, clippy::missing_safety_doc)]
pub trait Values: Simd {
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// The larger of each; `b` if either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller of each; `b` if either is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// `a`, multiplied by `slope` where it is negative.
    unsafe fn leaky(a: Self::V, slope: Self::V) -> Self::V;
    /// The sum of a register's values.
    unsafe fn total(v: Self::V) -> f32;
    /// Two to the power of each integer `n`, which is passed as `n` + 1.5 · 2²³.
    unsafe fn power_of_two(n: Self::V) -> Self::V;
    /// [`exp`] of each.
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V {
        // SAFETY: as the trait says, the processor has the instructions; `all` has a float to read.
        unsafe {
            let all = |v: f32| Self::splat(&v);
            // The bounds come first, so that a NaN stays a NaN.
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
    /// Writes the columns of 16 rows of 16 floats, `stride` apart, as rows `to_stride` apart.
    #[inline(always)]
    unsafe fn transpose16(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        for c in 0..16 {
            for r in 0..16 {
                // SAFETY: as the trait says, there are 16 rows of 16 floats on either side.
                unsafe { *to.add(c * to_stride + r) = *from.add(r * stride + c) };
            }
        }
    }
}

/// The number of floats in a register of the instruction set.
pub fn lanes(isa: Isa) -> usize {
    dispatch! { isa, S: Values, {} => S::LANES }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Level;

    /// # Safety
    /// The processor has the instruction set of `S`, which is fused as `FUSED` says.
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
        for isa in Isa::available() {
            dispatch! { isa, S: Values, {
                /// # Safety
                /// The processor has the instruction set of `S`.
                unsafe fn compiled() {
                    // SAFETY: guaranteed by the caller.
                    unsafe { registers_agree::<S, { S::FUSED }>() }
                }
            } =>
            // SAFETY: the Isa was made by asking the processor.
            unsafe { compiled() } }
        }
    }

    #[test]
    fn an_instruction_set_has_registers_of_its_own() {
        for isa in Isa::available() {
            let expected = match isa.level() {
                Level::Portable | Level::Neon => 4,
                Level::Avx2 => 8,
                Level::Avx512 => 16,
            };
            assert_eq!(lanes(isa), expected, "{isa}");
            // Pairs are chosen only if they are asked for.
            let factors = |isa: Isa| dispatch! { isa, S: Simd, {} => S::FACTORS };
            assert_eq!(factors(isa), expected, "{isa}");
            if let Some(bf16_pairs) = isa.with_bf16_pairs() {
                assert_eq!(
                    (lanes(bf16_pairs), factors(bf16_pairs)),
                    (expected, expected / 2),
                    "{isa}"
                );
            }
        }
    }

    #[test]
    fn a_table_ends_where_it_is_told_to() {
        fn count<const N: usize>() -> usize {
            N
        }
        for (table, most) in [
            (table!(fn() -> usize, 1, N => count::<N>), 1),
            (table!(fn() -> usize, 13, N => count::<N>), 13),
            (table!(fn() -> usize, 16, N => count::<N>), 16),
        ] {
            let found: Vec<usize> = table.iter().map(|entry| entry()).collect();
            assert_eq!(found, (1..=most).collect::<Vec<_>>());
        }
    }
}
