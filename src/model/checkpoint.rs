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

/// The names of what a checkpoint holds in refusals of memory.
const TENSOR: &str = "a checkpoint's tensor";
const PICKLES: &str = "a checkpoint's pickles";
const DESCRIBED: &str = "what a checkpoint's pickles describe";

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
    // Such an archive begins with the name of its first file, which may look like a pickle.
    if head.get(TAR..).is_some_and(|rest| rest.starts_with(b"ustar")) {
        return Err(fail("is a TAR archive, expected a zip archive or a pickle".into()));
    }
    let damaged = |e: String| format!("damaged pickle: {e}");
    let harmless = |pickle: &[u8]| {
        // First for the program alone, which is more than it takes to look at it.
        room_to_run(pickle, 0)?;
        let names = pickle::callables(pickle).map_err(damaged)?;
        match names.into_iter().find(|n| !is_harmless(n)) {
            Some(name) => Err(format!(
                "refused: it names '{name}', which Python could execute when loading it; expected tensors only"
            )),
            None => room_to_run(pickle, pickle::copies(pickle).map_err(damaged)?),
        }
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

/// Where a TAR archive says that it is one.
const TAR: usize = 257;

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
    // What a model needs is a few hundred kilobytes: a program that unpacks to more than the limit
    // is meant to do harm.
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
            memory::read(PICKLES, entry.take(left + 1), &mut bytes)
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
    memory::read(PICKLES, file.take(LIMIT), &mut bytes).map_err(|e| unreadable(e.to_string()))?;
    let is_cut = bytes.len() as u64 > LIMIT;
    let mut rest = &bytes[..];
    // Magic number, protocol, system, object, storage keys; a bare pickle has only one.
    for _ in 0..5 {
        // A program of an older protocol would be run without having been looked at.
        match rest.first() {
            Some(0x80) => {}
            None => break,
            Some(_) => return Err(unreadable("not all of its programs are pickles".into())),
        }
        let end =
            pickle::length(rest).map_err(|e| match is_cut && pickle::ENDS.contains(&&*e) {
                true => too_long(),
                false => unreadable(e),
            })?;
        look(&rest[..end])?;
        rest = &rest[end..];
    }
    Ok(())
}

/// The most bytes of pickle that are examined, in all. The network of the paper has 47 kB, and a
/// training's moments twice that; a thousand tensors with long names stay below 1 MB.
const LIMIT: u64 = 8 << 20;

/// The most memory that a byte of a pickle takes when the library that reads tensors runs it, but
/// for copies: a program of one-byte instructions pushes an object of 88 bytes with each, on a list
/// that doubles (176), copies what it held (88), and may be moved into a container (72).
const COST: u64 = 352;

/// An error unless there is room for what that library makes of a pickle whose copies take so many
/// bytes: it asks for memory in ways that cannot be refused.
fn room_to_run(pickle: &[u8], copies: u64) -> Result<(), String> {
    let all = (COST * pickle.len() as u64).saturating_add(copies);
    let all = usize::try_from(all).unwrap_or(usize::MAX);
    memory::check::<u8>(DESCRIBED, all).map_err(|e| e.to_string())
}

/// Just enough of the pickle format to walk through its instructions.
mod pickle {
    use std::collections::BTreeMap;

    /// What is wrong with a program that is only the beginning of one.
    pub const ENDS: [&str; 3] = [NO_STOP, SHORT, NO_LINE];
    const NO_STOP: &str = "it ends without a stop";
    const SHORT: &str = "an instruction is cut short";
    const NO_LINE: &str = "a line without an end";

