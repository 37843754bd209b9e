//! The files that the rules are about.

use std::path::{Path, PathBuf};

/// All files with one of these extensions in a folder and those below it.
fn below(folder: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let (mut files, mut folders) = (vec![], vec![folder.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| extensions.iter().any(|known| e == *known)) {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}

/// All files of the library, by their names below `src`.
pub fn sources() -> Vec<(String, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let of_library = below(&src, &["rs"]).into_iter().filter(|path| *path != src.join("main.rs"));
    let named = |path: PathBuf| {
        let names = path.strip_prefix(&src).unwrap().iter().map(|part| part.to_string_lossy());
        (names.collect::<Vec<_>>().join("/"), std::fs::read_to_string(&path).unwrap())
    };
    let mut files: Vec<_> = of_library.map(named).collect();
    files.sort();
    assert!(files.len() > 150, "only {} files were found", files.len());
    files
}

/// Documents, scripts, workflows, settings, and sources that are not Rust, of which every line
/// counts.
pub fn documents() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = [".github", "benches", "docs", "examples", "include", "python", "src", "tests"];
    let kinds = ["c", "h", "hpp", "js", "md", "mjs", "py", "toml", "yaml", "yml"];
    let mut files: Vec<_> = folders.iter().flat_map(|f| below(&root.join(f), &kinds)).collect();
    let scripts = std::fs::read_dir(root.join("scripts")).unwrap();
    files.extend(scripts.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()));
    // The changelog is history, and the licence another's text.
    let single =
        ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md", "SECURITY.md", "models/README.md"];
    files.extend(single.map(|name| root.join(name)));
    let settings = [".ci/run", "Cargo.toml", "build.rs", "deny.toml", "fuzz/Cargo.toml"];
    files.extend(settings.map(|name| root.join(name)));
    files
}

/// All files of Rust.
pub fn files_of_rust() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = ["src", "tests", "benches", "fuzz/fuzz_targets", "kernels"];
    let mut files: Vec<_> = folders.iter().flat_map(|f| below(&root.join(f), &["rs"])).collect();
    files.push(root.join("build.rs"));
    files
}

/// Scripts, workflows and settings, whose comments begin with `#`.
pub fn files_with_hashes() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let kinds = ["py", "toml", "yaml", "yml"];
    let folders = ["benches", "examples", "fuzz/seeds", "models", "python", "tests"];
    let mut files: Vec<_> = folders.iter().flat_map(|f| below(&root.join(f), &kinds)).collect();
    let scripts = std::fs::read_dir(root.join("scripts")).unwrap();
    files.extend(scripts.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()));
    let single = [
        ".ci/run",
        ".github/workflows/ci.yml",
        ".github/workflows/release.yml",
        ".github/workflows/sanitize.yml",
        "Cargo.toml",
        "deny.toml",
        "fuzz/Cargo.toml",
        "rustfmt.toml",
    ];
    files.extend(single.map(|name| root.join(name)));
    files
}

/// The files of C, C++ and CUDA in these folders.
pub fn files_of_c(folders: &[&str]) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let extensions = ["c", "h", "cpp", "hpp", "cu", "cuh"];
    folders.iter().flat_map(|folder| below(&root.join(folder), &extensions)).collect()
}
