//! What several test files share.
#![allow(dead_code)]

use prism::autograd::{ParamGrads, Tape, TokenLayer, TokenRows, Var};
use prism::device::{Cuda, DType, Device, Precision};
use prism::model::{Config, Intensity, Model, Weights};
use prism::ops::conv3d::{self, ConvInput, Epilogue, PackedConv};
use prism::ops::decoder_stage::{DecoderStage, decoder_stage, skip_map};
use prism::ops::linear::{self, Activation};
use prism::ops::loss::{self, Emphasis, KERNEL, Target, Terms};
use prism::ops::norm;
use prism::ops::optimizer::{AdamW, AdamWConfig, follow, global_norm, upload_parameters};
use prism::tensor::{OpError, Param, Tensor};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A folder or file of the repository. An executable that was copied to another machine is told
/// where that is.
pub fn here(path: &str) -> PathBuf {
    let root =
        std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&root).join(path)
}

/// Reports that this test, or a part of it, is not run here: on standard error, bypassing the
/// capture that hides the output of tests that pass, and as a line of `tmp/skipped-tests.txt` in
/// cargo's target folder, from which `.ci/run` lists at its end what was skipped.
pub fn skipped(why: &str) {
    let thread = std::thread::current();
    let line =
        format!("{}: {}: {why}\n", env!("CARGO_CRATE_NAME"), thread.name().unwrap_or("a thread"));
    let _ = std::io::stderr().write_all(format!("skipped: {line}").as_bytes());
    // An executable that was copied to another machine has no such folder.
    let Some(folder) = option_env!("CARGO_TARGET_TMPDIR") else { return };
    let list = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(Path::new(folder).join("skipped-tests.txt"));
    let _ = list.and_then(|mut list| list.write_all(line.as_bytes()));
}

/// A folder beside the repository that only some machines have; reports if it is missing.
pub fn shared(path: &str) -> Option<PathBuf> {
    let at = here("../shared").join(path);
    if !at.exists() {
        skipped(&format!("{} is not on this machine", at.display()));
    }
    at.exists().then_some(at)
}

/// Whole numbers from -2 to 2, scattered: sums of their products are exact in any order.
fn scattered(shape: &[usize], seed: u32) -> Tensor {
    let count: usize = shape.iter().product();
    let value = |i: usize| {
        let mut x = (i as u32).wrapping_add(seed << 24);
        x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
        x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
        ((x ^ (x >> 16)) % 5) as f32 - 2.0
    };
    Tensor::new(shape, (0..count).map(value).collect())
}

/// A decoder stage from `coarse` channels, of `n` items of two tiles each, and the norm after it.
/// On a CUDA device its weights are composed and laid out there.
pub fn stage(device: &Device, n: usize, coarse: usize) -> Result<Tensor, OpError> {
    let mut given = [
        scattered(&[coarse, 4, 2, 2, 2], 1),
        scattered(&[4], 2),
        scattered(&[8, 4, 3, 3, 3], 3),
        scattered(&[8], 4),
    ];
    upload_parameters(device, &mut given.iter_mut().collect::<Vec<_>>())?;
    let [deconv, deconv_bias, conv, conv_bias] = &given;
    let stage = DecoderStage::new(device, deconv, deconv_bias, conv, conv_bias)?;
    let fine = skip_map(device, &stage, None, [n, 10, 4, 16])?;
    let x = ConvInput::shared(&scattered(&[n, 5, 2, 8, coarse], 5));
    let made = decoder_stage(device, &stage, &x, &fine)?;
    let sums = made.sums.expect("a stage always has its sums");
    let (weight, bias) = (Tensor::from(vec![1.0; 8]), Tensor::from(vec![0.5; 8]));
    norm::apply(device, &made.map, &sums.instance_norm(&weight, &bias, 1e-5, 0.01)?, None)
}

