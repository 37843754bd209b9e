//! What is done to a row of voxels on its way into scratch: norm, activation, adding a map, the
//! largest of neighbours.
//!
//! Where channels fill registers, a pass holds the norm's coefficients of a few channels and goes
//! along the row; the remaining channels take plain loops.

use super::item_norm::ItemNorm;
use crate::device::Isa;
use crate::device::simd::{self, Values, dispatch, multiversion};
use std::ops::Range;

/// A pass along a row of voxels.
struct Pass<'a> {
    /// The first channel of the first voxel, and that of the map to add, or null.
    x: *const f32,
    add: *const f32,
    /// Channels of a voxel.
    c: usize,
    /// The norm, and the first channel.
    norm: Option<&'a ItemNorm>,
    c0: usize,
    /// The number of voxels to write, their destination, and the floats from one to the next.
    voxels: usize,
    out: *mut f32,
    stride: usize,
    /// For pooled voxels: whether nothing has been written yet.
    first: bool,
}

/// Writes `R` registers of channels of each voxel, or of the larger of each pair of voxels and the
/// value already there.
///
/// # Safety
/// The processor has the instruction set of `S`. `x`, and `add` with `ADD`, hold `voxels` voxels,
/// twice as many with `POOL`, `c` floats apart; the norm, with `NORM`, has the channels from `c0`
/// on; `out` has room for the voxels, `stride` floats apart, and nothing else touches them. Of
/// each, `R` registers are used.
#[inline(always)]
unsafe fn pass<S: Values, const R: usize, const NORM: bool, const ADD: bool, const POOL: bool>(
    p: &Pass,
) {
    // SAFETY: guaranteed by the caller: the processor has the instructions, and the row, the norm's
    // channels and the output are as large as `voxels` and `R` require.
    unsafe {
        let [mut mean, mut scale, mut shift] = [[S::zero(); R]; 3];
        let mut slope = S::zero();
        if let (true, Some(norm)) = (NORM, p.norm) {
            for r in 0..R {
                let at = p.c0 + r * S::LANES;
                mean[r] = S::load(norm.mean.as_ptr().add(at));
                scale[r] = S::load(norm.scale.as_ptr().add(at));
                shift[r] = S::load(norm.shift.as_ptr().add(at));
            }
            slope = S::splat(&norm.slope);
        }
        for k in 0..p.voxels {
            for r in 0..R {
                let to = p.out.add(k * p.stride + r * S::LANES);
                let mut most = S::zero();
                for q in 0..1 + usize::from(POOL) {
                    let at = (k * (1 + usize::from(POOL)) + q) * p.c + r * S::LANES;
                    let mut v = S::load(p.x.add(at));
                    if NORM {
                        v = S::leaky(S::mul_add(S::sub(v, mean[r]), scale[r], shift[r]), slope);
                    }
                    if ADD {
                        v = S::add(v, S::load(p.add.add(at)));
                    }
                    most = if q == 0 { v } else { S::max(most, v) };
                }
                if POOL && !p.first {
                    most = S::max(most, S::load(to));
                }
                S::store(to, most);
            }
        }
    }
}

/// Calls [`pass`] with the parts that are present.
///
/// # Safety
/// As for [`pass`], for `add` unless it is null, and for the norm if there is one.
#[inline(always)]
unsafe fn any_pass<S: Values, const R: usize, const POOL: bool>(p: &Pass) {
    // SAFETY: passed on from the caller; parts that are absent are not used.
    unsafe {
        match (p.norm.is_some(), !p.add.is_null()) {
            (false, false) => pass::<S, R, false, false, POOL>(p),
            (false, true) => pass::<S, R, false, true, POOL>(p),
            (true, false) => pass::<S, R, true, false, POOL>(p),
            (true, true) => pass::<S, R, true, true, POOL>(p),
        }
    }
}

/// The passes of an instruction set, with one and with two registers.
fn passes<const POOL: bool>(isa: Isa) -> [unsafe fn(&Pass); 2] {
    dispatch! { isa, S: Values, {
        /// # Safety
        /// As [`any_pass`].
        unsafe fn compiled<const R: usize, const POOL: bool>(p: &Pass) {
            // SAFETY: guaranteed by the caller.
            unsafe { any_pass::<S, R, POOL>(p) }
        }
    } =>
    [compiled::<1, POOL>, compiled::<2, POOL>] }
}

