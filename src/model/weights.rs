//! Weights by checkpoint name: safetensors files (memory-mapped), and weights computed from a salt.

use super::config::{Config, ConfigError};
use crate::input::{HEAD, Kind, recognise};
use crate::prompt::simulate::{generator, normal};
use crate::tensor::{Param, Tensor};
use half::{bf16, f16};
use rand::RngExt;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The key of a model file's metadata under which the configuration stands, as JSON.
const CONFIG_KEY: &str = "prism";

/// Why a model file cannot be used or written.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// Not a safetensors file, or a damaged one.
    #[error("{path}: not a readable safetensors file: {source}")]
    Format {
        /// The file.
        path: PathBuf,
        /// The parser's error.
        source: safetensors::SafeTensorError,
    },
    /// It is something else.
    #[error("{path}: is {what}, expected a model (.safetensors)")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: String,
    },
    /// The file does not say what network it holds.
    #[error("{path}: {problem} (a model file carries its configuration under the metadata key '{CONFIG_KEY}'; 'prism convert' writes it)")]
    NoConfig {
        /// The file.
        path: PathBuf,
        /// What is missing or wrong.
        problem: String,
    },
    /// The configuration describes no network.
    #[error("{path}: {source}")]
    Config {
        /// The file.
        path: PathBuf,
        /// Which field.
        source: ConfigError,
    },
    /// The file's tensors are not the network's.
    #[error("{path}: the tensors do not fit the network{problems}")]
    Tensors {
        /// The file.
        path: PathBuf,
        /// The differences.
        problems: Problems,
    },
    /// A weight is no number.
    #[error("{path}: {name} holds {value} at element {at}, expected finite numbers")]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Where in it.
        at: usize,
        /// What stands there.
        value: f32,
    },
}

/// How a set of tensors differs from what a network needs.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Problems {
    /// Needed and absent.
    pub missing: Vec<String>,
    /// Present and unknown.
    pub unexpected: Vec<String>,
    /// Present with another shape: name, found, needed.
    pub misshaped: Vec<(String, Vec<usize>, Vec<usize>)>,
    /// Present with an element type that is not a float of at most 32 bits: name, type.
    pub mistyped: Vec<(String, String)>,
}

impl std::fmt::Display for Problems {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (what, names) in [("missing", &self.missing), ("unexpected", &self.unexpected)] {
            names.iter().try_for_each(|n| write!(f, "\n  {what}: {n}"))?;
        }
        for (name, got, needed) in &self.misshaped {
            write!(f, "\n  mis-shaped: {name} is {got:?}, expected {needed:?}")?;
        }
        self.mistyped.iter().try_for_each(|(name, t)| write!(f, "\n  mis-typed: {name} is {t}, expected a float"))
    }
}

impl Problems {
    /// Compares `present` (name to shape) with what `config` needs. Tensors that released checkpoints hold without use are neither.
    pub fn of(config: &Config, present: &BTreeMap<String, Vec<usize>>) -> Problems {
        let needed: HashMap<String, Vec<usize>> = config.tensors().into_iter().collect();
        let spare: HashMap<String, Vec<usize>> = config.unused().into_iter().collect();
        let mut problems = Problems::default();
        for (name, shape) in config.tensors() {
            match present.get(&name) {
                None => problems.missing.push(name),
                Some(got) if *got != shape => problems.misshaped.push((name, got.clone(), shape)),
                Some(_) => {}
            }
        }
        let unknown = present.keys().filter(|n| !needed.contains_key(*n) && !spare.contains_key(*n));
        problems.unexpected = unknown.cloned().collect();
        problems
    }

    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        *self == Problems::default()
    }
}

/// A network's weights.
pub struct Weights {
    /// What they are weights of.
    pub config: Config,
    tensors: HashMap<String, Tensor>,
    /// Where each stands in the configuration's list.
    places: HashMap<String, usize>,
    /// The element type they are stored in.
    pub dtype: String,
}

/// Where each tensor stands in the configuration's list.
fn places(config: &Config) -> HashMap<String, usize> {
    config.tensors().into_iter().enumerate().map(|(place, (name, _))| (name, place)).collect()
}

