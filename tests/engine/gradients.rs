//! Gradients of every op against finite differences, in float64, of the plainest formula for it.

use prism::autograd::{Conv, Normed, ParamGrads, Tape, TapeInput, Transpose, UpStage, Var};
use prism::device::Device;
use prism::ops::attention::{TwoWayWeights, VitWeights};
use prism::ops::conv3d::{ConvOutput, Epilogue};
use prism::ops::linear::Activation;
use prism::ops::loss::{self, Target, Terms};
use prism::ops::norm;
use prism::tensor::{OpError, Param, Tensor};

type Values = Vec<f64>;
/// An op's output, and the gradient of each input that has one.
type Result = (Tensor, Vec<Option<Vec<f32>>>);
/// Draws an incoming gradient by its size.
type Seed<'a> = &'a dyn Fn(usize) -> Tensor;

fn device() -> Device {
    Device::open("cpu", 2).unwrap()
}

/// Numbers between -1 and 1 that depend on nothing but the seed.
fn noise(seed: u64, len: usize) -> Values {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
    };
    // Through float32, so that both sides start from the same numbers.
    (0..len).map(|_| next() as f32 as f64).collect()
}

fn tensor(shape: &[usize], values: &[f64]) -> Tensor {
    Tensor::new(shape, values.iter().map(|v| *v as f32).collect())
}

/// An input of a case.
struct In {
    shape: Vec<usize>,
    values: Values,
}

fn inputs(shapes: &[&[usize]]) -> Vec<In> {
    let one = |(i, s): (usize, &&[usize])| In {
        shape: s.to_vec(),
        values: noise(i as u64 + 11, s.iter().product()),
    };
    shapes.iter().enumerate().map(one).collect()
}

fn params(list: &[In]) -> Vec<Param> {
    list.iter().enumerate().map(|(id, i)| Param::new(tensor(&i.shape, &i.values), id)).collect()
}

/// Compares the output and every input's gradient. `ours` returns the output and the gradient of `Σ
/// output · weights` for each input, `naive` the output.
fn check(
    name: &str,
    list: &[In],
    naive: &dyn Fn(&[Values]) -> Values,
    ours: &dyn Fn(Seed) -> Result,
) {
    let values: Vec<Values> = list.iter().map(|i| i.values.clone()).collect();
    let want = naive(&values);
    // The incoming gradient is drawn by the output's size.
    let seed = |len: usize| tensor(&[len], &noise(77, len));
    let (output, gradients) = ours(&seed);
    let error = |got: &[f64], want: &[f64]| {
        let difference = got.iter().zip(want).map(|(g, w)| (g - w).powi(2)).sum::<f64>().sqrt();
        difference / want.iter().map(|w| w * w).sum::<f64>().sqrt().max(1e-12)
    };
    assert_eq!(output.len(), want.len(), "{name}: sizes of the output");
    let got: Values = output.data().iter().map(|v| *v as f64).collect();
    assert!(error(&got, &want) < 1e-5, "{name}: output off by {:.2e}", error(&got, &want));
    let weights: Values = seed(want.len()).data().iter().map(|v| *v as f64).collect();
    let total = |v: &[Values]| -> f64 { naive(v).iter().zip(&weights).map(|(o, w)| o * w).sum() };
    let norm = |g: &Vec<f32>| g.iter().map(|v| (*v as f64).powi(2)).sum::<f64>().sqrt();
    let largest = gradients.iter().flatten().map(norm).fold(0.0, f64::max);
    let h = 1e-5;
    for (i, gradient) in gradients.iter().enumerate() {
        let Some(gradient) = gradient else { continue };
        assert_eq!(gradient.len(), values[i].len(), "{name}: size of gradient {i}");
        let mut moved = values.clone();
        let numeric: Values = (0..values[i].len())
            .map(|at| {
                let start = moved[i][at];
                moved[i][at] = start + h;
                let up = total(&moved);
                moved[i][at] = start - h;
                let down = total(&moved);
                moved[i][at] = start;
                (up - down) / (2.0 * h)
            })
            .collect();
        let got: Values = gradient.iter().map(|v| *v as f64).collect();
        let apart = got.iter().zip(&numeric).map(|(g, w)| (g - w).powi(2)).sum::<f64>().sqrt();
        // A gradient that is zero in exact arithmetic (the bias of a softmax's keys) has no
        // relative error.
        assert!(
            error(&got, &numeric) < 1e-4 || apart < 1e-6 * largest,
            "{name}: gradient {i} off by {:.2e}",
            error(&got, &numeric)
        );
    }
}

/// Goes back from a recorded op: `leaves` are the inputs that are values, by number; the rest are
/// parameters.
fn record<'m>(
    tape: Tape<'m>,
    output: Var,
    leaves: &[(usize, Var)],
    count: usize,
    seed: Seed,
) -> Result {
    let mut params = ParamGrads::new(count);
    let value = output.value().clone();
    let mut back = tape.backward(vec![(&output, seed(value.len()))], &mut params).unwrap();
    let mut gradients: Vec<Option<Vec<f32>>> =
        (0..count).map(|id| params.get(id).map(<[f32]>::to_vec)).collect();
    for (i, leaf) in leaves {
        gradients[*i] = back.take(leaf).map(|g| g.data().to_vec());
    }
    (value, gradients)
}

