//! prism's own interface: its answers are those of the library.

use super::{Mask, upload};
use crate::http::{
    BOX, CLICK, ask, box_and_click, example, get, object_on, parsed, post, said, session,
    session_of, started, started_with, trained,
};
use prism::prompt::{Dense, Prompts};
use prism::serve::Settings;
use prism::volume::{PALETTE, Volume, mask_file, write_mask};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

#[test]
fn a_scan_is_worked_on_as_the_library_does() {
    let server = started_with(trained(), Settings::default());
    let at = server.address;
    let image = Arc::new(example());
    let about = get(at, "/v1").json(200);
    assert_eq!((&about["program"], &about["model"]), (&json!("prism"), &json!("small")));
    assert_eq!(about["colours"], json!(PALETTE));
    let (scan, described) = upload(at);
    assert_eq!(described["shape"], json!(image.grid.size));
    assert_eq!(described["spacing"], json!(image.grid.spacing()));
    assert_eq!(described["modality"], "ct");
    for (row, expected) in described["affine"].as_array().unwrap().iter().zip(&image.grid.affine.0)
    {
        assert_eq!(row, &json!(expected));
    }
    let object = object_on(at, &scan, &json!({ "name": "tumour", "colour": [1, 2, 3] }));
    let path = |what: &str| format!("/v1/objects/{object}/{what}");
    let mut mask = Mask::new(image.grid.size);
    let mut library = session_of(&trained(), &image);

    // A box and a click, then a click that removes something.
    let first = mask.take(&post(at, &path("prompts"), &box_and_click()));
    library.interact(&said(&[(CLICK, true)], Some(BOX))).unwrap();
    assert!(mask.voxels == library.mask() && first["voxels"].as_u64() > Some(100));
    assert_eq!(
        (&first["step"], &first["undo"], &first["redo"]),
        (&json!(1), &json!(true), &json!(false))
    );
    assert!(first["extent_mm"][0].as_f64() > Some(1.0) && first["score"].as_f64() > Some(0.0));
    let ml = first["voxels"].as_f64().unwrap() * image.grid.voxel_ml();
    assert!((first["ml"].as_f64().unwrap() - ml).abs() < 1e-9);
    let after_one = mask.voxels.clone();
    let off = [72, 71, 14];
    let second =
        mask.take(&post(at, &path("prompts"), &json!({ "points": [{ "at": off, "on": false }] })));
    library.interact(&said(&[(off, false)], None)).unwrap();
    assert!(mask.voxels == library.mask() && second["step"] == 2);

    // The file is the one that is written for the same prompts, in every format.
    let folder = tempfile::tempdir().unwrap();
    for format in ["nii.gz", "nii", "nrrd", "seg.nrrd", "mha"] {
        let name = format!("mask.{format}");
        let reply = get(at, &path(&format!("mask?format={format}")));
        let written = folder.path().join(&name);
        write_mask(&written, &image, &library.mask()).unwrap().commit().unwrap();
        assert!(reply.status == 200 && reply.body == std::fs::read(&written).unwrap(), "{name}");
        let disposition = reply.header("Content-Disposition").unwrap();
        assert_eq!(disposition, format!("attachment; filename=\"{name}\""));
    }
    assert_eq!(get(at, &path("mask?format=png")).status, 415);

    // Back and forth, to the bit.
    let two = mask.voxels.clone();
    let back = mask.take(&post(at, &path("undo"), &json!({})));
    assert!(mask.voxels == after_one && back["redo"] == json!(true));
    mask.take(&post(at, &path("redo"), &json!({})));
    assert!(mask.voxels == two);
    assert!(post(at, &path("redo"), &json!({})).error(409, "error").contains("nothing to redo"));
    mask.take(&post(at, &path("undo"), &json!({})));
    mask.take(&post(at, &path("undo"), &json!({})));
    assert!(mask.voxels.iter().all(|v| *v == 0));
    assert!(post(at, &path("undo"), &json!({})).error(409, "error").contains("nothing to undo"));
    mask.take(&post(at, &path("redo"), &json!({})));
    let mut anew = Mask::new(image.grid.size);
    anew.take(&get(at, &path("answer")));
    assert!(anew.voxels == after_one && mask.voxels == after_one);

    // A mask that is given is the answer; a second object covers the first in the label image.
    let other = object_on(at, &scan, &json!({}));
    let block: Vec<u8> = (0..image.grid.voxels())
        .map(|at| {
            let [_, nj, nk] = image.grid.size;
            let [i, j, k] = [at / nk / nj, at / nk % nj, at % nk];
            u8::from((80..90).contains(&i) && (80..90).contains(&j) && (12..16).contains(&k))
        })
        .collect();
    let file = mask_file(Path::new("m.nrrd"), &image.grid, &image.description, &block).unwrap();
    let mut given = Mask::new(image.grid.size);
    given.take(&ask(at, "PUT", &format!("/v1/objects/{other}/mask"), &[], &file));
    assert!(given.voxels == block);
    let labels = get(at, &format!("/v1/scans/{scan}/labels?format=nii.gz"));
    let labels = Volume::of_file(labels.body, None).unwrap().values();
    let expected =
        after_one.iter().zip(&block).map(|(a, b)| if *b != 0 { 2.0 } else { f32::from(*a) });
    assert!(labels.iter().copied().eq(expected));
    let segmentation = get(at, &format!("/v1/scans/{scan}/labels?format=seg.nrrd"));
    let head = String::from_utf8_lossy(&segmentation.body).into_owned();
    assert!(head.contains("Segment0_Name:=tumour\n") && head.contains("Segment1_LabelValue:=2\n"));

    let about = get(at, &format!("/v1/scans/{scan}")).json(200);
    assert_eq!(about["objects"][0]["name"], "tumour");
    assert_eq!(about["objects"][0]["colour"], json!([1, 2, 3]));
    assert_eq!(about["objects"][1]["voxels"], json!(400));
    // It was given no colour: it has the second of the server's default colours.
    assert_eq!(about["objects"][1]["colour"], json!(PALETTE[1]));
    let reset = mask.take(&post(at, &path("reset"), &json!({})));
    assert!(reset["step"] == 0 && mask.voxels.iter().all(|v| *v == 0));

    // What was released is gone for good.
    let objects = format!("/v1/objects/{other}");
    for _ in 0..2 {
        assert_eq!(ask(at, "DELETE", &objects, &[], b"").json(200), json!({ "released": true }));
    }
    assert_eq!(get(at, &format!("{objects}/answer")).status, 404);
    assert_eq!(get(at, &path("answer")).status, 200);
    for _ in 0..2 {
        let reply = ask(at, "DELETE", &format!("/v1/scans/{scan}"), &[], b"");
        assert_eq!(reply.json(200), json!({ "released": true }));
    }
    assert_eq!(get(at, &path("answer")).status, 404);
    let text = get(at, "/metrics").text();
    assert!(
        text.contains("prism_scans 0\n") && text.contains("prism_click_seconds_count 2\n"),
        "{text}"
    );
}

