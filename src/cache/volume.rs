//! One volume: its index, its epochs, its streams, and the face the front end sees.
//!
//! [`VolumeCore`] is what recovery makes and what lives without a backing disk; [`Volume`] adds the
//! disk and is what a guest uses.
//!
//! Laws of the epochs:
//! - A record's epoch is read after its queue announced it and read again the same
//!   ([`VolumeCore::announce`]), so a FLUSH that raises the epoch afterwards sees the announcement.
//! - Epoch e is closed when the counter is above it and no queue announces a number ≤ e. The counter,
//!   and the queues that count, are those of all members of a consistency group (`consistency.rs`).
//! - The tail is a closed epoch; it moves with a flushed disk and durable media in hand.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, OnceLock};

use super::consistency::{Counting, Epochs};
use super::core::{Cache, Signal};
use super::counters::{Counters, Tally};
use super::env::Env;
use super::failing::{Alarm, Policy};
use super::grown::Grown;
use super::health::{Facts, Owed};
use super::index::{Extent, Index, REGION_SECTORS};
use super::latency::{Histogram, Latencies, Stage};
use super::pacing::{Pacer, Purse};
use super::pair::Kept;
use super::plan::Plan;
use super::queue::Queue;
use super::redo::Redo;
use super::reuse::Reuse;
use super::segments::Class;
use super::stream::Stream;
use super::stripes::{Stripes, lock};
use super::worker::Wishes;
use crate::backing::Backing;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{Key, LostRange, Uuid, VolumeDescriptor};
pub use crate::onmedia::{Mode, Order};
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};
use crate::sync::{Mutex, thread};
use crate::volume::{Buffer, Disk, DiskConfig};
use crate::wake::Waker;

impl Mode {
    /// Whether a guest's write goes to the disk before it is acknowledged.
    pub fn bypasses(self) -> bool {
        self != Mode::Writeback
    }

    /// Whether a miss becomes cached.
    pub fn fills(self) -> bool {
        matches!(self, Mode::Writeback | Mode::Writethrough | Mode::Writearound)
    }
}

/// Which reads become cached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Admission {
    /// All, on probation: what is not read again gives way first.
    #[default]
    Adaptive,
    /// What was missed before, not long ago: half the media's wear, and the second read is slow.
    SecondMiss,
    /// None: the cache holds writes alone.
    Never,
}

/// What the cache does with reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReadPolicy {
    /// Which become cached.
    pub admission: Admission,
    /// Bytes that are read in one go before what follows is no longer cached; 0 for no limit.
    pub sequential_cutoff: u64,
}

impl Default for ReadPolicy {
    fn default() -> Self {
        Self { admission: Admission::Adaptive, sequential_cutoff: 4 << 20 }
    }
}

/// What one queue tells the others. A line of its own, written by its thread alone.
#[repr(align(128))]
pub(crate) struct QueueShared {
    /// Odd while the thread may hold what it looked up in the index.
    pub section: AtomicU64,
    /// The epoch of the record it is committing, `u64::MAX` for none.
    pub stamp: AtomicU64,
    /// Whether it waits for a free segment, or for a bypass to end.
    pub waiting: AtomicBool,
    /// Whether a `Queue` for it exists.
    pub taken: AtomicBool,
    pub waker: Mutex<Waker>,
    pub purse: Purse,
    pub tally: Tally,
    /// How long what it does takes.
    pub latencies: Latencies,
    /// What the disk owes it.
    pub owed: Owed,
    /// When it wants to be woken whatever happens.
    pub alarm: Alarm,
}

impl QueueShared {
    pub fn new() -> Self {
        Self {
            section: AtomicU64::new(0),
            stamp: AtomicU64::new(u64::MAX),
            waiting: AtomicBool::new(false),
            taken: AtomicBool::new(false),
            waker: Mutex::default(),
            purse: Purse::default(),
            tally: Tally::default(),
            latencies: Latencies::default(),
            owed: Owed::default(),
            alarm: Alarm::default(),
        }
    }

