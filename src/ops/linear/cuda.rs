//! Dense layers on CUDA devices. See `kernels/linear.cu` and `kernels/linear_wgmma.cu`.

use super::Activation;
use crate::device::cuda::kernels::{LinearArgs, LinearOddArgs};
use crate::device::cuda::{Chosen, CudaError, Launch, TypedKernel, kernels};
use crate::device::{Cuda, DType, Precision};
use crate::ops::reduce::{part_sums, place};
use crate::tensor::{OpError, Tensor};
use std::fmt;

/// Rows and columns of a block; its rows may be fewer.
const EDGE: usize = 64;
/// Blocks that keep a GPU busy.
const BLOCKS: usize = 320;

/// The layout of a block: see `kernels/linear.cu` and `kernels/linear_wgmma.cu`.
struct Block {
    rows: usize,
    columns: usize,
    threads: usize,
    /// Bytes of shared memory.
    shared: usize,
}

/// On tensor cores: three buffers of 128 bytes of each row, and 16 more.
const fn matrix(rows: usize) -> Block {
    Block { rows, columns: EDGE, threads: 128, shared: 3 * (rows + EDGE) * (128 + 16) }
}

/// By `wgmma`, with 64 rows for each warpgroup: four buffers of 128 bytes of each row.
const fn wgmma(groups: usize) -> Block {
    let (rows, columns) = (64 * groups, 96);
    Block { rows, columns, threads: 128 * groups, shared: 4 * (rows + columns) * 128 }
}

/// Two tiles in float.
const PLAIN: Block =
    Block { rows: EDGE, columns: EDGE, threads: 256, shared: 2 * 16 * (EDGE + 4) * 4 };
/// The blocks by `wgmma` that run at a time: two on each of 132 multiprocessors, as most GPUs with
/// `wgmma` have. Tall ones read less, and are taken if that gives so many.
const WGMMA_BLOCKS: usize = 264;
const ENOUGH_TALL: usize = 88;
/// The smallest part of k that a block takes if several share it: by the rule of thumb, and that is
/// tried.
const LEAST: usize = 768;
const LEAST_TRIED: usize = 128;
/// More blocks than that are not tried, nor other numbers of blocks that share k.
const MOST_BLOCKS: usize = 4 * BLOCKS;
const SPLITS_OF_K: [usize; 5] = [1, 2, 3, 4, 6];
/// Rows of shapes that are rounded up to a power of two, at least: recordings round the number of
/// tokens up so.
const LEAST_ROWS: usize = 16;

/// The number of elements in 16 bytes; rows that tensor cores multiply are multiples of that.
fn piece(dtype: DType) -> usize {
    16 / dtype.bytes()
}

/// The rows and columns of a block on tensor cores, and how it multiplies.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Tile {
    /// 64 x 64.
    Many,
    /// 16 x 64.
    Few,
    /// 64 x 96, by `wgmma`.
    Wgmma,
    /// 128 x 96, by `wgmma`.
    WgmmaTall,
}

impl Tile {
    const fn block(self) -> Block {
        match self {
            Tile::Many => matrix(EDGE),
            Tile::Few => matrix(16),
            Tile::Wgmma => wgmma(1),
            Tile::WgmmaTall => wgmma(2),
        }
    }

    /// The number of blocks, if none share k.
    fn blocks(self, m: usize, n: usize) -> usize {
        let Block { rows, columns, .. } = self.block();
        m.div_ceil(rows) * n.div_ceil(columns)
    }
}

/// How a product is divided among blocks on tensor cores.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Division {
    tile: Tile,
    /// The number of blocks that share k.
    split_k: usize,
}

impl Division {
    /// By the rule of thumb; `wgmma` says whether that can be used, and was asked for: then it is,
    /// unless there are few rows.
    fn usual([m, n, k]: [usize; 3], wgmma: bool) -> Division {
        let few = Tile::Many.blocks(m, n) * 10 <= BLOCKS;
        let tall = Tile::WgmmaTall.blocks(m, n) >= ENOUGH_TALL;
        let (tile, busy) = match (few, wgmma, tall) {
            (true, ..) => (Tile::Few, BLOCKS),
            (_, false, _) => (Tile::Many, BLOCKS),
            (_, _, false) => (Tile::Wgmma, WGMMA_BLOCKS),
            (_, _, true) => (Tile::WgmmaTall, WGMMA_BLOCKS),
        };
        let split_k = (busy / tile.blocks(m, n)).min(k / LEAST).max(1);
        Division { tile, split_k }
    }

