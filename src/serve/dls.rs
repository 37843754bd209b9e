//! The protocol of ITK-SNAP's deep learning extensions, version 0.1.6, by both generations of its
//! paths: a session, an image, clicks and drawings whose answers are the whole mask.
//!
//! It has no key, so if callers need a token it is served at an address of its own, which only this
//! machine's programs reach (`--dls`). Voxels are `[x, y, z]`; volumes are float32 in gzip, x
//! fastest. ITK-SNAP does not check that an answer has the image's size: it always has.

use super::body::{self, Counted, Sent};
use super::failure::{Failure, reply};
use super::journal::Source;
use super::lease::Lease;
use super::multipart::{self, only};
use super::query::{field, fields};
use super::store::{new_id, text};
use super::turns::Turn;
use super::wire::{Array, Dtype};
use super::work::{Key, Kind};
use super::{Route, Shared, aside, let_go, tidy};
use crate::input::DEFLATE_LIMIT;
use crate::memory;
use crate::message::quoted;
use crate::volume::{Affine, Description, Element, Grid, Volume, gzipped};
use axum::body::Body;
use axum::extract::{Path, RawQuery, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::Response;
use axum::routing::{get, post};
use flate2::read::MultiGzDecoder;
use serde::Deserialize;
use serde_json::{Value, json};
use std::io::Read;
use std::sync::Arc;
use std::time::Instant;

/// The version by which clients decide what they may ask; only numbers and dots.
const VERSION: &str = "0.1.6";
/// The model that clients ask for: its name in this protocol.
const MODEL: &str = "nnInteractive";

/// How messages name the memory that a volume and an answer take.
const VOLUME: &str = "an uploaded volume";
const ANSWER: &str = "a response";

/// The protocol's paths.
pub fn routes() -> Vec<Route> {
    vec![
        ("/status", get(status)),
        ("/v2/models", get(models)),
        ("/start_session", get(start)),
        ("/v2/start_session/{model}", get(start_with)),
        ("/upload_raw/{session}", post(upload)),
        ("/v2/upload_raw/{session}", post(upload)),
        ("/process_point_interaction/{session}", get(point)),
        ("/v2/process_point_interaction/{session}", get(point)),
        ("/process_scribble_interaction/{session}", post(scribble)),
        ("/v2/process_scribble_interaction/{session}", post(scribble)),
        ("/process_lasso_interaction/{session}", post(lasso)),
        ("/v2/process_lasso_interaction/{session}", post(lasso)),
        ("/reset_interactions/{session}", get(reset)),
        ("/v2/reset_interactions/{session}", get(reset)),
        ("/end_session/{session}", get(end)),
        ("/v2/end_session/{session}", get(end)),
    ]
}

type Answer = Result<Response, Failure>;

fn said(value: Value) -> Answer {
    Ok(reply(StatusCode::OK, &value))
}

async fn status() -> Answer {
    said(json!({ "status": "ok", "version": VERSION }))
}

/// There are no paths for boxes.
async fn models() -> Answer {
    said(json!({
        "models": [{
            "id": MODEL,
            "channels": [1],
            "dimensions": 3,
            "interactions": ["point", "scribble", "lasso"],
        }],
    }))
}

async fn start(State(shared): State<Arc<Shared>>) -> Answer {
    let there = shared.clone();
    let id = shared.work.run(new_id()?, Kind::Short, move |_| there.store.start_snap()).await?;
    said(json!({ "session_id": text(id) }))
}

async fn start_with(shared: State<Arc<Shared>>, Path(model): Path<String>) -> Answer {
    match model == MODEL {
        true => start(shared).await,
        false => Err(Failure::unknown(format!("no such model: expected {MODEL}"))),
    }
}

/// A form that was sent for a session.
struct Call {
    key: Key,
    lease: Arc<Lease>,
    headers: HeaderMap,
    sent: Sent,
}

impl Call {
    /// A client without a session sends all of the form before it reads the answer that says so.
    async fn read(shared: &Shared, name: &str, request: Request) -> Result<Call, Failure> {
        let (parts, body) = request.into_parts();
        let headers = parts.headers;
        let (key, lease) = match shared.store.snap(name) {
            Ok(found) => found,
            Err(gone) => {
                body::pass_by(&headers, body, shared.most_scan).await;
                return Err(gone);
            }
        };
        match body::read(&headers, body, shared.most_scan).await {
            Ok(sent) => Ok(Call { key, lease, headers, sent }),
            Err(e) => {
                let_go(lease);
                Err(e)
            }
        }
    }
}

/// The metadata of a volume. ITK's coordinates run to the left and to the back.
#[derive(Deserialize)]
struct Meta {
    dimensions: Vec<usize>,
    components_per_pixel: Option<usize>,
    spacing: Option<Vec<f64>>,
    origin: Option<Vec<f64>>,
    /// Row by row.
    direction: Option<Vec<f64>>,
}

impl Meta {
    /// Size and place, for a volume of at most `most` bytes.
    fn grid(&self, most: usize) -> Result<Grid, Failure> {
        let [ni, nj, nk] = self.dimensions[..] else {
            return Err(Failure::unfit(format!(
                "metadata: {} dimensions, expected 3: x, y and z",
                self.dimensions.len()
            )));
        };
        if let Some(count @ (0 | 2..)) = self.components_per_pixel {
            return Err(Failure::unfit(format!(
                "metadata: {count} components per pixel, expected 1"
            )));
        }
        let size = [ni, nj, nk];
        let bytes = crate::tensor::extent(&size).and_then(|n| n.checked_mul(size_of::<f32>()));
        match bytes {
            Some(0) => return Err(Failure::unfit("metadata: the volume has no voxels")),
            Some(n) if n <= most => {}
            _ => {
                return Err(Failure::too_large(format!(
                    "a volume of {size:?} voxels of float32: at most {most} bytes are accepted"
                )));
            }
        }
        let spacing = numbers("spacing", &self.spacing, [1.0; 3])?;
        let origin = numbers("origin", &self.origin, [0.0; 3])?;
        let identity = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0];
        let direction = numbers("direction", &self.direction, identity)?;
        let row = |r: usize| {
            let sign = if r < 2 { -1.0 } else { 1.0 };
            // Adding 0 turns -0 into 0.
            let step = |c: usize| sign * direction[3 * r + c] * spacing[c] + 0.0;
            [step(0), step(1), step(2), sign * origin[r] + 0.0]
        };
        Ok(Grid { size, affine: Affine([row(0), row(1), row(2)]) })
    }
}

