//! What an interaction changed, as bytes: a caller that keeps those of each interaction can restore
//! a session to where it was, its history included, without asking the network again.
//!
//! The bytes describe the difference from the state before: which tiles of the answer differ, which
//! prompts were given, where the network looked. What the network showed on its last patch (logits
//! and candidates) exists only in memory; a session that steers does not need it again.

use super::field::{Field, Logits, TILE, Tile};
use super::{Note, Prediction, Said, Session, State};
use crate::memory::{self, Charged};
use crate::tensor::Tensor;
use crate::volume::patch::Patch;
use crate::volume::{Affine, Grid};
use std::sync::Arc;

/// How messages name the memory that kept bytes take.
const KEPT: &str = "the stored state of a session";

/// The message for bytes that were not written by this module.
const ODD: &str = "the stored state of a session has an unknown format";

/// Bytes that are being written. Memory for them may be refused, as anywhere.
#[derive(Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// The bytes written so far.
    pub fn all(&self) -> &[u8] {
        &self.0
    }

    /// Bytes without a length.
    pub fn bytes(&mut self, bytes: &[u8]) {
        if self.0.capacity() - self.0.len() < bytes.len() {
            let more = bytes.len().max(self.0.len());
            let mut larger = memory::list(KEPT, self.0.len() + more);
            larger.extend_from_slice(&self.0);
            self.0 = larger;
        }
        self.0.extend_from_slice(bytes);
    }

    /// A byte.
    pub fn byte(&mut self, value: u8) {
        self.bytes(&[value]);
    }

    /// A boolean.
    pub fn flag(&mut self, value: bool) {
        self.byte(u8::from(value));
    }

    /// A number.
    pub fn number(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    /// A size or an index.
    pub fn size(&mut self, value: usize) {
        self.number(value as u64);
    }

    /// A real number, bit by bit.
    fn real(&mut self, value: f64) {
        self.number(value.to_bits());
    }

    /// A text, after its length.
    pub fn text(&mut self, text: &str) {
        self.size(text.len());
        self.bytes(text.as_bytes());
    }

    /// A voxel.
    pub fn voxel(&mut self, voxel: [usize; 3]) {
        // No axis is longer than 32 bits can hold.
        voxel.iter().for_each(|v| self.bytes(&(*v as u32).to_le_bytes()));
    }

    /// A box, or none.
    pub fn bounds(&mut self, bounds: Option<[usize; 6]>) {
        self.flag(bounds.is_some());
        bounds.iter().flatten().for_each(|face| self.size(*face));
    }

    fn affine(&mut self, affine: &Affine) {
        affine.0.iter().flatten().for_each(|value| self.real(*value));
    }

    fn grid(&mut self, grid: &Grid) {
        grid.size.iter().for_each(|n| self.size(*n));
        self.affine(&grid.affine);
    }

    fn patch(&mut self, patch: &Patch) {
        let Patch { grid, spacing, coarsened, from_image, scan } = patch;
        self.grid(grid);
        self.real(*spacing);
        self.flag(*coarsened);
        self.affine(from_image);
        self.grid(scan);
    }

    /// A tile, shorter if it has no more than two values, as that of a mask.
    fn tile(&mut self, tile: &Logits) {
        let first = tile[0];
        let other = tile.iter().find(|v| v.to_bits() != first.to_bits()).copied();
        let Some(other) = other else {
            self.byte(1);
            return self.bytes(&first.to_le_bytes());
        };
        if tile.iter().all(|v| v.to_bits() == first.to_bits() || v.to_bits() == other.to_bits()) {
            self.byte(2);
            self.bytes(&first.to_le_bytes());
            self.bytes(&other.to_le_bytes());
            let is_other = |v: &f32| v.to_bits() == other.to_bits();
            return self.bits(tile.iter().map(is_other));
        }
        self.byte(3);
        for values in tile.chunks(64) {
            let mut bytes = [0; 256];
            for (to, value) in bytes.chunks_exact_mut(4).zip(values) {
                to.copy_from_slice(&value.to_le_bytes());
            }
            self.bytes(&bytes);
        }
    }

    /// One bit for each item, the first in the lowest bit of the first byte.
    fn bits(&mut self, bits: impl Iterator<Item = bool>) {
        let (mut byte, mut count) = (0u8, 0);
        for bit in bits {
            byte |= u8::from(bit) << count;
            count += 1;
            if count == 8 {
                self.byte(byte);
                (byte, count) = (0, 0);
            }
        }
        if count > 0 {
            self.byte(byte);
        }
    }

    fn said(&mut self, said: &[Said]) {
        self.size(said.len());
        for Said { voxel, positive } in said {
            self.voxel(*voxel);
            self.flag(*positive);
        }
    }

    fn note(&mut self, note: &Note) {
        let (kind, count) = match note {
            Note::OnlyDenied => (0, 0),
            Note::Agreed => (1, 0),
            Note::EmptyMask => (2, 0),
            Note::FlatBox => (3, 0),
            Note::ClippedBox => (4, 0),
            Note::HardlySeen => (5, 0),
            Note::InOtherObject(count) => (6, *count),
            Note::LookedFurther => (7, 0),
            Note::NotLookedAt(count) => (8, *count),
        };
        self.byte(kind);
        self.size(count);
    }
}

