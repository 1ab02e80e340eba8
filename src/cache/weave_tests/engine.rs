//! All threads of the engine at once, judged by the simulation's oracle and crashed in the middle.
//!
//! Two guests' queues send random batches over a small disk and mostly a cache of six segments, so
//! that segments are reclaimed and used again while they are read; write-back, housekeeper and syncer
//! run beside them until everything is on the disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use shuttle::rand::Rng as _;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::weave;
use super::world::{AMPLE, Bench, SCARCE, Scene, WeaveEnv, write_back};
use crate::cache::queue::Queue;
use crate::cache::worker::{Housekeeper, Progress, Writeback};
use crate::cache::{Mode, Order, VolumeDisk};
use crate::pmem::MediaClass;
use crate::sim::{DiskSurvival, Machine, Rng, SimBuffer, Style, Survival, World};
use crate::sync::thread;
use crate::volume::{Disk, DiskQueue, Done, Request, RequestKind, Status};
use crate::wake::Waker;

/// Sectors of the disk: few, so that requests meet.
const SECTORS: u64 = 64;
const QUEUES: u16 = 2;
/// Batches of a queue.
const BATCHES: u32 = 4;
const REQUESTS_MAX: u64 = 3;
/// Sectors of a request.
const LEN_MAX: u64 = 16;

/// Turns without a wake-up after which a request counts as hung.
const TURNS_MAX: u32 = 20_000;

/// One run's choices.
#[derive(Clone)]
struct Play {
    class: MediaClass,
    style: Style,
    bench: Arc<Bench>,
    next_value: Arc<AtomicU64>,
    /// Whether all guests are through.
    is_over: Arc<AtomicBool>,
}

struct UnderWay {
    kind: RequestKind,
    first: u64,
    count: u64,
    /// The oracle's name of a write.
    id: u64,
    began: u64,
}

impl Play {
    fn with_oracle<T>(&self, f: impl FnOnce(&mut crate::sim::Oracle) -> T) -> T {
        f(&mut self.bench.stage.oracle.lock().unwrap())
    }

    /// Submits one request.
    fn submit(&self, queue: &mut Queue<WeaveEnv, SimBuffer>, tag: u32, rng: &mut Rng) -> UnderWay {
        let first = rng.below(SECTORS);
        let count = rng.between(1, LEN_MAX).min(SECTORS - first);
        let (kind, data, value) = match rng.below(10) {
            0..5 => {
                let value = self.next_value.fetch_add(1, SeqCst);
                (RequestKind::Write, SimBuffer::of_write(0, first, count, value), value)
            }
            5..7 => (RequestKind::Read, SimBuffer::to_read(count), 0),
            7..9 => (RequestKind::Flush, SimBuffer::default(), 0),
            _ => (RequestKind::Discard { sectors: count }, SimBuffer::default(), 0),
        };
        let mut under_way = UnderWay { kind, first, count, id: 0, began: 0 };
        self.with_oracle(|oracle| match kind {
            RequestKind::Read | RequestKind::Flush => under_way.began = oracle.tick(),
            _ => under_way.id = oracle.begin_write(first, count, value),
        });
        let sector = if kind == RequestKind::Flush { 0 } else { first };
        queue.submit(Request { tag, kind, sector, data });
        under_way
    }

    /// The guest sees a completion.
    fn see(&self, under_way: &UnderWay, done: &Done<SimBuffer>) {
        let UnderWay { kind, first, count, id, began } = *under_way;
        assert_eq!(done.status, Status::Ok, "{kind:?} of {first}+{count} failed for no reason");
        let at_once = self.class.fence_is_durable() && self.style.mode == Mode::Writeback;
        self.with_oracle(|oracle| match kind {
            RequestKind::Read => {
                let values = done.data.values(0, first).unwrap();
                for (sector, value) in (first..).zip(values) {
                    oracle.may_read(sector, value, began).unwrap();
                }
            }
            RequestKind::Flush => oracle.end_flush(began),
            _ => oracle.end_write(id, first, count, true, at_once),
        });
    }

