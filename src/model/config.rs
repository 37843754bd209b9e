//! The description of a network: read from the model file, and checked before anything is built.

use crate::message::number;
use crate::volume::Modality;
use serde::{Deserialize, Serialize};

/// Which paths the image encoder has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encoder {
    /// The convolutional path and the vision transformer, their features added: the released
    /// architecture.
    Hybrid,
    /// The vision transformer alone; the last decoder stage then has no skip feature.
    Vit,
    /// The convolutional path alone.
    Cnn,
}

/// The intensity statistics of a model's training data, by which scans are normalised for it.
///
/// [`session::normalization`](crate::session::normalization) decides for a scan whether they apply.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Intensity {
    /// Values are clipped to this range first.
    pub clip: [f32; 2],
    /// Mean of the clipped foreground, which is subtracted.
    pub mean: f32,
    /// Standard deviation of the clipped foreground, by which the difference is divided.
    pub sd: f32,
    /// Whether these are Hounsfield units and the model takes other scans as well: then a scan that
    /// is not a CT is normalised by its own percentiles.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hounsfield: bool,
}

impl Intensity {
    /// Whether these numbers are for scans of that modality.
    pub fn applies_to(&self, modality: Modality) -> bool {
        !self.hounsfield || modality == Modality::Ct
    }

    /// The statistics released with the paper's four datasets, by name: `colon`, `pancreas`,
    /// `liver` and `kidney`.
    pub const PRESETS: [(&'static str, Intensity); 4] = [
        (
            "colon",
            Intensity { clip: [-57.0, 175.0], mean: 65.175_03, sd: 32.651_197, hounsfield: false },
        ),
        (
            "pancreas",
            Intensity { clip: [-39.0, 204.0], mean: 68.452_14, sd: 63.422_806, hounsfield: false },
        ),
        (
            "liver",
            Intensity { clip: [-48.0, 163.0], mean: 60.057_533, sd: 40.198_017, hounsfield: false },
        ),
        (
            "kidney",
            Intensity { clip: [-54.0, 247.0], mean: 59.538_67, sd: 55.457_336, hounsfield: false },
        ),
    ];

    /// The statistics called `name` in [`Intensity::PRESETS`].
    pub fn preset(name: &str) -> Option<Intensity> {
        Self::PRESETS.iter().find(|(n, _)| *n == name).map(|(_, i)| *i)
    }
}

/// The architecture of a network, as a model file states it. [`Config::base`] is the released one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Edge of the cubic patch in voxels, a multiple of 16.
    pub patch: usize,
    /// Spacing the network was trained at, in mm.
    pub spacing: f32,
    /// The patch's length as a multiple of the longest side of a given box, if it is sized to the
    /// object; otherwise the patch has its spacing whatever the object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fit: Option<f32>,
    /// Encoder paths.
    pub encoder: Encoder,
    /// Channels of the five convolutional stages; the last is also the width of tokens and image
    /// embedding.
    pub channels: [usize; 5],
    /// Width of the vision transformer.
    pub vit_width: usize,
    /// Blocks of the vision transformer.
    pub vit_depth: usize,
    /// Attention heads of the vision transformer.
    pub vit_heads: usize,
    /// Hidden width of the dense layers in its blocks.
    pub vit_mlp: usize,
    /// Window edge of its local blocks, in tokens.
    pub window: usize,
    /// Blocks (from 0) that attend over the whole grid.
    pub global_blocks: Vec<usize>,
    /// Blocks (counted from 1) whose outputs feed levels 1, 2 and 3 of the decoder.
    pub taps: [usize; 3],
    /// Layers of the two-way transformer.
    pub prompt_depth: usize,
    /// Attention heads of the two-way transformer.
    pub prompt_heads: usize,
    /// Hidden width of the two-way transformer's dense layers.
    pub prompt_mlp: usize,
    /// Hidden width of the score head.
    pub score_hidden: usize,
    /// Candidate masks beside the single one.
    pub candidates: usize,
    /// Confidence learning: choose among the candidates by score; without it the single mask is the
    /// answer.
    pub confidence: bool,
    /// Corrective refinement after the choice.
    pub corrective: bool,
    /// Width of the refiner.
    pub refine_width: usize,
    /// Radius in voxels of the ball that represents a point in the refiner's maps when a session
    /// steers; 0 for the point's voxel alone, as in the paper.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub click_radius: f32,
    /// The calibration `[a, b]` of scores: the expected Dice of a session's answer is a + b times
    /// its score. None if this was never measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<[f32; 2]>,
    /// Intensity statistics of the data the weights were trained on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intensity: Option<Intensity>,
}

