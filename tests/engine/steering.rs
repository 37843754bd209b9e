//! The session's contract, as properties on a real scan: with the small model, with networks of
//! hashed weights, through C.

use crate::common;

use common::{here, tiny, tiny_model};
use prism::device::Device;
use prism::model::{Config, Model, Observer, Part, PatchPrompts, Weights, prompt_maps};
use prism::prompt::{Dense, Prompts, RawBox, RawOutline, Space};
use prism::session::{
    Ahead, Encodings, MASK_LOGIT, Note, Options, Scan, Session, SessionError, normalization,
    places, working_spacing,
};
use prism::tensor::Tensor;
use prism::volume::Volume;
use prism::volume::patch::{Beyond, Extent, Patch};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use std::sync::mpsc::channel;
use std::sync::{Arc, OnceLock};

/// The nodule of the example scan.
const BOX: [usize; 6] = [69, 68, 13, 93, 94, 16];
const ON: [usize; 3] = [80, 80, 14];

fn image() -> Arc<Volume> {
    static IMAGE: OnceLock<Arc<Volume>> = OnceLock::new();
    IMAGE
        .get_or_init(|| {
            Arc::new(Volume::read(&here("examples/data/lung1_image.nii.gz"), None).unwrap())
        })
        .clone()
}

fn small() -> Arc<Model> {
    static SMALL: OnceLock<Arc<Model>> = OnceLock::new();
    let load = || {
        let device = Device::open("cpu", 2).unwrap();
        Arc::new(
            Model::new(&device, &Weights::open(&here("models/small.safetensors")).unwrap())
                .unwrap(),
        )
    };
    SMALL.get_or_init(load).clone()
}

/// The small model, and networks whose answers mean nothing: one that fits its patch to the object,
/// one of a fixed spacing, one whose clicks are balls to the refiner.
fn models() -> Vec<(&'static str, Arc<Model>)> {
    let fitting = Config { fit: Some(1.75), click_radius: 1.5, ..tiny() };
    vec![("small", small()), ("fitting", tiny_model(fitting, 2)), ("fixed", tiny_model(tiny(), 2))]
}

fn open(model: &Arc<Model>) -> Session {
    let image = image();
    let n = normalization(&*image, model.config().intensity);
    Session::new(&Arc::new(Scan::new(model, image, n, Options::default())))
}

fn place(v: [usize; 3]) -> usize {
    let [_, nj, nk] = image().grid.size;
    (v[0] * nj + v[1]) * nk + v[2]
}

fn points(list: &[([usize; 3], bool)]) -> Prompts {
    Prompts { points: list.to_vec(), ..Default::default() }
}

/// A click near the nodule, or anywhere on the scan.
fn some_click(rng: &mut StdRng) -> ([usize; 3], bool) {
    let size = image().grid.size;
    let voxel = match rng.random_bool(0.7) {
        true => [rng.random_range(62..100), rng.random_range(62..100), rng.random_range(11..18)],
        false => std::array::from_fn(|a| rng.random_range(0..size[a])),
    };
    (voxel, rng.random())
}

#[test]
fn every_click_holds_until_it_is_contradicted() {
    for (name, model) in models() {
        let mut rng = StdRng::seed_from_u64(17);
        for start in 0..3 {
            let mut s = open(&model);
            let mut said: Vec<([usize; 3], bool)> = vec![];
            match start {
                0 => drop(
                    s.interact(&Prompts { bounds: Some(BOX), ..Default::default() })
                        .unwrap()
                        .clone(),
                ),
                1 => {
                    said.push((ON, true));
                    s.interact(&points(&said)).unwrap();
                }
                _ => {}
            }
            for turn in 0..6 {
                // Some clicks contradict earlier ones.
                let mut fresh = vec![some_click(&mut rng)];
                if turn == 3 && !said.is_empty() {
                    let (voxel, positive) = said[0];
                    fresh.push((voxel, !positive));
                }
                s.interact(&points(&fresh)).unwrap_or_else(|e| panic!("{name}: {e}"));
                said.retain(|(v, _)| fresh.iter().all(|(f, _)| f != v));
                said.extend(fresh);
                let mask = s.mask();
                for (v, positive) in &said {
                    assert_eq!(
                        mask[place(*v)] != 0,
                        *positive,
                        "{name}, start {start}, turn {turn}: {v:?}"
                    );
                }
                assert_eq!(s.said().len(), said.len());
                assert!(s.probability().iter().all(|p| (0.0..=1.0).contains(p)), "{name}");
            }
        }
    }
}

