//! Gradients of the convolution: of its input by a convolution with mirrored weights, of its
//! weights by outer products over tiles, and of the operations on its input during load.

use super::tile::{TileSource, Tiling};
use super::{ConvInput, Epilogue, PackedConv, Packer, Prologue, conv3d};
use crate::device::simd::multiversion;
use crate::device::{Cpu, Device, DisjointWriter};
use crate::memory;
use crate::microkernel::item_norm::ItemNorm;
use crate::microkernel::outer_product::{self, Outer};
use crate::microkernel::strip::{self, split};
use crate::ops::reduce::{added, check_so_far, onto};
use crate::tensor::{GRADIENT, OpError, Tensor};

const OP: &str = "conv3d gradient";
/// Groups of tiles with separate sums; a fixed number, so that results do not depend on the number
/// of threads.
const GROUPS: usize = 16;

/// The weights for [`input`]: a convolution with them turns the gradient of the output into that of
/// the input. They are the given ones with the taps in reverse order, inputs and outputs exchanged.
pub fn mirrored(cpu: &Cpu, conv: &PackedConv) -> PackedConv {
    let (out, inputs) = (conv.out_channels(), conv.in_channels());
    let packer = Packer { outputs: inputs, inputs: out, taps: 27 };
    if let Some(given) = conv.given_on_device() {
        return packer.conv(cpu, None, [inputs, out, 3, 3, 3], Some(given.mirror()));
    }
    packer.pack(cpu, None, [inputs, out, 3, 3, 3], |o, i, t| conv.weight(i, o, 26 - t))
}

/// The gradient of the input as the convolution loaded it, after its prologue, `[n, d, h, w, in]`,
/// from that of the output, `dy` `[n, d, h, w, out]`; `mirrored` comes from [`mirrored()`].
pub fn input(device: &Device, mirrored: &PackedConv, dy: &Tensor) -> Result<Tensor, OpError> {
    Ok(conv3d(device, ConvInput::shared(dy), mirrored, Epilogue::NONE)?.map)
}

/// One reduction over a map: which input offsets, and which voxels of the output gradient.
pub(crate) struct Pass<'a> {
    /// Offsets of the taps in a tile.
    pub taps: Vec<isize>,
    /// The offset of the first output voxel of a row `(item, i, j)`.
    pub row_at: Box<dyn Fn(usize, usize, usize) -> usize + Sync + 'a>,
    /// Floats from an output voxel of a row to the next.
    pub voxel: usize,
}

