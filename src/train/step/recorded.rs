//! Items of training steps by replay, on a CUDA device.
//!
//! Recorded are: encoding on a tape with its backward pass; an iteration on a tape with its
//! backward pass, for a number of tokens; an iteration without a tape, for one. The first two are
//! cut in two: what the backward pass starts from is written between the halves. Losses, prompts,
//! the rows of the tokens and their gradient, and the optimiser are launched op by op: they depend
//! on numbers that change from item to item.
//!
//! Tokens are padded, op by op as well ([`Model::tokens`]): a few recordings serve prompts of any
//! number of points. How many tokens there are is read on the device. Padding changes no gradient:
//! as keys, tokens of padding have a probability of 0; as queries they have results that nothing
//! reads, so the gradients of these are zeros, and finite numbers times zeros add nothing to the
//! gradients of weights.
//!
//! A recording holds addresses, so everything that it reads and writes stays where it is for the
//! whole run. Parameters do, as long as the optimiser changes them in place; what was laid out from
//! them is laid out again, in the same memory, at the beginning of each step ([`Layouts`]);
//! gradients of parameters are added up in a [`GradMemory`]; the encoder has an arena of its own,
//! all iterations share another. All results are those of the same ops launched one by one, to the
//! last bit.
//!
//! An iteration's forward pass is always repeated before its backward pass, because other
//! iterations use its memory in between; it is recorded when its padded number of tokens comes for
//! the second time. Whatever is not recorded is done op by op.

use super::{
    Answered, Ends, Gathered, Lost, Pass, Recorded, Rerun, Round, Seeds, Share, losses,
    run_to_its_end, wide::add_wide,
};
use crate::autograd::{GradMemory, ParamGrads, Reached, Tape, Var, add_to};
use crate::device::cuda::{Arena, Graph, Layouts, Memory};
use crate::device::{Cuda, CudaError, DType, Device};
use crate::model::{
    Features, GAUSSIAN, Model, Observer, Tokens, Weights, assign, duplicate, fixed,
};
use crate::ops::loss::Target;
use crate::tensor::{OpError, Tensor, upload_to};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

const OP: &str = "recorded training";
/// The most iterations that are recorded, by what distinguishes them: others are done op by op.
const MOST: usize = 128;
/// How often an iteration is done op by op before it is recorded.
const BEFORE: u32 = 1;

/// Asks a user for the round of an iteration, given the answer of the one before.
pub type Prompt<'p> = &'p mut dyn FnMut(usize, Option<&Tensor>) -> Result<Option<Round>, OpError>;

fn argument(message: impl Into<String>) -> OpError {
    OpError::Argument { op: OP, message: message.into() }
}

/// Does the items of training steps on a CUDA device by replay: the first step op by op, and from
/// then on what has been recorded.
pub struct Recorder {
    cuda: Cuda,
    kept: Option<Kept>,
}

impl Recorder {
    /// A recorder for a device on which training steps are to be recorded: a GPU, if
    /// `PRISM_CUDA_TRAIN_GRAPHS` is on.
    pub fn wanted(device: &Device) -> Option<Recorder> {
        match device {
            Device::Cuda(cuda) if cuda.records_training() => Some(Recorder::new(cuda)),
            _ => None,
        }
    }

    /// A recorder that has recorded nothing yet.
    pub fn new(cuda: &Cuda) -> Recorder {
        Recorder { cuda: cuda.clone(), kept: None }
    }

    /// Begins a step with these weights, and returns the sums to which its items are to add their
    /// gradients. If the weights are not where they were in the step before, everything is recorded
    /// anew.
    ///
    /// # Errors
    /// The home of a weight is not the device (see
    /// [`upload_parameters`](crate::ops::optimizer::upload_parameters)), or the device fails.
    pub fn begin(&mut self, weights: &Weights) -> Result<ParamGrads, OpError> {
        let names: Vec<String> = weights.config.tensors().into_iter().map(|(n, _)| n).collect();
        let mut addresses = vec![];
        for name in &names {
            let value = weights.get(name);
            if !value.is_f32_on(&self.cuda) {
                return Err(argument(format!("the home of {name} is not the device")));
            }
            addresses.push(value.to_device(&self.cuda, DType::F32)?.address());
        }
        if self.kept.as_ref().is_none_or(|kept| kept.addresses != addresses) {
            // What it holds is freed first.
            self.kept = None;
            self.kept = Some(Kept::new(&self.cuda, weights, addresses)?);
        } else if let Some(kept) = &mut self.kept {
            kept.renew(&self.cuda)?;
        }
        let memory = self.kept.as_ref().and_then(|kept| kept.memory.as_ref());
        Ok(memory.map_or_else(|| ParamGrads::noting(names.len()), ParamGrads::within))
    }

