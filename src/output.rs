//! Files that appear whole or not at all: written under a temporary name beside their destination,
//! then renamed ([`Pending`]).

use crate::sync::{if_free, locked};
use safetensors::tensor::{Metadata, TensorInfo, View};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{File, OpenOptions, Permissions, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;
use tempfile::NamedTempFile;

/// A file that is being written under a temporary name. [`Pending::commit`] puts it in its place;
/// dropped without that, it is removed.
pub struct Pending {
    temporary: tempfile::TempPath,
    /// Locked for as long as the file is being written.
    _lock: File,
    destination: PathBuf,
    /// The access rights of the file if nothing is at its destination by then.
    permissions: Permissions,
    /// A file that this one refers to: it takes its place before this one does.
    named: Option<Box<Pending>>,
    _listed: Listed,
}

/// Temporary files of this process.
static TEMPORARY: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn temporary() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    locked(&TEMPORARY)
}

/// The place of a temporary file in the list of all.
struct Listed(PathBuf);

impl Listed {
    /// Has `make` make a temporary file, which is listed before [`abandon`] can read the list. It
    /// comes after its place, so that of two variables in this order the file is dropped first.
    fn make(make: impl FnOnce() -> io::Result<NamedTempFile>) -> io::Result<(Self, NamedTempFile)> {
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
fn abandon_if_free() {
    if let Some(list) = if_free(&TEMPORARY) {
        remove(&list);
    }
}

fn remove(list: &BTreeSet<PathBuf>) {
    list.iter().for_each(|path| drop(std::fs::remove_file(path)));
}

/// The beginning of names of temporary files; a fixed number of letters and digits follows, then an
/// ending. Users do not name their own files like this.
const PREFIX: &str = ".prism-tmp-";
const RANDOM: usize = 16;

/// After this time a file that is not locked is a leftover; before, its writer may be just about to
/// lock it.
const LEFT_OVER: Duration = Duration::from_secs(60);

/// Removes what processes that were killed left in a folder: such files hold data of patients'
/// scans. Files that are not certainly leftovers stay.
fn sweep(folder: &Path) {
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
fn is_temporary(path: &Path) -> bool {
    let name = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_prefix(PREFIX));
    name.is_some_and(|rest| {
        let random = rest.split('.').next().unwrap_or("");
        random.len() == RANDOM && random.bytes().all(|b| b.is_ascii_alphanumeric())
    })
}

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
fn destination(path: &Path) -> io::Result<PathBuf> {
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
fn sync_name(file: &Path) -> io::Result<()> {
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

impl Pending {
    /// A new file in `path`'s folder, with the ending by which its writer chooses a format, or none
    /// if the writer knows it.
    ///
    /// # Errors
    /// Those of [`check`], and those of the operating system.
    pub fn new(path: &Path, ending: &str) -> io::Result<Pending> {
        let destination = destination(path)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(PREFIX).rand_bytes(RANDOM).suffix(ending);
        // In place of a file that is there, it is private while it is written: it gets that one's
        // mode at the end. A new one has the mode that the user's umask, or the folder's access
        // list, gives from the beginning: only the system knows it.
        let there = std::fs::metadata(&destination).ok();
        #[cfg(unix)]
        if there.is_none() {
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(Permissions::from_mode(0o666));
        }
        sweep(folder(&destination));
        crate::memory::before_last_words(abandon_if_free);
        let (listed, file) = Listed::make(|| builder.tempfile_in(folder(&destination)))?;
        // By this another process can tell that it is not a leftover. If files cannot be locked,
        // none is taken for a leftover.
        let lock = file.as_file().try_clone()?;
        // On Windows a lock would keep out the writer, which opens the file by its name.
        if cfg!(unix) {
            let _ = lock.try_lock();
        }
        let permissions = there.map_or_else(|| file.as_file().metadata(), Ok)?.permissions();
        Ok(Pending {
            temporary: file.into_temp_path(),
            _lock: lock,
            destination,
            permissions,
            named: None,
            _listed: listed,
        })
    }

    /// This file with another that it refers to, which takes its place just before.
    pub fn naming(self, file: Pending) -> Pending {
        Pending { named: Some(Box::new(file)), ..self }
    }

    /// Where the file is while it is written, by [`Pending::open`] alone.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Opens the file to be written from its beginning. If it was removed, because the process is
    /// told to end ([`abandon`]), it is not made again.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn open(&self) -> io::Result<File> {
        OpenOptions::new().write(true).truncate(true).open(&self.temporary)
    }

    /// Where the file will be.
    pub fn destination(&self) -> &Path {
        &self.destination
    }

    /// Puts the finished file in its place, so that it is there, whole, even after a power cut.
    ///
    /// # Errors
    /// Those of the operating system. In that case a file that it refers to is not left behind if
    /// none was there before. If only the folder could not be synchronised, which the message says,
    /// both are in their places, but may be lost by a power cut.
    pub fn commit(mut self) -> io::Result<()> {
        let named = self.named.take().map(|file| *file);
        // Everything that can fail is done before the first file takes its place.
        self.settle()?;
        let Some(named) = named else { return sync_name(&self.put()?) };
        named.settle()?;
        let is_new = !named.destination.exists();
        let file = named.put()?;
        // The name that the other refers to is on the disk before the other is. If that fails, the
        // other takes its place all the same: the two are complete, and belong together.
        let synced = sync_name(&file);
        let put = self.put().inspect_err(|_| {
            if is_new {
                let _ = std::fs::remove_file(&file);
            }
        })?;
        synced.and(sync_name(&put))
    }

    /// Gives a file its final access rights, and writes all of it to the disk.
    fn settle(&self) -> io::Result<()> {
        // By its name: one that was removed, because the process is told to end, is an error here.
        let file = OpenOptions::new().append(true).open(&self.temporary)?;
        // A file that is there keeps them, as they are by now.
        match std::fs::metadata(&self.destination) {
            Ok(there) => take_access(&file, &self.destination, &there)?,
            Err(_) => file.set_permissions(self.permissions.clone())?,
        }
        file.sync_all()
    }

    /// Renames a file; returns where it is.
    fn put(self) -> io::Result<PathBuf> {
        self.temporary.persist(&self.destination).map_err(|e| e.error)?;
        Ok(self.destination)
    }
}

/// Gives a new file the group, the access list and the mode of the one at `from`, which it is to
/// replace. Where it cannot have the group or the list, no user has more rights than before: all
/// but its owner then have fewer, or none.
#[cfg(unix)]
fn take_access(file: &File, from: &Path, there: &std::fs::Metadata) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
    // The mode comes last: until then the file is private.
    let (own, group) = (file.metadata()?.gid(), there.gid());
    let has_group = own == group || fchown(file, None, Some(group)).is_ok();
    let mode = match (take_list(file, from, has_group), has_group) {
        (None | Some(true), true) => there.mode() & 0o7777,
        (None, false) => of_another_group(there.mode()),
        // With a list, the mode's bits of the group are only a bound for what the list grants.
        (Some(_), _) => there.mode() & 0o700,
    };
    file.set_permissions(Permissions::from_mode(mode))
}

#[cfg(not(unix))]
fn take_access(file: &File, _from: &Path, there: &std::fs::Metadata) -> io::Result<()> {
    file.set_permissions(there.permissions())
}

/// A mode in place of one that was about another group: both the new group, whose users were among
/// the others, and the others, who include the old group now, have what both had.
#[cfg(unix)]
fn of_another_group(mode: u32) -> u32 {
    let both = (mode >> 3) & mode & 0o007;
    (mode & 0o700) | (both << 3) | both
}

/// The attribute that is a file's POSIX access list.
#[cfg(target_os = "linux")]
const LIST: &std::ffi::CStr = c"system.posix_acl_access";

/// Whether an error of a call about a file's access list says that there is none: the file has
/// none, its file system knows none, or the system refuses all such calls, as in a sandbox.
#[cfg(target_os = "linux")]
fn is_without_list(e: &io::Error) -> bool {
    use libc::{EINVAL, ENODATA, ENOSYS, ENOTSUP, EPERM};
    matches!(e.raw_os_error(), Some(ENODATA | ENOTSUP | EPERM | ENOSYS | EINVAL))
}

/// Gives a file the POSIX access list of the one at `from`, or none if that has none or the file
/// has another group: what a list says of the file's group would be about other users. Returns
/// whether it has that list, or nothing if neither has one.
#[cfg(target_os = "linux")]
fn take_list(file: &File, from: &Path, has_group: bool) -> Option<bool> {
    use std::ffi::CString;
    use std::os::fd::AsRawFd;
    use std::os::unix::ffi::OsStrExt;
    let has_none = || is_without_list(&io::Error::last_os_error());
    // A thousand entries.
    let mut list = [0u8; 8 << 10];
    let Ok(path) = CString::new(from.as_os_str().as_bytes()) else { return Some(false) };
    let (to, most) = (list.as_mut_ptr().cast(), list.len());
    // SAFETY: both names end with a NUL, and at most as many bytes are written as there are.
    let length = unsafe { libc::getxattr(path.as_ptr(), LIST.as_ptr(), to, most) };
    let length = usize::try_from(length).ok();
    if length.is_none() && !has_none() {
        return Some(false);
    }
    let Some(length) = length.filter(|_| has_group) else {
        // The new file may have one from its folder.
        // SAFETY: the name ends with a NUL, and the file is open.
        let removed = unsafe { libc::fremovexattr(file.as_raw_fd(), LIST.as_ptr()) };
        let is_left = removed != 0 && !has_none();
        return (is_left || length.is_some()).then_some(false);
    };
    let from = list.as_ptr().cast();
    // SAFETY: the name ends with a NUL, the file is open, and `length` bytes were written above.
    Some(unsafe { libc::fsetxattr(file.as_raw_fd(), LIST.as_ptr(), from, length, 0) } == 0)
}

#[cfg(all(unix, not(target_os = "linux")))]
fn take_list(_file: &File, _from: &Path, _has_group: bool) -> Option<bool> {
    None
}

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

/// Writes a file of bytes, to appear when the result is committed.
///
/// # Errors
/// Those of [`Pending::new`], and those of writing.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> io::Result<Pending> {
    let pending = Pending::new(path, "")?;
    pending.open()?.write_all(bytes)?;
    Ok(pending)
}

/// The most bytes of a header that safetensors reads.
const MOST_HEADER: usize = 100_000_000;

/// Writes a file of tensors (safetensors) whole or not at all, with a text in its metadata.
///
/// There is one text, under a key: several would be in another order each time, and the same
/// tensors would give different files.
///
/// Tensors are asked for their bytes one after the other. The crate's own function would write to a
/// temporary file that only it knows.
///
/// # Errors
/// Those of [`Pending::new`], and those of writing; or a tensor's bytes are not as many as its
/// shape and type say, or the header is longer than safetensors reads.
pub(crate) fn write_tensors<V: View>(
    path: &Path,
    key: &str,
    text: String,
    tensors: Vec<(String, V)>,
) -> io::Result<()> {
    let pending = Pending::new(path, "")?;
    // It collects what is small: longer pieces go to the file as they are.
    let mut file = BufWriter::new(pending.open()?);
    put_tensors(&mut file, HashMap::from([(key.to_string(), text)]), tensors, MOST_HEADER)?;
    drop(file.into_inner()?);
    pending.commit()
}

/// Writes tensors in the format safetensors, as its crate does: the header's length, the header,
/// and the bytes of one tensor after the other. Of a header of more than `most` bytes nothing is
/// written.
fn put_tensors<V: View>(
    to: &mut impl Write,
    metadata: HashMap<String, String>,
    mut tensors: Vec<(String, V)>,
    most: usize,
) -> io::Result<()> {
    // Those of long elements first, so that each begins at a multiple of its element's size.
    tensors.sort_by(|(a, x), (b, y)| y.dtype().cmp(&x.dtype()).then_with(|| a.cmp(b)));
    let mut end = 0;
    let places = tensors.iter().map(|(name, tensor)| {
        let begin = end;
        end += tensor.data_len();
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        (name.clone(), TensorInfo { dtype, shape, data_offsets: (begin, end) })
    });
    let header = Metadata::new(Some(metadata), places.collect()).map_err(io::Error::other)?;
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    if header.len() > most {
        let length = header.len();
        return Err(io::Error::other(format!("a header of {length} bytes, expected up to {most}")));
    }
    to.write_all(&(header.len() as u64).to_le_bytes())?;
    to.write_all(&header)?;
    tensors.iter().try_for_each(|(name, tensor)| {
        let (bytes, expected) = (tensor.data(), tensor.data_len());
        if bytes.len() != expected {
            let length = bytes.len();
            let message = format!("tensor '{name}' has {length} bytes, expected {expected}");
            return Err(io::Error::other(message));
        }
        to.write_all(&bytes)
    })
}

/// Writes a text file whole or not at all.
///
/// # Errors
/// It cannot be written; the message names it.
pub fn write_text(path: &Path, text: &str) -> Result<(), String> {
    // A file that already has this text is left alone, even if it is an input.
    if std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() == text.len() as u64)
        && std::fs::read(path).is_ok_and(|there| there == text.as_bytes())
    {
        return Ok(());
    }
    write_bytes(path, text.as_bytes())
        .and_then(Pending::commit)
        .map_err(|e| format!("{}: {e}", path.display()))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use safetensors::tensor::{Dtype, TensorView};
    use std::borrow::Cow;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn mode_of(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn what_is_there_is_followed_kept_or_left() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mode = |name: &str, mode: u32| {
            std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(mode)).unwrap()
        };
        std::fs::create_dir(at("sub")).unwrap();
        symlink("sub/real", at("link")).unwrap();
        symlink("link", at("twice")).unwrap();
        write_text(&at("twice"), "a").unwrap();
        assert!(at("link").is_symlink() && at("twice").is_symlink());
        assert_eq!(std::fs::read_to_string(at("sub/real")).unwrap(), "a");
        // The file's mode stays, no matter who can read it.
        mode("sub/real", 0o600);
        write_text(&at("link"), "b").unwrap();
        assert_eq!(mode_of(&at("sub/real")), 0o600);
        mode("sub/real", 0o444);
        assert!(write_text(&at("link"), "c").unwrap_err().contains("write-protected"));
        assert_eq!(std::fs::read_to_string(at("sub/real")).unwrap(), "b");
        symlink("loop", at("loop")).unwrap();
        assert!(write_text(&at("loop"), "c").is_err());
        assert!(write_text(&at("sub"), "c").unwrap_err().contains("not a folder"));
        assert!(write_text(&at("none/a"), "c").unwrap_err().contains("does not exist"));
        assert!(
            check(Path::new("/dev/null")).unwrap_err().to_string().contains("not a regular file")
        );
        mode("sub/real", 0o644);
        assert_eq!(spelled_out(&at("sub/../link")), spelled_out(&at("sub/real")));
        assert_eq!(spelled_out(&at("sub/../new")), spelled_out(&at("./new")));
        for (a, b, differ) in [
            ("new", "other", true),
            ("sub/../new", "./new", false),
            ("M.nii", "m.nii", false),
            ("link", "sub/real", false),
        ] {
            let said = all_differ(&[at(a), at("third"), at(b)]);
            assert_eq!(said.is_ok(), differ, "{a}, {b}: {said:?}");
            assert!(said.err().is_none_or(|e| e.contains(a) && e.contains(b)));
        }
        // Only the names count, not those of folders that exist; and not what is no text.
        if std::fs::create_dir(at("sub/A")).and(std::fs::create_dir(at("sub/a"))).is_ok() {
            assert_eq!(all_differ(&[at("sub/A/m.nii"), at("sub/a/m.nii")]), Ok(()));
            assert!(all_differ(&[at("sub/A/M.nii"), at("sub/A/m.nii")]).is_err());
        }
        let [one, other] = [&b"m\xff.nii"[..], b"m\xfe.nii"].map(OsStr::from_bytes);
        let [one, other] = [one, other].map(|name| folder.path().join(name));
        assert_eq!(all_differ(&[one.clone(), other]), Ok(()));
        assert!(all_differ(&[one.clone(), one]).is_err());
        // Leftovers of a killed process are removed; files that are still being written, new ones
        // and other users' files stay.
        let old = std::time::SystemTime::now() - 2 * LEFT_OVER;
        for name in [
            ".prism-tmp-abcdef0123456789.nii",
            ".prism-tmp-bcdef0123456789a",
            ".prism-secret",
            ".prism-tmp-cdef0123456789ab.nii.gz",
        ] {
            let file = File::create(at("sub").join(name)).unwrap();
            if name != ".prism-tmp-cdef0123456789ab.nii.gz" {
                file.set_modified(old).unwrap();
            }
        }
        let busy = File::open(at("sub/.prism-tmp-bcdef0123456789a")).unwrap();
        busy.try_lock().unwrap();
        sweep(&at("sub/../sub"));
        let there = |name: &str| at("sub").join(name).exists();
        assert!(!there(".prism-tmp-abcdef0123456789.nii") && there(".prism-tmp-bcdef0123456789a"));
        assert!(there(".prism-secret") && there(".prism-tmp-cdef0123456789ab.nii.gz"));
        for _ in 0..2 {
            make_folder(&at("sub/one/two")).unwrap();
            assert!(at("sub/one/two").is_dir());
        }
        assert!(make_folder(&at("sub/real/three")).is_err(), "a folder within a file");
        let pending = write_bytes(&at("never"), b"d").unwrap();
        assert!(temporary().contains(pending.path()));
        drop(pending);
        // What is removed as the process ends is not made again.
        let pending = Pending::new(&at("never"), "").unwrap();
        std::fs::remove_file(pending.path()).unwrap();
        assert_eq!(pending.open().unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(!pending.path().exists());
        drop(pending);
        let left: Vec<_> =
            std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 4, "{left:?}");
    }

    #[test]
    fn a_file_is_never_readable_by_more_than_the_one_it_replaces() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let set = |name: &str, mode: u32| {
            std::fs::set_permissions(at(name), Permissions::from_mode(mode)).unwrap()
        };
        for mode in [0o600, 0o640, 0o664, 0o666] {
            std::fs::write(at("there"), "old").unwrap();
            set("there", mode);
            let pending = write_bytes(&at("there"), b"new").unwrap();
            assert_eq!(mode_of(pending.path()), 0o600, "{mode:o}");
            pending.open().unwrap().write_all(b"newer").unwrap();
            assert_eq!(mode_of(pending.path()), 0o600, "{mode:o}");
            pending.commit().unwrap();
            assert_eq!(mode_of(&at("there")), mode, "{mode:o}");
            assert_eq!(std::fs::read(at("there")).unwrap(), b"newer");
        }
        // It was made private while the other was being written.
        let pending = write_bytes(&at("there"), b"new").unwrap();
        set("there", 0o600);
        pending.commit().unwrap();
        assert_eq!(mode_of(&at("there")), 0o600);
        // A new file has the mode of all new files there.
        File::create(at("plain")).unwrap();
        let pending = write_bytes(&at("new"), b"new").unwrap();
        assert_eq!(mode_of(pending.path()), mode_of(&at("plain")));
        pending.commit().unwrap();
        assert_eq!(mode_of(&at("new")), mode_of(&at("plain")));
        // Where the group cannot be kept, neither the new one's nor the old one's users get more.
        for (mode, without) in
            [(0o640, 0o600), (0o664, 0o644), (0o666, 0o666), (0o604, 0o600), (0o2646, 0o644)]
        {
            assert_eq!(of_another_group(mode), without, "{mode:o}");
        }
    }

    #[test]
    fn tensors_are_written_as_by_their_crate() {
        let bytes: Vec<u8> = (0..=255).cycle().take(20_000).collect();
        let all = [
            ("b", Dtype::F32, vec![3, 5]),
            ("a", Dtype::F32, vec![40, 100]),
            ("of \"é\"\n", Dtype::U8, vec![7]),
            ("none", Dtype::F16, vec![0, 4]),
            ("one", Dtype::F64, vec![]),
            ("c", Dtype::BF16, vec![9000]),
            ("d", Dtype::I64, vec![1, 2, 3]),
            ("e", Dtype::BOOL, vec![3]),
        ];
        let one = |(at, (name, dtype, shape)): (usize, &(&str, Dtype, Vec<usize>))| {
            let size = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            let view = TensorView::new(*dtype, shape.clone(), &bytes[at..at + size]).unwrap();
            (name.to_string(), view)
        };
        for count in 0..=all.len() {
            let tensors: Vec<_> = all[..count].iter().enumerate().map(one).collect();
            // None, and so many that every length of padding comes up.
            for length in 0..=8 {
                let text = (length > 0).then(|| ("key".to_string(), "x".repeat(length)));
                let metadata: HashMap<String, String> = text.into_iter().collect();
                let mut own: Vec<u8> = vec![];
                put_tensors(&mut own, metadata.clone(), tensors.clone(), MOST_HEADER).unwrap();
                let theirs = safetensors::serialize(tensors.clone(), Some(metadata)).unwrap();
                assert!(own == theirs, "{count} tensors, a text of {length} characters");
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("all");
        let tensors: Vec<_> = all.iter().enumerate().map(one).collect();
        write_tensors(&path, "key", "text".to_string(), tensors.clone()).unwrap();
        let metadata = HashMap::from([("key".to_string(), "text".to_string())]);
        let theirs = safetensors::serialize(tensors, Some(metadata)).unwrap();
        assert!(std::fs::read(&path).unwrap() == theirs);
    }

    /// A tensor of three bytes, or what says that it is, that does something when asked for them.
    struct Asked<F>(F);

    impl<F: Fn() -> &'static [u8]> View for Asked<F> {
        fn dtype(&self) -> Dtype {
            Dtype::U8
        }
        fn shape(&self) -> &[usize] {
            &[3]
        }
        fn data(&self) -> Cow<'_, [u8]> {
            Cow::Borrowed((self.0)())
        }
        fn data_len(&self) -> usize {
            3
        }
    }

    #[test]
    fn tensors_go_to_the_listed_file_and_to_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        let others = || -> Vec<PathBuf> {
            let entries = std::fs::read_dir(folder.path()).unwrap();
            entries.map(|entry| entry.unwrap().path()).filter(|at| *at != path).collect()
        };
        // Writes a file, and does something with the temporary one meanwhile.
        let write = |text: &str, meanwhile: &dyn Fn(&Path)| {
            let asked = || {
                let there = others();
                assert!(matches!(&there[..], [file] if is_temporary(file)), "{there:?}");
                assert!(temporary().contains(&there[0]), "{there:?}");
                meanwhile(&there[0]);
                &b"abc"[..]
            };
            write_tensors(&path, "key", text.to_string(), vec![("t".to_string(), Asked(asked))])
        };
        write("first", &|_| {}).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        write("second", &|file| assert_eq!(mode_of(file), 0o600)).unwrap();
        assert_eq!(mode_of(&path), 0o640);
        assert!(others().is_empty(), "{:?}", others());
        // What is removed as the process ends is not made again.
        let before = std::fs::read(&path).unwrap();
        let error = write("third", &|file| std::fs::remove_file(file).unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(others().is_empty(), "{:?}", others());
        assert_eq!(std::fs::read(&path).unwrap(), before);
        // One that has fewer bytes than it says.
        let short = vec![("t".to_string(), Asked(|| &b"ab"[..]))];
        let error = write_tensors(&path, "key", String::new(), short).unwrap_err().to_string();
        assert_eq!(error, "tensor 't' has 2 bytes, expected 3");
        assert_eq!(std::fs::read(&path).unwrap(), before);
        // A header that no one would read.
        let mut own: Vec<u8> = vec![];
        let one = || vec![("t".to_string(), Asked(|| &b"abc"[..]))];
        put_tensors(&mut own, HashMap::new(), one(), MOST_HEADER).unwrap();
        let header = own.len() - 8 - 3;
        own.clear();
        assert!(put_tensors(&mut own, HashMap::new(), one(), header - 1).is_err());
        assert!(own.is_empty());
        put_tensors(&mut own, HashMap::new(), one(), header).unwrap();
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_list_is_not_given_without_the_group() {
        use std::os::fd::AsRawFd;
        let error = io::Error::from_raw_os_error;
        for code in [libc::ENODATA, libc::ENOTSUP, libc::EPERM, libc::ENOSYS, libc::EINVAL] {
            assert!(is_without_list(&error(code)), "{}", error(code));
        }
        for code in [libc::EIO, libc::EACCES, libc::ERANGE] {
            assert!(!is_without_list(&error(code)), "{}", error(code));
        }
        // Owner, one more user, group, bound, others: what each is, their rights, and who.
        let entries = [(1u16, 6u16, !0u32), (2, 4, 4321), (4, 4, !0), (16, 4, !0), (32, 0, !0)];
        let mut list = 2u32.to_le_bytes().to_vec();
        for (kind, rights, who) in entries {
            list.extend(kind.to_le_bytes());
            list.extend(rights.to_le_bytes());
            list.extend(who.to_le_bytes());
        }
        let give = |file: &File| {
            let (from, length) = (list.as_ptr().cast(), list.len());
            // SAFETY: the name ends with a NUL, the file is open, and the list is `length` bytes.
            unsafe { libc::fsetxattr(file.as_raw_fd(), LIST.as_ptr(), from, length, 0) == 0 }
        };
        let has_one = |file: &File| {
            let to = std::ptr::null_mut();
            // SAFETY: the name ends with a NUL, the file is open, and nothing is written.
            unsafe { libc::fgetxattr(file.as_raw_fd(), LIST.as_ptr(), to, 0) > 0 }
        };
        let folder = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| folder.path().join(name));
        let [there, file] = [&from, &to].map(|path| File::create(path).unwrap());
        if !give(&there) {
            return eprintln!("skipped: files have no access lists here");
        }
        // As one that has a list from its folder, and is private while it is written.
        assert!(give(&file));
        file.set_permissions(Permissions::from_mode(0o600)).unwrap();
        assert_eq!(take_list(&file, &from, false), Some(false));
        assert!(!has_one(&file) && mode_of(&to) == 0o600);
        assert_eq!(take_list(&file, &from, true), Some(true));
        assert!(has_one(&file) && mode_of(&to) == 0o640);
    }

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
