//! Attention on CUDA devices. See `kernels/attention.cu`.

use super::contract::{Attended, Kept, ValidKeys, VitGrads, VitWeights, Windows};
use crate::device::cuda::{Launch, Memory, Pointer, kernels};
use crate::device::{Cuda, DType, Device, Precision};
use crate::ops::linear::{Activation, linear};
use crate::ops::reduce::part_sums;
use crate::ops::rows;
use crate::tensor::{OpError, Tensor};
use std::sync::Arc;

/// Queries of a block, and the most lines of queries along w.
const QUERIES: usize = 32;
const LINES: usize = 8;
/// Most channels of a head.
const DIM: usize = 64;

/// Keys of a step on tensor cores.
const STEP: usize = 64;

/// Bytes of a block's queries, keys, values and scores, in float.
fn tiles(dim: usize) -> usize {
    (3 * QUERIES * (dim + 1) + QUERIES * (QUERIES + 1)) * 4
}

/// Bytes of a block's tiles in the forward pass: on tensor cores, queries and two steps of keys and
/// values.
fn forward_tiles(dim: usize, precision: Precision) -> usize {
    match precision {
        Precision::Ieee => tiles(dim),
        _ => (QUERIES + 4 * STEP) * (dim.next_multiple_of(16) * precision.maps().bytes() + 16),
    }
}

fn too_wide(op: &'static str, dim: usize) -> OpError {
    OpError::Argument {
        op,
        message: format!("heads of {dim} channels; on a CUDA device they have at most {DIM}"),
    }
}

/// Projected `q` `[t, width]` to `k` and `v` `[m, width]`.
pub fn attend_heads(
    cuda: &Cuda,
    heads: usize,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    valid: ValidKeys,
) -> Result<Tensor, OpError> {
    let (queries, width, dtype) = (q.rows(), q.channels(), cuda.precision());
    let dim = width / heads;
    if dim > DIM {
        return Err(too_wide("two_way_attention", dim));
    }
    let out = cuda.allocate(queries * width, dtype)?;
    let [q_on, k_on, v_on] =
        [q.to_device(cuda, dtype)?, k.to_device(cuda, dtype)?, v.to_device(cuda, dtype)?];
    let launch = Launch {
        grid: [queries.div_ceil(QUERIES), heads, 1],
        threads: 128,
        shared: forward_tiles(dim, cuda.products()),
        ..Launch::per_element(0)
    }
    .with_cost(4 * queries * k.rows() * width, 2 * (queries + k.rows()) * width * dtype.bytes());
    cuda.launch(
        kernels::TWO_WAY_ATTENTION.multiplying(cuda.products())?,
        launch,
        kernels::TwoWayAttentionArgs {
            q: (&q_on).into(),
            k: (&k_on).into(),
            v: (&v_on).into(),
            y: (&out).into(),
            live: valid.map_or(Pointer::none(), Pointer::from),
            queries: queries.into(),
            keys: k.rows().into(),
            width: width.into(),
            dim: dim.into(),
        },
    )?;
    Ok(Tensor::from_device(q.shape(), out, dtype))
}

