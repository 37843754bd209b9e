//! The plan of a recording's memory: what a first run allocates and frees, in which branch, and a
//! place for each allocation.

use std::collections::HashMap;

/// Planned addresses are multiples of this.
const ALIGN: usize = 256;

/// A branch: the number of its fork, and which of the two branches it is.
type Branch = (usize, Line);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Line {
    Main,
    Beside,
}

/// An allocation's size, and its lifetime in events: from its allocation to the event that freed
/// it, or for ever.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct LiveRange {
    pub(super) bytes: usize,
    from: usize,
    to: usize,
    /// The branch in which it was allocated.
    branch: Option<Branch>,
}

impl LiveRange {
    /// Whether both may be in use at the same time. Of two branches, either may be ahead.
    fn meets(&self, other: &LiveRange) -> bool {
        let beside = match (self.branch, other.branch) {
            (Some((fork, line)), Some((other, across))) => fork == other && line != across,
            _ => false,
        };
        beside || self.from < other.to && other.from < self.to
    }
}

/// The branches of the work that is traced.
#[derive(Default)]
struct Branches {
    forks: usize,
    at: Option<Branch>,
    /// Allocations that were freed in a branch in which they were not made: the other branch may
    /// still use them, so they live until the join.
    until_join: Vec<usize>,
}

/// What a first run tells about memory.
#[derive(Default)]
pub(super) struct Trace {
    pub(super) lives: Vec<LiveRange>,
    /// The lifetimes, by address, of allocations that have not been freed yet.
    pub(super) live: HashMap<u64, usize>,
    events: usize,
    branches: Branches,
}

impl Trace {
    pub(super) fn allocated(&mut self, address: u64, bytes: usize) {
        self.live.insert(address, self.lives.len());
        let branch = self.branches.at;
        self.lives.push(LiveRange { bytes, from: self.events, to: usize::MAX, branch });
        self.events += 1;
    }

    pub(super) fn freed(&mut self, address: u64) {
        let Some(index) = self.live.remove(&address) else { return };
        self.lives[index].to = self.events;
        self.events += 1;
        if self.branches.at.is_some() && self.branches.at != self.lives[index].branch {
            self.branches.until_join.push(index);
        }
    }

    /// Continues in a branch beside the main line; false if it is in one already.
    pub(super) fn fork(&mut self) -> bool {
        let free = self.branches.at.is_none();
        if free {
            self.branches.forks += 1;
            self.branches.at = Some((self.branches.forks, Line::Beside));
        }
        free
    }

    pub(super) fn back(&mut self) {
        self.branches.at = self.branches.at.map(|(fork, _)| (fork, Line::Main));
    }

    pub(super) fn join(&mut self) {
        self.branches.at = None;
        for index in std::mem::take(&mut self.branches.until_join) {
            self.lives[index].to = self.events;
        }
        self.events += 1;
    }
}

/// Places for allocations, the largest first, each as low as those that may be in use at the same
/// time allow; and the end of the highest.
pub(super) fn plan(lives: &[LiveRange]) -> (Vec<(usize, usize)>, usize) {
    let mut order: Vec<usize> = (0..lives.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(lives[i].bytes));
    let mut places = vec![(0, 0); lives.len()];
    let mut placed: Vec<usize> = vec![];
    let mut total = 0;
    for i in order {
        let life = lives[i];
        let mut taken: Vec<(usize, usize)> = placed
            .iter()
            .filter(|&&j| lives[j].meets(&life))
            .map(|&j| (places[j].0, places[j].0 + lives[j].bytes.max(1)))
            .collect();
        taken.sort_unstable();
        let mut at = 0usize;
        for (from, to) in taken {
            if at + life.bytes.max(1) <= from {
                break;
            }
            at = at.max(to.next_multiple_of(ALIGN));
        }
        places[i] = (at, life.bytes);
        placed.push(i);
        total = total.max(at + life.bytes.max(1));
    }
    (places, total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_that_meet_lie_apart() {
        let life = |bytes, from, to| LiveRange { bytes, from, to, branch: None };
        let lives = [life(100, 0, 2), life(300, 1, 4), life(100, 3, usize::MAX), life(0, 5, 6)];
        let (places, total) = plan(&lives);
        assert_eq!(places, [(512, 100), (0, 300), (512, 100), (0, 0)]);
        assert_eq!(total, 612);
    }

    #[test]
    fn branches_lie_apart_from_fork_to_join() {
        let mut trace = Trace::default();
        let mut address = 0;
        let mut take = |trace: &mut Trace| {
            address += 1;
            trace.allocated(address, 256);
            address
        };
        let (before, shared) = (take(&mut trace), take(&mut trace));
        trace.freed(before);
        assert!(trace.fork() && !trace.fork(), "a branch branches");
        let side = take(&mut trace);
        trace.freed(side);
        // Its own branch may use the place again.
        let next = take(&mut trace);
        trace.back();
        // The other branch may still read it.
        trace.freed(shared);
        let main = take(&mut trace);
        trace.freed(main);
        trace.join();
        trace.freed(next);
        take(&mut trace);
        let offsets: Vec<usize> = plan(&trace.lives).0.iter().map(|place| place.0).collect();
        let [before, shared, side, next, main, after] = offsets[..] else { panic!("six lives") };
        assert_eq!((before, shared, side, next), (0, 256, 0, 0));
        assert!(![shared, side, next].contains(&main), "{offsets:?}");
        assert_eq!(after, 0);
    }
}
