//! The product's build has no mutants: no word of them is in its code.

use std::process::Command;

use pcache_vhost::mutant::Mutant;

/// How many mutants' names are among these bytes.
fn names_in(bytes: &[u8]) -> usize {
    // Searching text is many times faster than searching bytes, and leaves names as they are.
    let text = String::from_utf8_lossy(bytes);
    Mutant::ALL.iter().filter(|mutant| text.contains(mutant.name())).count()
}

/// The object code in an archive as `ar` makes them: all members but the compiler's own notes about
/// the crate, which name all that its source does.
fn code_of(archive: &[u8]) -> Vec<u8> {
    let (magic, mut rest) = archive.split_at(8);
    assert_eq!(magic, b"!<arch>\n");
    let mut code = Vec::new();
    while let Some((header, after)) = rest.split_at_checked(60) {
        let size = String::from_utf8_lossy(&header[48..58]).trim().parse().expect("a member's size");
        let (member, after) = after.split_at(size);
        if !header.starts_with(b"lib.rmeta") {
            code.extend_from_slice(member);
        }
        rest = after.get(size % 2..).unwrap_or_default();
    }
    code
}

#[test]
fn the_product_is_built_without_mutants() {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // The library is all of the product but twenty lines. Not the program: other tests run it meanwhile.
    let output = Command::new(cargo)
        .args(["build", "--lib", "--quiet", "--offline", "--message-format=json"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told = String::from_utf8_lossy(&output.stdout);
    let library = told.split('"').find(|word| word.ends_with(".rlib") && word.contains("libpcache_vhost"));
    let library = std::fs::read(library.expect("cargo says what it made")).expect("the library is there");
    let code = code_of(&library);
    let is_engine = String::from_utf8_lossy(&code).contains("dirty data is damaged");
    assert!(is_engine, "this is not the engine's code");
    assert_eq!(names_in(&code), 0);
    // The search can find them: this test's own program has them.
    let with_mutants = std::fs::read(std::env::current_exe().expect("a program")).expect("it is there");
    assert_eq!(names_in(&with_mutants), Mutant::ALL.len());
}
