//! Work recorded once and repeated: what a session does at every click, with its memory planned.
//!
//! A recording runs a function twice without computing anything: first to see which memory it takes and gives back, in order, then, with every allocation at
//! its planned place in an [`Arena`], to record its launches and copies as one graph. What the function lays out for good (weights, [`PerDevice`](super::PerDevice))
//! is made in the first run, outside the plan. The function must take the same memory in the same order every time, and cannot read results.

use super::{Cuda, CudaError, Launch, Memory, Seen};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// Planned addresses are multiples of this.
const ALIGN: usize = 256;

/// Memory that recordings share; one at a time uses it.
#[derive(Default)]
pub struct Arena(Option<Arc<Memory>>);

impl Arena {
    /// Its size.
    pub fn bytes(&self) -> usize {
        self.0.as_ref().map_or(0, |m| m.bytes())
    }
}

/// Recorded work. Holds its arena's memory.
pub struct Graph {
    cuda: Cuda,
    id: u64,
    _arena: Option<Arc<Memory>>,
}

impl Graph {
    /// Does it all again.
    pub fn replay(&self) -> Result<(), CudaError> {
        let _turn = self.cuda.turn();
        self.cuda.0.launcher.replay(self.id)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.cuda.0.launcher.forget(self.id);
    }
}

/// An allocation's size, and its life in events: from its own to that which gave it back, or for ever.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Life {
    bytes: usize,
    from: usize,
    to: usize,
}

/// What a thread's recording is at.
enum Stage {
    /// Allocations are noted; nothing runs.
    Watching { lives: Vec<Life>, live: HashMap<u64, usize>, events: usize },
    /// Nothing runs, and whatever is read is zero.
    Counting,
    /// Allocations are served from the plan; work is recorded.
    Placing { arena: Option<Arc<Memory>>, places: Vec<(usize, usize)>, next: usize, given_back: Vec<u64> },
}

thread_local! {
    /// The launches that are to be remembered, and whether they are timed.
    static SEEN: RefCell<Option<(Vec<Seen>, bool)>> = const { RefCell::new(None) };
    static STAGE: RefCell<Option<Stage>> = const { RefCell::new(None) };
    /// Whether this thread has its turn.
    static HAS_TURN: Cell<bool> = const { Cell::new(false) };
}

/// A thread's turn with a device. A thread that has its turn need not wait for it again.
pub(super) struct Turn<'a>(Option<MutexGuard<'a, ()>>);

