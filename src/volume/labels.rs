//! Label images: whole numbers that say what a voxel is, 0 for nothing.
//!
//! They are not read as scans are: a NaN voxel is unmarked, several labels are distinguished, and a
//! label is where its file says, whatever the order and direction of its axes.

#[cfg(feature = "dicom")]
use super::dicom::Marked;
use super::{
    Affine, Contents, Description, Grid, Segment, UNNAMED, Volume, VolumeError, Which, contents,
    contents_of, within_memory,
};
use crate::memory;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Which values of a label image are the object.
///
/// As text: `any`, a whole number from 1 on, or the name of a structure.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "String")]
pub enum TargetLabel {
    /// Every value above 0.
    #[default]
    Any,
    /// One value.
    Value(u32),
    /// The structure of that name, in files that name their values.
    Name(String),
}

impl std::str::FromStr for TargetLabel {
    type Err = String;
    fn from_str(text: &str) -> Result<TargetLabel, String> {
        match text.trim() {
            "" => Err("expected 'any', a label value or a structure's name".to_string()),
            "any" => Ok(TargetLabel::Any),
            name if name.parse::<f64>().is_ok() => {
                let value = name.parse().ok().filter(|v| *v > 0);
                value.map(TargetLabel::Value).ok_or_else(|| {
                    format!("'{name}' is not a label value: expected a whole number, 1 or more")
                })
            }
            name => Ok(TargetLabel::Name(name.to_string())),
        }
    }
}

/// A target in a settings or prompts file: a number, or text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Number(i64),
    Text(String),
}

impl TryFrom<Written> for TargetLabel {
    type Error = String;
    fn try_from(written: Written) -> Result<TargetLabel, String> {
        match written {
            Written::Number(value) => value.to_string().parse(),
            Written::Text(text) => text.parse(),
        }
    }
}

impl From<TargetLabel> for String {
    fn from(target: TargetLabel) -> String {
        target.to_string()
    }
}

impl std::fmt::Display for TargetLabel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            TargetLabel::Any => write!(f, "any"),
            TargetLabel::Value(value) => write!(f, "{value}"),
            TargetLabel::Name(name) => write!(f, "{name}"),
        }
    }
}

/// How messages name the memory that a mask takes.
const MASK: &str = "its labels";

/// The values of an iterator, in memory that may be refused.
fn collected<T>(values: impl ExactSizeIterator<Item = T>) -> Vec<T> {
    memory::collected(MASK, values)
}

/// A label image on the grid of the scan that it belongs to.
pub struct Labels {
    path: PathBuf,
    /// Layers of values `[i][j][k]`, one except for segmentations whose structures overlap.
    layers: Vec<Vec<u32>>,
    segments: Vec<Segment>,
    /// The errors of structures that could not be placed, by their values.
    faults: Vec<(u32, String)>,
    /// What was odd about the file and how it was interpreted.
    pub warnings: Vec<String>,
}

/// The grid of a label image; none for a DICOM structure set, whose contours are filled on any.
///
/// # Errors
/// The file cannot be read.
pub fn grid_of(path: &Path) -> Result<Option<Grid>, VolumeError> {
    Unplaced::read(path).map(|labels| labels.grid())
}

/// A label image for which no grid has been chosen yet.
enum Unplaced {
    Stored(Box<Contents>),
    /// A DICOM object, whose labels are placed when they are read; with its grid, if it has one.
    #[cfg(feature = "dicom")]
    Dicom(Option<Grid>),
}

impl Unplaced {
    fn read(path: &Path) -> Result<Unplaced, VolumeError> {
        #[cfg(feature = "dicom")]
        if super::is_dicom(path)? {
            return within_memory(path, || super::dicom::grid(path)).map(Unplaced::Dicom);
        }
        contents(path, Which::Layers).map(|contents| Unplaced::Stored(Box::new(contents)))
    }

    fn grid(&self) -> Option<Grid> {
        match self {
            Unplaced::Stored(contents) => Some(contents.grid),
            #[cfg(feature = "dicom")]
            Unplaced::Dicom(grid) => *grid,
        }
    }

