//! Gradient cases: the whole training loss of a batch over several iterations, and every
//! parameter's gradient.

use super::session::Models;
use super::{Archive, Check, VerifyError};
use crate::autograd::ParamGrads;
use crate::device::Device;
use crate::model::PatchPrompts;
use crate::ops::loss::{KERNEL, Target};
use crate::tensor::{OpError, Tensor};
use crate::train::step::{LossWeights, Outcome, Rerun, Share, run_item};
use std::path::Path;

/// Largest relative error of the loss.
const LOSS: f64 = 1e-5;
/// Largest relative error of a parameter's gradient, or four times the peer's.
const GRADIENT: f64 = 1e-4;

/// The factor of gradients in 16 bits.
const SCALE: f32 = 65536.0;

pub fn run(device: &Device, path: &Path, models: &mut Models) -> Result<Vec<Check>, VerifyError> {
    let archive = Archive::open(path)?;
    let fail = |e: OpError| archive.error(e.to_string());
    let size = archive.number("image_size")? as usize;
    if size == 0 || !size.is_multiple_of(16) || size > 512 {
        return Err(
            archive.error(format!("image_size is {size}, expected a multiple of 16, at most 512"))
        );
    }
    let images = archive.get("in.image_i8")?;
    let batch = images.shape.first().copied().unwrap_or(0);
    let voxels = size * size * size;
    let labels = archive.get("in.label")?;
    if images.shape != [batch, size, size, size] || labels.shape != images.shape || batch == 0 {
        return Err(archive.error(format!(
            "in.image_i8 {:?} and in.label {:?}: expected [n, {size}, {size}, {size}]",
            images.shape, labels.shape
        )));
    }
    let (model, _) = models.get(device, archive.text("salt")?, size).map_err(fail)?;
    let scale = archive.number("image_scale")? as f32;
    let iterations = archive.number("iterations")? as usize;
    let share = Share {
        weights: LossWeights {
            corrective_boundary: archive.number("corrective_boundary_weight")?,
            ..Default::default()
        },
        iterations,
        batch,
        recompute: Rerun::Fast,
        // Without effect in float32.
        scale: if device.is_half() { SCALE } else { 1.0 },
    };
    let list = model.config().tensors();
    let mut grads = ParamGrads::new(list.len());
    let mut outcomes: Vec<Outcome> = vec![];
    for item in 0..batch {
        let part = item * voxels..(item + 1) * voxels;
        let image = Tensor::new(
            [size; 3],
            images.values[part.clone()].iter().map(|v| *v as f32 * scale).collect(),
        );
        let label = labels.values[part].iter().map(|v| *v as f32).collect();
        let target = Target::new(device, label, [size; 3], KERNEL).map_err(fail)?;
        let mut prompts = vec![];
        for t in 0..iterations {
            prompts.push(self::prompts(&archive, item, t, size)?);
        }
        let outcome = run_item(device, model, &image, &target, share, &mut grads, |t, _| {
            Some(prompts[t].clone())
        })
        .map_err(fail)?;
        outcomes.push(outcome);
    }

    // All are copied back first: below they are values.
    for gradient in (0..list.len()).filter_map(|id| grads.tensor(id)) {
        gradient.try_data().map_err(|e| fail(e.into()))?;
    }
    let mut checks = vec![];
    let mut scalar = |name: &str, got: f64| -> Result<(), VerifyError> {
        let want = &archive.get(name)?.values;
        checks.push(Check::relative(name, std::iter::once(got), want, LOSS, 0.0));
        Ok(())
    };
    for t in 0..iterations {
        let sum = |f: &dyn Fn(&Outcome) -> f64| outcomes.iter().map(f).sum::<f64>();
        scalar(&format!("out.iter{t}.confidence_loss"), sum(&|o| o.iterations[t].confidence))?;
        scalar(&format!("out.iter{t}.corrective_loss"), sum(&|o| o.iterations[t].corrective))?;
    }
    scalar("out.loss", outcomes.iter().map(|o| o.loss).sum())?;
    let unscale = 1.0 / share.scale as f64;
    let norm = |values: &[f32]| values.iter().map(|v| (*v as f64 * unscale).powi(2)).sum::<f64>();
    let all: f64 = (0..list.len()).filter_map(|id| grads.get(id)).map(norm).sum();
    checks.push(Check::relative(
        "out.grad_norm",
        std::iter::once(all.sqrt()),
        &archive.get("out.grad_norm")?.values,
        GRADIENT,
        0.0,
    ));

    let without: Vec<String> =
        serde_json::from_str(archive.text("no_gradient")?).unwrap_or_default();
    let of = |name: &str| list.iter().position(|(n, _)| n == name).and_then(|id| grads.get(id));
    for name in &without {
        checks.push(Check::exact(format!("no gradient for {name}"), of(name).is_none()));
    }
    let sampled: Vec<&str> =
        archive.names().filter_map(|n| n.strip_prefix("grad.")?.strip_suffix(".index")).collect();
    let mut largest = 0.0f64;
    for name in &sampled {
        largest = largest.max(
            archive.get(&format!("grad.{name}.l2"))?.values.iter().copied().fold(0.0, f64::max),
        );
    }
    let mut errors = vec![];
    for name in &sampled {
        let quantity = format!("grad.{name}");
        // A candidate that is not in use depends on its parameters with gradient zero in the
        // reference, and is not computed here.
        let gradient = of(name).unwrap_or(&[]);
        let index = &archive.get(&format!("{quantity}.index"))?.values;
        let want = &archive.get(&format!("{quantity}.value"))?.values;
        let peer = archive
            .maybe(&format!("{quantity}.peer_f32"))
            .and_then(|e| e.values.first())
            .copied()
            .unwrap_or(0.0);
        let got: Vec<f64> = index
            .iter()
            .map(|i| {
                if gradient.is_empty() {
                    0.0
                } else {
                    gradient.get(*i as usize).map_or(f64::NAN, |v| *v as f64 * unscale)
                }
            })
            .collect();
        let length = norm(gradient).sqrt();
        let l2 = &archive.get(&format!("{quantity}.l2"))?.values;
        for (quantity, got, want) in
            [(quantity.clone(), got, want), (format!("{quantity}.l2"), vec![length], l2)]
        {
            let difference =
                got.iter().zip(want).map(|(g, w)| (g - w).powi(2)).sum::<f64>().sqrt() / largest;
            let check = Check::relative(quantity.clone(), got.into_iter(), want, GRADIENT, peer);
            if !quantity.ends_with(".l2") && want.iter().any(|v| *v != 0.0) {
                errors.push(check.error);
            }
            // A gradient that is zero in exact arithmetic has no relative error.
            let negligible = !check.passed() && difference < 1e-6;
            checks.push(if negligible {
                Check::within(format!("{quantity} (of the largest gradient)"), difference, 1e-6)
            } else {
                check
            });
        }
    }
    errors.sort_by(f64::total_cmp);
    if let Some(median) = errors.get(errors.len() / 2) {
        checks.push(Check {
            relative: true,
            ..Check::within(super::half::MEDIAN, *median, GRADIENT)
        });
    }
    Ok(checks)
}

