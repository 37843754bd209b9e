//! Session cases: the whole network with hashed weights, stage by stage.

use super::{Archive, Check, VerifyError};
use crate::device::Device;
use crate::model::{Config, Features, Model, Observer, PatchPrompts, PromptMaps, Weights};
use crate::tensor::Tensor;
use std::path::Path;

/// The model of the last case, kept while cases ask for the same one.
#[derive(Default)]
pub struct Models(Option<((String, usize), Model)>);

impl Models {
    fn get(
        &mut self,
        device: &Device,
        salt: &str,
        patch: usize,
    ) -> Result<&Model, crate::tensor::OpError> {
        let key = (salt.to_string(), patch);
        if self.0.as_ref().is_none_or(|(k, _)| *k != key) {
            self.0 = None;
            let config = Config { patch, ..Config::base() };
            self.0 = Some((key, Model::new(device, &Weights::hashed(config, salt))?));
        }
        Ok(&self.0.as_ref().expect("just filled").1)
    }
}

/// Whether the reference keeps this stage channels last.
fn is_channels_last(stage: &str) -> bool {
    stage.starts_with("block") || matches!(stage, "patch_embed" | "tokens" | "masks")
}

/// PyTorch's relative error of the mask logits in float32, where a case does not record it.
const PEER_MASKS: f64 = 2.5e-6;

/// The refiner's part of an iteration.
///
/// The refiner sees a mask only through its sign, and an answer changes by more than float32
/// rounding where one voxel changes side. A voxel whose logit is smaller than four times the peer's
/// own float32 error has no side that float32 could know: the reference took one, this device may
/// take the other, and both are right. Where the plain comparison fails, it is made again with such
/// voxels on the side that agrees with the reference: a failure then says so, and with
/// `move_undecided` this second comparison is the one that counts, under the same tolerances. The
/// logits themselves are held to their own tolerance either way.
struct Refined<'a> {
    device: &'a Device,
    archive: &'a Archive,
    prefix: &'a str,
    model: &'a Model,
    features: &'a Features,
    maps: &'a Tensor,
    move_undecided: bool,
}

/// Most undecided voxels that are tried.
const MOST_UNDECIDED: usize = 64;

impl Refined<'_> {
    fn judge(&self, m: &[f32]) -> Result<Vec<Check>, VerifyError> {
        let plain = self.run(m)?;
        if plain.iter().all(Check::passed) {
            return Ok(plain);
        }
        let peer = self
            .archive
            .maybe(&format!("{}.masks.peer_f32", self.prefix))
            .and_then(|e| e.values.first().copied());
        let rms = (m.iter().map(|v| *v as f64 * *v as f64).sum::<f64>() / m.len() as f64).sqrt();
        let limit = 4.0 * peer.unwrap_or(PEER_MASKS).max(PEER_MASKS) * rms;
        let mut undecided: Vec<usize> =
            (0..m.len()).filter(|&i| (m[i].abs() as f64) < limit).collect();
        undecided.sort_by(|a, b| m[*a].abs().total_cmp(&m[*b].abs()));
        let strain =
            |checks: &[Check]| checks.iter().map(|c| (c.error / c.tolerance).powi(2)).sum::<f64>();
        let (mut best, mut decided, mut moved) = (plain.clone(), m.to_vec(), 0);
        for voxel in undecided.into_iter().take(MOST_UNDECIDED) {
            let mut other = decided.clone();
            // Not to zero, which is no side.
            other[voxel] =
                if m[voxel] > 0.0 { -m[voxel] } else { m[voxel].abs().max(f32::MIN_POSITIVE) };
            let checks = self.run(&other)?;
            if strain(&checks) < strain(&best) {
                (best, decided, moved) = (checks, other, moved + 1);
            }
            if best.iter().all(Check::passed) {
                break;
            }
        }
        if self.move_undecided {
            best.iter_mut().for_each(|c| c.note = Some(format!("{moved} undecided voxels moved")));
            return Ok(best);
        }
        let explain = |(mut check, moved_check): (Check, Check)| {
            if moved > 0 && !check.passed() && moved_check.passed() {
                let error = moved_check.error;
                check.note = Some(format!(
                    "{error:.2e} with {moved} voxels that float32 cannot decide on the reference's side"
                ));
            }
            check
        };
        Ok(plain.into_iter().zip(best).map(explain).collect())
    }

    /// Runs the refiner on `m` and compares all it gives.
    fn run(&self, m: &[f32]) -> Result<Vec<Check>, VerifyError> {
        let (mut checks, mut problem) = (vec![], None);
        let mut see = |stage: &str, value: &Tensor| match compare(
            self.device,
            self.archive,
            self.prefix,
            stage,
            value,
        ) {
            Ok(more) => checks.extend(more),
            Err(e) => problem = Some(e),
        };
        let refined = self.model.refine(self.features, m, self.maps, &mut Observer::new(&mut see));
        let refined = refined.map_err(|e| self.archive.error(e.to_string()))?;
        checks.extend(compare(self.device, self.archive, self.prefix, "refined", &refined)?);
        if let Some(problem) = problem {
            return Err(problem);
        }
        let bits = &self.archive.get(&format!("{}.mask_bits", self.prefix))?.values;
        // Voxels: of both masks, of either, wrong.
        let (mut both, mut sum, mut wrong) = (0.0, 0.0, 0.0);
        for (i, v) in values(self.archive, &refined)?.iter().enumerate() {
            let (got, want) =
                (*v > 0.0, bits.get(i / 8).map_or(2, |b| *b as u8 >> (7 - i % 8) & 1));
            both += f64::from(got && want == 1);
            sum += f64::from(got) + f64::from(want == 1);
            wrong += f64::from(u8::from(got) != want);
        }
        let name = format!("{}.mask_bits", self.prefix);
        checks.push(match self.device.is_half() {
            true => Check::within(name + " (1 - Dice)", 1.0 - 2.0 * both / sum, 5e-3),
            false => Check::within(name, wrong / refined.len() as f64, 1e-4),
        });
        Ok(checks)
    }
}

