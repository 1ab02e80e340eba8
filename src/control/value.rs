//! What an option's text may be: one parser per kind of value.
//!
//! The command line and the configuration file use the same ones, so an option means the same in
//! both and is refused in the same words. What is parsed here is possible by itself; whether the
//! values fit together is `config`'s to say.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::suggest;
use crate::units::Bytes;

/// Longest path of a Unix socket in bytes: `sun_path` holds 108 and the last is the NUL.
pub const SOCKET_PATH_LEN_MAX: usize = 107;
/// Longest name of a volume or a cache in bytes: what the media keeps.
pub const NAME_LEN_MAX: usize = 64;
/// Bytes of GET_ID's answer (virtio 1.3 §5.2.6).
pub const SERIAL_LEN_MAX: usize = 20;
/// Most queues a volume may offer: what QEMU's automatic count can ask for, and then some.
pub const QUEUES_MAX: u16 = 256;
/// Largest ring that QEMU's vhost-user-blk asks for.
pub const QUEUE_SIZE_MAX: u16 = 1024;
/// Smallest useful ring: a request without an indirect table is three descriptors and its data.
pub const QUEUE_SIZE_MIN: u16 = 16;
/// Longest busy-wait before a queue sleeps: beyond it a core is burnt for nothing.
pub const POLL_US_MAX: u32 = 10_000;
/// A disk has at most 2^48 sectors.
pub const DISK_SIZE_MAX: u64 = 1 << 57;

/// Why a value was refused. Its text follows the option's or key's name, and says what to write.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ValueError {
    /// Not a number with a known unit.
    #[error("`{0}` is not a size: write a whole number with a unit, like 512MiB, 4GiB or 1TiB")]
    Size(String),
    /// A decimal unit, which would be 5 % off what was meant.
    #[error("`{given}` has a decimal unit: sizes are in powers of two, write {suggestion}")]
    DecimalUnit {
        /// What was written.
        given: String,
        /// The same in binary units.
        suggestion: String,
    },
    /// A size of nothing, or more than 2^63 bytes.
    #[error("`{0}` is an impossible size")]
    Impossible(String),
    /// A size that must be whole in some unit.
    #[error("`{given}` is not a multiple of {unit} bytes")]
    NotMultiple {
        /// What was written.
        given: String,
        /// What it must be a multiple of.
        unit: u64,
    },
    /// A number outside its bounds.
    #[error("`{given}` is not a whole number from {min} to {max}")]
    OutOfRange {
        /// What was written.
        given: String,
        /// Smallest accepted.
        min: u64,
        /// Largest accepted.
        max: u64,
    },
    /// A size that must be a power of two within bounds.
    #[error("`{given}` is not a power of two from {min} to {max}")]
    NotPowerOfTwo {
        /// What was written.
        given: String,
        /// Smallest accepted.
        min: String,
        /// Largest accepted.
        max: String,
    },
    /// A block size that no guest could use.
    #[error("`{0}` is not a block size: 512 or 4096")]
    BlockSize(String),
    /// Not usable as a name.
    #[error("`{0}` is not a name: 1 to 64 small letters, digits, `_` or `-`, and no `-` at its begin")]
    Name(String),
    /// Not usable as a serial.
    #[error("`{0}` is not a serial: 1 to 20 printable ASCII characters")]
    Serial(String),
    /// Longer than the kernel takes.
    #[error(
        "`{path}` is {len} bytes long and a socket path can have {SOCKET_PATH_LEN_MAX}: choose a shorter one"
    )]
    SocketPathTooLong {
        /// What was written.
        path: String,
        /// How long that is.
        len: usize,
    },
    /// No path at all.
    #[error("is empty: write a path")]
    EmptyPath,
    /// Not permission bits.
    #[error("`{0}` is not a file mode: write it in octal, like 0660")]
    FileMode(String),
    /// Not an address of this host's own.
    #[error("`{0}` is not a loopback address and port: write it like 127.0.0.1:9747")]
    Loopback(String),
    /// None of a fixed choice.
    #[error("`{given}` is none of {}{}", .choices.join(", "), suggestion(.nearest))]
    Choice {
        /// What was written.
        given: String,
        /// What could have been.
        choices: Vec<String>,
        /// Which of those is near.
        nearest: Option<String>,
    },
}

