//! Numbers that are not finite, and what a session does when it meets one.

use crate::common::{here, tiny, tiny_model};
use prism::device::Device;
use prism::model::{Model, Observer, Weights, weights::Precision};
use prism::prompt::{Dense, Prompts, RawBox, RawPoint, Space};
use prism::session::{Options, Scan, Session};
use prism::tensor::Tensor;
use prism::volume::intensity::Normalization;
use prism::volume::resample::{Interpolation, resample};
use prism::volume::{Affine, Grid};

#[test]
fn a_shape_whose_product_wraps_is_no_shape() {
    for shape in [
        vec![usize::MAX, 2],
        vec![1 << 32, 1 << 32],
        vec![1 << 33, 1 << 31, 0],
        vec![3, 12_297_829_382_473_034_411],
    ] {
        let values = vec![0.0; shape.iter().fold(1usize, |n, s| n.wrapping_mul(*s)).min(8)];
        assert!(
            std::panic::catch_unwind(|| Tensor::new(shape.clone(), values)).is_err(),
            "{shape:?}"
        );
    }
    assert_eq!(Tensor::new([0, 5], vec![]).len(), 0);
    // As a scan whose header states millimetres where metres were meant asks to be resampled.
    let grid = |size| Grid { size, affine: Affine::from_spacing([1.0; 3]) };
    let to = grid([2, 1 << 32, 1 << 32]);
    let refused = prism::memory::caught(|| {
        resample(&[0.0; 8], &grid([2; 3]), &to, Interpolation::Linear, 0.0)
    });
    let said = refused.unwrap_err().to_string();
    assert!(said.starts_with("out of memory: a resampled scan"), "{said}");
}

#[test]
fn numbers_that_are_none_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let with = |name: &str, at: usize, value: f32| {
        let weights = Weights::hashed(tiny(), "trust");
        let list = tiny().tensors().into_iter().map(|(n, shape)| {
            let mut values = weights.get(&n).data().to_vec();
            if n == name {
                values[at] = value;
            }
            (n, Tensor::new(shape, values))
        });
        Weights::from_tensors(tiny(), list.collect()).unwrap()
    };
    let (bias, head) = (
        "mask_decoder.refine.conv_correction.bias",
        "mask_decoder.iou_prediction_head.layers.2.weight",
    );
    for (name, at, value) in [
        (bias, 0, f32::NAN),
        (head, 7, f32::INFINITY),
        (head, 0, f32::NEG_INFINITY),
        ("image_encoder.patch_embed.proj.bias", 3, f32::NAN),
    ] {
        for precision in [Precision::F32, Precision::F16] {
            with(name, at, value).save(&path, precision).unwrap();
            let said = Weights::open(&path).err().expect("no number").to_string();
            assert!(
                said.ends_with(&format!("value {at} of {name} is not a finite number")),
                "{said}"
            );
        }
    }
    // Numbers from which the network makes NaN.
    let model = std::sync::Arc::new(
        Model::new(&Device::open("cpu", 1).unwrap(), &with(bias, 0, 3e38)).unwrap(),
    );
    let image = std::sync::Arc::new(
        prism::volume::Volume::read(&here("tests/data/odd/m00_base.nii.gz"), None).unwrap(),
    );
    let normalization = Normalization { clip: [-1000.0, 400.0], mean: 0.0, sd: 1e-36 };
    for released in [false, true] {
        let options = Options { released, ..Options::default() };
        let mut session = Session::new(&std::sync::Arc::new(Scan::new(
            &model,
            image.clone(),
            normalization,
            options,
        )));
        let prompts = Prompts {
            points: vec![([3, 3, 3], true)],
            bounds: Some([2, 2, 2, 8, 8, 8]),
            ..Prompts::default()
        };
        let said = session.interact(&prompts).err().expect("no number").to_string();
        assert!(said.contains("is not finite") && session.prediction().is_none(), "{said}");
    }
    // A session takes no such logits, released or not.
    let model = tiny_model(tiny(), 1);
    let normalization = Normalization { clip: [-1000.0, 400.0], mean: 0.0, sd: 350.0 };
    for (released, value) in [(false, f32::NAN), (true, f32::NAN), (false, f32::INFINITY)] {
        let options = Options { released, ..Options::default() };
        let scan = Scan::new(&model, image.clone(), normalization, options);
        let mut session = Session::new(&std::sync::Arc::new(scan));
        let mut logits = vec![1.0; image.grid.voxels()];
        let [_, nj, nk] = image.grid.size;
        logits[(2 * nj + 1) * nk + 3] = value;
        let prompts = Prompts {
            points: vec![([3, 3, 3], true)],
            dense: Some(Dense::Logits(logits)),
            ..Prompts::default()
        };
        let said = session.interact(&prompts).err().expect("no number").to_string();
        assert!(said.contains(&format!("{value} at voxel [2, 1, 3]")), "{said}");
        assert!(session.prediction().is_none());
    }
    let mut prompts = Prompts::default();
    for position in [[f64::NAN, 1.0, 1.0], [1.0, f64::INFINITY, 1.0]] {
        for space in [Space::Ras, Space::Lps, Space::Ijk] {
            let said = prompts
                .add_point(&image.grid, RawPoint { position, positive: true }, space)
                .unwrap_err()
                .to_string();
            assert!(said.contains("expected numbers"), "{said}");
        }
    }
    let said = prompts
        .set_box(&image.grid, RawBox([1.0, 1.0, 1.0, f64::NAN, 5.0, 5.0]), Space::Lps)
        .unwrap_err()
        .to_string();
    assert!(said.contains("expected numbers") && prompts.is_empty(), "{said}");
}

#[test]
fn a_released_session_that_fails_stays_where_it_was() {
    let model = tiny_model(tiny(), 1);
    let image = std::sync::Arc::new(
        prism::volume::Volume::read(&here("tests/data/odd/m17_oblique.nii.gz"), None).unwrap(),
    );
    let normalization = Normalization { clip: [-1000.0, 400.0], mean: 0.0, sd: 350.0 };
    let options = Options { released: true, spacing: Some(0.5), ..Options::default() };
    let scan = std::sync::Arc::new(Scan::new(&model, image, normalization, options));
    let click = |voxel: [usize; 3]| Prompts { points: vec![(voxel, true)], ..Prompts::default() };
    let mut session = Session::new(&scan);
    // Stopped at the last stage of the interaction.
    let (mut stages, all) = (0, model.steps().iter().sum::<usize>());
    let mut step = |_: usize, _: &str| {
        stages += 1;
        stages < all
    };
    assert!(session.interact_observed(&click([3, 3, 3]), &mut Observer::steps(&mut step)).is_err());
    assert!(session.patch().is_none() && session.prediction().is_none());
    session.interact(&click([60, 44, 20])).unwrap();
}
