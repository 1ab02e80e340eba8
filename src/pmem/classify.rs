//! What survives what on a given medium: the decision, and the reading of sysfs that feeds it.
//!
//! Invariant: a medium is [`MediaClass::Dax`] only on evidence that stores reach persistent memory
//! *and* that the platform saves that memory when power goes. `MAP_SYNC` alone is no such evidence:
//! it also succeeds on plain RAM that a boot option dressed up as persistent. Every doubt makes the
//! class weaker, never stronger.

use std::fs;
use std::path::Path;

use super::MediaClass;

/// What kind of thing was opened, as far as the kernel tells.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Medium {
    /// A device of the kernel's `dax` subsystem.
    DevDax,
    /// A block device, with its name in sysfs.
    Block(String),
    /// A regular file.
    File {
        /// The file system's name if it lives in memory.
        memory_fs: Option<&'static str>,
        /// Mapping with `MAP_SHARED_VALIDATE | MAP_SYNC` succeeded.
        map_sync: bool,
        /// The file has `STATX_ATTR_DAX`.
        dax_attribute: bool,
    },
}

/// What the platform does with the memory's content when power goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum PersistenceDomain {
    /// It is kept, once it has reached what is named here.
    Known(String),
    /// Nothing says that it is kept.
    Unknown,
}

/// Why a medium is not used at all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Refusal {
    /// The block device over persistent memory: page cache over the real thing.
    RawPmem,
    /// Media that are not memory cannot be assumed to be.
    NotMemory,
}

/// A class, and one clause that says how it was recognised.
pub(super) type Verdict = Result<(MediaClass, String), Refusal>;

/// Decides. `assume_dax` is the operator's wish to use RAM as if it were persistent.
pub(super) fn classify(medium: &Medium, domain: &PersistenceDomain, assume_dax: bool) -> Verdict {
    let memory = |what: String| {
        if assume_dax {
            (MediaClass::AssumeDax, format!("{what}, used as if it were persistent memory"))
        } else {
            (MediaClass::Volatile, what)
        }
    };
    let page_cache = |what: &str| {
        if assume_dax { Err(Refusal::NotMemory) } else { Ok((MediaClass::PageCache, what.to_owned())) }
    };
    match (medium, domain) {
        (Medium::DevDax, PersistenceDomain::Known(name)) => {
            Ok((MediaClass::Dax, format!("a devdax device with persistence domain {name}")))
        }
        (Medium::DevDax, PersistenceDomain::Unknown) => {
            Ok(memory("a devdax device over memory without a persistence domain".to_owned()))
        }
        (Medium::Block(name), _) if is_numbered(name, "pmem") => Err(Refusal::RawPmem),
        (Medium::Block(name), _) if is_numbered(name, "ram") || is_numbered(name, "zram") => {
            Ok((MediaClass::Volatile, "a RAM disk".to_owned()))
        }
        (Medium::Block(_), _) => page_cache("a block device behind the page cache"),
        (Medium::File { memory_fs: Some(name), .. }, _) => Ok(memory(format!("a file in memory ({name})"))),
        (Medium::File { map_sync: true, dax_attribute: true, .. }, PersistenceDomain::Known(name)) => Ok((
            MediaClass::Dax,
            format!("a file on a DAX file system, mapped with MAP_SYNC, persistence domain {name}"),
        )),
        (Medium::File { map_sync: true, dax_attribute: true, .. }, PersistenceDomain::Unknown) => Ok(memory(
            "a file on a DAX file system over memory without a persistence domain: a power cut loses it"
                .to_owned(),
        )),
        (Medium::File { map_sync: false, dax_attribute: true, .. }, _) => {
            page_cache("a file on a DAX file system that refuses MAP_SYNC")
        }
        (Medium::File { .. }, _) => page_cache("a file behind the page cache"),
    }
}

/// Whether `name` is `prefix` and a number, or a partition or sector-mode variant of that.
fn is_numbered(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// The name of a file system that lives in memory, by its magic number (`statfs(2)`).
pub(super) fn memory_fs(magic: i64) -> Option<&'static str> {
    match magic & 0xffff_ffff {
        0x0102_1994 => Some("tmpfs"),
        0x9584_58f6 => Some("hugetlbfs"),
        0x8584_58f6 => Some("ramfs"),
        _ => None,
    }
}

/// The domain of the region that a devdax device is a part of. `device` is its directory in sysfs
/// with all links resolved; devices made of other memory (CXL RAM, soft-reserved) are in no region.
pub(super) fn domain_of_device(device: &Path) -> PersistenceDomain {
    device
        .ancestors()
        .find_map(|part| fs::read_to_string(part.join("persistence_domain")).ok())
        .map_or(PersistenceDomain::Unknown, |value| known(&value))
}

/// The weakest domain of all regions of the machine. Which of them a file lies in is not asked:
/// device-mapper may have joined several.
pub(super) fn domain_of_all_regions(sys: &Path) -> PersistenceDomain {
    let devices = fs::read_dir(sys.join("bus/nd/devices")).into_iter().flatten().flatten();
    let mut weakest = PersistenceDomain::Unknown;
    for device in devices.filter(|entry| is_numbered(&entry.file_name().to_string_lossy(), "region")) {
        let value = fs::read_to_string(device.path().join("persistence_domain")).unwrap_or_default();
        match (known(&value), &weakest) {
            (PersistenceDomain::Unknown, _) => return PersistenceDomain::Unknown,
            // Caches are outside of the memory controller's domain: the smaller one is weaker.
            (PersistenceDomain::Known(name), PersistenceDomain::Known(_)) if name == "cpu_cache" => {}
            (domain, _) => weakest = domain,
        }
    }
    weakest
}

