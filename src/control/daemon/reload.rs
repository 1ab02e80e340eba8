//! The configuration file is read again, and what differs from what runs is done, begun, or said.
//!
//! Nothing that a VM uses is taken away by an edit of a file: a volume that is no longer in it goes
//! on, and the answer says how to detach it. A file with a mistake changes nothing at all.

use std::path::PathBuf;
use std::sync::Arc;

use super::super::announce::word;
use super::super::api::model::{Job, ReloadReport};
use super::super::config::{Config, Consents, Endpoint, Order, VolumeConfig};
use super::super::file;
use super::super::run::RunError;
use super::super::share::ShareConfig;
use super::set::{Change, Limits};
use super::{Daemon, DaemonError, Served};
use crate::cache::{self, Volume};
use crate::tools::Host;
use crate::units::Bytes;

impl ReloadReport {
    /// One line each, for a log.
    pub fn lines(&self) -> Vec<String> {
        let of = |what: &'static str, lines: &[String]| {
            lines.iter().map(move |line| format!("reload: {what}: {line}")).collect::<Vec<_>>()
        };
        let mut lines = of("changed", &self.changed);
        lines.extend(of("pending", &self.pending));
        lines.extend(of("failed", &self.failed));
        if lines.is_empty() {
            lines.push("reload: nothing has changed".into());
        }
        lines
    }
}

impl Daemon {
    /// Reads the configuration file again.
    ///
    /// # Errors
    /// There is none, or it is wrong; nothing is changed.
    pub fn reload(self: &Arc<Self>) -> Result<ReloadReport, DaemonError> {
        let path = self.config_file.as_ref().ok_or(DaemonError::NoFile)?;
        let config = file::load(path, &Consents::default()).map_err(RunError::from)?;
        let mut report = ReloadReport::default();
        self.compare_caches(&config, &mut report);
        for wanted in config.volumes() {
            let cache = &config.caches()[wanted.cache].name;
            let Some(at) = self.caches.iter().position(|open| open.config.name == *cache) else {
                let line = format!("volume {}: its cache {cache} is there after a restart", wanted.name);
                report.pending.push(line);
                continue;
            };
            let wanted = VolumeConfig { cache: at, ..wanted.clone() };
            match self.find(wanted.name.as_str()) {
                Ok(served) => self.compare_volume(&served, &wanted, &mut report),
                Err(DaemonError::Changing(_)) => {
                    report.failed.push(DaemonError::Changing(wanted.name.to_string()).to_string());
                }
                Err(_) => {
                    let name = wanted.name.clone();
                    match self.start_attach(wanted) {
                        Ok(job) => {
                            report.changed.push(format!("volume {name} is being attached, job {}", job.id))
                        }
                        Err(error) => report.failed.push(format!("volume {name}: {error}")),
                    }
                }
            }
        }
        for served in self.served() {
            let name = &served.config.name;
            if !config.volumes().iter().any(|volume| volume.name == *name) {
                let line = format!("volume {name} is not in the file: it is served until `detach {name}`");
                report.pending.push(line);
            }
        }
        Ok(report)
    }

    fn compare_caches(&self, config: &Config, report: &mut ReloadReport) {
        for wanted in config.caches() {
            match self.caches.iter().find(|open| open.config.name == wanted.name) {
                Some(open) if open.config == *wanted => {}
                Some(_) => {
                    report.pending.push(format!("cache {} is as described after a restart", wanted.name));
                }
                None => report.pending.push(format!("cache {} is there after a restart", wanted.name)),
            }
        }
        for open in &self.caches {
            let name = &open.config.name;
            if !config.caches().iter().any(|cache| cache.name == *name) {
                report.pending.push(format!("cache {name} is not in the file: it is open until a restart"));
            }
        }
        if let Some(control) = config.control()
            && self.control.as_ref() != Some(control)
        {
            report.pending.push("[control] is as described after a restart".into());
        }
        if !self.confinement.is_told && *config.confinement() != self.confinement {
            report.pending.push("`sandbox` and `sandbox_paths` are as described after a restart".into());
        }
    }

    fn compare_volume(self: &Arc<Self>, served: &Served, wanted: &VolumeConfig, report: &mut ReloadReport) {
        let name = &served.config.name;
        let mut differing = differences(&served.config, wanted);
        let mut wanted = wanted.clone();
        let order = (word(wanted.order), served.volume.order().name());
        if order.0 != order.1 && served.may_change_order(wanted.order).is_err() {
            differing.push(format!("order {} becomes {}", order.1, order.0));
            wanted.order = current_order(&served.volume);
        }
        if !differing.is_empty() {
            let what = differing.join(", ");
            report.pending.push(format!("volume {name}: {what} when it is attached again"));
        }
        let (change, said) = changes(&served.volume, &wanted);
        if said.is_empty() {
            return;
        }
        let what = said.join(", ");
        match self.start_set(name.as_str(), change) {
            Ok(job) => report.changed.push(format!("volume {name}: {what}, job {}", job.id)),
            Err(error) => report.failed.push(format!("volume {name}: {what}: {error}")),
        }
    }

