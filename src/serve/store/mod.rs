//! What a server holds for its callers: leases of nnInteractive's protocol, sessions of ITK-SNAP's
//! and MONAI Label's, scans of prism's own interface with the objects on them. Who knows an
//! identifier, 128 bits of chance, may use what it names; what no caller uses is let go.

mod ids;
mod study;

pub(super) use ids::{Id, key_of, new_id, object_id, series_key, text};
pub(super) use study::{Named, Object, REDONE, RESET, SAID, Study, UNDONE, count};

use super::clicked::Clicked;
use super::failure::Failure;
use super::journal::{Folder, Journal, Kept, Owner};
use super::lease::Lease;
use super::settings::Settings;
use super::work::Key;
use crate::sync::locked;
use axum::http::StatusCode;
use ids::id_of;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use study::{DELETED, OBJECT};

/// Something held, and when it was used.
struct Held<T> {
    value: Arc<T>,
    active: Instant,
    seen: Instant,
}

impl<T> Held<T> {
    fn new(value: T) -> Held<T> {
        let now = Instant::now();
        Held { value: Arc::new(value), active: now, seen: now }
    }
}

#[derive(Default)]
struct All {
    leases: HashMap<Key, Held<Lease>>,
    /// ITK-SNAP's sessions, and MONAI Label's: their clients show no signs of life. Among the
    /// latter are series of the server's folder.
    snaps: HashMap<Key, Held<Lease>>,
    labels: HashMap<Key, Held<Clicked>>,
    scans: HashMap<Key, Held<Study>>,
    /// The scan of each object.
    objects: HashMap<Key, Key>,
    /// Places kept for scans that are being sent.
    kept: usize,
}

/// How a request touches what it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// Not at all.
    Look,
    /// A sign of life: the caller is still there, and does no work.
    Seen,
    /// Work on the object or the scan.
    Active,
}

impl All {
    /// Places that are taken of those that the server has: by what is held and by what is on its
    /// way.
    fn places(&self) -> usize {
        let held = self.leases.len() + self.snaps.len() + self.labels.len() + self.scans.len();
        held + self.kept
    }
}

/// All that is held.
pub struct Store {
    all: Mutex<All>,
    /// How often something new was asked for.
    comings: AtomicU64,
    most: usize,
    idle: Duration,
    liveness: Duration,
    /// Where what is held is kept on disk, if it is.
    folder: Option<Arc<Folder>>,
}

/// A place kept for a scan that is being sent.
pub struct Place<'a>(&'a Store);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.all().kept -= 1;
    }
}

/// A series that gave way to something new. It ends, on disk too, when this is dropped, which may
/// take a while: a thread that answers requests has another one do that.
pub struct GaveWay(Held<Clicked>);

impl Drop for GaveWay {
    fn drop(&mut self) {
        end(&self.0);
    }
}

impl Store {
    pub fn new(settings: &Settings, folder: Option<Arc<Folder>>) -> Store {
        let Settings { max_sessions, idle, liveness, .. } = *settings;
        let comings = AtomicU64::new(0);
        Store { all: Mutex::default(), comings, most: max_sessions, idle, liveness, folder }
    }