#[test]
fn every_voxel_of_a_scribble_holds() {
    for (name, model) in models() {
        let mut s = open(&model);
        s.interact(&Prompts { bounds: Some(BOX), ..Default::default() }).unwrap();
        // Two strokes side by side, of either kind, on a sagittal and a coronal slice.
        let on = (0..14).map(|n| ([78, 70 + n, 14 + n % 2], true));
        let off = (0..14).map(|n| ([79, 70 + n, 14 + n % 2], false));
        let across = (0..10).map(|n| ([84 + n / 2, 90, 12 + n % 4], true));
        let all: Vec<_> = on.chain(off).chain(across).collect();
        s.interact(&points(&all)).unwrap();
        let mask = s.mask();
        let wrong = all.iter().filter(|(v, positive)| (mask[place(*v)] != 0) != *positive).count();
        assert_eq!(wrong, 0, "{name}");
    }
}

#[test]
fn a_click_that_agrees_changes_nothing() {
    for (name, model) in models() {
        let mut s = open(&model);
        s.interact(&Prompts { points: vec![(ON, true)], bounds: Some(BOX), ..Default::default() })
            .unwrap();
        let before = s.probability();
        for click in [(ON, true), ([20, 20, 3], false)] {
            let p = s.interact(&points(&[click])).unwrap().clone();
            assert_eq!((p.changed, p.looks), (0, 0), "{name}");
            assert!(p.notes.contains(&Note::Agreed), "{name}");
            assert!(s.probability() == before, "{name}");
        }
        // The same click again, after one that changed something.
        s.interact(&points(&[([76, 76, 14], s.mask()[place([76, 76, 14])] == 0)])).unwrap();
        let said = *s.said().last().unwrap();
        let p = s.interact(&points(&[(said.voxel, said.positive)])).unwrap();
        assert_eq!((p.changed, p.looks), (0, 0), "{name}");
    }
}

#[test]
fn clicks_that_only_deny_give_an_empty_answer_and_say_so() {
    for (name, model) in models() {
        let mut s = open(&model);
        let p = s.interact(&points(&[([30, 30, 10], false), ([31, 30, 10], false)])).unwrap();
        assert_eq!(
            (p.field.voxels(), &p.notes[..], p.score),
            (0, &[Note::OnlyDenied][..], None),
            "{name}"
        );
        // A later answer is like any other.
        s.interact(&points(&[(ON, true)])).unwrap();
        let mask = s.mask();
        assert!(mask[place(ON)] == 1 && mask[place([30, 30, 10])] == 0, "{name}");
    }
}

/// A long mask along i, on the scan's own grid.
fn bar() -> Vec<u8> {
    let mut mask = vec![0u8; image().grid.voxels()];
    for i in 20..140 {
        (0..10).for_each(|j| (0..4).for_each(|k| mask[place([i, 70 + j, 10 + k])] = 1));
    }
    mask
}

#[test]
fn a_mask_is_the_answer_until_a_click_disagrees_and_then_changes_near_it() {
    for (name, model) in models() {
        let mut s = open(&model);
        let given = bar();
        let dense =
            |m: &Vec<u8>| Prompts { dense: Some(Dense::Mask(m.clone())), ..Default::default() };
        s.interact(&dense(&given)).unwrap();
        assert!(s.mask() == given, "{name}");
        s.interact(&points(&[([100, 74, 11], true), ([100, 100, 11], false)])).unwrap();
        assert!(s.mask() == given, "{name}");
        // Together they are the same.
        let mut both = open(&model);
        both.interact(&Prompts { points: vec![([100, 74, 11], true)], ..dense(&given) }).unwrap();
        assert!(both.mask() == given, "{name}");

        s.interact(&points(&[([22, 75, 12], false)])).unwrap();
        let after = s.mask();
        assert!(after[place([22, 75, 12])] == 0 && after != given, "{name}");
        let [_, nj, nk] = image().grid.size;
        let touched = (0..given.len()).filter(|v| given[*v] != after[*v]);
        let farthest = touched.map(|v| (v / nk / nj).abs_diff(22)).max().unwrap_or(0);
        assert!(farthest < 60, "{name}: voxels {farthest} away changed");
        // A later mask is the answer again, and what it contradicts is forgotten.
        s.interact(&dense(&given)).unwrap();
        assert!(s.mask() == given, "{name}");
    }
}

