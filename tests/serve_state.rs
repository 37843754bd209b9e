//! What a server keeps on disk: whoever comes back after a crash (a process that is killed) or a
//! restart finds scan, objects and history, to the bit; what broke off or was damaged is told; a
//! full disk changes nothing; nothing stays that was released.
#![cfg(all(feature = "serve", unix))]

mod common;
#[path = "common/http.rs"]
mod http;
#[path = "common/viewer.rs"]
mod viewer;

use common::here;
use flate2::{Compression, write::GzEncoder};
use http::{
    BOX, CLICK, Part, ask, box_and_click, example, get, model, object_on, post, said, session,
    started, wait_restored,
};
use prism::prompt::{Dense, Prompts};
use prism::serve::{Keep, Server, Settings};
use prism::volume::Volume;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use viewer::{Viewer, array_of_example, nnia};

/// Off the example's nodule, beside it.
const OFF: [usize; 3] = [72, 71, 14];
const MORE: [usize; 3] = [78, 84, 14];

/// The program, started with a folder for its state.
struct Process {
    child: Child,
    at: SocketAddr,
    folder: PathBuf,
    // What it says is not refused.
    _out: BufReader<ChildStdout>,
}

impl Process {
    fn begin(folder: &Path) -> Process {
        let errors = File::create(folder.join("errors")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_prism"));
        command.args(["serve", "-m", here("models/small.safetensors").to_str().unwrap()]);
        command.args(["--threads", "1", "--bind", "127.0.0.1:0", "--state"]);
        command.arg(folder.join("state")).args(["--state-bytes", "1G"]).env_remove("PRISM_TOKEN");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
        let mut child = command.spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut first = String::new();
        out.read_line(&mut first).unwrap();
        let url = first.split_whitespace().find_map(|w| w.strip_prefix("http://"));
        let folder = folder.to_path_buf();
        let why = || std::fs::read_to_string(folder.join("errors")).unwrap();
        let at = url.unwrap_or_else(|| panic!("{first}{}", why())).parse().unwrap();
        wait_restored(at);
        Process { child, at, folder, _out: out }
    }

    /// What it complained of.
    fn errors(&self) -> String {
        std::fs::read_to_string(self.folder.join("errors")).unwrap()
    }

    /// kill -9, at once.
    fn kill(self) {}
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A request that nobody waits for: it is under way when this returns.
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

fn upload(at: SocketAddr) -> String {
    let file = std::fs::read(here("examples/data/lung1_image.nii.gz")).unwrap();
    let scan = ask(at, "POST", "/v1/scans?name=lung.nii.gz&modality=ct", &[], &file).json(201);
    scan["scan"].as_str().unwrap().to_string()
}

fn point(at: [usize; 3], on: bool) -> Value {
    json!({ "points": [{ "at": at, "on": on }] })
}

/// Does something to an object.
#[track_caller]
fn act(at: SocketAddr, object: &str, what: &str, body: &Value) {
    let reply = post(at, &format!("/v1/objects/{object}/{what}"), body);
    assert_eq!(reply.status, 200, "{}", reply.text());
}

/// What is said of an object's answer, and its mask, `[i][j][k]`.
fn answer(at: SocketAddr, object: &str) -> (Value, Vec<u8>) {
    let reply = get(at, &format!("/v1/objects/{object}/answer"));
    assert_eq!(reply.status, 200, "{}", reply.text());
    let about = serde_json::from_str(reply.header("X-Prism-Answer").unwrap()).unwrap();
    let file = get(at, &format!("/v1/objects/{object}/mask?format=nii"));
    let mask = Volume::of_file(file.body, None).unwrap().values();
    (about, mask.iter().map(|v| u8::from(*v != 0.0)).collect())
}

/// A server in this process with a folder for its state.
fn keeping(folder: &Path) -> Settings {
    let keep = Keep { bytes: 1 << 30, ..Keep::at(folder) };
    Settings { keep: Some(keep), ..Settings::default() }
}

/// What a server that ended has left in a folder: a scan and an object, and the object's mask after
/// a click.
fn clicked(state: &Path) -> (String, String, Vec<u8>) {
    let mut server = started(keeping(state));
    let scan = upload(server.address);
    let object = object_on(server.address, &scan, &json!({}));
    act(server.address, &object, "prompts", &point(CLICK, true));
    let (_, mask) = answer(server.address, &object);
    server.end();
    (scan, object, mask)
}

/// All files below a folder, and the folders.
fn below(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    // Some of it may just be going.
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(below(&path));
        }
        found.push(path);
    }
    found
}

