//! What the command line and the configuration file may say, asked of the program itself: a
//! mistake gets a sentence that says what to write, exit status 2, and changes nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod cli_support;

use cli_support::{Place, program, run};

#[test]
fn help_and_version_are_for_the_asking() {
    let help = run(&["--help"]);
    assert_eq!((help.code, help.err.as_str()), (0, ""));
    for word in [
        "--socket",
        "--cache",
        "--cache-size",
        "--backing",
        "--queues",
        "--queue-size",
        "--read-only",
        "--serial",
        "--cache-mode",
        "--data-crc",
        "--config",
        "--socket-mode",
        "--socket-group",
        "--log-level",
        "--order",
        "--discard",
        "--assume-dax",
        "--allow-volatile",
        "--force-identity",
        "--accept-loss",
        "--segment-size",
        "--block-size",
        "--backing-format",
        "--backing-size",
        "--poll-us",
        "--name",
        "--state-dir",
        "--socket-path",
        "--fd",
        "--blk-file",
        "--print-capabilities",
        "format",
        "check",
        "dump",
        "drain",
        "--control",
        "--control-group",
        "--metrics",
        "check-config",
        "status",
        "list",
        "attach",
        "detach",
        "flush",
        "set",
        "stats",
        "top",
        "explain",
        "reload",
        "Exit status",
        "SIGUSR1",
        "SIGHUP",
    ] {
        assert!(help.out.contains(word), "--help without {word}");
    }
    let version = run(&["--version"]);
    assert_eq!((version.code, version.out.starts_with("pcache-vhost ")), (0, true));
    for verb in ["format", "check", "dump", "drain"] {
        assert!(run(&[verb, "--help"]).out.contains("--cache"), "{verb}");
    }
}

#[test]
fn capabilities_are_printed_whatever_else_is_said() {
    let expected =
        "{\n  \"type\": \"block\",\n  \"features\": [\n    \"read-only\",\n    \"blk-file\"\n  ]\n}\n";
    for args in [
        &["--print-capabilities"][..],
        &["--fd=7", "--blk-file", "/nowhere", "--print-capabilities"],
        &["--print-capabilities", "--no-such-option", "--queues=none"],
    ] {
        let ran = run(args);
        assert_eq!((ran.code, ran.out.as_str(), ran.err.as_str()), (0, expected, ""), "{args:?}");
    }
}

#[test]
fn a_misspelt_option_or_verb_is_answered_with_the_right_one() {
    let place = Place::new();
    place.refuses(&["--sokcet", "/s"], 2, &["--sokcet", "--socket"]);
    place.refuses(&["--cache-sise=1GiB", "--socket=/s"], 2, &["--cache-size"]);
    place.refuses(&["fromat"], 2, &["fromat", "format"]);
    place.refuses(&["check", "--cahce", "/c"], 2, &["--cache"]);
    place.refuses(&["--socket", "/s", "--cache-mode", "writebakc"], 2, &["writebakc", "writeback"]);
}

