//! Leases as their clients use them.

use super::super::turns::Turns;
use super::super::wire::unpack;
use super::*;
use crate::device::{Cpu, Device};
use crate::model::{Model, Weights};
use crate::session::Encodings;
use crate::session::Options;
use crate::volume::Element;
use std::path::Path;

/// `[k, j, i]`.
const SHAPE: [usize; 3] = [20, 24, 28];
const VOXELS: usize = SHAPE[0] * SHAPE[1] * SHAPE[2];
const CLICK: [f64; 3] = [10.0, 12.0, 14.0];

/// The turn of a client that is alone.
fn turn() -> Turn {
    Arc::<Turns>::default().enter(&Arc::default())
}

/// A client with an image of noise.
fn begun(options: Options) -> Lease {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/small.safetensors");
    let weights = Weights::open(Path::new(path)).unwrap();
    let model = Arc::new(Model::new(&Device::Cpu(Cpu::new(2).unwrap()), &weights).unwrap());
    let [nk, nj, ni] = SHAPE;
    let image = Array {
        dtype: Dtype::Other(Element::Uint8),
        shape: vec![1, nk, nj, ni],
        bytes: (0..VOXELS).map(|at| (at * at % 251) as u8).collect(),
    };
    let lease = Lease::default();
    let image = scan_of(image, [1.0; 3]).unwrap();
    let encodings = Arc::new(Encodings::new(options.memory));
    let engine = Engine { model: &model, options, encodings: &encodings };
    lease.state().set_image(engine, image, None).unwrap();
    lease.state().set_buffer(Buffer { shape: SHAPE, dtype: Dtype::Bool }).unwrap();
    lease
}

fn click(lease: &Lease, positive: bool) -> Outcome {
    lease.state().point(CLICK, positive, true, &turn()).unwrap()
}

/// Writes an update into a buffer, as a client does.
fn take(buffer: &mut [u8], update: &Update) {
    let marks = unpack(update.message.as_ref(), VOXELS).unwrap().marks();
    let [_, nj, ni] = update.region.map(|[low, high]| high - low);
    let low = update.region.map(|[low, _]| low);
    for (at, mark) in marks.iter().enumerate() {
        let [k, j, i] = [low[0] + at / ni / nj, low[1] + at / ni % nj, low[2] + at % ni];
        buffer[(k * SHAPE[1] + j) * SHAPE[2] + i] = *mark;
    }
}

/// The present answer, as a client orders it.
fn answer(lease: &Lease) -> Vec<u8> {
    let state = lease.state.lock().unwrap();
    let mask = state.image.as_ref().unwrap().layers.last().unwrap().session.mask();
    let [nk, nj, ni] = SHAPE;
    let place = |at: usize| (at % ni * nj + at / ni % nj) * nk + at / ni / nj;
    (0..VOXELS).map(|at| mask[place(at)]).collect()
}

#[test]
fn what_a_lost_answer_held_is_in_the_next() {
    let lease = begun(Options::default());
    let mut buffer = vec![0u8; VOXELS];
    let lost = click(&lease, true).update.unwrap();
    let again = click(&lease, true).update.unwrap();
    assert_eq!(again.region, lost.region);
    take(&mut buffer, &again);
    assert!(buffer.contains(&1) && buffer == answer(&lease));
    // If it was delivered it is not sent again.
    lease.handed(&again);
    assert!(click(&lease, true).update.is_none());
    assert!((0..2).all(|_| lease.state().undo().unwrap().update.is_none()));
    let back = lease.state().undo().unwrap().update.unwrap();
    take(&mut buffer, &back);
    lease.handed(&back);
    assert!(buffer.iter().all(|v| *v == 0));
    // A mask that the client began with, and that never arrived.
    buffer.fill(1);
    lease.written();
    assert!(lease.state().point(CLICK, true, false, &turn()).unwrap().update.is_none());
    let whole = lease.state().predict(&turn()).unwrap().update.unwrap();
    assert_eq!(whole.region, SHAPE.map(|n| [0, n]));
    take(&mut buffer, &whole);
    assert!(buffer.contains(&1) && buffer == answer(&lease));
}

/// Clicks once more on a session that was clicked on once, and then fails.
fn attempt(session: &mut Session, fails: fn() -> Failure) -> Result<(), Failure> {
    let said = Prompts { points: vec![([3, 3, 3], true)], ..Prompts::default() };
    kept(
        None,
        session,
        SAID,
        |_| {},
        |session| {
            session.interact(&said).unwrap();
            assert_eq!(session.depth(), (2, 0));
            Err(fails())
        },
    )
}

