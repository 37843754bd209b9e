//! The positions of slices: sorted along their normal, their steps checked, one affine for all.
//!
//! DICOM's millimetres are LPS (PS3.3, C.7.6.2): x from right to left, y from front to back.

use crate::volume::Affine;

/// One slice: a file, or a frame of one.
#[derive(Clone, Debug)]
pub struct Plane {
    /// The image of the series that it is in, and the frame there.
    pub image: usize,
    pub frame: usize,
    /// The centre of the slice's first voxel, in mm of LPS.
    pub position: [f64; 3],
    /// Unit vectors along a row and along a column.
    pub orientation: [[f64; 3]; 2],
    /// The distances in mm between rows and between columns.
    pub spacing: [f64; 2],
    /// The distance in mm between slices, or the thickness of one, if it is given.
    pub thickness: Option<f64>,
    /// The factor of stored values, and what is then added.
    pub scale: [f64; 2],
    /// The slice's rank among those at the same position: by time, acquisition, number, frame.
    pub order: [i64; 4],
}

/// An error about slices, and which of them shows it.
#[derive(Debug, PartialEq)]
pub struct Fault {
    pub plane: usize,
    pub message: String,
}

/// Slices in order.
#[derive(Debug)]
pub struct Stack {
    /// For each volume, its planes from first to last.
    pub volumes: Vec<Vec<usize>>,
    /// From voxel to RAS mm.
    pub affine: Affine,
    pub warnings: Vec<String>,
}

/// The scalar product.
pub fn dot(a: [f64; 3], b: [f64; 3]) -> f64 {
    (0..3).map(|r| a[r] * b[r]).sum()
}

/// The vector perpendicular to two others.
pub fn cross(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
}

fn minus(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [0, 1, 2].map(|r| a[r] - b[r])
}

fn length(a: [f64; 3]) -> f64 {
    dot(a, a).sqrt()
}

/// The unit vectors of the six numbers of ImageOrientationPatient, if they are two perpendicular
/// ones; rounding is tolerated.
pub fn directions(numbers: [f64; 6]) -> Option<[[f64; 3]; 2]> {
    const TOLERANCE: f64 = 0.02;
    let [a, b, c, d, e, f] = numbers;
    let (x, y) = ([a, b, c], [d, e, f]);
    let unit = |v: [f64; 3]| (length(v) - 1.0).abs() < TOLERANCE;
    let upright = unit(x) && unit(y) && dot(x, y).abs() < TOLERANCE;
    upright.then(|| [x.map(|v| v / length(x)), y.map(|v| v / length(y))])
}

/// Whether two slices can be in one volume: they are parallel, with the same spacing.
pub fn alike(a: &Plane, b: &Plane) -> bool {
    let parallel =
        (0..2).all(|v| (0..3).all(|r| (a.orientation[v][r] - b.orientation[v][r]).abs() < 2e-3));
    parallel && (0..2).all(|s| (a.spacing[s] / b.spacing[s] - 1.0).abs() < 1e-3)
}

/// A number of mm, as text.
fn mm(v: f64) -> String {
    format!("{} mm", (v * 1e3).round() / 1e3)
}

