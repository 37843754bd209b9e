//! What a segmentation must say of the scan that it belongs to: the patient and study, and which
//! instance each slice is. It is kept with the scan, and nothing of it is ever shown or logged.

use super::geometry::{Plane, cross, dot};
use super::tags::{self, DataSet, Tag};
use crate::memory::{self, Charge};
use std::collections::HashSet;
use std::fmt;

/// How messages name the memory that it takes.
const SOURCE: &str = "what the slices of a DICOM series are called";

/// The longest value that is copied, in bytes.
const LONGEST: usize = 1024;

/// What is copied unchanged, of the patient, the study, the frame of reference, and the scanner.
const COPIED: [Tag; 26] = [
    tags::CHARACTER_SET,
    tags::STUDY_DATE,
    tags::STUDY_TIME,
    tags::ACCESSION_NUMBER,
    tags::MANUFACTURER,
    tags::REFERRING_PHYSICIAN,
    tags::TIMEZONE,
    tags::STUDY_DESCRIPTION,
    tags::MODEL_NAME,
    tags::PATIENT_NAME,
    tags::PATIENT_ID,
    tags::PATIENT_ISSUER,
    tags::PATIENT_BIRTH,
    tags::PATIENT_SEX,
    tags::PATIENT_AGE,
    tags::PATIENT_SIZE,
    tags::PATIENT_WEIGHT,
    tags::IDENTITY_REMOVED,
    tags::DEIDENTIFICATION,
    tags::STUDY_INSTANCE,
    tags::STUDY_ID,
    tags::FRAME_OF_REFERENCE,
    tags::POSITION_REFERENCE,
    tags::LONGITUDINAL,
    tags::LOSSY_RATIO,
    tags::LOSSY_METHOD,
];

/// A code: its value, its scheme and its meaning.
pub type Code = [String; 3];

/// A file of the series.
pub struct Instance {
    pub class: String,
    pub uid: String,
    /// Whether it has several frames.
    many: bool,
}

/// A slice of the scan.
struct Slice {
    instance: usize,
    /// Which frame of it, from 0.
    frame: usize,
    /// The centre of the slice's first voxel, in mm of LPS.
    position: [f64; 3],
}

/// What the files of a series say of it, and of each slice.
pub struct Source {
    size: [usize; 3],
    /// SeriesInstanceUID.
    pub series: String,
    /// SeriesNumber.
    pub number: i64,
    /// Unit vectors along a row and along a column.
    pub orientation: [[f64; 3]; 2],
    /// Mm from row to row and from column to column.
    pub spacing: [f64; 2],
    /// The thickness of a slice in mm, and the distance between slices.
    pub thickness: f64,
    pub apart: f64,
    /// Whether voxels were ever packed in a way that changed them.
    pub lossy: bool,
    copied: Vec<(Tag, Vec<u8>)>,
    /// How patients were made anonymous.
    pub deidentified: Vec<Code>,
    instances: Vec<Instance>,
    slices: Vec<Slice>,
    _charge: Charge,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        // No names of patients.
        f.debug_struct("Source").field("size", &self.size).finish_non_exhaustive()
    }
}

impl Source {
    /// The source of a scan of `size` columns, rows and slices, none of which is known yet. `first`
    /// is one of its slices, for what all have in common.
    pub fn new(series: &str, size: [usize; 3], first: &Plane) -> Source {
        Source {
            size,
            series: series.into(),
            number: 0,
            orientation: first.orientation,
            spacing: first.spacing,
            thickness: 0.0,
            apart: first.thickness.filter(|t| *t > 0.0).unwrap_or(1.0),
            lossy: false,
            copied: vec![],
            deidentified: vec![],
            instances: vec![],
            slices: memory::list(SOURCE, size[2]),
            _charge: Charge::default(),
        }
    }

