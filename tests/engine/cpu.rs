//! The CPU's kernels compared with plain sums in float64: every instruction set of this machine,
//! every algorithm for a convolution, in memory of its own and in its input's.

use crate::common;

use prism::device::{Cpu, Device, Isa};
use prism::ops::conv3d::{ConvInput, ConvOutput, Epilogue, PackedConv, conv3d};
use prism::ops::decoder_stage::{DecoderStage, decoder_stage, skip_map};
use prism::ops::linear::{Activation, linear, mlp};
use prism::ops::norm::{ChannelNorm, Sums, apply, layer_norm, sums};
use prism::ops::pointwise::{chosen_mask_logits, mask_logits, max_pool3d};
use prism::tensor::Tensor;

/// Uniform numbers in [-1, 1).
fn noise(shape: &[usize], mut state: u32) -> Tensor {
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    Tensor::new(shape, (0..shape.iter().product()).map(|_| next()).collect())
}

/// The ways in which this machine can compute, and the allowed error of float32 or bfloat16.
fn devices() -> Vec<(Device, f64)> {
    let mut all: Vec<_> =
        Isa::available().map(|isa| (Device::Cpu(Cpu::with_isa(2, isa).unwrap()), 1e-6)).collect();
    match Cpu::new(2).unwrap().in_bf16() {
        Some(cpu) => all.push((Device::Cpu(cpu), 1e-2)),
        None => common::skipped("this processor has no bfloat16"),
    }
    all
}

/// The sum for output channel `o` at a voxel.
fn plain(x: &Tensor, weights: &Tensor, bias: &Tensor, at: [usize; 3], o: usize) -> f64 {
    let [_, d, h, w, c] = x.shape()[..] else { unreachable!() };
    let mut sum = bias.data()[o] as f64;
    for tap in 0..27 {
        let step = [tap / 9, tap / 3 % 3, tap % 3];
        let [i, j, k] = std::array::from_fn(|a| (at[a] + step[a]).wrapping_sub(1));
        if i < d && j < h && k < w {
            let x = &x.data()[((i * h + j) * w + k) * c..][..c];
            sum += x
                .iter()
                .enumerate()
                .map(|(q, v)| *v as f64 * weights.data()[(o * c + q) * 27 + tap] as f64)
                .sum::<f64>();
        }
    }
    sum
}

/// The relative error over voxels spread over a map, its faces and edges among them.
fn error(x: &Tensor, weights: &Tensor, bias: &Tensor, got: &Tensor) -> f64 {
    let [_, d, h, w, outs] = got.shape()[..] else { unreachable!() };
    let (mut wrong, mut all) = (0.0, 0.0);
    for n in 0..400 {
        let pick = |size: usize, by: usize| {
            [n * by % size, 0, size - 1][if n % 3 == 0 { n / 3 % 3 } else { 0 }]
        };
        let (at, o) = ([pick(d, 7), pick(h, 5), n * 11 % w], n % outs);
        let want = plain(x, weights, bias, at, o);
        let got = got.data()[((at[0] * h + at[1]) * w + at[2]) * outs + o] as f64;
        wrong += (got - want).powi(2);
        all += want * want;
    }
    (wrong / all).sqrt()
}

