//! Files as people have them: whatever way a scan or a label is stored, it is the same scan and the
//! same label, or an error that names what it is.

mod common;

use common::{here, shared, tiny};
use prism::data::cases::list;
use prism::eval::metrics::dice;
use prism::model::{Weights, weights::Precision};
use prism::session::intensities;
use prism::volume::labels::{Labels, TargetLabel};
use prism::volume::{Affine, Modality, Volume};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn case(name: &str) -> PathBuf {
    here("tests/data/cases").join(name)
}

fn base() -> Volume {
    Volume::read(&case("base/scan.nii.gz"), None).unwrap()
}

fn object() -> Vec<u8> {
    Labels::read(&case("base/label.nii.gz"), &base().grid).unwrap().mask(&TargetLabel::Any).unwrap()
}

fn count(mask: &[u8]) -> usize {
    mask.iter().filter(|v| **v != 0).count()
}

fn prism(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_prism")).args(args).output().unwrap()
}

/// Runs `prism segment` with the small model; what it said on standard error, and the mask.
fn segment(image: &Path, folder: &Path, more: &[&str]) -> (String, Vec<u8>) {
    let (model, mask) = (here("models/small.safetensors"), folder.join("mask.nii.gz"));
    let mut args = vec![
        "segment",
        "-m",
        model.to_str().unwrap(),
        "-i",
        image.to_str().unwrap(),
        "-o",
        mask.to_str().unwrap(),
    ];
    args.extend(more);
    let out = prism(&args);
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.success(), "{args:?}: {said}");
    (said, Volume::read(&mask, None).unwrap().values().iter().map(|v| *v as u8).collect())
}

/// Runs `prism` to a failure; what it said.
#[track_caller]
fn refused(args: &[&str]) -> String {
    let out = prism(args);
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(!out.status.success() && !said.contains("panicked"), "{args:?}: {said}");
    said
}

/// What a program in C is told of a scan that it reads.
fn from_c(path: &Path) -> Result<prism::capi::prism_volume_info, prism::capi::prism_status> {
    use prism::capi::*;
    let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    let mut volume = std::ptr::null_mut();
    // SAFETY: everything is what it says; the structure is numbers.
    unsafe {
        match prism_volume_read(path.as_ptr(), -1, &mut volume) {
            prism_status::PRISM_OK => {}
            other => return Err(other),
        }
        let mut info =
            prism_volume_info { struct_size: size_of::<prism_volume_info>(), ..std::mem::zeroed() };
        assert_eq!(prism_volume_get_info(volume, &mut info), prism_status::PRISM_OK);
        assert_eq!(prism_volume_free(volume), prism_status::PRISM_OK);
        Ok(info)
    }
}

const BOX: &str = "8,7,3,34,35,8";

#[test]
fn every_way_of_storing_a_scan_is_the_same_scan() {
    let base = base();
    for (name, volume, words) in [
        ("scan.mha", None, None),
        ("scan.mhd", None, None),
        ("sform_without_scale.nii.gz", None, Some("the qform is used")),
        ("nrrd-4d-of-itk/sitk4d_one.nrrd", None, Some("taken for LPS")),
        ("nrrd-4d-of-itk/sitk4d.nrrd", Some(0), Some("taken for LPS")),
        ("nrrd-4d-of-itk/sitk4d.nrrd", Some(1), Some("taken for LPS")),
        ("nrrd-byte-skip-minus-one/bs.nhdr", None, None),
        ("nrrd-line-skip/ls.nhdr", None, None),
        ("nrrd-microns/scan.nrrd", None, Some("'microns'")),
        ("nrrd-several-files/multi.nhdr", None, None),
        ("nrrd-several-files/list.nhdr", None, None),
    ] {
        let scan = Volume::read(&case(name), volume).unwrap();
        assert!(scan.values() == base.values(), "{name}: other voxels");
        let steps = [scan.grid.spacing(), base.grid.spacing()];
        assert!((0..3).all(|a| (steps[0][a] - steps[1][a]).abs() < 1e-4), "{name}: {steps:?}");
        assert!((scan.grid.voxel_ml() - base.grid.voxel_ml()).abs() < 1e-6, "{name}");
        // Only the file whose sform was spoilt lies elsewhere.
        assert!(
            name.starts_with("sform")
                || scan.grid.affine.distance(&base.grid.affine, base.grid.size) < 1e-2,
            "{name}"
        );
        assert_eq!(
            scan.warnings.first().map(|w| words.is_some_and(|words| w.contains(words))),
            words.map(|_| true),
            "{name}: {:?}",
            scan.warnings
        );
    }
    for name in [
        "scan.mha",
        "scan.mhd",
        "nrrd-line-skip/ls.nhdr",
        "nrrd-several-files/list.nhdr",
        "nrrd-microns/scan.nrrd",
    ] {
        let c = from_c(&case(name)).unwrap();
        assert!(
            c.size == base.grid.size
                && (c.spacing[2] - 5.0).abs() < 1e-4
                && c.range == base.range(),
            "{name}"
        );
    }
    assert_eq!(
        from_c(&case("foreign-formats/scan.mgz")).err(),
        Some(prism::capi::prism_status::PRISM_FILE)
    );
    assert!(
        Volume::read(&case("nrrd-4d-of-itk/sitk4d.nrrd"), None)
            .unwrap_err()
            .to_string()
            .contains("--volume 0 to 1")
    );
    let plain = Volume::read(&case("foreign-formats/scan.nii.gz"), None).unwrap();
    assert_eq!(
        Volume::read(&case("foreign-formats/scan.nii.bz2"), None).unwrap().values(),
        plain.values()
    );
}

