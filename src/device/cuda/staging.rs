//! The places that copies to the device start from.
//!
//! A copy is queued behind everything that was launched before it, and its values must stay where
//! they are until the device gets to it. So copies start from places of their own, used in turn: a
//! copy waits only if its place is still taken by the one before it there.

/// The number of places for small copies, and the most bytes of one.
pub(super) const SMALL: usize = 64;
pub(super) const SMALL_BYTES: usize = 256 << 10;
/// The number of places for larger copies, which grow as needed, and the most bytes of one: larger
/// copies are left to the driver, which waits.
pub(super) const LARGE: usize = 2;
pub(super) const MOST_BYTES: usize = 64 << 20;

/// All places.
pub(super) const PLACES: usize = SMALL + LARGE;

/// The place whose turn comes next, of each kind.
#[derive(Default)]
pub(super) struct Turns {
    small: usize,
    large: usize,
}

impl Turns {
    /// The place that a copy of `bytes` bytes starts from; none if it is too large for one.
    pub(super) fn next(&mut self, bytes: usize) -> Option<usize> {
        let (turn, first, count) = if bytes <= SMALL_BYTES {
            (&mut self.small, 0, SMALL)
        } else if bytes <= MOST_BYTES {
            (&mut self.large, SMALL, LARGE)
        } else {
            return None;
        };
        let place = first + *turn;
        *turn = (*turn + 1) % count;
        Some(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_take_places_by_turns() {
        let mut turns = Turns::default();
        let small: Vec<_> = (0..=SMALL).map(|i| turns.next(1 + i).unwrap()).collect();
        assert_eq!(small, (0..SMALL).chain([0]).collect::<Vec<_>>());
        assert_eq!(turns.next(SMALL_BYTES), Some(1));
        let large = [SMALL_BYTES + 1, MOST_BYTES, 1 << 20].map(|bytes| turns.next(bytes).unwrap());
        assert_eq!(large, [SMALL, PLACES - 1, SMALL]);
        assert_eq!(turns.next(MOST_BYTES + 1), None);
        assert_eq!(turns.next(0), Some(2));
    }
}
