//! DICOM segmentations (SEG): each frame is a part of a plane on which one segment is marked. It is
//! placed by its position; slices of the scan without a frame are not marked.

use super::geometry::{Plane, alike, cross, dot};
use super::layers::{Marked, Place};
use super::pixels::{Bits, Frames, Layout};
use super::series::planes;
use super::tags::{self, DataSet, Opened};
use crate::memory;
use crate::volume::array::LONGEST;
use crate::volume::{Affine, Element, Grid};

/// How messages name the memory that frames take.
const FRAMES: &str = "the frames of a segmentation";
/// The distance in voxels that a frame may have from the voxels that it is placed on, because
/// headers are rounded.
const TOLERANCE: f64 = 0.1;

/// A whole number that must be present.
fn need(tags: &DataSet, tag: tags::Tag) -> Result<usize, String> {
    tags.whole(tag)?.ok_or_else(|| format!("its {tag} is missing"))
}

/// The number of the segment that each frame shows.
fn numbers(tags: &DataSet, frames: usize) -> Result<Vec<usize>, String> {
    // Read once: there may be many frames.
    let shared = match tags.item(tags::SHARED_GROUPS)? {
        Some(groups) => groups.item(tags::SEGMENT_IDENTIFICATION)?,
        None => None,
    };
    let own = tags.items(tags::FRAME_GROUPS)?;
    let mut numbers = memory::list(FRAMES, frames);
    for frame in 0..frames {
        let group = own.get(frame).map_or(Ok(None), |g| g.item(tags::SEGMENT_IDENTIFICATION))?;
        let group = group.as_ref().or(shared.as_ref());
        let number = group.map_or(Ok(None), |g| g.whole(tags::REFERENCED_SEGMENT))?;
        numbers.push(
            number.ok_or_else(|| format!("frame {frame} has no {}", tags::REFERENCED_SEGMENT))?,
        );
    }
    Ok(numbers)
}

/// The bits of all frames: for fractions those above a half, which is noted.
fn bits<'a>(
    opened: &Opened<'a>,
    syntax: &str,
    [columns, rows, frames]: [usize; 3],
    warnings: &mut Vec<String>,
) -> Result<Bits<'a>, String> {
    let tags = &opened.tags;
    let one = columns * rows;
    let kind = tags.text(tags::SEGMENTATION_TYPE).unwrap_or_default();
    match kind.as_str() {
        "BINARY" => {
            let allocated = need(tags, tags::BITS_ALLOCATED)?;
            if allocated != 1 {
                return Err(format!(
                    "its {} is {allocated}, expected 1 of a binary segmentation",
                    tags::BITS_ALLOCATED
                ));
            }
            Bits::of(opened, syntax, one, frames)
        }
        "FRACTIONAL" => {
            let layout = Layout::of(tags, syntax)?;
            if layout.element() != Element::Uint8 {
                return Err(format!(
                    "its {} is not 8, as of a fractional segmentation",
                    tags::BITS_ALLOCATED
                ));
            }
            let most = tags.whole(tags::LARGEST_FRACTION)?.unwrap_or(255);
            let read = Frames::new(opened, &layout)?;
            let mut bits = Bits::none(one, frames);
            for frame in 0..frames {
                bits.set(frame, &read.frame(frame)?, |v| 2 * usize::from(v) > most);
            }
            warnings.push("it is fractional: values above a half were used".into());
            Ok(bits)
        }
        other => Err(format!(
            "its {} is '{other}', expected BINARY or FRACTIONAL",
            tags::SEGMENTATION_TYPE
        )),
    }
}

/// The mapping of a frame's voxels to the scan's.
struct Fall {
    /// The voxel of the scan that the first one is mapped to.
    first: [i64; 3],
    /// The scan's axes along which rows and columns of the frame run, and their directions.
    across: (usize, i64),
    down: (usize, i64),
}

