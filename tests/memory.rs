//! What the index costs in RAM, by the allocator's account: every byte asked for, with what glibc's
//! malloc adds to it, against the blocks it maps. The index keeps books of its own (`memory_bytes`); they
//! are held against this.
//!
//! One test: the account is the whole process's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use pcache_vhost::cache::index::{Extent, Index, Place};
use pcache_vhost::units::SectorRange;

/// The system's allocator, and how much of it is in use.
struct Counting;

static IN_USE: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What malloc takes for a request: a word of header, multiples of 16, 32 at least.
fn chunk(layout: Layout) -> u64 {
    ((layout.size() as u64 + 8).next_multiple_of(16)).max(32)
}

// SAFETY: all is left to the system's allocator, which keeps the contract.
#[expect(unsafe_code, reason = "counts what is allocated")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(chunk(layout), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(chunk(layout), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(place, layout) }
    }
}

/// An order in which every number below `count`, a power of two, comes once and no two neighbours
/// together.
fn scattered(count: u64) -> impl Iterator<Item = u64> {
    assert!(count.is_power_of_two());
    (0..count).map(move |n| {
        let mixed = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % count;
        (mixed ^ mixed >> (count.trailing_zeros() / 2)) % count
    })
}

/// Bytes per extent, by the allocator and by the index's own books, of extents of `len` sectors that
/// cover `1 / every` of 2 GiB, all shifted by `shift` sectors.
fn cost(len: u64, shift: u64, every: u64) -> (f64, f64) {
    const DISK: u64 = 2 << (30 - 9);
    let before = IN_USE.load(Ordering::Relaxed);
    let index = Index::new(256);
    let mut replaced = Vec::new();
    let mut count = 0;
    for number in scattered(DISK / len).take((DISK / len / every) as usize) {
        // Each to the next place of a log that another writer uses as well: nothing joins.
        let place = Place { position: count * (len + 1), zero: false, dirty: true };
        index.insert(Extent { range: SectorRange::new(number * len + shift, len), place }, &mut replaced);
        count += 1;
    }
    assert!(replaced.is_empty(), "every extent is new");
    let taken = IN_USE.load(Ordering::Relaxed) - before;
    (taken as f64 / count as f64, index.memory_bytes() as f64 / count as f64)
}

#[test]
fn a_random_4_kib_block_takes_at_most_12_bytes_of_the_heap() {
    for (what, len, shift, every, most) in [
        ("4 KiB, all of the disk", 8, 0, 1, 12.0),
        ("4 KiB, all of the disk, shifted by 7 sectors", 8, 7, 1, 12.0),
        ("4 KiB, half of it", 8, 0, 2, 12.0),
        ("4 KiB, half of it, shifted by 7 sectors", 8, 7, 2, 12.0),
        ("4 KiB, an eighth of it", 8, 0, 8, 12.0),
        ("4 KiB, an eighth of it, shifted by 7 sectors", 8, 7, 8, 12.0),
        ("512 bytes, an eighth of it", 1, 0, 8, 10.0),
        // No promise below, but a limit all the same: a table slot each.
        ("4 KiB, one in 256: a lone block in its MiB", 8, 0, 256, 96.0),
    ] {
        let (heap, own) = cost(len, shift, every);
        println!("{what:<50} {heap:>6.2} bytes of the heap, {own:>6.2} by the index's books");
        assert!(heap <= most, "{what}: {heap:.2} bytes, at most {most}");
        assert!((heap - own).abs() < heap / 8.0, "{what}: the books say {own:.2} and the heap {heap:.2}");
    }
    // Runs: each MiB is one entry, whatever the size of the writes it came by.
    let before = IN_USE.load(Ordering::Relaxed);
    let index = Index::new(256);
    for number in 0..1 << 18 {
        let place = Place { position: 5000 + number * 8, zero: false, dirty: true };
        let extent = Extent { range: SectorRange::new(number * 8, 8), place };
        index.insert(extent, &mut Vec::new());
    }
    let each = (IN_USE.load(Ordering::Relaxed) - before) as f64 / f64::from(1 << 18);
    println!("4 KiB, one after the other: {each:.2} bytes of the heap");
    assert!(each < 1.0, "{each:.2} bytes for a block of a run");
}
