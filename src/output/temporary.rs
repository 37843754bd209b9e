//! Temporary files: their names, the list of those of this process, and leftovers of others.

use crate::sync::{if_free, locked};
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;
use tempfile::NamedTempFile;

/// Temporary files of this process.
static TEMPORARY: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

pub(super) fn temporary() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    locked(&TEMPORARY)
}

/// The place of a temporary file in the list of all.
pub(super) struct Listed(PathBuf);

impl Listed {
    /// Has `make` make a temporary file, which is listed before [`abandon`] can read the list. It
    /// comes after its place, so that of two variables in this order the file is dropped first.
    pub(super) fn make(
        make: impl FnOnce() -> io::Result<NamedTempFile>,
    ) -> io::Result<(Self, NamedTempFile)> {
        let mut list = temporary();
        let file = make()?;
        list.insert(file.path().into());
        let listed = Listed(file.path().into());
        Ok((listed, file))
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        temporary().remove(&self.0);
    }
}

/// Removes the temporary files of this process, which the caller ends at once: what was begun will
/// not be finished. A thread that begins or ends another file waits for that end.
pub fn abandon() {
    let list = temporary();
    // No writer makes its file again: all open it by [`Pending::open`].
    remove(&list);
    std::mem::forget(list);
}

/// [`abandon`] for the case that this very thread may be using the list: then the files stay, for
/// the next run to remove.
pub(super) fn abandon_if_free() {
    if let Some(list) = if_free(&TEMPORARY) {
        remove(&list);
    }
}

fn remove(list: &BTreeSet<PathBuf>) {
    list.iter().for_each(|path| drop(std::fs::remove_file(path)));
}

/// The beginning of names of temporary files; a fixed number of letters and digits follows, then an
/// ending. Users do not name their own files like this.
pub(super) const PREFIX: &str = ".prism-tmp-";
pub(super) const RANDOM: usize = 16;

/// After this time a file that is not locked is a leftover; before, its writer may be just about to
/// lock it.
pub(super) const LEFT_OVER: Duration = Duration::from_secs(60);

/// Removes what processes that were killed left in a folder: such files hold data of patients'
/// scans. Files that are not certainly leftovers stay.
pub(super) fn sweep(folder: &Path) {
    static SWEPT: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    if !cfg!(unix) || !locked(&SWEPT).insert(folder.into()) {
        return;
    }
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for path in entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| is_temporary(p)) {
        let is_old = std::fs::symlink_metadata(&path).is_ok_and(|meta| {
            meta.is_file()
                && meta
                    .modified()
                    .ok()
                    .and_then(|at| at.elapsed().ok())
                    .is_some_and(|age| age > LEFT_OVER)
        });
        // The lock ended with the process that held it. Network file systems lock only files that
        // are open for writing.
        let unlocked = |file: File| file.try_lock().is_ok();
        if is_old && OpenOptions::new().write(true).open(&path).is_ok_and(unlocked) {
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// Whether a name is one that this module gives.
pub(super) fn is_temporary(path: &Path) -> bool {
    let name = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_prefix(PREFIX));
    name.is_some_and(|rest| {
        let random = rest.split('.').next().unwrap_or("");
        random.len() == RANDOM && random.bytes().all(|b| b.is_ascii_alphanumeric())
    })
}
