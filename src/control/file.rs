//! The configuration file: TOML with one `[[cache]]` per cache and one `[[volume]]` per VM disk.
//!
//! The file is walked by hand rather than derived, for its errors' sake: every refusal names file,
//! line and column, values are parsed by the very functions of the command line, and the keys that
//! exist are exactly those that were asked for, so a suggestion can never name one that does not.

mod section;

use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::DeTable;

use self::section::Section;
use super::config::{
    BackingConfig, BackingFormat, CacheConfig, Config, ConfigError, Confinement, Consents, ControlConfig,
    DEFAULT_SCRUB_INTERVAL_H, DEFAULT_SCRUB_MIB_S, Endpoint, VolumeConfig,
};
use super::share::{self, ShareArgs};
use super::suggest;
use super::threads::{self, ThreadArgs, ThreadsConfig};
use super::value::{self, Name, ValueError};
use crate::tools::image::Sizing;
use crate::tools::members::CachePaths;

/// Why a file was refused.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It could not be read.
    #[error("configuration {}: {source}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Something at a place in it.
    #[error("{}:{line}:{column}: {what}", .path.display())]
    At {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// What is wrong there.
        what: Box<Complaint>,
    },
    /// What it says does not fit together.
    #[error("{}: {source}", .path.display())]
    Together {
        /// The file.
        path: PathBuf,
        /// What.
        source: Box<ConfigError>,
    },
}

/// What is wrong at a place of a file.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Complaint {
    /// Not TOML.
    #[error("{0}")]
    Syntax(String),
    /// A key that does not exist.
    #[error("unknown key `{key}` in {section}{}", .nearest.map_or(String::new(), |near| format!(": did you mean `{near}`?")))]
    UnknownKey {
        /// The key.
        key: String,
        /// Where.
        section: &'static str,
        /// What may have been meant.
        nearest: Option<&'static str>,
    },
    /// A key that must be there.
    #[error("{section} has no `{key}`")]
    Missing {
        /// The key.
        key: &'static str,
        /// Where.
        section: &'static str,
    },
    /// A value of the wrong type.
    #[error("`{key}` is {found}, it must be {expected}")]
    Type {
        /// The key.
        key: &'static str,
        /// What is there.
        found: &'static str,
        /// What should be.
        expected: &'static str,
    },
    /// A value that is impossible.
    #[error("`{key}`: {source}")]
    Value {
        /// The key.
        key: &'static str,
        /// Why.
        source: ValueError,
    },
    /// A cache that does not exist.
    #[error("there is no cache `{given}`{}", .nearest.as_ref().map_or(String::new(), |near| format!(": did you mean `{near}`?")))]
    NoSuchCache {
        /// What was written.
        given: String,
        /// What may have been meant.
        nearest: Option<String>,
    },
    /// One device and several.
    #[error("this [[cache]] has `path` and `paths`: write one device as `path`, several as `paths`")]
    PathAndPaths,
    /// Several caches and a volume that names none.
    #[error("this [[volume]] must say its `cache`: there are {0}")]
    WhichCache(usize),
}

/// Reads and checks the file at `path`.
///
/// # Errors
/// The first thing wrong with it.
pub fn load(path: &Path, consents: &Consents) -> Result<Config, FileError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| FileError::Unreadable { path: path.into(), source })?;
    parse(path, &text, consents)
}

/// Checks the content of the file at `path`, which is only named.
///
/// # Errors
/// The first thing wrong with it.
pub fn parse(path: &Path, text: &str, consents: &Consents) -> Result<Config, FileError> {
    let at = |Fault(span, what): Fault| {
        let (line, column) = position(text, span.start);
        FileError::At { path: path.into(), line, column, what: Box::new(what) }
    };
    let Sections { caches, volumes, control, confinement } = sections(text).map_err(at)?;
    let mut config = Config::controlled(caches, volumes, consents, control)
        .map_err(|source| FileError::Together { path: path.into(), source: Box::new(source) })?;
    config.set_confinement(confinement);
    Ok(config)
}

/// What is wrong, and where in the text.
struct Fault(Range<usize>, Complaint);

