//! Scans, in every form in which they are stored.

use crate::common::here;
use crate::program::{self, metrics, prism};
use crate::{BOX, base, case, count, nrrd, refused, segment, small_model};
use prism::eval::metrics::dice;
use prism::model::Weights;
use prism::session::intensities;
use prism::volume::labels::Labels;
use prism::volume::{Affine, Description, Grid, Modality, Volume};
use std::path::Path;
use std::process::Command;

/// The information that a program in C gets about a scan that it reads.
fn from_c(path: &Path) -> Result<prism::capi::prism_volume_info, prism::capi::prism_status> {
    use prism::capi::*;
    let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    let mut volume = std::ptr::null_mut();
    // SAFETY: all pointers are valid; the structure consists of numbers.
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

#[test]
fn every_way_of_storing_a_scan_is_the_same_scan() {
    let base = base();
    for (name, volume, words) in [
        ("scan.mha", None, None),
        ("scan.mhd", None, None),
        ("sform_without_scale.nii.gz", None, Some("the qform is used")),
        ("nrrd-4d-of-itk/sitk4d_one.nrrd", None, Some("LPS is assumed")),
        ("nrrd-4d-of-itk/sitk4d.nrrd", Some(0), Some("LPS is assumed")),
        ("nrrd-4d-of-itk/sitk4d.nrrd", Some(1), Some("LPS is assumed")),
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
        // Only the file whose sform was damaged has another place.
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
        scan.values() == base().values()
            && scan.warnings[0].contains("follow the compressed stream"),
        "{:?}",
        scan.warnings
    );
    // Runs of zeros shrink further by bzip2 than by anything else.
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
    assert!(refused("endian", "data file: ../a.raw\nendian").contains("header's folder"));
    // Products that wrap to 1 and to 0, of axes in front of the voxels, and of those in space.
    for axes in ["3 12297829382473034411", "4294967296 4294967296"] {
        let wrapping = format!(
            "5\nspace directions: none none (2,0,0) (0,2,0) (0,0,5)\nsizes: {axes} 2 3 4\nlabels:"
        );
        let error = refused("3\nspace: LPS\nsizes: 2 3 4\nspace directions:", &wrapping);
        assert!(error.contains("too many voxels"), "{error}");
        let error = refused("sizes: 2 3 4", &format!("sizes: {axes} 4"));
        assert!(error.contains("too many voxels"), "{error}");
    }
    let quantised = read(header.replace("endian", "old max: 3\nendian"), &voxels).unwrap();
    assert!(quantised.warnings[0].contains("'old max'"));
    let centimetres =
        read(header.replace("endian", "space units: \"cm\" \"cm\" \"cm\"\nendian"), &voxels)
            .unwrap();
    assert_eq!(centimetres.grid.spacing(), [20.0, 20.0, 50.0]);
    assert!(refused("endian: little", "byte skip:24\nendian: little").contains("'byte skip:24'"));
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
            && padded.warnings[0].contains("follow the compressed stream"),
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
fn a_metaimage_of_more_voxels_than_can_be_counted_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.mha");
    for sizes in ["3 12297829382473034411 4", "4294967296 4294967296 4"] {
        let header = format!(
            "ObjectType = Image\nNDims = 3\nDimSize = {sizes}\nElementType = MET_SHORT\nElementSpacing = 1 1 1\nElementDataFile = LOCAL\n"
        );
        std::fs::write(&path, [header.as_bytes(), &[0; 64]].concat()).unwrap();
        let error = Volume::read(&path, None).unwrap_err().to_string();
        assert!(error.contains("more bytes than can be addressed"), "{error}");
    }
}

/// Headers alone are tried: the voxels would be more than a test can write.
#[test]
fn an_axis_that_no_scan_has_is_refused_in_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let mut nifti = vec![0u8; 544];
    nifti[..4].copy_from_slice(&540i32.to_le_bytes());
    nifti[4..12].copy_from_slice(b"n+2\0\r\n\x1a\n");
    nifti[12..16].copy_from_slice(bytemuck::cast_slice(&[2i16, 8].map(i16::to_le)));
    let header = |longest: usize| {
        let mut nifti = nifti.clone();
        for (a, length) in [3, 1, longest as i64, 1, 1, 1, 1, 1].into_iter().enumerate() {
            nifti[16 + 8 * a..][..8].copy_from_slice(&length.to_le_bytes());
            nifti[104 + 8 * a..][..8].copy_from_slice(&1f64.to_le_bytes());
        }
        nifti[168..176].copy_from_slice(&544i64.to_le_bytes());
        let nrrd =
            format!("NRRD0004\ntype: uchar\ndimension: 3\nsizes: 1 {longest} 1\nencoding: raw\n\n");
        let metaimage = format!(
            "ObjectType = Image\nNDims = 3\nDimSize = 1 {longest} 1\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
        );
        [("a.nii", nifti), ("a.nrrd", nrrd.into_bytes()), ("a.mha", metaimage.into_bytes())]
    };
    let read = |(name, bytes): (&str, Vec<u8>)| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        Volume::read(&path, None)
    };
    for longest in [65_537, 3_000_000_000] {
        for file in header(longest) {
            let name = file.0;
            let error = read(file).unwrap_err().to_string();
            let expected =
                format!("{name}: it has {longest} voxels along its axis j, expected at most 65536");
            assert!(error.ends_with(&expected), "{error}");
        }
    }
    for (name, bytes) in header(65_536) {
        let volume = read((name, [bytes, vec![1; 65_536]].concat())).unwrap();
        assert_eq!(volume.grid.size, [1, 65_536, 1], "{name}");
    }
    let grid = Grid { size: [65_537, 1, 1], affine: Affine::from_spacing([1.0; 3]) };
    let description = Description::of_new(&grid, "float32");
    let error = Volume::new(grid, vec![0.0; 65_537], description).unwrap_err();
    assert!(error.contains("65537 voxels along its axis i, expected at most 65536"), "{error}");
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
        (small_model(), "model"),
        (at("a.dcm", &dicom), "is a DICOM file"),
        (at("a.json", b"\xef\xbb\xbf {}"), "JSON"),
        (at("empty.nii", b""), "is empty"),
        (at("noise.nii", &[7; 64]), "not recognised"),
        (folder.path().to_path_buf(), "is a folder"),
    ];
    let (model, scan, label) = (small_model(), case("base/scan.nii.gz"), case("base/label.nii.gz"));
    let out = folder.path().join("o.nii.gz");
    let segment = |model: &Path, image: &Path| program::segment(model, image, &out);
    for (file, words) in cases {
        let name = file.to_str().unwrap();
        let error = Volume::read(&file, None).unwrap_err().to_string();
        assert!(error.starts_with(name) && error.contains(words), "{error}");
        let error = Labels::read(&file, &base().grid).err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
        for run in [
            segment(&model, &file).file("--box", BOX),
            segment(&model, &scan).file("--mask", &file),
            metrics(&file, &scan),
            metrics(&label, &file),
        ] {
            let about = format!("{run:?}");
            assert!(refused(run).contains(words), "{about}");
        }
        // A model or a prompts file is recognised as something else.
        if file != model {
            assert!(refused(segment(&file, &scan).file("--box", BOX)).contains(name));
        }
    }
    let converted = folder.path().join("m.safetensors");
    let error = refused(prism("convert").arg(case("scan.mha")).arg(converted));
    assert!(error.contains("a MetaImage, expected a PyTorch checkpoint"), "{error}");
    let error = refused(segment(&scan, &scan).file("--box", BOX));
    assert!(error.contains("packed by gzip, expected a model"), "{error}");
    let error = refused(segment(&model, &scan).file("--prompts", &scan));
    assert!(error.contains("a NIfTI image, expected a JSON list"), "{error}");
    assert!(!out.exists());
}