/// The one file of a name.
fn the(folder: &Path, name: &str) -> PathBuf {
    let mut found = below(folder);
    found.retain(|path| path.file_name().unwrap() == name);
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

/// Where the records of a journal begin, and where the last ends.
fn records(journal: &[u8]) -> Vec<usize> {
    let mut places = vec![8];
    while let Some(head) = journal.get(places[places.len() - 1]..).filter(|rest| rest.len() > 16) {
        let length = u64::from_le_bytes(head[..8].try_into().unwrap()) as usize;
        places.push(places[places.len() - 1] + 16 + length + 32);
    }
    places
}

/// Appends a record to a journal, as a server writes it.
fn append(journal: &mut Vec<u8>, record: &[u8]) {
    let chain = journal[journal.len() - 32..].to_vec();
    let length = (record.len() as u64).to_le_bytes();
    let check = blake3::hash(&[&chain[..], &length[..]].concat());
    let hash = blake3::hash(&[&chain[..], &length[..], record].concat());
    journal.extend(length);
    journal.extend(&check.as_bytes()[..8]);
    journal.extend(record);
    journal.extend(hash.as_bytes());
}

#[test]
fn names_alone_do_not_make_a_journal_long() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let (scan, object, mask) = clicked(&state);
    // As if it had been called otherwise again and again: the object's number, name and colour.
    let path = the(&state, "journal");
    let mut journal = std::fs::read(&path).unwrap();
    let short = journal.len();
    for n in 0..300u32 {
        let name = format!("{n:020000}");
        let length = (name.len() as u64).to_le_bytes();
        let number = 0u64.to_le_bytes();
        let record =
            [&[10u8][..], &number[..], &length[..], name.as_bytes(), &[1u8, 2, 3][..]].concat();
        append(&mut journal, &record);
    }
    assert!(journal.len() > 5 << 20);
    std::fs::write(&path, &journal).unwrap();
    let mut server = started(keeping(&state));
    assert!(server.warnings.is_empty(), "{:?}", server.warnings);
    let at = server.address;
    let about = get(at, &format!("/v1/scans/{scan}")).json(200);
    assert_eq!(about["objects"][0]["name"], format!("{:020000}", 299));
    // Another name has it written anew, and nothing else has to be done.
    let named = ask(at, "PATCH", &format!("/v1/objects/{object}"), &[], b"{\"name\":\"Herd\"}");
    assert_eq!(named.json(200)["name"], "Herd");
    let end = Instant::now() + Duration::from_secs(60);
    while path.metadata().unwrap().len() > short as u64 + 1000 {
        assert!(Instant::now() < end, "it is never written anew");
        std::thread::sleep(Duration::from_millis(20));
    }
    server.end();
    let mut server = started(keeping(&state));
    assert!(server.warnings.is_empty(), "{:?}", server.warnings);
    let about = get(server.address, &format!("/v1/scans/{scan}")).json(200);
    assert_eq!(about["objects"][0]["name"], "Herd");
    let (told, back) = answer(server.address, &object);
    assert!(back == mask && told["step"] == 1, "{told}");
    server.end();
}

