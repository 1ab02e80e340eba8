//! Attach: a volume meets its backing disk, and neither is taken for another.
//!
//! Laws:
//! - A disk whose size differs, or whose content no longer is what a clean detach saw, is refused
//!   unless forced; forcing drops nothing and says what it risks.
//! - The fingerprint is valid only between a clean detach and the next attach: it is struck out
//!   durably before a guest can write.
//! - Entering a mode that writes around the cache, and leaving `relaxed` for `strict`, drain first.
//! - A detach flushes the disk before it takes the fingerprint: what a power cut could still take
//!   away must not be part of what the next attach compares with.
//! - What the disk shows at attach is flushed before a guest sees it: in write-back a FLUSH does not
//!   reach the disk, and what an earlier life wrote around the cache would never become durable.

mod error;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

pub use self::error::AttachError;
use super::core::{Cache, OpenError, write};
use super::env::{Clock, Env};
use super::judge::{judge_identity, judge_new, judge_options};
use super::membership::Membership;
use super::mismatch::Mismatch;
use super::pair::{has_sidecar, note_identity, note_use};
use super::segments::State;
use super::stream::Stream;
use super::stripes::lock;
use super::syncer::Outcome;
use super::volume::{Mode, Order, QueueShared, ReadPolicy, Volume, VolumeCore};
use super::worker::verdict;
use crate::backing::{Backing, BackingIdentity, Channel, Op};
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{DiscardPolicy, Tail, VolumeDescriptor, VolumeState, pad, pad_cut, unpad};
use crate::pmem::{MediaError, Pmem};
use crate::sync::Mutex;
use crate::volume::DiskConfig;
use crate::wake::Waker;

/// Segments for each volume from which on those of reads are parted from those of writes.
const PARTED_MIN: usize = 20;

/// How a volume is attached.
pub struct AttachOptions<E: Env> {
    /// Names the volume on the cache; made if it is not there.
    pub name: String,
    /// The disk.
    pub backing: Arc<E::Backing>,
    /// How writes go.
    pub mode: Mode,
    /// How write-back goes.
    pub order: Order,
    /// Where groups lie before they are on the disk: needed for `grouped`, and, after that, until the
    /// volume has been detached in order.
    pub redo: Option<Arc<E::Backing>>,
    /// Whether hits are verified.
    pub data_crc: bool,
    /// Whether discards give space back on the disk.
    pub pass_discard: bool,
    /// Which reads become cached.
    pub reads: ReadPolicy,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// What GET_ID answers.
    pub serial: String,
    /// Logical block size offered, at least the disk's; `None` for the disk's.
    pub block_size: Option<u32>,
    /// Virtqueues offered.
    pub queues: u16,
    /// Largest ring accepted.
    pub queue_size: u16,
    /// Attach although the disk is not the one it was: all that is cached counts.
    pub force_identity: bool,
    /// Whether a sidecar stands beside the disk; `None` leaves it as it is.
    pub sidecar: Option<bool>,
    /// Open for writing although dirty data was lost.
    pub accept_loss: bool,
    /// Serve write-back from media that does not survive the host.
    pub allow_volatile: bool,
    /// The consistency group it is to be in: with the cache lost, all its disks stand at one point.
    pub group: Option<String>,
}

impl AttachError {
    /// Why the disk at `path` does not go with a volume.
    pub(super) fn mismatch(descriptor: &VolumeDescriptor, path: &str, what: Mismatch) -> Self {
        let (name, path) = (descriptor.name_text().into_owned(), path.to_owned());
        AttachError::Mismatch { name, path, what }
    }
}

impl<E: Env> Cache<E> {
    /// Attaches a volume, making it first if the cache does not know its name.
    ///
    /// On return the descriptor is durable and its fingerprint struck out; a drain that the mode or
    /// order asks for has been done.
    ///
    /// # Errors
    /// [`AttachError`]; nothing has been changed but, at most, an empty volume made.
    pub fn attach(self: &Arc<Self>, options: AttachOptions<E>) -> Result<Arc<Volume<E>>, AttachError> {
        self.attach_for(options, false)
    }

