//! Evaluation protocols: simulated users of several kinds, and how a case is run with one.
//!
//! Those of the paper are judged on the scan's own grid, or on the resampled region that the
//! network sees; users who steer, on the scan's own grid.

use super::region::Region;
use super::result::{CaseResult, Tally};
use super::steer::{self, Start};
use crate::memory;
use crate::model::Model;
use crate::prompt::Prompts;
use crate::prompt::simulate::{Errors, User, generator};
use crate::session::{Options, Scan, Session, SessionError, normalization};
use crate::volume::{Grid, Volume};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// An evaluation protocol: a kind of simulated user, with its name.
#[derive(Clone, Debug, PartialEq)]
pub struct Protocol {
    /// The protocol's name, one of [`NAMES`].
    pub name: String,
    /// The behaviour of the protocol's user.
    pub way: Way,
}

/// The behaviour of a protocol's user.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Way {
    /// The paper's: in every iteration the network alone gets the prompts of that iteration.
    Paper(User),
    /// Gives a first prompt, then corrects by one click or one stroke at a time, and sees the
    /// session's answers.
    Steer {
        /// The first prompt.
        start: Start,
        /// Whether corrections are strokes.
        strokes: bool,
    },
}

/// The names of all protocols: [`Protocol::named`] explains them.
pub const NAMES: [&str; 12] = [
    "plain",
    "plain-b-1",
    "plain-b-50",
    "basic",
    "erode",
    "dilate",
    "ultra",
    "ultra+",
    "click",
    "click-point",
    "click-mask",
    "scribble-one",
];

impl Protocol {
    /// The protocol called `name`; None for an unknown name. The first eight are the paper's;
    /// `points`, if given, replaces their number of points.
    ///
    /// | name | start | prompts |
    /// |---|---|---|
    /// | `plain` | nothing | a point in each iteration |
    /// | `plain-b-1`, `plain-b-50` | a box | 1 or 50 points in each iteration |
    /// | `basic` | a box | 1 to 50 points in each iteration |
    /// | `erode`, `dilate` | a box with its sides moved in or out by 5 voxels | as `basic` |
    /// | `ultra` | a box | as `basic`, and centreline scribbles |
    /// | `ultra+` | a box | as `basic`, and scribbles of all kinds |
    /// | `click` | a box | then one click at a time, in the middle of the largest error |
    /// | `click-point`, `click-mask` | a point, or a coarse mask | as `click` |
    /// | `scribble-one` | a box | then one stroke at a time, on one slice of the largest error |
    pub fn named(name: &str, points: Option<usize>) -> Option<Protocol> {
        let boxed = |low: usize, high: usize| User {
            points: [low, high],
            boxed: 1.0,
            ..User::of_points(1)
        };
        let steer = |start: Start, strokes: bool| {
            Some(Protocol { name: name.into(), way: Way::Steer { start, strokes } })
        };
        let mut user = match name {
            "click" => return steer(Start::Box, false),
            "click-point" => return steer(Start::Point, false),
            "click-mask" => return steer(Start::Mask, false),
            "scribble-one" => return steer(Start::Box, true),
            "plain" => User::of_points(1),
            "plain-b-1" => boxed(1, 1),
            "plain-b-50" => boxed(50, 50),
            "basic" => boxed(1, 50),
            "erode" => User { box_shift: -5, ..boxed(1, 50) },
            "dilate" => User { box_shift: 5, ..boxed(1, 50) },
            "ultra" => User { scribbles: 1.0, ..boxed(1, 50) },
            "ultra+" => User { scribbles: 1.0, all_kinds: true, ..boxed(1, 50) },
            _ => return None,
        };
        if let Some(n) = points {
            user.points = [n, n];
        }
        Some(Protocol { name: name.into(), way: Way::Paper(user) })
    }
}

/// Where answers are judged and corrected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Place {
    /// On the scan's own grid, as a user of the program sees it.
    Scan,
    /// On the resampled region that the network sees, as the paper does; objects larger than a
    /// patch by sliding windows.
    Patch,
}

/// How cases are run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Where answers are judged and corrected.
    pub place: Place,
    /// Iterations of a case, the first prompt included.
    pub iterations: usize,
    /// Seed of the simulated users.
    pub seed: u64,
}

