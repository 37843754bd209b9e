//! Voxels as they are stored: in a file's bytes or in memory that the caller owns, of any type and
//! order, read in place.

use super::{Affine, Grid, Voxels};
use crate::memory;
use rayon::prelude::*;

/// The type of an array's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Element {
    Int8,
    Uint8,
    Int16,
    Uint16,
    Int32,
    Uint32,
    Int64,
    Uint64,
    Float32,
    Float64,
}

/// Why an array cannot be used as a scan; as text.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct ArrayError(pub String);

/// The most voxels along an axis of an image, whether from a file or from a caller: more than any
/// scanner makes, and few enough for indices of 32 bits.
pub(super) const LONGEST: usize = 1 << 16;

/// How messages name the memory that a scan's values take.
const VALUES: &str = "its voxels";
/// How messages name the memory in which they are counted.
const COUNTS: &str = "a count of its values";

/// Runs `$body` with `$t` for the type of an element.
macro_rules! typed {
    (@ $element:expr, $t:ident, $body:expr; $($name:ident $type:ty),*) => {
        match $element {
            $($crate::volume::Element::$name => {
                type $t = $type;
                #[allow(clippy::unnecessary_cast, reason = "it is one for most types")]
                {
                    $body
                }
            })*
        }
    };
    ($element:expr, $t:ident => $body:expr) => {
        $crate::volume::array::typed!(
            @ $element, $t, $body;
            Int8 i8, Uint8 u8, Int16 i16, Uint16 u16, Int32 i32, Uint32 u32, Int64 i64, Uint64 u64,
            Float32 f32, Float64 f64
        )
    };
}

pub(super) use typed;

impl Element {
    /// All types, in the order of their numbers in the C interface.
    pub(crate) const ALL: [Element; 10] = {
        use Element::*;
        [Int8, Uint8, Int16, Uint16, Int32, Uint32, Int64, Uint64, Float32, Float64]
    };

    /// Bytes of an element.
    pub fn size(self) -> usize {
        typed!(self, T => size_of::<T>())
    }

    /// Bytes of a number of volumes of `size` voxels, for images of every format.
    ///
    /// # Errors
    /// They are more than can be addressed, or an axis is longer than [`LONGEST`].
    pub(super) fn bytes_of(self, size: [usize; 3], volumes: usize) -> Result<usize, String> {
        const MOST: u64 = 1 << 50;
        let [i, j, k] = size;
        let bytes = memory::extent(&[i, j, k, volumes, self.size()]);
        let bytes = bytes.filter(|bytes| *bytes as u64 <= MOST).ok_or_else(|| {
            let name = self.name();
            format!("{size:?} voxels of {name} in {volumes} volumes are more bytes than can be addressed")
        })?;
        match ["i", "j", "k"].into_iter().zip(size).find(|(_, length)| *length > LONGEST) {
            Some((axis, length)) => Err(format!(
                "it has {length} voxels along its axis {axis}, expected at most {LONGEST}"
            )),
            None => Ok(bytes),
        }
    }

    /// The element type's name in file formats, such as `int16`.
    pub fn name(self) -> &'static str {
        match self {
            Element::Int8 => "int8",
            Element::Uint8 => "uint8",
            Element::Int16 => "int16",
            Element::Uint16 => "uint16",
            Element::Int32 => "int32",
            Element::Uint32 => "uint32",
            Element::Int64 => "int64",
            Element::Uint64 => "uint64",
            Element::Float32 => "float32",
            Element::Float64 => "float64",
        }
    }

    /// Whether elements are whole numbers.
    pub fn is_whole(self) -> bool {
        !matches!(self, Element::Float32 | Element::Float64)
    }

    /// Whether it has few enough values to be counted one by one.
    fn is_small(self) -> bool {
        self.size() <= 2
    }

    /// Converts elements of a file to the byte order of this machine; `big` if the file has the
    /// highest byte first.
    pub(super) fn to_native(self, bytes: &mut [u8], big: bool) {
        let size = self.size();
        if size > 1 && big != cfg!(target_endian = "big") {
            bytes
                .par_chunks_mut(size << 16)
                .for_each(|part| part.chunks_exact_mut(size).for_each(<[u8]>::reverse));
        }
    }
}

