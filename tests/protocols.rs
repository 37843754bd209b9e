//! ITK-SNAP's and MONAI Label's protocols as their clients meet them: by a client of HTTP of the
//! test's own, the answers held against the library's; by MONAI Label's own client; beside
//! ITK-SNAP's own server.
#![cfg(feature = "serve")]

mod common;
#[path = "protocols/geometry.rs"]
mod geometry;
#[path = "common/http.rs"]
mod http;
#[path = "common/viewer.rs"]
mod viewer;
#[cfg(feature = "dicom")]
#[path = "common/dicom.rs"]
mod writer;

use common::here;
use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use http::{BOX, CLICK, Part, Reply, Running, ask, example, get, post, said, session, started};
use prism::serve::{Secret, Settings};
use prism::volume::{Affine, Description, Element, Grid, Volume, mask_file, plain_nrrd};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

const BOUNDARY: &str = "----a boundary of this test";

fn form(parts: &[Part]) -> Vec<u8> {
    http::form(BOUNDARY, parts)
}

fn send(at: SocketAddr, method: &str, path: &str, parts: &[Part]) -> Reply {
    send_form(at, method, path, &form(parts))
}

fn send_form(at: SocketAddr, method: &str, path: &str, body: &[u8]) -> Reply {
    let kind = format!("multipart/form-data; boundary=\"{BOUNDARY}\"");
    ask(at, method, path, &[("Content-Type", &kind)], body)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = GzEncoder::new(vec![], Compression::fast());
    packed.write_all(bytes).unwrap();
    packed.finish().unwrap()
}

fn gunzip(bytes: &[u8]) -> Vec<u8> {
    let mut data = vec![];
    GzDecoder::new(bytes).read_to_end(&mut data).unwrap();
    data
}

/// What base64 stands for (RFC 4648).
fn from_base64(text: &str) -> Vec<u8> {
    let letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    assert_eq!(text.len() % 4, 0);
    let mut bytes = vec![];
    for four in text.as_bytes().chunks(4) {
        let told = four.iter().filter(|c| **c != b'=').count();
        let bits = four.iter().fold(0u32, |bits, c| {
            let value = if *c == b'=' { Some(0) } else { letters.find(*c as char) };
            (bits << 6) | value.expect("a letter of base64") as u32
        });
        bytes.extend(&bits.to_be_bytes()[1..told]);
    }
    bytes
}

/// A volume as ITK-SNAP sends it: what is said of it, and its voxels, x fastest.
struct Sent {
    size: [usize; 3],
    metadata: Value,
    packed: Vec<u8>,
}

impl Sent {
    fn new(size: [usize; 3], spacing: [f64; 3], values: &[f32]) -> Sent {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let metadata = json!({
            "dimensions": size, "spacing": spacing, "origin": [10, 20, 30],
            "direction": [1, 0, 0, 0, 1, 0, 0, 0, 1],
            "components_per_pixel": 1, "component_type": "float",
        });
        Sent { size, metadata, packed: gzip(&bytes) }
    }

    /// A volume of the same kind in which some voxels are marked.
    fn marks(size: [usize; 3], is_marked: impl Fn([usize; 3]) -> bool) -> Sent {
        let values: Vec<f32> =
            voxels(size).map(|voxel| f32::from(u8::from(is_marked(voxel)))).collect();
        Sent::new(size, [1.0; 3], &values)
    }

    fn form(&self) -> Vec<u8> {
        let metadata = self.metadata.to_string();
        form(&[("file", Some("image.gz"), &self.packed), ("metadata", None, metadata.as_bytes())])
    }
}

/// All voxels of a volume, x fastest.
fn voxels([ni, nj, nk]: [usize; 3]) -> impl Iterator<Item = [usize; 3]> {
    (0..ni * nj * nk).map(move |at| [at % ni, at / ni % nj, at / ni / nj])
}

/// The example as ITK-SNAP sends it, and as the library has it.
fn example_of_snap() -> (Sent, Arc<Volume>) {
    let image = example();
    let size = image.grid.size;
    let [di, dj, dk] = image.grid.spacing();
    let values: Vec<f32> = voxels(size).map(|voxel| image.at(voxel)).collect();
    let affine = Affine([[-di, 0.0, 0.0, -10.0], [0.0, -dj, 0.0, -20.0], [0.0, 0.0, dk, 30.0]]);
    let grid = Grid { size, affine };
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let description = Description::of_new(&grid, "float32");
    let volume = Volume::of_elements(grid, Element::Float32, bytes, description).unwrap();
    (Sent::new(size, [di, dj, dk], &values), Arc::new(volume))
}

/// The mask of an answer, as the library orders masks.
#[track_caller]
fn mask_of(reply: &Reply, size: [usize; 3]) -> Vec<u8> {
    let answer = reply.json(200);
    assert_eq!(answer["status"], "success");
    let data = gunzip(&from_base64(answer["result"].as_str().unwrap()));
    let [ni, nj, nk] = size;
    assert_eq!(data.len(), ni * nj * nk);
    let mut mask = vec![0; data.len()];
    for ([i, j, k], value) in voxels(size).zip(data) {
        mask[(i * nj + j) * nk + k] = value;
    }
    mask
}

/// A session of ITK-SNAP's.
fn start(at: SocketAddr, path: &str) -> String {
    get(at, path).json(200)["session_id"].as_str().unwrap().to_string()
}

fn counted(at: SocketAddr, line: &str) -> bool {
    get(at, "/metrics").text().lines().any(|l| l == line)
}

