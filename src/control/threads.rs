//! Which threads serve a volume's queues, where they run, and how they wait: one group of options, said
//! alike on the command line, in the file and through the API.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use clap::ValueEnum;

use super::value::{self, Name, ValueError};
use crate::vhost::{Crew, PollMode, Polling};

/// Most threads of a volume or a group: as many as it can have queues.
const THREADS_MAX: u64 = 256;
/// Most processors that can be named.
const CPUS_MAX: u16 = 1024;

/// How an idle queue waits for work.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Poll {
    /// It looks for work as long as that has lately been worth it, then sleeps
    #[default]
    Adaptive,
    /// It looks for work as long as it may, each time, then sleeps
    Fixed,
    /// It sleeps at once
    Off,
}

/// Processors by number, in the order in which threads get them; none for any.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Cpus(Vec<u16>);

impl FromStr for Cpus {
    type Err = ValueError;

    /// Numbers and ranges with commas between, like `0-3,8`; `any` for none in particular.
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let bad = || ValueError::Cpus(text.into());
        if text == "any" {
            return Ok(Self::default());
        }
        let number = |text: &str| -> Result<u16, ValueError> {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse().ok().filter(|cpu| digits && *cpu < CPUS_MAX).ok_or_else(bad)
        };
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if last < first || cpus.len() + usize::from(last - first) >= usize::from(CPUS_MAX) {
                return Err(bad());
            }
            cpus.extend(first..=last);
        }
        Ok(Self(cpus))
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("any");
        }
        let runs = self.0.chunk_by(|a, b| *b == a + 1);
        let run = |run: &[u16]| match run {
            [one] => one.to_string(),
            run => format!("{}-{}", run[0], run[run.len() - 1]),
        };
        f.write_str(&runs.map(run).collect::<Vec<_>>().join(","))
    }
}

/// Part of a processor, in percent.
///
/// # Errors
/// Not a number from 1 to 100.
pub fn percent(text: &str) -> Result<u8, ValueError> {
    Ok(value::whole(text, 1, 100)? as u8)
}

/// Threads that share a volume's queues; 0 for one thread for each queue.
///
/// # Errors
/// Not a number from 0 to [`THREADS_MAX`].
pub fn threads(text: &str) -> Result<u16, ValueError> {
    Ok(value::whole(text, 0, THREADS_MAX)? as u16)
}

/// What was said of it.
#[derive(Debug, Default, Clone)]
pub struct ThreadArgs {
    /// How an idle queue waits.
    pub poll: Option<Poll>,
    /// Longest time that it polls, in microseconds.
    pub poll_us: Option<u32>,
    /// Most of a processor that it spends on that.
    pub poll_cpu_percent: Option<u8>,
    /// Threads that share the queues.
    pub queue_threads: Option<u16>,
    /// The group of volumes that shares them.
    pub thread_group: Option<Name>,
    /// Where they run.
    pub cpus: Option<Cpus>,
}

/// As it was decided.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ThreadsConfig {
    /// How an idle queue waits.
    pub poll: Poll,
    /// Longest time that it polls, in microseconds.
    pub poll_us: u32,
    /// Most of a processor that it spends on that.
    pub poll_cpu_percent: u8,
    /// Threads that share the queues; 0 for one for each.
    pub queue_threads: u16,
    /// The group of volumes that shares them.
    pub thread_group: Option<Name>,
    /// Where they run.
    pub cpus: Cpus,
}

impl Default for ThreadsConfig {
    fn default() -> Self {
        Self {
            poll: Poll::default(),
            poll_us: 32,
            poll_cpu_percent: 100,
            queue_threads: 0,
            thread_group: None,
            cpus: Cpus::default(),
        }
    }
}

impl From<ThreadArgs> for ThreadsConfig {
    fn from(args: ThreadArgs) -> Self {
        let default = Self::default();
        Self {
            poll: args.poll.unwrap_or(default.poll),
            poll_us: args.poll_us.unwrap_or(default.poll_us),
            poll_cpu_percent: args.poll_cpu_percent.unwrap_or(default.poll_cpu_percent),
            queue_threads: args.queue_threads.unwrap_or(default.queue_threads),
            thread_group: args.thread_group,
            cpus: args.cpus.unwrap_or_default(),
        }
    }
}

