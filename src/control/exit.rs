//! How the program ends: one exit status per kind of answer, as `--help` lists them.

use std::io::Write;
use std::process::ExitCode;

/// An answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// It is done; for `check`, the cache is whole.
    Done,
    /// It could not be done.
    Failed,
    /// It was asked for wrongly; nothing was touched.
    Usage,
    /// `check`: the cache is damaged.
    Damaged,
    /// `check`: there is no cache of ours.
    NotOurs,
    /// It has stopped without the answer of a disk. Nothing acknowledged is lost; what that disk
    /// had under way may still reach it, and the next start waits for that.
    Unanswered,
    /// No daemon answers at the control socket.
    NoDaemon,
    /// `checkpoint --exec`: as the command ended.
    Command(u8),
}

impl Exit {
    /// The status of the process.
    pub fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::Damaged => 3,
            Exit::NotOurs => 4,
            Exit::Unanswered => 5,
            Exit::NoDaemon => 6,
            Exit::Command(code) => code,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit.code())
    }
}

/// Says on standard error why it was not done.
pub fn complain(why: &dyn std::fmt::Display) {
    // A closed standard error has no reader; the exit status speaks.
    drop(writeln!(std::io::stderr(), "pcache-vhost: {}", sentence(why)));
}

/// An error as it is shown: one line, whatever a path or a key of a file brought into it.
pub fn sentence(why: &dyn std::fmt::Display) -> String {
    let mut line = String::new();
    for c in why.to_string().chars() {
        match c.is_control() {
            true => line.extend(c.escape_default()),
            false => line.push(c),
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown_instead() {
        assert_eq!(sentence(&"no `a\nb\x1b[2Jä`"), "no `a\\nb\\u{1b}[2Jä`");
    }
}
