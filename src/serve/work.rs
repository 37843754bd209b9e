//! Work that takes processors: predictions, uploads, files. Threads of its own do it, so that
//! whoever asks a small question is answered at once.
//!
//! Those who wait take turns by what they work on: one job of each at a time, in the order in which
//! they came. Of predictions, each of which takes all processors or the GPU, one runs at a time. A
//! job that nobody waits for any more is not begun, and told where it has begun.

use super::failure::Failure;
use crate::tensor::caught;
use axum::http::StatusCode;
use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use tokio::sync::oneshot;

/// Threads: one for predictions, two for what takes a while, and one more, so that what is done in
/// a moment waits for none of them.
const THREADS: usize = PREDICTIONS + OTHERS + 1;
/// Predictions that run at a time.
const PREDICTIONS: usize = 1;
/// Uploads and files that are read or written at a time.
const OTHERS: usize = 2;
/// Jobs that wait at most, and of them on one thing.
const MOST_WAITING: usize = 512;
const MOST_OF_ONE: usize = 32;

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
    predictions: usize,
    others: usize,
    shorts: usize,
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
            return Err(Failure::full(format!("{all} requests wait already, {many} of them here")));
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
            Kind::Prediction => self.predictions < PREDICTIONS,
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
}

impl Desk {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
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
            } else if queue.closed {
                return;
            } else {
                queue = self.news.wait(queue).unwrap_or_else(PoisonError::into_inner);
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
struct Waits(Arc<AtomicBool>);

impl Drop for Waits {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Work {
    /// Starts the threads.
    pub fn start() -> Result<Work, String> {
        let desk = Arc::new(Desk::default());
        let mut threads = vec![];
        for n in 0..THREADS {
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
    pub fn waiting(&self) -> usize {
        self.desk.queue().len()
    }

    /// Has work done when its turn comes, and waits for it. `work` is told when the waiting ends
    /// early.
    pub async fn run<T: Send + 'static>(
        &self,
        key: Key,
        kind: Kind,
        work: impl FnOnce(&AtomicBool) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let (send, receive) = oneshot::channel();
        let left = Arc::new(AtomicBool::new(false));
        let _waits = Waits(left.clone());
        let run = Box::new(move || {
            if !left.load(Ordering::Relaxed) {
                // Who left meanwhile does not take it.
                let _ = send.send(done(|| work(&left)));
            }
        });
        self.desk.queue().push(key, Job { kind, run })?;
        self.desk.news.notify_all();
        receive.await.unwrap_or_else(|_| Err(Failure::full("the server ends")))
    }

    /// Ends the threads when what runs has come to its end.
    pub fn close(&self) {
        self.desk.queue().closed = true;
        self.desk.news.notify_all();
        let threads: Vec<_> =
            self.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect();
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
            "a fault in the server: the request was given up, and nothing was changed",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[test]
    fn those_who_wait_take_turns() {
        let mut queue = Queue::default();
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
        let mut queue = Queue::default();
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
        let work = Work::start().unwrap();
        for key in 0..2 * THREADS as Key {
            let job = Job { kind: Kind::Other, run: Box::new(panics) };
            work.desk.queue().push(key, job).unwrap();
            work.desk.news.notify_all();
        }
        assert_eq!(run(work.run(1, Kind::Other, |_| Ok(3))), Ok(3));
        work.close();
    }

    #[test]
    fn work_is_done_and_its_faults_are_answers() {
        let work = Work::start().unwrap();
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
        let work = Arc::new(Work::start().unwrap());
        let (begun, begins) = channel();
        let (told, tells) = channel();
        let long = move |left: &AtomicBool| {
            begun.send(()).unwrap();
            while !left.load(Ordering::Relaxed) {
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
}