#[test]
fn what_cannot_be_told_is_not_done() {
    let lease = begun(Options::default());
    click(&lease, true);
    let before = answer(&lease);
    {
        let mut state = lease.state();
        let session = &mut state.image.as_mut().unwrap().layers[0].session;
        let failed = attempt(session, || Failure::full("no room to tell of it"));
        assert_eq!(failed.unwrap_err().message(), "no room to tell of it");
        assert_eq!(session.depth(), (1, 0));
        // Memory for the answer is refused, which unwinds.
        let refused = crate::memory::caught(|| {
            attempt(session, || {
                crate::memory::zeroed::<u8>("a test", usize::MAX / 2);
                Failure::full("memory that there is not")
            })
        });
        assert!(refused.is_err());
        assert_eq!(session.depth(), (1, 0));
    }
    assert!(answer(&lease) == before);
}

// Elsewhere a journal that is open is not replaced.
#[cfg(unix)]
#[test]
fn an_image_that_is_refused_memory_is_not_there_on_disk_either() {
    use super::super::journal::{Folder, Owner};
    use super::super::settings::Keep;
    let at = tempfile::tempdir().unwrap();
    let folder = Folder::open(&Keep::at(at.path().join("state")), "a test").unwrap();
    let (folder, owner) = (Arc::new(folder), Owner::Lease);
    let journal = Arc::new(folder.create(owner, 1).unwrap());
    let lease = Lease::new(Some(journal.clone()));
    let scan = journal.scan(b"an image", Source::Array([1.0; 3])).unwrap();
    let refused = crate::memory::caught(|| {
        lease.state().replace(Some(scan), || {
            crate::memory::zeroed::<u8>("a test", usize::MAX / 2);
            Err(Failure::full("memory that there is not"))
        })
    });
    let failure = refused.unwrap().unwrap_err();
    assert!(failure.message().starts_with("out of memory: a test"), "{failure:?}");
    assert!(lease.state().image.is_none());
    // As a server finds it that comes later.
    journal.keep();
    drop((lease, journal));
    let mut found = folder.found(&mut vec![]).unwrap();
    assert_eq!((found.len(), found[0].read()), (1, Ok(None)));
}

// Elsewhere a journal that is open is not replaced.
#[cfg(unix)]
#[test]
fn a_journal_in_its_place_counts_even_if_its_folder_cannot_be_synchronised() {
    use super::super::journal::{Folder, IMAGE, Owner};
    use super::super::settings::Keep;
    use crate::output::SYNC_FAILS;
    use crate::session::kept::Reader;
    /// Does something while folders cannot be synchronised.
    fn failing<T>(work: impl FnOnce() -> T) -> T {
        SYNC_FAILS.set(true);
        let done = work();
        SYNC_FAILS.set(false);
        done
    }
    let at = tempfile::tempdir().unwrap();
    let folder = Folder::open(&Keep::at(at.path().join("state")), "a test").unwrap();
    let folder = Arc::new(folder);
    let journal = Arc::new(folder.create(Owner::Lease, 1).unwrap());
    let lease = Lease::new(Some(journal.clone()));
    let other = begun(Options::default());
    let opened = other.state().image.take().unwrap().opened;
    let buffer = Buffer { shape: SHAPE, dtype: Dtype::Bool };

    // An image and a reset count, in memory as on disk; no further change does until the folder is
    // synchronised.
    let change = || lease.state().set_buffer(buffer).map(drop);
    let scan = journal.scan(b"an image", Source::Array([1.0; 3])).unwrap();
    failing(|| lease.state().replace(Some(scan), || Ok(opened))).unwrap();
    assert!(lease.state().image.is_some());
    assert!(failing(change).is_err());
    lease.state().reset().map(drop).unwrap();
    failing(change).unwrap();
    failing(|| lease.state().reset().map(drop)).unwrap();
    assert!(failing(change).is_err());
    change().unwrap();
    failing(change).unwrap();

    // As a server finds it that comes later.
    let mut found = folder.found(&mut vec![]).unwrap();
    let record = found[0].read().unwrap().unwrap();
    let mut reader = Reader::new(&record);
    assert_eq!(reader.byte().unwrap(), IMAGE);
    let stored = Stored::take(&mut reader).unwrap();
    assert_eq!(found[0].scan(&stored).unwrap(), b"an image");
    // The journal that a power cut may bring back has its scan too.
    failing(|| journal.restart(None, |_| Ok(()))).unwrap();
    assert!(found[0].scan(&stored).is_ok());
    journal.restart(None, |_| Ok(())).unwrap();
    assert!(found[0].scan(&stored).is_err());
    // One that was rewritten because it became long waits for its folder as well.
    journal.note(IMAGE, |out| out.text(&"x".repeat(5 << 20))).unwrap();
    assert!(journal.seems_long());
    failing(|| journal.renew(|_| Ok(()))).unwrap();
    assert!(!journal.seems_long() && failing(change).is_err());
    change().unwrap();
}

