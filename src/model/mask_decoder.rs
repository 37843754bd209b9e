//! The mask decoder: four upsampling stages, candidate masks with scores, the choice among them.

use super::image_encoder::Feature;
use super::layers::{ConvNorm, InstanceNorm, Mlp, Normed, Observer};
use super::weights::Weights;
use crate::device::Device;
use crate::ops::conv3d::Input;
use crate::ops::decoder_stage::{DecoderStage, decoder_stage, skip_map};
use crate::ops::pointwise::{heads, sigmoid};
use crate::tensor::{OpError, Tensor};

/// The decoder's stages and heads.
pub struct MaskDecoder {
    /// Stages 4, 3, 2, 1.
    stages: Vec<Stage>,
    hypernetworks: Vec<Mlp>,
    scores: Mlp,
    confidence: bool,
}

struct Stage {
    first: DecoderStage,
    norm: InstanceNorm,
    second: ConvNorm,
}

/// What the decoder says of one iteration.
pub struct Candidates {
    /// Logits `[m, s, s, s]`.
    pub masks: Tensor,
    /// `[m]`, in 0 to 1.
    pub scores: Vec<f32>,
    /// Which one is chosen.
    pub selected: usize,
}

impl Candidates {
    /// The chosen candidate's logits, `s³` values.
    pub fn selected_logits(&self) -> &[f32] {
        let voxels = self.masks.len() / self.masks.shape()[0];
        &self.masks.data()[self.selected * voxels..][..voxels]
    }
}

impl MaskDecoder {
    pub fn load(device: &Device, w: &Weights) -> Result<MaskDecoder, OpError> {
        let stage = |level: usize| -> Result<Stage, OpError> {
            let at = format!("mask_decoder.decoder.upcat_{level}");
            let [deconv, conv] =
                ["upsample.deconv", "convs.conv_0.conv"].map(|name| ["weight", "bias"].map(|part| w.get(&format!("{at}.{name}.{part}"))));
            Ok(Stage {
                first: DecoderStage::new(device, &deconv[0], &deconv[1], &conv[0], &conv[1])?,
                norm: InstanceNorm::load(w, &format!("{at}.convs.conv_0.adn.N")),
                second: ConvNorm::load(device, w, &format!("{at}.convs.conv_1"))?,
            })
        };
        let hypernetwork = |j: usize| Mlp::load(w, &format!("mask_decoder.output_hypernetworks_mlps.{j}"));
        Ok(MaskDecoder {
            stages: (1..5).rev().map(stage).collect::<Result<_, _>>()?,
            hypernetworks: (0..w.config.candidates + 1).map(hypernetwork).collect(),
            scores: Mlp::load(w, "mask_decoder.iou_prediction_head"),
            confidence: w.config.confidence,
        })
    }

    /// What an image feature contributes to its stage, whatever the prompts: level 0 feeds stage 1, level 3 stage 4.
    pub fn skip(&self, device: &Device, level: usize, feature: &Feature, patch: usize) -> Result<Tensor, OpError> {
        let edge = patch >> level;
        skip_map(device, &self.stages[3 - level].first, feature.input(), [1, edge, edge, edge])
    }

    /// Candidates from the transformer's `tokens` `[t, width]` and `image_tokens`, and the `skips` of levels 0 to 3.
    pub fn run(
        &self,
        device: &Device,
        tokens: &Tensor,
        image_tokens: &Tensor,
        skips: &[Tensor; 4],
        observer: &mut Observer,
    ) -> Result<Candidates, OpError> {
        let mut x: Option<Normed> = None;
        for (i, stage) in self.stages.iter().enumerate() {
            let input = x.as_ref().map_or(Input::plain(image_tokens), Normed::input);
            let (map, sums) = decoder_stage(device, &stage.first, input, &skips[3 - i])?;
            let a = stage.norm.over(map, &sums)?;
            let b = stage.second.run(device, a.input())?;
            observer.see(&format!("u{}", 4 - i), || b.value(device))?;
            x = Some(b);
        }
        let x = x.expect("there are four stages");

        let width = tokens.channels();
        let token = |row: usize| Tensor::new([1, width], tokens.data()[row * width..][..width].to_vec());
        let all = sigmoid(device, &self.scores.run(device, &token(0))?);
        let wanted = if self.confidence { 1..self.hypernetworks.len() } else { 0..1 };
        let mut weights = vec![];
        for j in wanted.clone() {
            weights.extend_from_slice(self.hypernetworks[j].run(device, &token(1 + j))?.data());
        }
        let weights = Tensor::new([wanted.len(), weights.len() / wanted.len()], weights);
        let masks = heads(device, &x.map, &x.norm, None, &weights, None)?;
        let scores = all.data()[wanted].to_vec();
        let best = |best: usize, j: usize| if scores[j] > scores[best] { j } else { best };
        let selected = (1..scores.len()).fold(0, best);
        Ok(Candidates { masks, scores, selected })
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        self.stages.iter().map(|s| s.first.bytes() + s.second.bytes()).sum()
    }
}
