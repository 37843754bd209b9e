//! What problems of whole networks share: which network, and how it runs and is judged.
//!
//! A network has no plain formula: its result at an edge of 32 voxels is compared with that of the
//! same network on the CPU's portable kernels in float32.

use super::judge::{noise, wide};
use super::{Judge, Run, Timed, numbers};
use crate::bench::scribble;
use crate::device::{Cpu, Cuda, Device, Isa};
use crate::model::weights::Precision;
use crate::model::{
    Config, Features, Model, Observer, PatchPrompts, PromptMaps, Weights, prompt_maps,
};
use crate::tensor::{OpError, Tensor};
use std::fmt;
use std::sync::Arc;

/// The edge of the patch at which networks are judged.
const JUDGED: usize = 32;

/// A network to time: a preset, perhaps at another patch edge.
#[derive(Clone, Debug)]
pub(super) struct Network {
    /// `base` or `small`.
    preset: String,
    /// The patch's edge.
    pub(super) patch: usize,
}

impl Network {
    /// The configuration of the preset at this patch edge.
    pub(super) fn config(&self) -> Config {
        Config { patch: self.patch, ..Config::preset(&self.preset).unwrap_or_else(Config::base) }
    }

    /// The network at the patch edge at which it is judged.
    pub(super) fn judged(&self) -> Network {
        Network { patch: self.patch.min(JUDGED), ..self.clone() }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Config::preset(&self.preset) {
            Some(config) if config.patch == self.patch => write!(f, "{}", self.preset),
            _ => write!(f, "{},d{}", self.preset, self.patch),
        }
    }
}

/// A preset and options, separated by commas.
pub(super) fn read(text: &str, letter: &str, usual: usize) -> Result<(Network, usize), String> {
    let (preset, options) = text.split_once(',').unwrap_or((text, ""));
    let config =
        Config::preset(preset).ok_or_else(|| format!("'{preset}' is neither base nor small"))?;
    let options = options.replace(',', "");
    let [value, patch] = match letter {
        "" => [0, numbers(&options, ["d"], [Some(config.patch)])?[0]],
        letter => numbers(&options, [letter, "d"], [Some(usual), Some(config.patch)])?,
    };
    Config { patch, ..config }.check().map_err(|e| e.to_string())?;
    Ok((Network { preset: preset.into(), patch }, value))
}

/// The inputs of a click.
struct Click {
    features: Features,
    prompts: PatchPrompts,
    dense: Tensor,
    history: PromptMaps,
}

/// A network of hashed weights.
fn model(device: &Device, network: &Network) -> Result<Model, OpError> {
    let trouble = |message: String| OpError::Argument { op: "bench", message };
    // Through a file, so that it is read like any model.
    let folder = tempfile::tempdir().map_err(|e| trouble(e.to_string()))?;
    let path = folder.path().join("model.safetensors");
    Weights::hashed(network.config(), "public")
        .save(&path, Precision::F32)
        .map_err(|e| trouble(e.to_string()))?;
    Model::new(device, &Weights::open(&path).map_err(|e| trouble(e.to_string()))?)
}

/// Tokens of an interaction besides its points: for scores and masks.
const OTHER_TOKENS: usize = 7;

/// The launches of a model: of encoding or, for a number of points, of an interaction. Running them
/// fails for a model that is not on a CUDA device.
pub fn launches_of(model: Arc<Model>, points: Option<usize>) -> Timed {
    Box::new(move || {
        let tokens = OTHER_TOKENS + points.unwrap_or(0);
        let message = "only CUDA devices have kernels".to_string();
        let [encode, interact] =
            model.launches(tokens, true)?.ok_or(OpError::Argument { op: "bench", message })?;
        Ok(if points.is_some() { interact } else { encode })
    })
}

/// [`launches_of`] a network of hashed weights.
pub(super) fn timed(
    cuda: &Cuda,
    network: &Network,
    points: Option<usize>,
) -> Result<Timed, OpError> {
    Ok(launches_of(Arc::new(model(&cuda.clone().into(), network)?), points))
}

/// A network of hashed weights on an image of noise, and one run of it; if it is `judged`, an
/// interaction gives the chosen mask before refinement.
pub(super) fn run(
    device: &Device,
    network: &Network,
    points: Option<usize>,
    judged: bool,
) -> Result<Run, OpError> {
    let s = network.patch;
    let model = model(device, network)?;
    let image = noise(&[s, s, s], 1);
    let click = match points {
        None => None,
        Some(points) => {
            let prompts = scribble(s, points, 1);
            let history = prompt_maps(device, s, &prompts.points);
            let features = model.encode(&image, &mut Observer::none())?;
            Some(Click {
                features,
                prompts,
                dense: Tensor::new([s; 3], vec![0.0; s * s * s]),
                history,
            })
        }
    };
    Ok(Box::new(move || match &click {
        None => Ok(model.encode(&image, &mut Observer::none())?.vars()[0].value().clone()),
        Some(Click { features, prompts, dense, history }) => {
            let answer =
                model.interact(features, prompts, dense, history, &mut Observer::none())?;
            // The part of it that a user sees.
            std::hint::black_box(answer.summary()?);
            // Not every device keeps more of the candidates than the chosen one.
            Ok(match judged {
                true => Tensor::new([s; 3], answer.candidates.selected_logits()?.to_vec()),
                false => answer.logits.value().clone(),
            })
        }
    }))
}

/// Compares a network at a small edge with the portable kernels.
pub(super) fn beside_portable(
    device: &Device,
    make: impl Fn(&Device) -> Result<Run, OpError> + 'static,
) -> Judge {
    let device = device.clone();
    Box::new(move |_: &Tensor| {
        let portable = Cpu::with_isa(device.cpu().threads(), Isa::PORTABLE)
            .map_err(|e| OpError::Argument { op: "bench", message: e.to_string() })?;
        let (got, want) = (make(&device)?()?, make(&Device::Cpu(portable))?()?);
        got.try_data()?;
        Ok(wide(&got).into_iter().zip(wide(&want)).collect())
    })
}
