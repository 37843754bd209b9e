//! A simulated user who steers: a start of any kind, then a click or a stroke at a time, in
//! reaction to the answer that a session makes of the network's.
//!
//! The network learns with the inputs that a [session](crate::session) gives it: every prompt so
//! far, and as dense prompt the answer in which the clicks already hold. The user corrects the
//! session's answer, not the network's own.

use super::step::Round;
use crate::data::coarse::{Coarseness, coarse};
use crate::memory;
use crate::model::PatchPrompts;
use crate::ops::loss::Emphasis;
use crate::prompt::simulate::click::{click, depths, stroke};
use crate::prompt::simulate::{Errors, User, bounding_box, drawn_box, voxel};
use crate::session::correction::{Click, Steering, correct, diameter, disagreeing, locality};
use crate::session::turn::{blend, marks};
use crate::volume::distance::components;
use rand::{Rng, RngExt};

/// What messages call the memory of what this person sees and draws.
const SEEN: &str = "the view of a simulated user";

/// Standard deviation, in voxels, of the neighbourhood of clicks in which errors weigh more.
const NEIGHBOURHOOD: f32 = 3.0;

/// How a person goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    /// A click in the middle of the largest error.
    Clicks,
    /// A click somewhere in an error, usually away from its border.
    LooseClicks,
    /// A short stroke on a slice of the largest error.
    Strokes,
    /// Many points, as the paper's user.
    Points,
}

/// A simulated user who steers, at work on one patch of `[s, s, s]` voxels.
///
/// In each turn [`Clicker::give`] has the prompts, in reaction to the network's answer to the turn
/// before.
pub struct Clicker<'a> {
    label: &'a [u8],
    size: [usize; 3],
    style: Style,
    bounds: Option<[f32; 6]>,
    /// The mask that the user began with.
    given: Option<Vec<f32>>,
    clicks: Vec<Click>,
    /// Radius of a click in the refiner's maps.
    radius: f32,
    /// The weight of the voxels around clicks.
    weight: f64,
    /// Whether the network may change all of the answer at every click.
    everywhere: bool,
    /// Whether this user now and then gives prompts that the answer already obeys.
    wavers: bool,
    how: Steering,
    /// The dense prompt of the present turn, and where the network may change it.
    dense: Option<(Vec<f32>, Vec<f32>)>,
}

