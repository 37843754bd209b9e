//! Where outputs go: paths and links, and folders that survive a power cut.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

/// A form of a path by which different spellings of it can be recognised: its folder without links
/// and dots, and its name.
pub fn spelled_out(path: &Path) -> PathBuf {
    let at = path.canonicalize().or_else(|_| destination(path)).unwrap_or_else(|_| path.into());
    match (folder(&at).canonicalize(), at.file_name()) {
        (Ok(folder), Some(name)) => folder.join(name),
        _ => at,
    }
}

/// A name without the differences that not all file systems tell apart: those of case.
pub fn uncased(name: &str) -> String {
    name.to_lowercase()
}

/// An error if two of these outputs are one file, or would be one on a file system that does not
/// tell upper and lower case apart.
///
/// # Errors
/// A message that names the first two of them.
pub fn all_differ(outputs: &[PathBuf]) -> Result<(), String> {
    let mut seen = BTreeMap::new();
    for output in outputs {
        let place = spelled_out(output);
        let name = place.file_name().unwrap_or_default();
        // Folders are spelled as they are called: where `A` and `a` are one, it is one spelling.
        // What is no text has no case.
        let name = name.to_str().map_or_else(|| name.to_os_string(), |n| uncased(n).into());
        if let Some(other) = seen.insert((folder(&place).to_path_buf(), name), output) {
            return Err(format!(
                "the outputs {} and {} are the same file, or differ only in upper and lower case, which not all file systems tell apart",
                other.display(),
                output.display()
            ));
        }
    }
    Ok(())
}

/// Checks that a file could be put at `path`.
///
/// # Errors
/// It is a folder or something else that is not a file, it is write-protected, or its folder is
/// missing.
pub fn check(path: &Path) -> io::Result<()> {
    destination(path).map(|_| ())
}

/// The actual location of the file called `path`: with symbolic links followed, if it is one.
pub(super) fn destination(path: &Path) -> io::Result<PathBuf> {
    let fail = |kind: io::ErrorKind, message: String| Err(io::Error::new(kind, message));
    let mut at = path.to_path_buf();
    if crate::input::was_read(path) {
        return fail(io::ErrorKind::InvalidInput, crate::input::IS_INPUT.into());
    }
    for _ in 0..=MOST_LINKS {
        if at.file_name().is_none() || at.is_dir() {
            return fail(
                io::ErrorKind::InvalidInput,
                "an output must be a file name, not a folder".into(),
            );
        }
        if !folder(&at).is_dir() {
            return fail(
                io::ErrorKind::NotFound,
                format!("its folder {} does not exist", folder(&at).display()),
            );
        }
        match std::fs::symlink_metadata(&at) {
            Ok(meta) if meta.is_symlink() => at = folder(&at).join(std::fs::read_link(&at)?),
            Ok(meta) if !meta.is_file() => {
                return fail(
                    io::ErrorKind::InvalidInput,
                    "is not a regular file: it is not overwritten".into(),
                );
            }
            Ok(meta) if meta.permissions().readonly() => {
                return fail(
                    io::ErrorKind::PermissionDenied,
                    "is write-protected: it is not overwritten".into(),
                );
            }
            // If it has another owner, the folder may let it be replaced although its mode does not
            // let it be written.
            Ok(_) => return OpenOptions::new().append(true).open(&at).map(|_| at),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(at),
            Err(e) => return Err(e),
        }
    }
    fail(
        io::ErrorKind::InvalidInput,
        format!("it leads through more than {MOST_LINKS} symbolic links"),
    )
}

/// The most symbolic links that are followed from one to the next.
const MOST_LINKS: usize = 32;

/// The folder that contains a path.
pub(crate) fn folder(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes sure that the names in a folder survive a power cut. If it may not be opened, or its file
/// system, as some network file systems, or the operating system cannot do that, the names are
/// there all the same.
///
/// # Errors
/// The names may not be on the disk: it failed or is full, or too many files are open to ask it.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    #[cfg(test)]
    if SYNC_FAILS.get() {
        return Err(io::Error::other("a disk that fails"));
    }
    let synced = File::open(path).and_then(|folder| folder.sync_all());
    // Windows opens no folder like this.
    synced.or_else(|e| if cfg!(windows) || is_unsupported(&e) { Ok(()) } else { Err(e) })
}

/// [`sync_folder`] for the folder of a file that was just put there.
pub(super) fn sync_name(file: &Path) -> io::Result<()> {
    sync_folder(folder(file)).map_err(|e| {
        let said = "it is in its place, but its folder could not be synchronised";
        io::Error::new(e.kind(), format!("{said} ({e}): a power cut may remove it"))
    })
}

#[cfg(test)]
thread_local! {
    /// Whether [`sync_folder`] fails on this thread, as on a disk that fails.
    pub(crate) static SYNC_FAILS: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Whether an error only says that a folder cannot be synchronised here.
fn is_unsupported(e: &io::Error) -> bool {
    use io::ErrorKind::{InvalidInput, PermissionDenied, Unsupported};
    matches!(e.kind(), InvalidInput | PermissionDenied | Unsupported)
        || cfg!(unix) && matches!(e.raw_os_error(), Some(libc::EBADF | libc::ENOTSUP))
}

/// Makes a folder if it does not exist, with those above it, so that it survives a power cut.
///
/// # Errors
/// Those of the operating system.
pub fn make_folder(path: &Path) -> io::Result<()> {
    let is_missing = |at: &&Path| !at.as_os_str().is_empty() && !at.exists();
    let missing: Vec<&Path> = path.ancestors().take_while(is_missing).collect();
    std::fs::create_dir_all(path)?;
    missing.into_iter().try_for_each(|made| sync_folder(folder(made)))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use crate::output::write_bytes;

    #[test]
    fn only_folders_that_cannot_be_synchronised_go_without() {
        let error = io::Error::from_raw_os_error;
        for code in [libc::EINVAL, libc::ENOTSUP, libc::EBADF, libc::EACCES] {
            assert!(is_unsupported(&error(code)), "{}", error(code));
        }
        for code in [libc::EIO, libc::ENOSPC, libc::EDQUOT] {
            assert!(!is_unsupported(&error(code)), "{}", error(code));
        }
        let folder = tempfile::tempdir().unwrap();
        sync_folder(folder.path()).unwrap();
        // That a folder is not there, or not found, is not what such file systems say.
        let error = sync_folder(&folder.path().join("none")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        // If that fails, the file is in its place, with the one that it refers to.
        let pending = |name: &str| write_bytes(&folder.path().join(name), b"new").unwrap();
        let (one, two) = (pending("m"), pending("header").naming(pending("voxels")));
        SYNC_FAILS.set(true);
        let errors = [one, two].map(|pending| pending.commit().unwrap_err().to_string());
        SYNC_FAILS.set(false);
        assert!(errors.iter().all(|e| e.contains("is in its place")), "{errors:?}");
        for name in ["m", "header", "voxels"] {
            assert_eq!(std::fs::read(folder.path().join(name)).unwrap(), b"new");
        }
    }
}