fn suggestion(nearest: &Option<String>) -> String {
    nearest.as_ref().map_or(String::new(), |near| format!(": did you mean {near}?"))
}

impl FromStr for Bytes {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let unit = unit.trim_start();
        if number.is_empty() {
            return Err(ValueError::Size(text.into()));
        }
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            "kb" | "mb" | "gb" | "tb" => {
                let suggestion = format!("{number}{}iB", unit[..1].to_ascii_uppercase());
                return Err(ValueError::DecimalUnit { given: text.into(), suggestion });
            }
            _ => return Err(ValueError::Size(text.into())),
        };
        number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(1 << shift))
            .filter(|&bytes| bytes > 0 && bytes <= i64::MAX as u64)
            .map(Bytes)
            .ok_or_else(|| ValueError::Impossible(text.into()))
    }
}

/// Size of a cache: whole pages.
///
/// # Errors
/// Not a size, or not a multiple of 4096.
pub fn cache_size(text: &str) -> Result<u64, ValueError> {
    multiple_of(text, crate::units::BLOCK)
}

/// Size of a disk: whole sectors, no more than virtio can address here.
///
/// # Errors
/// Not a size, not a multiple of 512, or too large.
pub fn disk_size(text: &str) -> Result<u64, ValueError> {
    let size = multiple_of(text, crate::units::SECTOR)?;
    if size > DISK_SIZE_MAX {
        return Err(ValueError::Impossible(text.into()));
    }
    Ok(size)
}

fn multiple_of(text: &str, unit: u64) -> Result<u64, ValueError> {
    let Bytes(size) = text.parse()?;
    if !size.is_multiple_of(unit) {
        return Err(ValueError::NotMultiple { given: text.into(), unit });
    }
    Ok(size)
}

/// How much is read in one go before it is no longer cached, 0 for no limit.
///
/// # Errors
/// Not a size, or not a multiple of 512.
pub fn sequential_cutoff(text: &str) -> Result<u64, ValueError> {
    if text == "0" { Ok(0) } else { multiple_of(text, crate::units::SECTOR) }
}

/// Size of a segment: 64 KiB to 1 GiB.
///
/// # Errors
/// Not a power of two within these bounds.
pub fn segment_size(text: &str) -> Result<u32, ValueError> {
    let (min, max) = (64 << 10, 1 << 30);
    let Bytes(size) = text.parse()?;
    if !size.is_power_of_two() || !(min..=max).contains(&size) {
        let (min, max) = (Bytes(min).to_string(), Bytes(max).to_string());
        return Err(ValueError::NotPowerOfTwo { given: text.into(), min, max });
    }
    Ok(size as u32)
}

/// The block size a guest sees.
///
/// # Errors
/// Neither 512 nor 4096.
pub fn block_size(text: &str) -> Result<u32, ValueError> {
    match text.parse() {
        Ok(Bytes(512)) => Ok(512),
        Ok(Bytes(4096)) => Ok(4096),
        _ => Err(ValueError::BlockSize(text.into())),
    }
}

/// How many queues a volume offers.
///
/// # Errors
/// Not a number from 1 to [`QUEUES_MAX`].
pub fn queues(text: &str) -> Result<u16, ValueError> {
    Ok(whole(text, 1, QUEUES_MAX.into())? as u16)
}

/// The largest ring a volume takes.
///
/// # Errors
/// Not a power of two from [`QUEUE_SIZE_MIN`] to [`QUEUE_SIZE_MAX`].
pub fn queue_size(text: &str) -> Result<u16, ValueError> {
    let (min, max) = (QUEUE_SIZE_MIN, QUEUE_SIZE_MAX);
    match text.parse::<u16>() {
        Ok(size) if size.is_power_of_two() && (min..=max).contains(&size) => Ok(size),
        _ => {
            Err(ValueError::NotPowerOfTwo { given: text.into(), min: min.to_string(), max: max.to_string() })
        }
    }
}