    /// The others that are tried.
    fn others([m, n, k]: [usize; 3], wgmma: bool) -> Vec<Division> {
        let all = [Tile::Many, Tile::Few, Tile::Wgmma, Tile::WgmmaTall];
        let tiles = &all[..if wgmma { 4 } else { 2 }];
        let all =
            tiles.iter().flat_map(|&tile| SPLITS_OF_K.map(|split_k| Division { tile, split_k }));
        all.filter(|Division { tile, split_k }| {
            let blocks = tile.blocks(m, n) * split_k;
            *split_k == 1 || k / split_k >= LEAST_TRIED && blocks <= MOST_BLOCKS
        })
        .collect()
    }

    /// The division of a product, and what its launches belong to.
    fn of(cuda: &Cuda, [m, n, k]: [usize; 3], lies: bool) -> (Division, Chosen) {
        let rounded = m.next_power_of_two().max(LEAST_ROWS);
        let wgmma = cuda.uses_wgmma() && cuda.precision() != DType::F32 && !lies;
        cuda.choose(
            if lies { "linear_back" } else { "linear" },
            format_args!("m{rounded}n{n}k{k}"),
            Division::usual([m, n, k], wgmma),
            || Division::others([rounded, n, k], wgmma),
        )
    }
}

impl fmt::Display for Division {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.tile {
            Tile::Many | Tile::Few => "",
            Tile::Wgmma | Tile::WgmmaTall => " by wgmma",
        };
        write!(f, "{} rows{how}, k in {}", self.tile.block().rows, self.split_k)
    }
}

