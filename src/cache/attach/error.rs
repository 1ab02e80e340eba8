//! Why a volume cannot be attached: each a sentence for whoever started it, with what to do.

use super::super::core::OpenError;
use super::super::mismatch::Mismatch;
use super::super::redo::RedoError;
use super::super::worker::DrainError;
use crate::onmedia::Order;
use crate::pmem::{MediaClass, MediaError};

/// Why a volume cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Names fit 64 bytes of `[A-Za-z0-9._-]`.
    #[error("`{0}` cannot name a volume: use 1 to 64 letters, digits, `.`, `_` or `-`")]
    BadName(String),
    /// Serials fit 20 bytes.
    #[error("the serial `{0}` is longer than 20 bytes or not plain text")]
    BadSerial(String),
    /// Every slot is taken.
    #[error("the cache has no free slot for another volume ({0} in use)")]
    NoSlot(u32),
    /// It is attached already.
    #[error("volume `{0}` is attached already")]
    InUse(String),
    /// The disk has another size.
    #[error(
        "the disk `{path}` has {found} bytes, but volume `{name}` was made for one of {expected}: \
         attach the right disk, restore its size, or let a volume whose disk has grown grow with it: \
         `pcache-vhost resolve --grow`"
    )]
    SizeDiffers {
        /// The volume.
        name: String,
        /// The disk.
        path: String,
        /// Bytes of the volume.
        expected: u64,
        /// Bytes now.
        found: u64,
    },
    /// The disk is another one.
    #[error(
        "the disk `{path}` is not the one that volume `{name}` belongs to (that was `{was}`): attach \
         that one, or decide with `pcache-vhost resolve` what counts, the cache or this disk"
    )]
    OtherDisk {
        /// The volume.
        name: String,
        /// The disk.
        path: String,
        /// Where the right one was.
        was: String,
    },
    /// The disk was written to.
    #[error(
        "the content of `{path}` has changed since volume `{name}` was detached: {what}; attach the \
         disk as it was, or decide with `pcache-vhost resolve` what counts, the cache or this disk"
    )]
    ContentChanged {
        /// The volume.
        name: String,
        /// The disk.
        path: String,
        /// What says so.
        what: Mismatch,
    },
    /// The two are not of one time.
    #[error(
        "the disk `{path}` and volume `{name}` do not go together: {what}; attach the pair that does, \
         or decide with `pcache-vhost resolve` what counts, the cache or this disk"
    )]
    Mismatch {
        /// The volume.
        name: String,
        /// The disk.
        path: String,
        /// What says so.
        what: Mismatch,
    },
    /// Where a sidecar cannot be.
    #[error("the disk `{0}` is a device, which has no place beside it for a sidecar: leave --sidecar away")]
    NoPlaceForSidecar(String),
    /// The sidecar failed.
    #[error(
        "the sidecar `{path}` cannot be written: {error}; mend that, or switch it off with --sidecar=false"
    )]
    Sidecar {
        /// The file.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// Dirty data is lost.
    #[error(
        "volume `{0}` has lost dirty data to damage of the cache (`check` lists it): it is not opened \
         for writing; --accept-loss opens it without that data"
    )]
    Damaged(String),
    /// Lost sectors and a mode that does not keep them.
    #[error(
        "volume `{name}` has lost {sectors} sectors to damage of the cache (`check` lists them): a mode \
         that writes around the cache would read the disk's older bytes there; serve it in writeback \
         mode until they are overwritten, or give them up with --accept-loss"
    )]
    Lost {
        /// The volume.
        name: String,
        /// How many.
        sectors: u64,
    },
    /// Volatile media.
    #[error(
        "the cache is on {0} media, which does not survive the host: writes could be lost; use \
         --cache-mode writethrough, or --allow-volatile if that is acceptable"
    )]
    Volatile(MediaClass),
    /// The block size does not fit the disk.
    #[error("a block size of {asked} does not fit: it must be 512 or 4096 and at least the disk's {disk}")]
    BlockSize {
        /// As asked for.
        asked: u32,
        /// The disk's.
        disk: u32,
    },
    /// The disk cannot be written, and the volume is not read-only.
    #[error("the disk `{0}` is read-only: use --read-only")]
    ReadOnlyDisk(String),
    /// The cache is too small.
    #[error("the cache has {segments} segments, too few for {volumes} volumes: at least {needed}")]
    TooSmall {
        /// Segments there are.
        segments: usize,
        /// Volumes attached, this one included.
        volumes: usize,
        /// Segments needed.
        needed: usize,
    },
    /// The cache no longer accepts writes.
    #[error(
        "making the cache durable has failed before: it accepts no writes; `drain` brings what is left to the \
         disks, and when all volumes are drained it accepts writes again, but doubt the device"
    )]
    SyncFailed,
    /// The disk failed.
    #[error("the disk `{path}` cannot be read or flushed: {error}")]
    Disk {
        /// The disk.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// `grouped` without a redo area.
    #[error("volume `{0}` in grouped order needs a redo area: name a file or an extent with --redo")]
    NoRedo(String),
    /// The redo area that a group may be in is not there.
    #[error(
        "volume `{0}` was served in grouped order and not detached: its disk may hold part of a group, and \
         the rest is in the redo area: name that with --redo, or use --force-identity if it is lost (the \
         disk alone is then consistent only after a drain)"
    )]
    RedoMissing(String),
    /// The redo area cannot be used.
    #[error(transparent)]
    Redo(#[from] RedoError),
    /// Names of groups are like those of volumes.
    #[error("`{0}` cannot name a consistency group: use 1 to 64 letters, digits, `.`, `_` or `-`")]
    BadGroup(String),
    /// Without an order there is no common point.
    #[error(
        "volume `{name}` cannot be in the consistency group `{group}` in relaxed order, or in a mode that \
         writes around the cache: what reaches its disk has no order then; use writeback with strict or \
         grouped, or leave the group away"
    )]
    GroupUnordered {
        /// The volume.
        name: String,
        /// The group.
        group: String,
    },
    /// All members have one order.
    #[error(
        "volume `{name}` cannot be in the consistency group `{group}` in another order than volume \
         `{fellow}`, which is served in {order}: give all of its volumes one order"
    )]
    GroupOrder {
        /// The volume.
        name: String,
        /// The group.
        group: String,
        /// A member that is served.
        fellow: String,
        /// In what order.
        order: Order,
    },
    /// A redo header names so many.
    #[error("the consistency group `{group}` has {members} volumes, and no group has more")]
    GroupFull {
        /// The group.
        group: String,
        /// Its members.
        members: usize,
    },
    /// The media failed.
    #[error(transparent)]
    Media(#[from] MediaError),
    /// The start page could not be updated.
    #[error(transparent)]
    Cache(#[from] OpenError),
    /// The drain before a change of mode or order failed.
    #[error("the volume must be drained for this change of mode or order: {0}")]
    Drain(#[from] DrainError),
}