/// How long a queue looks for more work before it sleeps, in microseconds.
///
/// # Errors
/// Not a number from 0 to [`POLL_US_MAX`].
pub fn poll_us(text: &str) -> Result<u32, ValueError> {
    Ok(whole(text, 0, POLL_US_MAX.into())? as u32)
}

/// Seconds by which a disk may lag behind its guest.
///
/// # Errors
/// Not 1 to a day.
pub fn max_lag_s(text: &str) -> Result<u32, ValueError> {
    Ok(whole(text, 1, 86_400)? as u32)
}

/// The same, and `0` for no bound.
///
/// # Errors
/// Not a number from 0 to a day.
pub fn max_lag_s_or_none(text: &str) -> Result<u32, ValueError> {
    Ok(whole(text, 0, 86_400)? as u32)
}

/// Most dirty bytes, and `0` for no bound.
///
/// # Errors
/// Not a whole number of sectors, or more than any disk has.
pub fn max_dirty_or_none(text: &str) -> Result<u64, ValueError> {
    if text == "0" { Ok(0) } else { disk_size(text) }
}

/// Seconds until a disk that does not answer has failed.
///
/// # Errors
/// Not a number from 0 to a day.
pub fn timeout_s(text: &str) -> Result<u32, ValueError> {
    Ok(whole(text, 0, 86_400)? as u32)
}

/// MiB a second to scrub.
///
/// # Errors
/// Not a number from 0 to a million.
pub fn scrub_mib_s(text: &str) -> Result<u32, ValueError> {
    Ok(whole(text, 0, 1_000_000)? as u32)
}

/// Hours from one scrub to the next.
///
/// # Errors
/// Not a number from 0 (one after the other) to a year.
pub fn scrub_interval_h(text: &str) -> Result<u32, ValueError> {
    Ok(whole(text, 0, 8784)? as u32)
}

fn whole(text: &str, min: u64, max: u64) -> Result<u64, ValueError> {
    match text.parse::<u64>() {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        _ => Err(ValueError::OutOfRange { given: text.into(), min, max }),
    }
}

/// Permission bits in octal.
///
/// # Errors
/// Not octal, or bits beyond 0777.
pub fn file_mode(text: &str) -> Result<u32, ValueError> {
    match u32::from_str_radix(text.strip_prefix("0o").unwrap_or(text), 8) {
        Ok(mode) if mode <= 0o777 && !text.starts_with(['+', '-']) => Ok(mode),
        _ => Err(ValueError::FileMode(text.into())),
    }
}

/// An address that only this host reaches, and a port.
///
/// # Errors
/// It is none, or others reach it too.
pub fn loopback(text: &str) -> Result<SocketAddr, ValueError> {
    match text.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_loopback() => Ok(address),
        _ => Err(ValueError::Loopback(text.into())),
    }
}

/// A path to a file.
///
/// # Errors
/// It is empty.
pub fn path(text: &str) -> Result<PathBuf, ValueError> {
    if text.is_empty() { Err(ValueError::EmptyPath) } else { Ok(text.into()) }
}

/// A path that a socket can be bound to.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SocketPath(PathBuf);

impl SocketPath {
    /// Checks `path`.
    ///
    /// # Errors
    /// It is empty or longer than the kernel takes.
    pub fn new(path: &OsStr) -> Result<Self, ValueError> {
        match path.len() {
            0 => Err(ValueError::EmptyPath),
            len if len > SOCKET_PATH_LEN_MAX => {
                Err(ValueError::SocketPathTooLong { path: path.to_string_lossy().into(), len })
            }
            _ => Ok(Self(path.into())),
        }
    }

