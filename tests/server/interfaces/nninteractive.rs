//! nnInteractive's protocol, by a client of the test and by nnInteractive's.

use crate::http::{BOX, CLICK, ask, get, said, session_of, started, started_with, trained};
use crate::python::Python;
use crate::viewer::{Viewer, array_of_example, nnia};
use prism::serve::Settings;
use serde_json::{Value, json};
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

#[test]
fn nninteractive_is_spoken() {
    // A click takes a while, in which a client can leave.
    let server = started_with(trained(), Settings::default());
    let at = server.address;
    let capabilities = get(at, "/capabilities").json(200);
    for key in [
        "supported_interactions",
        "channel_mapping",
        "num_interaction_channels",
        "supports_initial_label",
        "supports_zero_shot_label_refinement",
        "interaction_decay",
        "inference_session_version",
    ] {
        assert!(capabilities.get(key).is_some(), "{key}");
    }
    assert_eq!(capabilities["preferred_scribble_thickness"].as_array().map(Vec::len), Some(3));
    let (size, spacing, values, image) = array_of_example();
    let [_, nj, ni] = size;
    let mut viewer = Viewer::new(at);
    let point = json!({ "coordinates": [1, 2, 3], "include_interaction": true });
    let early = viewer.post("/add_point_interaction", &point);
    assert!(early.error(400, "detail").contains("set_image"));
    viewer.open(size, spacing, &values);
    assert_eq!(
        viewer.post("/set_do_autozoom", &json!({ "do_autozoom": false })).json(200),
        json!({})
    );

    let mut library = session_of(&trained(), &image);
    let bounds = json!([[BOX[2], BOX[5]], [BOX[1], BOX[4]], [BOX[0], BOX[3]]]);
    assert_eq!(viewer.bounds(bounds, true), (true, true));
    library.interact(&said(&[], Some(BOX))).unwrap();
    assert!(viewer.mask() == library.mask());
    let first = viewer.buffer.clone();
    // Positions are rounded, halves to even voxels.
    let off = [72, 72, 14];
    assert!(viewer.point(json!([14.0, 72.5, 71.5]), false, true).0);
    library.interact(&said(&[(off, false)], None)).unwrap();
    assert!(viewer.mask() == library.mask());
    let second = viewer.buffer.clone();
    // A point beyond the image is ignored.
    assert_eq!(viewer.point(json!([-100, 3, 3]), true, true), (true, false));
    let beyond = json!([[-9, -3], [BOX[1], BOX[4]], [BOX[0], BOX[3]]]);
    assert_eq!(viewer.bounds(beyond, true), (true, false));
    // Queued, predicted, queued again and taken back.
    assert_eq!(viewer.point(json!([14, 80, 80]), true, false), (false, false));
    let reply = viewer.post("/predict", &json!({ "force_full_refine": false }));
    assert!(viewer.take(reply).0);
    library.interact(&said(&[(CLICK, true)], None)).unwrap();
    assert!(viewer.mask() == library.mask());
    let reply = viewer.post("/predict", &json!({}));
    assert_eq!(viewer.take(reply), (false, false));
    assert_eq!(viewer.point(json!([14, 81, 81]), true, false), (false, false));
    assert_eq!(viewer.undo(), (true, false));
    // As far back as the history goes, to the bit.
    viewer.undo();
    assert!(viewer.buffer == second);
    viewer.undo();
    assert!(viewer.buffer == first);
    assert_eq!(viewer.undo(), (true, true));
    assert!(viewer.buffer.iter().all(|v| *v == 0));
    assert_eq!(viewer.undo(), (false, false));

    // Painted: a crop of a stroke, then an outline that removes some again.
    let place = [[14, 15], [78, 83], [76, 86]];
    let told = viewer.painted("/add_scribble_interaction", place, &[1; 50], true);
    assert_eq!(told, (true, true));
    let on =
        |viewer: &Viewer, k: usize, j: usize, i: usize| viewer.buffer[(k * nj + j) * ni + i] != 0;
    assert!((78..83).all(|j| (76..86).all(|i| on(&viewer, 14, j, i))));
    let mut ring = vec![0u8; 100];
    (0..100)
        .filter(|at| [0, 9].contains(&(at / 10)) || [0, 9].contains(&(at % 10)))
        .for_each(|at| ring[at] = 1);
    viewer.painted("/add_lasso_interaction", [[14, 15], [76, 86], [76, 86]], &ring, false);
    assert!(!on(&viewer, 14, 80, 81) && !on(&viewer, 14, 82, 78));
    for (shape, place, says) in [
        ([1, 5, 9], json!([[14, 15], [78, 83], [76, 86]]), "must match interaction_bbox size"),
        ([1, 5, 10], json!([[14, 14], [78, 83], [76, 86]]), "positive size"),
        ([1, 5, 10], json!([[-1, 0], [78, 83], [76, 86]]), "exceeds original image bounds"),
        ([1, 5, 10], json!(null), "must match interaction_bbox size"),
    ] {
        let meta = json!({ "include_interaction": true, "interaction_bbox": place });
        let body = nnia("uint8", 1, &shape, &vec![1; shape.iter().product()]);
        let error = viewer.send("/add_lasso_interaction", &meta, &body).error(400, "detail");
        assert!(error.contains(says), "{error}");
    }
    let before = viewer.buffer.clone();

    // An initial mask is the object, and one step that can be undone.
    let initial: Vec<u8> = (0..before.len())
        .map(|at| {
            let [k, j, i] = [at / ni / nj, at / ni % nj, at % ni];
            u8::from((12..16).contains(&k) && (75..90).contains(&j) && (75..90).contains(&i))
        })
        .collect();
    let message = nnia("uint8", 1, &size, &initial);
    let reply = viewer.send("/add_initial_seg_interaction", &json!({}), &message);
    assert_eq!(viewer.take(reply), (false, false));
    viewer.buffer = initial.clone();
    assert_eq!(viewer.point(json!([14, 60, 60]), false, true), (true, false));
    viewer.undo();
    assert!(viewer.buffer == initial);
    // A client empties its buffer before it asks for that: if the request is refused, everything is
    // sent again.
    viewer.buffer.fill(0);
    let headers = [("X-Lease-Token", viewer.lease.as_str()), ("Content-Length", "99999999")];
    assert_eq!(ask(at, "POST", "/reset_interactions", &headers, b"").status, 413);
    viewer.undo();
    assert!(viewer.buffer == before);
    let wrong = nnia("uint8", 1, &[1, 2, 3], &[1; 6]);
    let error =
        viewer.send("/add_initial_seg_interaction", &json!({}), &wrong).error(400, "detail");
    assert!(error.contains("must match input image shape"), "{error}");

    // A negative box, one slice thick, in each plane; floats; zero extent is an error.
    assert_eq!(viewer.post("/reset_interactions", &json!({})).json(200), json!({}));
    viewer.buffer.fill(0);
    for bounds in [
        json!([[14, 15], [68, 94], [69, 93]]),
        json!([[12.6, 16.2], [80, 81], [69.4, 92.5]]),
        json!([[13, 16], [68, 94], [80, 81]]),
    ] {
        assert!(viewer.bounds(bounds, true).0);
        assert!(viewer.buffer.iter().any(|v| *v != 0));
    }
    assert!(viewer.bounds(json!([[14, 15], [70, 90], [70, 90]]), false).0);
    let empty = json!({ "bbox_coords": [[14, 14], [1, 2], [1, 2]], "include_interaction": true });
    let error = viewer.post("/add_bbox_interaction", &empty).error(400, "detail");
    assert!(error.contains("size is zero"), "{error}");
    for (path, body) in [
        ("/add_point_interaction", "garbage"),
        ("/add_point_interaction", "{\"coordinates\":[1,2],\"include_interaction\":true}"),
        ("/add_bbox_interaction", "{\"bbox_coords\":[[1,2]],\"include_interaction\":true}"),
    ] {
        assert_eq!(viewer.send(path, &Value::Null, body.as_bytes()).status, 422, "{path} {body}");
    }
    let large = json!({ "shape": [1 << 20, 1 << 20, 1 << 20], "dtype": "uint8" });
    assert_eq!(viewer.post("/set_target_buffer", &large).status, 413);

    // A body that should be short is not read if it is long.
    for path in ["/predict", "/set_target_buffer", "/set_do_autozoom"] {
        let headers = [("X-Lease-Token", viewer.lease.as_str()), ("Content-Length", "100000")];
        assert_eq!(ask(at, "POST", path, &headers, b"").status, 413, "{path}");
    }

    // A client that disconnects before the answer finds what it missed in the next.
    let body = json!({ "coordinates": [14, 80, 80], "include_interaction": true }).to_string();
    let leaves = |_| -> Option<Viewer> {
        let mut gone = Viewer::new(at);
        gone.open(size, spacing, &values);
        let head = format!(
            "POST /add_point_interaction HTTP/1.1\r\nHost: {at}\r\nX-Lease-Token: {}\r\nContent-Length: {}\r\n\r\n",
            gone.lease,
            body.len()
        );
        // It disconnects while it waits for its turn, or while its request runs.
        let mut other = Viewer::new(at);
        other.open(size, spacing, &values);
        let busy = std::thread::spawn(move || other.point(json!([14, 80, 80]), true, true));
        let mut stream = TcpStream::connect(at).unwrap();
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        let waits = || get(at, "/metrics").text().lines().any(|line| line == "prism_waiting 1");
        while !busy.is_finished() && !waits() {}
        stream.set_nonblocking(true).unwrap();
        let is_answered = stream.peek(&mut [0]).is_ok();
        drop(stream);
        assert_eq!(busy.join().unwrap(), (true, true));
        (!is_answered).then_some(gone)
    };
    let mut gone = (0..5).find_map(leaves).expect("a client that leaves before its answer");
    assert!(gone.point(json!([14, 80, 80]), true, true).0);
    let mask = gone.mask();
    // The request was carried out before it was noticed that its client had left, or was not.
    let given = std::iter::from_fn(|| gone.undo().0.then_some(())).count();
    assert!(given == 1 || given == 2, "{given}");
    let mut library = session_of(&trained(), &image);
    for _ in 0..given {
        library.interact(&said(&[(CLICK, true)], None)).unwrap();
    }
    assert!(mask == library.mask(), "{given}");

    // An image without contrast is reported when a point is given.
    let mut blank = Viewer::new(at);
    blank.open([4, 5, 6], [1.0; 3], &[0; 120]);
    let error = blank.post("/add_point_interaction", &point).error(400, "detail");
    assert!(error.contains("entirely zero"), "{error}");
}

