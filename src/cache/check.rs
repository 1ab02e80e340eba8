//! Check and dump: read a whole cache image, believe nothing, write nothing.
//!
//! `check` answers whether everything that must be whole is whole: metadata copies, every segment's
//! records or summary, every payload checksum of what counts. What is legal after a crash (a torn
//! last record, a segment left open) is a remark, not damage.

use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::Arc;

use super::core::{OpenError, load_media, load_start, load_superblock};
use super::media::Media;
use super::scan::Scan;
use crate::onmedia::{
    Key, KeyKind, LostCause, LostRange, SegmentHeader, SegmentState, Superblock, Tail, VolumeDescriptor,
    VolumeState, unpad,
};
use crate::pmem::Pmem;

/// What a check came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Everything holds.
    Clean,
    /// Something that must hold does not.
    Damaged,
    /// This is no cache.
    NotOurs,
}

/// A volume, as found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VolumeRow {
    /// Its name.
    pub name: String,
    /// Size in sectors.
    pub sectors: u64,
    /// Segments it owns.
    pub segments: u64,
    /// Keys in them.
    pub keys: u64,
    /// Sectors named by dirty keys, superseded ones included.
    pub dirty_sectors: u64,
    /// Its tail epoch.
    pub tail: u64,
}

/// What a check found.
#[derive(Clone, Debug)]
pub struct CheckReport {
    /// What it came to.
    pub verdict: Verdict,
    /// What is damaged, in words.
    pub findings: Vec<String>,
    /// What is legal and worth saying.
    pub remarks: Vec<String>,
    /// One row for each volume.
    pub volumes: Vec<VolumeRow>,
    /// Segments free, open and sealed.
    pub segments: [u64; 3],
}

/// Verifies a whole image. Never writes.
pub fn check<P: Pmem>(pmem: &Arc<P>) -> CheckReport {
    let mut report = CheckReport {
        verdict: Verdict::Clean,
        findings: Vec::new(),
        remarks: Vec::new(),
        volumes: Vec::new(),
        segments: [0; 3],
    };
    let media = match load_media(pmem.clone()) {
        Ok(media) => media,
        Err(error) => {
            report.verdict =
                if matches!(error, OpenError::NotOurs(_)) { Verdict::NotOurs } else { Verdict::Damaged };
            report.findings.push(error.to_string());
            return report;
        }
    };
    let superblock = load_superblock(&**pmem);
    if let Ok((_, true)) = superblock {
        report.findings.push("a copy of the superblock is damaged".to_owned());
    }
    if let Ok((superblock, _)) = superblock
        && let Some(from) = superblock.void_from()
    {
        report.remarks.push(format!(
            "a change of size is not finished: the next start makes segments {from} to {} anew",
            superblock.segment_count
        ));
    }
    let start = load_start(&media);
    for error in start.errors.iter().flatten() {
        report.findings.push(format!("a copy of the start page is damaged: {error}"));
    }
    if let Some(start) = &start.newest {
        if start.sync_failed {
            report.findings.push("a sync has failed: what was written since may be gone".to_owned());
        }
        if !start.clean {
            report.remarks.push("the last run did not end in order; the next start recovers".to_owned());
        }
    }
    let mut volumes = check_volumes(&media, &mut report);
    for id in 0..media.geometry.segment_count() {
        check_segment(&media, id, &mut volumes, &mut report);
    }
    report.volumes = volumes.into_values().collect();
    report.volumes.sort_by(|a, b| a.name.cmp(&b.name));
    if !report.findings.is_empty() {
        report.verdict = Verdict::Damaged;
    }
    report
}

fn check_volumes<P: Pmem>(media: &Media<P>, report: &mut CheckReport) -> HashMap<u64, VolumeRow> {
    let mut volumes = HashMap::new();
    for slot in 0..media.geometry.volume_slots {
        let copies = load_descriptor(media, slot);
        for error in copies.errors.iter().flatten() {
            report.findings.push(format!("volume slot {slot}: a copy of its descriptor is damaged: {error}"));
        }
        let Some(descriptor) = copies.newest.filter(|d| d.state == VolumeState::InUse) else { continue };
        let tails = media.load(
            |copy| media.geometry.tail(slot, copy),
            |bytes| Tail::decode(bytes, &media.uuid, descriptor.incarnation),
        );
        for error in tails.errors.iter().flatten() {
            report.findings.push(format!("volume slot {slot}: a copy of its tail is damaged: {error}"));
        }
        let name = String::from_utf8_lossy(unpad(&descriptor.name)).into_owned();
        if descriptor.damaged {
            report.findings.push(format!("volume {name} has lost dirty data and nobody has accepted it"));
        }
        for lost in tails.newest.iter().flat_map(|t| &t.lost) {
            report.findings.push(format!("volume {name}: {}", lost_in_words(lost)));
        }
        let tail = tails.newest.map_or(0, |t| t.epoch);
        let row = VolumeRow { name, sectors: descriptor.sectors, tail, ..VolumeRow::default() };
        volumes.insert(descriptor.incarnation, row);
    }
    volumes
}

