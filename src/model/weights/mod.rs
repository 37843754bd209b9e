//! Weights by checkpoint name: safetensors files, whose large matrices stay in the file until they
//! are needed, and weights computed from a salt.
//!
//! A file that prism wrote carries a hash of its configuration and of every tensor
//! ([`crate::checksum`]). Whoever changes one by other means leaves the `hash` out of its
//! configuration.

use super::config::{Config, ConfigError};
use crate::checksum::{self, PIECE};
use crate::device::processors;
use crate::input::{HEAD, Kind, recognise};
use crate::memory::{self, Charge, Refused};
use crate::prompt::simulate::{generator, normal};
use crate::tensor::stored::{LARGE, Source, Stored};
use crate::tensor::{Param, Tensor, WEIGHTS, extent};
use blake3::Hash;
use half::{bf16, f16};
use rand::RngExt;
use safetensors::SafeTensorError;
use safetensors::View;
use safetensors::tensor::{Dtype, Metadata};
use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

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
    #[error("{path}: not a readable safetensors file: {problem}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The file is something else.
    #[error("{path}: is {what}, expected a model (.safetensors)")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: String,
    },
    /// The file does not say what network it holds.
    #[error(
        "{path}: {problem} (a model file carries its configuration under the metadata key '{CONFIG_KEY}'; 'prism convert' writes it)"
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
    /// A weight is no number, or the file is not as it was written.
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

/// How a set of tensors differs from what a network needs.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Problems {
    /// How many tensors the network has.
    pub needed: usize,
    /// Needed and absent.
    pub missing: Vec<String>,
    /// Present and unknown.
    pub unexpected: Vec<String>,
    /// Present with another shape: name, found, needed.
    pub misshaped: Vec<(String, Vec<usize>, Vec<usize>)>,
    /// Present with an element type that is not a float of at most 32 bits: name, type.
    pub mistyped: Vec<(String, String)>,
}

/// Names of a kind of difference that are told, and characters of each: they come from files.
const TOLD: usize = 3;
const LONGEST: usize = 200;

/// A line a kind of difference, with how many there are and the first of them: from another
/// network's file hundreds differ. [`Problems::all`] has every one.
impl std::fmt::Display for Problems {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "\n  expected: {} tensors", self.needed)?;
        for (what, each) in self.kinds().into_iter().filter(|(_, each)| !each.is_empty()) {
            let told: Vec<String> =
                each.iter().take(TOLD).map(|text| text.chars().take(LONGEST).collect()).collect();
            let more = if each.len() > TOLD { "; ..." } else { "" };
            write!(f, "\n  {} {what}: {}{more}", each.len(), told.join("; "))?;
        }
        Ok(())
    }
}

