//! Sums of parts: of what blocks or runs of a kernel wrote, and of gradients that several ops give.

mod cuda;

use crate::device::Cpu;
use crate::tensor::{OpError, Tensor};
pub(crate) use cuda::{Columns, adders, column_sums, part_sums, place, weight_total};

/// Values of a unit of work.
const RUN: usize = 1 << 16;

/// Adds to each of some values one of as many others.
pub(crate) fn add_values(cpu: &Cpu, to: &mut [f32], others: &[f32]) {
    cpu.chunks_mut(to, RUN, |unit, to| {
        let others = &others[unit * RUN..][..to.len()];
        to.iter_mut().zip(others).for_each(|(t, o)| *t += o);
    });
}

/// A part added to the sum so far, on the host.
pub(crate) fn added(cpu: &Cpu, so_far: Option<Tensor>, part: Tensor) -> Tensor {
    match so_far {
        None => part,
        Some(mut sum) => {
            add_values(cpu, sum.make_mut(), part.data());
            sum
        }
    }
}

/// A part that an op has just computed, on the host, with the sum so far added to it.
pub(crate) fn onto(
    cpu: &Cpu,
    so_far: Option<&Tensor>,
    mut part: Tensor,
) -> Result<Tensor, OpError> {
    if let Some(so_far) = so_far {
        add_values(cpu, part.make_mut(), so_far.try_data()?);
    }
    Ok(part)
}

/// An error unless the sum so far, if there is one, has `count` values.
pub(crate) fn check_so_far(
    op: &'static str,
    so_far: Option<&Tensor>,
    count: usize,
) -> Result<(), OpError> {
    match so_far {
        Some(sum) if sum.len() != count => {
            Err(sum.shape_error(op, "the gradient so far", format!("{count} values")))
        }
        _ => Ok(()),
    }
}
