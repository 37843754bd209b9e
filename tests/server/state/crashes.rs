//! A client that comes back after a crash or a restart finds its state, and is answered meanwhile.

use super::{MORE, OFF, Process, answer, clicked, form, infer, keeping, the, until_empty, upload};
use crate::common::here;
use crate::http::{
    BOX, CLICK, Part, act, ask, box_and_click, example, get, object_on, opened, point, said,
    session, started,
};
use crate::viewer::{Viewer, array_of_example, nnia};
use flate2::{Compression, write::GzEncoder};
use prism::prompt::{Dense, Prompts};
use prism::serve::Settings;
use serde_json::{Value, json};
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// A request whose answer is not waited for: it is in progress when this returns.
fn sent(at: SocketAddr, path: &str, lease: Option<&str>, body: &Value) -> TcpStream {
    let body = body.to_string();
    let lease = lease.map_or_else(String::new, |lease| format!("X-Lease-Token: {lease}\r\n"));
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: {at}\r\n{lease}Content-Length: {}\r\n\r\n",
        body.len()
    );
    let mut stream = TcpStream::connect(at).unwrap();
    stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    std::thread::sleep(Duration::from_millis(60));
    stream
}

#[test]
fn who_comes_back_after_a_crash_finds_scan_objects_and_history() {
    let folder = tempfile::tempdir().unwrap();
    let image = Arc::new(example());
    let mut library = session(&image);
    let server = Process::begin(folder.path());
    let at = server.at;
    let scan = upload(at);
    let object = object_on(at, &scan, &json!({ "name": "tumour", "colour": [1, 2, 3] }));
    let gone = object_on(at, &scan, &json!({}));
    let other = object_on(at, &scan, &json!({ "name": "knötchen" }));
    act(at, &gone, "prompts", &box_and_click());
    assert_eq!(ask(at, "DELETE", &format!("/v1/objects/{gone}"), &[], b"").status, 200);
    act(at, &object, "prompts", &box_and_click());
    library.interact(&said(&[(CLICK, true)], Some(BOX))).unwrap();
    let one = library.mask();
    act(at, &object, "prompts", &point(OFF, false));
    library.interact(&said(&[(OFF, false)], None)).unwrap();
    let two = library.mask();
    assert!(two != one);
    act(at, &other, "prompts", &point(CLICK, true));
    act(at, &other, "reset", &json!({}));
    act(at, &object, "undo", &json!({}));
    let named = json!({ "name": "Herd 2", "colour": [9, 8, 7] }).to_string();
    ask(at, "PATCH", &format!("/v1/objects/{object}"), &[], named.as_bytes()).json(200);
    let about = get(at, &format!("/v1/scans/{scan}")).json(200);
    assert_eq!(about["objects"][0]["name"], "Herd 2");
    // It is killed while it works on a click.
    let click = sent(at, &format!("/v1/objects/{other}/prompts"), None, &point(CLICK, true));
    server.kill();
    drop(click);

    let server = Process::begin(folder.path());
    let at = server.at;
    assert!(!server.errors().contains("damaged"), "{}", server.errors());
    let mut now = get(at, &format!("/v1/scans/{scan}")).json(200);
    // The click that was in progress is there completely or not at all.
    let voxels = now["objects"][1]["voxels"].as_u64().unwrap();
    let (told, mask) = answer(at, &other);
    assert_eq!(told["step"], json!(u8::from(voxels > 0)));
    assert_eq!(mask.iter().filter(|v| **v != 0).count() as u64, voxels);
    now["objects"][1]["voxels"] = json!(0);
    assert_eq!(now, about);
    assert_eq!(now["objects"].as_array().map(Vec::len), Some(2));
    assert_eq!(get(at, &format!("/v1/objects/{gone}/answer")).status, 404);
    let (told, mask) = answer(at, &object);
    assert!(mask == one && told["step"] == 1 && told["redo"] == true, "{told}");
    act(at, &object, "redo", &json!({}));
    assert!(answer(at, &object).1 == two);
    act(at, &object, "undo", &json!({}));
    act(at, &object, "undo", &json!({}));
    let (told, mask) = answer(at, &object);
    assert!(mask.iter().all(|v| *v == 0) && told["undo"] == false, "{told}");
    act(at, &object, "redo", &json!({}));
    // New prompts continue from there as if nothing had happened.
    act(at, &object, "prompts", &point(MORE, true));
    library.undo();
    library.interact(&said(&[(MORE, true)], None)).unwrap();
    assert!(answer(at, &object).1 == library.mask());
    // Once more, from a state that was itself restored.
    server.kill();
    let server = Process::begin(folder.path());
    let (told, mask) = answer(server.at, &object);
    assert!(mask == library.mask() && told["step"] == 2 && told["redo"] == false, "{told}");
    // A new object differs from all before.
    let new = object_on(server.at, &scan, &json!({}));
    assert!(![&object, &gone, &other].contains(&&new));
    server.kill();
}

