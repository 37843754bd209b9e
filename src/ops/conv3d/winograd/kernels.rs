//! The kernels: input transform, products and output transform.

use super::filter::{Algorithm, Axis, F2x2, F2x3, F2x3F4x3, Filters, Kind, MOST, MOST_OUT};
use crate::device::Isa;
use crate::device::simd::{Simd, Values, dispatch, opaque, table};
use crate::microkernel::strip::add_tile;

/// The number of cells whose planes are transformed one after another, such that what they load
/// stays in the first-level cache.
const NEAR: usize = 4;

/// What the kernels below read and write; strides are in floats.
pub struct Cells {
    /// Scratch, `ic_block` channels a voxel.
    pub ic_block: usize,
    pub row: usize,
    pub plane: usize,
    /// From a point's values of all cells to the next point's.
    pub points: usize,
    /// From a cell's values of a point to the next cell's, and from its products to the next's.
    pub cell: usize,
    pub out_cell: usize,
    /// Input channels, or pairs of them, and how many are summed in one run before they are added
    /// to the total.
    pub channels: usize,
    pub chain: usize,
    pub outs: usize,
    pub oc_block: usize,
    /// From an output voxel to the next along d, h and w, and the same for the map that the output
    /// is added to.
    pub to: [usize; 3],
    pub init: [usize; 3],
    /// Whether outputs bypass the caches.
    pub stream: bool,
    /// Running sums of outputs, then of their squares, one per channel.
    pub sums: *mut f64,
    /// The sign of each channel's norm, and from a pooled voxel to the next along d, h and w.
    pub signs: *const f32,
    pub pooled: [usize; 3],
}

type Gather = unsafe fn(&Cells, *const f32, *mut f32, usize);
type Product = unsafe fn(&Cells, *const f32, *const f32, *mut f32, usize);
type Scatter = unsafe fn(&Cells, usize, *const f32, *const f32, *mut f32, *mut f32);

/// Kernels of one instruction set and algorithm. A point is one of `[h][w]`: all of d's belong to
/// it.
///
/// # Safety
/// For each kernel: the processor has the instruction set that [`of`] chose it for, as an [`Isa`]
/// says. From the addresses on there is what the kernel reads for the given number of cells, as far
/// apart as [`Cells`] says, and nothing else touches what it writes.
#[derive(Clone, Copy)]
pub struct Kernels {
    pub algorithm: Algorithm,
    /// Writes `Bᵀ` of the voxels of a number of cells, neighbours along w, from `from` on, for all
    /// channels of a block, to `to`: `[point of d][channel]` per cell and point.
    pub gather: Gather,
    /// Entry `n` multiplies `n + 1` cells' values of a point by a block of weights, a given number
    /// of times, and transforms back along d: `[output of d][channel]` per cell.
    pub products: &'static [Product],
    /// Transforms the products of a block to a cell's voxels, adds what they are added to, and
    /// counts them in the sums from the block's first channel on. The second also writes the
    /// largest of each 2×2×2 voxels, or the smallest if the channel's sign is negative.
    pub scatter: [Scatter; 2],
    pub oc_block: usize,
}

/// Plane `D` of `Bᵀ` along d of a column of voxels from `from` on, transformed along h.
/// Neighbouring cells share it.
///
/// # Safety
/// The processor has the instruction set of `S`. From `from` on there are as many rows and planes
/// as a cell has inputs along h and d, one register each.
#[inline(always)]
unsafe fn column<S: Simd, F: Filters, const D: usize>(
    [row, plane]: [usize; 2],
    from: *const f32,
) -> [S::V; MOST] {
    // SAFETY: guaranteed by the caller: the processor has the instructions.
    let mut line = [unsafe { S::zero() }; MOST];
    for (h, v) in line.iter_mut().enumerate().take(F::H::POINTS) {
        // SAFETY: guaranteed by the caller: the processor has the instructions.
        let mut deep = [unsafe { S::zero() }; MOST];
        for (d, v) in deep.iter_mut().enumerate().take(F::D::POINTS) {
            // SAFETY: guaranteed by the caller: `h` and `d` count the rows and planes that are
            // there.
            *v = unsafe { S::load(from.add(d * plane + h * row)) };
        }
        // SAFETY: guaranteed by the caller: the processor has the instructions.
        *v = unsafe { F::D::input_transform::<S>(deep)[D] };
    }
    // SAFETY: guaranteed by the caller: the processor has the instructions.
    unsafe { F::H::input_transform::<S>(line) }
}

