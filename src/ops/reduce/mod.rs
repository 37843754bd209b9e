//! Adding up what the blocks or runs of a kernel wrote: partial sums that several ops have on CUDA
//! devices.

mod cuda;

use crate::device::Cpu;
use crate::tensor::{OpError, Tensor};
pub(crate) use cuda::{Columns, adders, column_sums, part_sums, place, weight_total};

/// Values of a unit of work.
const RUN: usize = 1 << 16;

/// A part added to the sum so far, on the host.
pub(crate) fn added(so_far: Option<Tensor>, part: Tensor) -> Tensor {
    match so_far {
        None => part,
        Some(mut sum) => {
            sum.make_mut().iter_mut().zip(part.data()).for_each(|(s, p)| *s += p);
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
        let so_far = so_far.try_data()?;
        cpu.chunks_mut(part.make_mut(), RUN, |unit, values| {
            let so_far = &so_far[unit * RUN..][..values.len()];
            values.iter_mut().zip(so_far).for_each(|(v, s)| *v += s);
        });
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