/// The volume that `text`, the inside of a [[volume]], describes, in front of one of `caches`.
///
/// # Errors
/// The first thing wrong with it.
pub fn parse_volume(text: &str, caches: &[CacheConfig]) -> Result<VolumeConfig, Complaint> {
    let table = table(text).map_err(|Fault(_, what)| what)?;
    volume(Section::new("the volume", 0..0, table.get_ref()), caches).map_err(|Fault(_, what)| what)
}

fn table(text: &str) -> Result<Spanned<DeTable<'_>>, Fault> {
    DeTable::parse(text).map_err(|error| {
        let message = error.message().replace('\n', ", ");
        Fault(error.span().unwrap_or(0..0), Complaint::Syntax(message))
    })
}

struct Sections {
    caches: Vec<CacheConfig>,
    volumes: Vec<VolumeConfig>,
    control: Option<ControlConfig>,
    confinement: Confinement,
}

fn sections(text: &str) -> Result<Sections, Fault> {
    let document = table(text)?;
    let mut top = Section::new("the file", 0..0, document.get_ref());
    let caches = top.sections("cache", "[[cache]]")?;
    let volumes = top.sections("volume", "[[volume]]")?;
    let control = top.section("control", "[control]")?;
    let sandbox = top.text("sandbox", value::choice)?.unwrap_or_default();
    let paths = top.texts("sandbox_paths", value::path)?;
    top.finish()?;
    let control = control.map(control_of).transpose()?;
    let caches = caches.into_iter().map(cache).collect::<Result<Vec<_>, _>>()?;
    if caches.is_empty() {
        return Err(Fault(0..0, Complaint::Missing { key: "[[cache]]", section: "the file" }));
    }
    let volumes =
        volumes.into_iter().map(|section| volume(section, &caches)).collect::<Result<Vec<_>, _>>()?;
    Ok(Sections { caches, volumes, control, confinement: Confinement { sandbox, paths, is_told: false } })
}

fn control_of(mut section: Section<'_>) -> Result<ControlConfig, Fault> {
    let socket = section.text("socket", str::parse)?;
    let mode = section.text("socket_mode", value::file_mode)?;
    let group = section.text("socket_group", |text| Ok(text.to_owned()))?;
    let metrics = section.text("metrics", value::loopback)?;
    let socket = section.required("socket", socket)?;
    section.finish()?;
    let control = ControlConfig::new(socket);
    Ok(ControlConfig { mode: mode.unwrap_or(control.mode), group, metrics, ..control })
}

fn cache(mut section: Section<'_>) -> Result<CacheConfig, Fault> {
    let name = section.text("name", str::parse)?;
    let path = section.text("path", value::path)?;
    let paths = section.texts("paths", value::path)?;
    let size = section.size("size", value::cache_size)?;
    let segment_size = section.size("segment_size", value::segment_size)?;
    let assume_dax = section.flag("assume_dax")?;
    let allow_volatile = section.flag("allow_volatile")?;
    let scrub_mib_s = section.number("scrub_mib_s", value::scrub_mib_s)?;
    let scrub_interval_h = section.number("scrub_interval_h", value::scrub_interval_h)?;
    let index_memory_max = section.size("index_memory_max", value::index_memory_max)?.unwrap_or(0);
    let name = section.required("name", name)?;
    let path = match (path, CachePaths::new(paths)) {
        (Some(_), Some(_)) => return Err(Fault(section.at, Complaint::PathAndPaths)),
        (None, Some(paths)) => paths,
        (path, None) => section.required("path", path)?.into(),
    };
    section.finish()?;
    let size = size.map_or(Sizing::AsFound, Sizing::Exactly);
    let scrub_mib_s = scrub_mib_s.unwrap_or(DEFAULT_SCRUB_MIB_S);
    let scrub_interval_h = scrub_interval_h.unwrap_or(DEFAULT_SCRUB_INTERVAL_H);
    Ok(CacheConfig {
        name,
        path,
        size,
        segment_size,
        assume_dax,
        allow_volatile,
        scrub_mib_s,
        scrub_interval_h,
        index_memory_max,
    })
}