/// A reader of the bytes.
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// A reader of all the bytes that one [`Writer`] made.
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader(bytes)
    }

    /// `count` bytes.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(ODD)?;
        self.0 = rest;
        Ok(taken)
    }

    fn few<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let taken = self.bytes(N)?;
        Ok(std::array::from_fn(|at| taken[at]))
    }

    /// A byte.
    pub fn byte(&mut self) -> Result<u8, String> {
        Ok(self.few::<1>()?[0])
    }

    /// A boolean.
    pub fn flag(&mut self) -> Result<bool, String> {
        match self.byte()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(ODD.into()),
        }
    }

    /// A number.
    pub fn number(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.few()?))
    }

    /// A size or an index.
    pub fn size(&mut self) -> Result<usize, String> {
        usize::try_from(self.number()?).map_err(|_| ODD.into())
    }

    /// The number of items that follow, each of at least `each` bytes.
    pub fn count(&mut self, each: usize) -> Result<usize, String> {
        let count = self.size()?;
        let fits = count.checked_mul(each).is_some_and(|bytes| bytes <= self.0.len());
        if fits { Ok(count) } else { Err(ODD.into()) }
    }

    fn real(&mut self) -> Result<f64, String> {
        Ok(f64::from_bits(self.number()?))
    }

    fn single(&mut self) -> Result<f32, String> {
        Ok(f32::from_le_bytes(self.few()?))
    }

    /// A text.
    pub fn text(&mut self) -> Result<String, String> {
        let length = self.count(1)?;
        String::from_utf8(self.bytes(length)?.to_vec()).map_err(|_| ODD.into())
    }

    /// A voxel of a grid of the given size.
    pub fn voxel(&mut self, size: [usize; 3]) -> Result<[usize; 3], String> {
        let mut voxel = [0; 3];
        for v in &mut voxel {
            *v = u32::from_le_bytes(self.few()?) as usize;
        }
        if (0..3).all(|a| voxel[a] < size[a]) { Ok(voxel) } else { Err(ODD.into()) }
    }

    /// A box on a grid of the given size, or none.
    pub fn bounds(&mut self, size: [usize; 3]) -> Result<Option<[usize; 6]>, String> {
        if !self.flag()? {
            return Ok(None);
        }
        let mut b = [0; 6];
        for face in &mut b {
            *face = self.size()?;
        }
        let lies = (0..3).all(|a| b[a] < b[a + 3] && b[a + 3] <= size[a]);
        if lies { Ok(Some(b)) } else { Err(ODD.into()) }
    }

    fn affine(&mut self) -> Result<Affine, String> {
        let mut rows = [[0.0; 4]; 3];
        for value in rows.iter_mut().flatten() {
            *value = self.real()?;
        }
        Ok(Affine(rows))
    }

    fn grid(&mut self) -> Result<Grid, String> {
        let size = [self.size()?, self.size()?, self.size()?];
        Ok(Grid { size, affine: self.affine()? })
    }

    fn patch(&mut self) -> Result<Patch, String> {
        Ok(Patch {
            grid: self.grid()?,
            spacing: self.real()?,
            coarsened: self.flag()?,
            from_image: self.affine()?,
            scan: self.grid()?,
        })
    }

    /// A tile; none for one that is gone.
    fn tile(&mut self) -> Result<Option<Arc<Tile>>, String> {
        let mut tile = [0.0; TILE];
        match self.byte()? {
            0 => return Ok(None),
            1 => tile.fill(self.single()?),
            2 => {
                let values = [self.single()?, self.single()?];
                let bits = self.bytes(TILE / 8)?;
                for (at, value) in tile.iter_mut().enumerate() {
                    *value = values[usize::from(bits[at / 8] >> (at % 8) & 1)];
                }
            }
            3 => {
                let bytes = self.bytes(4 * TILE)?;
                for (value, from) in tile.iter_mut().zip(bytes.chunks_exact(4)) {
                    *value = f32::from_le_bytes([from[0], from[1], from[2], from[3]]);
                }
            }
            _ => return Err(ODD.into()),
        }
        Ok(Some(Tile::new(tile)))
    }

    fn note(&mut self) -> Result<Note, String> {
        let (kind, count) = (self.byte()?, self.size()?);
        Ok(match kind {
            0 => Note::OnlyDenied,
            1 => Note::Agreed,
            2 => Note::EmptyMask,
            3 => Note::FlatBox,
            4 => Note::ClippedBox,
            5 => Note::HardlySeen,
            6 => Note::InOtherObject(count),
            7 => Note::LookedFurther,
            8 => Note::NotLookedAt(count),
            _ => return Err(ODD.into()),
        })
    }
}

