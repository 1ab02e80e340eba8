//! `checkpoint`: a volume's disk is brought up to date and kept still while a command copies it.
//!
//! The daemon lets go of a checkpoint that nobody prolongs, so the verb does that for as long as it
//! lives; and if it was let go nevertheless, what was copied is not one moment, and the verb says so
//! whatever the command thinks of it.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use super::super::announce::print;
use super::super::api::client::Client;
use super::super::api::model::{Checkpoint, CheckpointRequest, Job};
use super::super::exit::{Exit, complain};
use super::super::sys;
use super::args::CheckpointArgs;
use super::{Done, OnlineError, client, say_json, watch};

/// For how long the daemon is to hold it without a word from here.
const HOLD_S: u32 = 60;
/// Between two words from here: one may be lost, and a busy host takes its time.
const PROLONG: Duration = Duration::from_secs(15);
/// Between two looks at the command and the clock.
const LOOK: Duration = Duration::from_millis(20);

/// `checkpoint`.
pub(super) fn checkpoint(args: &CheckpointArgs) -> Done {
    let client = client(args.online.control.as_ref())?;
    let path = format!("/v1/volumes/{}/checkpoint", args.volume);
    if args.release {
        let ended: Checkpoint = client.ask("DELETE", &path, None)?;
        match args.online.json {
            true => say_json(&serde_json::to_value(&ended).expect("a checkpoint is JSON")),
            false => print(&format!("checkpoint {}: that of job {} has ended\n", args.volume, ended.job)),
        }
        return Ok(Exit::Done);
    }
    let request = serde_json::to_value(CheckpointRequest { hold_s: Some(HOLD_S) });
    let job: Job = client.ask("POST", &path, Some(&request.expect("a request is JSON")))?;
    let (job, is_interrupted) = watch::follow_noting(&client, job)?;
    let held = Held { client: &client, path: format!("{path}?job={}", job.id), is_over: job.state != "done" };
    if is_interrupted && !held.is_over {
        // It was reached before it could be called off. Dropping it ends it.
        return Err(OnlineError::Job("interrupted; nothing is held".into()));
    }
    if args.online.json {
        say_json(&serde_json::to_value(&job).expect("a job is JSON"));
        if held.is_over {
            return Ok(Exit::Failed);
        }
    } else {
        let said = watch::ended(job)?;
        // The command's output is its own.
        if args.exec.is_none() {
            print(&said);
        }
    }
    let (exit, what) = match (&args.exec, args.hold) {
        (Some(command), _) => (held.run(command)?, "the command ended"),
        (None, Some(seconds)) => (held.wait(Duration::from_secs(seconds.into()))?, "the time was over"),
        (None, None) => (Exit::Done, "it was to end"),
    };
    held.end(what)?;
    Ok(exit)
}

/// A checkpoint that the daemon holds for us. Dropping it ends it.
struct Held<'a> {
    client: &'a Client,
    /// Of this checkpoint and no other.
    path: String,
    is_over: bool,
}

impl Held<'_> {
    /// Runs a command, to its end whatever happens: it may be in the middle of something.
    fn run(&self, command: &str) -> Result<Exit, OnlineError> {
        let mut signals = sys::signal_descriptor(&[libc::SIGINT, libc::SIGTERM])?;
        let mut child = Command::new("sh").arg("-c").arg(command).spawn()?;
        let mut prolonged = Instant::now();
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(exit(status));
            }
            // A terminal sends SIGINT to the command as well; SIGTERM comes to us alone.
            if signalled(&mut signals) == Some(libc::SIGTERM) {
                sys::terminate(&child)?;
            }
            self.prolong(&mut prolonged);
            std::thread::sleep(LOOK);
        }
    }

    /// Waits; a signal ends it early.
    fn wait(&self, time: Duration) -> Result<Exit, OnlineError> {
        let mut signals = sys::signal_descriptor(&[libc::SIGINT, libc::SIGTERM])?;
        let (begun, mut prolonged) = (Instant::now(), Instant::now());
        while begun.elapsed() < time {
            if signalled(&mut signals).is_some() {
                return Ok(Exit::Failed);
            }
            self.prolong(&mut prolonged);
            std::thread::sleep(LOOK.min(time.saturating_sub(begun.elapsed())));
        }
        Ok(Exit::Done)
    }

    fn prolong(&self, prolonged: &mut Instant) {
        if prolonged.elapsed() < PROLONG {
            return;
        }
        *prolonged = Instant::now();
        // If it is over, its end says so.
        if let Err(why) = self.client.ask::<Checkpoint>("PUT", &self.path, None) {
            complain(&why);
        }
    }

    /// Ends it: an error if it was not held any more.
    fn end(mut self, what: &str) -> Result<(), OnlineError> {
        self.is_over = true;
        match self.client.ask::<Checkpoint>("DELETE", &self.path, None) {
            Ok(_) => Ok(()),
            Err(why) => {
                let said = format!("the disk was not kept still until {what}, a copy of it is void: {why}");
                Err(OnlineError::Job(said))
            }
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            // Otherwise it ends by itself.
            drop(self.client.ask::<Checkpoint>("DELETE", &self.path, None));
        }
    }
}

/// The signal that has come, if any.
fn signalled(signals: &mut std::fs::File) -> Option<i32> {
    let mut about = [0; size_of::<libc::signalfd_siginfo>()];
    signals.read_exact(&mut about).ok()?;
    // `ssi_signo` comes first (signalfd(2)).
    about.first_chunk().map(|number| u32::from_ne_bytes(*number) as i32)
}

/// A command's status as a shell would pass it on.
fn exit(status: ExitStatus) -> Exit {
    match status.code().or_else(|| Some(128 + status.signal()?)) {
        Some(0) => Exit::Done,
        Some(code) => Exit::Command(code as u8),
        None => Exit::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_s_end_is_passed_on_as_a_shell_does() {
        for (raw, code) in [(0, 0), (1 << 8, 1), (77 << 8, 77), (libc::SIGTERM, 143), (libc::SIGKILL, 137)] {
            assert_eq!(exit(ExitStatus::from_raw(raw)).code(), code);
        }
    }
}
