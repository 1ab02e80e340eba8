//! The cache: media, segments, free list, and the volumes that live on it.
//!
//! Locks, in the order they may be taken: stream or write-back's plan → stripes → index shard → the
//! small lists here.
//! The liveness writer's mutex is taken with none of these held.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::bound::IndexBound;
use super::doubt;
use super::env::{Clock, Env};
use super::evicted::Evicted;
use super::format::has_small_segments;
use super::geometry::LiveGeometry;
use super::liveness::Liveness;
use super::media::Media;
use super::record::EXTENT_SECTORS_MAX;
use super::recovery::ahead::ReadAhead;
use super::recovery::{self, RecoveryReport};
use super::resize::{self, Resizing};
use super::scrub::Scrub;
use super::segments::State;
use super::stripes::lock;
use super::syncer::{Outcome, Syncer};
use super::table::SegmentTable;
use super::volume::VolumeCore;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{
    Corruption, Dual, Geometry, PAGE, StartPage, Superblock, SuperblockError, backup_superblock,
};
use crate::pmem::{MediaClass, MediaError, Pmem};
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Why a cache cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no cache here.
    #[error("this is not a pcache-vhost cache: {0}; use `format` if its content may be lost")]
    NotOurs(SuperblockError),
    /// Both superblocks are damaged, or it is of another version.
    #[error("the cache's superblock cannot be used: {0}")]
    Superblock(SuperblockError),
    /// A newer program has used it.
    #[error("the cache uses features that this program may read but not write: use a newer one")]
    Newer,
    /// Both start pages are damaged.
    #[error("the cache's start page cannot be used: {0}; `check` says more")]
    StartPage(Corruption),
    /// The media is smaller than when it was formatted.
    #[error("the cache was formatted with {formatted} bytes and now has {found}: it was cut off")]
    Truncated {
        /// Bytes then.
        formatted: u64,
        /// Bytes now.
        found: u64,
    },
    /// It was formatted on DAX, and this is not.
    #[error("the cache's segments of {segment_size} bytes are usable with DAX only")]
    SmallSegments {
        /// Bytes of one.
        segment_size: u32,
    },
    /// The media failed.
    #[error(transparent)]
    Media(#[from] MediaError),
    /// What was read cannot be made durable.
    #[error("the cache cannot be made durable")]
    NotDurable,
}

/// How a cache's segments are used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Space {
    /// All of them.
    pub total: usize,
    /// On the free list.
    pub free: usize,
    /// Holding something, or on their way to or from the free list.
    pub used: usize,
    /// Given up.
    pub bad: usize,
}

/// The start page, as it stands, and where its next update goes.
pub(crate) struct StartState {
    pub page: StartPage,
    pub next: usize,
    /// Whether the run before this one ended in order.
    pub was_clean: bool,
}

/// An open cache.
pub struct Cache<E: Env> {
    pub(crate) media: Media<E::Pmem>,
    pub(crate) clock: E::Clock,
    pub(crate) segments: SegmentTable,
    pub(crate) resizing: Resizing,
    pub(crate) index_bound: IndexBound,
    pub(crate) liveness: Liveness,
    /// What reclaim has dropped lately.
    pub(crate) evicted: Evicted,
    /// Segments opened so far: the time by which ages are told.
    pub(crate) opened: AtomicU64,
    pub(crate) syncer: Syncer,
    pub(crate) housekeeper: Signal,
    /// Volumes by incarnation, attached or not.
    pub(crate) volumes: RwLock<BTreeMap<u64, Arc<VolumeCore>>>,
    pub(crate) start_counter: u64,
    pub(crate) start: Mutex<StartState>,
    pub(crate) stopping: AtomicBool,
    pub(crate) scrub: Scrub,
    /// Milliseconds since 1970 at the housekeeper's last step: what records carry, for messages.
    pub(crate) recent_ms: AtomicU64,
    /// Clean segments at the last look for victims.
    pub(crate) clean_count: AtomicUsize,
    /// Whether reclaim found nothing that it could free, at its last look.
    pub(crate) is_exhausted: AtomicBool,
    /// Held while shares are changed: what is promised is added up once.
    pub(crate) sharing: Mutex<()>,
    free: Mutex<VecDeque<u32>>,
    free_count: AtomicUsize,
    /// Full, not yet sealed.
    pub(crate) full: Mutex<VecDeque<u32>>,
    /// Sealed, oldest first.
    pub(crate) sealed: Mutex<VecDeque<u32>>,
}

