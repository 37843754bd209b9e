//! The convolution on the CPU: direct, over tiles in scratch memory, strips in registers.

use super::place::OutputPlacement;
use super::sums::{STREAM, Target, add_sums, groups};
use super::tile::Tiling;
use super::weights::{PackedConv, work};
use super::{ConvInput, ConvOutput, Epilogue, winograd};
use crate::device::{Cpu, DisjointWriter, simd};
use crate::microkernel::strip::{Kernels, MicrokernelArgs, split};
use crate::ops::norm::Sums;
use crate::tensor::Tensor;

/// A tile in scratch and the strips that run over it.
pub(crate) struct Rows<'a> {
    pub tiling: &'a Tiling,
    pub kernels: Kernels,
    pub conv: &'a PackedConv,
    pub scratch: &'a [f32],
    pub taps: &'a [isize],
}

impl Rows<'_> {
    /// Computes output block `ob` of all rows of a tile. `row_at(i, j)` is the offset of a row's
    /// first voxel in the output map; what is written is added to `sums` `[channel][value, square]`
    /// of the block, unless they are empty.
    ///
    /// # Safety
    /// Every row is within the target, and no other unit touches it or this block of its channels
    /// meanwhile. Scratch holds a tile as [`Tiling::load`] writes it, and the taps stay within its
    /// halo; strips, tiling and weights belong together, as [`PackedConv::tiling`] returns them.
    pub unsafe fn run(
        &self,
        ob: usize,
        rows: [usize; 2],
        target: &Target,
        row_at: impl Fn(usize, usize) -> usize,
        sums: &mut [f64],
    ) {
        let (t, conv) = (self.tiling, self.conv);
        let mut spare = vec![0.0f32; self.kernels.microkernels.len() * conv.oc_block];
        let mut counted = vec![0.0f64; 2 * conv.oc_block];
        for ib in (0..t.blocks).step_by(conv.group()) {
            for (i, j) in (0..rows[0]).flat_map(|i| (0..rows[1]).map(move |j| (i, j))) {
                let mut x = ib * t.block_stride()
                    + (i + 1) * t.plane_stride()
                    + (j + 1) * t.row_stride()
                    + t.ic_block;
                let mut at = row_at(i, j) + ob * conv.oc_block;
                for (count, size) in split(t.tile[2], self.kernels.microkernels.len()) {
                    for _ in 0..count {
                        // SAFETY: passed on from the caller; scratch spans the tile and its halo.
                        unsafe {
                            self.strip(ob, ib, x, at, size, target, &mut spare, &mut counted)
                        };
                        (x, at) = (x + size * t.ic_block, at + size * target.voxel);
                    }
                }
            }
        }
        add_sums(&counted, sums);
        if target.stream {
            simd::fence();
        }
    }

    /// One strip: `size` voxels from scratch offset `x` to target offset `at`, over the group of
    /// input blocks from `ib` on.
    ///
    /// # Safety
    /// As [`Rows::run`].
    #[allow(clippy::too_many_arguments)]
    unsafe fn strip(
        &self,
        ob: usize,
        ib: usize,
        x: usize,
        at: usize,
        size: usize,
        target: &Target,
        spare: &mut [f32],
        counted: &mut [f64],
    ) {
        let (t, conv) = (self.tiling, self.conv);
        let valid = conv.oc_block.min(target.channels - ob * conv.oc_block);
        // SAFETY: the caller guarantees scratch and target; `spare` holds the longest strip,
        // `counted` the block's sums.
        unsafe {
            let out = target.out.at(at);
            let (mut init, mut init_stride) = match target.init {
                _ if ib > 0 => (out.cast_const(), target.voxel),
                Some(init) => (init.at(at), target.voxel),
                None => (conv.bias(ob).as_ptr(), 0),
            };
            let (mut to, mut to_stride) = (out, target.voxel);
            // If the last block is wider than the remaining channels, it goes through spare memory.
            let whole = valid == conv.oc_block;
            if !whole {
                if init_stride != 0 {
                    for (v, spare) in spare.chunks_exact_mut(conv.oc_block).enumerate().take(size) {
                        spare[..valid].copy_from_slice(std::slice::from_raw_parts(
                            init.add(v * init_stride),
                            valid,
                        ));
                    }
                    (init, init_stride) = (spare.as_ptr(), conv.oc_block);
                }
                (to, to_stride) = (spare.as_mut_ptr(), conv.oc_block);
            }
            (self.kernels.microkernels[size - 1])(&MicrokernelArgs {
                x: self.scratch.as_ptr().add(x),
                blocks: conv.group().min(t.blocks - ib),
                block_stride: t.block_stride(),
                taps: self.taps.as_ptr(),
                tap_count: self.taps.len(),
                weights: conv.weights_for(t, ob, ib).as_ptr(),
                init,
                init_stride,
                out: to,
                out_stride: to_stride,
                // Values are complete after the last blocks of inputs.
                sums: if ib + conv.group() >= t.blocks {
                    counted.as_mut_ptr()
                } else {
                    std::ptr::null_mut()
                },
                stream: target.stream && whole,
            });
            if !whole {
                for (v, spare) in spare.chunks_exact(conv.oc_block).enumerate().take(size) {
                    std::slice::from_raw_parts_mut(out.add(v * target.voxel), valid)
                        .copy_from_slice(&spare[..valid]);
                }
            }
        }
    }
}

