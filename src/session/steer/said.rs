//! The prompts, and which of them hold: clicks, boxes and masks as the answer has to obey them.

use super::Work;
use crate::memory::{self, Charged, Refused};
use crate::prompt::Dense;
use crate::session::correction::Click;
use crate::session::field::Field;
use crate::session::region::{self, of_voxel, probes, union};
use crate::session::{ANSWER, CLICKS, MASK_LOGIT, Prediction, Said, SessionError, State};
use crate::tensor::Tensor;
use crate::volume::patch::{Extent, Patch};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The magnitude of the logit of a voxel that only its own click puts on its side.
const OWN_LOGIT: f32 = 0.25;
/// The number of clicks up to which an answer without box or mask may change anywhere.
const FEW: usize = 4;

/// Whether an object fills a box: it ends within a quarter of the box's sides from where the box
/// ends.
pub(super) fn fills(field: &Field, bounds: &[usize; 6]) -> bool {
    let Some(object) = field.bounds() else { return false };
    (0..6).all(|f| {
        let side = (bounds[f % 3 + 3] - bounds[f % 3]) as f64;
        (object[f] as f64 - bounds[f] as f64).abs() <= (0.25 * side).max(1.0)
    })
}

/// A mask or logits that were given, as a field.
pub(super) fn given(dense: &Dense, size: [usize; 3]) -> Result<Field, Refused> {
    let [ni, nj, nk] = size;
    let mut field = Field::new(size, true);
    let at = |[i, j, k]: [usize; 3]| (i * nj + j) * nk + k;
    let value = |voxel| match dense {
        Dense::Mask(m) if m[at(voxel)] != 0 => MASK_LOGIT,
        Dense::Mask(_) => -MASK_LOGIT,
        Dense::Logits(l) => l[at(voxel)].clamp(-100.0, 100.0),
    };
    Field::has_room(size, value)?;
    field.edit(&[0..ni, 0..nj, 0..nk], |voxel, _| value(voxel));
    Ok(field)
}

impl Work<'_, '_> {
    /// Removes other objects' voxels from the answer.
    pub(super) fn keep_out(&mut self) {
        let Some(others) = self.others.clone() else { return };
        let [_, nj, nk] = self.field.size();
        let taken = |at: usize, logit: f32| logit > 0.0 && others[at] != 0;
        let mut count = 0;
        self.field.each(|at, logit| count += usize::from(taken(at, logit)));
        let mut within = memory::list(ANSWER, count);
        self.field.each(|at, logit| {
            if taken(at, logit) {
                within.push([at / nk / nj, at / nk % nj, at % nk]);
            }
        });
        within.into_iter().for_each(|v| self.field.set(v, -MASK_LOGIT));
    }

    /// The clicks on a patch, in its voxels: if several share one, the latest.
    pub(super) fn clicks(&self, patch: &Patch) -> Vec<Click> {
        let mut order = memory::list(CLICKS, self.said.len());
        let mut signs: BTreeMap<[i32; 3], bool> = BTreeMap::new();
        for s in &self.said {
            if let Some(v) = patch.voxel(s.voxel.map(|c| c as f64))
                && signs.insert(v, s.positive).is_none()
            {
                order.push(v);
            }
        }
        memory::collected(CLICKS, order.into_iter().map(|v| (v, signs[&v])))
    }

    /// The clicks that the answer does not obey.
    pub(super) fn disagreeing(&self, clicks: &[Said]) -> Vec<Said> {
        let left = clicks.iter().copied().filter(|s| (self.field.get(s.voxel) > 0.0) != s.positive);
        memory::counted(CLICKS, left)
    }

    /// Whether the answer rests only on a few clicks: no box said how large the object is, no mask
    /// what it is.
    pub(super) fn guessed(&self) -> bool {
        self.bounds.is_none() && !self.drawn && self.said.len() <= FEW
    }

    /// Puts every click's voxel on its side, whatever is around it, and makes the new state.
    pub(super) fn finish(mut self, state: &State) -> Result<State, SessionError> {
        self.keep_out();
        self.notes.dedup();
        for s in &self.said {
            if (self.field.get(s.voxel) > 0.0) != s.positive {
                self.field.set(s.voxel, if s.positive { OWN_LOGIT } else { -OWN_LOGIT });
            }
        }
        let before = state.prediction.as_ref();
        let changed =
            before.map_or_else(|| self.field.voxels(), |p| self.field.difference(&p.field));
        let prediction = match self.last.take() {
            Some(look) => {
                let s = look.encoded.patch().grid.size;
                let (score, calibration) = (look.score()?, self.scan.model().config().calibration);
                Prediction {
                    score: calibration
                        .map(|[a, b]| look.expected.unwrap_or((a + b * score).clamp(0.0, 1.0))),
                    thinned: look.thinned,
                    ..Prediction::of(
                        &look.answer,
                        self.field,
                        Tensor::new(s, look.logits),
                        &look.encoded,
                    )?
                }
            }
            None => match before.filter(|_| !self.replaced) {
                Some(before) => {
                    Prediction { field: self.field, thinned: 0, ..before.as_ref().clone() }
                }
                None => {
                    // A mask, or nothing: the network has not been asked, but where it will look is
                    // known, and can be prepared.
                    let extent = self.field.bounds().map(Extent::of_box);
                    let extent = extent.or_else(|| {
                        self.said.iter().map(|s| of_voxel(s.voxel)).reduce(|a, b| union(&a, &b))
                    });
                    let patch = match self.looked.last() {
                        Some(patch) => patch.clone(),
                        None => probes(
                            self.scan,
                            &extent.unwrap_or_else(|| region::whole(self.scan.grid())),
                        )
                        .swap_remove(0),
                    };
                    let logits = Tensor::new(patch.grid.size, self.on_patch(&patch));
                    Prediction::unasked(self.field, logits, patch, 0)
                }
            },
        };
        let mut prediction = Prediction {
            seconds: self.seconds,
            encoding: self.encoding,
            looks: self.runs,
            changed,
            notes: self.notes,
            left_out: 0,
            ..prediction
        };
        prediction.score = prediction.score.filter(|_| prediction.field.voxels() > 0);
        Ok(State {
            said: Arc::new(Charged::new(CLICKS, self.said)),
            bounds: self.bounds,
            others: self.others,
            drawn: self.drawn,
            looked: Arc::new(self.looked),
            prediction: Some(Arc::new(prediction)),
            replaced: 0,
        })
    }
}