/// The number of bytes that an array takes, from its first element to the end of its last: of
/// `size` elements of `bytes` bytes each, which are `strides` bytes apart along each axis, whatever
/// the signs of the strides.
///
/// # Errors
/// Elements overlap, or reach beyond what memory can hold.
pub fn span(bytes: usize, size: [usize; 3], strides: [isize; 3]) -> Result<usize, ArrayError> {
    // Axes from the tightest to the widest: each must step over everything that the ones before it
    // span.
    let mut axes: Vec<usize> = (0..3).filter(|a| size[*a] > 1).collect();
    axes.sort_by_key(|a| strides[*a].unsigned_abs());
    axes.into_iter().try_fold(bytes, |reach, a| {
        let step = strides[a].unsigned_abs();
        let span = step
            .checked_mul(size[a] - 1)
            .and_then(|s| s.checked_add(reach))
            .filter(|s| *s <= isize::MAX as usize);
        span.filter(|_| step >= reach).ok_or_else(|| {
            ArrayError(format!("strides of {strides:?} bytes: voxels of {size:?} elements of {bytes} bytes overlap or reach beyond memory"))
        })
    })
}

/// Strides of a dense array whose first axis is the fastest, as in files.
fn dense(bytes: usize, size: [usize; 3]) -> [isize; 3] {
    let along = |axes: usize| {
        size[..axes].iter().fold(bytes as isize, |s, n| {
            s.saturating_mul(isize::try_from(*n).unwrap_or(isize::MAX))
        })
    };
    [bytes as isize, along(1), along(2)]
}

/// Memory that belongs to an array.
#[derive(Debug)]
enum Held {
    Bytes(Vec<u8>),
    Values(Vec<f32>),
}

impl Held {
    fn bytes(&self) -> &[u8] {
        match self {
            Held::Bytes(bytes) => bytes,
            Held::Values(values) => bytemuck::cast_slice(values),
        }
    }
}

/// The voxels `[i, j, k]` of an image as they are stored, of any element type and order in memory.
///
/// Values are read as float32, multiplied and shifted if the file says so. One that is not finite
/// reads as the lowest or the highest finite value.
#[derive(Debug)]
pub struct Array {
    data: *const u8,
    element: Element,
    size: [usize; 3],
    /// Bytes from one voxel to the next along each axis.
    strides: [isize; 3],
    scale: Option<[f64; 2]>,
    /// The lowest and the highest finite value; in reverse order if there is none.
    range: [f32; 2],
    /// The number of values that are not finite.
    odd: usize,
    /// Each value with the number of its occurrences, from the lowest on, if the type has few
    /// values.
    counts: Option<Box<[(f32, u64)]>>,
    /// The values, if they belong to the array: never changed.
    held: Option<Held>,
}

// SAFETY: the values are only read; they belong to the array, or its creator guarantees them as
// long as the array lives.
unsafe impl Send for Array {}
// SAFETY: as above.
unsafe impl Sync for Array {}

impl Array {
    /// An array of its own values `[i][j][k]`, k fastest.
    ///
    /// # Panics
    /// Unless there is one value per voxel, and at least one.
    pub fn of_values(size: [usize; 3], values: Vec<f32>) -> Array {
        let [_, nj, nk] = size.map(|n| n as isize);
        let strides = [4 * nj.saturating_mul(nk), 4 * nk, 4];
        Array::of_own(Held::Values(values), Element::Float32, size, strides, None)
    }

    /// Voxels of a file, i fastest, in the byte order of this machine; their factor, and what is
    /// then added.
    ///
    /// # Panics
    /// Unless there are values for all voxels, and at least one.
    pub(super) fn of_bytes(
        bytes: Vec<u8>,
        element: Element,
        size: [usize; 3],
        scale: Option<[f64; 2]>,
    ) -> Array {
        Array::of_own(Held::Bytes(bytes), element, size, dense(element.size(), size), scale)
    }

