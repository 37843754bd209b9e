//! Gradients of ops as on the CPU.

use crate::common::{apart, judge_padding, judge_sums, read_by_three};
use crate::{PRECISIONS, cuda_of, open, whole};
use prism::autograd::{ParamGrads, Tape};
use prism::device::{DType, Device, Precision};
use prism::ops::attention::VitWeights;
use prism::ops::conv3d::{self, ConvInput};
use prism::ops::{decoder_stage, linear, norm, pointwise};
use prism::tensor::{Param, Tensor};

/// The gradients of the input and of every parameter, through windows that are partly beyond the
/// grid: several of them, in several items; one, of the released network's shape; with lines of
/// more than 8 tokens and lines of one; with heads of an odd number of channels, and of a number
/// for which a fragment is half full.
#[test]
fn attention_in_windows_goes_back_as_on_the_cpu() {
    for (n, s, edge, heads, width) in
        [(2, 5, 3, 2, 12), (1, 8, 14, 1, 32), (1, 10, 9, 2, 16), (1, 4, 3, 2, 14), (1, 4, 3, 1, 24)]
    {
        windows_go_back_as_on_the_cpu(n, s, edge, heads, width);
    }
}

fn windows_go_back_as_on_the_cpu(n: usize, s: usize, edge: usize, heads: usize, width: usize) {
    let noise = |shape: &[usize], seed: usize| {
        let count: usize = shape.iter().product();
        Tensor::new(
            shape,
            (0..count).map(|i| ((i * 7919 + seed * 131) % 997) as f32 / 997.0 - 0.5).collect(),
        )
    };
    let param = |id: usize, shape: &[usize]| Param::new(noise(shape, id), id);
    let weights = || VitWeights {
        qkv: (param(0, &[3 * width, width]), param(1, &[3 * width])),
        proj: (param(2, &[width, width]), param(3, &[width])),
        rel_pos: [4, 5, 6].map(|id| param(id, &[2 * edge - 1, width / heads])),
        heads,
        window: edge,
    };
    let gradients = |device: &Device| -> Vec<Vec<f32>> {
        let (weights, mut grads) = (weights(), ParamGrads::new(7));
        let tape = Tape::on(device);
        let x = tape.leaf(noise(&[n, s, s, s, width], 9));
        let y = tape.vit_attention(&weights, &x, None).unwrap();
        let mut leaves = tape.backward(vec![(&y, noise(y.shape(), 10))], &mut grads).unwrap();
        let dx = leaves.take(&x).unwrap().data().to_vec();
        (0..7).map(|id| grads.get(id).unwrap().to_vec()).chain([dx]).collect()
    };
    let expected = gradients(&Device::open("cpu", 0).unwrap());
    for (dtype, bound) in [
        (Precision::F32, 1e-5),
        (Precision::Tf32, 1e-2),
        (Precision::Ieee, 1e-5),
        (Precision::F16, 1e-2),
        (Precision::Bf16, 8e-2),
    ] {
        for (id, (got, want)) in gradients(&open(dtype)).iter().zip(&expected).enumerate() {
            let apart = apart(got, want);
            assert!(apart < bound, "{dtype}, {s} in windows of {edge}, gradient {id}: {apart}");
        }
    }
}

/// Gradients through the attention of tokens, and to tokens, behind which there is padding.
#[test]
fn attention_with_padding_goes_back_as_without() {
    for precision in PRECISIONS {
        judge_padding(&open(precision)).unwrap_or_else(|e| panic!("{precision}: {e}"));
    }
}

/// The backward pass through a stage's composition, for sizes that fill no block and for several
/// blocks.
#[test]
fn a_composition_goes_back_as_on_the_cpu() {
    for [out, coarse, up, skip] in [[5, 70, 18, 3], [66, 7, 3, 0], [4, 6, 65, 1]] {
        let (deconv, conv) =
            (whole(&[coarse, up, 2, 2, 2], 1), whole(&[out, skip + up, 3, 3, 3], 2));
        let composed = whole(&[8, out, coarse, 8], 3);
        let gradients = |device: &Device| {
            decoder_stage::grad::weights(device, &composed, &deconv, &conv)
                .unwrap()
                .map(|g| (g.shape().to_vec(), g.data().to_vec()))
        };
        assert_eq!(gradients(&open(DType::F32)), gradients(&Device::open("cpu", 0).unwrap()));
    }
}

