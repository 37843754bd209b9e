//! DICOM: the CT, MR and PET series of a folder, a zip archive or beside a file.
//!
//! [`Volume::read`] reads the only series of a folder, [`Volume::read_series`] one of several,
//! which [`list`] describes. [`of_bytes`] reads a file or an archive that is in memory. For a
//! folder that is examined once, and whose series are read when they are asked for, there is
//! [`filed`].
//!
//! Label images are read by [`Labels::read`](super::labels::Labels::read): segmentations (SEG), and
//! the contours of structure sets (RTSTRUCT). [`write_mask`](super::write_mask) writes a
//! segmentation that refers to the slices of its scan.
//!
//! A PET scan is read as standardised uptake values by body weight, if its tags allow it.

mod dictionary;
mod encode;
mod files;
mod geometry;
mod jpeg2000;
mod layers;
mod pixels;
mod segmentation;
mod series;
mod source;
mod structures;
mod suv;
mod tags;
mod write;

pub use series::{Odd, Series};

pub(super) use layers::Marked;
pub(super) use source::Source;
pub(super) use write::{Kind, Segment, SegmentVoxels, encoded, level};

use super::nifti_io::describe;
use super::{
    Array, Contents, Element, Grid, Modality, UNNAMED, VOXELS, Volume, VolumeError, Which,
};
use crate::input::no_image;
use crate::memory;
use files::{Stamp, Store, Tree, ZIP, is_zip, stamp};
use geometry::{Plane, stack};
use layers::Place;
use pixels::{Frames, scaled};
use series::{Found, Image, Inflated, Unmeant, choose, find};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tags::{DataSet, Opened, Problem, data_set};

/// The message if nothing is found.
const NO_IMAGE: &str = "no DICOM image was found: expected a CT, MR or PET series";

/// The series of a folder (with its subfolders), of a zip archive, or of one file, and what was odd
/// about them, as sentences for people. Reads the tags of every file, and no voxels.
///
/// # Errors
/// It cannot be read, or holds no DICOM image.
pub fn list(path: &Path) -> Result<(Vec<Series>, Vec<String>), VolumeError> {
    super::within_memory(path, || {
        let mut store = store_of(path)?;
        let mut found = find(&mut store, Inflated::All(u64::MAX))?;
        if found.series.is_empty() {
            return Err(nothing(path, &store, &found));
        }
        let warnings = found.said();
        Ok((found.series, warnings))
    })
}

/// The result of [`of_bytes`] and [`Filed::read`].
pub enum Sent {
    /// The selected series.
    Scan(Box<Volume>),
    /// Several series match; one has to be selected.
    Several(Vec<Series>),
    /// Nothing was read, because it would take this many bytes after unpacking, more than the
    /// limit.
    TooLarge(u64),
}

/// Whether bytes are a zip archive, or a DICOM file: something that [`of_bytes`] reads.
pub fn is_sent(bytes: &[u8]) -> bool {
    let head = &bytes[..bytes.len().min(crate::input::HEAD)];
    is_zip(head) || files::begins(head)
}

/// Reads a series from a zip archive, or one file, in memory: the file system is not accessed,
/// whatever names the archive has.
///
/// `asked` selects a series as [`Volume::read_series`] does. `most` limits the bytes of all files,
/// unpacked, and inflated if their data sets are deflated.
///
/// # Errors
/// It is damaged, holds no DICOM image, or none that matches the selection.
pub fn of_bytes(bytes: &[u8], asked: Option<&str>, most: u64) -> Result<Sent, VolumeError> {
    let path = Path::new(UNNAMED);
    super::within_memory(path, || {
        let mut store = Store::of_bytes(path, bytes)?;
        if store.unpacked() > most {
            return Ok(Sent::TooLarge(store.unpacked()));
        }
        let left = most.saturating_sub(store.unpacked());
        let mut found = find(&mut store, Inflated::All(left))?;
        if found.series.is_empty() {
            return Err(nothing(path, &store, &found));
        }
        let mut warnings = found.said();
        let (series, notes) = match choose(found.series, asked) {
            Ok(chosen) => chosen,
            Err(Unmeant { series, .. }) if series.len() > 1 => return Ok(Sent::Several(series)),
            Err(e) => return Err(VolumeError::new(path, e.message)),
        };
        warnings.extend(notes);
        scan(path, &mut store, &series, warnings)
    })
}

