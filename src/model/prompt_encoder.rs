//! The prompt encoder: points, box and dense prompt to tokens, and the two-way transformer between tokens and image.

use super::layers::{ENCODER_EPS, EPS, LayerNorm, Linear};
use super::weights::Weights;
use crate::device::Device;
use crate::ops::attention::{TwoWayWeights, two_way_attention};
use crate::ops::linear::Activation;
use crate::ops::pointwise::add;
use crate::ops::strided::patch_conv;
use crate::ops::{position, resample};
use crate::tensor::{OpError, Tensor};

/// The sparse prompts of one iteration, in voxels of the patch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PatchPrompts {
    /// Voxel indices `[i, j, k]`, positive where true. A scribble is its voxels.
    pub points: Vec<([i32; 3], bool)>,
    /// `[i0, j0, k0, i1, j1, k1]`, the ends one past the last voxel.
    pub bounds: Option<[f32; 6]>,
}

/// Embeddings, the dense prompt's convolutions and the transformer.
pub struct PromptEncoder {
    gaussian: Tensor,
    labels: [Tensor; 4],
    not_a_point: Tensor,
    first_tokens: Tensor,
    dense: [(Linear, Option<LayerNorm>); 3],
    layers: Vec<Layer>,
    final_attention: TwoWayWeights,
    final_norm: LayerNorm,
}

struct Layer {
    own: TwoWayWeights,
    to_image: TwoWayWeights,
    to_tokens: TwoWayWeights,
    norms: [LayerNorm; 4],
    lin1: Linear,
    lin2: Linear,
}

impl PromptEncoder {
    pub fn load(w: &Weights) -> PromptEncoder {
        let (at, heads) = ("prompt_encoder", w.config.prompt_heads);
        let token = |name: &str| w.get(&format!("{at}.{name}.weight"));
        let tokens = [token("iou_token"), token("mask_tokens")];
        let rows = tokens.iter().map(Tensor::rows).sum::<usize>();
        let first = tokens.iter().flat_map(|t| t.data()).copied().collect();
        let attention = |at: String| {
            let pair = |name: &str| (w.get(&format!("{at}.{name}.weight")), w.get(&format!("{at}.{name}.bias")));
            TwoWayWeights { q: pair("q_proj"), k: pair("k_proj"), v: pair("v_proj"), out: pair("out_proj"), heads }
        };
        let down = |i: usize| Linear::load(w, &format!("{at}.mask_downscaling.{i}"));
        let norm = |i: usize| LayerNorm::load(w, &format!("{at}.mask_downscaling.{i}"), ENCODER_EPS);
        let layers = (0..w.config.prompt_depth).map(|layer| {
            let at = format!("{at}.transformer.layers.{layer}");
            Layer {
                own: attention(format!("{at}.self_attn")),
                to_image: attention(format!("{at}.cross_attn_token_to_image")),
                to_tokens: attention(format!("{at}.cross_attn_image_to_token")),
                norms: [1, 2, 3, 4].map(|n| LayerNorm::load(w, &format!("{at}.norm{n}"), EPS as f32)),
                lin1: Linear::load(w, &format!("{at}.mlp.lin1")),
                lin2: Linear::load(w, &format!("{at}.mlp.lin2")),
            }
        });
        PromptEncoder {
            gaussian: w.get(&format!("{at}.pe_layer.positional_encoding_gaussian_matrix")),
            labels: [0, 1, 2, 3].map(|i| token(&format!("point_embeddings.{i}"))),
            not_a_point: token("not_a_point_embed"),
            first_tokens: Tensor::new([rows, w.config.width()], first),
            dense: [(down(0), Some(norm(1))), (down(3), Some(norm(4))), (down(6), None)],
            layers: layers.collect(),
            final_attention: attention(format!("{at}.transformer.final_attn_token_to_image")),
            final_norm: LayerNorm::load(w, &format!("{at}.transformer.norm_final_attn"), EPS as f32),
        }
    }

    /// The position code of the token grid, `[grid, grid, grid, width]`.
    pub fn grid_code(&self, grid: usize) -> Result<Tensor, OpError> {
        position::grid(&self.gaussian, [grid; 3])
    }

