//! From a file's PixelData to voxels: uncompressed, run lengths, JPEG, JPEG-LS or JPEG 2000.

use super::jpeg2000::{self, Decoded};
use super::tags::{self, DataSet, Opened, fragments};
use crate::memory;
use crate::volume::Element;
use crate::volume::array::{LONGEST, typed};
use jpeg_decoder::{Decoder, PixelFormat};
use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How messages name the memory that a slice takes.
const SLICE: &str = "a slice";

/// How a file's voxels are written.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    pub columns: usize,
    pub rows: usize,
    pub frames: usize,
    /// The bits that a voxel takes, the bits that count, and the bits below these.
    allocated: usize,
    stored: usize,
    shift: usize,
    signed: bool,
    /// Whether the lowest value is shown white.
    pub inverted: bool,
    syntax: String,
}

impl Layout {
    /// The layout that the tags state.
    pub fn of(tags: &DataSet, syntax: &str) -> Result<Layout, String> {
        let whole = |tag| tags.whole(tag);
        let need = |tag: tags::Tag| -> Result<usize, String> {
            whole(tag)?.ok_or_else(|| format!("its {tag} is missing"))
        };
        let (rows, columns) = (need(tags::ROWS)?, need(tags::COLUMNS)?);
        let frames = whole(tags::FRAMES)?.unwrap_or(1);
        if rows == 0 || columns == 0 || frames == 0 || rows.max(columns) > LONGEST {
            return Err(format!(
                "it has {frames} frames of {columns} x {rows} voxels, expected one or more of each"
            ));
        }
        let samples = whole(tags::SAMPLES)?.unwrap_or(1);
        let photometric = tags.text(tags::PHOTOMETRIC).unwrap_or("MONOCHROME2".into());
        if samples != 1 || !photometric.starts_with("MONOCHROME") {
            return Err(format!(
                "it is in colour: its {} is {samples} and its {} '{photometric}', expected 1 and MONOCHROME2",
                tags::SAMPLES,
                tags::PHOTOMETRIC
            ));
        }
        let allocated = need(tags::BITS_ALLOCATED)?;
        if ![8, 16, 32].contains(&allocated) {
            return Err(format!(
                "its {} is {allocated}, expected 8, 16 or 32",
                tags::BITS_ALLOCATED
            ));
        }
        let stored = whole(tags::BITS_STORED)?.unwrap_or(allocated);
        let high = whole(tags::HIGH_BIT)?.unwrap_or(stored.saturating_sub(1));
        if stored == 0 || stored > allocated || high >= allocated || high + 1 < stored {
            return Err(format!(
                "its {} is {stored} and its {} {high}, which do not fit {allocated} bits",
                tags::BITS_STORED,
                tags::HIGH_BIT
            ));
        }
        Ok(Layout {
            columns,
            rows,
            frames,
            allocated,
            stored,
            shift: high + 1 - stored,
            signed: whole(tags::PIXEL_REPRESENTATION)? == Some(1),
            inverted: photometric == "MONOCHROME1",
            syntax: syntax.into(),
        })
    }

    /// The type of its voxels.
    pub fn element(&self) -> Element {
        match (self.allocated, self.signed) {
            (8, true) => Element::Int8,
            (8, false) => Element::Uint8,
            (16, true) => Element::Int16,
            (16, false) => Element::Uint16,
            (_, true) => Element::Int32,
            (_, false) => Element::Uint32,
        }
    }

    /// The sum of the lowest and the highest value that its bits can hold: the sum of a value and
    /// its inverse.
    pub fn ends(&self) -> f64 {
        if self.signed { -1.0 } else { (self.stored as f64).exp2() - 1.0 }
    }

    /// Bytes of a frame.
    fn bytes(&self) -> usize {
        self.columns * self.rows * self.allocated / 8
    }

