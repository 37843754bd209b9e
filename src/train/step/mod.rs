//! One item's part of a training step: encode once, interact N times, and compute the gradients
//! through all of it.
//!
//! Each iteration has its own tape, whose inputs are the image's features and the previous answer.
//! Where iterations are run again ([`Rerun`]), only one of these tapes exists at a time: the
//! forward pass keeps only the answers, and in the backward pass an iteration is run again to
//! record it. The encoder and the skip convolutions are on a tape that lasts the whole step; their
//! gradient is the sum over the iterations, in float32 whatever the type of the maps.
//!
//! On a CUDA device the same work can be recorded and replayed: `recorded.rs`.

mod recorded;
mod wide;

pub use recorded::{Prompt, Recorder};

use super::exchange::Exchange;
use crate::autograd::{ParamGrads, Tape, Var};
use crate::device::Device;
use crate::device::cuda::Memory;
use crate::model::{Answer, Features, Model, Observer, PatchPrompts, prompt_maps};
use crate::ops::loss::{
    self, Emphasis, MaskSums, Target, TargetSize, Terms, mask_sums, mask_sums_gradient,
    score_gradient,
};
use crate::ops::optimizer::Norm;
use crate::tensor::{OpError, Tensor};
use std::sync::Arc;
use wide::{add_wide, as_map};

/// The weights of the parts of an iteration's loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossWeights {
    /// Weight of the candidates' boundary loss: 10 in the paper.
    pub boundary: f64,
    /// Weight of the refined answer's boundary loss: 10 in the paper, 0 in the released code.
    pub corrective_boundary: f64,
}

impl Default for LossWeights {
    fn default() -> LossWeights {
        LossWeights { boundary: 10.0, corrective_boundary: 10.0 }
    }
}

/// Whether iterations are run again in the backward pass instead of being kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rerun {
    /// Iterations are kept, with all that their backward passes read.
    Never,
    /// Iterations are run again. Their answers are computed by the ops of a tape, as those of kept
    /// iterations are: all results have the same bits as with [`Rerun::Never`].
    Exact,
    /// Iterations are run again. Their answers are computed by the ops of a session: on a GPU these
    /// are fewer, and the last bits are others.
    Fast,
}

impl From<bool> for Rerun {
    fn from(recompute: bool) -> Rerun {
        if recompute { Rerun::Fast } else { Rerun::Never }
    }
}

/// How an item takes part in a training step.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// The weights of the parts of the loss.
    pub weights: LossWeights,
    /// The most iterations: fewer if nothing is left to correct.
    pub iterations: usize,
    /// The number of items of the batch, which means over the batch are divided by.
    pub batch: usize,
    /// Whether iterations are run again in the backward pass instead of being kept.
    pub recompute: Rerun,
    /// The loss scale: gradients are multiplied by it, so that they are not lost in 16 bits, and
    /// [`AdamW::step`](crate::ops::optimizer::AdamW::step) divides by it. 1 for none.
    pub scale: f32,
}

impl Share {
    /// Whether iteration `t` is run again in the backward pass. The last is the first there: it is
    /// kept.
    fn reruns(&self, t: usize) -> bool {
        self.recompute != Rerun::Never && t + 1 < self.iterations
    }
}

/// An item's part of the loss in one iteration, before the mean over iterations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct IterationLoss {
    /// The loss of the candidate masks and of their scores.
    pub confidence: f64,
    /// The loss of the refined answer; 0 without a refiner.
    pub corrective: f64,
    /// The Dice of the answer's probabilities and the label.
    pub dice: f64,
}

/// The loss of an item, as [`run_item`] returns it.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The item's part of the batch's loss: the mean over its iterations.
    pub loss: f64,
    /// The parts of each iteration.
    pub iterations: Vec<IterationLoss>,
}

