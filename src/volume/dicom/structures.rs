//! DICOM structure sets (RTSTRUCT): contours of regions in mm, filled on the slices of a scan.
//!
//! A voxel is inside if its centre is. Contours of one plane are combined by the even-odd rule: one
//! within another is a hole, and a keyhole's two edges, which coincide, cut nothing. A point on a
//! contour counts as on one side of it, the same for all.

use super::layers::{Marked, Place};
use super::tags::{self, DataSet};
use crate::memory;

/// How messages name the memory that contours take.
const CONTOURS: &str = "the contours of a structure";
/// How far a contour may deviate from its plane, in slices.
const BENT: f64 = 0.2;
/// Contours that are nearer than this are in one plane, in slices.
const SAME: f64 = 0.05;

/// A closed contour, in voxels of the scan.
type Contour = Vec<[f64; 3]>;
/// A contour with the position of its plane, in slices.
type Flat<'c> = (f64, &'c Contour);

/// Voxels of a row of a slice, from the first to the one after the last.
struct Run {
    slice: usize,
    row: usize,
    from: usize,
    to: usize,
}

/// A structure on the scan's slices.
struct Filled {
    /// The axes of the scan: along a run, from row to row, from slice to slice.
    axes: [usize; 3],
    runs: Vec<Run>,
    notes: Vec<String>,
}

/// The contours of a region, and the number of other kinds of contours that it has.
fn contours(item: &DataSet, place: &Place) -> Result<(Vec<Contour>, usize), String> {
    let (mut found, mut others) = (vec![], 0);
    for contour in item.items(tags::CONTOURS)? {
        let kind = contour.text(tags::CONTOUR_TYPE).unwrap_or_default();
        if !matches!(kind.as_str(), "CLOSED_PLANAR" | "CLOSED_PLANAR_XOR" | "CLOSEDPLANAR_XOR") {
            others += 1;
            continue;
        }
        let numbers = contour.decimals(tags::CONTOUR_DATA)?;
        // It outlines nothing, and has no position.
        if numbers.is_empty() {
            continue;
        }
        let points = numbers.chunks_exact(3).map(|p| place.voxel([p[0], p[1], p[2]]));
        if numbers.len() % 3 != 0 {
            return Err(format!(
                "its {} has {} numbers, expected three a point",
                tags::CONTOUR_DATA,
                numbers.len()
            ));
        }
        found.push(memory::collected(CONTOURS, points));
    }
    Ok((found, others))
}

