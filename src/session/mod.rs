//! Working on a scan: encode it once, then interact as often as the user corrects.
//!
//! An [`EncodedScan`] is a scan's patch with everything the network knows of it; it is immutable and shared. A [`Session`] is one object on
//! it: its prompts so far, its answers, its undo history. Several objects are several sessions on one encoded scan. The same prompts in the same
//! order give the same bits.

use crate::device::Cpu;
use crate::model::{Config, Features, Intensity, Model, Observer, PatchPrompts, prompt_maps};
use crate::prompt::{Dense, Prompts};
use crate::tensor::{OpError, Tensor};
use crate::volume::intensity::Normalization;
use crate::volume::patch::{Extent, Patch};
use crate::volume::resample::{Interpolation, sample};
use crate::volume::{Grid, Voxels};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The logit that a voxel of a mask given as dense prompt gets, negative outside: a probability of 0.9997.
const MASK_LOGIT: f32 = 8.0;

/// Most points that the prompt encoder is given at once, the most that the network was evaluated with: its attention grows with their square.
/// Of more, every n-th is taken; the refiner sees them all.
const MOST_POINTS: usize = 10_000;

/// Why an interaction could not be done.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The network refused.
    #[error(transparent)]
    Op(#[from] OpError),
    /// Nothing to go by.
    #[error("an interaction needs a point, a box, a scribble or a mask")]
    NoPrompt,
    /// A prompt is not on the image.
    #[error("{what} {voxel:?} lies outside the scan of {size:?} voxels")]
    Outside {
        /// `point` or `box corner`.
        what: &'static str,
        /// The voxel.
        voxel: [usize; 3],
        /// The scan's size.
        size: [usize; 3],
    },
    /// A dense prompt has another size.
    #[error("the dense prompt has {got} voxels, the scan has {expected}")]
    Dense {
        /// Its voxels.
        got: usize,
        /// The scan's.
        expected: usize,
    },
}

/// The spacing at which a patch of `edge` voxels is `fit` times as long as the longest side of an extent.
pub fn fitted_spacing(extent: &Extent, grid: &Grid, edge: usize, fit: f64) -> f64 {
    let step = grid.spacing();
    let longest = (0..3).map(|a| (extent.high[a] - extent.low[a]) * step[a]).fold(0.0, f64::max);
    longest * fit / edge as f64
}

/// The spacing to work at, in mm: fitted to a box where there is one and the model fits objects, else the model's own.
pub fn working_spacing(config: &Config, grid: &Grid, bounds: Option<&Extent>) -> f64 {
    match (config.fit, bounds) {
        (Some(fit), Some(bounds)) => fitted_spacing(bounds, grid, config.patch, fit as f64),
        _ => config.spacing as f64,
    }
}

/// The normalisation of a scan for a model: its own statistics, or percentiles of the scan where there are none or where they do not apply; then also why.
pub fn normalization(image: &impl Voxels, intensity: Option<Intensity>) -> (Normalization, Option<&'static str>) {
    let why = match intensity {
        Some(i) if i.applies_to(image) => return (Normalization { clip: i.clip, mean: i.mean, sd: i.sd }, None),
        Some(_) => "no value is below 0: this is taken for a scan without Hounsfield units, and normalised by its own percentiles",
        None => "the model records no intensity statistics: percentiles of the scan are used",
    };
    (Normalization::of_percentiles(image), Some(why))
}

/// A scan, encoded around a place.
pub struct EncodedScan {
    model: Arc<Model>,
    grid: Grid,
    patch: Patch,
    features: Features,
    /// Time spent cutting the patch and encoding it.
    pub seconds: [Duration; 2],
}

impl EncodedScan {
    /// Cuts the patch around `extent` out of `image`, at `spacing` mm (coarser where the extent would not fit), and encodes it.
    pub fn new(
        model: &Arc<Model>,
        image: &impl Voxels,
        normalization: &Normalization,
        spacing: f64,
        extent: &Extent,
    ) -> Result<EncodedScan, OpError> {
        EncodedScan::observed(model, image, normalization, spacing, extent, &mut Observer::none())
    }

    /// The same while somebody watches.
    pub fn observed(
        model: &Arc<Model>,
        image: &impl Voxels,
        normalization: &Normalization,
        spacing: f64,
        extent: &Extent,
        observer: &mut Observer,
    ) -> Result<EncodedScan, OpError> {
        let start = Instant::now();
        let (edge, grid) = (model.config().patch, *image.grid());
        let patch = Patch::place(&grid, edge, spacing, extent);
        let values = model.device().cpu().run(|| patch.extract(image, normalization));
        let cut = Instant::now();
        let features = model.encode(&Tensor::new([edge; 3], values), observer)?;
        let seconds = [cut - start, cut.elapsed()];
        Ok(EncodedScan { model: model.clone(), grid, patch, features, seconds })
    }