/// A user's prompts in an iteration, and how they are passed to the network.
///
/// Made from [`PatchPrompts`] alone, it is a round as in the paper.
#[derive(Clone, Debug, Default)]
pub struct Round {
    /// The prompts that the prompt encoder is given.
    pub prompts: PatchPrompts,
    /// The points of the refiner's maps; if absent, all points of this iteration and those before
    /// it.
    pub marks: Option<Vec<([i32; 3], bool)>>,
    /// The dense prompt's logits, if it is not the unchanged previous answer. Gradients pass to
    /// that answer in any case.
    pub dense: Option<Vec<f32>>,
    /// An additional cross entropy near clicks in the iteration's loss.
    pub emphasis: Option<Emphasis>,
}

impl From<PatchPrompts> for Round {
    fn from(prompts: PatchPrompts) -> Round {
        Round { prompts, ..Default::default() }
    }
}

/// An iteration on its own tape.
struct Recorded<'m> {
    tape: Tape<'m>,
    inputs: Features,
    dense: Var,
    answer: Answer,
}

struct Pass<'a, 'm> {
    device: &'a Device,
    model: &'m Model,
    features: Features,
    rounds: Vec<Round>,
    /// The dense prompt of each iteration.
    dense: Vec<Tensor>,
}

/// What the backward pass through the iterations has gathered so far.
#[derive(Default)]
struct Gathered {
    /// From the last iteration to the first.
    unread: Vec<Unread>,
    /// The sums of the features' gradients.
    features: [Option<Tensor>; 5],
    /// The gradient of an iteration's answer by the next iteration's dense prompt.
    answer: Option<Tensor>,
}

impl<'m> Pass<'_, 'm> {
    /// Asks for the round of iteration `t`, given the answer of the one before; false if there is
    /// nothing to correct.
    fn ask(
        &mut self,
        t: usize,
        previous: &mut Option<Tensor>,
        prompt: &mut impl FnMut(usize, Option<&Tensor>) -> Result<Option<Round>, OpError>,
    ) -> Result<bool, OpError> {
        let Some(mut round) = prompt(t, previous.as_ref())? else { return Ok(false) };
        let s = self.model.config().patch;
        let given = round.dense.take().map(|d| Tensor::new([1, s, s, s, 1], d));
        let before = given.or(previous.take());
        self.rounds.push(round);
        self.dense.push(match before {
            Some(before) => before,
            None => zeros(self.device, [1, s, s, s, 1])?,
        });
        Ok(true)
    }

    /// The loss of iteration `t` of `done`, and the backward pass through it.
    fn back(
        &self,
        t: usize,
        Recorded { tape, inputs, dense, answer }: Recorded<'m>,
        (target, share, done): (&Target, Share, usize),
        gathered: &mut Gathered,
        grads: &mut ParamGrads,
    ) -> Result<(), OpError> {
        let given = (target, self.rounds[t].emphasis.as_ref());
        let (lost, seeds) = losses(self.device, Answered::of(&answer), given, share, done)?;
        gathered.unread.push(lost);
        let Seeds { masks, scores, logits } = seeds;
        let mut wanted =
            vec![(&answer.candidates.masks, masks), (&answer.candidates.scores, scores)];
        let of_logits = logits.into_iter().chain(gathered.answer.take());
        wanted.extend(of_logits.map(|g| (&answer.logits, g)));
        let mut leaves = tape.backward_unsettled(wanted, grads)?;
        gathered.answer = leaves.take(&dense);
        for (sum, leaf) in gathered.features.iter_mut().zip(inputs.vars()) {
            if let Some(gradient) = leaves.take(leaf) {
                add_wide(self.device, sum, gradient)?;
            }
        }
        Ok(())
    }

    /// The refiner's maps of iteration `t`.
    fn history(&self, t: usize) -> Result<Tensor, OpError> {
        let edge = self.model.config().patch;
        match &self.rounds[t].marks {
            Some(marks) => prompt_maps(self.device, edge, marks),
            None => prompt_maps(
                self.device,
                edge,
                self.rounds[..=t].iter().flat_map(|r| &r.prompts.points),
            ),
        }
        .on(self.device)
    }

    fn record(&self, t: usize) -> Result<Recorded<'m>, OpError> {
        let tape = Tape::on(self.device);
        let inputs = self.features.leaves(&tape);
        let dense = if t == 0 {
            Var::constant(self.dense[0].clone())
        } else {
            tape.leaf(self.dense[t].clone())
        };
        let answer = self.model.interact_from(
            &tape,
            &inputs,
            &self.model.tokens(&tape, &self.rounds[t].prompts)?,
            &dense,
            &self.history(t)?,
            &mut Observer::none(),
        )?;
        Ok(Recorded { tape, inputs, dense, answer })
    }

    fn answer(&self, t: usize) -> Result<Tensor, OpError> {
        let off = Tape::off(self.device);
        let dense = Var::constant(self.dense[t].clone());
        let answer = self.model.interact_from(
            &off,
            &self.features,
            &self.model.tokens(&off, &self.rounds[t].prompts)?,
            &dense,
            &self.history(t)?,
            &mut Observer::none(),
        )?;
        Ok(answer.logits.value().clone())
    }
}

