//! Upgrades: a successor reads ahead, the other one goes on and is gone, and recovery finds what is there.

use pcache_vhost::sim::upgrade::{Counts, upgrade};

/// Upgrades tried.
const UPGRADES: u64 = 60;

/// What was read ahead counts where nothing has changed, and nowhere else. Counts upgrades in `images`.
pub fn with_a_look_ahead(images: &mut u64) {
    for seed in 0..UPGRADES {
        *images += 1;
        upgrade(seed, &mut Counts::default());
    }
}
