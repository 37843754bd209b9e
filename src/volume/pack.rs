//! Packing voxels that are mostly nothing: in blocks side by side, of which those that hold only zeros are packed once for all.

use crate::memory;
use flate2::{Compress, Compression, Crc, FlushCompress, Status};
use rayon::prelude::*;
use std::io::{self, Write};
use std::sync::{Arc, OnceLock};

/// Bytes of a block: so many that its end, which costs five bytes, counts for nothing. The same for any number of threads, and so are the bytes of a file.
const BLOCK: usize = 1 << 20;

/// What is not nothing is packed so: masks and maps of objects shrink a hundredfold at any level.
const LEVEL: Compression = Compression::fast();

/// What messages call the memory that this takes.
const PACKED: &str = "packed voxels";

/// A block and the checksum of what is in it.
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
            let status = compress.compress_vec(&bytes[read..], &mut out, FlushCompress::Sync).map_err(io::Error::other)?;
            // All is out when some room was left.
            if compress.total_in() as usize == bytes.len() && out.len() < out.capacity() {
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

/// Writes a gzip file of `head` and then `body`.
///
/// # Errors
/// Those of `to`.
pub fn gzip(to: &mut impl Write, head: &[u8], body: &[u8]) -> io::Result<()> {
    // A deflated stream, no time, the fastest way, no word of the system.
    to.write_all(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 4, 255])?;
    let first = Block::of(head, LEVEL)?;
    to.write_all(&first.bytes)?;
    let mut sum = Crc::new();
    sum.combine(&first.sum);
    let block = |bytes: &[u8]| match bytes.len() == BLOCK && bytes.iter().all(|b| *b == 0) {
        true => Block::of_nothing(),
        false => Block::of(bytes, LEVEL),
    };
    // So many at a time that both are written soon and there is always one to work on.
    for blocks in body.chunks(64 * BLOCK) {
        for block in blocks.par_chunks(BLOCK).map(block).collect::<Vec<_>>() {
            let block = block?;
            to.write_all(&block.bytes)?;
            sum.combine(&block.sum);
        }
    }
    // An empty last block, the checksum, and the length as far as it fits.
    to.write_all(&[3, 0])?;
    to.write_all(&sum.sum().to_le_bytes())?;
    to.write_all(&((head.len() + body.len()) as u32).to_le_bytes())
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
        for body in [vec![], vec![7], sparse, (0..2 * BLOCK + 1).map(&mut random).collect(), vec![0; 4 * BLOCK]] {
            let mut packed = vec![];
            gzip(&mut packed, b"head", &body).unwrap();
            // Every way to read it: as one member.
            let mut unpacked = vec![];
            flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut unpacked).unwrap();
            assert!(unpacked[..4] == *b"head" && unpacked[4..] == body);
            assert!(body.iter().any(|b| *b > 1) || packed.len() < 1200 * (body.len() / BLOCK) + 20_000, "{}", packed.len());
        }
    }
}