    /// Keeps the significant bits of every value, in the byte order of this machine.
    fn settle(&self, bytes: &mut [u8]) {
        if self.stored == self.allocated {
            return;
        }
        let mask = u32::MAX >> (32 - self.stored);
        let read = |v: u32| {
            let v = (v >> self.shift) & mask;
            let negative = self.signed && v >> (self.stored - 1) == 1;
            if negative { v | !mask } else { v }
        };
        match self.allocated {
            8 => bytes.iter_mut().for_each(|b| *b = read(u32::from(*b)) as u8),
            16 => bytes.chunks_exact_mut(2).for_each(|b| {
                let v = read(u32::from(u16::from_ne_bytes([b[0], b[1]]))) as u16;
                b.copy_from_slice(&v.to_ne_bytes());
            }),
            _ => bytes.chunks_exact_mut(4).for_each(|b| {
                let v = read(u32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
                b.copy_from_slice(&v.to_ne_bytes());
            }),
        }
    }
}

/// How voxels are packed.
#[derive(Clone, Copy, PartialEq)]
enum Packing {
    None,
    RunLengths,
    Jpeg,
    JpegLs,
    Jpeg2000,
}

/// The first bytes of a JPEG, and those of a file that may contain a codestream of JPEG 2000.
const JPEG_START: [u8; 2] = [0xff, 0xd8];
const JP2_START: [u8; 8] = *b"\0\0\0\x0cjP  ";

impl Packing {
    /// Whether a fragment begins a frame. A frame may have several fragments.
    fn begins(self, fragment: &[u8]) -> bool {
        match self {
            Packing::Jpeg | Packing::JpegLs => fragment.starts_with(&JPEG_START),
            Packing::Jpeg2000 => {
                fragment.starts_with(&jpeg2000::START) || fragment.starts_with(&JP2_START)
            }
            Packing::None | Packing::RunLengths => true,
        }
    }
}

/// The packing of a transfer syntax.
fn packing(syntax: &str) -> Result<Packing, String> {
    let Some(kind) = syntax.strip_prefix("1.2.840.10008.1.2") else {
        return Err(format!("unknown transfer syntax '{syntax}'"));
    };
    let name = match kind {
        "" | ".1" | ".2" | ".1.99" => return Ok(Packing::None),
        ".5" => return Ok(Packing::RunLengths),
        ".4.50" | ".4.51" | ".4.57" | ".4.70" => return Ok(Packing::Jpeg),
        ".4.80" | ".4.81" => return Ok(Packing::JpegLs),
        ".4.90" | ".4.91" => return Ok(Packing::Jpeg2000),
        ".4.92" | ".4.93" => "JPEG 2000 of several components",
        ".4.201" | ".4.202" | ".4.203" => "high-throughput JPEG 2000",
        ".4.110" | ".4.111" | ".4.112" => "JPEG XL",
        _ => "an unknown method",
    };
    Err(format!(
        "its voxels are compressed with {name} (transfer syntax {syntax}), expected uncompressed, RLE, JPEG, JPEG-LS or JPEG 2000; 'gdcmconv --raw FILE OUT' or 'dcm2niix -z y FOLDER' decompresses them"
    ))
}

/// The voxels of a file, frame by frame.
pub struct Frames<'a> {
    layout: &'a Layout,
    packing: Packing,
    /// The parts of each frame; if it is not packed, one part with all frames.
    parts: Vec<Vec<&'a [u8]>>,
    /// Whether the highest byte comes first, and 8-bit values were written in pairs.
    big: bool,
    words: bool,
}

