//! A session's two programs on a CUDA device, each recorded once and replayed: encode, and interact
//! for a number of tokens.
//!
//! Both have static shapes; the number of tokens is rounded up to a bucket, and the number of valid
//! ones is read on the device. All recordings share one arena; encode writes the features where
//! interactions read them. An interaction uploads one copy (the tokens) besides the points that are
//! new in the prompt maps, and downloads one: choice, scores and all masks as bits. The answer's
//! logits stay on the device, as the next interaction's dense prompt, until they are asked for.

use super::prompt_encoder::{TOKENS, scatter};
use super::{Answer, Features, Model, Observer, PatchPrompts, PromptMaps};
use crate::autograd::{Tape, Var};
use crate::device::cuda::{Arena, Graph, KernelRecord, Launch, Memory, Placed, kernels};
use crate::device::{Cuda, CudaError};
use crate::memory;
use crate::ops::tokens::{LEAST_TOKENS, bucket};
use crate::sync::locked;
use crate::tensor::{OpError, Tensor, to_bytes, upload_to};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A number that no features have.
const NOBODYS: u64 = 0;
/// Where tokens begin in the buffer that they are uploaded in, after their number.
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

/// The recording that computes the inputs' features.
struct Encode {
    graph: Graph,
    image: Arc<Memory>,
}

/// What interactions read: one scan's features, prompt maps, dense prompt.
struct Inputs {
    features: Features,
    /// The number of the features that are stored here.
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

    /// Decodes a report.
    fn read(self, report: &[u8]) -> Summary {
        let word = |i: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&report[4 * i..][..4]);
            u32::from_le_bytes(bytes)
        };
        let masks = report[self.masks_at()..].chunks_exact(self.mask_bytes);
        Summary {
            selected: word(0) as usize,
            scores: (0..self.candidates).map(|i| f32::from_bits(word(1 + i))).collect(),
            bits: masks.map(<[u8]>::to_vec).collect(),
        }
    }
}

/// The choice, scores and masks of an interaction, on the host. Made by [`Answer::summary`].
pub struct Summary {
    /// The index of the chosen candidate.
    pub selected: usize,
    /// Each candidate's score, 0 to 1.
    pub scores: Vec<f32>,
    /// The answer's mask, then each candidate's: one bit per voxel `[i][j][k]`, the first voxel in
    /// the highest bit of the first byte.
    pub bits: Vec<Vec<u8>>,
}

/// A tensor over memory of its own.
pub(crate) fn fixed(cuda: &Cuda, shape: &[usize]) -> Result<Tensor, OpError> {
    let memory = cuda.allocate(shape.iter().product(), cuda.precision())?;
    Ok(Tensor::from_device(shape, memory, cuda.precision()))
}

/// Copies values on the device, or from the host if they are there.
pub(crate) fn assign(cuda: &Cuda, to: &Tensor, from: &Tensor) -> Result<(), CudaError> {
    let dtype = cuda.precision();
    let (to, from) = (to.to_device(cuda, dtype)?, from.to_device(cuda, dtype)?);
    cuda.copy(&from, 0, &to, 0, to.bytes())
}

/// A copy in memory of its own.
pub(crate) fn duplicate(cuda: &Cuda, from: &Tensor) -> Result<Tensor, OpError> {
    let to = fixed(cuda, from.shape())?;
    assign(cuda, &to, from)?;
    Ok(to)
}

impl Features {
    /// Features with a number, each tensor made from the corresponding one of these.
    fn each(
        &self,
        id: u64,
        make: impl Fn(&Tensor) -> Result<Tensor, OpError>,
    ) -> Result<Features, OpError> {
        let var = |v: &Var| make(v.value()).map(Var::constant);
        let [a, b, c, d] = &self.skips;
        let skips = [var(a)?, var(b)?, var(c)?, var(d)?];
        Ok(Features { embedding: var(&self.embedding)?, skips, half: make(&self.half)?, id })
    }

    fn tensors(&self) -> [&Tensor; 6] {
        let [a, b, c, d, e] = self.vars();
        [a.value(), b.value(), c.value(), d.value(), e.value(), &self.half]
    }
}

