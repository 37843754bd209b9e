//! Weights: model files, and weights made for tests and for training.
//!
//! A model file is a safetensors file of the network's tensors, by their names in the released
//! checkpoints ([`Config::tensors`]), in float32, float16 or bfloat16. Its metadata contain the
//! [`Config`] as JSON. Large float32 matrices stay in the file until they are needed.
//!
//! A file that prism wrote carries a hash of its configuration and of every tensor
//! ([`crate::checksum`]). To change one by other means, leave the `hash` out of its configuration.

mod made;
mod problems;
mod read;

pub use made::hashed;
pub use problems::Problems;

use super::config::{Config, ConfigError};
use crate::checksum;
use crate::memory::{self, Charge, Refused};
use crate::tensor::{Param, Tensor, WEIGHTS};
use half::{bf16, f16};
use safetensors::View;
use safetensors::tensor::Dtype;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The key of a model file's metadata under which the configuration is stored, as JSON.
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
    #[error("{path}: not a readable safetensors file: {problem}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The file is of another kind.
    #[error("{path}: is {what}, expected a model (.safetensors)")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: String,
    },
    /// The file does not contain a network's configuration.
    #[error(
        "{path}: {problem} (a model file has its configuration in the metadata key '{CONFIG_KEY}'; 'prism convert' writes it)"
    )]
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
    /// A weight is not a finite number, or the file is not as it was written.
    #[error("{path}: {problem}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        problem: String,
    },
    /// There is not enough memory.
    #[error("{path}: {source}")]
    Memory {
        /// The file.
        path: PathBuf,
        /// What was refused.
        source: Refused,
    },
    /// The file's tensors are not the network's.
    #[error("{path}: the tensors do not fit the network{problems}")]
    Tensors {
        /// The file.
        path: PathBuf,
        /// The differences.
        problems: Box<Problems>,
    },
}

/// A network's weights, and its configuration. Every tensor that the configuration lists is there.
pub struct Weights {
    /// The architecture of the network.
    pub config: Config,
    tensors: HashMap<String, Tensor>,
    /// The index of each in the configuration's list.
    places: HashMap<String, usize>,
    /// The name of the element type in which the file stores them.
    pub dtype: String,
    /// Whether the file carried a hash of its contents, which was checked when it was read.
    pub sealed: bool,
    charge: Arc<Charge>,
}

/// The index of each tensor in the configuration's list.
fn places(config: &Config) -> HashMap<String, usize> {
    config.tensors().into_iter().enumerate().map(|(place, (name, _))| (name, place)).collect()
}

/// Element types a model file may be written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl Weights {
    /// The memory that they take, for code that keeps using them.
    pub(crate) fn charge(&self) -> Arc<Charge> {
        self.charge.clone()
    }

    fn of(config: Config, tensors: HashMap<String, Tensor>) -> Weights {
        Weights {
            places: places(&config),
            config,
            tensors,
            dtype: "F32".into(),
            sealed: false,
            charge: Arc::default(),
        }
    }

    /// A warning about the file that they were read from, called `file` in it, if it carried no
    /// hash: then nothing shows that it is as it was written.
    pub fn warning(&self, file: impl std::fmt::Display) -> Option<String> {
        let text = "carries no hash of its contents: a changed byte would not be noticed; 'prism convert' writes a model that has one";
        (!self.sealed).then(|| format!("{file}: {text}"))
    }

    /// Weights from tensors by name.
    ///
    /// # Errors
    /// They are not the tensors of the configuration.
    pub fn from_tensors(
        config: Config,
        tensors: HashMap<String, Tensor>,
    ) -> Result<Weights, Problems> {
        let present = tensors.iter().map(|(n, t)| (n.clone(), t.shape().to_vec())).collect();
        let problems = Problems::of(&config, &present);
        if problems.is_empty() { Ok(Weights::of(config, tensors)) } else { Err(problems) }
    }

    /// Every tensor, for writing, in the order of [`Config::tensors`].
    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let mut list: Vec<(usize, &mut Tensor)> =
            self.tensors.iter_mut().filter_map(|(n, t)| Some((*self.places.get(n)?, t))).collect();
        list.sort_by_key(|(place, _)| *place);
        list.into_iter().map(|(_, t)| t).collect()
    }

    /// The tensor called `name`, with its index in [`Config::tensors`].
    ///
    /// # Panics
    /// If the configuration does not list it: every constructor has checked that all it lists are
    /// here.
    pub fn get(&self, name: &str) -> Param {
        match (self.tensors.get(name), self.places.get(name)) {
            (Some(tensor), Some(&place)) => Param::new(tensor.clone(), place),
            _ => panic!("the configuration lists no tensor '{name}'"),
        }
    }

    /// The number of parameters.
    pub fn parameters(&self) -> usize {
        self.config.tensors().iter().map(|(_, s)| s.iter().product::<usize>()).sum()
    }

    /// Writes a model file, whole or not at all, with a hash of its contents. Weights are rounded
    /// to `precision`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path, precision: Precision) -> Result<(), WeightsError> {
        let io = |source| WeightsError::Io { path: path.into(), source };
        let config = serde_json::to_string(&self.config).map_err(|e| io(e.into()))?;
        let views = self.config.tensors().into_iter().map(|(name, shape)| {
            let view = Encoded { tensor: (*self.get(&name)).clone(), shape, precision };
            (name, view)
        });
        let views: Vec<(String, Encoded)> = views.collect();
        let hashes =
            views.iter().map(|(name, view)| (name.as_str(), checksum::of_bytes(&view.data())));
        let about = checksum::sealed(&config, hashes);
        crate::output::write_tensors(path, CONFIG_KEY, about, views).map_err(io)
    }
}

/// A tensor to be written to a file, encoded when its turn comes.
struct Encoded {
    tensor: Tensor,
    shape: Vec<usize>,
    precision: Precision,
}

impl View for Encoded {
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
        let mut bytes = memory::list(WEIGHTS, self.data_len());
        match self.precision {
            Precision::F32 => bytes.extend(values.flat_map(|v| v.to_le_bytes())),
            Precision::F16 => bytes.extend(values.flat_map(|v| f16::from_f32(*v).to_le_bytes())),
            Precision::Bf16 => bytes.extend(values.flat_map(|v| bf16::from_f32(*v).to_le_bytes())),
        }
        bytes.into()
    }
    fn data_len(&self) -> usize {
        self.tensor.len() * if self.precision == Precision::F32 { 4 } else { 2 }
    }
}