/// What is wrong with a decoder stage on a CUDA device, compared with the CPU.
pub fn judge_stage(device: &Device, n: usize, coarse: usize) -> Result<(), String> {
    let made = stage(device, n, coarse).map_err(|e| e.to_string())?;
    let expected = stage(&Device::open("cpu", 1).unwrap(), n, coarse).unwrap();
    // Whole values of up to about 600, exact in f16, with a deviation of about 120; after the norm
    // up to 5, rounded once more. In bfloat16 they are rounded both times, to eight bits. In
    // float32 only the norm rounds.
    let bound = match device.precision() {
        DType::F32 => 1e-4,
        DType::F16 => 5e-3,
        DType::Bf16 => 5e-2,
    };
    let near = |(got, want): &(&f32, &f32)| (*got - *want).abs() <= bound;
    match made.data().iter().zip(expected.data()).enumerate().find(|(_, pair)| !near(pair)) {
        Some((at, (got, want))) => Err(format!("value {at} is {got}, expected {want}")),
        None => Ok(()),
    }
}

/// A convolution of 32 to 32 channels of a map of `[n, d, h, w]` voxels, which may be normed and
/// have a map added on load: its output, and that after a norm.
pub fn convolved(
    device: &Device,
    [n, d, h, w]: [usize; 4],
    normed: bool,
    added: bool,
) -> Result<[Tensor; 2], OpError> {
    let shape = [n, d, h, w, 32];
    let (x, add) = (scattered(&shape, 6), scattered(&shape, 7));
    let (weight, bias) = (scattered(&[32, 32, 3, 3, 3], 8), scattered(&[32], 9));
    let conv = PackedConv::new(device.cpu(), &weight, 0..32, Some(&bias))?;
    let all = |value: f32| Tensor::from(vec![value; 32]);
    let mut input = ConvInput::shared(&x).plus(added.then_some(&add));
    if normed {
        let sums = norm::sums(device, &x)?;
        input = input.normed(&sums.instance_norm(&all(1.5), &all(0.25), 1e-5, 0.01)?);
    }
    let made = conv3d::conv3d(device, input, &conv, Epilogue::SUMS)?;
    let sums = made.sums.expect("they were asked for");
    let after = sums.instance_norm(&all(1.0), &all(0.5), 1e-5, 0.01)?;
    let after = norm::apply(device, &made.map, &after, None)?;
    Ok([made.map, after])
}

/// What is wrong with the convolution of rolling planes on a CUDA device, compared with the CPU:
/// more planes than the ring has, and tiles that the map's edges cut.
#[cfg(feature = "emulator")]
pub fn judge_rolling(device: &Device) -> Result<(), String> {
    let Device::Cuda(cuda) = device else { return Err("not a CUDA device".into()) };
    if !cuda.use_wgmma(true) {
        return Err("it has no wgmma".into());
    }
    let bound = if device.precision() == DType::F16 { 4e-3 } else { 3e-2 };
    let cpu = Device::open("cpu", 1).unwrap();
    for (extent, added) in [([1, 9, 9, 18], false), ([1, 3, 5, 16], true)] {
        let made = convolved(device, extent, false, added).map_err(|e| e.to_string())?;
        let expected = convolved(&cpu, extent, false, added).unwrap();
        for (what, (got, want)) in made.iter().zip(&expected).enumerate() {
            let apart = apart(got.data(), want.data());
            if apart.is_nan() || apart > bound {
                return Err(format!("result {what} of {extent:?} voxels: {apart} apart"));
            }
        }
    }
    Ok(())
}

/// A dense layer of `m` rows, `n` outputs and `k` inputs, which may have rows added.
pub fn dense(device: &Device, [m, n, k]: [usize; 3], added: bool) -> Result<Tensor, OpError> {
    let [x, w] = [(m, 10), (n, 11)].map(|(rows, seed)| scattered(&[rows, k], seed));
    let (bias, residual) = (scattered(&[n], 12), scattered(&[m, n], 13));
    linear::linear(device, &x, &w, Some(&bias), Activation::Relu, added.then_some(&residual))
}

/// The layer by each of its variants, the rule's first, with their names.
pub fn dense_by_all(
    cuda: &Cuda,
    shape: [usize; 3],
    added: bool,
) -> Result<Vec<(String, Tensor)>, OpError> {
    let device = Device::Cuda(cuda.clone());
    let run = || dense(&device, shape, added);
    let seen = cuda.with_variant(0, || cuda.launches(false, run))?.0;
    let choice = seen.into_iter().find_map(|launch| launch.choice).expect("a choice");
    let by = |(nth, name): (usize, &String)| {
        cuda.with_variant(nth, run).map(|made| (name.clone(), made))
    };
    choice.variants.iter().enumerate().map(by).collect()
}

