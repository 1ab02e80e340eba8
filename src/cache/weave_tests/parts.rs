//! One protocol at a time, with as little around it as it can do without.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{pause, weave};
use crate::cache::core::Signal;
use crate::cache::segments::Segment;
use crate::cache::stripes::Stripes;
use crate::cache::syncer::{Outcome, Syncer};
use crate::cache::volume::{QueueShared, VolumeCore};
use crate::onmedia::{Geometry, VolumeDescriptor};
use crate::pmem::{MediaClass, MediaError, Pmem, SyncError};
use crate::sync::atomic::Ordering;
use crate::sync::thread;
use crate::units::SectorRange;
use crate::wake::Waker;

fn core(queues: u16) -> Arc<VolumeCore> {
    let core = VolumeCore::new(VolumeDescriptor::default(), 0, 1);
    core.queues.grow_to(queues.into(), QueueShared::new);
    Arc::new(core)
}

/// FLUSH raises the epoch while queues commit. Strict write-back moves the tail to a closed epoch
/// after one look for its records, so one that came later would count as written and never be.
#[test]
fn nothing_is_published_in_an_epoch_that_was_closed_before() {
    weave(60, || {
        let core = core(2);
        let closed = Arc::new(AtomicU64::new(0));
        let committers = (0..2).map(|q| {
            let (core, closed) = (core.clone(), closed.clone());
            thread::spawn(move || {
                for _ in 0..3 {
                    let epoch = core.announce(q);
                    core.stamp(epoch);
                    pause();
                    let closed = closed.load(Relaxed);
                    assert!(epoch > closed, "published in epoch {epoch}, closed was {closed}");
                    core.retract(q);
                }
            })
        });
        let closers = (0..2).map(|_| {
            let (core, closed) = (core.clone(), closed.clone());
            thread::spawn(move || {
                for _ in 0..3 {
                    core.raise_epoch();
                    closed.fetch_max(core.closed_epoch(), Relaxed);
                }
            })
        });
        let threads: Vec<_> = committers.chain(closers).collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
    });
}