#[test]
fn gzip_with_bytes_behind_it_and_pipes_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.nii.gz");
    let bytes = std::fs::read(case("base/scan.nii.gz")).unwrap();
    std::fs::write(&path, [&bytes[..], b"some padding"].concat()).unwrap();
    let scan = Volume::read(&path, None).unwrap();
    assert!(
        scan.values() == base().values() && scan.warnings[0].contains("follow the packed stream"),
        "{:?}",
        scan.warnings
    );
    // Runs of zeros shrink further by bzip2 than by anything.
    let header = "NRRD0004\ntype: uchar\ndimension: 3\nspace: LPS\nsizes: 256 256 400\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nencoding: raw\n\n";
    let mut bzip2 = bzip2::write::BzEncoder::new(vec![], bzip2::Compression::best());
    std::io::Write::write_all(&mut bzip2, &[header.as_bytes(), &vec![0; 256 * 256 * 400]].concat())
        .unwrap();
    std::fs::write(&path, bzip2.finish().unwrap()).unwrap();
    assert_eq!(Volume::read(&path, None).unwrap().grid.size, [256, 256, 400]);
    #[cfg(unix)]
    {
        assert!(
            Volume::read(Path::new("/dev/zero"), None)
                .unwrap_err()
                .to_string()
                .contains("is a device")
        );
        let pipe = folder.path().join("pipe.nii.gz");
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let to = pipe.clone();
        let writer = std::thread::spawn(move || std::fs::write(to, bytes).unwrap());
        assert!(Volume::read(&pipe, None).unwrap().values() == base().values());
        writer.join().unwrap();
    }
}

#[test]
fn a_field_that_is_not_understood_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let header = "NRRD0004\ntype: short\ndimension: 3\nspace: LPS\nsizes: 2 3 4\nspace directions: (2,0,0) (0,2,0) (0,0,5)\nendian: little\nencoding: raw\n";
    let read = |header: String, voxels: &[u8]| {
        let path = folder.path().join("a.nrrd");
        std::fs::write(&path, [header.as_bytes(), b"\n", voxels].concat()).unwrap();
        Volume::read(&path, None)
    };
    let voxels: Vec<u8> = (0..24i16).flat_map(i16::to_le_bytes).collect();
    let plain = read(header.into(), &voxels).unwrap();
    let refused =
        |from: &str, to: &str| read(header.replace(from, to), &voxels).unwrap_err().to_string();
    assert!(refused("endian", "block size").contains("'block size'"));
    assert!(refused("encoding: raw", "encoding: hex").contains("'hex'"));
    assert!(refused("space: LPS", "space: upside-down").contains("'upside-down'"));
    assert!(refused("dimension: 3", "dimension: 4").contains("dimension is 4"));
    assert!(refused("endian", "space units: \"furlongs\"\nendian").contains("'furlongs'"));
    assert!(refused("endian", "byte skip: -2\nendian").contains("'byte skip' is '-2'"));
    assert!(refused("endian", "line skip: 99\nendian").contains("'line skip' is 99"));
    assert!(refused("endian", "data file: ../a.raw\nendian").contains("own folder"));
    let wrapping = "5\nspace directions: none none (2,0,0) (0,2,0) (0,0,5)\nsizes: 3 12297829382473034411 2 3 4\nlabels:";
    let error = refused("3\nspace: LPS\nsizes: 2 3 4\nspace directions:", wrapping);
    assert!(error.contains("too many voxels"), "{error}");
    let quantised = read(header.replace("endian", "old max: 3\nendian"), &voxels).unwrap();
    assert!(quantised.warnings[0].contains("'old max'"));
    let centimetres =
        read(header.replace("endian", "space units: \"cm\" \"cm\" \"cm\"\nendian"), &voxels)
            .unwrap();
    assert_eq!(centimetres.grid.spacing(), [20.0, 20.0, 50.0]);
    assert!(
        refused("endian: little", "byte skip:24\nendian: little")
            .contains("'byte skip:24', which is no field")
    );
    assert!(refused("endian: little", "endian: big-endian").contains("'endian' is 'big-endian'"));
    let micrometres =
        read(header.replace("endian", "space units: um um um\nendian"), &voxels).unwrap();
    assert!(
        (micrometres.grid.spacing()[2] - 0.005).abs() < 1e-12
            && micrometres.warnings[0].contains("'um'")
    );
    let skipped = read(
        header.replace("raw", "ascii").replace("endian", "byte skip: 6\nendian"),
        b"7 8 9 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23",
    )
    .unwrap();
    assert!(skipped.values() == plain.values());
    let kinds = "NRRD0004\ntype: short\ndimension: 4\nsizes: 1 2 3 4\nkinds: list domain domain domain\nspacings: nan 2 2 5\nendian: little\nencoding: raw\n";
    let listed = read(kinds.into(), &voxels).unwrap();
    assert!(listed.values() == plain.values() && listed.grid.spacing() == [2.0, 2.0, 5.0]);
    let mut gz = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    std::io::Write::write_all(&mut gz, &voxels).unwrap();
    let padded =
        read(header.replace("raw", "gzip"), &[&gz.finish().unwrap()[..], &[0; 7]].concat())
            .unwrap();
    assert!(
        padded.values() == plain.values()
            && padded.warnings[0].contains("follow the packed stream"),
        "{:?}",
        padded.warnings
    );
    let text: Vec<String> = (0..24).map(|v| v.to_string()).collect();
    let ascii = read(header.replace("raw", "ascii"), text.join(" ").as_bytes()).unwrap();
    let mut bzip2 = bzip2::write::BzEncoder::new(vec![], bzip2::Compression::fast());
    std::io::Write::write_all(&mut bzip2, &voxels).unwrap();
    let packed = read(header.replace("raw", "bzip2"), &bzip2.finish().unwrap()).unwrap();
    assert!(plain.values() == ascii.values() && plain.values() == packed.values());
}

