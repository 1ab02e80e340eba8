//! Copies between guest memory and ours, the only way either is touched.
//!
//! The guest's memory belongs to another process, which may truncate the file behind it whenever it
//! likes. So every access, down to a ring's index, goes through the guarded routines, which return
//! [`Fault`] where a plain access would raise SIGBUS. They cost a call each: about a nanosecond.
//!
//! Invariants:
//! - no reference into guest memory ever exists, only raw pointers that live for one copy;
//! - indices that both sides use to synchronise are read and written by a single access.

use std::sync::atomic::{Ordering, fence};

pub(super) use crate::pmem::guard::{Fault, copy_in, copy_out, prefetch};
use crate::sync::access;

/// A moment at which a test may let the process die: before each access to what outlives it.
#[cfg(not(any(test, feature = "sim")))]
#[inline(always)]
pub(super) fn step() {}
#[cfg(any(test, feature = "sim"))]
pub(super) use super::testing::step;

/// Reads a 16-bit index; what its writer stored before it is visible afterwards (acquire).
///
/// # Safety
/// As [`copy_in`] for two bytes.
///
/// # Errors
/// [`Fault`]: it is not there.
#[expect(unsafe_code, reason = "touches guest memory")]
pub(super) unsafe fn load_u16(src: *const u8) -> Result<u16, Fault> {
    let mut bytes = [0; 2];
    access();
    // SAFETY: the caller vouches for `src`.
    unsafe { copy_in(src, &mut bytes) }?;
    fence(Ordering::Acquire);
    Ok(u16::from_le_bytes(bytes))
}

/// Stores a 16-bit index after everything this thread stored before (release).
///
/// # Safety
/// As [`copy_out`] for two bytes.
///
/// # Errors
/// [`Fault`]: it is not there.
#[expect(unsafe_code, reason = "touches guest memory")]
pub(super) unsafe fn store_u16(dst: *mut u8, value: u16) -> Result<(), Fault> {
    fence(Ordering::Release);
    access();
    step();
    // SAFETY: the caller vouches for `dst`.
    unsafe { copy_out(&value.to_le_bytes(), dst) }
}
