//! A cache and a disk that do not belong together, or no longer do, are never served as if they did.
//!
//! A table of what can go wrong between two lives of a server. Each row says what was done to the
//! files, whether the pair is then accepted or with what sentence refused, and for a refusal:
//!
//! - the program itself refuses the start, with that sentence, and has changed nothing;
//! - `resolve` without `--keep` says the same and resolves nothing;
//! - each `--keep` makes it a pair again, at once and at the next start, and the guest reads exactly
//!   what was said to count: the cache's blocks and the disk's, byte for byte, of a model.
//!
//! An accepted pair is compared in the same way, so a row whose stale data were served would fail.
//! Which `--keep` a row tries goes round by its number; `PCACHE_IDENTITY_ALL=1` tries all of them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod cli_support;
#[path = "identity/pair.rs"]
mod pair;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cli_support::{Place, run};
use pair::{BLOCK, BLOCKS, Kept, Model, Scene, inode, modified, set_modified};

/// What becomes of a start.
enum Verdict {
    /// Accepted: all that is cached counts.
    Fits,
    /// Refused with these words, before anything is opened for writing.
    Refused(&'static [&'static str]),
    /// Refused after recovery, which counts a start: all but the cache's image is as it was.
    RefusedLater(&'static [&'static str]),
}

use Verdict::{Fits, Refused, RefusedLater};

/// One test at a time: a program that is being started has, for a moment, the locks of whatever file
/// another thread has open.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Row {
    what: &'static str,
    sidecar: Option<bool>,
    /// Makes the pair, and does to it what was done.
    done: fn(&mut Scene),
    verdict: Verdict,
    /// What can be kept; the first is what an operator who knows what happened would choose.
    keeps: &'static [Kept],
}

const ANY: &[Kept] = &[Kept::Dirty, Kept::Nothing, Kept::All];
const OTHER: &[Kept] = &[Kept::Nothing, Kept::Dirty];
const NONE: &[Kept] = &[Kept::Nothing];

const LATER: Duration = Duration::from_secs(3600);
const NOW: Duration = Duration::ZERO;

const CHANGED: Verdict = Refused(&["has changed since", "written to since", "pcache-vhost resolve"]);
const OTHER_DISK: Verdict = Refused(&["is not the one that volume `vm` belongs to", "pcache-vhost resolve"]);
const CONTENT: Verdict = RefusedLater(&["do not go together", "has not what was written back"]);
const OLD_DISK: Verdict = Refused(&["do not go together", "of an earlier time than the cache"]);
const OLD_CACHE: Verdict = Refused(&["do not go together", "of a later time than the cache"]);

fn rested(scene: &mut Scene) {
    scene.first_life();
    scene.later_life(true);
}

fn died(scene: &mut Scene) {
    scene.first_life();
    scene.later_life(false);
}

/// The disk as the first life left it, beside the pair after a later one.
fn with_old_disk(scene: &mut Scene, in_order: bool) {
    scene.first_life();
    scene.copy("disk", "old", true);
    if scene.sidecar == Some(true) {
        scene.copy("disk.pcache", "old.pcache", true);
    }
    scene.later_life(in_order);
}

/// The cache as the first life left it, likewise; the model of what it holds follows it.
fn with_old_cache(scene: &mut Scene, ends: [bool; 2]) {
    scene.first_life();
    if !ends[0] {
        scene.later_life(false);
    }
    scene.copy_cache("cache", "old-cache");
    let model = scene.models["vm"].clone();
    scene.later_life(ends[1]);
    scene.copy_cache("old-cache", "cache");
    scene.models.insert("vm".to_owned(), model);
}

/// Another cache is put before the disk for a while, and writes where this one has clean data.
fn use_elsewhere(scene: &mut Scene) {
    scene.make_cache("elsewhere");
    let model = scene.models.remove("vm");
    let mut life = scene.try_life("elsewhere", "disk", "vm").unwrap();
    scene.write(&mut life, 0..128);
    scene.drain(&life);
    life.end();
    scene.models.insert("vm".to_owned(), model.unwrap());
}

/// In place, with or without the times of what is put back: as `cp -p`, or a roll-back, does.
fn put_back(scene: &Scene, with_times: bool) {
    scene.copy("old", "disk", with_times);
}