/// Plane `D` of the transform of a register of channels, `X` a voxel.
///
/// # Safety
/// As [`gather`].
#[inline(always)]
unsafe fn plane<S: Simd, F: Filters, const D: usize, const X: usize>(
    s: &Cells,
    from: *const f32,
    to: *mut f32,
    cells: usize,
) {
    let (inputs, out) = (F::W::POINTS, F::W::OUT);
    // SAFETY: guaranteed by the caller: the voxels of that many cells, neighbours along w, are from
    // `from` on, and their values at every point have room from `to` on.
    unsafe {
        let to = to.add(D * s.channels);
        let mut columns = [[S::zero(); MOST]; MOST];
        for (w, v) in columns[out..inputs].iter_mut().enumerate() {
            *v = column::<S, F, D>([s.row, s.plane], from.add(w * X));
        }
        for cell in 0..cells {
            // Hidden from the compiler, which would otherwise keep a hundred addresses on the stack
            // instead of adding.
            let (row, plane, points) = (opaque(s.row), opaque(s.plane), opaque(s.points));
            // One by one, as `microkernel` has it.
            for w in out..inputs {
                columns[w - out] = columns[w];
            }
            for (w, v) in columns[..inputs].iter_mut().enumerate().skip(inputs - out) {
                *v = column::<S, F, D>([row, plane], from.add((cell * out + w) * X));
            }
            let mut to = to.add(cell * s.cell);
            #[allow(clippy::needless_range_loop)] // down the columns
            for h in 0..F::H::POINTS {
                let mut line = [S::zero(); MOST];
                for (w, v) in line.iter_mut().enumerate() {
                    *v = columns[w][h];
                }
                let line = F::W::input_transform::<S>(line);
                for (w, v) in line.into_iter().enumerate().take(inputs) {
                    S::store_factors(to.add(w * points), v);
                }
                to = opaque(to.add(inputs * points) as usize) as *mut f32;
            }
        }
    }
}

/// [`Kernels::gather`] in the registers of `S`.
///
/// # Safety
/// As [`Kernels`], the instruction set being that of `S`; voxels have 16 or 32 channels.
#[inline(always)]
unsafe fn gather<S: Simd, F: Filters>(s: &Cells, from: *const f32, to: *mut f32, cells: usize) {
    // SAFETY: passed on from the caller; there are 16 or 32 channels and no others.
    unsafe {
        match s.ic_block {
            32 => gather_from::<S, F, 32>(s, from, to, cells),
            _ => gather_from::<S, F, 16>(s, from, to, cells),
        }
    }
}

/// From voxels of `X` channels.
///
/// # Safety
/// As [`gather`].
#[inline(always)]
unsafe fn gather_from<S: Simd, F: Filters, const X: usize>(
    s: &Cells,
    from: *const f32,
    to: *mut f32,
    cells: usize,
) {
    for c in (0..X).step_by(S::LANES) {
        for first in (0..cells).step_by(NEAR) {
            // SAFETY: guaranteed by the caller, of all `cells`, of which these are some.
            unsafe {
                let (from, to) = (
                    from.add(first * F::W::OUT * X + c),
                    to.add(first * s.cell + c / S::LANES * S::FACTORS),
                );
                let cells = NEAR.min(cells - first);
                plane::<S, F, 0, X>(s, from, to, cells);
                plane::<S, F, 1, X>(s, from, to, cells);
                plane::<S, F, 2, X>(s, from, to, cells);
                if F::D::POINTS > 3 {
                    plane::<S, F, 3, X>(s, from, to, cells);
                }
            }
        }
    }
}