#[test]
fn an_empty_mask_beside_a_prompt_is_no_mask() {
    let model = small();
    let answer = |dense: Option<Dense>| {
        let mut s = open(&model);
        let p = s
            .interact(&Prompts {
                points: vec![(ON, true)],
                bounds: Some(BOX),
                dense,
                ..Default::default()
            })
            .unwrap()
            .clone();
        (s.mask(), p.notes.contains(&Note::EmptyMask))
    };
    let (plain, said) = answer(None);
    assert!(!said);
    let (with, said) = answer(Some(Dense::Mask(vec![0; image().grid.voxels()])));
    assert!(said && with == plain);
}

#[test]
fn the_order_of_a_click_and_a_box_does_not_matter() {
    for (name, model) in models() {
        let boxed = || Prompts { bounds: Some(BOX), ..Default::default() };
        let mut together = open(&model);
        together.interact(&Prompts { points: vec![(ON, true)], ..boxed() }).unwrap();
        let mut after = open(&model);
        after.interact(&points(&[(ON, true)])).unwrap();
        after.interact(&boxed()).unwrap();
        // The answer to the click alone may already fill the box: then that is the answer.
        let fills = after.prediction().unwrap().notes.contains(&Note::Agreed)
            || after.prediction().unwrap().looks == 0;
        assert!(fills || together.mask() == after.mask(), "{name}");
    }
}

#[test]
fn other_objects_are_never_entered() {
    for (name, model) in models() {
        let mut others = vec![0u8; image().grid.voxels()];
        for i in 82..100 {
            (60..100)
                .for_each(|j| (0..image().grid.size[2]).for_each(|k| others[place([i, j, k])] = 1));
        }
        let mut s = open(&model);
        s.interact(&Prompts {
            bounds: Some(BOX),
            others: Some(others.clone()),
            ..Default::default()
        })
        .unwrap();
        s.interact(&points(&[([79, 80, 14], true)])).unwrap();
        let p = s.interact(&points(&[([90, 80, 14], true)])).unwrap();
        assert_eq!(p.notes.first(), Some(&Note::InOtherObject(1)), "{name}");
        assert!(s.mask().iter().zip(&others).all(|(m, o)| *m == 0 || *o == 0), "{name}");
        assert!(s.mask()[place([79, 80, 14])] == 1, "{name}");
    }
}

#[test]
fn undo_brings_back_the_bits() {
    for (name, model) in models() {
        let mut rng = StdRng::seed_from_u64(5);
        let mut s = open(&model);
        s.interact(&Prompts { bounds: Some(BOX), ..Default::default() }).unwrap();
        let bits = |s: &Session| s.probability().iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let mut seen = vec![bits(&s)];
        for _ in 0..4 {
            s.interact(&points(&[some_click(&mut rng)])).unwrap();
            seen.push(bits(&s));
        }
        for turn in (0..4).rev() {
            assert!(s.undo() && bits(&s) == seen[turn], "{name}, {turn}");
        }
        for later in &seen[1..] {
            assert!(s.redo() && bits(&s) == *later, "{name}");
        }
        // From the middle on, the same click gives the same answer: nothing of what was undone is
        // left.
        s.undo();
        let said = s.said().len();
        let mut fresh = open(&model);
        fresh.interact(&Prompts { bounds: Some(BOX), ..Default::default() }).unwrap();
        let list: Vec<_> = s.said().iter().map(|c| (c.voxel, c.positive)).collect();
        list.iter().for_each(|c| drop(fresh.interact(&points(&[*c])).unwrap().clone()));
        assert_eq!(fresh.said().len(), said);
        assert!(bits(&fresh) == bits(&s), "{name}");
    }
}

