//! A training step as it is timed: one item forward and backward, the gradients' norm, the
//! optimiser.

use crate::autograd::ParamGrads;
use crate::device::{DType, Device};
use crate::model::{Config, Model, PatchPrompts, Weights};
use crate::ops::loss::Target;
use crate::ops::optimizer::{AdamW, AdamWConfig, global_norm, upload_parameters};
use crate::tensor::{OpError, Tensor};
use crate::train::step::{LossWeights, Lost, Outcome, Recorder, Round, Share, run_item_sharing};

/// A network that learns and its optimiser, to be timed. Its weights are hashed
/// ([`Weights::hashed`]): made from nothing but their names.
pub struct TrainingStep {
    device: Device,
    weights: Weights,
    lengths: Vec<usize>,
    optimizer: AdamW,
    share: Share,
    recorder: Option<Recorder>,
}

impl TrainingStep {
    /// A network of configuration `config` on a device for training ([`Device::for_training`]),
    /// which learns from one item in `iterations` iterations.
    ///
    /// With `recompute`, iterations are run again in the backward pass instead of being kept. In
    /// f16, the loss scale is 65536. A GPU replays recordings if `PRISM_CUDA_TRAIN_GRAPHS` is on.
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
            recorder: Recorder::wanted(device),
            weights: Weights::hashed(config, "public"),
            optimizer: AdamW::new(settings, &lengths),
            lengths,
            share: Share {
                weights: LossWeights::default(),
                iterations,
                batch: 1,
                recompute: recompute.into(),
                scale,
            },
        }
    }

    /// This step by replay, whatever `PRISM_CUDA_TRAIN_GRAPHS` says, if the device is a CUDA
    /// device.
    pub fn replayed(self) -> TrainingStep {
        let recorder = match &self.device {
            Device::Cuda(cuda) => Some(Recorder::new(cuda)),
            Device::Cpu(_) => None,
        };
        TrainingStep { recorder, ..self }
    }

    /// How many recordings were made: of encoding, of iterations with and without their backward
    /// pass.
    pub fn recorded(&self) -> [usize; 3] {
        self.recorder.as_ref().map_or([0; 3], Recorder::recorded)
    }

    /// Takes one step with a normalised image `[s, s, s]` and the same prompts in every iteration,
    /// and waits for it; returns the loss before the step.
    pub fn run(
        &mut self,
        image: &Tensor,
        target: &Target,
        prompts: &PatchPrompts,
    ) -> Result<Outcome, OpError> {
        upload_parameters(&self.device, &mut self.weights.tensors_mut())?;
        let mut prompt = |_: usize, _: Option<&Tensor>| -> Result<Option<Round>, OpError> {
            Ok(Some(prompts.clone().into()))
        };
        let (lost, grads) = match &mut self.recorder {
            Some(recorder) => {
                let mut grads = recorder.begin(&self.weights)?;
                let all = (&mut grads, true);
                (recorder.item(image, target, self.share, all, &mut prompt)?, grads)
            }
            None => {
                let model = Model::new(&self.device, &self.weights)?;
                let mut grads = ParamGrads::new(self.lengths.len());
                let lost = run_item_sharing(
                    &self.device,
                    &model,
                    image,
                    target,
                    self.share,
                    (&mut grads, None),
                    prompt,
                )?;
                grads.settle(&self.device)?;
                // The model ends here: its weights are about to change.
                (lost, grads)
            }
        };
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
