//! Datasets, splits, synthetic scans, samples, simulated prompts.

use crate::common;

use common::{here, tiny};
use prism::data::cases::{Loaded, Split, TargetLabel, list};
use prism::data::sample::{Augmentation, centred, random};
use prism::data::source::Pools;
use prism::data::synth::{generate, generate_as};
use prism::prompt::simulate::{
    Errors, Kind, User, bounding_box, drawn_box, generator, points, scribbles,
};
use prism::volume::Modality;
use prism::volume::labels::Labels;
use prism::volume::{Volume, write_mask, write_scan};
use std::path::Path;

/// Writes scan number `index` of a series as files.
fn write(index: u64, image: &Path, label: &Path) {
    let scan = generate(9, index);
    for path in [image, label] {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    }
    write_scan(image, &scan.image).unwrap().commit().unwrap();
    write_mask(label, &scan.image, &scan.label).unwrap().commit().unwrap();
}

#[test]
fn every_layout_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let at = |p: &str| folder.path().join(p);
    write(0, &at("msd/imagesTr/a_1.nii.gz"), &at("msd/labelsTr/a_1.nii.gz"));
    write(1, &at("msd/imagesTr/a_2.nii.gz"), &at("msd/labelsTr/a_2.nii.gz"));
    std::fs::write(
        at("msd/dataset.json"),
        r#"{"name": "x", "training": [{"image": "./imagesTr/a_2.nii.gz", "label": "./labelsTr/a_2.nii.gz"}]}"#,
    )
    .unwrap();
    write(0, &at("plain/imagesTr/b_1.nii.gz"), &at("plain/labelsTr/b_1.nii.gz"));
    write(0, &at("lits/batch 1/volume-3.nii"), &at("lits/batch 1/segmentation-3.nii"));
    write(0, &at("kits/case_00007/imaging.nii.gz"), &at("kits/case_00007/segmentation.nii.gz"));
    write(0, &at("one/c1/image.nii.gz"), &at("one/c1/label.nii.gz"));
    std::fs::write(
        at("list.csv"),
        "image,label,name\none/c1/image.nii.gz,one/c1/label.nii.gz,first\n",
    )
    .unwrap();
    for (path, name) in [
        ("msd", "a_2"),
        ("plain", "b_1"),
        ("lits", "volume-3"),
        ("kits", "case_00007"),
        ("one", "c1"),
        ("list.csv", "first"),
    ] {
        let cases = list(&at(path), None).unwrap();
        assert_eq!(cases.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), [name], "{path}");
        let Loaded { image, mask: label, .. } = cases[0].read(&TargetLabel::Any).unwrap();
        assert_eq!(image.values().len(), label.len());
        let error = cases[0].read(&TargetLabel::Value(3)).err().unwrap().to_string();
        assert!(
            error.contains("no voxel has label 3") && error.contains("it holds [1]"),
            "{error}"
        );
    }
    std::fs::create_dir(at("empty")).unwrap();
    assert!(list(&at("empty"), None).unwrap_err().to_string().contains("no cases"));
    std::fs::write(at("bad.csv"), "scan,mask\na,b\n").unwrap();
    assert!(list(&at("bad.csv"), None).unwrap_err().to_string().contains("image,label"));
}

#[test]
fn splits_are_by_seed_or_given_and_checked() {
    let folder = tempfile::tempdir().unwrap();
    let rows: String = (0..20).map(|n| format!("i{n}.nii,l{n}.nii,case{n}\n")).collect();
    let csv = folder.path().join("all.csv");
    std::fs::write(&csv, format!("image,label,name\n{rows}")).unwrap();
    let cases = list(&csv, None).unwrap();
    let split = Split::by_seed(&cases, 1);
    assert_eq!([split.train.len(), split.validation.len(), split.test.len()], [14, 2, 4]);
    assert_eq!(split, Split::by_seed(&cases, 1));
    assert_ne!(split, Split::by_seed(&cases, 2));
    let mut all: Vec<&String> =
        split.train.iter().chain(&split.validation).chain(&split.test).collect();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 20);
    let file = folder.path().join("split.json");
    for (text, problem) in [
        (
            r#"{"train": ["case1"], "validation": ["case99"]}"#,
            "'case99' in validation is not a case",
        ),
        (
            r#"{"train": ["case1"], "validation": ["case1"]}"#,
            "'case1' is in train and in validation",
        ),
        (r#"{"training": []}"#, "expected"),
    ] {
        std::fs::write(&file, text).unwrap();
        let error = Split::read(&file, &cases).unwrap_err().to_string();
        assert!(error.contains(problem) && error.contains("split.json"), "{error}");
    }
}

