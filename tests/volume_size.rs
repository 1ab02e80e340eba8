//! A volume becomes larger while a front end uses it: by the verb, over a kill, and as far as the front
//! end is told.

mod client;

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::Output;
use std::time::Duration;

use client::daemon::verb;
use client::request::{IOERR, OK};
use client::{Client, ClientOptions, Daemon, Req, Request, Workspace};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

struct Place {
    workspace: Workspace,
    daemon: Daemon,
    control: String,
}

impl Place {
    fn new(more: &[&str]) -> Self {
        let workspace = Workspace::new();
        let control = workspace.path("control.sock").display().to_string();
        let mut args = vec!["--control", &control];
        args.extend(more);
        let daemon = Daemon::cached(&workspace, "64MiB", 64 * MIB, 1, &args);
        Self { workspace, daemon, control }
    }

    fn connect(&self) -> Client {
        let options = ClientOptions { mem_size: 8 * MIB, patience: PATIENCE, ..ClientOptions::default() };
        Client::connect(self.daemon.socket(), options)
    }

    fn resize(&self, words: &[&str]) -> Output {
        verb(&[&["resize", "--control", &self.control, "disk0"][..], words].concat())
    }

    fn resized(&self, words: &[&str]) -> String {
        let output = self.resize(words);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
        said
    }
}

#[test]
fn what_is_written_behind_the_old_end_is_there_after_a_kill() {
    for order in ["strict", "grouped"] {
        let mut place = Place::new(&["--order", order]);
        let mut client = place.connect();
        let old_end = client.capacity();
        assert_eq!(client.execute(&Request::read(old_end, 4096)).status, IOERR);
        let said = place.resized(&["96MiB"]);
        assert!(said.contains("64 MiB became 96 MiB") && said.contains("connects the next time"), "{said}");
        for round in 0..3 {
            let data = vec![round + 1; 8192];
            // Over the old end as well.
            let at = old_end - 8 + 1000 * u64::from(round);
            assert_eq!(client.execute(&Request::write(at, data.clone())).status, OK);
            assert_eq!(client.execute(&Request::flush()).status, OK);
            drop(client);
            place.daemon.kill();
            place.daemon.restart();
            client = place.connect();
            assert_eq!(client.capacity(), 96 * MIB / 512);
            assert_eq!(client.execute(&Request::read(at, 8192)).data, data, "{order}, round {round}");
        }
        assert_eq!(client.execute(&Request::read(96 * MIB / 512 - 8, 8192)).status, IOERR);
        drop(client);
        place.daemon.stop();
        let image = place.workspace.path("cache.img").display().to_string();
        assert!(verb(&["check", "--cache", &image]).status.success());
    }
}

#[test]
fn a_disk_that_somebody_else_has_grown_is_taken_as_it_is_and_nothing_becomes_smaller() {
    let place = Place::new(&[]);
    let mut client = place.connect();
    let refused = |words: &[&str], why: &str| {
        let output = place.resize(words);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(why), "{said}");
    };
    refused(&["32MiB"], "cannot become smaller");
    refused(&["65000001B"], "not a multiple of 512");
    assert!(place.resized(&[]).contains("64 MiB already"));
    let image = File::options().write(true).open(place.workspace.path("disk.img")).expect("the image");
    image.set_len(80 * MIB).expect("it grows");
    refused(&["70MiB"], "as large as its disk");
    assert!(place.resized(&[]).contains("64 MiB became 80 MiB"));
    assert_eq!(client.execute(&Request::write(79 * MIB / 512, vec![7; 4096])).status, OK);
    assert_eq!(fs::metadata(place.workspace.path("disk.img")).expect("the image").len(), 80 * MIB);
}

#[test]
fn a_front_end_with_a_channel_is_told_and_reads_the_new_size() {
    let place = Place::new(&[]);
    let client = place.connect();
    let (mut ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    ours.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
    client.wire.tell(Req::SetBackendReqFd, &[], &[theirs.as_raw_fd()]);
    let deadline = std::time::Instant::now() + PATIENCE;
    let mut size = 65;
    loop {
        let said = place.resized(&[&format!("{size}MiB")]);
        if said.contains("its VM is told") {
            break;
        }
        // The channel was handed over a moment ago.
        assert!(std::time::Instant::now() < deadline, "{said}");
        size += 1;
    }
    let mut message = [0; 12];
    ours.read_exact(&mut message).expect("it is told");
    assert_eq!(message[..4], 2u32.to_ne_bytes());
    let capacity = client.wire.get_config(0, 8).expect("it can ask");
    assert_eq!(capacity, (size * MIB / 512).to_le_bytes());
}