impl<E: Env> Cache<E> {
    /// Opens a formatted cache and recovers it; every volume on it is known, none is attached.
    ///
    /// What was recovered is durable when this returns.
    ///
    /// # Errors
    /// See [`OpenError`]; the media has not been changed but, at most, by its start counter.
    pub fn open(pmem: Arc<E::Pmem>, clock: E::Clock) -> Result<(Arc<Cache<E>>, RecoveryReport), OpenError> {
        Self::open_after(pmem, clock, &ReadAhead::default())
    }

    /// Opens a cache of which some was read ahead.
    ///
    /// # Errors
    /// As for [`Cache::open`].
    pub fn open_after(
        pmem: Arc<E::Pmem>,
        clock: E::Clock,
        ahead: &ReadAhead,
    ) -> Result<(Arc<Cache<E>>, RecoveryReport), OpenError> {
        let mut media = load_media(pmem)?;
        let class = media.pmem.class();
        if has_small_segments(media.geometry.fixed(), class) {
            return Err(OpenError::SmallSegments { segment_size: media.geometry.segment_size });
        }
        let has_failed = doubt::has_failed(&media)?;
        let nothing = ReadAhead::default();
        let ahead = if has_failed { &nothing } else { ahead };
        if has_failed {
            // The device is the truth, not what still reads back (law 8).
            media.pmem.reread().map_err(|_| OpenError::NotDurable)?;
            media = load_media(media.pmem)?;
        }
        // What recovery is about to believe may never have been made durable (law 8): the last
        // daemon was killed between a store and its fence, or a page has not left the page cache.
        if !mutated(Mutant::RecoveryNotSyncedFirst) {
            doubt::sync(&media)?;
        }
        media.settle_metadata();
        let start = begin_start(&media, has_failed)?;
        resize::finish_at_start(&media)?;
        let segments = SegmentTable::new(media.geometry.segment_count() as usize);
        let now_ms = clock.unix_ms();
        let capacity = u64::from(media.geometry.segment_size) * segments.len() as u64;
        let mut cache = Cache {
            syncer: Syncer::new(class).marking(media.geometry.sync_mark()),
            start_counter: start.page.start_counter,
            media,
            clock,
            segments,
            resizing: Resizing::default(),
            index_bound: IndexBound::default(),
            liveness: Liveness::default(),
            evicted: Evicted::new(capacity / 512),
            opened: AtomicU64::new(0),
            housekeeper: Signal::default(),
            volumes: RwLock::default(),
            start: Mutex::new(start),
            stopping: AtomicBool::new(false),
            scrub: Scrub::default(),
            recent_ms: AtomicU64::new(now_ms),
            clean_count: AtomicUsize::new(0),
            is_exhausted: AtomicBool::new(false),
            sharing: Mutex::default(),
            free: Mutex::default(),
            free_count: AtomicUsize::new(0),
            full: Mutex::default(),
            sealed: Mutex::default(),
        };
        let report = recovery::recover(&mut cache, ahead)?;
        let ticket = cache.syncer.request(&*cache.media.pmem, None);
        if cache.syncer.wait(&*cache.media.pmem, ticket) == Outcome::Failed {
            return Err(OpenError::NotDurable);
        }
        // Its other copy too, now that the first is durable: no damage to one sets the counters back.
        cache.update_start_once(&mut |_| {})?;
        Ok((Arc::new(cache), report))
    }

