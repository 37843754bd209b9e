//! Journals are no longer than their state needs.

use super::{
    MORE, OFF, Process, answer, below, clicked, form, infer, keeping, records, the, upload,
};
use crate::common::here;
use crate::http::{CLICK, act, ask, example, get, object_on, soon, started};
use crate::viewer::{Viewer, array_of_example, nnia};
use prism::serve::Settings;
use prism::volume::Volume;
use serde_json::json;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

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
    // As if it had been renamed again and again: the object's number, name and colour.
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
    // Another name causes it to be rewritten, and nothing else has to be done.
    let named = ask(at, "PATCH", &format!("/v1/objects/{object}"), &[], b"{\"name\":\"Herd\"}");
    assert_eq!(named.json(200)["name"], "Herd");
    soon(|| path.metadata().unwrap().len() <= short as u64 + 1000);
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
    // As if prompts had been given again and again, before there is an image.
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
    soon(|| path.metadata().unwrap().len() <= short as u64);
    server.end();
    let mut server = started(keeping(&state));
    assert!(server.warnings.is_empty(), "{:?}", server.warnings);
    viewer.at = server.address;
    viewer.open([4, 5, 6], [1.0; 3], &(0..120).collect::<Vec<i16>>());
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
    // The size of one answer, and the size of all that are given.
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
    // It is rewritten after the answers.
    let live = 5 * each;
    let is_short = || length(&path) <= 2 * live + (5 << 20);
    soon(|| is_short() && !path.with_file_name("journal.new").exists());
    let about = get(at, &format!("/v1/scans/{scan}")).json(200);
    server.end();

    let mut server = started(keeping(&state));
    let at = server.address;
    assert!(server.warnings.is_empty(), "{:?}", server.warnings);
    assert_eq!(get(at, &format!("/v1/scans/{scan}")).json(200), about);
    let (told, mask) = answer(at, &object);
    // The first answer is still there, the next ones replaced each other.
    assert!(mask == one && told["step"] == 2 && told["redo"] == true, "{told}");
    act(at, &object, "redo", &json!({}));
    assert!(answer(at, &object).1 == two);
    act(at, &object, "undo", &json!({}));
    act(at, &object, "undo", &json!({}));
    assert!(answer(at, &object).1 == noise(&image, 0).0);
    act(at, &object, "undo", &json!({}));
    assert!(answer(at, &object).1.iter().all(|v| *v == 0));
    // No two objects have the same identifier, including those that were released before.
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
    // Answers that are taken back make it long. After the one that makes it too long it is
    // rewritten, and the server is killed at another point of that each time.
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
    // Left alone it is rewritten again and again: it becomes shorter before it is very long.
    let (mut longest, mut more) = (0, 0);
    loop {
        let length = journal.metadata().unwrap().len();
        if length < longest {
            break;
        }
        longest = length;
        assert!(longest < 200 << 20, "it is never written anew");
        assert_eq!(ask(server.at, "PUT", &path, &[], &noise(&image, more).1).status, 200);
        act(server.at, &object, "undo", &json!({}));
        more += 1;
    }
    server.kill();
}

/// The journal of the only object of a kind.
fn journal_of(state: &Path, kind: &str) -> PathBuf {
    let is_of = |path: &PathBuf| {
        let folder = path.parent().and_then(Path::file_name).and_then(|name| name.to_str());
        path.ends_with("journal") && folder.is_some_and(|name| name.starts_with(kind))
    };
    below(state).into_iter().find(is_of).unwrap()
}

/// Repeats something until a journal is shorter than before.
#[track_caller]
fn until_shorter(journal: &Path, mut again: impl FnMut(usize)) {
    let mut longest = 0;
    for n in 0..2000 {
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
    // No sign of life comes in between.
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
    // A prompt waits for its prediction.
    viewer.point(json!([MORE[2], MORE[1], MORE[0]]), true, false);
    // MONAI Label's clients begin afresh again and again.
    let file = std::fs::read(here("examples/data/lung1_image.nii.gz")).unwrap();
    let created = form(at, "PUT", "/session/", &[("files", Some("lung.nii.gz"), &file)]).json(200);
    let label = created["session_id"].as_str().unwrap().to_string();
    let infer = |at: SocketAddr, on: &[[usize; 3]], off: &[[usize; 3]], anew: bool| {
        let params = json!({
            "foreground": on, "background": off, "reset_state": anew,
            "result_extension": ".nii",
        });
        infer(at, &label, &params)
    };
    let one = infer(at, &[CLICK], &[], false);
    until_shorter(&journal_of(&state, "label-"), |_| {
        assert!(infer(at, &[CLICK], &[], true) == one);
    });
    let two = infer(at, &[CLICK], &[OFF], false);
    let three = infer(at, &[CLICK, MORE], &[OFF], false);
    assert!(two != one && three != two);
    server.end();

    let mut server = started(settings());
    assert!(server.warnings.is_empty(), "{:?}", server.warnings);
    let at = server.address;
    assert!(infer(at, &[CLICK, MORE], &[OFF], false) == three);
    assert!(infer(at, &[CLICK], &[OFF], false) == two && infer(at, &[CLICK], &[], false) == one);
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
