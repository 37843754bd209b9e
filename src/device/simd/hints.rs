//! What processor and compiler are told beside arithmetic.

/// Asks for the cache line of a value before it is needed.
#[inline(always)]
pub fn prefetch(value: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction, which changes nothing but caches and does not fault.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(value.cast());
    }
    let _ = value;
}

/// The same value, of which the compiler knows nothing.
#[inline(always)]
pub fn opaque(value: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    let value = {
        let mut value = value;
        // SAFETY: no instruction at all.
        unsafe { std::arch::asm!("/* {0} */", inout(reg) value, options(pure, nomem, nostack, preserves_flags)) };
        value
    };
    value
}

/// Asks for the cache line of a value before it is written.
#[inline(always)]
pub fn prefetch_to_write(value: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above; processors without the instruction take it for none.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_ET0 }>(value.cast());
    }
    let _ = value;
}

/// Makes what [`Simd::stream`](super::Simd::stream) stored visible to threads that learn of it from here on.
#[inline(always)]
pub fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
