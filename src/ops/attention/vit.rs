//! The image encoder's attention: windows over a cubic token grid, the released network's relative
//! positions, and the padded tokens of a window in closed form.
//!
//! With window edge `w`, `R_a[p, n] = rel_pos_a[p - n + w - 1]`, query `(d, h, x)` and key
//! `(kd, kh, kw)`, the score is `scale q·k + A[kw] + B[kd, kw] + C[kh, kw]` where
//! `A[kw] = q[d,h,x]·R_d[d,kw]`, `B[p, kw] = q[d,h,p]·R_h[h,kw]` and
//! `C[p, kw] = q[d,h,p]·R_w[p,kw]`. Positions beyond the grid hold zeros after the norm, so there
//! q, k and v are the bias: all padded keys share one k and one v, and their total weight is
//! `exp(scale q·b_k) Σ exp(A + B + C)` over the padded positions. That sum factors for each kw into
//! sums over p; split into inside and padded parts it needs no subtraction, so nothing cancels.

use super::contract::{Attended, VitWeights, Windows};
use super::core::Rows;
use super::flash::{self, Layout, Positions, QUERIES, Running, lay_out};
use super::positions::{Terms, padded_log_weight, padded_scores, repeat, shared_positions};
use crate::device::profile::OpCost;
use crate::device::simd;
use crate::device::{Cpu, Device, DisjointWriter};
use crate::ops::linear::{Activation, linear};
use crate::tensor::{OpError, Tensor};

/// The image encoder's attention without the output projection: projects `x` `[n, s, s, s, dim]`
/// and attends within windows. The result has what [the gradient](super::grad::vit_attention)
/// needs.
///
/// # Errors
/// Shapes that do not fit; on the CPU also a window of more than 64 tokens along an axis.
pub fn attend_windows(device: &Device, w: &VitWeights, x: &Tensor) -> Result<Attended, OpError> {
    attend(device, w, x, true)
}

fn attend(device: &Device, w: &VitWeights, x: &Tensor, keeps: bool) -> Result<Attended, OpError> {
    const OP: &str = "vit_attention";
    let [n, s, h, d, dim] = x.map5(OP, "x")?;
    if s != h || s != d || s == 0 {
        return Err(x.shape_error(OP, "x", "[n, s, s, s, dim], a cubic grid"));
    }
    if w.heads == 0 || dim % w.heads != 0 {
        return Err(x.shape_error(OP, "x", format!("[.., dim], a multiple of {} heads", w.heads)));
    }
    let edge = if w.window == 0 { s } else { w.window };
    for table in &w.rel_pos {
        table.expect_shape(OP, "rel_pos", &[2 * edge - 1, dim / w.heads])?;
    }
    w.qkv.0.expect_shape(OP, "qkv weight", &[3 * dim, dim])?;
    if let Device::Cuda(cuda) = device {
        return super::cuda::attend_windows(cuda, w, x, edge, keeps);
    }
    if edge.min(s) > QUERIES {
        return Err(x.shape_error(
            OP,
            "x",
            format!("windows of at most {QUERIES} tokens along an axis"),
        ));
    }
    let windows = Windows::new(n, s, edge);
    let rows = x.reshape([n * s * s * s, dim]);
    let ordered = windows.gather(&rows).unwrap_or(rows);
    let qkv = linear(device, &ordered, &w.qkv.0, Some(&w.qkv.1), Activation::None, None)?;
    let heads = on_cpu(device.cpu(), w, &windows, &qkv, dim);
    Ok(Attended { qkv, heads, windows, gridded: false, kept: None })
}

/// The image encoder's attention with all its projections: `x` `[n, s, s, s, dim]` to the same
/// shape, plus `residual` if given.
///
/// # Errors
/// As [`attend_windows`].
pub fn vit_attention(
    device: &Device,
    w: &VitWeights,
    x: &Tensor,
    residual: Option<&Tensor>,
) -> Result<Tensor, OpError> {
    let attended = attend(device, w, x, false)?;
    let heads = attended.to_grid(attended.heads.clone());
    linear(
        device,
        &heads.reshape(x.shape()),
        &w.proj.0,
        Some(&w.proj.1),
        Activation::None,
        residual,
    )
}

