//! Memory that grows with what the library is given is held against the budget: texts, outlines,
//! clicks, masks, gradients. A process of its own, which has one budget.

#[path = "common/mod.rs"]
mod common;
#[path = "common/http.rs"]
mod http;
#[path = "common/viewer.rs"]
mod viewer;

use common::{here, tiny, tiny_model};
use http::{get, started};
use prism::autograd::{ParamGrads, Tape, Var};
use prism::data::cases::TargetLabel;
use prism::data::sample::Augmentation;
use prism::data::source::Pools;
use prism::device::Device;
use prism::input::read_text;
use prism::memory::{Charge, set_limit, used};
use prism::model::{Config, Observer, Part, checkpoint, prompt_maps};
use prism::ops::rows::narrow_gradient;
use prism::picture::Picture;
use prism::prompt::simulate::{Kind, generator, scribble};
use prism::prompt::{Dense, PromptError, Prompts, RawOutline, Space};
use prism::serve::{Settings, readers};
use prism::session::{Encodings, Options, Said, Scan, Session};
use prism::tensor::{OpError, Param, Tensor, caught};
use prism::train::peers::Peers;
use prism::train::run::{Ended, RecomputeReport, StepReport, ValidationReport, Watch, begin, run};
use prism::train::settings::{Given, Recompute};
use prism::train::state::State;
use prism::volume::distance::components;
use prism::volume::intensity::Normalization;
use prism::volume::{Affine, Grid, Volume};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use viewer::{Viewer, array_of_example, nnia};

/// Does work with so many bytes more than are in use.
fn within<T>(bytes: u64, work: impl FnOnce() -> T) -> T {
    set_limit(used() + bytes);
    let done = work();
    set_limit(0);
    done
}

/// What was refused to work that is given nothing.
#[track_caller]
fn refused<T>(work: impl FnOnce() -> Result<T, OpError>) -> String {
    set_limit(1);
    let done = caught(work);
    set_limit(0);
    match done {
        Err(OpError::Memory(refused)) => refused.to_string(),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("nothing was refused"),
    }
}

fn values(shape: &[usize]) -> Tensor {
    Tensor::new(shape, vec![1.0; shape.iter().product()])
}

#[test]
fn what_grows_with_what_is_given_is_held_against_the_budget() {
    cases();
    steps_beside_cases();
    texts();
    headers();
    pickles();
    simulated();
    bodies();
    outlines();
    clicks();
    answers();
    begun_again();
    waiting();
    gradients();
    steps_of_training();
}

fn texts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.json");
    std::fs::write(&path, vec![b' '; 1 << 20]).unwrap();
    // It fits, and what it says may not.
    let said = within(12 << 20, || read_text(&path, "JSON")).unwrap_err();
    assert!(
        said.starts_with("out of memory: the content of a text file would take 16.8 MB"),
        "{said}"
    );
    assert_eq!(read_text(&path, "JSON").unwrap().len(), 1 << 20);
    std::fs::write(&path, vec![b' '; 20 << 20]).unwrap();
    let said = within(12 << 20, || read_text(&path, "JSON")).unwrap_err();
    assert!(said.starts_with("out of memory: a text file would take "), "{said}");
}

/// A list of one case of so many voxels along each axis, scan and mask of a byte for each voxel.
fn one_case(folder: &Path, edge: usize) -> String {
    let at = |name: &str| folder.join(name);
    let header = format!(
        "NRRD0004\ntype: uchar\ndimension: 3\nspace: RAS\nsizes: {edge} {edge} {edge}\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nencoding: raw\n\n"
    );
    let inside = |v: usize| (40..120).contains(&v);
    let voxels: Vec<u8> = (0..edge.pow(3))
        .map(|v| u8::from([v / edge / edge, v / edge % edge, v % edge].into_iter().all(inside)))
        .collect();
    for name in ["image.nrrd", "label.nrrd"] {
        std::fs::write(at(name), [header.as_bytes(), &voxels].concat()).unwrap();
    }
    std::fs::write(at("one.csv"), "image,label\nimage.nrrd,label.nrrd\n").unwrap();
    at("one.csv").display().to_string()
}

