//! The kernels as machine code, without a GPU: NVRTC compiles them for every architecture, and the
//! assembler's report on each is checked against a budget.
//!
//! Needs the library NVRTC in `LD_LIBRARY_PATH`, and for the search for matrix instructions
//! `nvdisasm` in `PATH`: `eval "$(scripts/nvrtc)"` fetches both. Where they are absent these tests
//! say that they were skipped, or fail if `PRISM_TEST_NVRTC=required`. `PRISM_TEST_ARCHITECTURES`
//! names some of the architectures, as `sm_80,sm_120`: `.ci/run` compiles for Hopper; a job
//! beside it for every architecture, with the oldest supported NVRTC too. What was compiled is kept
//! in cargo's target folder, `tmp/kernels`: a kernel is compiled again when its text, the way to
//! compile it or NVRTC is another. How the table of kernels is read from their sources, and that
//! the budget has a line for each, is tested everywhere.

#[path = "../kernels/table.rs"]
#[allow(dead_code)]
mod table;

mod common;
#[path = "common/listing.rs"]
mod listing;

use listing::{Listing, instruction};
use prism::device::cuda::nvrtc::{self, Compiled};
use prism::device::cuda::source::{self, is_matrix};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

/// From Ampere to Blackwell.
const ARCHITECTURES: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"];

/// The architectures that the kernels are compiled for here.
fn architectures() -> Vec<&'static str> {
    let Ok(names) = std::env::var("PRISM_TEST_ARCHITECTURES") else { return ARCHITECTURES.into() };
    let known = |name: &str| ARCHITECTURES.into_iter().find(|arch| *arch == name);
    let one =
        |name: &str| known(name).unwrap_or_else(|| panic!("PRISM_TEST_ARCHITECTURES: '{name}'"));
    names.split(',').map(one).collect()
}

/// The result of some work for each of them, one thread per architecture.
fn by_architecture<T: Send>(work: impl Fn(&'static str) -> T + Sync) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            architectures().into_iter().map(|arch| scope.spawn(move || work(arch))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The most registers that a thread of each kernel may use on any architecture: one line
/// `name registers` each.
const BUDGET: &str = include_str!("kernels/budget.txt");

/// The lines of [`BUDGET`] as pairs.
fn budget() -> Vec<(&'static str, usize)> {
    let line = |line: &'static str| -> Option<(&'static str, usize)> {
        let (kernel, registers) = line.split_once(' ')?;
        Some((kernel, registers.parse().ok()?))
    };
    let lines = BUDGET.lines().filter(|l| !l.starts_with('#'));
    lines
        .map(|l| {
            line(l).unwrap_or_else(|| {
                panic!("tests/kernels/budget.txt: '{l}' is not a kernel and its registers")
            })
        })
        .collect()
}

/// Whether these tests may not be skipped.
fn required() -> bool {
    std::env::var("PRISM_TEST_NVRTC").is_ok_and(|v| v == "required")
}

/// The assembler's report on a kernel.
#[derive(Clone, Debug, Default)]
struct Usage {
    registers: usize,
    stack: usize,
    spilled: usize,
}

/// A file's machine code for an architecture.
struct Built {
    file: &'static str,
    arch: &'static str,
    code: Vec<u8>,
    kernels: BTreeMap<String, Usage>,
}

fn usages(log: &str) -> BTreeMap<String, Usage> {
    let mut all: BTreeMap<String, Usage> = BTreeMap::new();
    let mut name = String::new();
    let number = |line: &str, before: &str| -> Option<usize> {
        let end = line.find(before)?;
        line[..end].rsplit(|c: char| !c.is_ascii_digit()).find(|s| !s.is_empty())?.parse().ok()
    };
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            name = rest.split('\'').next().unwrap_or_default().to_string();
            all.entry(name.clone()).or_default();
        }
        let Some(usage) = all.get_mut(&name) else { continue };
        if let Some(v) = number(line, " bytes stack frame") {
            usage.stack = v;
            usage.spilled = ["stores", "loads"]
                .iter()
                .map(|what| number(line, &format!(" bytes spill {what}")).unwrap())
                .sum();
        }
        if let Some(v) = number(line, " registers") {
            usage.registers = v;
        }
    }
    all
}

