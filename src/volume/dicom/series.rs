//! The series of images in a store, found by their tags alone, and the selection of one.

use super::files::Store;
use super::geometry::{Plane, alike, directions, stack};
use super::pixels::Layout;
use super::suv::{self, Uptake};
use super::tags::{self, DataSet, Opened, Problem};
use crate::volume::VolumeError;
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::Path;

/// The most parts that a series is split into: radial planes make one each.
const MOST_PARTS: usize = 64;
/// The most frames of a file.
const MOST_FRAMES: usize = 1 << 16;
/// The most left-out files that are named.
const MOST_NAMED: usize = 5;

/// Classes of objects that are images: one without voxels is damaged.
const IMAGES: [&str; 8] = [
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.2.1",
    "1.2.840.10008.5.1.4.1.1.2.2",
    "1.2.840.10008.5.1.4.1.1.4",
    "1.2.840.10008.5.1.4.1.1.4.1",
    "1.2.840.10008.5.1.4.1.1.4.4",
    "1.2.840.10008.5.1.4.1.1.128",
    "1.2.840.10008.5.1.4.1.1.130",
];

/// Classes that have voxels and are not scans: segmentations, by labels, by height; doses.
const NO_SCANS: [&str; 4] = [
    "1.2.840.10008.5.1.4.1.1.66.4",
    "1.2.840.10008.5.1.4.1.1.66.7",
    "1.2.840.10008.5.1.4.1.1.66.8",
    "1.2.840.10008.5.1.4.1.1.481.2",
];

/// What a file says of its image.
#[derive(Debug)]
pub struct Image {
    /// The file's number in the store.
    pub file: usize,
    /// How the image's voxels are written.
    pub layout: Layout,
    /// How the image's values become uptakes, for PET.
    pub uptake: Option<Uptake>,
}

/// What a file says of its series, and of its place in it.
struct Said {
    study: String,
    series: String,
    instance: Option<String>,
    number: Option<i64>,
    modality: String,
    description: String,
    localizer: bool,
    /// The layout and planes of the image, or why it cannot be read.
    image: Result<(Layout, Vec<Plane>), String>,
    uptake: Option<Uptake>,
}

/// Images that belong together.
#[derive(Debug)]
pub struct Series {
    /// SeriesInstanceUID.
    pub uid: String,
    /// StudyInstanceUID; empty if no file states it.
    pub study: String,
    /// SeriesNumber, followed by a point and the part if a series has several. Parts differ in
    /// orientation, size or spacing.
    pub number: String,
    /// Modality, as the file states it, such as `CT`.
    pub modality: String,
    /// SeriesDescription.
    pub description: String,
    /// Whether it is a scout view, by ImageType.
    pub localizer: bool,
    /// Columns, rows and slices; 0 slices if none can be read.
    pub size: [usize; 3],
    /// The number of volumes, all with the same number of slices.
    pub volumes: usize,
    /// Mm between columns, rows and slices; none if slices are not evenly spaced.
    pub spacing: Option<[f64; 3]>,
    /// The first file of the series that cannot be read, by its number in the store, and the
    /// reason.
    pub(super) broken: Option<(usize, String)>,
    pub(super) images: Vec<Image>,
    pub(super) planes: Vec<Plane>,
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let [columns, rows, slices] = self.size;
        write!(f, "{:<8} {:<4} {columns} x {rows} x {slices}", self.number, self.modality)?;
        if self.volumes > 1 {
            write!(f, ", {} volumes", self.volumes)?;
        }
        match self.spacing {
            Some([x, y, z]) => write!(f, ", {x:.3} x {y:.3} x {z:.3} mm")?,
            None => write!(f, ", cannot be read as a volume")?,
        }
        if self.localizer {
            write!(f, ", localizer")?;
        }
        write!(f, ", '{}', {}", self.description, self.uid)
    }
}

/// The series of a store, and what was left out.
#[derive(Default, Debug)]
pub struct Found {
    pub series: Vec<Series>,
    pub warnings: Vec<String>,
    /// The errors of files that are left out.
    pub left_out: Vec<VolumeError>,
    /// DICOM files that are not images.
    pub others: usize,
}

/// Something odd about the files of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Odd {
    /// The message, as text that names no file: names often contain those of patients.
    pub said: String,
    /// A key that distinguishes it from others for as long as it lasts, names included: not to be
    /// shown.
    pub key: String,
}

impl Found {
    /// The messages about a store whose series are read.
    pub fn said(&mut self) -> Vec<String> {
        self.odd(|_| String::new()).into_iter().map(|odd| odd.key).collect()
    }