impl Problems {
    /// Compares `present` (name to shape) with what `config` needs. Tensors that released
    /// checkpoints hold without use are neither.
    pub fn of(config: &Config, present: &BTreeMap<String, Vec<usize>>) -> Problems {
        let needed: HashMap<String, Vec<usize>> = config.tensors().into_iter().collect();
        let spare: HashMap<String, Vec<usize>> = config.unused().into_iter().collect();
        let mut problems = Problems { needed: needed.len(), ..Problems::default() };
        for (name, shape) in config.tensors() {
            match present.get(&name) {
                None => problems.missing.push(name),
                Some(got) if *got != shape => problems.misshaped.push((name, got.clone(), shape)),
                Some(_) => {}
            }
        }
        let unknown =
            present.keys().filter(|n| !needed.contains_key(*n) && !spare.contains_key(*n));
        problems.unexpected = unknown.cloned().collect();
        problems
    }

    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.kinds().iter().all(|(_, each)| each.is_empty())
    }

    /// Every difference, one a line.
    pub fn all(&self) -> String {
        let lines = self.kinds().into_iter().flat_map(|(what, each)| {
            each.into_iter().map(move |text| format!("\n  {what}: {text}"))
        });
        lines.collect()
    }

    /// The differences in words, by kind.
    fn kinds(&self) -> [(&'static str, Vec<String>); 4] {
        let misshaped = self
            .misshaped
            .iter()
            .map(|(name, got, needed)| format!("{name} is {got:?}, expected {needed:?}"));
        let mistyped = self
            .mistyped
            .iter()
            .map(|(name, dtype)| format!("{name} is {dtype}, expected a float"));
        [
            ("missing", self.missing.clone()),
            ("unexpected", self.unexpected.clone()),
            ("mis-shaped", misshaped.collect()),
            ("mis-typed", mistyped.collect()),
        ]
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
    /// Whether the file carried the hash of what is in it, which was checked.
    pub sealed: bool,
    charge: Arc<Charge>,
}

/// Where each tensor stands in the configuration's list.
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
    /// Opens a model file and reads it through once, to hold it against the hash that it carries
    /// and to see that every weight is a number. Large float32 tensors stay in the file, and are
    /// read again as they are needed; all others are in memory then.
    ///
    /// # Errors
    /// The file is no model, is damaged, has a weight that is no number, or is larger than the
    /// memory that is left.
    pub fn open(path: &Path) -> Result<Weights, WeightsError> {
        let io = |source| WeightsError::Io { path: path.into(), source };
        // A pipe that nothing writes to would not even open.
        let meta = std::fs::metadata(path).map_err(io)?;
        if !meta.is_file() {
            return Err(WeightsError::Foreign {
                path: path.into(),
                what: "a folder or a pipe".into(),
            });
        }
        crate::input::remember(path);
        let mut file = std::fs::File::open(path).map_err(io)?;
        let meta = file.metadata().map_err(io)?;
        let mut head = vec![];
        file.by_ref().take(HEAD as u64).read_to_end(&mut head).map_err(io)?;
        check_kind(path, &head)?;
        let length = head.get(..8).map_or(0, |n| u64::from_le_bytes(std::array::from_fn(|i| n[i])));
        if length <= MOST_HEADER {
            let left = (8 + length).saturating_sub(head.len() as u64);
            file.by_ref().take(left).read_to_end(&mut head).map_err(io)?;
            head.truncate(8 + length as usize);
        }
        let source = Source::new(path, file);
        caught(path, || Weights::parse(path, &head, meta.len(), &Place::File(source)))
    }

    /// Reads a model file that lies in memory. Its tensors are copied.
    ///
    /// # Errors
    /// As [`Weights::open`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Weights, WeightsError> {
        let path = Path::new("model in memory");
        check_kind(path, &bytes[..bytes.len().min(HEAD)])?;
        caught(path, || Weights::parse(path, bytes, bytes.len() as u64, &Place::Memory(bytes)))
    }

    /// `head` is the file's header, or more.
    fn parse(path: &Path, head: &[u8], bytes: u64, place: &Place) -> Result<Weights, WeightsError> {
        let format =
            |problem: &str| WeightsError::Format { path: path.into(), problem: problem.into() };
        let length = head.get(..8).map(|n| u64::from_le_bytes(std::array::from_fn(|i| n[i])));
        let length = length
            .filter(|n| *n <= MOST_HEADER)
            .ok_or_else(|| format("its header is missing or absurdly long"))?;
        let header =
            head.get(8..8 + length as usize).ok_or_else(|| format("it ends within its header"))?;
        // What its list becomes is several times as long, and is made by others.
        drop(
            memory::room::<u8>(WEIGHTS, 8 * header.len())
                .map_err(|source| WeightsError::Memory { path: path.into(), source })?,
        );
        let header: Metadata = serde_json::from_slice(header)
            .map_err(|e| format(&format!("unreadable header: {e}")))?;
        let no_config = |problem: String| WeightsError::NoConfig { path: path.into(), problem };
        let text = header.metadata().as_ref().and_then(|m| m.get(CONFIG_KEY));
        let text = text.ok_or_else(|| no_config("no network configuration in it".into()))?;
        let (text, hash) = checksum::opened(text);
        let config: Config = serde_json::from_str(&text)
            .map_err(|e| no_config(format!("unreadable configuration: {e}")))?;
        config.check().map_err(|source| WeightsError::Config { path: path.into(), source })?;

        let list = header.tensors();
        let mut parts = vec![];
        let (mut end, mut mistyped) = (0, vec![]);
        for (name, info) in &list {
            if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                mistyped.push((name.clone(), format!("{:?}", info.dtype)));
                continue;
            }
            let size = info.dtype.bitsize() / 8;
            let (from, to) = info.data_offsets;
            let expected = extent(&info.shape).and_then(|n| n.checked_mul(size));
            if to < from || expected != Some(to - from) {
                return Err(format(&format!(
                    "{name} takes bytes {from} to {to}, which its shape {:?} does not",
                    info.shape
                )));
            }
            end = end.max(to);
            parts.push(Part {
                name,
                shape: &info.shape,
                dtype: info.dtype,
                at: 8 + length + from as u64,
                bytes: to - from,
            });
        }
        if mistyped.is_empty() && 8 + length + end as u64 != bytes {
            return Err(format(&format!(
                "it has {bytes} bytes, its header speaks of {}: it was cut short, or something follows",
                8 + length + end as u64
            )));
        }
        let present = list.iter().map(|(n, info)| (n.clone(), info.shape.clone())).collect();
        let problems = Problems { mistyped, ..Problems::of(&config, &present) };
        if !problems.is_empty() {
            return Err(WeightsError::Tensors { path: path.into(), problems: Box::new(problems) });
        }
        let damaged = |problem: String| WeightsError::Damaged { path: path.into(), problem };
        let kept = parts.iter().filter(|p| !place.keeps(p)).map(Part::len).sum();
        let charge = Charge::of::<f32>(WEIGHTS, kept)
            .map_err(|source| WeightsError::Memory { path: path.into(), source })?;
        let read = read_all(place, &parts).map_err(damaged)?;
        if let Some(hash) = hash {
            let tensors = parts.iter().zip(&read).map(|(p, (_, hash, _))| (p.name, *hash));
            checksum::check(&text, hash, tensors).map_err(|e| damaged(e.into()))?;
        }
        if let Some((part, at)) =
            parts.iter().zip(&read).find_map(|(p, (.., odd))| Some((p, (*odd)?)))
        {
            return Err(damaged(format!("value {at} of {} is no finite number", part.name)));
        }
        let dtype = parts.last().map_or(String::new(), |p| format!("{:?}", p.dtype));
        let tensors =
            parts.iter().zip(read).map(|(p, (tensor, ..))| (p.name.to_string(), tensor)).collect();
        Ok(Weights {
            places: places(&config),
            config,
            tensors,
            dtype,
            sealed: hash.is_some(),
            charge: Arc::new(charge),
        })
    }

    /// The memory that they take, for who goes on using them.
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

    /// Weights given in memory, which must be the configuration's.
    pub fn from_tensors(
        config: Config,
        tensors: HashMap<String, Tensor>,
    ) -> Result<Weights, Problems> {
        let present = tensors.iter().map(|(n, t)| (n.clone(), t.shape().to_vec())).collect();
        let problems = Problems::of(&config, &present);
        if problems.is_empty() { Ok(Weights::of(config, tensors)) } else { Err(problems) }
    }

    /// Weights that are a function of `salt` and their names, for tests and installations without a
    /// trained model.
    pub fn hashed(config: Config, salt: &str) -> Weights {
        within_budget(&config);
        let named = config.tensors().into_iter().map(|(name, shape)| {
            let values = hashed(salt, &name, &shape);
            (name, Tensor::new(shape, values))
        });
        let tensors = named.collect();
        Weights::of(config, tensors)
    }

    /// Weights to start training from: PyTorch's defaults for convolutions and dense layers
    /// (uniform within the inverse root of the fan-in), ones and zeros for norms, zeros for
    /// relative positions, normal numbers for embeddings and position codes.
    pub fn initial(config: Config, seed: u64) -> Weights {
        within_budget(&config);
        let list = config.tensors();
        let shapes: HashMap<&str, &Vec<usize>> =
            list.iter().map(|(n, s)| (n.as_str(), s)).collect();
        let tensors = list.iter().enumerate().map(|(place, (name, shape))| {
            let values =
                initial(&mut generator(seed, &[0x69_6e_69_74, place as u64]), name, shape, &shapes);
            (name.clone(), Tensor::new(shape.clone(), values))
        });
        let tensors = tensors.collect();
        Weights::of(config, tensors)
    }

    /// Every tensor, to be changed, in the order of [`Config::tensors`].
    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let mut list: Vec<(usize, &mut Tensor)> =
            self.tensors.iter_mut().filter_map(|(n, t)| Some((*self.places.get(n)?, t))).collect();
        list.sort_by_key(|(place, _)| *place);
        list.into_iter().map(|(_, t)| t).collect()
    }

    /// The tensor called `name`, with its place in [`Config::tensors`].
    ///
    /// # Panics
    /// When the configuration does not list it: every constructor has checked that all it lists are
    /// here.
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

    /// Writes a model file, whole or not at all, with a hash of what is in it.
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
        // One key alone: several would stand in another order each time, and the same model be
        // another file.
        let metadata = HashMap::from([(CONFIG_KEY.to_string(), checksum::sealed(&config, hashes))]);
        let pending = crate::output::Pending::new(path, "").map_err(io)?;
        safetensors::serialize_to_file(views, Some(metadata), pending.path()).map_err(
            |e| match e {
                SafeTensorError::IoError(e) => io(e),
                other => WeightsError::Format { path: path.into(), problem: other.to_string() },
            },
        )?;
        pending.commit().map_err(io)
    }
}