#[test]
fn a_lease_survives_a_crash_with_all_that_was_said() {
    let folder = tempfile::tempdir().unwrap();
    let (size, spacing, values, image) = array_of_example();
    let mut library = session(&image);
    let server = Process::begin(folder.path());
    let mut viewer = Viewer::new(server.at);
    // An earlier image is gone with its prompts.
    viewer.open([4, 5, 6], [1.0; 3], &(0..120).collect::<Vec<i16>>());
    viewer.open(size, spacing, &values);
    let bounds = json!([[BOX[2], BOX[5]], [BOX[1], BOX[4]], [BOX[0], BOX[3]]]);
    // A reset leaves nothing.
    assert_eq!(viewer.bounds(bounds.clone(), true), (true, true));
    assert_eq!(viewer.post("/reset_interactions", &json!({})).json(200), json!({}));
    viewer.buffer.fill(0);
    assert_eq!(viewer.bounds(bounds, true), (true, true));
    library.interact(&said(&[], Some(BOX))).unwrap();
    let one = library.mask();
    assert!(viewer.point(json!([OFF[2], OFF[1], OFF[0]]), false, true).0);
    library.interact(&said(&[(OFF, false)], None)).unwrap();
    let two = library.mask();
    assert!(two != one);
    // A prompt waits for its prediction; then one is in progress.
    assert!(!viewer.point(json!([MORE[2], MORE[1], MORE[0]]), true, false).0);
    let empty = Viewer::new(server.at);
    server.kill();

    let server = Process::begin(folder.path());
    assert!(!server.errors().contains("damaged"), "{}", server.errors());
    viewer.at = server.at;
    let token = [("X-Lease-Token", viewer.lease.as_str())];
    let beat = ask(server.at, "POST", "/heartbeat", &token, b"{}").json(200);
    assert!(beat["remaining_seconds"].as_f64() > Some(1.0));
    let early = ask(server.at, "POST", "/predict", &[("X-Lease-Token", &empty.lease)], b"{}");
    assert!(early.error(400, "detail").contains("set_image"));
    // It is unknown which of the last answers arrived: everything is in the next.
    viewer.buffer.fill(7);
    let reply = viewer.post("/predict", &json!({}));
    assert_eq!(viewer.take(reply), (true, true));
    library.interact(&said(&[(MORE, true)], None)).unwrap();
    assert!(viewer.mask() == library.mask());
    let body = json!({ "coordinates": [14, 80, 80], "include_interaction": true });
    let click = sent(server.at, "/add_point_interaction", Some(&viewer.lease), &body);
    server.kill();
    drop(click);

    let server = Process::begin(folder.path());
    viewer.at = server.at;
    // Whether or not the last click was completed, undo goes back step by step.
    let mut steps = vec![];
    while viewer.undo().0 {
        steps.push(viewer.mask());
        assert!(steps.len() < 5);
    }
    assert!(steps.len() == 3 || steps.len() == 4, "{}", steps.len());
    let last = &steps[steps.len() - 3..];
    assert!(last[0] == two && last[1] == one && last[2].iter().all(|v| *v == 0));
    // A mask that is given is a step too.
    let marks: Vec<u8> = (0..viewer.buffer.len()).map(|at| u8::from(at % 999 == 0)).collect();
    let mask = nnia("uint8", 1, &size, &marks);
    let reply = viewer.send("/add_initial_seg_interaction", &json!({}), &mask);
    assert_eq!(viewer.take(reply), (false, false));
    viewer.buffer = marks.clone();
    viewer.point(json!([14, 80, 80]), true, true);
    let clicked = viewer.buffer.clone();
    server.kill();
    let server = Process::begin(folder.path());
    viewer.at = server.at;
    viewer.buffer.fill(7);
    // A click that agrees changes nothing, and is a step.
    assert!(viewer.point(json!([14, 80, 80]), true, true).0 && viewer.buffer == clicked);
    assert!(viewer.undo().0 && viewer.undo().0 && viewer.buffer == marks);
    assert!(viewer.undo().0 && viewer.buffer.iter().all(|v| *v == 0));
    assert!(!viewer.undo().0);
    // A client that was dropped does not come back.
    let token = [("X-Lease-Token", viewer.lease.as_str())];
    assert_eq!(ask(server.at, "POST", "/release", &token, b"").status, 200);
    server.kill();
    let server = Process::begin(folder.path());
    assert_eq!(ask(server.at, "POST", "/heartbeat", &token, b"{}").status, 410);
    server.kill();
}

