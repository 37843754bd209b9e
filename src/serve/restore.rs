//! Restoring what an earlier server left on disk (`journal.rs`): scans are read again from the
//! bytes that they were sent as, answers and histories are those that were kept. The network is not
//! asked; where each object was looked at last is encoded when everything is restored, in the
//! background.

use super::arrived::{self, Arrived};
use super::clicked::Clicked;
use super::dls;
use super::found::Found;
use super::journal::{IMAGE, Owner, Source, Stored};
use super::lease::{Lease, State, scan_of};
use super::opened::Opened;
use super::store::Study;
use super::wire::unpack;
use super::work::Key;
use super::{Shared, failure::Failure};
use crate::memory;
use crate::model::Model;
use crate::session::Ahead;
use crate::session::kept::Reader;
use crate::sync::{locked, wait};
use crate::volume::Volume;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// The description in journals of the server that began them: its model, by name and architecture.
pub fn about(model: &Model, name: &str) -> String {
    let config = serde_json::to_string(model.config()).unwrap_or_default();
    let hash = blake3::hash(config.as_bytes()).to_hex();
    format!("the model {name} (architecture {})", &hash[..12])
}

/// The progress of the restoration.
pub struct Progress {
    all: usize,
    done: AtomicUsize,
    /// Whether the server ends meanwhile.
    stops: AtomicBool,
    is_over: AtomicBool,
    /// What was odd, as text for people, when it has finished.
    warnings: Mutex<Option<Vec<String>>>,
    news: Condvar,
}

impl Progress {
    /// The progress with this many objects to restore.
    pub fn new(all: usize) -> Progress {
        Progress {
            all,
            done: AtomicUsize::new(0),
            stops: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
            warnings: Mutex::default(),
            news: Condvar::new(),
        }
    }

    fn warnings(&self) -> MutexGuard<'_, Option<Vec<String>>> {
        locked(&self.warnings)
    }

    /// The number of objects examined, and their total number; none when it has finished.
    pub fn now(&self) -> Option<(usize, usize)> {
        let is_over = self.is_over.load(Ordering::Acquire);
        (!is_over).then(|| (self.done.load(Ordering::Relaxed), self.all))
    }

    /// Makes it end early: objects that were not examined stay as they are.
    pub fn stop(&self) {
        self.stops.store(true, Ordering::Relaxed);
    }

    /// Called when it has finished.
    pub fn end(&self, warnings: Vec<String>) {
        *self.warnings() = Some(warnings);
        self.is_over.store(true, Ordering::Release);
        self.news.notify_all();
    }

    /// Waits until it has finished, and returns what was odd.
    pub fn wait(&self) -> Vec<String> {
        let mut warnings = self.warnings();
        while warnings.is_none() {
            warnings = wait(&self.news, warnings);
        }
        warnings.clone().unwrap_or_default()
    }
}

/// Restores everything that was found. What cannot be read stays where it is; that, and what else
/// was odd, is reported when it has finished.
pub fn restore(shared: &Shared, found: Vec<Found>, mut warnings: Vec<String>) {
    let mut ahead = vec![];
    let all = AssertUnwindSafe(|| each(shared, found, &mut ahead, &mut warnings));
    if catch_unwind(all).is_err() {
        warnings.push("internal error while restoring state: some of it is not served".into());
    }
    let most = shared.settings.max_sessions;
    let (leases, sessions, scans) = shared.store.counts();
    let now = leases + sessions + scans;
    if now > most {
        warnings.push(format!(
            "{now} scans, clients and sessions were restored, more than the {most} of \
             --max-sessions: all are served, and new ones are refused until fewer are left"
        ));
    }
    // Objects restored first may have waited for long.
    shared.store.touch_all();
    shared.progress.end(warnings);
    ahead.into_iter().for_each(|(key, wishes)| shared.work.ahead(key, wishes));
}

/// Restores what was found one by one, and tells where each object will probably be looked at next,
/// with the key under which it is worked on.
fn each(
    shared: &Shared,
    all: Vec<Found>,
    ahead: &mut Vec<(Key, Vec<Ahead>)>,
    warnings: &mut Vec<String>,
) {
    for mut found in all {
        if shared.progress.stops.load(Ordering::Relaxed) {
            return;
        }
        let name = found.path().display().to_string();
        shared.progress.done.fetch_add(1, Ordering::Relaxed);
        // A scan may need more memory than there is now. An error with one does not affect the
        // others.
        let work = AssertUnwindSafe(|| memory::caught(|| read(shared, &mut found)));
        let read = match catch_unwind(work) {
            Ok(read) => read.unwrap_or_else(|e| Err(format!("{name}: {e}"))),
            Err(_) => Err(format!("{name}: internal error while restoring it")),
        };
        let mut back = match read {
            Ok(Some(back)) => back,
            Ok(None) => {
                found.remove();
                continue;
            }
            Err(e) => {
                warnings.push(format!("{e}; it is kept on disk, but not served"));
                found.leave();
                continue;
            }
        };
        ahead.push((found.key, back.ahead()));
        if let Err(e) = put(shared, found, back, warnings) {
            warnings.push(format!("{e}; it is kept on disk, but not served"));
        }
    }
}

