//! The control plane of the real binary, while clients verify every byte they read.
//!
//! Claims: every verb is obeyed under load without an I/O error; volumes come and go; mode, order and
//! limits change while guests write; a checkpoint keeps a disk still and never for ever; what a flush or a drain says is on the disk is there; a hostile client of the
//! API never touches a volume.
//!
//! `PCACHE_SEED` repeats a run.

mod client;
mod control_support;
#[path = "control/shares.rs"]
mod shares;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use client::{Client, ClientOptions, Mix, Request, Rng, Traffic};
use control_support::{Load, MIB, Site, Verb};

#[test]
fn every_verb_is_obeyed_under_load_and_no_byte_is_wrong() {
    let site = Site::new(&["a", "b"]);
    let load = Load::begin(&site, "a", Mix::default());
    for words in [
        &["status"][..],
        &["status", "a"],
        &["list"],
        &["stats"],
        &["stats", "a", "--reset"],
        &["explain", "a"],
        &["flush", "a"],
        &["top", "--count", "2", "--interval", "0.1"],
        &["reload"],
    ] {
        let text = site.verb(words).succeeds();
        assert!(!text.trim().is_empty(), "{words:?} says nothing");
        if words[0] != "flush" && words[0] != "top" {
            let mut with_json = words.to_vec();
            with_json.push("--json");
            let json = site.verb(&with_json).succeeds();
            serde_json::from_str::<serde_json::Value>(&json).expect("--json is JSON");
        }
    }
    let cache = site.path("cache.img");
    let drained = site.verb(&["drain", "--cache", &cache]).succeeds();
    assert!(drained.contains("drain a: done") && drained.contains("drain b: done"), "{drained}");
    let status = site.verb(&["status", "a"]).succeeds();
    assert!(status.contains("connected") && status.contains("dm-pcache"), "{status}");
    let nine = status.lines().find(|line| line.starts_with("dm-pcache")).expect("the nine fields");
    assert_eq!(nine.split_whitespace().count(), 10, "{nine}");

    let mut traffic = load.end();
    traffic.verify(0..traffic.model.sectors());
    site.stop();
}

/// What a verb may add to the longest batch of requests of the same run without it.
const STALL_MAX: Duration = Duration::from_millis(100);
/// Tries of each verb. A stall that the verb makes is there every time; one of a busy host is not.
const TRIES: usize = 6;

#[test]
fn no_verb_stalls_a_guest() {
    let site = Site::new(&["a", "b"]);
    let cache = site.path("cache.img");
    let (socket, disk) = (site.path("c.sock"), site.path("c.img"));
    let attach =
        ["attach", "--name", "c", "--socket", &socket, "--backing", &disk, "--backing-size", "64MiB"];
    let mut load = Load::begin(&site, "a", Mix::default());
    let mut stalls = Vec::new();
    for words in [
        &["status", "a"][..],
        &["list"],
        &["stats", "a", "--reset"],
        &["explain", "a"],
        &["top", "--count", "2", "--interval", "0.1"],
        &["reload"],
        &["flush", "a"],
        &["drain", "--cache", &cache],
        &attach,
        &["detach", "c", "--drain"],
        &["set", "a", "--max-lag-s", "30", "--max-dirty", "32MiB"],
        &["set", "a", "--order", "relaxed"],
        &["set", "a", "--order", "strict"],
        &["set", "a", "--cache-mode", "writethrough"],
        &["set", "a", "--cache-mode", "writeback"],
        &["checkpoint", "a", "--exec", "true"],
    ] {
        // What cannot be repeated as it is has its opposite in between.
        let again: &[&str] = match words[0] {
            "attach" => &["detach", "c", "--drain"],
            "detach" => &attach,
            "set" if words.contains(&"--order") => &["set", "a", "--order", "strict"],
            "set" if words.contains(&"--cache-mode") => &["set", "a", "--cache-mode", "writeback"],
            _ => &[],
        };
        let mut seen = Vec::new();
        for number in 0..TRIES {
            if number > 0 && !again.is_empty() {
                site.verb(again).succeeds();
            }
            load.take_longest();
            let begun = Instant::now();
            assert!(site.verb(words).is_success(), "{words:?}");
            // Time for what the verb has begun to be felt, and as much without it.
            load = load.go_on_for(Duration::from_millis(100));
            let took = begun.elapsed();
            let with = load.take_longest();
            load = load.go_on_for(took);
            let without = load.take_longest();
            seen.push((with, without));
            if with <= without + STALL_MAX {
                break;
            }
        }
        println!("{}: {seen:?} with and without", words.join(" "));
        if seen.iter().all(|(with, without)| *with > *without + STALL_MAX) {
            stalls.push(words.join(" "));
        }
    }
    let mut traffic = load.end();
    traffic.verify(0..traffic.model.sectors());
    assert!(stalls.is_empty(), "{stalls:?}");
    site.stop();
}