#[test]
fn buffers_alone_do_not_make_a_journal_long() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let mut server = started(keeping(&state));
    let mut viewer = Viewer::new(server.address);
    let buffer = json!({ "shape": [4, 5, 6], "dtype": "uint8" });
    assert_eq!(viewer.post("/set_target_buffer", &buffer).json(200), json!({}));
    server.end();
    // As if it had been said again and again, before there is an image.
    let path = the(&state, "journal");
    let mut journal = std::fs::read(&path).unwrap();
    let (short, places) = (journal.len(), records(&journal));
    let record = journal[places[places.len() - 2] + 16..short - 32].to_vec();
    while journal.len() <= 5 << 20 {
        append(&mut journal, &record);
    }
    std::fs::write(&path, &journal).unwrap();
    let mut server = started(keeping(&state));
    assert!(server.warnings.is_empty(), "{:?}", server.warnings);
    viewer.at = server.address;
    assert_eq!(viewer.post("/set_target_buffer", &buffer).json(200), json!({}));
    let end = Instant::now() + Duration::from_secs(60);
    while path.metadata().unwrap().len() > short as u64 {
        assert!(Instant::now() < end, "it is never written anew");
        std::thread::sleep(Duration::from_millis(20));
    }
    server.end();
    let mut server = started(keeping(&state));
    assert!(server.warnings.is_empty(), "{:?}", server.warnings);
    viewer.at = server.address;
    viewer.open([4, 5, 6], [1.0; 3], &(0..120).collect::<Vec<i16>>());
    server.end();
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
    // The click that was under way is there as a whole or not at all.
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
    // What is said now goes on from there as if nothing had happened.
    act(at, &object, "prompts", &point(MORE, false));
    library.undo();
    library.interact(&said(&[(MORE, false)], None)).unwrap();
    assert!(answer(at, &object).1 == library.mask());
    // Once more, from a state that was brought back itself.
    server.kill();
    let server = Process::begin(folder.path());
    let (told, mask) = answer(server.at, &object);
    assert!(mask == library.mask() && told["step"] == 2 && told["redo"] == false, "{told}");
    // A new object is another than any before.
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
    // An image that came before is gone with what was said of it.
    viewer.open([4, 5, 6], [1.0; 3], &(0..120).collect::<Vec<i16>>());
    viewer.open(size, spacing, &values);
    let bounds = json!([[BOX[2], BOX[5]], [BOX[1], BOX[4]], [BOX[0], BOX[3]]]);
    // What is forgotten leaves nothing.
    assert_eq!(viewer.bounds(bounds.clone(), true), (true, true));
    assert_eq!(viewer.post("/reset_interactions", &json!({})).json(200), json!({}));
    viewer.buffer.fill(0);
    assert_eq!(viewer.bounds(bounds, true), (true, true));
    library.interact(&said(&[], Some(BOX))).unwrap();
    let one = library.mask();
    assert!(viewer.point(json!([OFF[2], OFF[1], OFF[0]]), false, true).0);
    library.interact(&said(&[(OFF, false)], None)).unwrap();
    let two = library.mask();
    // Something is said and waits for its prediction; then one is under way.
    assert!(!viewer.point(json!([MORE[2], MORE[1], MORE[0]]), false, false).0);
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
    // Nobody knows what of the last answers came: all is in the next.
    viewer.buffer.fill(7);
    let reply = viewer.post("/predict", &json!({}));
    assert_eq!(viewer.take(reply), (true, true));
    library.interact(&said(&[(MORE, false)], None)).unwrap();
    assert!(viewer.mask() == library.mask());
    let body = json!({ "coordinates": [14, 80, 80], "include_interaction": true });
    let click = sent(server.at, "/add_point_interaction", Some(&viewer.lease), &body);
    server.kill();
    drop(click);

    let server = Process::begin(folder.path());
    viewer.at = server.at;
    // Whether or not the last click came to its end, undo goes back step by step.
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
    // Nobody who was let go comes back.
    let token = [("X-Lease-Token", viewer.lease.as_str())];
    assert_eq!(ask(server.at, "POST", "/release", &token, b"").status, 200);
    server.kill();
    let server = Process::begin(folder.path());
    assert_eq!(ask(server.at, "POST", "/heartbeat", &token, b"{}").status, 410);
    server.kill();
}

const BOUNDARY: &str = "a-boundary-of-this-test";

/// A request with a form.
fn form(at: SocketAddr, method: &str, path: &str, parts: &[Part]) -> http::Reply {
    let kind = format!("multipart/form-data; boundary={BOUNDARY}");
    ask(at, method, path, &[("Content-Type", &kind)], &http::form(BOUNDARY, parts))
}

/// An answer to all clicks, as MONAI Label's clients ask for it.
#[track_caller]
fn infer(at: SocketAddr, label: &str, params: &Value) -> Vec<u8> {
    let path = format!("/infer/prism?output=image&session_id={label}");
    let reply = form(at, "POST", &path, &[("params", None, params.to_string().as_bytes())]);
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.body
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
    let three = infer(at, &[CLICK], &[OFF, MORE]);
    assert!(infer(at, &[CLICK], &[OFF]) == two);
    server.end();

    let mut server = started(keeping(&state));
    assert!(server.warnings.is_empty(), "{:?}", server.warnings);
    let at = server.address;
    assert!(click(at, OFF, false) == second);
    assert!(infer(at, &[CLICK], &[OFF]) == two);
    assert!(infer(at, &[CLICK], &[OFF, MORE]) == three);
    assert!(infer(at, &[CLICK], &[]) == one);
    assert_eq!(get(at, &format!("/end_session/{snap}")).status, 200);
    server.end();
    let mut server = started(keeping(&state));
    let at = server.address;
    assert_eq!(get(at, &format!("/reset_interactions/{snap}")).status, 404);
    assert!(infer(at, &[CLICK], &[]) == one);
    assert_eq!(ask(at, "DELETE", &format!("/session/{label}"), &[], b"").status, 200);
    let left = below(&state);
    assert_eq!(left, [state.join("lock")]);
    server.end();
}

