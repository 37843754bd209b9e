//! Prompts on scans as users have them.

use crate::common::shared;
use crate::program;
use crate::{BOX, case, count, object, refused, segment, small_model};
use prism::eval::metrics::dice;
use prism::volume::Volume;
use prism::volume::labels::{Labels, TargetLabel};

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
    let run = program::segment(&small_model(), &scan, &out);
    let error = refused(run.file("--prompts", &prompts));
    assert!(
        error.contains("iteration 2: ") && error.contains("no voxel has label 7: it holds [1, 2]"),
        "{error}"
    );
    // An empty mask is no prompt.
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
