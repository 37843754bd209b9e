//! A training step as it is timed: one item forward and backward, the gradients' norm, the
//! optimiser.

use crate::autograd::ParamGrads;
use crate::device::{DType, Device};
use crate::model::{Config, Model, PatchPrompts, Weights};
use crate::ops::loss::Target;
use crate::ops::optimizer::{AdamW, AdamWConfig, global_norm, upload_parameters};
use crate::tensor::{OpError, Tensor};
use crate::train::step::{LossWeights, Lost, Outcome, Share, run_item_sharing};

/// A network that learns and its optimiser, to be timed. Its weights are hashed
/// ([`Weights::hashed`]): made from nothing but their names.
pub struct TrainingStep {
    device: Device,
    weights: Weights,
    lengths: Vec<usize>,
    optimizer: AdamW,
    share: Share,
}

impl TrainingStep {
    /// A network of configuration `config` on a device for training ([`Device::for_training`]),
    /// which learns from one item in `iterations` iterations.
    ///
    /// With `recompute`, iterations are run again in the backward pass instead of being kept. In
    /// f16, the loss scale is 65536.
    pub fn new(
        device: &Device,
        config: Config,
        iterations: usize,
        recompute: bool,
    ) -> TrainingStep {
        let lengths: Vec<usize> =
            config.tensors().iter().map(|(_, shape)| shape.iter().product()).collect();
        let settings =
            AdamWConfig { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01, max_norm: 1.0 };
        let scale = if device.precision() == DType::F16 { 65536.0 } else { 1.0 };
        TrainingStep {
            device: device.clone(),
            weights: Weights::hashed(config, "public"),
            optimizer: AdamW::new(settings, &lengths),
            lengths,
            share: Share {
                weights: LossWeights::default(),
                iterations,
                batch: 1,
                recompute,
                scale,
            },
        }
    }

    /// Takes one step with a normalised image `[s, s, s]` and the same prompts in every iteration,
    /// and waits for it; returns the loss before the step.
    pub fn run(
        &mut self,
        image: &Tensor,
        target: &Target,
        prompts: &PatchPrompts,
    ) -> Result<Outcome, OpError> {
        let mut grads = ParamGrads::new(self.lengths.len());
        upload_parameters(&self.device, &mut self.weights.tensors_mut())?;
        let model = Model::new(&self.device, &self.weights)?;
        let lost = run_item_sharing(
            &self.device,
            &model,
            image,
            target,
            self.share,
            (&mut grads, None),
            |_, _| Ok(Some(prompts.clone().into())),
        )?;
        grads.settle(&self.device)?;
        // Its weights are about to change.
        drop(model);
        let gradients: Vec<Option<&Tensor>> =
            (0..self.lengths.len()).map(|id| grads.tensor(id)).collect();
        let norm = global_norm(&self.device, &gradients)?;
        self.optimizer.step(
            &self.device,
            1e-4,
            &mut self.weights.tensors_mut(),
            &gradients,
            &norm,
            self.share.scale as f64,
        )?;
        // All of the step's work is queued: here a GPU is waited for.
        let (mut outcomes, norm) = Lost::read_with(&self.device, &[lost], &norm)?;
        if !norm.is_finite() {
            self.optimizer.take_back();
        }
        Ok(outcomes.pop().unwrap_or_default())
    }
}
