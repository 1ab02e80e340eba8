//! What is printed when everything works: what is served, what survives what, and how to attach.
//!
//! Standard output is for this, standard error for events. Plain functions from values to text, so
//! that a test can compare the whole of it.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::Path;

use super::config::{Endpoint, VolumeConfig};
use crate::cache::{Health, ScrubStatus, VolumeState};
use crate::pmem::MediaClass;
use crate::tools::members::CachePaths;
use crate::units::Bytes;

/// A cache that was opened.
#[derive(Clone, Copy, Debug)]
pub struct CacheLine<'a> {
    /// Where it is.
    pub path: &'a CachePaths,
    /// Its size in bytes.
    pub size: u64,
    /// Whether this start made it.
    pub created: bool,
    /// What survives what.
    pub class: MediaClass,
    /// Why it is of that class.
    pub reason: &'a str,
}

/// A volume that is served.
#[derive(Clone, Copy, Debug)]
pub struct VolumeLine<'a> {
    /// What was asked for.
    pub config: &'a VolumeConfig,
    /// Its size in bytes.
    pub size: u64,
    /// Whether this start made its disk.
    pub created: bool,
}

/// What a class means for a guest's data.
pub fn durability(class: MediaClass) -> &'static str {
    match class {
        MediaClass::Dax => "a write is durable, also against a power cut, when it completes",
        MediaClass::AssumeDax => {
            "treated as persistent memory although it is not: a power cut loses it all; tests only"
        }
        MediaClass::PageCache => {
            "a write survives this daemon when it completes, and a power cut once a FLUSH after it has"
        }
        MediaClass::Volatile => "a write survives this daemon, but neither a reboot nor a power cut",
    }
}

/// The whole announcement.
pub fn text(caches: &[CacheLine<'_>], volumes: &[VolumeLine<'_>]) -> String {
    let mut out = String::new();
    for cache in caches {
        let (path, size, created) = (cache.path.display(), Bytes(cache.size), created(cache.created));
        line(&mut out, format_args!("cache   {path}: {size}, {}{created} ({})", cache.class, cache.reason));
        line(&mut out, format_args!("        {}", durability(cache.class)));
    }
    for VolumeLine { config, size, created: new } in volumes {
        let (path, size, new) = (config.backing.path.display(), Bytes(*size), created(*new));
        let read_only = if config.read_only { ", read-only" } else { "" };
        let (mode, order) = (word(config.mode), word(config.order));
        line(
            &mut out,
            format_args!("volume  {}: {size} on {path}{new}, {mode}, order {order}{read_only}", config.name),
        );
    }
    for VolumeLine { config, .. } in volumes {
        if let Endpoint::Socket { path, .. } = &config.endpoint {
            // VMMs are started elsewhere: a relative path would mean something else there.
            let path = std::path::absolute(path.as_path()).unwrap_or_else(|_| path.as_path().into());
            line(&mut out, format_args!("\nattach {} with QEMU:\n{}", config.name, qemu(config, &path)));
            line(&mut out, format_args!("or with Cloud Hypervisor:\n{}", cloud_hypervisor(config, &path)));
        }
    }
    out
}

/// A volume's state on one line, for people and for programs that look for `state=`.
pub fn status(name: &str, health: &Health) -> String {
    let Health { state, for_ms, cause, advice, failures, retry_ms } = health;
    let mut out = format!("status volume={name} state={state}");
    if *state != VolumeState::Ok {
        // Text last: it may hold anything.
        let retry = retry_ms.map_or(String::new(), |ms| format!(" failures={failures} retry_ms={ms}"));
        out.push_str(&format!(" for_s={}{retry} cause=\"{cause}\" do=\"{advice}\"", for_ms / 1000));
    }
    out
}

/// What scrubbing has done in a cache, on one line.
pub fn scrub(cache: usize, status: &ScrubStatus) -> String {
    let ScrubStatus { passes, last_pass_unix_ms, last_pass_ms, is_running, bytes, .. } = status;
    format!(
        "scrub cache={cache} running={} passes={passes} last_pass_unix_s={} last_pass_s={} bytes={bytes} \
         metadata_damaged={} metadata_healed={}",
        u8::from(*is_running),
        last_pass_unix_ms / 1000,
        last_pass_ms / 1000,
        status.metadata_damaged,
        status.metadata_healed
    )
}

/// Writes text to standard output. A closed one is nobody's loss: the log says the same.
pub fn print(text: &str) {
    let mut stdout = io::stdout();
    drop(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()));
}

