//! `docs/protocol.md` held to its word: every feature that is offered has a row, every row a test that
//! exists.

mod client;

use std::fs;
use std::path::{Path, PathBuf};

use client::{Daemon, Req, Wire, Workspace};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The cells of each row of the document's tables, headings left out.
fn rows() -> Vec<(String, Vec<String>)> {
    let text = fs::read_to_string(root().join("docs/protocol.md")).expect("the document is there");
    let mut rows = Vec::new();
    let mut section = String::new();
    let mut is_heading = true;
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            section = title.to_owned();
        }
        let Some(row) = line.strip_prefix('|').and_then(|row| row.strip_suffix('|')) else {
            is_heading = true;
            continue;
        };
        if row.starts_with("---") {
            is_heading = false;
        } else if !is_heading {
            rows.push((section.clone(), row.split('|').map(|cell| cell.trim().to_owned()).collect()));
        }
    }
    rows
}

/// All Rust code of the tree that may hold tests.
fn code() -> String {
    let mut todo: Vec<PathBuf> = ["src", "tests", "integration"].map(|folder| root().join(folder)).into();
    let mut code = String::new();
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            todo.extend(fs::read_dir(&path).expect("a folder").map(|entry| entry.expect("an entry").path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            code += &fs::read_to_string(&path).expect("a source file");
        }
    }
    code
}

#[test]
fn every_row_names_tests_and_every_test_it_names_exists() {
    let (rows, code) = (rows(), code());
    assert!(rows.len() > 30, "only {} rows were found", rows.len());
    let mut complaints = Vec::new();
    for (_, cells) in &rows {
        let names: Vec<&str> = cells[cells.len() - 1].split('`').skip(1).step_by(2).collect();
        if names.is_empty() {
            complaints.push(format!("no test: {}", cells[0]));
        }
        let missing = names.into_iter().filter(|name| !code.contains(&format!("#[test]\nfn {name}()")));
        let missing = missing.filter(|name| !code.contains(&format!("    #[test]\n    fn {name}()")));
        complaints.extend(missing.map(|name| format!("{}: there is no test {name}", cells[0])));
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn the_features_said_to_be_supported_are_the_features_offered() {
    let mut offered = [0, 0];
    // A read-only disk offers one thing that no other does, and lacks two that others have.
    for more in [&[][..], &["--read-only"][..]] {
        let workspace = Workspace::new();
        let daemon = Daemon::cached(&workspace, "64MiB", 1 << 24, 1, more);
        let wire = Wire::connect(daemon.socket(), std::time::Duration::from_secs(20));
        offered[0] |= wire.get_u64(Req::GetProtocolFeatures);
        offered[1] |= wire.get_u64(Req::GetFeatures);
    }
    let mut said = [0, 0];
    for (section, cells) in rows() {
        let table = match section.as_str() {
            "Protocol features" => 0,
            "Virtio features" => 1,
            _ => continue,
        };
        if !cells[2].starts_with("no") {
            said[table] |= 1u64 << cells[1].parse::<u32>().expect("a bit");
        }
    }
    assert_eq!(said, offered, "{said:x?} are said to be supported, {offered:x?} are offered");
}
