//! MONAI Label's protocol, version 0.8.5, as far as 3D Slicer's extension and its Python client use
//! it for interactive segmentation: a session for a scan, and masks for all the clicks on it so
//! far.
//!
//! If the server was given a folder of DICOM, its series are images too (`datastore.rs`): OHIF's
//! extension asks for those. Training and user accounts are not supported. Voxels are `[i, j, k]`
//! of the file that was sent, or of the series, with its slices in their order along the normal, as
//! in ITK and OHIF. Answers have a Content-Length, because clients join chunks wrongly.

use super::api::{MASKS, saved, scan_sent};
use super::arrived::{SCANS, scan_of};
use super::body;
use super::clicked::{Answered, Clicked, Clicks};
use super::datastore;
use super::failure::{Failure, said};
use super::journal::{NewScan, Owner, Source};
use super::multipart;
use super::opened::Opened;
use super::query::field;
use super::store::{Id, Store, Touch, key_of, new_id, text};
use super::turns::Turn;
use super::work::{Key, Kind};
use super::{Route, Shared, aside, tidy};
use crate::memory;
use crate::message::quoted;
use crate::volume::{mask_file, plain_nrrd};
use axum::extract::{Path, RawQuery, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::Response;
use axum::routing::{get, post, put};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::Instant;

/// The model's name in this protocol, and the label that it finds.
const MODEL: &str = "prism";
const LABEL: &str = "tumour";
/// The most clicks of one request.
const MOST_CLICKS: usize = 1_000;
/// The most letters of an object's name that count.
const MOST_LABEL: usize = 200;

/// How messages name the memory that this takes.
const ANSWER: &str = "a response";

/// The protocol's paths.
pub fn routes() -> Vec<Route> {
    vec![
        ("/info/", get(info)),
        ("/auth/", get(auth)),
        ("/session/", put(create)),
        ("/session/{session}", get(session).delete(remove)),
        ("/infer/{model}", post(infer)),
    ]
}

type Answer = Result<Response, Failure>;

/// What the server offers. Clients choose what they show by the model's type. All labels are a
/// list, to which OHIF's extension adds those of the models.
async fn info(State(shared): State<Arc<Shared>>) -> Answer {
    let about = format!("prism: one object from clicks, with the model {}", shared.name);
    said(json!({
        "name": "prism",
        "description": about,
        "version": env!("CARGO_PKG_VERSION"),
        "labels": [LABEL],
        "models": {
            (MODEL): {
                "type": "deepgrow",
                "dimension": 3,
                "labels": { (LABEL): 1 },
                "description": about,
                "config": {},
            },
        },
        "trainers": {},
        "strategies": datastore::strategies(&shared),
        "scoring": {},
        "train_stats": {},
        "datastore": datastore::status(&shared),
    }))
}

/// There are no user accounts; if a token is needed it is sent as everywhere.
async fn auth() -> Answer {
    said(json!({ "enabled": false }))
}

/// A session as it is described to clients. The path of its image is not shown.
fn described(id: Id, clicked: &Clicked, shared: &Shared) -> Value {
    json!({
        "name": text(id),
        "path": "",
        "image": "",
        "meta": {},
        "create_ts": clicked.came,
        "last_access_ts": clicked.used(),
        "expiry": shared.settings.idle.as_secs(),
    })
}

/// Receives a scan. Its content says what it is; the ending of its name is checked against that.
async fn create(State(shared): State<Arc<Shared>>, request: Request) -> Answer {
    let (parts, body) = request.into_parts();
    let (place, sent) = scan_sent(&shared, &parts.headers, body).await?;
    let id = new_id()?;
    let (there, headers) = (shared.clone(), parts.headers);
    let read = move |_: &Turn| -> Result<Clicked, Failure> {
        let file = file(&headers, sent.bytes)?;
        let journal = there.store.journal(Owner::Label, key_of(id))?;
        let scan = journal.map(|j| j.scan(&file, Source::Plain)).transpose()?;
        let image = scan_of(file, there.most_scan)?;
        let mut opened = Opened::new(there.engine(), image)?;
        there.work.ahead(key_of(id), opened.ahead());
        let mut clicked = Clicked::new(opened);
        (clicked.journal, clicked.stored) = scan.map(NewScan::tell).transpose()?.unzip();
        Ok(clicked)
    };
    let clicked = shared.work.run(key_of(id), Kind::Other, read).await?;
    let clicked = shared.store.put_label(key_of(id), clicked);
    drop(place);
    said(json!({ "session_id": text(id), "session_info": described(id, &clicked, &shared) }))
}

/// The one file of a form.
fn file(headers: &HeaderMap, mut form: Vec<u8>) -> Result<Vec<u8>, Failure> {
    let parts = multipart::parts(headers, &form)?;
    let count = parts.iter().filter(|part| part.name == "files").count();
    let part = multipart::only(&parts, "files").map_err(|e| match count {
        0 => e,
        _ => Failure::unfit(
            "several files: expected one file with all slices, such as NIfTI, NRRD or MetaImage",
        ),
    })?;
    let name = part.file.as_deref().unwrap_or_default().to_lowercase();
    if !SCANS.iter().any(|ending| name.ends_with(ending)) {
        return Err(Failure::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!("the scan's name must end in one of {SCANS:?}"),
        ));
    }
    let content = part.content.clone();
    form.truncate(content.end);
    form.drain(..content.start);
    Ok(form)
}

