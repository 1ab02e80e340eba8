//! Liveness words between the threads that mark, the thread that writes, and the media.

use std::sync::Arc;

use super::weave;
use super::world::{Bench, SCARCE, write_back};
use crate::cache::Order;
use crate::onmedia::liveness_bits;
use crate::pmem::{MediaClass, Pmem};
use crate::sim::{DiskSurvival, Rng, SimPmem, Survival, World};
use crate::sync::thread;

/// The word of the media that says which of the first 32 sectors of segment `id` are dead, after a
/// crash that keeps nothing that was not durable.
fn word_after_crash(bench: &Bench, id: u32) -> u64 {
    let snapshot = bench.stage.world.photograph("a look");
    let (image, _) = snapshot.host_crash(&Survival::Nothing, DiskSurvival::Nothing, &mut Rng::new(1));
    let media = &bench.cache.media;
    let mut word = [0; 8];
    let at = media.in_segment(id, media.geometry.liveness_offset());
    SimPmem::new(&World::new(image, 1)).read(at, &mut word).unwrap();
    u64::from_le_bytes(word)
}

/// Queues bypassing the cache and the housekeeper all kill and then write words; each goes on only
/// once everything it killed, and all that was killed before, cannot come back.
#[test]
fn whoever_has_written_the_liveness_words_may_rely_on_all_marks_made_before() {
    weave(40, || {
        let bench = Arc::new(Bench::new(MediaClass::AssumeDax, write_back(Order::Strict), SCARCE, 2, 64));
        let open = bench.cache.open_segment(&bench.volume.core, 0, false).unwrap();
        let (id, generation) = (open.id, open.generation);
        let threads: Vec<_> = (0..3)
            .map(|me| {
                let bench = bench.clone();
                thread::spawn(move || {
                    for round in 0..2 {
                        // Every thread has bits of its own in one and the same word.
                        let first = me * 8 + round * 4;
                        bench.cache.mark_sectors_dead(id, first, 4);
                        bench.cache.write_liveness(None).unwrap();
                        let word = word_after_crash(&bench, id);
                        let bits = liveness_bits(&bench.cache.media.secret, id, generation, 0, word).unwrap();
                        assert_eq!(
                            bits >> first & 0xf,
                            0xf,
                            "sectors {first}+4 are not durably dead: {bits:#x}"
                        );
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
    });
}
