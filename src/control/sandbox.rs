//! What the process gives up before it serves: a guest, a VMM or a client of the API that takes it over
//! finds neither programs to run nor a system to change.
//!
//! ```text
//!   start ── confine_paths ── opens caches, disks, sockets; starts threads ── confine_calls ── serves
//!            Landlock: this thread,                                            seccomp: every thread
//!            hence every later one
//! ```
//!
//! Laws:
//! - Landlock comes before there is a second thread, since a thread restricts itself and those it starts.
//!   Seccomp comes once everything works, and binds all threads at once (TSYNC).
//! - **Nothing is executed**, by anybody: no path may be, and the calls that would are deadly.
//! - **Files**: what the configuration names, by directory, since disks, sidecars, redo areas and sockets
//!   come and go in them. `auto` adds every directory at the root that holds data rather than the system, so
//!   that a volume can be attached online wherever disks usually lie; `strict` adds those in
//!   `sandbox_paths` and nothing else. Read-only: what the C library looks groups up in, and what the
//!   kernel tells about devices.
//! - **Calls**: those of a server of files and sockets. A call that a server never makes and an intruder
//!   wants ([`DEADLY`]) ends the process: that loses nothing, since a kill is safe at any instruction and
//!   the service manager starts it again, while an error would leave the intruder to try the next. Any
//!   other call fails with `ENOSYS`, for which a newer C library has its older ways: a daemon that
//!   holds the disks of all VMs is not to die of an update of that.
//! - Where the kernel has no Landlock or seccomp, `auto` says so and goes on; `strict` refuses to start.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, RestrictionStatus, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use super::calls::{ALLOWED, DEADLY};
use super::config::{Config, Endpoint, Sandbox};
use super::run::RunError;
use crate::pmem;

/// The newest Landlock whose rights are asked for; older kernels give what they have.
const LANDLOCK: ABI = ABI::V5;
/// Where the system is: never written by a server of disks.
const SYSTEM: [&str; 11] =
    ["bin", "boot", "etc", "home", "lib", "lib32", "lib64", "libx32", "root", "sbin", "usr"];
/// What is read and never written: groups and how to look them up, and what devices are.
const READ: [&str; 5] = ["/etc", "/usr", "/lib", "/proc", "/sys"];
/// The kernel's own: devices are used, its other trees only read.
const KERNEL: [&str; 2] = ["proc", "sys"];

