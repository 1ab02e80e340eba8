//! A daemon that dies between any two stores to a packed ring or its in-flight area, and comes back.

use pcache_vhost::vhost::packed_ring_lives;

/// Rings tried.
const RINGS: u64 = 40;

/// Every chain comes back once, over all deaths. Counts these in `images`.
pub fn packed_rings_that_die(images: &mut u64) {
    (1..=RINGS).for_each(|seed| packed_ring_lives(seed, images));
}
