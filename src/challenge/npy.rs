//! NumPy's `.npy` files: an array's element type, shape and items. Headers of versions 1, 2 and 3.
//!
//! Arrays of objects hold a pickle, which [`super::pickle`] reads.

use crate::memory;
use half::f16;

/// The kind of an array's items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Bool,
    Signed,
    Unsigned,
    Float,
    Text,
    Object,
}

/// An element type of NumPy's, for example `<f4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DType {
    kind: Kind,
    /// Bytes per item; 0 for objects.
    size: usize,
    big: bool,
}

/// One item of an array.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// `True` or `False`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A floating-point number, or a whole one that is too large for [`Item::Int`].
    Float(f64),
    /// A string, without its padding zeros.
    Text(String),
}

/// The most characters of a string item.
const LONGEST_TEXT: usize = 1 << 16;

impl DType {
    /// Reads a type such as `<f4`, `|u1`, `<U2`, `|O` or, as in pickles, `i8`.
    ///
    /// # Errors
    /// The type is another one; the message lists what is expected.
    pub fn parse(text: &str) -> Result<DType, String> {
        let unknown = || {
            format!(
                "its element type is '{text}', expected bool, an integer, a float, a string (U) or objects (O)"
            )
        };
        let (big, rest) = match text.chars().next() {
            Some('>') => (true, &text[1..]),
            Some('<' | '=' | '|') => (false, &text[1..]),
            _ => (false, text),
        };
        let mut letters = rest.chars();
        let letter = letters.next().ok_or_else(unknown)?;
        let number: Option<usize> = letters.as_str().parse().ok();
        let (kind, size) = match (letter, number) {
            ('b', Some(1)) | ('?', None) => (Kind::Bool, 1),
            ('i', Some(n @ (1 | 2 | 4 | 8))) => (Kind::Signed, n),
            ('u', Some(n @ (1 | 2 | 4 | 8))) => (Kind::Unsigned, n),
            ('f', Some(n @ (2 | 4 | 8))) => (Kind::Float, n),
            ('U', Some(n @ 1..=LONGEST_TEXT)) => (Kind::Text, 4 * n),
            ('O', _) => (Kind::Object, 0),
            _ => return Err(unknown()),
        };
        Ok(DType { kind, size, big })
    }

    /// This type with a separately given byte order, as pickles do it.
    pub fn with_order(self, order: &str) -> DType {
        DType { big: order == ">", ..self }
    }

    /// Whether items are objects.
    pub fn is_object(&self) -> bool {
        self.kind == Kind::Object
    }

