//! The network: configuration, weights, and the two programs that a session runs, encode and
//! interact.
//!
//! [`Weights::open`] reads a model file and [`Model::new`] makes a network of it, which a
//! [`Session`](crate::Session) runs. A program that wants the network alone, on patches that it has
//! cut out and normalised itself, runs it like this:
//!
//! ```
//! use prism::model::{Model, Observer, PatchPrompts, prompt_maps};
//! use prism::tensor::{OpError, Tensor};
//!
//! /// The answer's logits `[i][j][k]` for a click in the middle of a patch.
//! fn answer(model: &Model, patch: Vec<f32>) -> Result<Vec<f32>, OpError> {
//!     let s = model.config().patch; // voxels along each axis
//!     let mut observer = Observer::none();
//!     let features = model.encode(&Tensor::new([s; 3], patch), &mut observer)?;
//!
//!     let points = vec![([s as i32 / 2; 3], true)];
//!     let history = prompt_maps(model.device(), s, &points); // of all interactions so far
//!     let prompts = PatchPrompts { points, bounds: None };
//!     let dense = Tensor::new([s; 3], vec![0.0; s * s * s]); // no answer yet
//!     let answer = model.interact(&features, &prompts, &dense, &history, &mut observer)?;
//!     Ok(answer.logits.value().try_data()?.to_vec())
//! }
//! ```
//!
//! The network is PRISM's: a convolutional encoder beside a vision transformer, a prompt encoder
//! with a two-way transformer, a mask decoder that proposes several candidates with scores, and a
//! refiner that corrects the best of them. Maps are channels last, `[n, d, h, w, c]`.

pub mod checkpoint;
pub mod config;
mod cuda_graphs;
mod image_encoder;
mod layers;
mod mask_decoder;
mod prompt_encoder;
mod refiner;
pub mod weights;

pub use config::{Config, Encoder, Intensity};
pub use cuda_graphs::Summary;
pub(crate) use cuda_graphs::{assign, duplicate, fixed};
pub use layers::{Observer, Part};
pub use mask_decoder::Candidates;
pub(crate) use prompt_encoder::{GAUSSIAN, Tokens};
pub use prompt_encoder::{PatchPrompts, PromptMaps, prompt_maps};
pub use weights::{Weights, WeightsError};

use crate::autograd::{Tape, Var};
use crate::device::cuda::{KernelRecord, Memory};
use crate::device::{DType, Device};
use crate::memory::{self, Charge};
use crate::ops::attention::ValidKeys;
use crate::ops::refiner_input::Choice;
use crate::ops::resample::downsample2_trilinear;
use crate::ops::rows::gather_row;
use crate::tensor::{OpError, Tensor, caught};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A network ready to run: weights laid out for the kernels of its device. Any number of sessions
/// and threads may share one.
pub struct Model {
    config: Config,
    device: Device,
    image_encoder: image_encoder::ImageEncoder,
    prompt_encoder: prompt_encoder::PromptEncoder,
    mask_decoder: mask_decoder::MaskDecoder,
    refiner: Option<refiner::Refiner>,
    grid_code: Tensor,
    graphs: cuda_graphs::GraphCache,
    _charge: Arc<Charge>,
}

/// The result of encoding a patch: everything that interactions need of it. Made by
/// [`Model::encode`].
pub struct Features {
    /// `[1, g, g, g, width]`.
    embedding: Var,
    /// The contribution of each level to its decoder stage, levels 0 to 3.
    skips: [Var; 4],
    /// The image at half resolution, for the refiner.
    half: Tensor,
    /// A number that is unique among the features of this process.
    id: u64,
}

fn next_features() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Features {
    /// Bytes that it holds, on the model's device.
    pub fn bytes(&self) -> usize {
        let of = |t: &Tensor| t.len() * t.device_type().map_or(size_of::<f32>(), DType::bytes);
        self.vars().iter().map(|v| of(v.value())).sum::<usize>() + of(&self.half)
    }

    /// These features as inputs of another tape.
    pub fn leaves(&self, tape: &Tape) -> Features {
        let leaf = |v: &Var| tape.leaf(v.value().clone());
        Features {
            embedding: leaf(&self.embedding),
            skips: self.skips.each_ref().map(leaf),
            half: self.half.clone(),
            id: self.id,
        }
    }

    /// All that carries a gradient: the embedding and the skip maps of levels 0 to 3.
    pub fn vars(&self) -> [&Var; 5] {
        let [a, b, c, d] = &self.skips;
        [&self.embedding, a, b, c, d]
    }
}

