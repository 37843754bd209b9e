//! Session cases: the whole network with hashed weights, stage by stage.

use super::{Archive, Check, Entry, VerifyError};
use crate::device::{DType, Device};
use crate::model::{Config, Features, Model, Observer, PatchPrompts, PromptMaps, Weights};
use crate::tensor::{Tensor, extent};
use std::collections::HashMap;
use std::path::Path;

/// The model of the last case, kept while cases ask for the same one, and the image that it last
/// encoded.
#[derive(Default)]
pub struct Models(Option<Kept>);

struct Kept {
    /// The weights' salt, the patch's edge, and what the device computes in: on a CPU that may be
    /// another type where it learns.
    key: (String, usize, DType),
    model: Model,
    encoded: Option<Encoded>,
}

impl Models {
    /// The network of the base configuration, at this patch's edge, with weights hashed from
    /// `salt`; and the place of what it encoded.
    pub(super) fn get(
        &mut self,
        device: &Device,
        salt: &str,
        patch: usize,
    ) -> Result<(&Model, &mut Option<Encoded>), crate::tensor::OpError> {
        let key = (salt.to_string(), patch, device.precision());
        if self.0.as_ref().is_none_or(|kept| kept.key != key) {
            self.0 = None;
            let config = Config { patch, ..Config::base() };
            let model = Model::new(device, &Weights::hashed(config, salt))?;
            self.0 = Some(Kept { key, model, encoded: None });
        }
        let kept = self.0.as_mut().expect("just filled");
        Ok((&kept.model, &mut kept.encoded))
    }
}

/// An image that was encoded and compared, stage by stage, with a case's samples.
pub(super) struct Encoded {
    image: Tensor,
    /// What the stages were compared with.
    samples: Vec<(String, Entry)>,
    features: Features,
    checks: Vec<Check>,
}

impl Encoded {
    fn new(
        device: &Device,
        model: &Model,
        image: Tensor,
        archive: &Archive,
    ) -> Result<Encoded, VerifyError> {
        let (mut checks, mut problem) = (vec![], None);
        let mut see =
            |stage: &str, value: &Tensor| match compare(device, archive, "encode", stage, value) {
                Ok(more) => checks.extend(more),
                Err(e) => problem = Some(e),
            };
        let features = model.encode(&image, &mut Observer::new(&mut see));
        let features = features.map_err(|e| archive.error(e.to_string()))?;
        match problem {
            Some(problem) => Err(problem),
            None => {
                let samples = samples(archive).map(|(name, e)| (name.to_string(), e.clone()));
                Ok(Encoded { image, samples: samples.collect(), features, checks })
            }
        }
    }

    /// Whether this is what a case asks for: the same image, bit for bit, and for each stage the
    /// same samples. Then encoding it anew would be the same work with the same outcome.
    fn is_of(&self, image: &Tensor, archive: &Archive) -> bool {
        let bits = |t: &Tensor| t.data().iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        bits(&self.image) == bits(image)
            && self.samples.iter().map(|(name, e)| (name.as_str(), e)).eq(samples(archive))
    }
}

/// What a case has of encoding's stages, by name.
fn samples(archive: &Archive) -> impl Iterator<Item = (&str, &Entry)> {
    let stages = archive.names().filter(|name| name.starts_with("encode."));
    stages.filter_map(move |name| Some((name, archive.maybe(name)?)))
}

/// Whether the reference keeps this stage channels last.
fn is_channels_last(stage: &str) -> bool {
    stage.starts_with("block") || matches!(stage, "patch_embed" | "tokens" | "masks")
}

/// PyTorch's relative error of the mask logits in float32, if a case does not record it.
const PEER_MASKS: f64 = 2.5e-6;

/// The refiner's part of an iteration.
///
/// The refiner sees a mask only through its sign, and an answer changes by more than float32
/// rounding if one voxel changes side. A voxel whose logit is within the peer's own float32 error
/// of 0 has no side that float32 could determine: the reference took one, this device may take the
/// other, and both are right. Such voxels are put on the reference's side before the refined answer
/// is compared, and counted: more than a few are a failure. The logits themselves are held to their
/// own tolerance in any case.
struct Refined<'a> {
    device: &'a Device,
    archive: &'a Archive,
    prefix: &'a str,
    model: &'a Model,
    features: &'a Features,
    maps: &'a Tensor,
    /// The candidate that is refined.
    selected: usize,
}

/// The distance from 0 within which float32 cannot determine the side, as a multiple of the peer's
/// error: the recorded error is the root mean square of a whole map's, of which a single voxel's
/// may be several times as large. The margin is that of every other comparison.
const MARGIN: f64 = 4.0;

/// The number of voxels of a mask of `voxels` that may be put on the reference's side.
fn most_moved(voxels: usize) -> usize {
    (voxels / 100_000).max(2)
}

