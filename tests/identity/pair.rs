//! A cache, its disks and the lives of a server on them, with a model of what a guest should see.
//!
//! The lives are the real engine on real files: the cache on memory that passes as persistent, the
//! disks on a disk's file system. No worker runs, so what is dirty is known: everything that was
//! written since the last [`Life::drain`]. A life ends in order, or is dropped, as a kill would end it.

use std::collections::BTreeMap;
use std::fs::{self, File, FileTimes};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use pcache_vhost::backing::{Disk as BackingDisk, OpenOptions as DiskOptions};
use pcache_vhost::cache::volume::VolumeDisk;
use pcache_vhost::cache::{AttachOptions, Cache, FormatOptions, Mode, Order, SystemClock, Volume, format};
use pcache_vhost::pmem::{MappedPmem, OpenOptions as MediaOptions};
use pcache_vhost::tools::Host;
use pcache_vhost::volume::{Buffer, Disk, DiskQueue, GuestFault, Request, RequestKind, Status};
use pcache_vhost::wake::Waker;

use crate::cli_support::Place;

/// Blocks of a disk.
pub const BLOCKS: u64 = 2048;
pub const BLOCK: usize = 4096;
const CACHE_SIZE: u64 = 16 << 20;

/// Content of a block: whose it is and of which write, so that nothing passes for anything else.
pub fn block_of(number: u64, stamp: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    if stamp > 0 {
        for word in bytes.chunks_exact_mut(16) {
            word[..8].copy_from_slice(&number.to_le_bytes());
            word[8..].copy_from_slice(&stamp.to_le_bytes());
        }
    }
    bytes
}

pub struct Bytes(Vec<u8>);

impl Buffer for Bytes {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn copy_out(&self, at: usize, dst: &mut [u8]) -> Result<(), GuestFault> {
        dst.copy_from_slice(&self.0[at..at + dst.len()]);
        Ok(())
    }

    fn copy_in(&mut self, at: usize, src: &[u8]) -> Result<(), GuestFault> {
        self.0[at..at + src.len()].copy_from_slice(src);
        Ok(())
    }
}

/// What the cache holds of a volume, block by block.
#[derive(Clone, Default)]
pub struct Model {
    /// Stamp, and whether it is on no disk.
    pub blocks: BTreeMap<u64, (u64, bool)>,
}

/// Where everything lies.
pub struct Scene {
    pub fast: Place,
    pub slow: Place,
    pub sidecar: Option<bool>,
    /// By volume: what its cache holds.
    pub models: BTreeMap<String, Model>,
    stamp: u64,
}

impl Scene {
    pub fn new(sidecar: Option<bool>) -> Scene {
        let scene = Scene {
            fast: Place::in_memory(),
            slow: Place::new(),
            sidecar,
            models: BTreeMap::new(),
            stamp: 0,
        };
        scene.make_cache("cache");
        scene.make_disk("disk");
        scene
    }

    pub fn make_cache(&self, name: &str) {
        let path = self.fast.path(name);
        pcache_vhost::pmem::create(path.as_ref(), CACHE_SIZE).unwrap();
        let media = MappedPmem::open(&MediaOptions { assume_dax: true, ..MediaOptions::new(&path) }).unwrap();
        format(&media, &SystemClock::default(), &FormatOptions::default()).unwrap();
    }

    pub fn make_disk(&self, name: &str) {
        self.slow.zeros(name, BLOCKS * BLOCK as u64);
    }

    pub fn cache(&self) -> String {
        self.fast.path("cache")
    }

    pub fn disk(&self) -> String {
        self.slow.path("disk")
    }

    /// A life of a server of `volume` on this cache and disk.
    pub fn try_life(&self, cache: &str, disk: &str, volume: &str) -> Result<Life, String> {
        let path = self.fast.path(cache);
        let media = MappedPmem::open(&MediaOptions { assume_dax: true, ..MediaOptions::new(&path) });
        let (cache, report) = Cache::<Host>::open(Arc::new(media.unwrap()), SystemClock::default()).unwrap();
        assert_eq!(report.findings, Vec::<String>::new());
        let mut options = DiskOptions::new(self.slow.path(disk));
        options.wait_lock = Some(Duration::from_secs(10));
        let volume = cache.attach(AttachOptions {
            name: volume.to_owned(),
            backing: Arc::new(BackingDisk::open(&options).map_err(|e| e.to_string())?),
            mode: Mode::Writeback,
            order: Order::Relaxed,
            redo: None,
            data_crc: true,
            pass_discard: true,
            read_only: false,
            serial: "serial".to_owned(),
            block_size: None,
            queues: 1,
            queue_size: 128,
            force_identity: false,
            sidecar: self.sidecar,
            accept_loss: false,
            reads: Default::default(),
            allow_volatile: false,
            group: None,
        });
        let volume = volume.map_err(|e| e.to_string())?;
        let queue = VolumeDisk(volume.clone()).open_queue(0, Waker::default()).unwrap();
        Ok(Life { queue, volume, cache })
    }

    pub fn life(&self) -> Life {
        self.try_life("cache", "disk", "vm").unwrap_or_else(|e| panic!("refused: {e}"))
    }

