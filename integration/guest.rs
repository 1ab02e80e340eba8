//! A booted guest that runs one script and reports what it printed.
//!
//! It exists because a scenario is about the disk, not about a virtual machine: boot, talk to the
//! script over the report port, learn its exit status.
//!
//! Invariants:
//! - every wait has a deadline, and every failure shows what the script printed, the console's end and
//!   QEMU's own words;
//! - the QEMU process does not outlive its `Guest`;
//! - an end without an exit status is a failure, never an empty success.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::cpio::Archive;
use crate::monitor::{FAST, Monitor, SLOW};
use crate::prepare::Host;
use crate::qemu::{self, Disk, Machine, Nvdimm};

/// What to boot.
#[derive(Debug, Clone)]
pub struct GuestOptions {
    script: String,
    is_whole: bool,
    disks: Vec<Disk>,
    vcpus: u32,
    memory_mib: u32,
    spare_mib: u32,
    nvdimm: Option<Nvdimm>,
    files: Vec<(String, u32, Vec<u8>)>,
    fio: bool,
    incoming: Option<PathBuf>,
    timeout: Duration,
}

/// QEMU's monitor, in the guest's directory.
const MONITOR: &str = "qmp.sock";

/// The default deadline for a whole guest. Seconds suffice on an idle machine; a busy one that
/// translates instructions may need many times that.
const DEADLINE: Duration = Duration::from_secs(240);

impl GuestOptions {
    /// A guest with one CPU and 512 MiB that runs `script` in a shell with `-eu`.
    pub fn new(script: impl Into<String>) -> Self {
        Self {
            script: script.into(),
            is_whole: false,
            disks: Vec::new(),
            vcpus: 1,
            memory_mib: 512,
            spare_mib: 0,
            nvdimm: None,
            files: Vec::new(),
            fio: false,
            incoming: None,
            timeout: DEADLINE,
        }
    }

    /// A guest whose `script` is all there is: it runs in a shell and a root of its own.
    pub fn whole(script: impl Into<String>) -> Self {
        Self { is_whole: true, ..Self::new(script) }
    }

    /// Goes on with the state that [`Guest::migrate`] has left in `file`, instead of booting.
    pub fn incoming(mut self, file: &Path) -> Self {
        self.incoming = Some(file.to_owned());
        self
    }

    /// Adds a disk; the first is vda.
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// Sets the number of virtual CPUs.
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// Sets the memory.
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Leaves room for so much memory more, for [`Guest::plug_memory`].
    pub fn spare_mib(mut self, spare_mib: u32) -> Self {
        self.spare_mib = spare_mib;
        self
    }

    /// Adds persistent memory.
    pub fn nvdimm(mut self, nvdimm: Nvdimm) -> Self {
        self.nvdimm = Some(nvdimm);
        self
    }

    /// Puts a file into the guest; the path is absolute.
    pub fn file(mut self, path: &str, permissions: u32, contents: impl Into<Vec<u8>>) -> Self {
        self.files.push((path.trim_start_matches('/').to_owned(), permissions, contents.into()));
        self
    }

    /// Puts a program of the host and the shared objects it needs into the guest.
    pub fn program(mut self, path: &str, host_path: &Path) -> Self {
        let read = |path: &Path| match fs::read(path) {
            Ok(contents) => contents,
            Err(error) => panic!("{}: {error}", path.display()),
        };
        for object in shared_objects(host_path) {
            let name = object.trim_start_matches('/').to_owned();
            self.files.push((name, 0o755, read(Path::new(&object))));
        }
        self.file(path, 0o755, read(host_path))
    }

    /// Puts fio into the guest, which costs 80 MiB of its memory.
    pub fn fio(mut self) -> Self {
        self.fio = true;
        self
    }

    /// Sets the deadline for the whole run.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
}

/// What a script printed, and how it ended.
#[derive(Debug)]
pub struct Report {
    /// Standard output and error, without the harness's own words.
    pub lines: Vec<String>,
    /// The script's exit status.
    pub status: i32,
}