    /// Runs an item of the step that was begun forward and backward, and adds its gradients to
    /// `grads`, the step's. After the `last` item they are complete.
    ///
    /// # Errors
    /// Those of [`run_item_sharing`](super::run_item_sharing); no step was begun.
    pub fn item(
        &mut self,
        image: &Tensor,
        target: &Target,
        share: Share,
        (grads, last): (&mut ParamGrads, bool),
        prompt: Prompt,
    ) -> Result<Lost, OpError> {
        let begun = self.kept.take();
        let Some(mut kept) = begun else { return Err(argument("no step was begun")) };
        let mut layouts = std::mem::take(&mut kept.layouts);
        let cuda = &self.cuda;
        let lost = cuda.noting(&mut layouts, || {
            kept.item(cuda, image, target, share, (grads, last), prompt)
        })?;
        kept.layouts = layouts;
        // After a failure nothing of it is used again.
        self.kept = Some(kept);
        Ok(lost)
    }

    /// How many recordings were made: of encoding, of iterations with and without their backward
    /// pass.
    pub fn recorded(&self) -> [usize; 3] {
        let Some(kept) = &self.kept else { return [0; 3] };
        let [taped, answers] = kept.iterations.made;
        [usize::from(kept.encoder.is_some()), taped, answers]
    }

    /// How many kinds of iterations there were that a recording each would serve, with and without
    /// their backward pass.
    #[cfg(all(test, feature = "emulator"))]
    pub(in crate::train) fn kinds(&self) -> [usize; 2] {
        let Some(kept) = &self.kept else { return [0; 2] };
        [kept.iterations.taped.len(), kept.iterations.answers.len()]
    }
}

/// What stays from step to step.
struct Kept {
    device: Device,
    /// The parameters that are trained, in the memory in which the optimiser changes them.
    views: Vec<Tensor>,
    addresses: Vec<u64>,
    layouts: Layouts,
    /// A model of the views.
    model: Model,
    /// Where gradients are added up, known from the first item on.
    memory: Option<Arc<GradMemory>>,
    arena: Arena,
    encoder: Option<Encoder>,
    iterations: Iterations,
    /// Whether nothing more is recorded: there was too little memory, or encoding cannot be.
    refused: bool,
}

impl Kept {
    fn new(cuda: &Cuda, weights: &Weights, addresses: Vec<u64>) -> Result<Kept, OpError> {
        let (device, config) = (Device::Cuda(cuda.clone()), weights.config.clone());
        let (mut views, mut named) = (vec![], vec![]);
        for (name, shape) in config.tensors() {
            let view = Tensor::persistent(shape, weights.get(&name).to_device(cuda, DType::F32)?);
            if name == GAUSSIAN {
                // It does not change, and positions are computed from it on the host.
                view.try_data()?;
            } else {
                views.push(view.clone());
            }
            named.push((name, view));
        }
        let named = named.into_iter().collect();
        let weights = Weights::from_tensors(config, named).map_err(|e| argument(e.to_string()))?;
        let mut layouts = Layouts::default();
        let model =
            cuda.noting(&mut layouts, || cuda.laying_out(|| Model::new(&device, &weights)))?;
        Ok(Kept {
            device,
            views,
            addresses,
            layouts,
            model,
            memory: None,
            arena: Arena::default(),
            encoder: None,
            iterations: Iterations::default(),
            refused: false,
        })
    }

    /// Lays everything out again from what the parameters have become, and forgets gradients.
    fn renew(&mut self, cuda: &Cuda) -> Result<(), OpError> {
        if self.views.iter().any(Tensor::was_read) || !self.layouts.can_repeat() {
            return Err(argument("something was made on the host from weights that change"));
        }
        cuda.lay_out_again(&mut self.layouts)?;
        self.memory.as_ref().map_or(Ok(()), |memory| memory.clear())
    }

