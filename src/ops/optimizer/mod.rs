//! AdamW (Loshchilov and Hutter 2019) with clipping of the global gradient norm, and the moving
//! average of weights. All of it computes in float32 or more, whatever a device's precision.

mod cuda;

use crate::device::cuda::Memory;
use crate::device::simd::multiversion;
use crate::device::{Cuda, Device, DisjointWriter};
use crate::memory;
use crate::tensor::{OpError, Tensor};
use std::sync::Arc;

/// Settings of [`AdamW`].
#[derive(Clone, Copy, Debug)]
pub struct AdamWConfig {
    /// Decay rates of the first and the second moment, usually 0.9 and 0.999.
    pub betas: [f64; 2],
    /// What is added to the root of the corrected second moment.
    pub eps: f64,
    /// Decoupled weight decay: each step multiplies a parameter by `1 - lr * weight_decay`.
    pub weight_decay: f64,
    /// The global gradient norm above which gradients are scaled down.
    pub max_norm: f64,
}

/// The optimiser's state: two moments per parameter, and the number of steps taken.
pub struct AdamW {
    config: AdamWConfig,
    moments: Vec<[Tensor; 2]>,
    steps: u64,
}

/// Values of a unit of work.
const RUN: usize = 1 << 14;

/// The numbers of one step.
#[derive(Clone, Copy)]
struct Step {
    betas: [f64; 2],
    corrected: [f64; 2],
    eps: f64,
    /// The factor of gradients; a device uses its [`Limit`] instead.
    clip: f64,
    decay: f64,
    lr: f64,
}

multiversion! {
    fn update(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], s: Step) {
        let n = p.len();
        let (g, m, v) = (&g[..n], &mut m[..n], &mut v[..n]);
        let [b1, b2] = s.betas;
        for i in 0..n {
            let g = g[i] as f64 * s.clip;
            m[i] = (b1 * m[i] as f64 + (1.0 - b1) * g) as f32;
            v[i] = (b2 * v[i] as f64 + (1.0 - b2) * g * g) as f32;
            let step =
                (m[i] as f64 / s.corrected[0]) / ((v[i] as f64 / s.corrected[1]).sqrt() + s.eps);
            p[i] = (p[i] as f64 * s.decay - s.lr * step) as f32;
        }
    }
}

/// The norm of gradients, kept where it was computed.
pub struct Norm(At);

enum At {
    Here(f64),
    /// The norm's square.
    There(Cuda, Arc<Memory>),
}

impl Norm {
    /// A norm whose value is known.
    pub fn of(value: f64) -> Norm {
        Norm(At::Here(value))
    }

    /// The norm's value; a device is waited for.
    pub fn read(&self) -> Result<f64, OpError> {
        match &self.0 {
            At::Here(value) => Ok(*value),
            At::There(cuda, memory) => {
                let mut square = [0.0f64];
                cuda.download(memory, &mut square)?;
                Ok(square[0].sqrt())
            }
        }
    }

    /// The square of the norm, a double, if it is on a device and has not been read.
    pub(crate) fn square_there(&self) -> Option<&Arc<Memory>> {
        match &self.0 {
            At::Here(_) => None,
            At::There(_, memory) => Some(memory),
        }
    }

    /// The square of the norm on a device.
    fn square_on(&self, cuda: &Cuda) -> Result<Arc<Memory>, OpError> {
        match &self.0 {
            At::There(_, memory) => Ok(memory.clone()),
            At::Here(value) => Ok(cuda.upload(&[value * value])?),
        }
    }
}

/// The L2 norm of all gradients together; parameters without a gradient are left out.
pub fn global_norm(device: &Device, gradients: &[Option<&Tensor>]) -> Result<Norm, OpError> {
    let present: Vec<&Tensor> =
        gradients.iter().flatten().copied().filter(|g| !g.is_empty()).collect();
    if let (Device::Cuda(cuda), false) = (device, present.is_empty()) {
        return Ok(Norm(At::There(cuda.clone(), cuda::sum_of_squares(cuda, &present)?)));
    }
    let runs = |g: &[f32]| {
        g.chunks(RUN).map(|run| run.iter().map(|v| *v as f64 * *v as f64).sum::<f64>()).sum::<f64>()
    };
    Ok(Norm::of(present.iter().map(|g| runs(g.data())).sum::<f64>().sqrt()))
}

/// Updates exponential moving averages: `average += rate (value - average)`.
///
/// `norm` is that of the optimiser's step before this. If it is not finite nothing changes, because
/// the step changed nothing either.
///
/// # Errors
/// The lists do not fit together, or the device fails.
pub fn follow(
    device: &Device,
    averages: &mut [Tensor],
    values: &[&Tensor],
    rate: f32,
    norm: &Norm,
) -> Result<(), OpError> {
    if averages.len() != values.len()
        || averages.iter().zip(values).any(|(average, value)| average.len() != value.len())
    {
        let message = format!(
            "{} averages of {} values, or lengths that differ",
            averages.len(),
            values.len()
        );
        return Err(OpError::Argument { op: "follow", message });
    }
    if let Device::Cuda(cuda) = device {
        return cuda::follow(cuda, averages, values, rate, &norm.square_on(cuda)?);
    }
    if !norm.read()?.is_finite() {
        return Ok(());
    }
    for (average, value) in averages.iter_mut().zip(values) {
        device.cpu().chunks_mut(average.make_mut(), RUN, |unit, part| {
            let value = &value.data()[unit * RUN..][..part.len()];
            part.iter_mut().zip(value).for_each(|(a, v)| *a += rate * (v - *a));
        });
    }
    Ok(())
}

