//! `upcat:ic32uc32sc32oc32d64`: a decoder stage's transposed convolution (`ic` to `uc` channels,
//! from edge `d` to twice that), concatenation after `sc` channels of skip feature and 3×3×3
//! convolution to `oc` channels. Only the part that an interaction computes is timed: the skip
//! feature's half is computed before.

use super::judge::{noise, sampled, split, taps, weights, wide};
use super::{Count, Judge, Kind, Read, Run, Task, cube, multiply_adds, numbers, positive};
use crate::device::Device;
use crate::ops::conv3d::ConvInput;
use crate::ops::decoder_stage::{DecoderStage, decoder_stage, skip_map};
use crate::tensor::OpError;
use std::fmt;
use std::sync::Arc;

pub(super) const KIND: Kind = Kind { form: "upcat:ic32uc32sc32oc32d64", read };

#[derive(Debug)]
struct UpCat {
    /// Channels of the coarse input.
    ic: usize,
    /// Channels after the transposed convolution.
    uc: usize,
    /// Channels of the skip feature.
    sc: usize,
    /// Output channels.
    oc: usize,
    /// Edge of the coarse input.
    d: usize,
}

fn read(sizes: &str) -> Read {
    let [ic, uc, sc, oc, d] = numbers(sizes, ["ic", "uc", "sc", "oc", "d"], [None; 5])?;
    positive(&[ic, uc, sc, oc, d])?;
    Ok(Arc::new(UpCat { ic, uc, sc, oc, d }))
}

impl fmt::Display for UpCat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let UpCat { ic, uc, sc, oc, d } = self;
        write!(f, "upcat:ic{ic}uc{uc}sc{sc}oc{oc}d{d}")
    }
}

impl Task for UpCat {
    fn count(&self) -> Option<Count> {
        let UpCat { ic, uc, oc, d, .. } = *self;
        Some(Count {
            // A transposed convolution and the 27 taps over its output.
            flops: multiply_adds(&[ic, uc, 8, d, d, d]) + multiply_adds(&[uc, oc, 27, 8, d, d, d]),
            floats: ic as f64 * cube(d)
                + 2.0 * oc as f64 * cube(2 * d)
                + (uc * (8 * ic + 27 * oc)) as f64,
        })
    }

    fn prepare(&self, device: &Device) -> Result<(Run, Judge), OpError> {
        let UpCat { ic, uc, sc, oc, d } = *self;
        let f = 2 * d;
        let (x, skip) = (noise(&[1, d, d, d, ic], 1), noise(&[1, f, f, f, sc], 2));
        let (dw, db) = (weights(&[ic, uc, 2, 2, 2], ic, 3), noise(&[uc], 4));
        let (cw, cb) = (weights(&[oc, sc + uc, 3, 3, 3], 27 * (sc + uc), 5), noise(&[oc], 6));
        let stage = DecoderStage::new(device, &dw, &db, &cw, &cb)?;
        let map = skip_map(device, &stage, Some(ConvInput::shared(&skip)), [1, f, f, f])?;
        let [xs, ss, dws, dbs, cws, cbs] = [&x, &skip, &dw, &db, &cw, &cb].map(wide);
        let judge = sampled(f * f * f * oc, 64, move |at| {
            let (_, v, o) = split(at, f, oc);
            let sum = taps(f, v, |t, p| {
                let phase = (p[0] % 2 * 2 + p[1] % 2) * 2 + p[2] % 2;
                let coarse = &xs[((p[0] / 2 * d + p[1] / 2) * d + p[2] / 2) * ic..][..ic];
                let fine = &ss[((p[0] * f + p[1]) * f + p[2]) * sc..][..sc];
                let weight = |c: usize| cws[(o * (sc + uc) + c) * 27 + t];
                let up = |c: usize| {
                    dbs[c] + (0..ic).map(|i| coarse[i] * dws[(i * uc + c) * 8 + phase]).sum::<f64>()
                };
                (0..sc).map(|c| fine[c] * weight(c)).sum::<f64>()
                    + (0..uc).map(|c| up(c) * weight(sc + c)).sum::<f64>()
            });
            sum + cbs[o]
        });
        let (on, x) = (device.clone(), ConvInput::owned(x));
        Ok((Box::new(move || Ok(decoder_stage(&on, &stage, &x, &map)?.map)), judge))
    }
}
