//! The CVPR 2025 challenge on interactive 3D segmentation: the input is an archive with an image
//! and a box and clicks for each class, the output is labels.
//!
//! Arrays run z, y, x, and so do clicks; ends of boxes are inclusive. Every class is a session of
//! its own on the scan that they share. The whole history is given again at every step (the box,
//! then one click after the other), so nothing is kept between the runs of a container: the same
//! history gives the same bits.

mod history;

use super::Outcome;
use super::npy::of_bytes;
use super::npz::{self, Npz};
use crate::memory;
use crate::model::Model;
use crate::prompt::{Dense, Prompts};
use crate::session::field::Field;
use crate::session::{Options, Scan, Session, SessionError, intensities, normalization};
use crate::volume::{Affine, Description, Grid, Volume, VolumeError, reorder, to_file_order};
use history::{bounds, history, objects, order};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The name of the labels of a case in refusals of memory.
const LABELS: &str = "labels";

/// The prompts of one class.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Class {
    /// The box `[i0, j0, k0, i1, j1, k1]`, ends exclusive.
    pub bounds: Option<[usize; 6]>,
    /// Clicks in the order in which they were made, positive where true.
    pub clicks: Vec<([usize; 3], bool)>,
}

/// A case as its file describes it.
pub struct Case {
    /// The image, i, j, k being x, y, z.
    pub volume: Arc<Volume>,
    /// The prompts of each class; the first has label 1.
    pub classes: Vec<Class>,
    /// The labels of the step before `[i][j][k]`, for a class that has neither box nor clicks to
    /// rebuild them from.
    pub previous: Option<Vec<u8>>,
}

/// The paths of the cases in a folder (its `.npz` archives), sorted by name.
///
/// # Errors
/// The folder cannot be read, or holds none.
pub fn cases(folder: &Path) -> Result<Vec<PathBuf>, VolumeError> {
    let fail = |e: std::io::Error| VolumeError::new(folder, e.to_string());
    let mut paths = vec![];
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("npz")) {
            paths.push(path);
        }
    }
    paths.sort();
    if paths.is_empty() { Err(VolumeError::new(folder, "holds no .npz file")) } else { Ok(paths) }
}

/// Segments the case in `path`, and writes the answer to a file of the same name in the folder
/// `output`.
///
/// # Errors
/// As [`Case::read`]; a session fails; the answer cannot be written.
pub fn run(model: &Arc<Model>, path: &Path, output: &Path) -> Result<Outcome, VolumeError> {
    let case = Case::read(path)?;
    let fail = |e: String| VolumeError::new(path, e);
    let labels = case.segment(model).map_err(fail)?;
    let [ni, nj, nk] = case.volume.grid.size;
    let array = of_bytes(&[nk, nj, ni], &to_file_order(&labels, [ni, nj, nk]));
    let output = output.join(path.file_name().unwrap_or_default());
    let written = npz::write(&output, &[("segs", array)], true)?;
    written.commit().map_err(|e| VolumeError::new(&output, e.to_string()))?;
    let silent = (1..=case.classes.len()).filter(|label| case.prompts(*label).is_empty());
    let mut warnings: Vec<String> =
        case.volume.warnings.iter().map(|w| format!("{}: {w}", path.display())).collect();
    warnings.extend(
        silent.map(|label| {
            format!("{}: no prompts for class {label}: it stays empty", path.display())
        }),
    );
    let scan = intensities(&*case.volume, model.config().intensity).why();
    Ok(Outcome {
        output,
        objects: case.classes.len(),
        voxels: labels.iter().filter(|l| **l != 0).count(),
        scan,
        warnings,
    })
}

