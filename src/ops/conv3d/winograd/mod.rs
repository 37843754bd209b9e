//! Convolutions by Winograd's minimal filtering (Lavin and Gray 2016).
//!
//! A cell of output voxels needs fewer products for each pair of channels than it has taps: the input voxels around it and the weights are each transformed to as many values
//! as there are points, multiplied one by one, summed over the input channels and transformed back. [`filter`] has the transforms.
//!
//! A unit of work loads its voxels into scratch as the direct kernels do, then goes over its cells in groups small enough that transformed inputs, weights and products stay in
//! the second-level cache. The weights are transformed in float64.

mod filter;
mod kernels;

use super::cpu::{PackedConv, SharedSums, join_pairs};
use super::kernel::split;
use super::place::{Place, SLAB, Work};
use super::tile::Tiling;
use crate::device::{Buffer, Cpu, simd};
use crate::ops::norm::Sums;
use crate::tensor::Tensor;
pub(crate) use filter::Kind;
use kernels::{Cells, Kernels};

/// Most channels, in and out: beyond that the transformed weights fit no cache, and such layers' maps are small.
const MOST: usize = 128;
/// Fewest voxels of a map that pays for the transforms.
const LEAST: usize = 1 << 12;
/// Most channels of a layer in broad cells, whose weights are more than twice as many, and fewest voxels.
const BROADEST: usize = 32;
const LARGE: usize = 1 << 15;

/// Transformed weights, `[point][out block][in, or pair of them][out of the block]`.
pub struct Weights {
    values: Buffer,
}

/// How a layer of 27 or 8 taps over `[d, h, w]` runs; none where the direct kernels are faster.
pub(crate) fn kind(cpu: &Cpu, conv: &PackedConv, [d, h, w]: [usize; 3]) -> Option<Kind> {
    let (c, outs) = (conv.in_channels(), conv.out_channels());
    let kind = match conv.taps {
        8 => Kind::Twos,
        // The larger coefficients lose a bit too many where factors are bfloat16.
        _ if cpu.pairs(c) => Kind::Threes,
        _ if h % 4 + w % 4 == 0 && c.max(outs) <= BROADEST && d * h * w >= LARGE => Kind::Broad,
        _ => Kind::Threes,
    };
    let pays = d % 2 + h % 2 + w % 2 == 0
        && c % 16 == 0
        && c.max(outs) <= MOST
        && outs % kernels::of(cpu.isa(), false, outs, kind).out_block == 0
        && d * h * w >= LEAST;
    pays.then_some(kind)
}

impl Weights {
    /// From a convolution's own.
    pub fn new(cpu: &Cpu, conv: &PackedConv, kind: Kind) -> Weights {
        let (c, outs) = (conv.in_channels(), conv.out_channels());
        let kernels = kernels::of(cpu.isa(), false, outs, kind);
        let (pairs, out_block, points) = (cpu.pairs(c), kernels.out_block, kernels.form.count());
        let edge = if conv.taps == 8 { 2 } else { 3 };
        // One input channel of all outputs at a time: [in][out][point].
        let mut transformed = cpu.take(c * outs * points);
        cpu.chunks_mut(&mut transformed, outs * points, |i, to| {
            for (o, to) in to.chunks_exact_mut(points).enumerate() {
                let values = kernels.form.spread(edge, |tap| conv.weight(o, i, tap) as f64);
                to.iter_mut().zip(values).for_each(|(to, v)| *to = v as f32);
            }
        });
        let mut values = cpu.take(points * c * outs);
        cpu.chunks_mut(&mut values, c * outs, |point, to| {
            for (at, v) in to.iter_mut().enumerate() {
                let (o, i) = (at / (c * out_block) * out_block + at % out_block, at / out_block % c);
                *v = transformed[(i * outs + o) * points + point];
            }
        });
        Weights { values: cpu.lasting(&if pairs { join_pairs(cpu, &values, out_block) } else { values }) }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.values.len() * 4
    }
}