/// Bytes of header that are read at most.
const MOST_HEADER: u64 = 1 << 20;

/// An error where a file begins as something else does.
fn check_kind(path: &Path, head: &[u8]) -> Result<(), WeightsError> {
    match recognise(head) {
        Some(Kind::Safetensors) | None => Ok(()),
        Some(other) => Err(WeightsError::Foreign { path: path.into(), what: other.name().into() }),
    }
}

/// Work in which memory may be refused.
fn caught<T>(
    path: &Path,
    work: impl FnOnce() -> Result<T, WeightsError>,
) -> Result<T, WeightsError> {
    memory::caught(work)
        .unwrap_or_else(|source| Err(WeightsError::Memory { path: path.into(), source }))
}

/// Where a model file's bytes are.
enum Place<'a> {
    File(Arc<Source>),
    Memory(&'a [u8]),
}

impl Place<'_> {
    /// Whether a tensor stays there.
    fn keeps(&self, part: &Part) -> bool {
        matches!(self, Place::File(_)) && part.dtype == Dtype::F32 && part.len() > LARGE
    }
}

/// A tensor of floats in a file.
struct Part<'a> {
    name: &'a str,
    shape: &'a [usize],
    dtype: Dtype,
    /// Its first byte in the file.
    at: u64,
    bytes: usize,
}

