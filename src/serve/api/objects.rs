//! Objects on a scan: added, named, let go.

use super::{Answer, json_of, released, sent_to};
use crate::message::quoted;
use crate::serve::body;
use crate::serve::failure::{Failure, reply};
use crate::serve::store::{Id, Named, Object, new_id, object_id, text};
use crate::serve::turns::Turn;
use crate::serve::work::Kind;
use crate::serve::{Shared, tidy};
use crate::volume::default_colour;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Objects on a scan, at most: each has a value of a label image's bytes.
const MOST_OBJECTS: usize = 255;
/// Letters of an object's name, at most.
const MOST_NAME: usize = 200;

/// An object of the scan that is called `scan`.
pub(super) fn described_object(scan: Id, object: &Object) -> Value {
    about_object(text(object_id(scan, object.number)), object)
}

/// An object that is called for by an identifier.
fn about_object(id: String, object: &Object) -> Value {
    let Named { name, colour } = object.named();
    json!({
        "object": id,
        "name": name,
        "colour": colour,
        "voxels": object.voxels.load(Ordering::Relaxed),
    })
}

/// What a caller says of an object.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct About {
    name: Option<String>,
    colour: Option<[u8; 3]>,
}

impl About {
    /// What a body says.
    fn of(bytes: &[u8]) -> Result<About, Failure> {
        let about: About = json_of(bytes)?;
        let name = about.name.as_deref().unwrap_or_default();
        if name.chars().count() > MOST_NAME {
            return Err(Failure::unfit(format!("a name of more than {MOST_NAME} characters")));
        }
        // Files have a line for it.
        if name.chars().any(char::is_control) {
            return Err(Failure::unfit(format!(
                "the name '{}' is not a single line",
                quoted(name)
            )));
        }
        Ok(about)
    }
}

pub(super) async fn add_object(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    request: Request,
) -> Answer {
    let (id, scan, study) = shared.store.scan(&name)?;
    let (parts, body) = request.into_parts();
    let sent = body::read(&parts.headers, body, body::JSON).await?;
    let new = About::of(&sent.bytes)?;
    // It does not wait for what is done on the scan.
    let (there, held) = (shared.clone(), study.clone());
    let add = move |_: &Turn| -> Result<Arc<Object>, Failure> {
        let number = study.objects().len();
        let name = new.name.unwrap_or_else(|| format!("object {}", number + 1));
        let colour = new.colour.unwrap_or_else(|| default_colour(number));
        let object = study.object(id, Named { name, colour });
        there.store.add_object(scan, &study, object, MOST_OBJECTS)
    };
    let object = shared.work.run(new_id()?, Kind::Short, add).await;
    tidy(&shared, scan, held);
    let object = object?;
    Ok(reply(StatusCode::CREATED, &described_object(id, &object)))
}

/// Calls an object otherwise, or gives it another colour.
pub(super) async fn rename_object(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    request: Request,
) -> Answer {
    let sent = sent_to(&shared, &name, request, body::JSON).await?;
    let new = About::of(&sent.bytes)?;
    let (scan, study, object) = shared.store.object(&name)?;
    let held = study.clone();
    // It does not wait for what is done on its scan.
    let rename = move |_: &Turn| -> Result<Value, Failure> {
        study.rename(&object, new.name, new.colour)?;
        Ok(about_object(name.to_lowercase(), &object))
    };
    let about = shared.work.run(new_id()?, Kind::Short, rename).await;
    tidy(&shared, scan, held);
    Ok(reply(StatusCode::OK, &about?))
}

pub(super) async fn release_object(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
) -> Answer {
    let held = shared.store.object(&name).ok().map(|(scan, study, _)| (scan, study));
    // It does not wait for what is done on its scan.
    let there = shared.clone();
    let release = move |_: &Turn| there.store.release_object(&name);
    let done = shared.work.run(new_id()?, Kind::Short, release).await;
    if let Some((scan, study)) = held {
        tidy(&shared, scan, study);
    }
    done?;
    released()
}