/// The heartbeats that are answered while a first point is.
fn answered_meanwhile(at: SocketAddr) -> usize {
    let (size, spacing, values, _) = array_of_example();
    let mut viewer = Viewer::new(at);
    viewer.open(size, spacing, &values);
    let lease = viewer.lease.clone();
    let busy = std::thread::spawn(move || {
        // For a first point the scale has to be found, which takes the longest.
        viewer.point(json!([14, 80, 80]), true, true);
        Instant::now()
    });
    let mut beats = vec![];
    while !busy.is_finished() {
        let beat = ask(at, "POST", "/heartbeat", &[("X-Lease-Token", &lease)], b"{}");
        assert!(beat.json(200)["remaining_seconds"].as_f64() >= Some(0.0));
        beats.push(Instant::now());
    }
    let answered = busy.join().unwrap();
    ask(at, "POST", "/release", &[("X-Lease-Token", &lease)], b"").json(200);
    beats.into_iter().filter(|beat| *beat < answered).count()
}

#[test]
fn a_client_that_lives_is_answered_while_another_is_worked_for() {
    let server = started_with(trained(), Settings::default());
    // This thread may be paused for as long as a prediction takes.
    let during: Vec<usize> = (0..20)
        .map(|_| answered_meanwhile(server.address))
        .take_while(|during| *during < 2)
        .collect();
    assert!(during.len() < 20, "{during:?} heartbeats were answered during predictions");
}

