//! The corrective refiner: a shallow residual network at half resolution that sees image, mask and all prompts so far.

use super::layers::{ConvNorm, Linear, Observer};
use super::weights::Weights;
use crate::device::Device;
use crate::ops::linear::Activation;
use crate::ops::norm::apply;
use crate::ops::pointwise::heads;
use crate::ops::resample::{double, halve};
use crate::tensor::{OpError, Tensor};

/// Its layers.
pub struct Refiner {
    first: Linear,
    blocks: [[ConvNorm; 2]; 2],
    /// Error and correction heads as one matrix `[2, width]` with bias `[2]`.
    heads: (Tensor, Tensor),
}

impl Refiner {
    pub fn load(device: &Device, w: &Weights) -> Result<Refiner, OpError> {
        let at = "mask_decoder.refine";
        let block = |b: usize| -> Result<[ConvNorm; 2], OpError> {
            let load = |i: usize| ConvNorm::load(device, w, &format!("{at}.conv{b}.conv_{i}"));
            Ok([load(0)?, load(1)?])
        };
        let both = |part: &str| -> Vec<f32> {
            let names = ["conv_error_map", "conv_correction"];
            names.iter().flat_map(|n| w.get(&format!("{at}.{n}.{part}")).data().to_vec()).collect()
        };
        Ok(Refiner {
            first: Linear::load(w, &format!("{at}.first_conv")),
            blocks: [block(1)?, block(2)?],
            heads: (Tensor::new([2, w.config.refine_width], both("weight")), Tensor::new([2], both("bias"))),
        })
    }

    /// Refines logits `m` `[s, s, s]`. `image` `[1, s/2, s/2, s/2, 1]` is already halved; `prompts` `[1, s, s, s, 2]` holds 1 where a positive
    /// (channel 0) or negative (channel 1) prompt was ever given. Returns logits `[1, s, s, s, 1]`.
    pub fn run(&self, device: &Device, image: &Tensor, m: &[f32], prompts: &Tensor, observer: &mut Observer) -> Result<Tensor, OpError> {
        let [_, s, ..] = prompts.map5("refine", "prompts")?;
        // The mask, its binarisation and both prompt maps are halved together.
        let mut full = device.cpu().take(m.len() * 4);
        device.cpu().chunks_mut(&mut full, 4 * s * s, |plane, full| {
            let at = plane * s * s;
            let prompts = prompts.data()[at * 2..].chunks_exact(2);
            for ((full, m), p) in full.chunks_exact_mut(4).zip(&m[at..]).zip(prompts) {
                full.copy_from_slice(&[f32::from(u8::from(*m > 0.0)), p[0], p[1], *m]);
            }
        });
        let full = Tensor::from_buffer([1, s, s, s, 4], full);
        let half = halve(device, &full)?;
        drop(full);
        let mut inputs = device.cpu().take(image.len() * 4);
        for ((v, i), h) in inputs.chunks_exact_mut(4).zip(image.data()).zip(half.data().chunks_exact(4)) {
            v.copy_from_slice(&[*i, h[0], h[1], h[2]]);
        }
        let e = s / 2;
        let inputs = Tensor::from_buffer([1, e, e, e, 4], inputs);
        let x = self.first.run(device, &inputs, Activation::None, None)?;
        let [first, second] = &self.blocks;
        let a = first[0].run(device, crate::ops::conv3d::Input::plain(&x))?;
        let b = first[1].run(device, a.input())?;
        let x = apply(device, &b.map, &b.norm, Some(&x))?;
        let a = second[0].run(device, crate::ops::conv3d::Input::plain(&x))?;
        let b = second[1].run(device, a.input())?;
        let maps = heads(device, &b.map, &b.norm, Some(&x), &self.heads.0, Some(&self.heads.1))?;

        let (error, correction) = maps.data().split_at(e * e * e);
        let mut answer = device.cpu().take(e * e * e);
        for (((y, error), correction), h) in answer.iter_mut().zip(error).zip(correction).zip(half.data().chunks_exact(4)) {
            *y = error * correction + h[3];
        }
        observer.see("error_map", || double(device, &Tensor::new([1, e, e, e, 1], error.to_vec())))?;
        double(device, &Tensor::from_buffer([1, e, e, e, 1], answer))
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().flatten().map(ConvNorm::bytes).sum()
    }
}