async fn session(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
    let (id, _, clicked) = shared.store.label(&name, Touch::Look)?;
    said(described(id, &clicked, &shared))
}

async fn remove(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
    let there = shared.clone();
    let end = move |store: &Store| -> Result<Value, Failure> {
        store.end_label(&name).map(|(id, clicked)| described(id, &clicked, &there))
    };
    said(aside(&shared, end).await??)
}

/// The parameters of an inference; other parameters that clients send are for other models.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Asked {
    label: Option<Value>,
    foreground: Option<Vec<Vec<f64>>>,
    background: Option<Vec<Vec<f64>>>,
    /// `[i0, i1, j0, j1, k0, k1]`; both ends are inside it.
    roi: Option<Vec<f64>>,
    reset_state: Option<bool>,
    result_extension: Option<String>,
    result_dtype: Option<String>,
    result_compress: Option<bool>,
}

/// The format of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Output {
    /// A form of the parameters and the mask.
    All,
    Image,
    Json,
}

impl Output {
    fn of(query: &Option<String>) -> Result<Output, Failure> {
        match field(query, "output").as_deref() {
            None | Some("" | "all") => Ok(Output::All),
            Some("image") => Ok(Output::Image),
            Some("json") => Ok(Output::Json),
            Some(other) => Err(Failure::unfit(format!(
                "output is '{}', expected one of [\"image\", \"json\", \"all\"]",
                quoted(other)
            ))),
        }
    }
}

/// The object that a request names.
enum Named {
    /// A session's scan.
    Session(Key, Arc<Clicked>),
    /// A series of the server's folder, by its identifier.
    Series(String),
}

/// The object that a request names, and the format that it asks for. If both a session and a series
/// are named, the session counts.
fn wanted(
    shared: &Shared,
    model: &str,
    query: &Option<String>,
) -> Result<(Named, Output), Failure> {
    if model != MODEL {
        return Err(Failure::unknown(format!("no such model: expected {MODEL}")));
    }
    let name = |what: &str| field(query, what).filter(|name| !name.is_empty());
    let output = Output::of(query)?;
    let named = match (name("session_id"), name("image")) {
        (Some(name), _) => {
            let (_, key, clicked) = shared.store.label(&name, Touch::Active)?;
            Named::Session(key, clicked)
        }
        (None, Some(uid)) if shared.shelf.is_some() => Named::Series(uid),
        _ => {
            let message = "no such image: expected a session (PUT /session/)";
            return Err(Failure::unknown(message));
        }
    };
    Ok((named, output))
}