/// The products of `V` cells at a time, `times` times.
///
/// # Safety
/// As [`Kernels`], the instruction set being that of `S`: `times * V` cells' values of a point are
/// from `x` on, a block of its weights from `w` on, and the products have room from `to` on.
#[inline(always)]
unsafe fn product<S: Simd, A: Axis, const V: usize, const R: usize>(
    s: &Cells,
    x: *const f32,
    w: *const f32,
    to: *mut f32,
    times: usize,
) {
    for time in 0..times {
        // SAFETY: guaranteed by the caller, of cells `time * V..(time + 1) * V` and a block of
        // weights.
        unsafe {
            let (mut x, mut w, to) = (x.add(time * V * s.cell), w, to.add(time * V * s.out_cell));
            let [mut near, mut far] = [[[S::zero(); R]; V]; 2];
            for d in 0..A::POINTS {
                let mut first = 0;
                while first < s.channels {
                    let mut acc = [[S::zero(); R]; V];
                    for _ in first..(first + s.chain).min(s.channels) {
                        let mut weight = [S::zero(); R];
                        for (r, weight) in weight.iter_mut().enumerate() {
                            *weight = S::load(w.add(r * S::LANES));
                        }
                        for (v, acc) in acc.iter_mut().enumerate() {
                            let value = S::splat(x.add(v * s.cell));
                            for (r, a) in acc.iter_mut().enumerate() {
                                *a = S::fma(value, weight[r], *a);
                            }
                        }
                        (x, w) = (x.add(1), w.add(R * S::LANES));
                    }
                    match A::SIGNS[0][d] {
                        0 => {}
                        _ => add_tile::<S, V, R>(&mut near, &acc),
                    }
                    match A::SIGNS[1][d] {
                        0 => {}
                        1 => add_tile::<S, V, R>(&mut far, &acc),
                        _ => part::<S, V, R>(&mut far, &acc),
                    }
                    first += s.chain;
                }
            }
            for (d, total) in [near, far].iter().enumerate() {
                for (v, total) in total.iter().enumerate() {
                    for (r, a) in total.iter().enumerate() {
                        S::store(to.add(v * s.out_cell + d * s.outs + r * S::LANES), *a);
                    }
                }
            }
        }
    }
}

/// Subtracts a run's sums from those of a longer one.
///
/// # Safety
/// As the methods of `S`.
#[inline(always)]
unsafe fn part<S: Simd, const V: usize, const R: usize>(
    to: &mut [[S::V; R]; V],
    from: &[[S::V; R]; V],
) {
    for (v, to) in to.iter_mut().enumerate() {
        for (r, to) in to.iter_mut().enumerate() {
            // SAFETY: guaranteed by the caller: the processor has the instructions of `S`.
            *to = unsafe { S::sub(*to, from[v][r]) };
        }
    }
}