    /// Where everything is.
    pub fn geometry(&self) -> Geometry {
        self.media.geometry.now()
    }

    /// What survives what.
    pub fn media_class(&self) -> MediaClass {
        self.media.pmem.class()
    }

    /// The cache's identity.
    pub fn uuid(&self) -> [u8; 16] {
        self.media.uuid
    }

    /// Free segments now.
    pub fn free_segments(&self) -> usize {
        self.free_count.load(Ordering::Relaxed)
    }

    /// How the segments are used now: the free list against the states of all the others.
    pub fn space(&self) -> Space {
        let count = |f: fn(State) -> bool| self.segments.iter().filter(|s| f(s.state())).count();
        Space {
            total: count(|s| s != State::Retired),
            free: lock(&self.free).len(),
            used: count(|s| !matches!(s, State::Free | State::Bad | State::Retired)),
            bad: count(|s| s == State::Bad),
        }
    }

    /// The free list, for the audit.
    #[cfg(feature = "sim")]
    pub(crate) fn free_list(&self) -> Vec<u32> {
        lock(&self.free).iter().copied().collect()
    }

    /// Free segments that reclaim keeps in hand.
    pub(crate) fn free_target(&self) -> usize {
        // Enough that opening never waits for reclaim at a steady rate, without idling the cache:
        // one in 32, at least 3 and at most 64 (1 GiB).
        (self.segments.len() / 32).clamp(3, 64)
    }

    pub(crate) fn add_free(&self, id: u32) {
        let mut free = lock(&self.free);
        // Looked at under the lock: a shrink takes what it finds on the list under it, too.
        let is_over = id as usize >= self.segments.len() && !mutated(Mutant::RetiredHandedOut);
        self.segments[id as usize].set_state(if is_over { State::Retired } else { State::Free });
        if !is_over {
            free.push_back(id);
        }
        self.free_count.store(free.len(), Ordering::Relaxed);
    }

    /// Says how many segments are used for something new, and takes those beyond off the free list.
    pub(crate) fn retire_free(&self, len: usize) {
        let mut free = lock(&self.free);
        self.segments.set_len(len);
        free.retain(|&id| {
            let stays = (id as usize) < len;
            if !stays {
                self.segments[id as usize].set_state(State::Retired);
            }
            stays
        });
        self.free_count.store(free.len(), Ordering::Relaxed);
    }

    /// Takes a free segment for a volume, which then holds it, or without one for reclaim; fills and
    /// relocation leave the last one to the guest's writes. What others may have is left (`shares.rs`).
    pub(crate) fn take_free(&self, spares_last: bool, by: Option<&VolumeCore>) -> Option<u32> {
        let volumes = self.all_volumes();
        let mut free = lock(&self.free);
        let low = free.len() <= self.free_target();
        let may = self.may_take(by, volumes.iter().map(|v| &**v), free.len());
        let taken = if !may || spares_last && free.len() <= 1 { None } else { free.pop_front() };
        if let Some(core) = by {
            if taken.is_some() {
                core.share.hold();
            }
            self.note_asked(core, taken.is_some(), spares_last);
        }
        self.free_count.store(free.len(), Ordering::Relaxed);
        drop(free);
        if low || taken.is_none() {
            self.housekeeper.raise();
        }
        taken
    }

    /// Longest piece of a write: a record takes at least two of them.
    pub(crate) fn piece_sectors_max(&self) -> u64 {
        u64::from(self.media.geometry.segment_size / 16 / 512 / 8 * 8).clamp(8, EXTENT_SECTORS_MAX)
    }

    /// Most payload of a record in bytes: well below a segment, and short enough under a fence.
    pub(crate) fn record_payload_max(&self) -> u32 {
        (self.media.geometry.segment_size / 8).clamp(8192, 1 << 20)
    }

    /// Sectors of a segment that are not taken by its fixed parts.
    pub(crate) fn capacity_sectors(&self) -> u32 {
        let geometry = &self.media.geometry;
        (geometry.data_end() - geometry.data_start()) / 512
    }