/// The number of leading elements that two lists have in common.
fn common<T>(a: &[T], b: &[T], same: impl Fn(&T, &T) -> bool) -> usize {
    a.iter().zip(b).take_while(|(a, b)| same(a, b)).count()
}

/// Writes the difference of a state from another.
fn tell(state: &State, before: &State, out: &mut Writer) {
    let kept = common(&before.said, &state.said, |a, b| a == b);
    out.size(kept);
    out.said(&state.said[kept..]);
    out.bounds(state.bounds);
    out.flag(state.drawn);
    match (&state.others, &before.others) {
        (None, _) => out.byte(0),
        (Some(a), Some(b)) if Arc::ptr_eq(a, b) => out.byte(1),
        (Some(others), _) => {
            out.byte(2);
            out.bits(others.iter().map(|v| *v != 0));
        }
    }
    let kept = common(&before.looked, &state.looked, |a, b| a.grid == b.grid);
    out.size(kept);
    out.size(state.looked.len() - kept);
    state.looked[kept..].iter().for_each(|patch| out.patch(patch));
    out.flag(state.prediction.is_some());
    let Some(prediction) = &state.prediction else { return };
    let field = &prediction.field;
    let old = before.prediction.as_ref().map(|p| &p.field);
    let old = old.filter(|old| old.is_sparse() == field.is_sparse());
    out.flag(field.is_sparse());
    out.flag(old.is_some());
    let nothing = Field::new(field.size(), true);
    let old = old.unwrap_or(&nothing);
    let mut count = 0;
    field.differing(old, |_, _| count += 1);
    out.size(count);
    field.differing(old, |key, tile| {
        key.iter().for_each(|k| out.bytes(&k.to_le_bytes()));
        match tile {
            Some(tile) => out.tile(tile),
            None => out.byte(0),
        }
    });
    out.patch(&prediction.patch);
    out.flag(prediction.score.is_some());
    prediction.score.iter().for_each(|score| out.bytes(&score.to_le_bytes()));
    let Prediction { looks, changed, left_out, thinned, notes, .. } = &**prediction;
    [looks, changed, left_out, thinned].into_iter().for_each(|count| out.size(*count));
    out.size(notes.len());
    notes.iter().for_each(|note| out.note(note));
}

/// Bytes of a patch, of a click, and the fewest of a tile.
const PATCH: usize = 2 * (24 + 96) + 96 + 8 + 1;
const WORD: usize = 13;
const LEAST_TILE: usize = 13;

