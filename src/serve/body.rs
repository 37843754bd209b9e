//! Request bodies: never more than was announced, allowed and granted, and with a time limit. Also
//! response bodies, which are counted until they are sent.

use super::failure::Failure;
use crate::input::room_apart;
use crate::memory::{self, Charge};
use axum::body::{Body, Bytes, HttpBody};
use axum::http::header::CONTENT_LENGTH;
use axum::http::{HeaderMap, StatusCode};
use serde::de::DeserializeOwned;
use std::future::poll_fn;
use std::pin::Pin;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// The most bytes of JSON: for long messages, and for short ones.
pub const JSON: usize = 16 << 20;
pub const SHORT: usize = 64 << 10;

/// A body on which nothing arrives for this long is given up.
const SILENCE: Duration = Duration::from_secs(30);
/// Time for a body in addition to what its bytes take.
const PATIENCE: Duration = Duration::from_secs(60);
/// The slowest rate that is waited for, in bytes per second.
const SLOWEST: u64 = 32 << 10;

/// How messages name the memory that a body takes.
const WHAT: &str = "an upload";
const ANSWER: &str = "a response";

/// A body in memory, which is counted.
pub struct Sent {
    pub bytes: Vec<u8>,
    _charge: Charge,
}

/// The bytes of an answer, which are counted: a client that reads slowly holds them for long.
pub struct Counted {
    bytes: Vec<u8>,
    _charge: Charge,
}

impl Counted {
    /// Bytes that are to be sent.
    pub fn new(bytes: Vec<u8>) -> Result<Counted, Failure> {
        let _charge = Charge::of::<u8>(ANSWER, bytes.len())?;
        Ok(Counted { bytes, _charge })
    }
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The body of an answer, which is counted until it is sent.
impl From<Counted> for Body {
    fn from(counted: Counted) -> Body {
        Body::from(Bytes::from_owner(counted))
    }
}

/// The body of an answer, which is counted until it is sent.
pub fn kept(bytes: Vec<u8>) -> Result<Body, Failure> {
    Counted::new(bytes).map(Body::from)
}

/// An error unless there is room to take so many bytes apart: that may need many times their own
/// memory, in lists that grow unasked.
pub fn apart(bytes: usize) -> Result<(), Failure> {
    Ok(room_apart("the content of a request", bytes)?)
}

/// What JSON says, if there is [room](apart) for it. `wrong` makes the failure if it cannot be
/// read.
pub fn json<T: DeserializeOwned>(
    bytes: &[u8],
    wrong: impl FnOnce(serde_json::Error) -> Failure,
) -> Result<T, Failure> {
    apart(bytes.len())?;
    serde_json::from_slice(bytes).map_err(wrong)
}

/// The length that a request announces for its body: 0 if there is none.
fn announced(headers: &HeaderMap, body: &Body) -> Result<u64, Failure> {
    match headers.get(CONTENT_LENGTH) {
        Some(length) => length
            .to_str()
            .ok()
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| Failure::bad("Content-Length is not a number")),
        None if body.is_end_stream() => Ok(0),
        None => Err(Failure::new(
            StatusCode::LENGTH_REQUIRED,
            "the body has no length: expected Content-Length",
        )),
    }
}

/// Reads a body of at most `most` bytes.
pub async fn read(headers: &HeaderMap, mut body: Body, most: usize) -> Result<Sent, Failure> {
    let length = announced(headers, &body)?;
    if length > most as u64 {
        return Err(Failure::too_large(format!(
            "a body of {length} bytes: at most {most} are accepted here"
        )));
    }
    // A body that does not fit is refused before it arrives. It is counted as it arrives: a client
    // that announces much and sends nothing keeps no other client out.
    let mut bytes = memory::room(WHAT, length as usize)?;
    let mut charge = Charge::default();
    let begun = Instant::now();
    while let Some(part) = next(&mut body, deadline(begun, bytes.len())).await? {
        if bytes.len() + part.len() > length as usize {
            return Err(Failure::bad(format!(
                "the body has more than the {length} bytes of Content-Length"
            )));
        }
        charge.grow::<u8>(WHAT, part.len())?;
        bytes.extend_from_slice(&part);
    }
    match bytes.len() as u64 == length {
        true => Ok(Sent { bytes, _charge: charge }),
        false => Err(Failure::bad(format!("received {} of {length} bytes", bytes.len()))),
    }
}

