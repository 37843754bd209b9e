//! Profiles of the CPU's ops: what [`Cpu::profiled`](crate::device::Cpu::profiled) records.

use crate::sync::locked;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// One op as it ran: its sizes, its arithmetic, the bytes that it has to move, and its time.
#[derive(Clone, Debug)]
pub struct OpRecord {
    /// The name of the op, and of the algorithm if there are several.
    pub op: &'static str,
    /// The sizes of its inputs, as text.
    pub problem: String,
    /// Floating-point operations done, a multiply-add counting as two.
    pub flops: f64,
    /// Bytes of its inputs, weights and outputs, each counted once.
    pub bytes: f64,
    /// The wall-clock time of the op, without that of ops inside it.
    pub time: Duration,
}

/// An op's size.
pub(crate) struct OpCost {
    pub problem: String,
    pub flops: f64,
    /// Floats read or written.
    pub floats: usize,
}

/// The record of a device.
#[derive(Default)]
pub(crate) struct Profile {
    on: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    seen: Vec<OpRecord>,
    /// For each op under way, the time of ops inside it.
    inside: Vec<Duration>,
}

impl Profile {
    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// The ops that one thread runs in `f`. Ops that other threads run on the same device meanwhile
    /// are included too.
    pub fn of<T>(&self, f: impl FnOnce() -> T) -> (T, Vec<OpRecord>) {
        *self.state() = State::default();
        self.on.store(true, Ordering::SeqCst);
        let result = f();
        self.on.store(false, Ordering::SeqCst);
        (result, std::mem::take(&mut self.state().seen))
    }

    /// Records an op from now until the guard is dropped.
    pub fn op(&self, op: &'static str, work: impl FnOnce() -> OpCost) -> Option<Running<'_>> {
        if !self.on.load(Ordering::Relaxed) {
            return None;
        }
        let OpCost { problem, flops, floats } = work();
        self.state().inside.push(Duration::ZERO);
        let seen =
            OpRecord { op, problem, flops, bytes: 4.0 * floats as f64, time: Duration::ZERO };
        Some(Running { profile: self, start: Instant::now(), seen: Some(seen) })
    }
}

/// An op that is running.
pub(crate) struct Running<'a> {
    profile: &'a Profile,
    start: Instant,
    seen: Option<OpRecord>,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let whole = self.start.elapsed();
        let mut state = self.profile.state();
        let inside = state.inside.pop().unwrap_or_default();
        if let Some(outer) = state.inside.last_mut() {
            *outer += whole;
        }
        if let Some(mut seen) = self.seen.take() {
            seen.time = whole.saturating_sub(inside);
            state.seen.push(seen);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_of_inner_ops_is_theirs_alone() {
        let profile = Profile::default();
        let work = || OpCost { problem: String::new(), flops: 1.0, floats: 2 };
        assert!(profile.op("before", work).is_none());
        let start = Instant::now();
        let ((), seen) = profile.of(|| {
            let _outer = profile.op("outer", work);
            let _inner = profile.op("inner", work);
            std::thread::sleep(Duration::from_millis(20));
        });
        let whole = start.elapsed();
        assert_eq!(
            seen.iter().map(|s| (s.op, s.bytes)).collect::<Vec<_>>(),
            [("inner", 8.0), ("outer", 8.0)]
        );
        // No time is in both.
        let [inner, outer] = [seen[0].time, seen[1].time];
        assert!(inner >= Duration::from_millis(20) && inner + outer <= whole);
        assert!(profile.op("after", work).is_none());
    }
}
