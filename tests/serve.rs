//! The server as its clients meet it: both interfaces by a client of HTTP of the test's own, the
//! answers held against the library's, errors by their status, and nnInteractive's own client.
#![cfg(feature = "serve")]

mod common;
#[path = "common/http.rs"]
mod http;
#[path = "common/viewer.rs"]
mod viewer;
#[cfg(feature = "dicom")]
#[path = "common/dicom.rs"]
mod writer;

use common::here;
use http::{
    BOX, CLICK, Reply, ask, box_and_click, example, get, object_on, parsed, post, said, session,
    started,
};
use prism::prompt::{Dense, Prompts};
use prism::serve::{Secret, Settings};
use prism::volume::{Affine, Description, Element, Grid, PALETTE, Volume, mask_file, write_mask};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use viewer::{Viewer, array_of_example, nnia};

/// A mask as a client of prism's own interface keeps it, `[i][j][k]`.
struct Mask {
    size: [usize; 3],
    voxels: Vec<u8>,
}

impl Mask {
    fn new(size: [usize; 3]) -> Mask {
        Mask { size, voxels: vec![0; size.iter().product()] }
    }

    /// Writes an answer into it, and returns what was said of that.
    #[track_caller]
    fn take(&mut self, reply: &Reply) -> Value {
        assert_eq!(reply.status, 200, "{}", reply.text());
        let about: Value =
            serde_json::from_str(reply.header("X-Prism-Answer").expect("an answer")).unwrap();
        let mut changed = 0;
        if about["region"].is_null() {
            assert!(reply.body.is_empty());
        } else {
            let region: [[usize; 2]; 3] = serde_json::from_value(about["region"].clone()).unwrap();
            let size = region.map(|[low, high]| high - low);
            let count: usize = size.iter().product();
            assert_eq!(reply.body.len(), count.div_ceil(8));
            let [_, nj, nk] = self.size;
            for at in 0..count {
                let within = [at % size[0], at / size[0] % size[1], at / size[0] / size[1]];
                let [i, j, k] = std::array::from_fn(|a| region[a][0] + within[a]);
                let bit = reply.body[at / 8] >> (at % 8) & 1;
                let voxel = &mut self.voxels[(i * nj + j) * nk + k];
                changed += usize::from(*voxel != bit);
                *voxel = bit;
            }
        }
        assert_eq!(about["changed"].as_u64(), Some(changed as u64));
        let voxels = self.voxels.iter().filter(|v| **v != 0).count();
        assert_eq!(about["voxels"].as_u64(), Some(voxels as u64));
        about
    }
}

fn upload(at: SocketAddr) -> (String, Value) {
    let file = std::fs::read(here("examples/data/lung1_image.nii.gz")).unwrap();
    let scan = ask(at, "POST", "/v1/scans?name=lung.nii.gz", &[], &file).json(201);
    (scan["scan"].as_str().unwrap().to_string(), scan)
}

#[test]
fn a_scan_is_worked_on_as_the_library_does() {
    let server = started(Settings::default());
    let at = server.address;
    let image = Arc::new(example());
    let about = get(at, "/v1").json(200);
    assert_eq!((&about["program"], &about["model"]), (&json!("prism"), &json!("small")));
    assert_eq!(about["colours"], json!(PALETTE));
    let (scan, described) = upload(at);
    assert_eq!(described["shape"], json!(image.grid.size));
    assert_eq!(described["spacing"], json!(image.grid.spacing()));
    assert_eq!(described["modality"], "ct");
    for (row, expected) in described["affine"].as_array().unwrap().iter().zip(&image.grid.affine.0)
    {
        assert_eq!(row, &json!(expected));
    }
    let object = object_on(at, &scan, &json!({ "name": "tumour", "colour": [1, 2, 3] }));
    let path = |what: &str| format!("/v1/objects/{object}/{what}");
    let mut mask = Mask::new(image.grid.size);
    let mut library = session(&image);

    // A box and a click, then a click that takes something away.
    let first = mask.take(&post(at, &path("prompts"), &box_and_click()));
    library.interact(&said(&[(CLICK, true)], Some(BOX))).unwrap();
    assert!(mask.voxels == library.mask() && first["voxels"].as_u64() > Some(100));
    assert_eq!(
        (&first["step"], &first["undo"], &first["redo"]),
        (&json!(1), &json!(true), &json!(false))
    );
    assert!(first["extent_mm"][0].as_f64() > Some(1.0) && first["score"].as_f64() > Some(0.0));
    let ml = first["voxels"].as_f64().unwrap() * image.grid.voxel_ml();
    assert!((first["ml"].as_f64().unwrap() - ml).abs() < 1e-9);
    let after_one = mask.voxels.clone();
    let off = [72, 71, 14];
    let second =
        mask.take(&post(at, &path("prompts"), &json!({ "points": [{ "at": off, "on": false }] })));
    library.interact(&said(&[(off, false)], None)).unwrap();
    assert!(mask.voxels == library.mask() && second["step"] == 2);

    // The file is the one that is written for the same prompts, in every format.
    let folder = tempfile::tempdir().unwrap();
    for format in ["nii.gz", "nii", "nrrd", "seg.nrrd", "mha"] {
        let name = format!("mask.{format}");
        let reply = get(at, &path(&format!("mask?format={format}")));
        let written = folder.path().join(&name);
        write_mask(&written, &image, &library.mask()).unwrap().commit().unwrap();
        assert!(reply.status == 200 && reply.body == std::fs::read(&written).unwrap(), "{name}");
        let disposition = reply.header("Content-Disposition").unwrap();
        assert_eq!(disposition, format!("attachment; filename=\"{name}\""));
    }
    assert_eq!(get(at, &path("mask?format=png")).status, 415);

    // Back and forth, to the bit.
    let two = mask.voxels.clone();
    let back = mask.take(&post(at, &path("undo"), &json!({})));
    assert!(mask.voxels == after_one && back["redo"] == json!(true));
    mask.take(&post(at, &path("redo"), &json!({})));
    assert!(mask.voxels == two);
    assert!(post(at, &path("redo"), &json!({})).error(409, "error").contains("nothing to redo"));
    mask.take(&post(at, &path("undo"), &json!({})));
    mask.take(&post(at, &path("undo"), &json!({})));
    assert!(mask.voxels.iter().all(|v| *v == 0));
    assert!(post(at, &path("undo"), &json!({})).error(409, "error").contains("nothing to undo"));
    mask.take(&post(at, &path("redo"), &json!({})));
    let mut anew = Mask::new(image.grid.size);
    anew.take(&get(at, &path("answer")));
    assert!(anew.voxels == after_one && mask.voxels == after_one);

    // A mask that is given is the answer; a second object lies over the first in the label image.
    let other = object_on(at, &scan, &json!({}));
    let block: Vec<u8> = (0..image.grid.voxels())
        .map(|at| {
            let [_, nj, nk] = image.grid.size;
            let [i, j, k] = [at / nk / nj, at / nk % nj, at % nk];
            u8::from((80..90).contains(&i) && (80..90).contains(&j) && (12..16).contains(&k))
        })
        .collect();
    let file = mask_file(Path::new("m.nrrd"), &image.grid, &image.description, &block).unwrap();
    let mut given = Mask::new(image.grid.size);
    given.take(&ask(at, "PUT", &format!("/v1/objects/{other}/mask"), &[], &file));
    assert!(given.voxels == block);
    let labels = get(at, &format!("/v1/scans/{scan}/labels?format=nii.gz"));
    let labels = Volume::of_file(labels.body, None).unwrap().values();
    let expected =
        after_one.iter().zip(&block).map(|(a, b)| if *b != 0 { 2.0 } else { f32::from(*a) });
    assert!(labels.iter().copied().eq(expected));
    let segmentation = get(at, &format!("/v1/scans/{scan}/labels?format=seg.nrrd"));
    let head = String::from_utf8_lossy(&segmentation.body).into_owned();
    assert!(head.contains("Segment0_Name:=tumour\n") && head.contains("Segment1_LabelValue:=2\n"));

    let about = get(at, &format!("/v1/scans/{scan}")).json(200);
    assert_eq!(about["objects"][0]["name"], "tumour");
    assert_eq!(about["objects"][0]["colour"], json!([1, 2, 3]));
    assert_eq!(about["objects"][1]["voxels"], json!(400));
    // It was given no colour: it is the second of those that the server names.
    assert_eq!(about["objects"][1]["colour"], json!(PALETTE[1]));
    let reset = mask.take(&post(at, &path("reset"), &json!({})));
    assert!(reset["step"] == 0 && mask.voxels.iter().all(|v| *v == 0));

    // What was let go is gone, once and for all.
    let objects = format!("/v1/objects/{other}");
    for _ in 0..2 {
        assert_eq!(ask(at, "DELETE", &objects, &[], b"").json(200), json!({ "released": true }));
    }
    assert_eq!(get(at, &format!("{objects}/answer")).status, 404);
    assert_eq!(get(at, &path("answer")).status, 200);
    for _ in 0..2 {
        let reply = ask(at, "DELETE", &format!("/v1/scans/{scan}"), &[], b"");
        assert_eq!(reply.json(200), json!({ "released": true }));
    }
    assert_eq!(get(at, &path("answer")).status, 404);
    let text = get(at, "/metrics").text();
    assert!(
        text.contains("prism_scans 0\n") && text.contains("prism_click_seconds_count 2\n"),
        "{text}"
    );
}