#[test]
fn a_mode_changes_while_a_guest_writes_and_the_disk_has_what_it_should() {
    for order in ["strict", "relaxed"] {
        let site = Site::with(&["a"], &format!("order = \"{order}\"\n"));
        let mut load = Load::begin(&site, "a", Mix::overlapping());
        let modes = ["writethrough", "writeback", "writearound", "readonly", "writeback", "passthrough"];
        for mode in modes.into_iter().chain(modes) {
            site.verb(&["set", "a", "--cache-mode", mode]).succeeds();
            assert!(site.verb(&["status", "a"]).succeeds().contains(&format!("{mode}, order {order}")));
            load = load.go_on_for(Duration::from_millis(60));
        }
        let worst = load.longest_batch();
        let mut traffic = load.end();
        eprintln!("order={order}: longest batch of 20 requests {worst:?}");
        assert!(worst < Duration::from_secs(5), "a batch of requests took {worst:?}");
        traffic.verify(0..traffic.model.sectors());
        // Passthrough: the disk alone has it all, without a drain.
        traffic.flush_now(0);
        traffic.quiesce();
        site.agrees("a", &mut traffic);
        site.verb(&["set", "a", "--cache-mode", "writeback"]).succeeds();
        traffic.run(500);
        traffic.quiesce();
        site.verb(&["flush", "a"]).succeeds();
        site.agrees("a", &mut traffic);
        drop(traffic);
        site.stop();
    }
}

#[test]
fn killed_while_its_mode_changes_a_volume_loses_nothing() {
    let site = Site::new(&["a"]);
    let options = ClientOptions { queues: 2, ..ClientOptions::default() };
    let client = Client::connect(&site.socket("a"), options);
    let mut traffic = Traffic::new(client, Rng::seed_from_env("PCACHE_SEED"), Mix::overlapping());
    let modes = ["writethrough", "passthrough", "writearound", "readonly"];
    for kill in 0..12 {
        traffic.run(300);
        // Even lives are killed on the way out of write-back, odd ones on the way back.
        let (first, then) = (modes[kill / 2 % modes.len()], "writeback");
        let mode = if kill % 2 == 0 { first } else { then };
        if kill % 2 == 1 {
            site.verb(&["set", "a", "--cache-mode", first]).succeeds();
            traffic.run(100);
        }
        let mut verb = site.spawn(&["set", "a", "--cache-mode", mode]);
        let until = Instant::now() + Duration::from_micros(traffic.rng.below(60_000));
        while Instant::now() < until {
            traffic.run(10);
        }
        site.kill_and_restart();
        traffic.client.reconnect();
        verb.wait().expect("it ends without its daemon");
    }
    traffic.quiesce();
    traffic.verify(0..traffic.model.sectors());
    site.verb(&["flush", "a"]).succeeds();
    site.agrees("a", &mut traffic);
    site.stop();
}

#[test]
fn volumes_come_and_go_while_their_neighbour_is_busy() {
    let site = Site::new(&["a"]);
    let load = Load::begin(&site, "a", Mix::default());
    let (socket, disk) = (site.path("c.sock"), site.path("c.img"));
    let attach = |queues: &str| {
        let words = ["attach", "--name", "c", "--socket", &socket, "--backing", &disk];
        let more = ["--backing-size", "64MiB", "--queues", queues];
        site.verb(&[&words[..], &more[..]].concat())
    };
    attach("1").succeeds();
    attach("1").fails(1, &["volume `c` is attached already"]);
    let options = |queues| ClientOptions { queues, ..ClientOptions::default() };
    let client = Client::connect(socket.as_ref(), options(1));
    let mut traffic = Traffic::new(client, Rng::seed_from_env("PCACHE_SEED"), Mix::default());
    for (life, queues) in [1u16, 3, 2, 6].into_iter().enumerate() {
        if life > 0 {
            attach(&queues.to_string()).succeeds();
            traffic.client = Client::connect(socket.as_ref(), options(queues));
        }
        traffic.run(1000);
        traffic.quiesce();
        site.verb(&["detach", "c", "--keep-dirty"]).fails(1, &["a VM is connected to volume `c`"]);
        // The VM goes: its place is taken by a client of the neighbour, so this one hangs up.
        let parked = Client::connect(&site.socket("spare"), options(1));
        drop(std::mem::replace(&mut traffic.client, parked));
        site.wait(|| !site.is_connected("c"));
        let how = if life % 2 == 0 { "--keep-dirty" } else { "--drain" };
        site.verb(&["detach", "c", how]).succeeds();
        assert!(!fs::exists(&socket).unwrap(), "its socket is gone");
        site.verb(&["status", "c"]).fails(1, &["volume `c` is not attached"]);
        if how == "--drain" {
            site.agrees("c", &mut traffic);
        }
    }
    site.verb(&["detach", "c", "--discard-dirty"]).succeeds();
    site.verb(&["status", "c"]).fails(1, &["there is no volume `c`"]);
    drop(traffic);
    let mut traffic = load.end();
    traffic.verify(0..traffic.model.sectors());
    site.stop();
}

