//! Softmax attention of many queries to many keys on the CPU, after FlashAttention (Dao et al.
//! 2022): keys are streamed in tiles, each query keeps its largest score so far, the sum of weights
//! relative to it and the weighted sum of values, and no score is kept after its tile. Both
//! products run on the convolutions' strips.

use super::core::Rows;
use crate::device::simd::{Values, dispatch};
use crate::device::{Cpu, DisjointWriter, Isa};
use crate::microkernel::pack::pack_weights;
use crate::microkernel::strip::{self, Kernels, MicrokernelArgs, split};

/// Queries of a unit of work.
pub(super) const QUERIES: usize = 64;
/// Approximate number of keys of a tile: their scores for a unit's queries fit close to the
/// first-level cache, with keys and values.
const TILE: usize = 256;

/// Queries `[queries]`, keys and values `[keys]` of several heads, each in its own `dim` channels
/// of rows of `heads * dim`.
#[derive(Clone, Copy)]
pub(super) struct Problem<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub heads: usize,
    pub dim: usize,
    pub scale: f32,
}

/// How keys and values are laid out.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    keys: usize,
    dim: usize,
    scores: Kernels,
    values: Kernels,
    /// Channels of a block of the scores' reduction.
    ic_block: usize,
}

impl Layout {
    /// The layout for `keys` keys of a head of `dim` channels.
    pub fn new(cpu: &Cpu, keys: usize, dim: usize) -> Layout {
        let ic_block = strip::ic_block(dim).max(8);
        let scores = strip::kernels(cpu.isa(), ic_block, 64);
        // Values whose channels do not fill wide blocks run in narrow ones.
        let values = strip::kernels(
            cpu.isa(),
            scores.oc_block,
            if dim.is_multiple_of(32) { dim } else { 16 },
        );
        Layout { keys, dim, scores, values, ic_block }
    }

    /// Floats of a head, laid out.
    pub fn size(&self) -> usize {
        self.sizes().iter().sum()
    }

    /// Keys of a block.
    pub fn block(&self) -> usize {
        self.scores.oc_block
    }

    /// Blocks of keys.
    pub fn key_blocks(&self) -> usize {
        self.keys.div_ceil(self.block())
    }

    /// Floats of a block's keys.
    fn key_block(&self) -> usize {
        self.dim.next_multiple_of(self.ic_block) * self.block()
    }

    /// Channels of the values, whole blocks.
    fn width(&self) -> usize {
        self.dim.next_multiple_of(self.values.oc_block)
    }

    /// Floats of a head's keys, then of its values.
    fn sizes(&self) -> [usize; 2] {
        [self.key_blocks() * self.key_block(), self.key_blocks() * self.block() * self.width()]
    }
}

/// Lays a head's keys out as `[key block][channel][key]` and its values as
/// `[block of channels][key][channel]`, zeros after the last of either.
///
/// # Safety
/// `k` and `v` are as many rows as the layout has keys, of as many channels as its heads have.
pub(super) unsafe fn lay_out(isa: Isa, l: &Layout, k: Rows, v: Rows, to: &mut [f32]) {
    let (keys, values) = to.split_at_mut(l.sizes()[0]);
    let (block, wide) = (l.block(), l.values.oc_block);
    for (b, to) in keys.chunks_exact_mut(l.key_block()).enumerate() {
        let count = block.min(l.keys - b * block);
        // SAFETY: `count` rows of the caller's from `b * block` on, the last to its last channel.
        let from = unsafe {
            std::slice::from_raw_parts(
                k.data.add(b * block * k.stride),
                (count - 1) * k.stride + l.dim,
            )
        };
        pack_weights(isa, from, k.stride, l.dim, block, to);
    }
    let rows = l.key_blocks() * block;
    if rows != l.keys || l.width() != l.dim {
        values.fill(0.0);
    }
    for key in 0..l.keys {
        // SAFETY: row `key` of the caller's.
        let v = unsafe { std::slice::from_raw_parts(v.data.add(key * v.stride), l.dim) };
        for (ob, v) in v.chunks(wide).enumerate() {
            values[(ob * rows + key) * wide..][..v.len()].copy_from_slice(v);
        }
    }
}

/// Lays out `count` rows, `[block of x channels][row][channel]`, zeros after the last channel.
pub(super) fn lay_rows<'r>(
    rows: usize,
    x: usize,
    row: impl Fn(usize) -> &'r [f32],
    to: &mut [f32],
) {
    for r in 0..rows {
        for (b, part) in row(r).chunks(x).enumerate() {
            let to = &mut to[(b * rows + r) * x..][..x];
            to[..part.len()].copy_from_slice(part);
            to[part.len()..].fill(0.0);
        }
    }
}

/// The state of a unit's queries after some keys: the largest score, the sum of weights, and the
/// weighted values `[queries][width]`.
pub(super) struct Running<'a> {
    pub row_max: [f32; QUERIES],
    pub sum: [f32; QUERIES],
    pub out: &'a mut [f32],
}