#[test]
fn every_prompt_is_taken_by_prisms_own_interface() {
    let server = started(Settings::default());
    let at = server.address;
    let (scan, _) = upload(at);
    let image = Arc::new(example());
    let object = object_on(at, &scan, &json!({}));
    let prompts = format!("/v1/objects/{object}/prompts");
    let [i, j, k] = CLICK;
    let square = [[i - 8, j - 8], [i - 8, j + 8], [i + 8, j + 8], [i + 8, j - 8]];
    let mut mask = Mask::new(image.grid.size);
    let voxel = |v: [usize; 3]| (v[0] * image.grid.size[1] + v[1]) * image.grid.size[2] + v[2];
    for (prompt, on) in [
        (json!({ "lines": [{ "from": [i - 9, j, k], "to": [i + 9, j, k] }] }), true),
        (json!({ "lassos": [{ "axis": 2, "slice": k, "outline": square }] }), true),
        (json!({ "scribbles": [{ "on": false, "voxels": [[i, j, k], [i + 1, j, k]] }] }), false),
        (json!({ "points": [{ "at": [i, j, k], "on": true }] }), true),
    ] {
        mask.take(&post(at, &prompts, &prompt));
        assert_eq!(mask.voxels[voxel(CLICK)], u8::from(on), "{prompt}");
    }
}

#[test]
fn what_is_wrong_is_told_by_its_status() {
    let server = started(Settings { max_sessions: 2, ..Settings::default() });
    let at = server.address;
    let (scan, _) = upload(at);
    let object = object_on(at, &scan, &json!({}));
    let [prompts, prepare] =
        ["prompts", "prepare"].map(|what| format!("/v1/objects/{object}/{what}"));
    let lost = "0".repeat(32);
    let body = |path: &str, text: &str| ask(at, "POST", path, &[], text.as_bytes());
    let outline = vec![[1, 1]; 10_001];
    let corners = json!({ "lassos": [{ "axis": 2, "slice": 1, "outline": outline }] }).to_string();
    for (reply, status, says) in [
        (body(&prompts, "garbage"), 400, "the body"),
        (body(&prompts, "{\"point\":[]}"), 400, "unknown field"),
        (body(&prompts, "{}"), 422, "nothing is said"),
        (body(&prompts, "{\"points\":[{\"at\":[9999,0,0]}]}"), 422, "lies outside the scan"),
        (body(&prompts, &corners), 422, "corners of lassos"),
        (body(&prompts, "{\"points\":[{\"at\":[0.5,0,0]}]}"), 422, "whole numbers"),
        (body(&prepare, "{\"points\":[]}"), 400, "unknown field"),
        (body(&prepare, "{\"point\":[1,2]}"), 400, "the body"),
        (body(&prepare, "{}"), 422, "expected a point"),
        (body(&prepare, "{\"point\":[9999,0,0]}"), 422, "lies outside the scan"),
        (body(&format!("/v1/objects/{lost}/prepare"), "{}"), 404, "no such object"),
        (body(&format!("/v1/objects/{lost}/prompts"), "{}"), 404, "no such object"),
        (body("/v1/objects/..%2f..%2fetc/prompts", "{}"), 404, "no such object"),
        (get(at, &format!("/v1/scans/{lost}")), 404, "no such scan"),
        (body("/v1/scans?name=a.png", "x"), 415, ".nii.gz"),
        (body("/v1/scans?name=a.nii.gz&modality=x", "x"), 400, "ct, mr or pet"),
        (body("/v1/scans?name=a.nii.gz", "not a scan"), 422, "is not recognised"),
        (body("/v1/scans", ""), 422, "is empty"),
        (ask(at, "PUT", "/v1/scans", &[], b""), 405, "not asked in this way"),
        (get(at, "/v1/what"), 404, "nnInteractive"),
    ] {
        let error = reply.error(status, "error");
        assert!(error.contains(says), "{error}");
    }
    // Of what is sent a message says no more than tells what it is.
    let long = "\u{1b}".repeat(4000);
    let colour = json!({ "colour": "x".repeat(1 << 20) }).to_string();
    let query = format!("/v1/scans?modality={}", "%1b".repeat(4000));
    let buffer = json!({ "shape": [1, 2, 3], "dtype": long });
    let lease = post(at, "/claim", &json!({})).json(200);
    let token = [("X-Lease-Token", lease["lease_token"].as_str().unwrap())];
    let buffer = ask(at, "POST", "/set_target_buffer", &token, buffer.to_string().as_bytes());
    for (message, most) in [
        (body(&query, "x").error(400, "error"), 400),
        (body(&format!("/v1/scans/{scan}/objects"), &colour).error(400, "error"), 5000),
        (buffer.error(400, "detail"), 400),
    ] {
        assert!(message.len() <= most, "{} bytes: {message}", message.len());
        assert!(!message.contains(char::is_control) && message.contains("..."), "{message}");
    }
    ask(at, "POST", "/release", &token, b"").json(200);
    // Headers that name other files are not followed.
    let nrrd = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndata file: Cargo.toml\n\n";
    let mha = "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = Cargo.toml\n";
    let mut pair = vec![0u8; 348];
    pair[..4].copy_from_slice(&348i32.to_le_bytes());
    pair[40..48].copy_from_slice(&[3, 0, 2, 0, 2, 0, 2, 0]);
    pair[70] = 2;
    pair[344..348].copy_from_slice(b"ni1\0");
    for bytes in [nrrd.as_bytes(), mha.as_bytes(), &pair] {
        let error = ask(at, "POST", "/v1/scans", &[], bytes).error(422, "error");
        assert!(error.contains("lie in another file"), "{error}");
    }
    // More than there can be, or without a length: refused before it is read.
    let huge = [("Content-Length", "99999999999999")];
    assert_eq!(ask(at, "POST", "/v1/scans", &huge, b"").status, 413);
    assert_eq!(ask(at, "POST", &prompts, &[("Content-Length", "20000000")], b"").status, 413);
    let chunked = [("Transfer-Encoding", "chunked")];
    assert_eq!(ask(at, "POST", "/v1/scans", &chunked, b"1\r\nx\r\n0\r\n\r\n").status, 411);
    // There is room for two.
    let lease = post(at, "/claim", &json!({})).json(200);
    let full = ask(at, "POST", "/v1/scans?name=a.nii", &[], b"anything");
    assert!(full.error(503, "error").contains("capacity (2 sessions)"));
    assert_eq!(full.header("Retry-After"), Some("10"));
    let full = post(at, "/claim", &json!({}));
    assert!(full.error(503, "detail").contains("capacity"));
    assert_eq!(full.header("Retry-After"), Some("10"));
    let token = lease["lease_token"].as_str().unwrap();
    for _ in 0..2 {
        let released = ask(at, "POST", "/release", &[("X-Lease-Token", token)], b"");
        assert_eq!(released.json(200), json!({ "released": true }));
    }
    post(at, "/claim", &json!({})).json(200);
}