fn threads(section: &mut Section<'_>) -> Result<ThreadsConfig, Fault> {
    let args = ThreadArgs {
        poll: section.text("poll", value::choice)?,
        poll_us: section.number("poll_us", value::poll_us)?,
        poll_cpu_percent: section.number("poll_cpu_percent", threads::percent)?,
        queue_threads: section.number("queue_threads", threads::threads)?,
        thread_group: section.text("thread_group", str::parse)?,
        cpus: section.text("cpus", str::parse)?,
    };
    Ok(ThreadsConfig::from(args))
}

fn volume(mut section: Section<'_>, caches: &[CacheConfig]) -> Result<VolumeConfig, Fault> {
    let name = section.text("name", str::parse::<Name>)?;
    let cache = section.located("cache")?;
    let socket = section.text("socket", str::parse)?;
    let socket_mode = section.text("socket_mode", value::file_mode)?;
    let socket_group = section.text("socket_group", |text| Ok(text.to_owned()))?;
    let backing = section.text("backing", value::path)?;
    let format = section.text("backing_format", value::choice::<BackingFormat>)?;
    let backing_size = section.size("backing_size", value::disk_size)?;
    let queues = section.number("queues", value::queues)?;
    let queue_size = section.number("queue_size", value::queue_size)?;
    let mode = section.text("mode", value::choice)?;
    let order = section.text("order", value::choice)?;
    let group = section.text("group", str::parse)?;
    let redo = section.text("redo", value::path)?;
    let redo_size = section.size("redo_size", value::disk_size)?;
    let max_lag_s = section.number("max_lag_s", value::max_lag_s)?;
    let max_dirty = section.size("max_dirty", value::disk_size)?;
    let share = share(&mut section)?;
    let data_crc = section.flag("data_crc")?;
    let block_size = section.number("block_size", value::block_size)?;
    let read_only = section.flag("read_only")?;
    let serial = section.text("serial", str::parse)?;
    let discard = section.text("discard", value::choice)?;
    let on_backing_error = section.text("on_backing_error", value::choice)?;
    let backing_timeout_s = section.number("backing_timeout_s", value::timeout_s)?;
    let admission = section.text("admission", value::choice)?;
    let cutoff = section.size("sequential_cutoff", value::sequential_cutoff)?;
    let threads = threads(&mut section)?;
    let sidecar = section.choice("sidecar")?;

    let name = section.required("name", name)?;
    let path = section.required("socket", socket)?;
    let backing = section.required("backing", backing)?;
    let cache = which_cache(cache, caches, &section.at)?;
    section.finish()?;

    let endpoint = Endpoint::socket(path, socket_mode, socket_group);
    let raw = format == Some(BackingFormat::Raw);
    let size = backing_size.map_or(Sizing::AsFound, Sizing::Exactly);
    let mut volume = VolumeConfig::new(name, cache, endpoint, BackingConfig { path: backing, raw, size });
    volume.queues = queues.unwrap_or(volume.queues);
    volume.queue_size = queue_size.unwrap_or(volume.queue_size);
    volume.mode = mode.unwrap_or(volume.mode);
    volume.order = order.unwrap_or(volume.order);
    volume.group = group;
    volume.redo = redo;
    volume.redo_size = redo_size;
    volume.max_lag_s = max_lag_s.unwrap_or(volume.max_lag_s);
    volume.max_dirty = max_dirty.unwrap_or(volume.max_dirty);
    volume.share = share.applied_to(volume.share);
    volume.data_crc = data_crc;
    volume.block_size = block_size;
    volume.read_only = read_only;
    volume.serial = serial.unwrap_or(volume.serial);
    volume.discard = discard.unwrap_or(volume.discard);
    volume.on_backing_error = on_backing_error.unwrap_or(volume.on_backing_error);
    volume.backing_timeout_s = backing_timeout_s.unwrap_or(volume.backing_timeout_s);
    volume.admission = admission.unwrap_or(volume.admission);
    volume.sequential_cutoff = cutoff.unwrap_or(volume.sequential_cutoff);
    volume.threads = threads;
    volume.sidecar = sidecar;
    Ok(volume)
}

