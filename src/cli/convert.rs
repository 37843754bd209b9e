//! `prism convert` and `prism weights`: making model files.

use super::{Failure, say, warn};
use crate::input::read_text;
use crate::memory::{self, Charge};
use crate::model::checkpoint::{StateDict, read};
use crate::model::weights::{Precision, Problems};
use crate::model::{Config, Intensity, Weights};
use crate::tensor::{Tensor, WEIGHTS, extent};
use clap::Args;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::path::{Path, PathBuf};

/// Convert a PyTorch checkpoint to a model file
///
/// Reads a PyTorch checkpoint (zip archive, legacy stream or bare state dictionary) without
/// executing any code in it, checks its tensors against the network, and writes a model file. A
/// model file (.safetensors) is also accepted, for example to change its element type; it keeps its
/// own configuration.
#[derive(Args)]
pub struct Convert {
    /// Checkpoint, such as best.pth.tar, or a model file
    checkpoint: PathBuf,
    /// Model file to write (.safetensors)
    model: PathBuf,
    /// Element type to store
    #[arg(long, default_value = "f32", value_name = "TYPE")]
    dtype: Precision,
    /// Dataset whose intensity statistics the weights were trained with: colon, pancreas, liver or
    /// kidney
    #[arg(long, value_name = "NAME", value_parser = ["colon", "pancreas", "liver", "kidney"])]
    preset: Option<String>,
    /// Calibration of the expected Dice of a session's answer: A plus B times the network's score,
    /// as fitted by `prism eval`
    #[arg(long, value_name = "A,B", value_parser = calibration, allow_hyphen_values = true)]
    calibration: Option<[f32; 2]>,
    /// Network: base, small, or a JSON file with a configuration [default: base, the released
    /// architecture]
    #[arg(long, alias = "config", value_name = "NAME|FILE")]
    network: Option<PathBuf>,
    /// If tensors do not fit the network, list all of them
    #[arg(long)]
    verbose: bool,
}

/// Reads `A,B`.
fn calibration(text: &str) -> Result<[f32; 2], String> {
    let values: Option<Vec<f32>> =
        text.split(',').map(|v| v.trim().parse().ok().filter(|v: &f32| v.is_finite())).collect();
    values.and_then(|v| v.try_into().ok()).ok_or_else(|| "expected A,B: two numbers".into())
}

/// Write a model with hashed weights, to test an installation without a trained model
///
/// The weights are a function of a salt and the tensors' names: right shapes and sizes, but no
/// training. The masks of such a model mean nothing.
#[derive(Args)]
pub struct HashedWeights {
    /// Text; the same text gives the same weights
    #[arg(long, value_name = "TEXT")]
    salt: String,
    /// Model file to write (.safetensors)
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Element type to store
    #[arg(long, default_value = "f32", value_name = "TYPE")]
    dtype: Precision,
    /// Network: base, small, or a JSON file with a configuration [default: base, the released
    /// architecture]
    #[arg(long, alias = "config", value_name = "NAME|FILE")]
    network: Option<PathBuf>,
}

fn config(path: Option<&Path>) -> Result<Config, Failure> {
    let Some(path) = path else { return Ok(Config::base()) };
    if let Some(preset) = path.to_str().and_then(Config::preset) {
        return Ok(preset);
    }
    let fail = |m: String| Failure::Failed(format!("{}: {m}", path.display()));
    let text = read_text(path, "JSON").map_err(fail)?;
    let config: Config = serde_json::from_str(&text)
        .map_err(|e| fail(format!("not a network configuration: {e}")))?;
    config.check().map_err(|e| fail(e.to_string()))?;
    Ok(config)
}

impl Convert {
    pub fn run(&self) -> Result<(), Failure> {
        if self.checkpoint.extension().is_some_and(|e| e == "safetensors") {
            if self.network.is_some() {
                return Err(Failure::Usage(
                    "--network: a model file has its own configuration".into(),
                ));
            }
            let mut weights = Weights::open(&self.checkpoint)?;
            // The new file's hash covers whatever this one has become.
            weights.warning(self.checkpoint.display()).iter().for_each(|w| warn(w));
            if let Some(name) = &self.preset {
                weights.config.intensity = Intensity::preset(name);
            }
            weights.config.calibration = self.calibration.or(weights.config.calibration);
            return save(&weights, &self.model, self.dtype);
        }
        let mut config = config(self.network.as_deref())?;
        if let Some(name) = &self.preset {
            config.intensity = Intensity::preset(name);
        }
        config.calibration = self.calibration;
        let state = read(&self.checkpoint)?;
        let problems = problems(&config, &state);
        if !problems.is_empty() {
            let (path, network) = (
                self.checkpoint.display(),
                self.network.as_deref().unwrap_or(Path::new("base")).display(),
            );
            let (hint, each) = match self.verbose {
                true => ("use --network for another", problems.all()),
                false => (
                    "use --network for another, --verbose to list every tensor",
                    problems.to_string(),
                ),
            };
            return Err(Failure::Failed(format!(
                "{path}: the tensors do not fit the network {network} ({hint}){each}"
            )));
        }
        let mut tensors = HashMap::new();
        let mut charge = Charge::default();
        for (name, _) in config.tensors() {
            let entry = &state[&name];
            let named = |e: &dyn Display| {
                Failure::Failed(format!("{}: {name}: {e}", self.checkpoint.display()))
            };
            let size = extent(&entry.shape).unwrap_or(usize::MAX);
            charge.grow::<f32>(WEIGHTS, size).map_err(|e| named(&e))?;
            let values = entry.values().map_err(|e| named(&e))?;
            let values = values.unwrap_or_default().into_iter().map(|v| v as f32);
            let values: Vec<f32> = memory::collected(WEIGHTS, values);
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                let path = self.checkpoint.display();
                return Err(Failure::Failed(format!(
                    "{path}: {name} holds {} at element {at}, expected finite numbers",
                    values[at]
                )));
            }
            tensors.insert(name, Tensor::new(entry.shape.clone(), values));
        }
        if config.intensity.is_none() {
            warn(
                "no --preset: the model file records no intensity statistics; give them to 'prism segment', or it uses percentiles",
            );
        }
        let weights =
            Weights::from_tensors(config, tensors).map_err(|p| Failure::Failed(p.to_string()))?;
        save(&weights, &self.model, self.dtype)
    }
}

fn problems(config: &Config, state: &StateDict) -> Problems {
    let present: BTreeMap<String, Vec<usize>> =
        state.iter().map(|(n, e)| (n.clone(), e.shape.clone())).collect();
    let mut problems = Problems::of(config, &present);
    let floats = ["float64", "float32", "float16", "bfloat16"];
    let wrong = config.tensors().into_iter().filter_map(|(n, _)| {
        let dtype = state.get(&n)?.dtype;
        (!floats.contains(&dtype)).then(|| (n, dtype.to_string()))
    });
    problems.mistyped = wrong.collect();
    problems
}

impl HashedWeights {
    pub fn run(&self) -> Result<(), Failure> {
        let weights = Weights::hashed(config(self.network.as_deref())?, &self.salt);
        save(&weights, &self.output, self.dtype)
    }
}

fn save(weights: &Weights, path: &Path, precision: Precision) -> Result<(), Failure> {
    weights.save(path, precision)?;
    let bytes = std::fs::metadata(path).map(|m| m.len()).unwrap_or(0);
    say(&format!(
        "{}: {} parameters, {:.1} MB\n",
        path.display(),
        weights.parameters(),
        bytes as f64 / 1e6
    ))
}
