//! QEMU's command line for a test guest, in one place.
//!
//! It exists so that every scenario attaches disks exactly as the documentation tells users to
//! (`qemu/README.md` explains each option and what was found out about it).
//!
//! Invariants:
//! - guest memory is always a shared memfd, without which a vhost-user server sees none of it;
//! - nothing is inherited from the host's QEMU configuration, and there is no network;
//! - the guest never outlives a panic or a reboot: both end the process.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// Hardware virtualization.
    Kvm,
    /// QEMU's own translator: slow, but the same everywhere.
    Tcg,
}

/// How one disk of the guest is served.
#[derive(Debug, Clone)]
pub enum Disk {
    /// By a vhost-user-blk server.
    VhostUser {
        /// The server's listening socket.
        socket: PathBuf,
        /// Virtqueues to ask for.
        queues: u16,
        /// Try to connect again this often after the server went away; never when `None`.
        reconnect_ms: Option<u32>,
        /// Offer the guest packed rings.
        packed: bool,
    },
    /// By QEMU itself from a raw file, with nothing of ours in between.
    Raw {
        /// The image.
        path: PathBuf,
    },
}

/// An emulated NVDIMM whose contents are a file of the host.
#[derive(Debug, Clone)]
pub struct Nvdimm {
    /// The backing file; it must have exactly `size_mib`.
    pub path: PathBuf,
    /// A multiple of 128 MiB, or the guest kernel cannot map it with struct pages.
    pub size_mib: u32,
}

/// One virtual machine.
#[derive(Debug)]
pub struct Machine<'a> {
    /// The program.
    pub qemu: &'a Path,
    /// What executes it.
    pub accelerator: Accelerator,
    /// An ELF image with a PVH entry, or a bzImage.
    pub kernel: &'a Path,
    /// Absent for a bare guest.
    pub initramfs: Option<&'a Path>,
    /// Appended to the kernel command line.
    pub append: &'a str,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory.
    pub memory_mib: u32,
    /// Memory that can be plugged in later.
    pub spare_mib: u32,
    /// In the order in which the guest names them: vda, vdb, …
    pub disks: &'a [Disk],
    /// Persistent memory, pmem0.
    pub nvdimm: Option<&'a Nvdimm>,
    /// Receives the serial console.
    pub console: &'a Path,
    /// A socket that the caller already listens on; the guest's report port.
    pub report: Option<&'a Path>,
    /// Where QEMU listens for QMP, if it is to be told anything.
    pub monitor: Option<&'a Path>,
    /// The file with a guest's state to go on with, instead of a boot.
    pub incoming: Option<&'a Path>,
}

/// The command that starts a machine.
pub fn command(machine: &Machine) -> Command {
    let mut command = Command::new(machine.qemu);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    // Without it a stopped guest would wait for a monitor that nobody opens.
    command.args(["-action", "panic=exit-failure"]);
    processor(&mut command, machine);
    memory(&mut command, machine);
    command.arg("-kernel").arg(machine.kernel).args(["-append", machine.append]);
    if let Some(initramfs) = machine.initramfs {
        command.arg("-initrd").arg(initramfs);
    }
    command.arg("-serial").arg(option("file:", machine.console));
    if let Some(report) = machine.report {
        command.arg("-chardev").arg(option("socket,id=report,path=", report));
        command.args(["-device", "virtio-serial-pci"]);
        command.args(["-device", "virtserialport,chardev=report,name=pcache.report"]);
    }
    if let Some(monitor) = machine.monitor {
        command
            .arg("-qmp")
            .arg(option("unix:", monitor).into_string().expect("a plain path") + ",server=on,wait=off");
    }
    if let Some(incoming) = machine.incoming {
        command.arg("-incoming").arg(option("file:", incoming));
    }
    for (index, disk) in machine.disks.iter().enumerate() {
        attach(&mut command, index, disk);
    }
    command
}

fn processor(command: &mut Command, machine: &Machine) {
    match machine.accelerator {
        Accelerator::Kvm => command.args(["-accel", "kvm", "-cpu", "host"]),
        // A translation cache of the default size is a quarter of the guest's memory again.
        Accelerator::Tcg => command.args(["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max,la57=off"]),
    };
    command.args(["-smp", &machine.vcpus.to_string()]);
}

fn memory(command: &mut Command, machine: &Machine) {
    let size = machine.memory_mib;
    command.args(["-object", &format!("memory-backend-memfd,id=ram,size={size}M,share=on")]);
    let Some(nvdimm) = machine.nvdimm else {
        let more = match machine.spare_mib {
            0 => String::new(),
            spare => format!(",slots=2,maxmem={}M", size + spare),
        };
        command.args(["-machine", "q35,memory-backend=ram", "-m", &format!("{size}M{more}")]);
        return;
    };
    let maxmem = size + nvdimm.size_mib;
    command.args(["-machine", "q35,memory-backend=ram,nvdimm=on,nvdimm-persistence=cpu"]);
    command.args(["-m", &format!("{size}M,slots=2,maxmem={maxmem}M")]);
    let backend = format!("memory-backend-file,id=pmem,share=on,size={}M,mem-path=", nvdimm.size_mib);
    command.arg("-object").arg(option(&backend, &nvdimm.path));
    command.args(["-device", "nvdimm,id=nvdimm0,memdev=pmem"]);
}

fn attach(command: &mut Command, index: usize, disk: &Disk) {
    match disk {
        Disk::VhostUser { socket, queues, reconnect_ms, packed } => {
            let mut chardev = option(&format!("socket,id=vhost{index},path="), socket);
            if let Some(milliseconds) = reconnect_ms {
                chardev.push(format!(",reconnect-ms={milliseconds}"));
            }
            command.arg("-chardev").arg(chardev);
            let packed = if *packed { ",packed=on" } else { "" };
            let device = format!("vhost-user-blk-pci,chardev=vhost{index},num-queues={queues}{packed}");
            command.args(["-device", &device]);
        }
        Disk::Raw { path } => {
            let node =
                format!("driver=raw,node-name=raw{index},file.driver=file,discard=unmap,file.filename=");
            command.arg("-blockdev").arg(option(&node, path));
            command.args(["-device", &format!("virtio-blk-pci,drive=raw{index}")]);
        }
    }
}

/// An option whose last value is a path; QEMU wants commas in values doubled.
fn option(prefix: &str, path: &Path) -> OsString {
    let mut text = OsString::from(prefix);
    let bytes = path.as_os_str().as_encoded_bytes();
    for (index, part) in bytes.split(|byte| *byte == b',').enumerate() {
        if index > 0 {
            text.push(",,");
        }
        text.push(String::from_utf8_lossy(part).as_ref());
    }
    text
}