    fn on(self, path: &Path, grid: &Grid) -> Result<Labels, VolumeError> {
        within_memory(path, || match self {
            Unplaced::Stored(contents) => Labels::of_contents(path, *contents, grid, None),
            #[cfg(feature = "dicom")]
            Unplaced::Dicom(_) => Labels::placed(path, grid, None),
        })
    }
}

/// Two label images on a grid on which they can be compared: that of the larger, extended by what
/// the other has beyond it. A DICOM structure set is placed on the other's.
///
/// # Errors
/// A file cannot be read, or both are structure sets; as [`Labels::read`].
pub fn on_shared_grid(paths: [&Path; 2]) -> Result<(Grid, [Labels; 2]), VolumeError> {
    let (first, second) = (Unplaced::read(paths[0])?, Unplaced::read(paths[1])?);
    let grid = match (first.grid(), second.grid()) {
        (Some(a), Some(b)) if b.voxels() > a.voxels() => joined(&b, &a),
        (Some(a), Some(b)) => joined(&a, &b),
        (Some(one), None) | (None, Some(one)) => one,
        (None, None) => {
            return Err(VolumeError::new(
                paths[0],
                "is a DICOM structure set, as is the other file: contours are filled on the voxels of an image, and neither has any",
            ));
        }
    };
    Ok((grid, [first.on(paths[0], &grid)?, second.on(paths[1], &grid)?]))
}

/// A grid, extended to include another whose voxels coincide with its own.
fn joined(grid: &Grid, other: &Grid) -> Grid {
    let Ok(steps) = Steps::between(other, grid) else { return *grid };
    let ends = [[0; 3], other.size.map(|s| s as i64 - 1)].map(|voxel| steps.apply(voxel));
    let low = [0, 1, 2].map(|a| ends[0][a].min(ends[1][a]).min(0));
    let size = [0, 1, 2].map(|a| {
        let high = ends[0][a].max(ends[1][a]).max(grid.size[a] as i64 - 1);
        high.saturating_sub(low[a]).saturating_add(1) as usize
    });
    // If they are far apart most of it would be empty.
    let most = grid.voxels().saturating_add(other.voxels()).saturating_mul(8);
    if size == grid.size || memory::extent(&size).is_none_or(|n| n > most) {
        return *grid;
    }
    let mut affine = grid.affine;
    let origin = affine.apply(low.map(|v| v as f64));
    (0..3).for_each(|r| affine.0[r][3] = origin[r]);
    Grid { size, affine }
}

impl Labels {
    /// Reads the label image at `path` and places it on `image`'s grid: axes are permuted and
    /// flipped if that makes them fit, and voxels of the scan that the file does not cover are 0.
    ///
    /// With the feature `dicom` also the segments of a DICOM segmentation, by their numbers and
    /// labels, and the regions of a DICOM structure set, whose contours are filled on the scan's
    /// slices. One that does not fit the scan is a warning, and an error if it is picked.
    ///
    /// # Errors
    /// The file cannot be read; its voxels do not coincide with the scan's; marked voxels are
    /// outside the scan; values are negative or infinite.
    pub fn read(path: &Path, image: &Grid) -> Result<Labels, VolumeError> {
        within_memory(path, || Labels::placed(path, image, None))
    }

    /// Reads the label image at `path` for a scan, as [`Labels::read`] does. If the scan's header
    /// states two placements, labels made by copying the unused one fit as well.
    ///
    /// # Errors
    /// As [`Labels::read`].
    pub fn beside(path: &Path, scan: &Volume) -> Result<Labels, VolumeError> {
        within_memory(path, || Labels::placed(path, &scan.grid, Some(&scan.description)))
    }

    /// Reads a label image for a scan from a file in memory, which must contain its voxels.
    ///
    /// # Errors
    /// As [`Labels::read`].
    pub fn of_file(bytes: Vec<u8>, scan: &Volume) -> Result<Labels, VolumeError> {
        let path = Path::new(UNNAMED);
        within_memory(path, || {
            let contents = contents_of(bytes, Which::Layers)?;
            Labels::of_contents(path, contents, &scan.grid, scan.description.passed_over)
        })
    }