/// The result of one interaction on a patch. Made by [`Model::interact`].
pub struct Answer {
    /// The candidates and the choice among them.
    pub candidates: Candidates,
    /// The answer's logits `[1, s, s, s, 1]`: refined if the network has a refiner, otherwise those
    /// of the chosen candidate.
    pub logits: Var,
    /// Whether a refiner made the answer.
    pub refined: bool,
    /// Time spent on prompts and tokens, decoder, refiner; if a device does all three in one step,
    /// it is counted in the last.
    pub seconds: [Duration; 3],
    /// The report of it that a device has already made.
    summary: Option<Arc<Summary>>,
}

impl Answer {
    /// The chosen candidate, and scores and masks of all of them, on the host.
    ///
    /// # Errors
    /// The device fails; memory is refused.
    pub fn summary(&self) -> Result<Arc<Summary>, OpError> {
        if let Some(summary) = &self.summary {
            return Ok(summary.clone());
        }
        let Candidates { masks, bits, scores } = &self.candidates;
        let mut bits: Vec<Vec<u8>> = match bits {
            Some(bits) => bits.iter().map(|mask| memory::copied("masks", mask)).collect(),
            None => masks.try_data()?.chunks_exact(masks.len() / scores.len()).map(pack).collect(),
        };
        bits.insert(0, pack(self.logits.try_data()?));
        Ok(Arc::new(Summary {
            selected: self.candidates.selected()?,
            scores: scores.try_data()?.to_vec(),
            bits,
        }))
    }
}

/// One bit per value, set if positive, first value in the highest bit.
fn pack(logits: &[f32]) -> Vec<u8> {
    let (whole, rest) = logits.as_chunks::<8>();
    let byte =
        |c: &[f32]| c.iter().enumerate().fold(0, |b, (i, v)| b | u8::from(*v > 0.0) << (7 - i));
    let mut bits = memory::list("masks", logits.len().div_ceil(8));
    bits.extend(whole.iter().map(|c| byte(c)).chain((!rest.is_empty()).then(|| byte(rest))));
    bits
}

impl Model {
    /// Makes a network of weights: lays them out for `device`. Large matrices that stay in a model
    /// file ([`Weights::open`]) are read again when they are needed: if the file was overwritten or
    /// truncated, that is an error then.
    ///
    /// # Errors
    /// There is not enough memory; the model's file has changed since it was opened; the device
    /// fails.
    pub fn new(device: &Device, weights: &Weights) -> Result<Model, OpError> {
        memory::headroom()?;
        caught(|| Model::with_packed_weights(device, weights))
    }

    /// The network with every weight in the order in which the kernels of `device` read it.
    fn with_packed_weights(device: &Device, weights: &Weights) -> Result<Model, OpError> {
        let config = weights.config.clone();
        let prompt_encoder = prompt_encoder::PromptEncoder::load(weights);
        Ok(Model {
            grid_code: prompt_encoder.grid_code(config.grid())?,
            image_encoder: image_encoder::ImageEncoder::load(device, weights)?,
            mask_decoder: mask_decoder::MaskDecoder::load(device, weights)?,
            refiner: config
                .corrective
                .then(|| refiner::Refiner::load(device, weights))
                .transpose()?,
            prompt_encoder,
            device: device.clone(),
            config,
            graphs: cuda_graphs::GraphCache::default(),
            _charge: weights.charge(),
        })
    }

    /// The architecture.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The device that it runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// How many stages an observer sees of encoding a patch, and of an interaction.
    pub fn steps(&self) -> [usize; 2] {
        let c = &self.config;
        match &self.device {
            Device::Cuda(_) => [1, 1],
            Device::Cpu(_) => {
                let vit = if c.encoder == Encoder::Cnn { 0 } else { 1 + c.vit_depth + 3 + 1 };
                let cnn = if c.encoder == Encoder::Vit { 0 } else { 5 };
                let features = if c.encoder == Encoder::Vit { 3 } else { 4 };
                [vit + cnn + features + 1, 2 + 4 + 1 + usize::from(c.corrective) + 1]
            }
        }
    }

    /// Bytes of weights that were laid out in memory, in addition to those of the [`Weights`].
    pub fn packed_bytes(&self) -> usize {
        self.image_encoder.bytes()
            + self.mask_decoder.bytes()
            + self.refiner.as_ref().map_or(0, refiner::Refiner::bytes)
    }

