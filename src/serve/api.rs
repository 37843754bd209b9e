//! prism's own interface: scans, objects on them, prompts in, the changed part of a mask out, files
//! in every format that is written. `openapi.json` describes it.

use super::answer::{self, Shown, change};
use super::arrived::{self, Arrived, DICOM, SCANS};
use super::body::{self, Sent};
use super::failure::{Failure, in_turns, reply};
use super::journal::{NewScan, Owner, Source, kept};
use super::opened::Opened;
use super::query::field;
use super::store::{
    Id, Named, Object, Place, REDONE, RESET, SAID, Study, UNDONE, count, key_of, new_id, object_id,
    text,
};
use super::turns::Turn;
use super::work::Kind;
use super::{Route, Shared, aside, tidy};
use crate::message::quoted;
use crate::preview::{Marks, Plane, draw_plane};
use crate::prompt::{Dense, Prompts, RawBox, RawOutline, RawPoint, Space};
use crate::session::Session;
use crate::session::diameters::Diameters;
use crate::session::kept::Writer;
use crate::volume::labels::{Labels, TargetLabel};
use crate::volume::{
    Grid, LabelValues, LabelledObject, Modality, PALETTE, default_colour, labels_file, mask_file,
    scan_file,
};
use axum::body::Body;
use axum::extract::{Path, RawQuery, Request, State};
use axum::http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::Response;
use axum::routing::{get, patch, post, put};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::Path as FilePath;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Objects on a scan, at most: each has a value of a label image's bytes.
const MOST_OBJECTS: usize = 255;
/// Corners of lassos and lines of one interaction, at most: each costs as much as its area.
const MOST_CORNERS: usize = 10_000;
/// Voxels that one interaction speaks of, at most.
const MOST_VOXELS: usize = 1_000_000;
/// Voxels within the corners of a lasso, at most: a slim one that lies across holds few of them.
const MOST_AREA: f64 = 4.0 * MOST_VOXELS as f64;
/// How often voxels are held against corners for the lassos of one interaction, at most.
const MOST_HELD: f64 = 4e9;
/// Letters of an object's name, at most.
const MOST_NAME: usize = 200;
/// Formats that masks and label images are written in.
pub const MASKS: [&str; 5] = ["nii.gz", "nii", "nrrd", "seg.nrrd", "mha"];
/// Formats that masks and label images are written in where the scan may have come as DICOM.
const FILES: [&str; 6] = ["nii.gz", "nii", "nrrd", "seg.nrrd", "mha", "dcm"];
/// Formats that scans are written in.
const IMAGES: [&str; 2] = ["nii.gz", "nii"];