    /// Bytes of an item; 0 for objects, which are stored elsewhere.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The type's plain name, for example `float32`.
    pub fn name(&self) -> &'static str {
        match (self.kind, self.size) {
            (Kind::Bool, _) => "bool",
            (Kind::Signed, 1) => "int8",
            (Kind::Signed, 2) => "int16",
            (Kind::Signed, 4) => "int32",
            (Kind::Signed, _) => "int64",
            (Kind::Unsigned, 1) => "uint8",
            (Kind::Unsigned, 2) => "uint16",
            (Kind::Unsigned, 4) => "uint32",
            (Kind::Unsigned, _) => "uint64",
            (Kind::Float, 2) => "float16",
            (Kind::Float, 4) => "float32",
            (Kind::Float, _) => "float64",
            (Kind::Text, _) => "string",
            (Kind::Object, _) => "object",
        }
    }

    /// The bytes of a number, little-endian and padded with zeros.
    fn word(&self, bytes: &[u8]) -> [u8; 8] {
        let mut word = [0u8; 8];
        let order = |at: usize| if self.big { self.size - 1 - at } else { at };
        word.iter_mut()
            .take(self.size)
            .enumerate()
            .for_each(|(at, to)| *to = bytes.get(order(at)).copied().unwrap_or(0));
        word
    }

    /// A signed number, sign-extended.
    fn signed(&self, bytes: &[u8]) -> i64 {
        let unused = 64 - 8 * self.size as u32;
        (i64::from_le_bytes(self.word(bytes)) << unused) >> unused
    }

    fn float(&self, bytes: &[u8]) -> f64 {
        let word @ [a, b, c, d, ..] = self.word(bytes);
        match self.size {
            2 => f16::from_le_bytes([a, b]).to_f64(),
            4 => f32::from_le_bytes([a, b, c, d]) as f64,
            _ => f64::from_le_bytes(word),
        }
    }

    /// The number stored in `bytes`; none if items are not numbers.
    pub fn number(&self, bytes: &[u8]) -> Option<f64> {
        Some(match self.kind {
            Kind::Bool => f64::from(u8::from(bytes.first().is_some_and(|b| *b != 0))),
            Kind::Signed => self.signed(bytes) as f64,
            Kind::Unsigned => u64::from_le_bytes(self.word(bytes)) as f64,
            Kind::Float => self.float(bytes),
            Kind::Text | Kind::Object => return None,
        })
    }

    /// The item stored in `bytes`; none for objects, for another number of bytes than an item has,
    /// and for invalid text.
    pub fn item(&self, bytes: &[u8]) -> Option<Item> {
        if bytes.len() != self.size {
            return None;
        }
        Some(match self.kind {
            Kind::Bool => Item::Bool(bytes.first().is_some_and(|b| *b != 0)),
            Kind::Signed => Item::Int(self.signed(bytes)),
            Kind::Unsigned => {
                let value = u64::from_le_bytes(self.word(bytes));
                i64::try_from(value).map_or(Item::Float(value as f64), Item::Int)
            }
            Kind::Float => Item::Float(self.float(bytes)),
            Kind::Text => Item::Text(self.text(bytes)?),
            Kind::Object => return None,
        })
    }

    /// Four bytes per character, without the zeros at the end.
    fn text(&self, bytes: &[u8]) -> Option<String> {
        let code = |four: &[u8]| {
            let fold = |value: u32, byte: &u8| value << 8 | u32::from(*byte);
            if self.big { four.iter().fold(0, fold) } else { four.iter().rev().fold(0, fold) }
        };
        let text: Option<String> =
            bytes.chunks_exact(4).map(|four| char::from_u32(code(four))).collect();
        text.map(|t| t.trim_end_matches('\0').to_string())
    }
}

/// The index in memory with the first axis fastest of item `at` of an array, counted with the last
/// axis fastest. The shape has no 0.
pub(crate) fn fortran_place(shape: &[usize], at: usize) -> usize {
    let (mut rest, mut place) = (at, 0);
    let mut stride: usize = shape.iter().product();
    for n in shape.iter().rev() {
        stride /= n;
        place += rest % n * stride;
        rest /= n;
    }
    place
}

/// The most axes of NumPy's arrays.
const MOST_AXES: usize = 64;

/// The number of items of an array; none if there are too many to count, or more axes than NumPy
/// supports.
pub(crate) fn items_of(shape: &[usize]) -> Option<usize> {
    if shape.len() <= MOST_AXES { memory::extent(shape) } else { None }
}

/// The name of an array in refusals of memory.
pub(super) const ARRAY: &str = "an array of a .npz file";

/// An array as its file stores it.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// The type of its items.
    pub dtype: DType,
    /// Items along each axis; items are in order with the last axis fastest, whatever the file
    /// does.
    pub shape: Vec<usize>,
    fortran: bool,
    data: Vec<u8>,
}

impl Array {
    /// Reads the bytes of a `.npy` file.
    ///
    /// # Errors
    /// The file is damaged, or its element type is not supported.
    pub fn parse(mut bytes: Vec<u8>) -> Result<Array, String> {
        let (text, body) = header(&bytes)?;
        let untyped = || format!("its header has no plain element type: {}", text.trim());
        let descr = field(&text, "descr").and_then(quoted).ok_or_else(untyped)?;
        let dtype = DType::parse(descr)?;
        let shape = field(&text, "shape")
            .and_then(tuple)
            .ok_or_else(|| format!("its header has no shape: {}", text.trim()))?;
        let fortran = field(&text, "fortran_order").is_some_and(|v| v.starts_with("True"));
        bytes.drain(..body);
        let expected = items_of(&shape).and_then(|n| n.checked_mul(dtype.size));
        if !dtype.is_object() && expected != Some(bytes.len()) {
            let expected = expected.map_or("too many".to_string(), |n| n.to_string());
            return Err(format!(
                "it holds {} bytes, {shape:?} items of {} take {expected}",
                bytes.len(),
                dtype.name()
            ));
        }
        Ok(Array { dtype, shape, fortran, data: bytes })
    }

