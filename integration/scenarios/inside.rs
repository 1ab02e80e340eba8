//! The server itself inside a guest: where its memory is small, and where there is persistent memory.
//!
//! The guest holds the server, a cache, a backing image, and a front end of ours: this very test binary,
//! started for the one ignored test below. Linux does not see the disk; what is proven is the media side.

use std::path::Path;
use std::time::Duration;

use crate::client::{Client, ClientOptions, Request};
use crate::guest::{Guest, GuestOptions};
use crate::prepare::{Host, host, inapplicable, skip};
use crate::qemu::{Disk, Nvdimm};
use crate::server::{Program, pcache};

/// What the front end inside the guest does: `write|verify SEED MIB FLUSH`.
const WORK: &str = "PCACHE_INSIDE_WORK";
/// One request of it.
const CHUNK: usize = 64 << 10;

/// Words for scripts that run the server.
const FUNCTIONS: &str = "
trap 'cat /tmp/server.log' EXIT
serve() {
    rm -f /run/disk.sock
    pcache-vhost --socket /run/disk.sock \"$@\" >>/tmp/server.log 2>&1 &
    server=$!
    local tries=0
    while [ ! -S /run/disk.sock ]; do
        tries=$((tries + 1))
        [ -d /proc/$server ] && [ $tries -lt 600 ] || { echo 'the server does not listen'; exit 1; }
        sleep 0.1
    done
}
client() {
    PCACHE_INSIDE_WORK=\"$*\" RUST_BACKTRACE=0 /bin/client --ignored --exact \\
        scenarios::inside::client_inside_a_guest --nocapture || return 1
    echo \"CLIENT $*\"
}
end_server() { # signal
    kill -$1 $server
    wait $server || [ $1 = KILL ]
}
";

#[test]
fn a_cache_four_times_the_guests_memory_serves_and_recovers() {
    let Some(host) = ready() else { return };
    const DISK_MIB: u64 = 5120;
    let disk = Image::new("plain.img", DISK_MIB);
    let script = "disk vda\n\
         mkfs.ext4 -q -E nodiscard /dev/vda\n\
         mount /dev/vda /mnt\n\
         test $(awk '/MemTotal/ { print $2 }' /proc/meminfo) -lt 524288\n\
         volume='--cache /mnt/cache.img --cache-size 2GiB --backing /mnt/backing.img --backing-size 2GiB'\n\
         serve $volume\n\
         client write 5 640 flush\n\
         end_server KILL\n\
         serve $volume\n\
         client verify 5 640\n\
         echo MEMORY $(grep VmRSS /proc/$server/status)\n\
         end_server TERM\n\
         pcache-vhost check --cache /mnt/cache.img\n\
         no_kernel_errors\n";
    let options = inside(script).disk(disk.attached()).timeout(Duration::from_secs(600));
    let report = Guest::boot(host, options).finish();
    assert_eq!(report.after("CLIENT").len(), 2, "{:?}", report.lines);
}

#[test]
fn on_emulated_pmem_the_class_is_dax_and_unflushed_writes_survive_the_guest() {
    let Some(host) = ready() else { return };
    let (disk, pmem) = (Image::new("plain.img", 512), Image::new("pmem.img", 512));
    let nvdimm = || Nvdimm { path: pmem.path(), size_mib: 512 };
    let prepare = "modprobe -a nfit nd_pmem\n\
         ndctl create-namespace -f -e namespace0.0 --mode=fsdax --map=mem --no-autolabel >/dev/null\n\
         disk pmem0\n\
         mkfs.ext4 -q -b 4096 /dev/pmem0\n\
         disk vda\n\
         mkfs.ext4 -q /dev/vda\n";
    let mount = "disk pmem0\n\
         disk vda\n\
         mkdir -p /disk\n\
         mount -o dax=always /dev/pmem0 /mnt\n\
         mount /dev/vda /disk\n\
         serve --cache /mnt/cache.img --cache-size 256MiB --backing /disk/backing.img --backing-size 256MiB\n";
    // No FLUSH, and then the guest is gone between two instructions.
    let script =
        format!("{prepare}{mount}client write 6 64\ncat /tmp/server.log\nmark written\nawait nothing\n");
    let guest = Guest::boot(host, inside(&script).nvdimm(nvdimm()).disk(disk.attached()));
    guest.wait_for("written");
    expect_class(&guest.lines(), "dax");
    guest.kill();
    let script = format!(
        "modprobe -a nfit nd_pmem\n{mount}client verify 6 64\nend_server TERM\n\
         pcache-vhost check --cache /mnt/cache.img\nno_kernel_errors\n"
    );
    let report = Guest::boot(host, inside(&script).nvdimm(nvdimm()).disk(disk.attached())).finish();
    expect_class(&report.lines, "dax");
}

