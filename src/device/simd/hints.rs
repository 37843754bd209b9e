//! Hints to the processor and the compiler that are not arithmetic.

/// The purpose for which a value is prefetched.
#[derive(Clone, Copy)]
pub enum Access {
    Read,
    Write,
}

/// Asks for the cache line of a value before it is needed.
#[inline(always)]
pub fn prefetch(value: *const f32, access: Access) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction to read, and processors without the one to write
    // ignore it; both change nothing but caches and do not fault.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T1, _mm_prefetch};
        match access {
            Access::Read => _mm_prefetch::<_MM_HINT_T1>(value.cast()),
            Access::Write => _mm_prefetch::<_MM_HINT_ET0>(value.cast()),
        }
    }
    let _ = (value, access);
}

/// Returns a value in such a way that the compiler knows nothing of it.
#[inline(always)]
pub fn opaque(value: usize) -> usize {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    let value = {
        let mut value = value;
        // SAFETY: no instruction at all.
        unsafe {
            std::arch::asm!("/* {0} */", inout(reg) value, options(pure, nomem, nostack, preserves_flags))
        };
        value
    };
    value
}

/// Makes what [`Simd::stream`](super::Simd::stream) stored visible to threads that synchronise with
/// this one from here on.
#[inline(always)]
pub fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
