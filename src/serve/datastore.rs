//! MONAI Label's data store: the DICOM series of the folder that a server is given (`--dicom`), by
//! their SeriesInstanceUID. OHIF's extension asks for the one that it shows, 3D Slicer for a next
//! one.
//!
//! A series is read when it is asked for, and held as sessions are, for all clients that ask for
//! it, as long as its files do not change. Nothing of it is kept on disk: its files are there, and
//! clients send all of their clicks each time.

use super::api::saved;
use super::arrived::unsettled;
use super::body;
use super::clicked::Clicked;
use super::failure::{Failure, said};
use super::opened::Opened;
use super::query::field;
use super::shelf::{Entry, Seen, Shelf, Taken};
use super::store::{new_id, series_key};
use super::turns::Turn;
use super::work::{Key, Kind};
use super::{Route, Shared, let_go};
use crate::message::quoted;
use crate::volume::scan_file;
use axum::extract::{Path, RawQuery, Request, State};
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::Response;
use axum::routing::{get, post};
use serde_json::{Map, Value, json};
use std::path::Path as FilePath;
use std::sync::Arc;

/// The only way in which a next series is chosen.
const STRATEGY: &str = "random";
/// The most series that are listed.
const MOST_LISTED: usize = 10_000;

/// The protocol's paths.
pub fn routes() -> Vec<Route> {
    vec![
        ("/datastore/", get(list)),
        ("/datastore/image", get(image).head(has_image)),
        ("/datastore/image/info", get(info)),
        ("/activelearning/{strategy}", post(next)),
    ]
}

type Answer = Result<Response, Failure>;

fn shelf_of(shared: &Shared) -> Result<&Shelf, Failure> {
    shared
        .shelf
        .as_ref()
        .ok_or_else(|| Failure::unknown("no data store: the server was started without --dicom"))
}

/// The error for a series that does not exist.
fn unknown() -> Failure {
    Failure::unknown(
        "no such image: expected the SeriesInstanceUID of a series in the server's folder, or a \
         session (PUT /session/)",
    )
}

/// The number of series; nothing if there is no folder.
pub fn status(shared: &Shared) -> Value {
    match &shared.shelf {
        Some(shelf) => json!({ "total": shelf.count(), "completed": 0, "label_tags": {} }),
        None => json!({}),
    }
}

/// How a next series is chosen; nothing if there is no folder.
pub fn strategies(shared: &Shared) -> Value {
    match &shared.shelf {
        Some(_) => json!({ (STRATEGY): { "description": "a random series of the folder" } }),
        None => json!({}),
    }
}

/// What clients are told of a series: nothing about the patient, and not where it is stored. They
/// name its file as they are told here.
fn about(entry: &Entry) -> Value {
    let name: String =
        entry.uid.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '.').collect();
    json!({
        "name": format!("{name}.nii.gz"),
        "SeriesInstanceUID": entry.uid,
        "StudyInstanceUID": entry.study,
        "SeriesNumber": entry.number,
        "SeriesDescription": entry.description,
        "Modality": entry.modality,
        "shape": entry.size,
        "spacing": entry.spacing,
    })
}

/// Has the folder examined again if it is time for that. A request that comes during a look gets
/// the result of the last one.
async fn look(shared: &Arc<Shared>) -> Result<(), Failure> {
    if !shelf_of(shared)?.is_due() {
        return Ok(());
    }
    let there = shared.clone();
    let look = move |_: &Turn| -> Result<bool, Failure> { shelf_of(&there)?.look() };
    shared.work.run(look_key(), Kind::Other, look).await.map(|_| ())
}

/// The key under which looks through the folder are run, one at a time. No series has this name.
fn look_key() -> Key {
    series_key("")
}

/// A series that is to be described, or about to be read.
async fn find(shared: &Arc<Shared>, uid: &str) -> Result<Seen, Failure> {
    let shelf = shelf_of(shared)?;
    if let Some(entry) = shelf.get(uid) {
        // A series that has not changed waits for no look.
        let (there, name) = (shared.clone(), uid.to_string());
        let settled = move |_: &Turn| -> Result<Option<Seen>, Failure> {
            Ok(shelf_of(&there)?.settled(&name))
        };
        if let Some(seen) = shared.work.run(series_key(uid), Kind::Short, settled).await? {
            return Ok(seen);
        }
        if !shelf.is_due() {
            return Ok(Seen { entry, is_settled: false });
        }
    } else if !shelf.is_due() {
        return Err(unknown());
    }
    let (there, name) = (shared.clone(), uid.to_string());
    let find = move |_: &Turn| -> Result<Option<Seen>, Failure> { shelf_of(&there)?.find(&name) };
    shared.work.run(look_key(), Kind::Other, find).await?.ok_or_else(unknown)
}

/// The held data of a series. It is dropped if its files have changed. If files beside them have
/// changed, it is used until another look has found out more.
async fn held(shared: &Arc<Shared>, key: Key, uid: &str) -> Result<Option<Arc<Clicked>>, Failure> {
    let Some(held) = shared.store.series(key) else { return Ok(None) };
    if held.series.as_ref().is_some_and(Taken::is_fresh) {
        return Ok(Some(held));
    }
    let (there, name, mine) = (shared.clone(), uid.to_string(), held.clone());
    let check = move |_: &Turn| -> Result<[bool; 2], Failure> {
        let shelf = shelf_of(&there)?;
        let holds = mine.series.as_ref().is_some_and(|taken| shelf.holds(taken));
        if !holds {
            there.store.drop_series(key, &mine);
        }
        Ok([holds, holds && shelf.settled(&name).is_none()])
    };
    let [holds, wants_look] = shared.work.run(key, Kind::Short, check).await?;
    if wants_look {
        // The request does not wait for that.
        let there = shared.clone();
        tokio::spawn(async move { look(&there).await });
    }
    Ok(holds.then_some(held))
}

