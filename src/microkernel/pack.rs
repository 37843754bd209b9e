//! The order in which rows and weights are stored for strips.

use super::strip;
use crate::device::simd::{self, multiversion};
use crate::device::{Buffer, Cpu, Isa};
use std::ops::Range;

/// The order in which the rows of a matrix `[m, k]` are stored for strips:
/// `[strip][block of columns][row][column]`, so that each strip reads its part from beginning to
/// end.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    pub m: usize,
    pub k: usize,
    /// Columns of a block, and the floats that hold them: half as many if they are pairs.
    pub channels: usize,
    pub wide: usize,
    pub blocks: usize,
    /// The number of strips and their rows, and the number of strips with one row less.
    longer: usize,
    size: usize,
    pub count: usize,
}

impl Layout {
    pub fn new(cpu: &Cpu, m: usize, k: usize, longest: usize) -> Layout {
        let channels = strip::ic_block(k);
        let wide = if cpu.bf16_pairs(channels) { channels / 2 } else { channels };
        let [(longer, size), (shorter, _)] = strip::split(m, longest);
        Layout {
            m,
            k,
            channels,
            wide,
            blocks: k.div_ceil(channels),
            longer,
            size,
            count: longer + shorter,
        }
    }

    pub fn bf16_pairs(&self) -> bool {
        self.wide < self.channels
    }

    /// The rows of a strip.
    pub fn rows(&self, strip: usize) -> Range<usize> {
        let start = |strip: usize| strip * self.size - strip.saturating_sub(self.longer);
        start(strip)..start(strip + 1)
    }

    pub fn len(&self) -> usize {
        self.m * self.blocks * self.wide
    }

    /// The offset of a row.
    pub fn at(&self, row: usize) -> usize {
        row * self.blocks * self.wide
    }

    /// Lays the rows of a strip out.
    pub fn pack(&self, cpu: &Cpu, rows: &[f32], to: &mut [f32]) {
        let pack_rows = if self.bf16_pairs() { pack_row_bf16_pairs } else { pack_rows };
        pack_rows(cpu.isa(), rows, self.k, self.wide, rows.len() / self.k * self.wide, to);
    }
}

multiversion! {
    /// Lays rows of `k` values out in blocks of `x` columns, `[block][row][x]` with blocks `stride`
    /// apart, zeros after the last column.
    fn pack_rows(from: &[f32], k: usize, x: usize, stride: usize, to: &mut [f32]) {
        for (r, row) in from.chunks_exact(k).enumerate() {
            for (b, part) in row.chunks(x).enumerate() {
                let to = &mut to[b * stride + r * x..][..x];
                // With a length known at compile time, this is no call.
                if let (Ok(part), Ok(to)) =
                    (<&[f32; 32]>::try_from(part), <&mut [f32; 32]>::try_from(&mut *to))
                {
                    *to = *part;
                } else {
                    to[..part.len()].copy_from_slice(part);
                    to[part.len()..].fill(0.0);
                }
            }
        }
    }
}

multiversion! {
    /// Lays rows of `k` values out in blocks of `x` pairs of columns, blocks `stride` apart, zeros
    /// after the last column.
    fn pack_row_bf16_pairs(from: &[f32], k: usize, x: usize, stride: usize, to: &mut [f32]) {
        for (r, row) in from.chunks_exact(k).enumerate() {
            for (b, part) in row.chunks(2 * x).enumerate() {
                let mut value = [0.0f32; 32];
                value[..part.len()].copy_from_slice(part);
                let to = &mut to[b * stride + r * x..][..x];
                for (q, to) in to.iter_mut().enumerate() {
                    *to = simd::pair(value[2 * q], value[2 * q + 1]);
                }
            }
        }
    }
}

multiversion! {
    /// Joins rows of `block` values in pairs: row `n` of the result is rows `2 n` and `2 n + 1` in
    /// bfloat16.
    pub(crate) fn pack_bf16_pairs(block: usize, values: &[f32], to: &mut [f32]) {
        for (row, to) in to.chunks_exact_mut(block).enumerate() {
            for (i, to) in to.iter_mut().enumerate() {
                *to = simd::pair(values[2 * row * block + i], values[(2 * row + 1) * block + i]);
            }
        }
    }
}

/// [`pack_bf16_pairs`] of all rows, on all threads.
pub(crate) fn packed_bf16_pairs(cpu: &Cpu, values: &[f32], block: usize) -> Buffer {
    let mut pairs = cpu.alloc(values.len() / 2);
    cpu.chunks_mut(&mut pairs, block, |row, to| {
        pack_bf16_pairs(cpu.isa(), block, &values[2 * row * block..][..2 * block], to)
    });
    pairs
}

/// Lays the first `columns` of the rows of `from`, one row per output and `stride` apart, out for
/// the strips, `[column][oc_block]`, zeros after the last output and column.
pub(crate) fn pack_weights(
    isa: Isa,
    from: &[f32],
    stride: usize,
    columns: usize,
    oc_block: usize,
    to: &mut [f32],
) {
    let outputs = from.len().div_ceil(stride);
    if outputs < oc_block {
        to.fill(0.0);
    }
    to[columns * oc_block..].fill(0.0);
    // Square tiles, so that neither side leaves the first-level cache.
    for o0 in (0..outputs).step_by(16) {
        for c0 in (0..columns).step_by(16) {
            if o0 + 16 <= outputs && c0 + 16 <= columns {
                simd::transpose16(
                    isa,
                    &from[o0 * stride + c0..],
                    stride,
                    &mut to[c0 * oc_block + o0..],
                    oc_block,
                );
                continue;
            }
            for o in o0..(o0 + 16).min(outputs) {
                for c in c0..(c0 + 16).min(columns) {
                    to[c * oc_block + o] = from[o * stride + c];
                }
            }
        }
    }
}