fn rename(scene: &Scene, from: &str, to: &str) {
    fs::rename(scene.slow.path(from), scene.slow.path(to)).unwrap();
}

fn resize(scene: &Scene, blocks: u64) {
    let path = scene.disk();
    let time = modified(&path);
    File::options().write(true).open(&path).unwrap().set_len(blocks * BLOCK as u64).unwrap();
    set_modified(&path, time);
}

fn spoil(scene: &Scene, at: u64) {
    let file = File::options().write(true).open(scene.slow.path("disk.pcache")).unwrap();
    file.write_all_at(b"spoilt", at).unwrap();
}

/// The generations of the sidecar's copies.
fn generations(scene: &Scene) -> [u64; 2] {
    let bytes = fs::read(scene.slow.path("disk.pcache")).unwrap();
    [16, 4096 + 16].map(|at| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()))
}

/// A second volume of the cache, before the disk `other`.
fn second_volume(scene: &mut Scene, in_order: bool) {
    scene.make_disk("other");
    let mut life = scene.try_life("cache", "other", "second").unwrap();
    scene.write(&mut life, 0..64);
    scene.drain(&life);
    if in_order { life.end() } else { drop(life) }
}

fn swap(scene: &Scene) {
    rename(scene, "disk", "third");
    rename(scene, "other", "disk");
    rename(scene, "third", "other");
}

fn check(row: &Row, number: usize) {
    let all = std::env::var_os("PCACHE_IDENTITY_ALL").is_some();
    let mut scene = Scene::new(row.sidecar);
    (row.done)(&mut scene);
    let words = match row.verdict {
        Fits => return fits(row, &scene),
        Refused(words) | RefusedLater(words) => words,
    };
    refuses(row, &scene, words);
    for (index, keep) in row.keeps.iter().enumerate() {
        if all || index == number % row.keeps.len() {
            let mut scene = Scene::new(row.sidecar);
            (row.done)(&mut scene);
            resolves(row, &scene, *keep);
        }
    }
}

fn fits(row: &Row, scene: &Scene) {
    let disk = scene.disk_bytes("disk");
    let expected = scene.view("vm", &disk, Kept::All);
    for again in 0..2 {
        let mut life =
            scene.try_life("cache", "disk", "vm").unwrap_or_else(|e| panic!("{}: refused: {e}", row.what));
        assert!(life.read_all(disk.len()) == expected, "{}, start {again}: other bytes are read", row.what);
        life.end();
    }
}

/// Everything but the image of the cache.
fn content(scene: &Scene, with_cache: bool) -> BTreeMap<PathBuf, String> {
    let mut all = scene.slow.snapshot();
    // Making the socket's lock file and removing it again is no change.
    all.retain(|_, what| what != "directory");
    if with_cache {
        all.extend(scene.fast.content());
    }
    all
}

/// What `check` says of the volumes.
fn volumes(scene: &Scene) -> Vec<String> {
    let ran = run(&["check", "--cache", &scene.cache()]);
    assert_eq!(ran.code, 0, "{}", ran.out);
    ran.out.lines().filter(|line| line.starts_with("volume")).map(str::to_owned).collect()
}

fn start_args(scene: &Scene) -> Vec<String> {
    let socket = format!("--socket={}", scene.fast.path("s.sock"));
    let cache = format!("--cache={}", scene.cache());
    let mut args = vec![socket, cache, format!("--backing={}", scene.disk())];
    args.extend(["--assume-dax", "--name=vm", "--queues=1"].map(str::to_owned));
    args.extend(scene.sidecar.map(|on| format!("--sidecar={on}")));
    args
}