/// Reads a series as a scan, which messages call `path`.
fn scan(
    path: &Path,
    store: &mut Store,
    series: &Series,
    warnings: Vec<String>,
) -> Result<Sent, VolumeError> {
    let contents = read(store, series, Which::One(None), warnings)?;
    let image = contents.image().map_err(|e| VolumeError::new(path, e))?;
    Ok(Sent::Scan(Box::new(image)))
}

/// A series of a folder, as described by the tags of its files, to be read when it is asked for.
#[derive(Debug)]
pub struct Filed {
    /// The series' description; if it has parts, that of the one with more slices than any other.
    pub series: Series,
    /// Whether no single part of it has more slices than any other: then none can be selected.
    pub is_tied: bool,
    slices: usize,
    /// The files of the series, including those that cannot be read, by their names.
    files: Vec<(PathBuf, Stamp)>,
    folders: Vec<Arc<Folder>>,
}

/// A folder as it was when it was examined.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    seen: Stamp,
    /// Files that belong to no series, some of which may still be written.
    beside: Vec<(PathBuf, Stamp)>,
    /// Whether it, or a file in it, changed so shortly before that one more change might not be
    /// visible, because times of files may be coarse.
    is_recent: bool,
}

/// How coarse times of files may be.
const COARSE: Duration = Duration::from_secs(2);

/// The message for files that do not give what the examination found.
const OTHERS: &str = "its files have changed since the folder was scanned: try again";

/// Whether something changed near a given time.
fn is_recent(seen: Stamp, now: SystemTime) -> bool {
    seen.is_some_and(|(_, changed)| {
        now.duration_since(changed).unwrap_or_else(|e| e.duration()) < COARSE
    })
}

/// Whether one of these differs from its stamp.
fn differ(seen: &[(PathBuf, Stamp)]) -> bool {
    seen.iter().any(|(path, seen)| stamp(path) != *seen)
}

/// The series of a folder and of its subfolders, each once, and what was odd about its files.
///
/// A file with more than `most` bytes when it is inflated is left out. Messages name files by their
/// numbers among all that were examined, in the order of their paths. A folder without a series is
/// not an error: some may come later.
///
/// # Errors
/// It cannot be read, or holds more files than are examined.
pub fn filed(folder: &Path, most: u64) -> Result<(Vec<Filed>, Vec<Odd>), VolumeError> {
    super::within_memory(folder, || {
        let now = SystemTime::now();
        let Tree { mut store, folders, mut left_out } = Store::of_tree(folder)?;
        // Their stamps before they are read: what changes meanwhile counts as changed.
        let seen_now = |file: usize| {
            let path = store.name(file);
            let seen = stamp(&path);
            (path, seen)
        };
        let seen: Vec<(PathBuf, Stamp)> = (0..store.len()).map(seen_now).collect();
        let mut found = find(&mut store, Inflated::Each(most))?;
        left_out.append(&mut found.left_out);
        found.left_out = left_out;
        let warnings = found.odd(|path| match seen.iter().position(|(file, _)| file == path) {
            Some(at) => format!("file {} of {}", at + 1, seen.len()),
            None => "a folder".into(),
        });
        let mut all: Vec<(Filed, Vec<usize>)> = vec![];
        let mut known: HashMap<String, usize> = HashMap::new();
        for mut series in found.series {
            let broken = series.broken.iter().map(|(file, _)| *file);
            let mut files: Vec<usize> =
                series.images.iter().map(|image| image.file).chain(broken).collect();
            let slices = series.planes.len();
            // Its files are examined again when it is read.
            (series.images, series.planes) = (vec![], vec![]);
            let at = *known.entry(series.uid.clone()).or_insert(all.len());
            match all.get_mut(at) {
                None => {
                    let (is_tied, folders) = (false, vec![]);
                    let filed = Filed { series, is_tied, slices, files: vec![], folders };
                    all.push((filed, files));
                }
                Some((there, of_it)) => {
                    of_it.append(&mut files);
                    if slices == there.slices {
                        there.is_tied = true;
                    } else if slices > there.slices {
                        (there.series, there.slices, there.is_tied) = (series, slices, false);
                    }
                }
            }
        }
        let mut is_beside = vec![true; seen.len()];
        for (filed, files) in &mut all {
            files.sort_unstable();
            files.dedup();
            files.iter().for_each(|file| is_beside[*file] = false);
            filed.files = files.iter().map(|file| seen[*file].clone()).collect();
        }
        let folders = folders_of(folders, seen, &is_beside, now);
        let mut all: Vec<Filed> = all.into_iter().map(|(filed, _)| filed).collect();
        for filed in &mut all {
            let own: HashSet<&Path> =
                filed.files.iter().filter_map(|(path, _)| path.parent()).collect();
            filed.folders = own.into_iter().filter_map(|path| folders.get(path).cloned()).collect();
        }
        Ok((all, warnings))
    })
}

