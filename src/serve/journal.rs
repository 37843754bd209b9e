//! What a server keeps on disk (`--state`), so that a restart or a crash loses nothing.
//!
//! Each scan of prism's own interface, lease and session has a folder of its own: the bytes that
//! its scan was sent as, and a journal, to which each change is appended and synchronised before it
//! is acknowledged. A record carries a hash of all before it and of itself: an incomplete one at
//! the end was never acknowledged and is dropped, and what follows a damaged one is not trusted.
//!
//! Folders are named by the hashes of identifiers and not by the identifiers themselves: someone
//! who reads a copy of them cannot act as their owner.

use super::failure::Failure;
use super::settings::Keep;
use super::work::Key;
use crate::memory;
use crate::output::{self, Lock, sync_folder};
use crate::session::Session;
use crate::session::kept::{Reader, Saved, Writer};
use crate::sync::{if_free, locked};
use crate::volume::Modality;
use axum::http::StatusCode;
use blake3::Hash;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// The first bytes of a journal.
pub(super) const MAGIC: &[u8; 8] = b"prismj01";
/// Bytes before a record's own: its length, and a check of that. A hash follows the record.
pub(super) const HEAD: usize = 16;
pub(super) const HASH: usize = 32;
/// Names in a folder.
pub(super) const JOURNAL: &str = "journal";
pub(super) const FRESH: &str = "journal.new";
pub(super) const SCAN: &str = "scan-";
/// The file that tells other servers that a folder is in use.
const LOCK: &str = "lock";
/// The prefix of the names of folders that were dropped.
pub(super) const GONE: &str = "gone-";
/// Records this short are written even if the folder is full, up to a number of bytes beyond: undo,
/// release and the like make room, or hardly take any.
const FEW: u64 = 256;
const SPARE: u64 = 16 << 20;
/// A journal that exceeds twice its necessary length by no more than this is left as it is.
const MORE: u64 = 4 << 20;

/// The kind of a record that describes a scan, in every journal.
pub const IMAGE: u8 = 1;

/// The kind of object that a folder belongs to.
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

    /// The owner that a folder's name stands for.
    pub(super) fn of(name: &str) -> Option<(Owner, Key)> {
        let (kind, key) = name.split_once('-')?;
        let owner = Owner::ALL.into_iter().find(|owner| owner.name() == kind)?;
        let key = Key::from_str_radix(key, 16).ok()?;
        // Only the canonical spelling counts.
        (owner.folder(key) == name).then_some((owner, key))
    }
}

/// How the bytes that a scan was sent as are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A file as it is.
    Plain,
    /// A file, and the modality that its sender stated.
    File(Option<Modality>),
    /// DICOM, the modality that its sender stated, and the selected series.
    Dicom(Option<Modality>, Option<String>),
    /// An array of nnInteractive's protocol with its spacing, `[k, j, i]`.
    Array([f64; 3]),
    /// A form of ITK-SNAP's protocol, with its Content-Type.
    Form(String),
}

/// A scan's file in a folder, as its journal describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    pub number: u64,
    pub(super) bytes: u64,
    pub(super) hash: Hash,
    pub source: Source,
}

impl Stored {
    /// The name of its file.
    pub(super) fn file(&self) -> String {
        format!("{SCAN}{}", self.number)
    }

