//! `prism completions`: scripts by which a shell completes commands and flags.

use super::{Cli, Failure, print};
use clap::{Args, CommandFactory};
use clap_complete::{Shell, generate};

/// Write a script by which a shell completes commands and flags
///
/// Writes a script to standard output by which a shell completes commands, flags and their values.
///
/// A new shell knows them after, for example, 'prism completions bash >
/// ~/.local/share/bash-completion/completions/prism', or 'prism completions fish >
/// ~/.config/fish/completions/prism.fish'.
#[derive(Args)]
pub struct Completions {
    /// The shell that will read it
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

impl Completions {
    pub fn run(&self) -> Result<(), Failure> {
        let mut script = vec![];
        generate(self.shell, &mut Cli::command(), "prism", &mut script);
        print(&String::from_utf8(script)?)
    }
}
