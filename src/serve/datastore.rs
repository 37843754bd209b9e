//! MONAI Label's data store: the DICOM series of the folder that a server is given (`--dicom`), by
//! their SeriesInstanceUID. OHIF's extension asks for the one that it shows, 3D Slicer for a next
//! one.
//!
//! A series is read when somebody asks for it, and held as sessions are, for all who ask for it.
//! Nothing of it is kept on disk: it is there, and clients say all of their clicks each time.

use super::api::saved;
use super::body;
use super::clicked::Clicked;
use super::failure::{Failure, said};
use super::opened::Opened;
use super::query::field;
use super::shelf::{Entry, Shelf};
use super::store::{new_id, series_key};
use super::work::{Key, Kind};
use super::{Route, Shared};
use crate::volume::scan_file;
use axum::extract::{Path, RawQuery, Request, State};
use axum::response::Response;
use axum::routing::{get, post};
use serde_json::{Map, Value, json};
use std::path::Path as FilePath;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// The one way in which a next series is chosen.
const STRATEGY: &str = "random";
/// Series that are listed, at most.
const MOST_LISTED: usize = 10_000;

/// What the protocol has paths for.
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
        .ok_or_else(|| Failure::unknown("no data store: this server was started without --dicom"))
}

/// What is said of a series that is not there.
fn unknown() -> Failure {
    Failure::unknown(
        "no such image: neither a series of the server's folder, by its SeriesInstanceUID, nor a \
         session's (PUT /session/)",
    )
}

/// How many series there are; nothing where there is no folder.
pub fn status(shared: &Shared) -> Value {
    match &shared.shelf {
        Some(shelf) => json!({ "total": shelf.count(), "completed": 0, "label_tags": {} }),
        None => json!({}),
    }
}

/// How a next series is chosen; nothing where there is no folder.
pub fn strategies(shared: &Shared) -> Value {
    match &shared.shelf {
        Some(_) => json!({ (STRATEGY): { "description": "a series of the folder, by chance" } }),
        None => json!({}),
    }
}

/// What clients are told of a series: nothing of whose it is, and not where it lies. They call its
/// file as they are told here.
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

/// Has the folder looked through anew where it may be by now. Those who ask for that at a time wait
/// for one look.
async fn look(shared: &Arc<Shared>) -> Result<(), Failure> {
    if !shelf_of(shared)?.is_due() {
        return Ok(());
    }
    let there = shared.clone();
    let look = move |_: &AtomicBool| -> Result<(), Failure> { shelf_of(&there)?.look() };
    shared.work.run(look_key(), Kind::Other, look).await
}

/// What looks through the folder are done by, one at a time. No series is called so.
fn look_key() -> Key {
    series_key("")
}

/// A series that is about to be read.
async fn find(shared: &Arc<Shared>, uid: &str) -> Result<Arc<Entry>, Failure> {
    let shelf = shelf_of(shared)?;
    if shelf.get(uid).is_none() && !shelf.is_due() {
        return Err(unknown());
    }
    let (there, name) = (shared.clone(), uid.to_string());
    let find = move |_: &AtomicBool| -> Result<Option<Arc<Entry>>, Failure> {
        shelf_of(&there)?.find(&name)
    };
    shared.work.run(look_key(), Kind::Other, find).await?.ok_or_else(unknown)
}

/// A series of which something is to be told.
async fn entry(shared: &Arc<Shared>, uid: &str) -> Result<Arc<Entry>, Failure> {
    match shelf_of(shared)?.get(uid) {
        Some(entry) => Ok(entry),
        None => find(shared, uid).await,
    }
}

/// The scan of a series, which is read where it is not held, and what it is worked on by.
pub async fn scan(shared: &Arc<Shared>, uid: &str) -> Result<(Key, Arc<Clicked>), Failure> {
    let key = series_key(uid);
    if let Some(held) = shared.store.series(key) {
        return Ok((key, held));
    }
    let (entry, there) = (find(shared, uid).await?, shared.clone());
    // One of these runs at a time: whoever asked meanwhile finds what the first has read.
    let read = move |_: &AtomicBool| -> Result<Arc<Clicked>, Failure> {
        if let Some(held) = there.store.series(key) {
            return Ok(held);
        }
        let place = there.store.keep()?;
        let image = entry.read(there.most_scan)?;
        let opened = Opened::new(there.engine(), image)?;
        let clicked = there.store.put_label(key, Clicked::new(opened));
        drop(place);
        Ok(clicked)
    };
    Ok((key, shared.work.run(key, Kind::Other, read).await?))
}

/// The series that a query names.
fn named(query: &Option<String>) -> Result<String, Failure> {
    let name = field(query, "image").filter(|name| !name.is_empty());
    name.ok_or_else(|| Failure::unfit("no image is named: expected ?image=SeriesInstanceUID"))
}

async fn list(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Answer {
    look(&shared).await?;
    let shelf = shelf_of(&shared)?;
    match field(&query, "output").as_deref() {
        None | Some("" | "stats") => said(status(&shared)),
        // Pairs of images and labels, of which there are none.
        Some("train") => said(json!([])),
        Some("all") => {
            let object = |entry: &Arc<Entry>| {
                let image = json!({ "ext": ".nii.gz", "info": about(entry) });
                (entry.uid.clone(), json!({ "image": image, "labels": {} }))
            };
            let objects: Map<String, Value> = shelf.list(MOST_LISTED).iter().map(object).collect();
            said(json!({
                "name": "prism",
                "description": "DICOM series of a folder",
                "images_dir": "",
                "labels_dir": "",
                "objects": objects,
            }))
        }
        Some(other) => Err(Failure::unfit(format!(
            "output is '{other}', expected one of [\"stats\", \"all\", \"train\"]"
        ))),
    }
}

async fn info(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Answer {
    let entry = entry(&shared, &named(&query)?).await?;
    said(about(&entry))
}

/// Whether a series is there: its voxels are not read for that.
async fn has_image(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Answer {
    entry(&shared, &named(&query)?).await?;
    said(json!({}))
}

/// A series as NIfTI.
async fn image(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Answer {
    let (key, clicked) = scan(&shared, &named(&query)?).await?;
    // What is held is not let go before it is known to have been used.
    let held = clicked.clone();
    let write = move |_: &AtomicBool| -> Result<Vec<u8>, Failure> {
        Ok(scan_file(FilePath::new("image.nii.gz"), &clicked.opened.image)?)
    };
    let file = shared.work.run(key, Kind::Other, write).await;
    shared.store.worked(key);
    drop(held);
    saved("image", "nii.gz", file?)
}

/// A series to go on with. What else is said of that is for other strategies.
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