#[test]
fn a_cache_grows_and_shrinks_while_guests_write_and_no_byte_is_wrong() {
    let site = Site::new(&["a"]);
    let load = Load::begin(&site, "a", Mix::default());
    let cache = site.path("cache.img");
    let resize = |cache: &str, size: &str| site.verb(&["resize", "--cache", cache, size]);
    let segments = || {
        let status: serde_json::Value =
            serde_json::from_str(&site.verb(&["status", "--json"]).succeeds()).expect("JSON");
        status["caches"][0]["segments_total"].as_u64().expect("a number")
    };
    assert_eq!(segments(), 88);
    std::thread::sleep(Duration::from_secs(1));
    let before = load.longest_batch();
    for (mib, expected) in [(96, 184), (24, 40), (64, 120), (20, 32), (48, 88)] {
        let said = resize("pmem", &format!("{mib}MiB")).succeeds();
        assert!(said.contains("resize pmem: done") && said.contains(&format!("became {mib} MiB")), "{said}");
        assert_eq!(said.contains("say so in the configuration"), mib != 48, "{said}");
        assert_eq!((fs::metadata(&cache).unwrap().len(), segments()), (mib * MIB, expected));
    }
    let worst = load.longest_batch();
    eprintln!("longest batch of 20 requests: {before:?} before, {worst:?} with five changes of size");
    assert!(worst < Duration::from_secs(5), "a batch of requests took {worst:?}");
    resize("pmme", "1GiB").fails(1, &["there is no cache `pmme`: did you mean `pmem`?"]);
    resize("pmem", "4MiB").fails(1, &["too few for a cache"]);
    resize("pmem", "6MiB").fails(1, &["2 volumes are attached and need 9 segments"]);
    resize("pmem", "48MiB").fails(1, &["make no difference: the cache has 88 segments"]);
    resize("pmem", "1024TiB").fails(1, &["are too many"]);
    resize("pmem", "64 parsecs").fails(2, &["64 parsecs"]);
    let mut traffic = load.end();
    traffic.verify(0..traffic.model.sectors());
    site.verb(&["flush", "a"]).succeeds();
    site.agrees("a", &mut traffic);
    drop(traffic);
    site.kill_and_restart();
    assert_eq!(segments(), 88);
    site.stop();
}

#[test]
fn an_attach_that_fails_leaves_nothing_and_one_that_contradicts_is_refused() {
    let site = Site::new(&["a"]);
    let before = site.verb(&["list"]).succeeds();
    let rows = [
        (vec!["--name", "a", "--socket", "x", "--backing", "y"], 1, "volume `a` is attached already"),
        (
            vec!["--name", "n", "--socket", "/no/dir/x", "--backing", "y", "--backing-size", "1MiB"],
            1,
            "no directory",
        ),
        (vec!["--name", "n", "--socket", "x", "--backing", "missing"], 1, "missing"),
        (vec!["--name", "n", "--socket", "x"], 2, "attach needs --backing"),
        (vec!["--name", "n", "--cache", "q", "--socket", "x", "--backing", "y"], 2, "there is no cache `q`"),
    ];
    for (words, code, why) in rows {
        let words: Vec<String> = words
            .iter()
            .map(|word| if matches!(*word, "x" | "y" | "missing") { site.path(word) } else { (*word).into() })
            .collect();
        let mut all = vec!["attach"];
        all.extend(words.iter().map(String::as_str));
        site.verb(&all).fails(code, &[why]);
    }
    let taken = site.path("a.img");
    let socket = site.path("x");
    let words = ["attach", "--name", "n", "--socket", &socket, "--backing", &taken];
    site.verb(&words).fails(2, &["have the same backing disk"]);
    assert_eq!(site.verb(&["list"]).succeeds(), before);
    assert!(!fs::exists(site.path("x")).unwrap() && !fs::exists(site.path("y")).unwrap());
    site.stop();
}

#[test]
fn a_reload_does_what_it_can_and_says_what_waits() {
    let site = Site::new(&["a", "b"]);
    assert!(site.verb(&["reload"]).succeeds().contains("nothing has changed"));
    let load = Load::begin(&site, "a", Mix::default());
    let text = site.config();
    let edited = text.replacen("queues = 2", "queues = 7\nmode = \"writethrough\"", 1);
    let without_b = edited.split("[[volume]]\nname = \"b\"").next().unwrap().to_owned();
    site.write_config(&format!("{without_b}{}", site.volume("d", "")));
    site.disk("d.img");
    let said = site.verb(&["reload"]).succeeds();
    for words in [
        "changed: volume a: mode writeback becomes writethrough",
        "pending: volume a: queues 2 becomes 7 when it is attached again",
        "pending: volume b is not in the file: it is served until `detach b`",
        "changed: volume d is being attached",
    ] {
        assert!(said.contains(words), "{said}\nlacks: {words}");
    }
    site.wait(|| site.verb(&["list"]).succeeds().lines().filter(|line| line.contains(" ok ")).count() == 4);
    site.wait(|| site.verb(&["status", "a"]).succeeds().contains("writethrough"));
    Client::connect(&site.socket("d"), ClientOptions::default()).assert_works(0, 7);

    site.write_config(&format!("{text}[[volume]]\nnmae = \"x\"\n"));
    site.verb(&["reload"]).fails(2, &["unknown key `nmae`", "did you mean `name`?"]);
    site.write_config(&text);
    site.hang_up();
    site.wait(|| site.log().contains("reload: changed: volume a: mode writethrough becomes writeback"));
    site.wait(|| site.log().contains("reload: pending: volume d is not in the file"));
    let mut traffic = load.end();
    traffic.verify(0..traffic.model.sectors());
    site.stop();
}

#[test]
fn an_order_changes_while_a_guest_writes_and_the_disk_has_what_it_should() {
    let site = Site::with(&["a"], "order = \"grouped\"\n");
    let mut load = Load::begin(&site, "a", Mix::overlapping());
    let orders = ["strict", "grouped", "relaxed", "strict", "relaxed", "grouped", "strict"];
    for order in orders {
        let said = site.verb(&["set", "a", "--order", order]).succeeds();
        assert!(said.contains("set a: done"), "{said}");
        let status = site.status("a");
        assert_eq!(
            (&status["summary"]["order"], &status["is_changing_order"]),
            (&order.into(), &false.into())
        );
        assert!(site.verb(&["status", "a"]).succeeds().contains(&format!("order {order}\n")));
        load = load.go_on_for(Duration::from_millis(150));
    }
    site.verb(&["set", "a", "--order", "relaxed", "--cache-mode", "writethrough"]).succeeds();
    assert!(site.verb(&["status", "a"]).succeeds().contains("writethrough, order relaxed\n"));
    let mut traffic = load.end();
    traffic.verify(0..traffic.model.sectors());
    site.verb(&["set", "a", "--order", "strict"]).succeeds();
    site.verb(&["flush", "a"]).succeeds();
    site.agrees("a", &mut traffic);
    site.stop();
}