/// The most voxels that are tried on the other side: each costs a run of the refiner.
const MOST_TRIED: usize = 64;

/// By how much the sum of squared errors, relative to their tolerances, falls if a voxel was on the
/// wrong side. A hundredth of a tolerance is rounding.
const CLEARLY: f64 = 1e-4;

/// The distance of results from the reference, relative to the tolerance.
fn strain(checks: &[Check]) -> f64 {
    checks.iter().map(|c| (c.error / c.tolerance).powi(2)).sum()
}

/// A logit on the other side of 0; 0 itself counts as negative.
fn other_side(logit: f32) -> f32 {
    if logit > 0.0 { -logit } else { logit.abs().max(f32::MIN_POSITIVE) }
}

/// Puts voxels of the mask `m` that are nearer to 0 than `limit` on the reference's side: the one
/// in `known`, if the case has it, otherwise the one with which what `run` computes from the mask
/// clearly agrees better. Returns the result of `run` then, and the voxels that were moved: at most
/// one more than `most`, and those that are known.
fn decide<E>(
    m: &[f32],
    limit: f64,
    known: &HashMap<usize, bool>,
    most: usize,
    mut run: impl FnMut(&[f32]) -> Result<Vec<Check>, E>,
) -> Result<(Vec<Check>, Vec<usize>), E> {
    let mut undecided: Vec<usize> =
        (0..m.len()).filter(|&i| f64::from(m[i].abs()) < limit).collect();
    undecided.sort_by(|a, b| m[*a].abs().total_cmp(&m[*b].abs()));
    let is_wrong = |v: &usize| known.get(v).is_some_and(|side| *side != (m[*v] > 0.0));
    let mut moved: Vec<usize> = undecided.iter().copied().filter(is_wrong).collect();
    let mut decided = m.to_vec();
    moved.iter().for_each(|v| decided[*v] = other_side(m[*v]));
    let mut best = run(&decided)?;
    for voxel in undecided.into_iter().filter(|v| !known.contains_key(v)).take(MOST_TRIED) {
        if moved.len() > most || strain(&best) < CLEARLY {
            break;
        }
        decided[voxel] = other_side(m[voxel]);
        let checks = run(&decided)?;
        if strain(&checks) + CLEARLY < strain(&best) {
            best = checks;
            moved.push(voxel);
        } else {
            decided[voxel] = m[voxel];
        }
    }
    Ok((best, moved))
}

