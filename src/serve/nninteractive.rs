//! nnInteractive's protocol, version 2, as the extensions of 3D Slicer and napari and its Python
//! client use it: a lease, an image, a buffer, interactions whose answers are the changed part of
//! the buffer.
//!
//! Requests that cost nothing (above all heartbeats) are answered at once, whatever is running. The
//! work of a lease waits for its turn.

use super::body::{self, Sent};
use super::failure::{Failure, reply};
use super::journal::{Kept, Source};
use super::lease::{Buffer, Lease, Outcome, State as Work, scan_of};
use super::store::{Touch, new_id, text};
use super::turns::Turn;
use super::wire::{Dtype, unpack};
use super::work::{Key, Kind};
use super::{Route, Shared, aside, freed, let_go, tidy};
use crate::message::quoted;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::Response;
use axum::routing::{get, post};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;

/// The header with parameters beside a body.
const META: &str = "x-meta";
const LEASE: &str = "x-lease-token";

/// The protocol's paths.
pub fn routes() -> Vec<Route> {
    vec![
        ("/claim", post(claim)),
        ("/release", post(release)),
        ("/heartbeat", post(heartbeat)),
        ("/lease_status", get(lease_status)),
        ("/capabilities", get(capabilities)),
        ("/set_image", post(set_image)),
        ("/set_target_buffer", post(set_target_buffer)),
        ("/set_do_autozoom", post(set_do_autozoom)),
        ("/reset_interactions", post(reset_interactions)),
        ("/add_point_interaction", post(add_point)),
        ("/add_bbox_interaction", post(add_bbox)),
        ("/add_scribble_interaction", post(add_scribble)),
        ("/add_lasso_interaction", post(add_lasso)),
        ("/add_initial_seg_interaction", post(add_initial_seg)),
        ("/predict", post(predict)),
        ("/undo", post(undo)),
    ]
}

type Answer = Result<Response, Failure>;

fn said(value: Value) -> Answer {
    Ok(reply(StatusCode::OK, &value))
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// A request on a lease, with its body.
struct Call {
    shared: Arc<Shared>,
    key: Key,
    lease: Arc<Lease>,
    headers: HeaderMap,
    sent: Sent,
}

impl Call {
    /// Reads a request with a body of at most `most` bytes. A client without a valid lease sends
    /// all of the body before it reads the answer that says so.
    async fn read(shared: &Arc<Shared>, request: Request, most: usize) -> Result<Call, Failure> {
        let (parts, body) = request.into_parts();
        let headers = parts.headers;
        let (key, lease) = match shared.store.lease(header(&headers, LEASE), Touch::Active) {
            Ok(found) => found,
            Err(gone) => {
                body::pass_by(&headers, body, most).await;
                return Err(gone);
            }
        };
        match body::read(&headers, body, most).await {
            Ok(sent) => Ok(Call { shared: shared.clone(), key, lease, headers, sent }),
            Err(e) => {
                let_go(lease);
                Err(e)
            }
        }
    }

    /// The body as JSON.
    fn json<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        json_of(&self.sent.bytes)
    }

    /// The parameters beside a body that is an array.
    fn meta<T: DeserializeOwned + Default>(&self) -> Result<T, Failure> {
        let Some(value) = self.headers.get(META) else { return Ok(T::default()) };
        body::json(value.as_bytes(), |e| Failure::bad(format!("Bad X-Meta: {e}")))
    }

    /// Runs work on the lease when its turn comes.
    async fn work<T, F>(self, kind: Kind, work: F) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: FnOnce(&Shared, &mut Work, Sent, &Turn) -> Result<T, Failure> + Send + 'static,
    {
        let Call { shared, key, lease, sent, .. } = self;
        // It must not be dropped before it is known to have been worked on.
        let (there, held) = (shared.clone(), lease.clone());
        let run = move |turn: &Turn| {
            work(&there, &mut lease.state(), sent, turn).map_err(Failure::into_bad)
        };
        let done = shared.work.run(key, kind, run).await;
        shared.store.worked(key);
        tidy(&shared, key, held);
        done
    }

    /// Work that costs nothing but to free what it returns: at once if the lease is not in use,
    /// otherwise in its turn.
    async fn at_once<T, F>(self, work: F) -> Result<(), Failure>
    where
        T: Send + 'static,
        F: FnOnce(&mut Work) -> Result<T, Failure> + Send + 'static,
    {
        match if_idle(&self.lease, work) {
            Ok(done) => {
                let_go(self.lease);
                freed(done?);
                Ok(())
            }
            Err(work) => self.work(Kind::Short, move |_, state, _, _| work(state).map(drop)).await,
        }
    }

    /// An interaction, and its answer.
    async fn interact<F>(self, kind: Kind, work: F) -> Answer
    where
        F: FnOnce(&Shared, &mut Work, Sent, &Turn) -> Result<Outcome, Failure> + Send + 'static,
    {
        let (shared, lease, start) = (self.shared.clone(), self.lease.clone(), Instant::now());
        let outcome = self.work(kind, work).await?;
        if kind == Kind::Prediction {
            shared.metrics.click(start.elapsed());
        }
        // A client that has disconnected by now is not told: what it misses is in the next answer.
        shown(outcome, &lease)
    }
}

