//! Invalid, excessive or hostile requests, and callers without permission.

use super::upload;
use crate::http::{ask, count, get, object_on, post, started};
use crate::viewer::{Viewer, nnia};
use prism::serve::{Secret, Settings};
use prism::volume::{Affine, Description, Element, Grid, Volume, write_mask};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

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
        (body(&prompts, "{}"), 422, "no prompts"),
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
        (ask(at, "PUT", "/v1/scans", &[], b""), 405, "method not allowed"),
        (get(at, "/v1/what"), 404, "nnInteractive"),
    ] {
        let error = reply.error(status, "error");
        assert!(error.contains(says), "{error}");
    }
    // A message quotes only as much of the input as identifies it.
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
        assert!(error.contains("in a separate file"), "{error}");
    }
    // More than is possible, or without a length: refused before it is read.
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
    // The page itself asks for the token; it may use only what comes from here.
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
    // One is allowed, and asks for permission without the token.
    let friend = ("Origin", "https://viewer.example.org");
    let reply = with(&[bearer, friend]);
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("Access-Control-Allow-Origin"), Some(friend.1));
    let may = ask(at, "OPTIONS", "/v1/scans", &[friend], b"");
    assert_eq!((may.status, may.header("Access-Control-Allow-Origin")), (204, Some(friend.1)));
    assert_eq!(with(&[friend]).status, 401);
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
    // DELETE and GET have no body, even if one is announced: it is not waited for.
    for (method, path, status) in [("DELETE", "/v1/objects/x", 200), ("GET", "/healthz", 200)] {
        assert_eq!(ask(at, method, path, &[("Content-Length", "20")], b"").status, status);
    }
}

#[test]
fn who_announces_much_and_sends_nothing_takes_no_memory() {
    let server = started(Settings { max_sessions: 2, ..Settings::default() });
    let at = server.address;
    let gauge = |name: &str| count(at, name);
    let most = get(at, "/v1").json(200)["limits"]["scan_bytes"].as_u64().unwrap();
    let length = most.min(2 << 30);
    let silent = || {
        let mut stream = TcpStream::connect(at).unwrap();
        let head = format!("POST /v1/scans HTTP/1.1\r\nHost: {at}\r\nContent-Length: {length}");
        stream.write_all(format!("{head}\r\n\r\n").as_bytes()).unwrap();
        stream
    };
    let silent = [silent(), silent()];
    // No other request is made before both have their places, or it could take one.
    let end = Instant::now() + Duration::from_secs(40);
    while gauge("prism_arriving") < 2 {
        assert!(Instant::now() < end, "nobody waits for them");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(ask(at, "POST", "/v1/scans", &[], b"").status, 503);
    // What they announced would be as much by itself; other tests take some memory, and release it
    // again.
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
        // A fault of the server itself would be 500.
        let known = [200, 201, 400, 413, 422, 503].contains(&reply.status);
        assert!(known, "{path} in round {round}: {} {}", reply.status, reply.text());
        // What was accepted is released, so that there is room for more.
        if reply.status == 201 {
            let scan = reply.json(201)["scan"].as_str().unwrap().to_string();
            ask(at, "DELETE", &format!("/v1/scans/{scan}"), &[], b"");
        }
    }
    assert!(statuses[&400] > 200 && statuses.contains_key(&200), "{statuses:?}");
    assert_eq!(get(at, "/healthz").status, 200);
    // Lines that are not HTTP end only their own connection.
    for line in ["", "\r\n\r\n", "GET\r\n\r\n", "\x16\x03\x01\x02", "GET / HTTP/9.9\r\n\r\n"] {
        let mut stream = TcpStream::connect(at).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let _ = stream.read_to_end(&mut vec![]);
    }
    assert_eq!(get(at, "/healthz").status, 200);
}
