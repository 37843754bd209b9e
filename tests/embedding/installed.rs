//! prism from C, C++ and Python, as a user of the installed library: `scripts/install-c` makes a
//! prefix from the library that cargo built, and everything here uses only that prefix, or the
//! wheel that `scripts/wheel` makes of it.
//!
//! Missing tools are reported; with `PRISM_TEST_TOOLS=required` a missing one is a failure.

use crate::common;

use common::{coarse, here, tiny};
use prism::model::weights::Precision;
use prism::model::{Config, Weights};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

const BOX: &str = "69,68,13,93,94,16";
const POINT: &str = "80,80,14";

/// Runs a command to its end; returns what it printed.
fn run(command: &mut Command) -> String {
    let done = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{command:?}: {}\n{out}\n{err}", done.status);
    out.into_owned()
}

/// Whether a tool is available.
fn has(tool: &str, arguments: &[&str]) -> bool {
    let there = Command::new(tool).args(arguments).output().is_ok_and(|o| o.status.success());
    if !there {
        assert!(
            std::env::var_os("PRISM_TEST_TOOLS").is_none_or(|v| v != "required"),
            "{tool} {arguments:?} does not run on this machine"
        );
        common::skipped(&format!("{tool} {arguments:?} does not run on this machine"));
    }
    there
}

/// A folder for this test.
fn scratch(name: &str) -> PathBuf {
    let at = Path::new(env!("CARGO_TARGET_TMPDIR")).join("embedding").join(name);
    let _ = std::fs::remove_dir_all(&at);
    std::fs::create_dir_all(&at).unwrap();
    at
}

/// The installed library.
fn prefix() -> &'static Path {
    static PREFIX: OnceLock<PathBuf> = OnceLock::new();
    PREFIX.get_or_init(|| {
        // The library that it was built with is beside this executable.
        let built = std::env::current_exe().unwrap().parent().unwrap().to_path_buf();
        let only = scratch("built");
        std::fs::copy(built.join("libprism.so"), only.join("libprism.so")).unwrap();
        let at = scratch("prefix");
        run(Command::new(here("scripts/install-c")).arg(&at).arg(only));
        at
    })
}

fn library() -> PathBuf {
    prefix().join("lib")
}

/// Compiles a C program against the prefix.
fn compile(source: &str, to: &Path, flags: &[&str]) {
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-g", "-o"])
        .arg(to)
        .arg(here(source))
        .args(flags);
    run(cc.arg("-I").arg(prefix().join("include")).arg("-L").arg(library()).args([
        "-lprism",
        "-lm",
        "-lpthread",
    ]));
}

/// A program that finds the installed library.
fn program(path: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(path);
    command.env("LD_LIBRARY_PATH", library());
    command
}

fn model() -> PathBuf {
    here("models/small.safetensors")
}

fn image() -> PathBuf {
    here("examples/data/lung1_image.nii.gz")
}

/// The mask that the program `prism` makes of the same prompts, and the file that holds it.
fn expected() -> &'static (Vec<u8>, PathBuf) {
    static EXPECTED: OnceLock<(Vec<u8>, PathBuf)> = OnceLock::new();
    EXPECTED.get_or_init(|| {
        let at = scratch("cli").join("mask.nii.gz");
        let mut prism = Command::new(env!("CARGO_BIN_EXE_prism"));
        run(prism
            .args(["segment", "--box", BOX, "--point", POINT, "-m"])
            .arg(model())
            .arg("-i")
            .arg(image())
            .arg("-o")
            .arg(&at));
        (std::fs::read(&at).unwrap(), at)
    })
}

#[test]
fn programs_in_c_make_the_masks_that_the_command_makes() {
    let at = scratch("c");
    let mask = at.join("mask.nii.gz");
    compile("examples/c/segment.c", &at.join("segment"), &[]);
    let said =
        run(program(at.join("segment")).arg(model()).arg(image()).arg(&mask).args([BOX, POINT]));
    // The tutorial shows its output.
    let printed = said
        .split_once(" expected Dice ")
        .and_then(|(_, rest)| Some(format!("expected Dice {}", rest.get(..4)?)))
        .unwrap();
    assert!(
        said.contains(" ms")
            && std::fs::read_to_string(here("docs/embedding.md")).unwrap().contains(&printed),
        "{said}"
    );
    assert!(std::fs::read(&mask).unwrap() == expected().0, "the mask is another");

    compile("examples/c/interactive.c", &at.join("interactive"), &[]);
    let said = run(program(at.join("interactive")).arg(model()).arg(image()).arg(BOX));
    assert!(said.contains("progress ended at 1.00") && said.contains("undo"), "{said}");

    // An error is reported, and sets the exit status.
    let missing = program(at.join("segment"))
        .arg("no.safetensors")
        .arg(image())
        .arg(&mask)
        .args([BOX, POINT])
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&missing.stderr);
    assert!(
        missing.status.code() == Some(1) && err.contains("PRISM_FILE: no.safetensors"),
        "{err}"
    );
}

