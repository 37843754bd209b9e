//! The connections between the processes of a run: messages, signs of life, and how each learns
//! that another is lost.
//!
//! Every connection has two threads. One reads, whatever the process is doing, so that a loss is
//! noticed at once; the other writes a sign of life now and then, so that a process that computes
//! for long is not taken for lost. A process that is stopped, or whose network is, writes none. The
//! first loss that a process learns of is the one that counts, and it tells all others the reason.

use crate::memory::{self, Refused};
use crate::sync::{locked, wait, wait_while};
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// The number of signs of life within the time after which a process without them is lost.
const SIGNS: u32 = 5;
/// How long a process that ends tries to tell the others so, and waits until they have received it.
const FAREWELL: Duration = Duration::from_secs(2);

/// Kinds of frames. A frame consists of its kind, the number of its bytes, and those bytes.
///
/// Bytes of a sum, or what process 0 broadcasts.
const DATA: u8 = 1;
/// A sign of life.
const ALIVE: u8 = 2;
/// The run is lost; with the reason.
const LOST: u8 = 3;
/// This process has done its part.
const DONE: u8 = 4;

/// The longest message: no network has as many parameters.
const MOST_DATA: u64 = 1 << 36;
/// The longest reason.
const MOST_TEXT: usize = 4096;
/// Bytes for which there is room before they arrive. A false length costs no more than that.
const EAGER: u64 = 64 << 20;

/// The name of a message in refusals of memory.
pub(super) const MESSAGE: &str = "a message of another process";

/// Ends waits of this process that do not depend on connections.
pub(super) type Rescue = Box<dyn Fn() + Send>;

/// A fixed number of bytes out of many.
pub(super) fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn gone(rank: usize, why: &str) -> String {
    format!(
        "process {rank} of this training run was lost ({why}); restart all of them with --resume"
    )
}

/// What came from a process and was not requested yet.
#[derive(Default)]
struct Inbox {
    messages: VecDeque<Vec<u8>>,
    /// Whether that process has done its part.
    left: bool,
}

#[derive(Default)]
struct State {
    /// Why the run cannot go on.
    lost: Option<String>,
    /// This process is closing its connections.
    closing: bool,
    /// The number of threads that read.
    reading: usize,
    /// By rank.
    inboxes: Vec<Inbox>,
}

/// What all connections of a process share.
pub(super) struct Shared {
    /// The rank of this process.
    rank: usize,
    /// A process from which nothing came for this long is lost.
    silence: Duration,
    state: Mutex<State>,
    /// Notified of every change of the state.
    changed: Condvar,
    rescue: Mutex<Option<Rescue>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    fn change(&self, f: impl FnOnce(&mut State)) {
        f(&mut self.state());
        self.changed.notify_all();
    }