impl<'a> Frames<'a> {
    /// Finds the frames of a file.
    pub fn new(opened: &Opened<'a>, layout: &'a Layout) -> Result<Frames<'a>, String> {
        let packing = packing(&layout.syntax)?;
        let voxels = opened.voxels()?;
        let parts = match packing {
            Packing::None if voxels.open => {
                return Err(format!(
                    "its {} is in fragments, which transfer syntax {} does not allow",
                    tags::PIXEL_DATA,
                    layout.syntax
                ));
            }
            Packing::None => vec![vec![voxels.value]],
            _ if !voxels.open => {
                return Err(format!(
                    "its {} is in one piece, expected fragments for transfer syntax {}",
                    tags::PIXEL_DATA,
                    layout.syntax
                ));
            }
            packing => {
                let mut frames: Vec<Vec<&[u8]>> = vec![];
                for part in fragments(&voxels)? {
                    match frames.last_mut() {
                        Some(frame) if !packing.begins(part) => frame.push(part),
                        _ => frames.push(vec![part]),
                    }
                }
                frames
            }
        };
        if packing != Packing::None && parts.len() != layout.frames {
            return Err(format!(
                "its {} holds {} packed frames, expected {}",
                tags::PIXEL_DATA,
                parts.len(),
                layout.frames
            ));
        }
        let words = voxels.is_words();
        Ok(Frames { layout, packing, parts, big: opened.coding.big, words })
    }

    /// The values of a frame, in the byte order of this machine.
    pub fn frame(&self, frame: usize) -> Result<Vec<u8>, String> {
        let missing = || format!("its {} has no frame {frame}", tags::PIXEL_DATA);
        let mut bytes = match self.packing {
            Packing::None => {
                let all = self.parts.first().and_then(|p| p.first()).ok_or_else(missing)?;
                self.plain(all, frame)?
            }
            Packing::RunLengths => {
                let part = self.parts.get(frame).and_then(|p| p.first()).ok_or_else(missing)?;
                self.run_lengths(part)?
            }
            packing => {
                let mut joined = joined(self.parts.get(frame).ok_or_else(missing)?);
                match packing {
                    Packing::Jpeg2000 => self.jpeg_2000(&mut joined)?,
                    Packing::JpegLs => self.jpeg_ls(&joined)?,
                    _ => self.jpeg(&joined)?,
                }
            }
        };
        self.layout.settle(&mut bytes);
        Ok(bytes)
    }

    fn plain(&self, all: &[u8], frame: usize) -> Result<Vec<u8>, String> {
        let size = self.layout.bytes();
        let start = frame.checked_mul(size);
        let end = start.and_then(|s| s.checked_add(size));
        let one = start.zip(end).and_then(|(start, end)| all.get(start..end));
        let one = one.ok_or_else(|| {
            format!(
                "voxels are missing: its {} has {} bytes, expected {} frames of {size}",
                tags::PIXEL_DATA,
                all.len(),
                self.layout.frames
            )
        })?;
        let mut bytes = memory::copied(SLICE, one);
        if self.big && self.words && self.layout.allocated == 8 {
            // The bytes of each pair were swapped, and pairs continue from frame to frame.
            for (at, to) in (frame * size..).zip(&mut bytes) {
                *to = all.get(at ^ 1).copied().unwrap_or(*to);
            }
        }
        self.layout.element().to_native(&mut bytes, self.big);
        Ok(bytes)
    }

    /// A frame packed by run lengths (PS3.5, annex G): a segment for each byte of a value, the
    /// highest first.
    fn run_lengths(&self, part: &[u8]) -> Result<Vec<u8>, String> {
        let voxels = self.layout.columns * self.layout.rows;
        let width = self.layout.allocated / 8;
        let number = |at: usize| -> Result<usize, String> {
            let four = part.get(4 * at..).and_then(|rest| rest.first_chunk::<4>());
            let four = four.ok_or("truncated: its RLE data has no header of 64 bytes")?;
            Ok(u32::from_le_bytes(*four) as usize)
        };
        if number(0)? != width {
            return Err(format!(
                "its RLE data has {} segments, expected {width} for {} bits",
                number(0)?,
                self.layout.allocated
            ));
        }
        // Two bytes give at most 128.
        if voxels * width > part.len().saturating_mul(64) {
            return Err(format!(
                "voxels are missing: {} bytes of RLE data cannot hold {} voxels",
                part.len(),
                voxels
            ));
        }
        let mut bytes = memory::zeroed::<u8>(SLICE, voxels * width);
        for segment in 0..width {
            let start = number(1 + segment)?;
            let end = if segment + 1 < width { number(2 + segment)? } else { part.len() };
            let runs = part.get(start..end).ok_or_else(|| {
                format!("its RLE data has a segment from byte {start} to {end} of {}", part.len())
            })?;
            // The highest byte of a value comes last on most machines.
            let place = if cfg!(target_endian = "big") { segment } else { width - 1 - segment };
            let mut to = bytes.iter_mut().skip(place).step_by(width);
            let found = unrolled(runs, |v| to.next().map(|to| *to = v).is_some());
            if found < voxels {
                return Err(format!(
                    "voxels are missing: segment {segment} of its RLE data has {found} of {voxels}"
                ));
            }
        }
        Ok(bytes)
    }

    /// The grey values of a JPEG, and the bytes of each.
    fn grey(&self, jpeg: &[u8]) -> Result<(Vec<u8>, usize), String> {
        let layout = self.layout;
        let fail =
            |e: jpeg_decoder::Error| format!("its JPEG data is damaged or not supported: {e}");
        let mut decoder = Decoder::new(jpeg);
        decoder.read_info().map_err(fail)?;
        let info = decoder.info().ok_or("its JPEG data has no header")?;
        let width = match info.pixel_format {
            PixelFormat::L8 => 1,
            PixelFormat::L16 => 2,
            other => return Err(format!("its JPEG is in colour ({other:?}), expected grey")),
        };
        let size = [usize::from(info.width), usize::from(info.height)];
        if size != [layout.columns, layout.rows] || width > layout.allocated / 8 {
            return Err(format!(
                "its JPEG has {size:?} voxels of {} bits, expected {:?} of {}",
                8 * width,
                [layout.columns, layout.rows],
                layout.allocated
            ));
        }
        let voxels = size[0] * size[1];
        // The decoder's working memory as well.
        memory::check::<u64>(SLICE, voxels).map_err(|e| e.to_string())?;
        let decoded = decoder.decode().map_err(fail)?;
        if decoded.len() != voxels * width {
            return Err(format!(
                "its JPEG data decoded to {} bytes, expected {}",
                decoded.len(),
                voxels * width
            ));
        }
        Ok((decoded, width))
    }

    fn jpeg(&self, jpeg: &[u8]) -> Result<Vec<u8>, String> {
        let (decoded, width) = caught("JPEG", || self.grey(jpeg))?;
        if width == self.layout.allocated / 8 {
            return Ok(decoded);
        }
        let value = |value: &[u8]| match *value {
            [a, b] => u32::from(u16::from_ne_bytes([a, b])),
            [a] => u32::from(a),
            _ => 0,
        };
        Ok(self.stored(decoded.chunks_exact(width).map(value)))
    }

    fn jpeg_ls(&self, jpeg: &[u8]) -> Result<Vec<u8>, String> {
        let layout = self.layout;
        let (columns, rows) = (layout.columns, layout.rows);
        // The decoder's working memory as well.
        memory::check::<u64>(SLICE, columns * rows).map_err(|e| e.to_string())?;
        let decoded = caught("JPEG-LS", || {
            jpegls::decode(jpeg, columns as u32, rows as u32)
                .map_err(|e| format!("its JPEG-LS data is damaged or not supported: {e}"))
        })?;
        let values = decoded.0;
        let most = u16::MAX >> 16usize.saturating_sub(layout.allocated);
        if let Some(v) = values.iter().copied().find(|v| *v > most) {
            return Err(format!(
                "its JPEG-LS has a value of {v}, which does not fit {} bits",
                layout.allocated
            ));
        }
        if values.len() != columns * rows {
            return Err(format!(
                "its JPEG-LS data decoded to {} values, expected {columns} x {rows}",
                values.len()
            ));
        }
        Ok(self.stored(values.into_iter().map(u32::from)))
    }

    fn jpeg_2000(&self, frame: &mut [u8]) -> Result<Vec<u8>, String> {
        let layout = self.layout;
        let size = [layout.columns, layout.rows];
        let decoded = caught("JPEG 2000", || jpeg2000::decode(frame, size, layout.allocated))?;
        let Decoded { values, precision, signed } = decoded;
        // With lossy packing a value may be one that the file's bits do not hold.
        let bits = layout.stored + layout.shift;
        let (low, high) = match layout.signed {
            true => (-1i64 << (bits - 1), (1i64 << (bits - 1)) - 1),
            false => (0, (1i64 << bits) - 1),
        };
        let unused = 32 - precision;
        let value = |v: i32| {
            // If file and codestream differ on whether there is a sign, the file is right.
            let v = match (layout.signed, signed) {
                (true, false) => i64::from(v << unused >> unused),
                (false, true) => i64::from((v as u32) << unused >> unused),
                _ => i64::from(v),
            };
            v.clamp(low, high) as u32
        };
        Ok(self.stored(values.into_iter().map(value)))
    }

    /// Values in as many bits as a voxel takes.
    fn stored(&self, values: impl Iterator<Item = u32>) -> Vec<u8> {
        let layout = self.layout;
        let mut bytes = memory::list(SLICE, layout.bytes());
        for v in values {
            match layout.allocated {
                8 => bytes.push(v as u8),
                16 => bytes.extend_from_slice(&(v as u16).to_ne_bytes()),
                _ => bytes.extend_from_slice(&v.to_ne_bytes()),
            }
        }
        bytes
    }
}