async fn infer(
    State(shared): State<Arc<Shared>>,
    Path(model): Path<String>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Answer {
    let (parts, body) = request.into_parts();
    let (named, output) = match wanted(&shared, &model, &query) {
        Ok(found) => found,
        Err(wrong) => {
            body::pass_by(&parts.headers, body, shared.most_scan).await;
            return Err(wrong);
        }
    };
    let sent = body::read(&parts.headers, body, body::JSON).await?;
    let (key, clicked) = match named {
        Named::Session(key, clicked) => (key, clicked),
        Named::Series(uid) => datastore::scan(&shared, &uid).await?,
    };
    let start = Instant::now();
    let boundary = format!("prism-{}", text(new_id()?));
    // It must not be dropped before it is known to have been worked on.
    let (headers, held) = (parts.headers, clicked.clone());
    let work = move |turn: &Turn| -> Answer {
        // The request may be long: it is read here, and not on a thread that other requests wait
        // for.
        let asked = asked(&headers, &sent.bytes)?;
        drop(sent);
        let format = asked.format()?;
        let (clicks, beyond) = asked.clicks(&clicked.opened)?;
        let image = &clicked.opened.image;
        clicked.ask(clicks, asked.reset_state == Some(true), turn, |answered| {
            let about = told(&answered, beyond, start);
            if output == Output::Json {
                return said(about);
            }
            let (grid, description) = (&image.grid, &image.description);
            let file = match (format, asked.result_compress) {
                ("nrrd", Some(false)) => plain_nrrd(grid, description, &answered.mask)?,
                _ => {
                    let name = format!("mask.{format}");
                    mask_file(FilePath::new(&name), grid, description, &answered.mask)?
                }
            };
            match output {
                Output::Image => saved("mask", format, file),
                _ => form(&boundary, &about, format, &file),
            }
        })
    };
    let done = shared.work.run(key, Kind::Prediction, work).await;
    shared.store.worked(key);
    tidy(&shared, key, held);
    let response = done?;
    shared.metrics.click(start.elapsed());
    Ok(response)
}

/// The parameters beside a mask.
fn told(answered: &Answered, beyond: usize, start: Instant) -> Value {
    let mut notes = answered.notes.clone();
    if beyond > 0 {
        notes.push(format!("{beyond} clicks lie outside the scan and were ignored"));
    }
    json!({
        "label_names": { (LABEL): 1 },
        "latencies": { "total": start.elapsed().as_secs_f64() },
        "voxels": answered.voxels,
        "score": answered.score,
        "notes": notes,
    })
}

/// The parameters in a body: in a form of several parts, in one of one line, or absent.
fn asked(headers: &HeaderMap, form: &[u8]) -> Result<Asked, Failure> {
    let wrong = |e: serde_json::Error| Failure::unfit(format!("params: {e}"));
    if multipart::is_form(headers) {
        let parts = multipart::parts(headers, form)?;
        if let Some(part) = parts.iter().find(|part| part.file.is_some()) {
            return Err(Failure::unfit(format!(
                "unexpected file '{}': the image is that of the session or the series, and labels \
                 are not accepted",
                quoted(&part.name)
            )));
        }
        return match parts.iter().any(|part| part.name == "params") {
            true => {
                let part = multipart::only(&parts, "params")?;
                body::json(&form[part.content.clone()], wrong)
            }
            false => Ok(Asked::default()),
        };
    }
    // It is copied before it is taken apart.
    body::apart(form.len())?;
    let line = Some(String::from_utf8_lossy(form).into_owned());
    match field(&line, "params").filter(|text| !text.is_empty()) {
        Some(text) => body::json(text.as_bytes(), wrong),
        None => Ok(Asked::default()),
    }
}

/// The parameters in a body for a scan of this size: the format of the mask, and the box.
pub fn wishes(
    headers: &HeaderMap,
    body: &[u8],
    size: [usize; 3],
) -> Result<(&'static str, Option<[usize; 6]>), Failure> {
    let asked = asked(headers, body)?;
    Ok((asked.format()?, asked.bounds(size)?))
}

impl Asked {
    /// The format of the mask, as its file's ending.
    fn format(&self) -> Result<&'static str, Failure> {
        if let Some(dtype) = self.result_dtype.as_deref().filter(|dtype| *dtype != "uint8") {
            return Err(Failure::unfit(format!(
                "result_dtype is '{}', expected uint8",
                quoted(dtype)
            )));
        }
        let Some(ending) = &self.result_extension else { return Ok(MASKS[0]) };
        let asked = ending.trim_start_matches('.').to_lowercase();
        MASKS.into_iter().find(|format| *format == asked).ok_or_else(|| {
            Failure::unfit(format!(
                "result_extension is '{}', expected one of {MASKS:?}",
                quoted(ending)
            ))
        })
    }

    /// The prompts for the object, and the number of clicks outside the scan.
    fn clicks(&self, opened: &Opened) -> Result<(Clicks, usize), Failure> {
        let label = match &self.label {
            Some(Value::String(name)) => name.chars().take(MOST_LABEL).collect(),
            _ => String::new(),
        };
        let mut beyond = 0;
        let mut voxels = |name: &str, given: &Option<Vec<Vec<f64>>>| {
            let given = given.as_deref().unwrap_or_default();
            if given.len() > MOST_CLICKS {
                return Err(Failure::unfit(format!(
                    "{name} has {} clicks: at most {MOST_CLICKS} are accepted",
                    given.len()
                )));
            }
            let mut voxels = vec![];
            for place in given {
                let [i, j, k] = place[..] else {
                    return Err(Failure::unfit(format!(
                        "{name} has a click of {} numbers, expected [i, j, k]",
                        place.len()
                    )));
                };
                match opened.voxel([i, j, k]) {
                    Some(voxel) => voxels.push(voxel),
                    None => beyond += 1,
                }
            }
            Ok(voxels)
        };
        let on = voxels("foreground", &self.foreground)?;
        let off = voxels("background", &self.background)?;
        let bounds = self.bounds(opened.image.grid.size)?;
        Ok((Clicks { label, on, off, bounds }, beyond))
    }

    /// The box, cut off at the faces of a scan.
    fn bounds(&self, size: [usize; 3]) -> Result<Option<[usize; 6]>, Failure> {
        let [i0, i1, j0, j1, k0, k1] = match self.roi.as_deref() {
            None | Some([]) => return Ok(None),
            Some([i0, i1, j0, j1, k0, k1]) => [*i0, *i1, *j0, *j1, *k0, *k1],
            Some(other) => {
                return Err(Failure::unfit(format!(
                    "roi of {} numbers, expected [i0, i1, j0, j1, k0, k1]",
                    other.len()
                )));
            }
        };
        let ends = [[i0, i1], [j0, j1], [k0, k1]].map(|ends| ends.map(f64::round_ties_even));
        let side = |a: usize| {
            let [one, other] = ends[a];
            (one.min(other).max(0.0), (one.max(other) + 1.0).min(size[a] as f64))
        };
        if (0..3).any(|a| side(a).0 >= side(a).1) {
            return Err(Failure::unfit(format!(
                "roi {:?} lies outside the scan of {size:?} voxels",
                [i0, i1, j0, j1, k0, k1]
            )));
        }
        let face = |f: usize| if f < 3 { side(f).0 as usize } else { side(f - 3).1 as usize };
        Ok(Some(std::array::from_fn(face)))
    }
}