/// What NVRTC makes of a source; a source that does not compile fails the test.
fn compile(file: &str, text: &str, arch: &str) -> Compiled {
    nvrtc::compile(file, text, arch).unwrap_or_else(|e| panic!("{e}"))
}

/// All that machine code depends on, but for the file and the architecture: NVRTC to its build,
/// which it says in what it makes of any source, how it is called, and the headers.
fn common_key() -> blake3::Hasher {
    let mut key = blake3::Hasher::new();
    let empty = compile("empty.cu", "extern \"C\" __global__ void empty() {}", "compute_80");
    add(&mut key, &empty.code);
    add(&mut key, include_bytes!("../src/device/cuda/nvrtc.rs"));
    for (name, text) in source::HEADERS {
        add(&mut key, name.as_bytes());
        add(&mut key, text.as_bytes());
    }
    key
}

/// Adds bytes to a key, with their number, so that no two lists of them are the same.
fn add(key: &mut blake3::Hasher, bytes: &[u8]) {
    key.update(&(bytes.len() as u64).to_le_bytes());
    key.update(bytes);
}

/// The result of [`compile`], from the file that keeps it if that has this key.
fn compile_or_kept(kept: &Path, key: &[u8; 32], of: [&str; 3]) -> Compiled {
    // The key, the length of the report, the report, the code.
    let read = || -> Option<Compiled> {
        let bytes = std::fs::read(kept).ok()?;
        let rest = bytes.strip_prefix(&key[..])?;
        let (length, rest) = rest.split_first_chunk()?;
        let (log, code) =
            rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
        Some(Compiled { code: code.to_vec(), log: String::from_utf8(log.to_vec()).ok()? })
    };
    if let Some(compiled) = read() {
        return compiled;
    }
    let [file, text, arch] = of;
    let compiled = compile(file, text, arch);
    // Whole or not at all. If it cannot be kept, it is compiled again the next time.
    let write = || -> std::io::Result<()> {
        let folder = kept.parent().expect("a file in a folder");
        std::fs::create_dir_all(folder)?;
        let mut part = tempfile::NamedTempFile::new_in(folder)?;
        part.write_all(key)?;
        part.write_all(&(compiled.log.len() as u64).to_le_bytes())?;
        part.write_all(compiled.log.as_bytes())?;
        part.write_all(&compiled.code)?;
        part.persist(kept)?;
        Ok(())
    };
    let _ = write();
    compiled
}

/// Everything compiled, once; none if there is no NVRTC.
fn built() -> Option<&'static [Built]> {
    static ALL: OnceLock<Result<Vec<Built>, String>> = OnceLock::new();
    let all = ALL.get_or_init(|| match nvrtc::version() {
        Ok(version) => {
            eprintln!("NVRTC {version:?}");
            let (key, (major, minor)) = (common_key(), version);
            let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
            let compile = |(arch, &(file, text)): (&'static str, &(&'static str, &str))| {
                let mut key = key.clone();
                [file, text, arch].iter().for_each(|part| add(&mut key, part.as_bytes()));
                let kept = folder.join(format!("{file}-{arch}-{major}.{minor}"));
                let key = key.finalize();
                let compiled = compile_or_kept(&kept, key.as_bytes(), [file, text, arch]);
                Built { file, arch, code: compiled.code, kernels: usages(&compiled.log) }
            };
            // All cores, also with one architecture.
            let each = architectures()
                .into_iter()
                .flat_map(|arch| source::FILES.iter().map(move |file| (arch, file)));
            Ok(each.collect::<Vec<_>>().into_par_iter().map(compile).collect())
        }
        Err(e) => Err(e.to_string()),
    });
    match all {
        Ok(all) => Some(all),
        Err(e) => {
            assert!(!required(), "PRISM_TEST_NVRTC=required: {e}");
            common::skipped(&format!("no kernel is compiled: {e}"));
            None
        }
    }
}