    /// The messages for users who may not learn the names of files: `place` describes which file a
    /// path is.
    pub fn odd(&mut self, place: impl Fn(&Path) -> String) -> Vec<Odd> {
        let plain = |said: String| Odd { key: said.clone(), said };
        let mut all: Vec<Odd> = std::mem::take(&mut self.warnings).into_iter().map(plain).collect();
        let more = self.left_out.len().saturating_sub(MOST_NAMED);
        all.extend(self.left_out.iter().take(MOST_NAMED).map(|e| Odd {
            said: format!("ignored {}: {}", place(&e.path), e.message),
            key: format!("ignored {}: {}", e.path.display(), e.message),
        }));
        let rest = || plain(format!("ignored {more} more files for such reasons"));
        all.extend((more > 0).then(rest));
        all
    }
}

/// The most bytes, inflated, of files whose data sets are deflated.
#[derive(Clone, Copy)]
pub enum Inflated {
    /// All of them together: more is an error.
    All(u64),
    /// Each of them: one that has more is left out.
    Each(u64),
}

/// Examines every file of a store, by its tags alone.
pub fn find(store: &mut Store, most: Inflated) -> Result<Found, VolumeError> {
    let (Inflated::All(bytes) | Inflated::Each(bytes)) = most;
    let is_each = matches!(most, Inflated::Each(_));
    let (mut found, mut left) = (Found::default(), bytes);
    let mut all: Vec<(String, Gathered)> = vec![];
    let mut known: HashMap<String, usize> = HashMap::new();
    for file in 0..store.len() {
        if is_each {
            left = bytes;
        }
        match look(store, file, &mut left) {
            Ok(None) => {}
            Ok(Some(None)) => found.others += 1,
            Ok(Some(Some(said))) => {
                let at = *known.entry(said.series.clone()).or_insert(all.len());
                if at == all.len() {
                    all.push((said.series.clone(), Gathered::default()));
                }
                all[at].1.add(file, said);
            }
            Err(Unread::Limit(e)) if is_each && !e.refused => found.left_out.push(e),
            Err(Unread::Limit(e)) => return Err(e),
            Err(Unread::Damaged(e)) => found.left_out.push(e),
        }
    }
    for (uid, gathered) in all {
        gathered.parts(&uid, &mut found);
    }
    found.series.sort_by(|a, b| {
        let number = |s: &Series| s.number.parse::<f64>().unwrap_or(f64::MAX);
        number(a).total_cmp(&number(b)).then_with(|| a.uid.cmp(&b.uid))
    });
    Ok(found)
}

/// Why a file was not read.
enum Unread {
    /// The file is damaged: others may be intact.
    Damaged(VolumeError),
    /// The file exceeds a limit, either of memory or of what may still be inflated: no further file
    /// is examined.
    Limit(VolumeError),
}

/// The tags of a file: none if it is not DICOM, and an inner none if it is not an image. `left` is
/// the number of bytes that may still be inflated.
fn look(store: &mut Store, file: usize, left: &mut u64) -> Result<Option<Option<Said>>, Unread> {
    let read = store.look(file, |read| {
        let set = tags::data_set(&read.bytes, read.whole, *left);
        let parsed = set.and_then(|(bytes, start, syntax)| {
            if let Cow::Owned(inflated) = &bytes {
                *left = left.saturating_sub(inflated.len() as u64);
            }
            let opened = Opened::new(&bytes, start, &syntax)?;
            // A file cut off between two elements may continue.
            if !read.whole && !opened.has_voxels() {
                return Err(Problem::Short);
            }
            said(&opened, &syntax).map_err(Problem::Damaged)
        });
        // With more of the file it may be one.
        let is_beginning = !read.whole && matches!(parsed, Err(Problem::Short));
        (!is_beginning).then_some(parsed)
    });
    let read = read.map_err(|e| if e.refused { Unread::Limit(e) } else { Unread::Damaged(e) })?;
    read.transpose().map_err(|problem| match problem {
        Problem::Large => Unread::Limit(store.fail(file, problem)),
        _ => Unread::Damaged(store.fail(file, problem)),
    })
}