/// The folders that were examined, by their paths, with the files that belong to no series.
fn folders_of(
    folders: Vec<(PathBuf, Stamp)>,
    files: Vec<(PathBuf, Stamp)>,
    is_beside: &[bool],
    now: SystemTime,
) -> HashMap<PathBuf, Arc<Folder>> {
    let mut all: HashMap<PathBuf, Folder> = HashMap::new();
    for (path, seen) in folders {
        let is_recent = is_recent(seen, now);
        all.insert(path.clone(), Folder { path, seen, beside: vec![], is_recent });
    }
    for ((path, seen), is_beside) in files.into_iter().zip(is_beside) {
        let Some(folder) = path.parent().and_then(|path| all.get_mut(path)) else { continue };
        folder.is_recent |= is_recent(seen, now);
        if *is_beside {
            folder.beside.push((path, seen));
        }
    }
    all.into_iter().map(|(path, folder)| (path, Arc::new(folder))).collect()
}

impl Filed {
    /// Whether one of its files has changed since the folder was examined, by size and time.
    pub fn is_rewritten(&self) -> bool {
        differ(&self.files)
    }

    /// Whether another examination of the folder may give another result: files of it changed, or
    /// some were added, removed or changed beside them.
    pub fn has_changed(&self) -> bool {
        let changed = |f: &Arc<Folder>| stamp(&f.path) != f.seen || differ(&f.beside);
        self.folders.iter().any(changed) || self.is_rewritten()
    }

    /// Whether files changed so shortly before the examination that one more change would not be
    /// visible.
    pub fn is_recent(&self) -> bool {
        self.folders.iter().any(|folder| folder.is_recent)
    }

    /// Whether it consists of the same files as another examination's series, unchanged between the
    /// two.
    pub fn is_same(&self, other: &Filed) -> bool {
        self.files == other.files
    }

    /// Reads the series, unless its voxels take more than `most` bytes ([`Sent::TooLarge`]). No
    /// message names its files.
    ///
    /// # Errors
    /// A file of it is damaged or gone, they are not the slices that the examination found, or they
    /// hold no volume, or several.
    pub fn read(&self, most: u64) -> Result<Sent, VolumeError> {
        let path = Path::new(UNNAMED);
        super::within_memory(path, || {
            let fail = |message: String| VolumeError::new(path, message);
            let mut store = Store::Files(self.files.iter().map(|(file, _)| file.clone()).collect());
            let mut found = find(&mut store, Inflated::All(most))?;
            if let Some(e) = found.left_out.first() {
                return Err(fail(format!("a file of it cannot be read: {}", e.message)));
            }
            let mut warnings = found.said();
            let others = || fail(OTHERS.into());
            let uid = self.series.uid.as_str();
            if !found.series.iter().any(|series| series.uid == uid) {
                return Err(others());
            }
            let (series, notes) = choose(found.series, Some(uid)).map_err(|e| fail(e.message))?;
            if series.size != self.series.size || series.planes.len() != self.slices {
                return Err(others());
            }
            warnings.extend(notes);
            // The size as they are stored: scaled ones take more, which is checked against the
            // budget.
            let element = series.images.iter().map(|i| i.layout.element().size()).min();
            let numbers = series.size.into_iter().chain(element);
            let bytes = numbers.fold(1u64, |bytes, n| bytes.saturating_mul(n as u64));
            match bytes > most {
                true => Ok(Sent::TooLarge(bytes)),
                false => scan(path, &mut store, &series, warnings),
            }
        })
    }
}

/// The store at a path: a folder, an archive, or one file.
fn store_of(path: &Path) -> Result<Store<'static>, VolumeError> {
    if path.is_dir() {
        return Store::of_folder(path, true);
    }
    let mut head = [0; 4];
    let is_archive = std::fs::File::open(path)
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut head))
        .is_ok_and(|()| is_zip(&head));
    if is_archive { Store::of_zip(path) } else { Ok(Store::Files(vec![path.into()])) }
}

