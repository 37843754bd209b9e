//! Convolutions and dense layers by `wgmma`, where the device has it.

use crate::common::{self, convolved, dense_by_all, device_name, judge_dense, judge_rolling};
use crate::{cuda_of, open, whole, with_wgmma};
use prism::device::cuda::KernelRecord;
use prism::device::{Cuda, DType, Device};
use prism::ops::linear;

/// The convolution of rolling planes is the one of tiles: bit for bit where sums are exact in any
/// order, and otherwise but for the rounding of elements. Extents are below a tile, odd, of several
/// tiles, and so long that a column is cut, or that a plane's place in the ring is filled often.
#[test]
fn rolling_planes_are_convolved_as_tiles_are() {
    // What a rounding may change of a value of 1, twice.
    for (dtype, bound) in [(DType::F16, 2e-3), (DType::Bf16, 1.6e-2)] {
        let Some(planes) = with_wgmma(&device_name(), dtype) else {
            common::skipped("this GPU has no wgmma, or PRISM_CUDA_WGMMA is not on");
            return;
        };
        judge_rolling(&planes).unwrap_or_else(|e| panic!("{dtype}: {e}"));
        let tiles = open(dtype);
        let (Device::Cuda(cuda), Device::Cuda(without)) = (&planes, &tiles) else {
            panic!("no CUDA devices")
        };
        without.use_wgmma(false);
        for (extent, added) in [
            ([1, 4, 16, 16], false),
            ([2, 5, 3, 7], true),
            ([1, 1, 1, 1], false),
            ([1, 21, 9, 18], true),
            ([1, 2, 33, 17], false),
            ([1, 15, 8, 16], true),
        ] {
            let of = |device: &Device, normed| convolved(device, extent, normed, added).unwrap();
            let what = format!("{dtype}, {extent:?}");
            let launched = |cuda: &Cuda, device: &Device| -> Vec<String> {
                let launches = cuda.launches(false, || convolved(device, extent, false, added));
                launches.unwrap().0.into_iter().map(|launch| launch.kernel).collect()
            };
            let there = |launches: &[String], name: &str| {
                launches.iter().any(|kernel| *kernel == format!("{name}_{dtype}"))
            };
            assert!(there(&launched(cuda, &planes), "conv3d_rolling"), "{what}");
            assert!(there(&launched(without, &tiles), "conv3d_32"), "{what}");
            for (got, want) in of(&planes, false).iter().zip(&of(&tiles, false)) {
                assert!(got.data() == want.data(), "{what}");
            }
            for (got, want) in of(&planes, true).iter().zip(&of(&tiles, true)) {
                let far = |(got, want): &(&f32, &f32)| {
                    let apart = (*got - *want).abs();
                    apart.is_nan() || apart > bound * (1.0 + want.abs())
                };
                let far = got.data().iter().zip(want.data()).find(far);
                assert!(far.is_none(), "{what}, normed: {far:?}");
            }
        }
    }
}

/// No order of threads changes a bit of rolling planes, whose warps wait for each other's phases.
#[test]
fn the_order_of_threads_changes_no_bit_of_rolling_planes() {
    if device_name() != "emulated" {
        common::skipped("only the emulator runs threads in an order of one's choosing");
        return;
    }
    let of = |name: &str| {
        let device = with_wgmma(name, DType::F16).unwrap();
        convolved(&device, [1, 15, 9, 18], true, true).unwrap().map(|map| map.data().to_vec())
    };
    let expected = of("emulated");
    for seed in [1, 7] {
        assert!(of(&format!("emulated:{seed}")) == expected, "seed {seed}");
    }
}

/// Dense layers by `wgmma` have the bits of those by `mma.sync` where sums are exact in any order,
/// in any order of threads: of one row and of several blocks, of few columns and of such as are no
/// whole pieces, of k that ends within a step, and shared by blocks.
#[test]
fn warpgroups_compute_dense_layers_as_warps_do() {
    for dtype in [DType::F16, DType::Bf16] {
        let Some(device) = with_wgmma(&device_name(), dtype) else {
            common::skipped("this GPU has no wgmma, or PRISM_CUDA_WGMMA is not on");
            return;
        };
        judge_dense(&device).unwrap_or_else(|e| panic!("{dtype}: {e}"));
        let shuffled = (device_name() == "emulated")
            .then(|| with_wgmma("emulated:7", dtype).expect("the emulator has wgmma"));
        for device in [Some(device), shuffled].iter().flatten() {
            for (shape, added, variants) in [
                ([1, 97, 520], true, 8),
                ([33, 100, 264], true, 4),
                ([129, 8, 72], false, 2),
                ([200, 193, 8], false, 2),
            ] {
                let made = dense_by_all(cuda_of(device), shape, added).unwrap();
                let what = format!("{dtype}, {shape:?}");
                let (first, want) = &made[0];
                assert!(!first.contains("wgmma"), "{what}: {first}");
                let by_wgmma = made.iter().filter(|(name, _)| name.contains("by wgmma")).count();
                assert_eq!(by_wgmma, variants, "{what}");
                for (name, got) in &made {
                    assert!(got.data() == want.data(), "{what}, {name}");
                }
            }
        }
    }
}

/// Where `wgmma` was asked for, layers of many rows go by it. Few rows, rows that are no multiple
/// of 16 bytes, gradients and float32 do not.
#[test]
fn dense_layers_go_by_wgmma_where_the_rule_says_so() {
    let Some(device) = with_wgmma(&device_name(), DType::F16) else {
        common::skipped("this GPU has no wgmma, or PRISM_CUDA_WGMMA is not on");
        return;
    };
    let linears = |launches: Vec<KernelRecord>| -> Vec<String> {
        let names = launches.into_iter().map(|launch| launch.kernel);
        names.filter(|name| name.starts_with("linear")).collect()
    };
    let kernels = |device: &Device, m: usize, n: usize, k: usize| {
        let run = || common::dense(device, [m, n, k], false);
        linears(cuda_of(device).launches(false, run).unwrap().0)
    };
    for (m, n, k, expected) in [
        (512, 2304, 8, "linear_wgmma_tall_f16"),
        (512, 768, 8, "linear_wgmma_f16"),
        (64, 768, 8, "linear_few_f16"),
        (512, 768, 9, "linear_odd_f16"),
    ] {
        assert_eq!(kernels(&device, m, n, k), [expected], "{m}, {n}, {k}");
    }
    let (w, dy) = (whole(&[768, 768], 1), whole(&[512, 768], 2));
    let back = || linear::grad::input(&device, &w, &dy);
    let back = cuda_of(&device).launches(false, back).unwrap().0;
    assert_eq!(linears(back), ["linear_back_f16"]);
    if let Some(device) = with_wgmma(&device_name(), DType::F32) {
        assert_eq!(kernels(&device, 512, 768, 8), ["linear_tf32x3"]);
    }
    cuda_of(&device).use_wgmma(false);
    assert_eq!(kernels(&device, 512, 768, 8), ["linear_f16"]);
}
