//! Memory of a CUDA device.

use super::args::Pointer;
use super::{Cuda, record};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Memory of a CUDA device, freed when dropped, once everything that was launched before is done.
pub struct Memory {
    pub(super) cuda: Cuda,
    pub(super) address: u64,
    pub(super) bytes: usize,
    /// The memory that this is part of, if any: an arena's, or that on which [`Memory::part`] was
    /// called.
    pub(super) arena: Option<Arc<Memory>>,
}

impl Memory {
    /// The device that the memory belongs to.
    pub fn cuda(&self) -> &Cuda {
        &self.cuda
    }

    /// The address on the device, for tables that kernels read.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// The size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// `bytes` bytes of it from `byte` on, which live as long as either is used. What is written to
    /// one is read from both.
    ///
    /// # Panics
    /// Beyond its end.
    pub(crate) fn part(self: &Arc<Memory>, byte: usize, bytes: usize) -> Arc<Memory> {
        let within = byte.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        assert!(within, "{bytes} bytes from byte {byte} on of a buffer of {}", self.bytes);
        Arc::new(Memory {
            cuda: self.cuda.clone(),
            address: self.address + byte as u64,
            bytes,
            arena: Some(self.clone()),
        })
    }

    /// The contents from `byte` on, for a launch.
    ///
    /// # Panics
    /// `byte` is beyond the end.
    pub(crate) fn at(&self, byte: usize) -> Pointer<'_> {
        assert!(byte <= self.bytes, "byte {byte} of a buffer of {}", self.bytes);
        Pointer::new(self, self.address + byte as u64, self.cuda.id())
    }
}

impl<'a> From<&'a Arc<Memory>> for Pointer<'a> {
    fn from(memory: &'a Arc<Memory>) -> Pointer<'a> {
        memory.at(0)
    }
}

impl<'a> From<&'a Option<Arc<Memory>>> for Pointer<'a> {
    fn from(memory: &'a Option<Arc<Memory>>) -> Pointer<'a> {
        memory.as_ref().map_or(Pointer::none(), Pointer::from)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.arena.is_some() {
            return;
        }
        self.cuda.0.held[0].fetch_sub(self.bytes as u64, Ordering::Relaxed);
        if record::freed(self.cuda.id(), self.address) {
            let _stream = self.cuda.lock_stream();
            self.cuda.0.launcher.free(self.address);
        }
    }
}
