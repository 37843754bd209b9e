//! Op cases: inputs in PyTorch's layouts are converted to ours, run on a tape, and converted back;
//! outputs and gradients are compared.

use super::{Archive, Check, VerifyError};
use crate::autograd::{Conv, ParamGrads, Tape, TapeInput, Transpose, UpStage, Var};
use crate::device::{CudaError, Device};
use crate::ops::attention::{TwoWayWeights, VitWeights};
use crate::ops::conv3d::{ConvOutput, Epilogue};
use crate::ops::linear::Activation;
use crate::ops::loss::{self, Target, Terms};
use crate::ops::optimizer::{self, AdamW, AdamWConfig, LinearSchedule};
use crate::ops::{norm, position};
use crate::tensor::{OpError, Param, Tensor};
use serde_json::Value;
use std::path::Path;

const BOUND: f64 = 1e-5;
const GRADIENT_BOUND: f64 = 1e-4;

struct Case<'a> {
    device: &'a Device,
    archive: &'a Archive,
    attrs: Value,
    /// The names of the inputs; a parameter's number is its index here.
    names: Vec<&'a str>,
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

impl From<CudaError> for Trouble {
    fn from(e: CudaError) -> Trouble {
        Trouble::Op(e.into())
    }
}

impl Case<'_> {
    fn input(&self, name: &str) -> Result<Tensor, VerifyError> {
        Ok(self.archive.get(&format!("in.{name}"))?.tensor())
    }

    fn param(&self, name: &str) -> Result<Param, VerifyError> {
        let value = self.input(name)?;
        Ok(match self.names.iter().position(|n| *n == name) {
            Some(id) => Param::new(value, id),
            None => Param::fixed(value),
        })
    }

    fn maybe_param(&self, name: &str) -> Result<Option<Param>, VerifyError> {
        self.names.contains(&name).then(|| self.param(name)).transpose()
    }

    fn pair(&self, name: &str) -> Result<(Param, Param), VerifyError> {
        Ok((self.param(&format!("{name}_weight"))?, self.param(&format!("{name}_bias"))?))
    }

    /// An input map, channels last.
    fn map(&self, name: &str) -> Result<Tensor, VerifyError> {
        let t = self.input(name)?;
        if t.shape().len() < 2 {
            return Err(self
                .archive
                .error(format!("in.{name} is {:?}, expected [n, c, ...]", t.shape())));
        }
        Ok(t.to_channels_last(self.device.cpu()))
    }

    fn number(&self, key: &str) -> Result<f64, VerifyError> {
        self.attrs[key]
            .as_f64()
            .ok_or_else(|| self.archive.error(format!("attribute '{key}' is missing or no number")))
    }

    fn sizes<const N: usize>(&self, key: &str) -> Result<[usize; N], VerifyError> {
        let list = self.attrs[key]
            .as_array()
            .map(|l| l.iter().filter_map(Value::as_u64).map(|v| v as usize).collect::<Vec<_>>());
        let list = list.and_then(|l| <[usize; N]>::try_from(l).ok());
        list.ok_or_else(|| {
            self.archive.error(format!("attribute '{key}' is not a list of {N} sizes"))
        })
    }
}

/// The results of an op: values by name, in the reference's layouts, `out.K` and `grad_in.NAME`.
type Given = Vec<(String, Vec<f64>)>;

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| *v as f64).collect()
}

/// A tensor's values in float64.
fn wide_of(t: &Tensor) -> Result<Vec<f64>, CudaError> {
    t.try_data().map(wide)
}

pub fn run(device: &Device, path: &Path) -> Result<Vec<Check>, VerifyError> {
    let archive = Archive::open(path)?;
    let names = archive.names().filter_map(|n| n.strip_prefix("in.")).collect();
    let case = Case { device, archive: &archive, attrs: archive.json("attrs")?, names };
    let op = archive.text("op")?;
    let result = match op {
        "adamw" => adamw(&case),
        "dice_loss" | "dice_ce_loss" | "boundary_loss" => mask_loss(&case, op),
        "boundary_map" => boundary_map(&case),
        "dense_positional_encoding" | "point_positional_encoding" => position_code(&case, op),
        _ => on_tape(&case, op),
    };
    match result {
        Ok(given) => compare(&archive, given),
        Err(Trouble::Case(e)) => Err(e),
        Err(Trouble::Op(e)) => Err(archive.error(e.to_string())),
    }
}

