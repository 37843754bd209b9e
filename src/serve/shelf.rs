//! The DICOM series of the folder that a server is given (`--dicom`), by their identifiers.
//!
//! A look through the folder reads tags alone; voxels are read when somebody asks for them. What
//! callers send is looked for among what was found, and is never a path. Where it is not there, or
//! a series' files may be others by now, the folder is looked through anew, but so seldom that
//! whoever asks for what is nowhere keeps nobody waiting.

#[cfg(feature = "dicom")]
use super::arrived;
use super::failure::Failure;
#[cfg(feature = "dicom")]
use crate::volume::dicom::{self, Filed};
use crate::volume::{Volume, VolumeError};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// From the end of one look to the next it takes so long, or so many times as long as the look.
const REST: Duration = Duration::from_secs(5);
const TIMES: u32 = 4;
/// How coarse the times of folders may be.
const COARSE: Duration = Duration::from_secs(2);

/// A series whose voxels can be read: none in a build that reads no DICOM.
#[cfg(not(feature = "dicom"))]
type Filed = std::convert::Infallible;

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
    /// Mm between them; none where slices do not lie evenly.
    pub spacing: Option<[f64; 3]>,
    /// Whether it can be read as one volume and is no scout view, as its tags tell.
    is_scan: bool,
    filed: Filed,
}

/// What a look through a folder finds, and what was odd there.
#[cfg(feature = "dicom")]
fn looked_through(folder: &Path) -> Result<(Vec<Entry>, Vec<String>), VolumeError> {
    let (all, warnings) = dicom::filed(folder)?;
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
            is_scan: series.spacing.is_some() && series.volumes == 1 && !series.localizer,
            filed,
        }
    };
    Ok((all.into_iter().map(entry).collect(), warnings))
}

/// An error: this build reads no DICOM.
#[cfg(not(feature = "dicom"))]
fn looked_through(folder: &Path) -> Result<(Vec<Entry>, Vec<String>), VolumeError> {
    Err(VolumeError::new(folder, "this program was built without the feature dicom"))
}

#[cfg(feature = "dicom")]
impl Entry {
    /// Reads its voxels, which take so many bytes at most.
    pub fn read(&self, most: usize) -> Result<Volume, Failure> {
        arrived::of_series(&self.filed, most)
    }

    fn changed_since(&self, time: SystemTime) -> bool {
        self.filed.changed_since(time)
    }
}

#[cfg(not(feature = "dicom"))]
impl Entry {
    /// There is none to read.
    pub fn read(&self, _: usize) -> Result<Volume, Failure> {
        match self.filed {}
    }

    fn changed_since(&self, _: SystemTime) -> bool {
        match self.filed {}
    }
}

/// What the last look through a folder found.
struct Known {
    entries: BTreeMap<String, Arc<Entry>>,
    /// What changed since then may be other than it was seen.
    seen: SystemTime,
    /// When there may be another look.
    next: Instant,
}

/// When there may be another look after one that began then and ends now.
fn rested(begun: Instant) -> Instant {
    Instant::now() + REST.max(begun.elapsed() * TIMES)
}

impl Known {
    /// Looks through a folder; also what was odd there.
    fn of(folder: &Path) -> Result<(Known, Vec<String>), VolumeError> {
        let (begun, now) = (Instant::now(), SystemTime::now());
        let (found, warnings) = looked_through(folder)?;
        let named = |entry: Entry| (entry.uid.clone(), Arc::new(entry));
        let entries = found.into_iter().map(named).collect();
        let seen = now.checked_sub(COARSE).unwrap_or(now);
        Ok((Known { entries, seen, next: rested(begun) }, warnings))
    }

    /// Those that can be worked on.
    fn scans(&self) -> impl Iterator<Item = &Arc<Entry>> {
        self.entries.values().filter(|entry| entry.is_scan)
    }
}

/// The series of a folder.
pub struct Shelf {
    folder: PathBuf,
    known: Mutex<Known>,
}

impl Shelf {
    /// Looks through a folder; what is odd there, such as a damaged file, is a warning.
    ///
    /// # Errors
    /// It cannot be looked into, or holds more files than are looked at.
    pub fn open(folder: &Path, warnings: &mut Vec<String>) -> Result<Shelf, String> {
        let (known, said) = Known::of(folder).map_err(|e| e.to_string())?;
        warnings.extend(said.into_iter().map(|text| format!("{}: {text}", folder.display())));
        if known.scans().next().is_none() {
            warnings.push(format!("{}: holds no DICOM series of images yet", folder.display()));
        }
        Ok(Shelf { folder: folder.into(), known: Mutex::new(known) })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many series can be worked on.
    pub fn count(&self) -> usize {
        self.known().scans().count()
    }

    /// Those that can be worked on, so many at most, by their identifiers.
    pub fn list(&self, most: usize) -> Vec<Arc<Entry>> {
        self.known().scans().take(most).cloned().collect()
    }

    /// One of those that can be worked on, by chance; none where there is none.
    pub fn one_of(&self, chance: u128) -> Option<Arc<Entry>> {
        let known = self.known();
        let at = chance.checked_rem(known.scans().count() as u128)? as usize;
        known.scans().nth(at).cloned()
    }

    /// A series by its identifier, as the last look found it.
    pub fn get(&self, uid: &str) -> Option<Arc<Entry>> {
        self.known().entries.get(uid).cloned()
    }

    /// Whether there may be another look by now.
    pub fn is_due(&self) -> bool {
        self.known().next <= Instant::now()
    }

    /// Looks through the folder anew, unless the last look was just now. That may take a while.
    pub fn look(&self) -> Result<(), Failure> {
        if !self.is_due() {
            return Ok(());
        }
        let begun = Instant::now();
        match Known::of(&self.folder) {
            Ok((known, _)) => {
                *self.known() = known;
                Ok(())
            }
            Err(e) => {
                self.known().next = rested(begun);
                Err(Failure::full(format!(
                    "the server's folder of DICOM cannot be looked through: {}",
                    e.message
                )))
            }
        }
    }

    /// A series by its identifier. Where it is not there, or its files may be others by now, the
    /// folder is looked through anew first.
    pub fn find(&self, uid: &str) -> Result<Option<Arc<Entry>>, Failure> {
        let seen = self.known().seen;
        if let Some(entry) = self.get(uid)
            && !entry.changed_since(seen)
        {
            return Ok(Some(entry));
        }
        let looked = self.look();
        match self.get(uid) {
            Some(entry) => Ok(Some(entry)),
            None => looked.map(|()| None),
        }
    }
}

#[cfg(all(test, feature = "dicom"))]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_looked_through_now_and_then() {
        let folder = tempfile::tempdir().unwrap();
        let mut warnings = vec![];
        let shelf = Shelf::open(folder.path(), &mut warnings).unwrap();
        assert!(warnings[0].contains("no DICOM series"), "{warnings:?}");
        assert_eq!((shelf.count(), shelf.one_of(7).is_none()), (0, true));
        folder.close().unwrap();
        // It is not looked at again so soon, whoever asks for what.
        assert!(!shelf.is_due());
        assert!(shelf.find("1.2.3").unwrap().is_none() && shelf.look().is_ok());
        shelf.known().next = Instant::now();
        assert!(shelf.is_due());
        let failure = shelf.find("1.2.3").err().unwrap();
        assert!(failure.message().contains("cannot be looked through"), "{failure:?}");
        // Nor after a look that failed.
        assert!(!shelf.is_due() && shelf.find("1.2.3").unwrap().is_none());
        assert!(Shelf::open(Path::new("no such folder"), &mut warnings).is_err());
    }
}