impl Fall {
    /// Only if all corners fall on voxels of one slice, in the scan or beyond its faces.
    fn of(plane: &Plane, [columns, rows]: [usize; 2], place: &Place) -> Result<Fall, String> {
        let [x, y] = plane.orientation;
        let steps = [x.map(|v| v * plane.spacing[1]), y.map(|v| v * plane.spacing[0])];
        let [u, v] = steps.map(|s| place.step(s));
        let start = place.voxel(plane.position);
        let longest = |s: [f64; 3]| {
            (1..3).fold(0, |best, r| if s[r].abs() > s[best].abs() { r } else { best })
        };
        let sign = |v: f64| if v < 0.0 { -1 } else { 1 };
        let (a, b) = (longest(u), longest(v));
        let not = |off: f64| {
            format!(
                "it lies {off:.2} voxels from the scan's voxels, expected at most {TOLERANCE}: resample it onto the scan"
            )
        };
        if a == b {
            return Err("its rows and columns run along the same axis of the scan".into());
        }
        let through = 3 - a - b;
        let (slice, _) = place.nearest(through, start[through]);
        let mut first = start.map(|v| v.round() as i64);
        first[through] = slice;
        let fall = Fall { first, across: (a, sign(u[a])), down: (b, sign(v[b])) };
        for (column, row) in [(0, 0), (columns - 1, 0), (0, rows - 1), (columns - 1, rows - 1)] {
            let exact = [0, 1, 2].map(|r| start[r] + u[r] * column as f64 + v[r] * row as f64);
            let whole = fall.voxel(column, row);
            let (nearest, away) = place.nearest(through, exact[through]);
            let [x, y] = [a, b].map(|r| (exact[r] - whole[r] as f64).abs());
            // NaN is not within it either.
            if ![x, y, away].iter().all(|off| *off <= TOLERANCE) {
                return Err(not(x.max(y).max(away)));
            }
            if nearest != slice {
                return Err("it crosses several slices of the scan".into());
            }
        }
        Ok(fall)
    }

    /// The voxel of the scan that a voxel of the frame is mapped to.
    fn voxel(&self, column: usize, row: usize) -> [i64; 3] {
        let mut at = self.first;
        for ((axis, sign), n) in [(self.across, column), (self.down, row)] {
            at[axis] = at[axis].saturating_add(sign * n as i64);
        }
        at
    }
}

/// The index of a voxel of the scan; none if it is outside.
fn within(at: [i64; 3], size: [usize; 3]) -> Option<usize> {
    let inside = (0..3).all(|a| (0..size[a] as i64).contains(&at[a]));
    inside.then(|| (at[0] as usize * size[1] + at[1] as usize) * size[2] + at[2] as usize)
}

/// Columns, rows and frames.
fn size_of(tags: &DataSet) -> Result<[usize; 3], String> {
    let size = [
        need(tags, tags::COLUMNS)?,
        need(tags, tags::ROWS)?,
        tags.whole(tags::FRAMES)?.unwrap_or(1),
    ];
    match size.iter().all(|n| (1..=LONGEST).contains(n)) {
        true => Ok(size),
        false => {
            Err(format!("it has {size:?} columns, rows and frames, expected 1 to {LONGEST} each"))
        }
    }
}

