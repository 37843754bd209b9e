//! Reads which kernels the sources declare, for `build.rs`, which makes the table of
//! `src/device/cuda/source.rs` from it, and a struct of their parameters for the code that launches
//! them.
//!
//! Kernels are declared by the macro `KERNEL` of `lib/base.cuh`, mostly within macros that expand
//! to one per type of elements. So this is as much of a C preprocessor as that needs: includes,
//! macros with parameters and `##`, `#ifdef`. A kernel's product runs on tensor cores if its body
//! names a function that has the comment [`MARKER`] on the line above it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The comment above functions whose products run on tensor cores.
const MARKER: &str = "// tensor cores";

/// The endings of the names of kernels that exist for several types of elements, or ways to
/// multiply float32.
const TYPES: [&str; 5] = ["f32", "f16", "bf16", "tf32", "tf32x3"];

/// Declares a kernel: `KERNEL(name, threads, blocks, (parameters), body)`.
const KERNEL: &str = "KERNEL";

/// Words that are reserved in Rust and not in C++: a field cannot have such a name.
const RESERVED: [&str; 34] = [
    "abstract", "as", "async", "await", "become", "box", "crate", "dyn", "final", "fn", "gen",
    "impl", "in", "let", "loop", "macro", "match", "mod", "move", "mut", "override", "priv", "pub",
    "ref", "self", "super", "trait", "type", "typeof", "unsafe", "unsized", "use", "where",
    "yield",
];

/// A parameter: its name, and its kind, as `Parameter` in Rust names it.
pub type Named = (String, &'static str);

/// A kernel as its source declares it.
#[derive(Clone, Debug, PartialEq)]
pub struct Declared {
    /// The file under `kernels/`.
    pub file: String,
    /// The most threads of a block; none if that is more than a number or a constant.
    pub threads: Option<usize>,
    /// The parameters, in order.
    pub parameters: Vec<Named>,
    /// Whether its product runs on tensor cores.
    pub tensor_cores: bool,
}

/// Kernels of one name and the same parameters, for several types of elements.
#[derive(Debug, PartialEq)]
pub struct Family<'a> {
    /// The entries of [`TYPES`] for which there is one.
    pub types: [bool; 5],
    /// The parameters of each.
    pub parameters: &'a [Named],
}

impl Family<'_> {
    /// Whether a kernel belongs to the family called `base`.
    fn has(&self, base: &str, kernel: &str) -> bool {
        let of = |(dtype, there): (&str, bool)| there && split(kernel) == Some((base, dtype));
        TYPES.into_iter().zip(self.types).any(of)
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    /// A name or a number.
    Word(String),
    /// Any other character.
    Mark(char),
    /// `##`.
    Paste,
    /// A text between quotation marks, whatever its contents.
    Text,
    /// [`MARKER`].
    TensorCores,
}

/// The tokens of a line. `in_comment` says whether a comment continues from the line before, and
/// whether it continues to the next.
fn tokens(line: &str, in_comment: &mut bool) -> Vec<Token> {
    let of_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let (mut found, mut rest) = (vec![], line);
    while let Some(first) = rest.chars().next() {
        if *in_comment {
            let Some((_, behind)) = rest.split_once("*/") else { break };
            *in_comment = false;
            rest = behind;
        } else if rest.starts_with("//") {
            break;
        } else if let Some(behind) = rest.strip_prefix("/*") {
            *in_comment = true;
            rest = behind;
        } else if let Some(behind) = rest.strip_prefix("##") {
            found.push(Token::Paste);
            rest = behind;
        } else if of_word(first) {
            let (word, behind) =
                rest.split_at(rest.find(|c: char| !of_word(c)).unwrap_or(rest.len()));
            found.push(Token::Word(word.into()));
            rest = behind;
        } else if first == '"' {
            let mut escaped = false;
            let end = rest[1..].find(|c: char| {
                let ends = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                ends
            });
            found.push(Token::Text);
            rest = match end {
                Some(end) => &rest[end + 2..],
                None => "",
            };
        } else {
            if !first.is_whitespace() {
                found.push(Token::Mark(first));
            }
            rest = &rest[first.len_utf8()..];
        }
    }
    found
}