#[test]
fn itk_snap_is_spoken_to_by_both_generations_of_its_paths() {
    let server = started(Settings::default());
    let at = server.address;
    let status = get(at, "/status").json(200);
    assert_eq!(status["status"], "ok");
    let version: Vec<u32> =
        status["version"].as_str().unwrap().split('.').map(|n| n.parse().unwrap()).collect();
    assert!(version >= vec![0, 1, 2]);
    let models = get(at, "/v2/models").json(200);
    assert_eq!(models["models"][0]["id"], "nnInteractive");
    assert_eq!(get(at, "/v2/start_session/other").status, 404);
    let (sent, image) = example_of_snap();
    let size = sent.size;
    let (off, [i, j, k]) = ([72, 71, 14], CLICK);
    for (first, upload, points) in [
        ("/v2/start_session/nnInteractive", "/v2/upload_raw", "/v2/process_point_interaction"),
        ("/start_session", "/upload_raw", "/process_point_interaction"),
    ] {
        let name = start(at, first);
        let early = get(at, &format!("{points}/{name}?point=1&point=2&point=3"));
        assert!(early.error(400, "detail").contains("upload_raw"));
        let path = format!("{upload}/{name}?filename=upload.nii.gz");
        assert!(send_form(at, "POST", &path, &sent.form()).json(200)["message"].is_string());
        let mut library = session(&image);
        let on = get(at, &format!("{points}/{name}?point={i}&point={j}&point={k}&foreground=true"));
        library.interact(&said(&[(CLICK, true)], None)).unwrap();
        let one = mask_of(&on, size);
        assert!(one == library.mask() && one.contains(&1));
        let [x, y, z] = off;
        let less = get(at, &format!("{points}/{name}?x={x}&y={y}&z={z}&foreground=false"));
        library.interact(&said(&[(off, false)], None)).unwrap();
        assert!(mask_of(&less, size) == library.mask());
        // Beyond the image a click counts for nothing.
        let far = get(at, &format!("{points}/{name}?point=-90&point=2&point=3&foreground=true"));
        assert!(mask_of(&far, size) == library.mask());
        for query in ["", "point=1&point=2", "x=1&y=2", "x=a&y=1&z=1", "x=1&y=1&z=1&foreground=x"] {
            assert_eq!(get(at, &format!("{points}/{name}?{query}")).status, 422, "{query}");
        }
        // What was painted holds; of an outline what lies within is taken away.
        let at_voxel = |v: [usize; 3]| (v[0] * size[1] + v[1]) * size[2] + v[2];
        let painted = |v: [usize; 3]| (76..86).contains(&v[0]) && v[1] == 75 && v[2] == 14;
        let path = format!("/process_scribble_interaction/{name}?foreground=true");
        let reply = send_form(at, "POST", &path, &Sent::marks(size, painted).form());
        let mask = mask_of(&reply, size);
        assert!(voxels(size).filter(|v| painted(*v)).all(|v| mask[at_voxel(v)] == 1));
        let within = |n: usize| (74..88).contains(&n);
        let rim = |n: usize| n == 74 || n == 87;
        let outline =
            |v: [usize; 3]| v[2] == 14 && within(v[0]) && within(v[1]) && (rim(v[0]) || rim(v[1]));
        let path = format!("/process_lasso_interaction/{name}?foreground=false");
        let reply = send_form(at, "POST", &path, &Sent::marks(size, outline).form());
        assert_eq!(mask_of(&reply, size)[at_voxel([81, 81, 14])], 0);
        let other = Sent::marks([4, 5, 6], |_| true).form();
        assert_eq!(send_form(at, "POST", &path, &other).status, 400);
        // Another object, from its beginning.
        let reset = get(at, &format!("/reset_interactions/{name}")).json(200);
        assert_eq!(reset, json!({ "status": "success" }));
        let again = get(at, &format!("{points}/{name}?x={i}&y={j}&z={k}&foreground=1"));
        assert!(mask_of(&again, size) == one);
        assert!(counted(at, "prism_sessions 1"));
        assert!(get(at, &format!("/end_session/{name}")).json(200)["message"].is_string());
        for path in [
            format!("{points}/{name}?point=1&point=2&point=3"),
            format!("/v2/reset_interactions/{name}"),
            format!("/v2/end_session/{name}"),
        ] {
            assert!(get(at, &path).error(404, "detail").contains("no such session"), "{path}");
        }
        // Who sends much before it listens hears of it too.
        let late = send_form(at, "POST", &format!("{upload}/{name}"), &sent.form());
        assert!(late.error(404, "detail").contains("no such session"));
    }
    assert!(counted(at, "prism_sessions 0"));
}

#[test]
fn what_is_wrong_with_a_volume_is_told() {
    let server = started(Settings::default());
    let at = server.address;
    let name = start(at, "/start_session");
    let path = format!("/upload_raw/{name}");
    let sent = Sent::marks([4, 5, 6], |_| true);
    let with = |key: &str, value: Value| {
        let mut metadata = sent.metadata.clone();
        metadata[key] = value;
        Sent { metadata, packed: sent.packed.clone(), ..sent }.form()
    };
    let metadata = sent.metadata.to_string();
    let file: Part = ("file", Some("image.gz"), &sent.packed);
    let meta: Part = ("metadata", None, metadata.as_bytes());
    for (body, status, says) in [
        (form(&[meta]), 422, "no part 'file'"),
        (form(&[file]), 422, "no part 'metadata'"),
        (form(&[file, file, meta]), 422, "several parts 'file'"),
        (form(&[file, ("metadata", None, b"{}")]), 422, "dimensions"),
        (form(&[file, ("metadata", None, &[b' '; 70_000])]), 413, "metadata of 70000 bytes"),
        (form(&[("file", None, b"plain"), meta]), 422, "gzip"),
        (with("dimensions", json!([4, 5])), 422, "2 dimensions"),
        (with("dimensions", json!([4, 5, 7])), 422, "gzip"),
        (with("dimensions", json!([4, 5, 5])), 422, "more bytes"),
        (with("dimensions", json!([1 << 20, 1 << 20, 1 << 20])), 413, "at most"),
        (with("components_per_pixel", json!(3)), 422, "3 components"),
        (with("spacing", json!([1, 1])), 422, "spacing"),
        (with("direction", json!([0, 0, 0, 0, 0, 0, 0, 0, 0])), 422, "inverted"),
        (b"nothing".to_vec(), 400, "breaks off"),
    ] {
        let error = send_form(at, "POST", &path, &body).error(status, "detail");
        assert!(error.contains(says), "{error}");
    }
    let plain = ask(at, "POST", &path, &[("Content-Type", "text/plain")], b"x");
    assert!(plain.error(415, "detail").contains("multipart/form-data"));
    let huge = [("Content-Length", "99999999999999")];
    assert_eq!(ask(at, "POST", &path, &huge, b"").status, 413);
    // A third dimension that is none, and geometry that nobody gave.
    let flat = Sent::new([4, 5, 1], [1.0; 3], &[1.0; 20]);
    let metadata = b"{\"dimensions\":[4,5,1]}";
    let parts: [Part; 2] = [("metadata", None, metadata), ("file", None, &flat.packed)];
    assert_eq!(send(at, "POST", &path, &parts).status, 200);
}

