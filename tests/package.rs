//! The Debian package: built by `dist/debian/build` from the binary under test, taken apart, and every part
//! tried as far as this host can.
//!
//! Where `dpkg-deb` or `systemd-analyze` are missing, what needs them is skipped aloud.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

const BINARY: &str = env!("CARGO_BIN_EXE_pcache-vhost");
/// Exposure that `systemd-analyze security` may find, of 10: what is left are devices, an address family
/// for metrics, and not having a root of its own.
const EXPOSURE_MAX: f64 = 2.5;

fn tree() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn has(program: &str, package: &str) -> bool {
    let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
    let found = found.is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("SKIPPED: {program} is missing (apt-get install {package})");
    }
    found
}

/// The package, and what it unpacks to. Built once.
fn package() -> Option<(&'static Path, &'static Path)> {
    static BUILT: OnceLock<Option<(PathBuf, PathBuf, tempfile::TempDir)>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        if !has("dpkg-deb", "dpkg") {
            return None;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let build = tree().join("dist/debian/build");
        let output = Command::new(build).arg(BINARY).arg(dir.path()).output().expect("bash runs");
        assert!(output.status.success(), "{}", said(&output));
        let package = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim_end());
        let root = dir.path().join("root");
        let unpacked = Command::new("dpkg-deb").arg("-R").arg(&package).arg(&root).output().expect("it runs");
        assert!(unpacked.status.success(), "{}", said(&unpacked));
        Some((package, root, dir))
    });
    built.as_ref().map(|(package, root, _)| (package.as_path(), root.as_path()))
}

fn files(root: &Path) -> BTreeSet<String> {
    let (mut todo, mut found) = (vec![root.to_path_buf()], BTreeSet::new());
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            todo.extend(
                fs::read_dir(&path).expect("a directory").map(|entry| entry.expect("an entry").path()),
            );
        } else {
            found.insert(path.strip_prefix(root).expect("below").display().to_string());
        }
    }
    found
}

#[test]
fn the_package_has_everything_and_only_what_it_says() {
    let Some((package, root)) = package() else { return };
    let found = files(root);
    for expected in [
        "usr/bin/pcache-vhost",
        "usr/lib/systemd/system/pcache-vhost.service",
        "usr/lib/systemd/system/pcache-vhost@.service",
        "usr/lib/systemd/system/pcache-vhost.socket",
        "usr/lib/systemd/system/pcache-vhost@.socket",
        "usr/lib/sysusers.d/pcache-vhost.conf",
        "usr/lib/tmpfiles.d/pcache-vhost.conf",
        "usr/lib/udev/rules.d/60-pcache-vhost.rules",
        "usr/share/qemu/vhost-user/60-pcache-vhost.json",
        "usr/share/man/man1/pcache-vhost.1.gz",
        "usr/share/man/man1/pcache-vhost-attach.1.gz",
        "usr/share/bash-completion/completions/pcache-vhost",
        "usr/share/zsh/vendor-completions/_pcache-vhost",
        "usr/share/fish/vendor_completions.d/pcache-vhost.fish",
        "usr/share/doc/pcache-vhost/guide.md",
        "usr/share/doc/pcache-vhost/copyright",
        "usr/share/doc/pcache-vhost/monitoring/alerts.json",
        "etc/pcache-vhost/config.toml",
        "DEBIAN/conffiles",
    ] {
        assert!(found.contains(expected), "{expected} is missing of {found:#?}");
    }
    let mode = |path: &str| fs::metadata(root.join(path)).expect("it is there").permissions().mode() & 0o7777;
    assert_eq!(mode("usr/bin/pcache-vhost"), 0o755);
    assert_eq!(mode("etc/pcache-vhost/config.toml"), 0o640, "names of VMs are nobody else's business");
    let checked = Command::new("md5sum").args(["-c", "--quiet", "DEBIAN/md5sums"]).current_dir(root).output();
    let checked = checked.expect("md5sum runs");
    assert!(checked.status.success(), "{}", said(&checked));
    let field = |name: &str| {
        let output = Command::new("dpkg-deb").arg("-f").arg(package).arg(name).output().expect("it runs");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    assert_eq!(field("Version"), env!("CARGO_PKG_VERSION"));
    assert!(field("Depends").starts_with("libc6 (>= 2."), "{}", field("Depends"));
    // Nobody but root owns a file of it.
    let listed = Command::new("dpkg-deb").arg("-c").arg(package).output().expect("it runs");
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.lines().all(|line| line.contains(" root/root ")), "{listed}");
}

#[test]
fn the_packaged_program_runs_its_man_pages_format_and_its_completions_parse() {
    let Some((_, root)) = package() else { return };
    let program = root.join("usr/bin/pcache-vhost");
    let version = Command::new(&program).arg("--version").output().expect("it runs");
    assert!(said(&version).contains(env!("CARGO_PKG_VERSION")));
    let config = root.join("etc/pcache-vhost/config.toml");
    let checked = Command::new(&program).arg("check-config").arg(&config).output().expect("it runs");
    assert!(checked.status.success(), "{}", said(&checked));
    let bash = root.join("usr/share/bash-completion/completions/pcache-vhost");
    let parsed = Command::new("bash").arg("-n").arg(bash).output().expect("bash runs");
    assert!(parsed.status.success(), "{}", said(&parsed));
    if has("man", "man-db") {
        for page in fs::read_dir(root.join("usr/share/man/man1")).expect("pages") {
            let page = page.expect("a page").path();
            let output =
                Command::new("man").args(["--warnings", "-l"]).arg(&page).env("MANWIDTH", "100").output();
            let output = output.expect("man runs");
            let warnings = String::from_utf8_lossy(&output.stderr).into_owned();
            // A long option does not fit the column that troff would like it in.
            let is_ugly =
                |line: &&str| line.contains("cannot adjust line") || line.contains("can't break line");
            let warnings: String = warnings.lines().filter(|line| !is_ugly(line)).collect();
            assert!(output.status.success() && warnings.is_empty(), "{}: {warnings}", page.display());
        }
    }
    let json = fs::read_to_string(root.join("usr/share/qemu/vhost-user/60-pcache-vhost.json")).expect("text");
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(
        (json["type"].as_str(), json["binary"].as_str()),
        (Some("block"), Some("/usr/bin/pcache-vhost"))
    );
}

