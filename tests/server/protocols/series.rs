//! Series of a folder, as OHIF's extension of MONAI Label and 3D Slicer's ask for them.

use super::{counted, created, parts_of, send};
use crate::http::{self, CLICK, Reply, ask, example, get, post, said, session, soon, started};
use crate::writer::{
    COLUMNS, ROWS, SLICES, Series, at, identified, numbers, short, slice, straight, text, words,
};
use dicom_core::VR;
use dicom_dictionary_std::tags;
use prism::serve::{Keep, Secret, Settings};
use prism::volume::{Volume, plain_nrrd};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The example as a series, and a small one.
pub const EXAMPLE: &str = "1.2.3.4";
const SMALL: &str = "1.2.9";

/// Writes the example as a series.
pub fn file_example(folder: &Path) -> PathBuf {
    file_scan(folder, &example())
}

/// Writes a scan as a series: the same voxels at the same places, in two folders, in files with
/// meaningless names, the last slice first. Its axes are perpendicular.
pub fn file_scan(folder: &Path, image: &Volume) -> PathBuf {
    let [ni, nj, nk] = image.grid.size;
    let rows = image.grid.affine.0;
    let spacing = image.grid.spacing();
    let [di, dj, _] = spacing;
    // Along a row, then along a column, without what computing added to short numbers.
    let orientation = std::array::from_fn(|n| {
        let (axis, r) = (n / 3, n % 3);
        let along = rows[r][axis] / spacing[axis];
        short_number(if r < 2 { -along } else { along })
    });
    let series = Series { bits: 16, orientation, ..Series::new("CT") };
    assert_eq!(series.uid, EXAMPLE);
    let folders = ["study 1", "study 1/more of it"].map(|name| folder.join(name));
    folders.iter().for_each(|folder| std::fs::create_dir_all(folder).unwrap());
    for k in 0..nk {
        // Millimetres of DICOM run to the left and to the back.
        let place: [f64; 3] = std::array::from_fn(|r| {
            let along = rows[r][2] * k as f64 + rows[r][3];
            short_number(if r < 2 { -along } else { along })
        });
        let mut file = series.file(k, place);
        identified(&mut file);
        file.put(short(tags::ROWS, nj as u16));
        file.put(short(tags::COLUMNS, ni as u16));
        file.put(short(tags::PIXEL_REPRESENTATION, 1));
        let apart = [dj, di].map(short_number);
        file.put(text(tags::PIXEL_SPACING, VR::DS, &numbers(&apart)));
        let voxel = |at: usize| image.at([at % ni, at / ni, k]) as i16 as u16;
        file.put(words((0..ni * nj).map(voxel).collect()));
        series.write(file, &folders[k % 2].join(format!("{:03}", nk - k)));
    }
    folder.into()
}

/// A number with nine places after the point, and 0 instead of -0.
fn short_number(v: f64) -> f64 {
    (v * 1e9).round() / 1e9 + 0.0
}

/// Writes a small series of slices at the positions that `place` gives.
fn file_small(folder: &Path, slices: usize, place: impl Fn(usize) -> [f64; 3]) {
    let series = Series { uid: SMALL, number: "7", description: "Bone", ..Series::new("CT") };
    std::fs::create_dir_all(folder).unwrap();
    for k in 0..slices {
        let mut file = series.file(k, place(k));
        identified(&mut file);
        file.put(words(slice(k)));
        series.write(file, &at(folder, k));
    }
}

/// What OHIF's extension asks.
fn asked(on: &[[usize; 3]]) -> Value {
    json!({
        "foreground": on, "background": [], "result_extension": ".nrrd",
        "result_dtype": "uint8", "result_compress": false, "restore_label_idx": false,
    })
}

fn infer(there: SocketAddr, uid: &str, output: &str, params: &Value) -> Reply {
    let params = params.to_string();
    let path = format!("/infer/prism?image={uid}&output={output}");
    send(there, "POST", &path, &[("params", None, params.as_bytes())])
}

/// The file of the library's mask of the example.
fn mask_of(library: &prism::Session, image: &Volume) -> Vec<u8> {
    plain_nrrd(&image.grid, &image.description, &library.mask()).unwrap()
}

