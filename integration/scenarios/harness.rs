//! The harness itself is honest: it boots, it reports failures, and it notices one wrong byte.
//!
//! These run against QEMU's own disk or storage daemon, never against ours: what fails here is not a
//! fault of the server.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::survival::{verify, write_files};
use crate::guest::{Guest, GuestOptions};
use crate::prepare::{host, skip};
use crate::server::{Program, Storage};

#[test]
fn a_script_that_fails_reports_its_status_and_its_words() {
    let Some(host) = host() else { return };
    let report = Guest::boot(host, GuestOptions::new("echo before\nfalse\necho never\n")).try_finish();
    let report = report.expect("the guest reports");
    assert_eq!(report.status, 1);
    assert_eq!(report.lines, ["before"]);
}

#[test]
fn a_guest_that_hangs_is_ended_at_its_deadline_and_accounted_for() {
    let Some(host) = host() else { return };
    let script = "echo hanging\nmark here\nsleep 1000\n";
    let guest = Guest::boot(host, GuestOptions::new(script).timeout(Duration::from_secs(20)));
    let account = guest.try_finish().expect_err("a hanging guest has no status");
    assert!(account.contains("marks: [here]") && account.contains("hanging"), "{account}");
    assert!(account.contains("deadline passed"), "{account}");
}

#[test]
fn a_guest_that_panics_is_a_failure_with_its_console() {
    let Some(host) = host() else { return };
    let script = "echo c >/proc/sysrq-trigger\n";
    let account =
        Guest::boot(host, GuestOptions::new(script)).try_finish().expect_err("a panic is no status");
    assert!(account.contains("Kernel panic"), "{account}");
}

#[test]
fn script_and_harness_talk_both_ways() {
    let Some(host) = host() else { return };
    let mut guest = Guest::boot(host, GuestOptions::new("mark asking\nawait answer\necho done\n"));
    guest.wait_for("asking");
    guest.go("answer");
    assert_eq!(guest.finish().lines, ["done"]);
}

#[test]
fn one_wrong_byte_on_the_disk_fails_the_verifying_guest() {
    let Some(host) = host() else { return };
    let storage = Storage::new(Program::StorageDaemon, 0, 256);
    let raw = || GuestOptions::new(write_files(2, 4)).disk(storage.bare());
    let sums = Guest::boot(host, raw()).finish().sums();
    let verifying = || GuestOptions::new(verify()).file("/sums", 0o644, sums.clone()).disk(storage.bare());
    Guest::boot(host, verifying()).finish();

    let image = File::options().read(true).write(true).open(storage.backing()).expect("open the image");
    let position = position_of_file_data(&image);
    let mut byte = [0];
    image.read_exact_at(&mut byte, position).expect("read a byte of a file");
    image.write_all_at(&[byte[0] ^ 1], position).expect("flip a bit of a file");
    let report = Guest::boot(host, verifying()).try_finish().expect("the guest reports");
    assert_ne!(report.status, 0, "a flipped bit went unnoticed");
    assert!(report.lines.iter().any(|line| line.contains("FAILED")), "{:?}", report.lines);
}

#[test]
fn files_survive_a_reboot_on_the_storage_daemon() {
    let Some(host) = host() else { return };
    if std::process::Command::new("qemu-storage-daemon").arg("--version").output().is_err() {
        return skip("qemu-storage-daemon is not installed: apt-get install qemu-utils");
    }
    let storage = Storage::new(Program::StorageDaemon, 0, 256);
    let server = storage.serve();
    let sums =
        Guest::boot(host, GuestOptions::new(write_files(4, 4)).disk(storage.attached(None))).finish().sums();
    let verifying = GuestOptions::new(verify()).file("/sums", 0o644, sums).disk(storage.attached(None));
    Guest::boot(host, verifying).finish();
    server.stop();
}

/// The second half of the longest run of random-looking blocks: the middle of some file's contents.
fn position_of_file_data(image: &File) -> u64 {
    const BLOCK: u64 = 4096;
    let blocks = image.metadata().expect("the image's size").len() / BLOCK;
    let (mut run, mut longest, mut end) = (0, 0, 0);
    let mut bytes = [0; BLOCK as usize];
    for block in 0..blocks {
        image.read_exact_at(&mut bytes, block * BLOCK).expect("read the image");
        let zeros = bytes.iter().filter(|byte| **byte == 0).count();
        run = if zeros < 64 { run + 1 } else { 0 };
        if run > longest {
            (longest, end) = (run, block);
        }
    }
    assert!(longest >= 64, "the image holds no file contents");
    (end - longest / 2) * BLOCK
}