/// A root with the package's units and those of this host, which they name.
fn root_with_units(root: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let units = dir.path().join("usr/lib/systemd/system");
    fs::create_dir_all(&units).expect("a directory");
    let copy = |from: &Path| {
        let copied = Command::new("cp").arg("-a").arg(format!("{}/.", from.display())).arg(&units).status();
        assert!(copied.expect("cp runs").success());
    };
    copy(Path::new("/usr/lib/systemd/system"));
    copy(&root.join("usr/lib/systemd/system"));
    fs::create_dir_all(dir.path().join("usr/bin")).expect("a directory");
    fs::copy(root.join("usr/bin/pcache-vhost"), dir.path().join("usr/bin/pcache-vhost")).expect("a copy");
    dir
}

#[test]
fn systemd_finds_no_fault_with_the_units_and_little_exposed() {
    let Some((_, root)) = package() else { return };
    if !has("systemd-analyze", "systemd") {
        return;
    }
    let with_units = root_with_units(root);
    let analyze = |words: &[&str]| {
        let root = format!("--root={}", with_units.path().display());
        Command::new("systemd-analyze").arg(root).args(words).output().expect("it runs")
    };
    for unit in
        ["pcache-vhost.service", "pcache-vhost@vm1.service", "pcache-vhost.socket", "pcache-vhost@vm1.socket"]
    {
        let verified = analyze(&["verify", "--man=no", unit]);
        let said = said(&verified);
        let faults: Vec<&str> = said.lines().filter(|line| line.contains("pcache-vhost")).collect();
        assert!(faults.is_empty(), "{unit}: {faults:#?}");
    }
    for unit in ["pcache-vhost.service", "pcache-vhost@.service"] {
        let judged = analyze(&["security", "--offline=true", unit]);
        let said = said(&judged);
        let level = said.lines().find_map(|line| line.split_once("exposure level for "));
        let level = level.and_then(|(_, rest)| rest.split_once(": ")).unwrap_or_else(|| panic!("{said}"));
        let number: f64 = level.1.split(' ').next().and_then(|number| number.parse().ok()).expect("a number");
        println!("{unit}: exposure {number}");
        assert!(number <= EXPOSURE_MAX, "{said}");
    }
    // A mistake is found: the test above can fail.
    let unit = with_units.path().join("usr/lib/systemd/system/pcache-vhost.service");
    let text =
        fs::read_to_string(&unit).expect("the unit").replace("ProtectSystem=strict", "ProtectSystm=strict");
    fs::write(&unit, text).expect("it can be written");
    assert!(said(&analyze(&["verify", "--man=no", "pcache-vhost.service"])).contains("ProtectSystm"));
}

/// A reload runs as the daemon's user, who has no place of his own where a control socket is by convention.
#[test]
fn a_unit_reloads_by_the_socket_in_its_own_directory() {
    for unit in ["pcache-vhost.service", "pcache-vhost@.service"] {
        let text = fs::read_to_string(tree().join("dist/systemd").join(unit)).expect("a unit");
        let of =
            |key: &str| text.lines().find_map(|line| line.strip_prefix(key)).expect("it is set").to_owned();
        let socket = format!("/run/{}/control.sock", of("RuntimeDirectory="));
        assert_eq!(of("ExecReload="), format!("/usr/bin/pcache-vhost reload --control {socket}"), "{unit}");
        if !unit.contains('@') {
            let config = fs::read_to_string(tree().join("dist/config.toml")).expect("the packaged file");
            assert!(config.contains(&format!("socket = \"{socket}\"")), "the packaged file has another one");
        }
    }
}

#[test]
fn a_template_and_its_single_sibling_differ_only_in_what_they_serve() {
    let read = |name: &str| fs::read_to_string(tree().join("dist/systemd").join(name)).expect("a unit");
    let settings = |text: String| -> Vec<String> {
        let lines = text.lines().filter(|line| line.contains('=') && !line.starts_with('#'));
        let is_of_instance = |line: &&str| {
            !["Exec", "Description", "RuntimeDirectory=", "StateDirectory=", "Condition"]
                .iter()
                .any(|key| line.starts_with(key))
        };
        lines.filter(is_of_instance).map(str::to_owned).collect()
    };
    assert_eq!(settings(read("pcache-vhost.service")), settings(read("pcache-vhost@.service")));
}

#[test]
fn the_same_binary_makes_the_same_package() {
    let Some((first, _)) = package() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let output = Command::new(tree().join("dist/debian/build"))
        .arg(BINARY)
        .arg(dir.path())
        .output()
        .expect("bash runs");
    assert!(output.status.success(), "{}", said(&output));
    let second = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim_end());
    assert!(fs::read(first).expect("a package") == fs::read(second).expect("another"), "they differ");
}