/// Gradients of [`attend_heads`], as [`grad::two_way_attention`](super::grad::two_way_attention).
pub fn attend_heads_gradient(
    cuda: &Cuda,
    heads: usize,
    [q, k, v]: [&Tensor; 3],
    valid: ValidKeys,
    dy: &Tensor,
) -> Result<[Tensor; 3], OpError> {
    let (queries, keys, width, dtype) = (q.rows(), k.rows(), q.channels(), cuda.precision());
    let dim = width / heads;
    let tiles_of = |rows: usize| rows.div_ceil(QUERIES);
    let [dq, dk, dv] = [
        cuda.allocate(q.len(), dtype)?,
        cuda.allocate(k.len(), dtype)?,
        cuda.allocate(v.len(), dtype)?,
    ];
    let sums = cuda.allocate(heads * tiles_of(queries) * 2 * QUERIES, DType::F32)?;
    let [q_on, k_on, v_on, dy_on] = [
        q.to_device(cuda, dtype)?,
        k.to_device(cuda, dtype)?,
        v.to_device(cuda, dtype)?,
        dy.to_device(cuda, dtype)?,
    ];
    let live = valid.map_or(Pointer::none(), Pointer::from);
    let scores = queries * keys * width;
    let launch = |rows: usize, products: usize, tensors: usize| {
        Launch {
            grid: [tiles_of(rows), heads, 1],
            threads: 128,
            shared: match dtype {
                DType::F32 => gradient_tiles(dim),
                // And for each half of a step, three numbers per query.
                _ => matrix_gradient_tiles(dim, dtype) + 2 * QUERIES * 3 * 4,
            },
            ..Launch::per_element(0)
        }
        .with_cost(2 * products * scores, tensors * (queries + keys) * width * dtype.bytes())
    };
    // The minimal work: the scores and their gradients twice, and a product for each result.
    cuda.launch(
        kernels::ATTENTION_GRADIENT_QUERIES.of(dtype)?,
        launch(queries, 3, 2),
        kernels::AttentionGradientQueriesArgs {
            q: (&q_on).into(),
            k: (&k_on).into(),
            v: (&v_on).into(),
            dy: (&dy_on).into(),
            dq: (&dq).into(),
            sums: (&sums).into(),
            live,
            queries: queries.into(),
            keys: keys.into(),
            width: width.into(),
            dim: dim.into(),
        },
    )?;
    cuda.launch(
        kernels::ATTENTION_GRADIENT_KEYS.of(dtype)?,
        launch(keys, 4, 3),
        kernels::AttentionGradientKeysArgs {
            q: (&q_on).into(),
            k: (&k_on).into(),
            v: (&v_on).into(),
            dy: (&dy_on).into(),
            sums: (&sums).into(),
            dk: (&dk).into(),
            dv: (&dv).into(),
            live,
            queries: queries.into(),
            keys: keys.into(),
            width: width.into(),
            dim: dim.into(),
        },
    )?;
    Ok([
        Tensor::from_device(q.shape(), dq, dtype),
        Tensor::from_device(k.shape(), dk, dtype),
        Tensor::from_device(v.shape(), dv, dtype),
    ])
}

/// Bytes of a block's tiles for the gradient: the outputs' gradients and a second tile of scores
/// beside the others.
fn gradient_tiles(dim: usize) -> usize {
    tiles(dim) + (QUERIES * (dim + 1) + QUERIES * (QUERIES + 1)) * 4
}

/// Bytes of a block's tiles for the gradient in 16-bit types: a block's own rows and two steps of
/// the streamed rows, of two tensors each.
fn matrix_gradient_tiles(dim: usize, dtype: DType) -> usize {
    (2 * QUERIES + 4 * STEP) * (dim.next_multiple_of(16) + 8) * dtype.bytes()
}

/// Slots for a line of tokens of a window in attention on tensor cores: 8, 16 or 32.
fn slots(line: usize) -> usize {
    line.next_multiple_of(8).next_power_of_two()
}

/// How the image encoder's attention is laid out on a device.
struct Vit {
    s: usize,
    edge: usize,
    width: usize,
    dim: usize,
    /// Lines of queries of a block.
    lines: usize,
    heads: usize,
    windows: usize,
    /// The bias of the projection.
    qkv_bias: Arc<Memory>,
    /// The position tables along d, h and w.
    tables: [Arc<Memory>; 3],
}

impl Vit {
    fn new(
        cuda: &Cuda,
        w: &VitWeights,
        n: usize,
        s: usize,
        width: usize,
        edge: usize,
        in_slots: bool,
    ) -> Result<Vit, OpError> {
        const OP: &str = "vit_attention";
        let (dim, line) = (width / w.heads, edge.min(s));
        if dim > DIM {
            return Err(too_wide(OP, dim));
        }
        if line > QUERIES {
            let message = format!(
                "windows of {line} tokens along an axis; on a CUDA device they have at most {QUERIES}"
            );
            return Err(OpError::Argument { op: OP, message });
        }
        let [d, h, x] = w.rel_pos.each_ref().map(|t| t.to_device(cuda, DType::F32));
        let windows = n * s.div_ceil(edge).pow(3);
        let (qkv_bias, tables) = (w.qkv.1.to_device(cuda, DType::F32)?, [d?, h?, x?]);
        let lines = match in_slots {
            true => QUERIES / slots(line),
            false => (QUERIES / line).clamp(1, LINES),
        };
        Ok(Vit { s, edge, width, dim, lines, heads: w.heads, windows, qkv_bias, tables })
    }

    /// Tokens of a window along an axis.
    fn line(&self) -> usize {
        self.edge.min(self.s)
    }

    /// Tiles of query lines of a window.
    fn tiles(&self) -> usize {
        self.line().pow(2).div_ceil(self.lines)
    }

    /// Values of the position terms of a tile of slots: rows are a power of two long.
    fn slot_terms(&self) -> usize {
        let row = self.edge.next_power_of_two().max(slots(self.line()));
        (QUERIES + 2 * self.lines * self.edge) * row
    }