#[test]
fn an_object_is_followed_beyond_the_patch() {
    // A bright bar of 170 mm: a click in its middle is looked at from 14 to 448 mm.
    let size = [60, 60, 200];
    let inside = |i: usize, j: usize, k: usize| {
        i.abs_diff(30) < 9 && j.abs_diff(30) < 9 && k.abs_diff(100) < 85
    };
    let voxel = |at: usize| (at / 200 / 60, at / 200 % 60, at % 200);
    let mut rng = StdRng::seed_from_u64(3);
    let value = |at: usize, noise: f32| {
        let (i, j, k) = voxel(at);
        if inside(i, j, k) { 160.0 + noise } else { -60.0 + noise }
    };
    let data: Vec<f32> =
        (0..60 * 60 * 200).map(|at| value(at, rng.random_range(-12.0..12.0))).collect();
    let affine = prism::volume::Affine::from_spacing([1.0; 3]);
    let volume = Arc::new(
        Volume::new(prism::volume::Grid { size, affine }, data, image().description.clone())
            .unwrap(),
    );
    let model = small();
    let n = normalization(&*volume, model.config().intensity);
    let mut s = Session::new(&Arc::new(Scan::new(&model, volume, n, Options::default())));
    s.interact(&points(&[([30, 30, 100], true)])).unwrap();
    // Two more clicks, where it is missed at its ends: beyond what a patch of 64 mm showed.
    for k in [30, 170] {
        s.interact(&points(&[([30, 30, k], true)])).unwrap();
    }
    let mask = s.mask();
    let truth: Vec<u8> =
        (0..mask.len()).map(|at| u8::from(inside(voxel(at).0, voxel(at).1, voxel(at).2))).collect();
    let dice = prism::eval::metrics::dice(&truth, &mask);
    assert!(dice > 0.3, "Dice {dice}");
    let reached: Vec<usize> =
        (0..mask.len()).filter(|v| mask[*v] != 0).map(|at| voxel(at).2).collect();
    assert!(reached.iter().min() < Some(&35) && reached.iter().max() > Some(&165));
}

#[test]
fn a_flat_box_a_line_and_an_outline_find_the_object() {
    let label = Volume::read(&here("examples/data/lung1_label.nii.gz"), None).unwrap();
    let truth: Vec<u8> = label.values().iter().map(|v| u8::from(*v > 0.0)).collect();
    let grid = image().grid;
    let model = small();
    let dice = |prompts: &Prompts| {
        let mut s = open(&model);
        let p = s.interact(prompts).unwrap().clone();
        (prism::eval::metrics::dice(&truth, &s.mask()), p.notes.clone())
    };
    let (flat, notes) =
        dice(&Prompts { bounds: Some([69, 68, 14, 93, 94, 15]), ..Default::default() });
    assert!(flat > 0.6 && notes.contains(&Note::FlatBox), "flat box {flat}");
    let mut line = Prompts::default();
    line.add_line(&grid, RawBox([70.0, 80.0, 14.0, 92.0, 82.0, 14.0]), Space::Ijk).unwrap();
    let (line, _) = dice(&line);
    assert!(line > 0.6, "line {line}");
    let mut outline = Prompts::default();
    let corners = vec![
        [71.0, 71.0, 14.0],
        [90.0, 70.0, 14.0],
        [92.0, 90.0, 14.0],
        [80.0, 93.0, 14.0],
        [70.0, 88.0, 14.0],
    ];
    outline.add_lasso(&grid, &RawOutline(corners), Space::Ijk).unwrap();
    let (outline, _) = dice(&outline);
    assert!(outline > 0.6, "outline {outline}");
}