    pub fn put(&self, out: &mut Writer) {
        out.number(self.number);
        out.number(self.bytes);
        out.bytes(self.hash.as_bytes());
        // It consists of text and finite numbers.
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

/// The folder of a server, which no other server uses for as long as it lives.
pub struct Folder {
    pub(super) path: PathBuf,
    most: u64,
    /// Objects that were not used for longer than this are deleted when they are found.
    pub(super) age: Duration,
    pub(super) used: AtomicU64,
    /// The description with which each journal begins, which a later server compares with its own.
    pub(super) about: String,
    lock: Lock,
}

/// Something in a folder could not be written; its path is not shown.
fn full(e: &io::Error) -> Failure {
    Failure::new(
        StatusCode::INSUFFICIENT_STORAGE,
        format!("cannot write to the server's disk ({e}): nothing was changed"),
    )
}

/// An error of a server's start, which names the file.
pub(super) fn at(path: &Path) -> impl Fn(io::Error) -> String {
    move |e| format!("{}: {e}", path.display())
}

/// A new file that only its owner may read.
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

/// A new folder that only its owner may read.
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
pub(super) fn bytes_in(path: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(path)? {
        sum += entry?.metadata()?.len();
    }
    Ok(sum)
}

impl Folder {
    /// Opens a folder, which is made if it does not exist. `about` is the description of the server
    /// in journals.
    ///
    /// # Errors
    /// It cannot be made or locked, other users may read it, or another server uses it.
    pub fn open(keep: &Keep, about: &str) -> Result<Folder, String> {
        let Keep { folder: path, bytes: most, age } = keep;
        match new_folder(path) {
            Ok(()) => sync_folder(output::folder(path)).map_err(at(path))?,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
            Err(e) => {
                return Err(format!("{}: cannot keep state in this folder: {e}", path.display()));
            }
        }
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = fs::metadata(path).map_err(at(path))?.permissions().mode();
            if mode & 0o077 != 0 {
                return Err(format!(
                    "{}: other users can read it (mode {:o}), and it keeps patients' scans: expected mode 700 (chmod 700)",
                    path.display(),
                    mode & 0o777
                ));
            }
        }
        let lock = output::lock(path, LOCK)?
            .ok_or_else(|| format!("{}: another server uses this folder", path.display()))?;
        let about = about.to_string();
        let (path, used) = (path.clone(), AtomicU64::new(0));
        Ok(Folder { path, most: *most, age: *age, used, about, lock })
    }

    /// What the server's operator should know about the folder.
    pub fn warning(&self) -> Option<String> {
        self.lock.warning().map(str::to_string)
    }

    /// Reserves room for `bytes` bytes.
    fn reserve(&self, bytes: u64) -> Result<(), Failure> {
        let spare = if bytes <= FEW { SPARE } else { 0 };
        let most = self.most.saturating_add(spare);
        let within = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= most);
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within);
        taken.map(drop).map_err(|used| {
            Failure::new(
                StatusCode::INSUFFICIENT_STORAGE,
                format!(
                    "{bytes} bytes are needed on the server's disk, {} of {} are left \
                     (--state-bytes): nothing was changed; release scans to make room",
                    self.most.saturating_sub(used),
                    self.most
                ),
            )
        })
    }

    fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// A folder for a new object. It is removed again unless [`Journal::keep`] is called.
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
        sync_folder(&path).and_then(|()| sync_folder(&self.path)).map_err(|e| full(&e))?;
        Ok(journal)
    }
}

/// The hash of a journal without a record.
pub(super) fn first_hash() -> Hash {
    blake3::hash(MAGIC)
}

/// The bytes before a record that follows a journal with this hash.
pub(super) fn head(chain: &Hash, length: u64) -> [u8; HEAD] {
    let mut hasher = blake3::Hasher::new();
    let check = hasher.update(chain.as_bytes()).update(&length.to_le_bytes()).finalize();
    let mut head = [0; HEAD];
    head[..8].copy_from_slice(&length.to_le_bytes());
    head[8..].copy_from_slice(&check.as_bytes()[..8]);
    head
}

/// The hash of a journal with this hash after one more record.
pub(super) fn chained(chain: &Hash, record: &[u8]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(chain.as_bytes()).update(&(record.len() as u64).to_le_bytes());
    hasher.update(record).finalize()
}

/// A journal that is written to, with the files beside it.
pub(super) struct Written {
    pub(super) file: File,
    /// The length of the intact part, and its hash.
    pub(super) length: u64,
    pub(super) chain: Hash,
    /// Bytes of the server's room that its folder has taken.
    pub(super) bytes: u64,
    /// The number of the next scan.
    pub(super) next: u64,
    /// The least length that it needs to describe the present state, as far as that is known.
    pub(super) least: u64,
    /// Whether nothing may be added: an incomplete record could not be removed.
    pub(super) broken: bool,
}

impl Written {
    fn new(file: File) -> Written {
        let chain = first_hash();
        Written { file, length: 0, chain, bytes: 0, next: 0, least: 0, broken: false }
    }

    /// Writes the beginning of a journal.
    fn begin(&mut self, folder: &Folder) -> Result<(), Failure> {
        let mut about = Writer::default();
        about.text(&folder.about);
        self.file.write_all(MAGIC).map_err(|e| full(&e))?;
        self.length = MAGIC.len() as u64;
        self.append(folder, about.all())
    }

    /// Appends a record, which is on disk when this returns; if it fails nothing was appended.
    fn append(&mut self, folder: &Folder, record: &[u8]) -> Result<(), Failure> {
        self.add(folder, record, true)
    }

