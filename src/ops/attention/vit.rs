//! The image encoder's attention: windows over a cubic token grid, the released network's relative positions, and the padded tokens
//! of a window in closed form.
//!
//! With window edge `w`, `R_a[p, n] = rel_pos_a[p - n + w - 1]`, query `(d, h, x)` and key `(kd, kh, kw)`, the score is
//! `scale q·k + A[kw] + B[kd, kw] + C[kh, kw]` where `A[kw] = q[d,h,x]·R_d[d,kw]`, `B[p, kw] = q[d,h,p]·R_h[h,kw]` and
//! `C[p, kw] = q[d,h,p]·R_w[p,kw]`. Positions beyond the grid hold zeros after the norm, so there q, k and v are the bias: all padded
//! keys share one k and one v, and together weigh `exp(scale q·b_k) Σ exp(A + B + C)` over the padded positions. That sum factors
//! for each kw into sums over p; split into inside and padded parts it needs no subtraction, so nothing cancels.

use super::core::Rows;
use super::flash::{self, Layout, QUERIES, Running, Scores, lay_out};
use crate::device::cpu::Shared;
use crate::device::profile::Work;
use crate::device::simd::{self, multiversion};
use crate::device::{Cpu, Device};
use crate::ops::linear::{Activation, linear};
use crate::tensor::{OpError, Param, Tensor};

/// Weights of one attention layer.
#[derive(Clone)]
pub struct VitWeights {
    /// `[3 * dim, dim]`, q then k then v, heads inside.
    pub qkv: (Param, Param),
    /// `[dim, dim]`.
    pub proj: (Param, Param),
    /// `[2 * window - 1, head dim]` along d, h and w.
    pub rel_pos: [Param; 3],
    /// Heads.
    pub heads: usize,
    /// Window edge; 0 attends over the whole grid.
    pub window: usize,
}

/// The attention between its projections. Rows are in window order, on a CUDA device in the grid's.
pub struct Attended {
    /// `[n * s³, 3 * dim]`.
    pub qkv: Tensor,
    /// `[n * s³, dim]`.
    pub heads: Tensor,
    pub(super) windows: Windows,
    /// Whether rows are in the grid's order.
    pub(super) gridded: bool,
}

impl Attended {
    /// Brings rows `[n * s³, c]` from its order to the grid's.
    pub fn to_grid(&self, rows: Tensor) -> Tensor {
        if self.gridded || self.windows.order.is_empty() { rows } else { self.windows.scatter(&rows) }
    }

    /// Brings rows `[n * s³, c]` from the grid's order to its own.
    pub fn from_grid(&self, rows: &Tensor) -> Tensor {
        if self.gridded { rows.clone() } else { self.windows.gather(rows).unwrap_or_else(|| rows.clone()) }
    }
}

/// Projects `x` `[n, s, s, s, dim]` and attends within windows, before the output projection.
pub fn attend_windows(device: &Device, w: &VitWeights, x: &Tensor) -> Result<Attended, OpError> {
    const OP: &str = "vit_attention";
    let [n, s, h, d, dim] = x.map5(OP, "x")?;
    if s != h || s != d || s == 0 {
        return Err(x.misfit(OP, "x", "[n, s, s, s, dim], a cubic grid"));
    }
    if w.heads == 0 || dim % w.heads != 0 {
        return Err(x.misfit(OP, "x", format!("[.., dim], a multiple of {} heads", w.heads)));
    }
    let edge = if w.window == 0 { s } else { w.window };
    for table in &w.rel_pos {
        table.expect(OP, "rel_pos", &[2 * edge - 1, dim / w.heads])?;
    }
    w.qkv.0.expect(OP, "qkv weight", &[3 * dim, dim])?;
    if let Device::Cuda(cuda) = device {
        return super::cuda::attend_windows(cuda, w, x, edge);
    }
    if edge.min(s) > QUERIES {
        return Err(x.misfit(OP, "x", format!("windows of at most {QUERIES} tokens along an axis")));
    }
    let windows = Windows::new(n, s, edge);
    let rows = x.reshape([n * s * s * s, dim]);
    let ordered = windows.gather(&rows).unwrap_or(rows);
    let qkv = linear(device, &ordered, &w.qkv.0, Some(&w.qkv.1), Activation::None, None)?;
    let heads = on_cpu(device.cpu(), w, &windows, &qkv, dim);
    Ok(Attended { qkv, heads, windows, gridded: false })
}

