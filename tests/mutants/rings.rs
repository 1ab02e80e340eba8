//! Scripts of a packed ring's driver, in which the daemon dies and comes back with the in-flight area.

use pcache_vhost::fuzz;
use pcache_vhost::sim::Rng;

/// Scripts tried.
const SCRIPTS: u64 = 4000;
/// Their second byte: a packed ring, with its chains tracked.
const PACKED: u8 = 64;
const UNTRACKED: u8 = 32;

/// Every chain comes back once, also over deaths. Counts the scripts in `images`.
pub fn packed_rings_that_die(images: &mut u64) {
    let mut rng = Rng::new(11);
    for _ in 0..SCRIPTS {
        *images += 1;
        let mut script: Vec<u8> = (0..rng.between(20, 300)).map(|_| rng.next() as u8).collect();
        // An honest ring: its addresses are where they belong.
        script[0] &= 0x7f;
        script[1] = script[1] & !UNTRACKED | PACKED;
        fuzz::ring(&script);
    }
}

#[test]
fn packed_rings_lose_and_repeat_no_chain_when_the_daemon_dies() {
    packed_rings_that_die(&mut 0);
}