/// Cases that a training decoded are held against the budget, up to a quarter of it, and given up
/// for what does not fit beside them.
fn cases() {
    const EDGE: usize = 160;
    let folder = tempfile::tempdir().unwrap();
    let data = one_case(folder.path(), EDGE);
    let config = Config { fit: None, spacing: 2.0, ..tiny() };
    let held = |bytes: u64| {
        let before = used();
        let pools = Pools::open(&data, "", &TargetLabel::Any, None, None, None, 0).unwrap();
        within(bytes, || {
            drop(pools.train.draw(&config, &Augmentation::default(), 0, 0, 0).unwrap());
        });
        let held = used() - before;
        drop(pools);
        assert_eq!(used(), before);
        held
    };
    // Scan and mask, of a byte for each voxel.
    assert_eq!(held(64 << 20), 2 * EDGE.pow(3) as u64);
    assert_eq!(held(28 << 20), 0);
    let before = used();
    let pools = Pools::open(&data, "", &TargetLabel::Any, None, None, None, 0).unwrap();
    let draw = || pools.train.draw(&config, &Augmentation::default(), 0, 0, 0).unwrap().image;
    let drawn = within(64 << 20, draw);
    assert!(used() > before);
    // It is not given up for what would not fit without it either, be that more than the budget or
    // not.
    let other = Charge::of::<u8>("a test", 16 << 20).unwrap();
    let held = used();
    for bytes in [1 << 40, 14 << 20] {
        within(4 << 20, || Charge::of::<u8>("a test", bytes)).unwrap_err();
        assert_eq!(used(), held);
    }
    drop(other);
    drop(within(4 << 20, || Charge::of::<u8>("a test", 6 << 20)).unwrap());
    assert_eq!(used(), before);
    // It is read again.
    assert!(draw() == drawn);
}

/// Leaves a little more of the budget after the first step than a step takes without the case that
/// is kept, if one of so many bytes is.
struct Tight {
    device: Device,
    case: u64,
}

impl Watch for Tight {
    fn step(&mut self, report: &StepReport, _: usize) {
        if report.step == 1 && self.case > 0 {
            // Working memory is there still, and has to be asked for anew.
            set_limit(used() - self.case / 2);
            self.device.cpu().trim();
        }
    }
    fn case(&mut self, _: usize, _: usize) {}
    fn validation(&mut self, _: &ValidationReport) {}
}

/// A case that is kept, and not in use, is given up for a step that does not fit beside it, and
/// what is learned is the same.
fn steps_beside_cases() {
    const EDGE: usize = 256;
    const CASE: u64 = 2 * EDGE.pow(3) as u64;
    let folder = tempfile::tempdir().unwrap();
    let data = format!("{},synth:1", one_case(folder.path(), EDGE));
    let network = folder.path().join("network.json");
    let config = Config { fit: None, spacing: 2.0, ..tiny() };
    std::fs::write(&network, serde_json::to_string(&config).unwrap()).unwrap();
    // The first step learns from the case, the second does not: samples are prepared while steps
    // run, and a case that one is cut from stays.
    let pools = Pools::open(&data, "", &TargetLabel::Any, None, None, None, 0).unwrap();
    let synthetic = |seed: u64, step: u64| {
        let sample = pools.train.draw(&config, &Augmentation::default(), seed, step, 0).unwrap();
        sample.name.starts_with("synth:")
    };
    let seed = (0..).find(|&seed| synthetic(seed, 1) && !synthetic(seed, 0)).unwrap();
    drop(pools);
    let learned = |name: &str, case: u64| {
        let out = folder.path().join(name);
        let given = Given {
            model: Some(network.display().to_string()),
            data: Some(data.clone()),
            seed: Some(seed),
            out: Some(out.clone()),
            epochs: Some(1),
            steps: Some(2),
            batch: Some(1),
            iterations: Some(2),
            points_max: Some(5),
            scribbles: Some(0.0),
            validation_cases: Some(0),
            recompute: Some(Recompute::Always),
            ..Given::default()
        };
        let s = given.settings();
        let pools = Pools::open(&s.data, &s.shares, &s.target, None, None, None, s.seed).unwrap();
        let (device, never) = (Device::open("cpu", 1).unwrap(), AtomicBool::new(false));
        let mut watch = Tight { device: device.clone(), case };
        // More than it needs, whatever the machine has.
        set_limit(1 << 40);
        let ended = run(&device, begin(s).unwrap(), &pools, &Peers::alone(), &never, &mut watch);
        set_limit(0);
        assert_eq!(ended, Ok(Ended::Finished), "{name}");
        assert!(pools.train.skipped().is_empty(), "{name}");
        let held = used();
        drop(pools);
        (std::fs::read(out.join("last.safetensors")).unwrap(), held - used())
    };
    let (expected, kept) = learned("ample", 0);
    assert_eq!(kept, CASE);
    let (weights, kept) = learned("tight", CASE);
    assert_eq!(kept, 0, "nothing was given up");
    assert!(weights == expected, "what was learned is another");
}

