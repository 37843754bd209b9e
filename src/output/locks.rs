//! Files that keep other processes away.

use super::folder;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::Path;

/// A file that other processes find locked for as long as this lives.
pub struct Lock {
    _file: File,
    warning: Option<String>,
}

impl Lock {
    /// What a user should know: that the file could not be locked, as on a file system without
    /// locks, so that other processes are not kept away.
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }

    /// The outcome of trying to lock a file called `path`; none if another process has the lock.
    pub(crate) fn of(path: &Path, file: File, tried: Result<(), TryLockError>) -> Option<Lock> {
        let warning = match tried {
            Ok(()) => None,
            Err(TryLockError::WouldBlock) => return None,
            Err(TryLockError::Error(e)) => Some(format!(
                "{}: cannot be locked ({e}): see to it that no other process writes to {}",
                path.display(),
                folder(path).display()
            )),
        };
        Some(Lock { _file: file, warning })
    }
}

/// Locks what a file called `name` stands for in a folder, so that other processes do not write it
/// for as long as the result lives; none if another process has the lock. What the file contains
/// stays.
///
/// # Errors
/// The file cannot be made; the message names it.
pub fn lock(folder: &Path, name: &str) -> Result<Option<Lock>, String> {
    let path = folder.join(name);
    let file = to_lock(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let tried = file.try_lock();
    Ok(Lock::of(&path, file, tried))
}

/// Opens a file to lock it, which is made if there is none. It is not truncated: it may be, or be a
/// link to, a file of the user's.
pub(crate) fn to_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(false).open(path)
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_lock_leaves_the_content_and_says_where_there_are_none() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("notes"), "a user's").unwrap();
        symlink("notes", at("run.lock")).unwrap();
        let held = lock(folder.path(), "run.lock").unwrap().unwrap();
        assert!(held.warning().is_none());
        assert!(lock(folder.path(), "run.lock").unwrap().is_none(), "it is held");
        drop(held);
        assert!(lock(folder.path(), "run.lock").unwrap().is_some());
        assert_eq!(std::fs::read(at("notes")).unwrap(), b"a user's");
        // As a file system without locks answers.
        let file = to_lock(&at("notes")).unwrap();
        let refused = TryLockError::Error(io::Error::from_raw_os_error(libc::ENOTSUP));
        let lock = Lock::of(&at("notes"), file, Err(refused)).unwrap();
        assert!(lock.warning().unwrap().contains("cannot be locked"));
    }
}
