//! `attn:h12d64s8w14`: a ViT block's attention with projections: heads, channels of a head, edge of
//! the token grid, edge of a window, 0 for the whole grid.

use super::judge::{dot, noise, places, weights, wide};
use super::{Count, Judge, Kind, Read, Run, Task, cube, multiply_adds, numbers, positive};
use crate::device::Device;
use crate::ops::attention::{VitWeights, vit_attention};
use crate::tensor::{OpError, Param, Tensor};
use rayon::prelude::*;
use std::fmt;
use std::sync::Arc;

pub(super) const KIND: Kind = Kind { form: "attn:h12d64s8w14", read };

#[derive(Debug)]
struct Attention {
    /// Heads.
    h: usize,
    /// Channels of a head.
    d: usize,
    /// Edge of the token grid.
    s: usize,
    /// Edge of a window.
    w: usize,
}

fn read(sizes: &str) -> Read {
    let [h, d, s, w] = numbers(sizes, ["h", "d", "s", "w"], [None, None, None, Some(0)])?;
    if s > 64 || w > 64 {
        return Err("grids and windows have at most 64 tokens along an axis".into());
    }
    positive(&[h, d, s])?;
    Ok(Arc::new(Attention { h, d, s, w }))
}

impl Attention {
    /// Edge of a window, or of the whole grid.
    fn edge(&self) -> usize {
        if self.w == 0 { self.s } else { self.w }
    }
}

impl fmt::Display for Attention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Attention { h, d, s, w } = self;
        write!(f, "attn:h{h}d{d}s{s}w{w}")
    }
}

/// The result of a ViT block's attention with the released indexing for the token in row `row`,
/// with windows padded to full size.
struct Released {
    x: Vec<f64>,
    qkv: (Vec<f64>, Vec<f64>),
    proj: (Vec<f64>, Vec<f64>),
    rel: [Vec<f64>; 3],
    heads: usize,
    dim: usize,
    s: usize,
    edge: usize,
}

impl Released {
    /// q (0), k (1) or v (2) of head `h` at a position of the window that begins at `start`: the
    /// bias where it is padded.
    fn project(&self, start: [usize; 3], place: [usize; 3], which: usize, h: usize) -> Vec<f64> {
        let (dim, all) = (self.dim, self.heads * self.dim);
        let at: [usize; 3] = std::array::from_fn(|a| start[a] + place[a]);
        let row = at
            .iter()
            .all(|p| *p < self.s)
            .then(|| &self.x[((at[0] * self.s + at[1]) * self.s + at[2]) * all..][..all]);
        let first = (which * self.heads + h) * dim;
        (first..first + dim)
            .map(|o| self.qkv.1[o] + row.map_or(0.0, |x| dot(x, &self.qkv.0[o * all..][..all])))
            .collect()
    }

    /// `q . R_a[p, n]` of the table along axis `a`.
    fn relative(&self, q: &[f64], a: usize, p: usize, n: usize) -> f64 {
        dot(q, &self.rel[a][(p + self.edge - 1 - n) * self.dim..][..self.dim])
    }

    fn head(&self, start: [usize; 3], [d, h, w]: [usize; 3], head: usize) -> Vec<f64> {
        let e = self.edge;
        let own = self.project(start, [d, h, w], 0, head);
        // The released network takes its second and third terms from the queries at (d, h, kd) and
        // (d, h, kh).
        let along: Vec<Vec<f64>> =
            (0..e).map(|p| self.project(start, [d, h, p], 0, head)).collect();
        let (mut scores, mut values) = (vec![], vec![]);
        for at in 0..e * e * e {
            let (kd, kh, kw) = (at / e / e, at / e % e, at % e);
            let key = self.project(start, [kd, kh, kw], 1, head);
            let position = self.relative(&own, 0, d, kw)
                + self.relative(&along[kd], 1, h, kw)
                + self.relative(&along[kh], 2, kh, kw);
            scores.push(dot(&own, &key) / (self.dim as f64).sqrt() + position);
            values.push(self.project(start, [kd, kh, kw], 2, head));
        }
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
        let sum: f64 = weights.iter().sum();
        (0..self.dim)
            .map(|c| weights.iter().zip(&values).map(|(w, v)| w * v[c]).sum::<f64>() / sum)
            .collect()
    }

    fn row(&self, row: usize) -> Vec<f64> {
        let (s, e) = (self.s, self.edge);
        let at = [row / s / s, row / s % s, row % s];
        let start = at.map(|p| p / e * e);
        let place = std::array::from_fn(|a| at[a] - start[a]);
        let heads: Vec<f64> =
            (0..self.heads).into_par_iter().flat_map(|h| self.head(start, place, h)).collect();
        (0..heads.len())
            .map(|o| self.proj.1[o] + dot(&heads, &self.proj.0[o * heads.len()..][..heads.len()]))
            .collect()
    }
}

impl Task for Attention {
    fn count(&self) -> Option<Count> {
        let Attention { h, d, s, .. } = *self;
        // As released: windows padded to full size.
        let edge = self.edge();
        let (dim, windows, tokens) = (h * d, s.div_ceil(edge).pow(3), edge.pow(3));
        Some(Count {
            flops: multiply_adds(&[windows, tokens, dim, 4 * dim])
                + 2.0 * multiply_adds(&[windows, tokens, tokens, dim]),
            floats: 2.0 * dim as f64 * cube(s) + 4.0 * (dim as f64).powi(2),
        })
    }

    fn prepare(&self, device: &Device) -> Result<(Run, Judge), OpError> {
        let Attention { h, d, s, w } = *self;
        let (all, edge) = (h * d, self.edge());
        let x = noise(&[1, s, s, s, all], 1);
        let param = |t: Tensor| Param::new(t, 0);
        let pair = |out: usize, seed: u64| {
            (param(weights(&[out, all], all, seed)), param(noise(&[out], seed + 1)))
        };
        let rel_pos = [6, 7, 8].map(|seed| param(weights(&[2 * edge - 1, d], 4 * d, seed)));
        let vit =
            VitWeights { qkv: pair(3 * all, 2), proj: pair(all, 4), rel_pos, heads: h, window: w };
        let both = |(w, b): &(Param, Param)| (wide(w), wide(b));
        let rel = vit.rel_pos.each_ref().map(|t| wide(t));
        let released = Released {
            x: wide(&x),
            qkv: both(&vit.qkv),
            proj: both(&vit.proj),
            rel,
            heads: h,
            dim: d,
            s,
            edge,
        };
        let judge: Judge = Box::new(move |out: &Tensor| {
            let (rows, got) = (places(s * s * s, 2), out.try_data()?);
            Ok(rows
                .iter()
                .flat_map(|&r| got[r * all..][..all].iter().map(|v| *v as f64).zip(released.row(r)))
                .collect())
        });
        let on = device.clone();
        Ok((Box::new(move || vit_attention(&on, &vit, &x, None)), judge))
    }
}
