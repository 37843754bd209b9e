//! Work that takes processors: predictions, uploads, files. Threads of its own do it, so
//! that small questions are answered at once meanwhile.
//!
//! Those who wait take turns by what they work on: one job of each at a time, in the order in which
//! they came. Of predictions, each of which takes all processors or the GPU, one runs at a time:
//! those that are under way have turns, between the network's ops (`turns.rs`). A job without a
//! caller that still waits is not begun, and is told to end where it has begun. While no request
//! waits, patches are encoded ahead, of one scan, lease or session after the other (`rounds.rs`).

use super::failure::Failure;
use super::rounds::Rounds;
use super::turns::{Counts, Turn, Turns};
use crate::session::Ahead;
use crate::sync::{locked, wait};
use crate::tensor::caught;
use axum::http::StatusCode;
use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use tokio::sync::oneshot;

/// Threads beside those for predictions: two for what takes a while, one for what is encoded ahead,
/// and one more, so that what is done in a moment waits for none of them.
const MORE_THREADS: usize = OTHERS + 2;
/// Predictions that are under way at a time, at most. More than there are sessions wait for each
/// other anyway.
const MOST_PREDICTIONS: usize = 64;
/// Uploads and files that are read or written at a time.
const OTHERS: usize = 2;
/// Jobs that wait at most, and of them on one thing.
const MOST_WAITING: usize = 512;
const MOST_OF_ONE: usize = 32;
/// Patches that wait to be encoded ahead, at most.
const MOST_AHEAD: usize = 64;

/// What a job works on: a lease or a scan.
pub type Key = u128;

/// How much a job takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The network is asked.
    Prediction,
    /// An upload is read, a file is written.
    Other,
    /// A step in a history, what is noted, whether files are as they were: done in a moment, on
    /// whatever thread is free.
    Short,
}

struct Job {
    kind: Kind,
    run: Box<dyn FnOnce() + Send>,
}

#[derive(Default)]
struct Queue {
    /// What has jobs waiting and none running, in the order of its turns.
    turns: VecDeque<Key>,
    waiting: HashMap<Key, VecDeque<Job>>,
    running: HashSet<Key>,
    /// Predictions that may be under way.
    most: usize,
    predictions: usize,
    others: usize,
    shorts: usize,
    /// What is to be encoded ahead.
    ahead: Rounds<Key, Ahead>,
    /// Whether that waits for the end of a job, in whose way it was.
    gives_way: bool,
    closed: bool,
}

impl Queue {
    fn len(&self) -> usize {
        self.waiting.values().map(VecDeque::len).sum()
    }

    fn push(&mut self, key: Key, job: Job) -> Result<(), Failure> {
        let all = self.len();
        let jobs = self.waiting.entry(key).or_default();
        if self.closed || all >= MOST_WAITING || jobs.len() >= MOST_OF_ONE {
            let many = jobs.len();
            if many == 0 {
                self.waiting.remove(&key);
            }
            return Err(Failure::full(format!(
                "{all} requests are already waiting, {many} of them for this scan or session"
            )));
        }
        jobs.push_back(job);
        if !self.running.contains(&key) && !self.turns.contains(&key) {
            self.turns.push_back(key);
        }
        Ok(())
    }

    /// The next job that may run.
    fn take(&mut self) -> Option<(Key, Job)> {
        // Uploads and files leave the thread free on which a click is answered.
        let free = |kind: Kind| match kind {
            Kind::Prediction => self.predictions < self.most,
            Kind::Other => self.others < OTHERS,
            Kind::Short => true,
        };
        let may = |key: &Key| {
            let first = self.waiting.get(key).and_then(VecDeque::front);
            first.is_some_and(|job| free(job.kind))
        };
        let at = self.turns.iter().position(may)?;
        let key = self.turns.remove(at)?;
        let job = self.waiting.get_mut(&key)?.pop_front()?;
        *self.running_of(job.kind) += 1;
        self.running.insert(key);
        Some((key, job))
    }

    /// What is to be encoded ahead, one at a time.
    fn take_ahead(&mut self) -> Option<(Key, Ahead)> {
        if self.gives_way { None } else { self.ahead.take() }
    }

    /// What was encoded ahead has come to its end, or was given up: then it is done again when a
    /// job has ended, whose way it was in.
    fn ahead_done(&mut self, given_up: Option<(Key, Ahead)>) {
        if let Some((key, wish)) = given_up
            && !self.closed
        {
            self.ahead.put_back(key, wish);
            self.gives_way = !self.running.is_empty();
        }
        self.ahead.over();
    }

