//! Wishes to end: Ctrl-C, and the signals of schedulers, service managers and closed terminals.

use super::warn;
use std::sync::{Mutex, PoisonError};

/// What a command does when it is asked to end, told whether that was by Ctrl-C (SIGINT) once more:
/// true to end at once.
type Interrupted = Box<dyn FnMut(bool) -> bool + Send>;

static INTERRUPTED: Mutex<Option<Interrupted>> = Mutex::new(None);

/// Has `f` called when the process is asked to end, instead of ending it at once; it ends where `f`
/// returns true. It is told whether Ctrl-C, or SIGINT by whoever sends it, comes for the second
/// time: only then is what has begun to be given up. Schedulers and service managers send one
/// SIGTERM or SIGHUP after another, and mean the same by all of them.
pub(super) fn on_interrupt(f: impl FnMut(bool) -> bool + Send + 'static) {
    *INTERRUPTED.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(f));
}

/// Answers a wish to end.
fn answer(again: bool) {
    let ends = INTERRUPTED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .as_mut()
        .is_none_or(|f| f(again));
    if ends {
        crate::output::abandon();
        std::process::exit(130);
    }
}

/// Listens for wishes to end. Temporary files, which hold what patients' scans show, go with the
/// process.
pub(super) fn listen() {
    if let Err(e) = heard() {
        warn(&format!("cannot listen for signals: {e}"));
    }
    // A file beyond the limit of the shell is then an error of its writer, as a full disk is.
    #[cfg(unix)]
    // SAFETY: ignoring a signal runs no code.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN)
    };
}

/// Has wishes to end answered, on a thread of their own.
#[cfg(unix)]
fn heard() -> std::io::Result<()> {
    use std::io::Read;
    use std::os::fd::IntoRawFd;
    use std::panic::catch_unwind;
    use std::sync::atomic::Ordering;

    let (mut signals, pipe) = std::io::pipe()?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let (mut signal, mut pressed) = ([0u8], false);
        while signals.read_exact(&mut signal).is_ok() {
            let press = libc::c_int::from(signal[0]) == libc::SIGINT;
            // A panic of what is done has said so; the next signal is heard all the same.
            drop(catch_unwind(|| answer(press && pressed)));
            pressed |= press;
        }
    })?;
    unix::PIPE.store(pipe.into_raw_fd(), Ordering::Relaxed);
    unix::ENDS.into_iter().try_for_each(unix::hear)
}

#[cfg(unix)]
mod unix {
    use std::io;
    use std::ptr::{null, null_mut};
    use std::sync::atomic::{AtomicI32, Ordering};

    /// Signals that end a process which does not hear them, with temporary files left behind, and
    /// from some a core of all that it held. Schedulers send SIGUSR1 or SIGUSR2 where they are told
    /// to, and SIGXCPU, as the shell's limit does, when a process had its time.
    pub(super) const ENDS: [libc::c_int; 8] = [
        libc::SIGINT,
        libc::SIGTERM,
        libc::SIGHUP,
        libc::SIGQUIT,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGXCPU,
        libc::SIGALRM,
    ];

    /// Where the handler of signals writes which one came: nothing else may be done in one.
    pub(super) static PIPE: AtomicI32 = AtomicI32::new(-1);

    /// Has a signal written to the pipe. What was ignored when the process began stays ignored:
    /// `nohup` ignores SIGHUP so, and a shell Ctrl-C for what it runs in the background.
    pub(super) fn hear(signal: libc::c_int) -> io::Result<()> {
        let done = |result: libc::c_int| match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        };
        // SAFETY: zeros are a `sigaction`: no handler, no flags, an empty set.
        let [mut before, mut action]: [libc::sigaction; 2] = unsafe { std::mem::zeroed() };
        // SAFETY: asks for what stands, and changes nothing.
        done(unsafe { libc::sigaction(signal, null(), &mut before) })?;
        if before.sa_sigaction == libc::SIG_IGN {
            return Ok(());
        }
        action.sa_sigaction = write as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: what the handler does is allowed in one.
        done(unsafe { libc::sigaction(signal, &action, null_mut()) })
    }

    /// The handler. The pipe holds thousands of signals, and its other end is read for as long as
    /// the process lives: this waits for nobody and fails never, so that what the interrupted code
    /// finds as its last error is its own.
    extern "C" fn write(signal: libc::c_int) {
        let byte = signal as u8;
        // SAFETY: the pipe is never closed, and `write` may be called by a handler.
        unsafe { libc::write(PIPE.load(Ordering::Relaxed), (&raw const byte).cast(), 1) };
    }
}

/// Has wishes to end answered, on a thread of their own. All are taken for Ctrl-C.
#[cfg(not(unix))]
fn heard() -> Result<(), ctrlc::Error> {
    let mut pressed = false;
    ctrlc::set_handler(move || answer(std::mem::replace(&mut pressed, true)))
}
