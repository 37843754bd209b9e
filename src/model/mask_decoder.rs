//! The mask decoder: four upsampling stages, candidate masks with scores, the choice among them.

use super::image_encoder::Feature;
use super::layers::{ConvNorm, InstanceNorm, Mlp, Observer, Reader};
use super::weights::Weights;
use crate::autograd::{Normed, Tape, TapeInput, UpStage, Var};
use crate::device::Device;
use crate::device::cuda::Fork;
use crate::ops::pointwise::chosen_mask_logits;
use crate::tensor::OpError;

/// The decoder's stages and heads.
pub struct MaskDecoder {
    /// Stages 4, 3, 2, 1.
    stages: Vec<Stage>,
    hypernetworks: Vec<Mlp>,
    scores: Mlp,
    confidence: bool,
}

struct Stage {
    first: UpStage,
    norm: InstanceNorm,
    second: ConvNorm,
}

/// What the tokens give for the candidates.
pub struct Heads {
    /// `[m, 1]`, in 0 to 1.
    scores: Var,
    /// Each mask's weights of the last stage's channels, `[m, c]`.
    weights: Var,
}

/// The mask decoder's result: candidate masks of one interaction, and their scores.
pub struct Candidates {
    /// Logits `[m, s, s, s]`; if there are `bits` of all candidates, `[1, s, s, s]`, those of the
    /// chosen one alone.
    pub masks: Var,
    /// One bit per voxel of every candidate, set if positive, first voxel in the highest bit.
    pub bits: Option<Vec<Vec<u8>>>,
    /// The network's estimate of each candidate's Dice, `[m, 1]`, 0 to 1.
    pub scores: Var,
}

fn best(scores: &[f32]) -> usize {
    (1..scores.len()).fold(0, |best, j| if scores[j] > scores[best] { j } else { best })
}

impl Candidates {
    /// The index of the chosen candidate: the one with the highest score, the first of equal ones.
    ///
    /// # Errors
    /// The device fails, from which scores are copied.
    pub fn selected(&self) -> Result<usize, OpError> {
        Ok(best(self.scores.try_data()?))
    }

    /// The index of the chosen candidate in `masks`, which may hold that one alone.
    ///
    /// # Errors
    /// As [`Candidates::selected`].
    pub fn place(&self) -> Result<usize, OpError> {
        if self.bits.is_some() { Ok(0) } else { self.selected() }
    }

    /// The chosen candidate's logits, `s³` values `[i][j][k]`.
    ///
    /// # Errors
    /// As [`Candidates::selected`].
    pub fn selected_logits(&self) -> Result<&[f32], OpError> {
        let voxels = self.masks.len() / self.masks.shape()[0];
        Ok(&self.masks.try_data()?[self.place()? * voxels..][..voxels])
    }
}

impl MaskDecoder {
    pub fn load(device: &Device, w: &Weights) -> Result<MaskDecoder, OpError> {
        let stage = |level: usize| -> Result<Stage, OpError> {
            let at = format!("mask_decoder.decoder.upcat_{level}");
            let [deconv, conv] = ["upsample.deconv", "convs.conv_0.conv"]
                .map(|name| ["weight", "bias"].map(|part| w.get(&format!("{at}.{name}.{part}"))));
            Ok(Stage {
                first: UpStage::new(device, deconv, conv)?.in_front_of_norm(),
                norm: InstanceNorm::load(w, &format!("{at}.convs.conv_0.adn.N")),
                second: ConvNorm::load(device, w, &format!("{at}.convs.conv_1"))?,
            })
        };
        let hypernetwork =
            |j: usize| Mlp::load(w, &format!("mask_decoder.output_hypernetworks_mlps.{j}"));
        Ok(MaskDecoder {
            stages: (1..5).rev().map(stage).collect::<Result<_, _>>()?,
            hypernetworks: (0..w.config.candidates + 1).map(hypernetwork).collect(),
            scores: Mlp::load(w, "mask_decoder.iou_prediction_head"),
            confidence: w.config.confidence,
        })
    }

    /// An image feature's contribution to its stage, independent of the prompts: level 0 feeds
    /// stage 1, level 3 stage 4.
    pub fn skip<'m>(
        &'m self,
        tape: &Tape<'m>,
        level: usize,
        feature: Feature,
        patch: usize,
    ) -> Result<Var, OpError> {
        let edge = patch >> level;
        tape.skip_map(&self.stages[3 - level].first, feature.into_input(), [1, edge, edge, edge])
    }

    /// Computes the heads of the candidates from the transformer's `tokens` `[t, width]`.
    pub fn heads<'m>(&'m self, tape: &Tape<'m>, tokens: &Var) -> Result<Heads, OpError> {
        let wanted = if self.confidence { 1..self.hypernetworks.len() } else { 0..1 };
        // The score token's network, then each mask token's.
        let mut mlps = vec![&self.scores];
        mlps.extend(&self.hypernetworks[wanted.clone()]);
        let at = std::iter::once(0).chain(wanted.clone().map(|j| 1 + j));
        let rows = at.map(|row| tape.rows(tokens, row, 1)).collect::<Result<Vec<_>, _>>()?;
        let made = Mlp::run_rows(&mlps, tape, rows)?;
        let (all, weights) = made.split_first().expect("the score token's is the first");
        let column = all.reshape([all.channels(), 1]);
        let scores = tape.sigmoid(&tape.rows(&column, wanted.start, wanted.len())?)?;
        Ok(Heads { scores, weights: tape.concat(weights)? })
    }

    /// Candidates from the transformer's `image_tokens` and the heads of its tokens, and the
    /// `skips` of levels 0 to 3. If the tokens' work is in a branch of its own, masks wait for it.
    pub fn run<'m>(
        &'m self,
        tape: &Tape<'m>,
        (Heads { scores, weights }, branch): (Heads, Option<Fork>),
        image_tokens: &Var,
        skips: &[Var; 4],
        observer: &mut Observer,
    ) -> Result<Candidates, OpError> {
        let mut x: Option<Normed> = None;
        for (i, stage) in self.stages.iter().enumerate() {
            let input = x.as_ref().map_or_else(|| TapeInput::shared(image_tokens), Normed::input);
            let output = tape.decoder_stage(&stage.first, input, &skips[3 - i])?;
            let a = stage.norm.over(tape, output)?;
            let b = stage.second.run(tape, a.into_input(), Reader::Plain)?;
            observer.see(&format!("u{}", 4 - i), || b.value(tape.device()))?;
            x = Some(b);
        }
        let x = x.expect("there are four stages");

        if let Some(branch) = branch {
            branch.join()?;
        }
        if let (false, false, Device::Cpu(cpu)) =
            (tape.is_on(), observer.wants_results(), tape.device())
        {
            // If no observer wants results, one map is stored instead of all.
            let chosen = best(scores.data());
            let (map, bits) = chosen_mask_logits(cpu, x.map(), x.norm(), &weights, chosen)?;
            return Ok(Candidates { masks: Var::constant(map), scores, bits: Some(bits) });
        }
        let masks = tape.mask_logits(x.input(), &weights, None)?;
        Ok(Candidates { masks, scores, bits: None })
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        self.stages.iter().map(|s| s.first.bytes() + s.second.bytes()).sum()
    }
}