    /// Waits while `f` holds, with a time limit.
    fn wait_while(
        &self,
        most: Duration,
        f: impl FnMut(&mut State) -> bool,
    ) -> MutexGuard<'_, State> {
        wait_while(&self.changed, self.state(), most, f)
    }

    /// The reason why the run cannot go on, if it cannot.
    pub(super) fn lost(&self) -> Option<String> {
        self.state().lost.clone()
    }

    /// Records that the run cannot go on: all others are told, and every wait of this process ends.
    pub(super) fn lose(&self, why: &str) {
        let mut first = false;
        self.change(|state| {
            first = state.lost.is_none();
            state.lost.get_or_insert_with(|| why.into());
        });
        if first && let Some(rescue) = &*locked(&self.rescue) {
            rescue();
        }
    }

    /// Registers `rescue` to be called when the run cannot go on.
    pub(super) fn rescue_by(&self, rescue: Rescue) {
        let mut held = locked(&self.rescue);
        let rescue = held.insert(rescue);
        if self.lost().is_some() {
            rescue();
        }
    }

    /// The next message of a process, which must be as long as `bytes`. It is waited for as long as
    /// the process gives signs of life.
    fn receive(&self, rank: usize, bytes: &mut [u8]) -> Result<(), String> {
        let mut state = self.state();
        let next = loop {
            if let Some(message) = state.inboxes[rank].messages.pop_front() {
                break Ok(message);
            }
            if let Some(why) = &state.lost {
                break Err(why.clone());
            }
            if state.inboxes[rank].left {
                break Err(gone(rank, "it ended"));
            }
            state = wait(&self.changed, state);
        };
        drop(state);
        let why = match next {
            Ok(message) if message.len() == bytes.len() => {
                bytes.copy_from_slice(&message);
                return Ok(());
            }
            Ok(message) => gone(
                rank,
                &format!("it sent {} bytes where {} were expected", message.len(), bytes.len()),
            ),
            Err(why) => why,
        };
        self.lose(&why);
        Err(why)
    }

    /// The message for a connection that broke, or whose message this process has no memory for.
    fn broken(&self, rank: usize, e: &io::Error) -> String {
        if e.get_ref().is_some_and(|inner| inner.is::<Refused>()) {
            return gone(self.rank, &e.to_string());
        }
        match e.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                let limit = self.silence.as_secs_f64();
                gone(rank, &format!("it sent nothing for {limit} s: it is stopped or unreachable"))
            }
            ErrorKind::UnexpectedEof
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe => gone(rank, "its connection ended"),
            _ => gone(rank, &e.to_string()),
        }
    }
}

/// A connection to another process.
struct Line {
    /// The rank of the other process.
    rank: usize,
    stream: TcpStream,
    /// Held while a frame is written.
    turn: Mutex<()>,
}

impl Line {
    /// Writes a frame; the caller holds the turn.
    fn write(&self, kind: u8, bytes: &[u8]) -> io::Result<()> {
        let mut stream = &self.stream;
        let mut head = [kind; 9];
        head[1..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        let written = stream.write_all(&head).and_then(|()| stream.write_all(bytes));
        if written.is_err() {
            // Nothing can follow half a frame.
            let _ = stream.shutdown(Shutdown::Write);
        }
        written
    }
}

/// Reads a frame.
fn frame(mut stream: &TcpStream) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0u8; 9];
    stream.read_exact(&mut head)?;
    let (kind, length) = (head[0], u64::from_le_bytes(bytes_at(&head, 1)));
    let most = match kind {
        DATA => MOST_DATA,
        LOST => MOST_TEXT as u64,
        ALIVE | DONE => 0,
        _ => {
            return Err(io::Error::other(format!("it sent a frame of unknown kind {kind}")));
        }
    };
    if length > most {
        return Err(io::Error::other(format!(
            "it sent a frame of kind {kind} and {length} bytes, expected at most {most}"
        )));
    }
    let read = || {
        let mut bytes = memory::list(MESSAGE, length.min(EAGER) as usize);
        memory::read(MESSAGE, stream.take(length), &mut bytes).map(|()| bytes)
    };
    let bytes = match length {
        0 => vec![],
        _ => memory::caught(read).map_err(io::Error::other)??,
    };
    if bytes.len() as u64 != length {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok((kind, bytes))
}

/// Reads what another process sends until it has finished. At most a message or two are read before
/// they are requested: processes send only when they have what the others sent before.
fn listen(shared: &Shared, line: &Line) {
    let rank = line.rank;
    let lost = loop {
        match frame(&line.stream) {
            Ok((DATA, bytes)) => {
                shared.change(|state| state.inboxes[rank].messages.push_back(bytes))
            }
            Ok((LOST, why)) => break Some(String::from_utf8_lossy(&why).into_owned()),
            Ok((DONE, _)) => break None,
            Ok(_) => {}
            Err(e) => break Some(shared.broken(rank, &e)),
        }
    };
    match lost {
        None => shared.change(|state| state.inboxes[rank].left = true),
        // If a process closes its connections, the others are not lost.
        Some(why) if !shared.state().closing => shared.lose(&why),
        Some(_) => {}
    }
    shared.change(|state| state.reading -= 1);
}

