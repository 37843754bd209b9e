//! The optimiser on CUDA devices: all parameters in one launch. See `kernels/adamw.cu`.

use super::{Limit, Step};
use crate::device::cuda::{Launch, Memory, kernels};
use crate::device::{Cuda, DType};
use crate::tensor::{OpError, Tensor};
use std::sync::Arc;

/// Values of a block.
const RUN: usize = 1 << 14;

/// The addresses of tensors, as the kernels read them: one line per tensor, followed by the run and
/// tensor of each block.
struct Table {
    memory: Arc<Memory>,
    /// The byte at which the runs begin.
    runs: usize,
    blocks: usize,
    values: usize,
}

impl Table {
    /// A line per tensor: the addresses of up to four arrays of its values, and their length.
    fn new(cuda: &Cuda, tensors: &[(Vec<&Arc<Memory>>, usize)]) -> Result<Table, OpError> {
        let (mut words, mut runs) = (vec![], vec![]);
        for (at, (arrays, len)) in tensors.iter().enumerate() {
            let mut line = [0u64; 5];
            line.iter_mut().zip(arrays).for_each(|(slot, memory)| *slot = memory.address());
            line[4] = *len as u64;
            words.extend(line);
            runs.extend((0..len.div_ceil(RUN)).map(|run| [at as i32, run as i32]));
        }
        let (blocks, values) = (runs.len(), tensors.iter().map(|t| t.1).sum());
        let begin = size_of_val(&words[..]);
        // One copy: two numbers of a run are stored as one of a line.
        words.extend(runs.into_iter().map(bytemuck::cast::<[i32; 2], u64>));
        Ok(Table { memory: cuda.upload(&words)?, runs: begin, blocks, values })
    }

    /// The launch of a kernel over the table: with `shared` bytes of shared memory, and the given
    /// floating-point operations and bytes per value.
    fn launch(&self, shared: usize, [flops, bytes]: [usize; 2]) -> Launch {
        Launch { grid: [self.blocks, 1, 1], shared, ..Launch::per_element(0) }
            .with_cost(flops * self.values, bytes * self.values)
    }
}

/// Makes `t` the only owner of its values in float32 on the device, and returns the memory to
/// change them in. Copies of them elsewhere are dropped.
pub fn resident(cuda: &Cuda, t: &mut Tensor) -> Result<Arc<Memory>, OpError> {
    let memory = if t.is_f32_on(cuda) && t.is_unique() {
        t.to_device(cuda, DType::F32)?
    } else {
        let (from, to) = (t.to_device(cuda, DType::F32)?, cuda.allocate(t.len(), DType::F32)?);
        cuda.copy(&from, 0, &to, 0, t.len() * 4)?;
        to
    };
    *t = Tensor::persistent(t.shape(), memory.clone());
    Ok(memory)
}

pub fn sum_of_squares(cuda: &Cuda, gradients: &[&Tensor]) -> Result<Arc<Memory>, OpError> {
    let values =
        gradients.iter().map(|g| g.to_device(cuda, DType::F32)).collect::<Result<Vec<_>, _>>()?;
    let lines: Vec<_> = values.iter().zip(gradients).map(|(v, g)| (vec![v, v], g.len())).collect();
    let table = Table::new(cuda, &lines)?;
    let (partial, total) = (cuda.allocate_bytes(table.blocks * 8)?, cuda.allocate_bytes(8)?);
    cuda.launch(
        kernels::ADAMW_SQUARES,
        table.launch(256 * 8, [2, 4]),
        kernels::AdamwSquaresArgs {
            table: (&table.memory).into(),
            runs: table.memory.at(table.runs),
            partial: (&partial).into(),
        },
    )?;
    let launch = Launch { grid: [1, 1, 1], shared: 256 * 8, ..Launch::per_element(0) }
        .with_cost(table.blocks, table.blocks * 8);
    cuda.launch(
        kernels::ADAMW_TOTAL,
        launch,
        kernels::AdamwTotalArgs {
            partial: (&partial).into(),
            total: (&total).into(),
            parts: table.blocks.into(),
        },
    )?;
    Ok(total)
}

/// One step of every parameter that has a gradient.
pub fn step(
    cuda: &Cuda,
    parameters: &mut [&mut Tensor],
    gradients: &[Option<&Tensor>],
    moments: &mut [[Tensor; 2]],
    s: Step,
    limit: Limit,
) -> Result<(), OpError> {
    let mut held = vec![];
    for ((p, g), [m, v]) in parameters.iter_mut().zip(gradients).zip(moments) {
        let Some(g) = g else { continue };
        held.push((
            [
                resident(cuda, p)?,
                g.to_device(cuda, DType::F32)?,
                resident(cuda, m)?,
                resident(cuda, v)?,
            ],
            g.len(),
        ));
    }
    let lines: Vec<_> = held.iter().map(|(memory, len)| (memory.iter().collect(), *len)).collect();
    let table = Table::new(cuda, &lines)?;
    let ([beta1, beta2], [corrected1, corrected2]) = (s.betas, s.corrected);
    Ok(cuda.launch(
        kernels::ADAMW_STEP,
        table.launch(0, [16, 28]),
        kernels::AdamwStepArgs {
            table: (&table.memory).into(),
            runs: table.memory.at(table.runs),
            total: (&limit.square).into(),
            beta1,
            beta2,
            corrected1,
            corrected2,
            eps: s.eps,
            max_norm: limit.max_norm,
            scale: limit.scale,
            decay: s.decay,
            lr: s.lr,
        },
    )?)
}

/// Moves each average towards its value.
pub fn follow(
    cuda: &Cuda,
    averages: &mut [Tensor],
    values: &[&Tensor],
    rate: f32,
    square: &Arc<Memory>,
) -> Result<(), OpError> {
    let mut held = vec![];
    for (average, value) in averages.iter_mut().zip(values) {
        held.push(([resident(cuda, average)?, value.to_device(cuda, DType::F32)?], value.len()));
    }
    let lines: Vec<_> = held.iter().map(|(memory, len)| (memory.iter().collect(), *len)).collect();
    let table = Table::new(cuda, &lines)?;
    Ok(cuda.launch(
        kernels::ADAMW_FOLLOW,
        table.launch(0, [3, 12]),
        kernels::AdamwFollowArgs {
            table: (&table.memory).into(),
            runs: table.memory.at(table.runs),
            total: square.into(),
            rate,
        },
    )?)
}