    fn all(&self) -> MutexGuard<'_, All> {
        locked(&self.all)
    }

    /// A journal for something new, where what is held is kept on disk. It goes again unless that
    /// is put among the others.
    pub fn journal(&self, owner: Owner, key: Key) -> Result<Option<Arc<Journal>>, Failure> {
        let create = |folder: &Arc<Folder>| folder.create(owner, key).map(Arc::new);
        self.folder.as_ref().map(create).transpose()
    }

    /// An error unless there is room for one more. Series of the server's folder give way: the one
    /// that no caller uses, and was used least recently, is returned, to be let go.
    fn room(&self, all: &mut All) -> Result<Option<GaveWay>, Failure> {
        self.comings.fetch_add(1, Ordering::Relaxed);
        if all.places() < self.most {
            return Ok(None);
        }
        let gives_way = |held: &Held<Clicked>| {
            held.value.series.is_some() && Arc::strong_count(&held.value) == 1
        };
        let series = all.labels.iter().filter(|&(_, held)| gives_way(held));
        let oldest = series.min_by_key(|(_, held)| held.active).map(|(key, _)| *key);
        let gone = oldest.and_then(|key| all.labels.remove(&key));
        let full = || Failure::full(format!("server is at capacity ({} sessions)", self.most));
        gone.map(|held| Some(GaveWay(held))).ok_or_else(full)
    }

    /// How many leases, sessions and scans there are.
    pub fn counts(&self) -> (usize, usize, usize) {
        let all = self.all();
        (all.leases.len(), all.snaps.len() + all.labels.len(), all.scans.len())
    }

    /// How often something new was asked for, while nothing is held or on its way: the same number
    /// twice is a time without callers.
    pub fn empty(&self) -> Option<u64> {
        let all = self.all();
        (all.places() == 0).then(|| self.comings.load(Ordering::Relaxed))
    }

    /// How many scans are being sent, or read, each of which has a place kept for it.
    pub fn arriving(&self) -> usize {
        self.all().kept
    }

    /// A new lease.
    pub fn claim(&self) -> Result<Id, Failure> {
        self.begin(Owner::Lease)
    }

    /// A new lease, or session of ITK-SNAP's, without an image.
    fn begin(&self, owner: Owner) -> Result<Id, Failure> {
        let id = new_id()?;
        let (place, gone) = self.keep()?;
        drop(gone);
        let lease = Lease::new(self.journal(owner, key_of(id))?);
        self.put_lease(owner, key_of(id), lease);
        drop(place);
        Ok(id)
    }

    /// Puts a lease, or a session of ITK-SNAP's, among the others.
    pub fn put_lease(&self, owner: Owner, key: Key, lease: Lease) {
        let held = held(lease);
        let mut all = self.all();
        let those = if owner == Owner::Snap { &mut all.snaps } else { &mut all.leases };
        those.insert(key, held);
    }

    /// A lease by the name that it was given.
    pub fn lease(&self, name: Option<&str>, touch: Touch) -> Result<(Key, Arc<Lease>), Failure> {
        let gone = |message: &str| Failure::new(StatusCode::GONE, message);
        let name = name.filter(|n| !n.is_empty()).ok_or_else(|| gone("lease token missing"))?;
        let unknown = || gone("lease expired or unknown");
        let (_, key, lease) = named(&mut self.all().leases, name, touch).ok_or_else(unknown)?;
        Ok((key, lease))
    }

    /// A lease, a scan or a session was worked on until now.
    pub fn worked(&self, key: Key) {
        let mut all = self.all();
        if let Some(held) = all.leases.get_mut(&key) {
            touched(held, Touch::Active);
        }
        if let Some(held) = all.scans.get_mut(&key) {
            touched(held, Touch::Active);
        }
        if let Some(held) = all.snaps.get_mut(&key) {
            touched(held, Touch::Active);
        }
        if let Some(held) = all.labels.get_mut(&key) {
            touched(held, Touch::Active);
        }
    }

    /// Seconds that a lease may go on without work.
    pub fn remaining(&self, key: Key) -> f64 {
        let active = self.all().leases.get(&key).map(|held| held.active);
        active.map_or(0.0, |a| self.idle.saturating_sub(a.elapsed()).as_secs_f64())
    }

    /// Lets a lease go, if it is there.
    pub fn release(&self, name: Option<&str>) {
        let key = name.and_then(id_of).map(key_of);
        let gone = key.and_then(|key| self.all().leases.remove(&key));
        let_go(gone);
    }

    /// A new session of ITK-SNAP's, without an image.
    pub fn start_snap(&self) -> Result<Id, Failure> {
        self.begin(Owner::Snap)
    }

    /// A session of ITK-SNAP's by its name.
    pub fn snap(&self, name: &str) -> Result<(Key, Arc<Lease>), Failure> {
        let found = named(&mut self.all().snaps, name, Touch::Active);
        found.map(|(_, key, lease)| (key, lease)).ok_or_else(no_session)
    }

    /// Ends a session of ITK-SNAP's.
    pub fn end_snap(&self, name: &str) -> Result<(), Failure> {
        let gone = id_of(name).and_then(|id| self.all().snaps.remove(&key_of(id)));
        let was_there = gone.is_some();
        let_go(gone);
        if was_there { Ok(()) } else { Err(no_session()) }
    }

    /// Puts a session of MONAI Label's, or a series of the server's folder, among the others.
    pub fn put_label(&self, key: Key, clicked: Clicked) -> Arc<Clicked> {
        let held = held(clicked);
        let value = held.value.clone();
        self.all().labels.insert(key, held);
        value
    }

    /// A session of MONAI Label's by its name.
    pub fn label(&self, name: &str, touch: Touch) -> Result<(Id, Key, Arc<Clicked>), Failure> {
        named(&mut self.all().labels, name, touch).ok_or_else(no_session)
    }

    /// A series of the server's folder, where it was read and is still held.
    pub fn series(&self, key: Key) -> Option<Arc<Clicked>> {
        let mut all = self.all();
        let held = all.labels.get_mut(&key)?;
        touched(held, Touch::Active);
        Some(held.value.clone())
    }

    /// Lets go what is held of a series, unless that is other than `held` by now.
    pub fn drop_series(&self, key: Key, held: &Arc<Clicked>) {
        let gone = {
            let mut all = self.all();
            let is_it = all.labels.get(&key).is_some_and(|there| Arc::ptr_eq(&there.value, held));
            is_it.then(|| all.labels.remove(&key)).flatten()
        };
        let_go(gone);
    }

    /// Ends a session of MONAI Label's, and returns it.
    pub fn end_label(&self, name: &str) -> Result<(Id, Arc<Clicked>), Failure> {
        let id = id_of(name).ok_or_else(no_session)?;
        let gone = self.all().labels.remove(&key_of(id)).ok_or_else(no_session)?;
        let value = gone.value.clone();
        let_go(Some(gone));
        Ok((id, value))
    }

    /// Keeps a place for a scan; also returns what gave way to it.
    pub fn keep(&self) -> Result<(Place<'_>, Option<GaveWay>), Failure> {
        let mut all = self.all();
        let gone = self.room(&mut all)?;
        all.kept += 1;
        Ok((Place(self), gone))
    }

    /// Puts a scan among the others, with the objects on it.
    pub fn put_scan(&self, key: Key, study: Study) -> Arc<Study> {
        let held = held(study);
        let value = held.value.clone();
        let objects: Vec<Key> = value.objects().iter().map(|o| o.key).collect();
        let mut all = self.all();
        all.objects.extend(objects.into_iter().map(|object| (object, key)));
        all.scans.insert(key, held);
        value
    }

    /// A scan by its name.
    pub fn scan(&self, name: &str) -> Result<(Id, Key, Arc<Study>), Failure> {
        named(&mut self.all().scans, name, Touch::Active).ok_or_else(no_scan)
    }

    /// Lets a scan and its objects go, if it is there.
    pub fn release_scan(&self, name: &str) {
        let Some(key) = id_of(name).map(key_of) else { return };
        let mut all = self.all();
        let gone = all.scans.remove(&key);
        all.objects.retain(|_, scan| *scan != key);
        drop(all);
        let_go(gone);
    }

    /// Puts an object on a scan, on which there may be so many.
    pub fn add_object(
        &self,
        scan: Key,
        study: &Study,
        object: Object,
        most: usize,
    ) -> Result<Arc<Object>, Failure> {
        let object = Arc::new(object);
        let _turn = study.change();
        if study.objects().len() >= most {
            return Err(Failure::unfit(format!("a scan has at most {most} objects")));
        }
        if let Some(journal) = &study.journal {
            journal.note(OBJECT, |out| object.put(out))?;
        }
        study.objects().push(object.clone());
        let mut all = self.all();
        // The scan may have been released meanwhile, with all that it was found by.
        if !all.scans.contains_key(&scan) {
            return Err(no_scan());
        }
        all.objects.insert(object.key, scan);
        Ok(object)
    }

    /// An object by its name, with its scan.
    pub fn object(&self, name: &str) -> Result<(Key, Arc<Study>, Arc<Object>), Failure> {
        let unknown = || {
            Failure::unknown(
                "no such object: it or its scan was released, or was unused for too long",
            )
        };
        let key = id_of(name).map(key_of).ok_or_else(unknown)?;
        let (scan, study) = {
            let mut all = self.all();
            let scan = *all.objects.get(&key).ok_or_else(unknown)?;
            let held = all.scans.get_mut(&scan).ok_or_else(unknown)?;
            touched(held, Touch::Active);
            (scan, held.value.clone())
        };
        let object = study.objects().iter().find(|o| o.key == key).cloned();
        Ok((scan, study, object.ok_or_else(unknown)?))
    }

    /// Lets an object go, if it is there.
    pub fn release_object(&self, name: &str) -> Result<(), Failure> {
        let Ok((_, study, object)) = self.object(name) else { return Ok(()) };
        let _turn = study.change();
        if let Some(journal) = &study.journal {
            journal.note(DELETED, |out| out.number(object.number))?;
            journal.shrank();
        }
        study.objects().retain(|o| o.key != object.key);
        self.all().objects.remove(&object.key);
        Ok(())
    }

    /// Whatever is held is as if it had been used just now.
    pub fn touch_all(&self) {
        let mut all = self.all();
        let All { leases, snaps, labels, scans, .. } = &mut *all;
        leases.values_mut().for_each(|held| touched(held, Touch::Active));
        snaps.values_mut().for_each(|held| touched(held, Touch::Active));
        labels.values_mut().for_each(|held| touched(held, Touch::Active));
        scans.values_mut().for_each(|held| touched(held, Touch::Active));
    }

    /// Lets go what no caller uses. Its memory is freed outside of the lock.
    pub fn sweep(&self) {
        let mut all = self.all();
        let All { leases, snaps, labels, scans, objects, .. } = &mut *all;
        let idle = |at: Instant| at.elapsed() > self.idle;
        let dead = |at: Instant| at.elapsed() > self.liveness;
        let gone_leases = unused(leases, |active, seen| idle(active) || dead(seen));
        let gone_snaps = unused(snaps, |active, _| idle(active));
        let gone_labels = unused(labels, |active, _| idle(active));
        let gone_scans = unused(scans, |active, _| idle(active));
        if !gone_scans.is_empty() {
            objects.retain(|_, scan| scans.contains_key(scan));
        }
        drop(all);
        let_go(gone_leases);
        let_go(gone_snaps);
        let_go(gone_labels);
        let_go(gone_scans);
    }

    /// Lets everything go. What is kept on disk stays there.
    pub fn clear(&self) {
        let all = std::mem::take(&mut *self.all());
        drop(all);
    }
}