/// Released answers are, bit for bit, the result of calling the network as the paper does: one
/// patch, zeros beyond the scan, the prompts of an iteration, the answer before it as the dense
/// prompt, and all points so far for the refiner.
#[test]
fn released_sessions_are_the_network_alone() {
    let on = |list: &[([usize; 3], bool)]| points(list);
    let mut mask = vec![0u8; image().grid.voxels()];
    (74..88).for_each(|i| mask[place([i, 80, 14])] = 1);
    let iterations = [
        Prompts { bounds: Some(BOX), ..on(&[(ON, true)]) },
        on(&[([70, 70, 14], false), ([84, 84, 15], true)]),
        Prompts { dense: Some(Dense::Mask(mask.clone())), ..on(&[([76, 90, 13], false)]) },
        on(&[([90, 75, 14], true)]),
    ];
    for (name, model) in models() {
        let (image, config) = (image(), model.config());
        let grid = image.grid;
        let n = normalization(&*image, config.intensity);
        let options = Options { released: true, ..Default::default() };
        let mut s = Session::new(&Arc::new(Scan::new(&model, image.clone(), n, options)));

        let extent = Extent::of_box(BOX);
        let patch = Patch::place(
            &grid,
            config.patch,
            working_spacing(config, &grid, Some(&extent)),
            &extent,
        );
        let size = [config.patch; 3];
        let features = model
            .encode(
                &Tensor::new(size, patch.extract(&*image, &n, Beyond::Zero)),
                &mut Observer::none(),
            )
            .unwrap();
        let (mut dense, mut all) = (Tensor::new(size, vec![0.0; config.patch.pow(3)]), vec![]);
        for (at, prompts) in iterations.iter().enumerate() {
            let given: Vec<_> = prompts
                .points
                .iter()
                .map(|(v, on)| (patch.voxel(v.map(|c| c as f64)).unwrap(), *on))
                .collect();
            all.extend(given.clone());
            if prompts.dense.is_some() {
                let to_image = patch.from_image.inverse();
                let logit = |v: [f64; 3]| match to_image.apply(v).map(f64::round) {
                    p if (0..3).any(|a| p[a] < 0.0 || p[a] >= grid.size[a] as f64) => -MASK_LOGIT,
                    p => {
                        if mask[place(p.map(|c| c as usize))] != 0 {
                            MASK_LOGIT
                        } else {
                            -MASK_LOGIT
                        }
                    }
                };
                let edge = config.patch;
                let voxel =
                    |at: usize| [at / (edge * edge), at / edge % edge, at % edge].map(|v| v as f64);
                dense = Tensor::new(
                    size,
                    (0..edge.pow(3)).map(|at| logit(voxel(at))).collect::<Vec<f32>>(),
                );
            }
            let maps = prompt_maps(model.device(), config.patch, all.iter());
            let given = PatchPrompts { points: given, bounds: Some(patch.bounds(&extent)) };
            let answer =
                model.interact(&features, &given, &dense, &maps, &mut Observer::none()).unwrap();
            dense = answer.logits.value().reshape(size);
            let p = s.interact(prompts).unwrap().clone();
            let bits = |t: &Tensor| t.data().iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert!(bits(&p.logits) == bits(&dense), "{name}, iteration {}", at + 1);
            let mut pasted = vec![0u8; grid.voxels()];
            patch.paste(dense.data(), &grid, |at, logit| pasted[at] = u8::from(logit > 0.0));
            assert!(s.mask() == pasted, "{name}, iteration {}", at + 1);
        }
    }
}

/// A session without prompts, and what is encoded for it.
fn unsaid(options: Options) -> (Session, Arc<Encodings>) {
    let (image, model) = (image(), small());
    let n = normalization(&*image, model.config().intensity);
    let encodings = Arc::new(Encodings::new(options.memory));
    let scan = Scan::sharing(&model, image, n, options, &encodings);
    (Session::new(&Arc::new(scan)), encodings)
}

/// A session with a block as its mask, and what is encoded for it.
fn masked() -> (Session, Arc<Encodings>) {
    let (mut s, encodings) = unsaid(Options::default());
    assert!(s.ahead().is_none());
    let mut mask = vec![0; image().grid.voxels()];
    for (i, j) in (74..90).flat_map(|i| (74..90).map(move |j| (i, j))) {
        (12..16).for_each(|k| mask[place([i, j, k])] = 1);
    }
    s.interact(&Prompts { dense: Some(Dense::Mask(mask)), ..Default::default() }).unwrap();
    (s, encodings)
}