#[test]
fn convolutions_equal_plain_sums_on_every_instruction_set() {
    // By Winograd in broad cells and narrow ones, and directly: wide, channels that fill their
    // blocks and channels that do not, narrow, odd, one channel, several blocks each way, many
    // channels of few voxels, a map deep enough to be convolved in place, one that no cache holds.
    let problems = [
        ([32, 36, 40], 32, 32),
        ([64, 128, 132], 16, 16),
        ([16, 16, 16], 32, 32),
        ([16, 16, 16], 128, 128),
        ([16, 16, 20], 80, 64),
        ([64, 12, 10], 16, 16),
        ([16, 32, 18], 64, 96),
        ([8, 8, 8], 384, 128),
        ([6, 20, 10], 160, 64),
        ([9, 10, 11], 32, 32),
        ([8, 9, 20], 1, 40),
        ([6, 6, 6], 200, 24),
    ];
    for (device, bound) in devices() {
        for ([d, h, w], c, outs) in problems {
            let x = noise(&[1, d, h, w, c], 1);
            let (weights, bias) = (noise(&[outs, c, 3, 3, 3], 2), noise(&[outs], 3));
            let conv = PackedConv::new(device.cpu(), &weights, 0..c, Some(&bias)).unwrap();
            let ConvOutput { map: got, sums: taken, .. } =
                conv3d(&device, ConvInput::shared(&x), &conv, Epilogue::SUMS).unwrap();
            let error = error(&x, &weights, &bias, &got);
            assert!(
                error < bound,
                "{}: {c} to {outs} channels, {d}x{h}x{w}: {error:e}",
                device.describe()
            );
            same_norm(&device, &got, &taken.unwrap());
        }
    }
}