/// Numbers of a field, or defaults if there are none.
fn numbers<const N: usize>(
    name: &str,
    given: &Option<Vec<f64>>,
    otherwise: [f64; N],
) -> Result<[f64; N], Failure> {
    let Some(list) = given else { return Ok(otherwise) };
    let numbers = <[f64; N]>::try_from(&list[..]).ok();
    numbers.filter(|n| n.iter().all(|v| v.is_finite())).ok_or_else(|| {
        Failure::unfit(format!("metadata: {name} of {} numbers, expected {N}", list.len()))
    })
}

/// The volume in a form: its place, and its elements.
pub fn volume(headers: &HeaderMap, form: &[u8], most: usize) -> Result<(Grid, Vec<u8>), Failure> {
    let parts = multipart::parts(headers, form)?;
    let content = |name: &str| only(&parts, name).map(|part| &form[part.content.clone()]);
    let (meta, packed) = (content("metadata")?, content("file")?);
    if meta.len() > body::SHORT {
        return Err(Failure::too_large(format!(
            "metadata of {} bytes: at most {} are accepted",
            meta.len(),
            body::SHORT
        )));
    }
    let meta: Meta = body::json(meta, |e| Failure::unfit(format!("metadata: {e}")))?;
    let grid = meta.grid(most)?;
    let bytes = grid.voxels() * size_of::<f32>();
    Ok((grid, unzipped(packed, bytes)?))
}

