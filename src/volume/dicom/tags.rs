//! DICOM's encoding (PS3.5): data sets of tagged elements, read in place in a file's bytes.
//!
//! It is read here and not by another crate, because a damaged or hostile file must give an error,
//! never a panic, a deep recursion or an allocation of its own choosing: nothing is copied, and no
//! length that reaches beyond the bytes is believed.

pub use super::dictionary::*;

use crate::memory;
use flate2::read::DeflateDecoder;
use std::borrow::Cow;
use std::io::Read;

/// The first group of voxels.
const VOXEL_GROUP: u16 = 0x7fe0;
/// The group of the delimiters of sequences.
const PARTS: u16 = 0xfffe;
const ITEM: u16 = 0xe000;
const ITEM_END: u16 = 0xe00d;
const SEQUENCE_END: u16 = 0xe0dd;

/// How messages name the memory that contours take.
const NUMBERS: &str = "the points of its contours";
/// The most levels of sequences within sequences that are entered.
const DEEPEST: usize = 24;
/// The most elements of a data set, or items of a sequence.
const MOST: usize = 1 << 16;

/// Why bytes are not a data set.
#[derive(Clone, Debug, PartialEq)]
pub enum Problem {
    /// The bytes end too early: with more of them they may be one.
    Short,
    /// The inflated bytes are more than the limit.
    Large,
    /// The bytes are damaged, whatever follows; with the reason.
    Damaged(String),
}

impl From<Problem> for String {
    fn from(problem: Problem) -> String {
        match problem {
            Problem::Short => "truncated: it ends within its tags".into(),
            Problem::Large => "its deflated data set is larger than the limit".into(),
            Problem::Damaged(what) => what,
        }
    }
}

/// How elements are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coding {
    /// Each says how its value is encoded.
    pub explicit: bool,
    /// The highest byte comes first.
    pub big: bool,
}

impl Coding {
    const IMPLICIT: Coding = Coding { explicit: false, big: false };
    const EXPLICIT: Coding = Coding { explicit: true, big: false };

    /// The encoding of a transfer syntax.
    fn of(syntax: &str) -> Coding {
        match syntax {
            "1.2.840.10008.1.2" => Coding::IMPLICIT,
            "1.2.840.10008.1.2.2" => Coding { explicit: true, big: true },
            _ => Coding::EXPLICIT,
        }
    }

    fn u16(self, b: [u8; 2]) -> u16 {
        if self.big { u16::from_be_bytes(b) } else { u16::from_le_bytes(b) }
    }

    fn u32(self, b: [u8; 4]) -> u32 {
        if self.big { u32::from_be_bytes(b) } else { u32::from_le_bytes(b) }
    }

    fn u64(self, b: [u8; 8]) -> u64 {
        if self.big { u64::from_be_bytes(b) } else { u64::from_le_bytes(b) }
    }
}

/// Bytes with a position in them.
#[derive(Clone, Copy)]
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    coding: Coding,
}

/// What precedes a value.
struct Head {
    group: u16,
    element: u16,
    vr: [u8; 2],
    /// None if an end is marked instead.
    length: Option<usize>,
}

impl Head {
    fn new(group: u16, element: u16, vr: [u8; 2], length: u32) -> Head {
        Head { group, element, vr, length: (length != u32::MAX).then_some(length as usize) }
    }

    fn is(&self, element: u16) -> bool {
        self.group == PARTS && self.element == element
    }

    fn unexpected(&self, expected: &str) -> Problem {
        Problem::Damaged(format!(
            "damaged: the tag ({:04x},{:04x}) was found, expected {expected}",
            self.group, self.element
        ))
    }
}