#[test]
fn unusable_cases_are_named_skipped_and_counted_and_a_cache_gives_the_same_samples() {
    let folder = tempfile::tempdir().unwrap();
    let at = |p: &str| folder.path().join(p);
    write(0, &at("d/good/image.nii.gz"), &at("d/good/label.nii.gz"));
    write(1, &at("d/held/image.nii.gz"), &at("d/held/label.nii.gz"));
    write(2, &at("d/empty/image.nii.gz"), &at("d/empty/label.nii.gz"));
    let scan = generate(9, 2);
    write_mask(&at("d/empty/label.nii.gz"), &scan.image, &vec![0; scan.label.len()])
        .unwrap()
        .commit()
        .unwrap();
    std::fs::create_dir_all(at("d/torn")).unwrap();
    std::fs::write(at("d/torn/image.nii.gz"), b"not an image").unwrap();
    std::fs::write(at("d/torn/label.nii.gz"), b"not an image").unwrap();
    std::fs::write(at("s.json"), r#"{"train": ["good", "empty", "torn"], "validation": ["held"]}"#)
        .unwrap();
    let data = at("d").display().to_string();
    let config = prism::model::Config { fit: None, spacing: 2.0, ..tiny() };
    let open = |disk: Option<(&Path, f64)>| {
        Pools::open(&data, "", &TargetLabel::Any, None, Some(&at("s.json")), disk, 0).unwrap()
    };
    let pools = open(None);
    let a = Augmentation::default();
    let names: Vec<String> =
        (0..12).map(|step| pools.train.draw(&config, &a, 5, step, 0).unwrap().name).collect();
    assert!(names.iter().all(|n| n == "good"));
    let skipped = pools.train.skipped();
    assert_eq!(skipped.iter().map(|s| s.0.as_str()).collect::<Vec<_>>(), ["empty", "torn"]);
    assert!(
        skipped[0].1.contains("no voxel has label") && skipped[1].1.contains("image.nii.gz"),
        "{skipped:?}"
    );
    let (on, off) = (|| true, || false);
    // Told to stop, it reads nothing.
    assert!(pools.validation.fixed(&config, 5, &on).is_none());
    assert!(pools.validation.modalities().is_empty());
    assert_eq!(pools.validation.fixed(&config, 5, &off).unwrap().len(), 1);
    assert!(pools.validation.fixed(&config, 0, &on).unwrap().is_empty());
    let series = Pools::open("synth:3", "", &TargetLabel::Any, None, None, None, 0).unwrap();
    let left = std::cell::Cell::new(2);
    let after_two = || left.replace(left.get() - 1) == 0;
    assert!(series.validation.fixed(&config, 5, &after_two).is_none() && left.get() == -1);

    // A second run finds the resampled case on disk and draws the same samples from it.
    let cache = at("cache");
    let draw = || open(Some((&cache, 2.0))).train.draw(&config, &a, 5, 3, 1).unwrap();
    let (first, second) = (draw(), draw());
    assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 1);
    assert!(first.image == second.image && first.label == second.label);
    // A damaged one is made again.
    let entry = std::fs::read_dir(&cache).unwrap().next().unwrap().unwrap().path();
    let mut damaged = std::fs::read(&entry).unwrap();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    std::fs::write(&entry, &damaged).unwrap();
    let third = draw();
    assert!(first.image == third.image && first.label == third.label);
    assert!(std::fs::read(&entry).unwrap() != damaged);
    // The same draw gives the same sample, another gives another.
    let again = |step| pools.train.draw(&config, &a, 5, step, 0).unwrap().image;
    assert!(again(1) == again(1) && again(1) != again(2));
    // Shares and names that make no sense.
    assert!(Pools::open(&data, "1,2", &TargetLabel::Any, None, None, None, 0).is_err());
    assert!(Pools::open("synth:x", "", &TargetLabel::Any, None, None, None, 0).is_err());
}

#[test]
fn synthetic_scans_are_a_function_of_the_seed_and_look_like_what_they_imitate() {
    let (a, b, c) = (generate(1, 4), generate(1, 4), generate(2, 4));
    assert!(
        a.image.values() == b.image.values()
            && a.label == b.label
            && a.image.values() != c.image.values()
    );
    let mut spacings = std::collections::BTreeSet::new();
    for index in 0..12 {
        for (modality, low) in [(Modality::Ct, -1024.0), (Modality::Mr, 0.0)] {
            let scan = generate_as(&mut generator(3, &[index]), modality);
            let voxels = scan.label.iter().filter(|v| **v != 0).count();
            assert!(
                voxels > 30 && voxels * 4 < scan.label.len(),
                "{voxels} of {}",
                scan.label.len()
            );
            assert!(scan.image.values().iter().all(|v| *v >= low && v.fract() == 0.0));
            let s = scan.image.grid.spacing();
            spacings.insert((s[2] / s[0]).round() as i32);
            // The object is inside, with something around it.
            let b = bounding_box(&scan.label, scan.image.grid.size).unwrap();
            assert!((0..2).all(|d| b[d] > 0 && (b[d + 3] as usize) < scan.image.grid.size[d]));
        }
    }
    assert!(spacings.len() > 2, "{spacings:?}");
}