    pub(crate) fn queue_for_sealing(&self, id: u32) {
        lock(&self.full).push_back(id);
        self.housekeeper.raise();
    }

    /// Whether write-back should hurry: a quarter of the segments is all that is free or could be made
    /// free at once, or dirty data stands in the way of a shrink or of the bound on the index.
    pub(crate) fn is_pressed(&self) -> bool {
        let free = self.unpromised();
        self.resizing.is_pressing.load(Ordering::Relaxed)
            || self.index_bound.is_over()
            || free < self.free_target()
                && free + self.clean_count.load(Ordering::Relaxed) < (self.segments.len() / 4).max(2)
    }

    pub(crate) fn volume_of(&self, incarnation: u64) -> Option<Arc<VolumeCore>> {
        read(&self.volumes).get(&incarnation).cloned()
    }

    /// Every volume on the cache, attached or not.
    pub(crate) fn all_volumes(&self) -> Vec<Arc<VolumeCore>> {
        read(&self.volumes).values().cloned().collect()
    }

    /// Whether a `sync` has failed, in this run or in one since which not everything has been drained.
    pub fn has_failed(&self) -> bool {
        self.syncer.has_failed() || lock(&self.start).page.sync_failed
    }

    /// Forgets that a `sync` has failed once, if nothing is left that could have suffered: everything
    /// is on the disks. Says whether it did.
    ///
    /// # Errors
    /// The cache still cannot be made durable.
    pub fn forgive(&self) -> Result<bool, OpenError> {
        let is_clean = |v: &Arc<VolumeCore>| v.is_clean() && !v.damaged.load(Ordering::Relaxed);
        if !self.has_failed() || self.syncer.has_failed() || !self.all_volumes().iter().all(is_clean) {
            return Ok(false);
        }
        self.update_start(|page| page.sync_failed = false)?;
        Ok(true)
    }

    /// Changes both copies of the start page, the older one first, and waits until each is durable:
    /// no damage to one sets a counter back.
    pub(crate) fn update_start(&self, mut change: impl FnMut(&mut StartPage)) -> Result<(), OpenError> {
        self.update_start_once(&mut change)?;
        self.update_start_once(&mut |_| {})
    }

    /// Writes the start page's older copy and waits until it is durable.
    fn update_start_once(&self, change: &mut dyn FnMut(&mut StartPage)) -> Result<(), OpenError> {
        let mut start = lock(&self.start);
        let mut page = start.page.clone();
        change(&mut page);
        page.sequence += 1;
        let next = start.next;
        self.media.write_page(|geometry| geometry.start_page(next), &page.encode()[..])?;
        let ticket = self.syncer.request(&*self.media.pmem, None);
        if self.syncer.wait(&*self.media.pmem, ticket) == Outcome::Failed {
            return Err(OpenError::NotDurable);
        }
        *start = StartState { page, next: 1 - start.next, was_clean: start.was_clean };
        Ok(())
    }
}

/// Where a superblock is looked for when nothing is left of the front.
pub(super) fn signpost<P: Pmem>(pmem: &P) -> Option<u64> {
    backup_superblock(pmem.len(), pmem.back_size())
}

/// The newest superblock, from either end of the media, and whether a copy is damaged.
pub(crate) fn load_superblock<P: Pmem>(pmem: &P) -> Result<(Superblock, bool), SuperblockError> {
    let dual = load_superblocks(pmem)?;
    let damaged = dual.is_damaged();
    Ok((dual.into_newest()?, damaged))
}

