//! A scan of prism's own interface with the objects on it, and what its journal tells of them.

use super::ids::{Id, key_of, object_id};
use crate::serve::failure::Failure;
use crate::serve::journal::{IMAGE, Journal, Kept, Stored, session_anew};
use crate::serve::opened::Opened;
use crate::serve::work::Key;
use crate::session::kept::{Reader, Writer};
use crate::session::{Ahead, Session};
use crate::sync::{if_free, locked};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// What a scan's journal tells, beside the scan itself.
pub(super) const OBJECT: u8 = 2;
pub(super) const DELETED: u8 = 3;
pub const SAID: u8 = 4;
pub const UNDONE: u8 = 5;
pub const REDONE: u8 = 6;
pub const RESET: u8 = 7;
/// How an object that is told of anew begins, and the number of the next one.
const BEGUN: u8 = 8;
const NEXT: u8 = 9;
/// An object is called otherwise, or has another colour.
const NAMED: u8 = 10;

/// What an object is called, and how it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub name: String,
    pub colour: [u8; 3],
}

impl Named {
    fn put(&self, out: &mut Writer) {
        out.text(&self.name);
        out.bytes(&self.colour);
    }

    fn of(from: &mut Reader) -> Result<Named, String> {
        let (name, colour) = (from.text()?, from.bytes(3)?);
        Ok(Named { name, colour: std::array::from_fn(|at| colour[at]) })
    }
}

/// An object on a scan.
pub struct Object {
    /// Which of its scan it is: no two have the same number, those that were let go included.
    pub number: u64,
    pub(super) key: Key,
    named: Mutex<Named>,
    session: Mutex<Session>,
    /// How many voxels its answer has, for those who do not want to wait for the session.
    pub voxels: AtomicUsize,
}

impl Object {
    /// The session. What a panic left is whole: it changes when an interaction has come to its end.
    pub fn session(&self) -> MutexGuard<'_, Session> {
        locked(&self.session)
    }

    /// The session, unless something is done with it.
    pub fn idle_session(&self) -> Option<MutexGuard<'_, Session>> {
        if_free(&self.session)
    }

    /// What it is called.
    pub fn named(&self) -> Named {
        locked(&self.named).clone()
    }

    pub(super) fn put(&self, out: &mut Writer) {
        out.number(self.number);
        out.bytes(&self.key.to_le_bytes());
        self.named().put(out);
    }
}

/// A scan with the objects on it.
pub struct Study {
    pub opened: Opened,
    objects: Mutex<Vec<Arc<Object>>>,
    /// Held while an object comes or goes, so that the journal tells of them in the same order.
    /// Reading the objects does not wait for the disk.
    changing: Mutex<()>,
    /// The number of the next object.
    next: AtomicU64,
    /// Where what happens is written, and the scan as that tells of it.
    pub journal: Option<Arc<Journal>>,
    pub stored: Option<Stored>,
}

impl Kept for Study {
    fn journal(&self) -> Option<&Arc<Journal>> {
        self.journal.as_ref()
    }

    fn renew(&self) -> Result<(), Failure> {
        let (Some(journal), Some(stored)) = (&self.journal, &self.stored) else { return Ok(()) };
        let _turn = self.change();
        let objects = self.objects().clone();
        let sessions: Vec<_> = objects.iter().map(|object| object.session()).collect();
        journal.renew(|fresh| {
            fresh.put(IMAGE, |out| stored.put(out))?;
            // Numbers of objects that were let go are not given again.
            fresh.put(NEXT, |out| out.number(self.next.load(Ordering::Relaxed)))?;
            for (object, session) in objects.iter().zip(&sessions) {
                fresh.put(OBJECT, |out| object.put(out))?;
                let (back, forth) = session.depth();
                let head = |_: usize, out: &mut Writer| out.number(object.number);
                session_anew(fresh, session, [BEGUN, SAID], back + forth, head)?;
                for _ in 0..forth {
                    fresh.put(UNDONE, |out| out.number(object.number))?;
                }
            }
            Ok(())
        })
    }
}