    fn placed(
        path: &Path,
        image: &Grid,
        scan: Option<&Description>,
    ) -> Result<Labels, VolumeError> {
        #[cfg(feature = "dicom")]
        if super::is_dicom(path)? {
            let source = scan.and_then(|s| s.source.as_deref());
            let Marked { layers, segments, faults, warnings } =
                super::dicom::labels(path, image, source)?;
            return Ok(Labels { path: path.into(), layers, segments, faults, warnings });
        }
        let other = scan.and_then(|s| s.passed_over);
        Labels::of_contents(path, contents(path, Which::Layers)?, image, other)
    }

    fn of_contents(
        path: &Path,
        contents: Contents,
        image: &Grid,
        other: Option<Affine>,
    ) -> Result<Labels, VolumeError> {
        let Contents { grid, volumes, segments, mut warnings, .. } = contents;
        let fail = |message: String| VolumeError::new(path, message);
        let steps = Steps::between(&grid, image).or_else(|e| {
            let as_passed_over =
                other.and_then(|affine| Steps::between(&grid, &Grid { affine, ..*image }).ok());
            if as_passed_over.is_some() {
                warnings.push(
                    "it is aligned with the scan's sform, which the scan itself does not use: it was aligned voxel by voxel".into(),
                );
            }
            as_passed_over.ok_or(e)
        });
        let steps = steps.map_err(fail)?;
        let mut labels =
            Labels { path: path.into(), layers: vec![], segments, faults: vec![], warnings };
        for values in volumes {
            let values =
                whole(&values.stored_values(), grid.size, &mut labels.warnings).map_err(fail)?;
            labels.layers.push(steps.place(&values, grid.size, image).map_err(fail)?);
        }
        Ok(labels)
    }

    /// Whether the file names its structures.
    pub fn is_named(&self) -> bool {
        !self.segments.is_empty()
    }

    /// The object's mask on the scan's grid, `[i][j][k]`: 1 where the object is. If a segmentation
    /// names several structures, one must be picked; values without names are joined under
    /// [`TargetLabel::Any`], which [`Labels::several`] reports.
    ///
    /// # Errors
    /// No structure has that name, or there are several and none was picked: the message lists
    /// them.
    pub fn mask(&self, target: &TargetLabel) -> Result<Vec<u8>, VolumeError> {
        within_memory(&self.path, || self.picked(target))
    }

    fn picked(&self, target: &TargetLabel) -> Result<Vec<u8>, VolumeError> {
        let fail = |m: String| Err(VolumeError::new(&self.path, m));
        let names =
            || self.segments.iter().map(|s| format!("'{}'", s.name)).collect::<Vec<_>>().join(", ");
        let of = |layer: usize, value: u32| {
            collected(self.layers[layer].iter().map(|v| u8::from(*v == value)))
        };
        let named: Vec<&Segment> = match target {
            TargetLabel::Name(name) => self.segments.iter().filter(|s| s.name == *name).collect(),
            TargetLabel::Value(value) => {
                self.segments.iter().filter(|s| s.value == *value).collect()
            }
            TargetLabel::Any => self.segments.iter().collect(),
        };
        if let [only] = named[..]
            && let Some((_, fault)) = self.faults.iter().find(|(value, _)| *value == only.value)
        {
            return fail(format!("the structure '{}' cannot be used: {fault}", only.name));
        }
        match target {
            TargetLabel::Name(name) => match named[..] {
                [s] => Ok(of(s.layer, s.value)),
                [] if self.segments.is_empty() => {
                    fail(format!("it names no structures: select a value instead of '{name}'"))
                }
                [] => fail(format!("no structure is called '{name}': it has {}", names())),
                _ => {
                    let values: Vec<u32> = named.iter().map(|s| s.value).collect();
                    fail(format!(
                        "{} structures are called '{name}': select one by its value, of {values:?}",
                        named.len()
                    ))
                }
            },
            TargetLabel::Any if self.segments.len() > 1 => fail(format!(
                "it holds {} structures, select one: {}",
                self.segments.len(),
                names()
            )),
            TargetLabel::Any => Ok(collected(self.joined().iter().map(|v| u8::from(*v > 0)))),
            TargetLabel::Value(value) => {
                let layers: Vec<usize> =
                    (0..self.layers.len()).filter(|l| self.layers[*l].contains(value)).collect();
                match layers[..] {
                    [] => Ok(memory::zeroed(MASK, self.layers.first().map_or(0, Vec::len))),
                    [layer] => Ok(of(layer, *value)),
                    _ => fail(format!(
                        "several of its layers hold the value {value}: select one of {} by name",
                        names()
                    )),
                }
            }
        }
    }

