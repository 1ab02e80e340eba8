//! Locks against other programs, and against a predecessor that was killed.

use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout};

use super::*;

/// Another program, ended when dropped.
struct Other {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Other {
    fn start(line: &[&str]) -> Result<Self, String> {
        let mut command = Command::new(line[0]);
        command.args(&line[1..]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = spawn(&mut command).map_err(|e| format!("{}: {e}", line[0]))?;
        let (stdin, stdout) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Ok(Self { child, stdin, stdout })
    }

    /// Waits for its next line.
    fn says(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// Lets it come to its end.
    fn finish(mut self) {
        drop(self.stdin.take());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        drop(self.stdin.take());
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn open(path: &Path, read_only: bool) -> Result<Disk, OpenError> {
    Disk::open(&OpenOptions { read_only, ..OpenOptions::new(path) })
}

/// Opens what no program holds any more.
fn open_free(path: &Path, read_only: bool) -> Disk {
    Disk::open(&OpenOptions { read_only, ..patient(path) })
        .unwrap_or_else(|e| panic!("nobody holds it, but: {e}"))
}

fn assert_locked_by(result: Result<Disk, OpenError>, who: &str) {
    match result {
        Err(OpenError::Locked { holder, .. }) => assert!(holder.contains(who), "held by {holder}, not {who}"),
        other => panic!("not locked by {who}: {other:?}"),
    }
}

#[test]
fn one_writer_or_many_readers_in_one_process() {
    let _no_forks = no_forks();
    let dir = scratch();
    let path = image(dir.path(), 1 << 20);
    let writer = open(&path, false).unwrap();
    assert_locked_by(open(&path, false), "this process");
    assert_locked_by(open(&path, true), "this process");
    let unlocked = OpenOptions { lock: false, ..OpenOptions::new(&path) };
    Disk::open(&unlocked).unwrap();
    drop(writer);
    let readers = [open(&path, true).unwrap(), open(&path, true).unwrap()];
    assert_locked_by(open(&path, false), "this process");
    drop(readers);
    open(&path, false).unwrap();
}

#[test]
fn a_lock_outlives_the_disk_as_long_as_a_channel_does() {
    let _no_forks = no_forks();
    let dir = scratch();
    let path = image(dir.path(), 1 << 20);
    for engine in [Engine::Auto, Engine::Threads] {
        let disk = Disk::open(&OpenOptions { engine, ..OpenOptions::new(&path) }).unwrap();
        let mut channel = disk.channel(&Waker::default(), 4).unwrap();
        drop(disk);
        assert_locked_by(open(&path, false), "this process");
        write(&mut channel, 0, filled(4096, 1)).unwrap();
        drop(channel);
        open(&path, false).unwrap();
    }
}

#[test]
fn every_kind_of_lock_is_respected_and_its_holder_named() {
    let dir = scratch();
    let path = image(dir.path(), 1 << 20);
    let text = path.to_str().unwrap();
    let script = |call: &str| {
        format!(
            "import fcntl, struct, sys\nf = open({text:?}, 'r+b')\n{call}\n\
             print('locked', flush=True)\nsys.stdin.read()"
        )
    };
    let ofd = "fcntl.fcntl(f, 37, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 4096, 512, 0))";
    let posix = "fcntl.lockf(f, fcntl.LOCK_EX, 1, 700000)";
    let whole = "fcntl.flock(f, fcntl.LOCK_EX)";
    for (kind, call) in [("ofd", ofd), ("posix", posix), ("flock", whole)] {
        let mut other = match Other::start(&["python3", "-c", &script(call)]) {
            Ok(other) => other,
            Err(why) => return skip("every_kind_of_lock_is_respected_and_its_holder_named", &why),
        };
        assert_eq!(other.says(), "locked", "{kind}");
        assert_locked_by(open(&path, false), "python3");
        assert_locked_by(open(&path, true), &format!("process {}", other.child.id()));
        other.finish();
        open_free(&path, false);
    }
}

#[test]
fn our_lock_keeps_flock_and_fcntl_users_out() {
    let dir = scratch();
    let path = image(dir.path(), 1 << 20);
    let text = path.to_str().unwrap();
    let disk = open_free(&path, false);
    let flock = ["flock", "--nonblock", text, "true"];
    let posix = format!(
        "import fcntl\nf = open({text:?}, 'r+b')\nfcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 9)"
    );
    let python = ["python3", "-c", &posix];
    assert!(command(&flock).is_err());
    assert!(command(&python).is_err());
    drop(disk);
    until("our lock to go", || command(&flock).ok());
    until("our lock to go", || command(&python).ok());
}

/// `qemu-storage-daemon` exporting the image, once it has it.
fn qemu(path: &Path, writable: bool) -> Result<Other, String> {
    let socket = path.with_extension("nbd");
    drop(std::fs::remove_file(&socket));
    let mode = if writable { "off" } else { "on" };
    let other = Other::start(&[
        "qemu-storage-daemon",
        "--blockdev",
        &format!("driver=file,node-name=f,filename={},locking=on,read-only={mode}", path.display()),
        "--nbd-server",
        &format!("addr.type=unix,addr.path={}", socket.display()),
        "--export",
        &format!("type=nbd,id=e,node-name=f,writable={}", if writable { "on" } else { "off" }),
        "--pidfile",
        socket.with_extension("pid").to_str().unwrap(),
    ]);
    let mut other = other?;
    // The pid file is written when everything on the command line has been done.
    let ended = until("qemu-storage-daemon", || {
        let ended = other.child.try_wait().unwrap();
        let started = socket.with_extension("pid").exists();
        (started || ended.is_some()).then_some(ended)
    });
    match ended {
        Some(status) => Err(format!("qemu-storage-daemon: {status}")),
        None => Ok(other),
    }
}

#[test]
fn qemu_and_we_keep_each_other_out_but_share_reading() {
    let name = "qemu_and_we_keep_each_other_out_but_share_reading";
    if let Err(why) = command(&["qemu-storage-daemon", "--version"]) {
        return skip(name, &why);
    }
    // Ours, theirs, and whether both fit.
    for (our_reading, their_reading, fits) in
        [(false, false, false), (false, true, false), (true, false, false), (true, true, true)]
    {
        let what = format!("we read only: {our_reading}, they: {their_reading}");
        let dir = scratch();
        let path = image(dir.path(), 1 << 20);
        let theirs = qemu(&path, !their_reading).unwrap_or_else(|e| panic!("{what}: {e}"));
        match open(&path, our_reading) {
            Ok(_) => assert!(fits, "{what}: opened beside them"),
            refused if !fits => assert_locked_by(refused, "qemu-storage-da"),
            refused => panic!("{what}: {refused:?}"),
        }
        drop(theirs);
        std::fs::remove_file(path.with_extension("pid")).ok();
        let _ours = open_free(&path, our_reading);
        assert_eq!(qemu(&path, !their_reading).is_ok(), fits, "{what}: they came second");
    }
}

#[test]
fn waiting_for_a_lock_ends_when_its_holder_does() {
    let _no_forks = no_forks();
    let dir = scratch();
    let path = image(dir.path(), 1 << 20);
    let held = open(&path, false).unwrap();
    let waiting = patient(&path);
    let waiter = std::thread::spawn(move || Disk::open(&waiting).map(|_| ()));
    let brief = OpenOptions { wait_lock: Some(Duration::from_millis(120)), ..OpenOptions::new(&path) };
    let start = Instant::now();
    assert!(matches!(Disk::open(&brief), Err(OpenError::Locked { .. })));
    assert!(start.elapsed() >= Duration::from_millis(120), "gave up early");
    assert!(!waiter.is_finished());
    drop(held);
    waiter.join().unwrap().unwrap();
}

#[test]
fn a_disk_put_in_place_of_the_one_waited_for_is_noticed() {
    let dir = scratch();
    let path = image(dir.path(), 1 << 20);
    let held = open(&path, false).unwrap();
    let waiting = patient(&path);
    let waiter = std::thread::spawn(move || Disk::open(&waiting).map(|_| ()));
    // The waiter has the old file open when a second descriptor of it exists in this process.
    let meta = std::fs::metadata(&path).unwrap();
    until("the waiter to open the old file", || (descriptors_of(&meta) >= 2).then_some(()));
    std::fs::rename(&path, dir.path().join("old")).unwrap();
    create_sparse(&path, 1 << 20).unwrap();
    drop(held);
    assert!(matches!(waiter.join().unwrap(), Err(OpenError::Replaced { .. })));
}

/// Descriptors of this process that are open on the file.
fn descriptors_of(file: &std::fs::Metadata) -> usize {
    use std::os::unix::fs::MetadataExt;
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    fds.filter(|fd| {
        std::fs::metadata(fd.path()).is_ok_and(|m| m.ino() == file.ino() && m.dev() == file.dev())
    })
    .count()
}

/// Environment of the process that [`predecessor`] is.
const PREDECESSOR: &str = "PCACHE_TEST_PREDECESSOR";

/// Not a claim by itself: the body of the process that the next test kills. Without its variable it
/// has nothing to do.
#[test]
fn predecessor() {
    let Ok(path) = std::env::var(PREDECESSOR) else { return };
    let engine = if path.ends_with("threads.img") { Engine::Threads } else { Engine::Auto };
    let disk = Disk::open(&OpenOptions { engine, ..OpenOptions::new(path) }).unwrap();
    let mut channel = disk.channel(&Waker::default(), 4).unwrap();
    println!("opened");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    channel.submit(0, Op::Write { offset: 0, buf: filled(4096, 0xDD) }).unwrap();
    channel.kick();
    println!("writing");
    channel.wait(PATIENCE);
    panic!("the write ended although the file system was frozen");
}

#[test]
fn a_successor_waits_for_the_writes_of_a_killed_predecessor() {
    let name = "a_successor_waits_for_the_writes_of_a_killed_predecessor";
    for file in ["uring.img", "threads.img"] {
        let dir = scratch();
        let (below, on) = (image(dir.path(), 64 << 20), dir.path().join("mnt"));
        std::fs::create_dir(&on).unwrap();
        let prepared = Loop::attach(&below, &[]).and_then(|device| {
            command(&["mkfs.ext4", "-q", device.text()])?;
            let mounted = mount(&[], device.text(), &on)?;
            Ok((mounted, device))
        });
        let (_mounted, _device) = match prepared {
            Ok(prepared) => prepared,
            Err(why) => return skip(name, &why),
        };
        let path = on.join(file);
        create_sparse(&path, 1 << 20).unwrap();
        let on = on.to_str().unwrap();

        let exe = std::env::current_exe().unwrap();
        let mut predecessor = Command::new(exe);
        predecessor
            .args(["--exact", "backing::tests::locks::predecessor", "--nocapture", "--test-threads=1"])
            .env(PREDECESSOR, &path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = spawn(&mut predecessor).unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut wait_for = |word: &str| {
            assert!(
                lines.by_ref().any(|line| line.unwrap().contains(word)),
                "the predecessor never said {word}"
            )
        };
        wait_for("opened");
        command(&["fsfreeze", "--freeze", on]).unwrap();
        let thaw = Undo::new(&["fsfreeze", "--unfreeze", on]);
        child.stdin.take().unwrap().write_all(b"go\n").unwrap();
        wait_for("writing");
        // Its write hangs in the kernel once a thread of its sleeps there uninterruptibly.
        until("the write to hang", || write_hangs(child.id()).then_some(()));
        child.kill().unwrap();

        let impatient =
            OpenOptions { wait_lock: Some(Duration::from_millis(300)), ..OpenOptions::new(&path) };
        match Disk::open(&impatient) {
            Err(OpenError::Locked { .. }) => {}
            other => panic!("{file}: opened while a dead process still writes: {other:?}"),
        }
        drop(thaw);
        let waiting = patient(&path);
        let disk = Disk::open(&waiting).unwrap();
        child.wait().unwrap();
        let mut channel = disk.channel(&Waker::default(), 4).unwrap();
        let found = read(&mut channel, 0, 4096).unwrap();
        assert!(found.iter().all(|b| *b == found[0]), "{file}: the old write is still under way");
        write(&mut channel, 0, filled(4096, 0x11)).unwrap();
        assert!(read(&mut channel, 0, 4096).unwrap().iter().all(|b| *b == 0x11), "{file}");
    }
}

/// Whether a thread of a process sleeps where a frozen file system makes writers sleep.
fn write_hangs(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok())
        .any(|stat| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('D')))
}
