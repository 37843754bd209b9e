//! Requests to end: Ctrl-C, and the signals of schedulers, service managers and closed terminals.

use super::warn;
use crate::sync::locked;
use std::sync::Mutex;

/// What a command does when it is asked to end. Its argument says whether that was by another
/// Ctrl-C (SIGINT); it returns true to end at once.
type Interrupted = Box<dyn FnMut(bool) -> bool + Send>;

static INTERRUPTED: Mutex<Option<Interrupted>> = Mutex::new(None);

/// Has `f` called when the process is asked to end, instead of ending it at once; it ends if `f`
/// returns true. Its argument says whether Ctrl-C, or SIGINT from any sender, comes for the second
/// time: only then is work in progress to be given up. Schedulers and service managers send one
/// SIGTERM or SIGHUP after another, and mean the same by all of them.
pub(super) fn on_interrupt(f: impl FnMut(bool) -> bool + Send + 'static) {
    *locked(&INTERRUPTED) = Some(Box::new(f));
}

/// Reacts to a request to end. If the process ends at once, then with the status `status`.
fn answer(status: i32, again: bool) {
    let ends = locked(&INTERRUPTED).as_mut().is_none_or(|f| f(again));
    if ends {
        crate::output::abandon();
        std::process::exit(status);
    }
}

/// Listens for requests to end. Temporary files, which hold data of patients' scans, are removed
/// with the process.
pub(super) fn listen() {
    if let Err(e) = heard() {
        warn(&format!("cannot listen for signals: {e}"));
    }
    // A file beyond the shell's limit is then an error for its writer, as a full disk is.
    #[cfg(unix)]
    // SAFETY: ignoring a signal runs no code.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN)
    };
}

/// Has requests to end handled on a thread of their own.
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
            let number = libc::c_int::from(signal[0]);
            let press = number == libc::SIGINT;
            // As shells, schedulers and service managers tell which signal ended a process.
            let status = 128 + number;
            // A panic of the handler has been reported; the next signal is still handled.
            drop(catch_unwind(|| answer(status, press && pressed)));
            pressed |= press;
        }
    })?;
    unix::PIPE.store(pipe.into_raw_fd(), Ordering::Relaxed);
    unix::ENDS.iter().try_for_each(|signal| unix::hear(*signal))
}

#[cfg(unix)]
mod unix {
    use std::io;
    use std::ptr::{null, null_mut};
    use std::sync::atomic::{AtomicI32, Ordering};

    /// Signals that end a process which does not handle them, leaving temporary files behind and,
    /// for some, a core dump of all its memory. Schedulers send SIGUSR1 or SIGUSR2 if they are told
    /// to, and SIGXCPU, as the shell's limit does, when a process has used its time; on Linux a
    /// service manager's watchdog sends SIGABRT. Faults, such as SIGSEGV, are not among them.
    pub(super) const ENDS: &[libc::c_int] = &[
        libc::SIGINT,
        libc::SIGTERM,
        libc::SIGHUP,
        libc::SIGQUIT,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGXCPU,
        libc::SIGALRM,
        libc::SIGVTALRM,
        libc::SIGPROF,
        // Elsewhere the system need not say who sent it, and that of `abort` is left alone.
        #[cfg(any(target_os = "linux", target_os = "android"))]
        libc::SIGABRT,
        // Elsewhere there is no such signal, or it ends no process.
        #[cfg(any(target_os = "linux", target_os = "android"))]
        libc::SIGPWR,
        #[cfg(any(target_os = "linux", target_os = "android"))]
        libc::SIGIO,
    ];

    /// The pipe to which the signal handler writes which signal came: nothing else may be done in a
    /// handler.
    pub(super) static PIPE: AtomicI32 = AtomicI32::new(-1);

    /// Has a signal written to the pipe. A signal that was ignored when the process began stays
    /// ignored: `nohup` does that to SIGHUP, and a shell to Ctrl-C for processes in the background.
    /// One that has a handler already is left to it: a profiler that was loaded with the program
    /// uses SIGPROF.
    pub(super) fn hear(signal: libc::c_int) -> io::Result<()> {
        let done = |result: libc::c_int| match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        };
        // SAFETY: zeros are a `sigaction`: no handler, no flags, an empty set.
        let [mut before, mut action]: [libc::sigaction; 2] = unsafe { std::mem::zeroed() };
        // SAFETY: reads the present action, and changes nothing.
        done(unsafe { libc::sigaction(signal, null(), &mut before) })?;
        if before.sa_sigaction != libc::SIG_DFL {
            return Ok(());
        }
        action.sa_sigaction = write as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_RESTART | libc::SA_SIGINFO;
        // SAFETY: the handler does only what is allowed in one.
        done(unsafe { libc::sigaction(signal, &action, null_mut()) })
    }

    /// The handler. The pipe holds thousands of signals, and its other end is read for as long as
    /// the process lives: so this never blocks and never fails, and the last error of the
    /// interrupted code stays its own.
    extern "C" fn write(
        signal: libc::c_int,
        info: *mut libc::siginfo_t,
        _context: *mut libc::c_void,
    ) {
        // SAFETY: the system passes what it knows of the signal, and `getpid` may be called by a
        // handler.
        if signal == libc::SIGABRT && unsafe { (*info).si_pid() == libc::getpid() } {
            // `abort` of this process, which must not go on: as if it were not handled.
            // SAFETY: both may be called by a handler; the signal arrives when this returns.
            unsafe {
                libc::signal(libc::SIGABRT, libc::SIG_DFL);
                libc::raise(libc::SIGABRT);
            }
            return;
        }
        let byte = signal as u8;
        // SAFETY: the pipe is never closed, and `write` may be called by a handler.
        unsafe { libc::write(PIPE.load(Ordering::Relaxed), (&raw const byte).cast(), 1) };
    }
}

/// Has requests to end handled on a thread of their own. All count as Ctrl-C.
#[cfg(not(unix))]
fn heard() -> Result<(), ctrlc::Error> {
    let mut pressed = false;
    ctrlc::set_handler(move || answer(130, std::mem::replace(&mut pressed, true)))
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    /// The variable that makes a run of this test the process that aborts.
    const ABORTS: &str = "PRISM_TEST_ABORTS";

    #[test]
    fn a_process_that_aborts_is_not_kept_from_it() {
        if std::env::var_os(ABORTS).is_some() {
            let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: the limit is only read. This process leaves no core dump.
            unsafe { libc::setrlimit(libc::RLIMIT_CORE, &none) };
            // SAFETY: a choice that runs no code.
            unsafe { libc::signal(libc::SIGABRT, libc::SIG_DFL) };
            super::listen();
            std::process::abort();
        }
        let this = std::env::current_exe().unwrap();
        let name = "cli::signals::tests::a_process_that_aborts_is_not_kept_from_it";
        let mut aborts = Command::new(this);
        let ended = aborts.args(["--exact", name]).env(ABORTS, "1").output().unwrap();
        assert_eq!(ended.status.signal(), Some(libc::SIGABRT), "{ended:?}");
    }
}
