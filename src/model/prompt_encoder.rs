//! The prompt encoder: points, box and dense prompt to tokens, and the two-way transformer between
//! tokens and image.

use super::layers::{ENCODER_EPS, EPS, LayerNorm, Linear};
use super::weights::Weights;
use crate::autograd::{Tape, TokenLayer, TokenRows, Var};
use crate::device::cuda::{Launch, Memory, Pointer, kernels};
use crate::device::{Cuda, Device};
use crate::memory;
use crate::ops::attention::{TwoWayWeights, ValidKeys};
use crate::ops::linear::Activation;
use crate::ops::position;
use crate::ops::tokens::bucket;
use crate::tensor::{OpError, Param, Tensor};
use std::sync::Arc;

/// The sparse prompts of one iteration, in voxels of the patch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PatchPrompts {
    /// Voxel indices `[i, j, k]`, positive where true. A scribble is its voxels.
    pub points: Vec<([i32; 3], bool)>,
    /// `[i0, j0, k0, i1, j1, k1]`, the ends one past the last voxel.
    pub bounds: Option<[f32; 6]>,
}

/// The refiner's prompt maps `[1, edge, edge, edge, 2]` of all points so far: 1 at positive ones in
/// channel 0, at negative ones in channel 1.
#[derive(Clone, Debug)]
pub enum PromptMaps {
    /// The maps themselves.
    Maps(Tensor),
    /// For a CUDA device, on which the maps are made: the edge, and the positions of the ones,
    /// which are uploaded with the tokens.
    Places(usize, Vec<u32>),
}

/// The frequencies of the position codes: the only parameter that is not trained.
pub(crate) const GAUSSIAN: &str = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix";

/// What messages call the memory of what the network is told.
pub(super) const TOKENS: &str = "the prompts of the network";

/// A token sequence that may go on behind its last token.
pub struct Tokens {
    /// `[t, width]`.
    pub rows: Var,
    /// How many of the rows are tokens, in the memory of a CUDA device, as an `int`; the others are
    /// padding. None if all are tokens.
    pub valid: Option<Arc<Memory>>,
}

/// The prompt maps of `points`, for a patch of `edge` voxels a side on `device`.
///
/// # Panics
/// A point outside the patch panics, or marks another voxel.
pub fn prompt_maps<'a>(
    device: &Device,
    edge: usize,
    points: impl IntoIterator<Item = &'a ([i32; 3], bool)>,
) -> PromptMaps {
    let at = |(p, positive): &([i32; 3], bool)| {
        let [i, j, k] = p.map(|c| c as usize);
        ((i * edge + j) * edge + k) * 2 + usize::from(!positive)
    };
    let places = points.into_iter().map(at);
    match device {
        Device::Cpu(cpu) => {
            let mut maps = cpu.zeros(edge * edge * edge * 2);
            places.for_each(|at| maps[at] = 1.0);
            PromptMaps::Maps(Tensor::from_buffer([1, edge, edge, edge, 2], maps))
        }
        Device::Cuda(_) => {
            let mut list = vec![];
            for at in places {
                memory::reserve(TOKENS, &mut list, 1);
                list.push(at as u32);
            }
            PromptMaps::Places(edge, list)
        }
    }
}

impl PromptMaps {
    pub(super) fn expect_edge(&self, op: &'static str, edge: usize) -> Result<(), OpError> {
        match self {
            PromptMaps::Maps(maps) => {
                maps.expect_shape(op, "prompt maps", &[1, edge, edge, edge, 2])
            }
            PromptMaps::Places(own, _) if *own == edge => Ok(()),
            PromptMaps::Places(own, _) => Err(OpError::Argument {
                op,
                message: format!("prompt maps of a patch of {own}³ voxels, expected {edge}³"),
            }),
        }
    }

