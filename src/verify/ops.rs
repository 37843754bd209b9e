//! Op cases: inputs in PyTorch's layouts, brought to ours, run, brought back.

use super::{Archive, Check, VerifyError};
use crate::device::Device;
use crate::ops::attention::{TwoWayWeights, VitWeights, two_way_attention, vit_attention};
use crate::ops::conv3d::{Input, PackedConv, conv3d};
use crate::ops::decoder_stage::{DecoderStage, decoder_stage, skip_map};
use crate::ops::linear::{Activation, linear};
use crate::ops::optimizer::{AdamW, AdamWConfig, LinearSchedule};
use crate::ops::strided::{PackedTranspose, conv_transpose3d, patch_conv};
use crate::ops::{loss, norm, pointwise, position, resample};
use crate::tensor::{OpError, Tensor};
use serde_json::Value;
use std::path::Path;

const BOUND: f64 = 1e-5;

struct Case<'a> {
    device: &'a Device,
    archive: &'a Archive,
    attrs: Value,
}

/// Either the case is malformed or the op refused it.
enum Trouble {
    Case(VerifyError),
    Op(OpError),
}

impl From<VerifyError> for Trouble {
    fn from(e: VerifyError) -> Trouble {
        Trouble::Case(e)
    }
}

impl From<OpError> for Trouble {
    fn from(e: OpError) -> Trouble {
        Trouble::Op(e)
    }
}

impl Case<'_> {
    fn input(&self, name: &str) -> Result<Tensor, VerifyError> {
        Ok(self.archive.get(&format!("in.{name}"))?.tensor())
    }

    fn maybe(&self, name: &str) -> Option<Tensor> {
        self.archive.maybe(&format!("in.{name}")).map(|e| e.tensor())
    }

    /// An input map, channels last.
    fn map(&self, name: &str) -> Result<Tensor, VerifyError> {
        let t = self.input(name)?;
        if t.shape().len() < 2 {
            return Err(self.archive.error(format!("in.{name} is {:?}, expected [n, c, ...]", t.shape())));
        }
        Ok(t.to_channels_last(self.device.cpu()))
    }

    fn first(&self, t: Tensor) -> Tensor {
        t.to_channels_first(self.device.cpu())
    }

    fn number(&self, key: &str) -> Result<f64, VerifyError> {
        self.attrs[key].as_f64().ok_or_else(|| self.archive.error(format!("attribute '{key}' is missing or no number")))
    }

    fn sizes<const N: usize>(&self, key: &str) -> Result<[usize; N], VerifyError> {
        let list = self.attrs[key].as_array().map(|l| l.iter().filter_map(Value::as_u64).map(|v| v as usize).collect::<Vec<_>>());
        let list = list.and_then(|l| <[usize; N]>::try_from(l).ok());
        list.ok_or_else(|| self.archive.error(format!("attribute '{key}' is not a list of {N} sizes")))
    }

    fn pair(&self, name: &str) -> Result<(Tensor, Tensor), VerifyError> {
        Ok((self.input(&format!("{name}_weight"))?, self.input(&format!("{name}_bias"))?))
    }
}

pub fn run(device: &Device, path: &Path) -> Result<Vec<Check>, VerifyError> {
    let archive = Archive::open(path)?;
    let case = Case { device, archive: &archive, attrs: archive.json("attrs")? };
    let peers = archive.json("peer_f32")?;
    let compare = |outputs: Vec<(String, Vec<f64>)>| -> Result<Vec<Check>, VerifyError> {
        let expected = archive.names().filter(|n| n.starts_with("out.")).count();
        if expected != outputs.len() {
            return Err(archive.error(format!("the case has {expected} outputs, the op gives {}", outputs.len())));
        }
        let check = |(name, got): (String, Vec<f64>)| {
            let want = &archive.get(&name)?.values;
            let peer = peers[&name].as_f64().unwrap_or(0.0);
            let error = if got.len() == want.len() { got } else { vec![] };
            Ok(Check::relative(name, error.into_iter(), want, BOUND, peer))
        };
        outputs.into_iter().map(check).collect()
    };
    let op = archive.text("op")?;
    let result = match op {
        "adamw" => adamw(&case),
        "dice_loss" | "dice_ce_loss" | "boundary_loss" => scalar(&case, op).map(|v| vec![("out.0".to_string(), vec![v])]),
        _ => tensor(&case, op).map(|t| vec![("out.0".to_string(), t.data().iter().map(|v| *v as f64).collect())]),
    };
    match result {
        Ok(outputs) => compare(outputs),
        Err(Trouble::Case(e)) => Err(e),
        Err(Trouble::Op(e)) => Err(archive.error(e.to_string())),
    }
}

