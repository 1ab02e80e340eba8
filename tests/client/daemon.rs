//! Runs the program under test, kills it, starts it again, and shows its log when a test fails.

#![expect(unsafe_code, reason = "sends signals, and ties the child's life to ours")]

use std::fs::{self, File, OpenOptions};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long a start, a stop or a verb may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Lines of the log to show with a failure.
const TAIL: usize = 60;

/// A directory of one test, removed with it.
#[derive(Debug)]
pub struct Workspace {
    dir: TempDir,
}

impl Workspace {
    /// A new one in `PCACHE_TEST_DIR` or the system's temporary directory.
    pub fn new() -> Self {
        Self::inside(std::env::var_os("PCACHE_TEST_DIR").map_or_else(std::env::temp_dir, PathBuf::from))
    }

    /// A new one on a file system in memory, which `--assume-dax` takes for persistent.
    pub fn in_memory() -> Self {
        Self::inside(PathBuf::from("/dev/shm"))
    }

    fn inside(parent: PathBuf) -> Self {
        let dir = TempDir::with_prefix_in("pcache-test-", parent).expect("a temporary directory");
        Self { dir }
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a sparse file of zeros in it.
    pub fn disk(&self, name: &str, len: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).and_then(|file| file.set_len(len)).expect("a sparse file");
        path
    }
}

impl Default for Workspace {
    fn default() -> Self {
        Self::new()
    }
}

/// A server that runs, or is between two lives.
#[derive(Debug)]
pub struct Daemon {
    program: PathBuf,
    args: Vec<String>,
    socket: PathBuf,
    log: PathBuf,
    child: Option<Child>,
    /// The life before, while it gives itself up.
    predecessor: Option<Child>,
    /// Length of the log when this life began.
    born: usize,
}

impl Daemon {
    /// Our own binary with these arguments besides `--socket`, once its socket answers.
    pub fn pcache(workspace: &Workspace, args: &[&str]) -> Self {
        let socket = workspace.path("vhost.sock");
        let mut all = vec!["--socket".to_owned(), text(&socket)];
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        Self::start(env!("CARGO_BIN_EXE_pcache-vhost").into(), all, socket, workspace.path("daemon.log"))
    }

    /// Our own binary with a cache and a backing file in the workspace, made if missing.
    pub fn cached(workspace: &Workspace, cache: &str, disk: u64, queues: u16, more: &[&str]) -> Self {
        let backing = workspace.path("disk.img");
        if !backing.exists() {
            workspace.disk("disk.img", disk);
        }
        let (image, backing, queues) =
            (text(&workspace.path("cache.img")), text(&backing), queues.to_string());
        let mut args = vec!["--cache", &image, "--cache-size", cache, "--backing", &backing];
        args.extend(["--queues", &queues]);
        args.extend(more);
        Self::pcache(workspace, &args)
    }

    /// Our own binary with a configuration file; `socket` is that of the volume to talk to first.
    pub fn configured(workspace: &Workspace, toml: &str, socket: &Path) -> Self {
        let config = workspace.path("pcache.toml");
        fs::write(&config, toml).expect("the configuration can be written");
        let args = vec!["--config".to_owned(), text(&config)];
        let program = env!("CARGO_BIN_EXE_pcache-vhost").into();
        Self::start(program, args, socket.to_path_buf(), workspace.path("daemon.log"))
    }

    /// `qemu-storage-daemon` exporting a raw file, or `None` where it is not installed.
    pub fn qemu(workspace: &Workspace, disk: u64, queues: u16) -> Option<Self> {
        let program = Path::new("/usr/bin/qemu-storage-daemon");
        if !program.exists() {
            return None;
        }
        let (socket, file) = (workspace.path("qsd.sock"), text(&workspace.disk("qsd.img", disk)));
        let args = vec![
            "--blockdev".to_owned(),
            format!("driver=file,node-name=f0,filename={file},discard=unmap"),
            "--export".to_owned(),
            format!(
                "type=vhost-user-blk,id=e0,node-name=f0,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
                text(&socket)
            ),
        ];
        Some(Self::start(program.to_path_buf(), args, socket, workspace.path("qsd.log")))
    }

