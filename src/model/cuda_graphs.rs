//! A session's two programs on a CUDA device, each recorded once and replayed: encode, and interact
//! for so many tokens.
//!
//! Both have static shapes; the number of tokens is rounded up to a bucket, and how many of them
//! count is read on the device. All recordings share one arena. What goes up in an interaction is
//! one copy (the tokens) beside the points that are new in the prompt maps; what comes down is one:
//! choice, scores and all masks as bits. The answer's logits stay on the device, as the next
//! interaction's dense prompt, until they are asked for.

use super::prompt_encoder::scatter;
use super::{Answer, Features, Model, Observer, PatchPrompts, PromptMaps};
use crate::autograd::{Tape, Var};
use crate::device::cuda::{Arena, Graph, KernelRecord, Launch, Memory, kernels};
use crate::device::{Cuda, CudaError};
use crate::tensor::{OpError, Tensor, to_bytes, upload_to};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The smallest number of tokens that a recording is made for; others are its doubles.
const LEAST_TOKENS: usize = 16;
/// A number that no features have.
const NOBODYS: u64 = 0;
/// Where tokens begin in the buffer that they are sent up in, behind their number.
const TOKENS_AT: usize = 16;

/// The recordings of a model.
#[derive(Default)]
pub struct GraphCache(Mutex<State>);

#[derive(Default)]
struct State {
    arena: Arena,
    encode: Option<Encode>,
    inputs: Option<Inputs>,
    interact: BTreeMap<usize, Interact>,
}

struct Encode {
    graph: Graph,
    image: Arc<Memory>,
    features: Features,
}

/// What interactions read: one scan's features, prompt maps, dense prompt.
struct Inputs {
    features: Features,
    /// The number of the features that lie here.
    resident: u64,
    history: Tensor,
    dense: Tensor,
}

struct Interact {
    graph: Graph,
    /// The number of tokens and the tokens.
    staging: Arc<Memory>,
    answer: Answer,
    /// Choice, scores, and the bits of the answer and of all candidates.
    report: Arc<Memory>,
}

/// The layout of a report.
#[derive(Clone, Copy)]
struct ReadbackLayout {
    candidates: usize,
    mask_bytes: usize,
}

impl ReadbackLayout {
    fn masks_at(self) -> usize {
        (4 * (1 + self.candidates)).next_multiple_of(16)
    }

    fn bytes(self) -> usize {
        self.masks_at() + (1 + self.candidates) * self.mask_bytes
    }
}

/// Choice, scores and masks of an interaction, as they came from the device.
pub struct Summary {
    /// The chosen candidate.
    pub selected: usize,
    /// Each candidate's score.
    pub scores: Vec<f32>,
    /// The answer's mask, one bit a voxel, first voxel in the highest bit; then each candidate's.
    pub bits: Vec<Vec<u8>>,
}

/// A tensor over memory of its own.
fn fixed(cuda: &Cuda, shape: &[usize]) -> Result<Tensor, OpError> {
    let memory = cuda.allocate(shape.iter().product(), cuda.precision())?;
    Ok(Tensor::from_device(shape, memory, cuda.precision()))
}

/// Copies values on the device; from the host where they lie there.
fn assign(cuda: &Cuda, to: &Tensor, from: &Tensor) -> Result<(), CudaError> {
    let dtype = cuda.precision();
    let (to, from) = (to.to_device(cuda, dtype)?, from.to_device(cuda, dtype)?);
    cuda.copy(&from, 0, &to, 0, to.bytes())
}

/// A copy in memory of its own.
fn duplicate(cuda: &Cuda, from: &Tensor) -> Result<Tensor, OpError> {
    let to = fixed(cuda, from.shape())?;
    assign(cuda, &to, from)?;
    Ok(to)
}

impl Features {
    /// The same features in memory of their own.
    fn duplicate(&self, cuda: &Cuda) -> Result<Features, OpError> {
        let own = |v: &Var| duplicate(cuda, v.value()).map(Var::constant);
        let [a, b, c, d] = &self.skips;
        let skips = [own(a)?, own(b)?, own(c)?, own(d)?];
        Ok(Features {
            embedding: own(&self.embedding)?,
            skips,
            half: duplicate(cuda, &self.half)?,
            id: self.id,
        })
    }