/// The fragments of a frame in one piece.
fn joined(parts: &[&[u8]]) -> Vec<u8> {
    let mut joined = memory::list(SLICE, parts.iter().map(|p| p.len()).sum());
    parts.iter().for_each(|p| joined.extend_from_slice(p));
    joined
}

/// The result of another crate's decoder: if it ever panics, that counts as damage too.
pub(super) fn caught<T>(
    name: &str,
    decode: impl FnOnce() -> Result<T, String>,
) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(|| memory::refusable(decode)))
        .unwrap_or_else(|_| Err(format!("its {name} data is damaged: the decoder failed")))
}

/// Voxels of one bit each, which follow each other without a gap, also from frame to frame, the
/// lowest bit of a byte first (PS3.5, 8.1.1).
pub struct Bits<'a> {
    bytes: Cow<'a, [u8]>,
    /// Voxels of a frame.
    size: usize,
}

impl<'a> Bits<'a> {
    /// The bits of `frames` frames of `size` voxels in a file.
    pub fn of(
        opened: &Opened<'a>,
        syntax: &str,
        size: usize,
        frames: usize,
    ) -> Result<Bits<'a>, String> {
        let voxels = opened.voxels()?;
        if packing(syntax)? != Packing::None || voxels.open {
            return Err(format!(
                "its {} of one bit per voxel is compressed (transfer syntax {syntax}), expected uncompressed",
                tags::PIXEL_DATA
            ));
        }
        let needed = size.checked_mul(frames).map(|n| n.div_ceil(8));
        if needed.is_none_or(|n| n > voxels.value.len()) {
            return Err(format!(
                "voxels are missing: its {} has {} bytes, expected {frames} frames of {size} bits",
                tags::PIXEL_DATA,
                voxels.value.len()
            ));
        }
        let mut bytes = Cow::Borrowed(voxels.value);
        if opened.coding.big && voxels.is_words() {
            let mut turned = memory::copied(SLICE, voxels.value);
            turned.chunks_exact_mut(2).for_each(<[u8]>::reverse);
            bytes = Cow::Owned(turned);
        }
        Ok(Bits { bytes, size })
    }

    /// `frames` frames of `size` voxels with no bit set.
    pub fn none(size: usize, frames: usize) -> Bits<'a> {
        let count = size.saturating_mul(frames).div_ceil(8);
        Bits { bytes: Cow::Owned(memory::zeroed(SLICE, count)), size }
    }

    /// Sets the bits of a frame whose voxels are true.
    pub fn set(&mut self, frame: usize, values: &[u8], is_set: impl Fn(u8) -> bool) {
        let bytes = self.bytes.to_mut();
        for (n, _) in values.iter().enumerate().filter(|(_, v)| is_set(**v)) {
            let at = frame * self.size + n;
            bytes[at / 8] |= 1 << (at % 8);
        }
    }

    /// Calls `f` with each voxel of a frame whose bit is set.
    pub fn each(&self, frame: usize, mut f: impl FnMut(usize)) {
        let (start, end) = (frame * self.size, (frame + 1) * self.size);
        for (n, byte) in self.bytes.iter().enumerate().take(end.div_ceil(8)).skip(start / 8) {
            if *byte == 0 {
                continue;
            }
            for at in (8 * n..8 * n + 8).filter(|at| (start..end).contains(at)) {
                if byte >> (at % 8) & 1 == 1 {
                    f(at - start);
                }
            }
        }
    }
}

