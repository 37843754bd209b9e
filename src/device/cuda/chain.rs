//! Which recorded launches may begin before what is in front of them is over, and which branch what
//! is recorded goes into.

use std::sync::atomic::{AtomicBool, Ordering};

/// What is recorded. Launches directly behind another may begin early; behind copies, clearings and
/// where branches begin, end and meet, a launch waits as ever.
pub(super) struct Chain {
    /// Whether the device and its driver do that.
    pub(super) overlaps: bool,
    records: AtomicBool,
    branched: AtomicBool,
    /// Whether what was recorded last is a launch, in the same branch.
    behind_launch: AtomicBool,
}

/// What comes next.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Next {
    Launch,
    /// A copy or a clearing.
    Other,
}

impl Chain {
    pub(super) fn new(overlaps: bool) -> Chain {
        let [records, branched, behind_launch] = [const { AtomicBool::new(false) }; 3];
        Chain { overlaps, records, branched, behind_launch }
    }

    /// A recording begins or ends.
    pub(super) fn record(&self, records: bool) {
        self.records.store(records, Ordering::Relaxed);
        self.go_to(false);
    }

    /// What is recorded from here on goes into the branch or into the main line, which waits for
    /// the branch or does not.
    pub(super) fn go_to(&self, branch: bool) {
        self.branched.store(branch, Ordering::Relaxed);
        self.behind_launch.store(false, Ordering::Relaxed);
    }

    /// Whether what comes next goes into the branch, and whether it may begin early.
    pub(super) fn next(&self, next: Next) -> (bool, bool) {
        let launch = next == Next::Launch;
        let behind_launch = self.behind_launch.swap(launch, Ordering::Relaxed);
        let early = self.overlaps && self.records.load(Ordering::Relaxed);
        (self.branched.load(Ordering::Relaxed), early && launch && behind_launch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_launch_behind_a_launch_begins_early() {
        let chain = Chain::new(true);
        let launches = |expected: [bool; 3]| {
            assert_eq!([(); 3].map(|()| chain.next(Next::Launch).1), expected);
        };
        // Nothing is recorded.
        launches([false; 3]);
        chain.record(true);
        launches([false, true, true]);
        assert_eq!(chain.next(Next::Other), (false, false));
        launches([false, true, true]);
        // A fork, the way back to the main line, and a join.
        for branch in [true, false, false] {
            chain.go_to(branch);
            assert_eq!(chain.next(Next::Launch), (branch, false));
            assert_eq!(chain.next(Next::Launch), (branch, true));
            assert_eq!(chain.next(Next::Other), (branch, false));
            launches([false, true, true]);
        }
        // A recording that ends in a branch, and another.
        chain.go_to(true);
        for records in [false, true, true, false] {
            chain.record(records);
            assert_eq!(chain.next(Next::Launch), (false, false));
            launches([records; 3]);
        }
        let chain = Chain::new(false);
        chain.record(true);
        assert_eq!([(); 3].map(|()| chain.next(Next::Launch)), [(false, false); 3]);
    }
}