/// An error about a store without a series.
fn nothing(path: &Path, store: &Store, found: &Found) -> VolumeError {
    let what = match store {
        Store::Zip { .. } if found.left_out.is_empty() && found.others == 0 => {
            return VolumeError::new(path, no_image(ZIP));
        }
        Store::Zip { .. } => "is a ZIP archive in which ",
        Store::Files(_) if path.is_dir() => "is a folder in which ",
        Store::Files(_) | Store::One { .. } => "is a file in which ",
    };
    let mut message = format!("{what}{NO_IMAGE}");
    match found.left_out.first() {
        Some(e) if e.path == path => message = format!("is a DICOM file, {}", e.message),
        Some(e) => message += &format!("; {}: {}", e.path.display(), e.message),
        None if found.others > 0 => {
            message += &format!(
                "; {} DICOM files are not images (reports, segmentations, plans, ...)",
                found.others
            )
        }
        None => {}
    }
    VolumeError::new(path, message)
}

/// How messages name the memory that the positions of slices take.
const PLACES: &str = "where the slices of a DICOM series lie";
/// How messages name the memory that a file of labels takes.
const LABELS: &str = "a DICOM file";

/// The kind of a file that marks voxels.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Marks {
    /// A segmentation: it has voxels of its own.
    Voxels,
    /// A structure set: it has contours.
    Contours,
}

impl Marks {
    /// Determined by the class of a file.
    fn of(tags: &DataSet) -> Result<Marks, String> {
        let class = tags.text(tags::SOP_CLASS).unwrap_or_default();
        match class.as_str() {
            "1.2.840.10008.5.1.4.1.1.66.4" => Ok(Marks::Voxels),
            "1.2.840.10008.5.1.4.1.1.481.3" => Ok(Marks::Contours),
            _ => Err(format!(
                "is a DICOM file without marked voxels: its {} is '{class}', expected a segmentation (SEG) or a structure set (RTSTRUCT)",
                tags::SOP_CLASS
            )),
        }
    }
}

/// Runs work on a DICOM file's tags, with its transfer syntax.
fn opened<T>(
    path: &Path,
    work: impl FnOnce(&Opened, &str) -> Result<T, String>,
) -> Result<T, VolumeError> {
    let fail = |e: String| VolumeError::new(path, e);
    crate::input::remember(path);
    let bytes = memory::read_file(LABELS, path).map_err(|e| fail(e.to_string()))?;
    let damaged = |e: Problem| fail(format!("is a DICOM file, {}", String::from(e)));
    let (bytes, start, syntax) = data_set(&bytes, true, u64::MAX).map_err(damaged)?;
    let opened = Opened::new(&bytes, start, &syntax).map_err(damaged)?;
    work(&opened, &syntax).map_err(fail)
}

/// The frame of reference of a file's positions, if it has one.
fn reference(tags: &DataSet) -> Option<String> {
    let of_contours = tags.item(tags::REFERENCED_FRAMES_OF_REFERENCE).ok().flatten();
    let other = || of_contours.and_then(|item| item.text(tags::FRAME_OF_REFERENCE));
    tags.text(tags::FRAME_OF_REFERENCE).or_else(other)
}

/// What a segmentation or a structure set marks on a scan's grid; `scan` has the slices of the scan
/// if it was read from DICOM.
pub(super) fn labels(
    path: &Path,
    grid: &Grid,
    scan: Option<&Source>,
) -> Result<Marked, VolumeError> {
    opened(path, |opened, syntax| {
        let place = Place::new(grid, scan);
        let mut marked = match Marks::of(&opened.tags)? {
            Marks::Voxels => segmentation::read(opened, syntax, &place)?,
            Marks::Contours => structures::read(&opened.tags, &place)?,
        };
        let of_scan = scan.and_then(|s| s.text(tags::FRAME_OF_REFERENCE));
        let own = reference(&opened.tags);
        if let (Some(own), Some(of_scan)) = (own.as_deref(), of_scan)
            && own != of_scan
        {
            marked.warnings.push(format!(
                "its {} differs from the scan's: its alignment could not be checked",
                tags::FRAME_OF_REFERENCE
            ));
        }
        Ok(marked)
    })
}

/// The grid of a segmentation; none for a structure set, whose contours are placed on any grid.
pub(super) fn grid(path: &Path) -> Result<Option<Grid>, VolumeError> {
    opened(path, |opened, _| match Marks::of(&opened.tags)? {
        Marks::Voxels => segmentation::grid(&opened.tags).map(Some),
        Marks::Contours => Ok(None),
    })
}

