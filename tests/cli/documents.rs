//! What documents and scripts say of the program is true.

use crate::common::here;
use crate::program::prism;
use crate::{Place, code, text};
use std::collections::BTreeMap;
use std::process::Command;

/// Lines of code blocks, and text between backquotes.
fn code_of(document: &str) -> Vec<&str> {
    let (mut fenced, mut all) = (false, vec![]);
    for line in document.lines() {
        match (line.starts_with("```"), fenced) {
            (true, _) => fenced = !fenced,
            (false, true) => all.push(line),
            (false, false) => all.extend(line.split('`').skip(1).step_by(2)),
        }
    }
    all
}

#[test]
fn commands_in_the_documents_have_flags_that_the_program_knows() {
    let mut documents = ["README.md", "SECURITY.md", "models/README.md"].map(here).to_vec();
    let entries = std::fs::read_dir(here("docs")).unwrap().map(|e| e.unwrap().path());
    documents.extend(entries.filter(|p| p.extension().is_some_and(|e| e == "md")));
    let mut helps: BTreeMap<String, String> = BTreeMap::new();
    let mut checked = 0;
    for document in documents {
        let said = std::fs::read_to_string(&document).unwrap();
        for line in code_of(&said) {
            let ends = |w: &&str| w.starts_with('#') || [";", "|", "&&"].contains(w);
            let words: Vec<&str> = line.split_whitespace().take_while(|w| !ends(w)).collect();
            // `cargo run -- COMMAND` is a command too. Other words have no help.
            let Some(at) = words
                .iter()
                .position(|w| ["prism", "--"].contains(w))
                .filter(|at| at + 1 < words.len())
            else {
                continue;
            };
            let help = helps.entry(words[at + 1].to_string()).or_insert_with_key(|command| {
                text(&prism("").arg(command).with("--help").output().stdout)
            });
            let flags = words[at + 2..]
                .iter()
                .map(|w| w.trim_matches(['[', ']']).split('=').next().unwrap_or_default());
            for flag in flags.filter(|f| {
                f.trim_start_matches('-').starts_with(char::is_alphabetic) && f.starts_with('-')
            }) {
                let is_known = help.is_empty()
                    || [' ', ',', '\n'].iter().any(|end| help.contains(&format!("{flag}{end}")));
                assert!(
                    is_known,
                    "{}: '{line}': prism {} has no {flag}",
                    document.display(),
                    words[at + 1]
                );
                checked += usize::from(!help.is_empty());
            }
        }
    }
    assert!(checked > 40, "{checked} flags were found");
}

/// The page of promises says which test holds what: as a file or a folder, or as one test of a
/// file, `FILE::NAME`.
#[test]
fn tests_that_the_page_of_promises_names_are_there() {
    let said = std::fs::read_to_string(here("docs/reliability.md")).unwrap();
    let (mut tests, mut places) = (0, 0);
    let roots = ["tests/", "src/", "scripts/", "fuzz/"];
    let is_place = |w: &&str| roots.iter().any(|root| w.starts_with(root));
    for named in code_of(&said).into_iter().filter(is_place) {
        // Commands have arguments.
        let place = named.split_whitespace().next().unwrap_or_default();
        let (file, test) = place.split_once("::").map_or((place, None), |(f, t)| (f, Some(t)));
        assert!(here(file).exists(), "{named}: no such file");
        places += 1;
        let Some(test) = test else { continue };
        let source = std::fs::read_to_string(here(file)).unwrap();
        // Its attribute stands above it, among others and comments.
        let lines: Vec<&str> = source.lines().map(str::trim).collect();
        let at = lines.iter().position(|line| line.starts_with(&format!("fn {test}(")));
        let at = at.unwrap_or_else(|| panic!("{named}: no such function"));
        let mut above = lines[..at].iter().rev().take_while(|line| line.starts_with(['#', '/']));
        assert!(above.any(|line| *line == "#[test]"), "{named}: is no test");
        tests += 1;
    }
    assert!(tests > 30 && places > 60, "{tests} tests and {places} places were found");
}

/// Without it cargo uses newer dependencies than those that CI builds with.
#[test]
fn everything_that_is_installed_by_cargo_is_locked() {
    let mut waiting = ["docs", "models", "src", "scripts"].map(here).to_vec();
    waiting.extend(["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "Cargo.toml"].map(here));
    let mut installs = 0;
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            waiting.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        // Models and pictures are not text.
        let Ok(said) = std::fs::read_to_string(&path) else { continue };
        for line in said.lines() {
            for rest in line.split("cargo install").skip(1) {
                let command = rest.split(['`', '\'', '"']).next().unwrap_or_default();
                assert!(command.contains("--locked"), "{}: '{line}'", path.display());
                installs += 1;
            }
        }
    }
    assert!(installs > 5, "{installs} commands were found");
}

/// CI and the scripts build with the dependencies of the lock file alone.
#[test]
fn what_ci_builds_is_locked() {
    let mut files = vec![here(".ci/run")];
    for folder in [".github/workflows", "scripts"] {
        let entries = std::fs::read_dir(here(folder)).unwrap();
        files.extend(entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()));
    }
    // It passes on what it is called with.
    files.retain(|path| *path != here("scripts/built"));
    let compile =
        ["bench", "build", "check", "clippy", "doc", "metadata", "package", "run", "rustc", "test"];
    let mut calls = 0;
    for path in files {
        let said = std::fs::read_to_string(&path).unwrap();
        for line in said.lines().filter(|line| !line.trim_start().starts_with('#')) {
            let words: Vec<&str> = line.split([' ', '"', '(', ')', '`']).collect();
            let calls_cargo = line.contains("cargo \"$@\"")
                || words.windows(2).any(|pair| match pair {
                    ["cargo", "+nightly"] => true,
                    ["cargo", command] => compile.contains(command),
                    _ => false,
                });
            if calls_cargo || words.contains(&"scripts/built") {
                assert!(line.contains("--locked"), "{}: '{line}'", path.display());
                calls += 1;
            }
        }
    }
    assert!(calls > 25, "{calls} calls of cargo were found");
}