#[test]
fn strangers_are_kept_out() {
    let token = Some(Secret::new("a secret").unwrap());
    let allow_origin = Some("https://viewer.example.org".to_string());
    let server = started(Settings { token, allow_origin, ..Settings::default() });
    let at = server.address;
    let with = |headers: &[(&str, &str)]| ask(at, "GET", "/v1", headers, b"");
    let bearer = ("Authorization", "Bearer a secret");
    assert_eq!(with(&[]).error(401, "error"), "Missing bearer token");
    assert_eq!(
        with(&[("Authorization", "Bearer a secre")]).error(401, "error"),
        "Invalid bearer token"
    );
    assert_eq!(with(&[bearer]).status, 200);
    assert_eq!(post(at, "/claim", &json!({})).error(401, "detail"), "Missing bearer token");
    assert_eq!(get(at, "/metrics").status, 401);
    assert_eq!(get(at, "/nowhere").status, 401);
    assert_eq!(get(at, "/healthz").json(200), json!({ "ok": true }));
    // The page asks for the token itself; it may do nothing but what comes from here.
    let page = get(at, "/");
    assert_eq!(page.status, 200);
    assert!(page.header("Content-Security-Policy").unwrap().starts_with("default-src 'self'"));
    let script = get(at, "/niivue.js");
    assert_eq!((script.status, script.header("Content-Encoding")), (200, Some("gzip")));
    // A name that was made to point here, and pages of other origins.
    for host in ["evil.example", "evil.example:1527", "localhost.evil.example", ""] {
        assert_eq!(with(&[bearer, ("Host", host)]).status, 403, "{host}");
    }
    for host in ["localhost", "localhost:9000", "127.0.0.1", "[::1]:1527"] {
        assert_eq!(with(&[bearer, ("Host", host)]).status, 200, "{host}");
    }
    let own = format!("http://{at}");
    assert_eq!(with(&[bearer, ("Origin", &own)]).status, 200);
    for origin in ["https://evil.example", "null", "http://localhost:1"] {
        let reply = with(&[bearer, ("Origin", origin)]);
        assert!(reply.error(403, "error").contains("another origin"), "{origin}");
        assert!(reply.header("Access-Control-Allow-Origin").is_none());
    }
    // One is allowed, and asks whether it may without the token.
    let friend = ("Origin", "https://viewer.example.org");
    let reply = with(&[bearer, friend]);
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("Access-Control-Allow-Origin"), Some(friend.1));
    let may = ask(at, "OPTIONS", "/v1/scans", &[friend], b"");
    assert_eq!((may.status, may.header("Access-Control-Allow-Origin")), (204, Some(friend.1)));
    assert_eq!(with(&[friend]).status, 401);
}

#[test]
fn two_work_at_once_and_what_runs_is_finished() {
    let mut server = started(Settings::default());
    let at = server.address;
    let image = Arc::new(example());
    let mut library = session(&image);
    library.interact(&said(&[(CLICK, true)], Some(BOX))).unwrap();
    let expected = library.mask();
    let (scan, _) = upload(at);
    let (other, _) = upload(at);
    let objects = [object_on(at, &scan, &json!({})), object_on(at, &other, &json!({}))];
    std::thread::scope(|scope| {
        for object in &objects {
            let (expected, size) = (&expected, image.grid.size);
            scope.spawn(move || {
                for _ in 0..3 {
                    let mut mask = Mask::new(size);
                    mask.take(&post(
                        at,
                        &format!("/v1/objects/{object}/prompts"),
                        &box_and_click(),
                    ));
                    assert!(mask.voxels == *expected);
                    assert_eq!(
                        post(at, &format!("/v1/objects/{object}/reset"), &json!({})).status,
                        200
                    );
                }
            });
        }
    });
    // Told to end while it works, it answers first.
    let stop = server.stop.clone();
    let path = format!("/v1/objects/{}/prompts", objects[0]);
    let answered = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(at).unwrap();
        let body = box_and_click().to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: {at}\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        // Once it asks for the rest it has begun with the request.
        const GO_ON: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
        let mut asked = [0; GO_ON.len()];
        stream.read_exact(&mut asked).unwrap();
        assert_eq!(&asked[..], GO_ON);
        stream.write_all(body.as_bytes()).unwrap();
        stop.stop();
        let mut answer = vec![];
        stream.read_to_end(&mut answer).unwrap();
        parsed(&answer, "POST")
    });
    let mut mask = Mask::new(image.grid.size);
    mask.take(&answered.join().unwrap());
    assert!(mask.voxels == expected);
    server.end();
    assert!(TcpStream::connect(at).is_err());
}