/// The extent of points along an axis, and its middle.
fn spread(contour: &[[f64; 3]], axis: usize) -> [f64; 2] {
    let values = || contour.iter().map(|p| p[axis]);
    let (low, high) =
        (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
    [high - low, (low + high) / 2.0]
}

/// Fills contours on the scan's slices.
fn fill(contours: &[Contour], place: &Place) -> Result<Filled, String> {
    let size = place.grid.size;
    let (mut runs, mut notes) = (vec![], vec![]);
    // Slices are those along the axis on which the largest contour is flat.
    let largest = contours.iter().max_by_key(|c| c.len());
    let Some(largest) = largest else { return Ok(Filled { axes: [0, 1, 2], runs, notes }) };
    let flat = |a: &usize, b: &usize| spread(largest, *a)[0].total_cmp(&spread(largest, *b)[0]);
    let through = [2, 1, 0].into_iter().min_by(flat).unwrap_or(2);
    let axes = match through {
        2 => [0, 1, 2],
        1 => [0, 2, 1],
        _ => [1, 2, 0],
    };

    // Planes: their positions, and their contours.
    let mut flats = memory::list(CONTOURS, contours.len());
    for contour in contours {
        let [bent, middle] = spread(contour, through);
        if bent > BENT {
            return Err(format!(
                "its contours are not parallel to the scan's slices: one crosses {bent:.1} of them"
            ));
        }
        flats.push((middle, contour));
    }
    flats.sort_by(|a, b| a.0.total_cmp(&b.0));
    // For each slice the nearest plane: its distance, and its contours.
    let mut chosen: Vec<(usize, f64, &[Flat])> = vec![];
    let (mut left, mut farthest) = (0, 0.0f64);
    for plane in flats.chunk_by(|a, b| b.0 - a.0 < SAME) {
        let at = plane[0].0;
        let (slice, away) = place.nearest(through, at);
        let inside = usize::try_from(slice).ok().filter(|s| *s < size[through]);
        let Some(slice) = inside.filter(|_| away <= 0.5 + 1e-6) else {
            return Err(format!(
                "one of its contours lies at slice {at:.2}, more than half a slice from each of the scan's (0 to {})",
                size[through] - 1
            ));
        };
        match chosen.last_mut() {
            Some(last) if last.0 == slice => {
                left += 1;
                if away < last.1 {
                    *last = (slice, away, plane);
                }
            }
            _ => chosen.push((slice, away, plane)),
        }
    }
    for (slice, away, plane) in &chosen {
        farthest = farthest.max(*away);
        outline(plane, axes, *slice, size, &mut runs)?;
    }
    if farthest > 0.1 {
        notes.push(format!(
            "its contours lie up to {farthest:.2} slices from the scan's slices: each was assigned to the nearest"
        ));
    }
    if left > 0 {
        notes.push(format!(
            "{left} planes of its contours are not the nearest to any slice: they were ignored"
        ));
    }
    if let Some(step) = chosen.windows(2).map(|w| w[1].0 - w[0].0).min().filter(|s| *s > 1) {
        notes.push(format!("its contours lie {step} slices apart: the slices between are empty"));
    }
    let beyond = |c: &&Contour| {
        // The outer edge of the outer voxels; written values are rounded.
        let off = |p: &[f64; 3], a: usize| p[a] < -0.501 || p[a] > size[a] as f64 - 0.499;
        c.iter().any(|p| off(p, axes[0]) || off(p, axes[1]))
    };
    let beyond = contours.iter().filter(beyond).count();
    if beyond > 0 {
        notes.push(format!(
            "{beyond} of its contours reach beyond the scan: the part outside was ignored"
        ));
    }
    Ok(Filled { axes, runs, notes })
}

/// Where an edge crosses the lines of rows: rows from and to, and the position along them.
struct Edge {
    low: [f64; 2],
    high: [f64; 2],
    rows: std::ops::Range<usize>,
}

impl Edge {
    /// The edge between two points of a contour: it crosses the rows from its lower end on to just
    /// before its upper one, so that corners count once.
    fn new(a: [f64; 2], b: [f64; 2], rows: usize) -> Edge {
        let (low, high) = if a[1] <= b[1] { (a, b) } else { (b, a) };
        let row = |v: f64| v.ceil().clamp(0.0, rows as f64) as usize;
        Edge { low, high, rows: row(low[1])..row(high[1]) }
    }

    /// The position where it crosses a row: the same for a coinciding edge of another contour.
    fn crossing(&self, row: usize) -> f64 {
        let part = (row as f64 - self.low[1]) / (self.high[1] - self.low[1]);
        self.low[0] + part * (self.high[0] - self.low[0])
    }
}

/// Adds the runs of voxels within the contours of a plane.
fn outline(
    plane: &[Flat],
    [along, down, _]: [usize; 3],
    slice: usize,
    size: [usize; 3],
    runs: &mut Vec<Run>,
) -> Result<(), String> {
    let flat = |p: &[f64; 3]| [p[along], p[down]];
    let edges = || {
        plane.iter().flat_map(move |(_, contour)| {
            let next = contour.iter().cycle().skip(1);
            contour.iter().zip(next).map(move |(a, b)| Edge::new(flat(a), flat(b), size[down]))
        })
    };
    let count = edges().try_fold(0usize, |n, edge| n.checked_add(edge.rows.len()));
    let count = count.ok_or("its contours cross too many rows to count")?;
    let mut crossings = memory::list(CONTOURS, count);
    for edge in edges() {
        crossings.extend(edge.rows.clone().map(|row| (row, edge.crossing(row))));
    }
    crossings.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    memory::check::<Run>(CONTOURS, runs.len() + crossings.len() / 2)
        .unwrap_or_else(|e| memory::refuse(e));
    for row in crossings.chunk_by(|a, b| a.0 == b.0) {
        for pair in row.chunks_exact(2) {
            let column = |v: f64| v.ceil().clamp(0.0, size[along] as f64) as usize;
            let (from, to) = (column(pair[0].1), column(pair[1].1));
            if from < to {
                runs.push(Run { slice, row: pair[0].0, from, to });
            }
        }
    }
    Ok(())
}

/// What a structure set marks on a scan.
pub(super) fn read(tags: &DataSet, place: &Place) -> Result<Marked, String> {
    let mut marked = Marked::new(place.grid.size);
    let mut regions: Vec<(usize, String)> = vec![];
    for item in tags.items(tags::ROIS)? {
        let number = item.whole(tags::ROI_NUMBER)?;
        let number = number.ok_or_else(|| format!("its {} is missing", tags::ROI_NUMBER))?;
        if regions.iter().any(|r| r.0 == number) {
            return Err(format!("its {} {number} is duplicated", tags::ROI_NUMBER));
        }
        let name = item.text(tags::ROI_NAME).unwrap_or_else(|| format!("ROI {number}"));
        regions.push((number, name));
    }
    if regions.is_empty() {
        return Err(format!("its {} is empty: it outlines nothing", tags::ROIS));
    }
    let outlined = tags.items(tags::ROI_CONTOURS)?;
    let mut numbers = memory::list(CONTOURS, outlined.len());
    for item in &outlined {
        numbers.push(item.whole(tags::REFERENCED_ROI)?);
    }
    // 0 means nothing in a label image.
    let spare = regions.iter().map(|r| r.0).max().unwrap_or(0).saturating_add(1);
    for (number, name) in regions {
        let value = if number == 0 { spare } else { number };
        let value = u32::try_from(value).unwrap_or(u32::MAX);
        let at = numbers.iter().position(|n| *n == Some(number));
        let Some(item) = at.and_then(|at| outlined.get(at)) else {
            marked.add(name, value, |_| ());
            continue;
        };
        let filled = contours(item, place).and_then(|(contours, others)| {
            if contours.is_empty() && others > 0 {
                return Err(format!("it has {others} contours, expected CLOSED_PLANAR ones"));
            }
            let mut filled = fill(&contours, place)?;
            if others > 0 {
                filled.notes.push(format!(
                    "{others} of its contours are not CLOSED_PLANAR: they were ignored"
                ));
            }
            Ok(filled)
        });
        match filled {
            Err(fault) => marked.miss(name, value, fault),
            Ok(Filled { axes, runs, notes }) => {
                marked.warnings.extend(notes.iter().map(|n| format!("'{name}': {n}")));
                let size = place.grid.size;
                let strides = [size[1] * size[2], size[2], 1];
                let [step, row, slice] = axes.map(|a| strides[a]);
                marked.add(name, value, |f| {
                    for run in &runs {
                        let at = run.slice * slice + run.row * row;
                        (run.from..run.to).for_each(|n| f(at + n * step));
                    }
                });
            }
        }
    }
    Ok(marked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::{Affine, Grid};

    /// A scan whose voxels are at mm of LPS, 8 of them along i and j and 4 slices.
    fn place() -> Place {
        let affine = Affine([[-1.0, 0.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]);
        Place::new(&Grid { size: [8, 8, 4], affine }, None)
    }

    fn contour(points: &[[f64; 2]], k: f64) -> Contour {
        points.iter().map(|p| [p[0], p[1], k]).collect()
    }

    fn square(low: f64, high: f64, k: f64) -> Contour {
        contour(&[[low, low], [high, low], [high, high], [low, high]], k)
    }

    /// The voxels of slice k, one text per row.
    fn rows(filled: &Filled, k: usize) -> Vec<String> {
        assert_eq!(filled.axes, [0, 1, 2]);
        let inside = |i: usize, j: usize| {
            filled.runs.iter().any(|r| r.slice == k && r.row == j && (r.from..r.to).contains(&i))
        };
        let row = |j: usize| (0..8).map(|i| if inside(i, j) { '#' } else { '.' }).collect();
        (0..8).map(row).collect()
    }

    #[test]
    fn what_is_within_is_a_hole_and_a_keyhole_cuts_nothing() {
        let place = place();
        let ring = fill(&[square(0.5, 6.5, 1.0), square(2.5, 4.5, 1.0)], &place).unwrap();
        let expected = [
            "........", ".######.", ".######.", ".##..##.", ".##..##.", ".######.", ".######.",
            "........",
        ];
        assert_eq!(rows(&ring, 1), expected);
        assert!(ring.notes.is_empty());
        // The same in one contour, which goes into the hole and back.
        let keyhole = contour(
            &[
                [0.5, 0.5],
                [6.5, 0.5],
                [6.5, 6.5],
                [0.5, 6.5],
                [0.5, 2.7],
                [2.5, 3.4],
                [2.5, 4.5],
                [4.5, 4.5],
                [4.5, 2.5],
                [2.5, 2.5],
                [2.5, 3.4],
                [0.5, 2.7],
            ],
            1.0,
        );
        assert_eq!(rows(&fill(&[keyhole], &place).unwrap(), 1), expected);
        // A voxel on the lower edge is inside, on the upper one outside: adjacent squares fill the
        // plane.
        let halves = [
            contour(&[[1.0, 1.0], [3.0, 1.0], [3.0, 3.0], [1.0, 3.0]], 0.0),
            contour(&[[3.0, 1.0], [5.0, 1.0], [5.0, 3.0], [3.0, 3.0]], 0.0),
        ];
        let filled = fill(&halves, &place).unwrap();
        assert_eq!(rows(&filled, 0)[..4], ["........", ".####...", ".####...", "........"]);
    }

    #[test]
    fn contours_between_slices_belong_to_the_nearest() {
        let place = place();
        let filled =
            fill(&[square(0.5, 2.5, 0.7), square(0.5, 4.5, 1.1), square(0.5, 1.5, 3.4)], &place)
                .unwrap();
        assert_eq!(rows(&filled, 1)[1], ".####...");
        assert_eq!(rows(&filled, 3)[1], ".#......");
        assert_eq!(rows(&filled, 0)[1], "........");
        let notes = filled.notes.join("\n");
        for words in ["up to 0.40 slices", "1 planes", "lie 2 slices apart"] {
            assert!(notes.contains(words), "{words}: {notes}");
        }
        let fault = |contour: Contour| fill(&[contour], &place).err().unwrap();
        assert!(fault(square(0.5, 2.5, 3.6)).contains("lies at slice 3.60, more than half"));
        assert!(fault(square(0.5, 2.5, -0.6)).contains("(0 to 3)"));
        let bent = vec![[0.0, 0.0, 0.0], [4.0, 0.0, 1.0], [4.0, 4.0, 2.0], [0.0, 4.0, 1.0]];
        assert!(fault(bent).contains("not parallel"));
    }

    #[test]
    fn what_reaches_beyond_is_left_out_and_other_planes_are_found() {
        let place = place();
        let wide = fill(&[square(-3.5, 2.5, 2.0)], &place).unwrap();
        assert_eq!(rows(&wide, 2)[0], "###.....");
        assert!(wide.notes[0].contains("1 of its contours reach beyond"), "{:?}", wide.notes);
        // Flat along j.
        let upright = vec![[0.5, 3.0, 0.5], [2.5, 3.0, 0.5], [2.5, 3.0, 2.5], [0.5, 3.0, 2.5]];
        let filled = fill(&[upright], &place).unwrap();
        assert_eq!(filled.axes, [0, 2, 1]);
        let runs: Vec<_> = filled.runs.iter().map(|r| (r.slice, r.row, r.from, r.to)).collect();
        assert_eq!(runs, [(3, 1, 1, 3), (3, 2, 1, 3)]);
    }
}