/// Something as it is held from now on; what is kept of it on disk stays there when the server
/// ends.
fn held<T: Kept>(value: T) -> Held<T> {
    if let Some(journal) = value.journal() {
        journal.keep();
    }
    Held::new(value)
}

/// Lets things go, on disk too.
fn let_go<T: Kept>(gone: impl IntoIterator<Item = Held<T>>) {
    gone.into_iter().for_each(|held| end(&held));
}

/// What is kept on disk of something that is let go ends with it.
fn end<T: Kept>(held: &Held<T>) {
    if let Some(journal) = held.value.journal() {
        journal.release();
    }
}

/// What is said of a session that is not there.
fn no_session() -> Failure {
    Failure::unknown("no such session: it was ended, or was unused for too long")
}

/// What is said of a scan that is not there.
fn no_scan() -> Failure {
    Failure::unknown("no such scan: it was released, or was unused for too long")
}

/// What a name stands for, with its identifier and what it is found by.
fn named<T>(
    all: &mut HashMap<Key, Held<T>>,
    name: &str,
    touch: Touch,
) -> Option<(Id, Key, Arc<T>)> {
    let id = id_of(name)?;
    let key = key_of(id);
    let held = all.get_mut(&key)?;
    touched(held, touch);
    Some((id, key, held.value.clone()))
}