/// A result's values, copied back from where they were computed.
fn values<'a>(archive: &Archive, value: &'a Tensor) -> Result<&'a [f32], VerifyError> {
    value.try_data().map_err(|e| archive.error(e.to_string()))
}

/// Compares a stage with its samples.
fn compare(
    device: &Device,
    archive: &Archive,
    prefix: &str,
    stage: &str,
    value: &Tensor,
) -> Result<Vec<Check>, VerifyError> {
    let at = format!("{prefix}.{stage}");
    let Some(index) = archive.maybe(&format!("{at}.index")) else { return Ok(vec![]) };
    let shape: Vec<usize> =
        archive.get(&format!("{at}.shape"))?.integers().iter().map(|v| *v as usize).collect();
    values(archive, value)?;
    let value =
        if is_channels_last(stage) { value.clone() } else { value.to_channels_first(device.cpu()) };
    if value.len() != shape.iter().product::<usize>() {
        return Err(archive
            .error(format!("{at}: computed {:?}, the reference has {shape:?}", value.shape())));
    }
    let want = &archive.get(&format!("{at}.value"))?.values;
    let at_index = |i: &f64| value.data().get(*i as usize).map_or(f64::NAN, |v| *v as f64);
    let peer = archive
        .maybe(&format!("{at}.peer_f32"))
        .and_then(|e| e.values.first())
        .copied()
        .unwrap_or(0.0);
    let bound = if matches!(stage, "refined" | "error_map") { 1e-3 } else { 1e-4 };
    let norm = value.data().iter().map(|v| *v as f64 * *v as f64).sum::<f64>().sqrt();
    Ok(vec![
        Check::relative(at.clone(), index.values.iter().map(at_index), want, bound, peer),
        Check::relative(
            format!("{at}.l2"),
            std::iter::once(norm),
            &archive.get(&format!("{at}.l2"))?.values,
            bound,
            peer,
        ),
    ])
}

