//! The kernels as machine code, without a GPU: NVRTC compiles them for every architecture, and what its assembler makes of each is held to a budget.
//!
//! Needs the library NVRTC in `LD_LIBRARY_PATH`, and for the search for matrix instructions `nvdisasm` in `PATH`: `eval "$(scripts/nvrtc)"` fetches both. Where
//! they are absent these tests say that they were skipped, or fail if `PRISM_TEST_NVRTC=required`.

mod common;

use prism::device::cuda::nvrtc;
use prism::device::cuda::source::{self, is_matrix};
use std::collections::BTreeMap;
use std::process::Command;
use std::sync::OnceLock;

/// From Ampere to Blackwell.
const ARCHITECTURES: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"];

/// Most registers that a thread of each kernel may use on any architecture: `name registers` a line.
const BUDGET: &str = include_str!("../kernels/budget.txt");

/// Whether these tests may not be skipped.
fn required() -> bool {
    std::env::var("PRISM_TEST_NVRTC").is_ok_and(|v| v == "required")
}

/// What the assembler says of a kernel.
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
            usage.spilled = ["stores", "loads"].iter().map(|what| number(line, &format!(" bytes spill {what}")).unwrap()).sum();
        }
        if let Some(v) = number(line, " registers") {
            usage.registers = v;
        }
    }
    all
}

/// Everything compiled, once; none where there is no NVRTC.
fn built() -> Option<&'static [Built]> {
    static ALL: OnceLock<Result<Vec<Built>, String>> = OnceLock::new();
    let all = ALL.get_or_init(|| match nvrtc::version() {
        Ok(version) => {
            eprintln!("NVRTC {version:?}");
            // An architecture a thread.
            let compile = |arch: &'static str| -> Vec<Built> {
                let each = source::FILES.iter().map(|(file, text, _)| {
                    let compiled = nvrtc::compile(file, text, arch).unwrap_or_else(|e| panic!("{e}"));
                    Built { file, arch, code: compiled.code, kernels: usages(&compiled.log) }
                });
                each.collect()
            };
            Ok(std::thread::scope(|scope| {
                let threads: Vec<_> = ARCHITECTURES.iter().map(|arch| scope.spawn(move || compile(arch))).collect();
                threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
            }))
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
    let budget: BTreeMap<&str, usize> = BUDGET
        .lines()
        .filter(|l| !l.starts_with('#'))
        .filter_map(|l| l.split_once(' '))
        .map(|(n, r)| (n, r.trim().parse().unwrap()))
        .collect();
    let mut most: BTreeMap<&str, usize> = BTreeMap::new();
    for b in all {
        assert!(b.kernels.len() > 1 && b.code.len() > 1000, "{} for {} is empty", b.file, b.arch);
        for (kernel, usage) in &b.kernels {
            assert_eq!((usage.stack, usage.spilled), (0, 0), "{kernel} for {} uses local memory: {usage:?}", b.arch);
            assert!(usage.registers > 0);
            most.entry(kernel).and_modify(|m| *m = usage.registers.max(*m)).or_insert(usage.registers);
        }
    }
    if std::env::var_os("PRISM_PRINT_BUDGET").is_some() {
        most.iter().for_each(|(kernel, registers)| println!("{kernel} {registers}"));
    }
    for (kernel, registers) in &most {
        let allowed =
            budget.get(kernel).unwrap_or_else(|| panic!("{kernel} has no line in kernels/budget.txt: it uses {registers} registers"));
        assert!(registers <= allowed, "{kernel} uses {registers} registers, kernels/budget.txt allows {allowed}");
    }
    let gone: Vec<_> = budget.keys().filter(|k| !most.contains_key(*k)).collect();
    assert!(gone.is_empty(), "kernels/budget.txt names kernels that are not there: {gone:?}");
}

#[test]
fn matrix_kernels_use_tensor_cores() {
    let Some(all) = built() else { return };
    if Command::new("nvdisasm").arg("--version").output().is_err() {
        assert!(!required(), "PRISM_TEST_NVRTC=required: no nvdisasm in PATH");
        common::skipped("no nvdisasm in PATH");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("code.cubin");
    let mut found = 0;
    for b in all.iter().filter(|b| b.kernels.keys().any(|k| is_matrix(k))) {
        std::fs::write(&path, &b.code).unwrap();
        let out = Command::new("nvdisasm").arg("--print-code").arg(&path).output().unwrap();
        assert!(out.status.success(), "nvdisasm: {}", String::from_utf8_lossy(&out.stderr));
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        // A function's code follows its section's name.
        let mut count: BTreeMap<&str, usize> = BTreeMap::new();
        let mut kernel = "";
        for line in text.lines() {
            if let Some(name) = line.split(".section\t.text.").nth(1) {
                kernel = name.split([',', '\t', ' ']).next().unwrap();
            }
            *count.entry(kernel).or_default() += usize::from(line.contains("HMMA.") || line.contains("HGMMA."));
        }
        for kernel in b.kernels.keys() {
            let matrix = count.get(kernel.as_str()).copied().unwrap_or(0);
            assert_eq!(matrix > 0, is_matrix(kernel), "{kernel} for {}: {matrix} matrix instructions", b.arch);
            found += matrix;
        }
    }
    assert!(found > 0);
}