/// The scan of a series, which is read if it is not held, and the key under which it is worked on.
pub async fn scan(shared: &Arc<Shared>, uid: &str) -> Result<(Key, Arc<Clicked>), Failure> {
    let key = series_key(uid);
    if let Some(held) = held(shared, key, uid).await? {
        return Ok((key, held));
    }
    let (seen, there) = (find(shared, uid).await?, shared.clone());
    // One of these runs at a time: a request that came meanwhile finds what the first has read.
    let read = move |_: &Turn| -> Result<Arc<Clicked>, Failure> {
        if let Some(held) = there.store.series(key) {
            return Ok(held);
        }
        if !seen.is_settled {
            return Err(unsettled());
        }
        let (place, gone) = there.store.keep()?;
        // Its memory is given back before that of the scan is requested.
        drop(gone);
        let taken = Taken::new(seen.entry.clone());
        let image = seen.entry.read(there.most_scan)?;
        let mut opened = Opened::new(there.engine(), image)?;
        there.work.ahead(key, opened.ahead());
        let mut clicked = Clicked::new(opened);
        clicked.series = Some(taken);
        let clicked = there.store.put_label(key, clicked);
        drop(place);
        Ok(clicked)
    };
    Ok((key, shared.work.run(key, Kind::Other, read).await?))
}

/// The series that a query names.
fn named(query: &Option<String>) -> Result<String, Failure> {
    let name = field(query, "image").filter(|name| !name.is_empty());
    name.ok_or_else(|| Failure::unfit("no image given: expected ?image=SeriesInstanceUID"))
}

async fn list(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Answer {
    look(&shared).await?;
    let shelf = shelf_of(&shared)?;
    match field(&query, "output").as_deref() {
        None | Some("" | "stats") => said(status(&shared)),
        // Pairs of images and labels, of which there are none.
        Some("train") => said(json!([])),
        Some("all") => {
            // The list may be long: it is made on a thread that no request waits for, and counted
            // until it is sent.
            let series = shelf.list(MOST_LISTED);
            let list = move |_: &Turn| -> Result<Vec<u8>, Failure> {
                Ok(listed(&series).to_string().into_bytes())
            };
            let text = shared.work.run(new_id()?, Kind::Other, list).await?;
            let mut response = Response::new(body::kept(text)?);
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(CONTENT_TYPE, json);
            Ok(response)
        }
        Some(other) => Err(Failure::unfit(format!(
            "output is '{}', expected one of [\"stats\", \"all\", \"train\"]",
            quoted(other)
        ))),
    }
}

/// The list of the store's series.
fn listed(series: &[Arc<Entry>]) -> Value {
    let object = |entry: &Arc<Entry>| {
        let image = json!({ "ext": ".nii.gz", "info": about(entry) });
        (entry.uid.clone(), json!({ "image": image, "labels": {} }))
    };
    let objects: Map<String, Value> = series.iter().map(object).collect();
    json!({
        "name": "prism",
        "description": "DICOM series of a folder",
        "images_dir": "",
        "labels_dir": "",
        "objects": objects,
    })
}

async fn info(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Answer {
    let seen = find(&shared, &named(&query)?).await?;
    said(about(&seen.entry))
}

/// Whether a series exists, and can be read according to its tags: its voxels are not read for
/// that.
async fn has_image(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Answer {
    let seen = find(&shared, &named(&query)?).await?;
    match (seen.entry.is_volume, seen.is_settled) {
        (true, _) => said(json!({})),
        (false, true) => Err(Failure::unfit("it cannot be read as one volume")),
        (false, false) => Err(unsettled()),
    }
}

/// A series as NIfTI.
async fn image(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Answer {
    let (key, clicked) = scan(&shared, &named(&query)?).await?;
    // It must not be dropped before it is known to have been used.
    let held = clicked.clone();
    let write = move |_: &Turn| -> Result<Vec<u8>, Failure> {
        Ok(scan_file(FilePath::new("image.nii.gz"), &clicked.opened.image)?)
    };
    let file = shared.work.run(key, Kind::Other, write).await;
    shared.store.worked(key);
    let_go(held);
    saved("image", "nii.gz", file?)
}

/// A next series. The other parameters are for other strategies.
async fn next(
    State(shared): State<Arc<Shared>>,
    Path(strategy): Path<String>,
    request: Request,
) -> Answer {
    let (parts, body) = request.into_parts();
    body::read(&parts.headers, body, body::SHORT).await?;
    let shelf = shelf_of(&shared)?;
    if strategy != STRATEGY {
        return Err(Failure::unknown(format!("no such strategy: expected {STRATEGY}")));
    }
    look(&shared).await?;
    let Some(entry) = shelf.one_of(new_id()?) else { return said(json!({})) };
    let mut about = about(&entry);
    about["id"] = entry.uid.as_str().into();
    said(about)
}