/// `x` `[n, s, s, s, dim]` to the same shape, plus `residual` where given.
pub fn vit_attention(device: &Device, w: &VitWeights, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor, OpError> {
    let attended = attend_windows(device, w, x)?;
    let heads = attended.to_grid(attended.heads.clone());
    linear(device, &heads.reshape(x.shape()), &w.proj.0, Some(&w.proj.1), Activation::None, residual)
}

/// The grid's tokens in window order.
pub struct Windows {
    pub edge: usize,
    /// Grids, and the tokens of each along an axis.
    pub items: usize,
    pub s: usize,
    /// First row and extent inside the grid of each window.
    pub list: Vec<(usize, [usize; 3])>,
    /// The grid row of each window-ordered row; empty when the order is the grid's own.
    order: Vec<usize>,
}

impl Windows {
    /// The windows in which rows in the grid's own order are taken: the whole grid's is one.
    pub fn new(n: usize, s: usize, edge: usize) -> Windows {
        let across = s.div_ceil(edge);
        let (mut list, mut order) = (vec![], vec![]);
        for item in 0..n {
            for cell in 0..across.pow(3) {
                let start = [cell / across / across, cell / across % across, cell % across].map(|c| c * edge);
                let extent = start.map(|c| edge.min(s - c));
                list.push((order.len(), extent));
                for i in 0..extent[0] {
                    for j in 0..extent[1] {
                        for k in 0..extent[2] {
                            order.push(((item * s + start[0] + i) * s + start[1] + j) * s + start[2] + k);
                        }
                    }
                }
            }
        }
        if across == 1 {
            order.clear();
        }
        Windows { edge, items: n, s, list, order }
    }

    /// Rows in window order; none where that is the grid's.
    pub fn gather(&self, x: &Tensor) -> Option<Tensor> {
        let c = x.channels();
        let rows = self.order.iter().flat_map(|&r| &x.data()[r * c..][..c]);
        (!self.order.is_empty()).then(|| Tensor::new(x.shape(), rows.copied().collect()))
    }

    fn scatter(&self, x: &Tensor) -> Tensor {
        let c = x.channels();
        let mut out = vec![0.0; x.len()];
        for (from, &to) in x.data().chunks_exact(c).zip(&self.order) {
            out[to * c..][..c].copy_from_slice(from);
        }
        Tensor::new(x.shape(), out)
    }
}

multiversion! {
    /// `out[i][j] = a_i · table_j` for rows of `dim` values.
    pub(super) fn dots(a: &[f32], table: &[f32], dim: usize, out: &mut [f32]) {
        let across = table.len() / dim;
        for (a, out) in a.chunks_exact(dim).zip(out.chunks_exact_mut(across)) {
            for (t, out) in table.chunks_exact(dim).zip(out) {
                let mut lanes = [0.0f32; 8];
                let whole = dim / 8 * 8;
                for (a, t) in a[..whole].chunks_exact(8).zip(t[..whole].chunks_exact(8)) {
                    for i in 0..8 {
                        lanes[i] += a[i] * t[i];
                    }
                }
                let rest: f32 = a[whole..].iter().zip(&t[whole..]).map(|(a, t)| a * t).sum();
                *out = rest + lanes.iter().sum::<f32>();
            }
        }
    }
}

multiversion! {
    /// `B[kd, kw] + C[kh, kw]` for every key `(kd, kh, kw)` of a window, minus infinity behind the last: what the queries of one `(d, h)` share.
    pub(super) fn shared_positions(b: &[f32], c: &[f32], edge: usize, extent: [usize; 3], out: &mut [f32]) {
        let keys = extent[0] * extent[1] * extent[2];
        for (row, out) in out[..keys].chunks_exact_mut(extent[2]).enumerate() {
            let (b, c) = (&b[row / extent[1] * edge..][..extent[2]], &c[row % extent[1] * edge..][..extent[2]]);
            for i in 0..extent[2] {
                out[i] = b[i] + c[i];
            }
        }
        out[keys..].fill(f32::NEG_INFINITY);
    }
}

multiversion! {
    /// `scale s + shared[key] + own[key % period]` for a query's scores of one block of keys; `own` is repeated as often as it takes.
    fn finish_scores(scores: &mut [f32], scale: f32, shared: &[f32], own: &[f32]) {
        let n = scores.len();
        let (shared, own) = (&shared[..n], &own[..n]);
        for i in 0..n {
            scores[i] = scale * scores[i] + (shared[i] + own[i]);
        }
    }
}

multiversion! {
    /// For each kw, the logarithm of the summed `exp(B + C)` over the padded positions of a window; minus infinity where there are none.
    pub(super) fn padded_log_weight(b: &[f32], c: &[f32], edge: usize, extent: [usize; 3], out: &mut [f32]) {
        // Sixteen columns at a time.
        for first in (0..edge).step_by(16) {
            let n = (edge - first).min(16);
            let mut tops = [[f32::NEG_INFINITY; 16]; 2];
            let [mut inside, mut outside] = [[[0.0f64; 16]; 2]; 2];
            for (of, t) in [b, c].into_iter().enumerate() {
                let top = &mut tops[of];
                for p in 0..edge {
                    let row = &t[p * edge + first..][..n];
                    for i in 0..n {
                        top[i] = top[i].max(row[i]);
                    }
                }
                for p in 0..edge {
                    let mut away = [f32::NEG_INFINITY; 16];
                    away[..n].copy_from_slice(&t[p * edge + first..][..n]);
                    let sums = if p < extent[of] { &mut inside[of] } else { &mut outside[of] };
                    for i in 0..16 {
                        sums[i] += simd::exp(away[i] - top[i]) as f64;
                    }
                }
            }
            for i in 0..n {
                let (b_in, b_out, c_in, c_out) = (inside[0][i], outside[0][i], inside[1][i], outside[1][i]);
                let padded = if first + i < extent[2] { b_out * (c_in + c_out) + b_in * c_out } else { (b_in + b_out) * (c_in + c_out) };
                out[first + i] = tops[0][i] + tops[1][i] + padded.ln() as f32;
            }
        }
    }
}

fn on_cpu(cpu: &Cpu, w: &VitWeights, windows: &Windows, qkv: &Tensor, width: usize) -> Tensor {
    let (heads, edge) = (w.heads, windows.edge);
    let _op = cpu.op("attention in windows", || {
        let pairs: usize = windows.list.iter().map(|(_, e)| e.iter().product::<usize>().pow(2)).sum();
        let problem = format!("{} tokens, windows of {edge}, {heads} heads of {}", qkv.rows(), width / heads);
        Work { problem, flops: (4 * pairs * width + 6 * edge * qkv.rows() * width) as f64, floats: 4 * qkv.rows() * width }
    });
    let dim = width / heads;
    let scale = 1.0 / (dim as f32).sqrt();
    let mut out = cpu.take(qkv.rows() * width);
    let to = Shared::new(&mut out);
    // R_a[p, ·] for each p, rows kw: the reversed run of rel_pos_a that starts at p + w - 1.
    let table = |axis: usize, p: usize| -> Vec<f32> {
        let rows = w.rel_pos[axis].data();
        (0..edge).flat_map(|n| &rows[(p + edge - 1 - n) * dim..][..dim]).copied().collect()
    };
    let tables: [Vec<Vec<f32>>; 3] = std::array::from_fn(|axis| (0..edge).map(|p| table(axis, p)).collect());
    // Keys and values of every window and head.
    let layouts: Vec<Layout> = windows.list.iter().map(|(_, e)| Layout::new(cpu, e[0] * e[1] * e[2], dim)).collect();
    let starts: Vec<usize> = layouts.iter().scan(0, |at, l| Some(std::mem::replace(at, *at + heads * l.size()))).collect();
    let mut packed = cpu.take(layouts.iter().map(|l| heads * l.size()).sum());
    let laid = Shared::new(&mut packed);
    let stride = 3 * width;
    let rows_of = |row: usize, part: usize, head: usize| &qkv.data()[row * stride + part * width + head * dim..];
    cpu.for_each(windows.list.len() * heads, |unit| {
        let (window, head) = (unit / heads, unit % heads);
        let (l, row0) = (&layouts[window], windows.list[window].0);
        let rows = |part: usize| Rows { data: rows_of(row0, part, head).as_ptr(), stride };
        // SAFETY: each unit writes its own part.
        lay_out(cpu.isa(), l, rows(1), rows(2), unsafe { laid.slice(starts[window] + head * l.size(), l.size()) });
    });
    // A unit is one head of as many (d, h) query rows as fill a block.
    let units: Vec<(usize, usize, usize)> = windows
        .list
        .iter()
        .enumerate()
        .flat_map(|(i, (_, e))| {
            let lines = (QUERIES / e[2]).max(1);
            (0..e[0] * e[1]).step_by(lines).flat_map(move |line| (0..heads).map(move |head| (i, line, head)))
        })
        .collect();
    cpu.for_each(units.len(), |unit| {
        let (window, line0, head) = units[unit];
        let (row0, extent) = windows.list[window];
        let [ed, eh, ew] = extent;
        let lines = (QUERIES / ew).max(1).min(ed * eh - line0);
        let (l, c0) = (&layouts[window], head * dim);
        let padded = extent != [edge; 3];
        let bias = |part: usize| &w.qkv.1.data()[part * width + c0..][..dim];
        // What positions add: for each line and key, for each query and kw, and the score of the padded keys together.
        let (block, period) = (l.block(), l.block() + ew);
        let across = l.key_blocks() * block;
        let mut scratch = cpu.take(lines * across + lines * ew * period + edge * (2 * edge + dim + 1) + ew * edge);
        let (shared, rest) = scratch.split_at_mut(lines * across);
        let (own, rest) = rest.split_at_mut(lines * ew * period);
        let (b, rest) = rest.split_at_mut(edge * edge);
        let (c, rest) = rest.split_at_mut(edge * edge);
        let (q, rest) = rest.split_at_mut(edge * dim);
        let (a, pad) = rest.split_at_mut(ew * edge);
        let mut extra = [0.0f32; QUERIES];
        for line in 0..lines {
            let (d, h) = ((line0 + line) / eh, (line0 + line) % eh);
            for (p, q) in q.chunks_exact_mut(dim).enumerate() {
                q.copy_from_slice(if p < ew { &rows_of(row0 + (line0 + line) * ew + p, 0, head)[..dim] } else { bias(0) });
            }
            dots(cpu.isa(), &q[..ew * dim], &tables[0][d], dim, a);
            dots(cpu.isa(), q, &tables[1][h], dim, b);
            for (p, c) in c.chunks_exact_mut(edge).enumerate() {
                dots(cpu.isa(), &q[p * dim..][..dim], &tables[2][p], dim, c);
            }
            shared_positions(cpu.isa(), b, c, edge, extent, &mut shared[line * across..][..across]);
            let own = own[line * ew * period..].chunks_exact_mut(period);
            for (own, a) in own.zip(a.chunks_exact(edge)) {
                own.chunks_mut(ew).for_each(|own| own.copy_from_slice(&a[..own.len()]));
            }
            if padded {
                padded_log_weight(cpu.isa(), b, c, edge, extent, pad);
                for ((extra, a), q) in extra[line * ew..].iter_mut().zip(a.chunks_exact(edge)).zip(q.chunks_exact(dim)) {
                    let each = || a.iter().zip(&*pad).map(|(a, p)| a + p);
                    let top = each().fold(f32::NEG_INFINITY, f32::max);
                    let sum: f64 = each().map(|v| simd::exp(v - top) as f64).sum();
                    let score: f32 = q.iter().zip(bias(1)).map(|(q, k)| q * k).sum();
                    *extra = scale * score + top + sum.ln() as f32;
                }
            }
        }
        let (q0, rows) = (row0 + line0 * ew, lines * ew);
        // The padded keys together are one key with the bias for a value.
        let start = |running: &mut Running| {
            if padded {
                (0..rows).for_each(|r| running.first(r, extra[r], bias(2)));
            }
        };
        let finish = |tile: &mut Scores| {
            for (b, scores) in tile.values.chunks_exact_mut(QUERIES * block).enumerate() {
                let key = (tile.first + b) * block;
                for (r, scores) in scores.chunks_exact_mut(block).enumerate().take(rows) {
                    finish_scores(cpu.isa(), scores, scale, &shared[r / ew * across + key..], &own[r * period + key % ew..]);
                }
            }
            1.0
        };
        let packed = &packed[starts[window] + head * l.size()..][..l.size()];
        // SAFETY: each unit writes its own rows and channels.
        unsafe { flash::block(cpu, l, (rows_of(q0, 0, head), stride, rows), packed, (to.at(q0 * width + c0), width), start, finish) };
    });
    Tensor::from_buffer([qkv.rows(), width], out)
}