impl Running<'_> {
    /// Starts query `r` with a key of score `score` and value `value`, before all others.
    pub fn first(&mut self, r: usize, score: f32, value: &[f32]) {
        let width = self.out.len() / QUERIES;
        (self.row_max[r], self.sum[r]) = (score, 1.0);
        self.out[r * width..][..value.len()].copy_from_slice(value);
    }
}

/// What positions add to scores: `shared[query / line][key] + own[query][key % line]`.
#[derive(Clone, Copy)]
pub(super) struct Positions<'a> {
    /// Queries of a line.
    pub line: usize,
    /// `[line][across]`: keys, in whole blocks, any finite numbers after the last.
    pub shared: &'a [f32],
    pub across: usize,
    /// `[query][key]`, repeated for a block of keys and one line more.
    pub own: &'a [f32],
}

/// A tile of scores, `[key block][query][key]`, which become weights.
struct Tile<'a> {
    scores: &'a mut [f32],
    rows: usize,
    /// Keys of a block, and the tile's first key.
    block: usize,
    first: usize,
    scale: f32,
    positions: Option<Positions<'a>>,
}

/// Completes a tile of scores, turns it into weights, and rescales the running state to the same
/// largest score.
///
/// # Safety
/// The processor has the instruction set of `S`.
#[inline(always)]
unsafe fn weigh_in<S: Values>(t: &mut Tile, running: &mut Running) {
    let (width, block) = (running.out.len() / QUERIES, t.block);
    assert!(block.is_multiple_of(S::LANES) && t.scores.len().is_multiple_of(QUERIES * block));
    // SAFETY: the instructions are guaranteed by the caller; blocks are whole registers, as just
    // asserted, and scores' and positions' parts are sliced to whole blocks.
    unsafe {
        let scale = S::splat(&t.scale);
        let lanes = |v: S::V| {
            let mut lanes = [0.0f32; 16];
            S::store(lanes.as_mut_ptr(), v);
            lanes.into_iter().take(S::LANES)
        };
        for r in 0..t.rows {
            let mut most = S::splat(&f32::NEG_INFINITY);
            for (b, tile) in t.scores.chunks_exact_mut(QUERIES * block).enumerate() {
                let scores = tile[r * block..][..block].as_mut_ptr();
                let positions = t.positions.map(|p| {
                    let key = t.first + b * block;
                    let shared = p.shared[r / p.line * p.across + key..][..block].as_ptr();
                    (shared, p.own[r * (block + p.line) + key % p.line..][..block].as_ptr())
                });
                for at in (0..block).step_by(S::LANES) {
                    let added = positions.map_or(S::zero(), |(shared, own)| {
                        S::add(S::load(shared.add(at)), S::load(own.add(at)))
                    });
                    let v = S::mul_add(scale, S::load(scores.add(at)), added);
                    most = S::max(most, v);
                    S::store(scores.add(at), v);
                }
            }
            let row_max = lanes(most).fold(running.row_max[r], f32::max);
            let away = S::splat(&row_max);
            let mut sums = S::zero();
            for tile in t.scores.chunks_exact_mut(QUERIES * block) {
                let scores = tile[r * block..][..block].as_mut_ptr();
                for at in (0..block).step_by(S::LANES) {
                    let v = S::exp(S::sub(S::load(scores.add(at)), away));
                    sums = S::add(sums, v);
                    S::store(scores.add(at), v);
                }
            }
            let rescale = lanes(S::exp(S::splat(&(running.row_max[r] - row_max))))
                .next()
                .expect("a register holds a float");
            let sum = lanes(sums).fold(running.sum[r] * rescale, |sum, lane| sum + lane);
            (running.row_max[r], running.sum[r]) = (row_max, sum);
            if rescale != 1.0 {
                for v in &mut running.out[r * width..][..width] {
                    *v *= rescale;
                }
            }
        }
    }
}

/// [`weigh_in`] the registers of an instruction set.
fn weigh(isa: Isa, tile: &mut Tile, running: &mut Running) {
    dispatch! { isa, S: Values, {
        /// # Safety
        /// The processor has the instruction set of `S`.
        unsafe fn compiled(tile: &mut Tile, running: &mut Running) {
            // SAFETY: guaranteed by the caller.
            unsafe { weigh_in::<S>(tile, running) }
        }
    } =>
    // SAFETY: the Isa was made by asking the processor.
    unsafe { compiled(tile, running) } }
}

/// The result for every query, `[queries][heads * dim]`.
pub(super) fn attend(cpu: &Cpu, p: Problem, out: &mut [f32]) {
    let (stride, dim) = (p.heads * p.dim, p.dim);
    let (queries, keys) = (p.q.len() / stride, p.k.len() / stride);
    let l = Layout::new(cpu, keys, dim);
    let mut packed = cpu.alloc(p.heads * l.size());
    cpu.chunks_mut(&mut packed, l.size(), |head, to| {
        let rows = |data: &[f32]| Rows { data: data[head * dim..].as_ptr(), stride };
        // SAFETY: keys and values are alike, as `attend_heads` checked: whole rows, each with the
        // head's channels.
        unsafe { lay_out(cpu.isa(), &l, rows(p.k), rows(p.v), to) };
    });
    let to = DisjointWriter::new(out);
    cpu.for_each(queries.div_ceil(QUERIES) * p.heads, |unit| {
        let (q0, head) = (unit / p.heads * QUERIES, unit % p.heads);
        let rows = QUERIES.min(queries - q0);
        let packed = &packed[head * l.size()..][..l.size()];
        let mut q = cpu.alloc(rows * dim.next_multiple_of(l.ic_block));
        lay_rows(rows, l.ic_block, |r| &p.q[(q0 + r) * stride + head * dim..][..dim], &mut q);
        // SAFETY: each unit writes its own rows and channels; all is laid out for `l`.
        unsafe {
            block(
                cpu,
                &l,
                (&q, rows),
                packed,
                (to.at(q0 * stride + head * dim), stride),
                |_| {},
                (p.scale, None),
            )
        };
    });
}