/// The gradients of a stage's biases, from maps whose edges have all kinds of voxel or few of them.
#[test]
fn biases_of_a_stage_go_back_as_on_the_cpu() {
    for ([d, h, w], out, up, skip) in [([4, 6, 4], 5, 3, 4), ([2, 2, 6], 20, 9, 0)] {
        let (g, conv, bias) =
            (whole(&[2, d, h, w, out], 1), whole(&[out, skip + up, 3, 3, 3], 2), whole(&[up], 3));
        let part = (skip > 0).then(|| whole(&[out, skip, 3, 3, 3], 4));
        let gradients = |device: &Device| {
            decoder_stage::grad::biases(device, &g, &conv, &bias, part.as_ref())
                .unwrap()
                .map(|g| (g.shape().to_vec(), g.data().to_vec()))
        };
        assert_eq!(gradients(&open(DType::F32)), gradients(&Device::open("cpu", 0).unwrap()));
    }
}

/// Each kernel that computes one of several gradients of a tensor adds it to those before it. A sum
/// computes nothing: if it comes after another gradient, the addition takes a launch.
#[test]
fn gradients_are_added_up_where_they_are_computed() {
    judge_sums(&Device::open("cpu", 2).unwrap()).unwrap();
    for precision in PRECISIONS {
        let device = open(precision);
        judge_sums(&device).unwrap_or_else(|e| panic!("{precision}: {e}"));
        // One launch computes the sum itself.
        for (sum_first, expected) in [(false, 1), (true, 2)] {
            let run = || read_by_three(&device, 24, sum_first);
            let (seen, _) = cuda_of(&device).launches(false, run).unwrap();
            let adds = seen.iter().filter(|launch| launch.kernel.starts_with("add_")).count();
            assert_eq!(adds, expected, "{precision}, the sum first: {sum_first}");
        }
    }
}

/// The gradient of a map that is pooled, with and without a gradient so far.
#[test]
fn pooled_maps_go_back_to_the_sum_with_the_gradient_so_far() {
    let shape = [2, 4, 6, 8, 5];
    let (x, g, so_far) = (whole(&shape, 1), whole(&[2, 2, 3, 4, 5], 2), whole(&shape, 3));
    let run = |device: &Device, so_far: Option<&Tensor>| {
        let gradient = conv3d::grad::unpool(device, &ConvInput::shared(&x), &g, so_far);
        gradient.unwrap().data().to_vec()
    };
    let cpu = Device::open("cpu", 2).unwrap();
    let alone = run(&cpu, None);
    assert!(alone.iter().filter(|v| **v != 0.0).count() <= g.len());
    let sum: Vec<f32> = alone.iter().zip(so_far.data()).map(|(g, s)| g + s).collect();
    for device in [cpu, open(DType::F32), open(DType::F16), open(DType::Bf16)] {
        assert_eq!(run(&device, None), alone, "{:?}", device.precision());
        assert_eq!(run(&device, Some(&so_far)), sum, "{:?}", device.precision());
        let short = conv3d::grad::unpool(&device, &ConvInput::shared(&x), &g, Some(&g));
        assert!(short.is_err_and(|e| e.to_string().contains("the gradient so far")));
    }
}

/// Dense layers' gradients: of inputs by weights in their stored order, also if blocks share the
/// product, or transposed, and as a sum; of weights by one run of rows, a few and many.
#[test]
fn dense_layers_go_back_as_on_the_cpu() {
    let cpu = Device::open("cpu", 0).unwrap();
    for [m, n, k] in [
        [5, 8, 8],
        [70, 72, 136],
        [3, 1600, 40],
        [100, 33, 7],
        [9, 24, 20],
        [1300, 40, 16],
        [130, 136, 70],
    ] {
        let (x, w, dy) = (whole(&[m, k], 1), whole(&[n, k], 2), whole(&[m, n], 3));
        let run = |device: &Device| {
            let (so_far, of_input) = (Some(whole(&[n, k], 4)), whole(&[m, k], 5));
            [
                linear::grad::input(device, &w, &dy),
                linear::grad::input_onto(device, &w, &dy, Some(&of_input)),
                linear::grad::weight(device, &x, &dy),
                linear::grad::weight_onto(device, &x, &dy, so_far),
            ]
            .map(|gradient| gradient.unwrap().data().to_vec())
        };
        let [want_x, want_onto, want_w, want_sum] = run(&cpu);
        for (dtype, rounding) in [
            (Precision::F32, 0.0),
            (Precision::Tf32, 0.0),
            (Precision::Ieee, 0.0),
            (Precision::F16, 1.0 / 1024.0),
            (Precision::Bf16, 1.0 / 128.0),
        ] {
            let [got_x, got_onto, got_w, got_sum] = run(&open(dtype));
            assert_eq!(got_w, want_w, "{dtype}, [{m}, {n}, {k}]");
            assert_eq!(got_sum, want_sum, "{dtype}, [{m}, {n}, {k}]");
            // One rounding each.
            for (got, want) in [(&got_x, &want_x), (&got_onto, &want_onto)] {
                assert_eq!(got.len(), want.len());
                let near = |(got, want): (&f32, &f32)| (got - want).abs() <= rounding * want.abs();
                assert!(got.iter().zip(want).all(near), "{dtype}, [{m}, {n}, {k}]");
            }
        }
    }
}

