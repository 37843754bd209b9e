//! Convolutions by Winograd's minimal filtering (Lavin and Gray 2016).
//!
//! A cell of output voxels needs fewer products for each pair of channels than it has taps: the
//! input voxels around it and the weights are each transformed to as many values as there are
//! points, multiplied one by one, summed over the input channels and transformed back. [`filter`]
//! has the transforms.
//!
//! A unit of work loads its voxels into scratch as the direct kernels do, then goes over its cells
//! in groups small enough that transformed inputs and products stay in the second-level cache while
//! weights are streamed. The output transform along d is only sums and differences of products, so
//! it is applied where they are summed: a strip takes d's points one after the other, and its
//! registers hold both outputs along d. That saves half of the products' traffic, and half of the
//! work along h and w. The weights are transformed in float64.

mod filter;
mod kernels;
mod wide;

use super::place::{DEEP, OutputPlacement, SLAB};
use super::sums::{STREAM, add_sums};
use super::tile::Tiling;
use super::weights::{PackedConv, Transformed, work};
use super::{ConvInput, ConvOutput, Epilogue};
use crate::device::{Cpu, DisjointWriter, simd};
use crate::microkernel::pack::packed_bf16_pairs;
use crate::microkernel::strip::split;
use crate::ops::norm::Sums;
use crate::tensor::Tensor;
pub(crate) use filter::Kind;
use kernels::{Cells, Kernels};
use std::ops::Range;

/// The most channels, in and out, and the fewest voxels of a layer that is computed tile by tile:
/// beyond that the transformed weights fit no cache, and are read for all tiles at once.
const MOST: usize = 128;
const LEAST: usize = 1 << 12;
/// The fewest voxels of a layer whose weights are read for all tiles at once.
const LEAST_WIDE: usize = 1 << 6;

/// The filters with which a layer of 27 or 8 taps over `[d, h, w]` runs; none if the direct kernels
/// are faster.
pub(crate) fn kind(cpu: &Cpu, conv: &PackedConv, [d, h, w]: [usize; 3]) -> Option<Kind> {
    let (c, outs) = (conv.in_channels(), conv.out_channels());
    let wide = is_wide(conv, [d, h, w]);
    let kind = match conv.taps {
        8 => Kind::F2x2,
        // Broad cells have more than twice as many weights, and larger coefficients, which lose a
        // bit too many if factors are bfloat16.
        _ if !wide && h % 4 + w % 4 == 0 && !cpu.bf16_pairs(c) => Kind::F2x3F4x3,
        _ => Kind::F2x3,
    };
    let fits = d % 2 + h % 2 + w % 2 == 0
        && c % 16 == 0
        && c % conv.ic_block == 0
        && outs % kernels::of(cpu.isa(), outs, kind).oc_block == 0;
    // Deeper maps may be convolved in place, slab by slab.
    let pays = !wide || kind == Kind::F2x3 && d * h * w >= LEAST_WIDE && d < DEEP;
    (fits && pays).then_some(kind)
}

/// Whether a layer's transformed weights fit no cache, or are many compared with the voxels.
fn is_wide(conv: &PackedConv, [d, h, w]: [usize; 3]) -> bool {
    conv.in_channels().max(conv.out_channels()) > MOST || d * h * w < LEAST
}

impl PackedConv {
    /// The weights transformed, laid out when first needed.
    pub(crate) fn transformed(&self, cpu: &Cpu, kind: Kind) -> &Transformed {
        let at = usize::from(kind == Kind::F2x3F4x3)
            + 2 * usize::from(cpu.bf16_pairs(self.in_channels()));
        self.winograd[at].get_or_init(|| Transformed::new(cpu, self, kind))
    }
}