/// The values of the kernel's attribute (`Documentation/ABI/testing/sysfs-bus-nd`).
fn known(value: &str) -> PersistenceDomain {
    match value.trim() {
        name @ ("cpu_cache" | "memory_controller") => PersistenceDomain::Known(name.to_owned()),
        _ => PersistenceDomain::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn file(memory_fs: Option<&'static str>, map_sync: bool, dax_attribute: bool) -> Medium {
        Medium::File { memory_fs, map_sync, dax_attribute }
    }

    #[test]
    fn dax_needs_map_sync_and_the_attribute_and_a_persistence_domain() {
        use MediaClass::*;
        let known = PersistenceDomain::Known("memory_controller".to_owned());
        let unknown = PersistenceDomain::Unknown;
        let block = |name: &str| Medium::Block(name.to_owned());
        let table = [
            // medium, domain, class by itself, class with assume_dax
            (file(None, true, true), &known, Ok(Dax), Ok(Dax)),
            (file(None, true, true), &unknown, Ok(Volatile), Ok(AssumeDax)),
            (file(None, false, true), &known, Ok(PageCache), Err(Refusal::NotMemory)),
            (file(None, true, false), &known, Ok(PageCache), Err(Refusal::NotMemory)),
            (file(None, false, false), &known, Ok(PageCache), Err(Refusal::NotMemory)),
            (file(None, false, false), &unknown, Ok(PageCache), Err(Refusal::NotMemory)),
            (file(Some("tmpfs"), false, false), &known, Ok(Volatile), Ok(AssumeDax)),
            (file(Some("tmpfs"), true, true), &known, Ok(Volatile), Ok(AssumeDax)),
            (file(Some("hugetlbfs"), false, false), &unknown, Ok(Volatile), Ok(AssumeDax)),
            (Medium::DevDax, &known, Ok(Dax), Ok(Dax)),
            (Medium::DevDax, &unknown, Ok(Volatile), Ok(AssumeDax)),
            (block("nvme0n1"), &known, Ok(PageCache), Err(Refusal::NotMemory)),
            (block("pmem0"), &known, Err(Refusal::RawPmem), Err(Refusal::RawPmem)),
            (block("pmem12p1"), &unknown, Err(Refusal::RawPmem), Err(Refusal::RawPmem)),
            (block("pmem0s"), &unknown, Err(Refusal::RawPmem), Err(Refusal::RawPmem)),
            (block("pmemory"), &unknown, Ok(PageCache), Err(Refusal::NotMemory)),
            (block("ram0"), &unknown, Ok(Volatile), Ok(Volatile)),
            (block("zram1"), &unknown, Ok(Volatile), Ok(Volatile)),
        ];
        for (medium, domain, plain, assumed) in table {
            let class = |assume| classify(&medium, domain, assume).map(|(class, _)| class);
            assert_eq!((class(false), class(true)), (plain, assumed), "{medium:?} {domain:?}");
        }
    }

    #[test]
    fn file_systems_in_memory_are_known_by_their_magic() {
        assert_eq!(memory_fs(0x0102_1994), Some("tmpfs"));
        // As an i32 that was sign-extended on the way, and as it is.
        assert_eq!(memory_fs(0x9584_58f6_u32 as i32 as i64), Some("hugetlbfs"));
        assert_eq!(memory_fs(0x9584_58f6), Some("hugetlbfs"));
        assert_eq!(memory_fs(0xef53), None, "ext4");
    }

    /// A sysfs with one region per given attribute value; `None` is a region without the attribute.
    fn sysfs(regions: &[Option<&str>]) -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        let bus = sys.path().join("bus/nd/devices");
        fs::create_dir_all(&bus).unwrap();
        symlink("/nonexistent", bus.join("ndbus0")).unwrap();
        for (number, value) in regions.iter().enumerate() {
            let real = sys.path().join(format!("devices/ndbus0/region{number}"));
            fs::create_dir_all(real.join("dax0.0/dax/dax0.0")).unwrap();
            if let Some(value) = value {
                fs::write(real.join("persistence_domain"), format!("{value}\n")).unwrap();
            }
            symlink(&real, bus.join(format!("region{number}"))).unwrap();
        }
        sys
    }

    #[test]
    fn a_machine_has_a_domain_only_if_every_region_has_a_known_one() {
        let table: [(&[Option<&str>], _); 7] = [
            (&[], None),
            (&[None], None),
            (&[Some("memory_controller")], Some("memory_controller")),
            (&[Some("cpu_cache"), Some("cpu_cache")], Some("cpu_cache")),
            (&[Some("memory_controller"), Some("cpu_cache")], Some("memory_controller")),
            (&[Some("cpu_cache"), None], None),
            (&[Some("memory_controller"), Some("a_new_word")], None),
        ];
        for (regions, expected) in table {
            let sys = sysfs(regions);
            let expected =
                expected.map_or(PersistenceDomain::Unknown, |name| PersistenceDomain::Known(name.to_owned()));
            assert_eq!(domain_of_all_regions(sys.path()), expected, "{regions:?}");
        }
    }

    #[test]
    fn a_devdax_device_has_the_domain_of_its_own_region() {
        let sys = sysfs(&[Some("memory_controller"), None]);
        let device = |region| sys.path().join(format!("devices/ndbus0/region{region}/dax0.0/dax/dax0.0"));
        assert_eq!(domain_of_device(&device(0)), PersistenceDomain::Known("memory_controller".to_owned()));
        assert_eq!(domain_of_device(&device(1)), PersistenceDomain::Unknown);
    }
}
