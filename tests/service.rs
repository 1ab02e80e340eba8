//! The daemon as a service: what a service manager passes to it, is told by it, and what it gives up.
//!
//! Claims: READY comes when sockets answer and not before, a reload and a stop are announced, the watchdog
//! is fed; sockets that the manager listens at are served and outlive the daemon; every thread is under
//! seccomp, and a call or a file that is no server's is refused; volumes can be attached all the same.
#![expect(unsafe_code, reason = "passes descriptors by number, and makes the calls that are refused")]

mod client;

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use client::{Client, ClientOptions, Mix, Rng, Traffic, Workspace};
use pcache_vhost::control::config::Consents;
use pcache_vhost::control::{file, sandbox};

const MIB: u64 = 1 << 20;
/// Longest wait for what takes a moment.
const PATIENCE: Duration = Duration::from_secs(60);

/// A configuration with one volume `vm1`, and what it names.
struct Setup {
    workspace: Workspace,
    more: String,
}

impl Setup {
    fn new(more: &str) -> Self {
        let workspace = Workspace::in_memory();
        workspace.disk("vm1.img", 32 * MIB);
        let setup = Self { workspace, more: more.into() };
        fs::write(setup.path("config.toml"), setup.config()).expect("it can be written");
        setup
    }

    fn path(&self, name: &str) -> PathBuf {
        self.workspace.path(name)
    }

