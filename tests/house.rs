//! The structure of the sources: floors import only from lower ones, files do not import each other
//! in a circle, and the inner files of an op are its own.
//!
//! The files under `src` are read as text, without comments, strings and code that is compiled only
//! for tests. Every path in them counts, in a `use` or elsewhere, that begins at `crate`, `self`,
//! `super`, a module of the same folder, or a name that a `use` of the same module brought in. What
//! a module re-exports is followed to the file that defines it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Folders and files of `src`, from the ground up: each imports only from earlier rows.
const FLOORS: [&[&str]; 16] = [
    &["checksum", "message", "sync"],
    &["memory"],
    &["input"],
    &["output"],
    &["device"],
    &["microkernel", "tensor"],
    &["chart", "ops", "picture", "volume"],
    &["autograd", "prompt"],
    &["model"],
    &["session"],
    &["preview"],
    &["capi", "challenge", "data", "serve"],
    &["train"],
    &["bench", "eval"],
    &["verify"],
    &["cli"],
];

/// Imports that close a circle of files and are allowed: from, to, and why.
const CIRCLES: [(&str, &str, &str); 1] = [(
    "device/cuda/memory.rs",
    "device/cuda/record/mod.rs",
    "a recording plans memory, which is given back to its recording",
)];

/// Inner files of ops that others may import: by which op or folder, the path below `ops`, and why.
const INNER: [(&str, &str, &str); 4] = [
    (
        "decoder_stage",
        "conv3d",
        "each phase of a stage is a convolution: its tiles, its weights, its kernels",
    ),
    ("linear", "pointwise::cuda", "the gradient in front of an activation is one of its kernels"),
    ("pointwise", "resample::cuda", "max-pooling is one of its kernels"),
    (
        "strided",
        "norm::cuda",
        "its layer norm puts the phases of a transposed convolution in their places",
    ),
];

/// A word or a sign, and its line.
type Token<'t> = (&'t str, usize);
/// A module, or a path: its names from the crate's root on.
type Names<'t> = Vec<&'t str>;

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The row of [`FLOORS`] that contains a folder or file.
fn floor(name: &str) -> Option<usize> {
    FLOORS.iter().position(|row| row.contains(&name))
}

fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// The length of the comment in `/*` that a text begins with; there may be others in it.
fn comment(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while let Some(c) = text[at..].chars().next() {
        if text[at..].starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if text[at..].starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
        } else {
            at += c.len_utf8();
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// The length of the string or character that a text begins with, if it does. A prefix of its
/// quotes other than `r` counts as a word.
fn literal(text: &str) -> Option<usize> {
    for prefix in ["r", "br", "cr"] {
        let Some(raw) = text.strip_prefix(prefix) else { continue };
        let marks = raw.len() - raw.trim_start_matches('#').len();
        if raw[marks..].starts_with('"') {
            let (start, end) = (prefix.len() + marks + 1, format!("\"{}", "#".repeat(marks)));
            return text[start..].find(&end).map(|at| start + at + end.len());
        }
    }
    if let Some(inner) = text.strip_prefix('"') {
        let mut escaped = false;
        for (at, c) in inner.char_indices() {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => return Some(at + 2),
                _ => {}
            }
        }
    }
    let inner = text.strip_prefix('\'')?;
    let first = inner.chars().next()?;
    if first == '\\' {
        return inner[2..].find('\'').map(|at| at + 4);
    }
    // Otherwise a lifetime.
    inner[first.len_utf8()..].starts_with('\'').then(|| first.len_utf8() + 2)
}

/// What a piece of a text is.
#[derive(Clone, Copy, PartialEq)]
enum Piece {
    Blank,
    Comment,
    /// A string or a character.
    Literal,
    /// A word or a sign.
    Token,
}

/// All pieces of a text in order, each with the line that it begins in.
fn pieces(text: &str) -> Vec<(Piece, Token<'_>)> {
    let (mut found, mut rest, mut line) = (vec![], text, 1);
    while let Some(first) = rest.chars().next() {
        let (piece, len) = if rest.starts_with("//") {
            (Piece::Comment, rest.find('\n').unwrap_or(rest.len()))
        } else if rest.starts_with("/*") {
            (Piece::Comment, comment(rest))
        } else if let Some(len) = literal(rest) {
            (Piece::Literal, len)
        } else if first.is_whitespace() {
            (Piece::Blank, rest.find(|c: char| !c.is_whitespace()).unwrap_or(rest.len()))
        } else if is_word(first) {
            (Piece::Token, rest.find(|c: char| !is_word(c)).unwrap_or(rest.len()))
        } else if rest.starts_with("::") {
            (Piece::Token, 2)
        } else {
            (Piece::Token, first.len_utf8())
        };
        found.push((piece, (&rest[..len], line)));
        line += rest[..len].matches('\n').count();
        rest = &rest[len..];
    }
    found
}

/// The words and signs of a text, without comments, strings and characters.
fn tokens(text: &str) -> Vec<Token<'_>> {
    pieces(text).into_iter().filter(|(piece, _)| *piece == Piece::Token).map(|(_, t)| t).collect()
}

