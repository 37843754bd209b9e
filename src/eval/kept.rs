//! Results stored as they are computed: one line per case and protocol, on disk before the next is
//! begun, so that a stopped evaluation continues where it was.
//!
//! The first line holds everything that numbers depend on. Results of other settings are never
//! added to it.

use super::result::CaseResult;
use crate::data::cases::Case;
use crate::memory;
use crate::output::{spelled_out, write_text};
use crate::volume::Modality;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// The name of the file of results in the folder of an evaluation.
pub const FILE: &str = "cases.jsonl";

/// The settings of an evaluation, by name: everything that numbers depend on.
pub type Settings = BTreeMap<String, Value>;

/// The first line.
#[derive(Deserialize)]
struct Head {
    settings: Settings,
}

/// The files that a case was read from, and how they were read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Source {
    image: Stamp,
    label: Stamp,
    volume: Option<usize>,
    modality: Option<Modality>,
}

/// A file in a given state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Stamp {
    path: String,
    bytes: Option<u64>,
    /// Seconds and nanoseconds of its last change.
    changed: Option<(u64, u32)>,
}

impl Stamp {
    fn of(path: &Path) -> Stamp {
        let meta = std::fs::metadata(path).ok();
        let changed =
            meta.as_ref().and_then(|m| m.modified().ok()?.duration_since(UNIX_EPOCH).ok());
        Stamp {
            path: spelled_out(path).display().to_string(),
            bytes: meta.map(|m| m.len()),
            changed: changed.map(|t| (t.as_secs(), t.subsec_nanos())),
        }
    }
}

impl Source {
    /// The files of a case as they are now.
    pub fn of(case: &Case) -> Source {
        Source {
            image: Stamp::of(&case.image),
            label: Stamp::of(&case.label),
            volume: case.volume,
            modality: case.modality,
        }
    }
}

/// The result of a case under a protocol.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The case's name.
    pub case: String,
    /// The protocol's name.
    pub protocol: String,
    /// The files that the case was read from.
    pub source: Source,
    /// What kind of scan it was taken to be.
    pub scan: String,
    /// The folder that its masks were written to.
    pub masks: Option<String>,
    /// One result, or one for each side if both are judged separately.
    pub results: Vec<CaseResult>,
}

/// Why results cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// The file cannot be read or written, or is something else.
    #[error("{0}")]
    File(String),
    /// The file holds results of other settings.
    #[error("{path} holds results of other settings: {}", .differences.join(", "))]
    Settings {
        /// The file.
        path: String,
        /// The differences, as text.
        differences: Vec<String>,
    },
}

/// The results of an evaluation in a file, which is open to add more.
pub struct Kept {
    path: PathBuf,
    file: File,
    records: BTreeMap<(String, String), Record>,
    dropped: usize,
}

impl Kept {
    /// Opens the file of a folder to continue it, or begins it: with `anew`, whatever was there.
    ///
    /// # Errors
    /// It holds results of other settings, is something else, or cannot be read or written.
    pub fn open(folder: &Path, settings: &Settings, anew: bool) -> Result<Kept, KeptError> {
        let path = folder.join(FILE);
        let fail = |e: std::io::Error| KeptError::File(format!("{}: {e}", path.display()));
        let bytes = match memory::read_file("the results so far", &path) {
            Ok(bytes) if !anew => bytes,
            Err(e) if !anew && e.kind() != std::io::ErrorKind::NotFound => return Err(fail(e)),
            _ => vec![],
        };
        let (mut records, mut dropped) = (BTreeMap::new(), 0);
        if bytes.is_empty() {
            write_text(&path, &format!("{}\n", json!({ "settings": settings })))
                .map_err(KeptError::File)?;
        } else {
            // A line that a power cut left incomplete has no line end.
            let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
            let mut lines = bytes[..whole].split_inclusive(|b| *b == b'\n');
            let Some(head) =
                lines.next().and_then(|line| serde_json::from_slice::<Head>(line).ok())
            else {
                let what = "its first line has no settings of an evaluation: give another --output, or --fresh to start over";
                return Err(KeptError::File(format!("{}: {what}", path.display())));
            };
            let differences = differences(&head.settings, settings);
            if !differences.is_empty() {
                return Err(KeptError::Settings { path: path.display().to_string(), differences });
            }
            for line in lines {
                match serde_json::from_slice::<Record>(line) {
                    Ok(record) => {
                        drop(records.insert((record.case.clone(), record.protocol.clone()), record))
                    }
                    Err(_) => dropped += 1,
                }
            }
            if whole < bytes.len() {
                dropped += 1;
                let cut = |file: File| file.set_len(whole as u64).and_then(|()| file.sync_all());
                OpenOptions::new().write(true).open(&path).and_then(cut).map_err(fail)?;
            }
        }
        let file = OpenOptions::new().append(true).open(&path).map_err(fail)?;
        Ok(Kept { path, file, records, dropped })
    }

    /// The number of lines that were truncated or damaged. Their results count as not computed.
    pub fn dropped(&self) -> usize {
        self.dropped
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The result of a case under a protocol, if it is known.
    pub fn get(&self, case: &str, protocol: &str) -> Option<&Record> {
        self.records.get(&(case.to_string(), protocol.to_string()))
    }

    /// Adds a record, in place of an earlier one of the same case and protocol. It is on disk when
    /// this returns.
    ///
    /// # Errors
    /// The file cannot be written; the message names it.
    pub fn add(&mut self, record: Record) -> Result<(), String> {
        let fail = |e: std::io::Error| format!("{}: {e}", self.path.display());
        let line = serde_json::to_string(&record).map_err(|e| fail(e.into()))?;
        self.file
            .write_all(format!("{line}\n").as_bytes())
            .and_then(|()| self.file.sync_all())
            .map_err(fail)?;
        self.records.insert((record.case.clone(), record.protocol.clone()), record);
        Ok(())
    }

    /// Removes a case from the known results; its lines stay.
    pub fn forget(&mut self, case: &str) {
        self.records.retain(|(name, _), _| name != case);
    }
}

/// The settings that differ, as text.
fn differences(then: &Settings, now: &Settings) -> Vec<String> {
    let names: BTreeSet<&String> = then.keys().chain(now.keys()).collect();
    let both = names.into_iter().map(|name| (name, then.get(name), now.get(name)));
    both.filter(|(_, then, now)| then != now)
        .map(|(name, then, now)| difference(name, then, now))
        .collect()
}

/// The most names of cases that are listed.
const LISTED: usize = 5;

fn difference(name: &str, then: Option<&Value>, now: Option<&Value>) -> String {
    let text = |value: Option<&Value>| match value {
        None | Some(Value::Null) => "none".to_string(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    match (name, then, now) {
        // A hash means nothing to a reader.
        ("model", ..) => "model (its file has changed)".into(),
        ("program", ..) => "program (another build)".into(),
        ("cases", Some(Value::Array(then)), Some(Value::Array(now))) => {
            let only = |here: &[Value], there: &[Value], word: &str| {
                let names: Vec<&str> =
                    here.iter().filter(|v| !there.contains(v)).filter_map(Value::as_str).collect();
                let more = if names.len() > LISTED { ", ..." } else { "" };
                let list = names[..names.len().min(LISTED)].join(", ");
                if names.is_empty() { String::new() } else { format!("; {word} {list}{more}") }
            };
            format!(
                "cases ({} then, {} now{}{})",
                then.len(),
                now.len(),
                only(then, now, "without"),
                only(now, then, "with")
            )
        }
        _ => format!("{name} ({} then, {} now)", text(then), text(now)),
    }
}
