//! Runs the program as an operator would: arguments in, text and exit status out.
//!
//! Every refusal is checked in one place ([`Place::refuses`]): one sentence on standard error, the
//! right exit status, and nothing changed in the test's directory.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for anything the program should do at once.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a run left.
#[derive(Debug)]
pub struct Ran {
    /// Exit status.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// A command that runs the program with `args`.
pub fn program(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pcache-vhost"));
    command.args(args).stdin(Stdio::null()).env("NO_COLOR", "1").env_remove("RUST_LOG");
    command
}

/// Runs the program to its end.
pub fn run(args: &[&str]) -> Ran {
    ran(&mut program(args))
}

/// Runs a command to its end.
pub fn ran(command: &mut Command) -> Ran {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A program that should refuse and serves instead would never end.
    let watch = Watchdog::of(&child);
    let output = child.wait_with_output().unwrap();
    drop(watch);
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Kills a program that outlives the patience.
struct Watchdog(std::sync::mpsc::Sender<()>);

impl Watchdog {
    fn of(child: &Child) -> Self {
        let pid = child.id();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            if receiver.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                kill(pid, "KILL");
            }
        });
        Self(sender)
    }
}

/// Sends a signal by the shell's own `kill`.
pub fn kill(pid: u32, signal: &str) {
    let line = format!("kill -{signal} {pid}");
    assert!(Command::new("sh").args(["-c", &line]).status().unwrap().success(), "{line}");
}

/// A directory of one test.
pub struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// On a disk.
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// In memory.
    pub fn in_memory() -> Self {
        Self { dir: tempfile::tempdir_in("/dev/shm").unwrap() }
    }

    /// Its path.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path in it, as an argument.
    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().into()
    }

    /// A file in it, with this content.
    pub fn file(&self, name: &str, content: &[u8]) -> String {
        fs::write(self.dir.path().join(name), content).unwrap();
        self.path(name)
    }

    /// A file of zeros in it.
    pub fn zeros(&self, name: &str, len: u64) -> String {
        File::create(self.dir.path().join(name)).unwrap().set_len(len).unwrap();
        self.path(name)
    }

    /// Asserts that the program refuses `args` with exit status `code`, one sentence containing all
    /// of `words`, and nothing changed.
    pub fn refuses(&self, args: &[&str], code: i32, words: &[&str]) {
        self.refuses_beside(args, code, words, &[]);
    }

    /// The same while a server is at work, which goes on writing to the files of `its_own` names.
    pub fn refuses_beside(&self, args: &[&str], code: i32, words: &[&str], its_own: &[&str]) {
        let content = || {
            let mut content = self.content();
            content.retain(|path, _| !its_own.iter().any(|name| path.ends_with(name)));
            content
        };
        let before = content();
        let ran = run(args);
        assert_eq!(ran.code, code, "{args:?} ended with {ran:?}");
        let sentence = ran.err.trim_end();
        for word in words {
            assert!(sentence.contains(word), "{args:?} said: {sentence}\nwithout: {word}");
        }
        let last = sentence.lines().last().unwrap_or_default();
        // Usage errors of the option parser come with its usual tips and usage line.
        if code != 2 || !sentence.starts_with("error: ") {
            assert!(last.starts_with("pcache-vhost: "), "{args:?} said: {sentence}");
            assert!(words.iter().all(|word| last.contains(word)), "not one sentence: {sentence}");
        }
        assert_eq!(content(), before, "{args:?} was refused and changed something");
    }

    /// Every file with its content's checksum, size and mode.
    pub fn content(&self) -> BTreeMap<PathBuf, String> {
        self.look(false)
    }

    /// The same and when it was changed: what only reads leaves even that alone.
    pub fn snapshot(&self) -> BTreeMap<PathBuf, String> {
        self.look(true)
    }

    fn look(&self, with_times: bool) -> BTreeMap<PathBuf, String> {
        let mut todo = vec![self.dir.path().to_path_buf()];
        let mut found = BTreeMap::new();
        while let Some(path) = todo.pop() {
            let about = fs::symlink_metadata(&path).unwrap();
            let kind = about.file_type();
            if kind.is_dir() {
                todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
                found.insert(path, "directory".into());
                continue;
            }
            let content = if kind.is_file() { checksum(&path) } else { 0 };
            let (mode, len) = (about.mode(), about.len());
            let time = if with_times { (about.mtime(), about.mtime_nsec()) } else { (0, 0) };
            found.insert(path, format!("{mode:o} {len} {time:?} {content:08x}"));
        }
        found
    }
}

