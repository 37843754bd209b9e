//! `prism man`: manual pages, one a command.

use super::{Cli, Failure, print, say};
use crate::output::write_text;
use clap::{Args, CommandFactory};
use std::path::PathBuf;

/// Write manual pages, one per command
///
/// Writes prism.1 for the program itself, and a page for each command.
///
/// 'man' finds them in a folder such as ~/.local/share/man/man1. Without a folder, the page of the
/// program itself goes to standard output.
#[derive(Args)]
pub struct Man {
    /// Folder to write them to; it is created if needed
    #[arg(value_name = "DIR")]
    folder: Option<PathBuf>,
}

impl Man {
    pub fn run(&self) -> Result<(), Failure> {
        let mut program = Cli::command().disable_help_subcommand(true);
        // Gives commands their full names, and the flags that all of them have.
        program.build();
        let Some(folder) = &self.folder else { return print(&text(&page(program))?) };
        std::fs::create_dir_all(folder)
            .map_err(|e| Failure::Failed(format!("{}: {e}", folder.display())))?;
        let mut pages: Vec<_> = program.get_subcommands().cloned().map(page).collect();
        pages.push(page(program));
        for page in &pages {
            write_text(&folder.join(page.get_filename()), &text(page)?).map_err(Failure::Failed)?;
        }
        say(&format!("{}: {} pages\n", folder.display(), pages.len()))
    }
}

fn page(command: clap::Command) -> clap_mangen::Man {
    let version = concat!("prism ", env!("CARGO_PKG_VERSION"));
    clap_mangen::Man::new(command).source(version).manual("prism")
}

fn text(page: &clap_mangen::Man) -> Result<String, Failure> {
    let mut text = vec![];
    page.render(&mut text)?;
    Ok(String::from_utf8(text)?)
}
