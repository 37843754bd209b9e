//! A training run: draws samples ahead, steps, validates, saves, and can be stopped and resumed.
//!
//! In the folder [`Settings::out`] it writes `settings.toml`, `split.json` (and `split-2.json` and
//! so on, one for each further list of cases), the log `log.jsonl`, the curves of
//! [`curves`](super::curves), and after every epoch the weights, `last.safetensors`, and the
//! [`State`], `last.state.safetensors`; when a validation is the best so far, `best.safetensors`.

mod batch;
mod folder;
mod item;
mod recompute;
mod validation;

pub use recompute::RecomputeReport;

use super::exchange::Buckets;
use super::peers::Peers;
use super::settings::Settings;
use super::state::{Progress, State, scaling};
use super::step::Recorder;
use crate::data::cases::DataError;
use crate::data::source::Pools;
use crate::device::Device;
use crate::input::read_text;
use crate::memory;
use crate::model::{Config, Weights};
use crate::ops::optimizer::AdamW;
use crate::output::{Lock, lock, make_folder, spelled_out, write_text};
use crate::tensor::caught;
use batch::{train_step, workers};
use folder::{Log, check, keep};
use item::Item;
use rayon::prelude::*;
use recompute::Chosen;
use serde::Serialize;
use serde_json::json;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::Builder;
use std::time::Instant;
use validation::judge;

/// The name of the file in a run's folder that has all its settings.
pub const SETTINGS: &str = "settings.toml";
/// The name of the file in a run's folder that has the split of its first list of cases into
/// training, validation and test.
pub const SPLIT: &str = "split.json";

/// Steps whose items are drawn ahead: samples, and the prompts of their first rounds.
const AHEAD: usize = 3;

/// The report of a step, also a line of the run's log.
#[derive(Clone, Debug, Serialize)]
pub struct StepReport {
    /// The step, from 1.
    pub step: usize,
    /// The epoch, from 1.
    pub epoch: usize,
    /// The loss of the batch, before the step.
    pub loss: f64,
    /// The part of the loss that the candidate masks and their scores have.
    pub confidence: f64,
    /// The part of the loss that the refined answers have.
    pub corrective: f64,
    /// The mean Dice over the batch of the answers' probabilities, after each iteration.
    pub dice: Vec<f64>,
    /// The global L2 norm of the gradients before clipping.
    pub norm: f64,
    /// The learning rate.
    pub lr: f64,
    /// How long the step took, in seconds.
    pub seconds: f64,
}

/// The report of a validation, also a line of the run's log.
#[derive(Clone, Debug, Serialize)]
pub struct ValidationReport {
    /// The epoch, from 1.
    pub epoch: usize,
    /// The step at which it was made.
    pub step: usize,
    /// The mean Dice over the cases of the masks after each iteration.
    pub validation: Vec<f64>,
    /// Whether the last of them is the best so far.
    pub best: bool,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All epochs are done.
    Finished,
    /// The run was asked to stop; the state is saved, so that the run can be resumed.
    Stopped,
}

/// What a run calls as it goes on, in the thread that called [`run()`].
pub trait Watch {
    /// Called after a step; `total` is the number of steps of the run.
    fn step(&mut self, report: &StepReport, total: usize);
    /// Called before a case of a validation is begun, with its number, from 1, and the number of
    /// cases.
    fn case(&mut self, number: usize, of: usize);
    /// Called after a validation.
    fn validation(&mut self, report: &ValidationReport);
    /// Called when the run has chosen whether iterations are computed again in the backward pass,
    /// which [`Recompute::Auto`](super::settings::Recompute::Auto) leaves to it, before the call
    /// for that step.
    fn recompute(&mut self, _report: &RecomputeReport) {}
    /// Called with what a user should know: that the run's folder could not be locked, as on a file
    /// system without locks, so that other trainings are not kept away.
    fn warning(&mut self, _text: &str) {}
}

/// The state of a new run: with random weights drawn by the seed, or with those of the model file
/// [`Settings::init`].
///
/// # Errors
/// A setting makes no sense, or the network's configuration or the model file cannot be read.
pub fn begin(settings: Settings) -> Result<State, String> {
    settings.check()?;
    let mut weights = match &settings.init {
        Some(path) => Weights::open(path).map_err(|e| e.to_string())?,
        None => Weights::initial(network(&settings.model)?, settings.seed),
    };
    if let Some(radius) = settings.click_radius {
        weights.config.click_radius = radius;
    }
    Ok(before_any_step(settings, weights))
}