impl<'a> Cursor<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Problem> {
        let found = self.bytes.get(self.at..).and_then(|rest| rest.first_chunk::<N>());
        self.at += N;
        found.copied().ok_or(Problem::Short)
    }

    fn value(&mut self, length: usize) -> Result<&'a [u8], Problem> {
        let end = self.at.checked_add(length).ok_or(Problem::Short)?;
        let value = self.bytes.get(self.at..end).ok_or(Problem::Short)?;
        self.at = end;
        Ok(value)
    }

    fn head(&mut self) -> Result<Head, Problem> {
        let (group, element) = (self.coding.u16(self.take()?), self.coding.u16(self.take()?));
        if group == PARTS || !self.coding.explicit {
            let length = self.coding.u32(self.take()?);
            return Ok(Head::new(group, element, *b"  ", length));
        }
        let vr: [u8; 2] = self.take()?;
        if !vr.iter().all(u8::is_ascii_uppercase) {
            return Err(Problem::Damaged(format!(
                "damaged: the element ({group:04x},{element:04x}) has the value representation {vr:02x?}, expected two capital letters"
            )));
        }
        let length = match &vr {
            b"OB" | b"OD" | b"OF" | b"OL" | b"OV" | b"OW" | b"SQ" | b"SV" | b"UC" | b"UN"
            | b"UR" | b"UT" | b"UV" => {
                self.take::<2>()?;
                self.coding.u32(self.take()?)
            }
            _ => u32::from(self.coding.u16(self.take()?)),
        };
        // For unknown representations the contents decide.
        let vr = if vr == *b"UN" { *b"  " } else { vr };
        Ok(Head::new(group, element, vr, length))
    }

    /// Skips to the end of a sequence whose end is marked; returns the position of that mark.
    fn skip_sequence(&mut self, depth: usize) -> Result<usize, Problem> {
        if depth > DEEPEST {
            return Err(Problem::Damaged(format!(
                "its sequences are nested deeper than {DEEPEST}"
            )));
        }
        loop {
            let at = self.at;
            let head = self.head()?;
            match head.length {
                _ if head.is(SEQUENCE_END) => return Ok(at),
                Some(length) if head.is(ITEM) => {
                    self.value(length)?;
                }
                None if head.is(ITEM) => loop {
                    let inner = self.head()?;
                    match inner.length {
                        _ if inner.is(ITEM_END) => break,
                        _ if inner.group == PARTS => return Err(inner.unexpected("an element")),
                        Some(length) => {
                            self.value(length)?;
                        }
                        None => self.within(&inner).skip_sequence_of(self, depth + 1)?,
                    }
                },
                _ => return Err(head.unexpected("an item of a sequence")),
            }
        }
    }

    /// This position, read in the encoding of the contents of an element with that head.
    fn within(&self, head: &Head) -> Cursor<'a> {
        // Unknown representations are implicit (PS3.5, 6.2.2).
        let unknown = self.coding.explicit && head.vr == *b"  ";
        Cursor { coding: if unknown { Coding::IMPLICIT } else { self.coding }, ..*self }
    }

    /// Skips to the end of a sequence, together with `outer`.
    fn skip_sequence_of(mut self, outer: &mut Cursor<'a>, depth: usize) -> Result<(), Problem> {
        self.skip_sequence(depth)?;
        outer.at = self.at;
        Ok(())
    }
}

/// A value with its tag.
#[derive(Clone, Copy, Debug)]
pub struct Element<'a> {
    group: u16,
    element: u16,
    vr: [u8; 2],
    /// The bytes; for a sequence or fragments whose end is marked, those before the mark.
    pub value: &'a [u8],
    /// Whether the end was marked.
    pub open: bool,
    /// The encoding of its contents.
    coding: Coding,
}

impl Element<'_> {
    /// Whether its bytes were written in pairs, so that another byte order swaps them.
    pub fn is_words(&self) -> bool {
        self.vr == *b"OW"
    }
}

/// Elements of a file, or of an item of a sequence.
#[derive(Clone, Debug)]
pub struct DataSet<'a> {
    elements: Vec<Element<'a>>,
}

/// A file's tags.
#[derive(Clone, Debug)]
pub struct Opened<'a> {
    /// Everything before the voxels.
    pub tags: DataSet<'a>,
    /// The encoding of the file.
    pub coding: Coding,
    /// The position of the elements of the voxels; none if there are none.
    voxels: Option<usize>,
    bytes: &'a [u8],
}