/// What is wrong with dense layers by `wgmma` on a CUDA device, compared with the CPU: fewer rows
/// and columns than a block has and more, k that ends within a step, in one step and in more than
/// there are buffers, by itself and shared by blocks.
#[cfg(feature = "emulator")]
pub fn judge_dense(device: &Device) -> Result<(), String> {
    let Device::Cuda(cuda) = device else { return Err("not a CUDA device".into()) };
    if !cuda.use_wgmma(true) {
        return Err("it has no wgmma".into());
    }
    let bound = if device.precision() == DType::F16 { 4e-3 } else { 3e-2 };
    let cpu = Device::open("cpu", 1).unwrap();
    for (shape, added) in [([70, 9, 40], false), ([130, 100, 328], true)] {
        let expected = dense(&cpu, shape, added).unwrap();
        let mut tried = 0;
        for (name, made) in dense_by_all(cuda, shape, added).map_err(|e| e.to_string())? {
            let apart = apart(made.try_data().map_err(|e| e.to_string())?, expected.data());
            if apart.is_nan() || apart > bound {
                return Err(format!("{shape:?} by {name}: {apart} apart"));
            }
            tried += usize::from(name.contains("by wgmma"));
        }
        if tried < 2 {
            return Err(format!("{shape:?}: {tried} variants by wgmma"));
        }
    }
    Ok(())
}

/// The gradient of rows of `c` values, an even number, that a dense layer, a layer norm and a sum
/// read, the sum after the others or before them; and what it has to be. It is exact in any order:
/// numbers are whole, and each row has a mean of 0 and a variance of 1.
pub fn read_by_three(device: &Device, c: usize, sum_first: bool) -> Result<[Vec<f32>; 2], OpError> {
    let (rows, outs) = (9, 16);
    let sign = |i: usize| if (i / c + i % c).is_multiple_of(2) { 1.0 } else { -1.0 };
    let values = Tensor::new([rows, c], (0..rows * c).map(sign).collect());
    let [of_layer, of_norm, of_sum] =
        [(outs, 14), (c, 15), (c, 16)].map(|(columns, seed)| scattered(&[rows, columns], seed));
    let layer = Param::new(scattered(&[outs, c], 17), 0);
    // Means over a row are whole too.
    let scale = Param::new(vec![c as f32; c].into(), 1);
    let shift = Param::new(scattered(&[c], 18), 2);
    let other = Var::constant(scattered(&[rows, c], 19));

    let tape = Tape::on(device);
    let x = tape.leaf(values.clone());
    let first = sum_first.then(|| tape.add(&x, &other)).transpose()?;
    let dense = tape.linear(&x, &layer, None, Activation::None, None)?;
    let normed = tape.layer_norm(&x, &scale, &shift, 0.0, false)?;
    let sum = first.map_or_else(|| tape.add(&x, &other), Ok)?;
    let seeds =
        vec![(&dense, of_layer.clone()), (&normed, of_norm.clone()), (&sum, of_sum.clone())];
    let mut leaves = tape.backward(seeds, &mut ParamGrads::new(3))?;
    let got = leaves.take(&x).expect("three ops read it").try_data()?.to_vec();

    let mut want = of_sum.data().to_vec();
    for (row, want) in want.chunks_exact_mut(c).enumerate() {
        let row = |t: &Tensor| t.data()[row * t.channels()..][..t.channels()].to_vec();
        let [x, of_layer, of_norm] = [&values, &of_layer, &of_norm].map(row);
        let total: f32 = of_norm.iter().sum();
        let along: f32 = of_norm.iter().zip(&x).map(|(g, x)| g * x).sum();
        for (i, want) in want.iter_mut().enumerate() {
            let weights = layer.data()[i..].iter().step_by(c);
            *want += of_layer.iter().zip(weights).map(|(g, w)| g * w).sum::<f32>();
            *want += c as f32 * of_norm[i] - total - x[i] * along;
        }
    }
    Ok([got, want])
}