    /// How many jobs of a kind run.
    fn running_of(&mut self, kind: Kind) -> &mut usize {
        match kind {
            Kind::Prediction => &mut self.predictions,
            Kind::Other => &mut self.others,
            Kind::Short => &mut self.shorts,
        }
    }

    fn done(&mut self, key: Key, kind: Kind) {
        *self.running_of(kind) -= 1;
        self.running.remove(&key);
        self.gives_way = false;
        if self.waiting.get(&key).is_none_or(VecDeque::is_empty) {
            self.waiting.remove(&key);
        } else {
            self.turns.push_back(key);
        }
    }
}

#[derive(Default)]
struct Desk {
    queue: Mutex<Queue>,
    news: Condvar,
    turns: Arc<Turns>,
}

impl Desk {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        locked(&self.queue)
    }

    /// Does jobs until there will be no more.
    fn serve(&self) {
        let mut queue = self.queue();
        loop {
            if let Some((key, job)) = queue.take() {
                drop(queue);
                // Whatever becomes of it, the thread goes on.
                drop(catch_unwind(AssertUnwindSafe(job.run)));
                queue = self.queue();
                queue.done(key, job.kind);
                self.news.notify_all();
            } else if let Some((key, wish)) = queue.take_ahead() {
                drop(queue);
                let given_up = catch_unwind(AssertUnwindSafe(|| self.turns.ahead(&wish)));
                queue = self.queue();
                queue.ahead_done(given_up.unwrap_or(false).then_some((key, wish)));
                // This thread may have a job first: another one does the next.
                self.news.notify_all();
            } else if queue.closed {
                return;
            } else {
                queue = wait(&self.news, queue);
            }
        }
    }
}

/// The threads that work.
pub struct Work {
    desk: Arc<Desk>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Tells a job that who waited for it has left.
struct Waits {
    left: Arc<AtomicBool>,
    turns: Arc<Turns>,
}

impl Drop for Waits {
    fn drop(&mut self) {
        self.left.store(true, Ordering::Relaxed);
        self.turns.stir();
    }
}

impl Work {
    /// Starts the threads for so many that are worked for at a time.
    pub fn start(sessions: usize) -> Result<Work, String> {
        let most = sessions.clamp(1, MOST_PREDICTIONS);
        let queue = Mutex::new(Queue { most, ..Queue::default() });
        let desk = Arc::new(Desk { queue, ..Desk::default() });
        let mut threads = vec![];
        for n in 0..most + MORE_THREADS {
            let desk = desk.clone();
            let thread = std::thread::Builder::new()
                .name(format!("prism-work-{n}"))
                .spawn(move || desk.serve())
                .map_err(|e| format!("cannot start threads: {e}"))?;
            threads.push(thread);
        }
        Ok(Work { desk, threads: Mutex::new(threads) })
    }

    /// How many jobs wait.
    pub fn counts(&self) -> Counts {
        let (jobs, counts) = (self.desk.queue().len(), self.desk.turns.counts());
        Counts { waiting: jobs + counts.waiting, ..counts }
    }

    /// Queues patches to be encoded ahead, in this order, while no request waits for the network;
    /// they take turns with those of other keys. Beyond [`MOST_AHEAD`] some are dropped.
    pub fn ahead(&self, key: Key, wishes: impl IntoIterator<Item = Ahead>) {
        let mut queue = self.desk.queue();
        // Those of an object that others took the place of, among them.
        queue.ahead.retain(Ahead::serves);
        if !queue.closed {
            wishes.into_iter().for_each(|wish| queue.ahead.add(key, wish, MOST_AHEAD));
        }
        drop(queue);
        self.desk.news.notify_all();
    }

    /// Has work done when its turn comes, and waits for it. `work` has the network by its [`Turn`],
    /// which tells when the waiting ends early; a prediction begins with one.
    pub async fn run<T: Send + 'static>(
        &self,
        key: Key,
        kind: Kind,
        work: impl FnOnce(&Turn) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let (send, receive) = oneshot::channel();
        let (left, turns) = (Arc::new(AtomicBool::new(false)), self.desk.turns.clone());
        let _waits = Waits { left: left.clone(), turns: turns.clone() };
        let run = Box::new(move || {
            let turn = turns.enter(&left);
            let begins = if kind == Kind::Prediction { turn.begin() } else { !turn.left() };
            if begins {
                let result = done(|| work(&turn));
                drop(turn);
                // Who left meanwhile does not take it.
                let _ = send.send(result);
            }
        });
        self.desk.queue().push(key, Job { kind, run })?;
        self.desk.news.notify_all();
        receive.await.unwrap_or_else(|_| Err(Failure::full("the server is stopping")))
    }