/// Element types a model file may be written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl Weights {
    /// Opens a model file. Float32 tensors stay in the mapped file; others are widened.
    pub fn open(path: &Path) -> Result<Weights, WeightsError> {
        let io = |source| WeightsError::Io { path: path.into(), source };
        let file = std::fs::File::open(path).map_err(io)?;
        if !file.metadata().map_err(io)?.is_file() {
            return Err(WeightsError::Foreign { path: path.into(), what: "a folder or a pipe".into() });
        }
        // The map is read-only; a file that another process cuts short meanwhile is the usual hazard of mapping.
        let map = Arc::new(unsafe { memmap2::Mmap::map(&file) }.map_err(io)?);
        Weights::parse(path, &map, Some(&map))
    }

    /// Reads a model file that lies in memory. Its tensors are copied.
    pub fn from_bytes(bytes: &[u8]) -> Result<Weights, WeightsError> {
        Weights::parse(Path::new("model in memory"), bytes, None)
    }

    fn parse(path: &Path, bytes: &[u8], map: Option<&Arc<memmap2::Mmap>>) -> Result<Weights, WeightsError> {
        match recognise(&bytes[..bytes.len().min(HEAD)]) {
            Some(Kind::Safetensors) | None => {}
            Some(other) => return Err(WeightsError::Foreign { path: path.into(), what: other.name().into() }),
        }
        let format = |source| WeightsError::Format { path: path.into(), source };
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(format)?;
        let no_config = |problem: String| WeightsError::NoConfig { path: path.into(), problem };
        let text = metadata.metadata().as_ref().and_then(|m| m.get(CONFIG_KEY));
        let text = text.ok_or_else(|| no_config("no network configuration in it".into()))?;
        let config: Config = serde_json::from_str(text).map_err(|e| no_config(format!("unreadable configuration: {e}")))?;
        config.check().map_err(|source| WeightsError::Config { path: path.into(), source })?;

        let file = SafeTensors::deserialize(bytes).map_err(format)?;
        let present = file.iter().map(|(n, v)| (n.to_string(), v.shape().to_vec())).collect();
        let mut problems = Problems::of(&config, &present);
        let mut tensors = HashMap::new();
        let mut dtype = String::new();
        for (name, view) in file.iter() {
            match read(map, &view) {
                Some(tensor) => drop(tensors.insert(name.to_string(), tensor)),
                None => problems.mistyped.push((name.to_string(), format!("{:?}", view.dtype()))),
            }
            dtype = format!("{:?}", view.dtype());
        }
        if !problems.is_empty() {
            return Err(WeightsError::Tensors { path: path.into(), problems });
        }
        // One that is no number makes every answer none, and its mask empty.
        for (name, _) in config.tensors() {
            let values = tensors.get(&name).map(Tensor::data).unwrap_or_default();
            if let Some(at) = not_finite(values) {
                return Err(WeightsError::NotFinite { path: path.into(), name, at, value: values[at] });
            }
        }
        Ok(Weights { places: places(&config), config, tensors, dtype })
    }

    /// Weights given in memory, which must be the configuration's.
    pub fn from_tensors(config: Config, tensors: HashMap<String, Tensor>) -> Result<Weights, Problems> {
        let present = tensors.iter().map(|(n, t)| (n.clone(), t.shape().to_vec())).collect();
        let problems = Problems::of(&config, &present);
        if problems.is_empty() { Ok(Weights { places: places(&config), config, tensors, dtype: "F32".into() }) } else { Err(problems) }
    }

    /// Weights that are a function of `salt` and their names, for tests and installations without a trained model.
    pub fn hashed(config: Config, salt: &str) -> Weights {
        let named = config.tensors().into_iter().map(|(name, shape)| {
            let values = hashed(salt, &name, &shape);
            (name, Tensor::new(shape, values))
        });
        Weights { tensors: named.collect(), places: places(&config), config, dtype: "F32".into() }
    }

    /// Weights to start training from: PyTorch's defaults for convolutions and dense layers (uniform within the inverse root of the fan-in), ones and zeros for norms, zeros
    /// for relative positions, normal numbers for embeddings and position codes.
    pub fn initial(config: Config, seed: u64) -> Weights {
        let list = config.tensors();
        let shapes: HashMap<&str, &Vec<usize>> = list.iter().map(|(n, s)| (n.as_str(), s)).collect();
        let tensors = list.iter().enumerate().map(|(place, (name, shape))| {
            let values = initial(&mut generator(seed, &[0x69_6e_69_74, place as u64]), name, shape, &shapes);
            (name.clone(), Tensor::new(shape.clone(), values))
        });
        Weights { tensors: tensors.collect(), places: places(&config), config, dtype: "F32".into() }
    }

    /// Takes what lies in a mapped file out of the process, to be read there again when needed.
    pub(crate) fn rest(&self) {
        self.tensors.values().for_each(Tensor::rest);
    }

    /// Every tensor, to be changed, in the order of [`Config::tensors`].
    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let mut list: Vec<(usize, &mut Tensor)> = self.tensors.iter_mut().filter_map(|(n, t)| Some((*self.places.get(n)?, t))).collect();
        list.sort_by_key(|(place, _)| *place);
        list.into_iter().map(|(_, t)| t).collect()
    }

    /// The tensor called `name`, with its place in [`Config::tensors`].
    ///
    /// # Panics
    /// When the configuration does not list it: every constructor has checked that all it lists are here.
    pub fn get(&self, name: &str) -> Param {
        match (self.tensors.get(name), self.places.get(name)) {
            (Some(tensor), Some(&place)) => Param::new(tensor.clone(), place),
            _ => panic!("the configuration lists no tensor '{name}'"),
        }
    }

    /// How many parameters there are.
    pub fn parameters(&self) -> usize {
        self.config.tensors().iter().map(|(_, s)| s.iter().product::<usize>()).sum()
    }

    /// Writes a model file, whole or not at all.
    pub fn save(&self, path: &Path, precision: Precision) -> Result<(), WeightsError> {
        let io = |source| WeightsError::Io { path: path.into(), source };
        let config = serde_json::to_string(&self.config).map_err(|e| io(e.into()))?;
        // One key alone: several would stand in another order each time, and the same model be another file.
        let metadata = HashMap::from([(CONFIG_KEY.to_string(), config)]);
        let views = self.config.tensors().into_iter().map(|(name, shape)| {
            let view = Encoded { tensor: (*self.get(&name)).clone(), shape, precision };
            (name, view)
        });
        let pending = crate::output::Pending::new(path, "").map_err(io)?;
        let wrap = |source| WeightsError::Format { path: path.into(), source };
        safetensors::serialize_to_file(views.collect::<Vec<_>>(), Some(metadata), pending.path()).map_err(wrap)?;
        pending.commit().map_err(io)
    }
}

