//! Follows a job of the daemon's to its end, and calls it off when it is interrupted.

use std::io::Read;
use std::time::Duration;

use super::super::api::client::{Client, ClientError};
use super::super::api::model::Job;
use super::super::progress::Progress;
use super::super::sys;
use super::OnlineError;
use crate::units::Bytes;

/// Between two looks: at first often, since most jobs are short.
const LOOK_FIRST: Duration = Duration::from_millis(5);
/// Later.
const LOOK_LATER: Duration = Duration::from_millis(200);

/// Waits for the end of `job`. An interrupt calls it off, a second one ends the wait as well.
pub(super) fn follow(client: &Client, job: Job) -> Result<Job, OnlineError> {
    Ok(follow_noting(client, job)?.0)
}

/// The same, and whether it was interrupted: a job may be done before it hears of that.
pub(super) fn follow_noting(client: &Client, mut job: Job) -> Result<(Job, bool), OnlineError> {
    let mut signals = sys::signal_descriptor(&[libc::SIGINT, libc::SIGTERM])?;
    let mut is_interrupted = false;
    let mut progress = Progress::new(format!("{} {}", job.kind, job.volume));
    let path = format!("/v1/jobs/{}", job.id);
    let mut look = LOOK_FIRST;
    let result = loop {
        if job.state != "running" {
            break Ok((job, is_interrupted));
        }
        if job.total_bytes > 0 {
            progress.show(job.done_bytes, job.total_bytes);
        }
        std::thread::sleep(look);
        look = (look * 2).min(LOOK_LATER);
        let asked = match signals.read(&mut [0; size_of::<libc::signalfd_siginfo>()]) {
            Ok(_) if is_interrupted => {
                break Err(OnlineError::Job(format!("interrupted; job {} is still ending", job.id)));
            }
            Ok(_) => {
                is_interrupted = true;
                client.ask("DELETE", &path, None)
            }
            Err(_) => client.ask("GET", &path, None),
        };
        match asked {
            Ok(seen) => job = seen,
            Err(ClientError::NoDaemon { .. }) => {
                let why = format!("the daemon ended during job {}; what is dirty stays in the cache", job.id);
                break Err(OnlineError::Job(why));
            }
            Err(error) => break Err(error.into()),
        }
    };
    progress.finish();
    result
}

/// How a job ended, in words.
pub(super) fn ended(job: Job) -> Result<String, OnlineError> {
    let Job { kind, volume, elapsed_s, total_bytes, done_bytes, .. } = &job;
    let moved = match total_bytes {
        0 => String::new(),
        _ => {
            let what = if kind == "resize" { "emptied or added" } else { "brought to the disk" };
            format!(", {} of {} {what}", Bytes(*done_bytes), Bytes(*total_bytes))
        }
    };
    let message = job.message.as_deref().unwrap_or_default();
    if job.state == "done" {
        let remark = if message.is_empty() { String::new() } else { format!(": {message}") };
        return Ok(format!("{kind} {volume}: done in {elapsed_s:.1} s{moved}{remark}\n"));
    }
    Err(OnlineError::Job(format!("{kind} {volume}: {}{moved}: {message}", job.state)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_one_sentence_and_a_failure_an_error() {
        let job = Job {
            id: 3,
            kind: "drain".into(),
            volume: "web".into(),
            state: "done".into(),
            elapsed_s: 1.5,
            total_bytes: 1 << 20,
            done_bytes: 1 << 20,
            bytes_per_s: None,
            left_s: None,
            message: Some("nothing is dirty".into()),
        };
        let said = ended(job.clone()).unwrap();
        assert_eq!(said, "drain web: done in 1.5 s, 1 MiB of 1 MiB brought to the disk: nothing is dirty\n");
        let bare = Job { total_bytes: 0, message: None, kind: "attach".into(), ..job.clone() };
        assert_eq!(ended(bare).unwrap(), "attach web: done in 1.5 s\n");
        let failed = Job { state: "failed".into(), message: Some("no".into()), total_bytes: 0, ..job };
        assert_eq!(ended(failed).unwrap_err().to_string(), "drain web: failed: no");
    }
}
