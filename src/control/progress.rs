//! How far long work is, for whoever watches: one line rewritten on a terminal, a line now and then
//! in a log.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::units::Bytes;

/// Between two lines on a terminal, which one replaces the other.
const TERMINAL_INTERVAL: Duration = Duration::from_millis(200);
/// Between two lines in a log.
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// Work with a known amount.
pub struct Progress {
    what: String,
    begun: Instant,
    said: Option<Instant>,
    is_terminal: bool,
}

impl Progress {
    /// Begins to watch `what`.
    pub fn new(what: String) -> Self {
        Self { what, begun: Instant::now(), said: None, is_terminal: io::stderr().is_terminal() }
    }

    /// Says how far it is, unless it did so a moment ago.
    pub fn show(&mut self, done: u64, total: u64) {
        let interval = if self.is_terminal { TERMINAL_INTERVAL } else { LOG_INTERVAL };
        if self.said.is_some_and(|said| said.elapsed() < interval) {
            return;
        }
        self.said = Some(Instant::now());
        self.say(&line(&self.what, done, total, self.begun.elapsed()));
    }

    /// Ends the line.
    pub fn finish(&mut self) {
        if self.is_terminal && self.said.is_some() {
            self.write("\r\x1b[K");
        }
    }

    fn say(&self, line: &str) {
        match self.is_terminal {
            true => self.write(&format!("\r\x1b[K{line}")),
            false => self.write(&format!("{line}\n")),
        }
    }

    fn write(&self, text: &str) {
        let mut stderr = io::stderr();
        // Nobody watches a closed stream.
        drop(stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush()));
    }
}

/// `what: done of total (percent), rate, time left`: the latter two once there is something to judge by.
fn line(what: &str, done: u64, total: u64, elapsed: Duration) -> String {
    let done = done.min(total);
    let percent = if total == 0 { 100 } else { u128::from(done) * 100 / u128::from(total) };
    let mut text = format!("{what}: {} of {} ({percent} %)", Bytes(done), Bytes(total));
    let seconds = elapsed.as_secs_f64();
    if done > 0 && seconds >= 0.5 {
        let rate = done as f64 / seconds;
        let left = (total - done) as f64 / rate;
        text.push_str(&format!(", {:.1} MiB/s, about {left:.0} s left", rate / f64::from(1 << 20)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_says_how_much_how_fast_and_how_long() {
        let second = Duration::from_secs(2);
        let rows = [
            (line("drain", 0, 0, second), "drain: 0 bytes of 0 bytes (100 %)"),
            (line("drain", 0, 4096, second), "drain: 0 bytes of 4 KiB (0 %)"),
            (line("drain", 4096, 8192, Duration::ZERO), "drain: 4 KiB of 8 KiB (50 %)"),
            (
                line("drain", 1 << 30, 4 << 30, second),
                "drain: 1 GiB of 4 GiB (25 %), 512.0 MiB/s, about 6 s left",
            ),
            // New dirty data cannot come while it runs, but a number must not go over its total.
            (line("drain", 9, 8, Duration::ZERO), "drain: 8 bytes of 8 bytes (100 %)"),
        ];
        for (text, expected) in rows {
            assert_eq!(text, expected);
        }
    }
}