/// Reads a tensor of floats; none for another element type.
fn read(map: Option<&Arc<memmap2::Mmap>>, view: &TensorView) -> Option<Tensor> {
    let (bytes, shape) = (view.data(), view.shape());
    let wide = |values: Vec<f32>| Some(Tensor::new(shape, values));
    let halves = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match view.dtype() {
        Dtype::F32 => map
            .and_then(|map| Tensor::from_mapped(shape, map, bytes.as_ptr() as usize - map.as_ptr() as usize))
            .or_else(|| wide(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())),
        Dtype::F16 => wide(halves().map(|b| f16::from_bits(b).to_f32()).collect()),
        Dtype::BF16 => wide(halves().map(|b| bf16::from_bits(b).to_f32()).collect()),
        _ => None,
    }
}

/// Where the first value stands that is no finite number. In blocks, so that the many that are take no branches.
fn not_finite(values: &[f32]) -> Option<usize> {
    const BLOCK: usize = 1024;
    let block = values.chunks(BLOCK).position(|b| b.iter().fold(false, |odd, v| odd | !v.is_finite()))?;
    let within = values[block * BLOCK..].iter().position(|v| !v.is_finite())?;
    Some(block * BLOCK + within)
}

/// A tensor on its way into a file, encoded when its turn comes.
struct Encoded {
    tensor: Tensor,
    shape: Vec<usize>,
    precision: Precision,
}