    /// Attaches a volume to be drained and no more: no guest may write to it, so it is possible also
    /// after a `sync` has failed once.
    ///
    /// # Errors
    /// [`AttachError`], as for [`Cache::attach`].
    pub fn attach_to_drain(
        self: &Arc<Self>,
        options: AttachOptions<E>,
    ) -> Result<Arc<Volume<E>>, AttachError> {
        self.attach_for(options, true)
    }

    fn attach_for(
        self: &Arc<Self>,
        options: AttachOptions<E>,
        for_drain: bool,
    ) -> Result<Arc<Volume<E>>, AttachError> {
        let block = judge_options(self.media_class(), &options)?;
        let name = options.name.clone();
        let identity = options.backing.identity();
        self.check_room()?;
        let serial =
            pad::<20>(&options.serial).ok_or_else(|| AttachError::BadSerial(options.serial.clone()))?;
        let core = match self.find_volume(&name) {
            Some(core) => core,
            None => {
                judge_new(&self.media.uuid, &options)?;
                self.make_volume(&name, &identity, block)?
            }
        };
        if core.attached.swap(true, Ordering::SeqCst) {
            return Err(AttachError::InUse(name));
        }
        let attached = self.attach_core(&core, &options, for_drain, &identity, block, serial);
        if attached.is_err() {
            core.attached.store(false, Ordering::SeqCst);
        }
        attached
    }

