//! Images kept from earlier versions of the format: each opens with all that it holds, and what a later
//! version may be is refused with a sentence.
//!
//! `images/version-1.txt` is what a program of version 1 left at a kill: a cache of ten segments of which
//! reclaim had emptied most once, with dirty data of two volumes in several epochs; `volume0` in strict order;
//! `volume1` in grouped order, with a group committed in its redo area and not on its disk; a trimmed
//! range, a zeroed one, and versions that newer ones have replaced. It is not made anew when the
//! program changes: that is its use. A new version of the format adds a file, made by
//! `cargo test --features sim --test crash make_an_image -- --ignored`.
//!
//! Rows of such a file: `media LEN META`; `disk N SECTORS IDENTITY`, with `sidecar N BYTES` of what stands
//! beside it; then bytes that are not zero, `OFFSET: BYTES` of the media and `N/OFFSET: BYTES` of a disk. Whole sectors
//! of a guest's are `= VOLUME SECTOR WRITE` for their bytes, by the simulation's own rule (`SimBuffer`). In
//! the end `expect VOLUME SECTOR COUNT WRITE` says what the guest had last written there.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::Command;
use std::sync::Arc;

use pcache_vhost::cache::{Cache, FormatOptions, Mode, Order, Verdict, check, format};
use pcache_vhost::onmedia::{Geometry, PAGE, RedoHeader, RedoState, Superblock, VERSION, payload_checksum};
use pcache_vhost::pmem::MediaClass::AssumeDax;
use pcache_vhost::pmem::Pmem;
use pcache_vhost::sim::{
    DiskState, Machine, Memory, Rng, SimBuffer, SimClock, SimEnv, SimPmem, Snapshot, Style, World,
};
use pcache_vhost::volume::{Request, RequestKind, Status};

const VERSION_1: &str = include_str!("images/version-1.txt");
/// Bytes of a row, and of a sector.
const ROW: usize = 32;
const SECTOR: usize = 512;
const META: u64 = 24 << 10;
/// Sectors of each volume, and of each redo area.
const SECTORS: u64 = 256;
const REDO_SECTORS: u64 = 120;

const STYLES: [Style; 2] = [style(Order::Strict), style(Order::Grouped)];

const fn style(order: Order) -> Style {
    Style { mode: Mode::Writeback, order, write_cache: true, pass_discard: false }
}

/// What a kept image holds, and what its volumes must turn out to be.
struct Kept {
    image: Snapshot,
    expected: Vec<Vec<u64>>,
}

impl Kept {
    fn read(text: &str) -> Self {
        let number = |word: &str| word.parse::<u64>().expect("a number");
        let mut media = Vec::new();
        let mut meta = 0;
        let mut disks: Vec<(Vec<u8>, u64, Option<Vec<u8>>)> = Vec::new();
        let mut expected: Vec<Vec<u64>> = Vec::new();
        for row in text.lines() {
            let words: Vec<&str> = row.split_whitespace().collect();
            match &words[..] {
                ["media", len, meta_size] => {
                    (media, meta) = (vec![0; number(len) as usize], number(meta_size))
                }
                ["disk", _, sectors, identity] => {
                    disks.push((vec![0; number(sectors) as usize * SECTOR], number(identity), None));
                }
                ["sidecar", disk, bytes] => disks[number(disk) as usize].2 = Some(unhex(bytes)),
                ["expect", volume, first, count, value] => {
                    expected
                        .resize(expected.len().max(number(volume) as usize + 1), vec![0; SECTORS as usize]);
                    let sectors = &mut expected[number(volume) as usize][number(first) as usize..];
                    sectors[..number(count) as usize].fill(number(value));
                }
                [place, bytes @ ..] => {
                    let place = place.trim_end_matches(':');
                    let (into, at) = match place.split_once('/') {
                        Some((disk, at)) => (&mut disks[number(disk) as usize].0, at),
                        None => (&mut media, place),
                    };
                    let bytes = match bytes {
                        ["=", volume, sector, write] => {
                            SimBuffer::of_write(number(volume) as usize, number(sector), 1, number(write))
                                .bytes
                        }
                        [bytes] => unhex(bytes),
                        _ => panic!("what is this: {row}"),
                    };
                    let at = usize::from_str_radix(at, 16).expect("hexadecimal");
                    into[at..at + bytes.len()].copy_from_slice(&bytes);
                }
                [] => {}
            }
        }
        let memory = Memory::new(AssumeDax, media.len() as u64).with_back(meta);
        let disks = disks.into_iter().enumerate().map(|(number, (bytes, identity, sidecar))| {
            let is_guests = number < STYLES.len();
            let state = if is_guests { guests_disk(number, bytes) } else { DiskState::raw_of(&bytes) };
            let mut state = state.named(identity);
            state.sidecar = sidecar;
            state
        });
        let world = World::new(Snapshot { what: "an image", memory, disks: disks.collect() }, 1);
        let pmem = SimPmem::new(&world);
        for (at, row) in media.chunks(PAGE).enumerate() {
            pmem.write((at * PAGE) as u64, row).expect("inside");
        }
        pmem.fence();
        Self { image: world.photograph("an image"), expected }
    }