// ---- the plainest formulas, channels last, one item ----

fn at(s: [usize; 3], c: usize, p: [isize; 3]) -> Option<usize> {
    (0..3)
        .all(|a| p[a] >= 0 && p[a] < s[a] as isize)
        .then(|| ((p[0] as usize * s[1] + p[1] as usize) * s[2] + p[2] as usize) * c)
}

fn places(s: [usize; 3]) -> impl Iterator<Item = [isize; 3]> {
    (0..s[0] * s[1] * s[2])
        .map(move |v| [v / (s[1] * s[2]), v / s[2] % s[1], v % s[2]].map(|v| v as isize))
}

fn conv(x: &[f64], s: [usize; 3], c: usize, w: &[f64], b: &[f64]) -> Values {
    let mut y = vec![];
    for p in places(s) {
        for (o, b) in b.iter().enumerate() {
            let mut sum = *b;
            for t in 0..27 {
                let q = [p[0] + t / 9 - 1, p[1] + t / 3 % 3 - 1, p[2] + t % 3 - 1];
                if let Some(from) = at(s, c, q) {
                    sum +=
                        (0..c).map(|i| x[from + i] * w[(o * c + i) * 27 + t as usize]).sum::<f64>();
                }
            }
            y.push(sum);
        }
    }
    y
}

fn instance_norm(x: &[f64], c: usize, w: &[f64], b: &[f64], slope: f64) -> Values {
    let n = (x.len() / c) as f64;
    let column = |q: usize| x.iter().skip(q).step_by(c);
    let stats: Vec<[f64; 2]> = (0..c)
        .map(|q| {
            let mean = column(q).sum::<f64>() / n;
            let variance = column(q).map(|v| (v - mean).powi(2)).sum::<f64>() / n;
            [mean, 1.0 / (variance + 1e-5).sqrt()]
        })
        .collect();
    let one = |(i, v): (usize, &f64)| {
        let z = (v - stats[i % c][0]) * stats[i % c][1] * w[i % c] + b[i % c];
        if z >= 0.0 { z } else { slope * z }
    };
    x.iter().enumerate().map(one).collect()
}

/// Normal distribution function by its series and continued fraction.
fn phi(x: f64) -> f64 {
    let z = x.abs();
    let density = (-0.5 * z * z).exp() / std::f64::consts::TAU.sqrt();
    let upper = if z < 3.0 {
        let (mut term, mut sum) = (z, z);
        for n in 1..200 {
            term *= z * z / (2.0 * n as f64 + 1.0);
            sum += term;
        }
        0.5 - density * sum
    } else {
        density / (1..60).rev().fold(z, |f, n| z + n as f64 / f)
    };
    if x > 0.0 { 1.0 - upper } else { upper }
}

fn gelu(x: f64) -> f64 {
    x * phi(x)
}

fn layer_norm(x: &[f64], w: &[f64], b: &[f64], eps: f64, act: bool) -> Values {
    let c = w.len();
    let mut y = vec![];
    for row in x.chunks(c) {
        let mean = row.iter().sum::<f64>() / c as f64;
        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / c as f64;
        for (i, v) in row.iter().enumerate() {
            let z = (v - mean) / (variance + eps).sqrt() * w[i] + b[i];
            y.push(if act { gelu(z) } else { z });
        }
    }
    y
}

fn linear(x: &[f64], w: &[f64], b: &[f64]) -> Values {
    let k = w.len() / b.len();
    x.chunks(k)
        .flat_map(|row| {
            b.iter()
                .enumerate()
                .map(|(o, b)| b + row.iter().zip(&w[o * k..]).map(|(x, w)| x * w).sum::<f64>())
                .collect::<Values>()
        })
        .collect()
}

fn softmax(row: &[f64]) -> Values {
    let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Values = row.iter().map(|v| (v - top).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|v| v / sum).collect()
}

fn transpose(x: &[f64], s: [usize; 3], c: usize, w: &[f64], b: &[f64]) -> Values {
    let fine = s.map(|v| 2 * v);
    let out = b.len();
    let mut y = vec![];
    for p in places(fine) {
        let from = at(s, c, p.map(|v| v / 2)).unwrap();
        let phase = (p[0] % 2 * 4 + p[1] % 2 * 2 + p[2] % 2) as usize;
        y.extend((0..out).map(|o| {
            b[o] + (0..c).map(|i| x[from + i] * w[(i * out + o) * 8 + phase]).sum::<f64>()
        }));
    }
    y
}

/// A map with an instance norm and a leaky ReLU of slope 0.1.
fn normed<'m>(tape: &Tape<'m>, x: &Var, weight: &'m Param, bias: &'m Param) -> Normed {
    let sums = Some(norm::sums(tape.device(), x).unwrap());
    let output = ConvOutput { map: x.clone(), sums, pooled: None };
    tape.instance_norm(output, weight, bias, 1e-5, 0.1).unwrap()
}

// ---- the cases ----

