//! The kernels: there, the products, and back.

use super::filter::{Axis, Broad, Filters, Form, Kind, MOST, MOST_OUT, Threes, Twos};
use crate::device::Isa;
#[cfg(target_arch = "x86_64")]
use crate::device::simd::{Avx2, Avx512, Avx512Bf16};
use crate::device::simd::{Portable, Simd, prefetch};
use crate::ops::conv3d::kernel::join;

/// Channels summed in one run before they join the total. The transforms double what rounding does to a sum, so its chains are shorter than the direct kernels'; the
/// additions run beside the multiply-adds of the next run and take no measurable time.
const CHAIN: usize = 8;

/// What the kernels below read and write; strides are in floats.
pub struct Cells {
    /// Scratch, `x` channels a voxel.
    pub x: usize,
    pub row: usize,
    pub plane: usize,
    /// From a point's values of all cells to the next point's.
    pub points: usize,
    /// Input channels, or pairs of them.
    pub channels: usize,
    pub outs: usize,
    pub out_block: usize,
    /// From an output voxel to the next along d, h and w, and from what one is added to to the next's.
    pub to: [usize; 3],
    pub init: [usize; 3],
    /// Whether outputs go past the caches.
    pub stream: bool,
    /// Running sums of outputs, then of their squares, a channel each.
    pub sums: *mut f64,
}

type Gather = unsafe fn(&Cells, *const f32, *mut f32, usize);
type Product = unsafe fn(&Cells, *const f32, *const f32, *mut f32, usize);
type Scatter = unsafe fn(&Cells, usize, *const f32, *mut f32, *const f32, *mut f32);

/// Kernels of one instruction set and form.
#[derive(Clone, Copy)]
pub struct Kernels {
    pub form: Form,
    /// Entry `d`: plane `d` of `Bᵀ` of the voxels of so many cells, neighbours along w, from `from` on, all channels of a block, to `to`: a value a point.
    pub gather: &'static [Gather],
    /// Entry `n` multiplies `n + 1` cells' values of a point by a block of weights, so many times over.
    pub products: &'static [Product],
    /// Entry `d`: what plane `d` of the products of a block adds to a cell's voxels, kept in between; whatever is complete goes to its place, on top of what it is added to,
    /// and is counted in the sums from the block's first channel on.
    pub scatter: &'static [Scatter],
    pub out_block: usize,
}

/// Plane `D` of `Bᵀ` along d of a column of voxels from `from` on, transformed along h. Neighbouring cells share it.
#[inline(always)]
unsafe fn column<S: Simd, F: Filters, const D: usize>(s: &Cells, from: *const f32) -> [S::V; MOST] {
    let mut line = [unsafe { S::zero() }; MOST];
    for (h, v) in line.iter_mut().enumerate().take(F::H::POINTS) {
        let mut deep = [unsafe { S::zero() }; MOST];
        for (d, v) in deep.iter_mut().enumerate().take(F::D::POINTS) {
            // SAFETY: the caller vouches for the voxels.
            *v = unsafe { S::load(from.add(d * s.plane + h * s.row)) };
        }
        *v = unsafe { F::D::back::<S>(deep)[D] };
    }
    unsafe { F::H::back::<S>(line) }
}

#[inline(always)]
unsafe fn gather<S: Simd, F: Filters, const D: usize>(s: &Cells, from: *const f32, to: *mut f32, cells: usize) {
    let (inputs, out) = (F::W::POINTS, F::W::OUT);
    // SAFETY: the caller vouches for both ranges.
    unsafe {
        for c in (0..s.x).step_by(S::LANES) {
            let to = to.add(c / S::LANES * S::FACTORS);
            let from = from.add(c);
            let mut columns = [[S::zero(); MOST]; MOST];
            for (w, v) in columns[out..inputs].iter_mut().enumerate() {
                *v = column::<S, F, D>(s, from.add(w * s.x));
            }
            for cell in 0..cells {
                columns.copy_within(out..inputs, 0);
                for (w, v) in columns[..inputs].iter_mut().enumerate().skip(inputs - out) {
                    *v = column::<S, F, D>(s, from.add((cell * out + w) * s.x));
                }
                #[allow(clippy::needless_range_loop)] // down the columns
                for h in 0..F::H::POINTS {
                    let line = F::W::back::<S>(std::array::from_fn(|w| columns[w][h]));
                    for (w, v) in line.into_iter().enumerate().take(inputs) {
                        S::store_factors(to.add(cell * s.channels + (h * inputs + w) * s.points), v);
                    }
                }
            }
        }
    }
}

