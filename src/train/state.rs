//! The state that a run needs to resume as if it had never stopped: weights, moments, the moving
//! average, and its position.
//!
//! It is one safetensors file with a checksum, written whole or not at all.

use super::settings::Settings;
use crate::checksum;
use crate::input::{MOST_HEADER, room_for_header};
use crate::memory;
use crate::model::{Config, Weights};
use crate::ops::optimizer::AdamW;
use crate::output::write_tensors;
use crate::tensor::Tensor;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;

/// The position of a run. Everything random is a function of the seed and the step, so the step is
/// the generator's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// The number of steps done.
    pub step: usize,
    /// The best Dice of a validation's last iteration so far; none before the first validation.
    pub best: Option<f64>,
    /// The number of steps that the optimiser took: without those whose gradients overflowed.
    pub optimizer_steps: u64,
    /// The loss scale, the factor of gradients on a device that keeps them as f16, and the number
    /// of steps since it last changed.
    #[serde(default = "scaling")]
    pub scaling: (f32, u32),
    /// Whether the validation that follows these steps was interrupted: a resumed run begins with
    /// it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unvalidated: bool,
    /// The run's settings.
    pub settings: Settings,
    /// The network's configuration.
    pub config: Config,
}

/// The most steps since the loss scale last changed: it changes far more often.
const MOST_UNCHANGED: u32 = 1 << 20;

impl Progress {
    /// Checks that a run can have reached this position.
    ///
    /// # Errors
    /// A number is out of its range; the message names it.
    pub fn check(&self) -> Result<(), String> {
        self.config.check().map_err(|e| e.to_string())?;
        self.settings.check()?;
        let total = self.settings.total_steps();
        if self.step > total {
            return Err(format!("step is {}, expected at most {total}", self.step));
        }
        if self.optimizer_steps > self.step as u64 {
            return Err(format!(
                "optimizer_steps is {}, expected at most {}",
                self.optimizer_steps, self.step
            ));
        }
        let ends_epoch = self.step > 0 && self.step.is_multiple_of(self.settings.steps);
        if self.unvalidated && !ends_epoch {
            return Err(format!(
                "unvalidated is true after {} steps, expected that at the end of an epoch of {} alone",
                self.step, self.settings.steps
            ));
        }
        let (scale, unchanged) = self.scaling;
        if !(scale > 0.0 && scale.is_finite() && unchanged <= MOST_UNCHANGED) {
            return Err(format!(
                "scaling is a factor of {scale} for {unchanged} steps, expected a factor above 0 and at most {MOST_UNCHANGED} steps"
            ));
        }
        Ok(())
    }
}

/// The initial value of [`Progress::scaling`]: a loss scale of 2^16, which lifts the gradients of a
/// mean over a patch into the range of f16, and no steps.
pub fn scaling() -> (f32, u32) {
    (65536.0, 0)
}

/// The message for a number that is not kept, by the name of its tensor.
fn diverged(tensor: &str, at: usize, value: f32) -> String {
    format!(
        "{tensor} is {value} at element {at}: the training has diverged, so nothing was saved, and what was saved before is unchanged. A lower --lr may help"
    )
}

/// The state of a run, in memory.
pub struct State {
    /// The position of the run.
    pub progress: Progress,
    /// The weights.
    pub weights: Weights,
    /// The optimiser, with its moments.
    pub optimizer: AdamW,
    /// The moving average of the weights, in the order of [`Config::tensors`], if the settings have
    /// one.
    pub average: Option<Vec<Tensor>>,
}

/// The index of the first value that a tensor of a state cannot have: one that is no finite number,
/// or a second moment, a sum of squares, that is below 0.
fn impossible(kind: &str, values: &[f32]) -> Option<usize> {
    values.iter().position(|v| !v.is_finite() || kind == "second" && *v < 0.0)
}

const KEY: &str = "prism.training";
/// The name of a state in refusals of memory.
const STATE: &str = "the state of a training";
/// A state's header may be so many times as long as a model's: it lists weights, two kinds of
/// moments and averages, under longer names, and the settings.
const LONGER: u64 = 8;

impl State {
    /// Checks every number, as [`State::open`] does: a state that fails this could not be opened
    /// again.
    ///
    /// # Errors
    /// A weight, a moment or an average is not a finite number, or a second moment is below 0; the
    /// message names the tensor. Or values cannot be copied from a device.
    pub fn check_numbers(&self) -> Result<(), String> {
        for (id, (name, _)) in self.progress.config.tensors().iter().enumerate() {
            let weight = self.weights.get(name);
            let [first, second] = &self.optimizer.moments()[id];
            let average = self.average.as_ref().map(|all| ("average", &all[id]));
            let own = [("weight", &*weight), ("first", first), ("second", second)];
            for (kind, tensor) in own.into_iter().chain(average) {
                let values = tensor.try_data().map_err(|e| e.to_string())?;
                if let Some(at) = impossible(kind, values) {
                    return Err(diverged(&format!("{kind}/{name}"), at, values[at]));
                }
            }
        }
        Ok(())
    }