#[test]
fn cmake_finds_the_package() {
    if !has("cmake", &["--version"]) {
        return;
    }
    let at = scratch("cmake");
    let prefix_path = format!("-DCMAKE_PREFIX_PATH={}", prefix().display());
    run(Command::new("cmake").arg("-S").arg(here("examples")).arg("-B").arg(&at).arg(prefix_path));
    run(Command::new("cmake").arg("--build").arg(&at));
    let mask = at.join("mask.nii.gz");
    // CMake stores the library's path in the program.
    let said = run(Command::new(at.join("segment_cpp"))
        .arg(model())
        .arg(image())
        .arg(&mask)
        .args([BOX, POINT]));
    assert!(said.contains("as it should, a point outside fails") && said.contains(" ms"), "{said}");
    assert!(std::fs::read(&mask).unwrap() == expected().0, "the mask is another");
}

#[test]
fn pkg_config_knows_the_library() {
    if !has("pkg-config", &["--version"]) {
        return;
    }
    let ask = |arguments: &[&str]| {
        run(Command::new("pkg-config")
            .args(arguments)
            .arg("prism")
            .env("PKG_CONFIG_PATH", library().join("pkgconfig")))
    };
    let flags = ask(&["--cflags", "--libs"]);
    assert!(flags.contains("-lprism") && flags.contains("include"), "{flags}");
    assert_eq!(ask(&["--modversion"]).trim(), env!("CARGO_PKG_VERSION"));
}

/// The wheel of the Python package, made from the installed library, and the folder that it was
/// installed to; None if Python cannot install it.
fn package() -> Option<&'static [PathBuf; 2]> {
    static PACKAGE: OnceLock<[PathBuf; 2]> = OnceLock::new();
    if !has("python3", &["-c", "import numpy, pip"]) {
        return None;
    }
    Some(PACKAGE.get_or_init(|| {
        let at = scratch("wheel");
        let built = |folder: &str| {
            let mut wheel = Command::new("python3");
            wheel.arg(here("scripts/wheel")).arg("--with-model").arg(at.join(folder));
            PathBuf::from(run(wheel.arg(library().join("libprism.so"))).trim_end())
        };
        let (wheel, again) = (built("wheel"), built("again"));
        assert_eq!(wheel.file_name(), again.file_name());
        assert!(
            std::fs::read(&wheel).unwrap() == std::fs::read(again).unwrap(),
            "the same sources gave another wheel"
        );
        let installed = at.join("installed");
        let quiet = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
        let mut pip = Command::new("python3");
        pip.args(quiet).args(["--no-deps", "--no-index", "--target"]);
        run(pip.arg(&installed).arg(&wheel));
        [wheel, installed]
    }))
}

/// Python with the package, and with its other packages.
fn python(installed: &Path) -> Command {
    let others = std::env::var_os("PYTHONPATH").unwrap_or_default();
    let others = std::env::split_paths(&others).filter(|p| !p.as_os_str().is_empty());
    let paths = std::iter::once(installed.to_path_buf()).chain(others);
    let mut command = Command::new("python3");
    command
        .env("PYTHONPATH", std::env::join_paths(paths).unwrap())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env_remove("PRISM_LIBRARY");
    command
}

#[test]
fn the_python_package_takes_the_images_of_others() {
    let Some([wheel, installed]) = package() else { return };
    // If one of these is missing, what needs it is skipped there.
    for other in ["nibabel", "SimpleITK"] {
        has("python3", &["-c", &format!("import {other}")]);
    }
    let tests = here("tests/python/test_prism_seg.py");
    run(python(installed).arg(tests).arg(wheel).arg(&expected().1));
}

