//! The servers under test: how each is started, used and left alone.

use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::client::fuse::Throttle;
use crate::client::{Daemon, FuseDisk, Notify, Workspace};
use crate::driver::{Driver, Guest, Run, Step};
use crate::work::{Access, Layout, Steps, Work};

/// Our own name in the tables, and those of the others.
pub const OURS: &str = "pcache";
pub const NULL: &str = "null";
pub const COPY: &str = "copy";
pub const QEMU: &str = "qemu";
pub const CLOUD_HYPERVISOR: &str = "vhost_block";

/// What the slow disks take.
const SLOW: Throttle = Throttle { latency: Duration::from_micros(500), bytes_per_s: 250_000_000 };

/// A server that runs, and the driver connected to it.
pub struct Server {
    pub name: &'static str,
    daemon: Daemon,
    index: u64,
    driver: Option<(u16, bool, Driver)>,
    /// Kept as long as it runs.
    _disk: Option<FuseDisk>,
}

impl Server {
    fn new(name: &'static str, daemon: Daemon, index: usize) -> Self {
        Self { name, daemon, index: index as u64, driver: None, _disk: None }
    }

    /// A driver with that many queues, which polls or is notified.
    fn driver(&mut self, guest: &Guest, queues: u16, notified: bool) -> &mut Driver {
        let is_other = |(q, n, _): &(u16, bool, Driver)| (*q, *n) != (queues, notified);
        if self.driver.as_ref().is_none_or(is_other) {
            // The old connection ends before the next begins: servers take one at a time.
            self.driver = None;
            let notify = if notified { Notify::Call } else { Notify::Poll };
            let driver = Driver::connect(self.daemon.socket(), guest, self.index, queues, notify);
            self.driver = Some((queues, notified, driver));
        }
        &mut self.driver.as_mut().expect("connected above").2
    }

    /// Does the steps, once nothing is left over from before; with the server's processor time.
    pub fn run(&mut self, guest: &Guest, work: &Work, steps: &[Step]) -> (Run, Duration) {
        self.driver(guest, work.queues, work.notified);
        self.settle();
        let before = self.daemon.cpu_time();
        let run = self.driver(guest, work.queues, work.notified).run(steps, work.depth);
        (run, self.daemon.cpu_time().saturating_sub(before))
    }

    /// Writes a part of the disk, untimed.
    pub fn fill(&mut self, guest: &Guest, blocks: Range<u64>) {
        let steps = Steps::fill(blocks);
        let work = Work {
            name: "fill",
            access: Access::Write,
            depth: 8,
            queues: 1,
            requests: steps.len(),
            notified: false,
        };
        self.run(guest, &work, &steps);
        self.settle();
    }

    /// Waits until ours has nothing to write back.
    fn settle(&self) {
        if self.name == OURS {
            self.daemon.wait_status(" dirty_bytes=0 ", Duration::from_secs(120));
        }
    }
}

/// A file of the disk's size, all of it there: nobody is to pay for a hole.
fn made(path: PathBuf, bytes: u64) -> PathBuf {
    let fill = || -> io::Result<()> {
        let mut file = File::create(&path)?;
        let block: Vec<u8> = (0..1 << 20).map(|n: u32| (n / 7) as u8).collect();
        for at in (0..bytes).step_by(block.len()) {
            file.write_all(&block[..(bytes - at).min(block.len() as u64) as usize])?;
        }
        file.sync_all()
    };
    fill().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    path
}

fn text(path: &Path) -> String {
    path.to_str().expect("paths are text").to_owned()
}

/// Ours, with a cache in memory that counts as persistent.
fn ours(memory: &Workspace, cache: u64, disk: &Path) -> Daemon {
    let (image, size, disk) = (text(&memory.path("cache.img")), cache.to_string(), text(disk));
    let args =
        ["--cache", &image, "--cache-size", &size, "--backing", &disk, "--queues", "2", "--assume-dax"];
    Daemon::pcache(memory, &args)
}

/// This program again, as a server that does nothing, or copies to `memory`.
fn null(workspace: &Workspace, name: &str, bytes: u64, memory: Option<&Path>) -> Daemon {
    let socket = workspace.path(&format!("{name}.sock"));
    let mut args = vec!["--serve-null".to_owned(), text(&socket), bytes.to_string()];
    args.extend(memory.map(text));
    let program = std::env::current_exe().expect("its own name");
    Daemon::program(workspace, &program, args, socket)
}

