//! Sessions: the same prompts give the same bits, undo is exact, errors change nothing.

use crate::common;

use common::{tiny, tiny_model};
use prism::model::{Config, Encoder, Model, Observer, Weights};
use prism::prompt::{Dense, Prompts};
use prism::session::{Options, Scan, Session, SessionError};
use prism::tensor::Tensor;
use prism::volume::intensity::Normalization;
use prism::volume::{Volume, write_mask};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use std::sync::Arc;

/// A scan of noise on an odd grid.
fn scan() -> Volume {
    let base = Volume::read(&common::here("tests/data/odd/m17_oblique.nii.gz"), None).unwrap();
    assert_eq!(base.grid.size, [64, 48, 24]);
    base
}

fn opened(model: &Arc<Model>, released: bool) -> Arc<Scan> {
    opened_with(model, Options { spacing: Some(1.0), released, ..Default::default() })
}

fn opened_with(model: &Arc<Model>, options: Options) -> Arc<Scan> {
    let n = Normalization { clip: [-1000.0, 400.0], mean: -300.0, sd: 350.0 };
    Arc::new(Scan::new(model, Arc::new(scan()), n, options))
}

/// A session that looks at the middle of the scan, where the network alone answers; or one that
/// keeps its contract.
fn session(scan: &Arc<Scan>) -> Session {
    let mut s = Session::new(scan);
    s.prepare(
        &Prompts { bounds: Some([22, 16, 10, 40, 32, 14]), ..Default::default() },
        &mut Observer::none(),
    )
    .unwrap();
    s
}

fn points(rng: &mut StdRng, n: usize) -> Prompts {
    let points = (0..n).map(|_| {
        (
            [rng.random_range(20..40), rng.random_range(15..33), rng.random_range(10..14)],
            rng.random(),
        )
    });
    Prompts { points: points.collect(), ..Default::default() }
}

#[test]
fn sessions_on_one_scan_share_its_undo_history() {
    let model = tiny_model(tiny(), 2);
    let mut rng = StdRng::seed_from_u64(11);
    let steps: Vec<Prompts> = (0..5).map(|_| points(&mut rng, 3)).collect();
    let worked = |scan: &Arc<Scan>| {
        let mut s = session(scan);
        for prompts in &steps {
            s.interact(prompts).unwrap();
        }
        s
    };
    let all = worked(&opened(&model, false));
    assert_eq!(all.depth(), (5, 0));
    let scan =
        opened_with(&model, Options { undo_bytes: all.history_bytes(), ..*all.scan().options() });
    // One has all of it, also after another that is gone.
    for _ in 0..2 {
        assert_eq!(worked(&scan).depth(), (5, 0));
    }
    let _other = Session::new(&scan);
    let sharing = worked(&scan);
    assert!((1..5).contains(&sharing.depth().0), "{:?}", sharing.depth());
}

#[test]
fn a_session_after_undo_equals_a_fresh_one() {
    let model = tiny_model(tiny(), 2);
    let mut rng = StdRng::seed_from_u64(7);
    let steps: Vec<Prompts> = (0..5).map(|i| points(&mut rng, 1 + 3 * i)).collect();
    for released in [true, false] {
        undone(&opened(&model, released), &steps, &mut rng);
    }
}

fn undone(scan: &Arc<Scan>, steps: &[Prompts], rng: &mut StdRng) {
    let run = |list: &[Prompts]| {
        let mut s = session(scan);
        list.iter().for_each(|p| drop(s.interact(p).unwrap().clone()));
        s
    };
    let bits = |s: &Session| {
        s.prediction().map(|p| p.probability().iter().map(|v| v.to_bits()).collect::<Vec<_>>())
    };
    let all = run(steps);
    let mut s = run(steps);
    assert!(s.undo() && s.undo() && s.depth() == (3, 2));
    assert_eq!(bits(&s), bits(&run(&steps[..3])));
    assert!(s.redo() && s.redo() && !s.redo());
    assert_eq!(bits(&s), bits(&all));
    // A different interaction after an undo forgets what was undone.
    assert!(s.undo() && s.undo());
    let other = points(rng, 4);
    s.interact(&other).unwrap();
    assert_eq!(s.depth(), (4, 0));
    let mut fresh = run(&steps[..3]);
    fresh.interact(&other).unwrap();
    assert_eq!(bits(&s), bits(&fresh));
    s.reset();
    assert!(s.prediction().is_none() && !s.undo() && s.mask().iter().all(|v| *v == 0));
    s.interact(&steps[0]).unwrap();
    assert_eq!(bits(&s), bits(&run(&steps[..1])));
}

