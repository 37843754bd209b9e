//! The token path on CUDA devices. See `kernels/tokens.cu`.

use super::{Layer, Rows, bucket};
use crate::device::cuda::{Launch, Memory, Pointer, kernels};
use crate::device::{Cuda, CudaError, DType};
use crate::ops::attention::ValidKeys;
use crate::ops::linear::Activation;
use crate::tensor::{OpError, Tensor};
use std::fmt;
use std::sync::Arc;

/// Threads of a block, and its warps.
const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;
/// Rows up to which blocks are narrow, and rows up to which there are such launches at all: with
/// more, `linear` is good enough. Both are powers of two, see [`attention`].
const FEW: usize = 64;
const MOST_ROWS: usize = 2048;
/// Layers of one launch, of the same rows or of one row each.
const LAYERS: usize = 3;
const ROW_LAYERS: usize = 4;
/// The most values of a row that is normed or added to.
const MOST_COLUMNS: usize = 512;
/// The most keys whose scores a warp has in registers, and the most channels of a head.
const MOST_KEYS: usize = 64;
const MOST_DIM: usize = 64;
/// Shared memory that a block has on every GPU from compute capability 8.0 on.
const SHARED: usize = 96 << 10;

/// The layout of a block: see `kernels/tokens.cu`.
#[derive(PartialEq)]
struct Block {
    wide: bool,
    rows: usize,
    columns: usize,
    /// Bytes of the sums of warps that share k.
    parts: usize,
}

const NARROW: Block = Block { wide: false, rows: 16, columns: 16, parts: 4 * 16 * 16 * 4 };
const WIDE: Block = Block { wide: true, rows: 32, columns: 64, parts: 0 };

impl Block {
    /// By the rule of thumb.
    fn of(rows: usize) -> &'static Block {
        if rows > FEW { &WIDE } else { &NARROW }
    }

    /// All that fit a multiprocessor with this number of bytes for each of their rows, and more.
    fn fitting(per_row: usize, more: usize) -> Vec<&'static Block> {
        let fits = |block: &&Block| block.rows * per_row + more + block.parts <= SHARED;
        [&NARROW, &WIDE].into_iter().filter(fits).collect()
    }

    fn launch(&self, rows: usize, columns: usize, layers: usize, staged: usize) -> Launch {
        Launch {
            grid: [rows.div_ceil(self.rows), layers * columns.div_ceil(self.columns), 1],
            threads: THREADS,
            shared: staged + self.parts,
            ..Launch::per_element(0)
        }
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {}", self.rows, self.columns)
    }
}

/// Bytes of a row of `k` values in shared memory.
fn row_bytes(k: usize, dtype: DType) -> usize {
    (k * dtype.bytes()).next_multiple_of(128) + 64
}

fn number(activation: Activation) -> i32 {
    match activation {
        Activation::None => 0,
        Activation::Gelu => 1,
        Activation::Relu => 2,
    }
}

/// Memory number `i`, or none.
fn at(memory: &[Arc<Memory>], i: usize) -> Pointer<'_> {
    memory.get(i).map_or(Pointer::none(), Pointer::from)
}

/// `tensors` on the device.
fn on<'a>(
    cuda: &Cuda,
    dtype: DType,
    tensors: impl Iterator<Item = &'a Tensor>,
) -> Result<Vec<Arc<Memory>>, CudaError> {
    tensors.map(|t| t.to_device(cuda, dtype)).collect()
}

