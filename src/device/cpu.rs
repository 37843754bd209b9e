//! The CPU: its threads, its instruction set, its buffers.

use super::DeviceError;
use super::buffer::{Buffer, Pool};
use rayon::prelude::*;
use std::fmt;
use std::sync::Arc;

/// Instruction sets with kernels of their own, best last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Whatever the compiler's target guarantees.
    Portable,
    /// AVX2 and FMA: 8 floats.
    Avx2,
    /// AVX-512F: 16 floats.
    Avx512,
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        })
    }
}

impl Isa {
    /// The best this processor has.
    pub fn best() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                return Isa::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }

    /// The best, or a lesser one that the environment variable `PRISM_ISA` names.
    pub fn from_env() -> Result<Isa, DeviceError> {
        let best = Isa::best();
        let Ok(asked) = std::env::var("PRISM_ISA") else { return Ok(best) };
        let isa = match asked.as_str() {
            "" => return Ok(best),
            "portable" => Isa::Portable,
            "avx2" => Isa::Avx2,
            "avx512" => Isa::Avx512,
            _ => return Err(DeviceError::Isa { asked, problem: "not a known instruction set", best }),
        };
        if isa > best {
            return Err(DeviceError::Isa { asked, problem: "this processor does not have it", best });
        }
        Ok(isa)
    }
}

/// Host threads with a buffer pool. Clones share both.
#[derive(Clone)]
pub struct Cpu {
    threads: Arc<rayon::ThreadPool>,
    buffers: Arc<Pool>,
    isa: Isa,
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

    /// The same with a given instruction set, which the processor must have.
    pub fn with_isa(threads: usize, isa: Isa) -> Result<Cpu, DeviceError> {
        let best = Isa::best();
        if isa > best {
            let problem = "this processor does not have it";
            return Err(DeviceError::Isa { asked: isa.to_string(), problem, best });
        }
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
            n => n,
        };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("prism-{i}"))
            .build()
            .map_err(|source| DeviceError::Threads { threads, source })?;
        Ok(Cpu { threads: Arc::new(pool), buffers: Arc::new(Pool::default()), isa })
    }

    /// How many threads work.
    pub fn threads(&self) -> usize {
        self.threads.current_num_threads()
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// A buffer of `len` floats with unspecified contents.
    pub fn take(&self, len: usize) -> Buffer {
        self.buffers.take(len)
    }

    /// A buffer of `len` zeros.
    pub fn zeros(&self, len: usize) -> Buffer {
        let mut b = self.buffers.take(len);
        b.fill(0.0);
        b
    }

    /// Gives unused buffers back to the system.
    pub fn trim(&self) {
        self.buffers.trim();
    }

    /// Runs `f(unit)` for every unit in `0..units`, in any order, on the pool's threads. Results must not depend on who runs what.
    pub fn for_each(&self, units: usize, f: impl Fn(usize) + Sync + Send) {
        if self.threads() == 1 || units <= 1 {
            return (0..units).for_each(f);
        }
        self.threads.install(|| (0..units).into_par_iter().with_max_len(1).for_each(&f));
    }

    /// Splits `data` into runs of `len` (the last may be shorter) and calls `f(index, run)` on each.
    pub fn chunks_mut<T: Send>(&self, data: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync + Send) {
        let len = len.max(1);
        if self.threads() == 1 || data.len() <= len {
            return data.chunks_mut(len).enumerate().for_each(|(i, c)| f(i, c));
        }
        self.threads.install(|| data.par_chunks_mut(len).enumerate().for_each(|(i, c)| f(i, c)));
    }
}

/// A pointer that units of one op share, each writing its own part.
#[derive(Clone, Copy)]
pub struct Shared(*mut f32);
// Sound only as far as the units' parts are disjoint: that is each user's argument to make.
unsafe impl Send for Shared {}
unsafe impl Sync for Shared {}

impl Shared {
    /// Wraps a buffer that the caller borrows for the duration of the op.
    pub fn new(data: &mut [f32]) -> Shared {
        Shared(data.as_mut_ptr())
    }

    /// The address of element `offset`.
    ///
    /// # Safety
    /// `offset` lies within the wrapped buffer.
    pub unsafe fn at(self, offset: usize) -> *mut f32 {
        unsafe { self.0.add(offset) }
    }

    /// Elements `offset..offset + len`.
    ///
    /// # Safety
    /// They lie within the buffer, and nobody else touches them while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice<'a>(self, offset: usize, len: usize) -> &'a mut [f32] {
        unsafe { std::slice::from_raw_parts_mut(self.0.add(offset), len) }
    }
}
