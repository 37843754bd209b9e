//! Minimal filtering along one axis, and which filters a convolution's three axes take.
//!
//! F(m, r) gives m neighbouring outputs of a filter of r taps from m + r - 1 inputs with as many
//! products: `y = Aᵀ (G g · Bᵀ d)`, which is polynomial multiplication by evaluation at m + r - 1
//! points (Winograd 1980). The more points a filter has the larger its coefficients, and with them
//! the rounding errors.

use crate::device::simd::Simd;

/// The most inputs, and points, of an axis.
pub const MOST: usize = 6;
/// The most points of a cell.
const ALL: usize = MOST * MOST * MOST;
/// The most outputs of an axis.
pub const MOST_OUT: usize = 4;

/// One axis. Only as many entries of each array are used as there are points or outputs.
pub trait Axis {
    /// Outputs of a cell.
    const OUT: usize;
    /// Inputs of a cell, and points.
    const POINTS: usize;
    /// `Aᵀ`, if its entries are 1, 0 and -1.
    const SIGNS: [[i8; MOST]; 2];
    /// `G g`.
    fn filter_transform(taps: &[f64], to: &mut [f64; MOST]);
    /// `Bᵀ d`.
    ///
    /// # Safety
    /// As the methods of `S`.
    unsafe fn input_transform<S: Simd>(d: [S::V; MOST]) -> [S::V; MOST];
    /// `Aᵀ m`.
    ///
    /// # Safety
    /// As the methods of `S`.
    unsafe fn output_transform<S: Simd>(m: [S::V; MOST]) -> [S::V; MOST_OUT];
}

/// F(2, 3) at 0, 1, -1 and infinity: `Bᵀd = (d₀ - d₂, d₁ + d₂, d₂ - d₁, d₁ - d₃)`, `Gg = (g₀, (g₀ +
/// g₁ + g₂)/2, (g₀ - g₁ + g₂)/2, g₂)`, `Aᵀm = (m₀ + m₁ + m₂, m₁ - m₂ - m₃)`.
pub struct TwoOfThree;

impl Axis for TwoOfThree {
    const OUT: usize = 2;
    const POINTS: usize = 4;
    const SIGNS: [[i8; MOST]; 2] = [[1, 1, 1, 0, 0, 0], [0, 1, -1, -1, 0, 0]];

    fn filter_transform(g: &[f64], to: &mut [f64; MOST]) {
        to[..4].copy_from_slice(&[
            g[0],
            (g[0] + g[1] + g[2]) / 2.0,
            (g[0] - g[1] + g[2]) / 2.0,
            g[2],
        ]);
    }

    #[inline(always)]
    unsafe fn input_transform<S: Simd>(d: [S::V; MOST]) -> [S::V; MOST] {
        // SAFETY: guaranteed by the caller: the processor has the instructions of `S`.
        unsafe {
            [
                S::sub(d[0], d[2]),
                S::add(d[1], d[2]),
                S::sub(d[2], d[1]),
                S::sub(d[1], d[3]),
                S::zero(),
                S::zero(),
            ]
        }
    }

    #[inline(always)]
    unsafe fn output_transform<S: Simd>(m: [S::V; MOST]) -> [S::V; MOST_OUT] {
        // SAFETY: guaranteed by the caller: the processor has the instructions of `S`.
        unsafe {
            [
                S::add(S::add(m[0], m[1]), m[2]),
                S::sub(S::sub(m[1], m[2]), m[3]),
                S::zero(),
                S::zero(),
            ]
        }
    }
}

/// F(4, 3) at 0, ±21/32, ±25/16 and infinity: their powers are floats, and of such points these
/// leave the smallest rounding errors, about twice those of [`TwoOfThree`].
pub struct FourOfThree;

/// The points of [`FourOfThree`] between 0 and infinity, each with both signs.
const NEAR: f32 = 21.0 / 32.0;
const FAR: f32 = 25.0 / 16.0;