/// The convolution of an input that is already pooled. Its output's pooled map is computed only
/// where it runs by minimal filtering.
pub fn conv3d(
    cpu: &Cpu,
    x: ConvInput,
    extent: [usize; 5],
    conv: &PackedConv,
    epilogue: Epilogue,
) -> ConvOutput {
    let [n, d, h, w, _] = extent;
    if let Some(kind) = winograd::kind(cpu, conv, [d, h, w]) {
        return winograd::conv3d(cpu, x, extent, conv, kind, epilogue);
    }
    let (ConvInput { map, prologue }, want_sums) = (x, epilogue.sums);
    let _op = cpu.op("conv3d direct", || work(extent, conv, 27.0));
    let (tiling, kernels) = conv.tiling(cpu, [d, h, w]);
    let taps = tiling.taps27();
    let outputs = conv.out_channels();
    let place = OutputPlacement::new(cpu, map, &prologue, extent, &tiling, outputs);
    let groups = groups(n * tiling.tiles(), conv.oc_blocks());
    let per_group = conv.oc_blocks().div_ceil(groups);
    let mut partial = cpu.zeros_f64(if want_sums { n * tiling.tiles() * outputs * 2 } else { 0 });
    let stream = n * d * h * w * outputs > STREAM
        && outputs.is_multiple_of(conv.oc_block)
        && tiling.blocks <= conv.group();
    let (source, out) = (place.source(), place.out());
    let target = Target { out: &out, init: None, channels: outputs, voxel: outputs, stream };
    let sums_at = DisjointWriter::new(&mut partial);
    place.for_each_tile(cpu, n, &tiling, groups, |unit| {
        let (tile, group) = (unit / groups, unit % groups);
        let (item, t) = (tile / tiling.tiles(), tile % tiling.tiles());
        let mut scratch = cpu.alloc(tiling.scratch());
        // SAFETY: in the order of `OutputPlacement::for_each_tile`, nothing writes to what a tile
        // has yet to read.
        unsafe { tiling.load(cpu.isa(), source, extent, item, t, &mut scratch) };
        let ([i0, j0], rows) = tiling.rows(t, d, h);
        let row_at = |i: usize, j: usize| (((item * d + i0 + i) * h + j0 + j) * w) * outputs;
        let run = Rows { tiling: &tiling, kernels, conv, scratch: &scratch, taps: &taps };
        for ob in group * per_group..((group + 1) * per_group).min(conv.oc_blocks()) {
            let c0 = ob * conv.oc_block;
            let valid = conv.oc_block.min(outputs - c0);
            let sums = if want_sums {
                (tile * outputs + c0) * 2..(tile * outputs + c0 + valid) * 2
            } else {
                0..0
            };
            // SAFETY: tiles cover disjoint rows, groups disjoint channels; taps stay in the halo.
            unsafe { run.run(ob, rows, &target, row_at, sums_at.slice(sums.start, sums.len())) };
        }
    });
    let sums = want_sums.then(|| Sums::reduce(&partial, n, outputs, (d * h * w) as f64));
    let map = Tensor::from_buffer([n, d, h, w, outputs], place.finish());
    ConvOutput { map, sums, pooled: None }
}
