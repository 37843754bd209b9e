//! The CPU as a device: its threads, its instruction set, its buffers.

use super::buffer::{Buffer, Workspace};
use super::profile::{OpCost, OpRecord, Profile, Running};
use super::{DType, DeviceError, Isa, processors};
use rayon::prelude::*;
use std::fmt;
use std::sync::Arc;

/// Host threads, and a workspace that buffers are allocated from. Clones share both.
///
/// Memory of dropped buffers stays in the workspace for later ones ([`Cpu::trim`] gives it back).
/// It counts against the budget of [`crate::memory`]. Where the budget or the system refuses
/// memory, allocations unwind to [`memory::caught`](crate::memory::caught).
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
    /// Starts `threads` threads (0: one per available core) that use the instruction set of
    /// [`Isa::from_env`].
    ///
    /// # Errors
    /// `PRISM_ISA` names no instruction set of this processor, or the system refuses the threads.
    pub fn new(threads: usize) -> Result<Cpu, DeviceError> {
        Cpu::with_isa(threads, Isa::from_env()?)
    }

    /// Starts `threads` threads (0: one per available core) that use a given instruction set.
    ///
    /// # Errors
    /// The system refuses the threads.
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

    /// This CPU with products in bfloat16, which dense layers and direct convolutions use; sums are
    /// in float32. None if the processor, or the instruction set in use, has no such products.
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

    /// A buffer of `len` floats with unspecified contents; in debug builds they are NaN.
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

    /// A copy of `values` in memory of its own, outside the part of the workspace that ops share:
    /// for results that live long, which would fragment it.
    pub fn persistent_copy(&self, values: &[f32]) -> Buffer {
        let mut buffer = self.alloc_persistent(values.len());
        let run = 1 << 16;
        self.chunks_mut(&mut buffer, run, |unit, to| {
            to.copy_from_slice(&values[unit * run..][..to.len()])
        });
        buffer
    }

    /// Bytes that the workspace has from the system, in use or kept for later buffers; without
    /// those that persistent copies ([`Cpu::persistent_copy`]) are using.
    pub fn held_bytes(&self) -> usize {
        self.buffers.bytes()
    }

    /// Bytes of the workspace's buffers that are in use, without persistent copies.
    pub(crate) fn bytes_in_use(&self) -> usize {
        self.buffers.bytes_in_use()
    }

    /// A buffer of `len` zeros.
    pub fn zeros(&self, len: usize) -> Buffer {
        let mut b = self.alloc(len);
        b.fill(0.0);
        b
    }

    /// Gives memory that no buffer uses back to the system.
    pub fn trim(&self) {
        self.buffers.trim();
    }

    /// Runs `f` on one of this CPU's threads, and what it does in parallel with rayon on all of
    /// them; waits for the result. A panic continues in the caller.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.threads.install(f)
    }

    /// Runs `f`, and returns its result and a record of each op that ran meanwhile on this CPU or
    /// its clones, in the order in which they ended.
    ///
    /// Ops that other threads run are included, so only one profile may be taken at a time.
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

    /// Runs `f(unit)` for every unit in `0..units`, in any order, on this CPU's threads, and waits
    /// for all. Results must not depend on which thread runs which unit.
    pub fn for_each(&self, units: usize, f: impl Fn(usize) + Sync + Send) {
        if self.threads() == 1 || units <= 1 {
            return (0..units).for_each(f);
        }
        self.threads.install(|| (0..units).into_par_iter().with_max_len(1).for_each(&f));
    }

    /// Splits `data` into chunks of `len` values (the last may be shorter; 0 counts as 1), calls
    /// `f(index, chunk)` for each, in any order, on this CPU's threads, and waits for all.
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
