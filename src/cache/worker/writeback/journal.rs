//! A group on its way to the redo area: payload in address order, gathered into large writes, then the
//! table; and the samples by which the disk will be known again.
//!
//! Nothing here counts before the header says so: see `group.rs`.

use super::super::super::counters::add;
use super::super::super::env::Env;
use super::super::super::health::Failure;
use super::super::super::redo::{PAYLOAD_MAX, sample, sample_crc, sample_len, sample_offset, sample_places};
use super::super::super::stripes::lock;
use super::super::Progress;
use super::damage::Damage;
use super::group::{DEPTH, Group, STAGE, Step};
use super::{Phase, Round, Writeback};
use crate::backing::{AlignedBuf, Backing, Channel, Op};
use crate::onmedia::{PAGE, RedoEntry, RedoHeader, RedoKind, RedoState, payload_checksum};
use crate::units::SectorRange;

impl<E: Env> Writeback<E> {
    /// Copies what is to be written to the area.
    pub(super) fn journal(&mut self, mut round: Round) -> Progress {
        let mut group = self.group.take().expect("a group is under way");
        let ended = self.journal_some(&mut group, &mut round.damage, false);
        self.volume.core.pacer.journaled(group.journaled, group.sectors);
        self.group = Some(group);
        match ended {
            Ok(true) => {
                self.phase = Phase::Group(round, Step::Table);
                Progress::Did
            }
            Ok(false) => {
                self.phase = Phase::Group(round, Step::Journal);
                Progress::Waiting
            }
            Err(failure) => self.abort(failure),
        }
    }

    /// Copies as much of a group to the area as is not too much at a time. True when all of it is on its
    /// way.
    pub(super) fn journal_some(
        &mut self,
        group: &mut Group,
        damage: &mut Damage,
        is_next: bool,
    ) -> Result<bool, Failure> {
        let core = self.volume.core.clone();
        while self.redo_in_flight() < DEPTH as usize - 1 {
            let mut plans = lock(&core.plan);
            let plan = if is_next { plans.next.as_deref_mut() } else { Some(&mut *plans) };
            let Some(plan) = plan.filter(|plan| !plan.todo.is_empty()) else {
                drop(plans);
                self.end_journal(group);
                return Ok(true);
            };
            let op = self.next_op(plan, damage, false)?;
            drop(plans);
            if let Some(op) = op {
                self.append(group, op);
            }
        }
        Ok(false)
    }

    fn append(&mut self, group: &mut Group, op: Op) {
        let block = self.redo().block as usize;
        match op {
            Op::Write { offset, buf } => {
                assert!(buf.len() as u64 <= PAYLOAD_MAX, "an operation of write-back is bounded");
                // A payload may go over into the next stages.
                group.fill = group.fill.next_multiple_of(block);
                let at = group.at + group.fill as u64;
                let range = SectorRange::new(offset / 512, buf.len() as u64 / 512);
                group.entries.push(RedoEntry {
                    range,
                    kind: RedoKind::Data,
                    crc: payload_checksum(&buf),
                    at,
                });
                group.firsts.push(payload_checksum(&buf[..512]));
                group.journaled += range.len;
                self.stage(group, &buf);
                if self.spare.len() < super::DEPTH as usize {
                    self.spare.push(buf);
                }
            }
            Op::Zero { offset, len, unmap } => {
                let range = SectorRange::new(offset / 512, len / 512);
                let kind = if unmap { RedoKind::Unmap } else { RedoKind::Zero };
                group.entries.push(RedoEntry { range, kind, crc: 0, at: 0 });
                group.firsts.push(0);
            }
            Op::Read { .. } | Op::Flush => unreachable!("write-back writes"),
        }
    }

