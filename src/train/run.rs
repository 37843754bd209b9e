//! A training run: draws samples ahead, steps, validates, saves, and can be stopped and resumed.
//!
//! In the folder [`Settings::out`] it writes `settings.toml`, `split.json` (and `split-2.json` and
//! so on, one for each further list of cases), the log `log.jsonl`, the curves of
//! [`curves`](super::curves), and after every epoch the weights, `last.safetensors`, and the
//! [`State`], `last.state.safetensors`; when a validation is the best so far, `best.safetensors`.

use super::clicker::Clicker;
use super::exchange::{Buckets, Exchange};
use super::interactive;
use super::peers::Peers;
use super::settings::Settings;
use super::state::{Progress, State, scaling};
use super::step::{IterationLoss, Lost, Outcome, Prompt, Recorder, Round, Share, run_item_sharing};
use crate::autograd::ParamGrads;
use crate::data::sample::Sample;
use crate::data::source::Pools;
use crate::device::{Cpu, DType, Device};
use crate::input::read_text;
use crate::model::weights::Precision;
use crate::model::{Config, Model, Observer, PatchPrompts, Weights};
use crate::ops::loss::{KERNEL, Target};
use crate::ops::optimizer::{AdamW, follow, global_norm, upload_parameters};
use crate::ops::pointwise::positive;
use crate::output::{lock, make_folder, write_text};
use crate::prompt::simulate::{Errors, User, generator};
use crate::tensor::{OpError, Tensor, caught};
use rand::RngExt;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;
use std::io::Write;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::Builder;
use std::time::Instant;

/// The name of the file in a run's folder that has all its settings.
pub const SETTINGS: &str = "settings.toml";
/// The name of the file in a run's folder that has the split of its first list of cases into
/// training, validation and test.
pub const SPLIT: &str = "split.json";

/// Steps whose samples are drawn ahead.
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
    /// It was asked to stop; the state is saved, so that the run can be resumed.
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

/// Carries out a run, from `state` on, until all epochs are done or `stop` is set in any process.
///
/// When it is to stop, the present step, or in process 0 the present case of a validation, is
/// finished and the state saved. A validation that was interrupted is repeated from its beginning
/// when the run is resumed. Each process takes its share of every batch; process 0 validates and
/// writes, and locks the run's folder meanwhile. A process that fails tells the others why.
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
    let done = caught(|| Ok(all_steps(device, state, pools, peers, stop, watch)));
    done.unwrap_or_else(|refused| Err(refused.to_string())).map_err(|why| peers.ended(why))
}

