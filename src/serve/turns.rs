//! Turns at the network. One computation uses it at a time, with all threads or the GPU; between
//! two ops it yields to one with higher priority, a click to none. Clicks whose patch is encoded go
//! before encodings, and requested encodings before those ahead of a request; with equal priority,
//! the earliest goes first. A computation that has encoded a patch and needs another counts as new
//! with it: so one of its patches goes before another computation's, and not all that an
//! interaction looks at. The first encoding continues as soon as no click waits, and one op of it
//! runs after every few clicks that went before it. Computations that came later take no working
//! memory until it is done: only a few have any at a time, however many wait.
//!
//! A computation that yields waits on its own thread, within [`Observer::paced`]. It keeps its
//! working memory, and the session that it works on, of which `work.rs` runs one job at a time; the
//! thread pool, the device and the encodings are free. One that has too little memory beside it
//! continues alone ([`Turn::alone`]). On a GPU all of an encoding is one op: nothing waits while
//! launches are recorded or replayed.

use crate::model::{Observer, Part};
use crate::session::{Ahead, SessionError};
use crate::sync::{locked, wait};
use crate::tensor::OpError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// How many clicks in a row go before encodings that came earlier; then one op of an encoding runs.
const MOST_OVERTAKEN: u32 = 2;

/// The purposes of a turn, from the highest priority to the lowest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Right {
    Click,
    Encoding,
    /// An encoding that has not been requested yet.
    Ahead,
}

/// A computation that has a turn, or may want one.
struct Place {
    /// The order of arrival.
    number: u64,
    /// The position in that order of the patch that it encodes or encoded last.
    encoding: u64,
    right: Right,
    waits: bool,
    /// Whether it has had a turn, and may hold working memory since.
    begun: bool,
    /// Whether it wants its turn while no other computation has begun.
    alone: bool,
}

#[derive(Default)]
struct Queue {
    places: Vec<Place>,
    /// The number of the one that has the turn.
    running: Option<u64>,
    next: u64,
    overtaken: u64,
    /// Clicks since the last op of an encoding that went before one that came earlier.
    in_a_row: u32,
    /// Whether nothing is encoded ahead any more.
    closed: bool,
}

impl Queue {
    fn place(&mut self, number: u64) -> &mut Place {
        let place = self.places.iter_mut().find(|place| place.number == number);
        place.expect("a place is there as long as its turn")
    }

    /// Whether others than this one have begun.
    fn others_begun(&self, number: u64) -> bool {
        self.places.iter().any(|place| place.begun && place.number != number)
    }

    /// The next number in the order of arrival.
    fn numbered(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    /// Makes a place wait for its turn with a priority.
    fn claim(&mut self, number: u64, right: Right) {
        // Between two patches that are encoded there is an answer.
        if right != Right::Click && self.place(number).right == Right::Click {
            let encoding = self.numbered();
            self.place(number).encoding = encoding;
        }
        self.place(number).right = right;
    }

    /// The priority with which a place has its turn now, and the order of arrival of its present
    /// request.
    fn rank(&self, place: &Place) -> (Right, u64) {
        match place.right {
            Right::Click => (Right::Click, place.number),
            Right::Encoding if self.in_a_row >= MOST_OVERTAKEN => (Right::Click, place.encoding),
            right => (right, place.encoding),
        }
    }

    /// The waiting one that goes next.
    fn first(&self) -> Option<&Place> {
        let is_short = self.places.iter().any(|place| place.waits && place.alone);
        let may = |place: &&Place| match place.alone {
            true => !self.others_begun(place.number),
            // None begins while one waits for those that have to finish.
            false => place.begun || !is_short,
        };
        let waiting = self.places.iter().filter(|place| place.waits);
        waiting.filter(may).min_by_key(|place| self.rank(place))
    }

    /// Whether encoding ahead is in another computation's way, or the server ends.
    fn sends_away(&self) -> bool {
        let needs = |place: &Place| place.right == Right::Encoding || place.alone;
        self.closed || self.places.iter().any(needs)
    }

    fn give(&mut self, number: u64) {
        self.running = Some(number);
        let place = self.place(number);
        (place.waits, place.begun) = (false, true);
        if place.right != Right::Click {
            self.in_a_row = 0;
            return;
        }
        let is_passed = |p: &&Place| p.waits && p.right == Right::Encoding && p.encoding < number;
        let passed = self.places.iter().filter(is_passed).count();
        self.in_a_row += u32::from(passed > 0);
        self.overtaken += passed as u64;
    }
}

/// The numbers of those that wait, without encodings ahead of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// For their first turn.
    pub waiting: usize,
    /// Between two ops.
    pub paused: usize,
    /// The number of times that an encoding was overtaken by a click that came later.
    pub overtaken: u64,
}

