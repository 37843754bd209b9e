//! Lists of cases on disk: the layouts of public datasets, a CSV, and how they are split.

use crate::prompt::simulate::generator;
use crate::volume::Volume;
use rand::RngExt;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Why a dataset cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {message}")]
pub struct DataError {
    path: PathBuf,
    message: String,
}

impl DataError {
    /// An error about a file or folder.
    pub fn new(path: &Path, message: impl Into<String>) -> DataError {
        DataError { path: path.into(), message: message.into() }
    }
}

/// A scan and its label image.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// What it is called in splits and tables.
    pub name: String,
    /// The scan.
    pub image: PathBuf,
    /// The label image, on the scan's grid.
    pub label: PathBuf,
}

/// Which label values are the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TargetLabel {
    /// Every value above 0.
    Any,
    /// One value.
    Value(u32),
}

impl TargetLabel {
    /// 1 where `labels` hold the object.
    pub fn mask(self, labels: &[u32]) -> Vec<u8> {
        let is = |l: &u32| match self {
            TargetLabel::Any => *l > 0,
            TargetLabel::Value(v) => *l == v,
        };
        labels.iter().map(|l| u8::from(is(l))).collect()
    }
}

impl std::str::FromStr for TargetLabel {
    type Err = String;
    fn from_str(text: &str) -> Result<TargetLabel, String> {
        match text {
            "any" => Ok(TargetLabel::Any),
            _ => text.parse().map(TargetLabel::Value).map_err(|_| "expected 'any' or a label value".to_string()),
        }
    }
}

impl Case {
    /// Reads scan and label; an error names the file, also where the label image holds nothing of the object.
    pub fn read(&self, target: TargetLabel) -> Result<(Volume, Vec<u8>), DataError> {
        let image = Volume::read(&self.image, None).map_err(|e| DataError::new(&self.image, strip(&e, &self.image)))?;
        let labels = Volume::read_labels(&self.label, &image.grid).map_err(|e| DataError::new(&self.label, strip(&e, &self.label)))?;
        let mask = target.mask(&labels);
        if mask.iter().all(|v| *v == 0) {
            let present: BTreeSet<u32> = labels.iter().copied().collect();
            let wanted = match target {
                TargetLabel::Any => "above 0".to_string(),
                TargetLabel::Value(v) => v.to_string(),
            };
            return Err(DataError::new(&self.label, format!("no voxel has label {wanted}: it holds {present:?}")));
        }
        Ok((image, mask))
    }
}

/// An error's text without the file name it starts with.
fn strip(e: &impl std::fmt::Display, path: &Path) -> String {
    let text = e.to_string();
    text.strip_prefix(&format!("{}: ", path.display())).map(str::to_string).unwrap_or(text)
}

#[derive(Deserialize)]
struct MsdEntry {
    image: PathBuf,
    label: PathBuf,
}

#[derive(Deserialize)]
struct Msd {
    training: Vec<MsdEntry>,
}

#[derive(Deserialize)]
struct Row {
    image: PathBuf,
    label: PathBuf,
    name: Option<String>,
}

/// A file's name without `.nii` or `.nii.gz`.
fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.trim_end_matches(".gz").trim_end_matches(".nii").to_string()
}

/// The cases of a dataset: a CSV file with columns `image,label[,name]` (paths from its folder), or a folder laid out as MSD (`dataset.json`, or `imagesTr` and
/// `labelsTr`), LiTS (`volume-N.nii` and `segmentation-N.nii`, at any depth), KiTS (`CASE/imaging.nii.gz` and `CASE/segmentation.nii.gz`), or one folder a case
/// (`CASE/image.nii.gz` and `CASE/label.nii.gz`). Sorted by name.
pub fn list(path: &Path) -> Result<Vec<Case>, DataError> {
    let mut cases = if path.is_file() { from_csv(path)? } else { from_folder(path)? };
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = cases.windows(2).find(|p| p[0].name == p[1].name) {
        return Err(DataError::new(path, format!("two cases are called '{}'", pair[0].name)));
    }
    if cases.is_empty() {
        let layouts = "dataset.json, imagesTr/labelsTr, volume-N/segmentation-N, CASE/imaging+segmentation, CASE/image+label";
        return Err(DataError::new(path, format!("no cases: expected a CSV, or a folder laid out as one of {layouts}")));
    }
    Ok(cases)
}

fn from_csv(path: &Path) -> Result<Vec<Case>, DataError> {
    let fail = |e: csv::Error| DataError::new(path, format!("not a readable CSV with columns image,label[,name]: {e}"));
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_path(path).map_err(fail)?;
    let base = path.parent().unwrap_or(Path::new("."));
    let case = |row: Row| Case {
        name: row.name.unwrap_or_else(|| row.image.display().to_string()),
        image: base.join(row.image),
        label: base.join(row.label),
    };
    reader.deserialize().map(|row| row.map(case).map_err(fail)).collect()
}

