//! Looks, and how they are combined: the network's answer on a patch, written into the answer on
//! the scan, and followed where the object continues.

use super::Work;
use crate::memory;
use crate::model::{Answer, PatchPrompts, prompt_maps};
use crate::session::appearance;
use crate::session::correction::{Click, correct, diameter};
use crate::session::encodings::EncodedPatch;
use crate::session::guess::Guess;
use crate::session::region::{self, beyond, deepest, next, open_faces, reach, shown};
use crate::session::turn::{blend, marks, taper};
use crate::session::{ANSWER, CLICKS, MASK_LOGIT, Note, SessionError, finite, thin};
use crate::tensor::Tensor;
use crate::volume::patch::{Extent, Patch};
use std::sync::Arc;
use std::time::Instant;

/// Voxels over which a look fades out towards faces beyond which the scan continues.
const FADE: f32 = 4.0;
/// The most patches through which one interaction follows an object.
const MOST_LOOKS: usize = 8;
/// Voxels on a face that show that the object continues.
pub(super) const CONTACT: usize = 4;

/// How much the weight of a new guess grows with the difference in [sureness](Guess::sureness) from
/// the answer, and its least weight.
const BY_SURENESS: f32 = 2.0;
const LEAST_COUNT: f32 = 0.2;

/// The result of a look at a patch.
pub(super) struct Look {
    pub(super) encoded: Arc<EncodedPatch>,
    /// The answer on the patch, in which the clicks hold.
    pub(super) logits: Vec<f32>,
    /// Where it counts; everywhere if absent.
    changes: Option<Changes>,
    pub(super) answer: Answer,
    pub(super) thinned: usize,
    /// The Dice coefficient to expect, if it is known from more than the network's score.
    pub(super) expected: Option<f32>,
}

/// What a look changes in an answer, `[i][j][k]` on the patch.
struct Changes {
    /// The weights of the look.
    weights: Vec<f32>,
    /// The answer that it began with, and that answer corrected for the clicks.
    before: Vec<f32>,
    corrected: Vec<f32>,
}

impl Look {
    pub(super) fn score(&self) -> Result<f32, SessionError> {
        let summary = self.answer.summary()?;
        Ok(summary.scores.get(summary.selected).copied().unwrap_or(0.0))
    }
}

impl Work<'_, '_> {
    /// The answer so far on a patch.
    pub(super) fn on_patch(&self, patch: &Patch) -> Vec<f32> {
        let cpu = self.scan.model().device().cpu();
        let reader = self.field.reader(MASK_LOGIT);
        let to_image = patch.from_image.inverse();
        let s = patch.grid.size[0];
        let mut out = memory::zeroed(ANSWER, s * s * s);
        cpu.chunks_mut(&mut out, s * s, |i, plane| {
            for (at, v) in plane.iter_mut().enumerate() {
                *v = reader.sample(to_image.apply([i as f64, (at / s) as f64, (at % s) as f64]));
            }
        });
        out
    }

    fn encode(&mut self, patch: &Patch) -> Result<Arc<EncodedPatch>, SessionError> {
        let (encoded, now) = self.scan.encoded(patch, self.observer)?;
        if now {
            (0..2).for_each(|n| self.encoding[n] += encoded.seconds[n]);
        }
        Ok(encoded)
    }

