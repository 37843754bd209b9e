//! The image encoder's attention: windows over a cubic token grid, the released network's relative positions, and the padded tokens
//! of a window in closed form.
//!
//! With window edge `w`, `R_a[p, n] = rel_pos_a[p - n + w - 1]`, query `(d, h, x)` and key `(kd, kh, kw)`, the score is
//! `scale q·k + A[kw] + B[kd, kw] + C[kh, kw]` where `A[kw] = q[d,h,x]·R_d[d,kw]`, `B[p, kw] = q[d,h,p]·R_h[h,kw]` and
//! `C[p, kw] = q[d,h,p]·R_w[p,kw]`. Positions beyond the grid hold zeros after the norm, so there q, k and v are the bias: all padded
//! keys share one k and one v, and together weigh `exp(scale q·b_k) Σ exp(A + B + C)` over the padded positions. That sum factors
//! for each kw into sums over p; split into inside and padded parts it needs no subtraction, so nothing cancels.

use super::core::{BLOCK, Rows, attend};
use crate::device::cpu::Shared;
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

    /// The same with rows in window order.
    pub(super) fn in_windows(&self) -> Attended {
        let ordered = |t: &Tensor| if self.gridded { self.windows.gather(t).unwrap_or_else(|| t.clone()) } else { t.clone() };
        Attended { qkv: ordered(&self.qkv), heads: ordered(&self.heads), windows: self.windows.clone(), gridded: false }
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
#[derive(Clone)]
pub struct Windows {
    pub edge: usize,
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
        Windows { edge, list, order }
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
    /// Adds `B[kd, kw] + C[kh, kw] + A[row, kw]` to the scores of the queries of one `(d, h)`.
    pub(super) fn add_positions(scores: &mut [f32], a: &[f32], b: &[f32], c: &[f32], edge: usize, extent: [usize; 3]) {
        let keys = extent[0] * extent[1] * extent[2];
        for (scores, a) in scores.chunks_exact_mut(keys).zip(a.chunks_exact(edge)) {
            for (kd, plane) in scores.chunks_exact_mut(extent[1] * extent[2]).enumerate() {
                for (kh, row) in plane.chunks_exact_mut(extent[2]).enumerate() {
                    let (b, c) = (&b[kd * edge..][..extent[2]], &c[kh * edge..][..extent[2]]);
                    let a = &a[..extent[2]];
                    for (kw, v) in row.iter_mut().enumerate() {
                        *v += a[kw] + b[kw] + c[kw];
                    }
                }
            }
        }
    }
}

/// For each kw, the logarithm of the summed `exp(B + C)` over the padded positions of a window; minus infinity where there are none.
pub(super) fn padded_log_weight(b: &[f32], c: &[f32], edge: usize, extent: [usize; 3], out: &mut [f32]) {
    for (kw, out) in out.iter_mut().enumerate() {
        let top = |t: &[f32]| (0..edge).map(|p| t[p * edge + kw]).fold(f32::NEG_INFINITY, f32::max);
        let (top_b, top_c) = (top(b), top(c));
        let sum =
            |t: &[f32], top: f32, from: usize, to: usize| -> f64 { (from..to).map(|p| simd::exp(t[p * edge + kw] - top) as f64).sum() };
        let (b_in, b_out) = (sum(b, top_b, 0, extent[0]), sum(b, top_b, extent[0], edge));
        let (c_in, c_out) = (sum(c, top_c, 0, extent[1]), sum(c, top_c, extent[1], edge));
        let padded = if kw < extent[2] { b_out * (c_in + c_out) + b_in * c_out } else { (b_in + b_out) * (c_in + c_out) };
        *out = top_b + top_c + padded.ln() as f32;
    }
}

fn on_cpu(cpu: &Cpu, w: &VitWeights, windows: &Windows, qkv: &Tensor, width: usize) -> Tensor {
    let (heads, edge) = (w.heads, windows.edge);
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
    // A unit is one head of as many (d, h) query rows as fill a block.
    let units: Vec<(usize, usize, usize)> = windows
        .list
        .iter()
        .enumerate()
        .flat_map(|(i, (_, e))| {
            let lines = (BLOCK / e[2]).max(1);
            (0..e[0] * e[1]).step_by(lines).flat_map(move |line| (0..heads).map(move |head| (i, line, head)))
        })
        .collect();
    cpu.for_each(units.len(), |unit| {
        let (window, line0, head) = units[unit];
        let (row0, extent) = windows.list[window];
        let [ed, eh, ew] = extent;
        let lines = (BLOCK / ew).max(1).min(ed * eh - line0);
        let (keys, c0, stride) = (ed * eh * ew, head * dim, 3 * width);
        let padded = extent != [edge; 3];
        let bias = |part: usize| &w.qkv.1.data()[part * width + c0..][..dim];
        let at = |row: usize, part: usize| Rows { data: qkv.data()[(row0 + row) * stride + part * width + c0..].as_ptr(), stride };
        let positions = |scores: &mut [f32], extra: &mut [f32]| {
            let (mut b, mut c) = (vec![0.0; edge * edge], vec![0.0; edge * edge]);
            let (mut q, mut a, mut pad) = (vec![0.0; edge * dim], vec![0.0; ew * edge], vec![0.0; edge]);
            for line in 0..lines {
                let (d, h) = ((line0 + line) / eh, (line0 + line) % eh);
                for (p, q) in q.chunks_exact_mut(dim).enumerate() {
                    let row = (row0 + (line0 + line) * ew + p) * stride + c0;
                    q.copy_from_slice(if p < ew { &qkv.data()[row..][..dim] } else { bias(0) });
                }
                dots(cpu.isa(), &q[..ew * dim], &tables[0][d], dim, &mut a);
                dots(cpu.isa(), &q, &tables[1][h], dim, &mut b);
                for (p, c) in c.chunks_exact_mut(edge).enumerate() {
                    dots(cpu.isa(), &q[p * dim..][..dim], &tables[2][p], dim, c);
                }
                let part = line * ew..(line + 1) * ew;
                add_positions(cpu.isa(), &mut scores[part.start * keys..part.end * keys], &a, &b, &c, edge, extent);
                if padded {
                    padded_log_weight(&b, &c, edge, extent, &mut pad);
                    for ((extra, a), q) in extra[part].iter_mut().zip(a.chunks_exact(edge)).zip(q.chunks_exact(dim)) {
                        let each = || a.iter().zip(&pad).map(|(a, p)| a + p);
                        let top = each().fold(f32::NEG_INFINITY, f32::max);
                        let sum: f64 = each().map(|v| simd::exp(v - top) as f64).sum();
                        let score: f32 = q.iter().zip(bias(1)).map(|(q, k)| q * k).sum();
                        *extra = scale * score + top + sum.ln() as f32;
                    }
                }
            }
            padded.then(|| bias(2))
        };
        let q0 = line0 * ew;
        // SAFETY: each unit writes its own rows and channels.
        unsafe {
            let to = (to.at((row0 + q0) * width + c0), width);
            attend(cpu, [lines * ew, keys, dim], scale, at(q0, 0), at(0, 1), at(0, 2), to, positions);
        }
    });
    Tensor::from_buffer([qkv.rows(), width], out)
}