/// Two queues may FLUSH at once, and each must be able to rely on the other's raise.
#[test]
fn after_a_flush_whatever_had_completed_is_in_an_older_epoch() {
    weave(60, || {
        let core = core(2);
        let completed = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (0..2)
            .map(|q| {
                let (core, completed) = (core.clone(), completed.clone());
                thread::spawn(move || {
                    for _ in 0..3 {
                        let epoch = core.announce(q);
                        core.stamp(epoch);
                        core.retract(q);
                        // A guest sees a completion in its ring, and with it all that came before.
                        let before = completed.fetch_max(epoch, Ordering::AcqRel).max(epoch);
                        core.raise_epoch();
                        let now = core.epoch();
                        assert!(now > before, "epoch {now} after a flush, {before} had completed");
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
    });
}

/// Whoever unmapped something and then waited may reuse it: no reader still goes by what it looked
/// up before.
#[test]
fn no_reader_holds_what_was_unmapped_before_the_wait() {
    weave(60, || {
        let core = core(2);
        let (mapped, reused) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
        let readers = (0..2).map(|q| {
            let (core, mapped, reused) = (core.clone(), mapped.clone(), reused.clone());
            thread::spawn(move || {
                for _ in 0..3 {
                    let shared = core.queue(q);
                    shared.enter();
                    pause();
                    if mapped.load(Relaxed) {
                        pause();
                        assert!(!reused.load(Relaxed), "reused under a reader");
                    }
                    shared.leave();
                }
            })
        });
        let readers: Vec<_> = readers.collect();
        pause();
        mapped.store(false, Relaxed);
        core.wait_for_readers();
        reused.store(true, Relaxed);
        readers.into_iter().for_each(|t| t.join().unwrap());
    });
}

/// Queues mark, one writer at a time takes: what is marked is taken with or after the mark, so the
/// words last written say all that is dead.
#[test]
fn the_words_last_taken_say_everything_that_was_marked() {
    weave(60, || {
        let geometry = Geometry::custom(16 << 10, 32 << 10, 4, 1).unwrap();
        let segment = Arc::new(Segment::default());
        segment.begin(&geometry, 1, 1, 1);
        let written = Arc::new(crate::sync::Mutex::new([0u32; 2]));
        let write = |segment: &Segment, written: &crate::sync::Mutex<[u32; 2]>| {
            let mut words = written.lock().unwrap();
            segment.take_changed(|word, bits| words[word as usize] = bits);
            *words
        };
        let threads: Vec<_> = (0..3)
            .map(|me| {
                let (segment, written) = (segment.clone(), written.clone());
                thread::spawn(move || {
                    for round in 0..2 {
                        // Of both words, and of words that others mark as well.
                        let first = me * 4 + round * 32;
                        assert_eq!(segment.mark_dead(first, 4), 4);
                        let words = write(&segment, &written);
                        assert_eq!(words[round as usize] >> (me * 4) & 0xf, 0xf, "{words:x?}");
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(*written.lock().unwrap(), [0xfff; 2]);
    });
}

#[test]
fn overlapping_batches_are_published_one_after_the_other_whatever_order_they_name_ranges_in() {
    const REGION: u64 = 2048;
    weave(40, || {
        let stripes = Arc::new(Stripes::new(1 << 24));
        let holders: Arc<Vec<Mutex<Option<u64>>>> = Arc::new((0..3).map(|_| Mutex::new(None)).collect());
        let batches = [[0u64, 1], [1, 0], [2, 1]];
        let threads: Vec<_> = (0u64..)
            .zip(batches)
            .map(|(me, batch)| {
                let (stripes, holders) = (stripes.clone(), holders.clone());
                thread::spawn(move || {
                    let mut scratch = Vec::new();
                    for _ in 0..2 {
                        let ranges = batch.iter().map(|r| SectorRange::new(r * REGION + 8, 8));
                        let held = stripes.hold(ranges, &mut scratch);
                        for &region in &batch {
                            let other = holders[region as usize].lock().unwrap().replace(me);
                            assert_eq!(other, None, "two hold region {region}");
                        }
                        pause();
                        for &region in &batch {
                            *holders[region as usize].lock().unwrap() = None;
                        }
                        drop(held);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
    });
}

/// A miss reads the disk while writes go around the cache: what it read may become cached only if
/// it is what the disk holds for good.
#[test]
fn a_fill_that_is_whole_shows_what_the_disk_shows() {
    const RANGE: SectorRange = SectorRange { start: 16, len: 8 };
    /// A disk write is under way.
    const TORN: u64 = u64::MAX;
    weave(60, || {
        let stripes = Arc::new(Stripes::new(1 << 24));
        let disk = Arc::new(AtomicU64::new(0));
        let fills = (0..2).map(|_| {
            let (stripes, disk) = (stripes.clone(), disk.clone());
            thread::spawn(move || {
                let mut scratch = Vec::new();
                for _ in 0..2 {
                    let ticket = stripes.place(RANGE);
                    pause();
                    let read = disk.load(Relaxed);
                    pause();
                    let held = stripes.hold(std::iter::once(RANGE), &mut scratch);
                    if stripes.is_whole(ticket, RANGE) {
                        assert_eq!(read, disk.load(Relaxed), "a fill would hide the disk's bytes");
                        assert_ne!(read, TORN);
                    }
                    drop(held);
                    stripes.remove(ticket, RANGE);
                }
            })
        });
        let bypasses = (1..3).map(|value| {
            let (stripes, disk) = (stripes.clone(), disk.clone());
            thread::spawn(move || {
                let mut scratch = Vec::new();
                let ticket = loop {
                    match stripes.bypass(RANGE, &mut scratch) {
                        Some(ticket) => break ticket,
                        None => thread::yield_now(),
                    }
                };
                let before = disk.swap(TORN, Relaxed);
                assert_ne!(before, TORN, "two writes to one place of the disk at once");
                pause();
                disk.store(value, Relaxed);
                stripes.remove(ticket, RANGE);
            })
        });
        let threads: Vec<_> = fills.chain(bypasses).collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
    });
}

/// A commit looks whether anything is registered, and a miss looks whether anything is committed:
/// one of them must see the other.
#[test]
fn a_commit_and_a_miss_of_the_same_range_notice_each_other() {
    const RANGE: SectorRange = SectorRange { start: 16, len: 8 };
    weave(60, || {
        let stripes = Arc::new(Stripes::new(1 << 24));
        let committed = Arc::new(AtomicU64::new(0));
        let miss = {
            let (stripes, committed) = (stripes.clone(), committed.clone());
            thread::spawn(move || {
                let ticket = stripes.place(RANGE);
                pause();
                if committed.load(Relaxed) == 0 {
                    let mut scratch = Vec::new();
                    let held = stripes.hold(std::iter::once(RANGE), &mut scratch);
                    let is_whole = stripes.is_whole(ticket, RANGE);
                    assert_eq!(is_whole, committed.load(Relaxed) == 0, "a fill beside newer bytes");
                    drop(held);
                }
                stripes.remove(ticket, RANGE);
            })
        };
        let commit = thread::spawn(move || {
            let mut scratch = Vec::new();
            let held = stripes.hold(std::iter::once(RANGE), &mut scratch);
            pause();
            committed.store(1, Relaxed);
            stripes.break_placeholders(RANGE);
            drop(held);
        });
        miss.join().unwrap();
        commit.join().unwrap();
    });
}

#[test]
fn a_raise_is_never_lost_on_the_way_to_sleep() {
    weave(40, || {
        let (signal, work) = (Arc::new(Signal::default()), Arc::new(AtomicU64::new(0)));
        let raisers: Vec<_> = (0..2)
            .map(|_| {
                let (signal, work) = (signal.clone(), work.clone());
                thread::spawn(move || {
                    for _ in 0..2 {
                        work.fetch_add(1, Relaxed);
                        signal.raise();
                    }
                })
            })
            .collect();
        let mut done = 0;
        while done < 4 {
            // It never times out here.
            signal.wait(std::time::Duration::from_secs(1));
            done += work.swap(0, Relaxed);
        }
        raisers.into_iter().for_each(|t| t.join().unwrap());
    });
}

/// Page-cache media of one number: what is stored, and what of it is durable.
#[derive(Default)]
struct Ledger {
    stored: AtomicU64,
    durable: AtomicU64,
    /// The `sync` that fails, counted from 1; 0 for none.
    fails: u64,
    syncs: AtomicU64,
}

impl Pmem for Ledger {
    fn len(&self) -> u64 {
        4096
    }

    fn class(&self) -> MediaClass {
        MediaClass::PageCache
    }

    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), MediaError> {
        Ok(())
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), MediaError> {
        self.stored.fetch_add(1, Relaxed);
        Ok(())
    }

    fn fence(&self) {}

    fn sync(&self) -> Result<(), SyncError> {
        let covered = self.stored.load(Relaxed);
        pause();
        if self.syncs.fetch_add(1, Relaxed) + 1 == self.fails {
            return Err(SyncError(std::io::Error::from_raw_os_error(5)));
        }
        self.durable.fetch_max(covered, Relaxed);
        Ok(())
    }
}

impl Ledger {
    /// Stores, and returns what is stored then.
    fn store(&self) -> u64 {
        self.stored.fetch_add(1, Relaxed) + 1
    }
}

/// Requesters that block, one that sleeps on its eventfd, and the syncing thread. Nothing times out
/// here: a lost wake-up is a hang.
#[test]
fn a_ticket_that_is_reached_covers_all_that_was_stored_before_it_and_wakes_its_owner() {
    for fails in [0, 1, 2] {
        weave(30, move || {
            let pmem = Arc::new(Ledger { fails, ..Ledger::default() });
            let syncer = Arc::new(Syncer::new(MediaClass::PageCache));
            let (s, p) = (syncer.clone(), pmem.clone());
            let runner = thread::spawn(move || s.run(&*p));
            let waiters = (0..2).map(|_| {
                let (syncer, pmem) = (syncer.clone(), pmem.clone());
                thread::spawn(move || {
                    for _ in 0..2 {
                        let mine = pmem.store();
                        let ticket = syncer.request(&*pmem, None);
                        pause();
                        match syncer.wait(&*pmem, ticket) {
                            Outcome::Reached => assert!(pmem.durable.load(Relaxed) >= mine),
                            Outcome::Failed => assert_ne!(fails, 0),
                            Outcome::Waiting => panic!("an undecided end of a wait"),
                        }
                    }
                })
            });
            let (s, p) = (syncer.clone(), pmem.clone());
            let sleeper = thread::spawn(move || {
                let event = EventFd::new(EFD_NONBLOCK).unwrap();
                let waker = Waker::new(event.try_clone().unwrap());
                for _ in 0..2 {
                    let mine = p.store();
                    let ticket = s.request(&*p, Some(&waker));
                    while s.outcome(ticket) == Outcome::Waiting {
                        while event.read().is_err() {
                            thread::yield_now();
                        }
                    }
                    match s.outcome(ticket) {
                        Outcome::Reached => assert!(p.durable.load(Relaxed) >= mine),
                        _ => assert_ne!(fails, 0),
                    }
                }
            });
            let waiters: Vec<_> = waiters.collect();
            waiters.into_iter().for_each(|t| t.join().unwrap());
            sleeper.join().unwrap();
            syncer.stop();
            runner.join().unwrap();
        });
    }
}

/// The syncing thread ends while workers still wait: they do the work themselves.
#[test]
fn who_waits_for_a_sync_outlives_the_syncing_thread() {
    weave(40, || {
        let pmem = Arc::new(Ledger::default());
        let syncer = Arc::new(Syncer::new(MediaClass::PageCache));
        let (s, p) = (syncer.clone(), pmem.clone());
        let runner = thread::spawn(move || s.run(&*p));
        let waiters: Vec<_> = (0..2)
            .map(|_| {
                let (syncer, pmem) = (syncer.clone(), pmem.clone());
                thread::spawn(move || {
                    let mine = pmem.store();
                    let ticket = syncer.request(&*pmem, None);
                    assert_eq!(syncer.wait(&*pmem, ticket), Outcome::Reached);
                    assert!(pmem.durable.load(Relaxed) >= mine);
                })
            })
            .collect();
        pause();
        syncer.stop();
        waiters.into_iter().for_each(|t| t.join().unwrap());
        runner.join().unwrap();
    });
}
