//! What the scenarios need of the host, found once per process.
//!
//! It exists so that a scenario only says what it boots: where kernel and archives lie, and which
//! accelerator works, is decided here.
//!
//! Invariants:
//! - a missing prerequisite skips a scenario aloud, naming the packages; with
//!   `PCACHE_REQUIRE_GUESTS` set it fails instead, so that CI cannot go green on nothing;
//! - hardware virtualization is used only after a kernel was seen to boot under it: `/dev/kvm` also
//!   exists on hosts where guests die or crawl.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use crate::guest::{Guest, GuestOptions};
use crate::qemu::Accelerator;

/// The prepared host.
#[derive(Debug, Clone)]
pub struct Host {
    /// The `qemu-system-x86_64` in use.
    pub qemu: PathBuf,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// Busybox, modules, file system tools.
    pub initramfs: PathBuf,
    /// fio and its many libraries, for the scenarios that want them.
    pub initramfs_fio: PathBuf,
    /// What was seen to work.
    pub accelerator: Accelerator,
}

/// How long a kernel gets to prove that it boots under KVM; it needs about one second where it does.
const KVM_TRIAL: Duration = Duration::from_secs(15);

/// The prepared host, or `None` after saying on stderr why this scenario is skipped.
///
/// # Panics
///
/// When preparation fails for any reason but missing packages, and when anything is missing while
/// `PCACHE_REQUIRE_GUESTS` is set.
pub fn host() -> Option<&'static Host> {
    static HOST: OnceLock<Result<Host, String>> = OnceLock::new();
    match HOST.get_or_init(prepare) {
        Ok(host) => Some(host),
        Err(reason) => {
            skip(reason);
            None
        }
    }
}

/// Says that a scenario did not run for want of something Debian has, or fails where that is not
/// acceptable.
pub fn skip(reason: &str) {
    assert!(
        std::env::var_os("PCACHE_REQUIRE_GUESTS").is_none(),
        "PCACHE_REQUIRE_GUESTS is set, and: {reason}"
    );
    inapplicable(reason);
}

/// Says that a scenario did not run where nothing is wrong with that: no package brings what it needs,
/// or the server chosen does not promise what it claims.
pub fn inapplicable(reason: &str) {
    let name = std::thread::current().name().unwrap_or("scenario").to_owned();
    eprintln!("SKIPPED {name}: {reason}");
}

fn prepare() -> Result<Host, String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("integration/prepare.sh");
    let output = Command::new("bash")
        .arg(&script)
        .arg(directory())
        .output()
        .map_err(|error| format!("bash does not start: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.code() == Some(77) {
        return Err(said);
    }
    assert!(output.status.success(), "{} failed: {}\n{said}", script.display(), output.status);
    let values: HashMap<String, PathBuf> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), PathBuf::from(value)))
        .collect();
    let value = |key: &str| match values.get(key) {
        Some(path) => path.clone(),
        None => panic!("{} printed no {key}", script.display()),
    };
    let mut host = Host {
        qemu: value("QEMU"),
        kernel: value("KERNEL"),
        initramfs: value("INITRAMFS"),
        initramfs_fio: value("INITRAMFS_FIO"),
        accelerator: Accelerator::Tcg,
    };
    host.accelerator = choose_accelerator(&host);
    Ok(host)
}

/// Where kernel and archives are kept between runs.
pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("guest")
}

fn choose_accelerator(host: &Host) -> Accelerator {
    match std::env::var("PCACHE_GUEST_ACCEL").as_deref() {
        Ok("kvm") => return Accelerator::Kvm,
        Ok("tcg") => return Accelerator::Tcg,
        Ok(other) => panic!("PCACHE_GUEST_ACCEL is {other:?}; it may be kvm or tcg"),
        Err(_) => {}
    }
    if !Path::new("/dev/kvm").exists() {
        return Accelerator::Tcg;
    }
    // The answer depends on the host's kernel and on QEMU, so it is kept under their names.
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let kept = directory().join(format!("accelerator-{}", release.trim()));
    match fs::read_to_string(&kept).as_deref() {
        Ok("kvm") => return Accelerator::Kvm,
        Ok("tcg") => return Accelerator::Tcg,
        _ => {}
    }
    let (accelerator, word) =
        if boots_under_kvm(host) { (Accelerator::Kvm, "kvm") } else { (Accelerator::Tcg, "tcg") };
    if let Err(error) = fs::write(&kept, word) {
        eprintln!("the accelerator found will be looked for again: {}: {error}", kept.display());
    }
    accelerator
}

fn boots_under_kvm(host: &Host) -> bool {
    let host = Host { accelerator: Accelerator::Kvm, ..host.clone() };
    let options = GuestOptions::new("true\n").timeout(KVM_TRIAL);
    Guest::boot(&host, options).try_finish().is_ok_and(|report| report.status == 0)
}
