//! A training pass as on the CPU: its losses, its optimiser, and what a step copies.

use crate::common::{apart, tiny};
use crate::{cuda_of, learn, open, transfers, whole};
use prism::bench::TrainingStep;
use prism::device::{DType, Device, Precision};
use prism::model::PatchPrompts;
use prism::ops::loss::{self, Emphasis, KERNEL, Target, Terms};
use prism::ops::optimizer::{AdamW, AdamWConfig, follow, global_norm};
use prism::tensor::Tensor;

#[test]
fn a_training_pass_loses_and_learns_as_on_the_cpu() {
    let (loss, gradients) = learn(&Device::open("cpu", 0).unwrap(), 1.0);
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    for (dtype, scale, bound) in [
        (Precision::F32, 1.0, 1e-4),
        (Precision::Tf32, 1.0, 2e-2),
        (Precision::F16, 65536.0, 2e-2),
        (Precision::Bf16, 1.0, 6e-2),
    ] {
        let (l, g) = learn(&open(dtype), scale);
        assert_eq!(g.len(), gradients.len());
        let apart = norm(&mut g.iter().zip(&gradients).map(|(a, b)| a - b))
            / norm(&mut gradients.iter().copied());
        eprintln!("{dtype}: loss {l}, on the CPU {loss}; gradients {apart} apart");
        assert!(
            (l / loss - 1.0).abs() < bound && apart < 5.0 * bound,
            "{dtype}: loss {l}, on the CPU {loss}; gradients {apart} apart"
        );
    }
}

/// A training step whose weights are on the device uploads what is new, and downloads a few
/// numbers: the losses, and the gradients' norm, both after all of its work. No weight, no gradient
/// and no map is copied, and nothing else is waited for: no copy to the device either.
#[test]
fn a_training_step_keeps_weights_gradients_and_maps_on_the_device() {
    let Device::Cuda(cuda) = open(DType::F16) else { panic!("no CUDA device") };
    let (device, config, s) = (Device::Cuda(cuda.clone()), tiny(), tiny().patch);
    let lengths: Vec<usize> =
        config.tensors().iter().map(|(_, shape)| shape.iter().product()).collect();
    let iterations = 2;
    let mut step = TrainingStep::new(&device, config, iterations, false);
    let image = Tensor::new(
        [s; 3],
        (0..s * s * s).map(|i| ((i * 7919) % 997) as f32 / 500.0 - 1.0).collect::<Vec<_>>(),
    );
    let label = (0..s * s * s).map(|i| f32::from(u8::from(i / s / s > 10 && i % s < 20))).collect();
    let target = Target::new(&device, label, [s; 3], KERNEL).unwrap();
    let prompts =
        PatchPrompts { points: vec![([15, 16, 9], true), ([2, 2, 2], false)], bounds: None };
    let mut crossed = || {
        let before = (transfers(&device), cuda.carried(), cuda.waits());
        let (outcome, _) = step.run(&image, &target, &prompts).unwrap();
        assert!(outcome.loss.is_finite() && outcome.iterations.len() == iterations);
        let (times, bytes) = (transfers(&device), cuda.carried());
        let crossed = [0, 1].map(|way| (times[way] - before.0[way], bytes[way] - before.1[way]));
        (crossed, cuda.waits() - before.2)
    };
    // The first uploads all weights.
    crossed();
    let ([up, down], waits) = crossed();
    assert_eq!(waits, 0, "copies to the device waited");
    assert_eq!(crossed(), ([up, down], 0), "steps differ");
    assert_eq!(down.0, 1, "copies back");
    assert!(down.1 < 1024, "{} bytes came back", down.1);
    // For the norm and for the optimiser one table each of the addresses of tensors and the run of
    // each block; the position code of the token grid; in each iteration tokens, their number,
    // marks and two tables.
    assert!(up.0 <= 3 + 5 * iterations as u64, "{} copies to the device", up.0);
    let tables: usize = lengths.iter().map(|n| 2 * (40 + 8 * n.div_ceil(1 << 14))).sum();
    assert!(up.1 < tables as u64 + (16 << 10), "{} bytes went up, {tables} of tables", up.1);
}

