//! The convolution by Winograd's minimal filtering, F(2, 3) along each axis (Lavin and Gray 2016).
//!
//! Eight output voxels, 2×2×2, need 64 products for each pair of channels instead of 216: the 4×4×4 input voxels around them and the 27 weights are each transformed to 64
//! values, multiplied one by one, summed over the input channels and transformed back:
//!
//! `Bᵀd = (d₀ - d₂, d₁ + d₂, d₂ - d₁, d₁ - d₃)`, `Gg = (g₀, (g₀ + g₁ + g₂)/2, (g₀ - g₁ + g₂)/2, g₂)`, `Aᵀm = (m₀ + m₁ + m₂, m₁ - m₂ - m₃)`.
//!
//! A unit of work loads its voxels into scratch as the direct kernels do, then goes over its 2×2×2 cells in groups small enough that transformed inputs, weights and products stay in
//! the second-level cache. The weights are transformed in float64.

use super::cpu::{PackedConv, SharedSums, add_row, join_pairs};
use super::kernel::{join, split};
use super::place::{Place, SLAB, Work};
use super::tile::Tiling;
use super::{SyncTarget, Target};
#[cfg(target_arch = "x86_64")]
use crate::device::simd::{Avx2, Avx512, Avx512Bf16};
use crate::device::simd::{Portable, Simd};
use crate::device::{Buffer, Cpu, Isa};
use crate::ops::norm::Sums;
use crate::tensor::Tensor;

/// Values of a cell's transform.
const POINTS: usize = 64;
/// Channels summed in one run before they join the total. The transforms double what rounding does to a sum, so its chains are shorter than the direct kernels'; the
/// additions run beside the multiply-adds of the next run and take no measurable time.
const CHAIN: usize = 8;
/// Most channels, in and out: beyond that the transformed weights fit no cache, and such layers' maps are small.
const MOST: usize = 128;
/// Fewest voxels of a map that pays for the transforms.
const LEAST: usize = 1 << 12;

/// Transformed weights, `[point][out block][in, or pair of them][out of the block]`.
pub struct Weights {
    values: Buffer,
}

/// Whether a layer over `[d, h, w]` runs this way.
pub fn pays(isa: Isa, conv: &PackedConv, [d, h, w]: [usize; 3]) -> bool {
    let (c, outs) = (conv.in_channels(), conv.out_channels());
    let even = d % 2 + h % 2 + w % 2 == 0;
    even && conv.taps == 27
        && c % 16 == 0
        && c <= MOST
        && outs <= MOST
        && outs % kernels(isa, false, outs).out_block == 0
        && d * h * w >= LEAST
}

/// One axis' transform of three weights.
fn spread(g: [f64; 3]) -> [f64; 4] {
    [g[0], (g[0] + g[1] + g[2]) / 2.0, (g[0] - g[1] + g[2]) / 2.0, g[2]]
}

impl Weights {
    /// From a convolution's own.
    pub fn new(cpu: &Cpu, conv: &PackedConv) -> Weights {
        let (c, outs) = (conv.in_channels(), conv.out_channels());
        let (pairs, out_block) = (cpu.pairs(c), kernels(cpu.isa(), false, outs).out_block);
        // One input channel of all outputs at a time: [in][out][point].
        let mut transformed = cpu.take(c * outs * POINTS);
        cpu.chunks_mut(&mut transformed, outs * POINTS, |i, to| {
            for (o, to) in to.chunks_exact_mut(POINTS).enumerate() {
                let mut along_w = [[0.0; 4]; 9];
                for (t, row) in along_w.iter_mut().enumerate() {
                    *row = spread(std::array::from_fn(|k| conv.weight(o, i, t * 3 + k) as f64));
                }
                let mut along_h = [[[0.0; 4]; 4]; 3];
                for (d, plane) in along_h.iter_mut().enumerate() {
                    for w in 0..4 {
                        let column = spread(std::array::from_fn(|h| along_w[d * 3 + h][w]));
                        (0..4).for_each(|h| plane[h][w] = column[h]);
                    }
                }
                for at in 0..16 {
                    let line = spread(std::array::from_fn(|d| along_h[d][at / 4][at % 4]));
                    (0..4).for_each(|d| to[d * 16 + at] = line[d] as f32);
                }
            }
        });
        let mut values = cpu.take(POINTS * c * outs);
        cpu.chunks_mut(&mut values, c * outs, |point, to| {
            for (at, v) in to.iter_mut().enumerate() {
                let (o, i) = (at / (c * out_block) * out_block + at % out_block, at / out_block % c);
                *v = transformed[(i * outs + o) * POINTS + point];
            }
        });
        Weights { values: cpu.lasting(&if pairs { join_pairs(cpu, &values, out_block) } else { values }) }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.values.len() * 4
    }
}

