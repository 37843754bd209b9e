//! Measuring: the peak rates of this machine, the work of each op of a network, the time that a
//! user waits.
//!
//! ```no_run
//! use prism::Device;
//! use prism::bench::{Problem, Timing, measure};
//! use std::time::Duration;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::open("cpu", 0)?;
//! let problem: Problem = "lnorm:m512c768".parse()?;
//! let timing = Timing { long: Duration::from_millis(200), fewest: 5, cold: false };
//! let outcome = measure(&device, &problem, timing)?;
//! assert!(outcome.is_right());
//! println!("{}: {:.1} µs", outcome.problem, outcome.median * 1e6);
//! # Ok(())
//! # }
//! ```

pub mod ceilings;
mod prepared;
mod problem;
mod report;
mod run;
mod step;
mod variants;

pub use ceilings::{Ceilings, CudaCeilings};
pub use prepared::Prepared;
pub use problem::{Problem, ProblemError, Timed, launches_of, suite, training_launches};
pub use report::table;
pub use run::{Change, Outcome, Record, Timing, compare, measure};
pub use step::TrainingStep;
pub use variants::{
    LaunchCost, Tried, Variant, Variants, choice_keys, time_variants, try_variants,
};

use crate::device::Device;
use crate::device::profile::OpRecord;
use crate::model::{Features, Model, Observer, PatchPrompts, prompt_maps};
use crate::prompt::simulate::{generator, normal};
use crate::tensor::{OpError, Tensor};
use rand::RngExt;
use std::collections::HashSet;
use std::time::{Duration, Instant};

/// A network at work on an image of noise, to be timed: times do not depend on values.
pub struct Workload<'m> {
    model: &'m Model,
    image: Tensor,
    features: Features,
}

/// The times that a user waits for the answers to clicks.
pub struct Latency {
    /// The number of prompt voxels of each click.
    pub points: usize,
    /// The time of each click.
    pub clicks: Vec<Duration>,
}

impl Latency {
    /// The time within which a share of the clicks, 0 to 1, were answered: 0.5 for the median.
    ///
    /// # Panics
    /// If there are no clicks.
    pub fn percentile(&self, share: f64) -> Duration {
        let mut sorted = self.clicks.clone();
        sorted.sort();
        let at = (share * sorted.len() as f64).ceil() as usize;
        sorted[at.clamp(1, sorted.len()) - 1]
    }
}

impl<'m> Workload<'m> {
    /// A network that has encoded an image of noise, and the time that this took.
    pub fn new(model: &'m Model) -> Result<(Workload<'m>, Duration), OpError> {
        let s = model.config().patch;
        let mut rng = generator(1, &[]);
        let image = Tensor::new([s; 3], (0..s * s * s).map(|_| normal(&mut rng)).collect());
        let start = Instant::now();
        let features = encode(model, &image)?;
        Ok((Workload { model, image, features }, start.elapsed()))
    }

    /// Encodes `times` more times; returns the time of each.
    pub fn encode(&mut self, times: usize) -> Result<Vec<Duration>, OpError> {
        (0..times)
            .map(|_| {
                let start = Instant::now();
                self.features = encode(self.model, &self.image)?;
                Ok(start.elapsed())
            })
            .collect()
    }

    /// Times a number of clicks of `points` voxels each, at random places; each corrects the answer
    /// to the one before.
    pub fn click(&self, points: usize, clicks: usize) -> Result<Latency, OpError> {
        let s = self.model.config().patch;
        let mut dense = Tensor::new([s; 3], vec![0.0; s * s * s]);
        let mut taken = vec![];
        for click in 0..clicks {
            let prompts = scribble(s, points, click as u64);
            let start = Instant::now();
            dense = self.interact(&prompts, &dense)?;
            taken.push(start.elapsed());
        }
        Ok(Latency { points, clicks: taken })
    }

    fn interact(&self, prompts: &PatchPrompts, dense: &Tensor) -> Result<Tensor, OpError> {
        let (model, s) = (self.model, self.model.config().patch);
        let history = prompt_maps(model.device(), s, &prompts.points);
        let answer =
            model.interact(&self.features, prompts, dense, &history, &mut Observer::none())?;
        // The part of it that a user sees.
        std::hint::black_box(answer.summary()?);
        Ok(answer.logits.value().reshape([s; 3]))
    }

    /// The ops of encoding and of a click of `points` voxels, each from the run with the median
    /// total time of `times` runs; none if the network is not on the CPU.
    pub fn profile(
        &mut self,
        points: usize,
        times: usize,
    ) -> Result<Option<[Vec<OpRecord>; 2]>, OpError> {
        let Device::Cpu(cpu) = self.model.device().clone() else { return Ok(None) };
        let s = self.model.config().patch;
        let dense = Tensor::new([s; 3], vec![0.0; s * s * s]);
        let middle = |mut runs: Vec<Vec<OpRecord>>| {
            runs.sort_by_key(|run| run.iter().map(|op| op.time).sum::<Duration>());
            runs.swap_remove(runs.len() / 2)
        };
        let (mut encodes, mut clicks) = (vec![], vec![]);
        for time in 0..times.max(1) {
            let (encoded, seen) = cpu.profiled(|| encode(self.model, &self.image));
            self.features = encoded?;
            encodes.push(seen);
            let prompts = scribble(s, points, time as u64);
            let (answer, seen) = cpu.profiled(|| self.interact(&prompts, &dense));
            answer?;
            clicks.push(seen);
        }
        Ok(Some([middle(encodes), middle(clicks)]))
    }
}

fn encode(model: &Model, image: &Tensor) -> Result<Features, OpError> {
    let features = model.encode(image, &mut Observer::none())?;
    if let Device::Cuda(cuda) = model.device() {
        cuda.synchronize()?;
    }
    Ok(features)
}

/// `points` different voxels of a patch, two thirds of them positive.
fn scribble(edge: usize, points: usize, seed: u64) -> PatchPrompts {
    let mut rng = generator(2, &[seed]);
    let mut seen = HashSet::new();
    while seen.len() < points.min(edge * edge * edge) {
        seen.insert(std::array::from_fn::<i32, 3, _>(|_| rng.random_range(0..edge as i32)));
    }
    let mut voxels: Vec<[i32; 3]> = seen.into_iter().collect();
    voxels.sort();
    PatchPrompts {
        points: voxels.into_iter().enumerate().map(|(n, v)| (v, n % 3 != 2)).collect(),
        bounds: None,
    }
}

/// The most memory that this process has held so far, its peak resident set, in bytes; none if the
/// system does not report it as Linux does.
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()? * 1024)
}