#[test]
fn convolution_with_everything_on_load() {
    // Instance norm, leaky ReLU, an added map and pooling before a convolution; odd sizes and
    // channels.
    let (device, s, c, out) = (device(), [4, 6, 2], 5, 7);
    let list =
        inputs(&[&[1, 4, 6, 2, c], &[c], &[c], &[1, 4, 6, 2, c], &[out, c, 3, 3, 3], &[out]]);
    let naive = |v: &[Values]| {
        let mut x = instance_norm(&v[0], c, &v[1], &v[2], 0.1);
        x.iter_mut().zip(&v[3]).for_each(|(x, a)| *x += a);
        let half = s.map(|v| v / 2);
        let pool = |p: [isize; 3], q: usize| {
            (0..8)
                .map(|n| {
                    x[at(s, c, [2 * p[0] + n / 4, 2 * p[1] + n / 2 % 2, 2 * p[2] + n % 2]).unwrap()
                        + q]
                })
                .fold(f64::NEG_INFINITY, f64::max)
        };
        let pooled: Values = places(half)
            .flat_map(|p| (0..c).map(move |q| (p, q)))
            .map(|(p, q)| pool(p, q))
            .collect();
        conv(&pooled, half, c, &v[4], &v[5])
    };
    check("conv3d on load", &list, &naive, &|seed| {
        let p = params(&list);
        let layer = Conv::new(&device, p[4].clone(), Some(p[5].clone())).unwrap();
        let tape = Tape::on(&device);
        let (x, add) = (tape.leaf((*p[0]).clone()), tape.leaf((*p[3]).clone()));
        let input = normed(&tape, &x, &p[1], &p[2]).input().plus(Some(&add)).max_pooled();
        let y = tape.conv3d(input, &layer, Epilogue::NONE).unwrap().map;
        record(tape, y, &[(0, x), (3, add)], 6, seed)
    });
}

/// A norm subtracts its map's mean, and with it the bias: nothing depends on the bias.
#[test]
fn convolution_in_front_of_a_norm_leaves_its_bias_alone() {
    let (device, s, c, out) = (device(), [3, 4, 5], 3, 4);
    let list = inputs(&[&[1, 3, 4, 5, c], &[out, c, 3, 3, 3], &[out], &[out], &[out]]);
    let naive =
        |v: &[Values]| instance_norm(&conv(&v[0], s, c, &v[1], &v[2]), out, &v[3], &v[4], 1.0);
    let ours = |seed: Seed| {
        let p = params(&list);
        let layer = Conv::new(&device, p[1].clone(), Some(p[2].clone())).unwrap();
        let tape = Tape::on(&device);
        let x = tape.leaf((*p[0]).clone());
        let y = tape.conv3d(TapeInput::shared(&x), &layer, Epilogue::SUMS).unwrap();
        let y = tape.instance_norm(y, &p[3], &p[4], 1e-5, 1.0).unwrap();
        let y = tape.apply(y.into_input()).unwrap();
        record(tape, y, &[(0, x)], 5, seed)
    };
    check("conv3d in front of a norm", &list, &naive, &ours);
    let gradients = ours(&|len| tensor(&[len], &noise(77, len))).1;
    assert!(gradients[2].is_none() && gradients.iter().flatten().count() == 4);
    let mut moved: Vec<Values> = list.iter().map(|i| i.values.clone()).collect();
    let before = naive(&moved);
    moved[2].iter_mut().for_each(|b| *b += 0.5);
    assert!(naive(&moved).iter().zip(&before).all(|(a, b)| (a - b).abs() < 1e-9));
}

#[test]
fn decoder_stage_against_upsampling_and_concatenation() {
    let (device, s, x_c, up, skip_c, out) = (device(), [2, 3, 2], 6, 3, 4, 5);
    let list = inputs(&[
        &[1, 2, 3, 2, x_c],
        &[1, 4, 6, 4, skip_c],
        &[x_c, up, 2, 2, 2],
        &[up],
        &[out, skip_c + up, 3, 3, 3],
        &[out],
        &[out],
        &[out],
    ]);
    let plain = |v: &[Values]| {
        let fine = transpose(&v[0], s, x_c, &v[2], &v[3]);
        let both: Values = v[1]
            .chunks(skip_c)
            .zip(fine.chunks(up))
            .flat_map(|(a, b)| a.iter().chain(b).copied().collect::<Values>())
            .collect();
        conv(&both, s.map(|v| 2 * v), skip_c + up, &v[4], &v[5])
    };
    let normed = |v: &[Values]| instance_norm(&plain(v), out, &v[6], &v[7], 1.0);
    let ours = |norm_behind: bool, seed: Seed| {
        let p = params(&list);
        let stage =
            UpStage::new(&device, [p[2].clone(), p[3].clone()], [p[4].clone(), p[5].clone()])
                .unwrap();
        let stage = if norm_behind { stage.in_front_of_norm() } else { stage };
        let tape = Tape::on(&device);
        let (x, skip) = (tape.leaf((*p[0]).clone()), tape.leaf((*p[1]).clone()));
        let prepared = tape.skip_map(&stage, Some(TapeInput::shared(&skip)), [1, 4, 6, 4]).unwrap();
        let mut y = tape.decoder_stage(&stage, TapeInput::shared(&x), &prepared).unwrap();
        if norm_behind {
            let normed = tape.instance_norm(y, &p[6], &p[7], 1e-5, 1.0).unwrap();
            let map = tape.apply(normed.into_input()).unwrap();
            y = ConvOutput { map, sums: None, pooled: None };
        }
        record(tape, y.map, &[(0, x), (1, skip)], 8, seed)
    };
    check("decoder stage", &list, &plain, &|seed| ours(false, seed));
    check("decoder stage and norm", &list, &normed, &|seed| {
        let result = ours(true, seed);
        assert!(result.1[5].is_none() && result.1.iter().flatten().count() == 7);
        result
    });
}