#[test]
fn nninteractive_is_spoken() {
    let server = started(Settings::default());
    let at = server.address;
    let capabilities = get(at, "/capabilities").json(200);
    for key in [
        "supported_interactions",
        "channel_mapping",
        "num_interaction_channels",
        "supports_initial_label",
        "supports_zero_shot_label_refinement",
        "interaction_decay",
        "inference_session_version",
    ] {
        assert!(capabilities.get(key).is_some(), "{key}");
    }
    assert_eq!(capabilities["preferred_scribble_thickness"].as_array().map(Vec::len), Some(3));
    let (size, spacing, values, image) = array_of_example();
    let [_, nj, ni] = size;
    let mut viewer = Viewer::new(at);
    let point = json!({ "coordinates": [1, 2, 3], "include_interaction": true });
    let early = viewer.post("/add_point_interaction", &point);
    assert!(early.error(400, "detail").contains("set_image"));
    viewer.open(size, spacing, &values);
    assert_eq!(
        viewer.post("/set_do_autozoom", &json!({ "do_autozoom": false })).json(200),
        json!({})
    );

    let mut library = session(&image);
    let bounds = json!([[BOX[2], BOX[5]], [BOX[1], BOX[4]], [BOX[0], BOX[3]]]);
    assert_eq!(viewer.bounds(bounds, true), (true, true));
    library.interact(&said(&[], Some(BOX))).unwrap();
    assert!(viewer.mask() == library.mask());
    let first = viewer.buffer.clone();
    // Places are rounded, halves to even voxels.
    let off = [72, 72, 14];
    assert!(viewer.point(json!([14.0, 72.5, 71.5]), false, true).0);
    library.interact(&said(&[(off, false)], None)).unwrap();
    assert!(viewer.mask() == library.mask());
    let second = viewer.buffer.clone();
    // Beyond the image a point counts for nothing.
    assert_eq!(viewer.point(json!([-100, 3, 3]), true, true), (true, false));
    let beyond = json!([[-9, -3], [BOX[1], BOX[4]], [BOX[0], BOX[3]]]);
    assert_eq!(viewer.bounds(beyond, true), (true, false));
    // Queued, predicted, queued again and taken back.
    assert_eq!(viewer.point(json!([14, 80, 80]), true, false), (false, false));
    let reply = viewer.post("/predict", &json!({ "force_full_refine": false }));
    assert!(viewer.take(reply).0);
    library.interact(&said(&[(CLICK, true)], None)).unwrap();
    assert!(viewer.mask() == library.mask());
    let reply = viewer.post("/predict", &json!({}));
    assert_eq!(viewer.take(reply), (false, false));
    assert_eq!(viewer.point(json!([14, 81, 81]), true, false), (false, false));
    assert_eq!(viewer.undo(), (true, false));
    // As far back as there is history, to the bit.
    viewer.undo();
    assert!(viewer.buffer == second);
    viewer.undo();
    assert!(viewer.buffer == first);
    assert_eq!(viewer.undo(), (true, true));
    assert!(viewer.buffer.iter().all(|v| *v == 0));
    assert_eq!(viewer.undo(), (false, false));

    // Painted: a crop of a stroke, then an outline that takes some away again.
    let place = json!([[14, 15], [78, 83], [76, 86]]);
    let meta = json!({ "include_interaction": true, "interaction_bbox": place });
    let stroke = nnia("uint8", 1, &[1, 5, 10], &[1; 50]);
    let reply = viewer.send("/add_scribble_interaction", &meta, &stroke);
    assert_eq!(viewer.take(reply), (true, true));
    let on =
        |viewer: &Viewer, k: usize, j: usize, i: usize| viewer.buffer[(k * nj + j) * ni + i] != 0;
    assert!((78..83).all(|j| (76..86).all(|i| on(&viewer, 14, j, i))));
    let mut ring = vec![0u8; 100];
    (0..100)
        .filter(|at| [0, 9].contains(&(at / 10)) || [0, 9].contains(&(at % 10)))
        .for_each(|at| ring[at] = 1);
    let place = json!([[14, 15], [76, 86], [76, 86]]);
    let meta = json!({ "include_interaction": false, "interaction_bbox": place });
    let reply =
        viewer.send("/add_lasso_interaction", &meta, &nnia("uint8", 1, &[1, 10, 10], &ring));
    viewer.take(reply);
    assert!(!on(&viewer, 14, 80, 81) && !on(&viewer, 14, 82, 78));
    for (shape, place, says) in [
        ([1, 5, 9], json!([[14, 15], [78, 83], [76, 86]]), "must match interaction_bbox size"),
        ([1, 5, 10], json!([[14, 14], [78, 83], [76, 86]]), "positive size"),
        ([1, 5, 10], json!([[-1, 0], [78, 83], [76, 86]]), "exceeds original image bounds"),
        ([1, 5, 10], json!(null), "must match interaction_bbox size"),
    ] {
        let meta = json!({ "include_interaction": true, "interaction_bbox": place });
        let body = nnia("uint8", 1, &shape, &vec![1; shape.iter().product()]);
        let error = viewer.send("/add_lasso_interaction", &meta, &body).error(400, "detail");
        assert!(error.contains(says), "{error}");
    }
    let before = viewer.buffer.clone();

    // An initial mask is the object, and one step that can be undone.
    let initial: Vec<u8> = (0..before.len())
        .map(|at| {
            let [k, j, i] = [at / ni / nj, at / ni % nj, at % ni];
            u8::from((12..16).contains(&k) && (75..90).contains(&j) && (75..90).contains(&i))
        })
        .collect();
    let message = nnia("uint8", 1, &size, &initial);
    let reply = viewer.send("/add_initial_seg_interaction", &json!({}), &message);
    assert_eq!(viewer.take(reply), (false, false));
    viewer.buffer = initial.clone();
    assert_eq!(viewer.point(json!([14, 60, 60]), false, true), (true, false));
    viewer.undo();
    assert!(viewer.buffer == initial);
    // A client empties its buffer before it asks for that: where it is refused, all comes again.
    viewer.buffer.fill(0);
    let headers = [("X-Lease-Token", viewer.lease.as_str()), ("Content-Length", "99999999")];
    assert_eq!(ask(at, "POST", "/reset_interactions", &headers, b"").status, 413);
    viewer.undo();
    assert!(viewer.buffer == before);
    let wrong = nnia("uint8", 1, &[1, 2, 3], &[1; 6]);
    let error =
        viewer.send("/add_initial_seg_interaction", &json!({}), &wrong).error(400, "detail");
    assert!(error.contains("must match input image shape"), "{error}");

    // A negative box, one slice thick, in each plane; floats; zero extent is an error.
    assert_eq!(viewer.post("/reset_interactions", &json!({})).json(200), json!({}));
    viewer.buffer.fill(0);
    for bounds in [
        json!([[14, 15], [68, 94], [69, 93]]),
        json!([[12.6, 16.2], [80, 81], [69.4, 92.5]]),
        json!([[13, 16], [68, 94], [80, 81]]),
    ] {
        assert!(viewer.bounds(bounds, true).0);
        assert!(viewer.buffer.iter().any(|v| *v != 0));
    }
    assert!(viewer.bounds(json!([[14, 15], [70, 90], [70, 90]]), false).0);
    let empty = json!({ "bbox_coords": [[14, 14], [1, 2], [1, 2]], "include_interaction": true });
    let error = viewer.post("/add_bbox_interaction", &empty).error(400, "detail");
    assert!(error.contains("size is zero"), "{error}");
    for (path, body) in [
        ("/add_point_interaction", "garbage"),
        ("/add_point_interaction", "{\"coordinates\":[1,2],\"include_interaction\":true}"),
        ("/add_bbox_interaction", "{\"bbox_coords\":[[1,2]],\"include_interaction\":true}"),
    ] {
        assert_eq!(viewer.send(path, &Value::Null, body.as_bytes()).status, 422, "{path} {body}");
    }
    let large = json!({ "shape": [1 << 20, 1 << 20, 1 << 20], "dtype": "uint8" });
    assert_eq!(viewer.post("/set_target_buffer", &large).status, 413);

    // What is a word or two is not read where it is long.
    for path in ["/predict", "/set_target_buffer", "/set_do_autozoom"] {
        let headers = [("X-Lease-Token", viewer.lease.as_str()), ("Content-Length", "100000")];
        assert_eq!(ask(at, "POST", path, &headers, b"").status, 413, "{path}");
    }

    // Whoever hangs up before the answer finds what it missed in the next.
    let mut gone = Viewer::new(at);
    gone.open(size, spacing, &values);
    let body = json!({ "coordinates": [14, 80, 80], "include_interaction": true }).to_string();
    let head = format!(
        "POST /add_point_interaction HTTP/1.1\r\nHost: {at}\r\nX-Lease-Token: {}\r\nContent-Length: {}\r\n\r\n",
        gone.lease,
        body.len()
    );
    // It hangs up while it waits for its turn, or is worked for.
    let mut other = Viewer::new(at);
    other.open(size, spacing, &values);
    let busy = std::thread::spawn(move || other.point(json!([14, 80, 80]), true, true));
    let mut stream = TcpStream::connect(at).unwrap();
    stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    let waits = || get(at, "/metrics").text().lines().any(|line| line == "prism_waiting 1");
    while !busy.is_finished() && !waits() {}
    drop(stream);
    assert_eq!(busy.join().unwrap(), (true, true));
    assert!(gone.point(json!([14, 80, 80]), true, true).0);
    let mut library = session(&image);
    library.interact(&said(&[(CLICK, true)], None)).unwrap();
    assert!(gone.mask() == library.mask());

    // Nothing to see is told when somebody points at it.
    let mut blank = Viewer::new(at);
    blank.open([4, 5, 6], [1.0; 3], &[0; 120]);
    let error = blank.post("/add_point_interaction", &point).error(400, "detail");
    assert!(error.contains("entirely zero"), "{error}");
}