/// The state before the first step that changes these weights.
fn before_any_step(settings: Settings, weights: Weights) -> State {
    let config = weights.config.clone();
    let lengths: Vec<usize> = config.tensors().iter().map(|(_, s)| s.iter().product()).collect();
    let optimizer = AdamW::new(settings.optimizer(), &lengths);
    let values = || config.tensors().iter().map(|(n, _)| (*weights.get(n)).clone()).collect();
    let average = (settings.ema > 0.0).then(values);
    State {
        progress: Progress {
            step: 0,
            best: None,
            optimizer_steps: 0,
            scaling: scaling(),
            unvalidated: false,
            settings,
            config,
        },
        weights,
        optimizer,
        average,
    }
}

/// The configuration of a network, by the name of a preset (`small` or `base`) or of a JSON file.
///
/// # Errors
/// There is no such preset or file, or it is not a configuration.
pub fn network(name: &str) -> Result<Config, String> {
    if let Some(config) = Config::preset(name) {
        return Ok(config);
    }
    let text = read_text(Path::new(name), "a network's configuration (JSON)").map_err(|e| {
        format!("--model {name}: neither a preset (small, base) nor a readable file: {e}")
    })?;
    let config: Config = serde_json::from_str(&text)
        .map_err(|e| format!("{name}: not a network's configuration: {e}"))?;
    config.check().map_err(|e| format!("{name}: {e}"))?;
    Ok(config)
}

/// A run's folder that is locked for this process ([`claim`]).
pub struct Claimed {
    out: PathBuf,
    lock: Lock,
}

/// Makes a run's folder if there is none, and locks it for this process: as long as the result
/// lives, no other training reads or writes what is in it.
///
/// # Errors
/// The folder or the file that is locked cannot be made, or another training uses it.
pub fn claim(out: &Path) -> Result<Claimed, String> {
    make_folder(out).map_err(|e| format!("{}: {e}", out.display()))?;
    let lock = lock(out, "run.lock")?.ok_or_else(|| {
        format!("another training is writing to {}: give another --out", out.display())
    })?;
    Ok(Claimed { out: out.into(), lock })
}

/// Carries out a run, from `state` on, until all epochs are done or `stop` is set in any process.
///
/// When it is to stop, the present step, or in process 0 the present case of a validation, is
/// finished and the state saved. A validation that was interrupted is repeated from its beginning
/// when the run is resumed. Each process takes its share of every batch; process 0 validates and
/// writes, and locks the run's folder meanwhile. A caller that reads the state from that folder
/// locks it before, and calls [`run_claimed`]. A process that fails tells the others why.
///
/// # Errors
/// A case or a file cannot be read or written, another run is writing to the folder, the batch has
/// fewer items than there are processes, the loss or the gradients are not finite, memory is
/// refused, the device fails, or another process is lost. The last saved state stays.
pub fn run(
    device: &Device,
    state: State,
    pools: &Pools,
    peers: &Peers,
    stop: &AtomicBool,
    watch: &mut dyn Watch,
) -> Result<Ended, String> {
    run_claimed(None, device, state, pools, peers, stop, watch)
}

/// Carries out a run as [`run()`] does, in process 0 in a folder that [`claim`] has locked; it
/// stays locked until the run has ended.
///
/// # Errors
/// Those of [`run()`], and a folder that is not [`Settings::out`].
pub fn run_claimed(
    claimed: Option<Claimed>,
    device: &Device,
    state: State,
    pools: &Pools,
    peers: &Peers,
    stop: &AtomicBool,
    watch: &mut dyn Watch,
) -> Result<Ended, String> {
    let done = caught(|| Ok(all_steps(claimed, device, state, pools, peers, stop, watch)));
    done.unwrap_or_else(|refused| Err(refused.to_string())).map_err(|why| peers.ended(why))
}

