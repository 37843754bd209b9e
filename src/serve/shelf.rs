//! The DICOM series of the folder that a server is given (`--dicom`), by their identifiers.
//!
//! A look through the folder reads only tags; voxels are read when they are asked for. What callers
//! send is looked up among what was found, and is never used as a path. If a series is not there,
//! or its files or those beside them have changed, the folder is examined again, but only a while
//! after the last look: until then an unknown series does not exist, and a changed one has to be
//! asked for again later.

#[cfg(feature = "dicom")]
use super::arrived;
use super::failure::Failure;
use crate::sync::locked;
#[cfg(feature = "dicom")]
use crate::volume::dicom::{self, Filed, Odd};
use crate::volume::{Volume, VolumeError};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// The least time from the end of one look to the next, and that time as a multiple of the look's
/// own.
const REST: Duration = Duration::from_secs(5);
const TIMES: u32 = 4;
/// How long the held data of a series is assumed to match its files.
const FRESH: Duration = Duration::from_secs(5);

/// A series whose voxels can be read: none in a build that reads no DICOM.
#[cfg(not(feature = "dicom"))]
type Filed = std::convert::Infallible;

/// Something odd about the folder: its message, and what distinguishes it from others.
#[cfg(not(feature = "dicom"))]
#[derive(Clone)]
struct Odd {
    said: String,
    key: String,
}

/// What is known of a series.
#[cfg_attr(not(feature = "dicom"), allow(dead_code))]
pub struct Entry {
    /// SeriesInstanceUID, StudyInstanceUID, SeriesNumber, Modality and SeriesDescription.
    pub uid: String,
    pub study: String,
    pub number: String,
    pub modality: String,
    pub description: String,
    /// Columns, rows and slices.
    pub size: [usize; 3],
    /// Mm between them; none if slices are not evenly spaced.
    pub spacing: Option<[f64; 3]>,
    /// Whether it can be read as one volume, according to its tags.
    pub is_volume: bool,
    localizer: bool,
    filed: Filed,
}

/// The result of a look through a folder, each of whose files has at most `most` bytes inflated,
/// and what was odd there.
#[cfg(feature = "dicom")]
fn looked_through(folder: &Path, most: u64) -> Result<(Vec<Entry>, Vec<Odd>), VolumeError> {
    let (all, warnings) = dicom::filed(folder, most)?;
    let entry = |filed: Filed| {
        let series = &filed.series;
        Entry {
            uid: series.uid.clone(),
            study: series.study.clone(),
            number: series.number.clone(),
            modality: series.modality.clone(),
            description: series.description.clone(),
            size: series.size,
            spacing: series.spacing,
            is_volume: series.spacing.is_some() && series.volumes == 1 && !filed.is_tied,
            localizer: series.localizer,
            filed,
        }
    };
    Ok((all.into_iter().map(entry).collect(), warnings))
}

/// An error: this build reads no DICOM.
#[cfg(not(feature = "dicom"))]
fn looked_through(folder: &Path, _: u64) -> Result<(Vec<Entry>, Vec<Odd>), VolumeError> {
    Err(VolumeError::new(folder, "this program was built without the feature dicom"))
}

#[cfg(feature = "dicom")]
impl Entry {
    /// Reads its voxels, which take at most `most` bytes.
    pub fn read(&self, most: usize) -> Result<Volume, Failure> {
        arrived::of_series(&self.filed, most)
    }

    /// Whether another look may give another result.
    fn has_changed(&self) -> bool {
        self.filed.has_changed()
    }

    /// Whether a change at the time of the last look may not be visible.
    fn is_recent(&self) -> bool {
        self.filed.is_recent()
    }

    /// Whether its own files have changed.
    fn is_rewritten(&self) -> bool {
        self.filed.is_rewritten()
    }

    /// Whether another look found the same files, unchanged.
    fn is_same(&self, other: &Entry) -> bool {
        self.filed.is_same(&other.filed)
    }
}

#[cfg(not(feature = "dicom"))]
impl Entry {
    /// Reads nothing: there is no such series.
    pub fn read(&self, _: usize) -> Result<Volume, Failure> {
        match self.filed {}
    }

    fn has_changed(&self) -> bool {
        match self.filed {}
    }

    fn is_recent(&self) -> bool {
        match self.filed {}
    }

    fn is_rewritten(&self) -> bool {
        match self.filed {}
    }

    fn is_same(&self, _: &Entry) -> bool {
        match self.filed {}
    }
}

/// A series as the last look found it.
pub struct Seen {
    pub entry: Arc<Entry>,
    /// Whether its files are those that the last look found; otherwise they are being added or
    /// removed.
    pub is_settled: bool,
}

