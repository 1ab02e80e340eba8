//! Resize: the cache grows and shrinks while its guests go on. The steps are the housekeeper's
//! (`worker/resize.rs`); here is what is asked for, what is refused, and what a start finishes.
//!
//! Segments never move. What changes is how many count and where the back metadata stands, both said by
//! the superblock, so a change of size is one store of the *front superblock*: before it the media are
//! of the old size, after it of the new one. Around that store:
//!
//! ```text
//!  old size   ├ front ┼ segments ─────────────┼ back ┤            signpost, at the end of the media
//!  new size   ├ front ┼ segments ─────────────────────────┼ back ┤
//!                                             └ void, until their headers are written
//! ```
//!
//! Laws:
//! 1. Both sizes are whole when the front superblock is stored: the back metadata has been copied to
//!    its new place, durably, and until the geometry has changed for everybody each page of it is
//!    stored at both places ([`Media::write_page`]). So it does not matter which size a crash leaves.
//! 2. A header that is overwritten, or not written yet, counts for nothing *before* that: the
//!    superblock that is durable by then says from which segment on all are *void*.
//! 3. A segment is handed out only when its header is durable and it is void no more.
//! 4. A segment becomes void only when nothing is left in it: emptied by reclaim's ordinary steps, in
//!    which dirty data reaches the disk first. From the first step on nothing new is put there.
//! 5. Segments made anew begin in a generation that none of those cut off had, noted with the step that
//!    made them void: their old records never come to count again.
//! 6. Whatever the size of the cache, when the front is damaged a superblock is found at the *signpost*,
//!    the place before the end of the media: the back copy, or one that says where that is. It is
//!    of the old size until the front is of the new one, durably. So it is stored while the front is
//!    whole and durable, and the front while the signpost is; where the front is damaged the signpost,
//!    which alone leads to the other copy, stays as it is.
//!
//! Errors: until the front superblock is stored a failure leaves the old size, with segments that may be
//! void; after it the new size. Void segments are made again by the next start. A shrink that is called
//! off while segments are being emptied costs what was evicted; nothing is to be undone on the media.
//!
//! Locks: `moving` is held for single stores of pages, and by the housekeeper while it copies the back
//! metadata (2 MiB); nobody waits for the device under it.

use std::ops::ControlFlow;
use std::time::Duration;

use super::core::{Cache, OpenError, load_superblock, load_superblocks, signpost};
use super::env::Env;
use super::media::Media;
use super::segments::State;
use super::stripes::lock;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{Geometry, GeometryError, PAGE, SegmentHeader, Superblock, SuperblockError};
use crate::pmem::{MediaError, Pmem};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::thread;

/// Between two looks at a resize.
const LOOK: Duration = Duration::from_millis(5);
/// What media may have: positions are counted in 40 bits of sectors.
const DEVICE_SIZE_MAX: u64 = 1 << 49;

/// Why a cache does not get another size.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// One at a time.
    #[error("the size of this cache is being changed already")]
    Busy,
    /// An impossible size.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// Nothing would change.
    #[error(
        "{size} bytes make no difference: the cache has {segments} segments of {segment_size} bytes already, and grows or shrinks by whole ones, by {least} bytes at least"
    )]
    Slight {
        /// What was asked for.
        size: u64,
        /// What there are.
        segments: u32,
        /// Bytes of one.
        segment_size: u32,
        /// The least change.
        least: u64,
    },
    /// The volumes that are attached need more.
    #[error(
        "{volumes} volumes are attached and need {needed} segments: {least} bytes at least, or detach some"
    )]
    TooSmall {
        /// Volumes attached.
        volumes: usize,
        /// Segments they need.
        needed: usize,
        /// The smallest cache with so many.
        least: u64,
    },
    /// Beyond what a position can name.
    #[error("{size} bytes are too many: a cache has less than {DEVICE_SIZE_MAX}")]
    TooLarge {
        /// What was asked for.
        size: u64,
    },
    /// Dirty data is in the way, and nobody brings it to its disk.
    #[error(
        "volume `{volume}` has {bytes} bytes that are not on its disk, and nothing writes them back: attach or drain it first"
    )]
    Pinned {
        /// The volume.
        volume: String,
        /// Its dirty bytes.
        bytes: u64,
    },
    /// Nobody knows what of a volume is lost.
    #[error(
        "volume `{0}` is damaged, and what is cut off might be the evidence: accept the loss or delete it first"
    )]
    Damaged(String),
    /// A `sync` has failed.
    #[error(
        "a sync of this cache has failed: it cannot be changed until it has been drained and opened again"
    )]
    SyncFailed,
    /// The last change was not finished.
    #[error("the media refused a part of the last change of size: the next start finishes it")]
    Unfinished,
    /// A copy of the superblock is missing.
    #[error("the superblock cannot be changed: {0}")]
    Superblock(String),
    /// The file or device cannot have that size.
    #[error("the media cannot be made {size} bytes long: {source}")]
    Device {
        /// Bytes wanted.
        size: u64,
        /// Why not.
        source: std::io::Error,
    },
    /// The media failed.
    #[error(transparent)]
    Media(#[from] MediaError),
    /// Nothing can be made durable.
    #[error("the cache cannot be made durable")]
    NotDurable,
    /// It was called off.
    #[error("it was interrupted: the cache has the size it had")]
    Interrupted,
}