#[test]
fn python_gives_arrays_and_gets_arrays() {
    let Some([_, installed]) = package() else { return };
    let at = scratch("python");
    let mask = at.join("mask.nii.gz");
    let mut python = python(installed);
    python.arg(here("examples/python/segment.py"));
    let said = run(python.arg(model()).arg(image()).arg(&mask).args([BOX, POINT]));
    // The array came without the file's codes: the header differs, the voxels do not.
    let voxels = |bytes: &[u8]| {
        use std::io::Read;
        let mut raw = vec![];
        flate2::read::MultiGzDecoder::new(bytes).read_to_end(&mut raw).unwrap();
        raw.split_off(352)
    };
    let mask = voxels(&std::fs::read(&mask).unwrap());
    assert!(mask == voxels(&expected().0), "the mask is another");
    let size = mask.iter().filter(|&&v| v != 0).count();
    let corrected = said
        .split(" voxels, then ")
        .nth(1)
        .and_then(|rest| rest.split(';').next()?.parse::<usize>().ok());
    assert!(
        said.contains("first click") && said.contains(&format!("{size} voxels, then ")),
        "{said}"
    );
    assert!(corrected.is_some_and(|n| n < size), "the correction took nothing away: {said}");
}

#[test]
fn the_library_shows_its_interface_alone() {
    if !has("nm", &["--version"]) || !has("readelf", &["--version"]) {
        return;
    }
    let library = library().join("libprism.so");
    let said =
        run(Command::new("nm").args(["-D", "--defined-only", "--format=posix"]).arg(&library));
    let names: Vec<&str> = said.lines().filter_map(|l| l.split(' ').next()).collect();
    assert!(names.len() > 30 && names.iter().all(|n| n.starts_with("prism_")), "{names:?}");
    let soname = format!("libprism.so.{}", prism::capi::PRISM_ABI_VERSION);
    assert!(
        run(Command::new("readelf").arg("-d").arg(&library)).contains(&format!("[{soname}]")),
        "the soname is not {soname}"
    );
    let needed = run(Command::new("readelf").arg("-d").arg(&library));
    assert!(
        !needed.contains("cuda") && !needed.contains("nvrtc"),
        "it needs CUDA to be loaded: {needed}"
    );
}

/// The torture's program and its arguments.
fn torture(name: &str, flags: &[&str]) -> [PathBuf; 3] {
    with_model("torture", name, flags)
}

/// Runs a program under valgrind, which fails where it reads or writes what it should not, or
/// leaks.
fn valgrind() -> Command {
    let mut valgrind = program("valgrind");
    valgrind.args([
        "--quiet",
        "--error-exitcode=9",
        "--leak-check=full",
        "--errors-for-leak-kinds=definite,indirect",
        "--fair-sched=yes",
    ]);
    valgrind
}

#[test]
fn misuse_is_survived() {
    let [torture, model, at] = torture("torture", &[]);
    assert_eq!(run(program(torture).arg(model).arg(at)), "survived\n");
}

#[test]
fn misuse_is_survived_under_address_sanitizer() {
    let [torture, model, at] = torture("asan", &["-fsanitize=address"]);
    assert_eq!(run(program(torture).arg(model).arg(at)), "survived\n");
}

/// Whether misuse is tested at length: a job beside `.ci/run` says so.
fn at_length() -> bool {
    std::env::var_os("PRISM_TEST_MISUSE").is_some_and(|v| v == "all")
}

/// What misuse is survived under AddressSanitizer is so here too; a job beside `.ci/run` has it
/// take the minutes that it takes.
#[test]
fn misuse_is_survived_under_valgrind() {
    if !at_length() {
        common::skipped("under valgrind all misuse takes PRISM_TEST_MISUSE=all");
        return;
    }
    if !has("valgrind", &["--version"]) {
        return;
    }
    let [torture, model, at] = with_network("torture", "valgrind", &[], coarse());
    assert_eq!(run(valgrind().arg(torture).arg(model).arg(at)), "survived\n");
}

/// A program of `tests/c`, and the tiny model.
fn with_model(name: &str, at: &str, flags: &[&str]) -> [PathBuf; 3] {
    with_network(name, at, flags, tiny())
}

/// A program of `tests/c`, and a model of this network.
fn with_network(name: &str, at: &str, flags: &[&str], config: Config) -> [PathBuf; 3] {
    let at = scratch(at);
    let (program, model) = (at.join(name), at.join("tiny.safetensors"));
    compile(&format!("tests/c/{name}.c"), &program, flags);
    Weights::hashed(config, "tiny").save(&model, Precision::F32).unwrap();
    [program, model, at]
}