impl Transformed {
    /// Transforms a convolution's weights.
    pub fn new(cpu: &Cpu, conv: &PackedConv, kind: Kind) -> Transformed {
        let (c, outs) = (conv.in_channels(), conv.out_channels());
        let kernels = kernels::of(cpu.isa(), outs, kind);
        let (bf16_pairs, oc_block, points) =
            (cpu.bf16_pairs(c), kernels.oc_block, kernels.algorithm.count());
        let edge = if conv.taps == 8 { 2 } else { 3 };
        let size = points * c * outs;
        let raw = conv.raw(cpu);
        let mut values = if bf16_pairs { cpu.alloc(size) } else { cpu.alloc_persistent(size) };
        let to = DisjointWriter::new(&mut values);
        // One input of a block of outputs at a time: `[point][out of the block]`.
        cpu.for_each(outs / oc_block * c, |unit| {
            let (block, i) = (unit / c, unit % c);
            let mut transformed = vec![0.0; points * oc_block];
            for o in 0..oc_block {
                let all = kernels
                    .algorithm
                    .filter_transform(edge, |tap| raw.weight(block * oc_block + o, i, tap) as f64);
                all[..points]
                    .iter()
                    .enumerate()
                    .for_each(|(p, v)| transformed[p * oc_block + o] = *v as f32);
            }
            for (p, from) in transformed.chunks_exact(oc_block).enumerate() {
                let [depth, plane] = [kernels.algorithm.points[0], kernels.algorithm.plane()];
                let at = ((p % plane * outs + block * oc_block) * depth + p / plane * oc_block) * c
                    + i * oc_block;
                // SAFETY: each unit writes places of its own.
                unsafe { to.slice(at, oc_block) }.copy_from_slice(from);
            }
        });
        Transformed {
            values: if bf16_pairs {
                cpu.persistent_copy(&packed_bf16_pairs(cpu, &values, oc_block))
            } else {
                values
            },
        }
    }
}

/// Approximate number of floats of a group's values: the transformed weights are read again for
/// each group, and its values should share the second-level cache with them and the tile.
const VALUES: usize = 1 << 16;
/// Channels summed in one run before they are added to the total. The transforms double the effect
/// of rounding on a sum, so its chains are shorter than the direct kernels'; the additions run in
/// parallel with the multiply-adds of the next run and take no measurable time.
const CHAIN: usize = 16;
/// [`CHAIN`] for wide layers, whose totals are longer.
const CHAIN_WIDE: usize = 48;

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
    /// Whether products take the place of their values.
    in_place: bool,
    /// Whether the output is too large to be in a cache when its reader runs.
    stream: bool,
}

/// The destination of a tile's outputs, and what they are added to: addresses of the first voxel's
/// first channel, and floats from one voxel to the next along d, h and w.
pub(crate) struct Destination<'a> {
    pub to: *mut f32,
    pub strides: [usize; 3],
    pub init: *const f32,
    pub init_strides: [usize; 3],
    /// Sums of each channel's values and of their squares, to add to: `[channel][value, square]`.
    pub sums: &'a mut [f64],
    /// Where the pooled map goes, if there is to be one.
    pub pooled: Option<Pooled<'a>>,
}

/// Where a tile's outputs go pooled.
#[derive(Clone, Copy)]
pub(crate) struct Pooled<'a> {
    pub to: *mut f32,
    pub strides: [usize; 3],
    /// 1 for a channel whose largest of 2×2×2 voxels is wanted, -1 for one whose smallest is.
    pub signs: &'a [f32],
}