#[test]
fn every_kernel_fits_its_budget_on_every_architecture() {
    let Some(all) = built() else { return };
    let budget: BTreeMap<&str, usize> = budget().into_iter().collect();
    let mut most: BTreeMap<&str, usize> = BTreeMap::new();
    for b in all {
        assert!(b.kernels.len() > 1 && b.code.len() > 1000, "{} for {} is empty", b.file, b.arch);
        let declared =
            source::KERNELS.iter().filter(|kernel| kernel.file == b.file).map(|kernel| kernel.name);
        let (compiled, declared): (Vec<_>, Vec<_>) =
            (b.kernels.keys().collect(), declared.collect());
        assert_eq!(
            compiled, declared,
            "{} for {}: other kernels than kernels/table.rs reads",
            b.file, b.arch
        );
        for (kernel, usage) in &b.kernels {
            assert_eq!(
                (usage.stack, usage.spilled),
                (0, 0),
                "{kernel} for {} uses local memory: {usage:?}",
                b.arch
            );
            assert!(usage.registers > 0);
            most.entry(kernel)
                .and_modify(|m| *m = usage.registers.max(*m))
                .or_insert(usage.registers);
        }
    }
    if std::env::var_os("PRISM_PRINT_BUDGET").is_some() {
        most.iter().for_each(|(kernel, registers)| println!("{kernel} {registers}"));
    }
    for (kernel, registers) in &most {
        let allowed = budget.get(kernel).unwrap_or_else(|| {
            panic!(
                "{kernel} has no line in tests/kernels/budget.txt: it uses {registers} registers"
            )
        });
        assert!(
            registers <= allowed,
            "{kernel} uses {registers} registers, tests/kernels/budget.txt allows {allowed}"
        );
    }
}

/// For a GPU that is newer than NVRTC. PTX ends with a zero, because a driver reads it as text.
#[test]
fn kernels_are_compiled_for_drivers_to_translate() {
    if built().is_none() {
        return;
    }
    let (file, text) = source::FILES.iter().find(|(file, _)| *file == "session.cu").unwrap();
    let code = compile(file, text, "compute_80").code;
    let ptx = std::ffi::CStr::from_bytes_with_nul(&code).unwrap().to_str().unwrap();
    assert!(ptx.contains(".target sm_80") && ptx.contains(".entry pack_bits_f16"), "{ptx}");
    // One that every NVRTC here knows.
    assert_eq!(nvrtc::target((9, 0)).unwrap().arch, "sm_90a");
}

#[test]
fn the_budget_has_a_line_a_kernel() {
    let named: Vec<&str> = budget().into_iter().map(|(kernel, _)| kernel).collect();
    let gone: Vec<_> = named
        .iter()
        .filter_map(|kernel| source::find(kernel).err())
        .map(|e| e.to_string())
        .collect();
    assert!(gone.is_empty(), "tests/kernels/budget.txt names kernels that are not there: {gone:?}");
    let missing: Vec<_> = source::KERNELS
        .iter()
        .map(|kernel| kernel.name)
        .filter(|kernel| !named.contains(kernel))
        .collect();
    assert!(missing.is_empty(), "kernels without a line in tests/kernels/budget.txt: {missing:?}");
    assert_eq!(
        named.len(),
        source::KERNELS.len(),
        "a kernel has two lines in tests/kernels/budget.txt"
    );
}