/// A series whose voxels are held, with the state of its files when they were read.
pub struct Taken {
    entry: Arc<Entry>,
    /// When the files were last checked to be unchanged.
    checked: Mutex<Instant>,
}

impl Taken {
    /// A series that is about to be read.
    pub fn new(entry: Arc<Entry>) -> Taken {
        Taken { entry, checked: Mutex::new(Instant::now()) }
    }

    fn checked(&self) -> MutexGuard<'_, Instant> {
        locked(&self.checked)
    }

    /// Whether its files were checked just now.
    pub fn is_fresh(&self) -> bool {
        self.checked().elapsed() < FRESH
    }
}

/// The result of the last look through a folder.
struct Known {
    entries: BTreeMap<String, Arc<Entry>>,
    /// What was odd, and was reported.
    warnings: Vec<Odd>,
    /// When another look is allowed.
    next: Instant,
}

/// When another look is allowed after one that began at `begun` and ends now.
fn rested(begun: Instant) -> Instant {
    Instant::now() + REST.max(begun.elapsed() * TIMES)
}

impl Known {
    /// Looks through a folder.
    fn of(folder: &Path, most: u64) -> Result<Known, VolumeError> {
        let begun = Instant::now();
        let (found, warnings) = looked_through(folder, most)?;
        let named = |entry: Entry| (entry.uid.clone(), Arc::new(entry));
        let entries = found.into_iter().map(named).collect();
        Ok(Known { entries, warnings, next: rested(begun) })
    }

    /// The series that can be worked on: no scout views.
    fn scans(&self) -> impl Iterator<Item = &Arc<Entry>> {
        self.entries.values().filter(|entry| entry.is_volume && !entry.localizer)
    }
}

/// The series of a folder.
pub struct Shelf {
    folder: PathBuf,
    /// The most bytes of an inflated file.
    most: u64,
    /// Called with what is odd, unless it was so when the folder was examined before.
    warn: Option<fn(&str)>,
    known: Mutex<Known>,
}

impl Shelf {
    /// Examines a folder; what is odd there, such as a damaged file, is a warning.
    ///
    /// # Errors
    /// It cannot be read, or holds more files than are examined.
    pub fn open(
        folder: &Path,
        most: u64,
        warn: Option<fn(&str)>,
        warnings: &mut Vec<String>,
    ) -> Result<Shelf, String> {
        // An error may be about a file, whose name is not shown either.
        let fail = |e: VolumeError| format!("{}: {}", folder.display(), e.message);
        let known = Known::of(folder, most).map_err(fail)?;
        let told = |odd: &Odd| format!("{}: {}", folder.display(), odd.said);
        warnings.extend(known.warnings.iter().map(told));
        if known.scans().next().is_none() {
            warnings.push(format!("{}: contains no DICOM series of images yet", folder.display()));
        }
        Ok(Shelf { folder: folder.into(), most, warn, known: Mutex::new(known) })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        locked(&self.known)
    }

    /// The number of series that can be worked on.
    pub fn count(&self) -> usize {
        self.known().scans().count()
    }

    /// At most `most` of the series that can be worked on, by their identifiers.
    pub fn list(&self, most: usize) -> Vec<Arc<Entry>> {
        self.known().scans().take(most).cloned().collect()
    }

    /// A random one of the series that can be worked on; none if there is none.
    pub fn one_of(&self, chance: u128) -> Option<Arc<Entry>> {
        let known = self.known();
        let at = chance.checked_rem(known.scans().count() as u128)? as usize;
        known.scans().nth(at).cloned()
    }

    /// A series by its identifier, as the last look found it.
    pub fn get(&self, uid: &str) -> Option<Arc<Entry>> {
        self.known().entries.get(uid).cloned()
    }

    /// Whether another look is allowed by now.
    pub fn is_due(&self) -> bool {
        self.known().next <= Instant::now()
    }

    /// Examines the folder again, unless the last look was just now, or is still running. That may
    /// take a while. Returns whether there was a look.
    pub fn look(&self) -> Result<bool, Failure> {
        let begun = Instant::now();
        {
            let mut known = self.known();
            if known.next > begun {
                return Ok(false);
            }
            // No request waits for another one meanwhile.
            known.next = begun + REST;
        }
        match Known::of(&self.folder, self.most) {
            Ok(found) => {
                let before = std::mem::replace(&mut *self.known(), found).warnings;
                self.tell(&before);
                Ok(true)
            }
            Err(e) => {
                let said = format!("cannot be scanned: {}", e.message);
                let before = {
                    let mut known = self.known();
                    known.next = rested(begun);
                    let odd = Odd { key: said.clone(), said: said.clone() };
                    std::mem::replace(&mut known.warnings, vec![odd])
                };
                self.tell(&before);
                Err(Failure::full(format!("the server's DICOM folder {said}")))
            }
        }
    }

