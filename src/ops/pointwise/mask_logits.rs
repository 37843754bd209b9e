//! Mask logits on the CPU: a dense layer of few outputs over every voxel, on the convolutions'
//! strips, the norm applied as a run of voxels is loaded.

use crate::device::{Buffer, Cpu, DisjointWriter};
use crate::memory;
use crate::microkernel::load_row::{ScratchRow, scatter_row};
use crate::microkernel::pack::pack_weights;
use crate::microkernel::strip::{self, Kernels, MicrokernelArgs, split};
use crate::ops::norm::ChannelNorm;
use crate::tensor::Tensor;

/// Voxels of a unit of work; a multiple of 8, whose bits make a byte.
const RUN: usize = 2048;
/// Voxels that are loaded and multiplied at a time.
const GROUP: usize = 128;

/// A map with its norm, the map that is added to it, and the layer.
pub(super) struct MaskLogits<'a> {
    pub x: &'a Tensor,
    pub norm: &'a ChannelNorm,
    pub add: Option<&'a Tensor>,
    /// `[m, c]`.
    pub weights: &'a Tensor,
    /// `[m]`.
    pub bias: Option<&'a Tensor>,
}

impl MaskLogits<'_> {
    /// Calls `sink(first voxel, values)` for runs of voxels that are multiples of 8 apart; values
    /// are `[voxel][stride]`, the first `m` of each voxel's being the layer's.
    fn run(&self, cpu: &Cpu, sink: impl Fn(usize, &[f32], usize) + Sync + Send) {
        let c = self.x.channels();
        let (voxels, m) = (self.x.rows(), self.weights.len() / c);
        let wide = strip::ic_block(c).max(8);
        let Kernels { microkernels, oc_block } = strip::kernels(cpu.isa(), wide, m);
        let (blocks, across) = (c.div_ceil(wide), m.div_ceil(oc_block));
        let stride = across * oc_block;
        let mut packed = cpu.alloc(across * blocks * wide * oc_block);
        let mut bias = cpu.zeros(stride);
        if let Some(values) = self.bias {
            bias[..m].copy_from_slice(values.data());
        }
        cpu.chunks_mut(&mut packed, blocks * wide * oc_block, |ob, to| {
            let (first, end) = (ob * oc_block, ((ob + 1) * oc_block).min(m));
            pack_weights(cpu.isa(), &self.weights.data()[first * c..end * c], c, c, oc_block, to);
        });
        let item = self.norm.item(0, c);
        let place =
            ScratchRow { at: 0, block_stride: GROUP * wide, ic_block: wide, padding: [0; 2] };
        cpu.for_each(voxels.div_ceil(RUN), |unit| {
            let mut scratch = cpu.zeros(GROUP * (blocks * wide + stride));
            let (loaded, sums) = scratch.split_at_mut(GROUP * blocks * wide);
            let end = ((unit + 1) * RUN).min(voxels);
            for at in (unit * RUN..end).step_by(GROUP) {
                let count = GROUP.min(end - at);
                let part = at * c..(at + count) * c;
                let add = self.add.map(|a| &a.data()[part.clone()]);
                scatter_row(cpu.isa(), &self.x.data()[part], add, Some(&item), c, place, loaded);
                for ob in 0..across {
                    let mut v = 0;
                    for (count, size) in split(count, microkernels.len()) {
                        for _ in 0..count {
                            // SAFETY: the strips stay within the loaded voxels, a block of weights
                            // and their sums.
                            unsafe {
                                microkernels[size - 1](&MicrokernelArgs {
                                    x: loaded.as_ptr().add(v * wide),
                                    blocks,
                                    block_stride: GROUP * wide,
                                    weights: packed[ob * blocks * wide * oc_block..].as_ptr(),
                                    init: bias[ob * oc_block..].as_ptr(),
                                    init_stride: 0,
                                    out: sums[v * stride + ob * oc_block..].as_mut_ptr(),
                                    out_stride: stride,
                                    ..MicrokernelArgs::DENSE
                                });
                            }
                            v += size;
                        }
                    }
                }
                sink(at, &sums[..count * stride], stride);
            }
        });
    }

    /// All maps, `[m][voxels]`.
    pub fn maps(&self, cpu: &Cpu) -> Buffer {
        let (voxels, m) = (self.x.rows(), self.weights.len() / self.x.channels());
        let mut out = cpu.alloc(m * voxels);
        let to = DisjointWriter::new(&mut out);
        self.run(cpu, |at, values, stride| {
            for j in 0..m {
                // SAFETY: each run writes its own part of each map.
                let map = unsafe { to.slice(j * voxels + at, values.len() / stride) };
                map.iter_mut().zip(values.chunks_exact(stride)).for_each(|(o, v)| *o = v[j]);
            }
        });
        out
    }

    /// Map `chosen` alone, and one bit per voxel of every map, set if positive, first voxel in the
    /// highest bit.
    pub fn chosen(&self, cpu: &Cpu, chosen: usize) -> (Buffer, Vec<Vec<u8>>) {
        let (voxels, m) = (self.x.rows(), self.weights.len() / self.x.channels());
        let mut out = cpu.alloc(voxels);
        let mut bits: Vec<Vec<u8>> =
            (0..m).map(|_| memory::zeroed("candidate masks", voxels.div_ceil(8))).collect();
        let to = DisjointWriter::new(&mut out);
        let rows: Vec<DisjointWriter<u8>> =
            bits.iter_mut().map(|row| DisjointWriter::new(row)).collect();
        self.run(cpu, |at, values, stride| {
            // SAFETY: each run writes its own voxels and, being multiples of 8 apart, its own
            // bytes.
            let map = unsafe { to.slice(at, values.len() / stride) };
            map.iter_mut().zip(values.chunks_exact(stride)).for_each(|(o, v)| *o = v[chosen]);
            for (j, row) in rows.iter().enumerate() {
                // SAFETY: as above.
                let bytes = unsafe { row.slice(at / 8, map.len().div_ceil(8)) };
                for (byte, eight) in bytes.iter_mut().zip(values.chunks(8 * stride)) {
                    *byte = eight
                        .chunks_exact(stride)
                        .enumerate()
                        .fold(0u8, |b, (i, v)| b | u8::from(v[j] > 0.0) << (7 - i));
                }
            }
        });
        (out, bits)
    }
}