#[test]
fn an_impossible_value_is_refused_before_anything_is_touched() {
    let place = Place::new();
    let (state, socket) = (place.path("state"), place.path("s"));
    let long = place.path(&"x".repeat(108));
    let rows: &[(&[&str], &str)] = &[
        (&["--cache-size", "lots"], "whole number with a unit"),
        (&["--cache-size", "0"], "impossible size"),
        (&["--cache-size", "4GB"], "write 4GiB"),
        (&["--cache-size", "99999999TiB"], "impossible size"),
        (&["--cache-size", "1000001"], "multiple of 4096"),
        (&["--backing-size", "1000001"], "multiple of 512"),
        (&["--backing-size", "1MiB", "--block-size", "8192"], "512 or 4096"),
        (&["--segment-size", "3MiB"], "power of two"),
        (&["--queues", "0"], "from 1 to 256"),
        (&["--queues", "257"], "from 1 to 256"),
        (&["--queue-size", "100"], "power of two from 16 to 1024"),
        (&["--poll-us=-1"], "from 0 to 10000"),
        (&["--socket-mode", "rw"], "octal"),
        (&["--serial", "more than twenty characters"], "1 to 20"),
        (&["--name", "a/b"], "not a name"),
        (&["--order", "sorted"], "strict, grouped, relaxed"),
        (&["--discard", "maybe"], "pass, keep"),
        (&["--backing-format", "qcow2"], "raw"),
        (&["--cache", ""], "empty"),
        (&["--log-level", "loud"], "info"),
        (&["--fd", "3"], "cannot be used with"),
    ];
    for (args, words) in rows {
        let mut all = vec!["--state-dir", &state, "--socket", &socket];
        all.extend_from_slice(args);
        place.refuses(&all, 2, &[words]);
    }
    place.refuses(&["--state-dir", &state, "--socket", &long], 2, &["107", "choose a shorter one"]);
    place.refuses(&["--state-dir", &state, "--fd=-3"], 2, &["-3"]);
}

#[test]
fn what_is_missing_is_asked_for() {
    let place = Place::new();
    let (cache, socket) = (place.path("c"), place.path("s"));
    place.refuses(&[], 2, &["nothing to serve", "--socket", "--fd", "--config"]);
    place.refuses(&["--socket", &socket, "--cache", &cache], 2, &["--cache needs --backing"]);
    place.refuses(&["--socket", &socket, "--cache", &cache, "--backing", &cache], 2, &["both a cache and"]);
    place.refuses(&["--socket", &socket, "--accept-loss=disk1"], 2, &["no such volume", "disk0"]);
    let ran = program(&["--socket", &socket])
        .env_remove("HOME")
        .env_remove("XDG_STATE_HOME")
        .arg("--state-dir=")
        .output()
        .unwrap();
    assert_eq!(ran.status.code(), Some(2));
}

#[test]
fn a_configuration_file_is_refused_with_line_and_column() {
    let place = Place::new();
    let cache = "[[cache]]\nname = \"c\"\npath = \"/nowhere/c\"\n";
    let volume = "[[volume]]\nname = \"v\"\nsocket = \"/nowhere/s\"\nbacking = \"/nowhere/b\"\n";
    let rows: &[(String, &[&str])] = &[
        (format!("{cache}{volume}mode == 1"), &[":8:7: "]),
        (format!("{cache}{volume}cahce = \"c\""), &[":8:1: ", "`cahce`", "did you mean `cache`?"]),
        (format!("{cache}sise = \"1GiB\"\n{volume}"), &[":4:1: ", "did you mean `size`?"]),
        (format!("{cache}size = 1073741824\n{volume}"), &[":4:8: ", "string with a unit"]),
        (format!("{cache}{volume}queues = 1000"), &[":8:10: ", "from 1 to 256"]),
        (format!("{cache}{volume}cache = \"d\""), &[":8:9: ", "no cache `d`"]),
        (format!("{cache}{volume}{volume}"), &["same name v"]),
        (cache.into(), &["no [[volume]]"]),
        (String::new(), &["no `[[cache]]`"]),
    ];
    for (text, words) in rows {
        let file = place.file("pcache.toml", text.as_bytes());
        for args in [&["--config", &file][..], &["drain", "--config", &file]] {
            let mut all = vec!["pcache.toml:"];
            all.extend_from_slice(words);
            place.refuses(args, 2, &all);
        }
    }
    let file = place.file("pcache.toml", format!("{cache}{volume}").as_bytes());
    place.refuses(&["--config", &file, "--queues", "4"], 2, &["cannot be used with"]);
    place.refuses(&["--config", &file, "--accept-loss=w"], 2, &["no such volume"]);
    place.refuses(&["--config", &place.path("missing.toml")], 2, &["missing.toml", "No such file"]);
    place.refuses(&["--config", &place.file("binary", b"\xff\xfe")], 2, &["UTF-8"]);
}
