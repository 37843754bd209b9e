//! The CPU: its threads, its instruction set, its buffers.

use super::buffer::{Buffer, Workspace};
use super::profile::{OpCost, OpRecord, Profile, Running};
use super::{DType, DeviceError, Isa, processors};
use rayon::prelude::*;
use std::fmt;
use std::sync::Arc;

/// Host threads with a workspace for buffers. Clones share both.
#[derive(Clone)]
pub struct Cpu {
    threads: Arc<rayon::ThreadPool>,
    buffers: Arc<Workspace>,
    isa: Isa,
    /// The instruction set of products: `isa`, or that with products of pairs of bfloat16.
    products: Isa,
    profile: Arc<Profile>,
}

impl fmt::Debug for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cpu({} threads, {})", self.threads(), self.isa)
    }
}

impl Cpu {
    /// `threads` threads (0: one per available core), instruction set by [`Isa::from_env`].
    pub fn new(threads: usize) -> Result<Cpu, DeviceError> {
        Cpu::with_isa(threads, Isa::from_env()?)
    }

    /// `threads` threads (0: one per available core) that use a given instruction set.
    pub fn with_isa(threads: usize, isa: Isa) -> Result<Cpu, DeviceError> {
        let threads = match threads {
            0 => processors(),
            n => n,
        };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("prism-{i}"))
            .build()
            .map_err(|source| DeviceError::Threads { threads, source })?;
        Ok(Cpu {
            threads: Arc::new(pool),
            buffers: Workspace::new(),
            isa,
            products: isa,
            profile: Arc::default(),
        })
    }

    /// This CPU with products in bfloat16: dense layers and direct convolutions use it, and sum in
    /// float32. None if the processor, or the instruction set in use, has no such products.
    pub fn in_bf16(self) -> Option<Cpu> {
        self.isa.with_bf16_pairs().map(|products| Cpu { products, ..self })
    }

    /// This CPU with products in float32.
    pub fn in_f32(self) -> Cpu {
        Cpu { products: self.isa, ..self }
    }

    /// Whether products are taken in bfloat16, of blocks of `ic_block` input channels.
    pub(crate) fn bf16_pairs(&self, ic_block: usize) -> bool {
        self.products.bf16_pairs() && ic_block >= 16
    }

    /// The instruction set for products of blocks of `ic_block` input channels: with pairs of
    /// bfloat16 if [`Cpu::bf16_pairs`] says so.
    pub(crate) fn products(&self, ic_block: usize) -> Isa {
        if self.bf16_pairs(ic_block) { self.products } else { self.isa }
    }

    /// The type in which products are taken.
    pub fn precision(&self) -> DType {
        if self.products.bf16_pairs() { DType::Bf16 } else { DType::F32 }
    }

    /// The number of worker threads.
    pub fn threads(&self) -> usize {
        self.threads.current_num_threads()
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// A buffer of `len` floats with unspecified contents.
    pub fn alloc(&self, len: usize) -> Buffer {
        self.buffers.alloc(len, 0)
    }

    /// A buffer of `len` floats with unspecified contents, with room after it for `headroom` more.
    pub(crate) fn alloc_with_headroom(&self, len: usize, headroom: usize) -> Buffer {
        self.buffers.alloc(len, headroom)
    }

    /// A buffer of `len` zeros in float64.
    pub(crate) fn zeros_f64(&self, len: usize) -> F64Buffer {
        F64Buffer(self.zeros(2 * len))
    }

    /// A buffer of `len` floats with unspecified contents in memory of its own, for results that
    /// stay.
    pub(crate) fn alloc_persistent(&self, len: usize) -> Buffer {
        self.buffers.alloc_persistent(len)
    }

    /// A copy of `values` in memory of its own, for results that stay.
    pub fn persistent_copy(&self, values: &[f32]) -> Buffer {
        let mut buffer = self.alloc_persistent(values.len());
        let run = 1 << 16;
        self.chunks_mut(&mut buffer, run, |unit, to| {
            to.copy_from_slice(&values[unit * run..][..to.len()])
        });
        buffer
    }

    /// Bytes of the system's memory that its buffers come from, both in use and kept for reuse.
    pub fn held_bytes(&self) -> usize {
        self.buffers.bytes()
    }

    /// A buffer of `len` zeros.
    pub fn zeros(&self, len: usize) -> Buffer {
        let mut b = self.alloc(len);
        b.fill(0.0);
        b
    }

    /// Gives unused buffers back to the system.
    pub fn trim(&self) {
        self.buffers.trim();
    }

    /// Runs `f`, and whatever it does in parallel, on the pool's threads.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.threads.install(f)
    }

    /// The ops that `f` runs here. One profile at a time: ops of other threads on this device would
    /// be included too.
    pub fn profiled<T>(&self, f: impl FnOnce() -> T) -> (T, Vec<OpRecord>) {
        self.profile.of(f)
    }

    /// Records an op, if a profile is wanted, until the guard is dropped.
    pub(crate) fn op(
        &self,
        op: &'static str,
        work: impl FnOnce() -> OpCost,
    ) -> Option<Running<'_>> {
        self.profile.op(op, work)
    }

    /// Runs `f(unit)` for every unit in `0..units`, in any order, on the pool's threads. Results
    /// must not depend on which thread runs which unit.
    pub fn for_each(&self, units: usize, f: impl Fn(usize) + Sync + Send) {
        if self.threads() == 1 || units <= 1 {
            return (0..units).for_each(f);
        }
        self.threads.install(|| (0..units).into_par_iter().with_max_len(1).for_each(&f));
    }

    /// Splits `data` into runs of `len` (the last may be shorter) and calls `f(index, run)` on
    /// each.
    pub fn chunks_mut<T: Send>(
        &self,
        data: &mut [T],
        len: usize,
        f: impl Fn(usize, &mut [T]) + Sync + Send,
    ) {
        let len = len.max(1);
        if self.threads() == 1 || data.len() <= len {
            return data.chunks_mut(len).enumerate().for_each(|(i, c)| f(i, c));
        }
        self.threads.install(|| data.par_chunks_mut(len).enumerate().for_each(|(i, c)| f(i, c)));
    }
}

/// A buffer of float64.
pub(crate) struct F64Buffer(Buffer);

impl std::ops::Deref for F64Buffer {
    type Target = [f64];
    fn deref(&self) -> &[f64] {
        bytemuck::cast_slice(&self.0)
    }
}

impl std::ops::DerefMut for F64Buffer {
    fn deref_mut(&mut self) -> &mut [f64] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}