#[test]
fn strided_convolutions() {
    let (device, s, c, out) = (device(), [2, 3, 2], 5, 4);
    let list = inputs(&[&[1, 2, 3, 2, c], &[c, out, 2, 2, 2], &[out], &[out], &[out]]);
    let naive =
        |v: &[Values]| layer_norm(&transpose(&v[0], s, c, &v[1], &v[2]), &v[3], &v[4], 1e-6, true);
    check("transposed convolution, norm, GELU", &list, &naive, &|seed| {
        let p = params(&list);
        let layer = Transpose::new(p[1].clone(), p[2].clone()).unwrap();
        let tape = Tape::on(&device);
        let x = tape.leaf((*p[0]).clone());
        let y = tape.conv_transpose3d(&x, &layer, Some((&p[3], &p[4], 1e-6))).unwrap();
        record(tape, y, &[(0, x)], 5, seed)
    });
    let list = inputs(&[&[1, 4, 2, 4, 3], &[5, 3, 2, 2, 2], &[5]]);
    let naive = |v: &[Values]| {
        let mut y = vec![];
        for p in places([2, 1, 2]) {
            for o in 0..5 {
                let tap = |t: usize| {
                    at(
                        [4, 2, 4],
                        3,
                        [
                            2 * p[0] + (t / 4) as isize,
                            2 * p[1] + (t / 2 % 2) as isize,
                            2 * p[2] + (t % 2) as isize,
                        ],
                    )
                    .unwrap()
                };
                y.push(
                    v[2][o]
                        + (0..24).map(|n| v[0][tap(n % 8) + n / 8] * v[1][o * 24 + n]).sum::<f64>(),
                );
            }
        }
        y
    };
    check("patch convolution", &list, &naive, &|seed| {
        let p = params(&list);
        let tape = Tape::on(&device);
        let x = tape.leaf((*p[0]).clone());
        let y = tape.patch_conv(&x, &p[1], Some(&p[2])).unwrap();
        record(tape, y, &[(0, x)], 3, seed)
    });
}

#[test]
fn dense_layers_and_norms() {
    let device = device();
    for act in [Activation::None, Activation::Gelu, Activation::Relu] {
        let list = inputs(&[&[9, 7], &[6, 7], &[6], &[9, 6]]);
        let naive = |v: &[Values]| {
            let f = |x: f64| match act {
                Activation::None => x,
                Activation::Gelu => gelu(x),
                Activation::Relu => x.max(0.0),
            };
            linear(&v[0], &v[1], &v[2]).into_iter().zip(&v[3]).map(|(y, r)| f(y) + r).collect()
        };
        check(&format!("linear {act:?}"), &list, &naive, &|seed| {
            let p = params(&list);
            let tape = Tape::on(&device);
            let (x, residual) = (tape.leaf((*p[0]).clone()), tape.leaf((*p[3]).clone()));
            let y = tape.linear(&x, &p[1], Some(&p[2]), act, Some(&residual)).unwrap();
            record(tape, y, &[(0, x), (3, residual)], 4, seed)
        });
    }
    for act in [false, true] {
        let list = inputs(&[&[5, 19], &[19], &[19]]);
        let naive = |v: &[Values]| layer_norm(&v[0], &v[1], &v[2], 1e-5, act);
        check("layer norm", &list, &naive, &|seed| {
            let p = params(&list);
            let tape = Tape::on(&device);
            let x = tape.leaf((*p[0]).clone());
            let y = tape.layer_norm(&x, &p[1], &p[2], 1e-5, act).unwrap();
            record(tape, y, &[(0, x)], 3, seed)
        });
    }
}

