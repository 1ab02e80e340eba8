//! Memory that O_DIRECT accepts: aligned to a page, a multiple of a page long underneath.

/// A block of bytes aligned to 4 KiB, with a visible length that may be shorter than what is
/// allocated. Zeroed when made.
pub struct AlignedBuf {
    pages: Vec<Page>,
    len: usize,
}

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

impl AlignedBuf {
    /// `len` zero bytes.
    pub fn new(len: usize) -> Self {
        Self { pages: vec![Page([0; 4096]); len.div_ceil(4096)], len }
    }

    /// Visible length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes allocated: the longest visible length it can be given.
    pub fn capacity(&self) -> usize {
        self.pages.len() * 4096
    }

    /// Changes the visible length; the content stays what it was. Panics past the capacity.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity(), "{len} bytes do not fit a buffer of {}", self.capacity());
        self.len = len;
    }

    /// Start of the memory, for the kernel.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.pages.as_mut_ptr().cast()
    }
}

impl std::ops::Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let (pages, len) = (&self.pages, self.len);
        &pages.as_flattened_bytes()[..len]
    }
}

impl std::ops::DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        &mut self.pages.as_flattened_bytes_mut()[..len]
    }
}

/// A slice of pages seen as the bytes they are.
trait PageBytes {
    fn as_flattened_bytes(&self) -> &[u8];
    fn as_flattened_bytes_mut(&mut self) -> &mut [u8];
}

impl PageBytes for Vec<Page> {
    #[expect(unsafe_code, reason = "pages are plain bytes with a larger alignment")]
    fn as_flattened_bytes(&self) -> &[u8] {
        // SAFETY: `Page` is `repr(C)` over exactly 4096 bytes with no padding, so the vector's
        // memory is `4096 * len` initialised bytes, borrowed for as long as `self`.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), self.len() * 4096) }
    }

    #[expect(unsafe_code, reason = "pages are plain bytes with a larger alignment")]
    fn as_flattened_bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and any byte pattern is a valid `Page`.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), self.len() * 4096) }
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}