    /// Appends a record, and synchronises it or leaves that for later.
    fn add(&mut self, folder: &Folder, record: &[u8], sync: bool) -> Result<(), Failure> {
        if self.broken {
            return Err(full(&io::Error::other("an earlier failure could not be undone")));
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
            // A journal that is not in its place yet is synchronised as a whole.
            if !sync {
                return Err(full(&e));
            }
            let back = self.file.set_len(self.length);
            let back = back.and_then(|()| self.file.seek(SeekFrom::Start(self.length)));
            // What was reported as failed is not there after a power cut either.
            let back = back.and_then(|_| self.file.sync_data());
            self.broken = back.is_err();
            return Err(full(&e));
        }
        (self.length, self.chain) = (self.length + whole, hash);
        self.bytes += whole;
        Ok(())
    }
}

/// The folder of an object that a server holds.
pub struct Journal {
    folder: Arc<Folder>,
    name: String,
    /// Whether it is removed together with its object.
    goes: AtomicBool,
    /// Whether its object was let go, and it has the name of those.
    gone: AtomicBool,
    /// Whether it took the place of another, and its folder could not be synchronised since: it is
    /// not known which of the two a power cut would leave. Used with `written` locked.
    unsynced: AtomicBool,
    written: Mutex<Written>,
}

impl Journal {
    pub(super) fn new(folder: &Arc<Folder>, name: String, written: Written) -> Journal {
        Journal {
            folder: folder.clone(),
            name,
            goes: AtomicBool::new(true),
            gone: AtomicBool::new(false),
            unsynced: AtomicBool::new(false),
            written: Mutex::new(written),
        }
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        locked(&self.written)
    }

    fn path(&self) -> PathBuf {
        match self.gone.load(Ordering::Relaxed) {
            true => self.folder.path.join(format!("{GONE}{}", self.name)),
            false => self.folder.path.join(&self.name),
        }
    }

    /// From now on it stays when the server ends.
    pub fn keep(&self) {
        self.goes.store(false, Ordering::Relaxed);
    }

    /// Lets the journal go with its object: it will not be found again, not even after a power cut,
    /// and is removed when it is no longer in use. Until then it is written as before; a scan that
    /// is being written at that moment may fail.
    pub fn release(&self) {
        // Not while it is rewritten, which needs its folder where it is.
        let _turn = self.written();
        self.goes.store(true, Ordering::Relaxed);
        let gone = self.folder.path.join(format!("{GONE}{}", self.name));
        match fs::rename(self.path(), gone) {
            Ok(()) => self.gone.store(true, Ordering::Relaxed),
            // As on systems that cannot rename a folder with an open file.
            Err(_) => drop(fs::remove_dir_all(self.path())),
        }
        // A release has no way to fail: what a failing disk brings back is removed by its age.
        let _ = sync_folder(&self.folder.path);
    }

    /// Appends what happened, as `tell` writes it. It is on disk when this returns; on an error it
    /// is not.
    pub fn note(&self, kind: u8, tell: impl FnOnce(&mut Writer)) -> Result<(), Failure> {
        let record = memory::caught(|| record(kind, tell))?;
        let mut written = self.written();
        // What is added to a journal that a power cut may take is not kept.
        if self.unsynced.load(Ordering::Relaxed) {
            sync_folder(&self.path()).map_err(|e| full(&e))?;
            self.unsynced.store(false, Ordering::Relaxed);
        }
        written.append(&self.folder, record.all())
    }

