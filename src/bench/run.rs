//! Timing problems, and comparing with earlier measurements.

use super::{Ceilings, Prepared, Problem};
use crate::device::Device;
use crate::tensor::OpError;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// How to time a problem.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// The time to spend on a problem, with at least `fewest` runs.
    pub long: Duration,
    /// The fewest runs.
    pub fewest: usize,
    /// Whether the caches are emptied before each run.
    pub cold: bool,
}

/// The result of measuring a problem. Seconds, bytes and operations are those of one run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// The problem, as text.
    pub problem: String,
    /// The relative L2 error of the result: see [`Prepared::check`].
    pub error: f64,
    /// The largest relative error that counts as right.
    pub tolerance: f64,
    /// The number of runs timed; 0 on the emulator, where the times are 0 too.
    pub runs: usize,
    /// The median time of the runs, in seconds.
    pub median: f64,
    /// The time that 99 of 100 runs stay below, in seconds.
    pub p99: f64,
    /// The least time of a run, in seconds.
    pub least: f64,
    /// Floating-point operations of the plain algorithm or, for a network, [`Outcome::done`].
    pub flops: f64,
    /// Floating-point operations actually done: fewer than the plain algorithm's where an op needs
    /// fewer. On a CUDA device they are not counted: those of the plain algorithm, 0 for a network.
    pub done: f64,
    /// Bytes of inputs, weights and outputs, each counted once.
    pub bytes: f64,
    /// PyTorch's median time in seconds, if it was measured.
    #[serde(default)]
    pub peer: Option<f64>,
}

impl Outcome {
    /// Whether the result was right.
    pub fn is_right(&self) -> bool {
        self.error <= self.tolerance
    }

    /// What the run reaches of the two ceilings, in percent: by its operations, and by its bytes.
    pub fn shares(&self, ceilings: &Ceilings) -> [f64; 2] {
        [self.done / self.median / ceilings.flops, self.bytes / self.median / ceilings.bytes]
            .map(|s| 100.0 * s)
    }
}

/// The measurements of several problems on one device, as `prism bench` writes them to files.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The version of prism.
    pub version: String,
    /// The device: [`Device::describe`].
    pub device: String,
    /// The precision of the device, as text.
    pub precision: String,
    /// Whether the caches were emptied before each run.
    pub cold: bool,
    /// The device's peak rate of arithmetic, [`Ceilings::flops`], measured with the problems.
    pub flops_per_second: f64,
    /// The device's peak rate of memory, [`Ceilings::bytes`], measured with the problems.
    pub bytes_per_second: f64,
    /// The result of each problem.
    pub results: Vec<Outcome>,
}

/// Larger than the caches between cores and memory.
pub(super) const CACHES: usize = 192 << 20;

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

/// Checks the result of a problem, then times it; on the emulator it is only checked.
///
/// # Errors
/// The device has no room for it, or fails. A wrong result is no error: see [`Outcome::is_right`].
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

/// The times of a problem in two records.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The problem, as text.
    pub problem: String,
    /// The median times in the old and in the new record, in seconds.
    pub medians: [f64; 2],
    /// The share by which the time has to grow to count, 0.05 or more: the larger spread of the two
    /// measurements, which is the distance of the median from the least time, as a share of it.
    pub spread: f64,
}

impl Change {
    /// The new median time divided by the old one.
    pub fn ratio(&self) -> f64 {
        self.medians[1] / self.medians[0]
    }

    /// Whether it got slower by more than the spread.
    pub fn is_regression(&self) -> bool {
        self.ratio() > 1.0 + self.spread
    }
}

/// Compares two records: the times of the problems that are timed in both, in the new one's order.
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