/// [`super::linears`] on a device.
pub fn linears(
    cuda: &Cuda,
    rows: Rows,
    layers: &[Layer],
    activation: Activation,
    residual: Option<&Tensor>,
) -> Result<Option<(Vec<Tensor>, Tensor)>, OpError> {
    let Rows { x, norm, add } = rows;
    let (m, k, dtype) = (x.rows(), x.channels(), cuda.precision());
    let n = layers.first().map_or(0, |layer| layer.bias.len());
    let staged = norm.is_some() || add.is_some();
    let fits = cuda.fuses_tokens()
        && (1..=MOST_ROWS).contains(&m)
        && (1..=LAYERS).contains(&layers.len())
        && k.is_multiple_of(8)
        && n.is_multiple_of(8)
        && (!staged || k <= MOST_COLUMNS)
        && layers.iter().all(|layer| layer.weight.shape() == [n, k] && layer.bias.len() == n)
        && norm.is_none_or(|(weight, bias, _)| weight.len() == k && bias.len() == k)
        && add.is_none_or(|add| add.len() == x.len())
        && residual.is_none_or(|residual| residual.len() == m * n);
    if !fits {
        return Ok(None);
    }
    let per_row = if staged { row_bytes(k, dtype) } else { 0 };
    let (block, _launch) = cuda.choose(
        "token_linear",
        format_args!("m{}n{n}k{k}l{}s{}", bucket(m), layers.len(), u8::from(staged)),
        Block::of(m),
        || Block::fitting(per_row, 0),
    );
    let tile = block.rows * per_row;
    let values = x.to_device(cuda, dtype)?;
    let (gains, shifts, eps) = match norm {
        Some((weight, bias, eps)) => (
            Some(weight.to_device(cuda, DType::F32)?),
            Some(bias.to_device(cuda, DType::F32)?),
            eps,
        ),
        None => (None, None, 0.0),
    };
    let add = add.map(|add| add.to_device(cuda, dtype)).transpose()?;
    let normed = norm.map(|_| cuda.allocate(m * k, dtype)).transpose()?;
    let residual = residual.map(|residual| residual.to_device(cuda, dtype)).transpose()?;
    let weights = on(cuda, dtype, layers.iter().map(|layer| layer.weight))?;
    let biases = on(cuda, DType::F32, layers.iter().map(|layer| layer.bias))?;
    let made: Vec<Arc<Memory>> =
        layers.iter().map(|_| cuda.allocate(m * n, dtype)).collect::<Result<_, _>>()?;
    let bits = layers.iter().enumerate().map(|(i, layer)| i32::from(layer.added) << i);
    let added: i32 = bits.sum();
    let read = usize::from(add.is_some()) + usize::from(normed.is_some());
    let written = layers.len() + usize::from(residual.is_some());
    let launch = block.launch(m, n, layers.len(), tile).with_cost(
        2 * layers.len() * m * n * k,
        (m * k * (1 + read) + layers.len() * n * k + m * n * written) * dtype.bytes(),
    );
    let family = if block.wide { kernels::TOKEN_LINEAR_WIDE } else { kernels::TOKEN_LINEAR };
    cuda.launch(
        family.of(dtype)?,
        launch,
        kernels::TokenLinearArgs {
            x: (&values).into(),
            weight: (&gains).into(),
            bias: (&shifts).into(),
            eps,
            add: (&add).into(),
            normed: (&normed).into(),
            w0: at(&weights, 0),
            w1: at(&weights, 1),
            w2: at(&weights, 2),
            b0: at(&biases, 0),
            b1: at(&biases, 1),
            b2: at(&biases, 2),
            y0: at(&made, 0),
            y1: at(&made, 1),
            y2: at(&made, 2),
            residual: (&residual).into(),
            rows: m.into(),
            n: n.into(),
            k: k.into(),
            act: number(activation).into(),
            added: added.into(),
        },
    )?;
    let mut shape = x.shape().to_vec();
    shape.pop();
    shape.push(n);
    let made =
        made.into_iter().map(|memory| Tensor::from_device(shape.clone(), memory, dtype)).collect();
    let normed = match normed {
        Some(memory) => Tensor::from_device(x.shape(), memory, dtype),
        None => x.clone(),
    };
    Ok(Some((made, normed)))
}

/// [`super::attention`] on a device. In float32 there is none: attention in plain arithmetic has a
/// launch of its own.
pub fn attention(
    cuda: &Cuda,
    heads: usize,
    [q, k, v]: [&Tensor; 3],
    valid: ValidKeys,
    (weight, bias): (&Tensor, &Tensor),
    residual: Option<&Tensor>,
) -> Result<Option<Tensor>, OpError> {
    let (rows, keys, width, n) = (q.rows(), k.rows(), q.channels(), bias.len());
    let (usual, dtype) = (Block::of(rows), cuda.precision());
    let per_row = row_bytes(width, dtype);
    let most = bucket(keys);
    let fits = cuda.fuses_tokens()
        && dtype != DType::F32
        && (1..=MOST_ROWS).contains(&rows)
        && (1..=MOST_KEYS).contains(&keys)
        && width.is_multiple_of(8)
        && n.is_multiple_of(8)
        && heads > 0
        && width.is_multiple_of(heads)
        && width / heads <= MOST_DIM
        && (usual.rows + 2 * most) * per_row + usual.parts <= SHARED
        && k.channels() == width
        && v.shape() == k.shape()
        && weight.shape() == [n, width]
        && residual.is_none_or(|residual| residual.len() == rows * n);
    if !fits {
        return Ok(None);
    }
    let (block, _launch) = cuda.choose(
        "token_attention",
        format_args!("q{}k{most}w{width}n{n}h{heads}", bucket(rows)),
        usual,
        || Block::fitting(per_row, 2 * most * per_row),
    );
    let [q_on, k_on, v_on] =
        [q.to_device(cuda, dtype)?, k.to_device(cuda, dtype)?, v.to_device(cuda, dtype)?];
    let (weight, bias) = (weight.to_device(cuda, dtype)?, bias.to_device(cuda, DType::F32)?);
    let residual = residual.map(|residual| residual.to_device(cuda, dtype)).transpose()?;
    let out = cuda.allocate(rows * n, dtype)?;
    let written = 1 + usize::from(residual.is_some());
    let tiles = (block.rows + 2 * keys.next_multiple_of(16)) * per_row;
    let launch = block.launch(rows, n, 1, tiles).with_cost(
        4 * rows * keys * width + 2 * rows * n * width,
        ((rows + 2 * keys + n) * width + rows * n * written) * dtype.bytes(),
    );
    let family = if block.wide { kernels::TOKEN_ATTENTION_WIDE } else { kernels::TOKEN_ATTENTION };
    cuda.launch(
        family.of(dtype)?,
        launch,
        kernels::TokenAttentionArgs {
            q: (&q_on).into(),
            k: (&k_on).into(),
            v: (&v_on).into(),
            live: valid.map_or(Pointer::none(), Pointer::from),
            w: (&weight).into(),
            bias: (&bias).into(),
            residual: (&residual).into(),
            y: (&out).into(),
            rows: rows.into(),
            keys: keys.into(),
            width: width.into(),
            dim: (width / heads).into(),
            n: n.into(),
        },
    )?;
    let mut shape = q.shape().to_vec();
    shape.pop();
    shape.push(n);
    Ok(Some(Tensor::from_device(shape, out, dtype)))
}