/// Where the bracket at `at` closes.
fn closing(tokens: &[Token], at: usize) -> usize {
    let mut depth = 0;
    for (here, token) in tokens.iter().enumerate().skip(at) {
        match token.0 {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return here;
        }
    }
    panic!("the bracket of line {} does not close", tokens[at].1)
}

/// The position after the item at `at`: after its semicolon or its braces.
fn behind(tokens: &[Token], mut at: usize) -> usize {
    while at < tokens.len() {
        match tokens[at].0 {
            ";" => return at + 1,
            "{" => return closing(tokens, at) + 1,
            "(" | "[" => at = closing(tokens, at) + 1,
            _ => at += 1,
        }
    }
    at
}

/// Removes code that is compiled only for tests; also returns the names of such modules that are
/// separate files.
fn without_tests<'t>(tokens: &[Token<'t>]) -> (Vec<Token<'t>>, Names<'t>) {
    let (mut kept, mut files, mut at) = (vec![], vec![], 0);
    while at < tokens.len() {
        if tokens[at].0 == "#" && tokens.get(at + 1).is_some_and(|t| t.0 == "[") {
            let end = closing(tokens, at + 1);
            let words: Names = tokens[at + 2..end].iter().map(|t| t.0).collect();
            if words.first() == Some(&"cfg") && words.contains(&"test") && !words.contains(&"not") {
                at = behind(tokens, end + 1);
                if let [("mod", _), (name, _), (";", _)] = tokens[end + 1..at] {
                    files.push(name);
                }
                continue;
            }
        }
        kept.push(tokens[at]);
        at += 1;
    }
    (kept, files)
}

/// Reads a branch of a `use` from `at` on: the paths, the name of each from there on, the line.
/// Returns where it ends.
fn branch<'t>(
    tokens: &[Token<'t>],
    mut at: usize,
    stem: &[&'t str],
    found: &mut Vec<(Names<'t>, &'t str, usize)>,
) -> usize {
    let mut path = stem.to_vec();
    loop {
        let (word, line) = tokens[at];
        at += 1;
        match word {
            "{" => {
                while tokens[at].0 != "}" {
                    at = branch(tokens, at, &path, found);
                    at += usize::from(tokens[at].0 == ",");
                }
                return at + 1;
            }
            "*" => {
                found.push((path, word, line));
                return at;
            }
            "self" if !path.is_empty() => {}
            _ => path.push(word),
        }
        match tokens[at].0 {
            "::" => at += 1,
            "as" => {
                found.push((path, tokens[at + 1].0, line));
                return at + 2;
            }
            _ => {
                let name = path[path.len() - 1];
                found.push((path, name, line));
                return at;
            }
        }
    }
}

/// A path as it is written in a file.
struct Mention<'t> {
    file: usize,
    line: usize,
    /// The module around it.
    scope: Names<'t>,
    path: Names<'t>,
    /// The name that a `use` gives it, `*` if that is all.
    name: Option<&'t str>,
}