#[test]
fn what_breaks_off_is_dropped_and_what_is_damaged_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let mut server = started(keeping(&state));
    let at = server.address;
    let scan = upload(at);
    let object = object_on(at, &scan, &json!({}));
    act(at, &object, "prompts", &box_and_click());
    let (_, one) = answer(at, &object);
    act(at, &object, "prompts", &point(OFF, false));
    let (_, two) = answer(at, &object);
    server.end();
    let path = the(&state, "journal");
    let whole = std::fs::read(&path).unwrap();
    // What it is, the scan, the object, two interactions.
    let places = records(&whole);
    assert_eq!((places.len(), places[5]), (6, whole.len()));

    // Wherever the last record breaks off, all before it is there, and goes on.
    for cut in [whole.len() - 1, whole.len() - 40, places[4] + 16, places[4] + 7] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let mut server = started(keeping(&state));
        let [warning] = &server.warnings[..] else { panic!("{:?}", server.warnings) };
        assert!(warning.contains("breaks off") && warning.contains(path.to_str().unwrap()));
        let at = server.address;
        let (told, mask) = answer(at, &object);
        assert!(mask == one && told["step"] == 1, "{told}");
        act(at, &object, "prompts", &point(OFF, false));
        server.end();
        assert!(std::fs::read(&path).unwrap().len() > places[4]);
        let mut server = started(keeping(&state));
        assert!(server.warnings.is_empty(), "{:?}", server.warnings);
        assert!(answer(server.address, &object).1 == two);
        server.end();
    }
    // A file that became longer in a power cut, of nothing.
    std::fs::write(&path, [&whole[..], &[0; 5000]].concat()).unwrap();
    let mut server = started(keeping(&state));
    assert!(server.warnings[0].contains("breaks off"), "{:?}", server.warnings);
    assert!(answer(server.address, &object).1 == two);
    server.end();
    assert!(std::fs::read(&path).unwrap() == whole);

    // A record before the last: what came before it is there, and a copy of all.
    for place in [places[3] + 100, places[3] + 3, places[4] - 5] {
        let mut damaged = whole.clone();
        damaged[place] ^= 1;
        std::fs::write(&path, &damaged).unwrap();
        let mut server = started(keeping(&state));
        let [warning] = &server.warnings[..] else { panic!("{:?}", server.warnings) };
        assert!(warning.contains("damaged") && warning.contains(path.to_str().unwrap()));
        let (told, mask) = answer(server.address, &object);
        assert!(told["step"] == 0 && mask.iter().all(|v| *v == 0), "{told}");
        server.end();
        let copy = path.with_file_name("journal.damaged");
        assert!(std::fs::read(&copy).unwrap() == damaged);
        std::fs::remove_file(copy).unwrap();
    }
    // The last one, which is as long as it should be and may have been answered: a copy of it, too.
    let mut damaged = whole.clone();
    damaged[places[4] + 100] ^= 1;
    std::fs::write(&path, &damaged).unwrap();
    let mut server = started(keeping(&state));
    let [warning] = &server.warnings[..] else { panic!("{:?}", server.warnings) };
    assert!(warning.contains("damaged") && warning.contains(path.to_str().unwrap()));
    let (told, mask) = answer(server.address, &object);
    assert!(mask == one && told["step"] == 1, "{told}");
    server.end();
    let copy = path.with_file_name("journal.damaged");
    assert!(std::fs::read(&copy).unwrap() == damaged);
    std::fs::remove_file(copy).unwrap();
    // A scan that is not what was sent is not worked on; it is left for a person to look at.
    std::fs::write(&path, &whole).unwrap();
    let file = the(&state, "scan-0");
    let bytes = std::fs::read(&file).unwrap();
    let mut damaged = bytes.clone();
    damaged[bytes.len() / 2] ^= 1;
    std::fs::write(&file, &damaged).unwrap();
    let mut server = started(keeping(&state));
    assert!(server.warnings[0].contains(file.to_str().unwrap()), "{:?}", server.warnings);
    assert_eq!(get(server.address, &format!("/v1/scans/{scan}")).status, 404);
    server.end();
    std::fs::write(&file, &bytes).unwrap();
    let mut server = started(keeping(&state));
    assert!(answer(server.address, &object).1 == two);
    server.end();
}