fn is_zero(v: &f32) -> bool {
    *v == 0.0
}

/// Why a configuration describes no network: the field, its value, and what was expected.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("configuration: {field} is {value}, expected {expected}")]
pub struct ConfigError {
    field: &'static str,
    value: String,
    expected: String,
}

impl Config {
    /// The released architecture: 118,147,716 parameters, 128³ voxels at 1 mm.
    pub fn base() -> Config {
        Config {
            patch: 128,
            spacing: 1.0,
            fit: None,
            encoder: Encoder::Hybrid,
            channels: [32, 32, 64, 128, 384],
            vit_width: 768,
            vit_depth: 12,
            vit_heads: 12,
            vit_mlp: 3072,
            window: 14,
            global_blocks: vec![2, 5, 8, 11],
            taps: [3, 6, 9],
            prompt_depth: 2,
            prompt_heads: 8,
            prompt_mlp: 2048,
            score_hidden: 256,
            candidates: 3,
            confidence: true,
            corrective: true,
            refine_width: 32,
            click_radius: 0.0,
            calibration: None,
            intensity: None,
        }
    }

    /// A small network of the same architecture, for scale-normalised patches of 64³ voxels on a
    /// CPU: 7,852,114 parameters.
    pub fn small() -> Config {
        Config {
            patch: 64,
            fit: Some(1.75),
            channels: [16, 16, 32, 64, 192],
            vit_width: 192,
            vit_depth: 4,
            vit_heads: 6,
            vit_mlp: 384,
            window: 4,
            global_blocks: vec![0, 1, 2, 3],
            taps: [2, 3, 4],
            prompt_mlp: 384,
            score_hidden: 128,
            refine_width: 16,
            intensity: Some(Intensity {
                clip: [-200.0, 300.0],
                mean: 0.0,
                sd: 120.0,
                hounsfield: true,
            }),
            ..Config::base()
        }
    }

    /// A network small enough for a test of the library itself: every part exists, nothing is wide.
    #[cfg(test)]
    pub(crate) fn tiny() -> Config {
        Config {
            patch: 32,
            channels: [8, 8, 16, 16, 48],
            vit_width: 48,
            vit_depth: 4,
            vit_heads: 4,
            vit_mlp: 96,
            window: 3,
            global_blocks: vec![3],
            taps: [1, 2, 3],
            prompt_mlp: 64,
            score_hidden: 24,
            refine_width: 8,
            ..Config::base()
        }
    }

    /// The architecture called `base` ([`Config::base`]) or `small` ([`Config::small`]).
    pub fn preset(name: &str) -> Option<Config> {
        match name {
            "base" => Some(Config::base()),
            "small" => Some(Config::small()),
            _ => None,
        }
    }

    /// Tokens along each axis of a patch: one for 16 voxels.
    pub fn grid(&self) -> usize {
        self.patch / 16
    }

    /// Width of tokens and image embedding.
    pub fn width(&self) -> usize {
        self.channels[4]
    }

    /// Whether there is a convolutional path.
    pub fn has_cnn(&self) -> bool {
        self.encoder != Encoder::Vit
    }

    /// Whether there is a vision transformer.
    pub fn has_vit(&self) -> bool {
        self.encoder != Encoder::Cnn
    }

    /// The channels of decoder stage `level` (4 is the first, 1 the last): of its coarse input, of
    /// that upsampled, of the skip feature, of its output.
    ///
    /// # Panics
    /// For a level that is not 1 to 4.
    pub fn stage(&self, level: usize) -> [usize; 4] {
        let (x, out) = (self.channels[level], self.channels[level - 1]);
        let up = if level == 1 { x } else { x / 2 };
        let skip = if level == 1 && !self.has_cnn() { 0 } else { out };
        [x, up, skip, out]
    }