/// The volume in a form, as a scan.
pub fn image(headers: &HeaderMap, form: &[u8], most: usize) -> Result<Volume, Failure> {
    let (grid, values) = volume(headers, form, most)?;
    let description = Description::of_new(&grid, Element::Float32.name());
    Volume::of_elements(grid, Element::Float32, values, description).map_err(Failure::unfit)
}

/// The contents of a gzip file that holds `bytes` bytes.
fn unzipped(packed: &[u8], bytes: usize) -> Result<Vec<u8>, Failure> {
    let wrong = |what: String| Failure::unfit(format!("file: {what}; expected {bytes} in gzip"));
    if (packed.len() as u64).saturating_mul(DEFLATE_LIMIT) < bytes as u64 {
        return Err(wrong(format!("{} bytes cannot hold so many", packed.len())));
    }
    let mut values = memory::zeroed::<u8>(VOLUME, bytes);
    let mut reader = MultiGzDecoder::new(packed);
    let more = reader.read_exact(&mut values).and_then(|()| reader.read(&mut [0]));
    match more {
        Ok(0) => Ok(values),
        Ok(_) => Err(wrong("holds more bytes".into())),
        Err(e) => Err(wrong(format!("truncated or corrupt: {e}"))),
    }
}

async fn upload(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    request: Request,
) -> Answer {
    let Call { key, lease, headers, sent } = Call::read(&shared, &name, request).await?;
    // It must not be dropped before it is known to have been worked on.
    let (there, held) = (shared.clone(), lease.clone());
    let take = move |_: &Turn| -> Result<(), Failure> {
        let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let source = Source::Form(kind.unwrap_or_default().into());
        let image = image(&headers, &sent.bytes, there.most_scan)?;
        let mut state = lease.state();
        let scan = state.keep(&sent.bytes, source)?;
        drop(sent);
        state.set_image(there.engine(), image, scan)?;
        there.work.ahead(key, state.ahead());
        Ok(())
    };
    let done = shared.work.run(key, Kind::Other, take).await;
    shared.store.worked(key);
    let_go(held);
    done?;
    said(json!({ "message": "the image is there" }))
}

/// Whether an interaction adds to the object, read as Python's servers read such words.
pub fn foreground(query: &Option<String>) -> Result<bool, Failure> {
    let Some(word) = field(query, "foreground") else { return Ok(false) };
    match word.to_lowercase().as_str() {
        "true" | "1" | "yes" | "y" | "on" | "t" => Ok(true),
        "false" | "0" | "no" | "n" | "off" | "f" => Ok(false),
        _ => Err(Failure::unfit(format!(
            "foreground is '{}', expected true or false",
            quoted(&word)
        ))),
    }
}

/// The voxel that a query names, by three numbers of one name or one of three.
pub fn voxel(query: &Option<String>) -> Result<[f64; 3], Failure> {
    let mut words: Vec<String> = fields(query, "point").collect();
    if words.is_empty() {
        words.extend(["x", "y", "z"].iter().filter_map(|axis| field(query, axis)));
    }
    let whole = |word: &String| word.trim().parse::<i64>().ok().map(|n| n as f64);
    let numbers: Option<Vec<f64>> = words.iter().map(whole).collect();
    numbers.and_then(|n| n.try_into().ok()).ok_or_else(|| {
        Failure::unfit(format!(
            "the point is '{}', expected three whole numbers: point=X&point=Y&point=Z, or x, y, z",
            quoted(&words.join(" "))
        ))
    })
}

async fn point(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
) -> Answer {
    let (key, lease) = shared.store.snap(&name)?;
    let ([x, y, z], on) = (voxel(&query)?, foreground(&query)?);
    answered(shared, key, lease.clone(), move |turn| {
        let mut state = lease.state();
        let prompts = state.pointed([z, y, x], on)?;
        state.say_for_whole(&prompts, turn, packed)
    })
    .await
}