#[test]
fn limits_hold_at_once_show_in_status_and_follow_the_file() {
    let site = Site::new(&["a"]);
    let limits = |site: &Site| {
        let of = site.status("a")["settings"].clone();
        let number = |key: &str| of[key].as_u64().expect("a number");
        let numbers = (number("max_lag_s"), number("max_dirty_bytes"), number("backing_timeout_s"));
        (numbers, of["on_backing_error"].as_str().expect("a word").to_owned())
    };
    assert_eq!(limits(&site), ((0, 0, 30), "wait".into()));
    let load = Load::begin(&site, "a", Mix::default());
    let words = ["--max-lag-s", "9", "--max-dirty", "8MiB", "--on-backing-error", "read_only"];
    site.verb(&[&["set", "a"][..], &words].concat()).succeeds();
    assert_eq!(limits(&site), ((9, 8 * MIB, 30), "read_only".into()));
    site.verb(&["set", "a", "--backing-timeout-s", "5", "--max-lag-s", "0"]).succeeds();
    assert_eq!(limits(&site), ((0, 8 * MIB, 5), "read_only".into()));
    let text = site.verb(&["status", "a"]).succeeds();
    assert!(text.contains("at most 8 MiB") && text.contains("read_only, no answer for 5 s"), "{text}");
    assert!(text.contains(" ms, no bound"), "{text}");

    // What is refused changes nothing of the rest.
    let refused = ["set", "a", "--order", "grouped", "--max-lag-s", "77"];
    site.verb(&refused).fails(1, &["volume `a` has no redo area", "--redo"]);
    site.verb(&["set", "a"]).fails(2, &["--order", "--max-dirty"]);
    site.verb(&["set", "a", "--max-dirty", "5"]).fails(2, &["--max-dirty"]);
    assert_eq!(limits(&site), ((0, 8 * MIB, 5), "read_only".into()));

    let keys = "queues = 2\norder = \"relaxed\"\nmax_lag_s = 7\nadmission = \"never\"\nsidecar = false";
    site.write_config(&site.config().replacen("queues = 2", keys, 1));
    let said = site.verb(&["reload"]).succeeds();
    for words in [
        "changed: volume a: order strict becomes relaxed, max_lag_s 0 becomes 7, max_dirty 8 MiB becomes 0",
        "on_backing_error read_only becomes wait, backing_timeout_s 5 becomes 30, job",
        "pending: volume a: admission adaptive becomes never, sidecar as it is becomes false when",
    ] {
        assert!(said.contains(words), "{said}\nlacks: {words}");
    }
    site.wait(|| site.status("a")["summary"]["order"] == "relaxed");
    assert_eq!(limits(&site), ((7, 0, 30), "wait".into()));
    let text = site.config().replacen("\"relaxed\"\nmax_lag_s = 7", "\"grouped\"\nmax_lag_s = 8", 1);
    site.write_config(&text);
    let said = site.verb(&["reload"]).succeeds();
    assert!(said.contains("changed: volume a: max_lag_s 7 becomes 8, job"), "{said}");
    assert!(said.contains("order relaxed becomes grouped when it is attached again"), "{said}");
    let mut traffic = load.end();
    traffic.verify(0..traffic.model.sectors());
    site.stop();
}

#[test]
fn a_volume_is_attached_with_every_wish_it_may_have() {
    let site = Site::new(&["a"]);
    let (socket, disk, redo) = (site.path("c.sock"), site.path("c.img"), site.path("c.log"));
    let words = ["attach", "--name", "c", "--socket", &socket, "--backing", &disk, "--backing-size", "64MiB"];
    let more = ["--redo", &redo, "--redo-size", "16MiB", "--order", "grouped", "--max-lag-s", "3"];
    let last =
        ["--max-dirty", "4MiB", "--on-backing-error", "error", "--backing-timeout-s", "0", "--iops", "9999"];
    let reads = ["--admission", "second-miss", "--sequential-cutoff", "0", "--sidecar=false"];
    site.verb(&[&words[..], &more, &last, &reads].concat()).succeeds();
    let status = site.status("c");
    let of = &status["settings"];
    assert_eq!((&of["max_lag_s"], &of["max_dirty_bytes"]), (&3.into(), &(4 * MIB).into()));
    assert_eq!((&of["on_backing_error"], &of["backing_timeout_s"]), (&"error".into(), &0.into()));
    assert_eq!((&status["summary"]["order"], &of["share"]["iops"]), (&"grouped".into(), &9999.into()));
    assert_eq!(fs::metadata(&redo).expect("the redo area was made").len(), 16 * MIB);
    Client::connect(socket.as_ref(), ClientOptions::default()).assert_works(0, 7);
    site.stop();
}

