//! Layers whose transformed weights fit no cache: input transform, products and output transform
//! are three passes over the cells of many tiles, and the weights are read once for all of them.

use super::{Destination, Plan};
use crate::device::{Cpu, DisjointWriter};
use crate::ops::conv3d::sums::add_sums;
use crate::ops::conv3d::tile::TileSource;
use crate::ops::conv3d::weights::Transformed;

/// The most cells that share one reading of the weights: what one pass hands to the next should
/// stay in the last-level cache.
const CELLS: usize = 128;

/// Computes all tiles of an input that nothing writes to; `destination(unit)` says where a tile's
/// outputs go.
pub fn run<'d>(
    cpu: &Cpu,
    source: &TileSource,
    extent: [usize; 5],
    plan: &Plan,
    weights: &Transformed,
    destination: impl Fn(usize) -> Destination<'d> + Sync + Send,
) {
    let [n, d, h, w, _] = extent;
    let Plan { tiling, kernels, outputs, .. } = *plan;
    let (points, units) = (kernels.algorithm.plane(), n * tiling.tiles());
    let [width, out_width] = plan.widths();
    // Tiles are as large as the first, or smaller.
    let most = plan.count(tiling.tile);
    let at_once = (CELLS / most).clamp(1, units);
    let [from_point, to_point] = [width, out_width].map(|width| at_once * most * width + 16);
    let mut values = cpu.alloc(points * from_point);
    let mut products = cpu.alloc(points * to_point);
    let (values, products) = (DisjointWriter::new(&mut values), DisjointWriter::new(&mut products));
    for first in (0..units).step_by(at_once) {
        let here = at_once.min(units - first);
        let part = |unit: usize| tiling.part(unit % tiling.tiles(), [d, h, w]);
        // The number of cells before each tile's.
        let mut starts = vec![0; here + 1];
        for t in 0..here {
            starts[t + 1] = starts[t] + plan.count(part(first + t).1);
        }
        cpu.for_each(here, |t| {
            let mut scratch = cpu.alloc(tiling.scratch());
            // SAFETY: nothing writes to the input, and each unit writes the values of its own
            // cells.
            unsafe {
                tiling.load(
                    cpu.isa(),
                    source,
                    extent,
                    (first + t) / tiling.tiles(),
                    (first + t) % tiling.tiles(),
                    &mut scratch,
                );
                let (part, count) = (part(first + t).1, starts[t + 1] - starts[t]);
                let cells = plan.cells(from_point, out_width, None, &mut []);
                plan.gather(&cells, &scratch, part, 0..count, values.at(starts[t] * width));
            }
        });
        let blocks = outputs / kernels.oc_block;
        cpu.for_each(points * blocks, |unit| {
            let (point, o) = (unit / blocks, unit % blocks * kernels.oc_block);
            // SAFETY: each unit writes the products of its own point and block.
            unsafe {
                let cells = plan.cells(from_point, out_width, None, &mut []);
                plan.multiply(
                    &cells,
                    values.at(point * from_point),
                    weights,
                    point,
                    o,
                    products.at(point * to_point),
                    starts[here],
                );
            }
        });
        cpu.for_each(here, |t| {
            let (part, count) = (part(first + t).1, starts[t + 1] - starts[t]);
            let mut sums = cpu.zeros_f64(2 * outputs);
            let destination = destination(first + t);
            // SAFETY: tiles cover disjoint parts of the map.
            unsafe {
                let cells = plan.cells(to_point, out_width, Some(&destination), &mut sums);
                plan.scatter(
                    &cells,
                    products.at(starts[t] * out_width),
                    part,
                    0..count,
                    &destination,
                );
                add_sums(&sums, destination.sums);
            }
        });
    }
}
