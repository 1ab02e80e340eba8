//! QEMU's monitor (QMP): one JSON object a line, as far as migrations and hot-plugged memory need it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Bytes per second of a migration that is to end, and of one that is not.
pub const FAST: u64 = 8 << 30;
pub const SLOW: u64 = 8 << 20;

/// A connection.
pub struct Monitor {
    to: UnixStream,
    from: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects and ends the handshake.
    ///
    /// # Panics
    ///
    /// When nobody listens or answers.
    pub fn connect(path: &Path) -> Self {
        let to = UnixStream::connect(path).expect("connect to QEMU's monitor");
        to.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout can be set");
        let from = BufReader::new(to.try_clone().expect("a second handle of the monitor"));
        let mut monitor = Self { to, from };
        monitor.execute("qmp_capabilities", "{}");
        monitor
    }

    /// Executes a command and returns the line of its answer.
    ///
    /// # Panics
    ///
    /// When QEMU refuses it.
    pub fn execute(&mut self, command: &str, arguments: &str) -> String {
        writeln!(self.to, "{{\"execute\": \"{command}\", \"arguments\": {arguments}}}").expect("ask QEMU");
        loop {
            let mut line = String::new();
            let len = self.from.read_line(&mut line).expect("hear QEMU");
            assert!(len > 0, "QEMU hung up at {command}");
            assert!(!line.contains("\"error\""), "{command}: {line}");
            if line.contains("\"return\"") {
                return line;
            }
        }
    }

    /// Begins to move the machine's state into `file`, at so many bytes per second.
    pub fn start_migration(&mut self, file: &Path, rate: u64) {
        let limits = format!("{{\"max-bandwidth\": {rate}, \"downtime-limit\": 3000}}");
        self.execute("migrate-set-parameters", &limits);
        self.execute("migrate", &format!("{{\"uri\": \"file:{}\"}}", file.display()));
    }

    /// Waits until the migration is what it is to become.
    ///
    /// # Panics
    ///
    /// When it becomes something else, or does not before `deadline`.
    pub fn await_migration(&mut self, wanted: &str, deadline: Instant) {
        loop {
            let answer = self.execute("query-migrate", "{}");
            let is = |status: &str| answer.contains(&format!("\"status\": \"{status}\""));
            if is(wanted) {
                return;
            }
            let is_over = ["completed", "cancelled", "failed"].into_iter().any(is);
            assert!(!is_over && Instant::now() < deadline, "the migration is not {wanted}: {answer}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