#[test]
fn pointwise_ops_and_rearrangements() {
    let device = device();
    let list = inputs(&[&[4, 6], &[6]]);
    let naive = |v: &[Values]| {
        let sum: Values = v[0].iter().enumerate().map(|(i, x)| x + v[1][i % 6]).collect();
        let (a, b) = (&sum[6..12], &sum[..6]);
        let both: Values = a.iter().chain(b).copied().collect();
        let soft: Values = both.chunks(6).flat_map(softmax).collect();
        soft.iter().map(|x| gelu(1.0 / (1.0 + (-x).exp()))).collect()
    };
    check("add, rows, concat, softmax, sigmoid, GELU", &list, &naive, &|seed| {
        let p = params(&list);
        let tape = Tape::on(&device);
        let x = tape.leaf((*p[0]).clone());
        let sum = tape.add_param(&x, &p[1]).unwrap();
        let both =
            tape.concat(&[tape.rows(&sum, 1, 1).unwrap(), tape.rows(&sum, 0, 1).unwrap()]).unwrap();
        let y = tape.gelu(&tape.sigmoid(&tape.softmax(&both).unwrap()).unwrap()).unwrap();
        record(tape, y, &[(0, x)], 2, seed)
    });
    let list = inputs(&[&[1, 4, 4, 8, 2], &[1, 4, 4, 8, 2]]);
    let naive = |v: &[Values]| {
        // Twice the size by trilinear interpolation, back by means, then every fourth voxel, then a
        // product.
        let s = [4, 4, 8];
        let mix = |x: &[f64], p: [isize; 3], q: usize| -> f64 {
            (0..8)
                .map(|n: isize| {
                    let bits = [n / 4, n / 2 % 2, n % 2];
                    let (mut weight, mut from) = (1.0, [0isize; 3]);
                    for a in 0..3 {
                        let at = (p[a] as f64 + 0.5) / 2.0 - 0.5;
                        let low = at.floor();
                        weight *= if bits[a] == 1 { at - low } else { 1.0 - at + low };
                        from[a] = (low as isize + bits[a]).clamp(0, s[a] as isize - 1);
                    }
                    weight * x[self::at(s, 2, from).unwrap() + q]
                })
                .sum()
        };
        let fine: Values =
            places(s.map(|v| 2 * v)).flat_map(|p| [mix(&v[0], p, 0), mix(&v[0], p, 1)]).collect();
        let mean = |p: [isize; 3], q: usize| -> f64 {
            (0..8)
                .map(|n| {
                    fine[at(
                        s.map(|v| 2 * v),
                        2,
                        [2 * p[0] + n / 4, 2 * p[1] + n / 2 % 2, 2 * p[2] + n % 2],
                    )
                    .unwrap()
                        + q]
                })
                .sum::<f64>()
                / 8.0
        };
        let back: Values = places(s).flat_map(|p| [mean(p, 0), mean(p, 1)]).collect();
        let product: Values = back.iter().zip(&v[1]).map(|(a, b)| a * b).collect();
        places([1, 1, 2])
            .flat_map(|p| (0..2).map(move |q| (p, q)))
            .map(|(p, q)| product[at(s, 2, p.map(|v| 4 * v)).unwrap() + q])
            .collect()
    };
    check("up and down, multiply, nearest", &list, &naive, &|seed| {
        let p = params(&list);
        let tape = Tape::on(&device);
        let (x, b) = (tape.leaf((*p[0]).clone()), tape.leaf((*p[1]).clone()));
        let back = tape.downsample2_trilinear(&tape.upsample2_trilinear(&x).unwrap()).unwrap();
        let zeros = Tensor::new(back.shape(), vec![0.0; back.len()]);
        let y = tape.downsample4_nearest(&tape.multiply_add(&back, &b, &zeros).unwrap()).unwrap();
        record(tape, y, &[(0, x), (1, b)], 2, seed)
    });
}

#[test]
fn mask_logits_with_weights_that_are_computed() {
    let (device, c) = (device(), 6);
    let list = inputs(&[&[1, 3, 2, 4, c], &[c], &[c], &[1, 3, 2, 4, c], &[3, c], &[3]]);
    let naive = |v: &[Values]| {
        let x: Values = instance_norm(&v[0], c, &v[1], &v[2], 0.1)
            .iter()
            .zip(&v[3])
            .map(|(x, a)| x + a)
            .collect();
        (0..3)
            .flat_map(|m| {
                x.chunks(c)
                    .map(|x| {
                        v[5][m] + x.iter().zip(&v[4][m * c..]).map(|(x, w)| x * w).sum::<f64>()
                    })
                    .collect::<Values>()
            })
            .collect()
    };
    check("mask_logits", &list, &naive, &|seed| {
        let p = params(&list);
        let tape = Tape::on(&device);
        let [x, add, w, b] = [0, 3, 4, 5].map(|i| tape.leaf((*p[i]).clone()));
        let input = normed(&tape, &x, &p[1], &p[2]).input().plus(Some(&add));
        let y = tape.mask_logits(input, &w, Some(&b)).unwrap();
        record(tape, y, &[(0, x), (3, add), (4, w), (5, b)], 6, seed)
    });
}

fn attend(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    width: usize,
    heads: usize,
    bias: impl Fn(usize, usize, usize) -> f64,
) -> Values {
    let (dim, rows, keys) = (width / heads, q.len() / width, k.len() / width);
    let mut out = vec![0.0; q.len()];
    for h in 0..heads {
        for r in 0..rows {
            let dot = |t: usize| {
                (0..dim)
                    .map(|i| q[r * width + h * dim + i] * k[t * width + h * dim + i])
                    .sum::<f64>()
            };
            let p = softmax(
                &(0..keys)
                    .map(|t| dot(t) / (dim as f64).sqrt() + bias(h, r, t))
                    .collect::<Values>(),
            );
            for i in 0..dim {
                out[r * width + h * dim + i] =
                    (0..keys).map(|t| p[t] * v[t * width + h * dim + i]).sum();
            }
        }
    }
    out
}

