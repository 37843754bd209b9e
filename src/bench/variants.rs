//! Every variant of the kernels that some work launches, timed beside what the ceilings predict,
//! and the best of each choice.
//!
//! The work is run with the rule's variants, then with the next ones, and so on in turn, and each
//! launch is timed by the device's clock in the place that it has in the work: what it reads was
//! just written, or is in no cache, as it is when the work is done for its own sake. From each time
//! is taken what timing a launch by itself adds to it, which is measured with a launch that does
//! nothing.

use super::problem::{Problem, Timed};
use super::run::CACHES;
use super::{CudaCeilings, Prepared};
use crate::device::cuda::source::is_matrix;
use crate::device::cuda::{Arena, Choice, KernelRecord, Launch, kernels};
use crate::device::{Cuda, CudaError, DType};
use crate::tensor::OpError;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;

/// How often each variant is timed. Once before that it is not: then its kernels are loaded.
const ROUNDS: usize = 5;
/// By how much a variant must be faster than the rule's to be chosen.
const WORTH: f64 = 0.03;
/// Launches that do nothing, in one recording.
const EMPTY: usize = 100;

/// What the launches of a variant take in one run of the work.
#[derive(Clone, Debug, Serialize)]
pub struct Variant {
    /// The name of the variant.
    pub name: String,
    /// The number of launches.
    pub launches: usize,
    /// Seconds: the median of several runs.
    pub seconds: f64,
    /// Seconds: the least of several runs.
    pub least: f64,
    /// Seconds that the ceilings allow for their work.
    pub predicted: f64,
}

/// A choice between variants.
#[derive(Clone, Debug, Serialize)]
pub struct Variants {
    /// What is chosen between, see [`Choice::key`].
    pub key: String,
    /// The variants, the rule's first.
    pub variants: Vec<Variant>,
    /// The best of them: the rule's, unless another is faster beyond the spread of its times.
    pub best: usize,
}

impl Variants {
    /// The variant that a table has to name; none if the rule's is the best.
    pub fn chosen(&self) -> Option<&str> {
        (self.best > 0).then(|| self.variants[self.best].name.as_str())
    }

    /// By how many seconds the best is faster than the rule's, in one run of the work.
    pub fn gain(&self) -> f64 {
        self.variants[0].seconds - self.variants[self.best].seconds
    }
}

/// A problem whose kernels' variants were judged and timed.
#[derive(Clone, Debug, Serialize)]
pub struct Tried {
    /// The problem, as text.
    pub problem: String,
    /// The result's relative error with the rule's variants, with the next, and so on. None of
    /// networks, whose ops are problems of their own.
    pub errors: Vec<f64>,
    /// The largest relative error that counts as right.
    pub tolerance: f64,
    /// The choices; none where nothing was timed.
    pub choices: Vec<Variants>,
}

impl Tried {
    /// Whether every variant gave the right result.
    pub fn is_right(&self) -> bool {
        self.errors.iter().all(|error| *error <= self.tolerance)
    }
}

/// What a launch takes that does nothing, in seconds: timed by itself, and as one of many in a
/// recording.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LaunchCost {
    /// By itself.
    pub alone: f64,
    /// In a recording.
    pub replayed: f64,
}

impl LaunchCost {
    /// Measures both.
    ///
    /// # Errors
    /// The device fails.
    pub fn measure(cuda: &Cuda) -> Result<LaunchCost, OpError> {
        let out = cuda.allocate(256, DType::F32)?;
        let launch = Launch { grid: [1; 3], ..Launch::per_element(0) };
        let launches = || -> Result<(), OpError> {
            for _ in 0..EMPTY {
                let arguments =
                    kernels::CeilingMultiplyArgs { out: (&out).into(), rounds: 0usize.into() };
                cuda.launch(kernels::CEILING_MULTIPLY_F32, launch, arguments)?;
            }
            Ok(())
        };
        let (records, ()) = cuda.launches(true, launches)?;
        let alone = median(records.iter().filter_map(|record| record.seconds).collect());
        let (graph, ()) = cuda.record(&mut Arena::default(), launches)?;
        let mut times = vec![];
        for _ in 0..ROUNDS {
            times.push(cuda.seconds(|| graph.replay())? / EMPTY as f64);
        }
        Ok(LaunchCost { alone, replayed: median(times) })
    }