    /// The maps on `device`, `[1, edge, edge, edge, 2]`.
    ///
    /// # Errors
    /// The device fails.
    pub fn on(&self, device: &Device) -> Result<Tensor, OpError> {
        match (self, device) {
            (PromptMaps::Maps(maps), _) => Ok(maps.clone()),
            (PromptMaps::Places(edge, list), Device::Cpu(cpu)) => {
                let mut maps = cpu.zeros(edge * edge * edge * 2);
                list.iter().for_each(|at| maps[*at as usize] = 1.0);
                Ok(Tensor::from_buffer([1, *edge, *edge, *edge, 2], maps))
            }
            (PromptMaps::Places(edge, list), Device::Cuda(cuda)) => {
                let dtype = cuda.precision();
                let maps = cuda.allocate(edge * edge * edge * 2, dtype)?;
                // Not empty, so that there is something to upload.
                let places = cuda.upload(if list.is_empty() { &[0] } else { list.as_slice() })?;
                scatter(cuda, &maps, (&places).into(), list.len())?;
                Ok(Tensor::from_device([1, *edge, *edge, *edge, 2], maps, dtype))
            }
        }
    }
}

/// Clears `maps` and sets the `count` values that are listed at `places`.
pub(super) fn scatter(
    cuda: &Cuda,
    maps: &Arc<Memory>,
    places: Pointer<'_>,
    count: usize,
) -> Result<(), OpError> {
    cuda.clear(maps)?;
    if count > 0 {
        let launch = Launch::per_element(count).with_cost(0, 8 * count);
        cuda.launch(
            kernels::SCATTER.of(cuda.precision())?,
            launch,
            kernels::ScatterArgs { list: places, maps: maps.into(), count: count.into() },
        )?;
    }
    Ok(())
}