/// Moves parameters that are on the host to where the optimiser changes them: on a CUDA device, in
/// float32. On the CPU it does nothing.
///
/// Done before the first step of a run, also of a resumed one, it makes that step like all others.
pub fn upload_parameters(device: &Device, parameters: &mut [&mut Tensor]) -> Result<(), OpError> {
    let Device::Cuda(cuda) = device else { return Ok(()) };
    let mut here = parameters.iter_mut().filter(|parameter| parameter.device_type().is_none());
    here.try_for_each(|parameter| cuda::resident(cuda, parameter).map(drop))
}

impl AdamW {
    /// The state before the first step, for parameters of these lengths: moments of zero.
    pub fn new(config: AdamWConfig, lengths: &[usize]) -> AdamW {
        let zeros = |n: usize| Tensor::from(memory::zeroed::<f32>("the moments of weights", n));
        AdamW::resume(config, lengths.iter().map(|&n| [zeros(n), zeros(n)]).collect(), 0)
    }

    /// The state after `steps` steps, from the moments `[first, second]` of every parameter.
    pub fn resume(config: AdamWConfig, moments: Vec<[Tensor; 2]>, steps: u64) -> AdamW {
        AdamW { config, moments, steps }
    }

    /// The moments `[first, second]` of every parameter.
    pub fn moments(&self) -> &[[Tensor; 2]] {
        &self.moments
    }

    /// The number of steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Forgets the last step, whose norm was not finite: it changed nothing.
    pub fn take_back(&mut self) {
        self.steps = self.steps.saturating_sub(1);
    }

    /// Takes one step at learning rate `lr`.
    ///
    /// `gradients` are multiplied by `scale`, the loss scale (1 for none), and `norm` is their
    /// [`global_norm`], which is so too. They are divided by `scale`, and scaled down if their norm
    /// exceeds [`AdamWConfig::max_norm`], as PyTorch's `clip_grad_norm_` does. A parameter without
    /// a gradient stays as it is.
    ///
    /// If the norm is not finite nothing changes, but the step is counted: a device is not waited
    /// for, so that is not known yet. Once it is, the caller corrects the count by
    /// [`AdamW::take_back`].
    ///
    /// # Errors
    /// The lists do not fit together, or the device fails.
    pub fn step(
        &mut self,
        device: &Device,
        lr: f64,
        parameters: &mut [&mut Tensor],
        gradients: &[Option<&Tensor>],
        norm: &Norm,
        scale: f64,
    ) -> Result<(), OpError> {
        let fits = |i: usize, n: usize| {
            gradients[i].is_none_or(|g| g.len() == n)
                && self.moments[i].iter().all(|m| m.len() == n)
        };
        let count = self.moments.len();
        if parameters.len() != count
            || gradients.len() != count
            || !parameters.iter().enumerate().all(|(i, p)| fits(i, p.len()))
        {
            let message = format!(
                "{} gradients for {} parameters, or lengths that differ",
                gradients.len(),
                parameters.len()
            );
            return Err(OpError::Argument { op: "adamw", message });
        }
        let AdamWConfig { betas, eps, weight_decay, max_norm } = self.config;
        self.steps += 1;
        let corrected = betas.map(|b| 1.0 - b.powf(self.steps as f64));
        let mut step =
            Step { betas, corrected, eps, clip: 1.0, decay: 1.0 - lr * weight_decay, lr };
        if let Device::Cuda(cuda) = device {
            let limit = Limit { square: norm.square_on(cuda)?, max_norm, scale };
            return cuda::step(cuda, parameters, gradients, &mut self.moments, step, limit);
        }
        let norm = norm.read()?;
        if !norm.is_finite() {
            return Ok(());
        }
        step.clip = (max_norm / (norm / scale + 1e-6)).min(1.0) / scale;
        let cpu = device.cpu();
        for ((p, g), [m, v]) in parameters.iter_mut().zip(gradients).zip(&mut self.moments) {
            let Some(g) = g.map(Tensor::data) else { continue };
            let (m, v) = (DisjointWriter::new(m.make_mut()), DisjointWriter::new(v.make_mut()));
            cpu.chunks_mut(p.make_mut(), RUN, |unit, p| {
                let at = unit * RUN;
                // SAFETY: units own disjoint runs.
                let (m, v) = unsafe { (m.slice(at, p.len()), v.slice(at, p.len())) };
                update(cpu.isa(), p, &g[at..], m, v, step);
            });
        }
        Ok(())
    }
}

/// The norm by which a device clips gradients.
struct Limit {
    /// The norm's square.
    square: Arc<Memory>,
    max_norm: f64,
    scale: f64,
}

/// A linear schedule of the learning rate: a factor that goes from `start` to `end` over `steps`
/// steps, then stays.
#[derive(Clone, Copy, Debug)]
pub struct LinearSchedule {
    /// Factor at step 0.
    pub start: f64,
    /// Factor from step `steps` on.
    pub end: f64,
    /// The number of steps from `start` to `end`.
    pub steps: u64,
}

impl LinearSchedule {
    /// The factor after `step` steps.
    pub fn factor(&self, step: u64) -> f64 {
        let way = step.min(self.steps) as f64 / self.steps.max(1) as f64;
        self.start + (self.end - self.start) * way
    }
}
