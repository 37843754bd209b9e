//! Values that stay in a file until they are needed.
//!
//! A mapped file would be simpler to write, but would put the process at the mercy of the file's
//! owner: if the file is truncated, the process ends; if it is overwritten, one answer mixes two
//! networks. So the file is read, as often as its values are needed, and each reading is checked
//! against the hash of the first.

use crate::checksum::{PIECE, of_pieces};
use crate::device::Cpu;
use blake3::Hash;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// The number of floats from which on a tensor stays in its file: such matrices are used once per
/// image, and read almost as quickly as copied. Smaller ones are kept in memory, and laid out once.
pub const LARGE: usize = 1 << 20;

/// An open file.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    file: File,
}

impl Source {
    /// A file to read from.
    pub fn new(path: &Path, file: File) -> Arc<Source> {
        Arc::new(Source { path: path.into(), file })
    }

    /// Fills `bytes` with the file's contents from byte `at` on.
    ///
    /// # Errors
    /// Those of the operating system; the file ends before.
    pub fn read(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        #[cfg(unix)]
        return std::os::unix::fs::FileExt::read_exact_at(&self.file, bytes, at);
        #[cfg(windows)]
        {
            let mut done = 0;
            while done < bytes.len() {
                match std::os::windows::fs::FileExt::seek_read(
                    &self.file,
                    &mut bytes[done..],
                    at + done as u64,
                )? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    n => done += n,
                }
            }
            Ok(())
        }
    }
}

/// Little-endian floats in a file.
#[derive(Debug)]
pub struct Stored {
    source: Arc<Source>,
    at: u64,
    len: usize,
    hash: Hash,
}

impl Stored {
    /// `len` floats from byte `at` on, whose hash is `hash`.
    pub fn new(source: &Arc<Source>, at: u64, len: usize, hash: Hash) -> Stored {
        Stored { source: source.clone(), at, len, hash }
    }

    /// The number of values.
    pub fn count(&self) -> usize {
        self.len
    }

    /// Reads the values.
    ///
    /// # Errors
    /// The file cannot be read, or holds other values now.
    pub fn read(&self, cpu: Option<&Cpu>, out: &mut [f32]) -> Result<(), String> {
        if read(&self.source, self.at, cpu, out)? == self.hash {
            return Ok(());
        }
        Err(format!(
            "{}: has changed since the model was loaded: load it again",
            self.source.path.display()
        ))
    }
}

/// Reads floats from byte `at` of a file on, with all threads of a CPU if one is given; returns the
/// hash of their bytes.
///
/// # Errors
/// The file cannot be read: the message names it.
pub fn read(source: &Source, at: u64, cpu: Option<&Cpu>, out: &mut [f32]) -> Result<Hash, String> {
    let hashes: Vec<OnceLock<io::Result<Hash>>> =
        out.chunks(PIECE / 4).map(|_| OnceLock::new()).collect();
    let one = |n: usize, part: &mut [f32]| {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(part);
        let hash = source.read(bytes, at + (n * PIECE) as u64).map(|()| blake3::hash(bytes));
        let _ = hashes[n].set(hash);
        if cfg!(target_endian = "big") {
            bytes.chunks_exact_mut(4).for_each(<[u8]>::reverse);
        }
    };
    match cpu {
        Some(cpu) => cpu.chunks_mut(out, PIECE / 4, one),
        None => out.chunks_mut(PIECE / 4).enumerate().for_each(|(n, part)| one(n, part)),
    }
    let mut each = vec![];
    for hash in hashes {
        match hash.into_inner().unwrap_or_else(|| Err(io::ErrorKind::Interrupted.into())) {
            Ok(hash) => each.push(hash),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(format!(
                    "{}: shorter than it was when the model was loaded",
                    source.path.display()
                ));
            }
            Err(e) => return Err(format!("{}: {e}", source.path.display())),
        }
    }
    Ok(of_pieces(each.into_iter()))
}
