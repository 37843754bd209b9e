//! The image encoder: a convolutional path and a vision transformer side by side, run once per
//! image.

use super::config::Config;
use super::layers::{ConvNorm, ENCODER_EPS, LayerNorm, Linear, Observer, Reader};
use super::weights::Weights;
use crate::autograd::{Conv, Normed, Tape, TapeInput, Transpose, Var};
use crate::device::Device;
use crate::ops::attention::VitWeights;
use crate::ops::conv3d::Epilogue;
use crate::ops::linear::Activation;
use crate::tensor::{OpError, Param};

/// The convolutional path and the vision transformer, as far as the configuration has them.
pub struct ImageEncoder {
    cnn: Option<[[ConvNorm; 2]; 5]>,
    vit: Option<Vit>,
}

/// A decoder level's skip feature: the convolutional map with its norm pending, and the neck's map
/// to add, where they exist.
pub struct Feature {
    pub cnn: Option<Normed>,
    pub neck: Option<Var>,
}

impl Feature {
    /// This feature as an op's input that other ops may read as well; none if neither path feeds
    /// this level.
    pub fn input(&self) -> Option<TapeInput> {
        self.input_from(self.cnn.as_ref().map(Normed::input))
    }

    /// This feature as the input of its last reader, which may take its memory.
    pub fn into_input(mut self) -> Option<TapeInput> {
        let cnn = self.cnn.take().map(Normed::into_input);
        self.input_from(cnn)
    }

    fn input_from(&self, cnn: Option<TapeInput>) -> Option<TapeInput> {
        match (cnn, &self.neck) {
            (Some(cnn), neck) => Some(cnn.plus(neck.as_ref())),
            (None, Some(neck)) => Some(TapeInput::shared(neck)),
            (None, None) => None,
        }
    }
}

impl ImageEncoder {
    pub fn load(device: &Device, w: &Weights) -> Result<ImageEncoder, OpError> {
        let config = &w.config;
        let stage = |at: String| -> Result<[ConvNorm; 2], OpError> {
            let at = format!("image_encoder.cnn_encoder.{at}");
            let load = |i: usize| ConvNorm::load(device, w, &format!("{at}.conv_{i}"));
            Ok([load(0)?, load(1)?])
        };
        let cnn = match config.has_cnn() {
            true => {
                let down = |level: usize| stage(format!("down_{level}.convs"));
                Some([stage("conv_0".into())?, down(1)?, down(2)?, down(3)?, down(4)?])
            }
            false => None,
        };
        let vit = config.has_vit().then(|| Vit::load(device, w)).transpose()?;
        Ok(ImageEncoder { cnn, vit })
    }