    fn of_own(
        held: Held,
        element: Element,
        size: [usize; 3],
        strides: [isize; 3],
        scale: Option<[f64; 2]>,
    ) -> Array {
        let bytes = held.bytes();
        let needed = element.bytes_of(size, 1).ok().filter(|n| *n > 0);
        assert_eq!(needed, Some(bytes.len()), "bytes of {size:?} voxels of {}", element.name());
        let data = bytes.as_ptr();
        // SAFETY: the strides are those of a dense array, which was just checked to be as long as
        // the bytes. Their address does not change when the list is moved, and nothing changes them
        // while the array holds them.
        unsafe { Array::new(data, element, size, strides, scale, Some(held)) }
    }

    /// Reads all values once, for their range.
    ///
    /// # Safety
    /// Every voxel is in memory that can be read, and nothing writes there, while the array lives.
    unsafe fn new(
        data: *const u8,
        element: Element,
        size: [usize; 3],
        strides: [isize; 3],
        scale: Option<[f64; 2]>,
        held: Option<Held>,
    ) -> Array {
        let range = [f32::INFINITY, f32::NEG_INFINITY];
        let mut array =
            Array { data, element, size, strides, scale, range, odd: 0, counts: None, held };
        if element.is_small() {
            array.count();
        } else {
            let look = |[low, high]: [f32; 2], odd: usize, v: f32| match v.is_finite() {
                true => ([low.min(v), high.max(v)], odd),
                false => ([low, high], odd + 1),
            };
            let none = (array.range, 0);
            let each = array.rows().map(|row| {
                let mut seen = none;
                array.row(row, |v| seen = look(seen.0, seen.1, v));
                seen
            });
            let join = |a: ([f32; 2], usize), b: ([f32; 2], usize)| {
                ([a.0[0].min(b.0[0]), a.0[1].max(b.0[1])], a.1 + b.1)
            };
            (array.range, array.odd) = each.reduce(|| none, join);
        }
        array
    }