/// A label goes to the device as a bit of each voxel, or as it is if its voxels fill no bytes.
#[test]
fn a_label_goes_to_the_device_as_bits() {
    for (size, bytes) in [([4, 6, 5], 15), ([3, 3, 3], 108)] {
        for dtype in [DType::F32, DType::F16] {
            let device = open(dtype);
            let (cuda, voxels) = (cuda_of(&device), size.iter().product::<usize>());
            let label: Vec<f32> =
                (0..voxels).map(|i| f32::from(u8::from(i % 3 == 0 || i > 90))).collect();
            let before = (transfers(&device), cuda.carried());
            let target = Target::new(&device, label.clone(), size, KERNEL).unwrap();
            let after = (transfers(&device), cuda.carried());
            let crossed =
                [0, 1].map(|way| (after.0[way] - before.0[way], after.1[way] - before.1[way]));
            assert_eq!(crossed, [(1, bytes), (0, 0)], "{dtype}, {size:?}");
            assert_eq!(target.label(), label);
            // Of logits of 0 the first sum is half the label's volume.
            let logits = Tensor::new([1, voxels], vec![0.0; voxels]);
            let sums = loss::mask_sums(&device, &logits, &target).unwrap().read().unwrap();
            let volume: f32 = label.iter().sum();
            assert_eq!(sums[0][0], f64::from(volume) / 2.0, "{dtype}, {size:?}");
        }
    }
}

/// Gradients that overflowed change nothing, and the host does not have to know it to take the
/// step.
#[test]
fn a_step_of_gradients_that_are_no_numbers_changes_nothing() {
    let config = AdamWConfig { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.1, max_norm: 1.0 };
    for device in [open(DType::F32), Device::open("cpu", 0).unwrap()] {
        let (mut value, mut average) = (whole(&[40], 1), [whole(&[40], 2)]);
        let mut adamw = AdamW::new(config, &[40]);
        let mut step = |seed: usize, gradient: f32| {
            let mut g = whole(&[40], seed).data().to_vec();
            g[7] += gradient;
            let g = Tensor::from(g);
            let norm = global_norm(&device, &[Some(&g)]).unwrap();
            let mut list = [&mut value];
            adamw.step(&device, 0.1, &mut list, &[Some(&g)], &norm, 2.0).unwrap();
            follow(&device, &mut average, &[&*list[0]], 0.5, &norm).unwrap();
            if !norm.read().unwrap().is_finite() {
                adamw.take_back();
            }
            let values = [value.data().to_vec(), average[0].data().to_vec()];
            (values, adamw.steps())
        };
        let first = step(3, 0.0);
        assert_eq!(first.1, 1);
        for broken in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(step(4, broken), first);
        }
        let second = step(5, 0.0);
        assert!(second.1 == 2 && second.0[0] != first.0[0] && second.0[1] != first.0[1]);
    }
}

/// Losses of masks, of their scores and near clicks, and the gradients of all.
#[test]
fn losses_are_as_on_the_cpu() {
    let (s, masks) = ([6, 20, 40], 3);
    let voxels: usize = s.iter().product();
    let noise = |len: usize, seed: usize| -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + seed * 131) % 997) as f32 / 166.0 - 3.0).collect()
    };
    let label: Vec<f32> = noise(voxels, 1).iter().map(|v| f32::from(u8::from(*v > 1.0))).collect();
    let clicks = [[0, 0, 0], [5, 19, 39], [5, 17, 38], [2, 9, 20]];
    let run = |device: &Device| {
        let target = Target::new(device, label.clone(), s, KERNEL).unwrap();
        // Numbers that are exact in 16 bits.
        let on = |shape: &[usize], seed: usize| {
            let count: usize = shape.iter().product();
            let values = noise(count, seed).iter().map(|v| (v * 16.0).round() / 16.0).collect();
            Tensor::new(shape, values)
        };
        let (x, scores) = (on(&[masks, voxels], 3), on(&[masks, 1], 4));
        let terms = Terms { region: 0.5, boundary: 5.0 };
        let (sums, dx) = loss::mask_sums_gradient(device, &x, &target, terms, 64.0).unwrap();
        let ds = loss::score_gradient(device, &sums, &scores, &target, 2.0, 64.0).unwrap();
        let emphasis = Emphasis::new(&clicks, s, 3.0, 0.7).unwrap();
        let (near, both) =
            loss::emphasis(device, &x, &target, &emphasis, 64.0, dx.clone()).unwrap();
        let none = Emphasis::new(&[], s, 3.0, 0.7).unwrap();
        let (nothing, same) = loss::emphasis(device, &x, &target, &none, 64.0, dx.clone()).unwrap();
        assert_eq!(same.data(), dx.data());
        let read = loss::read(device, &[&sums, &near, &nothing], &[&scores], &[]).unwrap();
        let (all, values) = (read.sums, read.scores);
        assert_eq!((&all[0], &values[0][..]), (&sums.read().unwrap(), scores.data()));
        assert_eq!(all[2], [[0.0; 5]; 3]);
        let lost: Vec<f32> = all[0]
            .iter()
            .map(|sums| target.loss(*sums).total(terms) as f32)
            .chain(all[1].iter().map(|sums| sums[0] as f32))
            .collect();
        [lost, ds.data().to_vec(), dx.data().to_vec(), both.data().to_vec()]
    };
    let expected = run(&Device::open("cpu", 0).unwrap());
    for (dtype, bound) in [(DType::F32, 1e-5), (DType::F16, 2e-3), (DType::Bf16, 2e-2)] {
        for (at, (got, want)) in run(&open(dtype)).iter().zip(&expected).enumerate() {
            assert_eq!(got.len(), want.len());
            let apart = apart(got, want);
            assert!(apart < bound, "{dtype}, {at}: {apart}");
        }
    }
}

