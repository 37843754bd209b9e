//! A problem made ready to run and to judge: inputs, the op, and what it should give by the
//! plainest formula in float64.
//!
//! Large results are judged at places drawn by lot, so that the oracle, one loop a formula, stays
//! quick. A network has no plain formula: its result at an edge of 32 voxels is held beside that of
//! the same network on the CPU's portable kernels in float32.

use super::problem::{Network, Problem};
use super::scribble;
use super::step::TrainingStep;
use crate::device::{Cpu, Device, Isa};
use crate::model::weights::Precision;
use crate::model::{Features, Model, Observer, PatchPrompts, PromptMaps, Weights, prompt_maps};
use crate::ops::attention::{VitWeights, attend_heads, vit_attention};
use crate::ops::conv3d::{ConvInput, Epilogue, PackedConv, conv3d};
use crate::ops::decoder_stage::{DecoderStage, decoder_stage, skip_map};
use crate::ops::linear::{Activation, linear};
use crate::ops::loss::{KERNEL, Target};
use crate::ops::norm;
use crate::ops::strided::patch_conv;
use crate::prompt::simulate::generator;
use crate::tensor::{OpError, Param, Tensor};
use rand::RngExt;
use rayon::prelude::*;

/// What is timed: one run, its result left on the device.
type Run = Box<dyn FnMut() -> Result<Tensor, OpError>>;
/// Pairs of what came out and what should have.
type Judge = Box<dyn Fn(&Tensor) -> Result<Vec<(f64, f64)>, OpError>>;

/// A problem ready to run on a device.
pub struct Prepared {
    device: Device,
    run: Run,
    judge: Judge,
    tolerance: f64,
}

/// Edge of the patch at which networks are judged.
const JUDGED: usize = 32;

/// Uniform numbers in [-1, 1).
fn noise(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = generator(seed, &[0x6e_6f_69_73_65]);
    Tensor::new(
        shape,
        (0..shape.iter().product::<usize>()).map(|_| rng.random_range(-1.0f32..1.0)).collect(),
    )
}

/// The same, scaled so that sums of `terms` products stay near 1.
fn weights(shape: &[usize], terms: usize, seed: u64) -> Tensor {
    let scale = (3.0 / terms as f32).sqrt();
    let values = noise(shape, seed);
    Tensor::new(shape, values.data().iter().map(|v| v * scale).collect())
}

/// `count` numbers below `below`, drawn by lot; all of them where there are no more.
fn places(below: usize, count: usize) -> Vec<usize> {
    if below <= count {
        return (0..below).collect();
    }
    let mut rng = generator(9, &[below as u64]);
    (0..count).map(|_| rng.random_range(0..below)).collect()
}

/// Judges `count` places of a result of `len` values, given what each should be.
fn sampled(len: usize, count: usize, want: impl Fn(usize) -> f64 + Sync + 'static) -> Judge {
    Box::new(move |out: &Tensor| {
        let got = out.try_data()?;
        Ok(places(len, count).into_par_iter().map(|at| (got[at] as f64, want(at))).collect())
    })
}