/// The arguments in the parentheses that open at `at`, and the position after them; none if none
/// open.
fn arguments(text: &[Token], at: usize) -> Option<(Vec<&[Token]>, usize)> {
    if text.get(at) != Some(&Token::Mark('(')) {
        return None;
    }
    let (mut found, mut from, mut depth) = (vec![], at + 1, 0usize);
    for (here, token) in text.iter().enumerate().skip(at) {
        match token {
            Token::Mark('(') => depth += 1,
            Token::Mark(')') if depth == 1 => {
                found.push(&text[from..here]);
                return Some((found, here + 1));
            }
            Token::Mark(')') => depth -= 1,
            Token::Mark(',') if depth == 1 => {
                found.push(&text[from..here]);
                from = here + 1;
            }
            _ => {}
        }
    }
    None
}

/// A macro; its parameters, if it is called.
struct Macro {
    parameters: Option<Vec<String>>,
    body: Vec<Token>,
}

/// The result of a macro's body with these arguments.
fn substituted(parameters: &[String], body: &[Token], given: &[&[Token]]) -> Vec<Token> {
    let argument = |name: &str| -> Option<Vec<Token>> {
        let at = parameters.iter().position(|p| p == name)?;
        let behind = given.get(at..).unwrap_or_default();
        let taken = if name == "__VA_ARGS__" { behind } else { &behind[..behind.len().min(1)] };
        Some(taken.join(&Token::Mark(',')))
    };
    let (mut made, mut pastes): (Vec<Token>, bool) = (vec![], false);
    for token in body {
        if *token == Token::Paste {
            pastes = true;
            continue;
        }
        let mut part = match token {
            Token::Word(name) => argument(name).unwrap_or_else(|| vec![token.clone()]),
            _ => vec![token.clone()],
        };
        // An empty argument counts as something here: what is pasted to it is not pasted to what
        // precedes it.
        if part.is_empty() {
            part.push(Token::Word(String::new()));
        }
        if pastes && let (Some(Token::Word(left)), Token::Word(right)) = (made.last_mut(), &part[0])
        {
            left.push_str(right);
            part.remove(0);
        }
        pastes = false;
        made.extend(part);
    }
    made.retain(|token| *token != Token::Word(String::new()));
    made
}

/// A file of kernels with what it includes.
#[derive(Default)]
struct Source {
    macros: BTreeMap<String, Macro>,
    text: Vec<Token>,
    included: BTreeSet<String>,
}

impl Source {
    /// Reads a file; `read` gives the text of each.
    fn add(&mut self, file: &str, read: &dyn Fn(&str) -> Option<String>) -> Result<(), String> {
        if !self.included.insert(file.into()) {
            return Ok(());
        }
        let text = read(file).ok_or_else(|| format!("kernels/{file} cannot be read"))?;
        let text = text.replace('\r', "").replace("\\\n", " ");
        let (mut in_comment, mut taken): (bool, Vec<bool>) = (false, vec![]);
        for line in text.lines().map(str::trim) {
            if let Some(directive) = line.strip_prefix('#').filter(|_| !in_comment) {
                let directive = directive.trim();
                let (word, rest) =
                    directive.split_once(char::is_whitespace).unwrap_or((directive, ""));
                let rest = rest.trim();
                match word {
                    "ifdef" => taken.push(self.macros.contains_key(rest)),
                    "ifndef" => taken.push(!self.macros.contains_key(rest)),
                    "else" => {
                        if let Some(last) = taken.last_mut() {
                            *last = !*last;
                        }
                    }
                    "endif" => taken.truncate(taken.len().saturating_sub(1)),
                    _ if taken.contains(&false) => {}
                    "include" => {
                        if let Some((included, _)) =
                            rest.strip_prefix('"').and_then(|rest| rest.split_once('"'))
                        {
                            self.add(included, read)?;
                        }
                    }
                    "define" => self.define(rest),
                    "pragma" => {}
                    other => {
                        return Err(format!(
                            "kernels/{file}: #{other} is more than kernels/table.rs reads"
                        ));
                    }
                }
            } else if !taken.contains(&false) {
                if line == MARKER {
                    self.text.push(Token::TensorCores);
                }
                self.text.extend(tokens(line, &mut in_comment));
            }
        }
        Ok(())
    }