/// Runs an item forward and backward, adds its gradients to `grads`, and returns its loss.
///
/// `image` is a normalised patch, `[s, s, s]`, and `target` its label. `prompt(t, answer)` gives
/// the prompts of iteration `t`, from 0, from the logits of the previous answer (none at first); if
/// it gives none, because there is nothing to correct, the item ends. The answer is where it was
/// computed: on a GPU it is copied back when its values are asked for.
///
/// # Errors
/// Shapes do not fit the model, memory is refused or the device fails: see [`crate::ops`].
pub fn run_item(
    device: &Device,
    model: &Model,
    image: &Tensor,
    target: &Target,
    share: Share,
    grads: &mut ParamGrads,
    mut prompt: impl FnMut(usize, Option<&Tensor>) -> Option<PatchPrompts>,
) -> Result<Outcome, OpError> {
    let lost =
        run_item_sharing(device, model, image, target, share, (grads, None), |t, answer| {
            Ok(prompt(t, answer).map(Round::from))
        })?;
    grads.settle(device)?;
    let (mut outcomes, _) = Lost::read(device, &[lost], &[])?;
    Ok(outcomes.pop().unwrap_or_default())
}

/// Runs an item forward and backward as [`run_item`] does, as one of several items of a step, with
/// rounds that contain more than prompts.
///
/// For the last item of a step gradients go to an exchange, if one is given, as they become final.
/// Without one, the gradients of composed weights wait in `grads` for the other items; after the
/// last of them, [`ParamGrads::settle`] must be called. The loss is not read: a GPU may still be at
/// work.
///
/// # Errors
/// Those of [`run_item`], of `prompt`, and of the exchange.
pub fn run_item_sharing(
    device: &Device,
    model: &Model,
    image: &Tensor,
    target: &Target,
    share: Share,
    (grads, exchange): (&mut ParamGrads, Option<&mut Exchange>),
    prompt: impl FnMut(usize, Option<&Tensor>) -> Result<Option<Round>, OpError>,
) -> Result<Lost, OpError> {
    let ends = Ends { settles: exchange.is_some(), exchange };
    run_to_its_end(device, model, image, target, share, (grads, ends), prompt)
}

/// What happens at the end of an item's iterations.
struct Ends<'e, 'x> {
    /// Whether the gradients of the decoder's composed weights, from all iterations of all items,
    /// are taken back through the composition at once: after the last item's.
    settles: bool,
    exchange: Option<&'e mut Exchange<'x>>,
}