/// The computations that use the network, or want to.
#[derive(Default)]
pub struct Turns {
    queue: Mutex<Queue>,
    news: Condvar,
}

impl Turns {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        locked(&self.queue)
    }

    /// A place, without a turn yet. `left` says when the work is no longer waited for.
    pub fn enter(self: &Arc<Turns>, left: &Arc<AtomicBool>) -> Turn {
        let mut queue = self.queue();
        let number = queue.numbered();
        queue.places.push(Place {
            number,
            encoding: number,
            right: Right::Click,
            waits: false,
            begun: false,
            alone: false,
        });
        drop(queue);
        Turn { turns: self.clone(), left: left.clone(), number }
    }

    /// Encodes ahead, with the lowest priority of all. If a requested encoding comes, it is given
    /// up: then returns true, if it is still useful.
    pub fn ahead(self: &Arc<Turns>, wish: &Ahead) -> bool {
        let turn = self.enter(&Arc::default());
        let mut pace = |_: Part<'_>| {
            turn.wants(&|| match wish.is_awaited() {
                true => Some(Right::Encoding),
                false => wish.serves().then_some(Right::Ahead),
            })
        };
        // If it fails otherwise, the session that looks there encodes it.
        let done = wish.encode(&mut Observer::paced(&mut pace));
        matches!(done, Err(SessionError::Op(OpError::Cancelled))) && wish.serves()
    }

    /// Makes those that wait check whether their work is still waited for.
    pub fn stir(&self) {
        drop(self.queue());
        self.news.notify_all();
    }

    /// Ends encoding ahead.
    pub fn close(&self) {
        self.queue().closed = true;
        self.news.notify_all();
    }

    pub fn counts(&self) -> Counts {
        let queue = self.queue();
        let count = |begun: bool| {
            let those =
                |place: &&Place| place.waits && place.begun == begun && place.right != Right::Ahead;
            queue.places.iter().filter(those).count()
        };
        Counts { waiting: count(false), paused: count(true), overtaken: queue.overtaken }
    }
}

/// A place among those that take turns at the network. When dropped, also by a panic, it is free.
pub struct Turn {
    turns: Arc<Turns>,
    left: Arc<AtomicBool>,
    number: u64,
}

impl Turn {
    /// Whether the work is no longer waited for.
    pub fn left(&self) -> bool {
        self.left.load(Ordering::Relaxed)
    }

    /// Waits for the first turn; false if the work is no longer waited for.
    pub fn begin(&self) -> bool {
        self.goes_on(Part::Answering)
    }

    /// Has the turn for what is done next: keeps it, or yields and waits for it; false if the work
    /// is no longer waited for, and as [`Turn::alone`] says.
    pub fn goes_on(&self, part: Part<'_>) -> bool {
        match part {
            Part::Answering => self.wants(&|| Some(Right::Click)),
            Part::Encoding => self.wants(&|| Some(Right::Encoding)),
            Part::Elsewhere(is_over) => {
                let mut queue = self.turns.queue();
                self.rest(&mut queue);
                while !is_over() && !self.left() {
                    queue = self.wait(queue);
                }
                drop(queue);
                self.wants(&|| Some(Right::Click))
            }
            Part::Alone => self.alone(),
        }
    }

