//! The files of a crate, as text, and what each of them imports.

use crate::pieces::{Token, is_name, tokens};
use std::collections::{BTreeMap, BTreeSet};

/// A module, or a path: its names from the crate's root on.
pub type Names<'t> = Vec<&'t str>;

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
pub struct Import<'t> {
    pub file: usize,
    pub line: usize,
    /// From the crate's root on.
    pub path: Names<'t>,
}

/// The files of a crate and their imports.
#[derive(Default)]
pub struct House<'t> {
    /// Names below `src`, and the modules they are.
    pub files: Vec<(&'t str, Names<'t>)>,
    /// The file of every module, those within files included.
    pub modules: BTreeMap<Names<'t>, usize>,
    /// Modules that are `pub`.
    pub public: BTreeSet<Names<'t>>,
    /// The items that are defined in a module itself.
    defined: BTreeSet<Names<'t>>,
    /// The paths that names of a module stand for because of a `use`, and the modules of which one
    /// imported all names.
    bound: BTreeMap<Names<'t>, Names<'t>>,
    globs: BTreeMap<Names<'t>, BTreeSet<Names<'t>>>,
    pub imports: Vec<Import<'t>>,
}

impl<'t> House<'t> {
    /// Of files by their names below `src`, and their texts.
    pub fn new(files: &'t [(String, String)]) -> House<'t> {
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
    pub fn home(&self, path: &[&'t str], steps: usize) -> usize {
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
}