    /// The values of all layers in one, `[i][j][k]`; where layers overlap, those of the last.
    pub fn joined(&self) -> Vec<u32> {
        let mut layers = self.layers.iter();
        let first = layers.next().map(|l| memory::copied(MASK, l)).unwrap_or_default();
        layers.fold(first, |joined, layer| {
            collected(joined.iter().zip(layer).map(|(a, b)| if *b > 0 { *b } else { *a }))
        })
    }

    /// The number of voxels that have each value above 0. Unwinds to [`memory::caught`] if memory
    /// for that is refused.
    pub fn counts(&self) -> BTreeMap<u32, usize> {
        let mut counts = BTreeMap::new();
        for value in self.layers.iter().flatten().filter(|v| **v > 0) {
            let known = counts.len();
            *counts.entry(*value).or_insert(0) += 1;
            // A label image may have as many values as voxels: there must be room for twice those
            // so far, with what a map adds.
            if counts.len() > known
                && known.is_power_of_two()
                && let Err(e) = memory::check::<[u64; 8]>("the labels of an image", known)
            {
                memory::refuse(e);
            }
        }
        counts
    }

    /// The message if all values were joined and there are several: `flag` picks one.
    pub fn several(&self, flag: &str) -> Option<String> {
        let counts = self.counts();
        let list: Vec<String> =
            counts.iter().take(8).map(|(value, n)| format!("{value} ({n} voxels)")).collect();
        let more = if counts.len() > 8 { ", ..." } else { "" };
        (counts.len() > 1).then(|| {
            format!(
                "it holds several labels, {}{more}: all of them were used; {flag} selects one",
                list.join(", ")
            )
        })
    }
}

/// The largest label: values are read as float32, which represents all whole numbers up to here.
const MOST: f32 = 16_777_215.0;

/// Values as whole numbers; NaN means nothing.
fn whole(
    values: &[f32],
    [_, nj, nk]: [usize; 3],
    warnings: &mut Vec<String>,
) -> Result<Vec<u32>, String> {
    let voxel = |at: usize| [at / nk / nj, at / nk % nj, at % nk];
    let (mut unmarked, mut broken): (usize, Option<usize>) = (0, None);
    let mut labels = memory::list(MASK, values.len());
    for (at, v) in values.iter().enumerate() {
        let r = v.round();
        if v.is_nan() {
            unmarked += 1;
        } else if !(0.0..=MOST).contains(&r) {
            return Err(format!(
                "voxel {:?} is {v}: a label image holds whole numbers from 0 to {MOST}",
                voxel(at)
            ));
        } else if (v - r).abs() > 1e-3 {
            broken = broken.or(Some(at));
        }
        labels.push(if v.is_nan() { 0 } else { r as u32 });
    }
    if unmarked > 0 {
        warnings
            .push(format!("{unmarked} voxels hold no number (NaN): they were read as unmarked"));
    }
    if let Some(at) = broken {
        warnings.push(format!(
            "its values are not whole, for example {} at voxel {:?}: they were rounded",
            values[at],
            voxel(at)
        ));
    }
    Ok(labels)
}

/// How voxels of one grid are mapped to another's: `axis[a]` is the other's axis along which this
/// one's axis `a` runs, `sign[a]` its direction, and `first` the position of voxel 0.
#[derive(Debug, PartialEq)]
struct Steps {
    axis: [usize; 3],
    sign: [i64; 3],
    first: [i64; 3],
}