    /// If others hold memory, waits for a turn while none of them does: what was refused may then
    /// be available. False if that would change nothing, or if the work is no longer waited for.
    pub fn alone(&self) -> bool {
        let mut queue = self.turns.queue();
        if !queue.others_begun(self.number) {
            // Those that wait to be alone held some until then.
            return queue.places.iter().any(|place| place.alone && place.number != self.number);
        }
        self.rest(&mut queue);
        let place = queue.place(self.number);
        (place.begun, place.alone, place.waits) = (false, true, true);
        drop(queue);
        self.wants(&|| Some(Right::Click))
    }

    /// Gives the turn up until the next op, unless no other computation may begin meanwhile.
    pub fn rests(&self) {
        let mut queue = self.turns.queue();
        if !queue.place(self.number).alone {
            self.rest(&mut queue);
        }
    }

    /// Waits for the turn with a priority, which may change while it waits; false, and without a
    /// turn, if there is no priority any more.
    fn wants(&self, right: &dyn Fn() -> Option<Right>) -> bool {
        let mut queue = self.turns.queue();
        loop {
            let is_off = |right: &Right| *right == Right::Ahead && queue.sends_away();
            let Some(right) = right().filter(|right| !self.left() && !is_off(right)) else {
                self.rest(&mut queue);
                return false;
            };
            queue.claim(self.number, right);
            if queue.running == Some(self.number) {
                // One that becomes an encoding goes behind those that came earlier; a click
                // continues.
                let mine = (right, queue.place(self.number).encoding);
                let goes_behind = |other: &Place| mine < queue.rank(other);
                if right == Right::Click || queue.first().is_none_or(goes_behind) {
                    return true;
                }
                queue.running = None;
                self.turns.news.notify_all();
            }
            queue.place(self.number).waits = true;
            let is_next = queue.first().is_some_and(|first| first.number == self.number);
            if queue.running.is_none() && is_next {
                queue.give(self.number);
                return true;
            }
            queue = self.wait(queue);
        }
    }