/// `V` cells at a time, `times` over: with as many, running sums and totals share the registers.
#[inline(always)]
unsafe fn product<S: Simd, const V: usize, const R: usize>(s: &Cells, x: *const f32, w: *const f32, to: *mut f32, times: usize) {
    for time in 0..times {
        // SAFETY: the caller vouches for so many cells of either side and one block of weights.
        unsafe {
            let (x, to) = (x.add(time * V * s.channels), to.add(time * V * s.outs));
            let mut total = [[S::zero(); R]; V];
            for first in (0..s.channels).step_by(CHAIN) {
                let mut acc = [[S::zero(); R]; V];
                for c in first..(first + CHAIN).min(s.channels) {
                    let mut weight = [S::zero(); R];
                    for (r, weight) in weight.iter_mut().enumerate() {
                        *weight = S::load(w.add((c * R + r) * S::LANES));
                    }
                    for (v, acc) in acc.iter_mut().enumerate() {
                        let value = S::splat(x.add(v * s.channels + c));
                        for (a, weight) in acc.iter_mut().zip(weight) {
                            *a = S::fma(value, weight, *a);
                        }
                    }
                }
                join::<S, V, R>(&mut total, &acc);
            }
            for (v, total) in total.iter().enumerate() {
                for (r, a) in total.iter().enumerate() {
                    S::store(to.add(v * s.outs + r * S::LANES), *a);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn scatter<S: Simd, F: Filters, const D: usize>(
    s: &Cells,
    c0: usize,
    from: *const f32,
    kept: *mut f32,
    init: *const f32,
    to: *mut f32,
) {
    // SAFETY: the caller vouches for all ranges.
    unsafe {
        for o in (0..s.out_block).step_by(S::LANES) {
            let mut sums = S::no_sums();
            let mut lines = [[S::zero(); MOST]; MOST_OUT];
            #[allow(clippy::needless_range_loop)] // across the lines
            for w in 0..F::W::POINTS {
                let mut m = [S::zero(); MOST];
                for (h, m) in m.iter_mut().enumerate().take(F::H::POINTS) {
                    *m = S::load(from.add((h * F::W::POINTS + w) * s.points + o));
                }
                let line = F::H::forth::<S>(m);
                for h in 0..F::H::OUT {
                    lines[h][w] = line[h];
                }
            }
            for (h, line) in lines.into_iter().enumerate().take(F::H::OUT) {
                for (w, v) in F::W::forth::<S>(line).into_iter().enumerate().take(F::W::OUT) {
                    for (d, signs) in F::D::SIGNS.iter().enumerate() {
                        if signs[D] == 0 {
                            continue;
                        }
                        let kept = kept.add(((d * F::H::OUT + h) * F::W::OUT + w) * s.outs + o);
                        let at = |strides: [usize; 3]| d * strides[0] + h * strides[1] + w * strides[2] + o;
                        let is_first = signs[..D].iter().all(|s| *s == 0);
                        let v = match (is_first, signs[D] > 0) {
                            (true, _) => v,
                            (false, true) => S::add(S::load(kept), v),
                            (false, false) => S::sub(S::load(kept), v),
                        };
                        if signs[D + 1..].iter().all(|s| *s == 0) {
                            let v = S::add(v, S::load(init.add(at(s.init))));
                            sums = S::count(sums, v);
                            match s.stream {
                                true => S::stream(to.add(at(s.to)), v),
                                false => S::store(to.add(at(s.to)), v),
                            }
                        } else {
                            if is_first {
                                prefetch(init.wrapping_add(at(s.init)));
                            }
                            S::store(kept, v);
                        }
                    }
                }
            }
            let at = s.sums.add(c0 + o);
            S::add_sums(sums, at, at.add(s.outs));
        }
    }
}

/// The kernels of an instruction set: `table!(name, its type, registers of a block, numbers of cells)`.
macro_rules! table {
    ($name:ident, $simd:ty, $registers:literal, $(#[$feature:meta])? [$($v:literal)*]) => {
        fn $name(kind: Kind) -> Kernels {
            $(#[$feature])?
            unsafe fn gather_<F: Filters, const D: usize>(s: &Cells, from: *const f32, to: *mut f32, cells: usize) {
                unsafe { gather::<$simd, F, D>(s, from, to, cells) }
            }
            $(#[$feature])?
            unsafe fn product_<const V: usize>(s: &Cells, x: *const f32, w: *const f32, to: *mut f32, times: usize) {
                unsafe { product::<$simd, V, $registers>(s, x, w, to, times) }
            }
            $(#[$feature])?
            unsafe fn scatter_<F: Filters, const D: usize>(s: &Cells, c0: usize, m: *const f32, kept: *mut f32, init: *const f32, to: *mut f32) {
                unsafe { scatter::<$simd, F, D>(s, c0, m, kept, init, to) }
            }
            let (products, out_block): (&'static [Product], usize) = (&[$(product_::<$v>),*], $registers * <$simd as Simd>::LANES);
            let of = |form: Form, gather: &'static [Gather], scatter: &'static [Scatter]| Kernels { form, gather, products, scatter, out_block };
            match kind {
                Kind::Twos => of(
                    Form::of::<Twos>(),
                    &[gather_::<Twos, 0>, gather_::<Twos, 1>, gather_::<Twos, 2>],
                    &[scatter_::<Twos, 0>, scatter_::<Twos, 1>, scatter_::<Twos, 2>],
                ),
                Kind::Threes => of(
                    Form::of::<Threes>(),
                    &[gather_::<Threes, 0>, gather_::<Threes, 1>, gather_::<Threes, 2>, gather_::<Threes, 3>],
                    &[scatter_::<Threes, 0>, scatter_::<Threes, 1>, scatter_::<Threes, 2>, scatter_::<Threes, 3>],
                ),
                Kind::Broad => of(
                    Form::of::<Broad>(),
                    &[gather_::<Broad, 0>, gather_::<Broad, 1>, gather_::<Broad, 2>, gather_::<Broad, 3>],
                    &[scatter_::<Broad, 0>, scatter_::<Broad, 1>, scatter_::<Broad, 2>, scatter_::<Broad, 3>],
                ),
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
table!(avx512, Avx512, 2, #[target_feature(enable = "avx512f,avx512vl")] [1 2 3 4 5 6 7]);
#[cfg(target_arch = "x86_64")]
table!(avx512_narrow, Avx512, 1, #[target_feature(enable = "avx512f,avx512vl")] [1 2 3 4 5 6 7 8 9 10 11 12 13 14]);
#[cfg(target_arch = "x86_64")]
table!(bf16, Avx512Bf16, 2, #[target_feature(enable = "avx512f,avx512vl,avx512bf16")] [1 2 3 4 5 6 7]);
#[cfg(target_arch = "x86_64")]
table!(bf16_narrow, Avx512Bf16, 1, #[target_feature(enable = "avx512f,avx512vl,avx512bf16")] [1 2 3 4 5 6 7 8 9 10 11 12 13 14]);
#[cfg(target_arch = "x86_64")]
table!(avx2, Avx2, 2, #[target_feature(enable = "avx2,fma")] [1 2 3 4 5 6]);
table!(portable, Portable, 2, [1 2 3 4 5 6]);

/// The kernels for layers of so many outputs.
pub fn of(isa: Isa, pairs: bool, outputs: usize, kind: Kind) -> Kernels {
    #[cfg(target_arch = "x86_64")]
    match isa {
        Isa::Avx512 if pairs && outputs <= 16 => return bf16_narrow(kind),
        Isa::Avx512 if pairs => return bf16(kind),
        Isa::Avx512 if outputs <= 16 => return avx512_narrow(kind),
        Isa::Avx512 => return avx512(kind),
        Isa::Avx2 => return avx2(kind),
        Isa::Portable => {}
    }
    let _ = (isa, pairs, outputs);
    portable(kind)
}