impl Steps {
    /// Only if every voxel's centre is within a tenth of a voxel of one on `image`'s grid,
    /// continued beyond its faces.
    fn between(label: &Grid, image: &Grid) -> Result<Steps, String> {
        // Headers are rounded: half a thousandth of a voxel is the same place, a tenth is not.
        const TOLERANCE: f64 = 0.1;
        let map = image.affine.inverse().after(&label.affine);
        let mut steps = Steps {
            axis: [0; 3],
            sign: [1; 3],
            first: std::array::from_fn(|r| map.0[r][3].round() as i64),
        };
        for a in 0..3 {
            let column = map.column(a);
            let along = (0..3)
                .fold(0, |best, r| if column[r].abs() > column[best].abs() { r } else { best });
            (steps.axis[a], steps.sign[a]) = (along, if column[along] < 0.0 { -1 } else { 1 });
        }
        // An axis of one voxel may have any direction and any thickness.
        let free: Vec<usize> = (0..3).filter(|r| !steps.axis.contains(r)).collect();
        let single: Vec<usize> = (0..3)
            .filter(|a| {
                label.size[*a] == 1
                    && steps.axis.iter().filter(|x| **x == steps.axis[*a]).count() > 1
            })
            .collect();
        free.iter().zip(single).for_each(|(r, a)| steps.axis[a] = *r);
        let corner = |c: usize| -> [f64; 3] {
            std::array::from_fn(|a| if c >> a & 1 == 1 { label.size[a] as f64 - 1.0 } else { 0.0 })
        };
        let apart = |c: usize| {
            let (exact, rounded) = (map.apply(corner(c)), steps.apply(corner(c).map(|v| v as i64)));
            (0..3).map(|r| (exact[r] - rounded[r] as f64).abs()).fold(0.0, f64::max)
        };
        let worst = (0..8).map(apart).fold(0.0, f64::max);
        let distinct = (0..3).all(|r| steps.axis.contains(&r));
        if worst <= TOLERANCE && distinct {
            return Ok(steps);
        }
        if label.size != image.size {
            return Err(format!(
                "its size is {:?}, the image's is {:?}, and its voxels do not coincide with the image's: resample it onto the scan",
                label.size, image.size
            ));
        }
        let apart = label.affine.distance(&image.affine, image.size);
        Err(format!(
            "its voxels lie up to {apart:.2} mm from the image's (their affines differ): resample it onto the scan"
        ))
    }

    fn apply(&self, voxel: [i64; 3]) -> [i64; 3] {
        let mut at = self.first;
        (0..3).for_each(|a| {
            at[self.axis[a]] = at[self.axis[a]].saturating_add(self.sign[a] * voxel[a])
        });
        at
    }

