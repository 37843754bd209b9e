//! The sources of DICOM files: a folder with its subfolders, a zip archive, or one file; the latter
//! two also as bytes in memory.

use crate::input::{remember, zip_entry};
use crate::memory;
use crate::volume::VolumeError;
use std::fs::{self, File};
use std::io::{BufReader, Cursor, Read, Seek};
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use zip::ZipArchive;

/// The most files that are examined.
const MOST: usize = 1 << 16;
/// The most levels of folders within folders that are entered.
const DEEPEST: usize = 8;
/// Bytes of a file that are read for its tags, at first.
const FIRST: usize = 1 << 16;

/// How messages name the memory that a file takes.
const FILE: &str = "a DICOM file";

/// The first bytes of a zip archive.
pub const ZIP: &[u8] = b"PK\x03\x04";

/// Whether a file is a zip archive.
pub fn is_zip(head: &[u8]) -> bool {
    head.starts_with(ZIP)
}

/// The reader of an archive.
pub trait Readable: Read + Seek {}

impl<T: Read + Seek> Readable for T {}

/// Files that may be DICOM, by their numbers.
pub enum Store<'a> {
    /// Files of a file system.
    Files(Vec<PathBuf>),
    /// Entries of an archive of `length` bytes: their names and their indices.
    Zip {
        archive: ZipArchive<Box<dyn Readable + 'a>>,
        path: PathBuf,
        length: u64,
        entries: Vec<(String, usize)>,
        /// Bytes of all of them, unpacked, as the archive states.
        unpacked: u64,
    },
    /// One file in memory.
    One { path: PathBuf, bytes: &'a [u8] },
}

/// Bytes of a file: all of them, or its beginning.
pub struct Bytes {
    pub bytes: Vec<u8>,
    pub whole: bool,
}

impl<'a> Store<'a> {
    /// The files of a folder; with `below`, also those of folders in it.
    pub fn of_folder(folder: &Path, below: bool) -> Result<Store<'static>, VolumeError> {
        let mut all = Gathered { links: true, ..Gathered::default() };
        all.add(folder, if below { DEEPEST } else { 0 })?;
        all.files.sort();
        Ok(Store::Files(all.files))
    }

    /// The files of a folder and of those in it, the state of those folders just before they were
    /// read, and which of them cannot be read. Links to files are skipped: they may lead out of the
    /// folder.
    pub fn of_tree(folder: &Path) -> Result<Tree, VolumeError> {
        let mut all = Gathered { left_out: Some(vec![]), ..Gathered::default() };
        all.add(folder, DEEPEST)?;
        all.files.sort();
        let left_out = all.left_out.unwrap_or_default();
        Ok(Tree { store: Store::Files(all.files), folders: all.folders, left_out })
    }

    /// The entries of a zip archive.
    pub fn of_zip(path: &Path) -> Result<Store<'static>, VolumeError> {
        let fail = |e: String| VolumeError::new(path, e);
        remember(path);
        let file = File::open(path).map_err(|e| fail(e.to_string()))?;
        let length = file.metadata().map_err(|e| fail(e.to_string()))?.len();
        Store::of_archive(path, Box::new(BufReader::new(file)), length)
    }

    /// An archive, or one file, in memory, which messages call `path`. The file system is not
    /// accessed.
    pub fn of_bytes(path: &Path, bytes: &'a [u8]) -> Result<Store<'a>, VolumeError> {
        if !is_zip(bytes) {
            return Ok(Store::One { path: path.into(), bytes });
        }
        let length = bytes.len() as u64;
        Store::of_archive(path, Box::new(Cursor::new(bytes)), length)
    }

    fn of_archive(
        path: &Path,
        source: Box<dyn Readable + 'a>,
        length: u64,
    ) -> Result<Store<'a>, VolumeError> {
        let fail = |e: String| VolumeError::new(path, e);
        let mut archive =
            ZipArchive::new(source).map_err(|e| fail(format!("is a damaged ZIP archive: {e}")))?;
        if archive.len() > MOST {
            return Err(fail(format!("holds {} files, expected at most {MOST}", archive.len())));
        }
        let (mut entries, mut unpacked) = (vec![], 0u64);
        for at in 0..archive.len() {
            let entry = archive
                .by_index_raw(at)
                .map_err(|e| fail(format!("its entry {at} is damaged: {e}")))?;
            if entry.size() == 0 {
                continue;
            }
            unpacked = unpacked.saturating_add(entry.size());
            drop(entry);
            let name = match archive.name_for_index(at) {
                Some(Ok(name)) => name.trim_start_matches('/').to_string(),
                _ => format!("entry {at}"),
            };
            entries.push((name, at));
        }
        entries.sort();
        Ok(Store::Zip { archive, path: path.into(), entries, length, unpacked })
    }

    /// Bytes of all files of an archive, unpacked, as it states.
    pub fn unpacked(&self) -> u64 {
        match self {
            Store::Files(_) => 0,
            Store::Zip { unpacked, .. } => *unpacked,
            Store::One { bytes, .. } => bytes.len() as u64,
        }
    }

    /// The number of files.
    pub fn len(&self) -> usize {
        match self {
            Store::Files(files) => files.len(),
            Store::Zip { entries, .. } => entries.len(),
            Store::One { .. } => 1,
        }
    }

    /// The file's name in messages.
    pub fn name(&self, at: usize) -> PathBuf {
        match self {
            Store::Files(files) => files.get(at).cloned().unwrap_or_default(),
            Store::Zip { path, entries, .. } => {
                path.join(entries.get(at).map_or("", |(name, _)| name.as_str()))
            }
            Store::One { path, .. } => path.clone(),
        }
    }

    /// An error about a file.
    pub fn fail(&self, at: usize, message: impl Into<String>) -> VolumeError {
        VolumeError::new(&self.name(at), message)
    }

    /// Reads growing beginnings of a file until `enough` returns a result for one; none if it is
    /// not an ordinary file, or does not begin as DICOM does.
    pub fn look<T>(
        &mut self,
        at: usize,
        mut enough: impl FnMut(&Bytes) -> Option<T>,
    ) -> Result<Option<T>, VolumeError> {
        if !matches!(self, Store::Files(_)) {
            let bytes = self.read(at)?;
            if !begins(&bytes) {
                return Ok(None);
            }
            return Ok(enough(&Bytes { bytes, whole: true }));
        }
        let path = self.name(at);
        let fail = |e: std::io::Error| VolumeError::new(&path, e.to_string());
        let mut file = File::open(&path).map_err(fail)?;
        let meta = file.metadata().map_err(fail)?;
        if !meta.is_file() {
            return Ok(None);
        }
        let mut next = FIRST;
        let mut read = Bytes { bytes: vec![], whole: false };
        loop {
            memory::check::<u8>(FILE, next).map_err(|e| VolumeError::refused(&path, e))?;
            let wanted = (next - read.bytes.len()) as u64;
            let got = file.by_ref().take(wanted).read_to_end(&mut read.bytes).map_err(fail)?;
            read.whole = (got as u64) < wanted || read.bytes.len() as u64 >= meta.len();
            if !begins(&read.bytes) {
                return Ok(None);
            }
            match enough(&read) {
                Some(found) => return Ok(Some(found)),
                None if read.whole => return Ok(None),
                None => next = next.saturating_mul(4),
            }
        }
    }

    /// All bytes of a file.
    pub fn read(&mut self, at: usize) -> Result<Vec<u8>, VolumeError> {
        let name = self.name(at);
        let fail = |e: String| VolumeError::new(&name, e);
        match self {
            Store::Files(_) => {
                remember(&name);
                memory::read_file(FILE, &name).map_err(|e| fail(e.to_string()))
            }
            Store::Zip { archive, entries, length, .. } => {
                let Some((_, entry)) = entries.get(at) else {
                    return Err(fail("is not a file of the archive".into()));
                };
                zip_entry(archive, *length, *entry, FILE).map_err(fail)
            }
            Store::One { bytes, .. } => Ok(memory::copied(FILE, &bytes[..])),
        }
    }
}

