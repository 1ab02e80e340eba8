//! The configuration file and the command line: any bytes give a configuration or one clear sentence.
//!
//! The first byte chooses: the rest as a file; a good file with changes in it; the rest as arguments,
//! separated by NULs. Nothing is opened: paths are only looked at.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use clap::Parser;

use super::Input;
use crate::control::cli::{Cli, asks_for_capabilities};
use crate::control::config::{Config, Consents};
use crate::control::exit::sentence;
use crate::control::file;

/// A good file.
const FILE: &str = r#"[[cache]]
name = "pmem"
path = "/mnt/pmem/cache.img"
size = "64GiB"
segment_size = "16MiB"
assume_dax = true

[[volume]]
name = "web"
cache = "pmem"
socket = "/run/pcache/web.sock"
socket_mode = "0640"
socket_group = "kvm"
backing = "/dev/vg/web"
backing_format = "raw"
backing_size = "8GiB"
queues = 4
queue_size = 64
mode = "writethrough"
order = "relaxed"
block_size = 4096
serial = "WEB-1"
discard = "keep"
poll = "fixed"
poll_us = 0x10
poll_cpu_percent = 25
queue_threads = 2
thread_group = "blue"
cpus = "0-1"

[[volume]]
name = "db"
socket = "/run/pcache/db.sock"
backing = "/dev/vg/db"
"#;

/// Values of the wrong kind, size or sign.
const VALUES: [&str; 16] = [
    "0",
    "-1",
    "1e400",
    "0xffffffffffffffffff",
    "\"\"",
    "\"-\"",
    "[]",
    "{}",
    "true",
    "\"18446744073709551615EiB\"",
    "1979-05-27",
    "\"\\u0000\"",
    "[[1]]",
    "nan",
    "\"\\n\"",
    "{a.b=1}",
];

/// The target.
pub fn settings(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    match input.byte() % 4 {
        0 => configure(&String::from_utf8_lossy(input.rest())),
        1 | 2 => configure(&changed(&mut input)),
        _ => command(input.rest()),
    }
}

/// A good file with lines and values replaced, doubled, moved and left away.
fn changed(input: &mut Input<'_>) -> String {
    let mut lines: Vec<String> = FILE.lines().map(str::to_owned).collect();
    for _ in 0..8 {
        if input.is_over() || lines.is_empty() {
            break;
        }
        let (choice, at) = (input.byte(), input.below(256) % lines.len());
        let value = VALUES[usize::from(choice >> 4)];
        let key = lines[at].split(" = ").next().unwrap_or_default().to_owned();
        match choice % 7 {
            0 => drop(lines.remove(at)),
            1 => lines.insert(at, lines[at].clone()),
            2 => lines[at] = format!("{key} = {value}"),
            3 => {
                let to = input.below(256) % lines.len();
                lines.swap(at, to);
            }
            4 => {
                let len = input.below(24);
                lines[at] = format!("{key} = \"{}\"", String::from_utf8_lossy(input.slice(len)));
            }
            5 => {
                let len = input.below(24);
                lines[at].push_str(&String::from_utf8_lossy(input.slice(len)));
            }
            _ => lines[at].insert(0, char::from(input.byte())),
        }
    }
    lines.join("\n")
}

fn configure(text: &str) {
    if let Err(error) = file::parse(Path::new("pcache.toml"), text, &Consents::default()) {
        judge(&sentence(&error));
    }
}

fn command(bytes: &[u8]) {
    let words: Vec<OsString> = std::iter::once(OsString::from("pcache-vhost"))
        .chain(bytes.split(|&byte| byte == 0).map(|word| OsString::from_vec(word.to_vec())))
        .collect();
    _ = asks_for_capabilities(&words);
    match Cli::try_parse_from(&words) {
        // What clap says goes over several lines, usage included.
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(cli) => {
            _ = cli.log_level();
            if let Err(error) = Config::from_args(&cli.serve, Some("/state".into())) {
                judge(&sentence(&error));
            }
        }
    }
}

/// One line, not empty, without anything that a terminal would obey, and of a length one reads.
fn judge(sentence: &str) {
    assert!(!sentence.is_empty(), "an error without words");
    assert!(!sentence.contains(char::is_control), "not one line: {sentence:?}");
    assert!(sentence.len() < 10_000, "a sentence of {} bytes", sentence.len());
}
