//! Several devices that are one cache, asked of the program itself: all its members, in order, whole, or not
//! one byte written; and from then on a cache like any other.
//!
//! `PCACHE_SEED` repeats a run.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod cli_support;
mod client;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use cli_support::{Place, run};
use client::daemon::verb;
use client::{Client, ClientOptions, Daemon, Mix, Rng, Traffic, Workspace};

const MIB: u64 = 1 << 20;
/// Bytes of a member in front of what it holds of the cache.
const START: u64 = 4 * MIB;

/// A cache of 7 + 10 + 12 MiB, of which units of 2 MiB count: 6 + 6 + 8.
fn members(place: &Place, names: [&str; 3]) -> [String; 3] {
    let [a, b, c] = names;
    let paths = [place.zeros(a, 7 * MIB), place.zeros(b, 10 * MIB), place.zeros(c, 12 * MIB)];
    let made = run(&words("format", &paths, &["--segment-size=256KiB"]));
    assert_eq!((made.code, made.err.as_str()), (0, ""), "{}", made.out);
    assert!(made.out.contains("formatted, 20 MiB"), "{}", made.out);
    paths
}

fn words<'a>(verb: &'a str, paths: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    let mut words = vec![verb];
    paths.iter().for_each(|path| words.extend(["--cache", path.as_str()]));
    words.extend(more);
    words
}

/// Bytes of a file in a range that are not zero.
fn used(path: &str, from: u64, to: u64) -> usize {
    let mut bytes = vec![0; (to - from) as usize];
    File::open(path).unwrap().read_exact_at(&mut bytes, from).unwrap();
    bytes.iter().filter(|byte| **byte != 0).count()
}

#[test]
fn what_is_not_all_of_one_cache_is_refused_with_a_sentence_and_left_as_it_is() {
    let place = Place::in_memory();
    let [a, b, c] = members(&place, ["a", "b", "c"]);
    let [_, other, _] = members(&place, ["x", "y", "z"]);
    let blank = place.zeros("blank", 10 * MIB);
    let file = place.file("text", &[b'!'; 65536]);
    let alone = place.path("alone");
    assert_eq!(run(&["format", "--cache", &alone, "--cache-size=8MiB"]).code, 0);
    let cut = |name: &str, from: &str, len: u64| {
        fs::copy(from, place.path(name)).unwrap();
        File::options().write(true).open(place.path(name)).unwrap().set_len(len).unwrap();
        place.path(name)
    };
    let (cut_a, cut_b, cut_c) =
        (cut("cut-a", &a, 5 * MIB), cut("cut-b", &b, 9 * MIB), cut("cut-c", &c, 11 * MIB));
    let rows: Vec<(Vec<&String>, &str)> = vec![
        (vec![&a], "/a has 3 members, 1 named here: name all of them in their order"),
        (vec![&a, &b], "/a has 3 members, 2 named here"),
        (vec![&a, &c], "/c is member 3 of its cache and is named as member 2"),
        (vec![&a, &c, &b], "/c is member 3 of its cache and is named as member 2"),
        (vec![&b], "/b is member 2 of its cache and is named as member 1"),
        (vec![&b, &a, &c], "/b is member 2 of its cache and is named as member 1"),
        (vec![&a, &other, &c], "/y is a member of another cache than"),
        (vec![&a, &blank, &c], "/blank holds nothing but zeros, not a member of cache"),
        (vec![&a, &file, &c], "/text holds data of an unknown kind, not a member of cache"),
        (vec![&a, &alone, &c], "/alone holds a pcache-vhost cache, not a member of cache"),
        (vec![&alone, &b], "/b is a member of another cache than"),
        (vec![&a, &b, &c, &blank], "/blank holds nothing but zeros, not a member of cache"),
        (vec![&cut_a, &b, &c], "/cut-a has 5242880 bytes and 6291456 are needed: it has been cut off"),
        (vec![&a, &cut_b, &c], "/cut-b has 9437184 bytes and 10485760 are needed: it has been cut off"),
        (vec![&a, &b, &cut_c], "/cut-c ends 1048576 bytes before its cache does: it has been cut off"),
    ];
    let disk = place.zeros("disk", 8 * MIB);
    let socket = place.path("s.sock");
    for (paths, sentence) in rows {
        let paths: Vec<String> = paths.into_iter().cloned().collect();
        for verb in ["check", "dump", "drain"] {
            place.refuses(&words(verb, &paths, &[]), 1, &[sentence]);
        }
        let mut serve = words("", &paths, &["--socket", &socket, "--backing", &disk]);
        serve.remove(0);
        place.refuses(&serve, 1, &[sentence]);
    }
    let twice = ["--socket", &socket, "--backing", &disk, "--cache", &a, "--cache", &a];
    place.refuses(&twice, 2, &["two caches have the same path"]);
    place.refuses(&words("format", &[a.clone(), b.clone(), c.clone()], &[]), 1, &["--force"]);
    place.refuses(
        &words("format", &[blank.clone(), place.zeros("small", 5 * MIB)], &[]),
        1,
        &["too few for a member: 6291456 at least"],
    );
    let missing = place.path("missing");
    place.refuses(
        &words("format", &[blank, missing.clone()], &["--cache-size=64MiB"]),
        1,
        &["/missing does not exist"],
    );
    place.refuses(&words("check", &[a.clone(), b.clone(), missing], &[]), 1, &["/missing does not exist"]);
    assert_eq!(run(&words("check", &[a, b, c], &[])).code, 0, "and all of them are a cache");
}

