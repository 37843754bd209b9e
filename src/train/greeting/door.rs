//! Process 0: lets the others in, and keeps strangers out.

use super::words::{
    CALLER, CHALLENGE, Claim, HELLO, HOST, OTHER_RUN, OTHER_WORLD, TAKEN, UNKNOWN, WELCOME, nonce,
    read_by,
};
use super::{Terms, WAYS};
use crate::sync::locked;
use crate::train::link::{Wire, bytes_at};
use std::io::{self, ErrorKind, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// The most strangers that are named in warnings.
const MOST_NAMED: usize = 20;

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
pub(in crate::train) fn gather(
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
