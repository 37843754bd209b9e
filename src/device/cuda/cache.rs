//! Files that are kept between runs: compiled kernels, and tables of chosen variants.
//!
//! They are in `PRISM_CACHE` (by default `$XDG_CACHE_HOME/prism` or `~/.cache/prism`), under names
//! that hold a hash of what they were made from. They appear whole or not at all, and carry a
//! checksum, so that concurrent writers and damaged files do no harm.

use crate::output::{self, Pending, make_folder};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// More bytes than any of these files has.
const MOST: u64 = 64 << 20;

/// The folder; none if no place is known.
pub(super) fn folder() -> Option<PathBuf> {
    let from = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    from("PRISM_CACHE")
        .or_else(|| from("XDG_CACHE_HOME").map(|p| p.join("prism")))
        .or_else(|| from("HOME").map(|p| p.join(".cache/prism")))
}

/// The contents of a file; none if it is not intact.
pub(super) fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    if std::fs::metadata(path)?.len() > MOST {
        return Ok(None);
    }
    let mut bytes = std::fs::read(path)?;
    let Some(length) = bytes.len().checked_sub(8) else { return Ok(None) };
    let mut sum = Fnv::new();
    sum.add(&bytes[..length]);
    if bytes[length..] != sum.0.to_le_bytes() {
        return Ok(None);
    }
    bytes.truncate(length);
    Ok(Some(bytes))
}

/// Locks a file, by another beside it: waits until no other process or thread has it locked, and
/// keeps them waiting for as long as the result is open. On a file system without locks there is no
/// waiting.
pub(super) fn lock(path: &Path) -> io::Result<File> {
    make_folder(output::folder(path))?;
    let file = output::to_lock(&path.with_extension("lock"))?;
    while file.lock().is_err_and(|e| e.kind() == io::ErrorKind::Interrupted) {}
    Ok(file)
}

/// Writes a file, and its folder if there is none.
pub(super) fn write(path: &Path, contents: &[u8]) -> io::Result<()> {
    make_folder(output::folder(path))?;
    let pending = Pending::new(path, "")?;
    let mut file = pending.open()?;
    let mut sum = Fnv::new();
    sum.add(contents);
    file.write_all(contents)?;
    file.write_all(&sum.0.to_le_bytes())?;
    drop(file);
    pending.commit()
}

/// FNV-1a, 64 bits.
pub(super) struct Fnv(pub(super) u64);

impl Fnv {
    pub(super) fn new() -> Fnv {
        Fnv(0xcbf2_9ce4_8422_2325)
    }

    pub(super) fn add(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = (self.0 ^ *b as u64).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_has_no_contents() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/x.cubin");
        assert_eq!(read(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        write(&path, b"machine code").unwrap();
        assert_eq!(read(&path).unwrap().as_deref(), Some(&b"machine code"[..]));
        for (at, length) in [(0, 20), (19, 20), (3, 12)] {
            write(&path, b"machine code").unwrap();
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[at] ^= 1;
            bytes.truncate(length);
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(read(&path).unwrap(), None);
        }
        std::fs::write(&path, b"short").unwrap();
        assert_eq!(read(&path).unwrap(), None);
    }

    #[cfg(unix)]
    #[test]
    fn what_a_killed_process_left_goes_with_the_next_file() {
        let folder = tempfile::tempdir().unwrap();
        let left = folder.path().join(".prism-tmp-0123456789abcdef");
        let hour = std::time::Duration::from_secs(3600);
        let file = File::create(&left).unwrap();
        file.set_modified(std::time::SystemTime::now() - hour).unwrap();
        write(&folder.path().join("x.cubin"), b"machine code").unwrap();
        assert!(!left.exists());
    }
}
