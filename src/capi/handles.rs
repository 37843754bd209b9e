//! The table behind the handles.
//!
//! A handle is a place in the table and the number of objects that the place has held before, made to look like a pointer that points nowhere: odd, so that no object's address is
//! equal to it. Looking it up takes a share of the object, so that freeing a handle while another thread is at work with it only makes it unusable from then on.

use super::status::{Failure, prism_status};
use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard};

/// A kind of object that C holds.
pub(super) trait Object: Any + Send + Sync {
    /// What messages call it, with its article.
    const NAME: &'static str;
}

struct Slot {
    /// Objects that this place has held before.
    generation: usize,
    object: Option<(Arc<dyn Any + Send + Sync>, &'static str)>,
}

#[derive(Default)]
struct Table {
    slots: Vec<Slot>,
    free: Vec<usize>,
}

/// Bits of a place.
const PLACE: u32 = 24;

static TABLE: Mutex<Table> = Mutex::new(Table { slots: vec![], free: vec![] });

fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(|e| e.into_inner())
}

/// Puts an object into the table.
pub(super) fn make<T: Object, H>(object: Arc<T>) -> Result<*mut H, Failure> {
    let mut table = table();
    let place = table.free.pop().unwrap_or(table.slots.len());
    if place >> PLACE != 0 {
        return Err(Failure::argument(format!("{} handles are in use: free some", table.slots.len())));
    }
    if place == table.slots.len() {
        table.slots.push(Slot { generation: 0, object: None });
    }
    let slot = &mut table.slots[place];
    slot.object = Some((object, T::NAME));
    Ok(std::ptr::without_provenance_mut((slot.generation << PLACE | place) << 1 | 1))
}

fn unknown<T: Object, H>(handle: *const H) -> Failure {
    Failure::new(prism_status::PRISM_INVALID_HANDLE, format!("{handle:?} is not {}: it was freed, or never was one", T::NAME))
}

/// The place of a handle, and its generation.
fn place<H>(handle: *const H) -> Option<(usize, usize)> {
    let number = handle.addr();
    (number & 1 == 1).then_some((number >> 1 & ((1 << PLACE) - 1), number >> 1 >> PLACE))
}

/// The object of a handle.
pub(super) fn get<T: Object, H>(handle: *const H) -> Result<Arc<T>, Failure> {
    if handle.is_null() {
        return Err(Failure::argument(format!("NULL where {} is needed", T::NAME)));
    }
    let (at, generation) = place(handle).ok_or_else(|| unknown::<T, H>(handle))?;
    let table = table();
    let slot = table.slots.get(at).filter(|s| s.generation == generation);
    let (object, name) = slot.and_then(|s| s.object.clone()).ok_or_else(|| unknown::<T, H>(handle))?;
    drop(table);
    let other = |_| Failure::new(prism_status::PRISM_INVALID_HANDLE, format!("{handle:?} is {name}, expected {}", T::NAME));
    object.downcast().map_err(other)
}

/// Takes a handle out of the table. NULL is nobody's.
pub(super) fn free<T: Object, H>(handle: *const H) -> Result<(), Failure> {
    if handle.is_null() {
        return Ok(());
    }
    // The object goes when the table is unlocked again: what it holds may take a while to free.
    let _object = get::<T, H>(handle)?;
    let (at, generation) = place(handle).ok_or_else(|| unknown::<T, H>(handle))?;
    let mut table = table();
    // Another thread may have been faster.
    let slot = table.slots.get_mut(at).filter(|s| s.generation == generation).ok_or_else(|| unknown::<T, H>(handle))?;
    let gone = slot.object.take();
    slot.generation += 1;
    table.free.push(at);
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
        // Whoever takes its place is somebody else.
        let next: *mut Handle = make(Arc::new(Thing)).ok().unwrap();
        assert!(next != handle && get::<Thing, _>(handle).is_err() && free::<Thing, _>(next).is_ok());
        for address in [2usize, usize::MAX, 0xffff_ffff_ffff_fffe, 1 << 30 | 1] {
            assert!(get::<Thing, Handle>(std::ptr::without_provenance(address)).is_err());
        }
        assert!(free::<Thing, Handle>(std::ptr::null()).is_ok());
    }
}
