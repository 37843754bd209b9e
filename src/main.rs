//! The program `prism`.

use std::process::ExitCode;

/// When memory runs out the program ends in order, with a message.
#[global_allocator]
static ALLOCATOR: prism::memory::LastWords = prism::memory::LastWords;

fn main() -> ExitCode {
    take_stack();
    prism::cli::main()
}

/// Touches the stack that the main thread needs at once. A stack grows as it is used, and if there
/// is no address space left for that the system ends the program without a message.
#[inline(never)]
fn take_stack() {
    let room = [0u8; 512 << 10];
    std::hint::black_box(&room);
}
