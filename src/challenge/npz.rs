//! NumPy's `.npz` files: zip archives of [`.npy`](super::npy) files, stored or deflated.

use super::npy::{ARRAY, Array};
use crate::input::{crc32, zip_entry};
use crate::memory;
use crate::output::{Pending, write_bytes};
use crate::volume::VolumeError;
use flate2::Compression;
use flate2::write::DeflateEncoder;
use std::fs::File;
use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};
use zip::ZipArchive;

/// An archive of arrays that is being read.
pub struct Npz {
    path: PathBuf,
    /// Bytes of the whole file.
    length: u64,
    archive: ZipArchive<BufReader<File>>,
}

impl Npz {
    /// Opens a file and reads its directory.
    ///
    /// # Errors
    /// The file cannot be read, or is no zip archive.
    pub fn open(path: &Path) -> Result<Npz, VolumeError> {
        let file = File::open(path).map_err(|e| VolumeError::new(path, e.to_string()))?;
        let length = file.metadata().map_err(|e| VolumeError::new(path, e.to_string()))?.len();
        crate::input::remember(path);
        let archive = ZipArchive::new(BufReader::new(file))
            .map_err(|e| VolumeError::new(path, format!("not a .npz file: {e}")))?;
        Ok(Npz { path: path.into(), length, archive })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it has an array of that name.
    pub fn has(&self, key: &str) -> bool {
        self.archive.index_for_name(&format!("{key}.npy")).is_some()
    }

    /// The array of that name.
    ///
    /// # Errors
    /// There is none, or it is damaged.
    pub fn array(&mut self, key: &str) -> Result<Array, VolumeError> {
        let array = self.bytes(key).and_then(Array::parse);
        array.map_err(|e| self.fail(key, &e))
    }

    /// An error about the array of that name.
    pub fn fail(&self, key: &str, message: &str) -> VolumeError {
        VolumeError::new(&self.path, format!("'{key}': {message}"))
    }

    fn missing(&self) -> String {
        let names = self
            .archive
            .file_names()
            .filter_map(|name| name.ok().map(|n| n.trim_end_matches(".npy").to_string()));
        let names: Vec<String> = names.take(20).collect();
        format!(
            "is missing, the file has {}",
            if names.is_empty() { "not an array".into() } else { names.join(", ") }
        )
    }

    /// An entry, inflated.
    fn bytes(&mut self, key: &str) -> Result<Vec<u8>, String> {
        let at =
            self.archive.index_for_name(&format!("{key}.npy")).ok_or_else(|| self.missing())?;
        zip_entry(&mut self.archive, self.length, at, ARRAY)
    }
}

/// The description of an entry in a zip archive, before it and in the directory.
struct Entry {
    name: String,
    method: u16,
    sum: u32,
    packed: u32,
    size: u32,
    offset: u32,
}

impl Entry {
    /// The fields that both places share.
    fn fields(&self) -> Vec<u8> {
        // Version 2.0, no flags; dated the first day that zip supports, so that the same masks give
        // the same file.
        let mut out = vec![20, 0, 0, 0];
        out.extend(self.method.to_le_bytes());
        out.extend([0, 0, 0x21, 0]);
        [self.sum, self.packed, self.size].iter().for_each(|n| out.extend(n.to_le_bytes()));
        out.extend((self.name.len() as u16).to_le_bytes());
        out.extend([0, 0]);
        out
    }

    fn local(&self) -> Vec<u8> {
        [&b"PK\x03\x04"[..], &self.fields()[..], self.name.as_bytes()].concat()
    }

    fn central(&self) -> Vec<u8> {
        // No comment, first disk, no attributes.
        [
            &b"PK\x01\x02\x14\x00"[..],
            &self.fields()[..],
            &[0; 10],
            &self.offset.to_le_bytes(),
            self.name.as_bytes(),
        ]
        .concat()
    }
}

/// An archive of arrays, each with its name and its `.npy` bytes, stored or deflated.
fn pack(arrays: &[(&str, Vec<u8>)], deflate: bool) -> Result<Vec<u8>, String> {
    let limited = |n: usize| {
        u32::try_from(n)
            .map_err(|_| "more than 4 GiB, which a plain zip archive cannot hold".to_string())
    };
    let (mut out, mut directory) = (vec![], vec![]);
    for (key, bytes) in arrays {
        let packed = if deflate {
            deflated(bytes).map_err(|e| e.to_string())?
        } else {
            memory::copied(ARRAY, bytes)
        };
        let entry = Entry {
            name: format!("{key}.npy"),
            method: if deflate { 8 } else { 0 },
            sum: crc32(bytes),
            packed: limited(packed.len())?,
            size: limited(bytes.len())?,
            offset: limited(out.len())?,
        };
        out.extend(entry.local());
        out.extend(packed);
        directory.extend(entry.central());
    }
    let [length, start] =
        [limited(directory.len())?.to_le_bytes(), limited(out.len())?.to_le_bytes()];
    let count = (arrays.len() as u16).to_le_bytes();
    out.extend(directory);
    out.extend([&b"PK\x05\x06\0\0\0\0"[..], &count, &count, &length, &start, &[0, 0]].concat());
    Ok(out)
}

fn deflated(bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    // Labels shrink a hundredfold at any level.
    let mut encoder = DeflateEncoder::new(Vec::<u8>::new(), Compression::fast());
    encoder.write_all(bytes)?;
    encoder.finish()
}

/// Writes an archive of arrays, each with its name and its `.npy` bytes, stored or deflated. It
/// appears when the result is committed.
///
/// # Errors
/// The file cannot be written.
pub fn write(
    path: &Path,
    arrays: &[(&str, Vec<u8>)],
    deflate: bool,
) -> Result<Pending, VolumeError> {
    let fail = |e: std::io::Error| VolumeError::new(path, e.to_string());
    let bytes = pack(arrays, deflate).map_err(|e| VolumeError::new(path, e))?;
    write_bytes(path, &bytes).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::super::npy::of_bytes;
    use super::*;

    fn arrays() -> Vec<(&'static str, Vec<u8>)> {
        vec![("segs", of_bytes(&[10, 10, 10], &[1; 1000])), ("b", of_bytes(&[2], &[3, 4]))]
    }

    #[test]
    fn what_is_written_is_read_stored_and_deflated() {
        let folder = tempfile::tempdir().unwrap();
        for deflate in [false, true] {
            let path = folder.path().join("case.npz");
            write(&path, &arrays(), deflate).unwrap().commit().unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().len() < 1000, deflate);
            let mut file = Npz::open(&path).unwrap();
            assert!(file.has("segs") && !file.has("clicks"));
            assert_eq!(file.array("segs").unwrap().numbers(|v| v as u8).unwrap(), vec![1; 1000]);
            assert_eq!(file.array("b").unwrap().shape, [2]);
            let message = file.array("clicks").unwrap_err().to_string();
            assert!(message.ends_with("'clicks': is missing, the file has segs, b"), "{message}");
        }
    }

    #[test]
    fn damage_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("case.npz");
        let whole = pack(&arrays(), true).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x55;
            std::fs::write(&path, &bytes).unwrap();
            // Whatever is damaged, the result is right or an error.
            if let Ok(mut file) = Npz::open(&path)
                && let Ok(array) = file.array("segs")
            {
                assert_eq!(array.numbers(|v| v as u8).unwrap(), vec![1; 1000], "byte {at}");
            }
            std::fs::write(&path, &whole[..at]).unwrap();
            assert!(Npz::open(&path).is_err(), "cut at {at}");
        }
    }
}