    /// Begins a section: from here on the queue's thread may hold positions.
    pub fn enter(&self) {
        // Only that thread writes it.
        self.section.store(self.section.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        // The section is seen to be open before anything is looked up.
        fence(Ordering::SeqCst);
    }

    /// Ends it.
    pub fn leave(&self) {
        self.section.store(self.section.load(Ordering::Relaxed) + 1, Ordering::Release);
    }
}

/// Where write-back of a segment goes on.
#[derive(Clone, Debug)]
pub(crate) enum Cursor {
    /// Records from this offset in the segment down have not been written back.
    Log(u32),
    /// What recovery found dirty, by epoch.
    Keys(VecDeque<Key>),
}

/// A volume's segments that hold dirty data, by the epoch of their next record.
#[derive(Default)]
pub(crate) struct DirtySegments {
    /// `(epoch, segment)` of the next dirty record.
    pub known: BTreeMap<(u64, u32), Cursor>,
    /// Open segments whose records have all been seen.
    pub drained: BTreeMap<u32, Cursor>,
}

/// Shards of the index of a volume of so many sectors: no more than it has regions, and at the least
/// what a few queues need, should it grow while it is open.
fn index_shards(sectors: u64) -> usize {
    sectors.div_ceil(REGION_SECTORS).clamp(16, 1024) as usize
}

/// A volume without its disk.
pub(crate) struct VolumeCore {
    pub incarnation: u64,
    pub uuid: Uuid,
    pub slot: u32,
    /// The descriptor, and the copy its next update goes to.
    pub descriptor: Mutex<(VolumeDescriptor, usize)>,
    /// Sequence number of the tail page, and the copy its next update goes to.
    pub tail_page: Mutex<(u64, usize)>,
    pub index: Index,
    pub stripes: Stripes,
    /// Next version to draw.
    pub version: AtomicU64,
    /// By what it counts epochs.
    pub counting: Counting,
    /// Whether it is a member of the group whose counter that is.
    pub is_member: AtomicBool,
    /// Everything of it up to this epoch is on the disk, flushed: at least the tail, and not durable.
    pub settled: AtomicU64,
    /// Of a member in `grouped` order that is attached, the epoch that its redo area names.
    pub area: Mutex<Option<u64>>,
    /// The member of its group that write-back waits for, by incarnation, and since when, in clock ms.
    pub awaited: Mutex<Option<(u64, u64)>>,
    /// Highest epoch stamped on a dirty record.
    pub stamped: AtomicU64,
    /// Highest epoch wholly on the disk, durably so.
    pub tail: AtomicU64,
    pub dirty: Mutex<DirtySegments>,
    /// What of it is lost, as the tail page has it or is about to.
    pub lost: Mutex<Vec<LostRange>>,
    /// Whether what does not fit the list may be given up: the operator has accepted the loss.
    pub accepts_loss: AtomicBool,
    /// Whether a read has met damaged dirty data that may not be listed yet.
    pub damage_seen: AtomicBool,
    /// What write-back's present round holds.
    pub plan: Mutex<Plan>,
    /// Whether keys of dirty records were lost: not to be opened for writing.
    pub damaged: AtomicBool,
    pub queues: Grown<QueueShared>,
    pub streams: Grown<Mutex<Stream>>,
    /// Of what is read: on probation, and proven. None where the cache is too small to part them from
    /// what is written.
    pub fill_streams: OnceLock<[Mutex<Stream>; 2]>,
    /// How soon it reads again what the cache has of it.
    pub reuse: Reuse,
    pub writeback: Signal,
    pub pacer: Pacer,
    pub attached: AtomicBool,
    /// Counts of the workers.
    pub tally: Tally,
    /// How long what they do takes.
    pub latencies: Latencies,
    /// What its state is judged by.
    pub facts: Facts,
    /// The order whose needs relocation honours, by its code.
    pub kept_for: AtomicU8,
    /// The tail that recovery found, and when it had moved there, in ms since 1970.
    pub recovered_tail: Mutex<(u64, u64)>,
    /// What its guest sees of a disk that fails.
    pub policy: Policy,
    /// When the oldest dirty data that is not yet being written back came, in clock ms; 0: none.
    pub dirty_since: AtomicU64,
    /// What the pair of cache and disk was last noted to be.
    pub kept: Mutex<Kept>,
    /// Held during a step of the pair.
    pub step: Mutex<()>,
    /// Ends the wait of whoever keeps the pair.
    pub keeper: Signal,
}

impl VolumeCore {
    /// On a cache of so many segments.
    pub fn new(descriptor: VolumeDescriptor, next: usize, segments: usize) -> Self {
        Self {
            incarnation: descriptor.incarnation,
            uuid: descriptor.uuid,
            slot: descriptor.slot,
            damaged: AtomicBool::new(descriptor.damaged),
            tail_page: Mutex::new((0, 0)),
            index: Index::new(index_shards(descriptor.sectors)),
            stripes: Stripes::new(descriptor.sectors),
            version: AtomicU64::new(1),
            counting: Counting::new(Arc::new(Epochs::new(1, None))),
            is_member: AtomicBool::new(false),
            settled: AtomicU64::new(0),
            area: Mutex::default(),
            awaited: Mutex::default(),
            stamped: AtomicU64::new(0),
            tail: AtomicU64::new(0),
            dirty: Mutex::default(),
            lost: Mutex::default(),
            accepts_loss: AtomicBool::new(false),
            damage_seen: AtomicBool::new(false),
            plan: Mutex::default(),
            queues: Grown::default(),
            streams: Grown::default(),
            fill_streams: OnceLock::new(),
            reuse: Reuse::new(segments),
            writeback: Signal::default(),
            pacer: Pacer::default(),
            attached: AtomicBool::new(false),
            tally: Tally::default(),
            latencies: Latencies::default(),
            facts: Facts::default(),
            kept_for: AtomicU8::new(descriptor.order as u8),
            recovered_tail: Mutex::default(),
            policy: Policy::default(),
            dirty_since: AtomicU64::new(0),
            kept: Mutex::default(),
            step: Mutex::default(),
            keeper: Signal::default(),
            descriptor: Mutex::new((descriptor, next)),
        }
    }

