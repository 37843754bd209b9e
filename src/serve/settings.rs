//! The settings of a server.

use crate::device::Device;
use crate::memory;
use crate::session::{MEMORY, Options, UNDO_BYTES};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

/// The default address of a server: nnInteractive's port, on this machine only.
pub const BIND: &str = "127.0.0.1:1527";
/// The default port at which ITK-SNAP looks for its protocol.
pub const DLS: &str = "8911";
/// The largest [`Settings::max_sessions`].
pub const MOST_SESSIONS: usize = 10_000;
/// The longest [`Settings::idle`]: a year.
pub const MOST_IDLE: Duration = Duration::from_secs(365 * 24 * 3600);
/// The most bytes of a scan, packed or not.
const MOST_SCAN: u64 = 8 << 30;
/// The least room for undo history that a session has, in bytes.
const LEAST: usize = 32 << 20;

/// The default limit of a server's state on disk, in bytes.
pub const STATE_BYTES: u64 = 32 << 30;

/// The default number of days for which unused objects are kept on disk.
pub const STATE_DAYS: u64 = 30;

/// Where a server keeps its state on disk, so that a restart or a crash loses nothing.
#[derive(Clone, Debug)]
pub struct Keep {
    /// The folder, which only this server uses, and which is created if it does not exist.
    pub folder: PathBuf,
    /// The most bytes that it may take.
    pub bytes: u64,
    /// When a server starts, objects that have not been used for longer than this are deleted.
    pub age: Duration,
}

impl Keep {
    /// A folder with the default limits, [`STATE_BYTES`] and [`STATE_DAYS`].
    pub fn at(folder: impl Into<PathBuf>) -> Keep {
        let age = Duration::from_secs(STATE_DAYS * 24 * 3600);
        Keep { folder: folder.into(), bytes: STATE_BYTES, age }
    }
}

/// The settings of a server. The default is a server for this machine's programs alone, without a
/// token, which keeps nothing on disk.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The address to listen at, `host:port`; port 0 is any free one. Default: [`BIND`].
    pub bind: String,
    /// A port of this machine (127.0.0.1) at which only ITK-SNAP's protocol is served, and no token
    /// is needed; 0 is any free one. Default: none.
    pub dls: Option<u16>,
    /// The token that callers must have. It is required if others than this machine's programs can
    /// call. Default: none.
    pub token: Option<Secret>,
    /// The most scans, and leases of nnInteractive's protocol, at a time, from 1 to
    /// [`MOST_SESSIONS`]. Default: 16.
    pub max_sessions: usize,
    /// A scan or a lease is dropped after this time without being used, such as by a click; from
    /// a second to [`MOST_IDLE`]. Default: 10 minutes.
    pub idle: Duration,
    /// A lease is dropped after this time without any sign of life from its client. Default: one
    /// minute.
    pub liveness: Duration,
    /// The origin of the one other web page whose scripts may call, such as
    /// `https://viewer.example.org`. Default: none.
    pub allow_origin: Option<String>,
    /// Where scans, prompts and answers are kept on disk; if none, they are only in memory.
    /// Default: none.
    pub keep: Option<Keep>,
    /// A folder of DICOM series, which MONAI Label's clients may ask for by their identifiers.
    /// Default: none.
    pub dicom: Option<PathBuf>,
    /// Called, from any thread, with what is odd about the folder of DICOM series while the server
    /// runs, such as a new damaged file, as text for people. Default: none.
    pub warn: Option<fn(&str)>,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            bind: BIND.into(),
            dls: None,
            token: None,
            max_sessions: 16,
            idle: Duration::from_secs(600),
            liveness: Duration::from_secs(60),
            allow_origin: None,
            keep: None,
            dicom: None,
            warn: None,
        }
    }
}

/// A token that callers must have.
///
/// Only its hash is kept, and hashes are compared: the time that this takes reveals nothing of the
/// token.
#[derive(Clone, Copy, Debug)]
pub struct Secret(blake3::Hash);

impl Secret {
    /// A token from text; white space around it does not count.
    ///
    /// # Errors
    /// The text is empty, or has characters other than the printable ones of ASCII.
    pub fn new(text: &str) -> Result<Secret, String> {
        match text.trim() {
            "" => Err("the token is empty: expected text that is hard to guess".into()),
            text if !text.bytes().all(|b| matches!(b, b' '..=b'~')) => {
                Err("invalid token: expected printable ASCII characters".into())
            }
            text => Ok(Secret(blake3::hash(text.as_bytes()))),
        }
    }

    /// Whether `text` is the token.
    pub fn is(&self, text: &str) -> bool {
        self.0 == blake3::hash(text.as_bytes())
    }
}

impl Settings {
    /// Checks that a server can run with these settings; `bind` is looked up, but not listened at.
    ///
    /// # Errors
    /// A setting is invalid, or others than this machine's programs can call and there is no token.
    pub fn check(&self) -> Result<(), String> {
        self.addresses().map(drop)
    }