/// What the kernels below read and write; strides are in floats.
struct Cells<'a> {
    /// Scratch, `x` channels a voxel.
    x: usize,
    row: usize,
    plane: usize,
    /// From a point's values of all cells to the next point's.
    points: usize,
    /// Input channels, or pairs of them.
    channels: usize,
    outs: usize,
    out_block: usize,
    weights: &'a [f32],
}

/// Points of one plane of a cell's transform.
const PLANE: usize = 16;

type Gather = unsafe fn(&Cells, *const f32, *mut f32, usize);
type Product = unsafe fn(&Cells, *const f32, *const f32, *mut f32, usize);
type Scatter = unsafe fn(&Cells, *const f32, *mut f32, *const f32, *mut f32, [usize; 3]);

/// Kernels of one instruction set.
#[derive(Clone, Copy)]
struct Kernels {
    /// Entry `d`: plane `d` of `Bᵀ` of the 4×4×4 voxels of so many cells, neighbours along w, from `from` on, all channels of a block, to `to`: a value a point.
    gather: [Gather; 4],
    /// Entry `n` multiplies `n + 1` cells' values of a point by a block of weights, so many times over.
    products: &'static [Product],
    /// Entry `d`: what plane `d` of the products of a block adds to the 2×2×2 voxels, kept in between; the last one stores them, plus bias, from `to` on at
    /// the given strides.
    scatter: [Scatter; 4],
    out_block: usize,
}

#[inline(always)]
unsafe fn back<S: Simd>(d: [S::V; 4]) -> [S::V; 4] {
    unsafe { [S::sub(d[0], d[2]), S::add(d[1], d[2]), S::sub(d[2], d[1]), S::sub(d[1], d[3])] }
}

#[inline(always)]
unsafe fn forth<S: Simd>(m: [S::V; 4]) -> [S::V; 2] {
    unsafe { [S::add(S::add(m[0], m[1]), m[2]), S::sub(S::sub(m[1], m[2]), m[3])] }
}

/// Plane `D` of `Bᵀ` along d of the 4×4 voxels from `from` on, transformed along h. Two cells share it.
#[inline(always)]
unsafe fn column<S: Simd, const D: usize>(s: &Cells, from: *const f32) -> [S::V; 4] {
    let mut line = [unsafe { S::zero() }; 4];
    for (h, v) in line.iter_mut().enumerate() {
        // SAFETY: the caller vouches for the voxels.
        unsafe {
            let at = |d: usize| from.add(d * s.plane + h * s.row);
            *v = match D {
                0 => S::sub(S::load(at(0)), S::load(at(2))),
                1 => S::add(S::load(at(1)), S::load(at(2))),
                2 => S::sub(S::load(at(2)), S::load(at(1))),
                _ => S::sub(S::load(at(1)), S::load(at(3))),
            };
        }
    }
    unsafe { back::<S>(line) }
}

