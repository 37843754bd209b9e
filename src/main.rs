//! The program `prism`.

use std::process::ExitCode;

/// Where memory runs out the program ends in order, and says so.
#[global_allocator]
static ALLOCATOR: prism::memory::LastWords = prism::memory::LastWords;

fn main() -> ExitCode {
    take_stack();
    prism::cli::main()
}

/// Takes what the main thread needs of its stack at once. A stack grows as it is used, and where no
/// address space is left for that the system ends the program without a word.
#[inline(never)]
fn take_stack() {
    let room = [0u8; 512 << 10];
    std::hint::black_box(&room);
}
