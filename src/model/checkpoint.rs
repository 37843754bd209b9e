//! PyTorch checkpoints: zip archives, legacy streams, bare state dictionaries. Nothing in the file
//! is executed.
//!
//! A pickle is a program. The tensors are read by a library that interprets only what tensors need;
//! before that, every callable that the program names is checked, and a file that names anything
//! but PyTorch's own tensor builders and plain containers is refused.

use crate::input::{DEFLATE_LIMIT, HEAD, recognise, remember};
use crate::memory::{self, Refused};
use crate::tensor::extent;
use pytorch_reader::{DType, PytorchReader, Tensor as Stored};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

/// Why a checkpoint cannot be read; the message names the file.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {message}")]
pub struct CheckpointError {
    path: PathBuf,
    message: String,
}

/// How a refusal of memory names it.
const TENSOR: &str = "a checkpoint's tensor";

/// Tensors by name, the wrapping dictionary and a `module.` prefix removed.
pub type StateDict = BTreeMap<String, Entry>;

/// One tensor of a checkpoint.
pub struct Entry {
    /// The shape.
    pub shape: Vec<usize>,
    /// The element type, as PyTorch calls it.
    pub dtype: &'static str,
    stored: Stored,
}

impl Entry {
    /// The values, widened to float64; none for an element type that is not ordered (complex,
    /// quantised).
    ///
    /// # Errors
    /// They cannot be read, or there is no room for them.
    pub fn values(&self) -> io::Result<Option<Vec<f64>>> {
        let refused = |e: Refused| io::Error::new(io::ErrorKind::OutOfMemory, e);
        let count = extent(&self.shape).unwrap_or(usize::MAX);
        // Both as the file stores them, which another crate reads, and as they are returned.
        memory::check::<[f64; 2]>(TENSOR, count).map_err(refused)?;
        let bytes = self.stored.read()?;
        let mut values: Vec<f64> = memory::room(TENSOR, count).map_err(refused)?;
        macro_rules! read {
            ($t:ty) => {
                values.extend(
                    bytes
                        .chunks_exact(size_of::<$t>())
                        .map(|b| <$t>::from_le_bytes(std::array::from_fn(|i| b[i])))
                        .map(f64::from),
                )
            };
        }
        match self.stored.dtype() {
            DType::F64 => read!(f64),
            DType::F32 => read!(f32),
            DType::F16 => read!(half::f16),
            DType::BF16 => read!(half::bf16),
            DType::I64 => values.extend(
                bytes
                    .chunks_exact(8)
                    .map(|b| i64::from_le_bytes(std::array::from_fn(|i| b[i])) as f64),
            ),
            DType::I32 => read!(i32),
            DType::I16 => read!(i16),
            DType::I8 => read!(i8),
            DType::U8 | DType::Bool => read!(u8),
            _ => return Ok(None),
        }
        Ok(Some(values))
    }
}

fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "float64",
        DType::F32 => "float32",
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        DType::I64 => "int64",
        DType::I32 => "int32",
        DType::I16 => "int16",
        DType::I8 => "int8",
        DType::U8 => "uint8",
        DType::Bool => "bool",
        _ => "another type",
    }
}

/// Dictionaries under which training scripts keep the weights.
const WRAPPERS: [&str; 5] = ["model_state_dict", "state_dict", "model_dict", "model", "network"];