/// Works on a lease that is not in use, and whose changes are not written to a disk, which would
/// not be free; otherwise gives the work back.
fn if_idle<T, F>(lease: &Lease, work: F) -> Result<Result<T, Failure>, F>
where
    F: FnOnce(&mut Work) -> Result<T, Failure>,
{
    if lease.journal().is_some() {
        return Err(work);
    }
    match lease.idle() {
        Some(mut state) => Ok(work(&mut state)),
        None => Err(work),
    }
}

/// The change, as the client writes it into its buffer.
fn shown(outcome: Outcome, lease: &Lease) -> Answer {
    let mut meta = json!({ "ran_prediction": outcome.ran, "bbox": null });
    let mut body = Body::empty();
    if let Some(update) = outcome.update {
        let shape = update.region.map(|[low, high]| high - low);
        meta = json!({
            "ran_prediction": outcome.ran,
            "bbox": update.region,
            "dtype": update.dtype.name(),
            "shape": shape,
        });
        lease.handed(&update);
        body = update.message.into();
    }
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    if let Ok(meta) = HeaderValue::from_str(&meta.to_string()) {
        headers.insert(META, meta);
    }
    Ok(response)
}

/// Records that a client has written to its buffer before it asks for the effect: filled it with a
/// mask, emptied it, or replaced it. It has done so whatever happens to its request.
fn written(shared: &Shared, request: &Request) {
    if let Ok((_, lease)) = shared.store.lease(header(request.headers(), LEASE), Touch::Look) {
        lease.written();
    }
}

async fn claim(State(shared): State<Arc<Shared>>) -> Answer {
    let there = shared.clone();
    let id = shared.work.run(new_id()?, Kind::Short, move |_| there.store.claim()).await?;
    let settings = &shared.settings;
    said(json!({
        "lease_token": text(id),
        "idle_timeout_seconds": settings.idle.as_secs_f64(),
        "liveness_timeout_seconds": settings.liveness.as_secs_f64(),
        "max_sessions": settings.max_sessions,
    }))
}

