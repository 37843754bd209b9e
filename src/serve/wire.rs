//! Arrays as nnInteractive sends them: a head with element type and shape, then chunks of blosc2.

use super::blosc2;
use super::failure::Failure;
use crate::memory;
use crate::message::quoted;
use crate::tensor::extent;
use crate::volume::Element;

/// The first bytes of a message, and the version that is read and written.
const MAGIC: &[u8; 4] = b"NNIA";
const VERSION: u8 = 1;
/// The codecs that a head may name; the chunks themselves say how they are packed.
const CODECS: std::ops::RangeInclusive<u8> = 1..=2;
/// The most axes of an array.
const MOST_AXES: usize = 8;
/// The most bytes of a chunk that is written: the library reads no block of half a GiB.
const CHUNK: usize = 1 << 28;
/// The most chunks of an array that is read.
const MOST_CHUNKS: u32 = 1 << 16;

/// How messages name the memory that an array takes.
const ARRAY: &str = "an uploaded array";
const ANSWER: &str = "a response";

/// Types of an array's elements, as NumPy names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    Bool,
    Float16,
    Other(Element),
}

impl Dtype {
    /// The type with a name such as `int16`.
    pub fn named(name: &str) -> Option<Dtype> {
        match name {
            "bool" => Some(Dtype::Bool),
            "float16" => Some(Dtype::Float16),
            name => Element::ALL.into_iter().find(|e| e.name() == name).map(Dtype::Other),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Dtype::Bool => "bool",
            Dtype::Float16 => "float16",
            Dtype::Other(element) => element.name(),
        }
    }

    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Dtype::Bool => 1,
            Dtype::Float16 => 2,
            Dtype::Other(element) => element.size(),
        }
    }

    /// Whether it holds whole numbers, or booleans.
    pub fn is_whole(self) -> bool {
        match self {
            Dtype::Bool => true,
            Dtype::Float16 => false,
            Dtype::Other(element) => element.is_whole(),
        }
    }
}

