//! Incomplete or damaged records, a full disk; the owner of the folder, and what does not stay.

use super::{OFF, answer, below, keeping, records, the, until_empty, upload};
use crate::common::here;
use crate::http::{act, ask, box_and_click, get, model, object_on, point, post, started};
use crate::viewer::{Viewer, array_of_example, nnia};
use prism::serve::{Keep, Server, Settings};
use serde_json::json;
use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

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
    assert!(two != one);
    server.end();
    let path = the(&state, "journal");
    let whole = std::fs::read(&path).unwrap();
    // What it is, the scan, the object, two interactions.
    let places = records(&whole);
    assert_eq!((places.len(), places[5]), (6, whole.len()));

    // Wherever the last record is cut off, all before it is there, and can be continued.
    for cut in [whole.len() - 1, whole.len() - 40, places[4] + 16, places[4] + 7] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let mut server = started(keeping(&state));
        let [warning] = &server.warnings[..] else { panic!("{:?}", server.warnings) };
        assert!(warning.contains("incomplete") && warning.contains(path.to_str().unwrap()));
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
    // A file that became longer in a power cut, by zeros.
    std::fs::write(&path, [&whole[..], &[0; 5000]].concat()).unwrap();
    let mut server = started(keeping(&state));
    assert!(server.warnings[0].contains("incomplete"), "{:?}", server.warnings);
    assert!(answer(server.address, &object).1 == two);
    server.end();
    assert!(std::fs::read(&path).unwrap() == whole);

    // A record before the last: what came before it is there, and a copy of everything.
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
    // The last one, which has its full length and may have been acknowledged: there is a copy of
    // it, too.
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
    // A scan that differs from what was sent is not worked on; it is left for inspection.
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
    // No room for the scan: it is not accepted, and nothing of it stays.
    let mut server = started(of(file.len() - 1));
    let at = server.address;
    let refused = ask(at, "POST", "/v1/scans?name=lung.nii.gz", &[], &file);
    let error = refused.error(507, "error");
    assert!(error.contains("--state-bytes"), "{error}");
    until_empty(&state);
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
    // Requests that make room succeed.
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
    // Another image, which is not accepted, leaves the earlier one.
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
    // Other programs' files there stay, whatever their names.
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
    // Its contents are no key to anything: identifiers and tokens are not stored.
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
    // What is released is removed at once, what is not in use in time.
    assert_eq!(ask(at, "DELETE", &format!("/v1/scans/{scan}"), &[], b"").status, 200);
    ask(at, "POST", "/release", &[("X-Lease-Token", &viewer.lease)], b"");
    until_empty(&state);
    upload(at);
    server.end();
    let idle = Duration::from_secs(1);
    let mut server = started(Settings { idle, ..settings() });
    until_empty(&state);
    server.end();
    // If other users may read it, nothing is kept.
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o755)).unwrap();
    let open = Server::open(settings(), model(), "small").err().unwrap();
    assert!(open.contains("chmod 700"), "{open}");
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
    // The one that was used less recently, as if that had been hours ago.
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