    fn item(
        &mut self,
        cuda: &Cuda,
        image: &Tensor,
        target: &Target,
        share: Share,
        (grads, last): (&mut ParamGrads, bool),
        prompt: Prompt,
    ) -> Result<Lost, OpError> {
        let memory = self.memory.clone().filter(|memory| grads.is_within(memory));
        if let Some(memory) = &memory {
            self.record_encoder(cuda, memory)?;
        }
        if let (Some(memory), Some(encoder)) = (&memory, &self.encoder) {
            let (model, device) = (&self.model, &self.device);
            let replay =
                Replay { cuda, device, model, memory, encoder, refused: &mut self.refused };
            let given = (target, share);
            return replay.item(&mut self.iterations, image, given, (grads, last), prompt);
        }
        let ends = Ends { settles: last, exchange: None };
        let (device, model) = (&self.device, &self.model);
        let all = (&mut *grads, ends);
        let lost = run_to_its_end(device, model, image, target, share, all, prompt)?;
        if self.memory.is_none() && !self.refused && !lost.iterations.is_empty() {
            self.memory = tried(GradMemory::like(cuda, grads), &mut self.refused)?.map(Arc::new);
        }
        Ok(lost)
    }

    /// Records encoding, if it is not recorded and can be.
    fn record_encoder(&mut self, cuda: &Cuda, memory: &Arc<GradMemory>) -> Result<(), OpError> {
        if self.encoder.is_none() && !self.refused {
            let (device, model) = (&self.device, &self.model);
            let made = Encoder::record(cuda, &mut self.arena, device, model, memory);
            self.encoder = tried(made, &mut self.refused)?;
            // The iterations start from its results.
            self.refused |= self.encoder.is_none();
        }
        Ok(())
    }
}

/// What was made; none if the device has too little memory for it, after which nothing more is to
/// be made, or if it cannot be recorded. Nothing has been computed then.
///
/// # Errors
/// Any other failure.
fn tried<T>(made: Result<T, OpError>, refused: &mut bool) -> Result<Option<T>, OpError> {
    match made {
        Ok(made) => Ok(Some(made)),
        Err(OpError::Cuda(CudaError::Memory { .. })) => {
            *refused = true;
            Ok(None)
        }
        Err(OpError::Cuda(CudaError::Launch(_)) | OpError::Argument { .. }) => Ok(None),
        Err(other) => Err(other),
    }
}

/// The two halves of recorded work that was cut once.
fn halves(graphs: Vec<Graph>) -> Result<[Graph; 2], OpError> {
    <[Graph; 2]>::try_from(graphs).map_err(|_| argument("the work was not cut in two"))
}

/// Memory for values like these.
fn like<const N: usize>(cuda: &Cuda, values: [&Tensor; N]) -> Result<[Tensor; N], OpError> {
    let made = values.into_iter().map(|value| fixed(cuda, value.shape()));
    let made = made.collect::<Result<Vec<_>, _>>()?;
    Ok(std::array::from_fn(|at| made[at].clone()))
}

/// An error unless values are on the device, in the type of its maps.
fn check_maps<'t>(
    cuda: &Cuda,
    values: impl IntoIterator<Item = &'t Tensor>,
) -> Result<(), OpError> {
    let own = Some(cuda.precision());
    match values.into_iter().all(|value| value.device_type() == own) {
        true => Ok(()),
        false => Err(argument("a result is not a map of the device")),
    }
}

/// The values that a replay left in a recording's result: read anew, if they are read on the host.
fn anew(cuda: &Cuda, value: &Tensor) -> Result<Tensor, OpError> {
    let dtype = cuda.precision();
    Ok(Tensor::from_device(value.shape(), value.to_device(cuda, dtype)?, dtype))
}

/// Encoding on a tape, recorded with its backward pass.
struct Encoder {
    forward: Graph,
    back: Graph,
    image: Tensor,
    features: Features,
    /// The gradients of the features, from which the backward pass starts.
    seeds: [Tensor; 5],
    reached: Reached,
}

