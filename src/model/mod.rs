//! The network: configuration, weights, and the two programs that a session runs, encode and interact.
//!
//! One file a part. Everything is written once against the ops; maps are channels last.

pub mod checkpoint;
pub mod config;
mod image_encoder;
mod layers;
mod mask_decoder;
mod prompt_encoder;
mod refiner;
pub mod weights;

pub use config::{Config, Encoder, Intensity};
pub use layers::Observer;
pub use mask_decoder::Candidates;
pub use prompt_encoder::{PatchPrompts, prompt_maps};
pub use weights::{Weights, WeightsError};

use crate::autograd::{Tape, Var};
use crate::device::Device;
use crate::ops::resample::halve;
use crate::tensor::{OpError, Tensor};
use std::time::{Duration, Instant};

/// A network ready to run: weights laid out and composed for its device. Shared by any number of sessions.
pub struct Model {
    config: Config,
    device: Device,
    image_encoder: image_encoder::ImageEncoder,
    prompt_encoder: prompt_encoder::PromptEncoder,
    mask_decoder: mask_decoder::MaskDecoder,
    refiner: Option<refiner::Refiner>,
    grid_code: Tensor,
}

/// What encoding an image leaves behind: everything interactions need of it.
pub struct Features {
    /// `[1, g, g, g, width]`.
    embedding: Var,
    /// What each level contributes to its decoder stage, levels 0 to 3.
    skips: [Var; 4],
    /// The image at half resolution, for the refiner.
    half: Tensor,
}

impl Features {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        (self.skips.iter().map(|s| s.len()).sum::<usize>() + self.embedding.len() + self.half.len()) * 4
    }

    /// The same features as inputs of another tape.
    pub fn leaves(&self, tape: &Tape) -> Features {
        let leaf = |v: &Var| tape.leaf(v.value().clone());
        Features { embedding: leaf(&self.embedding), skips: self.skips.each_ref().map(leaf), half: self.half.clone() }
    }

    /// All that carries a gradient: the embedding and the skip maps of levels 0 to 3.
    pub fn vars(&self) -> [&Var; 5] {
        let [a, b, c, d] = &self.skips;
        [&self.embedding, a, b, c, d]
    }
}

/// One interaction's result.
pub struct Answer {
    /// The candidates and the choice among them.
    pub candidates: Candidates,
    /// The answer's logits `[1, s, s, s, 1]`: refined where the network has a refiner, else the chosen candidate.
    pub logits: Var,
    /// Whether a refiner made the answer.
    pub refined: bool,
    /// Time spent on prompts and tokens, decoder, refiner.
    pub seconds: [Duration; 3],
}

impl Model {
    /// Lays the weights out for `device`.
    pub fn new(device: &Device, weights: &Weights) -> Result<Model, OpError> {
        let config = weights.config.clone();
        let prompt_encoder = prompt_encoder::PromptEncoder::load(weights);
        Ok(Model {
            grid_code: prompt_encoder.grid_code(config.grid())?,
            image_encoder: image_encoder::ImageEncoder::load(device, weights)?,
            mask_decoder: mask_decoder::MaskDecoder::load(device, weights)?,
            refiner: config.corrective.then(|| refiner::Refiner::load(device, weights)).transpose()?,
            prompt_encoder,
            device: device.clone(),
            config,
        })
    }

    /// The architecture.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes of weights that were laid out anew, beside the model file's own.
    pub fn packed_bytes(&self) -> usize {
        self.image_encoder.bytes() + self.mask_decoder.bytes() + self.refiner.as_ref().map_or(0, refiner::Refiner::bytes)
    }

    /// Encodes a normalised image `[s, s, s]`, `s` the patch edge.
    pub fn encode(&self, image: &Tensor, observer: &mut Observer) -> Result<Features, OpError> {
        self.encode_on(&Tape::off(&self.device), image, observer)
    }

