//! A daemon with a control socket, verbs against it, and verified load beside them.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::client::{Client, ClientOptions, Daemon, FuseDisk, Mix, Rng, Traffic, Workspace};

pub const MIB: u64 = 1 << 20;
/// Longest wait for what takes a moment.
const PATIENCE: Duration = Duration::from_secs(60);
/// Size of every volume's disk.
const DISK: u64 = 64 * MIB;

/// A daemon with a cache `pmem`, smaller than its volumes, and a control socket.
pub struct Site {
    daemon: std::cell::RefCell<Daemon>,
    workspace: Workspace,
}

impl Site {
    /// One with these volumes, and `spare`, which clients may park at.
    pub fn new(volumes: &[&str]) -> Self {
        Self::with(volumes, "")
    }

    /// The same with more keys in each volume.
    pub fn with(volumes: &[&str], keys: &str) -> Self {
        let workspace = Workspace::in_memory();
        let mut text = head(&workspace);
        for name in volumes.iter().chain(&["spare"]) {
            workspace.disk(&format!("{name}.img"), DISK);
            text += &volume(&workspace, name, &workspace.path(&format!("{name}.img")), keys);
        }
        Self::start(workspace, &text, volumes[0])
    }

    /// One whose volume `a` lies on a disk of ours in user space; `None` where there is no FUSE.
    pub fn on_fuse() -> Option<(FuseDisk, Self)> {
        let workspace = Workspace::in_memory();
        let fuse = FuseDisk::mount(&workspace.path("mount"), DISK as usize).ok()?;
        let text = head(&workspace) + &volume(&workspace, "a", &fuse.path(), "");
        Some((fuse, Self::start(workspace, &text, "a")))
    }

    fn start(workspace: Workspace, text: &str, first: &str) -> Self {
        let socket = workspace.path(&format!("{first}.sock"));
        let daemon = std::cell::RefCell::new(Daemon::configured(&workspace, text, &socket));
        let site = Self { daemon, workspace };
        site.wait(|| UnixStream::connect(site.control()).is_ok());
        site
    }

    /// A path in its directory.
    pub fn path(&self, name: &str) -> String {
        self.workspace.path(name).to_str().expect("text").into()
    }

    /// The socket of a volume.
    pub fn socket(&self, volume: &str) -> PathBuf {
        self.workspace.path(&format!("{volume}.sock"))
    }

    /// The control socket.
    pub fn control(&self) -> PathBuf {
        self.workspace.path("control.sock")
    }

    /// Makes a disk.
    pub fn disk(&self, name: &str) {
        self.workspace.disk(name, DISK);
    }

    /// A [[volume]] of the configuration file.
    pub fn volume(&self, name: &str, keys: &str) -> String {
        volume(&self.workspace, name, &self.workspace.path(&format!("{name}.img")), keys)
    }

    /// The configuration file.
    pub fn config(&self) -> String {
        fs::read_to_string(self.path("pcache.toml")).expect("it was written")
    }

    /// Writes the configuration file anew.
    pub fn write_config(&self, text: &str) {
        fs::write(self.path("pcache.toml"), text).expect("it can be written");
    }

    /// Runs a verb against it.
    pub fn verb(&self, words: &[&str]) -> Verb {
        let verb = self.try_verb(words);
        self.daemon.borrow_mut().assert_alive();
        verb
    }

    /// The same, whatever becomes of it.
    pub fn try_verb(&self, words: &[&str]) -> Verb {
        let control = self.control();
        let words: Vec<&str> =
            words.iter().copied().chain(["--control", control.to_str().expect("text")]).collect();
        Verb::run(&words)
    }

    /// Starts a verb against it.
    pub fn spawn(&self, words: &[&str]) -> Child {
        command(words).arg("--control").arg(self.control()).spawn().expect("our binary runs")
    }

    /// Sends a request as it is, and reads until the daemon hangs up: the head, and the body.
    pub fn http(&self, request: &str) -> (String, String) {
        let mut stream = UnixStream::connect(self.control()).expect("the control socket answers");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.write_all(request.as_bytes()).expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it answers");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        (head.to_owned(), body.to_owned())
    }