#[test]
fn what_is_encoded_ahead_is_found_and_changes_no_answer() {
    let click = points(&[(ON, false)]);
    let (mut plain, _) = masked();
    plain.interact(&click).unwrap();
    let bits = |s: &Session| s.probability().iter().map(|p| p.to_bits()).collect::<Vec<_>>();

    let (mut s, encodings) = masked();
    let former = s.ahead().unwrap();
    let ahead = s.ahead().unwrap();
    assert!(!former.serves() && !former.encode(&mut Observer::none()).unwrap());
    // Ending it loses nothing.
    let mut ops = 0;
    let mut ends = |_: Part<'_>| {
        ops += 1;
        ops < 9
    };
    assert!(ahead.encode(&mut Observer::paced(&mut ends)).is_err() && encodings.made() == 0);
    assert!(ahead.serves() && ahead.encode(&mut Observer::none()).unwrap());
    // What is kept is not encoded again.
    assert!(!ahead.encode(&mut Observer::none()).unwrap() && encodings.made() == 1);
    s.interact(&click).unwrap();
    assert!(encodings.made() == 1 && bits(&s) == bits(&plain));
    assert!(!ahead.serves() && !ahead.is_awaited());
    let next = s.ahead().unwrap();
    drop(s);
    assert!(!next.serves() && !next.encode(&mut Observer::none()).unwrap());

    // A click that comes meanwhile waits, if its observer can.
    let (mut s, encodings) = masked();
    let ahead = s.ahead().unwrap();
    let (begun, begins) = channel();
    let (go, goes) = channel();
    std::thread::scope(|scope| {
        // A thread that is told to go on is not left waiting by a failure.
        let (encoding, go) = (&ahead, go);
        scope.spawn(move || {
            let mut ops = 0;
            let mut held = |_: Part<'_>| {
                ops += 1;
                if ops == 9 {
                    begun.send(()).unwrap();
                    goes.recv().unwrap();
                }
                true
            };
            assert!(encoding.encode(&mut Observer::paced(&mut held)).unwrap());
        });
        begins.recv().unwrap();
        let mut waits = |part: Part<'_>| {
            if let Part::Elsewhere(is_over) = part {
                assert!(!is_over() && encoding.is_awaited());
                go.send(()).unwrap();
                while !is_over() {
                    std::thread::yield_now();
                }
            }
            true
        };
        s.interact_observed(&click, &mut Observer::paced(&mut waits)).unwrap();
    });
    assert!(ahead.is_awaited() && encodings.made() == 1 && bits(&s) == bits(&plain));
}

/// Where a first click is looked at.
fn looks(at: [usize; 3]) -> Vec<Patch> {
    let click = points(&[(at, true)]);
    places(&small(), &image().grid, &Options::default(), &click).unwrap()
}

#[test]
fn where_a_pointer_rests_is_encoded_for_a_click_beside_it() {
    let grids = |at: [usize; 3]| looks(at).iter().map(|patch| patch.grid).collect::<Vec<_>>();
    let [i, j, k] = ON;
    let near = [[i + 1, j, k], [i - 1, j, k], [i, j + 1, k], [i, j - 1, k]];
    let beside = near.into_iter().find(|at| grids(*at) == grids(ON)).unwrap();
    let (rests, click) = (points(&[(ON, true)]), points(&[(beside, true)]));
    let elsewhere = points(&[([30, 30, 5], true)]);
    let bits = |s: &Session| s.probability().iter().map(|p| p.to_bits()).collect::<Vec<_>>();
    let (mut plain, encodings) = unsaid(Options::default());
    plain.interact(&click).unwrap();
    let all = encodings.made();

    let (mut s, encodings) = unsaid(Options::default());
    let former = s.ahead_of(&elsewhere).unwrap();
    let ahead = s.ahead_of(&rests).unwrap();
    assert_eq!((former.len(), ahead.len()), (6, 6));
    // The place that was given last counts; what is already being encoded for it is not returned
    // twice.
    assert!(!former.iter().any(Ahead::serves));
    assert!(s.ahead_of(&click).unwrap().is_empty());
    let outside = s.ahead_of(&points(&[([9999, 0, 0], true)]));
    assert!(matches!(outside, Err(SessionError::Outside { .. })));
    assert!(matches!(s.ahead_of(&Prompts::default()), Err(SessionError::NoPrompt)));
    assert!(ahead.iter().all(|a| a.serves() && a.encode(&mut Observer::none()).unwrap()));
    assert_eq!(encodings.made(), 6);
    s.interact(&click).unwrap();
    // What remains is where the object may be according to each of them.
    assert!(encodings.made() == all && bits(&s) == bits(&plain));
    assert!(!ahead.iter().any(Ahead::serves));
    // An answer is corrected where it was looked at.
    assert!(s.ahead_of(&elsewhere).unwrap().is_empty());
    assert!(s.undo());
    assert_eq!(s.ahead_of(&elsewhere).unwrap().len(), 6);

    let (mut s, encodings) = unsaid(Options { released: true, ..Options::default() });
    let ahead = s.ahead_of(&click).unwrap();
    assert!(ahead.len() == 1 && ahead[0].encode(&mut Observer::none()).unwrap());
    s.interact(&click).unwrap();
    assert_eq!(encodings.made(), 1);
}

