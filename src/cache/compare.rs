//! What the cache has clean, held against the disk: evidence that survives any crash.
//!
//! What the index shows clean is what the disk has at that place: it was written back and flushed, or
//! read from there, and whatever came later is in the index in its stead. So when names and times
//! say nothing, or when a daemon died and noted nothing, a few blocks of it are read from both sides.
//! Of two states of a disk the newest writes are what differs: half of the blocks are of the segments
//! written last, half from anywhere, at other places at every look.
//!
//! - It reads only, and no guest waits: nobody is attached.
//! - A block that cannot be read on either side proves nothing and is left out.
//! - Reclaim may be at work for other volumes: a block counts only if the index still shows it at the
//!   same place after it was read.

use std::time::Duration;

use super::attach::{AttachError, AttachOptions};
use super::core::Cache;
use super::env::Env;
use super::index::Extent;
use super::mismatch::Mismatch;
use super::queue::Reader;
use super::segments::State;
use super::stripes::lock;
use super::volume::VolumeCore;
use crate::backing::{AlignedBuf, Backing, Channel, Op};
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{Key, Secret, sip};
use crate::sync::atomic::Ordering;
use crate::units::SectorRange;
use crate::wake::Waker;

/// Segments looked into: half of them the last written.
const SEGMENTS: usize = 8;
/// Blocks compared of each.
const BLOCKS: usize = 8;
/// Most sectors of a block.
const SECTORS: u64 = 8;

impl<E: Env> Cache<E> {
    /// Whether the disk has what the cache has clean, as far as samples tell.
    ///
    /// # Errors
    /// [`Mismatch::Content`] if not.
    pub(super) fn judge_content(
        &self,
        core: &VolumeCore,
        options: &AttachOptions<E>,
    ) -> Result<(), AttachError> {
        let descriptor = lock(&core.descriptor).0.clone();
        // A file that nobody has touched since an orderly end has proven itself already.
        let is_proven = descriptor.fingerprint_valid && descriptor.disk_modified_ns > 0;
        if is_proven || options.force_identity || mutated(Mutant::WrongDiskAccepted) {
            return Ok(());
        }
        let backing = &*options.backing;
        let path = backing.identity().path;
        let samples = self.clean_samples(core, backing.geometry().logical_block, descriptor.attach_count);
        let differs = find_difference(backing, &samples)
            .map_err(|error| AttachError::Disk { path: path.clone(), error })?;
        match differs {
            Some(sector) => Err(AttachError::mismatch(&descriptor, &path, Mismatch::Content { sector })),
            None => Ok(()),
        }
    }

    /// Some of what is clean, with its bytes.
    fn clean_samples(&self, core: &VolumeCore, block: u32, draw: u64) -> Vec<(SectorRange, Vec<u8>)> {
        let mut segments: Vec<(u64, u32)> = (0..)
            .zip(&self.segments)
            .filter(|(_, s)| {
                s.owner.load(Ordering::Relaxed) == core.incarnation && s.state() == State::Sealed
            })
            .map(|(id, s)| (s.max_version.load(Ordering::Relaxed), id))
            .collect();
        segments.sort_unstable_by(|a, b| b.cmp(a));
        let mut dice = Dice([core.incarnation, draw, self.start_counter, 0]);
        let last = SEGMENTS / 2;
        for place in last..SEGMENTS.min(segments.len()) {
            let other = place + dice.below(segments.len() - place);
            segments.swap(place, other);
        }
        segments.truncate(SEGMENTS);
        let mut samples = Vec::new();
        for (_, id) in segments {
            let keys = self.payload_keys(id);
            // The last keys first in a segment written last: they are the newest.
            for number in 0..BLOCKS.min(keys.len()) {
                let at = if number % 2 == 0 { keys.len() - 1 - number } else { dice.below(keys.len()) };
                samples.extend(self.clean_block(core, id, &keys[at], block));
            }
        }
        samples
    }

    /// The keys with payload of a sealed segment; none if they cannot be read.
    fn payload_keys(&self, id: u32) -> Vec<Key> {
        let Some(header) = self.media.load_header(id).newest else { return Vec::new() };
        let summary = self.media.scan_summary(id, &header).ok();
        let scan = summary.or_else(|| self.media.scan_records(id, &header).ok());
        let keys = scan.map(|scan| scan.keys).unwrap_or_default();
        keys.into_iter().filter(|key| key.kind.has_payload()).collect()
    }

    /// The first block of a key that the index shows clean in segment `id`, and its bytes.
    fn clean_block(
        &self,
        core: &VolumeCore,
        id: u32,
        key: &Key,
        block: u32,
    ) -> Option<(SectorRange, Vec<u8>)> {
        let unit = u64::from(block / 512);
        let show = |range| {
            let mut shown = Vec::new();
            core.index.lookup(range, &mut shown);
            shown
        };
        let is_clean = |e: &Extent| {
            let place = e.place;
            !place.dirty && !place.zero && !place.is_lost() && self.media.locate(place.position).0 == id
        };
        let extent = show(key.range()).into_iter().find(is_clean)?;
        let start = extent.range.start.next_multiple_of(unit);
        let len = extent.range.end().saturating_sub(start).min(SECTORS) / unit * unit;
        let extent = extent.clip(SectorRange::new(start, (len > 0).then_some(len)?))?;
        let mut bytes = vec![0; len as usize * 512];
        let sink = |at: usize, part: &[u8]| {
            bytes[at..at + part.len()].copy_from_slice(part);
            Ok(())
        };
        self.copy_extent(&extent, Reader::Worker, true, sink).ok()?;
        (show(extent.range) == [extent]).then_some((extent.range, bytes))
    }
}

/// The first sector at which the disk has something else.
fn find_difference<B: Backing>(
    backing: &B,
    samples: &[(SectorRange, Vec<u8>)],
) -> std::io::Result<Option<u64>> {
    const DEPTH: usize = 16;
    if samples.is_empty() {
        return Ok(None);
    }
    let mut channel = backing.channel(&Waker::default(), DEPTH as u32)?;
    let (mut next, mut ended, mut done) = (0, 0, Vec::new());
    let mut differs = None;
    while ended < samples.len() {
        while next < samples.len() && channel.in_flight() < DEPTH {
            let (range, bytes) = &samples[next];
            let op = Op::Read { offset: range.start * 512, buf: AlignedBuf::new(bytes.len()) };
            if channel.submit(next as u64, op).is_err() {
                break;
            }
            next += 1;
        }
        channel.wait(Duration::from_secs(1));
        channel.reap(&mut done);
        for completion in done.drain(..) {
            ended += 1;
            let (range, bytes) = &samples[completion.token as usize];
            let Op::Read { buf, .. } = completion.op else { unreachable!("only reads were submitted") };
            if completion.result.is_ok() && buf[..] != bytes[..] {
                let sectors = buf.chunks_exact(512).zip(bytes.chunks_exact(512));
                let within = sectors.take_while(|(disk, cache)| disk == cache).count();
                differs =
                    differs.min(Some(range.start + within as u64)).or(Some(range.start + within as u64));
            }
        }
    }
    Ok(differs)
}

/// Numbers that are others at every look, and the same when it is taken again.
struct Dice([u64; 4]);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0[3] += 1;
        let bytes = self.0.map(u64::to_le_bytes).concat();
        (sip(&Secret::new([0; 16]), &[&bytes]) % end.max(1) as u64) as usize
    }
}