    /// One instruction: its code and its argument.
    type Step<'a> = (u8, &'a [u8]);

    /// Splits the instruction at the start of `p` off.
    fn step(p: &[u8]) -> Result<(Step<'_>, &[u8]), String> {
        let (&op, rest) = p.split_first().ok_or(NO_STOP)?;
        let number = |n: usize| -> Result<usize, String> {
            let bytes = rest.get(..n).ok_or(SHORT)?;
            Ok(bytes.iter().rev().fold(0usize, |v, b| v << 8 | *b as usize))
        };
        let line = || rest.iter().position(|b| *b == b'\n').map(|at| at + 1).ok_or(NO_LINE);
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
                let second = rest[first..].iter().position(|b| *b == b'\n').ok_or(NO_LINE)?;
                (0, first + second + 1)
            }
            other => return Err(format!("unknown instruction 0x{other:02x}")),
        };
        let end = usize::checked_add(head, body).ok_or(SHORT)?;
        let argument = rest.get(head..end).ok_or(SHORT)?;
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
                0x93 if recent.iter().any(String::is_empty) => names.push("a computed name".into()),
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
                // These leave the stack as it is.
                b'p' | b'q' | b'r' | 0x94 | 0x95 => {}
                // After all others the last two strings may not be what is on top.
                _ => recent = Default::default(),
            }
        }
    }

    /// What a value of a running program holds, at most.
    #[derive(Clone, Copy)]
    struct Held {
        /// Bytes that a copy takes.
        bytes: u64,
        /// Tensors in it.
        tensors: u64,
        /// Bytes of their names, which are the keys on the way to each.
        names: u64,
        /// Bytes that it adds to names as the key of a dictionary, beyond [`PLACE`].
        key: u64,
        /// The `key` of its first element, if it is a list: of two, it may be the pair of a key and
        /// a value, from which a dictionary is made.
        first: Option<u64>,
        /// Whether it makes tensors when it is called, or the names of what does.
        makes: bool,
        /// The number under which the value was memorised.
        memo: Option<u32>,
    }

    /// Bytes of a value itself.
    const VALUE: u64 = 88;
    /// The longest name of a place in a list, or of a number that is a key, with a separator.
    const PLACE: u64 = 24;
    /// How the names of what makes tensors begin, in `torch._utils`.
    const MAKES: &[u8] = b"_rebuild_";

    impl Held {
        /// A container without elements.
        const EMPTY: Held = Held {
            bytes: VALUE,
            tensors: 0,
            names: 0,
            key: 0,
            first: None,
            makes: false,
            memo: None,
        };

        /// What an instruction with this argument pushes.
        fn of(op: u8, argument: &[u8]) -> Held {
            // In such a line a byte is a character, which may take two.
            let bytes = argument.len() as u64 * if op == b'V' { 2 } else { 1 };
            let makes = argument.split(|b| *b == b'\n').any(|line| line.starts_with(MAKES));
            Held { bytes: VALUE + bytes, key: bytes, makes, ..Held::EMPTY }
        }

        /// This value with another in it, under a key that adds so many bytes.
        fn with(self, other: Held, key: u64) -> Held {
            let key = other.tensors.saturating_mul(key.saturating_add(PLACE));
            Held {
                bytes: self.bytes.saturating_add(other.bytes),
                tensors: self.tensors.saturating_add(other.tensors),
                names: self.names.saturating_add(other.names).saturating_add(key),
                ..self
            }
        }

        /// This value with all of a list added.
        fn with_list(self, all: &[Held]) -> Held {
            all.iter().fold(self, |sum, value| Held {
                first: sum.first.or(Some(value.key)),
                ..sum.with(*value, sum.first.unwrap_or(0))
            })
        }

        /// This value with all of a dictionary added: keys and values in turn.
        fn with_pairs(self, all: &[Held]) -> Held {
            let pair = |sum: Held, pair: &[Held]| match pair {
                [key, value] => sum.with(*key, 0).with(*value, key.key),
                _ => sum.with_list(pair),
            };
            all.chunks(2).fold(self, pair)
        }
    }

    /// The most bytes that the copies take which a program makes of its values: those that it
    /// memorises, those that it fetches again, and the names of the tensors in its result.
    pub fn copies(p: &[u8]) -> Result<u64, String> {
        let mut stack: Vec<Held> = vec![];
        let (mut marks, mut memo) = (vec![], BTreeMap::new());
        let (mut copied, mut rest) = (0u64, p);
        let index = |argument: &[u8]| -> u32 {
            argument.iter().rev().fold(0, |v, b| v << 8 | u32::from(*b))
        };
        let line = |argument: &[u8]| -> Result<u32, String> {
            let text = std::str::from_utf8(argument).map_err(|e| e.to_string())?;
            text.trim().parse().map_err(|_| format!("'{}' is no place", text.trim()))
        };
        loop {
            let ((op, argument), next) = step(rest)?;
            rest = next;
            // The values that it takes from the stack: so many, or those behind a mark.
            let taken = match op {
                b'0' | b'a' | b'Q' | 0x85 => Some(1),
                b's' | b'R' | b'b' | 0x81 | 0x86 | 0x93 => Some(2),
                0x87 | 0x92 => Some(3),
                b't' | b'l' | b'd' | b'e' | b'u' | b'1' | 0x90 | 0x91 => None,
                _ => Some(0),
            };
            let from = match taken {
                // As a mark that is on top is dropped.
                Some(1) if op == b'0' && marks.last() == Some(&stack.len()) => {
                    marks.pop();
                    continue;
                }
                Some(count) => {
                    stack.len().checked_sub(count).ok_or("it takes what is not there")?
                }
                None => marks.pop().ok_or("it has no mark")?.min(stack.len()),
            };
            let values = stack.split_off(from);
            let top = stack.last().copied();
            let pushed = match op {
                b'.' => break,
                0x80 | 0x95 | b'0' | b'1' => continue,
                b'(' => {
                    marks.push(stack.len());
                    continue;
                }
                b'a' | b'e' | 0x90 | b's' | b'u' => {
                    let onto = stack.last_mut().ok_or("it takes what is not there")?;
                    *onto = match op {
                        b's' | b'u' => onto.with_pairs(&values),
                        _ => onto.with_list(&values),
                    };
                    continue;
                }
                b'q' | b'r' | b'p' | 0x94 => {
                    let at = match op {
                        b'p' => line(argument)?,
                        0x94 => memo.len() as u32,
                        _ => index(argument),
                    };
                    let top = stack.last_mut().ok_or("it takes what is not there")?;
                    top.memo = Some(at);
                    copied = copied.saturating_add(top.bytes);
                    memo.insert(at, *top);
                    continue;
                }
                b'h' | b'j' | b'g' | b'2' => {
                    let found = match op {
                        b'2' => top,
                        b'g' => memo.get(&line(argument)?).copied(),
                        _ => memo.get(&index(argument)).copied(),
                    };
                    let found = found.ok_or("it takes what is not there")?;
                    copied = copied.saturating_add(found.bytes);
                    found
                }
                b't' | b'l' | 0x91 | 0x85..=0x87 => Held::EMPTY.with_list(&values),
                b'd' => Held::EMPTY.with_pairs(&values),
                // A container of what it is given, pairs of keys and values among it; a tensor, or
                // what it is given in place of one, which may be a key, or what makes a tensor.
                b'R' | 0x81 | 0x92 => {
                    let given = Held::EMPTY.with_list(&values);
                    let first = Some(given.bytes);
                    match values[0].makes {
                        false => Held { first, ..given },
                        true => Held {
                            tensors: given.tensors.max(1),
                            key: given.bytes,
                            first,
                            makes: true,
                            ..given
                        },
                    }
                }
                b'b' => {
                    let (object, state) = (values[0], values[1]);
                    let built = object.with(state, 0);
                    // It is memorised again.
                    if let Some(at) = built.memo {
                        copied = copied.saturating_add(built.bytes);
                        memo.insert(at, built);
                    }
                    built
                }
                b'Q' => Held::EMPTY.with_list(&values),
                0x93 => Held { makes: values[1].makes, ..Held::EMPTY.with_list(&values) },
                b')' | b']' | b'}' | 0x8f => Held::EMPTY,
                _ => Held::of(op, argument),
            };
            stack.push(pushed);
        }
        // A name is kept twice: as the tensor's own, and as the key of a table.
        let result = stack.pop().ok_or("it has no result")?;
        Ok(copied.saturating_add(result.names.saturating_mul(2)))
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
            // Two strings that were pushed last need not be those that are on top.
            let hidden = b"\x80\x04\x8c\x02os\x8c\x06system\x8c\x05torch\x8c\x04Size00\x93.";
            assert_eq!(super::callables(hidden).unwrap(), ["a computed name"]);
            assert!(super::callables(&old[..9]).is_err());
            assert!(super::callables(b"\x80\x02X\xff\xff\xff\xff.").is_err());
            assert!(super::callables(b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xff.").is_err());
        }

        #[test]
        fn copies_are_counted() {
            let copies = |program: &[&[u8]]| super::copies(&program.concat());
            // A text of 1000 bytes in a tuple, memorised once and fetched nine times.
            let text = [b"X\xe8\x03\0\0", &[b'k'; 1000][..]].concat();
            let tuple = [&text[..], b"\x85q\0"].concat();
            let fetched = b"h\0".repeat(9);
            let found = copies(&[b"\x80\x02", &tuple, &fetched, b"."]).unwrap();
            assert!((10_000..13_000).contains(&found), "{found}");
            // It is the key of a dictionary of seven tensors, whose names it begins.
            let tensor = b"ctorch._utils\n_rebuild_tensor_v2\n)R";
            let tensors: Vec<u8> =
                (0..7).flat_map(|k| [&[b'K', k], &tensor[..]].concat()).collect();
            let found = copies(&[b"\x80\x02}", &text, b"}(", &tensors, b"us."]).unwrap();
            assert!((2 * 7 * 1000..2 * 7 * 1300).contains(&found), "{found}");
            // A tensor by another way to call what makes it, in a list of pairs for a dictionary.
            let pair = [&text[..], &tensor[..], b"\x86"].concat();
            let found = copies(&[b"\x80\x02ccollections\nOrderedDict\n](", &pair, b"e\x85R."]);
            assert!(found.unwrap() > 2 * 1000);
            // What is called in place of a tensor may return the text, or a list with it.
            let call = b"ctorch._utils\n_rebuild_parameter\n";
            let key = [&call[..], &text[..], b"\x85R"].concat();
            let list = [&call[..], b"](", &text[..], b"e\x85R(", &tensor[..], b"e"].concat();
            let set = [b"cbuiltins\nset\n](", &text[..], b"e\x85R(", &tensor[..], b"e"].concat();
            for pair in [[&key[..], &tensor[..], b"\x86"].concat(), list, set] {
                let found = copies(&[b"\x80\x02ccollections\nOrderedDict\n](", &pair, b"e\x85R."]);
                assert!(found.unwrap() > 2 * 1000);
            }
            // Or what makes a tensor; and a line of Latin letters, each of which takes two bytes.
            let makes = [&call[..], b"ctorch._utils\n_rebuild_tensor_v2\n\x85R)R"].concat();
            let line = [b"V", &[0xe9u8; 1000][..], b"\n"].concat();
            let found = copies(&[b"\x80\x02}", &line, &makes, b"s."]).unwrap();
            assert!((2 * 2000..2 * 2200).contains(&found), "{found}");
            let found = copies(&[b"\x80\x02", &line, b"q\0h\0\x86."]).unwrap();
            assert!((2 * 2000..2 * 2200).contains(&found), "{found}");
            // As Python 2 writes a state: one list of pairs, each tensor with calls of its own.
            let pairs: Vec<u8> = (0..100u8)
                .flat_map(|k| {
                    let name = [b"U\x20", &[b'a' + k % 26; 32][..]].concat();
                    let stored = b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storage\
                        ctorch\nFloatStorage\nU\x011U\x03cpuK\x08NtQK\0K\x08\x85K\x01\x85\x89\
                        ccollections\nOrderedDict\n]\x85RtR";
                    [b"]", &name[..], b"a", stored, b"a"].concat()
                })
                .collect();
            let state = [b"\x80\x02ccollections\nOrderedDict\n](", &pairs[..], b"e\x85R."].concat();
            let found = copies(&[&state]).unwrap();
            assert!((2 * 100 * 32..2 * 100 * 200).contains(&found), "{found}");
            // What it cannot take is no program.
            for program in
                [&b"\x80\x02R."[..], b"\x80\x02t.", b"\x80\x02h\0.", b"\x80\x02.", b"g\xff\n."]
            {
                assert!(super::copies(program).is_err(), "{program:?}");
            }
        }
    }
}