impl Axis for FourOfThree {
    const OUT: usize = 4;
    const POINTS: usize = 6;
    /// Zeros, not used: the entries of `Aᵀ` are others here than 1, 0 and -1.
    const SIGNS: [[i8; MOST]; 2] = [[0; MOST]; 2];

    fn filter_transform(g: &[f64], to: &mut [f64; MOST]) {
        let (a, b) = (NEAR as f64, FAR as f64);
        // `Gg` at x: the taps' polynomial over the product of its differences from the other
        // points.
        let at = |x: f64, others: f64| (g[0] + g[1] * x + g[2] * x * x) / others;
        let near = 2.0 * a * a * (a * a - b * b);
        let far = 2.0 * b * b * (b * b - a * a);
        *to = [g[0] / (a * a * b * b), at(a, near), at(-a, near), at(b, far), at(-b, far), g[2]];
    }

    #[inline(always)]
    unsafe fn input_transform<S: Simd>(d: [S::V; MOST]) -> [S::V; MOST] {
        // `Π (x - other points)` for each point: even and odd parts of a pair are shared.
        // SAFETY: guaranteed by the caller: the processor has the instructions of `S`; `c` exists.
        unsafe {
            let times = |c: &f32, a, b| S::mul_add(S::splat(c), a, b);
            let (even_a, odd_a) =
                (times(&-(FAR * FAR), d[2], d[4]), times(&-(FAR * FAR), d[1], d[3]));
            let (even_b, odd_b) =
                (times(&-(NEAR * NEAR), d[2], d[4]), times(&-(NEAR * NEAR), d[1], d[3]));
            let ends = |a, b, c| {
                times(&(NEAR * NEAR * FAR * FAR), a, times(&-(NEAR * NEAR + FAR * FAR), b, c))
            };
            [
                ends(d[0], d[2], d[4]),
                times(&NEAR, odd_a, even_a),
                times(&-NEAR, odd_a, even_a),
                times(&FAR, odd_b, even_b),
                times(&-FAR, odd_b, even_b),
                ends(d[1], d[3], d[5]),
            ]
        }
    }

    #[inline(always)]
    unsafe fn output_transform<S: Simd>(m: [S::V; MOST]) -> [S::V; MOST_OUT] {
        // `y_i = Σ m_j x_j^i`.
        // SAFETY: guaranteed by the caller: the processor has the instructions of `S`; `c` exists.
        unsafe {
            let times = |c: &f32, a, b| S::mul_add(S::splat(c), a, b);
            let (even_a, odd_a) = (S::add(m[1], m[2]), S::sub(m[1], m[2]));
            let (even_b, odd_b) = (S::add(m[3], m[4]), S::sub(m[3], m[4]));
            [
                S::add(S::add(even_a, even_b), m[0]),
                times(&NEAR, odd_a, times(&FAR, odd_b, S::zero())),
                times(&(NEAR * NEAR), even_a, times(&(FAR * FAR), even_b, S::zero())),
                times(&(NEAR * NEAR * NEAR), odd_a, times(&(FAR * FAR * FAR), odd_b, m[5])),
            ]
        }
    }
}

/// F(2, 2) at 0, 1 and infinity: `Bᵀd = (d₀ - d₁, d₁, d₁ - d₂)`, `Gg = (g₀, g₀ + g₁, g₁)`, `Aᵀm =
/// (m₀ + m₁, m₁ - m₂)`.
pub struct TwoOfTwo;

impl Axis for TwoOfTwo {
    const OUT: usize = 2;
    const POINTS: usize = 3;
    const SIGNS: [[i8; MOST]; 2] = [[1, 1, 0, 0, 0, 0], [0, 1, -1, 0, 0, 0]];

    fn filter_transform(g: &[f64], to: &mut [f64; MOST]) {
        to[..3].copy_from_slice(&[g[0], g[0] + g[1], g[1]]);
    }