#[test]
fn two_way_attention() {
    let (device, width, heads) = (device(), 4, 2);
    let mut shapes: Vec<&[usize]> = vec![&[3, 8], &[5, 8], &[5, 8]];
    for _ in 0..3 {
        shapes.extend([&[4usize, 8] as &[usize], &[4]]);
    }
    shapes.extend([&[8usize, 4] as &[usize], &[8]]);
    let list = inputs(&shapes);
    let naive = |v: &[Values]| {
        let project = |x: usize, n: usize| linear(&v[x], &v[3 + 2 * n], &v[4 + 2 * n]);
        let heads =
            attend(&project(0, 0), &project(1, 1), &project(2, 2), width, heads, |_, _, _| 0.0);
        linear(&heads, &v[9], &v[10]).iter().zip(&v[0]).map(|(y, r)| y + r).collect()
    };
    check("two-way attention", &list, &naive, &|seed| {
        let p = params(&list);
        let pair = |n: usize| (p[n].clone(), p[n + 1].clone());
        let w = TwoWayWeights { q: pair(3), k: pair(5), v: pair(7), out: pair(9), heads };
        let tape = Tape::on(&device);
        let [q, k, v] = [0, 1, 2].map(|i| tape.leaf((*p[i]).clone()));
        let y = tape.two_way_attention(&w, &q, (&k, &v, None), Some(&q)).unwrap();
        record(tape, y, &[(0, q), (1, k), (2, v)], 11, seed)
    });
}

#[test]
fn windowed_attention_with_padded_tokens_written_out() {
    // A grid of 3 in windows of 2: eight windows, seven of them padded; the plain formula keeps
    // every padded token.
    let (device, s, w, dim, heads) = (device(), 3usize, 2usize, 4usize, 2usize);
    let hd = dim / heads;
    let list =
        inputs(&[&[1, 3, 3, 3, 4], &[12, 4], &[12], &[4, 4], &[4], &[3, 2], &[3, 2], &[3, 2]]);
    let naive = |v: &[Values]| {
        let mut out = vec![0.0; s * s * s * dim];
        for window in places([2, 2, 2]) {
            let grid =
                |p: [isize; 3]| at([s; 3], dim, [0, 1, 2].map(|a| window[a] * w as isize + p[a]));
            let tokens: Values = places([w; 3])
                .flat_map(|p| grid(p).map_or(vec![0.0; dim], |g| v[0][g..g + dim].to_vec()))
                .collect();
            let qkv = linear(&tokens, &v[1], &v[2]);
            let part = |n: usize| -> Values {
                qkv.chunks(3 * dim).flat_map(|r| r[n * dim..(n + 1) * dim].to_vec()).collect()
            };
            let (q, k, val) = (part(0), part(1), part(2));
            let bias = |h: usize, r: usize, t: usize| {
                let (at, key) = ([r / w / w, r / w % w, r % w], [t / w / w, t / w % w, t % w]);
                let row = |p: [usize; 3]| ((p[0] * w + p[1]) * w + p[2]) * dim + h * hd;
                let dot = |q_at: usize, axis: usize, p: usize| -> f64 {
                    (0..hd).map(|i| q[q_at + i] * v[5 + axis][(p + w - 1 - key[2]) * hd + i]).sum()
                };
                dot(row(at), 0, at[0])
                    + dot(row([at[0], at[1], key[0]]), 1, at[1])
                    + dot(row([at[0], at[1], key[1]]), 2, key[1])
            };
            let attended = attend(&q, &k, &val, dim, heads, bias);
            for (p, a) in places([w; 3]).zip(attended.chunks(dim)) {
                if let Some(g) = grid(p) {
                    out[g..g + dim].copy_from_slice(a);
                }
            }
        }
        linear(&out, &v[3], &v[4])
    };
    check("windowed attention", &list, &naive, &|seed| {
        let p = params(&list);
        let weights = VitWeights {
            qkv: (p[1].clone(), p[2].clone()),
            proj: (p[3].clone(), p[4].clone()),
            rel_pos: [p[5].clone(), p[6].clone(), p[7].clone()],
            heads,
            window: w,
        };
        let tape = Tape::on(&device);
        let x = tape.leaf((*p[0]).clone());
        let y = tape.vit_attention(&weights, &x, None).unwrap();
        record(tape, y, &[(0, x)], 8, seed)
    });
}

#[test]
fn mask_loss_and_boundary_map() {
    let (device, s) = (device(), [6, 5, 4]);
    let n = 120;
    let label: Vec<f32> = noise(3, n).iter().map(|v| f32::from(u8::from(*v > 0.2))).collect();
    let pooled = |m: &[f64]| -> Values {
        let near = |p: [isize; 3]| {
            (0..25)
                .filter_map(|t| at(s, 1, [p[0] + t / 5 - 2, p[1] + t % 5 - 2, p[2]]))
                .map(|q| m[q])
                .sum::<f64>()
                / 25.0
        };
        places(s).map(near).collect()
    };
    let boundary =
        |m: &[f64]| -> Values { m.iter().zip(pooled(m)).map(|(v, p)| (v - p).abs()).collect() };
    let g: Values = label.iter().map(|v| *v as f64).collect();
    let terms = Terms { region: 0.7, boundary: 9.0 };
    let list = [In {
        shape: vec![n],
        values: noise(5, n).iter().map(|v| (v * 3.0) as f32 as f64).collect(),
    }];
    let naive = |v: &[Values]| {
        let p: Values = v[0].iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let dice = 1.0 - (2.0 * dot(&p, &g) + 1e-5) / (dot(&p, &p) + dot(&g, &g) + 1e-5);
        let entropy =
            p.iter().zip(&g).map(|(p, g)| -(g * p.ln() + (1.0 - g) * (1.0 - p).ln())).sum::<f64>()
                / n as f64;
        let edge = boundary(&p).iter().zip(boundary(&g)).map(|(a, b)| (a - b).powi(2)).sum::<f64>()
            / n as f64;
        vec![terms.region * (dice + entropy) + terms.boundary * edge]
    };
    check("mask loss", &list, &naive, &|seed| {
        let target = Target::new(&device, label.clone(), s, loss::KERNEL).unwrap();
        let x = tensor(&[n], &list[0].values);
        let (losses, gradient) =
            loss::mask_losses_gradient(&device, &x, &target, terms, seed(1).data()[0]).unwrap();
        (
            Tensor::new([1], vec![losses[0].total(terms) as f32]),
            vec![Some(gradient.data().to_vec())],
        )
    });
    let list = [In { shape: vec![1, 1, 6, 5, 4], values: noise(8, n) }];
    check("boundary map", &list, &|v| boundary(&v[0]), &|seed| {
        let m = tensor(&list[0].shape, &list[0].values);
        let dy = seed(n).reshape(m.shape());
        let gradient = loss::boundary_map_gradient(&device, &m, [5, 5, 1], &dy).unwrap();
        (loss::boundary_map(&device, &m, [5, 5, 1]).unwrap(), vec![Some(gradient.data().to_vec())])
    });
}