#[test]
fn a_cache_whose_first_pages_are_lost_is_found_from_the_other_ends_of_its_members() {
    let place = Place::in_memory();
    let paths = members(&place, ["a", "b", "c"]);
    let damage = |path: &str, at| {
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(&[0xee; 4096], at).unwrap();
    };
    // The front superblock, and one copy of each label.
    damage(&paths[0], 0);
    damage(&paths[1], 0);
    damage(&paths[2], 2 * MIB);
    let checked = run(&words("check", &paths, &[]));
    assert_eq!(checked.code, 3, "{checked:?}");
    assert!(checked.out.contains("damage  a copy of the superblock is damaged"), "{}", checked.out);
    let swapped = [paths[0].clone(), paths[2].clone(), paths[1].clone()];
    place.refuses(&words("check", &swapped, &[]), 1, &["/c is member 3 of its cache"]);
    let drained = run(&words("drain", &paths, &[]));
    assert_eq!(drained.code, 0, "{drained:?}");
    assert_eq!(run(&words("check", &paths, &[])).code, 0, "its superblock is whole again");
    // Without both copies of a label nobody knows what that device is.
    damage(&paths[1], 2 * MIB);
    damage(&paths[1], 0);
    place.refuses(&words("check", &paths, &[]), 1, &["/b holds", "not a member of cache"]);
}

/// A daemon on three members, its control socket, and traffic.
fn serve(workspace: &Workspace, keys: &str) -> (Daemon, Vec<String>) {
    let path = |name: &str| workspace.path(name).to_str().unwrap().to_owned();
    let paths: Vec<String> = [("a", 7), ("b", 10), ("c", 24)]
        .map(|(name, mib)| workspace.disk(name, mib * MIB).to_str().unwrap().to_owned())
        .into();
    let mut format = words("format", &paths, &["--segment-size=256KiB"]);
    format.extend((!keys.is_empty()).then_some("--assume-dax"));
    let made = run(&format);
    assert_eq!(made.code, 0, "{made:?}");
    workspace.disk("disk.img", 48 * MIB);
    let quoted = paths.iter().map(|path| format!("\"{path}\"")).collect::<Vec<_>>().join(", ");
    let toml = format!(
        "[control]\nsocket = \"{}\"\n[[cache]]\nname = \"pmem\"\npaths = [{quoted}]\n{keys}\n\
         [[volume]]\nname = \"vm\"\nsocket = \"{}\"\nbacking = \"{}\"\n",
        path("control.sock"),
        path("vm.sock"),
        path("disk.img")
    );
    (Daemon::configured(workspace, &toml, &workspace.path("vm.sock")), paths)
}

