//! What an earlier server left in the folder of its state (`journal.rs`): journals, which are read
//! back record by record as far as they are intact, and continued.

use super::journal::{
    FRESH, Folder, GONE, HASH, HEAD, JOURNAL, Journal, MAGIC, Owner, SCAN, Stored, Written, at,
    bytes_in, chained, first_hash, head,
};
use super::work::Key;
use crate::memory;
use crate::output::sync_folder;
use crate::session::kept::Reader;
use blake3::Hash;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

/// The name of the copy of a damaged journal.
const DAMAGED: &str = "journal.damaged";

/// How messages name the memory that files of the folder take.
const KEPT: &str = "the stored state of a session";

impl Folder {
    /// Finds what an earlier server left. What was dropped, or never completed, is removed. What
    /// cannot be read stays as it is, and is reported.
    pub fn found(self: &Arc<Folder>, warnings: &mut Vec<String>) -> Result<Vec<Found>, String> {
        let mut names = vec![];
        for entry in fs::read_dir(&self.path).map_err(at(&self.path))? {
            let name = entry.map_err(at(&self.path))?.file_name();
            names.extend(name.into_string());
        }
        names.sort();
        let mut all = vec![];
        for name in names {
            let path = self.path.join(&name);
            // A folder of another program with such a name is not ours.
            if name.strip_prefix(GONE).is_some_and(|name| Owner::of(name).is_some()) {
                let _ = fs::remove_dir_all(&path);
                continue;
            }
            let Some((owner, key)) = Owner::of(&name) else { continue };
            if self.is_old(&path) {
                warnings.push(format!(
                    "{}: deleted after {} days without use (--state-days)",
                    path.display(),
                    self.age.as_secs() / (24 * 3600)
                ));
                let _ = fs::remove_dir_all(&path);
                continue;
            }
            let _ = fs::remove_file(path.join(FRESH));
            match self.look(owner, key, &name, warnings) {
                Ok(Some(found)) => all.push(found),
                Ok(None) => drop(fs::remove_dir_all(&path)),
                Err(e) => {
                    warnings.push(format!("{e}; it is kept on disk, but not served"));
                    self.used.fetch_add(bytes_in(&path).unwrap_or(0), Ordering::Relaxed);
                }
            }
        }
        Ok(all)
    }

    /// Whether the object of a folder was not used for too long.
    fn is_old(&self, path: &Path) -> bool {
        let about = fs::metadata(path.join(JOURNAL)).or_else(|_| fs::metadata(path));
        let written = about.and_then(|about| about.modified()).ok();
        // A clock that was set back makes nothing old.
        let since = written.and_then(|at| SystemTime::now().duration_since(at).ok());
        since.is_some_and(|since| since > self.age)
    }

    /// Reads the beginning of a journal; none if it was never begun.
    fn look(
        self: &Arc<Folder>,
        owner: Owner,
        key: Key,
        name: &str,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Found>, String> {
        let path = self.path.join(name);
        let file = path.join(JOURNAL);
        let open = OpenOptions::new().read(true).write(true).open(&file);
        let open = match open {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            open => open.map_err(at(&file))?,
        };
        let length = open.metadata().map_err(at(&file))?.len();
        if length < MAGIC.len() as u64 {
            return Ok(None);
        }
        let mut records = Records::new(open, length, file.clone()).map_err(at(&file))?;
        let Some(about) = records.read()? else {
            // A journal that ends within its first record was never acknowledged.
            return match records.end {
                End::Damaged => Err(format!("{}: damaged at its start", file.display())),
                _ => Ok(None),
            };
        };
        let about = Reader::new(&about).text().map_err(|e| format!("{}: {e}", file.display()))?;
        if about != self.about {
            warnings.push(format!(
                "{}: written with {about}, this server has {}: masks and history are unchanged, further masks come from the new model",
                file.display(),
                self.about
            ));
        }
        Ok(Some(Found { folder: self.clone(), owner, key, name: name.into(), records }))
    }
}

/// How a journal ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// At the end of a record, or it was not read so far.
    Whole,
    /// Within a record, which was never acknowledged.
    Torn,
    /// At a record that differs from what was written.
    Damaged,
}

/// Reads a journal, record by record.
struct Records {
    file: BufReader<File>,
    path: PathBuf,
    length: u64,
    /// The length of the intact part, and its hash.
    good: u64,
    chain: Hash,
    /// The length of the intact part before the last record, and its hash.
    before: (u64, Hash),
    end: End,
}

impl Records {
    fn new(file: File, length: u64, path: PathBuf) -> io::Result<Records> {
        let mut file = BufReader::new(file);
        let mut magic = [0; MAGIC.len()];
        file.read_exact(&mut magic)?;
        let end = if magic == *MAGIC { End::Whole } else { End::Damaged };
        let good = MAGIC.len() as u64;
        let chain = first_hash();
        Ok(Records { file, path, length, good, chain, before: (good, chain), end })
    }

