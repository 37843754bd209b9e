//! Where a convolution's output goes: to memory of its own, or to that of an input that nothing
//! else reads.
//!
//! The largest maps are 268 MB each. An output that takes its input's place is shifted by a few
//! planes along the d axis: tiles are computed slab by slab, and a slab's output is written to
//! planes that no later tile reads. The direction is the one in which the memory has room, so that
//! one map can be convolved in place again and again.

use super::Prologue;
use super::tile::{TileSource, Tiling};
use crate::device::{Buffer, Cpu, DisjointWriter, ReadOnly};
use crate::tensor::Tensor;

/// Planes of room that a map gets, for outputs to be shifted into.
const SLIDE_PLANES: usize = SLAB + 2;
/// Approximate number of planes of a slab; deeper tiles have no room to be shifted.
pub const SLAB: usize = 8;
/// The fewest planes of a map for which this is worthwhile.
pub const DEEP: usize = 64;

/// Memory for a map `[n, d, h, w, c]` whose reader may put its own output there.
pub fn alloc(cpu: &Cpu, [n, d, h, w, c]: [usize; 5]) -> Buffer {
    let room = if n == 1 && d >= DEEP { SLIDE_PLANES * h * w * c } else { 0 };
    cpu.alloc_with_headroom(n * d * h * w * c, room)
}

/// The map of an input, and the memory of its output.
pub struct OutputPlacement<'a> {
    source: TileSource<'a>,
    buffer: Buffer,
    /// An input whose memory did not become the output's: that memory or, if it has other owners as
    /// well, the map.
    _input: Option<Result<Buffer, Tensor>>,
    /// The shift of the output, and the rows of tiles in a slab.
    slides: Option<(isize, usize)>,
}

impl<'a> OutputPlacement<'a> {
    /// Decides for a map of `extent`, already pooled, and an output of `outputs` channels.
    pub fn new(
        cpu: &Cpu,
        map: Tensor,
        prologue: &'a Prologue,
        extent: [usize; 5],
        tiling: &Tiling,
        outputs: usize,
    ) -> OutputPlacement<'a> {
        OutputPlacement::decide(cpu, map, prologue, extent, tiling, outputs, true)
    }

    /// Decides for tiles that do not go through [`OutputPlacement::for_each_tile`]: the output is
    /// separate from the input, whatever room that has.
    pub fn apart(
        cpu: &Cpu,
        map: Tensor,
        prologue: &'a Prologue,
        extent: [usize; 5],
        tiling: &Tiling,
        outputs: usize,
    ) -> OutputPlacement<'a> {
        OutputPlacement::decide(cpu, map, prologue, extent, tiling, outputs, false)
    }

    fn decide(
        cpu: &Cpu,
        map: Tensor,
        prologue: &'a Prologue,
        [n, d, h, w, c]: [usize; 5],
        tiling: &Tiling,
        outputs: usize,
        may_slide: bool,
    ) -> OutputPlacement<'a> {
        let fresh = || alloc(cpu, [n, d, h, w, outputs]);
        let input = map.into_buffer();
        let (start, len) = match &input {
            Ok(buffer) => (buffer.base().cast_const(), buffer.len()),
            Err(map) => (map.data().as_ptr(), map.len()),
        };
        // SAFETY: the buffer or the map lives as long as the placement that lends the source, and
        // values do not move with their owner.
        let source = TileSource::of(unsafe { ReadOnly::from_raw(start, len) }, prologue);
        let rows = (SLAB / tiling.tile[0]).max(1);
        let step = (rows * tiling.tile[0] + 1) * h * w * c;
        let by = match &input {
            Ok(buffer) if may_slide && n == 1 && c == outputs => match buffer.headroom() {
                [front, _] if front >= step => Some(-(step as isize)),
                [_, behind] if behind >= step => Some(step as isize),
                _ => None,
            },
            _ => None,
        };
        let (buffer, _input) = match (by, input) {
            (Some(_), Ok(buffer)) => (buffer, None),
            (_, input) => (fresh(), Some(input)),
        };
        OutputPlacement { source, buffer, _input, slides: by.map(|by| (by, rows)) }
    }

    /// The input.
    pub fn source(&self) -> &TileSource<'a> {
        &self.source
    }

    /// The output, to be written tile by tile as [`OutputPlacement::for_each_tile`] goes.
    pub fn out(&self) -> DisjointWriter<'_, f32> {
        let by = self.slides.map_or(0, |(by, _)| by);
        // SAFETY: there is room for the shift, and nothing but the source, which has the same
        // address, reads or writes the buffer before it is finished.
        unsafe { DisjointWriter::from_raw(self.buffer.base().offset(by), self.buffer.len()) }
    }

    /// Runs `f(unit)` for every unit, `groups` to a tile, in an order that does not overwrite any
    /// tile's input before it is read.
    pub fn for_each_tile(
        &self,
        cpu: &Cpu,
        n: usize,
        tiling: &Tiling,
        groups: usize,
        f: impl Fn(usize) + Sync + Send,
    ) {
        let Some((by, rows)) = self.slides else {
            return cpu.for_each(n * tiling.tiles() * groups, f);
        };
        let [down, across] = [tiling.count[0], tiling.count[1] * tiling.count[2]];
        let slabs = down.div_ceil(rows);
        for slab in 0..slabs {
            let slab = if by > 0 { slabs - 1 - slab } else { slab };
            let unit = |row: usize| row * across * groups;
            let (first, end) = (unit(slab * rows), unit(((slab + 1) * rows).min(down)));
            cpu.for_each(end - first, |u| f(first + u));
        }
    }

    /// Whether the input stays as it is while the output is written.
    pub fn is_apart(&self) -> bool {
        self.slides.is_none()
    }

    /// The output.
    pub fn finish(mut self) -> Buffer {
        if let Some((by, _)) = self.slides {
            self.buffer.shift_base(by);
        }
        self.buffer
    }
}