/// Item `item`'s prompts of iteration `t`.
fn prompts(
    archive: &Archive,
    item: usize,
    t: usize,
    size: usize,
) -> Result<PatchPrompts, VerifyError> {
    let bounds = archive.maybe("in.box").and_then(|b| b.values.get(item * 6..item * 6 + 6));
    let bounds = bounds.map(|b| std::array::from_fn(|i| b[i] as f32));
    let (points, labels) =
        (archive.get(&format!("in.points.{t}"))?, archive.get(&format!("in.labels.{t}"))?);
    let count = labels.shape.get(1).copied().unwrap_or(0);
    let part = |v: &[f64], width: usize| {
        v.get(item * count * width..(item + 1) * count * width).map(<[f64]>::to_vec)
    };
    let both = (part(&points.values, 3), part(&labels.values, 1));
    let (Some(points), Some(labels)) = both else {
        return Err(archive.error(format!(
            "in.points.{t} {:?} and in.labels.{t} {:?} do not go together",
            points.shape, labels.shape
        )));
    };
    let voxel = |p: &[f64]| -> Result<[i32; 3], VerifyError> {
        let inside = p.iter().all(|v| *v >= 0.0 && *v < size as f64);
        let outside =
            || archive.error(format!("in.points.{t}: voxel {p:?} lies outside {:?}", [size; 3]));
        if inside { Ok([p[0] as i32, p[1] as i32, p[2] as i32]) } else { Err(outside()) }
    };
    let mut list = vec![];
    for (p, label) in points.chunks_exact(3).zip(labels) {
        list.push((voxel(p)?, label == 1.0));
    }
    Ok(PatchPrompts { points: list, bounds })
}
