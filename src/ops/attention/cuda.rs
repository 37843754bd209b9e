//! Attention on CUDA devices. See `kernels/attention.cu`.

use super::two_way::Live;
use super::vit::{Attended, VitWeights, Windows};
use crate::device::cuda::{Arg, Launch};
use crate::device::{Cuda, DType};
use crate::ops::linear::{Activation, linear};
use crate::tensor::{OpError, Tensor};

/// Queries of a block, and the most lines of queries along w.
const QUERIES: usize = 32;
const LINES: usize = 8;
/// Most channels of a head.
const DIM: usize = 64;

/// Bytes of a block's queries, keys, values and scores.
fn tiles(dim: usize) -> usize {
    (3 * QUERIES * (dim + 1) + QUERIES * (QUERIES + 1)) * 4
}

fn too_wide(op: &'static str, dim: usize) -> OpError {
    OpError::Argument { op, message: format!("heads of {dim} channels; on a CUDA device they have at most {DIM}") }
}

/// Projected `q` `[t, width]` to `k` and `v` `[m, width]`.
pub fn attend_heads(cuda: &Cuda, heads: usize, q: &Tensor, k: &Tensor, v: &Tensor, live: Live) -> Result<Tensor, OpError> {
    let (queries, width, dtype) = (q.rows(), q.channels(), cuda.precision());
    let dim = width / heads;
    if dim > DIM {
        return Err(too_wide("two_way_attention", dim));
    }
    let out = cuda.allocate(queries * width, dtype)?;
    let [q_on, k_on, v_on] = [q.on(cuda, dtype)?, k.on(cuda, dtype)?, v.on(cuda, dtype)?];
    let launch = Launch { grid: [queries.div_ceil(QUERIES), heads, 1], threads: 128, shared: tiles(dim), ..Launch::each(0) }
        .doing(4 * queries * k.rows() * width, 2 * (queries + k.rows()) * width * dtype.bytes());
    let live = live.map_or(Arg::Pointer(0), Arg::from);
    let memory = [(&q_on).into(), (&k_on).into(), (&v_on).into(), (&out).into(), live];
    let numbers = [queries, k.rows(), width, dim].map(Arg::int);
    cuda.launch(&format!("two_way_attention_{dtype}"), launch, &[&memory[..], &numbers].concat())?;
    Ok(Tensor::from_device(q.shape(), out, dtype))
}

/// Projects `x` `[n, s, s, s, dim]` and attends within windows of `edge`.
pub fn attend_windows(cuda: &Cuda, w: &VitWeights, x: &Tensor, edge: usize) -> Result<Attended, OpError> {
    const OP: &str = "vit_attention";
    let ([n, s, .., width], dtype) = (x.map5(OP, "x")?, cuda.precision());
    let (dim, across) = (width / w.heads, s.div_ceil(edge));
    let line = edge.min(s);
    if dim > DIM {
        return Err(too_wide(OP, dim));
    }
    if line > QUERIES {
        let message = format!("windows of {line} tokens along an axis; on a CUDA device they have at most {QUERIES}");
        return Err(OpError::Argument { op: OP, message });
    }
    let rows = x.reshape([n * s * s * s, width]);
    let qkv = linear(&crate::device::Device::Cuda(cuda.clone()), &rows, &w.qkv.0, Some(&w.qkv.1), Activation::None, None)?;
    let lines = (QUERIES / line).clamp(1, LINES);
    let out = cuda.allocate(rows.len(), dtype)?;
    let (values, bias) = (qkv.on(cuda, dtype)?, w.qkv.1.on(cuda, DType::F32)?);
    let tables = [&w.rel_pos[0], &w.rel_pos[1], &w.rel_pos[2]].map(|t| t.on(cuda, DType::F32));
    let [table_d, table_h, table_w] = tables;
    let memory = [&values, &bias, &table_d?, &table_h?, &table_w?, &out].map(Arg::from);
    let numbers = [s, edge, width, dim, lines].map(Arg::int);
    let positions = (QUERIES * edge + 2 * lines * edge * edge) * 4;
    let grid = [(line * line).div_ceil(lines), w.heads, n * across.pow(3)];
    let launch = Launch { grid, threads: 128, shared: tiles(dim) + positions, ..Launch::each(0) }
        .doing(4 * rows.rows() * line.pow(3) * width, 4 * rows.len() * dtype.bytes());
    cuda.launch(&format!("vit_attention_{dtype}"), launch, &[&memory[..], &numbers].concat())?;
    let heads = Tensor::from_device(rows.shape(), out, dtype);
    // The kernel keeps the grid's order.
    Ok(Attended { qkv, heads, windows: Windows::new(n, s, edge), gridded: true })
}