    fn define(&mut self, text: &str) {
        let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
        let (name, rest) = text.split_at(end);
        let (parameters, body) = match rest.strip_prefix('(').and_then(|rest| rest.split_once(')'))
        {
            Some((list, body)) => (
                Some(list.split(',').map(|p| p.trim().replace("...", "__VA_ARGS__")).collect()),
                body,
            ),
            None => (None, rest),
        };
        self.macros.insert(name.into(), Macro { parameters, body: tokens(body, &mut false) });
    }

    /// Adds the expansion of `text`; `KERNEL` stays.
    fn expand(&self, text: &[Token], depth: usize, to: &mut Vec<Token>) -> Result<(), String> {
        if depth > 32 {
            return Err("a macro expands to itself".into());
        }
        let mut at = 0;
        while let Some(token) = text.get(at) {
            at += 1;
            let found = match token {
                Token::Word(name) if name != KERNEL => self.macros.get(name),
                _ => None,
            };
            let Some(Macro { parameters, body }) = found else {
                to.push(token.clone());
                continue;
            };
            match (parameters, arguments(text, at)) {
                (None, _) => self.expand(body, depth + 1, to)?,
                (Some(parameters), Some((given, behind))) => {
                    self.expand(&substituted(parameters, body, &given), depth + 1, to)?;
                    at = behind;
                }
                (Some(_), None) => to.push(token.clone()),
            }
        }
        Ok(())
    }
}

/// The constants outside all braces that are plain numbers.
fn constants(text: &[Token]) -> BTreeMap<&str, usize> {
    let (mut found, mut depth) = (BTreeMap::new(), 0i64);
    for (at, token) in text.iter().enumerate() {
        match token {
            Token::Mark('{') => depth += 1,
            Token::Mark('}') => depth -= 1,
            Token::Word(word) if depth == 0 && word == "constexpr" => {
                let end = text[at..]
                    .iter()
                    .position(|token| *token == Token::Mark(';'))
                    .map_or(text.len(), |length| at + length);
                // After the type: names and values.
                for constant in text[at..end]
                    .get(2..)
                    .unwrap_or_default()
                    .split(|token| *token == Token::Mark(','))
                {
                    if let [Token::Word(name), Token::Mark('='), Token::Word(value)] = constant
                        && let Ok(value) = value.parse()
                    {
                        found.insert(name.as_str(), value);
                    }
                }
            }
            _ => {}
        }
    }
    found
}

/// The positions of a token.
fn places(text: &[Token], wanted: &Token) -> Vec<usize> {
    (0..text.len()).filter(|&at| text[at] == *wanted).collect()
}

/// The kind of a parameter.
fn kind(parameter: &[Token]) -> Result<&'static str, String> {
    if parameter.contains(&Token::Mark('*')) {
        return Ok("Pointer");
    }
    let words: Vec<&str> = parameter
        .iter()
        .filter_map(|token| match token {
            Token::Word(word) if word != "const" => Some(word.as_str()),
            _ => None,
        })
        .collect();
    match words.as_slice() {
        ["int", _] => Ok("Int"),
        ["int64", _] => Ok("Long"),
        ["float" | "f32", _] => Ok("Float"),
        ["double", _] => Ok("Double"),
        _ => Err(format!("no argument of a launch is a '{}'", words.join(" "))),
    }
}

