//! Which recorded launches may begin before the previous one has finished, and which branch
//! recorded work goes into.

use std::sync::atomic::{AtomicBool, Ordering};

/// The state of a recording. A launch directly after another may begin early; after copies and
/// clearings, and where branches begin, end and meet, a launch waits as usual.
pub(super) struct Chain {
    /// Whether the device and its driver can begin launches early.
    pub(super) overlaps: bool,
    records: AtomicBool,
    branched: AtomicBool,
    /// Whether the last thing recorded is a launch, in the same branch.
    behind_launch: AtomicBool,
}

/// The kind of work that comes next.
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

    /// What is recorded from here on goes into the branch, or into the main line, whether or not
    /// that waits for the branch.
    pub(super) fn go_to(&self, branch: bool) {
        self.branched.store(branch, Ordering::Relaxed);
        self.behind_launch.store(false, Ordering::Relaxed);
    }

    /// Whether the next work goes into the branch, and whether it may begin early.
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