    /// Says what stands still.
    fn hung(&self, queue: &Queue<WeaveEnv, SimBuffer>, under_way: &[Option<UnderWay>]) -> ! {
        let waits: Vec<_> = under_way.iter().flatten().map(|u| (u.kind, u.first, u.count)).collect();
        let cache = &self.bench.cache;
        let segments: Vec<_> = cache.segments.iter().map(|s| s.state()).collect();
        let (counters, syncer) = (self.bench.volume.counters(), &cache.syncer);
        let (started, completed) = (syncer.started(), syncer.completed());
        panic!(
            "queue {} hangs on {waits:?}: {segments:?}, {} gathered, {} waiting for a sync, \
             syncs {started}/{completed}, {counters:?}",
            queue.index,
            queue.gather.len(),
            queue.waiting_sync.len(),
        );
    }

    /// A guest's life on one queue.
    fn guest(&self, index: u16, seed: u64) {
        let mut rng = Rng::new(seed);
        let disk = VolumeDisk(self.bench.volume.clone());
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let waker = Waker::new(event.try_clone().unwrap());
        let mut queue = disk.open_queue::<SimBuffer>(index, waker).unwrap();
        let mut done = Vec::new();
        for _ in 0..BATCHES {
            let requests = rng.between(1, REQUESTS_MAX) as u32;
            let mut under_way: Vec<_> =
                (0..requests).map(|tag| Some(self.submit(&mut queue, tag, &mut rng))).collect();
            queue.commit();
            while queue.pending() > 0 {
                queue.poll(&mut done);
                let mut turns = 0;
                while done.is_empty() && event.read().is_err() {
                    // As a queue thread does: it looks again only when it is woken.
                    turns += 1;
                    if turns > TURNS_MAX {
                        self.hung(&queue, &under_way);
                    }
                    thread::yield_now();
                }
                for done in done.drain(..) {
                    let request = under_way[done.tag as usize].take().expect("completed once");
                    self.see(&request, &done);
                }
            }
            if rng.chance(1, 2) {
                queue.park();
            }
        }
    }

    /// What every sector reads as, when all is quiet.
    fn read_all(&self) -> Vec<u64> {
        let disk = VolumeDisk(self.bench.volume.clone());
        let mut queue = disk.open_queue::<SimBuffer>(0, Waker::default()).unwrap();
        for sector in 0..SECTORS {
            let (kind, data) = (RequestKind::Read, SimBuffer::to_read(1));
            queue.submit(Request { tag: sector as u32, kind, sector, data });
        }
        queue.commit();
        let (mut done, mut values) = (Vec::new(), vec![0; SECTORS as usize]);
        while queue.pending() > 0 {
            queue.poll(&mut done);
            for Done { tag, data, .. } in done.drain(..) {
                values[tag as usize] = data.values(0, tag.into()).unwrap()[0];
            }
        }
        values
    }

    /// A worker's life: steps until the guests are through and it has nothing to do.
    fn work(&self, mut step: impl FnMut() -> Progress) {
        loop {
            let over = self.is_over.load(SeqCst);
            let progress = step();
            if over && progress == Progress::Idle {
                return;
            }
            if progress != Progress::Did {
                thread::yield_now();
            }
        }
    }

    fn workers(&self) -> Vec<thread::JoinHandle<()>> {
        let me = self.clone();
        let housekeeper = thread::spawn(move || {
            let mut worker = Housekeeper::new(me.bench.cache.clone());
            me.work(|| worker.step());
        });
        let me = self.clone();
        let writeback = thread::spawn(move || {
            let mut worker = Writeback::new(me.bench.volume.clone());
            me.work(|| {
                me.bench.clock.advance(700);
                match worker.step() {
                    // Too young or already clean: only the latter is an end.
                    Progress::Idle if !me.bench.volume.is_clean() => Progress::Waiting,
                    progress => progress,
                }
            });
            assert_eq!(worker.failures(), 0, "{}", worker.last_error());
        });
        vec![housekeeper, writeback]
    }
}