    fn attach_core(
        self: &Arc<Self>,
        core: &Arc<VolumeCore>,
        options: &AttachOptions<E>,
        for_drain: bool,
        identity: &BackingIdentity,
        block: u32,
        serial: [u8; 20],
    ) -> Result<Arc<Volume<E>>, AttachError> {
        let descriptor = lock(&core.descriptor).0.clone();
        judge_identity(&descriptor, &*options.backing, identity, options)?;
        self.judge_content(core, options)?;
        if core.damaged.load(Ordering::Relaxed) {
            if !options.accept_loss && !options.read_only {
                return Err(AttachError::Damaged(options.name.clone()));
            }
            if options.accept_loss {
                core.damaged.store(false, Ordering::Relaxed);
            }
        }
        let membership = self.begin_membership(core, options)?;
        let redo = self.open_redo(core, options, membership)?;
        core.accepts_loss.store(options.accept_loss, Ordering::Relaxed);
        if options.accept_loss {
            self.forget_lost(core)?;
        }
        if self.has_failed() && !options.read_only && !for_drain {
            return Err(AttachError::SyncFailed);
        }
        if !options.backing.geometry().read_only && !mutated(Mutant::AttachUnflushed) {
            flush(&*options.backing)
                .map_err(|error| AttachError::Disk { path: identity.path.clone(), error })?;
        }
        let is_first = core.queues.len() == 0;
        core.queues.grow_to(usize::from(options.queues).max(1), QueueShared::new);
        let streams = (self.segments.len() / 16).clamp(1, usize::from(options.queues).max(1));
        core.streams.grow_to(streams, || Mutex::new(Stream::default()));
        if self.parts_reads() {
            _ = core.fill_streams.set([Mutex::default(), Mutex::default()]);
        }
        core.facts.begin_anew();
        for (id, segment) in self.segments.iter().enumerate().filter(|_| is_first) {
            let max_epoch = segment.max_epoch.load(Ordering::Relaxed);
            if segment.owner.load(Ordering::Relaxed) == core.incarnation
                && matches!(segment.state(), State::Full | State::Sealed)
                && max_epoch > core.tail.load(Ordering::Relaxed)
            {
                core.pacer.found(max_epoch, id as u32, self.segment_capacity());
            }
        }
        let geometry = options.backing.geometry();
        let config = DiskConfig {
            sectors: identity.size / 512,
            block_size: block,
            physical_block_size: geometry.physical_block.max(block),
            optimal_io_size: geometry.optimal_io,
            read_only: options.read_only || for_drain,
            serial,
            queues: options.queues,
            queue_size: options.queue_size,
        };
        let (was_mode, was_order) = (descriptor.mode, descriptor.order);
        let volume = Arc::new(Volume::new(
            self.clone(),
            core.clone(),
            options.backing.clone(),
            redo,
            config,
            options.name.clone(),
            was_mode,
            was_order,
            options.data_crc,
            options.pass_discard,
            options.reads,
        ));
        let of_disk = |error| AttachError::Disk { path: identity.path.clone(), error };
        let traces = options.backing.traces(true).map_err(of_disk)?;
        let has_one = has_sidecar(&descriptor);
        // Who only reads leaves the pair as it is.
        let wanted = if options.read_only { has_one } else { options.sidecar.unwrap_or(has_one) };
        let note = |d: &mut VolumeDescriptor| {
            note_use(d, identity, &traces, self.clock.unix_ms());
            // It may have been growing when its last life ended.
            (d.sectors, d.next_sectors) = (identity.size / 512, 0);
            d.damaged = core.damaged.load(Ordering::Relaxed);
            // A group that was there has been applied.
            if let Some(redo) = &options.redo {
                d.redo_path = pad_cut(&redo.identity().path);
            }
            d.redo_open = options.order == Order::Grouped || was_order == Order::Grouped && !core.is_clean();
            if options.order == Order::Relaxed {
                // Whichever copy of the next two updates is left, it says what may have happened.
                d.order = Order::Relaxed;
            }
        };
        match options.read_only {
            true => self.update_descriptor(core, note)?,
            false => self.step_pair(core, &options.backing, wanted, options.force_identity, note)?,
        }
        let bypass_begins = options.mode.bypasses() && !core.is_clean();
        // After groups the disk may be beyond the tail: epochs below would take parts of it back.
        let strict_begins = options.order == Order::Strict && was_order != Order::Strict && !core.is_clean();
        // What relocation has dropped within an epoch is needed where a group may end inside it.
        let groups_begin = options.order == Order::Grouped && was_order != Order::Grouped && !core.is_clean();
        if was_order == Order::Grouped && volume.redo.is_none() {
            // Its area is lost, and with it what the order promises.
            volume.set_order(Order::Relaxed);
        }
        // Older data of its own would come to stand beside the others' newer.
        let joins = membership == Membership::Joins && !core.is_clean();
        if (bypass_begins && !mutated(Mutant::BypassUndrained)) || strict_begins || groups_begin || joins {
            volume.drain_here(&mut |_| {})?;
        }
        let lost_sectors = volume.counters().lost_sectors;
        if options.mode.bypasses() && lost_sectors > 0 {
            return Err(AttachError::Lost { name: options.name.clone(), sectors: lost_sectors });
        }
        volume.set_mode(options.mode);
        volume.set_order(options.order);
        core.keep_for(options.order);
        self.update_descriptor(core, |d| {
            d.mode = options.mode;
            d.order = options.order;
            d.redo_open = options.order == Order::Grouped;
            d.data_crc = options.data_crc;
            d.discard = if options.pass_discard { DiscardPolicy::Pass } else { DiscardPolicy::Keep };
            d.serial = serial;
            d.block_size = block;
        })?;
        if let (Membership::Joins, Some(group)) = (membership, &options.group) {
            self.join_group(core, group)?;
        }
        if let (Some(redo), true) = (&volume.redo, options.order == Order::Grouped && core.group().is_some())
        {
            let share = self.epoch_share(redo, block, options.queues)?;
            volume.epoch_share.store(share, Ordering::SeqCst);
        }
        self.end_membership(&volume, membership != Membership::AsItIs);
        Ok(volume)
    }

    /// Every attached volume needs a stream, a segment behind it, and reclaim its reserve.
    fn check_room(&self) -> Result<(), AttachError> {
        let attached = self.all_volumes().iter().filter(|v| v.attached.load(Ordering::Relaxed)).count();
        let (segments, volumes) = (self.segments.len(), attached + 1);
        let needed = volumes * 3 + 3;
        if segments < needed {
            return Err(AttachError::TooSmall { segments, volumes, needed });
        }
        Ok(())
    }