fn qemu(workspace: &Workspace, disk: &Path, options: &str) -> Option<Daemon> {
    let program = Path::new("/usr/bin/qemu-storage-daemon");
    if !program.exists() {
        println!("SKIPPED: qemu-storage-daemon is not installed");
        return None;
    }
    let socket = workspace.path("qsd.sock");
    let args = vec![
        "--blockdev".to_owned(),
        format!("driver=file,node-name=f0,filename={}{options}", text(disk)),
        "--export".to_owned(),
        format!(
            "type=vhost-user-blk,id=e0,node-name=f0,addr.type=unix,addr.path={},writable=on,num-queues=2",
            text(&socket)
        ),
    ];
    Some(Daemon::program(workspace, program, args, socket))
}

fn cloud_hypervisor(workspace: &Workspace, disk: &Path) -> Option<Daemon> {
    let path = std::env::var_os("PATH")?;
    let program =
        std::env::split_paths(&path).map(|dir| dir.join("vhost_user_block")).find(|p| p.exists())?;
    let socket = workspace.path("ch.sock");
    let backend = format!("path={},socket={},num_queues=2,queue_size=128", text(disk), text(&socket));
    Some(Daemon::program(workspace, &program, vec!["--block-backend".to_owned(), backend], socket))
}

fn numbered(servers: Vec<(&'static str, Option<Daemon>)>) -> Vec<Server> {
    let here = servers.into_iter().filter_map(|(name, daemon)| Some((name, daemon?)));
    here.enumerate().map(|(index, (name, daemon))| Server::new(name, daemon, index)).collect()
}

/// All of them, with disks in memory.
pub fn in_memory(workspace: &Workspace, cache: u64, layout: Layout) -> Vec<Server> {
    let bytes = layout.disk_bytes();
    let disk = |name: &str| made(workspace.path(name), bytes);
    let theirs = disk("theirs.img");
    numbered(vec![
        (OURS, Some(ours(workspace, cache, &disk("ours.img")))),
        (NULL, Some(null(workspace, NULL, bytes, None))),
        (COPY, Some(null(workspace, COPY, cache, Some(&workspace.path("copy.img"))))),
        (QEMU, qemu(workspace, &theirs, "")),
        (CLOUD_HYPERVISOR, cloud_hypervisor(workspace, &theirs)),
    ])
}

/// Ours and QEMU's, with disks on a file system.
pub fn on_disk(memory: &Workspace, disks: &Workspace, cache: u64, layout: Layout) -> Vec<Server> {
    let disk = |name: &str| made(disks.path(name), layout.disk_bytes());
    numbered(vec![
        (OURS, Some(ours(memory, cache, &disk("ours.img")))),
        (QEMU, qemu(memory, &disk("theirs.img"), ",cache.direct=on,aio=io_uring")),
    ])
}

/// The same with slow disks.
///
/// # Errors
/// There is no FUSE, or not for us.
pub fn on_slow_disk(memory: &Workspace, cache: u64, layout: Layout) -> io::Result<Vec<Server>> {
    let disk = |name: &str| {
        let disk = FuseDisk::mount(&memory.path(name), layout.disk_bytes() as usize)?;
        disk.throttle(SLOW);
        Ok::<_, io::Error>(disk)
    };
    let (first, second) = (disk("ours")?, disk("theirs")?);
    let mut servers = numbered(vec![
        (OURS, Some(ours(memory, cache, &first.path()))),
        (QEMU, qemu(memory, &second.path(), ",cache.direct=on,aio=io_uring")),
    ]);
    for (server, disk) in servers.iter_mut().zip([first, second]) {
        server._disk = Some(disk);
    }
    Ok(servers)
}

/// What all of this ran on.
pub fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown");
    let processors = info.lines().filter(|line| line.starts_with("processor")).count();
    let load = read("/proc/loadavg");
    format!(
        "{processors} of {}, Linux {}, load before: {}",
        model.trim_start_matches([':', ' ', '\t']),
        read("/proc/sys/kernel/osrelease").trim(),
        load.split(' ').next().unwrap_or("?")
    )
}
