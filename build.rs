//! Makes the table of kernels from their sources (`kernels/table.rs`), and with the feature
//! `emulator` builds the emulator: the kernels, compiled by the host's C++ compiler so that each of
//! their memory accesses is checked.
//!
//! Everything but the emulator needs only Rust's compiler: on a GPU the kernels are compiled at run
//! time.

use std::path::{Path, PathBuf};
use std::{env, fs};

#[path = "kernels/table.rs"]
mod table;

fn main() {
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed=build.rs");
    // Programs in C are bound to the version of the interface, PRISM_ABI_VERSION in
    // src/capi/mod.rs.
    if env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libprism.so.1");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let table = table::rust(Path::new("kernels")).unwrap_or_else(|e| panic!("{e}"));
    fs::write(out.join("kernels.rs"), table).expect("OUT_DIR can be written");
    #[cfg(feature = "emulator")]
    if !is_for_lints() {
        emulator::build(&out);
    }
}

/// Whether `cargo clippy` runs this script: it links nothing, and has folders of its own, so that
/// what it lacks is not missed elsewhere.
#[cfg(feature = "emulator")]
fn is_for_lints() -> bool {
    let wrapper = env::var_os("RUSTC_WORKSPACE_WRAPPER").map(PathBuf::from);
    wrapper.is_some_and(|path| path.file_stem().is_some_and(|name| name == "clippy-driver"))
}

#[cfg(feature = "emulator")]
mod emulator {
    use std::fs;
    use std::path::{Path, PathBuf};

    pub fn build(out: &Path) {
        let kernels = fs::canonicalize("kernels").expect("the kernels lie beside build.rs");
        let mut files: Vec<PathBuf> = fs::read_dir(&kernels)
            .expect("kernels can be listed")
            .map(|entry| entry.expect("kernels can be listed").path())
            .filter(|path| path.extension().is_some_and(|e| e == "cu"))
            .collect();
        files.sort();

        // The emulator itself refers to every kernel file, so that a linker keeps them.
        let mut registry = String::new();
        let mut calls = String::new();
        let mut checked = base(&kernels);
        for file in &files {
            let name =
                file.file_stem().and_then(|n| n.to_str()).expect("kernel files have plain names");
            let unit = out.join(format!("kernel_{name}.cpp"));
            let text = format!(
                "namespace kernels_{name} {{\n#include \"{name}.cu\"\n}}\nextern \"C\" void prism_emulator_keep_{name}() {{}}\n",
            );
            fs::write(&unit, format!("#include \"host/emulator.h\"\n{text}"))
                .expect("OUT_DIR can be written");
            registry += &format!("extern \"C\" void prism_emulator_keep_{name}();\n");
            calls += &format!("    prism_emulator_keep_{name}();\n");
            checked.file(&unit);
        }
        let keep = out.join("keep.cpp");
        fs::write(
            &keep,
            format!("{registry}extern \"C\" void prism_emulator_keep() {{\n{calls}}}\n"),
        )
        .expect("OUT_DIR can be written");

        // Every access of a kernel becomes a call of a function in emulator.cpp.
        checked.flag("-fsanitize=kernel-address");
        let parameters: [&str; 3] =
            ["asan-instrumentation-with-call-threshold=0", "asan-stack=0", "asan-globals=0"];
        // GCC does not know the kernels' `#pragma unroll`: a thread's sums would stay an array in
        // memory, each access of which is such a call too. Loops over them have at most 32 steps.
        let unrolled = ["max-completely-peel-times=32", "max-completely-peeled-insns=400"];
        if checked.get_compiler().is_like_clang() {
            for parameter in parameters {
                checked.flag("-mllvm").flag(format!("-{parameter}"));
            }
        } else {
            for parameter in parameters.iter().chain(&unrolled) {
                checked.flag("--param").flag(parameter);
            }
        }
        checked.compile("prism_kernels");
        base(&kernels)
            .file(kernels.join("host/emulator.cpp"))
            .file(&keep)
            .compile("prism_emulator");
        println!("cargo:rustc-link-lib=static=prism_kernels");
    }

    fn base(kernels: &Path) -> cc::Build {
        let mut build = cc::Build::new();
        build
            .cpp(true)
            .std("c++17")
            .opt_level(3)
            .include(kernels)
            .include(kernels.join("host"))
            .define("PRISM_EMULATOR", None);
        // Neither is a mistake here: unrolling only matters on the device, and arrays are filled by
        // loops that the compiler does not follow.
        build
            .flag("-Wno-unknown-pragmas")
            .flag_if_supported("-Wno-maybe-uninitialized")
            .debug(false)
            .pic(true);
        build
    }
}
