//! What a server keeps on disk (`--state`), so that a restart or a crash loses nothing.
//!
//! Each scan of prism's own interface, lease and session has a folder of its own: the bytes that
//! its scan came as, and a journal, to which what changes is appended and synchronised before it is
//! answered. A record carries a hash of all before it and of itself: one that breaks off at the end
//! was never answered and is dropped, what stands behind a damaged one is not believed.
//!
//! Folders are named by the hashes of identifiers and not by those themselves: who reads a copy of
//! them cannot call as its owner does.

use super::failure::Failure;
use super::settings::Keep;
use super::work::Key;
use crate::memory;
use crate::output::{self, sync_folder};
use crate::session::Session;
use crate::session::kept::{Reader, Writer};
use crate::volume::Modality;
use axum::http::StatusCode;
use blake3::Hash;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, SystemTime};

/// How a journal begins.
const MAGIC: &[u8; 8] = b"prismj01";
/// Bytes in front of a record's own: its length, and a check of that. Behind it stands a hash.
const HEAD: usize = 16;
const HASH: usize = 32;
/// Names in a folder.
const JOURNAL: &str = "journal";
const FRESH: &str = "journal.new";
const DAMAGED: &str = "journal.damaged";
const SCAN: &str = "scan-";
/// The file that tells other servers that a folder has one.
const LOCK: &str = "lock";
/// What the names of folders begin with that were let go.
const GONE: &str = "gone-";
/// Records of so few bytes are written where the folder is full, too, up to so many bytes beyond:
/// undo, release and the like make room, or hardly take any.
const FEW: u64 = 256;
const SPARE: u64 = 16 << 20;
/// A journal that is not longer than this beyond twice what it has to be is left as it is.
const MORE: u64 = 4 << 20;

/// The kind of a record that tells of a scan, in every journal.
pub const IMAGE: u8 = 1;

/// What messages call the memory that files of the folder take.
const KEPT: &str = "what was kept of a session";

/// Whose folder it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A scan of prism's own interface.
    Scan,
    /// A lease of nnInteractive's protocol.
    Lease,
    /// A session of ITK-SNAP's.
    Snap,
    /// A session of MONAI Label's.
    Label,
}

impl Owner {
    const ALL: [Owner; 4] = [Owner::Scan, Owner::Lease, Owner::Snap, Owner::Label];

    fn name(self) -> &'static str {
        match self {
            Owner::Scan => "scan",
            Owner::Lease => "lease",
            Owner::Snap => "snap",
            Owner::Label => "label",
        }
    }

    fn folder(self, key: Key) -> String {
        format!("{}-{key:032x}", self.name())
    }

    /// Whose folder a name is.
    fn of(name: &str) -> Option<(Owner, Key)> {
        let (kind, key) = name.split_once('-')?;
        let owner = Owner::ALL.into_iter().find(|owner| owner.name() == kind)?;
        let key = Key::from_str_radix(key, 16).ok()?;
        // No other spelling.
        (owner.folder(key) == name).then_some((owner, key))
    }
}

/// How the bytes that a scan came as are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A file as it is.
    Plain,
    /// A file, and what its sender said that it was made by.
    File(Option<Modality>),
    /// DICOM, what its sender said that it was made by, and the series that was asked for.
    Dicom(Option<Modality>, Option<String>),
    /// An array of nnInteractive's with its spacing, `[k, j, i]`.
    Array([f64; 3]),
    /// A form of ITK-SNAP's, by its Content-Type.
    Form(String),
}

/// A scan's file in a folder, as its journal tells of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    pub number: u64,
    bytes: u64,
    hash: Hash,
    pub source: Source,
}

impl Stored {
    /// What its file is called.
    fn file(&self) -> String {
        format!("{SCAN}{}", self.number)
    }

    pub fn put(&self, out: &mut Writer) {
        out.number(self.number);
        out.number(self.bytes);
        out.bytes(self.hash.as_bytes());
        // What it is made of is text and finite numbers.
        out.text(&serde_json::to_string(&self.source).unwrap_or_default());
    }

    pub fn take(from: &mut Reader) -> Result<Stored, String> {
        let (number, bytes) = (from.number()?, from.number()?);
        let hash = from.bytes(HASH)?;
        let hash = Hash::from_bytes(std::array::from_fn(|at| hash[at]));
        let source = serde_json::from_str(&from.text()?).map_err(|e| e.to_string())?;
        Ok(Stored { number, bytes, hash, source })
    }
}