#[test]
fn a_file_without_dax_is_never_taken_for_persistent_memory() {
    let Some(host) = ready() else { return };
    let (disk, pmem) = (Image::new("plain.img", 512), Image::new("pmem.img", 512));
    // Persistent memory below, but ext4 mounted without DAX: the same stores would stay in the page cache.
    let script = "modprobe -a nfit nd_pmem\n\
         ndctl create-namespace -f -e namespace0.0 --mode=fsdax --map=mem --no-autolabel >/dev/null\n\
         disk pmem0\n\
         disk vda\n\
         mkfs.ext4 -q -b 4096 /dev/pmem0\n\
         mkfs.ext4 -q /dev/vda\n\
         mkdir -p /disk\n\
         mount -o dax=never /dev/pmem0 /mnt\n\
         mount /dev/vda /disk\n\
         serve --cache /mnt/cache.img --cache-size 128MiB --backing /disk/backing.img --backing-size 128MiB\n\
         client write 7 16 flush\n\
         end_server TERM\n\
         no_kernel_errors\n";
    let nvdimm = Nvdimm { path: pmem.path(), size_mib: 512 };
    let report = Guest::boot(host, inside(script).nvdimm(nvdimm).disk(disk.attached())).finish();
    expect_class(&report.lines, "page-cache");
}

#[test]
fn the_front_end_inside_a_guest_agrees_with_the_storage_daemon_and_finds_a_wrong_byte() {
    let Some(host) = host() else { return };
    let Some(daemon) = on_path("qemu-storage-daemon") else {
        return skip("qemu-storage-daemon is not installed: apt-get install qemu-utils");
    };
    let script = "truncate -s 16M /tmp/disk.img\n\
         /bin/qsd --blockdev driver=file,node-name=disk,filename=/tmp/disk.img --export \
             type=vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path=/run/disk.sock \
             >/tmp/server.log 2>&1 &\n\
         while [ ! -S /run/disk.sock ]; do sleep 0.1; done\n\
         client write 9 8 flush\n\
         client verify 9 8\n\
         printf X | dd of=/tmp/disk.img bs=1 seek=5000000 conv=notrunc 2>/dev/null\n\
         if client verify 9 8; then exit 9; fi\n";
    let report = Guest::boot(host, inside(script).program("/bin/qsd", &daemon)).finish();
    assert!(
        report.lines.iter().any(|line| line.contains("chunk 76 holds other bytes")),
        "{:?}",
        report.lines
    );
}

/// The front end: writes or verifies the first megabytes of the disk.
#[test]
#[ignore = "runs inside a guest, started by the scripts of the scenarios beside it: cargo test --test guests"]
fn client_inside_a_guest() {
    let work = std::env::var(WORK).expect("the work is set by the script");
    let mut words = work.split_whitespace();
    let mode = words.next().expect("a mode").to_owned();
    let seed: u64 = words.next().and_then(|word| word.parse().ok()).expect("a seed");
    let mib: u64 = words.next().and_then(|word| word.parse().ok()).expect("a size");
    let options = ClientOptions { patience: Duration::from_secs(120), ..ClientOptions::default() };
    let mut client = Client::connect(Path::new("/run/disk.sock"), options);
    for chunk in 0..(mib << 20) / CHUNK as u64 {
        let sector = chunk * CHUNK as u64 / 512;
        if mode == "write" {
            let done = client.execute(&Request::write(sector, contents(seed, chunk)));
            assert_eq!(done.status, 0, "write of chunk {chunk}");
        } else {
            let done = client.execute(&Request::read(sector, CHUNK));
            assert_eq!(done.status, 0, "read of chunk {chunk}");
            assert!(done.data == contents(seed, chunk), "chunk {chunk} holds other bytes");
        }
    }
    if words.next() == Some("flush") {
        assert_eq!(client.execute(&Request::flush()).status, 0, "flush");
    }
}

/// A chunk's bytes: xorshift from seed and position, so that no chunk looks like another.
fn contents(seed: u64, chunk: u64) -> Vec<u8> {
    let mut state = (seed << 40 | chunk).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(CHUNK / 8).flatten().collect()
}

/// The host, when the server under test can run inside a guest.
fn ready() -> Option<&'static Host> {
    let host = host()?;
    if Program::chosen() == Program::StorageDaemon {
        inapplicable("qemu-storage-daemon has no cache to put inside a guest");
        return None;
    }
    Some(host)
}

/// A guest with the server and the front end in it.
fn inside(script: &str) -> GuestOptions {
    let this = std::env::current_exe().expect("the path of this test");
    GuestOptions::new(format!("{FUNCTIONS}{script}"))
        .program("/bin/pcache-vhost", &pcache())
        .program("/bin/client", &this)
}

/// Fails unless the server announced its cache as of this class.
fn expect_class(lines: &[String], class: &str) {
    let announced: Vec<&String> = lines.iter().filter(|line| line.contains("cache.img: ")).collect();
    let is_class = |line: &&String| line.split([',', ' ', '=']).any(|word| word == class);
    assert!(announced.iter().any(is_class), "no class {class} in {announced:?}:\n{}", lines.join("\n"));
}

fn on_path(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|entry| entry.join(program)).find(|file| file.is_file())
}

/// A sparse file below `target/`.
struct Image {
    files: tempfile::TempDir,
    name: &'static str,
}

impl Image {
    fn new(name: &'static str, mib: u64) -> Self {
        let files = tempfile::Builder::new()
            .prefix("inside-")
            .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
            .expect("a directory for an image");
        let image = Self { files, name };
        let file = std::fs::File::create(image.path()).expect("create an image");
        file.set_len(mib << 20).expect("size an image");
        image
    }

    fn path(&self) -> std::path::PathBuf {
        self.files.path().join(self.name)
    }

    fn attached(&self) -> Disk {
        Disk::Raw { path: self.path() }
    }
}