/// Runs one case under one protocol: `label` is the truth, `[i][j][k]` on the image's grid. The
/// same seed and case name give the same prompts.
///
/// # Errors
/// The label is empty, the protocol cannot be judged there, or a session or the network fails; as
/// text.
pub fn run(
    model: &Arc<Model>,
    image: &Arc<Volume>,
    label: &[u8],
    case: &str,
    protocol: &Protocol,
    plan: Plan,
) -> Result<CaseResult, String> {
    let name: Vec<u64> = case.bytes().map(u64::from).collect();
    let mut rng = generator(plan.seed, &name);
    match (protocol.way, plan.place) {
        (Way::Steer { start, strokes }, Place::Scan) => {
            steer::run(model, image, label, case, (start, strokes), plan.iterations, &mut rng)
        }
        (Way::Steer { .. }, Place::Patch) => {
            Err("a protocol that steers is judged on the scan's own grid".into())
        }
        (Way::Paper(user), Place::Scan) => {
            on_scan(model, image, label, case, &user, plan.iterations, &mut rng)
        }
        (Way::Paper(user), Place::Patch) => {
            Region::new(model, image, label)?.run(model, case, &user, plan.iterations, &mut rng)
        }
    }
}

fn on_scan(
    model: &Arc<Model>,
    image: &Arc<Volume>,
    label: &[u8],
    case: &str,
    user: &User,
    iterations: usize,
    rng: &mut ChaCha8Rng,
) -> Result<CaseResult, String> {
    let size = image.grid.size;
    let bounds = user.bounds(rng, label, size).map(|b| b.map(|v| v as usize));
    let normalization = normalization(&**image, model.config().intensity);
    let options = Options { released: true, ..Default::default() };
    let mut session =
        Session::new(&Arc::new(Scan::new(model, image.clone(), normalization, options)));
    let mut tally = Tally::new(label, &image.grid);
    for _ in 0..iterations {
        let first = session.prediction().is_none();
        let errors = Errors::of(label, (!first).then_some(&tally.mask[..]));
        if !first && errors.is_empty() {
            tally.repeat();
            continue;
        }
        let points = model.device().cpu().run(|| user.correct(rng, &errors, size));
        let points =
            points.into_iter().map(|(p, positive)| (p.map(|c| c as usize), positive)).collect();
        let prompts = Prompts { points, bounds: bounds.filter(|_| first), ..Default::default() };
        match session.interact(&prompts) {
            Ok(_) => tally.add(session.mask()),
            // All of this iteration's points were outside the patch.
            Err(SessionError::NoPrompt) => tally.repeat(),
            Err(e) => return Err(e.to_string()),
        }
    }
    Ok(tally.finish(case, 1))
}

/// The name of the sides of a label in refusals of memory.
const SIDES: &str = "the two sides of a label";

/// The parts of an object left and right (in the patient) of the scan's middle plane, by name, each
/// as a mask; parts that are empty are left out. A connected component is on the side where its
/// centre is.
pub fn sides(label: &[u8], grid: &Grid) -> Vec<(&'static str, Vec<u8>)> {
    let [ni, nj, nk] = grid.size;
    let middle = grid.affine.apply(grid.size.map(|s| (s as f64 - 1.0) / 2.0))[0];
    let mut parts = [0; 2].map(|_| memory::zeroed::<u8>(SIDES, label.len()));
    let mut seen = memory::zeroed::<bool>(SIDES, label.len());
    for start in 0..label.len() {
        if label[start] == 0 || seen[start] {
            continue;
        }
        let (mut component, mut next, mut sum) = (vec![], vec![start], 0.0);
        seen[start] = true;
        while let Some(at) = next.pop() {
            let (i, j, k) = (at / (nj * nk), at / nk % nj, at % nk);
            component.push(at);
            sum += grid.affine.apply([i as f64, j as f64, k as f64])[0];
            let around = [
                (i > 0, at.wrapping_sub(nj * nk)),
                (i + 1 < ni, at + nj * nk),
                (j > 0, at.wrapping_sub(nk)),
                (j + 1 < nj, at + nk),
                (k > 0, at.wrapping_sub(1)),
                (k + 1 < nk, at + 1),
            ];
            for (exists, other) in around {
                if exists && label[other] != 0 && !seen[other] {
                    seen[other] = true;
                    next.push(other);
                }
            }
        }
        // The world's first axis runs to the patient's right.
        let right = sum / component.len() as f64 > middle;
        component.iter().for_each(|&at| parts[usize::from(right)][at] = 1);
    }
    let [left, right] = parts;
    [("left", left), ("right", right)].into_iter().filter(|(_, m)| m.contains(&1)).collect()
}