    /// What timing a launch by itself adds.
    fn added(self) -> f64 {
        (self.alone - self.replayed).max(0.0)
    }
}

/// The middle one; 0 of none.
fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(0.0)
}

/// The launches of a variant in one run.
#[derive(Clone, Copy, Default)]
struct Sample {
    launches: usize,
    seconds: f64,
    predicted: f64,
}

impl Sample {
    fn add(&mut self, record: &KernelRecord, ceilings: &CudaCeilings) {
        let cost = record.launch.cost;
        let rate = if is_matrix(&record.kernel) { ceilings.matrix } else { ceilings.plain };
        self.launches += 1;
        self.seconds += record.seconds.unwrap_or(0.0);
        self.predicted += (cost.flops / rate).max(cost.bytes / ceilings.bytes);
    }
}

impl Variant {
    fn of(name: &str, samples: &[Sample], added: f64) -> Option<Variant> {
        let Sample { launches, predicted, .. } = *samples.first()?;
        let seconds = |s: &Sample| (s.seconds - s.launches as f64 * added).max(0.0);
        let times: Vec<f64> = samples.iter().map(seconds).collect();
        let least = times.iter().copied().fold(f64::INFINITY, f64::min);
        Some(Variant { name: name.into(), launches, seconds: median(times), least, predicted })
    }
}

/// The best variant: the rule's is the first.
fn best(variants: &[Variant]) -> usize {
    let faster = |a: &usize, b: &usize| variants[*a].seconds.total_cmp(&variants[*b].seconds);
    let least = (0..variants.len()).min_by(faster).unwrap_or(0);
    let is_better = |rule: &Variant| {
        let seconds = variants[least].seconds;
        seconds * (1.0 + WORTH) < rule.seconds && seconds < rule.least
    };
    if variants.first().is_some_and(is_better) { least } else { 0 }
}

/// What a device without enough memory for a variant refuses is nothing, not an error.
fn unless_refused<T>(tried: Result<T, OpError>) -> Result<Option<T>, OpError> {
    match tried {
        Err(OpError::Cuda(CudaError::Memory { .. })) => Ok(None),
        tried => tried.map(Some),
    }
}

/// The choices that the work has, each once, and the largest number of variants.
fn choices(cuda: &Cuda, work: &mut [Timed]) -> Result<(Vec<Arc<Choice>>, usize), OpError> {
    let mut all: Vec<Arc<Choice>> = vec![];
    for timed in work {
        for choice in cuda.with_variant(0, timed)?.into_iter().filter_map(|record| record.choice) {
            if all.iter().all(|known| known.key != choice.key) {
                all.push(choice);
            }
        }
    }
    let most = all.iter().map(|choice| choice.variants.len()).max().unwrap_or(0);
    Ok((all, most))
}

/// The keys of the choices that the work has, which is done once for that.
///
/// # Errors
/// The work fails.
pub fn choice_keys(cuda: &Cuda, work: &mut [Timed]) -> Result<Vec<String>, OpError> {
    let (choices, _) = choices(cuda, work)?;
    Ok(choices.iter().map(|choice| choice.key.clone()).collect())
}

