//! Floors import only from lower ones, files do not import each other in a circle, and the inner
//! files of an op are its own.

use crate::files::sources;
use crate::imports::{House, Import};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

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

/// The row of [`FLOORS`] that contains a folder or file.
fn floor(name: &str) -> Option<usize> {
    FLOORS.iter().position(|row| row.contains(&name))
}

impl<'t> House<'t> {
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
            .map(|(name, _)| format!("src/{name}: has no floor in tests/house/floors.rs"))
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

fn lines<S: AsRef<str>>(found: impl IntoIterator<Item = S>) -> String {
    found.into_iter().map(|line| format!("{}\n", line.as_ref())).collect()
}

#[test]
fn floors_import_only_what_lies_below() {
    let files = sources();
    let found = lines(House::new(&files).upward());
    assert!(
        found.is_empty(),
        "a floor imports only lower ones (FLOORS in tests/house/floors.rs):\n{found}"
    );
}

#[test]
fn files_do_not_import_each_other_in_a_circle() {
    let files = sources();
    let found = lines(House::new(&files).circles(&CIRCLES).values());
    assert!(found.is_empty(), "what two files need stands in a third:\n{found}");
}

#[test]
fn the_inner_files_of_an_op_are_its_own() {
    let files = sources();
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
    let files = sources();
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
    let files = sources();
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
        "src/attic.rs: has no floor in tests/house/floors.rs\n"
    );
}