/// Gives signs of life until the end has to be announced, and announces it.
fn live(shared: &Shared, line: &Line) {
    let (kind, text) = loop {
        let state = shared.wait_while(shared.silence / SIGNS, |s| {
            s.lost.is_none() && !s.closing && !s.inboxes[line.rank].left
        });
        if state.inboxes[line.rank].left {
            return;
        }
        if let Some(why) = &state.lost {
            break (LOST, why.clone());
        }
        if state.closing {
            break (DONE, String::new());
        }
        drop(state);
        // A message that is being sent is a sign of life too.
        if let Ok(_turn) = line.turn.try_lock()
            && line.write(ALIVE, &[]).is_err()
        {
            // The thread that reads finds out why.
            return;
        }
    };
    let text = &text.as_bytes()[..text.len().min(MOST_TEXT)];
    let _ = line.stream.set_write_timeout(Some(FAREWELL));
    let until = Instant::now() + FAREWELL;
    let said = loop {
        if let Ok(_turn) = line.turn.try_lock() {
            break line.write(kind, text).is_ok();
        }
        if Instant::now() > until {
            break false;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    // A message that another process does not accept is given up.
    let _ = line.stream.shutdown(if said { Shutdown::Write } else { Shutdown::Both });
}

struct Link {
    line: Arc<Line>,
    living: Option<JoinHandle<()>>,
}

/// The connections of a process: those of process 0 to all others, those of the others to process
/// 0.
pub(super) struct Wire {
    /// What they share.
    pub(super) shared: Arc<Shared>,
    /// By rank.
    links: Vec<Link>,
}

impl Wire {
    /// No connections yet, for process `rank` of `world`.
    pub(super) fn new(rank: usize, world: usize, silence: Duration) -> Wire {
        let state =
            State { inboxes: (0..world).map(|_| Inbox::default()).collect(), ..State::default() };
        let (state, changed, rescue) = (Mutex::new(state), Condvar::new(), Mutex::new(None));
        Wire { shared: Arc::new(Shared { rank, silence, state, changed, rescue }), links: vec![] }
    }

    /// Takes a connection to process `rank`.
    pub(super) fn add(&mut self, rank: usize, stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(self.shared.silence))?;
        stream.set_write_timeout(Some(self.shared.silence))?;
        let line = Arc::new(Line { rank, stream, turn: Mutex::new(()) });
        let (shared, its) = (self.shared.clone(), line.clone());
        let living = Some(Builder::new().spawn(move || live(&shared, &its))?);
        let at = self.links.partition_point(|link| link.line.rank < rank);
        self.links.insert(at, Link { line: line.clone(), living });
        let shared = self.shared.clone();
        self.shared.change(|state| state.reading += 1);
        let listening = Builder::new().spawn(move || listen(&shared, &line));
        if let Err(e) = listening {
            self.shared.change(|state| state.reading -= 1);
            return Err(e);
        }
        Ok(())
    }

    /// The others that there is a connection to, in order.
    pub(super) fn ranks(&self) -> impl Iterator<Item = usize> {
        self.links.iter().map(|link| link.line.rank)
    }

    /// Sends a message to all that there is a connection to, in order.
    pub(super) fn send(&self, bytes: &[u8]) -> Result<(), String> {
        for Link { line, .. } in &self.links {
            let turn = locked(&line.turn);
            let Err(e) = line.write(DATA, bytes) else { continue };
            drop(turn);
            // The thread that reads will probably learn the reason.
            let state = self
                .shared
                .wait_while(FAREWELL, |s| s.lost.is_none() && !s.inboxes[line.rank].left);
            let why = match &state.lost {
                Some(why) => why.clone(),
                None if state.inboxes[line.rank].left => gone(line.rank, "it ended"),
                None => self.shared.broken(line.rank, &e),
            };
            drop(state);
            self.shared.lose(&why);
            return Err(why);
        }
        Ok(())
    }

    /// Receives what process `rank` sends next ([`Shared::receive`]).
    pub(super) fn receive(&self, rank: usize, bytes: &mut [u8]) -> Result<(), String> {
        self.shared.receive(rank, bytes)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.shared.lose(&format!(
                "process {} of this training run ended because of an internal error",
                self.shared.rank
            ));
        }
        let rescue = locked(&self.shared.rescue).take();
        drop(rescue);
        self.shared.change(|state| state.closing = true);
        for link in &mut self.links {
            if let Some(living) = link.living.take() {
                let _ = living.join();
            }
        }
        // Others that learn the reason may have sent something: if it were not read, its answer
        // would be a reset, which may overtake the reason.
        let lost = self.shared.lost().is_some();
        drop(self.shared.wait_while(FAREWELL, |state| lost && state.reading > 0));
        for link in &self.links {
            let _ = link.line.stream.shutdown(Shutdown::Both);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends a message as a process does.
    fn send(mut stream: &TcpStream, kind: u8, length: u64, bytes: &[u8]) -> io::Result<()> {
        stream.write_all(&[&[kind][..], &length.to_le_bytes(), bytes].concat())
    }

    /// Two ends of a connection.
    fn pair() -> (TcpStream, TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (one, listener.accept().unwrap().0)
    }

    #[test]
    fn frames_that_lie_end_the_run_and_name_their_sender() {
        for (kind, length, said) in [
            (9, 0, "a frame of unknown kind 9"),
            (ALIVE, 1, "a frame of kind 2 and 1 bytes"),
            (LOST, 1 << 20, "a frame of kind 3 and 1048576 bytes"),
            (DATA, u64::MAX, "expected at most 68719476736"),
            // Announces 9 bytes and sends 4.
            (DATA, 9, "its connection ended"),
            (DATA, 4, "it sent 4 bytes where 8 were expected"),
        ] {
            let (here, there) = pair();
            let mut wire = Wire::new(0, 4, Duration::from_secs(600));
            wire.add(3, here).unwrap();
            send(&there, kind, length, &[7; 4]).unwrap();
            if length == 9 {
                there.shutdown(Shutdown::Write).unwrap();
            }
            let why = wire.receive(3, &mut [0; 8]).unwrap_err();
            assert!(
                why.starts_with("process 3 of this training run was lost (") && why.contains(said),
                "{why}"
            );
            assert_eq!(wire.shared.lost().as_ref(), Some(&why));
            drop(there);
        }
    }

    #[test]
    fn a_loss_ends_waits_that_know_nothing_of_connections() {
        let (send, called) = std::sync::mpsc::channel();
        let (here, there) = pair();
        let mut wire = Wire::new(1, 2, Duration::from_secs(600));
        wire.add(0, here).unwrap();
        wire.shared.rescue_by(Box::new(move || send.send(()).unwrap()));
        assert!(called.try_recv().is_err());
        drop(there);
        called.recv_timeout(Duration::from_secs(600)).unwrap();
        assert!(wire.shared.lost().unwrap().contains("process 0 of this training run was lost"));
    }

    #[test]
    fn who_is_refused_memory_is_named_and_not_its_peer() {
        let wire = Wire::new(1, 4, Duration::from_secs(1));
        let refused = memory::refused::<u8>(MESSAGE, 1_000_000);
        let why = wire.shared.broken(3, &io::Error::other(refused));
        let start = "process 1 of this training run was lost (out of memory: a message of ";
        assert!(why.starts_with(start), "{why}");
        let why = wire.shared.broken(3, &io::Error::other("it is odd"));
        assert!(why.starts_with("process 3 of this training run was lost (it is odd)"), "{why}");
    }
}