#[test]
fn a_checkpoint_has_what_was_acknowledged_and_stays_still_while_the_guest_writes() {
    for order in ["strict", "grouped", "relaxed"] {
        let site = Site::with(&["a"], &format!("order = \"{order}\"\n"));
        let client = Client::connect(&site.socket("a"), ClientOptions { queues: 2, ..Default::default() });
        let mut traffic = Traffic::new(client, Rng::seed_from_env("PCACHE_SEED"), Mix::overlapping());
        traffic.run(1500);
        traffic.quiesce();
        let (disk, held, go) = (site.path("a.img"), site.path("held"), site.path("go"));
        let command = format!("touch {held}; until [ -e {go} ]; do sleep 0.05; done; exit 77");
        let mut verb = site.spawn(&["checkpoint", "a", "--exec", &command]);
        site.wait(|| fs::exists(&held).unwrap());
        site.agrees("a", &mut traffic);
        let before = fs::read(&disk).unwrap();
        assert_eq!(site.status("a")["checkpoint"]["is_reached"], true);
        assert!(site.verb(&["status", "a"]).succeeds().contains("held, ends by itself in"));

        traffic.run(600);
        traffic.quiesce();
        traffic.verify(0..traffic.model.sectors());
        for words in [
            &["set", "a", "--cache-mode", "writethrough"][..],
            &["set", "a", "--order", "relaxed"],
            &["detach", "a", "--drain", "--force"],
            &["checkpoint", "a"],
        ] {
            site.verb(words).fails(1, &["a checkpoint holds the disk of volume `a` still"]);
        }
        // Somebody wants it on the disk now; and a guest that falls silent is reason enough.
        let mut flush = site.spawn(&["flush", "a"]);
        std::thread::sleep(Duration::from_millis(2500));
        assert!(fs::read(&disk).unwrap() == before, "order {order}: the disk was not kept still");
        assert!(flush.try_wait().unwrap().is_none(), "a flush waits for the end of the checkpoint");
        assert!(site.status("a")["summary"]["dirty_bytes"].as_u64().unwrap() > 0);

        fs::write(&go, "").unwrap();
        assert_eq!(verb.wait().unwrap().code(), Some(77), "the command's own status");
        assert!(flush.wait().unwrap().success());
        site.agrees("a", &mut traffic);
        assert!(fs::read(&disk).unwrap() != before && site.status("a")["checkpoint"].is_null());
        drop(traffic);
        site.stop();
    }
}

#[test]
fn a_checkpoint_of_one_disk_of_a_group_keeps_all_its_disks_at_one_moment() {
    for order in ["strict", "grouped"] {
        let site = Site::with(&["a", "b"], &format!("order = \"{order}\"\ngroup = \"vm\"\n"));
        let mut guests = ["a", "b"].map(|volume| {
            let client =
                Client::connect(&site.socket(volume), ClientOptions { queues: 2, ..Default::default() });
            (volume, Traffic::new(client, Rng::seed_from_env("PCACHE_SEED"), Mix::overlapping()))
        });
        let run = |guests: &mut [(&str, Traffic); 2], operations| {
            for (_, traffic) in guests.iter_mut() {
                traffic.run(operations);
                traffic.quiesce();
            }
        };
        run(&mut guests, 800);
        let (held, go) = (site.path("held"), site.path("go"));
        let command = format!("touch {held}; until [ -e {go} ]; do sleep 0.05; done");
        let mut verb = site.spawn(&["checkpoint", "a", "--exec", &command]);
        site.wait(|| fs::exists(&held).unwrap());
        guests.iter_mut().for_each(|(volume, traffic)| site.agrees(volume, traffic));
        let disks = || ["a.img", "b.img"].map(|disk| fs::read(site.path(disk)).unwrap());
        let before = disks();
        let checkpoints = ["a", "b"].map(|volume| site.status(volume)["checkpoint"].clone());
        assert!(checkpoints.iter().all(|c| c["is_reached"] == true), "{checkpoints:?}");
        assert_eq!(checkpoints[0]["job"], checkpoints[1]["job"]);

        run(&mut guests, 400);
        for words in [
            &["set", "b", "--order", "relaxed"][..],
            &["detach", "b", "--drain", "--force"],
            &["checkpoint", "b"],
        ] {
            site.verb(words).fails(1, &["a checkpoint holds the disk of volume `b` still"]);
        }
        let (socket, disk) = (site.path("c.sock"), site.path("c.img"));
        let words =
            ["attach", "--name", "c", "--socket", &socket, "--backing", &disk, "--backing-size", "64MiB"];
        let joins = [&words[..], &["--group", "vm", "--order", order]].concat();
        site.verb(&joins).fails(1, &["a checkpoint holds the disk of volume `a` still"]);
        // A guest that falls silent is reason enough to write back.
        std::thread::sleep(Duration::from_millis(1500));
        assert!(disks() == before, "order {order}: the disks were not kept still");

        fs::write(&go, "").unwrap();
        assert!(verb.wait().unwrap().success());
        assert!(["a", "b"].iter().all(|volume| site.status(volume)["checkpoint"].is_null()));
        // Either name ends it for both.
        let mut verb = site.spawn(&["checkpoint", "b", "--hold", "3600"]);
        site.wait(|| site.status("a")["checkpoint"]["is_reached"] == true);
        site.verb(&["checkpoint", "a", "--release"]).succeeds();
        assert!(["a", "b"].iter().all(|volume| site.status(volume)["checkpoint"].is_null()));
        Verb::interrupt(&verb);
        assert!(!verb.wait().unwrap().success(), "what it copied was not kept still");
        for (volume, traffic) in &mut guests {
            site.verb(&["flush", volume]).succeeds();
            site.agrees(volume, traffic);
        }
        drop(guests);
        site.stop();
    }
}