/// What a file says of its tensors is taken apart as texts are.
fn headers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("last.state.safetensors");
    let length = 1u64 << 20;
    let header = [&b"{}"[..], &vec![b' '; length as usize - 2]].concat();
    std::fs::write(&path, [&length.to_le_bytes()[..], &header].concat()).unwrap();
    let said = || State::open(&path).err().unwrap();
    let refused = within(12 << 20, said);
    let words = "out of memory: the state of a training would take 16.8 MB";
    assert!(refused.contains(words), "{refused}");
    assert!(said().contains("not the state of a training run"), "{}", said());
}

/// What a checkpoint's program would make is counted before the program is run.
fn pickles() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pth");
    // A million objects; and a text of 64 KiB that is copied a thousand times.
    let objects = vec![b'N'; 1 << 20];
    let text = [&b"X\0\0\x01\0"[..], &vec![b'k'; 1 << 16], b"\x85q\0"].concat();
    let copies = [text, b"h\0".repeat(1000)].concat();
    for program in [objects, copies] {
        std::fs::write(&path, [&b"\x80\x02"[..], &program, b"."].concat()).unwrap();
        let said = within(60 << 20, || checkpoint::read(&path)).err().unwrap().to_string();
        let words = "a.pth: out of memory: what a checkpoint's pickles describe would take ";
        assert!(said.contains(words), "{said}");
    }
    let small = here("tests/data/checkpoint.pth.tar");
    assert!(within(60 << 20, || checkpoint::read(&small)).is_ok());
}

/// What a simulated user makes of a mask is counted too, and a picture.
fn simulated() {
    const PLANE: [usize; 3] = [1000, 1000, 1];
    let region = vec![1u8; 1_000_000];
    let said = |bytes: u64, work: &dyn Fn()| match within(bytes, || {
        caught(|| {
            work();
            Ok(())
        })
    }) {
        Err(OpError::Memory(refused)) => refused.to_string(),
        other => panic!("{other:?}"),
    };
    for kind in [Kind::Centreline, Kind::Line, Kind::Contour] {
        // Room for each list of bytes, for none of floats or of indices.
        let drawn = || drop(scribble::draw(&mut generator(0, &[]), &region, PLANE, kind));
        let said = said(3 << 20, &drawn);
        let words = ["a scribble's slice would take", "the pixels of a line would take"];
        assert!(words.iter().any(|w| said.contains(w)), "{said}");
    }
    let parts = said(8 << 20, &|| drop(components(&region, PLANE)));
    assert!(parts.contains("the parts of a mask would take 16.0 MB"), "{parts}");
    let wide = said(8 << 20, &|| drop(Picture::new(1 << 40, 1 << 40, [0; 3])));
    assert!(wide.contains("a picture would take"), "{wide}");
}