    /// Gives up its wish for a turn for now.
    fn rest(&self, queue: &mut Queue) {
        let place = queue.place(self.number);
        (place.right, place.waits) = (Right::Click, false);
        if queue.running == Some(self.number) {
            queue.running = None;
        }
        self.turns.news.notify_all();
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        wait(&self.turns.news, queue)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut queue = self.turns.queue();
        self.rest(&mut queue);
        queue.places.retain(|place| place.number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::super::failure::in_turns;
    use super::*;
    use std::panic::resume_unwind;
    use std::sync::mpsc::channel;
    use std::thread::{Scope, scope, yield_now};

    /// A place, and the flag that its work is no longer waited for.
    fn enter(turns: &Arc<Turns>) -> (Turn, Arc<AtomicBool>) {
        let left = Arc::default();
        (turns.enter(&left), left)
    }

    /// Returns when this many wait.
    fn until_wait(turns: &Turns, count: usize) {
        let waiting = || turns.queue().places.iter().filter(|place| place.waits).count();
        while waiting() != count {
            yield_now();
        }
    }

    /// A click that has its turn, for which an encoding gave way between two ops. The encoding
    /// waits on a thread of its own, and does the rest there.
    fn giving_way<'s>(
        s: &'s Scope<'s, '_>,
        turns: &Arc<Turns>,
        rest: impl FnOnce(&Turn) + Send + 's,
    ) -> Turn {
        let (encoding, _) = enter(turns);
        assert!(encoding.goes_on(Part::Encoding));
        let (click, _) = enter(turns);
        let click = s.spawn(move || {
            assert!(click.begin());
            click
        });
        until_wait(turns, 1);
        s.spawn(move || {
            assert!(encoding.goes_on(Part::Encoding));
            rest(&encoding);
        });
        click.join().unwrap()
    }

    /// What was done, in order.
    #[derive(Default)]
    struct Log(Mutex<Vec<&'static str>>);

    impl Log {
        fn note(&self, what: &'static str) {
            self.0.lock().unwrap().push(what);
        }

        fn all(&self) -> String {
            self.0.lock().unwrap().join(" ")
        }
    }

    #[test]
    fn clicks_go_before_encodings_and_both_in_order() {
        let (turns, log) = (Arc::<Turns>::default(), Log::default());
        let (first, _) = enter(&turns);
        assert!(first.begin());
        let wanted = [
            ("encoding-1", Right::Encoding),
            ("click-1", Right::Click),
            ("encoding-2", Right::Encoding),
            ("click-2", Right::Click),
        ];
        scope(|s| {
            for (count, (name, right)) in (1..).zip(wanted) {
                let (turn, _) = enter(&turns);
                let log = &log;
                s.spawn(move || {
                    assert!(turn.wants(&|| Some(right)));
                    log.note(name);
                });
                until_wait(&turns, count);
            }
            assert_eq!(turns.counts(), Counts { waiting: 4, paused: 0, overtaken: 0 });
            drop(first);
        });
        assert_eq!(log.all(), "click-1 click-2 encoding-1 encoding-2");
        assert!(turns.queue().places.is_empty() && turns.queue().running.is_none());
    }

    /// An encoding of some ops, during whose first op this many clicks come.
    fn encoding_beside_clicks(ops: usize, clicks: usize) -> (String, Counts) {
        let (turns, log) = (Arc::<Turns>::default(), Log::default());
        let (begun, begins) = channel();
        let (go, goes) = channel();
        scope(|s| {
            let (encoding, _) = enter(&turns);
            let log = &log;
            s.spawn(move || {
                for op in 0..ops {
                    assert!(encoding.goes_on(Part::Encoding));
                    if op == 0 {
                        begun.send(()).unwrap();
                        goes.recv().unwrap();
                    }
                    log.note("op");
                }
            });
            begins.recv().unwrap();
            for count in 1..=clicks {
                let (click, _) = enter(&turns);
                s.spawn(move || {
                    assert!(click.begin());
                    log.note("click");
                });
                until_wait(&turns, count);
            }
            go.send(()).unwrap();
        });
        (log.all(), turns.counts())
    }

    #[test]
    fn an_encoding_gives_way_between_two_ops() {
        let (log, counts) = encoding_beside_clicks(3, 2);
        assert_eq!(log, "op click click op op");
        assert_eq!(counts, Counts { waiting: 0, paused: 0, overtaken: 2 });
    }

    #[test]
    fn an_encoding_goes_on_however_many_click() {
        let (log, _) = encoding_beside_clicks(5, 2 * MOST_OVERTAKEN as usize + 1);
        let few = vec!["click"; MOST_OVERTAKEN as usize].join(" ");
        assert_eq!(log, format!("op {few} op {few} op click op op"));
    }

    #[test]
    fn who_comes_to_an_encoding_goes_behind_those_that_came_earlier() {
        let (turns, log) = (Arc::<Turns>::default(), Log::default());
        let log = &log;
        let (earlier, _) = enter(&turns);
        let (later, _) = enter(&turns);
        assert!(later.begin());
        scope(|s| {
            s.spawn(move || {
                assert!(earlier.goes_on(Part::Encoding));
                log.note("earlier");
            });
            until_wait(&turns, 1);
            assert!(later.goes_on(Part::Encoding));
            log.note("later");
            drop(later);
        });
        assert_eq!(log.all(), "earlier later");
    }

    #[test]
    fn one_encoding_of_each_goes_before_the_next_of_another() {
        let (turns, log) = (Arc::<Turns>::default(), Log::default());
        let log = &log;
        let (begun, begins) = channel();
        let (go, goes) = channel();
        let (first, _) = enter(&turns);
        let (second, _) = enter(&turns);
        // A number of patches, each encoded in two ops and then looked at; while the first of all
        // is encoded another computation comes.
        let looks = |turn: &Turn, name: &'static str, patches: usize, during: &dyn Fn()| {
            for patch in 0..patches {
                for op in 0..2 {
                    assert!(turn.goes_on(Part::Encoding));
                    if (patch, op) == (0, 0) {
                        during();
                    }
                    log.note(name);
                }
                assert!(turn.goes_on(Part::Answering));
            }
        };
        scope(|s| {
            s.spawn(move || {
                let comes = || {
                    begun.send(()).unwrap();
                    goes.recv().unwrap();
                };
                looks(&first, "a", 3, &comes);
            });
            begins.recv().unwrap();
            s.spawn(move || looks(&second, "b", 2, &|| {}));
            until_wait(&turns, 1);
            go.send(()).unwrap();
        });
        assert_eq!(log.all(), "a a b b a a b b a a");
    }

    #[test]
    fn of_several_encodings_one_goes_on_beside_clicks() {
        let mut queue = Queue::default();
        let all = [(0, Right::Encoding), (1, Right::Encoding), (2, Right::Click)];
        for (number, right) in all {
            let encoding = number;
            queue.places.push(Place {
                number,
                encoding,
                right,
                waits: true,
                begun: false,
                alone: false,
            });
        }
        // There is always another click.
        let mut given = vec![];
        for _ in 0..2 * MOST_OVERTAKEN + 3 {
            let number = queue.first().unwrap().number;
            queue.give(number);
            queue.place(number).waits = true;
            given.push(number);
        }
        let few = vec![2; MOST_OVERTAKEN as usize];
        assert_eq!(given, [&few[..], &[0], &few[..], &[0], &[2]].concat());
        // The other one holds no memory yet.
        assert!(!queue.place(1).begun);
        queue.place(0).waits = false;
        queue.place(2).waits = false;
        assert_eq!(queue.first().map(|place| place.number), Some(1));
    }

    #[test]
    fn who_leaves_waits_no_longer() {
        let turns = Arc::<Turns>::default();
        let (paused, paused_left) = enter(&turns);
        assert!(paused.goes_on(Part::Encoding));
        scope(|s| {
            let (click, click_left) = enter(&turns);
            let (other, other_left) = enter(&turns);
            let click = s.spawn(move || {
                assert!(click.begin());
                click
            });
            until_wait(&turns, 1);
            let paused = s.spawn(move || paused.goes_on(Part::Encoding));
            let click = click.join().unwrap();
            let other = s.spawn(move || other.begin());
            until_wait(&turns, 2);
            assert_eq!(turns.counts(), Counts { waiting: 1, paused: 1, overtaken: 1 });
            // They end while another has the turn.
            for left in [paused_left, other_left] {
                left.store(true, Ordering::Relaxed);
                turns.stir();
            }
            assert!(!paused.join().unwrap() && !other.join().unwrap());
            // So does the one that has it, and others can go on.
            click_left.store(true, Ordering::Relaxed);
            assert!(!click.goes_on(Part::Answering));
            assert!(enter(&turns).0.begin());
        });
        assert!(turns.queue().places.is_empty());
    }

    #[test]
    fn a_panic_frees_the_turn() {
        let turns = Arc::<Turns>::default();
        let (breaks, _) = enter(&turns);
        assert!(breaks.begin());
        scope(|s| {
            let (waits, _) = enter(&turns);
            let waits = s.spawn(move || waits.begin());
            until_wait(&turns, 1);
            let broken = s.spawn(move || {
                let _breaks = breaks;
                resume_unwind(Box::new("a test"));
            });
            assert!(broken.join().is_err() && waits.join().unwrap());
        });
    }

    #[test]
    fn what_is_encoded_ahead_goes_last_or_not_at_all() {
        let turns = Arc::<Turns>::default();
        let ahead = |turn: &Turn| turn.wants(&|| Some(Right::Ahead));
        let (nobodys, _) = enter(&turns);
        assert!(ahead(&nobodys));
        let (click, _) = enter(&turns);
        scope(|s| {
            let there = turns.clone();
            s.spawn(move || {
                assert!(click.begin());
                // It is waited for by one that is not counted.
                until_wait(&there, 1);
                assert_eq!(there.counts(), Counts { waiting: 0, paused: 0, overtaken: 0 });
                drop(click);
            });
            until_wait(&turns, 1);
            assert!(ahead(&nobodys));
        });
        let (encoding, _) = enter(&turns);
        scope(|s| {
            let encodes = s.spawn(|| encoding.goes_on(Part::Encoding));
            until_wait(&turns, 1);
            assert!(!ahead(&nobodys));
            assert!(encodes.join().unwrap());
        });
        drop(encoding);
        assert!(ahead(&nobodys));
        turns.close();
        assert!(!ahead(&nobodys) && enter(&turns).0.begin());
    }

    #[test]
    fn what_a_click_waits_for_has_its_right() {
        let (turns, log) = (Arc::<Turns>::default(), Log::default());
        let (is_awaited, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
        let (is_awaited, is_over, log) = (&is_awaited, &is_over, &log);
        let (ahead, _) = enter(&turns);
        let (click, _) = enter(&turns);
        let (other, _) = enter(&turns);
        assert!(click.begin());
        scope(|s| {
            s.spawn(move || {
                let right = || match is_awaited.load(Ordering::Relaxed) {
                    true => Some(Right::Encoding),
                    false => Some(Right::Ahead),
                };
                assert!(ahead.wants(&right));
                log.note("ahead");
                is_over.store(true, Ordering::Relaxed);
            });
            until_wait(&turns, 1);
            is_awaited.store(true, Ordering::Relaxed);
            turns.stir();
            while turns.counts().waiting != 1 {
                yield_now();
            }
            s.spawn(move || {
                assert!(other.goes_on(Part::Encoding));
                log.note("other");
            });
            until_wait(&turns, 2);
            assert!(click.goes_on(Part::Elsewhere(&|| is_over.load(Ordering::Relaxed))));
            log.note("click");
            drop(click);
        });
        // The other may run an op before the click is back.
        assert!(log.all().starts_with("ahead "), "{}", log.all());
    }

    #[test]
    fn who_has_too_little_memory_goes_on_alone() {
        let (turns, log) = (Arc::<Turns>::default(), Log::default());
        let log = &log;
        scope(|s| {
            let click = giving_way(s, &turns, move |_| log.note("encoding"));
            let (later, _) = enter(&turns);
            s.spawn(move || {
                assert!(later.begin());
                log.note("later");
            });
            until_wait(&turns, 2);
            assert!(click.alone());
            log.note("click");
            // No other holds anything any more.
            assert!(!click.alone());
            drop(click);
        });
        assert_eq!(log.all(), "encoding click later");
    }

    #[test]
    fn the_network_is_free_while_an_answer_is_made() {
        let turns = Arc::<Turns>::default();
        let (turn, _) = enter(&turns);
        let runs = || turns.queue().running == Some(turn.number);
        assert!(turn.begin() && runs());
        let is_run = in_turns(&turn, |_| Ok(runs()));
        assert_eq!(is_run, Ok(true));
        assert!(!runs());
        // Others would take the memory that one alone had too little of.
        turns.queue().place(turn.number).alone = true;
        assert!(turn.begin() && runs());
        assert_eq!(in_turns(&turn, |_| Ok(())), Ok(()));
        assert!(runs());
    }

    #[test]
    fn of_two_with_too_little_memory_one_goes_on_at_once() {
        let (turns, log) = (Arc::<Turns>::default(), Log::default());
        let log = &log;
        scope(|s| {
            let click = giving_way(s, &turns, move |encoding| {
                // What the click held is there now.
                assert!(encoding.goes_on(Part::Alone));
                log.note("encoding");
            });
            until_wait(&turns, 1);
            assert!(click.goes_on(Part::Alone));
            log.note("click");
            drop(click);
        });
        assert_eq!(log.all(), "encoding click");
    }
}