/// Embeddings, the dense prompt's convolutions and the transformer.
pub struct PromptEncoder {
    gaussian: Param,
    labels: [Param; 4],
    not_a_point: Param,
    score_token: Param,
    mask_tokens: Param,
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
        let attention = |at: String| {
            let pair = |name: &str| {
                (w.get(&format!("{at}.{name}.weight")), w.get(&format!("{at}.{name}.bias")))
            };
            TwoWayWeights {
                q: pair("q_proj"),
                k: pair("k_proj"),
                v: pair("v_proj"),
                out: pair("out_proj"),
                heads,
            }
        };
        let down = |i: usize| Linear::load(w, &format!("{at}.mask_downscaling.{i}"));
        let norm =
            |i: usize| LayerNorm::load(w, &format!("{at}.mask_downscaling.{i}"), ENCODER_EPS);
        let layers = (0..w.config.prompt_depth).map(|layer| {
            let at = format!("{at}.transformer.layers.{layer}");
            Layer {
                own: attention(format!("{at}.self_attn")),
                to_image: attention(format!("{at}.cross_attn_token_to_image")),
                to_tokens: attention(format!("{at}.cross_attn_image_to_token")),
                norms: [1, 2, 3, 4]
                    .map(|n| LayerNorm::load(w, &format!("{at}.norm{n}"), EPS as f32)),
                lin1: Linear::load(w, &format!("{at}.mlp.lin1")),
                lin2: Linear::load(w, &format!("{at}.mlp.lin2")),
            }
        });
        PromptEncoder {
            gaussian: w.get(GAUSSIAN),
            labels: [0, 1, 2, 3].map(|i| token(&format!("point_embeddings.{i}"))),
            not_a_point: token("not_a_point_embed"),
            score_token: token("iou_token"),
            mask_tokens: token("mask_tokens"),
            dense: [(down(0), Some(norm(1))), (down(3), Some(norm(4))), (down(6), None)],
            layers: layers.collect(),
            final_attention: attention(format!("{at}.transformer.final_attn_token_to_image")),
            final_norm: LayerNorm::load(
                w,
                &format!("{at}.transformer.norm_final_attn"),
                EPS as f32,
            ),
        }
    }

    /// The position code of the token grid, `[grid, grid, grid, width]`.
    pub fn grid_code(&self, grid: usize) -> Result<Tensor, OpError> {
        position::grid(&self.gaussian, [grid; 3])
    }

    /// Channels of a token.
    pub fn width(&self) -> usize {
        self.score_token.channels()
    }

    /// The token sequence: score token, mask tokens, points (and a padding point without a box),
    /// box corners; `[t, width]`, and the number of tokens, t.
    ///
    /// If it is `padded`, more rows follow, up to the number that recordings are made for. Each is
    /// the score token again, because that has a gradient in any case: the padding's, of zeros,
    /// changes nothing of it, and no parameter gets a gradient that has none without padding.
    pub fn tokens<'m>(
        &'m self,
        tape: &Tape<'m>,
        prompts: &PatchPrompts,
        patch: usize,
        padded: bool,
    ) -> Result<(Var, usize), OpError> {
        // Behind the points a box, or what says that there is none.
        let most = prompts.points.len() + 2;
        let mut positions: Vec<[f64; 3]> = memory::list(TOKENS, most);
        positions.extend(prompts.points.iter().map(|(p, _)| p.map(f64::from)));
        let mut kinds: Vec<Option<usize>> = memory::list(TOKENS, most);
        kinds.extend(prompts.points.iter().map(|(_, positive)| Some(usize::from(*positive))));
        match prompts.bounds {
            Some(b) => {
                positions
                    .extend([[b[0], b[1], b[2]], [b[3], b[4], b[5]]].map(|c| c.map(f64::from)));
                kinds.extend([Some(2), Some(3)]);
            }
            None if !kinds.is_empty() => {
                positions.push([0.0; 3]);
                kinds.push(None);
            }
            None => {}
        }
        let (cpu, width) = (tape.device().cpu(), self.width());
        let codes = position::points(cpu, &self.gaussian, &positions, [patch; 3], 0.5)?;
        let count = 1 + self.mask_tokens.rows() + kinds.len();
        let whole = if padded { bucket(count) } else { count };
        let mut rows = memory::list(TOKENS, whole);
        rows.push((&self.score_token, 0));
        rows.extend((0..self.mask_tokens.rows()).map(|row| (&self.mask_tokens, row)));
        let mut base = cpu.zeros(whole * width);
        for (code, kind) in codes.data().chunks_exact(width).zip(kinds) {
            match kind {
                Some(label) => {
                    base[rows.len() * width..][..width].copy_from_slice(code);
                    rows.push((&self.labels[label], 0));
                }
                None => rows.push((&self.not_a_point, 0)),
            }
        }
        rows.resize(whole, (&self.score_token, 0));
        Ok((tape.embed(Tensor::from_buffer([whole, width], base), rows)?, count))
    }

    /// `dense` logits `[1, s, s, s, 1]` to `[1, s/16, s/16, s/16, width]`.
    fn dense<'m>(&'m self, tape: &Tape<'m>, dense: &Var) -> Result<Var, OpError> {
        let first = tape.downsample4_nearest(dense)?;
        self.dense.iter().try_fold(first, |x, (conv, norm)| {
            let x = tape.patch_conv(&x, &conv.0, Some(&conv.1))?;
            norm.as_ref().map_or(Ok(x.clone()), |norm| norm.gelu(tape, &x))
        })
    }

    /// Image tokens `[1, g, g, g, width]` after the transformer, from the token sequence `first`,
    /// of which the `valid` ones count; and the remaining work of the tokens.
    pub fn run<'m>(
        &'m self,
        tape: &Tape<'m>,
        embedding: &Var,
        grid_code: &Tensor,
        (first, valid): (&Var, ValidKeys),
        dense: &Var,
    ) -> Result<(LastAttention, Var), OpError> {
        let width = first.channels();
        let flat = [embedding.len() / width, width];
        let mut keys = tape.add(embedding, &self.dense(tape, dense)?)?.reshape(flat);
        let code = Var::constant(grid_code.reshape(flat));
        let sum = |pair: &'m (Param, Param)| layer(pair, true);
        let own = |pair: &'m (Param, Param)| layer(pair, false);
        // Norms are applied by the op that reads them: then they take no launch of their own.
        let (mut queries, mut keys_norm) = (first.clone(), None);
        for (i, l) in self.layers.iter().enumerate() {
            // The first layer's own attention has neither positions nor a residual.
            let (positions, residual) =
                if i == 0 { (None, None) } else { (Some(first), Some(&queries)) };
            let rows = TokenRows { x: &queries, norm: None, add: positions };
            let w = &l.own;
            let of = [sum(&w.q), sum(&w.k), own(&w.v)];
            let ([q, k, v], _) = tape.token_linear(rows, of, Activation::None, None)?;
            let x = tape.token_attention(w.heads, [&q, &k, &v], valid, ends(w), residual)?;

            let (w, back) = (&l.to_image, &l.to_tokens);
            let rows = TokenRows { x: &keys, norm: keys_norm, add: Some(&code) };
            let of = [sum(&w.k), own(&w.v), sum(&back.q)];
            let ([k, v, asked], image) = tape.token_linear(rows, of, Activation::None, None)?;
            let rows = TokenRows { x: &x, norm: Some(l.norms[0].parts()), add: Some(first) };
            let ([q], normed) = tape.token_linear(rows, [sum(&w.q)], Activation::None, None)?;
            let x = tape.token_attention(w.heads, [&q, &k, &v], None, ends(w), Some(&normed))?;

            let rows = TokenRows { x: &x, norm: Some(l.norms[1].parts()), add: None };
            let of = [l.lin1.layer()];
            let ([hidden], normed) = tape.token_linear(rows, of, Activation::Relu, None)?;
            let (rows, of) = (TokenRows::plain(&hidden), [l.lin2.layer()]);
            let ([x], _) = tape.token_linear(rows, of, Activation::None, Some(&normed))?;

            let rows = TokenRows { x: &x, norm: Some(l.norms[2].parts()), add: Some(first) };
            let of = [sum(&back.k), own(&back.v)];
            let ([k, v], normed) = tape.token_linear(rows, of, Activation::None, None)?;
            let asked = [&asked, &k, &v];
            keys = tape.token_attention(back.heads, asked, valid, ends(back), Some(&image))?;
            (queries, keys_norm) = (normed, Some(l.norms[3].parts()));
        }
        let w = &self.final_attention;
        let rows = TokenRows { x: &keys, norm: keys_norm, add: Some(&code) };
        let of = [sum(&w.k), own(&w.v)];
        let ([k, v], image) = tape.token_linear(rows, of, Activation::None, None)?;
        Ok((LastAttention { queries, k, v }, image.reshape(embedding.shape())))
    }

    /// Tokens `[t, width]` after the transformer.
    pub fn finish<'m>(
        &'m self,
        tape: &Tape<'m>,
        first: &Var,
        LastAttention { queries, k, v }: LastAttention,
    ) -> Result<Var, OpError> {
        let w = &self.final_attention;
        let rows = TokenRows { x: &queries, norm: None, add: Some(first) };
        let ([q], _) = tape.token_linear(rows, [layer(&w.q, true)], Activation::None, None)?;
        let x = tape.token_attention(w.heads, [&q, &k, &v], None, ends(w), Some(&queries))?;
        self.final_norm.run(tape, &x)
    }
}

/// The tokens before their last attention, and the image's keys and values for it.
pub struct LastAttention {
    queries: Var,
    k: Var,
    v: Var,
}

/// A projection, of the sum with positions or of the rows without them.
fn layer((weight, bias): &(Param, Param), added: bool) -> TokenLayer<'_> {
    TokenLayer { weight, bias, added }
}

/// The projection after an attention.
fn ends(w: &TwoWayWeights) -> (&Param, &Param) {
    (&w.out.0, &w.out.1)
}