/// Interactions that were given, and how often its first session can be undone and redone.
fn depth(state: &State) -> (usize, (usize, usize)) {
    let layer = &state.image.as_ref().unwrap().layers[0];
    (layer.steps, layer.session.depth())
}

#[test]
fn a_whole_answer_that_cannot_be_told_is_not_given() {
    let lease = begun(Options::default());
    let mut state = lease.state();
    let prompts = state.pointed(CLICK, true).unwrap();
    let fails = |_: Vec<u8>| Err::<(), _>(Failure::full("no room to tell of it"));
    let failed = state.say_for_whole(&prompts, &turn(), fails);
    assert_eq!(failed.unwrap_err().message(), "no room to tell of it");
    assert_eq!(depth(&state), (0, (0, 0)));
    let whole = state.say_for_whole(&prompts, &turn(), Ok).unwrap();
    assert_eq!(depth(&state), (1, (1, 0)));
    // What says nothing is answered with what there is.
    let again = state.say_for_whole(&Prompts::default(), &turn(), Ok).unwrap();
    assert!(again == whole && depth(&state) == (1, (1, 0)));
    drop(state);
    assert!(whole.contains(&1) && whole == answer(&lease));
}

#[test]
fn an_undo_ends_where_history_does() {
    let lease = begun(Options { undo_steps: 2, ..Options::default() });
    click(&lease, true);
    let mask = Array {
        dtype: Dtype::Bool,
        shape: SHAPE.to_vec(),
        bytes: (0..VOXELS).map(|at| u8::from(at < 1000)).collect(),
    };
    lease.state().initial(&mask, false, &turn()).unwrap();
    (0..4).for_each(|n| drop(click(&lease, n % 2 == 0)));
    let undo = || lease.state().undo().unwrap().ran;
    assert!(undo() && undo());
    // The other two are forgotten: the mask stays, and so does what was there before it.
    assert!(!undo());
    let layers = || lease.state.lock().unwrap().image.as_ref().unwrap().layers.len();
    assert_eq!(layers(), 2);
    // If nothing is forgotten the mask is a step.
    lease.state().initial(&mask, false, &turn()).unwrap();
    click(&lease, true);
    assert!(undo() && undo());
    assert_eq!(layers(), 2);
}

/// A thread that answers requests has another one drop it.
#[test]
fn what_is_forgotten_is_freed_where_it_is_dropped() {
    let lease = begun(Options::default());
    click(&lease, true);
    let answer = {
        let state = lease.state();
        Arc::downgrade(state.image.as_ref().unwrap().layers[0].session.prediction().unwrap())
    };
    let forgotten = lease.state().reset().unwrap();
    assert!(answer.upgrade().is_some());
    drop(forgotten);
    assert!(answer.upgrade().is_none());
}

#[test]
fn a_box_beyond_the_image_counts_for_nothing() {
    let lease = begun(Options::default());
    for k in [[-9.0, -3.0], [20.0, 21.0], [-3.0, 0.0]] {
        let bounds = [k, [3.0, 20.0], [3.0, 20.0]];
        for positive in [true, false] {
            let outcome = lease.state().bounds(bounds, positive, true, &turn()).unwrap();
            assert!(outcome.ran && outcome.update.is_none(), "{k:?}");
        }
    }
    let last = [[19.0, 20.0], [3.0, 20.0], [3.0, 20.0]];
    lease.state().bounds(last, true, true, &turn()).unwrap();
    let state = lease.state.lock().unwrap();
    assert!(state.image.as_ref().unwrap().layers[0].session.prediction().is_some());
}
