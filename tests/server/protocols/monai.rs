//! MONAI Label, with scans that its clients send.

use super::{counted, created, infer, parts_of, send};
use crate::common::here;
use crate::http::{BOX, CLICK, Part, ask, example, get, said, session, started};
use prism::serve::Settings;
use prism::volume::{Volume, mask_file, plain_nrrd};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

/// Asks for the mask of clicks, and compares its file with the library's.
#[track_caller]
fn clicked(at: SocketAddr, name: &str, mut params: Value, image: &Volume, expected: &[u8]) {
    params["label"] = "tumour".into();
    params["result_extension"] = ".nrrd".into();
    params["result_dtype"] = "uint8".into();
    params["client_id"] = "somebody".into();
    let (told, file, bytes) = parts_of(&infer(at, name, &params));
    assert_eq!(file, "mask.nrrd");
    let written = mask_file(Path::new("m.nrrd"), &image.grid, &image.description, expected);
    assert!(bytes == written.unwrap(), "{params}");
    assert_eq!(told["label_names"], json!({ "tumour": 1 }));
    let voxels = expected.iter().filter(|v| **v != 0).count();
    assert_eq!(told["voxels"], json!(voxels));
}

#[test]
fn monai_label_is_spoken_to_by_all_clicks_each_time() {
    let server = started(Settings::default());
    let at = server.address;
    let info = get(at, "/info/").json(200);
    for key in [
        "name",
        "description",
        "version",
        "labels",
        "models",
        "trainers",
        "strategies",
        "scoring",
        "train_stats",
        "datastore",
    ] {
        assert!(info.get(key).is_some(), "{key}");
    }
    // OHIF's extension adds to the list of all labels.
    assert_eq!(info["labels"], json!(["tumour"]));
    assert_eq!((&info["strategies"], &info["datastore"]), (&json!({}), &json!({})));
    let model = &info["models"]["prism"];
    assert_eq!((&model["type"], &model["dimension"]), (&json!("deepgrow"), &json!(3)));
    assert_eq!(model["labels"], json!({ "tumour": 1 }));
    assert_eq!(get(at, "/auth/").json(200), json!({ "enabled": false }));
    let name = created(at);
    let name = name.as_str();
    let about = get(at, &format!("/session/{name}")).json(200);
    assert_eq!((&about["name"], &about["expiry"]), (&json!(name), &json!(600)));

    let image = Arc::new(example());
    let mut library = session(&image);
    let (off, other) = ([76, 78, 14], [84, 82, 14]);
    // Without prompts nothing is found.
    clicked(at, name, json!({}), &image, &library.mask());
    library.interact(&said(&[(CLICK, true)], None)).unwrap();
    let one = library.mask();
    let first = json!({ "foreground": [CLICK], "background": [] });
    clicked(at, name, first.clone(), &image, &one);
    // Repeated clicks are not given twice; new ones continue from there.
    clicked(at, name, first.clone(), &image, &one);
    library.interact(&said(&[(other, true), (off, false)], None)).unwrap();
    let two = library.mask();
    assert!(two != one);
    let both = json!({ "foreground": [CLICK, other], "background": [off] });
    clicked(at, name, both.clone(), &image, &two);
    // Clicks that are taken back give the answer before them, to the bit.
    clicked(at, name, first.clone(), &image, &one);
    clicked(at, name, both, &image, &two);
    // Other clicks belong to another object, and so do those of another label.
    let mut anew = session(&image);
    anew.interact(&said(&[(other, true)], None)).unwrap();
    clicked(at, name, json!({ "foreground": [other] }), &image, &anew.mask());
    let told = infer(at, name, &json!({ "label": "liver", "foreground": [other, CLICK] }));
    let mut fresh = session(&image);
    fresh.interact(&said(&[(other, true), (CLICK, true)], None)).unwrap();
    let (told, file, _) = parts_of(&told);
    assert_eq!(told["voxels"], json!(fresh.prediction().unwrap().field.voxels()));
    assert_eq!(file, "mask.nii.gz");
    // From the beginning if that is requested; a box, with both its ends; a click elsewhere.
    let reset = json!({ "foreground": [CLICK], "reset_state": true });
    clicked(at, name, reset, &image, &one);
    let [i0, j0, k0, i1, j1, k1] = BOX;
    let roi = json!([i0, i1 - 1, j0, j1 - 1, k0, k1 - 1]);
    let mut boxed = session(&image);
    boxed.interact(&said(&[], Some(BOX))).unwrap();
    clicked(at, name, json!({ "roi": roi, "reset_state": true }), &image, &boxed.mask());
    boxed.interact(&said(&[(CLICK, true)], None)).unwrap();
    let far = json!({ "roi": roi, "foreground": [CLICK, [9999, 0, 0]] });
    clicked(at, name, far, &image, &boxed.mask());

    // The same as a file alone, as parameters alone, packed or not; in a form of one line.
    let path = |output: &str| format!("/infer/prism?image=x&session_id={name}&output={output}");
    let params =
        json!({ "foreground": [CLICK], "result_extension": ".nrrd", "result_compress": false });
    let params = params.to_string();
    let part: [Part; 1] = [("params", None, params.as_bytes())];
    let plain = send(at, "POST", &path("image"), &part);
    let written = plain_nrrd(&image.grid, &image.description, &one).unwrap();
    assert!(plain.status == 200 && plain.body == written);
    let disposition = plain.header("Content-Disposition").unwrap();
    assert_eq!(disposition, "attachment; filename=\"mask.nrrd\"");
    let words = send(at, "POST", &path("json"), &part).json(200);
    assert_eq!(words["label_names"], json!({ "tumour": 1 }));
    let line = format!(
        "params=%7B%22foreground%22%3A%5B%5B{},{},{}%5D%5D%7D",
        CLICK[0], CLICK[1], CLICK[2]
    );
    let kind = [("Content-Type", "application/x-www-form-urlencoded")];
    let reply = ask(at, "POST", &path("image"), &kind, line.as_bytes());
    let written = mask_file(Path::new("m.nii.gz"), &image.grid, &image.description, &one);
    assert!(reply.body == written.unwrap());

    let removed = ask(at, "DELETE", &format!("/session/{name}"), &[], b"").json(200);
    assert_eq!(removed["name"], json!(name));
    let gone = ask(at, "DELETE", &format!("/session/{name}"), &[], b"");
    assert!(gone.error(404, "detail").contains("no such session"));
    assert_eq!(get(at, &format!("/session/{name}")).status, 404);
    assert_eq!(infer(at, name, &json!({})).status, 404);
    assert!(counted(at, "prism_sessions 0"));
}