/// What the interface has paths for.
pub fn routes() -> Vec<Route> {
    vec![
        ("/v1", get(about)),
        ("/v1/scans", post(add_scan)),
        ("/v1/scans/{scan}", get(scan).delete(release_scan)),
        ("/v1/scans/{scan}/objects", post(add_object)),
        ("/v1/scans/{scan}/labels", get(labels)),
        ("/v1/scans/{scan}/image", get(image)),
        ("/v1/objects/{object}", patch(rename_object).delete(release_object)),
        ("/v1/objects/{object}/prompts", post(prompts)),
        ("/v1/objects/{object}/prepare", post(prepare)),
        ("/v1/objects/{object}/undo", post(undo)),
        ("/v1/objects/{object}/redo", post(redo)),
        ("/v1/objects/{object}/reset", post(reset)),
        ("/v1/objects/{object}/answer", get(answer)),
        ("/v1/objects/{object}/unsure", get(unsure)),
        ("/v1/objects/{object}/preview", get(preview)),
        ("/v1/objects/{object}/mask", put(give_mask).get(mask)),
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

/// Takes a scan. Its content says what it is; of its name the ending is held against that.
async fn add_scan(
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
            format!("a scan's name ends in one of {SCANS:?}, or of DICOM in one of {DICOM:?}"),
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
        there.work.ahead(opened.ahead());
        let mut study = Study::new(opened);
        (study.journal, study.stored) = on_disk.map(NewScan::tell).transpose()?.unzip();
        Ok(Ok(study))
    };
    let study = match shared.work.run(key_of(id), Kind::Other, read).await? {
        Ok(study) => study,
        Err(list) => {
            let error = "holds several series of images: ask for one of them by ?series=";
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
    let place = match shared.store.keep() {
        Ok(place) => place,
        Err(full) => {
            body::pass_by(headers, body, shared.most_scan).await;
            return Err(full);
        }
    };
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

/// An object of the scan that is called `scan`.
fn described_object(scan: Id, object: &Object) -> Value {
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

async fn scan(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
    let (id, _, study) = shared.store.scan(&name)?;
    let mut about = described(id, &study);
    about["objects"] = study.objects().iter().map(|o| described_object(id, o)).collect();
    Ok(reply(StatusCode::OK, &about))
}

fn released() -> Answer {
    Ok(reply(StatusCode::OK, &json!({ "released": true })))
}

async fn release_scan(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
    aside(&shared, move |store| store.release_scan(&name)).await?;
    released()
}

async fn release_object(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
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

/// JSON of a body; where there is none, what stands for nothing said.
fn json_of<T: serde::de::DeserializeOwned + Default>(bytes: &[u8]) -> Result<T, Failure> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(T::default());
    }
    serde_json::from_slice(bytes).map_err(|e| Failure::bad(format!("the body: {e}")))
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
            return Err(Failure::unfit(format!("a name of more than {MOST_NAME} letters")));
        }
        // Files have a line for it.
        if name.chars().any(char::is_control) {
            return Err(Failure::unfit(format!("a name '{}': expected one line", quoted(name))));
        }
        Ok(about)
    }
}

/// Calls an object otherwise, or gives it another colour.
async fn rename_object(
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

async fn add_object(
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

/// What is said in one interaction. Places are voxels of the scan, `[x, y, z]`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Said {
    points: Vec<Point>,
    #[serde(rename = "box")]
    bounds: Option<Ends>,
    scribbles: Vec<Scribble>,
    lassos: Vec<Lasso>,
    lines: Vec<Ends>,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Point {
    at: [f64; 3],
    #[serde(default = "yes")]
    on: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ends {
    from: [f64; 3],
    to: [f64; 3],
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Scribble {
    #[serde(default = "yes")]
    on: bool,
    voxels: Vec<[f64; 3]>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Lasso {
    #[serde(default = "yes")]
    on: bool,
    axis: usize,
    slice: f64,
    outline: Vec<[f64; 2]>,
}

impl Said {
    /// An error where lines and lassos are larger than anybody draws: what they cost is known
    /// before they are followed.
    fn drawable(&self) -> Result<(), Failure> {
        for Ends { from, to } in &self.lines {
            let length = (0..3).map(|a| (to[a] - from[a]).abs()).fold(0.0, f64::max);
            if length > MOST_VOXELS as f64 {
                return Err(Failure::unfit(format!(
                    "a line over {length} voxels: at most {MOST_VOXELS} are taken"
                )));
            }
        }
        let mut held = 0.0;
        for Lasso { outline, .. } in &self.lassos {
            let side = |n: usize| {
                let along = || outline.iter().map(|corner| corner[n]);
                let low = along().fold(f64::INFINITY, f64::min);
                (along().fold(f64::NEG_INFINITY, f64::max) - low + 1.0).max(1.0)
            };
            let area = side(0) * side(1);
            held += area * outline.len() as f64;
            if area > MOST_AREA || held > MOST_HELD {
                return Err(Failure::unfit(format!(
                    "a lasso over {area} voxels of {} corners, after others or by itself: at most \
                     {MOST_AREA} voxels are taken, and over all lassos {MOST_HELD} voxels times \
                     corners",
                    outline.len()
                )));
            }
        }
        Ok(())
    }

    /// What was said, as a session takes it.
    fn prompts(&self, grid: &Grid) -> Result<Prompts, Failure> {
        let corners = self.lassos.iter().map(|l| l.outline.len()).sum::<usize>();
        if corners + self.lines.len() > MOST_CORNERS {
            return Err(Failure::unfit(format!(
                "{corners} corners of lassos and {} lines: at most {MOST_CORNERS} are taken",
                self.lines.len()
            )));
        }
        self.drawable()?;
        let mut prompts = Prompts::default();
        let unfit = |e: crate::prompt::PromptError| Failure::unfit(e.to_string());
        let few = |prompts: &Prompts| match prompts.points.len() {
            0..=MOST_VOXELS => Ok(()),
            many => Err(Failure::unfit(format!(
                "{many} voxels are spoken of: at most {MOST_VOXELS} are taken"
            ))),
        };
        let points = self.points.iter().map(|p| (p.at, p.on));
        let painted = self.scribbles.iter().flat_map(|s| s.voxels.iter().map(move |v| (*v, s.on)));
        for (position, positive) in points.chain(painted) {
            let point = RawPoint { position, positive };
            prompts.add_point(grid, point, Space::Ijk).map_err(unfit)?;
        }
        few(&prompts)?;
        if let Some(Ends { from, to }) = &self.bounds {
            // Both corners lie in the box.
            let face = |f: usize| match f {
                0..3 => from[f].min(to[f]),
                _ => from[f - 3].max(to[f - 3]) + 1.0,
            };
            let bounds = RawBox(std::array::from_fn(face));
            prompts.set_box(grid, bounds, Space::Ijk).map_err(unfit)?;
        }
        for Ends { from, to } in &self.lines {
            let ends = RawBox([from[0], from[1], from[2], to[0], to[1], to[2]]);
            prompts.add_line(grid, ends, Space::Ijk).map_err(unfit)?;
            few(&prompts)?;
        }
        for lasso in &self.lassos {
            let corner = |[a, b]: [f64; 2]| match lasso.axis {
                0 => Ok([lasso.slice, a, b]),
                1 => Ok([a, lasso.slice, b]),
                2 => Ok([a, b, lasso.slice]),
                other => Err(Failure::unfit(format!("a lasso's axis is {other}, expected 0 to 2"))),
            };
            let corners =
                lasso.outline.iter().map(|c| corner(*c)).collect::<Result<Vec<_>, _>>()?;
            let mut drawn = Prompts::default();
            drawn.add_lasso(grid, &RawOutline(corners), Space::Ijk).map_err(unfit)?;
            if !lasso.on {
                // What is outlined does not lie on the object, and says nothing of its size.
                drawn.points.iter_mut().for_each(|(_, positive)| *positive = false);
                drawn.drawn = None;
            }
            prompts.join(&drawn);
            few(&prompts)?;
        }
        match prompts.is_empty() && prompts.drawn.is_none() {
            true => Err(Failure::unfit(
                "nothing is said: expected points, a box, scribbles, lassos or lines",
            )),
            false => Ok(prompts),
        }
    }
}

/// What a body says on a scan.
pub fn prompts_of(bytes: &[u8], grid: &Grid) -> Result<Prompts, Failure> {
    let said: Said = json_of(bytes)?;
    said.prompts(grid)
}

/// What was done to an object, in words for its caller.
struct Done {
    before: Shown,
    notes: Vec<String>,
}

/// What work on an object's session is done with.
struct At<'a> {
    study: &'a Study,
    object: &'a Object,
    turn: &'a Turn,
}

/// Has an object's work done when its turn comes, and tells what changed.
async fn work_on<F>(shared: Arc<Shared>, name: &str, kind: Kind, work: F) -> Answer
where
    F: FnOnce(&mut Session, &At<'_>) -> Result<Done, Failure> + Send + 'static,
{
    let (scan, study, object) = shared.store.object(name)?;
    // What is held is not let go before it is known to have been worked on.
    let (start, held) = (Instant::now(), study.clone());
    let run = move |turn: &Turn| {
        let mut session = object.session();
        let at = At { study: &study, object: &object, turn };
        let Done { before, notes } = work(&mut session, &at)?;
        told(&session, &object, &study.opened.image.grid, before, notes, start)
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

/// The answer as it stands, and what of it changed.
fn told(
    session: &Session,
    object: &Object,
    grid: &Grid,
    before: Shown,
    notes: Vec<String>,
    start: Instant,
) -> Answer {
    let after = session.prediction().cloned();
    let changed = change(grid, &before, &after);
    let voxels = after.as_ref().map_or(0, |p| p.field.voxels());
    count(object, voxels);
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
        "seconds": start.elapsed().as_secs_f64(),
    });
    packed(&about, changed.map_or_else(Vec::new, |c| c.bits(&after)))
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
) -> Result<Done, Failure> {
    let before = session.prediction().cloned();
    let head = |out: &mut Writer| out.number(at.object.number);
    let more = kept(at.study.journal.as_ref(), session, SAID, head, |session| {
        in_turns(at.turn, |o| {
            session
                .interact_observed(prompts, o)
                .map(|p| p.notes.iter().map(|n| n.to_string()).collect::<Vec<_>>())
        })
    })?;
    notes.extend(more);
    Ok(Done { before, notes })
}

/// A move in a session's history; false where there is none to make.
fn moved(
    session: &mut Session,
    at: &At,
    kind: u8,
    go: impl FnOnce(&mut Session) -> bool,
) -> Result<bool, Failure> {
    let before = at.study.journal.as_ref().map(|journal| (journal, session.saved()));
    let went = go(session);
    if let Some((journal, before)) = before.filter(|_| went) {
        journal.note(kind, |out| out.number(at.object.number)).inspect_err(|_| {
            session.restore(before);
        })?;
        if kind == RESET {
            journal.shrank();
        }
    }
    Ok(went)
}

/// What is sent for an object, whose scan is not let go while it comes.
async fn sent_to(
    shared: &Shared,
    name: &str,
    request: Request,
    most: usize,
) -> Result<Sent, Failure> {
    let held = shared.store.object(name)?;
    let (parts, body) = request.into_parts();
    let sent = body::read(&parts.headers, body, most).await?;
    shared.store.worked(held.0);
    Ok(sent)
}

async fn prompts(
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

/// Has the places encoded where a first click at a point is looked at, when nobody waits for the
/// network. Nothing is said by that, and nothing kept.
async fn prepare(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    request: Request,
) -> Answer {
    let sent = sent_to(&shared, &name, request, body::SHORT).await?;
    let Expected { point } = json_of(&sent.bytes)?;
    let position = point.ok_or_else(|| Failure::unfit("nothing is said: expected a point"))?;
    let (_, study, object) = shared.store.object(&name)?;
    let mut prompts = Prompts::default();
    let point = RawPoint { position, positive: true };
    let added = prompts.add_point(&study.opened.image.grid, point, Space::Ijk);
    added.map_err(|e| Failure::unfit(e.to_string()))?;
    // While something is done with the object, nobody knows whether a click will be a first one.
    let session = object.idle_session();
    let places = session.map_or_else(|| Ok(vec![]), |mut session| session.ahead_of(&prompts))?;
    let count = places.len();
    shared.work.ahead(places);
    Ok(reply(StatusCode::ACCEPTED, &json!({ "places": count })))
}

async fn give_mask(
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
        there.work.ahead(session.ahead());
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
        let before = session.prediction().cloned();
        match moved(session, at, record, go)? {
            true => Ok(Done { before, notes: vec![] }),
            false => Err(Failure::new(StatusCode::CONFLICT, format!("there is nothing to {what}"))),
        }
    })
    .await
}

async fn undo(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
    step(shared, &name, "undo", UNDONE, Session::undo).await
}

async fn redo(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
    step(shared, &name, "redo", REDONE, Session::redo).await
}

async fn reset(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
    work_on(shared, &name, Kind::Short, |session, at| {
        let before = session.prediction().cloned();
        moved(session, at, RESET, |session| {
            session.reset();
            true
        })?;
        Ok(Done { before, notes: vec![] })
    })
    .await
}

async fn answer(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
    work_on(shared, &name, Kind::Short, |_, _| Ok(Done { before: None, notes: vec![] })).await
}

/// The voxels that the network is unsure of.
async fn unsure(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Answer {
    let (scan, study, object) = shared.store.object(&name)?;
    let find = move |_: &Turn| {
        let session = object.session();
        let shown = session.prediction().cloned();
        let said = session.said().iter().map(|s| s.voxel).collect();
        drop(session);
        Ok::<_, Failure>(answer::unsure(&shown, &said))
    };
    let found = shared.work.run(scan, Kind::Other, find).await;
    shared.store.worked(scan);
    drop(study);
    let (change, bits) = found?.unzip();
    let about = json!({
        "voxels": change.as_ref().map_or(0, |c| c.voxels),
        "region": change.as_ref().map(|c| c.ranges()),
    });
    packed(&about, bits.unwrap_or_default())
}

/// The plane and the slice that a query asks for on a grid: the axial one where it names none, and
/// no slice where it has no number.
fn look_of(
    query: &Option<String>,
    grid: &Grid,
) -> Result<(&'static Plane, Option<usize>), Failure> {
    let asked = field(query, "plane").unwrap_or_else(|| "axial".into()).to_lowercase();
    let plane = Plane::named(&asked).ok_or_else(|| {
        let asked = quoted(&asked);
        Failure::bad(format!("plane is '{asked}', expected axial, coronal or sagittal"))
    })?;
    let Some(text) = field(query, "slice") else { return Ok((plane, None)) };
    let axis = plane.axis(grid);
    let (axis, count) = (["x", "y", "z"][axis], grid.size[axis]);
    let last = count.saturating_sub(1);
    let expected = format!("slice is '{}', expected 0 to {last} along {axis}", quoted(&text));
    match text.parse() {
        Ok(slice) if slice < count => Ok((plane, Some(slice))),
        Ok(_) => Err(Failure::unfit(expected)),
        Err(_) => Err(Failure::bad(expected)),
    }
}

/// A slice of the scan with the object's contour, as a picture.
async fn preview(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
) -> Answer {
    let (scan, study, object) = shared.store.object(&name)?;
    let (plane, slice) = look_of(&query, &study.opened.image.grid)?;
    let held = study.clone();
    let draw = move |_: &Turn| -> Result<Vec<u8>, Failure> {
        let (shown, marks) = {
            let session = object.session();
            (session.prediction().cloned(), Marks::holding(session.said()))
        };
        let answer = shown.as_ref().map(|shown| &shown.field);
        let picture = draw_plane(&study.opened.image, answer, &marks, plane, slice);
        picture.png().map_err(|e| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, e))
    };
    let picture = shared.work.run(scan, Kind::Other, draw).await;
    shared.store.worked(scan);
    drop(held);
    let mut response = Response::new(body::kept(picture?)?);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("image/png"));
    Ok(response)
}

/// The format that a query asks for, of those that there are.
fn format_of(
    query: &Option<String>,
    all: &'static [&'static str],
) -> Result<&'static str, Failure> {
    let asked = field(query, "format").unwrap_or_else(|| all[0].into()).to_lowercase();
    all.iter().copied().find(|format| *format == asked).ok_or_else(|| {
        Failure::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!("format is '{}', expected one of {all:?}", quoted(&asked)),
        )
    })
}

/// A file to be saved.
pub fn saved(name: &str, format: &str, bytes: Vec<u8>) -> Answer {
    let mut response = Response::new(body::kept(bytes)?);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    if let Ok(value) = HeaderValue::from_str(&format!("attachment; filename=\"{name}.{format}\"")) {
        headers.insert(CONTENT_DISPOSITION, value);
    }
    Ok(response)
}

async fn mask(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
) -> Answer {
    let format = format_of(&query, &FILES)?;
    let (scan, study, object) = shared.store.object(&name)?;
    let held = study.clone();
    let write = move |_: &Turn| -> Result<Vec<u8>, Failure> {
        let (image, mask) = (&study.opened.image, object.session().mask());
        let name = format!("mask.{format}");
        Ok(mask_file(FilePath::new(&name), &image.grid, &image.description, &mask)?)
    };
    let file = shared.work.run(scan, Kind::Other, write).await;
    shared.store.worked(scan);
    drop(held);
    saved("mask", format, file?)
}

/// The scan itself, for viewers that do not read what it came as.
async fn image(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
) -> Answer {
    let format = format_of(&query, &IMAGES)?;
    let (_, scan, study) = shared.store.scan(&name)?;
    let held = study.clone();
    let write = move |_: &Turn| -> Result<Vec<u8>, Failure> {
        Ok(scan_file(FilePath::new(&format!("scan.{format}")), &study.opened.image)?)
    };
    let file = shared.work.run(scan, Kind::Other, write).await;
    shared.store.worked(scan);
    drop(held);
    saved("scan", format, file?)
}

/// An object as a segmentation names it.
fn labelled(object: &Object) -> LabelledObject {
    let Named { name, colour } = object.named();
    LabelledObject { name, colour: colour.into() }
}

async fn labels(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
) -> Answer {
    let format = format_of(&query, &FILES)?;
    let (_, scan, study) = shared.store.scan(&name)?;
    let held = study.clone();
    let write = move |_: &Turn| -> Result<Vec<u8>, Failure> {
        let image = &study.opened.image;
        let objects = study.objects().clone();
        let mut joined = LabelValues::nothing(image.grid.voxels(), objects.len());
        for (number, object) in objects.iter().enumerate() {
            let answer = object.session().prediction().cloned();
            if let Some(answer) = answer {
                answer.field.each(|at, logit| {
                    if logit > 0.0 {
                        joined.replace(at, (number + 1) as u16);
                    }
                });
            }
        }
        let objects: Vec<LabelledObject> = objects.iter().map(|o| labelled(o)).collect();
        Ok(labels_file(FilePath::new(&format!("labels.{format}")), image, &joined, &objects)?)
    };
    let file = shared.work.run(scan, Kind::Other, write).await;
    shared.store.worked(scan);
    drop(held);
    saved("labels", format, file?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::Affine;

    #[test]
    fn headers_are_ascii() {
        let text = ascii("{\"a\":\"ä😀\"}");
        assert_eq!(text, "{\"a\":\"\\u00e4\\ud83d\\ude00\"}");
        let back: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(back["a"], "ä😀");
    }

    #[test]
    fn a_picture_is_of_a_plane_and_a_slice_that_there_are() {
        // Its axes run up, to the right and to the front: what lies across differs.
        let rows = [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]];
        let grid = Grid { size: [40, 30, 20], affine: Affine(rows) };
        let of = |query: &str| {
            let query = Some(query.to_string());
            look_of(&query, &grid).map(|(plane, slice)| (plane.axis(&grid), slice))
        };
        assert_eq!(
            look_of(&None, &grid).map(|(plane, slice)| (plane.axis(&grid), slice)),
            Ok((0, None))
        );
        assert_eq!(of("slice=39"), Ok((0, Some(39))));
        assert_eq!(of("plane=Coronal&slice=19"), Ok((2, Some(19))));
        assert_eq!(of("slice=0&plane=sagittal"), Ok((1, Some(0))));
        for (query, status, says) in [
            ("plane=oblique", StatusCode::BAD_REQUEST, "expected axial, coronal or sagittal"),
            ("plane=", StatusCode::BAD_REQUEST, "expected axial, coronal or sagittal"),
            ("slice=40", StatusCode::UNPROCESSABLE_ENTITY, "'40', expected 0 to 39 along x"),
            ("plane=sagittal&slice=30", StatusCode::UNPROCESSABLE_ENTITY, "0 to 29 along y"),
            ("slice=-1", StatusCode::BAD_REQUEST, "'-1', expected 0 to 39 along x"),
            ("slice=1.5", StatusCode::BAD_REQUEST, "expected 0 to 39"),
            ("slice=", StatusCode::BAD_REQUEST, "expected 0 to 39"),
            ("slice=99999999999999999999", StatusCode::BAD_REQUEST, "expected 0 to 39"),
        ] {
            let failure = of(query).unwrap_err();
            assert!(failure.message().contains(says), "{query}: {failure:?}");
            assert_eq!(failure.reply("error").status(), status, "{query}");
        }
    }

    #[test]
    fn prompts_are_read_as_documented() {
        let grid = Grid { size: [40, 30, 20], affine: Affine::from_spacing([1.0; 3]) };
        let of = |text: &str| prompts_of(text.as_bytes(), &grid);
        let said = of("{\"points\":[{\"at\":[1,2,3]},{\"at\":[4,5,6],\"on\":false}],\
             \"box\":{\"from\":[9,8,7],\"to\":[1,2,3]},\
             \"scribbles\":[{\"on\":false,\"voxels\":[[7,8,9]]}]}")
        .unwrap();
        assert_eq!(said.points, [([1, 2, 3], true), ([4, 5, 6], false), ([7, 8, 9], false)]);
        // Both corners lie in the box, in whatever order.
        assert_eq!(said.bounds, Some([1, 2, 3, 10, 9, 8]));
        let outline = "[[5,5],[5,15],[15,15],[15,5]]";
        for (axis, at) in [(0, [7, 10, 10]), (1, [10, 7, 10]), (2, [10, 10, 7])] {
            let lasso = |on: bool| {
                of(&format!(
                    "{{\"lassos\":[{{\"on\":{on},\"axis\":{axis},\"slice\":7,\"outline\":{outline}}}]}}"
                ))
                .unwrap()
            };
            let (on, off) = (lasso(true), lasso(false));
            assert!(on.points.contains(&(at, true)) && on.drawn.is_some(), "{axis}");
            assert!(off.points.contains(&(at, false)) && off.drawn.is_none(), "{axis}");
        }
        let line = of("{\"lines\":[{\"from\":[5,5,5],\"to\":[15,5,5]}]}").unwrap();
        assert!(line.drawn.is_some() && line.points.contains(&([10, 5, 5], true)));
        // What costs more than anybody draws.
        let list = |one: &str, count: usize| vec![one; count].join(",");
        let many_corners = format!(
            "{{\"lassos\":[{{\"axis\":0,\"slice\":7,\"outline\":[{}]}}]}}",
            list("[5,5],[5,15],[15,15]", 3334)
        );
        let many_voxels =
            format!("{{\"scribbles\":[{{\"voxels\":[{}]}}]}}", list("[1,2,3]", MOST_VOXELS + 1));
        // What a small text may ask for on a large slice.
        let wide = Grid { size: [30_000, 30_000, 1], affine: Affine::from_spacing([1.0; 3]) };
        let outline = |side: usize, times: usize| {
            let corners = format!("[0,0],[0,{side}],[{side},{side}],[{side},0]");
            format!(
                "{{\"lassos\":[{{\"axis\":2,\"slice\":0,\"outline\":[{}]}}]}}",
                list(corners.as_str(), times)
            )
        };
        let line = "{\"lines\":[{\"from\":[0,0,0],\"to\":[2e6,0,0]}]}";
        for (text, says) in [
            (outline(29_999, 1), "lasso over 900000000 voxels of 4 corners"),
            (outline(1_999, 251), "lasso over 4000000 voxels of 1004 corners"),
            (line.to_string(), "line over 2000000 voxels"),
        ] {
            let said: Said = json_of(text.as_bytes()).unwrap();
            let failure = said.prompts(&wide).unwrap_err();
            assert!(format!("{failure:?}").contains(says), "{failure:?}");
            assert_eq!(failure.reply("error").status(), StatusCode::UNPROCESSABLE_ENTITY);
        }
        let failure = of(&many_corners).unwrap_err();
        assert!(format!("{failure:?}").contains("10002 corners"), "{failure:?}");
        for (text, status) in [
            ("", StatusCode::UNPROCESSABLE_ENTITY),
            ("{}", StatusCode::UNPROCESSABLE_ENTITY),
            ("{\"points\":[{\"at\":[40,0,0]}]}", StatusCode::UNPROCESSABLE_ENTITY),
            ("{\"points\":[{\"at\":[0.5,0,0]}]}", StatusCode::UNPROCESSABLE_ENTITY),
            (
                "{\"lassos\":[{\"axis\":3,\"slice\":1,\"outline\":[[1,1]]}]}",
                StatusCode::UNPROCESSABLE_ENTITY,
            ),
            (many_corners.as_str(), StatusCode::UNPROCESSABLE_ENTITY),
            (many_voxels.as_str(), StatusCode::UNPROCESSABLE_ENTITY),
            ("{\"point\":[]}", StatusCode::BAD_REQUEST),
            ("{\"points\":[{\"at\":[1,2]}]}", StatusCode::BAD_REQUEST),
            ("garbage", StatusCode::BAD_REQUEST),
        ] {
            let failure = of(text).unwrap_err();
            assert_eq!(failure.reply("error").status(), status, "{text}");
        }
    }
}
