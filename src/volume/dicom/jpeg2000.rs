//! JPEG 2000 (ISO 15444-1). The markers of a codestream are read here before the decoder sees them:
//! they are checked against what the file says, and the memory that decoding takes against the
//! memory available.
//!
//! The decoder goes from marker to marker by what each should contain, whatever length it states.
//! So a marker whose length does not fit is treated as damage: otherwise the two would not see the
//! same markers.

use crate::memory;
use hayro_jpeg2000::{DecodeError, DecodeSettings, DecoderContext, Image};

/// How messages name the memory that a slice takes.
const SLICE: &str = "a slice";

/// The first bytes of a codestream: its own marker, and that of its size.
pub const START: [u8; 4] = [0xff, 0x4f, 0xff, 0x51];

const COD: usize = 0xff52;
const COC: usize = 0xff53;
const QCD: usize = 0xff5c;
const QCC: usize = 0xff5d;
const RGN: usize = 0xff5e;
const POC: usize = 0xff5f;
const SOT: usize = 0xff90;
const SOD: usize = 0xff93;
const EOC: usize = 0xffd9;

/// The most bands that a tile can have.
const BANDS: usize = 3 * 32 + 1;
/// The most times that an order of the parts of an image may be stated; real files state it once or
/// twice.
const ORDERS: usize = 32;

/// The values of a frame.
pub struct Decoded {
    pub values: Vec<i32>,
    /// Bits of a value.
    pub precision: u32,
    pub signed: bool,
}

/// Decodes the codestream in a frame's bytes, of `[columns, rows]` values of at most `bits` bits.
pub fn decode(frame: &mut [u8], size: [usize; 2], bits: usize) -> Result<Decoded, String> {
    // Some writers wrap it in a file format of its own first.
    let start = frame.windows(START.len()).position(|w| w == START);
    let code = &mut frame[start.ok_or("its JPEG 2000 has no codestream")?..];
    let head = Head::of(code)?;
    if head.size != size || head.precision as usize > bits.min(16) {
        return Err(format!(
            "its JPEG 2000 has {:?} voxels of {} bits, expected {size:?} of {} at most",
            head.size,
            head.precision,
            bits.min(16)
        ));
    }
    memory::check::<u8>(SLICE, head.needed(code.len())).map_err(|e| e.to_string())?;
    let fail = |e: DecodeError| format!("its JPEG 2000 data is damaged or not supported: {e}");
    // A truncated codestream is not a slice.
    let settings = DecodeSettings { strict: true, ..DecodeSettings::default() };
    let image = Image::new(code, &settings).map_err(fail)?;
    let mut context = DecoderContext::default();
    let decoded = image.decode(&mut context).map_err(fail)?;
    let samples = match decoded.components() {
        [one] if one.samples().len() == size[0] * size[1] => one.samples(),
        other => {
            let found: Vec<usize> = other.iter().map(|c| c.samples().len()).collect();
            return Err(format!(
                "its JPEG 2000 data decoded to {found:?} values, expected {size:?}"
            ));
        }
    };
    // All values are given as unsigned. Those of 16 bits are exact in a float.
    let (most, half) = ((1i32 << head.precision) - 1, 1i32 << (head.precision - 1));
    let low = if head.signed { half } else { 0 };
    let mut values = memory::room(SLICE, samples.len()).map_err(|e| e.to_string())?;
    values.extend(samples.iter().map(|v| (v.round() as i32).clamp(0, most) - low));
    Ok(Decoded { values, precision: head.precision, signed: head.signed })
}

/// What the markers of a codestream say of its image, and of the work of decoding it.
#[derive(Clone, Debug, PartialEq)]
struct Head {
    size: [usize; 2],
    tile: [usize; 2],
    precision: u32,
    signed: bool,
    /// The shortest sides of a code block, as exponents of 2: its own, or those of the precinct
    /// that contains it.
    sides: [u32; 2],
    /// The most layers, and the most levels of the wavelet transform.
    layers: usize,
    levels: usize,
    /// How often an order of them is stated.
    orders: usize,
}

