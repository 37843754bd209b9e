//! Adding up what the blocks or runs of a kernel wrote: partial sums that several ops have on CUDA
//! devices.

mod cuda;

use crate::tensor::Tensor;
pub(crate) use cuda::{Columns, adders, column_sums, part_sums, place, weight_total};

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