/// Compares everything that the case expects; an output or gradient that the op did not give is a
/// failure.
fn compare(archive: &Archive, given: Given) -> Result<Vec<Check>, VerifyError> {
    let peers = archive.json("peer_f32")?;
    let mut checks = vec![];
    let norm = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>().sqrt();
    let gradients = archive.names().filter(|n| n.starts_with("grad_in."));
    let largest = gradients
        .map(|n| archive.get(n).map(|e| norm(&e.values)))
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .fold(0.0, f64::max);
    let outputs = archive.names().filter(|n| n.starts_with("out."));
    for name in outputs.chain(archive.names().filter(|n| n.starts_with("grad_in."))) {
        let want = &archive.get(name)?.values;
        let got = given.iter().find(|(n, _)| n == name).map(|(_, v)| v);
        let got = got.ok_or_else(|| archive.error(format!("the op gives no '{name}'")))?;
        let is_gradient = name.starts_with("grad_in.");
        let bound = if is_gradient { GRADIENT_BOUND } else { BOUND };
        let same = got.len() == want.len();
        let check = Check::relative(
            name,
            got.iter().copied().take(if same { got.len() } else { 0 }),
            want,
            bound,
            peers[name].as_f64().unwrap_or(0.0),
        );
        let difference =
            got.iter().zip(want).map(|(g, w)| (g - w).powi(2)).sum::<f64>().sqrt() / largest;
        // A gradient that is zero in exact arithmetic has no relative error.
        checks.push(if is_gradient && same && !check.passed() && difference < 1e-6 {
            Check::within(format!("{name} (of the largest gradient)"), difference, 1e-6)
        } else {
            check
        });
    }
    Ok(checks)
}

/// The layers that an op's parameters make up; backward functions on the tape borrow them.
enum Layer {
    None,
    Conv(Box<Conv>),
    Transpose(Transpose),
    Up(Box<UpStage>),
    TwoWay(TwoWayWeights),
    Vit(VitWeights),
    Affine(Param, Option<Param>),
}

fn layer(c: &Case, op: &str) -> Result<Layer, Trouble> {
    Ok(match op {
        "conv3d" => {
            let (weight, bias) = (c.param("weight")?, c.maybe_param("bias")?);
            match weight.shape().last() {
                Some(3) => Layer::Conv(Conv::new(c.device, weight, bias)?.into()),
                _ => Layer::Affine(weight, bias),
            }
        }
        "conv_transpose3d" => {
            let weight = c.param("weight")?;
            let out = weight.shape().get(1).copied().unwrap_or(0);
            let none = || Param::fixed(Tensor::new([out], vec![0.0; out]));
            Layer::Transpose(Transpose::new(weight, c.maybe_param("bias")?.unwrap_or_else(none))?)
        }
        "upcat_conv" => {
            let ((deconv, deconv_bias), (conv, conv_bias)) = (c.pair("deconv")?, c.pair("conv")?);
            Layer::Up(Box::new(UpStage::new(c.device, [deconv, deconv_bias], [conv, conv_bias])?))
        }
        "two_way_attention" => {
            let heads = c.number("heads")? as usize;
            Layer::TwoWay(TwoWayWeights {
                q: c.pair("q")?,
                k: c.pair("k")?,
                v: c.pair("v")?,
                out: c.pair("out")?,
                heads,
            })
        }
        "vit_attention" => Layer::Vit(VitWeights {
            qkv: c.pair("qkv")?,
            proj: c.pair("proj")?,
            rel_pos: [c.param("rel_pos_d")?, c.param("rel_pos_h")?, c.param("rel_pos_w")?],
            heads: c.number("heads")? as usize,
            window: c.number("window")? as usize,
        }),
        _ if c.names.contains(&"weight") => {
            Layer::Affine(c.param("weight")?, c.maybe_param("bias")?)
        }
        _ => Layer::None,
    })
}