/// QEMU's options. `reconnect-ms` lets the VM live through a restart of this daemon.
fn qemu(config: &VolumeConfig, socket: &Path) -> String {
    let id = format!("vu-{}", config.name);
    // In an option list of QEMU's a comma in a value is doubled.
    let path = socket.display().to_string().replace(',', ",,");
    let queues = match config.queues {
        // The default: QEMU takes one per virtual CPU by itself.
        super::config::DEFAULT_QUEUES => String::new(),
        queues => format!(",num-queues={queues}"),
    };
    let chardev = quoted(&format!("socket,id={id},path={path},reconnect-ms=200"));
    let ring = config.queue_size;
    format!(
        "  -object memory-backend-memfd,id=mem,size=4G,share=on -machine q35,memory-backend=mem \\\n  \
         -chardev {chardev} \\\n  \
         -device vhost-user-blk-pci,chardev={id}{queues},queue-size={ring}"
    )
}

/// Cloud Hypervisor's options. It takes as many queues as it is told, no more than virtual CPUs.
fn cloud_hypervisor(config: &VolumeConfig, socket: &Path) -> String {
    let path = socket.display().to_string();
    // In an option list of Cloud Hypervisor's a value with a comma stands in quotes.
    let path = if path.contains([',', '[', ']']) { format!("\"{path}\"") } else { path };
    let (id, ring) = (&config.name, config.queue_size);
    let disk = quoted(&format!("vhost_user=true,socket={path},num_queues=1,queue_size={ring},id={id}"));
    format!("  --memory size=4G,shared=on --disk {disk}")
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_=+,./:@%".contains(&byte);
    if word.bytes().all(plain) { word.into() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

fn created(new: bool) -> &'static str {
    if new { ", created" } else { "" }
}

/// The word by which an option is chosen.
pub fn word(choice: impl clap::ValueEnum) -> String {
    choice.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(out, "{text}").expect("a String takes any text");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::config::BackingConfig;
    use crate::tools::image::Sizing;

    fn volume(name: &str, socket: &str) -> VolumeConfig {
        let endpoint = Endpoint::socket(socket.parse().unwrap(), None, None);
        let backing = BackingConfig { path: "/state/disk.img".into(), raw: false, size: Sizing::AsFound };
        VolumeConfig::new(name.parse().unwrap(), 0, endpoint, backing)
    }

    #[test]
    fn the_announcement_says_what_where_how_safe_and_how_to_attach() {
        let cache = CacheLine {
            path: &"/state/cache.img".into(),
            size: 1 << 30,
            created: true,
            class: MediaClass::PageCache,
            reason: "a file on ext4",
        };
        let config = volume("disk0", "/run/pcache.sock");
        let volume = VolumeLine { config: &config, size: 10 << 30, created: true };
        let expected = "\
cache   /state/cache.img: 1 GiB, page-cache, created (a file on ext4)
        a write survives this daemon when it completes, and a power cut once a FLUSH after it has
volume  disk0: 10 GiB on /state/disk.img, created, writeback, order strict

attach disk0 with QEMU:
  -object memory-backend-memfd,id=mem,size=4G,share=on -machine q35,memory-backend=mem \\
  -chardev socket,id=vu-disk0,path=/run/pcache.sock,reconnect-ms=200 \\
  -device vhost-user-blk-pci,chardev=vu-disk0,queue-size=256
or with Cloud Hypervisor:
  --memory size=4G,shared=on --disk vhost_user=true,socket=/run/pcache.sock,num_queues=1,queue_size=256,id=disk0
";
        assert_eq!(text(&[cache], &[volume]), expected);
    }

    #[test]
    fn a_state_is_one_line_that_says_why_since_when_and_what_to_do() {
        assert_eq!(status("a", &Health::default()), "status volume=a state=ok");
        let bad = Health {
            state: VolumeState::Degraded,
            for_ms: 61_500,
            cause: "the disk failed flushing: I/O error".into(),
            advice: "mend the disk",
            failures: 3,
            retry_ms: Some(400),
        };
        assert_eq!(
            status("a", &bad),
            "status volume=a state=degraded for_s=61 failures=3 retry_ms=400 \
             cause=\"the disk failed flushing: I/O error\" do=\"mend the disk\""
        );
    }

    #[test]
    fn odd_paths_survive_shell_and_option_lists() {
        let mut config = volume("a", "/run/a, b'.sock");
        config.queues = 4;
        config.read_only = true;
        let text = text(&[], &[VolumeLine { config: &config, size: 512, created: false }]);
        assert!(text.contains(r"'socket,id=vu-a,path=/run/a,, b'\''.sock,reconnect-ms=200'"), "{text}");
        assert!(text.contains(r#"socket="/run/a, b'\''.sock","#), "{text}");
        assert!(text.contains(",num-queues=4,queue-size=256"), "{text}");
        assert!(text.contains("512 bytes on /state/disk.img, writeback, order strict, read-only"), "{text}");
    }

    #[test]
    fn each_class_says_what_a_power_cut_does() {
        use MediaClass::{AssumeDax, Dax, PageCache, Volatile};
        for class in [Dax, AssumeDax, PageCache, Volatile] {
            assert!(durability(class).contains("power cut"), "{class}");
        }
    }
}