    fn config(&self) -> String {
        let path = |name: &str| self.path(name).display().to_string();
        format!(
            "{}\n[control]\nsocket = \"{}\"\n\n[[cache]]\nname = \"pmem\"\npath = \"{}\"\nsize = \"48MiB\"\n\
             assume_dax = true\n\n[[volume]]\nname = \"vm1\"\nsocket = \"{}\"\nbacking = \"{}\"\n",
            self.more,
            path("control.sock"),
            path("cache.img"),
            path("vm1.sock"),
            path("vm1.img")
        )
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pcache-vhost"));
        command.arg("--config").arg(self.path("config.toml")).stdin(Stdio::null()).env("NO_COLOR", "1");
        for variable in ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID"] {
            command.env_remove(variable);
        }
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("log")).expect("a log");
        command.stdout(log.try_clone().expect("the log can be shared")).stderr(log);
        command
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Waits until a socket answers.
    fn wait_for(&self, socket: &str) {
        let begun = Instant::now();
        while UnixStream::connect(self.path(socket)).is_err() {
            assert!(begun.elapsed() < PATIENCE, "{socket} does not answer\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn verb(&self, words: &[&str]) -> (bool, String) {
        let control = self.path("control.sock");
        let output = Command::new(env!("CARGO_BIN_EXE_pcache-vhost"))
            .args(words)
            .arg("--control")
            .arg(control)
            .output()
            .expect("our binary runs");
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    }
}

/// A daemon that is killed with its test.
struct Running(Child);

impl Running {
    fn signal(&self, signal: i32) {
        // SAFETY: the child has not been waited for, so its number is its own.
        assert_eq!(unsafe { libc::kill(self.0.id() as i32, signal) }, 0);
    }

    fn stop(self) {
        self.signal(libc::SIGTERM);
        self.ends_well();
    }

    fn ends_well(mut self) {
        let status = self.0.wait().expect("a child can be waited for");
        assert!(status.success(), "{status}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// The next message to the manager that is no food for the watchdog and no mere status.
fn next_state(manager: &UnixDatagram) -> String {
    loop {
        let mut text = [0; 4096];
        let len = manager.recv(&mut text).expect("the daemon says something in time");
        let text = String::from_utf8_lossy(&text[..len]).into_owned();
        if text != "WATCHDOG=1" && !text.starts_with("STATUS=") {
            return text;
        }
    }
}

#[test]
fn the_manager_is_told_when_sockets_answer_of_a_reload_and_of_the_stop() {
    let setup = Setup::new("");
    let manager = UnixDatagram::bind(setup.path("notify")).expect("a socket");
    manager.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut command = setup.command();
    command.env("NOTIFY_SOCKET", setup.path("notify")).env("WATCHDOG_USEC", "200000");
    let daemon = Running(command.spawn().expect("our binary runs"));

    assert_eq!(next_state(&manager), "READY=1\nSTATUS=Serving 1 volume on 1 cache", "{}", setup.log());
    UnixStream::connect(setup.path("vm1.sock")).expect("whoever was told READY finds the socket");
    UnixStream::connect(setup.path("control.sock")).expect("and the control socket");

    let begun = Instant::now();
    let mut fed = 0;
    while fed < 5 {
        let mut text = [0; 64];
        let len = manager.recv(&mut text).expect("the watchdog is fed");
        fed += u32::from(&text[..len] == b"WATCHDOG=1");
        assert!(begun.elapsed() < PATIENCE);
    }
    // Five times 100 ms, and not in a loop that never sleeps.
    assert!(begun.elapsed() > Duration::from_millis(350), "fed in {:?}", begun.elapsed());

    daemon.signal(libc::SIGHUP);
    let reloading = next_state(&manager);
    let since = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").expect("the time of the reload");
    assert!(since.parse::<u64>().expect("microseconds") > 0);
    assert!(next_state(&manager).starts_with("READY=1\n"));
    daemon.signal(libc::SIGTERM);
    assert!(next_state(&manager).starts_with("STOPPING=1\n"));
    daemon.ends_well();
}

#[test]
fn a_daemon_that_stands_still_does_not_feed_its_watchdog() {
    let setup = Setup::new("");
    let manager = UnixDatagram::bind(setup.path("notify")).expect("a socket");
    manager.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut command = setup.command();
    command.env("NOTIFY_SOCKET", setup.path("notify")).env("WATCHDOG_USEC", "200000");
    let daemon = Running(command.spawn().expect("our binary runs"));
    next_state(&manager);
    daemon.signal(libc::SIGSTOP);
    manager.set_read_timeout(Some(Duration::from_millis(500))).expect("a timeout");
    // What was said before it stood still.
    while manager.recv(&mut [0; 64]).is_ok() {}
    assert!(manager.recv(&mut [0; 64]).is_err(), "it is fed by a daemon that stands still");
    daemon.signal(libc::SIGCONT);
    manager.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    manager.recv(&mut [0; 64]).expect("and by one that goes on");
    daemon.stop();
}

/// Starts the daemon with sockets as descriptors 3 and up, as a service manager does.
fn start_with(setup: &Setup, listeners: &[&UnixListener]) -> Running {
    let descriptors: Vec<RawFd> = listeners.iter().map(|listener| listener.as_raw_fd()).collect();
    // The shell, since LISTEN_PID must be the number of the process that it becomes.
    let mut command = Command::new("sh");
    command.args(["-c", "LISTEN_PID=$$ exec \"$@\"", "sh"]);
    let daemon = setup.command();
    command.arg(daemon.get_program()).args(daemon.get_args()).env("NO_COLOR", "1");
    command.env("LISTEN_FDS", descriptors.len().to_string()).env_remove("NOTIFY_SOCKET");
    let log = fs::OpenOptions::new().create(true).append(true).open(setup.path("log")).expect("a log");
    command.stdin(Stdio::null()).stdout(log.try_clone().expect("shared")).stderr(log);
    // SAFETY: only fcntl and dup2 are called, which are async-signal-safe, on descriptors of ours; the
    // copies are made far above the targets first, so none overwrites one that is still to be copied.
    unsafe {
        command.pre_exec(move || {
            let high: Vec<RawFd> =
                descriptors.iter().map(|&fd| libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 100)).collect();
            for (target, &fd) in (3..).zip(&high) {
                if libc::dup2(fd, target) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    Running(command.spawn().expect("the shell runs"))
}

#[test]
fn sockets_of_the_manager_are_served_kept_and_served_again() {
    let setup = Setup::new("");
    let disk = UnixListener::bind(setup.path("vm1.sock")).expect("a socket");
    let control = UnixListener::bind(setup.path("control.sock")).expect("a socket");
    let unused = UnixListener::bind(setup.path("nobody.sock")).expect("a socket");
    // A VMM that comes before the daemon waits, instead of failing.
    let path = setup.path("vm1.sock");
    let early = std::thread::spawn(move || {
        let client = Client::connect(&path, ClientOptions::default());
        let mut traffic = Traffic::new(client, Rng::seed_from_env("PCACHE_SEED"), Mix::default());
        traffic.run(300);
        traffic.quiesce();
        traffic
    });
    let daemon = start_with(&setup, &[&control, &disk, &unused]);
    let mut traffic = early.join().unwrap_or_else(|_| panic!("{}", setup.log()));
    let (done, said) = setup.verb(&["status", "vm1"]);
    assert!(done && said.contains("connected"), "{said}");
    assert!(setup.log().contains("nobody.sock was passed by the service manager"), "{}", setup.log());
    daemon.stop();
    for name in ["vm1.sock", "control.sock", "nobody.sock"] {
        assert!(setup.path(name).exists(), "{name} is the manager's, and stays");
    }
    assert!(!setup.path("vm1.sock.lock").exists());

    let daemon = start_with(&setup, &[&disk, &control]);
    traffic.client.reconnect();
    traffic.verify(0..traffic.model.sectors());
    drop(traffic);
    // Detached, its socket is still the manager's; attached again, it is served there.
    let detach = |wait: &[&str]| setup.verb(&[&["detach", "vm1"], wait].concat());
    let (done, said) = detach(&["--drain", "--force"]);
    assert!(done, "{said}");
    assert!(setup.path("vm1.sock").exists());
    let (socket, backing) = (setup.path("vm1.sock"), setup.path("vm1.img"));
    let [socket, backing] = [&socket, &backing].map(|path| path.to_str().expect("text"));
    let (done, said) = setup.verb(&["attach", "--name", "vm1", "--socket", socket, "--backing", backing]);
    assert!(done, "{said}");
    Client::connect(socket.as_ref(), ClientOptions::default());
    daemon.stop();
}

#[test]
fn systemd_socket_activate_starts_it_with_the_first_vmm() {
    let program = "systemd-socket-activate";
    if Command::new(program).arg("--version").output().is_err() {
        eprintln!("SKIPPED: {program} is missing (apt-get install systemd)");
        return;
    }
    let setup = Setup::new("");
    let daemon = setup.command();
    let mut command = Command::new(program);
    command.arg("-l").arg(setup.path("vm1.sock")).arg(daemon.get_program()).args(daemon.get_args());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _running = Running(command.spawn().expect("it runs"));
    let begun = Instant::now();
    while !setup.path("vm1.sock").exists() {
        assert!(begun.elapsed() < PATIENCE, "it does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    let client = Client::connect(&setup.path("vm1.sock"), ClientOptions::default());
    let mut traffic = Traffic::new(client, Rng::seed_from_env("PCACHE_SEED"), Mix::default());
    traffic.run(200);
    traffic.quiesce();
    traffic.verify(0..traffic.model.sectors());
}

/// The lines `key:` of every thread of a process.
fn of_threads(pid: u32, key: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it lives");
    let status = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok());
    let value = |text: String| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.map(|value| value.trim().to_owned()).expect("the kernel tells")
    };
    status.map(value).collect()
}

#[test]
fn every_thread_is_confined_also_those_that_come_later() {
    for (more, mode) in [("", "2"), ("sandbox = \"off\"\n", "0")] {
        let setup = Setup::new(more);
        let daemon = Running(setup.command().spawn().expect("our binary runs"));
        setup.wait_for("control.sock");
        // The status says so once it has been told READY; the last step before is the filter.
        let begun = Instant::now();
        while !setup.log().contains("vm1")
            || of_threads(daemon.0.id(), "Seccomp").iter().any(|now| now != mode)
        {
            assert!(
                begun.elapsed() < PATIENCE,
                "{:?}\n{}",
                of_threads(daemon.0.id(), "Seccomp"),
                setup.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        let client =
            Client::connect(&setup.path("vm1.sock"), ClientOptions { queues: 2, ..Default::default() });
        let mut traffic = Traffic::new(client, Rng::seed_from_env("PCACHE_SEED"), Mix::default());
        traffic.run(200);
        traffic.quiesce();
        let (filters, rights) =
            (of_threads(daemon.0.id(), "Seccomp"), of_threads(daemon.0.id(), "NoNewPrivs"));
        assert!(filters.len() > 5 && filters.iter().all(|now| now == mode), "{filters:?}");
        let expected = if mode == "2" { "1" } else { "0" };
        assert!(rights.iter().all(|now| now == expected), "{rights:?}");
        traffic.verify(0..traffic.model.sectors());
        daemon.stop();
    }
}

/// Whether this kernel has Landlock; without it the claims about files are skipped aloud.
fn has_landlock() -> bool {
    // SAFETY: with a null pointer and this flag the call only tells a version.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0, 1) };
    if version < 1 {
        eprintln!("SKIPPED: this kernel has no Landlock, so what it refuses cannot be seen");
    }
    version >= 1
}

#[test]
fn a_volume_is_attached_online_from_where_data_lies_and_in_strict_from_where_it_was_said() {
    let elsewhere = tempfile::tempdir().expect("a directory");
    let elsewhere_too = tempfile::tempdir().expect("a directory");
    let strict = format!("sandbox = \"strict\"\nsandbox_paths = [\"{}\"]\n", elsewhere.path().display());
    let has_landlock = has_landlock();
    for more in ["", strict.as_str()] {
        if !more.is_empty() && !has_landlock {
            continue;
        }
        let setup = Setup::new(more);
        let daemon = Running(setup.command().spawn().expect("our binary runs"));
        setup.wait_for("control.sock");
        let attach = |name: &str, dir: &Path| {
            let at = |end: &str| dir.join(format!("{name}.{end}")).to_str().expect("text").to_owned();
            let (socket, backing) = (at("sock"), at("img"));
            let words = ["attach", "--name", name, "--socket", &socket, "--backing", &backing];
            setup.verb(&[&words[..], &["--backing-size", "16MiB"]].concat())
        };
        let (done, said) = attach("vm2", elsewhere.path());
        assert!(done, "{said}\n{}", setup.log());
        Client::connect(&elsewhere.path().join("vm2.sock"), ClientOptions::default());
        let (done, said) = attach("vm3", elsewhere_too.path());
        assert_eq!(done, more.is_empty(), "{said}");
        assert!(more.is_empty() || said.contains("ermission denied"), "{said}");
        let (done, said) = setup.verb(&["detach", "vm2", "--discard-dirty", "--force"]);
        assert!(done, "{said}");
        daemon.stop();
        for dir in [&elsewhere, &elsewhere_too] {
            for entry in fs::read_dir(dir.path()).expect("it is there") {
                fs::remove_file(entry.expect("an entry").path()).expect("it can be removed");
            }
        }
    }
}

/// What a process that was taken over would try, and how that must end.
const TRIED: [(&str, &str); 9] = [
    ("open a disk", "0"),
    ("make a thread", "0"),
    ("run a program", "SIGSYS"),
    ("look into another process", "SIGSYS"),
    ("become another user", "SIGSYS"),
    ("mount", "SIGSYS"),
    ("call what no server calls", "ENOSYS"),
    ("write a file of the system", "EACCES"),
    ("make a device", "SIGSYS"),
];

#[test]
fn what_a_process_that_was_taken_over_would_try_is_refused() {
    let has_landlock = has_landlock();
    for (what, end) in TRIED {
        if end == "EACCES" && !has_landlock {
            continue;
        }
        let child = Command::new(std::env::current_exe().expect("its own name"))
            .args([
                "--ignored",
                "--exact",
                "a_process_that_was_taken_over",
                "--nocapture",
                "--test-threads=1",
            ])
            .env("PCACHE_TEST_TRY", what)
            .output()
            .expect("it runs");
        let said = String::from_utf8_lossy(&child.stdout).into_owned();
        match end {
            "SIGSYS" => assert_eq!(child.status.signal(), Some(libc::SIGSYS), "{what}: {said}"),
            end => {
                let expected = format!("ended with {end}\n");
                assert!(said.contains(&expected), "{what}: {}\n{said}", child.status);
            }
        }
    }
}

#[test]
#[ignore = "what the test above watches, in a process of its own, which may be killed: cargo test --test service"]
fn a_process_that_was_taken_over() {
    let what = std::env::var("PCACHE_TEST_TRY").expect("what to try");
    let setup = Setup::new("");
    let path = setup.path("config.toml");
    let config = file::parse(&path, &setup.config(), &Consents::default()).expect("it is right");
    // The runner has threads already; it is this one that is confined, and that tries.
    if has_landlock() {
        sandbox::confine_paths(&config, Some(&path)).expect("this kernel has Landlock");
    }
    sandbox::confine_calls().expect("this kernel has seccomp");
    let error = || std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
    let text = |text: &str| CString::new(text).expect("no NUL");
    let name = text("/bin/true");
    // SAFETY: each call gets pointers to strings and arrays of ours that outlive it, or null where it may;
    // all are refused before they do anything.
    let number = unsafe {
        let nothing = [std::ptr::null::<libc::c_char>()];
        match what.as_str() {
            "open a disk" => {
                fs::File::options().write(true).open(setup.path("vm1.img")).map_or_else(|_| error(), |_| 0)
            }
            "make a thread" => std::thread::spawn(|| 0).join().expect("it ends"),
            "run a program" => {
                libc::execve(name.as_ptr(), nothing.as_ptr(), nothing.as_ptr());
                error()
            }
            "look into another process" => {
                libc::ptrace(libc::PTRACE_ATTACH, 1, 0, 0);
                error()
            }
            "become another user" => {
                libc::setuid(1);
                error()
            }
            "mount" => {
                libc::mount(name.as_ptr(), name.as_ptr(), name.as_ptr(), 0, std::ptr::null());
                error()
            }
            "call what no server calls" => {
                libc::syscall(libc::SYS_getpriority, 0, 0);
                error()
            }
            "write a file of the system" => {
                fs::File::create("/etc/pcache-test-intruder").map_or_else(|_| error(), |_| 0)
            }
            "make a device" => {
                let path = text(setup.path("device").to_str().expect("text"));
                libc::mknod(path.as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(1, 3));
                error()
            }
            other => panic!("nobody tries to {other}"),
        }
    };
    let end = match number {
        libc::ENOSYS => "ENOSYS".to_owned(),
        libc::EACCES => "EACCES".to_owned(),
        number => number.to_string(),
    };
    println!("ended with {end}");
}