impl Encoder {
    fn record(
        cuda: &Cuda,
        arena: &mut Arena,
        device: &Device,
        model: &Model,
        memory: &Arc<GradMemory>,
    ) -> Result<Encoder, OpError> {
        let s = model.config().patch;
        let image = fixed(cuda, &[1, s, s, s, 1])?;
        let work = || -> Result<_, OpError> {
            let tape = Tape::on(device);
            let features = model.encode_on(&tape, &image, &mut Observer::none())?;
            let seeds = like(cuda, features.vars().map(Var::value))?;
            cuda.cut()?;
            let mut grads = ParamGrads::within(memory);
            let wanted = features.vars().into_iter().zip(seeds.iter().cloned()).collect();
            tape.backward_unsettled(wanted, &mut grads)?;
            Ok((features, seeds, grads))
        };
        let (graphs, made) = cuda.record_parts(arena, work, |_| Ok(vec![]))?;
        let (features, seeds, grads) = made;
        check_maps(cuda, features.vars().map(Var::value))?;
        let features = features.leaves(&Tape::off(device));
        let ([forward, back], reached) = (halves(graphs)?, grads.reached()?);
        Ok(Encoder { forward, back, image, features, seeds, reached })
    }
}

/// What a recorded iteration reads besides the features.
struct Inputs {
    tokens: Tensor,
    /// How many of them are no padding.
    valid: Arc<Memory>,
    dense: Tensor,
    history: Tensor,
}

impl Inputs {
    fn new(cuda: &Cuda, model: &Model, tokens: [usize; 2]) -> Result<Inputs, OpError> {
        let s = model.config().patch;
        Ok(Inputs {
            tokens: fixed(cuda, &tokens)?,
            valid: cuda.allocate_bytes(size_of::<u32>())?,
            dense: fixed(cuda, &[1, s, s, s, 1])?,
            history: fixed(cuda, &[1, s, s, s, 2])?,
        })
    }

    /// These tokens as inputs of a tape that is being recorded, given its `rows`.
    fn first(&self, rows: impl FnOnce(Tensor) -> Var) -> Tokens {
        Tokens { rows: rows(self.tokens.clone()), valid: Some(self.valid.clone()) }
    }

    fn fill(&self, cuda: &Cuda, pass: &Pass, t: usize, tokens: &Tokens) -> Result<(), OpError> {
        assign(cuda, &self.tokens, &tokens.rows)?;
        let valid = tokens.valid.as_ref();
        let valid = valid.ok_or_else(|| argument("the number of tokens is not on the device"))?;
        cuda.copy(valid, 0, &self.valid, 0, self.valid.bytes())?;
        assign(cuda, &self.dense, &pass.dense[t])?;
        Ok(assign(cuda, &self.history, &pass.history(t)?)?)
    }
}

/// What distinguishes recorded iterations on a tape: rows, with those of padding, and columns of
/// the tokens, and whether it is the first iteration, whose dense prompt has no gradient.
type Key = ([usize; 2], bool);

/// An iteration on a tape, recorded with its backward pass.
struct Taped {
    forward: Graph,
    back: Graph,
    inputs: Inputs,
    /// The logits of the candidates, their scores, the logits of the answer.
    results: [Tensor; 3],
    /// The gradients of the results, from which the backward pass starts.
    seeds: [Tensor; 3],
    /// The gradients of the features, of the tokens and of the dense prompt.
    of_features: [Tensor; 5],
    of_tokens: Tensor,
    of_dense: Option<Tensor>,
    reached: Reached,
}

impl Taped {
    fn record(replay: &Replay, arena: &mut Arena, pass: &Pass, key: Key) -> Result<Taped, OpError> {
        let Replay { cuda, device, model, memory, .. } = *replay;
        let work = || -> Result<_, OpError> {
            let tape = Tape::on(device);
            let features = pass.features.leaves(&tape);
            let inputs = Inputs::new(cuda, model, key.0)?;
            let first = inputs.first(|rows| tape.leaf(rows));
            let dense = match key.1 {
                true => Var::constant(inputs.dense.clone()),
                false => tape.leaf(inputs.dense.clone()),
            };
            let (history, observer) = (&inputs.history, &mut Observer::none());
            let answer =
                model.interact_from(&tape, &features, &first, &dense, history, observer)?;
            if !answer.refined {
                return Err(argument("without a refiner the host chooses the answer"));
            }
            let vars = [&answer.candidates.masks, &answer.candidates.scores, &answer.logits];
            let results = vars.map(|var| var.value().clone());
            let seeds = like(cuda, results.each_ref())?;
            cuda.cut()?;
            let mut grads = ParamGrads::within(memory);
            let wanted = vars.into_iter().zip(seeds.iter().cloned()).collect();
            let mut leaves = tape.backward_unsettled(wanted, &mut grads)?;
            let of_features = features.vars().map(|leaf| leaves.take(leaf));
            let others = [leaves.take(&first.rows), leaves.take(&dense)];
            Ok((inputs, results, seeds, of_features, others, grads))
        };
        let (graphs, made) = cuda.record_parts(arena, work, |_| Ok(vec![]))?;
        let (inputs, results, seeds, of_features, [of_tokens, of_dense], grads) = made;
        let all = of_features.iter().chain([&of_tokens, &of_dense]).flatten();
        check_maps(cuda, results.iter().chain(all))?;
        let [Some(a), Some(b), Some(c), Some(d), Some(e)] = of_features else {
            return Err(argument("a feature has no gradient"));
        };
        let of_features = [a, b, c, d, e];
        let Some(of_tokens) = of_tokens else { return Err(argument("tokens have no gradient")) };
        if of_dense.is_none() != key.1 {
            return Err(argument("only the first dense prompt has no gradient"));
        }
        let ([forward, back], reached) = (halves(graphs)?, grads.reached()?);
        Ok(Taped {
            forward,
            back,
            inputs,
            results,
            seeds,
            of_features,
            of_tokens,
            of_dense,
            reached,
        })
    }
}

