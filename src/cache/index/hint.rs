//! Asks the processor for a line of memory without waiting for it.
//!
//! A plain load would do but for the locks: an atomic read-modify-write waits until every load before it
//! has come, so a batch of lookups that touched its lines by loads between taking and leaving locks
//! would wait for one after the other. A prefetch is done as soon as it is asked for.

/// Brings what `place` refers to into the first-level cache, in its own time.
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "the intrinsic takes a raw pointer")]
#[inline]
pub(in crate::cache) fn prefetch<T>(place: &T) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch reads nothing into the program and faults at no address; SSE is part of x86-64.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(place).cast()) };
}

/// Elsewhere the lookups are left to themselves.
#[cfg(not(target_arch = "x86_64"))]
#[inline]
pub(in crate::cache) fn prefetch<T>(place: &T) {
    _ = place;
}
