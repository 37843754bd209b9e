//! Scans: sent, told of, let go.

use super::objects::described_object;
use super::{Answer, released};
use crate::message::quoted;
use crate::serve::arrived::{self, Arrived, DICOM, SCANS};
use crate::serve::body::{self, Sent};
use crate::serve::failure::{Failure, reply};
use crate::serve::journal::{NewScan, Owner, Source};
use crate::serve::opened::Opened;
use crate::serve::query::field;
use crate::serve::store::{Id, Place, Study, key_of, new_id, text};
use crate::serve::turns::Turn;
use crate::serve::work::Kind;
use crate::serve::{Shared, aside, freed};
use crate::volume::Modality;
use axum::body::Body;
use axum::extract::{Path, RawQuery, Request, State};
use axum::http::{HeaderMap, StatusCode};
use serde_json::{Value, json};
use std::sync::Arc;

/// Takes a scan. Its content says what it is; of its name the ending is held against that.
pub(super) async fn add_scan(
    State(shared): State<Arc<Shared>>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Answer {
    let modality = field(&query, "modality").map(|name| modality_of(&name)).transpose()?;
    if let Some(name) = field(&query, "name").map(|name| name.to_lowercase())
        && !SCANS.iter().chain(&DICOM).any(|ending| name.ends_with(ending))
    {
        return Err(Failure::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!("the scan's name must end in one of {SCANS:?}, or one of {DICOM:?} for DICOM"),
        ));
    }
    let series = field(&query, "series").filter(|series| !series.is_empty());
    let (parts, body) = request.into_parts();
    let (place, sent) = scan_sent(&shared, &parts.headers, body).await?;
    let id = new_id()?;
    let there = shared.clone();
    let read = move |_: &Turn| -> Result<Result<Study, Value>, Failure> {
        let source = match arrived::is_dicom(&sent.bytes) {
            true => Source::Dicom(modality, series.clone()),
            false => Source::File(modality),
        };
        let mut on_disk: Option<NewScan> = None;
        let keep = |bytes: &[u8]| -> Result<(), Failure> {
            if let Some(journal) = there.store.journal(Owner::Scan, key_of(id))? {
                on_disk = Some(journal.scan(bytes, source)?);
            }
            Ok(())
        };
        let most = there.most_scan;
        let came = arrived::read(sent.bytes, modality, series.as_deref(), most, keep)?;
        let image = match came {
            Arrived::Scan(image) => *image,
            Arrived::Several(list) => return Ok(Err(list)),
        };
        let mut opened = Opened::new(there.engine(), image)?;
        there.work.ahead(key_of(id), opened.ahead());
        let mut study = Study::new(opened);
        (study.journal, study.stored) = on_disk.map(NewScan::tell).transpose()?.unzip();
        Ok(Ok(study))
    };
    let study = match shared.work.run(key_of(id), Kind::Other, read).await? {
        Ok(study) => study,
        Err(list) => {
            let error = "holds several series of images: select one with ?series=";
            return Ok(reply(StatusCode::CONFLICT, &json!({ "error": error, "series": list })));
        }
    };
    let study = shared.store.put_scan(key_of(id), study);
    drop(place);
    Ok(reply(StatusCode::CREATED, &described(id, &study)))
}

/// A place for a scan, and the scan's bytes as they come. Where there is none, all that is sent is
/// read before the answer says so.
pub async fn scan_sent<'a>(
    shared: &'a Shared,
    headers: &HeaderMap,
    body: Body,
) -> Result<(Place<'a>, Sent), Failure> {
    let (place, gone) = match shared.store.keep() {
        Ok(kept) => kept,
        Err(full) => {
            body::pass_by(headers, body, shared.most_scan).await;
            return Err(full);
        }
    };
    if let Some(gone) = gone {
        // Its memory is given back before that of the scan is requested.
        let _ = freed(gone).await;
    }
    Ok((place, body::read(headers, body, shared.most_scan).await?))
}

fn modality_of(name: &str) -> Result<Modality, Failure> {
    serde_json::from_value(Value::from(name.to_lowercase())).map_err(|_| {
        Failure::bad(format!("modality is '{}', expected ct, mr or pet", quoted(name)))
    })
}

/// A scan, without its objects.
fn described(id: Id, study: &Study) -> Value {
    let Opened { image, modality, notes, .. } = &study.opened;
    let rows = &image.grid.affine.0;
    let affine = [rows[0], rows[1], rows[2], [0.0, 0.0, 0.0, 1.0]];
    json!({
        "scan": text(id),
        "shape": image.grid.size,
        "spacing": image.grid.spacing(),
        "affine": affine,
        "modality": modality,
        "format": image.description.format,
        "notes": notes,
    })
}

pub(super) async fn scan(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
    let (id, _, study) = shared.store.scan(&name)?;
    let mut about = described(id, &study);
    about["objects"] = study.objects().iter().map(|o| described_object(id, o)).collect();
    Ok(reply(StatusCode::OK, &about))
}

pub(super) async fn release_scan(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
) -> Answer {
    aside(&shared, move |store| store.release_scan(&name)).await?;
    released()
}