    /// Writes the state to a file, whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written, values cannot be copied from a device, or one is refused by
    /// [`State::check_numbers`]; the message names the file.
    pub fn save(&self, path: &Path) -> Result<(), String> {
        self.check_numbers().map_err(|e| format!("{}: {e}", path.display()))?;
        self.write(path)
    }

    /// [`State::save`] without that check, for a caller that has made it.
    pub(super) fn write(&self, path: &Path) -> Result<(), String> {
        let fail = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let list = self.progress.config.tensors();
        let mut parts: Vec<(String, Vec<usize>, &[f32])> = vec![];
        let params: Vec<_> = list.iter().map(|(name, _)| self.weights.get(name)).collect();
        for (id, (name, shape)) in list.iter().enumerate() {
            parts.push((
                format!("weight/{name}"),
                shape.clone(),
                params[id].try_data().map_err(|e| fail(&e))?,
            ));
            let [m, v] = &self.optimizer.moments()[id];
            parts.push((
                format!("first/{name}"),
                shape.clone(),
                m.try_data().map_err(|e| fail(&e))?,
            ));
            parts.push((
                format!("second/{name}"),
                shape.clone(),
                v.try_data().map_err(|e| fail(&e))?,
            ));
            if let Some(average) = &self.average {
                parts.push((
                    format!("average/{name}"),
                    shape.clone(),
                    average[id].try_data().map_err(|e| fail(&e))?,
                ));
            }
        }
        let mut views = vec![];
        for (name, shape, values) in parts {
            views.push((
                name,
                TensorView::new(Dtype::F32, shape, bytemuck::cast_slice(values))
                    .map_err(|e| fail(&e))?,
            ));
        }
        let about = serde_json::to_string(&self.progress).map_err(|e| fail(&e))?;
        let hashes =
            views.iter().map(|(name, view)| (name.as_str(), checksum::of_bytes(view.data())));
        let about = checksum::sealed(&about, hashes);
        write_tensors(path, KEY, about, views).map_err(|e| fail(&e))
    }

    /// Reads a state that [`State::save`] wrote.
    ///
    /// # Errors
    /// The file cannot be read, or is not a state that a run can have written.
    pub fn open(path: &Path) -> Result<State, String> {
        let fail = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let bytes = memory::read_file(STATE, path).map_err(|e| fail(&e))?;
        room_for_header(STATE, &bytes, LONGER * MOST_HEADER)
            .map_err(|e| fail(&e))?
            .map_err(|e| fail(&e))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| fail(&e))?;
        let text = header
            .metadata()
            .as_ref()
            .and_then(|m| m.get(KEY))
            .ok_or_else(|| fail(&"not the state of a training run"))?;
        let (text, hash) = checksum::opened(text);
        let progress: Progress =
            serde_json::from_str(&text).map_err(|e| fail(&format!("unreadable state: {e}")))?;
        progress.check().map_err(|e| fail(&e))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| fail(&e))?;
        if let Some(hash) = hash {
            checksum::check(&text, hash, checksum::of_tensors(&file)).map_err(|e| fail(&e))?;
        }
        let read = |kind: &str, name: &str, shape: &[usize]| -> Result<Vec<f32>, String> {
            let full = format!("{kind}/{name}");
            let view = file.tensor(&full).map_err(|e| fail(&format!("{full}: {e}")))?;
            if view.dtype() != Dtype::F32 || view.shape() != shape {
                return Err(fail(&format!(
                    "{full} is {} {:?}, expected F32 {shape:?}",
                    view.dtype(),
                    view.shape()
                )));
            }
            let mut values = memory::zeroed::<f32>(STATE, view.data().len() / 4);
            bytemuck::cast_slice_mut(&mut values).copy_from_slice(view.data());
            match impossible(kind, &values) {
                Some(at) => Err(fail(&format!("{full} holds {} at element {at}", values[at]))),
                None => Ok(values),
            }
        };
        let list = progress.config.tensors();
        let (mut tensors, mut moments, mut average) = (HashMap::new(), vec![], vec![]);
        for (name, shape) in &list {
            tensors.insert(name.clone(), Tensor::new(shape.clone(), read("weight", name, shape)?));
            moments.push([read("first", name, shape)?.into(), read("second", name, shape)?.into()]);
            if progress.settings.ema > 0.0 {
                average.push(Tensor::new(shape.clone(), read("average", name, shape)?));
            }
        }
        let weights = Weights::from_tensors(progress.config.clone(), tensors)
            .map_err(|e| fail(&format!("the tensors do not fit{e}")))?;
        let optimizer =
            AdamW::resume(progress.settings.optimizer(), moments, progress.optimizer_steps);
        let average = (progress.settings.ema > 0.0).then_some(average);
        Ok(State { progress, weights, optimizer, average })
    }
}
