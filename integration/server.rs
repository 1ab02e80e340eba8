//! The server under test, and the files it keeps its disk in.
//!
//! It exists so that a scenario reads as what happens to a machine: serve, kill, serve again, drain.
//! `PCACHE_TEST_SERVER=qsd` puts `qemu-storage-daemon` in the server's place, which tells a fault of
//! the harness from a fault of ours.
//!
//! Invariants:
//! - files lie below `target/`, on a real file system, never on a tmpfs that changes the media class;
//! - sockets lie in a short path: 108 bytes is all a socket address has;
//! - a server does not outlive its `Server`, and a panic prints the end of its log.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use crate::guest::tail;
use crate::qemu::Disk;

/// The program under test: the one built with the tests, or what `PCACHE_BINARY` names.
pub fn pcache() -> PathBuf {
    std::env::var_os("PCACHE_BINARY").map_or_else(|| env!("CARGO_BIN_EXE_pcache-vhost").into(), PathBuf::from)
}

/// How long a server may take to listen, or to end after SIGTERM. Formatting writes the whole cache
/// file, on a machine that may be emulating several guests meanwhile.
const DEADLINE: Duration = Duration::from_secs(60);

/// Which program serves the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Ours.
    Pcache,
    /// QEMU's: no cache, no in-flight tracking.
    StorageDaemon,
}

impl Program {
    /// Ours, unless the environment asks for the other.
    pub fn chosen() -> Self {
        match std::env::var("PCACHE_TEST_SERVER").as_deref() {
            Ok("qsd") => Self::StorageDaemon,
            Ok("pcache") | Err(_) => Self::Pcache,
            Ok(other) => panic!("PCACHE_TEST_SERVER is {other:?}; it may be pcache or qsd"),
        }
    }
}

/// One disk: a backing image, and a cache in front of it.
pub struct Storage {
    program: Program,
    files: tempfile::TempDir,
    sockets: tempfile::TempDir,
    cache_mib: u64,
    queues: u16,
    packed: bool,
    order: &'static str,
    control: bool,
}

impl Storage {
    /// A sparse backing image; the cache file appears when the server first starts.
    pub fn new(program: Program, cache_mib: u64, backing_mib: u64) -> Self {
        let files = tempfile::Builder::new()
            .prefix("disk-")
            .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
            .expect("a directory for the disk");
        let sockets = tempfile::Builder::new().prefix("pcache-").tempdir().expect("a directory for sockets");
        let storage = Self {
            program,
            files,
            sockets,
            cache_mib,
            queues: 1,
            packed: false,
            order: "strict",
            control: false,
        };
        let image = File::create(storage.backing()).expect("create the backing image");
        image.set_len(backing_mib << 20).expect("size the backing image");
        storage
    }

    /// Serves this many virtqueues.
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    /// Attached with packed rings.
    pub fn packed(mut self) -> Self {
        self.packed = true;
        self
    }

    /// Written back in this order.
    pub fn order(mut self, order: &'static str) -> Self {
        self.order = order;
        self
    }

    /// With a control socket, for [`Storage::ask`].
    pub fn controlled(mut self) -> Self {
        self.control = true;
        self
    }

    /// The slow side's image.
    pub fn backing(&self) -> PathBuf {
        self.files.path().join("backing.img")
    }

    /// The fast side's file.
    pub fn cache(&self) -> PathBuf {
        self.files.path().join("cache.img")
    }

    fn socket(&self) -> PathBuf {
        self.sockets.path().join("disk.sock")
    }

    fn control_socket(&self) -> PathBuf {
        self.sockets.path().join("control.sock")
    }