    /// The next record; none at the end, whatever kind of end that is.
    fn read(&mut self) -> Result<Option<Vec<u8>>, String> {
        let left = self.length - self.good;
        if self.end != End::Whole || left == 0 {
            return Ok(None);
        }
        let path = self.path.clone();
        if left < HEAD as u64 {
            self.end = End::Torn;
            return Ok(None);
        }
        let mut begun = [0; HEAD];
        self.file.read_exact(&mut begun).map_err(at(&path))?;
        let length = u64::from_le_bytes(std::array::from_fn(|n| begun[n]));
        if begun != head(&self.chain, length) {
            // After a power cut a file may be longer than what was written to it.
            let nothing = begun == [0; HEAD] && self.rest_is_nothing().map_err(at(&path))?;
            self.end = if nothing { End::Torn } else { End::Damaged };
            return Ok(None);
        }
        let whole = length.saturating_add((HEAD + HASH) as u64);
        if whole > left {
            self.end = End::Torn;
            return Ok(None);
        }
        let count = usize::try_from(length).unwrap_or(usize::MAX);
        let mut record =
            memory::room(KEPT, count).map_err(|e| format!("{}: {e}", path.display()))?;
        (&mut self.file).take(length).read_to_end(&mut record).map_err(at(&path))?;
        let mut carried = [0; HASH];
        self.file.read_exact(&mut carried).map_err(at(&path))?;
        let hash = chained(&self.chain, &record);
        if hash != Hash::from_bytes(carried) {
            // Even if it is the last one: it has its full length, and may have been acknowledged.
            self.end = End::Damaged;
            return Ok(None);
        }
        self.before = (self.good, self.chain);
        (self.good, self.chain) = (self.good + whole, hash);
        Ok(Some(record))
    }

    fn rest_is_nothing(&mut self) -> io::Result<bool> {
        let mut piece = [0; 4096];
        loop {
            match self.file.read(&mut piece)? {
                0 => return Ok(true),
                count if piece[..count].iter().any(|b| *b != 0) => return Ok(false),
                _ => {}
            }
        }
    }
}

/// An object that an earlier server left: its journal, read up to its first record.
pub struct Found {
    folder: Arc<Folder>,
    pub owner: Owner,
    pub key: Key,
    name: String,
    records: Records,
}

impl Found {
    /// The next record; none at the end.
    pub fn read(&mut self) -> Result<Option<Vec<u8>>, String> {
        self.records.read()
    }

    /// The last record cannot be followed: the journal ends before it.
    pub fn unread(&mut self) {
        let records = &mut self.records;
        (records.good, records.chain) = records.before;
        records.end = End::Damaged;
    }

    /// The name for messages: that of its journal.
    pub fn path(&self) -> &Path {
        &self.records.path
    }

    /// The folder of this object in the server's.
    fn at(&self) -> PathBuf {
        self.folder.path.join(&self.name)
    }

    /// The bytes that a scan was sent as.
    pub fn scan(&self, stored: &Stored) -> Result<Vec<u8>, String> {
        let path = self.at().join(stored.file());
        let bytes = memory::caught(|| memory::read_file(KEPT, &path))
            .map_err(|e| format!("{}: {e}", path.display()))?
            .map_err(at(&path))?;
        match bytes.len() as u64 == stored.bytes && blake3::hash(&bytes) == stored.hash {
            true => Ok(bytes),
            false => {
                Err(format!("{}: damaged: it differs from the scan that was sent", path.display()))
            }
        }
    }

    /// Removes it: no client knows of it.
    pub fn remove(self) {
        let _ = fs::remove_dir_all(self.at());
    }

    /// Leaves it as it is; it keeps its room.
    pub fn leave(self) {
        let bytes = bytes_in(&self.at()).unwrap_or(0);
        self.folder.used.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Continues the journal after the part that was read, with the scan that it described last. An
    /// incomplete record, and files that are not needed, are removed; of a damaged journal a copy
    /// is kept.
    pub fn go_on(
        self,
        scan: Option<&Stored>,
        warnings: &mut Vec<String>,
    ) -> Result<Journal, String> {
        let path = self.at();
        let Found { folder, name, records, .. } = self;
        let Records { file, path: journal, length, good, chain, end, .. } = records;
        match end {
            End::Whole if good == length => {}
            End::Torn => warnings.push(format!(
                "{}: its last record is incomplete and was dropped: the server ended while writing it, before it answered the request",
                journal.display()
            )),
            _ => {
                let copy = path.join(DAMAGED);
                // The copy exists before the journal is truncated, after a power cut too.
                let copied = fs::copy(&journal, &copy)
                    .and_then(|_| OpenOptions::new().write(true).open(&copy)?.sync_all());
                copied.map_err(at(&copy))?;
                sync_folder(&path).map_err(at(&path))?;
                warnings.push(format!(
                    "{}: damaged after its first {good} bytes: later changes are lost; the damaged file is kept beside it as {DAMAGED}",
                    journal.display()
                ));
            }
        }
        let mut file = file.into_inner();
        if good < length {
            file.set_len(good).and_then(|()| file.sync_all()).map_err(at(&journal))?;
        }
        file.seek(SeekFrom::Start(good)).map_err(at(&journal))?;
        let kept = scan.map(Stored::file);
        let mut next = scan.map_or(0, |stored| stored.number + 1);
        for entry in fs::read_dir(&path).map_err(at(&path))? {
            let entry = entry.map_err(at(&path))?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let number = name.strip_prefix(SCAN).and_then(|n| n.parse::<u64>().ok());
            next = number.map_or(next, |n| next.max(n.saturating_add(1)));
            if number.is_some() && kept.as_ref() != Some(&name) {
                let _ = fs::remove_file(entry.path());
            }
        }
        let bytes = bytes_in(&path).map_err(at(&path))?;
        folder.used.fetch_add(bytes, Ordering::Relaxed);
        let written = Written { file, length: good, chain, bytes, next, least: 0, broken: false };
        let journal = Journal::new(&folder, name, written);
        journal.keep();
        Ok(journal)
    }
}
