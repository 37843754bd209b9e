//! Where an answer is wrong: masks of one bit per voxel.
//!
//! A simulated user looks at the whole of an answer in every iteration, and gives a few voxels of
//! it: words of 64 voxels are compared, counted and passed over at once.

use crate::memory;

/// The name of what is wrong in refusals of memory.
pub(super) const ERRORS: &str = "the errors of a mask";

/// Words for which [`Ranks`] has one count.
const RUN: usize = 64;

/// A mask with one bit per voxel: the first voxel is the highest bit of the first word. Bits after
/// the last voxel are 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bits {
    words: Vec<u64>,
    len: usize,
}

impl Bits {
    /// The mask of the voxels whose byte is not 0.
    pub fn of(mask: &[u8]) -> Bits {
        let (whole, rest) = mask.as_chunks::<64>();
        let mut words = memory::list(ERRORS, mask.len().div_ceil(64));
        words.extend(whole.iter().map(word));
        if !rest.is_empty() {
            let mut last = [0; 64];
            last[..rest.len()].copy_from_slice(rest);
            words.push(word(&last));
        }
        Bits { words, len: mask.len() }
    }

    /// The mask of `len` voxels of which a device sent one bit each, the first in the highest bit
    /// of the first byte.
    ///
    /// # Panics
    /// If there are not as many bytes as that takes.
    pub fn packed(bytes: &[u8], len: usize) -> Bits {
        assert_eq!(bytes.len(), len.div_ceil(8), "the bytes of {len} voxels");
        let word = |bytes: &[u8]| {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            u64::from_be_bytes(word)
        };
        let mut words = memory::collected(ERRORS, bytes.chunks(8).map(word));
        if let (Some(last), used @ 1..) = (words.last_mut(), len % 64) {
            *last &= u64::MAX << (64 - used);
        }
        Bits { words, len }
    }

    /// One byte per voxel: 1 where the bit is set, otherwise 0.
    pub fn bytes(&self) -> Vec<u8> {
        let mut mask = memory::zeroed::<u8>(ERRORS, self.len);
        let runs = self.words.iter().zip(mask.chunks_mut(64));
        for (word, run) in runs.filter(|(word, _)| **word != 0) {
            run.iter_mut().enumerate().for_each(|(at, v)| *v = (word >> (63 - at) & 1) as u8);
        }
        mask
    }

    /// Whether the bit of the voxel with flat index `at` is set.
    pub fn has(&self, at: usize) -> bool {
        self.words[at / 64] >> (63 - at % 64) & 1 != 0
    }

    /// How many bits are set.
    pub fn count(&self) -> usize {
        ones(&self.words)
    }

    /// Whether no bit is set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The mask that `of` makes of the words of this and another of as many voxels.
    fn with(&self, other: &Bits, of: impl Fn(u64, u64) -> u64) -> Bits {
        assert_eq!(self.len, other.len, "the voxels of two masks");
        let pairs = self.words.iter().zip(&other.words);
        Bits { words: memory::collected(ERRORS, pairs.map(|(a, b)| of(*a, *b))), len: self.len }
    }
}

/// The bits of 64 voxels.
fn word(bytes: &[u8; 64]) -> u64 {
    let eight = |bytes: &[u8; 8]| {
        // The product's highest byte has a bit of each byte, 0 or 1. Below it, no two partial
        // products fall on the same bit, so that nothing is carried into it.
        let marked = u64::from_be_bytes(bytes.map(|v| u8::from(v != 0)));
        marked.wrapping_mul(0x0102_0408_1020_4080) >> 56
    };
    bytes.as_chunks::<8>().0.iter().fold(0, |word, bytes| word << 8 | eight(bytes))
}

fn ones(words: &[u64]) -> usize {
    words.iter().map(|word| word.count_ones() as usize).sum()
}

/// Finds the set bits of a mask by their number.
pub(super) struct Ranks {
    bits: Bits,
    /// How many bits are set before each run of [`RUN`] words.
    before: Vec<usize>,
    count: usize,
}

impl Ranks {
    pub(super) fn of(bits: Bits) -> Ranks {
        let mut count = 0;
        let before = bits.words.chunks(RUN).map(|run| {
            let before = count;
            count += ones(run);
            before
        });
        let before = memory::collected(ERRORS, before);
        Ranks { bits, before, count }
    }

    /// How many bits are set.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// The flat index of set bit `n`, from 0.
    ///
    /// # Panics
    /// If no more than `n` are set.
    pub(super) fn nth(&self, n: usize) -> usize {
        assert!(n < self.count, "bit {n} of {}", self.count);
        // The last run with no more than `n` before it.
        let run = self.before.partition_point(|before| *before <= n) - 1;
        let (mut at, mut left) = (run * RUN, n - self.before[run]);
        let mut word = self.bits.words[at];
        while left >= word.count_ones() as usize {
            left -= word.count_ones() as usize;
            at += 1;
            word = self.bits.words[at];
        }
        for _ in 0..left {
            word ^= (1u64 << 63) >> word.leading_zeros();
        }
        at * 64 + word.leading_zeros() as usize
    }
}

/// Where an answer is wrong: voxels it missed, and voxels it has in excess. At first (without an
/// answer) the whole object is missed.
pub struct Errors {
    missed: Bits,
    excess: Bits,
}

impl Errors {
    /// Compares an answer with the label, both with one value per voxel.
    ///
    /// # Panics
    /// If they have different lengths.
    pub fn of(label: &[u8], answer: Option<&[u8]>) -> Errors {
        Errors::between(&Bits::of(label), answer.map(Bits::of).as_ref())
    }

    /// Compares an answer with the label, as bits of as many voxels.
    ///
    /// # Panics
    /// If they have different lengths.
    pub fn between(label: &Bits, answer: Option<&Bits>) -> Errors {
        let bits = |words| Bits { words, len: label.len };
        match answer {
            None => Errors {
                missed: bits(memory::copied(ERRORS, &label.words)),
                excess: bits(memory::zeroed(ERRORS, label.words.len())),
            },
            Some(answer) => Errors {
                missed: label.with(answer, |label, answer| label & !answer),
                excess: label.with(answer, |label, answer| answer & !label),
            },
        }
    }

    /// Whether the label has the object in a voxel, and the answer has not.
    pub fn is_missed(&self, at: usize) -> bool {
        self.missed.has(at)
    }

    /// Whether the answer has the object in a voxel, and the label has not.
    pub fn is_excess(&self, at: usize) -> bool {
        self.excess.has(at)
    }

    /// The voxels that the answer missed, 1 in each.
    pub fn missed(&self) -> Vec<u8> {
        self.missed.bytes()
    }

    /// The voxels that the answer has in excess, 1 in each.
    pub fn excess(&self) -> Vec<u8> {
        self.excess.bytes()
    }

    /// The wrong voxels, whether missed or in excess, 1 in each.
    pub fn wrong(&self) -> Vec<u8> {
        self.either().bytes()
    }

    /// The wrong voxels, whether missed or in excess.
    pub(super) fn either(&self) -> Bits {
        self.missed.with(&self.excess, |missed, excess| missed | excess)
    }

    /// Whether there is nothing to correct.
    pub fn is_empty(&self) -> bool {
        self.missed.is_empty() && self.excess.is_empty()
    }
}