#[test]
fn threads_do_not_change_the_bits() {
    let mut rng = StdRng::seed_from_u64(3);
    let prompts = points(&mut rng, 9);
    let answer = |threads: usize| {
        let model = tiny_model(tiny(), threads);
        [true, false].map(|released| {
            let mut s = session(&opened(&model, released));
            s.interact(&prompts).unwrap();
            s.interact(&Prompts {
                points: vec![([25, 20, 12], true), ([36, 28, 11], false)],
                ..Default::default()
            })
            .unwrap()
            .probability()
        })
    };
    let one = answer(1);
    assert!(one.iter().flatten().all(|v| v.is_finite()) && one == answer(2) && one == answer(5));
}

#[test]
fn objects_on_one_scan_do_not_disturb_each_other() {
    let model = tiny_model(tiny(), 2);
    let mut rng = StdRng::seed_from_u64(11);
    let (a, b) = (points(&mut rng, 3), points(&mut rng, 5));
    let scan = opened(&model, false);
    let alone = |p: &Prompts| Session::new(&scan).interact(p).unwrap().logits.data().to_vec();
    let (mut x, mut y) = (Session::new(&scan), Session::new(&scan));
    let answers = std::thread::scope(|s| {
        let one = s.spawn(|| x.interact(&a).unwrap().logits.data().to_vec());
        let two = s.spawn(|| y.interact(&b).unwrap().logits.data().to_vec());
        (one.join().unwrap(), two.join().unwrap())
    });
    assert_eq!(answers, (alone(&a), alone(&b)));
}

#[test]
fn an_error_leaves_the_session_as_it_was() {
    let model = tiny_model(tiny(), 2);
    let mut rng = StdRng::seed_from_u64(5);
    let first = points(&mut rng, 3);
    let mut s = Session::new(&opened(&model, false));
    assert!(matches!(s.interact(&Prompts::default()), Err(SessionError::NoPrompt)));
    s.interact(&first).unwrap();
    let before = s.prediction().unwrap().logits.data().to_vec();
    let outside = Prompts { points: vec![([64, 0, 0], true)], ..Default::default() };
    let e = s.interact(&outside).map(|_| ()).unwrap_err().to_string();
    assert_eq!(e, "point [64, 0, 0] lies outside the scan of [64, 48, 24] voxels");
    let wrong = Prompts { dense: Some(Dense::Mask(vec![0; 5])), ..Default::default() };
    assert!(s.interact(&wrong).is_err());
    assert_eq!((s.depth(), s.prediction().unwrap().logits.data()), ((1, 0), &before[..]));
}

#[test]
fn a_mask_or_logits_stand_in_for_the_previous_answer() {
    let model = tiny_model(tiny(), 2);
    let mut rng = StdRng::seed_from_u64(13);
    let p = points(&mut rng, 2);
    let scan = opened(&model, true);
    let answer = |dense: Option<Dense>| {
        let mut s = session(&scan);
        s.interact(&Prompts { dense, ..p.clone() }).unwrap().logits.data().to_vec()
    };
    let n = 64 * 48 * 24;
    let none = answer(None);
    let mask = answer(Some(Dense::Mask((0..n).map(|i| u8::from(i % 3 == 0)).collect())));
    let logits = answer(Some(Dense::Logits((0..n).map(|i| (i % 5) as f32 - 2.0).collect())));
    assert!(none != mask && none != logits && mask != logits);
}

