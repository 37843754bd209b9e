//! Locks that a panic does not close.
//!
//! A mutex is poisoned when a panic, or a refusal of memory, unwinds through its holder. prism goes
//! on after that: callers keep what a mutex guards consistent wherever its holder may unwind, so
//! the next holder uses it as it is.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

/// Locks a mutex.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Locks a mutex that no thread holds; none if one does.
pub(crate) fn if_free<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(held) => Some(held),
        Err(TryLockError::Poisoned(held)) => Some(held.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// What a mutex guards, where no other thread can reach the mutex.
pub(crate) fn own<T>(mutex: &mut Mutex<T>) -> &mut T {
    mutex.get_mut().unwrap_or_else(PoisonError::into_inner)
}

/// Lets go of a mutex until there is news, and locks it again.
pub(crate) fn wait<'a, T>(news: &Condvar, held: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    news.wait(held).unwrap_or_else(PoisonError::into_inner)
}

/// Lets go of a mutex while `f` holds after each news, but at most for a given time, and locks it
/// again.
pub(crate) fn wait_while<'a, T>(
    news: &Condvar,
    held: MutexGuard<'a, T>,
    most: Duration,
    f: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'a, T> {
    news.wait_timeout_while(held, most, f).unwrap_or_else(PoisonError::into_inner).0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_whose_holder_panicked_is_used_on() {
        let (mut count, news) = (Mutex::new(1), Condvar::new());
        let holder = || {
            let held = locked(&count);
            if *held == 1 {
                std::panic::resume_unwind(Box::new("lost"));
            }
        };
        assert!(std::thread::scope(|scope| scope.spawn(holder).join().is_err()));
        assert!(count.is_poisoned());
        *locked(&count) += 1;
        assert_eq!(if_free(&count).map(|held| *held), Some(2));
        std::thread::scope(|scope| {
            let mut held = locked(&count);
            assert!(if_free(&count).is_none());
            // It cannot lock before this thread waits, and wakes it.
            scope.spawn(|| {
                *locked(&count) += 1;
                news.notify_all();
            });
            while *held < 3 {
                held = wait(&news, held);
            }
            let held = wait_while(&news, held, Duration::from_secs(600), |count| *count < 3);
            drop(wait_while(&news, held, Duration::ZERO, |count| *count == 3));
        });
        assert!(count.is_poisoned());
        assert_eq!(*own(&mut count), 3);
    }
}
