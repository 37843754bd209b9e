//! The table of handles.
//!
//! A handle is an index in the table and the number of objects that the entry has held before, made
//! to look like a pointer that points nowhere: it is odd, so that no object's address is equal to
//! it. Looking it up lends the object for the time of a call ([`Lent`]); freeing a handle makes it
//! unusable at once, then waits for the calls that still have the object, so that nothing that the
//! caller lent in turn is read after it returns.

use super::status::{Failure, is_nested, prism_status};
use crate::sync::{locked, wait};
use std::any::Any;
use std::ops::Deref;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// A kind of object that C holds.
pub(super) trait Object: Any + Send + Sync {
    /// What messages call such an object, with its article.
    const NAME: &'static str;
}

/// An object with a handle.
struct Entry {
    object: Arc<dyn Any + Send + Sync>,
    name: &'static str,
}

struct Slot {
    /// The number of objects that this entry has held before.
    generation: usize,
    object: Option<Arc<Entry>>,
}

#[derive(Default)]
struct Table {
    slots: Vec<Slot>,
    free: Vec<usize>,
}

/// The bits of an index.
const PLACE: u32 = 24;

static TABLE: Mutex<Table> = Mutex::new(Table { slots: vec![], free: vec![] });

/// Notified when a call has given an object back.
static GIVEN_BACK: Condvar = Condvar::new();

fn table() -> MutexGuard<'static, Table> {
    locked(&TABLE)
}

/// An object for the time of a call.
pub(super) struct Lent<T> {
    object: Option<Arc<T>>,
    entry: Option<Arc<Entry>>,
}

impl<T> Lent<T> {
    /// A share of the object that outlasts the call, and that freeing does not wait for.
    pub fn share(&self) -> Arc<T> {
        self.object.clone().expect("there until dropped")
    }
}

impl<T> Deref for Lent<T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.object.as_ref().expect("there until dropped")
    }
}

impl<T> Drop for Lent<T> {
    fn drop(&mut self) {
        drop(self.object.take());
        // Under the lock, so that a thread that waits either sees it before or is notified.
        let table = table();
        let waited_for = self.entry.take().is_some_and(|entry| Arc::strong_count(&entry) <= 2);
        drop(table);
        if waited_for {
            GIVEN_BACK.notify_all();
        }
    }
}

/// A place in the table for an object that is still to come; given back if none does.
pub(super) struct Vacant(usize);

/// Takes a place in the table.
///
/// # Errors
/// All are in use.
pub(super) fn vacant() -> Result<Vacant, Failure> {
    let mut table = table();
    let place = table.free.pop().unwrap_or(table.slots.len());
    if place >> PLACE != 0 {
        return Err(Failure::argument(format!(
            "{} handles are in use: free some",
            table.slots.len()
        )));
    }
    if place == table.slots.len() {
        table.slots.push(Slot { generation: 0, object: None });
    }
    Ok(Vacant(place))
}

impl Vacant {
    /// Puts an object there.
    pub fn fill<T: Object, H>(self, object: Arc<T>) -> *mut H {
        let entry = Arc::new(Entry { object, name: T::NAME });
        let place = self.0;
        // It is not vacant any more.
        std::mem::forget(self);
        let mut table = table();
        let slot = &mut table.slots[place];
        slot.object = Some(entry);
        std::ptr::without_provenance_mut((slot.generation << PLACE | place) << 1 | 1)
    }
}

impl Drop for Vacant {
    fn drop(&mut self) {
        table().free.push(self.0);
    }
}

/// Puts an object into the table.
pub(super) fn make<T: Object, H>(object: Arc<T>) -> Result<*mut H, Failure> {
    Ok(vacant()?.fill(object))
}

fn unknown<T: Object, H>(handle: *const H) -> Failure {
    Failure::new(
        prism_status::PRISM_INVALID_HANDLE,
        format!("{handle:?} is not {}: it was freed or is invalid", T::NAME),
    )
}

/// The index of a handle, and its generation.
fn place<H>(handle: *const H) -> Option<(usize, usize)> {
    let number = handle.addr();
    (number & 1 == 1).then_some((number >> 1 & ((1 << PLACE) - 1), number >> 1 >> PLACE))
}

