//! `xattn:h8d24q60k512`: attention of `q` projected queries to `k` projected keys, heads and
//! channels of a head.

use super::judge::{dot, noise, sampled, wide};
use super::{Count, Judge, Kind, Read, Run, Task, multiply_adds, numbers, positive};
use crate::device::Device;
use crate::ops::attention::attend_heads;
use crate::tensor::OpError;
use std::fmt;
use std::sync::Arc;

pub(super) const KIND: Kind = Kind { form: "xattn:h8d24q60k512", read };

#[derive(Debug)]
struct Cross {
    /// Heads.
    h: usize,
    /// Channels of a head.
    d: usize,
    /// Queries.
    q: usize,
    /// Keys.
    k: usize,
}

fn read(sizes: &str) -> Read {
    let [h, d, q, k] = numbers(sizes, ["h", "d", "q", "k"], [None; 4])?;
    positive(&[h, d, q, k])?;
    Ok(Arc::new(Cross { h, d, q, k }))
}

impl fmt::Display for Cross {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cross { h, d, q, k } = self;
        write!(f, "xattn:h{h}d{d}q{q}k{k}")
    }
}

impl Task for Cross {
    fn count(&self) -> Option<Count> {
        let Cross { h, d, q, k } = *self;
        Some(Count {
            flops: 2.0 * multiply_adds(&[q, k, h * d]),
            floats: (2 * (q + k) * h * d) as f64,
        })
    }

    fn prepare(&self, device: &Device) -> Result<(Run, Judge), OpError> {
        let Cross { h, d, q: queries, k: keys } = *self;
        let all = h * d;
        let [q, k, v] =
            [(queries, 1), (keys, 2), (keys, 3)].map(|(rows, seed)| noise(&[rows, all], seed));
        let [qs, ks, vs] = [&q, &k, &v].map(wide);
        let judge = sampled(queries * all, 512, move |at| {
            let (row, c) = (at / all, at % all);
            let part = |x: &[f64], row: usize| x[row * all + c / d * d..][..d].to_vec();
            let own = part(&qs, row);
            let scores: Vec<f64> =
                (0..keys).map(|m| dot(&own, &part(&ks, m)) / (d as f64).sqrt()).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights = scores.iter().map(|s| (s - most).exp());
            let sum: f64 = weights.clone().sum();
            weights.enumerate().map(|(m, w)| w * vs[m * all + c]).sum::<f64>() / sum
        });
        let on = device.clone();
        Ok((Box::new(move || attend_heads(&on, h, &q, &k, &v, None)), judge))
    }
}