#[test]
fn what_is_wrong_is_told_to_clients_of_monai_label() {
    let server = started(Settings::default());
    let at = server.address;
    let scan = std::fs::read(here("examples/data/lung1_image.nii.gz")).unwrap();
    let file = |name: &'static str| -> Part { ("files", Some(name), &scan) };
    let lost = "data file: Cargo.toml";
    let detached =
        format!("NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n{lost}\n\n");
    for (parts, status, says) in [
        (vec![("client_id", None, &b"x"[..])], 422, "no part 'files'"),
        (vec![file("a.nii.gz"), file("b.nii.gz")], 422, "several files"),
        (vec![file("a.dcm")], 415, ".nii.gz"),
        (vec![("files", Some("a.nii.gz"), &b"not a scan"[..])], 422, "is not recognised"),
        (vec![("files", Some("../../a.nrrd"), detached.as_bytes())], 422, "in a separate file"),
    ] {
        let error = send(at, "PUT", "/session/", &parts).error(status, "detail");
        assert!(error.contains(says), "{error}");
    }
    assert_eq!(ask(at, "PUT", "/session/", &[], b"").status, 415);
    let name = created(at);
    let path = format!("/infer/prism?session_id={name}");
    let with = |params: Value| infer(at, &name, &params);
    let label: [Part; 1] = [("label", Some("a.nii.gz"), b"x")];
    let none: [Part; 1] = [("params", None, b"{}")];
    for (reply, status, says) in [
        (with(json!({ "foreground": [[1, 2]] })), 422, "2 numbers"),
        (with(json!({ "foreground": [["a", 2, 3]] })), 422, "params"),
        (with(json!({ "foreground": vec![[1, 2, 3]; 1_001] })), 422, "at most 1000"),
        (with(json!({ "roi": [1, 2] })), 422, "roi of 2"),
        (with(json!({ "roi": [9000, 9001, 0, 1, 0, 1] })), 422, "outside the scan"),
        (with(json!({ "result_extension": "/../a.nrrd" })), 422, "result_extension"),
        (with(json!({ "result_dtype": "float32" })), 422, "uint8"),
        (send(at, "POST", &path, &label), 422, "'label'"),
        (send(at, "POST", &format!("{path}&output=dicom_seg"), &none), 422, "output"),
        (send(at, "POST", "/infer/prism?image=1.2.3", &none), 404, "PUT /session/"),
        (send(at, "POST", "/infer/prism?session_id=lost", &none), 404, "no such session"),
        (send(at, "POST", &format!("/infer/other?session_id={name}"), &none), 404, "no such model"),
        (ask(at, "POST", &path, &[("Content-Length", "20000000")], b""), 413, "at most"),
    ] {
        let error = reply.error(status, "detail");
        assert!(error.contains(says), "{error}");
    }
}
