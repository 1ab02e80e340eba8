//! FORMAT.md and the code say the same: every table of the document is read and compared, both ways.
//!
//! A table is known by its header row. One that no test knows fails, so that nothing can be written
//! into the document that looks checked and is not.

use std::collections::BTreeMap;

use pcache_vhost::onmedia as format;

const DOCUMENT: &str = include_str!("../src/onmedia/FORMAT.md");
const FIELDS_HEAD: [&str; 5] = ["offset", "size", "field", "type", "meaning"];

/// A table with the heading it stands under.
struct Table {
    heading: String,
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

fn cells(line: &str) -> Vec<String> {
    line.trim_matches('|').split('|').map(|cell| cell.trim().to_string()).collect()
}

fn tables() -> Vec<Table> {
    let mut tables: Vec<Table> = Vec::new();
    let (mut heading, mut inside) = (String::new(), false);
    for line in DOCUMENT.lines() {
        if line.starts_with('#') {
            heading = line.trim_start_matches(['#', ' ']).to_string();
        }
        match tables.last_mut() {
            Some(table) if inside && line.starts_with('|') => {
                table.rows.extend((!line.starts_with("|---")).then(|| cells(line)));
            }
            _ if line.starts_with('|') => {
                tables.push(Table { heading: heading.clone(), head: cells(line), rows: Vec::new() });
            }
            _ => {}
        }
        inside = line.starts_with('|');
    }
    tables
}

fn unquoted(cell: &str) -> &str {
    cell.trim_matches('`')
}

/// The rows of the only table whose header row begins with `first`, as name and value.
fn pairs(first: &str) -> BTreeMap<String, String> {
    let mut found = tables().into_iter().filter(|table| table.head[0] == first);
    let table = found.next().unwrap_or_else(|| panic!("no table of {first}"));
    assert!(found.next().is_none(), "two tables of {first}");
    let count = table.rows.len();
    let pairs: BTreeMap<_, _> =
        table.rows.into_iter().map(|row| (unquoted(&row[0]).to_string(), row[1].clone())).collect();
    assert_eq!(pairs.len(), count, "a name twice in the table of {first}");
    pairs
}

fn expected(pairs: &[(&str, String)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| (name.to_string(), value.clone())).collect()
}

/// A structure's rows as the code has them, with a row for every gap.
fn rows_of(size: usize, fields: &[format::Field]) -> Vec<[String; 4]> {
    let mut rows = Vec::new();
    let mut end = 0;
    let reserve = |rows: &mut Vec<_>, from: usize, to: usize| {
        if from < to {
            rows.push([from.to_string(), (to - from).to_string(), "reserved".into(), String::new()]);
        }
    };
    for field in fields {
        reserve(&mut rows, end, field.offset);
        let name = format!("`{}`", field.name);
        rows.push([field.offset.to_string(), field.size.to_string(), name, field.kind.into()]);
        end = field.offset + field.size;
    }
    reserve(&mut rows, end, size);
    rows
}

#[test]
fn every_structure_has_its_table_and_every_field_its_row() {
    let mut documented: BTreeMap<String, Vec<[String; 4]>> = BTreeMap::new();
    for table in tables().into_iter().filter(|table| table.head == FIELDS_HEAD) {
        let rows = table.rows.iter().map(|row| {
            let [offset, size, field, kind, _] = &row[..] else { panic!("a row of {row:?}") };
            [offset, size, field, kind].map(String::clone)
        });
        let before = documented.insert(table.heading, rows.collect());
        assert!(before.is_none(), "two tables under one heading");
    }
    for (name, size, fields) in format::STRUCTURES {
        let heading = format!("`{name}`, {size} bytes");
        let rows = documented.remove(&heading).unwrap_or_else(|| panic!("no table under {heading:?}"));
        assert_eq!(rows, rows_of(*size, fields), "{name}");
    }
    assert!(documented.is_empty(), "tables of no structure: {:?}", documented.keys());
}

#[test]
fn every_code_is_listed_with_its_name() {
    for (name, codes) in format::CODES {
        let listed = pairs(name);
        let coded = codes.iter().map(|(code, text)| (code.to_string(), text.to_string())).collect();
        assert_eq!(listed, coded, "{name}");
    }
}

#[test]
fn every_constant_has_the_value_it_says() {
    let values = [
        ("PAGE", format::PAGE as u64),
        ("VERSION", format::VERSION.into()),
        ("META_SIZE", format::META_SIZE),
        ("SEGMENT_SIZE_MIN", format::SEGMENT_SIZE_MIN.into()),
        ("SEGMENT_SIZE_MAX", format::SEGMENT_SIZE_MAX.into()),
        ("SEGMENT_COUNT_MIN", format::SEGMENT_COUNT_MIN.into()),
        ("LOG_ALIGN", format::LOG_ALIGN.into()),
        ("RECORD_LEN_MAX", format::RECORD_LEN_MAX as u64),
        ("KEY_SECTORS_MAX", format::KEY_SECTORS_MAX.into()),
        ("VOLUME_SECTORS_MAX", format::VOLUME_SECTORS_MAX),
        ("LIVENESS_SECTORS", format::LIVENESS_SECTORS.into()),
        ("LIVENESS_WORD", format::LIVENESS_WORD as u64),
        ("LOST_MAX", format::LOST_MAX as u64),
        ("COUNTER_MAX", format::COUNTER_MAX),
        ("GC_PERCENT_MAX", format::GC_PERCENT_MAX.into()),
        ("GC_PERCENT_UNSET", format::GC_PERCENT_UNSET.into()),
        ("VOID_SEGMENTS", format::VOID_SEGMENTS),
        ("GENERATION_FLOOR", format::GENERATION_FLOOR),
        ("MEMBERS", format::MEMBERS),
        ("MEMBERS_MAX", format::MEMBERS_MAX as u64),
        ("MEMBER_START_MIN", format::MEMBER_START_MIN),
        ("REDO_VERSION", format::REDO_VERSION.into()),
        ("REDO_MEMBERS_MAX", format::REDO_MEMBERS_MAX as u64),
        ("REDO_SAMPLES_MAX", format::REDO_SAMPLES_MAX as u64),
    ];
    assert_eq!(pairs("constant"), expected(&values.map(|(name, value)| (name, value.to_string()))));
}

#[test]
fn every_magic_is_these_bytes() {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
    let values = [
        ("SUPERBLOCK_MAGIC", hex(&format::SUPERBLOCK_MAGIC.to_le_bytes())),
        ("START_MAGIC", hex(&format::START_MAGIC.to_le_bytes())),
        ("DESCRIPTOR_MAGIC", hex(&format::DESCRIPTOR_MAGIC.to_le_bytes())),
        ("TAIL_MAGIC", hex(&format::TAIL_MAGIC.to_le_bytes())),
        ("MEMBER_MAGIC", hex(&format::MEMBER_MAGIC.to_le_bytes())),
        ("SIDECAR_MAGIC", hex(&format::SIDECAR_MAGIC.to_le_bytes())),
        ("SEGMENT_MAGIC", hex(&format::SEGMENT_MAGIC.to_le_bytes())),
        ("RECORD_MAGIC", hex(&format::RECORD_MAGIC.to_le_bytes())),
        ("SUMMARY_MAGIC", hex(&format::SUMMARY_MAGIC.to_le_bytes())),
        ("REDO_MAGIC", hex(&format::REDO_MAGIC.to_le_bytes())),
    ];
    assert_eq!(pairs("magic"), expected(&values));
}

#[test]
fn the_example_lies_where_it_says() {
    let geometry = format::Geometry::choose(1 << 30, None).unwrap();
    let values = [
        ("superblock, copy 1", geometry.superblock(1)),
        ("start page, copy 0", geometry.start_page(0)),
        ("descriptor 0, copy 0", geometry.descriptor(0, 0)),
        ("tail 0, copy 0", geometry.tail(0, 0)),
        ("tail 254, copy 1", geometry.tail(254, 1)),
        ("segment 0", geometry.segment(0)),
        ("segment 62", geometry.segment(62)),
        ("in a segment: header, copy 1", geometry.header_offset(1).into()),
        ("in a segment: witness 0", geometry.witness_offset(0).into()),
        ("in a segment: witness 1", geometry.witness_offset(1).into()),
        ("in a segment: liveness floor, copy 0", geometry.floor_offset(0).into()),
        ("in a segment: liveness floor, copy 1", geometry.floor_offset(1).into()),
        ("in a segment: liveness words", geometry.liveness_offset().into()),
        ("in a segment: data_start", geometry.data_start().into()),
        ("in a segment: data_end", geometry.data_end().into()),
    ];
    assert_eq!(pairs("example"), expected(&values.map(|(name, value)| (name, value.to_string()))));
}

#[test]
fn no_table_is_left_unread() {
    for table in tables() {
        let first = table.head[0].as_str();
        let known = table.head == FIELDS_HEAD
            || ["constant", "magic", "example"].contains(&first)
            || format::CODES.iter().any(|(name, _)| *name == first);
        assert!(known, "nobody reads the table of {:?} under {:?}", table.head, table.heading);
    }
}
