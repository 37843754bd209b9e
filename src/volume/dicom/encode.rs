//! Writing data sets: explicit, the lowest byte first (PS3.5, 7.1.2).

use super::tags::Tag;
use crate::memory;

/// How messages name the memory that a file's tags take.
const TAGS: &str = "a file's tags";

/// The tag of an item of a sequence.
const ITEM: [u8; 4] = [0xfe, 0xff, 0x00, 0xe0];

/// Elements in the order of their tags, as bytes.
pub struct Encoder {
    pub bytes: Vec<u8>,
    /// The previous tag, which must be lower than the next.
    last: (u16, u16),
}

impl Encoder {
    /// An encoder with room for `room` bytes.
    pub fn new(room: usize) -> Encoder {
        Encoder { bytes: memory::list(TAGS, room), last: (0, 0) }
    }

    /// Writes the head of an element; returns the position of its length.
    fn head(&mut self, tag: Tag) -> usize {
        let now = (tag.group, tag.element);
        debug_assert!(now > self.last, "{tag} is written behind {:04x?}", self.last);
        self.last = now;
        self.bytes.extend(tag.group.to_le_bytes());
        self.bytes.extend(tag.element.to_le_bytes());
        self.bytes.extend(tag.vr);
        if is_long(tag) {
            self.bytes.extend([0; 2]);
        }
        self.bytes.len()
    }

    /// An element; a value of an odd length is padded as its kind requires.
    pub fn put(&mut self, tag: Tag, value: &[u8]) {
        let odd = value.len() % 2;
        self.announced(tag, value.len() + odd);
        self.bytes.extend(value);
        let filler = if matches!(&tag.vr, b"UI" | b"OB") { 0 } else { b' ' };
        self.bytes.extend([filler].iter().take(odd));
    }

    /// The head of an element whose value is written elsewhere, of an even length.
    pub fn announced(&mut self, tag: Tag, length: usize) {
        self.head(tag);
        match is_long(tag) {
            true => self.bytes.extend((length as u32).to_le_bytes()),
            false => {
                debug_assert!(length <= usize::from(u16::MAX), "{length} bytes of {tag}");
                self.bytes.extend((length as u16).to_le_bytes())
            }
        }
    }

    /// A text.
    pub fn text(&mut self, tag: Tag, value: &str) {
        self.put(tag, value.as_bytes());
    }

    /// Whole numbers of 16 bits.
    pub fn shorts(&mut self, tag: Tag, values: &[u16]) {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.put(tag, &bytes);
    }

    /// Whole numbers of 32 bits.
    pub fn longs(&mut self, tag: Tag, values: &[u32]) {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.put(tag, &bytes);
    }

    /// Numbers as text.
    pub fn decimals(&mut self, tag: Tag, values: &[f64]) {
        let list: Vec<String> = values.iter().map(|v| decimal(*v)).collect();
        self.text(tag, &list.join("\\"));
    }

    /// The tag of an element.
    pub fn pointer(&mut self, tag: Tag, to: Tag) {
        self.shorts(tag, &[to.group, to.element]);
    }

    /// A sequence, whose items `fill` writes.
    pub fn sequence(&mut self, tag: Tag, fill: impl FnOnce(&mut Encoder)) {
        let at = self.head(tag);
        self.measured(at, fill);
    }

    /// An item of a sequence.
    pub fn item(&mut self, fill: impl FnOnce(&mut Encoder)) {
        self.bytes.extend(ITEM);
        let at = self.bytes.len();
        self.measured(at, fill);
    }

    /// A sequence with one item.
    pub fn one(&mut self, tag: Tag, fill: impl FnOnce(&mut Encoder)) {
        self.sequence(tag, |e| e.item(fill));
    }

    /// Writes what `fill` writes, and its length at `at`.
    fn measured(&mut self, at: usize, fill: impl FnOnce(&mut Encoder)) {
        let outer = std::mem::take(&mut self.last);
        self.bytes.extend([0; 4]);
        fill(self);
        let length = (self.bytes.len() - at - 4) as u32;
        self.bytes[at..at + 4].copy_from_slice(&length.to_le_bytes());
        self.last = outer;
    }
}

/// Whether the length of values with this tag takes 32 bits.
fn is_long(tag: Tag) -> bool {
    matches!(&tag.vr, b"OB" | b"OW" | b"SQ" | b"UT" | b"UN")
}

/// A number in the sixteen characters that a decimal text may have, as precisely as they allow.
pub fn decimal(v: f64) -> String {
    const MOST: usize = 16;
    // Adding 0 turns -0 into 0.
    let v = v + 0.0;
    let plain = v.to_string();
    if plain.len() <= MOST {
        return plain;
    }
    let fits = |text: &String| text.len() <= MOST;
    let fixed = (0..MOST).rev().map(|digits| format!("{v:.digits$}")).find(fits);
    let powers = (0..MOST).rev().map(|digits| format!("{v:.digits$e}")).find(fits);
    let off = |text: &String| text.parse().map_or(f64::INFINITY, |read: f64| (read - v).abs());
    let mut both: Vec<String> = fixed.into_iter().chain(powers).collect();
    both.sort_by(|a, b| off(a).total_cmp(&off(b)));
    both.into_iter().next().unwrap_or_else(|| "0".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::dicom::tags::{self, Opened};

    #[test]
    fn decimals_have_sixteen_characters_at_most() {
        for (v, text) in [
            (0.0, "0"),
            (-0.0, "0"),
            (2.5, "2.5"),
            (-272.95, "-272.95"),
            (1.0 / 3.0, "0.33333333333333"),
            (-1.0 / 3.0, "-0.3333333333333"),
            (1e-7 / 3.0, "3.3333333333e-8"),
            (1e300, "1e300"),
        ] {
            let written = decimal(v);
            assert!(written.len() <= 16, "{written}");
            let expected: f64 = text.parse().unwrap();
            let read: f64 = written.parse().unwrap();
            assert!((read - expected).abs() <= 1e-9 * expected.abs(), "{v}: {written}");
        }
        assert_eq!(
            (decimal(-0.0), decimal(3.26999999999998)),
            ("0".into(), "3.26999999999998".into())
        );
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut e = Encoder::new(64);
        e.text(tags::MODALITY, "SEG");
        e.one(tags::SHARED_GROUPS, |e| {
            e.one(tags::PIXEL_MEASURES, |e| e.decimals(tags::PIXEL_SPACING, &[0.5, 0.75]));
        });
        e.sequence(tags::FRAME_GROUPS, |e| {
            for frame in [3, 70_000] {
                e.item(|e| e.longs(tags::INDEX_VALUES, &[1, frame]));
            }
        });
        let opened = Opened::new(&e.bytes, 0, "1.2.840.10008.1.2.1").unwrap();
        let tags = &opened.tags;
        assert_eq!(tags.text(tags::MODALITY).as_deref(), Some("SEG"));
        let shared = tags.item(tags::SHARED_GROUPS).unwrap().unwrap();
        let measures = shared.item(tags::PIXEL_MEASURES).unwrap().unwrap();
        assert_eq!(measures.vector(tags::PIXEL_SPACING), Ok(Some([0.5, 0.75])));
        let frames = tags.items(tags::FRAME_GROUPS).unwrap();
        let values = |n: usize| frames[n].vector::<2>(tags::INDEX_VALUES).unwrap().unwrap();
        assert_eq!((frames.len(), values(0), values(1)), (2, [1.0, 3.0], [1.0, 70_000.0]));
    }
}
