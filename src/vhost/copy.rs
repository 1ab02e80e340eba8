//! Copies between guest memory and ours, the only way either is touched.
//!
//! These are the plain routines. Their signatures are those of the guarded ones, which return
//! [`Fault`] when the page behind an address is gone, so a call site never knows the difference.
//!
//! Invariants:
//! - no reference into guest memory ever exists, only raw pointers that live for one copy;
//! - indices that both sides use to synchronise are read and written as whole 16-bit units.

use std::sync::atomic::{AtomicU16, Ordering};

/// The memory behind an address was not there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Fault;

/// Copies `dst.len()` bytes of guest memory from `src`.
///
/// # Safety
/// `src..src + dst.len()` lies in a mapping of guest memory that lives as long as the call.
#[expect(unsafe_code, reason = "touches guest memory")]
pub(super) unsafe fn copy_in(src: *const u8, dst: &mut [u8]) -> Result<(), Fault> {
    // SAFETY: the caller vouches for `src`; `dst` is ours, so the two cannot overlap.
    unsafe { std::ptr::copy_nonoverlapping(src, dst.as_mut_ptr(), dst.len()) };
    Ok(())
}

/// Copies `src` to guest memory at `dst`.
///
/// # Safety
/// `dst..dst + src.len()` lies in a writable mapping of guest memory that lives as long as the call.
#[expect(unsafe_code, reason = "touches guest memory")]
pub(super) unsafe fn copy_out(src: &[u8], dst: *mut u8) -> Result<(), Fault> {
    // SAFETY: the caller vouches for `dst`; `src` is ours, so the two cannot overlap.
    unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), dst, src.len()) };
    Ok(())
}

/// Reads a 16-bit index; what its writer stored before it is visible afterwards (acquire).
///
/// # Safety
/// As [`copy_in`] for two bytes, and `src` is 2-aligned.
#[expect(unsafe_code, reason = "touches guest memory")]
pub(super) unsafe fn load_u16(src: *const u8) -> Result<u16, Fault> {
    // SAFETY: valid and aligned by the caller's word; only atomics touch these bytes on our side.
    Ok(u16::from_le(unsafe { AtomicU16::from_ptr(src.cast_mut().cast()) }.load(Ordering::Acquire)))
}

/// Stores a 16-bit index after everything this thread stored before (release).
///
/// # Safety
/// As [`copy_out`] for two bytes, and `dst` is 2-aligned.
#[expect(unsafe_code, reason = "touches guest memory")]
pub(super) unsafe fn store_u16(dst: *mut u8, value: u16) -> Result<(), Fault> {
    // SAFETY: valid and aligned by the caller's word; only atomics touch these bytes on our side.
    unsafe { AtomicU16::from_ptr(dst.cast()) }.store(value.to_le(), Ordering::Release);
    Ok(())
}
