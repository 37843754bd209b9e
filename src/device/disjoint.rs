//! Memory that the units of one op share: [`DisjointWriter`] if each writes its own part,
//! [`ReadOnly`] if some read what is written to at other times.
//!
//! Both are an address and a length, which threads may share because neither reads or writes by
//! itself: elements are reached by `unsafe` methods alone, whose callers promise that nothing else
//! touches what is written, or writes to what is read, meanwhile. Units of work keep that by what
//! they are: tiles cover disjoint voxels, heads own their channels. The memory stays borrowed while
//! a writer or reader of it is in use. Builds with debug assertions check what they can: that parts
//! lie within the memory, and that no writer hands out an element in two slices.

use std::marker::PhantomData;

/// Memory of which each unit of an op writes a part of its own.
pub(crate) struct DisjointWriter<'a, T> {
    start: *mut T,
    len: usize,
    #[cfg(debug_assertions)]
    taken: taken::Taken,
    memory: PhantomData<&'a mut [T]>,
}

// SAFETY: a writer stands for a `&mut [T]`, whose parts may be written to by other threads if its
// values may be sent to them; that threads' parts are disjoint is promised in its unsafe methods.
unsafe impl<T: Send> Send for DisjointWriter<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for DisjointWriter<'_, T> {}

impl<'a, T> DisjointWriter<'a, T> {
    /// A writer to memory that the caller borrows for as long as the op runs.
    pub fn new(memory: &'a mut [T]) -> DisjointWriter<'a, T> {
        // SAFETY: a borrowed slice is what is asked for.
        unsafe { DisjointWriter::from_raw(memory.as_mut_ptr(), memory.len()) }
    }

    /// A writer to `len` values from an address on.
    ///
    /// # Safety
    /// For as long as the writer is used there are `len` initialised values from `start` on, in
    /// memory that may be written to and that nothing accesses except through the writer and
    /// through addresses derived from `start`.
    pub unsafe fn from_raw(start: *mut T, len: usize) -> DisjointWriter<'a, T> {
        DisjointWriter {
            start,
            len,
            #[cfg(debug_assertions)]
            taken: taken::Taken::new(len),
            memory: PhantomData,
        }
    }

    /// The address of element `offset`.
    ///
    /// # Safety
    /// `offset` is within the memory. Nothing else touches what is written through the address, or
    /// writes to what is read, meanwhile.
    #[inline]
    pub unsafe fn at(&self, offset: usize) -> *mut T {
        debug_assert!(offset <= self.len, "element {offset} lies outside of {}", self.len);
        // SAFETY: guaranteed by the caller.
        unsafe { self.start.add(offset) }
    }

    /// The address of element `offset`, which may be outside: for prefetching.
    #[inline]
    pub fn wrapping_at(&self, offset: usize) -> *mut T {
        self.start.wrapping_add(offset)
    }

    /// Elements `offset..offset + len`; each element may be taken once.
    ///
    /// # Safety
    /// They are within the memory, and nothing else touches them while the slice lives.
    #[inline]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, offset: usize, len: usize) -> &mut [T] {
        debug_assert!(
            offset <= self.len && len <= self.len - offset,
            "{len} elements from {offset} on lie outside of {}",
            self.len
        );
        #[cfg(debug_assertions)]
        assert!(
            self.taken.take(offset..offset + len),
            "{len} elements from {offset} on: some were handed out before"
        );
        // SAFETY: guaranteed by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), len) }
    }

    /// The memory, to read from.
    pub fn reader(&self) -> ReadOnly<'_, T> {
        ReadOnly { start: self.start, len: self.len, memory: PhantomData }
    }
}

/// Memory that is only read through this, though something else may write to it when nothing reads.
#[derive(Clone, Copy)]
pub(crate) struct ReadOnly<'a, T> {
    start: *const T,
    len: usize,
    memory: PhantomData<&'a [T]>,
}

// SAFETY: it stands for a `&[T]`, which threads may share if they may share its values; that
// nothing writes to what is read is promised in its unsafe methods.
unsafe impl<T: Sync> Send for ReadOnly<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for ReadOnly<'_, T> {}

impl<'a, T> ReadOnly<'a, T> {
    /// A reader of values that nothing writes to.
    pub fn new(values: &'a [T]) -> ReadOnly<'a, T> {
        ReadOnly { start: values.as_ptr(), len: values.len(), memory: PhantomData }
    }

    /// A reader of memory that may be written to.
    ///
    /// # Safety
    /// There are `len` initialised values from `start` on for as long as it is used.
    pub unsafe fn from_raw(start: *const T, len: usize) -> ReadOnly<'a, T> {
        ReadOnly { start, len, memory: PhantomData }
    }

    /// The address of element `offset`.
    ///
    /// # Safety
    /// `offset` is within the memory, and nothing writes to what is read through the address
    /// meanwhile.
    #[inline]
    pub unsafe fn at(&self, offset: usize) -> *const T {
        debug_assert!(offset <= self.len, "element {offset} lies outside of {}", self.len);
        // SAFETY: guaranteed by the caller.
        unsafe { self.start.add(offset) }
    }