    /// Channels of neck `n` (0, 1, 2) before each of its upsamplings and after the last.
    pub fn neck(&self, n: usize) -> Vec<usize> {
        std::iter::once(self.vit_width)
            .chain((n + 1..4).rev().map(|level| self.channels[level]))
            .collect()
    }

    /// Checks that the numbers describe a network that can be built.
    ///
    /// # Errors
    /// The first field that is out of range, or does not go with others.
    pub fn check(&self) -> Result<(), ConfigError> {
        let fail = |field, value: String, expected: &str| {
            Err(ConfigError { field, value, expected: expected.to_string() })
        };
        let sizes = [
            ("vit_width", self.vit_width),
            ("vit_mlp", self.vit_mlp),
            ("prompt_mlp", self.prompt_mlp),
            ("score_hidden", self.score_hidden),
            ("refine_width", self.refine_width),
            ("candidates", self.candidates),
            ("prompt_depth", self.prompt_depth),
        ];
        for (field, value) in sizes {
            if value == 0 || value > 1 << 16 {
                return fail(field, value.to_string(), "1 to 65536");
            }
        }
        for (field, value, most) in [
            ("vit_depth", self.vit_depth, 256),
            ("vit_heads", self.vit_heads, 256),
            ("prompt_depth", self.prompt_depth, 64),
            ("prompt_heads", self.prompt_heads, 256),
            ("candidates", self.candidates, 64),
        ] {
            if value > most {
                return fail(field, value.to_string(), &format!("at most {most}"));
            }
        }
        // For the grid of the largest patch. A window larger than the grid is padded to its size,
        // which costs memory with its sixth power.
        if self.window == 0 || self.window > 32 {
            return fail("window", self.window.to_string(), "1 to 32");
        }
        if self.patch == 0 || !self.patch.is_multiple_of(16) || self.patch > 512 {
            return fail("patch", self.patch.to_string(), "a multiple of 16, at most 512");
        }
        if !(self.spacing > 0.0 && self.spacing < 100.0) {
            return fail("spacing", number(self.spacing), "millimetres above 0 and below 100");
        }
        if let Some(fit) = self.fit.filter(|f| !(1.0..=16.0).contains(f)) {
            return fail("fit", number(fit), "1 to 16 times the object");
        }
        if let Some(c) = self.calibration.filter(|c| c.iter().any(|v| !v.is_finite())) {
            return fail("calibration", format!("{c:?}"), "two numbers");
        }
        if !(0.0..=8.0).contains(&self.click_radius) {
            return fail("click_radius", number(self.click_radius), "0 to 8 voxels");
        }
        if self.channels.iter().any(|&c| c == 0 || c % 2 != 0 || c > 1 << 16) {
            return fail("channels", format!("{:?}", self.channels), "even numbers above 0");
        }
        if self.prompt_heads == 0
            || self.prompt_heads > self.width()
            || !self.width().is_multiple_of(6 * self.prompt_heads)
        {
            let expected = format!(
                "a last width that 3 and twice prompt_heads ({}) divide",
                self.prompt_heads
            );
            return fail("channels", format!("{:?}", self.channels), &expected);
        }
        if self.vit_heads == 0 || !self.vit_width.is_multiple_of(self.vit_heads) {
            return fail("vit_heads", self.vit_heads.to_string(), "a divisor of vit_width");
        }
        if self.has_vit() && self.taps.iter().any(|&t| t == 0 || t > self.vit_depth) {
            return fail("taps", format!("{:?}", self.taps), "block numbers from 1 to vit_depth");
        }
        if let Some(i) = self.intensity
            && !(i.clip[0] < i.clip[1]
                && i.sd > 0.0
                && [i.clip[0], i.clip[1], i.mean, i.sd].iter().all(|v| v.is_finite()))
        {
            return fail(
                "intensity",
                format!("clip {:?}, mean {} and sd {}", i.clip, number(i.mean), number(i.sd)),
                "finite numbers, clip[0] < clip[1] and sd > 0",
            );
        }
        Ok(())
    }

