//! `prism completions`: scripts by which a shell completes commands and flags.

use super::{Cli, Failure, print};
use clap::{Args, CommandFactory};
use clap_complete::{Shell, generate};

/// Print a shell completion script
///
/// The script completes commands, flags and their values.
///
/// For example, 'prism completions bash > ~/.local/share/bash-completion/completions/prism', or
/// 'prism completions fish > ~/.config/fish/completions/prism.fish'. New shells then use it.
#[derive(Args)]
pub struct Completions {
    /// Shell to write the script for
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