fn run_to_its_end(
    device: &Device,
    model: &Model,
    image: &Tensor,
    target: &Target,
    share: Share,
    (grads, mut ends): (&mut ParamGrads, Ends),
    mut prompt: impl FnMut(usize, Option<&Tensor>) -> Result<Option<Round>, OpError>,
) -> Result<Lost, OpError> {
    let encoder = Tape::on(device);
    let features = model.encode_on(&encoder, image, &mut Observer::none())?;
    let mut pass = Pass { device, model, features, rounds: vec![], dense: vec![] };
    let mut kept: Vec<Option<Recorded>> = vec![];
    let mut previous: Option<Tensor> = None;
    let mut tape_bytes = 0;
    for t in 0..share.iterations {
        if !pass.ask(t, &mut previous, &mut prompt)? {
            break;
        }
        let reruns = share.reruns(t);
        if reruns && share.recompute == Rerun::Fast {
            previous = Some(pass.answer(t)?);
            kept.push(None);
        } else {
            let before = in_use(device);
            let recorded = pass.record(t)?;
            tape_bytes = in_use(device).saturating_sub(before);
            previous = Some(recorded.answer.logits.value().clone());
            kept.push((!reruns).then_some(recorded));
        }
    }
    drop(previous);
    let done = kept.len();
    let mut gathered = Gathered::default();
    for (t, kept) in kept.into_iter().enumerate().rev() {
        let recorded = match kept {
            Some(recorded) => recorded,
            None => pass.record(t)?,
        };
        pass.back(t, recorded, (target, share, done), &mut gathered, grads)?;
    }
    let Gathered { mut unread, features, .. } = gathered;
    unread.reverse();
    let seeds = pass.features.vars().into_iter().zip(features);
    let seeds = seeds.filter_map(|(v, g)| Some(as_map(device, g?).map(|g| (v, g))));
    let seeds = seeds.collect::<Result<Vec<_>, _>>()?;
    if ends.settles {
        grads.settle(device)?;
    }
    if let Some(exchange) = &mut ends.exchange {
        exchange.interactions_done(grads)?;
    }
    encoder.backward_watched(seeds, grads, |grads| {
        ends.exchange.as_mut().map_or(Ok(()), |e| e.encoder_reached(grads))
    })?;
    Ok(Lost { iterations: unread, target: target.size(), share, tape_bytes })
}

/// Bytes that a device's values take.
fn in_use(device: &Device) -> u64 {
    match device {
        Device::Cpu(cpu) => cpu.bytes_in_use() as u64,
        Device::Cuda(cuda) => cuda.held()[0],
    }
}

/// Zeros on the device of the maps.
fn zeros(device: &Device, shape: [usize; 5]) -> Result<Tensor, OpError> {
    let count = shape.iter().product();
    match device {
        Device::Cpu(cpu) => Ok(Tensor::from_buffer(shape, cpu.zeros(count))),
        Device::Cuda(cuda) => {
            let memory = cuda.allocate(count, cuda.precision())?;
            cuda.clear(&memory)?;
            Ok(Tensor::from_device(shape, memory, cuda.precision()))
        }
    }
}

/// The values of an answer from which its loss is computed.
#[derive(Clone, Copy)]
struct Answered<'a> {
    masks: &'a Tensor,
    scores: &'a Tensor,
    logits: &'a Tensor,
    refined: bool,
}

impl Answered<'_> {
    fn of(answer: &Answer) -> Answered<'_> {
        let Answer { candidates, logits, refined, .. } = answer;
        let (masks, scores) = (candidates.masks.value(), candidates.scores.value());
        Answered { masks, scores, logits: logits.value(), refined: *refined }
    }
}

/// Where the backward pass of an iteration starts.
struct Seeds {
    masks: Tensor,
    scores: Tensor,
    logits: Option<Tensor>,
}

/// The loss of an item, kept where it was computed until it is read.
pub struct Lost {
    iterations: Vec<Unread>,
    target: TargetSize,
    share: Share,
    tape_bytes: u64,
}

/// The loss of an iteration, kept where it was computed.
struct Unread {
    candidates: MaskSums,
    scores: Tensor,
    answer: MaskSums,
    refined: bool,
    /// The sums near clicks, of the candidates and of the refined answer.
    near: Vec<MaskSums>,
}

impl Unread {
    /// In the order in which they are read.
    fn sums(&self) -> Vec<&MaskSums> {
        [&self.candidates, &self.answer].into_iter().chain(&self.near).collect()
    }
}