impl<'a> Plan<'a> {
    /// The plan for a map of `size` output voxels.
    pub fn new(
        cpu: &Cpu,
        conv: &PackedConv,
        kind: Kind,
        tiling: &'a Tiling,
        voxels: usize,
    ) -> Plan<'a> {
        let (channels, outputs) = (conv.in_channels(), conv.out_channels());
        let bf16_pairs = cpu.bf16_pairs(channels);
        let kernels = kernels::of(cpu.products(channels), outputs, kind);
        let factors = if bf16_pairs { channels / 2 } else { channels };
        let longest = kernels.products.len();
        let mut plan = Plan {
            tiling,
            kernels,
            channels,
            factors,
            outputs,
            group: 0,
            in_place: false,
            stream: voxels * outputs > STREAM,
        };
        let [cell, out_cell] = plan.widths();
        plan.in_place = outputs == kernels.oc_block && out_cell <= cell;
        let floats = kernels.algorithm.plane() * (cell + if plan.in_place { 0 } else { out_cell });
        plan.group = (VALUES / floats).max(longest) / longest * longest;
        plan
    }

    /// Floats that hold a cell's values of a point, and its products.
    fn widths(&self) -> [usize; 2] {
        let algorithm = self.kernels.algorithm;
        [algorithm.points[0] * self.factors, algorithm.out[0] * self.outputs]
    }

    /// Computes a tile of `part` voxels from scratch, whose first input voxel is `shift` voxels
    /// after the halo's first.
    ///
    /// # Safety
    /// Scratch holds the tile and its halo, the destination spans the tile, and nothing else
    /// touches it meanwhile.
    pub unsafe fn run(
        &self,
        cpu: &Cpu,
        weights: &Transformed,
        scratch: &[f32],
        shift: [usize; 3],
        part: [usize; 3],
        destination: Destination,
    ) {
        let Plan { kernels, outputs, group, in_place, .. } = *self;
        let (points, longest) = (kernels.algorithm.plane(), kernels.products.len());
        let [width, out_width] = self.widths();
        // From a point's values to the next point's: one cache line more than they take, so that
        // they do not fall into the same few sets of the cache.
        let [from_point, to_point] =
            [width, if in_place { 0 } else { out_width }].map(|width| group * width + 16);
        let mut values = cpu.alloc(points * (from_point + to_point));
        let (x, m) = values.split_at_mut(points * from_point);
        let (x, m) = (x.as_mut_ptr(), if in_place { std::ptr::null_mut() } else { m.as_mut_ptr() });
        // What replaces the values has the same distances as they have.
        let (m, to_point, out_width) =
            if in_place { (x, from_point, width) } else { (m, to_point, out_width) };
        let mut sums = [0.0; 2 * MOST];
        let values = self.cells(from_point, out_width, None, &mut []);
        let products = self.cells(to_point, out_width, Some(&destination), &mut sums);
        let count = self.count(part);
        let mut first = 0;
        while first < count {
            // Strips of nearly equal length.
            let strips = (count - first).div_ceil(group) * (group / longest);
            let here = ((count - first).div_ceil(strips) * (group / longest))
                .min(count - first)
                .min(group);
            // SAFETY: cells lie within the tile and its halo, groups within the buffers; the rest
            // is guaranteed by the caller.
            unsafe {
                self.gather(&values, self.origin(scratch, shift), part, first..first + here, x);
                for point in 0..points {
                    for o in (0..outputs).step_by(kernels.oc_block) {
                        self.multiply(
                            &values,
                            x.add(point * from_point),
                            weights,
                            point,
                            o,
                            m.add(point * to_point),
                            here,
                        );
                    }
                }
                self.scatter(&products, m, part, first..first + here, &destination);
            }
            first += here;
        }
        add_sums(&sums[..2 * outputs], destination.sums);
    }

    /// What the kernels read and write, with the given number of floats from a point's values of
    /// all cells to the next point's, and from a cell's products to the next's.
    fn cells(
        &self,
        points: usize,
        out_cell: usize,
        destination: Option<&Destination>,
        sums: &mut [f64],
    ) -> Cells {
        let pooled = destination.and_then(|d| d.pooled);
        Cells {
            ic_block: self.tiling.ic_block,
            row: self.tiling.row_stride(),
            plane: self.tiling.plane_stride(),
            points,
            cell: self.widths()[0],
            out_cell,
            channels: self.factors,
            chain: if self.channels > MOST { CHAIN_WIDE } else { CHAIN },
            outs: self.outputs,
            oc_block: self.kernels.oc_block,
            to: destination.map_or([0; 3], |d| d.strides),
            init: destination.map_or([0; 3], |d| d.init_strides),
            stream: self.stream,
            sums: sums.as_mut_ptr(),
            signs: pooled.map_or(std::ptr::null(), |p| p.signs.as_ptr()),
            pooled: pooled.map_or([0; 3], |p| p.strides),
        }
    }

    /// Cells of a tile of `part` voxels.
    fn count(&self, part: [usize; 3]) -> usize {
        part.iter().zip(self.kernels.algorithm.out).map(|(side, out)| side / out).product()
    }

    /// The first voxel of a cell of a tile.
    fn place(&self, cell: usize, part: [usize; 3]) -> [usize; 3] {
        let out = self.kernels.algorithm.out;
        let across = [part[1] / out[1], part[2] / out[2]];
        [
            cell / across[1] / across[0] * out[0],
            cell / across[1] % across[0] * out[1],
            cell % across[1] * out[2],
        ]
    }

    /// The first cell's first input voxel.
    fn origin<'s>(&self, scratch: &'s [f32], [d, h, w]: [usize; 3]) -> &'s [f32] {
        &scratch[d * self.tiling.plane_stride()
            + h * self.tiling.row_stride()
            + w * self.tiling.ic_block..]
    }

    /// Transforms some cells of a tile to `x`.
    ///
    /// # Safety
    /// `from` holds the tile and its halo, `x` has room for the cells at every point.
    unsafe fn gather(
        &self,
        cells: &Cells,
        from: &[f32],
        part: [usize; 3],
        which: Range<usize>,
        x: *mut f32,
    ) {
        let (tiling, across) = (self.tiling, part[2] / self.kernels.algorithm.out[2]);
        let mut i = which.start;
        while i < which.end {
            let [a, b, k] = self.place(i, part);
            let run = (across - k / self.kernels.algorithm.out[2]).min(which.end - i);
            let at = a * cells.plane + b * cells.row + k * cells.ic_block;
            for block in 0..tiling.blocks {
                // SAFETY: guaranteed by the caller.
                unsafe {
                    let from = from.as_ptr().add(block * tiling.block_stride() + at);
                    let to = x.add(
                        (i - which.start) * cells.cell
                            + block * tiling.ic_block * self.factors / self.channels,
                    );
                    (self.kernels.gather)(cells, from, to, run);
                }
            }
            i += run;
        }
    }

    /// Multiplies a number of cells' values of a point by its weights of the block of outputs from
    /// `o` on.
    ///
    /// # Safety
    /// `x` and `m` span the cells.
    #[allow(clippy::too_many_arguments)]
    unsafe fn multiply(
        &self,
        cells: &Cells,
        x: *const f32,
        weights: &Transformed,
        point: usize,
        o: usize,
        m: *mut f32,
        count: usize,
    ) {
        let size = self.outputs * cells.cell;
        let weights = &weights.values[point * size + o * cells.cell..];
        let mut at = 0;
        for (times, size) in
            split(count, self.kernels.products.len()).into_iter().filter(|(times, _)| *times > 0)
        {
            // SAFETY: guaranteed by the caller.
            unsafe {
                let (x, to) = (x.add(at * cells.cell), m.add(at * cells.out_cell + o));
                (self.kernels.products[size - 1])(cells, x, weights.as_ptr(), to, times);
            }
            at += times * size;
        }
    }

    /// Transforms the products of some cells of a tile to their voxels, and writes them to their
    /// places.
    ///
    /// # Safety
    /// `m` spans the cells at every point, the destination the tile.
    unsafe fn scatter(
        &self,
        cells: &Cells,
        m: *const f32,
        part: [usize; 3],
        which: Range<usize>,
        destination: &Destination,
    ) {
        let Plan { kernels, outputs, .. } = *self;
        let first = which.start;
        for i in which {
            let at = self.place(i, part);
            let offset =
                |strides: [usize; 3]| at.iter().zip(strides).map(|(a, s)| a * s).sum::<usize>();
            // SAFETY: guaranteed by the caller.
            unsafe {
                let (to, init) = (
                    destination.to.add(offset(cells.to)),
                    destination.init.add(offset(cells.init)),
                );
                // Cells are even.
                let pooled = destination.pooled.map(|p| p.to.add(offset(cells.pooled) / 2));
                let scatter = kernels.scatter[usize::from(pooled.is_some())];
                let pooled = pooled.unwrap_or(std::ptr::null_mut());
                for o in (0..outputs).step_by(kernels.oc_block) {
                    scatter(
                        cells,
                        o,
                        m.add((i - first) * cells.out_cell + o),
                        init.add(o),
                        to.add(o),
                        pooled.wrapping_add(o),
                    );
                }
            }
        }
        if self.stream {
            simd::fence();
        }
    }
}

