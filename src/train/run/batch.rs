//! One step: the items of a batch forward and backward, on one device or several, then the
//! optimiser.

use super::StepReport;
use super::item::Item;
use super::recompute::{Chosen, Failed};
use crate::autograd::ParamGrads;
use crate::device::{Cpu, DType, Device};
use crate::model::Model;
use crate::ops::loss::{KERNEL, Target};
use crate::ops::optimizer::{follow, global_norm, upload_parameters};
use crate::ops::pointwise::positive;
use crate::prompt::simulate::generator;
use crate::tensor::{OpError, Tensor, caught};
use crate::train::clicker::Clicker;
use crate::train::exchange::{Buckets, Exchange};
use crate::train::peers::Peers;
use crate::train::settings::{Recompute, Settings};
use crate::train::state::State;
use crate::train::step::{
    IterationLoss, Lost, Outcome, Prompt, Recorder, Rerun, Round, Share, run_item_sharing,
};
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Builder;

/// Devices for items in parallel, each with threads of its own: small maps do not keep many threads
/// busy. Their buffers last for the whole run.
pub(super) fn workers(device: &Device, batch: usize) -> Result<Vec<Device>, String> {
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
pub(super) fn train_step(
    device: &Device,
    (workers, mut recorder, chosen): (&[Device], Option<&mut Recorder>, &mut Chosen),
    (peers, buckets): (&Peers, &Buckets),
    state: &mut State,
    items: &[Item],
    step: usize,
    stop: &AtomicBool,
) -> Result<(StepReport, bool), String> {
    let settings = state.progress.settings.clone();
    let fail = |e: OpError| e.to_string();
    upload_parameters(device, &mut state.weights.tensors_mut()).map_err(fail)?;
    // Gradients below 6e-8 are zero in f16; bf16 has the range of f32.
    let scales = matches!(device, Device::Cuda(cuda) if cuda.precision() == DType::F16);
    let scale = if scales { state.progress.scaling.0 } else { 1.0 };
    let (batch, count) = (settings.batch, state.progress.config.tensors().len());
    let work = Items {
        device,
        workers,
        state: &*state,
        settings: &settings,
        items,
        step: step as u64,
        first: peers.share(batch).start as u64,
        scale,
    };
    let (lost, grads) = loop {
        let (rerun, mut exchange) = (chosen.rerun(), Exchange::new(peers, device, buckets));
        // On the CPU a refusal of memory unwinds.
        let done = caught(|| Ok(work.all(rerun, recorder.as_deref_mut(), &mut exchange)));
        let failed = match done {
            Ok(Ok((lost, mut grads))) => {
                // With a recorder there are no other processes.
                if recorder.is_none() {
                    exchange.finish(&mut grads)?;
                }
                break (lost, grads);
            }
            Ok(Err(failed)) => failed,
            Err(e) => e.into(),
        };
        if exchange.has_begun() || !chosen.does_again(&failed, step + 1) {
            // Where that was left to the run, it is no advice.
            let keeps = settings.recompute == Recompute::Never && settings.iterations > 1;
            let hint = match failed.refused && keeps {
                true => ". It takes less with --recompute auto, which --resume accepts",
                false => "",
            };
            return Err(failed.text + hint);
        }
    };
    let tape = lost.iter().map(Lost::tape_bytes).max().unwrap_or(0);
    let kept = settings.iterations.saturating_sub(1) * workers.len();
    chosen.measured(tape.saturating_mul(kept as u64));
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
        let names: Vec<&str> = items.iter().map(|item| item.sample.name.as_str()).collect();
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
    item: impl Fn(&Device, usize) -> Result<(Lost, ParamGrads), Failed> + Sync,
) -> Result<(Vec<Lost>, ParamGrads), Failed> {
    let mut results: Vec<Option<Result<(Lost, ParamGrads), Failed>>> =
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
                .map_err(|e| Failed::other(format!("no thread for a part of the batch: {e}")))?
                .unwrap_or_else(|payload| resume_unwind(payload));
        }
        Ok::<_, Failed>(())
    })?;
    let mut grads: Option<ParamGrads> = None;
    let mut all = vec![];
    for result in results {
        let (lost, part) = result.ok_or_else(|| Failed::other("an item was not run"))??;
        all.push(lost);
        match &mut grads {
            None => grads = Some(part),
            Some(sum) => sum.add_all(part)?,
        }
    }
    Ok((all, grads.ok_or_else(|| Failed::other("a step without items"))?))
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