/// What a file says; none if it is not an image.
fn said(opened: &Opened, syntax: &str) -> Result<Option<Said>, String> {
    let tags = &opened.tags;
    let class = tags.text(tags::SOP_CLASS).unwrap_or_default();
    let is_image = opened.has_voxels() || IMAGES.contains(&class.as_str());
    if !is_image || NO_SCANS.contains(&class.as_str()) {
        return Ok(None);
    }
    let kinds = tags.text(tags::IMAGE_TYPE).unwrap_or_default();
    let whole = |tag| -> Option<i64> { tags.number(tag).ok().flatten().map(|n| n as i64) };
    let modality = tags.text(tags::MODALITY).unwrap_or_default();
    let is = |kind: &str| kinds.split('\\').any(|k| k.trim() == kind);
    let image = if !opened.has_voxels() {
        Err(format!("truncated: its {} is missing", tags::PIXEL_DATA))
    } else if is("MOSAIC") {
        Err(format!(
            "its {} is MOSAIC: slices are tiled in one image; 'dcm2niix -z y FOLDER' separates them",
            tags::IMAGE_TYPE
        ))
    } else {
        Layout::of(tags, syntax).and_then(|layout| {
            let planes = planes(tags, layout.frames)?;
            Ok((layout, planes))
        })
    };
    Ok(Some(Said {
        study: tags.text(tags::STUDY_INSTANCE).unwrap_or_default(),
        series: tags
            .text(tags::SERIES_INSTANCE)
            .ok_or_else(|| format!("its {} is missing", tags::SERIES_INSTANCE))?,
        instance: tags.text(tags::SOP_INSTANCE),
        number: whole(tags::SERIES_NUMBER),
        description: tags.text(tags::SERIES_DESCRIPTION).unwrap_or_default(),
        localizer: is("LOCALIZER"),
        uptake: (modality == "PT").then(|| suv::uptake(tags)),
        modality,
        image,
    }))
}

/// Mm between rows and columns, as a data set states them.
fn spacing_of(tags: &DataSet) -> Result<Option<[f64; 2]>, String> {
    let spacing: Option<[f64; 2]> = tags.vector(tags::PIXEL_SPACING)?;
    match spacing {
        Some(s) if s.iter().any(|v| !(1e-4..=1e4).contains(v)) => {
            Err(format!("its {} is {s:?}, expected two lengths in mm above 0", tags::PIXEL_SPACING))
        }
        other => Ok(other),
    }
}

/// The scale of values, as a data set states it.
fn scale_of(tags: &DataSet) -> Result<Option<[f64; 2]>, String> {
    let (slope, intercept) = (tags.number(tags::SLOPE)?, tags.number(tags::INTERCEPT)?);
    match slope {
        Some(0.0) => Err(format!("its {} is 0, expected another number", tags::SLOPE)),
        None if intercept.is_none() => Ok(None),
        _ => Ok(Some([slope.unwrap_or(1.0), intercept.unwrap_or(0.0)])),
    }
}

/// What a functional group states, otherwise the file.
fn either<'a, T>(
    group: Option<&DataSet<'a>>,
    tags: &DataSet<'a>,
    of: impl Fn(&DataSet<'a>) -> Result<Option<T>, String>,
) -> Result<Option<T>, String> {
    if let Some(group) = group
        && let Some(found) = of(group)?
    {
        return Ok(Some(found));
    }
    of(tags)
}

/// The groups of functions that place a frame.
const GROUPS: [tags::Tag; 5] = [
    tags::PLANE_POSITION,
    tags::PLANE_ORIENTATION,
    tags::PIXEL_MEASURES,
    tags::VALUE_TRANSFORMATION,
    tags::FRAME_CONTENT,
];

/// The groups among [`GROUPS`] that a data set has.
fn groups<'a>(set: Option<&DataSet<'a>>) -> Result<[Option<DataSet<'a>>; 5], String> {
    let mut found: [Option<DataSet>; 5] = Default::default();
    if let Some(set) = set {
        for (to, tag) in found.iter_mut().zip(GROUPS) {
            *to = set.item(tag)?;
        }
    }
    Ok(found)
}