fn all_steps(
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
    let (mut log, mut _lock) = (None, None);
    if first_process {
        make_folder(&out).map_err(|e| format!("{}: {e}", out.display()))?;
        let busy =
            || format!("another training is writing to {}: give another --out", out.display());
        _lock = Some(lock(&out, "run.lock")?.ok_or_else(busy)?);
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
    let total = settings.total_steps();
    let (first, augmentation) = (state.progress.step, settings.augmentation());
    let abandoned = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (send, receive) = sync_channel::<Result<Vec<Sample>, String>>(AHEAD);
        let (settings_ref, config_ref, abandoned_ref, items) =
            (&settings, &config, &abandoned, share.clone());
        let read = move || {
            for step in first..total {
                let draw = |item: usize| {
                    pools.train.draw(
                        config_ref,
                        &augmentation,
                        settings_ref.seed,
                        step as u64,
                        item as u64,
                    )
                };
                let samples = items
                    .clone()
                    .into_par_iter()
                    .map(draw)
                    .collect::<Result<Vec<_>, _>>()
                    .map_err(|e| e.to_string());
                if abandoned_ref.load(Ordering::Relaxed) || send.send(samples).is_err() {
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
                let samples = receive
                    .recv()
                    .map_err(|_| "the thread that reads the data ended early".to_string())??;
                let start = Instant::now();
                let (mut report, stopping) = train_step(
                    device,
                    (&workers[..], recorder.as_mut()),
                    (peers, &buckets),
                    &mut state,
                    &samples,
                    step,
                    stop,
                )?;
                report.seconds = start.elapsed().as_secs_f64();
                if let Some(log) = &mut log {
                    log.write(&report)?;
                }
                watch.step(&report, total);
                // Alone, a request to stop that came during the step counts at once; several
                // processes have to learn of it in the next.
                let mut stopping = stopping || peers.world() == 1 && stop.load(Ordering::Relaxed);
                let ends_epoch = (step + 1) % settings.steps == 0;
                let epoch = step / settings.steps + 1;
                if ends_epoch
                    && (epoch.is_multiple_of(settings.validate_every) || step + 1 == total)
                    && settings.validation_cases > 0
                {
                    let asked = (stopping, stop);
                    stopping =
                        judge(device, &mut state, &validation, peers, asked, &mut log, watch)?;
                }
                if ends_epoch || stopping || step + 1 == total {
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
        // If the reader was refused memory, the refusal continues here.
        reader.join().unwrap_or_else(|payload| resume_unwind(payload));
        result
    })
}

/// Validates after an epoch, in process 0, unless or until it learns that the run is to stop;
/// `stopping` says that it already knows. The state records a validation that was not completed.
/// All processes call this; returns whether any of them was asked to stop.
fn judge(
    device: &Device,
    state: &mut State,
    samples: &[Sample],
    peers: &Peers,
    (stopping, stop): (bool, &AtomicBool),
    log: &mut Option<Log>,
    watch: &mut dyn Watch,
) -> Result<bool, String> {
    let asked = || stopping || stop.load(Ordering::Relaxed);
    state.progress.unvalidated = false;
    if !samples.is_empty() {
        match validate(device, state, samples, &asked, watch)? {
            Some(dice) => {
                let last = dice.last().copied().unwrap_or(0.0);
                let best = state.progress.best.is_none_or(|b| last > b);
                if best {
                    state.progress.best = Some(last);
                    let path = state.progress.settings.out.join("best.safetensors");
                    save_weights(state, &path)?;
                }
                let step = state.progress.step;
                let epoch = step / state.progress.settings.steps;
                let report = ValidationReport { epoch, step, validation: dice, best };
                if let Some(log) = log {
                    log.write(&report)?;
                }
                watch.validation(&report);
            }
            None => state.progress.unvalidated = true,
        }
    }
    any(peers, asked())
}

/// Whether something is so in any process: all of them come here.
fn any(peers: &Peers, here: bool) -> Result<bool, String> {
    let mut all = [f64::from(u8::from(here))];
    peers.sum(&mut all)?;
    Ok(all[0] > 0.0)
}

/// Writes the run's results to disk, in the process that writes. The log first: it may contain more
/// than the state, which a resumed run drops, but not less.
fn keep(state: &State, log: &mut Option<Log>, out: &Path) -> Result<(), String> {
    let Some(log) = log else { return Ok(()) };
    log.sync()?;
    save(state, out)?;
    super::curves::draw(out)
}

/// Saves the state, and the weights as a model file.
fn save(state: &State, out: &Path) -> Result<(), String> {
    save_weights(state, &out.join("last.safetensors"))?;
    state.save(&out.join("last.state.safetensors"))
}

/// The weights that are validated and used: their moving average if there is one.
fn current(state: &State) -> Result<Weights, String> {
    let list = state.progress.config.tensors();
    let named = list.into_iter().enumerate().map(|(id, (name, shape))| {
        let tensor = match &state.average {
            Some(average) => average[id].reshape(shape),
            None => (*state.weights.get(&name)).clone(),
        };
        (name, tensor)
    });
    Weights::from_tensors(state.progress.config.clone(), named.collect()).map_err(|e| e.to_string())
}

fn save_weights(state: &State, path: &Path) -> Result<(), String> {
    let mut weights = current(state)?;
    // Copied back first: within the file's writer a failure could not be reported.
    for tensor in weights.tensors_mut() {
        tensor.try_data().map_err(|e| format!("{}: {e}", path.display()))?;
    }
    weights.save(path, Precision::F32).map_err(|e| e.to_string())
}

/// Devices for items in parallel, each with threads of its own: small maps do not keep many threads
/// busy. Their buffers last for the whole run.
fn workers(device: &Device, batch: usize) -> Result<Vec<Device>, String> {
    let threads = device.cpu().threads();
    let count = batch.min(threads).max(1);
    // On a GPU, which one item keeps busy, items take turns.
    if count == 1 || matches!(device, Device::Cuda(_)) {
        return Ok(vec![device.clone()]);
    }
    let open = |_| {
        Cpu::with_isa(threads / count, device.cpu().isa())
            .map(Device::Cpu)
            .map_err(|e| e.to_string())
    };
    (0..count).map(open).collect()
}

/// Steps without an overflow after which the loss scale doubles, and its largest value.
const SCALE_GROWS: u32 = 500;
const MOST_SCALE: f32 = 16777216.0;

/// One step: this process's items forward and backward, the gradients of all, then the optimiser.
/// Also returns whether any process was asked to stop. With a recorder, which only a process that
/// is alone has, items are replayed.
fn train_step(
    device: &Device,
    (workers, recorder): (&[Device], Option<&mut Recorder>),
    (peers, buckets): (&Peers, &Buckets),
    state: &mut State,
    samples: &[Sample],
    step: usize,
    stop: &AtomicBool,
) -> Result<(StepReport, bool), String> {
    let settings = state.progress.settings.clone();
    let fail = |e: OpError| e.to_string();
    upload_parameters(device, &mut state.weights.tensors_mut()).map_err(fail)?;
    // Gradients below 6e-8 are zero in f16; bf16 has the range of f32.
    let scales = matches!(device, Device::Cuda(cuda) if cuda.precision() == DType::F16);
    let scale = if scales { state.progress.scaling.0 } else { 1.0 };
    let (weights, batch, first) =
        (settings.weights(), settings.batch, peers.share(settings.batch).start);
    let share = Share {
        weights,
        iterations: settings.iterations,
        batch,
        recompute: settings.recompute,
        scale,
    };
    let config = &state.progress.config;
    let count = config.tensors().len();
    let item = |device: &Device, at: usize, work: Work| {
        let numbers = [step as u64, (first + at) as u64];
        learn(device, config, &samples[at], share, &settings, numbers, work)
    };
    let (lost, grads) = match recorder {
        Some(recorder) => {
            let (mut lost, mut grads) = (vec![], recorder.begin(&state.weights).map_err(fail)?);
            for at in 0..samples.len() {
                let last = at + 1 == samples.len();
                lost.push(item(device, at, Work::Replayed(&mut *recorder, &mut grads, last))?);
            }
            (lost, grads)
        }
        None => {
            let model = Model::new(device, &state.weights).map_err(fail)?;
            let mut exchange = Exchange::new(peers, device, buckets);
            let (lost, mut grads) = if matches!(device, Device::Cuda(_)) {
                // One after the other into the same sums, so that they are final while the backward
                // pass of the last item is still running.
                let (mut lost, mut grads) = (vec![], ParamGrads::new(count));
                for at in 0..samples.len() {
                    let last = (at + 1 == samples.len()).then_some(&mut exchange);
                    lost.push(item(device, at, Work::OpByOp(&model, &mut grads, last))?);
                }
                (lost, grads)
            } else {
                side_by_side(workers, samples.len(), |device, at| {
                    let mut grads = ParamGrads::new(count);
                    let lost = item(device, at, Work::OpByOp(&model, &mut grads, None))?;
                    grads.settle(device).map_err(fail)?;
                    Ok((lost, grads))
                })?
            };
            drop(model);
            exchange.finish(&mut grads)?;
            (lost, grads)
        }
    };
    // Sums on a GPU that waited for a lost process end with unspecified values: the optimiser must
    // not use them. If the loss is reported only later, nothing is saved any more.
    peers.intact()?;
    let gradients: Vec<Option<&Tensor>> = (0..count).map(|id| grads.tensor(id)).collect();
    let scaled_norm = global_norm(device, &gradients).map_err(fail)?;
    let lr = settings.rate(step);
    // If the norm is not finite, nothing changes: that is checked where the norm is. A GPU has all
    // of the step's work before anything waits for it.
    let mut values = state.weights.tensors_mut();
    state
        .optimizer
        .step(device, lr, &mut values, &gradients, &scaled_norm, scale as f64)
        .map_err(fail)?;
    if let Some(average) = &mut state.average {
        // Early on the average follows closely: its starting point is not worth remembering.
        let decay = settings.ema.min((1.0 + step as f64) / (10.0 + step as f64)) as f32;
        let values: Vec<&Tensor> = values.iter().map(|v| &**v).collect();
        follow(device, average, &values, 1.0 - decay, &scaled_norm).map_err(fail)?;
    }
    drop(values);
    let (outcomes, scaled_norm) = Lost::read_with(device, &lost, &scaled_norm).map_err(fail)?;
    let (outcomes, stopping) =
        everybodys(peers, outcomes, batch, settings.iterations, stop.load(Ordering::Relaxed))?;
    let loss: f64 = outcomes.iter().map(|o| o.loss).sum();
    let norm = scaled_norm / scale as f64;
    peers.intact()?;
    if !norm.is_finite() {
        state.optimizer.take_back();
    }
    let overflow = scales && loss.is_finite() && !norm.is_finite() && scale > 1.0;
    if scales {
        state.progress.scaling = match state.progress.scaling {
            _ if overflow => (scale / 2.0, 0),
            (_, steps) if steps + 1 >= SCALE_GROWS => ((scale * 2.0).min(MOST_SCALE), 0),
            (_, steps) => (scale, steps + 1),
        };
    }
    if !overflow && (!loss.is_finite() || !norm.is_finite()) {
        let names: Vec<&str> = samples.iter().map(|s| s.name.as_str()).collect();
        return Err(format!(
            "step {}: the loss is {loss}, the gradient's norm {norm}. Its samples: {}. The last saved state is unchanged",
            step + 1,
            names.join(", ")
        ));
    }
    state.progress.step = step + 1;
    state.progress.optimizer_steps = state.optimizer.steps();
    let mean = |f: &dyn Fn(&IterationLoss) -> f64| -> f64 {
        outcomes
            .iter()
            .map(|o| o.iterations.iter().map(f).sum::<f64>() / o.iterations.len().max(1) as f64)
            .sum()
    };
    let longest = outcomes.iter().map(|o| o.iterations.len()).max().unwrap_or(0);
    let dice = |t: usize| {
        let values: Vec<f64> =
            outcomes.iter().filter_map(|o| Some(o.iterations.get(t)?.dice)).collect();
        values.iter().sum::<f64>() / values.len().max(1) as f64
    };
    let report = StepReport {
        step: step + 1,
        epoch: step / settings.steps + 1,
        loss,
        confidence: mean(&|l| l.confidence),
        corrective: mean(&|l| l.corrective),
        dice: (0..longest).map(dice).collect(),
        norm,
        lr,
        seconds: 0.0,
    };
    Ok((report, stopping))
}

/// `count` items on the workers in parallel; their gradients are added in the items' order, however
/// many workers there are.
fn side_by_side(
    workers: &[Device],
    count: usize,
    item: impl Fn(&Device, usize) -> Result<(Lost, ParamGrads), String> + Sync,
) -> Result<(Vec<Lost>, ParamGrads), String> {
    let mut results: Vec<Option<Result<(Lost, ParamGrads), String>>> =
        (0..count).map(|_| None).collect();
    std::thread::scope(|scope| {
        let chunk = count.div_ceil(workers.len());
        let mut running = vec![];
        for (w, (device, results)) in workers.iter().zip(results.chunks_mut(chunk)).enumerate() {
            let item = &item;
            let work = move || {
                results
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, r)| *r = Some(item(device, w * chunk + i)))
            };
            running.push(Builder::new().spawn_scoped(scope, work));
        }
        // If one of them was refused memory, the refusal continues here. All are waited for before
        // any result is examined.
        let ended: Vec<_> = running.into_iter().map(|thread| thread.map(|t| t.join())).collect();
        for thread in ended {
            thread
                .map_err(|e| format!("no thread for a part of the batch: {e}"))?
                .unwrap_or_else(|payload| resume_unwind(payload));
        }
        Ok::<_, String>(())
    })?;
    let mut grads: Option<ParamGrads> = None;
    let mut all = vec![];
    for result in results {
        let (lost, part) = result.ok_or("an item was not run")??;
        all.push(lost);
        match &mut grads {
            None => grads = Some(part),
            Some(sum) => sum.add_all(part).map_err(|e| e.to_string())?,
        }
    }
    Ok((all, grads.ok_or("a step without items")?))
}

/// The outcomes of the whole batch from those of each process's items, and whether any process was
/// asked to stop: a sum of tables with zeros in the places of other processes.
fn everybodys(
    peers: &Peers,
    mine: Vec<Outcome>,
    batch: usize,
    iterations: usize,
    stop: bool,
) -> Result<(Vec<Outcome>, bool), String> {
    if peers.world() == 1 {
        return Ok((mine, stop));
    }
    let line = 2 + 3 * iterations;
    let mut table = vec![0.0f64; 1 + batch * line];
    table[0] = f64::from(u8::from(stop));
    for (to, outcome) in
        table[1 + peers.share(batch).start * line..].chunks_exact_mut(line).zip(&mine)
    {
        (to[0], to[1]) = (outcome.loss, outcome.iterations.len() as f64);
        for (to, l) in to[2..].chunks_exact_mut(3).zip(&outcome.iterations) {
            to.copy_from_slice(&[l.confidence, l.corrective, l.dice]);
        }
    }
    peers.sum(&mut table)?;
    let outcomes = table[1..].chunks_exact(line).map(|from| {
        let each = from[2..].chunks_exact(3).take(from[1] as usize);
        Outcome {
            loss: from[0],
            iterations: each
                .map(|v| IterationLoss { confidence: v[0], corrective: v[1], dice: v[2] })
                .collect(),
        }
    });
    Ok((outcomes.collect(), table[0] > 0.0))
}

/// How an item's work is done, and the sums to which its gradients are added.
enum Work<'w, 'x> {
    /// By the ops of a model; for the last item with the step's exchange.
    OpByOp(&'w Model, &'w mut ParamGrads, Option<&'w mut Exchange<'x>>),
    /// From recordings; whether it is the last item.
    Replayed(&'w mut Recorder, &'w mut ParamGrads, bool),
}

impl Work<'_, '_> {
    fn run(
        self,
        device: &Device,
        image: &Tensor,
        target: &Target,
        share: Share,
        prompt: Prompt,
    ) -> Result<Lost, OpError> {
        match self {
            Work::OpByOp(model, grads, exchange) => {
                run_item_sharing(device, model, image, target, share, (grads, exchange), prompt)
            }
            Work::Replayed(recorder, grads, last) => {
                recorder.item(image, target, share, (grads, last), prompt)
            }
        }
    }
}

/// One item forward and backward, with simulated prompts.
fn learn(
    device: &Device,
    config: &Config,
    sample: &Sample,
    share: Share,
    settings: &Settings,
    [step, item]: [u64; 2],
    work: Work,
) -> Result<Lost, String> {
    let s = config.patch;
    let fail = |e: OpError| format!("{}: {e}", sample.name);
    let label: Vec<f32> =
        crate::memory::collected("a label", sample.label.iter().map(|l| *l as f32));
    let target = Target::new(device, label, [s; 3], KERNEL).map_err(fail)?;
    let user = settings.item_user(&mut generator(settings.seed, &[4, step, item]));
    let mut rng = generator(settings.seed, &[2, step, item]);
    let image = Tensor::new([s; 3], sample.image.clone());
    if generator(settings.seed, &[5, step, item]).random_bool(settings.clicking) {
        let mut clicker =
            Clicker::new(&mut rng, &sample.label, s, config.click_radius, settings.click_weight);
        let mut prompt = |t: usize, answer: Option<&Tensor>| -> Result<Option<Round>, OpError> {
            let answer = answer.map(Tensor::try_data).transpose()?;
            Ok(Some(clicker.give(&mut rng, t, answer)))
        };
        return work.run(device, &image, &target, share, &mut prompt).map_err(fail);
    }
    let bounds = user.bounds(&mut rng, &sample.label, [s; 3]).map(|b| b.map(|v| v as f32));
    let mut prompt = |_: usize, answer: Option<&Tensor>| -> Result<Option<Round>, OpError> {
        let answer = answer.map(|answer| positive(device, answer)).transpose()?;
        let errors = Errors::of(&sample.label, answer.as_deref());
        Ok((!errors.is_empty()).then(|| {
            PatchPrompts { points: user.correct(&mut rng, &errors, [s; 3]), bounds }.into()
        }))
    };
    work.run(device, &image, &target, share, &mut prompt).map_err(fail)
}

/// Mean Dice after each iteration over fixed samples, by a fixed user: a box, ten points per
/// iteration; if the run learns from users who steer, a box, then single clicks. None if it was
/// told to stop before the last of them was begun.
fn validate(
    device: &Device,
    state: &State,
    samples: &[Sample],
    stops: &dyn Fn() -> bool,
    watch: &mut dyn Watch,
) -> Result<Option<Vec<f64>>, String> {
    let settings = &state.progress.settings;
    let model = Model::new(device, &current(state)?).map_err(|e| e.to_string())?;
    let s = model.config().patch;
    let user = User { boxed: 1.0, ..User::of_points(10) };
    let mut sums = vec![0.0; settings.validation_iterations];
    for (at, sample) in samples.iter().enumerate() {
        if stops() {
            return Ok(None);
        }
        watch.case(at + 1, samples.len());
        let fail = |e: OpError| format!("{}: {e}", sample.name);
        let image = Tensor::new([s; 3], sample.image.clone());
        let features = model.encode(&image, &mut Observer::none()).map_err(fail)?;
        let mut rng = generator(settings.seed, &[3, at as u64]);
        let see = |t: usize, logits: &[f32]| {
            sums[t] += interactive::dice(&sample.label, &interactive::mask(logits))
        };
        if settings.clicking > 0.0 {
            interactive::steer(
                device,
                &model,
                &features,
                &sample.label,
                &mut rng,
                settings.validation_iterations,
                see,
            )
            .map_err(fail)?;
            continue;
        }
        interactive::interact(
            device,
            &model,
            &features,
            &sample.label,
            &user,
            &mut rng,
            settings.validation_iterations,
            see,
        )
        .map_err(fail)?;
    }
    Ok(Some(sums.into_iter().map(|v| v / samples.len() as f64).collect()))
}

/// The run's log, one JSON object per line.
struct Log(std::io::BufWriter<std::fs::File>);

impl Log {
    /// Opens the log to continue after `step` steps: later entries, by a run that did not save, are
    /// dropped, and so is that of a validation after the last step if that is still to be made.
    fn open(path: &Path, step: usize, unvalidated: bool) -> Result<Log, String> {
        let fail = |e: std::io::Error| format!("{}: {e}", path.display());
        let kept: Vec<String> = match std::fs::read_to_string(path) {
            Ok(text) if step > 0 => text
                .lines()
                .filter(|l| {
                    logged(l).is_some_and(|(s, validation)| {
                        s < step || s == step && !(validation && unvalidated)
                    })
                })
                .map(str::to_string)
                .collect(),
            _ => vec![],
        };
        write_text(path, &kept.iter().map(|l| format!("{l}\n")).collect::<String>())?;
        let file = std::fs::OpenOptions::new().append(true).open(path).map_err(fail)?;
        Ok(Log(std::io::BufWriter::new(file)))
    }

    fn write(&mut self, report: &impl Serialize) -> Result<(), String> {
        writeln!(self.0, "{}", json!(report)).map_err(|e| format!("the log: {e}"))
    }

    /// Makes sure that everything written is on the disk.
    fn sync(&mut self) -> Result<(), String> {
        let synced = self.0.flush().and_then(|()| self.0.get_ref().sync_all());
        synced.map_err(|e| format!("the log: {e}"))
    }
}

/// The step of a line of the log, and whether it is a validation's.
fn logged(line: &str) -> Option<(usize, bool)> {
    let line: serde_json::Value = serde_json::from_str(line).ok()?;
    Some((line["step"].as_u64()? as usize, line["validation"].is_array()))
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::device::Cuda;
    use crate::train::settings::Given;

    fn state() -> State {
        let settings = Given {
            batch: Some(2),
            iterations: Some(1),
            points_max: Some(5),
            scribbles: Some(0.0),
            ema: Some(0.9),
            ..Given::default()
        }
        .settings();
        before_any_step(settings, Weights::hashed(Config::tiny(), "overflow"))
    }

    /// The bits of weights, averages and moments.
    fn bits(state: &State) -> Vec<Vec<u32>> {
        let of = |t: &Tensor| t.data().iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
        let tensors = state.progress.config.tensors();
        let weights = tensors.iter().map(|(name, _)| of(&state.weights.get(name)));
        let averages = state.average.iter().flatten().map(of);
        weights.chain(averages).chain(state.optimizer.moments().iter().flatten().map(of)).collect()
    }

    fn sample(seed: usize) -> Sample {
        Sample {
            name: format!("sample {seed}"),
            image: (0..32768).map(|i| ((i * 7919 + seed) % 997) as f32 / 500.0 - 1.0).collect(),
            label: (0..32768).map(|i| u8::from(i / 1024 > 10 && i % 32 < 20)).collect(),
        }
    }

    /// Steps by replay leave the bits that steps op by op leave: with other prompts and other
    /// numbers of tokens in each iteration, users who steer among them, iterations that are run
    /// again and others that would be kept, when a step overflows, and when a run is resumed, which
    /// records anew.
    #[test]
    fn replayed_steps_leave_the_bits_of_their_ops() {
        for (precision, recompute, batch, clicking, steps) in
            [(DType::F16, true, 1, 0.0, 7), (DType::F32, false, 1, 0.5, 2)]
        {
            let cuda = Cuda::emulated(Cpu::new(2).unwrap(), precision, 0);
            let device = Device::Cuda(cuda.clone());
            let mut states = [(); 2].map(|()| state());
            for state in &mut states {
                let settings = &mut state.progress.settings;
                (settings.batch, settings.iterations, settings.recompute) = (batch, 2, recompute);
                (settings.points_min, settings.points_max, settings.boxed) = (1, 2, 0.5);
                settings.clicking = clicking;
            }
            let [plain, replayed] = &mut states;
            let samples: Vec<Sample> = (1..=batch).map(sample).collect();
            let (peers, buckets) = (Peers::alone(), Buckets::new(&plain.progress.config));
            let (workers, stop) = ([device.clone()], AtomicBool::new(false));
            let mut recorder = Recorder::new(&cuda);
            for step in 0..steps {
                let overflows = step == 2 && precision == DType::F16;
                let take = |state: &mut State, recorder: Option<&mut Recorder>| {
                    let scale = if overflows { 2f32.powi(100) } else { 1024.0 };
                    state.progress.scaling = (scale, 0);
                    let (workers, shared) = ((&workers[..], recorder), (&peers, &buckets));
                    train_step(&device, workers, shared, state, &samples, step, &stop).unwrap().0
                };
                let expected = take(plain, None);
                let report = take(replayed, Some(&mut recorder));
                let what = format!("{precision}, {recompute}, {batch}: step {step}");
                assert_eq!(overflows, !report.norm.is_finite(), "{what}: {report:?}");
                assert_eq!(report.loss.to_bits(), expected.loss.to_bits(), "{what}");
                if !overflows {
                    assert_eq!(report.norm.to_bits(), expected.norm.to_bits(), "{what}");
                }
                assert!(bits(replayed) == bits(plain), "{what}");
                let [encoder, taped, answers] = recorder.recorded();
                let records = usize::from(step != 0 && step != 5);
                assert_eq!((encoder, recompute || answers == 0), (records, true), "{what}");
                if step == 4 {
                    // Behind the first step four items had one of three numbers of tokens: one of
                    // these came twice.
                    assert!(taped > 0 && (answers > 0) == recompute, "{taped}, {answers}");
                    // The run is resumed.
                    recorder = Recorder::new(&cuda);
                }
            }
        }
    }

    /// If gradients overflow their 16 bits, a step changes nothing but the loss scale; and the
    /// gradients that two items give a stage's weights go back to the weights from which those were
    /// composed.
    #[test]
    fn a_step_that_overflowed_leaves_nothing_behind() {
        let cuda = Cuda::emulated(Cpu::new(2).unwrap(), DType::F16, 0);
        let device = Device::Cuda(cuda);
        let samples = [1, 2].map(sample);
        let take = |state: &mut State, scale: f32| {
            state.progress.scaling = (scale, 0);
            let (peers, buckets) = (Peers::alone(), Buckets::new(&state.progress.config));
            let shared = (&peers, &buckets);
            let (workers, stop) = ([device.clone()], AtomicBool::new(false));
            let workers = (&workers[..], None);
            train_step(&device, workers, shared, state, &samples, 0, &stop).unwrap().0
        };
        let (mut state, mut other) = (state(), state());
        let before = bits(&state);
        let large = 2f32.powi(100);
        let report = take(&mut state, large);
        assert!(report.loss.is_finite() && !report.norm.is_finite(), "{report:?}");
        assert!(bits(&state) == before, "a step that overflowed changed something");
        assert_eq!((state.progress.scaling, state.optimizer.steps()), ((large / 2.0, 0), 0));
        for state in [&mut state, &mut other] {
            let report = take(state, 1024.0);
            assert!(report.norm.is_finite() && state.optimizer.steps() == 1, "{report:?}");
        }
        let after = bits(&state);
        assert!(after == bits(&other), "the step behind it is another");
        let tensors = state.progress.config.tensors();
        let composed =
            tensors.iter().zip(before.iter().zip(&after)).filter(|((name, shape), _)| {
                name.starts_with("mask_decoder.decoder.upcat_") && shape.len() == 5
            });
        let unchanged: Vec<_> = composed.clone().filter(|(_, (b, a))| b == a).collect();
        assert!(composed.count() > 4 && unchanged.is_empty(), "{} unchanged", unchanged.len());
    }
}
