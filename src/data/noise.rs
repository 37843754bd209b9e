//! Smooth random fields.

use crate::memory;
use crate::prompt::simulate::normal;
use rand::Rng;

/// The name of a field in refusals of memory.
const FIELD: &str = "a random field";

/// A field of about unit variance over `size` voxels that varies over `cells` cells along each
/// axis: normal numbers on a lattice, interpolated smoothly.
pub fn field(rng: &mut impl Rng, size: [usize; 3], cells: [usize; 3]) -> Vec<f32> {
    let mut shape = cells.map(|c| c.max(1) + 1);
    let mut values: Vec<f32> = (0..shape.iter().product()).map(|_| normal(rng)).collect();
    // One axis after the other, the fastest first, while the lattice is small.
    for axis in [2, 1, 0] {
        let (from, to) = (shape[axis], size[axis]);
        let inner: usize = shape[axis + 1..].iter().product();
        let outer: usize = shape[..axis].iter().product();
        let places: Vec<(usize, f32)> = (0..to)
            .map(|i| {
                let at = i as f32 * (from - 1) as f32 / (to.max(2) - 1) as f32;
                let low = (at as usize).min(from - 2);
                let part = at - low as f32;
                (low, part * part * (3.0 - 2.0 * part))
            })
            .collect();
        let mut out = memory::zeroed::<f32>(FIELD, outer * to * inner);
        for (block, out) in values.chunks_exact(from * inner).zip(out.chunks_exact_mut(to * inner))
        {
            for ((low, part), out) in places.iter().zip(out.chunks_exact_mut(inner)) {
                let (a, b) = (&block[low * inner..][..inner], &block[(low + 1) * inner..][..inner]);
                for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
                    *o = a + part * (b - a);
                }
            }
        }
        values = out;
        shape[axis] = to;
    }
    values
}

/// A binomial filter `[w, 1 - 2 w, w]` along each axis with its own weight; voxels at the border
/// keep their value along the axis that ends there.
pub fn blur(values: &mut [f32], size: [usize; 3], weights: [f32; 3]) {
    let strides = [size[1] * size[2], size[2], 1];
    for axis in 0..3 {
        let (w, stride, edge) = (weights[axis], strides[axis], size[axis]);
        if w <= 0.0 || edge < 3 {
            continue;
        }
        let from = memory::copied(FIELD, values);
        let (block, last) = (stride * edge, stride * (edge - 1));
        for (out, from) in values.chunks_exact_mut(block).zip(from.chunks_exact(block)) {
            for at in stride..last {
                out[at] = from[at] + w * (from[at - stride] + from[at + stride] - 2.0 * from[at]);
            }
        }
    }
}