/// Reads the weights of a PyTorch checkpoint; its other contents (optimiser, schedule, epoch) are
/// ignored. Values stay in the file until [`Entry::values`] reads them.
///
/// # Errors
/// The file cannot be read, is no checkpoint, is damaged, names a callable that is not harmless, or
/// contains no tensors.
pub fn read(path: &Path) -> Result<StateDict, CheckpointError> {
    let fail = |message: String| CheckpointError { path: path.into(), message };
    let mut file = File::open(path).map_err(|e| fail(e.to_string()))?;
    let meta = file.metadata().map_err(|e| fail(e.to_string()))?;
    if meta.is_dir() {
        return Err(fail("is a folder, expected a checkpoint file".into()));
    }
    remember(path);
    let mut head = vec![];
    file.by_ref()
        .take(HEAD as u64)
        .read_to_end(&mut head)
        .and_then(|_| file.rewind())
        .map_err(|e| fail(e.to_string()))?;
    let checkpoint = head.starts_with(b"PK") || head.first() == Some(&0x80);
    if let Some(kind) = recognise(&head).filter(|_| !checkpoint) {
        return Err(fail(format!(
            "is {}, expected a PyTorch checkpoint or a model (.safetensors)",
            kind.name()
        )));
    }
    let harmless = |pickle: &[u8]| match pickle::callables(pickle) {
        Err(e) => Err(format!("damaged pickle: {e}")),
        Ok(names) => match names.into_iter().find(|n| !is_harmless(n)) {
            Some(name) => Err(format!(
                "refused: it names '{name}', which Python could execute when loading it; expected tensors only"
            )),
            None => Ok(()),
        },
    };
    each_pickle(file, harmless).map_err(fail)?;
    // The library should never panic; if it does, a file must not be able to take the program down.
    let reader = std::panic::catch_unwind(|| PytorchReader::new(path));
    let reader = reader.map_err(|_| fail("damaged: its tensors cannot be read".into()))?;
    let tensors =
        reader.map_err(|e| fail(format!("not a readable PyTorch checkpoint: {e}")))?.into_tensors();
    let wrapper = WRAPPERS
        .iter()
        .map(|w| format!("{w}."))
        .find(|w| tensors.keys().any(|k| k.starts_with(w.as_str())));
    let mut named: Vec<(String, Stored)> = tensors.into_iter().collect();
    if let Some(wrapper) = wrapper {
        named.retain(|(n, _)| n.starts_with(&wrapper));
        named.iter_mut().for_each(|(n, _)| *n = n[wrapper.len()..].to_string());
    }
    if named.iter().all(|(n, _)| n.starts_with("module.")) {
        named.iter_mut().for_each(|(n, _)| *n = n["module.".len()..].to_string());
    }
    if named.is_empty() {
        return Err(fail("it holds no tensors".into()));
    }
    // A view may repeat without end what its storage holds once: no network's tensors are larger
    // than their unpacked file.
    let most = meta.len().saturating_mul(DEFLATE_LIMIT);
    let bytes = |t: &Stored| extent(t.shape()).and_then(|n| n.checked_mul(t.dtype().size()));
    if let Some((name, _)) = named.iter().find(|(_, t)| bytes(t).is_none_or(|n| n as u64 > most)) {
        return Err(fail(format!(
            "{name} claims more data than a file of {} bytes can hold",
            meta.len()
        )));
    }
    let entry = |(name, stored): (String, Stored)| {
        (name, Entry { shape: stored.shape().to_vec(), dtype: dtype_name(stored.dtype()), stored })
    };
    Ok(named.into_iter().map(entry).collect())
}

/// Whether a callable only builds tensors, containers or plain values.
fn is_harmless(name: &str) -> bool {
    let (module, item) = name.rsplit_once('.').unwrap_or(("", name));
    match module {
        "torch._utils" => item.starts_with("_rebuild_"),
        "torch" => {
            item.ends_with("Storage")
                || ["Size", "device", "Tensor"].contains(&item)
                || DTYPES.contains(&item)
        }
        "torch.storage" => matches!(item, "UntypedStorage" | "TypedStorage"),
        "torch.nn.parameter" => item == "Parameter",
        "collections" => matches!(item, "OrderedDict" | "defaultdict" | "Counter"),
        "numpy" => matches!(item, "dtype" | "ndarray"),
        "numpy.core.multiarray" | "numpy._core.multiarray" => {
            matches!(item, "scalar" | "_reconstruct")
        }
        "_codecs" => item == "encode",
        "argparse" => item == "Namespace",
        "builtins" | "__builtin__" => matches!(
            item,
            "set" | "list" | "dict" | "int" | "float" | "bool" | "tuple" | "complex" | "slice"
        ),
        _ => false,
    }
}

const DTYPES: [&str; 14] = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
    "complex128",
    "half",
    "float",
];

/// Calls `look` on the pickle programs of a file, one at a time: those in a zip archive, or the
/// four that a legacy stream begins with.
fn each_pickle(mut file: File, look: impl Fn(&[u8]) -> Result<(), String>) -> Result<(), String> {
    let mut magic = [0u8; 4];
    let unreadable = |e: String| format!("not a readable PyTorch checkpoint: {e}");
    file.read_exact(&mut magic).map_err(|_| unreadable("shorter than any checkpoint".into()))?;
    // What a model needs is a few megabytes: a program that unpacks to more is meant to do harm.
    let too_long = || {
        format!(
            "its pickles are longer than {} MiB, expected descriptions of tensors only",
            LIMIT >> 20
        )
    };
    let mut bytes = vec![];
    if &magic == b"PK\x03\x04" {
        let broken = |e: String| unreadable(format!("damaged zip archive: {e}"));
        let mut archive = zip::ZipArchive::new(file).map_err(|e| broken(e.to_string()))?;
        let names = archive.file_names().filter_map(|n| n.ok().map(|n| n.into_owned()));
        let names: Vec<String> = names.filter(|n| n.ends_with(".pkl")).collect();
        let mut left = LIMIT;
        for name in &names {
            bytes.clear();
            let entry = archive.by_name(name).map_err(|e| broken(e.to_string()))?;
            memory::read("a checkpoint's pickles", entry.take(left + 1), &mut bytes)
                .map_err(|e| broken(e.to_string()))?;
            left = left.checked_sub(bytes.len() as u64).ok_or_else(too_long)?;
            look(&bytes)?;
        }
        return if names.is_empty() {
            Err(unreadable("a zip archive without a pickle".into()))
        } else {
            Ok(())
        };
    }
    if magic[0] != 0x80 {
        return Err(unreadable("neither a zip archive nor a pickle".into()));
    }
    // The tensors follow in the same stream.
    bytes.extend(magic);
    memory::read("a checkpoint's pickles", file.take(LIMIT), &mut bytes)
        .map_err(|e| unreadable(e.to_string()))?;
    let mut rest = &bytes[..];
    // Magic number, protocol, system, object, storage keys; a bare pickle has only one.
    for _ in 0..5 {
        if rest.first() != Some(&0x80) {
            break;
        }
        let end = pickle::length(rest).map_err(unreadable)?;
        look(&rest[..end])?;
        rest = &rest[end..];
    }
    Ok(())
}