/// An iteration without a tape, recorded.
struct AnswerOnly {
    graph: Graph,
    inputs: Inputs,
    logits: Tensor,
}

impl AnswerOnly {
    fn record(
        replay: &Replay,
        arena: &mut Arena,
        pass: &Pass,
        tokens: [usize; 2],
    ) -> Result<AnswerOnly, OpError> {
        let Replay { cuda, device, model, .. } = *replay;
        let work = || -> Result<_, OpError> {
            let (off, inputs) = (Tape::off(device), Inputs::new(cuda, model, tokens)?);
            let first = inputs.first(Var::constant);
            let dense = Var::constant(inputs.dense.clone());
            let (history, observer) = (&inputs.history, &mut Observer::none());
            let answer =
                model.interact_from(&off, &pass.features, &first, &dense, history, observer)?;
            let logits = answer.logits.value().clone();
            Ok((inputs, logits))
        };
        let (graph, (inputs, logits)) = cuda.record(arena, work)?;
        check_maps(cuda, [&logits])?;
        Ok(AnswerOnly { graph, inputs, logits })
    }
}

/// What is known of an iteration.
enum Known<T> {
    /// The iteration was done that often op by op.
    Seen(u32),
    Recorded(T),
    /// The iteration cannot be recorded.
    No,
}

/// The recordings of iterations. One of them uses the arena at a time.
#[derive(Default)]
struct Iterations {
    arena: Arena,
    taped: BTreeMap<Key, Known<Taped>>,
    answers: BTreeMap<[usize; 2], Known<AnswerOnly>>,
    /// How many are recorded, or cannot be.
    tries: usize,
    /// How many recordings were made, on a tape and without one.
    made: [usize; 2],
}

/// Whether to record an iteration: after it was done op by op often enough.
fn is_due<K: Ord, T>(known: &mut BTreeMap<K, Known<T>>, key: K, full: bool) -> bool {
    match known.entry(key) {
        Entry::Vacant(entry) => {
            entry.insert(Known::Seen(1));
            false
        }
        Entry::Occupied(mut entry) => match entry.get_mut() {
            Known::Seen(times) => {
                *times = times.saturating_add(1);
                *times > BEFORE && !full
            }
            Known::Recorded(_) | Known::No => false,
        },
    }
}

impl Iterations {
    /// Forgets recordings that were made before the arena changed: they use the old one.
    fn tidy(&mut self, before: usize) {
        if self.arena.bytes() != before {
            self.taped.values_mut().for_each(Known::forget);
            self.answers.values_mut().for_each(Known::forget);
            self.tries = 0;
        }
    }

    /// Counts a try to record, in the arena that had so many bytes before, and what came of it.
    fn note<T>(&mut self, before: usize, which: usize, made: Option<T>) -> Known<T> {
        self.tidy(before);
        self.tries += 1;
        self.made[which] += usize::from(made.is_some());
        made.map_or(Known::No, Known::Recorded)
    }

    /// The recording of an iteration on a tape, if there is one or can be.
    fn taped(
        &mut self,
        replay: &mut Replay,
        pass: &Pass,
        key: Key,
    ) -> Result<Option<&Taped>, OpError> {
        if is_due(&mut self.taped, key, *replay.refused || self.tries >= MOST) {
            let before = self.arena.bytes();
            let made = Taped::record(replay, &mut self.arena, pass, key);
            let known = self.note(before, 0, tried(made, replay.refused)?);
            self.taped.insert(key, known);
        }
        Ok(self.taped.get(&key).and_then(Known::recorded))
    }

