//! Prompts in a JSON file: a list of iterations.

use super::{PromptError, RawBox, RawOutline, RawPoint};
use crate::input::read_text;
use crate::volume::labels::TargetLabel;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// One iteration of a prompts file. Files it names are relative to it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Iteration {
    /// Points.
    pub points: Vec<PointEntry>,
    /// `[i0, j0, k0, i1, j1, k1]`, ends exclusive; kept by later iterations until replaced.
    #[serde(rename = "box")]
    pub bounds: Option<[f64; 6]>,
    /// Lines across the object, from border to border.
    pub line: Vec<[f64; 6]>,
    /// A closed outline around the object on one slice.
    pub lasso: Vec<[f64; 3]>,
    /// A label image: 1 positive, 2 negative.
    pub scribble: Option<PathBuf>,
    /// A mask to start this iteration from instead of the previous answer.
    pub mask: Option<PathBuf>,
    /// Which of the mask's labels is the object.
    pub mask_label: TargetLabel,
    /// A mask of other objects, which the answer never enters.
    pub others: Option<PathBuf>,
}

/// A point: `{"position": [i, j, k], "positive": true}`; `positive` defaults to true.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointEntry {
    /// Three coordinates.
    pub position: [f64; 3],
    /// Whether it lies on the object.
    #[serde(default = "yes")]
    pub positive: bool,
}

fn yes() -> bool {
    true
}

impl Iteration {
    /// The points as given on a command line.
    pub fn raw_points(&self) -> impl Iterator<Item = RawPoint> {
        self.points.iter().map(|p| RawPoint { position: p.position, positive: p.positive })
    }

    /// Lines as given on a command line.
    pub fn raw_lines(&self) -> impl Iterator<Item = RawBox> {
        self.line.iter().copied().map(RawBox)
    }

    /// The outline as given on a command line, where there is one.
    pub fn raw_outlines(&self) -> impl Iterator<Item = RawOutline> {
        (!self.lasso.is_empty()).then(|| RawOutline(self.lasso.clone())).into_iter()
    }

    /// The box as given on a command line.
    pub fn raw_box(&self) -> Option<RawBox> {
        self.bounds.map(RawBox)
    }
}

/// Reads a prompts file: a JSON list with at least one iteration.
pub fn read_iterations(path: &Path) -> Result<Vec<Iteration>, PromptError> {
    let fail = |m: String| PromptError(format!("{}: {m}", path.display()));
    let text = read_text(path, "a JSON list of iterations").map_err(fail)?;
    let mut list: Vec<Iteration> =
        serde_json::from_str(&text).map_err(|e| fail(format!("not a list of iterations: {e}")))?;
    if list.is_empty() {
        return Err(fail("it holds no iteration".into()));
    }
    for file in
        list.iter_mut().flat_map(|i| [&mut i.scribble, &mut i.mask, &mut i.others]).flatten()
    {
        if let Some(folder) = path.parent() {
            *file = folder.join(&*file);
        }
    }
    Ok(list)
}