/// Takes out what is old by the times of its last work and its last sign of life. What a request
/// works on, or waits for, is in use.
fn unused<T>(
    all: &mut HashMap<Key, Held<T>>,
    is_old: impl Fn(Instant, Instant) -> bool,
) -> Vec<Held<T>> {
    let gone = all.extract_if(|_, held| {
        is_old(held.active, held.seen) && Arc::strong_count(&held.value) == 1
    });
    gone.map(|(_, held)| held).collect()
}

fn touched<T>(held: &mut Held<T>, touch: Touch) {
    let now = Instant::now();
    match touch {
        Touch::Look => {}
        Touch::Seen => held.seen = now,
        Touch::Active => (held.seen, held.active) = (now, now),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(most: usize, idle: u64, liveness: u64) -> Store {
        let settings = Settings {
            max_sessions: most,
            idle: Duration::from_millis(idle),
            liveness: Duration::from_millis(liveness),
            ..Settings::default()
        };
        Store::new(&settings, None)
    }

    #[test]
    fn there_is_room_for_so_many() {
        let store = store(2, 60_000, 60_000);
        let first = text(store.claim().unwrap());
        let (place, gone) = store.keep().unwrap();
        assert!(gone.is_none());
        assert!(store.claim().is_err() && store.keep().is_err());
        drop(place);
        let second = text(store.claim().unwrap());
        store.release(Some(&first));
        store.release(Some(&first));
        store.release(None);
        assert_eq!(store.counts(), (1, 0, 0));
        assert!(store.lease(Some(&first), Touch::Seen).is_err());
        assert!(store.lease(None, Touch::Seen).is_err());
        assert!(store.lease(Some(&second), Touch::Seen).is_ok());
    }

    // Elsewhere a folder with an open file keeps its name.
    #[cfg(unix)]
    #[test]
    fn what_is_let_go_in_use_is_whole_until_nobody_uses_it() {
        use super::super::lease::Buffer;
        use super::super::settings::Keep;
        use super::super::wire::Dtype;
        let at = tempfile::tempdir().unwrap();
        let keep = Keep { bytes: 1 << 20, ..Keep::at(at.path().join("state")) };
        let folder = Arc::new(Folder::open(&keep, "a test").unwrap());
        let folders = || {
            let all = std::fs::read_dir(&keep.folder).unwrap().map(Result::unwrap);
            let folders = all.filter(|entry| entry.path().is_dir());
            folders.map(|entry| entry.file_name().into_string().unwrap()).collect::<Vec<_>>()
        };
        let settings = Settings { max_sessions: 1, ..Settings::default() };
        let store = Store::new(&settings, Some(folder.clone()));
        let name = text(store.claim().unwrap());
        // What works on it has it, however long that takes.
        let (_, working) = store.lease(Some(&name), Touch::Active).unwrap();
        store.release(Some(&name));
        store.sweep();
        assert!(store.lease(Some(&name), Touch::Look).is_err());
        let taken = || folder.used.load(Ordering::Relaxed);
        let before = taken();
        assert!(before > 0 && folders().iter().all(|name| name.starts_with("gone-lease-")));
        let buffer = Buffer { shape: [3, 4, 5], dtype: Dtype::Bool };
        working.state().set_buffer(buffer).unwrap();
        assert!(taken() > before);
        // It can be written anew, too.
        let journal = working.journal().unwrap().clone();
        journal.restart(None, |_| Ok(())).unwrap();
        assert_eq!((taken(), folders().len()), (before, 1));
        drop(journal);
        // The last who used it frees it.
        let there = Arc::downgrade(&working);
        drop(working);
        assert!(there.upgrade().is_none());
        assert_eq!((taken(), folders().len()), (0, 0));
    }

    /// Sets the times of something held back, as if they had passed.
    fn back<T>(held: &mut HashMap<Key, Held<T>>, active: u64, seen: u64) {
        for held in held.values_mut() {
            held.active -= Duration::from_secs(active);
            held.seen -= Duration::from_secs(seen);
        }
    }

    #[test]
    fn what_nobody_uses_is_let_go() {
        // A client that shows no life goes early.
        let dead = store(2, 180_000, 60_000);
        let name = text(dead.claim().unwrap());
        back(&mut dead.all().leases, 75, 75);
        dead.lease(Some(&name), Touch::Seen).unwrap();
        dead.sweep();
        assert_eq!(dead.counts(), (1, 0, 0));
        back(&mut dead.all().leases, 0, 75);
        dead.sweep();
        assert_eq!(dead.counts(), (0, 0, 0));
        // One that lives and does nothing goes too; to look changes nothing.
        let idle = store(2, 60_000, 180_000);
        let name = text(idle.claim().unwrap());
        back(&mut idle.all().leases, 45, 45);
        let remaining = idle.remaining(idle.lease(Some(&name), Touch::Look).unwrap().0);
        assert!((0.0..=15.0).contains(&remaining), "{remaining}");
        idle.worked(idle.lease(Some(&name), Touch::Seen).unwrap().0);
        back(&mut idle.all().leases, 45, 45);
        idle.sweep();
        assert_eq!(idle.counts(), (1, 0, 0));
        // What a request works on is in use, however long that takes.
        let (_, held) = idle.lease(Some(&name), Touch::Seen).unwrap();
        back(&mut idle.all().leases, 45, 45);
        idle.sweep();
        assert_eq!(idle.counts(), (1, 0, 0));
        drop(held);
        idle.sweep();
        assert_eq!(idle.counts(), (0, 0, 0));
        // A session shows no life: it goes when it is idle, as its work's end says.
        let name = text(idle.start_snap().unwrap());
        assert_eq!(idle.counts(), (0, 1, 0));
        back(&mut idle.all().snaps, 75, 75);
        idle.worked(idle.snap(&name).unwrap().0);
        idle.sweep();
        assert!(idle.lease(Some(&name), Touch::Look).is_err());
        assert_eq!(idle.counts(), (0, 1, 0));
        // What was brought back long ago, while no call was answered, has its time from then on.
        back(&mut idle.all().snaps, 75, 75);
        idle.touch_all();
        idle.sweep();
        assert_eq!(idle.counts(), (0, 1, 0));
        back(&mut idle.all().snaps, 75, 75);
        idle.sweep();
        assert!(idle.snap(&name).is_err() && idle.end_snap(&name).is_err());
    }
}
