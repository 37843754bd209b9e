//! Lists of cases on disk: the layouts of public datasets, a CSV, and how they are split.

use crate::input::read_text;
use crate::prompt::simulate::generator;
use crate::volume::labels::Labels;
pub use crate::volume::labels::TargetLabel;
use crate::volume::{Modality, Volume, VolumeError};
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
    /// Whether the reason is lack of memory.
    pub(crate) refused: bool,
}

impl DataError {
    /// An error about a file or folder.
    pub fn new(path: &Path, message: impl Into<String>) -> DataError {
        DataError { path: path.into(), message: message.into(), refused: false }
    }

    /// This error, with lack of memory as its reason if `refused` says so.
    pub(crate) fn for_lack_of_memory(self, refused: bool) -> DataError {
        DataError { refused, ..self }
    }
}

/// A scan and its label image.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// The case's name in splits and tables.
    pub name: String,
    /// The scan.
    pub image: PathBuf,
    /// The label image, on the scan's grid.
    pub label: PathBuf,
    /// Which volume of a scan that holds several, from 0.
    pub volume: Option<usize>,
    /// The modality of the scan, if the dataset states it.
    pub modality: Option<Modality>,
}

/// The most labels that a message lists.
const SHOWN: usize = 20;

/// A case in memory.
pub struct Loaded {
    /// The scan.
    pub image: Volume,
    /// 1 where the object is, `[i][j][k]` on the scan's grid.
    pub mask: Vec<u8>,
    /// What was odd about the files and how it was interpreted.
    pub warnings: Vec<String>,
}

