//! Work on an object's session, and what changed by it.

use super::said::Said;
use super::{Answer, json_of, sent_to};
use crate::memory;
use crate::prompt::{Dense, Prompts, RawPoint, Space};
use crate::serve::answer::{self, Shown, change};
use crate::serve::body;
use crate::serve::failure::{Failure, in_turns, reply};
use crate::serve::journal::{attempted, kept};
use crate::serve::store::{Object, REDONE, RESET, SAID, Study, UNDONE, count};
use crate::serve::turns::Turn;
use crate::serve::work::{Key, Kind};
use crate::serve::{Shared, let_go, tidy};
use crate::session::Session;
use crate::session::diameters::Diameters;
use crate::session::kept::{Saved, Writer};
use crate::volume::labels::{Labels, TargetLabel};
use axum::extract::{Path, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

/// What is answered of an object, and how many voxels it has by that.
struct Told {
    response: Response,
    voxels: usize,
}

/// What work on an object's session is done with.
struct At<'a> {
    scan: Key,
    study: &'a Study,
    object: &'a Object,
    turn: &'a Turn,
    /// When it was asked for.
    start: Instant,
}

/// Has an object's work done when its turn comes, and tells what changed.
async fn work_on<F>(shared: Arc<Shared>, name: &str, kind: Kind, work: F) -> Answer
where
    F: FnOnce(&mut Session, &At<'_>) -> Result<Told, Failure> + Send + 'static,
{
    let (scan, study, object) = shared.store.object(name)?;
    // What is held is not let go before it is known to have been worked on.
    let (start, held) = (Instant::now(), study.clone());
    let run = move |turn: &Turn| -> Answer {
        let mut session = object.session();
        let at = At { scan, study: &study, object: &object, turn, start };
        let Told { response, voxels } = work(&mut session, &at)?;
        count(&object, voxels);
        Ok(response)
    };
    let done = shared.work.run(scan, kind, run).await;
    shared.store.worked(scan);
    tidy(&shared, scan, held);
    let response = done?;
    if kind == Kind::Prediction {
        shared.metrics.click(start.elapsed());
    }
    Ok(response)
}

/// The answer as it stands, and what of it changed. Memory for it may be refused: who changes a
/// session tells of it before that is kept.
fn told(session: &Session, at: &At, before: &Shown, notes: Vec<String>) -> Result<Told, Failure> {
    let grid = &at.study.opened.image.grid;
    let after = session.prediction().cloned();
    let changed = change(grid, before, &after);
    let voxels = after.as_ref().map_or(0, |p| p.field.voxels());
    let step = grid.spacing();
    let bounds = after.as_ref().and_then(|p| p.field.bounds());
    let extent: Option<[f64; 3]> =
        bounds.map(|b| std::array::from_fn(|a| (b[a + 3] - b[a]) as f64 * step[a]));
    let diameters = after.as_ref().and_then(|p| Diameters::of(&p.field, step));
    let (back, forth) = session.depth();
    let about = json!({
        "step": back,
        "undo": back > 0,
        "redo": forth > 0,
        "voxels": voxels,
        "ml": voxels as f64 * grid.voxel_ml(),
        "extent_mm": extent,
        "diameters_mm": diameters.map(|d| [d.long, d.short]),
        "diameters_slice": diameters.map(|d| d.slice),
        "score": after.as_ref().and_then(|p| p.score),
        "changed": changed.as_ref().map_or(0, |c| c.voxels),
        "region": changed.as_ref().map(|c| c.ranges()),
        "notes": notes,
        "seconds": at.start.elapsed().as_secs_f64(),
    });
    let response = packed(&about, changed.map_or_else(Vec::new, |c| c.bits(&after)))?;
    Ok(Told { response, voxels })
}

/// Voxels of a region, with what is to be said of them.
fn packed(about: &Value, bits: Vec<u8>) -> Answer {
    let mut response = Response::new(body::kept(bits)?);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    if let Ok(about) = HeaderValue::from_str(&ascii(&about.to_string())) {
        headers.insert("x-prism-answer", about);
    }
    Ok(response)
}

/// JSON as a header has it: what is not ASCII as its numbers.
fn ascii(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            ' '..='~' => out.push(c),
            c => {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
    out
}

/// An interaction with a session.
fn interact(
    session: &mut Session,
    at: &At,
    prompts: &Prompts,
    mut notes: Vec<String>,
) -> Result<Told, Failure> {
    let before = session.prediction().cloned();
    let head = |out: &mut Writer| out.number(at.object.number);
    kept(at.study.journal.as_ref(), session, SAID, head, |session| {
        let more: Vec<String> = in_turns(at.turn, |o| {
            session
                .interact_observed(prompts, o)
                .map(|p| p.notes.iter().map(|n| n.to_string()).collect())
        })?;
        notes.extend(more);
        told(session, at, &before, notes)
    })
}

/// A move in a session's history, which is an error where there is none to make.
fn moved(
    session: &mut Session,
    at: &At,
    kind: u8,
    go: impl FnOnce(&mut Session) -> Result<(), Failure>,
) -> Result<Told, Failure> {
    let before = session.prediction().cloned();
    let work = |session: &mut Session| {
        go(session)?;
        told(session, at, &before, vec![])
    };
    let tell = |_: &Session, _: &Saved, out: &mut Writer| out.number(at.object.number);
    attempted(at.study.journal.as_ref(), session, kind, work, tell)
}

pub(super) async fn prompts(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    request: Request,
) -> Answer {
    let sent = sent_to(&shared, &name, request, body::JSON).await?;
    work_on(shared, &name, Kind::Prediction, move |session, at| {
        // Much may be said: that is read here, and not where others wait to be heard.
        let said: Said = json_of(&sent.bytes)?;
        drop(sent);
        let prompts = said.prompts(&at.study.opened.image.grid)?;
        drop(said);
        interact(session, at, &prompts, vec![])
    })
    .await
}

/// Where something will be said, most likely.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Expected {
    point: Option<[f64; 3]>,
}

/// Queues the patches that a first click at a point is looked at with, to be encoded while no
/// request waits for the network. The object does not change.
pub(super) async fn prepare(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    request: Request,
) -> Answer {
    let sent = sent_to(&shared, &name, request, body::SHORT).await?;
    let Expected { point } = json_of(&sent.bytes)?;
    let position = point.ok_or_else(|| Failure::unfit("no prompt: expected a point"))?;
    let (scan, study, object) = shared.store.object(&name)?;
    let mut prompts = Prompts::default();
    let point = RawPoint { position, positive: true };
    prompts.add_point(&study.opened.image.grid, point, Space::Ijk)?;
    // While something is done with the object, it is unknown whether a click will be a first one.
    let session = object.idle_session();
    let places = session.map_or_else(|| Ok(vec![]), |mut session| session.ahead_of(&prompts))?;
    let count = places.len();
    shared.work.ahead(scan, places);
    Ok(reply(StatusCode::ACCEPTED, &json!({ "places": count })))
}

pub(super) async fn give_mask(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    request: Request,
) -> Answer {
    let sent = sent_to(&shared, &name, request, shared.most_scan).await?;
    let there = shared.clone();
    work_on(shared, &name, Kind::Other, move |session, at| {
        let mut labels = Labels::of_file(sent.bytes, &at.study.opened.image)?;
        let notes = std::mem::take(&mut labels.warnings);
        let mask = labels.mask(&TargetLabel::Any)?;
        drop(labels);
        let prompts = Prompts { dense: Some(Dense::Mask(mask)), ..Prompts::default() };
        let done = interact(session, at, &prompts, notes)?;
        there.work.ahead(at.scan, session.ahead());
        Ok(done)
    })
    .await
}

/// Goes a step in a session's history.
async fn step(
    shared: Arc<Shared>,
    name: &str,
    what: &'static str,
    record: u8,
    go: fn(&mut Session) -> bool,
) -> Answer {
    work_on(shared, name, Kind::Short, move |session, at| {
        moved(session, at, record, |session| match go(session) {
            true => Ok(()),
            false => Err(Failure::new(StatusCode::CONFLICT, format!("there is nothing to {what}"))),
        })
    })
    .await
}

pub(super) async fn undo(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
    step(shared, &name, "undo", UNDONE, Session::undo).await
}

pub(super) async fn redo(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
    step(shared, &name, "redo", REDONE, Session::redo).await
}

pub(super) async fn reset(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
    work_on(shared, &name, Kind::Short, |session, at| {
        let told = moved(session, at, RESET, |session| {
            session.reset();
            Ok(())
        })?;
        if let Some(journal) = &at.study.journal {
            journal.shrank();
        }
        Ok(told)
    })
    .await
}

pub(super) async fn answer(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
    work_on(shared, &name, Kind::Short, |session, at| told(session, at, &None, vec![])).await
}

/// The voxels that the network is unsure of.
pub(super) async fn unsure(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
    let (scan, study, object) = shared.store.object(&name)?;
    let find = move |_: &Turn| {
        let session = object.session();
        let shown = session.prediction().cloned();
        let mut said: HashMap<[usize; 3], ()> =
            memory::map("voxels that were spoken of", session.said().len());
        said.extend(session.said().iter().map(|s| (s.voxel, ())));
        drop(session);
        Ok::<_, Failure>(answer::unsure(&shown, &said))
    };
    let found = shared.work.run(scan, Kind::Other, find).await;
    shared.store.worked(scan);
    let_go(study);
    let (change, bits) = found?.unzip();
    let about = json!({
        "voxels": change.as_ref().map_or(0, |c| c.voxels),
        "region": change.as_ref().map(|c| c.ranges()),
    });
    packed(&about, bits.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_ascii() {
        let text = ascii("{\"a\":\"ä😀\"}");
        assert_eq!(text, "{\"a\":\"\\u00e4\\ud83d\\ude00\"}");
        let back: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(back["a"], "ä😀");
    }
}