/// An op's result on the tape.
struct Run {
    output: Var,
    /// Inputs whose gradients are wanted, by name.
    leaves: Vec<(&'static str, Var)>,
    /// Whether they are maps, channels last here and first in the reference.
    maps: bool,
}

fn on_tape(c: &Case, op: &str) -> Result<Given, Trouble> {
    let layer = layer(c, op)?;
    let tape = Tape::on(c.device);
    let run = record(c, op, &layer, &tape)?;
    let cpu = c.device.cpu();
    let back = |t: &Tensor| -> Result<Vec<f64>, CudaError> {
        let values = wide_of(t)?;
        if run.maps { wide_of(&t.to_channels_first(cpu)) } else { Ok(values) }
    };
    let mut given = vec![("out.0".to_string(), back(&run.output)?)];
    if c.archive.maybe("grad_out.0").is_none() {
        return Ok(given);
    }
    let seed = c.archive.get("grad_out.0")?.tensor();
    if seed.len() != run.output.len() {
        return Err(c
            .archive
            .error(format!("grad_out.0 is {:?}, the output {:?}", seed.shape(), run.output.shape()))
            .into());
    }
    let seed = if run.maps { seed.to_channels_last(cpu) } else { seed };
    let mut params = ParamGrads::new(c.names.len());
    let mut leaves = tape.backward(vec![(&run.output, seed)], &mut params)?;
    for (name, leaf) in &run.leaves {
        let gradient = leaves.take(leaf).map_or_else(|| Ok(vec![0.0; leaf.len()]), |g| back(&g))?;
        given.push((format!("grad_in.{name}"), gradient));
    }
    for (id, name) in c.names.iter().enumerate() {
        if let Some(gradient) = params.tensor(id) {
            given.push((format!("grad_in.{name}"), wide_of(gradient)?));
        }
    }
    Ok(given)
}

fn record<'m>(c: &Case, op: &str, layer: &'m Layer, tape: &Tape<'m>) -> Result<Run, Trouble> {
    let misfit = |what: &str| Trouble::Case(c.archive.error(format!("{op}: {what}")));
    let map = |name: &str| -> Result<Var, Trouble> { Ok(tape.leaf(c.map(name)?)) };
    let plain = |name: &str| -> Result<Var, Trouble> { Ok(tape.leaf(c.input(name)?)) };
    let of_maps = |output: Var, x: Var| Ok(Run { output, leaves: vec![("x", x)], maps: true });
    let of_rows = |output: Var, x: Var| Ok(Run { output, leaves: vec![("x", x)], maps: false });
    match (op, layer) {
        ("conv3d", Layer::Conv(conv)) => {
            if (c.number("stride")?, c.number("padding")?) != (1.0, 1.0) {
                return Err(misfit("a kernel of 3 runs at stride 1 and padding 1"));
            }
            let x = map("x")?;
            of_maps(tape.conv3d(TapeInput::shared(&x), conv, Epilogue::NONE)?.map, x)
        }
        ("conv3d", Layer::Affine(weight, bias)) => {
            let x = map("x")?;
            let edge = weight.shape().last().copied().unwrap_or(0);
            if (c.number("stride")?, c.number("padding")?) != (edge as f64, 0.0) {
                return Err(misfit(
                    "a kernel other than 3 runs at a stride of itself, without padding",
                ));
            }
            let y = match edge {
                1 => tape.linear(&x, weight, bias.as_ref(), Activation::None, None)?,
                _ => tape.patch_conv(&x, weight, bias.as_ref())?,
            };
            of_maps(y, x)
        }
        ("conv_transpose3d", Layer::Transpose(t)) => {
            let x = map("x")?;
            of_maps(tape.conv_transpose3d(&x, t, None)?, x)
        }
        ("upcat_conv", Layer::Up(stage)) => {
            let (x, skip) = (map("x")?, map("skip")?);
            let [n, d, h, w, _] = skip.map5("upcat_conv", "skip")?;
            let prepared = tape.skip_map(stage, Some(TapeInput::shared(&skip)), [n, d, h, w])?;
            let output = tape.decoder_stage(stage, TapeInput::shared(&x), &prepared)?.map;
            Ok(Run { output, leaves: vec![("x", x), ("skip", skip)], maps: true })
        }
        ("instance_norm" | "instance_norm_leaky_relu", Layer::Affine(weight, Some(bias))) => {
            let x = map("x")?;
            let slope =
                if op == "instance_norm" { 1.0 } else { c.number("negative_slope")? as f32 };
            let sums = Some(norm::sums(c.device, &x)?);
            let output = ConvOutput { map: x.clone(), sums, pooled: None };
            let normed = tape.instance_norm(output, weight, bias, c.number("eps")?, slope)?;
            of_maps(tape.apply(normed.into_input())?, x)
        }
        ("layer_norm", Layer::Affine(weight, Some(bias))) => {
            let x = plain("x")?;
            of_rows(tape.layer_norm(&x, weight, bias, c.number("eps")? as f32, false)?, x)
        }
        ("layer_norm_channels_first", Layer::Affine(weight, Some(bias))) => {
            let x = map("x")?;
            of_maps(tape.layer_norm(&x, weight, bias, c.number("eps")? as f32, false)?, x)
        }
        ("linear", Layer::Affine(weight, bias)) => {
            let x = plain("x")?;
            of_rows(tape.linear(&x, weight, bias.as_ref(), Activation::None, None)?, x)
        }
        ("gelu", _) => {
            let x = plain("x")?;
            of_rows(tape.gelu(&x)?, x)
        }
        ("sigmoid", _) => {
            let x = plain("x")?;
            of_rows(tape.sigmoid(&x)?, x)
        }
        ("softmax", _) => {
            let x = plain("x")?;
            of_rows(tape.softmax(&x)?, x)
        }
        ("max_pool3d", _) => {
            let x = map("x")?;
            of_maps(tape.max_pool3d(&x)?, x)
        }
        ("interpolate", _) => {
            let (x, mode) = (map("x")?, c.attrs["mode"].as_str().unwrap_or(""));
            let y = match (mode, c.number("scale")?) {
                ("trilinear", 0.5) => tape.downsample2_trilinear(&x)?,
                ("trilinear", 2.0) => tape.upsample2_trilinear(&x)?,
                ("nearest", 0.25) => tape.downsample4_nearest(&x)?,
                (mode, scale) => return Err(misfit(&format!("no mode '{mode}' at scale {scale}"))),
            };
            of_maps(y, x)
        }
        ("two_way_attention", Layer::TwoWay(weights)) => {
            let (q, k, v) = (plain("q")?, plain("k")?, plain("v")?);
            let batch = q.shape().first().copied().unwrap_or(0);
            if [&q, &k, &v].iter().any(|t| t.shape().len() != 3 || t.shape()[0] != batch)
                || q.is_empty()
            {
                return Err(misfit(&format!(
                    "q {:?}, k {:?}, v {:?}: expected [n, t, c]",
                    q.shape(),
                    k.shape(),
                    v.shape()
                )));
            }
            // The op takes one item at a time.
            let item = |t: &Var, n: usize| {
                tape.rows(&t.reshape([t.rows(), t.channels()]), n * t.shape()[1], t.shape()[1])
            };
            let each = (0..batch).map(|n| {
                tape.two_way_attention(
                    weights,
                    &item(&q, n)?,
                    (&item(&k, n)?, &item(&v, n)?, None),
                    None,
                )
            });
            let output = tape.concat(&each.collect::<Result<Vec<_>, _>>()?)?;
            Ok(Run { output, leaves: vec![("q", q), ("k", k), ("v", v)], maps: false })
        }
        ("vit_attention", Layer::Vit(weights)) => {
            let x = plain("x")?;
            of_rows(tape.vit_attention(weights, &x, None)?, x)
        }
        _ => Err(misfit("unknown op, or one without the parameters it needs")),
    }
}