    /// The same on a tape.
    pub fn encode_on<'m>(&'m self, tape: &Tape<'m>, image: &Tensor, observer: &mut Observer) -> Result<Features, OpError> {
        let s = self.config.patch;
        if image.len() != s * s * s {
            return Err(image.misfit("encode", "image", format!("[{s}, {s}, {s}]")));
        }
        let image = Var::constant(image.reshape([1, s, s, s, 1]));
        let mut skips = [const { None }; 4];
        let embedding = self.image_encoder.run(tape, &image, observer, |level, feature, observer| {
            if let Some(source) = feature.source() {
                observer.see(&format!("feature{level}"), || Ok(Tape::off(&self.device).apply(source)?.value().clone()))?;
            }
            skips[level] = Some(self.mask_decoder.skip(tape, level, &feature, s)?);
            Ok(())
        })?;
        observer.see("image_embedding", || Ok(embedding.value().clone()))?;
        let skips = skips.map(|s| s.expect("the encoder calls back for levels 0 to 3"));
        Ok(Features { embedding, skips, half: halve(&self.device, &image)? })
    }

    /// The refiner alone, on logits `m` `[s, s, s]` of a mask: what [`Model::interact`] ends with. Without a refiner, the logits themselves.
    pub fn refine(&self, features: &Features, m: &[f32], history: &Tensor, observer: &mut Observer) -> Result<Tensor, OpError> {
        let s = self.config.patch;
        if m.len() != s * s * s {
            let message = format!("the mask has {} voxels, expected {s}³", m.len());
            return Err(OpError::Argument { op: "refine", message });
        }
        let m = Tensor::new([1, s, s, s, 1], m.to_vec());
        Ok(match self.refine_on(&Tape::off(&self.device), features, (&m, 0), history, observer)? {
            Some(refined) => refined.value().clone(),
            None => m,
        })
    }

    /// The refiner on a tape, where there is one.
    fn refine_on<'m>(
        &'m self,
        tape: &Tape<'m>,
        features: &Features,
        masks: (&Tensor, usize),
        history: &Tensor,
        observer: &mut Observer,
    ) -> Result<Option<Var>, OpError> {
        let s = self.config.patch;
        history.expect("refine", "prompt maps", &[1, s, s, s, 2])?;
        self.refiner.as_ref().map(|r| r.run(tape, &features.half, masks, history, observer)).transpose()
    }

    /// One interaction: `prompts` of this iteration, the dense prompt `dense` `[s, s, s]` (the previous answer's logits, or zeros), and
    /// `history` `[1, s, s, s, 2]`, holding 1 at every positive and negative prompt voxel so far.
    pub fn interact(
        &self,
        features: &Features,
        prompts: &PatchPrompts,
        dense: &Tensor,
        history: &Tensor,
        observer: &mut Observer,
    ) -> Result<Answer, OpError> {
        self.interact_on(&Tape::off(&self.device), features, prompts, &Var::constant(dense.clone()), history, observer)
    }

    /// The same on a tape. The mask reaches the refiner without its gradient.
    pub fn interact_on<'m>(
        &'m self,
        tape: &Tape<'m>,
        features: &Features,
        prompts: &PatchPrompts,
        dense: &Var,
        history: &Tensor,
        observer: &mut Observer,
    ) -> Result<Answer, OpError> {
        let s = self.config.patch;
        if dense.len() != s * s * s {
            return Err(dense.misfit("interact", "dense prompt", format!("[{s}, {s}, {s}]")));
        }
        history.expect("interact", "prompt maps", &[1, s, s, s, 2])?;
        let start = Instant::now();
        let dense = dense.reshape([1, s, s, s, 1]);
        let (tokens, image_tokens) = self.prompt_encoder.run(tape, &features.embedding, &self.grid_code, prompts, &dense)?;
        observer.see("tokens", || Ok(tokens.value().reshape([1, tokens.rows(), tokens.channels()])))?;
        observer.see("image_tokens", || Ok(image_tokens.value().clone()))?;
        let encoded = Instant::now();
        let candidates = self.mask_decoder.run(tape, &tokens, &image_tokens, &features.skips, observer)?;
        observer.see("masks", || Ok(candidates.masks.value().clone()))?;
        let decoded = Instant::now();
        let logits = match self.refine_on(tape, features, (&candidates.masks, candidates.selected), history, observer)? {
            Some(refined) => refined,
            None => {
                let flat = candidates.masks.reshape([candidates.scores.len(), s * s * s]);
                tape.rows(&flat, candidates.selected, 1)?.reshape([1, s, s, s, 1])
            }
        };
        observer.see("refined", || Ok(logits.value().clone()))?;
        let seconds = [encoded - start, decoded - encoded, decoded.elapsed()];
        Ok(Answer { candidates, logits, refined: self.refiner.is_some(), seconds })
    }
}
