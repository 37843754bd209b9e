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
    /// f16, the loss scale is 65536, and half of what it was after each step whose gradients
    /// overflowed. A GPU replays recordings if `PRISM_CUDA_TRAIN_GRAPHS` is on.
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
    /// and waits for it; returns the loss before the step, and the norm of its gradients.
    ///
    /// If the norm is not finite, the step has changed no weights, and in f16 the loss scale is
    /// lowered: see [`TrainingStep::warm_up`].
    pub fn run(
        &mut self,
        image: &Tensor,
        target: &Target,
        prompts: &PatchPrompts,
    ) -> Result<(Outcome, f64), OpError> {
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
        let scale = self.share.scale;
        if !norm.is_finite() {
            self.optimizer.take_back();
            if scale > 1.0 {
                self.share.scale = scale / 2.0;
            }
        }
        Ok((outcomes.pop().unwrap_or_default(), norm / scale as f64))
    }

    /// Takes steps until one has changed the weights, and returns the loss before it and the norm
    /// of its gradients: in f16 the first ones may only lower the loss scale.
    ///
    /// # Errors
    /// Those of [`TrainingStep::run`]; the gradients are not finite without a loss scale either.
    pub fn warm_up(
        &mut self,
        image: &Tensor,
        target: &Target,
        prompts: &PatchPrompts,
    ) -> Result<(Outcome, f64), OpError> {
        loop {
            let scale = self.share.scale;
            let (outcome, norm) = self.run(image, target, prompts)?;
            if norm.is_finite() {
                return Ok((outcome, norm));
            }
            if scale <= 1.0 {
                let message = format!("the loss is {}, the gradients' norm {norm}", outcome.loss);
                return Err(OpError::Argument { op: "training step", message });
            }
        }
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::device::{Cpu, Cuda};
    use crate::ops::loss::KERNEL;

    /// Steps whose gradients overflow change nothing but the loss scale, which is lowered until a
    /// step changes the weights.
    #[test]
    fn a_loss_scale_that_overflows_is_lowered_until_a_step_learns() {
        let device = Device::Cuda(Cuda::emulated(Cpu::new(2).unwrap(), DType::F16, 0));
        let config = Config { patch: 16, ..Config::tiny() };
        let s = config.patch;
        let names: Vec<String> = config.tensors().into_iter().map(|(name, _)| name).collect();
        let mut step = TrainingStep::new(&device, config, 1, false);
        let bits = |step: &TrainingStep| -> Vec<Vec<u32>> {
            let of = |name: &String| -> Vec<u32> {
                step.weights.get(name).data().iter().map(|v| v.to_bits()).collect()
            };
            names.iter().map(of).collect()
        };
        let voxels = 0..s.pow(3);
        let image = voxels.clone().map(|i| ((i * 7919) % 997) as f32 / 500.0 - 1.0).collect();
        let image = Tensor::new([s; 3], image);
        let label = voxels.map(|i| f32::from(u8::from(i % s < s / 2))).collect();
        let target = Target::new(&device, label, [s; 3], KERNEL).unwrap();
        let prompts = PatchPrompts { points: vec![([5, 6, 7], true)], bounds: None };
        let before = bits(&step);

        let large = 2f32.powi(100);
        step.share.scale = large;
        let (outcome, norm) = step.run(&image, &target, &prompts).unwrap();
        assert!(outcome.loss.is_finite() && !norm.is_finite(), "{}, {norm}", outcome.loss);
        assert_eq!((step.share.scale, step.optimizer.steps()), (large / 2.0, 0));
        assert!(bits(&step) == before, "a step that overflowed changed something");

        // A score that is off by 0.01 has a gradient of 0.02, which this makes infinite in f16.
        let large = 2f32.powi(22);
        step.share.scale = large;
        let (first, norm) = step.warm_up(&image, &target, &prompts).unwrap();
        assert!(norm.is_finite() && norm > 0.0, "{norm}");
        assert!(step.share.scale < large, "nothing overflowed");
        assert_eq!((step.optimizer.steps(), first.loss), (1, outcome.loss));
        assert!(bits(&step) != before, "the weights are what they were");
        let (second, _) = step.run(&image, &target, &prompts).unwrap();
        assert_ne!(second.loss, first.loss);
    }
}