    #[inline(always)]
    unsafe fn input_transform<S: Simd>(d: [S::V; MOST]) -> [S::V; MOST] {
        // SAFETY: guaranteed by the caller: the processor has the instructions of `S`.
        unsafe { [S::sub(d[0], d[1]), d[1], S::sub(d[1], d[2]), S::zero(), S::zero(), S::zero()] }
    }

    #[inline(always)]
    unsafe fn output_transform<S: Simd>(m: [S::V; MOST]) -> [S::V; MOST_OUT] {
        // SAFETY: guaranteed by the caller: the processor has the instructions of `S`.
        unsafe { [S::add(m[0], m[1]), S::sub(m[1], m[2]), S::zero(), S::zero()] }
    }
}

/// The filters of the three axes.
pub trait Filters {
    type D: Axis;
    type H: Axis;
    type W: Axis;
}

/// 3×3×3 taps, cells of 2×2×2: 64 products for 216.
pub struct F2x3;

impl Filters for F2x3 {
    type D = TwoOfThree;
    type H = TwoOfThree;
    type W = TwoOfThree;
}

/// 3×3×3 taps, cells of 2×4×4: 144 products for 864.
pub struct F2x3F4x3;

impl Filters for F2x3F4x3 {
    type D = TwoOfThree;
    type H = FourOfThree;
    type W = FourOfThree;
}

/// 2×2×2 taps, cells of 2×2×2: 27 products for 64.
pub struct F2x2;

impl Filters for F2x2 {
    type D = TwoOfTwo;
    type H = TwoOfTwo;
    type W = TwoOfTwo;
}

/// A choice of [`Filters`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    F2x2,
    F2x3,
    F2x3F4x3,
}

/// [`Axis::filter_transform`].
type FilterTransform = fn(&[f64], &mut [f64; MOST]);

/// [`Filters`] as values.
#[derive(Clone, Copy)]
pub struct Algorithm {
    /// Outputs of a cell along d, h and w.
    pub out: [usize; 3],
    /// Points along each.
    pub points: [usize; 3],
    filter_transform: [FilterTransform; 3],
}

impl Algorithm {
    pub fn of<F: Filters>() -> Algorithm {
        Algorithm {
            out: [F::D::OUT, F::H::OUT, F::W::OUT],
            points: [F::D::POINTS, F::H::POINTS, F::W::POINTS],
            filter_transform: [
                F::D::filter_transform,
                F::H::filter_transform,
                F::W::filter_transform,
            ],
        }
    }

    /// Points of a cell.
    pub fn count(&self) -> usize {
        self.points.iter().product()
    }

    /// Points of one plane of a cell's transform.
    pub fn plane(&self) -> usize {
        self.points[1] * self.points[2]
    }

    /// Outputs of a cell.
    pub fn voxels(&self) -> usize {
        self.out.iter().product()
    }

    /// The values at all points of a filter whose taps `[d][h][w]` number `edge³`.
    pub fn filter_transform(&self, edge: usize, taps: impl Fn(usize) -> f64) -> [f64; ALL] {
        let mut values: [f64; ALL] =
            std::array::from_fn(|tap| if tap < edge.pow(3) { taps(tap) } else { 0.0 });
        let mut size = [edge; 3];
        for axis in (0..3).rev() {
            let (mut next, points) = ([0.0; ALL], self.points[axis]);
            let stride: usize = size[axis + 1..].iter().product();
            for line in 0..size.iter().product::<usize>() / edge {
                let (outer, inner) = (line / stride, line % stride);
                let mut taps = [0.0; MOST];
                taps[..edge]
                    .iter_mut()
                    .enumerate()
                    .for_each(|(t, v)| *v = values[(outer * edge + t) * stride + inner]);
                let mut to = [0.0; MOST];
                self.filter_transform[axis](&taps[..edge], &mut to);
                to[..points]
                    .iter()
                    .enumerate()
                    .for_each(|(p, v)| next[(outer * points + p) * stride + inner] = *v);
            }
            (values, size[axis]) = (next, points);
        }
        values
    }
}