/// The most bytes of pickle that are examined, in all.
const LIMIT: u64 = 64 << 20;

/// Just enough of the pickle format to walk through its instructions.
mod pickle {
    /// One instruction: its code and its argument.
    type Step<'a> = (u8, &'a [u8]);

    /// Splits the instruction at the start of `p` off.
    fn step(p: &[u8]) -> Result<(Step<'_>, &[u8]), String> {
        let (&op, rest) = p.split_first().ok_or("it ends without a stop")?;
        let number = |n: usize| -> Result<usize, String> {
            let bytes = rest.get(..n).ok_or("an instruction is cut short")?;
            Ok(bytes.iter().rev().fold(0usize, |v, b| v << 8 | *b as usize))
        };
        let line = || {
            rest.iter().position(|b| *b == b'\n').map(|at| at + 1).ok_or("a line without an end")
        };
        let (head, body) = match op {
            // Without an argument.
            b'.' | b'(' | b'0' | b'1' | b'2' | b'N' | b'Q' | b'R' | b'a' | b'b' | b'd' | b'e'
            | b'l' | b'o' | b's' | b't' | b'u' | b'}' | b']' | b')' => (0, 0),
            0x81 | 0x85..=0x89 | 0x8f..=0x94 | 0x97 | 0x98 => (0, 0),
            // Fixed widths.
            b'K' | b'h' | b'q' | 0x80 | 0x82 => (0, 1),
            b'M' | 0x83 => (0, 2),
            b'J' | b'j' | b'r' | 0x84 => (0, 4),
            b'G' | 0x95 => (0, 8),
            // A length, then that much.
            b'U' | b'C' | 0x8a | 0x8c => (1, number(1)?),
            b'T' | b'X' | b'B' | 0x8b => (4, number(4)?),
            0x8d | 0x8e | 0x96 => (8, number(8)?),
            // Lines of text.
            b'F' | b'I' | b'L' | b'S' | b'V' | b'P' | b'g' | b'p' => (0, line()?),
            b'c' | b'i' => {
                let first = line()?;
                let second = rest[first..]
                    .iter()
                    .position(|b| *b == b'\n')
                    .ok_or("a line without an end")?;
                (0, first + second + 1)
            }
            other => return Err(format!("unknown instruction 0x{other:02x}")),
        };
        let end = usize::checked_add(head, body).ok_or("an instruction is cut short")?;
        let argument = rest.get(head..end).ok_or("an instruction is cut short")?;
        Ok(((op, argument), &rest[end..]))
    }

    /// Bytes up to and including the stop of the first program in `p`.
    pub fn length(p: &[u8]) -> Result<usize, String> {
        let mut rest = p;
        loop {
            let ((op, _), next) = step(rest)?;
            rest = next;
            if op == b'.' {
                return Ok(p.len() - rest.len());
            }
        }
    }

    /// The dotted names of everything that the program could call.
    pub fn callables(p: &[u8]) -> Result<Vec<String>, String> {
        let (mut names, mut rest) = (vec![], p);
        // The last two strings pushed: what a stack-based global refers to.
        let mut recent: [String; 2] = Default::default();
        loop {
            let ((op, argument), next) = step(rest)?;
            rest = next;
            let text = || String::from_utf8_lossy(argument).into_owned();
            match op {
                b'.' => return Ok(names),
                b'c' | b'i' => names.push(text().trim_end().replace('\n', ".")),
                0x93 => names.push(recent.join(".")),
                0x82..=0x84 => names.push("an extension code".into()),
                b'U' | b'X' | b'T' | 0x8c | 0x8d => {
                    recent.swap(0, 1);
                    recent[1] = text();
                }
                // A memoised string: its text is not known here, so a global made of it is not
                // allowed.
                b'g' | b'h' | b'j' => {
                    recent.swap(0, 1);
                    recent[1] = "?".into();
                }
                _ => {}
            }
        }
    }

    #[cfg(test)]
    mod tests {
        #[test]
        fn names_are_found_in_both_forms() {
            let old = b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.";
            let new = b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x8c\x02ls\x85R.";
            for p in [&old[..], &new[..]] {
                assert_eq!(super::callables(p).unwrap(), ["os.system"]);
                assert_eq!(super::length(p).unwrap(), p.len());
            }
            assert!(super::callables(&old[..9]).is_err());
            assert!(super::callables(b"\x80\x02X\xff\xff\xff\xff.").is_err());
            assert!(super::callables(b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xff.").is_err());
        }
    }
}