    /// The pickle of an array of objects; none for others.
    pub fn pickle(&self) -> Option<&[u8]> {
        self.dtype.is_object().then_some(&self.data)
    }

    /// The bytes of every item, in order.
    fn each(&self) -> impl Iterator<Item = &[u8]> {
        let count = self.data.len() / self.dtype.size.max(1);
        let place = move |at: usize| if self.fortran { fortran_place(&self.shape, at) } else { at };
        (0..count).map(move |at| &self.data[place(at) * self.dtype.size..][..self.dtype.size])
    }

    /// The results of `of` for every item, in order with the last axis fastest.
    ///
    /// # Errors
    /// Items are not numbers.
    pub fn numbers<T>(&self, of: impl Fn(f64) -> T) -> Result<Vec<T>, String> {
        if matches!(self.dtype.kind, Kind::Text | Kind::Object) {
            return Err(format!("it holds items of type {}, expected numbers", self.dtype.name()));
        }
        let mut numbers = memory::list(ARRAY, self.data.len() / self.dtype.size.max(1));
        numbers.extend(self.each().map(|bytes| of(self.dtype.number(bytes).unwrap_or_default())));
        Ok(numbers)
    }

    /// Every item, in order with the last axis fastest.
    ///
    /// # Errors
    /// The array is of objects, or a text in it is invalid.
    pub fn items(&self) -> Result<Vec<Item>, String> {
        if self.dtype.is_object() {
            return Err("it holds objects, expected plain items".into());
        }
        let mut items = memory::list(ARRAY, self.data.len() / self.dtype.size.max(1));
        for bytes in self.each() {
            let item = self.dtype.item(bytes);
            items.push(item.ok_or("a string in it has an invalid character")?);
        }
        Ok(items)
    }
}

fn little(bytes: &[u8]) -> usize {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | *byte as usize)
}

/// The text of the header, and the position of the items.
fn header(bytes: &[u8]) -> Result<(String, usize), String> {
    let version = match bytes {
        [0x93, b'N', b'U', b'M', b'P', b'Y', version, ..] => *version,
        _ => return Err("not a NumPy array: it does not begin like a .npy file".into()),
    };
    let start = match version {
        1 => 10,
        2 | 3 => 12,
        other => return Err(format!("its .npy version is {other}, expected 1 to 3")),
    };
    let end = bytes.get(8..start).map(|length| start.saturating_add(little(length)));
    let text = end.and_then(|end| Some((bytes.get(start..end)?, end)));
    let (text, end) = text.ok_or("it ends within its .npy header")?;
    Ok((String::from_utf8_lossy(text).into_owned(), end))
}

/// The text after a key of the header, which is a dictionary in Python's notation.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let at = ['\'', '"'].into_iter().find_map(|q| text.split_once(&format!("{q}{key}{q}")))?.1;
    Some(at.trim_start().strip_prefix(':')?.trim_start())
}

/// The string in quotes that `text` begins with.
fn quoted(text: &str) -> Option<&str> {
    let quote = text.chars().next().filter(|c| ['\'', '"'].contains(c))?;
    text[1..].split_once(quote).map(|(inner, _)| inner)
}

/// The whole numbers in brackets that `text` begins with.
fn tuple(text: &str) -> Option<Vec<usize>> {
    let (inner, _) = text.strip_prefix('(')?.split_once(')')?;
    // Python 2 wrote an L after long integers.
    let numbers =
        inner.split(',').map(|n| n.trim().trim_end_matches('L')).filter(|n| !n.is_empty());
    numbers.map(|n| n.parse().ok()).collect()
}