impl<'a> Turn<'a> {
    pub(super) fn take(turn: &'a Mutex<()>) -> Turn<'a> {
        Turn((!HAS_TURN.replace(true)).then(|| turn.lock().unwrap_or_else(|e| e.into_inner())))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.0.is_some() {
            HAS_TURN.set(false);
        }
    }
}

/// Remembers a launch where that is wanted; whether it is to be timed.
pub(super) fn see(kernel: &str, launch: Launch) -> bool {
    SEEN.with_borrow_mut(|seen| match seen {
        Some((list, timed)) => {
            list.push(Seen { kernel: kernel.into(), launch, seconds: None });
            *timed && kernel != "copy"
        }
        None => false,
    })
}

/// Notes how long the last launch took.
pub(super) fn took(seconds: f64) {
    SEEN.with_borrow_mut(|seen| {
        if let Some(last) = seen.as_mut().and_then(|(list, _)| list.last_mut()) {
            last.seconds = Some(seconds);
        }
    });
}

/// Whether this thread is recording.
pub(super) fn is_recording() -> bool {
    STAGE.with_borrow(Option::is_some)
}

/// Whether this thread's work is to be left out.
pub(super) fn is_watching() -> bool {
    STAGE.with_borrow(|s| matches!(s, Some(Stage::Watching { .. } | Stage::Counting)))
}

/// Whether copies from and to the host are to be left out too.
pub(super) fn is_counting() -> bool {
    STAGE.with_borrow(|s| matches!(s, Some(Stage::Counting)))
}

/// Runs `f` as if nothing were recorded: for what is to stay.
pub(super) fn aside<R>(f: impl FnOnce() -> R) -> R {
    let stage = STAGE.with_borrow_mut(Option::take);
    let result = f();
    STAGE.with_borrow_mut(|s| *s = stage);
    result
}

/// An address, and the memory that it is part of.
pub(super) type Place = (u64, Option<Arc<Memory>>);

/// The planned place of an allocation; none where there is no plan yet.
pub(super) fn place(bytes: usize) -> Option<Result<Place, CudaError>> {
    STAGE.with_borrow_mut(|stage| match stage {
        Some(Stage::Placing { arena, places, next, .. }) => {
            let planned = places.get(*next).filter(|(_, size)| *size == bytes);
            *next += 1;
            Some(match planned {
                Some((offset, _)) => Ok((arena.as_ref().map_or(0, |a| a.address) + *offset as u64, arena.clone())),
                None => Err(CudaError::Launch(format!("recorded work asked for {bytes} bytes that were not planned"))),
            })
        }
        _ => None,
    })
}

/// Notes an allocation.
pub(super) fn allocated(address: u64, bytes: usize) {
    STAGE.with_borrow_mut(|stage| {
        if let Some(Stage::Watching { lives, live, events }) = stage {
            live.insert(address, lives.len());
            lives.push(Life { bytes, from: *events, to: usize::MAX });
            *events += 1;
        }
    });
}

/// Notes that memory was given back; whether it may be freed now.
pub(super) fn freed(address: u64) -> bool {
    STAGE.with_borrow_mut(|stage| match stage {
        Some(Stage::Watching { lives, live, events }) => {
            if let Some(index) = live.remove(&address) {
                lives[index].to = *events;
                *events += 1;
            }
            true
        }
        Some(Stage::Placing { given_back, .. }) => {
            given_back.push(address);
            false
        }
        Some(Stage::Counting) | None => true,
    })
}

/// Places for lives, the largest first, each as low as those that live at the same time allow; and the end of the highest.
fn plan(lives: &[Life]) -> (Vec<(usize, usize)>, usize) {
    let mut order: Vec<usize> = (0..lives.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(lives[i].bytes));
    let mut places = vec![(0, 0); lives.len()];
    let mut placed: Vec<usize> = vec![];
    let mut total = 0;
    for i in order {
        let life = lives[i];
        let mut taken: Vec<(usize, usize)> = placed
            .iter()
            .filter(|&&j| lives[j].from < life.to && life.from < lives[j].to)
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

/// Ends a recording whichever way its function returns.
struct Ending;

impl Drop for Ending {
    fn drop(&mut self) {
        STAGE.with_borrow_mut(|s| *s = None);
        SEEN.with_borrow_mut(|s| *s = None);
    }
}

impl Cuda {
    /// The launches of `f`, and what it returned: timed one by one, or without anything being computed; then whatever it reads back is zero, and
    /// the memory that it returns holds nothing. What it lays out for good is made before.
    pub fn launches<R, E: From<CudaError>>(&self, timed: bool, f: impl Fn() -> Result<R, E>) -> Result<(Vec<Seen>, R), E> {
        let _turn = self.turn();
        let ending = Ending;
        STAGE.with_borrow_mut(|s| *s = Some(Stage::Counting));
        drop(f()?);
        STAGE.with_borrow_mut(|s| *s = (!timed).then_some(Stage::Counting));
        SEEN.with_borrow_mut(|s| *s = Some((vec![], timed)));
        let made = f()?;
        let seen = SEEN.with_borrow_mut(Option::take);
        drop(ending);
        Ok((seen.map(|(list, _)| list).unwrap_or_default(), made))
    }

    /// Records what `f` does, its memory in `arena`, which grows where it must: then recordings made before keep the old one. Returns the graph and what
    /// `f` returned: tensors whose values a replay gives.
    pub fn record<R, E: From<CudaError>>(&self, arena: &mut Arena, f: impl Fn() -> Result<R, E>) -> Result<(Graph, R), E> {
        let _turn = self.turn();
        let watch = Stage::Watching { lives: vec![], live: HashMap::new(), events: 0 };
        STAGE.with_borrow_mut(|s| *s = Some(watch));
        let ending = Ending;
        let kept = f()?;
        let lives = match STAGE.with_borrow_mut(Option::take) {
            Some(Stage::Watching { lives, .. }) => lives,
            _ => vec![],
        };
        drop(kept);
        let (places, total) = plan(&lives);
        if arena.bytes() < total {
            arena.0 = None;
            arena.0 = Some(self.allocate_bytes(total)?);
        }
        let memory = arena.0.clone();
        self.0.launcher.begin_recording()?;
        STAGE.with_borrow_mut(|s| *s = Some(Stage::Placing { arena: memory.clone(), places, next: 0, given_back: vec![] }));
        let made = f();
        let stage = STAGE.with_borrow_mut(Option::take);
        drop(ending);
        let id = self.0.launcher.end_recording();
        if let Some(Stage::Placing { given_back, .. }) = stage {
            given_back.into_iter().for_each(|address| self.0.launcher.free(address));
        }
        let made = made?;
        Ok((Graph { cuda: self.clone(), id: id?, _arena: memory }, made))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_that_meet_lie_apart() {
        let lives = [
            Life { bytes: 100, from: 0, to: 2 },
            Life { bytes: 300, from: 1, to: 4 },
            Life { bytes: 100, from: 3, to: usize::MAX },
            Life { bytes: 0, from: 5, to: 6 },
        ];
        let (places, total) = plan(&lives);
        assert_eq!(places, [(512, 100), (0, 300), (512, 100), (0, 0)]);
        assert_eq!(total, 612);
    }
}
