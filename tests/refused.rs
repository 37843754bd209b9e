//! Memory that grows with what the library is given is held against the budget: texts, outlines,
//! clicks, masks, gradients. A process of its own, which has one budget.

#[path = "common/mod.rs"]
mod common;

use common::{tiny, tiny_model};
use prism::autograd::{ParamGrads, Tape, Var};
use prism::device::Device;
use prism::input::read_text;
use prism::memory::{set_limit, used};
use prism::model::{Observer, prompt_maps};
use prism::ops::rows::narrow_gradient;
use prism::prompt::{Dense, PromptError, Prompts, RawOutline, Space};
use prism::session::{Options, Scan, Session};
use prism::tensor::{OpError, Param, Tensor, caught};
use prism::volume::intensity::Normalization;
use prism::volume::{Affine, Grid, Volume};
use std::sync::Arc;

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
    texts();
    outlines();
    clicks();
    answers();
    gradients();
}

fn texts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.json");
    std::fs::write(&path, vec![b' '; 1 << 20]).unwrap();
    // It fits, and what it says may not.
    let said = within(12 << 20, || read_text(&path, "JSON")).unwrap_err();
    assert!(said.starts_with("out of memory: what a text file says would take 16.8 MB"), "{said}");
    assert_eq!(read_text(&path, "JSON").unwrap().len(), 1 << 20);
    std::fs::write(&path, vec![b' '; 20 << 20]).unwrap();
    let said = within(12 << 20, || read_text(&path, "JSON")).unwrap_err();
    assert!(said.starts_with("out of memory: a text file would take "), "{said}");
}

/// Four corners are many voxels, and no fault of whoever draws them.
fn outlines() {
    let grid = Grid { size: [2000, 2000, 1], affine: Affine::from_spacing([1.0; 3]) };
    let corners = [[0.0, 0.0], [0.0, 1999.0], [1999.0, 1999.0], [1999.0, 0.0]];
    let outline = RawOutline(corners.map(|[i, j]| [i, j, 0.0]).to_vec());
    let add = || Prompts::default().add_lasso(&grid, &outline, Space::Ijk);
    let error = within(12 << 20, add).unwrap_err();
    let words = "out of memory: points of what was drawn would take";
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
        let (error, words) = (error.to_string(), "out of memory: what was said of the object");
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

/// Tiles of answers and of their history are charged while they are held, and encoded patches go
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
    both(&mut session);
    let tiles: usize = size.iter().map(|n| n.div_ceil(16)).product();
    let held = used() - before;
    assert!(
        held >= tiles as u64 * TILE && held.is_multiple_of(TILE),
        "{held} bytes for {tiles} tiles"
    );
    let depth = session.depth();
    let (mask, patches) = (session.mask(), scan.bytes());
    session.undo();
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