/// The object of a handle.
pub(super) fn get<T: Object, H>(handle: *const H) -> Result<Lent<T>, Failure> {
    if handle.is_null() {
        return Err(Failure::argument(format!("NULL where {} is needed", T::NAME)));
    }
    let (at, generation) = place(handle).ok_or_else(|| unknown::<T, H>(handle))?;
    let table = table();
    let slot = table.slots.get(at).filter(|s| s.generation == generation);
    let entry = slot.and_then(|s| s.object.clone()).ok_or_else(|| unknown::<T, H>(handle))?;
    match entry.object.clone().downcast() {
        Ok(object) => Ok(Lent { object: Some(object), entry: Some(entry) }),
        Err(_) => {
            let message = format!("{handle:?} is {}, expected {}", entry.name, T::NAME);
            Err(Failure::new(prism_status::PRISM_INVALID_HANDLE, message))
        }
    }
}

/// Takes a handle out of the table, and waits until no call has its object any more. NULL is
/// ignored.
///
/// # Errors
/// It is not a valid handle; or, within a callback, another call has the object, perhaps the one
/// that called back: it stays.
pub(super) fn free<T: Object, H>(handle: *const H) -> Result<(), Failure> {
    if handle.is_null() {
        return Ok(());
    }
    drop(get::<T, H>(handle)?);
    let (at, generation) = place(handle).ok_or_else(|| unknown::<T, H>(handle))?;
    let mut table = table();
    // Another thread may have been faster.
    let slot = table
        .slots
        .get_mut(at)
        .filter(|s| s.generation == generation)
        .ok_or_else(|| unknown::<T, H>(handle))?;
    let lent = slot.object.as_ref().is_some_and(|entry| Arc::strong_count(entry) > 1);
    if lent && is_nested() {
        let message = format!(
            "{} is in use by another call, and a callback cannot wait for it: free it later",
            T::NAME
        );
        return Err(Failure::new(prism_status::PRISM_BUSY, message));
    }
    let gone = slot.object.take();
    slot.generation += 1;
    table.free.push(at);
    while gone.as_ref().is_some_and(|entry| Arc::strong_count(entry) > 1) {
        table = wait(&GIVEN_BACK, table);
    }
    // Its contents may take a while to free: not under the lock.
    drop(table);
    drop(gone);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Thing;
    impl Object for Thing {
        const NAME: &'static str = "a thing";
    }
    struct Other;
    impl Object for Other {
        const NAME: &'static str = "another";
    }
    enum Handle {}

    #[test]
    fn freed_and_foreign_handles_are_told_apart() {
        let handle: *mut Handle = make(Arc::new(Thing)).ok().unwrap();
        assert!(get::<Thing, _>(handle).is_ok());
        let message = get::<Other, _>(handle).err().unwrap().message;
        assert!(message.ends_with("is a thing, expected another"), "{message}");
        assert!(free::<Other, _>(handle).is_err(), "another kind's function frees it");
        assert!(free::<Thing, _>(handle).is_ok());
        for again in [get::<Thing, _>(handle).err(), free::<Thing, _>(handle).err()] {
            assert_eq!(again.unwrap().status, prism_status::PRISM_INVALID_HANDLE);
        }
        // The next object in the entry has another handle.
        let next: *mut Handle = make(Arc::new(Thing)).ok().unwrap();
        assert!(
            next != handle && get::<Thing, _>(handle).is_err() && free::<Thing, _>(next).is_ok()
        );
        for address in [2usize, usize::MAX, 0xffff_ffff_ffff_fffe, 1 << 30 | 1] {
            assert!(get::<Thing, Handle>(std::ptr::without_provenance(address)).is_err());
        }
        assert!(free::<Thing, Handle>(std::ptr::null()).is_ok());
    }

    #[test]
    fn a_place_that_was_taken_is_filled_or_given_back() {
        let handle: *mut Handle = vacant().ok().unwrap().fill(Arc::new(Thing));
        assert!(get::<Thing, _>(handle).is_ok() && free::<Thing, _>(handle).is_ok());
        for _ in 0..1_000 {
            assert!(vacant().is_ok());
        }
        assert!(table().slots.len() < 1_000);
    }

    #[test]
    fn freeing_waits_for_calls_that_have_the_object() {
        use std::sync::atomic::{AtomicBool, Ordering};
        struct Slow(Arc<AtomicBool>);
        impl Object for Slow {
            const NAME: &'static str = "a slow thing";
        }
        for _ in 0..100 {
            let done = Arc::new(AtomicBool::new(false));
            let handle: *mut Handle = make(Arc::new(Slow(done.clone()))).ok().unwrap();
            let lent = get::<Slow, _>(handle).ok().unwrap();
            let worker = std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(2));
                lent.0.store(true, Ordering::SeqCst);
            });
            assert!(free::<Slow, _>(handle).is_ok());
            assert!(done.load(Ordering::SeqCst), "it returned before the call's end");
            assert!(get::<Slow, _>(handle).is_err());
            worker.join().unwrap();
        }
    }
}