#[test]
fn freeing_waits_forks_are_told_and_history_is_bounded() {
    let [lifetimes, model, _] = with_model("lifetimes", "lifetimes", &[]);
    assert_eq!(run(program(lifetimes).arg(model)), "lifetimes hold\n");
    let [lifetimes, model, _] = with_model("lifetimes", "lifetimes-asan", &["-fsanitize=address"]);
    assert_eq!(run(program(lifetimes).arg(model).arg("8")), "lifetimes hold\n");
    if has("valgrind", &["--version"]) {
        let [lifetimes, model, _] = with_network("lifetimes", "lifetimes-valgrind", &[], coarse());
        assert_eq!(
            run(valgrind().arg(lifetimes).arg(model).args(["1", "without-forks"])),
            "lifetimes hold\n"
        );
    }
}

/// However many threads a variable asks for: in so little address space there is no room for the
/// stacks of more than a few thousand.
#[cfg(target_os = "linux")]
#[test]
fn threads_are_no_more_than_processors_whatever_the_environment_says() {
    let [lifetimes, model, _] = with_model("lifetimes", "lifetimes-threads", &[]);
    let mut shell = program("sh");
    shell.args(["-c", "ulimit -v 8000000; exec \"$@\"", "sh"]).arg(lifetimes).arg(model).arg("1");
    shell.env("RAYON_NUM_THREADS", "100000");
    assert_eq!(run(&mut shell), "lifetimes hold\n");
}

/// The program that refuses memory, a model of this network and a folder.
#[cfg(target_env = "gnu")]
fn refusing(at: &str, config: Config) -> [PathBuf; 3] {
    with_network("memory", at, &["-ldl", "-U_FORTIFY_SOURCE"], config)
}

/// Some refusals of what runs no network, and the first of what does.
#[cfg(target_env = "gnu")]
#[test]
fn refused_memory_is_survived_under_valgrind() {
    if !has("valgrind", &["--version"]) {
        return;
    }
    let [memory, model, at] = refusing("memory-valgrind", coarse());
    let base = here("tests/data/odd/m00_base.nii.gz");
    if !at_length() {
        common::skipped("half as many refusals under valgrind: all take PRISM_TEST_MISUSE=all");
    }
    let apart = if at_length() { 1 } else { 2 };
    for (step, parts) in [(5, &["reading", "scanning"][..]), (100, &["clicking"][..])] {
        // The program's own functions refuse, and call valgrind's.
        let mut valgrind = valgrind();
        valgrind.arg("--soname-synonyms=somalloc=nouserintercepts").arg(&memory);
        valgrind.arg(&model).arg(&base).arg(&at).arg((step * apart).to_string()).args(parts);
        let said = run(&mut valgrind);
        assert!(said.ends_with(" 0 failures\n"), "{said}");
    }
}