    /// Writes blocks with a stamp of their own.
    pub fn write(&mut self, life: &mut Life, blocks: std::ops::Range<u64>) -> u64 {
        self.stamp += 1;
        let model = self.models.entry(life.volume.name().to_owned()).or_default();
        for number in blocks {
            life.write(number, block_of(number, self.stamp));
            model.blocks.insert(number, (self.stamp, true));
        }
        self.stamp
    }

    /// Brings everything to the disk; it stays in the cache.
    pub fn drain(&mut self, life: &Life) {
        life.volume.drain_here(&mut |_| {}).unwrap();
        let model = self.models.entry(life.volume.name().to_owned()).or_default();
        model.blocks.values_mut().for_each(|block| block.1 = false);
    }

    /// A server's first life: clean data at 0 to 96 of which the disk has all, ended in order.
    pub fn first_life(&mut self) {
        let mut life = self.life();
        self.write(&mut life, 0..96);
        self.drain(&life);
        life.end();
    }

    /// A later one: over half of that, clean, and 16 dirty blocks; then it ends in order or dies.
    pub fn later_life(&mut self, in_order: bool) {
        let mut life = self.life();
        self.write(&mut life, 32..128);
        self.drain(&life);
        self.write(&mut life, 120..136);
        if in_order { life.end() } else { drop(life) }
    }

    /// The bytes of a disk's file.
    pub fn disk_bytes(&self, disk: &str) -> Vec<u8> {
        fs::read(self.slow.path(disk)).unwrap()
    }

    /// What must be read when this much of the cache counts beside these bytes of the disk.
    pub fn view(&self, volume: &str, disk: &[u8], keep: Kept) -> Vec<u8> {
        let mut bytes = disk.to_vec();
        let model = self.models.get(volume).cloned().unwrap_or_default();
        for (number, (stamp, dirty)) in model.blocks {
            let at = number as usize * BLOCK;
            if keep == Kept::All || keep == Kept::Dirty && dirty {
                bytes[at..at + BLOCK].copy_from_slice(&block_of(number, stamp));
            }
        }
        bytes
    }

    /// A copy of a file, with its times as `cp -p` does or without.
    pub fn copy(&self, from: &str, to: &str, with_times: bool) {
        let (from, to) = (self.slow.path(from), self.slow.path(to));
        fs::write(&to, fs::read(&from).unwrap()).unwrap();
        if with_times {
            set_modified(&to, modified(&from));
        }
    }

    /// Copies the cache's image.
    pub fn copy_cache(&self, from: &str, to: &str) {
        fs::write(self.fast.path(to), fs::read(self.fast.path(from)).unwrap()).unwrap();
    }

    /// Puts another file where `name` is: its own inode, the time of its last write kept or not.
    pub fn replace(&self, name: &str, by: &str, with_times: bool) {
        self.copy(by, "replacement", with_times);
        fs::rename(self.slow.path("replacement"), self.slow.path(name)).unwrap();
    }

    /// Somebody writes to blocks of a disk at a time after now.
    pub fn write_behind(&self, disk: &str, blocks: std::ops::Range<u64>, after: Duration) {
        let path = self.slow.path(disk);
        let file = File::options().write(true).open(&path).unwrap();
        for number in blocks {
            file.write_all_at(&block_of(number, u64::MAX), number * BLOCK as u64).unwrap();
        }
        if !after.is_zero() {
            set_modified(&path, SystemTime::now() + after);
        }
    }
}

/// What of the cache counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kept {
    All,
    Dirty,
    Nothing,
}

pub fn modified(path: &str) -> SystemTime {
    fs::metadata(path).unwrap().modified().unwrap()
}

pub fn set_modified(path: &str, time: SystemTime) {
    File::options().write(true).open(path).unwrap().set_times(FileTimes::new().set_modified(time)).unwrap();
}

/// Inode of a file.
pub fn inode(path: &str) -> u64 {
    fs::metadata(path).unwrap().ino()
}

/// A server at work.
pub struct Life {
    queue: <VolumeDisk<Host> as Disk>::Queue<Bytes>,
    pub volume: Arc<Volume<Host>>,
    cache: Arc<Cache<Host>>,
}

impl Life {
    fn execute(&mut self, kind: RequestKind, sector: u64, data: Vec<u8>) -> Vec<u8> {
        self.queue.submit(Request { tag: 1, kind, sector, data: Bytes(data) });
        self.queue.commit();
        let mut done = Vec::new();
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while done.is_empty() {
            assert!(std::time::Instant::now() < deadline, "a request hangs");
            self.queue.poll(&mut done);
        }
        let done = done.remove(0);
        assert_eq!(done.status, Status::Ok, "{kind:?} at sector {sector}");
        done.data.0
    }

    pub fn write(&mut self, block: u64, data: Vec<u8>) {
        self.execute(RequestKind::Write, block * 8, data);
    }

    /// Everything a guest reads.
    pub fn read_all(&mut self, len: usize) -> Vec<u8> {
        let pieces = (0..len).step_by(1 << 18);
        pieces
            .flat_map(|at| {
                let room = vec![0xee; (len - at).min(1 << 18)];
                self.execute(RequestKind::Read, at as u64 / 512, room)
            })
            .collect()
    }

    /// Ends in order.
    pub fn end(self) {
        let Life { queue, volume, cache } = self;
        drop(queue);
        cache.detach(&volume).unwrap();
        cache.close().unwrap();
    }
}