impl Case {
    /// Reads a case from its archive.
    ///
    /// # Errors
    /// The file cannot be read, is damaged, or has another form; the error names it.
    pub fn read(path: &Path) -> Result<Case, VolumeError> {
        let mut file = Npz::open(path)?;
        let volume = image(&mut file)?;
        let size = volume.grid.size;
        let boxes = objects(&mut file, "boxes")?;
        let clicks = objects(&mut file, "clicks")?;
        let order = order(&mut file)?;
        let mut classes = vec![Class::default(); boxes.len().max(clicks.len())];
        for (at, class) in classes.iter_mut().enumerate() {
            let of_class = |e: String| format!("class {}: {e}", at + 1);
            let bounds = boxes.get(at).map_or(Ok(None), |given| bounds(given, size));
            class.bounds = bounds.map_err(|e| file.fail("boxes", &of_class(e)))?;
            let clicks = clicks
                .get(at)
                .map_or(Ok(vec![]), |given| history(given, order.get(at).map(Vec::as_slice), size));
            class.clicks = clicks.map_err(|e| file.fail("clicks", &of_class(e)))?;
        }
        let silent = |class: &Class| class.bounds.is_none() && class.clicks.is_empty();
        let mut previous = None;
        if classes.is_empty() || classes.iter().any(silent) {
            previous = labels(&mut file, size)?;
        }
        if let (Some(labels), true) = (&previous, classes.is_empty()) {
            classes = vec![Class::default(); labels.iter().max().map_or(0, |l| *l as usize)];
        }
        match classes.len() {
            0 => Err(VolumeError::new(
                path,
                "has no prompts: expected 'boxes', 'clicks' or a 'prev_pred' with labels",
            )),
            1..=255 => Ok(Case { volume: Arc::new(volume), classes, previous }),
            n => Err(VolumeError::new(path, format!("has {n} classes, expected at most 255"))),
        }
    }

    /// The prompts for the session of a class, interaction by interaction.
    fn prompts(&self, label: usize) -> Vec<Prompts> {
        let Some(class) = self.classes.get(label - 1) else { return vec![] };
        let mut all = vec![];
        if class.bounds.is_some() {
            all.push(Prompts { bounds: class.bounds, ..Prompts::default() });
        } else if let (Some(labels), true) = (&self.previous, class.clicks.is_empty()) {
            let mask: Vec<u8> =
                memory::collected(LABELS, labels.iter().map(|l| u8::from(*l as usize == label)));
            if mask.contains(&1) {
                all.push(Prompts { dense: Some(Dense::Mask(mask)), ..Prompts::default() });
            }
        }
        all.extend(
            class.clicks.iter().map(|click| Prompts { points: vec![*click], ..Prompts::default() }),
        );
        all
    }

    /// The label of every voxel, `[i][j][k]`.
    fn segment(&self, model: &Arc<Model>) -> Result<Vec<u8>, String> {
        let normalization = normalization(&*self.volume, model.config().intensity);
        let scan =
            Arc::new(Scan::new(model, self.volume.clone(), normalization, Options::default()));
        let answers = (1..=self.classes.len())
            .map(|label| self.answer(&scan, label).map_err(|e| format!("class {label}: {e}")));
        let answers = answers.collect::<Result<Vec<Answer>, String>>()?;
        Ok(merge(self.volume.grid.size, &answers))
    }

    fn answer(&self, scan: &Arc<Scan>, label: usize) -> Result<Answer, SessionError> {
        let mut session = Session::new(scan);
        for prompts in self.prompts(label) {
            session.interact(&prompts)?;
        }
        let field = session
            .prediction()
            .map_or_else(|| Field::new(scan.grid().size, true), |p| p.field.clone());
        let clicked =
            session.said().iter().filter(|said| said.positive).map(|said| said.voxel).collect();
        Ok(Answer { field, clicked })
    }
}

/// The result of a session.
struct Answer {
    field: Field,
    /// Voxels that were said to be on the object.
    clicked: Vec<[usize; 3]>,
}

/// The labels of several answers: if several classes claim a voxel, the one with the highest logit
/// gets it, and of equals the first.
fn merge(size: [usize; 3], answers: &[Answer]) -> Vec<u8> {
    let [_, nj, nk] = size;
    let mut labels = memory::zeroed::<u8>(LABELS, size.iter().product());
    for (answer, label) in answers.iter().zip(1u8..=255) {
        answer.field.each(|at, logit| {
            let voxel = [at / nk / nj, at / nk % nj, at % nk];
            let rival = (labels[at] as usize)
                .checked_sub(1)
                .map_or(0.0, |rival| answers[rival].field.get(voxel));
            if logit > rival {
                labels[at] = label;
            }
        });
    }
    // A click holds, whatever other classes claim its voxel.
    for (answer, label) in answers.iter().zip(1u8..=255) {
        answer.clicked.iter().for_each(|[i, j, k]| labels[(i * nj + j) * nk + k] = label);
    }
    labels
}

