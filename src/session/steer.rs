//! An interaction that keeps the session's promises: see the [contract](super).

use super::correction::{Click, Steering, correct, diameter, disagreeing, locality};
use super::field::Field;
use super::region::{self, beyond, deepest, fitted, next, of_voxel, open_faces, probes, reach, shown, shows, union};
use super::scan::{EncodedPatch, Scan};
use super::turn::{blend, marks, taper};
use super::{ANSWER, MASK_LOGIT, Note, Prediction, Said, SessionError, State, finite, thin};
use crate::memory;
use crate::model::{Answer, Observer, PatchPrompts, prompt_maps};
use crate::prompt::{Dense, Prompts};
use crate::tensor::Tensor;
use crate::volume::patch::{Extent, Patch};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Magnitude of the logit that a voxel gets which only its own click puts on its side.
const OWN_LOGIT: f32 = 0.25;
/// Voxels over which a look fades out towards faces beyond which the scan goes on.
const FADE: f32 = 4.0;
/// Patches that one interaction follows an object through at most.
const MOST_LOOKS: usize = 8;
/// Times that one interaction asks the network at most: some fifty of the small network's take as many tenths of a second.
const MOST_RUNS: usize = 64;
/// Voxels on a face that say that the object goes on.
const CONTACT: usize = 4;
/// Voxels that a probe's object must be across for its size to be believed.
const LEAST_ACROSS: f64 = 6.0;

/// Lengths of what a look shows, between a click and the nearest look, beyond which the click may begin another part of the object.
const AWAY: f64 = 0.75;
/// Other clicks, the nearest ones, to which a way through the same tissue is looked for.
const NEIGHBOURS: usize = 4;
/// Times an object's length beyond which it surely does: a look at both would show neither.
const APART: f64 = 4.5;

/// Clicks up to which an answer without box or mask may change everywhere.
const FEW: usize = 4;

/// Millimetres within which first clicks are taken to lie on one part of the object.
const TOGETHER: f64 = 60.0;

/// How the patch that shows a click came to be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum View {
    /// The network looked at it before.
    Known,
    /// It shows the object and the click beyond it.
    Wider,
    /// It shows another part of the object, far from all others.
    Apart,
}

/// What a look at a patch came to.
struct Look {
    encoded: Arc<EncodedPatch>,
    /// The answer on the patch, the clicks obeyed.
    logits: Vec<f32>,
    /// Where it counts, and the answer that it began with; everywhere if absent.
    changes: Option<(Vec<f32>, Vec<f32>)>,
    answer: Answer,
    thinned: usize,
}

impl Look {
    fn score(&self) -> Result<f32, SessionError> {
        let summary = self.answer.summary()?;
        Ok(summary.scores.get(summary.selected).copied().unwrap_or(0.0))
    }
}

/// An interaction under way.
struct Work<'a, 'o> {
    scan: &'a Arc<Scan>,
    observer: &'a mut Observer<'o>,
    said: Vec<Said>,
    bounds: Option<[usize; 6]>,
    others: Option<Arc<Vec<u8>>>,
    field: Field,
    /// Whether the answer began as a mask that was given, and whether that was now.
    drawn: bool,
    replaced: bool,
    looked: Vec<Patch>,
    last: Option<Look>,
    notes: Vec<Note>,
    seconds: [Duration; 3],
    encoding: [Duration; 2],
    runs: usize,
    how: Steering,
}