impl<'a> Clicker<'a> {
    /// A user drawn at random: what they begin with (a box, a point or a mask), and how they go on
    /// (with clicks, strokes or many points).
    ///
    /// `label` is the object, 0 or 1 in each of `edge`³ voxels. `radius` is that of a click in the
    /// refiner's maps, in voxels, and `weight` that of the cross entropy around clicks in the loss.
    pub fn new(
        rng: &mut impl Rng,
        label: &'a [u8],
        edge: usize,
        radius: f32,
        weight: f64,
    ) -> Clicker<'a> {
        let size = [edge; 3];
        let style = match rng.random_range(0..20) {
            0..11 => Style::Clicks,
            11..14 => Style::LooseClicks,
            14..18 => Style::Strokes,
            _ => Style::Points,
        };
        let start = rng.random_range(0..20);
        let bounds =
            (start < 11).then(|| some_box(rng, label, size)).flatten().map(|b| b.map(|v| v as f32));
        let given = (start >= 17).then(|| some_mask(rng, label, size));
        let everywhere = rng.random_bool(0.4);
        let bounded = bounds.is_some() || given.is_some();
        let how = Steering::of(bounded);
        Clicker {
            label,
            size,
            style,
            bounds,
            given,
            clicks: vec![],
            radius,
            weight,
            everywhere,
            wavers: true,
            how,
            dense: None,
        }
    }

    /// A user who gives the object's exact box, then in each turn a click in the middle of the
    /// largest error; nothing is left to chance. The arguments are those of [`Clicker::new`].
    pub fn exact(label: &'a [u8], edge: usize, radius: f32) -> Clicker<'a> {
        let size = [edge; 3];
        let tight = bounding_box(label, size).map(|b| b.map(|v| v as f32));
        let how = Steering::default();
        Clicker {
            label,
            size,
            style: Style::Clicks,
            bounds: tight,
            given: None,
            clicks: vec![],
            radius,
            weight: 0.0,
            everywhere: false,
            wavers: false,
            how,
            dense: None,
        }
    }

    /// The answer that a session makes of the network's logits `proposal` in the present turn, as
    /// logits.
    ///
    /// A session also looks at the scan's values; here corrections depend on positions alone.
    pub fn settle(&self, proposal: &[f32]) -> Vec<f32> {
        let mut answer = match &self.dense {
            None => memory::copied(SEEN, proposal),
            Some((dense, weights)) => blend(dense, proposal, weights),
        };
        let across = diameter(&answer);
        correct(&mut answer, self.size, &self.clicks, across, &self.how, None);
        answer
    }

    /// The prompts of turn `t`, from 0, given the network's logits of the turn before (none in the
    /// first).
    pub fn give(&mut self, rng: &mut impl Rng, t: usize, answer: Option<&[f32]>) -> Round {
        let settled = answer.map(|a| self.settle(a));
        let before = settled.or_else(|| self.given.take());
        let marked = |b: &Vec<f32>| memory::collected(SEEN, b.iter().map(|v| u8::from(*v > 0.0)));
        let mask: Option<Vec<u8>> = before.as_ref().map(marked);
        let errors = Errors::of(self.label, mask.as_deref());
        let fresh = match (&before, self.bounds) {
            // A box is enough by itself.
            (None, Some(_)) if !self.wavers || rng.random_bool(0.8) => vec![],
            _ if !self.wavers && errors.is_empty() => vec![],
            _ if errors.is_empty() || (self.wavers && t > 0 && rng.random_bool(0.05)) => {
                self.agree(rng, mask.as_deref())
            }
            _ => self.disagree(rng, &errors),
        };
        // Later prompts hold.
        self.clicks.retain(|old| fresh.iter().all(|new| new.0 != old.0));
        self.clicks.extend(&fresh);
        let mut dense = None;
        self.dense = before.map(|before| {
            let across = diameter(&before);
            let wrong = disagreeing(&before, self.size, &fresh);
            let weights = match self.everywhere {
                true => memory::filled(SEEN, 1.0, before.len()),
                false => {
                    let mut near = locality(&before, self.size, &wrong, across, &self.how);
                    let trust = self.how.trust(wrong.len());
                    near.iter_mut().for_each(|w| *w *= trust);
                    near
                }
            };
            let mut corrected = before;
            correct(&mut corrected, self.size, &self.clicks, across, &self.how, None);
            dense = Some(memory::copied(SEEN, &corrected));
            (corrected, weights)
        });
        let edge = self.size[0];
        let emphasis = (self.weight > 0.0 && !self.clicks.is_empty()).then(|| {
            let places = memory::collected(SEEN, self.clicks.iter().map(|(p, _)| *p));
            let emphasis = Emphasis::new(&places, self.size, NEIGHBOURHOOD, self.weight);
            emphasis.expect("clicks are voxels of the patch")
        });
        let marks = Some(marks(&self.clicks, edge, self.radius));
        Round {
            prompts: PatchPrompts { points: self.clicks.clone(), bounds: self.bounds },
            marks,
            dense,
            emphasis,
        }
    }

    /// Clicks where the answer is wrong.
    fn disagree(&self, rng: &mut impl Rng, errors: &Errors) -> Vec<Click> {
        match self.style {
            Style::Clicks => click(rng, errors, self.size).into_iter().collect(),
            Style::LooseClicks => loose(rng, errors, self.size).into_iter().collect(),
            Style::Strokes => stroke(rng, errors, self.size),
            Style::Points => {
                User { points: [1, 30], ..User::of_points(1) }.correct(rng, errors, self.size)
            }
        }
    }

    /// A click where the answer is right: on the object, or off it.
    fn agree(&self, rng: &mut impl Rng, mask: Option<&[u8]>) -> Vec<Click> {
        let positive = rng.random_bool(0.6);
        let fits = |at: &usize| {
            let on = self.label[*at] != 0;
            on == positive && mask.is_none_or(|m| (m[*at] != 0) == on)
        };
        let all: Vec<usize> = (0..self.label.len()).filter(fits).collect();
        let one = |at: usize| (voxel(at, self.size), positive);
        if all.is_empty() { vec![] } else { vec![one(all[rng.random_range(0..all.len())])] }
    }
}

