//! Data that is laid out once for each device: above all weights.

use super::{Cuda, CudaError, DType, record};
use crate::sync::{locked, own};
use std::sync::{Arc, Mutex};

/// Something laid out once for each device and element type that asks for it.
pub(crate) struct DeviceCache<T>(Mutex<Vec<(u64, DType, Arc<T>)>>);

impl<T> Default for DeviceCache<T> {
    fn default() -> DeviceCache<T> {
        DeviceCache(Mutex::default())
    }
}

impl<T> DeviceCache<T> {
    fn all(&self) -> std::sync::MutexGuard<'_, Vec<(u64, DType, Arc<T>)>> {
        locked(&self.0)
    }

    /// The value for `cuda` and `dtype`, or the one that `make` makes. It stays: recorded work
    /// takes no part in it. If two threads make it at the same time, both get the one that was
    /// stored first.
    pub(crate) fn get<E: From<CudaError>>(
        &self,
        cuda: &Cuda,
        dtype: DType,
        make: impl FnOnce() -> Result<Arc<T>, E>,
    ) -> Result<Arc<T>, E> {
        let find = |all: &[(u64, DType, Arc<T>)]| {
            all.iter()
                .find(|(id, d, _)| (*id, *d) == (cuda.id(), dtype))
                .map(|(.., found)| found.clone())
        };
        if let Some(found) = find(&self.all()) {
            return Ok(found);
        }
        // Made without the lock: what is made is copied with the device's stream held, and the
        // thread that holds it may be waiting for the lock. For the same reason nothing is dropped
        // within it.
        let made = record::outside_capture(cuda.id(), make)?;
        let mut all = self.all();
        let kept = find(&all).unwrap_or_else(|| {
            all.push((cuda.id(), dtype, made.clone()));
            made.clone()
        });
        drop(all);
        Ok(kept)
    }

    /// Forgets everything, because what it was made from changes.
    pub(crate) fn clear(&mut self) {
        own(&mut self.0).clear();
    }
}
