//! Validation: simulated users on fixed cases, after epochs.

use super::folder::{Log, current, save_weights};
use super::{ValidationReport, Watch, any};
use crate::data::sample::Sample;
use crate::device::Device;
use crate::model::{Model, Observer};
use crate::prompt::simulate::{User, generator};
use crate::tensor::{OpError, Tensor};
use crate::train::interactive;
use crate::train::peers::Peers;
use crate::train::state::State;
use std::sync::atomic::{AtomicBool, Ordering};

/// Validates after an epoch, in process 0, unless or until it learns that the run is to stop;
/// `stopping` says that it already knows. The state, whose numbers were checked before,
/// records a validation that was not completed. All processes call this; returns whether any of
/// them was asked to stop.
pub(super) fn judge(
    device: &Device,
    state: &mut State,
    samples: &[Sample],
    peers: &Peers,
    (stopping, stop): (bool, &AtomicBool),
    log: &mut Option<Log>,
    watch: &mut dyn Watch,
) -> Result<bool, String> {
    let asked = || stopping || stop.load(Ordering::Relaxed);
    state.progress.unvalidated = false;
    if !samples.is_empty() {
        match validate(device, state, samples, &asked, watch)? {
            Some(dice) => {
                let last = dice.last().copied().unwrap_or(0.0);
                let best = state.progress.best.is_none_or(|b| last > b);
                if best {
                    state.progress.best = Some(last);
                    let path = state.progress.settings.out.join("best.safetensors");
                    save_weights(state, &path)?;
                }
                let step = state.progress.step;
                let epoch = step / state.progress.settings.steps;
                let report = ValidationReport { epoch, step, validation: dice, best };
                if let Some(log) = log {
                    log.write(&report)?;
                }
                watch.validation(&report);
            }
            None => state.progress.unvalidated = true,
        }
    }
    any(peers, asked())
}

/// Mean Dice after each iteration over fixed samples, by a fixed user: a box, ten points per
/// iteration; if the run learns from users who steer, a box, then single clicks. None if it was
/// told to stop before the last of them was begun.
fn validate(
    device: &Device,
    state: &State,
    samples: &[Sample],
    stops: &dyn Fn() -> bool,
    watch: &mut dyn Watch,
) -> Result<Option<Vec<f64>>, String> {
    let settings = &state.progress.settings;
    let model = Model::new(device, &current(state)?).map_err(|e| e.to_string())?;
    let s = model.config().patch;
    let user = User { boxed: 1.0, ..User::of_points(10) };
    let mut sums = vec![0.0; settings.validation_iterations];
    for (at, sample) in samples.iter().enumerate() {
        if stops() {
            return Ok(None);
        }
        watch.case(at + 1, samples.len());
        let fail = |e: OpError| format!("{}: {e}", sample.name);
        let image = Tensor::new([s; 3], sample.image.clone());
        let features = model.encode(&image, &mut Observer::none()).map_err(fail)?;
        let mut rng = generator(settings.seed, &[3, at as u64]);
        let see = |t: usize, logits: &[f32]| {
            sums[t] += interactive::dice(&sample.label, &interactive::mask(logits))
        };
        if settings.clicking > 0.0 {
            interactive::steer(
                device,
                &model,
                &features,
                &sample.label,
                &mut rng,
                settings.validation_iterations,
                see,
            )
            .map_err(fail)?;
            continue;
        }
        interactive::interact(
            device,
            &model,
            &features,
            &sample.label,
            &user,
            &mut rng,
            settings.validation_iterations,
            see,
        )
        .map_err(fail)?;
    }
    Ok(Some(sums.into_iter().map(|v| v / samples.len() as f64).collect()))
}
