//! What is drawn on scans that lie aslant, are left-handed and have other distances along every
//! axis, through every protocol: strokes and outlines in all three planes, boxes, lines. Every
//! voxel that was said holds, and the mask is the one that prism's own interface answers where it
//! is told the same voxels in the axes of the file.

use super::geometry::{
    LEFT_HANDED, OBLIQUE, ON, Pose, SIZE, Told, elements, index, so_far, take, unpacked, values,
};
use super::{Sent, infer, mask_of, parts_of, send, send_form, start, voxels};
use crate::http::{ask, get, object_on, post, session_of, started, started_with, trained};
use crate::viewer::Viewer;
use prism::prompt::{Prompts, RawBox, RawOutline, RawPoint, Space};
use prism::serve::Settings;
use prism::volume::{Affine, Element, Grid};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// The first and the last voxel of a block.
type Block = [[usize; 3]; 2];

fn within(block: Block, voxel: [usize; 3]) -> bool {
    (0..3).all(|a| (block[0][a]..=block[1][a]).contains(&voxel[a]))
}

/// A block without the voxels at its faces, but for the axis along which it is one slice.
fn inner([low, high]: Block) -> Block {
    let by = |a: usize| usize::from(low[a] < high[a]);
    [std::array::from_fn(|a| low[a] + by(a)), std::array::from_fn(|a| high[a] - by(a))]
}

/// All voxels of a block, k fastest.
fn all_of([low, high]: Block) -> Vec<[usize; 3]> {
    let mut all = vec![];
    for (i, j) in (low[0]..=high[0]).flat_map(|i| (low[1]..=high[1]).map(move |j| (i, j))) {
        all.extend((low[2]..=high[2]).map(|k| [i, j, k]));
    }
    all
}

/// What is drawn at a time, in voxels of the scan.
enum Drawn {
    /// These voxels, k fastest: on the object or off it.
    Stroke(bool, Vec<[usize; 3]>),
    /// A rectangle on one slice, around the object or around what is off it.
    Outline(bool, Block),
    Box(Block),
    /// Across the object, from one of its ends to the other.
    Line([[usize; 3]; 2]),
}

impl Drawn {
    /// The JSON that tells prism's own interface of the prompt.
    fn json(&self) -> Value {
        match self {
            Drawn::Stroke(on, voxels) => json!({ "scribbles": [{ "on": on, "voxels": voxels }] }),
            Drawn::Outline(on, block) => {
                let (axis, corners) = corners(*block);
                let [u, v] = [[1, 2], [0, 2], [0, 1]][axis];
                let outline = corners.map(|corner| [corner[u], corner[v]]);
                let lasso =
                    json!({ "on": on, "axis": axis, "slice": block[0][axis], "outline": outline });
                json!({ "lassos": [lasso] })
            }
            Drawn::Box([low, high]) => json!({ "box": { "from": low, "to": high } }),
            Drawn::Line([from, to]) => json!({ "lines": [{ "from": from, "to": to }] }),
        }
    }

    /// The prompts that tell the library of it: in millimetres, but for boxes, which lie along a
    /// scan's axes.
    fn prompts(&self, grid: &Grid, pose: &Pose) -> Prompts {
        let mm = |voxel: [f64; 3]| pose.affine().apply(voxel);
        let whole = |voxel: [usize; 3]| voxel.map(|n| n as f64);
        let mut prompts = Prompts::default();
        match self {
            Drawn::Stroke(on, voxels) => {
                for voxel in voxels {
                    let point = RawPoint { position: mm(whole(*voxel)), positive: *on };
                    prompts.add_point(grid, point, Space::Ras).unwrap();
                }
            }
            Drawn::Outline(on, block) => {
                let outline = RawOutline(corners(*block).1.map(mm).to_vec());
                prompts.add_lasso(grid, &outline, Space::Ras).unwrap();
                if !on {
                    prompts.points.iter_mut().for_each(|(_, positive)| *positive = false);
                    prompts.drawn = None;
                }
            }
            Drawn::Box([low, high]) => {
                let (low, high) = (whole(*low), high.map(|n| n as f64 + 1.0));
                let ends = RawBox([low[0], low[1], low[2], high[0], high[1], high[2]]);
                prompts.set_box(grid, ends, Space::Ijk).unwrap();
            }
            Drawn::Line(ends) => {
                let [a, b] = ends.map(|end| mm(whole(end)));
                let ends = RawBox([a[0], a[1], a[2], b[0], b[1], b[2]]);
                prompts.add_line(grid, ends, Space::Ras).unwrap();
            }
        }
        prompts
    }