    /// The address of element `offset`, which may be outside: for prefetching.
    #[inline]
    pub fn wrapping_at(&self, offset: usize) -> *const T {
        self.start.wrapping_add(offset)
    }

    /// Elements `offset..offset + len`.
    ///
    /// # Safety
    /// They are within the memory, and nothing writes to them while the slice lives.
    #[inline]
    pub unsafe fn slice(&self, offset: usize, len: usize) -> &[T] {
        debug_assert!(
            offset <= self.len && len <= self.len - offset,
            "{len} elements from {offset} on lie outside of {}",
            self.len
        );
        // SAFETY: guaranteed by the caller.
        unsafe { std::slice::from_raw_parts(self.start.add(offset), len) }
    }
}

/// The elements that a writer handed out.
#[cfg(debug_assertions)]
mod taken {
    use std::ops::Range;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Words of a page.
    const WORDS: usize = 512;
    /// Elements of a page, one bit each.
    const PAGE: usize = 64 * WORDS;

    type Page = Box<[AtomicU64]>;

    /// One bit for each element of the memory, in pages that are made when needed: most writers
    /// hand out addresses, or little.
    pub struct Taken {
        len: usize,
        pages: OnceLock<Box<[OnceLock<Page>]>>,
    }

    impl Taken {
        /// A record of `len` elements, none of them taken.
        pub fn new(len: usize) -> Taken {
            Taken { len, pages: OnceLock::new() }
        }

        /// Takes elements; false if some were taken before.
        pub fn take(&self, elements: Range<usize>) -> bool {
            let (mut at, mut all_free) = (elements.start, true);
            while at < elements.end {
                let (word, bit) = (at / 64, at % 64);
                let count = (64 - bit).min(elements.end - at);
                let bits = (u64::MAX >> (64 - count)) << bit;
                let pages = self.pages.get_or_init(|| {
                    (0..self.len.div_ceil(PAGE)).map(|_| OnceLock::new()).collect()
                });
                let page = pages[word / WORDS]
                    .get_or_init(|| (0..WORDS).map(|_| AtomicU64::new(0)).collect());
                all_free &= page[word % WORDS].fetch_or(bits, Ordering::Relaxed) & bits == 0;
                at += count;
            }
            all_free
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_write_parts_of_their_own() {
        // Parts of odd lengths, over several pages of what debug builds keep.
        let (part, parts) = (1001, 100);
        let mut memory = vec![0u32; part * parts];
        let writer = DisjointWriter::new(&mut memory);
        std::thread::scope(|scope| {
            for first in 0..4 {
                let writer = &writer;
                scope.spawn(move || {
                    for at in (first..parts).step_by(4) {
                        // SAFETY: each part is one thread's.
                        unsafe { writer.slice(at * part, part) }.fill(at as u32);
                    }
                });
            }
        });
        let reader = writer.reader();
        // SAFETY: nothing writes any more.
        unsafe {
            assert_eq!(*reader.at(part), 1);
            assert_eq!(reader.slice(part - 1, 2), [0, 1]);
        }
        assert!(memory.iter().enumerate().all(|(at, v)| *v == (at / part) as u32));
    }

    #[cfg(debug_assertions)]
    mod checks {
        use super::*;

        /// A slice of a writer of `len` elements, another one before it.
        fn slices(len: usize, first: [usize; 2], second: [usize; 2]) -> usize {
            let mut memory = vec![0.0f32; len];
            let writer = DisjointWriter::new(&mut memory);
            // SAFETY: the slices are not used, and those that lie outside or overlap are refused.
            unsafe {
                let _ = writer.slice(first[0], first[1]);
                writer.slice(second[0], second[1]).len()
            }
        }

        #[test]
        fn neighbours_may_be_handed_out_in_any_order() {
            assert_eq!(slices(200_000, [100_000, 100_000], [0, 100_000]), 100_000);
            assert_eq!(slices(70, [3, 61], [64, 6]), 6);
            // Nothing overlaps nothing, at the end as well.
            assert_eq!(slices(10, [0, 10], [10, 0]), 0);
        }

        #[test]
        #[should_panic(expected = "were handed out before")]
        fn an_element_is_handed_out_once() {
            slices(200_000, [10, 99_990], [99_999, 5]);
        }

        #[test]
        #[should_panic(expected = "lie outside of 70")]
        fn a_part_lies_within_the_memory() {
            slices(70, [0, 1], [64, 7]);
        }

        #[test]
        #[should_panic(expected = "lie outside of 70")]
        fn an_end_that_wraps_lies_outside() {
            slices(70, [0, 1], [2, usize::MAX]);
        }

        #[test]
        #[should_panic(expected = "lies outside of 70")]
        fn an_address_lies_within_the_memory() {
            let mut memory = vec![0.0f32; 70];
            // SAFETY: it is refused.
            let _ = unsafe { DisjointWriter::new(&mut memory).at(71) };
        }

        #[test]
        #[should_panic(expected = "lie outside of 70")]
        fn what_is_read_lies_within_the_memory() {
            let memory = vec![0.0f32; 70];
            // SAFETY: it is refused.
            let _ = unsafe { ReadOnly::new(&memory).slice(71, 0).len() };
        }
    }
}
