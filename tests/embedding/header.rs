//! The C header agrees with the library: it is made from `src/capi`, and committed.
//!
//! `PRISM_UPDATE_HEADER=1 cargo test --test embedding header::` writes it.

use cbindgen::{
    Braces, Builder, Config, DocumentationStyle, EnumConfig, ExportConfig, Language, Style,
};
use std::path::{Path, PathBuf};

const HEAD: &str = "\
/* prism: interactive segmentation of tumours in 3D scans, for C and languages that call C.
 *
 * Usage: open an engine, load a model, read or wrap a volume, open a session on it, interact for
 * each of the user's prompts, read the prediction.
 *
 * - Every call returns a prism_status; prism_last_error explains a failure. No call aborts the
 *   process because of its arguments, and none writes to the standard streams.
 * - The caller owns handles and frees each with its own _free function, once, in any order:
 *   sessions and predictions keep what they need. A handle that was freed, or is of another kind,
 *   is refused.
 * - Engines, models, volumes and predictions may be used by any number of threads at once. A
 *   session may be used by one thread at a time; a second gets PRISM_BUSY.
 * - Structures begin with struct_size: zero them, then set it to their sizeof. They can
 *   grow without breaking programs that are already compiled.
 * - Voxels are (i, j, k) from 0, in the order of the volume; in dense results i is the fastest
 *   unless strides say otherwise.
 *
 * docs/embedding.md is the tutorial. Generated from src/capi by cbindgen; do not edit. Apache-2.0.
 */";

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<PathBuf> {
    ["mod", "status", "log", "engine", "volume", "prompts", "session", "prediction"]
        .map(|f| root().join(format!("src/capi/{f}.rs")))
        .into()
}

fn header() -> String {
    let constants = [
        "prism_status",
        "prism_precision",
        "prism_element",
        "prism_intensity",
        "prism_space",
        "prism_dense",
        "prism_grid",
    ];
    let config = Config {
        language: Language::C,
        cpp_compat: true,
        header: Some(HEAD.into()),
        include_guard: Some("PRISM_H".into()),
        no_includes: true,
        sys_includes: ["stddef.h", "stdint.h"].map(String::from).into(),
        style: Style::Type,
        braces: Braces::SameLine,
        documentation_style: DocumentationStyle::Doxy,
        usize_is_size_t: true,
        line_length: 160,
        export: ExportConfig { include: constants.map(String::from).into(), ..Default::default() },
        enumeration: EnumConfig { ..Default::default() },
        ..Default::default()
    };
    // It follows the modules that this one names.
    let builder = Builder::new().with_config(config).with_src(root().join("src/capi/mod.rs"));
    let mut bytes = vec![];
    builder.generate().expect("the sources can be read").write(&mut bytes);
    let text = String::from_utf8(bytes).expect("UTF-8");
    // What Rust calls safety is what the caller must ensure.
    text.replace(" * # Safety\n * ", " * Required: ")
}

#[test]
fn header_is_what_the_sources_say() {
    let (made, path) = (header(), root().join("include/prism.h"));
    if std::env::var_os("PRISM_UPDATE_HEADER").is_some() {
        std::fs::write(&path, &made).expect("the header can be written");
    }
    let committed = std::fs::read_to_string(&path).expect("include/prism.h");
    assert!(
        committed == made,
        "include/prism.h is stale: PRISM_UPDATE_HEADER=1 cargo test --test embedding header::"
    );
}

/// Functions that C sees, by their attribute in the sources.
fn exported() -> Vec<String> {
    let name = |line: &str| {
        let at = line.find("extern \"C\" fn ")? + 14;
        Some(line[at..].split(['(', '<']).next()?.to_string())
    };
    let read = |path: &Path| std::fs::read_to_string(path).expect("a source");
    sources()
        .iter()
        .flat_map(|path| {
            let text = read(path);
            let lines: Vec<&str> = text.lines().collect();
            let marked = lines.windows(2).filter(|w| w[0].contains("unsafe(no_mangle)"));
            marked.filter_map(|w| name(w[1])).collect::<Vec<_>>()
        })
        .collect()
}

/// So that a new function is not forgotten.
#[test]
fn the_program_that_refuses_memory_calls_every_function() {
    let program = std::fs::read_to_string(root().join("tests/c/memory.c")).expect("a program");
    let mut names = exported();
    names.retain(|name| !program.contains(&format!("{name}(")));
    assert!(names.is_empty(), "tests/c/memory.c does not call {names:?}");
}

#[test]
fn every_function_is_declared_and_described() {
    let (text, names) = (header(), exported());
    assert!(names.len() > 30, "only {names:?}");
    for name in names {
        assert_eq!(text.matches(&format!("{name}(")).count(), 1, "{name} is not declared once");
        assert!(name.starts_with("prism_"), "{name} does not say whose it is");
        let at = text
            .find(&format!(" {name}("))
            .or_else(|| text.find(&format!("*{name}(")))
            .unwrap_or_else(|| panic!("{name} is not in the header"));
        let before = text[..at].trim_end_matches(|c: char| c != '\n').trim_end();
        assert!(before.ends_with("*/"), "{name} has no description");
    }
}
