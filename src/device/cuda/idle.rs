//! Small pieces of device memory between two uses. A step that is launched op by op asks for about
//! a thousand of them, and the driver takes longer to allocate one than to launch a kernel.
//!
//! One stream does all work in the order in which it was launched, so a piece that is given back
//! may be reused at once: its next user's work comes after its previous user's.

use std::collections::HashMap;

/// The largest piece that is kept, and the most bytes that are kept.
const LARGEST: usize = 64 << 10;
const MOST: usize = 16 << 20;
/// Pieces are multiples of this many bytes.
const GRAIN: usize = 512;

/// The pieces of memory.
#[derive(Default)]
pub(super) struct Idle {
    /// The sizes in bytes of all small pieces, in use or not, by their addresses.
    sizes: HashMap<u64, usize>,
    /// The addresses of pieces that are not in use, by their sizes in bytes.
    idle: HashMap<usize, Vec<u64>>,
    /// The total bytes of the pieces that are not in use.
    bytes: usize,
}

impl Idle {
    /// How many bytes to ask the driver for, for a piece of `bytes`.
    pub(super) fn whole(bytes: usize) -> usize {
        if bytes <= LARGEST { bytes.max(1).next_multiple_of(GRAIN) } else { bytes }
    }

    /// A piece of at least `bytes` bytes that is not in use.
    pub(super) fn lend(&mut self, bytes: usize) -> Option<u64> {
        let whole = Idle::whole(bytes);
        let address = self.idle.get_mut(&whole)?.pop()?;
        self.bytes -= whole;
        Some(address)
    }

    /// Records a piece of `bytes` bytes that the driver allocated.
    pub(super) fn note(&mut self, address: u64, bytes: usize) {
        if bytes <= LARGEST {
            self.sizes.insert(address, Idle::whole(bytes));
        }
    }

    /// Keeps a piece that was given back; false if it must go back to the driver.
    pub(super) fn keep(&mut self, address: u64) -> bool {
        let Some(&whole) = self.sizes.get(&address) else { return false };
        if self.bytes + whole > MOST {
            self.sizes.remove(&address);
            return false;
        }
        self.bytes += whole;
        self.idle.entry(whole).or_default().push(address);
        true
    }

    /// Gives up all pieces that are not in use: they must go back to the driver.
    pub(super) fn give_up(&mut self) -> Vec<u64> {
        self.bytes = 0;
        let all: Vec<u64> = self.idle.drain().flat_map(|(_, pieces)| pieces).collect();
        for address in &all {
            self.sizes.remove(address);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_lent_again_to_who_asks_for_as_much() {
        let mut idle = Idle::default();
        assert_eq!([0, 1, 512, 513].map(Idle::whole), [512, 512, 512, 1024]);
        assert_eq!(Idle::whole(LARGEST + 1), LARGEST + 1);
        assert_eq!(idle.lend(100), None);
        idle.note(1, 100);
        idle.note(2, 600);
        idle.note(3, LARGEST + 1);
        assert_eq!([1, 2, 3, 4].map(|at| idle.keep(at)), [true, true, false, false]);
        assert_eq!([512, 512, 513].map(|bytes| idle.lend(bytes)), [Some(1), None, Some(2)]);
        assert!(idle.keep(2));
        assert_eq!(idle.give_up(), [2]);
        // The driver may give its address again, to a large piece.
        assert_eq!((idle.lend(600), idle.keep(2), idle.bytes), (None, false, 0));
    }

    #[test]
    fn no_more_is_kept_than_was_said() {
        let mut idle = Idle::default();
        let count = (MOST / LARGEST) as u64;
        for address in 0..=count {
            idle.note(address, LARGEST);
        }
        let kept = (0..=count).filter(|&address| idle.keep(address)).count();
        assert_eq!(kept, MOST / LARGEST);
        assert_eq!(idle.give_up().len(), MOST / LARGEST);
    }
}