    fn world(&self) -> Arc<World> {
        World::new(self.image.clone(), 1)
    }
}

fn unhex(text: &str) -> Vec<u8> {
    let digit = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).expect("hexadecimal");
    (0..text.len()).step_by(2).map(digit).collect()
}

fn guests_disk(volume: usize, bytes: Vec<u8>) -> DiskState {
    let bytes = SimBuffer { bytes, gone_from: None };
    DiskState::new(bytes.values(volume, 0).expect("a guest's sectors"))
}

/// The group that an area holds, if one is committed.
fn committed(area: &DiskState) -> Option<RedoHeader> {
    let page = (PAGE / SECTOR) as u64;
    let ends = [0, area.sectors() - page].map(|first| area.bytes(first..first + page));
    let headers = ends.iter().filter_map(|page| RedoHeader::decode(page).ok());
    headers.max_by_key(|header| header.sequence).filter(|header| header.state == RedoState::Committed)
}

#[test]
fn an_image_of_version_1_opens_with_all_that_it_holds() {
    let kept = Kept::read(VERSION_1);
    let world = kept.world();
    let pmem = Arc::new(SimPmem::new(&world));
    let report = check(&pmem);
    assert_eq!((report.verdict, report.volumes.len()), (Verdict::Clean, 2), "{:?}", report.findings);
    assert!(report.volumes.iter().all(|row| row.dirty_sectors > 0), "{:?}", report.volumes);
    let group = world.with(|w| committed(&w.disks[3])).expect("a group is under way");
    assert!(group.entries > 1, "{group:?}");
    let of_group = |w: &World| w.with(|w| w.disks[1].values());
    let before = of_group(&world);
    let mut machine = Machine::open(&world, &STYLES, 1).expect("it opens");
    assert!(machine.report.findings.is_empty() && machine.report.dirty_bytes > 0, "{:?}", machine.report);
    assert!(of_group(&world) != before, "an attach applies the group");
    for (volume, expected) in kept.expected.iter().enumerate() {
        let shown = machine.read_all(volume).expect("every sector can be read");
        assert!(shown == *expected, "volume {volume} shows {:?}", differences(&shown, expected));
    }
    drain(&mut machine);
    machine.close().expect("nothing fails here");
    for (volume, expected) in kept.expected.iter().enumerate() {
        let alone = world.with(|w| w.disks[volume].durable_values().to_vec());
        assert!(alone == *expected, "disk {volume} has {:?}", differences(&alone, expected));
    }
    let report = check(&pmem);
    assert_eq!(report.verdict, Verdict::Clean, "{:?}", report.findings);
    assert!(report.volumes.iter().all(|row| row.dirty_sectors == 0), "{:?}", report.volumes);
    // A feature comes with the first change that needs it, no sooner: who wrote this image can read it again.
    let mut page = [0; PAGE];
    pmem.read(0, &mut page).expect("it can be read");
    let superblock = Superblock::decode(&page).expect("it is whole");
    assert_eq!((superblock.features_incompat, superblock.features_ro_compat), (0, 0));
}