/// What is wrong with how a device adds up the gradients of what several ops read.
pub fn judge_sums(device: &Device) -> Result<(), String> {
    // By 16 bytes, and by single values.
    for c in [24, 10] {
        for sum_first in [false, true] {
            let [got, want] = read_by_three(device, c, sum_first).map_err(|e| e.to_string())?;
            let differs = got.iter().zip(&want).position(|(got, want)| got != want);
            if let Some(at) = differs {
                let (got, want) = (got[at], want[at]);
                return Err(format!("rows of {c}, value {at} is {got}, expected {want}"));
            }
        }
    }
    // A map that is pooled, beside what else reads it.
    let shape = [2, 4, 6, 8, 5];
    let (x, g, so_far) =
        (scattered(&shape, 20), scattered(&[2, 2, 3, 4, 5], 21), scattered(&shape, 22));
    let unpooled = |so_far: Option<&Tensor>| {
        let gradient = conv3d::grad::unpool(device, &ConvInput::shared(&x), &g, so_far);
        gradient.and_then(|g| Ok(g.try_data()?.to_vec())).map_err(|e| e.to_string())
    };
    let (alone, sum) = (unpooled(None)?, unpooled(Some(&so_far))?);
    let is_sum = |((sum, alone), so_far): ((&f32, &f32), &f32)| *sum == alone + so_far;
    match sum.iter().zip(&alone).zip(so_far.data()).all(is_sum) {
        true => Ok(()),
        false => Err("a map's gradient is not added to the gradient so far".into()),
    }
}

/// The distance of values from the expected ones, relative to their length.
pub fn apart(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|v| (v as f64).powi(2)).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(want).map(|(g, w)| g - w)) / norm(&mut want.iter().copied())
}

/// Numbers that are exact in 16 bits.
fn noise(shape: &[usize], seed: usize, scale: f32) -> Tensor {
    let count: usize = shape.iter().product();
    let value = |i: usize| ((i * 7919 + seed * 131) % 97) as f32 / 64.0 - 0.75;
    Tensor::new(shape, (0..count).map(|i| scale * value(i)).collect())
}

/// A number of tokens after a norm and a sum in three layers, attention of the first to `live` of
/// `keys` others with its layer, and one row of that in two layers.
fn tokens(device: &Device, rows: usize, keys: usize, live: usize) -> Result<Vec<Tensor>, OpError> {
    const C: usize = 56;
    const WIDTH: usize = 24;
    const OUT: usize = 40;
    const HEADS: usize = 4;
    let param = |shape: &[usize], seed: usize| Param::fixed(noise(shape, seed, 0.25));
    let layers = [1, 2, 3].map(|i| (param(&[WIDTH, C], i), param(&[WIDTH], 10 + i)));
    let (gain, shift) = (param(&[C], 20), param(&[C], 21));
    let out = (param(&[OUT, WIDTH], 22), param(&[OUT], 23));
    let ends = [(8, 24), (20, 25)].map(|(n, i)| (param(&[n, OUT], i), param(&[n], 10 + i)));
    let (there, valid) = match device {
        Device::Cuda(cuda) => (keys, Some(cuda.upload(&[live as u32])?)),
        Device::Cpu(_) => (live, None),
    };
    let var = |rows: usize, columns: usize, seed: usize, scale: f32| {
        Var::constant(noise(&[rows, columns], seed, scale))
    };
    let (x, add, residual) =
        (var(rows, C, 30, 1.0), var(rows, C, 31, 1.0), var(rows, OUT, 32, 0.5));
    let (k, v) = (var(there, WIDTH, 33, 2.0), var(there, WIDTH, 34, 1.0));

    let tape = Tape::off(device);
    let of = |i: usize, added: bool| {
        let (weight, bias) = &layers[i];
        TokenLayer { weight, bias, added }
    };
    let input = TokenRows { x: &x, norm: Some((&gain, &shift, 1e-5)), add: Some(&add) };
    let of = [of(0, true), of(1, false), of(2, true)];
    let ([a, b, c], normed) = tape.token_linear(input, of, Activation::Relu, None)?;
    let heads = [&a, &k, &v];
    let y =
        tape.token_attention(HEADS, heads, valid.as_ref(), (&out.0, &out.1), Some(&residual))?;
    let row = tape.rows(&y, rows - 1, 1)?;
    let rows = ends.each_ref().map(|(weight, bias)| (&row, weight, bias));
    let mut made = vec![a, b, c, normed, y];
    made.extend(tape.row_linears(&rows, Activation::None)?);
    Ok(made.iter().map(|v| v.value().clone()).collect())
}