/// Puts slices that are [`alike`] in order.
pub fn stack(planes: &[Plane]) -> Result<Stack, Fault> {
    let Some(first) = planes.first() else {
        return Err(Fault { plane: 0, message: "has no slice".into() });
    };
    let [x, y] = first.orientation;
    let normal = cross(x, y);
    let along = |p: usize| dot(planes[p].position, normal);
    let mut sorted: Vec<usize> = (0..planes.len()).collect();
    sorted.sort_by(|a, b| {
        along(*a).total_cmp(&along(*b)).then(planes[*a].order.cmp(&planes[*b].order))
    });
    let mut warnings = vec![];

    // Slices at the same position belong to several volumes, or are there twice.
    let same = 0.01 * first.spacing[0].min(first.spacing[1]);
    let mut places: Vec<Vec<usize>> = vec![];
    for plane in sorted {
        match places.last_mut() {
            Some(place) if along(plane) - along(place[0]) < same => place.push(plane),
            _ => places.push(vec![plane]),
        }
    }
    places.iter_mut().for_each(|place| place.sort_by_key(|p| planes[*p].order));
    let count = places.iter().map(Vec::len).min().unwrap_or(1);
    let more = places.iter().filter(|place| place.len() > count).count();
    // If most positions have more slices, taking one of each would mix volumes: it is unknown which
    // volume lacks a slice.
    if 2 * more > places.len()
        && let Some(short) = places.iter().find(|place| place.len() == count)
    {
        return Err(Fault {
            plane: short[0],
            message: format!(
                "a slice of one of several volumes is missing: {count} at this position, more at {more} of \
                 {} positions; 'dcm2niix -z y FOLDER' separates the volumes",
                places.len()
            ),
        });
    }
    if more > 0 {
        let kept = if count == 1 { "the first is".into() } else { format!("{count} are") };
        warnings.push(format!(
            "{more} of {} positions have more slices than others: {kept} read of each",
            places.len()
        ));
    }
    let chain: Vec<usize> = places.iter().map(|place| place[0]).collect();

    let at = |n: usize| planes[chain[n]].position;
    let last = chain.len() - 1;
    let step = match last {
        0 => {
            let thick = first.thickness.filter(|t| *t > 0.0);
            if thick.is_none() {
                warnings.push("a single slice without a thickness: 1 mm is assumed".into());
            }
            normal.map(|v| v * thick.unwrap_or(1.0))
        }
        _ => minus(at(last), at(0)).map(|v| v / last as f64),
    };
    uneven(planes, &chain, normal, step, &mut warnings)?;
    let spacing = length(step);
    let sheared = length(cross(step, normal)) / spacing;
    if sheared > 0.008 {
        warnings.push(format!(
            "slices are shifted by {:.1} degrees, as with a tilted gantry: the affine is sheared",
            sheared.min(1.0).asin().to_degrees()
        ));
    }
    let columns = [x.map(|v| v * first.spacing[1]), y.map(|v| v * first.spacing[0]), step, at(0)];
    let sign = |r: usize| if r < 2 { -1.0 } else { 1.0 };
    // Adding 0 turns -0 into 0.
    let affine = Affine([0, 1, 2].map(|r| columns.map(|c| sign(r) * c[r] + 0.0)));
    if !affine.is_regular() {
        return Err(Fault {
            plane: chain[0],
            message: "its positions, orientation and spacing do not span three dimensions".into(),
        });
    }
    let volumes = (0..count).map(|v| places.iter().map(|place| place[v]).collect()).collect();
    Ok(Stack { volumes, affine, warnings })
}