/// The folder of a server, which no other server has for as long as it lives.
pub struct Folder {
    path: PathBuf,
    most: u64,
    /// What nobody worked on for longer is deleted where it is found.
    age: Duration,
    used: AtomicU64,
    /// What each journal begins with, which a later server compares with its own.
    about: String,
    _lock: File,
}

/// Something of a folder could not be written; its path is nobody's.
fn full(e: &io::Error) -> Failure {
    Failure::new(
        StatusCode::INSUFFICIENT_STORAGE,
        format!("what changes cannot be kept on the server's disk ({e}): nothing was changed"),
    )
}

/// An error of a server's start, which names the file.
fn at(path: &Path) -> impl Fn(io::Error) -> String {
    move |e| format!("{}: {e}", path.display())
}

/// A new file that its owner alone may read.
fn new_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(0o600);
    }
    options.open(path)
}

/// A new folder that its owner alone may look into.
fn new_folder(path: &Path) -> io::Result<()> {
    #[cfg_attr(not(unix), allow(unused_mut))]
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::DirBuilderExt;
        builder.mode(0o700);
    }
    builder.create(path)
}

/// Bytes of all files in a folder.
fn bytes_in(path: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(path)? {
        sum += entry?.metadata()?.len();
    }
    Ok(sum)
}

impl Folder {
    /// Takes a folder, which is made where there is none. `about` is what journals say of the
    /// server.
    ///
    /// # Errors
    /// It cannot be made or locked, others may read it, or another server has it.
    pub fn open(keep: &Keep, about: &str) -> Result<Folder, String> {
        let Keep { folder: path, bytes: most, age } = keep;
        match new_folder(path) {
            Ok(()) => sync_folder(output::folder(path)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
            Err(e) => return Err(format!("{}: cannot keep state there: {e}", path.display())),
        }
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = fs::metadata(path).map_err(at(path))?.permissions().mode();
            if mode & 0o077 != 0 {
                return Err(format!(
                    "{}: others may look into it (mode {:o}), and patients' scans are kept there: expected mode 700, as 'chmod 700' sets it",
                    path.display(),
                    mode & 0o777
                ));
            }
        }
        let lock = output::lock(path, LOCK)?
            .ok_or_else(|| format!("{}: another server keeps its state there", path.display()))?;
        let about = about.to_string();
        let (path, used) = (path.clone(), AtomicU64::new(0));
        Ok(Folder { path, most: *most, age: *age, used, about, _lock: lock })
    }

