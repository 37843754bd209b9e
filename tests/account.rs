//! The kernels' memory requests, counted without a GPU: how often shared memory requests are
//! repeated, sectors, bytes; and how many warps a multiprocessor has room for.
//! `kernels/host/account.h` says how requests are counted, `docs/kernels.md` what the columns of
//! `tests/kernels/account.txt` are.
//!
//! The counted accesses are those that the host's compiler leaves of the kernels' text. So the
//! account depends on the compiler, which it names, and is not compared with the counts of others.
//! Only GCC can be told to keep an access of several words as one (`-fno-tree-sra`).
#![cfg(feature = "emulator")]

#[path = "common/built.rs"]
mod built;
mod common;
// Machine code is listed elsewhere.
#[allow(dead_code)]
#[path = "common/listing.rs"]
mod listing;

use built::{compile, is_clang};
use common::{here, skipped};
use prism::bench::{Prepared, Problem};
use prism::device::{Cpu, Cuda, Device, Precision};
use rayon::prelude::*;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::AddAssign;
use std::path::{Path, PathBuf};

/// Ops of the base network, smaller where their size tells nothing new.
const OPS: [&str; 11] = [
    "conv3d:n1ic1oc32d16k3s1p1",
    "conv3d:n1ic32oc32d16k3s1p1",
    "conv3d:n1ic128oc128d8k3s1p1",
    "upcat:ic64uc32sc32oc32d8",
    "linear:m512k768n768",
    "linear:m60k384n2048",
    "lnorm:m512c768",
    "attn:h2d64s8w14",
    "attn:h2d64s8w0",
    "xattn:h8d24q60k512",
    "xattn:h8d24q512k60",
];

/// Everything that a smaller network launches, without what prepares it: encoding, a click,
/// learning.
const NETWORKS: [&str; 3] = ["encode:small,d32", "interact:small,t12,d32", "train:small,i2,d32"];

/// The compiler, as the account names it; none, with a message, if it cannot count.
fn compiler() -> Option<String> {
    if is_clang() {
        skipped("what kernels ask of memory is counted in a build by GCC");
        return None;
    }
    let version = compile(&["-dumpversion"]);
    let major = version.trim().split('.').next().unwrap_or_default();
    Some(format!("GCC {major}, {}", std::env::consts::ARCH))
}

/// Kernels built so that their memory requests are counted.
struct Counting {
    folder: tempfile::TempDir,
    /// The objects: the kernels' files, and the emulator.
    objects: Vec<String>,
    /// The file to which each launch adds a line.
    lines: PathBuf,
}

impl Counting {
    /// Builds files of kernels.
    fn new(files: &[PathBuf]) -> Counting {
        let folder = tempfile::tempdir().unwrap();
        let lines = folder.path().join("launches.txt");
        let counting = Counting { folder, objects: vec![], lines };
        let object = |file: &PathBuf| {
            let name = file.file_stem().unwrap().to_str().unwrap();
            // Kernels of a file are in a namespace of their own, as build.rs builds them.
            let text = format!(
                "#include \"host/emulator.h\"\nnamespace kernels_{name} {{\n#include {:?}\n}}\n",
                file.display().to_string()
            );
            let unit = counting.at(&format!("{name}.unit.cpp"));
            std::fs::write(&unit, text).unwrap();
            // Transformations that would split requests differently are disabled: structs taken
            // apart, and duplicated code.
            let counted = ["-O1", "-fsanitize=thread", "-fno-tree-sra", "-fno-thread-jumps"];
            counting.object(&unit, &counted)
        };
        let mut objects: Vec<String> = files.par_iter().map(object).collect();
        let emulator = here("kernels/host/emulator.cpp").display().to_string();
        objects.push(counting.object(&emulator, &["-O2"]));
        Counting { objects, ..counting }
    }

