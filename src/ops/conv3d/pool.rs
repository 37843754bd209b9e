//! Max-pooling on the CPU, norm, activation and addition included: once per voxel, before the
//! convolution that needs it, if the convolution that wrote the map did not pool it. Tiles with
//! their halos would read the larger map nearly twice.

use super::{ConvInput, Prologue};
use crate::device::Cpu;
use crate::device::profile::OpCost;
use crate::microkernel::item_norm::ItemNorm;
use crate::microkernel::load_row::pool_row;
use crate::tensor::Tensor;

/// The largest of each 2×2×2 voxels of the input: `extent` `[n, d, h, w, c]`, half its map's size.
pub(crate) fn pooled(cpu: &Cpu, x: &ConvInput, extent: [usize; 5]) -> Tensor {
    let [n, d, h, w, c] = extent;
    let Prologue { norm, add, .. } = &x.prologue;
    let _op = cpu.op("max pool", || OpCost {
        problem: format!("{c} channels to {d}x{h}x{w}"),
        flops: 0.0,
        floats: n * d * h * w * c * (9 + 8 * usize::from(add.is_some())),
    });
    let norms: Vec<ItemNorm> =
        norm.as_ref().map_or(vec![], |norm| (0..n).map(|item| norm.item(item, c)).collect());
    let mut out = cpu.alloc(extent.iter().product());
    cpu.chunks_mut(&mut out, h * w * c, |plane, out| {
        for (j, out) in out.chunks_exact_mut(w * c).enumerate() {
            for q in 0..4 {
                let at = ((2 * plane + q / 2) * 2 * h + 2 * j + q % 2) * 2 * w * c;
                let at = at..at + 2 * w * c;
                let add = add.as_ref().map(|add| &add.data()[at.clone()]);
                pool_row(cpu.isa(), &x.map.data()[at], add, norms.get(plane / d), c, q == 0, out);
            }
        }
    });
    Tensor::from_buffer(extent, out)
}