impl Report {
    /// The rest of every line that begins with `word` and a space.
    pub fn after(&self, word: &str) -> Vec<&str> {
        self.lines.iter().filter_map(|line| line.strip_prefix(word)?.strip_prefix(' ')).collect()
    }

    /// The checksum lines that `make_file` printed, as `sha256sum -c` wants them.
    pub fn sums(&self) -> String {
        self.after("SUM").iter().map(|line| format!("{line}\n")).collect()
    }
}

/// A running guest.
pub struct Guest {
    qemu: Child,
    to_script: UnixStream,
    heard: Arc<Heard>,
    deadline: Instant,
    files: tempfile::TempDir,
}

/// What came out of the report port so far.
#[derive(Default)]
struct Heard {
    state: Mutex<HeardState>,
    changed: Condvar,
}

#[derive(Default)]
struct HeardState {
    lines: Vec<String>,
    marks: Vec<String>,
    status: Option<i32>,
    closed: bool,
}

impl Guest {
    /// Starts a guest; its script begins to run some seconds later.
    ///
    /// # Panics
    ///
    /// When QEMU does not start or does not connect its report port.
    pub fn boot(host: &Host, options: GuestOptions) -> Self {
        let files = tempfile::Builder::new().prefix("guest-").tempdir().expect("a directory for the guest");
        let deadline = Instant::now() + options.timeout;
        let initramfs = files.path().join("initramfs");
        write_initramfs(host, &options, &initramfs).expect("write the guest's initramfs");
        let report = files.path().join("report.sock");
        let listener = UnixListener::bind(&report).expect("listen for the guest's report");
        let console = files.path().join("console");
        let machine = Machine {
            qemu: &host.qemu,
            accelerator: host.accelerator,
            kernel: &host.kernel,
            initramfs: Some(&initramfs),
            // A loaded host delivers the timer too late for the kernel's own check of it.
            append: "console=ttyS0 quiet loglevel=5 panic=-1 mitigations=off no_timer_check",
            vcpus: options.vcpus,
            memory_mib: options.memory_mib,
            spare_mib: options.spare_mib,
            disks: &options.disks,
            nvdimm: options.nvdimm.as_ref(),
            console: &console,
            report: Some(&report),
            monitor: Some(&files.path().join(MONITOR)),
            incoming: options.incoming.as_deref(),
        };
        let stderr = File::create(files.path().join("qemu.log")).expect("a log for QEMU");
        let mut qemu = qemu::command(&machine)
            .stdin(Stdio::null())
            .stdout(stderr.try_clone().expect("a second handle of the log"))
            .stderr(stderr)
            .spawn()
            .expect("start QEMU");
        let stream = accept(&listener, &mut qemu, deadline)
            .unwrap_or_else(|error| panic!("QEMU: {error}\n{}", tail(&files.path().join("qemu.log"), 20)));
        let heard = Arc::new(Heard::default());
        let from_script = stream.try_clone().expect("a second handle of the report port");
        let listener_heard = Arc::clone(&heard);
        std::thread::spawn(move || listen(from_script, &listener_heard));
        Self { qemu, to_script: stream, heard, deadline, files }
    }

    /// Waits until the script says `mark NAME`.
    ///
    /// # Panics
    ///
    /// When the script ends first, or the deadline passes.
    pub fn wait_for(&self, name: &str) {
        let state = self.wait_until(|state| state.marks.iter().any(|mark| mark == name));
        let reached = state.is_some_and(|state| state.marks.iter().any(|mark| mark == name));
        assert!(reached, "the guest never came to {name:?}\n{}", self.account());
    }

    /// Whether the script said `mark NAME` already.
    pub fn has_passed(&self, name: &str) -> bool {
        self.heard.lock().marks.iter().any(|mark| mark == name)
    }

    /// What the script printed so far.
    pub fn lines(&self) -> Vec<String> {
        self.heard.lock().lines.clone()
    }