async fn scribble(
    shared: State<Arc<Shared>>,
    name: Path<String>,
    query: RawQuery,
    request: Request,
) -> Answer {
    drawn(shared, name, query, request, true).await
}

async fn lasso(
    shared: State<Arc<Shared>>,
    name: Path<String>,
    query: RawQuery,
    request: Request,
) -> Answer {
    drawn(shared, name, query, request, false).await
}

async fn drawn(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
    request: Request,
    scribble: bool,
) -> Answer {
    let Call { key, lease, headers, sent } = Call::read(&shared, &name, request).await?;
    let on = foreground(&query)?;
    let most = shared.most_scan;
    answered(shared, key, lease.clone(), move |turn| {
        let (grid, bytes) = volume(&headers, &sent.bytes, most)?;
        drop(sent);
        let [ni, nj, nk] = grid.size;
        let dtype = Dtype::Other(Element::Float32);
        let mask = Array { dtype, shape: vec![nk, nj, ni], bytes };
        let mut state = lease.state();
        let prompts = match scribble {
            true => state.painted(&mask, None, on)?,
            false => state.outlined(&mask, None, on)?,
        };
        drop(mask);
        state.say_for_whole(&prompts, turn, packed)
    })
    .await
}

/// The answer that holds a mask. Memory for it may be refused: it is made before the step that led
/// to it is kept.
fn packed(mask: Vec<u8>) -> Result<Counted, Failure> {
    let packed = gzipped(&mask).map_err(|e| Failure::full(format!("{ANSWER}: {e}")))?;
    drop(mask);
    Counted::new(message(&packed))
}

/// Runs an interaction when its turn comes, and answers with what it makes of the whole mask.
async fn answered<F>(shared: Arc<Shared>, key: Key, held: Arc<Lease>, work: F) -> Answer
where
    F: FnOnce(&Turn) -> Result<Counted, Failure> + Send + 'static,
{
    let start = Instant::now();
    let done = shared.work.run(key, Kind::Prediction, work).await;
    shared.store.worked(key);
    tidy(&shared, key, held);
    let message = done?;
    shared.metrics.click(start.elapsed());
    let mut response = Response::new(Body::from(message));
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    Ok(response)
}

