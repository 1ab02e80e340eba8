//! Bytes at their place in this process that belong to somebody else: a guest's, who may change them or
//! take them away at any moment. They are lent for one copy.
//!
//! Whoever makes one from an address vouches for what the guarded copies need: the range was mapped, and
//! its addresses stay reserved while it is lent. No Rust reference to the bytes is ever made from it.

use std::marker::PhantomData;

use super::{Fault, copy_in, copy_out, prefetch};

/// Bytes of a line of the processor's caches.
const LINE: usize = 64;
/// Bytes that are asked for before a copy.
const PREFETCH_LEN: usize = 8 * LINE;

/// Bytes to copy from.
#[derive(Clone, Copy, Debug)]
pub struct ForeignSlice<'a> {
    at: *const u8,
    len: usize,
    lent: PhantomData<&'a [u8]>,
}

/// Bytes to copy to.
#[derive(Debug)]
pub struct ForeignSliceMut<'a> {
    at: *mut u8,
    len: usize,
    lent: PhantomData<&'a mut [u8]>,
}

impl<'a> ForeignSlice<'a> {
    /// `len` bytes from `at` on.
    ///
    /// # Safety
    /// They were mapped readable, and their addresses stay reserved for `'a`.
    #[expect(unsafe_code, reason = "the contract on the range cannot be checked")]
    pub unsafe fn new(at: *const u8, len: usize) -> Self {
        Self { at, len, lent: PhantomData }
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where they begin, for a guarded routine.
    pub(in crate::pmem) fn start(&self) -> *const u8 {
        self.at
    }

    /// Asks the processor for the first lines, and does not wait: by the time they are copied they have
    /// come, and the processor has seen where it goes on. A hint, which faults nowhere.
    pub fn prefetch(&self) {
        for at in (0..self.len.min(PREFETCH_LEN)).step_by(LINE) {
            prefetch(self.at.wrapping_add(at));
        }
    }

    /// Copies all of them.
    ///
    /// # Errors
    /// [`Fault`]: some are gone; `dst` is unspecified.
    #[expect(unsafe_code, reason = "copies what is lent")]
    pub fn copy_to(&self, dst: &mut [u8]) -> Result<(), Fault> {
        assert_eq!(dst.len(), self.len, "all of them");
        // SAFETY: whoever made it vouches for the range.
        unsafe { copy_in(self.at, dst) }
    }
}

impl<'a> From<&'a [u8]> for ForeignSlice<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self { at: bytes.as_ptr(), len: bytes.len(), lent: PhantomData }
    }
}

impl<'a> ForeignSliceMut<'a> {
    /// `len` bytes from `at` on.
    ///
    /// # Safety
    /// They were mapped writable, their addresses stay reserved for `'a`, and no Rust reference to them
    /// exists meanwhile.
    #[expect(unsafe_code, reason = "the contract on the range cannot be checked")]
    pub unsafe fn new(at: *mut u8, len: usize) -> Self {
        Self { at, len, lent: PhantomData }
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where they begin, for a guarded routine.
    pub(in crate::pmem) fn start(&mut self) -> *mut u8 {
        self.at
    }

    /// Overwrites all of them.
    ///
    /// # Errors
    /// [`Fault`]: some are gone; others may have been written.
    #[expect(unsafe_code, reason = "copies to what is lent")]
    pub fn copy_from(&mut self, src: &[u8]) -> Result<(), Fault> {
        assert_eq!(src.len(), self.len, "all of them");
        // SAFETY: whoever made it vouches for the range.
        unsafe { copy_out(src, self.at) }
    }
}

impl<'a> From<&'a mut [u8]> for ForeignSliceMut<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        Self { at: bytes.as_mut_ptr(), len: bytes.len(), lent: PhantomData }
    }
}