    /// Waits until something is so.
    pub fn wait(&self, mut is_so: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !is_so() {
            assert!(begun.elapsed() < PATIENCE, "not so within {PATIENCE:?}");
            self.daemon.borrow_mut().assert_alive();
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// `kill -9`, and a start as at the first time.
    pub fn kill_and_restart(&self) {
        let mut daemon = self.daemon.borrow_mut();
        daemon.kill();
        daemon.restart();
        drop(daemon);
        // It comes after the volumes' own.
        self.wait(|| UnixStream::connect(self.control()).is_ok());
    }

    /// SIGHUP.
    pub fn hang_up(&self) {
        self.daemon.borrow().signal(libc::SIGHUP);
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        self.daemon.borrow().read_log()
    }

    /// Its process.
    pub fn pid(&self) -> u64 {
        let status = self.http("GET /v1/status HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").1;
        let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
        status["pid"].as_u64().expect("a number")
    }

    /// Whether a VM is connected to a volume, as the daemon sees it.
    pub fn is_connected(&self, volume: &str) -> bool {
        let status = self.verb(&["status", volume, "--json"]).succeeds();
        let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
        status["summary"]["connected"].as_bool().expect("a truth value")
    }

    /// All about a volume.
    pub fn status(&self, volume: &str) -> serde_json::Value {
        let status = self.verb(&["status", volume, "--json"]).succeeds();
        serde_json::from_str(&status).expect("JSON")
    }

    /// Compares the disk of a volume, alone, with what the guest wrote.
    pub fn agrees(&self, volume: &str, traffic: &mut Traffic) {
        let file = File::open(self.path(&format!("{volume}.img"))).expect("the disk opens");
        let mut bytes = vec![0; MIB as usize];
        for at in 0..traffic.model.sectors() * 512 / MIB {
            file.read_exact_at(&mut bytes, at * MIB).expect("the disk is whole");
            let checked = traffic.model.check(at * MIB / 512, &bytes);
            checked.unwrap_or_else(|why| panic!("on the disk of {volume} alone, {why}"));
        }
    }

    /// Ends it in order.
    pub fn stop(self) {
        self.daemon.borrow_mut().stop();
    }
}

fn head(workspace: &Workspace) -> String {
    format!(
        "[control]\nsocket = \"{}\"\n\n[[cache]]\nname = \"pmem\"\npath = \"{}\"\nsize = \"48MiB\"\n\
         assume_dax = true\n\n",
        workspace.path("control.sock").display(),
        workspace.path("cache.img").display()
    )
}

fn volume(workspace: &Workspace, name: &str, disk: &std::path::Path, keys: &str) -> String {
    let socket = workspace.path(&format!("{name}.sock"));
    let (socket, disk) = (socket.display(), disk.display());
    format!("[[volume]]\nname = \"{name}\"\nsocket = \"{socket}\"\nbacking = \"{disk}\"\nqueues = 2\n{keys}")
}

fn command(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pcache-vhost"));
    command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env("NO_COLOR", "1").env_remove("PCACHE_VHOST_CONTROL");
    command
}

/// A verb that has ended.
pub struct Verb {
    words: String,
    output: Output,
}

impl Verb {
    /// Runs one.
    pub fn run(words: &[&str]) -> Self {
        Self { words: words.join(" "), output: command(words).output().expect("our binary runs") }
    }

    /// Interrupts one that was spawned.
    pub fn interrupt(verb: &Child) {
        let status = Command::new("kill").args(["-INT", &verb.id().to_string()]).status();
        assert!(status.expect("kill runs").success());
    }

    pub fn is_success(&self) -> bool {
        self.output.status.success()
    }

    /// Asserts that it did it; what it said.
    pub fn succeeds(&self) -> String {
        let (out, err) = self.texts();
        assert!(self.is_success(), "{}: {}\n{out}{err}", self.words, self.output.status);
        assert!(!out.is_empty(), "{} says nothing", self.words);
        out
    }

    /// Asserts that it did it and had nothing to say.
    pub fn succeeds_silently(&self) {
        let (out, err) = self.texts();
        assert!(self.is_success() && out.is_empty(), "{}: {out}{err}", self.words);
    }

    /// Asserts that it refused with this status and all of these words.
    pub fn fails(&self, code: i32, words: &[&str]) {
        let (out, err) = self.texts();
        assert_eq!(self.output.status.code(), Some(code), "{}\n{out}{err}", self.words);
        for word in words {
            assert!(err.contains(word), "{} said: {err}\nwithout: {word}", self.words);
        }
    }

    fn texts(&self) -> (String, String) {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (text(&self.output.stdout), text(&self.output.stderr))
    }
}

/// Verified traffic on a volume, from a thread of its own, until it is ended.
pub struct Load {
    thread: Option<JoinHandle<Traffic>>,
    stop: Arc<AtomicBool>,
    longest_us: Arc<AtomicU64>,
}

impl Load {
    /// Begins, and returns once it is going.
    pub fn begin(site: &Site, volume: &str, mix: Mix) -> Self {
        let seed = Rng::seed_from_env("PCACHE_SEED");
        let client = Client::connect(&site.socket(volume), ClientOptions { queues: 2, ..Default::default() });
        let (stop, longest_us) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let going = Arc::new(AtomicBool::new(false));
        let mut traffic = Traffic::new(client, seed, mix);
        let (told, longest, is_going) = (stop.clone(), longest_us.clone(), going.clone());
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                let begun = Instant::now();
                traffic.run(20);
                longest.fetch_max(begun.elapsed().as_micros() as u64, Ordering::Relaxed);
                is_going.store(true, Ordering::Relaxed);
            }
            traffic.quiesce();
            traffic
        });
        let load = Self { thread: Some(thread), stop, longest_us };
        while !going.load(Ordering::Relaxed) && !load.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            std::thread::sleep(Duration::from_millis(1));
        }
        load.go_on_for(Duration::from_millis(200))
    }

    /// Lets it go on for a while.
    pub fn go_on_for(self, time: Duration) -> Self {
        std::thread::sleep(time);
        self
    }

    /// The longest that twenty requests have taken.
    pub fn longest_batch(&self) -> Duration {
        Duration::from_micros(self.longest_us.load(Ordering::Relaxed))
    }

    /// The longest batch since it was last asked. One that is under way counts for the next.
    pub fn take_longest(&self) -> Duration {
        Duration::from_micros(self.longest_us.swap(0, Ordering::Relaxed))
    }

    /// Ends it with nothing in flight. Whatever went wrong in it goes wrong here.
    pub fn end(mut self) -> Traffic {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().expect("ended once").join() {
            Ok(traffic) => {
                eprintln!("{:?}", traffic.tally);
                assert!(traffic.tally.changes > 100, "there was hardly any load");
                traffic
            }
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Memory of a process that is its own: not what it maps of files.
pub fn anonymous_bytes(pid: u64) -> u64 {
    let about = fs::read_to_string(format!("/proc/{pid}/status")).expect("it lives");
    let line = about.lines().find(|line| line.starts_with("RssAnon")).expect("the kernel tells");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number") << 10
}

/// Reads a page of metrics as strictly as Prometheus does: value by series.
pub fn parse_metrics(page: &str) -> HashMap<String, f64> {
    let is_name = |name: &str| {
        !name.is_empty() && name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_')
    };
    let (mut samples, mut kinds, mut family) = (HashMap::new(), HashMap::new(), String::new());
    assert!(page.ends_with('\n'), "the last line is whole");
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("a help has a text");
            assert!(is_name(name) && !help.is_empty(), "{line}");
            assert!(!kinds.contains_key(name), "{name} in two places");
            family = name.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type has a word");
            assert_eq!(name, family, "the type follows the help");
            assert!(matches!(kind, "counter" | "gauge" | "histogram"), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            kinds.insert(name.to_owned(), kind.to_owned());
        } else {
            let (series, value) = line.rsplit_once(' ').expect("a sample has a value");
            let name = series.split('{').next().expect("a name");
            let is_part = |end: &&str| name.strip_suffix(*end) == Some(family.as_str());
            let is_of_histogram = kinds.get(&family).is_some_and(|kind| kind == "histogram");
            let is_its = match is_of_histogram {
                true => ["_bucket", "_sum", "_count"].iter().any(is_part),
                false => name == family,
            };
            assert!(is_its, "samples follow their type: {line}");
            let value: f64 = value.parse().expect("a value is a number");
            assert!(value.is_finite() && value >= 0.0, "{line}");
            assert!(samples.insert(series.to_owned(), value).is_none(), "{series} twice");
        }
    }
    samples
}
