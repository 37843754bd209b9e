//! The C++ compiler, for tests that build kernels with the emulator as libraries.

use std::process::Command;

/// Runs the compiler; returns what it printed.
pub fn compile(arguments: &[&str]) -> String {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let output = Command::new(&compiler)
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("{compiler}: {e}"));
    assert!(
        output.status.success(),
        "{compiler} {arguments:?}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Whether it is Clang; otherwise it is GCC.
pub fn is_clang() -> bool {
    compile(&["--version"]).contains("clang")
}
