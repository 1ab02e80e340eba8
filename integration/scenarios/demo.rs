//! What the project is for, in one sitting: `./pcache demo`.
//!
//! A guest makes a file system on a cached disk and runs fio on it; the counters show what the cache
//! did; then the dirty data goes to the backing image, and a second guest reads that image without us.

use crate::guest::{Guest, GuestOptions};
use crate::prepare::host;
use crate::scenarios::survival::verify;
use crate::server::{Program, Storage, counters};

#[test]
#[ignore = "a demonstration for people: ./pcache demo"]
fn demo() {
    let Some(host) = host() else { return };
    let storage = Storage::new(Program::Pcache, 256, 2048).queues(2);
    println!(
        "\n  cache    {} (256 MiB)\n  backing  {} (2 GiB)",
        show(&storage.cache()),
        show(&storage.backing())
    );
    let server = storage.serve();
    println!("\nA guest makes a file system, keeps files there, and runs fio (4 KiB, 70 % reads, 2 queues):");
    let script = "disk vda\n\
         mkfs.ext4 -q /dev/vda\n\
         mount /dev/vda /mnt\n\
         for n in 1 2 3 4; do make_file /mnt/file$n 8; done\n\
         sync\n\
         fio --name=demo --directory=/mnt --size=64M --bs=4k --rw=randrw --rwmixread=70 --direct=1 \
             --ioengine=io_uring --iodepth=16 --runtime=10 --time_based | grep -E 'read:|write:|lat .*avg'\n\
         rm /mnt/demo*\n\
         umount /mnt\n\
         no_kernel_errors\n";
    let options = GuestOptions::new(script).vcpus(2).memory_mib(768).fio().disk(storage.attached(None));
    let report = Guest::boot(host, options).finish();
    for line in report.lines.iter().filter(|line| !line.starts_with("SUM")) {
        println!("  {line}");
    }
    println!("\nWhat the cache did:");
    println!("  {}", counters(&server.stop()));
    println!("\nThe cache is drained: every dirty byte goes to the backing image.");
    storage.drain();
    println!("\nA second guest reads the backing image without us:");
    let verifying = GuestOptions::new(verify()).file("/sums", 0o644, report.sums()).disk(storage.bare());
    for line in Guest::boot(host, verifying).finish().lines {
        println!("  {line}");
    }
    println!("\nThe emulated processor is slow; the figures are of this run, not of the cache.");
}

fn show(path: &std::path::Path) -> std::path::Display<'_> {
    path.display()
}