/// What a volume may hold of the cache, and ask for.
fn share(section: &mut Section<'_>) -> Result<ShareArgs, Fault> {
    Ok(ShareArgs {
        cache_min: section.size("cache_min", share::size_or_none)?,
        cache_max: section.size("cache_max", share::size_or_none)?,
        weight: section.number("weight", share::weight)?,
        gc_percent: section.number("gc_percent", share::gc_percent)?,
        iops: section.number("iops", share::iops)?,
        read_iops: section.number("read_iops", share::iops)?,
        write_iops: section.number("write_iops", share::iops)?,
        bytes_per_s: section.size("bytes_per_s", share::size_or_none)?,
        read_bytes_per_s: section.size("read_bytes_per_s", share::size_or_none)?,
        write_bytes_per_s: section.size("write_bytes_per_s", share::size_or_none)?,
        burst_ms: section.number("burst_ms", share::burst_ms)?,
    })
}

fn which_cache(
    given: Option<(&str, Range<usize>)>,
    caches: &[CacheConfig],
    volume: &Range<usize>,
) -> Result<usize, Fault> {
    let names = || caches.iter().map(|cache| cache.name.as_str());
    match given {
        None if caches.len() == 1 => Ok(0),
        None => Err(Fault(volume.clone(), Complaint::WhichCache(caches.len()))),
        Some((name, span)) => names().position(|candidate| candidate == name).ok_or_else(|| {
            let nearest = suggest::nearest(name, names()).map(str::to_owned);
            Fault(span, Complaint::NoSuchCache { given: name.into(), nearest })
        }),
    }
}

