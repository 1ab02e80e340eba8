//! Shares and limits of the real binary: they hold at once, show, follow the file, and what the cache
//! cannot keep is refused; a limit is kept, and costs neither a neighbour nor a FLUSH anything.

use std::time::{Duration, Instant};

use super::client::{Client, ClientOptions, Completion, Layout, Mix, Request};
use super::control_support::{Load, MIB, Site};

/// Requests that a client keeps under way.
const DEPTH: usize = 32;

#[test]
fn shares_hold_at_once_show_in_status_and_follow_the_file() {
    let site = Site::new(&["a", "b"]);
    let load = Load::begin(&site, "a", Mix::default());
    let share = |name: &str| site.status(name)["settings"]["share"].clone();
    assert_eq!((&share("a")["weight"], &share("a")["gc_percent"]), (&100.into(), &100.into()));
    let space = ["--cache-min", "4MiB", "--cache-max", "8MiB", "--weight", "300", "--gc-percent", "70"];
    let limits = ["--iops", "90000", "--read-iops", "80000", "--write-iops", "70000", "--burst-ms", "50"];
    let bytes = ["--bytes-per-s", "3GiB", "--read-bytes-per-s", "2GiB", "--write-bytes-per-s", "1GiB"];
    site.verb(&[&["set", "a"][..], &space, &limits, &bytes].concat()).succeeds();
    let of = share("a");
    for (key, expected) in [
        ("cache_min_bytes", 4 * MIB),
        ("cache_max_bytes", 8 * MIB),
        ("weight", 300),
        ("gc_percent", 70),
        ("iops", 90_000),
        ("read_iops", 80_000),
        ("write_iops", 70_000),
        ("bytes_per_s", 3 << 30),
        ("read_bytes_per_s", 2 << 30),
        ("write_bytes_per_s", 1 << 30),
        ("burst_ms", 50),
    ] {
        assert_eq!(of[key], expected, "{key} in {of}");
    }
    let text = site.verb(&["status", "a"]).succeeds();
    for words in
        ["at least 4 MiB, at most 8 MiB, weight 300, gc_percent 70", "90000 requests/s", "50 ms saved"]
    {
        assert!(text.contains(words), "{text}\nlacks: {words}");
    }
    assert_eq!(site.status("a")["dm_pcache"]["gc_percent"], 70);
    // What it holds comes down to its maximum under load, and stays there.
    site.wait(|| share("a")["held_bytes"].as_u64().expect("a number") <= 8 * MIB);
    let load = load.go_on_for(Duration::from_millis(300));
    assert!(share("a")["held_bytes"].as_u64().expect("a number") <= 8 * MIB);

    // Promises are added up; what is refused changes nothing.
    site.verb(&["set", "b", "--cache-min", "44MiB"]).fails(1, &["the cache can promise", "at most"]);
    site.verb(&["set", "a", "--cache-min", "9MiB"])
        .fails(1, &["cache_min 9 MiB is more than cache_max 8 MiB"]);
    site.verb(&["set", "b", "--cache-max", "1MiB", "--iops", "7"]).fails(1, &["is too little"]);
    site.verb(&["set", "b", "--gc-percent", "91"]).fails(2, &["from 0 to 90"]);
    site.verb(&["set", "b", "--weight", "0"]).fails(2, &["from 1 to 10000"]);
    assert_eq!((&share("b")["cache_min_bytes"], &share("b")["iops"]), (&0.into(), &0.into()));

    let keys = "queues = 2\ncache_min = \"2MiB\"\niops = 50000";
    site.write_config(&site.config().replacen("queues = 2", keys, 1));
    let said = site.verb(&["reload"]).succeeds();
    let expected = "changed: volume a: cache_min 4 MiB becomes 2 MiB, cache_max 8 MiB becomes none, weight 300 \
                    becomes 100, gc_percent 70 becomes 100, iops 90000 becomes 50000,";
    assert!(said.contains(expected), "{said}\nlacks: {expected}");
    site.wait(|| share("a")["iops"] == 50_000);
    let mut traffic = load.end();
    traffic.verify(0..traffic.model.sectors());
    site.stop();
}