/// What is wrong with the token path on a CUDA device, compared with the CPU: few rows and many, as
/// many as a block has and more.
pub fn judge_tokens(device: &Device) -> Result<(), String> {
    let bound = match device.products() {
        Precision::F32 | Precision::Ieee => 1e-5,
        Precision::Tf32 | Precision::F16 => 4e-3,
        Precision::Bf16 => 3e-2,
    };
    for (rows, keys, live) in [(16, 16, 12), (5, 33, 33), (64, 64, 1), (72, 16, 9), (16, 80, 70)] {
        let made = tokens(device, rows, keys, live).map_err(|e| e.to_string())?;
        let expected = tokens(&Device::open("cpu", 1).unwrap(), rows, keys, live).unwrap();
        for (what, (got, want)) in made.iter().zip(&expected).enumerate() {
            let apart = apart(got.data(), want.data());
            if apart.is_nan() || apart > bound {
                return Err(format!("result {what} of {rows} rows, {live} keys: {apart} apart"));
            }
        }
    }
    Ok(())
}

/// Gradients through attention with the layer after it, of `live` tokens to themselves, and of
/// other rows to them: of queries, keys and values, and of the parameters. Behind the tokens there
/// is padding, up to `rows` rows.
fn attended(device: &Device, live: usize, rows: usize) -> Result<[Vec<Tensor>; 2], OpError> {
    const WIDTH: usize = 24;
    const OUT: usize = 40;
    const HEADS: usize = 3;
    let valid = match device {
        Device::Cuda(cuda) if rows > live => Some(cuda.upload(&[live as u32])?),
        _ => None,
    };
    let weight = Param::new(noise(&[OUT, WIDTH], 40, 0.25), 0);
    let bias = Param::new(noise(&[OUT], 41, 0.25), 1);
    let (mut of_rows, mut of_params) = (vec![], vec![]);
    for (queries, read) in [(rows, live), (70, 70)] {
        let (mut grads, tape) = (ParamGrads::new(2), Tape::on(device));
        let [q, k, v] = [(queries, 42, 2.0), (rows, 43, 2.0), (rows, 44, 1.0)]
            .map(|(rows, seed, scale)| tape.leaf(noise(&[rows, WIDTH], seed, scale)));
        let heads = [&q, &k, &v];
        let y = tape.token_attention(HEADS, heads, valid.as_ref(), (&weight, &bias), None)?;
        // What padding asks is not read.
        let mut seed = noise(&[queries, OUT], 45, 1.0).data().to_vec();
        seed[read * OUT..].fill(0.0);
        let mut leaves =
            tape.backward(vec![(&y, Tensor::new([queries, OUT], seed))], &mut grads)?;
        of_rows.extend(heads.map(|leaf| leaves.take(leaf).expect("a leaf's gradient")));
        of_params
            .extend([0, 1].map(|id| grads.tensor(id).expect("a parameter's gradient").clone()));
    }
    Ok([of_rows, of_params])
}

/// What is wrong with gradients through attention where tokens have padding, on a CUDA device,
/// compared with those without it: on the device, whose values are the same, and on the CPU.
pub fn judge_padding(device: &Device) -> Result<(), String> {
    let bound = match device.products() {
        Precision::F32 | Precision::Ieee => 1e-5,
        Precision::Tf32 | Precision::F16 => 1e-2,
        Precision::Bf16 => 8e-2,
    };
    let cpu = Device::open("cpu", 1).unwrap();
    // Few and many of a block's keys are padding, and all of another's.
    for (live, rows) in [(12, 16), (3, 64), (33, 64)] {
        let gradients = |rows: usize| attended(device, live, rows).map_err(|e| e.to_string());
        let ([alone, of_params], [padded, params]) = (gradients(live)?, gradients(rows)?);
        let [expected, of_cpu] = attended(&cpu, live, live).unwrap();
        near(&alone, &expected, bound)?;
        near(&of_params, &of_cpu, bound)?;
        for (what, (got, want)) in padded.iter().zip(&alone).enumerate() {
            let got = got.try_data().map_err(|e| e.to_string())?;
            let (tokens, padding) = got.split_at(want.len());
            if tokens != want.data() || padding.iter().any(|g| *g != 0.0) {
                return Err(format!("result {what} of {live} tokens in {rows} rows"));
            }
        }
        // Rows are added up in other runs.
        near(&params, &of_params, 1e-6)?;
    }
    Ok(())
}