#[test]
fn every_prompt_is_taken_by_prisms_own_interface() {
    let server = started(Settings::default());
    let at = server.address;
    let (scan, _) = upload(at);
    let image = Arc::new(example());
    let object = object_on(at, &scan, &json!({}));
    let prompts = format!("/v1/objects/{object}/prompts");
    let [i, j, k] = CLICK;
    let square = [[i - 8, j - 8], [i - 8, j + 8], [i + 8, j + 8], [i + 8, j - 8]];
    let mut mask = Mask::new(image.grid.size);
    let voxel = |v: [usize; 3]| (v[0] * image.grid.size[1] + v[1]) * image.grid.size[2] + v[2];
    for (prompt, on) in [
        (json!({ "lines": [{ "from": [i - 9, j, k], "to": [i + 9, j, k] }] }), true),
        (json!({ "lassos": [{ "axis": 2, "slice": k, "outline": square }] }), true),
        (json!({ "scribbles": [{ "on": false, "voxels": [[i, j, k], [i + 1, j, k]] }] }), false),
        (json!({ "points": [{ "at": [i, j, k], "on": true }] }), true),
    ] {
        mask.take(&post(at, &prompts, &prompt));
        assert_eq!(mask.voxels[voxel(CLICK)], u8::from(on), "{prompt}");
    }
}

#[test]
fn two_work_at_once_and_what_runs_is_finished() {
    let mut server = started(Settings::default());
    let at = server.address;
    let image = Arc::new(example());
    let mut library = session(&image);
    library.interact(&said(&[(CLICK, true)], Some(BOX))).unwrap();
    let expected = library.mask();
    let (scan, _) = upload(at);
    let (other, _) = upload(at);
    let objects = [object_on(at, &scan, &json!({})), object_on(at, &other, &json!({}))];
    std::thread::scope(|scope| {
        for object in &objects {
            let (expected, size) = (&expected, image.grid.size);
            scope.spawn(move || {
                for _ in 0..3 {
                    let mut mask = Mask::new(size);
                    mask.take(&post(
                        at,
                        &format!("/v1/objects/{object}/prompts"),
                        &box_and_click(),
                    ));
                    assert!(mask.voxels == *expected);
                    assert_eq!(
                        post(at, &format!("/v1/objects/{object}/reset"), &json!({})).status,
                        200
                    );
                }
            });
        }
    });
    // Told to end while it works, it answers first.
    let stop = server.stop.clone();
    let path = format!("/v1/objects/{}/prompts", objects[0]);
    let answered = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(at).unwrap();
        let body = box_and_click().to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: {at}\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        // When it asks for the rest it has begun to handle the request.
        const GO_ON: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
        let mut asked = [0; GO_ON.len()];
        stream.read_exact(&mut asked).unwrap();
        assert_eq!(&asked[..], GO_ON);
        stream.write_all(body.as_bytes()).unwrap();
        stop.stop();
        let mut answer = vec![];
        stream.read_to_end(&mut answer).unwrap();
        parsed(&answer, "POST")
    });
    let mut mask = Mask::new(image.grid.size);
    mask.take(&answered.join().unwrap());
    assert!(mask.voxels == expected);
    server.end();
    // A process that another test is just about to start holds copies of all open files until then.
    let is_closed = |_| {
        let closed = TcpStream::connect(at).is_err();
        if !closed {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        closed
    };
    assert!((0..3000).any(is_closed));
}