    /// Begins to attach a volume.
    ///
    /// # Errors
    /// It cannot be.
    pub fn start_attach(self: &Arc<Self>, config: VolumeConfig) -> Result<Job, DaemonError> {
        self.would_attach(&config)?;
        let (own, name) = (Arc::clone(self), config.name.to_string());
        self.jobs.start("attach", &name, move |_| {
            own.attach(config).map(|()| None).map_err(|error| error.to_string())
        })
    }
}

fn current_order(volume: &Volume<Host>) -> Order {
    match volume.order() {
        cache::Order::Strict => Order::Strict,
        cache::Order::Grouped => Order::Grouped,
        cache::Order::Relaxed => Order::Relaxed,
    }
}

/// What can change while the volume is used, where it differs from how the volume is now: by its
/// configuration, or by what was set since.
fn changes(volume: &Volume<Host>, wanted: &VolumeConfig) -> (Change, Vec<String>) {
    let limits = Limits::of(volume);
    let (share, shares_said) = ShareConfig::of(volume).differences(&wanted.share);
    let mut said = Vec::new();
    let mut differs = |key: &str, now: String, then: String| {
        let differs = now != then;
        if differs {
            said.push(format!("{key} {now} becomes {then}"));
        }
        differs
    };
    let seconds = |given: u64| given.to_string();
    let change = Change {
        mode: differs("mode", volume.mode().name().into(), word(wanted.mode)).then_some(wanted.mode),
        order: differs("order", volume.order().name().into(), word(wanted.order)).then_some(wanted.order),
        max_lag_s: differs("max_lag_s", seconds(limits.max_lag_s), seconds(wanted.max_lag_s.into()))
            .then_some(wanted.max_lag_s),
        max_dirty: differs(
            "max_dirty",
            Bytes(limits.max_dirty_bytes).to_string(),
            Bytes(wanted.max_dirty).to_string(),
        )
        .then_some(wanted.max_dirty),
        on_backing_error: differs(
            "on_backing_error",
            word(limits.on_backing_error),
            word(wanted.on_backing_error),
        )
        .then_some(wanted.on_backing_error),
        backing_timeout_s: differs(
            "backing_timeout_s",
            seconds(limits.backing_timeout_s),
            seconds(wanted.backing_timeout_s.into()),
        )
        .then_some(wanted.backing_timeout_s),
        share,
    };
    said.extend(shares_said);
    (change, said)
}

/// What of a volume's configuration differs and waits for its next attach, and what it becomes.
fn differences(now: &VolumeConfig, wanted: &VolumeConfig) -> Vec<String> {
    let size = |size: Option<u32>| size.map_or("the disk's".into(), |size| size.to_string());
    let bytes = |size: Option<u64>| size.map_or("the default".into(), |size| Bytes(size).to_string());
    let path = |path: &Option<PathBuf>| {
        path.as_ref().map_or("the default".into(), |path| path.display().to_string())
    };
    let sidecar = |wanted: Option<bool>| wanted.map_or("as it is".into(), |wanted| wanted.to_string());
    let endpoint = |endpoint: &Endpoint| match endpoint {
        Endpoint::Socket { path, mode, group } => {
            format!("{path} {mode:04o} {}", group.as_deref().unwrap_or_default())
        }
        Endpoint::Inherited(fd) => format!("descriptor {fd}"),
    };
    let group =
        |config: &VolumeConfig| config.group.as_ref().map_or("none".into(), |name| name.as_str().to_owned());
    let rows = [
        ("cache", now.cache.to_string(), wanted.cache.to_string()),
        ("socket", endpoint(&now.endpoint), endpoint(&wanted.endpoint)),
        ("backing", now.backing.path.display().to_string(), wanted.backing.path.display().to_string()),
        ("queues", now.queues.to_string(), wanted.queues.to_string()),
        ("queue_size", now.queue_size.to_string(), wanted.queue_size.to_string()),
        ("group", group(now), group(wanted)),
        ("redo", path(&now.redo), path(&wanted.redo)),
        ("redo_size", bytes(now.redo_size), bytes(wanted.redo_size)),
        ("data_crc", now.data_crc.to_string(), wanted.data_crc.to_string()),
        ("block_size", size(now.block_size), size(wanted.block_size)),
        ("read_only", now.read_only.to_string(), wanted.read_only.to_string()),
        ("serial", now.serial.as_str().to_owned(), wanted.serial.as_str().to_owned()),
        ("discard", word(now.discard), word(wanted.discard)),
        ("admission", word(now.admission), word(wanted.admission)),
        ("sequential_cutoff", bytes(Some(now.sequential_cutoff)), bytes(Some(wanted.sequential_cutoff))),
        ("sidecar", sidecar(now.sidecar), sidecar(wanted.sidecar)),
    ];
    let threads = now.threads.rows().into_iter().zip(wanted.threads.rows());
    let threads = threads.map(|((key, now), (_, wanted))| (key, now, wanted));
    let differing = rows.into_iter().chain(threads).filter(|(_, now, wanted)| now != wanted);
    differing.map(|(key, now, wanted)| format!("{key} {now} becomes {wanted}")).collect()
}
