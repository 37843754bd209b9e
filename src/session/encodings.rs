//! Encoded patches that are kept, so that looking at them again costs nothing.

use crate::memory::{self, Charge};
use crate::model::Features;
use crate::sync::locked;
use crate::tensor::Tensor;
use crate::volume::Grid;
use crate::volume::patch::Patch;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// A patch of a scan, cut out and encoded: everything that the network needs of it to answer.
pub struct EncodedPatch {
    pub(super) patch: Patch,
    /// The network's input.
    pub(super) input: Tensor,
    pub(super) features: Features,
    /// The charge of the input: the features are charged where their buffers are made.
    pub(super) _charge: Charge,
    /// Time spent cutting the patch out of the scan, and encoding it.
    pub seconds: [Duration; 2],
}

impl EncodedPatch {
    /// The patch's place on the scan.
    pub fn patch(&self) -> &Patch {
        &self.patch
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        self.input.len() * size_of::<f32>() + self.features.bytes()
    }
}

/// An encoded patch that is kept.
struct Kept {
    /// The number of its scan.
    scan: u64,
    encoded: Arc<EncodedPatch>,
    /// Whether it has been asked for: a patch that was encoded ahead may never be.
    asked: bool,
}

impl Kept {
    fn is(&self, scan: u64, patch: &Patch) -> bool {
        self.scan == scan && self.encoded.patch().grid == patch.grid
    }
}

/// A cache of the encoded patches of a scan, or of several scans ([`Scan::sharing`]).
///
/// If its limit is exceeded, it drops patches that were encoded ahead and have not been used, those
/// announced least recently first, and then those used least recently, whichever scan they belong
/// to. Any number of threads may use it at once.
///
/// [`Scan::sharing`]: super::Scan::sharing
pub struct Encodings {
    /// The most bytes that they take.
    most: usize,
    /// The patches, ordered by when they were last used, or announced if not asked for; the latest
    /// is at the end.
    kept: Mutex<Vec<Kept>>,
    /// The patches that are being encoded ahead, with the number of their scan.
    coming: Mutex<Vec<(u64, Grid, Arc<Coming>)>>,
    scans: AtomicU64,
    made: AtomicU64,
    dropped: AtomicU64,
}

impl Encodings {
    /// An empty cache of at most `bytes` bytes, and never more than half of the memory budget. The
    /// patch that was encoded last is kept whatever its size.
    pub fn new(bytes: usize) -> Encodings {
        Encodings {
            most: bytes,
            kept: Mutex::default(),
            coming: Mutex::default(),
            scans: AtomicU64::new(0),
            made: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        }
    }

    /// The number of times that a patch was encoded, repeated ones included.
    pub fn made(&self) -> u64 {
        self.made.load(Ordering::Relaxed)
    }