pub(super) fn interact(scan: &Arc<Scan>, state: &State, prompts: &Prompts, observer: &mut Observer) -> Result<State, SessionError> {
    let mut notes = vec![];
    let dense = prompts.dense.as_ref().filter(|d| {
        let marks = d.marks_anything();
        if !marks {
            notes.push(Note::EmptyMask);
        }
        marks
    });
    let others = prompts.others.clone().map(Arc::new).or_else(|| state.others.clone());
    let place = |v: [usize; 3]| (v[0] * scan.grid().size[1] + v[1]) * scan.grid().size[2] + v[2];
    let taken = |v: [usize; 3]| others.as_ref().is_some_and(|o| o[place(v)] != 0);
    // Of what is said twice of a voxel, the later counts.
    let mut fresh: Vec<Said> = vec![];
    let mut refused = 0;
    let mut index: HashMap<[usize; 3], usize> = HashMap::new();
    for (voxel, positive) in &prompts.points {
        if *positive && taken(*voxel) {
            refused += 1;
            continue;
        }
        match index.get(voxel) {
            Some(at) => fresh[*at].positive = *positive,
            None => {
                index.insert(*voxel, fresh.len());
                fresh.push(Said { voxel: *voxel, positive: *positive });
            }
        }
    }
    if refused > 0 {
        notes.push(Note::InOtherObject(refused));
    }
    let stays = |s: &Said| !(index.contains_key(&s.voxel) || s.positive && taken(s.voxel));
    let mut said: Vec<Said> = state.said.iter().copied().filter(stays).collect();
    // What was drawn bounds an object that nothing is known of yet.
    let first = state.prediction.is_none() && state.bounds.is_none();
    let outlined = prompts.bounds.or(prompts.drawn.filter(|_| first));
    let bounds = outlined.map(|b| region::understood_box(b, scan.grid()));
    if outlined != bounds {
        notes.push(Note::FlatBox);
    }
    let before = state.prediction.as_ref();
    if prompts.points.is_empty() && bounds.is_none() && dense.is_none() && prompts.others.is_none() && notes.is_empty() {
        // After an answer, to say nothing is to agree.
        if before.is_none() {
            return Err(SessionError::NoPrompt);
        }
        notes.push(Note::Agreed);
    }
    notes.extend(region::notes(scan, prompts));
    // A box that was given before, or that the answer fills already, says nothing new.
    let again = |b: &[usize; 6]| state.bounds == Some(*b) || before.is_some_and(|p| fills(&p.field, b));
    let moved = bounds.filter(|b| before.is_none() || !again(b));
    let mut field = before.map_or_else(|| Field::new(scan.grid().size, true), |p| p.field.clone());
    if let Some(dense) = dense {
        field = given(dense, scan.grid().size);
        said.retain(|s| (field.get(s.voxel) > 0.0) == s.positive);
    }
    said.extend(&fresh);
    let mut work = Work {
        scan,
        observer,
        said,
        bounds: bounds.or(state.bounds),
        others,
        field,
        replaced: dense.is_some(),
        drawn: dense.is_some() || (state.drawn && moved.is_none()),
        looked: if dense.is_some() { vec![] } else { state.looked.as_ref().clone() },
        last: None,
        notes,
        seconds: [Duration::ZERO; 3],
        encoding: [Duration::ZERO; 2],
        runs: 0,
        how: Steering::default(),
    };
    work.keep_out();
    if dense.is_none() && (before.is_none() || moved.is_some()) {
        work.begin()?
    } else {
        work.correct_all(&fresh)?
    }
    work.finish(state)
}

/// Whether an object fills a box: within a quarter of its sides it ends where the box ends.
fn fills(field: &Field, bounds: &[usize; 6]) -> bool {
    let Some(object) = field.bounds() else { return false };
    (0..6).all(|f| {
        let side = (bounds[f % 3 + 3] - bounds[f % 3]) as f64;
        (object[f] as f64 - bounds[f] as f64).abs() <= (0.25 * side).max(1.0)
    })
}

/// A mask or logits that were given, as a field.
fn given(dense: &Dense, size: [usize; 3]) -> Field {
    let [ni, nj, nk] = size;
    let mut field = Field::new(size, true);
    let at = |[i, j, k]: [usize; 3]| (i * nj + j) * nk + k;
    let value = |voxel| match dense {
        Dense::Mask(m) if m[at(voxel)] != 0 => MASK_LOGIT,
        Dense::Mask(_) => -MASK_LOGIT,
        Dense::Logits(l) if l[at(voxel)].is_nan() => -MASK_LOGIT,
        Dense::Logits(l) => l[at(voxel)].clamp(-100.0, 100.0),
    };
    field.edit(&[0..ni, 0..nj, 0..nk], |voxel, _| value(voxel));
    field
}