    /// The addresses to listen at; errors are those of [`Settings::check`].
    pub(super) fn addresses(&self) -> Result<Vec<SocketAddr>, String> {
        if !(1..=MOST_SESSIONS).contains(&self.max_sessions) {
            return Err(format!(
                "--max-sessions is {}, expected 1 to {MOST_SESSIONS}",
                self.max_sessions
            ));
        }
        if self.idle < Duration::from_secs(1) || self.idle > MOST_IDLE {
            return Err(format!(
                "the idle timeout is {} s, expected 1 to {}",
                self.idle.as_secs_f64(),
                MOST_IDLE.as_secs()
            ));
        }
        if let Some(origin) = &self.allow_origin {
            let host = origin.strip_prefix("https://").or(origin.strip_prefix("http://"));
            let plain = |h: &&str| !h.is_empty() && h.bytes().all(|b| b.is_ascii_graphic());
            if host.filter(plain).is_none_or(|host| host.contains('/')) {
                return Err(format!(
                    "'{origin}' is not an origin: expected one such as https://viewer.example.org"
                ));
            }
        }
        let fail = |e: std::io::Error| {
            format!("cannot listen at '{}': {e}; expected HOST:PORT, such as {BIND}", self.bind)
        };
        let list: Vec<SocketAddr> = self.bind.to_socket_addrs().map_err(fail)?.collect();
        let is_open = list.iter().any(|address| !address.ip().is_loopback());
        match is_open && self.token.is_none() {
            true => Err(format!(
                "other machines can connect to {}: a token is required, for example from 'openssl rand -hex 32'",
                self.bind
            )),
            false => Ok(list),
        }
    }

    /// The most bytes of a scan: a quarter of the available memory.
    pub(super) fn most_scan(&self) -> usize {
        (memory::limit() / 4).min(MOST_SCAN) as usize
    }

    /// Bytes of encoded patches that are kept for all scans together: a quarter of the available
    /// memory, and of the GPU's, if they are there; at most as much for each session as a scan by
    /// itself keeps.
    pub(super) fn encodings(&self, device: &Device) -> usize {
        let own = match device {
            Device::Cuda(cuda) => cuda.total_memory(),
            Device::Cpu(_) => None,
        };
        let there_is = own.map_or(memory::limit(), |own| own.min(memory::limit()));
        let most = MEMORY.saturating_mul(self.max_sessions);
        usize::try_from(there_is / 4).unwrap_or(usize::MAX).min(most)
    }

    /// The options of scans: all undo histories together take at most a quarter of the available
    /// memory.
    pub(super) fn options(&self) -> Options {
        let share = (memory::limit() / 4 / self.max_sessions as u64) as usize;
        Options { undo_bytes: share.clamp(LEAST, UNDO_BYTES), ..Options::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beyond_this_machine_a_token_is_needed() {
        let at = |bind: &str| Settings { bind: bind.into(), ..Settings::default() };
        for bind in ["127.0.0.1:0", "127.0.7.1:1527", "[::1]:1527"] {
            assert!(at(bind).addresses().is_ok(), "{bind}");
        }
        for bind in ["0.0.0.0:1527", "[::]:1527", "192.0.2.1:80"] {
            assert!(at(bind).addresses().unwrap_err().contains("a token is required"), "{bind}");
            let token = Some(Secret::new("a secret").unwrap());
            assert!(Settings { token, ..at(bind) }.addresses().is_ok(), "{bind}");
        }
        for bind in ["", "1527", "localhost:x"] {
            assert!(at(bind).addresses().unwrap_err().contains("HOST:PORT"), "{bind}");
        }
        for max_sessions in [0, MOST_SESSIONS + 1, usize::MAX] {
            let said = Settings { max_sessions, ..Settings::default() }.addresses().unwrap_err();
            assert!(said.contains(&format!("--max-sessions is {max_sessions},")), "{said}");
        }
        for idle in [Duration::ZERO, MOST_IDLE + Duration::from_secs(1), Duration::MAX] {
            let said = Settings { idle, ..Settings::default() }.addresses().unwrap_err();
            assert!(said.contains("idle timeout"), "{said}");
        }
        for (origin, is_one) in [
            ("https://viewer.example.org", true),
            ("http://localhost:3000", true),
            ("*", false),
            ("https://", false),
            ("https://a/b", false),
            ("https://a b", false),
        ] {
            let allow_origin = Some(origin.to_string());
            let settings = Settings { allow_origin, ..Settings::default() };
            assert_eq!(settings.addresses().is_ok(), is_one, "{origin}");
        }
    }

    #[test]
    fn secrets_are_told_apart() {
        let secret = Secret::new(" a secret\n").unwrap();
        assert!(secret.is("a secret") && !secret.is("a secre") && !secret.is(""));
        assert!(Secret::new(" \n").is_err());
        for text in ["ein Schlüssel", "two\nlines", "a\0"] {
            assert!(Secret::new(text).unwrap_err().contains("ASCII"), "{text:?}");
        }
        // What is shown of it does not contain the secret.
        assert!(!format!("{secret:?}").contains("a secret"));
    }
}