/// What is wrong with how a CUDA device rounds float32 in products. TF32 has 10 bits of mantissa,
/// and ties are rounded away from zero, on both sides of a product; three passes lose nothing of
/// numbers of 22 bits, and plain arithmetic nothing at all.
pub fn judge_rounding(device: &Device) -> Result<(), String> {
    let (m, n, k) = (4, 8, 40);
    let bit = |b: i32| 2f32.powi(-b);
    // Halfway between two numbers of TF32, where nearest even would round down; just above; just
    // below; halfway on the other side of zero.
    let (half, little) = (bit(11), bit(20));
    let values = [1.0 + half, 1.0 + half + little, -1.0 - half + little, -1.0 - half];
    let expected = match device.products() {
        Precision::Tf32 => [1.0 + bit(10), 1.0 + bit(10), -1.0, -1.0 - bit(10)],
        _ => values,
    };
    let x: Vec<f32> = (0..m * k).map(|i| values[i / k]).collect();
    // One product of each row remains.
    let w: Vec<f32> = (0..n * k).map(|i| f32::from(u8::from(i % k == i / k * 3))).collect();
    let (x, w) = (Tensor::new([m, k], x), Tensor::new([n, k], w));
    let product = |left: &Tensor, right: &Tensor| -> Result<Vec<f32>, String> {
        let y = linear::linear(device, left, right, None, Activation::None, None);
        Ok(y.map_err(|e| e.to_string())?.data().to_vec())
    };
    let (left, right) = (product(&x, &w)?, product(&w, &x)?);
    let want_left: Vec<f32> = (0..m * n).map(|i| expected[i / n]).collect();
    let want_right: Vec<f32> = (0..n * m).map(|i| expected[i % m]).collect();
    match (left == want_left, right == want_right) {
        (true, true) => Ok(()),
        (false, _) => Err(format!("on the left {left:?}, expected {want_left:?}")),
        (_, false) => Err(format!("on the right {right:?}, expected {want_right:?}")),
    }
}

/// A network small enough for a debug build: every part exists, nothing is wide.
pub fn tiny() -> Config {
    Config {
        patch: 32,
        channels: [8, 8, 16, 16, 48],
        vit_width: 48,
        vit_depth: 4,
        vit_heads: 4,
        vit_mlp: 96,
        window: 3,
        global_blocks: vec![3],
        taps: [1, 2, 3],
        prompt_mlp: 64,
        score_hidden: 24,
        refine_width: 8,
        intensity: Some(Intensity {
            clip: [-1000.0, 400.0],
            mean: -300.0,
            sd: 350.0,
            hounsfield: false,
        }),
        ..Config::base()
    }
}

/// The tiny network over as many millimetres, of an eighth of the voxels: for where nearly all time
/// is the network's, as under valgrind. Its patch is one token, so that loops over tokens go round
/// once: what is to see more of them takes [`tiny`].
pub fn coarse() -> Config {
    Config { patch: 16, spacing: 2.0, ..tiny() }
}

/// The parameters, averages and moments after two steps of the optimiser, clipped: tensors of more
/// than one block's values, and of few.
fn optimised(device: &Device) -> Result<Vec<Tensor>, OpError> {
    let lengths = [20_003, 7, 33];
    let config = AdamWConfig { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.1, max_norm: 1.0 };
    let mut values = lengths.map(|n| scattered(&[n], 20));
    let mut averages = lengths.map(|n| scattered(&[n], 21));
    let mut adamw = AdamW::new(config, &lengths);
    for seed in [22, 23] {
        let gradients = lengths.map(|n| scattered(&[n], seed));
        let given = gradients.each_ref().map(Some);
        let norm = global_norm(device, &given)?;
        adamw.step(device, 0.1, &mut values.each_mut(), &given, &norm, 2.0)?;
        follow(device, &mut averages, &values.each_ref(), 0.5, &norm)?;
    }
    let moments = adamw.moments().iter().flatten().cloned();
    Ok(values.into_iter().chain(averages).chain(moments).collect())
}

/// What is wrong with the optimiser on a CUDA device, compared with the CPU.
pub fn judge_optimizer(device: &Device) -> Result<(), String> {
    let made = optimised(device).map_err(|e| e.to_string())?;
    near(&made, &optimised(&Device::open("cpu", 1).unwrap()).unwrap(), 1e-5)
}