#[test]
fn one_voxel_does_not_decide_what_a_scan_is() {
    let read = |name: &str| Volume::read(&case("mr-one-negative-voxel").join(name), None).unwrap();
    let small = Weights::open(&small_model()).unwrap().config.intensity;
    let of = |image: &Volume| intensities(image, small);
    let (mr, odd) = (of(&read("mr.nii.gz")), of(&read("mr_one_negative.nii.gz")));
    assert_eq!(
        (mr.modality, odd.modality, of(&base()).modality),
        (Modality::Mr, Modality::Mr, Modality::Ct)
    );
    assert!((mr.normalization.mean / odd.normalization.mean - 1.0).abs() < 1e-3);
    // The stated modality counts.
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
    let (image, mask) = (case("base/scan.nii.gz"), folder.path().join("m.nii.gz"));
    for (more, modality, words) in [("", "ct", "below -50"), ("--modality pet", "pet", "as given")]
    {
        let run = program::segment(&small_model(), &image, &mask).file("--box", BOX);
        let out = run.with("--json").with(more).output();
        let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        let intensity = &json["intensity"];
        assert!(
            intensity["modality"] == modality
                && intensity["decided"].as_str().unwrap().contains(words),
            "{intensity}"
        );
    }
    // An image without contrast is reported.
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