/// What clients send is taken apart as texts are, whatever their protocol.
fn bodies() {
    let grid = Grid { size: [4; 3], affine: Affine::from_spacing([1.0; 3]) };
    let long = |end: &str| [&b" ".repeat(1 << 20)[..], end.as_bytes()].concat();
    let own = long("{\"points\":[{\"at\":[1,2,3]}]}");
    let buffer = long("{\"shape\":[4,4,4],\"dtype\":\"uint8\"}");
    let params = [&b"params="[..], &long("{}")[..]].concat();
    let all = || {
        [
            readers::interaction(&own, &grid).map(drop),
            readers::buffer(&buffer, 1000).map(drop),
            readers::asked(b"", &params, grid.size).map(drop),
        ]
    };
    for said in within(12 << 20, all) {
        let said = said.unwrap_err();
        assert!(
            said.starts_with("out of memory: the content of a request would take 16.8 MB"),
            "{said}"
        );
    }
    all().into_iter().for_each(Result::unwrap);
}

/// Four corners are many voxels, and no fault of the user who draws them.
fn outlines() {
    let grid = Grid { size: [2000, 2000, 1], affine: Affine::from_spacing([1.0; 3]) };
    let corners = [[0.0, 0.0], [0.0, 1999.0], [1999.0, 1999.0], [1999.0, 0.0]];
    let outline = RawOutline(corners.map(|[i, j]| [i, j, 0.0]).to_vec());
    let add = || Prompts::default().add_lasso(&grid, &outline, Space::Ijk);
    let error = within(12 << 20, add).unwrap_err();
    let words = "out of memory: points of a drawn prompt would take";
    assert!(matches!(error, PromptError::Memory(_)), "{error}");
    assert!(error.to_string().starts_with(words), "{error}");
}

fn clicks() {
    let model = tiny_model(tiny(), 1);
    let image = Volume::read(&common::here("tests/data/odd/m17_oblique.nii.gz"), None).unwrap();
    let image = Arc::new(image);
    let normalization = Normalization { clip: [-1000.0, 400.0], mean: -300.0, sd: 350.0 };
    let said = |count: usize| {
        let points = (0..count).map(|n| ([20 + n % 10, 18 + n / 10 % 10, 12], true));
        Prompts { points: points.collect(), ..Default::default() }
    };
    for released in [false, true] {
        let options = Options { spacing: Some(1.0), released, ..Default::default() };
        let scan = Arc::new(Scan::new(&model, image.clone(), normalization, options));
        let mut session = Session::new(&scan);
        session.interact(&said(50)).unwrap();
        // The same voxels, many times.
        let many = said(2_000_000);
        let error = within(20 << 20, || session.interact(&many).map(|_| ())).unwrap_err();
        let (error, words) = (error.to_string(), "out of memory: the prompts of the object");
        assert!(error.starts_with(words), "{error}");
        assert_eq!(session.depth(), (1, 0));
        session.interact(&said(60)).unwrap();
    }
    let s = model.config().patch;
    let features = model.encode(&values(&[s; 3]), &mut Observer::none()).unwrap();
    let history = prompt_maps(model.device(), s, &[]).on(model.device()).unwrap();
    let mask = vec![1.0; s * s * s];
    let refine = || model.refine(&features, &mask, &history, &mut Observer::none());
    refine().unwrap();
    let said = refused(refine);
    assert!(said.starts_with("out of memory: a mask would take 131.1 kB"), "{said}");
    refine().unwrap();
}