    /// Runs the network on a patch. `before` is the answer that it starts from, where that may
    /// change, and the network's weight there; without it only the network's answer counts.
    pub(super) fn look(
        &mut self,
        patch: &Patch,
        before: Option<(Vec<f32>, Vec<f32>, f32)>,
        hint: Option<Click>,
    ) -> Result<Look, SessionError> {
        let encoded = self.encode(patch)?;
        let model = self.scan.model().clone();
        let (edge, size) = (model.config().patch, [model.config().patch; 3]);
        let clicks = self.clicks(patch);
        let start = Instant::now();
        let values = Some(encoded.input.try_data()?);
        let (points, thinned) = thin(match clicks.is_empty() {
            true => hint.into_iter().collect(),
            false => memory::copied(CLICKS, &clicks),
        });
        let before = before.map(|(old, window, trust)| {
            let mut corrected = memory::copied(ANSWER, &old);
            correct(&mut corrected, size, &clicks, diameter(&old), &self.how, values);
            (corrected, old, window, trust)
        });
        let dense = match &before {
            Some((corrected, ..)) => Tensor::new(size, memory::copied(ANSWER, corrected)),
            None => Tensor::from_buffer(size, model.device().cpu().zeros(edge.pow(3))),
        };
        let maps =
            prompt_maps(model.device(), edge, &marks(&clicks, edge, model.config().click_radius));
        let overlaps = self.bounds.filter(|b| {
            let middle: [f64; 3] = std::array::from_fn(|a| (b[a] + b[a + 3]) as f64 / 2.0 - 0.5);
            patch.voxel(middle).is_some()
        });
        let prompts =
            PatchPrompts { points, bounds: overlaps.map(|b| patch.bounds(&Extent::of_box(b))) };
        let prepared = start.elapsed();
        let answer = model.interact(&encoded.features, &prompts, &dense, &maps, self.observer)?;
        finite(&answer)?;
        self.runs += 1;
        let start = Instant::now();
        let proposal = answer.logits.value().try_data()?;
        let (mut logits, changes) = match before {
            Some((corrected, old, mut window, trust)) => {
                taper(&mut window, edge, FADE, open_faces(patch, self.scan.grid()));
                let weights: Vec<f32> = memory::collected(ANSWER, window.iter().map(|w| trust * w));
                let logits = blend(&corrected, proposal, &weights);
                (logits, Some(Changes { weights: window, before: old, corrected }))
            }
            None => (memory::copied(ANSWER, proposal), None),
        };
        let across = diameter(&logits);
        correct(&mut logits, size, &clicks, across, &self.how, values);
        let [prompts, decode, refine] = answer.seconds;
        let each = [prompts + prepared + start.elapsed(), decode, refine];
        (0..3).for_each(|n| self.seconds[n] += each[n]);
        Ok(Look { encoded, logits, changes, answer, thinned, expected: None })
    }

    /// Makes a look that rests on the network alone follow what the object looks like; the clicks
    /// hold as before. Without a box it stays as it is once a click excluded something: excess then
    /// looks like the object.
    pub(super) fn recognise(&mut self, look: &mut Look) -> Result<(), SessionError> {
        if self.bounds.is_none() && self.said.iter().any(|s| !s.positive) {
            return Ok(());
        }
        let start = Instant::now();
        let patch = look.encoded.patch();
        let (size, clicks) = (patch.grid.size, self.clicks(patch));
        let voxels = |extent: &Extent| patch.bounds(extent).map(|v| v as usize);
        // A box of which the patch shows only a part says nothing about the object in that part.
        let whole = |b: &[usize; 6]| {
            let extent = Extent::of_box(*b);
            [extent.low, extent.high].into_iter().all(|corner| {
                let at = patch.from_image.apply(corner);
                (0..3).all(|d| at[d] > -0.51 && at[d] < size[d] as f64 - 0.49)
            })
        };
        let bounds = self.bounds.filter(whole).map(|b| voxels(&Extent::of_box(b)));
        let on_scan = voxels(&region::whole(self.scan.grid()));
        let values = look.encoded.input.try_data()?;
        appearance::recognise(&mut look.logits, values, size[0], on_scan, bounds);
        let across = diameter(&look.logits);
        correct(&mut look.logits, size, &clicks, across, &self.how, Some(values));
        self.seconds[0] += start.elapsed();
        Ok(())
    }

    /// Blends a look with the answer that it began with, corrected for the clicks: half of each,
    /// more of the look the [surer](Guess::sureness) it is than that answer.
    pub(super) fn temper(&mut self, look: &mut Look) -> Result<(), SessionError> {
        let Some(Changes { before, corrected, .. }) = &look.changes else { return Ok(()) };
        let start = Instant::now();
        let patch = look.encoded.patch();
        let (size, clicks) = (patch.grid.size, self.clicks(patch));
        let values = Some(look.encoded.input.try_data()?);
        let sureness = |logits| Guess { patch, logits }.sureness();
        let surer = sureness(&look.logits) - sureness(before);
        let counts = (0.5 + BY_SURENESS * surer).clamp(LEAST_COUNT, 1.0);
        let weights = memory::filled(ANSWER, counts, corrected.len());
        look.logits = blend(corrected, &look.logits, &weights);
        let across = diameter(&look.logits);
        correct(&mut look.logits, size, &clicks, across, &self.how, values);
        self.seconds[0] += start.elapsed();
        Ok(())
    }

