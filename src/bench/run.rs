//! Timing problems, and comparing with earlier measurements.

use super::{Ceilings, Prepared, Problem};
use crate::device::Device;
use crate::tensor::OpError;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// How to time.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// The time to spend on a problem, with at least `fewest` runs.
    pub long: Duration,
    /// The fewest runs.
    pub fewest: usize,
    /// Whether the caches are emptied before each run.
    pub cold: bool,
}

/// The result of a problem. Seconds, bytes and operations are those of one run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// The problem, as text.
    pub problem: String,
    /// Relative error of the result.
    pub error: f64,
    /// The largest relative error that counts as right.
    pub tolerance: f64,
    /// Runs timed; 0 if the device only judges.
    pub runs: usize,
    /// Median time of the runs.
    pub median: f64,
    /// The time that 99 of 100 runs stay below.
    pub p99: f64,
    /// The least time of a run.
    pub least: f64,
    /// Operations of the plain algorithm or, for a network, the actual ones.
    pub flops: f64,
    /// Actual operations.
    pub done: f64,
    /// Bytes of inputs, weights and outputs.
    pub bytes: f64,
    /// PyTorch's median time, if it was measured.
    #[serde(default)]
    pub peer: Option<f64>,
}

impl Outcome {
    /// Whether the result was right.
    pub fn is_right(&self) -> bool {
        self.error <= self.tolerance
    }

    /// The percentages of the two ceilings that its work and its bytes reach.
    pub fn shares(&self, ceilings: &Ceilings) -> [f64; 2] {
        [self.done / self.median / ceilings.flops, self.bytes / self.median / ceilings.bytes]
            .map(|s| 100.0 * s)
    }
}

/// Measurements of one device, as they are kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// prism's version.
    pub version: String,
    /// The device, as text.
    pub device: String,
    /// Element type of maps or products.
    pub precision: String,
    /// Whether the caches were emptied before each run.
    pub cold: bool,
    /// The peak operations per second of the device, measured in the same run.
    pub flops_per_second: f64,
    /// The peak bytes per second, likewise.
    pub bytes_per_second: f64,
    /// The result of each problem.
    pub results: Vec<Outcome>,
}

/// Larger than the caches between cores and memory.
const CACHES: usize = 192 << 20;

/// Replaces the contents of the caches.
fn empty_caches(device: &Device, spare: &mut [u8]) -> Result<(), OpError> {
    // Every line is written, so that none of it can stay shared.
    spare.chunks_mut(64).for_each(|line| line[0] = line[0].wrapping_add(1));
    std::hint::black_box(&spare);
    if let Device::Cuda(cuda) = device {
        let memory = cuda.allocate_bytes(CACHES)?;
        cuda.clear(&memory)?;
        cuda.synchronize()?;
    }
    Ok(())
}

/// Judges a problem, then times it; on the emulator it is only judged.
pub fn measure(device: &Device, problem: &Problem, timing: Timing) -> Result<Outcome, OpError> {
    let mut prepared = Prepared::new(device, problem)?;
    let [error, tolerance] = prepared.check()?;
    let element = if matches!(device, Device::Cuda(_)) { device.precision().bytes() } else { 4 };
    let (nominal, mut bytes) = (problem.flops(), problem.floats() * element as f64);
    let mut done = nominal.unwrap_or(0.0);
    if let Device::Cpu(cpu) = device {
        // The kernels' actual operations: exact algebra and Winograd need fewer than the plain
        // algorithm.
        let (result, seen) = cpu.profiled(|| prepared.run());
        result?;
        done = seen.iter().map(|s| s.flops).sum();
        if nominal.is_none() {
            bytes = seen.iter().map(|s| s.bytes).sum();
        }
    }
    let mut outcome = Outcome {
        problem: problem.to_string(),
        error,
        tolerance,
        runs: 0,
        median: 0.0,
        p99: 0.0,
        least: 0.0,
        flops: nominal.unwrap_or(done),
        done,
        bytes,
        peer: None,
    };
    if device.is_emulated() {
        return Ok(outcome);
    }
    let mut spare = vec![0u8; if timing.cold { CACHES } else { 0 }];
    let (mut times, mut whole) = (vec![], Duration::ZERO);
    while times.len() < timing.fewest || whole < timing.long {
        if timing.cold {
            empty_caches(device, &mut spare)?;
        }
        let start = Instant::now();
        std::hint::black_box(prepared.run()?);
        whole += start.elapsed();
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let at = |share: f64| {
        times[((share * times.len() as f64).ceil() as usize).clamp(1, times.len()) - 1]
    };
    outcome.runs = times.len();
    (outcome.least, outcome.median, outcome.p99) = (times[0], at(0.5), at(0.99));
    Ok(outcome)
}

/// A problem that was also measured before.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The problem.
    pub problem: String,
    /// Median times then and now, in seconds.
    pub medians: [f64; 2],
    /// The share by which it has to grow to count: the spread of both measurements, at least 5
    /// percent.
    pub spread: f64,
}

impl Change {
    /// The median time now divided by that of then.
    pub fn ratio(&self) -> f64 {
        self.medians[1] / self.medians[0]
    }

    /// Whether it got slower by more than the spread.
    pub fn is_regression(&self) -> bool {
        self.ratio() > 1.0 + self.spread
    }
}

/// The comparison of the problems that both records timed.
pub fn compare(old: &Record, new: &Record) -> Vec<Change> {
    let found = |o: &Outcome| {
        old.results
            .iter()
            .find(|was| was.problem == o.problem && was.runs > 0 && o.runs > 0)
            .cloned()
    };
    let spread = |o: &Outcome| (o.median - o.least) / o.median;
    let change = |now: &Outcome| {
        let was = found(now)?;
        let spread = spread(&was).max(spread(now)).max(0.05);
        Some(Change { problem: now.problem.clone(), medians: [was.median, now.median], spread })
    };
    new.results.iter().filter_map(change).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(times: &[(&str, f64, f64)]) -> Record {
        let outcome = |&(problem, least, median): &(&str, f64, f64)| Outcome {
            problem: problem.into(),
            error: 0.0,
            tolerance: 1.0,
            runs: 5,
            median,
            p99: median,
            least,
            flops: 1.0,
            done: 1.0,
            bytes: 1.0,
            peer: None,
        };
        let results = times.iter().map(outcome).collect();
        let text = String::new;
        Record {
            version: text(),
            device: text(),
            precision: text(),
            cold: false,
            flops_per_second: 1.0,
            bytes_per_second: 1.0,
            results,
        }
    }

    #[test]
    fn slower_than_the_spread_is_a_regression() {
        let old = record(&[("a", 1.0, 1.0), ("b", 0.8, 1.0), ("c", 1.0, 1.0)]);
        let new = record(&[("a", 1.1, 1.1), ("b", 1.1, 1.1), ("d", 9.0, 9.0)]);
        let changes = compare(&old, &new);
        assert_eq!(
            changes.iter().map(|c| (c.problem.as_str(), c.is_regression())).collect::<Vec<_>>(),
            [("a", true), ("b", false)]
        );
    }
}
