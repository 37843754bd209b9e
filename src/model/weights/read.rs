//! Reading a model file: its header, its configuration, and every tensor, which is hashed and
//! checked as it is read.

use super::{CONFIG_KEY, Problems, Weights, WeightsError, places};
use crate::checksum::{self, PIECE};
use crate::device::processors;
use crate::input::{HEAD, Kind, MOST_HEADER, recognise, room_for_header};
use crate::memory::{self, Charge};
use crate::model::config::Config;
use crate::tensor::stored::{LARGE, Source, Stored};
use crate::tensor::{Tensor, WEIGHTS, extent};
use blake3::Hash;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata};
use std::io::Read;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

impl Weights {
    /// Opens a model file and reads it through once, to check it against the hash that it carries
    /// and to check that every weight is a finite number. Large float32 tensors stay in the file,
    /// and are read again when they are needed; all others are kept in memory.
    ///
    /// # Errors
    /// The file is not a model, is damaged, has a weight that is not a finite number, or is larger
    /// than the memory that is left.
    pub fn open(path: &Path) -> Result<Weights, WeightsError> {
        let io = |source| WeightsError::Io { path: path.into(), source };
        // Opening a pipe that nothing writes to would block.
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

    /// Reads a model file that is in memory. Its tensors are copied.
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
        let header = room_for_header(WEIGHTS, head, MOST_HEADER)
            .map_err(|source| WeightsError::Memory { path: path.into(), source })?
            .map_err(format)?;
        let length = header.len() as u64;
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
                    "{name} takes bytes {from} to {to}, which does not match its shape {:?}",
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
                "it has {bytes} bytes, its header describes {}: it is truncated or has trailing data",
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
            return Err(damaged(format!("value {at} of {} is not a finite number", part.name)));
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
}

/// An error if a file begins as another kind of file does.
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
    /// Whether a tensor stays in the file.
    fn keeps(&self, part: &Part) -> bool {
        matches!(self, Place::File(_)) && part.dtype == Dtype::F32 && part.len() > LARGE
    }
}

/// A tensor of floats in a file.
struct Part<'a> {
    name: &'a str,
    shape: &'a [usize],
    dtype: Dtype,
    /// The tensor's first byte in the file.
    at: u64,
    bytes: usize,
}

impl Part<'_> {
    /// The number of values.
    fn len(&self) -> usize {
        self.bytes / (self.dtype.bitsize() / 8)
    }

    /// The tensor, the hash of its bytes, and the index of its first value that is not a finite
    /// number.
    fn read(&self, place: &Place) -> Result<Loaded, String> {
        if let (Place::File(source), true) = (place, place.keeps(self)) {
            return self.looked_through(source);
        }
        let mut stored = memory::zeroed::<f32>(WEIGHTS, self.bytes.div_ceil(4));
        let bytes = &mut bytemuck::cast_slice_mut::<f32, u8>(&mut stored)[..self.bytes];
        match place {
            Place::File(source) => source.read(bytes, self.at).map_err(cut_short)?,
            // Within the file, as checked before.
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

    /// Reads through a tensor that stays in its file: the tensor, the hash of its bytes, and the
    /// index of its first value that is not a finite number.
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

/// The message for a file that cannot be read to its end.
fn cut_short(e: std::io::Error) -> String {
    match e.kind() {
        std::io::ErrorKind::UnexpectedEof => "it was truncated while it was read".into(),
        _ => e.to_string(),
    }
}

/// A tensor that was read, the hash of its bytes, and the index of its first value that is not a
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
        // If the system refuses a thread, there is one less.
        let spawn = |_| {
            std::thread::Builder::new().name("prism-load".into()).spawn_scoped(scope, work).ok()
        };
        let helpers: Vec<_> = (1..processors().min(4)).filter_map(spawn).collect();
        work();
        // If a helper was refused memory, the refusal continues here.
        helpers.into_iter().for_each(|h| h.join().unwrap_or_else(|payload| resume_unwind(payload)));
    });
    read.into_iter().map(|r| r.into_inner().ok_or("not read")?).collect()
}