/// A `.npy` file of bytes, the last axis fastest.
pub fn of_bytes(shape: &[usize], values: &[u8]) -> Vec<u8> {
    // One axis needs a comma, or it would be a number in brackets.
    let sizes: String = shape.iter().map(|n| format!("{n},")).collect();
    let mut text = format!("{{'descr': '|u1', 'fortran_order': False, 'shape': ({sizes}), }}");
    // NumPy aligns the items to 64 bytes.
    let filled = (10 + text.len() + 1).next_multiple_of(64) - 10;
    text = format!("{text:<width$}\n", width = filled - 1);
    let mut out = memory::list(ARRAY, 10 + text.len() + values.len());
    out.extend(b"\x93NUMPY\x01\x00");
    out.extend((text.len() as u16).to_le_bytes());
    out.extend(text.as_bytes());
    out.extend(values);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A version-1 file with this header and these items.
    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut out = b"\x93NUMPY\x01\x00".to_vec();
        out.extend((header.len() as u16).to_le_bytes());
        out.extend(header.as_bytes());
        out.extend(data);
        out
    }

    #[test]
    fn numbers_of_any_order_are_read() {
        let header = "{'descr': '>i2', 'fortran_order': False, 'shape': (2, 3), }   \n";
        let big = Array::parse(file(header, b"\x00\x00\x00\x01\x00\x02\x00\x03\x00\x04\xff\xfb"))
            .unwrap();
        assert_eq!(
            (big.numbers(|v| v).unwrap(), &big.shape[..]),
            (vec![0.0, 1.0, 2.0, 3.0, 4.0, -5.0], &[2, 3][..])
        );
        // 0 to 5 in two rows, first axis fastest.
        let header = "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }\n";
        let data =
            b"\x00\x00\x00\x00\x00\x00@@\x00\x00\x80?\x00\x00\x80@\x00\x00\x00@\x00\x00\xa0@";
        let fortran = Array::parse(file(header, data)).unwrap();
        assert_eq!(fortran.numbers(|v| v as u8).unwrap(), [0, 1, 2, 3, 4, 5]);
        let half = Array::parse(file(
            "{'descr': '<f2', 'fortran_order': False, 'shape': (1,), }",
            b"\x00\x3e",
        ))
        .unwrap();
        assert_eq!(half.items().unwrap(), [Item::Float(1.5)]);
        let scalar =
            Array::parse(file("{'descr': '|b1', 'fortran_order': False, 'shape': (), }", b"\x01"))
                .unwrap();
        assert_eq!(scalar.items().unwrap(), [Item::Bool(true)]);
    }

    #[test]
    fn strings_are_read() {
        let header = "{'descr': '<U2', 'fortran_order': False, 'shape': (2,), }";
        let array = Array::parse(file(header, b"f\0\0\0g\0\0\0b\0\0\0\0\0\0\0")).unwrap();
        assert_eq!(array.items().unwrap(), [Item::Text("fg".into()), Item::Text("b".into())]);
        assert!(array.numbers(|v| v).is_err());
        let array = Array::parse(file(header, &[0xff; 16])).unwrap();
        assert!(array.items().is_err());
    }

    #[test]
    fn what_is_written_is_read() {
        for shape in [vec![2, 1, 3], vec![6]] {
            let bytes = of_bytes(&shape, &[1, 2, 3, 4, 5, 255]);
            assert_eq!(bytes.len() % 64, 6);
            let array = Array::parse(bytes).unwrap();
            assert_eq!(
                (&array.shape, array.numbers(|v| v as u8).unwrap()),
                (&shape, vec![1, 2, 3, 4, 5, 255])
            );
        }
    }

    #[test]
    fn damaged_files_are_errors() {
        let message = |bytes: Vec<u8>| Array::parse(bytes).unwrap_err();
        assert!(message(vec![]).contains("not a NumPy array"));
        assert!(message(b"\x93NUMPY\x09\x00".to_vec()).contains("version is 9"));
        assert!(message(b"\x93NUMPY\x01\x00\xff".to_vec()).contains("ends within"));
        assert!(
            message(file("{'descr': [('a', '<f4')], 'shape': (1,)}", &[]))
                .contains("no plain element type")
        );
        assert!(message(file("{'descr': '<c8', 'shape': (1,)}", &[])).contains("'<c8'"));
        assert!(
            message(file("{'descr': '<f4', 'shape': (2,)}", &[0; 7])).contains("holds 7 bytes")
        );
        let many = usize::MAX;
        assert!(
            message(file(&format!("{{'descr': '<f4', 'shape': ({many}, {many})}}"), &[]))
                .contains("holds 0 bytes")
        );
        assert!(message(file("{'descr': '\u{e9}', 'shape': ()}", &[])).contains("element type"));
    }
}
