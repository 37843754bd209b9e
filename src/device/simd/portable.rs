//! The vector trait without a special instruction set.

use super::math::power_of_two;
use super::{Simd, Tile, Values};

/// Four floats, in whatever the target guarantees.
#[derive(Clone, Copy)]
pub struct Portable;

/// A vector of a function's value at each lane. `std::array::from_fn` would be a call for each
/// vector in tests ([`microkernel`](crate::microkernel) says why).
#[inline(always)]
fn lanes<T>(value: impl Fn(usize) -> T) -> [T; 4] {
    [value(0), value(1), value(2), value(3)]
}

impl Simd for Portable {
    type V = [f32; 4];
    type Whole = Portable;
    const LANES: usize = 4;
    const FUSED: bool = false;
    const WIDE: Tile = Tile { registers: 2, strip: 5, cells: 6 };
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
        lanes(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        lanes(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        lanes(|i| a[i] - b[i])
    }
    type Sums = [[f64; 4]; 2];
    #[inline(always)]
    unsafe fn no_sums() -> [[f64; 4]; 2] {
        [[0.0; 4]; 2]
    }
    #[inline(always)]
    unsafe fn count(s: [[f64; 4]; 2], v: [f32; 4]) -> [[f64; 4]; 2] {
        let v = lanes(|i| f64::from(v[i]));
        [lanes(|i| s[0][i] + v[i]), lanes(|i| s[1][i] + v[i] * v[i])]
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
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn leaky(a: [f32; 4], slope: [f32; 4]) -> [f32; 4] {
        lanes(|i| if a[i] >= 0.0 { a[i] } else { a[i] * slope[i] })
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        lanes(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn min(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        lanes(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn power_of_two(n: [f32; 4]) -> [f32; 4] {
        lanes(|i| power_of_two(n[i]))
    }
}
