//! The operator's guide, followed to the letter on a Debian with systemd: from the package to a VM on a
//! cached disk.
//!
//! The ten commands are taken out of `docs/guide.md`, so what is printed there is what is run here. The VM of
//! the guide is the bare guest, in a QEMU that an emulated processor runs: it writes, and what it wrote is
//! verified on the disk alone.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::bare;
use crate::guest::{Guest, GuestOptions};
use crate::prepare::{self, host};

/// An emulated processor runs systemd, and QEMU, which emulates another.
const PATIENCE: Duration = Duration::from_secs(900);
/// What the VM does, as its command line has it.
const WORK: &str = "seed=7 blocks=64 rounds=1";

fn tree() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The commands of the guide's first chapter, in order.
fn commands() -> Vec<String> {
    let guide = std::fs::read_to_string(tree().join("docs/guide.md")).expect("the guide is there");
    let chapter = guide.split("## In ten commands").nth(1).expect("it has that chapter");
    let chapter = chapter.split("\n## ").next().expect("which ends");
    let mut commands = Vec::new();
    for block in chapter.split("```sh\n").skip(1) {
        let block = block.split("```").next().expect("a block ends");
        let margin = block.len() - block.trim_start_matches(' ').len();
        let lines = block.trim_end().lines().map(|line| line.get(margin..).unwrap_or_default());
        commands.push(lines.collect::<Vec<_>>().join("\n"));
    }
    commands
}

#[test]
fn the_guide_has_ten_commands_and_names_every_state_and_alert() {
    assert_eq!(commands().len(), 10, "{:#?}", commands());
    let guide = std::fs::read_to_string(tree().join("docs/guide.md")).expect("the guide is there");
    for state in ["degraded", "stalled", "lost-data", "failed"] {
        assert!(guide.contains(&format!("state `{state}`")), "the guide says nothing of state {state}");
    }
    let alerts = std::fs::read_to_string(tree().join("docs/monitoring/alerts.json")).expect("the alerts");
    let names: Vec<&str> =
        alerts.split("\"alert\": \"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert!(names.len() >= 5, "{names:?}");
    for name in names {
        assert!(guide.contains(name), "the guide says nothing of alert {name}");
    }
}

/// The package of the binary under test.
fn package(into: &Path) -> Option<PathBuf> {
    let build = tree().join("dist/debian/build");
    let output = Command::new(build).arg(env!("CARGO_BIN_EXE_pcache-vhost")).arg(into).output().ok()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim_end()))
}

/// A Debian of its own for this run, or why there is none.
fn debian(into: &Path) -> Result<PathBuf, String> {
    let script = tree().join("integration/prepare-debian.sh");
    let output = Command::new("bash").arg(script).arg(prepare::directory()).output().expect("bash runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.code() == Some(77) {
        return Err(said);
    }
    assert!(output.status.success(), "{said}");
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    // What it installs first has its say on the way.
    let image = out.lines().find_map(|line| line.strip_prefix("IMAGE=")).expect("it prints the image");
    let copy = into.join("root.img");
    let copied = Command::new("cp").args(["--sparse=always", "--reflink=auto", image]).arg(&copy).status();
    assert!(copied.expect("cp runs").success());
    Ok(copy)
}

/// What the script says around the guide's commands.
fn script() -> String {
    let vm = "-display none -nodefaults -no-reboot -kernel /root/bare.elf";
    let mut script = format!(
        "say() {{ echo \"$(cut -d' ' -f1 /proc/uptime) $*\"; }}\n\
         # The VM: the guide's command line, and what it boots. Its end is a line on its console.\n\
         vm() {{ # mode, QEMU's options\n\
             local mode=$1 pid; shift\n\
             rm -f /root/console\n\
             command qemu-system-x86_64 \"$@\" {vm} -append \"mode=$mode {WORK}\" -serial file:/root/console &\n\
             pid=$!\n\
             until grep -qs '^PASS' /root/console; do\n\
                 kill -0 $pid || {{ cat /root/console; return 1; }}\n\
                 ! grep -qs '^FAIL' /root/console || {{ cat /root/console; return 1; }}\n\
                 sleep 0.2\n\
             done\n\
             # It may have ended by itself.\n\
             kill $pid 2>/dev/null || true; wait $pid || true\n\
             grep '^PASS' /root/console\n\
         }}\n\
         qemu-system-x86_64() {{ vm write \"$@\"; }}\n\
         YOUR_OPTIONS=\n"
    );
    for (number, command) in (1..).zip(commands()) {
        script += &format!("say command {number}\n{command}\n");
    }
    script += "say after the guide\n\
         test \"$(systemctl is-active pcache-vhost)\" = active\n\
         systemctl show -p StatusText pcache-vhost | grep 'Serving 1 volume on 1 cache'\n\
         test \"$(stat -c %U:%G:%a /run/pcache-vhost/vm1.sock)\" = pcache-vhost:kvm:660\n\
         main=$(systemctl show --value -p MainPID pcache-vhost)\n\
         grep -q '^Seccomp:\\s*2' /proc/$main/status\n\
         grep -q '^CapEff:\\s*0*$' /proc/$main/status\n\
         pcache-vhost stats vm1 | grep -E '^(writes|dirty_bytes) '\n\
         test \"$(pcache-vhost stats vm1 | sed -n 's/^dirty_bytes *//p')\" = 0\n\
         pcache-vhost explain vm1\n\
         say reload\n\
         systemctl reload pcache-vhost\n\
         say the disk alone\n\
         systemctl stop pcache-vhost\n\
         vm verify -machine q35 -m 512 \
             -blockdev driver=raw,node-name=d,file.driver=file,file.filename=/srv/disks/vm1.raw \
             -device virtio-blk-pci,drive=d\n\
         say socket activation\n\
         systemctl start pcache-vhost.socket\n\
         pcache-vhost list | grep vm1\n\
         test \"$(systemctl is-active pcache-vhost)\" = active\n\
         say removal\n\
         apt-get remove -y pcache-vhost\n\
         test \"$(systemctl is-active pcache-vhost)\" != active\n\
         test -s /var/lib/pcache-vhost/cache.img\n";
    script
}

#[test]
fn a_new_operator_comes_from_the_package_to_a_vm_on_a_cached_disk_in_ten_commands() {
    let Some(host) = host() else { return };
    let files = tempfile::tempdir().expect("a directory");
    let root = match debian(files.path()) {
        Ok(root) => root,
        Err(missing) => return prepare::inapplicable(&missing),
    };
    let Some(package) = package(files.path()) else {
        return prepare::inapplicable("dpkg-deb is missing");
    };
    let name = package.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
    let read = |path: &Path| std::fs::read(path).expect("it was made");
    let init = tree().join("integration/guest/systemd-init");
    let options = GuestOptions::whole(script())
        .vcpus(2)
        .memory_mib(1536)
        .timeout(PATIENCE)
        .file("/init", 0o755, read(&init))
        .file("/payload/bare.elf", 0o644, read(bare::image()))
        .file(&format!("/payload/{name}"), 0o644, read(&package))
        .disk(crate::qemu::Disk::Raw { path: root });
    for line in Guest::boot(host, options).finish().lines {
        println!("  {line}");
    }
}