    /// Counts every value of a small type.
    fn count(&mut self) {
        let low = typed!(self.element, T => T::MIN as i64);
        let all = if self.element.size() == 1 { 1 << 8 } else { 1 << 16 };
        let count = |mut counts: Vec<u64>, [at, step, n]: [isize; 3]| {
            typed!(self.element, T => (0..n).for_each(|z| {
                // SAFETY: the voxels of a row are within the array.
                let v: T = unsafe { self.read(at + z * step) };
                counts[(v as i64 - low) as usize & (all - 1)] += 1;
            }));
            counts
        };
        let empty = || memory::zeroed::<u64>(COUNTS, all);
        let counts = self.rows().fold(empty, count).reduce(empty, |mut a, b| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
            a
        });
        let mut list: Vec<(f32, u64)> = counts
            .into_iter()
            .enumerate()
            .filter(|(_, n)| *n > 0)
            .map(|(at, n)| (self.scaled((at as i64 + low) as f32), n))
            .collect();
        list.sort_by(|a, b| a.0.total_cmp(&b.0));
        let odd = list.iter().filter(|(v, _)| !v.is_finite());
        self.odd = odd.map(|(_, n)| *n as usize).sum();
        list.retain(|(v, _)| v.is_finite());
        if let (Some(first), Some(last)) = (list.first(), list.last()) {
            self.range = [first.0, last.0];
        }
        // A value that is not finite counts as the end of the range that it is read as; this is
        // rare enough to examine such values one by one.
        self.counts = (self.odd == 0).then(|| list.into());
    }

    /// Voxels along each axis.
    pub fn size(&self) -> [usize; 3] {
        self.size
    }

    /// The elements' type.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Bytes of memory that belong to the array: 0 if it is the caller's.
    pub fn bytes(&self) -> usize {
        self.held.as_ref().map_or(0, |held| held.bytes().len())
    }

    /// The number of values that are not finite.
    pub fn odd(&self) -> usize {
        self.odd
    }

    /// The lowest and the highest finite value; none if no value is finite.
    pub fn range(&self) -> Option<[f32; 2]> {
        Some(self.range).filter(|[low, high]| low <= high)
    }

    /// The lowest finite value; 0 if no value is finite.
    pub fn lowest(&self) -> f32 {
        self.range().map_or(0.0, |[low, _]| low)
    }

    /// Each value with the number of its occurrences, from the lowest on; none if they were not
    /// counted, because the element type has many values.
    pub fn counts(&self) -> Option<&[(f32, u64)]> {
        self.counts.as_deref()
    }

    #[inline(always)]
    fn scaled(&self, v: f32) -> f32 {
        match self.scale {
            None => v,
            Some([slope, inter]) => (v as f64 * slope + inter) as f32,
        }
    }

    /// A stored value, read as a finite one.
    #[inline(always)]
    fn finite(&self, v: f32) -> f32 {
        if v.is_finite() { v } else { self.range[usize::from(v == f32::INFINITY)] }
    }

    /// The element at a byte offset from the first voxel.
    ///
    /// # Safety
    /// A voxel of the array begins there, and `T` is its type.
    #[inline(always)]
    pub(super) unsafe fn read<T: bytemuck::AnyBitPattern>(&self, at: isize) -> T {
        // SAFETY: all voxels can be read, as the array's creator checked or promised.
        unsafe { self.data.offset(at).cast::<T>().read_unaligned() }
    }

    /// The byte offset of a voxel from the first one.
    ///
    /// # Panics
    /// For a voxel outside.
    #[inline(always)]
    pub(super) fn place(&self, voxel: [usize; 3]) -> isize {
        assert!((0..3).all(|a| voxel[a] < self.size[a]), "voxel {voxel:?} of {:?}", self.size);
        (0..3).map(|a| voxel[a] as isize * self.strides[a]).sum()
    }

    /// The value as which a stored value is read.
    #[inline(always)]
    pub(super) fn understood(&self, v: f32) -> f32 {
        self.finite(self.scaled(v))
    }

    /// The value at a voxel. NaN and -inf read as the lowest value, +inf as the highest.
    ///
    /// # Panics
    /// For a voxel outside.
    #[inline(always)]
    pub fn value(&self, voxel: [usize; 3]) -> f32 {
        let at = self.place(voxel);
        // SAFETY: the voxel was checked to be within the array.
        self.understood(typed!(self.element, T => unsafe { self.read::<T>(at) as f32 }))
    }

    /// Axes from the widest stride to the tightest.
    fn axes(&self) -> [usize; 3] {
        let mut axes = [2, 1, 0];
        axes.sort_by_key(|a| std::cmp::Reverse(self.strides[*a].unsigned_abs()));
        axes
    }

    /// The axis along which voxels are closest.
    pub(super) fn tightest(&self) -> usize {
        self.axes()[2]
    }

    /// The rows along the tightest axis in the order of memory: the beginning of each, the step and
    /// the number of voxels.
    fn rows(&self) -> impl IndexedParallelIterator<Item = [isize; 3]> + '_ {
        let [a, b, c] = self.axes();
        let inner = self.size[b];
        (0..self.size[a] * inner).into_par_iter().with_min_len(64).map(move |row| {
            let at =
                (row / inner) as isize * self.strides[a] + (row % inner) as isize * self.strides[b];
            [at, self.strides[c], self.size[c] as isize]
        })
    }

    /// Calls `f` with every value of a row, as it is stored, before scaling.
    #[inline(always)]
    fn row(&self, [at, step, n]: [isize; 3], mut f: impl FnMut(f32)) {
        typed!(self.element, T => (0..n).for_each(|z| {
            // SAFETY: the voxels of a row are within the array.
            let v: T = unsafe { self.read(at + z * step) };
            f(self.scaled(v as f32));
        }));
    }

    /// Calls `f` with every value, in the order in which they are in memory.
    pub fn each(&self, mut f: impl FnMut(f32)) {
        let [a, b, c] = self.axes();
        for x in 0..self.size[a] as isize {
            for y in 0..self.size[b] as isize {
                let row = [
                    x * self.strides[a] + y * self.strides[b],
                    self.strides[c],
                    self.size[c] as isize,
                ];
                self.row(row, |v| f(self.finite(v)));
            }
        }
    }

    /// All values `[i][j][k]`, k fastest: a copy of four bytes per voxel.
    pub fn values(&self) -> Vec<f32> {
        self.collected(VALUES, |v| v)
    }

    /// All values `[i][j][k]`, k fastest, without replacing those that are not finite.
    pub(super) fn stored_values(&self) -> Vec<f32> {
        self.laid_out(VALUES, |v| v)
    }

    /// The results of `of` for all values, `[i][j][k]`, k fastest; `what` names them if memory is
    /// refused.
    pub(super) fn collected<T: bytemuck::Zeroable + Send>(
        &self,
        what: &'static str,
        of: impl Fn(f32) -> T + Sync,
    ) -> Vec<T> {
        self.laid_out(what, |v| of(self.finite(v)))
    }

    /// The values through `of`, in the order of [`Array::collected`], with what is not finite as it
    /// is.
    pub(crate) fn laid_out<T: bytemuck::Zeroable + Send>(
        &self,
        what: &'static str,
        of: impl Fn(f32) -> T + Sync,
    ) -> Vec<T> {
        let [ni, nj, nk] = self.size;
        let mut out = memory::zeroed::<T>(what, ni * nj * nk);
        // As many planes at once as there are values in a cache line: files have i fastest.
        const PLANES: usize = 16;
        let [a, b, c] = self.strides;
        out.par_chunks_mut(PLANES * nj * nk).enumerate().for_each(|(block, out)| {
            let (first, planes) = (block * PLANES, out.len() / (nj * nk));
            for j in 0..nj {
                for k in 0..nk {
                    let at = first as isize * a + j as isize * b + k as isize * c;
                    let mut to = j * nk + k;
                    self.row([at, a, planes as isize], |v| {
                        out[to] = of(v);
                        to += nj * nk;
                    });
                }
            }
        });
        out
    }
}