/// A row of voxels `[w][c]`, a map to add, and the norm of its channels.
struct Row<'a> {
    x: &'a [f32],
    add: Option<&'a [f32]>,
    norm: Option<&'a ItemNorm>,
    c: usize,
}

impl Row<'_> {
    /// Passes over some channels of `voxels` voxels, or with `POOL` of as many pairs. The first
    /// channel of the first voxel goes to the beginning of `out`, that of the next voxel `stride`
    /// floats further on.
    ///
    /// `registers` whole registers at a time: as [`registers`] found for this number of channels.
    fn run<const POOL: bool>(
        &self,
        isa: Isa,
        registers: usize,
        channels: Range<usize>,
        voxels: usize,
        (out, stride): (&mut [f32], usize),
        first: bool,
    ) {
        if voxels == 0 {
            return;
        }
        let (count, at_once) = (channels.len(), registers * simd::lanes(isa));
        let read = voxels * (1 + usize::from(POOL)) * self.c;
        assert!(channels.end <= self.c && count.is_multiple_of(at_once));
        assert!(self.x.len() >= read && self.add.is_none_or(|add| add.len() >= read));
        assert!(self.norm.is_none_or(|norm| norm.channels() == self.c));
        assert!(out.len() >= (voxels - 1) * stride + count);
        let pass = passes::<POOL>(isa)[registers - 1];
        for part in (0..count).step_by(at_once) {
            let c0 = channels.start + part;
            // SAFETY: the Isa was made by asking the processor. As just asserted, channels
            // `c0..c0 + at_once` of each voxel lie within the row, the map to add and the norm, and
            // `part..part + at_once` of each within the output.
            unsafe {
                pass(&Pass {
                    x: self.x.as_ptr().add(c0),
                    add: self.add.map_or(std::ptr::null(), |add| add.as_ptr().add(c0)),
                    c: self.c,
                    norm: self.norm,
                    c0,
                    voxels,
                    out: out.as_mut_ptr().add(part),
                    stride,
                    first,
                });
            }
        }
    }
}

/// The number of registers of the passes over blocks of `block` channels; none if no register fits.
fn registers(isa: Isa, block: usize) -> Option<usize> {
    [2, 1].into_iter().find(|r| block.is_multiple_of(r * simd::lanes(isa)))
}

/// Folds one of the four rows under a row of pooled voxels into `out` `[w][c]`; the `first`
/// overwrites what is there.
pub(crate) fn pool_row(
    isa: Isa,
    x: &[f32],
    add: Option<&[f32]>,
    norm: Option<&ItemNorm>,
    c: usize,
    first: bool,
    out: &mut [f32],
) {
    let Some(r) = registers(isa, c) else {
        return pool_row_plainly(isa, x, add, norm, c, first, out);
    };
    let voxels = out.len() / c;
    Row { x, add, norm, c }.run::<true>(isa, r, 0..c, voxels, (out, c), first);
}

/// Writes a row `[w][c]` into the blocks of scratch, normalised, with zeros where there is padding
/// and after the last channel.
pub(crate) fn scatter_row(
    isa: Isa,
    x: &[f32],
    add: Option<&[f32]>,
    norm: Option<&ItemNorm>,
    c: usize,
    place: ScratchRow,
    scratch: &mut [f32],
) {
    let block = place.ic_block;
    let Some(r) = registers(isa, block).filter(|_| c.is_multiple_of(block)) else {
        return scatter_row_plainly(isa, x, add, norm, c, place, scratch);
    };
    let voxels = x.len() / c;
    for (b, c0) in (0..c).step_by(block).enumerate() {
        let body = place.body(b, voxels, scratch);
        let channels = c0..c0 + block;
        Row { x, add, norm, c }.run::<false>(isa, r, channels, voxels, (body, block), true);
    }
}