    /// Takes room for so many bytes.
    fn reserve(&self, bytes: u64) -> Result<(), Failure> {
        let spare = if bytes <= FEW { SPARE } else { 0 };
        let most = self.most.saturating_add(spare);
        let within = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= most);
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within);
        taken.map(drop).map_err(|used| {
            Failure::new(
                StatusCode::INSUFFICIENT_STORAGE,
                format!(
                    "{bytes} bytes are to be kept on the server's disk, {} of {} are left \
                     (--state-bytes): nothing was changed; what is released makes room",
                    self.most.saturating_sub(used),
                    self.most
                ),
            )
        })
    }

    fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// A folder for something new. It goes again unless [`Journal::keep`] is called.
    pub fn create(self: &Arc<Folder>, owner: Owner, key: Key) -> Result<Journal, Failure> {
        let name = owner.folder(key);
        let path = self.path.join(&name);
        new_folder(&path).map_err(|e| full(&e))?;
        let file = match new_file(&path.join(JOURNAL)) {
            Ok(file) => file,
            Err(e) => {
                let _ = fs::remove_dir(&path);
                return Err(full(&e));
            }
        };
        let journal = Journal::new(self, name, Written::new(file));
        let begun = journal.written().begin(self);
        begun?;
        sync_folder(&path);
        sync_folder(&self.path);
        Ok(journal)
    }

    /// What is there of an earlier server. What was let go, or never came to be, is removed. Where
    /// something cannot be read it stays as it is, and is told.
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
            // What others call so is not ours.
            if name.strip_prefix(GONE).is_some_and(|name| Owner::of(name).is_some()) {
                let _ = fs::remove_dir_all(&path);
                continue;
            }
            let Some((owner, key)) = Owner::of(&name) else { continue };
            if self.is_old(&path) {
                warnings.push(format!(
                    "{}: nobody worked on it for {} days (--state-days): it is deleted",
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
                    warnings.push(format!("{e}; it is left as it is, and not served"));
                    self.used.fetch_add(bytes_in(&path).unwrap_or(0), Ordering::Relaxed);
                }
            }
        }
        Ok(all)
    }

    /// Whether nobody worked on what a folder is of for too long.
    fn is_old(&self, path: &Path) -> bool {
        let about = fs::metadata(path.join(JOURNAL)).or_else(|_| fs::metadata(path));
        let written = about.and_then(|about| about.modified()).ok();
        // A clock that was set back makes nothing old.
        let since = written.and_then(|at| SystemTime::now().duration_since(at).ok());
        since.is_some_and(|since| since > self.age)
    }

    /// Looks at a journal's beginning; none where it was never begun.
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
            // What breaks off within its first record was never answered.
            return match records.end {
                End::Damaged => Err(format!("{}: damaged at its beginning", file.display())),
                _ => Ok(None),
            };
        };
        let about = Reader::new(&about).text().map_err(|e| format!("{}: {e}", file.display()))?;
        if about != self.about {
            warnings.push(format!(
                "{}: begun by {about}, and this is {}: answers and history are what they were, further ones are this server's own",
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
    /// As it should, or it was not read so far.
    Whole,
    /// Within a record, which was not answered.
    Torn,
    /// At a record that is not what was written.
    Damaged,
}

/// Reads a journal, record by record.
struct Records {
    file: BufReader<File>,
    path: PathBuf,
    length: u64,
    /// How much of it is whole, and the hash of that.
    good: u64,
    chain: Hash,
    /// The same before the last record.
    before: (u64, Hash),
    end: End,
}

/// The hash of a journal without a record.
fn first_hash() -> Hash {
    blake3::hash(MAGIC)
}

/// What a record has in front of it behind a journal of such a hash.
fn head(chain: &Hash, length: u64) -> [u8; HEAD] {
    let mut hasher = blake3::Hasher::new();
    let check = hasher.update(chain.as_bytes()).update(&length.to_le_bytes()).finalize();
    let mut head = [0; HEAD];
    head[..8].copy_from_slice(&length.to_le_bytes());
    head[8..].copy_from_slice(&check.as_bytes()[..8]);
    head
}

/// The hash of a journal of such a hash with one more record.
fn chained(chain: &Hash, record: &[u8]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(chain.as_bytes()).update(&(record.len() as u64).to_le_bytes());
    hasher.update(record).finalize()
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

    /// The next record; none at the end, whatever that is.
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
            // The last one, too: it is as long as it should be, and may have been answered.
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

/// What is there of an earlier server: its journal, read up to its first record.
pub struct Found {
    folder: Arc<Folder>,
    pub owner: Owner,
    pub key: Key,
    name: String,
    records: Records,
}

impl Found {
    /// The next thing that happened; none at the end.
    pub fn read(&mut self) -> Result<Option<Vec<u8>>, String> {
        self.records.read()
    }

    /// The last record says nothing that could be done: the journal ends before it.
    pub fn unread(&mut self) {
        let records = &mut self.records;
        (records.good, records.chain) = records.before;
        records.end = End::Damaged;
    }

    /// What messages call it: its journal.
    pub fn path(&self) -> &Path {
        &self.records.path
    }

    /// Its folder.
    fn at(&self) -> PathBuf {
        self.folder.path.join(&self.name)
    }

    /// The bytes that a scan came as.
    pub fn scan(&self, stored: &Stored) -> Result<Vec<u8>, String> {
        let path = self.at().join(stored.file());
        let bytes = memory::caught(|| memory::read_file(KEPT, &path))
            .map_err(|e| format!("{}: {e}", path.display()))?
            .map_err(at(&path))?;
        match bytes.len() as u64 == stored.bytes && blake3::hash(&bytes) == stored.hash {
            true => Ok(bytes),
            false => Err(format!("{}: damaged: not what was sent", path.display())),
        }
    }

    /// Removes it: nobody knows of it.
    pub fn remove(self) {
        let _ = fs::remove_dir_all(self.at());
    }

    /// Leaves it as it is; it takes its room.
    pub fn leave(self) {
        let bytes = bytes_in(&self.at()).unwrap_or(0);
        self.folder.used.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Goes on with the journal behind what was read of it, with the scan that it told of last.
    /// What broke off, and files of no use, are removed; of a damaged journal a copy is kept.
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
                "{}: its last record breaks off, as it does where a server ends while it writes: it is dropped, nobody was answered",
                journal.display()
            )),
            _ => {
                let copy = path.join(DAMAGED);
                // It is there before the journal is cut off, after a power cut too.
                let copied = fs::copy(&journal, &copy)
                    .and_then(|_| OpenOptions::new().write(true).open(&copy)?.sync_all());
                copied.map_err(at(&copy))?;
                sync_folder(&path);
                warnings.push(format!(
                    "{}: damaged behind its first {good} bytes: what came later is lost; {DAMAGED}, beside it, is what was there",
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

/// A journal that is written to, with the files beside it.
struct Written {
    file: File,
    /// How much of it is whole, and the hash of that.
    length: u64,
    chain: Hash,
    /// Bytes that its folder has taken of the server's.
    bytes: u64,
    /// The number of the next scan.
    next: u64,
    /// How long it is at least, if it tells of what is alone, as far as that is known.
    least: u64,
    /// Whether what broke off could not be taken back.
    broken: bool,
}

impl Written {
    fn new(file: File) -> Written {
        let chain = first_hash();
        Written { file, length: 0, chain, bytes: 0, next: 0, least: 0, broken: false }
    }

    /// Writes how a journal begins.
    fn begin(&mut self, folder: &Folder) -> Result<(), Failure> {
        let mut about = Writer::default();
        about.text(&folder.about);
        self.file.write_all(MAGIC).map_err(|e| full(&e))?;
        self.length = MAGIC.len() as u64;
        self.append(folder, about.all())
    }

    /// Appends a record, which is on disk then; where that fails nothing was.
    fn append(&mut self, folder: &Folder, record: &[u8]) -> Result<(), Failure> {
        self.add(folder, record, true)
    }

    /// Appends a record, and synchronises it or leaves that for later.
    fn add(&mut self, folder: &Folder, record: &[u8], sync: bool) -> Result<(), Failure> {
        if self.broken {
            return Err(full(&io::Error::other("an earlier failure could not be taken back")));
        }
        let whole = (HEAD + HASH + record.len()) as u64;
        folder.reserve(whole)?;
        let hash = chained(&self.chain, record);
        let head = head(&self.chain, record.len() as u64);
        let written = self
            .file
            .write_all(&head)
            .and_then(|()| self.file.write_all(record))
            .and_then(|()| self.file.write_all(hash.as_bytes()))
            .and_then(|()| if sync { self.file.sync_data() } else { Ok(()) });
        if let Err(e) = written {
            folder.give_back(whole);
            // One that is not in its place yet goes as a whole.
            if !sync {
                return Err(full(&e));
            }
            let back = self.file.set_len(self.length);
            let back = back.and_then(|()| self.file.seek(SeekFrom::Start(self.length)));
            // What was told to have failed is not there after a power cut either.
            let back = back.and_then(|_| self.file.sync_data());
            self.broken = back.is_err();
            return Err(full(&e));
        }
        (self.length, self.chain) = (self.length + whole, hash);
        self.bytes += whole;
        Ok(())
    }
}

/// The folder of something that a server holds.
pub struct Journal {
    folder: Arc<Folder>,
    name: String,
    /// Whether it goes with what it is of.
    goes: AtomicBool,
    written: Mutex<Written>,
}

impl Journal {
    fn new(folder: &Arc<Folder>, name: String, written: Written) -> Journal {
        let (folder, goes) = (folder.clone(), AtomicBool::new(true));
        Journal { folder, name, goes, written: Mutex::new(written) }
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self) -> PathBuf {
        self.folder.path.join(&self.name)
    }

    /// It stays when the server ends, from now on.
    pub fn keep(&self) {
        self.goes.store(false, Ordering::Relaxed);
    }

    /// What it is of is let go: it is found no more, not even after a power cut, and goes when
    /// nobody works on that any longer.
    pub fn release(&self) {
        self.goes.store(true, Ordering::Relaxed);
        let gone = self.folder.path.join(format!("{GONE}{}", self.name));
        if fs::rename(self.path(), gone).is_err() {
            // As where a system renames no folder of which a file is open.
            let _ = fs::remove_dir_all(self.path());
        }
        sync_folder(&self.folder.path);
    }

    /// Appends what happened, as `tell` writes it. It is on disk when this returns; on an error it
    /// is not.
    pub fn note(&self, kind: u8, tell: impl FnOnce(&mut Writer)) -> Result<(), Failure> {
        let record = memory::caught(|| record(kind, tell))?;
        self.written().append(&self.folder, record.all())
    }

    /// Writes the bytes that a scan came as. They go again unless the journal tells of them.
    pub fn scan(self: &Arc<Journal>, bytes: &[u8], source: Source) -> Result<NewScan, Failure> {
        let length = bytes.len() as u64;
        self.folder.reserve(length)?;
        let number = {
            let mut written = self.written();
            written.bytes += length;
            written.next += 1;
            written.next - 1
        };
        let stored = Stored { number, bytes: length, hash: blake3::hash(bytes), source };
        let scan = NewScan { journal: self.clone(), stored, told: false };
        let path = scan.path();
        let write = new_file(&path).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        });
        write.map_err(|e| full(&e))?;
        sync_folder(&self.path());
        Ok(scan)
    }

    /// Begins the journal anew with a scan, if there is one, and what `tell` tells of it, in place
    /// of all that happened before; where that fails the old one stays.
    pub fn restart(
        &self,
        scan: Option<&Stored>,
        tell: impl FnOnce(&mut Fresh<'_>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut written = self.written();
        let mut fresh = Fresh::begin(self, u64::MAX)?;
        if let Some(stored) = scan {
            fresh.put(IMAGE, |out| stored.put(out))?;
        }
        tell(&mut fresh)?;
        fresh.take_place(&mut written)?;
        // Of other scans nothing tells any more.
        let kept = scan.map(Stored::file);
        for entry in fs::read_dir(self.path()).into_iter().flatten().flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            if !name.starts_with(SCAN) || kept.as_ref() == Some(&name) {
                continue;
            }
            let bytes = entry.metadata().map_or(0, |meta| meta.len());
            if fs::remove_file(entry.path()).is_ok() {
                self.folder.give_back(bytes);
                written.bytes -= bytes;
            }
        }
        Ok(())
    }

    /// Whether it may be much longer than what it is of needs, as far as that is known without
    /// waiting: whoever is at it just now may be waiting for the disk.
    pub fn seems_long(&self) -> bool {
        match self.written.try_lock() {
            Ok(written) => written.is_long(),
            Err(TryLockError::Poisoned(written)) => written.into_inner().is_long(),
            Err(TryLockError::WouldBlock) => false,
        }
    }

    /// What it is of became less: how long it has to be is not known any more.
    pub fn shrank(&self) {
        self.written().least = 0;
    }

    /// Writes the journal anew where it is long, as `tell` tells of what is, in place of what
    /// happened: undone and forgotten steps take no room any more. Where that makes it hardly
    /// shorter, or fails, the old one stays.
    ///
    /// # Errors
    /// The disk or memory refuses; what was noted is there none the less.
    pub fn renew(
        &self,
        tell: impl FnOnce(&mut Fresh<'_>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut written = self.written();
        if !written.is_long() {
            return Ok(());
        }
        let most = written.length / 3 * 2;
        // Whatever comes of it, the next attempt is when it has grown by as much again.
        written.least = most;
        let mut fresh = Fresh::begin(self, most)?;
        let told = tell(&mut fresh);
        if fresh.is_long {
            return Ok(());
        }
        told?;
        fresh.take_place(&mut written)?;
        written.least = written.length;
        Ok(())
    }
}

/// A journal that is to take the place of another, and goes again where it does not.
pub struct Fresh<'a> {
    journal: &'a Journal,
    /// None when it is in its place.
    new: Option<Written>,
    /// Bytes that it may have, and whether it would have more.
    most: u64,
    is_long: bool,
}

impl<'a> Fresh<'a> {
    /// An empty one.
    fn begin(journal: &'a Journal, most: u64) -> Result<Fresh<'a>, Failure> {
        let path = journal.path().join(FRESH);
        let new = Written::new(new_file(&path).map_err(|e| full(&e))?);
        let mut fresh = Fresh { journal, new: Some(new), most, is_long: false };
        if let Some(new) = &mut fresh.new {
            new.begin(&journal.folder)?;
        }
        Ok(fresh)
    }

    /// Appends a record of a kind.
    pub fn put(&mut self, kind: u8, tell: impl FnOnce(&mut Writer)) -> Result<(), Failure> {
        let record = memory::caught(|| record(kind, tell))?;
        self.add(&record)
    }

    fn add(&mut self, record: &Writer) -> Result<(), Failure> {
        let Some(new) = &mut self.new else { return Ok(()) };
        new.add(&self.journal.folder, record.all(), false)?;
        self.is_long = new.length > self.most;
        match self.is_long {
            true => Err(Failure::full("a journal that is hardly shorter than the one before")),
            false => Ok(()),
        }
    }

    /// Puts it in the place of the other: after a crash one of the two is there, as a whole.
    fn take_place(mut self, old: &mut Written) -> Result<(), Failure> {
        let Some(new) = &self.new else { return Ok(()) };
        let path = self.journal.path();
        let put = new.file.sync_all();
        let put = put.and_then(|()| fs::rename(path.join(FRESH), path.join(JOURNAL)));
        put.map_err(|e| full(&e))?;
        sync_folder(&path);
        let Some(mut new) = self.new.take() else { return Ok(()) };
        let scans = old.bytes - old.length_taken();
        self.journal.folder.give_back(old.length_taken());
        (new.bytes, new.next) = (new.bytes + scans, old.next);
        *old = new;
        Ok(())
    }
}

impl Drop for Fresh<'_> {
    fn drop(&mut self) {
        if let Some(new) = &self.new {
            let _ = fs::remove_file(self.journal.path().join(FRESH));
            self.journal.folder.give_back(new.bytes);
        }
    }
}

impl Written {
    /// Whether it may be much longer than what it is of needs.
    fn is_long(&self) -> bool {
        self.length > self.least.saturating_mul(2).saturating_add(MORE)
    }

    /// Bytes of the journal itself that its folder has taken of the server's.
    fn length_taken(&self) -> u64 {
        self.length - MAGIC.len() as u64
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        let bytes = self.written().bytes;
        self.folder.give_back(bytes);
        if self.goes.load(Ordering::Relaxed) {
            let _ = fs::remove_dir_all(self.path());
            let _ = fs::remove_dir_all(self.folder.path.join(format!("{GONE}{}", self.name)));
        }
    }
}

/// What may have a journal.
pub trait Kept {
    fn journal(&self) -> Option<&Arc<Journal>>;

    /// Writes its journal anew where that is much longer than what it tells of. Nobody may be at
    /// work with it.
    ///
    /// # Errors
    /// As [`Journal::renew`].
    fn renew(&self) -> Result<(), Failure>;
}

/// Writes a session anew: its beginning by a record of one kind, each step from there to `last` by
/// one of another, behind what `head` writes of the step.
pub fn session_anew(
    fresh: &mut Fresh<'_>,
    session: &Session,
    kinds: [u8; 2],
    last: usize,
    mut head: impl FnMut(usize, &mut Writer),
) -> Result<(), Failure> {
    let [first, step] = kinds;
    fresh.put(first, |out| {
        head(0, out);
        session.tell_first(out);
    })?;
    for n in 1..=last {
        fresh.put(step, |out| {
            head(n, out);
            session.tell_step(n, out);
        })?;
    }
    Ok(())
}

/// A record of a kind.
fn record(kind: u8, tell: impl FnOnce(&mut Writer)) -> Writer {
    let mut out = Writer::default();
    out.byte(kind);
    tell(&mut out);
    out
}

/// Has a session do one interaction, and what that changed written behind what `head` writes, where
/// there is a journal. Where either fails the session is as it was.
pub fn kept<T>(
    journal: Option<&Arc<Journal>>,
    session: &mut Session,
    kind: u8,
    head: impl FnOnce(&mut Writer),
    work: impl FnOnce(&mut Session) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let Some(journal) = journal else { return work(session) };
    let before = session.saved();
    let done = work(session)?;
    let noted = journal.note(kind, |out| {
        head(out);
        session.tell(&before, out);
    });
    match noted {
        Ok(()) => Ok(done),
        Err(e) => {
            session.restore(before);
            Err(e)
        }
    }
}

/// A scan's file that its journal does not tell of yet.
pub struct NewScan {
    journal: Arc<Journal>,
    stored: Stored,
    told: bool,
}

impl NewScan {
    fn path(&self) -> PathBuf {
        self.journal.path().join(self.stored.file())
    }

    /// Has the journal tell of it; where that fails it goes again.
    pub fn tell(self) -> Result<(Arc<Journal>, Stored), Failure> {
        self.journal.note(IMAGE, |out| self.stored.put(out))?;
        let journal = self.journal.clone();
        Ok((journal, self.told()))
    }

    /// What the journal is to tell.
    pub fn stored(&self) -> &Stored {
        &self.stored
    }

    /// The journal tells of it.
    pub fn told(mut self) -> Stored {
        self.told = true;
        self.stored.clone()
    }
}

impl Drop for NewScan {
    fn drop(&mut self) {
        if !self.told {
            let _ = fs::remove_file(self.path());
            self.journal.folder.give_back(self.stored.bytes);
            self.journal.written().bytes -= self.stored.bytes;
        }
    }
}
