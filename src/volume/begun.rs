//! A scan that is being read: the part that was read can be worked on before the rest is available.

use super::{Array, Element, Grid, Modality, VOXELS, Voxels};
use crate::memory;
use std::ops::Range;

/// A scan while it is being read: the first of its voxels, in the file's order, are available.
/// Given to the function that watches [`Volume::read_watched`](super::Volume::read_watched).
pub struct Begun<'a> {
    pub(super) grid: Grid,
    pub(super) element: Element,
    pub(super) scale: Option<[f64; 2]>,
    /// Whether values are whole numbers.
    pub(super) whole: bool,
    /// Whether elements have their highest byte first.
    pub(super) big: bool,
    pub(super) read: &'a [u8],
}

impl Begun<'_> {
    /// The size and place of the whole scan.
    pub fn grid(&self) -> &Grid {
        &self.grid
    }

    /// Whether all of a block has been read, given by its ranges along i, j, k.
    pub fn holds(&self, block: &[Range<usize>; 3]) -> bool {
        let [ni, nj, _] = self.grid.size;
        let on_scan = (0..3).all(|a| block[a].end <= self.grid.size[a]);
        on_scan && self.read.len() / self.element.size() >= block[2].end * nj * ni
    }

    /// A copy of a block. None if not all of it has been read, if it is empty, if memory for it is
    /// refused, or if it holds a value that is not finite: as what that is read depends on the
    /// whole scan.
    pub fn part(&self, block: &[Range<usize>; 3]) -> Option<Part> {
        if !self.holds(block) || block.iter().any(|range| range.is_empty()) {
            return None;
        }
        let [ni, nj, _] = self.grid.size;
        let (size, width) = (block.each_ref().map(|range| range.len()), self.element.size());
        let mut bytes = memory::room(VOXELS, size.iter().product::<usize>() * width).ok()?;
        for k in block[2].clone() {
            for j in block[1].clone() {
                let row = ((k * nj + j) * ni + block[0].start) * width;
                bytes.extend_from_slice(&self.read[row..][..size[0] * width]);
            }
        }
        self.element.to_native(&mut bytes, self.big);
        let array = Array::of_bytes(bytes, self.element, size, self.scale);
        let first = block.each_ref().map(|range| range.start);
        let Begun { grid, whole, .. } = *self;
        (array.odd() == 0).then_some(Part { grid, first, array, whole, modality: None })
    }
}

/// A block of a scan, on the whole scan's grid: a patch that reaches no further is cut from it as
/// from the scan.
pub struct Part {
    grid: Grid,
    first: [usize; 3],
    array: Array,
    whole: bool,
    /// The modality of the scan, if it is known.
    pub modality: Option<Modality>,
}

impl Voxels for Part {
    fn grid(&self) -> &Grid {
        &self.grid
    }
    fn is_whole(&self) -> bool {
        self.whole
    }
    fn modality(&self) -> Option<Modality> {
        self.modality
    }
    fn array(&self) -> &Array {
        &self.array
    }
    fn first(&self) -> [usize; 3] {
        self.first
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::Affine;
    use crate::volume::intensity::Normalization;
    use crate::volume::patch::{Beyond, Extent, Patch};

    #[test]
    fn a_part_has_what_a_patch_asks_for_however_far_off_the_scan_lies() {
        let size = [40, 30, 20];
        let read: Vec<u8> = (0..40 * 30 * 20).map(|at| (at % 251) as u8).collect();
        let normalization = Normalization { clip: [0.0, 255.0], mean: 100.0, sd: 50.0 };
        for far in [0.0, 1e8, 1e16, 1e17, 1e18, 1e20, 1e38] {
            let mut affine = Affine::from_spacing([0.7, 0.9, 2.0]);
            (affine.0[0][1], affine.0[1][0]) = (0.1, -0.1);
            (0..3).for_each(|r| affine.0[r][3] = far * [0.3, -0.7, 0.9][r]);
            let grid = Grid { size, affine };
            let element = Element::Uint8;
            let begun = Begun { grid, element, scale: None, whole: true, big: false, read: &read };
            let scan = begun.part(&size.map(|n| 0..n)).unwrap();
            for [i, j, k] in [[0, 0, 0], [20, 15, 10], [39, 29, 19]] {
                let extent = Extent::of_box([i, j, k, i + 1, j + 1, k + 1]);
                let patch = Patch::place(&grid, 16, 0.8, &extent);
                let part = begun.part(&patch.needed(&grid)).unwrap();
                let cut = |image: &Part| patch.extract(image, &normalization, Beyond::Edge);
                assert!(cut(&part) == cut(&scan), "{far}, {i}");
            }
        }
    }
}
