//! A whole cache image: recovered, checked, dumped, served and written back, whatever it says.
//!
//! The input is a list of changes to an image that the engine has made: bytes, fields, keys, lines
//! moved about. After a change the check over it (CRC or keyed hash) can be made right again, so that
//! what the fields *say* is tried and not only that changes are noticed. The secret and the identity
//! of these images are constants, hence an input means the same everywhere.
//!
//! Claims: no panic, no access outside the media or the disk, `check` and `dump` never write, every
//! read comes back, and nothing goes on without end. What was read need not be right: whoever knows
//! the secret can write anything.

use std::sync::{Arc, OnceLock};

use super::Input;
use super::plain::{Plain, PlainClock, PlainDisk, PlainPmem};
use crate::cache::queue::Queue;
use crate::cache::worker::Stepper;
use crate::cache::{
    AttachOptions, Cache, FormatOptions, Mode, Order, Volume, VolumeDisk, check, dump, format, has_volume,
};
use crate::onmedia::{
    Field, Geometry, Key, PAGE, RECORD_MAGIC, STRUCTURES, SUMMARY_MAGIC, Secret, SegmentHeader, StartPage,
    Superblock, VolumeDescriptor, liveness_word, sip,
};
use crate::pmem::{MediaClass, Pmem};
use crate::sim::{Rng, SimBuffer};
use crate::volume::{Disk, DiskQueue, Done, Request, RequestKind, Status};
use crate::wake::Waker;

/// Sectors of each disk.
const SECTORS: u64 = 512;
const SEGMENT: u32 = 64 << 10;
const SEGMENTS: u32 = 12;
/// Volumes, and slots for them.
const VOLUMES: usize = 2;
const UUID: [u8; 16] = *b"fuzzed cache uid";
const SECRET: [u8; 16] = *b"no guest knows!!";
/// Changes of one input.
const CHANGES_MAX: u32 = 24;
/// Rounds of all workers after which a read counts as lost, and after which an input has had enough.
const ROUNDS_MAX: u32 = 2000;
const ROUNDS: u32 = 60;

/// A structure in an image.
#[derive(Clone, Copy)]
struct Place {
    at: usize,
    name: &'static str,
    size: usize,
    fields: &'static [Field],
}

/// An image as the engine left it.
struct Base {
    class: MediaClass,
    bytes: Vec<u8>,
    disks: Vec<Vec<u8>>,
    places: Vec<Place>,
}

fn geometry() -> Geometry {
    Geometry::custom(32 << 10, SEGMENT, SEGMENTS, VOLUMES as u32 + 1).expect("a geometry")
}

/// The images: of each class one in use, with dirty data and open segments, and one that was closed.
fn bases() -> &'static [Base] {
    static BASES: OnceLock<Vec<Base>> = OnceLock::new();
    BASES.get_or_init(|| {
        let classes = [MediaClass::AssumeDax, MediaClass::PageCache];
        classes.into_iter().flat_map(|class| [false, true].map(|closed| base(class, closed))).collect()
    })
}

fn base(class: MediaClass, closed: bool) -> Base {
    let geometry = geometry();
    let pmem = Arc::new(PlainPmem::new(vec![0; geometry.device_size as usize], class));
    let options = FormatOptions { geometry: Some(geometry), ..FormatOptions::default() };
    format(&*pmem, &PlainClock::default(), &options).expect("a fresh cache");
    make_constant(&pmem, &geometry);
    let disks = disks(vec![vec![0x77; SECTORS as usize * 512]; VOLUMES]);
    let style = Choices {
        accept_loss: false,
        read_only: false,
        modes: [Mode::Writeback; VOLUMES],
        orders: [Order::Strict, Order::Relaxed],
    };
    let mut machine = Machine::open(&pmem, &disks, &style).expect("a fresh cache");
    let mut rng = Rng::new(7);
    for round in 0..120 {
        let volume = rng.index(VOLUMES);
        let (first, count) = (rng.below(400), rng.between(1, 24));
        match rng.below(12) {
            0..7 => machine.write(volume, first, count, round as u8),
            7 => machine.zero(volume, first, count),
            8 | 9 => _ = machine.read(volume, first, count),
            10 => machine.flush(volume),
            // The latest stay dirty.
            _ if round < 90 => machine.rounds(40),
            _ => {}
        }
    }
    if closed {
        machine.close();
    }
    let bytes = pmem.bytes();
    let places = places(&geometry, &bytes);
    Base { class, bytes, disks: disks.iter().map(|disk| disk.bytes()).collect(), places }
}

