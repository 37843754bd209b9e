//! Scans that lie aslant, are left-handed and have other distances along every axis, through every
//! protocol: a click holds at its own voxel, looked up at its place in the world as the answer's
//! own words have it, and the mask is the library's. Files are read here by a few lines of their
//! own, so that a reader and a writer that are wrong alike do not agree.

#[cfg(feature = "dicom")]
use super::series;
use super::{Sent, gunzip, infer, mask_of, parts_of, send, send_form, start, voxels};
#[cfg(feature = "dicom")]
use crate::http::Part;
use crate::http::{self, CLICK, Reply, ask, example, get, post, said, session, started};
use crate::viewer::Viewer;
use prism::serve::Settings;
use prism::volume::{Affine, Description, Element, Grid, Volume, scan_file};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// How a scan lies, as ITK and DICOM tell it: millimetres to the left, to the back and to the head.
pub struct Pose {
    pub name: &'static str,
    /// Row by row; columns are the directions of i, j and k.
    direction: [[f64; 3]; 3],
    pub spacing: [f64; 3],
    origin: [f64; 3],
    left_handed: bool,
}

pub const OBLIQUE: Pose = Pose {
    name: "oblique",
    direction: [[0.6, -0.768, 0.224], [0.8, 0.576, -0.168], [0.0, 0.28, 0.96]],
    spacing: [0.6, 0.8, 4.5],
    origin: [-31.0, 12.5, -140.0],
    left_handed: false,
};

/// A pose whose first axis runs to the head, and whose last to the left and the back.
pub const LEFT_HANDED: Pose = Pose {
    name: "left-handed",
    direction: [[0.224, -0.768, 0.6], [-0.168, 0.576, 0.8], [0.96, 0.28, 0.0]],
    left_handed: true,
    ..OBLIQUE
};

/// The part of the example that is sent: a side of it is like no other.
pub const SIZE: [usize; 3] = [120, 105, 28];
const LOW: [usize; 3] = [30, 35, 0];
/// Voxels of the part: on the nodule.
pub const ON: [usize; 3] = [CLICK[0] - LOW[0], CLICK[1] - LOW[1], CLICK[2] - LOW[2]];

impl Pose {
    /// From a voxel to millimetres to the right, to the front and to the head.
    pub fn affine(&self) -> Affine {
        let row = |r: usize| {
            let sign = if r < 2 { -1.0 } else { 1.0 };
            let step = |c: usize| sign * self.direction[r][c] * self.spacing[c] + 0.0;
            [step(0), step(1), step(2), sign * self.origin[r] + 0.0]
        };
        let affine = Affine([row(0), row(1), row(2)]);
        assert_eq!(affine.determinant() < 0.0, self.left_handed, "{}", self.name);
        affine
    }

    /// The part of the example, so laid.
    fn scan(&self) -> Volume {
        laid(self.affine(), Element::Int16)
    }

    /// The scan as a file, and as the library reads that.
    pub fn file(&self) -> (Vec<u8>, Arc<Volume>) {
        let file = scan_file(Path::new("scan.nii.gz"), &self.scan()).unwrap();
        let image = Volume::of_file(file.clone(), None).unwrap();
        assert!(image.grid.affine.distance(&self.affine(), SIZE) < 1e-3);
        (file, Arc::new(image))
    }

    /// The scan as ITK-SNAP sends it.
    pub fn sent(&self) -> Sent {
        let mut sent = Sent::new(SIZE, self.spacing, &values());
        sent.metadata["direction"] = json!(self.direction.concat());
        sent.metadata["origin"] = json!(self.origin);
        sent
    }

    /// Whether a file's mask is the library's, and has both clicks where they are in the world.
    #[track_caller]
    fn holds(&self, told: &Told, off: [usize; 3], mask: &[u8]) {
        assert_eq!(told.size, SIZE, "{}", self.name);
        let at = |voxel: [usize; 3]| told.at(self.affine().apply(voxel.map(|n| n as f64)));
        assert_eq!((at(ON), at(off)), (1, 0), "{}", self.name);
        assert!(told.mask() == mask, "{}: another mask than the library's", self.name);
    }
}

/// The part of the example with another affine.
fn laid(affine: Affine, element: Element) -> Volume {
    let grid = Grid { size: SIZE, affine };
    let description = Description::of_new(&grid, element.name());
    Volume::of_elements(grid, element, elements(element), description).unwrap()
}