async fn release(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Answer {
    let name = header(&headers, LEASE).map(String::from);
    aside(&shared, move |store| store.release(name.as_deref())).await?;
    said(json!({ "released": true }))
}

async fn heartbeat(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Answer {
    let (key, _) = shared.store.lease(header(&headers, LEASE), Touch::Seen)?;
    said(json!({ "remaining_seconds": shared.store.remaining(key) }))
}

async fn lease_status(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Answer {
    let (key, _) = shared.store.lease(header(&headers, LEASE), Touch::Look)?;
    said(json!({
        "remaining_seconds": shared.store.remaining(key),
        "idle_timeout_seconds": shared.settings.idle.as_secs_f64(),
    }))
}

/// The capabilities of prism's sessions. They have no channels of prompts; clients look for the
/// names of those that they can give.
async fn capabilities(State(shared): State<Arc<Shared>>) -> Answer {
    let patch = shared.model.config().patch;
    said(json!({
        "supported_interactions": {
            "points": true, "bbox2d": true, "bbox3d": true, "scribble": true, "lasso": true,
        },
        "channel_mapping": {
            "prev_seg": 0, "points": [1, 2], "bbox2d": [3, 4], "bbox3d": [3, 4], "scribble": [5, 6],
            "lasso": [7, 8],
        },
        "num_interaction_channels": 9,
        "supports_initial_label": true,
        "supports_zero_shot_label_refinement": true,
        "preferred_scribble_thickness": [2, 2, 2],
        "interaction_decay": null,
        "patch_size": [patch, patch, patch],
        "do_autozoom": true,
        "inference_session_version": format!("prism {}", env!("CARGO_PKG_VERSION")),
        "license": format!("prism: Apache-2.0; model: {}", shared.name),
        "supports_undo": true,
    }))
}

/// The parameters beside an image.
#[derive(Default, Deserialize)]
#[serde(default)]
struct ImageMeta {
    image_properties: Option<Properties>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Properties {
    /// `[k, j, i]`, in mm; anything else is ignored.
    spacing: Value,
}

impl Properties {
    /// The distances between voxels. A sign comes from a viewer that shows an axis in reverse:
    /// napari's reader of NIfTI gives every axis one, whichever way it runs.
    fn spacing(&self) -> [f64; 3] {
        const PLAUSIBLE: std::ops::RangeInclusive<f64> = 1e-6..=1e6;
        let numbers = self.spacing.as_array().into_iter().flatten().filter_map(Value::as_f64);
        let list: Vec<f64> = numbers.map(f64::abs).collect();
        match list[..] {
            [.., k, j, i] if [k, j, i].iter().all(|s| PLAUSIBLE.contains(s)) => [k, j, i],
            _ => [1.0; 3],
        }
    }
}

async fn set_image(State(shared): State<Arc<Shared>>, request: Request) -> Answer {
    let most = shared.most_scan;
    let call = Call::read(&shared, request, most).await?;
    let meta: ImageMeta = call.meta()?;
    let spacing = meta.image_properties.unwrap_or_default().spacing();
    let key = call.key;
    let shape = call
        .work(Kind::Other, move |shared, work, sent, _| {
            let array = unpack(&sent.bytes, most)?;
            let scan = work.keep(&sent.bytes, Source::Array(spacing))?;
            drop(sent);
            let shape = array.shape.clone();
            let image = scan_of(array, spacing)?;
            work.set_image(shared.engine(), image, scan)?;
            shared.work.ahead(key, work.ahead());
            Ok(shape)
        })
        .await?;
    said(json!({ "original_image_shape": shape }))
}

async fn set_target_buffer(State(shared): State<Arc<Shared>>, request: Request) -> Answer {
    written(&shared, &request);
    let call = Call::read(&shared, request, body::SHORT).await?;
    let buffer = buffer(&call.sent.bytes, shared.most_scan)?;
    call.at_once(move |work| work.set_buffer(buffer)).await?;
    said(json!({}))
}

/// JSON of a body.
fn json_of<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failure> {
    body::json(bytes, |e| Failure::unfit(e.to_string()))
}

/// The buffer that a body describes, of at most `most` bytes.
pub fn buffer(bytes: &[u8], most: usize) -> Result<Buffer, Failure> {
    buffer_of(&json_of(bytes)?, most)
}

/// The buffer that a request describes.
fn buffer_of(asked: &Value, most: usize) -> Result<Buffer, Failure> {
    let field = |name: &str| {
        asked.get(name).ok_or_else(|| Failure::bad(format!("missing required field: {name}")))
    };
    let (shape, dtype) = (field("shape")?, field("dtype")?);
    let shape = shape
        .as_array()
        .ok_or_else(|| Failure::bad("shape must be a list of positive integers"))?;
    let [k, j, i] = &shape[..] else { return Err(Failure::bad("shape must be 3D")) };
    let side = |value: &Value| match value.as_u64() {
        Some(0) => Err(Failure::bad("shape dimensions must be positive")),
        Some(n) => Ok(n as usize),
        None if value.is_i64() => Err(Failure::bad("shape dimensions must be positive")),
        None => Err(Failure::bad("shape must contain only integers")),
    };
    let shape = [side(k)?, side(j)?, side(i)?];
    let name = dtype.as_str().unwrap_or_default();
    let invalid = || Failure::bad(format!("invalid dtype: {}", quoted(&dtype.to_string())));
    let dtype = Dtype::named(name).ok_or_else(invalid)?;
    if !dtype.is_whole() {
        return Err(Failure::bad(format!(
            "unsupported dtype {name}: target buffer must be bool or an integer type"
        )));
    }
    let bytes = crate::tensor::extent(&shape).and_then(|n| n.checked_mul(dtype.size()));
    match bytes.filter(|n| *n <= most) {
        Some(_) => Ok(Buffer { shape, dtype }),
        None => Err(Failure::too_large(format!(
            "target buffer of {shape:?} elements of {name}: limit is {most} bytes"
        ))),
    }
}

/// The session follows an object by itself: there is nothing to switch on or off.
async fn set_do_autozoom(State(shared): State<Arc<Shared>>, request: Request) -> Answer {
    let call = Call::read(&shared, request, body::SHORT).await?;
    let asked: Value = call.json()?;
    match asked.get("do_autozoom") {
        Some(_) => said(json!({})),
        None => Err(Failure::unfit("missing required field: do_autozoom")),
    }
}

async fn reset_interactions(State(shared): State<Arc<Shared>>, request: Request) -> Answer {
    written(&shared, &request);
    let call = Call::read(&shared, request, body::JSON).await?;
    call.at_once(|work| work.reset()).await?;
    said(json!({}))
}

fn yes() -> bool {
    true
}

/// A request with a prediction waits for the one that runs; one that is only recorded does not.
fn kind(run: bool, noted: Kind) -> Kind {
    if run { Kind::Prediction } else { noted }
}

#[derive(Deserialize)]
struct Point {
    coordinates: [f64; 3],
    include_interaction: bool,
    #[serde(default = "yes")]
    run_prediction: bool,
}

async fn add_point(State(shared): State<Arc<Shared>>, request: Request) -> Answer {
    let call = Call::read(&shared, request, body::JSON).await?;
    let point: Point = call.json()?;
    call.interact(kind(point.run_prediction, Kind::Short), move |_, work, _, turn| {
        work.point(point.coordinates, point.include_interaction, point.run_prediction, turn)
    })
    .await
}

#[derive(Deserialize)]
struct Bounds {
    bbox_coords: [[f64; 2]; 3],
    include_interaction: bool,
    #[serde(default = "yes")]
    run_prediction: bool,
}

async fn add_bbox(State(shared): State<Arc<Shared>>, request: Request) -> Answer {
    let call = Call::read(&shared, request, body::JSON).await?;
    let given: Bounds = call.json()?;
    call.interact(kind(given.run_prediction, Kind::Short), move |_, work, _, turn| {
        work.bounds(given.bbox_coords, given.include_interaction, given.run_prediction, turn)
    })
    .await
}

/// The parameters beside a mask.
#[derive(Default, Deserialize)]
#[serde(default)]
struct MaskMeta {
    include_interaction: Option<bool>,
    run_prediction: Option<bool>,
    interaction_bbox: Option<[[f64; 2]; 3]>,
}

async fn add_scribble(State(shared): State<Arc<Shared>>, request: Request) -> Answer {
    painted(shared, request, true).await
}

async fn add_lasso(State(shared): State<Arc<Shared>>, request: Request) -> Answer {
    painted(shared, request, false).await
}

async fn painted(shared: Arc<Shared>, request: Request, scribble: bool) -> Answer {
    let most = shared.most_scan;
    let call = Call::read(&shared, request, most).await?;
    let meta: MaskMeta = call.meta()?;
    let on = meta
        .include_interaction
        .ok_or_else(|| Failure::bad("missing in X-Meta: include_interaction"))?;
    let run = meta.run_prediction.unwrap_or(true);
    call.interact(kind(run, Kind::Other), move |_, work, sent, turn| {
        let mask = unpack(&sent.bytes, most)?;
        drop(sent);
        match scribble {
            true => work.scribble(&mask, meta.interaction_bbox, on, run, turn),
            false => work.lasso(&mask, meta.interaction_bbox, on, run, turn),
        }
    })
    .await
}

async fn add_initial_seg(State(shared): State<Arc<Shared>>, request: Request) -> Answer {
    let most = shared.most_scan;
    written(&shared, &request);
    let call = Call::read(&shared, request, most).await?;
    let meta: MaskMeta = call.meta()?;
    let (key, run) = (call.key, meta.run_prediction.unwrap_or(false));
    call.interact(kind(run, Kind::Other), move |shared, work, sent, turn| {
        let mask = unpack(&sent.bytes, most)?;
        drop(sent);
        let outcome = work.initial(&mask, run, turn)?;
        shared.work.ahead(key, work.ahead());
        Ok(outcome)
    })
    .await
}

async fn predict(State(shared): State<Arc<Shared>>, request: Request) -> Answer {
    let call = Call::read(&shared, request, body::SHORT).await?;
    // The request says whether all is to be refined, which is ignored: a session refines what it
    // looks at.
    let _: Value = call.json()?;
    call.interact(Kind::Prediction, |_, work, _, turn| work.predict(turn)).await
}

async fn undo(State(shared): State<Arc<Shared>>, request: Request) -> Answer {
    let call = Call::read(&shared, request, body::JSON).await?;
    call.interact(Kind::Short, |_, work, _, _| work.undo()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spacings_are_taken_where_they_are_plausible() {
        let of = |text: &str| {
            let meta: ImageMeta = serde_json::from_str(text).unwrap();
            meta.image_properties.unwrap_or_default().spacing()
        };
        assert_eq!(of("{\"image_properties\":{\"spacing\":[3,0.5,0.25]}}"), [3.0, 0.5, 0.25]);
        assert_eq!(of("{\"image_properties\":{\"spacing\":[1,3,0.5,0.25]}}"), [3.0, 0.5, 0.25]);
        assert_eq!(of("{\"image_properties\":{\"spacing\":[-3,-0.5,0.25]}}"), [3.0, 0.5, 0.25]);
        for text in [
            "{}",
            "{\"image_properties\":null}",
            "{\"image_properties\":{}}",
            "{\"image_properties\":{\"spacing\":null}}",
            "{\"image_properties\":{\"spacing\":[1,2]}}",
            "{\"image_properties\":{\"spacing\":[0,2,3]}}",
            "{\"image_properties\":{\"spacing\":[-1e7,2,3]}}",
            "{\"image_properties\":{\"spacing\":[\"a\",2,3]}}",
        ] {
            assert_eq!(of(text), [1.0; 3], "{text}");
        }
    }

    #[test]
    fn buffers_are_what_their_clients_can_hold() {
        let of =
            |shape: Value, dtype: &str| buffer_of(&json!({ "shape": shape, "dtype": dtype }), 1000);
        let buffer = of(json!([3, 4, 5]), "uint8").unwrap();
        assert_eq!((buffer.shape, buffer.dtype.name()), ([3, 4, 5], "uint8"));
        for (shape, dtype, says) in [
            (json!([3, 4]), "uint8", "3D"),
            (json!("3"), "uint8", "a list"),
            (json!([3, 4, 0]), "uint8", "positive"),
            (json!([3, 4, -1]), "uint8", "positive"),
            (json!([3, 4, 1.5]), "uint8", "only integers"),
            (json!([3, 4, true]), "uint8", "only integers"),
            (json!([3, 4, 5]), "float32", "integer type"),
            (json!([3, 4, 5]), "what", "invalid dtype"),
            (json!([30, 40, 50]), "uint8", "limit"),
            (json!([3_000_000_000u64, 4_000_000_000u64, 5_000_000_000u64]), "bool", "limit"),
        ] {
            let error = format!("{:?}", of(shape, dtype).unwrap_err());
            assert!(error.contains(says), "{error}");
        }
        let missing = buffer_of(&json!({ "shape": [1, 2, 3] }), 1000).unwrap_err();
        assert!(format!("{missing:?}").contains("missing required field: dtype"));
    }
}
