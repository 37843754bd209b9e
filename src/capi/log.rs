//! What the library has to say beside its results.

use super::status::{call, prism_status, text};
use std::ffi::{c_char, c_void};
use std::sync::{PoisonError, RwLock};

/// Called with a message: something was odd, and how it was understood. `message` is the caller's
/// for the duration of the call. It runs on the thread whose call has the message, within that
/// call, at times on several threads at once; it must not throw or jump out.
pub type prism_log_callback =
    Option<unsafe extern "C" fn(user: *mut c_void, message: *const c_char)>;

#[derive(Clone, Copy)]
struct Log(prism_log_callback, *mut c_void);
// SAFETY: the pointer is only handed back; whoever sets it vouches for its use on any thread.
unsafe impl Send for Log {}
// SAFETY: as above; shared, it is only copied.
unsafe impl Sync for Log {}

static LOG: RwLock<Log> = RwLock::new(Log(None, std::ptr::null_mut()));

/// Sends all messages of the process to `callback`, with `user` handed back to it; NULL for none.
/// Without a callback messages are dropped: the library writes nothing to the standard streams.
/// When this returns, a callback set before may still be running on another thread.
///
/// # Safety
/// `user` must stay usable, from any thread, until another callback was set and no call that began
/// before is under way.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prism_set_log(
    callback: prism_log_callback,
    user: *mut c_void,
) -> prism_status {
    call(|| {
        *LOG.write().unwrap_or_else(PoisonError::into_inner) = Log(callback, user);
        Ok(())
    })
}

/// Says something to whoever listens.
pub(super) fn say(message: &str) {
    let Log(callback, user) = *LOG.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(callback) = callback {
        // SAFETY: only `prism_set_log` sets it, whose caller vouches for `user`; the text outlives
        // the call.
        unsafe { callback(user, text(message).as_ptr()) };
    }
}