    /// Values that a tile of queries keeps for the keys: in slots, the terms of keys in the grid,
    /// and one number per query.
    fn kept(&self, dtype: DType) -> usize {
        match dtype {
            DType::F32 => self.terms() + 2 * QUERIES,
            _ => (QUERIES + 2 * self.lines * self.line()) * slots(self.line()) + QUERIES,
        }
    }

    /// Bytes of shared memory of a block of queries and of a block of keys, for the gradient.
    fn gradient_shared(&self, dtype: DType) -> [usize; 2] {
        if dtype == DType::F32 {
            let keys = gradient_tiles(self.dim) + 4 * self.terms();
            return [keys + 4 * (self.terms() + 2 * QUERIES), keys];
        }
        let (slots, table) = (slots(self.line()), 2 * self.edge - 1);
        let tiles = matrix_gradient_tiles(self.dim, dtype);
        // Position terms and their gradients; each warp's sums for its lines; four numbers per
        // query; the weights of padded columns, and the padded positions' gradients of the tables.
        let own_lines = if slots == 8 { 2 } else { 1 };
        let of_lines = 4 * 2 * own_lines * self.line() * slots;
        let padded = (self.lines * self.edge + 2 * table).next_multiple_of(4);
        let spread = QUERIES * (table.next_multiple_of(16) + 8) * dtype.bytes();
        let queries =
            tiles + 4 * (2 * self.slot_terms() + of_lines + 4 * QUERIES + padded) + spread;
        // Two steps of two tiles' terms.
        [queries, tiles + 4 * 4 * self.kept(dtype)]
    }

    /// Values of a tile's position terms.
    fn terms(&self) -> usize {
        QUERIES * self.edge + 2 * self.lines * self.edge * self.edge
    }

    /// Multiplications of queries with keys and of scores with values, for one such product of all
    /// heads.
    fn product(&self) -> usize {
        2 * self.windows * self.line().pow(6) * self.width
    }

    fn launch(&self, tiles: usize, shared: usize) -> Launch {
        Launch {
            grid: [tiles, self.heads, self.windows],
            threads: 128,
            shared,
            ..Launch::per_element(0)
        }
    }
}

/// Projects `x` `[n, s, s, s, dim]` and attends within windows of `edge`; in 16 bits, keeps what
/// the gradient needs if `keeps` is set.
pub fn attend_windows(
    cuda: &Cuda,
    w: &VitWeights,
    x: &Tensor,
    edge: usize,
    keeps: bool,
) -> Result<Attended, OpError> {
    let ([n, s, .., width], dtype) = (x.map5("vit_attention", "x")?, cuda.precision());
    let in_slots = cuda.products() != Precision::Ieee;
    let vit = Vit::new(cuda, w, n, s, width, edge, in_slots)?;
    let rows = x.reshape([n * s * s * s, width]);
    let qkv = linear(
        &Device::Cuda(cuda.clone()),
        &rows,
        &w.qkv.0,
        Some(&w.qkv.1),
        Activation::None,
        None,
    )?;
    let out = cuda.allocate(rows.len(), dtype)?;
    let kept = match dtype {
        DType::F32 => None,
        _ if !keeps => None,
        _ => Some(Kept {
            log_sums: cuda.allocate(rows.rows() * vit.heads, DType::F32)?,
            values: cuda.allocate(rows.len(), DType::F32)?,
        }),
    };
    let values = qkv.to_device(cuda, dtype)?;
    let terms = match in_slots {
        false => vit.terms(),
        true => {
            // And the weights of the padded keys of each column, and a table's products.
            let products = (QUERIES + 1) * ((2 * vit.edge - 1).next_multiple_of(8) + 2);
            vit.slot_terms() + vit.lines * vit.edge + products
        }
    };
    let launch = vit
        .launch(vit.tiles(), forward_tiles(vit.dim, cuda.products()) + 4 * terms)
        .with_cost(2 * vit.product(), 4 * rows.len() * dtype.bytes());
    let [table_d, table_h, table_w] = vit.tables.each_ref().map(Pointer::from);
    cuda.launch(
        kernels::VIT_ATTENTION.multiplying(cuda.products())?,
        launch,
        kernels::VitAttentionArgs {
            qkv: (&values).into(),
            qkv_bias: (&vit.qkv_bias).into(),
            table_d,
            table_h,
            table_w,
            y: (&out).into(),
            log_sums: kept.as_ref().map_or(Pointer::none(), |kept| (&kept.log_sums).into()),
            values: kept.as_ref().map_or(Pointer::none(), |kept| (&kept.values).into()),
            s: vit.s.into(),
            edge: vit.edge.into(),
            width: vit.width.into(),
            dim: vit.dim.into(),
            lines: vit.lines.into(),
        },
    )?;
    let heads = Tensor::from_device(rows.shape(), out, dtype);
    // The kernel keeps the grid's order.
    Ok(Attended { qkv, heads, windows: Windows::new(n, s, edge), gridded: true, kept })
}

