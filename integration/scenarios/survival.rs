//! What a guest wrote and fsynced is there after whatever ends the guest, the server, or the cache.

use crate::guest::{Guest, GuestOptions};
use crate::prepare::host;
use crate::server::{Program, Server, Storage, counter};

/// A script that makes a file system and `count` fsynced files of `mib` each, and unmounts.
pub fn write_files(count: u32, mib: u32) -> String {
    format!("{}umount /mnt\nno_kernel_errors\n", write_files_and_stay(count, mib))
}

/// The same without the unmount: only fsync stands between the files and oblivion.
fn write_files_and_stay(count: u32, mib: u32) -> String {
    format!(
        "disk vda\n\
         mkfs.ext4 -q /dev/vda\n\
         mount /dev/vda /mnt\n\
         for n in $(seq {count}); do\n\
             make_file /mnt/file$n {mib}\n\
             sync /mnt/file$n\n\
         done\n\
         sync /mnt\n"
    )
}

/// A script that compares the files with `/sums` and the file system with itself.
pub fn verify() -> String {
    "disk vda\n\
     mount /dev/vda /mnt\n\
     verify_files /mnt\n\
     umount /mnt\n\
     e2fsck -fn /dev/vda\n\
     no_kernel_errors\n"
        .to_owned()
}

/// Boots a guest that verifies `sums` on `disk`.
pub fn boot_and_verify(host: &crate::prepare::Host, disk: crate::qemu::Disk, sums: &str) {
    let report =
        Guest::boot(host, GuestOptions::new(verify()).file("/sums", 0o644, sums).disk(disk)).finish();
    assert_eq!(report.after("VERIFIED"), [format!("{} files", sums.lines().count())]);
}

#[test]
fn files_survive_a_reboot_of_the_guest() {
    let Some(host) = host() else { return };
    let storage = Storage::new(Program::chosen(), 64, 512);
    let server = storage.serve();
    let disk = || storage.attached(None);
    let sums = Guest::boot(host, GuestOptions::new(write_files(4, 8)).disk(disk())).finish().sums();
    assert_eq!(sums.lines().count(), 4);
    boot_and_verify(host, disk(), &sums);
    server.stop();
    storage.check();
}

#[test]
fn files_survive_a_killed_server_between_two_boots() {
    let Some(host) = host() else { return };
    let storage = Storage::new(Program::chosen(), 64, 512);
    let server = storage.serve();
    let disk = || storage.attached(None);
    let sums = Guest::boot(host, GuestOptions::new(write_files(4, 8)).disk(disk())).finish().sums();
    server.kill();
    let server = storage.serve();
    boot_and_verify(host, disk(), &sums);
    server.stop();
    storage.check();
}

#[test]
fn fsynced_files_survive_the_guest_and_the_server_dying_together() {
    let Some(host) = host() else { return };
    let storage = Storage::new(Program::chosen(), 64, 512);
    let server = storage.serve();
    let script = write_files_and_stay(4, 8) + "cat /proc/mounts | grep /mnt\nmark written\nawait nothing\n";
    let guest = Guest::boot(host, GuestOptions::new(script).disk(storage.attached(None)));
    guest.wait_for("written");
    let sums = guest.sums();
    server.kill();
    guest.kill();
    assert_eq!(sums.lines().count(), 4);
    let server = storage.serve();
    boot_and_verify(host, storage.attached(None), &sums);
    server.stop();
    storage.check();
}

/// Counts the files on an old disk: all but the last must be whole, since each was fsynced before the next
/// was begun.
const VERIFY_OLD: &str = "disk vda\n\
    mount /dev/vda /mnt\n\
    last=0\n\
    for n in $(seq 64); do [ -e /mnt/file$n ] && last=$n; done\n\
    head -n $((last - 1)) /sums > /whole\n\
    (cd /mnt && sha256sum -c /whole)\n\
    echo \"KEPT $last\"\n\
    umount /mnt\n\
    e2fsck -fn /dev/vda\n\
    no_kernel_errors\n";

fn the_host_burns(order: &'static str) {
    let Some(host) = host() else { return };
    let storage = Storage::new(Program::Pcache, 64, 512).order(order);
    let server = storage.serve();
    let script = write_files_and_stay(1, 1)
        + "for n in $(seq 2 64); do make_file /mnt/file$n 2; sync /mnt/file$n; sync /mnt; mark $n; done\n\
           await nothing\n";
    let guest = Guest::boot(host, GuestOptions::new(script).disk(storage.attached(None)));
    guest.wait_for("40");
    server.kill();
    let sums = guest.sums();
    guest.kill();
    storage.lose_cache();
    let report =
        Guest::boot(host, GuestOptions::new(VERIFY_OLD).file("/sums", 0o644, sums).disk(storage.bare()))
            .finish();
    let kept: u32 = report.after("KEPT")[0].parse().expect("a number");
    assert!(kept >= 2, "the disk alone has {kept} of 40 files: nothing was written back in time");
    println!("{order}: {kept} of at least 40 files on the disk alone");
}

#[test]
fn the_host_burns_and_the_disk_alone_is_an_older_file_system_without_repair_in_strict_order() {
    the_host_burns("strict");
}

#[test]
fn the_host_burns_and_the_disk_alone_is_an_older_file_system_without_repair_in_grouped_order() {
    the_host_burns("grouped");
}

#[test]
fn four_times_the_cache_goes_through_it_and_the_backing_alone_holds_it_after_a_drain() {
    let Some(host) = host() else { return };
    let storage = Storage::new(Program::chosen(), 64, 512);
    let server = storage.serve();
    let sums =
        Guest::boot(host, GuestOptions::new(write_files(32, 8)).disk(storage.attached(None))).finish().sums();
    let log = server.stop();
    let server = storage.serve();
    boot_and_verify(host, storage.attached(None), &sums);
    expect_reclaim(&log);
    stop_and_drain(&storage, server);
    boot_and_verify(host, storage.bare(), &sums);
}

#[test]
fn after_a_drain_a_guest_without_us_reads_and_writes_the_same_file_system() {
    let Some(host) = host() else { return };
    let storage = Storage::new(Program::chosen(), 128, 256);
    let server = storage.serve();
    let sums =
        Guest::boot(host, GuestOptions::new(write_files(4, 4)).disk(storage.attached(None))).finish().sums();
    stop_and_drain(&storage, server);
    let append = format!(
        "disk vda\nmount /dev/vda /mnt\nverify_files /mnt\nmake_file /mnt/later 4\numount /mnt\n{}",
        "e2fsck -fn /dev/vda\nno_kernel_errors\n"
    );
    let guest = GuestOptions::new(append).file("/sums", 0o644, sums.clone()).disk(storage.bare());
    let sums = sums + &Guest::boot(host, guest).finish().sums();
    assert_eq!(sums.lines().count(), 5);
    boot_and_verify(host, storage.bare(), &sums);
}

fn stop_and_drain(storage: &Storage, server: Server) {
    server.stop();
    storage.check();
    storage.drain();
    storage.check();
}

/// Writing more than the cache holds is only a test of reclaim if reclaim ran.
fn expect_reclaim(log: &str) {
    if Program::chosen() == Program::Pcache {
        assert!(counter(log, "reclaimed") > 0, "nothing was reclaimed:\n{log}");
    }
}