/// What a crash at the scene leaves is legal, whatever of it the hardware keeps. `shown` is what was
/// read at that moment, if all was quiet: a daemon's death changes nothing of it.
fn judge(scene: &Scene, shown: Option<&[u64]>, play: &Play, rng: &mut Rng) {
    let images = [
        (false, scene.snapshot.daemon_crash(rng)),
        (true, scene.snapshot.host_crash(&Survival::Nothing, DiskSurvival::Nothing, rng).0),
        (true, scene.snapshot.host_crash(&Survival::Random, DiskSurvival::Random, rng).0),
    ];
    for (is_host, image) in images {
        let what = format!("a {} crash before: {}", if is_host { "host" } else { "daemon" }, image.what);
        if is_host && play.style.order == Order::Strict {
            let alone = scene.oracle.judge_disk_alone(image.disks[0].durable_values());
            alone.unwrap_or_else(|e| panic!("after {what}, cache lost: {e}"));
        }
        let world = World::new(image, rng.next());
        let mut machine = Machine::open(&world, &[play.style], QUEUES).unwrap();
        let values = machine.read_all(0).unwrap_or_else(|e| panic!("after {what}: {e}"));
        if let Some(shown) = shown.filter(|_| !is_host) {
            assert_eq!(values, shown, "after {what}: something else was read before");
        }
        for (sector, value) in (0..).zip(values) {
            let legal = scene.oracle.may_recover(sector, value, is_host);
            legal.unwrap_or_else(|e| panic!("after {what}: {e}"));
        }
    }
}