/// What a file imports.
struct Import<'t> {
    file: usize,
    line: usize,
    /// From the crate's root on.
    path: Names<'t>,
}

/// The files of a crate and their imports.
#[derive(Default)]
struct House<'t> {
    /// Names below `src`, and the modules they are.
    files: Vec<(&'t str, Names<'t>)>,
    /// The file of every module, those within files included.
    modules: BTreeMap<Names<'t>, usize>,
    /// Modules that are `pub`.
    public: BTreeSet<Names<'t>>,
    /// The items that are defined in a module itself.
    defined: BTreeSet<Names<'t>>,
    /// The paths that names of a module stand for because of a `use`, and the modules of which one
    /// imported all names.
    bound: BTreeMap<Names<'t>, Names<'t>>,
    globs: BTreeMap<Names<'t>, BTreeSet<Names<'t>>>,
    imports: Vec<Import<'t>>,
}

impl<'t> House<'t> {
    /// Of files by their names below `src`, and their texts.
    fn new(files: &'t [(String, String)]) -> House<'t> {
        let mut read = vec![];
        let mut tests = BTreeSet::new();
        for (name, text) in files {
            let mut module: Names = name.trim_end_matches(".rs").split('/').collect();
            if module == ["lib"] || module.last() == Some(&"mod") {
                module.pop();
            }
            let (tokens, left_out) = without_tests(&tokens(text));
            tests.extend(left_out.into_iter().map(|child| [&module[..], &[child]].concat()));
            read.push((name.as_str(), module, tokens));
        }
        read.retain(|(_, module, _)| !tests.contains(module));
        let (mut house, mut mentions) = (House::default(), vec![]);
        for (name, module, tokens) in read {
            house.modules.insert(module.clone(), house.files.len());
            house.files.push((name, module));
            house.walk(&tokens, &mut mentions);
        }
        // A name may come from another `use`: once more.
        for _ in 0..2 {
            for mention in &mentions {
                let (Some(name), Some(path)) = (mention.name, house.absolute(mention)) else {
                    continue;
                };
                if name == "*" {
                    house.globs.entry(mention.scope.clone()).or_default().insert(path);
                } else {
                    house.bound.entry([&mention.scope[..], &[name]].concat()).or_insert(path);
                }
            }
        }
        for mention in &mentions {
            if let Some(path) = house.absolute(mention)
                && !path.is_empty()
                && house.modules.contains_key(&path[..1])
            {
                house.imports.push(Import { file: mention.file, line: mention.line, path });
            }
        }
        house
    }

    /// Goes through the last file: modules, items and paths in it.
    fn walk(&mut self, tokens: &[Token<'t>], mentions: &mut Vec<Mention<'t>>) {
        let file = self.files.len() - 1;
        let text = |at: usize| tokens.get(at).map_or("", |t| t.0);
        let before = |at: usize, by: usize| at.checked_sub(by).map_or("", text);
        let mut scope = self.files[file].1.clone();
        // The brace depths of the modules around that are not files.
        let (mut around, mut depth, mut at) = (vec![], 0, 0);
        while at < tokens.len() {
            let (word, line) = tokens[at];
            match word {
                "{" => depth += 1,
                "}" => {
                    depth -= 1;
                    if around.last() == Some(&depth) {
                        around.pop();
                        scope.pop();
                    }
                }
                "mod" if matches!(text(at + 2), "{" | ";") => {
                    let child = [&scope[..], &[text(at + 1)]].concat();
                    if before(at, 1) == "pub" {
                        self.public.insert(child.clone());
                    }
                    if text(at + 2) == "{" {
                        scope.push(text(at + 1));
                        around.push(depth);
                        depth += 1;
                        self.modules.insert(child, file);
                    }
                    at += 2;
                }
                "use" if text(at + 1) != "<" => {
                    let mut found = vec![];
                    let start = at + 1 + usize::from(text(at + 1) == "::");
                    at = branch(tokens, start, &[], &mut found) - 1;
                    mentions.extend(found.into_iter().map(|(path, name, line)| Mention {
                        file,
                        line,
                        scope: scope.clone(),
                        path,
                        name: Some(name),
                    }));
                }
                "fn" | "struct" | "enum" | "trait" | "type" | "const" | "static" | "union" => {
                    self.defined.insert([&scope[..], &[text(at + 1)]].concat());
                }
                "macro_rules" => {
                    self.defined.insert([&scope[..], &[text(at + 2)]].concat());
                }
                // Not the rest of a path or a method's name; after two dots it may be either end of
                // a range.
                _ if is_name(word)
                    && text(at + 1) == "::"
                    && before(at, 1) != "::"
                    && (before(at, 1) != "." || before(at, 2) == ".") =>
                {
                    let mut path = vec![word];
                    while text(at + 1) == "::" && is_name(text(at + 2)) {
                        path.push(text(at + 2));
                        at += 2;
                    }
                    if path.len() > 1 {
                        mentions.push(Mention {
                            file,
                            line,
                            scope: scope.clone(),
                            path,
                            name: None,
                        });
                    }
                }
                _ => {}
            }
            at += 1;
        }
    }

    /// A path from the crate's root on; none for paths outside the crate.
    fn absolute(&self, mention: &Mention<'t>) -> Option<Names<'t>> {
        let (scope, path) = (&mention.scope[..], &mention.path[..]);
        let up = path.iter().take_while(|name| **name == "super").count();
        match path[0] {
            "crate" => {
                // What the root re-exports is followed to where it was defined.
                let path = &path[1..];
                let from = path.get(..1).and_then(|name| self.bound.get(name));
                Some(from.map_or_else(|| path.to_vec(), |from| [&from[..], &path[1..]].concat()))
            }
            "self" => Some([scope, &path[1..]].concat()),
            "super" => Some([&scope[..scope.len().checked_sub(up)?], &path[up..]].concat()),
            first => {
                let here = [scope, &[first]].concat();
                if self.modules.contains_key(&here) {
                    return Some([scope, path].concat());
                }
                self.bound.get(&here).map(|from| [&from[..], &path[1..]].concat())
            }
        }
    }

    /// The file that defines what a path names, found within `steps` re-exports.
    fn home(&self, path: &[&'t str], steps: usize) -> usize {
        let len = (0..=path.len())
            .rev()
            .find(|len| self.modules.contains_key(&path[..*len]))
            .expect("the crate has a root");
        let (module, file) = (&path[..len], self.modules[&path[..len]]);
        let Some(name) = path.get(len..=len).filter(|_| steps > 0) else { return file };
        let named = [module, name].concat();
        if let Some(from) = self.bound.get(&named) {
            return self.home(&[&from[..], &path[len + 1..]].concat(), steps - 1);
        }
        if self.defined.contains(&named) {
            return file;
        }
        let mut globs = self.globs.get(module).into_iter().flatten();
        globs
            .find(|from| self.defined.contains(&[&from[..], name].concat()))
            .map_or(file, |from| self.home(from, steps - 1))
    }

    /// A line that says where an import is and what it imports.
    fn show(&self, import: &Import) -> String {
        format!(
            "src/{}:{}: imports crate::{}",
            self.files[import.file].0,
            import.line,
            import.path.join("::")
        )
    }

    /// Imports from floors that are not lower.
    fn upward(&self) -> BTreeSet<String> {
        let strangers = self
            .files
            .iter()
            .filter(|(_, module)| module.first().is_some_and(|name| floor(name).is_none()));
        let mut found: BTreeSet<String> = strangers
            .map(|(name, _)| format!("src/{name}: has no floor in tests/house.rs"))
            .collect();
        for import in &self.imports {
            let Some(from) = self.files[import.file].1.first() else { continue };
            let to = import.path[0];
            if *from != to && floor(from) <= floor(to) {
                found.insert(format!(
                    "{}, but `{to}` does not lie below `{from}`",
                    self.show(import)
                ));
            }
        }
        found
    }

    /// Whether a file is the `mod.rs` of a folder that holds the other, or the crate's root.
    fn is_over(&self, file: usize, other: usize) -> bool {
        match self.files[file].0 {
            "lib.rs" => true,
            name => name
                .strip_suffix("mod.rs")
                .is_some_and(|folder| self.files[other].0.starts_with(folder)),
        }
    }

    /// Imports that are part of a circle of files, by the files' names, except for those of
    /// `excepted`.
    ///
    /// A folder's `mod.rs` has the contract and calls the files below it, which know the contract:
    /// what is imported between them, either way, does not count. All other imports do: between
    /// files of one folder, between those of a folder and of one within it, between a `mod.rs` and
    /// files of other folders.
    fn circles(&self, excepted: &[(&str, &str, &str)]) -> BTreeMap<(&'t str, &'t str), String> {
        let mut edges: BTreeMap<usize, BTreeMap<usize, &Import>> = BTreeMap::new();
        for import in &self.imports {
            let (from, to) = (import.file, self.home(&import.path, 8));
            let may =
                excepted.iter().any(|(a, b, _)| (*a, *b) == (self.files[from].0, self.files[to].0));
            if from != to && !may && !self.is_over(from, to) && !self.is_over(to, from) {
                edges.entry(from).or_default().entry(to).or_insert(import);
            }
        }
        let leads_back = |from: usize, to: usize| {
            let (mut seen, mut next) = (BTreeSet::new(), vec![to]);
            while let Some(file) = next.pop() {
                if seen.insert(file) {
                    next.extend(edges.get(&file).into_iter().flat_map(|to| to.keys()));
                }
            }
            seen.contains(&from)
        };
        let mut found = BTreeMap::new();
        for (from, imports) in &edges {
            for (to, import) in imports {
                if leads_back(*from, *to) {
                    let names = (self.files[*from].0, self.files[*to].0);
                    found.insert(
                        names,
                        format!(
                            "{}, but src/{} leads back to it: a circle of files",
                            self.show(import),
                            names.1
                        ),
                    );
                }
            }
        }
        found
    }

    /// Imports from outside an op that go through one of its files that is not `pub`: from where,
    /// the path below `ops`, and the message.
    fn inner(&self) -> Vec<(&'t str, String, String)> {
        let mut found = vec![];
        for import in &self.imports {
            let (module, path) = (&self.files[import.file].1, &import.path);
            if path[0] != "ops" || path.len() < 4 || module.starts_with(&path[..2]) {
                continue;
            }
            if self.modules.contains_key(&path[..3]) && !self.public.contains(&path[..3]) {
                let who =
                    if module.first() == Some(&"ops") { module.get(1) } else { module.first() };
                let message = format!(
                    "{}, but `{}` is an inner file of `{}`",
                    self.show(import),
                    path[2],
                    path[1]
                );
                found.push((who.copied().unwrap_or_default(), path[1..].join("::"), message));
            }
        }
        found
    }
}

/// Whether an entry of [`INNER`] allows an import.
fn allows(entry: &(&str, &str, &str), who: &str, path: &str) -> bool {
    entry.0 == who && path.strip_prefix(entry.1).is_some_and(|rest| rest.starts_with("::"))
}

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
fn files() -> Vec<(String, String)> {
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

fn lines<S: AsRef<str>>(found: impl IntoIterator<Item = S>) -> String {
    found.into_iter().map(|line| format!("{}\n", line.as_ref())).collect()
}

#[test]
fn floors_import_only_what_lies_below() {
    let files = files();
    let found = lines(House::new(&files).upward());
    assert!(
        found.is_empty(),
        "a floor imports only lower ones (FLOORS in tests/house.rs):\n{found}"
    );
}

#[test]
fn files_do_not_import_each_other_in_a_circle() {
    let files = files();
    let found = lines(House::new(&files).circles(&CIRCLES).values());
    assert!(found.is_empty(), "what two files need stands in a third:\n{found}");
}

#[test]
fn the_inner_files_of_an_op_are_its_own() {
    let files = files();
    let mut found = House::new(&files).inner();
    found.retain(|(who, path, _)| !INNER.iter().any(|entry| allows(entry, who, path)));
    let found = lines(found.into_iter().map(|f| f.2));
    assert!(
        found.is_empty(),
        "what several ops use stands in `microkernel`, in an op of its own, or in the op's `mod.rs`:\n{found}"
    );
}

/// The table of floors in ARCHITECTURE.md: a floor, and what it says that the floor imports.
fn table_of_floors(document: &str) -> BTreeMap<String, BTreeSet<String>> {
    let quoted = |text: &str| -> BTreeSet<String> {
        text.split('`').skip(1).step_by(2).map(String::from).collect()
    };
    let rows = document.lines().skip_while(|line| !line.starts_with("| floor | what it contains"));
    let rows = rows.skip(2).take_while(|line| line.starts_with('|'));
    let row = |line: &str| {
        let columns: Vec<&str> = line.split('|').map(str::trim).collect();
        let floor = quoted(columns[1]).pop_first().unwrap();
        let mut imports = quoted(columns[3]);
        if columns[3].starts_with("all but") {
            let all = FLOORS.into_iter().flatten().map(|name| name.to_string());
            imports = all.filter(|name| !imports.contains(name) && *name != floor).collect();
        }
        (floor, imports)
    };
    rows.map(row).collect()
}

#[test]
fn the_table_of_floors_says_what_each_imports() {
    let files = files();
    let house = House::new(&files);
    let floors = FLOORS.into_iter().flatten();
    let mut found: BTreeMap<String, BTreeSet<String>> =
        floors.map(|name| (name.to_string(), BTreeSet::new())).collect();
    for import in &house.imports {
        let Some(from) = house.files[import.file].1.first() else { continue };
        if *from != import.path[0] {
            found.entry(from.to_string()).or_default().insert(import.path[0].to_string());
        }
    }
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("ARCHITECTURE.md");
    let told = table_of_floors(&std::fs::read_to_string(document).unwrap());
    let names = |table: &BTreeMap<String, _>| table.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&told), names(&found), "the table of floors in ARCHITECTURE.md");
    for (floor, imports) in &found {
        assert_eq!(&told[floor], imports, "ARCHITECTURE.md on what `{floor}` imports");
    }
}

/// An exception that is no longer needed would allow other violations.
#[test]
fn exceptions_go_with_their_reasons() {
    let files = files();
    let house = House::new(&files);
    let circles = house.circles(&[]);
    for (from, to, _) in CIRCLES {
        assert!(
            circles.contains_key(&(from, to)),
            "src/{from} and src/{to} form no circle any more: take them out of CIRCLES"
        );
    }
    let inner = house.inner();
    for entry in INNER {
        let needed = inner.iter().any(|(who, path, _)| allows(&entry, who, path));
        assert!(
            needed,
            "`{}` imports nothing of `{}` any more: take it out of INNER",
            entry.0, entry.1
        );
    }
}

#[test]
fn what_is_planted_is_found() {
    let planted = [
        ("lib.rs", "pub mod cli;\npub mod device;\npub mod ops;\n"),
        ("cli/mod.rs", "pub fn run() {}\n"),
        (
            "device/mod.rs",
            "mod cuda;\n/* use crate::cli; /* and */ crate::cli::run() */\nfn f<'a>(c: char) -> &'a str {\n    if c == '\"' { crate::ops::conv3d::conv3d() }\n    \"crate::cli::run\"\n}\n",
        ),
        ("device/cuda/mod.rs", "#[cfg(all(test, feature = \"emulator\"))]\nmod tests;\n"),
        ("device/cuda/tests.rs", "use crate::cli::run;\n"),
        ("ops/mod.rs", "pub mod conv3d;\npub mod linear;\npub mod loss;\n"),
        (
            "ops/conv3d/mod.rs",
            "mod cpu;\npub mod grad;\npub(crate) mod tile;\npub use cpu::Packed;\npub struct Input;\npub fn conv3d() { cpu::conv3d() }\n",
        ),
        (
            "ops/conv3d/cpu.rs",
            "use super::Input;\nuse super::tile::{self, Tiling};\npub struct Packed;\npub fn conv3d() {}\n",
        ),
        ("ops/conv3d/grad.rs", "use super::{Input, Packed};\npub fn input() {}\n"),
        (
            "ops/conv3d/tile.rs",
            "// use crate::cli::run;\nconst RAW: &str = r#\"\"crate::cli::run\"#;\nuse super::Packed;\npub struct Tiling;\n#[cfg(test)]\nmod tests {\n    use crate::cli::run;\n}\n",
        ),
        (
            "ops/linear/mod.rs",
            "use super::conv3d::{self, Input, grad};\npub fn linear() {\n    conv3d::tile::of(grad::input())\n}\n",
        ),
        (
            "ops/loss/mod.rs",
            "use crate::ops::{conv3d::{Packed as Weights, tile}, linear::linear};\nfn loss() { tile::Tiling::new() }\n",
        ),
    ];
    let planted = planted.map(|(name, text)| (name.to_string(), text.to_string()));
    let house = House::new(&planted);
    assert_eq!(
        lines(house.upward()),
        "src/device/mod.rs:4: imports crate::ops::conv3d::conv3d, but `ops` does not lie below `device`\n"
    );
    let circles = house.circles(&[]);
    assert_eq!(
        lines(circles.values()),
        "src/ops/conv3d/cpu.rs:2: imports crate::ops::conv3d::tile, but src/ops/conv3d/tile.rs leads back to it: a circle of files\n\
         src/ops/conv3d/tile.rs:3: imports crate::ops::conv3d::Packed, but src/ops/conv3d/cpu.rs leads back to it: a circle of files\n"
    );
    assert!(house.circles(&[("ops/conv3d/tile.rs", "ops/conv3d/cpu.rs", "")]).is_empty());
    assert_eq!(
        lines(house.inner().into_iter().map(|f| f.2)),
        "src/ops/linear/mod.rs:3: imports crate::ops::conv3d::tile::of, but `tile` is an inner file of `conv3d`\n\
         src/ops/loss/mod.rs:2: imports crate::ops::conv3d::tile::Tiling::new, but `tile` is an inner file of `conv3d`\n"
    );
    let door = [
        ("lib.rs", "pub use ops::Op;\n"),
        ("device/mod.rs", "use crate::Op;\n"),
        ("ops/mod.rs", "pub struct Op;\n"),
    ];
    let door = door.map(|(name, text)| (name.to_string(), text.to_string()));
    assert_eq!(
        lines(House::new(&door).upward()),
        "src/device/mod.rs:1: imports crate::ops::Op, but `ops` does not lie below `device`\n"
    );
    let attic =
        [("lib.rs", ""), ("attic.rs", "")].map(|(name, text)| (name.to_string(), text.to_string()));
    assert_eq!(
        lines(House::new(&attic).upward()),
        "src/attic.rs: has no floor in tests/house.rs\n"
    );
}

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

/// Documents, scripts, workflows, settings, and sources that are not Rust, of which every line
/// counts.
fn documents() -> Vec<PathBuf> {
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
fn files_of_rust() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = ["src", "tests", "benches", "fuzz/fuzz_targets", "kernels"];
    let mut files: Vec<_> = folders.iter().flat_map(|f| below(&root.join(f), &["rs"])).collect();
    files.push(root.join("build.rs"));
    files
}

/// Scripts, workflows and settings, whose comments begin with `#`.
fn files_with_hashes() -> Vec<PathBuf> {
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
fn files_of_c(folders: &[&str]) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let extensions = ["c", "h", "cpp", "hpp", "cu", "cuh"];
    folders.iter().flat_map(|folder| below(&root.join(folder), &extensions)).collect()
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
