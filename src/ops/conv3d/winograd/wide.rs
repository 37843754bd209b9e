//! Layers whose transformed weights fit no cache: transforms, products and back are three passes over the cells of many tiles, and the weights are read once for all of them.

use super::{Destination, Plan, Weights};
use crate::device::Cpu;
use crate::device::cpu::Shared;
use crate::ops::conv3d::PackedConv;
use crate::ops::conv3d::cpu::{SharedSums, add_sums};
use crate::ops::conv3d::place::{Place, Work};
use crate::ops::norm::Sums;
use crate::tensor::Tensor;

/// Cells that share a reading of the weights, at most: what the passes hand on is to stay in the last cache.
const CELLS: usize = 128;

pub fn conv3d(
    cpu: &Cpu,
    x: Work,
    extent: [usize; 5],
    conv: &PackedConv,
    plan: &Plan,
    weights: &Weights,
    want_sums: bool,
) -> (Tensor, Option<Sums>) {
    let [n, d, h, w, _] = extent;
    let Plan { tiling, kernels, factors, outputs, .. } = *plan;
    let form = kernels.form;
    let place = Place::new(cpu, x, extent, tiling, outputs);
    let units = n * tiling.tiles();
    let mut partial = cpu.wide_zeros(units * outputs * 2);
    let sums_at = SharedSums(partial.as_mut_ptr());
    // Tiles are as large as the first, or smaller.
    let most = plan.count(tiling.tile);
    let at_once = (CELLS / most).clamp(1, units);
    let [from_point, to_point] = [factors, outputs].map(|width| at_once * most * width + 16);
    let mut values = cpu.take(form.count() * from_point);
    let mut products = cpu.take(form.count() * to_point);
    let (values, products) = (Shared::new(&mut values), Shared::new(&mut products));
    for first in (0..units).step_by(at_once) {
        let here = at_once.min(units - first);
        let part = |unit: usize| tiling.part(unit % tiling.tiles(), [d, h, w]);
        // Cells in front of each tile's.
        let mut starts = vec![0; here + 1];
        for t in 0..here {
            starts[t + 1] = starts[t] + plan.count(part(first + t).1);
        }
        cpu.for_each(here, |t| {
            let mut scratch = cpu.take(tiling.scratch());
            // SAFETY: nobody writes to the input, and each unit writes the values of its own cells.
            unsafe {
                tiling.load(cpu.isa(), &place.source, extent, (first + t) / tiling.tiles(), (first + t) % tiling.tiles(), &mut scratch);
                let (part, count) = (part(first + t).1, starts[t + 1] - starts[t]);
                let cells = plan.cells(from_point, Default::default(), &mut []);
                for plane in 0..form.points[0] {
                    let to = values.at(plane * form.plane() * from_point + starts[t] * factors);
                    plan.gather(&cells, plane, &scratch, part, 0..count, to);
                }
            }
        });
        cpu.for_each(form.count(), |point| {
            // SAFETY: each unit writes the products of its own point.
            unsafe {
                let cells = plan.cells(to_point, Default::default(), &mut []);
                let u = weights.of(point, factors * outputs);
                plan.multiply(&cells, values.at(point * from_point), u, products.at(point * to_point), starts[here]);
            }
        });
        cpu.for_each(here, |t| {
            let (unit, count) = (first + t, starts[t + 1] - starts[t]);
            let ([i0, j0, k0], part) = part(unit);
            let at = (((unit / tiling.tiles() * d + i0) * h + j0) * w + k0) * outputs;
            let mut kept = cpu.take(count * form.voxels() * outputs);
            let mut sums = cpu.wide_zeros(2 * outputs);
            // SAFETY: tiles cover disjoint parts of the map, and have sums of their own.
            unsafe {
                let destination = Destination {
                    to: place.out.at(at),
                    strides: [h * w * outputs, w * outputs, outputs],
                    init: conv.biases().as_ptr(),
                    init_strides: [0; 3],
                    sums: sums_at.slice(unit * outputs * 2, outputs * 2),
                };
                let cells = plan.cells(to_point, [destination.strides, destination.init_strides], &mut sums);
                for plane in 0..form.points[0] {
                    let from = products.at(plane * form.plane() * to_point + starts[t] * outputs);
                    plan.scatter(&cells, plane, from, &mut kept, part, 0..count, &destination);
                }
                add_sums(&sums, destination.sums);
            }
        });
    }
    let sums = want_sums.then(|| Sums::reduce(&partial, n, outputs, (d * h * w) as f64));
    (Tensor::from_buffer([n, d, h, w, outputs], place.finish()), sums)
}
