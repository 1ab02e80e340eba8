//! Man pages and shell completions, made from the very definition of the command line, so that they
//! cannot say anything else than `--help`.

use std::io;

use clap::CommandFactory;

use super::cli::Cli;
use super::exit::Exit;
use super::online::args::{GenerateArgs, Generated};
use super::run::RunError;

/// `generate`.
pub(super) fn generate(args: &GenerateArgs) -> Result<Exit, RunError> {
    let mut command = Cli::command();
    match &args.what {
        Generated::Man { directory } => {
            clap_mangen::generate_to(command, directory).map_err(RunError::os("writing man pages"))?;
        }
        Generated::Completion { shell } => {
            let name = command.get_name().to_owned();
            // To memory first: a closed pipe is no reason to panic.
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut command, name, &mut script);
            match io::Write::write_all(&mut io::stdout(), &script) {
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                    return Err(RunError::os("writing the completion")(error));
                }
                _ => {}
            }
        }
    }
    Ok(Exit::Done)
}