fn mask_loss(c: &Case, op: &str) -> Result<Given, Trouble> {
    let (logits, label) = (c.input("logits")?, c.input("label")?);
    label.expect_shape("mask_loss", "label", logits.shape())?;
    let [n, channels, d, h, w] = logits.map5("mask_loss", "logits")?;
    let kernel = if op == "boundary_loss" { c.sizes("kernel")? } else { loss::KERNEL };
    if op != "boundary_loss" && c.number("smooth")? != loss::SMOOTH {
        return Err(c
            .archive
            .error(format!("smooth is {}, this program has {}", c.number("smooth")?, loss::SMOOTH))
            .into());
    }
    let squared = c.attrs["squared_pred"].as_bool().unwrap_or(false);
    let items = (n * channels) as f64;
    let terms = Terms { region: 1.0 / items, boundary: 0.0 };
    let (mut total, mut gradient) = (0.0, vec![]);
    let voxels = (d * h * w).max(1);
    for (x, g) in logits.data().chunks_exact(voxels).zip(label.data().chunks_exact(voxels)) {
        let target = Target::new(c.device, g.to_vec(), [d, h, w], kernel)?;
        let x = Tensor::new([1, d, h, w], x.to_vec());
        // The purpose of a loss scale: a mean's gradient is small.
        let (loss, slope) = loss::mask_losses_gradient(c.device, &x, &target, terms, 1024.0)?;
        gradient.extend(slope.try_data()?.iter().map(|v| v / 1024.0));
        total += match (op, squared) {
            ("boundary_loss", _) => loss[0].boundary,
            ("dice_loss", true) => loss[0].dice_squared,
            ("dice_loss", false) => 1.0 - loss[0].dice,
            (_, true) => loss[0].dice_squared + loss[0].cross_entropy,
            (_, false) => 1.0 - loss[0].dice + loss[0].cross_entropy,
        } / items;
    }
    let mut given = vec![("out.0".to_string(), vec![total])];
    if op == "dice_ce_loss" && squared {
        given.push(("grad_in.logits".to_string(), wide(&gradient)));
    }
    Ok(given)
}