    fn at(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Compiles a file.
    fn object(&self, file: &str, flags: &[&str]) -> String {
        let name = Path::new(file).file_name().unwrap().to_str().unwrap();
        let object = self.at(&format!("{name}.o"));
        let include = format!("-I{}", here("kernels").display());
        let lines = format!("-DPRISM_ACCOUNT={:?}", self.lines.display().to_string());
        let given = ["-c", "-std=c++17", "-fPIC", "-w", "-DPRISM_EMULATOR", include.as_str()];
        compile(&[&given[..], flags, &[lines.as_str(), file, "-o", object.as_str()]].concat());
        object
    }

    /// Links the objects.
    fn link(&self, flags: &[&str], name: &str) -> PathBuf {
        let objects: Vec<&str> = self.objects.iter().map(String::as_str).collect();
        let linked = self.at(name);
        compile(&[&objects[..], flags, &["-pthread", "-o", linked.as_str()]].concat());
        linked.into()
    }

    /// A library whose kernels take the place of the right ones.
    fn library(&self) -> PathBuf {
        // Its symbols are its own, even though the program has others with the same names.
        self.link(&["-shared", "-Wl,-Bsymbolic"], "kernels.so")
    }

    /// A line for each launch of a problem.
    fn launches(&self, library: &Path, problem: &str, on: On) -> String {
        let cpu = Cpu::new(on.threads).unwrap();
        // SAFETY: it was just built from the emulator.
        let cuda = unsafe { Cuda::emulated_over(cpu, on.precision, on.seed, library) }.unwrap();
        let problem: Problem = problem.parse().unwrap();
        let what = format!("{problem} in {}", on.precision);
        let ready = Prepared::new(&Device::Cuda(cuda), &problem);
        let mut ready = ready.unwrap_or_else(|e| panic!("{what}: {e}"));
        // The launches until now prepared it.
        std::fs::write(&self.lines, "").unwrap();
        ready.run().unwrap_or_else(|e| panic!("{what}: {e}"));
        std::fs::read_to_string(&self.lines).unwrap()
    }
}

/// How a problem is run.
#[derive(Clone, Copy)]
struct On {
    precision: Precision,
    threads: usize,
    seed: u64,
}

/// The requests in one direction: sectors that they touch, sectors that would hold their data, and
/// the distinct bytes of a launch.
#[derive(Clone, Copy, Default)]
struct Way {
    sectors: u64,
    needed: u64,
    bytes: u64,
}

/// The requests of launches.
#[derive(Clone, Copy, Default)]
struct Counts {
    launches: u64,
    shared: u64,
    conflicts: u64,
    /// Reading and writing.
    ways: [Way; 2],
}

impl AddAssign for Counts {
    fn add_assign(&mut self, more: Counts) {
        self.launches += more.launches;
        self.shared += more.shared;
        self.conflicts += more.conflicts;
        for (way, more) in self.ways.iter_mut().zip(more.ways) {
            way.sectors += more.sectors;
            way.needed += more.needed;
            way.bytes += more.bytes;
        }
    }
}

/// What a block of a launch has: threads, and bytes of shared memory.
type Block = [usize; 2];

impl Counts {
    /// Parses a line that a launch wrote, with the kernel's name and a block.
    fn read(line: &str) -> Option<(&str, Block, Counts)> {
        let (kernel, numbers) = line.split_once(' ')?;
        let numbers: Vec<u64> =
            numbers.split(' ').map(str::parse).collect::<Result<_, _>>().ok()?;
        let [threads, bytes, shared, conflicts, ways @ ..] = &numbers[..] else { return None };
        let way = |of: &[u64]| Way { sectors: of[1], needed: of[2], bytes: of[3] };
        let [read, written] = [ways.get(..4)?, ways.get(4..8)?].map(way);
        let (shared, conflicts) = (*shared, *conflicts);
        let counts = Counts { launches: 1, shared, conflicts, ways: [read, written] };
        Some((kernel, [*threads as usize, *bytes as usize], counts))
    }

    /// The columns after the kernel's name.
    fn columns(&self) -> String {
        let ratio = |of: u64, to: u64| match to {
            0 => "-".to_string(),
            to => format!("{:.2}", of as f64 / to as f64),
        };
        let [read, written] = self.ways;
        let moved = 32 * (read.sectors + written.sectors);
        format!(
            "{:>5} {:>9.1} {:>9} {:>9} {:>9} {:>9} {:>9}",
            self.launches,
            moved as f64 / 1e3,
            ratio(self.conflicts, self.shared),
            ratio(read.sectors, read.needed),
            ratio(written.sectors, written.needed),
            ratio(32 * read.sectors, read.bytes),
            ratio(32 * written.sectors, written.bytes),
        )
    }
}

/// A line for each kernel: of the blocks of its launches the one for which a multiprocessor has
/// least room, with the registers that `tests/kernels/instructions.txt` has for the kernel.
fn rooms(blocks: &BTreeMap<String, BTreeSet<Block>>) -> String {
    let instructions = std::fs::read_to_string(here("tests/kernels/instructions.txt")).unwrap();
    let registers = |line: &str| -> Option<(String, usize)> {
        let mut columns = line.split_whitespace();
        Some((columns.next()?.into(), columns.next()?.parse().ok()?))
    };
    let registers: BTreeMap<String, usize> =
        instructions.lines().filter(|line| !line.starts_with('#')).filter_map(registers).collect();
    let line = |(kernel, blocks): (&String, &BTreeSet<Block>)| {
        let of = *registers.get(kernel).unwrap_or_else(|| {
            panic!("tests/kernels/instructions.txt has no {kernel}: tests/kernels.rs writes it")
        });
        let room = |[threads, shared]: Block| listing::warps(threads, of, shared);
        let least = blocks.iter().min_by_key(|block| (room(**block), Reverse(block[1])));
        let block = *least.expect("a launch");
        format!("{kernel:<36} {:>7} {:>9} {of:>9} {:>5}\n", block[0], block[1], room(block))
    };
    blocks.iter().map(line).collect()
}

/// The lines of the account that are not comments.
fn lines_of(account: &str) -> Vec<&str> {
    account.lines().filter(|line| !line.starts_with('#')).collect()
}

/// The lines that are only in one of two accounts.
fn only_in<'a>(this: &'a str, other: &str) -> Vec<&'a str> {
    let other = lines_of(other);
    lines_of(this).into_iter().filter(|line| !other.contains(line)).collect()
}