#[inline(always)]
unsafe fn gather<S: Simd, const D: usize>(s: &Cells, from: *const f32, to: *mut f32, cells: usize) {
    // SAFETY: the caller vouches for both ranges.
    unsafe {
        for c in (0..s.x).step_by(S::LANES) {
            let to = to.add(c / S::LANES * S::FACTORS);
            let from = from.add(c);
            let (mut first, mut second) = (column::<S, D>(s, from), column::<S, D>(s, from.add(s.x)));
            for cell in 0..cells {
                let from = from.add((2 * cell + 2) * s.x);
                let (third, fourth) = (column::<S, D>(s, from), column::<S, D>(s, from.add(s.x)));
                for h in 0..4 {
                    let line = back::<S>([first[h], second[h], third[h], fourth[h]]);
                    for (w, v) in line.into_iter().enumerate() {
                        S::store_factors(to.add(cell * s.channels + (h * 4 + w) * s.points), v);
                    }
                }
                (first, second) = (third, fourth);
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
unsafe fn scatter<S: Simd, const D: usize>(
    s: &Cells,
    from: *const f32,
    kept: *mut f32,
    bias: *const f32,
    to: *mut f32,
    [plane, row, voxel]: [usize; 3],
) {
    // SAFETY: the caller vouches for all ranges.
    unsafe {
        for o in (0..s.out_block).step_by(S::LANES) {
            let m = |h: usize, w: usize| S::load(from.add((h * 4 + w) * s.points + o));
            let [mut upper, mut lower] = [[S::zero(); 4]; 2];
            for w in 0..4 {
                [upper[w], lower[w]] = forth::<S>([m(0, w), m(1, w), m(2, w), m(3, w)]);
            }
            let bias = S::load(bias.add(o));
            for (h, line) in [upper, lower].into_iter().enumerate() {
                for (w, v) in forth::<S>(line).into_iter().enumerate() {
                    let near = kept.add((h * 2 + w) * s.outs + o);
                    let far = near.add(4 * s.outs);
                    match D {
                        0 => S::store(near, v),
                        1 => {
                            S::store(near, S::add(S::load(near), v));
                            S::store(far, v);
                        }
                        2 => {
                            S::store(near, S::add(S::load(near), v));
                            S::store(far, S::sub(S::load(far), v));
                        }
                        _ => {
                            let to = to.add(h * row + w * voxel + o);
                            S::store(to, S::add(S::load(near), bias));
                            S::store(to.add(plane), S::add(S::sub(S::load(far), v), bias));
                        }
                    }
                }
            }
        }
    }
}

macro_rules! table {
    ($name:ident, $simd:ty, $registers:literal, $(#[$feature:meta])? [$($v:literal)*]) => {
        fn $name() -> Kernels {
            $(#[$feature])?
            unsafe fn gather_<const D: usize>(s: &Cells, from: *const f32, to: *mut f32, cells: usize) {
                unsafe { gather::<$simd, D>(s, from, to, cells) }
            }
            $(#[$feature])?
            unsafe fn product_<const V: usize>(s: &Cells, x: *const f32, w: *const f32, to: *mut f32, times: usize) {
                unsafe { product::<$simd, V, $registers>(s, x, w, to, times) }
            }
            $(#[$feature])?
            unsafe fn scatter_<const D: usize>(s: &Cells, m: *const f32, kept: *mut f32, bias: *const f32, to: *mut f32, strides: [usize; 3]) {
                unsafe { scatter::<$simd, D>(s, m, kept, bias, to, strides) }
            }
            Kernels {
                gather: [gather_::<0>, gather_::<1>, gather_::<2>, gather_::<3>],
                products: &[$(product_::<$v>),*],
                scatter: [scatter_::<0>, scatter_::<1>, scatter_::<2>, scatter_::<3>],
                out_block: $registers * <$simd as Simd>::LANES,
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

fn kernels(isa: Isa, pairs: bool, outputs: usize) -> Kernels {
    #[cfg(target_arch = "x86_64")]
    match isa {
        Isa::Avx512 if pairs && outputs <= 16 => return bf16_narrow(),
        Isa::Avx512 if pairs => return bf16(),
        Isa::Avx512 if outputs <= 16 => return avx512_narrow(),
        Isa::Avx512 => return avx512(),
        Isa::Avx2 => return avx2(),
        Isa::Portable => {}
    }
    let _ = (isa, pairs, outputs);
    portable()
}

/// Cells of a group, at most, and the values of one point of them all: the transformed weights are read anew for each group, and what it holds is to share the second-level
/// cache with them and the tile.
const GROUP: usize = 84;
const VALUES: usize = 3584;

pub fn conv3d(cpu: &Cpu, x: Work, extent: [usize; 5], conv: &PackedConv, weights: &Weights, want_sums: bool) -> (Tensor, Option<Sums>) {
    let [n, d, h, w, c] = extent;
    let _op = cpu.op("conv3d winograd", || super::cpu::work(extent, conv, 8));
    let tiling = Tiling::even([d, h, w], c, conv.x, SLAB);
    let pairs = cpu.pairs(c);
    let kernels = kernels(cpu.isa(), pairs, conv.out_channels());
    // Floats that hold a cell's values of a point.
    let factors = if pairs { c / 2 } else { c };
    let outputs = conv.out_channels();
    let place = Place::new(cpu, x, extent, &tiling, outputs);
    let units = n * tiling.tiles();
    let mut partial = cpu.wide_zeros(if want_sums { units * outputs * 2 } else { 0 });
    let target = Target { out: place.out, init: None, channels: outputs, voxel: outputs };
    let target = SyncTarget(&target);
    let sums_at = SharedSums(partial.as_mut_ptr());
    let longest = kernels.products.len();
    let group = (VALUES / c.max(outputs)).min(GROUP) / longest * longest;
    // A cache line more, so that the points' values do not fall into the same few sets of the cache.
    let points = group * c.max(outputs) + 16;
    // A point's products may take the place of its values where one block of them is all.
    let apart = factors != outputs || outputs != kernels.out_block;
    place.each(cpu, n, &tiling, 1, |unit| {
        let (item, t) = (unit / tiling.tiles(), unit % tiling.tiles());
        let mut scratch = cpu.take(tiling.scratch());
        // SAFETY: the place sees to it.
        unsafe { tiling.load(cpu.isa(), &place.source, extent, item, t, &mut scratch) };
        let mut values = cpu.take((1 + usize::from(apart)) * PLANE * points + group * 8 * outputs);
        let (values, kept) = values.split_at_mut((1 + usize::from(apart)) * PLANE * points);
        let (values, products) = values.split_at_mut(usize::from(apart) * PLANE * points);
        let ([i0, j0, k0], part) = tiling.part(t, [d, h, w]);
        let row_at = |i: usize, j: usize| (((item * d + i0 + i) * h + j0 + j) * w + k0) * outputs;
        let cells = Cells {
            x: tiling.x,
            row: tiling.row_stride(),
            plane: tiling.plane_stride(),
            points,
            channels: factors,
            outs: outputs,
            out_block: kernels.out_block,
            weights: &weights.values,
        };
        let across = [part[1] / 2, part[2] / 2];
        let count = part[0] / 2 * across[0] * across[1];
        let place = |cell: usize| [cell / across[1] / across[0] * 2, cell / across[1] % across[0] * 2, cell % across[1] * 2];
        let mut first = 0;
        while first < count {
            // Strips of nearly equal length.
            let strips = (count - first).div_ceil(group) * (group / longest);
            let here = ((count - first).div_ceil(strips) * (group / longest)).min(count - first).min(group);
            // SAFETY: cells lie within the tile and its halo, groups within the buffers, results within the rows of this unit.
            unsafe {
                let m = products.as_mut_ptr();
                let x = if apart { values.as_mut_ptr() } else { m };
                for plane in 0..4 {
                    let mut i = 0;
                    while i < here {
                        let [a, b, k] = place(first + i);
                        let run = ((part[2] - k) / 2).min(here - i);
                        let from = a * tiling.plane_stride() + b * tiling.row_stride() + k * tiling.x;
                        for block in 0..tiling.blocks {
                            let from = scratch.as_ptr().add(block * tiling.block_stride() + from);
                            (kernels.gather[plane])(&cells, from, x.add(i * factors + block * tiling.x * factors / c), run);
                        }
                        i += run;
                    }
                    for point in 0..PLANE {
                        let (x, m) = (x.add(point * points), m.add(point * points));
                        for ob in 0..outputs / kernels.out_block {
                            let u = cells.weights[((plane * PLANE + point) * outputs + ob * kernels.out_block) * factors..].as_ptr();
                            let mut at = 0;
                            for (count, size) in split(here, longest) {
                                if count > 0 {
                                    let to = m.add(at * outputs + ob * kernels.out_block);
                                    (kernels.products[size - 1])(&cells, x.add(at * factors), u, to, count);
                                    at += count * size;
                                }
                            }
                        }
                    }
                    for i in 0..here {
                        let [a, b, k] = place(first + i);
                        let to = row_at(a, b) + k * outputs;
                        let strides = [h * w * outputs, w * outputs, outputs];
                        for ob in (0..outputs).step_by(kernels.out_block) {
                            let (from, kept) = (m.add(i * outputs + ob), kept[i * 8 * outputs + ob..].as_mut_ptr());
                            (kernels.scatter[plane])(
                                &cells,
                                from,
                                kept,
                                conv.biases()[ob..].as_ptr(),
                                target.get().out.at(to + ob),
                                strides,
                            );
                        }
                    }
                }
            }
            first += here;
        }
        if want_sums {
            // SAFETY: this unit's rows and sums are its own.
            let to = unsafe { sums_at.slice(unit * outputs * 2, outputs * 2) };
            for (i, j) in (0..part[0]).flat_map(|i| (0..part[1]).map(move |j| (i, j))) {
                let row = unsafe { target.get().out.slice(row_at(i, j), part[2] * outputs) };
                add_row(cpu.isa(), row, outputs, outputs, to);
            }
        }
    });
    let sums = want_sums.then(|| Sums::reduce(&partial, n, outputs, (d * h * w) as f64));
    (Tensor::from_buffer([n, d, h, w, outputs], place.finish()), sums)
}