/// A device computes the weights of voxels near clicks that the CPU computes, to the last bit: of
/// clicks at the volume's corners and borders, clicks that overlap, more of them than a warp looks
/// at at once, and volumes of which a block has a part of a plane, or several planes and a part.
#[test]
fn weights_near_clicks_are_those_of_the_cpu() {
    let spread = |count: usize, [d, h, w]: [usize; 3]| -> Vec<[i32; 3]> {
        (0..count).map(|i| [i * 7 % d, i * 31 % h, i * 53 % w].map(|at| at as i32)).collect()
    };
    let corners = |[d, h, w]: [usize; 3]| {
        let [d, h, w] = [d, h, w].map(|edge| edge as i32 - 1);
        vec![[0, 0, 0], [d, h, w], [d, 0, w], [0, h, w / 2], [0, h, w / 2 - 1], [0, h, w / 2]]
    };
    for (size, deviation, clicks) in [
        ([5, 70, 130], 3.0, corners([5, 70, 130])),
        ([5, 70, 130], 1.0, spread(75, [5, 70, 130])),
        ([40, 9, 25], 3.0, vec![[39, 8, 24], [37, 8, 24], [20, 4, 0]]),
        ([40, 9, 25], 0.5, spread(33, [40, 9, 25])),
        ([3, 1, 5000], 3.0, vec![[1, 0, 4096], [1, 0, 4090], [2, 0, 4999]]),
    ] {
        let voxels = size.iter().product::<usize>();
        let label: Vec<f32> = (0..voxels).map(|i| f32::from(u8::from(i % 3 == 0))).collect();
        let emphasis = Emphasis::new(&clicks, size, deviation, 0.7).unwrap();
        let run = |device: &Device, x: Vec<f32>| {
            let target = Target::new(device, label.clone(), size, KERNEL).unwrap();
            let [x, none] = [x, vec![0.0; 2 * voxels]].map(|v| Tensor::new([2, voxels], v));
            let (sums, dx) = loss::emphasis(device, &x, &target, &emphasis, 64.0, none).unwrap();
            let sums: Vec<f32> = sums.read().unwrap().iter().map(|sums| sums[0] as f32).collect();
            (sums, dx.data().to_vec())
        };
        let cpu = Device::open("cpu", 0).unwrap();
        let what = format!("{size:?}, {} clicks, {deviation}", clicks.len());
        // Of logits of 0 the gradient is half the weight times a number, or minus that.
        let (_, expected) = run(&cpu, vec![0.0; 2 * voxels]);
        let (_, got) = run(&open(DType::F32), vec![0.0; 2 * voxels]);
        let other = got.iter().zip(&expected).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(other, None, "{what}: a voxel has another weight");
        let there = expected.iter().filter(|g| **g != 0.0).count();
        assert!(there >= 2 * clicks.len().min(4) && there < 2 * voxels, "{what}: {there} weigh");
        // Losses and gradients of other logits, which are exact in 16 bits.
        let x: Vec<f32> = (0..2 * voxels).map(|i| ((i * 7919) % 97) as f32 / 16.0 - 3.0).collect();
        let (sums, expected) = run(&cpu, x.clone());
        for (dtype, bound) in [(DType::F32, 1e-5), (DType::F16, 2e-3), (DType::Bf16, 2e-2)] {
            let (got_sums, got) = run(&open(dtype), x.clone());
            let errors = [apart(&got_sums, &sums), apart(&got, &expected)];
            assert!(errors.iter().all(|e| *e < bound), "{what}, {dtype}: {errors:?}");
        }
    }
}