/// Answers, their history and what was said are charged while they are held, and encoded patches go
/// before one is refused.
fn answers() {
    const TILE: u64 = 16 << 10;
    let model = tiny_model(tiny(), 1);
    let image = Volume::read(&common::here("tests/data/odd/m17_oblique.nii.gz"), None).unwrap();
    let size = image.grid.size;
    let normalization = Normalization { clip: [-1000.0, 400.0], mean: -300.0, sd: 350.0 };
    let options = Options { spacing: Some(1.0), ..Default::default() };
    let scan = Arc::new(Scan::new(&model, Arc::new(image), normalization, options));
    let mut session = Session::new(&scan);
    let whole =
        Prompts { dense: Some(Dense::Mask(vec![1; size.iter().product()])), ..Default::default() };
    let click = Prompts { points: vec![([20, 18, 12], false)], ..Default::default() };
    let both = |session: &mut Session| {
        session.interact(&whole).unwrap();
        session.interact(&click).unwrap();
    };
    // What the network works with is there afterwards.
    both(&mut session);
    session.reset();
    let before = used();
    session.interact(&whole).unwrap();
    let first = session.prediction().unwrap().clone();
    session.interact(&click).unwrap();
    let second = session.prediction().unwrap().clone();
    let tiles = first.field.bytes() + second.field.bytes_beyond(Some(&first.field));
    let logits = first.logits.len() * 4 + second.logits.len() * 4;
    let candidates = first.candidates.iter().chain(&second.candidates);
    let bits: usize = candidates.map(|c| c.bits.len()).sum();
    let held = used() - before;
    assert!(bits > 0 && held >= (tiles + logits + bits) as u64, "{held} bytes");
    drop((first, second));
    let depth = session.depth();
    let (mask, patches) = (session.mask(), scan.bytes());
    session.undo();
    session.reset();
    assert_eq!(used(), before);
    // So is what was said: here of each voxel what the answer says already.
    session.interact(&whole).unwrap();
    let unsaid = used();
    let [ni, nj, nk] = size;
    let each = (0..ni * nj * nk).map(|at| ([at / nk / nj, at / nk % nj, at % nk], true));
    let all = Prompts { points: each.collect(), ..Default::default() };
    session.interact(&all).unwrap();
    assert!(used() - unsaid >= (ni * nj * nk * size_of::<Said>()) as u64);
    session.reset();
    assert_eq!(used(), before);
    // With the patches there is less left than an interaction has to find at least, 8 MiB.
    model.device().cpu().trim();
    assert!(patches > 0);
    set_limit(used() - patches as u64 + (8 << 20) + 32 * TILE);
    let done = session.interact(&whole).map(|_| ());
    set_limit(0);
    done.unwrap();
    assert!(scan.bytes() < patches);
    session.interact(&click).unwrap();
    assert_eq!((session.depth(), session.mask()), (depth, mask));
    // Where nothing can go, the session stays as it was.
    set_limit(1);
    let error = session.interact(&whole).map(|_| ()).unwrap_err().to_string();
    set_limit(0);
    assert!(error.starts_with("out of memory"), "{error}");
    assert_eq!(session.depth(), depth);
}