impl safetensors::View for Encoded {
    fn dtype(&self) -> Dtype {
        match self.precision {
            Precision::F32 => Dtype::F32,
            Precision::F16 => Dtype::F16,
            Precision::Bf16 => Dtype::BF16,
        }
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        let values = self.tensor.data().iter();
        match self.precision {
            Precision::F32 => values.flat_map(|v| v.to_le_bytes()).collect(),
            Precision::F16 => values.flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            Precision::Bf16 => values.flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        }
    }
    fn data_len(&self) -> usize {
        self.tensor.len() * if self.precision == Precision::F32 { 4 } else { 2 }
    }
}

/// The starting values of a tensor.
fn initial(rng: &mut impl rand::Rng, name: &str, shape: &[usize], shapes: &HashMap<&str, &Vec<usize>>) -> Vec<f32> {
    let count: usize = shape.iter().product();
    let scale = |shape: &[usize]| {
        // PyTorch takes the second axis for the inputs, of transposed convolutions too.
        1.0 / (shape[1..].iter().product::<usize>() as f32).sqrt()
    };
    let embedding = ["point_embeddings.", "not_a_point_embed", "no_mask_embed", "mask_tokens", "iou_token", "gaussian_matrix"];
    if embedding.iter().any(|t| name.contains(t)) {
        return (0..count).map(|_| normal(rng)).collect();
    }
    if name.contains("rel_pos_") {
        return vec![0.0; count];
    }
    if name.ends_with("pos_embed") {
        return (0..count).map(|_| 0.02 * normal(rng)).collect();
    }
    let bound = match name.strip_suffix(".bias").map(|at| format!("{at}.weight")) {
        Some(weight) => match shapes.get(weight.as_str()) {
            Some(shape) if shape.len() > 1 => scale(shape),
            _ => return vec![0.0; count],
        },
        None if shape.len() == 1 => return vec![1.0; count],
        None => scale(shape),
    };
    (0..count).map(|_| rng.random_range(-bound..=bound)).collect()
}

/// The values of a hashed tensor: FNV-1a of `salt/name` seeds a splitmix64 sequence of uniform numbers in [-1, 1), scaled by the kind of tensor.
pub fn hashed(salt: &str, name: &str, shape: &[usize]) -> Vec<f32> {
    let seed = format!("{salt}/{name}").bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ b as u64).wrapping_mul(0x0000_0100_0000_01b3));
    let token = ["point_embeddings.", "not_a_point_embed", "no_mask_embed", "mask_tokens", "iou_token"];
    let (offset, scale) = if name.ends_with("positional_encoding_gaussian_matrix") {
        (0.0, 1.0)
    } else if name.ends_with("pos_embed") {
        (0.0, 0.5)
    } else if name.contains("rel_pos_") {
        (0.0, 0.3)
    } else if token.iter().any(|t| name.contains(t)) {
        (0.0, 1.0)
    } else if name.ends_with(".bias") {
        (0.0, 0.2)
    } else if shape.len() == 1 {
        (1.0, 0.2)
    } else {
        let transposed = name.ends_with("deconv.weight") || name.ends_with("single_up.3.weight");
        let fan_in = if transposed { shape[0] } else { shape[1..].iter().product() };
        (0.0f32, ((3.0 / fan_in as f64).sqrt()) as f32)
    };
    let value = |i: usize| {
        let mut z = seed.wrapping_add((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let u = (z >> 40) as f32 * (-24f32).exp2();
        offset + scale * (2.0 * u - 1.0)
    };
    (0..shape.iter().product()).map(value).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_not_finite_is_found() {
        let mut values = vec![1.0f32; 3000];
        assert_eq!(super::not_finite(&values), None);
        values[2999] = f32::NEG_INFINITY;
        assert_eq!(super::not_finite(&values), Some(2999));
        values[1024] = f32::NAN;
        assert_eq!(super::not_finite(&values), Some(1024));
    }

    #[test]
    fn hash_matches_its_published_values() {
        let v = super::hashed("public", "a.weight", &[3, 3]);
        // Scaled by sqrt(3 / 3) = 1: 0x1.e847d8p-1, -0x1.11781p-1, -0x1.421f4p-4.
        assert_eq!(v[..3].iter().map(|v| v.to_bits()).collect::<Vec<_>>(), [0x3f74_23ec, 0xbf08bc08, 0xbda10fa0]);
    }
}