impl Part<'_> {
    /// How many values.
    fn len(&self) -> usize {
        self.bytes / (self.dtype.bitsize() / 8)
    }

    /// The tensor, the hash of its bytes, and the place of its first value that is no finite
    /// number.
    fn read(&self, place: &Place) -> Result<Loaded, String> {
        if let (Place::File(source), true) = (place, place.keeps(self)) {
            return self.looked_through(source);
        }
        let mut stored = memory::zeroed::<f32>(WEIGHTS, self.bytes.div_ceil(4));
        let bytes = &mut bytemuck::cast_slice_mut::<f32, u8>(&mut stored)[..self.bytes];
        match place {
            Place::File(source) => source.read(bytes, self.at).map_err(cut_short)?,
            // Within the file, as was checked.
            Place::Memory(all) => bytes.copy_from_slice(&all[self.at as usize..][..self.bytes]),
        }
        let hash = checksum::of_bytes(bytes);
        let values: Vec<f32> = match self.dtype {
            Dtype::F32 => {
                if cfg!(target_endian = "big") {
                    bytes.chunks_exact_mut(4).for_each(<[u8]>::reverse);
                }
                stored
            }
            Dtype::F16 => memory::collected(
                WEIGHTS,
                bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()),
            ),
            _ => memory::collected(
                WEIGHTS,
                bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            ),
        };
        let odd = values.iter().position(|v| !v.is_finite());
        Ok((Tensor::new(self.shape, values), hash, odd))
    }

    /// The same of a tensor that stays in its file.
    fn looked_through(&self, source: &Arc<Source>) -> Result<Loaded, String> {
        let mut piece = memory::zeroed::<u8>(WEIGHTS, PIECE);
        let (mut hashes, mut odd) = (vec![], None);
        for first in (0..self.bytes).step_by(PIECE) {
            let piece = &mut piece[..PIECE.min(self.bytes - first)];
            source.read(piece, self.at + first as u64).map_err(cut_short)?;
            hashes.push(blake3::hash(piece));
            let finite = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_finite();
            if odd.is_none() && !piece.chunks_exact(4).all(finite) {
                odd = piece.chunks_exact(4).position(|b| !finite(b)).map(|at| first / 4 + at);
            }
        }
        let hash = checksum::of_pieces(hashes.into_iter());
        let tensor =
            Tensor::from_stored(self.shape, Stored::new(source, self.at, self.len(), hash));
        Ok((tensor.ok_or("its shape was checked")?, hash, odd))
    }
}

/// What is said of a file that cannot be read to its end.
fn cut_short(e: std::io::Error) -> String {
    match e.kind() {
        std::io::ErrorKind::UnexpectedEof => "it was cut short while it was read".into(),
        _ => e.to_string(),
    }
}

