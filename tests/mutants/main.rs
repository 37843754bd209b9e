//! Tests of the tests: kernels broken on purpose, in the ways in which kernels break, must be
//! noticed by the emulator.
//!
//! Each mutant is the text of `kernels/` with one thing changed, built as a library whose kernels
//! replace the right ones. The unchanged text, built the same way, must pass.
#![cfg(feature = "emulator")]

#[path = "../common/built.rs"]
mod built;
#[path = "../common/mod.rs"]
mod common;
mod list;

use built::{compile, is_clang};
use common::{
    here, judge_dense, judge_losses, judge_optimizer, judge_padding, judge_rolling, judge_rounding,
    judge_rows, judge_stage, judge_sums, judge_tokens,
};
use list::MUTANTS;
use prism::device::{Cpu, Cuda, Device, Precision};
use prism::verify::run;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What has to notice.
#[derive(Clone, Copy, PartialEq)]
enum Check {
    /// A reference case.
    Case(&'static str),
    /// A decoder stage of a number of items and channels, compared with the CPU's.
    Stage(usize, usize),
    /// Layers and attention of tokens, compared with the CPU's.
    Tokens,
    /// Gradients through attention where tokens have padding, compared with those without it.
    Padding,
    /// How float32 is rounded in products.
    Rounding,
    /// A convolution of rolling planes, compared with the CPU's.
    Rolling,
    /// Dense layers by `wgmma`, compared with the CPU's.
    Dense,
    /// The gradient of what several ops read.
    Sums,
    /// Steps of the optimiser, compared with the CPU's.
    Optimizer,
    /// Losses and their gradients, compared with the CPU's.
    Losses,
    /// Rows of parameters and their gradients, compared with the CPU's.
    Rows,
}

/// A change of one kernel, and the check that has to notice it.
struct Mutant {
    what: &'static str,
    /// The kernel file to build.
    kernel: &'static str,
    /// The file to change, and what to change in it.
    file: &'static str,
    from: &'static str,
    to: &'static str,
    check: Check,
    precision: Precision,
    /// Part of the error, if there is one; otherwise the result must be wrong.
    message: Option<&'static str>,
}

/// What each library is compiled with, beside its file.
fn flags(kernels: &Path) -> Vec<String> {
    let include = format!("-I{}", kernels.display());
    let given = ["-c", "-std=c++17", "-fPIC", "-DPRISM_EMULATOR", "-w", include.as_str()];
    given.map(String::from).into()
}

/// Compiles the emulator itself, which no mutant changes and every library has in it.
fn build_host(folder: &Path) -> PathBuf {
    let object = folder.join("host.o");
    let source = here("kernels/host/emulator.cpp").display().to_string();
    let to = object.display().to_string();
    let flags = flags(&here("kernels"));
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    compile(&[&flags[..], &["-O2", &source, "-o", &to]].concat());
    object
}

/// Builds a kernel file of the tree `kernels` as a library, with the emulator's object `host`.
fn build(folder: &Path, kernels: &Path, kernel: &str, host: &Path) -> PathBuf {
    let object = build_object(folder, kernels, &format!("{kernel}.cu"));
    let library = folder.join("kernels.so").display().to_string();
    // Its symbols are its own, though the program has others of the same names.
    let host = host.display().to_string();
    compile(&["-shared", "-Wl,-Bsymbolic", &object, &host, "-o", &library]);
    library.into()
}

/// Compiles a file of kernels, with the headers of the tree `kernels`, as build.rs compiles them
/// all.
fn build_object(folder: &Path, kernels: &Path, file: &str) -> String {
    let at = |name: &str| folder.join(name).display().to_string();
    let [unit, object] = ["unit.cpp", "unit.o"].map(at);
    std::fs::write(&unit, format!("#include \"host/emulator.h\"\n#include {file:?}\n")).unwrap();
    let checked = ["-O1", "-fsanitize=kernel-address"].map(String::from);
    let (prefix, dash) = if is_clang() { ("-mllvm", "-") } else { ("--param", "") };
    let parameters =
        ["asan-instrumentation-with-call-threshold=0", "asan-stack=0", "asan-globals=0"]
            .into_iter()
            .flat_map(|p| [prefix.to_string(), format!("{dash}{p}")]);
    let flags: Vec<String> = flags(kernels).into_iter().chain(checked).chain(parameters).collect();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    compile(&[&flags[..], &[&unit, "-o", &object]].concat());
    object
}

/// The seeds that decide an order of threads each.
const SEEDS: [u64; 3] = [0, 1, 2];

/// A device over the library's kernels, which run in an order that the seed decides.
fn open(library: &Path, precision: Precision, seed: u64) -> Device {
    // SAFETY: it was just built from the emulator.
    let cuda = unsafe { Cuda::emulated_over(Cpu::new(1).unwrap(), precision, seed, library) };
    Device::Cuda(cuda.unwrap())
}

/// For each seed, whether the check passes on the library's kernels, or what was said if it does
/// not. A reference case is copied to a folder of `folder`, where it is alone.
fn judge(
    library: &Path,
    m: &Mutant,
    folder: &Path,
) -> impl Iterator<Item = (u64, Result<(), String>)> {
    // All are open before the first is judged, so that the library is loaded once.
    let devices = SEEDS.map(|seed| (seed, open(library, m.precision, seed)));
    devices.into_iter().map(move |(seed, device)| {
        let said = match m.check {
            Check::Stage(items, channels) => judge_stage(&device, items, channels),
            Check::Tokens => judge_tokens(&device),
            Check::Padding => judge_padding(&device),
            Check::Rounding => judge_rounding(&device),
            Check::Rolling => judge_rolling(&device),
            Check::Dense => judge_dense(&device),
            Check::Sums => judge_sums(&device),
            Check::Optimizer => judge_optimizer(&device),
            Check::Losses => judge_losses(&device),
            Check::Rows => judge_rows(&device),
            Check::Case(case) => judge_case(&device, &alone(folder, case)),
        };
        (seed, said)
    })
}

/// Whether the reference case in a folder passes on a device; what was said if it does not.
fn judge_case(device: &Device, folder: &Path) -> Result<(), String> {
    let mut said = String::new();
    let passed = run(device, folder, &[], |r| {
        let wrong = || {
            r.checks
                .iter()
                .find(|c| !c.passed())
                .map(|c| format!("wrong: {} {}", c.quantity, c.error))
        };
        said = r.failure.clone().or_else(wrong).unwrap_or_default();
    });
    if passed.unwrap() { Ok(()) } else { Err(said) }
}

/// A copy of `kernels/`, with a change of a file.
fn copy(to: &Path, (file, from, with): (&str, &str, &str)) {
    assert!(!file.starts_with("host/"), "{file} is compiled once, for all");
    let mut changed = false;
    for part in ["", "lib", "host"] {
        std::fs::create_dir_all(to.join(part)).unwrap();
        for entry in std::fs::read_dir(here("kernels").join(part)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                continue;
            }
            let name = format!("{part}/{}", path.file_name().unwrap().to_string_lossy())
                .trim_start_matches('/')
                .to_string();
            let mut text = std::fs::read_to_string(&path).unwrap();
            if name == file {
                assert_eq!(
                    text.matches(from).count(),
                    1,
                    "{file}: what is to be changed stands there once"
                );
                text = text.replace(from, with);
                changed = true;
            }
            std::fs::write(to.join(name), text).unwrap();
        }
    }
    assert!(changed, "there is no {file}");
}

