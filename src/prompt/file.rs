//! Prompts in a JSON file: a list of iterations on one object, or several objects by their names.

use super::{PromptError, RawBox, RawOutline, RawPoint};
use crate::input::read_text;
use crate::volume::labels::TargetLabel;
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::collections::BTreeSet;
use std::fmt;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

/// One iteration of a prompts file: the prompts of one interaction, as [`read_prompts`] reads them.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Iteration {
    /// Clicks.
    pub points: Vec<PointEntry>,
    /// The box `[i0, j0, k0, i1, j1, k1]`, ends exclusive, or two corners in mm; in the file `box`.
    /// Kept by later iterations until replaced.
    #[serde(rename = "box")]
    pub bounds: Option<[f64; 6]>,
    /// Lines across the object, from border to border: two ends each.
    pub line: Vec<[f64; 6]>,
    /// The corners of a closed outline around the object on one slice.
    pub lasso: Vec<[f64; 3]>,
    /// The file of a label image of scribbles: 1 on the object, 2 off it.
    pub scribble: Option<PathBuf>,
    /// The file of a mask to start this iteration from instead of the previous answer.
    pub mask: Option<PathBuf>,
    /// Which of the mask's labels is the object.
    pub mask_label: TargetLabel,
    /// The file of a mask of other objects, which the answer never enters.
    pub others: Option<PathBuf>,
}

/// A point: `{"position": [i, j, k], "positive": true}`; `positive` defaults to true.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointEntry {
    /// Three coordinates.
    pub position: [f64; 3],
    /// Whether it is on the object.
    #[serde(default = "yes")]
    pub positive: bool,
}

fn yes() -> bool {
    true
}

impl Iteration {
    /// The points as given on a command line.
    pub fn raw_points(&self) -> impl Iterator<Item = RawPoint> {
        self.points.iter().map(|p| RawPoint { position: p.position, positive: p.positive })
    }

    /// Lines as given on a command line.
    pub fn raw_lines(&self) -> impl Iterator<Item = RawBox> {
        self.line.iter().copied().map(RawBox)
    }

    /// The outline as given on a command line, if there is one.
    pub fn raw_outlines(&self) -> impl Iterator<Item = RawOutline> {
        (!self.lasso.is_empty()).then(|| RawOutline(self.lasso.clone())).into_iter()
    }

    /// The box as given on a command line.
    pub fn raw_box(&self) -> Option<RawBox> {
        self.bounds.map(RawBox)
    }
}

/// An object of a prompts file, and its prompts.
#[derive(Clone, Debug)]
pub struct PromptedObject {
    /// The object's name; none if the file is a list of iterations on one object.
    pub name: Option<String>,
    /// The red, green and blue in which it is shown.
    pub colour: Option<[u8; 3]>,
    /// At least one.
    pub iterations: Vec<Iteration>,
}

/// A file that names its objects.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    #[serde(deserialize_with = "objects")]
    objects: Vec<Entry>,
}

/// A file that is a list.
#[derive(Deserialize)]
#[serde(transparent)]
struct Listed {
    #[serde(deserialize_with = "iterations")]
    all: Vec<Iteration>,
}

/// `{"name": "tumour", "colour": [255, 0, 0], "iterations": [...]}`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    #[serde(default, alias = "color")]
    colour: Option<[u8; 3]>,
    #[serde(deserialize_with = "iterations")]
    iterations: Vec<Iteration>,
}

/// The most iterations that a file may hold, for all its objects: one takes a hundred times the
/// memory of the three letters that it may be written in.
const MOST_ITERATIONS: usize = 100_000;

fn iterations<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Iteration>, D::Error> {
    from.deserialize_seq(Limited { iterations: |_: &Iteration| 1, of: PhantomData })
}

fn objects<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Entry>, D::Error> {
    from.deserialize_seq(Limited { iterations: |e: &Entry| e.iterations.len(), of: PhantomData })
}

/// Reads a list up to the point where it holds too many iterations.
struct Limited<T, F> {
    /// The number of iterations in one entry of the list.
    iterations: F,
    of: PhantomData<T>,
}

impl<'de, T: Deserialize<'de>, F: Fn(&T) -> usize> Visitor<'de> for Limited<T, F> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a sequence")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let (mut all, mut count) = (vec![], 0);
        while let Some(one) = list.next_element()? {
            count += (self.iterations)(&one);
            if count > MOST_ITERATIONS {
                return Err(A::Error::custom(format!(
                    "more than {MOST_ITERATIONS} iterations, the limit of a file"
                )));
            }
            all.push(one);
        }
        Ok(all)
    }
}

/// A description of a prompts file, for messages.
const EXPECTED: &str = "a JSON list of iterations, or {\"objects\": [...]}";

/// The most objects that a file may name: as many as 16 bits of a label image can distinguish.
const MOST_OBJECTS: usize = u16::MAX as usize;