#[test]
fn a_client_that_lives_is_answered_while_another_is_worked_for() {
    let settings = Settings { idle: Duration::from_secs(3), ..Settings::default() };
    let server = started(settings);
    let at = server.address;
    let (size, spacing, values, _) = array_of_example();
    let mut viewer = Viewer::new(at);
    viewer.open(size, spacing, &values);
    let lease = viewer.lease.clone();
    let busy = std::thread::spawn(move || {
        // A first point has its scale found, which takes the longest.
        viewer.point(json!([14, 80, 80]), true, true);
        (viewer, Instant::now())
    });
    let mut beats = vec![];
    while !busy.is_finished() {
        let start = Instant::now();
        let beat = ask(at, "POST", "/heartbeat", &[("X-Lease-Token", &lease)], b"{}");
        assert!(beat.json(200)["remaining_seconds"].as_f64() >= Some(0.0));
        beats.push((start, start.elapsed()));
    }
    let (viewer, answered) = busy.join().unwrap();
    let during = beats.iter().filter(|(start, took)| *start + *took < answered).count();
    assert!(during >= 2, "{during} heartbeats were answered during a prediction");
    // Signs of life do not stand for work: the lease goes all the same.
    let end = Instant::now() + Duration::from_secs(20);
    let header = [("X-Lease-Token", viewer.lease.as_str())];
    loop {
        let beat = ask(at, "POST", "/heartbeat", &header, b"{}");
        if beat.status == 410 {
            assert_eq!(beat.error(410, "detail"), "lease expired or unknown");
            break;
        }
        assert!(Instant::now() < end, "the lease does not end");
        std::thread::sleep(Duration::from_millis(100));
    }
    // Who sends much before it listens hears of it too.
    let image = nnia("uint8", 1, &[1, 100, 200, 300], &vec![1; 6_000_000]);
    assert_eq!(viewer.send("/set_image", &json!({}), &image).status, 410);
    let none = ask(at, "POST", "/heartbeat", &[], b"{}");
    assert_eq!(none.error(410, "detail"), "lease token missing");
    assert_eq!(ask(at, "GET", "/lease_status", &header, b"").status, 410);
}

