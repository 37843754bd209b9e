//! The result of a case, and how it is collected.

use super::metrics::{Metrics, dice};
use crate::volume::Grid;
use serde::{Deserialize, Deserializer, Serialize};

/// The result of a case under a protocol: how well one object was segmented.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CaseResult {
    /// The case, and the side if both are judged separately.
    pub case: String,
    /// The object's volume in ml.
    pub ml: f64,
    /// Dice after each iteration.
    pub dice: Vec<f64>,
    /// All metrics of the first answer.
    pub first: Metrics,
    /// All metrics of the last answer.
    pub last: Metrics,
    /// Windows that the network saw: 1 unless the object is larger than a patch.
    pub windows: usize,
    /// How well the user could steer, if the protocol measures that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steered: Option<Steered>,
    /// The last mask, on the grid it was judged on.
    #[serde(skip)]
    pub mask: Vec<u8>,
}

/// How well a user could steer.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Steered {
    /// Surface Dice at 2 mm after each answer.
    pub nsd_2: Vec<f64>,
    /// Surface Dice at 5 mm after each answer.
    pub nsd_5: Vec<f64>,
    /// Area under Dice, and under surface Dice at 2 mm, after 1 to 5 corrections.
    pub auc: [f64; 2],
    /// Corrections to a Dice of 0.80, 0.85 and 0.90; one more than their number if it was not
    /// reached.
    pub clicks_to: [usize; 3],
    /// Voxels given as prompts: clicks, and those of strokes.
    pub said: usize,
    /// Voxels given as prompts that the answer to them obeyed.
    pub obeyed: usize,
    /// Voxels given as prompts that the last answer obeys.
    pub held: usize,
    /// Corrections.
    pub steps: usize,
    /// Corrections after which Dice was lower by more than 0.01.
    pub losses: usize,
    /// The network's score at each answer for which it was asked, and that answer's Dice: the data
    /// that a model's calibration is fitted to.
    #[serde(deserialize_with = "pairs")]
    pub scores: Vec<[f64; 2]>,
    /// Differences between the expected and the actual Dice, if the model is calibrated.
    #[serde(deserialize_with = "numbers")]
    pub expected_off: Vec<f64>,
    /// Seconds to each answer.
    pub seconds: Vec<f64>,
}

/// JSON has no NaN; it is null there. A network of no use may have such scores.
fn numbers<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<f64>, D::Error> {
    Ok(Vec::<Option<f64>>::deserialize(from)?.into_iter().map(|v| v.unwrap_or(f64::NAN)).collect())
}

fn pairs<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<[f64; 2]>, D::Error> {
    Ok(Vec::<[Option<f64>; 2]>::deserialize(from)?
        .into_iter()
        .map(|p| p.map(|v| v.unwrap_or(f64::NAN)))
        .collect())
}

/// Collects masks into a result.
pub(super) struct Tally<'a> {
    truth: &'a [u8],
    grid: &'a Grid,
    dice: Vec<f64>,
    first: Option<Metrics>,
    pub(super) mask: Vec<u8>,
}

impl<'a> Tally<'a> {
    pub fn new(truth: &'a [u8], grid: &'a Grid) -> Tally<'a> {
        Tally { truth, grid, dice: vec![], first: None, mask: vec![] }
    }

    /// The mask after an iteration.
    pub fn add(&mut self, mask: Vec<u8>) {
        self.dice.push(dice(self.truth, &mask));
        if self.first.is_none() {
            self.first = Some(Metrics::of(self.truth, &mask, self.grid));
        }
        self.mask = mask;
    }

    /// Dice after each iteration so far.
    pub fn dice(&self) -> &[f64] {
        &self.dice
    }

    /// The last of them; 0 before any.
    pub fn last(&self) -> f64 {
        self.dice.last().copied().unwrap_or(0.0)
    }

    /// Records that the iteration changed nothing.
    pub fn repeat(&mut self) {
        self.dice.extend(self.dice.last().copied());
    }

    pub fn finish(self, case: &str, windows: usize) -> CaseResult {
        let last = Metrics::of(self.truth, &self.mask, self.grid);
        let voxels = self.truth.iter().filter(|v| **v != 0).count();
        let first = self.first.unwrap_or(last);
        CaseResult {
            case: case.into(),
            ml: voxels as f64 * self.grid.voxel_ml(),
            dice: self.dice,
            first,
            last,
            windows,
            steered: None,
            mask: self.mask,
        }
    }
}