/// A reference case alone in a folder of its own.
fn alone(folder: &Path, case: &str) -> PathBuf {
    let to = folder.join("cases").join(case);
    std::fs::create_dir_all(&to).unwrap();
    let file = here("tests/reference").join(format!("{case}.safetensors"));
    std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
    to
}

/// Does a piece of work on each item, as many at a time as the machine has cores; what came of
/// them, in no order.
fn on_all_cores<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let (next, made) = (AtomicUsize::new(0), Mutex::new(vec![]));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let one = work(item);
                    made.lock().unwrap().push(one);
                }
            });
        }
    });
    made.into_inner().unwrap()
}

/// The emulator's products of warpgroups and barriers with phases by themselves: right, and with
/// each mistake that it knows.
#[test]
fn warpgroups_multiply_what_their_descriptors_say() {
    let folder = tempfile::tempdir().unwrap();
    let host = build_host(folder.path()).display().to_string();
    let [cases, main] = ["tests/wgmma/cases.cu", "tests/wgmma/cases.cpp"]
        .map(|file| here(file).display().to_string());
    let kernels = build_object(folder.path(), &here("kernels"), &cases);
    let program = folder.path().join("cases").display().to_string();
    let flags = flags(&here("kernels"));
    let flags: Vec<&str> = flags.iter().map(String::as_str).filter(|flag| *flag != "-c").collect();
    compile(&[&flags[..], &["-O1", &main, &kernels, &host, "-o", &program]].concat());
    let output = std::process::Command::new(program).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// The part of the mutants that a process judges, as the one that started it says.
const PART: &str = "PRISM_TEST_MUTANTS";

/// Mutants of a part. glibc has room for the emulator's variables of each thread
/// (`kernels/host/emulator.cpp`, 24 bytes) in some seventy libraries of a process.
const AT_A_TIME: usize = 34;

#[test]
fn broken_kernels_are_noticed() {
    let mut mutants: Vec<&Mutant> = MUTANTS.iter().collect();
    // So that the right text of few kernels is needed in more than one part.
    mutants.sort_by_key(|m| m.kernel);
    let mut parts = mutants.chunks(AT_A_TIME);
    if let Ok(part) = std::env::var(PART) {
        return notice(parts.nth(part.parse().unwrap()).unwrap());
    }
    for part in 0..parts.len() {
        let program = std::env::current_exe().unwrap();
        let output = std::process::Command::new(program)
            .args(["--exact", "broken_kernels_are_noticed", "--nocapture"])
            .env(PART, part.to_string())
            .output()
            .unwrap();
        let [out, err] =
            [output.stdout, output.stderr].map(|said| String::from_utf8(said).unwrap());
        eprintln!("{err}");
        assert!(output.status.success() && out.contains("1 passed"), "part {part}:\n{out}{err}");
    }
}

/// Has mutants built and judged, beside the right text of their kernels.
fn notice(mutants: &[&Mutant]) {
    let shared = tempfile::tempdir().unwrap();
    let host = build_host(shared.path());

    // The right text passes, in any order of threads.
    let mut kernels: Vec<&str> = mutants.iter().map(|m| m.kernel).collect();
    kernels.sort();
    kernels.dedup();
    assert!(kernels.len() + mutants.len() < 70, "too many libraries: see AT_A_TIME");
    on_all_cores(&kernels, |kernel| {
        let folder = tempfile::tempdir().unwrap();
        let library = build(folder.path(), &here("kernels"), kernel, &host);
        // Loaded once for all checks. What a library has of each thread's memory, glibc has room
        // for in some seventy of them, and comes by it again only where none was loaded since.
        let _loaded = open(&library, Precision::F32, 0);
        let mut passed = vec![];
        for m in mutants.iter().filter(|m| m.kernel == *kernel) {
            let asked = (m.check, m.precision);
            if !passed.contains(&asked) {
                for (seed, said) in judge(&library, m, folder.path()) {
                    said.unwrap_or_else(|e| panic!("{kernel} as it is, seed {seed}: {e}"));
                }
                passed.push(asked);
            }
        }
    });

    let survivors = on_all_cores(mutants, |m| {
        let folder = tempfile::tempdir().unwrap();
        let kernels = folder.path().join("kernels");
        copy(&kernels, (m.file, m.from, m.to));
        let library = build(folder.path(), &kernels, m.kernel, &host);
        let mut said = vec![];
        let noticed =
            judge(&library, m, folder.path()).filter_map(|(_, said)| said.err()).any(|e| {
                let places = ["kernel ", "block ", "thread "];
                let noticed = m.message.is_none_or(|message| {
                    e.contains(message) && places.iter().all(|place| e.contains(place))
                });
                said.push(e);
                noticed
            });
        eprintln!("{}: {:?}", m.what, said.last());
        (!noticed).then_some((m.what, said))
    });
    let survivors: Vec<_> = survivors.into_iter().flatten().collect();
    assert!(survivors.is_empty(), "not noticed: {survivors:#?}");
}