/// The transfer syntax of a file, and the position of its data set.
fn meta(bytes: &[u8]) -> Result<(usize, String), Problem> {
    let start = match bytes.get(128..132) {
        Some(b"DICM") => 132,
        _ => 0,
    };
    let mut cursor = Cursor { bytes, at: start, coding: Coding::EXPLICIT };
    let mut elements = vec![];
    loop {
        let before = cursor.at;
        // A file without this group is written as all were before the group existed.
        let group = match cursor.take::<2>() {
            Ok(group) => u16::from_le_bytes(group),
            Err(e) if elements.is_empty() => return Err(e),
            Err(_) => 0,
        };
        cursor.at = before;
        if group != 2 {
            let tags = DataSet { elements };
            let explicit = bytes
                .get(before + 4..before + 6)
                .is_some_and(|vr| vr.iter().all(u8::is_ascii_uppercase));
            let bare = if explicit { "1.2.840.10008.1.2.1" } else { "1.2.840.10008.1.2" };
            return Ok((before, tags.text(TRANSFER_SYNTAX).unwrap_or_else(|| bare.into())));
        }
        let head = cursor.head()?;
        let length = head.length.ok_or_else(|| head.unexpected("an element with a length"))?;
        let value = cursor.value(length)?;
        let Head { group, element, vr, .. } = head;
        elements.push(Element { group, element, vr, value, open: false, coding: cursor.coding });
        if elements.len() > 64 {
            return Err(Problem::Damaged("damaged: its header has no end".into()));
        }
    }
}

/// The deflated transfer syntax.
const DEFLATED: &str = "1.2.840.10008.1.2.1.99";
/// How messages name the memory that an inflated file takes.
const INFLATED: &str = "a deflated DICOM file";

/// A file's data set, inflated if it is deflated, to at most `most` bytes: the bytes, the position
/// where it begins, and its transfer syntax.
pub fn data_set(
    bytes: &[u8],
    whole: bool,
    most: u64,
) -> Result<(Cow<'_, [u8]>, usize, String), Problem> {
    let (start, syntax) = meta(bytes)?;
    if syntax != DEFLATED {
        return Ok((Cow::Borrowed(bytes), start, syntax));
    }
    if !whole {
        return Err(Problem::Short);
    }
    let mut inflated = vec![];
    // One more byte shows that there are more.
    let reader = DeflateDecoder::new(&bytes[start..]).take(most.saturating_add(1));
    memory::read(INFLATED, reader, &mut inflated)
        .map_err(|e| Problem::Damaged(format!("truncated or corrupt deflated data set: {e}")))?;
    if inflated.len() as u64 > most {
        return Err(Problem::Large);
    }
    Ok((Cow::Owned(inflated), 0, "1.2.840.10008.1.2.1".into()))
}

impl<'a> Opened<'a> {
    /// Reads the tags of a data set in a transfer syntax, which is not packed, up to the voxels.
    pub fn new(bytes: &'a [u8], start: usize, syntax: &str) -> Result<Opened<'a>, Problem> {
        let coding = Coding::of(syntax);
        let mut cursor = Cursor { bytes, at: start, coding };
        let (tags, voxels) = DataSet::read(&mut cursor, 0)?;
        Ok(Opened { tags, coding, voxels, bytes })
    }

    /// Whether there are voxels.
    pub fn has_voxels(&self) -> bool {
        self.voxels.is_some()
    }

    /// The voxels.
    pub fn voxels(&self) -> Result<Element<'a>, String> {
        let missing = || format!("its {PIXEL_DATA} is missing");
        let mut at = self.voxels.ok_or_else(missing)?;
        // Tables of offsets come before them.
        for _ in 0..8 {
            let mut cursor = Cursor { bytes: self.bytes, at, coding: self.coding };
            let short = |_| format!("truncated: its {PIXEL_DATA} ends too early");
            let head = cursor.head().map_err(short)?;
            let start = cursor.at;
            let wanted = (head.group, head.element) == (PIXEL_DATA.group, PIXEL_DATA.element);
            let value = match head.length {
                Some(length) => cursor.value(length).map_err(|_| {
                    format!(
                        "truncated: its {PIXEL_DATA} has {length} bytes, of which {} are present",
                        self.bytes.len().saturating_sub(start)
                    )
                })?,
                None => {
                    let end = cursor.skip_sequence(0).map_err(|e| match e {
                        Problem::Short => short(e),
                        other => other.into(),
                    })?;
                    &self.bytes[start..end]
                }
            };
            if wanted {
                return Ok(Element {
                    group: head.group,
                    element: head.element,
                    vr: head.vr,
                    value,
                    open: head.length.is_none(),
                    coding: self.coding,
                });
            }
            at = cursor.at;
            if at >= self.bytes.len() {
                break;
            }
        }
        Err(missing())
    }
}