    /// The number of encoded patches that had been asked for and were dropped to make room, for
    /// others or for an answer.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Kept>> {
        locked(&self.kept)
    }

    fn on_the_way(&self) -> MutexGuard<'_, Vec<(u64, Grid, Arc<Coming>)>> {
        locked(&self.coming)
    }

    /// A number for a scan, to distinguish its patches from those of others.
    pub(super) fn next(&self) -> u64 {
        self.scans.fetch_add(1, Ordering::Relaxed)
    }

    /// Bytes of the kept patches of a scan.
    pub(super) fn bytes(&self, scan: u64) -> usize {
        self.kept().iter().filter(|k| k.scan == scan).map(|k| k.encoded.bytes()).sum()
    }

    /// A patch of a scan, if it is kept; it becomes the one used last.
    pub(super) fn get(&self, scan: u64, patch: &Patch) -> Option<Arc<EncodedPatch>> {
        let mut kept = self.kept();
        let at = kept.iter().position(|k| k.is(scan, patch))?;
        kept[at..].rotate_left(1);
        let found = kept.last_mut()?;
        found.asked = true;
        Some(found.encoded.clone())
    }

    /// Keeps a patch that was just encoded, however large, and drops others if that is too much.
    /// One that has not been asked for is itself dropped before any that has.
    pub(super) fn keep(&self, scan: u64, encoded: &Arc<EncodedPatch>, asked: bool) {
        self.made.fetch_add(1, Ordering::Relaxed);
        let mut kept = self.kept();
        kept.push(Kept { scan, encoded: encoded.clone(), asked });
        let mut held: usize = kept.iter().map(|k| k.encoded.bytes()).sum();
        while held > self.room() && kept.len() > 1 {
            let at = kept.iter().position(|k| !k.asked).unwrap_or(0);
            let gone = kept.remove(at);
            held -= gone.encoded.bytes();
            self.dropped.fetch_add(u64::from(gone.asked), Ordering::Relaxed);
        }
    }

    /// The most bytes that kept patches may take.
    fn room(&self) -> usize {
        self.most.min((memory::limit() / 2) as usize)
    }

    /// Announces that a patch of a scan is being encoded ahead, until the guard is dropped; none if
    /// it is kept already, or if others that have been asked for would have to make room for it. A
    /// kept patch that has not been asked for becomes the one announced last: others that are
    /// announced with it do not take its room.
    pub(super) fn announce<'a>(
        &'a self,
        scan: u64,
        patch: &Patch,
        coming: &'a Arc<Coming>,
    ) -> Option<Announced<'a>> {
        let fits = {
            let mut kept = self.kept();
            let at = kept.iter().position(|k| k.is(scan, patch));
            if let Some(at) = at.filter(|at| !kept[*at].asked) {
                kept[at..].rotate_left(1);
            }
            // All patches of a network have the same size.
            let one = kept.iter().map(|k| k.encoded.bytes()).max().unwrap_or(0);
            let asked = kept.iter().filter(|k| k.asked);
            let held: usize = asked.map(|k| k.encoded.bytes()).sum();
            at.is_none() && held + one <= self.room()
        };
        fits.then(|| {
            coming.over.store(false, Ordering::Relaxed);
            self.on_the_way().push((scan, patch.grid, coming.clone()));
            Announced { encodings: self, coming }
        })
    }

    /// A patch of a scan that is being encoded ahead, and is awaited from now on.
    pub(super) fn awaited(&self, scan: u64, patch: &Patch) -> Option<Arc<Coming>> {
        let on_the_way = self.on_the_way();
        let (.., coming) =
            on_the_way.iter().find(|(of, grid, _)| *of == scan && *grid == patch.grid)?;
        coming.awaited.store(true, Ordering::Relaxed);
        Some(coming.clone())
    }

    /// Bytes of all that is kept.
    pub(super) fn held(&self) -> u64 {
        self.kept().iter().map(|k| k.encoded.bytes() as u64).sum()
    }

    /// Drops all that is kept; whether there was any.
    pub(super) fn clear(&self) -> bool {
        let gone = std::mem::take(&mut *self.kept());
        self.count_dropped(&gone)
    }

    /// Counts patches that were dropped; whether there were any.
    fn count_dropped(&self, gone: &[Kept]) -> bool {
        let asked = gone.iter().filter(|k| k.asked).count();
        self.dropped.fetch_add(asked as u64, Ordering::Relaxed);
        !gone.is_empty()
    }

    /// Drops half of what is kept, patches that have not been asked for first, and then those used
    /// least recently; returns whether there were any.
    pub(super) fn halve(&self) -> bool {
        let gone: Vec<_> = {
            let mut kept = self.kept();
            let half = kept.len().div_ceil(2);
            kept.sort_by_key(|k| k.asked);
            kept.drain(..half).collect()
        };
        self.count_dropped(&gone)
    }

    /// Drops what is kept of a scan.
    pub(super) fn forget(&self, scan: u64) {
        self.kept().retain(|k| k.scan != scan);
    }
}

/// A patch that is encoded before it is asked for.
#[derive(Default)]
pub(super) struct Coming {
    awaited: AtomicBool,
    over: AtomicBool,
}

impl Coming {
    pub(super) fn is_awaited(&self) -> bool {
        self.awaited.load(Ordering::Relaxed)
    }

    /// Whether it has finished, successfully or not.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

/// A patch is being encoded ahead for as long as this exists.
pub(super) struct Announced<'a> {
    encodings: &'a Encodings,
    coming: &'a Arc<Coming>,
}

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        self.encodings.on_the_way().retain(|(.., other)| !Arc::ptr_eq(other, self.coming));
        self.coming.over.store(true, Ordering::Relaxed);
    }
}