fn disks(bytes: Vec<Vec<u8>>) -> Vec<Arc<PlainDisk>> {
    bytes.into_iter().enumerate().map(|(i, bytes)| Arc::new(PlainDisk::new(bytes, i as u64 + 1))).collect()
}

/// Gives a fresh cache the constant secret and identity.
fn make_constant(pmem: &PlainPmem, geometry: &Geometry) {
    let put = |at: u64, bytes: &[u8]| pmem.write(at, bytes).expect("plain memory");
    let page = |at: u64| {
        let mut page = [0; PAGE];
        pmem.read(at, &mut page).expect("plain memory");
        page
    };
    for copy in 0..2 {
        let at = geometry.superblock(copy);
        let superblock = Superblock::decode(&page(at)).expect("a fresh cache");
        let was = superblock.uuid;
        let secret = Secret::new(SECRET);
        put(at, &Superblock { uuid: UUID, secret, ..superblock }.encode());
        let at = geometry.start_page(copy);
        let start = StartPage::decode(&page(at), &was).expect("a fresh cache");
        put(at, &StartPage { cache_uuid: UUID, ..start }.encode());
        for slot in 0..geometry.volume_slots {
            put(geometry.descriptor(slot, copy), &VolumeDescriptor::empty(UUID, slot).encode());
        }
        for id in 0..geometry.segment_count {
            let at = geometry.segment(id) + u64::from(geometry.header_offset(copy));
            let header = SegmentHeader::decode(&page(at), &was, geometry, id).expect("a fresh cache");
            put(at, &SegmentHeader { cache_uuid: UUID, ..header }.encode());
        }
    }
}

