//! `train:small`, with `,i4` for a number of iterations: a training step of one item, its optimiser
//! included.

use super::judge::noise;
use super::network::{self, Network, beside_portable};
use super::{Judge, Kind, Read, Run, Task, Timed, positive, timed};
use crate::bench::scribble;
use crate::bench::step::TrainingStep;
use crate::device::{Cuda, DType, Device};
use crate::model::Config;
use crate::ops::loss::{KERNEL, Target};
use crate::tensor::{OpError, Tensor};
use std::fmt;
use std::sync::Arc;

pub(super) const KIND: Kind = Kind { form: "train:small", read };

#[derive(Debug)]
struct Train {
    network: Network,
    iterations: usize,
}

fn read(text: &str) -> Read {
    let (network, iterations) = network::read(text, "i", 2)?;
    positive(&[iterations])?;
    Ok(Arc::new(Train { network, iterations }))
}

impl fmt::Display for Train {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "train:{},i{}", self.network, self.iterations)
    }
}

impl Task for Train {
    fn prepare(&self, device: &Device) -> Result<(Run, Judge), OpError> {
        let (judged, iterations) = (self.network.judged(), self.iterations);
        let judge = beside_portable(device, move |device| run(device, judged.config(), iterations));
        Ok((run(device, self.network.config(), iterations)?, judge))
    }
}

/// The launches of a training step on a CUDA device, of a network of hashed weights.
///
/// # Errors
/// The device is out of memory, or fails.
pub fn launches(cuda: &Cuda, config: Config, iterations: usize) -> Result<Timed, OpError> {
    timed(cuda, run(&cuda.clone().into(), config, iterations)?)
}

/// A training step; returns the loss before the first one that learned, whose weights are the same
/// on every device.
fn run(device: &Device, config: Config, iterations: usize) -> Result<Run, OpError> {
    let (s, on) = (config.patch, device.for_training());
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
    let prompts = scribble(s, 5, 1);
    // A step whose gradients overflow does less than one that changes the weights: the loss scale
    // is lowered before.
    let mut first = match on.precision() {
        DType::F16 => Some(step.warm_up(&image, &target, &prompts)?.0.loss as f32),
        _ => None,
    };
    Ok(Box::new(move || {
        let (outcome, norm) = step.run(&image, &target, &prompts)?;
        // It changed no weights: it did less than the step that is to be timed.
        if !norm.is_finite() {
            let message = format!("the gradients' norm is {norm}");
            return Err(OpError::Argument { op: "training step", message });
        }
        Ok(Tensor::new([1], vec![*first.get_or_insert(outcome.loss as f32)]))
    }))
}
