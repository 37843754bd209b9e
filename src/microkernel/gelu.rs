//! GELU over a run of values.

use crate::device::simd::{self, multiversion};

multiversion! {
    /// The exact-erf GELU of each value, in place.
    pub(crate) fn gelu_run(data: &mut [f32]) {
        for v in data {
            *v = simd::gelu::<FUSED>(*v);
        }
    }
}
