//! The answers to the prompts for an object, iteration by iteration.

use super::Segment;
use super::asked::Asked;
use super::stages::Stages;
use crate::cli::Failure;
use crate::model::Observer;
use crate::session::{Prediction, Scan, Session, SessionError};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;

/// The answers to the prompts for an object.
pub(super) struct Answered {
    pub(super) last: Arc<Prediction>,
    /// The answers of all iterations.
    pub(super) all: Vec<Arc<Prediction>>,
    /// The report of each iteration.
    pub(super) steps: Vec<Value>,
    /// Notes for the user, each with its iteration.
    pub(super) notes: Vec<String>,
    pub(super) seconds: f64,
}

impl Segment {
    /// Runs the iterations on one object.
    pub(super) fn answer(
        &self,
        scan: &Arc<Scan>,
        object: &Asked,
        stages: &mut Stages,
        warnings: &mut Vec<String>,
    ) -> Result<Answered, Failure> {
        let (start, several) = (Instant::now(), object.prompts.len() > 1);
        let fail = |e: SessionError| Failure::Failed(object.about(&e.to_string()));
        let mut session = Session::new(scan);
        if self.released {
            let marks = object.prompts.iter().find(|p| p.extent(scan.grid()).is_some());
            let marks = marks.ok_or_else(|| {
                Failure::Failed("the prompts mark no voxel: the scribble or mask is empty".into())
            })?;
            stages.begin("encoding".into());
            let seconds = session.prepare(marks, &mut Observer::none()).map_err(fail)?;
            stages.add_all(["patch", "encode"], seconds);
        }
        let (mut all, mut steps, mut notes): (Vec<Arc<Prediction>>, _, _) =
            (vec![], vec![], vec![]);
        for (i, prompts) in object.prompts.iter().enumerate() {
            let text = format!("interaction {} of {}", i + 1, object.prompts.len());
            stages.begin(object.about(&text));
            let p = session.interact(prompts).map_err(fail)?;
            if !self.released {
                stages.add_all(["patch", "encode"], p.encoding);
            }
            stages.add_all(["prompts", "decode", "refine"], p.seconds);
            if p.left_out > 0 {
                warnings.push(object.about(&format!(
                    "{} points of iteration {} lie outside the patch and were ignored",
                    p.left_out,
                    i + 1
                )));
            }
            if p.thinned > 0 {
                warnings.push(object.about(&format!(
                    "iteration {} has more points than the prompt encoder takes: {} of them went to the refiner only",
                    i + 1,
                    p.thinned
                )));
            }
            let which = if several { format!("iteration {}: ", i + 1) } else { String::new() };
            let said = p.notes.iter().map(|n| format!("{which}{n}"));
            notes.extend(said.clone());
            warnings.extend(said.map(|note| object.about(&note)));
            let scores: Vec<f32> = p.candidates.iter().map(|c| c.score).collect();
            let own: Vec<String> = p.notes.iter().map(|n| n.to_string()).collect();
            steps.push(json!({
                "scores": scores, "selected": p.selected, "expected_dice": p.score, "looks": p.looks, "changed_voxels": p.changed,
                "spacing_mm": p.patch.spacing, "notes": own,
            }));
            all.push(p.clone());
        }
        let last = all.last().cloned();
        let last = last.ok_or_else(|| Failure::Failed(object.about("there are no prompts")))?;
        Ok(Answered { last, all, steps, notes, seconds: start.elapsed().as_secs_f64() })
    }
}