/// One head of a block of queries, at most [`QUERIES`], as [`lay_rows`] writes them. `start` may
/// count keys that are not laid out; scores are multiplied by `scale`.
///
/// # Safety
/// `out` spans as many rows, and nothing else touches them. `q` and `packed` are laid out for `l`,
/// by [`lay_rows`] and [`lay_out`].
pub(super) unsafe fn block(
    cpu: &Cpu,
    l: &Layout,
    (q, rows): (&[f32], usize),
    packed: &[f32],
    (out, out_stride): (*mut f32, usize),
    start: impl FnOnce(&mut Running),
    (scale, positions): (f32, Option<Positions>),
) {
    let (block, width, x) = (l.block(), l.width(), l.ic_block);
    let deep = l.dim.div_ceil(x);
    let tile = (TILE / block).min(l.key_blocks());
    let in_scores = tile * QUERIES * block;
    let mut scratch = cpu.zeros(in_scores + QUERIES * width);
    let (scores, sums) = scratch.split_at_mut(in_scores);
    let zeros = [0.0f32; 64];
    let mut running =
        Running { row_max: [f32::NEG_INFINITY; QUERIES], sum: [0.0; QUERIES], out: sums };
    start(&mut running);
    let (keys, values) = packed.split_at(l.sizes()[0]);
    for b0 in (0..l.key_blocks()).step_by(tile) {
        let blocks = tile.min(l.key_blocks() - b0);
        for b in 0..blocks {
            // SAFETY: the strips stay within the queries, the block's keys and its scores.
            unsafe {
                run_microkernels(l.scores, rows, |r| MicrokernelArgs {
                    x: q.as_ptr().add(r * x),
                    blocks: deep,
                    block_stride: rows * x,
                    weights: keys[(b0 + b) * l.key_block()..].as_ptr(),
                    init: zeros.as_ptr(),
                    init_stride: 0,
                    out: scores[(b * QUERIES + r) * block..].as_mut_ptr(),
                    out_stride: block,
                    ..MicrokernelArgs::DENSE
                });
            }
        }
        let scores = &mut scores[..blocks * QUERIES * block];
        // Keys after the last have weight zero.
        let beyond = ((b0 + blocks) * block).saturating_sub(l.keys);
        if beyond > 0 {
            let last = (blocks - 1) * QUERIES * block;
            scores[last..]
                .chunks_exact_mut(block)
                .for_each(|row| row[block - beyond..].fill(f32::NEG_INFINITY));
        }
        weigh(
            cpu.isa(),
            &mut Tile { scores, rows, block, first: b0 * block, scale, positions },
            &mut running,
        );
        let wide = l.values.oc_block;
        for ob in 0..width / wide {
            // SAFETY: the strips stay within the weights, the tile's values and the sums.
            unsafe {
                run_microkernels(l.values, rows, |r| {
                    let sums = running.out[r * width + ob * wide..].as_mut_ptr();
                    MicrokernelArgs {
                        x: scores.as_ptr().add(r * block),
                        blocks,
                        block_stride: QUERIES * block,
                        weights: values[(ob * l.key_blocks() + b0) * block * wide..].as_ptr(),
                        init: sums,
                        init_stride: width,
                        out: sums,
                        out_stride: width,
                        ..MicrokernelArgs::DENSE
                    }
                });
            }
        }
    }
    for r in 0..rows {
        let inverse = 1.0 / running.sum[r];
        // SAFETY: row `r` of the caller's `rows`.
        let out = unsafe { std::slice::from_raw_parts_mut(out.add(r * out_stride), l.dim) };
        out.iter_mut().zip(&running.out[r * width..]).for_each(|(o, v)| *o = v * inverse);
    }
}

/// Runs the strips that cover `rows` rows, each as its first row says.
///
/// # Safety
/// As [`strip::Kernel`], of strips of as many rows as follow.
pub(super) unsafe fn run_microkernels(
    kernels: Kernels,
    rows: usize,
    mut at: impl FnMut(usize) -> MicrokernelArgs,
) {
    let mut r = 0;
    for (count, size) in split(rows, kernels.microkernels.len().min(strip::DENSE)) {
        for _ in 0..count {
            // SAFETY: guaranteed by the caller: `at` describes a strip at any of the rows.
            unsafe { kernels.microkernels[size - 1](&at(r)) };
            r += size;
        }
    }
}