fn all_steps(
    claimed: Option<Claimed>,
    device: &Device,
    mut state: State,
    pools: &Pools,
    peers: &Peers,
    stop: &AtomicBool,
    watch: &mut dyn Watch,
) -> Result<Ended, String> {
    let settings = state.progress.settings.clone();
    let config = state.progress.config.clone();
    let (share, buckets) = (peers.share(settings.batch), Buckets::new(&config));
    if settings.batch < peers.world() {
        return Err(format!(
            "--batch {} is less than the {} processes that train: each needs at least one item",
            settings.batch,
            peers.world()
        ));
    }
    let out = settings.out.clone();
    let first_process = peers.rank() == 0;
    let claimed = match claimed {
        None if first_process => Some(claim(&out)?),
        claimed => claimed,
    };
    if let Some(claimed) = &claimed {
        if spelled_out(&claimed.out) != spelled_out(&out) {
            return Err(format!(
                "{} is locked, expected that of the run: {}",
                claimed.out.display(),
                out.display()
            ));
        }
        if let Some(text) = claimed.lock.warning() {
            watch.warning(text);
        }
    }
    let mut log = None;
    if first_process {
        check(&state, &out)?;
        let Progress { step, unvalidated, .. } = state.progress;
        log = Some(Log::open(&out.join("log.jsonl"), step, unvalidated)?);
        // A later evaluation of the run takes its target and its channel from here.
        let text = toml::to_string(&settings).map_err(|e| format!("the settings: {e}"))?;
        write_text(&out.join(SETTINGS), &text)?;
        // The split into what was learned from and what was not belongs to the run: later splits of
        // the same folder may be different.
        for (at, (_, split)) in pools.splits.iter().enumerate() {
            let name = if at == 0 { SPLIT.to_string() } else { format!("split-{}.json", at + 1) };
            write_text(&out.join(name), &format!("{:#}\n", json!(split)))?;
        }
    }
    let asked = || stop.load(Ordering::Relaxed);
    let validation = match first_process {
        true => pools.validation.fixed(&config, settings.validation_cases, &asked),
        false => Some(vec![]),
    };
    // Asked while those cases were read, the last of them too, all end before a step is done.
    let stopping = any(peers, validation.is_none() || asked())?;
    let is_done = state.progress.step >= settings.total_steps() && !state.progress.unvalidated;
    if stopping && !is_done {
        keep(&state, &mut log, &out)?;
        return Ok(Ended::Stopped);
    }
    let validation = validation.unwrap_or_default();
    let workers = workers(device, share.len())?;
    // Gradients are exchanged while they are computed: with other processes nothing is recorded.
    let alone = peers.world() == 1 && peers.group(device).is_none();
    let mut recorder = if alone { Recorder::wanted(device) } else { None };
    let mut chosen = Chosen::new(&settings);
    let total = settings.total_steps();
    let (first, augmentation) = (state.progress.step, settings.augmentation());
    // The items of a step; with other samples in place of those whose cases are refused memory, if
    // `passes_over` is set.
    let draw = |step: usize, passes_over: bool| -> Result<Vec<Item>, DataError> {
        let draw = |item: usize| -> Result<Item, DataError> {
            let numbers = [settings.seed, step as u64, item as u64];
            let sample = pools.train.draw_at(&config, &augmentation, numbers, passes_over)?;
            Ok(Item::new(sample, &settings, config.patch, [step as u64, item as u64]))
        };
        share.clone().into_par_iter().map(draw).collect()
    };
    let abandoned = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (send, receive) = sync_channel::<Option<Result<Vec<Item>, DataError>>>(AHEAD);
        let (draw_ref, abandoned_ref) = (&draw, &abandoned);
        let read = move || {
            for step in first..total {
                // None if memory was refused: a step may have taken all of it, and between steps
                // there is more.
                let items = memory::caught(|| draw_ref(step, false)).ok();
                let items = items.filter(|i| !matches!(i, Err(e) if e.refused));
                if abandoned_ref.load(Ordering::Relaxed) || send.send(items).is_err() {
                    return;
                }
            }
        };
        let reader = Builder::new()
            .spawn_scoped(scope, read)
            .map_err(|e| format!("no thread to read the data: {e}"))?;
        let result = (|| {
            // All processes read the same state.
            if state.progress.unvalidated {
                let asked = (false, stop);
                let stopping =
                    judge(device, &mut state, &validation, peers, asked, &mut log, watch)?;
                keep(&state, &mut log, &out)?;
                if stopping && (first < total || state.progress.unvalidated) {
                    return Ok(Ended::Stopped);
                }
            }
            for step in first..total {
                let items = receive
                    .recv()
                    .map_err(|_| "the thread that reads the data ended early".to_string())?;
                let items = items.unwrap_or_else(|| draw(step, true)).map_err(|e| e.to_string())?;
                let start = Instant::now();
                let done = train_step(
                    device,
                    (&workers[..], recorder.as_mut(), &mut chosen),
                    (peers, &buckets),
                    &mut state,
                    &items,
                    step,
                    stop,
                );
                let seconds = start.elapsed().as_secs_f64();
                // Recordings keep no iterations: with them there is nothing to choose.
                if done.is_ok() && recorder.is_none() {
                    chosen.choose(device, peers.world(), step + 1);
                }
                for report in chosen.reports() {
                    if let Some(log) = &mut log {
                        log.write(&report)?;
                    }
                    watch.recompute(&report);
                }
                let (mut report, stopping) = done?;
                report.seconds = seconds;
                if let Some(log) = &mut log {
                    log.write(&report)?;
                }
                watch.step(&report, total);
                // Alone, a request to stop that came during the step counts at once; several
                // processes have to learn of it in the next.
                let mut stopping = stopping || peers.world() == 1 && stop.load(Ordering::Relaxed);
                let ends_epoch = (step + 1) % settings.steps == 0;
                let keeps = ends_epoch || stopping || step + 1 == total;
                if keeps && first_process {
                    check(&state, &out)?;
                }
                let epoch = step / settings.steps + 1;
                if ends_epoch
                    && (epoch.is_multiple_of(settings.validate_every) || step + 1 == total)
                    && settings.validation_cases > 0
                {
                    let asked = (stopping, stop);
                    stopping =
                        judge(device, &mut state, &validation, peers, asked, &mut log, watch)?;
                }
                if keeps {
                    keep(&state, &mut log, &out)?;
                }
                if stopping && (step + 1 < total || state.progress.unvalidated) {
                    return Ok(Ended::Stopped);
                }
            }
            Ok(Ended::Finished)
        })();
        // The reader may be waiting for room: when the receiver is dropped it ends.
        abandoned.store(true, Ordering::Relaxed);
        drop(receive);
        // A panic of the reader continues here.
        reader.join().unwrap_or_else(|payload| resume_unwind(payload));
        result
    })
}

