//! The prompts for each object: flags and files become prompts on the image.

use super::Segment;
use crate::cli::Failure;
use crate::memory;
use crate::prompt::{Dense, Iteration, PromptError, PromptedObject, Prompts};
use crate::volume::labels::{Labels, TargetLabel};
use crate::volume::{Grid, LabelledObject, Volume};
use std::path::Path;

/// The name of an object that was given none.
pub(super) const UNNAMED: &str = "object";

/// An object, and its prompts on the image.
pub(super) struct Asked {
    pub(super) name: Option<String>,
    pub(super) colour: Option<[u8; 3]>,
    /// The prompts of each iteration.
    pub(super) prompts: Vec<Prompts>,
}

impl Asked {
    /// A text about this object, which includes its name if it has one.
    pub(super) fn about(&self, text: &str) -> String {
        self.name.as_ref().map_or(text.to_string(), |name| format!("'{name}': {text}"))
    }

    pub(super) fn labelled(&self) -> LabelledObject {
        let name = self.name.clone().unwrap_or_else(|| UNNAMED.into());
        LabelledObject { name, colour: self.colour }
    }
}

impl Segment {
    /// The prompts for every object, on the image.
    pub(super) fn asked(
        &self,
        objects: Vec<PromptedObject>,
        image: &Volume,
        warnings: &mut Vec<String>,
    ) -> Result<Vec<Asked>, Failure> {
        let mut asked = vec![];
        for PromptedObject { name, colour, iterations } in objects {
            let mut object = Asked { name, colour, prompts: vec![] };
            object.prompts =
                self.iterations(&iterations, image, warnings).map_err(|e| match e {
                    Failure::Failed(m) => Failure::Failed(object.about(&m)),
                    e => e,
                })?;
            asked.push(object);
        }
        Ok(asked)
    }

    /// The prompts of an iteration that are given as numbers, on a scan of that size and place.
    pub(super) fn in_numbers(&self, i: &Iteration, grid: &Grid) -> Result<Prompts, PromptError> {
        let mut prompts = Prompts::default();
        for point in self.point.iter().copied().chain(i.raw_points()) {
            prompts.add_point(grid, point, self.space)?;
        }
        if let Some(b) = self.bounds.or(i.raw_box()) {
            prompts.set_box(grid, b, self.space)?;
        }
        for line in self.line.iter().copied().chain(i.raw_lines()) {
            prompts.add_line(grid, line, self.space)?;
        }
        for outline in self.lasso.iter().cloned().chain(i.raw_outlines()) {
            prompts.add_lasso(grid, &outline, self.space)?;
        }
        Ok(prompts)
    }

    /// The prompts of every iteration on an object, on the image.
    fn iterations(
        &self,
        list: &[Iteration],
        image: &Volume,
        warnings: &mut Vec<String>,
    ) -> Result<Vec<Prompts>, Failure> {
        let mut read = |path: &Path| -> Result<Labels, Failure> {
            let labels = Labels::beside(path, image)?;
            warnings.extend(labels.warnings.iter().map(|w| format!("{}: {w}", path.display())));
            Ok(labels)
        };
        let mut joined = vec![];
        let mut one = |i: &Iteration| -> Result<Prompts, Failure> {
            let mut prompts = self.in_numbers(i, &image.grid)?;
            if let Some(path) = &i.others {
                let labels = read(path)?.joined();
                let marked = labels.iter().map(|l| u8::from(*l != 0));
                prompts.others = Some(memory::collected("a mask of other objects", marked));
            }
            if let Some(path) = &i.scribble {
                let labels = read(path)?.joined();
                let fail = |e| Failure::Failed(format!("{}: {e}", path.display()));
                prompts.add_scribble(&image.grid, &labels).map_err(fail)?;
            }
            if let Some(path) = &i.mask {
                let labels = read(path)?;
                let mask = labels.mask(&i.mask_label)?;
                match (&i.mask_label, labels.several("--mask-label")) {
                    (TargetLabel::Any, several) => {
                        joined.extend(several.map(|w| format!("{}: {w}", path.display())))
                    }
                    (label, _) if mask.iter().all(|v| *v == 0) => {
                        let values: Vec<u32> = labels.counts().into_keys().collect();
                        let message = format!(
                            "{}: no voxel has label {label}: it holds {values:?}",
                            path.display()
                        );
                        return Err(Failure::Failed(message));
                    }
                    _ => {}
                }
                prompts.dense = Some(Dense::Mask(mask));
            }
            Ok(prompts)
        };
        let several = self.prompts.is_some();
        let named = |(at, e): (usize, Failure)| match (e, several) {
            (Failure::Failed(m), true) => Failure::Failed(format!("iteration {}: {m}", at + 1)),
            (e, _) => e,
        };
        let prompts = list
            .iter()
            .enumerate()
            .map(|(at, i)| one(i).map_err(|e| named((at, e))))
            .collect::<Result<Vec<_>, _>>()?;
        warnings.extend(joined);
        match prompts.iter().position(Prompts::is_empty) {
            Some(at) if at == 0 || self.prompts.is_none() => Err(Failure::Failed(format!(
                "iteration {} is empty: its prompts mark no voxel",
                at + 1
            ))),
            _ => Ok(prompts),
        }
    }
}