impl Case {
    /// Reads the scan and its label image.
    ///
    /// # Errors
    /// A file cannot be read, the label image does not fit the scan, or it contains nothing of the
    /// object; the message names the file.
    pub fn read(&self, target: &TargetLabel) -> Result<Loaded, DataError> {
        let about = |path: &Path, e: &VolumeError| {
            DataError::new(path, strip(e, path)).for_lack_of_memory(e.refused)
        };
        let of_image = |e: VolumeError| {
            let message = strip(&e, &self.image).replace("--volume", "--channel");
            DataError::new(&self.image, message).for_lack_of_memory(e.refused)
        };
        let mut image = Volume::read(&self.image, self.volume).map_err(of_image)?;
        image.description.modality = self.modality.or(image.description.modality);
        let labels = Labels::beside(&self.label, &image).map_err(|e| about(&self.label, &e))?;
        let mask = labels.mask(target).map_err(|e| about(&self.label, &e))?;
        if mask.iter().all(|v| *v == 0) {
            let wanted = if *target == TargetLabel::Any {
                "above 0".to_string()
            } else {
                target.to_string()
            };
            let counts = labels.counts();
            let present: Vec<u32> = counts.keys().copied().take(SHOWN).collect();
            let more = if counts.len() > SHOWN { " and more" } else { "" };
            return Err(DataError::new(
                &self.label,
                format!("no voxel has label {wanted}: it holds {present:?}{more}"),
            ));
        }
        let mut warnings: Vec<String> =
            image.warnings.iter().map(|w| format!("{}: {w}", self.image.display())).collect();
        let several = labels.several("--target").filter(|_| *target == TargetLabel::Any);
        warnings.extend(
            labels
                .warnings
                .iter()
                .cloned()
                .chain(several)
                .map(|w| format!("{}: {w}", self.label.display())),
        );
        Ok(Loaded { image, mask, warnings })
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

/// The Medical Segmentation Decathlon's file; nnU-Net's second version has no list.
#[derive(Deserialize)]
struct Msd {
    training: Option<Vec<MsdEntry>>,
    /// The modality of each channel, by its number as text: the decathlon's word for it, and
    /// nnU-Net's. Other values are ignored.
    modality: Option<serde_json::Value>,
    channel_names: Option<serde_json::Value>,
}

impl Msd {
    /// The modality of a channel.
    fn modality(&self, channel: Option<usize>) -> Option<Modality> {
        let number = channel.unwrap_or(0).to_string();
        let name = |of: &Option<serde_json::Value>| {
            Some(of.as_ref()?.get(&number)?.as_str()?.to_lowercase())
        };
        let name = name(&self.channel_names).or_else(|| name(&self.modality))?;
        let is = |words: &[&str]| words.iter().any(|w| name.contains(w));
        if is(&["pet", "suv"]) {
            Some(Modality::Pet)
        } else if name == "ct" {
            Some(Modality::Ct)
        } else {
            is(&["mr", "t1", "t2", "flair", "adc"]).then_some(Modality::Mr)
        }
    }
}

#[derive(Deserialize)]
struct Row {
    image: PathBuf,
    label: PathBuf,
    name: Option<String>,
    #[serde(default)]
    modality: Option<Modality>,
}

/// The endings of image files.
const ENDINGS: [&str; 8] =
    [".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".nhdr", ".mha", ".mhd", ".nii.bz2"];

/// A file's name without the ending of an image.
fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let ending = ending(&name).map_or(0, str::len);
    name[..name.len() - ending].to_string()
}

/// The ending of an image's name, case-insensitively.
fn ending(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_lowercase();
    ENDINGS.into_iter().find(|e| name.ends_with(e))
}

/// The cases of a dataset on disk, sorted by name.
///
/// A dataset is a CSV file with columns `image,label[,name][,modality]` (paths from its folder; ct,
/// mr or pet), or a folder laid out as MSD (`dataset.json`, or `imagesTr` and `labelsTr`), nnU-Net
/// (`imagesTr/CASE_0000.nii.gz` and `labelsTr/CASE.nii.gz`), LiTS (`volume-N.nii` and
/// `segmentation-N.nii`, at any depth), KiTS (`CASE/imaging.nii.gz` and
/// `CASE/segmentation.nii.gz`), or one folder per case (`CASE/image.nii.gz` and
/// `CASE/label.nii.gz`). `channel` picks one (from 0) of scans that have several: volumes of a
/// file, or nnU-Net's files.
///
/// # Errors
/// The file or folder cannot be read, has none of these layouts, or two cases have the same name.
pub fn list(path: &Path, channel: Option<usize>) -> Result<Vec<Case>, DataError> {
    let mut cases = if path.is_file() { from_csv(path)? } else { from_folder(path, channel)? };
    cases.iter_mut().for_each(|c| c.volume = c.volume.or(channel));
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = cases.windows(2).find(|p| p[0].name == p[1].name) {
        return Err(DataError::new(path, format!("two cases are called '{}'", pair[0].name)));
    }
    if cases.is_empty() {
        let layouts = "dataset.json, imagesTr/labelsTr, volume-N/segmentation-N, CASE/imaging+segmentation, CASE/image+label";
        return Err(DataError::new(
            path,
            format!("no cases: expected a CSV, or a folder laid out as one of {layouts}"),
        ));
    }
    Ok(cases)
}

fn from_csv(path: &Path) -> Result<Vec<Case>, DataError> {
    let expected = "a CSV with columns image,label[,name]";
    let text = read_text(path, expected).map_err(|e| DataError::new(path, e))?;
    let fail = |e: csv::Error| DataError::new(path, format!("is not {expected}: {e}"));
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(text.as_bytes());
    let base = path.parent().unwrap_or(Path::new("."));
    let case = |row: Row| Case {
        name: row.name.unwrap_or_else(|| row.image.display().to_string()),
        image: base.join(row.image),
        label: base.join(row.label),
        volume: None,
        modality: row.modality,
    };
    reader.deserialize().map(|row| row.map(case).map_err(fail)).collect()
}

fn from_folder(path: &Path, channel: Option<usize>) -> Result<Vec<Case>, DataError> {
    let json = path.join("dataset.json");
    let mut modality = None;
    if json.is_file() {
        let text = read_text(&json, "JSON").map_err(|e| DataError::new(&json, e))?;
        let msd: Msd = serde_json::from_str(&text).map_err(|e| {
            DataError::new(&json, format!("no list 'training' of images and labels: {e}"))
        })?;
        modality = msd.modality(channel);
        if let Some(training) = msd.training {
            let case = |e: MsdEntry| Case {
                name: stem(&e.image),
                image: path.join(e.image),
                label: path.join(e.label),
                volume: None,
                modality,
            };
            return Ok(training.into_iter().map(case).collect());
        }
    }
    let files = below(path)?;
    let image =
        |p: &&PathBuf| p.file_name().is_some_and(|n| ending(&n.to_string_lossy()).is_some());
    let images: BTreeMap<PathBuf, PathBuf> =
        files.iter().filter(image).map(|p| (p.with_file_name(stem(p)), p.clone())).collect();
    let mut cases = vec![];
    let mut channels: BTreeMap<(String, PathBuf), Vec<(usize, PathBuf)>> = BTreeMap::new();
    for file in &files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') || ending(&name).is_none() {
            continue;
        }
        let named = |stem: &str, folder: &Path| images.get(&folder.join(stem)).cloned();
        let parent = file.parent().unwrap_or(Path::new(""));
        let folder =
            || parent.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let stem = stem(file);
        let found = match stem.as_str() {
            "imaging" => named("segmentation", parent).map(|label| (folder(), label)),
            "image" => named("label", parent).map(|label| (folder(), label)),
            _ if stem.starts_with("volume-") => {
                named(&stem.replacen("volume-", "segmentation-", 1), parent)
                    .map(|label| (stem.clone(), label))
            }
            _ if folder() == "imagesTr" => {
                let labels = parent.with_file_name("labelsTr");
                let whole = named(&stem, &labels);
                if let (None, Some((case, number))) = (&whole, numbered(&stem))
                    && let Some(label) = named(case, &labels)
                {
                    channels
                        .entry((case.to_string(), label))
                        .or_default()
                        .push((number, file.clone()));
                }
                whole.map(|label| (stem.clone(), label))
            }
            _ => None,
        };
        cases.extend(found.map(|(name, label)| Case {
            name,
            image: file.clone(),
            label,
            volume: None,
            modality,
        }));
    }
    for ((name, label), files) in channels {
        let numbers: Vec<String> = files.iter().map(|(n, _)| n.to_string()).collect();
        let chosen = match channel {
            None if files.len() > 1 => {
                let message = format!(
                    "case {name} has the channels {}: select one with --channel",
                    numbers.join(", ")
                );
                return Err(DataError::new(path, message));
            }
            None => files.first(),
            Some(channel) => files.iter().find(|(n, _)| *n == channel),
        };
        let Some((_, image)) = chosen else {
            let message = format!(
                "case {name} has no channel {}: it has {}",
                channel.unwrap_or(0),
                numbers.join(", ")
            );
            return Err(DataError::new(path, message));
        };
        // The file is the channel.
        cases.push(Case { name, image: image.clone(), label, volume: Some(0), modality });
    }
    Ok(cases)
}