/// The losses of masks, also near clicks, and the gradients of their scores and logits.
fn lost(device: &Device) -> Result<Vec<Tensor>, OpError> {
    let (size, masks) = ([6, 20, 40], 3);
    let voxels = size.iter().product::<usize>();
    let label = scattered(&[voxels], 30);
    let label = label.data().iter().map(|v| f32::from(u8::from(*v > 0.0))).collect();
    // Each near voxels of one plane or two; a block has five of the six planes, and some rows.
    let clicks = [[0, 0, 0], [4, 19, 39], [4, 18, 38], [5, 3, 20], [5, 12, 7]];
    let emphasis = Emphasis::new(&clicks, size, 0.5, 0.7)?;
    let target = Target::new(device, label, size, KERNEL)?;
    let (x, scores) = (scattered(&[masks, voxels], 32), scattered(&[masks, 1], 33));
    let terms = Terms { region: 0.5, boundary: 5.0 };
    let (sums, dx) = loss::mask_sums_gradient(device, &x, &target, terms, 64.0)?;
    let ds = loss::score_gradient(device, &sums, &scores, &target, 2.0, 64.0)?;
    let (near, dx) = loss::emphasis(device, &x, &target, &emphasis, 64.0, dx)?;
    let lost = sums.read()?.into_iter().map(|sums| target.loss(sums).total(terms) as f32);
    let beside = near.read()?.into_iter().map(|sums| sums[0] as f32);
    Ok(vec![Tensor::from(lost.chain(beside).collect::<Vec<_>>()), ds, dx])
}

/// What is wrong with losses on a CUDA device, compared with the CPU.
pub fn judge_losses(device: &Device) -> Result<(), String> {
    let made = lost(device).map_err(|e| e.to_string())?;
    near(&made, &lost(&Device::open("cpu", 1).unwrap()).unwrap(), 1e-5)
}

/// Rows of parameters, some of them more than once, and the gradients of the parameters.
fn embedded(device: &Device) -> Result<Vec<Tensor>, OpError> {
    const C: usize = 40;
    let mut given = [(1, 40), (3, 41), (1, 42)].map(|(n, seed)| scattered(&[n, C], seed));
    upload_parameters(device, &mut given.each_mut())?;
    let mut id = 0..;
    let params = given.map(|value| Param::new(value, id.next().expect("a number")));
    let rows = [(0, 0), (1, 2), (2, 0), (1, 0), (2, 0), (2, 0)];
    let (mut grads, tape) = (ParamGrads::new(params.len()), Tape::on(device));
    let list = rows.map(|(param, row)| (&params[param], row)).to_vec();
    let y = tape.embed(scattered(&[rows.len(), C], 43), list)?;
    let mut made = vec![y.value().clone()];
    tape.backward(vec![(&y, scattered(&[rows.len(), C], 44))], &mut grads)?;
    made.extend((0..params.len()).filter_map(|id| grads.tensor(id).cloned()));
    Ok(made)
}

/// What is wrong with rows of parameters on a CUDA device, compared with the CPU: all sums are
/// exact.
pub fn judge_rows(device: &Device) -> Result<(), String> {
    let made = embedded(device).map_err(|e| e.to_string())?;
    near(&made, &embedded(&Device::open("cpu", 1).unwrap()).unwrap(), 0.0)
}

/// An error unless results are within a bound of the expected ones, relative to their lengths.
fn near(made: &[Tensor], expected: &[Tensor], bound: f64) -> Result<(), String> {
    if made.len() != expected.len() {
        return Err(format!("{} results, expected {}", made.len(), expected.len()));
    }
    for (what, (got, want)) in made.iter().zip(expected).enumerate() {
        let apart = apart(got.try_data().map_err(|e| e.to_string())?, want.data());
        if apart.is_nan() || apart > bound {
            return Err(format!("result {what}: {apart} apart"));
        }
    }
    Ok(())
}

/// The tiny network with hashed weights.
pub fn tiny_model(config: Config, threads: usize) -> Arc<Model> {
    let device = Device::Cpu(prism::device::Cpu::new(threads).unwrap());
    Arc::new(Model::new(&device, &Weights::hashed(config, "tiny")).unwrap())
}

/// The CUDA device that tests run on: the emulator, or the one that PRISM_TEST_DEVICE names.
pub fn device_name() -> String {
    std::env::var("PRISM_TEST_DEVICE").unwrap_or_else(|_| "emulated".into())
}