fn scalar(c: &Case, op: &str) -> Result<f64, Trouble> {
    let (logits, label) = (c.input("logits")?, c.input("label")?);
    if op == "boundary_loss" {
        return Ok(loss::boundary_loss(&logits, &label, c.sizes("kernel")?)?);
    }
    let squared = c.attrs["squared_pred"].as_bool().unwrap_or(false);
    let f = if op == "dice_loss" { loss::dice } else { loss::dice_ce };
    Ok(f(&logits, &label, squared, c.number("smooth")?)?)
}

fn tensor(c: &Case, op: &str) -> Result<Tensor, Trouble> {
    let (device, cpu) = (c.device, c.device.cpu());
    Ok(match op {
        "conv3d" => {
            let (x, w, b) = (c.map("x")?, c.input("weight")?, c.maybe("bias"));
            let (stride, padding) = (c.number("stride")? as usize, c.number("padding")? as usize);
            let edge = w.shape().last().copied().unwrap_or(0);
            let y = match (edge, stride, padding) {
                (3, 1, 1) => {
                    let inputs = w.map5("conv3d", "weight")?[1];
                    let packed = PackedConv::new(cpu, &w, 0..inputs, b.as_ref())?;
                    conv3d(device, Input::plain(&x), &packed, false)?.0
                }
                (1, 1, 0) => linear(device, &x, &w, b.as_ref(), Activation::None, None)?,
                (e, s, 0) if e == s => patch_conv(device, &x, &w, b.as_ref())?,
                _ => {
                    let message = format!("no convolution with kernel {edge}, stride {stride}, padding {padding}");
                    return Err(c.archive.error(message).into());
                }
            };
            c.first(y)
        }
        "conv_transpose3d" => {
            let weight = c.input("weight")?;
            let out = weight.shape().get(1).copied().unwrap_or(0);
            let bias = c.maybe("bias").unwrap_or_else(|| Tensor::new([out], vec![0.0; out]));
            let packed = PackedTranspose::new(&weight, &bias)?;
            c.first(conv_transpose3d(device, &c.map("x")?, &packed, None)?)
        }
        "upcat_conv" => {
            let ((deconv, deconv_bias), (conv, conv_bias)) = (c.pair("deconv")?, c.pair("conv")?);
            let stage = DecoderStage::new(device, &deconv, &deconv_bias, &conv, &conv_bias)?;
            let (x, skip) = (c.map("x")?, c.map("skip")?);
            let [n, d, h, w, _] = skip.map5("upcat_conv", "skip")?;
            let skip = skip_map(device, &stage, Some(Input::plain(&skip)), [n, d, h, w])?;
            c.first(decoder_stage(device, &stage, Input::plain(&x), &skip)?.0)
        }
        "instance_norm" | "instance_norm_leaky_relu" => {
            let x = c.map("x")?;
            let slope = if op == "instance_norm" { 1.0 } else { c.number("negative_slope")? as f32 };
            let sums = norm::sums(device, &x)?;
            let n = sums.instance_norm(&c.input("weight")?, &c.input("bias")?, c.number("eps")?, slope)?;
            c.first(norm::apply(device, &x, &n, None)?)
        }
        "layer_norm" | "layer_norm_channels_first" => {
            let (w, b, eps) = (c.input("weight")?, c.input("bias")?, c.number("eps")? as f32);
            if op == "layer_norm" {
                norm::layer_norm(device, &c.input("x")?, &w, &b, eps, false)?
            } else {
                c.first(norm::layer_norm(device, &c.map("x")?, &w, &b, eps, false)?)
            }
        }
        "linear" => {
            let (w, b) = (c.input("weight")?, c.maybe("bias"));
            linear(device, &c.input("x")?, &w, b.as_ref(), Activation::None, None)?
        }
        "gelu" => pointwise::gelu(device, &c.input("x")?),
        "sigmoid" => pointwise::sigmoid(device, &c.input("x")?),
        "softmax" => pointwise::softmax(device, &c.input("x")?)?,
        "max_pool3d" => c.first(pointwise::max_pool3d(device, &c.map("x")?)?),
        "boundary_map" => loss::boundary_map(&c.input("m")?, c.sizes("kernel")?)?,
        "interpolate" => {
            let (x, mode) = (c.map("x")?, c.attrs["mode"].as_str().unwrap_or(""));
            let y = match (mode, c.number("scale")?) {
                ("trilinear", 0.5) => resample::halve(device, &x)?,
                ("trilinear", 2.0) => resample::double(device, &x)?,
                ("nearest", 0.25) => resample::quarter(device, &x)?,
                (mode, scale) => return Err(c.archive.error(format!("no interpolation '{mode}' at scale {scale}")).into()),
            };
            c.first(y)
        }
        "dense_positional_encoding" => {
            let code = position::grid(&c.input("gaussian")?, c.sizes("size")?)?;
            let [d, h, w, width] = <[usize; 4]>::try_from(code.shape()).expect("a grid has four axes");
            c.first(code.reshape([1, d, h, w, width])).reshape([width, d, h, w])
        }
        "point_positional_encoding" => {
            let points = &c.archive.get("in.points")?.values;
            let points: Vec<[f64; 3]> = points.chunks_exact(3).map(|p| [p[0], p[1], p[2]]).collect();
            position::points(&c.input("gaussian")?, &points, c.sizes("image_size")?, c.number("shift")?)?
        }
        "two_way_attention" => {
            let heads = c.number("heads")? as usize;
            let weights = TwoWayWeights { q: c.pair("q")?, k: c.pair("k")?, v: c.pair("v")?, out: c.pair("out")?, heads };
            let (q, k, v) = (c.input("q")?, c.input("k")?, c.input("v")?);
            let batch = q.shape().first().copied().unwrap_or(0);
            if [&q, &k, &v].iter().any(|t| t.shape().len() != 3 || t.shape()[0] != batch) || q.is_empty() {
                return Err(c.archive.error(format!("q {:?}, k {:?}, v {:?}: expected [n, t, c]", q.shape(), k.shape(), v.shape())).into());
            }
            // The op takes one item at a time.
            let item = |t: &Tensor, n: usize| {
                let part = t.len() / batch;
                Tensor::new(&t.shape()[1..], t.data()[n * part..][..part].to_vec())
            };
            let mut out = vec![];
            for n in 0..batch {
                let y = two_way_attention(device, &weights, &item(&q, n), &item(&k, n), &item(&v, n), None)?;
                out.extend_from_slice(y.data());
            }
            Tensor::new([batch, q.shape()[1], out.len() / (batch * q.shape()[1])], out)
        }
        "vit_attention" => {
            let weights = VitWeights {
                qkv: c.pair("qkv")?,
                proj: c.pair("proj")?,
                rel_pos: [c.input("rel_pos_d")?, c.input("rel_pos_h")?, c.input("rel_pos_w")?],
                heads: c.number("heads")? as usize,
                window: c.number("window")? as usize,
            };
            vit_attention(device, &weights, &c.input("x")?, None)?
        }
        other => return Err(c.archive.error(format!("unknown op '{other}'")).into()),
    })
}

