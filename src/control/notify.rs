//! What the service manager is told (`sd_notify(3)`): datagrams to the socket in `NOTIFY_SOCKET`.
//!
//! `READY=1` once sockets answer, `RELOADING=1` and `READY=1` around a reload, `STOPPING=1` at the
//! stop, `STATUS=` a line that `systemctl status` shows, `WATCHDOG=1` while all is well here, and
//! `MAINPID=` where another process goes on (`handover`).
//!
//! Laws:
//! - Telling never waits and never fails the daemon: a manager that does not read loses a line.
//! - The watchdog vouches for this process alone: the main thread runs, and no lock that a look at
//!   the volumes takes is held for ever. A disk that hangs is no reason to be killed: a start would
//!   hang on it just the same, and until then the other volumes serve.
//! - Without `NOTIFY_SOCKET` nothing is sent and nothing wakes up.
//! - After a hand-over the manager is the predecessor's, whatever the successor's environment says: an
//!   operator's shell has none, and the watchdog of the service goes on counting.
//!
//! Written here, since the protocol is a datagram and its stability is promised (systemd's "Portability
//! and Stability Promise"); `libsystemd` would be a library to link for `sendto`.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::daemon::Daemon;
use super::sys;
use crate::cache::VolumeState;

/// Between two lines of `STATUS=` where there is no watchdog to be fed more often.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);

/// A way to the service manager; of no effect where there is none.
pub struct Notifier {
    manager: Option<(UnixDatagram, SocketAddr)>,
    /// What a successor is told of it.
    address: Option<Manager>,
    watchdog: Option<Duration>,
    /// The last line told, so that the journal of the manager is not filled with one and the same.
    told: String,
}

/// A service manager, as one daemon tells another of it.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Manager {
    /// As in `NOTIFY_SOCKET`.
    pub socket: String,
    /// As in `WATCHDOG_USEC`; 0 for no watchdog.
    pub watchdog_us: u64,
}

/// Where it is and what it asks, as the environment has it.
#[derive(Clone, Debug, Default)]
pub struct Wishes<'a> {
    /// `NOTIFY_SOCKET`: an absolute path, or `@` and an abstract name.
    pub socket: Option<&'a OsStr>,
    /// `WATCHDOG_USEC`.
    pub watchdog_us: Option<&'a OsStr>,
    /// `WATCHDOG_PID`: whose watchdog it is.
    pub watchdog_pid: Option<&'a OsStr>,
}

impl Notifier {
    /// The manager that started this process, if one did and wants to be told.
    pub fn from_env() -> Self {
        let variable = |name| std::env::var_os(name);
        let (socket, watchdog_us, watchdog_pid) =
            (variable("NOTIFY_SOCKET"), variable("WATCHDOG_USEC"), variable("WATCHDOG_PID"));
        Self::new(&Wishes {
            socket: socket.as_deref(),
            watchdog_us: watchdog_us.as_deref(),
            watchdog_pid: watchdog_pid.as_deref(),
        })
    }

    /// The manager at an address. What cannot be reached is told nothing, and the log says why.
    pub fn new(wishes: &Wishes<'_>) -> Self {
        let manager = wishes.socket.and_then(|name| match open(name) {
            Ok(manager) => Some(manager),
            Err(error) => {
                tracing::warn!("the service manager at {} cannot be told: {error}", name.display());
                None
            }
        });
        let number = |text: Option<&OsStr>| text.and_then(OsStr::to_str).and_then(|text| text.parse().ok());
        let is_ours = number(wishes.watchdog_pid).is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog_us = number(wishes.watchdog_us).filter(|_| is_ours).unwrap_or(0);
        let name = wishes.socket.and_then(OsStr::to_str).filter(|_| manager.is_some());
        let address = name.map(|name| Manager { socket: name.into(), watchdog_us });
        let watchdog = (watchdog_us > 0 && manager.is_some()).then(|| Duration::from_micros(watchdog_us));
        Self { manager, address, watchdog, told: String::new() }
    }

    /// The manager that another daemon has told of.
    pub fn at(manager: &Manager) -> Self {
        let watchdog_us = manager.watchdog_us.to_string();
        Self::new(&Wishes {
            socket: Some(OsStr::new(&manager.socket)),
            watchdog_us: Some(OsStr::new(&watchdog_us)),
            watchdog_pid: None,
        })
    }

    /// What another daemon has to know to tell the same manager.
    pub fn manager(&self) -> Option<&Manager> {
        self.address.as_ref()
    }

    /// How long the main thread may sleep before [`Notifier::alive`] is due.
    pub fn interval(&self) -> Option<Duration> {
        self.manager.as_ref()?;
        // Half of it, as `sd_watchdog_enabled(3)` recommends.
        Some(self.watchdog.map_or(STATUS_INTERVAL, |time| time / 2).min(STATUS_INTERVAL))
    }

    /// Says that front ends can come.
    pub fn ready(&mut self, daemon: &Daemon) {
        let status = status(daemon);
        self.send(&format!("READY=1\nSTATUS={status}"));
        self.told = status;
    }