    /// Encodes a scan where prompts point: at their box, else what they mark, at `spacing` mm or the model's own choice.
    pub fn around(
        model: &Arc<Model>,
        image: &impl Voxels,
        normalization: &Normalization,
        spacing: Option<f64>,
        prompts: &Prompts,
        observer: &mut Observer,
    ) -> Result<EncodedScan, SessionError> {
        let bounds = prompts.bounds.map(Extent::of_box);
        let spacing = spacing.unwrap_or_else(|| working_spacing(model.config(), image.grid(), bounds.as_ref()));
        let extent = prompts.extent(image.grid()).ok_or(SessionError::NoPrompt)?;
        Ok(EncodedScan::observed(model, image, normalization, spacing, &extent, observer)?)
    }

    /// The scan's grid.
    pub fn grid(&self) -> &Grid {
        &self.grid
    }

    /// Brings a prediction back to the scan's own grid: calls `visit(voxel, logit)` for every voxel (its place in `[i][j][k]` order) that the patch reaches.
    pub fn paste(&self, prediction: &Prediction, visit: impl FnMut(usize, f32)) {
        self.patch.paste(prediction.logits.data(), &self.grid, visit);
    }

    /// Where the patch lies.
    pub fn patch(&self) -> &Patch {
        &self.patch
    }

    /// The network.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Bytes that the encoded scan holds.
    pub fn bytes(&self) -> usize {
        self.features.bytes()
    }
}

/// A candidate mask of an interaction.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// What the network thinks its Dice is, 0 to 1.
    pub score: f32,
    /// One bit a patch voxel, first voxel in the highest bit.
    pub bits: Vec<u8>,
}

/// The answer of an interaction.
#[derive(Clone)]
pub struct Prediction {
    /// Logits on the patch `[s, s, s]`, refined.
    pub logits: Tensor,
    /// All candidates.
    pub candidates: Vec<Candidate>,
    /// The one that was refined into the answer.
    pub selected: usize,
    /// Time spent on prompts and tokens, decoder, refiner.
    pub seconds: [Duration; 3],
    /// Points of this interaction that lay outside the patch and were left out.
    pub left_out: usize,
    /// Points of this interaction that only the refiner saw, because there were more than the prompt encoder takes.
    pub thinned: usize,
}

/// What a session knew after an interaction.
#[derive(Clone)]
struct State {
    /// Patch voxels of all prompts so far, positive where true.
    history: Arc<Vec<([i32; 3], bool)>>,
    bounds: Option<[f32; 6]>,
    prediction: Option<Arc<Prediction>>,
}

/// One object on an encoded scan.
pub struct Session {
    scan: Arc<EncodedScan>,
    /// The states reached, the first of them empty; those behind `now` can be redone.
    states: Vec<State>,
    now: usize,
}

impl Session {
    /// A new object.
    pub fn new(scan: &Arc<EncodedScan>) -> Session {
        let empty = State { history: Arc::default(), bounds: None, prediction: None };
        Session { scan: scan.clone(), states: vec![empty], now: 0 }
    }

    /// The scan it works on.
    pub fn scan(&self) -> &Arc<EncodedScan> {
        &self.scan
    }

    /// The answer so far.
    pub fn prediction(&self) -> Option<&Arc<Prediction>> {
        self.states[self.now].prediction.as_ref()
    }

    /// How many interactions can be undone and redone.
    pub fn depth(&self) -> (usize, usize) {
        (self.now, self.states.len() - 1 - self.now)
    }

    /// Takes the last interaction back; false where there is none.
    pub fn undo(&mut self) -> bool {
        let can = self.now > 0;
        self.now -= usize::from(can);
        can
    }

    /// Does an undone interaction again; false where there is none.
    pub fn redo(&mut self) -> bool {
        let can = self.now + 1 < self.states.len();
        self.now += usize::from(can);
        can
    }

    /// Forgets prompts, answers and history.
    pub fn reset(&mut self) {
        self.states.truncate(1);
        self.now = 0;
    }

    /// One interaction. The dense prompt is the one given, else the previous answer; a box is kept until another replaces it; points count for this
    /// interaction, and for the refiner from now on. On an error the session stays as it was.
    pub fn interact(&mut self, prompts: &Prompts) -> Result<&Arc<Prediction>, SessionError> {
        self.interact_observed(prompts, &mut Observer::none())
    }

