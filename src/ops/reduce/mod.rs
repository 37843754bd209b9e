//! Adding up what the blocks or runs of a kernel left: partial sums that several ops have on CUDA
//! devices.

mod cuda;

pub(crate) use cuda::{Columns, adders, column_sums, part_sums, weight_total};