    /// Any server with all of its arguments, once `socket` answers.
    pub fn program(workspace: &Workspace, program: &Path, args: Vec<String>, socket: PathBuf) -> Self {
        let log = socket.with_extension("log");
        assert!(log.starts_with(workspace.path("")), "sockets lie in the workspace");
        Self::start(program.to_path_buf(), args, socket, log)
    }

    fn start(program: PathBuf, args: Vec<String>, socket: PathBuf, log: PathBuf) -> Self {
        let mut daemon = Self { program, args, socket, log, child: None, predecessor: None, born: 0 };
        daemon.restart();
        daemon
    }

    /// The vhost-user socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Starts it again with the same arguments, and waits until its socket answers.
    pub fn restart(&mut self) {
        self.spawn();
        self.wait_listening();
    }

    /// Starts it again without waiting.
    pub fn spawn(&mut self) {
        self.spawn_with(&[]);
    }

    /// Starts a successor that is to take over, without waiting.
    pub fn spawn_successor(&mut self) {
        assert!(self.predecessor.is_none(), "the last upgrade is not over");
        self.predecessor = self.child.take();
        self.spawn_with(&["--take-over"]);
    }

    /// Whether the life before has ended; with success, or it panics.
    pub fn has_taken_over(&mut self) -> bool {
        if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().expect("it can be asked"))
        {
            let life = self.read_life();
            panic!("the successor ended ({status}); it said\n{life}");
        }
        let Some(predecessor) = &mut self.predecessor else { return true };
        let Some(status) = predecessor.try_wait().expect("a child can be waited for") else { return false };
        self.predecessor = None;
        assert!(status.success(), "who was taken over from ended with {status}");
        true
    }

    /// Kills the successor. True if the life before serves on; else that has ended too, and there is none.
    pub fn kill_successor(&mut self) -> bool {
        let mut successor = self.child.take().expect("a successor was started");
        successor.kill().expect("it can be killed");
        successor.wait().expect("it can be waited for");
        let mut predecessor = self.predecessor.take().expect("it has a predecessor");
        // Whoever has given itself up learns of the end at once.
        std::thread::sleep(Duration::from_millis(300));
        match predecessor.try_wait().expect("a child can be waited for") {
            None => {
                self.child = Some(predecessor);
                true
            }
            Some(_) => false,
        }
    }

    /// Starts a successor with other arguments: how it ended, which it must.
    pub fn refused_successor(&self, args: &[String]) -> Output {
        let mut command = Command::new(&self.program);
        command.args(args).arg("--take-over").stdin(Stdio::null()).env("NO_COLOR", "1");
        command.output().expect("our binary runs")
    }

    /// Its arguments.
    pub fn args(&self) -> &[String] {
        &self.args
    }

    fn spawn_with(&mut self, more: &[&str]) {
        assert!(self.child.is_none(), "the server is still running");
        self.born = self.read_log().len();
        let log = OpenOptions::new().create(true).append(true).open(&self.log).expect("the log opens");
        let mut command = Command::new(&self.program);
        command.args(&self.args).args(more).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("the log can be shared")).stderr(log);
        command.env("RUST_BACKTRACE", "1").env("NO_COLOR", "1");
        // SAFETY: prctl is async-signal-safe and touches nothing of the parent's.
        unsafe {
            command.pre_exec(|| {
                // A test that is killed must not leave its server behind.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        self.child = Some(command.spawn().unwrap_or_else(|e| panic!("{}: {e}", self.program.display())));
    }

    /// Waits until somebody accepts connections at the socket.
    pub fn wait_listening(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(&self.socket).is_err() {
            let child = self.child.as_mut().expect("the server was started");
            if let Some(status) = child.try_wait().expect("a child can be waited for") {
                let life = self.read_life();
                self.child = None;
                panic!("the server ended ({status}) before its socket answered; it said\n{life}");
            }
            assert!(Instant::now() < deadline, "no socket at {} in time", self.socket.display());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        let child = self.child.as_ref().expect("the server is running");
        // SAFETY: the child has not been waited for, so its id is its own.
        let failed = unsafe { libc::kill(child.id() as i32, signal) };
        assert_eq!(failed, 0, "the server can be signalled");
    }

    /// `kill -9`. Returns when it is gone.
    pub fn kill(&mut self) {
        self.signal(libc::SIGKILL);
        let status = self.reap();
        assert_eq!(status.signal(), Some(libc::SIGKILL), "the server had ended by itself ({status})");
    }

    /// SIGTERM, and success within patience.
    pub fn stop(&mut self) {
        self.signal(libc::SIGTERM);
        let status = self.reap();
        assert!(status.success(), "SIGTERM ends a server with success, not {status}");
    }

    fn reap(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("the server is running");
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait().expect("a child can be waited for") {
                return status;
            }
            if Instant::now() >= deadline {
                self.child = Some(child);
                panic!("the server did not end within {PATIENCE:?}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether it ends within `limit`: how, and after how long.
    pub fn ends_within(&mut self, limit: Duration) -> Option<(ExitStatus, Duration)> {
        let begun = Instant::now();
        while begun.elapsed() < limit {
            let child = self.child.as_mut().expect("the server is running");
            if let Some(status) = child.try_wait().expect("a child can be waited for") {
                self.child = None;
                return Some((status, begun.elapsed()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }

    /// Gives up one that cannot end because the kernel holds it; it goes when its disk does.
    pub fn forget(&mut self) {
        self.child = None;
    }

    /// Asks for its status and counters, and returns all it has said in this life once a line with
    /// `needle` has come after the question; panics when none comes within `limit` of asking again
    /// and again.
    pub fn wait_status(&self, needle: &str, limit: Duration) -> String {
        let begun = Instant::now();
        loop {
            let before = self.read_log().len();
            self.signal(libc::SIGUSR1);
            std::thread::sleep(Duration::from_millis(50));
            let log = self.read_log();
            if let Some(line) = log[before..].lines().find(|line| line.contains(needle)) {
                return line.to_owned();
            }
            assert!(begun.elapsed() < limit, "no `{needle}` within {limit:?}: {}", &log[before..]);
        }
    }

    /// Asserts that it has not ended by itself.
    pub fn assert_alive(&mut self) {
        let child = self.child.as_mut().expect("the server was started");
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            panic!("the server ended by itself: {status}");
        }
    }

    /// Processor time of its threads that live.
    pub fn cpu_time(&self) -> Duration {
        let pid = self.child.as_ref().expect("it runs").id();
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the server's threads");
        let nanoseconds = tasks.flatten().filter_map(|task| {
            let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
            text.split_whitespace().next()?.parse::<u64>().ok()
        });
        Duration::from_nanos(nanoseconds.sum())
    }

    /// Its open descriptors.
    pub fn open_files(&self) -> usize {
        let child = self.child.as_ref().expect("the server is running");
        fs::read_dir(format!("/proc/{}/fd", child.id())).expect("its descriptors can be listed").count()
    }

    /// Everything it has said in all its lives.
    pub fn read_log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// What it has said in this life.
    pub fn read_life(&self) -> String {
        self.read_log().get(self.born..).unwrap_or_default().to_owned()
    }

    /// The last value of `name=` in a log, if any line has it.
    pub fn counter(log: &str, name: &str) -> Option<u64> {
        let key = format!("{name}=");
        let mut values = log.split_whitespace().filter_map(|word| word.strip_prefix(&key)?.parse().ok());
        values.next_back()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() && self.child.is_some() {
            // Ours tells its counters; the time to do so is the only thing to wait for.
            self.signal(libc::SIGUSR1);
            std::thread::sleep(Duration::from_millis(200));
        }
        for mut child in self.child.take().into_iter().chain(self.predecessor.take()) {
            // It may have ended already; either way there is nothing left to do about it.
            drop(child.kill());
            // One that hangs on a disk of the test's goes when that does.
            for _ in 0..1000 {
                if !matches!(child.try_wait(), Ok(None)) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        if std::thread::panicking() {
            let log = self.read_log();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("--- {} {}", self.program.display(), self.args.join(" "));
            lines[lines.len().saturating_sub(TAIL)..].iter().for_each(|line| eprintln!("| {line}"));
        }
    }
}

/// Runs a verb of our binary to its end.
pub fn verb(args: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_pcache-vhost");
    Command::new(program).args(args).stdin(Stdio::null()).output().expect("our binary runs")
}

fn text(path: &Path) -> String {
    path.to_str().expect("paths of tests are text").to_owned()
}