/// What a segmentation marks on a scan.
pub(super) fn read(opened: &Opened, syntax: &str, place: &Place) -> Result<Marked, String> {
    let tags = &opened.tags;
    let size = size_of(tags)?;
    let [columns, rows, frames] = size;
    let scan = place.grid.size;
    let mut marked = Marked::new(scan);
    let bits = bits(opened, syntax, size, &mut marked.warnings)?;
    let numbers = numbers(tags, frames)?;
    let mut falls = memory::list(FRAMES, frames);
    for (frame, plane) in planes(tags, frames)?.iter().enumerate() {
        let fall = Fall::of(plane, [columns, rows], place);
        falls.push(fall.map_err(|e| format!("frame {frame} does not fit the scan: {e}"))?);
    }
    let mut known = vec![];
    for item in tags.items(tags::SEGMENTS)? {
        let number = need(&item, tags::SEGMENT_NUMBER)?;
        let value = u32::try_from(number).ok().filter(|v| *v > 0 && !known.contains(&number));
        let value = value.ok_or_else(|| {
            format!("its {} {number} is duplicated or below 1", tags::SEGMENT_NUMBER)
        })?;
        known.push(number);
        let name = item.text(tags::SEGMENT_LABEL).unwrap_or_else(|| format!("segment {number}"));
        let own: Vec<usize> = (0..frames).filter(|f| numbers[*f] == number).collect();
        // Every voxel of it, by its index in the scan; none if it is outside.
        let each = |f: &mut dyn FnMut(Option<usize>)| {
            for frame in &own {
                let fall = &falls[*frame];
                bits.each(*frame, |at| f(within(fall.voxel(at % columns, at / columns), scan)));
            }
        };
        let mut lost = 0usize;
        each(&mut |at| lost += usize::from(at.is_none()));
        if lost > 0 {
            marked.miss(
                name,
                value,
                format!("{lost} of its marked voxels lie outside the image of {scan:?} voxels"),
            );
            continue;
        }
        marked.add(name, value, |f| {
            each(&mut |at| at.into_iter().for_each(&mut *f));
        });
    }
    match numbers.iter().position(|n| !known.contains(n)) {
        None => Ok(marked),
        Some(frame) => Err(format!(
            "frame {frame} refers to segment {}, which its {} does not have",
            numbers[frame],
            tags::SEGMENTS
        )),
    }
}

/// The block of voxels that a segmentation's frames span.
pub(super) fn grid(tags: &DataSet) -> Result<Grid, String> {
    let [columns, rows, frames] = size_of(tags)?;
    let planes = planes(tags, frames)?;
    let first = planes.first().ok_or("it has no frame")?;
    if !planes.iter().all(|p| alike(first, p)) {
        return Err("its frames are not parallel, or differ in spacing".into());
    }
    let [x, y] = first.orientation;
    let normal = cross(x, y);
    let along = |p: &Plane| dot(p.position, normal);
    let mut sorted: Vec<&Plane> = planes.iter().collect();
    sorted.sort_by(|a, b| along(a).total_cmp(&along(b)));
    let same = 0.01 * first.spacing[0].min(first.spacing[1]);
    sorted.dedup_by(|b, a| along(b) - along(a) < same);
    let (low, high) = (sorted[0], sorted[sorted.len() - 1]);
    let closest = sorted.windows(2).map(|w| along(w[1]) - along(w[0])).reduce(f64::min);
    let said = first.thickness.filter(|t| *t > 0.0);
    // If slices in between are empty, the closest frames may be several slices apart.
    let apart = match (closest, said) {
        (None, said) => said.unwrap_or(1.0),
        (Some(closest), Some(said)) => {
            let times = closest / said;
            let fits = times.round() >= 1.0 && (times - times.round()).abs() < 0.05;
            if fits { closest / times.round() } else { closest }
        }
        (Some(closest), None) => closest,
    };
    let extent = along(high) - along(low);
    let count = (extent / apart).round();
    if !(0.0..f64::from(1 << 16)).contains(&count) {
        return Err(format!("its frames span {extent} mm at {apart} mm from slice to slice"));
    }
    let slices = count as usize + 1;
    let step = match slices {
        1 => normal.map(|v| v * apart),
        _ => [0, 1, 2].map(|r| (high.position[r] - low.position[r]) / count),
    };
    let origin = low.position;
    let steps = [x.map(|v| v * first.spacing[1]), y.map(|v| v * first.spacing[0]), step, origin];
    let sign = |r: usize| if r < 2 { -1.0 } else { 1.0 };
    let affine = Affine([0, 1, 2].map(|r| steps.map(|c| sign(r) * c[r] + 0.0)));
    match affine.is_regular() {
        true => Ok(Grid { size: [columns, rows, slices], affine }),
        false => Err("its frames do not span three dimensions".into()),
    }
}