    /// The checksum lines that `make_file` printed so far.
    pub fn sums(&self) -> String {
        Report { lines: self.lines(), status: 0 }.sums()
    }

    /// Lets a script go on that waits in `await NAME`.
    pub fn go(&mut self, name: &str) {
        writeln!(self.to_script, "GO {name}")
            .unwrap_or_else(|error| panic!("GO {name}: {error}\n{}", self.account()));
    }

    /// Waits for the script's end and gives its report, whatever its status.
    ///
    /// # Errors
    ///
    /// A full account when the guest ended without a status, or not before the deadline.
    pub fn try_finish(mut self) -> Result<Report, String> {
        let ended = self.wait_until(|state| state.status.is_some());
        let Some(HeardState { lines, status: Some(status), .. }) = ended else {
            return Err(format!("no exit status from the guest\n{}", self.account()));
        };
        // Powered off by itself: what QEMU still held of raw disks is in their files.
        while Instant::now() < self.deadline {
            match self.qemu.try_wait() {
                Ok(Some(_)) => return Ok(Report { lines, status }),
                Ok(None) => std::thread::sleep(Duration::from_millis(20)),
                Err(error) => return Err(format!("waiting for QEMU: {error}")),
            }
        }
        Err(format!("the guest did not power off\n{}", self.account()))
    }

    /// Waits for the script's end and gives its report.
    ///
    /// # Panics
    ///
    /// When the script failed, or did not end.
    pub fn finish(self) -> Report {
        let files = self.files.path().to_owned();
        let console = files.join("console");
        // Kept open: `try_finish` removes the directory.
        let mut console = File::open(console).ok();
        match self.try_finish() {
            Ok(report) if report.status == 0 => report,
            Ok(report) => {
                let mut text = String::new();
                if let Some(console) = &mut console {
                    io::Read::read_to_string(console, &mut text).unwrap_or_default();
                }
                panic!(
                    "the script ended with status {}\n--- script ---\n{}\n--- console ---\n{}",
                    report.status,
                    report.lines.join("\n"),
                    last_lines(&text, 60)
                )
            }
            Err(account) => panic!("{account}"),
        }
    }

    /// Moves the running guest's state into `file`, and ends its QEMU.
    ///
    /// # Panics
    ///
    /// When QEMU refuses, or does not end the migration before the deadline.
    pub fn migrate(mut self, file: &Path) {
        let mut monitor = self.monitor();
        monitor.start_migration(file, FAST);
        monitor.await_migration("completed", self.deadline);
        self.end();
    }

    /// Begins to move its state, lets it go on for `time`, and thinks better of it.
    ///
    /// # Panics
    ///
    /// As [`Guest::migrate`], and when it was over before `time`.
    pub fn migrate_and_cancel(&self, file: &Path, time: Duration) {
        let mut monitor = self.monitor();
        monitor.start_migration(file, SLOW);
        std::thread::sleep(time);
        monitor.execute("migrate_cancel", "{}");
        monitor.await_migration("cancelled", self.deadline);
    }

    /// Plugs so much memory in while the guest runs; it decides what it uses it for.
    ///
    /// # Panics
    ///
    /// When QEMU refuses.
    pub fn plug_memory(&self, mib: u32) {
        let mut monitor = self.monitor();
        let size = u64::from(mib) << 20;
        let memory = format!(
            "{{\"qom-type\": \"memory-backend-memfd\", \"id\": \"more\", \"size\": {size}, \"share\": true}}"
        );
        monitor.execute("object-add", &memory);
        monitor.execute("device_add", "{\"driver\": \"pc-dimm\", \"id\": \"dimm\", \"memdev\": \"more\"}");
    }

    fn monitor(&self) -> Monitor {
        Monitor::connect(&self.files.path().join(MONITOR))
    }

