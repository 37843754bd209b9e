//! `linear:m512k768n2304`: rows, inputs, outputs of a dense layer.

use super::judge::{dot, noise, sampled, weights, wide};
use super::{Count, Judge, Kind, Read, Run, Task, multiply_adds, numbers, positive};
use crate::device::Device;
use crate::ops::linear::{Activation, linear};
use crate::tensor::OpError;
use std::fmt;
use std::sync::Arc;

pub(super) const KIND: Kind = Kind { form: "linear:m512k768n2304", read };

#[derive(Debug)]
struct Linear {
    /// Rows.
    m: usize,
    /// Inputs.
    k: usize,
    /// Outputs.
    n: usize,
}

fn read(sizes: &str) -> Read {
    let [m, k, n] = numbers(sizes, ["m", "k", "n"], [None; 3])?;
    positive(&[m, k, n])?;
    Ok(Arc::new(Linear { m, k, n }))
}

impl fmt::Display for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Linear { m, k, n } = self;
        write!(f, "linear:m{m}k{k}n{n}")
    }
}

impl Task for Linear {
    fn count(&self) -> Option<Count> {
        let Linear { m, k, n } = *self;
        Some(Count { flops: multiply_adds(&[m, k, n]), floats: (m * k + k * n + m * n) as f64 })
    }

    fn prepare(&self, device: &Device) -> Result<(Run, Judge), OpError> {
        let Linear { m, k, n } = *self;
        let (x, w, b) = (noise(&[m, k], 1), weights(&[n, k], k, 2), noise(&[n], 3));
        let [xs, ws, bs] = [&x, &w, &b].map(wide);
        let judge = sampled(m * n, 4096, move |at| {
            bs[at % n] + dot(&xs[at / n * k..][..k], &ws[at % n * k..][..k])
        });
        let on = device.clone();
        Ok((Box::new(move || linear(&on, &x, &w, Some(&b), Activation::None, None)), judge))
    }
}