    /// Whether a voxel is painted where there are strokes and outlines that are painted; of an
    /// outline its rim is.
    fn marks(&self, voxel: [usize; 3]) -> bool {
        match self {
            Drawn::Stroke(_, voxels) => voxels.binary_search(&voxel).is_ok(),
            Drawn::Outline(_, block) => within(*block, voxel) && !within(inner(*block), voxel),
            Drawn::Box(_) | Drawn::Line(_) => panic!("nothing is painted"),
        }
    }

    /// Whether it is said to lie on the object, and whether it is a stroke.
    fn kind(&self) -> (bool, bool) {
        match self {
            Drawn::Stroke(on, _) => (*on, true),
            Drawn::Outline(on, _) => (*on, false),
            Drawn::Box(_) | Drawn::Line(_) => panic!("nothing is painted"),
        }
    }
}

/// The axis across a rectangle of one slice, and its corners: half a voxel outside of its voxels.
fn corners([low, high]: Block) -> (usize, [[f64; 3]; 4]) {
    let axis = (0..3).find(|a| low[*a] == high[*a]).expect("one slice");
    let [u, v] = [[1, 2], [0, 2], [0, 1]][axis];
    let corner = |(far_u, far_v): (bool, bool)| {
        let mut corner = [low[axis] as f64; 3];
        for (a, is_far) in [(u, far_u), (v, far_v)] {
            corner[a] = if is_far { high[a] as f64 + 0.5 } else { low[a] as f64 - 0.5 };
        }
        corner
    };
    (axis, [(false, false), (false, true), (true, true), (true, false)].map(corner))
}

/// The sides on which voxels have to lie, by what was said so far.
#[derive(Default)]
struct Held(BTreeMap<[usize; 3], bool>);

impl Held {
    fn say(&mut self, drawn: &Drawn) {
        match drawn {
            Drawn::Stroke(on, voxels) => self.0.extend(voxels.iter().map(|v| (*v, *on))),
            Drawn::Outline(on, block) => {
                // What lies right at an outline may be either, whatever was said of it before.
                self.0.retain(|voxel, _| !within(*block, *voxel));
                self.0.extend(all_of(inner(*block)).into_iter().map(|v| (v, *on)));
            }
            Drawn::Box(_) => {}
            // Along an axis; of it the middle four fifths.
            Drawn::Line([from, to]) => {
                let tenth: [usize; 3] = std::array::from_fn(|a| (to[a] - from[a]).div_ceil(10));
                let block = [
                    std::array::from_fn(|a| from[a] + tenth[a]),
                    std::array::from_fn(|a| to[a] - tenth[a]),
                ];
                self.0.extend(all_of(block).into_iter().map(|v| (v, true)));
            }
        }
    }

    /// Whether a mask, as the library orders masks, holds to all of it.
    #[track_caller]
    fn holds(&self, mask: &[u8], what: &str) {
        for (voxel, on) in &self.0 {
            assert_eq!(mask[index(*voxel)], u8::from(*on), "{what}: {voxel:?}");
        }
    }

    /// Whether a file's mask does, each voxel looked up at its place in the world.
    #[track_caller]
    fn lies(&self, told: &Told, pose: &Pose) {
        for (voxel, on) in &self.0 {
            let place = pose.affine().apply(voxel.map(|n| n as f64));
            assert_eq!(told.at(place), u8::from(*on), "{}: {voxel:?}", pose.name);
        }
    }
}

/// An object on a scan of prism's own interface, and its mask.
struct Own {
    at: SocketAddr,
    scan: String,
    object: String,
    mask: Vec<u8>,
}

impl Own {
    fn new(at: SocketAddr, file: &[u8]) -> Own {
        let scan = ask(at, "POST", "/v1/scans", &[], file).json(201);
        let scan = scan["scan"].as_str().unwrap().to_string();
        let object = object_on(at, &scan, &json!({}));
        Own { at, scan, object, mask: vec![0; SIZE.iter().product()] }
    }

