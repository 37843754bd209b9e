//! AdamW (Loshchilov and Hutter 2019) with clipping of the global gradient norm.

use crate::tensor::{OpError, Tensor};

/// Settings of [`AdamW`].
#[derive(Clone, Copy, Debug)]
pub struct AdamWConfig {
    /// Decay rates of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The global gradient norm above which gradients are scaled down.
    pub max_norm: f64,
}

/// The optimiser's state: two moments a parameter, and how many steps were taken.
pub struct AdamW {
    config: AdamWConfig,
    moments: Vec<[Vec<f32>; 2]>,
    steps: i32,
}

impl AdamW {
    /// Zero moments for parameters of these lengths.
    pub fn new(config: AdamWConfig, lengths: &[usize]) -> AdamW {
        let moments = lengths.iter().map(|&n| [vec![0.0; n], vec![0.0; n]]).collect();
        AdamW { config, moments, steps: 0 }
    }

    /// One step at learning rate `lr`; returns the gradients' global norm before clipping.
    pub fn step(&mut self, lr: f64, parameters: &mut [Vec<f32>], gradients: &[Tensor]) -> Result<f64, OpError> {
        let given: Vec<usize> = gradients.iter().map(Tensor::len).collect();
        let wanted: Vec<usize> = self.moments.iter().map(|m| m[0].len()).collect();
        if given != wanted || parameters.iter().map(Vec::len).ne(wanted.iter().copied()) {
            let message = format!("gradients of lengths {given:?} for parameters of lengths {wanted:?}");
            return Err(OpError::Argument { op: "adamw", message });
        }
        let AdamWConfig { betas: [b1, b2], eps, weight_decay, max_norm } = self.config;
        let squares = gradients.iter().flat_map(|g| g.data()).map(|g| *g as f64 * *g as f64);
        let norm = squares.sum::<f64>().sqrt();
        let clip = (max_norm / (norm + 1e-6)).min(1.0);
        self.steps += 1;
        let corrected = [1.0 - b1.powi(self.steps), 1.0 - b2.powi(self.steps)];
        for ((p, g), [m, v]) in parameters.iter_mut().zip(gradients).zip(&mut self.moments) {
            for (((p, g), m), v) in p.iter_mut().zip(g.data()).zip(m).zip(v) {
                let g = *g as f64 * clip;
                *m = (b1 * *m as f64 + (1.0 - b1) * g) as f32;
                *v = (b2 * *v as f64 + (1.0 - b2) * g * g) as f32;
                let step = (*m as f64 / corrected[0]) / ((*v as f64 / corrected[1]).sqrt() + eps);
                *p = (*p as f64 * (1.0 - lr * weight_decay) - lr * step) as f32;
            }
        }
        Ok(norm)
    }
}

/// A learning rate that goes from `start` to `end` times the base rate over `steps` steps, then stays.
#[derive(Clone, Copy, Debug)]
pub struct LinearSchedule {
    /// Factor at step 0.
    pub start: f64,
    /// Factor from step `steps` on.
    pub end: f64,
    /// How long the way is.
    pub steps: u64,
}

impl LinearSchedule {
    /// The factor after `step` steps.
    pub fn factor(&self, step: u64) -> f64 {
        let way = step.min(self.steps) as f64 / self.steps.max(1) as f64;
        self.start + (self.end - self.start) * way
    }
}
