//! Gradients of the image encoder's attention: of q, k, v, of the position tables and, through the
//! padded tokens, of the bias that is their value.

use super::contract::{Attended, Head, VitGrads, VitWeights};
use super::flash::QUERIES;
use super::positions::{dots, padded_log_weight};
use crate::device::simd::{self, multiversion};
use crate::device::{Cpu, Device, DisjointWriter};
use crate::ops::linear::{Matrix, matmul};
use crate::tensor::{OpError, Tensor};

multiversion! {
    /// Adds `B[kd, kw] + C[kh, kw] + A[row, kw]` to the scores of the queries of one `(d, h)`.
    fn add_positions(
        scores: &mut [f32],
        a: &[f32],
        b: &[f32],
        c: &[f32],
        edge: usize,
        extent: [usize; 3],
    ) {
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

multiversion! {
    /// Softmax over `keys` scores and the extra key of each row; then `dp` and `dextra` become the
    /// gradients of the scores.
    fn score_gradients(
        p: &mut [f32],
        dp: &mut [f32],
        keys: usize,
        extra: &mut [f32],
        dextra: &mut [f32],
    ) {
        for (r, (p, dp)) in p.chunks_exact_mut(keys).zip(dp.chunks_exact_mut(keys)).enumerate() {
            let mut row_max = extra[r];
            for v in p.iter() {
                row_max = row_max.max(*v);
            }
            for v in p.iter_mut() {
                *v = simd::exp::<FUSED>(*v - row_max);
            }
            // An absent extra key has a score of minus infinity.
            let e = if extra[r] == f32::NEG_INFINITY {
                0.0
            } else {
                simd::exp::<FUSED>(extra[r] - row_max)
            };
            let inverse = 1.0 / (simd::sum(p) + e);
            for v in p.iter_mut() {
                *v *= inverse;
            }
            extra[r] = e * inverse;
            let mean = simd::dot(p, dp) + extra[r] * dextra[r];
            for i in 0..keys {
                dp[i] = p[i] * (dp[i] - mean);
            }
            dextra[r] = extra[r] * (dextra[r] - mean);
        }
    }
}

multiversion! {
    /// Sums the score gradients of one line's queries for each position term, over the axes on
    /// which the term does not depend: `A[row, kw]`, `B[kd, kw]`, `C[kh, kw]`.
    fn gather_positions(
        ds: &[f32],
        edge: usize,
        extent: [usize; 3],
        a: &mut [f32],
        b: &mut [f32],
        c: &mut [f32],
    ) {
        let [ed, eh, ew] = extent;
        for (ds, a) in ds.chunks_exact(ed * eh * ew).zip(a.chunks_exact_mut(edge)) {
            let a = &mut a[..ew];
            for (kd, plane) in ds.chunks_exact(eh * ew).enumerate() {
                let b = &mut b[kd * edge..][..ew];
                for (kh, row) in plane.chunks_exact(ew).enumerate() {
                    let c = &mut c[kh * edge..][..ew];
                    for kw in 0..ew {
                        a[kw] += row[kw];
                        b[kw] += row[kw];
                        c[kw] += row[kw];
                    }
                }
            }
        }
    }
}

multiversion! {
    /// The gradient of `t[n] = q · table[n]`: adds to `dq` and to `dtable`.
    fn dots_back(g: &[f32], q: &[f32], table: &[f32], dq: &mut [f32], dtable: &mut [f32]) {
        let dim = q.len();
        let dq = &mut dq[..dim];
        for (n, g) in g.iter().enumerate() {
            let (row, drow) = (&table[n * dim..][..dim], &mut dtable[n * dim..][..dim]);
            for i in 0..dim {
                dq[i] += g * row[i];
                drow[i] += g * q[i];
            }
        }
    }
}

/// The gradient of the logarithmic weight of the padded positions: adds `g[kw] ∂pad[kw]` to the
/// gradients of `B` and `C`.
fn padded_back(
    b: &[f32],
    c: &[f32],
    edge: usize,
    extent: [usize; 3],
    g: &[f32],
    db: &mut [f32],
    dc: &mut [f32],
) {
    for kw in 0..edge {
        let column = |t: &[f32]| -> Vec<f64> {
            let column_max = (0..edge).map(|p| t[p * edge + kw]).fold(f32::NEG_INFINITY, f32::max);
            (0..edge).map(|p| simd::exp::<false>(t[p * edge + kw] - column_max) as f64).collect()
        };
        let (b, c) = (column(b), column(c));
        let (b_in, b_out): (f64, f64) = (b[..extent[0]].iter().sum(), b[extent[0]..].iter().sum());
        let (c_in, c_out): (f64, f64) = (c[..extent[1]].iter().sum(), c[extent[1]..].iter().sum());
        let beyond = kw >= extent[2];
        let total = if beyond {
            (b_in + b_out) * (c_in + c_out)
        } else {
            b_out * (c_in + c_out) + b_in * c_out
        };
        if total == 0.0 {
            continue;
        }
        let scale = g[kw] as f64 / total;
        for p in 0..edge {
            let (other_c, other_b) = (
                if beyond || p >= extent[0] { c_in + c_out } else { c_out },
                if beyond || p >= extent[1] { b_in + b_out } else { b_out },
            );
            db[p * edge + kw] += (scale * b[p] * other_c) as f32;
            dc[p * edge + kw] += (scale * c[p] * other_b) as f32;
        }
    }
}

/// Gradients of the image encoder's attention from that of the attended values, `dy`
/// `[n * s³, dim]` in the order of [`Attended::heads`].
pub fn vit_attention(
    device: &Device,
    w: &VitWeights,
    attended: &Attended,
    dy: &Tensor,
) -> Result<VitGrads, OpError> {
    const OP: &str = "vit_attention gradient";
    let (windows, qkv) = (&attended.windows, &attended.qkv);
    let width = qkv.channels() / 3;
    qkv.expect_shape(OP, "qkv", &[windows.items * windows.s.pow(3), 3 * width])?;
    if w.heads == 0 || !width.is_multiple_of(w.heads) {
        return Err(qkv.shape_error(
            OP,
            "qkv",
            format!("[.., 3 * dim], dim a multiple of {} heads", w.heads),
        ));
    }
    dy.expect_shape(OP, "dy", &[qkv.rows(), width])?;
    if let Device::Cuda(cuda) = device {
        return super::cuda::attend_windows_gradient(cuda, w, attended, dy);
    }
    let cpu: &Cpu = device.cpu();
    let (heads, edge) = (w.heads, windows.edge);
    let dim = width / heads;
    let table_len = (2 * edge - 1) * dim;
    let mut dqkv = cpu.zeros(qkv.len());
    let mut padding = vec![0.0f32; 3 * width];
    let mut tables = vec![0.0f32; heads * 3 * table_len];
    let (to, pad_to) = (DisjointWriter::new(&mut dqkv), DisjointWriter::new(&mut padding));
    cpu.chunks_mut(&mut tables, 3 * table_len, |h, tables| {
        let unit =
            Unit { cpu, w, edge, dim, width, c0: h * dim, qkv: qkv.data(), dy: dy.data(), to: &to };
        // SAFETY: each head owns its channels.
        let mut pads = [0, 1, 2].map(|part| unsafe { pad_to.slice(part * width + h * dim, dim) });
        for &(row0, extent) in &windows.list {
            unit.window(row0, extent, tables, &mut pads);
        }
    });
    let rel_pos = std::array::from_fn(|axis| {
        let from = |i: usize| (0..heads).map(|h| tables[(h * 3 + axis) * table_len + i]).sum();
        (0..table_len).map(from).collect::<Vec<f32>>().into()
    });
    Ok(VitGrads { qkv: Tensor::from_buffer(qkv.shape(), dqkv), padding: padding.into(), rel_pos })
}

/// One head.
struct Unit<'a> {
    cpu: &'a Cpu,
    w: &'a VitWeights,
    edge: usize,
    dim: usize,
    width: usize,
    c0: usize,
    qkv: &'a [f32],
    dy: &'a [f32],
    to: &'a DisjointWriter<'a, f32>,
}

impl Unit<'_> {
    fn bias(&self, part: usize) -> &[f32] {
        &self.w.qkv.1.data()[part * self.width + self.c0..][..self.dim]
    }

    /// Rows kw of `R_axis[p, kw]`.
    fn table(&self, axis: usize, p: usize) -> Vec<f32> {
        let rows = self.w.rel_pos[axis].data();
        (0..self.edge)
            .flat_map(|n| &rows[(p + self.edge - 1 - n) * self.dim..][..self.dim])
            .copied()
            .collect()
    }

    /// Adds the gradient of `R_axis[p, kw]` to the table's.
    fn add_table(&self, tables: &mut [f32], axis: usize, p: usize, from: &[f32]) {
        let (dim, edge) = (self.dim, self.edge);
        let table = &mut tables[axis * (2 * edge - 1) * dim..];
        for (n, from) in from.chunks_exact(dim).enumerate() {
            table[(p + edge - 1 - n) * dim..][..dim]
                .iter_mut()
                .zip(from)
                .for_each(|(t, f)| *t += f);
        }
    }

    fn window(
        &self,
        row0: usize,
        extent: [usize; 3],
        tables: &mut [f32],
        pads: &mut [&mut [f32]; 3],
    ) {
        let ([ed, eh, ew], edge, dim) = (extent, self.edge, self.dim);
        let lines = (QUERIES / ew).max(1);
        let keys = ed * eh * ew;
        let isa = self.cpu.isa();
        let scale = 1.0 / (dim as f32).sqrt();
        let head = Head { stride: 3 * self.width, dim };
        let out = Head { stride: self.width, dim };
        let column = |part: usize| part * self.width + self.c0;
        let padded = extent != [edge; 3];
        for line0 in (0..ed * eh).step_by(lines) {
            let lines = lines.min(ed * eh - line0);
            let (n, q0) = (lines * ew, row0 + line0 * ew);
            let (mut p, mut ds) = (self.cpu.alloc(n * keys), self.cpu.alloc(n * keys));
            let (mut extra, mut dextra) = (vec![f32::NEG_INFINITY; n], vec![0.0f32; n]);
            // SAFETY: the matrices are the tensors' own rows.
            unsafe {
                matmul(
                    [n, keys, dim],
                    p.as_mut_ptr(),
                    keys,
                    false,
                    head.of(self.qkv, q0, column(0)),
                    head.transposed(self.qkv, row0, column(1)),
                );
                matmul(
                    [n, keys, dim],
                    ds.as_mut_ptr(),
                    keys,
                    false,
                    out.of(self.dy, q0, self.c0),
                    head.transposed(self.qkv, row0, column(2)),
                );
            }
            p.iter_mut().for_each(|s| *s *= scale);
            // Positions, as in the forward pass.
            let mut terms = vec![];
            for line in 0..lines {
                let (d, h) = ((line0 + line) / eh, (line0 + line) % eh);
                let (mut a, mut b, mut c) =
                    (vec![0.0; ew * edge], vec![0.0; edge * edge], vec![0.0; edge * edge]);
                let mut q = vec![0.0; edge * dim];
                for (x, q) in q.chunks_exact_mut(dim).enumerate() {
                    let row = (q0 + line * ew + x) * 3 * self.width + self.c0;
                    q.copy_from_slice(if x < ew { &self.qkv[row..][..dim] } else { self.bias(0) });
                }
                dots(isa, &q[..ew * dim], &self.table(0, d), dim, &mut a);
                dots(isa, &q, &self.table(1, h), dim, &mut b);
                for (x, c) in c.chunks_exact_mut(edge).enumerate() {
                    dots(isa, &q[x * dim..][..dim], &self.table(2, x), dim, c);
                }
                let part = line * ew..(line + 1) * ew;
                add_positions(
                    isa,
                    &mut p[part.start * keys..part.end * keys],
                    &a,
                    &b,
                    &c,
                    edge,
                    extent,
                );
                // The share of each kw in the padded weight, row by row.
                let mut shares = vec![0.0f32; if padded { ew * edge } else { 0 }];
                if padded {
                    let mut pad = vec![0.0; edge];
                    padded_log_weight(isa, &b, &c, edge, edge, extent, &mut pad);
                    for (x, share) in shares.chunks_exact_mut(edge).enumerate() {
                        let each = |kw: usize| a[x * edge + kw] + pad[kw];
                        let row_max = (0..edge).map(each).fold(f32::NEG_INFINITY, f32::max);
                        (0..edge).for_each(|kw| share[kw] = simd::exp::<false>(each(kw) - row_max));
                        let sum: f64 = share.iter().map(|v| *v as f64).sum();
                        share.iter_mut().for_each(|v| *v /= sum as f32);
                        let q = &q[x * dim..][..dim];
                        extra[part.start + x] =
                            scale * simd::dot(q, self.bias(1)) + row_max + sum.ln() as f32;
                        let dy = (q0 + part.start + x) * self.width + self.c0;
                        dextra[part.start + x] = simd::dot(&self.dy[dy..][..dim], self.bias(2));
                    }
                }
                terms.push((d, h, q, b, c, shares));
            }
            score_gradients(isa, &mut p, &mut ds, keys, &mut extra, &mut dextra);

            // SAFETY: each head writes its own channels.
            unsafe {
                let (plain, transposed) = (
                    |m: &[f32]| Matrix { data: m.as_ptr(), row: keys, column: 1 },
                    |m: &[f32]| Matrix { data: m.as_ptr(), row: 1, column: keys },
                );
                let to = |row: usize, part: usize| self.to.at(row * 3 * self.width + column(part));
                let stride = 3 * self.width;
                matmul(
                    [keys, dim, n],
                    to(row0, 2),
                    stride,
                    true,
                    transposed(&p),
                    out.of(self.dy, q0, self.c0),
                );
                let mut scaled = self.cpu.alloc(n * keys);
                scaled.iter_mut().zip(ds.iter()).for_each(|(s, d)| *s = d * scale);
                matmul(
                    [n, dim, keys],
                    to(q0, 0),
                    stride,
                    true,
                    plain(&scaled),
                    head.of(self.qkv, row0, column(1)),
                );
                matmul(
                    [keys, dim, n],
                    to(row0, 1),
                    stride,
                    true,
                    transposed(&scaled),
                    head.of(self.qkv, q0, column(0)),
                );
            }
            for (line, (d, h, q, b, c, shares)) in terms.iter().enumerate() {
                let part = line * ew..(line + 1) * ew;
                let (mut da, mut db, mut dc) =
                    (vec![0.0f32; ew * edge], vec![0.0f32; edge * edge], vec![0.0f32; edge * edge]);
                gather_positions(
                    isa,
                    &ds[part.start * keys..part.end * keys],
                    edge,
                    extent,
                    &mut da,
                    &mut db,
                    &mut dc,
                );
                let mut dq = vec![0.0f32; edge * dim];
                if padded {
                    let mut weight = vec![0.0f32; edge];
                    for x in 0..ew {
                        let (e, de) = (extra[part.start + x], dextra[part.start + x]);
                        for kw in 0..edge {
                            let g = de * shares[x * edge + kw];
                            da[x * edge + kw] += g;
                            weight[kw] += g;
                        }
                        let dy = &self.dy[(q0 + part.start + x) * self.width + self.c0..][..dim];
                        for i in 0..dim {
                            dq[x * dim + i] += scale * de * self.bias(1)[i];
                            pads[1][i] += scale * de * q[x * dim + i];
                            pads[2][i] += e * dy[i];
                        }
                    }
                    padded_back(b, c, edge, extent, &weight, &mut db, &mut dc);
                }
                let (table_d, table_h) = (self.table(0, *d), self.table(1, *h));
                let (mut grad_d, mut grad_h) = (vec![0.0; edge * dim], vec![0.0; edge * dim]);
                for x in 0..edge {
                    let (q, dq) = (&q[x * dim..][..dim], &mut dq[x * dim..][..dim]);
                    if x < ew {
                        dots_back(isa, &da[x * edge..][..edge], q, &table_d, dq, &mut grad_d);
                    }
                    dots_back(isa, &db[x * edge..][..edge], q, &table_h, dq, &mut grad_h);
                    let mut grad_w = vec![0.0; edge * dim];
                    dots_back(isa, &dc[x * edge..][..edge], q, &self.table(2, x), dq, &mut grad_w);
                    self.add_table(tables, 2, x, &grad_w);
                    if x < ew {
                        // SAFETY: each head writes its own channels.
                        let to = unsafe {
                            self.to.slice((q0 + part.start + x) * 3 * self.width + self.c0, dim)
                        };
                        to.iter_mut().zip(&*dq).for_each(|(t, d)| *t += d);
                    } else {
                        pads[0].iter_mut().zip(&*dq).for_each(|(t, d)| *t += d);
                    }
                }
                self.add_table(tables, 0, *d, &grad_d);
                self.add_table(tables, 1, *h, &grad_h);
            }
        }
    }
}
