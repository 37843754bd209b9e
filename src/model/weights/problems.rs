//! How a set of tensors fails to fit a network.

use crate::message::shortened;
use crate::model::config::Config;
use std::collections::{BTreeMap, HashMap};

/// How a set of tensors differs from what a network needs.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Problems {
    /// The number of tensors of the network.
    pub needed: usize,
    /// The names of tensors that are needed and absent.
    pub missing: Vec<String>,
    /// The names of tensors that are present and unknown.
    pub unexpected: Vec<String>,
    /// Tensors that are present with another shape: name, the shape found, the shape needed.
    pub misshaped: Vec<(String, Vec<usize>, Vec<usize>)>,
    /// Tensors whose element type is not a float of at most 32 bits: name, type.
    pub mistyped: Vec<(String, String)>,
}

/// The most names of a kind of difference that are shown, and the most characters of each: they
/// come from files.
const TOLD: usize = 3;
const LONGEST: usize = 200;

/// Two lines, to follow one that says what was read: the number of tensors of each kind of
/// difference with the first few, since against another network's file hundreds differ. The kind
/// that comes first has the first line. [`Problems::all`] has every one.
impl std::fmt::Display for Problems {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "\n  {} tensors expected", self.needed)?;
        let kinds = self.kinds().into_iter().filter(|(_, each)| !each.is_empty());
        for (at, (what, each)) in kinds.enumerate() {
            let told: Vec<String> =
                each.iter().take(TOLD).map(|text| shortened(text, LONGEST)).collect();
            let more = match each.len() - told.len() {
                0 => String::new(),
                more => format!("; and {more} more"),
            };
            let between = if at == 1 { "\n  " } else { ". " };
            write!(f, "{between}{} {what}: {}{more}", each.len(), told.join("; "))?;
        }
        Ok(())
    }
}

impl Problems {
    /// Compares `present` (name to shape) with what `config` needs. Tensors that released
    /// checkpoints hold without using them count as neither.
    pub fn of(config: &Config, present: &BTreeMap<String, Vec<usize>>) -> Problems {
        let needed: HashMap<String, Vec<usize>> = config.tensors().into_iter().collect();
        let spare: HashMap<String, Vec<usize>> = config.unused().into_iter().collect();
        let mut problems = Problems { needed: needed.len(), ..Problems::default() };
        for (name, shape) in config.tensors() {
            match present.get(&name) {
                None => problems.missing.push(name),
                Some(got) if *got != shape => problems.misshaped.push((name, got.clone(), shape)),
                Some(_) => {}
            }
        }
        let unknown =
            present.keys().filter(|n| !needed.contains_key(*n) && !spare.contains_key(*n));
        problems.unexpected = unknown.cloned().collect();
        problems
    }

    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.kinds().iter().all(|(_, each)| each.is_empty())
    }

    /// Every difference, one per line, as text for people.
    pub fn all(&self) -> String {
        let lines = self.kinds().into_iter().flat_map(|(what, each)| {
            each.into_iter().map(move |text| format!("\n  {what}: {text}"))
        });
        lines.collect()
    }

    /// The differences as text, by kind.
    fn kinds(&self) -> [(&'static str, Vec<String>); 4] {
        let misshaped = self
            .misshaped
            .iter()
            .map(|(name, got, needed)| format!("{name} is {got:?}, expected {needed:?}"));
        let mistyped = self
            .mistyped
            .iter()
            .map(|(name, dtype)| format!("{name} is {dtype}, expected a float"));
        [
            ("missing", self.missing.clone()),
            ("unexpected", self.unexpected.clone()),
            ("mis-shaped", misshaped.collect()),
            ("mis-typed", mistyped.collect()),
        ]
    }
}