/// The kernel for a product.
enum Kernel {
    /// In plain float arithmetic.
    Simt(TypedKernel<LinearOddArgs<'static>>),
    /// On tensor cores, where blocks may share k.
    Mma(TypedKernel<LinearArgs<'static>>),
}

impl Kernel {
    /// The kernel for a product of `[m, k]` and `[n, k]`, or `[k, n]` if the weight is read in its
    /// stored order, its block, how many blocks share k, and what its launches belong to.
    fn of(
        cuda: &Cuda,
        shape: [usize; 3],
        lies: bool,
    ) -> Result<(Kernel, Block, usize, Option<Chosen>), CudaError> {
        let precision = cuda.products();
        if precision == Precision::Ieee || !shape[2].is_multiple_of(piece(precision.maps())) {
            let plain = match precision.maps() {
                DType::F32 => kernels::LINEAR_F32,
                dtype => kernels::LINEAR_ODD.of(dtype)?,
            };
            return Ok((Kernel::Simt(plain), PLAIN, 1, None));
        }
        let (division, chosen) = Division::of(cuda, shape, lies);
        let family = match (division.tile, lies) {
            (Tile::Many, false) => kernels::LINEAR,
            (Tile::Many, true) => kernels::LINEAR_BACK,
            (Tile::Few, false) => kernels::LINEAR_FEW,
            (Tile::Few, true) => kernels::LINEAR_BACK_FEW,
            (Tile::Wgmma, _) => kernels::LINEAR_WGMMA,
            (Tile::WgmmaTall, _) => kernels::LINEAR_WGMMA_TALL,
        };
        let kernel = Kernel::Mma(family.multiplying(precision)?);
        Ok((kernel, division.tile.block(), division.split_k, Some(chosen)))
    }
}

pub fn linear(
    cuda: &Cuda,
    shape: Vec<usize>,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    residual: Option<&Tensor>,
) -> Result<Tensor, OpError> {
    product(cuda, shape, x, (weight, false), bias, activation, residual)
}

/// A dense layer; its weight is `[n, k]`, or `[k, n]` and read in its stored order, on tensor cores
/// only.
fn product(
    cuda: &Cuda,
    shape: Vec<usize>,
    x: &Tensor,
    (weight, lies): (&Tensor, bool),
    bias: Option<&Tensor>,
    activation: Activation,
    residual: Option<&Tensor>,
) -> Result<Tensor, OpError> {
    let (dtype, m, k) = (cuda.precision(), x.rows(), x.channels());
    let n = shape.last().copied().unwrap_or(1);
    let out = cuda.allocate(m * n, dtype)?;
    let (x, weight) = (x.to_device(cuda, dtype)?, weight.to_device(cuda, dtype)?);
    let bias = bias.map(|b| b.to_device(cuda, DType::F32)).transpose()?;
    let residual = residual.map(|r| r.to_device(cuda, dtype)).transpose()?;
    let (kernel, block, split_k, _launches) = Kernel::of(cuda, [m, n, k], lies)?;
    let splitk_workspace =
        (split_k > 1).then(|| cuda.allocate(split_k * m * n, DType::F32)).transpose()?;
    let act: i32 = match activation {
        Activation::None => 0,
        Activation::Gelu => 1,
        Activation::Relu => 2,
    };
    let Block { rows, columns, threads, shared } = block;
    let launch = Launch {
        grid: [m.div_ceil(rows), n.div_ceil(columns), split_k],
        threads,
        shared,
        ..Launch::per_element(0)
    }
    .with_cost(
        2 * m * n * k,
        (m * k + n * k + m * n * (1 + usize::from(residual.is_some()))) * dtype.bytes(),
    );
    match kernel {
        Kernel::Simt(kernel) => cuda.launch(
            kernel,
            launch,
            LinearOddArgs {
                x: (&x).into(),
                w: (&weight).into(),
                bias: (&bias).into(),
                residual: (&residual).into(),
                y: (&out).into(),
                m: m.into(),
                n: n.into(),
                k: k.into(),
                act: act.into(),
            },
        )?,
        Kernel::Mma(kernel) => cuda.launch(
            kernel,
            launch,
            LinearArgs {
                x: (&x).into(),
                w: (&weight).into(),
                bias: (&bias).into(),
                residual: (&residual).into(),
                y: (&out).into(),
                m: m.into(),
                n: n.into(),
                k: k.into(),
                act: act.into(),
                splitk_workspace: (&splitk_workspace).into(),
            },
        )?,
    }
    if let Some(splitk_workspace) = splitk_workspace {
        let vec4 = if n.is_multiple_of(4) { 4 } else { 1 };
        let launch =
            Launch::per_element(m * n / vec4).with_cost(0, m * n * (4 * split_k + dtype.bytes()));
        let family = if vec4 > 1 {
            kernels::LINEAR_SPLITK_REDUCE_VEC4
        } else {
            kernels::LINEAR_SPLITK_REDUCE
        };
        cuda.launch(
            family.of(dtype)?,
            launch,
            kernels::LinearSplitkReduceArgs {
                splitk_workspace: (&splitk_workspace).into(),
                bias: (&bias).into(),
                residual: (&residual).into(),
                y: (&out).into(),
                count: (m * n).into(),
                n: n.into(),
                act: act.into(),
                split_k: split_k.into(),
            },
        )?;
    }
    Ok(Tensor::from_device(shape, out, dtype))
}

/// The gradient of the input: a dense layer with the weight transposed, whose residual is the
/// gradient so far.
pub fn input_gradient(
    cuda: &Cuda,
    weight: &Tensor,
    dy: &Tensor,
    so_far: Option<&Tensor>,
) -> Result<Tensor, OpError> {
    let (dtype, n) = (cuda.precision(), dy.channels());
    let k = weight.len() / n;
    let mut shape = dy.shape().to_vec();
    shape.pop();
    shape.push(k);
    let back =
        |weight: (&Tensor, bool)| product(cuda, shape, dy, weight, None, Activation::None, so_far);
    let whole = n.is_multiple_of(piece(dtype)) && k.is_multiple_of(piece(dtype));
    if cuda.products() != Precision::Ieee && whole {
        return back((weight, true));
    }
    let (values, transposed) =
        (weight.to_device(cuda, dtype)?, cuda.allocate(weight.len(), dtype)?);
    let launch = Launch::per_element(weight.len()).with_cost(0, 2 * weight.len() * dtype.bytes());
    cuda.launch(
        kernels::LINEAR_TRANSPOSE.of(dtype)?,
        launch,
        kernels::LinearTransposeArgs {
            w: (&values).into(),
            y: (&transposed).into(),
            n: n.into(),
            k: k.into(),
        },
    )?;
    back((&Tensor::from_device([k, n], transposed, dtype), false))
}

/// The most runs of rows that a weight gradient is split into, and the fewest rows of one on tensor
/// cores: adding runs up takes a launch. The fewest rows of one that is tried.
const RUNS: usize = 64;
const RUN: usize = 512;
const LEAST_RUN: usize = 64;
/// The number of blocks that gives every multiprocessor work when each takes all rows of a weight
/// gradient.
const FILL: usize = 132;

/// How a weight gradient is divided among blocks.
#[derive(Clone, Copy, PartialEq)]
struct Runs {
    /// Whether a block has 128 outputs instead of 64: wide blocks read less.
    wide: bool,
    /// The number of runs of rows.
    runs: usize,
}

impl Runs {
    /// Outputs of a block.
    fn height(wide: bool) -> usize {
        if wide { 2 * EDGE } else { EDGE }
    }

    /// The number of blocks of a run.
    fn blocks(wide: bool, [n, k]: [usize; 2]) -> usize {
        n.div_ceil(Runs::height(wide)) * k.div_ceil(EDGE)
    }

    /// By the rule of thumb, in plain arithmetic or on tensor cores: wide, if there are enough
    /// blocks.
    fn usual(m: usize, of: [usize; 2], plain: bool) -> Runs {
        let wide = !plain && Runs::blocks(true, of) >= FILL;
        let (most, run) = if plain { (512, EDGE) } else { (2 * FILL, RUN) };
        let runs = (most / Runs::blocks(wide, of)).clamp(1, RUNS).min(m.div_ceil(run));
        Runs { wide, runs }
    }

    /// The others that are tried.
    fn others(m: usize, of: [usize; 2], plain: bool) -> Vec<Runs> {
        let wides: &[bool] = if plain { &[false] } else { &[false, true] };
        let numbers = [1, 2, 4, 8, 16];
        let all = wides.iter().flat_map(|&wide| numbers.map(|runs| Runs { wide, runs }));
        all.filter(|Runs { wide, runs }| {
            let blocks = Runs::blocks(*wide, of) * runs;
            *runs == 1 || m / runs >= LEAST_RUN && blocks <= 8 * FILL
        })
        .collect()
    }
}

impl fmt::Display for Runs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} outputs, {} runs", Runs::height(self.wide), self.runs)
    }
}