impl<'a> DataSet<'a> {
    /// Elements up to the end of the bytes, the end of an item, or the voxels; also the position of
    /// those.
    fn read(
        cursor: &mut Cursor<'a>,
        depth: usize,
    ) -> Result<(DataSet<'a>, Option<usize>), Problem> {
        let mut elements = vec![];
        while cursor.at < cursor.bytes.len() {
            let before = cursor.at;
            let head = cursor.head()?;
            if head.is(ITEM_END) {
                break;
            }
            // No tag that is used comes after the voxels.
            if head.group >= VOXEL_GROUP && head.group != PARTS && depth == 0 {
                let voxels = (head.group == VOXEL_GROUP).then_some(before);
                return Ok((DataSet { elements }, voxels));
            }
            if head.group == PARTS {
                return Err(head.unexpected("an element"));
            }
            let mut inner = cursor.within(&head);
            let coding = inner.coding;
            let value = match head.length {
                Some(length) => cursor.value(length)?,
                None => {
                    let start = cursor.at;
                    let end = inner.skip_sequence(depth)?;
                    cursor.at = inner.at;
                    &cursor.bytes[start..end]
                }
            };
            let Head { group, element, vr, length } = head;
            elements.push(Element { group, element, vr, value, open: length.is_none(), coding });
            if elements.len() > MOST {
                return Err(Problem::Damaged(format!("has more than {MOST} elements")));
            }
        }
        Ok((DataSet { elements }, None))
    }