/// Each allocation from a given size on is refused in turn, and so is what is beyond budgets: only
/// that call fails, nothing ends the process, and nothing is held longer than without refusals. If
/// this is not tested at length, a third of the allocations is refused, and budgets are further
/// apart.
#[cfg(target_env = "gnu")]
#[test]
fn every_allocation_can_be_refused() {
    let [memory, model, at] = refusing("memory", tiny());
    if !at_length() {
        common::skipped("a third of the allocations is refused: all take PRISM_TEST_MISUSE=all");
    }
    let apart = if at_length() { 1 } else { 3 };
    // Every STEPth of those allocations of the named parts; without a name, of all parts.
    let refuse_every = |step: u32, model: &Path, image: &Path, parts: &[&str]| {
        let said = run(program(&memory)
            .arg(model)
            .arg(image)
            .arg(&at)
            .arg((step * apart).to_string())
            .args(parts));
        assert!(said.ends_with(" 0 failures\n"), "{said}");
    };
    let refuse = |model: &Path, image: &Path, parts: &[&str]| refuse_every(1, model, image, parts);
    let base = here("tests/data/odd/m00_base.nii.gz");
    refuse(&model, &base, &[]);
    // A network with a matrix that stays in its file.
    let large = at.join("large.safetensors");
    Weights::hashed(Config { vit_width: 264, ..tiny() }, "tiny")
        .save(&large, Precision::F32)
        .unwrap();
    refuse(&large, &base, &["opening"]);
    refuse_every(2, &large, &base, &["clicking"]);
    // One with a patch so large that the mask of a candidate can be refused.
    let wide = at.join("wide.safetensors");
    Weights::hashed(Config { patch: 80, ..tiny() }, "tiny").save(&wide, Precision::F32).unwrap();
    refuse_every(2, &wide, &base, &["masking"]);
    // The other ways to store voxels in files: 40^3 of two bytes each.
    let voxels: Vec<u8> =
        (0..40 * 40 * 40u32).flat_map(|v| ((v % 200) as i16).to_le_bytes()).collect();
    std::fs::write(at.join("voxels.raw"), &voxels).unwrap();
    let text: String = (0..40 * 40 * 40u32).map(|v| format!("{} ", v % 200)).collect();
    let nrrd = "NRRD0004\ntype: short\ndimension: 3\nsizes: 40 40 40\nspace: RAS\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nendian: little\n";
    let gz = |bytes: &[u8]| {
        let mut gz = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        gz.write_all(bytes).unwrap();
        gz.finish().unwrap()
    };
    let meta = "ObjectType = Image\nNDims = 3\nDimSize = 40 40 40\nElementType = MET_SHORT\nElementSpacing = 1 1 1\n";
    for (name, bytes) in [
        ("attached.nrrd", [format!("{nrrd}encoding: raw\n\n").as_bytes(), &voxels].concat()),
        ("packed.nrrd", [format!("{nrrd}encoding: gzip\n\n").as_bytes(), &gz(&voxels)].concat()),
        ("text.nrrd", format!("{nrrd}encoding: text\n\n{text}").into_bytes()),
        (
            "last.nhdr",
            format!("{nrrd}encoding: raw\nbyte skip: -1\ndata file: voxels.raw\n").into_bytes(),
        ),
        ("beside.nhdr", format!("{nrrd}encoding: raw\ndata file: voxels.raw\n").into_bytes()),
        ("beside.mhd", format!("{meta}ElementDataFile = voxels.raw\n").into_bytes()),
        ("local.mha", [format!("{meta}ElementDataFile = LOCAL\n").as_bytes(), &voxels].concat()),
    ] {
        std::fs::write(at.join(name), bytes).unwrap();
        refuse(&model, &at.join(name), &["reading"]);
    }
    #[cfg(feature = "dicom")]
    {
        use crate::dicom::{Series, identified, short, straight, words};
        use dicom_dictionary_std::tags;
        let slice: Vec<u16> = (0..64 * 64).map(|v| v % 200).collect();
        let series = Series::new("CT").folder(24, straight, |_, file| {
            identified(file);
            file.put(short(tags::ROWS, 64));
            file.put(short(tags::COLUMNS, 64));
            file.put(words(slice.clone()));
        });
        refuse(&model, series.path(), &["reading", "saving"]);
    }
}

/// A model of a network, and both examples compiled with `flags`.
fn examples(name: &str, flags: &[&str], config: Config) -> [PathBuf; 4] {
    let at = scratch(name);
    let [segment, interactive, model] =
        ["segment", "interactive", "tiny.safetensors"].map(|f| at.join(f));
    compile("examples/c/segment.c", &segment, flags);
    compile("examples/c/interactive.c", &interactive, flags);
    Weights::hashed(config, "tiny").save(&model, Precision::F32).unwrap();
    [segment, interactive, model, at]
}

#[test]
fn examples_are_clean_under_address_sanitizer() {
    let [segment, interactive, model, at] =
        examples("examples-asan", &["-fsanitize=address"], tiny());
    run(program(segment).arg(&model).arg(image()).arg(at.join("mask.nii.gz")).args([BOX, POINT]));
    run(program(interactive).arg(&model).arg(image()).arg(BOX));
}

#[test]
fn examples_are_clean_under_valgrind() {
    if !has("valgrind", &["--version"]) {
        return;
    }
    let [segment, interactive, model, at] = examples("examples-valgrind", &[], tiny());
    let fast = at.join("coarse.safetensors");
    Weights::hashed(coarse(), "tiny").save(&fast, Precision::F32).unwrap();
    run(valgrind()
        .arg(segment)
        .arg(&model)
        .arg(image())
        .arg(at.join("mask.nii.gz"))
        .args([BOX, POINT]));
    run(valgrind().arg(interactive).arg(&fast).arg(image()).arg(BOX));
}