#[test]
fn series_of_a_folder_are_worked_on_as_scans_that_are_sent() {
    let folder = tempfile::tempdir().unwrap();
    file_example(folder.path());
    file_small(&folder.path().join("other"), SLICES, straight);
    std::fs::write(folder.path().join("notes.txt"), "no image").unwrap();
    let whole = std::fs::read(at(&folder.path().join("other"), 0)).unwrap();
    std::fs::write(folder.path().join("damaged.dcm"), &whole[..200]).unwrap();
    let dicom = Some(folder.path().into());
    let server = started(Settings { dicom, ..Settings::default() });
    let there = server.address;
    // A damaged file is reported, not by its name, and ends nothing.
    let told = |text: &String| text.contains("ignored file ") && text.contains("truncated");
    assert!(!server.warnings.iter().any(|text| text.contains("damaged.dcm")));
    assert!(server.warnings.iter().any(told), "{:?}", server.warnings);

    // What there is.
    let info = get(there, "/info/").json(200);
    assert_eq!(info["datastore"]["total"], json!(2));
    assert!(info["strategies"]["random"].is_object());
    let status = json!({ "total": 2, "completed": 0, "label_tags": {} });
    for path in ["/datastore/", "/datastore/?output=stats"] {
        assert_eq!(get(there, path).json(200), status, "{path}");
    }
    assert_eq!(get(there, "/datastore/?output=train").json(200), json!([]));
    assert_eq!(get(there, "/datastore/?output=other").status, 422);
    let listed = get(there, "/datastore/?output=all");
    let objects = listed.json(200)["objects"].as_object().unwrap().clone();
    assert_eq!(objects.keys().collect::<Vec<_>>(), [EXAMPLE, SMALL]);
    assert_eq!(objects[SMALL]["labels"], json!({}));
    let image = Arc::new(example());
    let about = get(there, &format!("/datastore/image/info?image={EXAMPLE}"));
    let told = about.json(200);
    assert_eq!(told, objects[EXAMPLE]["image"]["info"]);
    assert_eq!(told["name"], json!(format!("{EXAMPLE}.nii.gz")));
    assert_eq!(told["StudyInstanceUID"], "1.2.3.1");
    assert_eq!((&told["Modality"], &told["shape"]), (&json!("CT"), &json!(image.grid.size)));
    let small = &objects[SMALL]["image"]["info"];
    assert_eq!(small["SeriesDescription"], "Bone");
    assert_eq!(small["shape"], json!([COLUMNS, ROWS, SLICES]));
    // Nothing about the patient, and no path.
    for text in [listed.text(), about.text()] {
        let secrets = ["Sample", "P-17", "19600102", folder.path().to_str().unwrap()];
        assert!(secrets.iter().all(|secret| !text.contains(secret)), "{text}");
    }
    let sample = post(there, "/activelearning/random", &json!({ "client_id": "a" })).json(200);
    let id = sample["id"].as_str().unwrap();
    assert!(objects.contains_key(id) && sample["SeriesInstanceUID"] == json!(id));
    assert!(counted(there, "prism_sessions 0"));

    // A series is the same scan as the file that it was made from, and so are its masks.
    let path = format!("/datastore/image?image={EXAMPLE}");
    assert_eq!(ask(there, "HEAD", &path, &[], b"").status, 200);
    let given = Volume::of_file(get(there, &path).body, None).unwrap();
    assert!(given.grid == image.grid && given.values() == image.values());
    assert!(counted(there, "prism_sessions 1"));
    let name = created(there);
    let mut library = session(&image);
    let mut masks = vec![];
    for on in [&[CLICK][..], &[CLICK, [84, 82, 14]]] {
        library.interact(&said(&[(on[on.len() - 1], true)], None)).unwrap();
        let reply = infer(there, EXAMPLE, "image", &asked(on));
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert!(reply.body == mask_of(&library, &image));
        let (_, file, sent) = parts_of(&super::infer(there, &name, &asked(on)));
        assert!(file == "mask.nrrd" && sent == reply.body);
        let (words, _, form) = parts_of(&infer(there, EXAMPLE, "", &asked(on)));
        assert!(form == reply.body && words["label_names"] == json!({ "tumour": 1 }));
        masks.push(reply.body);
    }
    assert!(infer(there, EXAMPLE, "image", &asked(&[CLICK])).body == masks[0]);
    assert!(counted(there, "prism_sessions 2"));
    // If a session is named it counts; 3D Slicer names both.
    let gone = format!("/infer/prism?image={EXAMPLE}&session_id=lost");
    let reply = send(there, "POST", &gone, &[("params", None, b"{}")]);
    assert!(reply.error(404, "detail").contains("no such session"));
}

