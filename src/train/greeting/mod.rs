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

mod caller;
mod door;
mod token;
mod words;

pub(super) use caller::{call, resolve};
pub(super) use door::gather;
pub use token::Token;
pub(super) use token::WAYS;

use std::time::Duration;

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

#[cfg(test)]
mod tests {
    use super::words::{CHALLENGE, HELLO, UNKNOWN, WELCOME};
    use super::*;
    use crate::sync::locked;
    use crate::train::link::Wire;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::Mutex;
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

    pub(super) fn listening() -> (TcpListener, String) {
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
}
