//! A server in the process of a test, an HTTP client, and the library to compare with.
#![allow(dead_code)]

use super::common::{here, tiny, tiny_model};
use prism::device::{Cpu, Device};
use prism::model::{Config, Model, Weights, weights::Precision};
use prism::prompt::Prompts;
use prism::serve::{Server, Settings, Stop};
use prism::session::{Options, Scan, Session, intensities};
use prism::volume::Volume;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A tiny network with what decides how sessions go: that first clicks are looked at from several
/// distances, and that clicks are balls.
fn network() -> Config {
    Config { fit: Some(1.75), click_radius: 1.5, ..tiny() }
}

/// A tiny model, made once: it has learned nothing, which most tests of a server do not need.
pub fn model() -> Arc<Model> {
    static MODEL: OnceLock<Arc<Model>> = OnceLock::new();
    MODEL.get_or_init(|| tiny_model(network(), 2)).clone()
}

/// The file of that model, for programs.
pub fn model_file() -> &'static Path {
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    FILE.get_or_init(|| {
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("server.safetensors");
        Weights::hashed(network(), "tiny").save(&file, Precision::F32).unwrap();
        file
    })
}

/// The small model, loaded once.
pub fn trained() -> Arc<Model> {
    static MODEL: OnceLock<Arc<Model>> = OnceLock::new();
    MODEL
        .get_or_init(|| {
            let weights = Weights::open(&here("models/small.safetensors")).unwrap();
            Arc::new(Model::new(&Device::Cpu(Cpu::new(2).unwrap()), &weights).unwrap())
        })
        .clone()
}

/// A server in this process, which ends with the test.
pub struct Running {
    pub address: SocketAddr,
    /// The address at which only ITK-SNAP's protocol is served.
    pub dls: Option<SocketAddr>,
    pub stop: Stop,
    /// What was odd in the state of an earlier server.
    pub warnings: Vec<String>,
    thread: Option<JoinHandle<Result<(), String>>>,
}

/// Opens a server at a free port. Until a process that another test starts has begun its program it
/// holds copies of all open files of this process: of the lock of a server that has ended, too.
pub fn opened(settings: Settings) -> Server {
    opened_with(model(), settings)
}

fn opened_with(model: Arc<Model>, settings: Settings) -> Server {
    let settings = Settings { bind: "127.0.0.1:0".into(), ..settings };
    for _ in 0..3000 {
        match Server::open(settings.clone(), model.clone(), "small") {
            Err(why) if why.contains("another server") => {
                std::thread::sleep(Duration::from_millis(20))
            }
            opened => return opened.unwrap(),
        }
    }
    panic!("its folder stays another server's");
}

pub fn started(settings: Settings) -> Running {
    started_with(model(), settings)
}

pub fn started_with(model: Arc<Model>, settings: Settings) -> Running {
    let server = opened_with(model, settings);
    let (address, dls, stop) = (server.address(), server.dls_address(), server.stopper());
    let restored = server.restored();
    let thread = Some(std::thread::spawn(move || server.run()));
    let warnings = restored.wait();
    Running { address, dls, stop, warnings, thread }
}

impl Running {
    pub fn end(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.stop.stop();
            thread.join().unwrap().unwrap();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.end();
        }
    }
}

/// An HTTP response.
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    #[track_caller]
    pub fn json(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text());
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The sentence of an error.
    #[track_caller]
    pub fn error(&self, status: u16, name: &str) -> String {
        let said = self.json(status);
        said[name].as_str().unwrap_or_else(|| panic!("no {name} in {said}")).to_string()
    }
}

/// A single request, on a connection of its own.
pub fn ask(
    at: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Reply {
    let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    let has = |name: &str| headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
    if !has("Host") {
        head += &format!("Host: {at}\r\n");
    }
    if !has("Content-Length") && !has("Transfer-Encoding") {
        head += &format!("Content-Length: {}\r\n", body.len());
    }
    let mut stream = TcpStream::connect(at).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(600))).unwrap();
    stream.write_all(format!("{head}\r\n").as_bytes()).unwrap();
    // A server that has already answered may have closed the connection.
    let _ = stream.write_all(body);
    let mut answer = vec![];
    let _ = stream.read_to_end(&mut answer);
    parsed(&answer, method)
}

pub fn parsed(answer: &[u8], method: &str) -> Reply {
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").expect("an answer with headers");
    let head = String::from_utf8(answer[..end].to_vec()).unwrap();
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers: Vec<(String, String)> = lines
        .map(|line| line.split_once(':').unwrap())
        .map(|(name, value)| (name.to_string(), value.trim().to_string()))
        .collect();
    let reply = Reply { status, headers, body: answer[end + 4..].to_vec() };
    // Clients join chunked answers wrongly: there are none.
    assert!(reply.header("Transfer-Encoding").is_none());
    if method != "HEAD" && status != 204 {
        let length = reply.header("Content-Length").expect("a length").parse();
        assert_eq!(Ok(reply.body.len()), length);
    }
    assert_eq!(reply.header("X-Content-Type-Options"), Some("nosniff"));
    reply
}