/// Writes some channels of a voxel, from `c0` on, to `out`: the norm of them, plus the map to add.
/// Their place in the row and in that map is `at`.
#[inline(always)]
fn load_plainly<const FUSED: bool>(
    x: &[f32],
    add: Option<&[f32]>,
    norm: Option<&ItemNorm>,
    at: usize,
    c0: usize,
    out: &mut [f32],
) {
    let n = out.len();
    let x = &x[at..][..n];
    match norm {
        Some(norm) => norm.run::<FUSED>(x, c0, out),
        None => out.copy_from_slice(x),
    }
    if let Some(add) = add {
        let add = &add[at..][..n];
        for q in 0..n {
            out[q] += add[q];
        }
    }
}

multiversion! {
    /// Folds one of the four rows under a row of pooled voxels into `out` `[w][c]`.
    fn pool_row_plainly(
        x: &[f32],
        add: Option<&[f32]>,
        norm: Option<&ItemNorm>,
        c: usize,
        first: bool,
        out: &mut [f32],
    ) {
        let mut value = vec![0.0; c];
        for (k, out) in out.chunks_exact_mut(c).enumerate() {
            if first {
                out.fill(f32::NEG_INFINITY);
            }
            for v in [2 * k, 2 * k + 1] {
                load_plainly::<FUSED>(x, add, norm, v * c, 0, &mut value);
                let value = &value[..c];
                for q in 0..c {
                    out[q] = out[q].max(value[q]);
                }
            }
        }
    }
}

/// The place of a row in scratch.
#[derive(Clone, Copy)]
pub(crate) struct ScratchRow {
    pub at: usize,
    pub block_stride: usize,
    pub ic_block: usize,
    /// Voxels of padding before and after the row.
    pub padding: [usize; 2],
}

impl ScratchRow {
    /// Where the voxels of the row are in block `b`. The padding around them is set to zero.
    fn body<'a>(&self, b: usize, voxels: usize, scratch: &'a mut [f32]) -> &'a mut [f32] {
        let ([before, behind], block) = (self.padding, self.ic_block);
        let row =
            &mut scratch[b * self.block_stride + self.at..][..(before + voxels + behind) * block];
        let (head, rest) = row.split_at_mut(before * block);
        let (body, tail) = rest.split_at_mut(voxels * block);
        head.fill(0.0);
        tail.fill(0.0);
        body
    }
}

multiversion! {
    /// Writes a row `[w][c]` into the blocks of scratch, normalised, with zeros where there is
    /// padding and after the last channel.
    fn scatter_row_plainly(
        x: &[f32],
        add: Option<&[f32]>,
        norm: Option<&ItemNorm>,
        c: usize,
        place: ScratchRow,
        scratch: &mut [f32],
    ) {
        for (b, c0) in (0..c).step_by(place.ic_block).enumerate() {
            let n = place.ic_block.min(c - c0);
            let body = place.body(b, x.len() / c, scratch);
            for (k, out) in body.chunks_exact_mut(place.ic_block).enumerate() {
                let (out, zero) = out.split_at_mut(n);
                zero.fill(0.0);
                load_plainly::<FUSED>(x, add, norm, k * c + c0, c0, out);
            }
        }
    }
}

multiversion! {
    /// Writes a row `[w][c]` into the blocks of scratch in pairs of channels, normalised, with
    /// zeros where there is padding and after the last channel.
    pub(crate) fn scatter_bf16_pairs(
        x: &[f32],
        add: Option<&[f32]>,
        norm: Option<&ItemNorm>,
        c: usize,
        place: ScratchRow,
        scratch: &mut [f32],
    ) {
        for (b, c0) in (0..c).step_by(2 * place.ic_block).enumerate() {
            let n = (2 * place.ic_block).min(c - c0);
            let body = place.body(b, x.len() / c, scratch);
            let mut value = [0.0f32; 32];
            for (k, out) in body.chunks_exact_mut(place.ic_block).enumerate() {
                load_plainly::<FUSED>(x, add, norm, k * c + c0, c0, &mut value[..n]);
                for (q, out) in out.iter_mut().enumerate() {
                    *out = simd::pair(value[2 * q], value[2 * q + 1]);
                }
            }
        }
    }
}