#[test]
fn a_full_disk_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let file = std::fs::read(here("examples/data/lung1_image.nii.gz")).unwrap();
    let of = |bytes: usize| {
        let keep = Keep { bytes: bytes as u64, ..Keep::at(&state) };
        Settings { keep: Some(keep), ..Settings::default() }
    };
    // No room for the scan: it is not taken, and nothing of it stays.
    let mut server = started(of(file.len() - 1));
    let at = server.address;
    let refused = ask(at, "POST", "/v1/scans?name=lung.nii.gz", &[], &file);
    let error = refused.error(507, "error");
    assert!(error.contains("--state-bytes"), "{error}");
    assert_eq!(below(&state), [state.join("lock")]);
    assert!(get(at, "/metrics").text().contains("prism_scans 0\n"));
    server.end();
    // Room for the scan and no answer: clicks are refused, and the object stays as it was.
    let mut server = started(of(file.len() + 1500));
    let at = server.address;
    let scan = upload(at);
    let object = object_on(at, &scan, &json!({}));
    for _ in 0..2 {
        let refused = post(at, &format!("/v1/objects/{object}/prompts"), &box_and_click());
        assert!(refused.error(507, "error").contains("nothing was changed"));
        let (told, mask) = answer(at, &object);
        assert!(told["step"] == 0 && mask.iter().all(|v| *v == 0), "{told}");
    }
    // What makes room goes on.
    act(at, &object, "reset", &json!({}));
    server.end();
    // With room it does.
    let mut server = started(keeping(&state));
    act(server.address, &object, "prompts", &box_and_click());
    server.end();
    // What nnInteractive's clients said before stays as well.
    let (size, spacing, values, _) = array_of_example();
    let used: u64 = below(&state).iter().map(|path| path.metadata().unwrap().len()).sum();
    let mut server = started(of(used as usize + 2 * values.len() + 4_000));
    let mut viewer = Viewer::new(server.address);
    viewer.open(size, spacing, &values);
    let marks: Vec<u8> = (0..values.len()).map(|at| u8::from(at * at % 3 == 1)).collect();
    let mask = nnia("uint8", 1, &size, &marks);
    let reply = viewer.send("/add_initial_seg_interaction", &json!({}), &mask);
    assert!(reply.error(507, "detail").contains("--state-bytes"));
    assert!(!viewer.undo().0);
    // Another image, which is not taken, leaves the one that was there.
    let image = nnia("int16", 2, &[1, size[0], size[1], size[2]], &vec![1; 2 * values.len()]);
    assert_eq!(viewer.send("/set_image", &json!({}), &image).status, 507);
    assert!(!viewer.point(json!([14, 80, 80]), true, false).0);
    assert!(viewer.undo().0);
    server.end();
}

#[test]
fn the_folder_is_one_servers_and_its_owners_alone() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let settings = || Settings { bind: "127.0.0.1:0".into(), ..keeping(&state) };
    // What others have there stays, whatever it is called.
    let others = state.join("gone-fishing");
    let mut server = started(settings());
    std::fs::create_dir(&others).unwrap();
    server.end();
    let mut server = started(settings());
    std::fs::remove_dir(&others).unwrap();
    let second = Server::open(settings(), model(), "small").err().unwrap();
    assert!(second.contains("another server") && second.contains(state.to_str().unwrap()));
    let at = server.address;
    let scan = upload(at);
    let object = object_on(at, &scan, &json!({ "name": "tumour" }));
    act(at, &object, "prompts", &box_and_click());
    let mut viewer = Viewer::new(at);
    viewer.open([4, 5, 6], [1.0; 3], &(0..120).collect::<Vec<i16>>());
    viewer.point(json!([1, 2, 3]), true, false);
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&state), 0o700);
    // What is in it is no key to anything: identifiers and tokens stand nowhere.
    let names: Vec<u128> =
        [&scan, &object, &viewer.lease].map(|id| u128::from_str_radix(id, 16).unwrap()).to_vec();
    let holds = |bytes: &[u8], what: &[u8]| bytes.windows(what.len()).any(|w| w == what);
    for path in below(&state) {
        let expected = if path.is_dir() { 0o700 } else { 0o600 };
        if path != state.join("lock") {
            assert_eq!(mode(&path), expected, "{}", path.display());
        }
        let content = if path.is_dir() { vec![] } else { std::fs::read(&path).unwrap() };
        for name in &names {
            let text = format!("{name:032x}");
            assert!(!path.to_str().unwrap().contains(&text));
            for what in [text.as_bytes(), &name.to_le_bytes(), &name.to_be_bytes()] {
                assert!(!holds(&content, what), "{}", path.display());
            }
        }
    }
    // What is released goes at once, what nobody uses in time.
    assert_eq!(ask(at, "DELETE", &format!("/v1/scans/{scan}"), &[], b"").status, 200);
    ask(at, "POST", "/release", &[("X-Lease-Token", &viewer.lease)], b"");
    assert_eq!(below(&state), [state.join("lock")]);
    upload(at);
    server.end();
    let idle = Duration::from_secs(1);
    let mut server = started(Settings { idle, ..settings() });
    let end = Instant::now() + Duration::from_secs(30);
    while below(&state) != [state.join("lock")] {
        assert!(Instant::now() < end, "{:?}", below(&state));
        std::thread::sleep(Duration::from_millis(100));
    }
    server.end();
    // Where others may look, nothing is kept.
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o755)).unwrap();
    let open = Server::open(settings(), model(), "small").err().unwrap();
    assert!(open.contains("chmod 700"), "{open}");
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