/// The case and the channel of nnU-Net's `CASE_0000`.
fn numbered(stem: &str) -> Option<(&str, usize)> {
    let (case, number) = stem.rsplit_once('_')?;
    (number.len() == 4 && !case.is_empty()).then_some(())?;
    Some((case, number.parse().ok()?))
}

/// Every file below a folder. A link to a folder that is being searched, or was, is not followed
/// again.
fn below(path: &Path) -> Result<BTreeSet<PathBuf>, DataError> {
    let mut files = BTreeSet::new();
    let mut folders = vec![path.to_path_buf()];
    let mut seen = BTreeSet::new();
    while let Some(at) = folders.pop() {
        if !seen.insert(at.canonicalize().map_err(|e| DataError::new(&at, e.to_string()))?) {
            continue;
        }
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

/// Names of cases by their purpose.
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
    /// A split drawn by seed: 0.7 of the cases for training, 0.1 for validation, 0.2 for testing;
    /// at least one for validation if there are two.
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
        let sorted =
            |v: &[String]| v.iter().cloned().collect::<BTreeSet<_>>().into_iter().collect();
        Split { train: sorted(&names), validation: sorted(validation), test: sorted(test) }
    }

    /// Reads a split from a JSON file, `{"train": [names], "validation": [names], "test":
    /// [names]}`.
    ///
    /// # Errors
    /// The file cannot be read or has another form, or a name is no case or is in two parts.
    pub fn read(path: &Path, cases: &[Case]) -> Result<Split, DataError> {
        let text = read_text(path, "JSON").map_err(|e| DataError::new(path, e))?;
        let expected = r#"expected {"train": [names], "validation": [names], "test": [names]}"#;
        let split: Split = serde_json::from_str(&text)
            .map_err(|e| DataError::new(path, format!("{expected}: {e}")))?;
        let known: BTreeSet<&str> = cases.iter().map(|c| c.name.as_str()).collect();
        let mut seen = BTreeMap::new();
        for (part, names) in
            [("train", &split.train), ("validation", &split.validation), ("test", &split.test)]
        {
            for name in names {
                if !known.contains(name.as_str()) {
                    return Err(DataError::new(
                        path,
                        format!("'{name}' in {part} is not a case of the dataset"),
                    ));
                }
                if let Some(other) = seen.insert(name.clone(), part) {
                    return Err(DataError::new(
                        path,
                        format!("'{name}' is in {other} and in {part}"),
                    ));
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