    /// Goes on with another object.
    fn begin(&mut self) {
        self.object = object_on(self.at, &self.scan, &json!({}));
        self.mask.fill(0);
    }

    #[track_caller]
    fn say(&mut self, drawn: &Drawn) {
        let path = format!("/v1/objects/{}/prompts", self.object);
        take(&mut self.mask, &post(self.at, &path, &drawn.json()));
    }
}

/// The part of the example as NRRD, whose numbers are those of the affine to the bit: NIfTI rounds
/// them.
fn nrrd(affine: Affine, element: Element) -> Vec<u8> {
    let kind = if element == Element::Float32 { "float" } else { "int16" };
    let vector = |c: usize| {
        let [x, y, z] = [0, 1, 2].map(|r| affine.0[r][c] * if r < 2 { -1.0 } else { 1.0 });
        format!("({x},{y},{z})")
    };
    let [ni, nj, nk] = SIZE;
    let (directions, origin) = ([0, 1, 2].map(vector).join(" "), vector(3));
    let head = format!(
        "NRRD0004\ntype: {kind}\ndimension: 3\nspace: left-posterior-superior\n\
         sizes: {ni} {nj} {nk}\nspace directions: {directions}\nspace origin: {origin}\n\
         endian: little\nencoding: raw\n\n"
    );
    [head.into_bytes(), elements(element)].concat()
}

/// A stroke off the object: what lies furthest along j of its mask, and no prompt said lies on it.
fn rim(mask: &[u8], held: &Held) -> Drawn {
    let all = all_of([[0; 3], SIZE.map(|n| n - 1)]);
    let on: Vec<_> = all.into_iter().filter(|v| mask[index(*v)] != 0).collect();
    let last = on.iter().map(|v| v[1]).max().expect("an object");
    let free = |v: &[usize; 3]| v[1] == last && !held.0.contains_key(v);
    let stroke: Vec<_> = on.into_iter().filter(free).collect();
    assert!(!stroke.is_empty(), "all of the object's end was said");
    Drawn::Stroke(false, stroke)
}

/// The n-th of what is painted on an object, one after the other, by the mask so far: in every
/// plane, and where the mask is another. Sides of outlines are not ten voxels long: there it is as
/// good as open which voxels lie well within.
fn painted(n: usize, mask: &[u8], held: &Held) -> Option<Drawn> {
    let [i, j, k] = ON;
    Some(match n {
        0 => Drawn::Stroke(true, (0..9).map(|n| [i - 6 + n, j - 4 + n, k]).collect()),
        1 => Drawn::Stroke(true, (0..11).map(|n| [i, j - 5 + n, k - 1 + n / 5]).collect()),
        2 => rim(mask, held),
        3 => Drawn::Outline(true, [[i - 6, j - 7, k], [i + 7, j + 4, k]]),
        4 => {
            // Around an end of the object.
            let slab = all_of([[i, 0, k - 1], [i, j, k + 1]]);
            let end = slab.into_iter().find(|v| mask[index(*v)] != 0).expect("an object")[1];
            Drawn::Outline(false, [[i, end - 10, k - 2], [i, end + 3, k + 2]])
        }
        5 => Drawn::Outline(true, [[i - 12, j, k - 2], [i + 1, j, k + 2]]),
        _ => return None,
    })
}

/// The box of the nodule, and boxes of one slice of it in every plane.
const BOXES: [Block; 4] = [
    [[39, 33, 13], [62, 58, 15]],
    [[39, 33, 14], [62, 58, 14]],
    [[39, 45, 13], [62, 45, 15]],
    [[50, 33, 13], [50, 58, 15]],
];

/// Paints on a new object, there and by prism's own interface.
#[track_caller]
fn paint(own: &mut Own, what: &str, mut told: impl FnMut(&Drawn) -> Vec<u8>) {
    let mut held = Held::default();
    let mut n = 0;
    while let Some(drawn) = painted(n, &own.mask, &held) {
        own.say(&drawn);
        let mask = told(&drawn);
        assert!(mask == own.mask, "{what}: drawing {n} has another mask");
        held.say(&drawn);
        held.holds(&mask, &format!("{what}, drawing {n}"));
        n += 1;
    }
}