/// The convolution of an input that is already pooled.
pub fn conv3d(
    cpu: &Cpu,
    x: ConvInput,
    extent: [usize; 5],
    conv: &PackedConv,
    kind: Kind,
    epilogue: Epilogue,
) -> ConvOutput {
    let ConvInput { map, prologue } = x;
    let [n, d, h, w, c] = extent;
    let algorithm = kernels::of(cpu.isa(), conv.out_channels(), kind).algorithm;
    let _op = cpu.op("conv3d winograd", || {
        work(extent, conv, algorithm.count() as f64 / algorithm.voxels() as f64)
    });
    let weights = conv.transformed(cpu, kind);
    let tiling = Tiling::in_cells([d, h, w], algorithm.out, c, conv.ic_block, SLAB);
    let plan = Plan::new(cpu, conv, kind, &tiling, n * d * h * w);
    let outputs = conv.out_channels();
    let wide = is_wide(conv, [d, h, w]);
    let place = match wide {
        true => OutputPlacement::apart(cpu, map, &prologue, extent, &tiling, outputs),
        false => OutputPlacement::new(cpu, map, &prologue, extent, &tiling, outputs),
    };
    let (source, out) = (place.source(), place.out());
    let units = n * tiling.tiles();
    let mut partial = cpu.zeros_f64(units * outputs * 2);
    let sums_at = DisjointWriter::new(&mut partial);
    let half = [n, d / 2, h / 2, w / 2, outputs];
    let signs: Option<Vec<f32>> =
        epilogue.pool.map(|weight| weight.data().iter().map(|w| 1f32.copysign(*w)).collect());
    let mut pooled = signs.as_deref().map(|signs| (signs, cpu.alloc(half.iter().product())));
    let pooled_at = pooled.as_mut().map(|(signs, pooled)| (*signs, DisjointWriter::new(pooled)));
    let destination = |unit: usize| {
        let ([i0, j0, k0], _) = tiling.part(unit % tiling.tiles(), [d, h, w]);
        // SAFETY: the tile lies within the map, and its sums are its own.
        unsafe {
            Destination {
                to: out.at((((unit / tiling.tiles() * d + i0) * h + j0) * w + k0) * outputs),
                strides: [h * w * outputs, w * outputs, outputs],
                init: conv.biases().as_ptr(),
                init_strides: [0; 3],
                sums: sums_at.slice(unit * outputs * 2, outputs * 2),
                pooled: pooled_at.as_ref().map(|(signs, to)| Pooled {
                    to: to.at((((unit / tiling.tiles() * half[1] + i0 / 2) * half[2] + j0 / 2)
                        * half[3]
                        + k0 / 2)
                        * outputs),
                    strides: [half[2] * half[3] * outputs, half[3] * outputs, outputs],
                    signs,
                }),
            }
        }
    };
    if wide {
        // Tiles are read while others are already being written.
        assert!(place.is_apart(), "a wide layer's output lies apart from its input");
        wide::run(cpu, source, extent, &plan, weights, destination);
    } else {
        place.for_each_tile(cpu, n, &tiling, 1, |unit| {
            let (item, t) = (unit / tiling.tiles(), unit % tiling.tiles());
            let mut scratch = cpu.alloc(tiling.scratch());
            let (_, part) = tiling.part(t, [d, h, w]);
            // SAFETY: in the order of `OutputPlacement::for_each_tile`, nothing writes to what a
            // tile has yet to read; the tile's voxels are this unit's own.
            unsafe {
                tiling.load(cpu.isa(), source, extent, item, t, &mut scratch);
                plan.run(cpu, weights, &scratch, [0; 3], part, destination(unit));
            }
        });
    }
    let sums = epilogue.sums.then(|| Sums::reduce(&partial, n, outputs, (d * h * w) as f64));
    let pooled = pooled.map(|(_, pooled)| Tensor::from_buffer(half, pooled));
    let map = Tensor::from_buffer([n, d, h, w, outputs], place.finish());
    ConvOutput { map, sums, pooled }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A wide layer goes over many tiles at a time, in an order that would not let its output be
    /// shifted over its input, however much room there is after it.
    #[test]
    fn a_wide_layers_output_lies_apart_from_an_input_with_room() {
        let cpu = Cpu::new(2).unwrap();
        let noise = |shape: &[usize]| {
            let count: usize = shape.iter().product();
            Tensor::new(shape, (0..count).map(|i| (i * 7919 % 997) as f32 / 997.0 - 0.5).collect())
        };
        let (c, size) = (64, [32, 8, 8]);
        let extent = [1, size[0], size[1], size[2], c];
        let (x, weight) = (noise(&extent), noise(&[c, c, 3, 3, 3]));
        let conv = PackedConv::new(&cpu, &weight, 0..c, None).unwrap();
        let kind = kind(&cpu, &conv, size).unwrap();
        assert!(is_wide(&conv, size));
        let convolved = |x| conv3d(&cpu, x, extent, &conv, kind, Epilogue::NONE).map;
        let expected = convolved(ConvInput::shared(&x));
        let mut buffer = cpu.alloc_with_headroom(x.len(), (SLAB + 2) * size[1] * size[2] * c);
        buffer.copy_from_slice(x.data());
        let y = convolved(ConvInput::owned(Tensor::from_buffer(extent, buffer)));
        assert!(y.data() == expected.data(), "a tile read what another had written");
    }
}