impl Refined<'_> {
    fn judge(&self, m: &[f32]) -> Result<Vec<Check>, VerifyError> {
        // For rounding to fewer bits the peer's error says how much it moves.
        if self.device.products().rounds() {
            return self.run(m);
        }
        let peer = self
            .archive
            .maybe(&format!("{}.masks.peer_f32", self.prefix))
            .and_then(|e| e.values.first().copied())
            .unwrap_or(PEER_MASKS);
        let rms = (m.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / m.len() as f64).sqrt();
        let most = most_moved(m.len());
        let (mut checks, moved) =
            decide(m, MARGIN * peer * rms, &self.known(m.len()), most, |m| self.run(m))?;
        let share = |count: usize| count as f64 / m.len() as f64;
        let name = format!("{}.undecided", self.prefix);
        let mut count = Check::within(name, share(moved.len()), share(most));
        let furthest = moved.iter().map(|v| f64::from(m[*v].abs())).reduce(f64::max);
        count.note = furthest.map(|logit| {
            let (n, s) = (moved.len(), if moved.len() == 1 { "" } else { "s" });
            let off = logit / (peer * rms);
            format!("{n} undecided voxel{s} moved in {}, {off:.1} peer's errors off 0", self.prefix)
        });
        checks.push(count);
        // Arithmetic hardly ever gives exactly 0; memory that was never written does.
        let zeros = moved.iter().filter(|v| m[**v] == 0.0).count();
        let name = format!("{}.undecided.zero", self.prefix);
        checks.push(Check::within(name, share(zeros), share(1)));
        Ok(checks)
    }

    /// Voxels of the refined candidate whose side in the reference is recorded in the case.
    fn known(&self, voxels: usize) -> HashMap<usize, bool> {
        let sampled = |what: &str| {
            self.archive.maybe(&format!("{}.masks.{what}", self.prefix)).map(|e| &e.values[..])
        };
        let places = sampled("index").unwrap_or_default();
        let logits = sampled("value").unwrap_or_default();
        let of_selected = |(at, logit): (&f64, &f64)| {
            let at = *at as usize;
            (at / voxels == self.selected).then_some((at % voxels, *logit > 0.0))
        };
        places.iter().zip(logits).filter_map(of_selected).collect()
    }

    /// Runs the refiner on `m` and compares all its results.
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
        checks.push(match self.device.products().rounds() {
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
    if extent(&shape) != Some(value.len()) {
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

pub fn run(device: &Device, path: &Path, models: &mut Models) -> Result<Vec<Check>, VerifyError> {
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
    let (model, encoded) = models.get(device, archive.text("salt")?, size).map_err(fail)?;
    let scaled = |name: &str, scale: f32| -> Result<Tensor, VerifyError> {
        let entry = archive.get(name)?;
        if entry.shape != [size; 3] {
            return Err(
                archive.error(format!("{name} is {:?}, expected {:?}", entry.shape, [size; 3]))
            );
        }
        Ok(Tensor::new([size; 3], entry.values.iter().map(|v| *v as f32 * scale).collect()))
    };

    let image = scaled("in.image_i8", scale)?;
    if !encoded.as_ref().is_some_and(|e| e.is_of(&image, &archive)) {
        // First the memory of the last.
        *encoded = None;
        *encoded = Some(Encoded::new(device, model, image, &archive)?);
    }
    let Encoded { features, checks: of_encoding, .. } = encoded.as_ref().expect("just filled");
    let mut checks = of_encoding.clone();
    let mut problem = None;
    let mut watch = |prefix: &str, checks: &mut Vec<Check>, stage: &str, value: &Tensor| {
        match compare(device, &archive, prefix, stage, value) {
            Ok(more) => checks.extend(more),
            Err(e) => problem = Some(e),
        };
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
            // The refiner's results are judged separately, below.
            let mut see = |stage: &str, value: &Tensor| match stage {
                "refined" | "error_map" => {}
                _ => watch(&prefix, &mut checks, stage, value),
            };
            model
                .interact(
                    features,
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
        let chosen = answer.candidates.selected().map_err(fail)?;
        if let Some(selected) = archive.maybe(&format!("{prefix}.selected")) {
            let equal = selected.values == [chosen as f64];
            checks.push(Check::exact(format!("{prefix}.selected"), equal));
        }
        let refined = Refined {
            device,
            archive: &archive,
            prefix: &prefix,
            model,
            features,
            maps: &maps,
            selected: chosen,
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The result of [`decide`] for a mask whose reference has other signs at `wrong`: whether all
    /// comparisons pass, and what was moved. Each voxel that is still wrong costs ten times the
    /// tolerance.
    fn decided(m: &[f32], wrong: &[usize], known: &[usize], most: usize) -> (bool, Vec<usize>) {
        let side = |at: usize, logit: f32| (logit > 0.0) != wrong.contains(&at);
        let known = known.iter().map(|at| (*at, side(*at, m[*at]))).collect();
        let compare = |tried: &[f32]| -> Result<Vec<Check>, VerifyError> {
            let off = |at: &usize| (tried[*at] > 0.0) != side(*at, m[*at]);
            let errors = (0..m.len()).filter(off).count();
            Ok(vec![Check::within("refined", errors as f64, 0.1)])
        };
        let (checks, mut moved) = decide(m, 1e-5, &known, most, compare).unwrap();
        moved.sort();
        (checks.iter().all(Check::passed) && moved.len() <= most, moved)
    }

    #[test]
    fn what_float32_cannot_decide_is_put_on_the_references_side_and_nothing_else() {
        let m = [0.5, -3e-6, 2e-6, 0.0, -2e-5, 9e-6, -0.25, 4e-6];
        assert_eq!(decided(&m, &[], &[], 2), (true, vec![]));
        // Either way, and the side that 0 has.
        assert_eq!(decided(&m, &[1, 2], &[], 2), (true, vec![1, 2]));
        assert_eq!(decided(&m, &[3, 5], &[], 2), (true, vec![3, 5]));
        // As the case says, and as the answer does.
        assert_eq!(decided(&m, &[1, 7], &[1, 2], 2), (true, vec![1, 7]));
        // Beyond the bound: float32 determines the side, and was wrong.
        assert_eq!(decided(&m, &[4], &[], 2), (false, vec![]));
        assert_eq!(decided(&m, &[0, 1], &[0], 2), (false, vec![1]));
        // More than allowed, however they are found.
        assert!(!decided(&m, &[1, 2, 7], &[], 2).0);
        assert!(!decided(&m, &[1, 2, 7], &[1, 2, 7], 2).0);
        assert_eq!(decided(&m, &[1, 2, 7], &[], 3), (true, vec![1, 2, 7]));
        assert_eq!([32, 64, 128].map(|s: usize| most_moved(s.pow(3))), [2, 2, 20]);
    }

    #[test]
    fn a_difference_within_rounding_moves_nothing() {
        // Each run is slightly better than the one before: that is chance, not a side.
        let mut error = 0.05;
        let better = |_: &[f32]| -> Result<Vec<Check>, VerifyError> {
            error *= 0.999;
            Ok(vec![Check::within("refined", error, 1.0)])
        };
        let (checks, moved) =
            decide(&[1e-6, -1e-6, 1.0], 1e-5, &HashMap::new(), 2, better).unwrap();
        assert!(moved.is_empty() && checks[0].passed());
    }
}