/// How far a change of size is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ResizeProgress {
    /// Segments to be emptied or made.
    pub segments_total: u32,
    /// Of these, done.
    pub segments_done: u32,
    /// The volumes whose dirty data it waits for, by name.
    pub waits_for: Vec<String>,
}

/// What is asked of the housekeeper, and what has become of it.
pub(crate) struct Asked {
    pub target: Geometry,
    pub is_cancelled: bool,
    pub progress: ResizeProgress,
    pub ended: Option<Result<(), ResizeError>>,
}

/// See the module's head.
#[derive(Default)]
pub(crate) struct Resizing {
    pub asked: Mutex<Option<Asked>>,
    /// Whether dirty data stands in the way: write-back hurries.
    pub is_pressing: AtomicBool,
}

impl Resizing {
    /// Notes how far it is.
    pub fn note(&self, done: u32, total: u32, waits_for: Vec<String>) {
        if let Some(asked) = &mut *lock(&self.asked) {
            asked.progress = ResizeProgress { segments_total: total, segments_done: done, waits_for };
        }
    }

    /// Notes how it ended.
    pub fn end(&self, how: Result<(), ResizeError>) {
        self.is_pressing.store(false, Ordering::Relaxed);
        if let Some(asked) = &mut *lock(&self.asked) {
            asked.ended.get_or_insert(how);
        }
    }
}

impl<E: Env> Cache<E> {
    /// Gives the cache another size, while its volumes are served: that of its media, in bytes. A file
    /// grows and is cut off with it; a device must have the space. Blocks; `look` is shown the progress
    /// every few milliseconds and may call it off.
    ///
    /// On return the new size is durable. A file that could not be cut off stays longer, harmlessly.
    ///
    /// # Errors
    /// [`ResizeError`]; the cache has the size it had, or after a failure of the media may have the
    /// new one, and the next start says.
    pub fn resize(
        &self,
        size: u64,
        look: &mut dyn FnMut(&ResizeProgress) -> ControlFlow<()>,
    ) -> Result<Geometry, ResizeError> {
        self.begin_resize(size)?;
        loop {
            if let Some(ended) = self.end_resize() {
                return ended;
            }
            let is_over = self.resize_progress().is_some_and(|progress| look(&progress).is_break());
            if is_over || self.stopping.load(Ordering::SeqCst) {
                self.cancel_resize();
            }
            if self.stopping.load(Ordering::SeqCst) {
                // Nobody is left to take a step; whatever it has come to, a start goes on from there.
                return Err(ResizeError::Interrupted);
            }
            thread::sleep(LOOK);
        }
    }

    /// Asks the housekeeper for another size.
    ///
    /// # Errors
    /// [`ResizeError`]; nothing has changed, but that a file may be longer.
    pub fn begin_resize(&self, size: u64) -> Result<(), ResizeError> {
        let mut asked = lock(&self.resizing.asked);
        if asked.is_some() {
            return Err(ResizeError::Busy);
        }
        let target = self.judge_resize(size)?;
        let target = self.fit_media(&target)?;
        let progress = ResizeProgress { segments_total: 0, segments_done: 0, waits_for: Vec::new() };
        *asked = Some(Asked { target, is_cancelled: false, progress, ended: None });
        drop(asked);
        self.housekeeper.raise();
        Ok(())
    }

    /// How far a change of size is, if one is under way or has ended unseen.
    pub fn resize_progress(&self) -> Option<ResizeProgress> {
        lock(&self.resizing.asked).as_ref().map(|asked| asked.progress.clone())
    }

    /// Whether a change of size is under way, or has ended unseen.
    pub fn is_resizing(&self) -> bool {
        lock(&self.resizing.asked).is_some()
    }

    /// Bytes of the media, the cache's and those behind it.
    pub fn media_len(&self) -> u64 {
        self.media.pmem.len()
    }

    /// Calls it off, if it is not about to be done.
    pub fn cancel_resize(&self) {
        if let Some(asked) = &mut *lock(&self.resizing.asked) {
            asked.is_cancelled = true;
        }
        self.housekeeper.raise();
    }