/// The gradient of a convolution's weights, from few parts and from as many as warps share.
#[test]
fn weights_of_a_convolution_go_back_as_on_the_cpu() {
    let cpu = Device::open("cpu", 0).unwrap();
    for ([d, h, w], c, outs) in [([4, 8, 9], 5, 40), ([8, 24, 24], 3, 5)] {
        let (x, dy) = (whole(&[1, d, h, w, c], 1), whole(&[1, d, h, w, outs], 2));
        let run = |device: &Device| {
            let (x, so_far) = (ConvInput::shared(&x), Some(whole(&[outs, c, 3, 3, 3], 3)));
            [None, so_far].map(|so_far| {
                let gradient = conv3d::grad::weight_onto(device, &x, &dy, so_far);
                gradient.unwrap().data().to_vec()
            })
        };
        let want = run(&cpu);
        for dtype in [DType::F32, DType::F16] {
            assert_eq!(run(&open(dtype)), want, "{dtype}, {c} to {outs} channels");
        }
    }
}

/// Norms, their gradients and those of the mask heads, over several tiles of rows, in one item and
/// in two, by vectors and by single values.
#[test]
fn norms_and_mask_logits_go_back_as_on_the_cpu() {
    // Numbers that are exact in 16 bits.
    let noise = |shape: &[usize], seed: usize| {
        let count: usize = shape.iter().product();
        Tensor::new(
            shape,
            (0..count)
                .map(|i| ((i * 7919 + seed * 131) % 997) as f32 / 256.0 - 1.9453125)
                .collect(),
        )
    };
    for (n, d, c) in [(1, 6, 12), (2, 7, 8), (1, 7, 5), (2, 3, 5)] {
        let run = |device: &Device| -> Vec<Vec<f32>> {
            let shape = [n, d, 10, 9, c];
            let (x, add, dy) = (noise(&shape, 1), noise(&shape, 2), noise(&shape, 3));
            let (weight, bias) = (noise(&[c], 4), noise(&[c], 5));
            let sums = norm::sums(device, &x).unwrap();
            let instance = sums.instance_norm(&weight, &bias, 1e-5, 0.1).unwrap();
            let applied = norm::apply(device, &x, &instance, Some(&add)).unwrap();
            let of_instance = norm::grad::instance_norm(device, &x, &instance, dy.clone());
            let of_layer = norm::grad::layer_norm(device, &x, &weight, &bias, 1e-5, true, &dy);
            let mut all = vec![of_instance.unwrap(), of_layer.unwrap()];
            if n == 1 {
                let (weights, dy) = (noise(&[3, c], 6), noise(&[3, d, 10, 9], 7));
                let add = Some(&add);
                all.push(
                    pointwise::grad::mask_logits(device, &x, &instance, add, &weights, &dy)
                        .unwrap(),
                );
            }
            let gradients = all.into_iter().flat_map(|(a, b, c)| [a, b, c]);
            gradients.chain([applied]).map(|t| t.data().to_vec()).collect()
        };
        let expected = run(&Device::open("cpu", 0).unwrap());
        for (dtype, bound) in [(DType::F32, 5e-5), (DType::F16, 2e-3)] {
            let found = run(&open(dtype));
            assert_eq!(found.len(), expected.len());
            for (at, (got, want)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(got.len(), want.len());
                let apart = apart(got, want);
                assert!(apart < bound, "{dtype}, {n} items of {c} channels, {at}: {apart}");
            }
        }
    }
}