#[test]
fn a_checkpoint_under_load_is_of_one_moment_and_can_be_repeated() {
    let site = Site::new(&["a"]);
    let load = Load::begin(&site, "a", Mix::overlapping());
    let (disk, copy) = (site.path("a.img"), site.path("copy.img"));
    for _ in 0..4 {
        site.verb(&[
            "checkpoint",
            "a",
            "--exec",
            &format!("cp {disk} {copy} && sleep 0.4 && cmp {disk} {copy}"),
        ])
        .succeeds_silently();
        site.verb(&["checkpoint", "a", "--hold", "1"]).succeeds();
        site.verb(&["checkpoint", "a"]).succeeds();
    }
    site.verb(&["set", "a", "--cache-mode", "writethrough"]).succeeds();
    site.verb(&["checkpoint", "a"]).fails(1, &["in mode writethrough its writes go to the disk at once"]);
    let mut traffic = load.end();
    traffic.verify(0..traffic.model.sectors());
    site.stop();
}

#[test]
fn a_checkpoint_whose_client_is_dead_ends_by_itself_and_another_s_is_left_alone() {
    let site = Site::new(&["a"]);
    let client = Client::connect(&site.socket("a"), ClientOptions { queues: 2, ..Default::default() });
    let mut traffic = Traffic::new(client, Rng::seed_from_env("PCACHE_SEED"), Mix::overlapping());
    traffic.run(500);
    let ask = |method: &str, query: &str, body: &str| {
        let head =
            format!("{method} /v1/volumes/a/checkpoint{query} HTTP/1.1\r\nhost: x\r\nconnection: close");
        let (head, answer) = site.http(&format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()));
        let answer: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
        (head.split(' ').nth(1).expect("a status").to_owned(), answer)
    };
    for body in ["{\"hold_s\":0}", "{\"hold_s\":3601}", "{\"hold\":1}", "{"] {
        assert_eq!(ask("POST", "", body).0, "400", "{body}");
    }
    assert_eq!(ask("DELETE", "", "").0, "409", "there is none to end");
    let reached = || site.status("a")["checkpoint"]["is_reached"] == true;
    let (status, job) = ask("POST", "", "{\"hold_s\":2}");
    assert_eq!(status, "202", "{job}");
    site.wait(reached);
    // Prolonged, it outlives its time; forgotten, it does not.
    let mine = format!("?job={}", job["id"]);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(4) {
        assert_eq!(ask("PUT", &mine, "").0, "200", "after {:?}", begun.elapsed());
        // Little: what it writes must find space without the disk.
        traffic.run(5);
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(ask("PUT", "?job=999", "").0, "409");
    assert_eq!(ask("DELETE", "?job=999", "").0, "409");
    assert!(reached());
    traffic.quiesce();
    let begun = Instant::now();
    site.verb(&["flush", "a"]).succeeds();
    eprintln!("ended by itself after {:?}", begun.elapsed());
    assert!(site.status("a")["checkpoint"].is_null());
    site.agrees("a", &mut traffic);
    assert_eq!(ask("DELETE", &mine, "").0, "409", "it was over");
    assert!(site.log().contains("has ended by itself"));

    // Whoever ends another's tells its owner, whose copy is void.
    let (held, go) = (site.path("held"), site.path("go"));
    let command = format!("touch {held}; until [ -e {go} ]; do sleep 0.05; done");
    let mut verb = site.spawn(&["checkpoint", "a", "--exec", &command]);
    site.wait(|| fs::exists(&held).unwrap());
    site.verb(&["checkpoint", "a", "--release"]).succeeds();
    fs::write(&go, "").unwrap();
    let mut said = String::new();
    verb.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(verb.wait().unwrap().code(), Some(1), "{said}");
    assert!(said.contains("a copy of it is void"), "{said}");
    // A verb that is interrupted ends what it holds.
    let mut verb = site.spawn(&["checkpoint", "a", "--hold", "3600"]);
    site.wait(reached);
    Verb::interrupt(&verb);
    verb.wait().unwrap();
    assert!(site.status("a")["checkpoint"].is_null());
    drop(traffic);
    site.stop();
}