/// Keeps [`DEPTH`] requests under way for `time`; says how many ended a second.
fn rate(client: &mut Client, request: impl Fn(u64) -> Request, time: Duration) -> f64 {
    let mut done: Vec<(usize, Completion)> = Vec::new();
    let (begun, mut ended, mut tag) = (Instant::now(), 0u64, 0u64);
    loop {
        let is_over = begun.elapsed() >= time;
        while !is_over && client.outstanding() < DEPTH {
            let request = request(tag);
            assert!(client.submit(0, tag, &request, &Layout::plain(&request)), "the ring has room");
            tag += 1;
        }
        client.queues[0].publish();
        if client.outstanding() > 0 {
            client.wait(&mut done);
        }
        ended += done.len() as u64;
        assert!(done.drain(..).all(|(_, one)| one.status == 0), "no request fails");
        if is_over {
            // What is still held back is not counted.
            let rate = ended as f64 / begun.elapsed().as_secs_f64();
            while client.outstanding() > 0 {
                client.wait(&mut done);
                done.clear();
            }
            return rate;
        }
    }
}

#[test]
fn a_limit_is_kept_within_five_percent() {
    let site = Site::new(&["a"]);
    let mut client = Client::connect(&site.socket("a"), ClientOptions::default());
    let read = |n: u64| Request::read(n % 256 * 8, 4096);
    let write = |n: u64| Request::write(n % 256 * 8, vec![n as u8; 4096]);
    let free = rate(&mut client, write, Duration::from_millis(500));
    let rows = [("--iops", "1500", 1500.0), ("--bytes-per-s", "4MiB", 1024.0)];
    for (option, value, expected) in rows {
        // What a late wake-up on a busy machine leaves unused is made up for.
        site.verb(&["set", "a", option, value, "--burst-ms", "300"]).succeeds();
        for is_read in [true, false] {
            let request = |n| if is_read { read(n) } else { write(n) };
            rate(&mut client, request, Duration::from_millis(700));
            let found = rate(&mut client, request, Duration::from_secs(2));
            println!("{option} {value}, reads {is_read}: {found:.0}/s of {free:.0}/s");
            assert!((found / expected - 1.0).abs() < 0.05, "{option} {value}, reads {is_read}: {found:.0}/s");
        }
        site.verb(&["set", "a", option, "0"]).succeeds();
    }
    let stats = site.verb(&["stats", "a", "--json"]).succeeds();
    let stats: serde_json::Value = serde_json::from_str(&stats).expect("--json is JSON");
    let count = |name: &str| stats["counters"][name].as_u64().expect("a counter");
    assert!(count("limit_waits") > 3000, "{stats}");
    assert!(count("limit_iops_wait_us") > 1_000_000 && count("limit_bytes_wait_us") > 1_000_000, "{stats}");
    assert!(
        rate(&mut client, write, Duration::from_millis(500)) > 3000.0,
        "a limit that was lifted holds nothing"
    );
    site.stop();
}

#[test]
fn what_a_limit_holds_back_holds_up_no_flush_no_neighbour_and_no_stop() {
    let site = Site::new(&["a", "b"]);
    let mut a = Client::connect(&site.socket("a"), ClientOptions::default());
    let mut b = Client::connect(&site.socket("b"), ClientOptions::default());
    site.verb(&["set", "a", "--write-iops", "1", "--burst-ms", "1"]).succeeds();
    // The last of them has its moment in a minute.
    for tag in 0..DEPTH as u64 {
        let write = Request::write(tag * 8, vec![7; 4096]);
        assert!(a.submit(0, tag, &write, &Layout::plain(&write)));
    }
    a.queues[0].publish();
    let begun = Instant::now();
    for tag in [1000, 1001] {
        let request = if tag == 1000 { Request::flush() } else { Request::read(8, 4096) };
        assert!(a.submit(0, tag, &request, &Layout::plain(&request)));
        a.queues[0].publish();
        let mut done = Vec::new();
        while !done.iter().any(|(_, one): &(usize, Completion)| one.tag == tag) {
            a.wait(&mut done);
        }
    }
    for n in 0..50 {
        b.assert_works(0, n);
        assert_eq!(b.execute(&Request::flush()).status, 0);
    }
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(20), "a FLUSH, a read and a neighbour took {took:?}");
    assert!(a.outstanding() > DEPTH / 2, "the writes are still held back");
    // A ring that stops holds nothing back: all is done, and nothing waits its minute.
    let begun = Instant::now();
    a.stop_ring(0);
    assert!(begun.elapsed() < Duration::from_secs(10), "stopping the ring took {:?}", begun.elapsed());
    let mut done = Vec::new();
    a.collect(&mut done);
    assert_eq!(a.outstanding(), 0, "a ring that has stopped has nothing under way");
    site.stop();
}