#[test]
fn where_a_token_is_needed_itk_snap_has_a_door_of_its_own() {
    let token = Some(Secret::new("a secret").unwrap());
    let page = "https://pages.example";
    let allow_origin = Some(page.into());
    let settings = Settings { token, allow_origin, dls: Some(0), ..Settings::default() };
    let mut server = started(settings);
    let (at, own) = (server.address, server.dls.expect("an address of its own"));
    assert!(own.ip().is_loopback() && own != at);
    for path in ["/status", "/v2/models", "/start_session", "/info/", "/auth/"] {
        assert_eq!(get(at, path).error(401, "detail"), "Missing bearer token", "{path}");
    }
    let bearer = [("Authorization", "Bearer a secret")];
    assert_eq!(ask(at, "GET", "/status", &bearer, b"").status, 200);
    // Nothing else is to be had there, and no page that is open in a browser gets in.
    for path in ["/", "/v1", "/claim", "/metrics", "/info/", "/openapi.json"] {
        assert_eq!(get(own, path).status, 404, "{path}");
    }
    assert_eq!(get(own, "/healthz").status, 200);
    for header in [
        ("Host", "evil.example:8911"),
        ("Origin", "https://evil.example"),
        // What may call where a token is asked for may not where none is.
        ("Origin", page),
        ("Sec-Fetch-Site", "cross-site"),
        ("Sec-Fetch-Site", "same-site"),
    ] {
        assert_eq!(ask(own, "GET", "/start_session", &[header], b"").status, 403, "{header:?}");
    }
    let name = start(own, "/start_session");
    let (sent, _) = example_of_snap();
    let path = format!("/upload_raw/{name}?filename=upload.nii.gz");
    assert_eq!(send_form(own, "POST", &path, &sent.form()).status, 200);
    let [i, j, k] = CLICK;
    let point = format!("/process_point_interaction/{name}?x={i}&y={j}&z={k}&foreground=true");
    let reply = get(own, &point);
    assert!(mask_of(&reply, sent.size).contains(&1));
    // One session, whichever door it is asked for at.
    assert_eq!(get(at, &point).status, 401);
    let same = ask(at, "GET", &point, &bearer, b"");
    assert!(mask_of(&same, sent.size) == mask_of(&reply, sent.size));
    server.end();
    assert!(std::net::TcpStream::connect(own).is_err());
    // Where there is no token the first door is for all, and there is no other.
    let open = started(Settings::default());
    assert!(open.dls.is_none());
    let page = [("Sec-Fetch-Site", "cross-site")];
    assert_eq!(ask(open.address, "GET", "/start_session", &page, b"").status, 403);
    assert_eq!(ask(open.address, "GET", "/", &page, b"").status, 200);
    let here = [("Sec-Fetch-Site", "same-origin")];
    assert_eq!(ask(open.address, "GET", "/v1", &here, b"").status, 200);
}

/// Tries again until something is so, or it takes too long.
#[track_caller]
fn soon(mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < end, "it does not come to be");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// A session of MONAI Label's for the example.
fn created(at: SocketAddr) -> String {
    let file = std::fs::read(here("examples/data/lung1_image.nii.gz")).unwrap();
    let parts: [Part; 2] =
        [("client_id", None, b"somebody"), ("files", Some("lung.nii.gz"), &file)];
    let created = send(at, "PUT", "/session/", &parts).json(200);
    assert_eq!(created["session_info"]["name"], created["session_id"]);
    created["session_id"].as_str().unwrap().to_string()
}

#[test]
fn sessions_that_nobody_uses_are_let_go_and_make_room() {
    let idle = Duration::from_secs(12);
    let server = started(Settings { idle, max_sessions: 2, ..Settings::default() });
    let at = server.address;
    let label = created(at);
    let name = start(at, "/start_session");
    assert!(counted(at, "prism_sessions 2"));
    let full = get(at, "/v2/start_session/nnInteractive");
    assert!(full.error(503, "detail").contains("capacity (2 sessions)"));
    assert_eq!(full.header("Retry-After"), Some("10"));
    let parts: [Part; 1] = [("files", Some("lung.nii.gz"), b"anything")];
    assert_eq!(send(at, "PUT", "/session/", &parts).status, 503);
    assert_eq!(post(at, "/claim", &json!({})).status, 503);
    soon(|| counted(at, "prism_sessions 0"));
    assert_eq!(get(at, &format!("/reset_interactions/{name}")).status, 404);
    assert_eq!(get(at, &format!("/session/{label}")).status, 404);
    start(at, "/start_session");
}

/// The parts of an answer: what is said, the file's name, the file.
#[track_caller]
fn parts_of(reply: &Reply) -> (Value, String, Vec<u8>) {
    assert_eq!(reply.status, 200, "{}", reply.text());
    let kind = reply.header("Content-Type").unwrap();
    let boundary = kind.strip_prefix("multipart/form-data; boundary=").expect(kind);
    let delimiter = format!("--{boundary}\r\n");
    let body = reply.body.strip_prefix(delimiter.as_bytes()).expect("a first part");
    let find = |bytes: &[u8], what: &str| {
        bytes.windows(what.len()).position(|w| w == what.as_bytes()).expect("a part")
    };
    let next = find(body, &format!("\r\n{delimiter}"));
    let (first, second) = (&body[..next], &body[next + 2 + delimiter.len()..]);
    let second = second.strip_suffix(format!("\r\n--{boundary}--\r\n").as_bytes()).unwrap();
    let content = |part: &[u8]| part[find(part, "\r\n\r\n") + 4..].to_vec();
    let head = String::from_utf8_lossy(&second[..find(second, "\r\n\r\n")]).into_owned();
    assert!(first.starts_with(b"Content-Disposition: form-data; name=\"params\"\r\n"));
    let (_, name) = head.split_once("name=\"image\"; filename=\"").expect("a name");
    let name = name.split('"').next().unwrap().to_string();
    (serde_json::from_slice(&content(first)).unwrap(), name, content(second))
}

fn infer(at: SocketAddr, name: &str, params: &Value) -> Reply {
    let params = params.to_string();
    let path = format!("/infer/prism?image=lung&session_id={name}");
    send(at, "POST", &path, &[("params", None, params.as_bytes())])
}

/// Asks for the mask of clicks, and holds its file against the library's.
#[track_caller]
fn clicked(at: SocketAddr, name: &str, mut params: Value, image: &Volume, expected: &[u8]) {
    params["label"] = "tumour".into();
    params["result_extension"] = ".nrrd".into();
    params["result_dtype"] = "uint8".into();
    params["client_id"] = "somebody".into();
    let (told, file, bytes) = parts_of(&infer(at, name, &params));
    assert_eq!(file, "mask.nrrd");
    let written = mask_file(Path::new("m.nrrd"), &image.grid, &image.description, expected);
    assert!(bytes == written.unwrap(), "{params}");
    assert_eq!(told["label_names"], json!({ "tumour": 1 }));
    let voxels = expected.iter().filter(|v| **v != 0).count();
    assert_eq!(told["voxels"], json!(voxels));
}