    /// Encodes `image` `[1, s, s, s, 1]`. Calls `feature(level, …)` for levels 0 to 3 as each
    /// becomes complete, so that a full-resolution map need not outlive its use, and returns the
    /// image embedding `[1, s/16, s/16, s/16, width]`.
    pub fn run<'m>(
        &'m self,
        tape: &Tape<'m>,
        image: &Var,
        observer: &mut Observer,
        mut feature: impl FnMut(usize, Feature, &mut Observer) -> Result<(), OpError>,
    ) -> Result<Var, OpError> {
        // If the work is recorded, the transformer runs in parallel with the convolutional path,
        // which does not need it until both are added up. A tape that is on has its ops in one
        // order, recorded or not: it decides the order in which gradients are added up.
        let fork = match (tape.device(), &self.vit, &self.cnn) {
            (Device::Cuda(cuda), Some(_), Some(_)) if !tape.is_on() => cuda.fork()?,
            _ => None,
        };
        let (mut necks, neck) = match &self.vit {
            Some(vit) => {
                let (necks, neck) = vit.run(tape, image, observer)?;
                (necks.map(Some), Some(neck))
            }
            None => ([None, None, None], None),
        };
        if let Some(fork) = &fork {
            fork.back()?;
        }
        // Levels that wait for the transformer.
        let mut waiting: Vec<(usize, Feature)> = vec![];
        let mut last: Option<Var> = None;
        match &self.cnn {
            Some(stages) => {
                let mut below: Option<Feature> = None;
                for (level, [first, second]) in stages.iter().enumerate() {
                    let a = match &below {
                        None => first.run(tape, TapeInput::shared(image), Reader::Plain)?,
                        Some(Feature { cnn: Some(x), .. }) => {
                            first.run(tape, x.pooled(), Reader::Plain)?
                        }
                        Some(_) => unreachable!("the convolutional path feeds itself"),
                    };
                    observer.between()?;
                    match below.take() {
                        Some(done) if fork.is_some() && done.neck.is_some() => {
                            waiting.push((level - 1, done));
                        }
                        Some(done) => {
                            feature(level - 1, done, observer)?;
                            observer.between()?;
                        }
                        None => {}
                    }
                    let reader = if level == 4 { Reader::Plain } else { Reader::Pools };
                    let b = second.run(tape, a.into_input(), reader)?;
                    observer.see(&format!("cnn_x{level}"), || b.value(tape.device()))?;
                    if level == 4 {
                        last = Some(tape.apply(b.input())?);
                    } else {
                        let neck = if level == 0 { None } else { necks[level - 1].take() };
                        below = Some(Feature { cnn: Some(b), neck });
                    }
                }
            }
            None => {
                feature(0, Feature { cnn: None, neck: None }, observer)?;
                for level in 1..4 {
                    feature(level, Feature { cnn: None, neck: necks[level - 1].take() }, observer)?;
                }
            }
        }
        if let Some(fork) = fork {
            fork.join()?;
        }
        for (level, done) in waiting {
            feature(level, done, observer)?;
        }
        match (neck, last) {
            (Some(neck), Some(last)) => tape.add(&neck, &last),
            (Some(one), None) | (None, Some(one)) => Ok(one),
            (None, None) => unreachable!("a configuration has at least one path"),
        }
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        let cnn = self.cnn.iter().flatten().flatten().map(ConvNorm::bytes).sum::<usize>();
        cnn + self.vit.as_ref().map_or(0, Vit::bytes)
    }
}

/// The vision transformer with its necks.
struct Vit {
    patch: Linear,
    positions: Param,
    blocks: Vec<Block>,
    taps: [usize; 3],
    necks: [Vec<Up>; 3],
    neck: Neck,
}

/// Convolution, norm, GELU, then twice the size, norm, GELU.
struct Up {
    conv: Conv,
    norm: LayerNorm,
    deconv: Transpose,
    deconv_norm: LayerNorm,
}

/// From the transformer's width to the embedding's.
struct Neck {
    project: Param,
    project_norm: LayerNorm,
    conv: Conv,
    conv_norm: LayerNorm,
}

struct Block {
    norm1: LayerNorm,
    attention: VitWeights,
    norm2: LayerNorm,
    lin1: Linear,
    lin2: Linear,
}

impl Block {
    fn load(w: &Weights, config: &Config, index: usize) -> Block {
        let at = format!("image_encoder.blocks.{index}");
        let Linear(qkv, qkv_bias) = Linear::load(w, &format!("{at}.attn.qkv"));
        let Linear(proj, proj_bias) = Linear::load(w, &format!("{at}.attn.proj"));
        let attention = VitWeights {
            qkv: (qkv, qkv_bias),
            proj: (proj, proj_bias),
            rel_pos: ["d", "h", "w"].map(|axis| w.get(&format!("{at}.attn.rel_pos_{axis}"))),
            heads: config.vit_heads,
            window: if config.global_blocks.contains(&index) { 0 } else { config.window },
        };
        Block {
            norm1: LayerNorm::load(w, &format!("{at}.norm1"), ENCODER_EPS),
            attention,
            norm2: LayerNorm::load(w, &format!("{at}.norm2"), ENCODER_EPS),
            lin1: Linear::load(w, &format!("{at}.mlp.lin1")),
            lin2: Linear::load(w, &format!("{at}.mlp.lin2")),
        }
    }

    fn run<'m>(
        &'m self,
        tape: &Tape<'m>,
        x: &Var,
        observer: &mut Observer,
    ) -> Result<Var, OpError> {
        let x = tape.vit_attention(&self.attention, &self.norm1.run(tape, x)?, Some(x))?;
        observer.between()?;
        let LayerNorm { weight, bias, eps } = &self.norm2;
        let [first, second] = [&self.lin1, &self.lin2].map(|Linear(weight, bias)| (weight, bias));
        tape.mlp(&x, (weight, bias, *eps), first, second)
    }
}