/// The planes of a file: one, or those of its frames (PS3.3, C.7.6.16).
pub fn planes(tags: &DataSet, count: usize) -> Result<Vec<Plane>, String> {
    let number = |set: &DataSet, tag| -> Option<i64> {
        set.number(tag).ok().flatten().map(|n| n.clamp(-1e15, 1e15) as i64)
    };
    let missing = |tag: tags::Tag| format!("its {tag} is missing: its slices cannot be placed");
    let shared = tags.item(tags::SHARED_GROUPS)?;
    let frames = tags.items(tags::FRAME_GROUPS)?;
    if count > MOST_FRAMES {
        return Err(format!("has {count} frames, expected at most {MOST_FRAMES}"));
    }
    if frames.len() != count && (count > 1 || frames.len() > 1) {
        return Err(format!(
            "its {} has {} items, expected one for each of its {count} frames: frames without a position are not read",
            tags::FRAME_GROUPS,
            frames.len()
        ));
    }
    let mut planes = Vec::new();
    // Read once: there may be many frames.
    let shared = groups(shared.as_ref())?;
    for frame in 0..count {
        // Functional groups, the frame's own or the shared ones.
        let own = groups(frames.get(frame))?;
        let [place, turned, measures, values, content]: [Option<&DataSet>; 5] =
            std::array::from_fn(|n| own[n].as_ref().or(shared[n].as_ref()));
        let position = either(place, tags, |s| s.vector::<3>(tags::POSITION))?
            .ok_or_else(|| missing(tags::POSITION))?;
        let six = either(turned, tags, |s| s.vector::<6>(tags::ORIENTATION))?
            .ok_or_else(|| missing(tags::ORIENTATION))?;
        let orientation = directions(six).ok_or_else(|| {
            format!(
                "its {} is {six:?}, expected two unit vectors at right angles",
                tags::ORIENTATION
            )
        })?;
        let spacing = either(measures, tags, spacing_of)?;
        let apart = either(measures, tags, |s| s.number(tags::SPACING_BETWEEN_SLICES))?;
        let thick = either(measures, tags, |s| s.number(tags::SLICE_THICKNESS))?;
        let scale = either(values, tags, scale_of)?;
        let content = |tag| content.and_then(|c| number(c, tag));
        planes.push(Plane {
            image: 0,
            frame,
            position,
            orientation,
            spacing: spacing.ok_or_else(|| missing(tags::PIXEL_SPACING))?,
            thickness: apart.map(f64::abs).filter(|t| *t > 0.0).or(thick),
            scale: scale.unwrap_or([1.0, 0.0]),
            order: [
                content(tags::TEMPORAL_INDEX)
                    .or_else(|| number(tags, tags::TEMPORAL_POSITION))
                    .unwrap_or(0),
                content(tags::FRAME_ACQUISITION)
                    .or_else(|| number(tags, tags::ACQUISITION_NUMBER))
                    .unwrap_or(0),
                number(tags, tags::INSTANCE_NUMBER).unwrap_or(0),
                frame as i64,
            ],
        });
    }
    Ok(planes)
}

/// The files of a series as they are found.
#[derive(Default)]
struct Gathered {
    study: String,
    number: Option<i64>,
    modality: String,
    description: String,
    parts: Vec<Series>,
    broken: Option<(usize, String)>,
    instances: HashSet<String>,
    copies: usize,
    lost: usize,
}

impl Gathered {
    fn add(&mut self, file: usize, said: Said) {
        if let Some(instance) = said.instance
            && !self.instances.insert(instance)
        {
            self.copies += 1;
            return;
        }
        self.number = self.number.or(said.number);
        if self.study.is_empty() {
            self.study = said.study;
        }
        if self.modality.is_empty() {
            self.modality = said.modality;
        }
        if self.description.is_empty() {
            self.description = said.description;
        }
        let (layout, planes) = match said.image {
            Ok(image) => image,
            Err(e) => {
                self.broken.get_or_insert((file, e));
                return;
            }
        };
        let size = [layout.columns, layout.rows];
        // Frames of one file may be placed differently too.
        let mut image: HashMap<usize, usize> = HashMap::new();
        for mut plane in planes {
            let fits = |s: &Series| s.size[..2] == size && alike(&s.planes[0], &plane);
            let part = match self.parts.iter().position(fits) {
                Some(part) => part,
                None if self.parts.len() < MOST_PARTS => {
                    self.parts.push(Series::empty(size));
                    self.parts.len() - 1
                }
                None => {
                    self.lost += 1;
                    continue;
                }
            };
            let to = &mut self.parts[part];
            plane.image = *image.entry(part).or_insert_with(|| {
                let uptake = said.uptake.clone();
                to.images.push(Image { file, layout: layout.clone(), uptake });
                to.images.len() - 1
            });
            to.localizer |= said.localizer;
            to.planes.push(plane);
        }
    }

    /// The series that these files are.
    fn parts(mut self, uid: &str, found: &mut Found) {
        let number = self.number.map_or("-".into(), |n: i64| n.to_string());
        if self.copies > 0 {
            let n = self.copies;
            found.warnings.push(format!(
                "series {number}: {n} files have duplicates; one copy of each was read"
            ));
        }
        if self.lost > 0 {
            found.warnings.push(format!(
                "series {number}: {} slices have orientations beyond the first {MOST_PARTS} and were ignored",
                self.lost
            ));
        }
        if self.parts.is_empty() {
            self.parts.push(Series::empty([0, 0]));
        }
        let several = self.parts.len() > 1;
        for (n, mut part) in self.parts.into_iter().enumerate() {
            part.uid = uid.into();
            part.study = self.study.clone();
            part.number = if several { format!("{number}.{}", n + 1) } else { number.clone() };
            part.modality = self.modality.clone();
            part.description = self.description.clone();
            part.broken = self.broken.clone();
            if let Ok(stack) = stack(&part.planes) {
                part.volumes = stack.volumes.len();
                part.size[2] = stack.volumes.first().map_or(0, Vec::len);
                part.spacing = Some(stack.affine.spacing()).filter(|_| part.broken.is_none());
            } else {
                part.size[2] = part.planes.len();
            }
            found.series.push(part);
        }
    }
}

