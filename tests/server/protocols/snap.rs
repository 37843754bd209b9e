//! ITK-SNAP.

use super::{Sent, counted, form, mask_of, send, send_form, start, voxels};
use crate::http::{CLICK, Part, ask, example, get, said, session, started};
use prism::serve::{Secret, Settings};
use prism::volume::{Affine, Description, Element, Grid, Volume};
use serde_json::{Value, json};
use std::sync::Arc;

/// The example as ITK-SNAP sends it, and as the library reads it.
fn example_of_snap() -> (Sent, Arc<Volume>) {
    let image = example();
    let size = image.grid.size;
    let [di, dj, dk] = image.grid.spacing();
    let values: Vec<f32> = voxels(size).map(|voxel| image.at(voxel)).collect();
    let affine = Affine([[-di, 0.0, 0.0, -10.0], [0.0, -dj, 0.0, -20.0], [0.0, 0.0, dk, 30.0]]);
    let grid = Grid { size, affine };
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let description = Description::of_new(&grid, "float32");
    let volume = Volume::of_elements(grid, Element::Float32, bytes, description).unwrap();
    (Sent::new(size, [di, dj, dk], &values), Arc::new(volume))
}

#[test]
fn itk_snap_is_spoken_to_by_both_generations_of_its_paths() {
    let server = started(Settings::default());
    let at = server.address;
    let status = get(at, "/status").json(200);
    assert_eq!(status["status"], "ok");
    let version: Vec<u32> =
        status["version"].as_str().unwrap().split('.').map(|n| n.parse().unwrap()).collect();
    assert!(version >= vec![0, 1, 2]);
    let models = get(at, "/v2/models").json(200);
    assert_eq!(models["models"][0]["id"], "nnInteractive");
    assert_eq!(get(at, "/v2/start_session/other").status, 404);
    let (sent, image) = example_of_snap();
    let size = sent.size;
    let (off, [i, j, k]) = ([84, 80, 14], CLICK);
    for (first, upload, points) in [
        ("/v2/start_session/nnInteractive", "/v2/upload_raw", "/v2/process_point_interaction"),
        ("/start_session", "/upload_raw", "/process_point_interaction"),
    ] {
        let name = start(at, first);
        let early = get(at, &format!("{points}/{name}?point=1&point=2&point=3"));
        assert!(early.error(400, "detail").contains("upload_raw"));
        let path = format!("{upload}/{name}?filename=upload.nii.gz");
        assert!(send_form(at, "POST", &path, &sent.form()).json(200)["message"].is_string());
        let mut library = session(&image);
        let on = get(at, &format!("{points}/{name}?point={i}&point={j}&point={k}&foreground=true"));
        library.interact(&said(&[(CLICK, true)], None)).unwrap();
        let one = mask_of(&on, size);
        assert!(one == library.mask() && one.contains(&1));
        let [x, y, z] = off;
        let less = get(at, &format!("{points}/{name}?x={x}&y={y}&z={z}&foreground=false"));
        library.interact(&said(&[(off, false)], None)).unwrap();
        assert!(mask_of(&less, size) == library.mask() && library.mask() != one);
        // A click beyond the image is ignored.
        let far = get(at, &format!("{points}/{name}?point=-90&point=2&point=3&foreground=true"));
        assert!(mask_of(&far, size) == library.mask());
        for query in ["", "point=1&point=2", "x=1&y=2", "x=a&y=1&z=1", "x=1&y=1&z=1&foreground=x"] {
            assert_eq!(get(at, &format!("{points}/{name}?{query}")).status, 422, "{query}");
        }
        // Painted voxels hold; the inside of an outline is removed.
        let at_voxel = |v: [usize; 3]| (v[0] * size[1] + v[1]) * size[2] + v[2];
        let painted = |v: [usize; 3]| (76..86).contains(&v[0]) && v[1] == 75 && v[2] == 14;
        let path = format!("/process_scribble_interaction/{name}?foreground=true");
        let reply = send_form(at, "POST", &path, &Sent::marks(size, painted).form());
        let mask = mask_of(&reply, size);
        assert!(voxels(size).filter(|v| painted(*v)).all(|v| mask[at_voxel(v)] == 1));
        let within = |n: usize| (74..88).contains(&n);
        let rim = |n: usize| n == 74 || n == 87;
        let outline =
            |v: [usize; 3]| v[2] == 14 && within(v[0]) && within(v[1]) && (rim(v[0]) || rim(v[1]));
        let path = format!("/process_lasso_interaction/{name}?foreground=false");
        let reply = send_form(at, "POST", &path, &Sent::marks(size, outline).form());
        assert_eq!(mask_of(&reply, size)[at_voxel([81, 81, 14])], 0);
        let other = Sent::marks([4, 5, 6], |_| true).form();
        assert_eq!(send_form(at, "POST", &path, &other).status, 400);
        // Another object, from its beginning.
        let reset = get(at, &format!("/reset_interactions/{name}")).json(200);
        assert_eq!(reset, json!({ "status": "success" }));
        let again = get(at, &format!("{points}/{name}?x={i}&y={j}&z={k}&foreground=1"));
        assert!(mask_of(&again, size) == one);
        assert!(counted(at, "prism_sessions 1"));
        assert!(get(at, &format!("/end_session/{name}")).json(200)["message"].is_string());
        for path in [
            format!("{points}/{name}?point=1&point=2&point=3"),
            format!("/v2/reset_interactions/{name}"),
            format!("/v2/end_session/{name}"),
        ] {
            assert!(get(at, &path).error(404, "detail").contains("no such session"), "{path}");
        }
        // A client that sends much before it reads learns of it too.
        let late = send_form(at, "POST", &format!("{upload}/{name}"), &sent.form());
        assert!(late.error(404, "detail").contains("no such session"));
    }
    assert!(counted(at, "prism_sessions 0"));
}

