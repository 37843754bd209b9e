//! Connections: a limited number at a time, each with time limits.

use axum::serve::Listener;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep};

/// The most connections at a time; others wait to be accepted.
const MOST: usize = 256;
/// A connection is closed if nothing arrives on it for this long while it waits for a request or an
/// answer, or if nothing of its answer can be sent: longer than any answer takes, because clients
/// wait for one.
const SILENCE: Duration = Duration::from_secs(900);
/// The slowest rate of a request, in bytes per second, in addition to that time.
const SLOWEST: u64 = 32 << 10;

/// A listener that accepts a limited number of connections.
pub struct Door {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

impl Door {
    pub fn new(listener: TcpListener) -> Door {
        Door { listener, places: Arc::new(Semaphore::new(MOST)) }
    }
}

impl Listener for Door {
    type Io = Caller;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Caller, SocketAddr) {
        // The semaphore is never closed.
        let place = self.places.clone().acquire_owned().await.ok();
        let (stream, from) = Listener::accept(&mut self.listener).await;
        // Answers are small and clients wait for them.
        let _ = stream.set_nodelay(true);
        let silence = Box::pin(sleep(SILENCE));
        (Caller { stream, silence, begun: None, came: 0, _place: place }, from)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection.
pub struct Caller {
    stream: TcpStream,
    silence: Pin<Box<Sleep>>,
    /// When the request that has not been answered yet began to arrive, and how much of it has
    /// arrived.
    begun: Option<Instant>,
    came: u64,
    _place: Option<OwnedSemaphorePermit>,
}

/// The time when a connection is closed on which `came` bytes have arrived since `begun`, the last
/// of them now, and no answer was sent: bytes that trickle in earn no time.
fn end(begun: Instant, came: u64, now: Instant) -> Instant {
    (begun + SILENCE + Duration::from_secs(came / SLOWEST)).min(now + SILENCE)
}

impl Caller {
    /// Records that this many bytes arrived.
    fn heard(&mut self, bytes: usize) {
        let now = Instant::now();
        self.came += bytes as u64;
        let begun = *self.begun.get_or_insert(now);
        self.silence.as_mut().reset(end(begun, self.came, now));
    }

    /// An error if nothing arrived or was sent for too long.
    fn waited<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        self.silence.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }

    /// The result of an attempt to send a part of an answer: a client that reads nothing for too
    /// long is dropped.
    fn sent(
        &mut self,
        sent: Poll<io::Result<usize>>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if sent.is_pending() {
            return self.waited(cx);
        }
        self.told();
        sent
    }

    /// Records that a part of an answer was sent.
    fn told(&mut self) {
        (self.begun, self.came) = (None, 0);
        self.silence.as_mut().reset(Instant::now() + SILENCE);
    }
}

impl AsyncRead for Caller {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let caller = &mut *self;
        let before = buffer.filled().len();
        match Pin::new(&mut caller.stream).poll_read(cx, buffer) {
            Poll::Pending => caller.waited(cx),
            read => {
                caller.heard(buffer.filled().len() - before);
                read
            }
        }
    }
}

impl AsyncWrite for Caller {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let sent = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.sent(sent, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let sent = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.sent(sent, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    #[test]
    fn who_never_reads_is_left() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let error = runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let _never_reads = listener.accept().await.unwrap();
            let silence = Box::pin(sleep(SILENCE));
            let mut caller = Caller { stream, silence, begun: None, came: 0, _place: None };
            let bytes = vec![0u8; 1 << 20];
            loop {
                caller.silence.as_mut().reset(Instant::now() + Duration::from_millis(100));
                match poll_fn(|cx| Pin::new(&mut caller).poll_write(cx, &bytes)).await {
                    Ok(sent) => assert!(sent > 0),
                    Err(error) => break error,
                }
            }
        });
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn bytes_one_by_one_earn_no_time() {
        let begun = Instant::now();
        let after = |seconds: u64| begun + Duration::from_secs(seconds);
        // A request that arrived at once may wait for its answer.
        assert_eq!(end(begun, 500, begun), after(900));
        // One that trickles in ends, however recently a part of it arrived.
        assert_eq!(end(begun, 500, after(899)), after(900));
        // One that is long and keeps arriving has its time, and ends when it stops.
        assert_eq!(end(begun, 64 << 20, after(1000)), after(1900));
        assert_eq!(end(begun, 64 << 20, after(2900)), after(900 + 2048));
    }
}