    /// Announces that queue `q` commits, and returns the epoch it commits in.
    pub fn announce(&self, q: u16) -> u64 {
        let (shared, epochs) = (self.queue(q), self.counting.epochs());
        let mut epoch = epochs.now();
        loop {
            shared.stamp.store(epoch, Ordering::SeqCst);
            let again = epochs.now();
            if again == epoch {
                if mutated(Mutant::FlushClosesOneQueue) && q > 0 {
                    return (epoch - 1).max(1);
                }
                return epoch;
            }
            epoch = again;
        }
    }

    /// Ends the announcement, after the publish.
    pub fn retract(&self, q: u16) {
        self.queue(q).stamp.store(u64::MAX, Ordering::Release);
    }

    /// The epoch commits are stamped with now.
    pub fn epoch(&self) -> u64 {
        self.counting.epochs().now()
    }

    /// A dirty record is about to be stamped with `epoch`, which its queue announces.
    pub fn stamp(&self, epoch: u64) {
        if self.stamped.load(Ordering::SeqCst) < epoch {
            self.stamped.fetch_max(epoch, Ordering::SeqCst);
        }
        self.counting.epochs().stamp(epoch);
    }

    /// Begins a new epoch if anything was stamped with the present one. What completed before this
    /// call is in an epoch below the new one: also of the other members of its group.
    pub fn raise_epoch(&self) {
        self.counting.epochs().raise();
    }

    /// The highest epoch that no record can be added to any more.
    pub fn closed_epoch(&self) -> u64 {
        let closed = self.epoch() - u64::from(!mutated(Mutant::OpenEpochTaken));
        match self.group() {
            None => self.lowest_announced(closed),
            Some(group) => group.members().iter().fold(closed, |low, member| member.lowest_announced(low)),
        }
    }

    /// `closed`, or what is below the lowest epoch that any queue announces.
    fn lowest_announced(&self, closed: u64) -> u64 {
        let stamps = self.queues.iter().map(|shared| shared.stamp.load(Ordering::SeqCst));
        stamps.fold(closed, |closed, stamp| closed.min(stamp.saturating_sub(1)))
    }

    /// The volume's name.
    pub fn descriptor_name(&self) -> String {
        lock(&self.descriptor).0.name_text().into_owned()
    }

    /// The volume's size.
    pub fn descriptor_sectors(&self) -> u64 {
        lock(&self.descriptor).0.sectors
    }

    pub fn queue(&self, q: u16) -> &QueueShared {
        self.queues.get(q.into())
    }

    /// The stream queue `q` appends to.
    pub fn stream(&self, q: u16) -> &Mutex<Stream> {
        self.streams.get(usize::from(q) % self.streams.len())
    }