    /// Values on the other grid.
    fn place(&self, values: &[u32], size: [usize; 3], image: &Grid) -> Result<Vec<u32>, String> {
        if *self == (Steps { axis: [0, 1, 2], sign: [1; 3], first: [0; 3] }) && size == image.size {
            return Ok(memory::copied(MASK, values));
        }
        let mut placed = memory::zeroed(MASK, image.voxels());
        let (mut lost, mut example) = (0usize, [0i64; 3]);
        for (at, value) in values.iter().enumerate().filter(|(_, v)| **v > 0) {
            let voxel =
                [at / size[2] / size[1], at / size[2] % size[1], at % size[2]].map(|v| v as i64);
            let to = self.apply(voxel);
            if (0..3).all(|a| to[a] >= 0 && to[a] < image.size[a] as i64) {
                placed[(to[0] as usize * image.size[1] + to[1] as usize) * image.size[2]
                    + to[2] as usize] = *value;
            } else {
                (lost, example) = (lost + 1, to);
            }
        }
        match lost {
            0 => Ok(placed),
            _ => Err(format!(
                "{lost} of its marked voxels lie outside the image of {:?} voxels, for example at {example:?}",
                image.size
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::Affine;

    #[test]
    fn targets_are_read_as_documented() {
        assert_eq!("any".parse(), Ok(TargetLabel::Any));
        assert_eq!("2".parse(), Ok(TargetLabel::Value(2)));
        assert_eq!("left kidney".parse(), Ok(TargetLabel::Name("left kidney".into())));
        assert_eq!("4th ventricle".parse(), Ok(TargetLabel::Name("4th ventricle".into())));
        for text in ["0", "-1", "2.5", "", "99999999999"] {
            assert!(text.parse::<TargetLabel>().is_err(), "{text}");
        }
    }

    #[test]
    fn values_are_whole_numbers_and_nan_is_nothing() {
        let read = |values: &[f32]| {
            let mut warnings = vec![];
            whole(values, [1, 1, values.len()], &mut warnings).map(|v| (v, warnings))
        };
        assert_eq!(read(&[0.0, 1.0, 2.0]).unwrap(), (vec![0, 1, 2], vec![]));
        let (values, warnings) = read(&[f32::NAN, 1.0, f32::NAN]).unwrap();
        assert!(values == [0, 1, 0] && warnings[0].starts_with("2 voxels hold no number"));
        assert!(read(&[0.0, 0.4]).unwrap().1[0].contains("0.4 at voxel [0, 0, 1]"));
        assert!(
            read(&[-1.0]).is_err()
                && read(&[f32::INFINITY]).is_err()
                && read(&[16_777_216.0]).is_err()
        );
    }

    #[test]
    fn a_grid_is_joined_with_what_lies_beyond_it() {
        let affine = Affine([[2.0, 0.0, 0.0, 7.0], [0.0, 3.0, 0.0, -1.0], [0.0, 0.0, 4.0, 2.0]]);
        let grid = Grid { size: [4, 5, 6], affine };
        // Two slices below it, and one in it, upside down.
        let mut other = Grid { size: [4, 5, 3], affine };
        other.affine.0[2] = [0.0, 0.0, -4.0, 2.0];
        let both = joined(&grid, &other);
        assert_eq!((both.size, both.affine.0[2]), ([4, 5, 8], [0.0, 0.0, 4.0, -6.0]));
        assert_eq!(joined(&grid, &Grid { size: [1, 2, 3], affine }), grid);
        // Too far away, and between the voxels.
        other.affine.0[2][3] = 4e6 + 2.0;
        assert_eq!(joined(&grid, &other), grid);
        other.affine.0[2][3] = 3.0;
        assert_eq!(joined(&grid, &other), grid);
    }

    #[test]
    fn a_label_lies_where_its_grid_says() {
        let image = Grid {
            size: [4, 5, 6],
            affine: Affine([[2.0, 0.0, 0.0, 7.0], [0.0, 3.0, 0.0, -1.0], [0.0, 0.0, 4.0, 2.0]]),
        };
        // i along the image's k, backwards; j along i; k along j; two voxels in.
        let affine = Affine([[0.0, 2.0, 0.0, 9.0], [0.0, 0.0, 3.0, 2.0], [-4.0, 0.0, 0.0, 18.0]]);
        let label = Grid { size: [3, 2, 2], affine };
        let steps = Steps::between(&label, &image).unwrap();
        assert_eq!(steps, Steps { axis: [2, 0, 1], sign: [-1, 1, 1], first: [1, 1, 4] });
        let mut values = vec![0u32; 12];
        values[(2 * 2 + 1) * 2 + 1] = 9;
        let placed = steps.place(&values, label.size, &image).unwrap();
        // World of label voxel [2, 1, 1]: (11, 5, 10), the image's [2, 2, 2].
        assert_eq!(placed.iter().position(|v| *v == 9), Some((2 * 5 + 2) * 6 + 2));
        let mut shifted = label;
        shifted.affine.0[0][3] += 1.0;
        assert!(
            Steps::between(&shifted, &image)
                .unwrap_err()
                .contains("do not coincide with the image's")
        );
        let mut outside = label;
        outside.affine.0[2][3] += 100.0;
        let steps = Steps::between(&outside, &image).unwrap();
        assert!(
            steps
                .place(&values, label.size, &image)
                .unwrap_err()
                .contains("1 of its marked voxels lie outside")
        );
        assert!(steps.place(&[0; 12], label.size, &image).is_ok());
    }
}