    /// Whether there are segments enough that what a volume reads has its own: two more are open then.
    fn parts_reads(&self) -> bool {
        let attached = self.all_volumes().iter().filter(|v| v.attached.load(Ordering::Relaxed)).count();
        self.segments.len() >= PARTED_MIN * attached.max(1)
    }

    pub(crate) fn find_volume(&self, name: &str) -> Option<Arc<VolumeCore>> {
        self.all_volumes().into_iter().find(|v| unpad(&lock(&v.descriptor).0.name) == name.as_bytes())
    }

    /// The volumes on the cache: name, size in sectors, whether anything of it is dirty.
    pub fn volumes(&self) -> Vec<(String, u64, bool)> {
        let mut rows: Vec<_> = self
            .all_volumes()
            .iter()
            .map(|v| {
                let descriptor = lock(&v.descriptor);
                let name = String::from_utf8_lossy(unpad(&descriptor.0.name)).into_owned();
                (name, descriptor.0.sectors, !v.is_clean())
            })
            .collect();
        rows.sort();
        rows
    }

    /// The descriptor of a volume, as it was last made durable.
    pub fn descriptor(&self, name: &str) -> Option<VolumeDescriptor> {
        self.find_volume(name).map(|v| lock(&v.descriptor).0.clone())
    }

    fn make_volume(
        &self,
        name: &str,
        identity: &BackingIdentity,
        block: u32,
    ) -> Result<Arc<VolumeCore>, AttachError> {
        let taken: Vec<u32> = self.all_volumes().iter().map(|v| v.slot).collect();
        let slots = self.media.geometry.volume_slots;
        let slot = (0..slots).find(|s| !taken.contains(s)).ok_or(AttachError::NoSlot(slots))?;
        let mut incarnation = 0;
        self.update_start(|page| {
            incarnation = page.next_incarnation.max(1);
            page.next_incarnation = incarnation + u64::from(!mutated(Mutant::IncarnationReused));
        })?;
        let mut uuid = [0; 16];
        getrandom::fill(&mut uuid)
            .map_err(|e| AttachError::Disk { path: "getrandom".into(), error: e.into() })?;
        let old = self.media.load(
            |copy| self.media.geometry.descriptor(slot, copy),
            |bytes| VolumeDescriptor::decode(bytes, &self.media.uuid, slot),
        );
        let (sequence, next) = (old.next_sequence(), old.next);
        let mut descriptor = VolumeDescriptor {
            slot,
            sequence: sequence - 1,
            cache_uuid: self.media.uuid,
            incarnation,
            uuid,
            state: VolumeState::InUse,
            data_crc: true,
            block_size: block,
            sectors: identity.size / 512,
            name: pad(name).expect("the length was checked"),
            ..VolumeDescriptor::default()
        };
        note_identity(&mut descriptor, identity);
        let core = Arc::new(VolumeCore::new(descriptor, next, self.segments.len()));
        // The tail first, durably: a descriptor without one would be a damaged volume.
        for copy in 0..2 {
            self.write_tail(&core, copy, 0)?;
        }
        self.settle()?;
        self.update_descriptor(&core, |_| {})?;
        self.update_descriptor(&core, |_| {})?;
        write(&self.volumes).insert(incarnation, core.clone());
        Ok(core)
    }

    /// Writes the descriptor's older copy and waits until it is durable.
    pub(crate) fn update_descriptor(
        &self,
        core: &VolumeCore,
        change: impl FnOnce(&mut VolumeDescriptor),
    ) -> Result<(), AttachError> {
        let mut guard = lock(&core.descriptor);
        let mut descriptor = guard.0.clone();
        change(&mut descriptor);
        descriptor.sequence += 1;
        let at = guard.1 ^ usize::from(mutated(Mutant::DescriptorNewestOverwritten));
        let at = self.media.geometry.descriptor(core.slot, at);
        self.media.pmem.write(at, &descriptor.encode()[..])?;
        self.settle()?;
        *guard = (descriptor, 1 - guard.1);
        Ok(())
    }