/// Times every variant of every choice that the work has.
///
/// # Errors
/// The work fails, with the rule's variants or with others.
pub fn time_variants(
    cuda: &Cuda,
    ceilings: &CudaCeilings,
    work: &mut [Timed],
) -> Result<Vec<Variants>, OpError> {
    let (choices, most) = choices(cuda, work)?;
    if choices.is_empty() {
        return Ok(vec![]);
    }
    let added = LaunchCost::measure(cuda)?.added();
    let spare = cuda.allocate_bytes(CACHES)?;
    // By name: work that has the same key may not have all of its variants.
    let mut samples: BTreeMap<(String, String), Vec<Sample>> = BTreeMap::new();
    for round in 0..=ROUNDS {
        'variant: for nth in 0..most {
            let mut sums: BTreeMap<(String, String), Sample> = BTreeMap::new();
            for timed in &mut *work {
                // Between two runs of the same op its inputs would stay in a cache.
                cuda.clear(&spare)?;
                let tried = cuda.with_variant(nth, timed);
                let records = if nth == 0 { Some(tried?) } else { unless_refused(tried)? };
                let Some(records) = records else { continue 'variant };
                for record in &records {
                    if let Some(choice) = &record.choice {
                        let name = choice.variants[choice.taken].clone();
                        let sum = sums.entry((choice.key.clone(), name)).or_default();
                        sum.add(record, ceilings);
                    }
                }
            }
            if round > 0 {
                sums.into_iter().for_each(|(key, sum)| samples.entry(key).or_default().push(sum));
            }
        }
    }
    let timed = |choice: &Arc<Choice>| {
        let of = |name: &String| {
            Variant::of(name, samples.get(&(choice.key.clone(), name.clone()))?, added)
        };
        let variants: Vec<Variant> = choice.variants.iter().filter_map(of).collect();
        let best = best(&variants);
        (!variants.is_empty()).then(|| Variants { key: choice.key.clone(), variants, best })
    };
    Ok(choices.iter().filter_map(timed).collect())
}

/// Judges a problem with each variant of its kernels, and times them if ceilings are given.
///
/// # Errors
/// A variant does not run.
pub fn try_variants(
    cuda: &Cuda,
    problem: &Problem,
    ceilings: Option<&CudaCeilings>,
) -> Result<Tried, OpError> {
    let mut work = [problem.timed(cuda)?];
    let (_, most) = choices(cuda, &mut work)?;
    let mut tried =
        Tried { problem: problem.to_string(), errors: vec![], tolerance: 0.0, choices: vec![] };
    if problem.flops().is_some() {
        let mut prepared = Prepared::new(&cuda.clone().into(), problem)?;
        for nth in 0..most.max(1) {
            let checked = cuda.with_variant(nth, || prepared.check());
            if let Some([error, tolerance]) = unless_refused(checked)? {
                tried.errors.push(error);
                tried.tolerance = tolerance;
            }
        }
    }
    if let Some(ceilings) = ceilings {
        tried.choices = time_variants(cuda, ceilings, &mut work)?;
    }
    Ok(tried)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variants(times: &[(f64, f64)]) -> Vec<Variant> {
        let variant = |&(least, seconds): &(f64, f64)| Variant {
            name: format!("{seconds}"),
            launches: 1,
            seconds,
            least,
            predicted: 0.1,
        };
        times.iter().map(variant).collect()
    }

    #[test]
    fn the_rule_holds_unless_another_variant_is_clearly_faster() {
        for (times, expected) in [
            (&[(1.0, 1.1), (0.8, 0.9), (0.7, 0.8)][..], 2),
            // Within the spread of the rule's.
            (&[(0.8, 1.1), (0.7, 0.9)][..], 0),
            // Not worth it.
            (&[(1.0, 1.0), (0.98, 0.98)][..], 0),
            (&[(1.0, 1.0), (2.0, 2.0)][..], 0),
            (&[(1.0, 1.0)][..], 0),
            (&[][..], 0),
        ] {
            assert_eq!(best(&variants(times)), expected, "{times:?}");
        }
        let chosen = |best| Variants { key: "k".into(), variants: variants(&[(1.0, 2.0)]), best };
        assert_eq!((chosen(0).chosen(), chosen(0).gain()), (None, 0.0));
    }

    #[test]
    fn times_are_without_what_timing_adds() {
        let sample = |seconds: f64| Sample { launches: 2, seconds, predicted: 1.0 };
        let of = |samples: &[Sample]| Variant::of("a", samples, 0.5);
        let variant = of(&[sample(4.0), sample(3.0), sample(9.0)]).unwrap();
        assert_eq!((variant.seconds, variant.least, variant.launches), (3.0, 2.0, 2));
        assert_eq!(of(&[sample(0.5)]).unwrap().seconds, 0.0);
        assert!(of(&[]).is_none());
    }
}
