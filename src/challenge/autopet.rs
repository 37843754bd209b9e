//! autoPET V: lesions in a PET/CT scan, from clicks and scribbles.
//!
//! A case is a folder with `images/ct/ID.mha`, `images/pet/ID.mha` and `lesion-clicks.json`; its
//! answer is `images/tumor-lesion-segmentation/ID.mha`. The network has one channel: it is given
//! the PET, in which lesions are bright, and the CT is not read. All clicks, which are voxels x, y,
//! z of the PET and accumulate from call to call, are given in one interaction.

use super::Outcome;
use crate::input::read_text;
use crate::memory;
use crate::model::Model;
use crate::output::make_folder;
use crate::prompt::Prompts;
use crate::session::{Note, Options, Scan, Session, intensities_of};
use crate::volume::{Modality, Volume, VolumeError, metaimage};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The places of a case's PET, its clicks and its answer.
const PET: &str = "images/pet";
const CLICKS: &str = "lesion-clicks.json";
const ANSWER: &str = "images/tumor-lesion-segmentation";

/// The file of clicks.
#[derive(Deserialize)]
struct Clicks {
    points: Vec<Click>,
}

#[derive(Deserialize)]
struct Click {
    /// `tumor` or `background`.
    name: String,
    /// Voxel x, y, z.
    point: [f64; 3],
}

/// Segments the case in the folder `input`, and writes the answer below the folder `output`.
///
/// # Errors
/// A file of the case is missing, damaged or has another form; the session fails; the answer cannot
/// be written. The error names the file.
pub fn run(model: &Arc<Model>, input: &Path, output: &Path) -> Result<Outcome, VolumeError> {
    let path = only(&input.join(PET))?;
    let image = metaimage::read(&path)?;
    let clicks = input.join(CLICKS);
    let text = read_text(&clicks, "JSON").map_err(|e| VolumeError::new(&clicks, e))?;
    let points = points(&text, image.volume.grid.size).map_err(|e| VolumeError::new(&clicks, e))?;
    let mut warnings: Vec<String> =
        image.volume.warnings.iter().map(|w| format!("{}: {w}", path.display())).collect();
    let (mask, notes) =
        segment(model, &image.volume, points).map_err(|e| VolumeError::new(&path, e))?;
    warnings.extend(notes.iter().map(|n| format!("{}: {n}", clicks.display())));
    let folder = output.join(ANSWER);
    make_folder(&folder).map_err(|e| VolumeError::new(&folder, e.to_string()))?;
    let output = folder.join(path.file_name().unwrap_or_default());
    metaimage::write_mask(&output, &image, &mask)?
        .commit()
        .map_err(|e| VolumeError::new(&output, e.to_string()))?;
    let scan = intensities_of(&*image.volume, Some(Modality::Pet), model.config().intensity).why();
    Ok(Outcome {
        output,
        objects: 1,
        voxels: mask.iter().filter(|v| **v != 0).count(),
        scan,
        warnings,
    })
}

/// The one MetaImage file of a folder.
fn only(folder: &Path) -> Result<PathBuf, VolumeError> {
    let fail = |e: std::io::Error| VolumeError::new(folder, e.to_string());
    let mut found = vec![];
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("mha")) {
            found.push(path);
        }
    }
    match (found.pop(), found.len()) {
        (Some(path), 0) => Ok(path),
        (last, more) => {
            let count = more + usize::from(last.is_some());
            Err(VolumeError::new(
                folder,
                format!("holds {count} .mha files, expected one: the clicks belong to one case"),
            ))
        }
    }
}

/// The clicks of a file, as voxels of an image of `size`.
fn points(text: &str, size: [usize; 3]) -> Result<Vec<([usize; 3], bool)>, String> {
    let clicks: Clicks = serde_json::from_str(text)
        .map_err(|e| format!("{e}; expected {{\"points\": [{{\"name\": \"tumor\" or \"background\", \"point\": [x, y, z]}}]}}"))?;
    let one = |(at, click): (usize, Click)| {
        let positive = match click.name.as_str() {
            "tumor" => true,
            "background" => false,
            other => {
                return Err(format!(
                    "point {at} is named '{other}', expected 'tumor' or 'background'"
                ));
            }
        };
        if (0..3).any(|a| {
            click.point[a].fract() != 0.0
                || click.point[a] < 0.0
                || click.point[a] >= size[a] as f64
        }) {
            return Err(format!(
                "point {at} is {:?}, expected voxel indices x, y, z within the image of {size:?}",
                click.point
            ));
        }
        Ok((click.point.map(|c| c as usize), positive))
    };
    clicks.points.into_iter().enumerate().map(one).collect()
}

/// The mask `[i][j][k]` of the object that the clicks point at, empty if there are none, and notes
/// about it.
fn segment(
    model: &Arc<Model>,
    volume: &Arc<Volume>,
    points: Vec<([usize; 3], bool)>,
) -> Result<(Vec<u8>, Vec<Note>), String> {
    if points.is_empty() {
        let empty = memory::caught(|| memory::zeroed("a mask", volume.grid.voxels()))
            .map_err(|e| e.to_string())?;
        return Ok((empty, vec![Note::OnlyDenied]));
    }
    let normalization =
        intensities_of(&**volume, Some(Modality::Pet), model.config().intensity).normalization;
    let scan = Arc::new(Scan::new(model, volume.clone(), normalization, Options::default()));
    let mut session = Session::new(&scan);
    let prediction =
        session.interact(&Prompts { points, ..Prompts::default() }).map_err(|e| e.to_string())?;
    let notes = prediction.notes.clone();
    Ok((session.mask(), notes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clicks_are_voxels_of_the_pet() {
        let text = r#"{"type": "x", "points": [{"name": "tumor", "point": [3, 0, 1.0]}, {"name": "background", "point": [0, 2, 0]}]}"#;
        assert_eq!(points(text, [4, 3, 2]).unwrap(), [([3, 0, 1], true), ([0, 2, 0], false)]);
        assert!(points(r#"{"points": []}"#, [4, 3, 2]).unwrap().is_empty());
        let message = |text: &str| points(text, [4, 3, 2]).unwrap_err();
        assert!(
            message(r#"{"points": [{"name": "liver", "point": [0, 0, 0]}]}"#).contains("'liver'")
        );
        for point in ["[4, 0, 0]", "[0, -1, 0]", "[0, 0, 0.5]"] {
            assert!(
                message(&format!(r#"{{"points": [{{"name": "tumor", "point": {point}}}]}}"#))
                    .contains("expected voxel indices")
            );
        }
        assert!(message("[]").contains("\"points\""));
    }

    #[test]
    fn a_case_has_one_image() {
        let folder = tempfile::tempdir().unwrap();
        assert!(only(&folder.path().join("pet")).is_err());
        assert!(only(folder.path()).unwrap_err().to_string().contains("holds 0 .mha files"));
        std::fs::write(folder.path().join("a.mha"), "").unwrap();
        std::fs::write(folder.path().join("a.json"), "").unwrap();
        assert_eq!(only(folder.path()).unwrap(), folder.path().join("a.mha"));
        std::fs::write(folder.path().join("b.mha"), "").unwrap();
        assert!(only(folder.path()).unwrap_err().to_string().contains("holds 2 .mha files"));
    }
}