    /// Every tensor of the network by its checkpoint name, with its shape, in a fixed order.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut list = Names(vec![]);
        let width = self.width();
        if self.has_vit() {
            self.vit_tensors(&mut list);
        }
        if self.has_cnn() {
            let c = self.channels;
            let at = "image_encoder.cnn_encoder";
            list.conv_pair(&format!("{at}.conv_0"), 1, c[0]);
            for level in 1..5 {
                list.conv_pair(&format!("{at}.down_{level}.convs"), c[level - 1], c[level]);
            }
        }
        let at = "prompt_encoder";
        list.add(format!("{at}.pe_layer.positional_encoding_gaussian_matrix"), &[3, width / 3]);
        for name in
            ["point_embeddings.0", "point_embeddings.1", "point_embeddings.2", "point_embeddings.3"]
        {
            list.add(format!("{at}.{name}.weight"), &[1, width]);
        }
        for (name, rows) in [
            ("not_a_point_embed", 1),
            ("no_mask_embed", 1),
            ("iou_token", 1),
            ("mask_tokens", self.candidates + 1),
        ] {
            list.add(format!("{at}.{name}.weight"), &[rows, width]);
        }
        for (i, shape) in
            [(0, vec![4, 1, 2, 2, 2]), (3, vec![16, 4, 2, 2, 2]), (6, vec![width, 16, 1, 1, 1])]
        {
            list.weight_bias(&format!("{at}.mask_downscaling.{i}"), &shape);
        }
        for (i, c) in [(1, 4), (4, 16)] {
            list.weight_bias(&format!("{at}.mask_downscaling.{i}"), &[c]);
        }
        for layer in 0..self.prompt_depth {
            let at = format!("{at}.transformer.layers.{layer}");
            list.attention(&format!("{at}.self_attn"), width, width);
            list.attention(&format!("{at}.cross_attn_token_to_image"), width, width / 2);
            list.attention(&format!("{at}.cross_attn_image_to_token"), width, width / 2);
            list.weight_bias(&format!("{at}.mlp.lin1"), &[self.prompt_mlp, width]);
            list.weight_bias(&format!("{at}.mlp.lin2"), &[width, self.prompt_mlp]);
            (1..5).for_each(|n| list.weight_bias(&format!("{at}.norm{n}"), &[width]));
        }
        list.attention(&format!("{at}.transformer.final_attn_token_to_image"), width, width / 2);
        list.weight_bias(&format!("{at}.transformer.norm_final_attn"), &[width]);