#[test]
fn what_is_no_image_is_named_with_a_way_out_on_every_input() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let mut dicom = vec![0u8; 200];
    dicom[128..132].copy_from_slice(b"DICM");
    let cases = [
        (case("foreign-formats/analyze.hdr"), "Analyze 7.5"),
        (case("foreign-formats/analyze.img"), "Analyze 7.5"),
        (case("foreign-formats/scan.mgz"), "mri_convert"),
        (case("foreign-formats/scan.npy"), "NumPy"),
        (case("foreign-formats/scan.npz"), "ZIP"),
        (here("docs/steering.png"), "PNG"),
        (here("models/small.safetensors"), "model"),
        (at("a.dcm", &dicom), "is a DICOM file"),
        (at("a.json", b"\xef\xbb\xbf {}"), "JSON"),
        (at("empty.nii", b""), "is empty"),
        (at("noise.nii", &[7; 64]), "not recognised"),
        (folder.path().to_path_buf(), "is a folder"),
    ];
    let (model, scan, out) = (
        here("models/small.safetensors"),
        case("base/scan.nii.gz"),
        folder.path().join("o.nii.gz"),
    );
    let text = |p: &Path| p.to_str().unwrap().to_string();
    let (model, scan, out, label) =
        (text(&model), text(&scan), text(&out), text(&case("base/label.nii.gz")));
    for (path, words) in cases {
        let file = text(&path);
        let error = Volume::read(&path, None).unwrap_err().to_string();
        assert!(error.starts_with(&file) && error.contains(words), "{error}");
        let error = Labels::read(&path, &base().grid).err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
        for args in [
            vec!["segment", "-m", &model, "-i", &file, "-o", &out, "--box", BOX],
            vec!["segment", "-m", &model, "-i", &scan, "-o", &out, "--mask", &file],
            vec!["metrics", "--truth", &file, "--prediction", &scan],
            vec!["metrics", "--truth", &label, "--prediction", &file],
        ] {
            assert!(refused(&args).contains(words), "{args:?}");
        }
        // A model or a prompts file is something else again.
        if file != model {
            assert!(
                refused(&["segment", "-m", &file, "-i", &scan, "-o", &out, "--box", BOX])
                    .contains(&file)
            );
        }
    }
    let error = refused(&[
        "convert",
        &text(&case("scan.mha")),
        &text(&folder.path().join("m.safetensors")),
    ]);
    assert!(error.contains("a MetaImage, expected a PyTorch checkpoint"), "{error}");
    let error = refused(&["segment", "-m", &scan, "-i", &scan, "-o", &out, "--box", BOX]);
    assert!(error.contains("packed by gzip, expected a model"), "{error}");
    let error = refused(&["segment", "-m", &model, "-i", &scan, "-o", &out, "--prompts", &scan]);
    assert!(error.contains("a NIfTI image, expected a JSON list"), "{error}");
    assert!(!Path::new(&out).exists());
}