/// Cells of a group, at most, and the values of one point of them all: the transformed weights are read anew for each group, and what it holds is to share the second-level
/// cache with them and the tile.
const GROUP: usize = 84;
/// Floats of a map that no cache holds until its reader comes.
const STREAM: usize = 16 << 20;
const VALUES: usize = 3584;

/// How a layer goes over the cells of a tile.
pub(crate) struct Plan<'a> {
    tiling: &'a Tiling,
    kernels: Kernels,
    channels: usize,
    /// Floats that hold a cell's values of a point.
    factors: usize,
    outputs: usize,
    /// Cells of a group.
    group: usize,
    /// From a point's values of all cells to the next point's: a cache line more than they take, so that they do not fall into the same few sets of the cache.
    points: usize,
    /// Whether the output is too large to be found in a cache by its reader.
    stream: bool,
}

/// Where a tile's outputs go, and what they are added to: addresses of the first voxel's first channel, and floats from a voxel to the next along d, h and w.
pub(crate) struct Destination<'a> {
    pub to: *mut f32,
    pub strides: [usize; 3],
    pub init: *const f32,
    pub init_strides: [usize; 3],
    /// Sums of each channel's values and of their squares, to add to: `[channel][value, square]`.
    pub sums: &'a mut [f64],
}

impl<'a> Plan<'a> {
    /// For a map of so many output voxels.
    pub fn new(cpu: &Cpu, conv: &PackedConv, kind: Kind, tiling: &'a Tiling, voxels: usize) -> Plan<'a> {
        let (channels, outputs) = (conv.in_channels(), conv.out_channels());
        let pairs = cpu.pairs(channels);
        let kernels = kernels::of(cpu.isa(), pairs, outputs, kind);
        let longest = kernels.products.len();
        let widest = channels.max(outputs);
        let group = (VALUES * 16 / kernels.form.plane() / widest).min(GROUP).max(longest) / longest * longest;
        let factors = if pairs { channels / 2 } else { channels };
        let stream = voxels * outputs > STREAM;
        Plan { tiling, kernels, channels, factors, outputs, group, points: group * widest + 16, stream }
    }

    /// Computes a tile of so many voxels from scratch, its first input voxel `shift` voxels behind the halo's first.
    ///
    /// # Safety
    /// Scratch holds the tile and its halo, the destination spans the tile, and nobody else touches it meanwhile.
    pub unsafe fn run(&self, cpu: &Cpu, weights: &Weights, scratch: &[f32], shift: [usize; 3], part: [usize; 3], destination: Destination) {
        let Plan { tiling, kernels, factors, outputs, group, points, stream, .. } = *self;
        let (form, longest) = (kernels.form, kernels.products.len());
        let plane_points = form.plane();
        // A point's products may take the place of its values where one block of them is all.
        let apart = factors != outputs || outputs != kernels.out_block;
        let mut values = cpu.take((1 + usize::from(apart)) * plane_points * points + group * form.voxels() * outputs);
        let (values, kept) = values.split_at_mut((1 + usize::from(apart)) * plane_points * points);
        let (values, products) = values.split_at_mut(usize::from(apart) * plane_points * points);
        let mut sums = [0.0; 2 * MOST];
        let cells = Cells {
            x: tiling.x,
            row: tiling.row_stride(),
            plane: tiling.plane_stride(),
            points,
            channels: factors,
            outs: outputs,
            out_block: kernels.out_block,
            to: destination.strides,
            init: destination.init_strides,
            stream,
            sums: sums.as_mut_ptr(),
        };
        let origin = shift[0] * cells.plane + shift[1] * cells.row + shift[2] * cells.x;
        let across = [part[1] / form.out[1], part[2] / form.out[2]];
        let count = part[0] / form.out[0] * across[0] * across[1];
        let place = |cell: usize| {
            [cell / across[1] / across[0] * form.out[0], cell / across[1] % across[0] * form.out[1], cell % across[1] * form.out[2]]
        };
        let mut first = 0;
        while first < count {
            // Strips of nearly equal length.
            let strips = (count - first).div_ceil(group) * (group / longest);
            let here = ((count - first).div_ceil(strips) * (group / longest)).min(count - first).min(group);
            // SAFETY: cells lie within the tile and its halo, groups within the buffers; the rest is the caller's word.
            unsafe {
                let m = products.as_mut_ptr();
                let x = if apart { values.as_mut_ptr() } else { m };
                for plane in 0..form.points[0] {
                    let mut i = 0;
                    while i < here {
                        let [a, b, k] = place(first + i);
                        let run = (across[1] - k / form.out[2]).min(here - i);
                        let from = origin + a * cells.plane + b * cells.row + k * cells.x;
                        for block in 0..tiling.blocks {
                            let from = scratch.as_ptr().add(block * tiling.block_stride() + from);
                            (kernels.gather[plane])(&cells, from, x.add(i * factors + block * tiling.x * factors / self.channels), run);
                        }
                        i += run;
                    }
                    for point in 0..plane_points {
                        let (x, m) = (x.add(point * points), m.add(point * points));
                        for ob in 0..outputs / kernels.out_block {
                            let u =
                                weights.values[((plane * plane_points + point) * outputs + ob * kernels.out_block) * factors..].as_ptr();
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
                        let at = place(first + i);
                        let offset = |strides: [usize; 3]| at.iter().zip(strides).map(|(a, s)| a * s).sum::<usize>();
                        let (to, init) = (destination.to.add(offset(cells.to)), destination.init.add(offset(cells.init)));
                        for ob in (0..outputs).step_by(kernels.out_block) {
                            let kept = kept[i * form.voxels() * outputs + ob..].as_mut_ptr();
                            (kernels.scatter[plane])(&cells, ob, m.add(i * outputs + ob), kept, init.add(ob), to.add(ob));
                        }
                    }
                }
            }
            first += here;
        }
        if stream {
            simd::fence();
        }
        for (o, to) in destination.sums.chunks_exact_mut(2).enumerate() {
            to[0] += sums[o];
            to[1] += sums[outputs + o];
        }
    }
}

pub fn conv3d(cpu: &Cpu, x: Work, extent: [usize; 5], conv: &PackedConv, kind: Kind, want_sums: bool) -> (Tensor, Option<Sums>) {
    let [n, d, h, w, c] = extent;
    let form = kernels::of(cpu.isa(), false, conv.out_channels(), kind).form;
    let _op = cpu.op("conv3d winograd", || super::cpu::work(extent, conv, form.count() as f64 / form.voxels() as f64));
    let weights = conv.transformed(cpu, kind);
    let tiling = Tiling::in_cells([d, h, w], form.out, c, conv.x, SLAB);
    let plan = Plan::new(cpu, conv, kind, &tiling, n * d * h * w);
    let outputs = conv.out_channels();
    let place = Place::new(cpu, x, extent, &tiling, outputs);
    let units = n * tiling.tiles();
    let mut partial = cpu.wide_zeros(units * outputs * 2);
    let sums_at = SharedSums(partial.as_mut_ptr());
    place.each(cpu, n, &tiling, 1, |unit| {
        let (item, t) = (unit / tiling.tiles(), unit % tiling.tiles());
        let mut scratch = cpu.take(tiling.scratch());
        let ([i0, j0, k0], part) = tiling.part(t, [d, h, w]);
        // SAFETY: the place sees to what is read and written; the tile's rows and sums are this unit's own.
        unsafe {
            tiling.load(cpu.isa(), &place.source, extent, item, t, &mut scratch);
            let destination = Destination {
                to: place.out.at((((item * d + i0) * h + j0) * w + k0) * outputs),
                strides: [h * w * outputs, w * outputs, outputs],
                init: conv.biases().as_ptr(),
                init_strides: [0; 3],
                sums: sums_at.slice(unit * outputs * 2, outputs * 2),
            };
            plan.run(cpu, weights, &scratch, [0; 3], part, destination);
        }
    });
    let sums = want_sums.then(|| Sums::reduce(&partial, n, outputs, (d * h * w) as f64));
    (Tensor::from_buffer([n, d, h, w, outputs], place.finish()), sums)
}