#[test]
fn sessions_of_itk_snap_and_monai_label_survive_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let image = example();
    let mut server = started(keeping(&state));
    let at = server.address;
    // ITK-SNAP: float32 in gzip, x fastest.
    let [ni, nj, nk] = image.grid.size;
    let places = (0..ni * nj * nk).map(|at| [at % ni, at / ni % nj, at / ni / nj]);
    let bytes: Vec<u8> = places.flat_map(|v| image.at(v).to_le_bytes()).collect();
    let mut packed = GzEncoder::new(vec![], Compression::fast());
    packed.write_all(&bytes).unwrap();
    let packed = packed.finish().unwrap();
    let meta = json!({ "dimensions": [ni, nj, nk], "spacing": image.grid.spacing() }).to_string();
    let snap = get(at, "/start_session").json(200)["session_id"].as_str().unwrap().to_string();
    let parts: [Part; 2] =
        [("file", Some("image.gz"), &packed), ("metadata", None, meta.as_bytes())];
    let uploaded = form(at, "POST", &format!("/upload_raw/{snap}"), &parts);
    assert_eq!(uploaded.status, 200, "{}", uploaded.text());
    let click = |at: SocketAddr, [x, y, z]: [usize; 3], on: bool| {
        let path = format!("/process_point_interaction/{snap}?x={x}&y={y}&z={z}&foreground={on}");
        get(at, &path).json(200)["result"].as_str().unwrap().to_string()
    };
    let first = click(at, CLICK, true);
    let second = click(at, OFF, false);
    assert!(second != first);
    assert_eq!(get(at, &format!("/reset_interactions/{snap}")).status, 200);
    assert!(click(at, CLICK, true) == first);
    // MONAI Label: all clicks each time.
    let file = std::fs::read(here("examples/data/lung1_image.nii.gz")).unwrap();
    let created = form(at, "PUT", "/session/", &[("files", Some("lung.nii.gz"), &file)]).json(200);
    let label = created["session_id"].as_str().unwrap().to_string();
    let infer = |at: SocketAddr, on: &[[usize; 3]], off: &[[usize; 3]]| {
        let params = json!({ "foreground": on, "background": off, "result_extension": ".nii" });
        infer(at, &label, &params)
    };
    let one = infer(at, &[CLICK], &[]);
    let two = infer(at, &[CLICK], &[OFF]);
    let three = infer(at, &[CLICK, MORE], &[OFF]);
    assert!(two != one && three != two);
    assert!(infer(at, &[CLICK], &[OFF]) == two);
    server.end();

    let mut server = started(keeping(&state));
    assert!(server.warnings.is_empty(), "{:?}", server.warnings);
    let at = server.address;
    assert!(click(at, OFF, false) == second);
    assert!(infer(at, &[CLICK], &[OFF]) == two);
    assert!(infer(at, &[CLICK, MORE], &[OFF]) == three);
    assert!(infer(at, &[CLICK], &[]) == one);
    assert_eq!(get(at, &format!("/end_session/{snap}")).status, 200);
    server.end();
    let mut server = started(keeping(&state));
    let at = server.address;
    assert_eq!(get(at, &format!("/reset_interactions/{snap}")).status, 404);
    assert!(infer(at, &[CLICK], &[]) == one);
    assert_eq!(ask(at, "DELETE", &format!("/session/{label}"), &[], b"").status, 200);
    until_empty(&state);
    server.end();
}