    /// The token sequence: score token, mask tokens, points (and a padding point without a box), box corners; `[t, width]`.
    fn tokens(&self, prompts: &PatchPrompts, patch: usize) -> Result<Tensor, OpError> {
        let mut positions: Vec<[f64; 3]> = prompts.points.iter().map(|(p, _)| p.map(f64::from)).collect();
        let mut kinds: Vec<Option<usize>> = prompts.points.iter().map(|(_, positive)| Some(usize::from(*positive))).collect();
        match prompts.bounds {
            Some(b) => {
                positions.extend([[b[0], b[1], b[2]], [b[3], b[4], b[5]]].map(|c| c.map(f64::from)));
                kinds.extend([Some(2), Some(3)]);
            }
            None if !kinds.is_empty() => {
                positions.push([0.0; 3]);
                kinds.push(None);
            }
            None => {}
        }
        let codes = position::points(&self.gaussian, &positions, [patch; 3], 0.5)?;
        let width = self.first_tokens.channels();
        let mut tokens = self.first_tokens.data().to_vec();
        for (code, kind) in codes.data().chunks_exact(width).zip(kinds) {
            match kind {
                Some(label) => tokens.extend(code.iter().zip(self.labels[label].data()).map(|(c, l)| c + l)),
                None => tokens.extend_from_slice(self.not_a_point.data()),
            }
        }
        Ok(Tensor::new([tokens.len() / width, width], tokens))
    }

    /// `dense` logits `[1, s, s, s, 1]` to `[1, s/16, s/16, s/16, width]`.
    fn dense(&self, device: &Device, dense: &Tensor) -> Result<Tensor, OpError> {
        let first = resample::quarter(device, dense)?;
        self.dense.iter().try_fold(first, |x, (conv, norm)| {
            let x = patch_conv(device, &x, &conv.0, Some(&conv.1))?;
            norm.as_ref().map_or(Ok(x.clone()), |norm| norm.gelu(device, &x))
        })
    }

    /// Tokens `[t, width]` and image tokens `[1, g, g, g, width]` after the transformer.
    pub fn run(
        &self,
        device: &Device,
        embedding: &Tensor,
        grid_code: &Tensor,
        prompts: &PatchPrompts,
        dense: &Tensor,
    ) -> Result<(Tensor, Tensor), OpError> {
        let first = self.tokens(prompts, dense.shape()[1])?;
        let width = first.channels();
        let flat = [embedding.len() / width, width];
        let mut keys = add(device, embedding, &self.dense(device, dense)?)?.reshape(flat);
        let code = grid_code.reshape(flat);
        let mut queries = first.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            queries = match i {
                // The first layer's own attention has neither positions nor a residual.
                0 => two_way_attention(device, &layer.own, &queries, &queries, &queries, None)?,
                _ => {
                    let q = add(device, &queries, &first)?;
                    two_way_attention(device, &layer.own, &q, &q, &queries, Some(&queries))?
                }
            };
            queries = layer.norms[0].run(device, &queries)?;
            let (q, k) = (add(device, &queries, &first)?, add(device, &keys, &code)?);
            queries = two_way_attention(device, &layer.to_image, &q, &k, &keys, Some(&queries))?;
            queries = layer.norms[1].run(device, &queries)?;
            let hidden = layer.lin1.run(device, &queries, Activation::Relu, None)?;
            queries = layer.lin2.run(device, &hidden, Activation::None, Some(&queries))?;
            queries = layer.norms[2].run(device, &queries)?;
            let q = add(device, &queries, &first)?;
            keys = two_way_attention(device, &layer.to_tokens, &k, &q, &queries, Some(&keys))?;
            keys = layer.norms[3].run(device, &keys)?;
        }
        let (q, k) = (add(device, &queries, &first)?, add(device, &keys, &code)?);
        queries = two_way_attention(device, &self.final_attention, &q, &k, &keys, Some(&queries))?;
        Ok((self.final_norm.run(device, &queries)?, keys.reshape(embedding.shape())))
    }
}