pub fn run(
    device: &Device,
    path: &Path,
    models: &mut Models,
    move_undecided: bool,
) -> Result<Vec<Check>, VerifyError> {
    let archive = Archive::open(path)?;
    let size = archive.number("image_size")? as usize;
    let fail = |e: crate::tensor::OpError| archive.error(e.to_string());
    if size == 0 || !size.is_multiple_of(16) || size > 512 {
        return Err(
            archive.error(format!("image_size is {size}, expected a multiple of 16, at most 512"))
        );
    }
    let scale = archive.number("image_scale")? as f32;
    let dense_scale = archive.number("dense_scale")? as f32;
    let model = models.get(device, archive.text("salt")?, size).map_err(fail)?;
    let scaled = |name: &str, scale: f32| -> Result<Tensor, VerifyError> {
        let entry = archive.get(name)?;
        if entry.shape != [size; 3] {
            return Err(
                archive.error(format!("{name} is {:?}, expected {:?}", entry.shape, [size; 3]))
            );
        }
        Ok(Tensor::new([size; 3], entry.values.iter().map(|v| *v as f32 * scale).collect()))
    };

    let mut checks = vec![];
    let mut problem = None;
    let mut watch = |prefix: &str, checks: &mut Vec<Check>, stage: &str, value: &Tensor| {
        match compare(device, &archive, prefix, stage, value) {
            Ok(more) => checks.extend(more),
            Err(e) => problem = Some(e),
        };
    };
    let image = scaled("in.image_i8", scale)?;
    let features = {
        let mut see = |stage: &str, value: &Tensor| watch("encode", &mut checks, stage, value);
        model.encode(&image, &mut Observer::new(&mut see)).map_err(fail)?
    };
    let bounds = archive
        .maybe("in.box")
        .map(|b| std::array::from_fn(|i| b.values.get(i).map_or(f32::NAN, |v| *v as f32)));
    let mut history = vec![0.0f32; size * size * size * 2];
    for t in 0..archive.number("iterations")? as usize {
        let prefix = format!("iter{t}");
        let labels =
            archive.maybe(&format!("in.labels.{t}")).map(|e| e.integers()).unwrap_or_default();
        let places =
            archive.maybe(&format!("in.points.{t}")).map(|e| e.integers()).unwrap_or_default();
        let mut points = vec![];
        for (p, label) in places.chunks_exact(3).zip(&labels) {
            if p.iter().any(|&v| v < 0 || v as usize >= size) {
                return Err(archive
                    .error(format!("in.points.{t}: voxel {p:?} lies outside {:?}", [size; 3])));
            }
            let voxel = (p[0] as usize * size + p[1] as usize) * size + p[2] as usize;
            history[voxel * 2 + usize::from(*label != 1)] = 1.0;
            points.push(([p[0] as i32, p[1] as i32, p[2] as i32], *label == 1));
        }
        let prompts = PatchPrompts { points, bounds };
        let dense = scaled(&format!("in.dense_i8.{t}"), dense_scale)?;
        let maps = Tensor::new([1, size, size, size, 2], history.clone());
        let answer = {
            // What the refiner gives is judged apart, below.
            let mut see = |stage: &str, value: &Tensor| match stage {
                "refined" | "error_map" => {}
                _ => watch(&prefix, &mut checks, stage, value),
            };
            model
                .interact(
                    &features,
                    &prompts,
                    &dense,
                    &PromptMaps::Maps(maps.clone()),
                    &mut Observer::new(&mut see),
                )
                .map_err(fail)?
        };
        if let Some(scores) = archive.maybe(&format!("{prefix}.scores")) {
            let got = answer
                .candidates
                .scores
                .try_data()
                .map_err(|e| fail(e.into()))?
                .iter()
                .map(|v| *v as f64);
            checks.push(Check::relative(
                format!("{prefix}.scores"),
                got,
                &scores.values,
                1e-4,
                0.0,
            ));
        }
        if let Some(selected) = archive.maybe(&format!("{prefix}.selected")) {
            let equal = selected.values == [answer.candidates.selected().map_err(fail)? as f64];
            checks.push(Check::exact(format!("{prefix}.selected"), equal));
        }
        let refined = Refined {
            device,
            archive: &archive,
            prefix: &prefix,
            model,
            features: &features,
            maps: &maps,
            move_undecided,
        };
        checks.extend(refined.judge(answer.candidates.selected_logits().map_err(fail)?)?);
    }
    // Every sampled stage must have been produced.
    let mut sampled = archive.names().filter_map(|n| n.strip_suffix(".index"));
    let made = |n: &str| checks.iter().any(|c| c.quantity == n);
    if let Some(name) = sampled.find(|n| !made(n)) {
        return Err(problem
            .unwrap_or_else(|| archive.error(format!("the network produced no stage '{name}'"))));
    }
    Ok(checks)
}