#[test]
fn monai_label_is_spoken_to_by_all_clicks_each_time() {
    let server = started(Settings::default());
    let at = server.address;
    let info = get(at, "/info/").json(200);
    for key in [
        "name",
        "description",
        "version",
        "labels",
        "models",
        "trainers",
        "strategies",
        "scoring",
        "train_stats",
        "datastore",
    ] {
        assert!(info.get(key).is_some(), "{key}");
    }
    // OHIF's extension adds to the list of all labels.
    assert_eq!(info["labels"], json!(["tumour"]));
    assert_eq!((&info["strategies"], &info["datastore"]), (&json!({}), &json!({})));
    let model = &info["models"]["prism"];
    assert_eq!((&model["type"], &model["dimension"]), (&json!("deepgrow"), &json!(3)));
    assert_eq!(model["labels"], json!({ "tumour": 1 }));
    assert_eq!(get(at, "/auth/").json(200), json!({ "enabled": false }));
    let name = created(at);
    let name = name.as_str();
    let about = get(at, &format!("/session/{name}")).json(200);
    assert_eq!((&about["name"], &about["expiry"]), (&json!(name), &json!(600)));

    let image = Arc::new(example());
    let mut library = session(&image);
    let (off, other) = ([72, 71, 14], [84, 82, 14]);
    // Nothing said yet is nothing found.
    clicked(at, name, json!({}), &image, &library.mask());
    library.interact(&said(&[(CLICK, true)], None)).unwrap();
    let one = library.mask();
    let first = json!({ "foreground": [CLICK], "background": [] });
    clicked(at, name, first.clone(), &image, &one);
    // What is said again is not said twice; what is new goes on from there.
    clicked(at, name, first.clone(), &image, &one);
    library.interact(&said(&[(other, true), (off, false)], None)).unwrap();
    let two = library.mask();
    let both = json!({ "foreground": [CLICK, other], "background": [off] });
    clicked(at, name, both.clone(), &image, &two);
    // What is taken back brings the answer before back, to the bit.
    clicked(at, name, first.clone(), &image, &one);
    clicked(at, name, both, &image, &two);
    // Other clicks are another object's, and so are those of another label.
    let mut anew = session(&image);
    anew.interact(&said(&[(other, true)], None)).unwrap();
    clicked(at, name, json!({ "foreground": [other] }), &image, &anew.mask());
    let told = infer(at, name, &json!({ "label": "liver", "foreground": [other, CLICK] }));
    let mut fresh = session(&image);
    fresh.interact(&said(&[(other, true), (CLICK, true)], None)).unwrap();
    let (told, file, _) = parts_of(&told);
    assert_eq!(told["voxels"], json!(fresh.prediction().unwrap().field.voxels()));
    assert_eq!(file, "mask.nii.gz");
    // From the beginning where that is asked for; a box, with both its ends; a click elsewhere.
    let reset = json!({ "foreground": [CLICK], "reset_state": true });
    clicked(at, name, reset, &image, &one);
    let [i0, j0, k0, i1, j1, k1] = BOX;
    let roi = json!([i0, i1 - 1, j0, j1 - 1, k0, k1 - 1]);
    let mut boxed = session(&image);
    boxed.interact(&said(&[], Some(BOX))).unwrap();
    clicked(at, name, json!({ "roi": roi, "reset_state": true }), &image, &boxed.mask());
    boxed.interact(&said(&[(CLICK, true)], None)).unwrap();
    let far = json!({ "roi": roi, "foreground": [CLICK, [9999, 0, 0]] });
    clicked(at, name, far, &image, &boxed.mask());

    // The same as a file alone, as words alone, packed or not; in a form of one line.
    let path = |output: &str| format!("/infer/prism?image=x&session_id={name}&output={output}");
    let params =
        json!({ "foreground": [CLICK], "result_extension": ".nrrd", "result_compress": false });
    let params = params.to_string();
    let part: [Part; 1] = [("params", None, params.as_bytes())];
    let plain = send(at, "POST", &path("image"), &part);
    let written = plain_nrrd(&image.grid, &image.description, &one).unwrap();
    assert!(plain.status == 200 && plain.body == written);
    let disposition = plain.header("Content-Disposition").unwrap();
    assert_eq!(disposition, "attachment; filename=\"mask.nrrd\"");
    let words = send(at, "POST", &path("json"), &part).json(200);
    assert_eq!(words["label_names"], json!({ "tumour": 1 }));
    let line = format!(
        "params=%7B%22foreground%22%3A%5B%5B{},{},{}%5D%5D%7D",
        CLICK[0], CLICK[1], CLICK[2]
    );
    let kind = [("Content-Type", "application/x-www-form-urlencoded")];
    let reply = ask(at, "POST", &path("image"), &kind, line.as_bytes());
    let written = mask_file(Path::new("m.nii.gz"), &image.grid, &image.description, &one);
    assert!(reply.body == written.unwrap());

    let removed = ask(at, "DELETE", &format!("/session/{name}"), &[], b"").json(200);
    assert_eq!(removed["name"], json!(name));
    let gone = ask(at, "DELETE", &format!("/session/{name}"), &[], b"");
    assert!(gone.error(404, "detail").contains("no such session"));
    assert_eq!(get(at, &format!("/session/{name}")).status, 404);
    assert_eq!(infer(at, name, &json!({})).status, 404);
    assert!(counted(at, "prism_sessions 0"));
}