#[test]
fn a_first_click_finds_an_object_of_any_size() {
    let read = |name: &str| Volume::read(&here(name), None).unwrap();
    let (scan, label) =
        (read("examples/data/lung1_image.nii.gz"), read("examples/data/lung1_label.nii.gz"));
    let truth: Vec<bool> = label.values().iter().map(|v| *v > 0.0).collect();
    let model = small();
    // The same voxels as a lesion of 7, 20, 80 and 160 mm.
    for larger in [0.35, 1.0, 4.0, 8.0] {
        let mut grid = scan.grid;
        grid.affine.0.iter_mut().for_each(|row| row.iter_mut().for_each(|v| *v *= larger));
        let image = Volume::new(grid, scan.values().to_vec(), scan.description.clone()).unwrap();
        let n = normalization(&image, model.config().intensity);
        let scan = Scan::new(&model, Arc::new(image), n, Options::default());
        let mut s = Session::new(&Arc::new(scan));
        s.interact(&points(&[(ON, true)])).unwrap();
        let answer = s.mask();
        let (mut both, mut all) = (0, 0);
        for (is, should) in answer.iter().map(|v| *v != 0).zip(&truth) {
            both += usize::from(is && *should);
            all += usize::from(is) + usize::from(*should);
        }
        let dice = 2.0 * both as f64 / all as f64;
        assert!(dice >= 0.8, "{larger} times as large: {dice}");
    }
}

#[test]
fn what_nobody_asked_for_makes_room_first() {
    let none = &mut Observer::none();
    let (here, there) = ([20, 20, 2], [140, 140, 25]);
    let first = &looks(ON)[0];
    let (s, _) = unsaid(Options::default());
    s.scan().encoded(first, none).unwrap();
    let one = s.scan().bytes();

    let (mut s, encodings) = unsaid(Options { memory: 7 * one, ..Options::default() });
    let scan = s.scan().clone();
    let mut rest = |at: [usize; 3]| {
        let ahead = s.ahead_of(&points(&[(at, true)])).unwrap();
        ahead.iter().filter(|a| a.encode(&mut Observer::none()).unwrap()).count()
    };
    scan.encoded(first, none).unwrap();
    assert_eq!((rest(here), scan.bytes()), (6, 7 * one));
    // There is no more room: unused encodings are dropped, and used ones stay. The patch that shows
    // all of the scan serves here and there.
    assert_eq!((rest(there), scan.bytes()), (5, 7 * one));
    assert!(!scan.encoded(first, none).unwrap().1);
    assert_eq!((encodings.made(), encodings.dropped()), (12, 0));
    for patch in &looks(there) {
        assert!(!scan.encoded(patch, none).unwrap().1);
    }
    // Everything is in use now: nothing of it is dropped before another place is needed.
    assert_eq!((rest(here), encodings.dropped()), (0, 0));
    assert!(scan.encoded(&looks(here)[0], none).unwrap().1);
    assert_eq!((encodings.made(), encodings.dropped()), (13, 1));
}

