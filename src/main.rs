//! The program `prism`.

use std::process::ExitCode;

/// Where memory runs out the program ends in order, and says so.
#[global_allocator]
static ALLOCATOR: prism::memory::LastWords = prism::memory::LastWords;

fn main() -> ExitCode {
    prism::cli::main()
}
