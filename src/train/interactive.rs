//! An item corrected by a simulated user, without gradients: what validation and evaluation
//! measure.

use super::clicker::Clicker;
use crate::device::Device;
use crate::model::{Features, Model, Observer, PatchPrompts, prompt_maps};
use crate::prompt::simulate::{Errors, User};
use crate::tensor::{OpError, Tensor};
use rand::Rng;

/// The Dice coefficient of two masks of the same size, set where they are not 0; 1 if both are
/// empty.
pub fn dice(a: &[u8], b: &[u8]) -> f64 {
    let (mut both, mut total) = (0u64, 0u64);
    for (a, b) in a.iter().zip(b) {
        let (a, b) = (u64::from(*a != 0), u64::from(*b != 0));
        both += a & b;
        total += a + b;
    }
    if total == 0 { 1.0 } else { 2.0 * both as f64 / total as f64 }
}

/// The mask of logits: 1 where they are positive, otherwise 0.
pub fn mask(logits: &[f32]) -> Vec<u8> {
    crate::memory::collected("a mask", logits.iter().map(|v| u8::from(*v > 0.0)))
}

/// Lets the paper's simulated user correct an encoded patch for a number of iterations.
///
/// `label` is the object, 0 or 1 in each voxel of the patch. `see(iteration, logits)` is called
/// with the answer after each iteration, from 0. When nothing is left to correct, the answer stays.
///
/// # Errors
/// Those of [`Model::interact`].
#[allow(clippy::too_many_arguments)]
pub fn interact(
    device: &Device,
    model: &Model,
    features: &Features,
    label: &[u8],
    user: &User,
    rng: &mut (impl Rng + Send),
    iterations: usize,
    mut see: impl FnMut(usize, &[f32]),
) -> Result<(), OpError> {
    let s = model.config().patch;
    let size = [s; 3];
    let bounds = user.bounds(rng, label, size).map(|b| b.map(|v| v as f32));
    let mut history = vec![];
    let mut answer: Option<Tensor> = None;
    for t in 0..iterations {
        let previous = answer.as_ref().map(|a| a.try_data().map(mask)).transpose()?;
        let errors = Errors::of(label, previous.as_deref());
        if let (true, Some(answer)) = (errors.is_empty(), &answer) {
            see(t, answer.try_data()?);
            continue;
        }
        let points = device.cpu().run(|| user.correct(rng, &errors, size));
        history.extend_from_slice(&points);
        let maps = prompt_maps(device, s, &history);
        let dense = answer
            .take()
            .unwrap_or_else(|| Tensor::from_buffer([1, s, s, s, 1], device.cpu().zeros(s * s * s)));
        let given = PatchPrompts { points, bounds };
        let result = model.interact(features, &given, &dense, &maps, &mut Observer::none())?;
        let logits = result.logits.value().clone();
        see(t, logits.try_data()?);
        answer = Some(logits);
    }
    Ok(())
}

/// Lets a user who steers ([`Clicker::exact`]) correct an encoded patch for a number of iterations:
/// with the object's box, then a click in the middle of the largest error at a time.
///
/// All prompts are kept, and answers are as a session makes them. `label` is the object, 0 or 1 in
/// each voxel of the patch; `see(iteration, logits)` is called with the answer after each
/// iteration, from 0.
///
/// # Errors
/// Those of [`Model::interact`].
pub fn steer(
    device: &Device,
    model: &Model,
    features: &Features,
    label: &[u8],
    rng: &mut impl Rng,
    iterations: usize,
    mut see: impl FnMut(usize, &[f32]),
) -> Result<(), OpError> {
    let s = model.config().patch;
    let mut clicker = Clicker::exact(label, s, model.config().click_radius);
    let mut answer: Option<Tensor> = None;
    for t in 0..iterations {
        let round = clicker.give(rng, t, answer.as_ref().map(Tensor::try_data).transpose()?);
        let maps = prompt_maps(device, s, &round.marks.unwrap_or_default());
        let dense = round.dense.map_or_else(
            || Tensor::from_buffer([1, s, s, s, 1], device.cpu().zeros(s * s * s)),
            |d| Tensor::new([1, s, s, s, 1], d),
        );
        let result =
            model.interact(features, &round.prompts, &dense, &maps, &mut Observer::none())?;
        let logits = result.logits.value().clone();
        see(t, &clicker.settle(logits.try_data()?));
        answer = Some(logits);
    }
    Ok(())
}