    /// Says that the configuration is being read again; [`Notifier::ready`] ends that.
    pub fn reloading(&mut self) {
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", sys::monotonic_us()));
    }

    /// Says that another process is the service from now on.
    pub fn succeeded_by(&self, process: u32) {
        self.send(&format!("MAINPID={process}"));
    }

    /// Says that this is the end.
    pub fn stopping(&mut self) {
        self.send("STOPPING=1\nSTATUS=Stopping; dirty data stays in the cache");
    }

    /// Feeds the watchdog, and tells the status where it has changed.
    pub fn alive(&mut self, daemon: &Daemon) {
        if self.manager.is_none() {
            return;
        }
        // Taken before the watchdog is fed: a look that never returns is what it is there for.
        let status = status(daemon);
        if status != self.told {
            self.send(&format!("STATUS={status}"));
            self.told = status;
        }
        if self.watchdog.is_some() {
            self.send("WATCHDOG=1");
        }
    }

    fn send(&self, text: &str) {
        let Some((socket, manager)) = &self.manager else { return };
        if let Err(error) = socket.send_to_addr(text.as_bytes(), manager) {
            tracing::debug!("the service manager was not told `{}`: {error}", text.escape_debug());
        }
    }
}

fn open(name: &OsStr) -> io::Result<(UnixDatagram, SocketAddr)> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None if name.as_bytes().starts_with(b"/") => SocketAddr::from_pathname(name)?,
        None => return Err(io::Error::new(io::ErrorKind::InvalidInput, "NOTIFY_SOCKET is no address")),
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok((socket, address))
}

/// The daemon in a line.
fn status(daemon: &Daemon) -> String {
    let served = daemon.served();
    let ill: Vec<String> = served
        .iter()
        .map(|served| (served, served.volume.health()))
        .filter(|(_, health)| health.state != VolumeState::Ok)
        .map(|(served, health)| format!("{} is {}", served.config.name, health.state))
        .collect();
    summary(served.len(), daemon.caches().len(), &ill)
}

fn summary(volumes: usize, caches: usize, ill: &[String]) -> String {
    let count = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let serving = format!("Serving {} on {}", count(volumes, "volume"), count(caches, "cache"));
    match ill {
        [] => serving,
        ill => format!("{serving}; {}", ill.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(socket: &OsStr, watchdog_us: &str, pid: &str) -> Notifier {
        let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let (watchdog_us, pid) = (text(watchdog_us), text(pid));
        Notifier::new(&Wishes {
            socket: Some(socket),
            watchdog_us: watchdog_us.as_deref().map(OsStr::new),
            watchdog_pid: pid.as_deref().map(OsStr::new),
        })
    }

    #[test]
    fn a_manager_is_reached_by_path_and_by_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let by_path = UnixDatagram::bind(&path).unwrap();
        let name = format!("pcache-notify-{}", std::process::id());
        let by_name =
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name.as_bytes()).unwrap()).unwrap();
        for (manager, address) in [(by_path, path.into_os_string()), (by_name, format!("@{name}").into())] {
            at(&address, "", "").stopping();
            let mut text = [0; 200];
            let len = manager.recv(&mut text).unwrap();
            assert!(text[..len].starts_with(b"STOPPING=1\n"), "{}", String::from_utf8_lossy(&text[..len]));
        }
    }

    #[test]
    fn a_manager_that_is_not_there_or_does_not_read_holds_nothing_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        at(path.as_os_str(), "", "").stopping();
        let deaf = UnixDatagram::bind(&path).unwrap();
        let mut notifier = at(path.as_os_str(), "", "");
        // More than any socket buffer holds: it would hang here.
        for _ in 0..100_000 {
            notifier.stopping();
        }
        drop(deaf);
        let nowhere = Notifier::new(&Wishes::default());
        assert_eq!(nowhere.interval(), None);
        assert_eq!(at(OsStr::new("relative"), "", "").interval(), None);
    }

    #[test]
    fn the_watchdog_is_fed_twice_in_its_time_and_only_by_whom_it_watches() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let _manager = UnixDatagram::bind(&path).unwrap();
        let own = std::process::id().to_string();
        for (watchdog_us, pid, interval) in [
            ("3000000", "", Duration::from_millis(1500)),
            ("3000000", own.as_str(), Duration::from_millis(1500)),
            ("3000000", "1", STATUS_INTERVAL),
            ("60000000", "", STATUS_INTERVAL),
            ("0", "", STATUS_INTERVAL),
            ("x", "", STATUS_INTERVAL),
        ] {
            let notifier = at(path.as_os_str(), watchdog_us, pid);
            assert_eq!(notifier.interval(), Some(interval), "{watchdog_us} {pid}");
        }
    }

    #[test]
    fn the_line_counts_and_names_who_is_ill() {
        assert_eq!(summary(1, 1, &[]), "Serving 1 volume on 1 cache");
        let ill = ["vm1 is degraded".to_owned(), "vm2 is failed".to_owned()];
        assert_eq!(summary(3, 2, &ill), "Serving 3 volumes on 2 caches; vm1 is degraded, vm2 is failed");
    }
}
