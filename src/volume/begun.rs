//! A scan of which a part was read: what lies there can be worked on before the rest is there.

use super::{Array, Element, Grid, Modality, VOXELS, Voxels};
use crate::memory;
use std::ops::Range;

/// A scan while it is read: of its voxels, in the file's order, the first are there.
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
    /// The size and place of all of it.
    pub fn grid(&self) -> &Grid {
        &self.grid
    }

    /// Whether all of a block was read, given by its ranges along i, j, k.
    pub fn holds(&self, block: &[Range<usize>; 3]) -> bool {
        let [ni, nj, _] = self.grid.size;
        let on_scan = (0..3).all(|a| block[a].end <= self.grid.size[a]);
        on_scan && self.read.len() / self.element.size() >= block[2].end * nj * ni
    }

    /// A copy of a block. None where not all of it was read, it is empty, memory for it is refused,
    /// or it holds a value that is no finite number: what that is read as, the whole scan decides.
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
    /// What the scan was made by, where that was said.
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