/// A scan in an array that the caller owns, with its place in the world: nothing of it is copied.
pub struct View {
    array: Array,
    grid: Grid,
}

impl View {
    /// A view of an array `[i][j][k]` of `size` elements, `strides` bytes apart along each axis (of
    /// any sign), the first at `data`. Reads it once, for its range.
    ///
    /// # Errors
    /// An empty or absurdly long axis, strides under which elements overlap or addresses overflow,
    /// an affine that cannot be inverted, or no finite value.
    ///
    /// # Safety
    /// Every element is in memory that can be read, and nothing writes there, while the view lives.
    pub unsafe fn new(
        data: *const u8,
        element: Element,
        size: [usize; 3],
        strides: [isize; 3],
        affine: Affine,
    ) -> Result<View, ArrayError> {
        // SAFETY: the caller's promise.
        let view = unsafe { View::of_any(data, element, size, strides, affine)? };
        match view.array.range() {
            Some(_) => Ok(view),
            None => Err(ArrayError("no voxel is a finite number".into())),
        }
    }

    /// A view of an array as [`View::new`] makes it, of values none of which need be finite.
    ///
    /// # Errors
    /// As [`View::new`], but for the values.
    ///
    /// # Safety
    /// As [`View::new`].
    pub(crate) unsafe fn of_any(
        data: *const u8,
        element: Element,
        size: [usize; 3],
        strides: [isize; 3],
        affine: Affine,
    ) -> Result<View, ArrayError> {
        let fail = |message: String| Err(ArrayError(message));
        if data.is_null() {
            return fail("the array is null".into());
        }
        if size.iter().any(|s| *s == 0 || *s > LONGEST) {
            return fail(format!(
                "an array of {size:?} voxels: each axis must have 1 to {LONGEST}"
            ));
        }
        if !affine.is_regular() {
            return fail(format!(
                "the affine {:?} cannot be inverted: its columns must be finite and linearly independent",
                affine.0
            ));
        }
        span(element.size(), size, strides)?;
        // SAFETY: the caller's promise.
        let array = unsafe { Array::new(data, element, size, strides, None, None) };
        Ok(View { array, grid: Grid { size, affine } })
    }

    /// Strides of a dense array whose first axis is the fastest, as in files.
    pub fn dense(element: Element, size: [usize; 3]) -> [isize; 3] {
        dense(element.size(), size)
    }

    /// The array.
    pub fn array(&self) -> &Array {
        &self.array
    }
}