/// Memory that is refused in the middle of an interaction: what other work holds comes back before
/// encoded patches go, and what is done again is not told again.
fn begun_again() {
    // More than an interaction has to find at least, 8 MiB, and more than it works with.
    const ROOM: u64 = 32 << 20;
    let model = tiny_model(tiny(), 1);
    let image = Volume::read(&common::here("tests/data/odd/m17_oblique.nii.gz"), None).unwrap();
    let image = Arc::new(image);
    let normalization = Normalization { clip: [-1000.0, 400.0], mean: -300.0, sd: 350.0 };
    let encodings = Arc::new(Encodings::new(1 << 30));
    let click = Prompts { points: vec![([20, 18, 12], true)], ..Default::default() };
    // Patches of other scans, and last of all those that the session looks at.
    let (mut sessions, mut held) = (vec![], 0);
    while held < 5 * ROOM || sessions.len() < 4 {
        let spacing = Some(1.0 + sessions.len() as f64 / 64.0);
        let options = Options { spacing, ..Default::default() };
        let image = image.clone();
        let scan = Scan::sharing(&model, image, normalization, options, &encodings);
        let mut session = Session::new(&Arc::new(scan));
        session.interact(&click).unwrap();
        held += session.scan().bytes() as u64;
        sessions.push(session);
    }
    let session = sessions.last_mut().unwrap();
    session.reset();
    let expected = account(session, &click, |_| {});
    let mask = session.mask();

    // Another's work gives back what it held: nothing else goes.
    session.reset();
    let (mut ops, mut waits) = (0, 0);
    let mut pace = |part: Part<'_>| {
        match part {
            Part::Alone => {
                waits += 1;
                set_limit(0);
            }
            _ => ops += 1,
        }
        if ops == 3 && waits == 0 {
            set_limit(1);
        }
        true
    };
    let done = session.interact_observed(&click, &mut Observer::paced(&mut pace)).map(|_| ());
    set_limit(0);
    done.unwrap();
    assert_eq!((waits, encodings.dropped()), (1, 0));
    assert!(session.mask() == mask);

    // Where there is no other work, half of the patches go.
    session.reset();
    let at = expected.len() / 2;
    let mut told = account(session, &click, |calls| {
        if calls == at {
            model.device().cpu().trim();
            set_limit(used() - held / 2 + ROOM);
        }
    });
    set_limit(0);
    assert!(encodings.dropped() > 0 && session.mask() == mask);
    assert!(told.len() > expected.len());
    told.dedup();
    assert_eq!(told, expected);
}

