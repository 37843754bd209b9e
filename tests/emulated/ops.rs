//! Ops as on the CPU: in vectors and in blocks of every kind.

use crate::common::{apart, judge_stage, stage};
use crate::{open, whole};
use prism::autograd::{ParamGrads, Tape};
use prism::device::{DType, Device, Precision};
use prism::ops::{norm, pointwise, resample, strided};
use prism::tensor::{OpError, Param, Tensor};

/// Several maps at once, and patches whose rows are moved by 16 bytes or value by value.
#[test]
fn maps_are_resampled_and_cut_into_patches_as_on_the_cpu() {
    type Op = fn(&Device, &Tensor) -> Result<Tensor, OpError>;
    let ops: [Op; 7] = [
        resample::downsample2_trilinear,
        resample::upsample2_trilinear,
        resample::downsample4_nearest,
        resample::grad::downsample2_trilinear,
        resample::grad::upsample2_trilinear,
        resample::grad::downsample4_nearest,
        pointwise::max_pool3d,
    ];
    let cpu = Device::open("cpu", 1).unwrap();
    let x = whole(&[3, 8, 4, 12, 5], 1);
    for (at, op) in ops.into_iter().enumerate() {
        let [made, expected] = [open(DType::F32), cpu.clone()].map(|on| op(&on, &x).unwrap());
        assert_eq!((made.shape(), made.data()), (expected.shape(), expected.data()), "op {at}");
    }
    for (e, c) in [(16, 1), (8, 1), (4, 1), (4, 2)] {
        let x = whole(&[2, e, 2 * e, 3 * e, c], 2);
        let (weight, bias) = (whole(&[3, c, e, e, e], 3), whole(&[3], 4));
        let expected = strided::patch_conv(&cpu, &x, &weight, Some(&bias)).unwrap();
        // Each sum is exact in float32, and rounded once in 16 bits.
        for (dtype, bound) in [(DType::F32, 0.0), (DType::F16, 1e-3)] {
            let made = strided::patch_conv(&open(dtype), &x, &weight, Some(&bias)).unwrap();
            assert_eq!(made.shape(), expected.shape());
            let apart = apart(made.data(), expected.data());
            assert!(apart <= bound, "{dtype}, patches of {c} x {e}: {apart}");
        }
    }
}

/// A block computes all phases of its tile if there are many tiles, otherwise one: both give the
/// stage.
#[test]
fn a_stage_of_few_and_of_many_blocks_is_as_on_the_cpu() {
    for (precision, name) in [
        (Precision::F32, "tf32x3"),
        (Precision::Tf32, "tf32"),
        (Precision::F16, "f16"),
        (Precision::Bf16, "bf16"),
    ] {
        let Device::Cuda(cuda) = open(precision) else { panic!("no CUDA device") };
        let device = Device::Cuda(cuda.clone());
        // With 16 channels and with 32.
        for (coarse, chunk) in [(16, 16), (24, 32)] {
            for (items, kernel) in [(1, "decoder_stage_phase"), (81, "decoder_stage")] {
                let launches = cuda.launches(false, || stage(&device, items, coarse)).unwrap().0;
                // With floats a block has 16 channels at a time, and computes all phases of no
                // more.
                let kernel = match (precision.maps(), coarse) {
                    (DType::F32, 24) => format!("decoder_stage_phase_16_{name}"),
                    _ => format!("{kernel}_{chunk}_{name}"),
                };
                assert!(launches.iter().any(|launch| launch.kernel == kernel), "no {kernel}");
                judge_stage(&device, items, coarse).unwrap_or_else(|e| panic!("{kernel}: {e}"));
            }
        }
    }
}

/// Sums over rows, in one tile and in many, for columns that fill groups and columns that do not.
#[test]
fn sums_over_rows_are_as_on_the_cpu() {
    let cpu = Device::open("cpu", 0).unwrap();
    for [rows, c] in
        [[1, 1], [7, 3], [512, 4], [513, 5], [700, 32], [2100, 33], [30, 768], [5000, 1]]
    {
        let x = whole(&[rows, c], rows);
        for so_far in [None, Some(whole(&[c], 3))] {
            let run = |device: &Device| norm::totals_onto(device, &x, so_far.clone()).unwrap();
            let want = run(&cpu);
            for dtype in [DType::F32, DType::F16] {
                let got = run(&open(dtype));
                assert_eq!(got.data(), want.data(), "{dtype}, {rows} rows of {c}");
            }
        }
    }
}