/// The state that bytes describe, given the one before it, on a grid of the given size.
fn told(before: &State, size: [usize; 3], from: &mut Reader) -> Result<State, String> {
    let first = |kept: usize, all: usize| if kept <= all { Ok(kept) } else { Err(ODD) };
    let kept = first(from.size()?, before.said.len())?;
    let more = from.count(WORD)?;
    let mut said = memory::list(KEPT, kept + more);
    said.extend_from_slice(&before.said[..kept]);
    for _ in 0..more {
        said.push(Said { voxel: from.voxel(size)?, positive: from.flag()? });
    }
    let bounds = from.bounds(size)?;
    let drawn = from.flag()?;
    let others = match from.byte()? {
        0 => None,
        1 => before.others.clone(),
        2 => {
            let voxels: usize = size.iter().product();
            let bits = from.bytes(voxels.div_ceil(8))?;
            let marks = (0..voxels).map(|at| bits[at / 8] >> (at % 8) & 1);
            Some(Arc::new(Charged::new(KEPT, memory::collected(KEPT, marks))))
        }
        _ => return Err(ODD.into()),
    };
    let kept = first(from.size()?, before.looked.len())?;
    let more = from.count(PATCH)?;
    let mut looked = before.looked[..kept].to_vec();
    for _ in 0..more {
        looked.push(from.patch()?);
    }
    let mut state = State {
        said: Arc::new(Charged::new(KEPT, said)),
        bounds,
        others,
        drawn,
        looked: Arc::new(looked),
        prediction: None,
        replaced: 0,
    };
    if !from.flag()? {
        return Ok(state);
    }
    let sparse = from.flag()?;
    let mut field = match (from.flag()?, &before.prediction) {
        (true, Some(old)) => old.field.clone(),
        (true, None) => return Err(ODD.into()),
        (false, _) => Field::new(size, sparse),
    };
    for _ in 0..from.count(LEAST_TILE)? {
        let mut key = [0; 3];
        for k in &mut key {
            *k = u32::from_le_bytes(from.few()?);
        }
        if !field.put(key, from.tile()?) {
            return Err(ODD.into());
        }
    }
    let patch = from.patch()?;
    let score = if from.flag()? { Some(from.single()?) } else { None };
    let (looks, changed) = (from.size()?, from.size()?);
    let (left_out, thinned) = (from.size()?, from.size()?);
    let mut notes = vec![];
    for _ in 0..from.count(9)? {
        notes.push(from.note()?);
    }
    let logits = Tensor::new([0; 3], vec![]);
    let rest = Prediction::unasked(field, logits, patch, 0);
    let prediction = Prediction { score, looks, changed, left_out, thinned, notes, ..rest };
    state.prediction = Some(Arc::new(prediction));
    Ok(state)
}

/// The state of a session, to return to. It shares the session's memory.
pub struct Saved {
    states: Vec<State>,
    now: usize,
    place: Option<Patch>,
}

impl Session {
    /// The present state, to return to.
    pub(crate) fn saved(&self) -> Saved {
        Saved { states: self.states.clone(), now: self.now, place: self.place.clone() }
    }

    /// Returns to a saved state.
    pub(crate) fn restore(&mut self, saved: Saved) {
        let Saved { states, now, place } = saved;
        (self.states, self.now, self.place) = (states, now, place);
    }

    /// Writes what the single interaction between a saved state and now changed. Memory may be
    /// refused, which unwinds.
    pub(crate) fn tell(&self, before: &Saved, out: &mut Writer) {
        // What can be undone now: the rest was forgotten.
        out.size(self.now);
        tell(&self.states[self.now], &before.states[before.now], out);
    }

    /// Repeats what [`Session::tell`] wrote, if the session is as it was then.
    ///
    /// # Errors
    /// The bytes were not written by this module, or do not fit the session: it stays as it was.
    pub(crate) fn follow(&mut self, from: &mut Reader) -> Result<(), String> {
        let depth = from.size()?;
        if self.scan.options().released || depth == 0 || depth > self.now + 1 {
            return Err(ODD.into());
        }
        let before = &self.states[self.now];
        let mut next = told(before, self.scan.grid().size, from)?;
        next.replaced = before.bytes_beyond(&next);
        self.states.truncate(self.now + 1);
        self.states.push(next);
        self.now += 1;
        self.states.drain(..self.now - depth);
        self.now = depth;
        Ok(())
    }

    /// Writes the first state that it can return to, which may not be the empty one.
    pub(crate) fn tell_first(&self, out: &mut Writer) {
        tell(&self.states[0], &State::default(), out);
    }

    /// Begins with the state that [`Session::tell_first`] wrote.
    ///
    /// # Errors
    /// As [`Session::follow`].
    pub(crate) fn follow_first(&mut self, from: &mut Reader) -> Result<(), String> {
        if self.scan.options().released {
            return Err(ODD.into());
        }
        let first = told(&State::default(), self.scan.grid().size, from)?;
        (self.states, self.now) = (vec![first], 0);
        Ok(())
    }

    /// Writes its n-th step from there, from 1, of those that can be undone and redone, so that
    /// [`Session::follow`] repeats it.
    pub(crate) fn tell_step(&self, n: usize, out: &mut Writer) {
        out.size(n);
        tell(&self.states[n], &self.states[n - 1], out);
    }