impl Inputs {
    /// Memory for features like these, not holding any yet.
    fn like(model: &Model, cuda: &Cuda, features: &Features) -> Result<Inputs, OpError> {
        let s = model.config.patch;
        let features = features.each(NOBODYS, |own| fixed(cuda, own.shape()))?;
        let (history, dense) = (fixed(cuda, &[1, s, s, s, 2])?, fixed(cuda, &[1, s, s, s, 1])?);
        Ok(Inputs { features, resident: NOBODYS, history, dense })
    }
}

impl GraphCache {
    /// Bytes of the arena that the recordings work in.
    pub fn bytes(&self) -> usize {
        self.state().arena.bytes()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        locked(&self.0)
    }

    /// [`Model::encode`] by replay. `image` has the patch's voxels.
    pub fn encode(&self, model: &Model, cuda: &Cuda, image: &Tensor) -> Result<Features, OpError> {
        let mut state = self.state();
        let (encode, inputs) = state.encode(model, cuda)?;
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
        inputs.resident = NOBODYS;
        encode.graph.replay()?;
        let features = inputs.features.each(super::next_features(), |own| duplicate(cuda, own))?;
        inputs.resident = features.id;
        Ok(features)
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
        let off = Tape::off(&model.device);
        let (tokens, count) = model.prompt_encoder.tokens(&off, prompts, s, false)?;
        let mut state = self.state();
        state.make_inputs(model, cuda, features)?;
        let recorded = state.interact(model, cuda, bucket(count))?;
        let inputs = recorded.1;
        if inputs.resident != features.id {
            // If a copy fails, this memory holds no features.
            inputs.resident = NOBODYS;
            for (to, from) in inputs.features.tensors().into_iter().zip(features.tensors()) {
                assign(cuda, to, from)?;
            }
            inputs.resident = features.id;
        }
        // Before the first answer there is no dense prompt.
        if dense.device_type().is_none()
            && dense.data().par_chunks(1 << 16).all(|piece| piece.iter().all(|v| v.to_bits() == 0))
        {
            cuda.clear(&*inputs.dense.to_device(cuda, dtype)?)?;
        } else {
            assign(cuda, &inputs.dense, dense)?;
        }
        let Interact { graph, staging, answer, report } = recorded.0;
        // All prompts in one copy: the number of tokens, the tokens, the positions of the maps'
        // ones.
        let told = to_bytes(tokens.try_data()?, dtype);
        let places = match history {
            PromptMaps::Places(_, list) => list.as_slice(),
            PromptMaps::Maps(_) => &[],
        };
        let mut up: Vec<u8> = memory::list(TOKENS, TOKENS_AT + told.len() + 4 * places.len() + 4);
        up.resize(TOKENS_AT, 0);
        up[..4].copy_from_slice(&(count as u32).to_le_bytes());
        up.extend(told);
        let staged = up.len();
        up.resize(staged.next_multiple_of(4), 0);
        let places_at = up.len();
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
        let summary = cuda.download_read(report, layout.bytes(), |down| layout.read(down))?;
        let scores = summary.scores.clone();
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

    /// Records both programs, for as many tokens as a few clicks and a short scribble need.
    pub fn warm_up(&self, model: &Model, cuda: &Cuda) -> Result<(), OpError> {
        let mut state = self.state();
        state.encode(model, cuda)?;
        for bucket in [4 * LEAST_TOKENS, LEAST_TOKENS] {
            state.interact(model, cuda, bucket)?;
        }
        // The first recording is made again if later recordings needed a larger arena.
        state.encode(model, cuda).map(|_| ())
    }

    /// The launches of the two programs, with `tokens` tokens rounded up: timed one by one, or
    /// without computing anything.
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
        let buffers = Buffers::new(model, cuda, bucket(tokens))?;
        cuda.upload_to(&buffers.staging, &[tokens as u32])?;
        let (interact, _) = cuda.launches(timed, || buffers.interact(model, cuda, &inputs))?;
        Ok([encode, interact])
    }
}