impl Vit {
    fn load(device: &Device, w: &Weights) -> Result<Vit, OpError> {
        let (config, at) = (&w.config, "image_encoder");
        let conv = |name: String| Conv::new(device, w.get(&name), None);
        let up = |n: usize, m: usize| -> Result<Up, OpError> {
            let at = format!("{at}.neck_list.{n}.up.{m}.single_up");
            Ok(Up {
                conv: conv(format!("{at}.0.weight"))?,
                norm: LayerNorm::load(w, &format!("{at}.1"), ENCODER_EPS),
                deconv: Transpose::new(
                    w.get(&format!("{at}.3.weight")),
                    w.get(&format!("{at}.3.bias")),
                )?,
                deconv_norm: LayerNorm::load(w, &format!("{at}.4"), ENCODER_EPS),
            })
        };
        let ups = |n: usize| (0..3 - n).map(|m| up(n, m)).collect::<Result<Vec<_>, _>>();
        Ok(Vit {
            patch: Linear::load(w, &format!("{at}.patch_embed.proj")),
            positions: w.get(&format!("{at}.pos_embed")),
            blocks: (0..config.vit_depth).map(|b| Block::load(w, config, b)).collect(),
            taps: config.taps,
            necks: [ups(0)?, ups(1)?, ups(2)?],
            neck: Neck {
                project: w.get(&format!("{at}.neck.0.weight")),
                project_norm: LayerNorm::load(w, &format!("{at}.neck.1"), ENCODER_EPS),
                conv: conv(format!("{at}.neck.3.weight"))?,
                conv_norm: LayerNorm::load(w, &format!("{at}.neck.4"), ENCODER_EPS),
            },
        })
    }

    /// The maps for levels 1, 2, 3 and the neck's output.
    fn run<'m>(
        &'m self,
        tape: &Tape<'m>,
        image: &Var,
        observer: &mut Observer,
    ) -> Result<([Var; 3], Var), OpError> {
        let mut x = tape.patch_conv(image, &self.patch.0, Some(&self.patch.1))?;
        observer.see("patch_embed", || Ok(x.value().clone()))?;
        x = tape.add_param(&x, &self.positions)?;
        let mut tapped: [Option<Var>; 3] = [None, None, None];
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.run(tape, &x, observer)?;
            observer.see(&format!("block{i}"), || Ok(x.value().clone()))?;
            for (n, tap) in self.taps.iter().enumerate().filter(|(_, tap)| **tap == i + 1) {
                let _ = tap;
                let mut ups = self.necks[n].iter();
                tapped[n] = Some(ups.try_fold(x.clone(), |x, up| up.run(tape, x, observer))?);
            }
        }
        let necks = tapped.map(|t| t.expect("taps were checked to be blocks"));
        for (n, t) in necks.iter().enumerate() {
            observer.see(&format!("neck_list{n}"), || Ok(t.value().clone()))?;
        }
        let neck = self.neck.run(tape, &x)?;
        observer.see("neck", || Ok(neck.value().clone()))?;
        Ok((necks, neck))
    }

    fn bytes(&self) -> usize {
        self.necks.iter().flatten().map(|u| u.conv.bytes()).sum::<usize>() + self.neck.conv.bytes()
    }
}

impl Up {
    fn run<'m>(&'m self, tape: &Tape<'m>, x: Var, observer: &mut Observer) -> Result<Var, OpError> {
        let x = tape.conv3d(TapeInput::shared(&x), &self.conv, Epilogue::NONE)?.map;
        let x = self.norm.gelu(tape, &x)?;
        observer.between()?;
        let LayerNorm { weight, bias, eps } = &self.deconv_norm;
        let x = tape.conv_transpose3d(&x, &self.deconv, Some((weight, bias, *eps)))?;
        observer.between()?;
        Ok(x)
    }
}

impl Neck {
    fn run<'m>(&'m self, tape: &Tape<'m>, x: &Var) -> Result<Var, OpError> {
        let x = tape.linear(x, &self.project, None, Activation::None, None)?;
        let x = self.project_norm.gelu(tape, &x)?;
        let x = tape.conv3d(TapeInput::shared(&x), &self.conv, Epilogue::NONE)?.map;
        self.conv_norm.gelu(tape, &x)
    }
}