/// Whether bytes begin as DICOM does.
pub fn begins(bytes: &[u8]) -> bool {
    crate::input::recognise(bytes) == Some(crate::input::Kind::Dicom)
}

/// The size of a file or a folder and the time of its last change; none if it is gone.
pub type Stamp = Option<(u64, SystemTime)>;

/// The present stamp of a path.
pub fn stamp(path: &Path) -> Stamp {
    let about = path.metadata().ok()?;
    Some((about.len(), about.modified().ok()?))
}

/// The contents of a folder and of those in it.
pub struct Tree {
    pub store: Store<'static>,
    pub folders: Vec<(PathBuf, Stamp)>,
    pub left_out: Vec<VolumeError>,
}

/// What was found in a folder so far.
#[derive(Default)]
struct Gathered {
    files: Vec<PathBuf>,
    /// The folders that were read, with their stamps just before.
    folders: Vec<(PathBuf, Stamp)>,
    /// Whether links to files count as files.
    links: bool,
    /// The errors of folders in it; none if an error is to end the search.
    left_out: Option<Vec<VolumeError>>,
}

impl Gathered {
    /// Adds a folder's files, and those of folders in it. Links to folders are not followed.
    fn add(&mut self, folder: &Path, deeper: usize) -> Result<(), VolumeError> {
        let fail = |e: std::io::Error| VolumeError::new(folder, e.to_string());
        self.folders.push((folder.into(), stamp(folder)));
        for entry in fs::read_dir(folder).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let kind = entry.file_type().map_err(fail)?;
            if kind.is_dir() {
                if deeper > 0 {
                    let added = self.add(&entry.path(), deeper - 1);
                    match (added, &mut self.left_out) {
                        (Err(e), Some(left_out)) => left_out.push(e),
                        (added, _) => added?,
                    }
                }
            } else if kind.is_file() || self.links && kind.is_symlink() && entry.path().is_file() {
                self.files.push(entry.path());
            }
            if self.files.len() > MOST {
                return Err(VolumeError::new(
                    folder,
                    format!("holds more than {MOST} files: name the folder of one study"),
                ));
            }
        }
        Ok(())
    }
}