impl State {
    /// Records, and if the arena had to grow discards the recordings made in the old one. `place`
    /// says which parts of the result are placed elsewhere.
    fn record<R>(
        &mut self,
        cuda: &Cuda,
        f: impl Fn() -> Result<R, OpError>,
        place: impl FnOnce(&R) -> Result<Vec<Placed>, OpError>,
    ) -> Result<(Graph, R), OpError> {
        let before = self.arena.bytes();
        let recorded = cuda.record_into(&mut self.arena, f, place)?;
        if self.arena.bytes() != before {
            self.encode = None;
            self.interact.clear();
        }
        Ok(recorded)
    }

    /// Makes sure that there is memory for features like these. If it is made again, as after a
    /// panic, earlier recordings read and write memory that is gone.
    fn make_inputs(&mut self, model: &Model, cuda: &Cuda, like: &Features) -> Result<(), OpError> {
        if self.inputs.is_none() {
            self.encode = None;
            self.interact.clear();
            self.inputs = Some(Inputs::like(model, cuda, like)?);
        }
        Ok(())
    }

    fn encode(&mut self, model: &Model, cuda: &Cuda) -> Result<(&Encode, &mut Inputs), OpError> {
        if self.encode.is_none() || self.inputs.is_none() {
            let (s, dtype) = (model.config.patch, cuda.precision());
            let input = fixed(cuda, &[1, s, s, s, 1])?;
            let off = Tape::off(&model.device);
            let mut inputs = self.inputs.take();
            if inputs.is_none() {
                self.interact.clear();
            }
            let place = |made: &Features| -> Result<Vec<Placed>, OpError> {
                let there = match inputs.take() {
                    Some(inputs) => inputs,
                    None => Inputs::like(model, cuda, made)?,
                };
                let to = inputs.insert(there).features.tensors();
                let mut pairs = vec![];
                for (made, to) in made.tensors().into_iter().zip(to) {
                    pairs.push((made.to_device(cuda, dtype)?, to.to_device(cuda, dtype)?));
                }
                Ok(pairs)
            };
            let recorded =
                self.record(cuda, || model.encode_on(&off, &input, &mut Observer::none()), place);
            self.inputs = inputs;
            let (graph, _) = recorded?;
            self.encode = Some(Encode { graph, image: input.to_device(cuda, dtype)? });
        }
        let inputs = self.inputs.as_mut().expect("just made");
        Ok((self.encode.as_ref().expect("just recorded"), inputs))
    }

    /// The inputs must exist.
    fn interact(
        &mut self,
        model: &Model,
        cuda: &Cuda,
        bucket: usize,
    ) -> Result<(&Interact, &mut Inputs), OpError> {
        if !self.interact.contains_key(&bucket) {
            let inputs = self.inputs.take().expect("made before");
            let recorded = self.record_interact(model, cuda, &inputs, bucket);
            self.inputs = Some(inputs);
            self.interact.insert(bucket, recorded?);
        }
        let inputs = self.inputs.as_mut().expect("made before");
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
        let (graph, answer) =
            self.record(cuda, || buffers.interact(model, cuda, inputs), |_| Ok(vec![]))?;
        let Buffers { staging, report, .. } = buffers;
        Ok(Interact { graph, staging, answer, report })
    }
}

/// The buffers that an interaction for a number of tokens reads and writes besides its inputs.
struct Buffers {
    bucket: usize,
    layout: ReadbackLayout,
    staging: Arc<Memory>,
    report: Arc<Memory>,
}

/// Writes to `report` the index of the largest of `scores`, the first of equal ones, and after it
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
        // Rows beyond the tokens are only padding, but they take part in the computation.
        cuda.clear(&staging)?;
        Ok(Buffers { bucket, layout, staging, report: cuda.allocate_bytes(layout.bytes())? })
    }

    /// The work of an interaction, from the staged tokens to the report.
    fn interact(&self, model: &Model, cuda: &Cuda, inputs: &Inputs) -> Result<Answer, OpError> {
        let (dtype, width) = (cuda.precision(), model.prompt_encoder.width());
        let tokens = self.staging.part(TOKENS_AT, self.bucket * width * dtype.bytes());
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