impl Lost {
    /// Bytes of the last iteration's tape, as long as that exists: what keeping an iteration takes.
    /// 0 if it was replayed.
    pub fn tape_bytes(&self) -> u64 {
        self.tape_bytes
    }

    /// The losses of items, and the norm of their gradients, all copied from the device at once; it
    /// is waited for.
    pub fn read_with(
        device: &Device,
        list: &[Lost],
        norm: &Norm,
    ) -> Result<(Vec<Outcome>, f64), OpError> {
        let there: Vec<&Arc<Memory>> = norm.square_there().into_iter().collect();
        let (outcomes, squares) = Lost::read(device, list, &there)?;
        let norm = squares.first().map_or_else(|| norm.read(), |square| Ok(square.sqrt()))?;
        Ok((outcomes, norm))
    }

    /// The losses of items, and numbers in a device's memory, all read at once: a device is waited
    /// for.
    fn read(
        device: &Device,
        list: &[Lost],
        numbers: &[&Arc<Memory>],
    ) -> Result<(Vec<Outcome>, Vec<f64>), OpError> {
        let all: Vec<&Unread> = list.iter().flat_map(|lost| &lost.iterations).collect();
        let sums: Vec<&MaskSums> = all.iter().flat_map(|one| one.sums()).collect();
        let scores: Vec<&Tensor> = all.iter().map(|one| &one.scores).collect();
        let read = loss::read(device, &sums, &scores, numbers)?;
        let (mut sums, mut scores) = (read.sums.into_iter(), read.scores.into_iter());
        let mut outcomes = vec![];
        for lost in list {
            let (n, mut iterations) = (lost.iterations.len(), vec![]);
            for one in &lost.iterations {
                let sums: Vec<_> = sums.by_ref().take(2 + one.near.len()).collect();
                iterations.push(lost.iteration(one, &sums, &scores.next().unwrap_or_default()));
            }
            let loss = iterations.iter().map(|l| l.confidence + l.corrective).sum::<f64>();
            outcomes.push(Outcome { loss: loss / n.max(1) as f64, iterations });
        }
        Ok((outcomes, read.numbers))
    }

    /// The loss of an iteration, from the values of its sums and of its scores.
    fn iteration(&self, one: &Unread, sums: &[Vec<[f64; 5]>], scores: &[f32]) -> IterationLoss {
        let (share, n) = (self.share, self.iterations.len());
        let near = |at: usize| {
            let masks = sums.get(2 + at).map(Vec::as_slice).unwrap_or_default();
            masks.iter().map(|sums| sums[0]).sum::<f64>() / share.batch as f64
        };
        let weights = terms(share, n, share.weights.boundary);
        let mut confidence = near(0);
        for (sums, score) in sums[0].iter().zip(scores) {
            let loss = self.target.loss(*sums);
            // The squares are summed over the batch, not averaged.
            let off = *score as f64 - loss.dice;
            confidence += loss.total(weights) * n as f64 + off * off;
        }
        // There is one answer.
        let answer = self.target.loss(sums[1][0]);
        let weights = terms(share, n, share.weights.corrective_boundary);
        // Without a refiner the answer is the chosen candidate, whose loss is already counted.
        let corrective = if one.refined { answer.total(weights) * n as f64 + near(1) } else { 0.0 };
        IterationLoss { confidence, corrective, dice: answer.dice }
    }
}

/// The weight of each term, divided by the batch and by the number of iterations.
fn terms(share: Share, iterations: usize, boundary: f64) -> Terms {
    let parts = share.batch as f64 * iterations as f64;
    Terms { region: 1.0 / parts, boundary: boundary / parts }
}

