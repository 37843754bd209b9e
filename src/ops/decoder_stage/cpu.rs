//! The decoder stage on the CPU: the convolution's strips with 8 taps, writing every other voxel of the fine grid.

use super::DecoderStage;
use crate::device::Cpu;
use crate::device::cpu::Shared;
use crate::device::profile::Work;
use crate::ops::conv3d::place;
use crate::ops::conv3d::tile::Source;
use crate::ops::conv3d::{Input, Rows, SharedSums, SyncTarget, Target, add_row, groups};
use crate::ops::norm::Sums;
use crate::tensor::Tensor;

/// Every bias, on top of the convolved skip feature where there is one.
pub fn skip_map(cpu: &Cpu, stage: &DecoderStage, convolved: Option<Tensor>, [n, d, h, w]: [usize; 4]) -> Tensor {
    let c = stage.outputs;
    let _op = cpu.op("skip map", || Work {
        problem: format!("{c} channels, {d}x{h}x{w}: biases"),
        flops: 0.0,
        floats: n * c * (d * h * 2 + h * w * 2),
    });
    let mut out = match convolved {
        Some(map) => map.into_buffer().expect("a fresh result has one owner"),
        None => {
            let mut out = cpu.take(n * d * h * w * c);
            cpu.chunks_mut(&mut out, c, |_, voxel| voxel.copy_from_slice(stage.inner_bias.data()));
            out
        }
    };
    let side = |at: usize, edge: usize| if at == 0 { 0 } else { 1 + usize::from(at + 1 == edge) };
    cpu.chunks_mut(&mut out, w * c, |row, out| {
        let (i, j) = (side(row / h % d, d), side(row % h, h));
        let mut add = |k: usize| {
            let border = &stage.border.data()[((i * 3 + j) * 3 + side(k, w)) * c..];
            out[k * c..][..c].iter_mut().zip(border).for_each(|(v, b)| *v += b);
        };
        match (i, j) {
            (1, 1) => [0, w - 1].into_iter().for_each(add),
            _ => (0..w).for_each(&mut add),
        }
    });
    Tensor::from_buffer([n, d, h, w, c], out)
}

pub fn decoder_stage(cpu: &Cpu, stage: &DecoderStage, x: Input, extent: [usize; 5], skip: &Tensor) -> (Tensor, Sums) {
    let [n, d, h, w, c] = extent;
    let _op = cpu.op("decoder stage", || {
        let (voxels, outputs) = (n * d * h * w, stage.outputs);
        let floats = voxels * (c + 16 * outputs) + 64 * c * outputs;
        Work { problem: format!("{c} to {outputs} channels, {d}x{h}x{w} to twice"), flops: (2 * voxels * 64 * c * outputs) as f64, floats }
    });
    let first = &stage.phases[0];
    let (tiling, kernels) = first.tiling(cpu, [d, h, w]);
    // Every phase lays its weights out.
    for phase in &stage.phases {
        phase.tiling(cpu, [d, h, w]);
    }
    // Taps of phase p reach from p - 1 to p along each axis.
    let taps: Vec<Vec<isize>> = (0..8)
        .map(|p: usize| {
            let step = |bit: usize, a: usize, stride: usize| ((p >> bit & 1) as isize + (a >> bit & 1) as isize - 1) * stride as isize;
            (0..8).map(|a| step(2, a, tiling.plane_stride()) + step(1, a, tiling.row_stride()) + step(0, a, tiling.x)).collect()
        })
        .collect();
    let outputs = stage.outputs;
    let source = Source::new(&x);
    let mut out = place::take(cpu, [n, 2 * d, 2 * h, 2 * w, outputs]);
    let out_blocks = first.out_blocks();
    let groups = groups(n * tiling.tiles(), out_blocks);
    let per_group = out_blocks.div_ceil(groups);
    let mut partial = cpu.wide_zeros(n * tiling.tiles() * outputs * 2);
    let target = Target { out: Shared::new(&mut out), init: Some(skip.data().as_ptr()), channels: outputs, voxel: 2 * outputs };
    let target = SyncTarget(&target);
    let sums_at = SharedSums(partial.as_mut_ptr());
    cpu.for_each(n * tiling.tiles() * groups, |unit| {
        let (tile, group) = (unit / groups, unit % groups);
        let (item, t) = (tile / tiling.tiles(), tile % tiling.tiles());
        let mut scratch = cpu.take(tiling.scratch());
        // SAFETY: nobody writes to the input.
        unsafe { tiling.load(cpu.isa(), &source, extent, item, t, &mut scratch) };
        let ([i0, j0], rows) = tiling.rows(t, d, h);
        let fine_row = |i: usize, j: usize| ((item * d * 2 + i) * h * 2 + j) * w * 2 * outputs;
        for ob in group * per_group..((group + 1) * per_group).min(out_blocks) {
            for (p, (conv, taps)) in stage.phases.iter().zip(&taps).enumerate() {
                let run = Rows { tiling: &tiling, kernels, conv, scratch: &scratch, taps };
                let row_at = |i: usize, j: usize| fine_row((i0 + i) * 2 + (p >> 2), (j0 + j) * 2 + (p >> 1 & 1)) + (p & 1) * outputs;
                // SAFETY: tiles cover disjoint rows, groups disjoint channels, phases disjoint voxels.
                unsafe { run.run(ob, rows, target.get(), row_at) };
            }
            let c0 = ob * first.out_block;
            let valid = first.out_block.min(outputs - c0);
            // SAFETY: this unit's tile and channels are its own.
            let to = unsafe { sums_at.slice((tile * outputs + c0) * 2, valid * 2) };
            for i in i0 * 2..(i0 + rows[0]) * 2 {
                for j in j0 * 2..(j0 + rows[1]) * 2 {
                    let row = unsafe { target.get().out.slice(fine_row(i, j) + c0, (2 * w - 1) * outputs + valid) };
                    add_row(cpu.isa(), row, valid, outputs, to);
                }
            }
        }
    });
    let sums = Sums::reduce(&partial, n, outputs, (d * h * w * 8) as f64);
    (Tensor::from_buffer([n, 2 * d, 2 * h, 2 * w, outputs], out), sums)
}