    /// Writes a look into the answer.
    pub(super) fn write(&mut self, look: &Look) {
        let (patch, grid) = (look.encoded.patch(), *self.scan.grid());
        let edge = patch.grid.size[0];
        let cpu = self.scan.model().device().cpu();
        match &look.changes {
            None => {
                // Parts where everything is negligible need not be visited: only the rest, and one
                // voxel around it.
                let Some([low, high]) = reach(&look.logits, edge, |v| v > -6.0) else { return };
                let block = patch.block_of(&grid, low, high);
                cpu.run(|| {
                    self.field
                        .edit(&block, |voxel, old| patch.value(&look.logits, voxel).unwrap_or(old))
                });
            }
            Some(Changes { weights, before, .. }) => {
                // Where nothing was and nothing comes, nothing is written.
                let each = weights.iter().zip(look.logits.iter().zip(before));
                let counts =
                    each.map(
                        |(w, (new, old))| {
                            if *w > 0.0 && (*new > -6.0 || *old > -6.0) { 1.0 } else { 0.0 }
                        },
                    );
                let counts: Vec<f32> = memory::collected(ANSWER, counts);
                let Some([low, high]) = reach(&counts, edge, |c| c > 0.0) else { return };
                let block = patch.block_of(&grid, low, high);
                cpu.run(|| {
                    self.field.edit(&block, |voxel, old| match patch.value(weights, voxel) {
                        Some(w) if w >= 1.0 => patch.value(&look.logits, voxel).unwrap_or(old),
                        Some(w) if w > 0.0 => {
                            let new = patch.value(&look.logits, voxel).unwrap_or(-MASK_LOGIT);
                            (1.0 - w) * old.max(-MASK_LOGIT) + w * new
                        }
                        _ => old,
                    });
                });
            }
        }
    }

    /// Ends a look: remembers its place, and follows the object where it continues beyond.
    pub(super) fn settle(&mut self, look: Look) -> Result<(), SessionError> {
        let grid = *self.scan.grid();
        let mut look = look;
        for _ in 0..MOST_LOOKS {
            let patch = look.encoded.patch().clone();
            if self.looked.iter().all(|p| p.grid != patch.grid) {
                self.looked.push(patch.clone());
            }
            let places = beyond(&look.logits, &patch, &grid, &self.looked);
            let object = shown(&look.logits, &patch, &grid);
            let (Some(object), true) = (object, places.len() >= CONTACT) else { break };
            let further = next(self.scan, &patch, &object, &places);
            if self.looked.iter().any(|p| p.grid == further.grid) {
                break;
            }
            if self.notes.last() != Some(&Note::LookedFurther) {
                self.notes.push(Note::LookedFurther);
            }
            let before = self.on_patch(&further);
            let weights = self.unseen(&further);
            let hint = deepest(&before, further.grid.size[0]);
            let ahead = self.look(&further, Some((before, weights, 1.0)), hint)?;
            self.write(&ahead);
            look = ahead;
        }
        self.last = Some(look);
        Ok(())
    }

    /// The weight with which a patch may change the answer that follows an object: all of the part
    /// that was not looked at, fading into the part that was.
    pub(super) fn unseen(&self, patch: &Patch) -> Vec<f32> {
        let grid = *self.scan.grid();
        let s = patch.grid.size[0];
        let to_image = patch.from_image.inverse();
        let known: Vec<_> = self.looked.iter().map(|p| (p, open_faces(p, &grid))).collect();
        let mut weights = memory::filled(ANSWER, 1.0f32, s * s * s);
        let cpu = self.scan.model().device().cpu();
        cpu.chunks_mut(&mut weights, s * s, |i, plane| {
            for (at, w) in plane.iter_mut().enumerate() {
                let image = to_image.apply([i as f64, (at / s) as f64, (at % s) as f64]);
                for (other, open) in &known {
                    let p = other.from_image.apply(image);
                    let edge = other.grid.size[0] as f64;
                    // Voxels to the nearest face beyond which the scan continues.
                    let mut depth = f64::INFINITY;
                    for d in 0..3 {
                        let [low, high] = open[d];
                        depth = depth.min(if low {
                            p[d]
                        } else if p[d] < 0.0 {
                            -1.0
                        } else {
                            f64::INFINITY
                        });
                        depth = depth.min(if high {
                            edge - 1.0 - p[d]
                        } else if p[d] > edge - 1.0 {
                            -1.0
                        } else {
                            f64::INFINITY
                        });
                    }
                    *w = w.min((1.0 - depth as f32 / (2.0 * FADE)).clamp(0.0, 1.0));
                }
            }
        });
        weights
    }
}