/// The image, on a grid of which only the spacing is known.
fn image(file: &mut Npz) -> Result<Volume, VolumeError> {
    let array = file.array("imgs")?;
    let &[nk, nj, ni] = &array.shape[..] else {
        return Err(file
            .fail("imgs", &format!("has shape {:?}, expected three axes: z, y, x", array.shape)));
    };
    let size = [ni, nj, nk];
    let values = array.numbers(|v| v as f32).map_err(|e| file.fail("imgs", &e))?;
    // The challenge's images were written with the result of SimpleITK's GetSpacing, which is in
    // the order x, y, z, and not in the array's.
    let spacing = file.array("spacing")?.numbers(|v| v).map_err(|e| file.fail("spacing", &e))?;
    let affine = match spacing[..] {
        [x, y, z] if x > 0.0 && y > 0.0 && z > 0.0 => {
            Some(Affine::from_spacing([x, y, z])).filter(Affine::is_regular)
        }
        _ => None,
    };
    let unusable = || {
        file.fail(
            "spacing",
            &format!("is {spacing:?}, expected three numbers above 0: x, y, z in mm"),
        )
    };
    let affine = affine.ok_or_else(unusable)?;
    let grid = Grid { size, affine };
    let description = Description::of_new(&grid, array.dtype.name());
    Volume::new(grid, reorder(&values, size), description).map_err(|e| file.fail("imgs", &e))
}

