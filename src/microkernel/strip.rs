//! Strips: the innermost loops of convolutions and dense layers.
//!
//! A *strip* is `V` neighbouring output voxels by one block of output channels (two or four
//! registers), held in registers over the whole reduction: for each input block, tap and input
//! channel, the weights are loaded once and each voxel's input value is broadcast against them.
//! With AVX-512, 13 voxels by 32 channels keep 26 accumulators busy, which hides the latency of the
//! multiply-add and needs 15 loads for 26 of them.

#[cfg(target_arch = "x86_64")]
use crate::device::Level;
#[cfg(target_arch = "x86_64")]
use crate::device::simd::{Avx2, Avx512, Avx512Bf16};
use crate::device::simd::{Portable, Simd};
use crate::device::{Isa, features};

/// Products summed in one run before they join the total. A single run over all 27 × 32 products
/// would lose two bits more than PyTorch does: rounding errors grow with the length of a chain, so
/// chains are kept short and join in three levels.
const CHAIN: usize = 32;
/// Runs that join before they are added to the total.
const JOIN: usize = 5;

/// Voxels of a strip of one tap, at most: as many as leave room in the registers for what its runs
/// join.
pub const DENSE: usize = 8;

/// What a strip reads and writes. Strides are in floats.
pub struct MicrokernelArgs {
    /// The first voxel's values in the scratch tile: input block 0, tap offset 0.
    pub x: *const f32,
    /// How many blocks of input channels to reduce over.
    pub blocks: usize,
    /// From one input block's tile to the next.
    pub block_stride: usize,
    /// Where each tap lies relative to the voxel.
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
    /// Where the sums of each output channel's values, then those of their squares, are added to;
    /// null for nowhere.
    pub sums: *mut f64,
    /// Whether outputs go past the caches, to addresses aligned to registers.
    pub stream: bool,
}

impl MicrokernelArgs {
    /// One tap, nothing counted: what dense layers leave as it is.
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
/// The processor has the instruction set that [`kernels`] or [`pair_kernels`] chose it for: an
/// [`Isa`] says so, of pairs [`Isa::has_bf16`]. Whatever the fields of [`MicrokernelArgs`] span can
/// be read, and nothing else touches what `out` and `sums` span.
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
    for (to, from) in to.iter_mut().zip(from) {
        for (to, from) in to.iter_mut().zip(from) {
            // SAFETY: guaranteed by the caller: the processor has the instructions of `S`.
            *to = unsafe { S::add(*to, *from) };
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
                            for (a, weight) in a.iter_mut().zip(weight) {
                                *a = S::fma(value, weight, *a);
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
                for (sums, t) in sums.iter_mut().zip(t) {
                    *sums = S::count(*sums, *t);
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                S::add_sums(*sums, s.sums.add(r * S::LANES), s.sums.add((R + r) * S::LANES));
            }
        }
    }
}

/// Makes the table of strips of 1 to N voxels for one instruction set: `table!(name, its list of
/// features, its type, registers of a block, numbers of voxels)`.
macro_rules! table {
    ($name:ident, $features:ident, $simd:ty, $registers:literal, [$($v:literal)*]) => {
        fn $name(ic_block: usize) -> Kernels {
            features! { enable $features;
                /// # Safety
                /// As [`Kernel`].
                unsafe fn one<const V: usize, const X: usize>(s: &MicrokernelArgs) {
                    // SAFETY: guaranteed by the caller; this is compiled for the instructions of
                    // the type.
                    unsafe { strip::<$simd, V, $registers, X>(s) }
                }
            }
            let microkernels: &'static [Kernel] = match ic_block {
                1 => &[$(one::<$v, 1>),*],
                8 => &[$(one::<$v, 8>),*],
                16 => &[$(one::<$v, 16>),*],
                _ => &[$(one::<$v, 32>),*],
            };
            Kernels { microkernels, oc_block: $registers * <$simd as Simd>::LANES }
        }
    };
}

#[cfg(target_arch = "x86_64")]
table!(avx512, avx512, Avx512, 2, [1 2 3 4 5 6 7 8 9 10 11 12 13]);
// Sixteen output channels or fewer fill one register: with two, half of the work would be thrown
// away.
#[cfg(target_arch = "x86_64")]
table!(avx512_narrow, avx512, Avx512, 1, [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16]);
#[cfg(target_arch = "x86_64")]
table!(avx2, avx2, Avx2, 2, [1 2 3 4 5 6]);
// Two channels at a time: blocks of 32 and 16 channels are 16 and 8 pairs.
#[cfg(target_arch = "x86_64")]
table!(bf16, bf16, Avx512Bf16, 2, [1 2 3 4 5 6 7 8 9 10 11 12 13]);
#[cfg(target_arch = "x86_64")]
table!(bf16_narrow, bf16, Avx512Bf16, 1, [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16]);
table!(portable, portable, Portable, 2, [1 2 3 4 5]);

/// Input channels that one block of the reduction holds, for a layer of `channels`: 1, 8, 16 or 32.
pub fn ic_block(channels: usize) -> usize {
    match channels {
        1 => 1,
        c if c % 32 == 0 || c > 64 => 32,
        c if c % 16 == 0 => 16,
        _ => 8,
    }
}

/// The strips for an instruction set, an input block of `ic_block` channels (1, 8, 16 or 32) and a
/// layer of `outputs`.
pub fn kernels(isa: Isa, ic_block: usize, outputs: usize) -> Kernels {
    let _ = outputs;
    #[cfg(target_arch = "x86_64")]
    match isa.level() {
        Level::Avx512 if outputs <= 16 => return avx512_narrow(ic_block),
        Level::Avx512 => return avx512(ic_block),
        Level::Avx2 => return avx2(ic_block),
        Level::Portable => {}
    }
    let _ = isa;
    portable(ic_block)
}

/// The strips over pairs of bfloat16, `ic_block` pairs an input block (8 or 16), of a processor
/// that has AVX512-BF16; output blocks are those of [`kernels`].
pub fn pair_kernels(ic_block: usize, outputs: usize) -> Kernels {
    #[cfg(target_arch = "x86_64")]
    return if outputs <= 16 { bf16_narrow(ic_block) } else { bf16(ic_block) };
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("no such processor has pairs: ic_block {ic_block}, outputs {outputs}");
}

/// Splits a row of `length` voxels into strips of nearly equal length, none longer than `longest`:
/// the lengths' (count, size) of the longer ones, then of the rest, each one shorter.
pub fn split(length: usize, longest: usize) -> [(usize, usize); 2] {
    let strips = length.div_ceil(longest);
    let size = length.div_ceil(strips.max(1));
    let short = strips * size - length;
    [(strips - short, size), (short, size.saturating_sub(1))]
}