#[test]
fn what_is_no_series_is_never_looked_for_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let small = folder.path().join("other");
    // A slice is missing.
    file_small(&small, 6, |k| straight(if k < 3 { k } else { k + 1 }));
    let token = Some(Secret::new("a secret").unwrap());
    let dicom = Some(folder.path().to_path_buf());
    let server = started(Settings { dicom: dicom.clone(), ..Settings::default() });
    let there = server.address;
    let file = at(&small, 0).display().to_string();
    for name in [
        "1.2.3",
        "..",
        "../",
        "../../etc/passwd",
        "%2e%2e%2fother%2fIM0000",
        "other/IM0000",
        &file,
        "%00",
        "7",
        "Bone",
        "",
    ] {
        let status = if name.is_empty() { 422 } else { 404 };
        for path in ["/datastore/image", "/datastore/image/info"] {
            let error = get(there, &format!("{path}?image={name}")).error(status, "detail");
            assert!(error.contains("no image given") || error.contains("no such image"));
        }
        let error = infer(there, name, "image", &asked(&[])).error(404, "detail");
        assert!(error.contains("no such image"), "{name}: {error}");
    }
    assert_eq!(get(there, "/datastore/image").status, 422);
    assert_eq!(ask(there, "HEAD", "/datastore/image?image=1.2.3", &[], b"").status, 404);
    let path = format!("/datastore/image?image={SMALL}");
    assert_eq!(ask(there, "HEAD", &path, &[], b"").status, 422);
    assert_eq!(post(there, "/activelearning/first", &json!({})).status, 404);
    // Files that cannot be one scan are not offered; if they are asked for, the error says why,
    // without a path.
    assert_eq!(get(there, "/info/").json(200)["datastore"]["total"], json!(0));
    assert_eq!(post(there, "/activelearning/random", &json!({})).json(200), json!({}));
    let error = infer(there, SMALL, "image", &asked(&[])).error(422, "detail");
    let place = folder.path().to_str().unwrap();
    assert!(error.contains("a slice is missing") && !error.contains(place), "{error}");
    assert!(counted(there, "prism_sessions 0"));
    // A caller without permission has none here either.
    let token = started(Settings { token, dicom, dls: Some(0), ..Settings::default() });
    for path in ["/datastore/", "/datastore/image/info?image=1.2.9"] {
        assert_eq!(get(token.address, path).status, 401, "{path}");
        assert_eq!(get(token.dls.unwrap(), path).status, 404, "{path}");
        let evil = [("Host", "evil.example"), ("Authorization", "Bearer a secret")];
        assert_eq!(ask(token.address, "GET", path, &evil, b"").status, 403, "{path}");
    }
    assert_eq!(infer(token.address, SMALL, "image", &asked(&[])).status, 401);
    // If there is no folder.
    let none = started(Settings::default());
    for path in ["/datastore/", "/datastore/image?image=1.2.9"] {
        assert!(get(none.address, path).error(404, "detail").contains("--dicom"), "{path}");
    }
    assert_eq!(post(none.address, "/activelearning/random", &json!({})).status, 404);
    let error = infer(none.address, SMALL, "image", &asked(&[])).error(404, "detail");
    assert!(error.contains("PUT /session/"), "{error}");
    let refused = |dicom: PathBuf, keep: Option<Keep>| {
        let bind = "127.0.0.1:0".into();
        let settings = Settings { bind, dicom: Some(dicom), keep, ..Settings::default() };
        prism::serve::Server::open(settings, http::model(), "small").err().unwrap()
    };
    let error = refused("no such folder".into(), None);
    assert!(error.starts_with("no such folder: "), "{error}");
    // What is sent would be a series for all clients.
    let error = refused(folder.path().into(), Some(Keep::at(folder.path().join("state"))));
    assert!(error.contains("would be served to others"), "{error}");
    assert!(!folder.path().join("state").exists());
}