/// The declarations in a file and a header.
fn declared(file: &str, header: &str) -> Result<BTreeMap<String, table::Declared>, String> {
    table::declared("some.cu", &|name| match name {
        "some.cu" => Some(file.into()),
        "lib/some.cuh" => Some(header.into()),
        _ => None,
    })
}

#[test]
fn kernels_are_read_from_what_declares_them() {
    let header = r#"
#pragma once
#ifdef PRISM_EMULATOR
#include "host/emulator.h"
#else
constexpr int WIDTH = 64, TWICE = 2 * WIDTH;
#endif
#define KERNEL(name, threads, blocks, parameters, ...) void name parameters { __VA_ARGS__; }
#define BODY(N, ...) int sizes[2] = {1, N}; __VA_ARGS__(x, ")")
// In two lines.
// tensor cores
template <class T, int N>
__device__ __forceinline__ void fast(const T *x, const char *text) {}
"#;
    let file = r#"
#include "lib/some.cuh"
/* KERNEL(in_a_comment, 32, 1, (int n), {})
   KERNEL(in_its_second_line, 32, 1, (int n), {}) */
#define MORE int count, float scale
#define ONE(NAME, T, N, FUNCTION)                                                KERNEL(some_##NAME##N##_##T, WIDTH, 2, (const T *x, T * y, MORE), BODY(N, FUNCTION<T, N>))
#define ALL(T, FUNCTION) ONE(, T, 8, FUNCTION) ONE(few_, T, 8, FUNCTION)
ALL(f32, slow) // KERNEL(behind, 32, 1, (int n), {})
ALL(bf16, fast)
KERNEL(other, TWICE, 2, (const unsigned *x, int64 n, double a, f32 b), { if (n) { x[0, 1] = a; } })
"#;
    let found = declared(file, header).unwrap();
    let kernel = |threads, parameters: [(&str, &'static str); 4], tensor_cores| table::Declared {
        file: "some.cu".into(),
        threads,
        parameters: parameters.map(|(name, kind)| (name.to_string(), kind)).to_vec(),
        tensor_cores,
    };
    let some = |fast| {
        let parameters = [("x", "Pointer"), ("y", "Pointer"), ("count", "Int"), ("scale", "Float")];
        kernel(Some(64), parameters, fast)
    };
    let other = [("x", "Pointer"), ("n", "Long"), ("a", "Double"), ("b", "Float")];
    let expected = [
        ("other", kernel(None, other, false)),
        ("some_8_bf16", some(true)),
        ("some_8_f32", some(false)),
        ("some_few_8_bf16", some(true)),
        ("some_few_8_f32", some(false)),
    ];
    assert_eq!(found, BTreeMap::from(expected.map(|(name, kernel)| (name.to_string(), kernel))));
}

#[test]
fn what_is_not_understood_of_a_kernel_is_an_error() {
    for (file, said) in [
        ("void f() {}", "declares no kernel"),
        (
            "KERNEL(a, 32, 1, (unsigned n), {})",
            "some.cu, a: no argument of a launch is a 'unsigned n'",
        ),
        ("KERNEL(a, 32, 1, (int n), {})\nKERNEL(a, 32, 1, (int n), {})", "declares a twice"),
        ("KERNEL(a, 32, 1)", "KERNEL number 1 has too few arguments"),
        ("KERNEL(a, 32, 1, int n, {})", "KERNEL number 1 has no parameters"),
        ("KERNEL(a b, 32, 1, (int n), {})", "KERNEL number 1 has more than a word for a name"),
        ("KERNEL(a, 32, 1, (int n), {}", "KERNEL number 1 has no end"),
        ("#if 1\nKERNEL(a, 32, 1, (int n), {})\n#endif", "#if is more than kernels/table.rs reads"),
        ("#define F(X) F(X)\nF(1)", "a macro expands to itself"),
        ("// tensor cores\nKERNEL", "no function is below '// tensor cores'"),
        ("#include \"none.cuh\"", "kernels/none.cuh cannot be read"),
        ("KERNEL(a, 32, 1, (const float *), {})", "some.cu, a: a parameter has no name"),
        (
            "KERNEL(a, 32, 1, (float *move), {})",
            "some.cu, a: parameter 'move': Rust has this word for itself",
        ),
        (
            "KERNEL(a, 32, 1, (int Count), {})",
            "some.cu, a: parameter 'Count': a field of Rust is written in lower case",
        ),
    ] {
        let why = declared(file, "").unwrap_err();
        assert!(why.contains(said), "{file}: {why}");
    }
}

#[test]
fn kernels_of_a_family_have_the_same_parameters() {
    let kernel =
        |name: &str, parameters: &str| format!("KERNEL({name}, 32, 1, ({parameters}), {{}})\n");
    let (two, three) = ("float *x, int n", "float *x, int n, int64 m");
    // One with other parameters is in none; a single one with another name is a family by itself.
    let file = [
        kernel("all_f32", two),
        kernel("all_f16", two),
        kernel("all_bf16", two),
        kernel("all_tf32x3", two),
        kernel("most_f32", two),
        kernel("most_f16", three),
        kernel("most_bf16", three),
        kernel("none_f32", two),
        kernel("none_f16", three),
        kernel("one_f16", two),
        kernel("alone", two),
    ]
    .concat();
    let found = declared(&file, "").unwrap();
    let families = table::families(&found).unwrap();
    let types: Vec<(&str, [bool; 5])> =
        families.iter().map(|(base, family)| (*base, family.types)).collect();
    assert_eq!(
        types,
        [
            ("all", [true, true, true, false, true]),
            ("most", [false, true, true, false, false]),
            ("one", [false, true, false, false, false])
        ]
    );
    assert_eq!(families["most"].parameters, found["most_f16"].parameters);
    // The same with other names.
    let found = declared(&(kernel("add_f32", two) + &kernel("add_f16", "float *x, int count")), "")
        .unwrap();
    assert_eq!(
        table::families(&found).unwrap_err(),
        "add: the parameters are called (x, n) for one type of elements and (x, count) for another"
    );
    // Together with a kernel that has other parameters.
    let file = [
        kernel("mul_f32", two),
        kernel("mul_f16", three),
        kernel("mul_bf16", "float *x, int n, int64 count"),
    ];
    let found = declared(&file.concat(), "").unwrap();
    assert!(table::families(&found).unwrap_err().starts_with("mul: the parameters are called"));
}

/// The struct that launches of a kernel take has one field per parameter; kernels with the same
/// parameters share one.
#[test]
fn kernels_parameters_become_fields() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("lib")).unwrap();
    let write = |text: &str| {
        std::fs::write(folder.path().join("some.cu"), text).unwrap();
        table::rust(folder.path())
    };
    let made = write(
        "#define MORE double *y, int64 n, int c, float a, double b
         KERNEL(some_sums_f16, 32, 1, (const f16 *x, MORE), {})
         KERNEL(some_sums_f32, 32, 1, (const f32 *x, MORE), {})
         KERNEL(one, 32, 1, (int *n), {})
         KERNEL(other, 32, 1, (float *n), {})",
    )
    .unwrap();
    let lines: Vec<&str> = made.lines().map(str::trim).collect();
    for expected in [
        &[
            "pub struct SomeSumsArgs<'a> {",
            "pub x: Pointer<'a>,",
            "pub y: Pointer<'a>,",
            "pub n: Long,",
            "pub c: Int,",
            "pub a: f32,",
            "pub b: f64,",
            "}",
        ][..],
        &["pub const SOME_SUMS_F16: TypedKernel<SomeSumsArgs<'static>> = TypedKernel {"],
        &["pub const ONE: TypedKernel<OneArgs<'static>> = TypedKernel {"],
        &["pub struct OneArgs<'a> {", "pub n: Pointer<'a>,", "}"],
        &["pub type OtherArgs<'a> = OneArgs<'a>;"],
    ] {
        assert!(
            lines.windows(expected.len()).any(|found| found == expected),
            "{expected:?}: {made}"
        );
    }
    assert_eq!(
        write("KERNEL(some, 32, 1, (int n), {})").unwrap_err(),
        "some has no pointer among its parameters, and so no result"
    );
}