/// The restored state of a journal, and the scan that it described last.
enum Back {
    Lease(Box<State>, Option<Stored>),
    Label(Box<Clicked>, Stored),
    Scan(Box<Study>, Stored),
}

impl Back {
    fn ahead(&mut self) -> Vec<Ahead> {
        match self {
            Back::Lease(state, _) => state.ahead().into_iter().collect(),
            Back::Label(clicked, _) => clicked.ahead().into_iter().collect(),
            Back::Scan(study, _) => study.ahead(),
        }
    }
}

/// Reads a journal to its end; none if no client can know of it.
fn read(shared: &Shared, found: &mut Found) -> Result<Option<Back>, String> {
    if matches!(found.owner, Owner::Lease | Owner::Snap) {
        let (mut state, mut scan) = (State::default(), None);
        follow(found, |found, kind, from| {
            if kind != IMAGE {
                return Ok(state.follow(kind, from));
            }
            let stored = Stored::take(from)?;
            state.begin(opened(shared, found, &stored)?, Some(stored.clone()));
            scan = Some(stored);
            Ok(Ok(()))
        })?;
        state.followed();
        return Ok(Some(Back::Lease(Box::new(state), scan)));
    }
    // Its scan comes first: without one, the client that sent it was not answered.
    let Some(first) = found.read()? else { return Ok(None) };
    let mut from = Reader::new(&first);
    if from.byte()? != IMAGE {
        return Err(format!("{}: does not start with a scan", found.path().display()));
    }
    let stored = Stored::take(&mut from)?;
    let opened = opened(shared, found, &stored)?;
    if found.owner == Owner::Label {
        let mut clicked = Clicked::new(opened);
        follow(found, |_, kind, from| Ok(clicked.follow(kind, from)))?;
        clicked.followed();
        return Ok(Some(Back::Label(Box::new(clicked), stored)));
    }
    let study = Study::new(opened);
    follow(found, |_, kind, from| Ok(study.follow(kind, from)))?;
    study.followed();
    Ok(Some(Back::Scan(Box::new(study), stored)))
}

/// Follows the rest of a journal. A record that cannot be followed ends it; an error of another
/// kind, which `each` returns as the outer error, leaves all of it as it is.
fn follow(
    found: &mut Found,
    mut each: impl FnMut(&Found, u8, &mut Reader) -> Result<Result<(), String>, String>,
) -> Result<(), String> {
    while let Some(record) = found.read()? {
        let mut from = Reader::new(&record);
        let kind = from.byte()?;
        if each(&*found, kind, &mut from)?.is_err() {
            found.unread();
        }
    }
    Ok(())
}

/// A scan as it was sent.
fn opened(shared: &Shared, found: &Found, stored: &Stored) -> Result<Opened, String> {
    let bytes = found.scan(stored)?;
    let opened = image(&stored.source, bytes, shared.most_scan)
        .and_then(|image| Opened::new(shared.engine(), image));
    opened.map_err(|e| format!("{}: {}", found.path().display(), e.message()))
}

fn image(source: &Source, bytes: Vec<u8>, most: usize) -> Result<Volume, Failure> {
    match source {
        Source::Plain => Ok(Volume::of_file(bytes, None)?),
        Source::File(modality) => one(arrived::read(bytes, *modality, None, most, |_| Ok(()))?),
        Source::Dicom(modality, series) => {
            one(arrived::read(bytes, *modality, series.as_deref(), most, |_| Ok(()))?)
        }
        Source::Array(spacing) => scan_of(unpack(&bytes, most)?, *spacing),
        Source::Form(kind) => {
            let mut headers = HeaderMap::new();
            let kind = HeaderValue::from_str(kind).map_err(|e| Failure::bad(e.to_string()))?;
            headers.insert(CONTENT_TYPE, kind);
            dls::image(&headers, &bytes, most)
        }
    }
}

fn one(arrived: Arrived) -> Result<Volume, Failure> {
    match arrived {
        Arrived::Scan(image) => Ok(*image),
        Arrived::Several(_) => Err(Failure::unfit("holds several series")),
    }
}

/// Adds a restored object to those that the server holds, and continues its journal.
fn put(
    shared: &Shared,
    found: Found,
    back: Back,
    warnings: &mut Vec<String>,
) -> Result<(), String> {
    let (owner, key) = (found.owner, found.key);
    let go_on = |scan: Option<&Stored>| found.go_on(scan, warnings).map(Arc::new);
    match back {
        Back::Lease(state, scan) => {
            let journal = go_on(scan.as_ref())?;
            shared.store.put_lease(owner, key, Lease::back(*state, journal));
        }
        Back::Label(mut clicked, scan) => {
            clicked.journal = Some(go_on(Some(&scan))?);
            clicked.stored = Some(scan);
            shared.store.put_label(key, *clicked);
        }
        Back::Scan(mut study, scan) => {
            study.journal = Some(go_on(Some(&scan))?);
            study.stored = Some(scan);
            shared.store.put_scan(key, *study);
        }
    }
    Ok(())
}