        let at = "mask_decoder";
        for level in (1..5).rev() {
            let [x, up, skip, out] = self.stage(level);
            let at = format!("{at}.decoder.upcat_{level}");
            list.weight_bias_of(&format!("{at}.upsample.deconv"), &[x, up, 2, 2, 2], up);
            list.conv_pair(&format!("{at}.convs"), skip + up, out);
        }
        for mask in 0..self.candidates + 1 {
            let at = format!("{at}.output_hypernetworks_mlps.{mask}.layers");
            for (i, out) in [(0, width), (1, width), (2, self.channels[0])] {
                list.weight_bias(&format!("{at}.{i}"), &[out, width]);
            }
        }
        let hidden = self.score_hidden;
        for (i, out, inputs) in
            [(0, hidden, width), (1, hidden, hidden), (2, self.candidates + 1, hidden)]
        {
            list.weight_bias(&format!("{at}.iou_prediction_head.layers.{i}"), &[out, inputs]);
        }
        if self.corrective {
            let (at, w) = (format!("{at}.refine"), self.refine_width);
            list.weight_bias(&format!("{at}.first_conv"), &[w, 4, 1, 1, 1]);
            list.conv_pair(&format!("{at}.conv1"), w, w);
            list.conv_pair(&format!("{at}.conv2"), w, w);
            list.weight_bias(&format!("{at}.conv_error_map"), &[1, w, 1, 1, 1]);
            list.weight_bias(&format!("{at}.conv_correction"), &[1, w, 1, 1, 1]);
        }
        list.0
    }

    fn vit_tensors(&self, list: &mut Names) {
        let (at, s, w, width) = ("image_encoder", self.grid(), self.vit_width, self.width());
        list.weight_bias(&format!("{at}.patch_embed.proj"), &[w, 1, 16, 16, 16]);
        list.add(format!("{at}.pos_embed"), &[1, s, s, s, w]);
        for b in 0..self.vit_depth {
            let at = format!("{at}.blocks.{b}");
            let edge = if self.global_blocks.contains(&b) { s } else { self.window };
            list.weight_bias(&format!("{at}.norm1"), &[w]);
            list.weight_bias(&format!("{at}.attn.qkv"), &[3 * w, w]);
            for axis in ["d", "h", "w"] {
                list.add(format!("{at}.attn.rel_pos_{axis}"), &[2 * edge - 1, w / self.vit_heads]);
            }
            list.weight_bias(&format!("{at}.attn.proj"), &[w, w]);
            list.weight_bias(&format!("{at}.norm2"), &[w]);
            list.weight_bias(&format!("{at}.mlp.lin1"), &[self.vit_mlp, w]);
            list.weight_bias(&format!("{at}.mlp.lin2"), &[w, self.vit_mlp]);
        }
        list.add(format!("{at}.neck.0.weight"), &[width, w, 1, 1, 1]);
        list.weight_bias(&format!("{at}.neck.1"), &[width]);
        list.add(format!("{at}.neck.3.weight"), &[width, width, 3, 3, 3]);
        list.weight_bias(&format!("{at}.neck.4"), &[width]);
        for n in 0..3 {
            for (m, pair) in self.neck(n).windows(2).enumerate() {
                let (inputs, out) = (pair[0], pair[1]);
                let at = format!("{at}.neck_list.{n}.up.{m}.single_up");
                list.add(format!("{at}.0.weight"), &[out, inputs, 3, 3, 3]);
                list.weight_bias(&format!("{at}.1"), &[out]);
                list.weight_bias_of(&format!("{at}.3"), &[out, out, 2, 2, 2], out);
                list.weight_bias(&format!("{at}.4"), &[out]);
            }
        }
    }

    /// Tensors that released checkpoints contain and the network does not use, by name, with their
    /// shapes.
    pub fn unused(&self) -> Vec<(String, Vec<usize>)> {
        let mut list = Names(vec![]);
        list.weight_bias("mask_decoder.decoder.final_conv", &[2, self.channels[0], 1, 1, 1]);
        list.0
    }
}

/// A growing list of names and shapes.
struct Names(Vec<(String, Vec<usize>)>);

impl Names {
    fn add(&mut self, name: String, shape: &[usize]) {
        self.0.push((name, shape.to_vec()));
    }

    fn weight_bias(&mut self, at: &str, shape: &[usize]) {
        self.weight_bias_of(at, shape, shape[0]);
    }

    fn weight_bias_of(&mut self, at: &str, shape: &[usize], bias: usize) {
        self.add(format!("{at}.weight"), shape);
        self.add(format!("{at}.bias"), &[bias]);
    }

    fn conv_pair(&mut self, at: &str, inputs: usize, out: usize) {
        for (i, inputs) in [(0, inputs), (1, out)] {
            self.weight_bias(&format!("{at}.conv_{i}.conv"), &[out, inputs, 3, 3, 3]);
            self.weight_bias(&format!("{at}.conv_{i}.adn.N"), &[out]);
        }
    }

    fn attention(&mut self, at: &str, width: usize, inner: usize) {
        for name in ["q_proj", "k_proj", "v_proj"] {
            self.weight_bias(&format!("{at}.{name}"), &[inner, width]);
        }
        self.weight_bias(&format!("{at}.out_proj"), &[width, inner]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_has_the_released_parameter_count() {
        let config = Config::base();
        config.check().unwrap();
        let count = |list: Vec<(String, Vec<usize>)>, prefix: &str| -> usize {
            let of = list.iter().filter(|(n, _)| n.starts_with(prefix) && !n.contains("gaussian"));
            of.map(|(_, s)| s.iter().product::<usize>()).sum()
        };
        let unused = count(config.unused(), "");
        assert_eq!(count(config.tensors(), "image_encoder."), 108_080_384);
        assert_eq!(count(config.tensors(), "prompt_encoder."), 5_830_940);
        assert_eq!(count(config.tensors(), "mask_decoder.") + unused, 4_236_392);
    }
}
