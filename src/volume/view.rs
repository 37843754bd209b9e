//! A scan in somebody else's memory, read where it lies.

use super::{Affine, Grid, Voxels};

/// Types of an array's elements.
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

/// Why an array is no scan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct ArrayError(pub String);

/// Most voxels along an axis.
const LONGEST: usize = 1 << 16;

/// Reads an element.
///
/// # Safety
/// An element of that type lies at the address.
type Read = unsafe fn(*const u8) -> f32;

impl Element {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        self.parts().1
    }

    /// As file formats name it.
    pub fn name(self) -> &'static str {
        self.parts().0
    }

    fn parts(self) -> (&'static str, usize, Read) {
        macro_rules! of {
            ($name:literal, $t:ty) => {
                // SAFETY: an element lies there, as `Read` asks for.
                ($name, size_of::<$t>(), |at| unsafe { at.cast::<$t>().read_unaligned() as f32 })
            };
        }
        match self {
            Element::Int8 => of!("int8", i8),
            Element::Uint8 => of!("uint8", u8),
            Element::Int16 => of!("int16", i16),
            Element::Uint16 => of!("uint16", u16),
            Element::Int32 => of!("int32", i32),
            Element::Uint32 => of!("uint32", u32),
            Element::Int64 => of!("int64", i64),
            Element::Uint64 => of!("uint64", u64),
            Element::Float32 => of!("float32", f32),
            Element::Float64 => of!("float64", f64),
        }
    }
}

/// Bytes from the first to behind the last of `size` elements of `bytes` bytes, `strides` bytes apart along each axis, where all strides run forwards.
///
/// # Errors
/// Elements overlap, or reach beyond what memory can hold.
pub fn span(bytes: usize, size: [usize; 3], strides: [isize; 3]) -> Result<usize, ArrayError> {
    // Axes from the tightest to the widest: each must step over all that the ones before it reach.
    let mut axes: Vec<usize> = (0..3).filter(|a| size[*a] > 1).collect();
    axes.sort_by_key(|a| strides[*a].unsigned_abs());
    axes.into_iter().try_fold(bytes, |reach, a| {
        let step = strides[a].unsigned_abs();
        let span = step.checked_mul(size[a] - 1).and_then(|s| s.checked_add(reach)).filter(|s| *s <= isize::MAX as usize);
        span.filter(|_| step >= reach).ok_or_else(|| {
            ArrayError(format!("strides of {strides:?} bytes: voxels of {size:?} elements of {bytes} bytes overlap or reach beyond memory"))
        })
    })
}

/// An array as it lies: nothing of it is copied.
pub struct View {
    data: *const u8,
    read: Read,
    element: Element,
    strides: [isize; 3],
    grid: Grid,
    range: [f32; 2],
    /// How many values are not finite numbers.
    pub odd: usize,
}

// SAFETY: the values are only read, and the maker vouches for them as long as the view lives.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

impl View {
    /// Looks at an array `[i][j][k]` of `size` elements, `strides` bytes apart along each axis (of any sign), the first at `data`. Reads it once, for its range.
    ///
    /// # Errors
    /// An empty or absurdly long axis, strides under which elements overlap or addresses overflow, an affine that cannot be inverted, or no finite value.
    ///
    /// # Safety
    /// Every element lies in memory that can be read, and nobody writes there, while the view lives.
    pub unsafe fn new(
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
            return fail(format!("an array of {size:?} voxels: each axis must have 1 to {LONGEST}"));
        }
        if !affine.is_regular() {
            return fail(format!("the affine {:?} cannot be inverted: its columns must be finite and span space", affine.0));
        }
        span(element.size(), size, strides)?;
        let read = element.parts().2;
        let mut view = View { data, read, element, strides, grid: Grid { size, affine }, range: [0.0; 2], odd: 0 };
        let (mut low, mut high, mut odd) = (f32::INFINITY, f32::NEG_INFINITY, 0);
        view.each_raw(|v| {
            if v.is_finite() {
                (low, high) = (low.min(v), high.max(v));
            } else {
                odd += 1;
            }
        });
        if low > high {
            return fail("no voxel is a finite number".into());
        }
        (view.range, view.odd) = ([low, high], odd);
        Ok(view)
    }

    /// Strides of a dense array whose first axis is the fastest, as in files.
    pub fn dense(element: Element, size: [usize; 3]) -> [isize; 3] {
        let bytes = element.size() as isize;
        let along = |axes: usize| size[..axes].iter().fold(bytes, |s, n| s.saturating_mul(isize::try_from(*n).unwrap_or(isize::MAX)));
        [bytes, along(1), along(2)]
    }

    /// The elements' type.
    pub fn element(&self) -> Element {
        self.element
    }

    #[inline(always)]
    fn raw(&self, [i, j, k]: [usize; 3]) -> f32 {
        let [a, b, c] = self.strides;
        // SAFETY: `value` asserts that the voxel lies within the array, `each_raw` counts such
        // alone; the array lies in memory, as whoever called `View::new` vouches.
        unsafe { (self.read)(self.data.offset(i as isize * a + j as isize * b + k as isize * c)) }
    }

    fn each_raw(&self, mut f: impl FnMut(f32)) {
        let [ni, nj, nk] = self.grid.size;
        // In the order of memory where the first axis is the fastest, as it mostly is.
        for k in 0..nk {
            for j in 0..nj {
                (0..ni).for_each(|i| f(self.raw([i, j, k])));
            }
        }
    }
}

impl Voxels for View {
    fn grid(&self) -> &Grid {
        &self.grid
    }
    fn is_whole(&self) -> bool {
        !matches!(self.element, Element::Float32 | Element::Float64)
    }
    /// NaN and -inf read as the lowest value, +inf as the highest.
    ///
    /// # Panics
    /// For a voxel outside.
    fn value(&self, voxel: [usize; 3]) -> f32 {
        assert!((0..3).all(|a| voxel[a] < self.grid.size[a]), "voxel {voxel:?} of {:?}", self.grid.size);
        let v = self.raw(voxel);
        match v.is_finite() {
            true => v,
            false => self.range[usize::from(v == f32::INFINITY)],
        }
    }
    fn range(&self) -> [f32; 2] {
        self.range
    }
}
