//! What the tree promises about itself: who may use whom, how long files get, and that nothing is
//! left half done. The rules are in `src/lib.rs`'s drawing; this test is what makes them law.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::{Path, PathBuf};

/// Which modules of the crate each top-level module may use, tests excepted. `pmem::guard` is the
/// fault-safe copying of bytes, which the front end needs for guest memory and lends through `volume`; the
/// rest of `pmem` is none of their business.
const LAW: &[(&str, &[&str])] = &[
    ("units", &[]),
    ("sync", &[]),
    ("wake", &[]),
    ("mutant", &[]),
    ("onmedia", &["mutant", "units", "wake"]),
    ("pmem", &["units", "wake"]),
    ("backing", &["units", "wake"]),
    ("volume", &["pmem::guard", "units", "wake"]),
    ("cache", &["backing", "mutant", "onmedia", "pmem", "sync", "units", "volume", "wake"]),
    ("vhost", &["pmem::guard", "sync", "units", "volume", "wake"]),
    ("sim", &["backing", "cache", "onmedia", "pmem", "units", "volume", "wake"]),
    ("tools", &["backing", "cache", "onmedia", "pmem", "units", "volume", "wake"]),
    ("control", &["backing", "cache", "onmedia", "pmem", "tools", "units", "vhost", "volume", "wake"]),
    (
        "fuzz",
        &[
            "backing", "cache", "control", "onmedia", "pmem", "sim", "tools", "units", "vhost", "volume",
            "wake",
        ],
    ),
    // The map uses nothing, the program only what runs it.
    ("lib", &[]),
    ("main", &["control"]),
];

/// Longest file, lines of tests not counted.
const LINES_MAX: usize = 600;

/// Folders of Rust code.
const FOLDERS: &[&str] =
    &["src", "tests", "benches", "integration", "qemu", "cloud-hypervisor", "fuzz/fuzz_targets"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

struct Source {
    /// From the root of the tree.
    path: PathBuf,
    text: String,
}

impl Source {
    fn top_module(&self) -> String {
        let first = self.path.components().nth(1).expect("a path below src");
        Path::new(first.as_os_str()).with_extension("").display().to_string()
    }

    /// Whether the whole file is compiled for tests only.
    fn is_test_module(&self) -> bool {
        let is_tests = |part: &Path| {
            let name = part.with_extension("").display().to_string();
            name == "tests" || name == "testing" || name.ends_with("_tests")
        };
        !self.path.starts_with("src") || self.path.iter().any(|part| is_tests(Path::new(part)))
    }

    /// The lines before the tests at the end of the file, with their numbers.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let code = if self.is_test_module() { 0 } else { usize::MAX };
        self.text
            .lines()
            .enumerate()
            .map(|(index, line)| (index + 1, line))
            .take(code)
            .take_while(|(_, line)| !line.starts_with("mod tests {"))
    }
}

fn sources(folders: &[&str]) -> Vec<Source> {
    let mut todo: Vec<PathBuf> = folders.iter().map(|folder| root().join(folder)).collect();
    let mut found = Vec::new();
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            todo.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            found.push(Source { path: path.strip_prefix(root()).unwrap().into(), text });
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn complain(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

/// The lines, those of one `use` joined.
fn statements<'a>(lines: impl Iterator<Item = (usize, &'a str)>) -> Vec<(usize, String)> {
    let mut joined: Vec<(usize, String)> = Vec::new();
    let mut is_open = false;
    for (number, line) in lines {
        match joined.last_mut() {
            Some((_, statement)) if is_open => statement.push_str(line),
            _ => {
                let start = line.trim_start();
                is_open = start.starts_with("use ") || start.starts_with("pub use ");
                joined.push((number, line.to_owned()));
            }
        }
        is_open = is_open && !line.contains(';');
    }
    joined
}

/// The modules that a line uses: what follows each `crate::`, up to two names deep, braces opened.
fn uses(line: &str) -> Vec<String> {
    if line.trim_start().starts_with("//") {
        return Vec::new();
    }
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let mut found = Vec::new();
    for rest in line.split("crate::").skip(1) {
        if let Some(list) = rest.strip_prefix('{') {
            let mut depth = 1;
            let mut item = String::new();
            for c in list.chars() {
                depth += i32::from(c == '{') - i32::from(c == '}');
                match c {
                    ',' if depth == 1 => found.push(std::mem::take(&mut item)),
                    _ if depth == 0 => break,
                    c if depth == 1 && (is_name(c) || c == ':') => item.push(c),
                    _ => {}
                }
            }
            found.push(item);
            continue;
        }
        let end = rest.find(|c: char| !is_name(c) && c != ':').unwrap_or(rest.len());
        let path: Vec<&str> = rest[..end].split("::").filter(|name| !name.is_empty()).take(2).collect();
        found.push(path.join("::"));
    }
    found.retain(|path| !path.is_empty());
    found
}