fn adamw(c: &Case) -> Result<Vec<(String, Vec<f64>)>, Trouble> {
    let betas = c.attrs["betas"].as_array().and_then(|b| Some([b.first()?.as_f64()?, b.get(1)?.as_f64()?]));
    let betas = betas.ok_or_else(|| c.archive.error("attribute 'betas' is not two numbers"))?;
    let config = AdamWConfig { betas, eps: c.number("eps")?, weight_decay: c.number("weight_decay")?, max_norm: c.number("max_norm")? };
    let linear = &c.attrs["schedule"]["linear"];
    let field = |key: &str| linear[key].as_f64().ok_or_else(|| c.archive.error(format!("no schedule.linear.{key}")));
    let schedule = LinearSchedule { start: field("start_factor")?, end: field("end_factor")?, steps: field("total_iters")? as u64 };
    let names: Vec<&str> = c.archive.names().filter_map(|n| n.strip_prefix("in.")).filter(|n| !n.starts_with("grad_")).collect();
    let mut values = names.iter().map(|n| Ok(c.input(n)?.data().to_vec())).collect::<Result<Vec<_>, VerifyError>>()?;
    let lengths: Vec<usize> = values.iter().map(Vec::len).collect();
    let mut optimizer = AdamW::new(config, &lengths);
    let mut outputs = vec![];
    for step in 0..c.number("steps")? as u64 {
        let gradient = |n: &&str| c.input(&format!("grad_{n}.{step}"));
        let gradients = names.iter().map(gradient).collect::<Result<Vec<_>, _>>()?;
        optimizer.step(c.number("lr")? * schedule.factor(step), &mut values, &gradients)?;
        for (n, v) in names.iter().zip(&values) {
            outputs.push((format!("out.{n}.{step}"), v.iter().map(|v| *v as f64).collect()));
        }
        outputs.push((format!("out.lr.{step}"), vec![c.number("lr")? * schedule.factor(step + 1)]));
    }
    Ok(outputs)
}