/// Every variant of the architecture builds, runs and gives a mask.
#[test]
fn variants_of_the_network_run() {
    let variants = [
        Config { encoder: Encoder::Vit, ..tiny() },
        Config { encoder: Encoder::Cnn, ..tiny() },
        Config { confidence: false, ..tiny() },
        Config { corrective: false, ..tiny() },
        Config { candidates: 5, window: 2, ..tiny() },
        Config { patch: 48, window: 2, channels: [4, 12, 24, 20, 48], ..tiny() },
    ];
    for config in variants {
        config.check().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        Weights::hashed(config.clone(), "v")
            .save(&path, prism::model::weights::Precision::F16)
            .unwrap();
        let weights = Weights::open(&path).unwrap();
        assert_eq!(weights.config, config);
        let device = prism::device::Device::open("cpu", 2).unwrap();
        let model = Arc::new(Model::new(&device, &weights).unwrap());
        let p = Prompts {
            points: vec![([30, 20, 12], true)],
            bounds: Some([20, 15, 10, 40, 33, 15]),
            ..Default::default()
        };
        let mut s = Session::new(&opened(&model, false));
        let answer = s.interact(&p).unwrap();
        let expected = if config.confidence { config.candidates } else { 1 };
        assert_eq!(answer.candidates.len(), expected);
        assert!(answer.logits.data().iter().all(|v| v.is_finite()), "{config:?}");
    }
}

#[test]
fn shape_errors_name_the_op_and_both_shapes() {
    let model = tiny_model(tiny(), 1);
    let wrong = Tensor::new([16, 16, 16], vec![0.0; 4096]);
    let e = model.encode(&wrong, &mut Observer::none()).map(|_| ()).unwrap_err().to_string();
    assert_eq!(e, "encode: image has shape [16, 16, 16], expected [32, 32, 32]");
    // Weights laid out for one instruction set do not run on another.
    use prism::device::{Cpu, Device, Isa};
    use prism::ops::conv3d::{ConvInput, Epilogue, PackedConv, conv3d};
    let portable = Cpu::with_isa(1, Isa::PORTABLE).unwrap();
    let packed =
        PackedConv::new(&portable, &Tensor::new([4, 4, 3, 3, 3], vec![0.1; 432]), 0..4, None)
            .unwrap();
    let x = Tensor::new([1, 2, 2, 2, 4], vec![1.0; 32]);
    let run = |device: &Device| conv3d(device, ConvInput::shared(&x), &packed, Epilogue::NONE);
    assert!(run(&Device::Cpu(portable)).is_ok());
    if Isa::best() > Isa::PORTABLE {
        let best = Device::open("cpu", 1).unwrap();
        let e = run(&best).map(|_| ()).unwrap_err().to_string();
        assert!(e.contains("pack them for this device"), "{e}");
    }
    let mut missing = tiny();
    missing.candidates = 4;
    let weights = Weights::hashed(tiny(), "x");
    let tensors = tiny()
        .tensors()
        .into_iter()
        .map(|(n, _)| (n.clone(), (*weights.get(&n)).clone()))
        .collect();
    let problems = Weights::from_tensors(missing, tensors).map(|_| ()).unwrap_err();
    assert!(
        problems
            .missing
            .iter()
            .any(|n| n == "mask_decoder.output_hypernetworks_mlps.4.layers.0.weight")
    );
    assert!(problems.misshaped.iter().any(|(n, ..)| n == "prompt_encoder.mask_tokens.weight"));
}

#[test]
fn masks_keep_the_inputs_affine_codes_and_units() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["m15_codes_zero", "m17_oblique", "m18_lefthanded_qform"] {
        let image =
            Volume::read(&common::here(&format!("tests/data/odd/{name}.nii.gz")), None).unwrap();
        let mask: Vec<u8> = (0..image.grid.voxels()).map(|i| u8::from(i % 7 == 0)).collect();
        let path = folder.path().join("mask.nii.gz");
        write_mask(&path, &image, &mask).unwrap().commit().unwrap();
        let back = Volume::read(&path, None).unwrap();
        assert_eq!(
            (back.grid, back.description.affine_from),
            (image.grid, image.description.affine_from),
            "{name}"
        );
        assert!(back.values().iter().zip(&mask).all(|(a, b)| *a == *b as f32));
        let field = |p: &std::path::Path| {
            let mut bytes = vec![];
            std::io::Read::read_to_end(
                &mut flate2::read::MultiGzDecoder::new(std::fs::File::open(p).unwrap()),
                &mut bytes,
            )
            .unwrap();
            // Units, then codes, quaternion and rows.
            (bytes[123], bytes[252..328].to_vec())
        };
        assert_eq!(
            field(&path),
            field(&common::here(&format!("tests/data/odd/{name}.nii.gz"))),
            "{name}"
        );
    }
}