#[test]
fn a_connection_goes_on_when_a_body_comes_behind_its_head() {
    let server = started(Settings::default());
    let at = server.address;
    for path in ["/claim", "/heartbeat", "/v1/objects/x/undo", "/nowhere", "/v1/scans?name=a.png"] {
        let mut stream = TcpStream::connect(at).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let head = format!("POST {path} HTTP/1.1\r\nHost: {at}\r\nContent-Length: 2\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        stream.write_all(b"{}").unwrap();
        let next = format!("GET /healthz HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n");
        stream.write_all(next.as_bytes()).unwrap();
        let mut answers = String::new();
        stream.read_to_string(&mut answers).unwrap();
        assert_eq!(answers.matches("HTTP/1.1 ").count(), 2, "{path}: {answers}");
        assert!(answers.ends_with("{\"ok\":true}"), "{path}: {answers}");
    }
    // To delete or to ask takes no body, also where one is announced: nobody waits for it.
    for (method, path, status) in [("DELETE", "/v1/objects/x", 200), ("GET", "/healthz", 200)] {
        assert_eq!(ask(at, method, path, &[("Content-Length", "20")], b"").status, status);
    }
}

#[test]
fn who_announces_much_and_sends_nothing_takes_no_memory() {
    let server = started(Settings { max_sessions: 2, ..Settings::default() });
    let at = server.address;
    let gauge = |name: &str| {
        let text = get(at, "/metrics").text();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap().parse::<u64>().unwrap()
    };
    let most = get(at, "/v1").json(200)["limits"]["scan_bytes"].as_u64().unwrap();
    let length = most.min(2 << 30);
    let silent = || {
        let mut stream = TcpStream::connect(at).unwrap();
        let head = format!("POST /v1/scans HTTP/1.1\r\nHost: {at}\r\nContent-Length: {length}");
        stream.write_all(format!("{head}\r\n\r\n").as_bytes()).unwrap();
        stream
    };
    let silent = [silent(), silent()];
    // Nothing else is asked for before both have their places, or it could take one.
    let end = Instant::now() + Duration::from_secs(20);
    while gauge("prism_arriving") < 2 {
        assert!(Instant::now() < end, "nobody waits for them");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(ask(at, "POST", "/v1/scans", &[], b"").status, 503);
    // What they announced would be as much by itself; other tests take some, and let it go again.
    let end = Instant::now() + Duration::from_secs(15);
    while gauge("prism_memory_used_bytes") >= 2 * length {
        assert!(Instant::now() < end, "{length} bytes were announced twice, and are all taken");
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(silent);
}

#[test]
fn whatever_is_sent_is_answered() {
    let server = started(Settings::default());
    let at = server.address;
    let mut viewer = Viewer::new(at);
    viewer.open([4, 5, 6], [1.0; 3], &(0..120).collect::<Vec<i16>>());
    let folder = tempfile::tempdir().unwrap();
    let image = Volume::of_elements(
        Grid { size: [6, 5, 4], affine: Affine::from_spacing([1.0; 3]) },
        Element::Int16,
        (0..120i16).flat_map(|v| v.to_le_bytes()).collect(),
        Description::of_new(
            &Grid { size: [6, 5, 4], affine: Affine::from_spacing([1.0; 3]) },
            "int16",
        ),
    )
    .unwrap();
    let written = |name: &str| {
        let path = folder.path().join(name);
        write_mask(&path, &image, &[1; 120]).unwrap().commit().unwrap();
        std::fs::read(path).unwrap()
    };
    let array = nnia("int16", 2, &[1, 4, 5, 6], &[3; 240]);
    let mask = nnia("uint8", 1, &[4, 5, 6], &[1; 120]);
    let point = b"{\"coordinates\":[1,2,3],\"include_interaction\":true,\"run_prediction\":false}";
    let bounds = b"{\"bbox_coords\":[[1,2],[1,3],[1,3]],\"include_interaction\":true,\"run_prediction\":false}";
    let buffer = b"{\"shape\":[4,5,6],\"dtype\":\"uint8\"}";
    let meta = "{\"include_interaction\":true,\"run_prediction\":false,\"interaction_bbox\":null}";
    let seeds: Vec<(&str, Vec<u8>)> = vec![
        ("/set_image", array),
        ("/add_scribble_interaction", mask.clone()),
        ("/add_lasso_interaction", mask.clone()),
        ("/add_initial_seg_interaction", mask),
        ("/add_point_interaction", point.to_vec()),
        ("/add_bbox_interaction", bounds.to_vec()),
        ("/set_target_buffer", buffer.to_vec()),
        ("/set_do_autozoom", b"{\"do_autozoom\":true}".to_vec()),
        ("/v1/scans", written("a.nii.gz")),
        ("/v1/scans", written("a.nii")),
        ("/v1/scans", written("a.nrrd")),
        ("/v1/scans", written("a.mha")),
    ];
    let mut rng = StdRng::seed_from_u64(17);
    let mut statuses = std::collections::BTreeMap::<u16, usize>::new();
    for round in 0..2000 {
        let (path, seed) = &seeds[round % seeds.len()];
        let mut body = seed.clone();
        match rng.random_range(0..5) {
            0 => body = (0..rng.random_range(0..400)).map(|_| rng.random()).collect(),
            1 => body.truncate(rng.random_range(0..body.len())),
            2 => {
                let at = rng.random_range(0..body.len());
                body.insert(at, rng.random());
            }
            _ => {
                for _ in 0..rng.random_range(1..6) {
                    let at = rng.random_range(0..body.len().min(120));
                    body[at] = if rng.random() { rng.random() } else { b"\0\x01\x7f\xff"[at % 4] };
                }
            }
        }
        let mut beside = meta.as_bytes().to_vec();
        if rng.random_range(0..4) == 0 {
            let at = rng.random_range(0..beside.len());
            beside[at] = rng.random_range(b' '..b'~');
        }
        let beside = String::from_utf8(beside).unwrap();
        let headers = [("X-Lease-Token", viewer.lease.as_str()), ("X-Meta", beside.as_str())];
        let reply = ask(at, "POST", path, &headers, &body);
        *statuses.entry(reply.status).or_default() += 1;
        // A fault of the server's own would be 500.
        let known = [200, 201, 400, 413, 422, 503].contains(&reply.status);
        assert!(known, "{path} in round {round}: {} {}", reply.status, reply.text());
        // What was taken is let go, so that there is room for more.
        if reply.status == 201 {
            let scan = reply.json(201)["scan"].as_str().unwrap().to_string();
            ask(at, "DELETE", &format!("/v1/scans/{scan}"), &[], b"");
        }
    }
    assert!(statuses[&400] > 200 && statuses.contains_key(&200), "{statuses:?}");
    assert_eq!(get(at, "/healthz").status, 200);
    // Lines that are no HTTP end their own connection alone.
    for line in ["", "\r\n\r\n", "GET\r\n\r\n", "\x16\x03\x01\x02", "GET / HTTP/9.9\r\n\r\n"] {
        let mut stream = TcpStream::connect(at).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let _ = stream.read_to_end(&mut vec![]);
    }
    assert_eq!(get(at, "/healthz").status, 200);
}

#[test]
fn a_mask_that_is_given_is_understood_as_the_program_does() {
    // What the interface promises of a mask holds through its session too.
    let image = Arc::new(example());
    let mut library = session(&image);
    let mask: Vec<u8> = (0..image.grid.voxels()).map(|at| u8::from(at % 1000 == 0)).collect();
    let dense = Prompts { dense: Some(Dense::Mask(mask.clone())), ..Prompts::default() };
    library.interact(&dense).unwrap();
    assert!(library.mask() == mask);
}

/// The program with more flags.
fn program(more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prism"));
    command.args(["serve", "-m", here("models/small.safetensors").to_str().unwrap()]);
    command.args(["--threads", "1"]).args(more).env_remove("PRISM_TOKEN");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The program, started at a port that is free; its address is what it says first.
struct Process {
    child: Child,
    at: SocketAddr,
    // What it says is not refused.
    _said: Lines<BufReader<ChildStdout>>,
}

impl Process {
    fn start(more: &[&str]) -> Process {
        let mut child = program(more).args(["--bind", "127.0.0.1:0"]).spawn().unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = said.next().unwrap().unwrap();
        let url = first.split_whitespace().find_map(|w| w.strip_prefix("http://")).expect(&first);
        Process { child, at: url.parse().unwrap(), _said: said }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(unix)]
#[test]
fn the_program_serves_and_ends_in_order() {
    let refused = program(&["--bind", "0.0.0.0:0"]).output().unwrap();
    let error = String::from_utf8(refused.stderr).unwrap();
    assert!(refused.status.code() == Some(2) && error.contains("a token is needed"), "{error}");
    let refused = program(&["--bind", "nowhere"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    let lost = ["--bind", "127.0.0.1:0", "--dicom", "no such folder"];
    let refused = program(&lost).output().unwrap();
    let error = String::from_utf8(refused.stderr).unwrap();
    assert!(refused.status.code() == Some(1) && error.contains("no such folder: "), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, "a secret\n").unwrap();
    let file = file.to_str().unwrap();
    let mut server = Process::start(&["--token-file", file]);
    let at = server.at;
    assert_eq!(get(at, "/healthz").status, 200);
    assert_eq!(get(at, "/v1").status, 401);
    let about = ask(at, "GET", "/v1", &[("Authorization", "Bearer a secret")], b"").json(200);
    // What a model is called, and never where it lies.
    assert_eq!(about["model"], "small.safetensors");
    // SAFETY: a signal to a process that this test started and has not waited for.
    unsafe { libc::kill(server.child.id() as i32, libc::SIGTERM) };
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
}

/// A number that a server tells of itself.
fn count(at: SocketAddr, name: &str) -> u64 {
    let text = get(at, "/metrics").text();
    let told = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    told.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
}

#[test]
fn what_the_budget_has_no_room_for_is_encoded_again() {
    // A quarter of this is room for three patches of this network, which take 20 MB each, and four
    // are looked at in turn.
    let small = Process::start(&["--memory", "256M"]);
    let roomy = started(Settings { max_sessions: 2, ..Settings::default() });
    let servers = [small.at, roomy.address];
    let size = example().grid.size;
    // Two scans, on each two objects that are looked at from different distances.
    let mut objects = vec![];
    for _ in 0..2 {
        let scans = servers.map(|at| (at, upload(at).0));
        for margin in [0, 8] {
            let from = [BOX[0] - margin, BOX[1] - margin, BOX[2]];
            let to = [BOX[3] - 1 + margin, BOX[4] - 1 + margin, BOX[5] - 1];
            let first = json!({ "box": { "from": from, "to": to }, "points": [{ "at": CLICK }] });
            let paths = scans.each_ref().map(|(at, scan)| {
                let object = object_on(*at, scan, &json!({}));
                format!("/v1/objects/{object}")
            });
            objects.push((first, paths, [Mask::new(size), Mask::new(size)]));
        }
    }
    // All in turn, again and again, each time against what there is.
    for round in 0..3 {
        for (first, paths, masks) in &mut objects {
            let click = json!({ "points": [{ "at": CLICK, "on": round == 2 }] });
            let said = if round == 0 { &*first } else { &click };
            for ((at, path), mask) in servers.iter().zip(&*paths).zip(&mut *masks) {
                let about = mask.take(&post(*at, &format!("{path}/prompts"), said));
                assert_eq!(about["step"], json!(round + 1));
                assert!(round > 0 || about["voxels"].as_u64() > Some(1), "{about}");
            }
            assert!(masks[0].voxels == masks[1].voxels, "{}, round {round}", paths[0]);
        }
    }
    let [(made, dropped), (once, none)] = servers
        .map(|at| (count(at, "prism_encodings_total"), count(at, "prism_encodings_dropped_total")));
    assert!(none == 0 && once >= 4, "{once} encoded, {none} dropped");
    // It has fewer than there are, and made those that it looked at again.
    assert!(made - dropped < once && made > once, "{made} encoded, {dropped} dropped of {once}");
    // Answers and history have lost nothing.
    for (_, paths, masks) in &mut objects {
        let mut whole = Mask::new(size);
        whole.take(&get(small.at, &format!("{}/answer", paths[0])));
        assert!(whole.voxels == masks[1].voxels);
        for ((at, path), mask) in servers.iter().zip(&*paths).zip(&mut *masks) {
            for step in [2, 1, 0] {
                let about = mask.take(&post(*at, &format!("{path}/undo"), &json!({})));
                assert_eq!(about["step"], json!(step));
            }
            assert!(mask.voxels.iter().all(|v| *v == 0));
        }
    }
}

/// nnInteractive's own client, which 3D Slicer's and napari's extensions use, where Python can have
/// it.
#[test]
fn nninteractives_own_client_works() {
    const CLIENT: &str = "nninteractive-client==2.6.0";
    let required = std::env::var_os("PRISM_TEST_TOOLS").is_some_and(|v| v == "required");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nninteractive-client-2.6.0");
    let python = |args: &[&str]| {
        let mut command = Command::new("python3");
        // The server is here, whatever stands between this machine and others.
        command.args(args).env("PYTHONPATH", &folder).env("NO_PROXY", "127.0.0.1");
        command.output().ok()
    };
    let import = ["-c", "import nnInteractive.inference.remote"];
    let there = || python(&import).is_some_and(|out| out.status.success());
    if !there() {
        let to = folder.to_str().unwrap();
        let quiet = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
        let _ = python(&[&quiet[..], &["--target", to, CLIENT][..]].concat());
    }
    if !there() {
        assert!(!required, "{CLIENT} cannot be had on this machine");
        return common::skipped(&format!("{CLIENT} cannot be had on this machine"));
    }
    let idle = Duration::from_secs(6);
    let server = started(Settings { idle, max_sessions: 2, ..Settings::default() });
    let lasting = started(Settings::default());
    let out = python(&[
        here("tests/clients/nninteractive.py").to_str().unwrap(),
        &format!("http://{}", server.address),
        &format!("http://{}", lasting.address),
    ])
    .unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    let error = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && said.ends_with("all is well\n"), "{said}{error}");
}

#[test]
fn objects_are_renamed_and_recoloured() {
    let server = started(Settings::default());
    let at = server.address;
    let (scan, _) = upload(at);
    let object = object_on(at, &scan, &json!({ "name": "tumour", "colour": [1, 2, 3] }));
    let path = format!("/v1/objects/{object}");
    let patched = |about: &Value| ask(at, "PATCH", &path, &[], about.to_string().as_bytes());
    let told = patched(&json!({ "name": "Knötchen 2" })).json(200);
    assert_eq!((&told["object"], &told["colour"]), (&json!(object), &json!([1, 2, 3])));
    let told = patched(&json!({ "colour": [255, 128, 0] })).json(200);
    assert_eq!((&told["name"], &told["colour"]), (&json!("Knötchen 2"), &json!([255, 128, 0])));
    let there = get(at, &format!("/v1/scans/{scan}")).json(200);
    assert_eq!(there["objects"], json!([told]));
    assert_eq!(patched(&json!({})).json(200), told);
    // Files have them.
    post(at, &format!("{path}/prompts"), &box_and_click());
    let segmentation = get(at, &format!("/v1/scans/{scan}/labels?format=seg.nrrd"));
    let head = String::from_utf8_lossy(&segmentation.body).into_owned();
    assert!(head.contains("Segment0_Name:=Knötchen 2\n"));
    assert!(head.contains("Segment0_Color:=1 0.50"), "the colour is the one that was chosen");
    // What cannot be changes nothing.
    for (about, status) in [
        (json!({ "name": "a".repeat(201) }), 422),
        (json!({ "name": "two\nlines" }), 422),
        (json!({ "colour": [1, 2] }), 400),
        (json!({ "colour": [1, 2, 256] }), 400),
        (json!({ "voxels": 7 }), 400),
    ] {
        assert_eq!(patched(&about).status, status, "{about}");
    }
    let new = post(at, &format!("/v1/scans/{scan}/objects"), &json!({ "name": "two\nlines" }));
    assert_eq!(new.status, 422, "{}", new.text());
    assert_eq!(patched(&json!({})).json(200)["name"], told["name"]);
    let gone = ask(at, "PATCH", &format!("/v1/objects/{}", "0".repeat(32)), &[], b"{}");
    assert_eq!(gone.status, 404);
}

/// DICOM, as the page sends it: the files of a study in an archive.
#[cfg(feature = "dicom")]
mod series {
    use super::writer::{COLUMNS, ROWS, SLICES, Series, at, identified, straight, value, zipped};
    use super::*;
    use prism::serve::Keep;
    use prism::volume::labels::{Labels, TargetLabel};

    /// The files of a series, under names that lead out of any folder.
    fn files(series: &Series) -> Vec<(String, Vec<u8>)> {
        let folder = series.folder(SLICES, straight, |_, file| identified(file));
        let read = |k: usize| std::fs::read(at(folder.path(), k)).unwrap();
        let name = |k: usize| format!("../../../../tmp/prism-outside/{}/{k}", series.uid);
        (0..SLICES).map(|k| (name(k), read(k))).collect()
    }

    fn archive(all: &[Series]) -> Vec<u8> {
        let files: Vec<_> = all.iter().flat_map(files).collect();
        let named: Vec<_> = files.iter().map(|(n, bytes)| (n.as_str(), bytes.clone())).collect();
        zipped(&named)
    }

    fn send(at: SocketAddr, query: &str, bytes: &[u8]) -> Reply {
        ask(at, "POST", &format!("/v1/scans?{query}"), &[], bytes)
    }

    /// A series beside the first one.
    fn other() -> Series {
        Series { uid: "1.2.9", number: "7", description: "Bone", ..Series::new("CT") }
    }

    #[test]
    fn a_series_is_a_scan_as_any_other() {
        let server = started(Settings::default());
        let there = server.address;
        let told = send(there, "name=study.zip", &archive(&[Series::new("CT")])).json(201);
        assert_eq!(told["shape"], json!([COLUMNS, ROWS, SLICES]));
        assert_eq!((&told["format"], &told["modality"]), (&json!("DICOM"), &json!("ct")));
        let scan = told["scan"].as_str().unwrap();
        // What a viewer gets has the same voxels at the same places.
        for format in ["nii", "nii.gz"] {
            let image = get(there, &format!("/v1/scans/{scan}/image?format={format}"));
            assert_eq!(image.status, 200, "{}", image.text());
            let image = Volume::of_file(image.body, None).unwrap();
            for (n, row) in image.grid.affine.0.iter().enumerate() {
                for (m, number) in row.iter().enumerate() {
                    let there = told["affine"][n][m].as_f64().unwrap();
                    assert!((number - there).abs() < 1e-4, "{told}");
                }
            }
            for [i, j, k] in [[0, 0, 0], [3, 1, 2], [1, 2, 3]] {
                assert_eq!(image.at([i, j, k]), f32::from(value(i, j, k)));
            }
        }
        assert_eq!(get(there, &format!("/v1/scans/{scan}/image?format=mha")).status, 415);
        // A mask goes back into DICOM, with the names of objects.
        let about = json!({ "name": "Herd links" });
        let object = object_on(there, scan, &about);
        let folder = tempfile::tempdir().unwrap();
        let study = folder.path().join("study.zip");
        std::fs::write(&study, archive(&[Series::new("CT")])).unwrap();
        let volume = Volume::read(&study, None).unwrap();
        let mask: Vec<u8> = (0..COLUMNS * ROWS * SLICES).map(|at| u8::from(at % 5 == 2)).collect();
        let (grid, description) = (&volume.grid, &volume.description);
        let file = mask_file(Path::new("m.nii"), grid, description, &mask).unwrap();
        let given = ask(there, "PUT", &format!("/v1/objects/{object}/mask"), &[], &file);
        assert_eq!(given.status, 200, "{}", given.text());
        for path in [format!("objects/{object}/mask"), format!("scans/{scan}/labels")] {
            let file = get(there, &format!("/v1/{path}?format=dcm"));
            assert_eq!(file.status, 200, "{}", file.text());
            let written = folder.path().join("mask.dcm");
            std::fs::write(&written, &file.body).unwrap();
            let labels = Labels::beside(&written, &volume).unwrap();
            assert!(labels.mask(&TargetLabel::Any).unwrap() == mask, "{path}");
            let named = file.body.windows(10).any(|w| w == b"Herd links");
            assert_eq!(named, path.ends_with("labels"), "{path}");
        }
        // Of another scan there is none.
        let (plain, _) = upload(there);
        let object = object_on(there, &plain, &json!({}));
        let refused = get(there, &format!("/v1/objects/{object}/mask?format=dcm"));
        assert!(refused.error(422, "error").contains("DICOM series"), "{}", refused.text());
        // One file is a series of one slice.
        let (_, slice) = files(&Series::new("CT")).remove(0);
        let told = send(there, "name=slice.dcm", &slice).json(201);
        assert_eq!(told["shape"], json!([COLUMNS, ROWS, 1]));
        assert!(!Path::new("/tmp/prism-outside").exists());
    }

    #[test]
    fn of_several_series_one_is_asked_for() {
        let server = started(Settings::default());
        let there = server.address;
        let study = archive(&[Series::new("CT"), other()]);
        let list = send(there, "name=study.zip", &study).json(409);
        assert!(list["error"].as_str().unwrap().contains("?series="), "{list}");
        let told = |n: usize, what: &str| list["series"][n][what].clone();
        assert_eq!([told(0, "series"), told(1, "series")], [json!("1.2.3.4"), json!("1.2.9")]);
        assert_eq!((told(1, "number"), told(1, "description")), (json!("7"), json!("Bone")));
        assert_eq!(told(0, "shape"), json!([COLUMNS, ROWS, SLICES]));
        assert!(list["series"].as_array().map(Vec::len) == Some(2));
        for asked in ["1.2.9", "7", "bone"] {
            let told = send(there, &format!("name=study.zip&series={asked}"), &study).json(201);
            assert_eq!(told["format"], "DICOM");
        }
        let refused = send(there, "name=study.zip&series=Leber", &study);
        assert!(refused.error(422, "error").contains("no series 'Leber'"));
        // Nothing was taken but what was asked for.
        assert!(get(there, "/metrics").text().contains("prism_scans 3\n"));
        let plain = std::fs::read(here("examples/data/lung1_image.nii.gz")).unwrap();
        assert!(send(there, "series=7", &plain).error(422, "error").contains("no DICOM"));
    }

    #[test]
    fn archives_that_are_none_or_too_large_are_refused() {
        let server = started(Settings::default());
        let there = server.address;
        let study = archive(&[Series::new("CT")]);
        for bytes in [
            zipped(&[("a.txt", b"no image".to_vec())]),
            study[..study.len() / 2].to_vec(),
            b"PK\x03\x04".to_vec(),
            zipped(&[]),
        ] {
            let refused = send(there, "name=study.zip", &bytes);
            assert_eq!(refused.status, 422, "{}", refused.text());
        }
        // What says that it is larger than any scan, unpacked: nothing of it is unpacked.
        let files: Vec<_> = (0..32).map(|n| (n.to_string(), vec![7; 100])).collect();
        let files: Vec<_> = files.iter().map(|(n, bytes)| (n.as_str(), bytes.clone())).collect();
        let mut bomb = zipped(&files);
        let entries: Vec<usize> =
            (0..bomb.len() - 4).filter(|at| bomb[*at..].starts_with(b"PK\x01\x02")).collect();
        assert_eq!(entries.len(), 32);
        for at in entries {
            bomb[at + 24..at + 28].copy_from_slice(&0xFFFF_FF00u32.to_le_bytes());
        }
        let refused = send(there, "name=study.zip", &bomb);
        assert!(refused.error(413, "error").contains("when unpacked"), "{}", refused.text());
        // Names say what may come.
        assert_eq!(send(there, "name=study.rar", &study).status, 415);
        assert!(get(there, "/metrics").text().contains("prism_scans 0\n"));
    }

    #[cfg(unix)]
    #[test]
    fn a_series_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let keeping = || Settings { keep: Some(Keep::at(&state)), ..Settings::default() };
        let study = archive(&[Series::new("CT"), other()]);
        // Before it is known which is meant there is nothing to be kept.
        let keep = Keep { bytes: study.len() as u64 / 2, ..Keep::at(&state) };
        let mut server = started(Settings { keep: Some(keep), ..Settings::default() });
        assert_eq!(send(server.address, "name=study.zip", &study).status, 409);
        assert_eq!(send(server.address, "name=study.zip&series=7", &study).status, 507);
        assert_eq!(std::fs::read_dir(&state).unwrap().count(), 1);
        server.end();
        let mut server = started(keeping());
        assert_eq!(send(server.address, "name=study.zip", &study).status, 409);
        let told = send(server.address, "name=study.zip&series=7", &study).json(201);
        let path = format!("/v1/scans/{}", told["scan"].as_str().unwrap());
        let image = get(server.address, &format!("{path}/image?format=nii")).body;
        server.end();
        let mut server = started(keeping());
        assert!(server.warnings.is_empty(), "{:?}", server.warnings);
        let mut there = get(server.address, &path).json(200);
        assert_eq!(there["objects"].take(), json!([]));
        assert_eq!(there["format"], "DICOM");
        assert!(get(server.address, &format!("{path}/image?format=nii")).body == image);
        server.end();
    }
}

#[test]
fn diameters_are_told_with_an_answer() {
    let server = started(Settings::default());
    let at = server.address;
    let (scan, _) = upload(at);
    let image = example();
    let path = format!("/v1/objects/{}", object_on(at, &scan, &json!({})));
    // A row of 30 voxels on one slice, a shorter one on another.
    let [_, nj, nk] = image.grid.size;
    let rows: Vec<u8> = (0..image.grid.voxels())
        .map(|at| match [at / nk / nj, at / nk % nj, at % nk] {
            [i, 70, 14] => u8::from((60..90).contains(&i)),
            [i, 40, 5] => u8::from((60..70).contains(&i)),
            _ => 0,
        })
        .collect();
    let file = mask_file(Path::new("m.nrrd"), &image.grid, &image.description, &rows).unwrap();
    let mut mask = Mask::new(image.grid.size);
    let told = mask.take(&ask(at, "PUT", &format!("{path}/mask"), &[], &file));
    let [x, y, _] = image.grid.spacing();
    for (n, mm) in [30.0 * x, y].into_iter().enumerate() {
        let found = told["diameters_mm"][n].as_f64().unwrap();
        assert!((found - mm).abs() < 1e-6, "{told}");
    }
    assert_eq!(told["diameters_slice"], 14);
    let nothing = mask.take(&post(at, &format!("{path}/reset"), &json!({})));
    assert!(nothing["diameters_mm"].is_null() && nothing["diameters_slice"].is_null());
}

#[test]
fn what_the_network_is_unsure_of_is_told() {
    let server = started(Settings::default());
    let at = server.address;
    let (scan, _) = upload(at);
    let image = Arc::new(example());
    let object = object_on(at, &scan, &json!({}));
    let path = |what: &str| format!("/v1/objects/{object}/{what}");
    let told = || {
        let reply = get(at, &path("unsure"));
        assert_eq!(reply.status, 200, "{}", reply.text());
        let about: Value =
            serde_json::from_str(reply.header("X-Prism-Answer").expect("what it is")).unwrap();
        (about, reply.body)
    };
    assert_eq!(told(), (json!({ "voxels": 0, "region": null }), vec![]));
    assert_eq!(post(at, &path("prompts"), &box_and_click()).status, 200);
    let mut library = session(&image);
    library.interact(&said(&[(CLICK, true)], Some(BOX))).unwrap();
    let probability = library.prediction().unwrap().probability();
    let [ni, nj, nk] = image.grid.size;
    let is_unsure =
        |[i, j, k]: [usize; 3]| (0.25..=0.75).contains(&probability[(i * nj + j) * nk + k]);
    let (about, bits) = told();
    let region: [[usize; 2]; 3] = serde_json::from_value(about["region"].clone()).unwrap();
    let size = region.map(|[low, high]| high - low);
    assert_eq!(bits.len(), size.iter().product::<usize>().div_ceil(8));
    let (mut voxels, mut low, mut high) = (0, [usize::MAX; 3], [0; 3]);
    for at in 0..ni * nj * nk {
        let voxel = [at / nk / nj, at / nk % nj, at % nk];
        let inside = (0..3).all(|a| (region[a][0]..region[a][1]).contains(&voxel[a]));
        let marked = inside && {
            let [x, y, z]: [usize; 3] = std::array::from_fn(|a| voxel[a] - region[a][0]);
            let place = (z * size[1] + y) * size[0] + x;
            bits[place / 8] >> (place % 8) & 1 == 1
        };
        assert_eq!(marked, is_unsure(voxel), "{voxel:?}");
        if marked {
            voxels += 1;
            low = std::array::from_fn(|a| low[a].min(voxel[a]));
            high = std::array::from_fn(|a| high[a].max(voxel[a] + 1));
        }
    }
    assert!(voxels > 0 && about["voxels"] == json!(voxels), "{about}");
    let bounds: [[usize; 2]; 3] = std::array::from_fn(|a| [low[a], high[a]]);
    assert_eq!(region, bounds);
    // Of a mask that was given there is no doubt.
    let (grid, description) = (&image.grid, &image.description);
    let file = mask_file(Path::new("m.nii"), grid, description, &library.mask()).unwrap();
    assert_eq!(ask(at, "PUT", &path("mask"), &[], &file).status, 200);
    assert_eq!(told(), (json!({ "voxels": 0, "region": null }), vec![]));
    let lost = format!("/v1/objects/{}/unsure", "0".repeat(32));
    assert!(get(at, &lost).error(404, "error").contains("no such object"));
}