impl Study {
    /// A scan without objects, of which nothing is written.
    pub fn new(opened: Opened) -> Study {
        let (objects, changing) = (Mutex::default(), Mutex::default());
        let next = AtomicU64::new(0);
        Study { opened, objects, changing, next, journal: None, stored: None }
    }

    /// The objects, in the order in which they came.
    pub fn objects(&self) -> MutexGuard<'_, Vec<Arc<Object>>> {
        locked(&self.objects)
    }

    /// A turn to add an object or to take one away.
    pub(super) fn change(&self) -> MutexGuard<'_, ()> {
        locked(&self.changing)
    }

    /// A new object for a scan that is called `id`, which is not on it yet.
    pub fn object(&self, id: Id, named: Named) -> Object {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.numbered(number, key_of(object_id(id, number)), named)
    }

    fn numbered(&self, number: u64, key: Key, named: Named) -> Object {
        let (named, session) = (Mutex::new(named), Mutex::new(Session::new(&self.opened.scan)));
        Object { number, key, named, session, voxels: AtomicUsize::new(0) }
    }

    /// Calls an object on it otherwise, or gives it another colour.
    pub fn rename(
        &self,
        object: &Object,
        name: Option<String>,
        colour: Option<[u8; 3]>,
    ) -> Result<(), Failure> {
        let _turn = self.change();
        let before = object.named();
        let named =
            Named { name: name.unwrap_or(before.name), colour: colour.unwrap_or(before.colour) };
        if let Some(journal) = &self.journal {
            journal.note(NAMED, |out| {
                out.number(object.number);
                named.put(out);
            })?;
        }
        *locked(&object.named) = named;
        Ok(())
    }

    /// Does again what its journal tells.
    pub fn follow(&self, kind: u8, from: &mut Reader) -> Result<(), String> {
        let number = from.number()?;
        if kind == OBJECT {
            let key = from.bytes(size_of::<Key>())?;
            let key = Key::from_le_bytes(std::array::from_fn(|at| key[at]));
            self.objects().push(Arc::new(self.numbered(number, key, Named::of(from)?)));
            self.next.fetch_max(number.saturating_add(1), Ordering::Relaxed);
            return Ok(());
        }
        if kind == NEXT {
            self.next.fetch_max(number, Ordering::Relaxed);
            return Ok(());
        }
        // What was still done to an object that was let go meanwhile is gone with it.
        let object = self.objects().iter().find(|o| o.number == number).cloned();
        let Some(object) = object else { return Ok(()) };
        if kind == NAMED {
            let named = Named::of(from)?;
            *locked(&object.named) = named;
            return Ok(());
        }
        let mut session = object.session();
        let done = match kind {
            DELETED => {
                self.objects().retain(|o| o.number != number);
                true
            }
            BEGUN => {
                session.follow_first(from)?;
                true
            }
            SAID => {
                session.follow(from)?;
                true
            }
            UNDONE => session.undo(),
            REDONE => session.redo(),
            RESET => {
                session.reset();
                true
            }
            _ => false,
        };
        if done { Ok(()) } else { Err(format!("unknown record of kind {kind}")) }
    }

    /// Where each object on it will be looked at next.
    pub fn ahead(&self) -> Vec<Ahead> {
        self.objects().iter().filter_map(|object| object.session().ahead()).collect()
    }

    /// All of its journal was followed.
    pub fn followed(&self) {
        for object in self.objects().iter() {
            let mut session = object.session();
            session.look_anew();
            count(object, session.prediction().map_or(0, |p| p.field.voxels()));
        }
    }
}

/// Sets how many voxels an object has.
pub fn count(object: &Object, voxels: usize) {
    object.voxels.store(voxels, Ordering::Relaxed);
}