impl Head {
    /// Goes through all markers. The length of the last part may be left open before its data: it
    /// is then written there, so that the decoder finds the end.
    fn of(code: &mut [u8]) -> Result<Head, String> {
        let mut head = Head::sized(code)?;
        // After the two markers that it begins with, and the segment of the second.
        let mut at = 4 + number(code, 4, 2)?;
        while number(code, at, 2)? != SOT {
            at = head.passed(code, at)?;
        }
        // A missing tile would be decoded as grey.
        let mut are_there = vec![false; head.tiles()];
        loop {
            match number(code, at, 2)? {
                EOC => match are_there.iter().position(|is_there| !is_there) {
                    None => return Ok(head),
                    Some(tile) => {
                        return Err(format!("truncated: its JPEG 2000 has no tile {tile}"));
                    }
                },
                SOT if number(code, at + 2, 2)? == 10 => {}
                _ => return Err(damaged("between tile parts")),
            }
            match are_there.get_mut(number(code, at + 4, 2)?) {
                Some(is_there) => *is_there = true,
                None => return Err(damaged("in a tile number")),
            }
            let said = number(code, at + 6, 4)?;
            let end = match said {
                0 => {
                    let end = code.windows(2).rposition(|w| w == [0xff, 0xd9]);
                    let length = end.and_then(|end| end.checked_sub(at));
                    let length = length.and_then(|length| u32::try_from(length).ok());
                    let length = length.ok_or("truncated: its JPEG 2000 has no end")?;
                    code[at + 6..at + 10].copy_from_slice(&length.to_be_bytes());
                    at + length as usize
                }
                said => at.saturating_add(said),
            };
            at += 12;
            while number(code, at, 2)? != SOD {
                at = head.passed(code, at)?;
            }
            if end < at + 2 || end > code.len() {
                return Err("truncated: a tile of its JPEG 2000 is incomplete".into());
            }
            at = end;
        }
    }

    /// The contents of the first segment: image, tiles, and their place on a grid.
    fn sized(code: &[u8]) -> Result<Head, String> {
        let four = |n: usize| number(code, 8 + 4 * n, 4);
        let components = number(code, 40, 2)?;
        if components != 1 {
            return Err(format!(
                "its JPEG 2000 is in colour: it has {components} components, expected 1"
            ));
        }
        let depth = number(code, 42, 1)?;
        let (size, tile) = ([four(0)?, four(1)?], [four(4)?, four(5)?]);
        let places = [four(2)?, four(3)?, four(6)?, four(7)?];
        if number(code, 4, 2)? != 41 || size.contains(&0) || tile.contains(&0) {
            return Err(damaged("in its image size"));
        }
        if places != [0; 4] || number(code, 43, 2)? != 0x0101 {
            return Err(
                "its JPEG 2000 is part of a larger reference grid, expected a complete image"
                    .into(),
            );
        }
        let (precision, signed) = (depth as u32 % 128 + 1, depth >= 128);
        let (sides, layers, levels, orders) = ([10; 2], 1, 0, 0);
        let head = Head { size, tile, precision, signed, sides, layers, levels, orders };
        // Tile numbers have 16 bits.
        if head.tiles() > 1 << 16 {
            return Err(format!(
                "its JPEG 2000 has {} tiles, expected at most 65,536",
                head.tiles()
            ));
        }
        Ok(head)
    }

    fn tiles(&self) -> usize {
        self.size[0].div_ceil(self.tile[0]).saturating_mul(self.size[1].div_ceil(self.tile[1]))
    }

    /// The position of the marker after the one at `at`. What it says of code blocks is recorded.
    fn passed(&mut self, code: &[u8], at: usize) -> Result<usize, String> {
        let marker = number(code, at, 2)?;
        if (0xff30..=0xff3f).contains(&marker) {
            return Ok(at + 2);
        }
        let end = at + 2 + number(code, at + 2, 2)?;
        let body = code.get(at + 4..end).ok_or_else(|| damaged("within its markers"))?;
        // By their styles: one number per band, one of two bytes for all, one of two bytes per
        // band. All tiles have copies of those that are stated for all.
        let steps = |style: u8, rest: &[u8]| match style & 31 {
            0 => rest.len() <= BANDS,
            1 => rest.len() == 2,
            _ => rest.len().is_multiple_of(2) && rest.len() <= 2 * BANDS,
        };
        let is_whole = match (marker, body) {
            (COD, [style, _, high, low, _, rest @ ..]) => {
                self.layers = self.layers.max(usize::from(u16::from_be_bytes([*high, *low])));
                self.noted(style & 1 == 1, rest)
            }
            (COC, [_, style, rest @ ..]) => self.noted(style & 1 == 1, rest),
            (QCD, [style, rest @ ..]) | (QCC, [_, style, rest @ ..]) => steps(*style, rest),
            (COD | COC | QCD | QCC, _) => false,
            (RGN, body) => body.len() == 3,
            (POC, body) => {
                self.orders += body.len() / 7;
                body.len().is_multiple_of(7)
            }
            _ => true,
        };
        if self.orders > ORDERS {
            return Err(format!(
                "its JPEG 2000 has {} progression order changes, expected at most {ORDERS}",
                self.orders
            ));
        }
        if is_whole { Ok(end) } else { Err(damaged("in its coding style")) }
    }

