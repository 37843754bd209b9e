//! Strips: the innermost loops of convolutions and dense layers.
//!
//! A *strip* is `V` neighbouring output voxels by one block of output channels (two or four
//! registers), held in registers over the whole reduction: for each input block, tap and input
//! channel, the weights are loaded once and each voxel's input value is broadcast against them.
//! With AVX-512, 13 voxels by 32 channels keep 26 accumulators busy, which hides the latency of the
//! multiply-add and needs 15 loads for 26 of them.

use crate::device::Isa;
use crate::device::simd::{Simd, dispatch, table};

/// Products summed in one run before they are added to the total. A single run over all 27 × 32
/// products would lose two bits more than PyTorch does: rounding errors grow with the length of a
/// chain, so chains are kept short and are combined in three levels.
const CHAIN: usize = 32;
/// Runs that are combined before they are added to the total. Measured against the reference, a
/// layer's error relative to that with 5 runs is 1.4 times with 1, 1.2 times with 2, 1.05 with 3,
/// 0.96 with 8, and 0.9 without a limit; stages of the network at 128³ differ by 9 % at most, and
/// no difference in its time can be measured.
const JOIN: usize = 5;

/// The most voxels of a strip of one tap: as many as leave room in the registers for combining its
/// runs.
pub const DENSE: usize = 8;

/// What a strip reads and writes. Strides are in floats.
pub struct MicrokernelArgs {
    /// The first voxel's values in the scratch tile: input block 0, tap offset 0.
    pub x: *const f32,
    /// How many blocks of input channels to reduce over.
    pub blocks: usize,
    /// From one input block's tile to the next.
    pub block_stride: usize,
    /// The offset of each tap relative to the voxel.
    pub taps: *const isize,
    /// How many taps.
    pub tap_count: usize,
    /// Weights `[blocks][taps][input channels of a block][output channels of a block]`.
    pub weights: *const f32,
    /// Initial values of the first voxel: a bias (stride 0), a partial sum or a skip map.
    pub init: *const f32,
    /// From one voxel's initial values to the next voxel's.
    pub init_stride: usize,
    /// The first voxel's output.
    pub out: *mut f32,
    /// From one voxel's output to the next voxel's.
    pub out_stride: usize,
    /// Where the sums of each output channel's values, and then those of their squares, are added;
    /// null for nowhere.
    pub sums: *mut f64,
    /// Whether outputs go past the caches, to addresses aligned to registers.
    pub stream: bool,
}

impl MicrokernelArgs {
    /// One tap, without sums: the fields that dense layers leave as they are.
    pub const DENSE: MicrokernelArgs = MicrokernelArgs {
        x: std::ptr::null(),
        blocks: 0,
        block_stride: 0,
        taps: &0,
        tap_count: 1,
        weights: std::ptr::null(),
        init: std::ptr::null(),
        init_stride: 0,
        out: std::ptr::null_mut(),
        out_stride: 0,
        sums: std::ptr::null_mut(),
        stream: false,
    };
}

/// A compiled strip for a fixed number of voxels.
///
/// # Safety
/// The processor has the instruction set that [`kernels`] chose it for, as an [`Isa`] says.
/// Whatever the fields of [`MicrokernelArgs`] span can be read, and nothing else touches what `out`
/// and `sums` span.
pub type Kernel = unsafe fn(&MicrokernelArgs);

/// The strips of one instruction set and one width of input block.
#[derive(Clone, Copy)]
pub struct Kernels {
    /// Entry `v` computes `v + 1` voxels.
    pub microkernels: &'static [Kernel],
    /// Output channels of a block.
    pub oc_block: usize,
}

/// Adds a run's sums to those of a longer one.
///
/// # Safety
/// As the methods of `S`.
#[inline(always)]
pub(crate) unsafe fn add_tile<S: Simd, const V: usize, const R: usize>(
    to: &mut [[S::V; R]; V],
    from: &[[S::V; R]; V],
) {
    for (v, to) in to.iter_mut().enumerate() {
        for (r, to) in to.iter_mut().enumerate() {
            // SAFETY: guaranteed by the caller: the processor has the instructions of `S`.
            *to = unsafe { S::add(*to, from[v][r]) };
        }
    }
}