/// A mask that another one differs from everywhere, as a file.
fn noise(image: &Volume, seed: usize) -> (Vec<u8>, Vec<u8>) {
    let mask: Vec<u8> = (0..image.grid.voxels())
        .map(|at| {
            let mixed = (at + seed * 7919).wrapping_mul(2654435761) >> 7;
            u8::from(mixed.is_multiple_of(3))
        })
        .collect();
    let file = prism::volume::mask_file(Path::new("m.nii"), &image.grid, &image.description, &mask);
    (mask, file.unwrap())
}

#[test]
fn a_journal_is_no_longer_than_what_it_tells_of_needs() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let image = example();
    let mut server = started(keeping(&state));
    let at = server.address;
    let scan = upload(at);
    let gone = object_on(at, &scan, &json!({}));
    let object = object_on(at, &scan, &json!({ "name": "tumour" }));
    let give = |at: SocketAddr, object: &str, seed: usize| {
        let (mask, file) = noise(&image, seed);
        let given = ask(at, "PUT", &format!("/v1/objects/{object}/mask"), &[], &file);
        assert_eq!(given.status, 200, "{}", given.text());
        mask
    };
    let length = |path: &Path| path.metadata().unwrap().len();
    let path = the(&state, "journal");
    // What one answer takes, and how long all that are given would be.
    let before = length(&path);
    give(at, &object, 0);
    let each = length(&path) - before;
    assert!(each > 50_000, "{each}");
    let rounds = ((9 << 20) / each + 2) as usize;
    for seed in 1..rounds {
        give(at, &object, seed);
        act(at, &object, "undo", &json!({}));
    }
    let (one, two) = (give(at, &object, 1000), give(at, &object, 1001));
    act(at, &object, "undo", &json!({}));
    assert_eq!(ask(at, "DELETE", &format!("/v1/objects/{gone}"), &[], b"").status, 200);
    // It is written anew behind the answers.
    let live = 5 * each;
    let end = Instant::now() + Duration::from_secs(60);
    while length(&path) > 2 * live + (5 << 20) || path.with_file_name("journal.new").exists() {
        assert!(Instant::now() < end, "{} bytes, {each} an answer", length(&path));
        std::thread::sleep(Duration::from_millis(50));
    }
    let about = get(at, &format!("/v1/scans/{scan}")).json(200);
    server.end();

    let mut server = started(keeping(&state));
    let at = server.address;
    assert!(server.warnings.is_empty(), "{:?}", server.warnings);
    assert_eq!(get(at, &format!("/v1/scans/{scan}")).json(200), about);
    let (told, mask) = answer(at, &object);
    // The first answer is there still, the next ones took each other's place.
    assert!(mask == one && told["step"] == 2 && told["redo"] == true, "{told}");
    act(at, &object, "redo", &json!({}));
    assert!(answer(at, &object).1 == two);
    act(at, &object, "undo", &json!({}));
    act(at, &object, "undo", &json!({}));
    assert!(answer(at, &object).1 == noise(&image, 0).0);
    act(at, &object, "undo", &json!({}));
    assert!(answer(at, &object).1.iter().all(|v| *v == 0));
    // No two objects have one identifier, those that were let go before included.
    let new = object_on(at, &scan, &json!({}));
    assert!(new != gone && new != object);
    server.end();
}

