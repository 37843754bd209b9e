//! Reading chunks of blosc2, as NumPy's users send them. Of the many forms that the library
//! supports, those are read that its Python package writes by default: zstd, with or without a
//! shuffle, the bytes of elements separated or together; stored bytes; and all zeros.
//!
//! A chunk begins with 32 bytes: the version, flags, the element's size, the sizes of the data, of
//! its blocks and of the chunk, the filters, and special cases. Then come the offsets of all
//! blocks, and the blocks: one stream, or one for each byte of an element, each after its length.

use rayon::prelude::*;
use ruzstd::decoding::FrameDecoder;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes before a chunk's data.
const HEADER: usize = 32;
/// Bytes of a length or an offset.
const WORD: usize = 4;
/// The most memory for the window that a zstd stream may ask for.
const WINDOW: u64 = 8 << 20;

/// Flags in the third byte.
const STORED: u8 = 0x02;
const TOGETHER: u8 = 0x10;
/// The compressor in the flags' highest bits.
const ZSTD: u8 = 4;
/// The filters, of which there may be six in a row.
const FILTERS: std::ops::Range<usize> = 16..22;
const SHUFFLE: u8 = 1;
/// The special case, in three bits of the last byte.
const ZEROS: u8 = 1;

/// The message for a chunk that ends too early.
const SHORT: &str = "a blosc2 chunk ends too early";

fn word(bytes: &[u8], at: usize) -> Result<i32, String> {
    let word = bytes.get(at..at + WORD).and_then(|b| <[u8; WORD]>::try_from(b).ok());
    word.map(i32::from_le_bytes).ok_or_else(|| SHORT.into())
}

fn size(bytes: &[u8], at: usize, what: &str) -> Result<usize, String> {
    let value = word(bytes, at)?;
    usize::try_from(value).map_err(|_| format!("a blosc2 chunk's {what} is {value} bytes"))
}

/// A chunk's header.
struct Chunk<'a> {
    bytes: &'a [u8],
    together: bool,
    element: usize,
    block: usize,
    shuffled: bool,
    /// Bytes that streams may still take: all of them together are no longer than the chunk.
    left: AtomicUsize,
}

/// Unpacks a chunk into as many bytes as its sender announced.
///
/// # Errors
/// It is truncated or damaged, holds another number of bytes, or has a form that is not read.
pub fn decode(bytes: &[u8], out: &mut [u8]) -> Result<(), String> {
    if bytes.len() < HEADER {
        return Err(SHORT.into());
    }
    let (flags, element) = (bytes[2], usize::from(bytes[3]));
    let (data, block) = (size(bytes, 4, "data")?, size(bytes, 8, "block")?);
    let all = size(bytes, 12, "length")?;
    if data != out.len() {
        return Err(format!("a blosc2 chunk holds {data} bytes, expected {}", out.len()));
    }
    if all != bytes.len() || element == 0 {
        return Err(format!(
            "a blosc2 chunk declares {all} bytes with elements of {element}, but has {}",
            bytes.len()
        ));
    }
    match bytes[HEADER - 1] >> 4 & 7 {
        0 => {}
        ZEROS => {
            out.fill(0);
            return Ok(());
        }
        other => {
            return Err(format!("a blosc2 chunk of the special kind {other} is not supported"));
        }
    }
    if flags & STORED != 0 {
        let stored = &bytes[HEADER..];
        if stored.len() != out.len() {
            return Err(SHORT.into());
        }
        out.copy_from_slice(stored);
        return Ok(());
    }
    if flags >> 5 != ZSTD {
        return Err(format!(
            "a blosc2 chunk with compressor {} is not supported: expected zstd",
            flags >> 5
        ));
    }
    let filters = &bytes[FILTERS];
    let used = filters.iter().filter(|f| **f != 0).count();
    if filters.iter().any(|f| *f > SHUFFLE) || used > 1 {
        return Err(format!(
            "a blosc2 chunk with the filters {filters:?} is not supported: expected one shuffle or none"
        ));
    }
    let (together, shuffled) = (flags & TOGETHER != 0, used == 1);
    let left = AtomicUsize::new(bytes.len());
    let chunk = Chunk { bytes, together, element, block, shuffled, left };
    if block == 0 || HEADER + data.div_ceil(block).saturating_mul(WORD) > bytes.len() {
        return Err(SHORT.into());
    }
    let blocks = out.par_chunks_mut(block).enumerate();
    blocks.try_for_each_init(decoder, |zstd, (at, out)| chunk.unpack(at, out, zstd))
}

fn decoder() -> FrameDecoder {
    let mut zstd = FrameDecoder::new();
    zstd.set_max_window_size(WINDOW);
    zstd
}