    fn tensors(&self) -> [&Tensor; 6] {
        let [a, b, c, d, e] = self.vars();
        [a.value(), b.value(), c.value(), d.value(), e.value(), &self.half]
    }
}

impl GraphCache {
    /// Bytes of the arena that the recordings work in.
    pub fn bytes(&self) -> usize {
        self.state().arena.bytes()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// [`Model::encode`] by replay. `image` has the patch's voxels.
    pub fn encode(&self, model: &Model, cuda: &Cuda, image: &Tensor) -> Result<Features, OpError> {
        let mut state = self.state();
        let encode = state.encode(model, cuda)?;
        match image.device_type() {
            Some(_) => cuda.copy(
                &*image.to_device(cuda, cuda.precision())?,
                0,
                &encode.image,
                0,
                encode.image.bytes(),
            )?,
            None => upload_to(cuda, &encode.image, image.data(), cuda.precision())?,
        }
        encode.graph.replay()?;
        Ok(Features { id: super::next_features(), ..encode.features.duplicate(cuda)? })
    }

    /// [`Model::interact`] by replay.
    pub fn interact(
        &self,
        model: &Model,
        cuda: &Cuda,
        features: &Features,
        prompts: &PatchPrompts,
        dense: &Tensor,
        history: &PromptMaps,
    ) -> Result<Answer, OpError> {
        let start = Instant::now();
        let (s, dtype) = (model.config.patch, cuda.precision());
        let tokens = model.prompt_encoder.tokens(&Tape::off(&model.device), prompts, s)?;
        let mut state = self.state();
        let bucket = tokens.rows().next_power_of_two().max(LEAST_TOKENS);
        let recorded = state.interact(model, cuda, features, bucket)?;
        let inputs = recorded.1;
        if inputs.resident != features.id {
            // Should a copy fail, what lies here is nobody's.
            inputs.resident = NOBODYS;
            for (to, from) in inputs.features.tensors().into_iter().zip(features.tensors()) {
                assign(cuda, to, from)?;
            }
            inputs.resident = features.id;
        }
        // Before the first answer there is nothing to start from.
        if dense.device_type().is_none()
            && dense.data().par_chunks(1 << 16).all(|piece| piece.iter().all(|v| v.to_bits() == 0))
        {
            cuda.clear(&*inputs.dense.to_device(cuda, dtype)?)?;
        } else {
            assign(cuda, &inputs.dense, dense)?;
        }
        let Interact { graph, staging, answer, report } = recorded.0;
        // All prompts in one copy: the number of tokens, the tokens, the places of the maps' ones.
        let mut up = vec![0u8; TOKENS_AT];
        up[..4].copy_from_slice(&(tokens.rows() as u32).to_le_bytes());
        up.extend(to_bytes(tokens.try_data()?, dtype));
        let staged = up.len();
        up.resize(staged.next_multiple_of(4), 0);
        let places_at = up.len();
        let places = match history {
            PromptMaps::Places(_, list) => list.as_slice(),
            PromptMaps::Maps(_) => &[],
        };
        up.extend_from_slice(bytemuck::cast_slice(places));
        let given = cuda.upload(&up)?;
        cuda.copy(&given, 0, staging, 0, staged)?;
        match history {
            PromptMaps::Places(..) => {
                scatter(
                    cuda,
                    &inputs.history.to_device(cuda, dtype)?,
                    given.at(places_at),
                    places.len(),
                )?;
            }
            PromptMaps::Maps(maps) => assign(cuda, &inputs.history, maps)?,
        }
        graph.replay()?;
        let layout = ReadbackLayout {
            candidates: answer.candidates.scores.len(),
            mask_bytes: s * s * s / 8,
        };
        let masks = Var::constant(duplicate(cuda, answer.candidates.masks.value())?);
        let logits = Var::constant(duplicate(cuda, answer.logits.value())?);
        let mut down = vec![0u8; layout.bytes()];
        cuda.download(report, &mut down)?;
        let word = |i: usize| {
            u32::from_le_bytes([down[4 * i], down[4 * i + 1], down[4 * i + 2], down[4 * i + 3]])
        };
        let scores: Vec<f32> =
            (0..layout.candidates).map(|i| f32::from_bits(word(1 + i))).collect();
        let bits =
            down[layout.masks_at()..].chunks_exact(layout.mask_bytes).map(<[u8]>::to_vec).collect();
        let summary = Summary { selected: word(0) as usize, scores: scores.clone(), bits };
        let scores = Var::constant(Tensor::new(answer.candidates.scores.shape(), scores));
        let candidates = super::Candidates { masks, scores, bits: None };
        let seconds = [Duration::ZERO, Duration::ZERO, start.elapsed()];
        Ok(Answer {
            candidates,
            logits,
            refined: answer.refined,
            seconds,
            summary: Some(Arc::new(summary)),
        })
    }

    /// Records both programs, for as many tokens as a few clicks and a short scribble have.
    pub fn warm_up(&self, model: &Model, cuda: &Cuda) -> Result<(), OpError> {
        let mut state = self.state();
        for bucket in [4 * LEAST_TOKENS, LEAST_TOKENS] {
            let like = state.encode(model, cuda)?.features.duplicate(cuda)?;
            state.interact(model, cuda, &like, bucket)?;
        }
        // What was recorded first is recorded again where later recordings took a larger arena.
        state.encode(model, cuda).map(|_| ())
    }

    /// What the two programs launch, `tokens` tokens being rounded up: timed one by one, or without
    /// anything being computed.
    pub fn launches(
        &self,
        model: &Model,
        cuda: &Cuda,
        tokens: usize,
        timed: bool,
    ) -> Result<[Vec<KernelRecord>; 2], OpError> {
        let (s, off) = (model.config.patch, Tape::off(&model.device));
        let image = fixed(cuda, &[1, s, s, s, 1])?;
        cuda.clear(&*image.to_device(cuda, cuda.precision())?)?;
        let (encode, features) =
            cuda.launches(timed, || model.encode_on(&off, &image, &mut Observer::none()))?;
        let (history, dense) = (
            super::prompt_maps(&model.device, s, &[]).on(&model.device)?,
            image.reshape([1, s, s, s, 1]),
        );
        let inputs = Inputs { resident: features.id, features, history, dense };
        let buffers = Buffers::new(model, cuda, tokens.next_power_of_two().max(LEAST_TOKENS))?;
        cuda.upload_to(&buffers.staging, &[tokens as u32])?;
        let (interact, _) = cuda.launches(timed, || buffers.interact(model, cuda, &inputs))?;
        Ok([encode, interact])
    }
}

impl State {
    /// Records, and where the arena had to grow forgets what was recorded in the old one.
    fn record<R>(
        &mut self,
        cuda: &Cuda,
        f: impl Fn() -> Result<R, OpError>,
    ) -> Result<(Graph, R), OpError> {
        let before = self.arena.bytes();
        let recorded = cuda.record(&mut self.arena, f)?;
        if self.arena.bytes() != before {
            self.encode = None;
            self.interact.clear();
        }
        Ok(recorded)
    }