/// Checks the steps between slices: a gap is an error, a small unevenness a warning.
fn uneven(
    planes: &[Plane],
    chain: &[usize],
    normal: [f64; 3],
    step: [f64; 3],
    warnings: &mut Vec<String>,
) -> Result<(), Fault> {
    let along: Vec<f64> = chain.iter().map(|p| dot(planes[*p].position, normal)).collect();
    let steps: Vec<f64> = along.windows(2).map(|w| w[1] - w[0]).collect();
    let mut sorted = steps.clone();
    sorted.sort_by(f64::total_cmp);
    let Some(usual) = sorted.get(sorted.len() / 2).copied() else { return Ok(()) };
    if let Some(n) = steps.iter().position(|s| *s > 1.5 * usual || *s < 0.5 * usual) {
        let what = if steps[n] > usual { "a slice is missing" } else { "a slice lies between" };
        return Err(Fault {
            plane: chain[n + 1],
            message: format!(
                "{what}: this slice is {} from the previous one, the others {} (slice {} of {}, positions {} and {} along their normal); 'dcm2niix -z y FOLDER' resamples such series",
                mm(steps[n]),
                mm(usual),
                n + 2,
                chain.len(),
                mm(along[n]),
                mm(along[n + 1])
            ),
        });
    }
    let first = planes[chain[0]].position;
    let off = |n: usize| {
        let place = [0, 1, 2].map(|r| first[r] + n as f64 * step[r]);
        length(minus(planes[chain[n]].position, place))
    };
    let spacing = length(step);
    let farthest = (0..chain.len()).max_by(|a, b| off(*a).total_cmp(&off(*b))).unwrap_or(0);
    let most = off(farthest);
    if most > 0.5 * spacing.max(usual) {
        return Err(Fault {
            plane: chain[farthest],
            message: format!(
                "slices are not evenly spaced along a line: this one is {} from its expected position, the step is {}; 'dcm2niix -z y FOLDER' resamples such series",
                mm(most),
                mm(spacing)
            ),
        });
    }
    if most > (0.01 * spacing).max(0.01) {
        warnings.push(format!(
            "slices are unevenly spaced, {} to {}: read as {} apart, which displaces some by up to {}",
            mm(sorted[0]),
            mm(sorted[sorted.len() - 1]),
            mm(spacing),
            mm(most)
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plane(position: [f64; 3]) -> Plane {
        Plane {
            image: 0,
            frame: 0,
            position,
            orientation: [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
            spacing: [0.5, 0.75],
            thickness: None,
            scale: [1.0, 0.0],
            order: [0; 4],
        }
    }

    #[test]
    fn slices_are_sorted_along_their_normal_and_placed_in_ras() {
        let stack = stack(&[5.0, 1.0, 3.0].map(|z| plane([10.0, 20.0, z]))).unwrap();
        assert_eq!(stack.volumes, [[1, 2, 0]]);
        let rows = [[-0.75, 0.0, 0.0, -10.0], [0.0, -0.5, 0.0, -20.0], [0.0, 0.0, 2.0, 1.0]];
        assert_eq!((stack.affine, stack.warnings.len()), (Affine(rows), 0));
    }

    #[test]
    fn a_gap_is_a_fault_and_a_tilt_a_warning() {
        let gap = stack(&[0.0, 2.0, 4.0, 8.0].map(|z| plane([0.0, 0.0, z]))).unwrap_err();
        assert!(gap.plane == 3 && gap.message.contains("a slice is missing"), "{gap:?}");
        let tilted = stack(&[0.0, 2.0, 4.0].map(|z| plane([0.0, z / 4.0, z]))).unwrap();
        assert!(tilted.warnings[0].contains("14.0 degrees"), "{:?}", tilted.warnings);
        assert_eq!(tilted.affine.column(2), [0.0, -0.5, 2.0]);
        let uneven = stack(&[0.0, 2.0, 4.3, 6.0].map(|z| plane([0.0, 0.0, z]))).unwrap();
        assert!(uneven.warnings[0].contains("unevenly spaced"), "{:?}", uneven.warnings);
    }

    #[test]
    fn several_slices_at_every_position_are_several_volumes() {
        let mut planes: Vec<Plane> =
            [0.0, 1.0, 0.0, 1.0].iter().map(|z| plane([0.0, 0.0, *z])).collect();
        planes.iter_mut().enumerate().for_each(|(n, p)| p.order[2] = -(n as i64));
        assert_eq!(stack(&planes).unwrap().volumes, [[2, 3], [0, 1]]);
        planes.pop();
        let twice = stack(&planes).unwrap();
        assert_eq!(twice.volumes, [[2, 1]]);
        assert!(twice.warnings[0].contains("1 of 2 positions"), "{:?}", twice.warnings);
    }

    #[test]
    fn volumes_one_of_which_lacks_a_slice_are_not_mixed() {
        let mut planes: Vec<Plane> =
            [0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 3.0].iter().map(|z| plane([0.0, 0.0, *z])).collect();
        planes.iter_mut().enumerate().for_each(|(n, p)| p.order[2] = n as i64);
        let fault = stack(&planes).unwrap_err();
        let words =
            "a slice of one of several volumes is missing: 1 at this position, more at 3 of 4";
        assert!(fault.plane == 2 && fault.message.starts_with(words), "{fault:?}");
    }
}
