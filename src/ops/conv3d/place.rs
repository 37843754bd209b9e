//! Where a convolution's output goes: to memory of its own, or to that of an input that nothing
//! else reads.
//!
//! The largest maps are 268 MB each. An output that takes its input's place slides a few planes
//! along the d axis: tiles are computed slab by slab, and a slab's output lands on planes that all
//! tiles to come have done with. The direction is the one in which the memory has room, so that one
//! map can be convolved in place again and again.

use super::Input;
use super::tile::{Source, Tiling};
use crate::device::{Buffer, Cpu, DisjointWriter, ReadOnly};
use crate::ops::norm::ChannelNorm;
use crate::tensor::Tensor;

/// Planes of room that a map gets, for outputs to slide into.
const SLIDE_PLANES: usize = SLAB + 2;
/// Planes of a slab, about; deeper tiles have no room to slide in.
pub const SLAB: usize = 8;
/// Fewest planes of a map that is worth it.
pub const DEEP: usize = 64;

/// A convolution's input.
pub enum OpInput<'a> {
    /// Another owner's.
    Borrowed(Input<'a>),
    /// A map that may be overwritten, its norm, and a map to add.
    Owned(Buffer, Option<&'a ChannelNorm>, Option<&'a Tensor>),
}

/// Memory for a map `[n, d, h, w, c]` whose reader may put its own output there.
pub fn alloc(cpu: &Cpu, [n, d, h, w, c]: [usize; 5]) -> Buffer {
    let room = if n == 1 && d >= DEEP { SLIDE_PLANES * h * w * c } else { 0 };
    cpu.alloc_with_headroom(n * d * h * w * c, room)
}

/// An input, and the memory of its output.
pub struct OutputPlacement<'a> {
    source: Source<'a>,
    buffer: Buffer,
    /// An input that did not become the output.
    _input: Option<Buffer>,
    /// By how much the output slides, and the rows of tiles in a slab.
    slides: Option<(isize, usize)>,
}

impl<'a> OutputPlacement<'a> {
    /// Decides for an input of `extent` and a map of `outputs` channels.
    pub fn new(
        cpu: &Cpu,
        work: OpInput<'a>,
        extent: [usize; 5],
        tiling: &Tiling,
        outputs: usize,
    ) -> OutputPlacement<'a> {
        OutputPlacement::decide(cpu, work, extent, tiling, outputs, true)
    }

    /// The same for tiles that do not go through [`OutputPlacement::for_each_tile`]: the output
    /// lies apart from the input, whatever room that has.
    pub fn apart(
        cpu: &Cpu,
        work: OpInput<'a>,
        extent: [usize; 5],
        tiling: &Tiling,
        outputs: usize,
    ) -> OutputPlacement<'a> {
        OutputPlacement::decide(cpu, work, extent, tiling, outputs, false)
    }

    fn decide(
        cpu: &Cpu,
        work: OpInput<'a>,
        [n, d, h, w, c]: [usize; 5],
        tiling: &Tiling,
        outputs: usize,
        may_slide: bool,
    ) -> OutputPlacement<'a> {
        let fresh = || alloc(cpu, [n, d, h, w, outputs]);
        let (source, input) = match work {
            OpInput::Borrowed(x) => (Source::new(&x), None),
            OpInput::Owned(buffer, norm, add) => {
                // SAFETY: the buffer stays for as long as the place that the source is lent by.
                let map = unsafe { ReadOnly::from_raw(buffer.base(), buffer.len()) };
                (Source::overwritten(map, norm, add), Some(buffer))
            }
        };
        let rows = (SLAB / tiling.tile[0]).max(1);
        let step = (rows * tiling.tile[0] + 1) * h * w * c;
        let by = match &input {
            Some(buffer) if may_slide && n == 1 && c == outputs => match buffer.headroom() {
                [front, _] if front >= step => Some(-(step as isize)),
                [_, behind] if behind >= step => Some(step as isize),
                _ => None,
            },
            _ => None,
        };
        let (buffer, _input) = match (by, input) {
            (Some(_), Some(buffer)) => (buffer, None),
            (_, input) => (fresh(), input),
        };
        OutputPlacement { source, buffer, _input, slides: by.map(|by| (by, rows)) }
    }

    /// The input.
    pub fn source(&self) -> &Source<'a> {
        &self.source
    }

    /// The output, to be written tile by tile as [`OutputPlacement::for_each_tile`] goes.
    pub fn out(&self) -> DisjointWriter<'_, f32> {
        let by = self.slides.map_or(0, |(by, _)| by);
        // SAFETY: there is room to slide, and nothing but the source, which has the same address,
        // reads or writes the buffer before it is finished.
        unsafe { DisjointWriter::from_raw(self.buffer.base().offset(by), self.buffer.len()) }
    }

    /// Runs `f(unit)` for every unit, `groups` to a tile, in an order that leaves every tile its
    /// input.
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
