//! Files that appear whole or not at all: written under a temporary name beside their destination,
//! then renamed ([`Pending`]).

mod access;
mod locks;
mod places;
mod temporary;
mod tensors;

pub(crate) use locks::to_lock;
pub use locks::{Lock, lock};
#[cfg(all(test, feature = "serve"))]
pub(crate) use places::SYNC_FAILS;
pub(crate) use places::folder;
#[cfg(feature = "serve")]
pub(crate) use places::sync_folder;
pub use places::{all_differ, check, make_folder, spelled_out, uncased};
pub use temporary::abandon;
pub(crate) use tensors::write_tensors;

use access::take_access;
use places::{destination, sync_name};
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use temporary::{Listed, PREFIX, RANDOM, abandon_if_free, sweep};

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

/// Writes a file of bytes, to appear when the result is committed.
///
/// # Errors
/// Those of [`Pending::new`], and those of writing.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> io::Result<Pending> {
    let pending = Pending::new(path, "")?;
    pending.open()?.write_all(bytes)?;
    Ok(pending)
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
    use super::access::of_another_group;
    use super::temporary::{LEFT_OVER, temporary};
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::{PermissionsExt, symlink};

    pub(super) fn mode_of(path: &Path) -> u32 {
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
}