#[test]
fn prisms_own_interface_has_what_is_drawn_where_it_lies() {
    let server = started_with(trained(), Settings::default());
    let at = server.address;
    for pose in [OBLIQUE, LEFT_HANDED] {
        let (file, image) = pose.file();
        let (mut own, first_of_all) = (Own::new(at, &file), session_of(&trained(), &image));
        let [i, j, k] = ON;
        let lines = [
            [[i - 9, j, k], [i + 9, j, k]],
            [[i, j - 8, k], [i, j + 8, k]],
            [[i, j, k - 1], [i, j, k + 1]],
        ];
        let firsts = BOXES.map(Drawn::Box).into_iter().chain(lines.map(Drawn::Line));
        for first in firsts.map(Some).chain([None]) {
            let (mut library, mut held) = (first_of_all.another(), Held::default());
            own.begin();
            let mut both = |own: &mut Own, held: &mut Held, drawn: &Drawn| {
                own.say(drawn);
                library.interact(&drawn.prompts(&image.grid, &pose)).unwrap();
                assert!(own.mask == library.mask(), "{}: {}", pose.name, drawn.json());
                held.say(drawn);
                held.holds(&own.mask, pose.name);
            };
            match &first {
                Some(first) => {
                    both(&mut own, &mut held, first);
                    let off = rim(&own.mask, &held);
                    both(&mut own, &mut held, &off);
                }
                None => {
                    let mut n = 0;
                    while let Some(drawn) = painted(n, &own.mask, &held) {
                        both(&mut own, &mut held, &drawn);
                        n += 1;
                    }
                }
            }
            // Where the files have it is where it was drawn.
            for (format, read) in [("nii", Told::nifti as fn(&[u8]) -> Told), ("nrrd", unpacked)] {
                let reply = get(at, &format!("/v1/objects/{}/mask?format={format}", own.object));
                assert_eq!(reply.status, 200, "{}", reply.text());
                let told = read(&reply.body);
                assert!(told.mask() == own.mask, "{}, {format}", pose.name);
                held.lies(&told, &pose);
            }
        }
    }
}

#[test]
fn itk_snap_has_what_is_painted_where_it_lies() {
    let server = started_with(trained(), Settings::default());
    let at = server.address;
    for pose in [OBLIQUE, LEFT_HANDED] {
        let mut own = Own::new(at, &nrrd(pose.affine(), Element::Float32));
        let name = start(at, "/v2/start_session/nnInteractive");
        let path = format!("/upload_raw/{name}?filename=upload.nii.gz");
        assert_eq!(send_form(at, "POST", &path, &pose.sent().form()).status, 200, "{}", pose.name);
        paint(&mut own, pose.name, |drawn| {
            let (on, is_stroke) = drawn.kind();
            let what = if is_stroke { "scribble" } else { "lasso" };
            let path = format!("/process_{what}_interaction/{name}?foreground={on}");
            let marks = Sent::marks(SIZE, |voxel| drawn.marks(voxel));
            mask_of(&send_form(at, "POST", &path, &marks.form()), SIZE)
        });
    }
}

#[test]
fn monai_label_has_boxes_and_clicks_where_they_lie() {
    let server = started(Settings::default());
    let at = server.address;
    for pose in [OBLIQUE, LEFT_HANDED] {
        let (file, _) = pose.file();
        let created =
            send(at, "PUT", "/session/", &[("files", Some("scan.nii.gz"), &file)]).json(200);
        let name = created["session_id"].as_str().unwrap();
        let mut own = Own::new(at, &file);
        for block @ [low, high] in BOXES {
            own.begin();
            let mut held = Held::default();
            let (mut on, mut off): (Vec<[usize; 3]>, Vec<[usize; 3]>) = (vec![], vec![]);
            let roi: Vec<usize> = (0..3).flat_map(|a| [low[a], high[a]]).collect();
            for n in 0..4 {
                // First the box alone, then clicks in two planes, then what they leave too much.
                let drawn = match n {
                    0 => Drawn::Box(block),
                    1 | 2 => painted(n - 1, &own.mask, &held).unwrap(),
                    _ => rim(&own.mask, &held),
                };
                match &drawn {
                    Drawn::Stroke(true, voxels) => on.extend(voxels),
                    Drawn::Stroke(false, voxels) => off.extend(voxels),
                    _ => {}
                }
                own.say(&drawn);
                held.say(&drawn);
                let mut params = so_far(&on, &off);
                params["roi"] = json!(roi);
                let (_, _, file) = parts_of(&infer(at, name, &params));
                let told = Told::nrrd(&file);
                assert!(told.mask() == own.mask, "{}, {block:?}: step {n}", pose.name);
                held.lies(&told, &pose);
            }
        }
    }
}

