//! Adding up on CUDA devices: rows of matrices, and partial sums. See `kernels/lib/sums.cuh`,
//! `kernels/norm.cu` and `kernels/weight_gradient.cu`.

use crate::device::cuda::{Chosen, Launch, Memory, kernels};
use crate::device::{Cuda, DType};
use crate::tensor::{OpError, Tensor};
use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

/// The destination of a sum of `count` values: memory of its own, or that of the sum so far, and
/// whether that has values to add to.
pub fn place(
    cuda: &Cuda,
    sum: Option<Tensor>,
    count: usize,
) -> Result<(Arc<Memory>, bool), OpError> {
    let Some(sum) = sum else { return Ok((cuda.allocate(count, DType::F32)?, false)) };
    if sum.len() != count {
        let expected = format!("{count} values");
        return Err(sum.shape_error("backward", "the gradient so far", expected));
    }
    let memory = sum.to_device(cuda, DType::F32)?;
    if sum.device_type() == Some(DType::F32) {
        return Ok((memory, true));
    }
    // Copies kept there of values whose home is elsewhere stay as they are.
    let own = cuda.allocate(count, DType::F32)?;
    cuda.copy(&memory, 0, &own, 0, 4 * count)?;
    Ok((own, true))
}

/// Threads of a block that adds up this many tiles.
pub fn adders(tiles: usize) -> usize {
    tiles.next_multiple_of(32).clamp(32, 512)
}

/// The most tiles that a matrix's rows are cut into, and the most rows that are not cut.
const TILES: usize = 512;
/// Columns that a thread takes if the number of columns is a multiple of it.
const EACH: usize = 4;
/// The most threads side by side in a row.
const LANES: usize = 8;

/// Where a kernel writes sums: the first list and the second, or neither.
type Lists = [Option<Arc<Memory>>; 2];

/// The rows of a tile.
#[derive(Clone, Copy, PartialEq)]
struct Run(usize);

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows a tile", self.0)
    }
}

/// How the sums over rows of matrices are divided among blocks.
pub struct Columns {
    items: usize,
    tiles: usize,
    across: usize,
    shared: usize,
    /// Rows of a tile.
    pub run: usize,
    /// Groups of columns of a block.
    pub lanes: usize,
    /// What the launches belong to, until the sums are made.
    launches: Cell<Option<Chosen>>,
}

impl Columns {
    /// For `items` matrices of that many rows and columns: `kinds` sums of each column, and
    /// `beside` more per group of columns.
    pub fn new(
        cuda: &Cuda,
        items: usize,
        [rows, c]: [usize; 2],
        [kinds, beside]: [usize; 2],
    ) -> Columns {
        let each = if c.is_multiple_of(EACH) { EACH } else { 1 };
        let groups = c.div_ceil(each);
        let lanes = groups.next_power_of_two().min(LANES);
        // Threads have eight rows, or a multiple of that.
        let cut = |tiles: usize| Run(rows.div_ceil(tiles).next_multiple_of(8 * 256 / lanes));
        let (Run(run), launches) = match rows <= TILES {
            true => (Run(rows.max(1)), None),
            false => {
                let (run, launches) = cuda.choose(
                    "sums",
                    format_args!("n{items}r{rows}c{c}k{kinds}"),
                    cut(TILES),
                    || [TILES / 4, TILES / 2, 2 * TILES].map(cut).into(),
                );
                (run, Some(launches))
            }
        };
        Columns {
            items,
            tiles: rows.div_ceil(run).max(1),
            across: groups.div_ceil(lanes),
            shared: 8 * kinds * lanes * (each + beside) * 8,
            run,
            lanes,
            launches: Cell::new(launches),
        }
    }

    /// The launch of a kernel that adds them up.
    pub fn launch(&self) -> Launch {
        Launch {
            grid: [self.tiles, self.items, self.across],
            shared: self.shared,
            ..Launch::per_element(0)
        }
    }

    /// Two sums of each of `width` columns, as lists `[items * width]` in float32. `sum` launches
    /// the kernel: it writes partial sums, or the lists themselves if a tile has all rows.
    pub fn sums(
        &self,
        cuda: &Cuda,
        width: usize,
        sum: impl FnOnce(&Option<Arc<Memory>>, &Lists) -> Result<(), OpError>,
    ) -> Result<[Tensor; 2], OpError> {
        self.sums_onto(cuda, width, None, |partial, lists, _| sum(partial, lists))
    }

    /// Two sums of each of `width` columns, the first list added to the sums so far. `sum` is told
    /// whether there are any.
    fn sums_onto(
        &self,
        cuda: &Cuda,
        width: usize,
        so_far: Option<Tensor>,
        sum: impl FnOnce(&Option<Arc<Memory>>, &Lists, bool) -> Result<(), OpError>,
    ) -> Result<[Tensor; 2], OpError> {
        let count = self.items * width;
        let (first, more) = place(cuda, so_far, count)?;
        let lists = [first, cuda.allocate(count, DType::F32)?];
        if self.tiles > 1 {
            let partial = Some(cuda.allocate_bytes(count * self.tiles * 16)?);
            sum(&partial, &[None, None], false)?;
            totals(cuda, &partial, &lists, [self.items, self.tiles, width], more)?;
        } else {
            sum(&None, &lists.clone().map(Some), more)?;
        }
        drop(self.launches.take());
        Ok(lists.map(|memory| Tensor::from_device([count], memory, DType::F32)))
    }
}