#[test]
fn labels_are_not_read_as_scans() {
    let (grid, object) = (base().grid, object());
    let read = |name: &str| Labels::read(&case(name), &grid).unwrap();
    let any = |labels: &Labels| labels.mask(&TargetLabel::Any).unwrap();
    let named = |name: &str| TargetLabel::Name(name.into());
    // NaN is nothing.
    let nan = read("mask-with-nan/nan.nii.gz");
    assert!(any(&nan) == object && nan.warnings[0].contains("hold no number"));
    assert_eq!(count(&any(&read("mask-with-nan/nans.nii.gz"))), 7);
    // Of several labels one is picked, and that there are several is said.
    let several = read("mask-of-several-labels/organ_tumour.nii.gz");
    assert!(
        several.mask(&TargetLabel::Value(2)).unwrap() == object
            && count(&any(&several)) > count(&object)
    );
    assert!(several.several("--mask-label").unwrap().contains("1 (13563 voxels), 2 (837 voxels)"));
    assert!(
        several.mask(&named("tumour")).unwrap_err().to_string().contains("names no structures")
    );
    // A segment is cropped to its extent, and lies where it was.
    let cropped = read("cropped.seg.nrrd");
    assert!(any(&cropped) == object && cropped.mask(&named("tumour")).unwrap() == object);
    // Segments that overlap lie in layers, and have names.
    let layers = read("two_layers.seg.nrrd");
    assert!(
        layers.mask(&named("tumour")).unwrap() == object
            && layers.mask(&named("shifted")).unwrap() != object
    );
    for target in [TargetLabel::Any, named("liver"), TargetLabel::Value(1)] {
        assert!(
            layers.mask(&target).unwrap_err().to_string().contains("'tumour', 'shifted'"),
            "{target}"
        );
    }
    assert_eq!(count(&any(&read("mask-empty-with-a-point/empty.nii.gz"))), 0);
    // Several volumes without names are no label image, and --volume is not for labels.
    let error = Labels::read(&case("nrrd-4d-of-itk/sitk4d.nrrd"), &grid).err().unwrap().to_string();
    assert!(error.contains("a label image holds one") && !error.contains("--volume"), "{error}");
    // A label that copied the sform which the scan itself is not placed by.
    let scan = Volume::read(&case("sform_without_scale.nii.gz"), None).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("label.nrrd");
    let mut values = vec![0u8; scan.grid.voxels()];
    values[100] = 1;
    nrrd(
        &path,
        scan.grid.size,
        &Affine([[-1.0, 0.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]),
        &values,
    );
    let copied = Labels::beside(&path, &scan).map(|l| (l.counts(), l.warnings));
    let (counts, warnings) = copied.unwrap_or_else(|e| panic!("{e}"));
    assert!(counts[&1] == 1 && warnings[0].contains("the scan's sform says"), "{warnings:?}");
}

/// Writes an image of bytes, or of 16-bit numbers, as NRRD.
fn nrrd(path: &Path, size: [usize; 3], affine: &Affine, values: &[u8]) {
    let kind = if values.len() == size.iter().product::<usize>() { "uchar" } else { "short" };
    let vector = |a: usize| format!("({},{},{})", affine.0[0][a], affine.0[1][a], affine.0[2][a]);
    let header = format!(
        "NRRD0004\ntype: {kind}\nendian: little\ndimension: 3\nspace: RAS\nsizes: {} {} {}\nspace directions: {} {} {}\nspace origin: {}\nencoding: raw\n\n",
        size[0],
        size[1],
        size[2],
        vector(0),
        vector(1),
        vector(2),
        vector(3)
    );
    std::fs::write(path, [header.as_bytes(), values].concat()).unwrap();
}

#[test]
fn a_label_of_other_axes_is_the_same_label() {
    let (grid, object) = (base().grid, object());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("label.nrrd");
    for (axes, flips) in [
        ([2, 0, 1], [false; 3]),
        ([0, 1, 2], [true, false, true]),
        ([1, 2, 0], [true, true, false]),
    ] {
        let size = axes.map(|a| grid.size[a]);
        let mut affine = Affine([[0.0; 4]; 3]);
        for r in 0..3 {
            affine.0[r][3] = grid.affine.0[r][3];
            for a in 0..3 {
                let (step, last) = (grid.affine.0[r][axes[a]], size[a] as f64 - 1.0);
                affine.0[r][a] = if flips[a] { -step } else { step };
                affine.0[r][3] += if flips[a] { step * last } else { 0.0 };
            }
        }
        let mut values = vec![];
        for k in 0..size[2] {
            for j in 0..size[1] {
                for i in 0..size[0] {
                    let mut at = [0; 3];
                    for (a, v) in [i, j, k].into_iter().enumerate() {
                        at[axes[a]] = if flips[a] { size[a] - 1 - v } else { v };
                    }
                    values.push(object[(at[0] * grid.size[1] + at[1]) * grid.size[2] + at[2]]);
                }
            }
        }
        nrrd(&path, size, &affine, &values);
        assert!(
            Labels::read(&path, &grid).unwrap().mask(&TargetLabel::Any).unwrap() == object,
            "{axes:?} {flips:?}"
        );
        let out = prism(&[
            "metrics",
            "--truth",
            case("base/label.nii.gz").to_str().unwrap(),
            "--prediction",
            path.to_str().unwrap(),
            "--json",
        ]);
        let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(json["dice"], 1.0);
        // Half a voxel off is another place.
        affine.0[0][3] += 0.5 * grid.spacing()[0];
        nrrd(&path, size, &affine, &values);
        assert!(
            Labels::read(&path, &grid)
                .err()
                .unwrap()
                .to_string()
                .contains("resample it onto the scan")
        );
    }
}

#[test]
fn masks_and_scribbles_are_understood_by_the_command() {
    let folder = tempfile::tempdir().unwrap();
    let (scan, object) = (case("base/scan.nii.gz"), object());
    let text = |name: &str| case(name).to_str().unwrap().to_string();
    let (several, layers, cropped) = (
        text("mask-of-several-labels/organ_tumour.nii.gz"),
        text("two_layers.seg.nrrd"),
        text("cropped.seg.nrrd"),
    );
    let given = |more: &[&str]| segment(&scan, folder.path(), more);
    let (said, mask) = given(&["--mask", &several]);
    assert!(said.contains("several labels") && count(&mask) > count(&object), "{said}");
    for (file, label) in [(&several, "2"), (&layers, "tumour"), (&cropped, "any")] {
        let (said, mask) = given(&["--mask", file, "--mask-label", label]);
        assert!(mask == object && said.is_empty(), "{file}: {said}");
    }
    let (said, mask) = given(&["--mask", &text("mask-with-nan/nan.nii.gz")]);
    assert!(mask == object && said.contains("hold no number"), "{said}");
    let (said, mask) = given(&["--scribble", &text("mask-with-nan/nans.nii.gz")]);
    assert!(count(&mask) < 3 * count(&object) && said.contains("hold no number"), "{said}");
    // In a prompts file too; an error names the iteration.
    let prompts = folder.path().join("prompts.json");
    std::fs::write(
        &prompts,
        format!("\u{feff}[{{\"mask\": {layers:?}, \"mask_label\": \"tumour\"}}]"),
    )
    .unwrap();
    assert!(given(&["--prompts", prompts.to_str().unwrap()]).1 == object);
    std::fs::write(&prompts, format!("[{{\"points\": [{{\"position\": [17,19,5]}}]}}, {{\"mask\": {several:?}, \"mask_label\": 7}}]"))
        .unwrap();
    let out = folder.path().join("o.nii.gz");
    let (model, image) = (here("models/small.safetensors"), scan.to_str().unwrap());
    let start =
        ["segment", "-m", model.to_str().unwrap(), "-i", image, "-o", out.to_str().unwrap()];
    let error = refused(&[&start[..], &["--prompts", prompts.to_str().unwrap()]].concat());
    assert!(
        error.contains("iteration 2: ") && error.contains("no voxel has label 7: it holds [1, 2]"),
        "{error}"
    );
    // An empty mask says nothing.
    for prompt in [["--point", "17,19,5"], ["--box", BOX]] {
        let alone = given(&prompt).1;
        let (said, with) = given(
            &[&prompt[..], &["--mask", &text("mask-empty-with-a-point/empty.nii.gz")]].concat(),
        );
        assert!(alone == with && said.contains("marks no voxel"), "{said}");
    }
    // A box over the scan's faces ends there.
    let (said, over) = given(&["--box", "8,7,3,34,35,12"]);
    assert!(
        over == given(&["--box", "8,7,3,34,35,11"]).1 && said.contains("reaches beyond the scan"),
        "{said}"
    );
    let (said, _) = given(&["--box", BOX, "--spacing", "20"]);
    assert!(said.contains("only a few voxels"), "{said}");
}

#[test]
fn one_voxel_does_not_decide_what_a_scan_is() {
    let read = |name: &str| Volume::read(&case("mr-one-negative-voxel").join(name), None).unwrap();
    let small = Weights::open(&here("models/small.safetensors")).unwrap().config.intensity;
    let of = |image: &Volume| intensities(image, small);
    let (mr, odd) = (of(&read("mr.nii.gz")), of(&read("mr_one_negative.nii.gz")));
    assert_eq!(
        (mr.modality, odd.modality, of(&base()).modality),
        (Modality::Mr, Modality::Mr, Modality::Ct)
    );
    assert!((mr.normalization.mean / odd.normalization.mean - 1.0).abs() < 1e-3);
    // What was said counts.
    let mut said = base();
    said.description.modality = Some(Modality::Mr);
    assert!(
        of(&said).modality == Modality::Mr && of(&said).normalization != of(&base()).normalization
    );
    let folder = tempfile::tempdir().unwrap();
    let bounds = ["--box", "8,0,4,57,64,13"];
    let [a, b] = ["mr.nii.gz", "mr_one_negative.nii.gz"]
        .map(|n| segment(&case("mr-one-negative-voxel").join(n), folder.path(), &bounds).1);
    assert!(dice(&a, &b) > 0.98, "{}", dice(&a, &b));
    let image = case("base/scan.nii.gz");
    let (model, mask) = (here("models/small.safetensors"), folder.path().join("m.nii.gz"));
    for (more, modality, words) in
        [(vec![], "ct", "below -50"), (vec!["--modality", "pet"], "pet", "as was said")]
    {
        let args = [
            "segment",
            "-m",
            model.to_str().unwrap(),
            "-i",
            image.to_str().unwrap(),
            "-o",
            mask.to_str().unwrap(),
            "--box",
            BOX,
            "--json",
        ];
        let json: serde_json::Value =
            serde_json::from_slice(&prism(&[&args[..], &more].concat()).stdout).unwrap();
        let intensity = &json["intensity"];
        assert!(
            intensity["modality"] == modality
                && intensity["decided"].as_str().unwrap().contains(words),
            "{intensity}"
        );
    }
    // Nothing to see is said.
    let n = base().grid.voxels();
    let of_values = |value: &dyn Fn(usize) -> f32| {
        Volume::new(base().grid, (0..n).map(value).collect(), base().description).unwrap()
    };
    let flat = of_values(&|_| 3.0);
    assert!(of(&flat).warning.unwrap().contains("every voxel is 3"));
    // A PET: a dim body on air, and a hot spot.
    let pet = of_values(&|at| if at % 50 == 0 { 9.0 } else { 0.9 + (at % 17) as f32 / n as f32 });
    assert_eq!(of(&pet).modality, Modality::Pet);
}

#[test]
fn outside_the_scan_is_what_lies_at_its_face() {
    // A scan whose face cuts the object, and the same with its edge repeated: the same answer.
    let folder = tempfile::tempdir().unwrap();
    let path = case("cut-by-the-border/lung.nii.gz");
    let scan = Volume::read(&path, None).unwrap();
    let pad = 20usize;
    let size = [scan.grid.size[0] + pad, scan.grid.size[1], scan.grid.size[2]];
    let mut affine = scan.grid.affine;
    (0..3).for_each(|r| affine.0[r][3] -= pad as f64 * affine.0[r][0]);
    let mut values = vec![];
    for k in 0..size[2] {
        for j in 0..size[1] {
            (0..size[0]).for_each(|i| {
                values.extend((scan.at([i.saturating_sub(pad), j, k]) as i16).to_le_bytes())
            });
        }
    }
    let padded = folder.path().join("padded.nrrd");
    nrrd(&padded, size, &affine, &values);
    let cut = segment(&path, folder.path(), &["--box", "0,16,5,13,39,10"]).1;
    let whole = segment(&padded, folder.path(), &["--box", "20,16,5,33,39,10"]).1;
    let [_, nj, nk] = scan.grid.size;
    assert!(count(&cut) > 100);
    let same = dice(&cut, &whole[pad * nj * nk..]);
    assert!(same > 0.97, "Dice {same}");
}

#[test]
fn three_points_in_three_lesions_mark_three() {
    let folder = tempfile::tempdir().unwrap();
    let path = case("three-lesions/scan.nii.gz");
    let grid = Volume::read(&path, None).unwrap().grid;
    let truth = Labels::read(&case("three-lesions/label.nii.gz"), &grid)
        .unwrap()
        .mask(&TargetLabel::Any)
        .unwrap();
    let points = ["14,14,8", "56,56,20", "14,56,14"];
    let at_once = segment(&path, folder.path(), &points.map(|p| ["--point", p]).concat()).1;
    let prompts = folder.path().join("p.json");
    let one = |p: &str| format!("{{\"points\": [{{\"position\": [{p}]}}]}}");
    std::fs::write(&prompts, format!("[{}]", points.map(one).join(","))).unwrap();
    let in_turn = segment(&path, folder.path(), &["--prompts", prompts.to_str().unwrap()]).1;
    for (mask, how) in [(at_once, "at once"), (in_turn, "in turn")] {
        assert!(dice(&mask, &truth) > 0.75, "{how}: Dice {}", dice(&mask, &truth));
    }
}

#[test]
fn a_scan_of_something_small_is_looked_at_as_such() {
    // The example scan as a tissue block of 0.9 mm, and as one of a tenth of that: the same answer,
    // and no block.
    let folder = tempfile::tempdir().unwrap();
    let scan = Volume::read(&here("examples/data/lung1_image.nii.gz"), None).unwrap();
    let values: Vec<u8> = {
        let [ni, nj, nk] = scan.grid.size;
        let order =
            (0..nk).flat_map(|k| (0..nj).flat_map(move |j| (0..ni).map(move |i| [i, j, k])));
        order.flat_map(|v| (scan.at(v) as i16).to_le_bytes()).collect()
    };
    let masks = [1e-2, 1e-3].map(|scale: f64| {
        let affine = Affine(scan.grid.affine.0.map(|row| row.map(|v| v * scale)));
        let path = folder.path().join("small.nhdr");
        nrrd(&path, scan.grid.size, &affine, &values);
        segment(&path, folder.path(), &["--point", "80,80,14"]).1
    });
    assert!(
        masks[0] == masks[1] && (100..20_000).contains(&count(&masks[0])),
        "{} and {} voxels",
        count(&masks[0]),
        count(&masks[1])
    );
}

#[test]
fn a_box_of_one_slice_finds_the_object() {
    for (folder, bounds, least) in
        [("lung1_full", "205,346,33,231,370,34", 0.75), ("sts_028", "53,52,34,116,120,35", 0.65)]
    {
        let Some(place) = shared(&format!("data/{folder}")) else { return };
        let image = place.join("image.nii.gz");
        let grid = Volume::read(&image, None).unwrap().grid;
        let truth = Labels::read(&place.join("label.nii.gz"), &grid)
            .unwrap()
            .mask(&TargetLabel::Any)
            .unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let (said, mask) = segment(&image, scratch.path(), &["--box", bounds]);
        assert!(
            dice(&mask, &truth) > least && said.contains("one slice thick"),
            "{folder}: Dice {}; {said}",
            dice(&mask, &truth)
        );
    }
}

#[test]
fn data_sets_of_nnunet_and_of_several_channels_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let nnunet = case("nnunet-v2-dataset");
    let cases = list(&nnunet, None).unwrap();
    assert_eq!(cases.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["case_001", "case_002"]);
    assert!(
        cases[0].image.ends_with("imagesTr/case_001_0000.nii.gz")
            && cases[0].label.ends_with("labelsTr/case_001.nii.gz")
    );
    // Train and judge, through the command; what the run was trained for is what it is judged on.
    let text = |p: &Path| p.to_str().unwrap().to_string();
    let (model, run, out) = (at("m.safetensors"), text(&at("run")), text(&at("out")));
    Weights::hashed(tiny(), "cases").save(&model, Precision::F32).unwrap();
    let settings = [
        "--epochs",
        "1",
        "--steps",
        "1",
        "--batch",
        "1",
        "--iterations",
        "1",
        "--validation-cases",
        "0",
        "--target",
        "1",
        "--channel",
        "0",
    ];
    let trained = prism(
        &[
            &["train", "--init", &text(&model), "--data", &text(&nnunet), "--out", &run],
            &settings[..],
        ]
        .concat(),
    );
    assert!(trained.status.success(), "{}", String::from_utf8_lossy(&trained.stderr));
    let last = text(&at("run/last.safetensors"));
    let judged = prism(&[
        "eval",
        "-m",
        &last,
        "-d",
        &text(&nnunet),
        "-o",
        &out,
        "--protocol",
        "plain",
        "--iterations",
        "1",
    ]);
    let said = String::from_utf8(judged.stderr).unwrap();
    assert!(
        judged.status.success()
            && said.contains("--target 1 is taken")
            && said.contains("has learned from 1 of these 2 cases"),
        "{said}"
    );
    // Two channels: one has to be picked.
    for name in ["imagesTr", "labelsTr"] {
        std::fs::create_dir_all(at("two").join(name)).unwrap();
    }
    let copy = |from: &str, to: &str| std::fs::copy(nnunet.join(from), at("two").join(to)).unwrap();
    copy("labelsTr/case_001.nii.gz", "labelsTr/case_001.nii.gz");
    for channel in ["0000", "0001"] {
        copy("imagesTr/case_001_0000.nii.gz", &format!("imagesTr/case_001_{channel}.nii.gz"));
    }
    assert!(
        list(&at("two"), None)
            .unwrap_err()
            .to_string()
            .contains("channels 0, 1: pick one with --channel")
    );
    assert!(list(&at("two"), Some(1)).unwrap()[0].image.ends_with("case_001_0001.nii.gz"));
    assert!(list(&at("two"), Some(2)).unwrap_err().to_string().contains("no channel 2"));
    // One file of several volumes, as the decathlon has them, and what its JSON says they are.
    std::fs::create_dir_all(at("msd")).unwrap();
    std::fs::copy(case("nrrd-4d-of-itk/sitk4d.nrrd"), at("msd/a.nrrd")).unwrap();
    std::fs::copy(case("base/label.nii.gz"), at("msd/a_label.nii.gz")).unwrap();
    for odd in [
        r#"{"modality": "CT", "training""#,
        r#"{"modality": {"0": "CT"}, "channel_names": {"1": "T1w"}, "training""#,
    ] {
        std::fs::write(
            at("msd/dataset.json"),
            format!(r#"{odd}: [{{"image": "a.nrrd", "label": "a_label.nii.gz"}}]}}"#),
        )
        .unwrap();
        assert_eq!(
            list(&at("msd"), Some(1)).unwrap()[0].modality,
            odd.contains("T1w").then_some(Modality::Mr)
        );
    }
    std::fs::copy(at("msd/a.nrrd"), at("two/imagesTr/CASE_002_0000.NRRD")).unwrap();
    std::fs::copy(case("base/label.nii.gz"), at("two/labelsTr/CASE_002.Nii.GZ")).unwrap();
    assert_eq!(list(&at("two"), Some(0)).unwrap()[0].name, "CASE_002");
    let json = r#"{"modality": {"0": "CT", "1": "T1w"}, "training": [{"image": "a.nrrd", "label": "a_label.nii.gz"}]}"#;
    std::fs::write(at("msd/dataset.json"), json).unwrap();
    let error =
        list(&at("msd"), None).unwrap()[0].read(&TargetLabel::Any).err().unwrap().to_string();
    assert!(error.contains("pick one with --channel 0 to 1"), "{error}");
    let cases = list(&at("msd"), Some(1)).unwrap();
    let loaded = cases[0].read(&TargetLabel::Any).unwrap();
    assert!(
        loaded.image.values() == base().values()
            && loaded.image.description.modality == Some(Modality::Mr)
    );
}

#[test]
fn metrics_say_what_was_compared() {
    let text = |name: &str| case(name).to_str().unwrap().to_string();
    let (label, several, empty) = (
        text("base/label.nii.gz"),
        text("mask-of-several-labels/organ_tumour.nii.gz"),
        text("mask-empty-with-a-point/empty.nii.gz"),
    );
    let run = |args: &[&str]| {
        let out = prism(&[&["metrics", "--json"], args].concat());
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(out.status.success(), "{said}");
        (serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap(), said)
    };
    // A mask of 1 against label 2 of the truth.
    let (json, said) = run(&["--truth", &several, "--prediction", &label, "--target", "2"]);
    assert!(
        json["dice"] == 1.0 && said.contains("its one label, 1, is taken for the label 2"),
        "{said}"
    );
    let (json, said) = run(&[
        "--truth",
        &several,
        "--prediction",
        &several,
        "--target",
        "2",
        "--prediction-target",
        "1",
    ]);
    assert!(json["dice"] == 0.0 && said.is_empty(), "{said}");
    let (json, said) = run(&["--truth", &several, "--prediction", &several, "--target", "5"]);
    assert!(
        json["dice"] == 1.0 && said.matches("no voxel has label 5: it holds [1, 2]").count() == 2,
        "{said}"
    );
    let (_, said) = run(&["--truth", &several, "--prediction", &several]);
    assert!(said.contains("--target picks one"), "{said}");
    let (json, said) = run(&["--truth", &empty, "--prediction", &empty]);
    assert!(
        json["dice"] == 1.0 && json["nsd_mm"]["5"] == 1.0 && json["hausdorff_95_mm"] == 0.0,
        "{json}"
    );
    assert!(said.contains("no voxel is marked"), "{said}");
    let (json, _) = run(&["--truth", &label, "--prediction", &empty]);
    assert!(
        json["dice"] == 0.0 && json["nsd_mm"]["5"] == 0.0 && json["hausdorff_95_mm"].is_null(),
        "{json}"
    );
    let (json, said) = run(&["--truth", &label, "--prediction", &text("mask-with-nan/nan.nii.gz")]);
    assert!(json["dice"] == 1.0 && said.contains("hold no number"), "{said}");
    let (json, said) =
        run(&["--truth", &text("cropped.seg.nrrd"), "--prediction", &label, "--target", "tumour"]);
    assert!(
        json["dice"] == 1.0 && said.contains("its one label, 1, is taken for the label tumour"),
        "{said}"
    );
    let (json, _) = run(&[
        "--truth",
        &label,
        "--prediction",
        &text("two_layers.seg.nrrd"),
        "--prediction-target",
        "tumour",
    ]);
    assert_eq!(json["dice"], 1.0);
}

#[test]
fn a_model_is_the_same_file_each_time() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str| {
        let path = folder.path().join(name);
        Weights::hashed(tiny(), "same").save(&path, Precision::F32).unwrap();
        std::fs::read(path).unwrap()
    };
    let first = write("0");
    assert!((1..12).all(|n| write(&n.to_string()) == first));
}

