//! Recorded programs: replayed, they give the bits of their ops.

use crate::common::{self, device_name, tiny};
use crate::{at_length, open, replayed_equals_its_ops};
use prism::bench::TrainingStep;
use prism::device::{DType, Precision};
use prism::model::{Config, Encoder, PatchPrompts};
use prism::ops::loss::{KERNEL, Target};
use prism::tensor::Tensor;

/// Programs that are recorded and replayed give the same bits as the same work done op by op, for
/// any number of tokens, and where scans take turns. The whole network does so in both precisions,
/// and so every op of each. The networks that lack a part, whose programs are other ones, do so on
/// the emulator in 16 bits alone, and on a patch of an eighth of the voxels; on a GPU, where that
/// takes no time, in both, on the whole patch.
#[test]
fn replayed_programs_equal_their_ops() {
    use Precision::{F16, F32};
    for precision in [F32, F16] {
        replayed_equals_its_ops(tiny(), &open(precision));
    }
    let emulated = device_name() == "emulated";
    let part = || Config { patch: if emulated { 16 } else { tiny().patch }, ..tiny() };
    for config in [
        Config { corrective: false, ..part() },
        Config { confidence: false, ..part() },
        Config { encoder: Encoder::Vit, ..part() },
        Config { encoder: Encoder::Cnn, ..part() },
    ] {
        for precision in if emulated { &[F16][..] } else { &[F32, F16] } {
            replayed_equals_its_ops(config.clone(), &open(*precision));
        }
    }
}

/// Replayed programs equal their ops at the size at which launches, and branches, do overlap.
#[test]
fn replayed_programs_of_the_base_network_equal_their_ops() {
    if device_name() == "emulated" {
        common::skipped("the base network takes a GPU");
        return;
    }
    for precision in [Precision::F32, Precision::F16] {
        replayed_equals_its_ops(Config::base(), &open(precision));
    }
}

/// Steps by replay learn what the same steps learn op by op, to the last bit, while the number of
/// points changes. On the emulator, another test (in `src/train/run/batch.rs`) always holds weights
/// and moments, too, against those of ops.
#[test]
fn replayed_programs_of_training_equal_their_ops() {
    if !at_length() {
        return;
    }
    let (device, config, s) = (open(DType::F16), tiny(), tiny().patch);
    let image = Tensor::new(
        [s; 3],
        (0..s * s * s).map(|i| ((i * 7919) % 997) as f32 / 500.0 - 1.0).collect::<Vec<_>>(),
    );
    let label = (0..s * s * s).map(|i| f32::from(u8::from(i / s / s > 10 && i % s < 20))).collect();
    let target = Target::new(&device, label, [s; 3], KERNEL).unwrap();
    let step = || TrainingStep::new(&device, config.clone(), 2, true);
    let (mut plain, mut replayed) = (step(), step().replayed());
    for (at, count) in [1, 12, 2, 11, 1, 12].into_iter().enumerate() {
        let points = (0..count).map(|i| ([15, 16, 9 + i], i == 0)).collect();
        let prompts = PatchPrompts { points, bounds: None };
        let [(expected, before), (outcome, norm)] = [&mut plain, &mut replayed]
            .map(|step| step.run(&image, &target, &prompts).expect("a step"));
        assert_eq!(norm.to_bits(), before.to_bits(), "step {at}");
        assert_eq!(outcome.loss.to_bits(), expected.loss.to_bits(), "step {at}");
        assert_eq!(outcome.iterations, expected.iterations, "step {at}");
    }
    // The first and the second iteration, and the first one's answer, for up to 16 and up to 32
    // tokens; some again, in more memory.
    let [encoder, taped, answers] = replayed.recorded();
    assert!(encoder == 1 && taped >= 4 && answers >= 2, "{encoder}, {taped}, {answers}");
    assert_eq!(plain.recorded(), [0; 3]);
}