/// The items of a step that belong to this process.
struct Items<'s> {
    device: &'s Device,
    workers: &'s [Device],
    state: &'s State,
    settings: &'s Settings,
    items: &'s [Item],
    /// The step, from 0, and the number of the first item within the batch.
    step: u64,
    first: u64,
    /// The loss scale.
    scale: f32,
}

impl Items<'_> {
    /// All items forward and backward: their losses, and the sums of their gradients. Nothing but
    /// the exchange and the recorder remembers a call that failed.
    fn all(
        &self,
        rerun: Rerun,
        recorder: Option<&mut Recorder>,
        exchange: &mut Exchange,
    ) -> Result<(Vec<Lost>, ParamGrads), Failed> {
        let Items { device, state, items, .. } = *self;
        if let Some(recorder) = recorder {
            let (mut lost, mut grads) = (vec![], recorder.begin(&state.weights)?);
            for at in 0..items.len() {
                let last = at + 1 == items.len();
                let work = Work::Replayed(&mut *recorder, &mut grads, last);
                lost.push(self.one(device, at, rerun, work)?);
            }
            return Ok((lost, grads));
        }
        let model = Model::new(device, &state.weights)?;
        let count = state.progress.config.tensors().len();
        if matches!(device, Device::Cuda(_)) {
            // One after the other into the same sums, so that they are final while the backward
            // pass of the last item is still running.
            let (mut lost, mut grads) = (vec![], ParamGrads::new(count));
            for at in 0..items.len() {
                let last = (at + 1 == items.len()).then_some(&mut *exchange);
                let work = Work::OpByOp(&model, &mut grads, last);
                lost.push(self.one(device, at, rerun, work)?);
            }
            return Ok((lost, grads));
        }
        side_by_side(self.workers, items.len(), |device, at| {
            let mut grads = ParamGrads::new(count);
            let lost = self.one(device, at, rerun, Work::OpByOp(&model, &mut grads, None))?;
            grads.settle(device)?;
            Ok((lost, grads))
        })
    }

    /// One item forward and backward, with simulated prompts.
    fn one(&self, device: &Device, at: usize, rerun: Rerun, work: Work) -> Result<Lost, Failed> {
        let item = &self.items[at];
        self.learn(device, item, self.first + at as u64, rerun, work).map_err(|e| {
            let failed = Failed::from(e);
            Failed { text: format!("{}: {}", item.sample.name, failed.text), ..failed }
        })
    }

    fn learn(
        &self,
        device: &Device,
        Item { sample, corrector }: &Item,
        number: u64,
        rerun: Rerun,
        work: Work,
    ) -> Result<Lost, OpError> {
        let Items { settings, step, scale, .. } = *self;
        let config = &self.state.progress.config;
        let share = Share {
            weights: settings.weights(),
            iterations: settings.iterations,
            batch: settings.batch,
            recompute: rerun,
            scale,
        };
        let s = config.patch;
        let label: Vec<f32> =
            crate::memory::collected("a label", sample.label.iter().map(|l| *l as f32));
        let target = Target::new(device, label, [s; 3], KERNEL)?;
        let image = Tensor::new([s; 3], sample.image.clone());
        let Some(corrector) = corrector else {
            let mut rng = generator(settings.seed, &[2, step, number]);
            let mut clicker = Clicker::new(
                &mut rng,
                &sample.label,
                s,
                config.click_radius,
                settings.click_weight,
            );
            let mut prompt =
                |t: usize, answer: Option<&Tensor>| -> Result<Option<Round>, OpError> {
                    let answer = answer.map(Tensor::try_data).transpose()?;
                    Ok(Some(clicker.give(&mut rng, t, answer)))
                };
            return work.run(device, &image, &target, share, &mut prompt);
        };
        // A step may be done again.
        let mut corrector = corrector.clone();
        let mut prompt = |_: usize, answer: Option<&Tensor>| -> Result<Option<Round>, OpError> {
            let prompts = match answer {
                None => corrector.begin(),
                Some(answer) => corrector.correct(device, &positive(device, answer)?),
            };
            Ok(prompts.map(Round::from))
        };
        work.run(device, &image, &target, share, &mut prompt)
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::data::sample::Sample;
    use crate::device::Cuda;
    use crate::model::{Config, Weights};
    use crate::train::run::before_any_step;
    use crate::train::settings::Given;
    use crate::train::state::Progress;
    use std::collections::BTreeSet;

    /// The tiny network on a patch of an eighth of its voxels. It has one image token, and one
    /// voxel at its deepest level: only the whole patch shows the order of what goes there.
    fn small() -> Config {
        Config { patch: 16, ..Config::tiny() }
    }

    fn state(config: Config) -> State {
        let settings = Given {
            batch: Some(2),
            iterations: Some(1),
            points_max: Some(5),
            scribbles: Some(0.0),
            ema: Some(0.9),
            ..Given::default()
        }
        .settings();
        before_any_step(settings, Weights::hashed(config, "overflow"))
    }

    /// The bits of weights, averages and moments.
    fn bits(state: &State) -> Vec<Vec<u32>> {
        let of = |t: &Tensor| t.data().iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
        let tensors = state.progress.config.tensors();
        let weights = tensors.iter().map(|(name, _)| of(&state.weights.get(name)));
        let averages = state.average.iter().flatten().map(of);
        weights.chain(averages).chain(state.optimizer.moments().iter().flatten().map(of)).collect()
    }

    /// A sample of a patch of so many voxels along each axis.
    fn sample(patch: usize, seed: usize) -> Sample {
        let voxels = 0..patch.pow(3);
        let marked = |i: usize| i / patch.pow(2) > patch / 3 && i % patch < patch * 5 / 8;
        Sample {
            name: format!("sample {seed}"),
            image: voxels.clone().map(|i| ((i * 7919 + seed) % 997) as f32 / 500.0 - 1.0).collect(),
            label: voxels.map(|i| u8::from(marked(i))).collect(),
        }
    }

    /// The items of a step.
    fn items(state: &State, samples: &[Sample], step: usize) -> Vec<Item> {
        let Progress { settings, config, .. } = &state.progress;
        let item = |(at, sample): (u64, &Sample)| {
            Item::new(sample.clone(), settings, config.patch, [step as u64, at])
        };
        (0..).zip(samples).map(item).collect()
    }

    /// Steps by replay leave the bits that steps op by op leave: with other prompts and other
    /// numbers of tokens in each iteration, users who steer among them, iterations that are run
    /// again and others that are kept, or would be where memory has room, when a step overflows,
    /// and when a run is resumed, which records anew. One recording serves several numbers of
    /// tokens.
    #[test]
    fn replayed_steps_leave_the_bits_of_their_ops() {
        for (precision, config, recompute, batch, clicking, steps) in
            [(DType::F16, small(), true, 1, 0.0, 7), (DType::F32, Config::tiny(), false, 1, 0.5, 2)]
        {
            let cuda = Cuda::emulated(Cpu::new(2).unwrap(), precision, 0);
            let device = Device::Cuda(cuda.clone());
            let mut states = [(); 2].map(|()| state(config.clone()));
            for state in &mut states {
                let settings = &mut state.progress.settings;
                (settings.batch, settings.iterations) = (batch, 2);
                settings.recompute = recompute.into();
                settings.boxed = 0.5;
                settings.clicking = clicking;
            }
            let [plain, replayed] = &mut states;
            if !recompute {
                // Until that is chosen, iterations are run again, to the bits of those kept.
                replayed.progress.settings.recompute = Recompute::Auto;
            }
            let samples: Vec<Sample> = (1..=batch).map(|seed| sample(config.patch, seed)).collect();
            let (peers, buckets) = (Peers::alone(), Buckets::new(&plain.progress.config));
            let (workers, stop) = ([device.clone()], AtomicBool::new(false));
            let mut recorder = Recorder::new(&cuda);
            let (mut numbers, mut recorded) = (BTreeSet::new(), [0; 3]);
            for step in 0..steps {
                for state in [&mut *plain, &mut *replayed] {
                    let settings = &mut state.progress.settings;
                    (settings.points_min, settings.points_max) = (1 + step % 5, 1 + step % 5);
                }
                // Before, what is replayed is recorded.
                if (3..5).contains(&step) {
                    let told = items(plain, &samples, step);
                    let told = told.into_iter().filter_map(|item| item.corrector?.begin());
                    // Points, and the corners of a box or what says that there is none.
                    numbers.extend(
                        told.map(|told| told.points.len() + 1 + usize::from(told.bounds.is_some())),
                    );
                }
                let overflows = step == 2 && precision == DType::F16;
                let take = |state: &mut State, recorder: Option<&mut Recorder>| {
                    let scale = if overflows { 2f32.powi(100) } else { 1024.0 };
                    state.progress.scaling = (scale, 0);
                    let mut chosen = Chosen::new(&state.progress.settings);
                    let workers = (&workers[..], recorder, &mut chosen);
                    let shared = (&peers, &buckets);
                    let items = items(state, &samples, step);
                    train_step(&device, workers, shared, state, &items, step, &stop).unwrap().0
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
                // The first and the second iteration, and the first one's answer.
                let kinds = if records == 1 { [2, usize::from(recompute)] } else { [0; 2] };
                assert_eq!(recorder.kinds(), kinds, "{what}");
                if step == 4 {
                    assert!(numbers.len() > 1, "{numbers:?}");
                    assert!(taped >= 2 && (answers > 0) == recompute, "{taped}, {answers}");
                    assert_eq!(recorded, [encoder, taped, answers], "another was recorded");
                    // The run is resumed.
                    recorder = Recorder::new(&cuda);
                }
                recorded = [encoder, taped, answers];
            }
        }
    }

    /// A step of several items copies to the device what is new, and back the masks that its users
    /// look at, as bits, and a few numbers: op by op and by replay. Copies to the device wait for
    /// nothing.
    #[test]
    fn a_step_copies_what_is_new_and_the_masks_that_are_looked_at() {
        let (batch, iterations, config) = (2, 2, small());
        let (voxels, each) = (config.patch.pow(3) as u64, (batch * iterations) as u64);
        for replays in [false, true] {
            let cuda = Cuda::emulated(Cpu::new(2).unwrap(), DType::F16, 0);
            let device = Device::Cuda(cuda.clone());
            let mut state = state(config.clone());
            let settings = &mut state.progress.settings;
            (settings.batch, settings.iterations) = (batch, iterations);
            settings.recompute = Recompute::Never;
            (settings.points_min, settings.points_max, settings.boxed) = (2, 2, 0.0);
            let samples: Vec<Sample> = (1..=batch).map(|seed| sample(config.patch, seed)).collect();
            let (peers, buckets) = (Peers::alone(), Buckets::new(&config));
            let (workers, stop) = ([device.clone()], AtomicBool::new(false));
            let mut recorder = replays.then(|| Recorder::new(&cuda));
            let mut crossed = |step: usize| {
                state.progress.scaling = (1024.0, 0);
                let counted = || (<[u64; 2]>::from(cuda.transfers()), cuda.carried(), cuda.waits());
                let (before, mut chosen) = (counted(), Chosen::new(&state.progress.settings));
                let workers = (&workers[..], recorder.as_mut(), &mut chosen);
                let shared = (&peers, &buckets);
                let items = items(&state, &samples, step);
                let done = train_step(&device, workers, shared, &mut state, &items, step, &stop);
                assert!(done.unwrap().0.norm.is_finite(), "step {step}");
                let after = counted();
                let way = |at: usize| [after.0[at] - before.0[at], after.1[at] - before.1[at]];
                ([way(0), way(1)], after.2 - before.2)
            };
            // The first uploads all weights; what is recorded is so by the fourth.
            let before = if replays { 4 } else { 1 };
            for step in 0..=before {
                let ([up, down], waits) = crossed(step);
                if step < before {
                    continue;
                }
                let what = format!("replays {replays}: {up:?} up, {down:?} down, {waits} waits");
                eprintln!("{what}");
                assert_eq!(waits, 0, "{what}");
                // Each answer but an item's last is looked at; losses and norm come back at the
                // end: the sums of some masks, five doubles each, and their scores.
                let masks = each - batch as u64;
                assert_eq!(down[0], masks + 1, "{what}");
                assert!(down[1] - masks * voxels / 8 <= 8 + 256 * each, "{what}");
                // For each item its image and label. For each iteration two tables of its tokens,
                // their positions, their number and its marks; by replay an iteration's forward
                // pass is repeated before its backward pass, with new copies of four of them,
                // unless it was the last. For the norm, the optimiser and the average a table each.
                // Op by op the position code of the grid.
                let again = if replays { 4 * masks } else { 1 };
                assert_eq!(up[0], 2 * batch as u64 + 5 * each + again + 3, "{what}");
                let lengths =
                    config.tensors().into_iter().map(|(_, s)| s.iter().product::<usize>());
                let table: usize = lengths.map(|n| 40 + 8 * n.div_ceil(1 << 14)).sum();
                let new = batch as u64 * (2 * voxels + voxels / 8) + 3 * table as u64;
                assert!(up[1] <= new + (16 << 10) * each, "{what}, {new} bytes expected");
            }
            if let Some(recorder) = &recorder {
                let [encoder, taped, _] = recorder.recorded();
                assert!(encoder == 1 && taped >= 2, "{encoder}, {taped}");
            }
        }
    }

    /// Where a device has too little memory to keep iterations, they are run again, to the same
    /// bits; and a step that is refused memory while it keeps them is done again.
    #[test]
    fn steps_have_the_same_bits_in_any_memory() {
        // Every step asks for the same memory.
        let begun = |recompute: Recompute| {
            let mut state = state(Config::tiny());
            let settings = &mut state.progress.settings;
            (settings.batch, settings.iterations, settings.recompute) = (1, 3, recompute);
            (settings.points_min, settings.points_max, settings.boxed) = (2, 2, 0.0);
            state.progress.scaling = (1024.0, 0);
            let cuda = Cuda::emulated(Cpu::new(2).unwrap(), DType::F16, 0);
            let chosen = Chosen::new(&state.progress.settings);
            (cuda, state, chosen)
        };
        let samples = [sample(Config::tiny().patch, 1)];
        type Begun = (Cuda, State, Chosen);
        let step = |(cuda, state, chosen): &mut Begun, step: usize| -> Result<(), String> {
            let (peers, buckets) = (Peers::alone(), Buckets::new(&state.progress.config));
            let (device, stop) = (Device::Cuda(cuda.clone()), AtomicBool::new(false));
            let (workers, shared) = ([device.clone()], (&peers, &buckets));
            let workers = (&workers[..], None, chosen);
            let items = items(state, &samples, step);
            train_step(&device, workers, shared, state, &items, step, &stop)?;
            Ok(())
        };
        // Chooses after the first step, where so much more is free than it took.
        let choose = |(cuda, _, chosen): &mut Begun, more: u64| {
            cuda.limit_memory(cuda.held()[1] + more);
            chosen.choose(&Device::Cuda(cuda.clone()), 1, 1);
            cuda.limit_memory(u64::MAX);
            chosen.reports().pop().unwrap()
        };

        let mut kept = begun(Recompute::Never);
        (0..2).for_each(|at| step(&mut kept, at).unwrap());
        assert!(kept.2.reports().is_empty());
        let expected = bits(&kept.1);

        let mut again = begun(Recompute::Auto);
        step(&mut again, 0).unwrap();
        let told = choose(&mut again, 0);
        assert!(told.recompute && told.needed > 0 && told.available == Some(0), "{told:?}");
        step(&mut again, 1).unwrap();
        assert!(bits(&again.1) == expected, "iterations that are run again have other bits");
        let [least, most] = [&again, &kept].map(|(cuda, ..)| cuda.held()[1]);
        assert!(least < most, "{least} bytes, {most} where iterations are kept");

        // There is room at first, and then for a step that runs them again alone.
        let between = least + (most - least) / 2;
        let mut refused = begun(Recompute::Auto);
        step(&mut refused, 0).unwrap();
        let told = choose(&mut refused, 1 << 40);
        assert!(!told.recompute && refused.2.rerun() == Rerun::Never, "{told:?}");
        refused.0.limit_memory(between);
        step(&mut refused, 1).unwrap();
        let told = refused.2.reports().pop().expect("memory was refused");
        assert!(told.recompute && told.step == 2 && told.available.is_none(), "{told:?}");
        assert!(told.why.contains("sample 1: out of device memory"), "{told:?}");
        assert!(bits(&refused.1) == expected, "a step that was done again has other bits");

        // Who asked for it is told.
        kept.0.limit_memory(between);
        let error = step(&mut kept, 2).unwrap_err();
        assert!(error.contains("out of device memory") && error.contains("--recompute"), "{error}");
    }

    /// If gradients overflow their 16 bits, a step changes nothing but the loss scale; and the
    /// gradients that two items give a stage's weights go back to the weights from which those were
    /// composed.
    #[test]
    fn a_step_that_overflowed_leaves_nothing_behind() {
        let cuda = Cuda::emulated(Cpu::new(2).unwrap(), DType::F16, 0);
        let device = Device::Cuda(cuda);
        let samples = [1, 2].map(|seed| sample(small().patch, seed));
        let take = |state: &mut State, scale: f32| {
            state.progress.scaling = (scale, 0);
            let (peers, buckets) = (Peers::alone(), Buckets::new(&state.progress.config));
            let shared = (&peers, &buckets);
            let (workers, stop) = ([device.clone()], AtomicBool::new(false));
            let mut chosen = Chosen::new(&state.progress.settings);
            let workers = (&workers[..], None, &mut chosen);
            let items = items(state, &samples, 0);
            train_step(&device, workers, shared, state, &items, 0, &stop).unwrap().0
        };
        let (mut state, mut other) = (state(small()), state(small()));
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