/// Facts about the machine code of a kernel. Instructions are counted from the first.
#[derive(Debug, Default)]
struct Shown {
    /// Matrix instructions.
    matrix: usize,
    instructions: usize,
    /// The first that waits for the previous launch.
    waits: Option<usize>,
    /// The first that lets the next launch begin.
    lets_begin: Option<usize>,
    /// The first that reads or writes device memory, or jumps elsewhere.
    acts: Option<usize>,
}

impl Shown {
    fn see(&mut self, line: &str) {
        let Some((name, _)) = instruction(line) else { return };
        let at = self.instructions;
        self.instructions += 1;
        let base = name.split('.').next().unwrap_or(name);
        let first = match base {
            "HMMA" | "HGMMA" => {
                self.matrix += 1;
                return;
            }
            "ACQBULK" => &mut self.waits,
            "PREEXIT" => &mut self.lets_begin,
            "LD" | "LDG" | "LDGSTS" | "ST" | "STG" | "ATOM" | "ATOMG" | "RED" | "REDG" | "BRA"
            | "CALL" | "EXIT" => &mut self.acts,
            _ => return,
        };
        first.get_or_insert(at);
    }
}

#[test]
fn what_a_kernel_does_is_read_from_a_listing() {
    let mut shown = Shown::default();
    for line in [
        "        .global         some",
        "        /*0000*/                   LDC R1, c[0x0][0x28] ;",
        "        /*0010*/                   ACQBULK ;",
        ".L_x_71:",
        "        /*0020*/              @!P0 LDG.E.64 R2, desc[UR4][R2.64] ;",
        "        /*0030*/                   PREEXIT ;",
        "        /*0040*/                   HMMA.16816.F32 R4, R4, R8, RZ ;",
        "        /*0050*/                   STG.E [R2.64], R4 ;",
    ] {
        shown.see(line);
    }
    assert_eq!((shown.matrix, shown.instructions), (1, 6));
    assert_eq!((shown.waits, shown.acts, shown.lets_begin), (Some(1), Some(2), Some(3)));
}