/// Why the process is not confined.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Landlock.
    #[error("Landlock: {0}")]
    Paths(#[from] RulesetError),
    /// The kernel has it not, or not on.
    #[error("this kernel has no Landlock (CONFIG_SECURITY_LANDLOCK, and `landlock` among lsm=)")]
    NoLandlock,
    /// Seccomp.
    #[error("seccomp: {0}")]
    Calls(#[from] seccompiler::Error),
    /// The filter of this architecture.
    #[error("seccomp: {0}")]
    Filter(#[from] seccompiler::BackendError),
}

/// What the process gives up before there is a second thread: most of the file system.
pub(super) fn keep_to_paths(config: &Config, file: Option<&Path>) -> Result<(), RunError> {
    let how = config.confinement().sandbox;
    if how == Sandbox::Off {
        return Ok(());
    }
    config.caches().iter().flat_map(|cache| cache.path.all()).for_each(|path| pmem::notice_holder(path));
    match confine_paths(config, file) {
        Ok(what) => tracing::debug!("sandbox: {what}"),
        Err(error) if how == Sandbox::Strict => return Err(error.into()),
        Err(error) => tracing::warn!("sandbox: files are not restricted: {error}"),
    }
    Ok(())
}

/// What it gives up once everything works: most system calls.
pub(super) fn keep_to_calls(config: &Config) -> Result<(), RunError> {
    let how = config.confinement().sandbox;
    if how == Sandbox::Off {
        return Ok(());
    }
    match confine_calls() {
        Ok(()) => tracing::debug!("sandbox: system calls by seccomp"),
        Err(error) if how == Sandbox::Strict => return Err(error.into()),
        Err(error) => tracing::warn!("sandbox: system calls are not restricted: {error}"),
    }
    Ok(())
}

/// Restricts which files this thread, and every thread it will start, may open. Call before there is
/// another. What was restricted, in words.
///
/// # Errors
/// The process is not confined; the caller decides what that means.
pub fn confine_paths(config: &Config, file: Option<&Path>) -> Result<String, SandboxError> {
    let all = AccessFs::from_all(LANDLOCK);
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = all & !AccessFs::Execute & !AccessFs::MakeChar & !AccessFs::MakeBlock;
    let mut rules =
        Ruleset::default().set_compatibility(CompatLevel::BestEffort).handle_access(all)?.create()?;
    for path in READ.iter().map(Path::new).chain(file.and_then(Path::parent)) {
        if let Ok(path) = PathFd::new(path) {
            rules = rules.add_rule(PathBeneath::new(path, read))?;
        }
    }
    for path in writable(config) {
        if let Ok(path) = PathFd::new(&path) {
            rules = rules.add_rule(PathBeneath::new(path, write))?;
        }
    }
    let RestrictionStatus { ruleset, .. } = rules.restrict_self()?;
    match ruleset {
        RulesetStatus::FullyEnforced => Ok("files by Landlock".into()),
        RulesetStatus::PartiallyEnforced => Ok("files by an older Landlock".into()),
        RulesetStatus::NotEnforced => Err(SandboxError::NoLandlock),
    }
}

/// Restricts which system calls every thread of the process may make, now and later.
///
/// # Errors
/// The process is not confined; the caller decides what that means.
pub fn confine_calls() -> Result<(), SandboxError> {
    // The calls that install a filter are not among those allowed: that one comes last.
    let [allowed, deadly] = filters()?;
    seccompiler::apply_filter_all_threads(&deadly)?;
    seccompiler::apply_filter_all_threads(&allowed)?;
    Ok(())
}

/// Of several filters the kernel obeys the most severe answer.
fn filters() -> Result<[BpfProgram; 2], SandboxError> {
    let filter = |calls: &[i64], others: SeccompAction, these: SeccompAction| {
        let rules: BTreeMap<i64, _> = calls.iter().map(|&call| (call, Vec::new())).collect();
        let filter = SeccompFilter::new(rules, others, these, std::env::consts::ARCH.try_into()?)?;
        BpfProgram::try_from(filter)
    };
    let refused = SeccompAction::Errno(libc::ENOSYS as u32);
    Ok([
        filter(ALLOWED, refused, SeccompAction::Allow)?,
        filter(DEADLY, SeccompAction::Allow, SeccompAction::KillProcess)?,
    ])
}

/// The directories in which files may be made, written and removed.
fn writable(config: &Config) -> BTreeSet<PathBuf> {
    let mut named: Vec<&Path> = Vec::new();
    named.extend(config.caches().iter().flat_map(|cache| cache.path.all()).map(PathBuf::as_path));
    for volume in config.volumes() {
        named.push(&volume.backing.path);
        named.extend(volume.redo.as_deref());
        if let Endpoint::Socket { path, .. } = &volume.endpoint {
            named.push(path.as_path());
        }
    }
    named.extend(config.control().map(|control| control.socket.as_path()));
    // A symbolic link is followed to where the file is: by way of /dev/vg to /dev.
    let seen = named.iter().flat_map(|path| [path.to_path_buf(), canonical(path)]);
    let mut found: BTreeSet<PathBuf> = seen.filter_map(|path| directory(path.parent()?)).collect();
    found.extend(config.state_dir().and_then(directory));
    found.extend(config.confinement().paths.iter().cloned());
    if config.confinement().sandbox == Sandbox::Auto {
        found.extend(roots(Path::new("/")));
    }
    found
}

fn canonical(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

/// The directory, or what there is of the way to it: what is missing is going to be made.
fn directory(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    path.ancestors().find(|path| path.is_dir()).map(Path::to_owned)
}

/// The directories at the root that hold data.
fn roots(root: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(root) else { return Vec::new() };
    let is_data = |name: &str| !SYSTEM.contains(&name) && !KERNEL.contains(&name);
    entries
        .filter_map(Result::ok)
        // A link leads elsewhere, and that is judged by its own name.
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter(|entry| entry.file_name().to_str().is_some_and(is_data))
        .map(|entry| entry.path())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_call_is_both_allowed_and_deadly_and_none_is_named_twice() {
        let all: BTreeSet<i64> = ALLOWED.iter().chain(DEADLY).copied().collect();
        assert_eq!(all.len(), ALLOWED.len() + DEADLY.len());
        assert!(DEADLY.contains(&libc::SYS_execve) && ALLOWED.contains(&libc::SYS_io_uring_enter));
        filters().unwrap();
    }

    #[test]
    fn the_system_is_no_place_for_data_and_everything_else_is() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["etc", "usr", "proc", "srv", "mnt", "dev", "var", "data"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        std::os::unix::fs::symlink("usr/bin", dir.path().join("link")).unwrap();
        let found = roots(dir.path());
        let mut names: Vec<_> =
            found.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
        names.sort_unstable();
        assert_eq!(names, ["data", "dev", "mnt", "srv", "var"]);
    }

    #[test]
    fn what_is_missing_is_made_in_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let there = dir.path().canonicalize().unwrap();
        assert_eq!(directory(&there.join("a/b/c")), Some(there.clone()));
        assert_eq!(directory(&there), Some(there));
    }
}