/// On its wire there are distances and no directions; arrays, boxes and crops are `[k, j, i]`.
#[test]
fn nninteractive_has_what_is_drawn_where_it_lies() {
    let server = started_with(trained(), Settings::default());
    let at = server.address;
    let [di, dj, dk] = OBLIQUE.spacing;
    let affine = Affine([[-di, 0.0, 0.0, 0.0], [0.0, -dj, 0.0, 0.0], [0.0, 0.0, dk, 0.0]]);
    let mut own = Own::new(at, &nrrd(affine, Element::Int16));
    let [ni, nj, nk] = SIZE;
    let values: Vec<i16> = values().into_iter().map(|v| v as i16).collect();
    let mut viewer = Viewer::new(at);
    viewer.open([nk, nj, ni], [dk, dj, di], &values);
    paint(&mut own, "painted", |drawn| {
        painted_in_a_crop(&mut viewer, drawn);
        viewer.mask()
    });
    for block @ [low, high] in BOXES {
        own.begin();
        assert_eq!(viewer.post("/reset_interactions", &json!({})).json(200), json!({}));
        viewer.buffer.fill(0);
        let ends = |[low, high]: Block| json!([2, 1, 0].map(|a| [low[a], high[a] + 1]));
        own.say(&Drawn::Box(block));
        assert_eq!(viewer.bounds(ends(block), true), (true, true), "{block:?}");
        assert!(viewer.mask() == own.mask, "{block:?}");
        // A box off the object, small enough for all of its voxels to be said: one of its corners
        // is the object's last voxel within the box.
        let mut held = Held::default();
        let mut on = all_of(block).into_iter().rev();
        let last = on.find(|voxel| own.mask[index(*voxel)] != 0).expect("an object");
        let size = [0, 1, 2].map(|a| [4, 7, 2][a].min(high[a] - low[a]));
        let away = [std::array::from_fn(|a| last[a].saturating_sub(size[a]).max(low[a])), last];
        let off = Drawn::Stroke(false, all_of(away));
        own.say(&off);
        held.say(&off);
        assert_eq!(viewer.bounds(ends(away), false), (true, true), "{block:?}");
        assert!(viewer.mask() == own.mask, "{block:?} without {away:?}");
        held.holds(&own.mask, &format!("{block:?}"));
    }
}

/// Sends what is painted in a crop that is a little larger than it, and other along every axis.
#[track_caller]
fn painted_in_a_crop(viewer: &mut Viewer, drawn: &Drawn) {
    let marked: Vec<_> = voxels(SIZE).filter(|voxel| drawn.marks(*voxel)).collect();
    let crop = [2, 1, 0].map(|a| {
        let low = marked.iter().map(|v| v[a]).min().expect("something painted");
        let high = marked.iter().map(|v| v[a]).max().expect("something painted");
        [low.saturating_sub(a), (high + 3 - a).min(SIZE[a])]
    });
    let [[k0, k1], [j0, j1], [i0, i1]] = crop;
    let mut marks = vec![];
    for (k, j) in (k0..k1).flat_map(|k| (j0..j1).map(move |j| (k, j))) {
        marks.extend((i0..i1).map(|i| u8::from(drawn.marks([i, j, k]))));
    }
    let (on, is_stroke) = drawn.kind();
    let what = if is_stroke { "scribble" } else { "lasso" };
    let told = viewer.painted(&format!("/add_{what}_interaction"), crop, &marks, on);
    assert!(told.0, "there is a prediction");
}
