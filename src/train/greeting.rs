//! How the processes of a run find each other, and verify that they belong to the same run.
//!
//! A process that connects says who it is and sends a random number; process 0 answers with
//! another; then each proves, by a keyed hash over the whole exchange, that it knows the run's
//! token, the caller first. So the token itself is never sent, and a recorded exchange is of no use
//! to an eavesdropper. What follows is neither encrypted nor signed.
//!
//! Each caller is handled in a thread of its own, with a time limit, and where too many are handled
//! at once, the one that came first is hung up on: strangers neither end the wait for the others
//! nor hold it up.

use super::link::{Wire, bytes_at};
use crate::sync::locked;
use rand::TryRng;
use rand::rngs::SysRng;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// The most strangers that are named in warnings.
const MOST_NAMED: usize = 20;
/// How long a process tries to connect to one address.
const CONNECTING: Duration = Duration::from_secs(5);
/// How often a thread that waits for a caller's words looks whether the caller was hung up on: not
/// every system ends the wait when another thread shuts the connection down.
const LOOKING: Duration = Duration::from_millis(250);
/// How many times a process calls if the connection is dropped.
const CALLS: usize = 3;

/// The variable with the token.
const VARIABLE: &str = "PRISM_TOKEN";
/// How to give a token.
pub(super) const WAYS: &str = "PRISM_TOKEN or --token-file";
/// The longest token.
const MOST_TOKEN: u64 = 4096;
/// The purpose of a token's key, which is used for nothing else.
const PURPOSE: &str = "prism training: processes of one run, version 2";

/// The first bytes of what a caller sends, and of what process 0 sends.
const HELLO: [u8; 8] = *b"prism\0\0\x02";
const CHALLENGE: [u8; 8] = *b"PRISM\0\0\x02";

/// The side that proves that it knows the token.
const CALLER: u8 = 1;
const HOST: u8 = 2;

/// Process 0's verdict on a caller. Only the first is sent without a proof: to one that does not
/// know the token.
const UNKNOWN: u8 = 0;
const WELCOME: u8 = 1;
const OTHER_RUN: u8 = 2;
const OTHER_WORLD: u8 = 3;
const TAKEN: u8 = 4;

/// A secret that all processes of a run know: only processes that know it may take part. It is kept
/// as a key derived from it, and never sent.
#[derive(Clone)]
pub struct Token([u8; 32]);

impl Token {
    /// A token from text; surrounding white space does not count.
    ///
    /// # Errors
    /// The text is empty.
    pub fn new(text: &str) -> Result<Token, String> {
        match text.trim() {
            "" => Err("the token is empty: expected text that is hard to guess".into()),
            text => Ok(Token::of(text)),
        }
    }

    /// The token of processes without one.
    pub(super) fn none() -> Token {
        Token::of("")
    }

    fn of(text: &str) -> Token {
        Token(blake3::derive_key(PURPOSE, text.as_bytes()))
    }

