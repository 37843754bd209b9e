//! What the library has to say beside its results.

use super::status::{Failure, call, is_nested, prism_status, text};
use crate::sync::{locked, wait};
use std::ffi::{c_char, c_void};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::thread::{self, ThreadId};

/// Called with a message about something unusual and how it was handled. `message` is valid during
/// the call. It runs on the thread of the call that produced the message, within that call,
/// possibly on several threads at once; it must not throw or jump out.
pub type prism_log_callback =
    Option<unsafe extern "C" fn(user: *mut c_void, message: *const c_char)>;

#[derive(Clone, Copy)]
struct Log(prism_log_callback, *mut c_void);
// SAFETY: the pointer is only handed back; the caller that sets it guarantees its use on any
// thread.
unsafe impl Send for Log {}

/// Who listens now, and who is being told something.
struct Listening {
    log: Log,
    /// How often that was set.
    set: u64,
    /// Calls of callbacks that have not ended: what `set` was, and the thread.
    running: Vec<(u64, ThreadId)>,
}

static LISTENING: Mutex<Listening> =
    Mutex::new(Listening { log: Log(None, std::ptr::null_mut()), set: 0, running: vec![] });

/// Told when a call of a callback has ended.
static ENDED: Condvar = Condvar::new();

fn listening() -> MutexGuard<'static, Listening> {
    locked(&LISTENING)
}

/// Sends all messages of the process to `callback`, passing `user` to it; NULL for none. Without a
/// callback messages are dropped: the library writes nothing to the standard streams.
///
/// When this returns, no other thread is inside a callback that was set before, and none will enter
/// it. It waits for those that are: hold no lock that they take. Inside a callback, which cannot
/// wait, it returns PRISM_BUSY if another thread is inside a log callback, and nothing changes; a
/// log callback that sets another one, or none, still runs to its own end.
///
/// # Safety
/// `user` must stay usable, from any thread, until another callback was set and, where a callback
/// of the log did that itself, until that has returned.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_set_log(
    callback: prism_log_callback,
    user: *mut c_void,
) -> prism_status {
    call(|| {
        let (mut now, this) = (listening(), thread::current().id());
        if is_nested() && now.running.iter().any(|(_, thread)| *thread != this) {
            let message = "another thread is inside the log callback, and a callback cannot wait for it: set another one later";
            return Err(Failure::new(prism_status::PRISM_BUSY, message));
        }
        now.log = Log(callback, user);
        now.set += 1;
        let last = now.set;
        // Within a callback all that run are on this thread.
        while !is_nested() && now.running.iter().any(|(set, _)| *set < last) {
            now = wait(&ENDED, now);
        }
        Ok(())
    })
}

/// Sends a message to the callback, if there is one.
pub(super) fn say(message: &str) {
    let (message, this) = (text(message), thread::current().id());
    let mut now = listening();
    let Log(Some(callback), user) = now.log else { return };
    let run = (now.set, this);
    now.running.push(run);
    // The callback may call the library.
    drop(now);
    // SAFETY: only `prism_set_log` sets it, whose caller vouches for `user`; the text outlives the
    // call.
    unsafe { callback(user, message.as_ptr()) };
    let mut now = listening();
    if let Some(at) = now.running.iter().position(|r| *r == run) {
        now.running.swap_remove(at);
    }
    drop(now);
    ENDED.notify_all();
}
