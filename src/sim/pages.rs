//! Bytes in shared pages: a copy costs a counter per page, and only what is written after it is its
//! own. Thousands of crash images of one instant differ in a few pages each.

use std::sync::Arc;

/// Bytes of a page.
pub(super) const PAGE: usize = 4096;

/// One page's bytes.
pub(super) type Page = [u8; PAGE];

/// See the module's head. An access may span pages; a [`Pages::slice`] may not.
#[derive(Clone, Debug)]
pub(super) struct Pages(Vec<Arc<Page>>);

impl Pages {
    /// `len` zero bytes, a multiple of [`PAGE`].
    pub fn new(len: usize) -> Pages {
        assert!(len.is_multiple_of(PAGE), "{len} bytes are not whole pages");
        let zeros = Arc::new([0; PAGE]);
        Pages(std::iter::repeat_n(zeros, len / PAGE).collect())
    }

    pub fn len(&self) -> usize {
        self.0.len() * PAGE
    }

    /// Zero bytes behind what there is, or less of it.
    pub fn resize(&mut self, len: usize) {
        assert!(len.is_multiple_of(PAGE), "{len} bytes are not whole pages");
        let zeros = Arc::new([0; PAGE]);
        self.0.resize_with(len / PAGE, || zeros.clone());
    }

    /// Whether no page has been written since one was copied from the other.
    pub fn is_shared(&self, other: &Pages) -> bool {
        self.0.len() == other.0.len() && self.0.iter().zip(&other.0).all(|(a, b)| Arc::ptr_eq(a, b))
    }

    /// A page, to be shared.
    pub fn page(&self, number: usize) -> &Arc<Page> {
        &self.0[number]
    }

    pub fn set_page(&mut self, number: usize, page: Arc<Page>) {
        self.0[number] = page;
    }

    /// Bytes that lie in one page.
    pub fn slice(&self, at: usize, len: usize) -> &[u8] {
        &self.0[at / PAGE][at % PAGE..][..len]
    }

    /// The bytes from `at` to the end of its page.
    pub fn rest_mut(&mut self, at: usize) -> &mut [u8] {
        &mut Arc::make_mut(&mut self.0[at / PAGE])[at % PAGE..]
    }

    pub fn read(&self, at: usize, dst: &mut [u8]) {
        let mut done = 0;
        for (page, range) in split(at, dst.len()) {
            let n = range.len();
            dst[done..done + n].copy_from_slice(&self.0[page][range]);
            done += n;
        }
    }

    pub fn write(&mut self, at: usize, src: &[u8]) {
        let mut done = 0;
        for (page, range) in split(at, src.len()) {
            let n = range.len();
            Arc::make_mut(&mut self.0[page])[range].copy_from_slice(&src[done..done + n]);
            done += n;
        }
    }
}

/// The pages of a range, and what of each is in it.
pub(super) fn split(at: usize, len: usize) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
    let end = at + len;
    (at / PAGE..end.div_ceil(PAGE)).map(move |page| {
        let base = page * PAGE;
        (page, at.max(base) - base..end.min(base + PAGE) - base)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_keeps_what_it_was_whatever_the_original_becomes() {
        let mut pages = Pages::new(3 * PAGE);
        pages.write(PAGE - 2, &[1, 2, 3, 4]);
        let copy = pages.clone();
        pages.write(PAGE - 1, &[7, 8]);
        let read = |pages: &Pages| {
            let mut bytes = [9; 6];
            pages.read(PAGE - 3, &mut bytes);
            bytes
        };
        assert_eq!(read(&copy), [0, 1, 2, 3, 4, 0]);
        assert_eq!(read(&pages), [0, 1, 7, 8, 4, 0]);
        assert!(Arc::ptr_eq(pages.page(2), copy.page(2)), "nobody wrote to it");
    }
}
