//! Users who steer: a first prompt, then one click or stroke at a time, on the scan's own grid. The
//! click is the CVPR 2025 challenge's.

use super::metrics::Surfaces;
use super::result::{CaseResult, Steered, Tally};
use crate::data::coarse::{Coarseness, coarse};
use crate::model::Model;
use crate::prompt::simulate::click::{click, stroke};
use crate::prompt::simulate::{Errors, bounding_box};
use crate::prompt::{Dense, Prompts};
use crate::session::{Options, Scan, Session, normalization};
use crate::volume::Volume;
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;
use std::time::Instant;

/// The first prompt of a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// The object's box.
    Box,
    /// A click in the object's middle.
    Point,
    /// A mask that is roughly right.
    Mask,
}

/// A decrease that counts as a loss.
const LOSS: f64 = 0.01;
/// The Dice values to which clicks are counted.
const GOALS: [f64; 3] = [0.80, 0.85, 0.90];
/// The challenge's rule: no surface Dice if the overlap is no more than this.
const LEAST_DICE: f64 = 0.2;
/// The coarse mask of `click-mask`.
const COARSE: Coarseness = Coarseness { rough: 0.12, cells: 5, shift: -0.04 };

pub(super) fn run(
    model: &Arc<Model>,
    image: &Arc<Volume>,
    label: &[u8],
    case: &str,
    (start, strokes): (Start, bool),
    iterations: usize,
    rng: &mut ChaCha8Rng,
) -> Result<CaseResult, String> {
    let size = image.grid.size;
    let normalization = normalization(&**image, model.config().intensity);
    let mut session =
        Session::new(&Arc::new(Scan::new(model, image.clone(), normalization, Options::default())));
    let mut tally = Tally::new(label, &image.grid);
    let mut s = Steered::default();
    let mut all: Vec<([usize; 3], bool)> = vec![];
    let place = |v: [usize; 3]| (v[0] * size[1] + v[1]) * size[2] + v[2];
    let mut previous: Option<f64> = None;
    for t in 0..iterations {
        let errors = Errors::of(label, (t > 0).then(|| session.mask()).as_deref());
        let mut prompts = Prompts::default();
        match (t, start) {
            (0, Start::Box) => {
                prompts.bounds = bounding_box(label, size).map(|b| b.map(|v| v as usize))
            }
            (0, Start::Mask) => {
                prompts.dense =
                    Some(Dense::Mask(coarse(rng, label, size, image.grid.spacing(), COARSE)))
            }
            _ if strokes && t > 0 => prompts.points = voxels(stroke(rng, &errors, size)),
            _ => prompts.points = voxels(click(rng, &errors, size)),
        }
        if prompts.is_empty() {
            tally.repeat();
            repeat(&mut s);
            continue;
        }
        let begun = Instant::now();
        let prediction = session.interact(&prompts).map_err(|e| e.to_string())?.clone();
        s.seconds.push(begun.elapsed().as_secs_f64());
        let mask = session.mask();
        let obeyed = |list: &[([usize; 3], bool)]| {
            list.iter().filter(|(v, positive)| (mask[place(*v)] != 0) == *positive).count()
        };
        s.said += prompts.points.len();
        s.obeyed += obeyed(&prompts.points);
        all.extend(&prompts.points);
        s.held = obeyed(&all);
        let surfaces = Surfaces::of(label, &mask, &image.grid);
        tally.add(mask);
        let dice = tally.last();
        if let (Some(c), true) =
            (prediction.candidates.get(prediction.selected), prediction.looks > 0)
        {
            s.scores.push([c.score as f64, dice]);
        }
        s.expected_off.extend(prediction.score.map(|e| (e as f64 - dice).abs()));
        let counts = |nsd: f64| if dice > LEAST_DICE && nsd.is_finite() { nsd } else { 0.0 };
        s.nsd_2.push(counts(surfaces.nsd(2.0)));
        s.nsd_5.push(counts(surfaces.nsd(5.0)));
        if let Some(previous) = previous {
            s.steps += 1;
            s.losses += usize::from(dice < previous - LOSS);
        }
        previous = Some(dice);
    }
    let dice = tally.dice().to_vec();
    s.auc = [area(&dice), area(&s.nsd_2)];
    s.clicks_to = GOALS.map(|goal| dice.iter().position(|d| *d >= goal).unwrap_or(iterations));
    Ok(CaseResult { steered: Some(s), ..tally.finish(case, 1) })
}

fn voxels(points: impl IntoIterator<Item = ([i32; 3], bool)>) -> Vec<([usize; 3], bool)> {
    points.into_iter().map(|(p, positive)| (p.map(|c| c as usize), positive)).collect()
}

/// Records that nothing was left to correct.
fn repeat(s: &mut Steered) {
    for list in [&mut s.nsd_2, &mut s.nsd_5] {
        list.extend(list.last().copied());
    }
}

/// The area by the trapezoidal rule under the values after the first five corrections.
fn area(values: &[f64]) -> f64 {
    let five = values.get(1..values.len().min(6)).unwrap_or_default();
    five.windows(2).map(|w| (w[0] + w[1]) / 2.0).sum()
}