impl Voxels for View {
    fn grid(&self) -> &Grid {
        &self.grid
    }
    fn is_whole(&self) -> bool {
        self.array.element.is_whole()
    }
    fn array(&self) -> &Array {
        &self.array
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sixty values of some type in a file's order, and their expected values.
    fn numbers<T: bytemuck::Pod>(of: impl Fn(i32) -> T) -> Vec<u8> {
        let values: Vec<T> = (0..60).map(of).collect();
        bytemuck::cast_slice(&values).to_vec()
    }

    #[test]
    fn every_type_is_read_where_it_lies() {
        let size = [5, 4, 3];
        let all: [(Element, Vec<u8>); 10] = [
            (Element::Int8, numbers(|v| v as i8)),
            (Element::Uint8, numbers(|v| v as u8)),
            (Element::Int16, numbers(|v| v as i16)),
            (Element::Uint16, numbers(|v| v as u16)),
            (Element::Int32, numbers(|v| v)),
            (Element::Uint32, numbers(|v| v as u32)),
            (Element::Int64, numbers(|v| v as i64)),
            (Element::Uint64, numbers(|v| v as u64)),
            (Element::Float32, numbers(|v| v as f32)),
            (Element::Float64, numbers(|v| v as f64)),
        ];
        for (element, bytes) in all {
            let array = Array::of_bytes(bytes, element, size, Some([-2.0, 1.0]));
            assert_eq!(
                (array.range(), array.odd(), array.element()),
                (Some([-117.0, 1.0]), 0, element)
            );
            let value = |i: usize, j: usize, k: usize| 1.0 - 2.0 * ((k * 4 + j) * 5 + i) as f32;
            assert_eq!(array.value([3, 2, 1]), value(3, 2, 1));
            let values = array.values();
            assert!(
                (0..60).all(|at| values[at] == value(at / 12, at / 3 % 4, at % 3)),
                "{element:?}"
            );
            // Laid out again it is the same array.
            let again = Array::of_values(size, values);
            assert!((0..60).all(|at| again.value([at / 12, at / 3 % 4, at % 3])
                == array.value([at / 12, at / 3 % 4, at % 3])));
            let (mut sum, mut counted) = (0.0, 0);
            array.each(|v| sum += v);
            again
                .counts()
                .unwrap_or_default()
                .iter()
                .chain(array.counts().unwrap_or_default())
                .for_each(|(_, n)| counted += n);
            assert_eq!(
                (sum, counted),
                (60.0 - 59.0 * 60.0, if element.size() <= 2 { 60 } else { 0 })
            );
        }
    }

    #[test]
    fn odd_values_are_read_as_the_ends() {
        let array =
            Array::of_values([5, 1, 1], vec![1.0, f32::NAN, 3.0, f32::INFINITY, f32::NEG_INFINITY]);
        assert_eq!((array.values(), array.odd()), (vec![1.0, 1.0, 3.0, 3.0, 1.0], 3));
        assert!(array.stored_values()[1].is_nan());
        let none = Array::of_values([1; 3], vec![f32::NAN]);
        assert_eq!((none.range(), none.odd()), (None, 1));
        // A scale beyond what floats hold.
        let large = Array::of_bytes(vec![0, 1, 2], Element::Uint8, [3, 1, 1], Some([1e38, 0.0]));
        assert_eq!((large.values(), large.odd()), (vec![0.0, 1e38, 2e38], 0));
        let larger = Array::of_bytes(vec![0, 1, 2], Element::Uint8, [3, 1, 1], Some([3e38, 0.0]));
        assert_eq!(
            (larger.values(), larger.odd(), larger.counts()),
            (vec![0.0, 3e38, 3e38], 1, None)
        );
    }

    #[test]
    fn bytes_of_another_order_are_turned() {
        let mut bytes = vec![1, 2, 3, 4];
        Element::Int16.to_native(&mut bytes, cfg!(target_endian = "little"));
        assert_eq!(bytes, [2, 1, 4, 3]);
        Element::Int16.to_native(&mut bytes, cfg!(target_endian = "big"));
        assert_eq!(bytes, [2, 1, 4, 3]);
    }

    #[test]
    #[should_panic(expected = "bytes of [5, 4, 3] voxels of int16")]
    fn bytes_that_are_too_few_are_refused() {
        Array::of_bytes(vec![0; 119], Element::Int16, [5, 4, 3], None);
    }
}