fn boundary_map(c: &Case) -> Result<Given, Trouble> {
    let (m, kernel) = (c.input("m")?, c.sizes("kernel")?);
    let mut given =
        vec![("out.0".to_string(), wide_of(&loss::boundary_map(c.device, &m, kernel)?)?)];
    if let Some(seed) = c.archive.maybe("grad_out.0") {
        let gradient = loss::boundary_map_gradient(c.device, &m, kernel, &seed.tensor())?;
        given.push(("grad_in.m".to_string(), wide_of(&gradient)?));
    }
    Ok(given)
}

fn position_code(c: &Case, op: &str) -> Result<Given, Trouble> {
    let gaussian = c.input("gaussian")?;
    let code = if op == "dense_positional_encoding" {
        let code = position::grid(&gaussian, c.sizes("size")?)?;
        let [d, h, w, width] = <[usize; 4]>::try_from(code.shape()).expect("a grid has four axes");
        code.reshape([1, d, h, w, width]).to_channels_first(c.device.cpu())
    } else {
        let points = &c.archive.get("in.points")?.values;
        let points: Vec<[f64; 3]> = points.chunks_exact(3).map(|p| [p[0], p[1], p[2]]).collect();
        position::points(
            c.device.cpu(),
            &gaussian,
            &points,
            c.sizes("image_size")?,
            c.number("shift")?,
        )?
    };
    Ok(vec![("out.0".to_string(), wide(code.data()))])
}

fn adamw(c: &Case) -> Result<Given, Trouble> {
    let betas =
        c.attrs["betas"].as_array().and_then(|b| Some([b.first()?.as_f64()?, b.get(1)?.as_f64()?]));
    let betas = betas.ok_or_else(|| c.archive.error("attribute 'betas' is not two numbers"))?;
    let config = AdamWConfig {
        betas,
        eps: c.number("eps")?,
        weight_decay: c.number("weight_decay")?,
        max_norm: c.number("max_norm")?,
    };
    let linear = &c.attrs["schedule"]["linear"];
    let field = |key: &str| {
        linear[key].as_f64().ok_or_else(|| c.archive.error(format!("no schedule.linear.{key}")))
    };
    let schedule = LinearSchedule {
        start: field("start_factor")?,
        end: field("end_factor")?,
        steps: field("total_iters")? as u64,
    };
    let names: Vec<&str> = c
        .archive
        .names()
        .filter_map(|n| n.strip_prefix("in."))
        .filter(|n| !n.starts_with("grad_"))
        .collect();
    let mut values = names.iter().map(|n| c.input(n)).collect::<Result<Vec<_>, _>>()?;
    let lengths: Vec<usize> = values.iter().map(Tensor::len).collect();
    let mut optimizer = AdamW::new(config, &lengths);
    let mut outputs = vec![];
    for step in 0..c.number("steps")? as u64 {
        let gradient = |n: &&str| c.input(&format!("grad_{n}.{step}"));
        let gradients = names.iter().map(gradient).collect::<Result<Vec<_>, _>>()?;
        let mut parameters: Vec<&mut Tensor> = values.iter_mut().collect();
        let gradients: Vec<Option<&Tensor>> = gradients.iter().map(Some).collect();
        let norm = optimizer::global_norm(c.device, &gradients)?;
        optimizer.step(
            c.device,
            c.number("lr")? * schedule.factor(step),
            &mut parameters,
            &gradients,
            &norm,
            1.0,
        )?;
        for (n, v) in names.iter().zip(&values) {
            outputs.push((format!("out.{n}.{step}"), wide_of(v)?));
        }
        outputs.push((format!("out.lr.{step}"), vec![c.number("lr")? * schedule.factor(step + 1)]));
    }
    Ok(outputs)
}