#[test]
fn what_shows_all_of_a_scan_is_encoded_before_anything_is_said() {
    let (mut s, encodings) = unsaid(Options::default());
    let (ahead, interest) = s.scan().ahead().unwrap();
    assert!(ahead.serves() && ahead.encode(&mut Observer::none()).unwrap());
    assert_eq!(encodings.made(), 1);
    // Wherever the click then is, its patch is available.
    for at in [ON, [140, 140, 25]] {
        let places = s.ahead_of(&points(&[(at, true)])).unwrap();
        let left = places.iter().filter(|a| a.encode(&mut Observer::none()).unwrap());
        assert_eq!((places.len(), left.count()), (6, 5));
    }
    // The interest is gone.
    drop(interest);
    assert!(!ahead.serves());
    // The network alone looks where it is told to.
    let (s, _) = unsaid(Options { released: true, ..Options::default() });
    assert!(s.scan().ahead().is_none());
}

#[test]
fn what_is_told_again_outlives_what_is_not() {
    let none = &mut Observer::none();
    let (here, there, further) = ([20, 20, 2], [140, 140, 25], [20, 140, 2]);
    let (s, _) = unsaid(Options::default());
    s.scan().encoded(&looks(ON)[0], none).unwrap();
    let one = s.scan().bytes();

    let (mut s, _) = unsaid(Options { memory: 11 * one, ..Options::default() });
    let scan = s.scan().clone();
    let rest = |at: [usize; 3]| {
        let ahead = s.ahead_of(&points(&[(at, true)])).unwrap();
        ahead.iter().filter(|a| a.encode(&mut Observer::none()).unwrap()).count()
    };
    assert_eq!([here, there, here, further].map(rest), [6, 5, 0, 5]);
    for patch in &looks(here) {
        assert!(!scan.encoded(patch, none).unwrap().1);
    }
}

#[test]
fn a_program_in_c_gets_the_same_answers() {
    use prism::capi::*;
    use std::ptr::{null, null_mut};
    let mut rng = StdRng::seed_from_u64(23);
    let clicks: Vec<_> = (0..5).map(|_| some_click(&mut rng)).collect();
    let mut own = open(&small());
    own.interact(&Prompts { bounds: Some(BOX), ..Default::default() }).unwrap();
    clicks.iter().for_each(|c| drop(own.interact(&points(&[*c])).unwrap().clone()));

    let text = |p: &str| std::ffi::CString::new(here(p).to_str().unwrap()).unwrap();
    let fine = |status: prism_status| assert!(status == prism_status::PRISM_OK, "{status:?}");
    let (mut engine, mut model, mut volume, mut session, mut prediction) =
        (null_mut(), null_mut(), null_mut(), null_mut(), null_mut());
    let empty = || prism_prompts {
        struct_size: size_of::<prism_prompts>(),
        // SAFETY: numbers and null pointers.
        ..unsafe { std::mem::zeroed() }
    };
    let mut mask = vec![0u8; image().grid.voxels()];
    // SAFETY: all pointers and sizes are valid.
    unsafe {
        fine(prism_engine_open(c"cpu".as_ptr(), null(), &mut engine));
        fine(prism_model_load(engine, text("models/small.safetensors").as_ptr(), &mut model));
        fine(prism_volume_read(text("examples/data/lung1_image.nii.gz").as_ptr(), -1, &mut volume));
        fine(prism_session_open(model, volume, null(), &mut session));
        let bounds = BOX.map(|v| v as f64);
        fine(prism_session_interact(
            session,
            &prism_prompts { bounds: bounds.as_ptr(), ..empty() },
            null_mut(),
        ));
        for (voxel, positive) in &clicks {
            let (point, label) = (voxel.map(|v| v as f64), u8::from(*positive));
            let prompts = prism_prompts {
                points: point.as_ptr(),
                point_labels: &label,
                point_count: 1,
                ..empty()
            };
            fine(prism_session_interact(session, &prompts, null_mut()));
        }
        fine(prism_session_get_prediction(session, &mut prediction));
        let [_, nj, nk] = image().grid.size;
        let strides = [(nj * nk) as isize, nk as isize, 1];
        fine(prism_prediction_get_mask(
            prediction,
            0,
            mask.as_mut_ptr(),
            mask.len(),
            strides.as_ptr(),
            null_mut(),
        ));
        fine(prism_prediction_free(prediction));
        fine(prism_session_free(session));
        fine(prism_volume_free(volume));
        fine(prism_model_free(model));
        fine(prism_engine_free(engine));
    }
    assert!(mask == own.mask());
}