/// [`Kernels::scatter`] in the registers of `S`.
///
/// # Safety
/// As [`Kernels`], the instruction set being that of `S`: a cell's products at every point are from
/// `from` on, what they are added to from `init` on, and its voxels have room from `to` on, with
/// `POOL` pooled ones from `pooled` on; the sums, and with `POOL` the signs, reach to the block's
/// last channel.
#[inline(always)]
unsafe fn scatter<S: Simd, F: Filters, const POOL: bool>(
    s: &Cells,
    c0: usize,
    from: *const f32,
    init: *const f32,
    to: *mut f32,
    pooled: *mut f32,
) {
    // SAFETY: guaranteed by the caller: all addresses are within what a cell of `oc_block` channels
    // spans.
    unsafe {
        for o in (0..s.oc_block).step_by(S::LANES) {
            let mut sums = S::no_sums();
            let sign = if POOL { S::load(s.signs.add(c0 + o)) } else { S::zero() };
            let mut most = [[S::zero(); MOST_OUT / 2]; MOST_OUT / 2];
            for d in 0..F::D::OUT {
                let mut lines = [[S::zero(); MOST]; MOST_OUT];
                #[allow(clippy::needless_range_loop)] // across the lines
                for w in 0..F::W::POINTS {
                    let mut m = [S::zero(); MOST];
                    for (h, m) in m.iter_mut().enumerate().take(F::H::POINTS) {
                        *m = S::load(from.add((h * F::W::POINTS + w) * s.points + d * s.outs + o));
                    }
                    let line = F::H::output_transform::<S>(m);
                    for h in 0..F::H::OUT {
                        lines[h][w] = line[h];
                    }
                }
                for (h, line) in lines.into_iter().enumerate().take(F::H::OUT) {
                    for (w, v) in
                        F::W::output_transform::<S>(line).into_iter().enumerate().take(F::W::OUT)
                    {
                        let at = |strides: [usize; 3]| {
                            d * strides[0] + h * strides[1] + w * strides[2] + o
                        };
                        let v = S::add(v, S::load(init.add(at(s.init))));
                        sums = S::count(sums, v);
                        if POOL {
                            let (signed, most) = (S::Whole::mul(v, sign), &mut most[h / 2][w / 2]);
                            *most = if d + h % 2 + w % 2 == 0 {
                                signed
                            } else {
                                S::Whole::max(*most, signed)
                            };
                        }
                        match s.stream {
                            true => S::stream(to.add(at(s.to)), v),
                            false => S::store(to.add(at(s.to)), v),
                        }
                    }
                }
            }
            if POOL {
                for (h, most) in most.into_iter().enumerate().take(F::H::OUT / 2) {
                    for (w, most) in most.into_iter().enumerate().take(F::W::OUT / 2) {
                        let to = pooled.add(h * s.pooled[1] + w * s.pooled[2] + o);
                        let most = S::Whole::mul(most, sign);
                        if s.stream { S::stream(to, most) } else { S::store(to, most) }
                    }
                }
            }
            let at = s.sums.add(c0 + o);
            S::add_sums(sums, at, at.add(s.outs));
        }
    }
}

/// The kernels of filters and a tile of `S`; functions whose names end in an underscore are
/// compiled for it.
macro_rules! kernels_of {
    ($filters:ident, $tile:ident) => {
        Kernels {
            algorithm: Algorithm::of::<$filters>(),
            gather: gather_::<$filters>,
            products: table!(
                Product,
                S::$tile.cells,
                V => product_::<<$filters as Filters>::D, V, { S::$tile.registers }>
            ),
            scatter: [scatter_::<$filters, false>, scatter_::<$filters, true>],
            oc_block: S::$tile.registers * S::LANES,
        }
    };
}

/// The kernels for layers of `outputs` outputs, whose channels are pairs if the [`Isa`] says so.
/// Output blocks are the same with pairs and without.
pub fn of(isa: Isa, outputs: usize, kind: Kind) -> Kernels {
    dispatch! { isa, S: Simd, {
        /// # Safety
        /// As [`gather`].
        unsafe fn gather_<F: Filters>(s: &Cells, from: *const f32, to: *mut f32, cells: usize) {
            // SAFETY: guaranteed by the caller.
            unsafe { gather::<S, F>(s, from, to, cells) }
        }
        /// # Safety
        /// As [`product`].
        unsafe fn product_<A: Axis, const V: usize, const R: usize>(
            s: &Cells,
            x: *const f32,
            w: *const f32,
            to: *mut f32,
            times: usize,
        ) {
            // SAFETY: guaranteed by the caller.
            unsafe { product::<S, A, V, R>(s, x, w, to, times) }
        }
        /// # Safety
        /// As [`scatter`].
        unsafe fn scatter_<F: Filters, const POOL: bool>(
            s: &Cells,
            c0: usize,
            from: *const f32,
            init: *const f32,
            to: *mut f32,
            pooled: *mut f32,
        ) {
            // SAFETY: guaranteed by the caller.
            unsafe { scatter::<S, F, POOL>(s, c0, from, init, to, pooled) }
        }
    } =>
    match (kind, outputs <= S::LANES) {
        (Kind::F2x2, true) => kernels_of!(F2x2, NARROW),
        (Kind::F2x2, false) => kernels_of!(F2x2, WIDE),
        (Kind::F2x3, true) => kernels_of!(F2x3, NARROW),
        (Kind::F2x3, false) => kernels_of!(F2x3, WIDE),
        (Kind::F2x3F4x3, true) => kernels_of!(F2x3F4x3, NARROW),
        (Kind::F2x3F4x3, false) => kernels_of!(F2x3F4x3, WIDE),
    } }
}
