//! The decoder stage on the CPU: each phase a convolution with 8 taps that writes every other voxel
//! of the fine grid, large ones by minimal filtering.

use super::DecoderStage;
use crate::device::cpu::F64Buffer;
use crate::device::profile::OpCost;
use crate::device::{Buffer, Cpu, DisjointWriter, ReadOnly};
use crate::ops::conv3d::place;
use crate::ops::conv3d::tile::{TileSource, Tiling};
use crate::ops::conv3d::winograd::{self, Destination, Kind, Plan};
use crate::ops::conv3d::{ConvInput, ConvOutput, Rows, Target, groups};
use crate::ops::norm::Sums;
use crate::tensor::Tensor;

/// All biases, added to the convolved skip feature if there is one.
pub fn skip_map(
    cpu: &Cpu,
    stage: &DecoderStage,
    convolved: Option<Tensor>,
    [n, d, h, w]: [usize; 4],
) -> Tensor {
    let c = stage.outputs;
    let _op = cpu.op("skip map", || OpCost {
        problem: format!("{c} channels, {d}x{h}x{w}: biases"),
        flops: 0.0,
        floats: n * c * (d * h * 2 + h * w * 2),
    });
    let mut out = match convolved {
        Some(map) => map.into_buffer().expect("a fresh result has one owner"),
        None => {
            let mut out = cpu.alloc(n * d * h * w * c);
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

pub fn decoder_stage(
    cpu: &Cpu,
    stage: &DecoderStage,
    x: &ConvInput,
    extent: [usize; 5],
    skip: &Tensor,
) -> ConvOutput {
    let [n, d, h, w, c] = extent;
    let pooled = x.pooled(cpu, extent);
    let x = pooled.as_ref().unwrap_or(x);
    let fast = winograd::kind(cpu, &stage.phases[0], [d, h, w]).is_some();
    let _op = cpu.op(if fast { "decoder stage winograd" } else { "decoder stage" }, || {
        let (voxels, outputs) = (n * d * h * w, stage.outputs);
        let floats = voxels * (c + 16 * outputs) + 64 * c * outputs;
        let products = if fast { 27 } else { 64 };
        let problem = format!("{c} to {outputs} channels, {d}x{h}x{w} to twice");
        OpCost { problem, flops: (2 * voxels * products * c * outputs) as f64, floats }
    });
    let mut out = place::alloc(cpu, [n, 2 * d, 2 * h, 2 * w, stage.outputs]);
    let run = if fast { by_winograd } else { direct };
    let sums = run(cpu, stage, &TileSource::new(x), extent, skip, &mut out);
    let sums = Sums::reduce(&sums, n, stage.outputs, (d * h * w * 8) as f64);
    let map = Tensor::from_buffer([n, 2 * d, 2 * h, 2 * w, stage.outputs], out);
    ConvOutput { map, sums: Some(sums), pooled: None }
}

/// Fills `out` and returns its sums, one part from each unit of an item.
fn by_winograd(
    cpu: &Cpu,
    stage: &DecoderStage,
    source: &TileSource,
    extent: [usize; 5],
    skip: &Tensor,
    out: &mut Buffer,
) -> F64Buffer {
    let [n, d, h, w, c] = extent;
    let (first, outputs) = (&stage.phases[0], stage.outputs);
    let tiling = Tiling::in_cells([d, h, w], [2; 3], c, first.ic_block, d);
    let plan = Plan::new(cpu, first, Kind::F2x2, &tiling, n * d * h * w * 8);
    let weights: Vec<_> =
        stage.phases.iter().map(|phase| phase.transformed(cpu, Kind::F2x2)).collect();
    // If there are few tiles, several units share one's phases.
    let groups = groups(n * tiling.tiles(), 8).next_power_of_two();
    let units = n * tiling.tiles() * groups;
    let mut partial = cpu.zeros_f64(units * outputs * 2);
    let (to, sums_at) = (DisjointWriter::new(out), DisjointWriter::new(&mut partial));
    cpu.for_each(units, |unit| {
        let (tile, group) = (unit / groups, unit % groups);
        let (item, t) = (tile / tiling.tiles(), tile % tiling.tiles());
        let mut scratch = cpu.alloc(tiling.scratch());
        let ([i0, j0, k0], part) = tiling.part(t, [d, h, w]);
        // SAFETY: nothing writes to the input; tiles and phases cover disjoint voxels, and the sums
        // are this unit's own.
        unsafe {
            tiling.load(cpu.isa(), source, extent, item, t, &mut scratch);
            let (first, end) = (group * 8 / groups, (group + 1) * 8 / groups);
            let sums = sums_at.slice(unit * outputs * 2, outputs * 2);
            for (p, weights) in weights.iter().enumerate().take(end).skip(first) {
                // Phase 1 of an axis reads from a voxel on, phase 0 from the one before it.
                let phase = [p >> 2, p >> 1 & 1, p & 1];
                let voxel =
                    ((item * d * 2 + i0 * 2 + phase[0]) * h * 2 + j0 * 2 + phase[1]) * w * 2
                        + k0 * 2
                        + phase[2];
                let strides = [8 * h * w * outputs, 4 * w * outputs, 2 * outputs];
                let destination = Destination {
                    to: to.at(voxel * outputs),
                    strides,
                    init: skip.data().as_ptr().add(voxel * outputs),
                    init_strides: strides,
                    sums: &mut *sums,
                    pooled: None,
                };
                plan.run(cpu, weights, &scratch, phase, part, destination);
            }
        }
    });
    partial
}

/// Fills `out` and returns its sums by the convolution's strips, eight taps a phase.
fn direct(
    cpu: &Cpu,
    stage: &DecoderStage,
    source: &TileSource,
    extent: [usize; 5],
    skip: &Tensor,
    out: &mut Buffer,
) -> F64Buffer {
    let [n, d, h, w, _] = extent;
    let first = &stage.phases[0];
    let (tiling, kernels) = first.tiling(cpu, [d, h, w]);
    // Every phase lays its weights out.
    for phase in &stage.phases {
        phase.tiling(cpu, [d, h, w]);
    }
    // Taps of phase p reach from p - 1 to p along each axis.
    let taps: Vec<Vec<isize>> = (0..8)
        .map(|p: usize| {
            let step = |bit: usize, a: usize, stride: usize| {
                ((p >> bit & 1) as isize + (a >> bit & 1) as isize - 1) * stride as isize
            };
            (0..8)
                .map(|a| {
                    step(2, a, tiling.plane_stride())
                        + step(1, a, tiling.row_stride())
                        + step(0, a, tiling.ic_block)
                })
                .collect()
        })
        .collect();
    let outputs = stage.outputs;
    let oc_blocks = first.oc_blocks();
    let groups = groups(n * tiling.tiles(), oc_blocks);
    let per_group = oc_blocks.div_ceil(groups);
    let mut partial = cpu.zeros_f64(n * tiling.tiles() * outputs * 2);
    let (to, sums_at) = (DisjointWriter::new(out), DisjointWriter::new(&mut partial));
    let target = Target {
        out: &to,
        init: Some(ReadOnly::new(skip.data())),
        channels: outputs,
        voxel: 2 * outputs,
        stream: false,
    };
    cpu.for_each(n * tiling.tiles() * groups, |unit| {
        let (tile, group) = (unit / groups, unit % groups);
        let (item, t) = (tile / tiling.tiles(), tile % tiling.tiles());
        let mut scratch = cpu.alloc(tiling.scratch());
        // SAFETY: nothing writes to the input.
        unsafe { tiling.load(cpu.isa(), source, extent, item, t, &mut scratch) };
        let ([i0, j0], rows) = tiling.rows(t, d, h);
        let fine_row = |i: usize, j: usize| ((item * d * 2 + i) * h * 2 + j) * w * 2 * outputs;
        for ob in group * per_group..((group + 1) * per_group).min(oc_blocks) {
            let c0 = ob * first.oc_block;
            let valid = first.oc_block.min(outputs - c0);
            // SAFETY: this unit's tile and channels are its own.
            let sums = unsafe { sums_at.slice((tile * outputs + c0) * 2, valid * 2) };
            for (p, (conv, taps)) in stage.phases.iter().zip(&taps).enumerate() {
                let run = Rows { tiling: &tiling, kernels, conv, scratch: &scratch, taps };
                let row_at = |i: usize, j: usize| {
                    fine_row((i0 + i) * 2 + (p >> 2), (j0 + j) * 2 + (p >> 1 & 1))
                        + (p & 1) * outputs
                };
                // SAFETY: tiles cover disjoint rows, groups disjoint channels, phases disjoint
                // voxels.
                unsafe { run.run(ob, rows, &target, row_at, sums) };
            }
        }
    });
    partial
}