    /// Records levels, blocks and precincts; returns whether the segment has exactly the expected
    /// length.
    fn noted(&mut self, has_precincts: bool, style: &[u8]) -> bool {
        let [levels, across, down, _, _, precincts @ ..] = style else { return false };
        if *levels > 32 || *across > 8 || *down > 8 {
            return false;
        }
        self.levels = self.levels.max(usize::from(*levels));
        let mut shorten = |sides: [u8; 2], less: u8| {
            for (shortest, side) in self.sides.iter_mut().zip(sides) {
                *shortest = (*shortest).min(u32::from(side.saturating_sub(less)));
            }
        };
        shorten([across + 2, down + 2], 0);
        for (resolution, sides) in precincts.iter().enumerate() {
            // Except for the first, a precinct is on bands of half the size.
            shorten([sides & 15, sides >> 4], u8::from(resolution > 0));
        }
        precincts.len() == if has_precincts { usize::from(*levels) + 1 } else { 0 }
    }

    /// The most bytes that decoding takes, for a codestream of this length.
    fn needed(&self, length: usize) -> usize {
        // For a voxel: its value, its coefficient, both again in the transform, and the result.
        const VOXEL: usize = 24;
        // For a code block with its precinct and their trees, and for each of its layers.
        const BLOCK: usize = 1024;
        const LAYER: usize = 64;
        // Each order is a list of all precincts.
        const ORDER: usize = 64;
        // With its data of every band and every level.
        const TILE: usize = 1024;
        let [across, down] =
            [0, 1].map(|n| self.tile[n].min(self.size[n]).div_ceil(1 << self.sides[n]));
        // Each band has two more than fit along each axis, because they begin and end within them.
        let edges = 8 * (across + down) + 4 * (3 * self.levels + 1);
        let blocks = across.saturating_mul(down).saturating_add(edges);
        let voxels = self.size[0].saturating_mul(self.size[1]);
        [
            voxels.saturating_mul(VOXEL),
            blocks.saturating_mul(BLOCK + LAYER * self.layers + ORDER * self.orders),
            self.tiles().saturating_mul(TILE),
            // The information about which bytes belong to what is packed bit by bit.
            length.saturating_mul(64),
        ]
        .into_iter()
        .fold(0, usize::saturating_add)
    }
}

/// A number of `bytes` bytes, the highest first.
fn number(code: &[u8], at: usize, bytes: usize) -> Result<usize, String> {
    let part = at.checked_add(bytes).and_then(|end| code.get(at..end));
    let part = part.ok_or("truncated: its JPEG 2000 ends within its markers")?;
    Ok(part.iter().fold(0, |n, byte| n << 8 | usize::from(*byte)))
}