/// Asserts that sums computed on the way normalise a map as its own do.
fn same_norm(device: &Device, map: &Tensor, taken: &Sums) {
    let c = map.channels();
    let (weight, bias) = (noise(&[c], 9), noise(&[c], 10));
    let part = Tensor::new([1, 1, 1, 50, c], map.data()[..50 * c].to_vec());
    let by = |sums: &Sums| {
        apply(device, &part, &sums.instance_norm(&weight, &bias, 1e-5, 0.01).unwrap(), None)
            .unwrap()
    };
    let (a, b) = (by(taken), by(&sums(device, map).unwrap()));
    let wrong = a.data().iter().zip(b.data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(wrong < 1e-5, "{}: {:?}: {wrong:e}", device.describe(), map.shape());
}

#[test]
fn decoder_stages_equal_upsampling_and_convolving_on_every_instruction_set() {
    // By minimal filtering with one block of channels, with more, and with tiles of uneven size;
    // directly for few voxels.
    let problems = [
        ([16, 16, 16], 32, 32),
        ([16, 20, 18], 64, 48),
        ([20, 16, 34], 16, 16),
        ([6, 5, 7], 32, 32),
    ];
    let (up, skip_c) = (8, 4);
    for (device, bound) in devices() {
        for ([d, h, w], c, outs) in problems {
            let fine = [2 * d, 2 * h, 2 * w];
            let x = noise(&[1, d, h, w, c], 1);
            let skip = noise(&[1, fine[0], fine[1], fine[2], skip_c], 2);
            let (deconv, deconv_bias) = (noise(&[c, up, 2, 2, 2], 3), noise(&[up], 4));
            let (weights, bias) = (noise(&[outs, skip_c + up, 3, 3, 3], 5), noise(&[outs], 6));
            let stage = DecoderStage::new(&device, &deconv, &deconv_bias, &weights, &bias).unwrap();
            let prepared = skip_map(
                &device,
                &stage,
                Some(ConvInput::shared(&skip)),
                [1, fine[0], fine[1], fine[2]],
            )
            .unwrap();
            let ConvOutput { map: got, sums: taken, .. } =
                decoder_stage(&device, &stage, &ConvInput::shared(&x), &prepared).unwrap();
            // What the network concatenates, in float32.
            let mut both = vec![];
            for voxel in 0..fine.iter().product() {
                let at = [voxel / fine[2] / fine[1], voxel / fine[2] % fine[1], voxel % fine[2]];
                let coarse = &x.data()[((at[0] / 2 * h + at[1] / 2) * w + at[2] / 2) * c..][..c];
                let tap = at[0] % 2 * 4 + at[1] % 2 * 2 + at[2] % 2;
                both.extend(&skip.data()[voxel * skip_c..][..skip_c]);
                for u in 0..up {
                    let sum: f64 = coarse
                        .iter()
                        .enumerate()
                        .map(|(i, v)| *v as f64 * deconv.data()[(i * up + u) * 8 + tap] as f64)
                        .sum();
                    both.push((sum + deconv_bias.data()[u] as f64) as f32);
                }
            }
            let both = Tensor::new([1, fine[0], fine[1], fine[2], skip_c + up], both);
            let error = error(&both, &weights, &bias, &got);
            assert!(
                error < bound,
                "{}: {c} to {outs} channels, {d}x{h}x{w}: {error:e}",
                device.describe()
            );
            same_norm(&device, &got, &taken.unwrap());
        }
    }
}

#[test]
fn a_map_convolved_in_place_gives_the_same_bits_and_its_pooled_map() {
    for (device, _) in devices() {
        let mut pools = 0;
        for (channels, [d, h, w]) in
            [(16, [64, 12, 10]), (32, [70, 8, 16]), (32, [64, 24, 28]), (24, [65, 9, 6])]
        {
            let shape = [1, d, h, w, channels];
            let conv = |seed| {
                PackedConv::new(
                    device.cpu(),
                    &noise(&[channels, channels, 3, 3, 3], seed),
                    0..channels,
                    None,
                )
                .unwrap()
            };
            let convs = [conv(5), conv(6), conv(7), conv(8)];
            let (weight, bias) = (noise(&[channels], 9), noise(&[channels], 10));
            let run = |x: ConvInput, conv: &PackedConv, pool: Option<&Tensor>| {
                conv3d(&device, x, conv, Epilogue { sums: true, pool }).unwrap()
            };
            let norm = |sums: Option<Sums>| -> ChannelNorm {
                sums.unwrap().instance_norm(&weight, &bias, 1e-5, 0.01).unwrap()
            };
            let [start, again] =
                [(); 2].map(|()| run(ConvInput::owned(noise(&shape, 4)), &convs[0], None));
            let (mut apart, mut norm_apart) = (start.map, norm(start.sums));
            let (mut inplace, mut norm_inplace) = (again.map, norm(again.sums));
            // Back and forth through the memory's room, and once more.
            for conv in &convs[1..] {
                let before = apart.data().to_vec();
                let shared = ConvInput::shared(&apart).normed(&norm_apart);
                let ConvOutput { map, sums, pooled: pooled_apart } =
                    run(shared, conv, Some(&weight));
                assert!(apart.data() == before, "{}: a shared map", device.describe());
                (apart, norm_apart) = (map, norm(sums));
                let given = ConvInput::owned(inplace).normed(&norm_inplace);
                let was = given.map.data().as_ptr() as usize;
                let ConvOutput { map, sums, pooled } = run(given, conv, Some(&weight));
                (inplace, norm_inplace) = (map, norm(sums));
                // It was shifted within the room of ten planes: other memory is 64 planes away.
                // Tiles of the smallest map may be deeper than that room: then it is written
                // separately.
                let moved = (inplace.data().as_ptr() as usize).abs_diff(was);
                assert!(
                    moved <= 10 * h * w * channels * 4 || channels == 24,
                    "{}: {channels} channels: not in its input's memory",
                    device.describe()
                );
                assert!(
                    pooled.as_ref().map(Tensor::data) == pooled_apart.as_ref().map(Tensor::data),
                    "{}: pooled apart",
                    device.describe()
                );
                if let Some(pooled) = pooled {
                    let whole = apply(&device, &inplace, &norm_inplace, None).unwrap();
                    let expected = max_pool3d(&device, &whole).unwrap();
                    assert!(
                        apply(&device, &pooled, &norm_inplace, None).unwrap().data()
                            == expected.data(),
                        "{}: pooled",
                        device.describe()
                    );
                    pools += 1;
                }
                assert!(
                    apart.data() == inplace.data(),
                    "{}: {channels} channels",
                    device.describe()
                );
            }
        }
        // The layers that go by minimal filtering: those of even maps and of channels that fill
        // registers.
        assert_eq!(pools, 9, "{}", device.describe());
    }
}

#[test]
fn the_chosen_head_and_all_bits_are_those_of_all_maps() {
    for (device, _) in devices() {
        let (c, m, shape) = (20, 3, [1, 10, 11, 12, 20]);
        let x = noise(&shape, 1);
        let norm = sums(&device, &x)
            .unwrap()
            .instance_norm(&noise(&[c], 2), &noise(&[c], 3), 1e-5, 0.01)
            .unwrap();
        let weights = noise(&[m, c], 4);
        let all = mask_logits(&device, &x, &norm, None, &weights, None).unwrap();
        let voxels = x.rows();
        for chosen in 0..m {
            let (map, bits) =
                chosen_mask_logits(device.cpu(), &x, &norm, &weights, chosen).unwrap();
            assert!(map.data() == &all.data()[chosen * voxels..][..voxels]);
            for (j, bits) in bits.iter().enumerate() {
                let all = &all.data()[j * voxels..][..voxels];
                assert!(
                    all.iter()
                        .enumerate()
                        .all(|(i, v)| (bits[i / 8] >> (7 - i % 8) & 1 == 1) == (*v > 0.0)),
                    "map {j}"
                );
            }
        }
    }
}

/// The area under the standard normal density from 0 to `x`, by Simpson's rule.
fn area(x: f64) -> f64 {
    let density = |t: f64| (-0.5 * t * t).exp() / std::f64::consts::TAU.sqrt();
    let step = x / 400.0;
    (0..=400)
        .map(|i| {
            density(i as f64 * step) * if i == 0 || i == 400 { 1.0 } else { [2.0, 4.0][i % 2] }
        })
        .sum::<f64>()
        * step
        / 3.0
}

#[test]
fn a_transformers_layers_at_once_give_the_bits_of_one_by_one() {
    for (device, bound) in devices() {
        for (rows, c, hidden) in [(37, 64, 96), (300, 96, 192), (9, 20, 50), (1, 32, 32)] {
            let x = noise(&[rows, c], 1);
            let [weight, bias] = [2, 3].map(|seed| noise(&[c], seed));
            let first = (noise(&[hidden, c], 4), noise(&[hidden], 5));
            let second = (noise(&[c, hidden], 6), noise(&[c], 7));
            let got = mlp(
                &device,
                &x,
                (&weight, &bias, 1e-5),
                (&first.0, &first.1),
                (&second.0, &second.1),
            )
            .unwrap();
            let normed = layer_norm(&device, &x, &weight, &bias, 1e-5, false).unwrap();
            let inner =
                linear(&device, &normed, &first.0, Some(&first.1), Activation::Gelu, None).unwrap();
            let expected =
                linear(&device, &inner, &second.0, Some(&second.1), Activation::None, Some(&x))
                    .unwrap();
            assert!(
                got.data() == expected.data(),
                "{}: {rows} rows, {c} to {hidden}",
                device.describe()
            );
            // And those are right: the first layer in float64.
            let most = inner.data().iter().fold(0f64, |m, v| m.max(v.abs() as f64));
            for r in 0..rows {
                let row: Vec<f64> = x.data()[r * c..][..c].iter().map(|v| *v as f64).collect();
                let mean = row.iter().sum::<f64>() / c as f64;
                let scale = (row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / c as f64 + 1e-5)
                    .sqrt()
                    .recip();
                for o in 0..hidden {
                    let normed = |i: usize| {
                        (row[i] - mean) * scale * weight.data()[i] as f64 + bias.data()[i] as f64
                    };
                    let sum =
                        (0..c).map(|i| normed(i) * first.0.data()[o * c + i] as f64).sum::<f64>()
                            + first.1.data()[o] as f64;
                    let gelu = sum * (0.5 + area(sum));
                    let error = (inner.data()[r * hidden + o] as f64 - gelu).abs() / most;
                    assert!(error < bound, "{}: row {r}, output {o}: {error:e}", device.describe());
                }
            }
        }
    }
}