/// [`super::row_linears`] on a device.
pub fn row_linears(
    cuda: &Cuda,
    layers: &[(&Tensor, &Tensor, &Tensor)],
    activation: Activation,
) -> Result<Option<Vec<Tensor>>, OpError> {
    let dtype = cuda.precision();
    let fits = |(x, weight, bias): &(&Tensor, &Tensor, &Tensor)| {
        let (k, n) = (x.channels(), bias.len());
        x.rows() == 1 && n > 0 && k.is_multiple_of(4) && weight.shape() == [n, k]
    };
    if !cuda.fuses_tokens() || !layers.iter().all(fits) {
        return Ok(None);
    }
    let mut all = vec![];
    for layers in layers.chunks(ROW_LAYERS) {
        let rows = on(cuda, dtype, layers.iter().map(|layer| layer.0))?;
        let weights = on(cuda, dtype, layers.iter().map(|layer| layer.1))?;
        let biases = on(cuda, DType::F32, layers.iter().map(|layer| layer.2))?;
        let sizes: Vec<[usize; 2]> =
            layers.iter().map(|(x, _, bias)| [bias.len(), x.channels()]).collect();
        let made: Vec<Arc<Memory>> =
            sizes.iter().map(|[n, _]| cuda.allocate(*n, dtype)).collect::<Result<_, _>>()?;
        let most = sizes.iter().map(|[n, _]| *n).max().unwrap_or(0);
        let products: usize = sizes.iter().map(|[n, k]| n * k).sum();
        let launch = Launch {
            grid: [most.div_ceil(WARPS), layers.len(), 1],
            threads: THREADS,
            ..Launch::per_element(0)
        }
        .with_cost(2 * products, products * dtype.bytes());
        let size = |i: usize| sizes.get(i).copied().unwrap_or([0; 2]);
        cuda.launch(
            kernels::ROW_LINEAR.of(dtype)?,
            launch,
            kernels::RowLinearArgs {
                x0: at(&rows, 0),
                x1: at(&rows, 1),
                x2: at(&rows, 2),
                x3: at(&rows, 3),
                w0: at(&weights, 0),
                w1: at(&weights, 1),
                w2: at(&weights, 2),
                w3: at(&weights, 3),
                b0: at(&biases, 0),
                b1: at(&biases, 1),
                b2: at(&biases, 2),
                b3: at(&biases, 3),
                y0: at(&made, 0),
                y1: at(&made, 1),
                y2: at(&made, 2),
                y3: at(&made, 3),
                n0: size(0)[0].into(),
                n1: size(1)[0].into(),
                n2: size(2)[0].into(),
                n3: size(3)[0].into(),
                k0: size(0)[1].into(),
                k1: size(1)[1].into(),
                k2: size(2)[1].into(),
                k3: size(3)[1].into(),
                act: number(activation).into(),
            },
        )?;
        let tensor = |(memory, [n, _]): (Arc<Memory>, [usize; 2])| {
            Tensor::from_device([1, n], memory, dtype)
        };
        all.extend(made.into_iter().zip(sizes).map(tensor));
    }
    Ok(Some(all))
}