fn checksum(path: &Path) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    let mut file = File::open(path).unwrap();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => return hasher.finalize(),
            len => hasher.update(&buffer[..len]),
        }
    }
}

/// A server that runs until dropped.
pub struct Server {
    child: Option<Child>,
    out: PathBuf,
    err: PathBuf,
}

impl Server {
    /// Starts one and waits until `socket` answers and it has announced itself.
    pub fn start(place: &Place, socket: &str, args: &[&str]) -> Self {
        let mut server = Self::spawn(place, &mut program(args));
        server.wait(|_| UnixStream::connect(socket).is_ok());
        server.wait(Self::has_announced);
        server
    }

    /// Starts one and waits until it has announced itself.
    pub fn start_by(place: &Place, command: &mut Command) -> Self {
        let mut server = Self::spawn(place, command);
        server.wait(Self::has_announced);
        server
    }

    /// Written at once, and by the server's last step before it waits.
    fn has_announced(&self) -> bool {
        self.out().contains("volume  ")
    }

    /// Starts one without waiting for anything.
    pub fn spawn(place: &Place, command: &mut Command) -> Self {
        let unique = fs::read_dir(place.dir()).unwrap().count();
        let (out, err) = (format!("out-{unique}.log"), format!("err-{unique}.log"));
        let (out, err) = (PathBuf::from(place.path(&out)), PathBuf::from(place.path(&err)));
        command.stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
        Self { child: Some(command.spawn().unwrap()), out, err }
    }

    fn wait(&mut self, mut is_done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_done(self) {
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                panic!("the server ended with {status}:\n{}{}", self.out(), self.err());
            }
            assert!(Instant::now() < deadline, "the server is not ready:\n{}{}", self.out(), self.err());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until standard error contains `word`.
    pub fn wait_for(&mut self, word: &str) {
        self.wait(|server| server.err().contains(word));
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// What it has printed.
    pub fn out(&self) -> String {
        fs::read_to_string(&self.out).unwrap()
    }

    /// What it has logged.
    pub fn err(&self) -> String {
        fs::read_to_string(&self.err).unwrap()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: &str) {
        kill(self.pid(), signal);
    }

    /// Sends a signal and waits for the end; the exit status, `None` if a signal ended it.
    pub fn end(mut self, signal: &str) -> (Option<i32>, String) {
        self.signal(signal);
        self.ended()
    }

    /// Waits for the end.
    pub fn ended(&mut self) -> (Option<i32>, String) {
        let mut child = self.child.take().unwrap();
        let watch = Watchdog::of(&child);
        let status = child.wait().unwrap();
        drop(watch);
        (status.code(), self.err())
    }

    /// Stops it cleanly.
    pub fn stop(self) {
        let (code, log) = self.end("TERM");
        assert_eq!(code, Some(0), "{log}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.kill());
            drop(child.wait());
            if std::thread::panicking() {
                eprintln!("--- the server's output ---\n{}{}", self.out(), self.err());
            }
        }
    }
}

/// Whether `path` is a socket.
pub fn is_socket(path: &str) -> bool {
    fs::symlink_metadata(path).is_ok_and(|about| about.file_type().is_socket())
}

/// Bytes that a file really occupies.
pub fn allocated(path: &str) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}