/// Both superblocks.
pub(super) fn load_superblocks<P: Pmem>(
    pmem: &P,
) -> Result<Dual<Superblock, SuperblockError>, SuperblockError> {
    let read = |at| match super::media::read_page(pmem, at) {
        Ok(page) => Superblock::decode(&page[..]),
        Err(_) => Err(SuperblockError::Damaged(Corruption::unreadable("Superblock"))),
    };
    if pmem.len() < 2 * PAGE as u64 {
        return Err(SuperblockError::NotOurs { found: 0 });
    }
    let front = read(0);
    let read_if_inside = |at: u64| match at + PAGE as u64 <= pmem.len() {
        true => read(at),
        false => Err(SuperblockError::NotOurs { found: 0 }),
    };
    let back = match &front {
        Ok(front) => read_if_inside(front.geometry().superblock(1)),
        // The signpost: the back copy itself, or, where the cache does not end with the media, one
        // that says where the back copy is.
        Err(_) => match signpost(pmem).map_or(Err(SuperblockError::NotOurs { found: 0 }), read) {
            Ok(post) => match read_if_inside(post.geometry().superblock(1)) {
                Ok(back) if back.uuid == post.uuid && back.sequence > post.sequence => Ok(back),
                _ => Ok(post),
            },
            error => error,
        },
    };
    Superblock::newest(front, back)
}

pub(crate) fn load_media<P: Pmem>(pmem: Arc<P>) -> Result<Media<P>, OpenError> {
    let (superblock, damaged) = load_superblock(&*pmem).map_err(|e| match e {
        SuperblockError::NotOurs { .. } => OpenError::NotOurs(e),
        e => OpenError::Superblock(e),
    })?;
    if damaged {
        tracing::warn!("a copy of the superblock is damaged");
    }
    if superblock.unknown_ro_compat() != 0 {
        return Err(OpenError::Newer);
    }
    // Segments that hold nothing yet are nobody's business but of who makes them.
    let geometry = Geometry { segment_count: superblock.usable_segments(), ..superblock.geometry() };
    if pmem.len() < geometry.device_size {
        return Err(OpenError::Truncated { formatted: geometry.device_size, found: pmem.len() });
    }
    let geometry = LiveGeometry::new(geometry);
    Ok(Media { pmem, geometry, secret: superblock.secret, uuid: superblock.uuid, moving: RwLock::default() })
}

pub(crate) fn load_start<P: Pmem>(media: &Media<P>) -> Dual<StartPage> {
    media.load(|copy| media.geometry.start_page(copy), |bytes| StartPage::decode(bytes, &media.uuid))
}

/// Counts this start, durably: records of different starts are told apart by it.
fn begin_start<P: Pmem>(media: &Media<P>, has_failed: bool) -> Result<StartState, OpenError> {
    let copies = load_start(media);
    let next = copies.next;
    let mut page = copies.into_newest().map_err(OpenError::StartPage)?;
    let was_clean = page.clean;
    page.sequence += 1;
    page.start_counter += u64::from(!mutated(Mutant::StartNotCounted));
    page.owner_generation += 1;
    page.clean = false;
    page.sync_failed |= has_failed;
    page.boot_id = media.pmem.boot_id();
    media.pmem.write(media.geometry.start_page(next), &page.encode()[..])?;
    if mutated(Mutant::StartPageNewestOverwritten) {
        media.pmem.write(media.geometry.start_page(1 - next), &page.encode()[..])?;
    }
    media.pmem.fence();
    // On page-cache media the `sync` at the end of recovery makes it durable before anything that
    // carries the new counter can be.
    Ok(StartState { page, next: 1 - next, was_clean })
}

/// Reads a lock whose writers cannot leave it half-changed.
pub(crate) fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Writes such a lock.
pub(crate) fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Wakes a worker. A raise that comes before the wait is not lost.
#[derive(Default)]
pub(crate) struct Signal {
    raised: Mutex<bool>,
    condvar: Condvar,
}

impl Signal {
    pub fn raise(&self) {
        let mut raised = lock(&self.raised);
        if !*raised {
            *raised = true;
            self.condvar.notify_all();
        }
    }

    /// Waits until raised or `timeout`, and lowers it.
    pub fn wait(&self, timeout: Duration) {
        let mut raised = lock(&self.raised);
        if !*raised {
            raised = match self.condvar.wait_timeout(raised, timeout) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        *raised = false;
    }
}