#[test]
fn a_mask_that_is_given_is_understood_as_the_program_does() {
    // The interface's promises about a mask also hold in its session.
    let image = Arc::new(example());
    let mut library = session(&image);
    let mask: Vec<u8> = (0..image.grid.voxels()).map(|at| u8::from(at % 1000 == 0)).collect();
    let dense = Prompts { dense: Some(Dense::Mask(mask.clone())), ..Prompts::default() };
    library.interact(&dense).unwrap();
    assert!(library.mask() == mask);
}

#[test]
fn objects_are_renamed_and_recoloured() {
    let server = started(Settings::default());
    let at = server.address;
    let (scan, _) = upload(at);
    let object = object_on(at, &scan, &json!({ "name": "tumour", "colour": [1, 2, 3] }));
    let path = format!("/v1/objects/{object}");
    let patched = |about: &Value| ask(at, "PATCH", &path, &[], about.to_string().as_bytes());
    let told = patched(&json!({ "name": "Knötchen 2" })).json(200);
    assert_eq!((&told["object"], &told["colour"]), (&json!(object), &json!([1, 2, 3])));
    let told = patched(&json!({ "colour": [255, 128, 0] })).json(200);
    assert_eq!((&told["name"], &told["colour"]), (&json!("Knötchen 2"), &json!([255, 128, 0])));
    let there = get(at, &format!("/v1/scans/{scan}")).json(200);
    assert_eq!(there["objects"], json!([told]));
    assert_eq!(patched(&json!({})).json(200), told);
    // Files have them.
    post(at, &format!("{path}/prompts"), &box_and_click());
    let segmentation = get(at, &format!("/v1/scans/{scan}/labels?format=seg.nrrd"));
    let head = String::from_utf8_lossy(&segmentation.body).into_owned();
    assert!(head.contains("Segment0_Name:=Knötchen 2\n"));
    assert!(head.contains("Segment0_Color:=1 0.50"), "the colour is the one that was chosen");
    // Invalid values change nothing.
    for (about, status) in [
        (json!({ "name": "a".repeat(201) }), 422),
        (json!({ "name": "two\nlines" }), 422),
        (json!({ "colour": [1, 2] }), 400),
        (json!({ "colour": [1, 2, 256] }), 400),
        (json!({ "voxels": 7 }), 400),
    ] {
        assert_eq!(patched(&about).status, status, "{about}");
    }
    let new = post(at, &format!("/v1/scans/{scan}/objects"), &json!({ "name": "two\nlines" }));
    assert_eq!(new.status, 422, "{}", new.text());
    assert_eq!(patched(&json!({})).json(200)["name"], told["name"]);
    let gone = ask(at, "PATCH", &format!("/v1/objects/{}", "0".repeat(32)), &[], b"{}");
    assert_eq!(gone.status, 404);
}

#[test]
fn diameters_are_told_with_an_answer() {
    let server = started(Settings::default());
    let at = server.address;
    let (scan, _) = upload(at);
    let image = example();
    let path = format!("/v1/objects/{}", object_on(at, &scan, &json!({})));
    // A row of 30 voxels on one slice, a shorter one on another.
    let [_, nj, nk] = image.grid.size;
    let rows: Vec<u8> = (0..image.grid.voxels())
        .map(|at| match [at / nk / nj, at / nk % nj, at % nk] {
            [i, 70, 14] => u8::from((60..90).contains(&i)),
            [i, 40, 5] => u8::from((60..70).contains(&i)),
            _ => 0,
        })
        .collect();
    let file = mask_file(Path::new("m.nrrd"), &image.grid, &image.description, &rows).unwrap();
    let mut mask = Mask::new(image.grid.size);
    let told = mask.take(&ask(at, "PUT", &format!("{path}/mask"), &[], &file));
    let [x, y, _] = image.grid.spacing();
    for (n, mm) in [30.0 * x, y].into_iter().enumerate() {
        let found = told["diameters_mm"][n].as_f64().unwrap();
        assert!((found - mm).abs() < 1e-6, "{told}");
    }
    assert_eq!(told["diameters_slice"], 14);
    let nothing = mask.take(&post(at, &format!("{path}/reset"), &json!({})));
    assert!(nothing["diameters_mm"].is_null() && nothing["diameters_slice"].is_null());
}