/// A kernel's machine code.
struct Disassembled {
    arch: &'static str,
    kernel: String,
    shown: Shown,
    /// The line of the table that has this kernel, for [`TABLED`].
    line: Option<String>,
}

/// The table of what the kernels' machine code consists of, and the architecture that it is for.
const TABLE: &str = "tests/kernels/instructions.txt";
const TABLED: &str = "sm_90a";

/// Everything disassembled, once; none if it cannot be.
fn disassembled() -> Option<&'static [Disassembled]> {
    static ALL: OnceLock<Vec<Disassembled>> = OnceLock::new();
    let all = built()?;
    if Command::new("nvdisasm").arg("--version").output().is_err() {
        assert!(!required(), "PRISM_TEST_NVRTC=required: no nvdisasm in PATH");
        common::skipped("no nvdisasm in PATH");
        return None;
    }
    let listings = || {
        let folder = tempfile::tempdir().unwrap();
        let of = |arch: &'static str| {
            let path = folder.path().join(format!("{arch}.cubin"));
            let mut found = vec![];
            for b in all.iter().filter(|b| b.arch == arch) {
                std::fs::write(&path, &b.code).unwrap();
                let out = Command::new("nvdisasm").arg("--print-code").arg(&path).output().unwrap();
                assert!(out.status.success(), "nvdisasm: {}", String::from_utf8_lossy(&out.stderr));
                let text = String::from_utf8_lossy(&out.stdout);
                // A function's code follows its section's name.
                let mut shown: BTreeMap<&str, (Shown, Listing)> = BTreeMap::new();
                let mut kernel = "";
                for line in text.lines() {
                    if let Some(name) = line.split(".section\t.text.").nth(1) {
                        kernel = name.split([',', '\t', ' ']).next().unwrap();
                    }
                    let (shown, listing) = shown.entry(kernel).or_default();
                    shown.see(line);
                    if arch == TABLED {
                        listing.see(line);
                    }
                }
                for (kernel, usage) in &b.kernels {
                    let (shown, listing) = shown.remove(kernel.as_str()).unwrap_or_default();
                    assert!(shown.instructions > 0, "{kernel} for {arch} has no code");
                    let line = (arch == TABLED).then(|| {
                        let threads = source::find(kernel).unwrap().threads;
                        listing::line(kernel, threads, usage.registers, &listing)
                    });
                    found.push(Disassembled { arch, kernel: kernel.clone(), shown, line });
                }
            }
            found
        };
        by_architecture(of).into_iter().flatten().collect()
    };
    Some(ALL.get_or_init(listings))
}