fn differences(found: &[u64], expected: &[u64]) -> Vec<(usize, u64, u64)> {
    let pairs = found.iter().zip(expected).enumerate();
    pairs.filter(|(_, (a, b))| a != b).map(|(sector, (a, b))| (sector, *a, *b)).take(8).collect()
}

fn drain(machine: &mut Machine) {
    for _ in 0..10_000 {
        if machine.served.iter().all(|served| served.volume.is_clean()) {
            return;
        }
        machine.clock.advance(500);
        machine.step_all();
    }
    panic!("write-back never ends");
}

/// The program itself has another size of metadata ends, and reads whatever the superblock says.
#[test]
fn the_program_checks_and_dumps_an_image_of_version_1() {
    let kept = Kept::read(VERSION_1);
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("kept.img");
    std::fs::write(&path, kept.image.memory.bytes()).expect("a file");
    for (verb, expected) in [("check", "kept.img: clean"), ("dump", "volume1")] {
        let ran =
            Command::new(env!("CARGO_BIN_EXE_pcache-vhost")).arg(verb).arg("--cache").arg(&path).output();
        let ran = ran.expect("the program runs");
        let said = String::from_utf8_lossy(&ran.stdout).into_owned();
        assert!(ran.status.success() && said.contains(expected), "{verb}: {said}");
    }
    assert!(std::fs::read(&path).expect("it is there") == kept.image.memory.bytes(), "looking wrote to it");
}

#[test]
fn what_a_later_version_may_be_is_refused_with_a_sentence_and_left_as_it_is() {
    type Change = fn(&mut [u8; PAGE]);
    let cases: [(Change, &str); 3] = [
        (|page| page[8] = 2, "format version 2, this program knows 1 only"),
        (|page| page[37] = 1, "incompatible features 0x10000000000 that this program does not know"),
        (|page| page[29] = 1, "features that this program may read but not write"),
    ];
    let kept = Kept::read(VERSION_1);
    for (change, sentence) in cases {
        let world = kept.world();
        let pmem = Arc::new(SimPmem::new(&world));
        for at in [0, pmem.len() - META] {
            let mut page = [0; PAGE];
            pmem.read(at, &mut page).expect("it can be read");
            change(&mut page);
            page[12..16].fill(0);
            let crc = payload_checksum(&page);
            page[12..16].copy_from_slice(&crc.to_le_bytes());
            pmem.write(at, &page).expect("it can be written");
        }
        pmem.fence();
        let before = world.with(|w| w.memory.bytes());
        let refused = Cache::<SimEnv>::open(pmem, SimClock::default()).map(drop).expect_err(sentence);
        assert!(refused.to_string().contains(sentence), "{refused}");
        assert!(world.with(|w| w.memory.bytes()) == before, "{sentence}: it was written to");
    }
}

#[test]
fn what_is_formatted_now_is_of_the_version_that_the_document_describes() {
    let document = include_str!("../../src/onmedia/FORMAT.md");
    let row = document.lines().find(|line| line.starts_with("| `VERSION` |")).expect("it says its version");
    let said: u32 = row.split('|').nth(2).expect("a value").trim().parse().expect("a number");
    assert!(document.contains(&format!("Version {said}. This document is the format")));
    let world = blank();
    let mut version = [0; 4];
    SimPmem::new(&world).read(8, &mut version).expect("it can be read");
    assert_eq!((u32::from_le_bytes(version), VERSION), (said, said));
    let kept = format!("images/version-{said}.txt");
    let is_kept = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/crash").join(&kept).exists();
    assert!(is_kept, "no image of this version is kept: the head of this file says how to make one");
}

