//! Files of every kind that prism reads: what the fuzz targets in `fuzz/fuzz_targets` and the tests
//! in `tests/files/mutated.rs` run. Whatever the bytes, a reader returns; its result is valid, and
//! errors have a message. Each body returns whether something was read.
#![allow(dead_code)]

use prism::device::Device;
use prism::model::{Model, Weights, checkpoint};
use prism::prompt::simulate::generator;
use prism::prompt::{Iteration, Prompts, RawBox, RawOutline, RawPoint, Space, read_prompts};
use prism::tensor::extent;
use prism::train::run::network;
use prism::train::settings::Given;
use prism::train::state::State;
use prism::volume::labels::{Labels, TargetLabel};
use prism::volume::{Affine, Grid, Volume, metaimage};
use std::path::PathBuf;
use std::sync::OnceLock;

/// The endings of image files, by their first byte. Those of the last three have their voxels in a
/// second file.
const FORMS: [&str; 8] = [".nii", ".nii.gz", ".nrrd", ".seg.nrrd", ".mha", ".hdr", ".nhdr", ".mhd"];

thread_local! {
    /// The folder of inputs for readers that need a path: one per thread, which is removed with it.
    static FOLDER: tempfile::TempDir = tempfile::tempdir().unwrap();
}

/// A file of these bytes, alone in the folder: one input must not influence the result of the next.
fn written(name: &str, bytes: &[u8]) -> PathBuf {
    FOLDER.with(|folder| {
        for old in std::fs::read_dir(folder.path()).unwrap() {
            std::fs::remove_file(old.unwrap().path()).unwrap();
        }
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    })
}

/// The image file that bytes stand for. If it has a separate header, two bytes give the header's
/// length.
fn image_file(form: u8, content: &[u8]) -> PathBuf {
    let ending = FORMS[usize::from(form) % FORMS.len()];
    let second = match ending {
        ".hdr" => "x.img",
        ".nhdr" | ".mhd" => "x.raw",
        _ => return written(&format!("x{ending}"), content),
    };
    let (length, rest) = content.split_first_chunk::<2>().unwrap_or((&[0; 2], content));
    let (header, voxels) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes(*length))));
    let path = written(&format!("x{ending}"), header);
    std::fs::write(path.with_file_name(second), voxels).unwrap();
    path
}

/// What must hold of any message: it is for people. A fuzzer learns any word that is looked for,
/// and writes it then, to read it in the quotes of a message: there words are not looked for.
fn said(error: &dyn std::fmt::Display) {
    let text = error.to_string();
    assert!(!text.trim().is_empty(), "an error without a word");
    let raw = ["panicked", "Os {", "InvalidHeader"].iter().any(|p| text.contains(p));
    assert!(cfg!(fuzzing) || !raw, "{text}");
}

/// What must hold of any volume that was read.
fn sound(volume: &Volume) {
    let Volume { grid, description, .. } = volume;
    let data = volume.values();
    assert_eq!(extent(&grid.size), Some(data.len()));
    assert!(!data.is_empty() && data.iter().all(|v| v.is_finite()));
    assert!(grid.affine.is_regular() && grid.canonical().affine.is_regular(), "{:?}", grid.affine);
    assert_eq!(grid.canonical().voxels(), data.len());
    assert!(description.volumes > 0 && !description.element.is_empty());
}

/// Scans: two bytes choose the form and the volume, the rest is the file.
pub fn images(input: &[u8]) -> bool {
    let Some((&[form, which], content)) = input.split_first_chunk::<2>() else { return false };
    let path = image_file(form, content);
    // None, or one of the first three.
    let read = Volume::read(&path, usize::from(which % 4).checked_sub(1));
    match &read {
        Ok(volume) => sound(volume),
        Err(e) => said(e),
    }
    if let (Ok(volume), Ok(grid)) = (&read, Volume::grid_of(&path)) {
        assert_eq!(volume.grid, grid);
    }
    if let Ok(image) = metaimage::read(&path) {
        sound(&image.volume);
        // Its mask has the same place, or an error says why it cannot.
        let mask = vec![1u8; image.volume.values().len()];
        if let Err(e) = metaimage::write_mask(&path.with_file_name("mask.mha"), &image, &mask) {
            said(&e);
        }
    }
    read.is_ok()
}