/// The name of a parameter.
fn name_of(parameter: &[Token]) -> Result<String, String> {
    let Some(Token::Word(name)) = parameter.last() else {
        return Err("a parameter has no name".into());
    };
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) || !name.chars().all(plain) {
        return Err(format!("parameter '{name}': a field of Rust is written in lower case"));
    }
    if RESERVED.contains(&name.as_str()) {
        return Err(format!("parameter '{name}': Rust has this word for itself"));
    }
    Ok(name.clone())
}

/// The part of a kernel's name before its type of elements, and the type.
fn split(kernel: &str) -> Option<(&str, &str)> {
    kernel.rsplit_once('_').filter(|(_, dtype)| TYPES.contains(dtype))
}

/// The families of kernels, by the beginnings of their names. If a kernel has other parameters than
/// those of the other types it is in none; if only the names of parameters differ, that is an
/// error.
pub fn families(
    kernels: &BTreeMap<String, Declared>,
) -> Result<BTreeMap<&str, Family<'_>>, String> {
    let mut alike: BTreeMap<&str, [Option<&Declared>; 5]> = BTreeMap::new();
    for (name, kernel) in kernels {
        let Some((base, dtype)) = split(name) else { continue };
        let at = TYPES.iter().position(|known| *known == dtype).unwrap_or_default();
        alike.entry(base).or_default()[at] = Some(kernel);
    }
    let mut found = BTreeMap::new();
    for (base, of) in alike {
        let there: Vec<&[Named]> = of.iter().flatten().map(|k| k.parameters.as_slice()).collect();
        let kinds = |list: &[Named]| -> Vec<&str> { list.iter().map(|(_, kind)| *kind).collect() };
        let differs = |one: &[Named], other: &[Named]| one != other && kinds(one) == kinds(other);
        let pair = there.iter().enumerate().find_map(|(at, one)| {
            there[at + 1..].iter().find(|other| differs(one, other)).map(|other| (*one, *other))
        });
        if let Some((one, other)) = pair {
            let names = |list: &[Named]| -> Vec<String> {
                list.iter().map(|(name, _)| name.clone()).collect()
            };
            return Err(format!(
                "{base}: the parameters are called ({}) for one type of elements and ({}) for another",
                names(one).join(", "),
                names(other).join(", ")
            ));
        }
        let times = |list: &[Named]| there.iter().filter(|other| **other == list).count();
        let Some(parameters) = there.iter().copied().max_by_key(|list| times(list)) else {
            continue;
        };
        if times(parameters) > 1 || there.len() == 1 {
            let types = of.map(|kernel| kernel.is_some_and(|k| k.parameters == parameters));
            found.insert(base, Family { types, parameters });
        }
    }
    Ok(found)
}

/// The kernels that a file declares, by name; `read` gives the text of a file under `kernels/`.
pub fn declared(
    file: &str,
    read: &dyn Fn(&str) -> Option<String>,
) -> Result<BTreeMap<String, Declared>, String> {
    let mut source = Source::default();
    source.add(file, read)?;
    let (constants, mut text) = (constants(&source.text), vec![]);
    source.expand(&source.text, 0, &mut text).map_err(|why| format!("kernels/{file}: {why}"))?;

    let mut marked: BTreeSet<&str> = BTreeSet::new();
    for at in places(&text, &Token::TensorCores) {
        // A function's name comes before its parameters.
        let length = text[at..].iter().position(|token| *token == Token::Mark('(')).unwrap_or(0);
        let [.., Token::Word(name)] = &text[at..at + length] else {
            return Err(format!("kernels/{file}: no function is below '{MARKER}'"));
        };
        marked.insert(name.as_str());
    }

    let mut found: BTreeMap<String, Declared> = BTreeMap::new();
    for at in places(&text, &Token::Word(KERNEL.into())) {
        let wrong =
            |what: &str| format!("kernels/{file}: {KERNEL} number {} {what}", found.len() + 1);
        let (given, _) = arguments(&text, at + 1).ok_or_else(|| wrong("has no end"))?;
        let [name, threads, _, parameters, body @ ..] = given.as_slice() else {
            return Err(wrong("has too few arguments"));
        };
        let [Token::Word(name)] = name else {
            return Err(wrong("has more than a word for a name"));
        };
        let threads = match threads {
            [Token::Word(word)] => {
                word.parse().ok().or_else(|| constants.get(word.as_str()).copied())
            }
            _ => None,
        };
        let (list, _) = arguments(parameters, 0).ok_or_else(|| wrong("has no parameters"))?;
        let parameters: Result<Vec<Named>, String> = list
            .iter()
            .filter(|p| !p.is_empty())
            .map(|p| kind(p).and_then(|kind| Ok((name_of(p)?, kind))))
            .collect();
        let parameters = parameters.map_err(|why| format!("kernels/{file}, {name}: {why}"))?;
        let mut words = body.iter().copied().flatten();
        let tensor_cores =
            words.any(|token| matches!(token, Token::Word(word) if marked.contains(word.as_str())));
        if found
            .insert(name.clone(), Declared { file: file.into(), threads, parameters, tensor_cores })
            .is_some()
        {
            return Err(format!("kernels/{file} declares {name} twice"));
        }
    }
    if found.is_empty() { Err(format!("kernels/{file} declares no kernel")) } else { Ok(found) }
}