#[test]
fn a_journal_that_is_written_anew_is_the_old_or_the_new_one_after_a_crash() {
    let folder = tempfile::tempdir().unwrap();
    let image = example();
    let mut server = Process::begin(folder.path());
    let scan = upload(server.at);
    let object = object_on(server.at, &scan, &json!({}));
    let path = format!("/v1/objects/{object}/mask");
    let journal = the(&folder.path().join("state"), "journal");
    let (first, file) = noise(&image, 0);
    assert_eq!(ask(server.at, "PUT", &path, &[], &file).status, 200);
    // Answers that are taken back make it long. Behind the one that makes it too long it is written
    // anew, and the server is killed at another point of that each time.
    for pause in [0, 2, 8, 30, 120, 2000] {
        let mut seed = 1;
        let second = loop {
            let (mask, file) = noise(&image, seed);
            assert_eq!(ask(server.at, "PUT", &path, &[], &file).status, 200);
            if journal.metadata().unwrap().len() > 4 << 20 {
                break mask;
            }
            act(server.at, &object, "undo", &json!({}));
            seed += 1;
        };
        std::thread::sleep(Duration::from_millis(pause));
        server.kill();
        server = Process::begin(folder.path());
        assert!(!server.errors().contains("damaged"), "{}", server.errors());
        assert!(!journal.with_file_name("journal.new").exists());
        let (told, mask) = answer(server.at, &object);
        assert!(mask == second && told["step"] == 2, "{told}");
        act(server.at, &object, "undo", &json!({}));
        assert!(answer(server.at, &object).1 == first);
    }
    // Left alone it is written anew again and again: it becomes shorter before it is very long.
    let (mut longest, mut more) = (0, 0);
    loop {
        let length = journal.metadata().unwrap().len();
        if length < longest {
            break;
        }
        longest = length;
        assert!(longest < 16 << 20, "it is never written anew");
        assert_eq!(ask(server.at, "PUT", &path, &[], &noise(&image, more).1).status, 200);
        act(server.at, &object, "undo", &json!({}));
        more += 1;
    }
    server.kill();
}

/// A server in this process that is not waited for.
fn beginning(settings: Settings) -> (SocketAddr, impl FnOnce() -> Vec<String>) {
    let settings = Settings { bind: "127.0.0.1:0".into(), ..settings };
    let server = Server::open(settings, model(), "small").unwrap();
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
    // Many more, whose identifiers nobody knows.
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
    let (at, end) = beginning(Settings { max_sessions: 3, ..keeping(&state) });
    let (mut refused, mut told) = (0, vec![]);
    loop {
        let health = get(at, "/healthz").json(200);
        assert_eq!(health["ok"], true);
        let Some(done) = health["restoring"]["done"].as_u64() else { break };
        assert_eq!(health["restoring"]["of"], json!(MORE + 1));
        told.push(done);
        let reply = get(at, &format!("/v1/scans/{scan}"));
        if reply.status == 503 {
            assert!(reply.error(503, "error").contains("brings back"), "{}", reply.text());
            assert!(reply.header("Retry-After").is_some());
            refused += 1;
        }
        // The page says so to people.
        assert_eq!(get(at, "/").status, 200);
        let claim = ask(at, "POST", "/claim", &[], b"{}");
        assert_eq!(claim.status, 503, "{}", claim.text());
    }
    assert!(refused > 0 && told.is_sorted(), "{refused} {told:?}");
    // All are served, and no more are taken.
    assert!(answer(at, &object).1 == mask);
    let file = std::fs::read(here("examples/data/lung1_image.nii.gz")).unwrap();
    let full = ask(at, "POST", "/v1/scans?name=lung.nii.gz", &[], &file);
    assert!(full.error(503, "error").contains("at capacity"), "{}", full.text());
    assert!(get(at, "/metrics").text().contains(&format!("prism_scans {}\n", MORE + 1)));
    let warnings = end();
    assert!(warnings.iter().any(|w| w.contains("--max-sessions")), "{warnings:?}");
    // Who ends it early loses nothing.
    let (_, end) = beginning(keeping(&state));
    end();
    let left = std::fs::read_dir(&state).unwrap().count();
    assert_eq!(left, MORE + 2);
}

#[test]
fn what_nobody_worked_on_for_long_is_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let mut server = started(keeping(&state));
    let (old, new) = (upload(server.address), upload(server.address));
    server.end();
    let keep = |age: u64| {
        let keep = Keep { age: Duration::from_secs(age), ..Keep::at(&state) };
        Settings { keep: Some(keep), ..Settings::default() }
    };
    // The one that was worked on less lately, as if it had been hours ago.
    let mut journals = below(&state);
    journals.retain(|path| path.ends_with("journal"));
    assert_eq!(journals.len(), 2);
    let hours = std::time::SystemTime::now() - Duration::from_secs(7200);
    File::options().write(true).open(&journals[0]).unwrap().set_modified(hours).unwrap();
    let mut server = started(keep(4 * 3600));
    assert!(server.warnings.is_empty(), "{:?}", server.warnings);
    let there = |at: SocketAddr, scan: &str| get(at, &format!("/v1/scans/{scan}")).status == 200;
    assert!(there(server.address, &old) && there(server.address, &new));
    server.end();
    let mut server = started(keep(3600));
    let [warning] = &server.warnings[..] else { panic!("{:?}", server.warnings) };
    assert!(warning.contains("--state-days"), "{warning}");
    assert!(!journals[0].parent().unwrap().exists() && journals[1].exists());
    assert!(there(server.address, &old) != there(server.address, &new));
    server.end();
}