/// Reads the selected series of a folder, an archive, or beside a file.
pub(super) fn contents(
    path: &Path,
    asked: Option<&str>,
    which: Which,
) -> Result<Contents, VolumeError> {
    let mut store = store_of(path)?;
    let mut found = find(&mut store, Inflated::All(u64::MAX))?;
    if found.series.is_empty() {
        return Err(nothing(path, &store, &found));
    }
    let is_file = matches!(&store, Store::Files(_)) && !path.is_dir();
    if is_file && asked.is_none() {
        return of_file(path, store, found, which);
    }
    if is_file {
        store = Store::of_folder(folder_of(path), false)?;
        found = find(&mut store, Inflated::All(u64::MAX))?;
    }
    let mut warnings = found.said();
    let (series, notes) =
        choose(found.series, asked).map_err(|e| VolumeError::new(path, e.message))?;
    warnings.extend(notes);
    read(&mut store, &series, which, warnings)
}

/// The folder that contains a file.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Reads the series of a file: that of a single slice is searched for in the file's own folder.
fn of_file(
    path: &Path,
    mut store: Store,
    found: Found,
    which: Which,
) -> Result<Contents, VolumeError> {
    let slices: usize = found.series.iter().map(|s| s.planes.len()).sum();
    let broken = found.series.iter().find_map(|s| s.broken.clone());
    if let Some((file, message)) = broken {
        return Err(store.fail(file, message));
    }
    if slices == 1 {
        let uid = found.series.first().map(|s| s.uid.clone()).unwrap_or_default();
        let mut beside = Store::of_folder(folder_of(path), false)?;
        let mut all = find(&mut beside, Inflated::All(u64::MAX))?;
        let warnings = all.said();
        let named = |s: &Series| {
            s.uid == uid
                && s.images.iter().any(|i| beside.name(i.file).file_name() == path.file_name())
        };
        let at = all.series.iter().position(named);
        if let Some(series) = at.and_then(|at| all.series.into_iter().nth(at)) {
            let mut notes = warnings;
            if series.planes.len() > 1 {
                notes.push(format!(
                    "one file of series {} was named: its {} slices in this folder were read",
                    series.number,
                    series.planes.len()
                ));
            }
            return read(&mut beside, &series, which, notes);
        }
    }
    let (series, notes) =
        choose(found.series, None).map_err(|e| VolumeError::new(path, e.message))?;
    read(&mut store, &series, which, notes)
}

/// How the values of a series become those of its volume.
struct Scales {
    /// For each plane of the series.
    each: Vec<[f64; 2]>,
    /// Notes about them.
    notes: Vec<String>,
}

/// The scale of every plane: rescaling, inversion if the lowest value is shown white, and uptake.
fn scales(series: &Series) -> Scales {
    let mut notes = vec![];
    let modality = modality_of(series);
    let inverted = |p: &Plane| series.images[p.image].layout.inverted;
    // For these the units say what a value means, whatever is shown white.
    let kept = matches!(modality, Some(Modality::Ct | Modality::Pet));
    if series.planes.iter().any(inverted) {
        notes.push(if kept {
            "MONOCHROME1: low values are displayed white; values are unchanged".to_string()
        } else {
            "MONOCHROME1: low values are displayed white, so values were inverted".to_string()
        });
    }
    let mut factor = 1.0;
    if modality == Some(Modality::Pet) {
        match suv::factor(series.images.iter().filter_map(|i| i.uptake.as_ref())) {
            Ok(found) => factor = found,
            Err(e) => notes.push(format!("values were not converted to SUV: {e}")),
        }
    }
    let each = series.planes.iter().map(|p| {
        let [slope, intercept] = p.scale.map(|v| v * factor);
        match inverted(p) && !kept {
            true => [-slope, intercept + slope * series.images[p.image].layout.ends()],
            false => [slope, intercept],
        }
    });
    Scales { each: each.collect(), notes }
}

/// The modality of a series, by its tag.
fn modality_of(series: &Series) -> Option<Modality> {
    match series.modality.as_str() {
        "CT" => Some(Modality::Ct),
        "MR" => Some(Modality::Mr),
        "PT" => Some(Modality::Pet),
        _ => None,
    }
}

