//! ITK-SNAP's and MONAI Label's protocols as their clients use them: by an HTTP client of the test,
//! with answers compared with the library's; by MONAI Label's own client; together with ITK-SNAP's
//! own server. What holds for both protocols is tested here; the placement of scans, and what is
//! drawn on them, for all protocols.

mod clients;
mod drawn;
mod geometry;
mod monai;
#[cfg(feature = "dicom")]
mod series;
mod snap;

use crate::common::here;
use crate::http::{self, Part, Reply, ask, get, post, soon, started};
use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use prism::serve::Settings;
use prism::volume::{Affine, Description, Grid, mask_file};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

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

/// The bytes that base64 stands for (RFC 4648).
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

/// A volume as ITK-SNAP sends it: its metadata, and its voxels, x fastest.
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

/// The mask of an answer, in the library's order of masks.
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
fn there_is_room_for_so_many_sessions() {
    let server = started(Settings { max_sessions: 2, ..Settings::default() });
    let at = server.address;
    created(at);
    start(at, "/start_session");
    assert!(counted(at, "prism_sessions 2"));
    let full = get(at, "/v2/start_session/nnInteractive");
    assert!(full.error(503, "detail").contains("capacity (2 sessions)"));
    assert_eq!(full.header("Retry-After"), Some("10"));
    let parts: [Part; 1] = [("files", Some("lung.nii.gz"), b"anything")];
    assert_eq!(send(at, "PUT", "/session/", &parts).status, 503);
    assert_eq!(post(at, "/claim", &json!({})).status, 503);
}

#[test]
fn sessions_that_nobody_uses_are_let_go_and_make_room() {
    let idle = Duration::from_secs(1);
    let server = started(Settings { idle, max_sessions: 2, ..Settings::default() });
    let at = server.address;
    let label = created(at);
    let name = start(at, "/start_session");
    soon(|| counted(at, "prism_sessions 0"));
    assert_eq!(get(at, &format!("/reset_interactions/{name}")).status, 404);
    assert_eq!(get(at, &format!("/session/{label}")).status, 404);
    start(at, "/start_session");
}

/// The parts of an answer: the parameters, the file's name, the file.
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
        // A fault of the server itself would be 500.
        let known = [200, 400, 413, 415, 422, 503].contains(&reply.status);
        assert!(known, "{path} in round {round}: {} {}", reply.status, reply.text());
        // What was accepted is released, so that there is room for more.
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