/// The files in a folder whose names have this ending.
fn listed(folder: &Path, under: &str, extension: &str) -> Result<Vec<String>, String> {
    let failed = |e: std::io::Error| format!("{}: {e}", folder.join(under).display());
    let mut found = vec![];
    for entry in std::fs::read_dir(folder.join(under)).map_err(failed)? {
        let name = entry
            .map_err(failed)?
            .file_name()
            .into_string()
            .map_err(|name| format!("{name:?} is no plain name"))?;
        if name.ends_with(extension) {
            found.push(format!("{under}{name}"));
        }
    }
    found.sort();
    Ok(found)
}

/// The table of the kernels in a folder, as Rust.
pub fn rust(folder: &Path) -> Result<String, String> {
    let read = |file: &str| std::fs::read_to_string(folder.join(file)).ok();
    let (headers, files) = (listed(folder, "lib/", ".cuh")?, listed(folder, "", ".cu")?);
    let mut kernels: BTreeMap<String, Declared> = BTreeMap::new();
    for file in &files {
        for (name, kernel) in declared(file, &read)? {
            if let Some(other) = kernels.insert(name.clone(), kernel) {
                return Err(format!("kernels/{file} and kernels/{} declare {name}", other.file));
            }
        }
    }

    let families = families(&kernels)?;
    let mut constants = BTreeSet::new();
    for name in kernels.keys().map(String::as_str).chain(families.keys().copied()) {
        if !constants.insert(name.to_uppercase()) {
            return Err(format!(
                "two kernels, or a kernel and the beginning of another's name, would be {}",
                name.to_uppercase()
            ));
        }
    }

    let mut text = String::from("// Made by build.rs of kernels/*.cu.\n");
    for (name, what, list) in
        [("HEADERS", "Headers.", &headers), ("FILES", "Files of kernels.", &files)]
    {
        text += &format!("\n/// {what}\npub const {name}: &[Source] = &[\n");
        for file in list {
            text += &format!(
                "    ({file:?}, include_str!(concat!(env!(\"CARGO_MANIFEST_DIR\"), \"/kernels/{file}\"))),\n"
            );
        }
        text += "];\n";
    }
    let all: Vec<String> = kernels
        .keys()
        .map(|name| format!("    kernels::{}.kernel,\n", name.to_uppercase()))
        .collect();
    text += &format!(
        "\n/// All kernels, in the order of their names.\npub const KERNELS: &[&Kernel] = &[\n{}];\n",
        all.concat()
    );
    text += "\n/// A constant for each kernel and for each [`Family`], and their arguments.\n";
    // If kernels share their parameters, not every name for their arguments is used.
    text += "#[allow(dead_code)]\npub(crate) mod kernels {\n";
    text += "    use super::{Argument, Arguments, Family, Int, Kernel, Long, Parameter, Pointer, TypedKernel};\n";
    text += "    use std::marker::PhantomData;\n";
    for (name, kernel) in &kernels {
        let kinds: Vec<String> =
            kernel.parameters.iter().map(|(_, kind)| format!("Parameter::{kind}")).collect();
        let (file, constant) = (&kernel.file, name.to_uppercase());
        let family = families.iter().find(|(base, of)| of.has(base, name));
        text += &format!(
            "\n    /// `{name}` of `kernels/{file}`.\n    pub const {constant}: TypedKernel<{}<'static>> = TypedKernel {{\n",
            structure(family.map_or(name, |(base, _)| base))
        );
        text += &format!(
            "        kernel: &Kernel {{\n            name: {name:?},\n            file: {file:?},\n            threads: {:?},\n",
            kernel.threads
        );
        text += &format!(
            "            parameters: &[{}],\n            tensor_cores: {},\n        }},\n        arguments: PhantomData,\n    }};\n",
            kinds.join(", "),
            kernel.tensor_cores
        );
    }
    for (base, family) in &families {
        let constant = base.to_uppercase();
        let fields = TYPES.into_iter().zip(family.types).map(|(dtype, there)| match there {
            true => format!("{dtype}: Some({constant}_{})", dtype.to_uppercase()),
            false => format!("{dtype}: None"),
        });
        let fields: Vec<String> = fields.collect();
        text += &format!(
            "\n    /// `{base}_` and a type of elements.\n    pub const {constant}: Family<{}<'static>> = Family {{ base: {base:?}, {} }};\n",
            structure(base),
            fields.join(", ")
        );
    }
    Ok(text + &structures(&kernels, &families)? + "}\n")
}