impl ThreadsConfig {
    /// As the front end takes it.
    pub fn polling(&self) -> Polling {
        let mode = match self.poll {
            Poll::Adaptive => PollMode::Adaptive,
            Poll::Fixed => PollMode::Fixed,
            Poll::Off => PollMode::Off,
        };
        Polling { mode, max: Duration::from_micros(self.poll_us.into()), cpu_percent: self.poll_cpu_percent }
    }

    /// Where threads of their own run.
    pub fn cpus(&self) -> &[u16] {
        &self.cpus.0
    }

    /// Every key of it with its value.
    pub fn rows(&self) -> [(&'static str, String); 6] {
        let poll =
            self.poll.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        let group = self.thread_group.as_ref().map_or_else(|| "none".to_owned(), Name::to_string);
        [
            ("poll", poll),
            ("poll_us", self.poll_us.to_string()),
            ("poll_cpu_percent", self.poll_cpu_percent.to_string()),
            ("queue_threads", self.queue_threads.to_string()),
            ("thread_group", group),
            ("cpus", self.cpus.to_string()),
        ]
    }
}

/// The threads that volumes share, by group. A group is there as long as a volume of it is served; how
/// many threads it has and where they run is what the first of them says.
#[derive(Debug, Default)]
pub struct ThreadGroups(Mutex<BTreeMap<String, Weak<Crew>>>);

impl ThreadGroups {
    /// The threads for a volume, `None` where each queue is to have its own.
    ///
    /// # Errors
    /// The kernel refused them.
    pub fn crew(&self, volume: &Name, config: &ThreadsConfig) -> io::Result<Option<Arc<Crew>>> {
        let make = |name: &str| Crew::new(name, config.queue_threads, config.cpus()).map(Arc::new);
        let Some(group) = &config.thread_group else {
            return if config.queue_threads == 0 { Ok(None) } else { make(volume.as_str()).map(Some) };
        };
        let mut groups = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|_, crew| crew.strong_count() > 0);
        if let Some(crew) = groups.get(group.as_str()).and_then(Weak::upgrade) {
            return Ok(Some(crew));
        }
        let crew = make(group.as_str())?;
        groups.insert(group.to_string(), Arc::downgrade(&crew));
        Ok(Some(crew))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_read_as_they_are_shown() {
        for text in ["any", "0", "0-3", "0-3,8", "7,5,1-2", "3,3"] {
            assert_eq!(text.parse::<Cpus>().unwrap().to_string(), text);
        }
        assert_eq!("2-4,0".parse::<Cpus>().unwrap().0, [2, 3, 4, 0]);
        for text in ["", "-", "0-", "3-1", "1,,2", "x", "1024", "0-1023,0-1023", " 1", "+1"] {
            assert!(text.parse::<Cpus>().is_err(), "{text}");
        }
    }

    #[test]
    fn volumes_of_a_group_share_its_threads_as_long_as_one_is_there() {
        let groups = ThreadGroups::default();
        let name = |text: &str| text.parse::<Name>().unwrap();
        let config = |threads, group: Option<&str>| ThreadsConfig {
            queue_threads: threads,
            thread_group: group.map(name),
            ..ThreadsConfig::default()
        };
        let crew =
            |volume: &str, threads, group| groups.crew(&name(volume), &config(threads, group)).unwrap();
        assert!(crew("a", 0, None).is_none(), "a thread for each queue");
        let (a, b) = (crew("a", 2, None).unwrap(), crew("b", 2, None).unwrap());
        assert!(!Arc::ptr_eq(&a, &b), "each volume its own");
        let (a, b) = (crew("a", 1, Some("blue")).unwrap(), crew("b", 3, Some("blue")).unwrap());
        assert!(Arc::ptr_eq(&a, &b));
        assert!(!Arc::ptr_eq(&a, &crew("c", 1, Some("red")).unwrap()));
        drop((a, b));
        assert!(groups.0.lock().unwrap()["blue"].upgrade().is_none());
        assert!(crew("d", 0, Some("blue")).is_some(), "at least one");
    }
}