/// Gradients of the attention of [`attend_windows`], as
/// [`grad::vit_attention`](super::grad::vit_attention).
pub fn attend_windows_gradient(
    cuda: &Cuda,
    w: &VitWeights,
    attended: &Attended,
    dy: &Tensor,
) -> Result<VitGrads, OpError> {
    let (Attended { qkv, windows, .. }, dtype) = (attended, cuda.precision());
    let (width, tokens) = (qkv.channels() / 3, qkv.rows());
    // The gradient of float32 is in plain arithmetic.
    let in_slots = dtype != DType::F32;
    let vit = Vit::new(cuda, w, windows.items, windows.s, width, windows.edge, in_slots)?;
    let table = (2 * vit.edge - 1) * vit.dim;
    let (tiles, blocks) = (vit.tiles(), vit.tiles() * vit.windows);
    let float = |count: usize| cuda.allocate(count, DType::F32);
    let out = cuda.allocate(qkv.len(), dtype)?;
    let (kept, tables, padding) = (
        float(blocks * vit.heads * vit.kept(dtype))?,
        float(blocks * vit.heads * 3 * table)?,
        float(blocks * 3 * width)?,
    );
    let (values, gradient) = (qkv.to_device(cuda, dtype)?, dy.to_device(cuda, dtype)?);
    let of_forward = attended.kept.as_ref();
    let [table_d, table_h, table_w] = vit.tables.each_ref().map(Pointer::from);
    let [shared_queries, shared_keys] = vit.gradient_shared(dtype);
    let launch = vit
        .launch(tiles, shared_queries)
        .with_cost(3 * vit.product(), 6 * tokens * width * dtype.bytes());
    cuda.launch(
        kernels::ATTENTION_GRADIENT_VIT_QUERIES.of(dtype)?,
        launch,
        kernels::AttentionGradientVitQueriesArgs {
            qkv: (&values).into(),
            values: of_forward.map_or(Pointer::none(), |kept| (&kept.values).into()),
            log_sums: of_forward.map_or(Pointer::none(), |kept| (&kept.log_sums).into()),
            dy: (&gradient).into(),
            dqkv: (&out).into(),
            kept: (&kept).into(),
            tables: (&tables).into(),
            padding: (&padding).into(),
            qkv_bias: (&vit.qkv_bias).into(),
            table_d,
            table_h,
            table_w,
            s: vit.s.into(),
            edge: vit.edge.into(),
            width: vit.width.into(),
            dim: vit.dim.into(),
            lines: vit.lines.into(),
        },
    )?;
    let keys = match dtype {
        DType::F32 => vit.line().pow(3),
        _ => vit.line().pow(2) * slots(vit.line()),
    };
    let launch = vit
        .launch(keys.div_ceil(QUERIES), shared_keys)
        .with_cost(4 * vit.product(), 6 * tokens * width * dtype.bytes());
    cuda.launch(
        kernels::ATTENTION_GRADIENT_VIT_KEYS.of(dtype)?,
        launch,
        kernels::AttentionGradientVitKeysArgs {
            qkv: (&values).into(),
            dy: (&gradient).into(),
            dqkv: (&out).into(),
            kept: (&kept).into(),
            tiles: tiles.into(),
            qkv_bias: (&vit.qkv_bias).into(),
            table_d,
            table_h,
            table_w,
            s: vit.s.into(),
            edge: vit.edge.into(),
            width: vit.width.into(),
            dim: vit.dim.into(),
            lines: vit.lines.into(),
        },
    )?;
    let tables =
        part_sums(cuda, tables, [blocks * vit.heads, 3 * table], None)?.reshape([3, table]);
    let rel_pos = [0, 1, 2].map(|axis| rows::narrow(&Device::Cuda(cuda.clone()), &tables, axis, 1));
    let padding = part_sums(cuda, padding, [blocks, 3 * width], None)?;
    let [d, h, x] = rel_pos;
    Ok(VitGrads {
        qkv: Tensor::from_device(qkv.shape(), out, dtype),
        padding,
        rel_pos: [d?, h?, x?],
    })
}