/// Whether something is so in any process: all of them come here.
fn any(peers: &Peers, here: bool) -> Result<bool, String> {
    let mut all = [f64::from(u8::from(here))];
    peers.sum(&mut all)?;
    Ok(all[0] > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::cases::TargetLabel;
    use crate::train::settings::Given;
    use std::fs::{File, TryLockError};
    use std::io::{Error, ErrorKind};

    struct Warned(Vec<String>);

    impl Watch for Warned {
        fn step(&mut self, _: &StepReport, _: usize) {}
        fn case(&mut self, _: usize, _: usize) {}
        fn validation(&mut self, _: &ValidationReport) {}
        fn warning(&mut self, text: &str) {
            self.0.push(text.into());
        }
    }

    /// How a run to `out` ends that is told to stop before it begins, while `claimed` is locked for
    /// it; and its warnings.
    fn stopped(claimed: Claimed, out: &Path) -> (Result<Ended, String>, Vec<String>) {
        let settings = Given { out: Some(out.into()), ..Given::default() }.settings();
        let state = before_any_step(settings, Weights::hashed(Config::tiny(), "claimed"));
        let device = Device::open("cpu", 1).unwrap();
        let pools = Pools::open("synth:1", "", &TargetLabel::Any, None, None, None, 0).unwrap();
        let (peers, stop, mut watch) = (Peers::alone(), AtomicBool::new(true), Warned(vec![]));
        let ended = run_claimed(Some(claimed), &device, state, &pools, &peers, &stop, &mut watch);
        (ended, watch.0)
    }

    #[test]
    fn a_run_is_carried_out_in_the_folder_that_is_locked_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| folder.path().join(name));
        let (ended, _) = stopped(claim(&one).unwrap(), &other);
        let why = ended.unwrap_err();
        assert!(why.contains("one is locked, expected that of the run: "), "{why}");
        assert!(!other.exists());
        let (ended, warned) = stopped(claim(&one).unwrap(), &one);
        assert_eq!((ended, warned), (Ok(Ended::Stopped), vec![]));
        assert!(one.join("last.state.safetensors").exists());
        // It may be spelled in another way.
        let (ended, _) = stopped(claim(&one.join("../one")).unwrap(), &one);
        assert_eq!(ended, Ok(Ended::Stopped));
    }

    #[test]
    fn who_watches_a_run_hears_that_its_folder_has_no_locks() {
        let folder = tempfile::tempdir().unwrap();
        let (out, path) = (folder.path().to_path_buf(), folder.path().join("run.lock"));
        let tried = Err(TryLockError::Error(Error::from(ErrorKind::Unsupported)));
        let lock = Lock::of(&path, File::create(&path).unwrap(), tried).unwrap();
        let (ended, warned) = stopped(Claimed { out: out.clone(), lock }, &out);
        assert_eq!(ended, Ok(Ended::Stopped));
        assert!(warned.len() == 1 && warned[0].contains("cannot be locked"), "{warned:?}");
    }
}