/// Whether a kernel is for an architecture: files whose names end so are for `wgmma`, which no
/// other has.
fn is_for(arch: &str, kernel: &str) -> bool {
    arch == "sm_90a" || !source::find(kernel).unwrap().file.ends_with("_wgmma.cu")
}

#[test]
fn matrix_kernels_use_tensor_cores() {
    let Some(all) = disassembled() else { return };
    for Disassembled { arch, kernel, shown, .. } in all {
        assert_eq!(
            shown.matrix > 0,
            is_matrix(kernel) && is_for(arch, kernel),
            "{kernel} for {arch}: {} matrix instructions",
            shown.matrix
        );
    }
    assert!(all.iter().any(|built| built.shown.matrix > 0));
}

/// What early launches depend on: a kernel waits for the previous launch before it does anything,
/// and lets the next begin only after that. Older architectures have no early launches.
#[test]
fn kernels_wait_for_their_turn_before_they_touch_memory() {
    let Some(all) = disassembled() else { return };
    for Disassembled { arch, kernel, shown, .. } in all {
        if ["sm_80", "sm_86", "sm_89"].contains(arch) {
            assert_eq!((shown.waits, shown.lets_begin), (None, None), "{kernel} for {arch}");
            continue;
        }
        let (Some(waits), Some(lets_begin)) = (shown.waits, shown.lets_begin) else {
            panic!("{kernel} for {arch} does not wait, or lets nothing begin: {shown:?}");
        };
        assert!(
            waits < lets_begin && shown.acts.is_some_and(|acts| waits < acts),
            "{kernel} for {arch}: {shown:?}"
        );
    }
}

#[test]
fn kernels_consist_of_the_instructions_that_their_table_says() {
    let update = std::env::var_os("PRISM_UPDATE_INSTRUCTIONS").is_some();
    let Some(all) = disassembled() else { return };
    let mut lines: Vec<&str> = all.iter().filter_map(|built| built.line.as_deref()).collect();
    if !architectures().contains(&TABLED) {
        return;
    }
    lines.sort_unstable();
    let (major, minor) = nvrtc::version().unwrap();
    let by = format!("# NVRTC {major}.{minor}, {TABLED}");
    let file = common::here(TABLE);
    let kept = std::fs::read_to_string(&file).unwrap_or_default();
    let theirs: Vec<&str> = kept.lines().filter(|line| !line.starts_with('#')).collect();
    // Every compiler builds the same kernels: each must have its line.
    let names = |lines: &[&str]| -> Vec<String> {
        lines.iter().filter_map(|line| line.split(' ').next()).map(str::to_string).collect()
    };
    if update {
        let about = "# What the kernels' machine code consists of: docs/kernels.md says what the columns are. PRISM_UPDATE_INSTRUCTIONS=1 cargo test --test kernels kernels_consist writes it.";
        let table = [&[about, by.as_str(), listing::HEAD][..], &lines[..]].concat().join("\n");
        std::fs::write(&file, table + "\n").unwrap();
        return;
    }
    assert_eq!(names(&theirs), names(&lines), "{TABLE} has other kernels");
    let other = kept.lines().nth(1).unwrap_or_default();
    if other != by {
        common::skipped(&format!("{TABLE} is by another compiler: '{other}', here '{by}'"));
        return;
    }
    let differ: Vec<String> = theirs
        .iter()
        .zip(&lines)
        .filter(|(theirs, ours)| theirs != ours)
        .map(|(theirs, ours)| format!("- {theirs}\n+ {ours}"))
        .collect();
    assert!(
        differ.is_empty(),
        "{TABLE} differs from what is compiled (PRISM_UPDATE_INSTRUCTIONS=1 writes it anew):\n{}\n{}",
        listing::HEAD,
        differ.join("\n")
    );
}