    fn encode(&mut self, model: &Model, cuda: &Cuda) -> Result<&Encode, OpError> {
        if self.encode.is_none() {
            let s = model.config.patch;
            let input = fixed(cuda, &[1, s, s, s, 1])?;
            let off = Tape::off(&model.device);
            let (graph, features) =
                self.record(cuda, || model.encode_on(&off, &input, &mut Observer::none()))?;
            self.encode =
                Some(Encode { graph, image: input.to_device(cuda, cuda.precision())?, features });
        }
        Ok(self.encode.as_ref().expect("just recorded"))
    }

    fn interact(
        &mut self,
        model: &Model,
        cuda: &Cuda,
        like: &Features,
        bucket: usize,
    ) -> Result<(&Interact, &mut Inputs), OpError> {
        let s = model.config.patch;
        if self.inputs.is_none() {
            let (history, dense) = (fixed(cuda, &[1, s, s, s, 2])?, fixed(cuda, &[1, s, s, s, 1])?);
            self.inputs =
                Some(Inputs { features: like.duplicate(cuda)?, resident: like.id, history, dense });
            // Made anew after a panic: what was recorded before reads those that are gone.
            self.interact.clear();
        }
        if !self.interact.contains_key(&bucket) {
            let inputs = self.inputs.take().expect("just made");
            let recorded = self.record_interact(model, cuda, &inputs, bucket);
            self.inputs = Some(inputs);
            self.interact.insert(bucket, recorded?);
        }
        let inputs = self.inputs.as_mut().expect("just made");
        Ok((&self.interact[&bucket], inputs))
    }