/// Whether `used`, a path of one or two names, is within one of the `allowed`.
fn is_within(used: &str, allowed: &[&str]) -> bool {
    allowed.iter().any(|&module| used == module || used.starts_with(&format!("{module}::")))
}

#[test]
fn a_module_uses_only_what_lies_below_it() {
    let mut complaints = Vec::new();
    for source in sources(&["src"]) {
        let module = source.top_module();
        let path = source.path.display();
        let Some((_, allowed)) = LAW.iter().find(|(name, _)| *name == module) else {
            complaints.push(format!("{path}: module `{module}` has no place in the law (tests/tidy.rs)"));
            continue;
        };
        for (number, line) in statements(source.code()) {
            for used in uses(&line) {
                let own = used == module || used.starts_with(&format!("{module}::"));
                let is_module = LAW.iter().any(|(name, _)| is_within(&used, &[*name]));
                if is_module && !own && !is_within(&used, allowed) {
                    complaints.push(format!("{path}:{number}: `{module}` may not use `{used}`"));
                }
            }
        }
    }
    complain(&complaints);
}

#[test]
fn the_law_sees_through_every_way_to_write_a_use() {
    let rows: &[(&str, &[&str])] = &[
        ("use crate::pmem::guard::copy;", &["pmem::guard"]),
        ("use crate::{pmem, wake};", &["pmem", "wake"]),
        ("use crate::{cache::{index, Volume}, units::SECTOR};", &["cache::", "units::SECTOR"]),
        ("use crate::{ cache, control::{self}, };", &["cache", "control::"]),
        ("    let x = crate::control::run(crate::units::SECTOR);", &["control::run", "units::SECTOR"]),
        ("/// See [`crate::control`].", &[]),
        ("pub(in crate::cache) fn f() {}", &["cache"]),
        ("use super::crater;", &[]),
    ];
    for (line, expected) in rows {
        assert_eq!(uses(line), *expected, "{line}");
    }
    let lines = ["use crate::{", "    cache,", "};", "fn f() {}"].into_iter().enumerate();
    assert_eq!(statements(lines), [(0, "use crate::{    cache,};".into()), (3, "fn f() {}".into())]);
    assert!(is_within("pmem::guard", &["pmem::guard"]) && is_within("pmem::Pmem", &["pmem"]));
    assert!(!is_within("pmem::Pmem", &["pmem::guard"]) && !is_within("pmem", &["pmem::guard"]));
    assert!(!is_within("cached::x", &["cache"]));
}

#[test]
fn no_file_outgrows_a_reader() {
    let mut complaints = Vec::new();
    for source in sources(&["src"]) {
        let lines = source.code().count();
        if lines > LINES_MAX {
            complaints
                .push(format!("{}: {lines} lines without tests, at most {LINES_MAX}", source.path.display()));
        }
    }
    complain(&complaints);
}

#[test]
fn every_file_says_first_what_it_is() {
    let mut complaints = Vec::new();
    for source in sources(FOLDERS) {
        // The tests of a file, moved out of it, are about that file and under its head.
        let is_part = source.path.starts_with("src") && source.is_test_module();
        if !is_part && !source.text.starts_with("//!") && !source.text.starts_with("#![doc") {
            complaints.push(format!("{}: does not begin with `//!`", source.path.display()));
        }
    }
    complain(&complaints);
}

#[test]
fn nothing_is_left_for_later() {
    // Put together here, or this file would accuse itself.
    let marks =
        [["to", "do!("], ["unimpl", "emented!("], ["FIX", "ME"], ["XX", "X"]].map(|halves| halves.concat());
    let mut complaints = Vec::new();
    for source in sources(FOLDERS) {
        for (number, line) in source.text.lines().enumerate() {
            if let Some(mark) = marks.iter().find(|mark| line.contains(mark.as_str())) {
                complaints.push(format!("{}:{}: {mark}", source.path.display(), number + 1));
            }
        }
    }
    complain(&complaints);
}

#[test]
fn a_test_that_is_not_run_says_why() {
    let bare = ["#[ign", "ore]"].concat();
    let mut complaints = Vec::new();
    for source in sources(FOLDERS) {
        for (number, line) in source.text.lines().enumerate() {
            if line.contains(&bare) {
                complaints.push(format!("{}:{}: no reason", source.path.display(), number + 1));
            }
        }
    }
    complain(&complaints);
}

#[test]
fn unsafe_code_is_allowed_one_function_at_a_time() {
    let blanket = ["#![allow(", "unsafe_code"].concat();
    let mut complaints = Vec::new();
    for source in sources(&["src"]) {
        if source.text.contains(&blanket) {
            complaints.push(format!("{}: allows unsafe code wholesale", source.path.display()));
        }
    }
    complain(&complaints);
}
