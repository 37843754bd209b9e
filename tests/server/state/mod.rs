//! What a server keeps on disk: a client that comes back after a crash (a process that is killed)
//! or a restart finds scan, objects and history, to the bit; incomplete or damaged records are
//! reported; a full disk changes nothing; nothing stays that was released.

mod crashes;
mod damage;
mod journals;

use crate::common::here;
use crate::http::{
    self, CLICK, Part, act, ask, get, mask_of, model_file, object_on, point, soon, started,
    wait_restored,
};
use prism::serve::{Keep, Settings};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

/// On the object of the example according to first prompts, and clicked on as not of it; off it,
/// and clicked on as of it.
const OFF: [usize; 3] = [82, 80, 14];
const MORE: [usize; 3] = [72, 71, 14];

/// The program, started with a folder for its state.
struct Process {
    child: Child,
    at: SocketAddr,
    folder: PathBuf,
    // Its output is not refused.
    _out: BufReader<ChildStdout>,
}

impl Process {
    fn begin(folder: &Path) -> Process {
        let errors = File::create(folder.join("errors")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_prism"));
        command.args(["serve", "-m"]).arg(model_file());
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

    /// What the server wrote to standard error.
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

fn upload(at: SocketAddr) -> String {
    let file = std::fs::read(here("examples/data/lung1_image.nii.gz")).unwrap();
    let scan = ask(at, "POST", "/v1/scans?name=lung.nii.gz&modality=ct", &[], &file).json(201);
    scan["scan"].as_str().unwrap().to_string()
}

/// The description of an object's answer, and its mask, `[i][j][k]`.
fn answer(at: SocketAddr, object: &str) -> (Value, Vec<u8>) {
    let reply = get(at, &format!("/v1/objects/{object}/answer"));
    assert_eq!(reply.status, 200, "{}", reply.text());
    let about = serde_json::from_str(reply.header("X-Prism-Answer").unwrap()).unwrap();
    (about, mask_of(at, object))
}

/// A server in this process with a folder for its state.
fn keeping(folder: &Path) -> Settings {
    let keep = Keep { bytes: 1 << 30, ..Keep::at(folder) };
    Settings { keep: Some(keep), ..Settings::default() }
}

/// The state of a server that ended, in a folder: a scan and an object, and the object's mask after
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
    // Some of it may be being removed.
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(below(&path));
        }
        found.push(path);
    }
    found
}

/// Waits until a server keeps nothing. What is released goes with the last request that works on
/// it, whose client may have its answer already.
#[track_caller]
fn until_empty(state: &Path) {
    soon(|| below(state) == [state.join("lock")]);
}

/// The only file with a name.
fn the(folder: &Path, name: &str) -> PathBuf {
    let mut found = below(folder);
    found.retain(|path| path.file_name().unwrap() == name);
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

/// The positions of the records of a journal, and its end.
fn records(journal: &[u8]) -> Vec<usize> {
    let mut places = vec![8];
    while let Some(head) = journal.get(places[places.len() - 1]..).filter(|rest| rest.len() > 16) {
        let length = u64::from_le_bytes(head[..8].try_into().unwrap()) as usize;
        places.push(places[places.len() - 1] + 16 + length + 32);
    }
    places
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