/// A fresh cache, two disks and two redo areas.
fn blank() -> Arc<World> {
    let geometry = Geometry::custom(META, 64 << 10, 10, 2).expect("a geometry");
    let memory = Memory::new(AssumeDax, geometry.device_size).with_back(META);
    let disks = vec![
        DiskState::new((1..=SECTORS).collect()),
        DiskState::new((1..=SECTORS).collect()).named(3),
        DiskState::raw(REDO_SECTORS).named(4),
        DiskState::raw(REDO_SECTORS).named(2),
    ];
    let world = World::new(Snapshot { what: "the beginning", memory, disks }, 1);
    let options = FormatOptions { geometry: Some(geometry), ..FormatOptions::default() };
    format(&SimPmem::new(&world), &SimClock::default(), &options).expect("fresh memory");
    world
}

/// A guest of two volumes that remembers what it wrote.
struct Guest {
    world: Arc<World>,
    machine: Machine,
    expected: Vec<Vec<u64>>,
    next: u64,
}

impl Guest {
    fn request(&mut self, volume: usize, kind: RequestKind, sector: u64, data: SimBuffer) {
        let tag = self.next as u32;
        self.machine.submit(volume, 0, Request { tag, kind, sector, data });
        self.machine.commit(volume, 0);
        for _ in 0..10_000 {
            if let Some(done) = self.machine.poll(volume, 0).into_iter().find(|done| done.tag == tag) {
                assert_eq!(done.status, Status::Ok);
                return;
            }
            self.machine.clock.advance(10);
            self.machine.step_all();
        }
        panic!("a request never ends");
    }

    fn write(&mut self, volume: usize, first: u64, count: u64) {
        self.next += 1;
        let value = 10_000 + self.next;
        self.request(volume, RequestKind::Write, first, SimBuffer::of_write(volume, first, count, value));
        self.expected[volume][first as usize..][..count as usize].fill(value);
    }

    fn zero(&mut self, volume: usize, first: u64, count: u64, kind: RequestKind) {
        self.next += 1;
        self.request(volume, kind, first, SimBuffer::default());
        self.expected[volume][first as usize..][..count as usize].fill(0);
    }

    fn flush(&mut self, volume: usize) {
        self.next += 1;
        self.request(volume, RequestKind::Flush, 0, SimBuffer::default());
    }

    /// More than the cache holds, all of it on the disks in the end.
    fn turn_over(&mut self) {
        for round in 0..3 {
            for block in 0..40 {
                for volume in 0..2 {
                    self.write(volume, (block * 11 + round) % 240, 8);
                    self.machine.clock.advance(200);
                    self.machine.step_all();
                }
            }
        }
        drain(&mut self.machine);
        assert!(self.machine.cache.space().free > 0);
    }

    /// Three epochs of each volume, none of which is on a disk.
    fn leave_dirty(&mut self) {
        for epoch in 0..3 {
            for volume in 0..2 {
                self.write(volume, 16 + epoch * 40, 9);
                // Superseded, in the epoch and by the next.
                self.write(volume, 16 + epoch * 40, 2);
                self.write(volume, 20 + epoch, 3);
                self.write(volume, 200, 8);
                let unmap = epoch == 1;
                self.zero(volume, 228 + epoch * 8, 5, RequestKind::WriteZeroes { sectors: 5, unmap });
                if epoch < 2 {
                    self.flush(volume);
                }
            }
        }
    }
}

/// Not a claim: this is how an image is made when the format gets another version.
#[test]
#[ignore = "writes tests/crash/images/new.txt, to be kept under the name of its version: cargo test --features sim --test crash make_an_image -- --ignored"]
fn make_an_image() {
    let text =
        (0..1000).find_map(killed_at).expect("between a group's header and its first write is a moment");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/crash/images/new.txt");
    std::fs::write(path, text).expect("a file");
}