impl Chunk<'_> {
    /// Unpacks a block.
    fn unpack(&self, at: usize, out: &mut [u8], zstd: &mut FrameDecoder) -> Result<(), String> {
        let mut place = size(self.bytes, HEADER + at * WORD, "place of a block")?;
        // The last block is never separated if it is shorter than the others.
        let apart = !self.together && out.len() == self.block;
        let streams = if apart { self.element } else { 1 };
        if !out.len().is_multiple_of(streams) || out.is_empty() {
            return Err(format!("a block of {} bytes in {streams} streams", out.len()));
        }
        let shuffled = self.shuffled && self.element > 1;
        let mut apart_again = if shuffled { scratch(out.len())? } else { vec![] };
        let to = if shuffled { &mut apart_again[..] } else { &mut out[..] };
        let each = to.len() / streams;
        for part in to.chunks_exact_mut(each) {
            place = self.stream(place, part, zstd)?;
        }
        if shuffled {
            unshuffle(&apart_again, self.element, out);
        }
        Ok(())
    }

    /// Unpacks the stream at an offset, and returns where the next one begins.
    fn stream(&self, at: usize, out: &mut [u8], zstd: &mut FrameDecoder) -> Result<usize, String> {
        let length = word(self.bytes, at)?;
        let at = at + WORD;
        // Otherwise blocks that all name one stream would have it unpacked for each of them.
        let taken = WORD + usize::try_from(length).unwrap_or(1);
        let without = |left: usize| left.checked_sub(taken);
        self.left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, without)
            .map_err(|_| "a blosc2 chunk's streams overlap")?;
        if length == 0 {
            out.fill(0);
            return Ok(at);
        }
        if length < 0 {
            // A run of one value, which the length encodes.
            let token = self.bytes.get(at).ok_or(SHORT)?;
            let value = u8::try_from(-i64::from(length)).ok().filter(|_| token & 1 == 1);
            out.fill(
                value.ok_or_else(|| format!("a blosc2 stream has the invalid length {length}"))?,
            );
            return Ok(at + 1);
        }
        let end = at + length as usize;
        let packed = self.bytes.get(at..end).ok_or(SHORT)?;
        if packed.len() == out.len() {
            out.copy_from_slice(packed);
            return Ok(end);
        }
        let wrong = |why: String| format!("a blosc2 stream cannot be decompressed: {why}");
        // If the decoder panics over its input, that is the sender's fault.
        match catch_unwind(AssertUnwindSafe(|| zstd.decode_all(packed, out))) {
            Ok(Ok(n)) if n == out.len() => Ok(end),
            Ok(Ok(n)) => Err(wrong(format!("{n} bytes, expected {}", out.len()))),
            Ok(Err(e)) => Err(wrong(e.to_string())),
            Err(_) => {
                *zstd = decoder();
                Err(wrong("it is damaged".into()))
            }
        }
    }
}

/// Memory for a block that is being reassembled.
fn scratch(bytes: usize) -> Result<Vec<u8>, String> {
    let mut list = crate::memory::room("a block of an upload", bytes).map_err(|e| e.to_string())?;
    list.resize(bytes, 0);
    Ok(list)
}

/// Reassembles elements from separated bytes: first come all first bytes, then all second ones.
/// Bytes that do not make a whole element are at the end, unchanged.
fn unshuffle(from: &[u8], element: usize, to: &mut [u8]) {
    let count = from.len() / element;
    for (byte, plane) in from[..count * element].chunks_exact(count.max(1)).enumerate() {
        for (n, value) in plane.iter().enumerate() {
            to[n * element + byte] = *value;
        }
    }
    to[count * element..].copy_from_slice(&from[count * element..]);
}

