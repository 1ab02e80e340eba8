//! Where events go: one line each, on standard error.

use std::io::IsTerminal;

use tracing::Level;

use super::cli::LogLevel;

impl From<LogLevel> for Level {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Level::ERROR,
            LogLevel::Warn => Level::WARN,
            LogLevel::Info => Level::INFO,
            LogLevel::Debug => Level::DEBUG,
            LogLevel::Trace => Level::TRACE,
        }
    }
}

/// Starts logging. Called once, by `main`.
pub fn start(level: LogLevel) {
    tracing_subscriber::fmt()
        .with_max_level(Level::from(level))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}

/// Writes a line that was asked for: as an event, or bare where the level would swallow it.
pub fn asked_for(line: &str) {
    if tracing::enabled!(Level::INFO) {
        tracing::info!("{line}");
    } else {
        use std::io::Write;
        // Standard error may be closed; then nobody reads the answer.
        drop(writeln!(std::io::stderr(), "{line}"));
    }
}