/// A form of parameters and a mask, as a file.
fn form(boundary: &str, about: &Value, format: &str, file: &[u8]) -> Answer {
    let head = format!(
        "--{boundary}\r\nContent-Disposition: form-data; name=\"params\"\r\n\
         Content-Type: application/json\r\n\r\n{about}\r\n\
         --{boundary}\r\nContent-Disposition: form-data; name=\"image\"; filename=\"mask.{format}\"\r\n\
         Content-Type: application/octet-stream\r\n\r\n"
    );
    let end = format!("\r\n--{boundary}--\r\n");
    let mut bytes = memory::list(ANSWER, head.len() + file.len() + end.len());
    for part in [head.as_bytes(), file, end.as_bytes()] {
        bytes.extend_from_slice(part);
    }
    let kind = HeaderValue::from_str(&format!("multipart/form-data; boundary={boundary}"))
        .map_err(|e| Failure::bad(e.to_string()))?;
    let mut response = Response::new(body::kept(bytes)?);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_hold_both_ends_and_end_at_the_faces() {
        let of = |text: &str| {
            let asked: Asked = serde_json::from_str(text).unwrap();
            asked.bounds([10, 20, 30])
        };
        assert_eq!(of("{\"roi\":[1,2,3,4,5,6]}"), Ok(Some([1, 3, 5, 3, 5, 7])));
        assert_eq!(of("{\"roi\":[2,1,-5,50,29,29]}"), Ok(Some([1, 0, 29, 3, 20, 30])));
        for text in ["{}", "{\"roi\":null}", "{\"roi\":[]}"] {
            assert_eq!(of(text), Ok(None), "{text}");
        }
        for text in
            ["{\"roi\":[1,2,3,4]}", "{\"roi\":[10,12,0,1,0,1]}", "{\"roi\":[-9,-2,0,1,0,1]}"]
        {
            assert!(of(text).is_err(), "{text}");
        }
    }

    #[test]
    fn formats_are_those_that_are_written() {
        let of = |text: &str| serde_json::from_str::<Asked>(text).unwrap().format();
        for (text, format) in [
            ("{}", "nii.gz"),
            ("{\"result_extension\":\".nrrd\",\"result_dtype\":\"uint8\"}", "nrrd"),
            ("{\"result_extension\":\".NII.GZ\",\"client_id\":\"x\"}", "nii.gz"),
        ] {
            assert_eq!(of(text), Ok(format), "{text}");
        }
        for text in ["../../x.nrrd", ".png", ""] {
            let text = format!("{{\"result_extension\":\"{text}\"}}");
            assert!(of(&text).is_err(), "{text}");
        }
        assert!(of("{\"result_dtype\":\"float32\"}").is_err());
    }

    #[test]
    fn outputs_are_told_apart() {
        let of = |text: &str| Output::of(&Some(text.to_string()));
        assert_eq!((of(""), of("output=all")), (Ok(Output::All), Ok(Output::All)));
        assert_eq!((of("output=image"), of("output=json")), (Ok(Output::Image), Ok(Output::Json)));
        assert!(of("output=dicom_seg").is_err());
    }

    #[test]
    fn params_come_in_either_kind_of_form() {
        let mut headers = HeaderMap::new();
        let line = b"params=%7B%22label%22%3A%22a%22%2C%22foreground%22%3A%5B%5B1%2C2%2C3%5D%5D%7D";
        let of = asked(&headers, line).unwrap();
        assert_eq!((of.label, of.foreground), (Some("a".into()), Some(vec![vec![1.0, 2.0, 3.0]])));
        assert!(asked(&headers, b"").unwrap().foreground.is_none());
        assert!(asked(&headers, b"params=what").is_err());
        let kind = HeaderValue::from_static("multipart/form-data; boundary=b");
        headers.insert(CONTENT_TYPE, kind);
        let part = "--b\r\nContent-Disposition: form-data; name=";
        let of = |text: &str| asked(&headers, format!("{part}{text}\r\n--b--").as_bytes());
        let params = "\"params\"\r\n\r\n{\"roi\":[1,2,3,4,5,6],\"reset_state\":true}";
        assert_eq!(of(params).unwrap().reset_state, Some(true));
        assert!(of("\"other\"\r\n\r\n1").unwrap().roi.is_none());
        assert!(of("\"label\"; filename=\"a.nii.gz\"\r\n\r\n1").is_err());
        assert!(of("\"params\"\r\n\r\n{\"roi\":7}").is_err());
    }
}