    /// The token in a file, if one is given, otherwise in the environment variable `PRISM_TOKEN`,
    /// which `get` reads; none without both.
    ///
    /// # Errors
    /// The file cannot be read or has more than 4096 bytes, or the token is empty.
    pub fn given(
        file: Option<&Path>,
        get: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Token>, String> {
        let (from, text) = match file {
            Some(path) => {
                let fail = |e: io::Error| format!("{}: cannot read a token: {e}", path.display());
                let mut text = String::new();
                std::fs::File::open(path)
                    .and_then(|f| f.take(MOST_TOKEN + 1).read_to_string(&mut text))
                    .map_err(fail)?;
                if text.len() as u64 > MOST_TOKEN {
                    return Err(format!(
                        "{}: longer than {MOST_TOKEN} bytes, expected a token",
                        path.display()
                    ));
                }
                (path.display().to_string(), text)
            }
            None => match get(VARIABLE) {
                Some(text) => (VARIABLE.into(), text),
                None => return Ok(None),
            },
        };
        Token::new(&text).map(Some).map_err(|e| format!("{from}: {e}"))
    }
}

/// What processes have to agree on to belong to one run, and how long they wait for each other.
#[derive(Clone)]
pub(super) struct Terms {
    pub(super) token: Token,
    /// The digest of what they are about to do.
    pub(super) digest: [u8; 32],
    pub(super) world: usize,
    /// The time for all to appear.
    pub(super) patience: Duration,
    /// The time for a caller to say who it is.
    pub(super) greeting: Duration,
    /// The time within which signs of life must come.
    pub(super) silence: Duration,
    /// The most strangers that may be silent at once, beside as many callers as there are
    /// processes.
    pub(super) strangers: usize,
}

/// The contents of a greeting.
struct Claim {
    rank: u64,
    world: u64,
    digest: [u8; 32],
    /// The caller's random number, and process 0's.
    nonces: [[u8; 32]; 2],
}

impl Claim {
    /// The proof that one of the two knows the token, and received all of this.
    fn proof(&self, token: &Token, who: u8, verdict: u8) -> blake3::Hash {
        let (rank, world) = (self.rank.to_le_bytes(), self.world.to_le_bytes());
        let said: Vec<u8> =
            [&[who, verdict][..], &rank, &world, &self.digest, &self.nonces[0], &self.nonces[1]]
                .concat();
        blake3::keyed_hash(&token.0, &said)
    }
}

fn nonce() -> io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    SysRng.try_fill_bytes(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

/// Reads all of `bytes` before `until`, even if they trickle in, while `goes_on` holds, which is
/// asked again and again.
fn read_by(
    mut stream: &TcpStream,
    bytes: &mut [u8],
    until: Instant,
    goes_on: &dyn Fn() -> bool,
) -> io::Result<()> {
    let mut at = 0;
    while at < bytes.len() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        if !goes_on() {
            return Err(ErrorKind::ConnectionAborted.into());
        }
        stream.set_read_timeout(Some(left.min(LOOKING)))?;
        match stream.read(&mut bytes[at..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => at += count,
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::TimedOut
                ) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The result of a call.
enum Caller {
    /// A process of this run.
    Process(usize, TcpStream),
    /// A process that knows the token but does not fit; with the reason.
    Misfit(String),
    /// Any other caller; with the reason.
    Stranger(String),
}

/// The state by which callers are judged.
struct Door {
    terms: Terms,
    /// Which processes have come.
    taken: Mutex<Vec<bool>>,
    /// Callers that have not proved yet that they know the token, in the order in which they came.
    unproven: Mutex<Vec<Arc<TcpStream>>>,
    /// The number of callers that are being handled.
    inside: AtomicUsize,
}

impl Door {
    fn new(terms: &Terms) -> Door {
        // Process 0's own place is taken.
        let taken = Mutex::new((0..terms.world).map(|rank| rank == 0).collect());
        let (unproven, inside) = (Mutex::default(), AtomicUsize::new(0));
        Door { terms: terms.clone(), taken, unproven, inside }
    }

    /// The most callers at a time that have proved nothing: all processes may come at once.
    fn most(&self) -> usize {
        self.terms.strangers + self.terms.world
    }

    /// Lets a caller in. If that makes too many, the first to come of those that have proved
    /// nothing is hung up on, which ends its thread: a process needs no longer than a few messages
    /// take, and would call again.
    fn enter(&self, stream: &Arc<TcpStream>) {
        self.inside.fetch_add(1, Ordering::AcqRel);
        let mut unproven = locked(&self.unproven);
        unproven.push(stream.clone());
        if unproven.len() > self.most() {
            let _ = unproven.remove(0).shutdown(Shutdown::Both);
        }
    }

    /// Takes a caller from the list of those that have proved nothing; false if it was hung up on.
    fn leave(&self, stream: &Arc<TcpStream>) -> bool {
        let mut unproven = locked(&self.unproven);
        let at = unproven.iter().position(|other| Arc::ptr_eq(other, stream));
        at.map(|at| unproven.remove(at)).is_some()
    }

    /// Whether a caller that has proved nothing yet was not hung up on.
    fn stays(&self, stream: &Arc<TcpStream>) -> bool {
        locked(&self.unproven).iter().any(|other| Arc::ptr_eq(other, stream))
    }

    /// Handles a caller, and tells it the verdict.
    fn hear(&self, stream: Arc<TcpStream>) -> Caller {
        let claim = self.identify(&stream, &|| self.stays(&stream));
        // From here on it is hung up on for no other, and the list has let go of it.
        let stream = match (self.leave(&stream), Arc::into_inner(stream)) {
            (true, Some(stream)) => stream,
            _ => {
                let most = self.most();
                return Caller::Stranger(format!(
                    "had not identified itself when {most} others had come after it"
                ));
            }
        };
        match claim.and_then(|claim| self.admit(&stream, &claim)) {
            Ok(Ok(rank)) => Caller::Process(rank, stream),
            Ok(Err(why)) => Caller::Misfit(why),
            Err(why) => Caller::Stranger(why),
        }
    }

    /// How a stranger behaved whose connection broke.
    fn broken(&self, e: io::Error) -> String {
        match e.kind() {
            ErrorKind::TimedOut | ErrorKind::WouldBlock => {
                format!("did not identify itself within {} s", self.terms.greeting.as_secs_f64())
            }
            ErrorKind::UnexpectedEof => "disconnected without identifying itself".to_string(),
            _ => format!("did not identify itself ({e})"),
        }
    }

    /// What a caller that knows the token claims, or the reason why it is a stranger. It is heard
    /// while `stays` holds.
    fn identify(&self, mut stream: &TcpStream, stays: &dyn Fn() -> bool) -> Result<Claim, String> {
        let terms = &self.terms;
        let until = Instant::now() + terms.greeting;
        let broken = |e| self.broken(e);
        stream.set_nonblocking(false).map_err(broken)?;
        stream.set_write_timeout(Some(terms.greeting)).map_err(broken)?;
        let mut hello = [0u8; 56];
        read_by(stream, &mut hello[..8], until, stays).map_err(broken)?;
        if hello[..8] != HELLO[..] {
            return Err("speaks another protocol".into());
        }
        read_by(stream, &mut hello[8..], until, stays).map_err(broken)?;
        let number = |at: usize| u64::from_le_bytes(bytes_at(&hello, at));
        let nonces = [bytes_at(&hello, 24), nonce().map_err(broken)?];
        let mut claim = Claim { rank: number(8), world: number(16), digest: [0; 32], nonces };
        stream.write_all(&[CHALLENGE.as_slice(), &nonces[1]].concat()).map_err(broken)?;
        let mut answer = [0u8; 64];
        read_by(stream, &mut answer, until, stays).map_err(broken)?;
        claim.digest = bytes_at(&answer, 0);
        // Hashes are compared in constant time.
        if claim.proof(&terms.token, CALLER, WELCOME)
            == blake3::Hash::from_bytes(bytes_at(&answer, 32))
        {
            return Ok(claim);
        }
        let _ = stream.write_all(&[UNKNOWN; 33]);
        Err(format!("claims to be process {} but has another token ({WAYS})", claim.rank))
    }

    /// Tells a caller that knows the token the verdict. Its rank, or the reason why it does not
    /// fit, or why it counts as a stranger.
    fn admit(
        &self,
        mut stream: &TcpStream,
        claim: &Claim,
    ) -> Result<Result<usize, String>, String> {
        let rank = usize::try_from(claim.rank).unwrap_or(usize::MAX);
        let (verdict, why) = self.judge(rank, claim);
        let proof = claim.proof(&self.terms.token, HOST, verdict);
        let told = stream.write_all(&[&[verdict][..], proof.as_bytes()].concat());
        match (why, told) {
            (Some(why), _) => Ok(Err(why)),
            (None, Ok(())) => Ok(Ok(rank)),
            (None, Err(e)) => {
                // It may call again.
                locked(&self.taken)[rank] = false;
                Err(self.broken(e))
            }
        }
    }

    /// The verdict on a caller that knows the token, and the reason if it does not fit. One that is
    /// welcome has its place from here on.
    fn judge(&self, rank: usize, claim: &Claim) -> (u8, Option<String>) {
        let world = self.terms.world;
        if claim.world != world as u64 {
            return (
                OTHER_WORLD,
                Some(format!("process {rank} expects {} processes, expected {world}", claim.world)),
            );
        }
        if claim.digest != self.terms.digest {
            return (OTHER_RUN, Some(format!("process {rank} has other settings")));
        }
        match locked(&self.taken).get_mut(rank) {
            Some(taken) if !*taken => {
                *taken = true;
                (WELCOME, None)
            }
            Some(_) => (TAKEN, Some(format!("a second process {rank} connected"))),
            None => (TAKEN, Some(format!("process {rank} connected, expected 1 to {}", world - 1))),
        }
    }
}

/// Process 0 waits for all others. `warn` is called with messages about strangers.
pub(super) fn gather(
    wire: &mut Wire,
    listener: &TcpListener,
    terms: &Terms,
    warn: &dyn Fn(&str),
) -> Result<(), String> {
    let fail = |e: io::Error| format!("waiting for the other processes: {e}");
    let until = Instant::now() + terms.patience;
    let world = terms.world;
    let door = Arc::new(Door::new(terms));
    let (tell, callers) = channel();
    let (mut strangers, mut trouble) = (0, String::new());
    listener.set_nonblocking(true).map_err(fail)?;
    while wire.ranks().count() + 1 < world {
        // So many at a time: a flood of callers does not keep it from what those before have said.
        for _ in 0..door.most() {
            // Those that are hung up on end soon.
            if door.inside.load(Ordering::Acquire) > 2 * door.most() {
                break;
            }
            let (stream, from) = match listener.accept() {
                Ok((stream, from)) => (Arc::new(stream), from),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                // A caller that has already gone, or too many open files, are temporary errors.
                Err(e) => {
                    trouble = format!("; {e}");
                    break;
                }
            };
            door.enter(&stream);
            let (its, tell) = (door.clone(), tell.clone());
            let heard = Builder::new().spawn(move || {
                let caller = its.hear(stream);
                its.inside.fetch_sub(1, Ordering::AcqRel);
                // The receiver is gone if all have come.
                let _ = tell.send((from, caller));
            });
            if let Err(e) = heard {
                // The one that came last.
                locked(&door.unproven).pop();
                door.inside.fetch_sub(1, Ordering::AcqRel);
                trouble = format!("; {e}");
                break;
            }
        }
        let mut told = callers.recv_timeout(Duration::from_millis(20)).ok();
        while let Some((from, caller)) = told {
            match caller {
                Caller::Process(rank, stream) => wire.add(rank, stream).map_err(fail)?,
                Caller::Misfit(why) => return Err(format!("{why} (from {from})")),
                Caller::Stranger(why) => {
                    strangers += 1;
                    if strangers <= MOST_NAMED {
                        warn(&format!("{from} is not a process of this training run: it {why}"));
                    }
                    if strangers == MOST_NAMED {
                        warn("further such connections are not reported");
                    }
                }
            }
            // Once all have come, no other caller counts.
            told = callers.try_recv().ok().filter(|_| wire.ranks().count() + 1 < world);
        }
        if let Some(why) = wire.shared.lost() {
            return Err(why);
        }
        if Instant::now() > until {
            let here: Vec<usize> = wire.ranks().collect();
            let missing: Vec<String> = (1..world)
                .filter(|rank| !here.contains(rank))
                .map(|rank| rank.to_string())
                .collect();
            let (count, limit) = (1 + here.len(), terms.patience.as_secs_f64());
            return Err(format!(
                "only {count} of {world} processes appeared within {limit} s: waited for process {}{trouble}",
                missing.join(", ")
            ));
        }
    }
    Ok(())
}

/// How a call failed.
enum Failed {
    /// In a way that another call may not.
    Broken(io::Error),
    /// For good.
    Refused(String),
}

impl From<io::Error> for Failed {
    fn from(e: io::Error) -> Failed {
        Failed::Broken(e)
    }
}

/// Process `rank` calls process 0.
pub(super) fn call(address: &str, rank: usize, terms: &Terms) -> Result<TcpStream, String> {
    let until = Instant::now() + terms.patience;
    let mut broken = 0;
    loop {
        let error = match reach(address, until) {
            Ok(stream) => match introduce(&stream, rank, terms, until) {
                Ok(()) => return Ok(stream),
                Err(Failed::Refused(why)) => return Err(format!("{address}: {why}")),
                Err(Failed::Broken(e)) => {
                    broken += 1;
                    e
                }
            },
            Err(e) => {
                // A listener that hung up once and is then gone has ended.
                broken += usize::from(broken > 0);
                e
            }
        };
        if broken >= CALLS || Instant::now() > until {
            let why = match error.kind() {
                ErrorKind::UnexpectedEof => "it closed the connection".to_string(),
                ErrorKind::TimedOut | ErrorKind::WouldBlock => "it does not answer".to_string(),
                _ => error.to_string(),
            };
            return Err(format!("{address}: cannot reach process 0: {why}"));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The addresses of `host:port`.
///
/// # Errors
/// There are none, or the system did not find them before `until`.
pub(super) fn resolve(address: &str, until: Instant) -> io::Result<Vec<SocketAddr>> {
    look_up(address, until, |address| address.to_socket_addrs().map(Iterator::collect))
}

/// Looks an address up in a thread of its own, unless it is a number: the system's look-up of names
/// has no time limit. One that takes too long is left to itself.
fn look_up(
    address: &str,
    until: Instant,
    by: impl FnOnce(&str) -> io::Result<Vec<SocketAddr>> + Send + 'static,
) -> io::Result<Vec<SocketAddr>> {
    if let Ok(number) = address.parse() {
        return Ok(vec![number]);
    }
    let ((tell, told), name) = (channel(), address.to_string());
    Builder::new().spawn(move || {
        // The receiver is gone if that took too long.
        let _ = tell.send(by(&name));
    })?;
    let left = until.saturating_duration_since(Instant::now());
    told.recv_timeout(left).unwrap_or_else(|e| {
        Err(io::Error::other(match e {
            RecvTimeoutError::Timeout => "the look-up of its name did not end in time",
            RecvTimeoutError::Disconnected => "the look-up of its name failed",
        }))
    })
}

/// A connection to any address of a host; it is tried until `until`, and no address for longer than
/// [`CONNECTING`].
fn reach(address: &str, until: Instant) -> io::Result<TcpStream> {
    let mut error = io::Error::other("no such host");
    for to in resolve(address, until)? {
        // A limit of zero would be an error.
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&to, left.min(CONNECTING)) {
            // If nothing listens yet, a call within a machine may be answered by its own port.
            Ok(stream) if stream.local_addr()? == stream.peer_addr()? => {
                error = ErrorKind::ConnectionRefused.into()
            }
            Ok(stream) => return Ok(stream),
            Err(e) => error = e,
        }
    }
    Err(error)
}

/// Says who this process is, and makes process 0 prove who it is.
fn introduce(
    mut stream: &TcpStream,
    rank: usize,
    terms: &Terms,
    until: Instant,
) -> Result<(), Failed> {
    let refused = |why: String| Err(Failed::Refused(why));
    stream.set_write_timeout(Some(terms.greeting))?;
    let mine = nonce()?;
    let mut claim = Claim {
        rank: rank as u64,
        world: terms.world as u64,
        digest: terms.digest,
        nonces: [mine, [0; 32]],
    };
    stream.write_all(
        &[&HELLO[..], &claim.rank.to_le_bytes(), &claim.world.to_le_bytes(), &mine].concat(),
    )?;
    let always = || true;
    // Others may be handled first.
    let mut challenge = [0u8; 40];
    read_by(stream, &mut challenge[..8], until, &always)?;
    if challenge[..8] != CHALLENGE[..] {
        return refused("the program there is not process 0 of a training run".into());
    }
    read_by(stream, &mut challenge[8..], until, &always)?;
    claim.nonces[1] = bytes_at(&challenge, 8);
    let proof = claim.proof(&terms.token, CALLER, WELCOME);
    stream.write_all(&[&claim.digest[..], proof.as_bytes()].concat())?;
    let mut answer = [0u8; 33];
    read_by(stream, &mut answer, until, &always)?;
    let verdict = answer[0];
    if verdict == UNKNOWN {
        return refused(format!(
            "process 0 has another token: give all processes the same ({WAYS})"
        ));
    }
    if claim.proof(&terms.token, HOST, verdict) != blake3::Hash::from_bytes(bytes_at(&answer, 1)) {
        return refused(format!("the program there does not know the token of this run ({WAYS})"));
    }
    match verdict {
        WELCOME => Ok(()),
        OTHER_RUN => refused("process 0 has other settings".into()),
        OTHER_WORLD => {
            refused(format!("process 0 expects a number of processes other than {}", terms.world))
        }
        TAKEN => refused(format!("process 0 already has a process {rank}, or expects none")),
        _ => refused(format!("process 0 gave an unknown answer {verdict}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::scope;

    fn terms(world: usize) -> Terms {
        // Longer than anything here takes.
        let long = Duration::from_secs(300);
        let token = Token::new("a token of tests").unwrap();
        Terms {
            token,
            digest: [3; 32],
            world,
            patience: long,
            greeting: long,
            silence: long,
            strangers: 64,
        }
    }

    fn listening() -> (TcpListener, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        (listener, address)
    }

    /// The result of process 0's wait, whose warnings are added to `warned`.
    fn warning(
        listener: &TcpListener,
        terms: &Terms,
        warned: &Mutex<Vec<String>>,
    ) -> Result<(), String> {
        let mut wire = Wire::new(0, terms.world, terms.silence);
        gather(&mut wire, listener, terms, &|text: &str| locked(warned).push(text.to_string()))
    }

    /// The result of process 0's wait, and its warnings.
    fn waited(listener: &TcpListener, terms: &Terms) -> (Result<(), String>, Vec<String>) {
        let warned = Mutex::new(vec![]);
        let ended = warning(listener, terms, &warned);
        (ended, warned.into_inner().unwrap())
    }

    /// Everything that a process sends to an impostor of process 0.
    fn recorded(terms: &Terms) -> Vec<u8> {
        let (listener, address) = listening();
        scope(|scope| {
            let caller = scope.spawn(|| call(&address, 1, terms));
            let (mut stream, _) = listener.accept().unwrap();
            let mut said = [0; 120];
            stream.read_exact(&mut said[..56]).unwrap();
            stream.write_all(&[CHALLENGE.as_slice(), &[5; 32]].concat()).unwrap();
            stream.read_exact(&mut said[56..]).unwrap();
            // It cannot prove what it claims.
            stream.write_all(&[WELCOME; 33]).unwrap();
            let error = caller.join().unwrap().unwrap_err();
            assert!(error.contains("does not know the token"), "{error}");
            said.to_vec()
        })
    }

    /// Process 0 of two waits while `work` calls it as so many strangers, and then process 1, until
    /// it is met. Returns what `work` did, and process 0's warnings.
    fn beside<T>(
        terms: &Terms,
        strangers: usize,
        work: impl FnOnce(&str) -> T,
    ) -> (T, Vec<String>) {
        let ((listener, address), warned) = (listening(), Mutex::new(vec![]));
        let (done, ended) = scope(|scope| {
            let first = scope.spawn(|| warning(&listener, terms, &warned));
            let done = work(&address);
            // A stranger is hung up on before process 0 hears of it, and process 0 hears of none
            // once all have come.
            while locked(&warned).len() < strangers && !first.is_finished() {
                std::thread::sleep(Duration::from_millis(10));
            }
            // It is a stranger too where it is paused for longer than a greeting may take.
            let mut one = None;
            while one.is_none() && !first.is_finished() {
                one = call(&address, 1, terms).ok();
            }
            (done, first.join().unwrap())
        });
        assert_eq!(ended, Ok(()));
        (done, warned.into_inner().unwrap())
    }

    #[test]
    fn strangers_are_named_and_hung_up_on() {
        let terms = terms(2);
        let overheard = recorded(&terms);
        let ((), warned) = beside(&terms, 2, |address| {
            let other = Terms { token: Token::new("another").unwrap(), ..terms.clone() };
            let error = call(address, 1, &other).unwrap_err();
            assert!(
                error.contains("process 0 has another token") && error.contains("PRISM_TOKEN"),
                "{error}"
            );
            let mut replay = TcpStream::connect(address).unwrap();
            replay.write_all(&overheard[..56]).unwrap();
            replay.read_exact(&mut [0; 40]).unwrap();
            replay.write_all(&overheard[56..]).unwrap();
            let mut verdict = [9; 33];
            replay.read_exact(&mut verdict).unwrap();
            assert_eq!(verdict, [UNKNOWN; 33]);
        });
        let said = "claims to be process 1 but has another token";
        assert!(warned.len() == 2 && warned.iter().all(|line| line.contains(said)), "{warned:?}");
    }

    #[test]
    fn strangers_that_take_too_long_are_named_and_hung_up_on() {
        let terms = Terms { greeting: Duration::from_millis(500), ..terms(2) };
        let (strangers, warned) = beside(&terms, 2, |address| {
            let connect = || TcpStream::connect(address).unwrap();
            let (mut silent, mut slow) = (connect(), connect());
            let strangers = [&silent, &slow].map(|stream| stream.local_addr().unwrap());
            // A greeting that takes longer than process 0 waits, and by far.
            let sent = HELLO.into_iter().chain([0; 1000]).take_while(|byte| {
                std::thread::sleep(Duration::from_millis(100));
                slow.write_all(&[*byte]).is_ok()
            });
            assert!(sent.count() < 1008);
            assert!(matches!(silent.read(&mut [0]), Ok(0) | Err(_)));
            strangers
        });
        for stranger in strangers {
            let said = "is not a process of this training run: it did not identify itself";
            let said = format!("{stranger} {said} within 0.5 s");
            assert_eq!(warned.iter().filter(|line| **line == said).count(), 1, "{warned:?}");
        }
    }

    #[test]
    fn silent_callers_take_no_place_from_those_behind_them() {
        // None of them is given up before process 0 would have given up waiting.
        let terms = Terms { greeting: Duration::from_secs(600), strangers: 4, ..terms(2) };
        let more = 5;
        let (held, warned) = beside(&terms, more, |address| {
            let connect = |_| TcpStream::connect(address).unwrap();
            (0..terms.strangers + terms.world + more).map(connect).collect::<Vec<_>>()
        });
        let said = "it had not identified itself when 6 others had come after it";
        assert!(warned.len() >= more && warned.iter().all(|w| w.ends_with(said)), "{warned:?}");
        drop(held);
    }

    /// Holds on any system, also where hanging up does not shut the connection down.
    #[test]
    fn who_was_hung_up_on_is_not_listened_to() {
        let (listener, address) = listening();
        let silent = TcpStream::connect(&address).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let far = Instant::now() + Duration::from_secs(300);
        let looks = AtomicUsize::new(0);
        let goes_on = || looks.fetch_add(1, Ordering::Relaxed) < 2;
        let error = read_by(&stream, &mut [0; 8], far, &goes_on).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionAborted);
        // Two waits ended without words.
        assert_eq!(looks.load(Ordering::Relaxed), 3);
        drop(silent);
    }

    #[test]
    fn a_name_that_is_not_looked_up_in_time_is_not_waited_for() {
        let (hold, held) = channel::<()>();
        let until = Instant::now() + Duration::from_millis(50);
        let never = move |_: &str| {
            // Until the other end is dropped.
            let _ = held.recv();
            Ok(vec![])
        };
        let error = look_up("node7:1234", until, never).unwrap_err();
        assert!(error.to_string().contains("look-up of its name"), "{error}");
        drop(hold);
        let far = Instant::now() + Duration::from_secs(300);
        let one: SocketAddr = "127.0.0.1:80".parse().unwrap();
        assert_eq!(look_up("node7:1234", far, move |_| Ok(vec![one])).unwrap(), [one]);
        // A thread that ends without an answer is told from one that is late.
        let lost = |_: &str| -> io::Result<Vec<SocketAddr>> {
            std::panic::resume_unwind(Box::new("lost"))
        };
        let error = look_up("node7:1234", far, lost).unwrap_err();
        assert!(error.to_string().contains("look-up of its name failed"), "{error}");
        // A number is no name.
        assert_eq!(look_up("127.0.0.1:80", far, |_| Ok(vec![])).unwrap(), [one]);
    }

    #[test]
    fn who_never_comes_is_named() {
        let terms = Terms { patience: Duration::from_millis(50), ..terms(2) };
        assert_eq!(
            waited(&listening().0, &terms),
            (
                Err("only 1 of 2 processes appeared within 0.05 s: waited for process 1".into()),
                vec![]
            )
        );
    }

    #[test]
    fn misfits_with_the_right_token_hear_why_and_so_does_process_0() {
        for (rank, its, here, there) in [
            (
                1,
                terms(2),
                "process 1 expects 2 processes, expected 3",
                "a number of processes other than 2",
            ),
            (
                2,
                Terms { digest: [4; 32], ..terms(3) },
                "process 2 has other settings",
                "process 0 has other settings",
            ),
            (
                7,
                terms(3),
                "process 7 connected, expected 1 to 2",
                "already has a process 7, or expects none",
            ),
            (0, terms(3), "a second process 0 connected", "process 0 already"),
        ] {
            let (listener, address) = listening();
            let (first, other) = scope(|scope| {
                let first = scope.spawn(|| waited(&listener, &terms(3)).0.unwrap_err());
                (call(&address, rank, &its).unwrap_err(), first.join().unwrap())
            });
            assert!(first.contains(there) && other.contains(here), "{first} {other}");
        }
        let (listener, address) = listening();
        scope(|scope| {
            let first = scope.spawn(|| waited(&listener, &terms(3)).0.unwrap_err());
            let _one = call(&address, 1, &terms(3)).unwrap();
            let error = call(&address, 1, &terms(3)).unwrap_err();
            assert!(error.contains("process 0 already has a process 1"), "{error}");
            let error = first.join().unwrap();
            assert!(error.contains("a second process 1 connected"), "{error}");
        });
    }

    #[test]
    fn who_answers_and_is_no_process_0_is_said() {
        let (listener, address) = listening();
        scope(|scope| {
            let caller = scope.spawn(|| call(&address, 1, &terms(2)).unwrap_err());
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"SSH-2.0-OpenSSH\r\n").unwrap();
            let error = caller.join().unwrap();
            assert!(
                error.starts_with(&address) && error.contains("is not process 0 of a training run"),
                "{error}"
            );
        });
    }

    #[test]
    fn tokens_come_from_a_file_or_the_variable() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        let variable = |value: &'static str| {
            move |name: &str| (name == "PRISM_TOKEN").then(|| value.to_string())
        };
        let given = |file: Option<&Path>, value: &'static str| {
            Token::given(file, variable(value)).map(|token| token.unwrap().0)
        };
        std::fs::write(&file, "  one\n").unwrap();
        let one = Token::new("one").unwrap().0;
        assert_eq!(given(None, "one\n"), Ok(one));
        assert_eq!(given(Some(&file), "two"), Ok(one));
        assert_ne!(given(None, "two"), Ok(one));
        assert_ne!(Token::none().0, one);
        assert!(Token::given(None, |_| None).unwrap().is_none());
        assert!(given(None, " ").unwrap_err().contains("PRISM_TOKEN: the token is empty"));
        for (bytes, said) in [
            (vec![b'\n'], "the token is empty"),
            (vec![b'a'; 5000], "longer than 4096 bytes"),
            (vec![0xff], "cannot read a token"),
        ] {
            std::fs::write(&file, bytes).unwrap();
            let error = given(Some(&file), "one").unwrap_err();
            assert!(error.contains(&file.display().to_string()) && error.contains(said), "{error}");
        }
        assert!(
            given(Some(&folder.path().join("none")), "one")
                .unwrap_err()
                .contains("cannot read a token")
        );
    }
}
