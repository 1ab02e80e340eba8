//! Images kept from earlier versions of the format: each opens with all that it holds, and what a later
//! one might be is refused with a sentence.
//!
//! `images/version-1.txt` is a cache of version 1 without features, as every program of that version leaves
//! it behind at a kill: rows of 32 bytes that are not zero, each after its offset. It is not made anew when
//! the program changes: that is its use. How it was made is told by the test that is ignored.

use std::fmt::Write;
use std::sync::Arc;

use pcache_vhost::cache::{AttachOptions, Cache, Mode, Order, Verdict, check};
use pcache_vhost::onmedia::{Superblock, payload_checksum};
use pcache_vhost::pmem::MediaClass::AssumeDax;
use pcache_vhost::pmem::Pmem;
use pcache_vhost::sim::{
    DiskState, Memory, Rng, Scene, SimBacking, SimClock, SimEnv, SimPmem, Snapshot, Style, World,
};

const VERSION_1: &str = include_str!("images/version-1.txt");
/// Bytes in a row.
const ROW: usize = 32;
/// Sectors of the disk before it; sector *s* holds write *s* + 1 where the cache brings nothing.
const SECTORS: u64 = 512;

/// What the disk holds once the cache is drained.
fn expected(sector: u64) -> u64 {
    match sector / 8 {
        // Zeroed, in part, after it was written.
        3 if sector == 27 => 0,
        // Written, drained, and some of it written again.
        2 | 5 => 9100 + sector / 8,
        0..8 => 9000 + sector / 8,
        30 => 0,
        _ => sector + 1,
    }
}

fn media(text: &str) -> Memory {
    let (head, rows) = text.split_once('\n').expect("a first line");
    let len: u64 = head.strip_prefix("bytes ").expect("its size").parse().expect("a number");
    let memory = Memory::new(AssumeDax, len).with_back(16 << 10);
    let world = World::new(Snapshot { what: "an image", memory, disks: Vec::new() }, 1);
    let pmem = SimPmem::new(&world);
    for row in rows.lines() {
        let (at, bytes) = row.split_once(": ").expect("an offset");
        let at = u64::from_str_radix(at, 16).expect("hexadecimal");
        let digit = |n: usize| u8::from_str_radix(&bytes[n..n + 2], 16).expect("hexadecimal");
        let bytes: Vec<u8> = (0..bytes.len()).step_by(2).map(digit).collect();
        pmem.write(at, &bytes).expect("inside");
    }
    pmem.fence();
    world.photograph("an image").memory
}

fn world(memory: Memory) -> Arc<World> {
    let disks = vec![DiskState::new((1..=SECTORS).collect())];
    World::new(Snapshot { what: "an image", memory, disks }, 1)
}

#[test]
fn an_image_of_version_1_opens_with_all_that_it_holds() {
    let world = world(media(VERSION_1));
    let pmem = Arc::new(SimPmem::new(&world));
    let report = check(&pmem);
    assert_eq!((report.verdict, report.volumes.len()), (Verdict::Clean, 1), "{:?}", report.findings);
    let (cache, found) = Cache::<SimEnv>::open(pmem.clone(), SimClock::default()).expect("it opens");
    assert!(found.findings.is_empty() && found.dirty_bytes > 0 && found.cached_bytes > found.dirty_bytes);
    let volume = cache.attach(options(&world)).expect("its volume is there");
    volume.drain_here(&mut |_| {}).expect("it reaches the disk");
    for sector in 0..SECTORS {
        // What was clean in the image had reached the disk of that day.
        if !matches!(sector / 8, 0 | 1 | 3) || sector == 27 {
            assert_eq!(world.with(|w| w.disks[0].value(sector)), expected(sector), "sector {sector}");
        }
    }
    let size = cache.geometry().device_size;
    cache.detach(&volume).expect("nothing fails here");
    cache.close().expect("nor here");
    // A feature comes with the first change of size that needs it, no sooner.
    let mut page = [0; 4096];
    pmem.read(0, &mut page).expect("it can be read");
    let superblock = Superblock::decode(&page).expect("it is whole");
    assert_eq!((superblock.features_incompat, superblock.features_ro_compat), (0, 0));
    assert_eq!(superblock.device_size, size);
}

fn options(world: &Arc<World>) -> AttachOptions<SimEnv> {
    AttachOptions {
        name: "volume0".into(),
        backing: Arc::new(SimBacking::new(world, 0)),
        mode: Mode::Writeback,
        order: Order::Strict,
        redo: None,
        group: None,
        data_crc: true,
        pass_discard: false,
        reads: Default::default(),
        read_only: false,
        serial: "sim0".into(),
        block_size: None,
        queues: 1,
        queue_size: 256,
        // Another disk, of the same size.
        force_identity: true,
        sidecar: None,
        accept_loss: false,
        allow_volatile: false,
    }
}

#[test]
fn what_a_later_version_may_be_is_refused_with_a_sentence_and_left_as_it_is() {
    type Change = fn(&mut [u8; 4096]);
    let cases: [(Change, &str); 3] = [
        (|page| page[8] = 2, "format version 2, this program knows 1 only"),
        (|page| page[37] = 1, "incompatible features 0x10000000000 that this program does not know"),
        (|page| page[29] = 1, "features that this program may read but not write"),
    ];
    for (change, sentence) in cases {
        let world = world(media(VERSION_1));
        let pmem = Arc::new(SimPmem::new(&world));
        for at in [0, pmem.len() - (16 << 10)] {
            let mut page = [0; 4096];
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

/// Not a claim: this is how an image is made when the format gets another version.
#[test]
#[ignore = "writes tests/crash/images/new.txt, to be kept under the name of its version"]
fn make_an_image() {
    let style = Style { mode: Mode::Writeback, order: Order::Strict, write_cache: true, pass_discard: false };
    let mut scene = Scene::sized(AssumeDax, style, 7, SECTORS);
    for block in 0..4 {
        scene.write(block * 8, 8, 9000 + block);
        scene.work(1);
    }
    scene.drain();
    for block in 4..8 {
        scene.write(block * 8, 8, 9000 + block);
    }
    scene.zero(27, 1);
    scene.zero(240, 8);
    scene.flush();
    scene.write(16, 8, 9102);
    scene.write(40, 8, 9105);
    assert_eq!(scene.read(320), 321, "and a fill");
    let image = scene.world.photograph("an image").daemon_crash(&mut Rng::new(1));
    let bytes = image.memory.bytes();
    let mut text = format!("bytes {}\n", bytes.len());
    for (row, bytes) in bytes.chunks(ROW).enumerate().filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0))
    {
        write!(text, "{:x}: ", row * ROW).expect("a string takes all");
        bytes.iter().for_each(|byte| write!(text, "{byte:02x}").expect("a string takes all"));
        text.push('\n');
    }
    std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/crash/images/new.txt"), text).expect("a file");
}