/// The journal of the one thing of a kind.
fn journal_of(state: &Path, kind: &str) -> PathBuf {
    let is_of = |path: &PathBuf| {
        let folder = path.parent().and_then(Path::file_name).and_then(|name| name.to_str());
        path.ends_with("journal") && folder.is_some_and(|name| name.starts_with(kind))
    };
    below(state).into_iter().find(is_of).unwrap()
}

/// Does something again and again until a journal is shorter than before.
#[track_caller]
fn until_shorter(journal: &Path, mut again: impl FnMut(usize)) {
    let mut longest = 0;
    for n in 0..200 {
        let now = journal.metadata().unwrap().len();
        if now < longest {
            return;
        }
        longest = now;
        again(n);
    }
    panic!("{longest} bytes: it is never written anew");
}

#[test]
fn journals_of_viewers_are_written_anew_too() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    // Nobody shows a sign of life in between.
    let settings = || Settings { liveness: Duration::from_secs(600), ..keeping(&state) };
    let mut server = started(settings());
    let at = server.address;
    let (size, spacing, values, image) = array_of_example();
    let mut viewer = Viewer::new(at);
    viewer.open(size, spacing, &values);
    assert!(viewer.point(json!([CLICK[2], CLICK[1], CLICK[0]]), true, true).1);
    let clicked = viewer.buffer.clone();
    let give = |viewer: &mut Viewer, seed: usize| {
        let (marks, _) = noise(&image, seed);
        let mask = nnia("uint8", 1, &size, &marks);
        let reply = viewer.send("/add_initial_seg_interaction", &json!({}), &mask);
        assert_eq!(viewer.take(reply), (false, false));
        viewer.buffer = marks;
    };
    until_shorter(&journal_of(&state, "lease-"), |seed| {
        give(&mut viewer, seed);
        assert!(viewer.undo().0);
    });
    assert!(viewer.buffer == clicked);
    give(&mut viewer, 1000);
    let marks = viewer.buffer.clone();
    // Something waits for its prediction.
    viewer.point(json!([MORE[2], MORE[1], MORE[0]]), false, false);
    // MONAI Label's clients begin anew again and again.
    let file = std::fs::read(here("examples/data/lung1_image.nii.gz")).unwrap();
    let created = form(at, "PUT", "/session/", &[("files", Some("lung.nii.gz"), &file)]).json(200);
    let label = created["session_id"].as_str().unwrap().to_string();
    let infer = |at: SocketAddr, off: &[[usize; 3]], anew: bool| {
        let params = json!({
            "foreground": [CLICK], "background": off, "reset_state": anew,
            "result_extension": ".nii",
        });
        infer(at, &label, &params)
    };
    let one = infer(at, &[], false);
    until_shorter(&journal_of(&state, "label-"), |_| {
        assert!(infer(at, &[], true) == one);
    });
    let two = infer(at, &[OFF], false);
    let three = infer(at, &[OFF, MORE], false);
    server.end();

    let mut server = started(settings());
    assert!(server.warnings.is_empty(), "{:?}", server.warnings);
    let at = server.address;
    assert!(infer(at, &[OFF, MORE], false) == three);
    assert!(infer(at, &[OFF], false) == two && infer(at, &[], false) == one);
    viewer.at = at;
    viewer.buffer.fill(7);
    assert!(viewer.undo().0);
    // A click that agrees changes nothing: the mask is there, and what was said before it.
    let on = marks.iter().position(|v| *v != 0).unwrap();
    let [_, nj, ni] = size;
    assert!(viewer.point(json!([on / ni / nj, on / ni % nj, on % ni]), true, true).0);
    assert!(viewer.buffer == marks);
    assert!(viewer.undo().0 && viewer.undo().0 && viewer.buffer == clicked);
    assert!(viewer.undo().0 && viewer.buffer.iter().all(|v| *v == 0));
    assert!(!viewer.undo().0);
    server.end();
}
