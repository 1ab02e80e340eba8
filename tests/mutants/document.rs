//! The table in `src/sim/MUTANTS.md`: its words, and that it names what there is.

use pcache_vhost::mutant::Mutant;

const TABLE: &str = include_str!("../../src/sim/MUTANTS.md");

/// Which check a violation's words come from, first match first.
const CHECKS: &[(&str, &str)] = &[
    ("panic: ", "an assertion"),
    ("audit: ", "the audit of the books"),
    ("the index points at", "the audit of the books"),
    ("is pointed at twice", "the audit of the books"),
    ("neither pointed at nor dead", "the audit of the books"),
    (", below the tail", "the audit of the books"),
    ("calls itself clean", "the audit of the books"),
    ("was attached to", "a disk that was to be refused"),
    ("nothing is told", "silent loss"),
    ("cache lost", "the disk alone"),
    ("is not attached", "service refused"),
    ("does not open", "service refused"),
    ("holds garbage", "garbage"),
    ("after a recovery and", "two recoveries compared"),
    ("never end", "a request that hangs"),
    ("failed", "a request that fails"),
    ("after a drain", "the disk after a drain"),
    ("after starts", "sectors after recovery"),
    ("after recovery", "sectors after recovery"),
    ("reopened", "sectors after a restart"),
    ("shows", "sectors while running"),
];

/// The check that noticed a violation, by what it said.
pub fn check_of(what: &str) -> &'static str {
    CHECKS.iter().find(|(words, _)| what.contains(words)).map_or("something else", |(_, check)| check)
}

#[test]
fn the_table_lists_the_mutants_that_there_are() {
    let cells = |row: &str| -> Vec<String> { row.split('|').map(|cell| cell.trim().to_owned()).collect() };
    let rows: Vec<Vec<String>> = TABLE.lines().filter(|line| line.starts_with("| `")).map(cells).collect();
    let listed: Vec<_> = rows.iter().map(|row| (row[1].clone(), row[2].clone(), row[3].clone())).collect();
    let known = |m: &Mutant| (format!("`{}`", m.name()), m.what().to_owned(), m.law().to_string());
    let known: Vec<_> = Mutant::ALL.iter().map(known).collect();
    assert_eq!(listed, known, "print the table anew: see its head");
    assert!(rows.iter().all(|row| !row[4].contains("SURVIVED") && row[6].parse::<u64>().is_ok()));
}

#[test]
fn there_are_mutants_for_every_law_that_a_simulation_can_see() {
    for law in [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12] {
        assert!(Mutant::ALL.iter().any(|m| m.law() == law), "no mutant breaks law {law}");
        assert!(TABLE.contains(&format!("\n{law}. ")), "law {law} is not told");
    }
    assert!(Mutant::ALL.len() >= 40);
}