/// The voxels of the scan as a file has them.
pub fn elements(element: Element) -> Vec<u8> {
    let mut bytes = vec![];
    for value in values() {
        match element {
            Element::Float32 => bytes.extend(value.to_le_bytes()),
            _ => bytes.extend((value as i16).to_le_bytes()),
        }
    }
    bytes
}

/// The values of the part, i fastest.
pub fn values() -> Vec<f32> {
    let image = example();
    voxels(SIZE).map(|voxel| image.at(std::array::from_fn(|a| LOW[a] + voxel[a]))).collect()
}

/// Where the library has a voxel in a mask.
pub fn index([i, j, k]: [usize; 3]) -> usize {
    (i * SIZE[1] + j) * SIZE[2] + k
}

/// What the library answers to a click on the object, and then to one that takes away the voxel of
/// that answer that is last: the voxel, and both masks.
fn library(image: &Arc<Volume>) -> ([usize; 3], [Vec<u8>; 2]) {
    let mut library = session(image);
    library.interact(&said(&[(ON, true)], None)).unwrap();
    let one = library.mask();
    let last = one.iter().rposition(|v| *v != 0).expect("an object");
    let off = [last / SIZE[2] / SIZE[1], last / SIZE[2] % SIZE[1], last % SIZE[2]];
    assert_ne!(off, ON);
    library.interact(&said(&[(off, false)], None)).unwrap();
    let two = library.mask();
    assert_eq!([&one, &two].map(|mask| (mask[index(ON)], mask[index(off)])), [(1, 1), (1, 0)]);
    (off, [one, two])
}

/// A file of a mask as its header has it.
pub struct Told {
    size: [usize; 3],
    /// To millimetres to the right, to the front and to the head.
    affine: Affine,
    /// i fastest.
    voxels: Vec<u8>,
}

impl Told {
    /// NIfTI-1 of bytes, placed by its sform.
    pub fn nifti(file: &[u8]) -> Told {
        let short = |at: usize| i16::from_le_bytes([file[at], file[at + 1]]);
        let float = |at: usize| f32::from_le_bytes(file[at..at + 4].try_into().unwrap());
        // Three axes, uint8, an sform.
        assert_eq!((short(40), short(70)), (3, 2));
        assert!(short(254) > 0);
        let size = [42, 44, 46].map(|at| short(at) as usize);
        let row = |r: usize| [0, 4, 8, 12].map(|c| f64::from(float(280 + 16 * r + c)));
        let start = float(108) as usize;
        let voxels = file[start..].to_vec();
        assert_eq!(voxels.len(), size.iter().product::<usize>());
        Told { size, affine: Affine([row(0), row(1), row(2)]), voxels }
    }

    /// NRRD of bytes, not packed.
    pub fn nrrd(file: &[u8]) -> Told {
        let end = file.windows(2).position(|two| two == b"\n\n").expect("the end of a header");
        let head = String::from_utf8(file[..end].to_vec()).unwrap();
        let field = |name: &str| {
            let found = head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            found.unwrap_or_else(|| panic!("no {name} in {head}")).to_string()
        };
        assert_eq!(field("space"), "left-posterior-superior");
        assert_eq!(field("type"), "unsigned char");
        assert_eq!(field("encoding"), "raw");
        let numbers = |text: &str, between: char| -> [f64; 3] {
            let inner = text.trim_matches(['(', ')']);
            let found: Vec<f64> = inner.split(between).map(|n| n.parse().unwrap()).collect();
            found.try_into().unwrap()
        };
        let mut columns = vec![];
        for vector in field("space directions").split(' ') {
            columns.push(numbers(vector, ','));
        }
        assert_eq!(columns.len(), 3);
        columns.push(numbers(&field("space origin"), ','));
        let sign = |r: usize| if r < 2 { -1.0 } else { 1.0 };
        let row = |r: usize| [0, 1, 2, 3].map(|c: usize| sign(r) * columns[c][r]);
        let size = numbers(&field("sizes"), ' ').map(|n| n as usize);
        let voxels = file[end + 2..].to_vec();
        assert_eq!(voxels.len(), size.iter().product::<usize>());
        Told { size, affine: Affine([row(0), row(1), row(2)]), voxels }
    }