/// A tensor that was read, the hash of its bytes, and the place of its first value that is no
/// finite number.
type Loaded = (Tensor, Hash, Option<usize>);

/// Reads all tensors, a few at a time.
fn read_all(place: &Place, parts: &[Part]) -> Result<Vec<Loaded>, String> {
    let next = AtomicUsize::new(0);
    let read: Vec<OnceLock<Result<Loaded, String>>> =
        parts.iter().map(|_| OnceLock::new()).collect();
    let work = || {
        while let Some((part, to)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|n| Some((parts.get(n)?, &read[n])))
        {
            let _ = to.set(part.read(place));
        }
    };
    std::thread::scope(|scope| {
        // Where the system refuses a thread, there is one less.
        let spawn = |_| {
            std::thread::Builder::new().name("prism-load".into()).spawn_scoped(scope, work).ok()
        };
        let helpers: Vec<_> = (1..processors().min(4)).filter_map(spawn).collect();
        work();
        // What a helper was refused is refused here.
        helpers.into_iter().for_each(|h| h.join().unwrap_or_else(|payload| resume_unwind(payload)));
    });
    read.into_iter().map(|r| r.into_inner().ok_or("not read")?).collect()
}

/// A tensor on its way into a file, encoded when its turn comes.
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

/// Unwinds to [`memory::caught`] where all weights of a network do not fit the memory that is left.
fn within_budget(config: &Config) {
    let all =
        config.tensors().iter().try_fold(0usize, |n, (_, shape)| n.checked_add(extent(shape)?));
    memory::check::<f32>(WEIGHTS, all.unwrap_or(usize::MAX)).unwrap_or_else(|e| memory::refuse(e));
}

/// The starting values of a tensor.
fn initial(
    rng: &mut impl rand::Rng,
    name: &str,
    shape: &[usize],
    shapes: &HashMap<&str, &Vec<usize>>,
) -> Vec<f32> {
    let count: usize = shape.iter().product();
    let scale = |shape: &[usize]| {
        // PyTorch takes the second axis for the inputs, of transposed convolutions too.
        1.0 / (shape[1..].iter().product::<usize>() as f32).sqrt()
    };
    let embedding = [
        "point_embeddings.",
        "not_a_point_embed",
        "no_mask_embed",
        "mask_tokens",
        "iou_token",
        "gaussian_matrix",
    ];
    if embedding.iter().any(|t| name.contains(t)) {
        return memory::collected(WEIGHTS, (0..count).map(|_| normal(rng)));
    }
    if name.contains("rel_pos_") {
        return memory::zeroed(WEIGHTS, count);
    }
    if name.ends_with("pos_embed") {
        return memory::collected(WEIGHTS, (0..count).map(|_| 0.02 * normal(rng)));
    }
    let bound = match name.strip_suffix(".bias").map(|at| format!("{at}.weight")) {
        Some(weight) => match shapes.get(weight.as_str()) {
            Some(shape) if shape.len() > 1 => scale(shape),
            _ => return vec![0.0; count],
        },
        None if shape.len() == 1 => return vec![1.0; count],
        None => scale(shape),
    };
    memory::collected(WEIGHTS, (0..count).map(|_| rng.random_range(-bound..=bound)))
}

/// The values of a hashed tensor: FNV-1a of `salt/name` seeds a splitmix64 sequence of uniform
/// numbers in [-1, 1), scaled by the kind of tensor.
pub fn hashed(salt: &str, name: &str, shape: &[usize]) -> Vec<f32> {
    let seed = format!("{salt}/{name}")
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ b as u64).wrapping_mul(0x0000_0100_0000_01b3));
    let token =
        ["point_embeddings.", "not_a_point_embed", "no_mask_embed", "mask_tokens", "iou_token"];
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
    memory::collected(WEIGHTS, (0..shape.iter().product()).map(value))
}

#[cfg(test)]
mod tests {

    // Miri rounds square roots as it likes.
    #[cfg_attr(miri, ignore)]
    #[test]
    fn hash_matches_its_published_values() {
        let v = super::hashed("public", "a.weight", &[3, 3]);
        // Scaled by sqrt(3 / 3) = 1: 0x1.e847d8p-1, -0x1.11781p-1, -0x1.421f4p-4.
        assert_eq!(
            v[..3].iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
            [0x3f74_23ec, 0xbf08bc08, 0xbda10fa0]
        );
    }
}
