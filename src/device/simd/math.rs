//! The few functions of real numbers that kernels need, one float at a time; loops over them
//! vectorise.

/// Two floats, rounded to bfloat16 (nearest, ties to even), in one float's place, the first in the
/// lower half.
#[inline(always)]
pub fn pair(a: f32, b: f32) -> f32 {
    let round = |v: f32| {
        let bits = v.to_bits();
        bits.wrapping_add(0x7fff + (bits >> 16 & 1))
    };
    f32::from_bits(round(a) >> 16 | round(b) & 0xffff_0000)
}

/// `a * b + c`, rounded once if the instruction set does that.
#[inline(always)]
pub fn mul_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// A polynomial, with its coefficients in order from the constant on.
#[inline(always)]
fn polynomial<const FUSED: bool, const N: usize>(coefficients: [f32; N], x: f32) -> f32 {
    let mut value = coefficients[N - 1];
    for n in (0..N - 1).rev() {
        value = mul_add::<FUSED>(value, x, coefficients[n]);
    }
    value
}

/// 1.5 * 2^23: adding it rounds to an integer.
pub(super) const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts, so that an exponent's product with the first is exact (Cody and Waite).
pub(super) const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
/// The range of [`exp`]: beyond it a power of two would not fit a float's exponent.
pub(super) const EXP_RANGE: [f32; 2] = [-87.336_54, 88.0];
/// Taylor's coefficients from the second power to the seventh: the remainder at |r| <= 0.347 is
/// below 2^-26.
pub(super) const EXP: [f32; 6] =
    [0.5, 1.0 / 6.0, 1.0 / 24.0, 1.0 / 120.0, 1.0 / 720.0, 1.0 / 5040.0];

/// `2^n` for an integer `n` in -126..=127, which is passed as `n` + [`ROUND`], so that it is in the
/// last bits.
#[inline(always)]
pub(super) fn power_of_two(n: f32) -> f32 {
    f32::from_bits((n.to_bits() << 23).wrapping_add(127 << 23))
}

/// `e^x` to about 2 units in the last place; below -87.3 and above 88 the values at those limits.
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

/// `1 - erf(z)` for `z >= 0`, absolute error below 1e-7, written as `exp(-z q(z))` so that the tail
/// keeps its sign and scale.
///
/// `q` is a least-squares polynomial of degree 12 on [0, 6], fitted to the values of the function;
/// beyond 6 the result is that at 6, 2e-17.
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
    2.0 * s
        * polynomial::<FUSED, 7>(
            [1.0, 1.0 / 3.0, 0.2, 1.0 / 7.0, 1.0 / 9.0, 1.0 / 11.0, 1.0 / 13.0],
            s * s,
        )
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

/// The dot product of two slices of the same length.
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
                assert!(
                    (sigmoid(x) as f64 / s - 1.0).abs() < 5e-7,
                    "sigmoid({x}) = {}",
                    sigmoid(x)
                );
            }
        }
        for (x, least) in [(87.9f32, 87.9f64), (200.0, 88.0), (f32::INFINITY, 88.0)] {
            assert!((exp(x) as f64 / least.exp() - 1.0).abs() < 1e-5, "exp({x}) = {}", exp(x));
        }
        assert_eq!(exp(f32::NEG_INFINITY), exp(-1000.0));
        assert!(exp(-1000.0) < 2e-38 && exp(1000.0).is_finite());
        // Φ at 1, 2, 3 from tables.
        for (x, phi) in [
            (1.0f32, 0.841_344_746_068_543f64),
            (2.0, 0.977_249_868_051_821),
            (3.0, 0.998_650_101_968_37),
        ] {
            assert!((gelu(x) as f64 - x as f64 * phi).abs() < 3e-7);
            assert!((gelu(-x) as f64 + x as f64 * (1.0 - phi)).abs() < 3e-7);
        }
    }

    #[test]
    fn functions_agree_with_float64() {
        functions_agree::<false>();
        functions_agree::<true>();
    }
}