    /// How it ended, once, if it has. What is left of a file behind its end is cut off.
    pub fn end_resize(&self) -> Option<Result<Geometry, ResizeError>> {
        let asked = lock(&self.resizing.asked).take_if(|asked| asked.ended.is_some())?;
        let ended = asked.ended.unwrap_or(Err(ResizeError::Interrupted));
        let geometry = self.media.geometry.now();
        // After a failure nobody knows what a start finds to be the size.
        let is_known = matches!(ended, Ok(()) | Err(ResizeError::Interrupted | ResizeError::Pinned { .. }));
        if is_known && geometry.device_size < self.media.pmem.len() {
            match self.media.pmem.resize(geometry.device_size) {
                Ok(len) => tracing::debug!(len, "the media after a change of size"),
                Err(error) => tracing::warn!(%error, "the cache file could not be cut off"),
            }
        }
        Some(ended.map(|()| geometry))
    }

    /// What is asked for, if it can be.
    fn judge_resize(&self, size: u64) -> Result<Geometry, ResizeError> {
        if self.has_failed() {
            return Err(ResizeError::SyncFailed);
        }
        if size >= DEVICE_SIZE_MAX {
            return Err(ResizeError::TooLarge { size });
        }
        let now = self.media.geometry.now();
        if self.segments.len() != now.segment_count as usize {
            return Err(ResizeError::Unfinished);
        }
        let target = now.resized(size)?;
        let is_apart = target.device_size.abs_diff(now.device_size) >= now.meta_size;
        if target.segment_count == now.segment_count || !is_apart {
            return Err(ResizeError::Slight {
                size,
                segments: now.segment_count,
                segment_size: now.segment_size,
                least: now.meta_size.max(now.segment_size.into()),
            });
        }
        if target.segment_count < now.segment_count {
            self.judge_shrink(&target)?;
        }
        Ok(target)
    }

    fn judge_shrink(&self, target: &Geometry) -> Result<(), ResizeError> {
        let volumes = self.all_volumes();
        let attached = volumes.iter().filter(|v| v.attached.load(Ordering::Relaxed)).count();
        let needed = attached.max(1) * 3 + 3;
        if (target.segment_count as usize) < needed {
            let least = 2 * target.meta_size + needed as u64 * u64::from(target.segment_size);
            return Err(ResizeError::TooSmall { volumes: attached, needed, least });
        }
        self.judge_volumes(target.segment_count as usize)
    }

    /// Whether any volume stands in the way of an end at this segment.
    pub(crate) fn judge_volumes(&self, from: usize) -> Result<(), ResizeError> {
        for volume in self.all_volumes() {
            if volume.damaged.load(Ordering::Relaxed) {
                return Err(ResizeError::Damaged(volume.descriptor_name()));
            }
            let is_served = volume.attached.load(Ordering::SeqCst);
            let tail = volume.tail.load(Ordering::SeqCst);
            let is_in_the_way = |id: usize| {
                let segment = &self.segments[id];
                segment.owner.load(Ordering::Relaxed) == volume.incarnation
                    && !matches!(segment.state(), State::Free | State::Retired | State::Bad)
                    && segment.max_epoch.load(Ordering::SeqCst) > tail
            };
            let count = self.media.geometry.segment_count() as usize;
            if !is_served && (from..count).any(is_in_the_way) {
                let bytes = volume.index.dirty_sectors() * 512;
                return Err(ResizeError::Pinned { volume: volume.descriptor_name(), bytes });
            }
        }
        Ok(())
    }

    /// Gives the media the length, where it has not enough. Where some is left behind the cache, there
    /// is room for a signpost.
    fn fit_media(&self, target: &Geometry) -> Result<Geometry, ResizeError> {
        let pmem = &self.media.pmem;
        if pmem.len() < target.device_size {
            let size = target.device_size;
            pmem.resize(size).map_err(|source| ResizeError::Device { size, source })?;
            if pmem.len() < size {
                let source = std::io::Error::other(format!("the device has {} bytes", pmem.len()));
                return Err(ResizeError::Device { size, source });
            }
        }
        let media_len = pmem.len() - pmem.len() % PAGE as u64;
        let rest = media_len - target.device_size;
        if rest == 0 || rest >= pmem.back_size() {
            return Ok(*target);
        }
        let grows = target.device_size > self.media.geometry.device_size();
        Ok(target.resized(if grows { media_len } else { media_len - pmem.back_size() })?)
    }

    /// Takes segments from this one on off the free list, and nothing new goes there; or, with more
    /// than before, lets them count again.
    pub(crate) fn set_segments(&self, len: usize) {
        let now = self.segments.len();
        self.retire_free(len);
        for id in now..len {
            if self.segments[id].state() == State::Retired {
                self.add_free(id as u32);
            }
        }
    }
}