    /// Adds slices of a file, in their order in the scan.
    pub fn add<'p>(&mut self, tags: &DataSet, many: bool, planes: impl Iterator<Item = &'p Plane>) {
        if self.instances.is_empty() {
            self.begin(tags);
        }
        let text = |tag| tags.text(tag).unwrap_or_default();
        let uid = text(tags::SOP_INSTANCE);
        self.lossy |= tags.text(tags::LOSSY).as_deref() == Some("01");
        if self.instances.last().is_none_or(|i| i.uid != uid || uid.is_empty()) {
            self.instances.push(Instance { class: text(tags::SOP_CLASS), uid, many });
        }
        let instance = self.instances.len() - 1;
        self.slices.extend(planes.map(|p| Slice {
            instance,
            frame: p.frame,
            position: p.position,
        }));
    }

    /// What the first file says.
    fn begin(&mut self, tags: &DataSet) {
        let number = |tag| tags.number(tag).ok().flatten();
        // Anything but a number from 0 on that fits counts as missing.
        let whole = number(tags::SERIES_NUMBER).filter(|n| (0.0..1e9).contains(n));
        self.number = whole.map_or(0, |n| n as i64);
        self.thickness = number(tags::SLICE_THICKNESS).filter(|t| *t > 0.0).unwrap_or(0.0);
        let short = |tag| tags.raw(tag).filter(|v| v.len() <= LONGEST).map(|v| (tag, v.to_vec()));
        self.copied = COPIED.into_iter().filter_map(short).collect();
        let codes = tags.items(tags::DEIDENTIFICATION_CODES).unwrap_or_default();
        let code = |set: &DataSet| -> Option<Code> {
            let [value, scheme, meaning] =
                [tags::CODE_VALUE, tags::CODING_SCHEME, tags::CODE_MEANING].map(|t| set.text(t));
            Some([value?, scheme?, meaning?]).filter(|c| c.iter().all(|t| t.is_ascii()))
        };
        self.deidentified = codes.iter().take(32).filter_map(code).collect();
    }

    /// Counts the memory that it takes, when all slices are known.
    pub fn complete(mut self) -> Source {
        let [x, y] = self.orientation;
        let normal = cross(x, y);
        if let [first, .., last] = &self.slices[..] {
            let way = dot(last.position, normal) - dot(first.position, normal);
            self.apart = way / (self.slices.len() - 1) as f64;
        }
        if self.thickness == 0.0 {
            self.thickness = self.apart;
        }
        let names: usize = self.instances.iter().map(|i| i.class.len() + i.uid.len()).sum();
        let bytes = names
            + self.instances.len() * size_of::<Instance>()
            + self.slices.len() * size_of::<Slice>();
        self._charge = Charge::of::<u8>(SOURCE, bytes).unwrap_or_else(|e| memory::refuse(e));
        self
    }

    /// Columns, rows and slices.
    pub fn size(&self) -> [usize; 3] {
        self.size
    }

    /// The bytes of a value of the first file, without its padding.
    pub fn copied(&self, tag: Tag) -> Option<&[u8]> {
        let (_, value) = self.copied.iter().find(|(t, _)| *t == tag)?;
        let end = value.iter().rev().take_while(|b| matches!(b, 0 | b' ')).count();
        value.get(..value.len() - end).filter(|v| !v.is_empty())
    }

    /// The text of a value of the first file, if it is plain.
    pub fn text(&self, tag: Tag) -> Option<&str> {
        self.copied(tag).filter(|v| v.is_ascii()).and_then(|v| std::str::from_utf8(v).ok())
    }

    /// The first voxel's centre of each slice, in mm of LPS.
    pub fn positions(&self) -> impl ExactSizeIterator<Item = [f64; 3]> + '_ {
        self.slices.iter().map(|s| s.position)
    }

    /// A slice's file, and its frame, from 1, if the file has several.
    pub fn slice(&self, k: usize) -> Option<(&Instance, Option<usize>)> {
        let slice = self.slices.get(k)?;
        let instance = self.instances.get(slice.instance)?;
        Some((instance, instance.many.then_some(slice.frame + 1)))
    }

    /// Each file once.
    pub fn instances(&self) -> Vec<&Instance> {
        let mut seen = HashSet::new();
        self.instances.iter().filter(|i| seen.insert(i.uid.as_str())).collect()
    }

    /// An error if the files do not state what a segmentation must name.
    pub fn check(&self) -> Result<(), String> {
        let missing =
            |tag: Tag| format!("its {tag} is missing, by which a DICOM segmentation must name it");
        if self.copied(tags::STUDY_INSTANCE).is_none() {
            return Err(missing(tags::STUDY_INSTANCE));
        }
        for (tag, is_empty) in [
            (tags::SOP_CLASS, self.instances.iter().any(|i| i.class.is_empty())),
            (tags::SOP_INSTANCE, self.instances.iter().any(|i| i.uid.is_empty())),
        ] {
            if is_empty {
                return Err(missing(tag));
            }
        }
        Ok(())
    }
}
