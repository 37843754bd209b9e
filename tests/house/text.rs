//! Lines keep to their columns, first lines of doc comments stand alone, and comments and documents
//! say who is meant.

use crate::files::{documents, files_of_c, files_of_rust, files_with_hashes};
use crate::pieces::{Piece, Token, pieces};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The most columns of a line.
const COLUMNS: usize = 100;

/// The lines that are longer than [`COLUMNS`], by number.
fn wide_lines(text: &str) -> Vec<usize> {
    let is_wide = |line: &str| line.chars().count() > COLUMNS;
    (1..).zip(text.lines()).filter(|(_, line)| is_wide(line)).map(|(n, _)| n).collect()
}

/// The lines of Rust that are longer than [`COLUMNS`], by number, but for those with a string:
/// rustfmt breaks none, and a message that is in one piece is found by searching for it. rustfmt
/// leaves what surrounds such a string as it is, and never looks into the bodies of macros.
fn wide_rust(text: &str) -> Vec<usize> {
    let is_string =
        |(piece, (part, _)): &(Piece, Token)| *piece == Piece::Literal && !part.starts_with('\'');
    let strings: BTreeSet<usize> = pieces(text)
        .into_iter()
        .filter(is_string)
        .flat_map(|(_, (part, line))| line..=line + part.matches('\n').count())
        .collect();
    wide_lines(text).into_iter().filter(|n| !strings.contains(n)).collect()
}

/// The lines of comments after `#` that are longer than [`COLUMNS`], by number.
fn wide_comments(text: &str) -> Vec<usize> {
    let lines: Vec<&str> = text.lines().collect();
    let is_comment = |n: &usize| lines[n - 1].trim_start().starts_with('#');
    wide_lines(text).into_iter().filter(is_comment).collect()
}

/// First words of a doc comment that point at another, or at what stands around it.
const LEANING: [&str; 11] =
    ["As", "Both", "It", "Its", "Nor", "See", "That", "Their", "They", "Those", "With"];

/// The doc comments that begin by pointing at their neighbour, by number of their first lines.
fn leaning_comments(text: &str) -> Vec<usize> {
    let (mut found, mut within) = (vec![], false);
    for (n, line) in (1..).zip(text.lines()) {
        let line = line.trim_start();
        let doc = line.starts_with("///") || line.starts_with("//!");
        if doc && !within {
            let said = line[3..].trim_start();
            let first = said.split(|c: char| !c.is_alphabetic()).next().unwrap_or_default();
            if said.starts_with("The same") || LEANING.contains(&first) {
                found.push(n);
            }
        }
        within = doc;
    }
    found
}

/// Words that stay out of comments and documents: a reader has to ask who is meant.
const VAGUE: [&str; 8] =
    ["anybody", "everybody", "nobody", "somebody", "thereof", "whereof", "whoever", "whomever"];

fn is_vague(line: &str) -> bool {
    line.split(|c: char| !c.is_alphabetic())
        .any(|word| VAGUE.contains(&word.to_lowercase().as_str()))
}

/// The lines with [`VAGUE`] words, by number.
fn vague_lines(text: &str) -> Vec<usize> {
    (1..).zip(text.lines()).filter(|(_, line)| is_vague(line)).map(|(n, _)| n).collect()
}

/// The lines of comments with [`VAGUE`] words, by number.
fn vague_comments(text: &str) -> Vec<usize> {
    let is_comment = |line: &str| line.trim_start().starts_with("//");
    let lines = (1..).zip(text.lines());
    lines.filter(|(_, line)| is_comment(line) && is_vague(line)).map(|(n, _)| n).collect()
}

/// `file:line` of what `of` finds in files.
fn found_in(files: &[PathBuf], of: fn(&str) -> Vec<usize>) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let places = |file: &PathBuf| {
        let name = file.strip_prefix(root).unwrap().display().to_string();
        let lines = of(&std::fs::read_to_string(file).unwrap());
        lines.into_iter().map(move |n| format!("{name}:{n}"))
    };
    files.iter().flat_map(places).collect()
}

/// `file:line` of what `of` finds in all files whose comments keep to a rule: those of Rust, of the
/// kernels and of their emulator.
fn in_comments(of: fn(&str) -> Vec<usize>) -> Vec<String> {
    found_in(&[files_of_rust(), files_of_c(&["kernels"])].concat(), of)
}

#[test]
fn lines_keep_to_their_columns() {
    // Not include/prism.h, which is generated.
    let folders =
        ["kernels", "tests/account", "tests/c", "tests/wgmma", "examples/c", "examples/cpp"];
    let mut of_c = files_of_c(&folders);
    of_c.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("include/prism.hpp"));
    assert!(of_c.len() > 30, "only {} files of C, C++ and CUDA were found", of_c.len());
    let with_hashes = files_with_hashes();
    assert!(with_hashes.len() > 30, "only {} scripts and settings were found", with_hashes.len());
    let wide = [
        found_in(&files_of_rust(), wide_rust),
        found_in(&of_c, wide_lines),
        found_in(&with_hashes, wide_comments),
    ]
    .concat();
    assert!(wide.is_empty(), "lines of more than {COLUMNS} columns:\n{}", wide.join("\n"));

    let (fits, wide) = ("x".repeat(96), "x".repeat(97));
    assert_eq!(wide_lines(&format!("    {fits}\n    {wide}\n    \"{wide}\"\n")), [2, 3]);
    assert_eq!(wide_comments(&format!("# {fits}\n  # {wide}\n{wide} # {wide}\n")), [2]);
    let planted = format!(
        "fn f() {{}}\n    // {fits} \"s\"\n    g(\"{fits}\");\n    {wide}\n    \"s\\\n {wide}\\\n {wide}\";\n\
         m! {{ {wide} }}\n/* \"{wide}\" */ 'x'\n"
    );
    assert_eq!(wide_rust(&planted), [2, 4, 8, 9]);
    assert_eq!(wide_rust(&format!("    {}\n", "×".repeat(96))), [0; 0]);
}

/// rustdoc shows first lines in lists, alone and out of order.
#[test]
fn first_lines_of_doc_comments_stand_alone() {
    let leaning: Vec<_> = in_comments(leaning_comments);
    assert!(
        leaning.is_empty(),
        "say what it is, and begin with none of \"The same\" and {LEANING:?}:\n{}",
        leaning.join("\n")
    );
    let planted = "/// One.\n/// The same line.\nfn f() {}\n    /// The same.\n//! The same.\n";
    assert_eq!(leaning_comments(planted), [4]);
    assert_eq!(leaning_comments("//! The same.\n"), [1]);
    assert_eq!(leaning_comments("/// Its name.\nx\n/// Items.\nx\n/// As work.\n"), [1, 5]);
    assert_eq!(leaning_comments("/// Without.\nx\n/// With all.\n"), [3]);
}

#[test]
fn comments_and_documents_say_who_is_meant() {
    let mut vague = in_comments(vague_comments);
    let documents = documents();
    assert!(documents.len() > 60, "only {} documents were found", documents.len());
    vague.extend(found_in(&documents, vague_lines));
    assert!(vague.is_empty(), "lines that do not say who is meant:\n{}", vague.join("\n"));
    let planted = "// One calls.\n    /// Nobody's.\nlet whoever = 0;\n//! Busybody, or whoever\n";
    assert_eq!(vague_comments(planted), [2, 4]);
    assert_eq!(vague_lines(planted), [2, 3, 4]);
}