#[test]
fn a_mask_that_was_given_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let image = Arc::new(example());
    let mut server = started(keeping(&state));
    let at = server.address;
    let scan = upload(at);
    let object = object_on(at, &scan, &json!({}));
    let mask: Vec<u8> = (0..image.grid.voxels()).map(|at| u8::from(at % 1000 == 0)).collect();
    let file = prism::volume::mask_file(Path::new("m.mha"), &image.grid, &image.description, &mask);
    let given = ask(at, "PUT", &format!("/v1/objects/{object}/mask"), &[], &file.unwrap());
    assert_eq!(given.status, 200, "{}", given.text());
    server.end();
    let mut server = started(keeping(&state));
    let at = server.address;
    assert!(answer(at, &object).1 == mask);
    act(at, &object, "prompts", &point(CLICK, true));
    let mut library = session(&image);
    let dense = Prompts { dense: Some(Dense::Mask(mask)), ..Prompts::default() };
    library.interact(&dense).unwrap();
    library.interact(&said(&[(CLICK, true)], None)).unwrap();
    assert!(answer(at, &object).1 == library.mask());
    server.end();
}

/// A server in this process that is not waited for.
fn beginning(settings: Settings) -> (SocketAddr, impl FnOnce() -> Vec<String>) {
    let server = opened(settings);
    let (at, stop, restored) = (server.address(), server.stopper(), server.restored());
    let thread = std::thread::spawn(move || server.run());
    let end = move || {
        stop.stop();
        thread.join().unwrap().unwrap();
        restored.wait()
    };
    (at, end)
}

#[test]
fn a_server_answers_while_it_brings_back_what_there_was() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let (scan, object, mask) = clicked(&state);
    // Many more, whose identifiers are unknown.
    let journal = the(&state, "journal");
    let first = journal.parent().unwrap();
    const MORE: usize = 60;
    for key in 1..=MORE {
        let copy = state.join(format!("scan-{key:032x}"));
        std::fs::create_dir(&copy).unwrap();
        for name in ["journal", "scan-0"] {
            std::fs::copy(first.join(name), copy.join(name)).unwrap();
        }
    }
    // Once more where it was done before it was asked: this process may be paused for as long.
    let mut tries = 0;
    let (at, end) = loop {
        let (at, end) = beginning(Settings { max_sessions: 3, ..keeping(&state) });
        if refused_while_restoring(at, &scan, MORE + 1) > 0 {
            break (at, end);
        }
        tries += 1;
        assert!(tries < 20, "no request is refused");
        end();
    };
    // All are served, and no more are accepted.
    assert!(answer(at, &object).1 == mask);
    let file = std::fs::read(here("examples/data/lung1_image.nii.gz")).unwrap();
    let full = ask(at, "POST", "/v1/scans?name=lung.nii.gz", &[], &file);
    assert!(full.error(503, "error").contains("at capacity"), "{}", full.text());
    assert!(get(at, "/metrics").text().contains(&format!("prism_scans {}\n", MORE + 1)));
    let warnings = end();
    assert!(warnings.iter().any(|w| w.contains("--max-sessions")), "{warnings:?}");
    // Ending it early loses nothing.
    let (_, end) = beginning(keeping(&state));
    end();
    let left = std::fs::read_dir(&state).unwrap().count();
    assert_eq!(left, MORE + 2);
}

/// How many requests about a scan a server refuses while it restores its state, of which it says
/// how far it is.
fn refused_while_restoring(at: SocketAddr, scan: &str, all: usize) -> usize {
    let (mut refused, mut told) = (0, vec![]);
    loop {
        let health = get(at, "/healthz").json(200);
        assert_eq!(health["ok"], true);
        let Some(done) = health["restoring"]["done"].as_u64() else { break };
        assert_eq!(health["restoring"]["of"], json!(all));
        told.push(done);
        let reply = get(at, &format!("/v1/scans/{scan}"));
        if reply.status == 503 {
            assert!(reply.error(503, "error").contains("restoring its state"), "{}", reply.text());
            assert!(reply.header("Retry-After").is_some());
            refused += 1;
        }
        // The page tells users so.
        assert_eq!(get(at, "/").status, 200);
        let claim = ask(at, "POST", "/claim", &[], b"{}");
        assert_eq!(claim.status, 503, "{}", claim.text());
    }
    assert!(told.is_sorted(), "{told:?}");
    refused
}