/// The scan that labels belong to.
fn scan() -> Grid {
    Grid { size: [6, 5, 4], affine: Affine::from_spacing([1.0, 1.0, 2.0]) }
}

/// Label images: two bytes choose the form and the target, the rest is the file.
pub fn labels(input: &[u8]) -> bool {
    let Some((&[form, target], content)) = input.split_first_chunk::<2>() else { return false };
    let path = image_file(form, content);
    let target = match target % 4 {
        0 => TargetLabel::Any,
        1 => TargetLabel::Name("tumour".into()),
        n => TargetLabel::Value(n.into()),
    };
    let read = Labels::read(&path, &scan());
    match &read {
        Ok(labels) => placed(labels, scan().voxels(), &target),
        Err(e) => said(e),
    }
    // For a scan with the label's own header.
    if let Ok(volume) = Volume::read(&path, None) {
        match Labels::beside(&path, &volume) {
            Ok(labels) => placed(&labels, volume.values().len(), &target),
            Err(e) => said(&e),
        }
    }
    read.is_ok()
}

/// What must hold of labels on a scan with this number of voxels.
fn placed(labels: &Labels, voxels: usize, target: &TargetLabel) {
    let joined = labels.joined();
    assert_eq!(joined.len(), voxels);
    assert_eq!(joined.iter().any(|v| *v > 0), !labels.counts().is_empty());
    match labels.mask(target) {
        Ok(mask) => {
            assert_eq!(mask.len(), voxels);
            assert!(mask.iter().all(|m| *m <= 1), "a mask of other values than 0 and 1");
            // Nothing is marked that is not labelled.
            assert!(
                mask.iter()
                    .zip(&joined)
                    .all(|(m, label)| *m == 0 || *label > 0 || labels.is_named())
            );
        }
        Err(e) => said(&e),
    }
}

/// The device on which models are laid out.
fn cpu() -> &'static Device {
    static CPU: OnceLock<Device> = OnceLock::new();
    CPU.get_or_init(|| Device::open("cpu", 1).unwrap())
}

/// Model files.
pub fn models(input: &[u8]) -> bool {
    let path = written("x.safetensors", input);
    let (opened, copied) = match (Weights::open(&path), Weights::from_bytes(input)) {
        (Ok(opened), Ok(copied)) => (opened, copied),
        (Err(a), Err(b)) => {
            said(&a);
            said(&b);
            return false;
        }
        (opened, copied) => {
            panic!("from its file {:?}, from memory {:?}", opened.err(), copied.err())
        }
    };
    opened.config.check().unwrap();
    assert_eq!(opened.config, copied.config);
    let mut parameters = 0;
    for (name, shape) in opened.config.tensors() {
        let tensor = opened.get(&name);
        assert_eq!(tensor.shape(), shape, "{name}");
        assert!(tensor.data().iter().all(|v| v.is_finite()), "{name} holds what is no number");
        assert_eq!(tensor.data(), copied.get(&name).data(), "{name}");
        parameters += tensor.len();
    }
    assert_eq!(opened.parameters(), parameters);
    // An opened file is a network that works, or an error says why it is not. Large patches take a
    // minute and gigabytes, which is not a mistake.
    let works = Model::new(cpu(), &opened)
        .and_then(|model| if opened.config.patch <= 32 { model.warm_up() } else { Ok(()) });
    if let Err(e) = works {
        said(&e);
    }
    true
}

/// A ZIP archive of stored entries, as PyTorch writes them.
fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut out, mut directory): (Vec<u8>, Vec<u8>) = (vec![], vec![]);
    for &(name, bytes) in entries {
        let (size, length) =
            ((bytes.len() as u32).to_le_bytes(), (name.len() as u16).to_le_bytes());
        // Version, flags, method, time, date; the checksum, both sizes, the name's length and
        // nothing more.
        let fields = [
            &b"\x14\0\0\0\0\0\0\0\x21\0"[..],
            &crc32(bytes).to_le_bytes(),
            &size,
            &size,
            &length,
            &[0; 2],
        ]
        .concat();
        let at = (out.len() as u32).to_le_bytes();
        directory.extend(
            [&b"PK\x01\x02\x14\0"[..], &fields[..], &[0; 10], &at, name.as_bytes()].concat(),
        );
        out.extend([&b"PK\x03\x04"[..], &fields[..], name.as_bytes(), bytes].concat());
    }
    let count = (entries.len() as u16).to_le_bytes();
    let (size, at) = ((directory.len() as u32).to_le_bytes(), (out.len() as u32).to_le_bytes());
    let end = [&b"PK\x05\x06\0\0\0\0"[..], &count, &count, &size, &at, &[0; 2]].concat();
    [out, directory, end].concat()
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, b| {
        (0..8).fold(crc ^ u32::from(*b), |c, _| (c >> 1) ^ (0xedb8_8320 * (c & 1)))
    })
}

