//! Arbitrary bytes for everything that reads bytes somebody else wrote (feature `sim`).
//!
//! ```text
//!  input     bytes as a script: numbers, choices, slices, zeros when they run out
//!  mutate    a seeded mutator, for where no coverage-guided fuzzer is at hand
//!  ring      a guest's rings, requests and in-flight area      vhost, no thread, no system call
//!  messages  a front end's messages and descriptors            vhost, through a socket
//!  media     structures on the media                           onmedia
//!  image     a whole cache image: recover, serve, write back   cache
//!  settings  configuration file and command line               control
//! ```
//!
//! Each target is one function of bytes that panics when a promise is broken. The same functions run
//! under libFuzzer (`fuzz/`, see `docs/testing.md`) and, from the same corpus, in `tests/fuzz.rs`.

mod image;
mod input;
mod media;
mod messages;
mod mutate;
mod plain;
mod ring;
mod settings;

pub use image::image;
pub use input::Input;
pub use media::media;
pub use messages::messages;
pub use mutate::mutate;
pub use ring::ring;
pub use settings::settings;

/// Something to feed bytes to.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name: of the libFuzzer target and of the corpus folder.
    pub name: &'static str,
    /// Judges one input; panics when a promise is broken.
    pub run: fn(&[u8]),
    /// Longest input worth trying.
    pub len_max: usize,
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "ring", run: ring, len_max: 512 },
    Target { name: "messages", run: messages, len_max: 1024 },
    Target { name: "settings", run: settings, len_max: 2048 },
    Target { name: "media", run: media, len_max: 4200 },
    Target { name: "image", run: image, len_max: 512 },
];