#[test]
fn requests_that_are_known_are_counted_as_they_are() {
    if compiler().is_none() {
        return;
    }
    let mut counting = Counting::new(&[here("tests/account/patterns.cu")]);
    let main = here("tests/account/patterns.cpp").display().to_string();
    let main = counting.object(&main, &["-O2"]);
    counting.objects.push(main);
    let program = counting.link(&[], "patterns");
    let output = std::process::Command::new(program).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn counts_depend_neither_on_host_threads_nor_on_the_order_of_lanes() {
    if compiler().is_none() {
        return;
    }
    let counting = Counting::new(&["linear", "norm"].map(|n| here(&format!("kernels/{n}.cu"))));
    let library = counting.library();
    for (problem, kernel) in
        [("linear:m70k64n48", "linear_few_f16"), ("lnorm:m70c96", "layer_norm")]
    {
        let launches = |threads: usize, seed: u64| {
            let on = On { precision: Precision::F16, threads, seed };
            counting.launches(&library, problem, on)
        };
        let alone = launches(1, 0);
        assert!(alone.contains(kernel), "{problem}: '{alone}'");
        assert_eq!(launches(3, 0), alone, "{problem}");
        assert_eq!(launches(2, 7), alone, "{problem}");
    }
}

#[test]
fn kernels_ask_of_memory_what_their_account_says() {
    let Some(compiler) = compiler() else { return };
    let file = here("tests/kernels/account.txt");
    let update = std::env::var_os("PRISM_UPDATE_ACCOUNT").is_some();
    let kept = std::fs::read_to_string(&file).unwrap_or_default();
    let mark = format!("# {compiler}");
    let is_another = |by: &&str| !update && by.starts_with("# GCC ") && *by != mark;
    if let Some(by) = kept.lines().nth(1).filter(is_another) {
        skipped(&format!(
            "tests/kernels/account.txt is by another compiler: '{by}', here '{mark}'"
        ));
        return;
    }
    let mut files: Vec<PathBuf> = std::fs::read_dir(here("kernels"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    files.sort();
    let counting = Counting::new(&files);
    let library = counting.library();
    let mut account = format!(
        "# What kernels ask of memory, counted in the emulator: docs/kernels.md says what the columns are. PRISM_UPDATE_ACCOUNT=1 cargo test --test account kernels_ask writes it.\n\
         {mark}\n\
         # problem                      in   kernel                               times        kB conflicts r-sectors w-sectors   r-bytes   w-bytes\n"
    );
    let mut blocks: BTreeMap<String, BTreeSet<Block>> = BTreeMap::new();
    let ops = OPS.into_iter().flat_map(|op| [(op, Precision::F16), (op, Precision::F32)]);
    for (problem, precision) in ops.chain(NETWORKS.map(|network| (network, Precision::F16))) {
        let launches = counting.launches(&library, problem, On { precision, threads: 0, seed: 0 });
        let mut kernels: BTreeMap<&str, Counts> = BTreeMap::new();
        for line in launches.lines() {
            let (kernel, block, counts) = Counts::read(line).unwrap_or_else(|| panic!("'{line}'"));
            *kernels.entry(kernel).or_default() += counts;
            blocks.entry(kernel.into()).or_default().insert(block);
        }
        assert!(!kernels.is_empty(), "{problem} launches nothing");
        for (kernel, counts) in kernels {
            let (precision, columns) = (precision.to_string(), counts.columns());
            account += &format!("{problem:<30} {precision:<4} {kernel:<36} {columns}\n");
        }
    }
    account += "#\n# kernel                             threads    shared registers warps\n";
    account += &rooms(&blocks);
    if update {
        std::fs::write(&file, &account).unwrap();
        return;
    }
    let (was, is) = (only_in(&kept, &account), only_in(&account, &kept));
    assert!(
        kept == account,
        "tests/kernels/account.txt says\n{}\nand counted is\n{}\n(PRISM_UPDATE_ACCOUNT=1 writes it anew)",
        was.join("\n"),
        is.join("\n")
    );
}