    fn record_interact(
        &mut self,
        model: &Model,
        cuda: &Cuda,
        inputs: &Inputs,
        bucket: usize,
    ) -> Result<Interact, OpError> {
        let buffers = Buffers::new(model, cuda, bucket)?;
        let (graph, answer) = self.record(cuda, || buffers.interact(model, cuda, inputs))?;
        let Buffers { staging, report, .. } = buffers;
        Ok(Interact { graph, staging, answer, report })
    }
}

/// What an interaction for so many tokens reads and writes beside its inputs.
struct Buffers {
    bucket: usize,
    layout: ReadbackLayout,
    staging: Arc<Memory>,
    report: Arc<Memory>,
}

/// Writes to `report` which of `scores` is the largest, of equal ones the first, and behind that
/// the scores in float32.
pub(super) fn select(cuda: &Cuda, scores: &Tensor, report: &Arc<Memory>) -> Result<(), OpError> {
    let dtype = cuda.precision();
    let values = scores.to_device(cuda, dtype)?;
    Ok(cuda.launch(
        kernels::SELECT.of(dtype)?,
        Launch { grid: [1; 3], threads: 32, ..Launch::per_element(1) },
        kernels::SelectArgs {
            scores: (&values).into(),
            report: report.into(),
            count: scores.len().into(),
        },
    )?)
}

impl Buffers {
    fn new(model: &Model, cuda: &Cuda, bucket: usize) -> Result<Buffers, OpError> {
        let (s, width) = (model.config.patch, model.prompt_encoder.width());
        let candidates = if model.config.confidence { model.config.candidates } else { 1 };
        let layout = ReadbackLayout { candidates, mask_bytes: s * s * s / 8 };
        let staging = cuda.allocate_bytes(TOKENS_AT + bucket * width * cuda.precision().bytes())?;
        // Rows beyond the tokens are never more than padding, but they are computed with.
        cuda.clear(&staging)?;
        Ok(Buffers { bucket, layout, staging, report: cuda.allocate_bytes(layout.bytes())? })
    }

    /// The work of an interaction, from the staged tokens to the report.
    fn interact(&self, model: &Model, cuda: &Cuda, inputs: &Inputs) -> Result<Answer, OpError> {
        let (dtype, width) = (cuda.precision(), model.prompt_encoder.width());
        let tokens = cuda.allocate(self.bucket * width, dtype)?;
        cuda.copy(&self.staging, TOKENS_AT, &tokens, 0, tokens.bytes())?;
        let tokens = Var::constant(Tensor::from_device([self.bucket, width], tokens, dtype));
        let dense = Var::constant(inputs.dense.clone());
        let choose = |scores: &Tensor| -> Result<Option<Arc<Memory>>, OpError> {
            select(cuda, scores, &self.report)?;
            Ok(Some(self.report.clone()))
        };
        let (off, given) = (Tape::off(&model.device), (&tokens, Some(&self.staging)));
        let answer = model.answer(
            &off,
            &inputs.features,
            given,
            &dense,
            &inputs.history,
            choose,
            &mut Observer::none(),
        )?;
        let pack = |x: &Tensor, first: usize| -> Result<(), OpError> {
            let (bytes, values) = (x.len() / 8, x.to_device(cuda, dtype)?);
            let to = self.layout.masks_at() + first * self.layout.mask_bytes;
            let launch = Launch::per_element(bytes).with_cost(0, bytes * (1 + 8 * dtype.bytes()));
            Ok(cuda.launch(
                kernels::PACK_BITS.of(dtype)?,
                launch,
                kernels::PackBitsArgs {
                    x: (&values).into(),
                    bits: self.report.at(to),
                    bytes: bytes.into(),
                },
            )?)
        };
        pack(answer.logits.value(), 0)?;
        pack(answer.candidates.masks.value(), 1)?;
        Ok(answer)
    }
}