/// The labels of the step before, if the file has them.
fn labels(file: &mut Npz, size: [usize; 3]) -> Result<Option<Vec<u8>>, VolumeError> {
    if !file.has("prev_pred") {
        return Ok(None);
    }
    let array = file.array("prev_pred")?;
    if array.shape != [size[2], size[1], size[0]] {
        return Err(file
            .fail("prev_pred", &format!("has shape {:?}, expected that of 'imgs'", array.shape)));
    }
    let values = array.numbers(|v| v as u8).map_err(|e| file.fail("prev_pred", &e))?;
    Ok(Some(reorder(&values, size)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::challenge::pickle::Value;

    /// A pickle of plain values, as the archive's arrays of objects may be.
    fn dump(value: &Value, out: &mut Vec<u8>) {
        match value {
            Value::Int(n) => out.extend([&b"J"[..], &(*n as i32).to_le_bytes()].concat()),
            Value::Text(text) => {
                out.extend([&[0x8c, text.len() as u8][..], text.as_bytes()].concat())
            }
            Value::List(items) => {
                out.extend(b"](");
                items.iter().for_each(|item| dump(item, out));
                out.push(b'e');
            }
            Value::Dict(pairs) => {
                out.extend(b"}(");
                pairs
                    .iter()
                    .for_each(|(key, value)| [key, value].into_iter().for_each(|v| dump(v, out)));
                out.push(b'u');
            }
            _ => out.push(b'N'),
        }
    }

    fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}");
        [&b"\x93NUMPY\x01\x00"[..], &(header.len() as u16).to_le_bytes(), header.as_bytes(), data]
            .concat()
    }

    fn objects_of(values: Vec<Value>) -> Vec<u8> {
        let mut pickle = b"\x80\x04".to_vec();
        dump(&Value::List(values), &mut pickle);
        pickle.push(b'.');
        npy("|O", "(2,)", &pickle)
    }

    fn dict(pairs: &[(&str, Value)]) -> Value {
        Value::Dict(
            pairs
                .iter()
                .map(|(key, value)| (Value::Text(key.to_string()), value.clone()))
                .collect(),
        )
    }

    fn click(z: i64, y: i64, x: i64) -> Value {
        Value::List([z, y, x].map(Value::Int).to_vec())
    }

    fn clicks() -> Value {
        dict(&[
            ("fg", Value::List(vec![click(0, 1, 3), click(1, 2, 0)])),
            ("bg", Value::List(vec![click(1, 0, 2)])),
        ])
    }

    fn a_box(z_max: i64) -> Value {
        let names =
            ["z_min", "z_max", "z_mid", "z_mid_x_min", "z_mid_x_max", "z_mid_y_min", "z_mid_y_max"];
        let values = [0, z_max, 0, 1, 3, 0, 9];
        dict(&names.iter().zip(values).map(|(name, v)| (*name, Value::Int(v))).collect::<Vec<_>>())
    }

    /// Reads a case of 4 by 3 by 2 voxels with these arrays.
    fn read(more: Vec<(&str, Vec<u8>)>) -> Result<Case, String> {
        let spacing = [0.5f64, 0.75, 2.0].iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let mut arrays = vec![
            ("imgs", of_bytes(&[2, 3, 4], &(0..24).collect::<Vec<u8>>())),
            ("spacing", npy("<f8", "(3,)", &spacing)),
        ];
        arrays.extend(more);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("case.npz");
        npz::write(&path, &arrays, true).unwrap().commit().unwrap();
        Case::read(&path).map_err(|e| e.to_string())
    }

    #[test]
    fn a_case_is_read_in_voxels_of_the_image() {
        let perfect = Value::List(vec![Value::None, Value::None, Value::None]);
        let kinds = Value::List(["bg", "fg", "fg"].map(|k| Value::Text(k.into())).to_vec());
        let empty = dict(&[("fg", Value::List(vec![])), ("bg", Value::List(vec![]))]);
        let case = read(vec![
            ("boxes", objects_of(vec![a_box(0), a_box(1)])),
            ("clicks", objects_of(vec![clicks(), empty])),
            ("clicks_order", objects_of(vec![kinds, perfect])),
        ])
        .unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(
            (case.volume.grid.size, case.volume.grid.spacing()),
            ([4, 3, 2], [0.5, 0.75, 2.0])
        );
        assert_eq!(
            (case.volume.at([1, 0, 0]), case.volume.at([0, 1, 0]), case.volume.at([0, 0, 1])),
            (1.0, 4.0, 12.0)
        );
        // The box ends with the image; ends are exclusive here.
        assert_eq!(case.classes[0].bounds, Some([1, 0, 0, 4, 3, 1]));
        assert_eq!(
            case.classes[0].clicks,
            [([2, 0, 1], false), ([3, 1, 0], true), ([0, 2, 1], true)]
        );
        assert_eq!(case.classes[1], Class { bounds: Some([1, 0, 0, 4, 3, 2]), clicks: vec![] });
        assert_eq!(
            (case.prompts(1).len(), case.prompts(2).len(), case.previous.is_none()),
            (4, 1, true)
        );
    }

    #[test]
    fn the_step_before_speaks_for_a_class_that_is_silent() {
        let mut labels = [0; 24];
        labels[13] = 2;
        let order = npy("<U2", "(1, 3)", b"f\0\0\0g\0\0\0b\0\0\0g\0\0\0f\0\0\0g\0\0\0");
        let empty = dict(&[("fg", Value::List(vec![])), ("bg", Value::List(vec![]))]);
        let clicks = objects_of(vec![clicks(), empty]);
        let case = read(vec![
            ("clicks", clicks),
            ("clicks_order", order),
            ("prev_pred", of_bytes(&[2, 3, 4], &labels)),
        ]);
        let case = case.unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(
            case.classes[0].clicks,
            [([3, 1, 0], true), ([2, 0, 1], false), ([0, 2, 1], true)]
        );
        // z 1, y 0, x 1.
        let Some(Dense::Mask(mask)) = &case.prompts(2)[0].dense else { panic!("no mask") };
        assert_eq!((mask.iter().position(|v| *v == 1), case.prompts(1).len()), (Some(6 + 1), 3));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let message = |more| read(more).err().unwrap_or_default();
        assert!(message(vec![]).contains("expected 'boxes'"));
        let odd = dict(&[("z_min", Value::Int(0))]);
        assert!(
            message(vec![("boxes", objects_of(vec![odd]))])
                .contains("'boxes': class 1: its box has no whole number 'z_mid_x_min'")
        );
        assert!(message(vec![("boxes", objects_of(vec![a_box(-1)]))]).contains("'z_max' is -1"));
        let far = dict(&[("fg", Value::List(vec![click(2, 0, 0)])), ("bg", Value::List(vec![]))]);
        assert!(
            message(vec![("clicks", objects_of(vec![far]))])
                .contains("z, y, x = 2, 0, 0 lies outside the image of 2, 3, 4")
        );
        let order = npy("<U2", "(1, 2)", b"b\0\0\0g\0\0\0b\0\0\0g\0\0\0");
        assert!(
            message(vec![("clicks", objects_of(vec![clicks()])), ("clicks_order", order)])
                .contains("more 'bg'")
        );
        assert!(message(vec![("prev_pred", of_bytes(&[24], &[1; 24]))]).contains("'prev_pred'"));
    }

    #[test]
    fn the_higher_logit_has_the_voxel_and_a_click_holds() {
        let size = [4, 1, 1];
        let answer = |values: [f32; 4], clicked: Vec<[usize; 3]>| {
            let mut field = Field::new(size, false);
            values.iter().enumerate().for_each(|(i, v)| field.set([i, 0, 0], *v));
            Answer { field, clicked }
        };
        let answers =
            [answer([1.0, 2.0, 1.0, -1.0], vec![[0, 0, 0]]), answer([3.0, 2.0, 3.0, 0.5], vec![])];
        assert_eq!(merge(size, &answers), [1, 1, 2, 2]);
    }
}
