//! Packing voxels that are mostly zero: in blocks in parallel, where blocks of only zeros are
//! packed once for all.

use crate::memory;
use flate2::{Compress, Compression, Crc, FlushCompress, Status};
use rayon::prelude::*;
use std::io::{self, Write};
use std::sync::{Arc, OnceLock};

/// Bytes of a block: so many that its end, which costs five bytes, does not matter. The size is the
/// same for any number of threads, and so are the bytes of a file.
pub(super) const BLOCK: usize = 1 << 20;

/// The level for blocks that are not all zero: masks and maps of objects shrink a hundredfold at
/// any level.
const LEVEL: Compression = Compression::fast();

/// How messages name the memory that this takes.
const PACKED: &str = "packed voxels";

/// A block and the checksum of its contents.
struct Block {
    bytes: Vec<u8>,
    sum: Crc,
}

impl Block {
    /// Packs bytes so that another block can follow.
    fn of(bytes: &[u8], level: Compression) -> io::Result<Arc<Block>> {
        let mut sum = Crc::new();
        sum.update(bytes);
        let mut compress = Compress::new(level, false);
        let mut out = memory::list(PACKED, bytes.len() / 8 + 1024);
        loop {
            let read = compress.total_in() as usize;
            let status = compress
                .compress_vec(&bytes[read..], &mut out, FlushCompress::Sync)
                .map_err(io::Error::other)?;
            // All has been written if some room was left.
            if compress.total_in() as usize == bytes.len() && out.len() < out.capacity() {
                out.shrink_to_fit();
                return Ok(Arc::new(Block { bytes: out, sum }));
            }
            if status != Status::Ok && out.len() < out.capacity() {
                return Err(io::Error::other("the compressor does not go on"));
            }
            let more = memory::list::<u8>(PACKED, 2 * out.capacity());
            let less = std::mem::replace(&mut out, more);
            out.extend_from_slice(&less);
        }
    }

    /// A block of zeros.
    fn of_nothing() -> io::Result<Arc<Block>> {
        static NOTHING: OnceLock<Arc<Block>> = OnceLock::new();
        if let Some(block) = NOTHING.get() {
            return Ok(block.clone());
        }
        let block = Block::of(&memory::zeroed(PACKED, BLOCK), Compression::best())?;
        Ok(NOTHING.get_or_init(|| block).clone())
    }
}

/// Whether all bytes are 0. For a few thousand, all are read whatever the first one is, so that
/// they are read as fast as memory delivers them.
pub(super) fn is_nothing(bytes: &[u8]) -> bool {
    bytes.chunks(4096).all(|part| part.iter().fold(0u8, |any, byte| any | *byte) == 0)
}

/// Voxels in a file's order.
#[derive(Clone, Copy)]
pub struct Body<'a> {
    bytes: &'a [u8],
    /// Whether anything was put into a block; blocks beyond the list are examined.
    held: &'a [bool],
}

impl<'a> Body<'a> {
    /// A body of which nothing is known.
    pub fn of(bytes: &'a [u8]) -> Body<'a> {
        Body { bytes, held: &[] }
    }

    /// A body in which blocks of [`BLOCK`] bytes that are not `held` are 0: they are not examined,
    /// so that memory which was never written is not read either.
    pub fn held(bytes: &'a [u8], held: &'a [bool]) -> Body<'a> {
        Body { bytes, held }
    }

    fn is_nothing(&self, block: usize, bytes: &[u8]) -> bool {
        self.held.get(block) == Some(&false) || is_nothing(bytes)
    }
}

/// Packs a body, in blocks in parallel.
fn blocks(body: Body) -> io::Result<Vec<Arc<Block>>> {
    let block = |(at, bytes): (usize, &[u8])| {
        if bytes.len() == BLOCK && body.is_nothing(at, bytes) {
            Block::of_nothing()
        } else {
            Block::of(bytes, LEVEL)
        }
    };
    body.bytes.par_chunks(BLOCK).enumerate().map(block).collect()
}

/// An empty block that is the last.
const END: [u8; 2] = [3, 0];

/// Writes a gzip file of `head` and then `body`.
///
/// # Errors
/// Those of `to`.
pub fn gzip(to: &mut impl Write, head: &[u8], body: Body) -> io::Result<()> {
    // A deflated stream, no time, the fastest method, unknown system.
    to.write_all(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 4, 255])?;
    let first = Block::of(head, LEVEL)?;
    to.write_all(&first.bytes)?;
    let mut sum = Crc::new();
    sum.combine(&first.sum);
    // A few at a time, because incompressible blocks keep their size.
    let few = 4 * rayon::current_num_threads();
    for (n, bytes) in body.bytes.chunks(few * BLOCK).enumerate() {
        let held = body.held.get(n * few..).unwrap_or_default();
        for block in blocks(Body { bytes, held })? {
            to.write_all(&block.bytes)?;
            sum.combine(&block.sum);
        }
    }
    to.write_all(&END)?;
    to.write_all(&sum.sum().to_le_bytes())?;
    // The length, modulo 2^32.
    to.write_all(&((head.len() + body.bytes.len()) as u32).to_le_bytes())
}

