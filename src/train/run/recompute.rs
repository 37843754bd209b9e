//! Whether a run computes iterations again in the backward pass, where that is left to it
//! ([`Recompute::Auto`]).
//!
//! Its first step computes them again, and tells what keeping one takes. If all of them fit, they
//! are kept from then on. If memory is refused to a step that keeps them, it is done again from the
//! same state, and so are they in all steps that follow. None of this changes a bit of the results
//! ([`Rerun::Exact`]): the choice is no part of a run's state, and each process has its own.

use crate::data::source::most_kept;
use crate::device::{CudaError, Device};
use crate::memory::{bytes, is_set, left};
use crate::tensor::OpError;
use crate::train::settings::{Recompute, Settings};
use crate::train::step::Rerun;
use serde::Serialize;

/// A choice that a run made, also a line of its log.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RecomputeReport {
    /// The step after which it was chosen, or that was refused memory, from 1.
    pub step: usize,
    /// Whether iterations are computed again from here on.
    pub recompute: bool,
    /// Bytes that keeping them takes, as far as was measured.
    pub needed: u64,
    /// Bytes that may be used for that; none where memory was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available: Option<u64>,
    /// The choice and its reason, for people.
    pub why: String,
}

/// Why the items of a step were not done.
pub(super) struct Failed {
    /// Whether it is because memory was refused: with more of it, they would be.
    pub(super) refused: bool,
    /// The reason, for people.
    pub(super) text: String,
}

impl Failed {
    pub(super) fn other(text: impl Into<String>) -> Failed {
        Failed { refused: false, text: text.into() }
    }
}

impl From<OpError> for Failed {
    fn from(e: OpError) -> Failed {
        let refused = matches!(&e, OpError::Memory(_) | OpError::Cuda(CudaError::Memory { .. }));
        Failed { refused, text: e.to_string() }
    }
}

/// What is done with iterations, and how that came.
pub(super) struct Chosen {
    stage: Stage,
    /// Bytes that keeping them takes; 0 before anything was measured.
    needed: u64,
    reports: Vec<RecomputeReport>,
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    /// The settings say it.
    Given(Rerun),
    /// Iterations are computed again, and nothing is chosen yet.
    Open,
    Kept,
    Again,
}

impl Chosen {
    pub(super) fn new(settings: &Settings) -> Chosen {
        let stage = match settings.recompute {
            Recompute::Always => Stage::Given(Rerun::Fast),
            Recompute::Never => Stage::Given(Rerun::Never),
            // The last iteration, which is the first of the backward pass, is kept in any case.
            Recompute::Auto if settings.iterations < 2 => Stage::Given(Rerun::Never),
            Recompute::Auto => Stage::Open,
        };
        Chosen { stage, needed: 0, reports: vec![] }
    }

    /// What the next step is to do.
    pub(super) fn rerun(&self) -> Rerun {
        match self.stage {
            Stage::Given(rerun) => rerun,
            Stage::Open | Stage::Again => Rerun::Exact,
            Stage::Kept => Rerun::Never,
        }
    }

    /// Notes that keeping all iterations takes so many bytes.
    pub(super) fn measured(&mut self, needed: u64) {
        if self.stage == Stage::Open {
            self.needed = needed;
        }
    }

    /// Chooses after a step, the first that measured something, on one device of `processes`.
    pub(super) fn choose(&mut self, device: &Device, processes: usize, step: usize) {
        if self.stage == Stage::Open && self.needed > 0 {
            self.choose_within(available(device, processes), step);
        }
    }

    fn choose_within(&mut self, available: u64, step: usize) {
        let keeps = self.needed <= available;
        let (needed, of) = (bytes(self.needed), bytes(available));
        let why = if keeps {
            format!("recompute: off, keeping iterations takes about {needed} of {of} to spare")
        } else {
            format!("recompute: on, keeping iterations would take about {needed} of {of} to spare")
        };
        self.stage = if keeps { Stage::Kept } else { Stage::Again };
        self.report(step, Some(available), why);
    }

    /// Whether a step that failed is to be done again, with iterations computed again.
    pub(super) fn does_again(&mut self, failed: &Failed, step: usize) -> bool {
        let again = failed.refused && self.stage == Stage::Kept;
        if again {
            self.stage = Stage::Again;
            let why = format!("recompute: on, step {step} is done again: {}", failed.text);
            self.report(step, None, why);
        }
        again
    }