/// Tries again until something holds, or it takes too long.
#[track_caller]
pub fn soon(mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(300);
    while !is_so() {
        assert!(Instant::now() < end, "it does not come to be");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until a server has restored what an earlier one left.
pub fn wait_restored(at: SocketAddr) {
    for _ in 0..6000 {
        if get(at, "/healthz").json(200)["restoring"].is_null() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("it does not come to its end");
}

pub fn get(at: SocketAddr, path: &str) -> Reply {
    ask(at, "GET", path, &[], b"")
}

pub fn post(at: SocketAddr, path: &str, body: &Value) -> Reply {
    ask(at, "POST", path, &[], body.to_string().as_bytes())
}

/// A number from the server's metrics.
pub fn count(at: SocketAddr, name: &str) -> u64 {
    let text = get(at, "/metrics").text();
    let told = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    told.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
}

/// Sends a request about an object of prism's own interface.
#[track_caller]
pub fn act(at: SocketAddr, object: &str, what: &str, body: &Value) {
    let reply = post(at, &format!("/v1/objects/{object}/{what}"), body);
    assert_eq!(reply.status, 200, "{}", reply.text());
}

/// Sends the example; its name as a scan, and what is said of it.
pub fn upload(at: SocketAddr) -> (String, Value) {
    let file = std::fs::read(here("examples/data/lung1_image.nii.gz")).unwrap();
    let scan = ask(at, "POST", "/v1/scans?name=lung.nii.gz", &[], &file).json(201);
    (scan["scan"].as_str().unwrap().to_string(), scan)
}

/// The mask of an object, `[i][j][k]`.
pub fn mask_of(at: SocketAddr, object: &str) -> Vec<u8> {
    let file = get(at, &format!("/v1/objects/{object}/mask?format=nii"));
    let values = Volume::of_file(file.body, None).unwrap().values();
    values.iter().map(|v| u8::from(*v != 0.0)).collect()
}

/// A click in the format of that interface.
pub fn point(at: [usize; 3], on: bool) -> Value {
    json!({ "points": [{ "at": at, "on": on }] })
}

pub fn example() -> Volume {
    Volume::read(&here("examples/data/lung1_image.nii.gz"), None).unwrap()
}

/// A part of a form: its name, the name of its file, its contents.
pub type Part<'a> = (&'a str, Option<&'a str>, &'a [u8]);

/// A form of several parts.
pub fn form(boundary: &str, parts: &[Part]) -> Vec<u8> {
    let mut body: Vec<u8> = vec![];
    for (name, file, content) in parts {
        let file = file.map_or_else(String::new, |file| format!("; filename=\"{file}\""));
        let head = format!("Content-Disposition: form-data; name=\"{name}\"{file}");
        body.extend(format!("--{boundary}\r\n{head}\r\n\r\n").bytes());
        body.extend(*content);
        body.extend(b"\r\n");
    }
    body.extend(format!("--{boundary}--\r\n").bytes());
    body
}

/// The box of the example's nodule, `[i0, j0, k0, i1, j1, k1]`, and a click on it.
pub const BOX: [usize; 6] = [69, 68, 13, 93, 94, 16];
pub const CLICK: [usize; 3] = [80, 80, 14];

/// A new object on a scan of prism's own interface.
pub fn object_on(at: SocketAddr, scan: &str, about: &Value) -> String {
    let object = post(at, &format!("/v1/scans/{scan}/objects"), about).json(201);
    object["object"].as_str().unwrap().to_string()
}

/// The box and the click in the format of that interface.
pub fn box_and_click() -> Value {
    let high = [BOX[3] - 1, BOX[4] - 1, BOX[5] - 1];
    json!({ "box": { "from": [BOX[0], BOX[1], BOX[2]], "to": high }, "points": [{ "at": CLICK }] })
}

/// A session of the library on a scan.
pub fn session(image: &Arc<Volume>) -> Session {
    session_of(&model(), image)
}

pub fn session_of(model: &Arc<Model>, image: &Arc<Volume>) -> Session {
    let normalization = intensities(&**image, model.config().intensity).normalization;
    let scan = Scan::new(model, image.clone(), normalization, Options::default());
    Session::new(&Arc::new(scan))
}

pub fn said(points: &[([usize; 3], bool)], bounds: Option<[usize; 6]>) -> Prompts {
    Prompts { points: points.to_vec(), bounds, ..Prompts::default() }
}