    /// Runs a verb that speaks to the server, and returns what it says.
    ///
    /// # Panics
    ///
    /// When it fails.
    pub fn ask(&self, words: &[&str]) -> String {
        let output = verb(words, &[("--control", self.control_socket())]);
        assert!(output.status.success(), "{words:?}: {}", describe(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The disk as a guest attaches it while a server runs.
    pub fn attached(&self, reconnect_ms: Option<u32>) -> Disk {
        Disk::VhostUser { socket: self.socket(), queues: self.queues, reconnect_ms, packed: self.packed }
    }

    /// The backing image alone, attached without us.
    pub fn bare(&self) -> Disk {
        Disk::Raw { path: self.backing() }
    }

    /// Goes to another host, which shares the backing image and has a cache of its own.
    ///
    /// # Panics
    ///
    /// When the cache was not drained.
    pub fn move_to_another_host(&self) {
        self.drain();
        self.check();
        fs::remove_file(self.cache()).expect("the cache stays behind");
    }

    /// Starts the server and returns when it listens.
    ///
    /// # Panics
    ///
    /// When it ends or stays silent instead.
    pub fn serve(&self) -> Server {
        let log = self.files.path().join("server.log");
        let output = File::options().create(true).append(true).open(&log).expect("open the server's log");
        let socket = self.socket();
        let stale = birth(&socket);
        let child = self
            .command()
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a second handle of the log"))
            .stderr(output)
            .spawn()
            .expect("start the server");
        let mut server = Server { child, log };
        let deadline = Instant::now() + DEADLINE;
        while !listens(&socket, stale, self.sockets.path()) {
            if let Ok(Some(status)) = server.child.try_wait() {
                panic!("the server ended instead of listening: {status}");
            }
            assert!(Instant::now() < deadline, "the server did not listen within {DEADLINE:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    fn command(&self) -> Command {
        match self.program {
            Program::Pcache => {
                let mut command = Command::new(pcache());
                command.arg("--socket").arg(self.socket());
                command.arg("--cache").arg(self.cache());
                command.arg(format!("--cache-size={}MiB", self.cache_mib));
                command.arg("--backing").arg(self.backing());
                command.arg(format!("--queues={}", self.queues)).arg(format!("--order={}", self.order));
                if self.control {
                    command.arg("--control").arg(self.control_socket());
                }
                command
            }
            Program::StorageDaemon => storage_daemon(&self.backing(), &self.socket(), self.queues),
        }
    }

    /// The cache is gone for good; what a redo area holds is brought to the backing image.
    ///
    /// # Panics
    ///
    /// When the verb fails.
    pub fn lose_cache(&self) {
        fs::remove_file(self.cache()).expect("the cache burns");
        if self.order == "grouped" {
            let output = verb(&["recover-backing"], &[("--backing", self.backing())]);
            assert!(output.status.success(), "recover-backing: {}", describe(&output));
        }
    }

    /// Brings all dirty data to the backing image, with no server running.
    ///
    /// # Panics
    ///
    /// When the verb fails.
    pub fn drain(&self) {
        if self.program == Program::Pcache {
            let output = verb(&["drain"], &[("--cache", self.cache()), ("--backing", self.backing())]);
            assert!(output.status.success(), "drain: {}", describe(&output));
        }
    }

    /// Fails unless the cache image is whole.
    ///
    /// # Panics
    ///
    /// When the verb finds damage.
    pub fn check(&self) {
        if self.program == Program::Pcache {
            let output = verb(&["check"], &[("--cache", self.cache())]);
            assert!(output.status.success(), "check: {}", describe(&output));
        }
    }
}

/// A running server.
pub struct Server {
    child: Child,
    log: PathBuf,
}

impl Server {
    /// Ends it as a crash would: no instruction after this one.
    pub fn kill(mut self) {
        self.child.kill().expect("kill the server");
        self.child.wait().expect("wait for the killed server");
    }

    /// Ends it with SIGTERM and returns what it had to say.
    ///
    /// # Panics
    ///
    /// When it does not end, or not with status 0.
    pub fn stop(mut self) -> String {
        self.signal("TERM");
        let deadline = Instant::now() + DEADLINE;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait for the server") {
                break status;
            }
            assert!(Instant::now() < deadline, "the server did not end within {DEADLINE:?} of SIGTERM");
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(ended_well(status), "the server ended with {status}");
        fs::read_to_string(&self.log).expect("read the server's log")
    }

    fn signal(&self, name: &str) {
        let status = Command::new("sh")
            .args(["-c", "kill -\"$0\" \"$1\"", name, &self.child.id().to_string()])
            .status()
            .expect("send a signal");
        assert!(status.success(), "SIG{name} could not be sent to the server");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- server ---\n{}", tail(&self.log, 40));
        }
        if let Ok(None) = self.child.try_wait()
            && let Err(error) = self.child.kill().and_then(|()| self.child.wait())
        {
            eprintln!("ending the server: {error}");
        }
    }
}

/// The last value of a counter in a server's log, such as `reclaimed` in `reclaimed=17`.
pub fn counter(log: &str, name: &str) -> u64 {
    let mut values = log.split_whitespace().filter_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    match values.next_back().map(str::parse) {
        Some(Ok(value)) => value,
        found => panic!("no counter {name} in the server's log ({found:?}):\n{log}"),
    }
}

/// The last line of counters in a server's log.
pub fn counters(log: &str) -> &str {
    let line = log.lines().rev().find_map(|line| Some(&line[line.find("counters ")?..]));
    line.unwrap_or_else(|| panic!("no counters in the server's log:\n{log}"))
}

/// QEMU's own server on a raw file, as its manual shows it.
pub fn storage_daemon(image: &Path, socket: &Path, queues: u16) -> Command {
    let mut command = Command::new("qemu-storage-daemon");
    let node = "driver=file,node-name=disk,cache.direct=on,discard=unmap,filename=";
    command.arg("--blockdev").arg(format!("{node}{}", image.display()));
    let export = "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix";
    let (path, queues) = (socket.display(), queues);
    command.arg("--export").arg(format!("{export},num-queues={queues},addr.path={path}"));
    command
}

/// Runs one of our offline verbs.
pub fn verb(words: &[&str], paths: &[(&str, PathBuf)]) -> Output {
    let mut command = Command::new(pcache());
    command.args(words);
    for (option, path) in paths {
        command.arg(option).arg(path);
    }
    command.output().expect("run pcache-vhost")
}

/// A finished program's status and words.
pub fn describe(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{}\n{out}{err}", output.status)
}

/// A program that handles SIGTERM exits; QEMU's re-raises nothing and exits as well.
fn ended_well(status: ExitStatus) -> bool {
    status.code() == Some(0)
}

/// Tells a socket from a stale one at the same path. The inode alone does not: it is soon reused.
type Birth = (u64, i64, i64);

fn birth(path: &Path) -> Option<Birth> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
}

/// Whether somebody listens on `socket`, found without connecting: a probe would be a client.
///
/// A server may bind elsewhere in `directory` and rename onto a stale socket.
fn listens(socket: &Path, stale: Option<Birth>, directory: &Path) -> bool {
    /// `SO_ACCEPTCON` in the flags column of /proc/net/unix.
    const LISTENING: &str = "00010000";
    let present = birth(socket);
    if present.is_none() || present == stale {
        return false;
    }
    let Ok(table) = fs::read_to_string("/proc/net/unix") else { return false };
    let directory = directory.to_string_lossy();
    table.lines().any(|line| {
        let mut columns = line.split_whitespace();
        columns.nth(3) == Some(LISTENING) && columns.nth(3).is_some_and(|path| path.starts_with(&*directory))
    })
}