    /// Reports what is odd now and was not before.
    fn tell(&self, before: &[Odd]) {
        let Some(warn) = self.warn else { return };
        let warnings = self.known().warnings.clone();
        for odd in warnings.iter().filter(|odd| before.iter().all(|other| other.key != odd.key)) {
            warn(&format!("{}: {}", self.folder.display(), odd.said));
        }
    }

    /// A series by its identifier, with whether its files are as the last look found them. That
    /// asks the file system for each of them.
    pub fn settled(&self, uid: &str) -> Option<Seen> {
        let entry = self.get(uid)?;
        let is_open = entry.has_changed() || entry.is_recent() && self.is_due();
        (!is_open).then_some(Seen { entry, is_settled: true })
    }

    /// A series by its identifier. If it is not there, or its files may have changed, the folder is
    /// examined again first, if that is allowed.
    pub fn find(&self, uid: &str) -> Result<Option<Seen>, Failure> {
        if let Some(seen) = self.settled(uid) {
            return Ok(Some(seen));
        }
        let looked = self.look();
        match self.get(uid) {
            Some(entry) => Ok(Some(Seen { entry, is_settled: looked == Ok(true) })),
            None => looked.map(|_| None),
        }
    }

    /// Whether the held data of a series may still be used: its own files are unchanged since they
    /// were read, and no look has found others since.
    pub fn holds(&self, taken: &Taken) -> bool {
        let known = self.get(&taken.entry.uid);
        let is_same = known.is_some_and(|known| known.is_same(&taken.entry));
        let holds = is_same && !taken.entry.is_rewritten();
        if holds {
            *taken.checked() = Instant::now();
        }
        holds
    }
}

#[cfg(all(test, feature = "dicom"))]
mod tests {
    use super::*;

    const MOST: u64 = 1 << 20;

    /// What all tests report after the start.
    static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());

    fn told(text: &str) {
        TOLD.lock().unwrap().push(text.into());
    }

    #[test]
    fn a_folder_is_looked_through_now_and_then() {
        let folder = tempfile::tempdir().unwrap();
        let mut warnings = vec![];
        let shelf = Shelf::open(folder.path(), MOST, Some(told), &mut warnings).unwrap();
        assert!(warnings[0].contains("no DICOM series"), "{warnings:?}");
        assert_eq!((shelf.count(), shelf.one_of(7).is_none()), (0, true));
        let place = folder.path().display().to_string();
        let of_it = || TOLD.lock().unwrap().iter().filter(|t| t.starts_with(&place)).count();
        // A damaged file is reported when it appears, once, and not by its name, even if its index
        // among the others changes.
        let damaged = [&[0; 128][..], &b"DICM\x08\0\x60\0CS\xff\x7f"[..]].concat();
        std::fs::write(folder.path().join("doe_jane"), damaged).unwrap();
        // After a look that began then or later it rests, here for as long as the test takes.
        let rests_since = |begun: Instant| {
            let mut known = shelf.known();
            assert!(known.next >= begun + REST);
            known.next = Instant::now() + Duration::from_secs(3600);
        };
        let begun = Instant::now();
        for before in ["a", "b"] {
            shelf.known().next = Instant::now();
            assert_eq!(shelf.look(), Ok(true));
            assert_eq!(of_it(), 1);
            std::fs::write(folder.path().join(before), "no image").unwrap();
        }
        {
            let told = TOLD.lock().unwrap();
            let of_it = told.iter().find(|text| text.starts_with(&place)).unwrap();
            assert!(of_it.contains("ignored file 1 of 1: "), "{of_it}");
            assert!(!of_it.contains("doe_jane"), "{of_it}");
        }
        folder.close().unwrap();
        // It is not examined again so soon, whatever is asked for.
        rests_since(begun);
        assert!(!shelf.is_due());
        assert!(shelf.find("1.2.3").unwrap().is_none() && shelf.look() == Ok(false));
        let begun = Instant::now();
        shelf.known().next = begun;
        assert!(shelf.is_due());
        let failure = shelf.find("1.2.3").err().unwrap();
        assert!(failure.message().contains("cannot be scanned"), "{failure:?}");
        assert_eq!(of_it(), 2);
        // Nor after a look that failed.
        rests_since(begun);
        assert!(!shelf.is_due() && shelf.find("1.2.3").unwrap().is_none());
        assert!(Shelf::open(Path::new("no such folder"), MOST, None, &mut warnings).is_err());
    }
}