    /// Appends bytes to the stage, and sends off what is full.
    fn stage(&mut self, group: &mut Group, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let mut stage = group.stage.take().unwrap_or_else(|| self.new_stage());
            let part = bytes.len().min(STAGE - group.fill);
            stage[group.fill..group.fill + part].copy_from_slice(&bytes[..part]);
            group.fill += part;
            bytes = &bytes[part..];
            group.stage = Some(stage);
            if group.fill == STAGE {
                self.send_stage(group);
            }
        }
    }

    fn new_stage(&mut self) -> AlignedBuf {
        let mut stage = self.spare_stages.pop().unwrap_or_else(|| AlignedBuf::new(STAGE));
        stage.set_len(STAGE);
        stage
    }

    /// Sends the stage off, up to the next whole page.
    fn send_stage(&mut self, group: &mut Group) {
        let Some(mut stage) = group.stage.take() else { return };
        let len = group.fill.next_multiple_of(PAGE);
        stage[group.fill..len].fill(0);
        stage.set_len(len);
        let op = Op::Write { offset: group.at, buf: stage };
        group.at += len as u64;
        group.fill = 0;
        add(&self.volume.core.tally.redo_ops, 1);
        add(&self.volume.core.tally.redo_bytes, len as u64);
        self.redo_submit(op);
    }

    /// Writes what is left of the payload, and makes table and header.
    fn end_journal(&mut self, group: &mut Group) {
        self.send_stage(group);
        let mut table = Vec::with_capacity(group.entries.len() * RedoEntry::SIZE);
        group.entries.iter().for_each(|entry| entry.encode(&mut table));
        let (cache, core) = (&self.volume.cache, &self.volume.core);
        let descriptor = lock(&core.descriptor).0.clone();
        let header = RedoHeader {
            sequence: 0,
            cache_uuid: cache.media.uuid,
            volume_uuid: descriptor.uuid,
            incarnation: descriptor.incarnation,
            backing_size: descriptor.backing_size,
            state: RedoState::Committed,
            is_part: group.part.is_some(),
            part_epoch: group.part.map_or(0, |(epoch, _)| epoch),
            part_version: group.part.map_or(0, |(_, version)| version),
            epoch: group.epoch,
            time_ms: group.time_ms,
            table: group.at,
            entries: group.entries.len() as u32,
            table_crc: payload_checksum(&table),
            ..RedoHeader::default()
        };
        (group.header, group.table) = (Some(Self::name_joint(group, header)), table);
    }

    /// Writes the table, and reads what is sampled.
    pub(super) fn write_table(&mut self, round: Round) -> Progress {
        let mut group = self.group.take().expect("a group is under way");
        let is_sent = self.table_some(&mut group);
        self.group = Some(group);
        if !is_sent {
            self.phase = Phase::Group(round, Step::Table);
            return Progress::Waiting;
        }
        self.read_samples();
        self.phase = Phase::Group(round, Step::Body);
        Progress::Waiting
    }

    /// Writes as much of a group's table as is not too much at a time. True when all of it is on its way.
    pub(super) fn table_some(&mut self, group: &mut Group) -> bool {
        while group.sent < group.table.len() {
            if self.redo_in_flight() >= DEPTH as usize - 1 {
                return false;
            }
            let part = group.sent..group.table.len().min(group.sent + STAGE);
            group.sent = part.end;
            let bytes = group.table[part].to_vec();
            self.stage(group, &bytes);
            self.send_stage(group);
        }
        true
    }

    fn read_samples(&mut self) {
        let disk = self.volume.backing.clone();
        let group = self.group.as_ref().expect("a group is under way");
        let sectors = disk.geometry().size / 512;
        let places = sample_places(&group.entries, sectors, group.epoch ^ group.time_ms);
        self.reads.clear();
        for sector in places {
            let buf = AlignedBuf::new(sample_len(&*disk));
            self.submit_as(sector, Op::Read { offset: sample_offset(&*disk, sector), buf });
        }
        self.channel.as_mut().expect("opened before the round").kick();
    }

    pub(super) fn take_samples(&mut self) {
        let disk = self.volume.backing.clone();
        let group = self.group.as_mut().expect("a group is under way");
        for (sector, block) in self.reads.drain(..) {
            let before = sample_crc(&block, &*disk, sector);
            let entry =
                group.entries.iter().position(|e| e.kind == RedoKind::Data && e.range.start == sector);
            group.samples.push(sample(sector, before, entry.map(|i| group.firsts[i])));
        }
    }
}