    /// Writes the bytes that a scan was sent as. They are removed again unless the journal
    /// describes them.
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
        write.and_then(|()| sync_folder(&self.path())).map_err(|e| full(&e))?;
        Ok(scan)
    }

    /// Rewrites the journal with a scan, if there is one, and the state that `tell` writes, in
    /// place of all that happened before; if that fails the old one stays.
    ///
    /// # Errors
    /// The disk or memory refuses. If only the folder cannot be synchronised that is none: the new
    /// one is in its place, and nothing more is written to it until the folder is synchronised.
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
        if self.unsynced.load(Ordering::Relaxed) {
            // After a power cut the old one may be there, which refers to another scan.
            return Ok(());
        }
        // Nothing refers to other scans any more.
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

    /// Whether it may be much longer than its object needs, as far as that is known without
    /// waiting: a thread that uses it at present may be waiting for the disk.
    pub fn seems_long(&self) -> bool {
        if_free(&self.written).is_some_and(|written| written.is_long())
    }

    /// Records that the object became smaller: the journal's necessary length is not known any
    /// more.
    pub fn shrank(&self) {
        self.written().least = 0;
    }

    /// Rewrites the journal if it is long, with the present state as `tell` writes it in place of
    /// what happened: undone and forgotten steps take no room any more. If that makes it hardly
    /// shorter, or fails, the old one stays.
    ///
    /// # Errors
    /// The disk or memory refuses; the old journal is still there.
    pub fn renew(
        &self,
        tell: impl FnOnce(&mut Fresh<'_>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut written = self.written();
        if !written.is_long() {
            return Ok(());
        }
        let most = written.length / 3 * 2;
        // Whatever the result, the next attempt is when it has grown by as much again.
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

/// A journal that is to replace another, and is removed if it does not.
pub struct Fresh<'a> {
    journal: &'a Journal,
    /// None when it is in its place.
    new: Option<Written>,
    /// The most bytes that it may have, and whether it would need more.
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

    /// Puts it in the place of the other: after a crash one of the two is there, complete. On an
    /// error the other one is.
    fn take_place(mut self, old: &mut Written) -> Result<(), Failure> {
        let Some(new) = &self.new else { return Ok(()) };
        let path = self.journal.path();
        let put = new.file.sync_all();
        let put = put.and_then(|()| fs::rename(path.join(FRESH), path.join(JOURNAL)));
        put.map_err(|e| full(&e))?;
        let synced = sync_folder(&path);
        let Some(mut new) = self.new.take() else { return Ok(()) };
        let scans = old.bytes - old.length_taken();
        self.journal.folder.give_back(old.length_taken());
        (new.bytes, new.next) = (new.bytes + scans, old.next);
        *old = new;
        // The other is gone, so this is no error: the caller goes on. Which of the two a power cut
        // would leave is not known: nothing is added until that succeeds.
        self.journal.unsynced.store(synced.is_err(), Ordering::Relaxed);
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
    /// Whether it may be much longer than its object needs.
    fn is_long(&self) -> bool {
        self.length > self.least.saturating_mul(2).saturating_add(MORE)
    }

    /// Bytes of the server's room that the journal itself has taken.
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
        }
    }
}

/// An object that may have a journal.
pub trait Kept {
    fn journal(&self) -> Option<&Arc<Journal>>;

    /// Rewrites its journal if that is much longer than its state needs. The object must not be in
    /// use.
    ///
    /// # Errors
    /// As [`Journal::renew`].
    fn renew(&self) -> Result<(), Failure>;
}

/// Rewrites a session: its beginning by a record of one kind, each step from there to `last` by one
/// of another, after what `head` writes about the step.
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

/// A session that returns to its earlier state unless the change is kept: on failure, if memory is
/// refused, and on a panic.
struct Attempt<'a> {
    session: &'a mut Session,
    /// None once it is kept.
    before: Option<Saved>,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if let Some(before) = self.before.take() {
            self.session.restore(before);
        }
    }
}

/// Changes a session, and keeps the change if there is a journal: what `tell` writes from the
/// session's new state and its earlier one. The answer to the client is made as part of the change,
/// because memory for it may be refused: whatever fails, the session is unchanged, and nothing is
/// written.
pub fn attempted<T>(
    journal: Option<&Arc<Journal>>,
    session: &mut Session,
    kind: u8,
    work: impl FnOnce(&mut Session) -> Result<T, Failure>,
    tell: impl FnOnce(&Session, &Saved, &mut Writer),
) -> Result<T, Failure> {
    let saved = session.saved();
    let mut attempt = Attempt { session, before: Some(saved) };
    let done = work(attempt.session)?;
    if let (Some(journal), Some(before)) = (journal, &attempt.before) {
        journal.note(kind, |out| tell(attempt.session, before, out))?;
    }
    attempt.before = None;
    Ok(done)
}

/// Runs one interaction of a session, and writes what that changed after what `head` writes, if
/// there is a journal; as [`attempted`].
pub fn kept<T>(
    journal: Option<&Arc<Journal>>,
    session: &mut Session,
    kind: u8,
    head: impl FnOnce(&mut Writer),
    work: impl FnOnce(&mut Session) -> Result<T, Failure>,
) -> Result<T, Failure> {
    attempted(journal, session, kind, work, |session, before, out| {
        head(out);
        session.tell(before, out);
    })
}

/// A scan's file that its journal does not describe yet.
pub struct NewScan {
    journal: Arc<Journal>,
    stored: Stored,
    told: bool,
}

impl NewScan {
    fn path(&self) -> PathBuf {
        self.journal.path().join(self.stored.file())
    }

    /// Makes the journal describe it; if that fails the file is removed.
    pub fn tell(self) -> Result<(Arc<Journal>, Stored), Failure> {
        self.journal.note(IMAGE, |out| self.stored.put(out))?;
        let journal = self.journal.clone();
        Ok((journal, self.told()))
    }

    /// The description for the journal.
    pub fn stored(&self) -> &Stored {
        &self.stored
    }

    /// Called when the journal describes it.
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