/// Element-wise kernels use vectors if the size allows it, and single values otherwise.
#[test]
fn values_are_taken_in_vectors_or_one_by_one() {
    let cpu = Device::open("cpu", 0).unwrap();
    for (count, period) in [(64, 64), (64, 8), (64, 4), (63, 63), (60, 12), (2056, 2056)] {
        let (a, b) = (whole(&[count / period, period], 1), whole(&[period], 2));
        let same = whole(&[count / period, period], 3);
        let run = |device: &Device| {
            [
                pointwise::add(device, &a, &b).unwrap(),
                pointwise::multiply_add(device, &a, &same, &a).unwrap(),
                pointwise::grad::times(device, &a, &same).unwrap(),
                pointwise::grad::sigmoid(device, &a, &same).unwrap(),
            ]
            .map(|t| t.data().to_vec())
        };
        let want = run(&cpu);
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            assert_eq!(run(&open(dtype)), want, "{dtype}, {count} and {period}");
        }
    }
}

/// A mask comes from the device as bits, and is what the values say.
#[test]
fn masks_of_what_is_positive_are_as_on_the_cpu() {
    let cpu = Device::open("cpu", 2).unwrap();
    for (dtype, count) in [(DType::F32, 40_000), (DType::F16, 8), (DType::Bf16, 13)] {
        let x = whole(&[count], 1);
        let mask = pointwise::positive(&open(dtype), &x).unwrap();
        assert_eq!(mask, pointwise::positive(&cpu, &x).unwrap());
        let bit = |at: usize| mask[at / 8] >> (7 - at % 8) & 1;
        assert!((0..).zip(x.data()).all(|(at, v)| (bit(at) == 1) == (*v > 0.0)));
        assert!((count..mask.len() * 8).all(|at| bit(at) == 0));
    }
}

/// Rows of parameters that are on the device are assembled, and their gradients distributed, as on
/// the host.
#[test]
fn rows_of_parameters_are_put_together_on_the_device_as_on_the_host() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let Device::Cuda(cuda) = open(dtype) else { panic!("no CUDA device") };
        let device = Device::Cuda(cuda.clone());
        let (c, base) = (40, whole(&[6, 40], 1));
        let shapes = [[1, c], [3, c], [1, c]];
        let run = |resident: bool| {
            let param = |(id, shape): (usize, &[usize; 2])| {
                let here = whole(shape, id + 2);
                let value = match resident {
                    true => {
                        let memory = here.to_device(&cuda, DType::F32).unwrap();
                        Tensor::from_device(*shape, memory, DType::F32)
                    }
                    false => here,
                };
                Param::new(value, id)
            };
            let params: Vec<Param> = shapes.iter().enumerate().map(param).collect();
            let rows = [(0, 0), (1, 2), (2, 0), (1, 0), (2, 0), (2, 0)];
            let (mut grads, tape) = (ParamGrads::new(3), Tape::on(&device));
            let list = rows.map(|(p, row)| (&params[p], row)).to_vec();
            let before = cuda.transfers().1;
            let y = tape.embed(base.clone(), list).unwrap();
            let value = y.value().clone();
            let dy = whole(&[6, c], 9).to_device(&cuda, dtype).unwrap();
            let dy = Tensor::from_device([6, c], dy, dtype);
            tape.backward(vec![(&y, dy)], &mut grads).unwrap();
            assert!(!resident || cuda.transfers().1 == before, "rows came to the host");
            let gradients = (0..3).map(|id| grads.get(id).unwrap().to_vec());
            (value.data().to_vec(), gradients.collect::<Vec<_>>())
        };
        assert_eq!(run(true), run(false), "{dtype}");
        let params = [Param::new(
            Tensor::from_device(
                [1, c],
                whole(&[1, c], 2).to_device(&cuda, DType::F32).unwrap(),
                DType::F32,
            ),
            0,
        )];
        let beyond = Tape::off(&device).embed(whole(&[1, c], 1), vec![(&params[0], 1)]);
        assert!(beyond.is_err(), "a row that is not there");
    }
}
