//! Files that appear whole or not at all: written under a temporary name beside their destination, then renamed.

use std::io;
use std::path::{Path, PathBuf};

/// A file in the making, removed again unless committed.
pub struct Pending {
    temporary: tempfile::TempPath,
    destination: PathBuf,
    permissions: std::fs::Permissions,
}

/// An error where no file could be put at `path`: it is a folder, or its folder is missing.
pub fn check(path: &Path) -> io::Result<()> {
    if path.file_name().is_none() || path.is_dir() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "an output must be a file name, not a folder"));
    }
    if !folder(path).is_dir() {
        let message = format!("its folder {} does not exist", folder(path).display());
        return Err(io::Error::new(io::ErrorKind::NotFound, message));
    }
    Ok(())
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

impl Pending {
    /// A new file in `path`'s folder, with `path`'s extensions (writers choose compression by them).
    pub fn new(path: &Path) -> io::Result<Pending> {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        check(path)?;
        let suffix = name.find('.').map_or("", |at| &name[at..]);
        let mut builder = tempfile::Builder::new();
        builder.prefix(".prism-").suffix(suffix);
        #[cfg(unix)]
        {
            // Temporary files are private by default; the result should be what the user's umask says.
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let file = builder.tempfile_in(folder(path))?;
        let permissions = file.as_file().metadata()?.permissions();
        Ok(Pending { temporary: file.into_temp_path(), destination: path.into(), permissions })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Where the file will be.
    pub fn destination(&self) -> &Path {
        &self.destination
    }

    /// Puts the finished file in its place.
    pub fn commit(self) -> io::Result<()> {
        // A writer may have replaced the file by one of its own.
        std::fs::set_permissions(&self.temporary, self.permissions)?;
        self.temporary.persist(&self.destination).map_err(|e| e.error)
    }
}

/// Writes a text file whole or not at all; an error names it.
pub fn write_text(path: &Path, text: &str) -> Result<(), String> {
    let fail = |e: io::Error| format!("{}: {e}", path.display());
    let pending = Pending::new(path).map_err(fail)?;
    std::fs::write(pending.path(), text).map_err(fail)?;
    pending.commit().map_err(fail)
}