#[test]
fn detached_values_and_tapes_that_are_off_leave_no_gradient() {
    let device = device();
    let weight = Param::new(tensor(&[3, 4], &noise(1, 12)), 0);
    let tape = Tape::on(&device);
    let x = tape.leaf(tensor(&[2, 4], &noise(2, 8)));
    let y = tape.linear(&x.detach(), &weight, None, Activation::None, None).unwrap();
    let mut params = ParamGrads::new(1);
    let mut leaves = tape.backward(vec![(&y, tensor(&[2, 3], &noise(3, 6)))], &mut params).unwrap();
    assert!(leaves.take(&x).is_none() && params.get(0).is_some());
    // Accumulation: the same pass twice gives twice the gradient.
    let once = params.get(0).unwrap().to_vec();
    let tape = Tape::on(&device);
    let x = tape.leaf(tensor(&[2, 4], &noise(2, 8)));
    let y = tape.linear(&x, &weight, None, Activation::None, None).unwrap();
    let mut leaves = tape.backward(vec![(&y, tensor(&[2, 3], &noise(3, 6)))], &mut params).unwrap();
    assert!(leaves.take(&x).is_some());
    assert!(
        params
            .get(0)
            .unwrap()
            .iter()
            .zip(&once)
            .all(|(a, b)| (a - 2.0 * b).abs() <= 1e-6 * b.abs().max(1.0))
    );
    let off = Tape::off(&device);
    let x = off.leaf(tensor(&[2, 4], &noise(2, 8)));
    let y = off.linear(&x, &weight, None, Activation::Gelu, None).unwrap();
    let mut none = ParamGrads::new(1);
    let mut leaves = off.backward(vec![(&y, tensor(&[2, 3], &noise(3, 6)))], &mut none).unwrap();
    assert!(leaves.take(&x).is_none() && none.get(0).is_none());
}

