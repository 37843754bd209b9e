//! What is written is complete, or nothing changed.

use crate::common::{skipped, tiny};
use crate::program;
use crate::{base, case, object, refused};
use prism::model::{Weights, weights::Precision};
use prism::volume::Volume;
use std::path::Path;
use std::process::Command;

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

/// Every writer, on names and places of all kinds: the file is complete and alone, or nothing
/// changed and an error says so.
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
                // A written image is readable, and has the size it should have.
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

/// Whatever name and place an output has: the file is complete, or nothing changed and the exit
/// code says so.
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
    let segment = |mask: &Path| program::segment(&model, &scan, mask).file("--point", &middle);
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
            let out = segment(mask).file("--probability", p).output();
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
    // A map of probabilities is not a segmentation.
    assert_eq!(whole.len(), (2 * 9 + 1) * 5, "{whole:?}");
    // Another reader, if it is available, agrees. It does not support capitals in both parts of an
    // ending.
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
        skipped("nibabel is not on this machine: no other reader judges what was written");
    }
    // Through a link; a protected file stays.
    #[cfg(unix)]
    {
        use std::os::unix::fs::{PermissionsExt, symlink};
        symlink("sub/behind.nii", at("link.nii")).unwrap();
        let run = |path: &Path| segment(path).output();
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

/// A mask and a map whose headers name the files of their voxels: the same as in one file, for
/// SimpleITK too, and no input is overwritten.
#[test]
fn a_header_and_the_file_of_its_voxels_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let model = at("m.safetensors");
    Weights::hashed(tiny(), "apart").save(&model, Precision::F32).unwrap();
    let middle = |scan: &Path| {
        let size = Volume::read(scan, None).unwrap().grid.size;
        size.map(|s| (s / 2).to_string()).join(",")
    };
    let scan = case("foreign-formats/scan.nii.gz");
    for ending in ["mhd", "mha"] {
        let [mask, map] = ["mask", "map"].map(|name| at(&format!("{name}.{ending}")));
        let run = program::segment(&model, &scan, &mask).file("--point", middle(&scan));
        let out = run.file("--probability", &map).output();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    let names = ["mask.mhd", "mask.mha", "map.mhd", "map.mha"].map(&at);
    for pair in names.chunks(2) {
        let [apart, whole] = [0, 1].map(|n| Volume::read(&pair[n], None).unwrap());
        assert!(apart.grid == whole.grid && apart.values() == whole.values(), "{pair:?}");
        assert_eq!(apart.description.element, whole.description.element);
    }
    let program = "import sys, zlib, SimpleITK as itk
for p in sys.argv[1:]:
    i = itk.ReadImage(p)
    print(i.GetSize(), i.GetOrigin(), i.GetSpacing(), i.GetDirection(), i.GetPixelIDTypeAsString(),
          zlib.crc32(itk.GetArrayFromImage(i).tobytes()))";
    let judged = Command::new("python3").args(["-c", program]).args(&names).output().unwrap();
    if judged.status.success() {
        let said = String::from_utf8(judged.stdout).unwrap();
        let lines: Vec<&str> = said.lines().collect();
        assert!(lines.len() == 4 && lines[0] == lines[1] && lines[2] == lines[3], "{said}");
    } else {
        let required = std::env::var_os("PRISM_TEST_TOOLS").is_some_and(|v| v == "required");
        assert!(!required, "SimpleITK: {}", String::from_utf8_lossy(&judged.stderr));
        skipped(
            "SimpleITK is not on this machine: no other reader judges headers with voxels apart",
        );
    }
    // A scan's voxels are where those of the mask would be: only its header shows that.
    let text = std::fs::read_to_string(case("scan.mhd")).unwrap();
    let scan = at("scan.mhd");
    std::fs::write(&scan, text.replace("scan.raw", "other.zraw")).unwrap();
    std::fs::copy(case("scan.raw"), at("other.zraw")).unwrap();
    let point = middle(&scan);
    let said = refused(program::segment(&model, &scan, &at("other.mhd")).file("--point", &point));
    assert!(said.contains("other.zraw: is an input"), "{said}");
    assert!(!at("other.mhd").exists());
    assert_eq!(std::fs::read(at("other.zraw")).unwrap(), std::fs::read(case("scan.raw")).unwrap());
    // A prompt file in that place is reported before anything is read.
    std::fs::copy(case("base/label.nii.gz"), at("label.zraw")).unwrap();
    let run = program::segment(&model, &scan, &at("label.mhd")).file("--mask", at("label.zraw"));
    let said = refused(run);
    assert!(said.contains("label.zraw is an input"), "{said}");
}