/// A strip in the registers of `S`: `V` voxels, `R` registers, `X` floats of an input block.
///
/// # Safety
/// As [`Kernel`], the instruction set being that of `S`.
#[inline(always)]
unsafe fn strip<S: Simd, const V: usize, const R: usize, const X: usize>(s: &MicrokernelArgs) {
    // SAFETY: guaranteed by the caller: the processor has the instructions, and every address lies
    // in what the fields span: `V` voxels of `R` registers, `blocks` of `tap_count` taps of `X`
    // floats.
    unsafe {
        let mut total = [[S::zero(); R]; V];
        for (v, t) in total.iter_mut().enumerate() {
            for (r, t) in t.iter_mut().enumerate() {
                *t = S::load(s.init.add(v * s.init_stride + r * S::LANES));
            }
        }
        let mut w = s.weights;
        let mut some = [[S::zero(); R]; V];
        // Taps of one run, and runs that joined since the total last grew.
        let (run, mut joined) = ((CHAIN / X).max(1), 0);
        for block in 0..s.blocks {
            let x_block = s.x.add(block * s.block_stride);
            let mut t0 = 0;
            while t0 < s.tap_count {
                let mut acc = if X == 1 { total } else { [[S::zero(); R]; V] };
                for t in t0..(t0 + run).min(s.tap_count) {
                    let x = x_block.offset(*s.taps.add(t));
                    for c in 0..X {
                        let mut weight = [S::zero(); R];
                        for (r, weight) in weight.iter_mut().enumerate() {
                            *weight = S::load(w.add(r * S::LANES));
                        }
                        w = w.add(R * S::LANES);
                        for (v, a) in acc.iter_mut().enumerate() {
                            let value = S::splat(x.add(v * X + c));
                            for (r, a) in a.iter_mut().enumerate() {
                                *a = S::fma(value, weight[r], *a);
                            }
                        }
                    }
                }
                if X == 1 {
                    // One channel: the chain is no longer than the taps.
                    (total, t0) = (acc, t0 + run);
                    continue;
                }
                add_tile::<S, V, R>(&mut some, &acc);
                (t0, joined) = (t0 + run, joined + 1);
                if joined == JOIN {
                    add_tile::<S, V, R>(&mut total, &some);
                    (some, joined) = ([[S::zero(); R]; V], 0);
                }
            }
        }
        add_tile::<S, V, R>(&mut total, &some);
        for (v, t) in total.iter().enumerate() {
            for (r, t) in t.iter().enumerate() {
                let to = s.out.add(v * s.out_stride + r * S::LANES);
                if s.stream { S::stream(to, *t) } else { S::store(to, *t) }
            }
        }
        if !s.sums.is_null() {
            let mut sums = [S::no_sums(); R];
            for t in &total {
                for (r, sums) in sums.iter_mut().enumerate() {
                    *sums = S::count(*sums, t[r]);
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                S::add_sums(*sums, s.sums.add(r * S::LANES), s.sums.add((R + r) * S::LANES));
            }
        }
    }
}

/// The strips of a tile of `S`, compiled by `one`.
macro_rules! strips {
    ($tile:ident, $ic_block:expr) => {
        Kernels {
            microkernels: match $ic_block {
                1 => table!(Kernel, S::$tile.strip, V => one::<V, { S::$tile.registers }, 1>),
                8 => table!(Kernel, S::$tile.strip, V => one::<V, { S::$tile.registers }, 8>),
                16 => table!(Kernel, S::$tile.strip, V => one::<V, { S::$tile.registers }, 16>),
                _ => table!(Kernel, S::$tile.strip, V => one::<V, { S::$tile.registers }, 32>),
            },
            oc_block: S::$tile.registers * S::LANES,
        }
    };
}

/// Input channels that one block of the reduction holds, for a layer of `channels`: 1, 8, 16 or 32.
pub fn ic_block(channels: usize) -> usize {
    match channels {
        1 => 1,
        c if c % 32 == 0 || c > 64 => 32,
        c if c % 16 == 0 => 16,
        _ => 8,
    }
}

/// The strips for an instruction set, an input block of `ic_block` floats (1, 8, 16 or 32), which
/// are channels, or pairs of them if the [`Isa`] says so, and a layer of `outputs`. Output blocks
/// are the same with pairs and without.
pub fn kernels(isa: Isa, ic_block: usize, outputs: usize) -> Kernels {
    dispatch! { isa, S: Simd, {
        /// # Safety
        /// As [`Kernel`].
        unsafe fn one<const V: usize, const R: usize, const X: usize>(s: &MicrokernelArgs) {
            // SAFETY: guaranteed by the caller.
            unsafe { strip::<S, V, R, X>(s) }
        }
    } =>
    if outputs <= S::LANES { strips!(NARROW, ic_block) } else { strips!(WIDE, ic_block) } }
}

/// Splits a row of `length` voxels into strips of nearly equal length, none longer than `longest`:
/// the lengths' (count, size) of the longer ones, then of the rest, each one shorter.
pub fn split(length: usize, longest: usize) -> [(usize, usize); 2] {
    let strips = length.div_ceil(longest);
    let size = length.div_ceil(strips.max(1));
    let short = strips * size - length;
    [(strips - short, size), (short, size.saturating_sub(1))]
}