/// A zlib stream, whose length is known before it is written.
pub struct Zlib {
    blocks: Vec<Arc<Block>>,
    sum: u32,
}

impl Zlib {
    /// Packs a body.
    ///
    /// # Errors
    /// The compressor's.
    pub fn of(body: Body) -> io::Result<Zlib> {
        Ok(Zlib { blocks: blocks(body)?, sum: adler32(body) })
    }

    /// The stream's length in bytes.
    pub fn len(&self) -> usize {
        2 + self.blocks.iter().map(|b| b.bytes.len()).sum::<usize>() + END.len() + 4
    }

    /// Writes it.
    ///
    /// # Errors
    /// Those of `to`.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        // A window of 32 kB, the fastest method.
        to.write_all(&[0x78, 0x01])?;
        self.blocks.iter().try_for_each(|block| to.write_all(&block.bytes))?;
        to.write_all(&END)?;
        to.write_all(&self.sum.to_be_bytes())
    }
}

/// The modulus of the sums in zlib's checksum.
const PRIME: u32 = 65521;

/// The checksum of zlib streams (RFC 1950). A block adds its bytes to the first sum; to the second
/// it adds the first sum, once per byte, and then each byte, once for itself and for each byte
/// after it: so blocks can be summed in parallel, and empty ones take no time.
fn adler32(body: Body) -> u32 {
    let of_block = |(at, bytes): (usize, &[u8])| {
        let sums = if body.is_nothing(at, bytes) { [0; 2] } else { sums(bytes) };
        (bytes.len() as u64, sums.map(u64::from))
    };
    let blocks: Vec<(u64, [u64; 2])> =
        body.bytes.par_chunks(BLOCK).enumerate().map(of_block).collect();
    let (mut first, mut second, prime) = (1u64, 0u64, u64::from(PRIME));
    for (length, [a, b]) in blocks {
        second = (second + length * first + b) % prime;
        first = (first + a) % prime;
    }
    (second << 16 | first) as u32
}

/// The two sums of a block that is preceded by nothing.
fn sums(bytes: &[u8]) -> [u32; 2] {
    let (mut a, mut b) = (0u32, 0u32);
    // This many steps before either sum can overflow.
    for part in bytes.chunks(5552) {
        for byte in part {
            a += u32::from(*byte);
            b += a;
        }
        (a, b) = (a % PRIME, b % PRIME);
    }
    [a, b]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn what_is_packed_is_unpacked() {
        let mut noise = 1u32;
        let mut random = |_| {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (noise >> 24) as u8
        };
        let mut sparse = vec![0u8; 3 * BLOCK + 5];
        sparse[BLOCK + 17] = 1;
        for body in [
            vec![],
            vec![7],
            sparse,
            (0..2 * BLOCK + 1).map(&mut random).collect(),
            vec![0; 4 * BLOCK],
        ] {
            let mut packed = vec![];
            gzip(&mut packed, b"head", Body::of(&body)).unwrap();
            // One member, whose checksum and length its reader checks.
            let mut unpacked = vec![];
            flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut unpacked).unwrap();
            assert!(unpacked[..4] == *b"head" && unpacked[4..] == body);
            let (zlib, mut stream) = (Zlib::of(Body::of(&body)).unwrap(), vec![]);
            zlib.write(&mut stream).unwrap();
            unpacked.clear();
            flate2::read::ZlibDecoder::new(&stream[..]).read_to_end(&mut unpacked).unwrap();
            assert!(unpacked == body && stream.len() == zlib.len());
            // The same result if it is told which blocks hold something, and if only of the first
            // ones.
            let held: Vec<bool> =
                body.chunks(BLOCK).map(|block| block.iter().any(|b| *b != 0)).collect();
            for held in [&held[..], &held[..held.len().min(1)]] {
                let mut again = vec![];
                gzip(&mut again, b"head", Body::held(&body, held)).unwrap();
                assert!(again == packed);
                again.clear();
                Zlib::of(Body::held(&body, held)).unwrap().write(&mut again).unwrap();
                assert!(again == stream);
            }
            assert!(
                body.iter().any(|b| *b > 1) || packed.len() < 1200 * (body.len() / BLOCK) + 20_000,
                "{}",
                packed.len()
            );
        }
    }
}