#[test]
fn what_is_wrong_is_told_to_clients_of_monai_label() {
    let server = started(Settings::default());
    let at = server.address;
    let scan = std::fs::read(here("examples/data/lung1_image.nii.gz")).unwrap();
    let file = |name: &'static str| -> Part { ("files", Some(name), &scan) };
    let lost = "data file: Cargo.toml";
    let detached =
        format!("NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n{lost}\n\n");
    for (parts, status, says) in [
        (vec![("client_id", None, &b"x"[..])], 422, "no part 'files'"),
        (vec![file("a.nii.gz"), file("b.nii.gz")], 422, "several files"),
        (vec![file("a.dcm")], 415, ".nii.gz"),
        (vec![("files", Some("a.nii.gz"), &b"not a scan"[..])], 422, "is not recognised"),
        (vec![("files", Some("../../a.nrrd"), detached.as_bytes())], 422, "in another file"),
    ] {
        let error = send(at, "PUT", "/session/", &parts).error(status, "detail");
        assert!(error.contains(says), "{error}");
    }
    assert_eq!(ask(at, "PUT", "/session/", &[], b"").status, 415);
    let name = created(at);
    let path = format!("/infer/prism?session_id={name}");
    let with = |params: Value| infer(at, &name, &params);
    let label: [Part; 1] = [("label", Some("a.nii.gz"), b"x")];
    let none: [Part; 1] = [("params", None, b"{}")];
    for (reply, status, says) in [
        (with(json!({ "foreground": [[1, 2]] })), 422, "2 numbers"),
        (with(json!({ "foreground": [["a", 2, 3]] })), 422, "params"),
        (with(json!({ "foreground": vec![[1, 2, 3]; 1_001] })), 422, "at most 1000"),
        (with(json!({ "roi": [1, 2] })), 422, "roi of 2"),
        (with(json!({ "roi": [9000, 9001, 0, 1, 0, 1] })), 422, "outside the scan"),
        (with(json!({ "result_extension": "/../a.nrrd" })), 422, "result_extension"),
        (with(json!({ "result_dtype": "float32" })), 422, "uint8"),
        (send(at, "POST", &path, &label), 422, "'label'"),
        (send(at, "POST", &format!("{path}&output=dicom_seg"), &none), 422, "output"),
        (send(at, "POST", "/infer/prism?image=1.2.3", &none), 404, "PUT /session/"),
        (send(at, "POST", "/infer/prism?session_id=lost", &none), 404, "no such session"),
        (send(at, "POST", &format!("/infer/other?session_id={name}"), &none), 404, "no such model"),
        (ask(at, "POST", &path, &[("Content-Length", "20000000")], b""), 413, "at most"),
    ] {
        let error = reply.error(status, "detail");
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn whatever_is_sent_is_answered() {
    let server = started(Settings::default());
    let at = server.address;
    let name = start(at, "/start_session");
    let size = [6, 5, 4];
    let image = Sent::new(size, [1.0; 3], &(0..120).map(|n| n as f32).collect::<Vec<_>>());
    let upload = format!("/upload_raw/{name}");
    assert_eq!(send_form(at, "POST", &upload, &image.form()).status, 200);
    let empty = Sent::marks(size, |_| false).form();
    let grid = Grid { size, affine: Affine::from_spacing([1.0; 3]) };
    let description = Description::of_new(&grid, "uint8");
    let scan = mask_file(Path::new("a.nii.gz"), &grid, &description, &[1; 120]).unwrap();
    let scan = form(&[("files", Some("a.nii.gz"), &scan)]);
    let label = send_form(at, "PUT", "/session/", &scan).json(200);
    let label = label["session_id"].as_str().unwrap();
    let params = form(&[("params", None, b"{\"label\":\"a\",\"foreground\":[],\"roi\":[]}")]);
    let seeds = [
        ("POST", upload, image.form()),
        ("POST", format!("/process_scribble_interaction/{name}?foreground=true"), empty.clone()),
        ("POST", format!("/process_lasso_interaction/{name}?foreground=false"), empty),
        ("PUT", "/session/".to_string(), scan),
        ("POST", format!("/infer/prism?session_id={label}"), params),
    ];
    let mut rng = StdRng::seed_from_u64(23);
    let mut statuses = BTreeMap::<u16, usize>::new();
    for round in 0..1000 {
        let (method, path, seed) = &seeds[round % seeds.len()];
        let mut body = seed.clone();
        match rng.random_range(0..5) {
            0 => body.truncate(rng.random_range(0..body.len())),
            1 => {
                let at = rng.random_range(0..body.len());
                body.insert(at, rng.random());
            }
            2 => {
                // A piece of it again, elsewhere.
                let from = rng.random_range(0..body.len());
                let piece = body[from..body.len().min(from + 40)].to_vec();
                let to = rng.random_range(0..body.len());
                body.splice(to..to, piece);
            }
            _ => {
                for _ in 0..rng.random_range(1..6) {
                    let at = rng.random_range(0..body.len());
                    body[at] = if rng.random() { rng.random() } else { b"\r\n\"-"[at % 4] };
                }
            }
        }
        let reply = send_form(at, method, path, &body);
        *statuses.entry(reply.status).or_default() += 1;
        // A fault of the server's own would be 500.
        let known = [200, 400, 413, 415, 422, 503].contains(&reply.status);
        assert!(known, "{path} in round {round}: {} {}", reply.status, reply.text());
        // What was taken is let go, so that there is room for more.
        if reply.status == 200 && *method == "PUT" {
            let made = reply.json(200)["session_id"].as_str().unwrap().to_string();
            ask(at, "DELETE", &format!("/session/{made}"), &[], b"");
        }
    }
    assert!(
        statuses[&400] > 100 && statuses[&422] > 50 && statuses.contains_key(&200),
        "{statuses:?}"
    );
    assert_eq!(get(at, "/healthz").status, 200);
}

/// Series of a folder, as OHIF's extension of MONAI Label and 3D Slicer's ask for them.
#[cfg(feature = "dicom")]
mod by_series {
    use super::writer::{
        COLUMNS, ROWS, SLICES, Series, at, identified, numbers, short, slice, straight, text, words,
    };
    use super::*;
    use dicom_core::VR;
    use dicom_dictionary_std::tags;
    use prism::serve::Keep;

    /// The example as a series, and a small one.
    pub const EXAMPLE: &str = "1.2.3.4";
    const SMALL: &str = "1.2.9";

    /// Writes the example as a series.
    pub fn file_example(folder: &Path) -> PathBuf {
        file_scan(folder, &example())
    }

    /// Writes a scan as a series: the same voxels at the same places, in two folders, in files
    /// whose names say nothing, the last slice first. Its axes run at right angles.
    pub fn file_scan(folder: &Path, image: &Volume) -> PathBuf {
        let [ni, nj, nk] = image.grid.size;
        let rows = image.grid.affine.0;
        let spacing = image.grid.spacing();
        let [di, dj, _] = spacing;
        // Along a row, then along a column, without what computing added to short numbers.
        let orientation = std::array::from_fn(|n| {
            let (axis, r) = (n / 3, n % 3);
            let along = rows[r][axis] / spacing[axis];
            short_number(if r < 2 { -along } else { along })
        });
        let series = Series { bits: 16, orientation, ..Series::new("CT") };
        assert_eq!(series.uid, EXAMPLE);
        let folders = ["study 1", "study 1/more of it"].map(|name| folder.join(name));
        folders.iter().for_each(|folder| std::fs::create_dir_all(folder).unwrap());
        for k in 0..nk {
            // Millimetres of DICOM run to the left and to the back.
            let place: [f64; 3] = std::array::from_fn(|r| {
                let along = rows[r][2] * k as f64 + rows[r][3];
                short_number(if r < 2 { -along } else { along })
            });
            let mut file = series.file(k, place);
            identified(&mut file);
            file.put(short(tags::ROWS, nj as u16));
            file.put(short(tags::COLUMNS, ni as u16));
            file.put(short(tags::PIXEL_REPRESENTATION, 1));
            let apart = [dj, di].map(short_number);
            file.put(text(tags::PIXEL_SPACING, VR::DS, &numbers(&apart)));
            let voxel = |at: usize| image.at([at % ni, at / ni, k]) as i16 as u16;
            file.put(words((0..ni * nj).map(voxel).collect()));
            series.write(file, &folders[k % 2].join(format!("{:03}", nk - k)));
        }
        folder.into()
    }

    /// A number to nine places behind the point, and no less than nothing where it is nothing.
    fn short_number(v: f64) -> f64 {
        (v * 1e9).round() / 1e9 + 0.0
    }

    /// Writes a small series of slices that lie where `place` says.
    fn file_small(folder: &Path, slices: usize, place: impl Fn(usize) -> [f64; 3]) {
        let series = Series { uid: SMALL, number: "7", description: "Bone", ..Series::new("CT") };
        std::fs::create_dir_all(folder).unwrap();
        for k in 0..slices {
            let mut file = series.file(k, place(k));
            identified(&mut file);
            file.put(words(slice(k)));
            series.write(file, &at(folder, k));
        }
    }

    /// What OHIF's extension asks.
    fn asked(on: &[[usize; 3]]) -> Value {
        json!({
            "foreground": on, "background": [], "result_extension": ".nrrd",
            "result_dtype": "uint8", "result_compress": false, "restore_label_idx": false,
        })
    }

    fn infer(there: SocketAddr, uid: &str, output: &str, params: &Value) -> Reply {
        let params = params.to_string();
        let path = format!("/infer/prism?image={uid}&output={output}");
        send(there, "POST", &path, &[("params", None, params.as_bytes())])
    }

    /// The file of the library's mask of the example.
    fn mask_of(library: &prism::Session, image: &Volume) -> Vec<u8> {
        plain_nrrd(&image.grid, &image.description, &library.mask()).unwrap()
    }

    #[test]
    fn series_of_a_folder_are_worked_on_as_scans_that_are_sent() {
        let folder = tempfile::tempdir().unwrap();
        file_example(folder.path());
        file_small(&folder.path().join("other"), SLICES, straight);
        std::fs::write(folder.path().join("notes.txt"), "no image").unwrap();
        let whole = std::fs::read(at(&folder.path().join("other"), 0)).unwrap();
        std::fs::write(folder.path().join("damaged.dcm"), &whole[..200]).unwrap();
        let dicom = Some(folder.path().into());
        let server = started(Settings { dicom, ..Settings::default() });
        let there = server.address;
        // What is damaged is named, and ends nothing.
        let told = |text: &String| text.contains("damaged.dcm") && text.contains("truncated");
        assert!(server.warnings.iter().any(told), "{:?}", server.warnings);

        // What there is.
        let info = get(there, "/info/").json(200);
        assert_eq!(info["datastore"]["total"], json!(2));
        assert!(info["strategies"]["random"].is_object());
        let status = json!({ "total": 2, "completed": 0, "label_tags": {} });
        for path in ["/datastore/", "/datastore/?output=stats"] {
            assert_eq!(get(there, path).json(200), status, "{path}");
        }
        assert_eq!(get(there, "/datastore/?output=train").json(200), json!([]));
        assert_eq!(get(there, "/datastore/?output=other").status, 422);
        let listed = get(there, "/datastore/?output=all");
        let objects = listed.json(200)["objects"].as_object().unwrap().clone();
        assert_eq!(objects.keys().collect::<Vec<_>>(), [EXAMPLE, SMALL]);
        assert_eq!(objects[SMALL]["labels"], json!({}));
        let image = Arc::new(example());
        let about = get(there, &format!("/datastore/image/info?image={EXAMPLE}"));
        let told = about.json(200);
        assert_eq!(told, objects[EXAMPLE]["image"]["info"]);
        assert_eq!(told["name"], json!(format!("{EXAMPLE}.nii.gz")));
        assert_eq!(told["StudyInstanceUID"], "1.2.3.1");
        assert_eq!((&told["Modality"], &told["shape"]), (&json!("CT"), &json!(image.grid.size)));
        let small = &objects[SMALL]["image"]["info"];
        assert_eq!(small["SeriesDescription"], "Bone");
        assert_eq!(small["shape"], json!([COLUMNS, ROWS, SLICES]));
        // Nothing of whose it is, and not where it lies.
        for text in [listed.text(), about.text()] {
            let secrets = ["Sample", "P-17", "19600102", folder.path().to_str().unwrap()];
            assert!(secrets.iter().all(|secret| !text.contains(secret)), "{text}");
        }
        let sample = post(there, "/activelearning/random", &json!({ "client_id": "a" })).json(200);
        let id = sample["id"].as_str().unwrap();
        assert!(objects.contains_key(id) && sample["SeriesInstanceUID"] == json!(id));
        assert!(counted(there, "prism_sessions 0"));

        // A series is the same scan as the file that it was made of: so are its masks.
        let path = format!("/datastore/image?image={EXAMPLE}");
        assert_eq!(ask(there, "HEAD", &path, &[], b"").status, 200);
        let given = Volume::of_file(get(there, &path).body, None).unwrap();
        assert!(given.grid == image.grid && given.values() == image.values());
        assert!(counted(there, "prism_sessions 1"));
        let name = created(there);
        let mut library = session(&image);
        let mut masks = vec![];
        for on in [&[CLICK][..], &[CLICK, [84, 82, 14]]] {
            library.interact(&said(&[(on[on.len() - 1], true)], None)).unwrap();
            let reply = infer(there, EXAMPLE, "image", &asked(on));
            assert_eq!(reply.status, 200, "{}", reply.text());
            assert!(reply.body == mask_of(&library, &image));
            let (_, file, sent) = parts_of(&super::infer(there, &name, &asked(on)));
            assert!(file == "mask.nrrd" && sent == reply.body);
            let (words, _, form) = parts_of(&infer(there, EXAMPLE, "", &asked(on)));
            assert!(form == reply.body && words["label_names"] == json!({ "tumour": 1 }));
            masks.push(reply.body);
        }
        assert!(infer(there, EXAMPLE, "image", &asked(&[CLICK])).body == masks[0]);
        assert!(counted(there, "prism_sessions 2"));
        // Where a session is named it counts, as 3D Slicer names both.
        let gone = format!("/infer/prism?image={EXAMPLE}&session_id=lost");
        let reply = send(there, "POST", &gone, &[("params", None, b"{}")]);
        assert!(reply.error(404, "detail").contains("no such session"));
    }

    #[test]
    fn what_is_no_series_is_never_looked_for_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let small = folder.path().join("other");
        // A slice is missing.
        file_small(&small, 6, |k| straight(if k < 3 { k } else { k + 1 }));
        let token = Some(Secret::new("a secret").unwrap());
        let dicom = Some(folder.path().to_path_buf());
        let server = started(Settings { dicom: dicom.clone(), ..Settings::default() });
        let there = server.address;
        let file = at(&small, 0).display().to_string();
        for name in [
            "1.2.3",
            "..",
            "../",
            "../../etc/passwd",
            "%2e%2e%2fother%2fIM0000",
            "other/IM0000",
            &file,
            "%00",
            "7",
            "Bone",
            "",
        ] {
            let status = if name.is_empty() { 422 } else { 404 };
            for path in ["/datastore/image", "/datastore/image/info"] {
                let error = get(there, &format!("{path}?image={name}")).error(status, "detail");
                assert!(error.contains("no image is named") || error.contains("no such image"));
            }
            let error = infer(there, name, "image", &asked(&[])).error(404, "detail");
            assert!(error.contains("no such image"), "{name}: {error}");
        }
        assert_eq!(get(there, "/datastore/image").status, 422);
        assert_eq!(ask(there, "HEAD", "/datastore/image?image=1.2.3", &[], b"").status, 404);
        let path = format!("/datastore/image?image={SMALL}");
        assert_eq!(ask(there, "HEAD", &path, &[], b"").status, 422);
        assert_eq!(post(there, "/activelearning/first", &json!({})).status, 404);
        // What cannot be one scan is not offered; asked for, it says why, and not where it lies.
        assert_eq!(get(there, "/info/").json(200)["datastore"]["total"], json!(0));
        assert_eq!(post(there, "/activelearning/random", &json!({})).json(200), json!({}));
        let error = infer(there, SMALL, "image", &asked(&[])).error(422, "detail");
        let place = folder.path().to_str().unwrap();
        assert!(error.contains("a slice is missing") && !error.contains(place), "{error}");
        assert!(counted(there, "prism_sessions 0"));
        // Who may not call may not here either.
        let token = started(Settings { token, dicom, dls: Some(0), ..Settings::default() });
        for path in ["/datastore/", "/datastore/image/info?image=1.2.9"] {
            assert_eq!(get(token.address, path).status, 401, "{path}");
            assert_eq!(get(token.dls.unwrap(), path).status, 404, "{path}");
            let evil = [("Host", "evil.example"), ("Authorization", "Bearer a secret")];
            assert_eq!(ask(token.address, "GET", path, &evil, b"").status, 403, "{path}");
        }
        assert_eq!(infer(token.address, SMALL, "image", &asked(&[])).status, 401);
        // Where there is no folder.
        let none = started(Settings::default());
        for path in ["/datastore/", "/datastore/image?image=1.2.9"] {
            assert!(get(none.address, path).error(404, "detail").contains("--dicom"), "{path}");
        }
        assert_eq!(post(none.address, "/activelearning/random", &json!({})).status, 404);
        let error = infer(none.address, SMALL, "image", &asked(&[])).error(404, "detail");
        assert!(error.contains("PUT /session/"), "{error}");
        let refused = |dicom: PathBuf, keep: Option<Keep>| {
            let bind = "127.0.0.1:0".into();
            let settings = Settings { bind, dicom: Some(dicom), keep, ..Settings::default() };
            prism::serve::Server::open(settings, http::model(), "small").err().unwrap()
        };
        let error = refused("no such folder".into(), None);
        assert!(error.starts_with("no such folder: "), "{error}");
        // What is sent would be a series for all.
        let error = refused(folder.path().into(), Some(Keep::at(folder.path().join("state"))));
        assert!(error.contains("would be served to others"), "{error}");
        assert!(!folder.path().join("state").exists());
    }

    #[test]
    fn series_that_come_later_are_found_and_those_that_grow_are_read_anew() {
        let folder = tempfile::tempdir().unwrap();
        let small = folder.path().join("other");
        file_small(&small, 3, straight);
        let (idle, dicom) = (Duration::from_secs(1), Some(folder.path().into()));
        let server = started(Settings { idle, dicom, ..Settings::default() });
        let there = server.address;
        assert_eq!(slices_of_small(there), Some(3));
        let example = format!("/datastore/image/info?image={EXAMPLE}");
        assert_eq!(get(there, &example).status, 404);
        file_small(&small, 4, straight);
        file_example(folder.path());
        soon(|| slices_of_small(there) == Some(4));
        soon(|| get(there, &example).status == 200);
        assert_eq!(get(there, "/info/").json(200)["datastore"]["total"], json!(2));
    }

    /// How many slices a server finds of the small series; none where it says to ask again later.
    fn slices_of_small(there: SocketAddr) -> Option<usize> {
        let reply = get(there, &format!("/datastore/image?image={SMALL}"));
        if reply.status == 503 {
            assert!(reply.error(503, "detail").contains("ask again"));
            assert!(reply.header("Retry-After").is_some());
            return None;
        }
        assert_eq!(reply.status, 200, "{}", reply.text());
        Some(Volume::of_file(reply.body, None).unwrap().grid.size[2])
    }

    #[test]
    fn a_series_that_is_held_is_read_anew_when_its_files_are_others() {
        let folder = tempfile::tempdir().unwrap();
        let (small, all) = (folder.path().join("served/small"), folder.path().join("all"));
        file_small(&all, 4, straight);
        std::fs::create_dir_all(&small).unwrap();
        let come = |k: usize| std::fs::copy(at(&all, k), at(&small, k)).unwrap();
        for k in 0..3 {
            come(k);
        }
        let dicom = Some(folder.path().join("served"));
        let server = started(Settings { dicom, ..Settings::default() });
        let there = server.address;
        assert_eq!(slices_of_small(there), Some(3));
        // Who asks all the time does not keep it as it was: neither where slices come...
        come(3);
        soon(|| slices_of_small(there) == Some(4));
        // ... nor where one that was read is written over...
        std::fs::copy(at(&all, 0), at(&small, 3)).unwrap();
        soon(|| slices_of_small(there) == Some(3));
        // ... nor where they go.
        std::fs::remove_dir_all(&small).unwrap();
        soon(|| get(there, &format!("/datastore/image?image={SMALL}")).status == 404);
        assert!(counted(there, "prism_sessions 0"));
    }

    #[test]
    fn clients_who_ask_at_once_have_one_scan_and_their_own_masks() {
        let folder = tempfile::tempdir().unwrap();
        file_example(&folder.path().join("series"));
        file_small(&folder.path().join("series/other"), SLICES, straight);
        let state = folder.path().join("state");
        let server = started(Settings {
            dicom: Some(folder.path().join("series")),
            keep: Some(Keep::at(&state)),
            // Were it read twice there would be no place for it.
            max_sessions: 1,
            ..Settings::default()
        });
        let there = server.address;
        let image = Arc::new(example());
        let clicks = [CLICK, [84, 82, 14], [78, 84, 14]];
        let ask_for = |click: [usize; 3]| {
            (0..3).map(|_| infer(there, EXAMPLE, "image", &asked(&[click]))).collect::<Vec<_>>()
        };
        let answers = std::thread::scope(|scope| {
            let threads = clicks.map(|click| scope.spawn(move || ask_for(click)));
            threads.map(|thread| thread.join().unwrap())
        });
        for (click, replies) in clicks.into_iter().zip(answers) {
            let mut library = session(&image);
            library.interact(&said(&[(click, true)], None)).unwrap();
            let expected = mask_of(&library, &image);
            for reply in replies {
                assert_eq!(reply.status, 200, "{}", reply.text());
                assert!(reply.body == expected, "{click:?}");
            }
        }
        assert!(counted(there, "prism_sessions 1"));
        // A series that nobody uses gives way, to another one and to what is sent.
        assert_eq!(slices_of_small(there), Some(SLICES));
        assert!(counted(there, "prism_sessions 1"));
        let sent = created(there);
        let full = infer(there, SMALL, "image", &asked(&[]));
        assert!(full.error(503, "detail").contains("capacity (1 sessions)"));
        assert_eq!(ask(there, "DELETE", &format!("/session/{sent}"), &[], b"").status, 200);
        // Nothing of a series is kept: it is there, and its clients say all clicks each time.
        assert_eq!(std::fs::read_dir(&state).unwrap().count(), 1);
    }
}

/// Python with packages of a folder of their own, which are fetched where that can be; none, and a
/// word of it, where it cannot. `fetched` are the arguments of pip, a call each.
fn python_with(folder: &str, import: &str, fetched: &[&[&str]]) -> Option<PathBuf> {
    let required = std::env::var_os("PRISM_TEST_TOOLS").is_some_and(|v| v == "required");
    let at = Path::new(env!("CARGO_TARGET_TMPDIR")).join(folder);
    let there = || python(&at, &["-c", import]).is_some_and(|out| out.status.success());
    if !there() {
        for packages in fetched {
            let to = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target"];
            let _ = python(&at, &[&to[..], &[at.to_str().unwrap()][..], *packages].concat());
        }
    }
    if !there() {
        let why = format!("{folder} cannot be had on this machine");
        assert!(!required, "{why}");
        common::skipped(&why);
        return None;
    }
    Some(at)
}

fn python(packages: &Path, args: &[&str]) -> Option<Output> {
    let mut command = Command::new("python3");
    // The server is here, whatever stands between this machine and others.
    command.args(args).env("PYTHONPATH", packages).env("NO_PROXY", "127.0.0.1");
    command.output().ok()
}

/// Runs a client of tests/clients against a server.
#[track_caller]
fn all_is_well(packages: &Path, client: &str, server: &Running, args: &[&str]) {
    let script = here("tests/clients").join(client);
    let url = format!("http://{}", server.address);
    let out =
        python(packages, &[&[script.to_str().unwrap(), url.as_str()][..], args].concat()).unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    let error = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && said.ends_with("all is well\n"), "{said}{error}");
}