/// Checkpoints. The first byte says whether the rest is the file, or a pickle after two bytes with
/// its length, followed by the only storage of an archive: a checksum would keep changed pickles of
/// archives from being read.
pub fn checkpoints(input: &[u8]) -> bool {
    let Some((form, content)) = input.split_first() else { return false };
    let file = match content.split_first_chunk::<2>() {
        Some((length, rest)) if form % 2 == 1 => {
            let (pickle, storage) =
                rest.split_at(rest.len().min(usize::from(u16::from_le_bytes(*length))));
            let (order, version) = (&b"little"[..], &b"3\n"[..]);
            zip(&[
                ("archive/data.pkl", pickle),
                ("archive/byteorder", order),
                ("archive/data/0", storage),
                ("archive/version", version),
            ])
        }
        _ => content.to_vec(),
    };
    let path = written("x.pth", &file);
    let state = match checkpoint::read(&path) {
        Ok(state) => state,
        Err(e) => {
            said(&e);
            return false;
        }
    };
    assert!(!state.is_empty());
    for (name, entry) in &state {
        match entry.values() {
            Ok(Some(values)) => assert_eq!(Some(values.len()), extent(&entry.shape), "{name}"),
            Ok(None) => assert_eq!(entry.dtype, "another type", "{name}"),
            Err(e) => said(&e),
        }
    }
    true
}

/// Prompts files, and the same text as a value on the command line.
pub fn prompts(input: &[u8]) -> bool {
    if let Ok(text) = std::str::from_utf8(input) {
        on_the_command_line(text);
    }
    let path = written("x.json", input);
    let objects = match read_prompts(&path) {
        Ok(objects) => objects,
        Err(e) => {
            said(&e);
            return false;
        }
    };
    assert!(!objects.is_empty() && objects.iter().all(|o| !o.iterations.is_empty()));
    assert!(objects.len() == 1 || objects.iter().all(|o| o.name.is_some()));
    // Half a millimetre, rotated by 45 degrees about k: world coordinates mix, and grow.
    let turned = [[0.35, -0.35, 0.0, -7.0], [0.35, 0.35, 0.0, 3.0], [0.0, 0.0, -0.5, 1e3]];
    let grids = [scan(), Grid { size: [12, 1, 9], affine: Affine(turned) }];
    for iteration in objects.iter().flat_map(|o| &o.iterations) {
        for grid in &grids {
            [Space::Ijk, Space::Ras, Space::Lps]
                .into_iter()
                .for_each(|space| on_a_scan(iteration, grid, space));
        }
    }
    true
}

fn on_the_command_line(text: &str) {
    if let Ok(RawPoint { position, .. }) = text.parse() {
        assert!(position.iter().all(|v| v.is_finite()));
    }
    if let Ok(RawBox(bounds)) = text.parse() {
        assert!(bounds.iter().all(|v| v.is_finite()));
    }
    if let Ok(RawOutline(corners)) = text.parse() {
        assert!(corners.len() > 2 && corners.iter().flatten().all(|v| v.is_finite()));
    }
    if let Ok(target) = text.parse::<TargetLabel>() {
        assert_eq!(target.to_string().parse(), Ok(target));
    }
}