fn from_folder(path: &Path) -> Result<Vec<Case>, DataError> {
    let json = path.join("dataset.json");
    if json.is_file() {
        let text = std::fs::read_to_string(&json).map_err(|e| DataError::new(&json, e.to_string()))?;
        let msd: Msd =
            serde_json::from_str(&text).map_err(|e| DataError::new(&json, format!("no list 'training' of images and labels: {e}")))?;
        let case = |e: MsdEntry| Case { name: stem(&e.image), image: path.join(e.image), label: path.join(e.label) };
        return Ok(msd.training.into_iter().map(case).collect());
    }
    let files = below(path)?;
    let mut cases = vec![];
    for file in &files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') || !(name.ends_with(".nii") || name.ends_with(".nii.gz")) {
            continue;
        }
        let beside = |other: &str| {
            [format!("{other}.nii.gz"), format!("{other}.nii")].map(|n| file.with_file_name(n)).into_iter().find(|p| files.contains(p))
        };
        let folder = || file.parent().and_then(Path::file_name).map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let stem = stem(file);
        let found = match stem.as_str() {
            "imaging" => beside("segmentation").map(|label| (folder(), label)),
            "image" => beside("label").map(|label| (folder(), label)),
            _ if stem.starts_with("volume-") => beside(&stem.replacen("volume-", "segmentation-", 1)).map(|label| (stem.clone(), label)),
            _ if folder() == "imagesTr" => {
                let label = file.parent().and_then(Path::parent).map(|p| p.join("labelsTr").join(&name));
                label.filter(|l| files.contains(l)).map(|label| (stem.clone(), label))
            }
            _ => None,
        };
        cases.extend(found.map(|(name, label)| Case { name, image: file.clone(), label }));
    }
    Ok(cases)
}

/// Every file below a folder.
fn below(path: &Path) -> Result<BTreeSet<PathBuf>, DataError> {
    let mut files = BTreeSet::new();
    let mut folders = vec![path.to_path_buf()];
    while let Some(at) = folders.pop() {
        for entry in std::fs::read_dir(&at).map_err(|e| DataError::new(&at, e.to_string()))? {
            let path = entry.map_err(|e| DataError::new(&at, e.to_string()))?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.insert(path);
            }
        }
    }
    Ok(files)
}

/// Names of cases by what they are for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// To learn from.
    pub train: Vec<String>,
    /// To choose the best checkpoint by.
    pub validation: Vec<String>,
    /// To report on.
    #[serde(default)]
    pub test: Vec<String>,
}

impl Split {
    /// 0.7 / 0.1 / 0.2 of the cases, by seed; at least one for validation where there are two.
    pub fn by_seed(cases: &[Case], seed: u64) -> Split {
        let mut names: Vec<String> = cases.iter().map(|c| c.name.clone()).collect();
        names.sort();
        let mut rng = generator(seed, &[0x73_70_6c_69_74]);
        for i in (1..names.len()).rev() {
            names.swap(i, rng.random_range(0..=i));
        }
        let n = names.len();
        let validation = ((n as f64 * 0.1).round() as usize).max(usize::from(n > 1));
        let test = ((n as f64 * 0.2).round() as usize).min(n - validation);
        let tail = names.split_off(n - validation - test);
        let (validation, test) = tail.split_at(validation);
        let sorted = |v: &[String]| v.iter().cloned().collect::<BTreeSet<_>>().into_iter().collect();
        Split { train: sorted(&names), validation: sorted(validation), test: sorted(test) }
    }

    /// Reads a JSON file and checks that every name is a case, in one part only.
    pub fn read(path: &Path, cases: &[Case]) -> Result<Split, DataError> {
        let text = std::fs::read_to_string(path).map_err(|e| DataError::new(path, e.to_string()))?;
        let expected = r#"expected {"train": [names], "validation": [names], "test": [names]}"#;
        let split: Split = serde_json::from_str(&text).map_err(|e| DataError::new(path, format!("{expected}: {e}")))?;
        let known: BTreeSet<&str> = cases.iter().map(|c| c.name.as_str()).collect();
        let mut seen = BTreeMap::new();
        for (part, names) in [("train", &split.train), ("validation", &split.validation), ("test", &split.test)] {
            for name in names {
                if !known.contains(name.as_str()) {
                    return Err(DataError::new(path, format!("'{name}' in {part} is no case of the dataset")));
                }
                if let Some(other) = seen.insert(name.clone(), part) {
                    return Err(DataError::new(path, format!("'{name}' is in {other} and in {part}")));
                }
            }
        }
        Ok(split)
    }

    /// The cases that `names` lists.
    pub fn select(cases: &[Case], names: &[String]) -> Vec<Case> {
        cases.iter().filter(|c| names.contains(&c.name)).cloned().collect()
    }
}