    /// The stream that takes what is read, if it is not that of the writes.
    pub fn fill_stream(&self, class: Class) -> Option<&Mutex<Stream>> {
        self.fill_streams.get().map(|streams| &streams[usize::from(class == Class::Proven)])
    }

    /// Every stream there is.
    pub fn all_streams(&self) -> impl Iterator<Item = &Mutex<Stream>> {
        self.streams.iter().chain(self.fill_streams.get().into_iter().flatten())
    }

    /// Wakes every queue that waits for space or for a bypass.
    pub fn wake_waiting(&self) {
        for shared in self.queues.iter() {
            if shared.waiting.swap(false, Ordering::SeqCst) {
                lock(&shared.waker).wake();
            }
        }
    }

    /// Waits until every queue has left the section it is in: nobody then holds what it looked up
    /// in the index before this call.
    pub fn wait_for_readers(&self) {
        fence(Ordering::SeqCst);
        for shared in self.queues.iter() {
            let seen = shared.section.load(Ordering::SeqCst);
            let mut spins = 0u32;
            while seen % 2 == 1 && shared.section.load(Ordering::SeqCst) == seen {
                spins += 1;
                if spins < 100 {
                    thread::yield_now();
                } else {
                    thread::sleep(std::time::Duration::from_micros(50));
                }
            }
        }
    }

    /// How long the stages of its requests have taken, in the order of [`Stage::ALL`].
    pub fn latencies(&self) -> Vec<Histogram> {
        let mut sums = vec![Histogram::default(); Stage::ALL.len()];
        self.latencies.add_to(&mut sums);
        self.queues.iter().for_each(|shared| shared.latencies.add_to(&mut sums));
        sums
    }

    /// Whether everything acknowledged is on the disk.
    pub fn is_clean(&self) -> bool {
        self.tail.load(Ordering::SeqCst) >= self.stamped.load(Ordering::SeqCst)
    }

    pub fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        self.tally.add_to(&mut sum);
        for shared in self.queues.iter() {
            shared.tally.add_to(&mut sum);
        }
        sum.dirty_bytes = self.index.dirty_sectors() * 512;
        sum.lost_sectors = super::lost::sectors(&lock(&self.lost));
        sum.cached_bytes = self.index.mapped_sectors() * 512;
        sum.epoch = self.epoch();
        sum.tail_epoch = self.tail.load(Ordering::Relaxed);
        sum
    }
}

/// Beside the mode: writes are held.
const HELD: u8 = 0x80;

/// An attached volume.
pub struct Volume<E: Env> {
    pub(crate) cache: Arc<Cache<E>>,
    pub(crate) core: Arc<VolumeCore>,
    pub(crate) backing: Arc<E::Backing>,
    /// Where groups lie before they are on the disk.
    pub(crate) redo: Option<Arc<Redo<E::Backing>>>,
    /// As it was attached; how large it is now is in `sectors`.
    pub(crate) config: DiskConfig,
    /// Sectors that guests may use: only ever more (`enlarge.rs`).
    pub(super) sectors: AtomicU64,
    /// Held by who makes it larger.
    pub(super) growing: Mutex<()>,
    pub(crate) name: String,
    mode: AtomicU8,
    order: AtomicU8,
    pub(crate) data_crc: bool,
    /// Whether discards give space back on the disk.
    pub(crate) pass_discard: bool,
    pub(crate) reads: ReadPolicy,
    /// What one queue may put into an epoch, in bytes of the redo area; 0 for no limit.
    pub(crate) epoch_share: AtomicU64,
    write_cache: AtomicBool,
    /// Asks write-back to bring everything to the disk.
    pub(crate) draining: AtomicBool,
    pub(crate) wishes: Wishes,
    /// The highest epoch that somebody waits for to reach the disk (`flush.rs`).
    pub(crate) wanted: AtomicU64,
    /// Whether a write-back thread serves it, and whether that is to end.
    pub(crate) is_written_back: AtomicBool,
    pub(crate) retired: AtomicBool,
}

