//! Cloud Hypervisor's command line for the bare guest.
//!
//! It exists so that the disk is attached exactly as `cloud-hypervisor/README.md` tells users to.
//!
//! Invariants: memory is shared, or the server sees none of it; no more queues than boot vCPUs, which
//! Cloud Hypervisor refuses.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// One virtual machine with one vhost-user disk.
#[derive(Debug)]
pub struct Machine<'a> {
    /// An ELF64 image with a PVH entry.
    pub kernel: &'a Path,
    /// The kernel's command line.
    pub append: &'a str,
    /// The server's listening socket.
    pub socket: &'a Path,
    /// Receives the serial port.
    pub console: &'a Path,
}

/// The program on PATH, where there is one and this process may use KVM.
///
/// # Errors
///
/// The sentence that says what is missing.
pub fn program() -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&path).map(|entry| entry.join("cloud-hypervisor")).find(|file| file.is_file());
    let Some(program) = found else {
        return Err("cloud-hypervisor is not on PATH (no Debian package: take a release binary)".to_owned());
    };
    match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Ok(program),
        Err(error) => Err(format!("cloud-hypervisor needs /dev/kvm: {error}")),
    }
}

/// The command that starts a machine.
pub fn command(program: &Path, machine: &Machine) -> Command {
    let mut command = Command::new(program);
    command.arg("--kernel").arg(machine.kernel).args(["--cmdline", machine.append]);
    command.args(["--cpus", "boot=1", "--memory", "size=128M,shared=on", "--console", "off"]);
    command.arg("--serial").arg(joined("file=", machine.console, ""));
    let disk = joined("vhost_user=on,socket=", machine.socket, ",num_queues=1,queue_size=128");
    command.arg("--disk").arg(disk);
    command
}

fn joined(before: &str, path: &Path, after: &str) -> OsString {
    let mut text = OsString::from(before);
    text.push(path);
    text.push(after);
    text
}