    /// The recording of an iteration without a tape, if there is one or can be.
    fn answer(
        &mut self,
        replay: &mut Replay,
        pass: &Pass,
        tokens: [usize; 2],
    ) -> Result<Option<&AnswerOnly>, OpError> {
        if is_due(&mut self.answers, tokens, *replay.refused || self.tries >= MOST) {
            let before = self.arena.bytes();
            let made = AnswerOnly::record(replay, &mut self.arena, pass, tokens);
            let known = self.note(before, 1, tried(made, replay.refused)?);
            self.answers.insert(tokens, known);
        }
        Ok(self.answers.get(&tokens).and_then(Known::recorded))
    }
}

impl<T> Known<T> {
    fn recorded(&self) -> Option<&T> {
        match self {
            Known::Recorded(program) => Some(program),
            Known::Seen(_) | Known::No => None,
        }
    }

    /// Forgets a recording, which is made again when it is next needed.
    fn forget(&mut self) {
        if matches!(self, Known::Recorded(_)) {
            *self = Known::Seen(BEFORE);
        }
    }
}

/// An iteration whose forward pass was replayed last: its values are in the arena.
struct Begun<'m> {
    key: Key,
    /// The tape of its tokens alone.
    tape: Tape<'m>,
    tokens: Var,
}

/// What an item is replayed with.
struct Replay<'k> {
    cuda: &'k Cuda,
    device: &'k Device,
    model: &'k Model,
    memory: &'k Arc<GradMemory>,
    encoder: &'k Encoder,
    /// Whether nothing more is recorded.
    refused: &'k mut bool,
}

/// Rows and columns of a matrix.
fn size(matrix: &Tensor) -> [usize; 2] {
    [matrix.rows(), matrix.channels()]
}

impl<'k> Replay<'k> {
    fn item(
        mut self,
        iterations: &mut Iterations,
        image: &Tensor,
        (target, share): (&Target, Share),
        (grads, last): (&mut ParamGrads, bool),
        mut prompt: Prompt,
    ) -> Result<Lost, OpError> {
        let Replay { cuda, device, model, encoder, .. } = self;
        let there = encoder.image.to_device(cuda, cuda.precision())?;
        if image.len() != encoder.image.len() {
            return Err(image.shape_error(OP, "image", format!("{:?}", encoder.image.shape())));
        }
        upload_to(cuda, &there, image.try_data()?, cuda.precision())?;
        encoder.forward.replay()?;
        let features = encoder.features.leaves(&Tape::off(device));
        let mut pass = Pass { device, model, features, rounds: vec![], dense: vec![] };
        let mut kept: Vec<Option<Recorded>> = vec![];
        let mut begun: Option<Begun> = None;
        let mut previous: Option<Tensor> = None;
        for t in 0..share.iterations {
            if !pass.ask(t, &mut previous, &mut prompt)? {
                break;
            }
            let reruns = share.reruns(t);
            if reruns && share.recompute == Rerun::Fast {
                previous = Some(match self.answer(iterations, &pass, t)? {
                    Some(logits) => logits,
                    None => pass.answer(t)?,
                });
                kept.push(None);
                continue;
            }
            // Another iteration's values are overwritten, or are not needed any more.
            begun = self.begin(iterations, &pass, t)?;
            let program = begun.as_ref().and_then(|begun| iterations.taped.get(&begun.key));
            match program.and_then(Known::recorded) {
                Some(program) => {
                    previous = Some(duplicate(cuda, &program.results[2])?);
                    kept.push(None);
                }
                None => {
                    let recorded = pass.record(t)?;
                    previous = Some(recorded.answer.logits.value().clone());
                    kept.push((!reruns).then_some(recorded));
                }
            }
        }
        drop(previous);
        let (done, mut gathered) = (kept.len(), Gathered::default());
        for (t, kept) in kept.into_iter().enumerate().rev() {
            // The last iteration's values are still there.
            let mut ready = begun.take();
            if kept.is_none() && ready.is_none() {
                ready = self.begin(iterations, &pass, t)?;
            }
            let given = (target, share, done);
            match (kept, ready) {
                (None, Some(ready)) => {
                    let program = iterations.taped.get(&ready.key).and_then(Known::recorded);
                    let program = program.ok_or_else(|| argument("a recording is gone"))?;
                    self.back(program, ready, (&pass, t), given, &mut gathered, grads)?;
                }
                (Some(recorded), _) => pass.back(t, recorded, given, &mut gathered, grads)?,
                (None, None) => {
                    pass.back(t, pass.record(t)?, given, &mut gathered, grads)?;
                }
            }
        }
        let Gathered { mut unread, features, .. } = gathered;
        unread.reverse();
        if last {
            grads.settle(device)?;
        }
        // Without an iteration there is no gradient.
        if done > 0 {
            for (seed, gradient) in encoder.seeds.iter().zip(features) {
                let gradient = gradient.ok_or_else(|| argument("a feature has no gradient"))?;
                assign(cuda, seed, &gradient)?;
            }
            encoder.back.replay()?;
            grads.replayed(&encoder.reached)?;
        }
        Ok(Lost { iterations: unread, target: target.size(), share, tape_bytes: 0 })
    }