/// An answer in JSON, with bytes in base64 (RFC 4648).
fn message(bytes: &[u8]) -> Vec<u8> {
    const HEAD: &[u8] = b"{\"status\":\"success\",\"result\":\"";
    const END: &[u8] = b"\"}";
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = memory::list(ANSWER, HEAD.len() + 4 * bytes.len().div_ceil(3) + END.len());
    out.extend_from_slice(HEAD);
    for three in bytes.chunks(3) {
        let at = |n: usize| u32::from(three.get(n).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        // One byte gives two letters, two bytes give three.
        let letter = |n: usize| match n <= three.len() {
            true => LETTERS[(bits >> (18 - 6 * n) & 63) as usize],
            false => b'=',
        };
        out.extend([letter(0), letter(1), letter(2), letter(3)]);
    }
    out.extend_from_slice(END);
    out
}

async fn reset(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
    let (key, lease) = shared.store.snap(&name)?;
    let held = lease.clone();
    let forget = move |_: &Turn| lease.state().reset().map(drop);
    let done = shared.work.run(key, Kind::Short, forget).await;
    shared.store.worked(key);
    let_go(held);
    done?;
    said(json!({ "status": "success" }))
}

async fn end(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
    aside(&shared, move |store| store.end_snap(&name)).await??;
    said(json!({ "message": "Session ended" }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(text: &str) -> Result<Grid, Failure> {
        serde_json::from_str::<Meta>(text).unwrap().grid(1000)
    }

    #[test]
    fn a_volume_lies_where_itk_says() {
        let grid = meta(
            "{\"dimensions\":[3,4,5],\"spacing\":[2,3,4],\"origin\":[10,20,30],\
             \"direction\":[0,1,0,-1,0,0,0,0,1],\"components_per_pixel\":1,\"component_type\":\"float\"}",
        )
        .unwrap();
        assert_eq!(grid.size, [3, 4, 5]);
        // Left and back are counted from the other side here; x runs to the front.
        assert_eq!(grid.affine.apply([0.0; 3]), [-10.0, -20.0, 30.0]);
        assert_eq!(grid.affine.apply([1.0, 0.0, 0.0]), [-10.0, -18.0, 30.0]);
        assert_eq!(grid.affine.apply([0.0, 1.0, 0.0]), [-13.0, -20.0, 30.0]);
        assert_eq!(grid.affine.apply([0.0, 0.0, 1.0]), [-10.0, -20.0, 34.0]);
        let plain = meta("{\"dimensions\":[3,4,5]}").unwrap();
        assert_eq!(plain.affine.spacing(), [1.0; 3]);
        for (text, says) in [
            ("{\"dimensions\":[3,4]}", "2 dimensions"),
            ("{\"dimensions\":[3,4,0]}", "has no voxels"),
            ("{\"dimensions\":[30,40,50]}", "at most 1000"),
            ("{\"dimensions\":[4294967296,4294967296,4294967296]}", "at most 1000"),
            ("{\"dimensions\":[3,4,5],\"components_per_pixel\":3}", "3 components"),
            ("{\"dimensions\":[3,4,5],\"spacing\":[1,2]}", "spacing of 2"),
            ("{\"dimensions\":[3,4,5],\"direction\":[1]}", "direction of 1"),
        ] {
            let error = format!("{:?}", meta(text).unwrap_err());
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn a_volume_has_as_many_bytes_as_voxels() {
        let packed = gzipped(&[7; 100]).unwrap();
        assert_eq!(unzipped(&packed, 100).unwrap(), [7; 100]);
        for (packed, bytes, says) in [
            (&packed[..], 99, "more bytes"),
            (&packed[..], 101, "corrupt"),
            (&packed[..packed.len() - 9], 100, "corrupt"),
            (&packed[..], 1 << 40, "cannot hold"),
            (&b"what"[..], 100, "corrupt"),
        ] {
            let error = format!("{:?}", unzipped(packed, bytes).unwrap_err());
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn queries_are_read_in_both_forms() {
        let of = |text: &str| voxel(&Some(text.to_string()));
        assert_eq!(of("point=1&point=2&point=3&foreground=true"), Ok([1.0, 2.0, 3.0]));
        assert_eq!(of("z=3&x=-1&y=2"), Ok([-1.0, 2.0, 3.0]));
        for text in
            ["", "point=1&point=2", "x=1&y=2", "point=1&point=2&point=3&point=4", "x=a&y=1&z=1"]
        {
            assert!(of(text).is_err(), "{text}");
        }
        let on = |text: &str| foreground(&Some(text.to_string()));
        assert_eq!(
            (on("foreground=true"), on("foreground=False"), on("")),
            (Ok(true), Ok(false), Ok(false))
        );
        assert!(on("foreground=maybe").is_err());
    }

    #[test]
    fn bytes_are_told_in_base64() {
        let of = |bytes: &[u8]| String::from_utf8(message(bytes)).unwrap();
        for (bytes, letters) in [
            (&b""[..], ""),
            (&b"f"[..], "Zg=="),
            (&b"fo"[..], "Zm8="),
            (&b"foo"[..], "Zm9v"),
            (&b"foobar"[..], "Zm9vYmFy"),
            (&b"\xff\xfe\xfd\xfc"[..], "//79/A=="),
        ] {
            assert_eq!(of(bytes), format!("{{\"status\":\"success\",\"result\":\"{letters}\"}}"));
        }
    }
}
