//! Masks and maps of probabilities as DICOM segmentations (PS3.3, A.51 and C.8.20).
//!
//! Each frame is a slice of the scan: it has the position in the slice's own file, and refers to
//! that very file. Slices that hold nothing are left out; if all are empty, all are written,
//! because a segmentation has at least one frame and these are the slices that were examined.

use super::encode::Encoder;
use super::source::{Code, Instance, Source};
use super::tags::{self, Tag};
use crate::memory;
use crate::volume::to_file_order;
use rand::TryRng;
use rand::rngs::SysRng;
use std::borrow::Cow;
use std::time::SystemTime;

/// Segmentation Storage.
const CLASS: &str = "1.2.840.10008.5.1.4.1.1.66.4";
/// Explicit, the lowest byte first.
const SYNTAX: &str = "1.2.840.10008.1.2.1";
/// The writer's identifier: made once, from a random number.
const IMPLEMENTATION: &str = "2.25.72946079841590949706496794850626279495";
/// The most frames of a file.
const MOST_FRAMES: usize = 1 << 16;
/// The highest level of a probability.
const LEVELS: u16 = 255;
/// How messages name the memory that frames take.
const FRAMES: &str = "the frames of a segmentation";

/// The kind of a segmentation's voxels.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// On the object or not, one bit each.
    Binary,
    /// Probabilities, one byte each: 255 is certain.
    Fractional,
}

/// An object to write.
pub struct Segment<'a> {
    pub label: &'a str,
    /// Red, green and blue, from 0 to 1.
    pub colour: [f64; 3],
    /// The object's voxels.
    pub marks: SegmentVoxels<'a>,
}