fn lost_in_words(lost: &LostRange) -> String {
    let LostRange { range, cause, version, time_s } = lost;
    let why = match cause {
        LostCause::Checksum => "they did not match their checksum",
        LostCause::Unreadable => "the media could not be read",
    };
    format!("{range} are lost, found at {time_s} seconds since 1970: {why} (version {version})")
}

fn load_descriptor<P: Pmem>(media: &Media<P>, slot: u32) -> crate::onmedia::Dual<VolumeDescriptor> {
    media.load(
        |copy| media.geometry.descriptor(slot, copy),
        |bytes| VolumeDescriptor::decode(bytes, &media.uuid, slot),
    )
}

fn check_segment<P: Pmem>(
    media: &Media<P>,
    id: u32,
    volumes: &mut HashMap<u64, VolumeRow>,
    report: &mut CheckReport,
) {
    let copies = media.load_header(id);
    for error in copies.errors.iter().flatten() {
        report.findings.push(format!("segment {id}: a copy of its header is damaged: {error}"));
    }
    let Some(header) = copies.newest else { return };
    report.segments[header.state as usize] += 1;
    if header.state == SegmentState::Free {
        return;
    }
    let Some(row) = volumes.get_mut(&header.incarnation) else {
        report.remarks.push(format!("segment {id} belongs to a volume that is gone; it will be reclaimed"));
        return;
    };
    row.segments += 1;
    let scan = match scan(media, id, &header, report) {
        Some(scan) => scan,
        None => return,
    };
    for (epoch, what) in &scan.losses {
        let dirty = if *epoch > row.tail { "dirty data may be lost" } else { "only clean data" };
        report.findings.push(format!("segment {id}: {what} ({dirty})"));
    }
    if scan.torn > 0 {
        report.remarks.push(format!("segment {id}: {} torn records at the end, as after a crash", scan.torn));
    }
    if media.load_liveness(id, header.generation).is_damaged {
        let what = "its liveness words are damaged: the next start drops its clean data";
        report.findings.push(format!("segment {id}: {what}"));
    }
    row.keys += scan.keys.len() as u64;
    let tail = row.tail;
    let dirty = |k: &&Key| k.kind != KeyKind::Fill && k.epoch > tail;
    row.dirty_sectors += scan.keys.iter().filter(dirty).map(|k| u64::from(k.sectors)).sum::<u64>();
    check_payload(media, id, &scan, tail, report);
}

/// A sealed segment must hold by both its summary and its records.
fn scan<P: Pmem>(
    media: &Media<P>,
    id: u32,
    header: &SegmentHeader,
    report: &mut CheckReport,
) -> Option<Scan> {
    let by_records = media.scan_records(id, header);
    if header.state == SegmentState::Sealed && header.summary_len > 0 {
        match media.scan_summary(id, header) {
            Ok(scan) => {
                let whole = by_records.is_ok_and(|r| r.losses.is_empty() && r.keys.len() >= scan.keys.len());
                if !whole {
                    report
                        .findings
                        .push(format!("segment {id}: records are damaged; its summary has their keys"));
                }
                return Some(scan);
            }
            Err(error) => report.findings.push(format!("segment {id}: its summary is damaged: {error}")),
        }
    }
    match by_records {
        Ok(scan) => Some(scan),
        Err(error) => {
            report.findings.push(format!("segment {id} cannot be read: {error}"));
            None
        }
    }
}