    /// Ends the threads when what runs has come to its end.
    pub fn close(&self) {
        let mut queue = self.desk.queue();
        queue.closed = true;
        queue.ahead.clear();
        drop(queue);
        self.desk.turns.close();
        self.desk.news.notify_all();
        let threads: Vec<_> = locked(&self.threads).drain(..).collect();
        threads.into_iter().for_each(|thread| drop(thread.join()));
    }
}

/// Does work in which memory may be refused, and has an answer where it panics.
fn done<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    let worked = catch_unwind(AssertUnwindSafe(|| caught(|| Ok(work()))));
    match worked {
        Ok(Ok(result)) => result,
        Ok(Err(e)) => Err(e.into()),
        Err(_) => Err(Failure::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal server error: the request was cancelled, and nothing was changed",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Cpu, Device};
    use crate::model::{Config, Model, Part, Weights};
    use crate::prompt::Prompts;
    use crate::session::{Options, Scan, Session, normalization};
    use crate::volume::Volume;
    use std::path::Path;
    use std::sync::mpsc::{TryRecvError, channel};

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[test]
    fn those_who_wait_take_turns() {
        let mut queue = Queue { most: 1, ..Queue::default() };
        let job = |kind: Kind| Job { kind, run: Box::new(|| {}) };
        for (key, kind) in [
            (1, Kind::Prediction),
            (1, Kind::Other),
            (1, Kind::Prediction),
            (2, Kind::Prediction),
            (3, Kind::Other),
        ] {
            queue.push(key, job(kind)).unwrap();
        }
        assert_eq!(queue.take().unwrap().0, 1);
        // One prediction runs: what is none goes first, and nothing else of what runs already.
        assert_eq!(queue.take().unwrap().0, 3);
        assert!(queue.take().is_none());
        queue.done(1, Kind::Prediction);
        assert_eq!(queue.take().unwrap().0, 2);
        assert_eq!(queue.take().unwrap().0, 1);
        queue.done(2, Kind::Prediction);
        queue.done(1, Kind::Other);
        queue.done(3, Kind::Other);
        assert_eq!(queue.take().unwrap().0, 1);
        queue.done(1, Kind::Prediction);
        assert!(queue.take().is_none() && queue.waiting.is_empty() && queue.running.is_empty());
        for _ in 0..MOST_OF_ONE {
            queue.push(7, job(Kind::Other)).unwrap();
        }
        assert!(queue.push(7, job(Kind::Other)).is_err());
        assert_eq!(queue.len(), MOST_OF_ONE);
    }

    #[test]
    fn a_thread_is_kept_for_predictions() {
        let mut queue = Queue { most: 1, ..Queue::default() };
        let job = |kind: Kind| Job { kind, run: Box::new(|| {}) };
        (1..=3).for_each(|key| queue.push(key, job(Kind::Other)).unwrap());
        queue.push(4, job(Kind::Prediction)).unwrap();
        let taken: Vec<Key> = std::iter::from_fn(|| queue.take()).map(|(key, _)| key).collect();
        assert_eq!(taken, [1, 2, 4]);
        // What is done in a moment waits for no kind.
        queue.push(5, job(Kind::Short)).unwrap();
        assert_eq!(queue.take().unwrap().0, 5);
        queue.done(5, Kind::Short);
        queue.done(4, Kind::Prediction);
        assert!(queue.take().is_none());
        queue.done(2, Kind::Other);
        assert_eq!(queue.take().unwrap().0, 3);
    }

    #[test]
    fn a_panic_ends_no_thread() {
        fn panics() {
            std::panic::resume_unwind(Box::new("a test"))
        }
        let work = Work::start(2).unwrap();
        for key in 0..2 * (2 + MORE_THREADS) as Key {
            let job = Job { kind: Kind::Other, run: Box::new(panics) };
            work.desk.queue().push(key, job).unwrap();
            work.desk.news.notify_all();
        }
        assert_eq!(run(work.run(1, Kind::Other, |_| Ok(3))), Ok(3));
        work.close();
    }

    #[test]
    fn work_is_done_and_its_faults_are_answers() {
        let work = Work::start(1).unwrap();
        assert_eq!(run(work.run(1, Kind::Other, |_| Ok(3))), Ok(3));
        let refused: Result<(), Failure> = run(work.run(1, Kind::Prediction, |_| {
            crate::memory::zeroed::<u8>("a test", usize::MAX / 2);
            Ok(())
        }));
        assert!(format!("{refused:?}").contains("out of memory"), "{refused:?}");
        assert_eq!(run(work.run(1, Kind::Prediction, |_| Ok(4))), Ok(4));
        work.close();
        assert!(run(work.run(1, Kind::Other, |_| Ok(5))).is_err());
    }

    #[test]
    fn who_leaves_ends_the_work() {
        let work = Arc::new(Work::start(1).unwrap());
        let (begun, begins) = channel();
        let (told, tells) = channel();
        let long = move |turn: &Turn| {
            begun.send(()).unwrap();
            while !turn.left() {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            told.send(()).unwrap();
            Ok(())
        };
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.unwrap();
        let there = work.clone();
        let waits = runtime.spawn(async move { there.run(1, Kind::Other, long).await });
        begins.recv().unwrap();
        waits.abort();
        tells.recv().unwrap();
        work.close();
    }

    #[test]
    fn of_one_object_what_is_told_last_waits_alone() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/lung1_image.nii.gz");
        let image = Arc::new(Volume::read(&path, None).unwrap());
        let config = Config { fit: Some(1.75), ..Config::tiny() };
        let values = normalization(&*image, config.intensity);
        let device = Device::Cpu(Cpu::new(1).unwrap());
        let model = Arc::new(Model::new(&device, &Weights::hashed(config, "ahead")).unwrap());
        let scan = Arc::new(Scan::new(&model, image, values, Options::default()));
        let told = |object: &mut Session, at: [usize; 3]| {
            let prompts = Prompts { points: vec![(at, true)], ..Prompts::default() };
            object.ahead_of(&prompts).unwrap()
        };
        let (mut one, mut other) = (Session::new(&scan), Session::new(&scan));
        // No thread takes work out of the queue.
        let work = Work { desk: Arc::default(), threads: Mutex::default() };
        let (there, elsewhere) = ([80, 80, 14], [40, 80, 14]);
        work.ahead(1, told(&mut one, there));
        work.ahead(1, told(&mut other, there));
        let waiting = || work.desk.queue().ahead.len();
        assert_eq!(waiting(), 12);
        // Where it waits already it keeps its place.
        assert!(told(&mut one, there).is_empty());
        work.ahead(1, told(&mut one, elsewhere));
        assert_eq!(waiting(), 12);
        work.desk.queue().ahead.retain(Ahead::serves);
        assert_eq!(waiting(), 12);
        // A wish whose object is gone or reset goes with the next that is told.
        other.reset();
        work.ahead(1, None::<Ahead>);
        assert_eq!(waiting(), 6);
        // Of very many there is an end.
        let mut many: Vec<Session> = (0..MOST_AHEAD).map(|_| Session::new(&scan)).collect();
        many.iter_mut().for_each(|object| work.ahead(1, told(object, there)));
        assert_eq!(waiting(), MOST_AHEAD);
        // Another key's wish waits for the one under way, and for none of the rest.
        let (wish, _interest) = scan.ahead().unwrap();
        let next = || work.desk.queue().take_ahead().map(|(key, _)| key);
        assert_eq!(next(), Some(1));
        work.ahead(2, [wish]);
        assert_eq!((waiting(), next()), (MOST_AHEAD, None));
        work.desk.queue().ahead_done(None);
        assert_eq!(next(), Some(2));
    }

    #[test]
    fn a_click_is_answered_while_an_encoding_is_held() {
        let work = Work::start(2).unwrap();
        let (begun, begins) = channel();
        let (go, goes) = channel();
        let encodes = move |turn: &Turn| -> Result<&'static str, Failure> {
            assert!(turn.goes_on(Part::Encoding));
            begun.send(()).unwrap();
            // Between this op and the next one, unless the test has failed.
            while goes.try_recv() == Err(TryRecvError::Empty) {
                assert!(turn.goes_on(Part::Encoding));
            }
            Ok("encoded")
        };
        let work = &work;
        std::thread::scope(move |s| {
            let encoded = s.spawn(move || run(work.run(1, Kind::Prediction, encodes)));
            begins.recv().unwrap();
            assert_eq!(run(work.run(2, Kind::Prediction, |_| Ok("clicked"))), Ok("clicked"));
            assert!(!encoded.is_finished());
            go.send(()).unwrap();
            assert_eq!(encoded.join().unwrap(), Ok("encoded"));
        });
        assert_eq!(work.counts(), Counts { waiting: 0, paused: 0, overtaken: 1 });
        work.close();
    }
}