    fn get(&self, tag: Tag) -> Option<&Element<'a>> {
        let found = self.elements.iter().find(|e| (e.group, e.element) == (tag.group, tag.element));
        found.filter(|e| !e.value.is_empty())
    }

    /// A text without the blanks around it; none if there is none. Bytes that are not UTF-8 are
    /// read as Latin-1.
    pub fn text(&self, tag: Tag) -> Option<String> {
        let value = self.get(tag)?.value;
        let text = match std::str::from_utf8(value) {
            Ok(text) => text.to_string(),
            Err(_) => value.iter().map(|b| char::from(*b)).collect(),
        };
        let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
        // Characters that a terminal would obey are not passed on.
        let text: String = text.chars().filter(|c| !c.is_control()).take(1024).collect();
        Some(text).filter(|t| !t.is_empty())
    }

    /// The bytes of a value as they are written; none if there are none.
    pub fn raw(&self, tag: Tag) -> Option<&'a [u8]> {
        self.get(tag).map(|element| element.value)
    }

    /// Decimal numbers, however many: the points of contours.
    pub fn decimals(&self, tag: Tag) -> Result<Vec<f64>, String> {
        let Some(value) = self.raw(tag) else { return Ok(vec![]) };
        let is_blank = |b: u8| b.is_ascii_whitespace() || b == 0;
        let parts = || value.split(|b| *b == b'\\');
        let mut numbers = memory::list(NUMBERS, parts().count());
        for part in parts() {
            let start = part.iter().take_while(|b| is_blank(**b)).count();
            let end = part.iter().rev().take_while(|b| is_blank(**b)).count();
            let text = part.get(start..part.len() - end).unwrap_or_default();
            let number = std::str::from_utf8(text).ok().and_then(|t| t.parse::<f64>().ok());
            numbers.push(number.filter(|n| n.is_finite()).ok_or_else(|| {
                let some = &text[..text.len().min(32)];
                format!("its {tag} holds '{}', expected numbers", some.escape_ascii())
            })?);
        }
        Ok(numbers)
    }

    /// Numbers in any encoding; none if there are none.
    pub fn numbers(&self, tag: Tag) -> Result<Option<Vec<f64>>, String> {
        let Some(element) = self.get(tag) else { return Ok(None) };
        let (value, coding) = (element.value, element.coding);
        let known = [b"DS", b"IS", b"US", b"SS", b"UL", b"SL", b"FL", b"FD"];
        let vr = if known.contains(&&element.vr) { element.vr } else { tag.vr };
        let words = |of: fn(u16) -> f64| -> Vec<f64> {
            value.chunks_exact(2).take(MOST).map(|b| of(coding.u16([b[0], b[1]]))).collect()
        };
        let longs = |of: fn(u32) -> f64| -> Vec<f64> {
            let one = |b: &[u8]| of(coding.u32([b[0], b[1], b[2], b[3]]));
            value.chunks_exact(4).take(MOST).map(one).collect()
        };
        let numbers = match &vr {
            b"US" => words(f64::from),
            b"SS" => words(|v| f64::from(v as i16)),
            b"UL" => longs(f64::from),
            b"SL" => longs(|v| f64::from(v as i32)),
            b"FL" => longs(|v| f64::from(f32::from_bits(v))),
            b"FD" => {
                let one = |b: &[u8]| {
                    let bytes = std::array::from_fn(|at| b[at]);
                    f64::from_bits(coding.u64(bytes))
                };
                value.chunks_exact(8).take(MOST).map(one).collect()
            }
            _ => {
                let Some(text) = self.text(tag) else { return Ok(None) };
                let parts: Option<Vec<f64>> =
                    text.split('\\').map(|n| n.trim().parse().ok()).collect();
                parts.ok_or_else(|| format!("its {tag} is '{text}', expected numbers"))?
            }
        };
        match numbers.iter().all(|n| n.is_finite()) && !numbers.is_empty() {
            true => Ok(Some(numbers)),
            false => {
                let some = &numbers[..numbers.len().min(8)];
                Err(format!("its {tag} is {some:?}, expected finite numbers"))
            }
        }
    }

    /// `N` numbers; none if there are none.
    pub fn vector<const N: usize>(&self, tag: Tag) -> Result<Option<[f64; N]>, String> {
        let Some(numbers) = self.numbers(tag)? else { return Ok(None) };
        match <[f64; N]>::try_from(numbers.as_slice()) {
            Ok(vector) => Ok(Some(vector)),
            Err(_) => Err(format!("its {tag} has {} numbers, expected {N}", numbers.len())),
        }
    }

    /// A number, the first of several; none if there is none.
    pub fn number(&self, tag: Tag) -> Result<Option<f64>, String> {
        Ok(self.numbers(tag)?.map(|n| n[0]))
    }

    /// A whole number from 0 on; none if there is none.
    pub fn whole(&self, tag: Tag) -> Result<Option<usize>, String> {
        match self.number(tag)? {
            None => Ok(None),
            Some(n) if n >= 0.0 && n <= f64::from(u32::MAX) && n.fract() == 0.0 => {
                Ok(Some(n as usize))
            }
            Some(n) => Err(format!("its {tag} is {n}, expected a whole number, 0 or more")),
        }
    }

    /// The items of a sequence; none if there is none.
    pub fn items(&self, tag: Tag) -> Result<Vec<DataSet<'a>>, String> {
        self.first_items(tag, usize::MAX)
    }

    /// At most `most` items of a sequence; those after them are ignored.
    fn first_items(&self, tag: Tag, most: usize) -> Result<Vec<DataSet<'a>>, String> {
        let Some(element) = self.get(tag) else { return Ok(vec![]) };
        let mut cursor = Cursor { bytes: element.value, at: 0, coding: element.coding };
        let mut items = vec![];
        while items.len() < most && cursor.at < cursor.bytes.len() {
            let damaged = |e: Problem| format!("its {tag}: {}", String::from(e));
            let head = cursor.head().map_err(damaged)?;
            if head.is(SEQUENCE_END) {
                break;
            }
            if !head.is(ITEM) {
                return Err(damaged(head.unexpected("an item")));
            }
            let item = match head.length {
                Some(length) => {
                    let bytes = cursor.value(length).map_err(damaged)?;
                    let mut inner = Cursor { bytes, at: 0, coding: cursor.coding };
                    DataSet::read(&mut inner, 1)
                }
                None => DataSet::read(&mut cursor, 1),
            };
            items.push(item.map_err(damaged)?.0);
            if items.len() > MOST {
                return Err(format!("its {tag} has more than {MOST} items"));
            }
        }
        Ok(items)
    }

    /// The first item of a sequence.
    pub fn item(&self, tag: Tag) -> Result<Option<DataSet<'a>>, String> {
        Ok(self.first_items(tag, 1)?.into_iter().next())
    }
}