#[test]
fn what_the_network_is_unsure_of_is_told() {
    let server = started(Settings::default());
    let at = server.address;
    let (scan, _) = upload(at);
    let image = Arc::new(example());
    let object = object_on(at, &scan, &json!({}));
    let path = |what: &str| format!("/v1/objects/{object}/{what}");
    let told = || {
        let reply = get(at, &path("unsure"));
        assert_eq!(reply.status, 200, "{}", reply.text());
        let about: Value =
            serde_json::from_str(reply.header("X-Prism-Answer").expect("what it is")).unwrap();
        (about, reply.body)
    };
    assert_eq!(told(), (json!({ "voxels": 0, "region": null }), vec![]));
    assert_eq!(post(at, &path("prompts"), &box_and_click()).status, 200);
    let mut library = session(&image);
    library.interact(&said(&[(CLICK, true)], Some(BOX))).unwrap();
    let probability = library.prediction().unwrap().probability();
    let [ni, nj, nk] = image.grid.size;
    let is_unsure = |v: [usize; 3]| {
        v != CLICK && (0.25..=0.75).contains(&probability[(v[0] * nj + v[1]) * nk + v[2]])
    };
    let (about, bits) = told();
    let region: [[usize; 2]; 3] = serde_json::from_value(about["region"].clone()).unwrap();
    let size = region.map(|[low, high]| high - low);
    assert_eq!(bits.len(), size.iter().product::<usize>().div_ceil(8));
    let (mut voxels, mut low, mut high) = (0, [usize::MAX; 3], [0; 3]);
    for at in 0..ni * nj * nk {
        let voxel = [at / nk / nj, at / nk % nj, at % nk];
        let inside = (0..3).all(|a| (region[a][0]..region[a][1]).contains(&voxel[a]));
        let marked = inside && {
            let [x, y, z]: [usize; 3] = std::array::from_fn(|a| voxel[a] - region[a][0]);
            let place = (z * size[1] + y) * size[0] + x;
            bits[place / 8] >> (place % 8) & 1 == 1
        };
        assert_eq!(marked, is_unsure(voxel), "{voxel:?}");
        if marked {
            voxels += 1;
            low = std::array::from_fn(|a| low[a].min(voxel[a]));
            high = std::array::from_fn(|a| high[a].max(voxel[a] + 1));
        }
    }
    assert!(voxels > 0 && about["voxels"] == json!(voxels), "{about}");
    let bounds: [[usize; 2]; 3] = std::array::from_fn(|a| [low[a], high[a]]);
    assert_eq!(region, bounds);
    // A mask that was given is nowhere in doubt.
    let (grid, description) = (&image.grid, &image.description);
    let file = mask_file(Path::new("m.nii"), grid, description, &library.mask()).unwrap();
    assert_eq!(ask(at, "PUT", &path("mask"), &[], &file).status, 200);
    assert_eq!(told(), (json!({ "voxels": 0, "region": null }), vec![]));
    let lost = format!("/v1/objects/{}/unsure", "0".repeat(32));
    assert!(get(at, &lost).error(404, "error").contains("no such object"));
}

#[test]
fn a_slice_with_its_contour_is_a_picture() {
    let server = started(Settings::default());
    let at = server.address;
    let (scan, _) = upload(at);
    let object = object_on(at, &scan, &json!({}));
    let preview = |query: &str| get(at, &format!("/v1/objects/{object}/preview{query}"));
    let picture = |query: &str| {
        let reply = preview(query);
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert_eq!(reply.header("Content-Type"), Some("image/png"));
        assert!(reply.body.starts_with(b"\x89PNG\r\n\x1a\n"));
        reply.body
    };
    let before = picture("?slice=14");
    assert_eq!(post(at, &format!("/v1/objects/{object}/prompts"), &box_and_click()).status, 200);
    let after = picture("?plane=axial&slice=14");
    assert_ne!(before, after);
    // The slice through the click is shown unless another is asked for.
    assert_eq!(picture(""), after);
    assert_ne!(picture("?plane=coronal"), after);
    assert!(preview("?plane=oblique").error(400, "error").contains("oblique"));
    assert!(preview("?slice=28").error(422, "error").contains("28"));
    let lost = format!("/v1/objects/{}/preview", "0".repeat(32));
    assert!(get(at, &lost).error(404, "error").contains("no such object"));
}