    /// The path.
    pub fn as_path(&self) -> &Path {
        &self.0
    }

    /// The same path with `suffix` appended to its last component.
    pub fn with_suffix(&self, suffix: &str) -> PathBuf {
        let mut path = OsString::from(&self.0);
        path.push(suffix);
        path.into()
    }
}

impl FromStr for SocketPath {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        Self::new(OsStr::from_bytes(text.as_bytes()))
    }
}

impl fmt::Display for SocketPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

/// The name of a cache or a volume, `[a-z0-9_-]{1,64}`: safe in file names, unit names, log lines, labels
/// of metrics, paths of the API and options of VMMs alike. None begins with `-`: a verb would take it for
/// an option.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Name(String);

impl Name {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let is_plain = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
        let is_long_enough = !text.is_empty() && text.len() <= NAME_LEN_MAX;
        if !is_long_enough || text.starts_with('-') || !text.bytes().all(is_plain) {
            return Err(ValueError::Name(text.into()));
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// What GET_ID answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Serial([u8; SERIAL_LEN_MAX]);

impl Serial {
    /// The serial of a volume that was given none: as much of its name as fits.
    pub fn of(name: &Name) -> Self {
        let text = name.as_str().as_bytes();
        Self::padded(&text[..text.len().min(SERIAL_LEN_MAX)])
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        let len = self.0.iter().position(|&byte| byte == 0).unwrap_or(SERIAL_LEN_MAX);
        std::str::from_utf8(&self.0[..len]).expect("a serial is ASCII")
    }

    /// The answer, NUL-padded.
    pub fn bytes(&self) -> [u8; SERIAL_LEN_MAX] {
        self.0
    }

    fn padded(text: &[u8]) -> Self {
        let mut bytes = [0; SERIAL_LEN_MAX];
        bytes[..text.len()].copy_from_slice(text);
        Self(bytes)
    }
}

impl FromStr for Serial {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let printable = text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        if text.is_empty() || text.len() > SERIAL_LEN_MAX || !printable {
            return Err(ValueError::Serial(text.into()));
        }
        Ok(Self::padded(text.as_bytes()))
    }
}

/// One of a fixed set of words, in the file; the command line uses the same words through clap.
///
/// # Errors
/// It is none of them; the error names the nearest.
pub fn choice<T: clap::ValueEnum>(text: &str) -> Result<T, ValueError> {
    if let Ok(value) = T::from_str(text, false) {
        return Ok(value);
    }
    let choices: Vec<String> = T::value_variants()
        .iter()
        .filter_map(|value| value.to_possible_value())
        .map(|value| value.get_name().to_owned())
        .collect();
    let nearest = suggest::nearest(text, choices.iter().map(String::as_str)).map(str::to_owned);
    Err(ValueError::Choice { given: text.into(), choices, nearest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_a_whole_number_with_a_binary_unit() {
        let good = [
            ("1", 1),
            ("4096", 4096),
            ("512B", 512),
            ("64KiB", 64 << 10),
            ("64k", 64 << 10),
            ("512MiB", 512 << 20),
            ("512 MiB", 512 << 20),
            ("4gib", 4 << 30),
            ("4G", 4 << 30),
            ("2TiB", 2 << 40),
            ("9223372036854775807", i64::MAX as u64),
        ];
        for (text, bytes) in good {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "GiB", "1.5GiB", "-1", "+1", "0x10", "1 2", "4 PiB", "1GiB2", "ten"] {
            assert_eq!(text.parse::<Bytes>(), Err(ValueError::Size(text.into())), "{text}");
        }
        for text in ["0", "0GiB", "9223372036854775808", "99999999999999999999", "16777216TiB"] {
            assert_eq!(text.parse::<Bytes>(), Err(ValueError::Impossible(text.into())), "{text}");
        }
    }

    #[test]
    fn a_decimal_unit_is_refused_with_the_binary_one() {
        let error = "4GB".parse::<Bytes>().unwrap_err();
        assert_eq!(error.to_string(), "`4GB` has a decimal unit: sizes are in powers of two, write 4GiB");
    }

    #[test]
    fn what_is_shown_exactly_reads_back_as_the_same_size() {
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..10_000 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let bytes = (seed >> 40).max(1) << (seed % 30);
            let shown = Bytes(bytes).to_string();
            if !shown.contains('.') {
                let text = shown.replace(" bytes", "");
                assert_eq!(text.parse(), Ok(Bytes(bytes)), "{shown}");
            }
        }
    }

    #[test]
    fn sizes_of_things_keep_their_alignment() {
        assert_eq!(cache_size("64MiB"), Ok(64 << 20));
        assert!(matches!(cache_size("4097"), Err(ValueError::NotMultiple { unit: 4096, .. })));
        assert!(matches!(disk_size("513"), Err(ValueError::NotMultiple { unit: 512, .. })));
        assert!(matches!(disk_size("262144TiB"), Err(ValueError::Impossible(_))));
        assert_eq!(segment_size("16MiB"), Ok(16 << 20));
        for text in ["32KiB", "3MiB", "2GiB"] {
            assert!(matches!(segment_size(text), Err(ValueError::NotPowerOfTwo { .. })), "{text}");
        }
        assert_eq!(block_size("4KiB"), Ok(4096));
        assert_eq!(block_size("1024"), Err(ValueError::BlockSize("1024".into())));
    }

    #[test]
    fn counts_have_bounds() {
        assert_eq!((queues("1"), queues("256")), (Ok(1), Ok(256)));
        for text in ["0", "257", "x", "-1", "1.0"] {
            assert!(queues(text).is_err(), "{text}");
        }
        assert_eq!((queue_size("16"), queue_size("1024")), (Ok(16), Ok(1024)));
        for text in ["8", "100", "2048", "65536"] {
            assert!(queue_size(text).is_err(), "{text}");
        }
        assert_eq!((poll_us("0"), poll_us("10000")), (Ok(0), Ok(10_000)));
        assert!(poll_us("10001").is_err());
    }

    #[test]
    fn a_file_mode_is_octal() {
        let good = [("0660", 0o660), ("600", 0o600), ("0o777", 0o777), ("0", 0)];
        for (text, mode) in good {
            assert_eq!(file_mode(text), Ok(mode), "{text}");
        }
        for text in ["0888", "1777", "rw", "", "+660", "-1"] {
            assert!(file_mode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_socket_path_has_at_most_107_bytes() {
        assert!("/".repeat(107).parse::<SocketPath>().is_ok());
        assert!(matches!(
            "/".repeat(108).parse::<SocketPath>(),
            Err(ValueError::SocketPathTooLong { len: 108, .. })
        ));
        assert_eq!("".parse::<SocketPath>(), Err(ValueError::EmptyPath));
        let path: SocketPath = "/run/a.sock".parse().unwrap();
        assert_eq!(path.with_suffix(".lock"), Path::new("/run/a.sock.lock"));
    }

    #[test]
    fn a_name_is_safe_wherever_it_is_shown() {
        for text in ["disk0", "vm-1_root", "0", "_", &"a".repeat(64)] {
            assert!(text.parse::<Name>().is_ok(), "{text}");
        }
        for text in ["", "-a", ".a", "a.b", "A", "a b", "a/b", "a,b", "ä", "a=b", &"a".repeat(65)] {
            assert!(text.parse::<Name>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_serial_is_padded_and_defaults_to_the_name() {
        let serial: Serial = "S1".parse().unwrap();
        assert_eq!((&serial.bytes()[..3], serial.as_str()), (&b"S1\0"[..], "S1"));
        for text in ["", "123456789012345678901", "tab\t", "ü"] {
            assert!(text.parse::<Serial>().is_err(), "{text}");
        }
        let name: Name = "a-name-longer-than-a-serial".parse().unwrap();
        assert_eq!(Serial::of(&name).as_str(), "a-name-longer-than-a");
    }
}