/// An iteration's losses and the gradients of their inputs, divided by the batch and by the number
/// of iterations.
fn losses(
    device: &Device,
    answered: Answered,
    (target, emphasis): (&Target, Option<&Emphasis>),
    share: Share,
    iterations: usize,
) -> Result<(Unread, Seeds), OpError> {
    let (batch, n) = (share.batch as f64, iterations as f64);
    let Answered { masks: candidates, scores: chances, logits: answer, refined } = answered;
    let weights = terms(share, iterations, share.weights.boundary);
    let mut near = vec![];
    let mut emphasised = |logits: &Tensor, gradient: Tensor| -> Result<Tensor, OpError> {
        let Some(emphasis) = emphasis else { return Ok(gradient) };
        let factor = share.scale / (batch * n) as f32;
        let (sums, gradient) = loss::emphasis(device, logits, target, emphasis, factor, gradient)?;
        near.push(sums);
        Ok(gradient)
    };
    // A loss scale is a power of two: exact.
    let (of_candidates, masks) =
        mask_sums_gradient(device, candidates, target, weights, share.scale)?;
    let masks = emphasised(candidates, masks)?;
    let scores = score_gradient(device, &of_candidates, chances, target, n, share.scale)?;
    let (of_answer, logits) = if refined {
        let weights = terms(share, iterations, share.weights.corrective_boundary);
        let (sums, gradient) = mask_sums_gradient(device, answer, target, weights, share.scale)?;
        (sums, Some(emphasised(answer, gradient)?))
    } else {
        (mask_sums(device, answer, target)?, None)
    };
    let unread = Unread {
        candidates: of_candidates,
        scores: chances.clone(),
        answer: of_answer,
        refined,
        near,
    };
    Ok((unread, Seeds { masks, scores, logits }))
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::device::{Cpu, Cuda, DType};
    use crate::model::{Config, Weights};
    use crate::ops::loss::KERNEL;
    use crate::ops::optimizer::upload_parameters;

    /// The gradients of an iteration's features and parameters, of results with some gradient.
    fn gradients(
        Recorded { tape, inputs, answer, .. }: Recorded,
        count: usize,
    ) -> Vec<Option<Vec<f32>>> {
        let seed = |var: &Var| {
            let values = (0..var.len()).map(|i| ((i * 7919) % 97) as f32 / 96.0 - 0.5);
            Tensor::new(var.shape(), values.collect())
        };
        let vars = [&answer.candidates.masks, &answer.candidates.scores, &answer.logits];
        let mut grads = ParamGrads::new(count);
        let seeds = vars.into_iter().map(|var| (var, seed(var))).collect();
        let mut leaves = tape.backward(seeds, &mut grads).unwrap();
        let of_features = inputs.vars().map(|var| Some(leaves.take(var)?.data().to_vec()));
        let of_params = (0..count).map(|id| Some(grads.get(id)?.to_vec()));
        of_features.into_iter().chain(of_params).collect()
    }

    /// An iteration whose tokens are padded has the gradients of one with its tokens alone, and
    /// gives them to the same parameters.
    #[test]
    fn padded_tokens_leave_the_gradients_as_they_are() {
        let device = Device::Cuda(Cuda::emulated(Cpu::new(2).unwrap(), DType::F32, 0));
        let config = Config { patch: 16, ..Config::tiny() };
        let (s, count) = (config.patch, config.tensors().len());
        let mut weights = Weights::hashed(config, "padding");
        upload_parameters(&device, &mut weights.tensors_mut()).unwrap();
        let model = Model::new(&device, &weights).unwrap();
        let image = (0..s.pow(3)).map(|i| ((i * 7919) % 997) as f32 / 500.0 - 1.0).collect();
        let (image, off) = (Tensor::new([s; 3], image), Tape::off(&device));
        let features = model.encode_on(&off, &image, &mut Observer::none()).unwrap();
        let (device, model) = (&device, &model);
        // With a box no parameter says that there is none.
        for bounds in [None, Some([1.0, 2.0, 3.0, 9.0, 12.0, 14.0])] {
            let points = vec![([5, 6, 7], true), ([2, 2, 14], false)];
            let prompts = PatchPrompts { points, bounds };
            let features = features.leaves(&off);
            let mut pass = Pass { device, model, features, rounds: vec![], dense: vec![] };
            let mut prompt = |_: usize, _: Option<&Tensor>| -> Result<Option<Round>, OpError> {
                Ok(Some(prompts.clone().into()))
            };
            assert!(pass.ask(0, &mut None, &mut prompt).unwrap());
            assert_eq!(model.tokens(&off, &prompts).unwrap().rows.rows(), 16);
            let padded = gradients(pass.record(0).unwrap(), count);

            let tape = Tape::on(device);
            let (inputs, history) = (pass.features.leaves(&tape), pass.history(0).unwrap());
            let (dense, seen) = (Var::constant(pass.dense[0].clone()), &mut Observer::none());
            let answer = model.interact_on(&tape, &inputs, &prompts, &dense, &history, seen);
            let answer = answer.unwrap();
            let alone = gradients(Recorded { tape, inputs, dense, answer }, count);

            let length = |values: &mut dyn Iterator<Item = f32>| {
                values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
            };
            let longest = alone.iter().flatten().map(|g| length(&mut g.iter().copied()));
            let longest = longest.fold(0.0, f64::max);
            assert!(longest.is_finite() && longest > 0.0);
            assert_eq!(padded.len(), alone.len());
            for (at, (got, want)) in padded.iter().zip(&alone).enumerate() {
                assert_eq!(got.is_some(), want.is_some(), "gradient {at}, {bounds:?}");
                let (Some(got), Some(want)) = (got, want) else { continue };
                assert_eq!(got.len(), want.len());
                let apart = length(&mut got.iter().zip(want).map(|(a, b)| a - b));
                // Some are sums of numbers that cancel out.
                let bound = 1e-5 * length(&mut want.iter().copied()) + 1e-7 * longest;
                assert!(apart <= bound, "gradient {at}, {bounds:?}: {apart}, {bound} allowed");
            }
        }
    }

    /// A patch of `s` voxels a side with its label, and a share of two iterations.
    fn item(device: &Device, s: usize) -> (Tensor, Target, Share) {
        let voxels = 0..s.pow(3);
        let image = voxels.clone().map(|i| ((i * 7919) % 997) as f32 / 500.0 - 1.0).collect();
        let label = voxels.map(|i| f32::from(u8::from(i % s < s / 2))).collect();
        let target = Target::new(device, label, [s; 3], KERNEL).unwrap();
        let share = Share {
            weights: LossWeights::default(),
            iterations: 2,
            batch: 1,
            recompute: Rerun::Never,
            scale: 1024.0,
        };
        (Tensor::new([s; 3], image), target, share)
    }

    /// What losses near clicks copy to a device is the clicks and the weights of some distances,
    /// once in each iteration, op by op and by replay: no map of weights.
    #[test]
    fn losses_near_clicks_copy_clicks_and_no_map() {
        let cuda = Cuda::emulated(Cpu::new(2).unwrap(), DType::F16, 0);
        let device = Device::Cuda(cuda.clone());
        let config = Config { patch: 16, ..Config::tiny() };
        let (s, count) = (config.patch, config.tensors().len());
        let mut weights = Weights::hashed(config, "clicks");
        upload_parameters(&device, &mut weights.tensors_mut()).unwrap();
        let model = Model::new(&device, &weights).unwrap();
        let (image, target, share) = item(&device, s);
        let points = vec![([5, 6, 7], true), ([2, 2, 14], false)];
        let run = |near: bool, recorder: Option<&mut Recorder>| {
            let before = (<[u64; 2]>::from(cuda.transfers())[0], cuda.carried()[0]);
            let mut round = |_: usize, _: Option<&Tensor>| -> Result<Option<Round>, OpError> {
                let places: Vec<[i32; 3]> = points.iter().map(|(p, _)| *p).collect();
                let emphasis = Emphasis::new(&places, [s; 3], 3.0, 0.5)?;
                let prompts = PatchPrompts { points: points.clone(), bounds: None };
                Ok(Some(Round { emphasis: near.then_some(emphasis), ..prompts.into() }))
            };
            let lost = match recorder {
                None => {
                    let given = (&mut ParamGrads::new(count), None);
                    run_item_sharing(&device, &model, &image, &target, share, given, round)
                }
                Some(recorder) => {
                    let given = (&mut recorder.begin(&weights).unwrap(), true);
                    recorder.item(&image, &target, share, given, &mut round)
                }
            };
            let (outcomes, _) = Lost::read(&device, &[lost.unwrap()], &[]).unwrap();
            let after = (<[u64; 2]>::from(cuda.transfers())[0], cuda.carried()[0]);
            (after.0 - before.0, after.1 - before.1, outcomes[0].loss)
        };
        for replays in [false, true] {
            let mut recorder = replays.then(|| Recorder::new(&cuda));
            let mut run = |near: bool| run(near, recorder.as_mut());
            // The image, and what else stays; what is replayed is recorded.
            for _ in 0..3 {
                run(true);
            }
            let ((plain, bytes, loss), (more, more_bytes, larger)) = (run(false), run(true));
            assert!(larger > loss, "{larger}, {loss} without clicks");
            assert_eq!(more - plain, share.iterations as u64);
            // Three coordinates of each click, and squared distances of 0 to 81.
            let each = 4 * (3 * points.len() as u64 + 82);
            assert_eq!(more_bytes - bytes, share.iterations as u64 * each);
            if let Some(recorder) = &recorder {
                let [encoder, taped, _] = recorder.recorded();
                // The first and the second iteration.
                assert_eq!((encoder, taped), (1, 2));
            }
        }
    }

    /// The features' gradients of two iterations in 16 bits are added up in float32, to the last
    /// bit.
    #[test]
    fn gradients_of_features_are_added_up_in_float32() {
        let device = Device::Cuda(Cuda::emulated(Cpu::new(2).unwrap(), DType::F16, 0));
        let config = Config { patch: 16, ..Config::tiny() };
        let (s, count) = (config.patch, config.tensors().len());
        let model = Model::new(&device, &Weights::hashed(config, "sums")).unwrap();
        let (image, target, share) = item(&device, s);
        let off = Tape::off(&device);
        let features = model.encode_on(&off, &image, &mut Observer::none()).unwrap();
        let (device, model) = (&device, &model);
        let mut pass = Pass { device, model, features, rounds: vec![], dense: vec![] };
        let mut prompt = |_: usize, _: Option<&Tensor>| -> Result<Option<Round>, OpError> {
            let points = vec![([5, 6, 7], true), ([2, 2, 14], false)];
            Ok(Some(PatchPrompts { points, bounds: None }.into()))
        };
        let mut previous = None;
        for t in 0..share.iterations {
            assert!(pass.ask(t, &mut previous, &mut prompt).unwrap());
            previous = Some(pass.answer(t).unwrap());
        }
        let back = |t: usize, gathered: &mut Gathered| {
            let (recorded, mut grads) = (pass.record(t).unwrap(), ParamGrads::new(count));
            let given = (&target, share, share.iterations);
            pass.back(t, recorded, given, gathered, &mut grads).unwrap();
        };
        let values = |gathered: &Gathered| -> Vec<Vec<f32>> {
            let sums = gathered.features.iter();
            sums.map(|sum| sum.as_ref().expect("a gradient").data().to_vec()).collect()
        };
        let mut both = Gathered::default();
        back(1, &mut both);
        let last = values(&both);
        // The first iteration by itself: its answer has a gradient from the last one.
        let mut first = Gathered { answer: both.answer.clone(), ..Gathered::default() };
        back(0, &mut first);
        back(0, &mut both);
        let mut rounded = 0;
        for ((sum, a), b) in values(&both).iter().zip(&last).zip(&values(&first)) {
            let expected: Vec<f32> = a.iter().zip(b).map(|(a, b)| a + b).collect();
            assert!(expected.iter().all(|v| v.is_finite()) && expected.iter().any(|v| *v != 0.0));
            assert!(*sum == expected, "a sum is another");
            let fits = |v: &f32| half::f16::from_f32(*v).to_f32() == *v;
            rounded += expected.iter().filter(|v| !fits(v)).count();
        }
        assert!(rounded > 0, "all sums have 16 bits");
    }
}