#[test]
fn series_that_come_later_are_found_and_those_that_grow_are_read_anew() {
    let folder = tempfile::tempdir().unwrap();
    let small = folder.path().join("other");
    file_small(&small, 3, straight);
    let (idle, dicom) = (Duration::from_secs(1), Some(folder.path().into()));
    let server = started(Settings { idle, dicom, ..Settings::default() });
    let there = server.address;
    assert_eq!(slices_of_small(there), Some(3));
    let example = format!("/datastore/image/info?image={EXAMPLE}");
    assert_eq!(get(there, &example).status, 404);
    file_small(&small, 4, straight);
    file_example(folder.path());
    soon(|| slices_of_small(there) == Some(4));
    soon(|| get(there, &example).status == 200);
    assert_eq!(get(there, "/info/").json(200)["datastore"]["total"], json!(2));
}

/// The number of slices that a server finds of the small series; none if it says to ask again
/// later.
fn slices_of_small(there: SocketAddr) -> Option<usize> {
    let reply = get(there, &format!("/datastore/image?image={SMALL}"));
    if reply.status == 503 {
        assert!(reply.error(503, "detail").contains("try again"));
        assert!(reply.header("Retry-After").is_some());
        return None;
    }
    assert_eq!(reply.status, 200, "{}", reply.text());
    Some(Volume::of_file(reply.body, None).unwrap().grid.size[2])
}

#[test]
fn a_series_that_is_held_is_read_anew_when_its_files_are_others() {
    let folder = tempfile::tempdir().unwrap();
    let (small, all) = (folder.path().join("served/small"), folder.path().join("all"));
    file_small(&all, 4, straight);
    std::fs::create_dir_all(&small).unwrap();
    let come = |k: usize| std::fs::copy(at(&all, k), at(&small, k)).unwrap();
    for k in 0..3 {
        come(k);
    }
    let dicom = Some(folder.path().join("served"));
    let server = started(Settings { dicom, ..Settings::default() });
    let there = server.address;
    assert_eq!(slices_of_small(there), Some(3));
    // A client that asks all the time does not keep it as it was: neither when slices are added...
    come(3);
    soon(|| slices_of_small(there) == Some(4));
    // ... nor when one that was read is overwritten...
    std::fs::copy(at(&all, 0), at(&small, 3)).unwrap();
    soon(|| slices_of_small(there) == Some(3));
    // ... nor when they are removed.
    std::fs::remove_dir_all(&small).unwrap();
    soon(|| get(there, &format!("/datastore/image?image={SMALL}")).status == 404);
    assert!(counted(there, "prism_sessions 0"));
}

#[test]
fn clients_who_ask_at_once_have_one_scan_and_their_own_masks() {
    let folder = tempfile::tempdir().unwrap();
    file_example(&folder.path().join("series"));
    file_small(&folder.path().join("series/other"), SLICES, straight);
    let state = folder.path().join("state");
    let server = started(Settings {
        dicom: Some(folder.path().join("series")),
        keep: Some(Keep::at(&state)),
        // If it were read twice there would be no place for it.
        max_sessions: 1,
        ..Settings::default()
    });
    let there = server.address;
    let image = Arc::new(example());
    let clicks = [CLICK, [84, 82, 14], [78, 84, 14]];
    let ask_for = |click: [usize; 3]| {
        (0..3).map(|_| infer(there, EXAMPLE, "image", &asked(&[click]))).collect::<Vec<_>>()
    };
    let answers = std::thread::scope(|scope| {
        let threads = clicks.map(|click| scope.spawn(move || ask_for(click)));
        threads.map(|thread| thread.join().unwrap())
    });
    for (click, replies) in clicks.into_iter().zip(answers) {
        let mut library = session(&image);
        library.interact(&said(&[(click, true)], None)).unwrap();
        let expected = mask_of(&library, &image);
        for reply in replies {
            assert_eq!(reply.status, 200, "{}", reply.text());
            assert!(reply.body == expected, "{click:?}");
        }
    }
    assert!(counted(there, "prism_sessions 1"));
    // A series that is not in use gives way, to another one and to what is sent.
    assert_eq!(slices_of_small(there), Some(SLICES));
    assert!(counted(there, "prism_sessions 1"));
    let sent = created(there);
    let full = infer(there, SMALL, "image", &asked(&[]));
    assert!(full.error(503, "detail").contains("capacity (1 sessions)"));
    assert_eq!(ask(there, "DELETE", &format!("/session/{sent}"), &[], b"").status, 200);
    // Nothing of a series is kept: its files are there, and its clients send all clicks each time.
    assert_eq!(std::fs::read_dir(&state).unwrap().count(), 1);
}