    /// Takes the power away, now.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Err(error) = self.qemu.kill().and_then(|()| self.qemu.wait()) {
            eprintln!("ending QEMU: {error}");
        }
    }

    /// A copy of the state once `ready`, or `None` at the end or the deadline.
    fn wait_until(&self, ready: impl Fn(&HeardState) -> bool) -> Option<HeardState> {
        let mut state = self.heard.lock();
        loop {
            if ready(&state) {
                let HeardState { lines, marks, status, closed } = &*state;
                let (lines, marks) = (lines.clone(), marks.clone());
                return Some(HeardState { lines, marks, status: *status, closed: *closed });
            }
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.closed || state.status.is_some() {
                return None;
            }
            let (next, _) =
                self.heard.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            state = next;
        }
    }

    /// Everything there is to say about this guest.
    fn account(&self) -> String {
        let state = self.heard.lock();
        let (script, marks) = (state.lines.join("\n"), state.marks.join(", "));
        drop(state);
        let past = if Instant::now() >= self.deadline { "deadline passed; " } else { "" };
        let console = tail(&self.files.path().join("console"), 60);
        let qemu = tail(&self.files.path().join("qemu.log"), 20);
        format!(
            "({past}marks: [{marks}])\n--- script ---\n{script}\n--- console ---\n{console}\n--- qemu ---\n{qemu}"
        )
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.end();
    }
}

impl Heard {
    fn lock(&self) -> MutexGuard<'_, HeardState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sorts the script's lines into marks, the exit status and output.
fn listen(stream: UnixStream, heard: &Heard) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    while let Ok(1..) = reader.read_until(b'\n', &mut line) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        line.clear();
        let mut state = heard.lock();
        if let Some(mark) = text.strip_prefix("MARK ") {
            state.marks.push(mark.to_owned());
        } else if let Some(status) = text.strip_prefix("EXIT ") {
            state.status = status.parse().ok();
        } else {
            state.lines.push(text);
        }
        heard.changed.notify_all();
    }
    heard.lock().closed = true;
    heard.changed.notify_all();
}

/// The report port's connection, or why there is none.
fn accept(listener: &UnixListener, qemu: &mut Child, deadline: Instant) -> Result<UnixStream, String> {
    listener.set_nonblocking(true).map_err(|error| error.to_string())?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).map_err(|error| error.to_string())?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.to_string()),
        }
        if let Ok(Some(status)) = qemu.try_wait() {
            return Err(format!("ended at once: {status}"));
        }
        if Instant::now() >= deadline {
            let killed = qemu.kill().and_then(|()| qemu.wait());
            return Err(format!("did not connect in time ({killed:?})"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The prepared archive, fio's where wanted, and this run's own files, in a row.
fn write_initramfs(host: &Host, options: &GuestOptions, path: &PathBuf) -> io::Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    io::copy(&mut File::open(&host.initramfs)?, &mut out)?;
    if options.fio {
        io::copy(&mut File::open(&host.initramfs_fio)?, &mut out)?;
    }
    let mut archive = Archive::new(out);
    let words = if options.is_whole { "" } else { ". /lib/guest.sh\n" };
    let script = format!("{words}{}", options.script);
    archive.file("script", 0o644, script.as_bytes())?;
    for (path, permissions, contents) in &options.files {
        archive.file(path, *permissions, contents)?;
    }
    archive.finish()?.flush()
}

fn shared_objects(program: &Path) -> Vec<String> {
    let output = std::process::Command::new("ldd").arg(program).output().expect("run ldd");
    String::from_utf8_lossy(&output.stdout)
        .split_whitespace()
        .filter(|word| word.starts_with('/') && !word.ends_with(':'))
        .map(str::to_owned)
        .collect()
}

/// The end of a text file, for failure messages.
pub fn tail(path: &Path, lines: usize) -> String {
    match fs::read(path) {
        Ok(bytes) => last_lines(&String::from_utf8_lossy(&bytes), lines),
        Err(error) => format!("({}: {error})", path.display()),
    }
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