/// What must hold of an iteration's prompts on a scan: each is on it, or was refused.
fn on_a_scan(iteration: &Iteration, grid: &Grid, space: Space) {
    let mut prompts = Prompts::default();
    let mut results = vec![];
    results.extend(iteration.raw_points().map(|point| prompts.add_point(grid, point, space)));
    results.extend(iteration.raw_box().map(|bounds| prompts.set_box(grid, bounds, space)));
    results.extend(iteration.raw_lines().map(|line| prompts.add_line(grid, line, space)));
    results
        .extend(iteration.raw_outlines().map(|outline| prompts.add_lasso(grid, &outline, space)));
    for e in results.iter().filter_map(|r| r.as_ref().err()) {
        said(e);
    }
    assert!(
        prompts.points.iter().all(|(p, _)| (0..3).all(|a| p[a] < grid.size[a])),
        "{:?}",
        prompts.points
    );
    for b in [prompts.bounds, prompts.drawn].into_iter().flatten() {
        assert!((0..3).all(|a| b[a] < b[a + 3] && b[a + 3] <= grid.size[a]), "{b:?}");
    }
    if let Some(extent) = prompts.extent(grid) {
        assert!((0..3).all(|a| extent.low[a] < extent.high[a]));
    }
    // A box that was accepted was given, in numbers: it is never the result of an overflow.
    if let (Some(bounds), Some(RawBox(given)), Space::Ijk) =
        (prompts.bounds, iteration.raw_box(), space)
    {
        let cut = |f: usize| given[f].clamp(0.0, grid.size[f % 3] as f64);
        assert!((0..6).all(|f| bounds[f] as f64 == cut(f)), "{given:?} became {bounds:?}");
    }
}

/// Files of settings: of a training run (TOML), or of a network (JSON).
pub fn settings(input: &[u8]) -> bool {
    if input.trim_ascii_start().first() == Some(&b'{') {
        configuration(input)
    } else {
        training(input)
    }
}

fn configuration(input: &[u8]) -> bool {
    let path = written("x.json", input);
    let config = match network(path.to_str().unwrap()) {
        Ok(config) => config,
        Err(e) => {
            said(&e);
            return false;
        }
    };
    config.check().unwrap();
    let mut names: Vec<String> = vec![];
    for (name, shape) in config.tensors().into_iter().chain(config.unused()) {
        assert!(extent(&shape).is_some_and(|n| n > 0), "{name} is {shape:?}");
        names.push(name);
    }
    names.sort_unstable();
    assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "two tensors of one name");
    if let Some(i) = config.intensity {
        assert!([i.clip[0], i.clip[1], i.mean, i.sd].iter().all(|v| v.is_finite()), "{i:?}");
    }
    true
}

fn training(input: &[u8]) -> bool {
    let settings = match Given::read(&written("x.toml", input)) {
        Ok(given) => given.settings(),
        Err(e) => {
            said(&e);
            return false;
        }
    };
    if let Err(e) = settings.check() {
        said(&e);
        return false;
    }
    // What a run does with them before its first step.
    let total = settings.total_steps();
    assert!(total > 0);
    for step in [0, total / 2, total - 1] {
        let rate = settings.rate(step);
        assert!(rate >= 0.0, "the learning rate of step {step} is {rate}");
    }
    let mut rng = generator(settings.seed, &[]);
    for user in [settings.user(), settings.item_user(&mut rng)] {
        assert!(user.points[0] <= user.points[1]);
    }
    let _ = (settings.augmentation(), settings.weights(), settings.optimizer());
    true
}

/// States of training runs.
pub fn states(input: &[u8]) -> bool {
    let state = match State::open(&written("last.state.safetensors", input)) {
        Ok(state) => state,
        Err(e) => {
            said(&e);
            return false;
        }
    };
    let progress = &state.progress;
    progress.check().unwrap();
    let list = progress.config.tensors();
    assert_eq!(state.optimizer.moments().len(), list.len());
    assert_eq!(state.optimizer.steps(), progress.optimizer_steps);
    assert_eq!(
        state.average.as_ref().map(Vec::len),
        (progress.settings.ema > 0.0).then_some(list.len())
    );
    for (at, (name, shape)) in list.iter().enumerate() {
        let weight = state.weights.get(name);
        let [first, second] = &state.optimizer.moments()[at];
        assert_eq!(weight.shape(), shape, "{name}");
        assert_eq!([first.len(), second.len()], [weight.len(); 2], "{name}");
        let average = state.average.as_ref().map(|average| &average[at]);
        for tensor in [&*weight, first, second].into_iter().chain(average) {
            assert!(tensor.data().iter().all(|v| v.is_finite()), "{name} holds what is no number");
        }
        assert!(second.data().iter().all(|v| *v >= 0.0), "{name}: a mean of squares below 0");
    }
    let rate = progress.settings.rate(progress.step);
    assert!(rate >= 0.0, "the next learning rate is {rate}");
    true
}