#[test]
fn a_client_that_lives_and_does_nothing_is_let_go() {
    let server = started(Settings { idle: Duration::from_secs(3), ..Settings::default() });
    let at = server.address;
    let viewer = Viewer::new(at);
    let end = Instant::now() + Duration::from_secs(300);
    let header = [("X-Lease-Token", viewer.lease.as_str())];
    // Signs of life are not work: the lease is dropped all the same.
    loop {
        let beat = ask(at, "POST", "/heartbeat", &header, b"{}");
        if beat.status == 410 {
            assert_eq!(beat.error(410, "detail"), "lease expired or unknown");
            break;
        }
        assert!(Instant::now() < end, "the lease does not end");
        std::thread::sleep(Duration::from_millis(100));
    }
    // A client that sends much before it reads learns of it too.
    let image = nnia("uint8", 1, &[1, 100, 200, 300], &vec![1; 6_000_000]);
    assert_eq!(viewer.send("/set_image", &json!({}), &image).status, 410);
    let none = ask(at, "POST", "/heartbeat", &[], b"{}");
    assert_eq!(none.error(410, "detail"), "lease token missing");
    assert_eq!(ask(at, "GET", "/lease_status", &header, b"").status, 410);
}

/// nnInteractive's own client, which 3D Slicer's and napari's extensions use, if Python can install
/// it.
#[test]
fn nninteractives_own_client_works() {
    let import = "import nnInteractive.inference.remote";
    let Some(python) = Python::with("nninteractive", import) else { return };
    let idle = Duration::from_secs(6);
    let server = started(Settings { idle, max_sessions: 2, ..Settings::default() });
    let lasting = started(Settings::default());
    let url = |at: SocketAddr| format!("http://{at}");
    python.all_is_well(&[&url(server.address), &url(lasting.address)]);
}
