//! The corrective refiner: a shallow residual network at half resolution that sees image, mask and
//! all prompts so far.

use super::layers::{ConvNorm, Linear, Observer, Reader};
use super::weights::Weights;
use crate::autograd::{Tape, TapeInput, Var};
use crate::device::Device;
use crate::ops::linear::Activation;
use crate::ops::refiner_input::{Choice, refiner_input};
use crate::ops::resample::upsample2_trilinear;
use crate::ops::rows;
use crate::tensor::{OpError, Param, Tensor};

/// The refiner's layers.
pub struct Refiner {
    first: Linear,
    blocks: [[ConvNorm; 2]; 2],
    /// Error and correction heads.
    heads: [(Param, Param); 2],
    /// The heads' weights `[2, c]` and biases `[2]` as constants, for a tape that is off.
    stacked: [Tensor; 2],
}

impl Refiner {
    pub fn load(device: &Device, w: &Weights) -> Result<Refiner, OpError> {
        let at = "mask_decoder.refine";
        let block = |b: usize| -> Result<[ConvNorm; 2], OpError> {
            let load = |i: usize| ConvNorm::load(device, w, &format!("{at}.conv{b}.conv_{i}"));
            Ok([load(0)?, load(1)?])
        };
        let head = |name: &str| {
            (w.get(&format!("{at}.{name}.weight")), w.get(&format!("{at}.{name}.bias")))
        };
        let heads = ["conv_error_map", "conv_correction"].map(head);
        let joined = |of: fn(&(Param, Param)) -> &Param| -> Result<Tensor, OpError> {
            let [error, correction] =
                heads.each_ref().map(of).map(|value| value.reshape([1, value.len()]));
            rows::concat(device, &[&error, &correction])
        };
        let (weights, biases) = (joined(|h| &h.0)?, joined(|h| &h.1)?);
        Ok(Refiner {
            first: Linear::load(w, &format!("{at}.first_conv")),
            blocks: [block(1)?, block(2)?],
            stacked: [weights, biases.reshape([2])],
            heads,
        })
    }

    /// Refines candidate `choice` of `masks`, logits `[m, s, s, s]` whose gradient ends here.
    /// `image` `[1, s/2, s/2, s/2, 1]` is already halved; `prompts` `[1, s, s, s, 2]` holds 1 where
    /// a positive (channel 0) or negative (channel 1) prompt was ever given. Returns logits `[1, s,
    /// s, s, 1]`.
    pub fn run<'m>(
        &'m self,
        tape: &Tape<'m>,
        image: &Tensor,
        (masks, choice): (&Tensor, Choice),
        prompts: &Tensor,
        observer: &mut Observer,
    ) -> Result<Var, OpError> {
        let (device, e) = (tape.device(), image.map5("refine", "image")?[1]);
        let (inputs, m) = refiner_input(device, image, masks, choice, prompts)?;
        let inputs = Var::constant(inputs);
        let Linear(weight, bias) = &self.first;
        let x = tape.linear(&inputs, weight, Some(bias), Activation::None, None)?;
        let [first, second] = &self.blocks;
        let a = first[0].run(tape, TapeInput::shared(&x), Reader::Plain)?;
        let b = first[1].run(tape, a.into_input(), Reader::Plain)?;
        let x = tape.apply(b.input().plus(Some(&x)))?;
        let a = second[0].run(tape, TapeInput::shared(&x), Reader::Plain)?;
        let b = second[1].run(tape, a.into_input(), Reader::Plain)?;
        let [weights, bias] = match tape.is_on() {
            true => {
                let weights = self.heads.each_ref().map(|(w, _)| tape.param(w, [1, w.len()]));
                let biases = self.heads.each_ref().map(|(_, b)| tape.param(b, [1, 1]));
                [tape.concat(&weights)?, tape.concat(&biases)?.reshape([2])]
            }
            false => self.stacked.clone().map(Var::constant),
        };
        let maps = tape.mask_logits(b.input().plus(Some(&x)), &weights, Some(&bias))?;

        let maps = maps.reshape([2, e * e * e]);
        let (error, correction) = (tape.rows(&maps, 0, 1)?, tape.rows(&maps, 1, 1)?);
        observer.see("error_map", || {
            upsample2_trilinear(device, &error.value().reshape([1, e, e, e, 1]))
        })?;
        let answer = tape.multiply_add(&error, &correction, &m)?;
        tape.upsample2_trilinear(&answer.reshape([1, e, e, e, 1]))
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().flatten().map(ConvNorm::bytes).sum()
    }
}