/// The values in float64.
fn wide(t: &Tensor) -> Vec<f64> {
    t.data().iter().map(|v| *v as f64).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Sums `term` over the taps of a 3×3×3 neighbourhood that lie within a cube of edge `d`.
fn taps(d: usize, [i, j, k]: [usize; 3], mut term: impl FnMut(usize, [usize; 3]) -> f64) -> f64 {
    let mut sum = 0.0;
    for t in 0..27 {
        let place = [i + t / 9, j + t / 3 % 3, k + t % 3];
        if place.iter().all(|p| (1..=d).contains(p)) {
            sum += term(t, place.map(|p| p - 1));
        }
    }
    sum
}

/// Item, voxel and channel of a value of a map `[n, d, d, d, c]`.
fn split(at: usize, d: usize, c: usize) -> (usize, [usize; 3], usize) {
    let voxel = at / c;
    (voxel / (d * d * d), [voxel / (d * d) % d, voxel / d % d, voxel % d], at % c)
}

fn conv(device: &Device, [n, ic, oc, d, k]: [usize; 5]) -> Result<(Run, Judge), OpError> {
    let same = k == 3;
    let (x, b) = (noise(&[n, d, d, d, ic], 1), noise(&[oc], 3));
    let w = weights(&[oc, ic, k, k, k], ic * k * k * k, 2);
    let (xs, ws, bs) = (wide(&x), wide(&w), wide(&b));
    let judge = {
        let out = if same { d } else { d / k };
        sampled(n * out.pow(3) * oc, 512, move |at| {
            let (item, v, o) = split(at, out, oc);
            let from =
                |p: [usize; 3], c: usize| xs[(((item * d + p[0]) * d + p[1]) * d + p[2]) * ic + c];
            let cube = k * k * k;
            let inputs = |t: usize, p: [usize; 3]| {
                (0..ic).map(|c| from(p, c) * ws[(o * ic + c) * cube + t]).sum::<f64>()
            };
            let sum = match same {
                true => taps(d, v, inputs),
                false => (0..cube)
                    .map(|t| {
                        inputs(t, [v[0] * k + t / (k * k), v[1] * k + t / k % k, v[2] * k + t % k])
                    })
                    .sum(),
            };
            sum + bs[o]
        })
    };
    let on = device.clone();
    let run: Run = if same {
        let packed = PackedConv::new(device.cpu(), &w, 0..ic, Some(&b))?;
        Box::new(move || Ok(conv3d(&on, ConvInput::shared(&x), &packed, Epilogue::SUMS)?.map))
    } else {
        Box::new(move || patch_conv(&on, &x, &w, Some(&b)))
    };
    Ok((run, judge))
}

fn upcat(device: &Device, [ic, uc, sc, oc, d]: [usize; 5]) -> Result<(Run, Judge), OpError> {
    let f = 2 * d;
    let (x, skip) = (noise(&[1, d, d, d, ic], 1), noise(&[1, f, f, f, sc], 2));
    let (dw, db) = (weights(&[ic, uc, 2, 2, 2], ic, 3), noise(&[uc], 4));
    let (cw, cb) = (weights(&[oc, sc + uc, 3, 3, 3], 27 * (sc + uc), 5), noise(&[oc], 6));
    let stage = DecoderStage::new(device, &dw, &db, &cw, &cb)?;
    let map = skip_map(device, &stage, Some(ConvInput::shared(&skip)), [1, f, f, f])?;
    let [xs, ss, dws, dbs, cws, cbs] = [&x, &skip, &dw, &db, &cw, &cb].map(wide);
    let judge = sampled(f * f * f * oc, 64, move |at| {
        let (_, v, o) = split(at, f, oc);
        let sum = taps(f, v, |t, p| {
            let phase = (p[0] % 2 * 2 + p[1] % 2) * 2 + p[2] % 2;
            let coarse = &xs[((p[0] / 2 * d + p[1] / 2) * d + p[2] / 2) * ic..][..ic];
            let fine = &ss[((p[0] * f + p[1]) * f + p[2]) * sc..][..sc];
            let weight = |c: usize| cws[(o * (sc + uc) + c) * 27 + t];
            let up = |c: usize| {
                dbs[c] + (0..ic).map(|i| coarse[i] * dws[(i * uc + c) * 8 + phase]).sum::<f64>()
            };
            (0..sc).map(|c| fine[c] * weight(c)).sum::<f64>()
                + (0..uc).map(|c| up(c) * weight(sc + c)).sum::<f64>()
        });
        sum + cbs[o]
    });
    let (on, x) = (device.clone(), ConvInput::owned(x));
    Ok((Box::new(move || Ok(decoder_stage(&on, &stage, &x, &map)?.map)), judge))
}

/// What a ViT block's attention with the released indexing gives for the token in row `row`,
/// windows filled up with padding.
struct Released {
    x: Vec<f64>,
    qkv: (Vec<f64>, Vec<f64>),
    proj: (Vec<f64>, Vec<f64>),
    rel: [Vec<f64>; 3],
    heads: usize,
    dim: usize,
    s: usize,
    edge: usize,
}

impl Released {
    /// q (0), k (1) or v (2) of head `h` at a place of the window that begins at `start`: the bias
    /// where it is padded.
    fn project(&self, start: [usize; 3], place: [usize; 3], which: usize, h: usize) -> Vec<f64> {
        let (dim, all) = (self.dim, self.heads * self.dim);
        let at: [usize; 3] = std::array::from_fn(|a| start[a] + place[a]);
        let row = at
            .iter()
            .all(|p| *p < self.s)
            .then(|| &self.x[((at[0] * self.s + at[1]) * self.s + at[2]) * all..][..all]);
        let first = (which * self.heads + h) * dim;
        (first..first + dim)
            .map(|o| self.qkv.1[o] + row.map_or(0.0, |x| dot(x, &self.qkv.0[o * all..][..all])))
            .collect()
    }

    /// `q . R_a[p, n]` of the table along axis `a`.
    fn relative(&self, q: &[f64], a: usize, p: usize, n: usize) -> f64 {
        dot(q, &self.rel[a][(p + self.edge - 1 - n) * self.dim..][..self.dim])
    }

    fn head(&self, start: [usize; 3], [d, h, w]: [usize; 3], head: usize) -> Vec<f64> {
        let e = self.edge;
        let own = self.project(start, [d, h, w], 0, head);
        // The released network takes its second and third terms from the queries at (d, h, kd) and
        // (d, h, kh).
        let along: Vec<Vec<f64>> =
            (0..e).map(|p| self.project(start, [d, h, p], 0, head)).collect();
        let (mut scores, mut values) = (vec![], vec![]);
        for at in 0..e * e * e {
            let (kd, kh, kw) = (at / e / e, at / e % e, at % e);
            let key = self.project(start, [kd, kh, kw], 1, head);
            let position = self.relative(&own, 0, d, kw)
                + self.relative(&along[kd], 1, h, kw)
                + self.relative(&along[kh], 2, kh, kw);
            scores.push(dot(&own, &key) / (self.dim as f64).sqrt() + position);
            values.push(self.project(start, [kd, kh, kw], 2, head));
        }
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
        let sum: f64 = weights.iter().sum();
        (0..self.dim)
            .map(|c| weights.iter().zip(&values).map(|(w, v)| w * v[c]).sum::<f64>() / sum)
            .collect()
    }

    fn row(&self, row: usize) -> Vec<f64> {
        let (s, e) = (self.s, self.edge);
        let at = [row / s / s, row / s % s, row % s];
        let start = at.map(|p| p / e * e);
        let place = std::array::from_fn(|a| at[a] - start[a]);
        let heads: Vec<f64> =
            (0..self.heads).into_par_iter().flat_map(|h| self.head(start, place, h)).collect();
        (0..heads.len())
            .map(|o| self.proj.1[o] + dot(&heads, &self.proj.0[o * heads.len()..][..heads.len()]))
            .collect()
    }
}

fn attention(device: &Device, [h, d, s, w]: [usize; 4]) -> Result<(Run, Judge), OpError> {
    let (all, edge) = (h * d, if w == 0 { s } else { w });
    let x = noise(&[1, s, s, s, all], 1);
    let param = |t: Tensor| Param::new(t, 0);
    let pair = |out: usize, seed: u64| {
        (param(weights(&[out, all], all, seed)), param(noise(&[out], seed + 1)))
    };
    let rel_pos = [6, 7, 8].map(|seed| param(weights(&[2 * edge - 1, d], 4 * d, seed)));
    let vit =
        VitWeights { qkv: pair(3 * all, 2), proj: pair(all, 4), rel_pos, heads: h, window: w };
    let both = |(w, b): &(Param, Param)| (wide(w), wide(b));
    let rel = vit.rel_pos.each_ref().map(|t| wide(t));
    let released = Released {
        x: wide(&x),
        qkv: both(&vit.qkv),
        proj: both(&vit.proj),
        rel,
        heads: h,
        dim: d,
        s,
        edge,
    };
    let judge: Judge = Box::new(move |out: &Tensor| {
        let (rows, got) = (places(s * s * s, 2), out.try_data()?);
        Ok(rows
            .iter()
            .flat_map(|&r| got[r * all..][..all].iter().map(|v| *v as f64).zip(released.row(r)))
            .collect())
    });
    let on = device.clone();
    Ok((Box::new(move || vit_attention(&on, &vit, &x, None)), judge))
}

fn cross(device: &Device, [h, d, queries, keys]: [usize; 4]) -> Result<(Run, Judge), OpError> {
    let all = h * d;
    let [q, k, v] =
        [(queries, 1), (keys, 2), (keys, 3)].map(|(rows, seed)| noise(&[rows, all], seed));
    let [qs, ks, vs] = [&q, &k, &v].map(wide);
    let judge = sampled(queries * all, 512, move |at| {
        let (row, c) = (at / all, at % all);
        let part = |x: &[f64], row: usize| x[row * all + c / d * d..][..d].to_vec();
        let own = part(&qs, row);
        let scores: Vec<f64> =
            (0..keys).map(|m| dot(&own, &part(&ks, m)) / (d as f64).sqrt()).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights = scores.iter().map(|s| (s - most).exp());
        let sum: f64 = weights.clone().sum();
        weights.enumerate().map(|(m, w)| w * vs[m * all + c]).sum::<f64>() / sum
    });
    let on = device.clone();
    Ok((Box::new(move || attend_heads(&on, h, &q, &k, &v, None)), judge))
}

fn dense(device: &Device, [m, k, n]: [usize; 3]) -> (Run, Judge) {
    let (x, w, b) = (noise(&[m, k], 1), weights(&[n, k], k, 2), noise(&[n], 3));
    let [xs, ws, bs] = [&x, &w, &b].map(wide);
    let judge = sampled(m * n, 4096, move |at| {
        bs[at % n] + dot(&xs[at / n * k..][..k], &ws[at % n * k..][..k])
    });
    let on = device.clone();
    (Box::new(move || linear(&on, &x, &w, Some(&b), Activation::None, None)), judge)
}

fn layer_norm(device: &Device, [m, c]: [usize; 2]) -> (Run, Judge) {
    let (x, w, b) = (noise(&[m, c], 1), noise(&[c], 2), noise(&[c], 3));
    let [xs, ws, bs] = [&x, &w, &b].map(wide);
    let judge = sampled(m * c, 1024, move |at| {
        let row = &xs[at / c * c..][..c];
        let mean = row.iter().sum::<f64>() / c as f64;
        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / c as f64;
        (xs[at] - mean) / (variance + 1e-6).sqrt() * ws[at % c] + bs[at % c]
    });
    let on = device.clone();
    (Box::new(move || norm::layer_norm(&on, &x, &w, &b, 1e-6, false)), judge)
}

/// What a click needs.
struct Click {
    features: Features,
    prompts: PatchPrompts,
    dense: Tensor,
    history: PromptMaps,
}

/// A network of hashed weights on an image of noise, and one run of it; where it is `judged` an
/// interaction gives the chosen mask before refinement.
fn network(
    device: &Device,
    network: &Network,
    points: Option<usize>,
    judged: bool,
) -> Result<Run, OpError> {
    let s = network.patch;
    let trouble = |message: String| OpError::Argument { op: "bench", message };
    // Through a file, to be read from it as anybody's would.
    let folder = tempfile::tempdir().map_err(|e| trouble(e.to_string()))?;
    let path = folder.path().join("model.safetensors");
    Weights::hashed(network.config(), "public")
        .save(&path, Precision::F32)
        .map_err(|e| trouble(e.to_string()))?;
    let model = Model::new(device, &Weights::open(&path).map_err(|e| trouble(e.to_string()))?)?;
    let image = noise(&[s, s, s], 1);
    let click = match points {
        None => None,
        Some(points) => {
            let prompts = scribble(s, points, 1);
            let history = prompt_maps(device, s, &prompts.points);
            let features = model.encode(&image, &mut Observer::none())?;
            Some(Click {
                features,
                prompts,
                dense: Tensor::new([s; 3], vec![0.0; s * s * s]),
                history,
            })
        }
    };
    Ok(Box::new(move || match &click {
        None => Ok(model.encode(&image, &mut Observer::none())?.vars()[0].value().clone()),
        Some(Click { features, prompts, dense, history }) => {
            let answer =
                model.interact(features, prompts, dense, history, &mut Observer::none())?;
            // What a user sees of it.
            std::hint::black_box(answer.summary()?);
            // Of the candidates not every device keeps more than the chosen one.
            Ok(match judged {
                true => Tensor::new([s; 3], answer.candidates.selected_logits()?.to_vec()),
                false => answer.logits.value().clone(),
            })
        }
    }))
}

/// A training step; gives its loss.
fn training(device: &Device, network: &Network, iterations: usize) -> Result<Run, OpError> {
    let (config, s, on) = (network.config(), network.patch, device.for_training());
    let image = noise(&[s, s, s], 1);
    let distance = |v: usize| (v as f64 - s as f64 / 2.0).powi(2);
    let inside = |at: usize| {
        distance(at / s / s) + distance(at / s % s) + distance(at % s) < (s as f64 / 4.0).powi(2)
    };
    let target = Target::new(
        &on,
        (0..s * s * s).map(|at| f32::from(u8::from(inside(at)))).collect(),
        [s; 3],
        KERNEL,
    )?;
    let mut step = TrainingStep::new(&on, config, iterations, false);
    let mut first = None;
    Ok(Box::new(move || {
        let loss = step.run(&image, &target, &scribble(s, 5, 1))?.loss as f32;
        // The first step's loss, of the weights that everybody has.
        Ok(Tensor::new([1], vec![*first.get_or_insert(loss)]))
    }))
}

/// Holds a network at a small edge beside the portable kernels.
fn beside_portable(
    device: &Device,
    make: impl Fn(&Device) -> Result<Run, OpError> + 'static,
) -> Judge {
    let device = device.clone();
    Box::new(move |_: &Tensor| {
        let portable = Cpu::with_isa(device.cpu().threads(), Isa::PORTABLE)
            .map_err(|e| OpError::Argument { op: "bench", message: e.to_string() })?;
        let (got, want) = (make(&device)?()?, make(&Device::Cpu(portable))?()?);
        got.try_data()?;
        Ok(wide(&got).into_iter().zip(wide(&want)).collect())
    })
}

impl Prepared {
    /// Makes a problem ready.
    pub fn new(device: &Device, problem: &Problem) -> Result<Prepared, OpError> {
        let small = |n: &Network| Network { patch: n.patch.min(JUDGED), ..n.clone() };
        let (run, judge) = match problem {
            &Problem::Conv { n, ic, oc, d, k } => conv(device, [n, ic, oc, d, k])?,
            &Problem::UpCat { ic, uc, sc, oc, d } => upcat(device, [ic, uc, sc, oc, d])?,
            &Problem::Attention { h, d, s, w } => attention(device, [h, d, s, w])?,
            &Problem::Cross { h, d, q, k } => cross(device, [h, d, q, k])?,
            &Problem::Linear { m, k, n } => dense(device, [m, k, n]),
            &Problem::LayerNorm { m, c } => layer_norm(device, [m, c]),
            Problem::Encode(n) => {
                let judged = small(n);
                (
                    network(device, n, None, false)?,
                    beside_portable(device, move |device| network(device, &judged, None, true)),
                )
            }
            Problem::Interact(n, t) => {
                let (judged, t) = (small(n), *t);
                (
                    network(device, n, Some(t), false)?,
                    beside_portable(device, move |device| network(device, &judged, Some(t), true)),
                )
            }
            Problem::Train(n, i) => {
                let (judged, i) = (small(n), *i);
                (
                    training(device, n, i)?,
                    beside_portable(device, move |device| training(device, &judged, i)),
                )
            }
        };
        let exact = if problem.flops().is_some() { 1e-5 } else { 1e-3 };
        let tolerance = if device.is_half() { 2e-2 } else { exact };
        Ok(Prepared { device: device.clone(), run, judge, tolerance })
    }

    /// Runs the problem once, to its end.
    pub fn run(&mut self) -> Result<Tensor, OpError> {
        let out = (self.run)()?;
        if let Device::Cuda(cuda) = &self.device {
            cuda.synchronize()?;
        }
        Ok(out)
    }

    /// Runs the problem once and judges the result: its relative error (L2, over the places looked
    /// at), and the most it may be.
    pub fn check(&mut self) -> Result<[f64; 2], OpError> {
        let out = self.run()?;
        let pairs = (self.judge)(&out)?;
        let square =
            |f: fn(&(f64, f64)) -> f64| pairs.iter().map(|p| f(p).powi(2)).sum::<f64>().sqrt();
        let error =
            square(|(got, want)| got - want) / square(|(_, want)| *want).max(f64::MIN_POSITIVE);
        Ok([if error.is_nan() { f64::INFINITY } else { error }, self.tolerance])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every kind, on the kernels of this machine and the portable ones; and an oracle that sees a
    /// wrong result.
    #[test]
    fn every_kind_agrees_with_its_oracle() {
        for text in [
            "conv3d:ic3oc5d6",
            "conv3d:n2ic32oc32d16",
            "conv3d:ic4oc6d8k2s2p0",
            "upcat:ic8uc6sc5oc7d4",
            "attn:h2d8s4w0",
            "attn:h2d8s5w3",
            "xattn:h2d8q5k33",
            "linear:m9k40n17",
            "lnorm:m5c24",
        ] {
            let problem: Problem = text.parse().unwrap();
            for isa in [Isa::PORTABLE, Isa::best()] {
                let device = Device::Cpu(Cpu::with_isa(2, isa).unwrap());
                let mut prepared = Prepared::new(&device, &problem).unwrap();
                let [error, tolerance] = prepared.check().unwrap();
                assert!(error <= tolerance, "{text}, {isa}: {error}");
                let out = prepared.run().unwrap();
                let wrong = Tensor::new(out.shape(), out.data().iter().map(|v| v * 1.01).collect());
                let pairs = (prepared.judge)(&wrong).unwrap();
                assert!(
                    pairs.iter().any(|(got, want)| (got - want).abs() > 5e-3 * want.abs()),
                    "{text}: a wrong result passes"
                );
            }
        }
    }
}
