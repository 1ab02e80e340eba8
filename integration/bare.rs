//! The bare guest of `cloud-hypervisor/guest/`: built here, booted by either VMM, heard on its serial port.
//!
//! It exists because a tenth of a second per boot allows what Linux is too slow for: many boots in a
//! row, and Cloud Hypervisor on hosts whose KVM runs no Linux.
//!
//! Invariants: only a line that begins with PASS is a success; every wait has a deadline; the VMM does
//! not outlive its `BareGuest`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::cloud_hypervisor;
use crate::guest::tail;
use crate::prepare::{Host, directory};
use crate::qemu::{self, Accelerator, Disk, Machine};

/// Who runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vmm {
    /// QEMU, always translating: KVM adds nothing to a guest this small.
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
}

/// What the guest does; its command line.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// `write`, `verify` or `churn`.
    pub mode: &'static str,
    /// Which contents.
    pub seed: u32,
    /// 4 KiB blocks, a multiple of 32.
    pub blocks: u32,
    /// Times that `churn` writes each of them.
    pub rounds: u32,
}

/// A running bare guest.
pub struct BareGuest {
    vmm: Child,
    files: tempfile::TempDir,
    deadline: Instant,
}

const DEADLINE: Duration = Duration::from_secs(120);

impl BareGuest {
    /// Starts the guest.
    ///
    /// # Panics
    ///
    /// When the image cannot be built or the VMM does not start.
    pub fn boot(host: &Host, vmm: Vmm, disk: &Disk, work: Work) -> Self {
        let files = tempfile::Builder::new().prefix("bare-").tempdir().expect("a directory for the guest");
        let Work { mode, seed, blocks, rounds } = work;
        let append = format!("mode={mode} seed={seed} blocks={blocks} rounds={rounds}");
        let console = files.path().join("console");
        let log = File::create(files.path().join("vmm.log")).expect("a log for the VMM");
        let vmm = command(host, vmm, disk, &append, &console)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle of the log"))
            .stderr(log)
            .spawn()
            .expect("start the VMM");
        Self { vmm, files, deadline: Instant::now() + DEADLINE }
    }

    /// How many rounds `churn` has completed.
    pub fn rounds(&self) -> u32 {
        let count = self.console().lines().filter(|line| line.starts_with("ROUND ")).count();
        u32::try_from(count).expect("few rounds")
    }

    /// Waits until that many rounds are complete.
    ///
    /// # Panics
    ///
    /// Like `wait_for`.
    pub fn wait_for_round(&mut self, count: u32) {
        self.wait_for(&format!("ROUND round={}\n", count - 1));
    }

    /// Waits for a line that begins with `word`.
    ///
    /// # Panics
    ///
    /// When the guest failed or ended instead, or the deadline passes.
    pub fn wait_for(&mut self, word: &str) -> String {
        loop {
            // Asked before the console is read: what was printed before the end is seen.
            let ended = matches!(self.vmm.try_wait(), Ok(Some(_)));
            let console = self.console();
            // The last line may still be being written.
            let whole = console.rfind('\n').map_or("", |end| &console[..end]);
            if let Some(line) = whole.split_inclusive('\n').find(|line| line.starts_with(word)) {
                return line.to_owned();
            }
            let failed = whole.lines().any(|line| line.starts_with("FAIL"));
            if ended || failed || Instant::now() >= self.deadline {
                let log = tail(&self.files.path().join("vmm.log"), 20);
                panic!("no {word} from the bare guest\n--- console ---\n{console}\n--- vmm ---\n{log}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for PASS and gives that line.
    ///
    /// # Panics
    ///
    /// When anything else comes.
    pub fn finish(mut self) -> String {
        self.wait_for("PASS ")
    }

    fn console(&self) -> String {
        fs::read(self.files.path().join("console"))
            .map(|bytes| String::from_utf8_lossy(&bytes).replace('\r', ""))
            .unwrap_or_default()
    }
}

impl Drop for BareGuest {
    fn drop(&mut self) {
        if let Err(error) = self.vmm.kill().and_then(|()| self.vmm.wait()) {
            eprintln!("ending the VMM: {error}");
        }
    }
}

fn command(host: &Host, vmm: Vmm, disk: &Disk, append: &str, console: &Path) -> Command {
    let kernel = image();
    match vmm {
        Vmm::Qemu => qemu::command(&Machine {
            qemu: &host.qemu,
            accelerator: Accelerator::Tcg,
            kernel,
            initramfs: None,
            append,
            vcpus: 1,
            memory_mib: 128,
            spare_mib: 0,
            disks: std::slice::from_ref(disk),
            nvdimm: None,
            console,
            report: None,
            monitor: None,
            incoming: None,
        }),
        Vmm::CloudHypervisor => {
            let Disk::VhostUser { socket, .. } = disk else {
                panic!("a vhost-user disk is wanted: {disk:?}")
            };
            let program = cloud_hypervisor::program().unwrap_or_else(|missing| panic!("{missing}"));
            cloud_hypervisor::command(
                &program,
                &cloud_hypervisor::Machine { kernel, append, socket, console },
            )
        }
    }
}

/// The built image; each process builds its own, in a fraction of a second.
pub fn image() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("cloud-hypervisor/guest/build.sh");
        let image = directory().join("bare.elf");
        let output = Command::new("bash").arg(&script).arg(&image).output().expect("run bash");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {}\n{said}", script.display(), output.status);
        image
    })
}