fn succeeds(words: &[&str]) -> String {
    let done = verb(words);
    assert!(done.status.success(), "{words:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

/// Kills, an upgrade, a change of size, an orderly end and a drain, with every byte verified.
fn a_life(workspace: &Workspace, keys: &str) {
    let (mut daemon, paths) = serve(workspace, keys);
    let control = workspace.path("control.sock").to_str().unwrap().to_owned();
    let client = Client::connect(daemon.socket(), ClientOptions::default());
    let mut traffic = Traffic::new(client, Rng::seed_from_env("PCACHE_SEED"), Mix::default());
    traffic.backing = Some(workspace.path("disk.img"));
    traffic.run(1500);
    for _ in 0..2 {
        daemon.kill();
        daemon.restart();
        traffic.client.reconnect();
        traffic.run(500);
    }
    let status = succeeds(&["status", "--control", &control]);
    assert!(
        status.contains("/b: 6 MiB from 6 MiB on") && status.contains("/c: 20 MiB from 12 MiB on"),
        "{status}"
    );
    daemon.spawn_successor();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !daemon.has_taken_over() {
        traffic.run(20);
        assert!(Instant::now() < deadline, "the upgrade takes for ever; they said\n{}", daemon.read_log());
    }
    traffic.run(500);
    let len = |n: usize| fs::metadata(&paths[n]).unwrap().len() / MIB;
    for (size, last) in [("40MiB", 32), ("24MiB", 16)] {
        let said = succeeds(&["resize", "--cache", "pmem", size, "--control", &control]);
        assert!(said.contains("resize pmem: done"), "{said}");
        assert_eq!([len(0), len(1), len(2)], [7, 10, last], "only the last member changes");
        traffic.run(300);
    }
    traffic.quiesce();
    traffic.verify(0..traffic.model.sectors());
    daemon.kill();
    daemon.restart();
    traffic.client.reconnect();
    traffic.verify(0..traffic.model.sectors());
    for (path, from, to) in
        [(&paths[0], MIB, 6 * MIB), (&paths[1], START, 10 * MIB), (&paths[2], START, 14 * MIB)]
    {
        assert!(used(path, from, to) > MIB as usize / 2, "{path} holds next to nothing");
    }
    assert_eq!(used(&paths[1], 4096, 2 * MIB), 0, "in front of a member is nothing but its labels");
    traffic.quiesce();
    daemon.stop();
    let checked = run(&words("check", &paths, &[]));
    assert_eq!(checked.code, 0, "{checked:?}");
    let dumped = run(&words("dump", &paths, &[]));
    assert!(
        dumped.out.contains("member   index=1") && dumped.out.contains("base=6291456 start=4194304"),
        "{}",
        dumped.out
    );
    let config = workspace.path("pcache.toml");
    let described = succeeds(&["check-config", config.to_str().unwrap()]);
    assert!(described.contains("/a + ") && described.contains("/b + "), "{described}");
    succeeds(&["drain", "--config", config.to_str().unwrap()]);
    let disk = File::open(workspace.path("disk.img")).unwrap();
    let mut bytes = vec![0; MIB as usize];
    for at in 0..traffic.model.sectors() * 512 / MIB {
        disk.read_exact_at(&mut bytes, at * MIB).unwrap();
        traffic.model.check(at * MIB / 512, &bytes).unwrap_or_else(|why| panic!("on the disk alone, {why}"));
    }
    assert!(Path::new(&paths[2]).exists());
}

#[test]
fn a_cache_of_three_files_survives_kills_an_upgrade_and_a_change_of_size() {
    a_life(&Workspace::new(), "");
}

#[test]
fn a_cache_of_three_devices_like_dax_survives_kills_an_upgrade_and_a_change_of_size() {
    a_life(&Workspace::in_memory(), "assume_dax = true");
}