/// MONAI Label's own client, which 3D Slicer's extension brings along, where Python can have it.
#[test]
fn monai_labels_own_client_works() {
    let fetched: [&[&str]; 2] =
        [&["--no-deps", "monailabel==0.8.5"], &["requests==2.34.2", "numpy==2.4.6"]];
    let import = "import numpy, monailabel.client.client";
    let Some(packages) = python_with("monailabel-0.8.5", import, &fetched) else { return };
    let token = Some(Secret::new("a secret").unwrap());
    let folder = tempfile::tempdir().unwrap();
    #[cfg(feature = "dicom")]
    let (dicom, series) = (Some(by_series::file_example(folder.path())), by_series::EXAMPLE);
    #[cfg(not(feature = "dicom"))]
    let (dicom, series) = (None, "");
    let server = started(Settings { token, dicom, ..Settings::default() });
    let image = here("examples/data/lung1_image.nii.gz");
    let click = CLICK.map(|n| n.to_string()).join(",");
    let args = ["a secret", image.to_str().unwrap(), &click, series];
    all_is_well(&packages, "monai.py", &server, &args);
    drop(folder);
}

/// ITK-SNAP's own server beside this one: to the same requests answers of the same form, where
/// Python can have it.
#[test]
fn itk_snaps_own_server_answers_in_the_same_form() {
    let fetched: [&[&str]; 2] = [
        &["--no-deps", "itksnap-dls==0.1.6"],
        &[
            "fastapi==0.165.0",
            "uvicorn==0.54.0",
            "python-multipart==0.0.34",
            "SimpleITK==2.5.7",
            "huggingface_hub==2.4.0",
            "requests==2.34.2",
            "numpy==2.4.6",
        ],
    ];
    let import = "import fastapi, uvicorn, python_multipart, SimpleITK, huggingface_hub, requests, numpy; \
        from importlib.metadata import version; assert version('itksnap-dls') == '0.1.6'";
    let Some(packages) = python_with("itksnap-dls-0.1.6", import, &fetched) else { return };
    let server = started(Settings::default());
    all_is_well(&packages, "dls.py", &server, &[]);
}
