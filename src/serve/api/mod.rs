//! prism's own interface: scans, objects on them, prompts in, the changed part of a mask out, files
//! in every format that is written. `openapi.json` describes it.

mod files;
mod objects;
mod said;
mod scans;
mod work;

pub(super) use files::{MASKS, saved};
pub(super) use said::prompts_of;
pub(super) use scans::scan_sent;

use super::body::{self, Sent};
use super::failure::{Failure, reply};
use super::{Route, Shared, let_go};
use crate::volume::PALETTE;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, patch, post, put};
use serde::de::DeserializeOwned;
use serde_json::json;
use std::sync::Arc;

/// What the interface has paths for.
pub fn routes() -> Vec<Route> {
    vec![
        ("/v1", get(about)),
        ("/v1/scans", post(scans::add_scan)),
        ("/v1/scans/{scan}", get(scans::scan).delete(scans::release_scan)),
        ("/v1/scans/{scan}/objects", post(objects::add_object)),
        ("/v1/scans/{scan}/labels", get(files::labels)),
        ("/v1/scans/{scan}/image", get(files::image)),
        ("/v1/objects/{object}", patch(objects::rename_object).delete(objects::release_object)),
        ("/v1/objects/{object}/prompts", post(work::prompts)),
        ("/v1/objects/{object}/prepare", post(work::prepare)),
        ("/v1/objects/{object}/undo", post(work::undo)),
        ("/v1/objects/{object}/redo", post(work::redo)),
        ("/v1/objects/{object}/reset", post(work::reset)),
        ("/v1/objects/{object}/answer", get(work::answer)),
        ("/v1/objects/{object}/unsure", get(work::unsure)),
        ("/v1/objects/{object}/preview", get(files::preview)),
        ("/v1/objects/{object}/mask", put(work::give_mask).get(files::mask)),
    ]
}

type Answer = Result<Response, Failure>;

async fn about(State(shared): State<Arc<Shared>>) -> Answer {
    Ok(reply(
        StatusCode::OK,
        &json!({
            "program": "prism",
            "version": env!("CARGO_PKG_VERSION"),
            "model": shared.name,
            "device": shared.model.device().describe(),
            "colours": PALETTE,
            "limits": {
                "scan_bytes": shared.most_scan, "sessions": shared.settings.max_sessions,
            },
        }),
    ))
}

fn released() -> Answer {
    Ok(reply(StatusCode::OK, &json!({ "released": true })))
}

/// JSON of a body; where there is none, what stands for nothing said.
fn json_of<T: DeserializeOwned + Default>(bytes: &[u8]) -> Result<T, Failure> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(T::default());
    }
    body::json(bytes, |e| Failure::bad(format!("the body: {e}")))
}

/// What is sent for an object, whose scan is not let go while it comes.
async fn sent_to(
    shared: &Shared,
    name: &str,
    request: Request,
    most: usize,
) -> Result<Sent, Failure> {
    let (scan, study, object) = shared.store.object(name)?;
    let (parts, body) = request.into_parts();
    let sent = body::read(&parts.headers, body, most).await;
    if sent.is_ok() {
        shared.store.worked(scan);
    }
    drop(object);
    let_go(study);
    sent
}