    /// The voxel at a place in the world.
    #[track_caller]
    pub fn at(&self, place: [f64; 3]) -> u8 {
        let there = self.affine.inverse().apply(place);
        let voxel = there.map(f64::round);
        let is_voxel = |a: usize| {
            (there[a] - voxel[a]).abs() < 0.01 && (0.0..self.size[a] as f64).contains(&voxel[a])
        };
        assert!((0..3).all(is_voxel), "{there:?} is no voxel");
        let [i, j, k] = voxel.map(|v| v as usize);
        self.voxels[(k * self.size[1] + j) * self.size[0] + i]
    }

    /// All of it, as the library orders masks.
    pub fn mask(&self) -> Vec<u8> {
        let mut mask = vec![0; self.voxels.len()];
        for (voxel, value) in voxels(self.size).zip(&self.voxels) {
            mask[index(voxel)] = *value;
        }
        mask
    }
}

/// Writes what an answer of prism's own interface says into a mask.
#[track_caller]
pub fn take(mask: &mut [u8], reply: &Reply) {
    assert_eq!(reply.status, 200, "{}", reply.text());
    let about: Value = serde_json::from_str(reply.header("X-Prism-Answer").unwrap()).unwrap();
    let region: Option<[[usize; 2]; 3]> = serde_json::from_value(about["region"].clone()).unwrap();
    // Nothing changed where there is none.
    let Some(region) = region else { return };
    for (at, within) in voxels(region.map(|[low, high]| high - low)).enumerate() {
        let voxel = std::array::from_fn(|a| region[a][0] + within[a]);
        mask[index(voxel)] = reply.body[at / 8] >> (at % 8) & 1;
    }
}

#[test]
fn prisms_own_interface_takes_scans_as_they_lie() {
    let server = started(Settings::default());
    let at = server.address;
    for pose in [OBLIQUE, LEFT_HANDED] {
        let (file, image) = pose.file();
        let (off, masks) = library(&image);
        let scan = ask(at, "POST", "/v1/scans?name=scan.nii.gz", &[], &file).json(201);
        let [r, a, s, last]: [[f64; 4]; 4] =
            serde_json::from_value(scan["affine"].clone()).unwrap();
        assert_eq!(last, [0.0, 0.0, 0.0, 1.0]);
        assert!(Affine([r, a, s]).distance(&pose.affine(), SIZE) < 1e-3, "{}", pose.name);
        let object = http::object_on(at, scan["scan"].as_str().unwrap(), &json!({}));
        let path = |what: &str| format!("/v1/objects/{object}/{what}");
        let mut shown = vec![0; masks[0].len()];
        for (click, expected) in
            [json!({ "at": ON }), json!({ "at": off, "on": false })].into_iter().zip(&masks)
        {
            take(&mut shown, &post(at, &path("prompts"), &json!({ "points": [click] })));
            assert!(shown == *expected, "{}", pose.name);
        }
        for (format, read) in [("nii", Told::nifti as fn(&[u8]) -> Told), ("nrrd", unpacked)] {
            let reply = get(at, &path(&format!("mask?format={format}")));
            assert_eq!(reply.status, 200, "{}", reply.text());
            pose.holds(&read(&reply.body), off, &masks[1]);
        }
    }
}

/// A NRRD whose voxels are packed.
pub fn unpacked(file: &[u8]) -> Told {
    let end = 2 + file.windows(2).position(|two| two == b"\n\n").expect("the end of a header");
    let head = String::from_utf8(file[..end].to_vec()).unwrap();
    assert!(head.contains("encoding: gzip\n"), "{head}");
    let head = head.replace("encoding: gzip\n", "encoding: raw\n");
    Told::nrrd(&[head.into_bytes(), gunzip(&file[end..])].concat())
}

#[test]
fn itk_snap_has_scans_as_they_lie() {
    let server = started(Settings::default());
    let at = server.address;
    for pose in [OBLIQUE, LEFT_HANDED] {
        let (off, masks) = library(&Arc::new(laid(pose.affine(), Element::Float32)));
        let name = start(at, "/v2/start_session/nnInteractive");
        let path = format!("/v2/upload_raw/{name}?filename=upload.nii.gz");
        assert_eq!(send_form(at, "POST", &path, &pose.sent().form()).status, 200, "{}", pose.name);
        for (([x, y, z], on), expected) in [(ON, true), (off, false)].into_iter().zip(&masks) {
            let path = format!("/v2/process_point_interaction/{name}");
            let reply = get(at, &format!("{path}?point={x}&point={y}&point={z}&foreground={on}"));
            let mask = mask_of(&reply, SIZE);
            assert_eq!(mask[index([x, y, z])], u8::from(on), "{}", pose.name);
            assert!(mask == *expected, "{}", pose.name);
        }
        assert_eq!(get(at, &format!("/v2/end_session/{name}")).status, 200);
    }
}

