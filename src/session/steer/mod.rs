//! An interaction that keeps the session's promises: see the [contract](super).

mod look;
mod place;
mod said;

use super::correction::{Click, Steering, diameter, disagreeing, locality};
use super::field::Field;
use super::region::{self, Sight, fitted, of_voxel, shows};
use super::scan::Scan;
use super::{ANSWER, CLICKS, Note, Said, SessionError, State};
use crate::memory::{self, Charged};
use crate::model::Observer;
use crate::prompt::Prompts;
use crate::volume::patch::{Extent, Patch};
use look::Look;
use place::View;
use said::{fills, given};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// The most times that one interaction asks the network, after which no further click is looked at.
const MOST_RUNS: usize = 64;
/// The most times that one interaction asks the network if clicks on parts far from all others are
/// looked at from six distances, twice: enough for a dozen of them.
const MOST_PROBING: usize = 160;

/// The name of the mask of other objects in refusals of memory.
const OTHERS: &str = "a mask of other objects";

/// An interaction in progress.
struct Work<'a, 'o> {
    scan: &'a Arc<Scan>,
    observer: &'a mut Observer<'o>,
    said: Vec<Said>,
    bounds: Option<[usize; 6]>,
    others: Option<Arc<Charged<u8>>>,
    field: Field,
    /// Whether the answer began as a mask that was given, and whether that was in this interaction.
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

pub(super) fn interact(
    scan: &Arc<Scan>,
    state: &State,
    prompts: &Prompts,
    observer: &mut Observer,
) -> Result<State, SessionError> {
    let mut notes = vec![];
    let dense = prompts.dense.as_ref().filter(|d| {
        let marks = d.marks_anything();
        if !marks {
            notes.push(Note::EmptyMask);
        }
        marks
    });
    let charged = |o: &Vec<u8>| Arc::new(Charged::new(OTHERS, memory::copied(OTHERS, o)));
    let fresh_others = prompts.others.as_ref().map(charged);
    let others = fresh_others.or_else(|| state.others.clone());
    let place = |v: [usize; 3]| (v[0] * scan.grid().size[1] + v[1]) * scan.grid().size[2] + v[2];
    let taken = |v: [usize; 3]| others.as_ref().is_some_and(|o| o[place(v)] != 0);
    // If a voxel is given twice, the later prompt counts.
    let mut fresh: Vec<Said> = memory::list(CLICKS, prompts.points.len());
    let mut refused = 0;
    let mut index: HashMap<[usize; 3], usize> = memory::map(CLICKS, prompts.points.len());
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
    let mut said: Vec<Said> = memory::list(CLICKS, state.said.len() + fresh.len());
    said.extend(state.said.iter().copied().filter(stays));
    // A drawing bounds an object of which nothing is known yet.
    let first = state.prediction.is_none() && state.bounds.is_none();
    let outlined = prompts.bounds.or(prompts.drawn.filter(|_| first));
    let bounds = outlined.map(|b| region::understood_box(b, scan.grid()));
    if outlined != bounds {
        notes.push(Note::FlatBox);
    }
    let before = state.prediction.as_ref();
    if prompts.points.is_empty()
        && bounds.is_none()
        && dense.is_none()
        && prompts.others.is_none()
        && notes.is_empty()
    {
        // After an answer, no prompt means agreement.
        if before.is_none() {
            return Err(SessionError::NoPrompt);
        }
        notes.push(Note::Agreed);
    }
    notes.extend(region::notes(scan, prompts));
    // A box that was given before, or that the answer fills already, says nothing new.
    let again =
        |b: &[usize; 6]| state.bounds == Some(*b) || before.is_some_and(|p| fills(&p.field, b));
    let moved = bounds.filter(|b| before.is_none() || !again(b));
    let mut field = before.map_or_else(|| Field::new(scan.grid().size, true), |p| p.field.clone());
    if let Some(dense) = dense {
        field = given(dense, scan.grid().size)?;
        said.retain(|s| (field.get(s.voxel) > 0.0) == s.positive);
    }
    said.extend(&fresh);
    let drawn = dense.is_some() || (state.drawn && moved.is_none());
    let mut work = Work {
        scan,
        observer,
        said,
        bounds: bounds.or(state.bounds),
        others,
        field,
        replaced: dense.is_some(),
        drawn,
        looked: if dense.is_some() { vec![] } else { state.looked.as_ref().clone() },
        last: None,
        notes,
        seconds: [Duration::ZERO; 3],
        encoding: [Duration::ZERO; 2],
        runs: 0,
        how: Steering::default(),
    };
    work.how = Steering::of(!work.guessed());
    work.keep_out();
    if dense.is_none() && (before.is_none() || moved.is_some()) {
        work.begin()?
    } else {
        work.correct_all(&fresh)?
    }
    work.finish(state)
}

impl Work<'_, '_> {
    /// Answers the first prompts, or a new box.
    fn begin(&mut self) -> Result<(), SessionError> {
        let bounds = self.bounds.map(Extent::of_box);
        let Some(extent) = bounds.or_else(|| self.pointed()) else {
            self.notes.push(Note::OnlyDenied);
            return Ok(());
        };
        self.field = Field::new(self.scan.grid().size, true);
        self.looked.clear();
        // Points that are apart may be on one object or on several.
        let part = if bounds.is_none() { self.separate()? } else { None };
        let look = match part {
            Some(look) => look,
            None => {
                let (patch, expected) = match bounds {
                    Some(bounds) => (fitted(self.scan, &bounds), None),
                    None => self.probe(&extent)?,
                };
                let mut look = self.look(&patch, None, None)?;
                self.recognise(&mut look)?;
                look.expected = expected;
                look
            }
        };
        self.write(&look);
        self.settle(look)?;
        // Positive clicks beyond the box's patch are parts of the object too.
        let left: Vec<Said> = self.disagreeing(&self.said);
        self.correct_all(&left)
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
            // A mask that was given counts as looked at where it is.
            self.looked.push(fitted(self.scan, &Extent::of_box(b)));
        }
        while let Some(first) = left.first().copied() {
            if self.runs >= if self.fits() { MOST_PROBING } else { MOST_RUNS } {
                self.notes.push(Note::NotLookedAt(left.len()));
                break;
            }
            if self.field.voxels() == 0 && first.positive {
                // After empty answers a click begins afresh.
                self.begin_at(first)?;
                left = self.disagreeing(&left[1..]);
                continue;
            }
            let (patch, view) = self.place_for(first)?;
            let part = self.another_part(first)?;
            // A look at a separate part was given that click alone; any other look was given all
            // that its patch shows.
            let told = |s: &Said| {
                s.voxel == first.voxel || part.is_none() && shows(&patch, s.voxel, self.scan.grid())
            };
            let rest = memory::counted(CLICKS, left.iter().copied().filter(|s| !told(s)));
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

    /// Looks at a patch that shows clicks which disagree with the answer. None if the answer on the
    /// patch obeys them: a scan finer than the patch may have a click's voxel on one side and the
    /// patch on the other; then only the click's own voxel is set.
    fn correct_on(
        &mut self,
        patch: &Patch,
        view: View,
        left: &[Said],
    ) -> Result<Option<Look>, SessionError> {
        let before = self.on_patch(patch);
        let here = left
            .iter()
            .filter(|s| s.voxel == left[0].voxel || shows(patch, s.voxel, self.scan.grid()));
        let wrong: Vec<Click> = memory::counted(
            CLICKS,
            here.filter_map(|s| Some((patch.voxel(s.voxel.map(|c| c as f64))?, s.positive))),
        );
        let size = patch.grid.size;
        let seen = disagreeing(&before, size, &wrong);
        if seen.is_empty() {
            return Ok(None);
        }
        // What a few clicks found is only a guess, and so is what more of them find. Where it
        // continues beyond what was seen there is nothing to keep.
        let known = view == View::Known;
        if self.guessed() && view != View::Apart {
            let everywhere = memory::filled(ANSWER, 1.0, before.len());
            let old = (memory::copied(ANSWER, &before), everywhere, 1.0);
            let mut look = self.look(patch, Some(old), None)?;
            self.recognise(&mut look)?;
            if known {
                self.temper(&mut look)?;
            }
            return Ok(Some(look));
        }
        let mut weights = locality(&before, size, &seen, diameter(&before), &self.how);
        if !known {
            weights.iter_mut().zip(self.unseen(patch)).for_each(|(w, u)| *w = w.max(u));
        }
        let trust = if known { self.how.trust(seen.len()) } else { 1.0 };
        Ok(Some(self.look(patch, Some((before, weights, trust)), None)?))
    }

    /// A first positive click on an object that is empty so far, or far from the present object.
    fn begin_at(&mut self, first: Said) -> Result<(), SessionError> {
        let (patch, expected) = match self.bounds {
            Some(b) if self.looked.is_empty() => (fitted(self.scan, &Extent::of_box(b)), None),
            _ => self.probe(&of_voxel(first.voxel))?,
        };
        let before = self.on_patch(&patch);
        let weights = memory::filled(ANSWER, 1.0, before.len());
        let empty = before.iter().all(|v| *v <= 0.0);
        let mut look = self.look(&patch, (!empty).then_some((before, weights, 1.0)), None)?;
        self.recognise(&mut look)?;
        look.expected = expected.filter(|_| empty);
        self.write(&look);
        self.settle(look)
    }
}

/// The patch that will probably show a click on the answer.
pub(super) fn ahead(scan: &Scan, state: &State) -> Option<Patch> {
    if let Some(patch) = state.looked.last() {
        return Some(patch.clone());
    }
    let bounds = state.prediction.as_ref()?.field.bounds()?;
    Some(fitted(scan, &Extent::of_box(bounds)))
}

/// Where the first interaction with these prompts will look, as far as that is known before the
/// network was asked.
pub(super) fn places(sight: &Sight, prompts: &Prompts) -> Result<Vec<Patch>, SessionError> {
    let outlined = prompts.bounds.or(prompts.drawn);
    if let Some(bounds) = outlined.map(|b| region::understood_box(b, sight.grid)) {
        return Ok(vec![sight.fitted(&Extent::of_box(bounds))]);
    }
    let marked = prompts.marked(sight.grid);
    match (&prompts.dense, marked.or_else(|| prompts.extent(sight.grid))) {
        (Some(_), Some(extent)) => Ok(vec![sight.fitted(&extent)]),
        (None, Some(extent)) => Ok(sight.probes(&extent)),
        (_, None) => Err(SessionError::NoPrompt),
    }
}

/// Encodes the patches at those places.
pub(super) fn prepare(
    scan: &Arc<Scan>,
    prompts: &Prompts,
    observer: &mut Observer,
) -> Result<Patch, SessionError> {
    let patches = places(&Sight::of(scan), prompts)?;
    for patch in &patches {
        scan.encoded(patch, observer)?;
    }
    Ok(patches[patches.len() / 2].clone())
}