fn places(geometry: &Geometry, bytes: &[u8]) -> Vec<Place> {
    let mut places = Vec::new();
    let mut add = |at: u64, name: &str| {
        let (name, size, fields) = STRUCTURES.iter().find(|row| row.0 == name).expect("a structure");
        places.push(Place { at: at as usize, name, size: *size, fields });
    };
    for copy in 0..2 {
        add(geometry.superblock(copy), "Superblock");
        add(geometry.start_page(copy), "StartPage");
        for slot in 0..VOLUMES as u32 {
            add(geometry.descriptor(slot, copy), "VolumeDescriptor");
            add(geometry.tail(slot, copy), "Tail");
        }
        for id in 0..geometry.segment_count {
            add(geometry.segment(id) + u64::from(geometry.header_offset(copy)), "SegmentHeader");
            add(geometry.segment(id) + u64::from(geometry.witness_offset(copy)), "Witness");
        }
    }
    for id in 0..geometry.segment_count {
        for offset in (geometry.data_start()..geometry.data_end()).step_by(256) {
            let at = geometry.segment(id) + u64::from(offset);
            match word(bytes, at as usize) {
                RECORD_MAGIC => add(at, "RecordHeader"),
                SUMMARY_MAGIC => add(at, "SummaryHeader"),
                _ => {}
            }
        }
    }
    places
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

/// The target.
pub fn image(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let choice = input.byte();
    let base = &bases()[usize::from(choice & 3)];
    let modes = [Mode::Writeback, Mode::Writethrough, Mode::Writearound, Mode::Writeback];
    let choices = Choices {
        accept_loss: choice & 4 != 0,
        read_only: choice & 128 != 0,
        modes: [modes[usize::from(choice >> 3 & 3)], Mode::Writeback],
        orders: [[Order::Strict, Order::Relaxed][usize::from(choice >> 5 & 1)], Order::Strict],
    };
    let mut bytes = base.bytes.clone();
    for _ in 0..CHANGES_MAX {
        if input.is_over() {
            break;
        }
        change(&mut bytes, base, &mut input);
    }
    if choice & 64 != 0 {
        bytes.truncate(bytes.len() - 512 * usize::from(input.byte()));
    }
    let pmem = Arc::new(PlainPmem::new(bytes, base.class));
    look(&pmem);
    let disks = disks(base.disks.clone());
    // The second life finds what the first one left: twice the same, or what it has sealed.
    for _ in 0..2 {
        let Ok(mut machine) = Machine::open(&pmem, &disks, &choices) else { return };
        machine.live();
    }
}

/// The verbs that only look.
fn look(pmem: &Arc<PlainPmem>) {
    let report = check(pmem);
    let is_line = |line: &str| !line.is_empty() && !line.contains(char::is_control);
    assert!(report.findings.iter().chain(&report.remarks).all(|line| is_line(line)));
    let mut text = Vec::new();
    match dump(pmem, true, &mut text) {
        Ok(()) => assert!(String::from_utf8(text).is_ok_and(|text| text.lines().all(is_line))),
        Err(error) => assert!(is_line(&error.to_string())),
    }
    _ = has_volume(pmem, "v0");
    assert_eq!(pmem.stores(), 0, "a verb that only looks has written");
}

/// One change.
fn change(bytes: &mut [u8], base: &Base, input: &mut Input<'_>) {
    let choice = input.byte();
    let place = base.places[usize::from(input.half()) % base.places.len()];
    let len = bytes.len();
    match choice & 15 {
        0..5 => change_field(bytes, place, place.at, place.size, place.fields, input),
        5..9 => {
            let records = || base.places.iter().filter(|p| has_keys(p));
            let nth = usize::from(input.byte()) % records().count().max(1);
            let Some(&record) = records().nth(nth) else { return };
            let keys = word(bytes, record.at + key_count_at(&record)) as usize;
            let key = input.below(256) % keys.max(1);
            let at = record.at + record.size + key * Key::SIZE;
            change_field(bytes, record, at.min(len - Key::SIZE), Key::SIZE, Key::FIELDS, input);
        }
        9 => {
            // Another structure of its kind, from elsewhere.
            let others = || base.places.iter().filter(|p| p.name == place.name);
            let Some(other) = others().nth(usize::from(input.byte()) % others().count()) else { return };
            bytes.copy_within(other.at..other.at + other.size, place.at);
            repair(bytes, place, choice);
        }
        10 => {
            let (from, to) = (usize::from(input.half()) * 64 % len, usize::from(input.half()) * 64 % len);
            let span = (64 << input.below(10)).min(len - from.max(to));
            bytes.copy_within(from..from + span, to);
        }
        11 => {
            let at = usize::from(input.half()) * 64 % len;
            let span = (64usize << input.below(7)).min(len - at);
            bytes[at..at + span].fill(input.byte());
        }
        12 => {
            let geometry = geometry();
            let (id, generation) = (u32::from(input.byte()) % SEGMENTS, u64::from(input.byte() & 7));
            let index = u32::from(input.byte()) % geometry.liveness_words();
            let live = liveness_word(&Secret::new(SECRET), id, generation, index, input.word());
            let at = geometry.segment(id) + u64::from(geometry.liveness_offset() + index * 8);
            bytes[at as usize..][..8].copy_from_slice(&live.to_le_bytes());
        }
        _ => {
            let at = input.word() as usize % len;
            let fresh = input.slice(1 + usize::from(choice >> 4));
            let end = (at + fresh.len()).min(len);
            bytes[at..end].copy_from_slice(&fresh[..end - at]);
        }
    }
}

fn has_keys(place: &Place) -> bool {
    matches!(place.name, "RecordHeader" | "SummaryHeader")
}

fn key_count_at(place: &Place) -> usize {
    place.fields.iter().find(|field| field.name == "key_count").map_or(0, |field| field.offset)
}

/// Changes a field of the structure at `at`, whose check is that of `place`.
fn change_field(
    bytes: &mut [u8],
    place: Place,
    at: usize,
    size: usize,
    fields: &[Field],
    input: &mut Input<'_>,
) {
    let (which, how) = (input.byte(), input.byte());
    let field = fields[usize::from(which) % fields.len()];
    assert!(field.offset + field.size <= size);
    let bytes_of_field = &mut bytes[at + field.offset..][..field.size];
    if field.size > 8 {
        let fresh = input.slice(field.size);
        bytes_of_field[..fresh.len()].copy_from_slice(fresh);
    } else {
        let mut old = [0; 8];
        old[..field.size].copy_from_slice(bytes_of_field);
        let old = u64::from_le_bytes(old);
        let value = match how & 7 {
            0..3 => input.edge(),
            3 => old.wrapping_add(input.byte().into()),
            4 => old.wrapping_sub(input.byte().into()),
            5 => old ^ 1 << (input.byte() & 63),
            6 => old.wrapping_mul(2),
            // Key kinds and flags stand in the upper bits of their word.
            _ => old & ((1 << 48) - 1) | u64::from(input.byte() & 7) << 48,
        };
        bytes_of_field.copy_from_slice(&value.to_le_bytes()[..field.size]);
    }
    repair(bytes, place, how);
}

/// Makes a structure's check right again, mostly.
fn repair(bytes: &mut [u8], place: Place, how: u8) {
    if how & 0xf0 == 0xf0 {
        return;
    }
    let secret = Secret::new(SECRET);
    let field = |name: &str| place.fields.iter().find(|field| field.name == name).map(|field| field.offset);
    let whole = &mut bytes[place.at..];
    if let Some(crc_at) = field("crc") {
        let whole = &mut whole[..place.size];
        whole[crc_at..crc_at + 4].fill(0);
        let crc = crc32fast::hash(whole);
        whole[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
    } else if place.name == "Witness" {
        let check = sip(&secret, &[b"witness\0", &whole[8..place.size]]);
        whole[..8].copy_from_slice(&check.to_le_bytes());
    } else if let (Some(check_at), Some(len_at)) = (field("check"), field("len")) {
        let len = (word(whole, len_at) as usize).clamp(place.size, whole.len().max(place.size));
        whole[check_at..check_at + 8].fill(0);
        let check = sip(&secret, &[&whole[..len]]);
        whole[check_at..check_at + 8].copy_from_slice(&check.to_le_bytes());
    }
}

/// How the volumes are attached.
struct Choices {
    accept_loss: bool,
    read_only: bool,
    modes: [Mode; VOLUMES],
    orders: [Order; VOLUMES],
}

/// An engine on plain media.
struct Machine {
    cache: Arc<Cache<Plain>>,
    volumes: Vec<Arc<Volume<Plain>>>,
    queues: Vec<Queue<Plain, SimBuffer>>,
    stepper: Stepper<Plain>,
    next_tag: u32,
}

impl Machine {
    /// Recovers and attaches what can be attached.
    ///
    /// # Errors
    /// The cache does not open, in words.
    fn open(pmem: &Arc<PlainPmem>, disks: &[Arc<PlainDisk>], choices: &Choices) -> Result<Self, String> {
        let (cache, report) =
            Cache::open(pmem.clone(), PlainClock::default()).map_err(|error| error.to_string())?;
        assert!(report.findings.iter().all(|line| !line.is_empty()));
        let (mut volumes, mut queues) = (Vec::new(), Vec::new());
        for (number, disk) in disks.iter().enumerate() {
            let options = AttachOptions {
                name: format!("v{number}"),
                backing: disk.clone(),
                mode: choices.modes[number],
                order: choices.orders[number],
                redo: None,
                data_crc: number == 0,
                pass_discard: true,
                reads: Default::default(),
                read_only: choices.read_only,
                serial: String::from("fuzz"),
                block_size: None,
                queues: 1,
                queue_size: 256,
                force_identity: choices.accept_loss,
                sidecar: None,
                accept_loss: choices.accept_loss,
                allow_volatile: false,
                group: None,
            };
            match cache.attach(options) {
                Ok(volume) => {
                    let disk = VolumeDisk(volume.clone());
                    queues.push(disk.open_queue(0, Waker::default()).map_err(|error| error.to_string())?);
                    volumes.push(volume);
                }
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
        let stepper = Stepper::new(&cache, &volumes);
        Ok(Self { cache, volumes, queues, stepper, next_tag: 0 })
    }

    /// A little of everything; reads must come back, the rest may wait for a disk that never helps.
    fn live(&mut self) {
        let space = self.cache.space();
        assert_eq!(space.free + space.used + space.bad, space.total, "space does not add up: {space:?}");
        for volume in 0..self.volumes.len() {
            for first in (0..SECTORS).step_by(128) {
                assert!(self.read(volume, first, 128).is_some(), "a read never comes back");
            }
        }
        self.rounds(4);
        for volume in 0..self.volumes.len() {
            for i in 0..8 {
                self.write(volume, i * 60, 20, 0x99);
            }
            self.zero(volume, 100, 50);
            self.flush(volume);
        }
        self.rounds(ROUNDS);
        for volume in 0..self.volumes.len() {
            assert!(self.read(volume, 0, 256).is_some(), "a read never comes back");
        }
        self.close();
    }

    fn submit(&mut self, volume: usize, kind: RequestKind, sector: u64, data: SimBuffer) -> Option<Status> {
        self.next_tag += 1;
        let tag = self.next_tag;
        self.queues[volume].submit(Request { tag, kind, sector, data });
        self.queues[volume].commit();
        let mut done: Vec<Done<SimBuffer>> = Vec::new();
        for round in 0..ROUNDS_MAX {
            self.queues[volume].poll(&mut done);
            if let Some(done) = done.iter().find(|done| done.tag == tag) {
                return Some(done.status);
            }
            if round >= ROUNDS && !matches!(kind, RequestKind::Read) {
                return None;
            }
            self.rounds(1);
        }
        None
    }

    fn read(&mut self, volume: usize, first: u64, count: u64) -> Option<Status> {
        self.submit(volume, RequestKind::Read, first, SimBuffer::to_read(count))
    }

    fn write(&mut self, volume: usize, first: u64, count: u64, byte: u8) {
        let data = SimBuffer { bytes: vec![byte; count as usize * 512], gone_from: None };
        _ = self.submit(volume, RequestKind::Write, first, data);
    }

    fn zero(&mut self, volume: usize, first: u64, sectors: u64) {
        let kind = RequestKind::WriteZeroes { sectors, unmap: true };
        _ = self.submit(volume, kind, first, SimBuffer::default());
    }

    fn flush(&mut self, volume: usize) {
        _ = self.submit(volume, RequestKind::Flush, 0, SimBuffer::default());
    }

    fn rounds(&mut self, count: u32) {
        for _ in 0..count {
            self.stepper.sync();
            for volume in 0..self.volumes.len() {
                self.stepper.writeback(volume);
            }
            self.stepper.housekeeper();
        }
    }

    fn close(&mut self) {
        self.queues.clear();
        for volume in &self.volumes {
            _ = self.cache.detach(volume);
        }
        _ = self.cache.close();
    }
}
