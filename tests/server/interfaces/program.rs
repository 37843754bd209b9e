//! The program as a process: how it begins and ends, and its memory budget.

use super::{Mask, upload};
use crate::common::here;
#[cfg(unix)]
use crate::http::ask;
use crate::http::{BOX, CLICK, count, example, get, object_on, post, started_with, trained};
use prism::serve::Settings;
use serde_json::json;
use std::io::{BufRead, BufReader, Lines};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Stdio};

/// The program with more flags.
fn program(more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prism"));
    command.args(["serve", "-m", here("models/small.safetensors").to_str().unwrap()]);
    command.args(["--threads", "1"]).args(more).env_remove("PRISM_TOKEN");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The program, started at a free port; it prints its address first.
struct Process {
    child: Child,
    at: SocketAddr,
    // Its output is not refused.
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
    assert!(refused.status.code() == Some(2) && error.contains("a token is required"), "{error}");
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
    // The name of a model, never its path.
    assert_eq!(about["model"], "small.safetensors");
    // SAFETY: a signal to a process that this test started and has not waited for.
    unsafe { libc::kill(server.child.id() as i32, libc::SIGTERM) };
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
}

#[test]
fn what_the_budget_has_no_room_for_is_encoded_again() {
    // A quarter of this is room for three patches of this network, which take 20 MB each, and four
    // are looked at in turn.
    let small = Process::start(&["--memory", "256M"]);
    let roomy = started_with(trained(), Settings { max_sessions: 2, ..Settings::default() });
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
    // All in turn, again and again, each compared with the state at that time.
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
    // It keeps fewer than there are, and encoded again those that it looked at again.
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