    fn report(&mut self, step: usize, available: Option<u64>, why: String) {
        let (recompute, needed) = (self.stage == Stage::Again, self.needed);
        self.reports.push(RecomputeReport { step, recompute, needed, available, why });
    }

    /// The choices that were made since this was last called.
    pub(super) fn reports(&mut self) -> Vec<RecomputeReport> {
        std::mem::take(&mut self.reports)
    }
}

/// Bytes that iterations may take beyond what a step has that computes them again: half of what is
/// left, because others need memory too, and iterations of more points take more.
fn available(device: &Device, processes: usize) -> u64 {
    // The emulator's memory is the host's; of a GPU's, what is unknown is not relied on.
    let on_device = match device {
        Device::Cpu(_) => None,
        Device::Cuda(cuda) if cuda.is_emulated() => cuda.free_memory(),
        Device::Cuda(cuda) => Some(cuda.free_memory().unwrap_or(0)),
    };
    let of_host = || of_host(left(), processes, (!is_set()).then(most_kept));
    on_device.unwrap_or_else(of_host) / 2
}

/// What a process has of the bytes that are left to it: to all processes of a host, if no budget
/// was set, and each `keeps` decoded cases of so many bytes then.
fn of_host(left: u64, processes: usize, keeps: Option<u64>) -> u64 {
    match keeps {
        // Decoded cases are given up where a budget is short.
        None => left,
        // Without one, the tensors of a tape are too small for what is free to be asked for, so
        // that nothing is given up for them.
        Some(bytes) => (left / processes.max(1) as u64).saturating_sub(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::settings::Given;

    fn chosen(recompute: Recompute, iterations: usize) -> Chosen {
        let given =
            Given { recompute: Some(recompute), iterations: Some(iterations), ..Given::default() };
        Chosen::new(&given.settings())
    }

    fn failed(refused: bool) -> Failed {
        Failed { refused, text: "out of memory".into() }
    }

    #[test]
    fn without_a_budget_decoded_cases_are_left_out_of_what_may_be_used() {
        assert_eq!(of_host(100, 4, None), 100);
        assert_eq!(of_host(100, 4, Some(20)), 5);
        assert_eq!(of_host(100, 0, Some(20)), 80);
        assert_eq!(of_host(100, 4, Some(26)), 0);
    }

    #[test]
    fn what_the_settings_say_stays() {
        for (recompute, iterations, rerun) in [
            (Recompute::Always, 3, Rerun::Fast),
            (Recompute::Never, 3, Rerun::Never),
            (Recompute::Auto, 1, Rerun::Never),
        ] {
            let mut chosen = chosen(recompute, iterations);
            chosen.measured(1 << 60);
            let device = Device::open("cpu", 1).unwrap();
            chosen.choose(&device, 1, 1);
            assert!(!chosen.does_again(&failed(true), 2));
            assert!(chosen.rerun() == rerun && chosen.reports().is_empty(), "{recompute:?}");
        }
    }

    #[test]
    fn iterations_are_kept_where_they_fit_until_memory_is_refused() {
        for (available, rerun) in [(99, Rerun::Exact), (100, Rerun::Never)] {
            let mut chosen = chosen(Recompute::Auto, 3);
            assert_eq!(chosen.rerun(), Rerun::Exact);
            // Nothing was measured: it stays open.
            chosen.choose(&Device::open("cpu", 1).unwrap(), 1, 1);
            assert!(!chosen.does_again(&failed(true), 1) && chosen.reports().is_empty());
            chosen.measured(100);
            chosen.choose_within(available, 1);
            assert_eq!(chosen.rerun(), rerun);
            let told = chosen.reports();
            assert_eq!((told.len(), told[0].recompute), (1, available < 100), "{told:?}");
            assert_eq!((told[0].needed, told[0].available), (100, Some(available)));
            // What was measured later does not change it.
            chosen.measured(1);
            assert!(!chosen.does_again(&failed(false), 2));
            let kept = rerun == Rerun::Never;
            assert_eq!(chosen.does_again(&failed(true), 2), kept);
            assert_eq!(chosen.rerun(), Rerun::Exact);
            let told = chosen.reports();
            assert_eq!(told.len(), usize::from(kept));
            assert!(told.iter().all(|t| t.recompute && t.step == 2 && t.needed == 100));
        }
    }
}