/// `Σ_p x[p + t, c] dy[p, o]` for each pass: `[out][in][taps]`, in float32 with each tile summed
/// separately.
pub(crate) fn outer_products(
    cpu: &Cpu,
    x: &ConvInput,
    extent: [usize; 5],
    dy: &[f32],
    outputs: usize,
    passes: impl Fn(&Tiling) -> Vec<Pass<'static>>,
) -> Vec<Vec<f32>> {
    let [n, d, h, w, c] = extent;
    let block = strip::ic_block(c);
    let tiling = Tiling::new([d, h, w], c, block);
    let passes = passes(&tiling);
    let pooled = x.pooled(cpu, extent);
    let source = TileSource::new(pooled.as_ref().unwrap_or(x));
    let oc_block = strip::kernels(cpu.isa(), block, outputs).oc_block;
    let loops = outer_product::kernels(cpu.isa(), outputs);
    let (tiles, across) = (n * tiling.tiles(), outputs.div_ceil(oc_block));
    let groups = tiles.min(GROUPS);
    let sizes: Vec<usize> =
        passes.iter().map(|p| tiling.blocks * p.taps.len() * block * oc_block).collect();
    let each: usize = sizes.iter().sum();
    let mut partial = cpu.zeros(groups * across * each);
    cpu.chunks_mut(&mut partial, each, |unit, sums| {
        let (group, ob) = (unit / across, unit % across);
        let valid = oc_block.min(outputs - ob * oc_block);
        let mut scratch = cpu.alloc(tiling.scratch());
        let mut gradients = cpu.alloc(tiling.tile[0] * tiling.tile[1] * w * oc_block);
        for tile in group * tiles / groups..(group + 1) * tiles / groups {
            let (item, t) = (tile / tiling.tiles(), tile % tiling.tiles());
            // SAFETY: nothing writes to the input.
            unsafe { tiling.load(cpu.isa(), &source, extent, item, t, &mut scratch) };
            let ([i0, j0], [ni, nj]) = tiling.rows(t, d, h);
            let mut sums = &mut *sums;
            for (pass, &size) in passes.iter().zip(&sizes) {
                let (mine, rest) = std::mem::take(&mut sums).split_at_mut(size);
                sums = rest;
                for (row, to) in gradients.chunks_exact_mut(w * oc_block).enumerate().take(ni * nj)
                {
                    let at = (pass.row_at)(item, i0 + row / nj, j0 + row % nj) + ob * oc_block;
                    for (k, to) in to.chunks_exact_mut(oc_block).enumerate() {
                        to[..valid].copy_from_slice(&dy[at + k * pass.voxel..][..valid]);
                        to[valid..].fill(0.0);
                    }
                }
                for (slot, sums) in mine.chunks_exact_mut(block * oc_block).enumerate() {
                    let (ib, tap) = (slot / pass.taps.len(), slot % pass.taps.len());
                    let start = ib * tiling.block_stride()
                        + tiling.plane_stride()
                        + tiling.row_stride()
                        + block;
                    let mut channel = 0;
                    for (count, size) in split(block.min(c - ib * block), loops.len()) {
                        for _ in 0..count {
                            // SAFETY: a tile holds its rows with a halo of one voxel, which the
                            // taps do not leave; the sums span the block.
                            unsafe {
                                loops[size - 1](&Outer {
                                    x: scratch.as_ptr().add(start + channel).offset(pass.taps[tap]),
                                    x_stride: [block, tiling.row_stride(), tiling.plane_stride()],
                                    dy: gradients.as_ptr(),
                                    size: [ni, nj, w],
                                    grad: sums[channel * oc_block..].as_mut_ptr(),
                                });
                            }
                            channel += size;
                        }
                    }
                }
            }
        }
    });
    let mut first = 0;
    let mut results = vec![];
    for (pass, size) in passes.iter().zip(sizes) {
        let taps = pass.taps.len();
        let mut out: Vec<f32> = memory::zeroed(GRADIENT, outputs * c * taps);
        cpu.chunks_mut(&mut out, c * taps, |o, row| {
            for (at, v) in row.iter_mut().enumerate() {
                let (i, tap) = (at / taps, at % taps);
                let slot = ((i / block * taps + tap) * block + i % block) * oc_block + o % oc_block;
                *v = (0..groups)
                    .map(|g| partial[(g * across + o / oc_block) * each + first + slot])
                    .sum();
            }
        });
        first += size;
        results.push(out);
    }
    results
}

/// The gradient of the weights from the convolution's input `x` and the gradient of its output,
/// `dy` `[n, d, h, w, out]`; its values are in the order of the weights `[out, in, 3, 3, 3]`.
pub fn weight(device: &Device, x: &ConvInput, dy: &Tensor) -> Result<Tensor, OpError> {
    weight_onto(device, x, dy, None)
}

/// Adds the gradient that [`weight`] computes to the gradient so far, if there is one, and returns
/// the sum, which may use its memory.
pub fn weight_onto(
    device: &Device,
    x: &ConvInput,
    dy: &Tensor,
    so_far: Option<Tensor>,
) -> Result<Tensor, OpError> {
    let extent = x.extent(OP)?;
    let [n, d, h, w, _] = extent;
    let out = dy.channels();
    dy.expect_shape(OP, "dy", &[n, d, h, w, out])?;
    if let Device::Cuda(cuda) = device {
        return super::cuda::weight_gradient(cuda, x, extent, dy, 1, so_far);
    }
    let pass = |t: &Tiling| Pass {
        taps: t.taps27(),
        row_at: Box::new(move |item, i, j| ((item * d + i) * h + j) * w * out),
        voxel: out,
    };
    let cpu = device.cpu();
    let part = outer_products(cpu, x, extent, dy.data(), out, |t| vec![pass(t)]).remove(0);
    Ok(added(cpu, so_far, part.into()))
}