/// Every writer, on names and places of all kinds: the file is whole and alone, or nothing changed
/// and an error says so.
#[test]
fn every_writer_is_whole_or_changes_nothing() {
    use prism::challenge::{npy::of_bytes, npz};
    use prism::output::write_text;
    use prism::picture::Picture;
    use prism::volume::{metaimage, write_mask, write_probability, write_scan};
    type Writer = Box<dyn Fn(&Path) -> Result<(), String>>;
    let folder = tempfile::tempdir().unwrap();
    let scan = std::sync::Arc::new(base());
    let (mask, object) = (object(), object());
    let image = metaimage::read(&case("scan.mha")).unwrap();
    let committed = |p: Result<prism::output::Pending, prism::volume::VolumeError>| {
        p.map_err(|e| e.to_string()).and_then(|p| p.commit().map_err(|e| e.to_string()))
    };
    let of = |f: fn(
        &Path,
        &Volume,
        &[u8],
    ) -> Result<prism::output::Pending, prism::volume::VolumeError>|
     -> Writer {
        let (scan, mask) = (scan.clone(), mask.clone());
        Box::new(move |p| committed(f(p, &scan, &mask)))
    };
    let writers: Vec<(&str, Writer)> = vec![
        ("mask", of(write_mask)),
        (
            "probability",
            of(|p, scan, mask| {
                write_probability(p, scan, &mask.iter().map(|v| *v as f32).collect::<Vec<_>>())
            }),
        ),
        ("scan", of(|p, scan, _| write_scan(p, scan))),
        ("MetaImage", Box::new(move |p| committed(metaimage::write_mask(p, &image, &object)))),
        (
            "archive",
            Box::new(move |p| committed(npz::write(p, &[("a", of_bytes(&[2], &[1, 2]))], true))),
        ),
        (
            "model",
            Box::new(|p| {
                Weights::hashed(tiny(), "w").save(p, Precision::F16).map_err(|e| e.to_string())
            }),
        ),
        ("picture", Box::new(|p| Picture::new(3, 2, [0; 3]).write(p))),
        ("text", Box::new(|p| write_text(p, "text"))),
    ];
    let old = b"what was there before".to_vec();
    let names =
        ["a.nii", "A.NII.GZ", "b.Nii.gz", "c.mha", "d.NPZ", "e", "f g.png", ".hidden", "é.nii"];
    for (what, write) in &writers {
        for (n, name) in names.into_iter().enumerate() {
            for place in ["new", "old", "link", "protected", "folder", "absent"] {
                let at = folder.path().join(format!("{what} {n} {place}"));
                std::fs::create_dir(&at).unwrap();
                let (path, real) = (at.join(name), at.join("real"));
                match place {
                    "old" | "protected" => std::fs::write(&path, &old).unwrap(),
                    "folder" => std::fs::create_dir(&path).unwrap(),
                    _ => {}
                }
                #[cfg(unix)]
                match place {
                    "link" => {
                        std::fs::write(&real, &old).unwrap();
                        std::os::unix::fs::symlink("real", &path).unwrap();
                    }
                    "protected" => {
                        use std::os::unix::fs::PermissionsExt;
                        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444))
                            .unwrap();
                    }
                    _ => {}
                }
                let path = if place == "absent" { at.join("no").join(name) } else { path };
                let result = write(&path);
                let there = std::fs::read_dir(&at).unwrap().count();
                let about = format!("{what}, {name}, {place}: {result:?}");
                match (&result, place) {
                    (Ok(()), "new" | "old") => {
                        assert!(there == 1 && std::fs::read(&path).unwrap() != old, "{about}")
                    }
                    (Ok(()), "link") => assert!(
                        there == 2 && path.is_symlink() && std::fs::read(&real).unwrap() != old,
                        "{about}"
                    ),
                    (Ok(()), _) => panic!("{about}"),
                    (Err(_), "new" | "absent") => assert_eq!(there, 0, "{about}"),
                    (Err(_), "old" | "protected") => {
                        assert!(there == 1 && std::fs::read(&path).unwrap() == old, "{about}")
                    }
                    (Err(_), "link") => {
                        assert!(there == 2 && std::fs::read(&real).unwrap() == old, "{about}")
                    }
                    (Err(_), _) => assert!(there == 1 && path.is_dir(), "{about}"),
                }
                // An image that was written is an image, of the size it should have.
                let images = ["mask", "probability", "scan", "MetaImage"].contains(what);
                if images && result.is_ok() {
                    assert_eq!(
                        Volume::read(&path, None).unwrap_or_else(|e| panic!("{e}")).grid.size,
                        scan.grid.size,
                        "{about}"
                    );
                }
            }
        }
    }
}

