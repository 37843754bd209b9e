//! Scans: files, geometry, resampling, patches. Knows nothing of tensors on devices.

pub mod output;
