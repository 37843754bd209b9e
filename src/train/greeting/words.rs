//! What processes say to each other as they meet, and how it is read.

use super::Token;
use rand::TryRng;
use rand::rngs::SysRng;
use std::io::{self, ErrorKind, Read};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// How often a thread that waits for a caller's words looks whether the caller was hung up on: not
/// every system ends the wait when another thread shuts the connection down.
const LOOKING: Duration = Duration::from_millis(250);

/// The first bytes of what a caller sends, and of what process 0 sends.
pub(super) const HELLO: [u8; 8] = *b"prism\0\0\x02";
pub(super) const CHALLENGE: [u8; 8] = *b"PRISM\0\0\x02";

/// The side that proves that it knows the token.
pub(super) const CALLER: u8 = 1;
pub(super) const HOST: u8 = 2;

/// Process 0's verdict on a caller. Only the first is sent without a proof: to one that does not
/// know the token.
pub(super) const UNKNOWN: u8 = 0;
pub(super) const WELCOME: u8 = 1;
pub(super) const OTHER_RUN: u8 = 2;
pub(super) const OTHER_WORLD: u8 = 3;
pub(super) const TAKEN: u8 = 4;

/// The contents of a greeting.
pub(super) struct Claim {
    pub(super) rank: u64,
    pub(super) world: u64,
    pub(super) digest: [u8; 32],
    /// The caller's random number, and process 0's.
    pub(super) nonces: [[u8; 32]; 2],
}

impl Claim {
    /// The proof that one of the two knows the token, and received all of this.
    pub(super) fn proof(&self, token: &Token, who: u8, verdict: u8) -> blake3::Hash {
        let (rank, world) = (self.rank.to_le_bytes(), self.world.to_le_bytes());
        let said: Vec<u8> =
            [&[who, verdict][..], &rank, &world, &self.digest, &self.nonces[0], &self.nonces[1]]
                .concat();
        blake3::keyed_hash(&token.0, &said)
    }
}

pub(super) fn nonce() -> io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    SysRng.try_fill_bytes(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

/// Reads all of `bytes` before `until`, even if they trickle in, while `goes_on` holds, which is
/// asked again and again.
pub(super) fn read_by(
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::greeting::tests::listening;
    use std::sync::atomic::{AtomicUsize, Ordering};

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
}