#[test]
fn metrics_are_well_formed_and_add_up() {
    let site = Site::new(&["a", "b"]);
    let mut client = Client::connect(&site.socket("a"), ClientOptions::default());
    for at in 0..64 {
        let done = client.execute(&Request::write(at * 64, vec![at as u8; 16384]));
        assert_eq!(done.status, 0);
    }
    for at in 0..64 {
        client.execute(&Request::read(at * 64, 16384));
        client.execute(&Request::read(MIB / 512 * 32 + at * 64, 8192));
    }
    client.execute(&Request::flush());
    let (head, page) = site.http("GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("text/plain; version=0.0.4"), "{head}");
    let samples = control_support::parse_metrics(&page);
    let of_a = |name: &str| {
        let series = format!("pcache_volume_{name}{{cache=\"pmem\",volume=\"a\"}}");
        *samples.get(&series).unwrap_or_else(|| panic!("no {series} in {page}"))
    };
    assert_eq!((of_a("writes_total"), of_a("write_bytes_total")), (64.0, 64.0 * 16384.0));
    assert_eq!(of_a("reads_total"), 128.0);
    assert_eq!(of_a("read_hits_total") + of_a("read_misses_total"), 128.0);
    assert_eq!(of_a("read_hit_bytes_total") + of_a("read_miss_bytes_total"), 64.0 * (16384.0 + 8192.0));
    assert_eq!(of_a("read_hit_bytes_total"), 64.0 * 16384.0);
    assert_eq!((of_a("flushes_total"), of_a("errors_total"), of_a("connected")), (1.0, 0.0, 1.0));
    let segments = |kind| samples[&format!("pcache_cache_segments{{cache=\"pmem\",use=\"{kind}\"}}")];
    assert!(segments("used") >= 1.0 && segments("free") >= 1.0 && segments("bad") == 0.0);
    let states = samples.iter().filter(|(name, _)| name.contains("_state{") && name.contains("\"a\""));
    assert_eq!(states.map(|(_, value)| value).sum::<f64>(), 1.0);

    for file in ["dashboard.json", "alerts.json"] {
        let path = format!("{}/docs/monitoring/{file}", env!("CARGO_MANIFEST_DIR"));
        let text = fs::read_to_string(path).expect("it is in the tree");
        serde_json::from_str::<serde_json::Value>(&text).expect("it is JSON");
        let names = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let names: Vec<&str> = names.filter(|name| name.starts_with("pcache_")).collect();
        assert!(names.len() > 8, "{file} names hardly anything");
        for name in names {
            // The series of a histogram have an end of their own.
            let family = name.strip_suffix("_bucket").unwrap_or(name);
            assert!(page.contains(&format!("# TYPE {family} ")), "{file} names {name}, which is not there");
        }
    }

    site.verb(&["flush", "a"]).succeeds();
    let (_, page) = site.http("GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    let samples = control_support::parse_metrics(&page);
    let series = |name: &str| samples[&format!("pcache_volume_{name}{{cache=\"pmem\",volume=\"a\"}}")];
    assert_eq!((series("dirty_bytes"), series("written_back_bytes_total")), (0.0, 64.0 * 16384.0));
    drop(client);
    site.stop();
}

/// Processor time that a process has used.
fn used(pid: u64) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
    let fields: Vec<&str> = stat.rsplit(") ").next().expect("fields").split(' ').collect();
    let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().expect("a number")).sum();
    // USER_HZ is 100 wherever Linux runs.
    Duration::from_millis(ticks * 10)
}

