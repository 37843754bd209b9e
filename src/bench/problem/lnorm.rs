//! `lnorm:m512c768`: layer norm of rows.

use super::judge::{noise, sampled, wide};
use super::{Count, Judge, Kind, Read, Run, Task, numbers, positive};
use crate::device::Device;
use crate::ops::norm;
use crate::tensor::OpError;
use std::fmt;
use std::sync::Arc;

pub(super) const KIND: Kind = Kind { form: "lnorm:m512c768", read };

#[derive(Debug)]
struct LayerNorm {
    /// Rows.
    m: usize,
    /// Channels.
    c: usize,
}

fn read(sizes: &str) -> Read {
    let [m, c] = numbers(sizes, ["m", "c"], [None; 2])?;
    positive(&[m, c])?;
    Ok(Arc::new(LayerNorm { m, c }))
}

impl fmt::Display for LayerNorm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LayerNorm { m, c } = self;
        write!(f, "lnorm:m{m}c{c}")
    }
}

impl Task for LayerNorm {
    fn count(&self) -> Option<Count> {
        let LayerNorm { m, c } = *self;
        Some(Count { flops: 8.0 * (m * c) as f64, floats: 2.0 * (m * c) as f64 })
    }

    fn prepare(&self, device: &Device) -> Result<(Run, Judge), OpError> {
        let LayerNorm { m, c } = *self;
        let (x, w, b) = (noise(&[m, c], 1), noise(&[c], 2), noise(&[c], 3));
        let [xs, ws, bs] = [&x, &w, &b].map(wide);
        let judge = sampled(m * c, 1024, move |at| {
            let row = &xs[at / c * c..][..c];
            let mean = row.iter().sum::<f64>() / c as f64;
            let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / c as f64;
            (xs[at] - mean) / (variance + 1e-6).sqrt() * ws[at % c] + bs[at % c]
        });
        let on = device.clone();
        Ok((Box::new(move || norm::layer_norm(&on, &x, &w, &b, 1e-6, false)), judge))
    }
}