    /// Prepares for [`Model::encode`] and [`Model::interact`], so that the first of each takes no
    /// longer than others; takes about as long as one of each. On a CUDA device their recordings
    /// are made; on the CPU both run once, for an empty image, which leaves memory and transformed
    /// weights ready.
    ///
    /// # Errors
    /// Memory is refused; the device fails; a model file has changed.
    pub fn warm_up(&self) -> Result<(), OpError> {
        caught(|| {
            let cpu = match &self.device {
                Device::Cuda(cuda) => return self.graphs.warm_up(self, cuda),
                Device::Cpu(cpu) => cpu,
            };
            let s = self.config.patch;
            let empty = Tensor::from_buffer([s; 3], cpu.zeros(s * s * s));
            let features = self.encode(&empty, &mut Observer::none())?;
            let prompts = PatchPrompts { points: vec![([0; 3], true)], bounds: None };
            let history = prompt_maps(&self.device, s, &prompts.points);
            self.interact(&features, &prompts, &empty, &history, &mut Observer::none()).map(drop)
        })
    }

    /// The kernel launches of encoding and of an interaction with `tokens` tokens on a CUDA device,
    /// for measuring kernels: if `timed`, each is run and timed separately, otherwise they are
    /// listed without running. None on the CPU.
    ///
    /// # Errors
    /// Memory is refused; the device fails.
    pub fn launches(
        &self,
        tokens: usize,
        timed: bool,
    ) -> Result<Option<[Vec<KernelRecord>; 2]>, OpError> {
        match &self.device {
            Device::Cuda(cuda) => self.graphs.launches(self, cuda, tokens, timed).map(Some),
            Device::Cpu(_) => Ok(None),
        }
    }

    /// Bytes that recorded programs work in on a CUDA device, in addition to weights and features.
    pub fn planned_bytes(&self) -> usize {
        self.graphs.bytes()
    }

    /// Encodes a patch: a normalised image `[s, s, s]`, where s is [`Config::patch`]. On a CUDA
    /// device a recording is replayed, unless the observer wants results.
    ///
    /// # Errors
    /// The image has another size; memory is refused; the device fails; a model file has changed;
    /// the observer cancels it.
    pub fn encode(&self, image: &Tensor, observer: &mut Observer) -> Result<Features, OpError> {
        caught(|| {
            self.check_image(image)?;
            observer.begin(Part::Encoding)?;
            if let (Device::Cuda(cuda), false) = (&self.device, observer.wants_results()) {
                let features = self.graphs.encode(self, cuda, image)?;
                observer.see("image_embedding", || Ok(features.embedding.value().clone()))?;
                return Ok(features);
            }
            let features = self.encode_on(&Tape::off(&self.device), image, observer)?;
            let cpu = self.device.cpu();
            let persistent = |v: Var| Var::constant(v.value().clone().into_persistent(cpu));
            Ok(Features {
                embedding: persistent(features.embedding),
                skips: features.skips.map(persistent),
                half: features.half.into_persistent(cpu),
                ..features
            })
        })
    }

    fn check_image(&self, image: &Tensor) -> Result<(), OpError> {
        let s = self.config.patch;
        if image.len() == s * s * s {
            Ok(())
        } else {
            Err(image.shape_error("encode", "image", format!("[{s}, {s}, {s}]")))
        }
    }