#[test]
fn samples_show_the_object_whatever_the_augmentation() {
    let image = Volume::read(&here("examples/data/lung1_image.nii.gz"), None).unwrap();
    let labels = Labels::read(&here("examples/data/lung1_label.nii.gz"), &image.grid).unwrap();
    let label = labels.mask(&TargetLabel::Any).unwrap();
    for fit in [None, Some(1.75)] {
        let config = prism::model::Config { fit, ..tiny() };
        let plain = centred(&config, "x", &image, &label).unwrap();
        assert_eq!((plain.image.len(), plain.label.len()), (32 * 32 * 32, 32 * 32 * 32));
        let mut rng = generator(1, &[]);
        for _ in 0..10 {
            let sample =
                random(&mut rng, &config, &Augmentation::default(), "x", &image, &label).unwrap();
            assert!(sample.label.contains(&1) && sample.image.iter().all(|v| v.is_finite()));
        }
        assert!(centred(&config, "x", &image, &vec![0; label.len()]).is_none());
    }
}

#[test]
fn simulated_prompts_in_degenerate_cases() {
    let size = [6, 5, 4];
    let n = 120;
    let mut rng = generator(4, &[]);
    let user = User { boxed: 1.0, scribbles: 1.0, ..User::training() };
    // Nothing is wrong: no prompts.
    let label: Vec<u8> = (0..n).map(|v| u8::from(v % 7 == 0)).collect();
    let errors = Errors::of(&label, Some(&label));
    assert!(
        errors.is_empty()
            && points(&mut rng, &errors, size, 5).is_empty()
            && user.correct(&mut rng, &errors, size).is_empty()
    );
    // One voxel: it is the point, the box and the scribble.
    let mut one = vec![0u8; n];
    one[(2 * 5 + 3) * 4 + 1] = 1;
    let errors = Errors::of(&one, None);
    assert_eq!(points(&mut rng, &errors, size, 50), [([2, 3, 1], true)]);
    assert_eq!(bounding_box(&one, size), Some([2, 3, 1, 3, 4, 2]));
    assert_eq!(drawn_box(&mut rng, &one, size, 0, -5), Some([2, 3, 1, 3, 4, 2]));
    for kind in [Kind::Centreline, Kind::Line] {
        assert_eq!(scribbles(&mut rng, &one, size, kind, 500), [(2 * 5 + 3) * 4 + 1]);
    }
    // The whole volume: boxes stay inside, scribbles stay off the slice's border, limits hold.
    let whole = vec![1u8; n];
    assert_eq!(drawn_box(&mut rng, &whole, size, 10, 5), Some([0, 0, 0, 6, 5, 4]));
    for kind in [Kind::Centreline, Kind::Line, Kind::Contour] {
        let drawn = scribbles(&mut rng, &whole, size, kind, 3);
        assert!(drawn.len() <= 3 && drawn.iter().all(|v| *v < n));
    }
    assert!(drawn_box(&mut rng, &vec![0; n], size, 3, 0).is_none());
    // However far a side is to be moved.
    assert_eq!(
        drawn_box(&mut rng, &one, size, usize::MAX, i32::MAX),
        Some([0, 0, 0, size[0] as i32, size[1] as i32, size[2] as i32])
    );
    assert_eq!(drawn_box(&mut rng, &one, size, 0, i32::MIN), Some([2, 3, 1, 3, 4, 2]));
    assert!(scribbles(&mut rng, &vec![0; n], size, Kind::Centreline, 9).is_empty());
    // Excess is answered with negative points.
    let errors = Errors::of(&one, Some(&whole));
    let given = points(&mut rng, &errors, size, 40);
    assert!(given.len() == 40 && given.iter().all(|(_, positive)| !positive));
    // The same seed gives the same prompts; scribbles are in their region.
    let say = |seed| user.correct(&mut generator(seed, &[]), &Errors::of(&label, None), size);
    assert!(say(1) == say(1) && say(1) != say(2));
    assert!(
        say(1)
            .iter()
            .all(|(p, positive)| *positive && label[((p[0] * 5 + p[1]) * 4 + p[2]) as usize] == 1)
    );
}