#[test]
fn what_is_wrong_with_a_volume_is_told() {
    let server = started(Settings::default());
    let at = server.address;
    let name = start(at, "/start_session");
    let path = format!("/upload_raw/{name}");
    let sent = Sent::marks([4, 5, 6], |_| true);
    let with = |key: &str, value: Value| {
        let mut metadata = sent.metadata.clone();
        metadata[key] = value;
        Sent { metadata, packed: sent.packed.clone(), ..sent }.form()
    };
    let metadata = sent.metadata.to_string();
    let file: Part = ("file", Some("image.gz"), &sent.packed);
    let meta: Part = ("metadata", None, metadata.as_bytes());
    for (body, status, says) in [
        (form(&[meta]), 422, "no part 'file'"),
        (form(&[file]), 422, "no part 'metadata'"),
        (form(&[file, file, meta]), 422, "several parts 'file'"),
        (form(&[file, ("metadata", None, b"{}")]), 422, "dimensions"),
        (form(&[file, ("metadata", None, &[b' '; 70_000])]), 413, "metadata of 70000 bytes"),
        (form(&[("file", None, b"plain"), meta]), 422, "gzip"),
        (with("dimensions", json!([4, 5])), 422, "2 dimensions"),
        (with("dimensions", json!([4, 5, 7])), 422, "gzip"),
        (with("dimensions", json!([4, 5, 5])), 422, "more bytes"),
        (with("dimensions", json!([1 << 20, 1 << 20, 1 << 20])), 413, "at most"),
        (with("components_per_pixel", json!(3)), 422, "3 components"),
        (with("spacing", json!([1, 1])), 422, "spacing"),
        (with("direction", json!([0, 0, 0, 0, 0, 0, 0, 0, 0])), 422, "inverted"),
        (b"nothing".to_vec(), 400, "the form is incomplete"),
    ] {
        let error = send_form(at, "POST", &path, &body).error(status, "detail");
        assert!(error.contains(says), "{error}");
    }
    let plain = ask(at, "POST", &path, &[("Content-Type", "text/plain")], b"x");
    assert!(plain.error(415, "detail").contains("multipart/form-data"));
    let huge = [("Content-Length", "99999999999999")];
    assert_eq!(ask(at, "POST", &path, &huge, b"").status, 413);
    // A third dimension that is missing, and geometry that was not given.
    let flat = Sent::new([4, 5, 1], [1.0; 3], &[1.0; 20]);
    let metadata = b"{\"dimensions\":[4,5,1]}";
    let parts: [Part; 2] = [("metadata", None, metadata), ("file", None, &flat.packed)];
    assert_eq!(send(at, "POST", &path, &parts).status, 200);
}

#[test]
fn where_a_token_is_needed_itk_snap_has_a_door_of_its_own() {
    let token = Some(Secret::new("a secret").unwrap());
    let page = "https://pages.example";
    let allow_origin = Some(page.into());
    let settings = Settings { token, allow_origin, dls: Some(0), ..Settings::default() };
    let mut server = started(settings);
    let (at, own) = (server.address, server.dls.expect("an address of its own"));
    assert!(own.ip().is_loopback() && own != at);
    for path in ["/status", "/v2/models", "/start_session", "/info/", "/auth/"] {
        assert_eq!(get(at, path).error(401, "detail"), "Missing bearer token", "{path}");
    }
    let bearer = [("Authorization", "Bearer a secret")];
    assert_eq!(ask(at, "GET", "/status", &bearer, b"").status, 200);
    // Nothing else is served there, and no page that is open in a browser gets in.
    for path in ["/", "/v1", "/claim", "/metrics", "/info/", "/openapi.json"] {
        assert_eq!(get(own, path).status, 404, "{path}");
    }
    assert_eq!(get(own, "/healthz").status, 200);
    for header in [
        ("Host", "evil.example:8911"),
        ("Origin", "https://evil.example"),
        // What may call where a token is needed may not where none is.
        ("Origin", page),
        ("Sec-Fetch-Site", "cross-site"),
        ("Sec-Fetch-Site", "same-site"),
    ] {
        assert_eq!(ask(own, "GET", "/start_session", &[header], b"").status, 403, "{header:?}");
    }
    let name = start(own, "/start_session");
    let (sent, _) = example_of_snap();
    let path = format!("/upload_raw/{name}?filename=upload.nii.gz");
    assert_eq!(send_form(own, "POST", &path, &sent.form()).status, 200);
    let [i, j, k] = CLICK;
    let point = format!("/process_point_interaction/{name}?x={i}&y={j}&z={k}&foreground=true");
    let reply = get(own, &point);
    assert!(mask_of(&reply, sent.size).contains(&1));
    // One session, at whichever address it is requested.
    assert_eq!(get(at, &point).status, 401);
    let same = ask(at, "GET", &point, &bearer, b"");
    assert!(mask_of(&same, sent.size) == mask_of(&reply, sent.size));
    server.end();
    assert!(std::net::TcpStream::connect(own).is_err());
    // If there is no token the first address is for all, and there is no other.
    let open = started(Settings::default());
    assert!(open.dls.is_none());
    let page = [("Sec-Fetch-Site", "cross-site")];
    assert_eq!(ask(open.address, "GET", "/start_session", &page, b"").status, 403);
    assert_eq!(ask(open.address, "GET", "/", &page, b"").status, 200);
    let here = [("Sec-Fetch-Site", "same-origin")];
    assert_eq!(ask(open.address, "GET", "/v1", &here, b"").status, 200);
}