/// The fragments of packed voxels, without the table of offsets before them.
pub fn fragments<'a>(voxels: &Element<'a>) -> Result<Vec<&'a [u8]>, String> {
    let mut cursor = Cursor { bytes: voxels.value, at: 0, coding: Coding::EXPLICIT };
    let mut found = vec![];
    while cursor.at < cursor.bytes.len() {
        let damaged = |e: Problem| format!("its {PIXEL_DATA}: {}", String::from(e));
        let head = cursor.head().map_err(damaged)?;
        let length = head
            .length
            .filter(|_| head.is(ITEM))
            .ok_or_else(|| damaged(head.unexpected("a fragment")))?;
        found.push(cursor.value(length).map_err(damaged)?);
        if found.len() > 2 * MOST {
            return Err(format!("its {PIXEL_DATA} has more than {} fragments", 2 * MOST));
        }
    }
    if found.is_empty() {
        return Err(format!("its {PIXEL_DATA} has no fragment"));
    }
    found.remove(0);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn element(group: u16, element: u16, vr: &[u8; 2], value: &[u8]) -> Vec<u8> {
        let mut out = [group.to_le_bytes(), element.to_le_bytes()].concat();
        out.extend(vr);
        out.extend((value.len() as u16).to_le_bytes());
        out.extend(value);
        out
    }

    #[test]
    fn what_is_inflated_has_its_limit() {
        let set = element(8, 0x60, b"CS", b"CT").repeat(1000);
        let mut packed = flate2::write::DeflateEncoder::new(vec![], flate2::Compression::best());
        std::io::Write::write_all(&mut packed, &set).unwrap();
        let file =
            [element(2, 0x10, b"UI", DEFLATED.as_bytes()), packed.finish().unwrap()].concat();
        assert!(file.len() < 200 && set.len() == 10_000);
        let (bytes, start, _) = data_set(&file, true, 10_000).unwrap();
        assert!(start == 0 && bytes[..] == set[..]);
        assert_eq!(data_set(&file, true, 9_999).err(), Some(Problem::Large));
    }

    #[test]
    fn sequences_that_lie_too_deep_are_refused() {
        let mut bytes = vec![];
        for _ in 0..100_000 {
            bytes.extend(b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff");
        }
        let error = Opened::new(&bytes, 0, "1.2.840.10008.1.2.1").unwrap_err();
        assert!(
            matches!(&error, Problem::Damaged(m) if m.contains("nested deeper than 24")),
            "{error:?}"
        );
    }

    #[test]
    fn values_are_read_as_their_representation_says() {
        let bytes = [
            element(0x18, 0x50, b"DS", b"2.5 "),
            element(0x28, 0x10, b"US", &[2, 1]),
            element(0x28, 0x30, b"DS", b"0.5\\0.75"),
            element(0x28, 0x1052, b"DS", b"ten "),
        ]
        .concat();
        let opened = Opened::new(&bytes, 0, "1.2.840.10008.1.2.1").unwrap();
        let tags = &opened.tags;
        assert_eq!(tags.number(SLICE_THICKNESS), Ok(Some(2.5)));
        assert_eq!(tags.whole(ROWS), Ok(Some(258)));
        assert_eq!(tags.vector(PIXEL_SPACING), Ok(Some([0.5, 0.75])));
        assert_eq!(tags.number(SLOPE), Ok(None));
        let error = tags.number(INTERCEPT).unwrap_err();
        assert_eq!(error, "its RescaleIntercept (0028,1052) is 'ten', expected numbers");
        assert!(tags.vector::<3>(PIXEL_SPACING).unwrap_err().contains("2 numbers, expected 3"));
        assert!(!opened.has_voxels());
        assert_eq!(tags.raw(SLICE_THICKNESS), Some(&b"2.5 "[..]));
        assert_eq!(tags.decimals(PIXEL_SPACING), Ok(vec![0.5, 0.75]));
        assert_eq!(tags.decimals(POSITION), Ok(vec![]));
        assert!(tags.decimals(INTERCEPT).unwrap_err().contains("holds 'ten', expected numbers"));
    }

    #[test]
    fn every_truncation_of_a_data_set_is_told() {
        let bytes = [
            element(0x08, 0x60, b"CS", b"CT"),
            b"\x18\x00\x00\x90SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff".to_vec(),
            element(0x28, 0x10, b"US", &[2, 1]),
            b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0".to_vec(),
        ]
        .concat();
        for end in 11..bytes.len() {
            let read = Opened::new(&bytes[..end], 0, "1.2.840.10008.1.2.1");
            assert_eq!(read.err(), Some(Problem::Short), "{end}");
        }
        assert!(Opened::new(&bytes, 0, "1.2.840.10008.1.2.1").is_ok());
    }
}