impl Series {
    fn empty(size: [usize; 2]) -> Series {
        Series {
            uid: String::new(),
            study: String::new(),
            number: String::new(),
            modality: String::new(),
            description: String::new(),
            localizer: false,
            size: [size[0], size[1], 0],
            volumes: 1,
            spacing: None,
            broken: None,
            images: vec![],
            planes: vec![],
        }
    }

    /// How well it matches the selection, from best to worst: by its UID, its number, a part of its
    /// description.
    fn answers(&self, asked: &str) -> Option<u8> {
        let number = self.number.split('.').next().unwrap_or_default();
        if self.uid == asked {
            Some(0)
        } else if self.number == asked {
            Some(1)
        } else if number == asked {
            Some(2)
        } else {
            let part = self.description.to_lowercase().contains(&asked.to_lowercase());
            part.then_some(3)
        }
    }
}

/// Why no series is selected.
pub struct Unmeant {
    pub message: String,
    /// The candidates, if there are several.
    pub series: Vec<Series>,
}

impl Unmeant {
    fn none(message: impl Into<String>) -> Unmeant {
        Unmeant { message: message.into(), series: vec![] }
    }
}

/// The selected series: the one that was asked for, otherwise the only one. If a series has parts,
/// the one with more slices than any other. Also notes about the choice.
///
/// # Errors
/// None matches, or several do: the message lists them.
pub fn choose(series: Vec<Series>, asked: Option<&str>) -> Result<(Series, Vec<String>), Unmeant> {
    let list =
        |series: &[Series]| series.iter().map(|s| format!("\n  {s}")).collect::<Vec<_>>().concat();
    let asked = asked.map(str::trim).filter(|a| !a.is_empty());
    let best = asked.and_then(|a| series.iter().filter_map(|s| s.answers(a)).min());
    let meant: Vec<usize> = match asked {
        Some(asked) => {
            let Some(best) = best else {
                return Err(Unmeant::none(format!(
                    "holds no series '{asked}': expected a number, a UID or a part of a description of{}",
                    list(&series)
                )));
            };
            (0..series.len()).filter(|n| series[*n].answers(asked) == Some(best)).collect()
        }
        // Scout views and pages of reports are not candidates beside a scan.
        None => {
            let is_scan = |s: &Series| !s.localizer && !s.planes.is_empty();
            let scans: Vec<usize> = (0..series.len()).filter(|n| is_scan(&series[*n])).collect();
            if scans.is_empty() { (0..series.len()).collect() } else { scans }
        }
    };
    let slices = |n: usize| series[n].planes.len();
    let largest = meant.iter().copied().max_by_key(|n| slices(*n));
    let none = || Unmeant::none("holds no series of images");
    let largest = largest.ok_or_else(none)?;
    let same = |n: usize| series[n].uid == series[largest].uid;
    let alone = meant.iter().all(|n| *n == largest || same(*n) && slices(*n) < slices(largest));
    if !alone {
        let lines: Vec<String> = meant.iter().map(|n| format!("\n  {}", series[*n])).collect();
        let message = format!(
            "holds {} series of images{}; pick one by its number, UID or a part of its description (--series):{}",
            meant.len(),
            asked.map_or(String::new(), |a| format!(" that match '{a}'")),
            lines.concat()
        );
        let all = series.into_iter().enumerate();
        let series = all.filter(|(n, _)| meant.contains(n)).map(|(_, s)| s).collect();
        return Err(Unmeant { message, series });
    }
    let mut notes = vec![];
    let parts = meant.len() - 1;
    if parts > 0 {
        notes.push(format!(
            "series {} was read; {parts} other parts of it have another orientation, size or spacing",
            series[largest].number
        ));
    }
    let left = series.len() - meant.len();
    if asked.is_none() && left > 0 {
        notes.push(format!(
            "{left} other series were not read: localizers, or images without a position"
        ));
    }
    let chosen = series.into_iter().nth(largest).ok_or_else(none)?;
    Ok((chosen, notes))
}