    /// The same while somebody watches.
    pub fn interact_observed(&mut self, prompts: &Prompts, observer: &mut Observer) -> Result<&Arc<Prediction>, SessionError> {
        let (scan, model) = (&self.scan, &self.scan.model);
        let s = model.config().patch;
        let state = &self.states[self.now];
        self.check(prompts)?;
        let bounds = match prompts.bounds {
            Some(b) => Some(scan.patch.bounds(&Extent::of_box(b))),
            None => state.bounds,
        };
        if prompts.points.is_empty() && bounds.is_none() && prompts.dense.is_none() {
            return Err(SessionError::NoPrompt);
        }
        let mut points = vec![];
        let mut history = state.history.as_ref().clone();
        let (mut seen, mut left_out) = (HashSet::new(), 0);
        for (p, positive) in &prompts.points {
            match scan.patch.voxel(p.map(|c| c as f64)) {
                // Voxels of a scan finer than the patch can share one of the patch's: said once is enough.
                Some(v) if seen.insert((v, *positive)) => {
                    points.push((v, *positive));
                    history.push((v, *positive));
                }
                Some(_) => {}
                None => left_out += 1,
            }
        }
        let all = points.len();
        if all > MOST_POINTS {
            points = (0..MOST_POINTS).map(|n| points[n * all / MOST_POINTS]).collect();
        }
        let thinned = all - points.len();
        if points.is_empty() && left_out > 0 && bounds.is_none() && prompts.dense.is_none() {
            return Err(SessionError::NoPrompt);
        }
        let cpu = model.device().cpu();
        let maps = prompt_maps(model.device(), s, history.iter());
        let dense = match (&prompts.dense, &state.prediction) {
            (Some(dense), _) => on_patch(cpu, dense, &scan.grid, &scan.patch),
            (None, Some(previous)) => previous.logits.clone(),
            (None, None) => Tensor::from_buffer([s; 3], cpu.zeros(s * s * s)),
        };
        let prompts = PatchPrompts { points, bounds };
        let answer = model.interact(&scan.features, &prompts, &dense, &maps, observer)?;
        let summary = answer.summary();
        let each = summary.scores.iter().zip(&summary.bits[1..]);
        let candidates = each.map(|(score, bits)| Candidate { score: *score, bits: bits.clone() }).collect();
        let prediction = Prediction {
            logits: answer.logits.value().reshape([s; 3]),
            candidates,
            selected: summary.selected,
            seconds: answer.seconds,
            left_out,
            thinned,
        };
        self.states.truncate(self.now + 1);
        self.states.push(State { history: Arc::new(history), bounds, prediction: Some(Arc::new(prediction)) });
        self.now += 1;
        Ok(self.prediction().expect("just pushed"))
    }

    fn check(&self, prompts: &Prompts) -> Result<(), SessionError> {
        let size = self.scan.grid.size;
        let beyond = |v: [usize; 3], slack: usize| (0..3).any(|a| v[a] >= size[a] + slack);
        if let Some((voxel, _)) = prompts.points.iter().find(|(p, _)| beyond(*p, 0)) {
            return Err(SessionError::Outside { what: "point", voxel: *voxel, size });
        }
        if let Some(b) = prompts.bounds {
            let (low, high) = ([b[0], b[1], b[2]], [b[3], b[4], b[5]]);
            if beyond(high, 1) || (0..3).any(|a| low[a] >= high[a]) {
                return Err(SessionError::Outside { what: "box corner", voxel: high, size });
            }
        }
        let got = match &prompts.dense {
            Some(Dense::Mask(m)) => m.len(),
            Some(Dense::Logits(l)) => l.len(),
            None => return Ok(()),
        };
        let expected = self.scan.grid.voxels();
        if got == expected { Ok(()) } else { Err(SessionError::Dense { got, expected }) }
    }

    /// The answer on the scan's own grid, `[i][j][k]`: 1 where its resampled logit is positive. All 0 before the first interaction.
    pub fn mask(&self) -> Vec<u8> {
        self.paste(0, |logit| u8::from(logit > 0.0))
    }

    /// The answer's probabilities on the scan's own grid; 0 outside the patch.
    pub fn probability(&self) -> Vec<f32> {
        self.paste(0.0, |logit| 1.0 / (1.0 + (-logit).exp()))
    }

    fn paste<T: Copy>(&self, outside: T, value: impl Fn(f32) -> T) -> Vec<T> {
        let mut out = vec![outside; self.scan.grid.voxels()];
        if let Some(p) = self.prediction() {
            self.scan.paste(p, |at, logit| out[at] = value(logit));
        }
        out
    }
}

/// A dense prompt as logits on the patch.
fn on_patch(cpu: &Cpu, dense: &Dense, grid: &Grid, patch: &Patch) -> Tensor {
    let (logits, how) = match dense {
        Dense::Mask(m) => (m.iter().map(|v| if *v != 0 { MASK_LOGIT } else { -MASK_LOGIT }).collect(), Interpolation::Nearest),
        Dense::Logits(l) => (l.clone(), Interpolation::Linear),
    };
    let to_image = patch.from_image.inverse();
    let s = patch.grid.size[0];
    let mut out = cpu.take(s * s * s);
    cpu.chunks_mut(&mut out, s * s, |i, plane| {
        for (at, v) in plane.iter_mut().enumerate() {
            let place = to_image.apply([i as f64, (at / s) as f64, (at % s) as f64]);
            *v = sample(&logits, grid.size, place, how).map_or(-MASK_LOGIT, |v| v as f32);
        }
    });
    Tensor::from_buffer([s; 3], out)
}