/// An array: the last axis is the fastest, the lowest byte of an element comes first.
#[derive(Debug, PartialEq)]
pub struct Array {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// The bytes of a message that have not been read yet.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Failure> {
        let (taken, rest) = self
            .0
            .split_at_checked(count)
            .ok_or_else(|| Failure::bad("an array's message ends too early"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn number<const N: usize>(&mut self) -> Result<[u8; N], Failure> {
        let taken = self.take(N)?;
        Ok(std::array::from_fn(|at| taken[at]))
    }
}

/// Reads an array of at most `most` bytes. No memory is requested before the message has shown that
/// it holds what its head announces.
pub fn unpack(message: &[u8], most: usize) -> Result<Array, Failure> {
    let mut rest = Rest(message);
    let magic = rest.take(4)?;
    if magic != MAGIC {
        return Err(Failure::bad(format!(
            "an array's message begins with {magic:02x?}, expected 'NNIA'"
        )));
    }
    let [version, codec, axes, name] = rest.number::<4>()?;
    if version != VERSION {
        return Err(Failure::bad(format!("array version {version}, expected {VERSION}")));
    }
    if !CODECS.contains(&codec) {
        return Err(Failure::bad(format!("array codec {codec}, expected 1 (zstd)")));
    }
    let name = String::from_utf8_lossy(rest.take(usize::from(name))?);
    let dtype = Dtype::named(&name).ok_or_else(|| {
        Failure::bad(format!(
            "elements of type '{}', expected bool, integers or floats",
            quoted(&name)
        ))
    })?;
    if usize::from(axes) > MOST_AXES || axes == 0 {
        return Err(Failure::bad(format!("an array of {axes} axes, expected 1 to {MOST_AXES}")));
    }
    let mut shape = vec![];
    for _ in 0..axes {
        let length = i64::from_le_bytes(rest.number()?);
        let length = usize::try_from(length).ok().filter(|n| *n > 0);
        shape.push(length.ok_or_else(|| Failure::bad("an array with an empty axis"))?);
    }
    let total = extent(&shape).and_then(|n| n.checked_mul(dtype.size())).filter(|n| *n <= most);
    let total = total.ok_or_else(|| {
        Failure::too_large(format!(
            "an array of {shape:?} elements of {}: at most {most} bytes are accepted",
            dtype.name()
        ))
    })?;
    let count = u32::from_le_bytes(rest.number()?);
    if count > MOST_CHUNKS {
        return Err(Failure::bad(format!(
            "an array in {count} chunks: at most {MOST_CHUNKS} are accepted"
        )));
    }
    let (mut chunks, mut announced) = (vec![], 0usize);
    for _ in 0..count {
        let [data, packed] = [rest.number()?, rest.number()?].map(u64::from_le_bytes);
        let data = usize::try_from(data).ok().filter(|n| *n > 0 && n.is_multiple_of(dtype.size()));
        let (data, packed) =
            data.zip(usize::try_from(packed).ok()).ok_or_else(|| Failure::bad("a chunk's size"))?;
        announced = announced.saturating_add(data);
        chunks.push((data, rest.take(packed)?));
    }
    if announced != total {
        return Err(Failure::bad(format!(
            "an array's chunks hold {announced} bytes, its shape {shape:?} of {} needs {total}",
            dtype.name()
        )));
    }
    let mut bytes = memory::zeroed::<u8>(ARRAY, total);
    let mut to = &mut bytes[..];
    for (data, packed) in chunks {
        let (part, rest) = std::mem::take(&mut to).split_at_mut(data);
        blosc2::decode(packed, part).map_err(Failure::bad)?;
        to = rest;
    }
    Ok(Array { dtype, shape, bytes })
}

impl Array {
    /// The elements in the types of a scan: booleans as bytes, halves as floats.
    pub fn into_scan(self) -> (Element, Vec<u8>) {
        match self.dtype {
            Dtype::Bool => {
                let mut bytes = self.bytes;
                bytes.iter_mut().for_each(|b| *b = u8::from(*b != 0));
                (Element::Uint8, bytes)
            }
            Dtype::Float16 => {
                let mut bytes = memory::list(ARRAY, 2 * self.bytes.len());
                for half in self.bytes.chunks_exact(2) {
                    let value = half::f16::from_le_bytes([half[0], half[1]]);
                    bytes.extend_from_slice(&value.to_f32().to_le_bytes());
                }
                (Element::Float32, bytes)
            }
            Dtype::Other(element) => (element, self.bytes),
        }
    }

    /// 1 where an element is not 0, in the array's order.
    pub fn marks(&self) -> Vec<u8> {
        let size = self.dtype.size();
        // For floats the highest bit is ignored, because it is the sign.
        let sign = if self.dtype.is_whole() { 0xff } else { 0x7f };
        let is_set = |e: &[u8]| {
            let (last, others) = e.split_last().map_or((0, e), |(last, others)| (*last, others));
            u8::from(last & sign != 0 || others.iter().any(|b| *b != 0))
        };
        memory::collected(ARRAY, self.bytes.chunks_exact(size).map(is_set))
    }
}

/// A message of an array whose elements are 0 or 1, in stored chunks.
pub fn pack(dtype: Dtype, shape: &[usize], marks: &[u8]) -> Vec<u8> {
    packed(dtype, shape, marks, CHUNK)
}

/// A message of an array whose elements are 0 or 1, in chunks of at most `most` bytes.
fn packed(dtype: Dtype, shape: &[usize], marks: &[u8], chunk: usize) -> Vec<u8> {
    let size = dtype.size();
    let one = match dtype {
        Dtype::Float16 => half::f16::ONE.to_le_bytes().to_vec(),
        Dtype::Other(Element::Float32) => 1f32.to_le_bytes().to_vec(),
        Dtype::Other(Element::Float64) => 1f64.to_le_bytes().to_vec(),
        _ => 1u64.to_le_bytes()[..size].to_vec(),
    };
    let each = chunk / size;
    let count = marks.len().div_ceil(each);
    let head = 12 + 8 + 8 * shape.len() + 32;
    let mut message = memory::list::<u8>(ANSWER, head + 48 * count + marks.len() * size);
    message.extend_from_slice(MAGIC);
    message.extend_from_slice(&[VERSION, 1, shape.len() as u8, dtype.name().len() as u8]);
    message.extend_from_slice(dtype.name().as_bytes());
    shape.iter().for_each(|n| message.extend_from_slice(&(*n as i64).to_le_bytes()));
    message.extend_from_slice(&(count as u32).to_le_bytes());
    for part in marks.chunks(each) {
        let bytes = part.len() * size;
        let header = blosc2::stored_header(bytes, size);
        message.extend_from_slice(&(bytes as u64).to_le_bytes());
        message.extend_from_slice(&((bytes + header.len()) as u64).to_le_bytes());
        message.extend_from_slice(&header);
        match size {
            1 => message.extend_from_slice(part),
            _ => part.iter().for_each(|mark| match mark {
                0 => message.resize(message.len() + size, 0),
                _ => message.extend_from_slice(&one),
            }),
        }
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_unpacked() {
        let marks: Vec<u8> = (0..60).map(|n| u8::from(n % 7 == 0)).collect();
        for name in ["bool", "uint8", "int8", "uint16", "int32", "uint64", "float16", "float32"] {
            let dtype = Dtype::named(name).unwrap();
            let message = pack(dtype, &[3, 4, 5], &marks);
            let array = unpack(&message, 1000).unwrap();
            assert_eq!((array.dtype, &array.shape[..]), (dtype, &[3, 4, 5][..]), "{name}");
            assert_eq!(array.marks(), marks, "{name}");
            let (element, bytes) = array.into_scan();
            assert_eq!(bytes.len(), 60 * element.size(), "{name}");
            assert!(unpack(&message, 60 * dtype.size() - 1).is_err());
            for cut in 0..message.len() {
                assert!(unpack(&message[..cut], 1000).is_err(), "{name} cut at {cut}");
            }
        }
        assert_eq!(Dtype::named("complex64"), None);
        assert_eq!(Dtype::named("str"), None);
    }

    #[test]
    fn of_an_unknown_type_the_beginning_is_quoted() {
        let name = ["complex64\u{1b}", &"\0".repeat(245)].concat();
        let message = [&MAGIC[..], &[VERSION, 1, 3, name.len() as u8], name.as_bytes()].concat();
        let failure = unpack(&message, 1000).unwrap_err();
        assert_eq!(
            failure.message(),
            format!(
                r"elements of type 'complex64\u{{1b}}{}...', expected bool, integers or floats",
                r"\0".repeat(30)
            )
        );
    }

    #[test]
    fn large_arrays_are_sent_in_chunks() {
        let marks: Vec<u8> = (0..60).map(|n| u8::from(n % 7 == 0)).collect();
        let dtype = Dtype::named("int16").unwrap();
        // After the head and the axes.
        let count = 8 + 5 + 24..8 + 5 + 24 + 4;
        for (chunk, expected) in [(16, 8u32), (120, 1), (119, 2)] {
            let mut message = packed(dtype, &[3, 4, 5], &marks, chunk);
            assert_eq!(message[count.clone()], expected.to_le_bytes());
            let array = unpack(&message, 1000).unwrap();
            assert!(array.marks() == marks && array.shape == [3, 4, 5]);
            message[count.clone()].copy_from_slice(&(MOST_CHUNKS + 1).to_le_bytes());
            assert!(format!("{:?}", unpack(&message, 1000).unwrap_err()).contains("at most 65536"));
        }
        // python-blosc2 4.14.1 reads no larger block.
        const { assert!(CHUNK <= 536_866_816) };
    }

    #[test]
    fn a_negative_zero_is_nothing() {
        let bytes = [-0f32, 2.0, f32::MIN_POSITIVE, 0.0].map(f32::to_le_bytes).concat();
        let array = Array { dtype: Dtype::Other(Element::Float32), shape: vec![4], bytes };
        assert_eq!(array.marks(), [0, 1, 1, 0]);
        let least = Array {
            dtype: Dtype::Other(Element::Int16),
            shape: vec![2],
            bytes: [i16::MIN, 0].map(i16::to_le_bytes).concat(),
        };
        assert_eq!(least.marks(), [1, 0]);
    }

    #[test]
    fn a_message_that_announces_much_is_refused_before_it_is_believed() {
        let mut message = pack(Dtype::Other(Element::Uint8), &[2, 2], &[1; 4]);
        // The first axis, after the head and the name.
        message[13..21].copy_from_slice(&(1i64 << 40).to_le_bytes());
        let error = unpack(&message, 1 << 20).unwrap_err();
        assert!(format!("{error:?}").contains("at most 1048576 bytes"), "{error:?}");
        message[13..21].copy_from_slice(&3i64.to_le_bytes());
        assert!(format!("{:?}", unpack(&message, 100).unwrap_err()).contains("its shape"));
        message[13..21].copy_from_slice(&(-2i64).to_le_bytes());
        assert!(unpack(&message, 100).is_err());
    }
}