/// Reads a JSON file of prompts: a list of iterations on one object, or several objects by name.
///
/// ```json
/// [{"points": [{"position": [212, 148, 63]}], "box": [190, 120, 50, 240, 180, 75]},
///  {"points": [{"position": [231, 160, 60], "positive": false}]}]
/// ```
///
/// Several objects are `{"objects": [{"name": "tumour", "colour": [255, 0, 0], "iterations":
/// [...]}, ...]}`, where `colour` may be absent. The keys of an iteration are the fields of
/// [`Iteration`]; the file does not say in which [`Space`](super::Space) coordinates are. Paths are
/// relative to the file's folder, and are returned joined to it.
///
/// Returns one object without a name, or the objects in the file's order, each with at least one
/// iteration.
///
/// # Errors
/// The file cannot be read or has another form, or two objects have the same name.
pub fn read_prompts(path: &Path) -> Result<Vec<PromptedObject>, PromptError> {
    let fail = |m: String| PromptError::Unfit(format!("{}: {m}", path.display()));
    let text = read_text(path, EXPECTED).map_err(fail)?;
    let mut objects = objects_of(&text).map_err(fail)?;
    let iterations = objects.iter_mut().flat_map(|o| &mut o.iterations);
    for file in iterations.flat_map(|i| [&mut i.scribble, &mut i.mask, &mut i.others]).flatten() {
        if let Some(folder) = path.parent() {
            *file = folder.join(&*file);
        }
    }
    Ok(objects)
}

fn objects_of(text: &str) -> Result<Vec<PromptedObject>, String> {
    let list = match text.trim_start().starts_with('{') {
        true => {
            let named: Named = serde_json::from_str(text)
                .map_err(|e| format!("not a list of objects with names and iterations: {e}"))?;
            named.objects.into_iter().map(Entry::object).collect::<Result<Vec<_>, _>>()?
        }
        false => {
            let Listed { all } =
                serde_json::from_str(text).map_err(|e| format!("not a list of iterations: {e}"))?;
            vec![PromptedObject { name: None, colour: None, iterations: all }]
        }
    };
    if list.is_empty() || list.len() > MOST_OBJECTS {
        return Err(format!("it holds {} objects, expected 1 to {MOST_OBJECTS}", list.len()));
    }
    let mut names = BTreeSet::new();
    for object in &list {
        let of = object.name.as_ref().map_or(String::new(), |name| format!(" of '{name}'"));
        if object.iterations.is_empty() {
            return Err(format!("it holds no iteration{of}"));
        }
        if let Some(name) = &object.name
            && !names.insert(name)
        {
            return Err(format!("two objects are called '{name}': each needs a name of its own"));
        }
    }
    Ok(list)
}

impl Entry {
    /// The object, if its name is one that a segmentation's header can hold.
    fn object(self) -> Result<PromptedObject, String> {
        let name = self.name.trim();
        if name.is_empty() || name.chars().any(|c| c.is_control() || c == '\\') {
            return Err(format!(
                "an object is called {name:?}: expected a name without control characters and \
                 backslashes"
            ));
        }
        let name = Some(name.to_string());
        Ok(PromptedObject { name, colour: self.colour, iterations: self.iterations })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_one_object_and_objects_have_names_of_their_own() {
        let one = objects_of(r#" [{"points": [{"position": [1, 2, 3]}]}, {}]"#).unwrap();
        assert_eq!((one.len(), one[0].name.as_deref(), one[0].iterations.len()), (1, None, 2));
        let two = objects_of(
            r#"{"objects": [{"name": " tumour ", "colour": [255, 0, 9], "iterations": [{}]},
                            {"name": "node: left", "color": [0, 1, 2], "iterations": [{}, {}]}]}"#,
        )
        .unwrap();
        let named: Vec<_> =
            two.iter().map(|o| (o.name.as_deref().unwrap_or(""), o.colour)).collect();
        assert_eq!(named, [("tumour", Some([255, 0, 9])), ("node: left", Some([0, 1, 2]))]);
        for (text, words) in [
            ("[]", "no iteration"),
            (r#"{"objects": []}"#, "0 objects"),
            (r#"{"objects": [{"name": "a", "iterations": []}]}"#, "no iteration of 'a'"),
            (r#"{"objects": [{"iterations": [{}]}]}"#, "missing field `name`"),
            (r#"{"objects": [{"name": " ", "iterations": [{}]}]}"#, "called \"\""),
            (r#"{"objects": [{"name": "a\nb", "iterations": [{}]}]}"#, "control characters"),
            (r#"{"objects": [{"name": "a", "colour": [256, 0, 0], "iterations": [{}]}]}"#, "256"),
            (
                r#"{"objects": [{"name": "a", "iterations": [{}]},
                                {"name": "a ", "iterations": [{}]}]}"#,
                "two objects are called 'a'",
            ),
            (r#"{"points": []}"#, "unknown field `points`"),
        ] {
            let error = objects_of(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn iterations_are_counted_while_they_are_read() {
        let list = |n: usize| format!("[{}]", vec!["{}"; n].join(","));
        assert_eq!(
            objects_of(&list(MOST_ITERATIONS)).unwrap()[0].iterations.len(),
            MOST_ITERATIONS
        );
        let object =
            |name: &str, n: usize| format!("{{\"name\": \"{name}\", \"iterations\": {}}}", list(n));
        let objects = |a: usize, b: usize| {
            format!("{{\"objects\": [{}, {}]}}", object("a", a), object("b", b))
        };
        assert_eq!(objects_of(&objects(MOST_ITERATIONS / 2, 1)).unwrap().len(), 2);
        for text in
            [list(MOST_ITERATIONS + 1), objects(MOST_ITERATIONS / 2 + 1, MOST_ITERATIONS / 2)]
        {
            let error = objects_of(&text).unwrap_err();
            assert!(error.contains("more than 100000 iterations"), "{error}");
        }
    }
}