/// Scripts print the comment that they begin with, by numbers of its lines.
#[test]
fn the_usage_of_a_script_is_its_whole_header() {
    let mut usages = 0;
    for script in std::fs::read_dir(here("scripts")).unwrap() {
        let path = script.unwrap().path();
        let Ok(said) = std::fs::read_to_string(&path) else { continue };
        let Some((_, rest)) = said.split_once("sed -n '2,") else { continue };
        let printed: usize = rest.split('s').next().unwrap().parse().unwrap();
        let header = said.lines().take_while(|line| line.starts_with('#')).count();
        assert_eq!(printed, header, "{}: the last line that is printed", path.display());
        usages += 1;
    }
    assert!(usages > 4, "{usages} scripts that print their usage were found");
}

#[test]
fn documents_name_the_toolchain_that_is_needed() {
    let needed = concat!(env!("CARGO_PKG_RUST_VERSION"), " or newer");
    for document in ["README.md", "CONTRIBUTING.md"] {
        let said = std::fs::read_to_string(here(document)).unwrap();
        assert!(said.contains(needed), "{document}: {needed}");
    }
}

/// What `-h` says in a line, `--help` explains.
#[test]
fn long_help_says_more_than_the_line_in_the_list_of_commands() {
    for (command, said) in [
        ("segment", "one label image"),
        ("eval", "Each result is written as soon as"),
        ("train", "MASTER_ADDR"),
        ("bench", "docs/benchmarking.md"),
        ("verify", "the hash that it carries"),
        ("info", "size, geometry and values"),
    ] {
        let help = |flag: &str| text(&prism("").arg(command).with(flag).output().stdout);
        let words = help("--help").split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words.contains(said), "{command}: {words}");
        assert!(!help("-h").contains(said), "{command}");
    }
    let list = text(&prism("--help").output().stdout);
    assert!(list.contains("  segment      Segment objects in a scan from points"), "{list}");
}

/// The words of a line without folders, and its numbers.
#[cfg(unix)]
fn words_and_numbers(line: &str) -> (Vec<&str>, Vec<f64>) {
    let (mut words, mut numbers) = (vec![], vec![]);
    for word in line.split_whitespace().map(|word| word.trim_end_matches(',')) {
        match word.parse() {
            Ok(number) => numbers.push(number),
            Err(_) => words.push(word.rsplit('/').next().unwrap_or(word)),
        }
    }
    (words, numbers)
}

/// Every line that the README shows of the demo is one of these. Numbers may differ by 2 %: the
/// instruction sets add in other orders, which may move a voxel where the network is undecided.
#[cfg(unix)]
fn compare_with_the_readme(said: &str) {
    let readme = std::fs::read_to_string(here("README.md")).unwrap();
    let fences: Vec<&str> = readme.split("```").collect();
    let shown = fences.iter().find(|block| block.contains("mask.nii.gz: ")).unwrap();
    let shown: Vec<&str> =
        shown.lines().filter(|line| !line.is_empty() && *line != "...").collect();
    assert_eq!(shown.len(), 3, "{shown:?}");
    for line in shown {
        let (words, expected) = words_and_numbers(line);
        let got = said.lines().map(words_and_numbers).find(|got| got.0 == words);
        let Some((_, got)) = got else { panic!("the demo does not print '{line}':\n{said}") };
        let near = |(got, expected): (&f64, &f64)| (got - expected).abs() <= 0.02 * expected;
        assert!(
            got.len() == expected.len() && got.iter().zip(&expected).all(near),
            "README.md: '{line}': the demo prints {got:?}"
        );
    }
}

/// A cargo that builds nothing and prints the path of the program that these tests were built with
/// replaces one that was told to build elsewhere.
#[cfg(unix)]
#[test]
fn scripts_take_the_program_from_where_cargo_says_that_it_lies() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place { folder: tempfile::tempdir().unwrap() };
    let made = serde_json::json!({ "reason": "compiler-artifact", "filenames": [env!("CARGO_BIN_EXE_prism")] });
    let target = serde_json::json!({ "target_directory": place.folder.path() });
    let cargo = format!("#!/bin/sh\n[ $1 = metadata ] && echo '{target}' || echo '{made}'\n");
    std::fs::write(place.at("cargo"), cargo).unwrap();
    std::fs::set_permissions(place.at("cargo"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", place.folder.path().display(), std::env::var("PATH").unwrap());
    let script = |name: &str, args: &[&str]| {
        Command::new(here(name)).args(args).env("PATH", &path).output().unwrap()
    };
    let out = script("scripts/demo", &[]);
    let said = code(&out, 0);
    assert!(said.contains("1 of 3") && said.contains(env!("CARGO_BIN_EXE_prism")), "{said}");
    assert!(
        text(&out.stdout).contains("\nDice ")
            && place.at("demo/mask.nii.gz").exists()
            && place.at("demo/preview.png").exists()
    );
    compare_with_the_readme(&text(&out.stdout));
    // Files that cargo did not make are reported as missing.
    let said = code(&script("scripts/built", &["libother.so", "build"]), 1);
    assert!(said.contains("made no libother.so"), "{said}");
}