/// The gradient of the weight `[out, in]`, in float32, added to the gradient so far.
pub fn weight_gradient(
    cuda: &Cuda,
    x: &Tensor,
    dy: &Tensor,
    mut so_far: Option<Tensor>,
) -> Result<Tensor, OpError> {
    let (dtype, m, n, k) = (cuda.precision(), dy.rows(), dy.channels(), x.channels());
    let plain = dtype == DType::F32;
    let rounded = m.next_power_of_two().max(LEAST_ROWS);
    let (Runs { wide, runs }, _launches) = cuda.choose(
        "weight_gradient_dense",
        format_args!("m{rounded}n{n}k{k}"),
        Runs::usual(m, [n, k], plain),
        || Runs::others(rounded, [n, k], plain),
    );
    let height = Runs::height(wide);
    let (across, down) = (n.div_ceil(height), k.div_ceil(EDGE));
    let run = m.div_ceil(runs).next_multiple_of(32);
    let runs = m.div_ceil(run);
    // A single run writes the sum itself.
    let only = if runs == 1 { so_far.take() } else { None };
    let (partial, more) = place(cuda, only, runs * n * k)?;
    let (x, dy) = (x.to_device(cuda, dtype)?, dy.to_device(cuda, dtype)?);
    // Two tiles in float, or four buffers of 32 rows of both.
    let (threads, shared) = match plain {
        true => (256, 2 * 16 * (EDGE + 4) * 4),
        false => (128, 4 * 32 * (height + 8 + EDGE + 8) * 2),
    };
    let family =
        if wide { kernels::WEIGHT_GRADIENT_DENSE_WIDE } else { kernels::WEIGHT_GRADIENT_DENSE };
    let launch = Launch { grid: [across, down, runs], threads, shared, ..Launch::per_element(0) }
        .with_cost(2 * m * n * k, (m * k + m * n) * dtype.bytes() + n * k * 4);
    cuda.launch(
        family.of(dtype)?,
        launch,
        kernels::WeightGradientDenseArgs {
            x: (&x).into(),
            dy: (&dy).into(),
            partial: (&partial).into(),
            m: m.into(),
            n: n.into(),
            k: k.into(),
            run: run.into(),
            more: more.into(),
        },
    )?;
    Ok(part_sums(cuda, partial, [runs, n * k], so_far)?.reshape([n, k]))
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::device::Cpu;

    /// The base network's shapes, and few rows.
    #[test]
    fn the_rule_takes_tall_blocks_by_wgmma_where_there_are_many() {
        for ([m, n, k], expected) in [
            ([512, 2304, 768], (Tile::WgmmaTall, 1)),
            ([512, 3072, 768], (Tile::WgmmaTall, 1)),
            ([512, 768, 768], (Tile::Wgmma, 1)),
            ([512, 768, 3072], (Tile::Wgmma, 4)),
            ([60, 2048, 384], (Tile::Few, 1)),
        ] {
            let Division { tile, split_k } = Division::usual([m, n, k], true);
            assert_eq!((tile, split_k), expected, "{m}, {n}, {k}");
            let Division { tile, .. } = Division::usual([m, n, k], false);
            assert!(matches!(tile, Tile::Many | Tile::Few), "{m}, {n}, {k}");
            let [by_either, by_mma] = [true, false].map(|on| Division::others([m, n, k], on));
            assert!(by_either.len() > by_mma.len() && by_either.starts_with(&by_mma));
        }
        // Two blocks have room on a multiprocessor, which keeps 1 KB for each.
        for tile in [Tile::Wgmma, Tile::WgmmaTall] {
            assert!(2 * (tile.block().shared + 1024) <= 228 << 10, "{tile:?}");
        }
    }

    /// For small and for wide blocks, for rows in one run and in several, for any number of
    /// columns.
    #[test]
    fn gradients_of_weights_on_tensor_cores_are_those_of_the_formula() {
        // Small numbers, whose products and sums are exact in float and in 16 bits.
        let small = |shape: [usize; 2], seed: usize| {
            let at = |i: usize| ((i + seed) * 7919 % 2039 % 9) as f32 - 4.0;
            Tensor::new(shape, (0..shape[0] * shape[1]).map(at).collect())
        };
        let devices =
            [DType::F16, DType::Bf16].map(|dtype| Cuda::emulated(Cpu::new(4).unwrap(), dtype, 3));
        for [m, n, k] in [[70, 1544, 712], [1100, 64, 72], [33, 9, 40], [40, 24, 7], [1, 1, 1]] {
            let (x, dy) = (small([m, k], 5), small([m, n], 60));
            let mut once = vec![0.0; n * k];
            for (x, dy) in x.data().chunks_exact(k).zip(dy.data().chunks_exact(n)) {
                for (sums, dy) in once.chunks_exact_mut(k).zip(dy) {
                    sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += x * dy);
                }
            }
            let twice: Vec<f32> = once.iter().map(|v| 2.0 * v).collect();
            for cuda in &devices {
                let what = format!("{}, {m}, {n}, {k}", cuda.precision());
                let got = weight_gradient(cuda, &x, &dy, None).unwrap();
                assert!(got.try_data().unwrap()[..] == once[..], "{what}");
                let on = weight_gradient(cuda, &x, &dy, Some(got)).unwrap();
                assert!(on.try_data().unwrap()[..] == twice[..], "{what}, on");
            }
        }
    }
}
