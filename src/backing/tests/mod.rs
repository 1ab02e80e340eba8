//! Tests of the real disk on real files, tmpfs and loop devices.

mod devices;
mod io;
mod locks;
mod open;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use super::*;

/// Nothing here takes longer; beyond it a test has hung.
const PATIENCE: Duration = Duration::from_secs(30);

/// Random numbers from a seed (xorshift64*).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Held while a child process has copies of all our descriptors, and so of their locks: between its
/// fork and its exec.
static FORKING: RwLock<()> = RwLock::new(());

/// While this lives, closing a descriptor gives up its locks at once.
fn no_forks() -> RwLockReadGuard<'static, ()> {
    FORKING.read().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a child; returns when it no longer has copies of our descriptors.
fn spawn(command: &mut Command) -> std::io::Result<Child> {
    let _forking = FORKING.write().unwrap_or_else(PoisonError::into_inner);
    command.spawn()
}

/// Options that are not put off by a lock which a test's forked child still has a copy of.
fn patient(path: impl Into<PathBuf>) -> OpenOptions {
    OpenOptions { wait_lock: Some(PATIENCE), ..OpenOptions::new(path) }
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// A sparse image in `dir`.
fn image(dir: &Path, size: u64) -> PathBuf {
    let path = dir.join("disk.img");
    create_sparse(&path, size).unwrap();
    path
}

fn filled(len: usize, byte: u8) -> AlignedBuf {
    let mut buf = AlignedBuf::new(len);
    buf.fill(byte);
    buf
}

/// Waits for one completion.
fn next(channel: &mut DiskChannel) -> Completion {
    let start = Instant::now();
    let mut done = Vec::new();
    while done.is_empty() {
        assert!(start.elapsed() < PATIENCE, "no completion of {} in flight", channel.in_flight());
        channel.wait(PATIENCE);
        channel.reap(&mut done);
    }
    assert_eq!(done.len(), 1, "one operation, one completion");
    done.remove(0)
}

/// Does one operation from begin to end.
fn run(channel: &mut DiskChannel, op: Op) -> (Op, std::io::Result<()>) {
    channel.submit(7, op).unwrap();
    channel.kick();
    let completion = next(channel);
    assert_eq!(completion.token, 7);
    (completion.op, completion.result)
}

fn read(channel: &mut DiskChannel, offset: u64, len: usize) -> std::io::Result<AlignedBuf> {
    match run(channel, Op::Read { offset, buf: filled(len, 0xEE) }) {
        (Op::Read { buf, .. }, result) => result.map(|()| buf),
        other => panic!("a read became {other:?}"),
    }
}

fn write(channel: &mut DiskChannel, offset: u64, buf: AlignedBuf) -> std::io::Result<()> {
    run(channel, Op::Write { offset, buf }).1
}

fn flush(channel: &mut DiskChannel) -> std::io::Result<()> {
    run(channel, Op::Flush).1
}

/// Repeats `attempt` until it gives something.
fn until<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = attempt() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

/// Runs a command; its output, or what it complained about.
fn command(line: &[&str]) -> Result<String, String> {
    let mut command = Command::new(line[0]);
    command.args(&line[1..]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = spawn(&mut command).and_then(Child::wait_with_output);
    let output = output.map_err(|e| format!("{}: {e}", line[0]))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        Err(format!("{line:?}: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }
}

/// Says on the terminal, not only in the captured output, that a test proved nothing.
fn skip(test: &str, why: &str) {
    let text = format!("SKIPPED {test}: {why}\n");
    // Written to the descriptor itself: the harness captures what `eprintln` says.
    let mut terminal = std::fs::OpenOptions::new().append(true).open("/dev/stderr");
    if let Ok(terminal) = &mut terminal {
        std::io::Write::write_all(terminal, text.as_bytes()).unwrap();
    }
}

/// Undoes a command when dropped.
struct Undo(Vec<String>);

impl Undo {
    fn new(line: &[&str]) -> Self {
        Self(line.iter().map(ToString::to_string).collect())
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        let line: Vec<_> = self.0.iter().map(String::as_str).collect();
        // A file system just written to may be busy for a moment.
        let start = Instant::now();
        while let Err(why) = command(&line) {
            if start.elapsed() > Duration::from_secs(5) {
                eprintln!("left behind: {why}");
                return;
            }
            std::thread::yield_now();
        }
    }
}

/// A loop device on a file, gone when dropped.
struct Loop {
    path: PathBuf,
    _undo: Undo,
}

impl Loop {
    fn attach(file: &Path, options: &[&str]) -> Result<Self, String> {
        let mut line = vec!["losetup", "--find", "--show"];
        line.extend(options);
        line.push(file.to_str().unwrap());
        let path = command(&line)?;
        Ok(Self { _undo: Undo::new(&["losetup", "--detach", &path]), path: path.into() })
    }

    fn text(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

/// Mounts and unmounts when dropped.
fn mount(options: &[&str], source: &str, on: &Path) -> Result<Undo, String> {
    let on = on.to_str().unwrap();
    let mut line = vec!["mount"];
    line.extend(options);
    line.extend([source, on]);
    command(&line)?;
    Ok(Undo::new(&["umount", on]))
}