fn check_payload<P: Pmem>(media: &Media<P>, id: u32, scan: &Scan, tail: u64, report: &mut CheckReport) {
    let mut checksums = scan.checksums.iter();
    let mut block = [0; 4096];
    for key in &scan.keys {
        for piece in key.pieces() {
            let bytes = &mut block[..piece.sectors as usize * 512];
            let read = media.pmem.read(media.in_segment(id, piece.start * 512), bytes).is_ok();
            let expected = checksums.next();
            if !read || expected != Some(&crc32fast::hash(bytes)) {
                let first = key.first + u64::from(piece.start - key.payload);
                let state = if key.kind != KeyKind::Fill && key.epoch > tail { "dirty" } else { "clean" };
                let how = if read { "does not match its checksum" } else { "cannot be read" };
                report.findings.push(format!(
                    "segment {id}: {state} data of sectors {first}..{} {how}",
                    first + u64::from(piece.sectors)
                ));
            }
        }
    }
}

/// Writes an image's structures in words. Never writes to the media.
///
/// # Errors
/// `out` failed, or there is no cache to dump.
pub fn dump<P: Pmem>(pmem: &Arc<P>, keys: bool, out: &mut dyn Write) -> io::Result<()> {
    let media = load_media(pmem.clone()).map_err(io::Error::other)?;
    let (superblock, _) = load_superblock(&**pmem).map_err(io::Error::other)?;
    dump_superblock(&superblock, out)?;
    if let Some(start) = load_start(&media).newest {
        writeln!(
            out,
            "start    counter={} clean={} next_incarnation={} sync_failed={}",
            start.start_counter, start.clean, start.next_incarnation, start.sync_failed
        )?;
    }
    for slot in 0..media.geometry.volume_slots {
        let Some(d) = load_descriptor(&media, slot).newest.filter(|d| d.state != VolumeState::Empty) else {
            continue;
        };
        let tail = media
            .load(
                |copy| media.geometry.tail(slot, copy),
                |bytes| Tail::decode(bytes, &media.uuid, d.incarnation),
            )
            .newest;
        let epoch = tail.as_ref().map_or_else(|| "lost".to_owned(), |t| t.epoch.to_string());
        writeln!(
            out,
            "volume   slot={slot} name={} incarnation={} sectors={} mode={} order={} tail={epoch} backing={}",
            String::from_utf8_lossy(unpad(&d.name)),
            d.incarnation,
            d.sectors,
            d.mode,
            d.order,
            String::from_utf8_lossy(unpad(&d.path)).escape_debug(),
        )?;
        for lost in tail.iter().flat_map(|t| &t.lost) {
            let LostRange { range, version, time_s, cause } = lost;
            writeln!(
                out,
                "  lost   {}+{} version={version} cause={cause} time={time_s}",
                range.start, range.len
            )?;
        }
    }
    for id in 0..media.geometry.segment_count() {
        dump_segment(&media, id, keys, out)?;
    }
    Ok(())
}

fn dump_superblock(s: &Superblock, out: &mut dyn Write) -> io::Result<()> {
    let uuid = hex(&s.uuid);
    writeln!(
        out,
        "cache    uuid={uuid} device_size={} segment_size={} segments={} slots={} created_by={} label={}",
        s.device_size,
        s.segment_size,
        s.segment_count,
        s.volume_slots,
        String::from_utf8_lossy(unpad(&s.created_by)).escape_debug(),
        String::from_utf8_lossy(unpad(&s.label)).escape_debug(),
    )?;
    for (index, member) in s.members().iter().enumerate() {
        writeln!(
            out,
            "member   index={index} uuid={} base={} start={}",
            hex(&member.uuid),
            member.base,
            member.start
        )?;
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn dump_segment<P: Pmem>(media: &Media<P>, id: u32, keys: bool, out: &mut dyn Write) -> io::Result<()> {
    let Some(h) = media.load_header(id).newest else {
        return writeln!(out, "segment  id={id} lost");
    };
    if h.state == SegmentState::Free {
        return Ok(());
    }
    let Ok(scan) = media.scan_records(id, &h) else {
        return writeln!(out, "segment  id={id} unreadable");
    };
    writeln!(
        out,
        "segment  id={id} state={} incarnation={} generation={} records={} keys={} payload_end={} log_low={} torn={}",
        h.state,
        h.incarnation,
        h.generation,
        scan.last_sequence,
        scan.keys.len(),
        scan.payload_end,
        scan.log_low,
        scan.torn,
    )?;
    if keys {
        for key in &scan.keys {
            writeln!(
                out,
                "  key    {} {}+{} payload={} version={} epoch={}",
                key.kind, key.first, key.sectors, key.payload, key.version, key.epoch
            )?;
        }
    }
    Ok(())
}