    /// Waits until what this thread has stored is durable.
    fn settle(&self) -> Result<(), AttachError> {
        let ticket = self.syncer.request(&*self.media.pmem, None);
        match self.syncer.wait(&*self.media.pmem, ticket) {
            Outcome::Failed => Err(AttachError::SyncFailed),
            _ => Ok(()),
        }
    }

    /// Writes one copy of a volume's tail. It counts once it is durable.
    pub(crate) fn write_tail(&self, core: &VolumeCore, copy: usize, epoch: u64) -> Result<(), MediaError> {
        let mut page = lock(&core.tail_page);
        page.0 += 1;
        let tail = Tail {
            sequence: page.0,
            cache_uuid: self.media.uuid,
            incarnation: core.incarnation,
            epoch,
            version_floor: core.version.load(Ordering::SeqCst),
            time_ms: self.clock.unix_ms(),
            lost: lock(&core.lost).clone(),
        };
        page.1 = 1 - copy;
        self.media.pmem.write(self.media.geometry.tail(core.slot, copy), &tail.encode()[..])
    }

    /// Writes the other copy of a tail that is durable. It is by the next wait for durability.
    pub(crate) fn write_tail_again(&self, core: &VolumeCore, epoch: u64) -> Result<(), MediaError> {
        let next = lock(&core.tail_page).1;
        self.write_tail(core, next, epoch)?;
        self.media.pmem.fence();
        Ok(())
    }

    /// Ends a volume's attachment in order: the disk's fingerprint is taken, so that the next
    /// attach can tell whether anybody else wrote to it. No queue may be open.
    ///
    /// # Errors
    /// The disk or the media failed; the volume is then as after a crash.
    pub fn detach(&self, volume: &Volume<E>) -> Result<(), AttachError> {
        let of_disk = |error| AttachError::Disk { path: volume.backing.identity().path, error };
        if volume.core.facts.left_behind() > 0 {
            return Err(of_disk(std::io::Error::other("operations left to it may still change it")));
        }
        let is_open = lock(&volume.core.descriptor).0.redo_open;
        if let Some(redo) = volume.redo.as_ref().filter(|_| is_open)
            // What may not count stays as it is.
            && (!redo.is_committed() || verdict(&volume.core, &redo.header()) == Some(true))
        {
            redo.settle(&*volume.backing)?;
        }
        if mutated(Mutant::DirtyDroppedAtDetach) {
            let copy = lock(&volume.core.tail_page).1;
            self.write_tail(&volume.core, copy, volume.core.epoch())?;
        }
        if !volume.backing.geometry().read_only && !mutated(Mutant::DetachUnflushed) {
            // Else a power cut after this takes from the disk what the fingerprint has seen, and the
            // next attach takes it for another's work.
            flush(&*volume.backing).map_err(of_disk)?;
        }
        self.note_rest(volume)?;
        *lock(&volume.core.area) = None;
        volume.core.attached.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Ends a volume's attachment without a look at its disk: what is on it is not known, as after a
    /// kill, and the next attach takes it as it finds it. For a disk that does not answer or fails
    /// [`Cache::detach`]. No queue may be open and no worker may serve the volume.
    pub fn abandon(&self, volume: &Volume<E>) {
        *lock(&volume.core.area) = None;
        volume.core.attached.store(false, Ordering::SeqCst);
    }

    /// Ends the run in order: seals nothing, drops nothing, and notes that it was no crash.
    ///
    /// # Errors
    /// The media failed; the next start then recovers as after a crash, which is the same path.
    pub fn close(&self) -> Result<(), OpenError> {
        self.update_start(|page| page.clean = true)
    }
}

/// Flushes the disk, blocking.
fn flush<B: Backing>(backing: &B) -> std::io::Result<()> {
    let mut channel = backing.channel(&Waker::default(), 1)?;
    if channel.submit(0, Op::Flush).is_err() {
        return Err(std::io::Error::other("an idle channel takes no operation"));
    }
    let mut done = Vec::new();
    while done.is_empty() {
        channel.wait(Duration::from_secs(1));
        channel.reap(&mut done);
    }
    done.remove(0).result
}