impl<E: Env> Volume<E> {
    #[expect(clippy::too_many_arguments, reason = "built in one place, field by field")]
    pub(crate) fn new(
        cache: Arc<Cache<E>>,
        core: Arc<VolumeCore>,
        backing: Arc<E::Backing>,
        redo: Option<Arc<Redo<E::Backing>>>,
        config: DiskConfig,
        name: String,
        mode: Mode,
        order: Order,
        data_crc: bool,
        pass_discard: bool,
        reads: ReadPolicy,
    ) -> Self {
        Self {
            cache,
            core,
            backing,
            redo,
            sectors: AtomicU64::new(config.sectors),
            growing: Mutex::default(),
            config,
            name,
            mode: AtomicU8::new(mode as u8),
            order: AtomicU8::new(order as u8),
            data_crc,
            pass_discard,
            reads,
            epoch_share: AtomicU64::new(0),
            write_cache: AtomicBool::new(true),
            draining: AtomicBool::new(false),
            wishes: Wishes::default(),
            wanted: AtomicU64::new(0),
            is_written_back: AtomicBool::new(false),
            retired: AtomicBool::new(false),
        }
    }

    /// The volume's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The cache it lives on.
    pub fn cache(&self) -> &Arc<Cache<E>> {
        &self.cache
    }

    /// The disk behind it.
    pub fn backing(&self) -> &Arc<E::Backing> {
        &self.backing
    }

    /// How writes go.
    pub fn mode(&self) -> Mode {
        Mode::from_code(self.mode.load(Ordering::Acquire) & !HELD).expect("only modes are stored")
    }

    /// Sets the mode; whether writes are held stays as it is.
    pub(crate) fn set_mode(&self, mode: Mode) {
        let held = self.mode.load(Ordering::Relaxed) & HELD;
        self.mode.store(mode as u8 | held, Ordering::SeqCst);
    }

    /// Whether writes are held because the mode is being changed (`switch.rs`).
    pub(crate) fn is_held(&self) -> bool {
        self.mode.load(Ordering::SeqCst) & HELD != 0
    }

    pub(crate) fn hold(&self) {
        self.mode.fetch_or(HELD, Ordering::SeqCst);
    }

    pub(crate) fn let_go(&self) {
        self.mode.fetch_and(!HELD, Ordering::SeqCst);
    }

    /// How write-back goes.
    pub fn order(&self) -> Order {
        Order::from_code(self.order.load(Ordering::Acquire)).expect("only orders are stored")
    }

    pub(crate) fn set_order(&self, order: Order) {
        self.order.store(order as u8, Ordering::Release);
    }

    /// What has happened so far.
    pub fn counters(&self) -> Counters {
        Counters {
            free_segments: self.cache.free_segments() as u64,
            lag_ms: self.lag_ms(),
            ..self.core.counters()
        }
    }

    /// How long the stages of its requests have taken, in the order of [`Stage::ALL`].
    pub fn latencies(&self) -> Vec<Histogram> {
        self.core.latencies()
    }

    /// Whether everything acknowledged is on the disk.
    pub fn is_clean(&self) -> bool {
        self.core.is_clean()
    }

    /// What the index maps, in ascending order. For tools and tests.
    pub fn for_each_extent(&self, f: impl FnMut(Extent)) {
        self.core.index.for_each(f);
    }
}

/// A shared volume, as the front end serves it.
#[derive(Clone)]
pub struct VolumeDisk<E: Env>(pub Arc<Volume<E>>);

impl<E: Env> Disk for VolumeDisk<E> {
    type Queue<B: Buffer> = Queue<E, B>;

    fn config(&self) -> DiskConfig {
        self.0.disk_config()
    }

    fn write_cache(&self) -> bool {
        self.0.write_cache.load(Ordering::Acquire)
    }

    fn set_write_cache(&self, on: bool) {
        self.0.write_cache.store(on, Ordering::Release);
    }

    fn open_queue<B: Buffer>(&self, index: u16, waker: Waker) -> std::io::Result<Queue<E, B>> {
        Queue::open(self.0.clone(), index, waker)
    }
}

impl<E: Env> Volume<E> {
    pub(crate) fn has_write_cache(&self) -> bool {
        self.write_cache.load(Ordering::Acquire)
    }

    /// The disk's smallest unit in sectors.
    pub(crate) fn block_sectors(&self) -> u64 {
        u64::from(self.backing.geometry().logical_block.max(self.config.block_size)) / 512
    }
}