/// Sums over the rows of values `[items, rows, c]` of a type: a list `[items * c]` in float32, or
/// the sums so far with these added.
pub fn column_sums(
    cuda: &Cuda,
    values: &Arc<Memory>,
    dtype: DType,
    [items, rows, c]: [usize; 3],
    so_far: Option<Tensor>,
) -> Result<Tensor, OpError> {
    let columns = Columns::new(cuda, items, [rows, c], [1, 0]);
    let count = items * rows * c;
    let [sums, _] = columns.sums_onto(cuda, c, so_far, |partial, [first, _], more| {
        Ok(cuda.launch(
            kernels::COLUMN_SUMS.of(dtype)?,
            columns.launch().with_cost(count, count * dtype.bytes()),
            kernels::ColumnSumsArgs {
                x: values.into(),
                partial: partial.into(),
                first: first.into(),
                rows: rows.into(),
                c: c.into(),
                run: columns.run.into(),
                lanes: columns.lanes.into(),
                more: more.into(),
            },
        )?)
    })?;
    Ok(sums)
}

/// Adds up partial sums `[items][tiles][c][2]` to two lists `[items * c]` in float32; the first may
/// be added to the sums so far.
fn totals(
    cuda: &Cuda,
    partial: &Option<Arc<Memory>>,
    [a, b]: &[Arc<Memory>; 2],
    [items, tiles, c]: [usize; 3],
    more: bool,
) -> Result<(), OpError> {
    let launch = Launch {
        grid: [items * c, 1, 1],
        threads: adders(tiles),
        shared: 16 * 16,
        ..Launch::per_element(0)
    }
    .with_cost(0, items * tiles * c * 16);
    Ok(cuda.launch(
        kernels::NORM_TOTALS,
        launch,
        kernels::NormTotalsArgs {
            partial: partial.into(),
            a: a.into(),
            b: b.into(),
            tiles: tiles.into(),
            c: c.into(),
            more: more.into(),
        },
    )?)
}

/// The most parts that a thread adds up alone, and the most values of each for which blocks share a
/// larger number of parts.
const MANY: usize = 16;
const SHARED: usize = 1 << 18;

/// Adds up partial sums `[parts][each]`, together with the sum so far. A single one is the sum
/// itself, and takes no launch.
pub fn part_sums(
    cuda: &Cuda,
    partial: Arc<Memory>,
    [parts, each]: [usize; 2],
    so_far: Option<Tensor>,
) -> Result<Tensor, OpError> {
    if parts == 1 && so_far.is_none() {
        return Ok(Tensor::from_device([each], partial, DType::F32));
    }
    if parts > MANY && each <= SHARED {
        return column_sums(cuda, &partial, DType::F32, [1, parts, each], so_far);
    }
    let (total, more) = place(cuda, so_far, each)?;
    let wide = if each.is_multiple_of(4) { 4 } else { 1 };
    cuda.launch(
        kernels::WEIGHT_GRADIENT_SUM,
        Launch::per_element(each / wide).with_cost(parts * each, (parts + 1) * each * 4),
        kernels::WeightGradientSumArgs {
            partial: (&partial).into(),
            y: (&total).into(),
            parts: parts.into(),
            each: each.into(),
            more: more.into(),
        },
    )?;
    Ok(Tensor::from_device([each], total, DType::F32))
}

/// Adds up `parts` partial sums `[part][phase][tap][c][outs]` to `[phase][outs][c][tap]`, together
/// with the sum so far.
pub fn weight_total(
    cuda: &Cuda,
    partial: &Arc<Memory>,
    parts: usize,
    [phases, taps, c, outs]: [usize; 4],
    so_far: Option<Tensor>,
) -> Result<Tensor, OpError> {
    let count = phases * taps * c * outs;
    let (total, more) = place(cuda, so_far, count)?;
    // If there are many parts, there are few weights: a block has one tap, whose parts its warps
    // share.
    let (each, share) = if parts >= MANY { (1, 8) } else { (taps, 1) };
    let launch = Launch {
        grid: [c * outs.div_ceil(32), taps.div_ceil(each), phases],
        shared: each * share * 33 * 8,
        ..Launch::per_element(0)
    }
    .with_cost(parts * count, (parts + 1) * count * 4);
    cuda.launch(
        kernels::WEIGHT_GRADIENT_TOTAL,
        launch,
        kernels::WeightGradientTotalArgs {
            partial: partial.into(),
            y: (&total).into(),
            parts: parts.into(),
            taps: taps.into(),
            c: c.into(),
            outs: outs.into(),
            each: each.into(),
            share: share.into(),
            more: more.into(),
        },
    )?;
    Ok(Tensor::from_device([count], total, DType::F32))
}