fn run(class: MediaClass, style: Style, segments: u32, seen: &[AtomicU64; 5]) {
    let bench = Arc::new(Bench::new(class, style, segments, QUEUES, SECTORS));
    let next_value = Arc::new(AtomicU64::new(SECTORS + 1));
    let play = Play { class, style, bench, next_value, is_over: Arc::default() };
    let stage = &play.bench.stage;
    let mut chance = shuttle::rand::thread_rng();
    *stage.scene_in.lock().unwrap() = chance.gen_range(1..400);
    let syncing = Arc::new(AtomicBool::new(!class.fence_is_durable()));
    let syncer = {
        let (me, syncing) = (play.clone(), syncing.clone());
        thread::spawn(move || {
            while syncing.load(SeqCst) {
                me.bench.cache.syncer.step(&*me.bench.cache.media.pmem);
                thread::yield_now();
            }
        })
    };
    let workers = play.workers();
    let guests: Vec<_> = (0..QUEUES)
        .map(|q| {
            let (me, seed) = (play.clone(), chance.r#gen());
            thread::spawn(move || me.guest(q, seed))
        })
        .collect();
    guests.into_iter().for_each(|t| t.join().unwrap());
    play.is_over.store(true, SeqCst);
    workers.into_iter().for_each(|t| t.join().unwrap());
    syncing.store(false, SeqCst);
    syncer.join().unwrap();
    let counters = play.bench.volume.counters();
    assert_eq!(counters.checksum_errors, 0);
    let space = play.bench.cache.space();
    assert_eq!((space.free + space.used, space.bad), (space.total, 0), "{space:?}");
    let shown = play.read_all();
    let at_the_end =
        Scene { snapshot: stage.world.photograph("the end"), oracle: stage.oracle.lock().unwrap().clone() };
    if style.mode == Mode::Writeback {
        let on_disk = at_the_end.snapshot.disks[0].durable_values();
        at_the_end.oracle.judge_drained(on_disk).unwrap();
        assert_eq!(on_disk, shown, "of two writes at once disk and cache must show the same one");
    }
    let scenes = stage.scenes.lock().unwrap().len() as u64;
    let now =
        [counters.read_hits, counters.read_misses, counters.reclaimed, scenes, counters.written_back_sectors];
    seen.iter().zip(now).for_each(|(n, more)| _ = n.fetch_add(more, SeqCst));
    let mut rng = Rng::new(chance.r#gen());
    for scene in stage.scenes.lock().unwrap().iter() {
        judge(scene, None, &play, &mut rng);
    }
    judge(&at_the_end, Some(&shown), &play, &mut rng);
}

/// Two queues write the same sectors at once. Either may win, but the winner in the index must be the
/// one that recovery finds, or a value that was read would turn into another with a crash.
#[test]
fn of_overlapping_writes_the_index_shows_the_one_that_recovery_finds() {
    weave(60, || {
        let (class, style) = (MediaClass::AssumeDax, write_back(Order::Strict));
        let bench = Arc::new(Bench::new(class, style, AMPLE, QUEUES, SECTORS));
        let next_value = Arc::new(AtomicU64::new(SECTORS + 1));
        let play = Play { class, style, bench, next_value, is_over: Arc::default() };
        let writers: Vec<_> = (0..QUEUES)
            .map(|q| {
                let me = play.clone();
                thread::spawn(move || {
                    let disk = VolumeDisk(me.bench.volume.clone());
                    let mut queue = disk.open_queue::<SimBuffer>(q, Waker::default()).unwrap();
                    let value = me.next_value.fetch_add(1, SeqCst);
                    let (kind, data) = (RequestKind::Write, SimBuffer::of_write(0, 8, 8, value));
                    queue.submit(Request { tag: 0, kind, sector: 8, data });
                    queue.commit();
                    let mut done = Vec::new();
                    queue.poll(&mut done);
                    assert_eq!(done[0].status, Status::Ok);
                })
            })
            .collect();
        writers.into_iter().for_each(|t| t.join().unwrap());
        let shown = play.read_all();
        let mut rng = Rng::new(1);
        let image = play.bench.stage.world.photograph("a crash").daemon_crash(&mut rng);
        let mut machine = Machine::open(&World::new(image, 1), &[style], QUEUES).unwrap();
        assert_eq!(machine.read_all(0).unwrap(), shown);
    });
}

/// Runs many orders, and makes sure that in some of them there was what could go wrong.
fn survives(class: MediaClass, style: Style, segments: u32) {
    let seen: Arc<[AtomicU64; 5]> = Arc::default();
    let counts = seen.clone();
    weave(60, move || run(class, style, segments, &counts));
    let counts = seen.each_ref().map(|n| n.load(SeqCst));
    println!("{class}, {style:?}: hits, misses, reclaimed, crash scenes, written back: {counts:?}");
    let [hits, misses, reclaimed, scenes, written_back] = counts;
    assert!(hits > 0 && misses > 0 && scenes > 0, "{counts:?}");
    assert!(reclaimed > 0 || segments == AMPLE, "{counts:?}");
    assert!(written_back > 0 || style.mode.bypasses(), "{counts:?}");
}

#[test]
fn strict_write_back_on_dax_survives_any_order_of_its_threads() {
    survives(MediaClass::AssumeDax, write_back(Order::Strict), SCARCE);
}

#[test]
fn commits_on_streams_of_their_own_survive_any_order_of_their_threads() {
    survives(MediaClass::AssumeDax, write_back(Order::Strict), AMPLE);
}

#[test]
fn strict_write_back_on_page_cache_survives_any_order_of_its_threads() {
    survives(MediaClass::PageCache, write_back(Order::Strict), SCARCE);
}

#[test]
fn relaxed_write_back_survives_any_order_of_its_threads() {
    survives(MediaClass::AssumeDax, write_back(Order::Relaxed), SCARCE);
}

#[test]
fn write_through_survives_any_order_of_its_threads() {
    survives(MediaClass::AssumeDax, Style { mode: Mode::Writethrough, ..write_back(Order::Strict) }, SCARCE);
}