/// Prompts that a client has not asked a prediction of are counted while they wait.
fn waiting() {
    const MANY: u64 = 10;
    let server = started(Settings::default());
    let (size, spacing, values, _) = array_of_example();
    let mut viewer = Viewer::new(server.address);
    viewer.open(size, spacing, &values);
    // Where first clicks are looked at from furthest off is encoded by itself.
    let is_encoded =
        || get(server.address, "/metrics").text().contains("prism_encodings_total 1\n");
    for tries in 0.. {
        if is_encoded() {
            break;
        }
        assert!(tries < 6000, "nothing is encoded");
        std::thread::sleep(Duration::from_millis(20));
    }
    let meta = json!({
        "include_interaction": true, "run_prediction": false,
        "interaction_bbox": [[0, 10], [0, 100], [0, 100]],
    });
    let painted = nnia("uint8", 1, &[10, 100, 100], &[1; 100_000]);
    for _ in 0..MANY {
        let reply = viewer.send("/add_scribble_interaction", &meta, &painted);
        assert_eq!(viewer.take(reply), (false, false));
    }
    let each = 100_000 * size_of::<([usize; 3], bool)>() as u64;
    // What else the server holds is at most given back meanwhile.
    let held = used();
    (0..MANY).for_each(|_| assert_eq!(viewer.undo(), (true, false)));
    for tries in 0.. {
        if used() + (MANY - 1) * each < held {
            break;
        }
        assert!(tries < 6000, "{held} bytes, and {} without the prompts", used());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What an observer is told of an interaction, whom `each` is told the number of calls.
fn account(
    session: &mut Session,
    said: &Prompts,
    mut each: impl FnMut(usize),
) -> Vec<(usize, String)> {
    let mut told = vec![];
    let mut step = |done: usize, name: &str| {
        told.push((done, name.to_string()));
        each(told.len());
        true
    };
    session.interact_observed(said, &mut Observer::steps(&mut step)).unwrap();
    told
}

fn gradients() {
    let device = Device::open("cpu", 1).unwrap();
    let expected = "out of memory: a gradient would take 80.0 kB";
    let dy = values(&[1, 4]);
    let said = refused(|| narrow_gradient(&device, &dy, &[5000, 4], 7));
    assert!(said.starts_with(expected), "{said}");
    // A parameter that is repeated over rows, and one of which rows are taken.
    let repeated = Param::new(values(&[20_000]), 0);
    let tape = Tape::on(&device);
    let x = tape.leaf(values(&[2, 20_000]));
    let y = tape.add_param(&x, &repeated).unwrap();
    let said = way_back(tape, &y);
    assert!(said.starts_with(expected), "{said}");
    let table = Param::new(values(&[5000, 4]), 0);
    let tape = Tape::on(&device);
    let y = tape.embed(values(&[2, 4]), vec![(&table, 3), (&table, 9)]).unwrap();
    let said = way_back(tape, &y);
    assert!(said.starts_with(expected), "{said}");
}

/// What is refused on the way back from a value.
#[track_caller]
fn way_back(tape: Tape<'_>, y: &Var) -> String {
    let (seed, mut gradients) = (values(y.shape()), ParamGrads::new(1));
    refused(|| tape.backward(vec![(y, seed)], &mut gradients))
}

/// Remembers what a run chose, and leaves little of the budget after the first step.
#[derive(Default)]
struct Shortening {
    told: Vec<RecomputeReport>,
}

impl Watch for Shortening {
    fn step(&mut self, report: &StepReport, _: usize) {
        if let (1, Some(told)) = (report.step, self.told.first()) {
            // What the reader holds while it prepares the next step's sample is not counted.
            let mut least = used();
            for _ in 0..50 {
                std::thread::sleep(Duration::from_millis(20));
                least = least.min(used());
            }
            set_limit(least + told.needed / 4);
        }
    }
    fn case(&mut self, _: usize, _: usize) {}
    fn validation(&mut self, _: &ValidationReport) {}
    fn recompute(&mut self, report: &RecomputeReport) {
        self.told.push(report.clone());
    }
}

/// A step that keeps its iterations and is refused memory for that is done again without keeping
/// them, and learns the same.
fn steps_of_training() {
    let folder = tempfile::tempdir().unwrap();
    let network = folder.path().join("network.json");
    std::fs::write(&network, serde_json::to_string(&tiny()).unwrap()).unwrap();
    let learned = |name: &str, recompute: Recompute| {
        let out = folder.path().join(name);
        let given = Given {
            model: Some(network.display().to_string()),
            out: Some(out.clone()),
            epochs: Some(1),
            steps: Some(2),
            batch: Some(1),
            iterations: Some(16),
            points_max: Some(5),
            scribbles: Some(0.0),
            validation_cases: Some(0),
            recompute: Some(recompute),
            ..Given::default()
        };
        let s = given.settings();
        let pools = Pools::open(&s.data, &s.shares, &s.target, None, None, None, s.seed).unwrap();
        let (device, never) = (Device::open("cpu", 1).unwrap(), AtomicBool::new(false));
        let (state, mut watch) = (begin(s).unwrap(), Shortening::default());
        let ended = run(&device, state, &pools, &Peers::alone(), &never, &mut watch);
        set_limit(0);
        assert_eq!(ended, Ok(Ended::Finished), "{name}");
        (std::fs::read(out.join("last.safetensors")).unwrap(), watch.told)
    };
    let (expected, told) = learned("kept", Recompute::Never);
    assert!(told.is_empty(), "{told:?}");
    let choices = |told: &[RecomputeReport]| -> Vec<(usize, bool)> {
        told.iter().map(|t| (t.step, t.recompute)).collect()
    };
    // More than it needs, whatever the machine has. A reader that was busy for all that time leaves
    // too much to the second step: that run is tried again.
    let auto = (0..5).map(|n| {
        set_limit(1 << 40);
        learned(&format!("auto {n}"), Recompute::Auto)
    });
    let is_refused = |(_, told): &(Vec<u8>, Vec<RecomputeReport>)| choices(told).len() > 1;
    let (weights, told) = auto.into_iter().find(is_refused).expect("no second step was refused");
    let choices = choices(&told);
    assert_eq!(choices, [(1, false), (2, true)], "{told:?}");
    assert!(told[1].why.contains("out of memory: "), "{told:?}");
    // Half of what was left, from which nothing is taken for decoded cases: they would be given up.
    let available = told[0].available.unwrap();
    assert!(2 * available > (1 << 40) - (4 << 30), "{told:?}");
    assert!(weights == expected, "what was learned is another");
}