/// What is left by a kill at the `n`-th event of write-back of `volume1`, if a group is committed there of
/// which nothing has reached the disk.
fn killed_at(n: u64) -> Option<String> {
    let world = blank();
    let machine = Machine::open(&world, &STYLES, 1).expect("a fresh cache");
    let mut guest = Guest { world, machine, expected: vec![(1..=SECTORS).collect(); 2], next: 0 };
    guest.turn_over();
    let evicted: u64 =
        guest.machine.served.iter().map(|served| served.volume.counters().evicted_sectors).sum();
    assert!(evicted > 0, "something was evicted");
    guest.leave_dirty();
    let before = guest.world.with(|w| {
        w.cuts.at = w.events + n + 1;
        w.disks[1].values()
    });
    for _ in 0..50 {
        guest.machine.clock.advance(500);
        guest.machine.writeback(1);
        guest.machine.sync();
    }
    let (_, cut) = guest.world.take_cuts().pop()?;
    let image = cut.daemon_crash(&mut Rng::new(1));
    let is_it = committed(&image.disks[3]).is_some() && image.disks[1].values() == before;
    is_it.then(|| told(&image, &guest.expected))
}

/// The text of an image.
fn told(image: &Snapshot, expected: &[Vec<u64>]) -> String {
    let mut text = String::new();
    let mut say = |row: String| writeln!(text, "{row}").expect("a string takes all");
    let media = image.memory.bytes();
    say(format!("media {} {META}", media.len()));
    for (number, disk) in image.disks.iter().enumerate() {
        say(format!("disk {number} {} {}", disk.sectors(), disk.identity));
        if let Some(sidecar) = &disk.sidecar {
            say(format!("sidecar {number} {}", hex(sidecar)));
        }
    }
    rows(&media).into_iter().for_each(|(at, row)| say(format!("{at:x}: {row}")));
    for (number, disk) in image.disks.iter().enumerate() {
        let bytes = match number < STYLES.len() {
            true => {
                let of = |(sector, value): (usize, u64)| {
                    SimBuffer::of_write(number, sector as u64, 1, value).bytes
                };
                disk.values().into_iter().enumerate().flat_map(of).collect()
            }
            false => disk.bytes(0..disk.sectors()),
        };
        rows(&bytes).into_iter().for_each(|(at, row)| say(format!("{number}/{at:x}: {row}")));
    }
    for (volume, sectors) in expected.iter().enumerate() {
        let mut first = 0;
        for run in sectors.chunk_by(|a, b| a == b) {
            if run[0] != 0 {
                say(format!("expect {volume} {first} {} {}", run.len(), run[0]));
            }
            first += run.len();
        }
    }
    text
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The rows of what is not zero.
fn rows(bytes: &[u8]) -> BTreeMap<usize, String> {
    let mut rows = BTreeMap::new();
    for (index, sector) in bytes.chunks(SECTOR).enumerate() {
        let at = index * SECTOR;
        if let Some(row) = of_guest(sector) {
            rows.insert(at, row);
            continue;
        }
        let parts = sector.chunks(ROW).enumerate().filter(|(_, row)| row.iter().any(|byte| *byte != 0));
        rows.extend(parts.map(|(part, row)| (at + part * ROW, hex(row))));
    }
    rows
}

/// Whose sector these bytes are, if a guest's.
fn of_guest(bytes: &[u8]) -> Option<String> {
    let place = u64::from_le_bytes(*bytes.get(8..)?.first_chunk()?);
    let (volume, sector) = ((place >> 48).checked_sub(1)?, place & ((1 << 48) - 1));
    let buffer = SimBuffer { bytes: bytes.to_vec(), gone_from: None };
    let values = (volume < 2).then(|| buffer.values(volume as usize, sector).ok())??;
    (values != [0]).then(|| format!("= {volume} {sector} {}", values[0]))
}
