//! What an earlier server left on disk (`journal.rs`), brought back as it was: scans are read again
//! from the bytes that they came as, answers and histories are those that were kept. The network is
//! not asked.

use super::clicked::Clicked;
use super::dls;
use super::journal::{Found, IMAGE, Owner, Source, Stored};
use super::lease::{Lease, State, scan_of};
use super::opened::Opened;
use super::store::Study;
use super::wire::unpack;
use super::{Shared, failure::Failure};
use crate::memory;
use crate::model::Model;
use crate::session::kept::Reader;
use crate::volume::Volume;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue};
use std::sync::Arc;

/// What journals say of the server that began them: its model, by name and architecture.
pub fn about(model: &Model, name: &str) -> String {
    let config = serde_json::to_string(model.config()).unwrap_or_default();
    let hash = blake3::hash(config.as_bytes()).to_hex();
    format!("the model {name} (architecture {})", &hash[..12])
}

/// Brings back all that is there. What cannot be read stays where it is; that, and what else was
/// odd, is returned for a person to read.
///
/// # Errors
/// The folder itself cannot be read.
pub fn restore(shared: &Shared) -> Result<Vec<String>, String> {
    let mut warnings = vec![];
    let Some(folder) = shared.store.folder() else { return Ok(warnings) };
    for mut found in folder.found(&mut warnings)? {
        let name = found.path().display().to_string();
        // A scan may need more memory than there is now.
        let read = memory::caught(|| read(shared, &mut found));
        let back = match read.unwrap_or_else(|e| Err(format!("{name}: {e}"))) {
            Ok(Some(back)) => back,
            Ok(None) => {
                found.remove();
                continue;
            }
            Err(e) => {
                warnings.push(format!("{e}; what is there is left as it is, and not served"));
                found.leave();
                continue;
            }
        };
        if let Err(e) = put(shared, found, back, &mut warnings) {
            warnings.push(format!("{e}; what is there is left as it is, and not served"));
        }
    }
    Ok(warnings)
}

/// What a journal tells, done again, and the scan that it told of last.
enum Back {
    Lease(Box<State>, Option<Stored>),
    Label(Box<Clicked>, Stored),
    Scan(Box<Study>, Stored),
}

/// Reads a journal to its end; none where nobody can know of it.
fn read(shared: &Shared, found: &mut Found) -> Result<Option<Back>, String> {
    if matches!(found.owner, Owner::Lease | Owner::Snap) {
        let (mut state, mut scan) = (State::default(), None);
        follow(found, |found, kind, from| {
            if kind != IMAGE {
                return Ok(state.follow(kind, from));
            }
            let stored = Stored::take(from)?;
            state.begin(opened(shared, found, &stored)?, Some(stored.clone()));
            scan = Some(stored);
            Ok(Ok(()))
        })?;
        state.followed();
        return Ok(Some(Back::Lease(Box::new(state), scan)));
    }
    // Its scan comes first: without one, whoever sent it was not answered.
    let Some(first) = found.read()? else { return Ok(None) };
    let mut from = Reader::new(&first);
    if from.byte()? != IMAGE {
        return Err(format!("{}: does not begin with a scan", found.path().display()));
    }
    let stored = Stored::take(&mut from)?;
    let opened = opened(shared, found, &stored)?;
    if found.owner == Owner::Label {
        let mut clicked = Clicked::new(opened);
        follow(found, |_, kind, from| Ok(clicked.follow(kind, from)))?;
        clicked.followed();
        return Ok(Some(Back::Label(Box::new(clicked), stored)));
    }
    let study = Study::new(opened);
    follow(found, |_, kind, from| Ok(study.follow(kind, from)))?;
    study.followed();
    Ok(Some(Back::Scan(Box::new(study), stored)))
}

/// Goes through the rest of a journal. A record that cannot be followed ends it; an error of
/// another kind, which `each` returns outside, leaves all of it as it is.
fn follow(
    found: &mut Found,
    mut each: impl FnMut(&Found, u8, &mut Reader) -> Result<Result<(), String>, String>,
) -> Result<(), String> {
    while let Some(record) = found.read()? {
        let mut from = Reader::new(&record);
        let kind = from.byte()?;
        if each(&*found, kind, &mut from)?.is_err() {
            found.unread();
        }
    }
    Ok(())
}

/// A scan as it was sent.
fn opened(shared: &Shared, found: &Found, stored: &Stored) -> Result<Opened, String> {
    let bytes = found.scan(stored)?;
    let opened = image(&stored.source, bytes, shared.most_scan)
        .and_then(|image| Opened::new(&shared.model, image, shared.settings.options()));
    opened.map_err(|e| format!("{}: {}", found.path().display(), e.message()))
}

fn image(source: &Source, bytes: Vec<u8>, most: usize) -> Result<Volume, Failure> {
    match source {
        Source::Plain => Ok(Volume::of_file(bytes, None)?),
        Source::File(modality) => {
            let mut image = Volume::of_file(bytes, None)?;
            image.description.modality = *modality;
            Ok(image)
        }
        Source::Array(spacing) => scan_of(unpack(&bytes, most)?, *spacing),
        Source::Form(kind) => {
            let mut headers = HeaderMap::new();
            let kind = HeaderValue::from_str(kind).map_err(|e| Failure::bad(e.to_string()))?;
            headers.insert(CONTENT_TYPE, kind);
            dls::image(&headers, &bytes, most)
        }
    }
}

/// Puts what was brought back among what the server holds, and goes on with its journal.
fn put(
    shared: &Shared,
    found: Found,
    back: Back,
    warnings: &mut Vec<String>,
) -> Result<(), String> {
    let (owner, key) = (found.owner, found.key);
    let go_on = |scan: Option<&Stored>| found.go_on(scan, warnings).map(Arc::new);
    match back {
        Back::Lease(state, scan) => {
            let journal = go_on(scan.as_ref())?;
            shared.store.put_lease(owner, key, Lease::back(*state, journal));
        }
        Back::Label(mut clicked, scan) => {
            clicked.journal = Some(go_on(Some(&scan))?);
            clicked.stored = Some(scan);
            shared.store.put_label(key, *clicked);
        }
        Back::Scan(mut study, scan) => {
            study.journal = Some(go_on(Some(&scan))?);
            study.stored = Some(scan);
            shared.store.put_scan(key, *study);
        }
    }
    Ok(())
}