impl Work<'_, '_> {
    /// Takes other objects' voxels out of the answer.
    fn keep_out(&mut self) {
        let Some(others) = self.others.clone() else { return };
        let [_, nj, nk] = self.field.size();
        let mut within = vec![];
        self.field.each(|at, logit| {
            if logit > 0.0 && others[at] != 0 {
                within.push([at / nk / nj, at / nk % nj, at % nk]);
            }
        });
        within.into_iter().for_each(|v| self.field.set(v, -MASK_LOGIT));
    }

    /// The clicks on a patch, by its voxels: of those that share one, the latest.
    fn clicks(&self, patch: &Patch) -> Vec<Click> {
        let mut order = vec![];
        let mut signs: BTreeMap<[i32; 3], bool> = BTreeMap::new();
        for s in &self.said {
            if let Some(v) = patch.voxel(s.voxel.map(|c| c as f64))
                && signs.insert(v, s.positive).is_none()
            {
                order.push(v);
            }
        }
        order.into_iter().map(|v| (v, signs[&v])).collect()
    }

    /// The answer so far on a patch.
    fn on_patch(&self, patch: &Patch) -> Vec<f32> {
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

    /// Runs the network on a patch. `before` is the answer that it starts from, where that may change, and how much the network counts there; without it the network's answer
    /// counts alone.
    fn look(&mut self, patch: &Patch, before: Option<(Vec<f32>, Vec<f32>, f32)>, hint: Option<Click>) -> Result<Look, SessionError> {
        let encoded = self.encode(patch)?;
        let model = self.scan.model().clone();
        let (edge, size) = (model.config().patch, [model.config().patch; 3]);
        let clicks = self.clicks(patch);
        let start = Instant::now();
        let (points, thinned) = thin(if clicks.is_empty() { hint.into_iter().collect() } else { clicks.clone() });
        let before = before.map(|(old, window, trust)| {
            let mut corrected = memory::copied(ANSWER, &old);
            correct(&mut corrected, size, &clicks, diameter(&old), &self.how);
            (corrected, old, window, trust)
        });
        let dense = match &before {
            Some((corrected, ..)) => Tensor::new(size, memory::copied(ANSWER, corrected)),
            None => Tensor::from_buffer(size, model.device().cpu().zeros(edge.pow(3))),
        };
        let maps = prompt_maps(model.device(), edge, &marks(&clicks, edge, model.config().click_radius));
        let overlaps = self.bounds.filter(|b| {
            let middle: [f64; 3] = std::array::from_fn(|a| (b[a] + b[a + 3]) as f64 / 2.0 - 0.5);
            patch.voxel(middle).is_some()
        });
        let prompts = PatchPrompts { points, bounds: overlaps.map(|b| patch.bounds(&Extent::of_box(b))) };
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
                (blend(&corrected, proposal, &weights), Some((window, old)))
            }
            None => (memory::copied(ANSWER, proposal), None),
        };
        let across = diameter(&logits);
        correct(&mut logits, size, &clicks, across, &self.how);
        let [prompts, decode, refine] = answer.seconds;
        let each = [prompts + prepared + start.elapsed(), decode, refine];
        (0..3).for_each(|n| self.seconds[n] += each[n]);
        Ok(Look { encoded, logits, changes, answer, thinned })
    }

    /// Writes a look into the answer.
    fn write(&mut self, look: &Look) {
        let (patch, grid) = (look.encoded.patch(), *self.scan.grid());
        let edge = patch.grid.size[0];
        let cpu = self.scan.model().device().cpu();
        match &look.changes {
            None => {
                // What is negligible all over need not be visited: all that is not, and a voxel around it.
                let Some([low, high]) = reach(&look.logits, edge, |v| v > -6.0) else { return };
                let block = patch.block_of(&grid, low, high);
                cpu.run(|| self.field.edit(&block, |voxel, old| patch.value(&look.logits, voxel).unwrap_or(old)));
            }
            Some((weights, before)) => {
                // Where nothing was and nothing comes, nothing is written.
                let each = weights.iter().zip(look.logits.iter().zip(before));
                let counts = each.map(|(w, (new, old))| if *w > 0.0 && (*new > -6.0 || *old > -6.0) { 1.0 } else { 0.0 });
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

    /// What prompts without a box point at, as an extent: the first positive click and those near it. Others far off are parts of the object of their own.
    fn pointed(&self) -> Option<Extent> {
        let mut left: Vec<Extent> = self.said.iter().filter(|s| s.positive).map(|s| of_voxel(s.voxel)).collect();
        if left.is_empty() {
            return None;
        }
        let mut all = left.remove(0);
        loop {
            let near = |e: &Extent| {
                region::longest(&union(&all, e), self.scan.grid()) <= TOGETHER.max(2.0 * region::longest(&all, self.scan.grid()))
            };
            let Some(at) = left.iter().position(near) else { return Some(all) };
            all = union(&all, &left.swap_remove(at));
        }
    }

    /// Answers prompts that nothing was answered to yet, or that a new box came to.
    fn begin(&mut self) -> Result<(), SessionError> {
        let bounds = self.bounds.map(Extent::of_box);
        let Some(extent) = bounds.or_else(|| self.pointed()) else {
            self.notes.push(Note::OnlyDenied);
            return Ok(());
        };
        self.field = Field::new(self.scan.grid().size, true);
        self.looked.clear();
        // Points apart may lie on one object or on several.
        let part = if bounds.is_none() { self.separate()? } else { None };
        let look = match (part, bounds) {
            (Some(look), _) => look,
            (None, Some(bounds)) => self.look(&fitted(self.scan, &bounds), None, None)?,
            (None, None) => {
                let patch = self.probe(&extent)?;
                self.look(&patch, None, None)?
            }
        };
        self.write(&look);
        self.settle(look)?;
        // Positive clicks beyond the box's patch are parts of the object too.
        let left: Vec<Said> = self.disagreeing(&self.said);
        self.correct_all(&left)
    }

    /// A look at the first positive click where it lies on an object of its own, far from all others.
    fn separate(&mut self) -> Result<Option<Look>, SessionError> {
        let positive: Vec<Said> = self.said.iter().copied().filter(|s| s.positive).collect();
        match positive.split_first() {
            // Points that the closest look shows together are told together, as those of a stroke are.
            Some((first, others)) if !others.is_empty() && self.fits() => {
                let closest = probes(self.scan, &of_voxel(first.voxel)).swap_remove(0);
                if others.iter().any(|s| closest.voxel(s.voxel.map(|c| c as f64)).is_some()) {
                    return Ok(None);
                }
                self.alone(*first, &others.iter().map(|s| s.voxel).collect::<Vec<_>>())
            }
            _ => Ok(None),
        }
    }

    /// Looks at prompts without a size from several distances, and chooses the patch that shows what was seen there.
    fn probe(&mut self, extent: &Extent) -> Result<Patch, SessionError> {
        let patches = probes(self.scan, extent);
        if patches.len() == 1 {
            return Ok(patches[0].clone());
        }
        let grid = *self.scan.grid();
        let mut best: Option<(f32, Patch)> = None;
        for patch in patches {
            let look = self.look(&patch, None, None)?;
            let edge = patch.grid.size[0];
            let goes_on = beyond(&look.logits, &patch, &grid, &[]).len() >= CONTACT;
            let Some([low, high]) = reach(&look.logits, edge, |v| v > 0.0) else { continue };
            let across = (0..3).map(|d| high[d] - low[d]).fold(0.0, f64::max) - 1.0;
            let mut quality = look.score()?;
            quality -= if goes_on { 0.3 } else { 0.0 };
            quality -= if across < LEAST_ACROSS { 0.3 } else { 0.0 };
            if best.as_ref().is_none_or(|(b, _)| quality > *b) {
                // What was seen tells how far to look; not further off than twice, nor nearer than half.
                let seen = shown(&look.logits, &patch, &grid).unwrap_or(*extent);
                let fit = fitted(self.scan, &union(&seen, extent));
                let spacing = fit.spacing.clamp(0.5 * patch.spacing, 2.0 * patch.spacing);
                let centred = Patch::place(&grid, edge, spacing, &union(&seen, extent));
                best = Some((quality, centred));
            }
        }
        Ok(best.map_or_else(|| probes(self.scan, extent).swap_remove(1), |(_, patch)| patch))
    }

    /// Those that the answer does not obey.
    fn disagreeing(&self, clicks: &[Said]) -> Vec<Said> {
        clicks.iter().copied().filter(|s| (self.field.get(s.voxel) > 0.0) != s.positive).collect()
    }

    /// Corrects the answer where clicks disagree with it, patch by patch.
    fn correct_all(&mut self, fresh: &[Said]) -> Result<(), SessionError> {
        let mut left = self.disagreeing(fresh);
        if left.is_empty() && !fresh.is_empty() && self.runs == 0 {
            self.notes.push(Note::Agreed);
        }
        if self.looked.is_empty()
            && let Some(b) = self.field.bounds()
        {
            // A mask that was given: it was looked at where it lies.
            self.looked.push(fitted(self.scan, &Extent::of_box(b)));
        }
        while let Some(first) = left.first().copied() {
            if self.runs >= MOST_RUNS {
                self.notes.push(Note::NotLookedAt(left.len()));
                break;
            }
            if self.field.voxels() == 0 && first.positive {
                // After answers that were empty a click begins anew.
                self.begin_at(first)?;
                left = self.disagreeing(&left[1..]);
                continue;
            }
            let (patch, view) = self.place_for(first)?;
            let part = self.another_part(first)?;
            // A look at a part of its own was told of that click alone; any other of all that its patch shows.
            let told = |s: &Said| s.voxel == first.voxel || part.is_none() && shows(&patch, s.voxel, self.scan.grid());
            let rest: Vec<Said> = left.iter().copied().filter(|s| !told(s)).collect();
            let look = match part {
                Some(look) => Some(look),
                None => {
                    if view != View::Known {
                        self.notes.push(Note::LookedFurther);
                    }
                    self.correct_on(&patch, view, &left)?
                }
            };
            if let Some(look) = look {
                self.write(&look);
                self.settle(look)?;
            }
            left = self.disagreeing(&rest);
        }
        Ok(())
    }

    /// Looks at a patch that shows clicks which disagree with the answer. None where the answer on the patch obeys them: a scan finer than the patch may hold a click's
    /// voxel on one side and the patch it on the other; then the click's own voxel is set, and no more.
    fn correct_on(&mut self, patch: &Patch, view: View, left: &[Said]) -> Result<Option<Look>, SessionError> {
        let before = self.on_patch(patch);
        let here = left.iter().filter(|s| s.voxel == left[0].voxel || shows(patch, s.voxel, self.scan.grid()));
        let wrong: Vec<Click> = here.filter_map(|s| Some((patch.voxel(s.voxel.map(|c| c as f64))?, s.positive))).collect();
        let size = patch.grid.size;
        let seen = disagreeing(&before, size, &wrong);
        if seen.is_empty() {
            return Ok(None);
        }
        let mut weights = locality(&before, size, &seen, diameter(&before), &self.how);
        let trust = if view == View::Known && !self.guessed() { self.how.trust } else { 1.0 };
        match view {
            // What a few clicks found is no more than a guess.
            View::Known | View::Wider if self.guessed() => weights.fill(1.0),
            View::Known => {}
            View::Wider | View::Apart => weights.iter_mut().zip(self.unseen(patch)).for_each(|(w, u)| *w = w.max(u)),
        }
        self.look(patch, Some((before, weights, trust)), None).map(Some)
    }

    /// A first positive click of an object that is empty so far, or far from all there is.
    fn begin_at(&mut self, first: Said) -> Result<(), SessionError> {
        let patch = match self.bounds {
            Some(b) if self.looked.is_empty() => fitted(self.scan, &Extent::of_box(b)),
            _ => self.probe(&of_voxel(first.voxel))?,
        };
        let before = self.on_patch(&patch);
        let weights = memory::filled(ANSWER, 1.0, before.len());
        let empty = before.iter().all(|v| *v <= 0.0);
        let look = self.look(&patch, (!empty).then_some((before, weights, 1.0)), None)?;
        self.write(&look);
        self.settle(look)
    }

    /// Whether the answer rests on a few clicks alone: no box said how large the object is, no mask what it is.
    fn guessed(&self) -> bool {
        self.bounds.is_none() && !self.drawn && self.said.len() <= FEW
    }

    /// The patch that shows a click that disagrees: one that was looked at before, or a new one.
    fn place_for(&mut self, click: Said) -> Result<(Patch, View), SessionError> {
        let grid = *self.scan.grid();
        if let Some(known) = self.looked.iter().rev().find(|p| shows(p, click.voxel, &grid)) {
            return Ok((known.clone(), View::Known));
        }
        let at = of_voxel(click.voxel);
        let object = self.field.bounds().map(Extent::of_box);
        let config = self.scan.model().config();
        if let (Some(object), true) = (object, self.fits()) {
            return Ok((fitted(self.scan, &union(&object, &at)), View::Wider));
        }
        let spacing = self.looked.last().map_or(config.spacing as f64, |p| p.spacing);
        Ok((Patch::place(&grid, config.patch, spacing, &at), View::Apart))
    }

    /// Whether the network looks at objects from as far off as fits them.
    fn fits(&self) -> bool {
        self.scan.model().config().fit.is_some() && self.scan.options().spacing.is_none()
    }

    /// A look at a positive click away from all that was looked at, as if it were the only one, where that shows an object of its own, or a look at both would show neither.
    fn another_part(&mut self, click: Said) -> Result<Option<Look>, SessionError> {
        let grid = *self.scan.grid();
        let Some(object) = self.field.bounds().map(Extent::of_box) else { return Ok(None) };
        let edge = self.scan.model().config().patch as f64;
        let away = |p: &Patch| region::centre_distance(p, click.voxel) > AWAY * edge * p.spacing;
        if !(click.positive && self.fits() && self.looked.iter().all(away)) {
            return Ok(None);
        }
        let parts: Vec<[usize; 3]> = self.said.iter().filter(|s| s.positive && s.voxel != click.voxel).map(|s| s.voxel).collect();
        let look = self.alone(click, &parts)?;
        if look.is_none() && region::longest(&union(&object, &of_voxel(click.voxel)), &grid) > APART * region::longest(&object, &grid) {
            let seen = std::mem::replace(&mut self.field, Field::new(grid.size, true));
            let patch = self.probe(&of_voxel(click.voxel));
            self.field = seen;
            return self.correct_on(&patch?, View::Apart, &[click]);
        }
        // What lies there already is not looked at anew.
        let empty = |look: &Look| self.on_patch(look.encoded.patch()).iter().all(|v| *v <= 0.0);
        Ok(look.filter(empty))
    }

    /// A look at a positive click as if it were the only one; none where that shows no object that ends, and ends far from all `others`, or where what lies between it and one
    /// of them looks as both do.
    fn alone(&mut self, click: Said, others: &[[usize; 3]]) -> Result<Option<Look>, SessionError> {
        let mut nearest = others.to_vec();
        nearest.sort_by(|a, b| {
            region::distance(&of_voxel(click.voxel), *a, self.scan.grid()).total_cmp(&region::distance(
                &of_voxel(click.voxel),
                *b,
                self.scan.grid(),
            ))
        });
        if nearest.iter().take(NEIGHBOURS).any(|other| region::joined(self.scan, click.voxel, *other)) {
            return Ok(None);
        }
        let only = self.said.iter().copied().filter(|s| !s.positive || s.voxel == click.voxel).collect();
        let said = std::mem::replace(&mut self.said, only);
        let look = self.probe(&of_voxel(click.voxel)).and_then(|patch| self.look(&patch, None, None));
        self.said = said;
        let (look, grid) = (look?, *self.scan.grid());
        let patch = look.encoded.patch();
        let Some(object) = shown(&look.logits, patch, &grid) else { return Ok(None) };
        let ends = beyond(&look.logits, patch, &grid, &[]).len() < CONTACT;
        let far = |v: &[usize; 3]| region::distance(&object, *v, &grid) > region::longest(&object, &grid);
        Ok((ends && others.iter().all(far)).then_some(look))
    }

    /// Ends a look: remembers where it was, and follows the object where it goes on beyond.
    fn settle(&mut self, look: Look) -> Result<(), SessionError> {
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

    /// How much a patch may change the answer that follows an object: all of what nobody looked at, fading into what somebody did.
    fn unseen(&self, patch: &Patch) -> Vec<f32> {
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
                    // Voxels to the nearest face beyond which the scan goes on.
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

    /// Puts every click's voxel on its side, whatever lies around it, and makes the state.
    fn finish(mut self, state: &State) -> Result<State, SessionError> {
        self.keep_out();
        self.notes.dedup();
        for s in &self.said {
            if (self.field.get(s.voxel) > 0.0) != s.positive {
                self.field.set(s.voxel, if s.positive { OWN_LOGIT } else { -OWN_LOGIT });
            }
        }
        let before = state.prediction.as_ref();
        let changed = before.map_or_else(|| self.field.voxels(), |p| self.field.difference(&p.field));
        let prediction = match self.last.take() {
            Some(look) => {
                let s = look.encoded.patch().grid.size;
                let (score, calibration) = (look.score()?, self.scan.model().config().calibration);
                Prediction {
                    score: calibration.map(|[a, b]| (a + b * score).clamp(0.0, 1.0)),
                    thinned: look.thinned,
                    ..Prediction::of(&look.answer, self.field, Tensor::new(s, look.logits), &look.encoded)?
                }
            }
            None => match before.filter(|_| !self.replaced) {
                Some(before) => Prediction { field: self.field, thinned: 0, ..before.as_ref().clone() },
                None => {
                    // A mask, or nothing: the network has not been asked, but where it will look is known, and can be made ready.
                    let extent = self.field.bounds().map(Extent::of_box);
                    let extent = extent.or_else(|| self.said.iter().map(|s| of_voxel(s.voxel)).reduce(|a, b| union(&a, &b)));
                    let patch = match self.looked.last() {
                        Some(patch) => patch.clone(),
                        None => probes(self.scan, &extent.unwrap_or_else(|| region::whole(self.scan.grid()))).swap_remove(0),
                    };
                    let logits = Tensor::new(patch.grid.size, self.on_patch(&patch));
                    Prediction::unasked(self.field, logits, patch)
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
            said: Arc::new(self.said),
            bounds: self.bounds,
            others: self.others,
            drawn: self.drawn,
            looked: Arc::new(self.looked),
            prediction: Some(Arc::new(prediction)),
            replaced: 0,
        })
    }
}

/// Encodes where the first interaction with these prompts will look, as far as can be told before the network was asked.
pub(super) fn prepare(scan: &Arc<Scan>, prompts: &Prompts, observer: &mut Observer) -> Result<Patch, SessionError> {
    let patches = match prompts.bounds.or(prompts.drawn).map(|b| region::understood_box(b, scan.grid())) {
        Some(bounds) => vec![fitted(scan, &Extent::of_box(bounds))],
        None => match (
            &prompts.dense,
            Prompts { points: vec![], ..prompts.clone() }.extent(scan.grid()).or_else(|| prompts.extent(scan.grid())),
        ) {
            (Some(_), Some(extent)) => vec![fitted(scan, &extent)],
            (None, Some(extent)) => probes(scan, &extent),
            (_, None) => return Err(SessionError::NoPrompt),
        },
    };
    for patch in &patches {
        scan.encoded(patch, observer)?;
    }
    Ok(patches[patches.len() / 2].clone())
}