/// Line and column, both from 1, of a byte of the text.
fn position(text: &str, byte: usize) -> (usize, usize) {
    let before = &text[..text.floor_char_boundary(byte)];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = r#"
[[cache]]
name = "pmem"
path = "/mnt/pmem/cache.img"
size = "64GiB"
segment_size = "16MiB"
assume_dax = true
allow_volatile = true
scrub_mib_s = 7
scrub_interval_h = 8
index_memory_max = "256MiB"

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
data_crc = true
block_size = 4096
read_only = true
serial = "WEB-1"
discard = "keep"
on_backing_error = "error"
backing_timeout_s = 0
admission = "never"
sequential_cutoff = "0"
cache_min = "1GiB"
cache_max = "2GiB"
weight = 300
gc_percent = 70
iops = 1
read_iops = 2
write_iops = 3
bytes_per_s = "4KiB"
read_bytes_per_s = "8KiB"
write_bytes_per_s = "12KiB"
burst_ms = 7
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

    fn read(text: &str) -> Result<Config, FileError> {
        parse(Path::new("pcache.toml"), text, &Consents::default())
    }

    #[test]
    fn every_key_reaches_its_field() {
        use super::super::config::{Admission, Discard, Mode, OnBackingError, Order};
        let config = read(WHOLE).unwrap();
        let cache = &config.caches()[0];
        assert_eq!((cache.name.as_str(), cache.size), ("pmem", Sizing::Exactly(64 << 30)));
        assert_eq!(cache.segment_size, Some(16 << 20));
        assert!(cache.assume_dax && cache.allow_volatile);
        assert_eq!((cache.scrub_mib_s, cache.scrub_interval_h), (7, 8));
        assert_eq!(cache.index_memory_max, 256 << 20);
        let web = &config.volumes()[0];
        let endpoint =
            Endpoint::socket("/run/pcache/web.sock".parse().unwrap(), Some(0o640), Some("kvm".into()));
        assert_eq!(web.endpoint, endpoint);
        let backing = BackingConfig { path: "/dev/vg/web".into(), raw: true, size: Sizing::Exactly(8 << 30) };
        assert_eq!(web.backing, backing);
        assert_eq!((web.queues, web.queue_size), (4, 64));
        let threads = ThreadsConfig {
            poll: threads::Poll::Fixed,
            poll_us: 16,
            poll_cpu_percent: 25,
            queue_threads: 2,
            thread_group: Some("blue".parse().unwrap()),
            cpus: "0-1".parse().unwrap(),
        };
        assert_eq!(web.threads, threads);
        assert_eq!((web.mode, web.order, web.discard), (Mode::Writethrough, Order::Relaxed, Discard::Keep));
        assert_eq!((web.on_backing_error, web.backing_timeout_s), (OnBackingError::Error, 0));
        assert_eq!((web.admission, web.sequential_cutoff), (Admission::Never, 0));
        let (shares, limits) = (web.share.shares, web.share.limits);
        assert_eq!((shares.min, shares.max, shares.weight), (1 << 30, 2 << 30, 300));
        assert_eq!((shares.gc_percent, limits.burst_ms), (Some(70), 7));
        assert_eq!((limits.iops, limits.read_iops, limits.write_iops), (1, 2, 3));
        let bytes = [limits.bytes_per_s, limits.read_bytes_per_s, limits.write_bytes_per_s];
        assert_eq!(bytes, [4096, 8192, 12_288]);
        assert!(web.data_crc && web.read_only);
        assert_eq!((web.block_size, web.serial), (Some(4096), "WEB-1".parse().unwrap()));
        let db = &config.volumes()[1];
        let endpoint = Endpoint::socket("/run/pcache/db.sock".parse().unwrap(), None, None);
        let backing = BackingConfig { path: "/dev/vg/db".into(), raw: false, size: Sizing::AsFound };
        assert_eq!(*db, VolumeConfig::new("db".parse().unwrap(), 0, endpoint, backing));
    }

    #[test]
    fn a_mistake_is_answered_with_its_place_and_what_to_write() {
        let cache = "[[cache]]\nname = \"c\"\npath = \"/c\"\n";
        let volume = "[[volume]]\nname = \"v\"\nsocket = \"/s\"\nbacking = \"/b\"\n";
        let rows = [
            ("[[cache]\n".into(), "1:9: unclosed array table, expected `]`\n"),
            (String::new(), "1:1: the file has no `[[cache]]`"),
            (cache.into(), "pcache.toml: there is no [[volume]]: nothing to serve"),
            (
                format!("{cache}{volume}[[volumes]]\n"),
                "8:3: unknown key `volumes` in the file: did you mean `volume`?",
            ),
            (
                format!("{cache}sise = \"1GiB\"\n{volume}"),
                "4:1: unknown key `sise` in [[cache]]: did you mean `size`?",
            ),
            (
                format!("{cache}{volume}queue-size = 64"),
                "8:1: unknown key `queue-size` in [[volume]]: did you mean `queue_size`?",
            ),
            (format!("{cache}{volume}colour = 1"), "8:1: unknown key `colour` in [[volume]]\n"),
            (
                format!("{cache}[[volume]]\nnmae = \"v\"\n"),
                "5:1: unknown key `nmae` in [[volume]]: did you mean `name`?",
            ),
            ("[[cache]]\nname = \"c\"\n".into(), "1:1: [[cache]] has no `path`"),
            ("[[cache]]\nname = \"c\"\npaths = []\n".into(), "1:1: [[cache]] has no `path`"),
            (
                format!("{cache}paths = [\"/d\"]\n{volume}"),
                "1:1: this [[cache]] has `path` and `paths`: write one device as `path`, several as `paths`",
            ),
            (
                "[[cache]]\nname = \"c\"\npaths = [\"/c\", 7]\n".into(),
                "3:16: `paths` is a number, it must be a list of strings",
            ),
            (
                format!("[[cache]]\nname = \"c\"\npaths = [\"/c\", \"/./c\"]\n{volume}"),
                "pcache.toml: two caches have the same path /./c: each needs its own",
            ),
            (
                format!("[[cache]]\nname = \"c\"\npaths = [\"/c\", \"/b\"]\n{volume}"),
                "pcache.toml: /b is both a cache and the backing disk of volume `v`",
            ),
            (
                format!("{cache}[[volume]]\nname = \"v\"\nbacking = \"/b\"\n"),
                "4:1: [[volume]] has no `socket`",
            ),
            (
                format!("{cache}size = 4294967296\n{volume}"),
                "4:8: `size` is a number, it must be a string with a unit, like \"4GiB\"",
            ),
            (
                format!("{cache}size = \"4GB\"\n{volume}"),
                "4:8: `size`: `4GB` has a decimal unit: sizes are in powers of two, write 4GiB",
            ),
            (format!("{cache}{volume}queues = \"4\""), "8:10: `queues` is a string, it must be an integer"),
            (format!("{cache}{volume}queues = 0"), "8:10: `queues`: `0` is not a whole number from 1 to 256"),
            (
                format!("{cache}{volume}read_only = 1"),
                "8:13: `read_only` is a number, it must be true or false",
            ),
            (
                format!("{cache}{volume}socket_mode = 600"),
                "8:15: `socket_mode` is a number, it must be a string",
            ),
            (
                format!("{cache}{volume}mode = \"writebak\""),
                "8:8: `mode`: `writebak` is none of writeback, writethrough, writearound, readonly, passthrough: did you mean writeback?",
            ),
            (format!("{cache}{volume}cache = \"pmem\""), "8:9: there is no cache `pmem`\n"),
            (
                format!("{cache}[[cache]]\nname = \"pmem\"\npath = \"/d\"\n{volume}"),
                "7:1: this [[volume]] must say its `cache`: there are 2",
            ),
            (
                format!("{cache}[[cache]]\nname = \"pmem\"\npath = \"/d\"\n{volume}cache = \"pmen\""),
                "11:9: there is no cache `pmen`: did you mean `pmem`?",
            ),
            (
                format!("{cache}{cache}{volume}cache = \"c\""),
                "pcache.toml: two caches have the same name c: each needs its own",
            ),
            (
                format!("{cache}{volume}{volume}"),
                "pcache.toml: volumes `v` and `v` have the same name v: each needs its own",
            ),
            ("cache = 1\n".into(), "1:9: `cache` is a number, it must be written as [[cache]]"),
            ("[cache]\n".into(), "1:1: `cache` is a table, it must be written as [[cache]]"),
            (format!("{cache}{volume}name = \"again\""), "8:1: duplicate key"),
        ];
        for (text, expected) in rows {
            let error = read(&text).unwrap_err().to_string();
            assert!(!error.contains('\n'), "more than one line: {error}");
            assert!(format!("{error}\n").contains(expected), "{text}\n gave: {error}\n not: {expected}");
            assert!(error.starts_with("pcache.toml:"), "{error}");
        }
    }

    #[test]
    fn several_devices_are_one_cache_in_the_order_in_which_they_are_named() {
        let text = "[[cache]]\nname = \"c\"\npaths = [\"/dev/b\", \"/dev/a\"]\n\
                    [[volume]]\nname = \"v\"\nsocket = \"/s\"\nbacking = \"/b\"\n";
        let config = read(text).unwrap();
        let path = &config.caches()[0].path;
        assert_eq!(path.all(), [PathBuf::from("/dev/b"), PathBuf::from("/dev/a")]);
        assert_eq!((path.first(), path.to_string().as_str()), (Path::new("/dev/b"), "/dev/b + /dev/a"));
    }

    #[test]
    fn no_text_makes_the_reader_panic() {
        let mut seed = 0x2545_f491_4f6c_dd1du64;
        let mut random = |below: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed % below as u64) as usize
        };
        for _ in 0..2_000 {
            let mut text = WHOLE.as_bytes().to_vec();
            for _ in 0..=random(4) {
                let at = random(text.len());
                match random(3) {
                    0 => text[at] = random(256) as u8,
                    1 => drop(text.remove(at)),
                    _ => text.insert(at, b"\"[]=.\n#0\xff"[random(9)]),
                }
            }
            drop(read(&String::from_utf8_lossy(&text)));
        }
    }

    #[test]
    fn a_place_counts_characters_from_one() {
        let text = "a\nüx\n";
        assert_eq!(position(text, 0), (1, 1));
        assert_eq!(position(text, text.find('x').unwrap()), (2, 2));
        assert_eq!(position(text, 999), (3, 1));
    }
}