    /// The answer of iteration `t`, without a tape; none if that is not recorded.
    fn answer(
        &mut self,
        iterations: &mut Iterations,
        pass: &Pass,
        t: usize,
    ) -> Result<Option<Tensor>, OpError> {
        let cuda = self.cuda;
        let tokens = self.model.tokens(&Tape::off(self.device), &pass.rounds[t].prompts)?;
        let Some(program) = iterations.answer(self, pass, size(&tokens.rows))? else {
            return Ok(None);
        };
        program.inputs.fill(cuda, pass, t, &tokens)?;
        program.graph.replay()?;
        Ok(Some(duplicate(cuda, &program.logits)?))
    }

    /// The forward pass of iteration `t`, on a tape; none if that is not recorded.
    fn begin(
        &mut self,
        iterations: &mut Iterations,
        pass: &Pass,
        t: usize,
    ) -> Result<Option<Begun<'k>>, OpError> {
        let (cuda, tape) = (self.cuda, Tape::on(self.device));
        let tokens = self.model.tokens(&tape, &pass.rounds[t].prompts)?;
        let key = (size(&tokens.rows), t == 0);
        let Some(program) = iterations.taped(self, pass, key)? else { return Ok(None) };
        program.inputs.fill(cuda, pass, t, &tokens)?;
        program.forward.replay()?;
        Ok(Some(Begun { key, tape, tokens: tokens.rows }))
    }

    /// The loss of iteration `t` of `done`, whose forward pass was replayed last, and its backward
    /// pass.
    fn back(
        &self,
        program: &Taped,
        Begun { tape, tokens, .. }: Begun<'k>,
        (pass, t): (&Pass, usize),
        (target, share, done): (&Target, Share, usize),
        gathered: &mut Gathered,
        grads: &mut ParamGrads,
    ) -> Result<(), OpError> {
        let Replay { cuda, device, .. } = *self;
        let [masks, scores, logits] = &program.results;
        // Scores are read at the end of the step: a copy of its own.
        let (masks, scores, logits) =
            (anew(cuda, masks)?, duplicate(cuda, scores)?, anew(cuda, logits)?);
        let answered = Answered { masks: &masks, scores: &scores, logits: &logits, refined: true };
        let given = (target, pass.rounds[t].emphasis.as_ref());
        let (lost, seeds) = losses(device, answered, given, share, done)?;
        gathered.unread.push(lost);
        let Seeds { masks, scores, mut logits } = seeds;
        if let Some(gradient) = gathered.answer.take() {
            add_to(device, &mut logits, gradient)?;
        }
        let logits = logits.ok_or_else(|| argument("the answer has no gradient"))?;
        for (seed, gradient) in program.seeds.iter().zip([&masks, &scores, &logits]) {
            assign(cuda, seed, gradient)?;
        }
        program.back.replay()?;
        grads.replayed(&program.reached)?;
        let of_dense = program.of_dense.as_ref();
        gathered.answer = of_dense.map(|gradient| duplicate(cuda, gradient)).transpose()?;
        for (sum, gradient) in gathered.features.iter_mut().zip(&program.of_features) {
            if sum.is_none() {
                *sum = Some(duplicate(cuda, gradient)?);
            } else {
                add_wide(device, sum, anew(cuda, gradient)?)?;
            }
        }
        let seed = anew(cuda, &program.of_tokens)?;
        tape.backward_unsettled(vec![(&tokens, seed)], grads).map(drop)
    }
}