/// A click in a component of the error, chosen with a probability by its size, at a voxel chosen by
/// its depth.
fn loose(rng: &mut impl Rng, errors: &Errors, size: [usize; 3]) -> Option<Click> {
    let wrong = errors.wrong();
    let total = wrong.iter().filter(|w| **w != 0).count();
    let mut at = rng.random_range(0..total.max(1));
    let component = components(&wrong, size).into_iter().find(|c| {
        let here = at < c.len();
        at = at.saturating_sub(c.len());
        here
    })?;
    let depths = depths(&component, size);
    let mut left = rng.random_range(0.0..depths.iter().sum::<f32>().max(1e-6));
    let chosen = component.iter().zip(&depths).find(|(_, d)| {
        left -= **d;
        left < 0.0
    });
    let at = *chosen.map_or(&component[0], |c| c.0);
    Some((voxel(at, size), errors.is_missed(at)))
}

/// A box as people draw them: roughly right, shifted, too small, one slice thick (then as a session
/// interprets it), or a line across the largest slice.
fn some_box(rng: &mut impl Rng, label: &[u8], size: [usize; 3]) -> Option<[i32; 6]> {
    let tight = drawn_box(rng, label, size, 0, 0)?;
    let within = |b: [i32; 6]| -> [i32; 6] {
        std::array::from_fn(|f| {
            let a = f % 3;
            if f < 3 {
                b[f].clamp(0, size[a] as i32 - 1)
            } else {
                b[f].clamp(b[a].clamp(0, size[a] as i32 - 1) + 1, size[a] as i32)
            }
        })
    };
    match rng.random_range(0..10) {
        0..5 => drawn_box(rng, label, size, 4, 0),
        5 | 6 => {
            // Shifted by up to a tenth, each side slightly off.
            let mut b = tight;
            for a in 0..3 {
                let side = (tight[a + 3] - tight[a]) as f32;
                let shift = side * rng.random_range(-0.1..0.1);
                b[a] += (shift + side * rng.random_range(-0.08..0.12)).round() as i32;
                b[a + 3] += (shift + side * rng.random_range(-0.12..0.08)).round() as i32;
            }
            Some(within(b))
        }
        _ => {
            let axis = rng.random_range(0..3);
            let slice = rng.random_range(
                tight[axis] + (tight[axis + 3] - tight[axis]) / 4
                    ..tight[axis + 3] - (tight[axis + 3] - tight[axis] - 1) / 4,
            );
            let mut only = memory::copied(SEEN, label);
            for (at, v) in only.iter_mut().enumerate().filter(|(_, v)| **v != 0) {
                *v = u8::from(voxel(at, size)[axis] == slice);
            }
            let mut b = drawn_box(rng, &only, size, 2, 0)?;
            let others: Vec<i32> = (0..3).filter(|a| *a != axis).map(|a| b[a + 3] - b[a]).collect();
            let half = (others[0] + others[1]) / 4;
            (b[axis], b[axis + 3]) = (slice - half, slice + half + 1);
            Some(within(b))
        }
    }
}

/// A mask drawn by a person or a program: the object's with its surface moved at random, grown,
/// shrunk, or cut.
fn some_mask(rng: &mut impl Rng, label: &[u8], size: [usize; 3]) -> Vec<f32> {
    let how = Coarseness {
        rough: rng.random_range(0.0..0.2),
        cells: rng.random_range(3..8),
        shift: rng.random_range(-0.1..0.1),
    };
    let mut mask = coarse(rng, label, size, [1.0; 3], how);
    if rng.random_bool(0.3) {
        let (axis, low) = (rng.random_range(0..3), rng.random_bool(0.5));
        let b = bounding_box(label, size).unwrap_or([0; 6]);
        for (at, v) in mask.iter_mut().enumerate() {
            *v &= u8::from((voxel(at, size)[axis] * 2 < b[axis] + b[axis + 3]) == low);
        }
    }
    memory::collected(SEEN, mask.into_iter().map(|v| if v != 0 { 8.0 } else { -8.0 }))
}