multiversion! {
    /// Passes the gradients of a row of pooled voxels to the largest of the eight under each, the
    /// first of equals.
    fn unpool_row(
        rows: &[&[f32]; 4],
        adds: Option<[&[f32]; 4]>,
        norm: Option<&ItemNorm>,
        c: usize,
        g: &[f32],
        out: &mut [Vec<f32>; 4],
    ) {
        let mut value = vec![0.0f32; c];
        let mut best = vec![0.0f32; c];
        let mut winner = vec![0u32; c];
        for (k, g) in g.chunks_exact(c).enumerate() {
            best.fill(f32::NEG_INFINITY);
            winner.fill(0);
            for corner in 0..8usize {
                let at = (2 * k + corner % 2) * c;
                let x = &rows[corner / 2][at..][..c];
                match norm {
                    Some(norm) => norm.run::<FUSED>(x, 0, &mut value),
                    None => value.copy_from_slice(x),
                }
                if let Some(adds) = &adds {
                    let add = &adds[corner / 2][at..][..c];
                    for q in 0..c {
                        value[q] += add[q];
                    }
                }
                let (value, best, winner) = (&value[..c], &mut best[..c], &mut winner[..c]);
                for q in 0..c {
                    let larger = value[q] > best[q];
                    best[q] = if larger { value[q] } else { best[q] };
                    winner[q] = if larger { corner as u32 } else { winner[q] };
                }
            }
            for corner in 0..8usize {
                let to = &mut out[corner / 2][(2 * k + corner % 2) * c..][..c];
                let winner = &winner[..c];
                for q in 0..c {
                    to[q] = if winner[q] == corner as u32 { g[q] } else { 0.0 };
                }
            }
        }
    }
}

/// The gradient of a map before max-pooling, from that of the pooled map, `g`
/// `[n, d / 2, h / 2, w / 2, c]`: each value goes to the largest of its 2×2×2 voxels, the first of
/// equals, and the others get 0; the result is the sum of that and the gradient so far, of as many
/// values as the map, if there is one.
///
/// `x` is the input whose values were pooled; its norm and addition are applied to find the
/// largest. The result is the gradient after these.
pub fn unpool(
    device: &Device,
    x: &ConvInput,
    g: &Tensor,
    so_far: Option<&Tensor>,
) -> Result<Tensor, OpError> {
    let [n, d, h, w, c] = x.clone().max_pooled().extent(OP)?;
    g.expect_shape(OP, "the pooled map's gradient", &[n, d, h, w, c])?;
    check_so_far(OP, so_far, x.map.len())?;
    let cpu = match device {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(cuda) => return super::cuda::unpool(cuda, x, g, so_far),
    };
    let mut out = cpu.alloc(x.map.len());
    let to = DisjointWriter::new(&mut out);
    let Prologue { norm, add, .. } = &x.prologue;
    let norms: Option<Vec<ItemNorm>> =
        norm.as_ref().map(|norm| (0..n).map(|i| norm.item(i, c)).collect());
    cpu.for_each(n * d * h, |line| {
        let (item, i, j) = (line / h / d, line / h % d, line % h);
        let start = |q: usize| (((item * d + i) * 2 + q / 2) * 2 * h + 2 * j + q % 2) * 2 * w * c;
        let rows: [&[f32]; 4] = std::array::from_fn(|q| &x.map.data()[start(q)..][..2 * w * c]);
        let adds =
            add.as_ref().map(|a| std::array::from_fn(|q| &a.data()[start(q)..][..2 * w * c]));
        let mut routed: [Vec<f32>; 4] = std::array::from_fn(|_| vec![0.0; 2 * w * c]);
        let norm = norms.as_ref().map(|v| &v[item]);
        unpool_row(
            cpu.isa(),
            &rows,
            adds,
            norm,
            c,
            &g.data()[line * w * c..][..w * c],
            &mut routed,
        );
        for (q, routed) in routed.iter().enumerate() {
            // SAFETY: each pooled line owns its four fine rows.
            unsafe { to.slice(start(q), 2 * w * c) }.copy_from_slice(routed);
        }
    });
    onto(cpu, so_far, Tensor::from_buffer(x.map.shape(), out))
}