fn refuses(row: &Row, scene: &Scene, words: &[&str]) {
    let with_cache = matches!(row.verdict, Refused(_));
    let (before, rows) = (content(scene, with_cache), volumes(scene));
    let args = start_args(scene);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    for _ in 0..2 {
        let ran = run(&args);
        let sentence = ran.err.trim_end().lines().last().unwrap_or_default();
        assert_eq!(ran.code, 1, "{}: {}{}", row.what, ran.out, ran.err);
        for word in words {
            assert!(sentence.contains(word), "{}: `{word}` is not in: {sentence}", row.what);
        }
        assert!(sentence.starts_with("pcache-vhost: volume `vm` on cache "), "{}: {sentence}", row.what);
        assert_eq!(content(scene, with_cache), before, "{}: the refusal has changed something", row.what);
        assert_eq!(volumes(scene), rows, "{}: the refusal has changed what is cached", row.what);
    }
    // The verb says the same, of a volume that there is.
    if rows.iter().any(|row| row.contains(" vm:")) {
        let ran = run(&resolve_args(scene, &[]).iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(ran.code, 0, "{}: {}", row.what, ran.err);
        assert!(words.iter().all(|word| ran.out.contains(word)), "{}: {}", row.what, ran.out);
        assert_eq!(content(scene, false), content(scene, false), "{}", row.what);
        assert_eq!(volumes(scene), rows, "{}: the look has changed what is cached", row.what);
    }
}

fn resolve_args(scene: &Scene, more: &[&str]) -> Vec<String> {
    let (cache, disk) = (scene.cache(), scene.disk());
    let args = ["resolve", "--cache", &cache, "--backing", &disk, "--name=vm", "--assume-dax"];
    args.iter().chain(more).map(|arg| (*arg).to_owned()).collect()
}

fn resolves(row: &Row, scene: &Scene, keep: Kept) {
    let what = format!("{}, kept {keep:?}", row.what);
    let resolve =
        |more: &[&str]| run(&resolve_args(scene, more).iter().map(String::as_str).collect::<Vec<_>>());
    let disk = scene.disk_bytes("disk");
    let grown = disk.len() > BLOCKS as usize * BLOCK;
    let statement = scene.fast.path("statement");
    match keep {
        Kept::Nothing => {
            let unwritten: Vec<_> = scene.models["vm"].blocks.iter().filter(|(_, block)| block.1).collect();
            if !unwritten.is_empty() {
                let before = (content(scene, false), volumes(scene));
                let ran = resolve(&["--keep=none"]);
                assert_eq!((ran.code, ran.err.contains("--accept-loss")), (1, true), "{what}: {}", ran.err);
                assert_eq!(
                    (content(scene, false), volumes(scene)),
                    before,
                    "{what}: changed without consent"
                );
            }
            let ran = resolve(&["--keep=none", "--accept-loss", "--statement", &statement]);
            assert_eq!(ran.code, 0, "{what}: {}", ran.err);
            let written = fs::read_to_string(&statement).unwrap();
            let lost: u64 = unwritten.len() as u64 * 8;
            let listed: u64 = written.lines().filter_map(listed_sectors).sum();
            assert_eq!(listed, lost, "{what}: the statement says\n{written}");
            assert!(ran.out.contains(written.trim_end()), "{what}: {}", ran.out);
        }
        kept => {
            let keep = if kept == Kept::All { "--keep=all" } else { "--keep=dirty" };
            let more: &[&str] = if grown { &[keep, "--grow"] } else { &[keep] };
            let ran = resolve(more);
            assert_eq!(ran.code, 0, "{what}: {}", ran.err);
        }
    }
    let mut expected = scene.view("vm", &disk, keep);
    expected.truncate(disk.len());
    for again in 0..2 {
        let mut life =
            scene.try_life("cache", "disk", "vm").unwrap_or_else(|e| panic!("{what}: refused: {e}"));
        assert!(life.read_all(disk.len()) == expected, "{what}, start {again}: other bytes are read");
        if again == 0 { drop(life) } else { life.end() }
    }
    let sidecar = fs::exists(scene.slow.path("disk.pcache")).unwrap();
    assert!(sidecar || scene.sidecar != Some(true), "{what}: no sidecar any more");
}

/// Sectors of a line `lost    sectors 8..16` of a statement.
fn listed_sectors(line: &str) -> Option<u64> {
    let (start, end) = line.strip_prefix("lost    sectors ")?.split_once("..")?;
    Some(end.parse::<u64>().unwrap() - start.parse::<u64>().unwrap())
}

fn check_all(rows: &[Row]) {
    let _alone = alone();
    for (number, row) in rows.iter().enumerate() {
        check(row, number);
    }
}

#[test]
fn after_an_orderly_end_a_pair_is_accepted_exactly_if_neither_has_changed() {
    check_all(&[
        Row { what: "untouched", sidecar: None, done: rested, verdict: Fits, keeps: ANY },
        Row {
            what: "one block written by somebody",
            sidecar: None,
            done: |s| {
                rested(s);
                s.write_behind("disk", 1500..1501, NOW);
            },
            verdict: CHANGED,
            keeps: ANY,
        },
        Row {
            what: "touched",
            sidecar: None,
            done: |s| {
                rested(s);
                set_modified(&s.disk(), std::time::SystemTime::now());
            },
            verdict: CHANGED,
            keeps: &[Kept::All],
        },
        Row {
            what: "renamed there and back, linked, and its mode changed",
            sidecar: None,
            done: |s| {
                rested(s);
                rename(s, "disk", "else");
                fs::hard_link(s.slow.path("else"), s.disk()).unwrap();
                fs::set_permissions(s.disk(), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
            },
            verdict: Fits,
            keeps: ANY,
        },
        Row {
            what: "reached by a symbolic link",
            sidecar: None,
            done: |s| {
                rested(s);
                rename(s, "disk", "else");
                std::os::unix::fs::symlink(s.slow.path("else"), s.disk()).unwrap();
            },
            verdict: Fits,
            keeps: ANY,
        },
        Row {
            what: "a copy with its times in its place",
            sidecar: None,
            done: |s| {
                rested(s);
                s.replace("disk", "disk", true);
            },
            verdict: Fits,
            keeps: ANY,
        },
        Row {
            what: "a copy without its times in its place",
            sidecar: None,
            done: |s| {
                rested(s);
                s.replace("disk", "disk", false);
            },
            verdict: Refused(&["has changed since", "looks like a copy", "pcache-vhost resolve"]),
            keeps: &[Kept::All, Kept::Dirty],
        },
        Row {
            what: "another disk in its place",
            sidecar: None,
            done: |s| {
                rested(s);
                s.make_disk("other");
                s.write_behind("other", 0..BLOCKS, NOW);
                s.replace("disk", "other", true);
            },
            verdict: OTHER_DISK,
            keeps: OTHER,
        },
        Row {
            what: "the disks of two volumes exchanged",
            sidecar: None,
            done: |s| {
                rested(s);
                second_volume(s, true);
                swap(s);
            },
            verdict: OTHER_DISK,
            keeps: OTHER,
        },
        Row {
            what: "grown",
            sidecar: None,
            done: |s| {
                rested(s);
                resize(s, BLOCKS + 512);
            },
            verdict: Refused(&["10485760 bytes, but volume `vm`", "8388608", "resolve --grow"]),
            keeps: &[Kept::All, Kept::Dirty, Kept::Nothing],
        },
        Row {
            what: "shrunk",
            sidecar: None,
            done: |s| {
                rested(s);
                resize(s, BLOCKS / 2);
            },
            verdict: Refused(&["4194304 bytes, but volume `vm`", "8388608"]),
            keeps: NONE,
        },
        Row {
            what: "a snapshot of the disk put back with its times",
            sidecar: None,
            done: |s| {
                with_old_disk(s, true);
                put_back(s, true);
            },
            verdict: CHANGED,
            keeps: OTHER,
        },
        Row {
            what: "a snapshot of the disk put back as a new file",
            sidecar: None,
            done: |s| {
                with_old_disk(s, true);
                s.replace("disk", "old", false);
            },
            verdict: OTHER_DISK,
            keeps: OTHER,
        },
        Row {
            what: "an old copy of the cache put back",
            sidecar: None,
            done: |s| with_old_cache(s, [true, true]),
            verdict: CHANGED,
            keeps: OTHER,
        },
        Row {
            what: "both put back, of one moment",
            sidecar: None,
            done: |s| {
                s.first_life();
                s.copy("disk", "old", true);
                with_old_cache_of_now(s);
                put_back(s, true);
            },
            verdict: Fits,
            keeps: ANY,
        },
        Row {
            what: "both put back, the disk of an earlier moment",
            sidecar: None,
            done: |s| {
                with_old_disk(s, true);
                with_old_cache_of_now(s);
                put_back(s, true);
            },
            verdict: CHANGED,
            keeps: OTHER,
        },
        Row {
            what: "both put back, the cache of an earlier moment",
            sidecar: None,
            done: |s| {
                s.first_life();
                s.copy_cache("cache", "old-cache");
                let model = s.models["vm"].clone();
                s.later_life(true);
                s.copy("disk", "old", true);
                s.later_life(true);
                put_back(s, true);
                s.copy_cache("old-cache", "cache");
                s.models.insert("vm".to_owned(), model);
            },
            verdict: CHANGED,
            keeps: OTHER,
        },
        Row {
            what: "another cache used in between",
            sidecar: None,
            done: |s| {
                rested(s);
                use_elsewhere(s);
            },
            verdict: CHANGED,
            keeps: OTHER,
        },
    ]);
}

/// Keeps the cache as it is now, lives on, and puts it back.
fn with_old_cache_of_now(scene: &mut Scene) {
    scene.copy_cache("cache", "old-cache");
    let model = scene.models["vm"].clone();
    scene.later_life(true);
    scene.copy_cache("old-cache", "cache");
    scene.models.insert("vm".to_owned(), model);
}

#[test]
fn after_a_kill_a_pair_is_refused_as_soon_as_anything_speaks_against_it() {
    check_all(&[
        Row { what: "untouched after a kill", sidecar: None, done: died, verdict: Fits, keeps: ANY },
        Row {
            what: "renamed there and back after a kill",
            sidecar: None,
            done: |s| {
                died(s);
                rename(s, "disk", "else");
                rename(s, "else", "disk");
            },
            verdict: Fits,
            keeps: ANY,
        },
        Row {
            what: "written by somebody an hour after the kill",
            sidecar: None,
            done: |s| {
                died(s);
                s.write_behind("disk", 1500..1501, LATER);
            },
            verdict: Refused(&["do not go together", "after the server of the volume had died"]),
            keeps: ANY,
        },
        Row {
            what: "written all over at once after the kill",
            sidecar: None,
            done: |s| {
                died(s);
                s.write_behind("disk", 0..BLOCKS, NOW);
            },
            verdict: CONTENT,
            keeps: OTHER,
        },
        Row {
            what: "another cache used at once after the kill",
            sidecar: None,
            done: |s| {
                died(s);
                use_elsewhere(s);
            },
            verdict: CONTENT,
            keeps: OTHER,
        },
        Row {
            what: "a snapshot from before the start put back with its times after a kill",
            sidecar: None,
            done: |s| {
                with_old_disk(s, false);
                put_back(s, true);
            },
            verdict: CONTENT,
            keeps: OTHER,
        },
        Row {
            what: "an older snapshot of the disk put back with its times after a kill",
            sidecar: None,
            done: |s| {
                with_old_disk(s, true);
                s.later_life(false);
                put_back(s, true);
            },
            verdict: Refused(&["do not go together", "put back to an earlier state"]),
            keeps: OTHER,
        },
        Row {
            what: "a snapshot of the disk put back without its times after a kill",
            sidecar: None,
            done: |s| {
                with_old_disk(s, false);
                put_back(s, false);
            },
            verdict: CONTENT,
            keeps: OTHER,
        },
        Row {
            what: "the same content in a new file after a kill",
            sidecar: None,
            done: |s| {
                died(s);
                let before = inode(&s.disk());
                s.replace("disk", "disk", true);
                assert_ne!(inode(&s.disk()), before);
            },
            verdict: OTHER_DISK,
            keeps: &[Kept::All, Kept::Dirty, Kept::Nothing],
        },
        Row {
            what: "another file in the inode of the disk after a kill",
            sidecar: None,
            done: |s| {
                died(s);
                let (bytes, path) = (s.disk_bytes("disk"), s.disk());
                // File systems give a number out again: try until this one does.
                let before = inode(&path);
                for _ in 0..50 {
                    fs::remove_file(&path).unwrap();
                    fs::write(&path, &bytes).unwrap();
                    if inode(&path) == before {
                        return;
                    }
                }
            },
            verdict: OTHER_DISK,
            keeps: &[Kept::All, Kept::Nothing],
        },
        Row {
            what: "the disks of two volumes exchanged after a kill",
            sidecar: None,
            done: |s| {
                s.first_life();
                second_volume(s, false);
                s.later_life(false);
                swap(s);
            },
            verdict: OTHER_DISK,
            keeps: OTHER,
        },
        Row {
            what: "grown after a kill",
            sidecar: None,
            done: |s| {
                died(s);
                resize(s, BLOCKS + 8);
            },
            verdict: Refused(&["8421376 bytes, but volume `vm`", "resolve --grow"]),
            keeps: &[Kept::All, Kept::Dirty],
        },
        Row {
            what: "shrunk after a kill",
            sidecar: None,
            done: |s| {
                died(s);
                resize(s, BLOCKS - 8);
            },
            verdict: Refused(&["8355840 bytes, but volume `vm`"]),
            keeps: NONE,
        },
        Row {
            what: "a copy of the cache from before a later life that was killed",
            sidecar: None,
            done: |s| with_old_cache(s, [true, false]),
            verdict: CHANGED,
            keeps: OTHER,
        },
        Row {
            what: "a copy of the cache from after an earlier kill",
            sidecar: None,
            done: |s| with_old_cache(s, [false, false]),
            verdict: CONTENT,
            keeps: OTHER,
        },
    ]);
}

const SIDE: Option<bool> = Some(true);

#[test]
fn with_a_sidecar_what_was_restored_is_told_whatever_its_times_and_content() {
    check_all(&[
        Row { what: "with a sidecar", sidecar: SIDE, done: rested, verdict: Fits, keeps: ANY },
        Row { what: "with a sidecar, after a kill", sidecar: SIDE, done: died, verdict: Fits, keeps: ANY },
        Row {
            what: "a sidecar from the second start on",
            sidecar: None,
            done: |s| {
                s.first_life();
                s.sidecar = SIDE;
                s.later_life(true);
                assert!(fs::exists(s.slow.path("disk.pcache")).unwrap());
            },
            verdict: Fits,
            keeps: ANY,
        },
        Row {
            what: "a sidecar that nobody asked for any more stays in use",
            sidecar: SIDE,
            done: |s| {
                s.first_life();
                s.sidecar = None;
                let before = generations(s);
                s.later_life(true);
                assert!(generations(s).iter().sum::<u64>() > before.iter().sum());
            },
            verdict: Fits,
            keeps: ANY,
        },
        Row {
            what: "a sidecar that was switched off",
            sidecar: SIDE,
            done: |s| {
                s.first_life();
                s.sidecar = Some(false);
                s.later_life(true);
                assert!(!fs::exists(s.slow.path("disk.pcache")).unwrap());
            },
            verdict: Fits,
            keeps: ANY,
        },
        Row {
            what: "a sidecar that is missing",
            sidecar: SIDE,
            done: |s| {
                rested(s);
                fs::remove_file(s.slow.path("disk.pcache")).unwrap();
            },
            verdict: Refused(&["do not go together", "disk.pcache` is missing"]),
            keeps: ANY,
        },
        Row {
            what: "a disk renamed without its sidecar, after a kill",
            sidecar: SIDE,
            done: |s| {
                died(s);
                rename(s, "disk", "else");
                fs::hard_link(s.slow.path("else"), s.disk()).unwrap();
                rename(s, "disk.pcache", "else.pcache");
            },
            verdict: Refused(&["do not go together", "disk.pcache` is missing"]),
            keeps: ANY,
        },
        Row {
            what: "a sidecar with one copy damaged, the older",
            sidecar: SIDE,
            done: |s| {
                rested(s);
                let [a, b] = generations(s);
                spoil(s, if a < b { 100 } else { 4196 });
            },
            verdict: Fits,
            keeps: ANY,
        },
        Row {
            what: "a sidecar with one copy damaged, the newer",
            sidecar: SIDE,
            done: |s| {
                rested(s);
                let [a, b] = generations(s);
                spoil(s, if a > b { 100 } else { 4196 });
            },
            verdict: OLD_DISK,
            keeps: ANY,
        },
        Row {
            what: "a sidecar with both copies damaged",
            sidecar: SIDE,
            done: |s| {
                rested(s);
                spoil(s, 100);
                spoil(s, 4196);
            },
            verdict: Refused(&["do not go together", "disk.pcache` is damaged"]),
            keeps: ANY,
        },
        Row {
            what: "something else in the sidecar's place",
            sidecar: SIDE,
            done: |s| {
                rested(s);
                fs::write(s.slow.path("disk.pcache"), "a note").unwrap();
            },
            verdict: Refused(&["do not go together", "disk.pcache` cannot be read: it is something else"]),
            keeps: &[Kept::All, Kept::Dirty],
        },
        Row {
            what: "something else in the place of a sidecar that nobody needs",
            sidecar: None,
            done: |s| {
                rested(s);
                fs::write(s.slow.path("disk.pcache"), "a note").unwrap();
            },
            verdict: Fits,
            keeps: ANY,
        },
        Row {
            what: "the sidecar of another volume",
            sidecar: SIDE,
            done: |s| {
                rested(s);
                second_volume(s, true);
                rename(s, "other.pcache", "disk.pcache");
            },
            verdict: Refused(&["do not go together", "goes with volume `second` of cache"]),
            keeps: ANY,
        },
        Row {
            what: "disk and sidecar put back from before",
            sidecar: SIDE,
            done: |s| {
                with_old_disk(s, true);
                put_back(s, true);
                s.copy("old.pcache", "disk.pcache", true);
            },
            verdict: OLD_DISK,
            keeps: OTHER,
        },
        Row {
            what: "disk and sidecar put back from before a life that was killed, times as of now",
            sidecar: SIDE,
            done: |s| {
                with_old_disk(s, false);
                put_back(s, false);
                s.copy("old.pcache", "disk.pcache", false);
            },
            verdict: OLD_DISK,
            keeps: OTHER,
        },
        Row {
            what: "disk and sidecar of the middle of the life that ended in order",
            sidecar: SIDE,
            done: |s| {
                s.first_life();
                let mut life = s.life();
                s.copy("disk.pcache", "old.pcache", true);
                s.write(&mut life, 40..48);
                life.end();
                s.copy("old.pcache", "disk.pcache", true);
            },
            verdict: OLD_DISK,
            keeps: ANY,
        },
        Row {
            what: "a copy of the cache from before, after a life that only read",
            sidecar: SIDE,
            done: |s| {
                rested(s);
                s.copy_cache("cache", "old-cache");
                let time = modified(&s.disk());
                let life = s.life();
                life.end();
                set_modified(&s.disk(), time);
                s.copy_cache("old-cache", "cache");
            },
            verdict: OLD_CACHE,
            keeps: ANY,
        },
        Row {
            what: "a copy of the killed cache on another host, after this one went on",
            sidecar: SIDE,
            done: |s| with_old_cache(s, [false, false]),
            verdict: OLD_CACHE,
            keeps: OTHER,
        },
        Row {
            what: "two copies of a pair that went on apart, mixed",
            sidecar: SIDE,
            done: |s| {
                s.first_life();
                let (disk, side) = (s.disk_bytes("disk"), fs::read(s.slow.path("disk.pcache")).unwrap());
                s.copy("disk", "old", true);
                s.copy_cache("cache", "old-cache");
                let model: Model = s.models["vm"].clone();
                s.later_life(true);
                s.copy("disk", "theirs", true);
                s.copy("disk.pcache", "theirs.pcache", true);
                // The other copy goes on from the same moment, by as many steps.
                fs::write(s.disk(), disk).unwrap();
                set_modified(&s.disk(), modified(&s.slow.path("old")));
                fs::write(s.slow.path("disk.pcache"), side).unwrap();
                s.copy_cache("old-cache", "cache");
                s.models.insert("vm".to_owned(), model);
                s.later_life(true);
                s.copy("theirs", "disk", true);
                s.copy("theirs.pcache", "disk.pcache", true);
            },
            verdict: Refused(&["do not go together", "of another history than the cache"]),
            keeps: OTHER,
        },
        Row {
            what: "a sidecar that the cache does not know: it is from before",
            sidecar: None,
            done: |s| {
                s.first_life();
                s.copy_cache("cache", "old-cache");
                let (model, time) = (s.models["vm"].clone(), modified(&s.disk()));
                s.sidecar = SIDE;
                s.life().end();
                set_modified(&s.disk(), time);
                s.copy_cache("old-cache", "cache");
                s.models.insert("vm".to_owned(), model);
                s.sidecar = None;
            },
            verdict: OLD_CACHE,
            keeps: ANY,
        },
    ]);
}

#[test]
fn a_new_cache_does_not_take_a_disk_whose_sidecar_names_another() {
    let _alone = alone();
    let mut scene = Scene::new(SIDE);
    died(&mut scene);
    scene.copy_cache("cache", "first");
    fs::remove_file(scene.cache()).unwrap();
    scene.make_cache("cache");
    for sidecar in [None, SIDE] {
        scene.sidecar = sidecar;
        let before = content(&scene, true);
        let args = start_args(&scene);
        let ran = run(&args.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(ran.code, 1, "{}", ran.out);
        for word in ["goes with volume `vm` of cache", "may hold newer data", "--force-identity"] {
            assert!(ran.err.contains(word), "{}", ran.err);
        }
        assert_eq!(content(&scene, true), before);
    }
    // The first cache is not locked out by that.
    scene.copy_cache("first", "cache");
    let expected = scene.view("vm", &scene.disk_bytes("disk"), Kept::All);
    assert!(scene.life().read_all(expected.len()) == expected);
}

/// A loop device, given back when dropped; `None` where there can be none.
struct Loop(String);

impl Loop {
    fn of(file: &str) -> Option<Loop> {
        let made = Command::new("losetup").args(["--find", "--show", file]).output();
        match made {
            Ok(output) if output.status.success() => {
                Some(Loop(String::from_utf8(output.stdout).unwrap().trim().to_owned()))
            }
            failed => {
                eprintln!("SKIPPED: no loop device can be made here: {failed:?}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        assert!(Command::new("losetup").args(["-d", &self.0]).status().unwrap().success());
    }
}

#[test]
fn what_others_write_to_a_device_is_counted_and_told() {
    let _alone = alone();
    let mut scene = Scene::new(None);
    let Some(device) = Loop::of(&scene.disk()) else { return };
    let mut life = scene.try_life("cache", &device.0, "vm").unwrap();
    scene.write(&mut life, 0..64);
    scene.drain(&life);
    life.end();
    scene.try_life("cache", &device.0, "vm").unwrap().end();
    // Looking is no writing.
    assert_eq!(fs::read(&device.0).unwrap().len(), BLOCKS as usize * BLOCK);
    scene.try_life("cache", &device.0, "vm").unwrap().end();
    let file = File::options().write(true).open(&device.0).unwrap();
    file.write_all_at(&[7; BLOCK], 1500 * BLOCK as u64).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let refused = scene.try_life("cache", &device.0, "vm").err().expect("not refused");
    assert!(refused.contains("counted 8 sectors written") && refused.contains("resolve"), "{refused}");
    scene.sidecar = Some(true);
    let refused = scene.try_life("cache", &device.0, "vm").err().expect("not refused");
    assert!(refused.contains("a device, which has no place beside it"), "{refused}");
}

#[test]
fn the_verb_needs_a_volume_and_says_when_all_is_well() {
    let _alone = alone();
    let mut scene = Scene::new(None);
    rested(&mut scene);
    let (cache, disk) = (scene.cache(), scene.disk());
    let args = |more: &[&'static str]| {
        let mut args = vec!["resolve".to_owned(), format!("--cache={cache}"), "--assume-dax".to_owned()];
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        run(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let ran = args(&[]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(
        ran.out.contains(&format!("{disk} goes with it")) && ran.out.contains("64 KiB on no disk"),
        "{}",
        ran.out
    );
    let ran = args(&["--name=other", "--keep=all"]);
    assert_eq!((ran.code, ran.err.contains("no volume `other`")), (1, true), "{}", ran.err);
    assert_eq!(args(&["--grow"]).code, 2);
    second_volume(&mut scene, true);
    let ran = args(&["--keep=all"]);
    assert_eq!((ran.code, ran.err.contains("say for which of them with --name")), (2, true), "{}", ran.err);
    let empty = Place::in_memory();
    let path = empty.path("c");
    assert_eq!(run(&["format", "--cache", &path, "--cache-size=16MiB", "--assume-dax"]).code, 0);
    let ran = run(&["resolve", "--cache", &path, "--assume-dax", "--keep=all"]);
    assert_eq!((ran.code, ran.out.contains("nothing to resolve")), (0, true), "{}", ran.err);
}

#[test]
fn what_is_lost_is_written_down_before_it_is_and_never_over_another_file() {
    let _alone = alone();
    let mut scene = Scene::new(None);
    died(&mut scene);
    let file = scene.fast.file("statement", b"of an earlier loss");
    let before = (volumes(&scene), content(&scene, false));
    let args = resolve_args(&scene, &["--keep=none", "--accept-loss", "--statement", &file]);
    let ran = run(&args.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!((ran.code, ran.err.contains("nothing was changed")), (1, true), "{}", ran.err);
    assert_eq!((volumes(&scene), content(&scene, false)), before);
    assert_eq!(fs::read(&file).unwrap(), b"of an earlier loss");
}
