//! The other processes: each calls process 0.

use super::words::{
    CALLER, CHALLENGE, Claim, HELLO, HOST, OTHER_RUN, OTHER_WORLD, TAKEN, UNKNOWN, WELCOME, nonce,
    read_by,
};
use super::{Terms, WAYS};
use crate::train::link::bytes_at;
use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// How long a process tries to connect to one address.
const CONNECTING: Duration = Duration::from_secs(5);
/// How many times a process calls if the connection is dropped.
const CALLS: usize = 3;

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
pub(in crate::train) fn call(
    address: &str,
    rank: usize,
    terms: &Terms,
) -> Result<TcpStream, String> {
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
pub(in crate::train) fn resolve(address: &str, until: Instant) -> io::Result<Vec<SocketAddr>> {
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
}