/// The superblock, if both copies of it are whole.
pub(crate) fn whole_superblock<P: Pmem>(pmem: &P) -> Result<Superblock, ResizeError> {
    let refused = |error: SuperblockError| ResizeError::Superblock(error.to_string());
    match load_superblock(pmem).map_err(refused)? {
        (_, true) => {
            Err(ResizeError::Superblock("a copy of it is damaged; scrubbing writes it again".to_owned()))
        }
        (superblock, false) => Ok(superblock),
    }
}

impl<P: Pmem> Media<P> {
    /// Stores a superblock at the signpost, if that is neither in the cache nor its back copy.
    pub(crate) fn put_signpost(&self, superblock: &Superblock) -> Result<(), MediaError> {
        match signpost(&*self.pmem) {
            Some(at) if at >= superblock.device_size && !mutated(Mutant::SignpostForgotten) => {
                self.pmem.write(at, &superblock.encode()[..])
            }
            _ => Ok(()),
        }
    }

    /// Begins to keep the back metadata at a second place: what is there now is copied, except for the
    /// superblock. Durable with what the calling thread waits for next.
    pub(crate) fn begin_move(&self, to: u64) -> Result<(), MediaError> {
        let mut moving = super::core::write(&self.moving);
        let back = self.geometry.back();
        let mut page = [0; PAGE];
        for at in (PAGE as u64..self.geometry.meta_size).step_by(PAGE) {
            if self.pmem.read(back + at, &mut page).is_err() {
                // The copy in front has what this one had. Whatever stood in the new place must not.
                page.fill(0);
            }
            self.pmem.write(to + at, &page)?;
        }
        *moving = Some(to);
        Ok(())
    }

    /// The back metadata is at its new place, for everybody.
    pub(crate) fn finish_move(&self, to: &Geometry) {
        let mut moving = super::core::write(&self.moving);
        self.geometry.set(to);
        *moving = None;
    }

    /// The back metadata stays where it is.
    pub(crate) fn abandon_move(&self) {
        *super::core::write(&self.moving) = None;
    }
}

/// Finishes what the last run has left of a change of size: makes segments that are void. Before
/// anything is recovered; what cannot be made stays void, and does not count.
///
/// # Errors
/// What was written cannot be made durable.
pub(super) fn finish_at_start<P: Pmem>(media: &Media<P>) -> Result<(), OpenError> {
    let Ok(copies) = load_superblocks(&*media.pmem) else { return Ok(()) };
    let (older, is_front_whole) = (copies.next, copies.errors[0].is_none());
    let Ok(superblock) = copies.into_newest() else { return Ok(()) };
    let settle = || super::doubt::sync(media);
    // Whatever was cut off or added behind it: from the end of the media it is to be found, before the
    // front is stored. A front that is damaged already was found from there, and from nowhere else.
    if is_front_whole {
        media.put_signpost(&superblock)?;
        settle()?;
    }
    let Some(from) = superblock.void_from() else {
        return level(media, &superblock, older);
    };
    let geometry = superblock.geometry();
    tracing::info!("a change of size was not finished: making segments {from} to {}", geometry.segment_count);
    for id in from..geometry.segment_count {
        let header = first_header(&superblock, id);
        for copy in 0..2 {
            let at = geometry.segment(id) + u64::from(geometry.header_offset(copy));
            if let Err(error) = media.pmem.write(at, &header.encode()) {
                tracing::error!(%error, segment = id, "the cache goes on without its last segments");
                return Ok(());
            }
        }
    }
    settle()?;
    let mut whole = superblock.with_size(&geometry, None);
    for copy in [older, 1 - older] {
        whole.sequence += 1;
        media.pmem.write(geometry.superblock(copy), &whole.encode()[..])?;
        settle()?;
    }
    media.put_signpost(&whole)?;
    media.geometry.set(&geometry);
    Ok(())
}

/// Makes the older copy of the superblock what the newest is: one that calls segments void which will be
/// in use soon must not come to count, and one that is torn leaves the other alone.
fn level<P: Pmem>(media: &Media<P>, newest: &Superblock, older: usize) -> Result<(), OpenError> {
    let (at, wanted) = (newest.geometry().superblock(older), newest.encode());
    if super::media::read_page(&*media.pmem, at).is_ok_and(|page| page[..] == wanted[..]) {
        return Ok(());
    }
    if let Err(error) = media.pmem.write(at, &wanted[..]) {
        // Nor can it be read, then.
        tracing::warn!(%error, "a copy of the superblock cannot be written");
        return Ok(());
    }
    super::doubt::sync(media)
}

/// The header of a segment that has never been used.
pub(crate) fn first_header(superblock: &Superblock, id: u32) -> SegmentHeader {
    SegmentHeader {
        sequence: 1,
        cache_uuid: superblock.uuid,
        segment: id,
        generation: superblock.first_generation(),
        ..SegmentHeader::default()
    }
}