#[test]
fn eight_volumes_are_scraped_within_five_milliseconds() {
    let names: Vec<String> = (1..=7).map(|number| format!("vm{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    // And `spare` makes eight.
    let site = Site::new(&names);
    for name in names.iter().chain(&["spare"]) {
        let mut client = Client::connect(&site.socket(name), ClientOptions::default());
        for at in 0..64 {
            client.execute(&Request::write(at * 64, vec![at as u8; 4096]));
            client.execute(&Request::read(at * 64, 4096));
            client.execute(&Request::read(MIB / 512 * 32 + at * 64, 4096));
            client.execute(&Request::flush());
        }
        site.verb(&["flush", name]).succeeds();
    }
    let scrape = || site.http("GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").1;
    let page = scrape();
    let samples = control_support::parse_metrics(&page);
    let bucket = "pcache_volume_stage_seconds_bucket{cache=\"pmem\",volume=\"vm1\",stage=\"read_hit\",le=";
    let mut bounds: Vec<(f64, f64)> = samples
        .iter()
        .filter_map(|(name, count)| {
            let bound = name.strip_prefix(bucket)?.trim_matches(['"', '}']).parse().ok()?;
            Some((bound, *count))
        })
        .collect();
    bounds.sort_by(|one, other| one.0.total_cmp(&other.0));
    assert!(bounds.len() > 20 && bounds.is_sorted_by_key(|(_, count)| *count), "{bounds:?}");
    let count = bucket.replace("_bucket", "_count").replace(",le=", "}");
    assert_eq!(bounds.last().map(|(_, count)| *count), samples.get(&count).copied(), "+Inf is all of them");
    assert!(page.matches("_count{").count() >= 8 * 6, "{page}");

    let (pid, rounds) = (site.pid(), 100);
    let before = used(pid);
    let mut times: Vec<Duration> = (0..rounds)
        .map(|_| {
            let begun = Instant::now();
            scrape();
            begun.elapsed()
        })
        .collect();
    let each = (used(pid) - before) / rounds;
    times.sort_unstable();
    let (best, median) = (times[0], times[times.len() / 2]);
    println!("{} bytes; best {best:?}, median {median:?}, {each:?} of processor time each", page.len());
    assert!(best < Duration::from_millis(5) && each < Duration::from_millis(5), "{best:?}, {each:?}");
    site.stop();
}

#[test]
fn a_hostile_client_of_the_api_touches_no_volume_and_costs_little() {
    let site = Site::new(&["a"]);
    let load = Load::begin(&site, "a", Mix::default());
    let pid = site.pid();
    let before = control_support::anonymous_bytes(pid);
    let connect = || UnixStream::connect(site.control()).expect("the socket takes connections");
    // Slow, oversized, and nonsense; then far more than there are places.
    let mut kept = Vec::new();
    for round in 0..200 {
        let mut stream = connect();
        let long = vec![b'a'; 256 << 10];
        let bytes: Vec<u8> = match round % 8 {
            0 => b"GET /v1/st".to_vec(),
            1 => [&b"GET /"[..], &long].concat(),
            2 => [&b"GET / HTTP/1.1\r\nx: "[..], &long].concat(),
            3 => b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
            4 => b"POST /v1/volumes HTTP/1.1\r\nhost: x\r\ncontent-length: 9999999999\r\n\r\n{".to_vec(),
            5 => [&b"POST /v1/volumes HTTP/1.1\r\nhost: x\r\ncontent-length: 262144\r\n\r\n"[..], &long]
                .concat(),
            6 => b"POST /v1/volumes HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".to_vec(),
            _ => {
                b"DELETE /v1/volumes/%2e%2e%2fa?dirty=discard&force=yes HTTP/1.1\r\nhost: x\r\n\r\n".to_vec()
            }
        };
        stream.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
        // It may hang up in the middle: that is its right.
        drop(stream.write_all(&bytes));
        if round % 3 == 0 {
            kept.push(stream);
        }
    }
    let grown = control_support::anonymous_bytes(pid).saturating_sub(before);
    eprintln!("{} connections kept, {} KiB more in memory", kept.len(), grown >> 10);
    assert!(grown < 48 * MIB, "a client makes the daemon grow by {grown} bytes");
    drop(kept);
    // Those who went leave their places.
    let begun = Instant::now();
    site.wait(|| site.try_verb(&["status"]).is_success());
    eprintln!("answers again after {:?}", begun.elapsed());

    for (request, status) in [
        ("GET /nothing HTTP/1.1\r\n", "404"),
        ("PUT /v1/status HTTP/1.1\r\n", "405"),
        ("POST /v1/volumes/a/flush HTTP/1.1\r\ncontent-length: 2\r\n", "400"),
        ("DELETE /v1/volumes/a HTTP/1.1\r\n", "400"),
        ("DELETE /v1/volumes/a?dirty=keep&colour=red HTTP/1.1\r\n", "400"),
        ("DELETE /v1/jobs/x HTTP/1.1\r\n", "400"),
        ("GET /v1/jobs/999 HTTP/1.1\r\n", "404"),
        ("GET /v1/volumes/b HTTP/1.1\r\n", "404"),
    ] {
        let body = if request.contains("content-length") { "{}" } else { "" };
        let (head, body) = site.http(&format!("{request}host: x\r\nconnection: close\r\n\r\n{body}"));
        assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{request} gave {head}");
        let refusal: serde_json::Value = serde_json::from_str(&body).expect("a refusal is JSON");
        assert!(refusal["message"].as_str().is_some_and(|why| why.len() > 8), "{request} gave {body}");
    }
    let mut traffic = load.end();
    traffic.verify(0..traffic.model.sectors());
    site.stop();
}

#[test]
fn a_verb_that_is_interrupted_calls_its_job_off_and_the_next_goes_on() {
    // A disk that hangs: nothing reaches it, so a drain stands still until it is called off.
    let Some((fuse, site)) = Site::on_fuse() else {
        eprintln!("not run: this host has no FUSE");
        return;
    };
    let mut client = Client::connect(&site.socket("a"), ClientOptions::default());
    for at in 0..32 {
        assert_eq!(client.execute(&Request::write(at * 128, vec![7; 65536])).status, 0);
    }
    fuse.set(client::Faults::hang());
    let mut verb = site.spawn(&["flush", "a"]);
    site.wait(|| {
        site.http("GET /v1/jobs HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").1.contains("running")
    });
    std::thread::sleep(Duration::from_millis(300));
    assert!(verb.try_wait().unwrap().is_none(), "the disk hangs, and so does the flush");
    // Everybody else is served meanwhile.
    site.verb(&["status"]).succeeds();
    Verb::interrupt(&verb);
    let status = verb.wait().unwrap();
    let mut said = String::new();
    verb.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("cancelled") && said.contains("interrupted"), "{said}");
    fuse.release();
    site.verb(&["flush", "a"]).succeeds();
    drop(client);
    site.stop();
}

#[test]
fn verbs_end_with_the_status_that_help_documents() {
    let site = Site::new(&["webserver"]);
    site.verb(&["status", "webservr"]).fails(1, &["no volume `webservr`: did you mean `webserver`?"]);
    site.verb(&["detach", "webserver"]).fails(2, &["--drain"]);
    site.verb(&["set", "webserver", "--cache-mode", "writebak"]).fails(2, &["writeback"]);
    site.verb(&["stats", "--reset"]).fails(2, &["one volume at a time"]);
    let (config, directory) = (site.path("pcache.toml"), site.path("man"));
    let checked = Verb::run(&["check-config", &config]).succeeds();
    assert!(checked.contains("can be served") && checked.contains("volume  webserver:"), "{checked}");
    let nobody = site.path("nobody.sock");
    Verb::run(&["status", "--control", &nobody]).fails(6, &["no daemon answers", &nobody]);
    fs::create_dir(&directory).unwrap();
    Verb::run(&["generate", "man", &directory]).succeeds_silently();
    let pages: Vec<_> = fs::read_dir(&directory).unwrap().map(|page| page.unwrap().file_name()).collect();
    for page in ["pcache-vhost.1", "pcache-vhost-attach.1", "pcache-vhost-drain.1"] {
        assert!(pages.iter().any(|name| name == page), "{page} is not among {pages:?}");
    }
    let script = Verb::run(&["generate", "completion", "bash"]).succeeds();
    assert!(script.contains("--keep-dirty"), "the completion knows the options of detach");
    site.stop();
}