    /// Encodes a normalised image `[s, s, s]` on a tape, op by op.
    ///
    /// # Errors
    /// As [`Model::encode`].
    pub fn encode_on<'m>(
        &'m self,
        tape: &Tape<'m>,
        image: &Tensor,
        observer: &mut Observer,
    ) -> Result<Features, OpError> {
        self.check_image(image)?;
        let s = self.config.patch;
        let image = Var::constant(image.reshape([1, s, s, s, 1]));
        let mut skips = [const { None }; 4];
        let embedding =
            self.image_encoder.run(tape, &image, observer, |level, feature, observer| {
                if let Some(input) = feature.input() {
                    observer.see(&format!("feature{level}"), || {
                        Ok(Tape::off(&self.device).apply(input)?.value().clone())
                    })?;
                }
                skips[level] = Some(self.mask_decoder.skip(tape, level, feature, s)?);
                Ok(())
            })?;
        observer.see("image_embedding", || Ok(embedding.value().clone()))?;
        let skips = skips.map(|s| s.expect("the encoder calls back for levels 0 to 3"));
        Ok(Features {
            embedding,
            skips,
            half: downsample2_trilinear(&self.device, &image)?,
            id: next_features(),
        })
    }

    /// Runs the refiner alone, on logits `m` `[s, s, s]` of a mask: the last step of
    /// [`Model::interact`]. `history` are the prompt maps `[1, s, s, s, 2]`. Returns logits
    /// `[1, s, s, s, 1]`, those given if the network has no refiner.
    ///
    /// # Errors
    /// A size is wrong; otherwise as [`Model::encode`].
    pub fn refine(
        &self,
        features: &Features,
        m: &[f32],
        history: &Tensor,
        observer: &mut Observer,
    ) -> Result<Tensor, OpError> {
        let s = self.config.patch;
        if m.len() != s * s * s {
            let message = format!("the mask has {} voxels, expected {s}³", m.len());
            return Err(OpError::Argument { op: "refine", message });
        }
        caught(|| {
            let m = Tensor::new([1, s, s, s, 1], memory::copied("a mask", m));
            let (off, masks) = (Tape::off(&self.device), (&m, Choice::Known(0)));
            let refined = self.refine_on(&off, features, masks, history, observer)?;
            Ok(refined.map_or_else(|| m.clone(), |refined| refined.value().clone()))
        })
    }

    /// The refiner on a tape, if there is one.
    fn refine_on<'m>(
        &'m self,
        tape: &Tape<'m>,
        features: &Features,
        masks: (&Tensor, Choice),
        history: &Tensor,
        observer: &mut Observer,
    ) -> Result<Option<Var>, OpError> {
        let s = self.config.patch;
        history.expect_shape("refine", "prompt maps", &[1, s, s, s, 2])?;
        self.refiner
            .as_ref()
            .map(|r| r.run(tape, &features.half, masks, history, observer))
            .transpose()
    }

    /// Answers the prompts of one interaction on an encoded patch.
    ///
    /// `prompts` are those of this interaction, `dense` `[s, s, s]` is the dense prompt (the
    /// previous answer's logits, or zeros), and `history` are the maps of all points so far.
    ///
    /// # Errors
    /// A size is wrong; otherwise as [`Model::encode`].
    pub fn interact(
        &self,
        features: &Features,
        prompts: &PatchPrompts,
        dense: &Tensor,
        history: &PromptMaps,
        observer: &mut Observer,
    ) -> Result<Answer, OpError> {
        caught(|| {
            observer.begin(Part::Answering)?;
            if let (Device::Cuda(cuda), false) = (&self.device, observer.wants_results()) {
                history.expect_edge("interact", self.config.patch)?;
                self.check_dense(dense)?;
                let answer = self.graphs.interact(self, cuda, features, prompts, dense, history)?;
                observer.see("refined", || Ok(answer.logits.value().clone()))?;
                return Ok(answer);
            }
            let (off, dense) = (Tape::off(&self.device), Var::constant(dense.clone()));
            let answer = self.interact_on(
                &off,
                features,
                prompts,
                &dense,
                &history.on(&self.device)?,
                observer,
            )?;
            Ok(Answer {
                logits: Var::constant(
                    answer.logits.value().clone().into_persistent(self.device.cpu()),
                ),
                ..answer
            })
        })
    }

    fn check_dense(&self, dense: &Tensor) -> Result<(), OpError> {
        let s = self.config.patch;
        if dense.len() == s * s * s {
            Ok(())
        } else {
            Err(dense.shape_error("interact", "dense prompt", format!("[{s}, {s}, {s}]")))
        }
    }

    /// Answers prompts as [`Model::interact`] does, on a tape, op by op. `history` `[1, s, s, s,
    /// 2]` are the prompt maps. The mask reaches the refiner without its gradient.
    ///
    /// # Errors
    /// As [`Model::interact`].
    pub fn interact_on<'m>(
        &'m self,
        tape: &Tape<'m>,
        features: &Features,
        prompts: &PatchPrompts,
        dense: &Var,
        history: &Tensor,
        observer: &mut Observer,
    ) -> Result<Answer, OpError> {
        let (rows, _) = self.prompt_encoder.tokens(tape, prompts, self.config.patch, false)?;
        let first = Tokens { rows, valid: None };
        self.interact_from(tape, features, &first, dense, history, observer)
    }

    /// The token sequence of prompts on a tape, as training has it: on a CUDA device it is padded,
    /// so that what is recorded for some number of tokens serves fewer as well.
    pub(crate) fn tokens<'m>(
        &'m self,
        tape: &Tape<'m>,
        prompts: &PatchPrompts,
    ) -> Result<Tokens, OpError> {
        let padded = matches!(self.device, Device::Cuda(_));
        let patch = self.config.patch;
        let (rows, count) = self.prompt_encoder.tokens(tape, prompts, patch, padded)?;
        let valid = match &self.device {
            Device::Cuda(cuda) => Some(cuda.upload(&[count as u32])?),
            Device::Cpu(_) => None,
        };
        Ok(Tokens { rows, valid })
    }

    /// One interaction as [`Model::interact_on`] does it, from its token sequence.
    pub(crate) fn interact_from<'m>(
        &'m self,
        tape: &Tape<'m>,
        features: &Features,
        first: &Tokens,
        dense: &Var,
        history: &Tensor,
        observer: &mut Observer,
    ) -> Result<Answer, OpError> {
        let s = self.config.patch;
        self.check_dense(dense.value())?;
        history.expect_shape("interact", "prompt maps", &[1, s, s, s, 2])?;
        // If the refiner reads the chosen mask, a device makes the choice, and nothing waits for
        // it. Without a refiner the mask's gradient goes back to its place among the candidates.
        let choose = |scores: &Tensor| -> Result<Option<Arc<Memory>>, OpError> {
            let (Device::Cuda(cuda), Some(_)) = (&self.device, &self.refiner) else {
                return Ok(None);
            };
            let report = cuda.allocate_bytes(4 * (1 + scores.len()))?;
            cuda_graphs::select(cuda, scores, &report)?;
            Ok(Some(report))
        };
        let first = (&first.rows, first.valid.as_ref());
        self.answer(tape, features, first, dense, history, choose, observer)
    }

    /// One interaction on a tape from the token sequence, of which the valid ones count. `choose`
    /// may say where on a device the choice among the scores is; otherwise it is made here.
    #[allow(clippy::too_many_arguments)]
    fn answer<'m>(
        &'m self,
        tape: &Tape<'m>,
        features: &Features,
        first: (&Var, ValidKeys),
        dense: &Var,
        history: &Tensor,
        choose: impl FnOnce(&Tensor) -> Result<Option<Arc<Memory>>, OpError>,
        observer: &mut Observer,
    ) -> Result<Answer, OpError> {
        let s = self.config.patch;
        let start = Instant::now();
        let dense = dense.reshape([1, s, s, s, 1]);
        let (last, image_tokens) =
            self.prompt_encoder.run(tape, &features.embedding, &self.grid_code, first, &dense)?;
        // If the work is recorded, the rest of the tokens' work runs in parallel with the decoder's
        // stages, which need only the image. A tape that is on is recorded in one line, as it runs
        // op by op.
        let branch = match &self.device {
            Device::Cuda(cuda) if !tape.is_on() => cuda.fork()?,
            _ => None,
        };
        let tokens = self.prompt_encoder.finish(tape, first.0, last)?;
        observer
            .see("tokens", || Ok(tokens.value().reshape([1, tokens.rows(), tokens.channels()])))?;
        observer.see("image_tokens", || Ok(image_tokens.value().clone()))?;
        let heads = (self.mask_decoder.heads(tape, &tokens)?, branch);
        if let (_, Some(branch)) = &heads {
            branch.back()?;
        }
        let encoded = Instant::now();
        let candidates =
            self.mask_decoder.run(tape, heads, &image_tokens, &features.skips, observer)?;
        observer.see("masks", || Ok(candidates.masks.value().clone()))?;
        let decoded = Instant::now();
        let chosen = choose(&candidates.scores)?;
        let choice = match &chosen {
            Some(chosen) => Choice::OnDevice(chosen),
            None => Choice::Known(candidates.place()?),
        };
        let logits =
            match self.refine_on(tape, features, (&candidates.masks, choice), history, observer)? {
                Some(refined) => refined,
                None => {
                    let flat = candidates.masks.reshape([candidates.masks.shape()[0], s * s * s]);
                    let chosen = match choice {
                        Choice::Known(selected) => tape.rows(&flat, selected, 1)?,
                        Choice::OnDevice(choice) => {
                            Var::constant(gather_row(&self.device, &flat, choice)?)
                        }
                    };
                    chosen.reshape([1, s, s, s, 1])
                }
            };
        observer.see("refined", || Ok(logits.value().clone()))?;
        let seconds = [encoded - start, decoded - encoded, decoded.elapsed()];
        Ok(Answer { candidates, logits, refined: self.refiner.is_some(), seconds, summary: None })
    }
}