/// The voxels `[i][j][k]` of a segment.
#[derive(Clone, Copy)]
pub enum SegmentVoxels<'a> {
    /// Voxels that are not 0 are on it; for fractions, their levels.
    Levels(&'a [u8]),
    /// The voxels of a label image that have its value.
    Bytes(&'a [u8], u8),
    /// The voxels of a label image of 16 bits that have its value.
    Words(&'a [u16], u16),
}

impl<'a> SegmentVoxels<'a> {
    fn len(self) -> usize {
        match self {
            SegmentVoxels::Levels(values) | SegmentVoxels::Bytes(values, _) => values.len(),
            SegmentVoxels::Words(values, _) => values.len(),
        }
    }

    /// One level per voxel.
    fn levels(self) -> Cow<'a, [u8]> {
        let of = |is_on: bool| u8::from(is_on);
        match self {
            SegmentVoxels::Levels(values) => Cow::Borrowed(values),
            SegmentVoxels::Bytes(values, own) => {
                Cow::Owned(memory::collected(FRAMES, values.iter().map(|v| of(*v == own))))
            }
            SegmentVoxels::Words(values, own) => {
                Cow::Owned(memory::collected(FRAMES, values.iter().map(|v| of(*v == own))))
            }
        }
    }
}

/// The level of a probability. A half does not count as the object yet, nor does its level.
pub fn level(probability: f32) -> u8 {
    (f64::from(probability) * f64::from(LEVELS) - 0.5).ceil().clamp(0.0, f64::from(LEVELS)) as u8
}

/// A segmentation of a scan: the part of its file before the voxels, and the voxels.
pub fn encoded(
    source: &Source,
    kind: Kind,
    segments: &[Segment],
) -> Result<(Vec<u8>, Vec<u8>), String> {
    source.check()?;
    let size = source.size();
    let voxels: usize = size.iter().product();
    if segments.is_empty() || segments.iter().any(|s| s.marks.len() != voxels) {
        return Err(format!("its segments do not have {size:?} voxels each"));
    }
    if segments.len() > usize::from(u16::MAX) {
        return Err(format!("{} segments, expected at most {}", segments.len(), u16::MAX));
    }
    let frames = frames_of(size[2], segments);
    if frames.len() > MOST_FRAMES {
        return Err(format!("would have {} frames, expected at most {MOST_FRAMES}", frames.len()));
    }
    let body = voxels_of(size, kind, segments, &frames)?;
    Ok((head(source, kind, segments, &frames, body.len())?, body))
}

/// A frame: a segment, from 0, and a slice.
type Frame = (usize, usize);

/// The frames that hold something; if none does, all.
fn frames_of(slices: usize, segments: &[Segment]) -> Vec<Frame> {
    let mut frames = vec![];
    for (n, segment) in segments.iter().enumerate() {
        let mut is_marked = vec![false; slices];
        for row in segment.marks.levels().chunks_exact(slices.max(1)) {
            row.iter().zip(&mut is_marked).for_each(|(v, marked)| *marked |= *v != 0);
        }
        frames.extend((0..slices).filter(|k| is_marked[*k]).map(|k| (n, k)));
    }
    if frames.is_empty() {
        frames.extend((0..segments.len()).flat_map(|n| (0..slices).map(move |k| (n, k))));
    }
    frames
}

/// The voxels of frames, row by row; bits follow each other without a gap.
fn voxels_of(
    size: [usize; 3],
    kind: Kind,
    segments: &[Segment],
    frames: &[Frame],
) -> Result<Vec<u8>, String> {
    let one = size[0] * size[1];
    let count = one.checked_mul(frames.len());
    let length = count.map(|n| if kind == Kind::Binary { n.div_ceil(8) } else { n });
    // An even number of bytes that fits in 32 bits.
    let length = length
        .map(|n| n.next_multiple_of(2))
        .filter(|n| u32::try_from(*n).is_ok_and(|n| n < u32::MAX))
        .ok_or_else(|| format!("{} frames of {one} voxels do not fit a file", frames.len()))?;
    let mut body = memory::zeroed::<u8>(FRAMES, length);
    let mut at = 0;
    for of_segment in frames.chunk_by(|a, b| a.0 == b.0) {
        let Some(segment) = of_segment.first().and_then(|f| segments.get(f.0)) else { continue };
        let slices = to_file_order(&segment.marks.levels(), size);
        for (_, k) in of_segment {
            let slice = &slices[k * one..][..one];
            match kind {
                Kind::Fractional => body[at..at + one].copy_from_slice(slice),
                Kind::Binary => {
                    for (n, _) in slice.iter().enumerate().filter(|(_, v)| **v != 0) {
                        body[(at + n) / 8] |= 1 << ((at + n) % 8);
                    }
                }
            }
            at += one;
        }
    }
    Ok(body)
}

/// A new unique identifier: a random UUID (PS3.5, B.2).
fn uid() -> Result<String, String> {
    let mut bytes = [0; 16];
    SysRng
        .try_fill_bytes(&mut bytes)
        .map_err(|e| format!("no random numbers are available: {e}"))?;
    // Six of its bits say that it is a random one.
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    Ok(format!("2.25.{}", u128::from_be_bytes(bytes)))
}

/// Date and time, for an offset from UTC in minutes.
fn now(offset: i64) -> [String; 2] {
    let passed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    date_and_time(i64::try_from(passed.as_secs()).unwrap_or(0) + 60 * offset)
}

/// The date and time for seconds since 1970.
fn date_and_time(seconds: i64) -> [String; 2] {
    let (mut day, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let is_leap = |y: i64| y % 4 == 0 && (y % 100 != 0 || y % 400 == 0);
    let mut year = 1970;
    while day >= 365 + i64::from(is_leap(year)) {
        day -= 365 + i64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + i64::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if day < length {
            break;
        }
        (day, month) = (day - length, month + 1);
    }
    let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
    [format!("{year:04}{month:02}{:02}", day + 1), format!("{h:02}{m:02}{s:02}")]
}

/// The minutes of an offset from UTC such as `+0130`; 0 if there is none.
fn minutes(offset: Option<&str>) -> i64 {
    let parsed = offset.and_then(|text| {
        let (sign, digits) = text.split_at_checked(1)?;
        let (hours, minutes) = digits.split_at_checked(2)?;
        let value = 60 * hours.parse::<u8>().ok()? as i64 + minutes.parse::<u8>().ok()? as i64;
        Some(if sign == "-" { -value } else { value })
    });
    parsed.unwrap_or(0)
}

/// A colour in DICOM's form: CIE L*a*b* under D50, in 16 bits each (PS3.3, C.10.7.1.1).
fn lab([r, g, b]: [f64; 3]) -> [u16; 3] {
    let linear = |v: f64| match v.clamp(0.0, 1.0) {
        v if v <= 0.04045 => v / 12.92,
        v => ((v + 0.055) / 1.055).powf(2.4),
    };
    let rgb = [linear(r), linear(g), linear(b)];
    // From sRGB, adapted to D50, divided by its white.
    let xyz = [
        [0.4360747, 0.3850649, 0.1430804],
        [0.2225045, 0.7168786, 0.0606169],
        [0.0139322, 0.0971045, 0.7141733],
    ]
    .map(|row: [f64; 3]| row[0] * rgb[0] + row[1] * rgb[1] + row[2] * rgb[2]);
    let white = [0.96422, 1.0, 0.82521];
    let f = |v: f64| match v {
        v if v > 216.0 / 24_389.0 => v.cbrt(),
        v => (24_389.0 / 27.0 * v + 16.0) / 116.0,
    };
    let [x, y, z] = [0, 1, 2].map(|n| f(xyz[n] / white[n]));
    let whole = |v: f64| v.round().clamp(0.0, 65_535.0) as u16;
    [
        whole((116.0 * y - 16.0) / 100.0 * 65_535.0),
        whole((500.0 * (x - y) + 128.0) * 257.0),
        whole((200.0 * (y - z) + 128.0) * 257.0),
    ]
}

/// A label in the characters that the file may have: others than ASCII only if it says UTF-8.
fn label(text: &str, is_utf8: bool) -> String {
    let fits = |c: char| c != '\\' && !c.is_control() && (is_utf8 || c.is_ascii());
    let mut label = String::new();
    for c in text.trim().chars().take(64) {
        label.push(if fits(c) { c } else { '_' });
    }
    if label.is_empty() { "object".into() } else { label }
}

/// Writes a code.
fn code(e: &mut Encoder, tag: Tag, [value, scheme, meaning]: [&str; 3]) {
    e.one(tag, |e| {
        e.text(tags::CODE_VALUE, value);
        e.text(tags::CODING_SCHEME, scheme);
        e.text(tags::CODE_MEANING, meaning);
    });
}

/// Writes a reference to an instance, without closing the item that contains it.
fn reference(e: &mut Encoder, instance: &Instance) {
    e.text(tags::REFERENCED_CLASS, &instance.class);
    e.text(tags::REFERENCED_INSTANCE, &instance.uid);
}

/// The file up to its voxels, which take `length` bytes.
fn head(
    source: &Source,
    kind: Kind,
    segments: &[Segment],
    frames: &[Frame],
    length: usize,
) -> Result<Vec<u8>, String> {
    let instance = uid()?;
    let mut meta = Encoder::new(1 << 10);
    meta.put(tags::META_VERSION, &[0, 1]);
    meta.text(tags::META_CLASS, CLASS);
    meta.text(tags::META_INSTANCE, &instance);
    meta.text(tags::TRANSFER_SYNTAX, SYNTAX);
    meta.text(tags::IMPLEMENTATION_CLASS, IMPLEMENTATION);
    let version = format!("PRISM {}", env!("CARGO_PKG_VERSION"));
    meta.text(tags::IMPLEMENTATION_VERSION, version.get(..16).unwrap_or(&version));
    let instances = source.instances();
    // The room for a frame, an instance and everything else, and some more.
    let room = (1 << 14) + 768 * frames.len() + 192 * instances.len();
    let mut e = Encoder::new(room);
    e.bytes.extend([0; 128]);
    e.bytes.extend(b"DICM");
    e.longs(tags::META_LENGTH, &[meta.bytes.len() as u32]);
    e.bytes.extend(&meta.bytes);
    about(&mut e, source, kind, &instance, &instances)?;
    pixels(&mut e, source, kind, frames.len());
    described(&mut e, source, kind, segments);
    groups(&mut e, source, frames);
    e.announced(tags::PIXEL_DATA_BYTES, length);
    Ok(e.bytes)
}

/// The patient and study of the scan, what the segmentation was made from and by what, and how its
/// frames are ordered.
fn about(
    e: &mut Encoder,
    source: &Source,
    kind: Kind,
    instance: &str,
    instances: &[&Instance],
) -> Result<(), String> {
    let (series, organization) = (uid()?, uid()?);
    let [date, time] = now(minutes(source.text(tags::TIMEZONE)));
    // What the standard requires is present, empty if necessary.
    let always = |e: &mut Encoder, tag: Tag| e.put(tag, source.copied(tag).unwrap_or_default());
    let said = |e: &mut Encoder, tag: Tag| {
        source.copied(tag).into_iter().for_each(|value| e.put(tag, value))
    };
    said(e, tags::CHARACTER_SET);
    e.text(tags::IMAGE_TYPE, "DERIVED\\PRIMARY");
    e.text(tags::CREATION_DATE, &date);
    e.text(tags::CREATION_TIME, &time);
    e.text(tags::SOP_CLASS, CLASS);
    e.text(tags::SOP_INSTANCE, instance);
    always(e, tags::STUDY_DATE);
    e.text(tags::SERIES_DATE, &date);
    e.text(tags::CONTENT_DATE, &date);
    always(e, tags::STUDY_TIME);
    e.text(tags::SERIES_TIME, &time);
    e.text(tags::CONTENT_TIME, &time);
    always(e, tags::ACCESSION_NUMBER);
    e.text(tags::MODALITY, "SEG");
    e.text(tags::MANUFACTURER, "prism");
    always(e, tags::REFERRING_PHYSICIAN);
    said(e, tags::TIMEZONE);
    said(e, tags::STUDY_DESCRIPTION);
    let description = match kind {
        Kind::Binary => "Segmentation by prism",
        Kind::Fractional => "Probability by prism",
    };
    e.text(tags::SERIES_DESCRIPTION, description);
    e.text(tags::MODEL_NAME, "prism");
    e.one(tags::REFERENCED_SERIES, |e| {
        e.sequence(tags::REFERENCED_INSTANCES, |e| {
            instances.iter().for_each(|i| e.item(|e| reference(e, i)));
        });
        e.text(tags::SERIES_INSTANCE, &source.series);
    });
    always(e, tags::PATIENT_NAME);
    always(e, tags::PATIENT_ID);
    said(e, tags::PATIENT_ISSUER);
    always(e, tags::PATIENT_BIRTH);
    always(e, tags::PATIENT_SEX);
    said(e, tags::PATIENT_AGE);
    said(e, tags::PATIENT_SIZE);
    said(e, tags::PATIENT_WEIGHT);
    // An anonymised scan must say how it was anonymised.
    let how = &source.deidentified;
    if source.copied(tags::DEIDENTIFICATION).is_some() || !how.is_empty() {
        said(e, tags::IDENTITY_REMOVED);
        said(e, tags::DEIDENTIFICATION);
        if !how.is_empty() {
            e.sequence(tags::DEIDENTIFICATION_CODES, |e| how.iter().for_each(|c| item(e, c)));
        }
    }
    e.text(tags::DEVICE_SERIAL, "0");
    e.text(tags::SOFTWARE_VERSIONS, env!("CARGO_PKG_VERSION"));
    if source.copied(tags::MANUFACTURER).is_some() {
        e.one(tags::CONTRIBUTING_EQUIPMENT, |e| {
            said(e, tags::MANUFACTURER);
            said(e, tags::MODEL_NAME);
            code(e, tags::PURPOSE, ["109101", "DCM", "Acquisition Equipment"]);
        });
    }
    always(e, tags::STUDY_INSTANCE);
    e.text(tags::SERIES_INSTANCE, &series);
    always(e, tags::STUDY_ID);
    e.text(tags::SERIES_NUMBER, &(source.number + 1000).to_string());
    e.text(tags::INSTANCE_NUMBER, "1");
    // Without one the frames still share one space, of which nothing else is known.
    match source.copied(tags::FRAME_OF_REFERENCE) {
        Some(frame) => e.put(tags::FRAME_OF_REFERENCE, frame),
        None => e.text(tags::FRAME_OF_REFERENCE, &uid()?),
    }
    always(e, tags::POSITION_REFERENCE);
    e.one(tags::ORGANIZATION, |e| e.text(tags::ORGANIZATION_UID, &organization));
    e.sequence(tags::DIMENSIONS, |e| {
        for (pointer, group, name) in [
            (tags::REFERENCED_SEGMENT, tags::SEGMENT_IDENTIFICATION, "Segment"),
            (tags::POSITION, tags::PLANE_POSITION, "Position"),
        ] {
            e.item(|e| {
                e.text(tags::ORGANIZATION_UID, &organization);
                e.pointer(tags::INDEX_POINTER, pointer);
                e.pointer(tags::GROUP_POINTER, group);
                e.text(tags::DIMENSION_LABEL, name);
            });
        }
    });
    Ok(())
}

/// The character set in which a label can have any character.
const UTF_8: &str = "ISO_IR 192";

/// Writes a code as an item.
fn item(e: &mut Encoder, [value, scheme, meaning]: &Code) {
    e.item(|e| {
        e.text(tags::CODE_VALUE, value);
        e.text(tags::CODING_SCHEME, scheme);
        e.text(tags::CODE_MEANING, meaning);
    });
}

/// The format of the voxels.
fn pixels(e: &mut Encoder, source: &Source, kind: Kind, frames: usize) {
    let [columns, rows, _] = source.size().map(|s| s as u16);
    let bits = if kind == Kind::Binary { 1 } else { 8 };
    e.shorts(tags::SAMPLES, &[1]);
    e.text(tags::PHOTOMETRIC, "MONOCHROME2");
    e.text(tags::FRAMES, &frames.to_string());
    e.shorts(tags::ROWS, &[rows]);
    e.shorts(tags::COLUMNS, &[columns]);
    e.shorts(tags::BITS_ALLOCATED, &[bits]);
    e.shorts(tags::BITS_STORED, &[bits]);
    e.shorts(tags::HIGH_BIT, &[bits - 1]);
    e.shorts(tags::PIXEL_REPRESENTATION, &[0]);
    if let Some(changed) = source.copied(tags::LONGITUDINAL) {
        e.put(tags::LONGITUDINAL, changed);
    }
    // A loss that happened once also applies to what is derived.
    e.text(tags::LOSSY, if source.lossy { "01" } else { "00" });
    if source.lossy {
        for tag in [tags::LOSSY_RATIO, tags::LOSSY_METHOD] {
            source.copied(tag).into_iter().for_each(|value| e.put(tag, value));
        }
    }
}

/// The segments.
fn described(e: &mut Encoder, source: &Source, kind: Kind, segments: &[Segment]) {
    let is_utf8 = source.text(tags::CHARACTER_SET) == Some(UTF_8);
    e.text(
        tags::SEGMENTATION_TYPE,
        match kind {
            Kind::Binary => "BINARY",
            Kind::Fractional => "FRACTIONAL",
        },
    );
    e.sequence(tags::SEGMENTS, |e| {
        for (n, segment) in segments.iter().enumerate() {
            e.item(|e| {
                let abnormal = ["49755003", "SCT", "Morphologically Abnormal Structure"];
                code(e, tags::SEGMENT_CATEGORY, abnormal);
                e.shorts(tags::SEGMENT_NUMBER, &[n as u16 + 1]);
                e.text(tags::SEGMENT_LABEL, &label(segment.label, is_utf8));
                e.text(tags::ALGORITHM_TYPE, "SEMIAUTOMATIC");
                e.text(tags::ALGORITHM_NAME, "prism");
                e.shorts(tags::SEGMENT_COLOUR, &lab(segment.colour));
                code(e, tags::SEGMENT_KIND, ["52988006", "SCT", "Lesion"]);
            });
        }
    });
    if kind == Kind::Fractional {
        e.shorts(tags::LARGEST_FRACTION, &[LEVELS]);
        e.text(tags::FRACTIONAL_TYPE, "PROBABILITY");
    }
    let overlap = if segments.len() == 1 { "NO" } else { "UNDEFINED" };
    e.text(tags::SEGMENTS_OVERLAP, overlap);
    e.text(tags::CONTENT_LABEL, "SEGMENTATION");
    e.text(tags::CONTENT_DESCRIPTION, "Segmentation by prism");
    e.text(tags::CONTENT_CREATOR, "");
}

/// The positions of the frames, what they show, and the slices that they were made from.
fn groups(e: &mut Encoder, source: &Source, frames: &[Frame]) {
    let [x, y] = source.orientation;
    e.one(tags::SHARED_GROUPS, |e| {
        e.one(tags::PLANE_ORIENTATION, |e| {
            e.decimals(tags::ORIENTATION, &[x, y].concat());
        });
        e.one(tags::PIXEL_MEASURES, |e| {
            e.decimals(tags::SLICE_THICKNESS, &[source.thickness]);
            e.decimals(tags::SPACING_BETWEEN_SLICES, &[source.apart]);
            e.decimals(tags::PIXEL_SPACING, &source.spacing);
        });
    });
    // Positions are counted along the normal, only those that have a frame.
    let mut places: Vec<usize> = frames.iter().map(|f| f.1).collect();
    places.sort_unstable();
    places.dedup();
    let positions: Vec<[f64; 3]> = source.positions().collect();
    e.sequence(tags::FRAME_GROUPS, |e| {
        for (segment, k) in frames {
            let rank = places.partition_point(|p| p < k) as u32 + 1;
            e.item(|e| {
                e.one(tags::DERIVATION_IMAGE, |e| {
                    e.one(tags::SOURCE_IMAGE, |e| slice(e, source, *k));
                    code(e, tags::DERIVATION_CODE, ["113076", "DCM", "Segmentation"]);
                });
                e.one(tags::FRAME_CONTENT, |e| {
                    e.longs(tags::INDEX_VALUES, &[*segment as u32 + 1, rank]);
                });
                e.one(tags::PLANE_POSITION, |e| {
                    e.decimals(tags::POSITION, &positions.get(*k).copied().unwrap_or_default());
                });
                e.one(tags::SEGMENT_IDENTIFICATION, |e| {
                    e.shorts(tags::REFERENCED_SEGMENT, &[*segment as u16 + 1]);
                });
            });
        }
    });
}

/// The slice that a frame was made from.
fn slice(e: &mut Encoder, source: &Source, k: usize) {
    let Some((instance, frame)) = source.slice(k) else { return };
    reference(e, instance);
    if let Some(frame) = frame {
        e.text(tags::REFERENCED_FRAME, &frame.to_string());
    }
    e.text(tags::LOCATIONS_PRESERVED, "YES");
    let meaning = "Source image for image processing operation";
    code(e, tags::PURPOSE, ["121322", "DCM", meaning]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_counted_as_calendars_do() {
        for (seconds, date, time) in [
            (0, "19700101", "000000"),
            (951_782_399, "20000228", "235959"),
            (951_782_400, "20000229", "000000"),
            (1_709_164_800, "20240229", "000000"),
            (1_735_689_599, "20241231", "235959"),
            (1_796_169_600, "20261202", "000000"),
        ] {
            assert_eq!(date_and_time(seconds), [date.to_string(), time.to_string()]);
        }
        assert_eq!((minutes(Some("+0130")), minutes(Some("-0500")), minutes(None)), (90, -300, 0));
    }

    #[test]
    fn colours_are_those_of_the_standard() {
        // L* 100, a* and b* 0 for white, L* 0 for black.
        let near = |found: [u16; 3], expected: [u16; 3]| {
            (0..3).all(|n| found[n].abs_diff(expected[n]) <= 24)
        };
        assert!(near(lab([1.0; 3]), [65_535, 32_896, 32_896]), "{:?}", lab([1.0; 3]));
        assert!(near(lab([0.0; 3]), [0, 32_896, 32_896]), "{:?}", lab([0.0; 3]));
        // Red is (54.29, 80.81, 69.89) under D50.
        let red = [35_580, 53_665, 50_856];
        assert!(near(lab([1.0, 0.0, 0.0]), red), "{:?}", lab([1.0, 0.0, 0.0]));
    }

    #[test]
    fn a_half_is_not_yet_the_object() {
        let above = f32::from_bits(0.5f32.to_bits() + 1);
        assert_eq!([0.0, 0.5, above, 1.0, f32::NAN].map(level), [0, 127, 128, 255, 0]);
    }

    #[test]
    fn empty_slices_are_left_out_unless_all_are() {
        let mut values = vec![0; 2 * 2 * 3];
        fn segment(values: &[u8]) -> Segment<'_> {
            Segment { label: "", colour: [0.0; 3], marks: SegmentVoxels::Levels(values) }
        }
        assert_eq!(frames_of(3, &[segment(&values)]), [(0, 0), (0, 1), (0, 2)]);
        (values[1], values[11]) = (1, 1);
        let frames = frames_of(3, &[segment(&values)]);
        assert_eq!(frames, [(0, 1), (0, 2)]);
        // Voxel [0, 0] of slice 1 is the first bit, [1, 1] of slice 2 the last of eight.
        let body = voxels_of([2, 2, 3], Kind::Binary, &[segment(&values)], &frames).unwrap();
        assert_eq!(body, [0b1000_0001, 0]);
        let body = voxels_of([2, 2, 3], Kind::Fractional, &[segment(&values)], &frames).unwrap();
        assert_eq!(body, [1, 0, 0, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn labels_keep_to_the_characters_of_the_file() {
        assert_eq!(label("Métastase\\1", true), "Métastase_1");
        assert_eq!(
            (label("Métastase", false), label(" ", false)),
            ("M_tastase".into(), "object".into())
        );
        assert!(uid().unwrap().len() <= 64 && uid().unwrap() != uid().unwrap());
    }
}