/// What MONAI Label's clients say: all clicks so far, in voxels of the scan that they sent.
pub fn so_far(on: &[[usize; 3]], off: &[[usize; 3]]) -> Value {
    json!({
        "label": "tumour", "foreground": on, "background": off, "result_extension": ".nrrd",
        "result_dtype": "uint8", "result_compress": false,
    })
}

#[test]
fn monai_label_has_scans_as_they_lie() {
    let server = started(Settings::default());
    let at = server.address;
    for pose in [OBLIQUE, LEFT_HANDED] {
        let (file, image) = pose.file();
        let (off, masks) = library(&image);
        let created =
            send(at, "PUT", "/session/", &[("files", Some("scan.nii.gz"), &file)]).json(200);
        let name = created["session_id"].as_str().unwrap();
        let (_, _, one) = parts_of(&infer(at, name, &so_far(&[ON], &[])));
        assert!(Told::nrrd(&one).mask() == masks[0], "{}", pose.name);
        let (_, _, two) = parts_of(&infer(at, name, &so_far(&[ON], &[off])));
        pose.holds(&Told::nrrd(&two), off, &masks[1]);
        assert_eq!(ask(at, "DELETE", &format!("/session/{name}"), &[], b"").status, 200);
    }
}

/// Slices of a series lie one behind the other in the direction that their rows and columns give:
/// no scan of them is left-handed.
#[cfg(feature = "dicom")]
#[test]
fn monai_label_has_series_as_they_lie() {
    let folder = tempfile::tempdir().unwrap();
    series::file_scan(folder.path(), &OBLIQUE.scan());
    let image = Arc::new(Volume::read(folder.path(), None).unwrap());
    assert!(image.grid.affine.distance(&OBLIQUE.affine(), SIZE) < 1e-3);
    let (off, masks) = library(&image);
    let dicom = Some(folder.path().to_path_buf());
    let server = started(Settings { dicom, ..Settings::default() });
    let asked = |on: &[[usize; 3]], off: &[[usize; 3]]| {
        let path = format!("/infer/prism?image={}&output=image", series::EXAMPLE);
        let params = so_far(on, off).to_string();
        let part: [Part; 1] = [("params", None, params.as_bytes())];
        let reply = send(server.address, "POST", &path, &part);
        assert_eq!(reply.status, 200, "{}", reply.text());
        Told::nrrd(&reply.body)
    };
    assert!(asked(&[ON], &[]).mask() == masks[0]);
    OBLIQUE.holds(&asked(&[ON], &[off]), off, &masks[1]);
}

/// On its wire there are distances and no directions; arrays and places are `[k, j, i]`.
#[test]
fn nninteractive_has_distances_as_they_are() {
    let server = started(Settings::default());
    let [di, dj, dk] = OBLIQUE.spacing;
    let affine = Affine([[-di, 0.0, 0.0, 0.0], [0.0, -dj, 0.0, 0.0], [0.0, 0.0, dk, 0.0]]);
    let (off, masks) = library(&Arc::new(laid(affine, Element::Int16)));
    let [ni, nj, nk] = SIZE;
    let values: Vec<i16> = values().into_iter().map(|v| v as i16).collect();
    let mut viewer = Viewer::new(server.address);
    viewer.open([nk, nj, ni], [dk, dj, di], &values);
    for (([i, j, k], on), expected) in [(ON, true), (off, false)].into_iter().zip(&masks) {
        assert_eq!(viewer.point(json!([k, j, i]), on, true), (true, true));
        assert_eq!(viewer.buffer[(k * nj + j) * ni + i], u8::from(on));
        assert!(viewer.mask() == *expected);
    }
    // Distances count: were they all alike the answer would be another.
    viewer.open([nk, nj, ni], [1.0; 3], &values);
    viewer.point(json!([ON[2], ON[1], ON[0]]), true, true);
    assert!(viewer.mask() != masks[0]);
}