fn damaged(place: &str) -> String {
    format!("its JPEG 2000 is damaged {place}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::dicom::pixels::caught;
    use std::path::Path;

    const SIZE: [usize; 2] = [37, 33];

    fn file(name: &str) -> Vec<u8> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/dicom");
        std::fs::read(folder.join(name)).unwrap()
    }

    /// The values of the noise files, 16 bits unsigned.
    fn noise() -> Vec<u16> {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) as u16
        };
        (0..SIZE[0] * SIZE[1]).map(|_| next()).collect()
    }

    /// The position of the first part of a tile.
    fn part_of(code: &[u8]) -> usize {
        code.windows(2).position(|w| w == [0xff, 0x90]).unwrap()
    }

    /// A segment that states `count` times that layers come one after the other, with all six
    /// levels.
    fn orders(count: u8) -> Vec<u8> {
        let order = [0u8, 0, 0, 1, 6, 1, 0].repeat(usize::from(count));
        [&[0xff, 0x5f, 0, 2 + 7 * count][..], &order].concat()
    }

    #[test]
    fn values_of_16_bits_come_back_exactly_with_and_without_a_sign() {
        let expected = noise();
        let decoded = decode(&mut file("noise-u16.j2k"), SIZE, 16).unwrap();
        assert!(!decoded.signed && decoded.precision == 16);
        assert!(decoded.values.iter().copied().eq(expected.iter().map(|v| i32::from(*v))));
        let decoded = decode(&mut file("noise-i16.j2k"), SIZE, 16).unwrap();
        assert!(decoded.signed && decoded.precision == 16);
        assert!(decoded.values.iter().copied().eq(expected.iter().map(|v| i32::from(*v as i16))));
        // Wrapped in a file format of its own, and with the length of its data left open.
        let mut wrapped = [&b"\0\0\0\x0cjP  \r\n\x87\n"[..], &file("noise-u16.j2k")].concat();
        let part = part_of(&wrapped);
        wrapped[part + 6..part + 10].fill(0);
        wrapped.push(0);
        let decoded = decode(&mut wrapped, SIZE, 16).unwrap();
        assert!(decoded.values.iter().copied().eq(expected.iter().map(|v| i32::from(*v))));
        // With the order stated again, and everything else unchanged.
        let mut ordered = file("noise-u16.j2k");
        let part = part_of(&ordered);
        drop(ordered.splice(part..part, orders(1)));
        let decoded = decode(&mut ordered, SIZE, 16).unwrap();
        assert!(decoded.values.iter().copied().eq(expected.iter().map(|v| i32::from(*v))));
    }

    #[test]
    fn what_does_not_fit_or_would_take_too_much_is_refused_before_it_is_decoded() {
        let bytes = file("noise-u16.j2k");
        let head = Head::of(&mut bytes.clone()).unwrap();
        assert_eq!((head.size, head.precision, head.signed), (SIZE, 16, false));
        assert_eq!((head.sides, head.layers, head.levels), ([6, 6], 1, 5));
        let error = |change: &dyn Fn(&mut Vec<u8>), size: [usize; 2], bits: usize| {
            let mut bytes = bytes.clone();
            change(&mut bytes);
            decode(&mut bytes, size, bits).err().unwrap()
        };
        assert!(error(&|_| (), [33, 37], 16).contains("[37, 33] voxels of 16 bits"));
        assert!(error(&|_| (), SIZE, 8).contains("expected [37, 33] of 8 at most"));
        // More components; a place on a grid; tiles of one voxel on a large image.
        assert!(error(&|b| b[41] = 3, SIZE, 16).contains("3 components"));
        assert!(error(&|b| b[19] = 1, SIZE, 16).contains("larger reference grid"));
        let large = |b: &mut Vec<u8>| {
            b[8..16].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
            b[24..32].copy_from_slice(&[0, 0, 0, 1, 0, 0, 0, 1]);
        };
        assert!(error(&large, SIZE, 16).contains("4294967296 tiles"));
        // A second tile that is missing, and one with another number.
        let narrow = |b: &mut Vec<u8>| b[24..28].copy_from_slice(&[0, 0, 0, 36]);
        assert!(error(&narrow, SIZE, 16).contains("has no tile 1"));
        let part = part_of(&bytes);
        assert!(error(&|b| b[part + 5] = 1, SIZE, 16).contains("damaged in a tile number"));
        // A coding style whose length does not match its contents.
        let style = bytes.windows(2).position(|w| w == [0xff, 0x52]).unwrap();
        assert!(error(&|b| b[style + 4] = 1, SIZE, 16).contains("damaged in its coding style"));
        // More steps than there can be bands, of which each tile would have a copy; orders without
        // end, each of which would be a list of all parts.
        let at = bytes.windows(2).position(|w| w == [0xff, 0x5c]).unwrap();
        let end = at + 2 + number(&bytes, at + 2, 2).unwrap();
        let stepped = |b: &mut Vec<u8>| {
            let steps = [&[0xff_u8, 0x5c, 0, 101, 0x40][..], &[0x48; 98]].concat();
            drop(b.splice(at..end, steps));
        };
        assert!(error(&stepped, SIZE, 16).contains("damaged in its coding style"));
        let ordered = |b: &mut Vec<u8>| drop(b.splice(part..part, orders(33)));
        assert!(error(&ordered, SIZE, 16).contains("33 progression order changes"));
        // With precincts of one voxel and many layers there is much more to decode.
        let mut many = bytes[..style].to_vec();
        many.extend([0xff, 0x52, 0, 18, 1, 0, 0, 32, 0, 5, 4, 4, 0, 1, 0, 0x11, 0x11, 0x11]);
        many.extend([0x11, 0x11]);
        many.extend(&bytes[style + 14..]);
        let costly = Head::of(&mut many).unwrap();
        assert_eq!((costly.sides, costly.layers), ([0, 0], 32));
        let voxels = SIZE[0] * SIZE[1];
        assert!(costly.needed(100) > 3000 * voxels && head.needed(100) < 200 * voxels);
    }

    #[test]
    fn damage_is_an_error_or_other_values_and_nothing_else() {
        let bytes = file("noise-i16.j2k");
        for cut in 0..bytes.len() {
            assert!(decode(&mut bytes[..cut].to_vec(), SIZE, 16).is_err(), "cut at {cut}");
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            if let Ok(decoded) = caught("JPEG 2000", || decode(&mut damaged, SIZE, 16)) {
                assert_eq!(decoded.values.len(), SIZE[0] * SIZE[1], "byte {at}");
            }
        }
    }
}