    /// Forgets where the network looked when the network was replaced by one that sees patches of
    /// another size. Prompts and answers stay.
    pub(crate) fn look_anew(&mut self) {
        let edge = self.scan.model().config().patch;
        for state in &mut self.states {
            if state.looked.iter().any(|patch| patch.grid.size != [edge; 3]) {
                state.looked = Arc::default();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two states, the second of which differs in everything that is kept.
    fn states() -> (State, State) {
        let grid =
            |n: usize| Grid { size: [n; 3], affine: Affine::from_spacing([0.1 * n as f64; 3]) };
        let patch = |n: usize| Patch {
            grid: grid(n),
            spacing: 0.3,
            coarsened: n > 3,
            from_image: Affine::from_spacing([1.0 / 3.0; 3]),
            scan: grid(n + 1),
        };
        let place = |v: &[usize; 3]| Said { voxel: *v, positive: v[0] > 1 };
        let of = |field: Field, said: &[[usize; 3]], looked: usize| State {
            said: Arc::new(Charged::new(KEPT, said.iter().map(place).collect())),
            bounds: Some([1, 2, 3, 4, 5, 6]),
            others: None,
            drawn: looked > 2,
            looked: Arc::new((0..looked).map(patch).collect()),
            prediction: Some(Arc::new(Prediction {
                score: Some(0.1 + looked as f32),
                looks: looked,
                changed: 7,
                notes: vec![Note::Agreed, Note::NotLookedAt(5)],
                ..Prediction::unasked(field, Tensor::new([0; 3], vec![]), patch(3), 0)
            })),
            replaced: 0,
        };
        let mut field = Field::new([40, 17, 33], true);
        field.edit(&[3..40, 2..5, 10..30], |[i, j, k], _| (i + j + k) as f32 / 3.0);
        let mut more = field.clone();
        // A tile that is removed, one of two values, one of many.
        more.edit(&[32..40, 0..16, 0..33], |_, _| -9.0);
        more.edit(&[0..16, 0..16, 16..32], |[i, ..], _| if i % 3 == 0 { 8.0 } else { -8.0 });
        more.set([20, 16, 32], 0.7);
        let first = of(field, &[[1, 2, 3], [4, 5, 6]], 2);
        let mut second = of(more, &[[1, 2, 3], [7, 8, 9], [2, 2, 2]], 3);
        let others = (0..40 * 17 * 33).map(|at| u8::from(at % 7 == 0)).collect();
        second.others = Some(Arc::new(Charged::new(KEPT, others)));
        (first, second)
    }

    fn same(a: &State, b: &State) {
        assert_eq!((&a.said[..], a.bounds, a.drawn), (&b.said[..], b.bounds, b.drawn));
        let others = |s: &State| s.others.as_ref().map(|others| others.to_vec());
        assert_eq!(others(a), others(b));
        let places = |s: &State| format!("{:?}", s.looked);
        assert_eq!(places(a), places(b));
        let (a, b) = (a.prediction.as_ref().unwrap(), b.prediction.as_ref().unwrap());
        let bits = |p: &Prediction| p.field.dense(0, |v| v.to_bits());
        assert!(bits(a) == bits(b) && a.field.bytes() == b.field.bytes());
        assert_eq!((a.score, a.looks, a.changed), (b.score, b.looks, b.changed));
        assert_eq!((&a.notes, format!("{:?}", a.patch)), (&b.notes, format!("{:?}", b.patch)));
    }

    #[test]
    fn what_is_told_is_followed_to_the_bit() {
        let (first, second) = states();
        let size = [40, 17, 33];
        for (before, after) in [
            (&State::default(), &first),
            (&first, &second),
            (&second, &first),
            (&State::default(), &second),
            (&second, &second),
        ] {
            let mut out = Writer::default();
            tell(after, before, &mut out);
            let mut from = Reader::new(out.all());
            let back = told(before, size, &mut from).unwrap();
            same(&back, after);
            assert!(from.0.is_empty());
            // Unchanged parts are shared, also in what was kept.
            if std::ptr::eq(before, after) {
                assert!(out.all().len() < 1000);
            }
        }
    }

    #[test]
    fn bytes_that_break_off_or_do_not_fit_are_refused() {
        let (first, second) = states();
        let mut out = Writer::default();
        tell(&second, &first, &mut out);
        for cut in (0..out.all().len()).step_by(7) {
            assert!(told(&first, [40, 17, 33], &mut Reader::new(&out.all()[..cut])).is_err());
        }
        // For a smaller scan, and after another state.
        assert!(told(&first, [9, 9, 9], &mut Reader::new(out.all())).is_err());
        assert!(told(&State::default(), [40, 17, 33], &mut Reader::new(out.all())).is_err());
        for at in 0..out.all().len().min(400) {
            let mut odd = out.all().to_vec();
            odd[at] ^= 0x80;
            // Whatever the result, it does not panic.
            let _ = told(&first, [40, 17, 33], &mut Reader::new(&odd));
        }
    }
}