/// Whatever name and place an output has: the file is whole, or nothing changed and the exit code
/// says so.
#[test]
fn an_output_is_whole_or_nothing_changed() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let model = at("m.safetensors");
    Weights::hashed(tiny(), "out").save(&model, Precision::F32).unwrap();
    let scan = case("foreign-formats/scan.nii.gz");
    let grid = Volume::read(&scan, None).unwrap().grid;
    let middle = grid.size.map(|s| (s / 2).to_string()).join(",");
    std::fs::create_dir(at("sub")).unwrap();
    let segment = |mask: &Path, more: &[&str]| {
        let args = [
            "segment",
            "-m",
            model.to_str().unwrap(),
            "-i",
            scan.to_str().unwrap(),
            "--point",
            &middle,
            "-o",
            mask.to_str().unwrap(),
        ];
        prism(&[&args[..], more].concat())
    };
    let old = b"what was there before".to_vec();
    let stems = ["a", "a.b", "mask nii", "Ä", "", "."];
    let endings = [
        "nii", "NII", "Nii", "nii.gz", "NII.GZ", "nii.GZ", "NII.gz", "nii.bz2", "img", "mha",
        "nrrd", "seg.nrrd", "nii.", "gz", "",
    ];
    let mut whole = vec![];
    for (n, (stem, ending)) in
        stems.iter().flat_map(|s| endings.iter().map(move |e| (s, e))).enumerate()
    {
        let name = format!("{stem}.{ending}");
        for probability in [false, true] {
            let place = at("sub").join(format!("{n}-{probability}"));
            std::fs::create_dir(&place).unwrap();
            let path = place.join(&name);
            if path.file_name().is_none() || path.is_dir() {
                continue;
            }
            std::fs::write(&path, &old).unwrap();
            let other = place.join("other.nii");
            let [mask, p] = if probability { [&other, &path] } else { [&path, &other] };
            let out = segment(mask, &["--probability", p.to_str().unwrap()]);
            let said = String::from_utf8_lossy(&out.stderr).into_owned();
            if out.status.success() {
                assert_eq!(
                    Volume::read(&path, None).unwrap_or_else(|e| panic!("{e}")).grid.size,
                    grid.size,
                    "{name}"
                );
                assert_eq!(
                    std::fs::read_dir(&place).unwrap().count(),
                    2,
                    "{name}: something was left"
                );
                whole.push(path);
            } else {
                assert!(
                    std::fs::read(&path).unwrap() == old && said.contains(".nii.gz"),
                    "{name}: {said}"
                );
                assert_eq!(
                    std::fs::read_dir(&place).unwrap().count(),
                    1,
                    "{name}: something was left"
                );
            }
        }
    }
    // A map of probabilities is no segmentation.
    assert_eq!(whole.len(), (2 * 9 + 1) * 5, "{whole:?}");
    // Another reader, where it can be had, agrees. Capitals in both parts of an ending are beyond
    // it.
    let names: Vec<&str> = whole
        .iter()
        .map(|p| p.to_str().unwrap())
        .filter(|p| p.ends_with(".nii") || p.ends_with(".nii.gz"))
        .collect();
    let program = "import sys, nibabel, numpy\nfor p in sys.argv[1:]: print(list(map(int, numpy.asarray(nibabel.load(p).dataobj).shape)))";
    let judged = Command::new("python3").args(["-c", program]).args(&names).output().unwrap();
    if judged.status.success() {
        let said = String::from_utf8(judged.stdout).unwrap();
        assert!(
            said.lines().count() == names.len()
                && said.lines().all(|l| l == format!("{:?}", grid.size)),
            "{said}"
        );
    } else {
        let required = std::env::var_os("PRISM_TEST_TOOLS").is_some_and(|v| v == "required");
        assert!(!required, "nibabel: {}", String::from_utf8_lossy(&judged.stderr));
        common::skipped("nibabel is not on this machine: no other reader judges what was written");
    }
    // Behind a link; a protected file stays.
    #[cfg(unix)]
    {
        use std::os::unix::fs::{PermissionsExt, symlink};
        symlink("sub/behind.nii", at("link.nii")).unwrap();
        let run = |path: &Path| segment(path, &[]);
        assert!(run(&at("link.nii")).status.success());
        assert!(at("link.nii").is_symlink() && Volume::read(&at("sub/behind.nii"), None).is_ok());
        std::fs::write(at("kept.nii"), &old).unwrap();
        std::fs::set_permissions(at("kept.nii"), std::fs::Permissions::from_mode(0o444)).unwrap();
        let out = run(&at("kept.nii"));
        assert!(
            out.status.code() == Some(1)
                && String::from_utf8_lossy(&out.stderr).contains("write-protected")
        );
        assert_eq!(std::fs::read(at("kept.nii")).unwrap(), old);
    }
}
