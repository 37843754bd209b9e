//! Turns at the network, and what is encoded ahead of clicks, as clients of a server see them. The
//! number of looks is read from the server's metrics.

use crate::http::{
    self, CLICK, act, ask, box_and_click, count, example, mask_of, model, object_on, point, post,
    said, started, started_with, trained,
};
use crate::viewer::{Viewer, array_of_example, nnia};
use prism::model::Model;
use prism::prompt::{Dense, Prompts};
use prism::serve::{Keep, Settings};
use prism::session::{Encodings, Options, Scan, Session, intensities, places};
use prism::volume::{Grid, Volume, mask_file};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

fn upload(at: SocketAddr) -> String {
    http::upload(at).0
}

fn encoded(at: SocketAddr) -> u64 {
    count(at, "prism_encodings_total")
}

/// Returns when this many patches were encoded.
fn until_encoded(at: SocketAddr, patches: u64) {
    for _ in 0..6000 {
        if encoded(at) == patches {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{} patches were encoded, expected {patches}", encoded(at));
}

#[track_caller]
fn prompt(at: SocketAddr, object: &str, said: &Value) {
    act(at, object, "prompts", said);
}

/// A session of the library that was given prompts, and its encodings.
fn library(image: &Arc<Volume>, prompts: &Prompts) -> (Session, Arc<Encodings>) {
    library_of(&trained(), image, prompts)
}

fn library_of(
    model: &Arc<Model>,
    image: &Arc<Volume>,
    prompts: &Prompts,
) -> (Session, Arc<Encodings>) {
    let options = Options::default();
    let encodings = Arc::new(Encodings::new(options.memory));
    let decided = intensities(&**image, model.config().intensity);
    let scan = Scan::sharing(model, image.clone(), decided.normalization, options, &encodings);
    let mut session = Session::new(&Arc::new(scan));
    session.interact(prompts).unwrap();
    (session, encodings)
}

/// A block that begins at a voxel, as a mask of a scan, `[i][j][k]`.
fn block(image: &Volume, low: [usize; 3]) -> Vec<u8> {
    let [ni, nj, nk] = image.grid.size;
    let along = |a: usize, n: usize, len: usize| (low[a]..low[a] + len).contains(&n);
    let voxels = (0..ni * nj * nk).map(|at| [at / nk / nj, at / nk % nj, at % nk]);
    voxels.map(|[i, j, k]| u8::from(along(0, i, 16) && along(1, j, 16) && along(2, k, 4))).collect()
}

/// Sends the example; returns when the patch of first clicks on it is encoded.
fn settled(at: SocketAddr) -> String {
    let before = encoded(at);
    let scan = upload(at);
    until_encoded(at, before + 1);
    scan
}

/// Sends a block as an object's mask.
#[track_caller]
fn give(at: SocketAddr, object: &str, image: &Volume, low: [usize; 3]) {
    let mask = block(image, low);
    let file = mask_file(Path::new("m.nrrd"), &image.grid, &image.description, &mask).unwrap();
    let reply = ask(at, "PUT", &format!("/v1/objects/{object}/mask"), &[], &file);
    assert_eq!(reply.status, 200, "{}", reply.text());
}

/// Says that something has ended, however it ended.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn clicks_are_answered_between_the_ops_of_anothers_encoding() {
    let server = started(Settings::default());
    let at = server.address;
    let image = Arc::new(example());
    let clicked = object_on(at, &upload(at), &json!({}));
    prompt(at, &clicked, &box_and_click());
    let is_over = AtomicBool::new(false);
    let overtaken = || count(at, "prism_encodings_overtaken_total");
    let sides = |n: usize| n % 2 == 1;
    let clicks = std::thread::scope(|s| {
        // One client clicks again and again where everything is encoded.
        let clicks = s.spawn(|| {
            let mut clicks = 0;
            while !is_over.load(Ordering::Relaxed) {
                prompt(at, &clicked, &point(CLICK, sides(clicks)));
                clicks += 1;
            }
            clicks
        });
        let over = Over(&is_over);
        // Others come with scans and a first click, which is looked at from several distances.
        let (first, _) = library_of(&model(), &image, &said(&[(CLICK, true)], None));
        let mut encodings = 0;
        while encodings < 40 && overtaken() == 0 {
            let scan = upload(at);
            let object = object_on(at, &scan, &json!({}));
            prompt(at, &object, &point(CLICK, true));
            assert!(mask_of(at, &object) == first.mask());
            assert_eq!(ask(at, "DELETE", &format!("/v1/scans/{scan}"), &[], b"").status, 200);
            encodings += 1;
        }
        drop(over);
        clicks.join().unwrap()
    });
    assert!(overtaken() > 0, "{clicks} clicks waited for others' encodings");
    assert_eq!((count(at, "prism_waiting"), count(at, "prism_paused")), (0, 0));
    let (mut own, _) = library_of(&model(), &image, &said(&[(CLICK, true)], Some(http::BOX)));
    for n in 0..clicks {
        own.interact(&said(&[(CLICK, sides(n))], None)).unwrap();
    }
    assert!(mask_of(at, &clicked) == own.mask());
}

#[test]
fn one_encoding_of_each_goes_before_the_next_of_another() {
    let server = started_with(trained(), Settings::default());
    let at = server.address;
    let image = Arc::new(example());
    // A first click is looked at from several distances, a box with a patch that fits it.
    let (clicked, encodings) = library(&image, &said(&[(CLICK, true)], None));
    assert!(encodings.made() > 6);
    let (boxed, encodings) = library(&image, &said(&[(CLICK, true)], Some(http::BOX)));
    assert!(encodings.made() < 4);
    // The client that draws the box comes while the other's patches are encoded, unless that was
    // done already.
    let comes_between = |_| {
        let scans = [settled(at), settled(at)];
        let [many, one] = [0, 1].map(|n| object_on(at, &scans[n], &json!({})));
        let (before, is_over) = (encoded(at), AtomicBool::new(false));
        let goes_first = std::thread::scope(|s| {
            s.spawn(|| {
                let _over = Over(&is_over);
                prompt(at, &many, &point(CLICK, true));
            });
            while encoded(at) == before && !is_over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            prompt(at, &one, &box_and_click());
            !is_over.load(Ordering::Relaxed)
        });
        assert!(mask_of(at, &many) == clicked.mask() && mask_of(at, &one) == boxed.mask());
        for scan in scans {
            assert_eq!(ask(at, "DELETE", &format!("/v1/scans/{scan}"), &[], b"").status, 200);
        }
        goes_first
    };
    assert!(
        (0..40).any(comes_between),
        "a box waits for all that another's click is looked at with"
    );
}

#[test]
fn where_a_mask_lies_is_encoded_before_the_first_click() {
    let server = started_with(trained(), Settings::default());
    let at = server.address;
    let image = Arc::new(example());
    // Both look once: on a mask, and where it is clicked on.
    let (low, off) = ([74, 74, 12], [82, 82, 14]);
    let mask = Prompts { dense: Some(Dense::Mask(block(&image, low))), ..Prompts::default() };
    let (mut own, encodings) = library(&image, &mask);
    assert_eq!(encodings.made(), 0);
    own.interact(&said(&[(off, false)], None)).unwrap();
    assert_eq!(encodings.made(), 1);

    let scan = settled(at);
    let object = object_on(at, &scan, &json!({}));
    give(at, &object, &image, low);
    until_encoded(at, 2);
    prompt(at, &object, &point(off, false));
    assert_eq!(encoded(at), 2);
    assert!(mask_of(at, &object) == own.mask());

    // A client that clicks at once waits for it, or does it: it is done once in any case.
    let other = object_on(at, &scan, &json!({}));
    give(at, &other, &image, [50, 60, 8]);
    prompt(at, &other, &point([58, 68, 10], false));
    assert_eq!(encoded(at), 3);

    // The same applies to the beginning of a client of nnInteractive.
    let (size, spacing, values, turned) = array_of_example();
    let mut viewer = Viewer::new(at);
    viewer.open(size, spacing, &values);
    let marks = block(&turned, low);
    let [nk, nj, ni] = size;
    let place = |at: usize| (at % ni * nj + at / ni % nj) * nk + at / ni / nj;
    let initial: Vec<u8> = (0..marks.len()).map(|at| marks[place(at)]).collect();
    let message = nnia("uint8", 1, &size, &initial);
    let reply = viewer.send("/add_initial_seg_interaction", &json!({}), &message);
    assert_eq!(viewer.take(reply), (false, false));
    until_encoded(at, 5);
    viewer.buffer = initial;
    assert_eq!(viewer.point(json!([off[2], off[1], off[0]]), false, true), (true, true));
    assert_eq!(encoded(at), 5);
}

/// A voxel beside the click of the example that is looked at first with the very same patches.
fn beside_click(image: &Volume) -> [usize; 3] {
    let looks = |at: [usize; 3]| -> Vec<Grid> {
        let prompts = said(&[(at, true)], None);
        let places = places(&trained(), &image.grid, &Options::default(), &prompts).unwrap();
        places.iter().map(|patch| patch.grid).collect()
    };
    let [i, j, k] = CLICK;
    let near = [[i + 1, j, k], [i - 1, j, k], [i, j + 1, k], [i, j - 1, k]];
    near.into_iter().find(|at| looks(*at) == looks(CLICK)).unwrap()
}

#[test]
fn where_a_pointer_rests_is_encoded_before_a_first_click() {
    let server = started_with(trained(), Settings::default());
    let at = server.address;
    let image = Arc::new(example());
    let prepare = |object: &str, point: [usize; 3]| {
        let reply = post(at, &format!("/v1/objects/{object}/prepare"), &json!({ "point": point }));
        reply.json(202)["places"].as_u64().unwrap()
    };
    // A first click is looked at from six distances, and then where the object may be according to
    // each.
    let beside = beside_click(&image);
    let (own, encodings) = library(&image, &said(&[(beside, true)], None));
    assert!(encodings.made() > 6);
    let object = object_on(at, &upload(at), &json!({}));
    assert_eq!(prepare(&object, CLICK), 6);
    until_encoded(at, 6);
    prompt(at, &object, &point(beside, true));
    assert_eq!(encoded(at), encodings.made());
    assert!(mask_of(at, &object) == own.mask());
    // Where the next click is looked at is known then.
    assert_eq!(prepare(&object, [30, 30, 5]), 0);
    assert_eq!(encoded(at), encodings.made());

    // The first of two places gives way.
    let (former, latter) = ([130, 130, 23], [40, 80, 14]);
    let (own, encodings) = library(&image, &said(&[(latter, true)], None));
    let object = object_on(at, &settled(at), &json!({}));
    let before = encoded(at);
    assert_eq!((prepare(&object, former), prepare(&object, latter)), (6, 6));
    // It is returned again when nothing of it waits any more.
    let is_done = |_| {
        std::thread::sleep(Duration::from_millis(20));
        prepare(&object, latter) == 6
    };
    assert!((0..6000).any(is_done));
    let told = encoded(at);
    assert!((5..=10).contains(&(told - before)), "{before}, {told}");
    prompt(at, &object, &point(latter, true));
    assert_eq!(encoded(at) - told, encodings.made() - 6);
    assert!(mask_of(at, &object) == own.mask());
}

#[test]
fn where_an_object_was_looked_at_is_encoded_when_a_server_is_back() {
    let folder = tempfile::tempdir().unwrap();
    let keep = Some(Keep::at(folder.path().join("state")));
    let settings = Settings { keep, ..Settings::default() };
    let image = example();
    let mut server = started_with(trained(), settings.clone());
    let object = object_on(server.address, &settled(server.address), &json!({}));
    give(server.address, &object, &image, [74, 74, 12]);
    prompt(server.address, &object, &point([82, 82, 14], false));
    assert_eq!(encoded(server.address), 2);
    let before = mask_of(server.address, &object);
    server.end();
    let server = started_with(trained(), settings);
    let at = server.address;
    until_encoded(at, 1);
    assert!(mask_of(at, &object) == before);
    prompt(at, &object, &point([75, 75, 13], false));
    assert_eq!(encoded(at), 1);
}