#[test]
fn instructions_are_counted_by_loop_and_kind() {
    let code = "
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
.L_x_2:
        /*0020*/                   LDSM.16.M88.4 R8, [R3] ;
        /*0030*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0040*/                   HFMA2.MMA R9, -RZ, RZ, 0, 0 ;
        /*0050*/              @!P1 IMAD.MOV.U32 R7, RZ, RZ, R9 ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/                   FFMA R5, R5, R6, R7 ;
        /*0080*/                   STS [R2], R5 ;
        /*0090*/               @P2 BRA `(.L_x_1) ;
        /*00a0*/                   STG.E desc[UR4][R2.64], R5 ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3);
        /*00d0*/                   NOP ;";
    let mut listing = Listing::default();
    code.lines().for_each(|line| listing.see(line));
    let whole = listing.whole();
    let counts = |mix: listing::Mix| {
        let shared = [mix.from_shared, mix.to_shared];
        let global = [mix.from_global, mix.to_global];
        (mix.instructions, mix.matrix, shared, global, mix.integer, mix.float, mix.multiply_adds)
    };
    assert_eq!(counts(whole), (13, 1, [1, 1], [1, 1], 2, 1, 65));
    // The loop around it has products of its own, and no matrix instruction.
    let found = listing.loop_of_most().unwrap();
    assert_eq!(counts(found), (5, 1, [1, 0], [0, 0], 2, 0, 64));
    assert_eq!(
        listing::line("some", Some(128), 168, &listing),
        "some                                       168    12    13     5      1      1      0       2     0   12.80"
    );
    // No loop, or none with the matrix instruction: that counts for nothing.
    let mut straight = Listing::default();
    let once = code.lines().filter(|line| !line.contains("L_x_2"));
    once.for_each(|line| straight.see(line));
    assert_eq!(counts(straight.loop_of_most().unwrap()).0, 8);
    let mut straight = Listing::default();
    code.lines().filter(|line| !line.contains("BRA")).for_each(|line| straight.see(line));
    assert_eq!(straight.loop_of_most(), None);
    // Registers by the eight of a thread, warps by the four, blocks of a multiprocessor.
    let of = |threads, registers| listing::warps(threads, registers, 0);
    assert_eq!([of(128, 168), of(256, 64), of(256, 65), of(384, 168)], [12, 32, 24, 12]);
    assert_eq!([of(32, 16), of(1024, 32), of(512, 20), of(128, 255)], [32, 64, 64, 8]);
    // Shared memory, of which the system has a kilobyte a block.
    let of = |threads, shared| listing::warps(threads, 32, shared);
    assert_eq!([of(128, 48_000), of(128, 55_296), of(256, 114_688)], [16, 16, 16]);
    assert_eq!([of(256, 115_713), of(384, 200_656), of(128, 0)], [8, 12, 64]);
}