fn on_cpu(cpu: &Cpu, w: &VitWeights, windows: &Windows, qkv: &Tensor, width: usize) -> Tensor {
    let (heads, edge) = (w.heads, windows.edge);
    let _op = cpu.op("attention in windows", || {
        let pairs: usize =
            windows.list.iter().map(|(_, e)| e.iter().product::<usize>().pow(2)).sum();
        let problem =
            format!("{} tokens, windows of {edge}, {heads} heads of {}", qkv.rows(), width / heads);
        OpCost {
            problem,
            flops: (4 * pairs * width + 6 * edge * qkv.rows() * width) as f64,
            floats: 4 * qkv.rows() * width,
        }
    });
    let dim = width / heads;
    let scale = 1.0 / (dim as f32).sqrt();
    let mut out = cpu.alloc(qkv.rows() * width);
    let to = DisjointWriter::new(&mut out);
    let isa = cpu.isa();
    // R_a[p, ·] for each axis and p, columns kw: the reversed run of rel_pos_a that starts at p + w
    // - 1.
    let terms = Terms::new(isa, dim, edge);
    let mut tables = cpu.alloc(3 * edge * terms.size());
    let mut reversed = cpu.alloc(edge * dim);
    for (at, to) in tables.chunks_exact_mut(terms.size()).enumerate() {
        let (axis, p) = (at / edge, at % edge);
        for (n, row) in reversed.chunks_exact_mut(dim).enumerate() {
            row.copy_from_slice(&w.rel_pos[axis].data()[(p + edge - 1 - n) * dim..][..dim]);
        }
        terms.lay_out(&reversed, to);
    }
    let table = |axis: usize, p: usize| &tables[(axis * edge + p) * terms.size()..][..terms.size()];
    // The position terms of the bias, which is the query of every padded position: along h and
    // along w, for each head.
    let (bias_terms, wide) = (edge * terms.wide, terms.wide);
    let mut of_bias = cpu.alloc(heads * 2 * bias_terms);
    let mut q = cpu.alloc(terms.laid(1));
    for (at, to) in of_bias.chunks_exact_mut(wide).enumerate() {
        let (head, axis, p) = (at / (2 * edge), 1 + at / edge % 2, at % edge);
        let bias = &w.qkv.1.data()[head * dim..][..dim];
        terms.lay_rows(1, |_| bias, &mut q);
        // SAFETY: one query, laid out in `q`, and one row of `wide` products, which `to` is.
        unsafe { terms.products(&q, 1, 0..1, table(axis, p), to.as_mut_ptr(), wide) };
    }
    // Keys and values of every window and head.
    let layouts: Vec<Layout> =
        windows.list.iter().map(|(_, e)| Layout::new(cpu, e[0] * e[1] * e[2], dim)).collect();
    let starts: Vec<usize> = layouts
        .iter()
        .scan(0, |at, l| Some(std::mem::replace(at, *at + heads * l.size())))
        .collect();
    let mut packed = cpu.alloc(layouts.iter().map(|l| heads * l.size()).sum());
    let laid = DisjointWriter::new(&mut packed);
    let stride = 3 * width;
    let rows_of = |row: usize, part: usize, head: usize| {
        &qkv.data()[row * stride + part * width + head * dim..]
    };
    cpu.for_each(windows.list.len() * heads, |unit| {
        let (window, head) = (unit / heads, unit % heads);
        let (l, row0) = (&layouts[window], windows.list[window].0);
        let rows = |part: usize| Rows { data: rows_of(row0, part, head).as_ptr(), stride };
        // SAFETY: each unit writes its own part; a window's rows lie in `qkv`, and the head's
        // channels in each.
        unsafe {
            lay_out(
                cpu.isa(),
                l,
                rows(1),
                rows(2),
                laid.slice(starts[window] + head * l.size(), l.size()),
            )
        };
    });
    // A unit is one head with as many (d, h) query rows as fill a block.
    let units: Vec<(usize, usize, usize)> = windows
        .list
        .iter()
        .enumerate()
        .flat_map(|(i, (_, e))| {
            let lines = (QUERIES / e[2]).max(1);
            (0..e[0] * e[1])
                .step_by(lines)
                .flat_map(move |line| (0..heads).map(move |head| (i, line, head)))
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
        // The position terms: for each line and key, for each query and kw, and the padded keys'
        // common score.
        let (block, period, rows) = (l.block(), l.block() + ew, lines * ew);
        let across = l.key_blocks() * block;
        let laid = terms.laid(rows);
        let sizes = [
            lines * across,
            rows * period,
            2 * laid,
            rows * wide,
            lines * edge * wide,
            lines * edge * wide,
            edge,
        ];
        let mut scratch = cpu.alloc(sizes.iter().sum());
        let mut rest = &mut scratch[..];
        let [shared, own, q, a, b, c, pad] =
            sizes.map(|size| rest.split_off_mut(..size).expect("as many as were taken"));
        let (by_line, by_place) = q.split_at_mut(laid);
        let query =
            |line: usize, p: usize| &rows_of(row0 + (line0 + line) * ew + p, 0, head)[..dim];
        terms.lay_rows(rows, |r| query(r / ew, r % ew), by_line);
        terms.lay_rows(rows, |r| query(r % lines, r / lines), by_place);
        for line in 0..lines {
            let (d, h) = ((line0 + line) / eh, (line0 + line) % eh);
            let which = line * ew..(line + 1) * ew;
            // SAFETY: the line's queries are laid out; `a` and `b` have a row for each's products.
            unsafe {
                terms.products(
                    by_line,
                    rows,
                    which.clone(),
                    table(0, d),
                    a[line * ew * wide..].as_mut_ptr(),
                    wide,
                );
                terms.products(
                    by_line,
                    rows,
                    which,
                    table(1, h),
                    b[line * edge * wide..].as_mut_ptr(),
                    wide,
                );
            }
            let bias = &of_bias[head * 2 * bias_terms..][..2 * bias_terms];
            for p in ew..edge {
                b[(line * edge + p) * wide..][..wide].copy_from_slice(&bias[h * wide..][..wide]);
                c[(line * edge + p) * wide..][..wide]
                    .copy_from_slice(&bias[(edge + p) * wide..][..wide]);
            }
        }
        for p in 0..ew {
            // SAFETY: as above; each of the lines has a row for each place in `c`.
            unsafe {
                terms.products(
                    by_place,
                    rows,
                    p * lines..(p + 1) * lines,
                    table(2, p),
                    c[p * wide..].as_mut_ptr(),
                    edge * wide,
                )
            };
        }
        repeat(isa, a, wide, ew, period, own);
        let mut extra = [0.0f32; QUERIES];
        for line in 0..lines {
            let at = line * edge * wide;
            shared_positions(
                isa,
                &b[at..],
                &c[at..],
                wide,
                extent,
                &mut shared[line * across..][..across],
            );
            if padded {
                padded_log_weight(isa, &b[at..], &c[at..], wide, edge, extent, pad);
                let extra = &mut extra[line * ew..][..ew];
                for (p, extra) in extra.iter_mut().enumerate() {
                    *extra = scale * simd::dot(query(line, p), bias(1));
                }
                padded_scores(isa, &a[line * ew * wide..][..ew * wide], wide, edge, pad, extra);
            }
        }
        let q0 = row0 + line0 * ew;
        // The padded keys together count as one key, with the bias as its value.
        let start = |running: &mut Running| {
            if padded {
                (0..rows).for_each(|r| running.first(r, extra[r], bias(2)));
            }
        };
        let positions = Positions { line: ew, shared, across, own };
        let packed = &packed[starts[window] + head * l.size()..][..l.size()];
        // SAFETY: each unit writes its own rows and channels; all is laid out for `l`.
        unsafe {
            flash::block(
                cpu,
                l,
                (by_line, rows),
                packed,
                (to.at(q0 * width + c0), width),
                start,
                (scale, Some(positions)),
            )
        };
    });
    Tensor::from_buffer([qkv.rows(), width], out)
}