/// Without checks, kernels would read and write out of bounds if shapes do not match.
#[test]
fn gradients_refuse_what_does_not_fit() {
    use prism::device::{Cpu, Isa};
    use prism::ops::attention::{self, attend_windows};
    use prism::ops::conv3d::ConvInput;
    use prism::ops::decoder_stage::{self, DecoderStage};
    use prism::ops::optimizer::{AdamW, AdamWConfig, Norm};
    let device = device();
    let zeros = |shape: &[usize]| Tensor::new(shape, vec![0.0; shape.iter().product()]);

    let (q, k) = (zeros(&[3, 8]), zeros(&[5, 8]));
    let two_way = |heads: usize, k: &Tensor, v: &Tensor| {
        attention::grad::two_way_attention(&device, heads, &q, k, v, None, &q).is_ok()
    };
    assert!(two_way(2, &k, &k));
    assert!(!two_way(2, &zeros(&[5, 4]), &zeros(&[5, 4])), "narrower keys");
    assert!(!two_way(2, &k, &zeros(&[4, 8])), "fewer values than keys");
    assert!(!two_way(3, &k, &k) && !two_way(0, &k, &k), "heads that do not divide the width");

    let param = |shape: &[usize]| Param::new(zeros(shape), 0);
    let vit = VitWeights {
        qkv: (param(&[24, 8]), param(&[24])),
        proj: (param(&[8, 8]), param(&[8])),
        rel_pos: [(); 3].map(|()| param(&[3, 4])),
        heads: 2,
        window: 2,
    };
    let mut attended = attend_windows(&device, &vit, &zeros(&[1, 2, 2, 2, 8])).unwrap();
    assert!(attention::grad::vit_attention(&device, &vit, &attended, &zeros(&[8, 8])).is_ok());
    attended.qkv = zeros(&[4, 24]);
    assert!(
        attention::grad::vit_attention(&device, &vit, &attended, &zeros(&[4, 8])).is_err(),
        "fewer rows than windows have"
    );

    let (deconv, conv) = (zeros(&[6, 3, 2, 2, 2]), zeros(&[5, 7, 3, 3, 3]));
    let stage = DecoderStage::new(&device, &deconv, &zeros(&[3]), &conv, &zeros(&[5])).unwrap();
    let mirrored = decoder_stage::grad::mirrored(&device, &stage);
    let input = |device: &Device, dy: &[usize]| {
        decoder_stage::grad::input(device, &mirrored, &zeros(dy)).is_ok()
    };
    assert!(input(&device, &[1, 4, 4, 4, 5]));
    assert!(
        !input(&device, &[1, 4, 4, 4, 6]) && !input(&device, &[1, 4, 3, 4, 5]),
        "another stage's output"
    );
    if device.cpu().isa() > Isa::PORTABLE {
        let portable = Device::Cpu(Cpu::with_isa(1, Isa::PORTABLE).unwrap());
        assert!(!input(&portable, &[1, 4, 4, 4, 5]), "weights laid out for other kernels");
    }
    let (x, dy) = (ConvInput::owned(zeros(&[1, 2, 2, 2, 6])), zeros(&[1, 4, 4, 4, 5]));
    let composed = decoder_stage::grad::composed(&device, &stage, &x, &dy).unwrap();
    let fine = zeros(&[1, 4, 4, 4, 4]);
    assert!(
        decoder_stage::grad::composed(&device, &stage, &x, &fine).is_err(),
        "another stage's output"
    );
    let narrow = ConvInput::owned(zeros(&[1, 2, 2, 2, 5]));
    assert!(
        decoder_stage::grad::composed(&device, &stage, &narrow, &dy).is_err(),
        "another stage's input"
    );
    let weights = |deconv: &Tensor, conv: &Tensor| {
        decoder_stage::grad::weights(&device, &composed, deconv, conv).is_ok()
    };
    assert!(weights(&deconv, &conv));
    assert!(!weights(&zeros(&[5, 3, 2, 2, 2]), &conv), "a deconvolution of fewer inputs");
    assert!(
        !weights(&deconv, &zeros(&[4, 7, 3, 3, 3])) && !weights(&deconv, &zeros(&[5, 2, 3, 3, 3])),
        "another stage's convolution"
    );

    let (affine, tape) = (param(&[6]), Tape::on(&device));
    let output = |sums| ConvOutput { map: Var::constant(x.map.clone()), sums, pooled: None };
    let norm = |sums| tape.instance_norm(output(sums), &affine, &affine, 1e-5, 0.1).is_ok();
    assert!(norm(Some(norm::sums(&device, &x.map).unwrap())) && !norm(None), "no sums");

    let config = AdamWConfig { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.0, max_norm: 1.0 };
    let (mut parameter, gradient) = (zeros(&[4]), zeros(&[4]));
    for second in [3, 4] {
        let mut adamw = AdamW::resume(config, vec![[zeros(&[4]), zeros(&[second])]], 0);
        let norm = Norm::of(1.0);
        let mut list = [&mut parameter];
        let done = adamw.step(&device, 0.1, &mut list, &[Some(&gradient)], &norm, 1.0);
        assert_eq!(done.is_ok(), second == 4, "a second moment of {second} values for 4");
    }
}

#[test]
fn gradients_that_belong_to_nobody_here_are_errors() {
    let (device, values) = (device(), || tensor(&[3, 4], &noise(1, 12)));
    let seed = || tensor(&[2, 3], &noise(3, 6));
    let go_back = |weight: Param| -> std::result::Result<bool, OpError> {
        let tape = Tape::on(&device);
        let x = tape.leaf(tensor(&[2, 4], &noise(2, 8)));
        let y = tape.linear(&x, &weight, None, Activation::None, None)?;
        let mut params = ParamGrads::new(1);
        tape.backward(vec![(&y, seed())], &mut params)?;
        Ok(params.get(0).is_some())
    };
    assert_eq!(go_back(Param::new(values(), 0)), Ok(true));
    assert_eq!(go_back(Param::fixed(values())), Ok(false));
    let unknown = go_back(Param::new(values(), 1)).unwrap_err().to_string();
    assert_eq!(unknown, "backward: a gradient of parameter 1, and the list ends before 1");

    // A value of one tape in an op of another; and as the start of another's backward pass.
    let mut none = ParamGrads::new(0);
    let (one, other) = (Tape::on(&device), Tape::on(&device));
    let x = one.leaf(tensor(&[2, 3], &noise(2, 6)));
    let y = other.gelu(&x).unwrap();
    for (tape, var) in [(other, &y), (one, &y)] {
        let strange =
            tape.backward(vec![(var, seed())], &mut none).map(|_| ()).unwrap_err().to_string();
        assert_eq!(strange, "backward: a gradient of a value that another tape recorded");
    }
}

#[test]
#[should_panic(expected = "the gradient of another tape's leaf")]
fn another_tapes_leaf_has_no_gradient_here() {
    let device = device();
    let [one, other] = [Tape::on(&device), Tape::on(&device)];
    let [x, y] = [&one, &other].map(|tape| tape.leaf(tensor(&[2], &noise(2, 2))));
    let mut leaves =
        one.backward(vec![(&x, tensor(&[2], &noise(3, 2)))], &mut ParamGrads::new(0)).unwrap();
    leaves.take(&y);
}