/// Passes the bytes of runs one by one, until the end or until `take` wants no more; returns how
/// many were taken.
fn unrolled(runs: &[u8], mut take: impl FnMut(u8) -> bool) -> usize {
    let (mut at, mut taken) = (0, 0);
    while let Some(count) = runs.get(at).copied() {
        at += 1;
        match count {
            0..=127 => {
                for v in runs.iter().skip(at).take(usize::from(count) + 1) {
                    if !take(*v) {
                        return taken;
                    }
                    taken += 1;
                }
                at += usize::from(count) + 1;
            }
            128 => {}
            129..=255 => {
                let Some(v) = runs.get(at) else { return taken };
                for _ in 0..257 - usize::from(count) {
                    if !take(*v) {
                        return taken;
                    }
                    taken += 1;
                }
                at += 1;
            }
        }
    }
    taken
}

/// Adds values of a type to a list of floats' bytes, each multiplied and shifted.
pub fn scaled(bytes: &[u8], element: Element, [slope, intercept]: [f64; 2], out: &mut Vec<u8>) {
    typed!(element, T => bytes.chunks_exact(size_of::<T>()).for_each(|b| {
        let v = bytemuck::pod_read_unaligned::<T>(b) as f64 * slope + intercept;
        out.extend_from_slice(&(v as f32).to_ne_bytes());
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn layout(allocated: usize, stored: usize, signed: bool) -> Layout {
        Layout {
            columns: 2,
            rows: 1,
            frames: 1,
            allocated,
            stored,
            shift: 0,
            signed,
            inverted: false,
            syntax: "1.2.840.10008.1.2.5".into(),
        }
    }

    #[test]
    fn only_bits_that_are_stored_count_and_signs_are_drawn_out() {
        let settled = |layout: Layout, values: [u16; 2]| {
            let mut bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
            layout.settle(&mut bytes);
            [0, 2].map(|at| u16::from_ne_bytes([bytes[at], bytes[at + 1]]))
        };
        assert_eq!(settled(layout(16, 12, false), [0xf123, 0x0fff]), [0x123, 0xfff]);
        assert_eq!(settled(layout(16, 12, true), [0x0fff, 0x07ff]), [0xffff, 0x7ff]);
        let shifted = Layout { shift: 4, ..layout(16, 12, false) };
        assert_eq!(settled(shifted, [0x1230, 0xfff0]), [0x123, 0xfff]);
        assert_eq!(settled(layout(16, 16, true), [0xf123, 1]), [0xf123, 1]);
    }

    #[test]
    fn damage_of_jpeg_ls_is_an_error_or_other_values_and_nothing_else() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/dicom");
        let bytes = std::fs::read(folder.join("noise-u16.jls")).unwrap();
        let layout = Layout { columns: 37, rows: 33, ..layout(16, 16, false) };
        let frames = Frames {
            layout: &layout,
            packing: Packing::JpegLs,
            parts: vec![],
            big: false,
            words: true,
        };
        assert!(frames.jpeg_ls(&bytes).is_ok());
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            if let Ok(values) = frames.jpeg_ls(&damaged) {
                assert_eq!(values.len(), layout.bytes(), "byte {at}");
            }
        }
    }

    #[test]
    fn turned_pairs_go_on_from_frame_to_frame() {
        let layout = Layout { columns: 3, frames: 2, ..layout(8, 8, false) };
        let all = [2, 1, 4, 3, 6, 5];
        let parts = vec![vec![&all[..]]];
        let frames =
            Frames { layout: &layout, packing: Packing::None, parts, big: true, words: true };
        assert_eq!([0, 1].map(|n| frames.frame(n).unwrap()), [[1, 2, 3], [4, 5, 6]]);
    }

    #[test]
    fn bits_of_frames_follow_each_other_without_a_gap() {
        let mut bits = Bits::none(5, 3);
        bits.set(0, &[1, 0, 0, 0, 2], |v| v > 0);
        bits.set(1, &[0, 3, 0, 9, 0], |v| v > 2);
        bits.set(2, &[0, 0, 0, 0, 1], |v| v > 0);
        // Bits 0 and 4, 6 and 8, 14.
        assert_eq!(bits.bytes[..], [0b0101_0001, 0b0100_0001]);
        let of = |frame: usize| {
            let mut found = vec![];
            bits.each(frame, |at| found.push(at));
            found
        };
        assert_eq!([of(0), of(1), of(2)], [vec![0, 4], vec![1, 3], vec![4]]);
    }

    #[test]
    fn run_lengths_are_unrolled_byte_by_byte() {
        let layout = layout(16, 16, false);
        let frames = Frames {
            layout: &layout,
            packing: Packing::RunLengths,
            parts: vec![],
            big: false,
            words: true,
        };
        let mut part = vec![0u8; 64];
        (part[0], part[4], part[8]) = (2, 64, 66);
        // The high bytes are two times 1, the low ones 2 and 3.
        part.extend([255, 1, 1, 2, 3, 0]);
        let bytes = frames.run_lengths(&part).unwrap();
        assert_eq!(bytes, [0x102u16, 0x103].map(u16::to_ne_bytes).concat());
        for end in 0..part.len() - 1 {
            assert!(frames.run_lengths(&part[..end]).is_err(), "{end}");
        }
    }
}