/// The header of a chunk of stored bytes, with elements of `element` bytes.
pub fn stored_header(bytes: usize, element: usize) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    // The version, that of the compression format, flags and the element's size.
    header[..4].copy_from_slice(&[5, 1, 0x97, element as u8]);
    for (at, value) in [(4, bytes), (8, bytes), (12, bytes + HEADER)] {
        header[at..at + WORD].copy_from_slice(&(value as u32).to_le_bytes());
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let of = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.chunks_exact(2).map(of).collect()
    }

    /// Chunks written by python-blosc2 4.14.1, and their contents.
    #[test]
    fn chunks_of_the_library_are_read() {
        // Bytes of elements separated, shuffled, packed by zstd.
        let ramp = hex("
            05018502400600004006000068010000010000000000050000000000000000002400000014010000
            28b52ffd6020025508000410000306090c0f1215181b1e2124272a2d303336393c3f4245484b4e51
            54575a5d606366696c6f7275787b7e8184878a8d909396999c9fa2a5a8abaeb1b4b7babdc0c3c6c9
            cccfd2d5d8dbdee1e4e7eaedf0f3f6f9fcff0205080b0e1114171a1d202326292c2f3235383b3e41
            44474a4d505356595c5f6265686b6e7174777a7d808386898c8f9295989b9ea1a4a7aaadb0b3b6b9
            bcbfc2c5c8cbced1d4d7dadde0e3e6e9eceff2f5f8fbfe0104070a0d101316191c1f2225282b2e31
            34373a3d404346494c4f5255585b5e6164676a6d707376797c7f8285888b8e9194979a9da0a3a6a9
            acafb2b5b8bbbec1c4c7cacdd0d3d6d9dcdfe2e5e8ebeef1f4f7fafd0100001d06aa350528000000
            28b52ffd602002f5000050000102030405060708090a6001d0e34d4c31c914a698648a293209930c");
        let values: Vec<u8> = (0..800i16).flat_map(|n| (3 * n).to_le_bytes()).collect();
        // Bytes as one stream.
        let mask = hex("
            05019501d0070000d00700003f000000000000000000050000000000000000002400000017000000
            28b52ffd60d0066d00001001000300aa1bf5030807e6d8");
        let marks: Vec<u8> = (0..2000).map(|n| u8::from(n / 7 % 5 == 0)).collect();
        // Streams that are runs of one value, and of zeros; a last block that is shorter.
        let constant = hex("
            0501850280380100000001004c000000010000000000050000000000000000002800000031000000
            f9ffffff01000000001700000028b52ffd6080376d000010070002003c0c7ae1617a7705");
        let sevens: Vec<u8> = (0..80_000).map(|n| 7 * u8::from(n % 2 == 0)).collect();
        // Nothing but zeros.
        let zeros = hex("05019501d0070000d00700002000000000000000000005000000000000000010");
        let cases = [(ramp, values), (mask, marks), (constant, sevens), (zeros, vec![0; 2000])];
        for (chunk, expected) in cases {
            let mut out = vec![1; expected.len()];
            decode(&chunk, &mut out).unwrap();
            assert!(out == expected);
            let mut other = vec![1; expected.len() + 1];
            assert!(decode(&chunk, &mut other).unwrap_err().contains("bytes, expected "));
            // Truncated or changed anywhere it gives an error, or other values; never a panic.
            for cut in 0..chunk.len() {
                assert!(decode(&chunk[..cut], &mut out).is_err());
            }
            for at in 0..chunk.len() {
                for bit in 0..8 {
                    let mut changed = chunk.clone();
                    changed[at] ^= 1 << bit;
                    let _ = decode(&changed, &mut out);
                }
            }
        }
    }

    #[test]
    fn what_is_stored_is_read() {
        for element in [1, 2, 4, 8] {
            let data: Vec<u8> = (0..240).map(|n| (n * n % 251) as u8).collect();
            let chunk = [&stored_header(data.len(), element)[..], &data].concat();
            let mut out = vec![0; data.len()];
            decode(&chunk, &mut out).unwrap();
            assert!(out == data);
        }
    }

    #[test]
    fn streams_lie_beside_each_other() {
        // Two blocks of 100 bytes, each a stream of stored bytes.
        let chunk = |places: [u32; 2]| {
            let mut chunk = stored_header(200, 1).to_vec();
            chunk[2] = ZSTD << 5 | TOGETHER;
            chunk.extend(places.map(u32::to_le_bytes).concat());
            for value in [3u8, 4] {
                chunk.extend(100u32.to_le_bytes());
                chunk.extend([value; 100]);
            }
            let length = chunk.len() as u32;
            chunk[8..12].copy_from_slice(&100u32.to_le_bytes());
            chunk[12..16].copy_from_slice(&length.to_le_bytes());
            chunk
        };
        let mut out = [0; 200];
        decode(&chunk([40, 144]), &mut out).unwrap();
        assert!(out[..100] == [3; 100] && out[100..] == [4; 100]);
        // One stream for all of many blocks is not unpacked over and over.
        let mut all = stored_header(10_000, 1).to_vec();
        all[2] = ZSTD << 5 | TOGETHER;
        let place = (HEADER + 100 * WORD) as u32;
        (0..100).for_each(|_| all.extend(place.to_le_bytes()));
        all.extend(100u32.to_le_bytes());
        all.extend([5; 100]);
        let length = all.len() as u32;
        all[8..12].copy_from_slice(&100u32.to_le_bytes());
        all[12..16].copy_from_slice(&length.to_le_bytes());
        assert!(decode(&all, &mut [0; 10_000]).unwrap_err().contains("overlap"));
    }

    #[test]
    fn forms_that_are_not_read_are_named() {
        let data = [0u8; 16];
        let chunk = |change: &dyn Fn(&mut [u8])| {
            let mut chunk = [&stored_header(data.len(), 1)[..], &data].concat();
            change(&mut chunk);
            decode(&chunk, &mut [0; 16]).unwrap_err()
        };
        assert!(chunk(&|c| c[2] = 0x25).contains("with compressor 1"));
        assert!(chunk(&|c| (c[2], c[16]) = (0x95, 2)).contains("the filters [2"));
        assert!(chunk(&|c| c[31] = 0x20).contains("special kind 2"));
        assert!(chunk(&|c| c[3] = 0).contains("elements of 0"));
    }
}