/// The structs of the kernels' arguments. Kernels with the same parameters share one, which has a
/// name for each.
fn structures(
    kernels: &BTreeMap<String, Declared>,
    families: &BTreeMap<&str, Family>,
) -> Result<String, String> {
    let alone = kernels
        .iter()
        .filter(|(name, _)| !families.iter().any(|(base, family)| family.has(base, name)))
        .map(|(name, kernel)| (name.as_str(), kernel.parameters.as_slice()));
    let of_families = families.iter().map(|(base, family)| (*base, family.parameters));
    let all: BTreeMap<&str, &[Named]> = alone.chain(of_families).collect();
    let (mut text, mut made): (String, BTreeMap<&[Named], &str>) = Default::default();
    for (name, parameters) in all {
        let own = structure(name);
        text += &format!("\n    /// Arguments of [`{}`].\n", name.to_uppercase());
        if let Some(first) = made.get(parameters) {
            text += &format!("    pub type {own}<'a> = {}<'a>;\n", structure(first));
            continue;
        }
        if parameters.iter().all(|(_, kind)| *kind != "Pointer") {
            return Err(format!("{name} has no pointer among its parameters, and so no result"));
        }
        made.insert(parameters, name);
        text += &format!("    #[derive(Clone, Copy, Debug)]\n    pub struct {own}<'a> {{\n");
        for (field, kind) in parameters {
            let kind = match *kind {
                "Pointer" => "Pointer<'a>",
                "Float" => "f32",
                "Double" => "f64",
                count => count,
            };
            text += &format!("        pub {field}: {kind},\n");
        }
        text += &format!("    }}\n\n    impl Arguments for {own}<'_> {{\n");
        text += "        fn bits(&self, device: u64) -> Vec<(&'static str, Result<u64, String>)> {\n            vec![\n";
        for (field, _) in parameters {
            text += &format!("                ({field:?}, self.{field}.bits(device)),\n");
        }
        text += "            ]\n        }\n    }\n";
    }
    Ok(text)
}

/// The name of the struct of a kernel's arguments, or a family's.
fn structure(name: &str) -> String {
    let part = |part: &str| match part.split_at_checked(1) {
        Some((first, rest)) => first.to_uppercase() + rest,
        None => String::new(),
    };
    name.split('_').map(part).collect::<String>() + "Args"
}