/// Reads a series.
fn read(
    store: &mut Store,
    series: &Series,
    which: Which,
    mut warnings: Vec<String>,
) -> Result<Contents, VolumeError> {
    if let Some((file, message)) = &series.broken {
        return Err(store.fail(*file, message.clone()));
    }
    let file_of = |plane: usize| {
        series.planes.get(plane).and_then(|p| series.images.get(p.image)).map_or(0, |i| i.file)
    };
    let stack = stack(&series.planes).map_err(|e| store.fail(file_of(e.plane), e.message))?;
    let [columns, rows, _] = series.size;
    let count = stack.volumes.len();
    let slices = stack.volumes.first().map_or(0, Vec::len);
    let size = [columns, rows, slices];
    let fail = |store: &Store, message: String| store.fail(file_of(0), message);
    let pick = which.pick(count, size).map_err(|e| fail(store, e))?;
    let Some(order) = stack.volumes.get(pick) else {
        return Err(fail(store, "holds no volume".into()));
    };
    warnings.extend(stack.warnings);
    // The first volume was placed; others may be elsewhere, or have steps of their own.
    let mut affine = stack.affine;
    if pick > 0 {
        let planes = memory::collected(PLACES, order.iter().map(|p| series.planes[*p].clone()));
        let own = geometry::stack(&planes).map_err(|e| {
            let plane = order.get(e.plane).copied().unwrap_or(0);
            store.fail(file_of(plane), e.message)
        })?;
        if !own.volumes.iter().flatten().copied().eq(0..slices) {
            let message =
                format!("slices of volume {pick} are not in order, or two have the same position");
            return Err(fail(store, message));
        }
        affine = own.affine;
        for warning in own.warnings {
            if !warnings.contains(&warning) {
                warnings.push(warning);
            }
        }
    }
    let Scales { each, notes } = scales(series);
    warnings.extend(notes);

    // With one type and one scale for all, values stay as they are stored.
    let element_of = |plane: usize| series.images[series.planes[plane].image].layout.element();
    let (first, scale) = (element_of(order[0]), each[order[0]]);
    let common = order.iter().all(|p| element_of(*p) == first && each[*p] == scale);
    let element = if common { first } else { Element::Float32 };
    let total = element.bytes_of(size, 1).map_err(|e| fail(store, e))?;

    let mut voxels: Vec<u8> = vec![];
    let mut source = Source::new(&series.uid, size, &series.planes[order[0]]);
    let same = |a: &usize, b: &usize| series.planes[*a].image == series.planes[*b].image;
    for run in order.chunk_by(same) {
        let image = &series.images[series.planes[run[0]].image];
        let bytes = store.read(image.file)?;
        let planes = run.iter().map(|p| (&series.planes[*p], each[*p]));
        let many = image.layout.frames > 1;
        let own = run.iter().map(|p| &series.planes[*p]);
        let give = |slice: &[u8], scale| {
            // The sizes are believed only when the first slice could be read.
            if voxels.is_empty() {
                voxels = memory::list(VOXELS, total);
            }
            match common {
                true => voxels.extend_from_slice(slice),
                false => scaled(slice, image.layout.element(), scale, &mut voxels),
            }
        };
        slices_of(&bytes, image, |tags| source.add(tags, many, own), planes, give)
            .map_err(|e| store.fail(image.file, e))?;
    }
    if voxels.len() != total {
        return Err(fail(
            store,
            format!("voxels are missing: found {} of {total} bytes", voxels.len()),
        ));
    }
    let is_scaled = common && scale != [1.0, 0.0];
    let array = Array::of_bytes(voxels, element, size, is_scaled.then_some(scale));
    let grid = Grid { size, affine };
    let mut description = describe(&grid, "DICOM", element.name(), count);
    description.whole = common && scale.iter().all(|v| v.fract() == 0.0);
    description.affine_from = "image positions";
    description.modality = modality_of(series);
    description.source = Some(Arc::new(source.complete()));
    Ok(Contents { grid, volumes: vec![array], segments: vec![], description, warnings })
}

/// Passes a file's tags, and then its slices, one by one.
fn slices_of<'p>(
    bytes: &[u8],
    image: &Image,
    named: impl FnOnce(&DataSet),
    planes: impl Iterator<Item = (&'p Plane, [f64; 2])>,
    mut give: impl FnMut(&[u8], [f64; 2]),
) -> Result<(), String> {
    // Its size was checked against the limit when its tags were read.
    let (bytes, start, syntax) = data_set(bytes, true, u64::MAX)?;
    let opened = Opened::new(&bytes, start, &syntax)?;
    let frames = Frames::new(&opened, &image.layout)?;
    named(&opened.tags);
    for (plane, scale) in planes {
        give(&frames.frame(plane.frame)?, scale);
    }
    Ok(())
}