/// Skips a body of at most `most` bytes: a client that writes all of it before reading an answer
/// would never see one that comes earlier.
pub async fn pass_by(headers: &HeaderMap, mut body: Body, most: usize) {
    let Ok(length @ 1..) = announced(headers, &body) else { return };
    if length <= most as u64 {
        let (begun, mut came) = (Instant::now(), 0);
        while let Ok(Some(part)) = next(&mut body, deadline(begun, came)).await {
            came += part.len();
        }
    }
}

/// The time when a body is given up of which `came` bytes have arrived since it began. Announced
/// bytes earn no time.
fn deadline(begun: Instant, came: usize) -> Instant {
    begun + PATIENCE + Duration::from_secs(came as u64 / SLOWEST)
}

/// The next part of a body; none at its end.
async fn next(body: &mut Body, deadline: Instant) -> Result<Option<Bytes>, Failure> {
    let deadline = deadline.min(Instant::now() + SILENCE);
    loop {
        let frame = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx));
        let frame = timeout_at(deadline, frame).await.map_err(|_| {
            Failure::new(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time")
        })?;
        match frame {
            None => return Ok(None),
            Some(Err(_)) => return Err(Failure::bad("the body was interrupted")),
            // A trailer, which is not data, is ignored.
            Some(Ok(frame)) => {
                if let Ok(part) = frame.into_data() {
                    return Ok(Some(part));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[test]
    fn time_is_given_for_what_came() {
        let now = Instant::now();
        assert_eq!(deadline(now, 0), now + Duration::from_secs(60));
        assert_eq!(deadline(now, 32 << 10), now + Duration::from_secs(61));
        assert_eq!(deadline(now, 32 << 20), now + Duration::from_secs(60 + 1024));
    }

    #[test]
    fn an_answer_is_counted_until_it_is_sent() {
        // Other tests use memory at the same time.
        const SIZE: usize = 512 << 20;
        let bytes = memory::zeroed::<u8>("a test", SIZE);
        let mut body = kept(bytes).unwrap();
        assert_eq!(body.size_hint().exact(), Some(SIZE as u64));
        assert!(memory::used() >= SIZE as u64);
        let part = run(next(&mut body, deadline(Instant::now(), 0))).unwrap().unwrap();
        drop(body);
        assert!(part.len() == SIZE && memory::used() >= SIZE as u64);
        drop(part);
        // Others give theirs back in time.
        let goes = |_| {
            std::thread::sleep(Duration::from_millis(20));
            memory::used() < SIZE as u64
        };
        assert!(memory::used() < SIZE as u64 || (0..3000).any(goes));
    }

    #[test]
    fn a_body_is_as_long_as_it_says_and_no_longer_than_it_may() {
        let of = |length: Option<&'static str>, bytes: &'static [u8], most: usize| {
            let mut headers = HeaderMap::new();
            if let Some(length) = length {
                headers.insert(CONTENT_LENGTH, HeaderValue::from_static(length));
            }
            run(read(&headers, Body::from(bytes), most)).map(|sent| sent.bytes)
        };
        assert_eq!(of(Some("3"), b"abc", 3), Ok(b"abc".to_vec()));
        assert_eq!(of(Some("0"), b"", 3), Ok(vec![]));
        assert_eq!(of(None, b"", 3), Ok(vec![]));
        for (length, most, says) in [
            (Some("3"), 2, "at most 2"),
            (Some("4"), 9, "3 of 4 bytes"),
            (Some("2"), 9, "more than the 2"),
            (Some("-1"), 9, "not a number"),
            (Some("99999999999999999999"), 9, "not a number"),
            (None, 9, "Content-Length"),
        ] {
            let error = format!("{:?}", of(length, b"abc", most).unwrap_err());
            assert!(error.contains(says), "{error}");
        }
    }
}
